"""The order of codes that the CPU kernels of ``packed`` linears read: *blocks*, a permutation of the canonical words.

A block holds 16 rows, side by side: the lanes of a vector register are output rows. Four blocks make a panel; the last
one has what is left. ``int32 [N, U, bits, 1]`` with ``U = ceil(K/32)`` *units* of 32 columns, as many words as the
canonical form. For each whole block B (rows 16B .. 16B + 15, B < N // 16), place b = B % 4 in panel P = B // 4 of
C = min(4, N // 16 - 4P) blocks, and each unit u, in the order of memory::

    word ((4*P*U + u*C)*bits + v*C + b)*16 + r   holds codes of row 16B + r;   v = 0 .. bits-1: a *vector* of 16 words

So a panel is one stream, unit after unit, vector after vector, a cache line for each of its blocks. The bits of a code
are dealt to planes of 8, 4, 2 or 1 bits (:data:`~lowbit.core.bitpack.PLANES`), low bits first. A plane of width w is w
consecutive vectors. In the word of its vector i, the bits ``[8*j + w*f, +w)``, for byte j = 0..3 and field f = 0 .. 8/w
- 1, hold the plane's bits of the code at column ``32u + 4*(i*8/w + f) + j``. So a vector, after one shift by w*f and a
mask, has the codes of columns 4q .. 4q+3, q = i*8/w + f, of each row in its four bytes: what one step of an int8 dot
product takes. Codes behind column K are zero. Rows behind the last whole block keep their canonical words in their
canonical place.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from lowbit.backends import layouts, registry
from lowbit.core.bitpack import CODES_PER_BLOCK as UNIT
from lowbit.core.bitpack import PLANES, pack, unpack

ROWS = 16  # of a block
PANEL = 4 * ROWS  # rows
_BYTES = 0x01010101  # one bit in each byte of a word
_CODES_AT_ONCE = 1 << 22


def used_on(device: torch.device) -> bool:
    """Whether the compiled kernels run on ``device``: those of packed linears read blocks, others make them."""
    return device.type == "cpu" and registry.active_backend("cpu") == "cpu"


def block(packed: Tensor, bits: int) -> Tensor:
    """Canonical words ``int32 [N, ceil(K/32)*bits]`` to blocks ``int32 [N, ceil(K/32), bits, 1]``, on their device."""
    n, units = packed.shape[0], packed.shape[1] // bits
    if packed.device.type == "meta":
        return packed.new_empty(n, units, bits, 1)
    if used_on(packed.device):
        blocks: Tensor = torch.ops.lowbit_native.block(packed.contiguous(), bits)
        return blocks
    parts = []
    for rows in _rows_at_once(n // ROWS * ROWS, units):
        vectors = _vectors(unpack(packed[rows], bits, units * UNIT), bits)  # [rows, units, bits]
        for panels in _panels(len(vectors)):
            by_row = vectors[panels].view(-1, min(PANEL, panels.stop - panels.start) // ROWS, ROWS, units, bits)
            parts.append(by_row.permute(0, 3, 4, 1, 2).flatten())
    parts.append(packed[n // ROWS * ROWS :].flatten())
    return torch.cat(parts).view(n, units, bits, 1)


def block_in_place(packed: Tensor, bits: int) -> Tensor:
    """:func:`block` in the memory of ``packed`` itself, where the compiled library can; else as that."""
    if not used_on(packed.device) or not packed.is_contiguous():
        return block(packed, bits)
    torch.ops.lowbit_native.block_(packed, bits)
    return packed.view(packed.shape[0], -1, bits, 1)


def unblock(blocks: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`block`, bit for bit."""
    n, units = blocks.shape[:2]
    if blocks.device.type == "meta":
        return blocks.new_empty(n, units * bits)
    if used_on(blocks.device):
        packed: Tensor = torch.ops.lowbit_native.unblock(blocks.contiguous(), bits)
        return packed
    parts = [pack(codes_of_blocks(blocks[rows], bits), bits) for rows in _rows_at_once(n, units)]
    return torch.cat(parts) if parts else blocks.new_empty(0, units * bits)


def codes_of_blocks(blocks: Tensor, bits: int) -> Tensor:
    """The codes of blocks, ``uint8 [N, ceil(K/32)*32]``."""
    n, units = blocks.shape[:2]
    whole = n // ROWS * ROWS
    parts = [_codes(_by_row(blocks[panels], bits), bits) for panels in _panels(whole)]
    if whole < n or not parts:
        parts.append(unpack(blocks[whole:].reshape(n - whole, units * bits), bits, units * UNIT))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def rows_of_blocks(blocks: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Some rows, in any order, as canonical words ``int32 [len(rows), ceil(K/32)*bits]``."""
    n, units = blocks.shape[:2]
    whole = n // ROWS * ROWS
    words = blocks.new_empty(len(rows), units * bits)
    for panels in _panels(whole):
        inside = (rows >= panels.start) & (rows < panels.stop)
        row = rows[inside] - panels.start
        words[inside] = pack(_codes(_by_row(blocks[panels], bits, row), bits), bits)
    outside = rows >= whole
    words[outside] = blocks[rows[outside]].reshape(-1, units * bits)
    return words


def _panels(whole: int) -> list[slice]:
    """The rows of whole panels, and those of a last one of fewer blocks, out of ``whole`` rows in blocks."""
    full = whole // PANEL * PANEL
    return [slice(start, stop) for start, stop in ((0, full), (full, whole)) if start < stop]


def _by_row(panels: Tensor, bits: int, rows: Tensor | None = None) -> Tensor:
    """Panels of one size ``[rows, units, bits, 1]`` to each row's (or some rows') vectors ``[rows, units, bits]``."""
    n, units = panels.shape[:2]
    count = min(PANEL, n) // ROWS
    words = panels.reshape(-1, units, bits, count, ROWS)
    if rows is None:
        return words.permute(0, 3, 4, 1, 2).reshape(n, units, bits)
    return words[rows // (count * ROWS), :, :, rows // ROWS % count, rows % ROWS]


def _rows_at_once(n: int, units: int) -> list[slice]:
    """Few enough rows for the temporaries, in whole panels."""
    step = max(PANEL, _CODES_AT_ONCE // max(1, units * UNIT) // PANEL * PANEL)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _vectors(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, units*32]`` to each row's words of the vectors ``[rows, units, bits]``."""
    quads = codes.view(torch.int32).view(len(codes), -1, UNIT // 4)
    planes, low = [], 0
    for width in PLANES[bits]:
        fields = quads >> low & ((1 << width) - 1) * _BYTES
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=codes.device)
        planes.append((fields.unflatten(2, (width, 8 // width)) << shifts).sum(3, dtype=torch.int32))
        low += width
    return torch.cat(planes, 2)


def _codes(vectors: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_vectors`."""
    parts, low = [], 0
    for width in PLANES[bits]:
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=vectors.device)
        fields = vectors[:, :, low : low + width, None] >> shifts & ((1 << width) - 1) * _BYTES
        parts.append(fields.flatten(2) << low)
        low += width
    quads = reduce(torch.bitwise_or, parts)
    return quads.contiguous().view(torch.uint8).flatten(1)


BLOCKS = layouts.register(
    layouts.Layout(
        "blocks",
        2,
        row_shape=lambda k, bits: (-(-k // UNIT), bits, 1),
        from_canonical=lambda packed, bits, k: block(packed, bits),
        to_canonical=lambda packed, bits, k: unblock(packed, bits),
        codes=lambda packed, bits, k: codes_of_blocks(packed, bits)[:, :k],
        rows=rows_of_blocks,
        in_place=lambda packed, bits, k: block_in_place(packed, bits),
        rows_together=PANEL,
        values_by_group=True,
    )
)
