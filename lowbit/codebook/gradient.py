"""The gradient of centroids as the mean over their members (arXiv 2010.07109), where the ops give the sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.codebook.operands import CodebookOperands


class _MeanGradient(torch.autograd.Function):
    """``codebook`` in float32; its gradient is divided by how many weights use an entry (0 where none does)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(codebook: Tensor, packed: Tensor, bits: int, group_size: int, layout: int, k: int) -> Tensor:
        return codebook.float() if codebook.dtype != torch.float32 else codebook.view_as(codebook)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        codebook, packed, *ctx.numbers = inputs
        ctx.save_for_backward(codebook, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codebook, packed = ctx.saved_tensors
        uses = _uses(codebook, packed, *ctx.numbers)
        return ((grad / uses.clamp(min=1)).to(codebook.dtype), *[None] * 5)


class _WithTangent(_MeanGradient):
    """The tangent is the plain one: the mean is a step for training, not another derivative."""

    @staticmethod
    def jvp(ctx: Any, codebook: Tensor, *_: None) -> Tensor:
        return codebook.float() if codebook.dtype != torch.float32 else codebook.view_as(codebook)


def _uses(codebook: Tensor, packed: Tensor, bits: int, group_size: int, layout: int, k: int) -> Tensor:
    nothing: dict[str, Any] = dict.fromkeys(CodebookOperands.tensor_names)
    tensors = {**nothing, "codebook": codebook, "packed": packed}
    return CodebookOperands(**tensors, bits=bits, group_size=group_size, layout=layout).uses(k)


def with_mean_gradient(weight: CodebookOperands, k: int) -> CodebookOperands:
    """The same weight, whose ``codebook`` gets the mean over the members of each centroid as its gradient."""
    numbers = weight.bits, weight.group_size, weight.layout, k
    # torch.compile takes no function with a jvp
    function = _MeanGradient if torch.compiler.is_dynamo_compiling() else _WithTangent
    codebook: Tensor = function.apply(weight.codebook, weight.packed, *numbers)  # type: ignore[no-untyped-call]
    return replace(weight, codebook=codebook)
