"""A weight of family ``kron`` as its ops take it, and the reference of what they do.

With ``n = n1 * N2 + n2`` and ``k = k1 * K2 + k2``

    kron[n, k] = sum_r a[r, n1, k1] * b[r, n2, k2]        (sum_r torch.kron(a[r], b[r]))
    W[n, k] = kron[output_permutation[n], input_permutation[k]]

A product with W never forms it: x, read as ``X[k1, k2]``, gives ``sum_r a[r] @ X @ b[r].T``.

Sums and what is between the two products are float32; the result is rounded once, to the dtype of x. Where x and the
factors are bfloat16, the CPU kernels for AVX-512 BF16 round what is between the products to bfloat16 as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.backends.layouts import CANONICAL
from lowbit.backends.operands import Activation, Operands
from lowbit.backends.reference import row_ranges, sum_per_scale, unique_ids, without_autocast
from lowbit.core.bitpack import words_per_row
from lowbit.core.family import FLOAT_DTYPES


class Factor(NamedTuple):
    """One factor of every term: ``values`` as the op takes them."""

    name: str
    values: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    rank: int
    n: int
    k: int
    bits: int
    group_size: int

    def check(self) -> None:
        name, rows = self.name, self.rank * self.n
        values, scales, zeros, bits = self.values, self.scales, self.zeros, self.bits
        torch._check(
            bits == 0 or 2 <= bits <= 8,
            lambda: f"{name}_bits must be between 2 and 8, or 0 for a dense factor: got {name}_bits={bits}",
        )
        if bits == 0:
            torch._check(
                values.dtype in FLOAT_DTYPES.values(),
                lambda: f"{name} must be float32, float16 or bfloat16: got {values.dtype}",
            )
            _check_shape(name, values, (self.rank, self.n, self.k))
            torch._check(
                scales is None and zeros is None,
                lambda: f"{name}_scales and {name}_zeros belong to a packed factor: got {name}_bits=0",
            )
            return
        torch._check(
            1 <= self.group_size <= self.k,
            lambda: f"{name}_group_size must be between 1 and {self.k}: got {self.group_size}",
        )
        torch._check(values.dtype == torch.int32, lambda: f"{name} must be int32 when packed: got {values.dtype}")
        _check_shape(name, values, (rows, words_per_row(self.k, bits)))
        torch._check(
            scales is not None, lambda: f"{name}_scales must be given for a packed factor: got {name}_bits={bits}"
        )
        assert scales is not None
        groups = -(-self.k // self.group_size)
        torch._check(
            scales.dtype in FLOAT_DTYPES.values(),
            lambda: f"{name}_scales must be float32, float16 or bfloat16: got {scales.dtype}",
        )
        per_tensor = groups == 1 and tuple(scales.shape) == (1, 1)
        _check_shape(f"{name}_scales", scales, (1 if per_tensor else rows, groups))
        if zeros is not None:
            _check_shape(f"{name}_zeros", zeros, tuple(scales.shape))
            torch._check(
                zeros.dtype in (torch.uint8, scales.dtype),
                lambda: f"{name}_zeros must be uint8 or of the dtype of {name}_scales ({scales.dtype}): "
                f"got {zeros.dtype}",
            )

    def dense(self) -> Tensor:
        """The values, float32 ``[rank, n, k]``."""
        return self.values.float() if self.bits == 0 else self._unpacked(self.scales)

    def _unpacked(self, scales: Tensor | None) -> Tensor:
        values: Tensor = torch.ops.lowbit.packed_dequantize(
            self.values, None, None, None, scales, self.zeros, None, None, self.bits, self.group_size, CANONICAL.number,
            False, 0, self.k, torch.float32,
        )
        return values.view(self.rank, self.n, self.k)

    def gradients(self, of_values: Tensor) -> dict[str, Tensor | None]:
        """The gradients of values, scales and zeros by argument, from that of the float32 values."""
        if self.bits == 0:
            return {self.name: of_values.to(self.values.dtype)}
        assert self.scales is not None
        scales = self.scales
        group = torch.arange(self.k, device=of_values.device) // self.group_size
        centered = self._unpacked(torch.ones_like(scales))
        of_scales = sum_per_scale((of_values * centered).view(-1, self.k), scales, group).to(scales.dtype)
        if self.zeros is None or not self.zeros.is_floating_point():
            return {f"{self.name}_scales": of_scales}
        total = sum_per_scale(of_values.reshape(-1, self.k), scales, group)
        of_zeros = (-scales.float() * total).to(self.zeros.dtype)
        return {f"{self.name}_scales": of_scales, f"{self.name}_zeros": of_zeros}


    def tangent(self, tangents: Mapping[str, Tensor]) -> Tensor | None:
        """float32 ``[rank, n, k]``: where the values move when the tensors do; None: nowhere."""
        if self.bits == 0:
            moved = tangents.get(self.name)
            return None if moved is None else moved.float()
        assert self.scales is not None
        scales, zeros = tangents.get(f"{self.name}_scales"), tangents.get(f"{self.name}_zeros")
        parts: list[Tensor] = []
        group = torch.arange(self.k, device=self.values.device) // self.group_size
        if scales is not None:
            centered = self._unpacked(torch.ones_like(self.scales))
            parts.append(centered * _per_row(scales, self).index_select(2, group))
        if zeros is not None:
            parts.append(_per_row(-zeros.float() * self.scales.float(), self).index_select(2, group))
        return sum(parts[1:], parts[0]) if parts else None


def _per_row(values: Tensor, factor: Factor) -> Tensor:
    """What the rows of a packed factor have, float32 ``[rank, n, G]``."""
    return values.float().expand(factor.rank * factor.n, -1).reshape(factor.rank, factor.n, -1)


class Product(NamedTuple):
    """``sum_r a[r] ⊗ b[r]`` between two permutations."""

    a: Factor
    b: Factor
    input_permutation: Tensor | None
    output_permutation: Tensor | None
    rank: int

    @property
    def n(self) -> int:
        return self.a.n * self.b.n

    @property
    def k(self) -> int:
        return self.a.k * self.b.k

    def check(self) -> None:
        """What can be known without reading a value; raises through ``torch._check``, so it serves fakes as well."""
        sizes = {"rank": self.rank, "n1": self.a.n, "k1": self.a.k, "n2": self.b.n, "k2": self.b.k}
        for name, size in sizes.items():
            torch._check(
                1 <= size < 1 << 31, lambda name=name, size=size: f"{name} must be between 1 and 2^31 - 1: got {size}"
            )
        torch._check(
            max(self.n, self.k) < 1 << 31,
            lambda: "n1*n2 and k1*k2 must be below 2^31: got " + ", ".join(f"{n}={s}" for n, s in sizes.items()),
        )
        self.a.check()
        self.b.check()
        for name, permutation, size in (
            ("input_permutation", self.input_permutation, self.k),
            ("output_permutation", self.output_permutation, self.n),
        ):
            if permutation is not None:
                dtype = permutation.dtype
                torch._check(
                    dtype == torch.int32, lambda name=name, dtype=dtype: f"{name} must be int32: got {dtype}"
                )
                _check_shape(name, permutation, (size,))

    def check_values(self) -> None:
        """Permutations index memory, so their values are checked too."""
        for name, permutation in (
            ("input_permutation", self.input_permutation),
            ("output_permutation", self.output_permutation),
        ):
            if permutation is None:
                continue
            low, high, last = int(permutation.min()), int(permutation.max()), len(permutation) - 1
            if low < 0 or high > last:
                raise RuntimeError(f"{name} must hold numbers from 0 to {last}: got {low if low < 0 else high}")
            counts = torch.bincount(permutation, minlength=last + 1)
            if int(counts.max()) > 1:
                raise RuntimeError(f"{name} must hold every number once: got {int(counts.argmax())} twice")

    def rows(self, n: Tensor) -> Tensor:
        """Rows ``n`` (int64) of W in float32: one rounding per product, summed over the terms in order."""
        a, b = self.a.dense(), self.b.dense()
        if self.output_permutation is not None:
            n = self.output_permutation[n].to(torch.int64)
        n1, n2 = n // self.b.n, n % self.b.n
        out = n.new_zeros(len(n), self.k, dtype=torch.float32)
        for r in range(self.rank):
            out += (a[r, n1, :, None] * b[r, n2, None, :]).reshape(len(n), self.k)
        return out if self.input_permutation is None else out.index_select(1, self.input_permutation)

    def times(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for float32 ``x [M, K]``, by the cheaper order of the two products."""
        a, b = self.a, self.b
        x = self.columns(x)
        y = x.new_zeros(x.shape[0], a.n, b.n)
        b_first = a.k * b.n * (b.k + a.n) <= a.n * b.k * (a.k + b.n)
        for a_r, b_r in zip(a.dense(), b.dense(), strict=True):
            y += a_r @ (x @ b_r.t()) if b_first else (a_r @ x) @ b_r.t()
        y = y.view(-1, self.n)
        return y if self.output_permutation is None else y.index_select(1, self.output_permutation)

    def columns(self, x: Tensor) -> Tensor:
        """``x [M, K]`` as the Kronecker product reads it, ``[M, k1, k2]``."""
        if self.input_permutation is not None:
            x = x.index_select(1, self.input_permutation.argsort())
        return x.reshape(-1, self.a.k, self.b.k)


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    torch._check(
        tuple(t.shape) == shape, lambda: f"{name} must be of shape {list(shape)}: got {list(t.shape)}"
    )


@dataclass(frozen=True, kw_only=True)
class KronOperands(Operands):
    """Two factors and what they need.

    Attributes:
        a, b: a dense factor, float32, float16 or bfloat16 ``[rank, n, k]``, contiguous, with bits 0 (its group_size is
            not read); or a packed one, int32 canonical words ``[rank * n, ceil(k / 32) * bits]`` of 2 to 8 bits in
            groups of group_size columns, with its scales ``[rank * n, ceil(k / group_size)]`` (``[1, 1]``: one for all)
            and optional zeros of that shape, uint8 or of the scales' dtype: ``value = (code - zero) * scale``, in
            float32.
        input_permutation, output_permutation: int32 ``[k1 * k2]`` and ``[n1 * n2]``, each number once; None: the
            identity.
    """

    a: Tensor
    a_scales: Tensor | None
    a_zeros: Tensor | None
    b: Tensor
    b_scales: Tensor | None
    b_zeros: Tensor | None
    input_permutation: Tensor | None
    output_permutation: Tensor | None
    rank: int
    n1: int
    k1: int
    n2: int
    k2: int
    a_bits: int
    a_group_size: int
    b_bits: int
    b_group_size: int

    family = "kron"
    sized = False
    differentiable = ("a", "a_scales", "a_zeros", "b", "b_scales", "b_zeros")

    @property
    def out_features(self) -> int:
        return self.n1 * self.n2

    @property
    def in_features(self) -> int:
        return self.k1 * self.k2

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def product(self) -> Product:
        r = self.rank
        a = Factor("a", self.a, self.a_scales, self.a_zeros, r, self.n1, self.k1, self.a_bits, self.a_group_size)
        b = Factor("b", self.b, self.b_scales, self.b_zeros, r, self.n2, self.k2, self.b_bits, self.b_group_size)
        return Product(a, b, self.input_permutation, self.output_permutation, r)

    def check(self, k: int) -> None:
        self.product.check()

    def check_linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        self.check(self.in_features)
        torch._check(
            x.shape[-1] == self.in_features,
            lambda: f"x must be of shape [..., k1*k2 = {self.in_features}]: got {list(x.shape)}",
        )
        if bias is not None:
            torch._check(
                bias.dtype in FLOAT_DTYPES.values(),
                lambda: f"bias must be float32, float16 or bfloat16: got {bias.dtype}",
            )
            _check_shape("bias", bias, (self.out_features,))

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        product = self.product
        product.check_values()
        with without_autocast():
            y = product.times(x.reshape(-1, self.in_features).float())
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self, k: int, dtype: torch.dtype) -> Tensor:
        product = self.product
        product.check_values()
        out = torch.empty(self.out_features, k, dtype=dtype, device=self.device)
        for rows in row_ranges(*out.shape):
            out[rows] = product.rows(torch.arange(rows.start, rows.stop, device=out.device)).to(dtype)
        return out

    def embedding(self, ids: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        product = self.product
        product.check_values()
        unique, position = unique_ids(ids, self.out_features)
        return product.rows(unique).to(dtype)[position].view(*ids.shape, k)

    # Gradients. With D = dY as [M, n1, n2] and X as [M, k1, k2]:
    #   dX = dY @ W, a product with the transposed factors;  da[r] = sum_m D (X b[r].T).T = sum_m (D b[r]) X.T;
    #   db[r] = sum_m D.T (a[r] X) = sum_m (a[r].T D).T X
    # A packed factor passes its gradient on to its scales and float zeros.

    def input_gradient(self, grad: Tensor, k: int) -> Tensor:
        w = self.product
        gradient: Tensor = torch.ops.lowbit.kron_linear(
            grad, w.a.dense().transpose(1, 2).contiguous(), None, None, w.b.dense().transpose(1, 2).contiguous(), None,
            None, w.output_permutation, w.input_permutation, w.rank, w.a.k, w.a.n, w.b.k, w.b.n, 0, 0, 0, 0, None,
        )  # fmt: skip
        return gradient

    def weight_gradients(self, x: Tensor, dy: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        w = self.product
        a, b, d = w.a.dense(), w.b.dense(), dy.float()
        d = d if w.output_permutation is None else d.index_select(1, w.output_permutation.argsort())
        d, x = d.view(-1, w.a.n, w.b.n), w.columns(x.float())
        short = w.b.k <= w.b.n  # of the two orders of products, the one with less between them
        found: dict[str, Tensor | None] = {}
        if _trains("a", wanted):
            pairs = [(d @ b_r, x) if short else (d, x @ b_r.t()) for b_r in b]
            found |= w.a.gradients(torch.stack([_product(p.transpose(0, 1), q.transpose(0, 1)) for p, q in pairs]))
        if _trains("b", wanted):
            pairs = [(d, a_r @ x) if short else (a_r.t() @ d, x) for a_r in a]
            found |= w.b.gradients(torch.stack([_product(p.permute(2, 0, 1), q.permute(2, 0, 1)) for p, q in pairs]))
        return found

    def row_gradients(self, ids: Tensor, grad: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """Row n1*N2 + n2 of W passes its gradient [k1, k2] on: da[r, n1] = D b[r, n2], db[r, n2] = D.T a[r, n1]."""
        w = self.product
        a, b = w.a.dense(), w.b.dense()
        rows = ids.reshape(-1).to(torch.int64)
        rows = rows if w.output_permutation is None else w.output_permutation[rows].to(torch.int64)
        of_a, of_b = rows // w.b.n, rows % w.b.n
        d = w.columns(grad.reshape(-1, w.k).float()).view(-1, w.a.k, w.b.k)
        found: dict[str, Tensor | None] = {}
        if _trains("a", wanted):
            products = [(d @ b_r.index_select(0, of_b).unsqueeze(-1)).squeeze(-1) for b_r in b]
            sums = [product.new_zeros(a[0].shape).index_add_(0, of_a, product) for product in products]
            found |= w.a.gradients(torch.stack(sums))
        if _trains("b", wanted):
            products = [(a_r.index_select(0, of_a).unsqueeze(1) @ d).squeeze(1) for a_r in a]
            sums = [product.new_zeros(b[0].shape).index_add_(0, of_b, product) for product in products]
            found |= w.b.gradients(torch.stack(sums))
        return found

    def dense_gradients(self, d: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """With D as [n1, n2, k1, k2]: da[r] = sum D b[r], db[r] = sum D a[r]."""
        w = self.product
        d = d.float() if w.output_permutation is None else d.float().index_select(0, w.output_permutation.argsort())
        d = w.columns(d).view(w.a.n, w.b.n, w.a.k, w.b.k).transpose(1, 2).reshape(w.a.n * w.a.k, -1)
        found: dict[str, Tensor | None] = {}
        if _trains("a", wanted):
            found |= w.a.gradients((w.b.dense().view(w.rank, -1) @ d.t()).view(w.rank, w.a.n, w.a.k))
        if _trains("b", wanted):
            found |= w.b.gradients((w.a.dense().view(w.rank, -1) @ d).view(w.rank, w.b.n, w.b.k))
        return found

    # A stack has E times the terms, those of one expert after the other.

    def expert_rows(self, num_experts: int) -> int:
        rank = self.rank
        torch._check(
            num_experts >= 1 and rank % num_experts == 0,
            lambda: f"num_experts must divide the terms of the weight, {rank}: got num_experts={num_experts}",
        )
        return self.out_features

    def expert(self, index: int, num_experts: int) -> KronOperands:
        own: dict[str, Any] = {n: _terms(getattr(self, n), index, num_experts) for n in self.differentiable}
        return replace(self, rank=self.rank // num_experts, **own)

    def expert_linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        """By the kernel of linears on this device."""
        y: Tensor = torch.ops.lowbit.kron_linear(x, *self, bias)
        return y

    def stack_gradients(self, d: Tensor, wanted: Collection[str], num_experts: int) -> dict[str, Tensor | None]:
        parts = d.view(num_experts, -1, d.shape[1])
        found: list[dict[str, Any]] = [
            self.expert(e, num_experts).dense_gradients(parts[e], wanted) for e in range(num_experts)
        ]
        shared = {name for name in found[0] if _serves_all(getattr(self, name), num_experts)}
        return {
            name: sum(own[name] for own in found) if name in shared else torch.cat([own[name] for own in found])
            for name in found[0]
        }

    def tangent(self, k: int, tangents: Mapping[str, Tensor]) -> Tensor:
        """``sum_r a'[r] ⊗ b[r] + a[r] ⊗ b'[r]``, between the permutations."""
        w = self.product
        a, b = w.a.tangent(tangents), w.b.tangent(tangents)
        pairs = [(a, w.b.dense())] if a is not None else []
        pairs += [(w.a.dense(), b)] if b is not None else []
        of_a, of_b = (torch.cat(factors) for factors in zip(*pairs, strict=True))
        moved = of_a.reshape(len(of_a), -1).t() @ of_b.reshape(len(of_b), -1)
        moved = moved.view(w.a.n, w.a.k, w.b.n, w.b.k).transpose(1, 2).reshape(w.n, w.k)
        moved = moved if w.output_permutation is None else moved.index_select(0, w.output_permutation)
        return moved if w.input_permutation is None else moved.index_select(1, w.input_permutation)


def _terms(tensor: Tensor | None, index: int, num_experts: int) -> Tensor | None:
    """The part of one expert."""
    if tensor is None or _serves_all(tensor, num_experts):
        return tensor
    count = len(tensor) // num_experts
    return tensor.narrow(0, index * count, count)


def _serves_all(tensor: Tensor, num_experts: int) -> bool:
    """Whether it is one number, which all experts share: a scale or a zero per tensor."""
    return len(tensor) == 1 and num_experts > 1


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``sum a[i, m, j] b[k, m, j]``, ``[i, k]``."""
    size = a.shape[1] * a.shape[2]
    return a.reshape(a.shape[0], size) @ b.reshape(b.shape[0], size).t()


def _trains(factor: str, wanted: Collection[str]) -> bool:
    return any(name in wanted for name in (factor, f"{factor}_scales", f"{factor}_zeros"))
