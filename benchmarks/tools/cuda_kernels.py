"""The CUDA C++ kernels that ship, one entry each: what the record of compiled kernels must know of them.

A new kernel is a new entry. ``benchmarks/tools/cuda_compiled.py`` then compiles it, and the tests hold it to its gates.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.testing import cuda_codebook, cuda_ptx, cuda_sources

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
WIDTHS = tuple(range(1, 9))
HALVES = ("float16", "bfloat16")
FLOATS = ("float32", *HALVES)
# How weights are loaded, in PTX; the group is a number of words, or of bytes after "0x" or alone
LOAD_ONCE = r"ld\.global\.nc\.L1::no_allocate\S*\.v(?P<words>\d)\.u32"
LOAD_MATRICES = r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<words>\d)\.shared"
COPY_ASYNC = r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (?P<bytes>\d+)"


@dataclass(frozen=True)
class Function:
    """A kernel in C++, and all of its instances.

    Args:
        name: below ``lowbit::cuda``, as in ``packed_decode::kernel``.
        parameters: of the template, in order: name -> the values that are compiled. Values are integers, bools, and
            of a DType its name. Empty where it is no template.
        label: what the record calls an instance: a text with the parameters' names in braces, or a function of them.
        threads: of a block.
        shared: bytes of shared memory of a block that is given most, by the parameters.
        weight_loads: how many bytes the loads of weights have, by the parameters; how such a load is written is
            ``weights``, a pattern of PTX.
        blocks: of a processor, at least.
        compiled: which combinations of the parameters there are.
    """

    name: str
    parameters: Mapping[str, tuple[Any, ...]]
    label: str | Callable[..., str]
    threads: int | Callable[..., int]
    shared: Callable[..., int] = lambda **_: 0
    weight_loads: Callable[..., list[int]] = lambda **_: []
    weights: str = LOAD_ONCE
    blocks: int = 1
    compiled: Callable[..., bool] = lambda **_: True

    def instances(self) -> Iterator[Instance]:
        for values in itertools.product(*self.parameters.values()):
            named = dict(zip(self.parameters, values, strict=True))
            if self.compiled(**named):
                yield Instance(self, named)

    def instance(self, values: tuple[Any, ...]) -> Instance:
        """That of template arguments; a bool counts as the integer that it is, as C++ has it."""
        return Instance(self, dict(zip(self.parameters, values, strict=True)))


@dataclass(frozen=True)
class Instance:
    """One function of the compiled code."""

    function: Function
    values: dict[str, Any]

    @property
    def label(self) -> str:
        label = self.function.label
        return label.format(**self.values) if isinstance(label, str) else label(**self.values)

    @property
    def threads(self) -> int:
        threads = self.function.threads
        return threads if isinstance(threads, int) else threads(**self.values)

    @property
    def shared(self) -> int:
        return self.function.shared(**self.values)

    @property
    def weight_loads(self) -> list[int]:
        return sorted(self.function.weight_loads(**self.values))

    def loads(self, ptx: str) -> list[int]:
        """The bytes of the loads of weights in a text of PTX."""
        found = re.finditer(self.function.weights, ptx)
        sizes = (4 * int(m["words"]) if "words" in m.groupdict() else int(m["bytes"]) for m in found)
        return sorted(set(sizes))


@dataclass(frozen=True)
class Kernel:
    """What one source is compiled to.

    Args:
        name: of the file of its record.
        source: below ``csrc/cuda``. Where it has LOWBIT_BITS, it is compiled once for each of ``widths``.
    """

    name: str
    source: str
    functions: tuple[Function, ...]
    architectures: tuple[str, ...] = ARCHITECTURES
    widths: tuple[int, ...] = WIDTHS

    @property
    def path(self) -> Path:
        return CSRC / "cuda" / self.source

    @property
    def compilations(self) -> tuple[int | None, ...]:
        """The values of LOWBIT_BITS that the source is compiled with; None: it has none."""
        return cuda_sources.widths(CSRC, f"cuda/{self.source}", self.widths)

    def instances(self) -> dict[str, Instance]:
        """By label."""
        return {one.label: one for function in self.functions for one in function.instances()}


# ------------------------------------------------------------------------------------------------------------- packed


def tile_loads(bits: int, **_: Any) -> list[int]:
    """Of a thread's part of a tile: planes of 8, 4 and 2 bits give 16 bytes, a plane of one bit gives 8."""
    return [*([8] if bits % 2 else []), *([16] if bits > 1 else [])]


PACKED_DECODE = Kernel(
    "packed_decode",
    "packed/decode.cu",
    (
        Function(
            "packed_decode::kernel",
            dict(bits=WIDTHS, dtype=FLOATS, m_tiles=(1, 2), cut=(False, True)),
            label=lambda bits, dtype, m_tiles, cut: (
                f"{bits}-bit {dtype} M<={8 * m_tiles}{', groups of any size' if cut else ''}"
            ),
            threads=256,
            # what rows_at_once() of packed/decode.cuh may ask for on a processor of sm_89
            shared=lambda m_tiles, dtype, cut, **_: cuda_ptx.packed_decode_bytes(
                8 * m_tiles, dtype, -1 if cut else 3 if dtype == "float32" else 5, m_tiles == 1 and not cut
            ),
            weight_loads=tile_loads,
            compiled=lambda dtype, m_tiles, cut, **_: m_tiles == 1 or (dtype != "float32" and not cut),
        ),
        Function("decode::add_splits", dict(dtype=FLOATS), label="splits {dtype}", threads=256),
    ),
)

PACKED_DECODE_INT8 = Kernel(
    "packed_decode_int8",
    "packed/decode_int8.cu",
    (
        Function(
            "packed_decode_int8::kernel",
            dict(bits=WIDTHS, m_tiles=(1, 2), cut=(False, True)),
            label=lambda bits, m_tiles, cut: f"{bits}-bit M<={8 * m_tiles}{', groups of any size' if cut else ''}",
            threads=256,
            shared=lambda m_tiles, **_: cuda_ptx.packed_decode_int8_bytes(8 * m_tiles, outliers=True),
            weight_loads=tile_loads,
            compiled=lambda m_tiles, cut, **_: not (m_tiles == 2 and cut),  # 8 rows at a time
        ),
    ),
)

QUANTIZE = Kernel(
    "quantize",
    "quantize.cu",
    (
        Function("int8::quantize_rows", dict(dtype=FLOATS), label="{dtype}", threads=256, shared=lambda **_: 1088),
        Function("int8::add_splits", dict(exact=(0, 1)), label="splits, exact {exact}", threads=256),
    ),
)

PACKED_GATHER = Kernel(
    "packed_gather",
    "packed/gather.cu",
    (
        Function(
            "packed_gather::kernel",
            dict(bits=WIDTHS, dtype=FLOATS),
            label="{bits}-bit {dtype}",
            threads=256,
            weight_loads=tile_loads,
            blocks=4,
        ),
    ),
)

# --------------------------------------------------------------------------------------------------------------- kron

KRON_FUSED = Kernel(
    "kron_fused",
    "kron/fused.cu",
    (
        Function(
            "kron_fused::kernel",
            dict(dtype=HALVES, p_tiles=(8, 16)),
            label=lambda dtype, p_tiles: f"{dtype} operands, NP{'<=64' if p_tiles == 8 else '>64'}",
            threads=256,
            # what a plan may ask for where two blocks, and one, fit on a processor of sm_89
            shared=lambda p_tiles, **_: (49 if p_tiles == 8 else 99) << 10,
        ),
    ),
)

KRON_GATHER = Kernel(
    "kron_gather",
    "kron/gather.cu",
    # shared: where many rows fit, a quarter of what a block of sm_89 may have
    (Function("kron_gather::kernel", dict(dtype=FLOATS), "{dtype}", 256, shared=lambda **_: 99 << 8, blocks=3),),
)

PACKED_BATCH_SM90 = Kernel(
    "packed_batch_sm90",
    "packed/batch_sm90.cu",
    (
        Function(
            "packed_batch_sm90::kernel",
            dict(bits=WIDTHS, dtype=HALVES, x_rows=(64, 128)),
            label="{bits}-bit {dtype} {x_rows} rows of x",
            threads=384,
            shared=lambda bits, x_rows, **_: cuda_ptx.batch_sm90_bytes(bits, x_rows),
            weight_loads=lambda bits, **_: [16] if bits > 1 else [],
            weights=LOAD_MATRICES,
        ),
        Function("batch_sm90::add_splits", dict(dtype=HALVES), label="splits {dtype}", threads=256),
    ),
    architectures=("sm_90a",),
)

PACKED_BATCH = Kernel(
    "packed_batch",
    "packed/batch.cu",
    (
        Function(
            "packed_batch::kernel",
            dict(bits=WIDTHS, dtype=HALVES, m_tiles=(4, 8), cut=(False, True)),
            label=lambda bits, dtype, m_tiles, cut: (
                f"{bits}-bit {dtype} {8 * m_tiles} rows{', groups of any size' if cut else ''}"
            ),
            threads=256,
            shared=lambda bits, m_tiles, **_: cuda_ptx.packed_batch_bytes(bits, m_tiles, stages=2),
            weight_loads=lambda bits, **_: [16, *([8] if bits % 2 else [])],  # and those of x
            weights=COPY_ASYNC,
            compiled=lambda bits, m_tiles, cut, **_: m_tiles == 4 or (not cut and m_tiles == cuda_ptx.most_tiles(bits)),
        ),
        Function("packed_batch::sum_groups", dict(dtype=HALVES), label="sums {dtype}", threads=256),
        Function("batch::add_splits", dict(dtype=HALVES), label="splits {dtype}", threads=256),
    ),
)

PACKED_EXPERTS = Kernel(
    "packed_experts",
    "packed/experts.cu",
    (
        Function(
            "packed_experts::decode_kernel",
            dict(bits=WIDTHS, dtype=FLOATS, cut=(False, True)),
            label=lambda bits, dtype, cut: f"{bits}-bit {dtype} 8 rows{', groups of any size' if cut else ''}",
            threads=256,
            shared=lambda dtype, cut, **_: cuda_ptx.packed_decode_bytes(
                8, dtype, -1 if cut else 3 if dtype == "float32" else 5, not cut
            ),
            weight_loads=tile_loads,
        ),
        Function(
            "packed_experts::batch_kernel",
            dict(bits=WIDTHS, dtype=HALVES, cut=(False, True)),
            label=lambda bits, dtype, cut: f"{bits}-bit {dtype} 32 rows{', groups of any size' if cut else ''}",
            threads=256,
            shared=lambda bits, **_: cuda_ptx.packed_batch_bytes(bits, 4, stages=2),
            weight_loads=lambda bits, **_: [16, *([8] if bits % 2 else [])],  # and those of x
            weights=COPY_ASYNC,
        ),
        Function("packed_batch::sum_groups", dict(dtype=HALVES), label="sums {dtype}", threads=256),
    ),
)

EXPERTS_SORT = Kernel(
    "experts_sort",
    "experts_sort.cu",
    (Function("experts::sort_rows", {}, label="sort", threads=256, shared=lambda **_: 8 * 256),),
)

PACKED_BATCH_INT8 = Kernel(
    "packed_batch_int8",
    "packed/batch_int8.cu",
    (
        Function(
            "packed_batch_int8::kernel",
            dict(bits=WIDTHS, m_tiles=(4, 8), cut=(False, True)),
            label=lambda bits, m_tiles, cut: f"{bits}-bit {8 * m_tiles} rows{', groups of any size' if cut else ''}",
            threads=128,
            shared=lambda bits, m_tiles, **_: cuda_ptx.packed_batch_int8_bytes(bits, m_tiles, stages=2),
            weight_loads=lambda bits, **_: [16, *([8] if bits % 2 else [])],  # and those of x
            weights=COPY_ASYNC,
            compiled=lambda m_tiles, cut, **_: not (m_tiles == 8 and cut),
        ),
        Function("packed_batch_int8::sum_groups", dict(warps=(4,)), label="sums", threads=128, shared=lambda **_: 512),
    ),
)

# ----------------------------------------------------------------------------------------------------------- codebook


def codebook_label(bits: int, dtype: str, look: int, m_tiles: int, any_groups: bool) -> str:
    where = {0: "in registers", 1: "pairs of entries", 2: "entries"}[look]
    return f"{bits}-bit {dtype} {where} M<={8 * m_tiles}{', groups of any size' if any_groups else ''}"


CODEBOOK_DECODE = Kernel(
    "codebook_decode",
    "codebook/decode.cu",
    (
        Function(
            "codebook_decode::kernel",
            dict(bits=WIDTHS, dtype=HALVES, look=(0, 1, 2), m_tiles=(1, 2), any_groups=(False, True)),
            label=codebook_label,
            threads=256,
            shared=lambda bits, look, m_tiles, **_: cuda_codebook.most_bytes(bits, look, m_tiles, warps=1),
            weight_loads=tile_loads,
            compiled=lambda bits, look, m_tiles, any_groups, **_: (
                look in ((0,) if bits < 4 else (0, 1) if bits == 4 else (2,)) and not (m_tiles == 2 and any_groups)
            ),
        ),
        Function("decode::add_splits", dict(dtype=HALVES), label="splits {dtype}", threads=256),
    ),
)

CODEBOOK_DECODE_SIMT = Kernel(
    "codebook_decode_simt",
    "codebook/decode_simt.cu",
    (
        Function(
            "codebook_decode_simt::kernel",
            dict(bits=WIDTHS, dtype=FLOATS),
            label="{bits}-bit {dtype}",
            threads=256,
            shared=lambda bits, dtype, **_: cuda_codebook.simt_bytes(bits, dtype, 8, "tensor"),
            weight_loads=tile_loads,
            compiled=lambda bits, dtype: dtype == "float32" or bits > 4,  # of smaller tables decode has all
        ),
        Function("codebook_decode_simt::add_splits", dict(dtype=FLOATS), label="splits {dtype}", threads=256),
    ),
)

CODEBOOK_LINEAR_INT8 = Kernel(
    "codebook_linear_int8",
    "codebook/linear_int8.cu",
    (
        Function(
            "codebook_linear_int8::kernel",
            dict(bits=WIDTHS, m_tiles=(1, 4), tabled=(False, True)),
            label=lambda bits, m_tiles, tabled: (
                f"{bits}-bit {8 * m_tiles} rows, {'one scale' if tabled else 'scales of groups'}"
            ),
            threads=256,
            shared=lambda bits, m_tiles, **_: cuda_codebook.int8_bytes(bits, m_tiles, in_shared=True),
            weight_loads=tile_loads,
        ),
    ),
)

CODEBOOK_STEPS = Kernel(
    "codebook_steps",
    "codebook/steps.cu",
    (
        Function("codebook_int8::find_steps", {}, "steps", 256, shared=lambda **_: 2048),
        Function("codebook_int8::add_splits", {}, "splits", 256),
    ),
)

CODEBOOK_GATHER = Kernel(
    "codebook_gather",
    "codebook/gather.cu",
    (
        Function(
            "codebook_gather::kernel",
            dict(bits=WIDTHS, dtype=FLOATS),
            label="{bits}-bit {dtype}",
            threads=256,
            weight_loads=tile_loads,
            blocks=4,
        ),
    ),
)

CODEBOOK_BATCH = Kernel(
    "codebook_batch",
    "codebook/batch.cu",
    (
        Function(
            "codebook_batch::kernel",
            dict(bits=WIDTHS, dtype=HALVES, m_tiles=(4, 8), cut=(False, True)),
            label=lambda bits, dtype, m_tiles, cut: (
                f"{bits}-bit {dtype} {8 * m_tiles} rows{', groups of any size' if cut else ''}"
            ),
            threads=256,
            shared=lambda bits, m_tiles, **_: cuda_codebook.batch_bytes(bits, m_tiles, 2, "tensor", copies=0),
            weight_loads=lambda bits, **_: [16, *([8] if bits % 2 else [])],  # and those of x
            weights=COPY_ASYNC,
            compiled=lambda bits, m_tiles, cut, **_: m_tiles == 4 or (not cut and m_tiles == cuda_ptx.most_tiles(bits)),
        ),
        Function("batch::add_splits", dict(dtype=HALVES), label="splits {dtype}", threads=256),
    ),
)

CODEBOOK_BATCH_SM90 = Kernel(
    "codebook_batch_sm90",
    "codebook/batch_sm90.cu",
    (
        Function(
            "codebook_batch_sm90::kernel",
            dict(bits=WIDTHS, dtype=HALVES, x_rows=(64, 128)),
            label="{bits}-bit {dtype} {x_rows} rows of x",
            threads=384,
            shared=lambda bits, x_rows, **_: cuda_codebook.sm90_bytes(bits, x_rows),
            weight_loads=lambda bits, **_: [16] if bits > 1 else [],
            weights=LOAD_MATRICES,
        ),
        Function("batch_sm90::add_splits", dict(dtype=HALVES), label="splits {dtype}", threads=256),
    ),
    architectures=("sm_90a",),
)

CODEBOOK_EXPERTS = Kernel(
    "codebook_experts",
    "codebook/experts.cu",
    (
        Function(
            "codebook_experts::decode_kernel",
            dict(bits=WIDTHS, dtype=HALVES, look=(0, 1, 2), any_groups=(False, True)),
            label=lambda bits, dtype, look, any_groups: codebook_label(bits, dtype, look, 1, any_groups),
            threads=256,
            shared=lambda bits, look, **_: cuda_codebook.most_bytes(bits, look, 1, warps=1),
            weight_loads=tile_loads,
            compiled=lambda bits, look, **_: look in ((0,) if bits < 4 else (0, 1) if bits == 4 else (2,)),
        ),
        Function(
            "codebook_experts::batch_kernel",
            dict(bits=WIDTHS, dtype=HALVES, cut=(False, True)),
            label=lambda bits, dtype, cut: f"{bits}-bit {dtype} 32 rows{', groups of any size' if cut else ''}",
            threads=256,
            shared=lambda bits, **_: cuda_codebook.batch_bytes(bits, 4, 2, "tensor", copies=0),
            weight_loads=lambda bits, **_: [16, *([8] if bits % 2 else [])],  # and those of x
            weights=COPY_ASYNC,
        ),
    ),
)

KERNELS = {
    kernel.name: kernel for kernel in (
        PACKED_DECODE, PACKED_DECODE_INT8, QUANTIZE, PACKED_GATHER, KRON_FUSED, KRON_GATHER, PACKED_BATCH_SM90,
        PACKED_BATCH, PACKED_BATCH_INT8, CODEBOOK_DECODE, CODEBOOK_DECODE_SIMT, CODEBOOK_LINEAR_INT8, CODEBOOK_STEPS,
        CODEBOOK_GATHER, CODEBOOK_BATCH, CODEBOOK_BATCH_SM90, PACKED_EXPERTS, EXPERTS_SORT,
        CODEBOOK_EXPERTS,
    )
}  # fmt: skip
