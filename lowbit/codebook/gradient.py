"""The gradient of centroids as the mean over their members (arXiv 2010.07109), where the ops give the sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.codebook.operands import CodebookOperands


class _MeanGradient(torch.autograd.Function):
    """``codebook`` in float32; its gradient is divided by how many weights use an entry (0 where none does)."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, packed: Tensor, weight: CodebookOperands, k: int) -> Tensor:
        ctx.save_for_backward(codebook, packed)
        ctx.numbers = (weight.bits, weight.group_size, weight.layout, k)
        return codebook.float() if codebook.dtype != torch.float32 else codebook.view_as(codebook)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codebook, packed = ctx.saved_tensors
        uses = _uses(codebook, packed, *ctx.numbers)
        return (grad / uses.clamp(min=1)).to(codebook.dtype), None, None, None


def _uses(codebook: Tensor, packed: Tensor, bits: int, group_size: int, layout: int, k: int) -> Tensor:
    nothing: dict[str, Any] = dict.fromkeys(CodebookOperands.tensor_names)
    tensors = {**nothing, "codebook": codebook, "packed": packed}
    return CodebookOperands(**tensors, bits=bits, group_size=group_size, layout=layout).uses(k)


def with_mean_gradient(weight: CodebookOperands, k: int) -> CodebookOperands:
    """The same weight, whose ``codebook`` gets the mean over the members of each centroid as its gradient."""
    codebook: Tensor = _MeanGradient.apply(weight.codebook, weight.packed, weight, k)  # type: ignore[no-untyped-call]
    return replace(weight, codebook=codebook)
