"""What calling a layer costs: one row of x, the same weight every time, our layers beside ``nn.Linear``.

8x8 is the cost of the call itself. 768x768 stays in the cache, as it does not in the tables of products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.cpu import ours
from benchmarks.cpu.linear import check, prepare
from benchmarks.harness.candidate import BF16, F32, Candidate, Prepared

SHAPES = [(8, 8), (768, 768)]


def linear(dtype: torch.dtype) -> Candidate:
    def prepare(n: int, k: int, device: str) -> Prepared:
        layer = nn.Linear(k, n, bias=False, dtype=dtype).eval()
        dense = layer.weight.detach().double()
        return Prepared(
            lambda layer, x: layer(x), layer, layer.weight.nbytes, dense,
            tolerance=1e-5 if dtype == F32 else 8e-3, x_dtype=dtype,
        )  # fmt: skip

    name = "nn.Linear fp32" if dtype == F32 else "nn.Linear bf16"
    return Candidate(name, prepare, {"who": "torch", "family": "dense", "activations": name.split()[1]})


CANDIDATES = [
    linear(F32), linear(BF16),
    *(ours.packed(4, "row", kind) for kind in ours.ACTIVATIONS),
    *(ours.codebook(4, "row", kind) for kind in ours.ACTIVATIONS),
    ours.kron((2, 1), F32),
]  # fmt: skip


def test_module_call(measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int) -> None:
    one = prepare(candidate, shape)
    x = torch.randn(1, shape[1]).to(one.x_dtype)
    call = one.bound(one.weight, x)
    check(candidate, one, x, call())
    measure(call, op="module_call", name=candidate.name, shape=f"{shape[0]}x{shape[1]}", m=1, **candidate.facts)
