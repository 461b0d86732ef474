"""What the drop-in modules of every family share: parameters named after the format's tensors, a float
``.weight`` view, dtype and device moves that leave the packed form bit-identical, checked loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


class Format(Protocol):
    """The stored form of one weight: what a family's format class provides."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bits_per_weight(self) -> float: ...
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]: ...
    def describe(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


# What activations, biases, scales and outliers may be, by the name that files give it.
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_registry: dict[tuple[str, str], type[Layer]] = {}


class Layer(nn.Module):
    """Base of the packed layers: the tensors of ``format`` as frozen Parameters, plus an optional float bias.

    Subclasses set ``family`` and ``kind`` and are found by them when a saved model is rebuilt.

    Attributes:
        format: the stored form; shapes and dtypes of all tensors follow from it.
        dtype: the compute dtype that ``.weight`` shows; ``.to(dtype)`` changes it and the bias, never the
            packed form.
        weight_error: relative Frobenius error of the weight against the float original, where it is known.
        note: what this layer does differently from the module it replaced, for the report.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    format: Format
    weight_error: float | None
    note: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _registry[cls.family, cls.kind] = cls

    def __init__(
        self,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self.dtype = dtype or torch.get_default_dtype()
        self.weight_error = None
        self.note = None
        for name, (shape, tensor_dtype) in format.tensors().items():
            empty = torch.zeros(shape, dtype=tensor_dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name in self.optional_tensors():
            if name not in self._parameters:
                self.register_parameter(name, None)
        bias_tensor = torch.zeros(format.out_features, dtype=self.dtype, device=device) if bias else None
        self.bias: nn.Parameter | None = None if bias_tensor is None else nn.Parameter(bias_tensor)
        self._register_state_dict_hook(_note_format)  # type: ignore[no-untyped-call]

    @classmethod
    def optional_tensors(cls) -> tuple[str, ...]:
        """Names of tensors that some formats of the family do not have; they are then ``None``."""
        return ()

    def named_tensors(self) -> dict[str, Tensor]:
        """The stored tensors of the format (not the bias), by name."""
        return {name: self._parameters[name] for name in self.format.tensors()}  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return next(iter(self.named_tensors().values())).device

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the float weight, for code that looks at ``.weight``; every element is NaN.

        It is a stride-0 view and costs nothing. NaN, so that code which multiplies by ``.weight`` instead of
        calling the layer fails visibly. The values are what :meth:`dequantize` returns.
        """
        shape = (self.format.out_features, self.format.in_features)
        view = torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(shape)
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: leave it alone
        return view

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[out_features, in_features]`` that this layer multiplies by."""
        raise NotImplementedError

    def to_float(self) -> nn.Module:
        """A plain torch layer with the dequantized weight."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON-ready description from which :func:`build` makes an empty layer of the same shape."""
        return {
            "family": self.family,
            "kind": self.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bias": self.bias is not None,
            "format": self.format.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str = "meta") -> Layer:
        """The inverse of :meth:`config`; tensors are empty. Raises ``ValueError`` naming a bad field."""
        raise NotImplementedError

    def validate(self, name: str = "layer") -> None:
        """Check every tensor against the format and its values against their ranges.

        Raises:
            ValueError: naming ``name``, the tensor, the requirement and what was found.
        """
        for tensor_name, (shape, dtype) in self.format.tensors().items():
            self.check_tensor(name, tensor_name, self._parameters[tensor_name], shape, dtype)
        if self.bias is not None and tuple(self.bias.shape) != (self.format.out_features,):
            raise ValueError(
                f"{name}.bias must have shape ({self.format.out_features},): got {tuple(self.bias.shape)}"
            )
        if self.device.type != "meta":
            self.validate_values(name)

    def validate_values(self, name: str) -> None:
        """Family-specific ranges: finite scales, zeros and indices in range."""

    @staticmethod
    def check_tensor(
        name: str, tensor_name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Raise ``ValueError`` unless ``tensor`` has exactly this shape and dtype."""
        if tensor is None:
            raise ValueError(f"{name}.{tensor_name} is missing: {dtype} {shape} is required")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}.{tensor_name} must have shape {tuple(shape)}: got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}.{tensor_name} must be {dtype}: got {tensor.dtype}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        # `.to(dtype)` is meant for activations: the packed form only follows the device
        stored = {id(tensor) for tensor in self.named_tensors().values()}
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        if dtype not in FLOAT_DTYPES.values():
            raise ValueError(f"a {type(self).__name__} runs in float32, float16 or bfloat16: cannot move it to {dtype}")
        self.dtype = dtype

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # nn.Module would cast a wrong dtype silently; a packed tensor has exactly one. The same shapes may belong to
        # another format: a state_dict that came straight from a layer says which
        name = prefix.removesuffix(".")
        problems = []
        mine, theirs = self.format.to_dict(), local_metadata.get("lowbit_format", {})
        for field, value in theirs.items():
            if value != mine.get(field):
                problems.append(f"{name}: the state_dict was saved with {field}={value}: got {field}={mine.get(field)}")
        for tensor_name, (shape, dtype) in self.format.tensors().items():
            tensor = state_dict.get(prefix + tensor_name)
            if tensor is not None:
                try:
                    self.check_tensor(name, tensor_name, tensor, shape, dtype)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not error_msgs and self.device.type != "meta":
            try:
                self.validate_values(name)
            except ValueError as error:
                error_msgs.append(str(error))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.format.in_features}, out_features={self.format.out_features}, "
            f"bias={self.bias is not None}, {self.format.describe()}"
        )


def _note_format(layer: Layer, _state: dict[str, Any], _prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata["lowbit_format"] = layer.format.to_dict()


def build(config: dict[str, Any], device: torch.device | str = "meta") -> Layer:
    """An empty layer from :meth:`Layer.config`; raises ``ValueError`` naming an unknown or invalid field."""
    key = (config.get("family"), config.get("kind"))
    cls = _registry.get(key)  # type: ignore[arg-type]
    if cls is None:
        known = ", ".join(f"{family}/{kind}" for family, kind in sorted(_registry))
        raise ValueError(f"family/kind must be one of {known}: got family={key[0]!r}, kind={key[1]!r}")
    return cls.from_config(config, device)


def layers(model: nn.Module, *, duplicates: bool = False) -> dict[str, Layer]:
    """Every packed layer of ``model`` by name; with ``duplicates``, a shared module under each of its names."""
    found: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=not duplicates)
    return {name: module for name, module in found if isinstance(module, Layer)}
