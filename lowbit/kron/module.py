"""The drop-in modules of family ``kron``: :class:`KroneckerLinear` and :class:`KroneckerEmbedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kron.format import KroneckerFormat
from lowbit.kron.operands import KronOperands
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.layer import Layer
from lowbit.nn.linear import LinearLayer
from lowbit.nn.validate import require_finite, require_zeros


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
