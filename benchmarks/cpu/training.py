"""Layers in a step of training, forward and backward, and the peak memory of a process that makes one.

    python -m benchmarks.cpu.training NAME N K M THREADS     prints that peak, in bytes
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import layers
from benchmarks.harness.candidate import DTYPE_NAMES, DTYPES, F32
from benchmarks.models.memory import status
from lowbit import PackedWeight, train
from lowbit.codebook.module import CodebookLinear
from lowbit.kron.format import KroneckerWeight
from lowbit.kron.module import KroneckerLinear
from lowbit.packed.module import PackedLinear

ROOT = Path(__file__).resolve().parents[2]
OUTLIERS = 0.005


@dataclass(frozen=True, eq=False)
class Step:
    """A layer of which some part is trained. ``make``: ``(N, K, dtype) -> layer``; ``trained``: None, or which part."""

    name: str
    make: Callable[[int, int, torch.dtype], nn.Module]
    dtype: torch.dtype = F32
    trained: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def baseline(self) -> str:
        """The dense layer that it is held against."""
        return dense(self.dtype, self.trained is not None).name

    def layer(self, n: int, k: int) -> nn.Module:
        made = self.make(n, k, self.dtype)
        if isinstance(made, nn.Linear):
            return made.requires_grad_(self.trained is not None)
        if self.trained:
            train.trainable(made, self.trained)
        return made


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """What is timed: gradients of x and of what is trained."""
    for t in (x, *layer.parameters()):
        t.grad = None
    layer(x).backward(dy)


def inputs(n: int, k: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=g).to(dtype).requires_grad_()
    return x, torch.randn(m, n, generator=g).to(dtype)


def dense(dtype: torch.dtype, trained: bool) -> Step:
    def make(n: int, k: int, dtype: torch.dtype) -> nn.Module:
        return nn.Linear(k, n, bias=False, dtype=dtype)

    name = f"torch {DTYPE_NAMES[dtype]} {'trained' if trained else 'frozen'}"
    return Step(name, make, dtype, "weight" if trained else None)


def packed(bits: int, group: int | None, dtype: torch.dtype, trained: str | None = None) -> Step:
    form = f"{bits}-bit {'row' if group is None else f'g{group}'}"

    def make(n: int, k: int, dtype: torch.dtype) -> nn.Module:
        weight, _ = layers.packed_weight(n, k, bits, group, "cpu", F32 if group is None else torch.float16, True)
        if trained == "outliers":
            weight = _with_outliers(weight, n, k)
        return PackedLinear.from_weight(weight, dtype=dtype)

    return Step(f"lowbit {form} {trained or 'frozen'} {DTYPE_NAMES[dtype]}", make, dtype, trained, {"bits": bits})


def _with_outliers(weight: PackedWeight, n: int, k: int) -> PackedWeight:
    """As many in each row, at random places."""
    each = max(1, round(OUTLIERS * k))
    columns = torch.rand(n, k).topk(each, 1).indices.sort(1).values.flatten()
    return replace(
        weight, outlier_values=torch.randn(n * each) / k**0.5, outlier_rows=(torch.arange(n + 1) * each).int(),
        outlier_columns=columns.to(torch.int16 if k <= 32768 else torch.int32),
    )  # fmt: skip


def codebook(bits: int, scheme: str, dtype: torch.dtype, gradient: str = "sum") -> Step:
    def make(n: int, k: int, dtype: torch.dtype) -> nn.Module:
        weight, _ = layers.codebook_weight(n, k, bits, scheme, "cpu")
        layer = CodebookLinear.from_weight(weight, dtype=dtype)
        layer.centroid_gradient = gradient
        return layer

    title = f"lowbit {bits}-bit codebook {scheme} centroids, {gradient}, {DTYPE_NAMES[dtype]}"
    return Step(title, make, dtype, "centroids", {"bits": bits})


def kron(dtype: torch.dtype) -> Step:
    def make(n: int, k: int, dtype: torch.dtype) -> nn.Module:
        a, b = torch.randn(1, n // 2, k).to(dtype) / k**0.5, torch.randn(1, 2, 1).to(dtype)
        return KroneckerLinear.from_weight(KroneckerWeight(a, b), dtype=dtype)

    return Step(f"lowbit kron factors {DTYPE_NAMES[dtype]}", make, dtype, "factors")


def every(dtype: torch.dtype) -> list[Step]:
    return [
        dense(dtype, False), packed(4, 128, dtype), packed(8, None, dtype),
        dense(dtype, True), packed(4, None, dtype, "outliers"), codebook(4, "tensor", dtype),
        codebook(4, "tensor", dtype, "mean"), codebook(3, "row", dtype), packed(4, 128, dtype, "scales"), kron(dtype),
    ]  # fmt: skip


STEPS = [each for name in ("fp32", "bf16") for each in every(DTYPES[name])]


def peak_bytes(one: Step, n: int, k: int, m: int, threads: int) -> int:
    """Resident memory that a process needs for the layer, x, dy and one step, beyond what it has before."""
    command = [sys.executable, "-m", "benchmarks.cpu.training", one.name, *map(str, (n, k, m, threads))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(name: str, n: int, k: int, m: int, threads: int) -> None:
    torch.set_num_threads(threads)
    one = next(each for each in STEPS if each.name == name)
    small = one.layer(64, 128)
    step(small, *inputs(64, 128, 8, one.dtype))  # what is loaded and started once
    before = status("VmRSS")
    layer = one.layer(n, k)
    x, dy = inputs(n, k, m, one.dtype)
    _reset_peak()
    step(layer, x, dy)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
