"""Predictions, not measurements: how fast compiled GPU code could run at best, from what it loads and executes.

    python -m benchmarks.tools.predict [--targets sm_80,sm_90,sm_100]

A launch cannot take less time than any one unit of the GPU needs for its share of the work, so the prediction is the
largest of these times: bytes that must come from DRAM, bytes that the programs read through L2, multiplications on
tensor cores, instructions of the main loop on every execution unit, and the loads that can be under way at once. It
leaves out launch cost, bank conflicts, waiting between dependent instructions and clocks below the nominal one, and
counts nothing but the main loop: a GPU takes longer.
"""

from __future__ import annotations

import argparse
import importlib
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit.backends.triton.launch import TARGETS, Launch, Target

from .compiling import compile_launch
from .resources import Line, by_unit, loads, machine_code, main_loop, parse_llvm, resources, unit


@dataclass(frozen=True)
class Machine:
    """One GPU of a target.

    Args:
        clock: GHz, boost. dram: GB/s. Both from NVIDIA's data sheet, like the peaks that ``tensor`` follows from.
        l2: bytes per cycle and multiprocessor. tensor: multiplications of two 16-bit numbers (dense, float32 sums)
        per cycle and multiprocessor; ``int8``: of two 8-bit ones. legacy: the share of that which ``mma.sync`` reaches.
        fma, half: lanes of float32 and of packed 16-bit arithmetic per cycle and multiprocessor: CUDA C++ Programming
        Guide, "Throughput of Native Arithmetic Instructions".
    """

    name: str
    clock: float
    dram: float
    l2: float
    tensor: int
    int8: int
    fma: int
    half: int
    legacy: float = 1.0


# l2: 5120 bytes per cycle on A100 (its white paper) and on H100 (measured, arXiv 2402.13499), for B200 assumed to grow
# with its processors; others assumed. legacy: arXiv 2402.13499 for Hopper, assumed for Blackwell.
MACHINES = {
    "sm_80": Machine("A100", 1.41, 2039, 47, 1024, 2048, 64, 128),
    "sm_86": Machine("A40", 1.74, 696, 32, 512, 1024, 128, 64),
    "sm_89": Machine("L40S", 2.52, 864, 32, 512, 1024, 128, 64),
    "sm_90": Machine("H200", 1.83, 4800, 39, 2048, 4096, 128, 128, 0.62),
    "sm_100": Machine("B200", 1.85, 8000, 39, 4096, 8192, 128, 128, 0.25),
    "sm_120": Machine("RTX 5090", 2.41, 1792, 32, 256, 1024, 128, 64),
}
SCHEDULERS = 4  # warp instructions issued per cycle and multiprocessor
SHARED = 128  # bytes per cycle and multiprocessor between registers, shared memory and L1
ALU, SPECIAL = 64, 16  # lanes, as Machine.fma
DRAM_LATENCY = 0.7  # microseconds from a load to its data under load: assumed


# --- what one program does, from Triton's own code -----------------------------------------------------------------


@dataclass
class Work:
    """What one program does, taken together: bytes by argument, multiplications by type of operand.

    The main loop is the innermost loop that loads most: ``trips`` times around, ``stages`` loads ahead.
    """

    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    trips: int = 1


def work(ttir: str, launch: Launch) -> Work:
    """Follow the first program of a launch through its Triton IR.

    Of values only whole numbers are followed that come from arguments and program numbers. What depends on other data
    is taken as happening once, and masks and conditions as true.
    """
    lines = ttir.splitlines()
    start = next(number for number, line in enumerate(lines) if "tt.func public" in line)
    plain = iter(re.sub(r" loc\(.*", "", line).strip() for line in lines[start + 1 :] if not line.startswith("#"))
    follow = _Follow(launch, re.findall(r"(%\w+): (!tt\.ptr|i\d+)", lines[start]))
    follow.run(_parse(plain)[0], 1)
    return follow.work


Node = tuple[str, list[Any]]  # an operation's line, and the nodes of each of its regions


def _parse(lines: Iterator[str]) -> tuple[list[Node], str]:
    """Nodes up to the line that closes their region, and that line."""
    nodes: list[Node] = []
    for line in lines:
        if line.startswith("}"):
            return nodes, line
        regions = []
        end = line
        while end.endswith("{"):
            region, end = _parse(lines)
            regions.append(region)
        nodes.append((line, regions))
    return nodes, ""


BITS = {"i1": 8, "f8E4M3FN": 8, "f8E5M2": 8}  # other names hold their bits
WHOLE: dict[str, Callable[..., Any]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "arith.remsi": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
    "arith.divui": operator.floordiv,
    "arith.remui": operator.mod,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrsi": operator.rshift,
    "arith.extsi": lambda a: a,
    "arith.extui": lambda a: a,
    "arith.trunci": lambda a: a,
    "arith.select": lambda condition, a, b: a if condition else b,
}
COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt,
    "sge": operator.ge,
}  # fmt: skip


def _bytes(kind: str) -> int:
    return BITS.get(kind, int(re.sub(r"\D", "", kind) or 0)) // 8


class _Follow:
    """Adds up the :class:`Work` of the nodes that it runs, each so many ``times``."""

    def __init__(self, launch: Launch, parameters: list[tuple[str, str]]) -> None:
        self.launch = launch
        self.work = Work()
        self.most = 0  # bytes loaded by the main loop
        self.values: dict[str, int] = {}
        self.bases: dict[str, str] = {}  # the argument that a pointer, or a tensor of them, points into
        for name, kind in parameters:
            if kind == "!tt.ptr":
                self.bases[name] = name[1:]
            else:
                self.values[name] = launch.arguments[name[1:]]

    def run(self, nodes: list[Node], times: int) -> None:
        for line, regions in nodes:
            match = re.match(r"(?:(%\w+)\S* = )?\"?([\w.]+)\"?", line)
            if match:
                self.step(match[1] or "", match[2], line, regions, times)

    def step(self, into: str, op: str, line: str, regions: list[Any], times: int) -> None:
        operands = re.findall(r"%[\w#]+", line.split(" = ", 1)[-1] if into else line)
        if op == "scf.for":
            self.loop(into, line, regions, times)
        elif op == "scf.if":
            taken = self.values.get(operands[0])
            chosen = regions if taken is None else regions[:1] if taken else regions[1:]
            for region in chosen:
                self.run(region, times)
        elif op in ("tt.load", "tt.store"):
            shape, kind = re.search(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)", line).groups()
            elements = math.prod(map(int, shape.split("x"))) if shape else 1
            side = self.work.loaded if op == "tt.load" else self.work.stored
            side[self.bases.get(operands[0], "?")] += times * elements * _bytes(kind)
        elif op == "tt.dot":
            m, k, kind, n = re.search(r"tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", line).groups()
            self.work.products[kind] += times * int(m) * int(k) * int(n)
        elif "!tt.ptr" in line and into and operands:
            self.bases.update((into, self.bases[name]) for name in operands if name in self.bases)
        elif op == "tt.get_program_id":
            self.values[into] = 0
        elif op == "tt.get_num_programs":
            self.values[into] = (*self.launch.grid, 1, 1)["xyz".index(line.split()[3])]
        elif op == "arith.constant":
            if number := re.search(r"arith\.constant (-?\d+|true|false) ?", line):
                self.values[into] = {"true": 1, "false": 0}.get(number[1]) if number[1].isalpha() else int(number[1])
        elif op == "arith.select" and operands[0] not in self.values and operands[1] in self.values:
            self.values[into] = self.values[operands[1]]
        elif all(name in self.values for name in operands):
            known = [self.values[name] for name in operands]
            if op == "arith.cmpi" and (relation := re.search(r"cmpi (\w+),", line)) and relation[1] in COMPARISONS:
                self.values[into] = int(COMPARISONS[relation[1]](*known))
            elif op in WHOLE:
                self.values[into] = WHOLE[op](*known)
        for region in regions if op not in ("scf.for", "scf.if") else ():
            self.run(region, times)

    def loop(self, into: str, line: str, regions: list[Any], times: int) -> None:
        counter, *bounds = re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)", line).groups()
        begin, end, step = (self.values.get(name) for name in bounds)
        trips = 1 if None in (begin, end, step) else max(0, -(-(end - begin) // step))
        if begin is not None:
            self.values[counter] = begin
        carried = re.findall(r"(%\w+) = (%[\w#]+)[,)]", line.partition("iter_args")[2])
        for number, (name, initial) in enumerate(carried):
            if initial in self.bases:
                self.bases[name] = self.bases[f"{into}#{number}"] = self.bases[into] = self.bases[initial]
        before, most = self.work.loaded.total(), self.most
        self.run(regions[0], times * trips)
        loaded = self.work.loaded.total() - before
        if most == self.most and loaded > most:  # none of the loops within loads more
            self.most, self.work.trips = loaded, times * trips


# --- how long that takes --------------------------------------------------------------------------------------------


def _width(line: Line) -> int:
    """Bytes that a memory instruction moves for each thread."""
    if ".128" in line.op or re.search(r"LDSM.*\.4|STSM.*\.4", line.op):
        return 16
    return 8 if ".64" in line.op or re.search(r"LDSM.*\.2", line.op) else 4


def _unrolled(compiled: Any, loop: Sequence[Line]) -> int:
    """Iterations of the kernel's main loop in one of the machine code's."""
    issued = sum(line.op.startswith(("LDG.", "LDGSTS")) for line in loop)
    written = len(loads(compiled, main_loop(parse_llvm(compiled.asm["llir"])[1])))
    return max(1, round(issued / written)) if written else 1


def _distinct(done: Work, launch: Launch, programs: int) -> int:
    """Bytes that so many programs move, when none moves a byte of an argument twice."""
    moved: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    for side in (done.loaded, done.stored):
        for name, number in side.items():
            tensor = launch.arguments[name]
            storage = tensor.untyped_storage()._cdata  # two arguments may be views of one storage
            moved[storage] += number * programs
            sizes[storage] = max(sizes.get(storage, 0), tensor.nbytes)
    return sum(min(number, sizes[storage]) for storage, number in moved.items())


def predict(compiled: Any, launch: Launch, target: Target, code: Sequence[Line], blocks: int) -> dict[str, Any] | None:
    """The prediction for a launch whose machine code is ``code``, ``blocks`` of it on a multiprocessor at once.

    Returns a dict, or ``None`` for a target of which no numbers are known:
        machine: the GPU; us: microseconds at best; bound: what takes them; dram: the share of the DRAM bandwidth.
    """
    machine = MACHINES.get(target.name)
    if machine is None or not all(launch.grid):
        return None
    done = work(compiled.asm["ttir"], launch)
    programs = math.prod(launch.grid)
    busiest = -(-programs // target.processors)  # programs of the multiprocessor that has most

    ptx = compiled.asm["ptx"]
    loop = main_loop(code)
    trips = done.trips * busiest
    warps = trips / _unrolled(compiled, loop) * compiled.metadata.num_warps
    counts = {unit: count * warps for unit, count in by_unit(loop, target).items()}
    legacy = 1.0 if "wgmma" in ptx or "tcgen05.mma" in ptx else machine.legacy
    moved = sum(32 * _width(line) for line in loop if unit(line.op, target) in ("shared", "global")) * warps
    ahead = max(1, launch.stages - 1) if "cp.async" in ptx else 1
    products = done.products["i8"] / machine.int8 + (done.products["f16"] + done.products["bf16"]) / machine.tensor
    cycles = {
        "L2": busiest * _distinct(done, launch, 1) / machine.l2,
        "tensor cores": busiest * products / legacy,
        "issue": sum(counts.values()) / SCHEDULERS,
        "integer": counts.get("alu", 0) * 32 / ALU,
        "float32": counts.get("fma", 0) * 32 / machine.fma,
        "16-bit": counts.get("half", 0) * 32 / machine.half,
        "special": counts.get("special", 0) * 32 / SPECIAL,
        "shared memory": moved / SHARED,
    }
    times = {unit: number / machine.clock / 1e3 for unit, number in cycles.items()}
    times["DRAM"] = _distinct(done, launch, programs) / machine.dram / 1e3
    times["latency"] = trips / (min(max(blocks, 1), busiest) * ahead) * DRAM_LATENCY if done.trips > 1 else DRAM_LATENCY
    bound = max(times, key=lambda unit: times[unit])
    return {
        "machine": machine.name,
        "us": round(times[bound], 2),
        "bound": bound,
        "dram": round(times["DRAM"] / times[bound], 2),
    }


# --- a table --------------------------------------------------------------------------------------------------------

ROWS = (1, 16, 64, 256, 4096)
SIZE = 8192
SPECS: dict[str, tuple[type[Any], Any]] = {
    **{
        f"packed {bits} bits": (lowbit.PackedLinear, lowbit.Packed(bits=bits, group_size=128, zeros="int"))
        for bits in range(2, 9)
    },
    "packed 4 bits int8": (lowbit.PackedLinear, lowbit.Packed(bits=4, group_size=128, zeros="int", activations="int8")),
    "packed 8 bits int8": (lowbit.PackedLinear, lowbit.Packed(bits=8, granularity="row", activations="int8")),
    **{f"codebook {bits} bits": (lowbit.CodebookLinear, lowbit.Codebook(bits=bits)) for bits in (2, 3, 4, 8)},
    "kron": (lowbit.KroneckerLinear, lowbit.Kronecker()),
}


class _Planning(TorchDispatchMode):
    """Collects what the ops of this package would launch on a target, and launches nothing."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "lowbit":
            return func(*args, **(kwargs or {}))
        family, function = func._schema.name.removeprefix("lowbit::").split("_", 1)
        module = importlib.import_module(f"lowbit.{family}.triton")
        with (
            patch.object(module, "target_of", lambda device: self.target),
            patch.object(module, "run", self.launches.extend),
        ):
            return getattr(module, function)(*args)


def launches_of(layer: torch.nn.Module, x: torch.Tensor, target: Target) -> list[Launch]:
    """What ``layer(x)`` launches on a GPU of ``target``; library calls beside it are not seen."""
    with torch.no_grad(), _Planning(target) as planning:
        layer(x)
    return planning.launches


def predict_all(launches: Sequence[Launch], target: Target) -> dict[str, Any] | None:
    """The prediction for launches one after another: the sum of their times, the rest as of the longest."""
    predictions = []
    for launch in launches:
        compiled = compile_launch(launch, target)
        code = machine_code(compiled, target)
        predictions.append(predict(compiled, launch, target, code, resources(compiled, target, code)["blocks"]))
    known = [one for one in predictions if one is not None]
    if not known:
        return None
    return {**max(known, key=lambda one: one["us"]), "us": sum(one["us"] for one in known)}


def rows(targets: Sequence[Target], only: str) -> Iterator[str]:
    """The lines of the table."""
    for name, (layer_class, spec) in SPECS.items():
        if only not in name:
            continue
        format = spec.format(torch.empty(SIZE, SIZE, dtype=torch.float16, device="meta"), "linear")
        layer = layer_class(format, dtype=torch.float16, device="meta")
        for m in ROWS:
            cells = []
            for target in targets:
                x = torch.empty(m, SIZE, dtype=torch.float16, device="meta")
                one = predict_all(launches_of(layer, x, target), target)
                cells.append(f"{one['us']:8.1f} {one['bound']:13} {one['dram']:4.0%}" if one else f"{'?':>27}")
            yield f"{name:18} M={m:<5}" + " | ".join(cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100", help=f"comma-separated, of {', '.join(MACHINES)}")
    parser.add_argument("--only", default="", help="formats whose name contains this")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets.split(",") if name not in MACHINES]
    if unknown:
        parser.error(f"--targets must be of {', '.join(MACHINES)}: got {', '.join(unknown)}")
    targets = [TARGETS[name] for name in options.targets.split(",")]
    print(f"PREDICTIONS, not measurements: microseconds at best of y = x @ W.T, W [{SIZE}, {SIZE}], float16; the unit")
    print("that takes them, and the share of the DRAM bandwidth, of the longest launch. Library calls are left out: at")
    print("large M a kernel may dequantize W for a library's matrix product.")
    print(" " * 26 + " | ".join(f"{MACHINES[target.name].name:27}" for target in targets))
    for line in rows(targets, options.only):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
