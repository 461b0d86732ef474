"""Tables, scales and codes that are improved together, on the error of the layer's output.

    minimise tr(E H E.T),   E = Q - W,   Q[n, k] = table[n, g, code[n, k]] (* scale[n, g])

In turns, everything else as it is: the tables of least error, the scales of least error (Q is linear in either), and
the code of least error, column after column (coordinate descent). LNQ of GuidedQuant, Kim et al., arXiv 2505.07004.
Where that ends, rounding with error feedback on the tables found makes another start: it often ends lower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.codebook.kmeans import boundaries
from lowbit.codebook.tables import TableFit
from lowbit.core.hessian import DAMPING

_STARTS = 4  # the one given, then from error feedback on the tables found so far; each row keeps its best
_SWEEPS = 4  # of a start: tables, scales, codes
_STEPS = 4  # of conjugate gradients in a sweep
_COLUMNS = 64  # whose codes change before one matrix product brings the gradient of the others up to date
_CHUNK = 1 << 22


def descend(fit: TableFit, codes: Tensor, hessian: Tensor) -> Tensor:
    """Better codes, uint8 ``[N, K]``, starting from these; the tables and scales of ``fit`` become better too.

    No row gets worse; where one learned table serves all rows, their sum does not. A given table stays as it is.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return codes
    h = (hessian / mean).float()
    h.diagonal().add_(DAMPING[0])
    for start in range(_STARTS):
        codes = _descend(fit, codes, fit.codes_with_feedback(hessian) if start else codes, h)
    return codes


def _descend(fit: TableFit, codes: Tensor, start: Tensor, h: Tensor) -> Tensor:
    """The better one, in each row, of ``codes`` and what ``start`` ends in."""
    found, tables = torch.empty_like(codes), fit.tables.clone()
    scales = None if fit.scales is None else fit.scales.clone()
    whole = [(fit.weight.float(), slice(0, fit.n))]
    for w, rows in whole if fit.spec.shares_over_rows else fit.chunks(_CHUNK):
        part = _Rows(fit, w, rows, codes[rows], start[rows], h)
        for _ in range(_SWEEPS):
            part.sweep()
        found[rows], of_rows, scales_of_rows = part.result()
        if fit.spec.values is None:
            tables[rows] = of_rows
        if scales is not None and scales_of_rows is not None:
            scales[rows] = scales_of_rows
    fit.tables, fit.scales = tables, scales
    return found


class _Rows:
    """Some rows. All is transposed, so that a column is contiguous: codes, values and weights ``[K, rows]``, tables
    ``[G or 1, L, rows or 1]``, scales ``[G, rows]``. Tables ascend, and codes are places in them."""

    def __init__(self, fit: TableFit, w: Tensor, rows: slice, codes: Tensor, start: Tensor, h: Tensor) -> None:
        self.fit, self.h = fit, h
        self.w = w.t().contiguous()
        self.order = fit.order()
        tables = fit.tables_of(rows)
        if self.order is not None:
            tables = tables[..., self.order]
            place = torch.empty_like(self.order)
            place[self.order] = torch.arange(len(place), device=w.device)
            codes, start = place[codes.int()], place[start.int()]
        self.codes = codes.t().long().contiguous()
        self.tables = tables.permute(1, 2, 0).contiguous()
        self.scales = None if fit.scales is None else fit.scales[rows].float().t().contiguous()
        self.exact = None if fit.outliers is None else fit.outliers[rows].t().contiguous()
        g = len(self.tables) if self.scales is None else len(self.scales)
        self.groups = [slice(i * fit.group, min((i + 1) * fit.group, fit.k)) for i in range(g)]
        if g == 1:
            self.groups = [slice(0, fit.k)]
        self.given = self.codes, self.tables, self.scales, self._error(self._dequantize())
        self.codes = start.t().long().contiguous()
        self.q = self._dequantize()

    def result(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``[rows, K]``, tables and scales; those that were given in a row that has nothing better."""
        codes, tables, scales, error = self.given
        better = self._error(self.q) < error
        codes, tables = torch.where(better, self.codes, codes), torch.where(better, self.tables, tables)
        if scales is not None and self.scales is not None:
            scales = torch.where(better, self.scales, scales).t()
        codes = codes if self.order is None else self.order[codes]
        return codes.t().to(torch.uint8), tables.permute(2, 0, 1), scales

    def sweep(self) -> None:
        gradient = self.h @ (self.q - self.w)  # half of it
        if self.fit.spec.values is None:
            gradient = self._refit_tables(gradient)
        if self.scales is not None:
            gradient = self._refit_scales(gradient)
        self._choose_codes(gradient)

    def _error(self, q: Tensor, gradient: Tensor | None = None) -> Tensor:
        """``(E H E.T)[n, n]`` of each row ``[rows]``, or their sum ``[1]`` where one learned table serves all."""
        e = q - self.w
        error = (e * (self.h @ e if gradient is None else gradient)).sum(0)
        return error.sum(0, keepdim=True) if self.fit.spec.shares_over_rows else error

    # ---- what codes stand for

    def _values(self) -> Tensor:
        """``[G, L, rows]``."""
        values = self.tables if self.scales is None else self.tables * self.scales.unsqueeze(1)
        return values.expand(len(self.groups), -1, self.w.shape[1])

    def _look_up(self, values: Tensor) -> Tensor:
        """What the codes say of values ``[G or 1, L, rows or 1]``; 0 for what is kept apart."""
        values, found = values.expand(len(self.groups), -1, self.w.shape[1]), torch.empty_like(self.w)
        for g, columns in enumerate(self.groups):
            torch.gather(values[g], 0, self.codes[columns], out=found[columns])
        return found if self.exact is None else found.masked_fill_(self.exact, 0)

    def _dequantize(self) -> Tensor:
        q = self._look_up(self._values())
        return q if self.exact is None else torch.where(self.exact, self.w, q)  # what is kept apart has no error

    # ---- tables and scales, the codes as they are

    def _refit_tables(self, gradient: Tensor) -> Tensor:
        """The gradient afterwards."""
        scales = None if self.scales is None else self.scales.unsqueeze(1)

        def spread(tables: Tensor) -> Tensor:
            return self._look_up(tables if scales is None else tables * scales)

        def collect(x: Tensor) -> Tensor:
            sums = x.new_zeros(len(self.groups), self.tables.shape[1], x.shape[1])
            x = x if self.exact is None else x.masked_fill(self.exact, 0)
            for g, columns in enumerate(self.groups):
                sums[g].scatter_add_(0, self.codes[columns], x[columns])
            return (sums if scales is None else sums * scales).sum_to_size(self.tables.shape)

        before = self.tables
        found = before + self._change(before, gradient, spread, collect)
        limits = torch.finfo(self.fit.tables.dtype)
        self.tables = found.clamp(limits.min, limits.max).to(self.fit.tables.dtype).float()
        gradient, better = self._if_better(gradient)
        self.tables, order = torch.where(better, self.tables, before).sort(dim=1, stable=True)
        place = order.argsort(dim=1).expand(len(self.groups), -1, self.w.shape[1])
        for g, columns in enumerate(self.groups):
            self.codes[columns] = place[g].gather(0, self.codes[columns])
        return gradient

    def _refit_scales(self, gradient: Tensor) -> Tensor:
        """The gradient afterwards."""
        assert self.scales is not None and self.fit.scales is not None
        unscaled = self._look_up(self.tables)

        def spread(scales: Tensor) -> Tensor:
            return torch.cat([unscaled[columns] * scales[g] for g, columns in enumerate(self.groups)])

        def collect(x: Tensor) -> Tensor:
            x = x * unscaled
            return torch.stack([x[columns].sum(0) for columns in self.groups])

        before = self.scales
        found = (before + self._change(before, gradient, spread, collect)).to(self.fit.scales.dtype)
        limits = torch.finfo(found.dtype)
        self.scales = torch.where((found >= limits.tiny) & (found <= limits.max), found.float(), before)
        gradient, better = self._if_better(gradient)
        self.scales = torch.where(better, self.scales, before)
        return gradient

    def _if_better(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Takes new values of the codes in the rows where they have less error: (the gradient then, which rows)."""
        q = self._dequantize()
        after = self.h @ (q - self.w)
        better = self._error(q, after) < self._error(self.q, gradient)
        self.q = torch.where(better, q, self.q)
        return torch.where(better, after, gradient), better

    def _change(
        self, values: Tensor, gradient: Tensor, spread: Callable[[Tensor], Tensor], collect: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Of least error, for values that Q is linear in: ``spread`` says how, ``collect`` is its transpose.

        Conjugate gradients, in units of the diagonal: each row by itself. Values without weights do not change.
        """
        diagonal = collect(self.h.diagonal().unsqueeze(1) * spread(torch.ones_like(values)))
        units = torch.where(diagonal > 0, 1 / diagonal, 0)
        rest = -collect(gradient)
        change, direction, last = torch.zeros_like(rest), torch.zeros_like(rest), torch.zeros_like(rest)
        for _ in range(min(_STEPS, values.numel() // values.shape[-1])):
            norm = _dot(rest, units * rest)
            direction = units * rest + _ratio(norm, last) * direction
            curved = collect(self.h @ spread(direction))
            step = _ratio(norm, _dot(direction, curved))
            change, rest, last = change + step * direction, rest - step * curved, norm
        return change

    # ---- codes, the tables and scales as they are

    def _choose_codes(self, gradient: Tensor) -> None:
        """Column after column the code of least error. Of ``gradient`` the columns to come are brought up to date."""
        values = self._values().transpose(1, 2).contiguous()  # [G, rows, L]
        limits = boundaries(values)
        for start in range(0, self.fit.k, _COLUMNS):
            block = slice(start, min(start + _COLUMNS, self.fit.k))
            local, before = gradient[block], self.q[block].clone()
            for k in range(start, block.stop):
                g = k // self.fit.group if len(self.groups) > 1 else 0
                target = self.q[k] - local[k - start] / self.h[k, k]
                if self.exact is not None:
                    target = torch.where(self.exact[k], self.w[k], target)
                code = torch.searchsorted(limits[g], target.unsqueeze(1))
                value = values[g].gather(1, code)[:, 0]
                if self.exact is not None:
                    value = torch.where(self.exact[k], self.w[k], value)
                local[k - start + 1 :].addr_(self.h[k, k + 1 : block.stop], value - self.q[k])
                self.q[k], self.codes[k] = value, code[:, 0]
            gradient[block.stop :].addmm_(self.h[block.stop :, block], self.q[block] - before)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row."""
    return (a * b).sum(tuple(range(a.dim() - 1)), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)
