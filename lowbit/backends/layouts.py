"""The layouts of packed codes, and how to go from one to another: always through canonical words.

| layout | shape, int32 | read by |
|---|---|---|
| canonical words (:mod:`lowbit.core.bitpack`) | ``[N, ceil(K/32)*bits]`` | every backend; what is saved and moved |
| tiles (:mod:`lowbit.backends.triton.tiles`) | ``[N, ceil(K/256), 8*bits]`` | the Triton kernels of every family |
| blocks (:mod:`lowbit.backends.cpu.blocks`) | ``[N, ceil(K/32), bits, 1]`` | the CPU kernels of family ``packed`` |

The number of dimensions tells which one a tensor is in. Each holds the same codes bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.backends.cpu import blocks
from lowbit.backends.triton import tiles
from lowbit.core.bitpack import CODES_PER_BLOCK, unpack, words_per_row


@dataclass(frozen=True)
class Layout:
    """How codes lie in memory.

    Attributes:
        name: for messages.
        row_shape: (K, bits) -> the shape behind the first dimension, N.
        from_canonical, to_canonical: (tensor, bits, K) -> tensor.
        codes: (tensor, bits, K) -> the codes, uint8 ``[N, K]``.
        rows: (tensor, rows, bits) -> some rows, in a layout whose rows are independent.
    """

    name: str
    row_shape: Callable[[int, int], tuple[int, ...]]
    from_canonical: Callable[[Tensor, int, int], Tensor]
    to_canonical: Callable[[Tensor, int, int], Tensor]
    codes: Callable[[Tensor, int, int], Tensor]
    rows: Callable[[Tensor, Tensor, int], Tensor] = lambda packed, rows, bits: packed[rows]


CANONICAL = Layout(
    "canonical words",
    row_shape=lambda k, bits: (words_per_row(k, bits),),
    from_canonical=lambda packed, bits, k: packed,
    to_canonical=lambda packed, bits, k: packed,
    codes=unpack,
)
TILES = Layout(
    "tiles",
    row_shape=lambda k, bits: (tiles.tiles_per_row(k), tiles.CHUNKS * bits),
    from_canonical=tiles.tile,
    to_canonical=tiles.untile,
    codes=lambda packed, bits, k: tiles.tile_codes(packed, bits)[:, :k],
)
BLOCKS = Layout(
    "blocks",
    row_shape=lambda k, bits: (-(-k // CODES_PER_BLOCK), bits, 1),
    from_canonical=lambda packed, bits, k: blocks.block(packed, bits),
    to_canonical=lambda packed, bits, k: blocks.unblock(packed, bits),
    codes=lambda packed, bits, k: blocks.codes_of_blocks(packed, bits)[:, :k],
    rows=blocks.rows_of_blocks,
)
_BY_DIMENSIONS = {2: CANONICAL, 3: TILES, 4: BLOCKS}
ROWS_TOGETHER = blocks.PANEL  # slices of rows that begin at a multiple of this keep every layout whole


def layout_of(packed: Tensor) -> Layout | None:
    """The layout that a tensor of packed codes is in; ``None`` for a number of dimensions that none has."""
    return _BY_DIMENSIONS.get(packed.dim())


def change(packed: Tensor, to: Layout, bits: int, in_features: int, owned: bool = False) -> Tensor:
    """The same codes in the layout ``to``, on their device; ``owned``: ``packed`` is not needed any more."""
    now = _BY_DIMENSIONS[packed.dim()]
    if now is to:
        return packed
    if owned and now is CANONICAL and to is BLOCKS:
        return blocks.block_in_place(packed, bits)
    return to.from_canonical(now.to_canonical(packed, bits, in_features), bits, in_features)


def ask_for_huge_pages(packed: Tensor) -> None:
    """Fewer, larger pages under canonical words that the compiled CPU kernels read; making blocks asks for them itself.

    Advice to the operating system about memory that stays where it is.
    """
    if layout_of(packed) is CANONICAL and blocks.used_on(packed.device) and packed.is_contiguous():
        torch.ops.lowbit_native.huge_pages(packed)


def read_on(device: torch.device, on_cpu: tuple[Layout, ...]) -> tuple[Layout, ...]:
    """The layouts to hold codes in on ``device``, the best one first.

    ``on_cpu``: those of the layer's compiled CPU kernels, where these run.
    """
    if tiles.used_on(device):
        return (TILES,)
    return on_cpu if blocks.used_on(device) else (CANONICAL,)


def by_group(values: Tensor) -> Tensor:
    """Scales or zeros ``[N, G]``, the same tensor with group after group in memory.

    Kernels whose lanes are output rows then read them as they stand.
    """
    return values.t().contiguous().t()
