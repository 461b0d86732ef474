"""Quantizers: objects that turn a float weight into a family's weight. They are found by family and name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

SpecT = TypeVar("SpecT")
WeightT = TypeVar("WeightT")


@dataclass
class Statistics:
    """What calibration measured for one layer; ``None``: it was not measured.

    Attributes:
        hessian: ``[K, K]``, proportional to X.T @ X of a linear layer's inputs X ``[samples, K]``; of an embedding to
            the mean of G.T @ G, G = d loss / d weight.
        sensitivity: ``[N, K]``, the mean of (d loss / d weight)**2: the diagonal of the empirical Fisher information;
            of an embedding smoothed (``lowbit/model/curvature.py``).
        x_scale: ``[1]``, the scale of static int8 activations.
    """

    hessian: Tensor | None = None
    sensitivity: Tensor | None = None
    x_scale: Tensor | None = None


class Quantizer(ABC, Generic[SpecT, WeightT]):
    """One way to turn a float weight ``[N, K]`` into a family's weight, and what it wants to be measured for that.

    An object of a subclass is given to :func:`register`; specs of the family then find it by its name.

    Attributes:
        family: whose weights it makes: ``"packed"``, ``"codebook"``, ``"kron"``.
        name: what the spec calls it: ``Packed(quantizer="gptq")``.
        needs: the fields of :class:`Statistics` without which it cannot work: ``convert`` then asks for calibration
            data, and measures them.
        uses: the fields with which it does better: they are measured where calibration data is given.
        stand_in: the quantizer of the family that takes its place for the weight of an embedding where nothing is
            measured: without calibration data, or gradients.
        together: whether :meth:`finish` is called once all layers are in the model.
        correction: how much of the drift of its inputs a linear layer makes up for, where ``convert`` is not told: 0 to
            1 (``lowbit/model/drift.py``). Of quantizers that want the Hessian to be measured.
    """

    family: ClassVar[str]
    name: str
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    stand_in: str | None = None
    together: bool = False
    correction: float = 0.0

    @abstractmethod
    def quantize(self, weight: Tensor, spec: SpecT, statistics: Statistics) -> WeightT:
        """The weight in the family's form, as ``spec`` says; raises ``ValueError`` for a weight that it cannot take."""

    def needs_for(self, spec: SpecT) -> frozenset[str]:
        """What it :attr:`needs` for ``spec``."""
        return self.needs

    def uses_for(self, spec: SpecT) -> frozenset[str]:
        """What it :attr:`uses` for ``spec``."""
        return self.uses

    def argument(self, spec: SpecT) -> str:
        """The argument of ``spec`` that makes it need what it needs, as written in code."""
        return f"quantizer={self.name!r}"

    def finish(self, model: nn.Module, reference: nn.Module, names: list[str], batches: list[Any]) -> dict[str, str]:
        """Improve the layers ``names`` of the packed ``model`` together, in place, ``reference`` being the float one.

        Returns the layers that it left as they are, each with the reason.
        """
        raise NotImplementedError


def check_share(argument: str, value: Any) -> None:
    """Raise ``ValueError`` for what is no share."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{argument} must be a number between 0 and 1: got {value!r}")


_registry: dict[str, dict[str, Quantizer[Any, Any]]] = {}


def register(quantizer: Quantizer[Any, Any]) -> None:
    """Let specs of ``quantizer.family`` name this quantizer; a second one of the same name replaces the first.

    Raises:
        TypeError: it is the class, or no quantizer.
        ValueError: it wants a statistic to be measured that does not exist.
    """
    if isinstance(quantizer, type):
        raise TypeError(f"quantizer must be made, not the class itself: write {quantizer.__name__}()")
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"quantizer must be a lowbit.Quantizer: got {type(quantizer).__name__} {quantizer!r:.200}")
    known = [field.name for field in fields(Statistics)]
    for name in sorted({*quantizer.needs, *quantizer.uses}):
        if name not in known:
            raise ValueError(f"needs and uses must be made of {', '.join(known)}: got {name!r}")
    check_share("correction", quantizer.correction)
    _registry.setdefault(quantizer.family, {})[quantizer.name] = quantizer


def find(family: str, name: str) -> Quantizer[Any, Any]:
    """The quantizer that specs of ``family`` call ``name``."""
    return _registry[family][name]


def names(family: str) -> tuple[str, ...]:
    """The names of a family's quantizers, in the order in which they were registered."""
    return tuple(_registry.get(family, {}))
