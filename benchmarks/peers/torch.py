"""PyTorch: dense layers, quantized ones, and Kronecker products of its own operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.candidate import (
    BF16,
    DTYPE_NAMES,
    F32,
    Candidate,
    Prepared,
    Unavailable,
    affine,
    expand,
    from_tensors,
    nbytes,
    on_gpu,
    random_codes,
    random_weight,
    source,
)  # fmt: skip
from benchmarks.harness.layers import kron_candidate
from benchmarks.peers.tolerance import gpu_tolerance

TOLERANCE = {F32: 1e-5, BF16: 8e-3}
INT4_GROUP = 128


def dense(dtype: torch.dtype) -> Candidate:
    """``F.linear``: the baseline."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        w = source((n, k)).to(dtype)
        return from_tensors(F.linear, (w,), w.double(), tolerance=TOLERANCE[dtype], x_dtype=dtype)

    name = DTYPE_NAMES[dtype]
    return Candidate(f"torch {name}", prepare, {"who": "torch", "family": "dense", "activations": name})


def prepacked(dtype: torch.dtype) -> Candidate:
    """oneDNN with the weight in its own blocked layout, chosen for M, as torch.compile's freezing makes it."""

    def prepare(n: int, k: int, device: str, m: int) -> Prepared:
        if not torch.backends.mkldnn.is_available():
            raise Unavailable("this torch has no oneDNN")
        w = source((n, k)).to(dtype)
        make = functools.partial(torch.ops.mkldnn._reorder_linear_weight, w, m)
        return Prepared(
            lambda made, x: torch.ops.mkldnn._linear_pointwise(x, made, None, "none", [], ""),
            make(), w.nbytes, w.double(), TOLERANCE[dtype], x_dtype=dtype, make=make,
        )  # fmt: skip

    name = DTYPE_NAMES[dtype]
    facts = {"who": "torch", "family": "dense", "activations": name, "prepacked": True}
    return Candidate(f"torch {name} prepacked", prepare, facts, needs=("m",))


def _prepare_int4pack(n: int, k: int, device: str) -> Prepared:
    codes, scales, zeros = affine(source((n, k)), 4, INT4_GROUP)
    # its own form is (code - 8) * scale + offset
    offset = (8 - zeros.float()) * scales.float()
    scale_offset = torch.stack([scales.float(), offset], dim=-1).transpose(0, 1).contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    s, o = scale_offset.transpose(0, 1).unbind(-1)
    exact = (codes.double() - 8) * expand(s, INT4_GROUP) + expand(o, INT4_GROUP)
    return from_tensors(
        lambda x, w, so: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, INT4_GROUP, so),
        (packed, scale_offset), exact, tolerance=8e-3, x_dtype=BF16,
    )  # fmt: skip


def _int8_rows(n: int, k: int) -> tuple[Tensor, Tensor]:
    weight = source((n, k))
    scales = weight.abs().amax(dim=1) / 127
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _prepare_int8pack(n: int, k: int, device: str) -> Prepared:
    codes, scales = _int8_rows(n, k)
    scales = scales.bfloat16()
    return from_tensors(
        torch._weight_int8pack_mm,
        (codes, scales), codes.double() * scales.double()[:, None], tolerance=8e-3, x_dtype=BF16,
    )  # fmt: skip


def dynamic_int8(engine: str) -> Candidate:
    """Per-row int8 weights, activations quantized per tensor when called: coarser than per token."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        if engine not in torch.backends.quantized.supported_engines:
            raise Unavailable(f"this torch has no quantized engine {engine!r}")
        codes, scales = _int8_rows(n, k)
        quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), torch.zeros(n).long(), 0)

        def make() -> Any:
            torch.backends.quantized.engine = engine
            return torch.ops.quantized.linear_prepack(quantized, None)

        return Prepared(
            lambda made, x: torch.ops.quantized.linear_dynamic(x, made, True), make(),
            codes.numel() + 4 * n, codes.double() * scales.double()[:, None], tolerance=3e-2, make=make,
        )  # fmt: skip

    return Candidate(f"torch dynamic int8 {engine}", prepare, _facts(8, "row", "int8"))


def _facts(bits: int, group: int | str, activations: str) -> dict[str, Any]:
    return {"who": "torch", "bits": bits, "group": group, "activations": activations}


DENSE = [dense(F32), dense(BF16)]
PREPACKED = [prepacked(F32), prepacked(BF16)]
QUANTIZED = [
    Candidate(
        f"torch int4pack g{INT4_GROUP} bf16",
        _prepare_int4pack,
        _facts(4, INT4_GROUP, "bf16"),
        fits=lambda n, k: not n % 16 and not k % INT4_GROUP,
    ),
    Candidate("torch int8pack row bf16", _prepare_int8pack, _facts(8, "row", "bf16")),
    dynamic_int8("onednn"),
    dynamic_int8("fbgemm"),
]


# ------------------------------------------------------------------------------------------- Kronecker products


def _b_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    t = x.view(len(x), a.shape[2], -1) @ b[0].t()
    return torch.matmul(a[0], t).flatten(1)


def _a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    t = torch.matmul(a[0], x.view(len(x), a.shape[2], -1))
    return (t @ b[0].t()).flatten(1)


def _einsum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nk,mkj,lj->mnl", a[0], x.view(len(x), a.shape[2], -1), b[0]).flatten(1)


KRON_CALLS: dict[str, Callable[..., Tensor]] = {"B first": _b_first, "A first": _a_first, "einsum": _einsum}


def kron(how: str, a: tuple[int, int], dtype: torch.dtype) -> Candidate:
    """``(A ⊗ B) x`` written with torch's own products."""

    def prepare(first: Tensor, second: Tensor, exact: Tensor, **options: Any) -> Prepared:
        return from_tensors(KRON_CALLS[how], (first, second), exact, x_dtype=dtype, **options)

    return kron_candidate(f"torch {how}", a, dtype, prepare)


# ----------------------------------------------------------------------------------------------------- on a GPU


def dense_on_gpu(dtype: str) -> Candidate:
    """``F.linear``: cuBLAS (hipBLASLt) in the dtype of the activations."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        weight = random_weight(n, k, dtype, device)
        return Prepared(lambda w, x: F.linear(x, w), weight, nbytes(weight), weight.float(), gpu_tolerance(k))

    return on_gpu(f"torch {dtype}", dtype, prepare, "dense", 16)


def int4pack_on_gpu() -> Candidate:
    """``torch._weight_int4pack_mm``: ``(code - 8) * scale + offset`` per group, bfloat16."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        codes = random_codes(4, n, k, device)
        scales = ((torch.rand(n, k // INT4_GROUP, device=device) + 0.5) / 16 / k**0.5).bfloat16()
        offsets = (torch.randn(n, k // INT4_GROUP, device=device) / 16 / k**0.5).bfloat16()
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        words = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        table = torch.stack([scales.t(), offsets.t()], dim=-1).contiguous()  # [K / group, N, 2]
        group = torch.arange(k, device=device) // INT4_GROUP
        stands_for = (codes.float() - 8) * scales.float()[:, group] + offsets.float()[:, group]
        return Prepared(
            lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], INT4_GROUP, w[1]),
            (words, table), nbytes(words, table), stands_for, gpu_tolerance(k),
        )  # fmt: skip

    return on_gpu("torch int4pack g128 bf16", "bf16", prepare, "int4pack", 4, "g128")
