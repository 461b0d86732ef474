"""Quantizers of the packed family: a float weight to codes, scales and zeros.

A quantizer is two independent steps,

1. *fit* one grid (scale, zero) per group: ``minmax``, ``mean``, or ``mse`` (clip search and least squares);
2. *round* every weight to a code of its grid: nearest, or with error feedback from the Hessian (``gptq``);

and codes are always chosen against the scale and zero as stored (rounded to their dtype), never before.
Rows never interact, so every step works on a few rows at a time and its temporaries stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from lowbit.core.hessian import check_hessian, damped, error_feedback, round_with_feedback
from lowbit.core.outliers import choose_outliers, float16_holds, float_chunks, sparse_rest
from lowbit.packed.format import Packed, PackedWeight

__all__ = ["quantize"]

# Elements per temporary: small enough to stay in cache, large enough to hide the cost of a torch call.
_CHUNK = 1 << 18
# Error feedback makes one Python step per column, so it wants many rows at once.
_FEEDBACK_CHUNK = 1 << 22

# Clip search of "mse": the range shrinks geometrically to _SHRINK**(_STEPS-1) = 0.09 of min-max, which covers
# ternary per-tensor weights; least squares then refines the best one (Lloyd's algorithm on a uniform grid).
_SHRINK, _STEPS, _REFITS = 0.92, 30, 4

# (weights, importance or None = all 1); an element of importance 0 does not exist for the fit.
_Piece = tuple[Tensor, Tensor | None]
_Pieces = Callable[[], Iterable[_Piece]]


@torch.no_grad()
def quantize(weight: Tensor, spec: Packed, *, hessian: Tensor | None = None) -> PackedWeight:
    """Quantize ``weight`` ([N, K], any float dtype) as ``spec`` says.

    - ``minmax``: round to nearest on a grid that spans the group (symmetric: codes -n..n with
      n = 2**(bits-1) - 1; integer zeros: the span includes 0).
    - ``mse``: the grid that minimises sum_k h[k] (w[k] - dequantized[k])**2, h = diag(hessian) or 1.
    - ``mean``: symmetric, clipped at gamma * mean|w| (Tao et al., ACL 2022, arXiv 2203.10705).
    - ``gptq``: the grid of ``mse``, then rounding that reduces tr((W - Q) H (W - Q).T) column after column:
      GPTQ (Frantar et al., arXiv 2210.17323) in its equivalent LDLQ form (Chee et al., arXiv 2307.13304).
      Columns go in order of decreasing diag(H); grids are fitted before, so the stored order is unchanged.

    ``hessian`` [K, K] is proportional to X.T @ X of the layer's inputs X [samples, K], see
    :func:`lowbit.model.calibrate.collect_hessians`: gptq requires it, mse takes it, the others ignore it.
    ``spec.outliers`` = f keeps the round(f*N*K) weights of largest magnitude in the sparse part; grids are
    fitted without them. float16 scales become float32 in a layer where one would be subnormal or overflow.

    Raises:
        ValueError: the weight is not a finite, non-empty [N, K] float tensor; the group size exceeds K; the
            hessian is missing, misshapen, not finite or not positive semidefinite.
    """
    _check(weight, spec, hessian)
    layer = _Layer(weight, spec, hessian)
    dtype = spec.resolve_scale_dtype()
    scales, zeros = layer.fit(dtype)
    if dtype == torch.float16 and not float16_holds(scales):
        dtype = torch.float32
        scales, zeros = layer.fit(dtype)
    codes = layer.round(scales, zeros)
    stored_zeros = None if spec.symmetric else zeros.to(torch.uint8 if spec.zeros == "int" else dtype)
    outliers = sparse_rest(partial(layer.rest, codes, scales, zeros), layer.outliers)
    return PackedWeight(codes, scales.to(dtype), stored_zeros, spec.bits, spec.group_size, *outliers)


def _check(weight: Tensor, spec: Packed, hessian: Tensor | None) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"weight must be a non-empty float tensor [N, K]: got {weight.dtype} {list(weight.shape)}")
    if spec.quantizer == "gptq" and hessian is None:
        raise ValueError(
            "quantizer='gptq' requires calibration data: got hessian=None "
            "(give calibration batches, or use quantizer='mse')"
        )
    check_hessian(hessian, weight.shape[1])


class _Layer:
    """One weight being quantized. Scales and zeros are float32 here, holding values of the stored dtype."""

    def __init__(self, weight: Tensor, spec: Packed, hessian: Tensor | None) -> None:
        self.weight, self.spec, self.hessian = weight, spec, hessian
        self.n, self.k = weight.shape
        self.group = spec.resolve_group_size(self.k)
        self.per_tensor = spec.granularity == "tensor"
        self.middle = 2 ** (spec.bits - 1)
        self.bottom, self.top = (1 if spec.symmetric else 0), 2**spec.bits - 1
        # The steps between the ends of the grid: from -n to n, or to 0 from the farther end.
        self.levels = self.middle - 1 if spec.symmetric else self.top
        self.importance: Tensor | None = None
        if hessian is not None and spec.quantizer in ("mse", "gptq"):
            self.importance = damped(hessian.diagonal())
        for w, _ in self.chunks():
            if not bool(torch.isfinite(w).all()):
                raise ValueError("weight must be finite in float32: got Inf or NaN")
        self.outliers = choose_outliers(self.chunks, self.n, self.k, round(spec.outliers * self.n * self.k))

    def chunks(self, size: int = _CHUNK) -> Iterator[tuple[Tensor, slice]]:
        """The weight in float32, a few rows at a time."""
        return float_chunks(self.weight, size)

    # ---- fit the grids

    def groups(self) -> Iterator[_Piece]:
        """Pieces (w, h) of shape [rows, G, group_size] ([1, 1, -1] per tensor); h = 0 excludes an element."""
        pad = -self.k % self.group
        for w, rows in self.chunks():
            h = self.importance
            if self.outliers is not None:
                kept = (~self.outliers[rows]).float()
                h = kept if h is None else kept * h
            elif pad or (h is not None and self.per_tensor):
                h = w.new_ones(w.shape) if h is None else h.expand_as(w)
            elif h is not None:
                h = h.unsqueeze(0)
            if pad:
                w = torch.nn.functional.pad(w, (0, pad))
                h = torch.nn.functional.pad(h, (0, pad)) if h is not None else None
            shape = (1, 1, -1) if self.per_tensor else (-1, (self.k + pad) // self.group, self.group)
            yield w.reshape(shape), None if h is None else h.reshape(shape)

    def fit(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scales, zeros), each [N, G], [N, 1] or [1, 1]."""
        if self.per_tensor:
            scale, zero = self.fit_groups(self.groups, dtype)
            return scale.view(1, 1), zero.view(1, 1)
        scales = torch.empty(self.n, -(-self.k // self.group), dtype=torch.float32, device=self.weight.device)
        zeros = torch.empty_like(scales)
        done = 0
        for piece in self.groups():
            rows = slice(done, done := done + len(piece[0]))
            scale, zero = self.fit_groups(partial(iter, (piece,)), dtype)
            scales[rows], zeros[rows] = scale.squeeze(-1), zero.squeeze(-1)
        return scales, zeros

    def fit_groups(self, pieces: _Pieces, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, zero), [rows, G, 1] each, of groups that are the pieces joined along the last dimension."""
        if self.spec.quantizer == "mean":
            return self.grid(self.clipped_at_mean(pieces), None, dtype)
        low, high = self.limits(pieces)
        # float64: exact where the weights already are on a grid, and no overflow.
        span = high.abs().maximum(low.abs()) if self.spec.symmetric else high.double() - low.double()
        spread = (span / self.levels).float()
        if not self.spec.symmetric and self.spec.zeros == "float":
            # A range narrow beside its distance from 0 would need a zero beyond the precision of its dtype.
            largest = high.abs().maximum(low.abs())
            spread = torch.where(low == high, largest, spread.maximum(largest * torch.finfo(dtype).eps))
        scale, zero = self.grid(spread, low, dtype)

        search = self.spec.quantizer in ("mse", "gptq")
        if not search and dtype != torch.float32:
            return scale, zero
        best = scale, zero, self.error(pieces, scale, zero)
        if dtype == torch.float32:
            # (n * s) / n may miss s by its last bit: a weight that already is on a grid finds it again.
            for limit in (0.0, torch.inf):
                neighbour = scale.nextafter(torch.full_like(scale, limit))
                best = self.better(pieces, (neighbour, zero), best)
        if search:
            for step in range(1, _STEPS):
                ratio = _SHRINK**step
                trial = self.grid(spread * ratio, low + (1 - ratio) * (high / 2 - low / 2), dtype)
                best = self.better(pieces, trial, best)
            for _ in range(_REFITS):
                best = self.better(pieces, self.least_squares(pieces, best[0], best[1], dtype), best)
                # Rounding the zero hides the smaller steps of least squares from an integer zero.
                for shift in (-1, 1) if not self.spec.symmetric and self.spec.zeros == "int" else ():
                    best = self.better(pieces, (best[0], (best[1] + shift).clamp(0, self.top)), best)
        return best[0], best[1]

    def clipped_at_mean(self, pieces: _Pieces) -> Tensor:
        """The scale whose outermost level is gamma * mean|w|."""
        total: Tensor | float = 0.0
        count: Tensor | float = 0.0
        for w, h in pieces():
            total = total + _sum(w.abs() if h is None else w.abs() * h)
            count = count + _sum(torch.ones_like(w) if h is None else h)
        return torch.as_tensor(self.spec.gamma * total / torch.as_tensor(count).clamp(min=1) / self.levels)

    def limits(self, pieces: _Pieces) -> tuple[Tensor, Tensor]:
        """(min, max) of every group, including 0 where the grid must contain it."""
        lows, highs = [], []
        for w, h in pieces():
            lows.append((w if h is None else w.masked_fill(h == 0, torch.inf)).amin(-1, keepdim=True))
            highs.append((w if h is None else w.masked_fill(h == 0, -torch.inf)).amax(-1, keepdim=True))
        low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        empty = low > high
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        if self.spec.zeros == "int":
            low, high = low.clamp(max=0), high.clamp(min=0)
        return low, high

    def grid(self, scale: Tensor, low: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, zero) as they will be stored, with code 0 nearest to ``low`` unless the zero is fixed."""
        # An all-zero group gets scale 1: its codes are the zero point, and nothing divides by 0.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        # float16 may give 0 or Inf, which sends the layer to float32; there it must end.
        if dtype != torch.float16:
            scale = scale.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max)
        scale = scale.to(dtype).float()
        if self.spec.symmetric or low is None:
            return scale, torch.full_like(scale, self.middle)
        return scale, self.stored_zero(-low / scale, dtype)

    def stored_zero(self, zero: Tensor, dtype: torch.dtype) -> Tensor:
        if self.spec.zeros == "int":
            return zero.round().clamp(0, self.top)
        return zero.to(dtype).float()

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Float codes: clamp(round(w / scale + zero))."""
        return (w / scale).add_(zero).round_().clamp_(self.bottom, self.top)

    def error(self, pieces: _Pieces, scale: Tensor, zero: Tensor) -> Tensor:
        """sum h (w - dequantized)**2 of every group, rounding to nearest."""
        total = torch.zeros_like(scale)
        for w, h in pieces():
            square = self.nearest(w, scale, zero).sub_(zero).mul_(scale).sub_(w).square_()
            total = total + _sum(square if h is None else square.mul_(h))
        return total

    def better(
        self, pieces: _Pieces, trial: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of (scale, zero, error), per group the one of smaller error; a tie or a NaN keeps ``best``."""
        error = self.error(pieces, *trial)
        won = error < best[2]
        return (
            torch.where(won, trial[0], best[0]),
            torch.where(won, trial[1], best[1]),
            torch.where(won, error, best[2]),
        )

    def least_squares(self, pieces: _Pieces, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The grid of least error for the codes that (scale, zero) gives: a line through (code - zero, w)."""
        s_h, s_c, s_w, s_cc, s_cw = (torch.zeros_like(scale) for _ in range(5))
        for w, h in pieces():
            code = self.nearest(w, scale, zero).sub_(zero)
            weighted = code if h is None else code * h
            s_cc, s_cw = s_cc + _sum(weighted * code), s_cw + _sum(weighted * w)
            if not self.spec.symmetric:
                s_h = s_h + (w.shape[-1] if h is None else _sum(h.expand_as(w)))
                s_c, s_w = s_c + _sum(weighted), s_w + _sum(w if h is None else w * h)
        if self.spec.symmetric:
            return self.grid(s_cw / s_cc, None, dtype)
        scale, _ = self.grid((s_h * s_cw - s_c * s_w) / (s_h * s_cc - s_c * s_c), None, dtype)
        return scale, self.stored_zero(zero - (s_w / scale - s_c) / s_h, dtype)

    # ---- round the weights

    def columns(self, values: Tensor, rows: slice) -> Tensor:
        """Per-group values of some rows, broadcastable to [rows, K]."""
        if values.shape[1] == 1:
            return values if values.shape[0] == 1 else values[rows]
        part = values[rows].unsqueeze(-1)
        return part.expand(-1, -1, self.group).flatten(1)[:, : self.k]

    def round(self, scales: Tensor, zeros: Tensor) -> Tensor:
        codes = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.weight.device)
        if self.spec.quantizer == "gptq":
            assert self.hessian is not None
            order, feedback = error_feedback(self.hessian)
            for w, rows in self.chunks(_FEEDBACK_CHUNK):
                codes[rows] = self.round_with_feedback(w, rows, scales, zeros, order, feedback)
        else:
            for w, rows in self.chunks():
                codes[rows] = self.nearest(w, self.columns(scales, rows), self.columns(zeros, rows))
        return codes

    def round_with_feedback(
        self, w: Tensor, rows: slice, scales: Tensor, zeros: Tensor, order: Tensor, feedback: Tensor
    ) -> Tensor:
        """Codes of some rows, each column rounded against the errors of those before it."""
        per_row = scales.shape[1] == 1
        scale_of, zero_of = (v.expand(self.n, -1)[rows].t().contiguous() for v in (scales, zeros))

        def nearest(column: int, target: Tensor) -> tuple[Tensor, Tensor]:
            group = 0 if per_row else column // self.group
            code = self.nearest(target, scale_of[group], zero_of[group])
            return code, (code - zero_of[group]) * scale_of[group]

        exact = None if self.outliers is None else self.outliers[rows]
        return round_with_feedback(w, order, feedback, nearest, exact)

    def rest(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """w - dequantized code, a few rows at a time."""
        for w, rows in self.chunks():
            scale, zero = self.columns(scales, rows), self.columns(zeros, rows)
            yield w - (codes[rows] - zero) * scale, rows


def _sum(t: Tensor) -> Tensor:
    return t.sum(-1, keepdim=True)
