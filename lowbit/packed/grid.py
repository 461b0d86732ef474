"""Grids of the packed family fitted to a float weight: what its quantizers have in common.

Rows never interact, so every step works on a few rows at a time and its temporaries stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from lowbit.core.hessian import Feedback, Left, error_feedback, round_with_feedback
from lowbit.core.outliers import first_outliers, float_chunks
from lowbit.packed.format import Packed

# Elements per temporary: small enough to stay in cache, large enough to hide the cost of a torch call.
_CHUNK = 1 << 18
# Error feedback makes one Python step per column, so it wants many rows at once.
_FEEDBACK_CHUNK = 1 << 22

SCALE_TOP = 255  # the largest code of a scale

# (weights, importance or None = all 1); an element of importance 0 does not exist for the fit.
Piece = tuple[Tensor, Tensor | None]
Pieces = Callable[[], Iterable[Piece]]
Best = tuple[Tensor, Tensor, Tensor]  # scale, zero, and the error with them


class GridFit:
    """One weight, and the grids that are fitted to it: the steps that quantizers are made of.

    Scales and zeros are float32 here, holding values of the stored dtype, or codes of 8 bits times :attr:`factors`.
    ``importance`` [K] counts in every squared error.
    """

    factors: Tensor | None = None  # [N, 1] or [1, 1], of scales of 8 bits
    _factor: Tensor | None = None  # of the groups that are fitted, [rows, 1, 1] or [1, 1, 1]

    def __init__(self, weight: Tensor, spec: Packed, importance: Tensor | None = None) -> None:
        self.weight, self.spec, self.importance = weight, spec, importance
        self.n, self.k = weight.shape
        self.group = spec.resolve_group_size(self.k)
        self.per_tensor = spec.granularity == "tensor"
        self.middle = 2 ** (spec.bits - 1)
        self.bottom, self.top = (1 if spec.symmetric else 0), 2**spec.bits - 1
        # The steps between the ends of the grid: from -n to n, or to 0 from the farther end.
        self.levels = self.middle - 1 if spec.symmetric else self.top
        for w, _ in self.chunks():
            if not bool(torch.isfinite(w).all()):
                raise ValueError("weight must be finite in float32: got Inf or NaN")
        self.outliers = first_outliers(spec, self.chunks, self.n, self.k)

    def chunks(self, size: int | None = None) -> Iterator[tuple[Tensor, slice]]:
        """The weight in float32, a few rows at a time."""
        return float_chunks(self.weight, size or _CHUNK)

    # ---- fit the grids

    def groups(self) -> Iterator[Piece]:
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

    def each_group(self, fit: Callable[[Pieces], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(scales, zeros) of all groups, each [N, G], [N, 1] or [1, 1], ``fit`` on a few rows at a time.

        ``fit(pieces)`` gives (scale, zero), [rows, G, 1] each, of groups that are the pieces joined along the last
        dimension.
        """
        if self.per_tensor:
            scale, zero = fit(self.groups)
            return scale.view(1, 1), zero.view(1, 1)
        scales = torch.empty(self.n, -(-self.k // self.group), dtype=torch.float32, device=self.weight.device)
        zeros = torch.empty_like(scales)
        done = 0
        for piece in self.groups():
            rows = slice(done, done := done + len(piece[0]))
            if self.factors is not None:
                self._factor = self.factors_of(rows).unsqueeze(-1)
            scale, zero = fit(partial(iter, (piece,)))
            scales[rows], zeros[rows] = scale.squeeze(-1), zero.squeeze(-1)
        self._factor = None
        return scales, zeros

    def choose_factors(self, scales: Tensor, dtype: torch.dtype, one: bool) -> None:
        """From now on scales are codes 1 to 255 of 8 bits times factors of ``dtype``, in which the largest of ``scales
        [N, G]`` has the last code: that of a row, or, ``one``, of all."""
        some = torch.cat([(high > low).any(-1) for low, high in map(self._ends, self.groups())])
        largest = torch.where(some, scales, 0).amax(1, keepdim=True)  # groups of zeros alone have any scale
        if one:
            largest = largest.amax(0, keepdim=True)
        limits = torch.finfo(dtype)
        factors = (largest / SCALE_TOP).clamp(limits.tiny, limits.max)
        self.factors = factors.to(dtype).float()

    def _ends(self, piece: Piece) -> tuple[Tensor, Tensor]:
        low, high = self.limits(partial(iter, (piece,)))
        return low.clamp(max=0), high.clamp(min=0)

    def factors_of(self, rows: slice) -> Tensor:
        assert self.factors is not None
        return self.factors if len(self.factors) == 1 else self.factors[rows]

    def spread(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale of a grid from ``low`` to ``high`` (symmetric: to the farther end on both sides)."""
        # float64: exact where the weights already are on a grid, and no overflow.
        span = high.abs().maximum(low.abs()) if self.spec.symmetric else high.double() - low.double()
        spread: Tensor = (span / self.levels).float()
        if not self.spec.symmetric and self.spec.zeros == "float":
            # A range narrow beside its distance from 0 would need a zero beyond the precision of its dtype.
            largest = high.abs().maximum(low.abs())
            spread = torch.where(low == high, largest, spread.maximum(largest * torch.finfo(dtype).eps))
        return spread

    def clipped_at_mean(self, pieces: Pieces) -> Tensor:
        """The scale whose outermost level is gamma * mean|w|."""
        totals, counts = [], []
        for w, h in pieces():
            totals.append(_sum(w.abs() if h is None else w.abs() * h))
            counts.append(_sum(torch.ones_like(w) if h is None else h))
        total, count = sum(totals[1:], totals[0]), sum(counts[1:], counts[0])
        scale: Tensor = self.spec.gamma * total / count.clamp(min=1) / self.levels
        return scale

    def limits(self, pieces: Pieces) -> tuple[Tensor, Tensor]:
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
        if self._factor is not None:
            scale = on_codes(scale, self._factor)
            dtype = torch.float32
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

    def error(self, pieces: Pieces, scale: Tensor, zero: Tensor) -> Tensor:
        """sum h (w - dequantized)**2 of every group, rounding to nearest."""
        total = torch.zeros_like(scale)
        for w, h in pieces():
            square = self.nearest(w, scale, zero).sub_(zero).mul_(scale).sub_(w).square_()
            total = total + _sum(square if h is None else square.mul_(h))
        return total

    def better(self, pieces: Pieces, trial: tuple[Tensor, Tensor], best: Best) -> Best:
        """Of (scale, zero, error), per group the one of smaller error; a tie or a NaN keeps ``best``."""
        error = self.error(pieces, *trial)
        won = error < best[2]
        return (
            torch.where(won, trial[0], best[0]),
            torch.where(won, trial[1], best[1]),
            torch.where(won, error, best[2]),
        )

    def neighbours(self, pieces: Pieces, best: Best) -> Best:
        """``best``, or a scale one float32 away: (n * s) / n may miss s by its last bit.

        So a weight that already is on a grid finds it again.
        """
        if self._factor is not None:
            return best
        scale, zero, _ = best
        for limit in (0.0, torch.inf):
            neighbour = scale.nextafter(torch.full_like(scale, limit))
            best = self.better(pieces, (neighbour, zero), best)
        return best

    def least_squares(self, pieces: Pieces, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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

    def nearest_codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes, uint8 [N, K], each weight rounded by itself."""
        codes = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.weight.device)
        for w, rows in self.chunks():
            codes[rows] = self.nearest(w, self.columns(scales, rows), self.columns(zeros, rows))
        return codes

    def codes_with_feedback(
        self, scales: Tensor, zeros: Tensor, hessian: Tensor | Feedback, left: Left | None = None
    ) -> Tensor:
        """Codes, uint8 [N, K], each column rounded against the errors of those before it; ``left``: what that leaves.
        """
        codes = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.weight.device)
        feedback = error_feedback(hessian) if isinstance(hessian, Tensor) else hessian
        for w, rows in self.chunks(_FEEDBACK_CHUNK):
            codes[rows] = self.round_with_feedback(w, rows, scales, zeros, feedback, left)
        return codes

    def round_with_feedback(
        self, w: Tensor, rows: slice, scales: Tensor, zeros: Tensor, feedback: Feedback, left: Left | None
    ) -> Tensor:
        """:meth:`codes_with_feedback` of some rows."""
        per_row = scales.shape[1] == 1
        scale_of, zero_of = (v.expand(self.n, -1)[rows].t().contiguous() for v in (scales, zeros))

        def nearest(column: int, target: Tensor) -> tuple[Tensor, Tensor]:
            group = 0 if per_row else column // self.group
            code = self.nearest(target, scale_of[group], zero_of[group])
            return code, (code - zero_of[group]) * scale_of[group]

        exact = None if self.outliers is None else self.outliers[rows]
        return round_with_feedback(w, feedback, nearest, exact, left, rows)

    def rest(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """w - dequantized code, a few rows at a time."""
        for w, rows in self.chunks():
            scale, zero = self.columns(scales, rows), self.columns(zeros, rows)
            yield w - (codes[rows] - zero) * scale, rows


def on_codes(scale: Tensor, factor: Tensor) -> Tensor:
    """The nearest code of 8 bits but 0, times the factor."""
    return (scale / factor).round().clamp(1, SCALE_TOP) * factor


def _sum(t: Tensor) -> Tensor:
    return t.sum(-1, keepdim=True)
