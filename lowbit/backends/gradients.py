"""Gradients of a weight's tensors without D ``[N, K]``, the gradient of the whole weight: sums by code or by entry, out
of ranges of rows of D, and products at the places of outliers.

What is here is an end in itself: it has no derivatives and no batches. Where these may be asked for, and where a graph
is made, the formulas of the families serve, which are differentiable and hold D as a whole: :func:`is_final` tells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowbit.backends import registry
from lowbit.backends.reference import csr_row_indices
from lowbit.core.outliers import column_indices

_PRODUCTS_AT_ONCE = 1 << 22  # of dY and x at the places of outliers: 16 MiB in float32


def is_final(*tensors: Tensor | None) -> bool:
    """Whether nobody differentiates, transforms or traces what is made of these tensors."""
    if torch.compiler.is_compiling():  # nothing of what follows can be in its graph
        return False
    return not torch.is_grad_enabled() and forward_ad._current_level < 0 and is_plain(*tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors with values of their own: none is in a batch, a trace or a subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    given = [t for t in tensors if t is not None]
    # others are dispatched otherwise than any other on their device
    plain = torch._C._dispatch_keys(torch.empty(0, device=given[0].device)).raw_repr()
    return all(torch._C._dispatch_keys(t).raw_repr() == plain for t in given)


def compiled(op: str, t: Tensor) -> Callable[..., Tensor] | None:
    """The compiled kernel ``op`` for ``t``, where one runs; a library of an earlier version has none."""
    if not t.is_cpu or registry.active_backend("cpu") != "cpu":
        return None
    return getattr(torch.ops.lowbit_native, op, None)


def sampled_products(dy: Tensor, x: Tensor, values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """``D = dY.T @ x`` at the places of a CSR matrix, summed in float32, in the dtype of ``values``."""
    kernel = compiled("sampled_products", x)
    if kernel is not None:
        return kernel(dy, x, values, columns, rows).to(values.dtype)
    row, column = csr_row_indices(rows, len(values)), column_indices(columns)
    step = max(1, _PRODUCTS_AT_ONCE // max(1, len(x)))
    parts = [
        (dy.index_select(1, row[i : i + step]).float() * x.index_select(1, column[i : i + step]).float()).sum(0)
        for i in range(0, len(values), step)
    ]
    return torch.cat(parts).to(values.dtype) if parts else torch.zeros_like(values)


def sum_per_group(t: Tensor, group_size: int) -> Tensor:
    """``t [N, K]`` summed over groups of columns, the last of which may be shorter: ``[N, G]``."""
    whole = t.shape[1] // group_size * group_size
    sums = [t[:, :whole].unflatten(1, (-1, group_size)).sum(2)] if whole else []
    sums += [t[:, whole:].sum(1, keepdim=True)] if whole < t.shape[1] else []
    return sums[0] if len(sums) == 1 else torch.cat(sums, 1)


class RowSums:
    """Sums that ranges of rows contribute to: each has its own rows of a result ``[N, ...]``; one of length 1, which
    all rows share, is added up."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, found: dict[str, Tensor]) -> None:
        for name, part in found.items():
            self._parts.setdefault(name, []).append(part)

    def whole(self, shared: Callable[[str], bool]) -> dict[str, Tensor]:
        return {
            name: torch.stack(parts).sum(0) if shared(name) else torch.cat(parts) for name, parts in self._parts.items()
        }
