"""Which GPU and versions, and what the GPU can do at best, as measured on it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.clock import GpuClock

PACKAGES = ("lowbit", "torch", "triton", "gemlite", "bitsandbytes", "torchao", "pytest", "pytest-xdist", "matplotlib")
SMI = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu", "persistence_mode", "mig.mode.current", "ecc.mode.current",
)  # fmt: skip
PROPERTIES = (
    "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin",
)  # fmt: skip
COPY_BYTES = 1 << 30
MATRIX = 8192


def device_name() -> str | None:
    """Of the current CUDA (or ROCm) device; None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def described() -> dict[str, Any]:
    """The device, its driver and clocks as they are found, and the versions of what runs on it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "properties": {name: getattr(properties, name, None) for name in PROPERTIES},
        "nvidia_smi": smi(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def versions() -> dict[str, str | None]:
    """Of the interpreter and of every package that has a say here; None where it is absent."""
    found = machine.versions(PACKAGES)
    return {**found, "torch": torch.__version__, "triton": found["triton"] or _triton_version()}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def smi() -> dict[str, str]:
    """What nvidia-smi says about the first GPU; empty where it is absent or refuses."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (value.strip() for value in line.split(",")), strict=False))


def measured(timer: GpuClock) -> tuple[dict[str, float], list[str]]:
    """Every limit by name, and what could not be measured."""
    limits: dict[str, float] = {}
    problems: list[str] = []
    for name, measure in LIMITS.items():
        try:
            limits[name] = float(f"{measure(timer):.4g}")
        except Exception as error:  # one limit that this device refuses must not cost the others
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.empty_cache()
    return limits, problems


def copy_gb_s(timer: GpuClock) -> float:
    """Bytes read and written by a copy inside the device, per second."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timer.in_graph([lambda: target.copy_(source)]) / 1e3


def read_gb_s(timer: GpuClock) -> float:
    """Bytes read by a sum, per second."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    return COPY_BYTES / timer.in_graph([lambda: source.sum()]) / 1e3


def matrix_tflop_s(dtype: torch.dtype, timer: GpuClock) -> float:
    # random numbers: zeros draw less power, and so clock higher
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * MATRIX**3 / timer.in_graph([lambda: torch.mm(a, b.t(), out=out)]) / 1e6


def int8_top_s(timer: GpuClock) -> float:
    """Of an int8 matrix product with int32 sums by the vendor's library."""
    a, b = (torch.randint(-128, 128, (MATRIX, MATRIX), dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * MATRIX**3 / timer.in_graph([lambda: torch._int_mm(a, b.t())]) / 1e6


def launch_us_in_graph(timer: GpuClock) -> float:
    """Of an empty Triton kernel inside a graph."""
    launch = _empty_kernel()
    return timer.in_graph([launch] * 100)


def launch_us_eager(timer: GpuClock, launches: int = 2000) -> float:
    """Of an empty Triton kernel launched from Python, one after the other: the cost on the CPU's side."""
    launch = _empty_kernel()
    launch()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        launch()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / launches


def _empty_kernel() -> Callable[[], Any]:
    from benchmarks.harness.empty import empty

    x = torch.zeros(16, device="cuda")
    return lambda: empty[(1,)](x, num_warps=1, enable_fp_fusion=True)


LIMITS: dict[str, Callable[[GpuClock], float]] = {
    "copy_gb_s": copy_gb_s,
    "read_gb_s": read_gb_s,
    "bf16_tflop_s": partial(matrix_tflop_s, torch.bfloat16),
    "fp16_tflop_s": partial(matrix_tflop_s, torch.float16),
    "int8_top_s": int8_top_s,
    "launch_us_in_graph": launch_us_in_graph,
    "launch_us_eager": launch_us_eager,
}
