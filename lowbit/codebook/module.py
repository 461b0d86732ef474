"""The drop-in modules of family ``codebook``: :class:`CodebookLinear` and :class:`CodebookEmbedding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.codebook.format import CodebookFormat
from lowbit.codebook.gradient import with_mean_gradient
from lowbit.codebook.operands import CodebookOperands
from lowbit.nn.coded import CodedLayer
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.experts import CodedExperts
from lowbit.nn.linear import LinearLayer
from lowbit.nn.validate import require_finite, require_outliers, require_x_scale


class CodebookLayer(CodedLayer):
    """Tensors and checks common to the linear and the embedding of family ``codebook``.

    To fine-tune the centroids: ``lowbit.make_trainable(model, "codebook")``. ``centroid_gradient`` says what their
    gradient is: the ``"mean"`` over a centroid's members (arXiv 2010.07109) or their ``"sum"`` (Deep Compression); it
    is not saved.
    """

    centroid_gradient = "mean"

    family = "codebook"
    format_class = CodebookFormat
    operands_class = CodebookOperands
    format: CodebookFormat
    codebook: Tensor
    scales: Tensor | None
    scale_codebook: Tensor | None
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_rows: Tensor | None
    x_scale: Tensor | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "centroid_gradient" and value not in ("mean", "sum"):
            raise ValueError(f"centroid_gradient must be 'mean' or 'sum': got {value!r}")
        super().__setattr__(name, value)

    def operands(self) -> Mapping[str, Tensor | None]:
        t = super().operands()
        trained = t["codebook"].requires_grad and torch.is_grad_enabled()  # type: ignore[union-attr]
        if not trained or self.centroid_gradient == "sum":
            return t
        weight = {name: t[name] for name in CodebookOperands.tensor_names}
        operands = CodebookOperands.of([*weight.values(), *self._numbers])
        return {**t, "codebook": with_mean_gradient(operands, self.format.in_features).codebook}

    def validate_values(self, name: str) -> None:
        for tensor in ("codebook", "scales", "scale_codebook", "scale_absmax", "scale_offset"):
            require_finite(name, tensor, getattr(self, tensor))
        require_x_scale(name, self.x_scale)
        require_outliers(name, self)


class CodebookLinear(CodebookLayer, LinearLayer):
    """``y = x @ W.T + bias`` with ``W[n, k] = codebook[n, g, code[n, k]] (* scale[n, g])``, ``g = k // group_size``.

    Input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in the input's dtype; sums are float32.
    In bfloat16, on a CPU with AVX-512 BF16, the weight is rounded to bfloat16 first, as in a dense layer of that dtype
    (and numbers below 2**-126 count as zero).
    Buffers: ``packed`` int32 ``[N, ceil(K/32)*bits]``, ``codebook`` ``[1, 1, 2**bits]``,
    ``[N, 1, 2**bits]`` or ``[N, G, 2**bits]``, optional ``scales`` ``[N, G]`` (float, or nested: see
    :class:`CodebookWeight`), optional CSR outliers, optional ``x_scale``.
    """


class CodebookEmbedding(CodebookLayer, EmbeddingLayer):
    """``y = W[ids] * output_scale`` with the ``W`` of :class:`CodebookLinear`."""


class CodebookExperts(CodedExperts, CodebookLayer):
    """``y[i] = x[i // r] @ W[ids[i]].T``, each expert's ``W`` as that of :class:`CodebookLinear`: its rows of a weight
    ``[E*N, K]``."""
