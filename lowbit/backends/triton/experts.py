"""Rows of a stack of experts, for a kernel of one matrix product: sorted by expert, and cut into tiles of rows.

A program of a linear kernel takes BLOCK_M neighbouring rows of x. Of a stack it takes a *tile of rows* instead, up to
BLOCK_M places of the sorted order that have one expert, and that expert's rows of the weight. All else is the linear
kernel's, so that a row's result is, bit for bit, what the linear layer of its expert gives with the same configuration.
No value is looked at on the host, and no shape depends on one: calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends import invariance
from lowbit.backends.triton import tuning
from lowbit.backends.triton.launch import Launch, Target

# What a tile of rows gets: nothing (it has no rows), products, zeros (its expert is elsewhere), NaN (a negative id).
NOTHING, PRODUCTS, ZEROS, NANS = range(4)
# Up to so many rows a kernel sorts by comparing each with each, which is one launch; torch sorts more.
COMPARED_ROWS = 4096


@triton.jit
def rows_of_tile(tile_rows_ptr, order_ptr, number, BLOCK_M: tl.constexpr):
    """Of tile ``number``: (first row of its expert in the stack, rows of y, which of them there are, what they get).

    Rows past the end repeat the last one, as a linear kernel's do.
    """
    tile = tile_rows_ptr + number * 4
    end = tl.load(tile + 2)
    place = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    row = tl.load(order_ptr + tl.maximum(tl.minimum(place, end - 1), 0))
    return tl.load(tile), row, place < end, tl.load(tile + 3)


@triton.jit
def first_tile(tile_rows_ptr, number, BLOCK_M: tl.constexpr):
    """(first row of the expert of tile ``number``, whether that is an expert's first tile), where ``by_place``."""
    tile = tile_rows_ptr + number * 4
    first_row = tl.load(tile)
    inside = number >= BLOCK_M
    same_expert = tl.load(tile - 4 * BLOCK_M, mask=inside, other=0) == first_row
    again = same_expert & (tl.load(tile - 4 * BLOCK_M + 3, mask=inside, other=0) == 1)
    return first_row, (tl.load(tile + 3) == 1) & (again == 0)


@triton.jit
def of_what(sums, what):
    """``sums`` where a tile of rows gets products, else what it gets."""
    return tl.where(what == 1, sums, tl.where(what == 3, float("nan"), 0.0))


@triton.jit
def expert_of_row(ids_ptr, row, EXPERTS: tl.constexpr):
    """(expert, what the row of y gets); expert 0 where there is none."""
    expert = tl.load(ids_ptr + row)
    what = tl.where(expert < 0, 3, tl.where(expert < EXPERTS, 1, 2))
    return tl.where(what == 1, expert, 0).to(tl.int32), what


@triton.jit
def _group(ids_ptr, row, rows, EXPERTS: tl.constexpr):
    """What rows are sorted by: the expert, E where it is elsewhere, E + 1 for a negative id, E + 2 past the end."""
    expert = tl.load(ids_ptr + row, mask=row < rows, other=0)
    group = tl.where(expert < 0, EXPERTS + 1, tl.minimum(expert, EXPERTS)).to(tl.int32)
    return tl.where(row < rows, group, EXPERTS + 2)


@triton.jit(do_not_specialize=["rows"])
def sort_rows_kernel(
    ids_ptr, order_ptr, tile_rows_ptr, rows, n_size,
    EXPERTS: tl.constexpr, BY_PLACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``order`` and, into zeros, ``tile_rows`` of :class:`Rows`; each program finds the places of BLOCK rows.

    The tiles of group g, which begins at place p, are numbered from ``p // BLOCK_M + g`` on: groups do not meet there,
    and none has to know how many tiles another has. Where BY_PLACE a tile has the number of its first place.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = _group(ids_ptr, i, rows, EXPERTS)
    smaller = tl.zeros((BLOCK,), tl.int32)  # rows of smaller groups
    before = tl.zeros((BLOCK,), tl.int32)  # rows of the same group that stand before
    same = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = _group(ids_ptr, j, rows, EXPERTS)
        smaller += tl.sum((other[None, :] < group[:, None]).to(tl.int32), 1)
        equal = other[None, :] == group[:, None]
        before += tl.sum((equal & (j[None, :] < i[:, None])).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
    place = smaller + before
    tl.store(order_ptr + place, i, mask=i < rows)
    number = place if BY_PLACE else smaller // BLOCK_M + group + before // BLOCK_M
    tile = tile_rows_ptr + number * 4
    begins = (i < rows) & (before % BLOCK_M == 0)
    tl.store(tile, tl.minimum(group, EXPERTS - 1) * n_size, mask=begins)
    tl.store(tile + 1, place, mask=begins)
    tl.store(tile + 2, smaller + same, mask=begins)
    tl.store(tile + 3, tl.maximum(group - (EXPERTS - 2), 1), mask=begins)


# ------------------------------------------------------------------------------------------------------- on the host


@dataclass(frozen=True)
class Rows:
    """The rows of y ``[S, N]`` in the order and the tiles in which programs take them.

    Args:
        ids: their experts, ``[S]``, as the op is given them.
        order: the rows sorted by expert, rows of one expert as they stand in y; int32 ``[S]``.
        tiles: of each tile the first row of its expert in the stack, its first place in ``order``, the end of its
            expert's places, and what it gets; int32 ``[tiles, 4]``.
        repeats: r; row i of y is a product with row ``i // r`` of x.
        num_experts: E.
        block_m: the most rows of a tile.
        by_place: whether each tile has the number of its first place, as where there are few rows for many experts.
    """

    ids: Tensor
    order: Tensor
    tiles: Tensor
    repeats: int
    num_experts: int
    block_m: int
    by_place: bool


def sorted_rows(ids: Tensor, tokens: int, n: int, num_experts: int, block_m: int) -> tuple[list[Launch], Rows]:
    """(launches that write them, the rows ``[S]`` of T tokens in tiles of up to ``block_m``); an expert's weight has n
    rows."""
    s, repeats = len(ids), len(ids) // max(tokens, 1)
    if s > COMPARED_ROWS:
        return [], Rows(ids, *_sorted_by_torch(ids, n, num_experts, block_m), repeats, num_experts, block_m, False)
    groups = num_experts + 2  # the experts, those that are elsewhere, and negative ids
    most = min(s, s // block_m + groups)
    order = torch.empty(s, dtype=torch.int32, device=ids.device)
    tiles = torch.zeros(most, 4, dtype=torch.int32, device=ids.device)
    block = 32
    arguments = dict(ids_ptr=ids, order_ptr=order, tile_rows_ptr=tiles, rows=s, n_size=n)
    constants = dict(EXPERTS=num_experts, BY_PLACE=most == s, BLOCK_M=block_m, BLOCK=block, CHUNK=128)
    launch = Launch(sort_rows_kernel, (-(-s // block),), arguments, constants)
    return [launch], Rows(ids, order, tiles, repeats, num_experts, block_m, most == s)


def _sorted_by_torch(ids: Tensor, n: int, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``tiles`` of :class:`Rows`."""
    s, groups = len(ids), num_experts + 2
    group_of_row = torch.where(ids < 0, num_experts + 1, ids.clamp(max=num_experts)).to(torch.int32)
    ranked, order = group_of_row.sort(stable=True)
    starts = torch.searchsorted(ranked, torch.arange(groups + 1, device=ids.device, dtype=torch.int32))
    tiles_of_group = (starts.diff() + block_m - 1) // block_m
    before = F.pad(tiles_of_group.cumsum(0), (1, 0))  # tiles of smaller groups
    number = torch.arange(min(s, s // block_m + groups), device=ids.device)
    group = torch.searchsorted(before[1:], number, right=True)  # ``groups`` for a tile without rows
    table = (
        group.clamp(max=num_experts - 1) * n,
        starts[group] + (number - before[group]) * block_m,
        starts[(group + 1).clamp(max=groups)],
        torch.where(group < groups, (group - (num_experts - 2)).clamp(min=PRODUCTS), NOTHING),
    )
    return order.to(torch.int32), torch.stack(table, 1).to(torch.int32)


def arguments_of(rows: Rows | None) -> dict[str, Tensor | int | None]:
    """A kernel's arguments that say which rows its programs take; those of a linear are None."""
    if rows is None:
        return dict(tile_rows_ptr=None, order_ptr=None, repeats=None)
    return dict(tile_rows_ptr=rows.tiles, order_ptr=rows.order, repeats=rows.repeats)


def choose(
    target: Target, kernel: str, x: torch.dtype, bits: int, s: int, n: int, k: int, num_experts: int
) -> tuning.Config:
    """The configuration for S rows that meet E experts ``[n, k]``, by the rows that an expert has if all have as many.

    Where results must not depend on the batch, all experts count as met.
    """
    met = num_experts if invariance.on_gpu() else max(1, min(s, num_experts))
    return tuning.choose(target, kernel, x, bits, -(-s // met), n, k, met)
