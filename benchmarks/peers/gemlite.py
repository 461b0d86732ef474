"""GemLite, Triton kernels for a GPU. Its packer makes the weights."""

from __future__ import annotations

import importlib

import torch

from benchmarks.harness.candidate import Candidate, Prepared, nbytes, on_gpu, random_codes
from benchmarks.peers.tolerance import gpu_tolerance

GROUP = 128


def gemlite(bits: int) -> Candidate:
    """GemLite's ``GemLiteLinearTriton``: ``(code - zero) * scale`` per group, float16."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        core = importlib.import_module("gemlite.core")
        codes = random_codes(bits, n, k, device)
        scales = ((torch.rand(n, k // GROUP, device=device) + 0.5) / (1 << bits) / k**0.5).half()
        zeros = torch.randint(0, 1 << bits, scales.shape, device=device).half()
        layer = core.GemLiteLinearTriton(
            bits, group_size=GROUP, in_features=k, out_features=n,
            input_dtype=core.DType.FP16, output_dtype=core.DType.FP16,
        )  # fmt: skip
        layer.pack(codes, scales.view(-1, 1), zeros.view(-1, 1), bias=None)
        group = torch.arange(k, device=device) // GROUP
        stands_for = (codes.float() - zeros.float()[:, group]) * scales.float()[:, group]
        size = n * k * bits // 8 + nbytes(scales, zeros)
        return Prepared(lambda w, x: w(x), layer, size, stands_for, gpu_tolerance(k))

    return on_gpu(f"GemLite {bits}-bit g128 fp16", "fp16", prepare, "gemlite", bits, "g128")
