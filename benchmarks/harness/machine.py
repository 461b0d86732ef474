"""What a figure depends on besides the code: the machine and the versions."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lowbit
from benchmarks.harness import cpu_limits as limits
from lowbit.demo import cpu_model

PACKAGES = ("lowbit", "torch", "transformers", "bitsandbytes", "onnxruntime", "openvino")


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core can use; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = [int(text[:-1]) for path in sizes if (text := path.read_text().strip()).endswith("K")]
    return max(kib, default=32 << 10) << 10


def cold_bytes() -> int:
    """Weights rotated through this many bytes come from memory and not from a cache."""
    return 3 * last_level_cache()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Of the interpreter and of packages; None where one is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def describe() -> dict[str, Any]:
    """Machine and versions, as recorded with every set of results."""
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "last_level_cache_mib": last_level_cache() >> 20,
            "huge_pages": limits.huge_pages(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "backends": [str(backend) for backend in lowbit.backends()],
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": versions(),
    }


def measured_limits(threads: int) -> limits.Limits:
    """One measurement of the machine's limits, out of more memory than its caches hold."""
    return limits.measure(threads, 8 * last_level_cache())


def waited_seconds() -> float:
    """How long this process's threads have been ready to run, waiting for a core; 0 where Linux does not tell."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[1])
    return total / 1e9
