"""``liblowbit_cuda.so``, the compiled CUDA C++ kernels: finding and opening it. Importing this opens nothing.

Environment:
    LOWBIT_CUDA_LIBRARY  open this file instead of the one built next to the package
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from lowbit.backends.cpu import native

NAME = "liblowbit_cuda.so"
NAMESPACE = "lowbit_cuda"


def path() -> Path:
    """The library's file, which may not exist."""
    override = os.environ.get("LOWBIT_CUDA_LIBRARY")
    return Path(override) if override else native.path().with_name(NAME)


@cache
def load() -> str | None:
    """Opens the library once. None when it is open, else the reason why it is not."""
    reason = native.load()
    if reason is not None:
        return f"its ops are in the compiled library of the CPU kernels: {reason}"
    file = path()
    if not file.is_file():
        how = "in a checkout, `make cuda` compiles it; so does an installation where nvcc and a GPU are"
        return f"not compiled: there is no {file} ({how})"
    found = str(torch.ops.lowbit_cuda.open(str(file)))
    return f"{file} cannot be loaded: {found}" if found else None


@cache
def architectures() -> tuple[int, ...]:
    """What the open library was compiled for: (80, 90, …); of the emulation, which runs on a CPU, nothing."""
    return tuple(int(number) // 10 for number in str(torch.ops.lowbit_cuda.architectures()).split(",") if number)


@cache
def has(op: str) -> bool:
    """Whether ``op`` has a kernel in this version."""
    key = "CompositeExplicitAutograd"
    known = hasattr(torch.ops.lowbit_cuda, op)  # else torch raises
    return known and bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key))
