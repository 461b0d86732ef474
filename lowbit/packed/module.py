"""The drop-in modules of family ``packed``: :class:`PackedLinear` and :class:`PackedEmbedding`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.backends.cpu import blocks
from lowbit.backends.layouts import BLOCKS, CANONICAL, Layout
from lowbit.nn.layer import EmbeddingLayer, Layer, LinearLayer, require_finite, require_outliers, require_x_scale, run
from lowbit.packed.format import PackedFormat

_LINEAR, _EMBEDDING = torch.ops.lowbit.packed_linear.default, torch.ops.lowbit.packed_embedding.default


class PackedLayer(Layer):
    """Tensors and checks common to the linear and the embedding of family ``packed``."""

    family = "packed"
    format_class = PackedFormat
    code_tensors = ("packed",)
    group_tensors = ("scales", "zeros")
    format: PackedFormat
    packed: nn.Parameter
    scales: nn.Parameter
    zeros: nn.Parameter | None
    outlier_values: nn.Parameter | None
    outlier_columns: nn.Parameter | None
    outlier_rows: nn.Parameter | None
    x_scale: nn.Parameter | None

    @classmethod
    def optional_tensors(cls) -> tuple[str, ...]:
        return ("zeros", "outlier_values", "outlier_columns", "outlier_rows", "x_scale")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[N, K]``: ``(code - zero) * scale`` in float32, plus outliers, rounded to ``dtype``."""
        weight: Tensor = torch.ops.lowbit.packed_dequantize(
            self.packed, self.scales, self.zeros, self.outlier_values, self.outlier_columns, self.outlier_rows,
            self.format.bits, self.format.group_size, self.format.in_features, dtype or self.dtype,
        )  # fmt: skip
        return weight

    def validate_values(self, name: str) -> None:
        require_finite(name, "scales", self.scales)
        require_zeros(name, "zeros", self.zeros, self.format.bits)
        require_x_scale(name, self.x_scale)
        require_outliers(name, self)


def require_zeros(name: str, tensor_name: str, zeros: Tensor | None, bits: int) -> None:
    """Raise ``ValueError`` unless the zeros, if any, are finite, or integers that a code can take."""
    require_finite(name, tensor_name, zeros)
    if zeros is not None and not zeros.is_floating_point() and zeros.numel() and int(zeros.max()) >= 1 << bits:
        raise ValueError(
            f"{name}.{tensor_name} must be between 0 and {(1 << bits) - 1} at bits={bits}: got {int(zeros.max())}"
        )


class PackedLinear(PackedLayer, LinearLayer):
    """``y = x @ W.T + bias`` with ``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, ``g = k // group_size``.

    Input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in the input's dtype; sums are float32.
    Parameters (all frozen but the bias): ``packed`` int32 ``[N, ceil(K/32)*bits]`` (or another of
    :mod:`lowbit.backends.layouts`), ``scales`` ``[N, G]``, ``[N, 1]`` or ``[1, 1]``, optional ``zeros`` of the same
    shape, optional CSR outliers, optional ``x_scale``.
    """

    def cpu_layouts(self) -> tuple[Layout, ...]:
        return (BLOCKS,) if self.format.out_features >= blocks.ROWS else (CANONICAL,)

    def multiply(self, input: Tensor) -> Tensor:
        t, format = self.operands(), self.format
        return run(
            _LINEAR, input, t["packed"], t["scales"], t["zeros"], t["bias"],
            t["outlier_values"], t["outlier_columns"], t["outlier_rows"], t["x_scale"],
            format.bits, format.group_size, format.activations != "float", format.activation_group_size or 0,
        )  # fmt: skip


class PackedEmbedding(PackedLayer, EmbeddingLayer):
    """``y = W[ids] * output_scale`` with the ``W`` of :class:`PackedLinear`."""

    def cpu_layouts(self) -> tuple[Layout, ...]:
        return (CANONICAL, BLOCKS)  # blocks, where a linear layer shares the codes

    def gather(self, ids: Tensor) -> Tensor:
        t, format = self.operands(), self.format
        return run(
            _EMBEDDING, ids, t["packed"], t["scales"], t["zeros"],
            t["outlier_values"], t["outlier_columns"], t["outlier_rows"],
            format.bits, format.group_size, format.in_features, self.dtype,
        )  # fmt: skip
