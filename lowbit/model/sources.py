"""Modules that *were trained quantized*: how each is read without loss.

A recogniser looks at one module and returns a :class:`Source`, the exact codes and scales it trained with, or
why it leaves this one alone. ``lowbit.convert(model)`` swaps every recognised module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lowbit.core.family import Activations, Weight


@dataclass(frozen=True)
class Source:
    """What a trained module holds in compressed form, ready to be stored as it is.

    Attributes:
        stored: a :class:`PackedWeight`, :class:`CodebookWeight` or :class:`KroneckerWeight` with the trained values.
            Modules whose sources have the very same one (tied weights) share one packed storage.
        kind: ``"linear"`` or ``"embedding"``.
        bias: kept as it is.
        activations: ``"float"``, ``"int8"`` (dynamic, per token) or ``"int8_static"`` with ``x_scale``.
        x_scale: the input's scale of ``"int8_static"``.
        weight: the float weight ``[N, K]`` the module multiplies by, if it has one, or a function that computes it:
            conversion then checks that the stored form reproduces it, and refuses when it does not.
        padding_idx: of an embedding.
        activation_group_size: of ``"int8"``: columns of a token that share one scale; None: all of them.
        extras: of an embedding: what its packed layer is given besides, such as ``output_scale``.
        note: what the packed layer does not do that the trained module did; it is shown in the report.
    """

    stored: Weight
    kind: str = "linear"
    bias: nn.Parameter | Tensor | None = None
    activations: Activations = "float"
    x_scale: Tensor | None = None
    weight: Tensor | Callable[[], Tensor] | None = None
    padding_idx: int | None = None
    note: str | None = None
    activation_group_size: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


Recogniser = Callable[[nn.Module], Source | str | None]
Step = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class _Entry:
    recognise: Recogniser
    prologue: Step | None = None
    epilogue: Step | None = None


# by type, or by qualified name for the types of libraries that need not be imported
_entries: dict[type[nn.Module] | str, _Entry] = {}


def register_source(
    module_type: type[nn.Module],
    recognise: Recogniser,
    *,
    prologue: Step | None = None,
    epilogue: Step | None = None,
) -> None:
    """Teach :func:`lowbit.convert` to read modules of exactly ``module_type``.

    Args:
        module_type: the class of the trained module.
        recognise: module -> :class:`Source`; or the reason (or ``None``) to leave this one alone. A ``ValueError``
            it raises is reported with the layer's name, and nothing is converted.
        prologue: module -> a module to run on the input first (for example a norm that the trained module
            applies itself); the layer becomes ``nn.Sequential(prologue(module), packed layer)``. It must not need
            the module's weights, because a saved model is rebuilt with it.
        epilogue: the same for the output (for example a fused activation function).

    A second registration for the same type replaces the first.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module: got {module_type!r}")
    _entries[module_type] = _Entry(recognise, prologue, epilogue)


def register_source_by_name(name: str, recognise: Recogniser, *, epilogue: Step | None = None) -> None:
    """:func:`register_source` for a type that is not imported: ``name`` is its ``module.qualname``."""
    _entries[name] = _Entry(recognise, epilogue=epilogue)


def type_name(cls: type) -> str:
    """``module.qualname`` of a type."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _entry(module: nn.Module) -> _Entry | None:
    return _entries.get(type(module)) or _entries.get(type_name(type(module)))


def is_source(module: nn.Module) -> bool:
    """Whether a recogniser is registered for the type of ``module``."""
    return _entry(module) is not None


def recognise(module: nn.Module) -> Source | str:
    """The :class:`Source` of a registered module, or why it has none.

    Raises ``ValueError`` with what the recogniser says is wrong, or what is wrong with the recogniser.
    """
    entry = _entry(module)
    if entry is None:
        return f"the recogniser of {type(module).__name__} declined it"
    name = recogniser_of(module)
    try:
        found = entry.recognise(module)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    if found is None:
        return f"the recogniser of {type(module).__name__} declined it"
    if isinstance(found, Weight):
        raise ValueError(f"{name} must return a lowbit.Source: got a {type(found).__name__}; return Source(weight)")
    if not isinstance(found, (Source, str)):
        raise ValueError(f"{name} must return a lowbit.Source, a reason as text, or None: got {type(found).__name__}")
    return _checked(module, found, name) if isinstance(found, Source) else found


def recogniser_of(module: nn.Module) -> str:
    """``its recogniser read_linear``, for messages."""
    entry = _entry(module)
    function: object = None if entry is None else entry.recognise
    return f"its recogniser {getattr(function, '__qualname__', repr(function))}"


def _checked(module: nn.Module, source: Source, name: str) -> Source:
    """Raise ``ValueError`` for a source whose parts do not fit each other or the module."""
    if not isinstance(source.stored, Weight):
        raise ValueError(f"{name} must give Source.stored as a PackedWeight, CodebookWeight or KroneckerWeight: "
                         f"got {type(source.stored).__name__}")  # fmt: skip
    if source.kind not in ("linear", "embedding"):
        raise ValueError(f"{name} must give kind 'linear' or 'embedding': got {source.kind!r}")
    try:
        format = source.stored.format()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} gives a weight that cannot be stored: {error}") from error
    n, k = format.out_features, format.in_features
    sizes = ("num_embeddings", "embedding_dim") if source.kind == "embedding" else ("out_features", "in_features")
    told = tuple(getattr(module, size, None) for size in sizes)
    weight = source.weight
    for wanted, what in ((told, "the module has"), (tuple(weight.shape) if isinstance(weight, Tensor) else None,
                                                    "its weight has")):  # fmt: skip
        if wanted is None or any(not isinstance(size, int) for size in wanted) or tuple(wanted) == (n, k):
            continue
        turned = "; is a transposition missing, .t()?" if tuple(wanted) == (k, n) and n != k else ""
        raise ValueError(f"{name} gives a weight [N, K] = [{n}, {k}]: {what} {list(wanted)}{turned}")
    if isinstance(source.bias, Tensor) and tuple(source.bias.shape) != (n,):
        raise ValueError(f"{name} gives a bias of shape {list(source.bias.shape)}: [N] = [{n}] is required")
    return source


def wrap(module: nn.Module, layer: nn.Module) -> nn.Module:
    """What stands for ``module`` once ``layer`` is its packed form: the layer between prologue and epilogue."""
    entry = _entry(module)
    before = [] if entry is None or entry.prologue is None else [entry.prologue(module)]
    after = [] if entry is None or entry.epilogue is None else [entry.epilogue(module)]
    return nn.Sequential(*before, layer, *after) if before or after else layer


def position_of(module: nn.Module) -> str | None:
    """The child name that :func:`wrap` gives the layer of ``module``; ``None`` where it adds nothing."""
    entry = _entry(module)
    if entry is None or (entry.prologue is None and entry.epilogue is None):
        return None
    return "0" if entry.prologue is None else "1"
