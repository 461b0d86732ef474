"""Quantizers of the packed family: a float weight to codes, scales and zeros.

A quantizer is two independent steps,

1. *fit* one grid (scale, zero) per group: ``minmax``, ``mean``, or ``mse`` (clip search and least squares);
2. *round* every weight to a code of its grid: nearest, or with error feedback from the Hessian (``gptq``);
   ``descent`` then improves both;

and codes are always chosen against the scale and zero as stored (rounded to their dtype), never before.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lowbit.core.hessian import Left, check_hessian, check_importance, damped, error_feedback
from lowbit.core.outliers import costliest, float16_holds, jointly, measured_for, sparse_rest
from lowbit.core.quantizer import Quantizer, Statistics, register
from lowbit.packed.descent import descend
from lowbit.packed.format import Packed, PackedWeight
from lowbit.packed.grid import GridFit, Pieces, on_codes

__all__ = ["GridQuantizer", "quantize"]

# Clip search of "mse": the range shrinks geometrically to _SHRINK**(_STEPS-1) = 0.09 of min-max, which covers
# ternary per-tensor weights; least squares then refines the best one (Lloyd's algorithm on a uniform grid).
_SHRINK, _STEPS, _REFITS = 0.92, 30, 4


def quantize(weight: Tensor, spec: Packed, *, hessian: Tensor | None = None) -> PackedWeight:
    """Quantize ``weight`` ([N, K], any float dtype) as ``spec`` says.

    - ``minmax``: round to nearest on a grid that spans the group (symmetric: codes -n..n with
      n = 2**(bits-1) - 1; integer zeros: the span includes 0).
    - ``mse``: the grid that minimises sum_k h[k] (w[k] - dequantized[k])**2, h = diag(hessian) or 1.
    - ``mean``: symmetric, clipped at gamma * mean|w| (Tao et al., ACL 2022, arXiv 2203.10705).
    - ``gptq``: the grid of ``mse``, then rounding that reduces tr((W - Q) H (W - Q).T) column after column:
      GPTQ (Frantar et al., arXiv 2210.17323) in its equivalent LDLQ form (Chee et al., arXiv 2307.13304).
      Columns go in order of decreasing diag(H); grids are fitted before, so the stored order is unchanged.
    - ``descent``: what ``gptq`` finds, then grids by least squares and codes by coordinate descent on the same error,
      in turns (:mod:`lowbit.packed.descent`): better than ``gptq``, in about four times its time.

    ``hessian`` [K, K] is proportional to X.T @ X of the layer's inputs X [samples, K]: gptq and descent require it, mse
    takes it, the others ignore it.
    ``spec.outliers`` = f keeps round(f*N*K) weights in the sparse part: those of largest magnitude, which no grid
    is fitted to, or random ones, or with ``outliers_by="sensitivity"`` those that cost most, rounded to the grid
    that is fitted without the largest. From those gptq and descent go on in turns: the weights that error feedback
    leaves most of become the outliers, and grids are fitted without them (:func:`lowbit.core.outliers.jointly`; not
    where squared gradients say what matters).
    With ``spec.scale_bits`` grids are fitted twice: freely, then with scales that are codes times the factors that the
    first ones asked for. float16 scales become float32 in a layer where one would be subnormal or overflow.

    Raises:
        ValueError: the weight is not a finite, non-empty [N, K] float tensor; the group size exceeds K; the
            hessian is missing, misshapen, not finite or not positive semidefinite.
    """
    return spec.quantize(weight, hessian=hessian)  # type: ignore[no-any-return]


class GridQuantizer(Quantizer[Packed, PackedWeight]):
    """Fits one grid per group, then gives every weight a code. A subclass says how it does either."""

    family = "packed"
    turns = 0  # of outliers and the rest, of a quantizer that rounds with error feedback (:func:`jointly`)

    def fit_groups(self, fit: GridFit, pieces: Pieces, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, zero), [rows, G, 1] each, of groups that are the pieces joined along the last dimension."""
        raise NotImplementedError

    def uses_for(self, spec: Packed) -> frozenset[str]:
        return self.uses | measured_for(spec)

    def round(self, fit: GridFit, scales: Tensor, zeros: Tensor, statistics: Statistics) -> Tensor:
        """Codes, uint8 [N, K]."""
        return fit.nearest_codes(scales, zeros)

    def improve(
        self, fit: GridFit, codes: Tensor, scales: Tensor, zeros: Tensor, statistics: Statistics, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored, of what was fitted and rounded; scales and zeros hold values of ``dtype``."""
        return codes, scales, zeros

    @torch.no_grad()
    def quantize(self, weight: Tensor, spec: Packed, statistics: Statistics) -> PackedWeight:
        hessian = statistics.hessian
        self._check(weight, statistics)
        weighs = hessian is not None and "hessian" in self.needs | self.uses
        fit = GridFit(weight, spec, damped(hessian.diagonal()) if weighs and hessian is not None else None)
        scales, zeros, dtype = self._grids(fit)
        by_cost = fit.outliers is not None and spec.outliers_by == "sensitivity"
        if by_cost:
            rest = partial(fit.rest, fit.nearest_codes(scales, zeros), scales, zeros)
            fit.outliers = costliest(spec, rest, statistics, fit.n, fit.k)
        if by_cost and self.turns and hessian is not None and statistics.sensitivity is None:
            fit, (codes, scales, zeros, dtype) = self._jointly(fit, scales, zeros, dtype, hessian)
        else:
            codes = self.round(fit, scales, zeros, statistics)
        codes, scales, zeros = self.improve(fit, codes, scales, zeros, statistics, dtype)
        if fit.factors is not None and not torch.equal(scales, held := on_codes(scales, fit.factors)):
            scales, codes = held, fit.nearest_codes(held, zeros)  # of a quantizer that knows no such scales
        stored_zeros = None if spec.symmetric else zeros.to(torch.uint8 if spec.zeros == "int" else dtype)
        outliers = sparse_rest(partial(fit.rest, codes, scales, zeros), fit.outliers)
        group_size = fit.group if spec.granularity == "group" else None
        made = PackedWeight(codes, scales.to(dtype), stored_zeros, spec.bits, group_size, *outliers)
        if fit.factors is not None:
            of_scales = (scales / fit.factors).round().to(torch.uint8)
            factors = fit.factors.to(dtype)
            made = replace(made, scales=of_scales, scale_factors=factors, scale_block=scales.shape[1])
        return replace(made, packed_zeros=spec.packs_zeros(fit.k))

    def _grids(self, fit: GridFit) -> tuple[Tensor, Tensor, torch.dtype]:
        """Scales and zeros without the outliers, and the dtype that holds them."""
        spec, dtype = fit.spec, fit.spec.resolve_scale_dtype()
        if spec.scale_bits is not None:
            fit.factors = None
            free, _ = fit.each_group(lambda pieces: self.fit_groups(fit, pieces, torch.float32))
            fit.choose_factors(free, dtype, one=spec.format(fit.weight, "linear").one_factor)
        scales, zeros = fit.each_group(lambda pieces: self.fit_groups(fit, pieces, dtype))
        if fit.factors is None and dtype == torch.float16 and not float16_holds(scales):
            dtype = torch.float32
            scales, zeros = fit.each_group(lambda pieces: self.fit_groups(fit, pieces, dtype))
        return scales, zeros, dtype

    def _jointly(
        self, fit: GridFit, scales: Tensor, zeros: Tensor, dtype: torch.dtype, hessian: Tensor
    ) -> tuple[GridFit, tuple[Tensor, Tensor, Tensor, torch.dtype]]:
        """Outliers, grids and codes, in turns: the fit, (codes, scales, zeros, dtype)."""
        feedback = error_feedback(hessian)

        def coded(
            fit: GridFit, scales: Tensor, zeros: Tensor, dtype: torch.dtype
        ) -> tuple[tuple[Tensor, Tensor, Tensor, torch.dtype], Left]:
            left = Left(fit.n, fit.k, fit.weight.device)
            return (fit.codes_with_feedback(scales, zeros, feedback, left), scales, zeros, dtype), left

        return jointly(fit, coded(fit, scales, zeros, dtype), lambda fit: coded(fit, *self._grids(fit)), self.turns)

    def _check(self, weight: Tensor, statistics: Statistics) -> None:
        hessian = statistics.hessian
        if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
            raise ValueError(f"weight must be a non-empty float tensor [N, K]: got {weight.dtype} {list(weight.shape)}")
        if "hessian" in self.needs and hessian is None:
            raise ValueError(
                f"quantizer={self.name!r} requires calibration data: got hessian=None "
                f"(give calibration batches, or use quantizer={self.stand_in!r})"
            )
        check_hessian(hessian, weight.shape[1])
        check_importance(statistics.sensitivity, weight)


class MinMax(GridQuantizer):
    """The grid spans all weights of the group."""

    name = "minmax"

    def fit_groups(self, fit: GridFit, pieces: Pieces, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        low, high = fit.limits(pieces)
        scale, zero = fit.grid(fit.spread(low, high, dtype), low, dtype)
        if dtype != torch.float32:
            return scale, zero
        return fit.neighbours(pieces, (scale, zero, fit.error(pieces, scale, zero)))[:2]


class Mean(GridQuantizer):
    """The outermost level is gamma * mean|w|."""

    name = "mean"

    def fit_groups(self, fit: GridFit, pieces: Pieces, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return fit.grid(fit.clipped_at_mean(pieces), None, dtype)


class Mse(GridQuantizer):
    """The clipping of least squared error, refined by least squares."""

    name = "mse"
    uses = frozenset({"hessian"})

    def fit_groups(self, fit: GridFit, pieces: Pieces, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        low, high = fit.limits(pieces)
        spread = fit.spread(low, high, dtype)
        scale, zero = fit.grid(spread, low, dtype)
        best = scale, zero, fit.error(pieces, scale, zero)
        if dtype == torch.float32:
            best = fit.neighbours(pieces, best)
        for step in range(1, _STEPS):
            ratio = _SHRINK**step
            trial = fit.grid(spread * ratio, low + (1 - ratio) * (high / 2 - low / 2), dtype)
            best = fit.better(pieces, trial, best)
        for _ in range(_REFITS):
            best = fit.better(pieces, fit.least_squares(pieces, best[0], best[1], dtype), best)
            # Rounding the zero hides the smaller steps of least squares from an integer zero.
            for shift in (-1, 1) if not fit.spec.symmetric and fit.spec.zeros == "int" else ():
                best = fit.better(pieces, (best[0], (best[1] + shift).clamp(0, fit.top)), best)
        return best[:2]


class Gptq(Mse):
    """The grid of :class:`Mse`, then rounding with error feedback from the Hessian."""

    name = "gptq"
    needs = frozenset({"hessian"})
    stand_in = "mse"
    turns = 1

    def round(self, fit: GridFit, scales: Tensor, zeros: Tensor, statistics: Statistics) -> Tensor:
        assert statistics.hessian is not None
        return fit.codes_with_feedback(scales, zeros, statistics.hessian)


class Descent(Gptq):
    """What :class:`Gptq` finds, then codes and grids improved together: :mod:`lowbit.packed.descent`."""

    name = "descent"
    turns = 2  # cheap beside what follows
    correction = 0.5

    def improve(
        self, fit: GridFit, codes: Tensor, scales: Tensor, zeros: Tensor, statistics: Statistics, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert statistics.hessian is not None
        return descend(fit, codes, scales, zeros, statistics.hessian, dtype)


for _quantizer in (MinMax(), Mse(), Mean(), Gptq(), Descent()):
    register(_quantizer)
