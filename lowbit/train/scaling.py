"""How the scale of a weight is found in each step of training: :class:`Dynamic`, :class:`LSQ`, :class:`PACT`,
:class:`MinMax`, :class:`SEQ`.

All but the last have the symmetric levels ``{-n..n} * scale``, ``n = 2**(bits - 1) - 1``, and ``scale = alpha / n``:
weights beyond ``alpha`` are clipped. ``alpha`` has the shape of the scales: one per tensor, row or group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.packed.format import Packed, PackedFormat

STARTS = {2: 1.0, 3: 1.7, 4: 2.5, 5: 3.4, 6: 4.7, 7: 6.3, 8: 8.0}  # of gamma: see docs/training.md


def levels(bits: int) -> int:
    """``n``: the largest level."""
    return (1 << (bits - 1)) - 1


class Levels(NamedTuple):
    """The levels ``{-end, 1 - end .. end} * scale``, with ``scale = alpha / steps``.

    ``limit``: beyond this multiple of the scale a weight counts as clipped.
    """

    steps: float
    end: float
    limit: float

    @classmethod
    def of(cls, scaling: Scaling, format: PackedFormat) -> Levels:
        n = float(levels(format.bits))
        return scaling.levels(format.bits, format.zeros == "none") or cls(n, n, n)

    @property
    def shift(self) -> float:
        """0.5 where the levels are half-integers, else 0."""
        return self.end % 1.0


def by_group(values: Tensor, format: PackedFormat) -> Tensor:
    """``[N, K]`` as ``[N, G, group_size]``, the last group filled up with zeros; ``[1, 1, N*K]`` per tensor."""
    if format.granularity == "tensor":
        return values.reshape(1, 1, -1)
    missing = format.groups * format.group_size - format.in_features
    padded = torch.nn.functional.pad(values, (0, missing))
    return padded.view(format.out_features, format.groups, format.group_size)


def each(values: Tensor, format: PackedFormat) -> Tensor:
    """``[N, G]`` as what broadcasts to ``[N, K]``: the value of each weight's group."""
    if format.groups == 1 or format.granularity == "tensor":
        return values
    return values.repeat_interleave(format.group_size, 1)[:, : format.in_features]


def sizes(format: PackedFormat, like: Tensor) -> Tensor:
    """How many weights share each scale, in a shape that broadcasts to the scales'."""
    if format.granularity == "tensor":
        return like.new_tensor([[float(format.out_features * format.in_features)]])
    found = like.new_full((1, format.groups), float(format.group_size))
    found[0, -1] = format.in_features - (format.groups - 1) * format.group_size
    return found


def mean_of(magnitudes: Tensor, format: PackedFormat) -> Tensor:
    """The mean over the weights of each scale."""
    return by_group(magnitudes, format).sum(-1) / sizes(format, magnitudes)


def largest_of(magnitudes: Tensor, format: PackedFormat) -> Tensor:
    return by_group(magnitudes, format).amax(-1)


@dataclass(frozen=True)
class Scaling:
    """What :func:`lowbit.train.prepare` takes as its quantizer. ``trained``: the name of what is learned, if anything.

    ``clips``: a weight beyond ``alpha`` gets no gradient. ``inside``: whether weights within it move ``alpha``.
    """

    trained = "alpha"
    clips = True
    inside = True

    def problem(self, spec: Packed) -> str | None:
        """Why this quantizer cannot round to the levels of ``spec``."""
        if not spec.symmetric:
            return f"the levels of a quantizer are symmetric: Packed(symmetric=True) is required, got {spec}"
        return None

    def levels(self, bits: int, ternary: bool) -> Levels | None:
        """Other levels than ``{-n..n} * alpha / n``."""
        return None

    def start(self, magnitudes: Tensor, format: PackedFormat) -> Tensor | None:
        """The first value of what is learned, from ``|w|`` ``[N, K]``."""
        raise NotImplementedError

    def alpha(self, magnitudes: Tensor, learned: Tensor | None, format: PackedFormat) -> Tensor:
        """``alpha`` in the shape of the scales. No gradient goes through ``magnitudes``."""
        assert learned is not None
        return learned.abs()


@dataclass(frozen=True)
class Dynamic(Scaling):
    """QuantGPT's module-wise dynamic scaling: ``alpha = gamma * mean|w|``, with ``gamma`` learned.

    The gradient of gamma counts the weights on both sides of ``alpha``: ``mean|w| * sum dL/dq * (Q(u) - u)`` within it
    and ``sum dL/dq * sign(w)`` beyond, ``u = w / alpha``. ``gamma``: its start; default 1 at 2 bits, 2.5 at 4, 8 at 8.

    Source: Tao et al., ACL 2022, arXiv 2203.10705.
    """

    gamma: float | None = None
    trained = "gamma"

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be greater than 0 and finite: got gamma={self.gamma}")

    def start(self, magnitudes: Tensor, format: PackedFormat) -> Tensor:
        start = STARTS[format.bits] if self.gamma is None else self.gamma
        return magnitudes.new_full(format.scale_shape, start)

    def alpha(self, magnitudes: Tensor, learned: Tensor | None, format: PackedFormat) -> Tensor:
        assert learned is not None
        return learned.abs() * mean_of(magnitudes, format)


@dataclass(frozen=True)
class LSQ(Scaling):
    """Learned step size: ``alpha`` itself is learned, from ``2 * mean|w| * sqrt(n)``; its gradient is that of
    :class:`Dynamic`, divided by ``sqrt(n * weights per scale)``.

    Source: Esser et al., ICLR 2020, arXiv 1902.08153.
    """

    def start(self, magnitudes: Tensor, format: PackedFormat) -> Tensor:
        start = 2 * mean_of(magnitudes, format) * math.sqrt(levels(format.bits))
        return start.expand(format.scale_shape).clone()

    def alpha(self, magnitudes: Tensor, learned: Tensor | None, format: PackedFormat) -> Tensor:
        assert learned is not None
        factor = (levels(format.bits) * sizes(format, magnitudes)).rsqrt()
        slower = learned * factor
        return (slower + (learned - slower).detach()).abs()


@dataclass(frozen=True)
class PACT(Scaling):
    """``alpha`` is learned from the weights beyond it alone: to compare with.

    Source: Choi et al., arXiv 1805.06085, for weights.
    """

    inside = False

    def start(self, magnitudes: Tensor, format: PackedFormat) -> Tensor:
        return largest_of(magnitudes, format)


@dataclass(frozen=True)
class MinMax(Scaling):
    """``alpha = max|w|``, nothing is learned: rounding straight through."""

    trained = ""
    clips = False

    def start(self, magnitudes: Tensor, format: PackedFormat) -> None:
        return None

    def alpha(self, magnitudes: Tensor, learned: Tensor | None, format: PackedFormat) -> Tensor:
        return largest_of(magnitudes, format)


@dataclass(frozen=True)
class SEQ(Scaling):
    """ParetoQ's stretched elastic quantization: levels at half-integers, as many on each side and none at 0, for 2 bits
    ``{-1.5, -0.5, 0.5, 1.5} * alpha / 2``; ternary ``{-1, 0, 1} * alpha / 1.5``. Its spec is ``Packed(bits=2)``, whose
    zeros are floats, or for ternary ``Packed(bits=2, symmetric=True)``.

    ``alpha`` is learned, from ``max|w|``. Its gradient is that of :class:`LSQ`, divided by the root of all N*K weights
    times n; weights beyond 0.99 alpha count as clipped.

    Source: Liu et al., arXiv 2502.02631.
    """

    def problem(self, spec: Packed) -> str | None:
        if spec.symmetric and spec.bits != 2:
            return ("SEQ has levels at half-integers, Packed(symmetric=False, zeros='float'), or is ternary, "
                    f"Packed(bits=2, symmetric=True): got {spec}")  # fmt: skip
        if not spec.symmetric and spec.zeros != "float":
            return f"the zeros of SEQ are half-integers: Packed(symmetric=False, zeros='float') is required, got {spec}"
        return None

    def levels(self, bits: int, ternary: bool) -> Levels:
        steps = 1.5 if ternary else 2.0 ** (bits - 1)
        return Levels(steps, 1.0 if ternary else steps - 0.5, 0.99 * steps)

    def start(self, magnitudes: Tensor, format: PackedFormat) -> Tensor:
        return largest_of(magnitudes, format)

    def alpha(self, magnitudes: Tensor, learned: Tensor | None, format: PackedFormat) -> Tensor:
        assert learned is not None
        factor = 1 / math.sqrt(levels(format.bits) * magnitudes.numel())
        slower = learned * factor
        return (slower + (learned - slower).detach()).abs()
