"""What else computes ``y = x @ W.T`` on a GPU: the vendor's library on dense weights, and other projects if installed.

Other projects' weights are their own packers' work; what they stand for is read back through their own dequantization
where there is one. A peer that is absent, or that fails, is named and gone without.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contenders import DTYPES, Contender, Prepared, frobenius_bound, random_codes

# Peers add up in 16 bits, or round activations in ways that are not modelled here: this shows a weight that was given
# to them in the wrong form, and says nothing about their precision (which is in the rows).
WRONG = 10

GROUP = 128


def _tolerance(k: int) -> float:
    return WRONG * frobenius_bound(torch.bfloat16, k)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def random_weight(n: int, k: int, dtype: str, device: str) -> Tensor:
    return (torch.randn(n, k, device=device) / k**0.5).to(DTYPES[dtype])


def dense(dtype: str) -> Contender:
    """``F.linear``: cuBLAS (hipBLASLt) in the dtype of the activations."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        weight = random_weight(n, k, dtype, device)
        return Prepared(lambda w, x: F.linear(x, w), weight, _nbytes(weight), weight.float(), _tolerance(k))

    return Contender(f"torch {dtype}", dtype, prepare, "dense", 16)


def int4pack() -> Contender:
    """``torch._weight_int4pack_mm``: ``(code - 8) * scale + offset`` per group, bfloat16."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        codes = random_codes(4, n, k, device)
        scales = ((torch.rand(n, k // GROUP, device=device) + 0.5) / 16 / k**0.5).bfloat16()
        offsets = (torch.randn(n, k // GROUP, device=device) / 16 / k**0.5).bfloat16()
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        words = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        table = torch.stack([scales.t(), offsets.t()], dim=-1).contiguous()  # [K / group, N, 2]
        group = torch.arange(k, device=device) // GROUP
        stands_for = (codes.float() - 8) * scales.float()[:, group] + offsets.float()[:, group]
        return Prepared(
            lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1]),
            (words, table), _nbytes(words, table), stands_for, _tolerance(k),
        )  # fmt: skip

    return Contender("torch int4pack g128 bf16", "bf16", prepare, "int4pack", 4, "g128")


def gemlite(bits: int) -> Contender:
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
        nbytes = n * k * bits // 8 + _nbytes(scales, zeros)
        return Prepared(lambda w, x: w(x), layer, nbytes, stands_for, _tolerance(k))

    return Contender(f"GemLite {bits}-bit g128 fp16", "fp16", prepare, "gemlite", bits, "g128")


def bitsandbytes_nf4(dtype: str) -> Contender:
    """bitsandbytes ``matmul_4bit`` on NF4 in blocks of 64."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        bnb = importlib.import_module("bitsandbytes")
        words, state = bnb.functional.quantize_4bit(
            random_weight(n, k, dtype, device), blocksize=64, quant_type="nf4"
        )  # fmt: skip
        stands_for = bnb.functional.dequantize_4bit(words, state).float()
        return Prepared(
            lambda w, x: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]),
            (words, state), _nbytes(words, state.absmax), stands_for, _tolerance(k),
        )  # fmt: skip

    return Contender(f"bitsandbytes nf4 g64 {dtype}", dtype, prepare, "bitsandbytes", 4, "nf4")


def bitsandbytes_int8() -> Contender:
    """bitsandbytes ``Linear8bitLt`` without outliers: int8 weights per row, int8 activations per token."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        bnb = importlib.import_module("bitsandbytes")
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0)
        weight = random_weight(n, k, "fp16", device).cpu()
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer = layer.to(device).eval()
        codes, peaks = layer.weight.CB, layer.weight.SCB
        stands_for = codes.float() * (peaks.float() / 127)[:, None]
        return Prepared(lambda w, x: w(x), layer, _nbytes(codes, peaks), stands_for, _tolerance(k))

    return Contender("bitsandbytes int8 fp16, int8 activations", "fp16", prepare, "bitsandbytes", 8, "row", True)


def torchao(name: str, bits: int, scheme: str, config: Callable[[Any], Any]) -> Contender:
    """torchao's ``quantize_`` on a bfloat16 ``nn.Linear``."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        ao = importlib.import_module("torchao.quantization")
        layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
        ao.quantize_(layer, config(ao))
        stands_for = layer.weight.dequantize().float()
        nbytes = n * k * bits // 8 + (2 * n * (k // GROUP) * 2 if bits == 4 else 2 * n)
        return Prepared(lambda w, x: w(x), layer, nbytes, stands_for, _tolerance(k))

    return Contender(f"torchao {name} bf16", "bf16", prepare, "torchao", bits, scheme)


def all_peers() -> list[Contender]:
    """Every peer, the ones that the bars name first."""
    return [
        dense("fp16"), dense("bf16"), *(gemlite(bits) for bits in (4, 8, 2)), int4pack(),
        bitsandbytes_nf4("fp16"), bitsandbytes_nf4("bf16"), bitsandbytes_int8(),
        torchao("int4 weight-only", 4, "g128", lambda ao: ao.Int4WeightOnlyConfig(group_size=GROUP)),
        torchao("int8 weight-only", 8, "row", lambda ao: ao.Int8WeightOnlyConfig()),
    ]  # fmt: skip


PACKAGES = {"gemlite": "gemlite", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}


def absent(load: Callable[[str], Any] = importlib.import_module) -> dict[str, str]:
    """Family -> why it cannot be imported here."""
    reasons = {}
    for family, package in PACKAGES.items():
        try:
            load(package)
        except Exception as error:  # a broken installation raises anything
            reasons[family] = f"{package} cannot be imported: {type(error).__name__}: {str(error)[:200]}"
    return reasons
