"""The order of codes that the Triton kernels read: *tiles*, a permutation of the canonical words within each row.

A tile holds 256 consecutive codes of a row in ``8 * bits`` words, the canonical words of those codes rearranged:
``int32 [N, ceil(K/256), 8*bits]``, zero codes filling up the last one. Code ``k`` of a tile sits in *chunk* ``k // 32``
and *lane* ``k % 32``. The bits of a code are dealt to planes of 8, 4, 2 or 1 bits
(:data:`lowbit.core.bitpack.PLANES`), low bits first:

* a plane of w = 8, 4 or 2 bits is ``w/2`` times 32 lanes of 16 bits; lane l of part p holds the chunks
  ``p * 16/w + f`` for f = 0 .. 16/w - 1, at bit ``f * w``;
* a plane of 1 bit is 32 lanes of 8 bits; lane l holds chunk f at bit f.

So 32 neighbouring lanes of one load give, after one shift, the codes of 32 neighbouring columns: what a step of a
matrix product takes, whatever the bit-width, in 16-byte loads, for one row of activations or a thousand.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lowbit.backends import layouts, registry
from lowbit.core.bitpack import PLANES, pack, unpack

TILE = 256  # codes of one tile
LANES = 32
CHUNKS = TILE // LANES
_CODES_AT_ONCE = 1 << 24

_rearranging_announced = False


def tiles_per_row(k: int) -> int:
    """Number of tiles that hold ``k`` codes: ``ceil(k / 256)``."""
    return -(-k // TILE)


def used_on(device: torch.device) -> bool:
    """Whether the kernels that run on ``device`` read tiles."""
    return device.type == "cuda" and registry.active_backend("cuda") in ("triton", "cuda")


def tiles_of(packed: Tensor, layout: int, bits: int, in_features: int, *, quiet: bool = False) -> Tensor:
    """Tiles as they are; others rearranged, which on a GPU costs every call as much again: said once."""
    global _rearranging_announced
    if layout == TILES.number:
        return packed
    if packed.device.type == "cuda" and not quiet and not _rearranging_announced:
        _rearranging_announced = True
        warnings.warn(
            "packed codes that are not in tiles are rearranged at every call on a GPU: call layer.prepare() once "
            "(moving, converting and loading do)", RuntimeWarning, stacklevel=4,
        )  # fmt: skip
    now = layouts.numbered(layout)
    assert now is not None  # the op's check has seen it
    return layouts.change(packed, now, TILES, bits, in_features)


def tile(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Canonical words ``int32 [N, ceil(K/32)*bits]`` to tiles ``int32 [N, ceil(K/256), 8*bits]``, on their device."""
    n, count = packed.shape[0], tiles_per_row(in_features)
    tiles = torch.empty(n, count, CHUNKS * bits, dtype=torch.int32, device=packed.device)
    if packed.device.type == "meta":
        return tiles
    step = max(1, _CODES_AT_ONCE // (count * TILE))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        tiles[rows] = _tile_rows(unpack(packed[rows], bits, in_features), bits, count)
    return tiles


def _tile_rows(codes: Tensor, bits: int, count: int) -> Tensor:
    n, k = codes.shape
    padded = torch.zeros(n, count * TILE, dtype=torch.int32, device=codes.device)
    padded[:, :k] = codes
    chunks = padded.view(n, count, CHUNKS, LANES)
    planes = []
    low = 0
    for width in PLANES[bits]:
        fields = min(16 // width, CHUNKS)
        shifts = torch.arange(fields, device=codes.device, dtype=torch.int32) * width
        values = (chunks >> low & (1 << width) - 1).view(n, count, CHUNKS // fields, fields, LANES)
        lanes = (values << shifts[:, None]).sum(3, dtype=torch.int32).flatten(2)
        plane = _wrapped(lanes, torch.uint8) if width == 1 else _wrapped(lanes, torch.int16).view(torch.uint8)
        planes.append(plane)
        low += width
    return torch.cat(planes, 2).view(torch.int32)


def _wrapped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The low bits of non-negative int32 values, as ``dtype``."""
    if dtype == torch.int16:
        values = (values ^ 0x8000) - 0x8000
    return values.to(dtype)


def untile(tiles: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of :func:`tile`, bit for bit."""
    n, count = tiles.shape[:2]
    if tiles.device.type == "meta":
        return pack(torch.empty(n, in_features, dtype=torch.uint8, device="meta"), bits)
    step = max(1, _CODES_AT_ONCE // (count * TILE))
    parts = [
        pack(tile_codes(tiles[start : start + step], bits)[:, :in_features], bits) for start in range(0, n, step)
    ]
    none = torch.empty(0, in_features, dtype=torch.uint8, device=tiles.device)
    return torch.cat(parts) if parts else pack(none, bits)


def tile_codes(tiles: Tensor, bits: int) -> Tensor:
    """The codes of tiles, ``uint8 [N, ceil(K/256)*256]``."""
    n, count = tiles.shape[:2]
    octets = tiles.contiguous().view(torch.uint8).view(n, count, LANES * bits)
    codes = torch.zeros(n, count, CHUNKS, LANES, dtype=torch.int32, device=tiles.device)
    low = first = 0
    for width in PLANES[bits]:
        fields = min(16 // width, CHUNKS)
        plane = octets[..., first : first + LANES * width]
        lanes = plane.to(torch.int32) if width == 1 else plane.contiguous().view(torch.int16).to(torch.int32)
        shifts = torch.arange(fields, device=tiles.device, dtype=torch.int32) * width
        values = lanes.view(n, count, CHUNKS // fields, 1, LANES) >> shifts[:, None] & (1 << width) - 1
        codes |= values.view(n, count, CHUNKS, LANES) << low
        low, first = low + width, first + LANES * width
    return codes.view(n, count * TILE).to(torch.uint8)


TILES = layouts.register(
    layouts.Layout(
        "tiles",
        1,
        row_shape=lambda k, bits: (tiles_per_row(k), CHUNKS * bits),
        from_canonical=tile,
        to_canonical=untile,
        codes=lambda packed, bits, k: tile_codes(packed, bits)[:, :k],
    )
)
