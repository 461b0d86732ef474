"""Running a kernel on a grid, and what Triton compiled on its launch's tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import lowbit.testing.ptx_emulator.instructions
import lowbit.testing.ptx_emulator.matrices  # noqa: F401
from lowbit.testing.ptx_emulator.barriers import ConcurrentMachine, TensorMap, concurrent
from lowbit.testing.ptx_emulator.machine import Machine, Statistics, parameter_address
from lowbit.testing.ptx_emulator.memory import WARP, GlobalMemory
from lowbit.testing.ptx_emulator.program import parse
from lowbit.testing.ptx_emulator.values import UNSIGNED, Fault

BATCH_LANES = 8192
SHARED_LIMIT = 232448  # bytes for one block, of sm_90; sm_80 has less


def execute(
    ptx: str,
    kernel: str,
    grid: Sequence[int],
    threads: int | Sequence[int],
    arguments: Sequence[Any],
    shared_bytes: int = 0,
    *,
    cluster: int = 1,
    newest_first: bool = False,
) -> Statistics:
    """Runs ``kernel`` on ``grid`` blocks.

    Args:
        threads: per block; a multiple of 32.
        arguments: one per parameter: an array or tensor in the CPU's memory (a pointer to it, written in place), an
            integer, or a float, which is passed with the parameter's width.
            A :class:`TensorMap` is passed by value, as a ``__grid_constant__`` parameter of 128 bytes.
        shared_bytes: dynamic shared memory per block.
        cluster: blocks of a cluster.
        newest_first: bulk copies that are on their way together end in reversed order.

    Raises:
        Fault: see the module.
    """
    program = parse(ptx, kernel)
    if len(arguments) != len(program.parameters):
        raise Fault(f"{kernel} has {len(program.parameters)} parameters: got {len(arguments)} arguments")
    if program.shared_bytes + shared_bytes > SHARED_LIMIT:
        raise Fault(f"shared_bytes must be at most {SHARED_LIMIT}: got {program.shared_bytes + shared_bytes}")
    memory, parameters = GlobalMemory(), dict[str, int]()
    tensors: dict[int, TensorMap] = {}
    for n, ((name, size), argument) in enumerate(zip(program.parameters, arguments, strict=True)):
        if isinstance(argument, TensorMap) != (size == 128):
            raise Fault(f"parameter {name} has {size} bytes: a tensor map has 128")
        if isinstance(argument, TensorMap):
            tensors[parameter_address(n)] = argument
        parameters[name] = parameter_address(n) if size == 128 else argument_bits(argument, size, memory)
    along = (*((threads,) if isinstance(threads, int) else threads), 1, 1)[:3]
    blocks, per_block = (*grid, 1, 1)[:3], math.prod(along)
    if per_block % WARP:
        raise Fault(f"threads must be a multiple of {WARP}: got {per_block}")
    statistics = Statistics()
    if math.prod(blocks) % cluster:
        raise Fault(f"the grid must be a multiple of a cluster: got {math.prod(blocks)} and {cluster} blocks")
    ordered = cluster > 1 or concurrent(program)
    batch = max(1, BATCH_LANES // per_block // cluster) * cluster
    with np.errstate(all="ignore"):
        for first in range(0, math.prod(blocks), batch):
            numbers = np.arange(first, min(first + batch, math.prod(blocks)))
            given = (program, parameters, memory, blocks, along, numbers, shared_bytes, statistics)
            machine = (
                ConcurrentMachine(*given, cluster=cluster, newest_first=newest_first, tensors=tensors)
                if ordered
                else Machine(*given)
            )
            machine.run()
            statistics.conflicts += machine.shared.conflicts
    return statistics


def argument_bits(argument: Any, size: int, memory: GlobalMemory) -> int:
    if hasattr(argument, "data_ptr"):  # a tensor: all bytes from its first to its last element
        extent = sum((n - 1) * stride for n, stride in zip(argument.shape, argument.stride(), strict=True)) + 1
        return memory.add(argument.data_ptr(), extent * argument.element_size() if argument.numel() else 0)
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise Fault("an array must be contiguous")
        return memory.add(argument.ctypes.data, argument.nbytes)
    if isinstance(argument, (float, np.floating)):
        return int(np.array(argument, {2: np.float16, 4: np.float32, 8: np.float64}[size]).view(UNSIGNED[size]))
    return int(argument) & ((1 << 8 * size) - 1)


@dataclass(frozen=True)
class Compiled:
    """What running a launch needs of what Triton compiled for it; can be sent to another process.

    Args:
        parameters: the arguments of the launch that the compiled kernel takes, in order. What it is specialised on
            (constants, ``None``, the value 1) is not among them.
    """

    ptx: str
    name: str
    threads: int
    shared_bytes: int
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, kernel: Any) -> Compiled:
        """Of a ``triton.compiler.CompiledKernel``."""
        return cls(
            ptx=kernel.asm["ptx"],
            name=kernel.metadata.name,
            threads=WARP * kernel.metadata.num_warps,
            shared_bytes=kernel.metadata.shared,
            parameters=tuple(name for name, type_ in kernel.src.signature.items() if type_ != "constexpr"),
        )


def run_launch(compiled: Any, launch: Any) -> Statistics:
    """Runs a compiled launch on the launch's own CPU tensors, in place.

    ``compiled``: a ``triton.compiler.CompiledKernel``, or :class:`Compiled`. Scratch pointers that Triton appends to
    the parameters are null.
    """
    code = compiled if isinstance(compiled, Compiled) else Compiled.of(compiled)
    arguments = [launch.arguments[name] for name in code.parameters]
    scratch = len(parse(code.ptx, code.name).parameters) - len(arguments)
    return execute(code.ptx, code.name, launch.grid, code.threads, arguments + [0] * scratch, code.shared_bytes)
