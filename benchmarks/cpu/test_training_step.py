"""A step of training: the time and peak memory of forward and backward of our layers beside ``nn.Linear``'s."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cpu import training
from benchmarks.cpu.training import STEPS, Step
from benchmarks.harness import machine
from benchmarks.harness.candidate import DTYPE_NAMES, relative_error

CANDIDATES = STEPS
MS = [256, 1024]
ALL_MS = [256, 512, 1024, 2048]
SHAPES = [(4096, 4096), (1024, 1024)]
ALL_SHAPES = [*SHAPES, (4096, 11008), (11008, 4096)]
MAX_COPIES = 48
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@functools.lru_cache(maxsize=1)
def copies(one: Step, shape: tuple[int, int]) -> list[Any]:
    """As many layers as are larger than the cache, together."""
    first = one.layer(*shape)
    size = sum(t.nbytes for t in (*first.parameters(), *first.buffers()))
    count = min(MAX_COPIES, math.ceil(machine.cold_bytes() / size))
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def check(one: Step, layer: Any, x: torch.Tensor, dy: torch.Tensor) -> None:
    """What is wrong is not timed."""
    weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.dequantize(torch.float32)
    assert x.grad is not None
    off = relative_error(x.grad[:8], dy[:8].double() @ weight.detach().double())
    assert off <= TOLERANCE[one.dtype], f"{one} is wrong: relative error {off:.1e} of the gradient of x"
    assert (one.trained is not None) == any(p.grad is not None for p in layer.parameters())


def test_training_step(
    measure: Callable[..., None], candidate: Step, shape: tuple[int, int], threads: int, m: int
) -> None:
    with torch.inference_mode(False):
        x, dy = training.inputs(*shape, m, candidate.dtype)
        layers = copies(candidate, shape)
        training.step(layers[0], x, dy)
        check(candidate, layers[0], x, dy)
        peak = training.peak_bytes(candidate, *shape, m, threads)
        turn = itertools.cycle(layers)
        measure(
            lambda: training.step(next(turn), x, dy), op="training_step", name=candidate.name,
            shape="x".join(map(str, shape)), m=m, peak_mib=round(peak / 2**20, 1), baseline=candidate.baseline,
            activations=DTYPE_NAMES[candidate.dtype], who=candidate.name.split()[0], trained=candidate.trained,
            family="training", **candidate.facts,
        )  # fmt: skip
