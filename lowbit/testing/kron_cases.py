"""Cases of family ``kron``: random factors of every kind × shapes, and their product in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import registry
from lowbit.backends.cpu import native
from lowbit.core.bitpack import pack
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import DTYPES
from lowbit.testing.where import call


@dataclass(frozen=True)
class Kind:
    """What a factor is made of: dense values of ``dtype``, or codes of ``bits`` bits with scales of it."""

    dtype: torch.dtype = torch.float32
    bits: int = 0
    group_size: int | None = None  # None: one group per row
    per_tensor: bool = False
    zeros: str = "none"  # "int", "float"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if not self.bits:
            return name
        groups = "tensor" if self.per_tensor else f"g{self.group_size}" if self.group_size else "row"
        return f"{self.bits}-bit-{groups}-{self.zeros}-{name}"


DENSE = tuple(Kind(dtype) for dtype in DTYPES)


@dataclass
class Factor:
    kind: Kind
    tensor: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    values: Tensor  # float64 [R, n, k]: what the kernels must take it for
    codes: Tensor | None = None  # [R * n, k]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.tensor, self.scales, self.zeros

    @property
    def numbers(self) -> tuple[int, int]:
        """bits and group_size, as the ops take them."""
        k = self.values.shape[2]
        return self.kind.bits, min(self.kind.group_size or k, k) if self.kind.bits else 0


def random_factor(kind: Kind, rank: int, n: int, k: int, g: torch.Generator, *, integers: bool = False) -> Factor:
    """Values around 1/sqrt(k); with ``integers`` small integers (times powers of two), for exact arithmetic."""
    if not kind.bits:
        if integers:
            values = torch.randint(-4, 5, (rank, n, k), generator=g).to(kind.dtype)
        else:
            values = (torch.randn(rank, n, k, generator=g) / k**0.5).to(kind.dtype)
        return Factor(kind, values, None, None, values.double())
    rows, group_size = rank * n, min(kind.group_size or k, k)
    groups = -(-k // group_size)
    shape = (1, 1) if kind.per_tensor and groups == 1 else (rows, groups)
    codes = torch.randint(0, 1 << kind.bits, (rows, k), generator=g, dtype=torch.uint8)
    if integers:
        scales = torch.exp2(torch.randint(-1, 2, shape, generator=g).float())
    else:
        scales = (torch.rand(shape, generator=g) + 0.5) / (1 << kind.bits)
    scales, zeros = scales.to(kind.dtype), None
    if kind.zeros == "int":
        zeros = torch.randint(0, 1 << kind.bits, shape, generator=g, dtype=torch.uint8)
    elif kind.zeros == "float":
        zeros = torch.rand(shape, generator=g) * (1 << kind.bits)
        zeros = (zeros.round() if integers else zeros).to(kind.dtype)
    group = [c // group_size for c in range(k)]
    zero = torch.full(shape, 2.0 ** (kind.bits - 1)) if zeros is None else zeros.float()
    values = (codes.float() - zero.expand(rows, -1)[:, group]) * scales.float().expand(rows, -1)[:, group]
    return Factor(kind, pack(codes, kind.bits), scales, zeros, values.double().view(rank, n, k), codes)


@dataclass
class Weight:
    a: Factor
    b: Factor
    input_permutation: Tensor | None = None
    output_permutation: Tensor | None = None
    _terms: list[Tensor] = field(default_factory=list)

    @property
    def n(self) -> int:
        return self.a.values.shape[1] * self.b.values.shape[1]

    @property
    def k(self) -> int:
        return self.a.values.shape[2] * self.b.values.shape[2]

    @property
    def rank(self) -> int:
        return self.a.values.shape[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of kron_dequantize, by name."""
        (_, n1, k1), (_, n2, k2) = self.a.values.shape, self.b.values.shape
        tensors = zip(("a", "a_scales", "a_zeros", "b", "b_scales", "b_zeros"), (*self.a.tensors, *self.b.tensors),
                      strict=True)  # fmt: skip
        (a_bits, a_group_size), (b_bits, b_group_size) = self.a.numbers, self.b.numbers
        return dict(
            tensors, input_permutation=self.input_permutation, output_permutation=self.output_permutation,
            rank=self.rank, n1=n1, k1=k1, n2=n2, k2=k2, a_bits=a_bits, a_group_size=a_group_size, b_bits=b_bits,
            b_group_size=b_group_size,
        )  # fmt: skip

    def linear(self, x: Tensor, bias: Tensor | None = None, **changed: Any) -> Tensor:
        return call(torch.ops.lowbit.kron_linear, x, bias=bias, **{**self.arguments, **changed})

    def dequantize(self, dtype: torch.dtype = torch.float32, **changed: Any) -> Tensor:
        return call(torch.ops.lowbit.kron_dequantize, dtype=dtype, **{**self.arguments, **changed})

    def embedding(self, ids: Tensor, dtype: torch.dtype = torch.float32, **changed: Any) -> Tensor:
        return call(torch.ops.lowbit.kron_embedding, ids, dtype=dtype, **{**self.arguments, **changed})

    def terms(self) -> list[Tensor]:
        """The float64 weight of every term: a product of two float32 is exact in float64."""
        if not self._terms:
            for a, b in zip(self.a.values, self.b.values, strict=True):
                term = torch.kron(a, b)
                if self.output_permutation is not None:
                    term = term[self.output_permutation.long()]
                self._terms.append(term if self.input_permutation is None else term[:, self.input_permutation.long()])
        return self._terms

    def dense(self) -> Tensor:
        return sum(self.terms(), torch.zeros(()))

    def assert_close(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """The tolerance rule, with the terms as a longer sum: their magnitudes count, not that of their sum.

        All in bfloat16, the instruction set ``avx512bf16`` may round what lies between the products to it.
        """
        dtypes = {x.dtype, self.arguments["a"].dtype, self.arguments["b"].dtype}
        rounds = dtypes == {torch.bfloat16} and registry.active_backend() == "cpu" and native.isa() == "avx512bf16"
        assert_linear_close(
            y, torch.cat([x] * self.rank, -1), torch.cat(self.terms(), 1), bias, intermediate=2.0**-9 * rounds
        )

    def permuted(self, seed: int, inputs: bool = True, outputs: bool = True) -> Weight:
        g = torch.Generator().manual_seed(seed)
        return replace(
            self,
            input_permutation=torch.randperm(self.k, generator=g).int() if inputs else None,
            output_permutation=torch.randperm(self.n, generator=g).int() if outputs else None,
            _terms=[],
        )


def random_weight(
    shape: tuple[int, int, int, int, int],
    a: Kind = DENSE[0],
    b: Kind = DENSE[0],
    seed: int = 0,
    *,
    integers: bool = False,
) -> Weight:
    """``shape``: rank, n1, k1, n2, k2."""
    rank, n1, k1, n2, k2 = shape
    g = torch.Generator().manual_seed(seed)
    return Weight(
        random_factor(a, rank, n1, k1, g, integers=integers), random_factor(b, rank, n2, k2, g, integers=integers)
    )


def packed_kinds(bits: int) -> Iterator[Kind]:
    """Every granularity × zeros, scale dtypes in rotation."""
    for i, (group_size, per_tensor) in enumerate(((None, True), (None, False), (7, False), (32, False))):
        for j, zeros in enumerate(("none", "int", "float")):
            yield Kind(DTYPES[(bits + i + j) % 3], bits, group_size, per_tensor, zeros)


# rank, n1, k1, n2, k2. Together they take every way through the kernels: either product first; either factor the inner
# one; lanes along its columns or along its rows; slices, chunks and vectors that end early; sizes of one.
SHAPES = (
    (1, 1, 1, 1, 1), (2, 1, 1, 1, 1), (1, 7, 1, 1, 9), (1, 1, 7, 9, 1), (3, 5, 7, 9, 11), (1, 13, 6, 5, 3),
    (1, 2, 1, 33, 140), (1, 1, 2, 33, 140), (1, 33, 140, 1, 2), (1, 33, 140, 2, 1), (2, 3, 2, 20, 160),
    (2, 18, 144, 4, 3), (1, 16, 16, 16, 16), (2, 12, 10, 70, 20), (1, 20, 9, 66, 17), (1, 9, 20, 17, 30),
    (1, 3, 1, 6, 600), (1, 3, 2, 5, 1056), (1, 30, 16, 20, 2), (1, 24, 1, 1, 24), (2, 1, 24, 24, 1),
)  # fmt: skip
