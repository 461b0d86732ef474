"""torchao's weight-only layers, on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness.candidate import Candidate, Prepared, on_gpu
from benchmarks.peers.tolerance import gpu_tolerance

GROUP = 128


def torchao(name: str, bits: int, scheme: str, config: Callable[[Any], Any]) -> Candidate:
    """torchao's ``quantize_`` on a bfloat16 ``nn.Linear``."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        ao = importlib.import_module("torchao.quantization")
        layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
        ao.quantize_(layer, config(ao))
        stands_for = layer.weight.dequantize().float()
        nbytes = n * k * bits // 8 + (2 * n * (k // GROUP) * 2 if bits == 4 else 2 * n)
        return Prepared(lambda w, x: w(x), layer, nbytes, stands_for, gpu_tolerance(k))

    return on_gpu(f"torchao {name} bf16", "bf16", prepare, "torchao", bits, scheme)
