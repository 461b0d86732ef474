"""This package's formats on a GPU: random numbers, which need no quantizing, in a layer's own form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import lowbit
from benchmarks.harness.candidate import DTYPES, Candidate, Prepared, int8_per_token, on_gpu, random_codes
from lowbit.backends import registry
from lowbit.testing.numerics import frobenius_bound


def fallback() -> list[str]:
    """The problem, if there is one, that this package's ops do not run its kernels on the GPU."""
    if registry.active_backend("cuda") != "reference":
        return []
    return [f"the torch reference ran, not the kernels: {registry.why_unavailable('triton')}"]


def _of_layer(layer: Any, dense: Tensor, dtype: str, device: str, *, int8: bool = False) -> Prepared:
    layer = layer.to(device)
    tolerance = frobenius_bound(DTYPES[dtype], dense.shape[1])
    round_x = int8_per_token if int8 else torch.Tensor.double
    return Prepared(lambda layer, x: layer(x), layer, layer.format.nbytes, dense, tolerance, round_x)


def packed(bits: int, group_size: int | None, dtype: str, int8: bool = False) -> Candidate:
    """``(code - zero) * scale`` with float16 scales and integer zeros."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        groups = 1 if group_size is None else math.ceil(k / group_size)
        codes = random_codes(bits, n, k, device)
        scales = ((torch.rand(n, groups, device=device) + 0.5) / (1 << bits) / k**0.5).half()
        zeros = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, device=device)
        group = torch.arange(k, device=device) // (group_size or k)
        dense = (codes.float() - zeros.float()[:, group]) * scales.float()[:, group]
        weight = lowbit.PackedWeight(codes, scales, zeros, bits, group_size)
        layer = lowbit.PackedLinear.from_weight(
            weight, activations="int8" if int8 else "float", dtype=DTYPES[dtype]
        )  # fmt: skip
        return _of_layer(layer, dense, dtype, device, int8=int8)

    scheme = f"g{group_size}" if group_size else "row"
    name = f"lowbit {bits}-bit {scheme} {dtype}" + ", int8 activations" * int8
    return on_gpu(name, dtype, prepare, "packed", bits, scheme, int8, lambda n, k: k >= (group_size or 1))


def codebook(bits: int, scheme: str, dtype: str) -> Candidate:
    """A table per ``"row"`` or ``"tensor"``, or ``"nf4"``: one table, and float16 scales per group of 64."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        codes = random_codes(bits, n, k, device)
        scales = None
        if scheme == "nf4":
            table = torch.tensor(lowbit.Codebook(table="nf4").values, device=device).view(1, 1, -1)
            scales = (torch.rand(n, math.ceil(k / 64), device=device) + 0.5).half() / k**0.5
        else:
            table = (torch.randn(n if scheme == "row" else 1, 1, 1 << bits, device=device) / k**0.5).half()
        dense = table[:, 0].float().expand(n, -1).gather(1, codes.long())
        if scales is not None:
            dense *= scales.float().repeat_interleave(64, 1)[:, :k]
        weight = lowbit.CodebookWeight(codes, table, scales, 64 if scheme == "nf4" else None)
        layer = lowbit.CodebookLinear.from_weight(weight, dtype=DTYPES[dtype])
        return _of_layer(layer, dense, dtype, device)

    name = f"lowbit {bits}-bit codebook {scheme} {dtype}"
    return on_gpu(name, dtype, prepare, "codebook", bits, scheme, fits=lambda n, k: k >= 64 or scheme != "nf4")


def kron(shape_a: tuple[int, int], dtype: str) -> Candidate:
    """``A ⊗ B`` with A of this shape, both in the dtype of the activations."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        (n1, k1), (n2, k2) = shape_a, (n // shape_a[0], k // shape_a[1])
        a = (torch.randn(1, n1, k1, device=device) / k1**0.5).to(DTYPES[dtype])
        b = (torch.randn(1, n2, k2, device=device) / k2**0.5).to(DTYPES[dtype])
        # torch.kron needs no more memory than its result, which is exact in float32: 11 + 11 bits
        dense = torch.kron(a[0].float(), b[0].float())
        layer = lowbit.KroneckerLinear.from_weight(lowbit.KroneckerWeight(a, b), dtype=DTYPES[dtype])
        return _of_layer(layer, dense, dtype, device)

    scheme = f"{shape_a[0]}x{shape_a[1]}"

    def fits(n: int, k: int) -> bool:
        return not n % shape_a[0] and not k % shape_a[1]

    return on_gpu(f"lowbit kron {scheme} {dtype}", dtype, prepare, "kron", None, scheme, fits=fits)


def all_formats() -> list[Candidate]:
    """Every format of this package that is timed, the ones that matter most first."""
    found = [packed(bits, group, "fp16") for group in (128, None) for bits in (4, 8, 2, 3, 5, 6, 7)]
    found += [codebook(bits, "row", "fp16") for bits in (4, 3, 2, 8)]
    found += [codebook(4, "nf4", "fp16"), *(codebook(bits, "tensor", "fp16") for bits in (4, 3, 2, 8))]
    found += [kron(shape, dtype) for shape in ((64, 64), (2, 1), (1, 2)) for dtype in ("fp16", "bf16")]
    found += [packed(bits, 128, dtype, int8=True) for dtype in ("fp16", "bf16") for bits in (4, 8)]
    found += [packed(bits, group, "bf16") for group in (128, None) for bits in (4, 8, 2, 3, 5, 6, 7)]
    found += [codebook(bits, "row", "bf16") for bits in (4, 3, 2, 8)]
    return [*found, codebook(4, "nf4", "bf16")]
