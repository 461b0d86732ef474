"""What the drop-in modules of every family share: buffers named after the format's tensors, a ``.weight`` that is
computed when it is read, dtype and device moves that leave the packed form bit-identical, checked loading.

The stored tensors are buffers: what is in ``parameters()`` is averaged, decayed, sharded, cast and tuned, and codes
must not be. ``state_dict()`` has the very tensors that the module holds, in the same shapes, so that whoever moves them
one by one (offloading, functional calls, collectives) may take them from either. Files are another matter: see
:func:`canonical_state_dict`. What is to be trained is asked for: :func:`make_trainable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.backends.operands import Operands
from lowbit.core.family import FLOAT_DTYPES, Format, TensorSpec, dtype_name
from lowbit.core.outliers import column_pairs, is_column_pairs
from lowbit.nn.call import call_of
from lowbit.nn.weight import LazyWeight

_registry: dict[tuple[str, str], type[Layer]] = {}
_CONFIG_FIELDS = {"family", "kind", "dtype", "bias", "format"}


class Layer(nn.Module):
    """Base of the packed layers: the tensors of ``format`` as buffers, plus an optional float bias, a Parameter.

    Subclasses set ``family``, ``kind`` and what these consist of, and are found by them when a saved model is rebuilt.

    Attributes:
        format: the stored form; shapes and dtypes of all tensors follow from it. Another one may be assigned that has
            the same tensors, such as one with ``activations="int8"``; :meth:`become` is for the rest.
        dtype: the compute dtype that ``.weight`` shows; ``.to(dtype)`` changes it and the bias, never the
            packed form.
        weight_error: relative Frobenius error of the weight against the float original, where it is known.
        note: what this layer does differently from the module it replaced, for the report.
        name: the name in the model that it was put into, for messages; empty where nobody put it.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    format_class: ClassVar[type[Format]]
    operands_class: ClassVar[type[Operands]]
    one_dtype: ClassVar[tuple[tuple[str, str], ...]] = ()  # pairs of tensors, where the first of them is float
    _op: ClassVar[Any]
    _call: ClassVar[Callable[..., Tensor]]
    _numbers: tuple[int, ...]  # the weight's, in the ops' order
    _dtypes: dict[str, torch.dtype]  # of the stored tensors; a graph that is being made cannot ask the format
    format: Any  # of type format_class
    bias: nn.Parameter | None
    weight_error: float | None
    note: str | None
    name: str
    bytes_before: int | None = None  # that went with the float weight, where these are not N*K values of `dtype`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "family") and hasattr(cls, "kind"):
            _registry[cls.family, cls.kind] = cls
            cls._op = getattr(torch.ops.lowbit, f"{cls.family}_{cls.kind}").default
            if cls.kind != "experts":
                cls._call = call_of(cls._op, cls.operands_class, cls.kind)

    def __init__(
        self,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._require_format_class(format)
        self.format = format
        self._derive()
        self.dtype = dtype or torch.get_default_dtype()
        self.weight_error = None
        self.note = None
        self.name = ""
        for name, (shape, tensor_dtype) in format.tensors().items():
            self.register_buffer(name, torch.zeros(shape, dtype=tensor_dtype, device=device))
        for name in self.optional_tensors():
            if name not in self._buffers:
                self.register_buffer(name, None)
        self._stored = len(self._buffers)  # tells pickles from those of before stored tensors were buffers
        bias_tensor = torch.zeros(self.rows, dtype=self.dtype, device=device) if bias else None
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
        return {name: self._tensor(name) for name in self.format.tensors()}  # type: ignore[misc]

    def _tensor(self, name: str) -> Tensor | None:
        """A stored tensor: a buffer, or a Parameter while it is trained."""
        return self._buffers[name] if name in self._buffers else self._parameters[name]

    def trained(self) -> list[str]:
        """The stored tensors that are trained now: see :func:`make_trainable`."""
        return [name for name in self._parameters if name in self._dtypes]

    def trainable(self) -> list[str]:
        """The stored tensors that can be trained: float ones of the weight."""
        return [name for name, (_, dtype) in self.format.weight_tensors().items() if dtype.is_floating_point]

    def title(self) -> str:
        """The layer, for messages: the name that :func:`lowbit.convert` knew it by, its class and its shape."""
        name = self.__dict__.get("name")  # layers that were pickled by earlier versions have none
        kind = f"{type(self).__name__} [{self.format.out_features}, {self.format.in_features}]"
        return f"{name} ({kind})" if name else kind

    def operands(self) -> Mapping[str, Tensor | None]:
        """The stored tensors that :meth:`forward` reads, by name; trained ones as they will be stored."""
        if len(self._parameters) == 1:  # the bias, or its place
            return self._buffers
        # a replica in nn.DataParallel has Parameters as attributes only
        types = self._dtypes.items()
        masters = {n: getattr(self, n) for n, _ in types if n not in self._buffers}
        if diverged := next((n for n, master in masters.items() if _is_known(master) and not _is_finite(master)), None):
            raise FloatingPointError(f"{self.title()}: {diverged} is NaN or infinite: training has diverged")
        trained = {n: _as_stored(master, self._dtypes[n]) for n, master in masters.items()}
        held = {**self._buffers, **trained}
        for pair in self.one_dtype:
            first, second = (held[name] for name in pair)
            if first is not None and second is not None and first.is_floating_point() and first.dtype != second.dtype:
                held.update({name: tensor.float() for name, tensor in zip(pair, (first, second), strict=True)})
        return held

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
        # asking the format for its tensors would break a graph that is being made
        tensors = (*self._buffers.values(), *self._parameters.values())
        return next(tensor for tensor in tensors if tensor is not None).device

    @property
    def rows(self) -> int:
        """The rows of the float weight, of all experts of a stack together."""
        return self.format.out_features  # type: ignore[no-any-return]

    @property
    def weights(self) -> int:
        """How many float weights it stands for."""
        return self.rows * self.format.in_features  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The float weight ``[out_features, in_features]`` (of experts ``[E, N, K]``) in ``dtype``: see
        :class:`~lowbit.nn.weight.LazyWeight`.

        Shape, dtype and device cost nothing. An operation on the values is computed with :meth:`dequantize`, which
        is said once per layer; writing raises.
        """
        if torch.compiler.is_compiling():
            return self.dequantize()  # dead code where only the shape is looked at
        return LazyWeight.of(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[out_features, in_features]`` that this layer multiplies by, rounded once to ``dtype``."""
        op, wanted = getattr(torch.ops.lowbit, f"{self.family}_dequantize"), dtype or self.dtype
        computed = torch.float32 if wanted == torch.float64 else wanted  # the weight is a float32 number by definition
        weight: Tensor = op(*self.weight_arguments(self.operands()), *self.size_arguments(), computed)
        return weight if wanted == computed else weight.to(wanted)

    def __prepare_scriptable__(self) -> Layer:
        # torch.jit.script asks for it: without it, an error that names an annotation
        raise RuntimeError(
            f"torch.jit.script cannot compile {self.title()}: "
            "use torch.compile or torch.export, or torch.jit.trace"
        )

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
        if dtype not in (*FLOAT_DTYPES.values(), torch.float64):
            raise ValueError(
                f"a {cls.__name__} runs in float32, float16, bfloat16 or float64: cannot move it to {dtype}"
            )

    def config(self) -> dict[str, Any]:
        """JSON-ready description from which :func:`build` makes an empty layer of the same shape."""
        return LayerConfig.of(self).to_dict()

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str = "meta") -> Layer:
        """:func:`build`."""
        return build(config, device)

    def store(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the (meta) buffers by these tensors."""
        for name, tensor in tensors.items():
            self._buffers[name] = tensor.detach().contiguous()

    def become(self, format: Any, tensors: Mapping[str, Tensor]) -> None:
        """Be a layer of this format, which holds these tensors, in the form that files have them: :meth:`canonical`.

        What was trained is frozen then. Raises ``ValueError``, naming the layer, for a tensor that is missing or has
        another shape or dtype than the format says; nothing has changed then.
        """
        self._require_format_class(format)
        wanted = format.tensors()
        for name, (shape, dtype) in wanted.items():
            self.check_tensor(self.title(), name, tensors.get(name), shape, dtype)
        for name in self.trained():
            del self._parameters[name]
        for name in self._buffers:
            if name not in wanted:
                self._buffers[name] = None
        self.store({name: tensors[name] for name in wanted})
        self._set_format(format)

    def _set_format(self, format: Any) -> None:
        self.__dict__["format"] = format
        self._derive()
        self.prepare()

    def _require_format_class(self, format: object) -> None:
        if not isinstance(format, self.format_class):
            name = self.title() if "format" in self.__dict__ else type(self).__name__
            raise TypeError(f"{name}: format must be a {self.format_class.__name__}: got {format!r:.200}")

    def _require_same_tensors(self, format: Any) -> None:
        """Raise unless a layer of this format holds the tensors that are held now."""
        self._require_format_class(format)
        mine, other = ((f.out_features, f.in_features, f.tensors()) for f in (self.format, format))
        if mine != other:
            raise ValueError(
                f"{self.title()}: the tensors of {self.format.describe()} are not those of [{other[0]}, {other[1]}] "
                f"{format.describe()}: write layer.become(format, tensors), with tensors as layer.canonical() has them"
            )

    def share_weight(self, source: Layer) -> None:
        """Hold the very tensors of ``source``: every tensor of the weight that both formats have."""
        for name in source.format.weight_tensors():
            if name in self.format.weight_tensors():
                self._buffers[name] = source._buffers[name]

    def prepare(self, *, owned: bool = False) -> Layer:
        """Bring the tensors into the form that the kernels on this device read; here they are in it.

        Moving, converting and loading do it by themselves. The tensors stay the same objects, and it is bit for bit
        both ways. ``owned``: the memory of the tensors is nobody else's, and may be rearranged where it is.
        """
        columns = self._buffers.get("outlier_columns")
        if columns is not None and columns.device.type != "meta":
            columns.data = column_pairs(columns)
        return self

    def _prepare_to_move(self, device: torch.device) -> None:
        """Before the tensors go to ``device``."""

    def _held(self, name: str, tensor: Tensor) -> TensorSpec:
        """(shape, dtype) that ``tensor`` must have to be ``name``, in the form that it is in."""
        shape, dtype = self.format.tensors()[name]
        if name == "outlier_columns" and is_column_pairs(tensor):
            return (*shape, 2), torch.uint8
        trained = name in self._parameters and tensor.dtype != dtype  # what was stored is a start for a master
        return shape, torch.float32 if trained else dtype

    def _as_held(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor out of a ``state_dict``, in any form, as it is held here."""
        held = self._tensor(name)
        if name != "outlier_columns" or held is None:
            return tensor
        return column_pairs(tensor) if is_column_pairs(held) else self._canonical(name, tensor, held.dtype)

    def canonical(self) -> dict[str, Tensor]:
        """The stored tensors as files have them: canonical words, contiguous, in the dtypes of the format."""
        return {name: self.canonical_tensor(name, tensor) for name, tensor in self.named_tensors().items()}

    def canonical_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, held as the stored tensor ``name`` is, as files have it; the bias as it is."""
        return self._canonical(name, tensor, self._dtypes[name]) if name in self._dtypes else tensor

    def _canonical(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if name == "outlier_columns" and is_column_pairs(tensor):
            return tensor.view(dtype).flatten()
        if tensor.dtype == dtype and tensor.is_contiguous():
            return tensor.detach()
        return once(tensor, "canonical", lambda held: held.to(dtype).contiguous())

    def validate(self, name: str = "layer") -> None:
        """Check every tensor against the format and its values against their ranges.

        Raises:
            ValueError: naming ``name``, the tensor, the requirement and what was found.
        """
        for tensor_name, (shape, dtype) in self.format.tensors().items():
            tensor = self._tensor(tensor_name)
            if tensor is not None:
                shape, dtype = self._held(tensor_name, tensor)
            self.check_tensor(name, tensor_name, tensor, shape, dtype)
        if self.bias is not None and tuple(self.bias.shape) != (self.rows,):
            raise ValueError(f"{name}.bias must have shape ({self.rows},): got {tuple(self.bias.shape)}")
        if self.bias is not None and self.bias.dtype not in (*FLOAT_DTYPES.values(), self.dtype):
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
        held = self.named_tensors()
        stored = {id(tensor) for tensor in (*held.values(), *(t.grad for t in held.values())) if tensor is not None}
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.check_dtype(probe.dtype)
        self.dtype = probe.dtype
        self._prepare_to_move(probe.device)

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in held.items():
            moved = self._buffers.get(name)
            if moved is None or moved is tensor or not torch._has_compatible_shallow_copy_type(tensor, moved):
                continue
            tensor.data = moved  # the same object, as torch does with Parameters: tied layers stay tied
            self._buffers[name] = tensor
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
        masters = [n for n in local_metadata.get("lowbit_trained", ()) if n not in self._parameters]
        if masters:
            problems.append(f"{name}: the state_dict was saved while {', '.join(masters)} was trained, which is frozen "
                            "here: call lowbit.make_trainable as it was then")  # fmt: skip
        given = {n: state_dict[prefix + n] for n in self.format.tensors() if prefix + n in state_dict}
        for tensor_name, tensor in given.items():
            try:
                self.check_tensor(name, tensor_name, tensor, *self._held(tensor_name, tensor))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            error_msgs.extend(problems)
            return
        state_dict = {**state_dict, **{prefix + n: self._as_held(n, tensor) for n, tensor in given.items()}}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not error_msgs and self.device.type != "meta":
            try:
                self.validate_values(name)
            except ValueError as error:
                error_msgs.append(str(error))
            self.prepare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        names = dict.fromkeys((*self.format.tensors(), *self.optional_tensors()))
        if "_stored" not in state:  # pickled when the stored tensors were Parameters
            for name in names:
                old = self._parameters.pop(name, None)
                self._buffers[name] = None if old is None else once(old, "buffer", lambda tensor: tensor)
            self._stored = len(self._buffers)
        for name in names:  # that formats did not have when it was pickled
            if name not in self._buffers and name not in self._parameters:
                self._buffers[name] = None
        self._derive()

    def _derive(self) -> None:
        """Set what follows from the format and is read in each call."""
        self._numbers = self.format.numbers
        self._dtypes = {name: dtype for name, (_, dtype) in self.format.tensors().items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(f"{self.title()}: .weight cannot be assigned: the layer holds the packed form")
        if name == "format" and "format" in self.__dict__:
            self._require_same_tensors(value)
            self._set_format(value)
            return
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.format.in_features}, out_features={self.format.out_features}, "
            f"bias={self.bias is not None}, {self.format.describe()}"
        )


def _finish_state_dict(layer: Layer, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Contiguous tensors, and the format, for who loads them."""
    local_metadata["lowbit_format"] = layer.format.to_dict()
    local_metadata["lowbit_trained"] = layer.trained()
    for name in layer.format.tensors():
        tensor, given = layer._tensor(name), state.get(prefix + name)
        if tensor is None or given is None or given is tensor:
            continue  # the last: keep_vars wants the tensor itself
        if not given.is_contiguous():
            state[prefix + name] = once(tensor, "contiguous", Tensor.contiguous)


# What was made of a held tensor, as long as somebody holds it: tied layers give one tensor.
_made = WeakTensorKeyDictionary()


def once(held: Tensor, what: str, form: Callable[[Tensor], Tensor]) -> Tensor:
    """``form(held)``, which is called ``what``; the same tensor again while it lives and ``held`` has not changed."""
    contents = what, held.data_ptr(), 0 if held.is_inference() else held._version
    known, made_of = _made.get(held, (lambda: None, None))
    result: Tensor | None = known()
    if result is None or made_of != contents:
        result = form(held.detach())
        _made[held] = ref(result), contents
    return result


def canonical_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` as files have it: the same on every device, whatever layout layers hold their codes in.

    Tied layers give the very same tensors. Loading it back works on any device.
    """
    state: dict[str, Any] = model.state_dict()
    metadata: dict[str, Any] = getattr(state, "_metadata", {})
    for prefix, layer in layers(model, duplicates=True).items():
        metadata.get(prefix, {}).pop("lowbit_trained", None)  # masters are rounded here
        for name, tensor in layer.canonical().items():
            key = f"{prefix}.{name}" if prefix else name
            if key in state:
                state[key] = tensor
    return state


def _is_known(master: Tensor) -> bool:
    """Whether the values can be looked at: no graph is being made of them, and no derivative, batch or copy."""
    plain = type(master) in (nn.Parameter, Tensor) and master.device.type != "meta"
    return plain and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(master)


def _is_finite(master: Tensor) -> bool:
    return bool(torch.isfinite(master.detach().sum()))


def _as_stored(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 master rounded to the dtype that it is stored in; the gradient goes straight through."""
    return master + (master.detach().to(dtype).to(master.dtype) - master.detach())


def make_trainable(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Turn stored tensors into Parameters to be trained, in every packed layer of ``model`` that has them.

    Args:
        model: a converted model, or one layer.
        names: what to train: ``"scales"``, ``"zeros"`` (float ones), ``"outlier_values"``, ``"codebook"``, Kronecker
            factors ``"a"`` and ``"b"`` with their ``"a_scales"``, …

    Returns the Parameters, for an optimizer. They are float32 whatever the stored dtype: optimizers lose small steps
    and small squares in float16. Forward uses them rounded to the stored dtype, as :func:`freeze` and saving will store
    them; the gradient goes straight through. Tied layers share one Parameter. Frozen layers are otherwise as they were.

    Raises ``ValueError`` for a name that no layer can train, and where there is none, naming those that one can.
    """
    found = layers(model)
    known = {name for layer in found.values() for name in layer.trainable()}
    for name in names or (None,):
        if not isinstance(name, str) or name not in known:
            got = "no name" if name is None else repr(name)
            raise ValueError(f"names must be of {', '.join(sorted(known)) or 'a packed layer'}: got {got}")
    made: dict[int, nn.Parameter] = {}
    for layer in found.values():
        for name in names:
            if name not in layer.trainable():
                continue
            tensor = layer._tensor(name)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = tensor
            elif tensor is not None:
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(tensor.detach().to(torch.float32).clone().contiguous())
                layer._parameters[name] = made[id(tensor)]  # first: an interrupt leaves no layer without its tensor
                del layer._buffers[name]
    return list(made.values())


def freeze(model: nn.Module) -> None:
    """The way back from :func:`make_trainable`: what was trained is rounded to the stored dtype, and a buffer again."""
    made: dict[int, Tensor] = {}
    for layer in layers(model).values():
        types = layer.format.tensors()
        for name in layer.trained():
            master = layer._parameters[name]
            assert master is not None
            layer._buffers[name] = made.setdefault(id(master), master.detach().to(types[name][1]))
            del layer._parameters[name]
        layer.prepare()


def layer_class(family: str, kind: str) -> Any:
    """The layer class of a family: ``kind`` is ``"linear"``, ``"embedding"`` or ``"experts"``."""
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

    @property
    def rows(self) -> int:
        """:attr:`Layer.rows` of the layer."""
        count = self.extras.get("num_experts")
        return self.format.out_features if count is None else self.layer_class.stack_rows(self.format, count)  # type: ignore[attr-defined]

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
        if self.dtype not in FLOAT_DTYPES.values():
            raise ValueError(f"a layer in {dtype_name(self.dtype)} cannot be saved: call model.float() first")
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
    return tuple(id(layer._tensor(name)) for name in layer.format.weight_tensors())
