"""The CUDA C++ kernels as nvcc's PTX, executed on the CPU by :mod:`lowbit.testing.ptx_emulator`."""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lowbit.backends.triton.tiles import tile
from lowbit.testing.cuda_emulated import aligned
from lowbit.testing.cuda_names import DTYPES, symbol
from lowbit.testing.kron_cases import Factor as KronFactor
from lowbit.testing.kron_cases import Weight as KronWeight
from lowbit.testing.packed_cases import Weight
from lowbit.testing.ptx_emulator import Statistics, TensorMap, execute

THREADS, ROWS = 256, 32  # of a block of csrc/cuda/packed/decode.cuh


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None: they can."""
    return None if shutil.which("nvcc") else "no nvcc"


def compiled(csrc: Path, source: str, architecture: str, bits: int) -> str:
    """The PTX of one width of a source below ``csrc/cuda``."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-I{csrc}", f"-arch={architecture}", f"-DLOWBIT_BITS={bits}", "-ptx"]
        subprocess.run([*command, str(csrc / "cuda" / source), "-o", f"{folder}/kernel.ptx"], check=True)
        return Path(folder, "kernel.ptx").read_text()


def number_of(t: Tensor | None) -> int:
    """The DType of C++."""
    return 0 if t is None else DTYPES.index(dtype_name(t))


def dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def cuts_chunks(weight: Weight) -> bool:
    """Whether groups end inside a chunk of 32 columns: the instances whose last parameter is true."""
    f = weight.format
    return f.group_size < f.in_features and f.group_size % 32 != 0


def entries(k: int, group_size: int) -> int:
    """As of packed/decode.cuh."""
    columns = 256 if group_size >= k else group_size
    return next(mask for step, mask in ((256, 0x01), (128, 0x11), (64, 0x55), (1, 0xFF)) if columns % step == 0)


def table_shift(enter: int) -> int:
    """As of packed/decode.cuh."""
    return {0x01: 3, 0x11: 3, 0x55: 4, 0xFF: 5}[enter]


def packed_decode_bytes(m: int, dtype: str, shift: int = 5, residuals: bool = True) -> int:
    """As ``shared_bytes`` of packed/decode.cuh; shift -1: groups of any size, which have no tables."""
    tiles, pitch = 1 if m <= 8 else 2, 2 * 1024 + 64
    row = 3 * pitch + 4 * 1024 if dtype == "float32" else (3 if tiles == 1 else 2) * pitch
    tables = 0 if shift < 0 else (4 if residuals else 2) * (8 * 36 << shift)
    return max(m * row + tables, 4 * 32 * 8 * tiles * 4)


def packed_decode(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with the arguments that decode.cu gives it.

    Where splits > 1, a second kernel adds them.
    """
    f, (m, k) = weight.format, x.shape
    n = f.out_features
    values, columns, rows = weight.outliers
    groups = weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    chunks = f.group_size // 32
    cut = cuts_chunks(weight)
    if (cut or x.dtype == torch.float32) and m > 8:  # as rows_at_once
        found = [packed_decode(ptx, weight, x[i : i + 8].clone(), bias, splits) for i in range(0, m, 8)]
        return torch.cat([y for y, _ in found]), found[0][1]
    factor = 0 if cut or f.group_size >= k else -(-(1 << 31) // chunks)
    enter = entries(k, f.group_size)
    shift = -1 if cut else table_shift(enter)
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    parts = torch.full((splits, m, n), torch.nan)
    arguments = (
        *(0 if t is None else t for t in pointers), aligned(x), y, m, n, k, groups, f.group_size, factor, shift, enter,
        row, 1, row, 1, *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, k * x.element_size() % 16 == 0,
        parts if splits > 1 else 0, splits,
    )  # fmt: skip
    name = symbol(ptx, "packed_decode::kernel", f.bits, dtype_name(x), 1 if m <= 8 else 2, cut)
    blocks = splits * -(-n // ROWS)
    residuals = weight.zeros is not None and weight.zeros.dtype != torch.uint8
    shared = packed_decode_bytes(m, dtype_name(x), shift, residuals)
    statistics = execute(ptx, name, (blocks,), THREADS, arguments, shared)
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        adding = symbol(ptx, "decode::add_splits", dtype_name(x))
        execute(ptx, adding, (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


def packed_decode_int8_bytes(m: int, outliers: bool) -> int:
    """As ``shared_bytes`` of packed/decode_int8.h."""
    tiles = 1 if m <= 8 else 2
    sums = 4 * 32 * 8 * tiles * 4
    return max((3 if tiles == 1 else 2) * m * (1024 + 32), sums) + (sums if outliers else 0)


def quantized(ptx: str, x: Tensor, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """q int8 ``[M, columns]``, whole tiles, and inverse ``[M]``, by the kernel of quantize.cuh."""
    m, k = x.shape
    columns = -(-k // 256) * 256
    q, inverse = torch.full((m, columns), -128, dtype=torch.int8), torch.full((m,), torch.nan)
    q = aligned(q)
    given = (x, 0 if x_scale is None else x_scale, q, inverse, k, columns)
    execute(ptx, symbol(ptx, "int8::quantize_rows", dtype_name(x)), (m,), THREADS, given, 4 * (THREADS + 16))
    return q, inverse


def add_int8_splits(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None, y: Tensor, inverse: Tensor, parts: Tensor,
    outlier_parts: Tensor, exact: bool, scale_row: int,
) -> None:  # fmt: skip
    """``y`` of its parts ``[splits, M, N]``, by the kernel of quantize.cuh, where there are several."""
    splits, m, n = parts.shape
    if splits == 1:
        return
    given = (
        parts, 0 if weight.outliers[0] is None else outlier_parts, inverse, weight.scales,
        0 if bias is None else bias, y, m * n, n, splits, scale_row, number_of(weight.scales), number_of(bias),
        number_of(x),
    )  # fmt: skip
    execute(ptx, symbol(ptx, "int8::add_splits", int(exact)), (-(-m * n // THREADS),), THREADS, given)


def packed_decode_int8(
    ptx: str, quantize: str, weight: Weight, x: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None,
    splits: int = 1,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y = x @ W.T + bias`` with int8 activations by the instance of a PTX text that takes it, with the arguments that
    decode_int8.cu gives it; ``quantize`` is the PTX of the kernels before and after it."""
    f, (m, k) = weight.format, x.shape
    n = f.out_features
    values, columns, rows = weight.outliers
    groups = weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    cut = cuts_chunks(weight)
    factor = 0 if cut or f.group_size >= k else -(-(1 << 31) // (f.group_size // 32))
    exact = groups == 1 and (weight.zeros is None or weight.zeros.dtype == torch.uint8)
    q, inverse = quantized(quantize, x, x_scale)
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    parts, outlier_parts = torch.full((splits, m, n), -1, dtype=torch.int32), torch.full((splits, m, n), torch.nan)
    arguments = (
        *(0 if t is None else t for t in pointers), q, inverse, x, y, m, n, k, q.shape[1], f.group_size, factor, row, 1,
        row, 1, *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, number_of(x), exact, parts, outlier_parts, splits,
    )  # fmt: skip
    name = symbol(ptx, "packed_decode_int8::kernel", f.bits, 1 if m <= 8 else 2, cut)
    shared = packed_decode_int8_bytes(m, values is not None)
    statistics = execute(ptx, name, (splits * -(-n // ROWS),), THREADS, arguments, shared)
    add_int8_splits(quantize, weight, x, bias, y, inverse, parts, outlier_parts, exact, row)
    return y, statistics


def divisor(number: int) -> tuple[int, int]:
    """As ``divisor_of`` of csrc/cuda/division.h."""
    shift = (number - 1).bit_length()
    return -(-(1 << 31 + shift) // number), shift


def packed_gather(ptx: str, weight: Weight, ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Statistics]:
    """``W[ids]``, or W where ids is None, by the instance of a PTX text, with the arguments that gather.cu gives it."""
    f, (values, columns, rows) = weight.format, weight.outliers
    n, k, groups = f.out_features, f.in_features, weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    count, tiles = n if ids is None else len(ids), -(-k // 256)
    out = aligned(torch.full((count, k), torch.nan, dtype=dtype))
    pointers = (weight.scales, weight.zeros, values, columns, rows, ids)
    arguments = (
        aligned(tile(weight.packed, f.bits, k)), *(0 if t is None else t for t in pointers), out, count, n, k,
        f.group_size, *divisor(f.group_size), *divisor(tiles), row, 1, row, 1,
        *(number_of(t) for t in (weight.scales, weight.zeros, values)),
        columns is not None and columns.dtype == torch.int32, ids is not None and ids.dtype == torch.int64,
        k * dtype.itemsize % 16 == 0,
    )  # fmt: skip
    name = symbol(ptx, "packed_gather::kernel", f.bits, dtype_name(out))
    units = 32 if dtype == torch.float32 else 64
    return out, execute(ptx, name, (-(-count * tiles // units),), THREADS, arguments)


def planes_of(dtype: torch.dtype | None) -> int:
    """Of csrc/cuda/kron/fused.cu; None: packed."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 3) if dtype else 3


def stored(f: KronFactor) -> tuple[int, ...]:
    """The numbers of ``Stored`` of csrc/cuda/kron/stored.h."""
    bits, group_size = f.numbers
    per_tensor = f.scales is not None and f.scales.shape[0] < f.values.shape[0] * f.values.shape[1]
    groups = 0 if f.scales is None or per_tensor else f.scales.shape[1]
    words = f.tensor.shape[1] if bits else 0
    dtype = 0 if bits else number_of(f.tensor)
    return (dtype, bits, words, groups, group_size, number_of(f.scales), number_of(f.zeros))


def kron_fused(
    ptx: str, weight: KronWeight, x: Tensor, bias: Tensor | None, *, a_first: bool = False, rows: int = 2,
    stages: int = 2, blocks: int = 1,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y = x @ W.T + bias`` by the instance of a PTX text, with arguments as fused.cu makes them of a plan."""
    q, p = (weight.a, weight.b) if a_first else (weight.b, weight.a)
    (terms, q_n, q_k), (_, p_n, p_k) = q.values.shape, p.values.shape
    n1, (_, n2, k2) = weight.a.values.shape[1], weight.b.values.shape
    q_dtype, p_dtype = (None if f.kind.bits else f.tensor.dtype for f in (q, p))
    direct = x.dtype == q_dtype == torch.float16
    planes = (1 if direct else planes_of(q_dtype), planes_of(p_dtype), 1 if direct else planes_of(x.dtype))

    def pitch(k: int) -> int:
        padded = -(-k // 32) * 64
        return padded + (0 if padded % 128 else 64)

    q_plane, p_plane = -(-q_n // 16) * 16 * pitch(q_k), -(-p_n // 8) * 8 * pitch(p_k)
    x_plane = -(-p_k // 32) * 32 * pitch(q_k)
    y_pitch = 4 * ((n2 + 11) // 16 * 16 + 4)
    p_begin = terms * planes[0] * q_plane
    x_begin = p_begin + terms * planes[1] * p_plane
    y_begin = x_begin + stages * rows * planes[2] * x_plane
    total = y_begin + rows * n1 * y_pitch

    def copied(f: KronFactor, dtype: torch.dtype) -> bool:
        return f.kind.bits == 0 and f.tensor.dtype == dtype and f.values.shape[2] % 8 == 0

    tensors = [aligned(q.tensor), q.scales, q.zeros, aligned(p.tensor), p.scales, p.zeros]
    y = aligned(torch.full((len(x), weight.n), torch.nan, dtype=x.dtype))
    pointers = (bias, weight.input_permutation, weight.output_permutation, *tensors)
    copy_x = planes[2] == 1 and not a_first and weight.input_permutation is None and k2 % 8 == 0
    operands = torch.float16 if direct else torch.bfloat16
    arguments = (
        aligned(x), y, *(0 if t is None else t for t in pointers), len(x), terms, q_n, q_k, p_n, p_k, a_first,
        number_of(x), number_of(bias), *stored(q), *stored(p), *planes, rows, stages, blocks, copied(q, operands),
        copied(p, torch.bfloat16), copy_x, weight.output_permutation is None and n2 * x.element_size() % 16 == 0,
        *divisor(k2),
        *divisor(n2), p_begin, x_begin, y_begin, pitch(q_k), pitch(p_k), y_pitch, q_plane, p_plane, x_plane,
        n1 * y_pitch,
    )  # fmt: skip
    name = symbol(ptx, "kron_fused::kernel", str(operands).removeprefix("torch."), 8 if p_n <= 64 else 16)
    return y, execute(ptx, name, (blocks,), THREADS, arguments, total)


def kron_gather(
    ptx: str, weight: KronWeight, ids: Tensor | None, dtype: torch.dtype, rows: int = 2
) -> tuple[Tensor, Statistics]:
    """``W[ids]``, or W where ids is None, by the instance of a PTX text, with arguments as gather.cu makes them."""
    (terms, n1, k1), (_, n2, k2) = weight.a.values.shape, weight.b.values.shape
    count, lanes = weight.n if ids is None else len(ids), 16 // dtype.itemsize
    out = aligned(torch.full((count, weight.k), torch.nan, dtype=dtype))
    a, b = weight.a, weight.b
    pointers = (
        a.tensor, a.scales, a.zeros, b.tensor, b.scales, b.zeros, ids, weight.input_permutation,
        weight.output_permutation,
    )  # fmt: skip
    arguments = (
        *(0 if t is None else t for t in pointers), out, count, terms, n1, k1, n2, k2, *stored(a), *stored(b),
        ids is not None and ids.dtype == torch.int64, rows, weight.k % lanes == 0,
        weight.input_permutation is None and k2 % lanes == 0, *divisor(k2), *divisor(max(1, weight.k // lanes)),
    )  # fmt: skip
    name = symbol(ptx, "kron_gather::kernel", dtype_name(out))
    total = rows * terms * (-(-k1 // 4) * 4 + -(-k2 // 4) * 4) * 4
    return out, execute(ptx, name, (-(-count // rows),), THREADS, arguments, total)


SM90_ROWS, SM90_THREADS = 128, 384  # of a block of csrc/cuda/batch_sm90.cuh


def batch_sm90_bytes(bits: int, x_rows: int, reserved: int = 0) -> int:
    """As ``SHARED_BYTES`` of batch_sm90.cuh."""
    stage = 512 * x_rows + 32 * bits * SM90_ROWS
    return 1023 + min(4, (225 * 1024 - reserved) // stage) * (stage + 16) + reserved


def sm90_maps(codes: Tensor, x: Tensor, bits: int, x_rows: int) -> tuple[TensorMap, TensorMap, TensorMap]:
    """Of the parts and octets of codes in tiles, and of x, as ``make_maps`` of batch_sm90.cuh."""
    octets_map = TensorMap(codes, (SM90_ROWS, 32))
    parts_map = TensorMap(codes, (SM90_ROWS, 64), 64) if bits > 1 else octets_map
    return parts_map, octets_map, TensorMap(x, (x_rows, 64), 128)


def packed_batch_sm90(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1, *, blocks: int = 1,
    by_group: bool = False, newest_first: bool = False,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with the arguments of batch_sm90.cu.

    Args:
        blocks: of the persistent grid.
        by_group: scales and zeros lie group after group.
        newest_first: see :func:`~lowbit.testing.ptx_emulator.execute`.
    """
    f, (m, k) = weight.format, x.shape
    n, bits, groups = f.out_features, f.bits, weight.scales.shape[1]
    values, columns, rows = weight.outliers
    x_rows = 64 if m <= 64 else 128
    codes, x = aligned(tile(weight.packed, bits, k)).view(n, -1).view(torch.uint8), aligned(x)
    scales, zeros = weight.scales, weight.zeros
    if by_group:
        scales, zeros = scales.t().contiguous(), None if zeros is None else zeros.t().contiguous()
    row, group = (1, n) if by_group else (groups, 1)
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else row
    factor = 0 if f.group_size >= k else -(-(1 << 31) // (f.group_size // 32))
    y, parts = torch.full((m, n), torch.nan, dtype=x.dtype), torch.full((splits, m, n), torch.nan)
    arguments = (
        *sm90_maps(codes, x, bits, x_rows),
        *(0 if t is None else t for t in (scales, zeros, bias, values, columns, rows)),
        x, y, m, n, k, factor, row, group, row, group, *(number_of(t) for t in (scales, zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, parts if splits > 1 else 0, splits,
    )  # fmt: skip
    works = splits * -(-n // SM90_ROWS) * -(-m // x_rows)
    name = symbol(ptx, "packed_batch_sm90::kernel", bits, dtype_name(x), x_rows)
    shared = batch_sm90_bytes(bits, x_rows)
    statistics = execute(
        ptx, name, (min(works, blocks),), SM90_THREADS, arguments, shared, newest_first=newest_first
    )  # fmt: skip
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        adding = symbol(ptx, "batch_sm90::add_splits", dtype_name(x))
        execute(ptx, adding, (-(-m * n // 256),), 256, given)
    return y, statistics


# --- packed/batch.cuh ---

BATCH_ROWS = 256  # of W, of a block


def most_tiles(bits: int) -> int:
    """As ``MOST_TILES`` of batch.h."""
    return 4 if bits == 7 else 8


def packed_batch_bytes(bits: int, m_tiles: int, stages: int) -> int:
    """As ``Shared`` of batch.h."""
    pairs, octets = bits in (2, 3, 6, 7), bits % 2
    wide = 2 if bits == 8 else int(bits >= 4)
    tile_bytes = (16 * pairs + 8 * octets) * 4 * THREADS
    stage = 8 * m_tiles * 256 + wide * 4 * THREADS * 16
    return max(2 * BATCH_ROWS * 4 + 2 * tile_bytes + stages * stage, 8 * m_tiles * (BATCH_ROWS + 4) * 4)


def packed_batch_int8_bytes(bits: int, m_tiles: int, stages: int) -> int:
    """As ``shared_bytes`` of packed/batch_int8.h."""
    return max(stages * (8 * m_tiles * 256 + 128 * 32 * bits), 8 * m_tiles * (128 + 4) * 4)


def packed_batch_int8(
    ptx: str, quantize: str, weight: Weight, x: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None,
    splits: int = 1, stages: int = 3,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y = x @ W.T + bias`` with int8 activations by the instance of a PTX text that takes it, with the arguments that
    batch_int8.cu gives it; ``quantize`` is the PTX of the kernels before and after it."""
    f, (m, k) = weight.format, x.shape
    n, threads, block_rows = f.out_features, 128, 128
    values, columns, rows = weight.outliers
    groups = weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    cut = cuts_chunks(weight)
    m_tiles = 4 if cut or m <= 32 else 8
    exact = groups == 1 and (weight.zeros is None or weight.zeros.dtype == torch.uint8)
    q, inverse = quantized(quantize, x, x_scale)
    padded = -(-m // 64) * 64
    x_sums = torch.full((groups, padded), -1, dtype=torch.int32)
    summing = symbol(ptx, "packed_batch_int8::sum_groups", 4)
    given: tuple[object, ...] = (q, x_sums, m, k, q.shape[1], f.group_size, padded)
    execute(ptx, summing, (x_sums.numel() // 4,), threads, given, threads * 4)
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    unit = 1 if exact else f.group_size // math.gcd(f.group_size, 256) if groups > 1 else -(-k // 256)
    splits = min(splits, -(-k // (256 * unit)))
    parts, outlier_parts = torch.full((splits, m, n), -1, dtype=torch.int32), torch.full((splits, m, n), torch.nan)
    arguments = (
        *(0 if t is None else t for t in pointers), q, inverse, x_sums, x, y, m, n, k, q.shape[1], f.group_size, row, 1,
        row, 1, padded, *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, number_of(x), exact, parts, outlier_parts, splits, unit,
        stages,
    )  # fmt: skip
    name = symbol(ptx, "packed_batch_int8::kernel", f.bits, m_tiles, cut)
    blocks = splits * -(-n // block_rows) * -(-m // (8 * m_tiles))
    shared = packed_batch_int8_bytes(f.bits, m_tiles, stages)
    statistics = execute(ptx, name, (blocks,), threads, arguments, shared)
    add_int8_splits(quantize, weight, x, bias, y, inverse, parts, outlier_parts, exact, row)
    return y, statistics


def packed_batch(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1, stages: int = 3
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with the arguments that batch.cu gives it."""
    f, (m, k) = weight.format, x.shape
    n = f.out_features
    values, columns, rows = weight.outliers
    groups = weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    cut = cuts_chunks(weight)
    m_tiles = 4 if cut or m <= 32 else most_tiles(f.bits)
    x, y = aligned(x), torch.full((m, n), torch.nan, dtype=x.dtype)
    parts = torch.full((splits, m, n), torch.nan)
    x_sums = None
    if weight.zeros is not None and weight.zeros.dtype != torch.uint8:
        x_sums = torch.full((-(-k // f.group_size), -(-m // 64) * 64), torch.nan)
        summing = symbol(ptx, "packed_batch::sum_groups", dtype_name(x))
        given: tuple[object, ...] = (x, x_sums, m, k, f.group_size)
        execute(ptx, summing, (x_sums.numel() // 8,), THREADS, given, THREADS * 4)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    arguments = (
        *(0 if t is None else t for t in pointers), x, 0 if x_sums is None else x_sums, y,
        parts if splits > 1 else 0, m, n, k, f.group_size, row, 1, row, 1,
        *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, k % 8 == 0, splits, stages,
    )  # fmt: skip
    name = symbol(ptx, "packed_batch::kernel", f.bits, dtype_name(x), m_tiles, cut)
    blocks = splits * -(-n // BATCH_ROWS) * -(-m // (8 * m_tiles))
    statistics = execute(ptx, name, (blocks,), THREADS, arguments, packed_batch_bytes(f.bits, m_tiles, stages))
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        adding = symbol(ptx, "batch::add_splits", dtype_name(x))
        execute(ptx, adding, (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


# --- packed/experts.cuh ---


def sorted_rows(sort: str, ids: Tensor, tokens: int, num_experts: int, shift: int) -> tuple[Tensor, Tensor]:
    """The tiles ``[count, 4]`` and the order ``[S, 2]``, by the kernel of experts_sort.cuh."""
    s, groups = len(ids), num_experts + 2
    count = min(s, (s >> shift) + groups)
    tiles, order = (aligned(torch.full((rows, of), -1, dtype=torch.int32)) for rows, of in ((count, 4), (s, 2)))
    given = (ids, ids.dtype == torch.int64, s, s // tokens, num_experts, shift, count == s, tiles, order)
    execute(sort, symbol(sort, "experts::sort_rows"), (groups,), THREADS, given, 8 * THREADS)
    return tiles, order


def packed_experts(
    ptx: str, sort: str, weight: Weight, x: Tensor, ids: Tensor, num_experts: int, bias: Tensor | None = None,
    batch: bool = False, stages: int = 3,
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """``y[i] = x[i // r] @ W[ids[i]].T + bias[ids[i]]`` by the instances of two texts of PTX, with the arguments that
    packed/experts.cu gives them; ``sort`` is that of experts_sort.cu.

    Args:
        batch: by the kernel for many rows of an expert.
    """
    f, (m, k) = weight.format, x.shape
    n, groups = f.out_features // num_experts, weight.scales.shape[1]
    values, columns, rows = weight.outliers
    row = 0 if weight.scales.shape[0] == 1 and f.out_features > 1 else groups
    cut, x = cuts_chunks(weight), aligned(x)
    residuals = weight.zeros is not None and weight.zeros.dtype != torch.uint8
    tiles, order = sorted_rows(sort, ids, m, num_experts, 5 if batch else 3)
    y = torch.full((len(ids), n), torch.nan, dtype=x.dtype)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    first = (tiles, order, len(tiles), *(0 if t is None else t for t in pointers), x)
    last = (
        row, 1, row, 1, *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, k * x.element_size() % 16 == 0,
    )  # fmt: skip
    if batch:
        x_sums: Tensor | None = None
        if residuals:
            x_sums = torch.full((groups, -(-m // 64) * 64), torch.nan)
            summing = symbol(ptx, "packed_batch::sum_groups", dtype_name(x))
            execute(ptx, summing, (x_sums.numel() // 8,), THREADS, (x, x_sums, m, k, f.group_size), THREADS * 4)
        arguments = (*first, 0 if x_sums is None else x_sums, y, m, n, k, f.group_size, *last, stages)
        name = symbol(ptx, "packed_experts::batch_kernel", f.bits, dtype_name(x), cut)
        shared, blocks = packed_batch_bytes(f.bits, 4, stages), -(-n // BATCH_ROWS)
    else:
        enter = entries(k, f.group_size)
        shift = -1 if cut else table_shift(enter)
        factor = 0 if cut or f.group_size >= k else -(-(1 << 31) // (f.group_size // 32))
        arguments = (*first, y, n, k, groups, f.group_size, factor, shift, enter, *last)
        name = symbol(ptx, "packed_experts::decode_kernel", f.bits, dtype_name(x), cut)
        shared, blocks = packed_decode_bytes(8, dtype_name(x), shift, residuals), -(-n // ROWS)
    return y, execute(ptx, name, (len(tiles) * blocks,), THREADS, arguments, shared)
