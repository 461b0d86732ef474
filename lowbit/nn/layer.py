"""What the drop-in modules of every family share: parameters named after the format's tensors, a float
``.weight`` view, dtype and device moves that leave the packed form bit-identical, checked loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.backends.layouts import BLOCKS, CANONICAL, Layout, ask_for_huge_pages, by_group, change, layout_of, read_on
from lowbit.backends.reference import csr_row_indices
from lowbit.core.family import FLOAT_DTYPES, Activations, Format, Spec, Weight


def run(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """``op(*args)``, past the Python code of its gradient where none is wanted: that would cost as much as the call."""
    if not _CAN_SKIP or _is_compiling() or (_is_grad_enabled() and _any_requires_grad(*args)):
        return op(*args)  # type: ignore[no-any-return]
    if _is_excluded(_AUTOGRAD):  # as in inference mode
        return op._op(*args)  # type: ignore[no-any-return]
    _exclude(_AUTOGRAD, True)
    try:
        return op._op(*args)  # type: ignore[no-any-return]
    finally:
        _exclude(_AUTOGRAD, False)


_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
# Not public: a torch without one of them makes the plain call.
_AUTOGRAD = getattr(torch._C.DispatchKey, "AutogradFunctionality", None)
_is_excluded: Any = getattr(torch._C, "_dispatch_tls_is_dispatch_key_excluded", None)
_exclude: Any = getattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded", None)
_any_requires_grad: Any = getattr(torch._C, "_any_requires_grad", None)
_CAN_SKIP = None not in (_AUTOGRAD, _is_excluded, _exclude, _any_requires_grad)


_registry: dict[tuple[str, str], type[Layer]] = {}
_CONFIG_FIELDS = {"family", "kind", "dtype", "bias", "format"}


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
    format_class: ClassVar[type[Format]]
    code_tensors: ClassVar[tuple[str, ...]] = ()  # packed codes, held in the layout that a device's kernels read
    group_tensors: ClassVar[tuple[str, ...]] = ()  # [N, G] or [1, 1]: beside blocks, group after group in memory
    _is_replica = False  # torch's nn.DataParallel sets it
    format: Any  # of type format_class
    bias: nn.Parameter | None
    weight_error: float | None
    note: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "family") and hasattr(cls, "kind"):
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
        self.register_parameter("bias", None if bias_tensor is None else nn.Parameter(bias_tensor))
        self._register_state_dict_hook(_finish_state_dict)  # type: ignore[no-untyped-call]

    @classmethod
    def optional_tensors(cls) -> tuple[str, ...]:
        """Names of tensors that some formats of the family do not have; they are then ``None``."""
        return ()

    def named_tensors(self) -> dict[str, Tensor]:
        """The stored tensors of the format (not the bias), by name."""
        return {name: self._parameters[name] for name in self.format.tensors()}  # type: ignore[misc]

    def operands(self) -> Mapping[str, Tensor | None]:
        """What :meth:`forward` reads, by name: quicker than one attribute after another.

        A replica in ``nn.DataParallel`` has its tensors as attributes only.
        """
        return self._parameters if not self._is_replica else {**self.__dict__, **self._parameters}

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
        extras = dict(config)
        fields = {key: extras.pop(key, None) for key in _CONFIG_FIELDS}
        if fields["dtype"] not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}: got dtype={fields['dtype']!r}")
        if not isinstance(fields["bias"], bool):
            raise ValueError(f"bias must be true or false: got bias={fields['bias']!r}")
        if not isinstance(fields["format"], dict):
            raise ValueError(f"format must be an object: got format={fields['format']!r}")
        format = cls.format_class.from_dict(fields["format"])
        return cls._from_fields(format, fields["bias"], FLOAT_DTYPES[fields["dtype"]], device, extras)

    @classmethod
    def _from_fields(
        cls, format: Format, bias: bool, dtype: torch.dtype, device: Any, extras: dict[str, Any]
    ) -> Layer:
        if extras:
            raise ValueError(f"unknown field {sorted(extras)[0]!r} for a {cls.family} {cls.kind}")
        return cls(format, bias, dtype, device)

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Replace the (meta) parameters by these tensors."""
        for name, tensor in tensors.items():
            self._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        """The layouts that this layer's codes may stay in on ``device``; the first one is the best."""
        return read_on(device, self.cpu_layouts())

    def cpu_layouts(self) -> tuple[Layout, ...]:
        """:meth:`layouts` on a CPU with compiled kernels."""
        return (CANONICAL,)

    def prepare(self, *, owned: bool = False) -> Layer:
        """Bring the codes into the layout that the kernels on this device read (:mod:`lowbit.backends.layouts`).

        Moving, converting and loading do it by themselves. The Parameters stay the same, and it is bit for bit both
        ways; ``state_dict()`` always gives the canonical order. ``owned``: the memory of the tensors is nobody else's,
        and may be rearranged where it is.
        """
        self._arrange(self.layouts(self.device), owned)
        for name in self.code_tensors:
            parameter = self._parameters[name]
            if parameter is not None:
                ask_for_huge_pages(parameter.data)
        return self

    def _arrange(self, layouts: tuple[Layout, ...], owned: bool = False) -> None:
        """Bring codes that are in none of ``layouts`` into the first one, for all who share them."""
        for name in self.code_tensors:
            parameter = self._parameters[name]
            if parameter is not None and layout_of(parameter) not in layouts:
                parameter.data = change(parameter.data, layouts[0], self.format.bits, self.format.in_features, owned)
        for name in self.group_tensors:
            parameter = self._parameters[name]
            if parameter is not None and layouts[0] is BLOCKS:
                parameter.data = by_group(parameter.data)
            elif parameter is not None and BLOCKS not in layouts:
                parameter.data = parameter.data.contiguous()

    def validate(self, name: str = "layer") -> None:
        """Check every tensor against the format and its values against their ranges.

        Raises:
            ValueError: naming ``name``, the tensor, the requirement and what was found.
        """
        for tensor_name, (shape, dtype) in self.format.tensors().items():
            tensor = self._parameters[tensor_name]
            layout = layout_of(tensor) if tensor_name in self.code_tensors and tensor is not None else None
            if layout is not None:
                shape = (shape[0], *layout.row_shape(self.format.in_features, self.format.bits))
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
        if dtype not in FLOAT_DTYPES.values():
            raise ValueError(f"a {type(self).__name__} runs in float32, float16 or bfloat16: cannot move it to {dtype}")
        self.dtype = dtype
        self._arrange((CANONICAL, *self.layouts(probe.device)))

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self.prepare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare()  # unpickled where other kernels run

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
        for code_name in self.code_tensors:
            key, parameter = prefix + code_name, self._parameters[code_name]
            layout = None if parameter is None else layout_of(parameter)
            if key in state_dict and parameter is not None and layout is not None and layout is not CANONICAL:
                canonical = state_dict[key].to(parameter.device)
                codes = change(canonical, layout, self.format.bits, self.format.in_features)
                state_dict = {**state_dict, key: codes}
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


class LinearLayer(Layer):
    """``y = x @ W.T + bias``: input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in its dtype."""

    kind = "linear"

    @property
    def in_features(self) -> int:
        return cast(int, self.format.in_features)

    @property
    def out_features(self) -> int:
        return cast(int, self.format.out_features)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        spec: Spec,
        bias: Tensor | None = None,
        *,
        hessian: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> Any:
        """Quantize a float weight ``[N, K]`` with ``spec``; the bias is kept as it is.

        Raises ``ValueError`` when the spec does not fit the weight, or needs calibration that is not given.
        """
        if problem := spec.problem(*weight.shape):
            raise ValueError(problem)
        return cls.from_weight(
            spec.quantize(weight, hessian=hessian), bias,
            activations=spec.activations, activation_group_size=spec.activation_group_size, x_scale=x_scale,
            dtype=weight.dtype,
        )  # fmt: skip

    @classmethod
    def from_weight(
        cls,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activations: Activations = "float",
        activation_group_size: int | None = None,
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """A layer that holds ``weight`` as it is; nothing is rounded again."""
        format = weight.format(activations)
        if activation_group_size is not None:
            format = format.with_activation_groups(activation_group_size)
        layer = cls(format, bias is not None, dtype, "meta")
        layer.store(weight.tensors())
        if activations == "int8_static":
            if x_scale is None:
                raise ValueError("activations='int8_static' needs x_scale, the calibrated scale of the input")
            layer.store({"x_scale": x_scale.detach().reshape(1).float()})
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer.validate()
        return layer.prepare()

    def forward(self, input: Tensor) -> Tensor:
        shape = input.shape
        if not shape or shape[-1] != self.format.in_features:
            raise ValueError(
                f"input must have in_features={self.format.in_features} as its last size: got shape {tuple(shape)}"
            )
        return self.multiply(input)

    def multiply(self, input: Tensor) -> Tensor:
        """The family's op on an input of the right size."""
        raise NotImplementedError

    def to_float(self) -> nn.Linear:
        """``nn.Linear`` with the dequantized weight and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.dequantize())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


class EmbeddingLayer(Layer):
    """``y = W[ids] * output_scale``: ``[..., embedding_dim]`` in ``dtype``.

    ``output_scale`` serves scaled word embeddings (BART, MBART); it is 1.0 otherwise. Raises ``RuntimeError`` for an
    id outside ``[0, num_embeddings)``.
    """

    kind = "embedding"

    def __init__(
        self,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
    ) -> None:
        if bias:
            raise ValueError("an embedding has no bias: got bias=True")
        super().__init__(format, False, dtype, device)
        self.padding_idx = padding_idx
        self.output_scale = output_scale

    @property
    def num_embeddings(self) -> int:
        return cast(int, self.format.out_features)

    @property
    def embedding_dim(self) -> int:
        return cast(int, self.format.in_features)

    @classmethod
    def from_weight(
        cls,
        weight: Weight,
        *,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
    ) -> Any:
        """A layer that holds ``weight`` ``[num_embeddings, embedding_dim]`` as it is."""
        layer = cls(weight.format(), False, dtype, "meta", padding_idx=padding_idx, output_scale=output_scale)
        layer.store(weight.tensors())
        layer.validate()
        return layer.prepare()

    def forward(self, input: Tensor) -> Tensor:
        y = self.gather(input)
        return y if self.output_scale == 1.0 else y * self.output_scale

    def gather(self, ids: Tensor) -> Tensor:
        """The family's op: rows of the weight."""
        raise NotImplementedError

    def to_float(self) -> nn.Module:
        """``nn.Embedding`` with the dequantized weight (followed by the scale where ``output_scale`` is not 1)."""
        weight = nn.Parameter(self.dequantize())
        if self.output_scale != 1.0:
            return ScaledEmbedding(weight, self.padding_idx, self.output_scale).train(self.training)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight.data)
        embedding.weight = weight
        return embedding.train(self.training)

    def config(self) -> dict[str, Any]:
        config = super().config()
        if self.padding_idx is not None:
            config["padding_idx"] = self.padding_idx
        if self.output_scale != 1.0:
            config["output_scale"] = self.output_scale
        return config

    @classmethod
    def _from_fields(
        cls, format: Format, bias: bool, dtype: torch.dtype, device: Any, extras: dict[str, Any]
    ) -> Layer:
        padding_idx, output_scale = extras.pop("padding_idx", None), extras.pop("output_scale", 1.0)
        if extras:
            raise ValueError(f"unknown field {sorted(extras)[0]!r} for a {cls.family} embedding")
        if padding_idx is not None and not isinstance(padding_idx, int):
            raise ValueError(f"padding_idx must be an integer: got padding_idx={padding_idx!r}")
        if not isinstance(output_scale, (int, float)) or isinstance(output_scale, bool):
            raise ValueError(f"output_scale must be a number: got output_scale={output_scale!r}")
        return cls(format, bias, dtype, device, padding_idx=padding_idx, output_scale=float(output_scale))

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, {self.format.describe()}"
        return text if self.output_scale == 1.0 else text + f", output_scale={self.output_scale}"


class ScaledEmbedding(nn.Embedding):
    """``F.embedding(ids, weight) * output_scale``: what a scaled embedding layer dequantizes to."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None, output_scale: float) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding_idx, _weight=weight.data)
        self.weight = weight
        self.output_scale = output_scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.output_scale


def require_finite(name: str, tensor_name: str, tensor: Tensor | None) -> None:
    """Raise ``ValueError`` where a stored float tensor holds NaN or infinity."""
    if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}.{tensor_name} must be finite: got NaN or infinity")


def require_x_scale(name: str, x_scale: Tensor | None) -> None:
    """Raise ``ValueError`` unless the scale of static activations, if any, is finite and positive."""
    if x_scale is not None and not (bool(torch.isfinite(x_scale).all()) and float(x_scale) > 0):
        raise ValueError(f"{name}.x_scale must be finite and positive: got {float(x_scale)}")


def require_outliers(name: str, layer: Layer) -> None:
    """Raise ``ValueError`` unless the layer's outliers, if any, are finite and a well-formed CSR matrix."""
    values, columns, rows = (layer._parameters.get(f"outlier_{part}") for part in ("values", "columns", "rows"))
    if values is None or columns is None or rows is None:
        return
    require_finite(name, "outlier_values", values)
    pointers = rows.to(torch.int64)
    counts = pointers[1:] - pointers[:-1]
    if int(pointers[0]) != 0 or int(pointers[-1]) != len(values) or bool((counts < 0).any()):
        raise ValueError(
            f"{name}.outlier_rows must rise from 0 to the number of outliers {len(values)}: "
            f"got first {int(pointers[0])}, last {int(pointers[-1])}, smallest step {int(counts.min())}"
        )
    column, k = columns.to(torch.int64), layer.format.in_features
    if bool((column < 0).any()) or bool((column >= k).any()):
        raise ValueError(
            f"{name}.outlier_columns must be in [0, {k}): got values in [{int(column.min())}, {int(column.max())}]"
        )
    position = csr_row_indices(pointers) * k + column
    if bool((position[1:] <= position[:-1]).any()):
        raise ValueError(f"{name}.outlier_columns must increase within each row: they do not")


# What state_dict() made of tensors that are held in another order, as long as somebody holds it: tied layers give one
# tensor.
_canonical = WeakTensorKeyDictionary()


def _finish_state_dict(layer: Layer, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Tensors in the canonical order, and the format, for who loads them."""
    local_metadata["lowbit_format"] = layer.format.to_dict()
    for name in (*layer.code_tensors, *layer.group_tensors):
        parameter, key = layer._parameters[name], prefix + name
        if parameter is None or key not in state:
            continue
        if name in layer.group_tensors:
            if not parameter.is_contiguous() and state[key] is not parameter:  # keep_vars wants what is trained
                state[key] = _canonical_form(parameter, Tensor.contiguous)
        elif layout_of(parameter) is not CANONICAL:
            sizes = layer.format.bits, layer.format.in_features
            state[key] = _canonical_form(parameter, lambda packed: change(packed, CANONICAL, *sizes))  # noqa: B023


def _canonical_form(parameter: nn.Parameter, form: Callable[[Tensor], Tensor]) -> Tensor:
    contents = parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
    known, made_of = _canonical.get(parameter, (lambda: None, None))
    canonical: Tensor | None = known()
    if canonical is None or made_of != contents:
        canonical = form(parameter.detach())
        _canonical[parameter] = ref(canonical), contents
    return canonical


def layer_class(family: str, kind: str) -> Any:
    """The layer class of a family: ``kind`` is ``"linear"`` or ``"embedding"``."""
    return _registry[family, kind]


def layer_classes() -> dict[tuple[str, str], type[Layer]]:
    """Every layer class by (family, kind)."""
    return dict(_registry)


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


def storage_of(layer: Layer) -> tuple[int, ...]:
    """What tied layers have in common: every stored tensor of the weight. A factor or a table alone does not tie."""
    return tuple(id(tensor) for name, tensor in layer.named_tensors().items() if name != "x_scale")
