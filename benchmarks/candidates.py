"""What the `test_*_linear.py` time: our kernels, and what else computes ``y = x @ W.T`` on this machine.

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


# Of a relative Frobenius error: that of the output's own rounding, and some room.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def _activations(dtype: torch.dtype, int8: bool) -> str:
    return "int8" if int8 else {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def lowbit_packed(bits: int, int8: bool, dtype: torch.dtype = torch.float32) -> Candidate:
    def prepare(weight: Tensor) -> Prepared:
        tensors, dense = _packed(weight, bits)

        def call(x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
            return torch.ops.lowbit.packed_linear(
                x, w[0], w[1], w[2], None, None, None, None, None, bits, GROUP_SIZE, int8
            )

        return _from_tensors(
            call, tensors, dense, x_dtype=dtype,
            tolerance=TOLERANCE[dtype], round_x=int8_per_token if int8 else unchanged,
        )  # fmt: skip

    return Candidate(f"lowbit {bits}-bit g{GROUP_SIZE} {_activations(dtype, int8)}", prepare)


@functools.lru_cache(maxsize=1)
def _codebook(weight: Tensor, bits: int, scaled: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """(packed, codebook, scales) and the dense weight: NF4-like with scales, else a table per row of random values."""
    generator = torch.Generator().manual_seed(bits)
    n, k = weight.shape
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    table = torch.randn(1 if scaled else n, 1, 1 << bits, generator=generator).half()
    dense = table[:, 0].float().expand(n, -1).gather(1, codes)
    scales = torch.rand(n, k // GROUP_SIZE, generator=generator).half() / k**0.5
    if scaled:
        dense = dense.mul_(scales.float().repeat_interleave(GROUP_SIZE, 1))
    return (pack(codes, bits), table, scales), dense.double()


def lowbit_codebook(bits: int, scaled: bool, int8: bool, dtype: torch.dtype) -> Candidate:
    def prepare(weight: Tensor) -> Prepared:
        (packed, table, scales), dense = _codebook(weight, bits, scaled)

        def call(x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
            return torch.ops.lowbit.codebook_linear(
                x, w[0], w[1], w[2] if scaled else None, None, None, None, None, None, None, None, None,
                bits, GROUP_SIZE if scaled else weight.shape[1], int8, True,
            )  # fmt: skip

        tensors = (packed, table, scales) if scaled else (packed, table)
        # int8: tables are rounded to 16 bits
        tolerance = 1e-4 if int8 and dtype == torch.float32 else TOLERANCE[dtype]
        return _from_tensors(
            call, tensors, dense, x_dtype=dtype, tolerance=tolerance, round_x=int8_per_token if int8 else unchanged
        )

    form = f"codebook g{GROUP_SIZE} scales" if scaled else "codebook per row"
    return Candidate(f"lowbit {bits}-bit {form} {_activations(dtype, int8)}", prepare)


def _factors(a_shape: tuple[int, int], weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random factors [1, N1, K1], [1, N2, K2] of the weight's shape, and their product in float64."""
    generator = torch.Generator().manual_seed(sum(a_shape))
    (n1, k1), (n, k) = a_shape, weight.shape
    a = (torch.randn(1, n1, k1, generator=generator) / k1**0.5).to(dtype)
    b = (torch.randn(1, n // n1, k // k1, generator=generator) / (k // k1) ** 0.5).to(dtype)
    return a, b, torch.kron(a[0].double(), b[0].double())


KronCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def kron_candidate(name: str, call: KronCall, a_shape: tuple[int, int], dtype: torch.dtype) -> Candidate:
    """``call(x, a, b)`` with A of ``a_shape``; skipped where that does not divide the weight."""

    def prepare(weight: Tensor) -> Prepared:
        n, k = weight.shape
        if n % a_shape[0] or k % a_shape[1] or (a_shape == (64, 64) and n != k):
            pytest.skip(f"A {a_shape[0]}x{a_shape[1]} is not for a weight of shape {list(weight.shape)}")
        a, b, dense = _factors(a_shape, weight, dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3
        return _from_tensors(
            lambda x, w: call(x, w[0], w[1]), (a, b), dense, x_dtype=dtype, tolerance=tolerance
        )  # fmt: skip

    return Candidate(f"{name} {a_shape[0]}x{a_shape[1]} {_activations(dtype, False)}", prepare)


def _lowbit_kron(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    sizes = (*a.shape, *b.shape[1:])
    return torch.ops.lowbit.kron_linear(x, a, None, None, b, None, None, None, None, None, *sizes, 0, 0, 0, 0)


def _two_matmuls_b_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    t = x.view(len(x), a.shape[2], -1) @ b[0].t()
    return torch.matmul(a[0], t).flatten(1)


def _two_matmuls_a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    t = torch.matmul(a[0], x.view(len(x), a.shape[2], -1))
    return (t @ b[0].t()).flatten(1)


def _einsum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nk,mkj,lj->mnl", a[0], x.view(len(x), a.shape[2], -1), b[0]).flatten(1)


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


F32, BF16 = torch.float32, torch.bfloat16
DENSE = [torch_float(F32, "torch fp32", 1e-5), torch_float(BF16, "torch bf16", 8e-3)]
NF4 = Candidate(f"bitsandbytes nf4 g{GROUP_SIZE} bf16", _prepare_nf4)

PACKED = [
    *DENSE,
    *(lowbit_packed(bits, int8) for bits in (2, 3, 4, 8) for int8 in (False, True)),
    Candidate(f"torch int4pack g{GROUP_SIZE} bf16", _prepare_int4pack),
    Candidate("torch int8pack bf16", _prepare_int8pack),
    torch_dynamic_int8("onednn"),
    torch_dynamic_int8("fbgemm"),
    NF4,
]

CODEBOOK = [
    *DENSE,
    NF4,
    *(lowbit_codebook(4, True, int8, dtype) for int8, dtype in ((False, BF16), (False, F32), (True, F32))),
    *(
        lowbit_codebook(bits, False, int8, dtype)
        for bits in (4, 3, 2, 8) for int8, dtype in ((False, BF16), (False, F32), (True, F32))
    ),
    *(lowbit_packed(4, int8, dtype) for int8, dtype in ((False, BF16), (False, F32), (True, F32))),
]  # fmt: skip

KRON = [
    *DENSE,
    *(
        kron_candidate(name, call, shape, dtype)
        for dtype in (F32, BF16)
        for shape in ((2, 1), (1, 2), (64, 64))
        for name, call in (
            ("lowbit kron", _lowbit_kron), ("torch B first", _two_matmuls_b_first),
            ("torch A first", _two_matmuls_a_first), ("torch einsum", _einsum),
        )
    ),
]  # fmt: skip
