"""Scales and tables of the codebook family fitted to a float weight: what its quantizers have in common.

Rows never interact but in a table per tensor, so every step works on a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.codebook.format import Codebook
from lowbit.codebook.kmeans import boundaries
from lowbit.core.hessian import Feedback, Left, error_feedback, round_with_feedback
from lowbit.core.outliers import first_outliers, float16_holds, float_chunks

# Elements per temporary: small enough to stay in cache, large enough to hide the cost of a torch call.
_CHUNK = 1 << 18
# A fit makes many steps on a few numbers per row.
_FIT_CHUNK = 1 << 21
# Error feedback makes one Python step per column, so it wants many rows at once.
_FEEDBACK_CHUNK = 1 << 22

# learn(values [R, n], weights [R, n] or None, number of the first row) -> tables [R, 2**bits]
Learn = Callable[[Tensor, "Tensor | None", int], Tensor]


class TableFit:
    """One weight, and the scales and tables that are fitted to it: what quantizers of this family have in common.

    ``scales`` and ``tables`` are in the dtype that they are stored in. ``importance`` [1, K] or [N, K] counts in every
    squared error. ``learn`` makes tables of values.
    """

    def __init__(self, weight: Tensor, spec: Codebook, importance: Tensor | None, learn: Learn) -> None:
        self.weight, self.spec, self.importance, self.learn = weight, spec, importance, learn
        self.n, self.k = weight.shape
        self.group = spec.group_size or self.k
        self.scales: Tensor | None = None
        self.tables = weight
        for w, _ in self.chunks():
            if not bool(torch.isfinite(w).all()):
                raise ValueError("weight must be finite in float32: got Inf or NaN")
        self.outliers = first_outliers(spec, self.chunks, self.n, self.k)

    def chunks(self, size: int | None = None) -> Iterator[tuple[Tensor, slice]]:
        """The weight in float32, a few rows at a time: fewer where their tables are larger than they are."""
        return float_chunks(self.weight, (size or _CHUNK) * self.group // max(self.group, 1 << self.spec.bits))

    def grouped(self, t: Tensor, fill: float) -> Tensor:
        """[rows, K] -> [rows, G, group_size], the last group filled up."""
        pad = -self.k % self.group
        if pad:
            t = torch.nn.functional.pad(t, (0, pad), value=fill)
        return t.reshape(len(t), -1, self.group)

    def ungrouped(self, t: Tensor) -> Tensor:
        return t.flatten(1)[:, : self.k]

    # ---- fit scales and tables

    def fit_scales(self) -> None:
        """``scales`` [N, G]: every group's largest magnitude over the table's."""
        if not self.spec.scales:
            return
        largest = torch.empty(self.n, -(-self.k // self.group), dtype=torch.float32, device=self.weight.device)
        for w, rows in self.chunks():
            if self.outliers is not None:
                w = w.masked_fill(self.outliers[rows], 0)
            largest[rows] = self.grouped(w.abs(), 0).amax(-1)
        if self.spec.values is not None:
            largest /= max(map(abs, self.spec.values)) or 1
        empty = largest == 0  # no table need have a 0: the scale makes these weights 0
        dtype = self.spec.resolve_scale_dtype()
        if dtype == torch.float16 and not float16_holds(largest.masked_fill(empty, 1).half()):
            dtype = torch.float32
        limits = torch.finfo(dtype)
        self.scales = largest.clamp(limits.tiny, limits.max).to(dtype).masked_fill_(empty, 0)

    def fit_tables(self) -> None:
        """``tables`` [1, 1, L], [N, 1, L] or [N, G, L]."""
        spec, levels = self.spec, 1 << self.spec.bits
        if spec.values is not None:
            found = torch.tensor(spec.values, dtype=torch.float32, device=self.weight.device)
        elif spec.granularity == "tensor":
            # All of the weight at once: its values are sorted together.
            values = torch.empty(self.n, self.k, dtype=torch.float32, device=self.weight.device)
            weights = torch.empty_like(values) if self.importance is not None or self.scales is not None else None
            for x, h, rows in self.scaled():
                values[rows] = x
                if weights is not None and h is not None:
                    weights[rows] = h
            found = self.learn(values.view(1, -1), None if weights is None else weights.view(1, -1), 0)
        else:
            group = self.group if spec.granularity == "group" else self.k
            shape = self.n, -(-self.k // group), levels
            found = torch.empty(shape, dtype=torch.float32, device=self.weight.device)
            for x, h, rows in self.scaled():
                if group != self.k:
                    x, h = self.grouped(x, torch.inf), None if h is None else self.grouped(h, 1)
                x, h = x.reshape(-1, group), None if h is None else h.reshape(-1, group)
                first_row = rows.start * found.shape[1]
                found[rows] = self.learn(x, h, first_row).view(-1, found.shape[1], levels)
        self.tables = _stored(found.view(*([1] * (3 - found.dim())), *found.shape), spec.resolve_codebook_dtype())

    def scaled(self) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
        """(w / scale with outliers as inf, importance * scale**2 or None, rows), [rows, K]."""
        for w, rows in self.chunks(_FIT_CHUNK):
            h = self.importance
            if h is not None:
                h = h[rows] if len(h) == self.n else h.expand_as(w)
            if self.scales is not None:
                scale = self.scales_of(rows)
                w = self.ungrouped(self.grouped(w, 0) / _nonzero(scale))
                # Over the largest, as the square of a small scale is not a float32.
                square = (scale / _nonzero(self.scales.float().max())).square_().clamp_(min=1e-30)
                square = self.ungrouped(square.expand(-1, -1, self.group))
                h = square if h is None else square * h
            if self.outliers is not None:
                w = w.masked_fill(self.outliers[rows], torch.inf)
            yield w, h, rows

    # ---- round the weights

    def values(self, rows: slice) -> Tensor:
        """What the codes of some rows stand for, float32 [rows or 1, G or 1, L]."""
        return self.tables_of(rows) if self.scales is None else self.tables_of(rows) * self.scales_of(rows)

    def targets(self, rows: slice) -> Tensor:
        """The same to choose codes by: a group without a scale takes those of the table's smallest values."""
        return self.tables_of(rows) if self.scales is None else self.tables_of(rows) * _nonzero(self.scales_of(rows))

    def tables_of(self, rows: slice) -> Tensor:
        tables = self.tables.float()
        return tables if len(tables) == 1 else tables[rows]

    def scales_of(self, rows: slice) -> Tensor:
        assert self.scales is not None
        return self.scales[rows].float().unsqueeze(-1)

    def order(self) -> Tensor | None:
        """The codes of a fixed table by value, of equal values always the first; ``None`` when it is ascending."""
        values = self.spec.values
        if values is None or all(a < b for a, b in pairwise(values)):
            return None
        codes = sorted(range(len(values)), key=lambda code: self.tables[0, 0, code])
        for i in range(1, len(codes)):
            if self.tables[0, 0, codes[i]] == self.tables[0, 0, codes[i - 1]]:
                codes[i] = codes[i - 1]
        return torch.tensor(codes, device=self.weight.device)

    def nearest_codes(self) -> Tensor:
        """Codes, uint8 [N, K], each weight rounded by itself; of two equally near values the lower."""
        codes = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.weight.device)
        order = self.order()
        for w, rows in self.chunks():
            values = self.targets(rows)
            values = values if order is None else values[..., order]
            x = self.grouped(w, 0) if values.shape[1] != 1 else w.unsqueeze(1)
            limits = boundaries(values)
            found = torch.zeros(x.shape, dtype=torch.uint8, device=w.device)
            for j in range(limits.shape[-1]):
                found += x > limits[..., j, None]
            found = self.ungrouped(found)
            codes[rows] = found if order is None else order[found.int()].to(torch.uint8)
        return codes

    def codes_with_feedback(self, hessian: Tensor | Feedback, left: Left | None = None) -> Tensor:
        """Codes, uint8 [N, K], each column rounded against the errors of those before it; ``left``: what that leaves.
        """
        codes = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.weight.device)
        order = self.order()
        feedback = error_feedback(hessian) if isinstance(hessian, Tensor) else hessian
        for w, rows in self.chunks(_FEEDBACK_CHUNK):
            codes[rows] = self.round_with_feedback(w, rows, order, feedback, left)
        return codes

    def round_with_feedback(
        self, w: Tensor, rows: slice, order: Tensor | None, feedback: Feedback, left: Left | None
    ) -> Tensor:
        """:meth:`codes_with_feedback` of some rows."""
        values = self.values(rows)
        values = values if order is None else values[..., order]
        values = values.permute(1, 2, 0).contiguous()  # [G, L, rows]: what a column needs lies together
        limits = boundaries(values.transpose(1, 2)).transpose(1, 2).contiguous()

        def nearest(column: int, target: Tensor) -> tuple[Tensor, Tensor]:
            group = column // self.group if len(values) != 1 else 0
            code = (target > limits[group]).sum(0, keepdim=True)
            value = values[group].expand(-1, len(target)).gather(0, code)
            return (code if order is None else order[code])[0], value[0]

        exact = None if self.outliers is None else self.outliers[rows]
        return round_with_feedback(w, feedback, nearest, exact, left, rows)

    def rest(self, codes: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """w - dequantized code, a few rows at a time."""
        for w, rows in self.chunks():
            values = self.values(rows).expand(len(w), -1, -1)
            found = codes[rows].long()
            found = self.grouped(found, 0) if values.shape[1] != 1 else found.unsqueeze(1)
            yield w - self.ungrouped(values.gather(-1, found)), rows


def _nonzero(scales: Tensor) -> Tensor:
    return scales.masked_fill(scales == 0, 1)


def _stored(tables: Tensor, dtype: torch.dtype) -> Tensor:
    """The tables in ``dtype``, or in float32 where float16 would overflow or blur a whole table."""
    limits = torch.finfo(dtype)
    if dtype == torch.float16:
        largest = tables.abs().amax(-1)
        # Values near 0 may be subnormal; a table whose steps come near their rounding (2**-25) may not.
        blurred = (largest > 0) & (largest < min(limits.tiny, tables.shape[-1] * 2.0**-21))
        if bool((blurred | (largest > limits.max)).any()):
            dtype, limits = torch.float32, torch.finfo(torch.float32)
    return tables.clamp(limits.min, limits.max).to(dtype)
