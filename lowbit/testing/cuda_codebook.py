"""The CUDA C++ kernels of family ``codebook`` on the CPU: called on the layer's own tensors, compared with float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.triton.tiles import tile, tiles_per_row
from lowbit.testing import cuda_emulated
from lowbit.testing.codebook_cases import Kind, Weight
from lowbit.testing.cuda_emulated import aligned, array, name
from lowbit.testing.cuda_names import symbol
from lowbit.testing.cuda_ptx import (
    BATCH_ROWS,
    ROWS,
    SM90_ROWS,
    SM90_THREADS,
    THREADS,
    batch_sm90_bytes,
    divisor,
    dtype_name,
    most_tiles,
    number_of,
    quantized,
    sm90_maps,
    sorted_rows,
)
from lowbit.testing.ptx_emulator import Statistics, execute

LOOKS = ("registers", "pairs", "entries")  # codebook_decode::Look
TABLES = ("tensor", "row", "group")  # codebook::Weight::Tables


def tables_of(weight: Weight) -> str:
    """What the tables' shape says, as csrc/common/codebook_arguments.h reads it."""
    rows, groups, _ = weight.codebook.shape
    return "tensor" if (rows, groups) == (1, 1) else "row" if groups == 1 else "group"


def groups_of(weight: Weight) -> tuple[int, int]:
    """(G, group_size), one group where nothing is stored per group."""
    kind = weight.kind
    if weight.scales is None and tables_of(weight) != "group":
        return 1, kind.k
    return kind.groups, kind.group_size


def weight_arguments(weight: Weight) -> dict[str, Any]:
    """The weight's part of the arguments of a call; its tensors must outlive it."""
    kind, (values, columns, rows) = weight.kind, weight.outliers
    groups, group_size = groups_of(weight)
    nested = dict(zip(("scale_codebook", "scale_absmax", "scale_offset"), map(array, weight.nested), strict=True))
    return dict(
        N=kind.n, K=kind.k, G=groups, group_size=group_size, bits=kind.bits,
        row_bytes=tiles_per_row(kind.k) * 32 * kind.bits, codebook=array(weight.codebook),
        codebook_dtype=name(weight.codebook), tables=TABLES.index(tables_of(weight)), scales=array(weight.scales),
        scales_dtype=name(weight.scales), **nested, outlier_values=array(values), outlier_dtype=name(values),
        outlier_columns=array(columns), outlier_rows=array(rows),
        wide=columns is not None and columns.dtype == torch.int32,
    )  # fmt: skip


def experts(
    weight: Weight, x: Tensor, ids: Tensor, num_experts: int, bias: Tensor | None = None, *, order: int = 0,
    of: Any = None, int8: bool = False, batch_invariant: bool = False, shared_bytes: int = 163 << 10,
) -> Tensor:  # fmt: skip
    """``y[i] = x[i // r] @ W[ids[i]].T + bias[ids[i]]`` by ``csrc/cuda/codebook/experts.cuh``.

    As :func:`lowbit.testing.cuda_emulated.packed_experts`.
    """
    s, tiles = len(ids), aligned(tile(weight.packed, weight.kind.bits, weight.kind.k))
    y = torch.full((s, weight.kind.n // num_experts), torch.nan, dtype=x.dtype)
    arguments = weight_arguments(weight) | dict(
        packed=array(tiles), M=len(x), S=s, E=num_experts, ids=array(ids), wide_ids=ids.dtype == torch.int64,
        x=array(x), dtype=name(x), bias=array(bias), bias_dtype=name(bias), int8=int8, batch_invariant=batch_invariant,
        y=array(y), device=(80, 1, shared_bytes), order=order,
    )  # fmt: skip
    result = (of or cuda_emulated.kernels(weight.kind.bits)).codebook_experts(arguments)
    assert result == 0, result
    return y


def linear(
    weight: Weight, x: Tensor, bias: Tensor | None = None, *, order: int = 0, of: Any = None, int8: bool = False,
    x_scale: Tensor | None = None, batch_invariant: bool = False, processors: int = 1, architecture: int = 80,
    shared_bytes: int = 163 << 10,
) -> Tensor:  # fmt: skip
    """``y = x @ W.T + bias`` by ``csrc/cuda/codebook``; as :func:`lowbit.testing.cuda_emulated.packed_linear`."""
    m, tiles = len(x), aligned(tile(weight.packed, weight.kind.bits, weight.kind.k))
    y = torch.full((m, weight.kind.n), torch.nan, dtype=x.dtype)
    arguments = weight_arguments(weight) | dict(
        packed=array(tiles), M=m, x=array(x), dtype=name(x), bias=array(bias), bias_dtype=name(bias), int8=int8,
        x_scale=array(x_scale), batch_invariant=batch_invariant, y=array(y),
        device=(architecture, processors, shared_bytes), order=order,
    )  # fmt: skip
    result = (of or cuda_emulated.kernels(weight.kind.bits)).codebook_linear(arguments)
    assert result == 0, result
    return y


def rows(
    weight: Weight, ids: Tensor | None, dtype: torch.dtype, *, order: int = 0, of: Any = None, misaligned: bool = False
) -> Tensor:
    """``W[ids]``, or W where ids is None; as :func:`lowbit.testing.cuda_emulated.packed_rows`."""
    tiles, k = aligned(tile(weight.packed, weight.kind.bits, weight.kind.k)), weight.kind.k
    count = weight.kind.n if ids is None else len(ids)
    room = aligned(torch.full((count * k + 1,), torch.nan, dtype=dtype))
    out = (room[1:] if misaligned else room[:-1]).view(count, k)
    arguments = weight_arguments(weight) | dict(
        packed=array(tiles), ids=array(ids), wide_ids=ids is not None and ids.dtype == torch.int64, count=count,
        out=array(out), dtype=name(out), device=(80, 1, 163 << 10), order=order,
    )  # fmt: skip
    result = (of or cuda_emulated.kernels(weight.kind.bits)).codebook_rows(arguments)
    assert result == 0, result
    return out


def multiplied(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight that x of ``dtype`` meets: the entries of its tables are rounded to that, scales are not."""
    exact = replace(weight, codebook=weight.codebook.to(dtype).float(), _dense={})
    return exact.dense(outliers=False) + (weight.dense() - weight.dense(outliers=False))


def taken(kind: Kind) -> bool:
    """Whether codebook/decode.cuh takes x in float16 or bfloat16: tables of more than 16 entries serve whole rows.

    codebook/decode_simt.cuh takes the others."""
    return kind.bits <= 4 or kind.tables != "group" or kind.groups == 1


# ----------------------------------------------------------------------------------------------------- compiled as PTX


def instance(weight: Weight, m: int) -> tuple[str, int, bool]:
    """(look, M_TILES, ANY_GROUPS) of the instance that takes a call, by csrc/cuda/codebook/decode.h."""
    bits, tables, (groups, group_size) = weight.kind.bits, tables_of(weight), groups_of(weight)
    look = "entries" if bits > 4 else "pairs" if bits == 4 and tables == "tensor" else "registers"
    any_groups = (group_size < weight.kind.k and group_size % 32 != 0) or (tables == "group" and groups > 1)
    assert m <= (8 if any_groups else 16)
    return look, 1 if m <= 8 else 2, any_groups


def shared_bytes(weight: Weight, m: int) -> int:
    """As ``shared_bytes`` of csrc/cuda/codebook/decode.h."""
    look, m_tiles, _ = instance(weight, m)
    return most_bytes(weight.kind.bits, LOOKS.index(look), m_tiles, m, 1 if tables_of(weight) == "tensor" else 2)


def most_bytes(bits: int, look: int, m_tiles: int, m: int | None = None, warps: int = 2) -> int:
    """With as many rows of x as the instance takes, and tables for every row of W, where these are in shared memory."""
    m = 8 * m_tiles if m is None else m
    tables = {"registers": 0, "pairs": 128 * 256, "entries": warps * (128 << bits)}[LOOKS[look]]
    return tables + max((3 if m_tiles == 1 else 2) * m * (2 * 1024 + 64), 4 * 32 * 8 * m_tiles * 4)


def execute_ptx(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes the call, with decode.cu's arguments.

    Where splits > 1, a second kernel adds them.
    """
    kind, (m, k) = weight.kind, x.shape
    n, (groups, group_size), tables = kind.n, groups_of(weight), tables_of(weight)
    look, m_tiles, any_groups = instance(weight, m)
    name = symbol(ptx, "codebook_decode::kernel", kind.bits, dtype_name(x), LOOKS.index(look), m_tiles, int(any_groups))
    chunks = group_size // 32
    factor = 0 if group_size >= k or group_size % 32 else -(-(1 << 31) // chunks)
    row = {"tensor": 0, "row": 1, "group": groups}[tables] << kind.bits
    values, columns, rows = weight.outliers
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    tensors = (
        aligned(tile(weight.packed, kind.bits, k)), weight.codebook, weight.scales, *weight.nested, bias, values,
        columns, rows,
    )  # fmt: skip
    parts = torch.full((splits, m, n), torch.nan)
    arguments = (
        *(0 if t is None else t for t in tensors), aligned(x), y, m, n, k, group_size, factor, groups, row,
        (1 << kind.bits) if tables == "group" else 0,
        *(number_of(t) for t in (weight.codebook, weight.scales, bias, values)),
        columns is not None and columns.dtype == torch.int32, k % 8 == 0, parts if splits > 1 else 0, splits,
    )  # fmt: skip
    statistics = execute(ptx, name, (splits * -(-n // ROWS),), THREADS, arguments, shared_bytes(weight, m))
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        execute(ptx, symbol(ptx, "decode::add_splits", dtype_name(x)), (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


def execute_rows(ptx: str, weight: Weight, ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Statistics]:
    """``W[ids]``, or W where ids is None, by the instance of a PTX text, with the arguments that gather.cu gives it."""
    kind, (values, columns, pointers) = weight.kind, weight.outliers
    n, k, (groups, group_size), tables = kind.n, kind.k, groups_of(weight), tables_of(weight)
    count, tiles = n if ids is None else len(ids), -(-k // 256)
    out = aligned(torch.full((count, k), torch.nan, dtype=dtype))
    tensors = (weight.codebook, weight.scales, *weight.nested, values, columns, pointers, ids)
    arguments = (
        aligned(tile(weight.packed, kind.bits, k)), *(0 if t is None else t for t in tensors), out, count, n, k,
        group_size, *divisor(group_size), *divisor(tiles), groups,
        {"tensor": 0, "row": 1, "group": groups}[tables] << kind.bits, (1 << kind.bits) if tables == "group" else 0,
        *(number_of(t) for t in (weight.codebook, weight.scales, values)),
        columns is not None and columns.dtype == torch.int32, ids is not None and ids.dtype == torch.int64,
        k * dtype.itemsize % 16 == 0,
    )  # fmt: skip
    symbol_name = symbol(ptx, "codebook_gather::kernel", kind.bits, dtype_name(out))
    units = 32 if dtype == torch.float32 else 64
    return out, execute(ptx, symbol_name, (-(-count * tiles // units),), THREADS, arguments)


# --- codebook/decode_simt.cuh ---


def simt_bytes(bits: int, dtype: str, m: int, tables: str) -> int:
    """As ``shared_bytes`` of codebook/decode_simt.h."""
    wide = dtype == "float32"
    x = (2 if wide else 3) * m * ((4 if wide else 2) * 1024 + 64)
    return (128 << bits if wide and tables == "tensor" else 0) + max(x, 16 * 8 * 32 * 4)


def execute_simt(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with decode_simt.cu's arguments.

    Where splits > 1, a second kernel adds them.
    """
    kind, (m, k) = weight.kind, x.shape
    if m > 8:  # as rows_at_once
        found_of = [execute_simt(ptx, weight, x[i : i + 8].clone(), bias, splits) for i in range(0, m, 8)]
        return torch.cat([y for y, _ in found_of]), found_of[0][1]
    n, (groups, group_size), tables = kind.n, groups_of(weight), tables_of(weight)
    values, columns, rows = weight.outliers
    y, parts = torch.full((m, n), torch.nan, dtype=x.dtype), torch.full((splits, m, n), torch.nan)
    tensors = (
        aligned(tile(weight.packed, kind.bits, k)), weight.codebook, weight.scales, *weight.nested, bias, values,
        columns, rows,
    )  # fmt: skip
    arguments = (
        *(0 if t is None else t for t in tensors), aligned(x), y, m, n, k, group_size, *divisor(group_size), groups,
        {"tensor": 0, "row": 1, "group": groups}[tables] << kind.bits, (1 << kind.bits) if tables == "group" else 0,
        *(number_of(t) for t in (weight.codebook, weight.scales, bias, values)),
        columns is not None and columns.dtype == torch.int32, k * x.element_size() % 16 == 0,
        parts if splits > 1 else 0, splits,
    )  # fmt: skip
    found = symbol(ptx, "codebook_decode_simt::kernel", kind.bits, dtype_name(x))
    shared = simt_bytes(kind.bits, dtype_name(x), m, tables)
    statistics = execute(ptx, found, (splits * -(-n // ROWS),), THREADS, arguments, shared)
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        adding = symbol(ptx, "codebook_decode_simt::add_splits", dtype_name(x))
        execute(ptx, adding, (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


# --- codebook/linear_int8.cuh ---


def int8_bytes(bits: int, m_tiles: int, in_shared: bool) -> int:
    """As ``shared_bytes`` of codebook/linear_int8.h."""
    x_rows = 8 * m_tiles
    x = (3 if m_tiles == 1 else 2) * x_rows * (1024 + 32)
    return (128 << bits if in_shared else 0) + max(x, 2 * 4 * 32 * x_rows * 4)


def execute_int8(
    ptx: str, steps_ptx: str, quantize_ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None,
    x_scale: Tensor | None = None, splits: int = 1,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y = x @ W.T + bias`` with int8 activations by the instance of a PTX text that takes it, with the arguments of
    linear_int8.cu; ``steps_ptx`` and ``quantize_ptx`` are the PTX of the kernels around it."""
    kind, (m, k) = weight.kind, x.shape
    n, (groups, group_size), tables = kind.n, groups_of(weight), tables_of(weight)
    values, columns, rows = weight.outliers
    tabled, m_tiles = groups == 1, 1 if m <= 8 else 4
    row = {"tensor": 0, "row": 1, "group": groups}[tables] << kind.bits
    group = (1 << kind.bits) if tables == "group" else 0
    one_table = tables == "tensor" and (not tabled or weight.scales is None)
    q, inverse = quantized(quantize_ptx, x, x_scale)
    x, steps, y = aligned(x), torch.full((n,), torch.nan), torch.full((m, n), torch.nan, dtype=x.dtype)
    parts = torch.full((splits, 2, m, n), -1, dtype=torch.int32)
    of_weight = tuple(0 if t is None else t for t in (weight.codebook, weight.scales, *weight.nested))
    dtypes = number_of(weight.codebook), number_of(weight.scales)
    found = symbol(steps_ptx, "codebook_int8::find_steps")
    given: tuple[object, ...] = (
        *of_weight, steps, n, (groups if tables == "group" else 1) << kind.bits, groups, row, *dtypes,
    )  # fmt: skip
    execute(steps_ptx, found, (-(-n // 32),), THREADS, given, 8 * THREADS)
    wide = columns is not None and columns.dtype == torch.int32
    sparse = tuple(0 if t is None else t for t in (bias, values, columns, rows))
    after = (number_of(bias), number_of(values), wide, number_of(x))
    arguments = (
        aligned(tile(weight.packed, kind.bits, k)), *of_weight, *sparse, q, inverse, steps, x, y, parts, m, n, k,
        q.shape[1], group_size, *divisor(group_size), groups, row, group, one_table, *dtypes, *after, splits,
    )  # fmt: skip
    found = symbol(ptx, "codebook_linear_int8::kernel", kind.bits, m_tiles, int(tabled))
    blocks = splits * -(-n // ROWS) * -(-m // (8 * m_tiles))
    shared = int8_bytes(kind.bits, m_tiles, tabled or tables != "group")
    statistics = execute(ptx, found, (blocks,), THREADS, arguments, shared)
    if splits > 1:
        given = (parts, inverse, steps, *sparse, x, y, m, n, k, splits, *after)
        execute(steps_ptx, symbol(steps_ptx, "codebook_int8::add_splits"), (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


# --- codebook/batch.cuh ---


def batch_bytes(bits: int, m_tiles: int, stages: int, tables: str, copies: int) -> int:
    """As ``Shared`` of batch.h, with tables after the ring; those of groups are not there."""
    pairs, octets = bits in (2, 3, 6, 7), bits % 2
    wide = 2 if bits == 8 else int(bits >= 4)
    tile_bytes = (16 * pairs + 8 * octets) * 4 * THREADS
    stage = 8 * m_tiles * 256 + wide * 4 * THREADS * 16
    more = {"tensor": 4 << bits + copies, "row": BATCH_ROWS * 2 << bits, "group": 0}[tables]
    return max(2 * tile_bytes + stages * stage + more, 8 * m_tiles * (BATCH_ROWS + 4) * 4)


def execute_batch(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1, stages: int = 3, copies: int = 0
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with the arguments that batch.cu gives it."""
    kind, (m, k) = weight.kind, x.shape
    n, (groups, group_size), tables = kind.n, groups_of(weight), tables_of(weight)
    gathers = tables == "group" and groups > 1
    cut = gathers or (group_size < k and group_size % 32 != 0)
    m_tiles = 4 if cut or m <= 32 else most_tiles(kind.bits)
    values, columns, rows = weight.outliers
    y, parts = torch.full((m, n), torch.nan, dtype=x.dtype), torch.full((splits, m, n), torch.nan)
    tensors = (
        aligned(tile(weight.packed, kind.bits, k)), weight.codebook, weight.scales, *weight.nested, bias, values,
        columns, rows,
    )  # fmt: skip
    arguments = (
        *(0 if t is None else t for t in tensors), aligned(x), y, parts if splits > 1 else 0, m, n, k, group_size,
        groups, {"tensor": 0, "row": 1, "group": groups}[tables] << kind.bits,
        (1 << kind.bits) if tables == "group" else 0,
        *(number_of(t) for t in (weight.codebook, weight.scales, bias, values)),
        columns is not None and columns.dtype == torch.int32, k % 8 == 0, splits, stages, copies, gathers,
    )  # fmt: skip
    found = symbol(ptx, "codebook_batch::kernel", kind.bits, dtype_name(x), m_tiles, int(cut))
    blocks = splits * -(-n // BATCH_ROWS) * -(-m // (8 * m_tiles))
    shared = batch_bytes(kind.bits, m_tiles, stages, tables, copies)
    statistics = execute(ptx, found, (blocks,), THREADS, arguments, shared)
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        execute(ptx, symbol(ptx, "batch::add_splits", dtype_name(x)), (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


def execute_experts(
    ptx: str, sort: str, weight: Weight, x: Tensor, ids: Tensor, num_experts: int, bias: Tensor | None = None,
    batch: bool = False, stages: int = 3, copies: int = 0,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y[i] = x[i // r] @ W[ids[i]].T + bias[ids[i]]`` by the instances of two texts of PTX, with the arguments that
    codebook/experts.cu gives them; as :func:`lowbit.testing.cuda_ptx.packed_experts`."""
    kind, (m, k) = weight.kind, x.shape
    n, (groups, group_size), tables = kind.n // num_experts, groups_of(weight), tables_of(weight)
    row_tiles, order = sorted_rows(sort, ids, m, num_experts, 5 if batch else 3)
    y = torch.full((len(ids), n), torch.nan, dtype=x.dtype)
    values, columns, rows = weight.outliers
    tensors = (
        aligned(tile(weight.packed, kind.bits, k)), weight.codebook, weight.scales, *weight.nested, bias, values,
        columns, rows,
    )  # fmt: skip
    arguments = (
        row_tiles, order, len(row_tiles), *(0 if t is None else t for t in tensors), n, k, group_size, groups,
        {"tensor": 0, "row": 1, "group": groups}[tables] << kind.bits, (1 << kind.bits) if tables == "group" else 0,
        *(number_of(t) for t in (weight.codebook, weight.scales, bias, values)),
        columns is not None and columns.dtype == torch.int32, k % 8 == 0, aligned(x), y,
    )  # fmt: skip
    if batch:
        gathers = tables == "group" and groups > 1
        cut = gathers or (group_size < k and group_size % 32 != 0)
        found = symbol(ptx, "codebook_experts::batch_kernel", kind.bits, dtype_name(x), int(cut))
        shared, blocks = batch_bytes(kind.bits, 4, stages, tables, copies), -(-n // BATCH_ROWS)
        arguments = (*arguments, stages, copies, gathers)
    else:
        look, _, any_groups = instance(weight, 8)
        found = symbol(
            ptx, "codebook_experts::decode_kernel", kind.bits, dtype_name(x), LOOKS.index(look), int(any_groups)
        )
        shared, blocks = shared_bytes(weight, 8), -(-n // ROWS)
        arguments = (*arguments, 0 if group_size >= k or group_size % 32 else -(-(1 << 31) // (group_size // 32)))
    return y, execute(ptx, found, (len(row_tiles) * blocks,), THREADS, arguments, shared)


# --- codebook/batch_sm90.cuh ---


def sm90_bytes(bits: int, x_rows: int) -> int:
    """As ``SHARED_BYTES`` of batch_sm90.cuh with ``TABLE_BYTES`` of codebook/batch_sm90.cuh."""
    return batch_sm90_bytes(bits, x_rows, (128 if (bits, x_rows) == (8, 128) else 256) << bits)


def execute_sm90(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1, *, blocks: int = 1,
    newest_first: bool = False,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with the arguments of batch_sm90.cu.

    Args:
        blocks: of the persistent grid.
        newest_first: see :func:`~lowbit.testing.ptx_emulator.execute`.
    """
    kind, (m, k) = weight.kind, x.shape
    n, bits, (groups, group_size), tables = kind.n, kind.bits, groups_of(weight), tables_of(weight)
    values, columns, rows = weight.outliers
    x_rows = 64 if m <= 64 or (bits == 8 and tables != "tensor") else 128
    codes, x = aligned(tile(weight.packed, bits, k)).view(n, -1).view(torch.uint8), aligned(x)
    factor = 0 if group_size >= k else -(-(1 << 31) // (group_size // 32))
    y, parts = torch.full((m, n), torch.nan, dtype=x.dtype), torch.full((splits, m, n), torch.nan)
    tensors = (weight.codebook, weight.scales, *weight.nested, bias, values, columns, rows)
    arguments = (
        *sm90_maps(codes, x, bits, x_rows), *(0 if t is None else t for t in tensors), x, y, m, n, k, factor, groups,
        0 if tables == "tensor" else 1 << bits, *(number_of(t) for t in (weight.codebook, weight.scales, bias, values)),
        columns is not None and columns.dtype == torch.int32, parts if splits > 1 else 0, splits,
    )  # fmt: skip
    works = splits * -(-n // SM90_ROWS) * -(-m // x_rows)
    found = symbol(ptx, "codebook_batch_sm90::kernel", bits, dtype_name(x), x_rows)
    statistics = execute(
        ptx, found, (min(works, blocks),), SM90_THREADS, arguments, sm90_bytes(bits, x_rows), newest_first=newest_first
    )  # fmt: skip
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        execute(ptx, symbol(ptx, "batch_sm90::add_splits", dtype_name(x)), (-(-m * n // 256),), 256, given)
    return y, statistics
