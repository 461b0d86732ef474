"""The drop-in modules of family ``kron``: :class:`KroneckerLinear`, :class:`KroneckerEmbedding`,
:class:`KroneckerExperts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.kron.format import KroneckerFormat
from lowbit.kron.operands import KronOperands
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.experts import ExpertsLayer
from lowbit.nn.layer import Layer
from lowbit.nn.linear import LinearLayer
from lowbit.nn.rows import join_rows
from lowbit.nn.validate import require_finite, require_zeros
from lowbit.packed.format import PackedFormat


class KroneckerLayer(Layer):
    """Tensors and checks common to the linear and the embedding of family ``kron``."""

    family = "kron"
    format_class = KroneckerFormat
    operands_class = KronOperands
    one_dtype = (("a_zeros", "a_scales"), ("b_zeros", "b_scales"))
    format: KroneckerFormat
    a: Tensor
    a_scales: Tensor | None
    a_zeros: Tensor | None
    b: Tensor
    b_scales: Tensor | None
    b_zeros: Tensor | None
    input_permutation: Tensor | None
    output_permutation: Tensor | None

    def validate_values(self, name: str) -> None:
        for part, factor in (("a", self.format.a), ("b", self.format.b)):
            require_finite(name, part, getattr(self, part))
            require_finite(name, f"{part}_scales", getattr(self, f"{part}_scales"))
            if factor is not None:
                require_zeros(name, f"{part}_zeros", getattr(self, f"{part}_zeros"), factor.bits)
        for which, size in (("input", self.format.in_features), ("output", self.format.out_features)):
            permutation = getattr(self, f"{which}_permutation")
            if permutation is not None and not torch.equal(
                permutation.sort().values.to(torch.int64), torch.arange(size, device=permutation.device)
            ):
                raise ValueError(
                    f"{name}.{which}_permutation must hold each of 0..{size - 1} once: got values in "
                    f"[{int(permutation.min())}, {int(permutation.max())}], {len(permutation.unique())} different"
                )


class KroneckerLinear(KroneckerLayer, LinearLayer):
    """``y = x @ W.T + bias`` with ``W = sum_r A_r ⊗ B_r``, which is never formed.

    Input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in the input's dtype; sums and what lies
    between the two products are float32. Where input and factors are bfloat16, on a CPU with AVX-512 BF16, what lies
    between them is rounded to bfloat16, as with two matmuls (and numbers below 2**-126 count as zero).
    Buffers: ``a`` ``[R, N1, K1]`` and ``b`` ``[R, N2, K2]`` in float, or packed as in
    :class:`PackedLinear` with ``a_scales``, ``a_zeros``, ``b_scales``, ``b_zeros``; optional ``input_permutation``
    ``[K]`` and ``output_permutation`` ``[N]`` (int32):
    ``W[n, k] = (sum_r A_r ⊗ B_r)[output_permutation[n], input_permutation[k]]``.
    """


class KroneckerEmbedding(KroneckerLayer, EmbeddingLayer):
    """``y = W[ids] * output_scale`` with the ``W`` of :class:`KroneckerLinear`: row i of A ⊗ B for each id i."""


class KroneckerExperts(ExpertsLayer, KroneckerLayer):
    """``y[i] = x[i // r] @ W[ids[i]].T``, each expert's ``W`` as that of :class:`KroneckerLinear`: its R of E*R terms.

    The factors of all experts have the same shapes: ``a`` ``[E*R, N1, K1]``, ``b`` ``[E*R, N2, K2]``. A permutation
    serves all experts.
    """

    @staticmethod
    def stack_rows(format: Any, num_experts: int) -> int:
        if format.rank % num_experts:
            raise ValueError(
                f"num_experts must divide the terms of the weight, {format.rank}: got num_experts={num_experts}"
            )
        return num_experts * format.out_features  # type: ignore[no-any-return]

    @staticmethod
    def joined(parts: Sequence[tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        first: KroneckerFormat = parts[0][1]
        if len(parts) == 1:
            return parts[0]
        tensors: dict[str, Tensor] = {}
        factors: dict[str, PackedFormat | None] = {}
        for name in ("a", "b"):
            of_factor = [_factor(tensors, format, name) for tensors, format in parts]
            if getattr(first, name) is None:
                factors[name], tensors[name] = None, torch.cat([own["packed"] for own, _ in of_factor])
                continue
            own, factors[name] = join_rows(of_factor)
            tensors |= {name if part == "packed" else f"{name}_{part}": tensor for part, tensor in own.items()}
        rank = sum(format.rank for _, format in parts)
        joined = replace(first, rank=rank, a=factors["a"], b=factors["b"])
        for _, format in parts:
            if replace(format, rank=rank, a=joined.a, b=joined.b) != joined or format.rank != first.rank:
                raise ValueError(f"weights must be of one format to be joined: got {first} and {format}")
        for name in ("input_permutation", "output_permutation"):
            if name in parts[0][0]:
                tensors[name] = parts[0][0][name]
                if not all(torch.equal(own[name], tensors[name]) for own, _ in parts):
                    raise ValueError(f"weights must have the same {name} to be joined, as it serves all experts")
        return tensors, joined

    def cut(self, index: int) -> tuple[dict[str, Tensor], Any]:
        held, count = self.canonical(), self.num_experts
        shared = ("input_permutation", "output_permutation")
        tensors = {
            name: tensor.clone() if name in shared or len(tensor) == 1 else tensor.chunk(count)[index].clone()
            for name, tensor in held.items()
        }
        a, b = (None if f is None else replace(f, out_features=f.out_features // count)
                for f in (self.format.a, self.format.b))  # fmt: skip
        return tensors, replace(self.format, rank=self.format.rank // count, a=a, b=b)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weights ``[E, N, K]`` that this layer multiplies by, rounded once to ``dtype``."""
        weight = self.operands_class.of((*self.weight_arguments(self.operands()),))
        each = (weight.expert(e, self.num_experts) for e in range(self.num_experts))
        wanted = dtype or self.dtype
        computed = torch.float32 if wanted == torch.float64 else wanted
        return torch.stack([torch.ops.lowbit.kron_dequantize(*one, computed) for one in each]).to(wanted)


def _factor(tensors: dict[str, Tensor], format: KroneckerFormat, name: str) -> tuple[dict[str, Tensor], Any]:
    """(tensors, format) of one factor, as a packed weight has them; dense values as ``packed``."""
    own = {"packed": tensors[name]}
    own |= {part.removeprefix(f"{name}_"): t for part, t in tensors.items() if part.startswith(f"{name}_")}
    return own, getattr(format, name)
