"""Compile a GPU kernel for any target, on a machine with or without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lowbit.backends.triton.launch import Launch, Target


class OfflineDriver:
    """What Triton asks of a driver before it compiles, answered for a target instead of for a device.

    The device is the target's name, because a ``JITFunction`` keeps what it compiled by device.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> str:
        return self.target.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it, Triton compiles for ``target`` whatever devices there are."""
    before = driver._active
    driver.set_active(OfflineDriver(target))
    try:
        yield
    finally:
        driver._active = before


def check_compiled(kernel: Any) -> None:
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"kernel must be a triton.JITFunction: got {type(kernel).__name__}; TRITON_INTERPRET must be unset before "
            "the kernels are imported"
        )


def compile_launch(launch: Launch, target: Target) -> triton.compiler.CompiledKernel:
    """The code that :meth:`Launch.__call__` would run on a GPU of ``target``.

    It goes through the same ``JITFunction.warmup`` as a launch does, so that arguments are specialised exactly
    as they would be there: ``None``, the value 1 and divisibility by 16, of integers and of addresses.

    Errors:
        RuntimeError: the kernel was made for Triton's interpreter, which compiles nothing.
    """
    check_compiled(launch.kernel)
    with compiling_for(target):
        return launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)
