"""What the drop-in modules of every family share: parameters named after the format's tensors, a float
``.weight`` view, dtype and device moves that leave the packed form bit-identical, checked loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.backends.operands import Operands
from lowbit.core.family import FLOAT_DTYPES, Format, dtype_name
from lowbit.nn.call import call_of

_registry: dict[tuple[str, str], type[Layer]] = {}
_CONFIG_FIELDS = {"family", "kind", "dtype", "bias", "format"}


class Layer(nn.Module):
    """Base of the packed layers: the tensors of ``format`` as frozen Parameters, plus an optional float bias.

    Subclasses set ``family``, ``kind`` and what these consist of, and are found by them when a saved model is rebuilt.

    Attributes:
        format: the stored form; shapes and dtypes of all tensors follow from it.
        dtype: the compute dtype that ``.weight`` shows; ``.to(dtype)`` changes it and the bias, never the
            packed form.
        weight_error: relative Frobenius error of the weight against the float original, where it is known.
        note: what this layer does differently from the module it replaced, for the report.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    format_class: ClassVar[type[Format]]
    operands_class: ClassVar[type[Operands]]
    _op: ClassVar[Any]
    _call: ClassVar[Callable[..., Tensor]]
    _numbers: tuple[int, ...]  # the weight's, in the ops' order
    _is_replica = False  # torch's nn.DataParallel sets it
    format: Any  # of type format_class
    bias: nn.Parameter | None
    weight_error: float | None
    note: str | None
    bytes_before: int | None = None  # that went with the float weight, where these are not N*K values of `dtype`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "family") and hasattr(cls, "kind"):
            _registry[cls.family, cls.kind] = cls
            cls._op = getattr(torch.ops.lowbit, f"{cls.family}_{cls.kind}").default
            cls._call = call_of(cls._op, cls.operands_class, cls.kind)

    def __init__(
        self,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self._numbers = format.numbers
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
        self.register_parameter("bias", None if bias_tensor is None else nn.Parameter(bias_tensor))
        self._register_state_dict_hook(_finish_state_dict)  # type: ignore[no-untyped-call]

    @classmethod
    def optional_tensors(cls) -> tuple[str, ...]:
        """Names of tensors that some formats of the family do not have; they are then ``None``."""
        optional = [name for name, type in cls.operands_class.types.items() if type == "Tensor?"]
        activation = cls.operands_class.activation
        return (*optional, *(() if activation is None else activation.tensor_names))

    def named_tensors(self) -> dict[str, Tensor]:
        """The stored tensors of the format (not the bias), by name."""
        return {name: self._parameters[name] for name in self.format.tensors()}  # type: ignore[misc]

    def operands(self) -> Mapping[str, Tensor | None]:
        """What :meth:`forward` reads, by name: quicker than one attribute after another.

        A replica in ``nn.DataParallel`` has its tensors as attributes only.
        """
        return self._parameters if not self._is_replica else {**self.__dict__, **self._parameters}

    def weight_arguments(self, t: Mapping[str, Tensor | None]) -> tuple[Any, ...]:
        """The weight's part of the ops' arguments, from :meth:`operands`."""
        self._is_outdated()
        return (*[t[name] for name in self.operands_class.tensor_names], *self._numbers)

    def _is_outdated(self) -> bool:
        """Whether the tensors are no longer held as they were; how they are is then known again."""
        return False

    def size_arguments(self) -> tuple[int, ...]:
        """``in_features`` for the ops that have no x to take it from, where the family's ops take it."""
        return (self.format.in_features,) if self.operands_class.sized else ()

    @property
    def device(self) -> torch.device:
        # the tensors of the format come first; asking it for them would break a graph that is being made
        return next(tensor for tensor in self._parameters.values() if tensor is not None).device

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
        """The float weight ``[out_features, in_features]`` that this layer multiplies by, rounded once to ``dtype``."""
        op = getattr(torch.ops.lowbit, f"{self.family}_dequantize")
        weight: Tensor = op(*self.weight_arguments(self.operands()), *self.size_arguments(), dtype or self.dtype)
        return weight

    def to_float(self) -> nn.Module:
        """A plain torch layer with the dequantized weight."""
        raise NotImplementedError

    def extras(self) -> dict[str, Any]:
        """What the constructor was given beyond format, bias, dtype and device, where that is not the default."""
        return {}

    @classmethod
    def check_extras(cls, bias: bool, extras: dict[str, Any]) -> dict[str, Any]:
        """:meth:`extras` as a file gives them, checked; raises ``ValueError`` naming a field."""
        if extras:
            raise ValueError(f"unknown field {sorted(extras)[0]!r} for a {cls.family} {cls.kind}")
        return {}

    @classmethod
    def check_dtype(cls, dtype: torch.dtype) -> None:
        """Raise ``ValueError`` unless this is a compute dtype."""
        if dtype not in FLOAT_DTYPES.values():
            raise ValueError(f"a {cls.__name__} runs in float32, float16 or bfloat16: cannot move it to {dtype}")

    def config(self) -> dict[str, Any]:
        """JSON-ready description from which :func:`build` makes an empty layer of the same shape."""
        return LayerConfig.of(self).to_dict()

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str = "meta") -> Layer:
        """:func:`build`."""
        return build(config, device)

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Replace the (meta) parameters by these tensors."""
        for name, tensor in tensors.items():
            self._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)

    def share_weight(self, source: Layer) -> None:
        """Hold the very Parameters of ``source``: every tensor of the weight that both formats have."""
        for name in source.format.weight_tensors():
            if name in self.format.weight_tensors():
                self._parameters[name] = source._parameters[name]

    def prepare(self, *, owned: bool = False) -> Layer:
        """Bring the tensors into the form that the kernels on this device read; here they are in it.

        Moving, converting and loading do it by themselves. The Parameters stay the same, and it is bit for bit both
        ways. ``owned``: the memory of the tensors is nobody else's, and may be rearranged where it is.
        """
        return self

    def _prepare_to_move(self, device: torch.device) -> None:
        """Before the tensors go to ``device``."""

    def _held_shape(self, tensor_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a tensor is held here, of the one that the format says."""
        return shape

    def _as_held(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A ``state_dict`` with the tensors as they are held here."""
        return state_dict

    def _as_saved(self, state: dict[str, Any], prefix: str) -> None:
        """Give ``state`` the tensors in the canonical order."""

    def validate(self, name: str = "layer") -> None:
        """Check every tensor against the format and its values against their ranges.

        Raises:
            ValueError: naming ``name``, the tensor, the requirement and what was found.
        """
        for tensor_name, (shape, dtype) in self.format.tensors().items():
            tensor = self._parameters[tensor_name]
            shape = self._held_shape(tensor_name, shape)
            self.check_tensor(name, tensor_name, tensor, shape, dtype)
        if self.bias is not None and tuple(self.bias.shape) != (self.format.out_features,):
            raise ValueError(
                f"{name}.bias must have shape ({self.format.out_features},): got {tuple(self.bias.shape)}"
            )
        if self.bias is not None and self.bias.dtype not in FLOAT_DTYPES.values():
            raise ValueError(f"{name}.bias must be float32, float16 or bfloat16: got {self.bias.dtype}")
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
        tensors = self.named_tensors().values()
        stored = {id(tensor) for tensor in (*tensors, *(t.grad for t in tensors)) if tensor is not None}
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        dtype = probe.dtype
        self.check_dtype(dtype)
        self.dtype = dtype
        self._prepare_to_move(probe.device)

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self.prepare()

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
        for field in {**mine, **theirs} if theirs else ():
            value, own = theirs.get(field), mine.get(field)
            if value != own:
                problems.append(f"{name}: the state_dict was saved with {field}={value}: got {field}={own}")
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
        state_dict = self._as_held(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not error_msgs and self.device.type != "meta":
            try:
                self.validate_values(name)
            except ValueError as error:
                error_msgs.append(str(error))
            self.prepare()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.format.in_features}, out_features={self.format.out_features}, "
            f"bias={self.bias is not None}, {self.format.describe()}"
        )


def _finish_state_dict(layer: Layer, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Tensors in the canonical order, and the format, for who loads them."""
    local_metadata["lowbit_format"] = layer.format.to_dict()
    layer._as_saved(state, prefix)


def layer_class(family: str, kind: str) -> Any:
    """The layer class of a family: ``kind`` is ``"linear"`` or ``"embedding"``."""
    return _registry[family, kind]


def layer_classes() -> dict[tuple[str, str], type[Layer]]:
    """Every layer class by (family, kind)."""
    return dict(_registry)


@dataclass(frozen=True)
class LayerConfig:
    """What makes an empty layer; :meth:`to_dict` is what a saved folder records of it."""

    layer_class: type[Layer]
    format: Format
    bias: bool
    dtype: torch.dtype
    extras: dict[str, Any]

    @classmethod
    def of(cls, layer: Layer) -> LayerConfig:
        return cls(type(layer), layer.format, layer.bias is not None, layer.dtype, layer.extras())

    @classmethod
    def parse(cls, config: dict[str, Any]) -> LayerConfig:
        """The inverse of :meth:`to_dict`; raises ``ValueError`` naming an unknown or invalid field."""
        extras = dict(config)
        fields = {key: extras.pop(key, None) for key in _CONFIG_FIELDS}
        family, kind = fields["family"], fields["kind"]
        made = _registry.get((family, kind))
        if made is None:
            known = ", ".join(f"{family}/{kind}" for family, kind in sorted(_registry))
            raise ValueError(f"family/kind must be one of {known}: got family={family!r}, kind={kind!r}")
        if fields["dtype"] not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}: got dtype={fields['dtype']!r}")
        if not isinstance(fields["bias"], bool):
            raise ValueError(f"bias must be true or false: got bias={fields['bias']!r}")
        if not isinstance(fields["format"], dict):
            raise ValueError(f"format must be an object: got format={fields['format']!r}")
        format = made.format_class.from_dict(fields["format"])
        extras = made.check_extras(fields["bias"], extras)
        return cls(made, format, fields["bias"], FLOAT_DTYPES[fields["dtype"]], extras)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`parse` is the inverse."""
        return {
            "family": self.layer_class.family,
            "kind": self.layer_class.kind,
            "dtype": dtype_name(self.dtype),
            "bias": self.bias,
            "format": self.format.to_dict(),
            **self.extras,
        }

    def build(self, dtype: torch.dtype | None = None, device: torch.device | str = "meta") -> Layer:
        """An empty layer, in its own compute dtype or another one."""
        self.layer_class.check_dtype(dtype or self.dtype)
        return self.layer_class(self.format, self.bias, dtype or self.dtype, device, **self.extras)


def build(config: dict[str, Any], device: torch.device | str = "meta") -> Layer:
    """An empty layer from :meth:`Layer.config`; raises ``ValueError`` naming an unknown or invalid field."""
    return LayerConfig.parse(config).build(device=device)


def layers(model: nn.Module, *, duplicates: bool = False) -> dict[str, Layer]:
    """Every packed layer of ``model`` by name; with ``duplicates``, a shared module under each of its names."""
    found: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=not duplicates)
    return {name: module for name, module in found if isinstance(module, Layer)}


def storage_of(layer: Layer) -> tuple[int, ...]:
    """What tied layers have in common: every stored tensor of the weight. A factor or a table alone does not tie."""
    return tuple(id(layer._parameters[name]) for name in layer.format.weight_tensors())
