"""bitsandbytes: NF4 on a CPU; NF4 and int8 on a GPU. Its own functions quantize, and say what a weight stands for."""

from __future__ import annotations

import importlib

from benchmarks.harness.candidate import BF16, Candidate, Prepared, nbytes, on_gpu, random_weight, require, source
from benchmarks.peers.tolerance import gpu_tolerance

NF4_GROUP = 64


def _prepare_nf4(n: int, k: int, device: str) -> Prepared:
    functional, modules = require("bitsandbytes.functional"), require("bitsandbytes.nn")
    weight = source((n, k)).bfloat16()
    options = {"quant_type": "nf4", "compress_statistics": False}

    layer = modules.Linear4bit(k, n, bias=False, compute_dtype=BF16, **options)
    layer.weight = modules.Params4bit(weight, requires_grad=False, blocksize=NF4_GROUP, module=layer, **options)
    layer = layer.to("cpu").eval()
    codes, state = functional.quantize_4bit(weight, blocksize=NF4_GROUP, **options)
    exact = functional.dequantize_4bit(codes, state).double()
    return Prepared(
        lambda made, x: made(x), layer, codes.numel() + 4 * state.absmax.numel(), exact, tolerance=1e-2, x_dtype=BF16
    )


NF4 = Candidate(
    f"bitsandbytes nf4 g{NF4_GROUP} bf16", _prepare_nf4,
    {"who": "bitsandbytes", "bits": 4, "group": NF4_GROUP, "activations": "bf16"},
)  # fmt: skip


def nf4(dtype: str) -> Candidate:
    """bitsandbytes ``matmul_4bit`` on NF4 in blocks of 64."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        bnb = importlib.import_module("bitsandbytes")
        words, state = bnb.functional.quantize_4bit(
            random_weight(n, k, dtype, device), blocksize=64, quant_type="nf4"
        )  # fmt: skip
        stands_for = bnb.functional.dequantize_4bit(words, state).float()
        return Prepared(
            lambda w, x: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]),
            (words, state), nbytes(words, state.absmax), stands_for, gpu_tolerance(k),
        )  # fmt: skip

    return on_gpu(f"bitsandbytes nf4 g64 {dtype}", dtype, prepare, "bitsandbytes", 4, "nf4")


def int8() -> Candidate:
    """bitsandbytes ``Linear8bitLt`` without outliers: int8 weights per row, int8 activations per token."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        bnb = importlib.import_module("bitsandbytes")
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0)
        weight = random_weight(n, k, "fp16", device).cpu()
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer = layer.to(device).eval()
        codes, peaks = layer.weight.CB, layer.weight.SCB
        stands_for = codes.float() * (peaks.float() / 127)[:, None]
        return Prepared(lambda w, x: w(x), layer, nbytes(codes, peaks), stands_for, gpu_tolerance(k))

    return on_gpu("bitsandbytes int8 fp16, int8 activations", "fp16", prepare, "bitsandbytes", 8, "row", True)
