"""A kernel launch as a value: made for a target, then run, compiled without a GPU, or only looked at.

The functions ``*_launches`` of a family's ``triton.py`` make a list of :class:`Launch` from the tensors of a call and a
:class:`Target`. :func:`run` launches them in order on the current stream. A launch holds all that decides what is
compiled, so it can be compiled for any GPU on a machine that has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """The GPU that launches are made for.

    Args:
        backend: ``"cuda"`` or ``"hip"``.
        arch: compute capability times ten (``80``, ``90``) or AMD's name (``"gfx942"``).
        processors: streaming multiprocessors (compute units).
        shared_memory: bytes that one program may use.
        inline_ptx: whether kernels may use it; not under Triton's interpreter.
    """

    backend: str
    arch: int | str
    processors: int
    shared_memory: int
    inline_ptx: bool = True

    @property
    def name(self) -> str:
        """``sm_90``, ``gfx942``."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def warp_size(self) -> int:
        return 64 if self.name.startswith("gfx9") else 32


# What launches are made for where no device of an architecture is at hand. Processors and shared memory per program:
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 and RDNA3 ISA documents.
TARGETS = {
    target.name: target
    for target in (
        Target("cuda", 80, 108, 166912),  # A100
        Target("cuda", 86, 84, 101376),
        Target("cuda", 89, 142, 101376),  # L40S
        Target("cuda", 90, 132, 232448),  # H100, H200
        Target("cuda", 100, 148, 232448),  # B200
        Target("cuda", 120, 170, 101376),
        Target("hip", "gfx942", 304, 65536, False),  # MI300X
        Target("hip", "gfx1100", 96, 65536, False),
    )
}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Args:
        kernel: the ``triton.jit`` function.
        grid: programs along each axis.
        arguments: run-time arguments by parameter name: tensors, integers and floats, or ``None``.
        constants: ``tl.constexpr`` arguments by parameter name.
        warps, stages: of the software pipeline.
        fuse: whether a product and a sum may become one fused multiply-add.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1
    fuse: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fuse}

    @property
    def signature(self) -> tuple[Any, ...]:
        """What is compiled for it: launches of equal signature run the same code.

        Triton compiles a kernel again for another type of an argument. Unless the kernel forbids it, it does so too for
        an integer that is 1 or divisible by 16, and for an address that is divisible by 16.
        """
        if hasattr(self.kernel, "params"):
            exempt = {p.name for p in self.kernel.params if p.do_not_specialize}
        else:  # the interpreter's
            exempt = set(self.kernel.kwargs["do_not_specialize"] or ())
        arguments = tuple((name, _specialization(value, name in exempt)) for name, value in self.arguments.items())
        return self.kernel.fn.__name__, arguments, *self.constants.items(), *self.options.items()

    def __call__(self) -> None:
        _launched.add(self.kernel)
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def _specialization(value: Any, exempt: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device.type == "meta" or value.data_ptr() % 16 == 0
    if not isinstance(value, int):
        return type(value)
    wide = not -(1 << 31) <= value < 1 << 31
    return (int, wide) if exempt else (int, wide, value == 1, value % 16 == 0)


_launched: set[Any] = set()
_collected: list[Launch] | None = None


def run(launches: Iterable[Launch]) -> None:
    """Launch in order on the current stream of the current device; empty grids are left out."""
    for launch in launches:
        if all(launch.grid):
            if _collected is not None:
                _collected.append(launch)
            else:
                launch()


@contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Within it nothing is launched: the list has what would be. Results of ops are not written."""
    global _collected
    before = _collected
    try:
        _collected = []
        yield _collected
    finally:
        _collected = before


def compilations() -> int:
    """How many kernels this process has compiled, or loaded from Triton's cache on disk, so far."""
    return sum(len(caches[0]) for kernel in _launched for caches in getattr(kernel, "device_caches", {}).values())


@cache
def target_of(device: torch.device) -> Target:
    """The target of a device at hand; under Triton's interpreter, which runs on the CPU, that of an H200."""
    if device.type != "cuda":
        return replace(TARGETS["sm_90"], inline_ptx=False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, properties.multi_processor_count, 65536, False)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 101376))
    return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count, shared)
