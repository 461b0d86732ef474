"""The drop-in modules of family ``packed``: :class:`PackedLinear` and :class:`PackedEmbedding`."""

from __future__ import annotations

from torch import Tensor

from lowbit.nn.coded import CodedLayer
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.experts import CodedExperts
from lowbit.nn.linear import LinearLayer
from lowbit.nn.validate import (
    require_factors,
    require_finite,
    require_order,
    require_outliers,
    require_x_scale,
    require_zeros,
)
from lowbit.packed.format import PackedFormat
from lowbit.packed.operands import PackedOperands


class PackedLayer(CodedLayer):
    """Tensors and checks common to the linear and the embedding of family ``packed``."""

    family = "packed"
    format_class = PackedFormat
    operands_class = PackedOperands
    group_tensors = ("scales", "zeros")
    one_dtype = (("zeros", "scales"), ("zero_factors", "scale_factors"))
    format: PackedFormat
    scales: Tensor
    zeros: Tensor | None
    scale_factors: Tensor | None
    zero_factors: Tensor | None
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_rows: Tensor | None
    x_scale: Tensor | None

    def _require_format_class(self, format: object) -> None:
        super()._require_format_class(format)
        if isinstance(format, PackedFormat) and format.act_order and self.kind != "linear":
            raise ValueError(f"act_order is of linear layers: got it for a packed {self.kind}")

    def validate_values(self, name: str) -> None:
        require_finite(name, "scales", self.scales)
        if self.format.zeros == "minimum":
            require_finite(name, "zeros", self.zeros)
        elif not self.format.packed_zeros:  # these have no other values
            require_zeros(name, "zeros", self.zeros, self.format.bits)
        for factors in ("scale_factors", "zero_factors"):
            require_factors(name, factors, getattr(self, factors))
        require_x_scale(name, self.x_scale)
        require_outliers(name, self)


class PackedLinear(PackedLayer, LinearLayer):
    """``y = x @ W.T + bias`` with ``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, ``g = k // group_size``.

    Input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in the input's dtype; sums are float32.
    Buffers: ``packed`` int32 ``[N, ceil(K/32)*bits]`` (or another of :mod:`lowbit.backends.layouts`), ``scales``
    ``[N, G]``, ``[N, 1]`` or ``[1, 1]``, optional ``zeros`` of the same shape (with minima ``W = code * scale -
    zero``; integers may be packed), optional ``scale_factors`` and ``zero_factors`` of scales of two levels,
    optional CSR outliers, optional ``x_scale``, optional ``order`` int32 ``[K]``: then column k of the stored
    weight meets ``x[..., order[k]]``, and :meth:`dequantize` gives W in the order of x.
    """

    @classmethod
    def optional_tensors(cls) -> tuple[str, ...]:
        return (*super().optional_tensors(), "order")

    def validate_values(self, name: str) -> None:
        super().validate_values(name)
        require_order(name, self.order)


class PackedEmbedding(PackedLayer, EmbeddingLayer):
    """``y = W[ids] * output_scale`` with the ``W`` of :class:`PackedLinear`."""


class PackedExperts(CodedExperts, PackedLayer):
    """``y[i] = x[i // r] @ W[ids[i]].T``, each expert's ``W`` as that of :class:`PackedLinear`: its rows of a weight
    ``[E*N, K]``."""
