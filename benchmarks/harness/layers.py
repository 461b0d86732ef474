"""Our layers as candidates on any device: of random numbers, which need no quantizing, and called as modules."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lowbit
from benchmarks.harness.candidate import (
    DTYPE_NAMES,
    DTYPES,
    F16,
    F32,
    Candidate,
    Prepared,
    int8_per_token,
    random_codes,
)
from lowbit.nn.layer import Layer
from lowbit.testing.numerics import frobenius_bound


def another(layer: Layer) -> Layer:
    """A layer with the same values and memory of its own, arranged for the kernels on this device."""
    new = type(layer)(layer.format, dtype=layer.dtype)
    new.load_state_dict(layer.state_dict())
    return new.prepare().eval()


def layer_nbytes(layer: Layer) -> int:
    return sum(t.nbytes for t in layer.named_tensors().values())


def from_layer(layer: Any, dense: Tensor, dtype: str, int8: bool = False, **options: Any) -> Prepared:
    """``dtype`` of x, which is rounded to ``int8``."""
    options = {"round_x": int8_per_token, **options} if int8 else options
    options = {"tolerance": frobenius_bound(DTYPES[dtype], dense.shape[1]), **options}
    return Prepared(
        lambda layer, x: layer(x), layer, layer_nbytes(layer), dense, x_dtype=DTYPES[dtype], bind=functools.partial,
        **options,
    )  # fmt: skip


def packed_weight(
    n: int, k: int, bits: int, group_size: int | None, device: str, scales: torch.dtype = F16, centered: bool = False
) -> tuple[lowbit.PackedWeight, Tensor]:
    """``(code - zero) * scale`` with integer zeros, and the exact dense weight.

    ``centered``: zeros next to the mean of the codes, so that the sum of x hardly shows and errors are those of trained
    weights; otherwise any.
    """
    groups = 1 if group_size is None else math.ceil(k / group_size)
    codes = random_codes(bits, n, k, device)
    scale = ((torch.rand(n, groups, device=device) + 0.5) / (1 << bits) / k**0.5).to(scales)
    zeros = random_codes(bits, n, groups, device)
    if centered:
        zeros = zeros % 2 + ((1 << bits - 1) - 1)
    group = torch.arange(k, device=device) // (group_size or k)
    exact = torch.float64 if scales == F32 else F32  # 8 + 11 bits
    dense = (codes.to(exact) - zeros.to(exact)[:, group]) * scale.to(exact)[:, group]
    return lowbit.PackedWeight(codes, scale, zeros, bits, group_size), dense


def codebook_weight(
    n: int, k: int, bits: int, scheme: str, device: str, group_size: int | None = None
) -> tuple[lowbit.CodebookWeight, Tensor]:
    """A table per ``"row"`` or ``"tensor"``, or ``"nf4"``'s; with a group size float16 scales, and the dense weight."""
    codes = random_codes(bits, n, k, device)
    if scheme == "nf4":
        table = torch.tensor(lowbit.Codebook(table="nf4").values, device=device).view(1, 1, -1)
    else:
        size = 1 if group_size else k**0.5
        table = (torch.randn(n if scheme == "row" else 1, 1, 1 << bits, device=device) / size).half()
    dense = table[:, 0].float().expand(n, -1).gather(1, codes.long())
    if group_size is None:
        return lowbit.CodebookWeight(codes, table), dense
    scales = (torch.rand(n, math.ceil(k / group_size), device=device) + 0.5).half() / k**0.5
    dense *= scales.float().repeat_interleave(group_size, 1)[:, :k]
    return lowbit.CodebookWeight(codes, table, scales, group_size), dense


def kron_factors(n: int, k: int, a: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random factors ``[1, N1, K1]`` and ``[1, N2, K2]``, and their product, exact for 16-bit ones: 11 + 11 bits."""
    n1, k1 = a
    first = (torch.randn(1, n1, k1, device=device) / k1**0.5).to(dtype)
    second = (torch.randn(1, n // n1, k // k1, device=device) / (k // k1) ** 0.5).to(dtype)
    exact = torch.float64 if dtype == F32 else F32
    return first, second, torch.kron(first[0].to(exact), second[0].to(exact))


def kron_fits(a: tuple[int, int], n: int, k: int) -> bool:
    return not n % a[0] and not k % a[1]


def kron_candidate(who: str, a: tuple[int, int], dtype: torch.dtype, prepare: Callable[..., Prepared]) -> Candidate:
    """On a CPU, of a name that says whose it is and how; ``prepare(A, B, dense, **options)``."""

    def prepared(n: int, k: int, device: str) -> Prepared:
        first, second, dense = kron_factors(n, k, a, dtype, device)
        # two products: in bfloat16 what lies between them is rounded too
        tolerance = 1e-5 if dtype == F32 else 8e-3
        return prepare(first, second, dense, tolerance=tolerance, operations=kron_operations(first, second))

    name = DTYPE_NAMES[dtype]
    facts = {"who": who.split()[0], "family": "kron", "a": list(a), "activations": name}

    def fits(n: int, k: int) -> bool:
        return kron_fits(a, n, k) and (a != (64, 64) or n == k)

    return Candidate(f"{who} {a[0]}x{a[1]} {name}", prepared, facts, fits=fits)


def kron_operations(a: Tensor, b: Tensor) -> int:
    """Per row of x, of the better order of the two products."""
    (n1, k1), (n2, k2) = a.shape[1:], b.shape[1:]
    return 2 * min(k1 * n2 * (k2 + n1), n1 * k2 * (k1 + n2))
