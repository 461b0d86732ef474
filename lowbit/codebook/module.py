"""The drop-in modules of family ``codebook``: :class:`CodebookLinear` and :class:`CodebookEmbedding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.codebook.format import CodebookFormat
from lowbit.nn.layer import EmbeddingLayer, Layer, LinearLayer, require_finite, require_outliers, require_x_scale, run

_LINEAR, _EMBEDDING = torch.ops.lowbit.codebook_linear.default, torch.ops.lowbit.codebook_embedding.default


class CodebookLayer(Layer):
    """Tensors and checks common to the linear and the embedding of family ``codebook``.

    To fine-tune the centroids: ``layer.codebook.requires_grad_()``. ``centroid_gradient`` says what their gradient is:
    the ``"mean"`` over a centroid's members (arXiv 2010.07109) or their ``"sum"`` (Deep Compression); it is not saved.
    """

    centroid_gradient = "mean"

    family = "codebook"
    format_class = CodebookFormat
    code_tensors = ("packed",)
    format: CodebookFormat
    packed: nn.Parameter
    codebook: nn.Parameter
    scales: nn.Parameter | None
    scale_codebook: nn.Parameter | None
    scale_absmax: nn.Parameter | None
    scale_offset: nn.Parameter | None
    outlier_values: nn.Parameter | None
    outlier_columns: nn.Parameter | None
    outlier_rows: nn.Parameter | None
    x_scale: nn.Parameter | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "centroid_gradient" and value not in ("mean", "sum"):
            raise ValueError(f"centroid_gradient must be 'mean' or 'sum': got {value!r}")
        super().__setattr__(name, value)

    @classmethod
    def optional_tensors(cls) -> tuple[str, ...]:
        return (
            "scales", "scale_codebook", "scale_absmax", "scale_offset",
            "outlier_values", "outlier_columns", "outlier_rows", "x_scale",
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[N, K]``: ``codebook[code] * scale`` in float32, plus outliers, rounded to ``dtype``."""
        weight: Tensor = torch.ops.lowbit.codebook_dequantize(
            *self._tensors(), self.format.bits, self.format.group_size, self.format.in_features, dtype or self.dtype
        )
        return weight

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """The weight's tensors in the order of the ops."""
        t = self.operands()
        return (
            t["packed"], t["codebook"], t["scales"], t["scale_codebook"], t["scale_absmax"], t["scale_offset"],
            t["outlier_values"], t["outlier_columns"], t["outlier_rows"],
        )  # fmt: skip

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
    Parameters (all frozen but the bias): ``packed`` int32 ``[N, ceil(K/32)*bits]``, ``codebook`` ``[1, 1, 2**bits]``,
    ``[N, 1, 2**bits]`` or ``[N, G, 2**bits]``, optional ``scales`` ``[N, G]`` (float, or nested: see
    :class:`CodebookWeight`), optional CSR outliers, optional ``x_scale``.
    """

    def multiply(self, input: Tensor) -> Tensor:
        t, format = self.operands(), self.format
        return run(
            _LINEAR, input, t["packed"], t["codebook"], t["scales"],
            t["scale_codebook"], t["scale_absmax"], t["scale_offset"], t["bias"],
            t["outlier_values"], t["outlier_columns"], t["outlier_rows"], t["x_scale"],
            format.bits, format.group_size, format.activations != "float", self.centroid_gradient == "mean",
        )  # fmt: skip


class CodebookEmbedding(CodebookLayer, EmbeddingLayer):
    """``y = W[ids] * output_scale`` with the ``W`` of :class:`CodebookLinear`."""

    def gather(self, ids: Tensor) -> Tensor:
        format = self.format
        return run(
            _EMBEDDING, ids, *self._tensors(), format.bits, format.group_size, format.in_features, self.dtype,
            self.centroid_gradient == "mean",
        )  # fmt: skip
