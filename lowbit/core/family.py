"""What a family defines, beside its op: a *spec* (what the user asks for), a *format* (the stored form of one weight:
the shapes and dtypes of its tensors) and a *weight* (tensors in that form, not yet a layer's parameters).
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, replace
from inspect import isabstract
from numbers import Real
from operator import index
from typing import Any, ClassVar, Literal, SupportsIndex

import torch
from torch import Tensor

from lowbit.core.activations import ACTIVATIONS as ACTIVATIONS
from lowbit.core.activations import Activations as Activations
from lowbit.core.activations import ActivationSpec
from lowbit.core.quantizer import Quantizer, Statistics, find

Granularity = Literal["tensor", "row", "group"]
OutliersBy = Literal["magnitude", "sensitivity", "random"]
TensorSpec = tuple[tuple[int, ...], torch.dtype]

GRANULARITIES = ("tensor", "row", "group")
OUTLIERS_BY = ("magnitude", "sensitivity", "random")
MAX_INT16_COLUMNS = 1 << 15

# What activations, biases, scales and outliers may be, by the name that files give it.
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float16"`` of ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


class Spec(ABC):
    """How to bring a float weight ``[N, K]`` into a family's form: what ``convert`` is given.

    Subclasses are frozen dataclasses that check their arguments when they are made.
    """

    family: ClassVar[str]
    example: ClassVar[str] = ""  # arguments as a user may write them, for messages
    quantizer: Any  # the name of one: a field of most specs
    activations: Activations

    def __new__(cls, *_: Any, **arguments: Any) -> Any:
        """Raises ``TypeError`` for an argument that the spec does not have: it names the nearest one."""
        known = getattr(cls, "__dataclass_fields__", arguments)
        for name in arguments:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no argument {name!r}{did_you_mean(name, known)}")
        return super().__new__(cls)

    @property
    def activation(self) -> ActivationSpec:
        """How x is to be held."""
        return ActivationSpec.of(self)

    @abstractmethod
    def problem(self, n: int, k: int) -> str | None:
        """Why this spec does not fit a weight ``[n, k]``, or ``None``."""

    @abstractmethod
    def format(self, weight: Tensor, kind: str) -> Format:
        """The format that this spec gives ``weight`` (which may be on meta), as far as it is known beforehand."""

    def for_more(self, format: Format) -> Any:
        """The spec for weights that are to have the form of one that this spec made."""
        return self

    @property
    def shares_over_rows(self) -> bool:
        """Whether something that is learned, such as one table per tensor, serves all rows of a weight."""
        return False

    @property
    def method(self) -> Quantizer[Any, Any]:
        """The quantizer that this spec names."""
        return find(self.family, self.quantizer)

    def quantize(self, weight: Tensor, *, hessian: Tensor | None = None, statistics: Statistics | None = None) -> Any:
        """The :class:`Weight` that :attr:`method` makes of ``weight``; ``hessian``: all that was measured, if anything.

        Raises ``ValueError`` for a weight that does not fit, and where a statistic is missing that is needed.
        """
        return self.method.quantize(weight, self, statistics or Statistics(hessian=hessian))

    @abstractmethod
    def describe(self) -> str:
        """One short line for tables."""

    @property
    def needs(self) -> dict[str, str]:
        """What calibration must measure: field of :class:`Statistics` -> the argument that requires it, as in code."""
        method = self.method
        needs = dict.fromkeys(sorted(method.needs_for(self)), method.argument(self))
        return needs | self.activation.needs

    @property
    def statistics(self) -> set[str]:
        """All that calibration is to measure, if there is data: what is needed, and what helps."""
        return {*self.needs, *self.method.uses_for(self)}

    @property
    def calibration_need(self) -> str | None:
        """The argument that requires calibration data, as written in code; ``None`` when none does."""
        return next(iter(self.needs.values()), None)

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing with this spec requires calibration data."""
        return bool(self.needs)

    @property
    def uses_hessian(self) -> bool:
        """Whether :meth:`quantize` requires a Hessian, or does better with one."""
        return "hessian" in self.statistics

    def for_embedding(self, *, tied: bool = False) -> Any:
        """The spec for an embedding's weight of which nothing is measured; ``tied``: a linear layer shares it, and its
        inputs are.

        Another quantizer stands in for one that needs calibration.
        """
        stand_in = None if tied or not self.method.needs else self.method.stand_in
        return self if stand_in is None else replace(self, quantizer=stand_in)  # type: ignore[type-var]


class Format(ABC):
    """The stored form of one weight: what the shapes and dtypes of its tensors follow from.

    It is what a saved folder records per layer and what a file is checked against. Subclasses are frozen dataclasses.
    """

    family: ClassVar[str]
    supported_activations: ClassVar[tuple[Activations, ...]] = ("float", "int8", "int8_static")
    later: ClassVar[tuple[str, ...]] = ()  # fields that are false where folders of earlier versions have none
    out_features: int
    in_features: int
    activations: Activations

    @property
    def activation(self) -> ActivationSpec:
        """How x is held."""
        return ActivationSpec.of(self)

    @abstractmethod
    def weight_tensors(self) -> dict[str, TensorSpec]:
        """Name -> (shape, dtype) of every tensor of the weight: what layers that share a weight share."""

    @property
    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """The integers of the weight that the ops take, in their order, the layout not among them."""

    @property
    def numbers_behind(self) -> tuple[int, ...]:
        """More of them, which the ops take behind the layout."""
        return ()

    def tensors(self) -> dict[str, TensorSpec]:
        """Name -> (shape, dtype) of every stored tensor except the bias."""
        return {**self.weight_tensors(), **self.activation.tensors()}

    @abstractmethod
    def describe(self) -> str:
        """One short line for tables."""

    def with_activation(self, activation: ActivationSpec) -> Any:
        """The same form for x held in another way; raises ``ValueError`` where the family has no such kernels."""
        return replace(self, **activation.fields_of(self))  # type: ignore[type-var]

    @abstractmethod
    def stacked(self, count: int) -> Any:
        """The form of so many weights of this form in one: a stack of experts."""

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, the bias excluded."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by N*K, everything counted."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse. Without what older versions do not know, where it is not
        used: they read it then."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        of_activations = [field.name for field in fields(ActivationSpec) if field.default is None]
        unused = {name for name in of_activations if values.get(name, 0) is None}
        unused |= {name for name in self.later if not values[name]}
        return {name: value for name, value in values.items() if name not in unused}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """A checked format from :meth:`to_dict`; raises ``ValueError`` naming an unknown, missing or bad field."""
        known = {field.name: field.default is MISSING for field in fields(cls)}  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown field {name!r} in a {cls.family} format")
        for name, required in known.items():
            if required and name not in values:
                raise ValueError(f"missing field {name!r} in a {cls.family} format")
        return cls(**values)


class Weight(ABC):
    """One weight in a family's form: what a quantizer returns, and what a trained module is read into.

    Subclasses are dataclasses of tensors; codes are not packed yet.
    """

    family: ClassVar[str]

    @abstractmethod
    def format(self, activations: Activations = "float") -> Format:
        """The format of these tensors; raises ``ValueError`` where they disagree."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, codes packed."""


# ------------------------------------------------------------------------------------- checks and parts in common


def written_spec(value: object) -> str | None:
    """What to write instead of ``value``, where that is the class of a spec: ``Packed(bits=4)``."""
    is_class = isinstance(value, type) and issubclass(value, Spec) and not isabstract(value)
    return f"{value.__name__}({value.example})" if is_class else None  # type: ignore[attr-defined]


def check_spec(spec: object, family: str) -> None:
    """Raise ``TypeError`` unless ``spec`` is one of this family."""
    if not isinstance(spec, Spec) or spec.family != family:
        made = written_spec(spec)
        given = f"the class itself: write {made}" if made else f"{spec!r:.200}"
        raise TypeError(f"spec must be one of family {family!r}: got {given}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``: did you mean 'bits'?`` of the known name that is nearest, else ``: choose from 'bits', ...``."""
    by_letters = {each.lower().replace("_", ""): each for each in known}
    near = difflib.get_close_matches(name.lower().replace("_", ""), by_letters, 1)
    if near:
        return f": did you mean {by_letters[near[0]]!r}?"
    return f": choose from {', '.join(map(repr, by_letters.values()))}"


def choice(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in tuple(allowed):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}: got {argument}={value!r}")


def as_integer(value: object) -> object:
    """An ``int`` where ``value`` is any kind of integer (numpy's too), else ``value`` itself."""
    return index(value) if isinstance(value, SupportsIndex) and not isinstance(value, bool) else value


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(argument: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument} must be an integer of at least 1: got {argument}={value!r}")


def check_group_size(group_size: int, k: int) -> None:
    if not 1 <= group_size <= k:
        raise ValueError(f"group_size must be between 1 and K: got group_size={group_size}, K={k}")


def check_seed(seed: object) -> None:
    if not is_integer(seed) or not -(2**63) <= seed < 2**63:  # type: ignore[operator]
        raise ValueError(f"seed must be an integer of 64 bits: got seed={seed!r}")


def check_coded_format(format: Any, min_bits: int) -> None:
    """What formats of packed codes have in common; raises ``ValueError`` naming the field."""
    for name in ("bits", "out_features", "in_features", "group_size", "outliers"):
        value = getattr(format, name)
        if not is_integer(value):
            raise ValueError(f"{name} must be an integer: got {name}={value!r}")
    n, k = format.out_features, format.in_features
    if not min_bits <= format.bits <= 8:
        raise ValueError(f"bits must be between {min_bits} and 8: got bits={format.bits}")
    if n < 1 or k < 1:
        raise ValueError(f"a weight needs N, K >= 1: got N={n}, K={k}")
    choice("granularity", format.granularity, GRANULARITIES)
    choice("outlier_dtype", format.outlier_dtype, FLOAT_DTYPES)
    in_groups = format.group_size if format.granularity == "group" else None
    format.activation.check(in_groups, format.supported_activations)
    check_group_size(format.group_size, k)
    if not 0 <= format.outliers <= n * k:
        raise ValueError(f"outliers must be between 0 and N*K: got outliers={format.outliers}")


def check_outliers(spec: Any) -> None:
    """The fields of a spec that say how many outliers there are, and which; raises ``ValueError`` naming one."""
    outliers: float = spec.outliers
    if not isinstance(outliers, Real) or not 0.0 <= outliers <= 0.1:
        raise ValueError(f"outliers must be a fraction between 0 and 0.1: got outliers={outliers}")
    choice("outliers_by", spec.outliers_by, OUTLIERS_BY)
    check_seed(spec.seed)


def check_float_dtype(argument: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES.values():
        raise ValueError(f"{argument} must be float32, float16 or bfloat16: got {argument}={dtype}")


def outlier_tensors(n: int, k: int, count: int, dtype: str) -> dict[str, TensorSpec]:
    """The CSR form of ``count`` outliers of a weight ``[n, k]``: values, columns (rising in a row), row pointers."""
    if not count:
        return {}
    return {
        "outlier_values": ((count,), FLOAT_DTYPES[dtype]),
        "outlier_columns": ((count,), torch.int16 if k <= MAX_INT16_COLUMNS else torch.int32),
        "outlier_rows": ((n + 1,), torch.int32),
    }


def describe_extras(format: Any) -> str:
    """``, 0.5 % outliers, int8 activations``: what any format with these fields may add to its description."""
    text = ""
    if format.outliers:
        text += f", {100 * format.outliers / (format.out_features * format.in_features):.2g} % outliers"
    return text + str(format.activation.describe())
