"""Codes and grids that are improved together, until neither alone makes the error of the layer's output smaller.

    minimise tr(E H E.T),   E = Q - W,   Q[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]

Group after group of columns, with everything else as it is: the scale and the zero of least error (two equations for
each row, as Q is linear in the scale and in scale * zero), then the code of least error, column after column
(coordinate descent: QuantEase, Behdin et al., arXiv 2309.01885). Each step makes the error smaller or leaves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.hessian import DAMPING
from lowbit.packed.grid import GridFit, on_codes

_SWEEPS = 3  # over all groups
_STEPS = 2  # grid, then codes, of a group before the next one
_COLUMNS = 64  # whose codes change before one matrix product brings the gradient of the others up to date
_CHUNK = 1 << 22


def descend(
    fit: GridFit, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Better codes (uint8 ``[N, K]``), scales and zeros (float32, holding values of ``dtype``), starting from these.

    No row gets worse. One scale for the whole weight stays as it is; then only codes change.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return codes, scales, zeros
    h = (hessian / mean).float()
    h.diagonal().add_(DAMPING[0])
    codes, scales, zeros = codes.clone(), scales.clone(), zeros.clone()
    for w, rows in fit.chunks(_CHUNK):
        part = _Rows(fit, w, rows, codes[rows], _of(scales, rows), _of(zeros, rows), h, dtype)
        for _ in range(_SWEEPS):
            part.sweep()
        found = part.result()
        codes[rows] = found[0]
        if not fit.per_tensor:
            scales[rows], zeros[rows] = found[1:]
    return codes, scales, zeros


def _of(values: Tensor, rows: slice) -> Tensor:
    return values if len(values) == 1 else values[rows]


class _Rows:
    """Some rows. All is transposed, so that a column is contiguous: codes, values and weights ``[K, rows]``, scales and
    zeros ``[G, rows]``."""

    def __init__(
        self, fit: GridFit, w: Tensor, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor, h: Tensor,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.fit, self.h, self.dtype = fit, h, dtype
        self.factor = None if fit.factors is None else fit.factors_of(rows).view(-1)
        self.w = w.t().contiguous()
        n = len(w)
        self.codes = codes.t().float().contiguous()
        self.scales = scales.t().expand(-1, n).contiguous()
        self.zeros = zeros.t().expand(-1, n).contiguous()
        self.kept = None if fit.outliers is None else (~fit.outliers[rows]).t().float().contiguous()
        self.groups = [slice(g, min(g + fit.group, fit.k)) for g in range(0, fit.k, fit.group)]
        if len(self.scales) == 1:
            self.groups = [slice(0, fit.k)]
        self.q = torch.empty_like(self.w)
        for g, columns in enumerate(self.groups):
            self.q[columns] = (self.codes[columns] - self.zeros[g]) * self.scales[g]
        if self.kept is not None:
            self.q = torch.where(self.kept > 0, self.q, self.w)  # what is kept apart has no error
        self.start = self.codes.clone(), self.scales.clone(), self.zeros.clone(), self.error()

    def error(self) -> Tensor:
        """``(E H E.T)[n, n]`` of each row."""
        e = self.q - self.w
        return (e * (self.h @ e)).sum(0)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros; those of the beginning in a row that rounding errors made worse."""
        codes, scales, zeros, error = self.start
        better = self.error() < error
        found = [torch.where(better, new, old) for new, old in
                 ((self.codes, codes), (self.scales, scales), (self.zeros, zeros))]  # fmt: skip
        return found[0].t().to(torch.uint8), found[1].t(), found[2].t()

    def sweep(self) -> None:
        gradient = self.h @ (self.q - self.w)  # half of it
        for g, columns in enumerate(self.groups):
            before, local = self.q[columns].clone(), gradient[columns].clone()
            for _ in range(_STEPS):
                if not self.fit.per_tensor:
                    self._fit_grid(g, columns, local)
                self._choose_codes(g, columns, local)
            gradient.addmm_(self.h[:, columns], self.q[columns] - before)

    # ---- the grid of a group, its codes as they are

    def _fit_grid(self, g: int, columns: slice, gradient: Tensor) -> None:
        """With q' = A t: ``(q' - q) H (q' - q) + 2 (q' - q) gradient`` is least where ``A H A t = A (H q - gradient)``.

        ``gradient`` is brought up to date.
        """
        h, q = self.h[columns, columns], self.q[columns]
        codes, scale, zero = self.codes[columns], self.scales[g], self.zeros[g]
        wanted = h @ q - gradient
        best = torch.zeros_like(scale), scale, zero  # how much better, and with what
        kept = None if self.kept is None else self.kept[columns]
        for trial in self._trials(h, codes, kept, scale, zero, wanted):
            moved = self._values(columns, codes, *trial) - q
            change = (moved * (h @ moved)).sum(0) + 2 * (moved * gradient).sum(0)
            lower = change < best[0]
            best = tuple(torch.where(lower, a, b) for a, b in zip((change, *trial), best, strict=True))  # type: ignore[assignment]
        self.scales[g], self.zeros[g] = best[1:]
        after = self._values(columns, codes, *best[1:])
        gradient.addmm_(h, after - q)
        self.q[columns] = after

    def _values(self, columns: slice, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        values = (codes - zero) * scale
        return values if self.kept is None else torch.where(self.kept[columns] > 0, values, self.w[columns])

    def _trials(
        self, h: Tensor, codes: Tensor, kept: Tensor | None, scale: Tensor, zero: Tensor, wanted: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """(scale, zero) as they can be stored, that may be better."""
        spec = self.fit.spec
        if not spec.symmetric and spec.zeros == "float":
            return [self._line(h, codes, kept, scale, zero, wanted)]
        shifts = (0.0,) if spec.symmetric else (-1.0, 0.0, 1.0)
        zeros = [(zero + shift).clamp(0, self.fit.top) if shift else zero for shift in shifts]
        return [(self._through(h, _masked(codes - each, kept), scale, wanted), each) for each in zeros]

    def _through(self, h: Tensor, x: Tensor, scale: Tensor, wanted: Tensor) -> Tensor:
        """The scale of least error for q' = scale * x."""
        return self._stored((x * wanted).sum(0) / (x * (h @ x)).sum(0), scale)

    def _line(
        self, h: Tensor, codes: Tensor, kept: Tensor | None, scale: Tensor, zero: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scale and zero of least error for q' = scale * codes - scale * zero."""
        c, ones = _masked(codes, kept), _masked(torch.ones_like(codes), kept)
        h_c, h_1 = h @ c, h @ ones
        cc, c1, one = (c * h_c).sum(0), (c * h_1).sum(0), (ones * h_1).sum(0)
        of_c, of_1 = (c * wanted).sum(0), (ones * wanted).sum(0)
        found = self._stored((of_c * one - of_1 * c1) / (cc * one - c1 * c1), scale)
        shift = (found * c1 - of_1) / one  # for the scale as it is stored
        to = (shift / found).to(self.dtype).float()
        return found, torch.where(to.isfinite(), to, zero)

    # ---- the codes of a group, its grid as it is

    def _choose_codes(self, g: int, columns: slice, gradient: Tensor) -> None:
        """Column after column the code of least error; ``gradient`` is brought up to date."""
        scale, zero, first = self.scales[g], self.zeros[g], columns.start
        for start in range(first, columns.stop, _COLUMNS):
            block = slice(start, min(start + _COLUMNS, columns.stop))
            local = gradient[start - first : block.stop - first].clone()
            before = self.q[block].clone()
            for k in range(start, block.stop):
                target = self.q[k] - local[k - start] / self.h[k, k]
                code = self.fit.nearest(target, scale, zero)
                value = (code - zero) * scale
                if self.kept is not None:
                    value = torch.where(self.kept[k] > 0, value, self.w[k])
                local.addr_(self.h[block, k], value - self.q[k])
                self.q[k], self.codes[k] = value, code
            gradient.addmm_(self.h[columns, block], self.q[block] - before)

    def _stored(self, scale: Tensor, otherwise: Tensor) -> Tensor:
        """As it can be stored; ``otherwise`` where it would be no positive normal number."""
        limits = torch.finfo(self.dtype if self.factor is None else torch.float32)
        held = scale.to(self.dtype).float() if self.factor is None else on_codes(scale, self.factor)
        if self.factor is not None:  # a code of 0 or less was none
            held = torch.where(scale > 0, held, 0)
        return torch.where((held >= limits.tiny) & (held <= limits.max), held, otherwise)


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * kept
