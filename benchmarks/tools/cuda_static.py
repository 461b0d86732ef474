"""Predictions, not measurements, for CUDA C++ kernels: what their machine code issues, and how long an H200 would take.

    python -m benchmarks.tools.cuda_static --write [KERNEL ...]   follows what changed, writes counts and the document
    python -m benchmarks.tools.cuda_static                        compares them with the sources and with the bars

``cuda_counts/<kernel>.json`` holds, for each case, what one launch issues on sm_90a: the machine code of every warp of
a block is followed to its end (``sass.py``). The document, ``docs/results/cuda_predictions.md``, is made of them and of
``cuda_predictions.template.md``: :func:`seconds` is its model.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton import knobs

from lowbit.backends.triton.launch import TARGETS
from lowbit.packed.format import PackedFormat
from lowbit.testing import codebook_cases, cuda_codebook, cuda_names, cuda_ptx
from lowbit.testing.kron_cases import Factor, Kind
from lowbit.testing.kron_cases import Weight as KronWeight
from lowbit.testing.packed_cases import Weight
from lowbit.testing.ptx_emulator import TensorMap

from . import cuda_compiled, sass
from .cuda_kernels import KERNELS, PACKED_DECODE, ROOT, Kernel
from .resources import TENSOR, unit

COUNTS = Path(__file__).with_name("cuda_counts")
DOCUMENT = ROOT / "docs" / "results" / "cuda_predictions.md"
TEMPLATE = Path(__file__).with_name("cuda_predictions.template.md")
ARCHITECTURE, TARGET = "sm_90a", TARGETS["sm_90"]
PARAMETERS = 0x210  # of constant bank 0, where sm_90 has them

# The model: an H200
PROCESSORS, CLOCK = 132, 1.75e9
DRAM = 4.3e12  # bytes a second: a copy, read and written, as others measured it
LATENCY = 0.95e-6  # from a load to its data under load: 0.8 to 1.1
LAUNCH = 2.5e-6  # of a kernel in a graph, from its start to its end where it does nothing: 2 to 3
L2 = 39.0  # bytes per cycle and processor
SCHEDULERS = 4  # warp instructions per cycle and processor
LANES = {"alu": 64, "fma": 128, "half": 128, "special": 16, "uniform": 64}  # per cycle and processor
MMA = 2048 * 0.62  # multiplications per cycle and processor of mma.sync
WGMMA = 2048.0  # of wgmma: the whole rate of the tensor cores
CUBLAS = 4096 * 8192**2 / 800e-6  # multiplications a second, as the target of M = 4096 has them
SHARED = 128.0  # bytes per cycle and processor


@dataclass(frozen=True)
class Case:
    """A call: ``y = x @ W.T`` of a family, float16 x, or int8 activations made of it.

    ``packed`` has groups of 128 and scales in float16, ``codebook`` a table in float16 for each row.
    """

    family: str
    bits: int
    m: int
    n: int
    k: int
    zeros: str = "none"
    int8: bool = False

    @property
    def label(self) -> str:
        asymmetric = "" if self.zeros == "none" else f" {self.zeros} zeros"
        kind = f"{self.bits}-bit{asymmetric}" if self.bits else "dense factors"
        return f"{self.family} {kind} N{self.n} K{self.k} M={self.m}{' int8' if self.int8 else ''}"

    @property
    def weight_bytes(self) -> int:
        """Of codes in tiles, scales and zeros, or tables; of a Kronecker product, of its factors, which are alike."""
        if self.family == "kron":
            return 2 * 2 * math.isqrt(self.n) * math.isqrt(self.k)
        groups = -(-self.k // 128)
        codes = self.n * -(-self.k // 256) * 32 * self.bits
        if self.family == "codebook":
            return codes + self.n * 2 * (1 << self.bits)
        return codes + self.n * groups * (2 + {"none": 0, "int": 1, "float": 2}[self.zeros])

    @property
    def bytes(self) -> int:
        """That must come from DRAM or go there: every byte once."""
        return self.weight_bytes + 2 * self.m * (self.k + self.n)


SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096), (4096, 4096))
BITS = tuple(range(2, 9))
BATCH_BITS, BATCH_ROWS = (2, 3, 4, 8), (64, 128, 256, 4096)
KRON = Case("kron", 0, 4096, 4096, 4096)
CASES: dict[str, tuple[Case, ...]] = {
    "packed_decode": (
        *(Case("packed", bits, 1, n, k) for bits in BITS for n, k in SHAPES),
        *(Case("packed", bits, 16, 8192, 8192) for bits in BITS),
        *(Case("packed", bits, 1, 8192, 8192, "int") for bits in BITS),
    ),
    "packed_batch_sm90": tuple(Case("packed", bits, m, 8192, 8192) for bits in BATCH_BITS for m in BATCH_ROWS),
    "packed_batch": tuple(Case("packed", 4, m, 8192, 8192) for m in (64, 4096)),
    "kron_fused": (KRON,),
    "codebook_decode": tuple(Case("codebook", bits, m, 8192, 8192) for bits in BATCH_BITS for m in (1, 16)),
    "codebook_batch_sm90": tuple(Case("codebook", bits, m, 8192, 8192) for bits in BATCH_BITS for m in (64, 256)),
    "packed_decode_int8": tuple(Case("packed", bits, m, 8192, 8192, int8=True) for bits in (4, 8) for m in (1, 16)),
    "packed_batch_int8": tuple(Case("packed", bits, m, 8192, 8192, int8=True) for bits in (4, 8) for m in (64, 256)),
    "codebook_linear_int8": tuple(Case("codebook", bits, m, 8192, 8192, int8=True) for bits in (4, 8) for m in (1, 8)),
}
# µs by (bits, N, K, M): the targets of this project
TARGET_TIMES = {
    **{
        (bits, n, k, 1): us
        for bits, times in {2: (6.6, 6.1, 9.8, 3.5), 3: (8.6, 7.8, 13.2, 4.0), 4: (10.5, 9.5, 16.6, 4.5),
                            6: (14.4, 13.0, 23.4, 5.5), 8: (18.4, 16.4, 30.2, 6.5)}.items()
        for (n, k), us in zip(SHAPES, times, strict=True)
    },
    (4, 8192, 8192, 16): 12.0,
    (4, 8192, 8192, 64): 16.0,
    (4, 8192, 8192, 128): 27.0,
    (4, 8192, 8192, 256): 54.0,
    (4, 8192, 8192, 4096): 800.0,
    (0, 4096, 4096, 4096): 1e6 * 4096**3 / CUBLAS / 5,  # a Kronecker product: a fifth of a dense layer
}  # fmt: skip


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel, as in ``("packed_decode::kernel", 4, "float16", 1, 0)``, and what it is started with."""

    kernel: tuple[Any, ...]
    blocks: int
    threads: int
    arguments: tuple[Any, ...]


def captured(run: Callable[[], object]) -> list[Launch]:
    """The launches of a function of lowbit/testing/cuda_ptx.py, on tensors without memory; nothing is executed."""
    found: list[Launch] = []

    def execute(_: str, kernel: Any, grid: Any, threads: int, arguments: Any, *rest: Any, **more: Any) -> None:
        found.append(Launch(kernel, grid[0], threads, tuple(arguments)))

    with ExitStack() as stack:
        for module in (cuda_ptx, cuda_codebook):
            stack.enter_context(patch.object(module, "execute", execute))
            stack.enter_context(patch.object(module, "symbol", lambda ptx, *kernel: tuple(map(plain, kernel))))
            stack.enter_context(patch.object(module, "aligned", lambda tensor: tensor))
        run()
    return found


def plain(argument: Any) -> Any:
    return int(argument) if isinstance(argument, bool) else argument


def splits_of(blocks: int, most: int) -> int:
    """Of K: blocks for all processors, as the headers of the kernels have it."""
    return max(1, min(PROCESSORS // blocks, most, 16))


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed_weight(case: Case) -> Weight:
    form = PackedFormat(
        bits=case.bits, out_features=case.n, in_features=case.k, group_size=128, granularity="group",
        zeros=case.zeros, scale_dtype="float16", outliers=0,
    )  # type: ignore[arg-type]  # fmt: skip
    groups, zeros = (case.n, -(-case.k // 128)), {"none": None, "int": torch.uint8}[case.zeros]
    return Weight(
        form, empty(0), empty(case.n, -(-case.k // 32) * case.bits, dtype=torch.int32), empty(*groups),
        None if zeros is None else empty(*groups, dtype=zeros), (None, None, None),
    )  # fmt: skip


def packed_decode_launches(case: Case) -> list[Launch]:
    splits = splits_of(-(-case.n // cuda_ptx.ROWS), -(-case.k // 1024) // 2)
    return captured(lambda: cuda_ptx.packed_decode("", packed_weight(case), empty(case.m, case.k), splits=splits))


def x_rows_of(kernel: str, case: Case) -> int:
    """Rows of x of a block, or of a piece of work."""
    few = 64 if kernel.endswith("sm90") else 32
    return few if case.m <= few or (case.family, case.bits) == ("codebook", 8) else 2 * few


# of W, of a block
ROWS = {
    "packed_batch_sm90": cuda_ptx.SM90_ROWS, "codebook_batch_sm90": cuda_ptx.SM90_ROWS,
    "packed_batch": cuda_ptx.BATCH_ROWS, "packed_batch_int8": 128,
}  # fmt: skip


def works(kernel: str, case: Case) -> int:
    """Into how many blocks y is cut."""
    return -(-case.n // ROWS[kernel]) * -(-case.m // x_rows_of(kernel, case))


def packed_batch_sm90_launches(case: Case) -> list[Launch]:
    splits = splits_of(works("packed_batch_sm90", case), -(-case.k // 256) // 4)
    map_of = TensorMap.__new__(TensorMap)  # of tensors without memory there is none
    with patch.object(cuda_ptx, "sm90_maps", lambda *_: (map_of, map_of, map_of)):
        return captured(
            lambda: cuda_ptx.packed_batch_sm90(
                "", packed_weight(case), empty(case.m, case.k), splits=splits, blocks=PROCESSORS
            )
        )


def codebook_weight(case: Case) -> codebook_cases.Weight:
    kind = codebook_cases.Kind(case.bits, case.n, case.k, case.k, "row", dtype=torch.float16)
    packed = empty(case.n, -(-case.k // 32) * case.bits, dtype=torch.int32)
    none = (None, None, None)
    return codebook_cases.Weight(kind, empty(0), packed, empty(case.n, 1, 1 << case.bits), None, none, none)


def codebook_decode_launches(case: Case) -> list[Launch]:
    splits = splits_of(-(-case.n // cuda_ptx.ROWS), -(-case.k // 1024) // 2)
    return captured(
        lambda: cuda_codebook.execute_ptx("", codebook_weight(case), empty(case.m, case.k), splits=splits)
    )


def codebook_batch_sm90_launches(case: Case) -> list[Launch]:
    splits = splits_of(works("codebook_batch_sm90", case), -(-case.k // 256) // 4)
    map_of = TensorMap.__new__(TensorMap)
    with patch.object(cuda_codebook, "sm90_maps", lambda *_: (map_of, map_of, map_of)):
        return captured(
            lambda: cuda_codebook.execute_sm90(
                "", codebook_weight(case), empty(case.m, case.k), splits=splits, blocks=PROCESSORS
            )
        )


def packed_decode_int8_launches(case: Case) -> list[Launch]:
    splits = splits_of(-(-case.n // cuda_ptx.ROWS), -(-case.k // 1024) // 2)
    return captured(
        lambda: cuda_ptx.packed_decode_int8("", "", packed_weight(case), empty(case.m, case.k), splits=splits)
    )


def packed_batch_int8_launches(case: Case) -> list[Launch]:
    splits = splits_of(works("packed_batch_int8", case), -(-case.k // 256) // 2)
    return captured(
        lambda: cuda_ptx.packed_batch_int8("", "", packed_weight(case), empty(case.m, case.k), splits=splits)
    )


def codebook_linear_int8_launches(case: Case) -> list[Launch]:
    assert case.m <= 8  # one block for all rows of x
    splits = splits_of(-(-case.n // cuda_ptx.ROWS), -(-case.k // 1024) // 2)
    return captured(
        lambda: cuda_codebook.execute_int8("", "", "", codebook_weight(case), empty(case.m, case.k), splits=splits)
    )


def packed_batch_launches(case: Case) -> list[Launch]:
    splits = splits_of(works("packed_batch", case), -(-case.k // 256) // 2)
    return captured(lambda: cuda_ptx.packed_batch("", packed_weight(case), empty(case.m, case.k), splits=splits))


KRON_ROWS, KRON_TOGETHER = 2, 2  # rows of x of a step, blocks of a processor: the plan of csrc/cuda/kron/fused.cu


def kron_fused_launches(case: Case) -> list[Launch]:
    n, k = math.isqrt(case.n), math.isqrt(case.k)
    values = empty(1, n, k)
    factor = Factor(Kind(torch.float16), values, None, None, values)
    weight = KronWeight(factor, factor, None, None)
    return captured(
        lambda: cuda_ptx.kron_fused(
            "", weight, empty(case.m, case.k), None, rows=KRON_ROWS, stages=2, blocks=KRON_TOGETHER * PROCESSORS
        )
    )


LAUNCHES = {
    "packed_decode": packed_decode_launches, "packed_batch_sm90": packed_batch_sm90_launches,
    "packed_batch": packed_batch_launches, "kron_fused": kron_fused_launches,
    "codebook_decode": codebook_decode_launches, "codebook_batch_sm90": codebook_batch_sm90_launches,
    "packed_decode_int8": packed_decode_int8_launches, "packed_batch_int8": packed_batch_int8_launches,
    "codebook_linear_int8": codebook_linear_int8_launches,
}  # fmt: skip


def constants(ptx: str, launch: Launch) -> bytes:
    """Constant bank 0 of a launch. Pointers that are no null are made up: nothing is read."""
    name = cuda_names.symbol(ptx, *launch.kernel)
    head = ptx[ptx.index(f".entry {name}(") :]
    pattern = r"\.param\s+(?:\.align (\d+) )?\.[bsuf](\d+) \w+(?:\[(\d+)\])?"
    types = re.findall(pattern, head[: head.index(")")])
    bank = bytearray(PARAMETERS + 256 * len(types))
    struct.pack_into("<6I", bank, 0, launch.threads, 1, 1, launch.blocks, 1, 1)
    at = PARAMETERS
    for number, ((align, bits, count), given) in enumerate(zip(types, launch.arguments, strict=True)):
        size = int(bits) // 8 * int(count or 1)
        at = -(-at // int(align or size)) * int(align or size)
        value = (number + 1) << 32 if isinstance(given, Tensor | TensorMap) else int(given)
        bank[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        at += size
    return bytes(bank)


# --- counts ----------------------------------------------------------------------------------------------------------


def width(op: str) -> int:
    """Bytes that a memory instruction moves for a thread."""
    return 16 if ".128" in op else 8 if ".64" in op else 1 if ".U8" in op else 2 if ".U16" in op else 4


def products_of(op: str) -> int:
    """How many products of 16 x 8 x 16 an instruction of a warp makes: of wgmma, a warp has 16 of the 64 rows."""
    wide = re.match(r"HGMMA\.64x(\d+)x16", op)
    return int(wide[1]) // 8 if wide else 1


def counted(traces: Sequence[sass.Trace]) -> dict[str, int]:
    """What the warps of a block issue: ``slots``, and by unit what their guards let through."""
    ops: Counter[str] = Counter()
    for one in traces:
        ops += one.ops()
    units: Counter[str] = Counter()
    for op, times in ops.items():
        units[unit(op, TARGET)] += times
    moved = sum(32 * width(op) * times for op, times in ops.items() if unit(op, TARGET) == "shared")
    weights = sum(32 * width(op) * times for op, times in ops.items() if op.startswith("LDG.E.NA"))
    products = sum(times * products_of(op) for op, times in ops.items() if unit(op, TARGET) == TENSOR)
    return {
        "slots": sum(one.slots for one in traces), **{name: units[name] for name in LANES}, "products": products,
        "shared bytes": moved, "weight bytes": weights,
    }  # fmt: skip


def read_machine_code(cubin: Path) -> str:
    command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def code(name: str, bits: int | None) -> tuple[str, dict[str, list[sass.Instruction]]]:
    """PTX, and the machine code of each function."""
    kernel = KERNELS[name]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cuda_compiled.run_nvcc((kernel, ARCHITECTURE, bits), cubin, "-cubin", "--keep", "--keep-dir", folder)
        ptx = "".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))
        text = read_machine_code(cubin)
    return ptx, sass.functions(text)


# Warps that do the same, by kernel: one of them, and how many they are
ALIKE = {
    "packed_batch_sm90::kernel": ((0, 1), (1, 3), (4, 8)), "codebook_batch_sm90::kernel": ((0, 1), (1, 3), (4, 8)),
    "packed_batch::kernel": ((0, 8),), "packed_batch_int8::kernel": ((0, 4),),
}  # fmt: skip
DECODE = ("packed_decode", "codebook_decode", "packed_decode_int8", "codebook_linear_int8")  # share cuda/decode.cuh


def chosen_blocks(kernel: Kernel, case: Case, launch: Launch) -> list[int]:
    """One of each kind: of decode, in the middle of a split. Of a persistent grid, the first block has most work."""
    if kernel.name not in DECODE:
        return [0]
    rows = -(-case.n // cuda_ptx.ROWS)
    splits = max(1, launch.blocks // rows)
    return [rows * split + rows // 2 for split in range(splits)] if launch.blocks >= rows else [0]


def launched(kernel: Kernel, bits: int | None, launch: Launch, chosen: Sequence[int]) -> dict[str, int]:
    """What a launch issues: of blocks that are alike, one of each kind is followed."""
    ptx, functions = code(kernel.name, bits)
    body = functions[cuda_names.symbol(ptx, *launch.kernel)]
    bank = constants(ptx, launch)
    total: Counter[str] = Counter()
    for block in chosen:
        special = {"SR_CTAID.X": block, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_LANEID": 0, "SR_CgaCtaId": 0,
                   "SR_TID.Y": 0, "SR_TID.Z": 0}  # fmt: skip
        alike = ALIKE.get(launch.kernel[0], ((warp, 1) for warp in range(launch.threads // 32)))
        for warp, times in alike:
            one = sass.trace(body, bank, {**special, "SR_TID.X": 32 * warp}, LOADED.get(launch.kernel[0]))
            for name, number in counted([one]).items():
                total[name] += times * number
    return {name: number * launch.blocks // len(chosen) for name, number in total.items()}


def source_of(kernel: Kernel, launch: Launch) -> Kernel:
    """What a launch is compiled from: other kernels come before and after that with int8 activations."""
    every = (kernel, *KERNELS.values())
    return next(one for one in every if any(f.name == launch.kernel[0] for f in one.functions))


# What is loaded where a path depends on it: the step of a row is 1, so its reciprocal takes the quick way.
LOADED = {"codebook_linear_int8::kernel": sass.bits_of(1.0)}
# Small kernels before and after a product whose path depends on data: a launch each, and nothing else, is counted.
AROUND = (
    "int8::quantize_rows", "int8::add_splits", "packed_batch_int8::sum_groups", "codebook_int8::find_steps",
    "codebook_int8::add_splits",
)  # fmt: skip


def case_counts(kernel: Kernel, case: Case) -> list[dict[str, Any]]:
    """Of every launch of a case: its instance, blocks, threads, registers and counts of the whole grid."""
    found = []
    for launch in LAUNCHES[kernel.name](case):
        if launch.kernel[0] in AROUND:
            none = dict.fromkeys(("slots", *LANES, "products", "shared bytes", "weight bytes"), 0)
            found.append({"instance": launch.kernel[0], "blocks": launch.blocks, "threads": launch.threads, **none})
            continue
        source = source_of(kernel, launch)
        bits = case.bits if source.compilations != (None,) else None
        kinds = chosen_blocks(kernel, case, launch) if source is kernel else [0]
        instance = cuda_compiled.instance(source, cuda_names.symbol(code(source.name, bits)[0], *launch.kernel))
        assert instance is not None
        counts = launched(source, bits, launch, kinds)
        found.append({"instance": instance.label, "blocks": launch.blocks, "threads": launch.threads, **counts})
    return found


def path(kernel: Kernel) -> Path:
    return COUNTS / f"{kernel.name}.json"


def read_counts(kernel: Kernel) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path(kernel).read_text(encoding="utf-8"))
    return record


def is_current(kernel: Kernel) -> bool:
    return path(kernel).is_file() and read_counts(kernel)["fingerprint"] == cuda_compiled.fingerprint(kernel)


def write_counts(kernel: Kernel) -> None:
    lines = []
    for case in CASES[kernel.name]:
        lines.append(f"  {json.dumps(case.label)}: {json.dumps(case_counts(kernel, case))}")
        print(case.label, file=sys.stderr, flush=True)
    head = f'{{\n "fingerprint": "{cuda_compiled.fingerprint(kernel)}",\n "nvcc": "{cuda_compiled.nvcc_version()}",\n'
    COUNTS.mkdir(exist_ok=True)
    path(kernel).write_text(head + ' "cases": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


# --- the model -------------------------------------------------------------------------------------------------------


def resident(kernel: Kernel, launch: dict[str, Any]) -> int:
    """Blocks on a processor at once."""
    entries = cuda_compiled.read_record(kernel)["entries"][ARCHITECTURE]
    return min(int(entries[launch["instance"]]["blocks"]), -(-launch["blocks"] // PROCESSORS))


def seconds(kernel: Kernel, case: Case, launch: dict[str, Any]) -> dict[str, float]:
    """The time that each part of a processor is busy with a launch, on the processor that has most blocks."""
    share = -(-launch["blocks"] // PROCESSORS) / launch["blocks"]  # of the grid's work
    if kernel.name.endswith("sm90") and launch["products"]:
        share = 1 / launch["blocks"]  # a block for each processor: the first is followed
    main = launch["products"] > 0
    if launch["slots"] == 0:
        return {"issue": 0.0}
    cycles = {
        "issue": launch["slots"] / SCHEDULERS,
        **{name: launch[name] * 32 / lanes for name, lanes in LANES.items()},
        "MMA": launch["products"] * 16 * 8 * 16 / (WGMMA if kernel.name.endswith("sm90") else MMA),
        "shared": launch["shared bytes"] / SHARED,
        "L2": (from_l2(kernel, case, launch) if main else added_bytes(case, launch)) / L2,
    }
    times = {name: number * share / CLOCK for name, number in cycles.items()}
    if main:
        times["DRAM"] = case.bytes / DRAM
        times["latency"] = waiting(kernel, case, launch)
    return times


def added_bytes(case: Case, launch: dict[str, Any]) -> float:
    """Of a kernel that adds splits: at most 16 of them are read."""
    return 4.0 * case.m * case.n * 4


def from_l2(kernel: Kernel, case: Case, launch: dict[str, Any]) -> float:
    """Bytes that all blocks read and write, past their own caches."""
    width = 1 if case.int8 else 2  # of an element of x
    if kernel.name in DECODE:
        return float(launch["weight bytes"] + width * case.m * case.k * launch["blocks"])
    if kernel.name == "kron_fused":
        return float(case.bytes + case.weight_bytes * launch["blocks"])
    x_rows = x_rows_of(kernel.name, case)
    tile = width * x_rows + ROWS[kernel.name] * case.bits / 8
    return works(kernel.name, case) * case.k * tile + 2 * case.m * case.n


def waiting(kernel: Kernel, case: Case, launch: dict[str, Any]) -> float:
    """Seconds from load to data, one after the other, with as many under way as the kernel has."""
    if kernel.name in DECODE:
        warps = launch["threads"] // 32 * resident(kernel, launch)
        ahead = warps * DEPTH * 16 * 32 * case.bits
        return case.bytes / (ahead * min(PROCESSORS, launch["blocks"]) / LATENCY)
    blocks = -(-launch["blocks"] // PROCESSORS) / resident(kernel, launch)  # one after the other
    if kernel.name == "kron_fused":
        return blocks * -(-case.m // (KRON_ROWS * launch["blocks"])) * LATENCY
    splits = max(1, launch["blocks"] // works(kernel.name, case))
    if kernel.name in ("packed_batch", "packed_batch_int8"):
        slices = -(-case.k // ((256 if case.int8 else 128) * splits))
        return blocks * slices / 2 * LATENCY  # of three slices, one is read
    stage = 512 * x_rows_of(kernel.name, case) + 32 * case.bits * cuda_ptx.SM90_ROWS  # of what tables leave it
    pieces = -(-works(kernel.name, case) * splits // launch["blocks"])
    return pieces * -(-case.k // (256 * splits)) / min(4, 225 * 1024 // stage) * LATENCY


DEPTH = 2  # tiles of 16 rows that a warp of decode has on their way


@dataclass(frozen=True)
class Prediction:
    case: Case
    times: dict[str, float]  # of the launch that takes longest
    total: float

    @property
    def bound(self) -> str:
        return max(self.times, key=lambda name: self.times[name])

    @property
    def dram(self) -> float:
        return self.times["DRAM"]


def predictions(kernel: Kernel) -> dict[Case, Prediction]:
    counts, found = read_counts(kernel)["cases"], {}
    for case in CASES[kernel.name]:
        each = [seconds(kernel, case, launch) for launch in counts[case.label]]
        total = sum(LAUNCH + max(times.values()) for times in each)
        found[case] = Prediction(case, max(each, key=lambda times: max(times.values())), total)
    return found


# Issue and integer time, as a multiple of the DRAM time: at most
BARS = {2: 1.15, 3: 1.15, 4: 1.0, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}


# Bars that are not kept yet: (bits, zeros) of 8192², M = 1
MISSED = {(bits, zeros) for bits in (2, 3) for zeros in ("none", "int")}
MISSED_BATCH = {3}


def ratio(one: Prediction) -> float:
    """Issue or ALU time, the longer one, by the DRAM time."""
    return max(one.times["issue"], one.times["alu"]) / one.dram


BATCH_BAR = 0.7  # issue time of batch_sm90 by that of its products, M = 4096


def batch_ratio(one: Prediction) -> float:
    return one.times["issue"] / one.times["MMA"]


def batch_missed(every: dict[Case, Prediction]) -> set[int]:
    """The widths that do not keep :data:`BATCH_BAR`."""
    return {case.bits for case, one in every.items() if case.m == BATCH_ROWS[-1] and batch_ratio(one) > BATCH_BAR}


def missed(every: dict[Case, Prediction]) -> set[tuple[int, str]]:
    """The bars that are not kept."""
    judged = [one for case, one in every.items() if (case.n, case.k, case.m) == (8192, 8192, 1)]
    return {(one.case.bits, one.case.zeros) for one in judged if ratio(one) > BARS[one.case.bits]}


# --- the document ----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def triton_times(m: int = 1, family: str = "packed", int8: bool = False) -> dict[int, tuple[float, str]]:
    """By bits, the prediction of docs/gpu.md for 8192² and M = m: µs and the busiest unit."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    if m not in (1, 16, 64, 256):
        return {}
    before, kind = r"[^|]*\|" * (1, 16, 64, 256).index(m), ", int8 activations" if int8 else ""
    pattern = rf"^\| `{family.capitalize()}` (\d) bits{kind} \|{before} ([\d.]+) \((\w+)"
    return {int(bits): (float(time), bound) for bits, time, bound in re.findall(pattern, text, re.MULTILINE)}


def beside_triton(names: Sequence[str]) -> str:
    """Cases of 8192² of some kernels: what keeps them busy, and Triton's kernels."""
    rows = []
    for name in names:
        for case, one in predictions(KERNELS[name]).items():
            triton = triton_times(case.m, case.family, case.int8).get(case.bits)
            units = (us(one.times[unit]) for unit in ("issue", "alu", "MMA", "shared", "L2", "DRAM"))
            beside = "–" if triton is None else f"{triton[0]} ({triton[1]})"
            ours = f"{us(max(one.times.values()))} ({one.bound})"
            rows.append([f"`{name}` {case.bits} bits, M = {case.m}", *units, ours, beside, us(one.total)])
    units_of = [f"{unit} µs" for unit in ("issue", "ALU", "MMA", "shared", "L2", "DRAM")]
    return table(["8192²", *units_of, "CUDA C++", "Triton", "with launches µs"], rows)


def target_of(case: Case) -> float | None:
    return TARGET_TIMES.get((case.bits, case.n, case.k, case.m)) if case.zeros == "none" else None


def cell(one: Prediction) -> str:
    target = target_of(one.case)
    aim = "" if target is None else f" / {target:g}{'' if 1e6 * one.total <= target else ' **✗**'}"
    return f"{us(one.total)} ({one.bound}){aim}"


def shapes_table(every: dict[Case, Prediction], m: int) -> str:
    rows = []
    for bits in BITS:
        cells = [cell(every[Case("packed", bits, m, n, k)]) for n, k in SHAPES]
        rows.append([f"{bits} bits", *cells])
    head = ["µs (bound) / target", *(f"N {n}, K {k}" for n, k in SHAPES)]
    return table(head, rows)


def m16_table(every: dict[Case, Prediction]) -> str:
    cells = [cell(every[Case("packed", bits, 16, 8192, 8192)]) for bits in BITS]
    return table(["8192², µs (bound) / target", *(f"{bits} bits" for bits in BITS)], [["M = 16", *cells]])


def batch_parts(batch: dict[Case, Prediction]) -> dict[str, str]:
    """The tables of batch_sm90: times, bars, and Triton's beside."""
    widths = [f"{bits} bits" for bits in BATCH_BITS]
    rows, beside, bars = [], [], []
    for m in BATCH_ROWS:
        ours = [batch[Case("packed", bits, m, 8192, 8192)] for bits in BATCH_BITS]
        rows.append([f"M = {m}", *map(cell, ours)])
        if m in (64, 256):
            triton = triton_times(m)
            beside += [
                [f"M = {m}, Triton", *(f"{triton[bits][0]} ({triton[bits][1]})" for bits in BATCH_BITS)],
                [f"M = {m}, CUDA C++", *(f"{us(max(one.times.values()))} ({one.bound})" for one in ours)],
            ]
    for bits in BATCH_BITS:
        one = batch[Case("packed", bits, BATCH_ROWS[-1], 8192, 8192)]
        over = " **✗**" if batch_ratio(one) > BATCH_BAR else ""
        bars.append([
            f"{bits} bits", us(one.times["issue"]), us(one.times["alu"]), us(one.times["MMA"]), us(one.times["L2"]),
            f"{batch_ratio(one):.2f}{over} (at most {BATCH_BAR})",
        ])  # fmt: skip
    return dict(
        batch=table(["8192², µs (bound) / target", *widths], rows), beside=table(["8192²", *widths], beside),
        batch_bars=table(["8192², M = 4096", "issue µs", "ALU µs", "MMA µs", "L2 µs", "issue / MMA"], bars),
    )  # fmt: skip


def units_table(every: dict[Case, Prediction]) -> str:
    """What keeps each case busy, and its time."""
    units = ("issue", "alu", "MMA", "shared", "L2", "DRAM")
    rows = [[one.case.label, *(us(one.times[name]) for name in units), us(one.total)] for one in every.values()]
    return table(["", *(f"{name} µs" for name in units), "predicted µs"], rows)


def document() -> str:
    kernel = PACKED_DECODE
    every = predictions(kernel)
    counts = read_counts(kernel)
    ratios = []
    for zeros in ("none", "int"):
        for bits in BITS:
            one = every[Case("packed", bits, 1, 8192, 8192, zeros)]
            launch = counts["cases"][one.case.label][0]
            tiles = 8192 // 16 * (8192 // 256)
            ratios.append([
                f"{bits} bits{', integer zeros' if zeros == 'int' else ''}", f"{launch['slots'] / tiles:.0f}",
                f"{launch['alu'] / tiles:.0f}", us(one.times["issue"]), us(one.times["alu"]), us(one.times["MMA"]),
                us(one.times["shared"]), us(one.dram),
                f"{ratio(one):.2f}{' **✗**' if ratio(one) > BARS[bits] else ''} (at most {BARS[bits]})",
            ])  # fmt: skip
    head = ["8192², M = 1", "slots", "of them ALU", "issue µs", "ALU µs", "MMA µs", "shared µs", "DRAM µs", "ratio"]
    triton = triton_times()
    beside = []
    for bits in BITS:
        one = every[Case("packed", bits, 1, 8192, 8192)]
        beside.append([f"{bits} bits", f"{triton[bits][0]} ({triton[bits][1]})",
                       f"{us(max(one.times.values()))} ({one.bound})"])  # fmt: skip
    batch, kron = predictions(KERNELS["packed_batch_sm90"]), predictions(KERNELS["kron_fused"])
    misses = []
    for one in (*every.values(), *batch.values(), *kron.values()):
        target = target_of(one.case)
        if target is not None and 1e6 * one.total > target:
            misses.append(f"- {one.case.label}: {us(one.total)} instead of {target:g} µs: {reason(one)}.")
    return TEMPLATE.read_text(encoding="utf-8").format(
        nvcc=counts["nvcc"], launch=1e6 * LAUNCH, latency=1e6 * LATENCY, processors=PROCESSORS, clock=CLOCK / 1e9,
        m1=shapes_table(every, 1), m16=m16_table(every),
        ratios=table(head, ratios), triton=table(["", "Triton", "CUDA C++"], beside), misses="\n".join(misses),
        **batch_parts(batch), mma=units_table(predictions(KERNELS["packed_batch"])), kron=units_table(kron),
        dense=us(4096**3 / CUBLAS), codebooks=beside_triton(("codebook_decode", "codebook_batch_sm90")),
        int8=beside_triton(("packed_decode_int8", "packed_batch_int8", "codebook_linear_int8")),
    )  # fmt: skip


def reason(one: Prediction) -> str:
    """Why a prediction is above its target."""
    order = sorted(one.times, key=lambda name: -one.times[name])
    first, second = order[:2]
    text = f"{first} takes {us(one.times[first])} µs, then {second} {us(one.times[second])}"
    launches = round((one.total - sum([max(one.times.values())])) / LAUNCH)
    return text + (f"; {launches} launches" if launches > 1 else "")


# --- the command -----------------------------------------------------------------------------------------------------


def problems() -> Iterator[str]:
    """What is out of date, and which bars are broken."""
    for name in CASES:
        if not is_current(KERNELS[name]):
            yield f"{name}: the counts are of other sources: --write {name}"
            return
    if (now := missed(predictions(PACKED_DECODE))) != MISSED:
        yield f"bars that are not kept: {sorted(now)}, MISSED says {sorted(MISSED)}"
    if (widths := batch_missed(predictions(KERNELS["packed_batch_sm90"]))) != MISSED_BATCH:
        yield f"bars of batch that are not kept: {sorted(widths)}, MISSED_BATCH says {sorted(MISSED_BATCH)}"
    if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != document():
        yield f"{DOCUMENT.relative_to(ROOT)} is out of date: python -m benchmarks.tools.cuda_static --write"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="KERNEL", help="count what is out of date (of these kernels)")
    options = parser.parse_args()
    if options.write is not None:
        for name in options.write or CASES:
            if not is_current(KERNELS[name]):
                write_counts(KERNELS[name])
        DOCUMENT.write_text(document(), encoding="utf-8")
    found = list(problems())
    print("\n".join(found) or "up to date")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
