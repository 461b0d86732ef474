"""What `test_packed_linear.py` times: our kernels, and what else computes ``y = x @ W.T`` on this machine.

A candidate turns a float weight ``[N, K]`` into its own form and says which dense weight that form stands
for, so that its result can be checked in float64 before it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.bitpack import pack

GROUP_SIZE = 64


def unchanged(x: Tensor) -> Tensor:
    return x


def int8_per_token(x: Tensor) -> Tensor:
    """``x`` after symmetric int8 quantization of every row, in float64."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    codes = (x.float() * (127 / largest)).round().clamp(-127, 127)
    return codes.double() * (largest.double() / 127)


@dataclass
class Prepared:
    """One weight, ready to be called.

    ``weight`` is everything one call reads, ``nbytes`` its size, ``copy`` makes another (for rotation), and
    ``dense`` the float64 ``[N, K]`` matrix it stands for. ``round_x`` models what happens to the activation.
    ``tolerance`` bounds the relative Frobenius error against ``round_x(x) @ dense.T``.
    """

    call: Callable[[Tensor, Any], Tensor]
    weight: Any
    nbytes: int
    dense: Tensor
    tolerance: float
    copy: Callable[[], Any]
    x_dtype: torch.dtype = torch.float32
    round_x: Callable[[Tensor], Tensor] = unchanged


@dataclass(frozen=True)
class Candidate:
    """A name for tables and a way to prepare a weight; ``prepare`` skips the test where it cannot run."""

    name: str
    prepare: Callable[[Tensor], Prepared]

    def __str__(self) -> str:
        return self.name


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _from_tensors(call: Callable[..., Tensor], weight: tuple[Tensor, ...], dense: Tensor, **options: Any) -> Prepared:
    return Prepared(
        call, weight, _nbytes(weight), dense, copy=lambda: tuple(t.clone() for t in weight), **options
    )  # fmt: skip


def affine(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: uint8 codes ``[N, K]``, float16 scales and uint8 zeros ``[N, G]``."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = 2**bits - 1
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def _expand(t: Tensor, group_size: int) -> Tensor:
    return t.double().repeat_interleave(group_size, dim=1)


@functools.lru_cache(maxsize=1)
def _packed(weight: Tensor, bits: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """(packed, scales, zeros) and the dense weight: the same for both kinds of activations."""
    codes, scales, zeros = affine(weight, bits, GROUP_SIZE)
    dense = (codes.double() - _expand(zeros, GROUP_SIZE)) * _expand(scales, GROUP_SIZE)
    return (pack(codes, bits), scales, zeros), dense


def lowbit_packed(bits: int, int8: bool) -> Candidate:
    def prepare(weight: Tensor) -> Prepared:
        tensors, dense = _packed(weight, bits)

        def call(x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
            return torch.ops.lowbit.packed_linear(
                x, w[0], w[1], w[2], None, None, None, None, None, bits, GROUP_SIZE, int8
            )

        return _from_tensors(
            call, tensors, dense,
            tolerance=1e-5, round_x=int8_per_token if int8 else unchanged,
        )  # fmt: skip

    return Candidate(f"lowbit {bits}-bit g{GROUP_SIZE} {'int8' if int8 else 'float'}", prepare)


def torch_float(dtype: torch.dtype, name: str, tolerance: float) -> Candidate:
    def prepare(weight: Tensor) -> Prepared:
        w = weight.to(dtype)
        return _from_tensors(
            lambda x, w: F.linear(x, w[0]), (w,), w.double(), tolerance=tolerance, x_dtype=dtype
        )  # fmt: skip

    return Candidate(name, prepare)


def _prepare_int4pack(weight: Tensor) -> Prepared:
    n = weight.shape[0]
    if n % 16:
        pytest.skip(f"torch int4pack needs N to be a multiple of 16: N={n}")
    codes, scales, zeros = affine(weight, 4, GROUP_SIZE)
    # its own form is (code - 8) * scale + offset
    offset = (8 - zeros.float()) * scales.float()
    scale_offset = torch.stack([scales.float(), offset], dim=-1).transpose(0, 1).contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    s, o = scale_offset.transpose(0, 1).unbind(-1)
    dense = (codes.double() - 8) * _expand(s, GROUP_SIZE) + _expand(o, GROUP_SIZE)
    return _from_tensors(
        lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], GROUP_SIZE, w[1]),
        (packed, scale_offset), dense, tolerance=8e-3, x_dtype=torch.bfloat16,
    )  # fmt: skip


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1) / 127
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _prepare_int8pack(weight: Tensor) -> Prepared:
    codes, scales = _int8_rows(weight)
    scales = scales.bfloat16()
    return _from_tensors(
        lambda x, w: torch._weight_int8pack_mm(x, w[0], w[1]),
        (codes, scales), codes.double() * scales.double()[:, None], tolerance=8e-3, x_dtype=torch.bfloat16,
    )  # fmt: skip


def torch_dynamic_int8(engine: str) -> Candidate:
    """Per-row int8 weights, activations quantized per tensor when called: coarser than per token."""

    def prepare(weight: Tensor) -> Prepared:
        if engine not in torch.backends.quantized.supported_engines:
            pytest.skip(f"this torch has no quantized engine {engine!r}")
        codes, scales = _int8_rows(weight)
        n = len(scales)
        quantized = torch._make_per_channel_quantized_tensor(
            codes, scales.double(), torch.zeros(n, dtype=torch.long), 0
        )

        def pack_weight() -> Any:
            torch.backends.quantized.engine = engine
            return torch.ops.quantized.linear_prepack(quantized, None)

        return Prepared(
            lambda x, w: torch.ops.quantized.linear_dynamic(x, w, True),
            pack_weight(), codes.numel() + 4 * n, codes.double() * scales.double()[:, None],
            tolerance=3e-2, copy=pack_weight,
        )  # fmt: skip

    return Candidate(f"torch dynamic int8 {engine}", prepare)


def _prepare_nf4(weight: Tensor) -> Prepared:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    modules = pytest.importorskip("bitsandbytes.nn")
    n, k = weight.shape
    source = weight.bfloat16()

    layer = modules.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
    )
    layer.weight = modules.Params4bit(
        source.clone(), requires_grad=False, quant_type="nf4", blocksize=GROUP_SIZE,
        compress_statistics=False, module=layer,
    )  # fmt: skip
    layer = layer.to("cpu").eval()

    codes, state = functional.quantize_4bit(source, blocksize=GROUP_SIZE, quant_type="nf4", compress_statistics=False)
    dense = functional.dequantize_4bit(codes, state).double()
    nbytes = codes.numel() + 4 * state.absmax.numel()
    return Prepared(
        lambda x, w: w(x), layer, nbytes, dense, tolerance=1e-2, copy=lambda: deepcopy(layer), x_dtype=torch.bfloat16
    )  # fmt: skip


CANDIDATES = [
    torch_float(torch.float32, "torch fp32", 1e-5),
    torch_float(torch.bfloat16, "torch bf16", 8e-3),
    *(lowbit_packed(bits, int8) for bits in (2, 3, 4, 8) for int8 in (False, True)),
    Candidate(f"torch int4pack g{GROUP_SIZE} bf16", _prepare_int4pack),
    Candidate("torch int8pack bf16", _prepare_int8pack),
    torch_dynamic_int8("onednn"),
    torch_dynamic_int8("fbgemm"),
    Candidate(f"bitsandbytes nf4 g{GROUP_SIZE} bf16", _prepare_nf4),
]
