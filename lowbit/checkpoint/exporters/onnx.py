"""ONNX: ``MatMulNBits`` of onnxruntime for packed linear layers, and operators of the standard for all else.

    MatMulNBits(A, B, scales, zero_points)    equals    A @ ((code - zero) * scale).T

B is ``uint8 [N, blocks, block_size*bits/8]``: the canonical words are its very bytes where the codes have 2, 4 or 8
bits; those of other widths get the next of these. Other weights are ``uint8`` codes, from which the graph computes W in
float32. Source: github.com/microsoft/onnxruntime (docs/ContribOperators.md).
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends.reference import csr_row_indices, dequantize_activations, quantize_activations
from lowbit.checkpoint.exporters.exporter import Exporter, stored
from lowbit.checkpoint.exporters.graph import Graph, dynamic_inputs, require_input_ids
from lowbit.codebook.format import CodebookFormat
from lowbit.core.bitpack import pack_bytes, unpack
from lowbit.core.outliers import column_indices
from lowbit.model.surgery import float_modules, put
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.layer import Layer, layers
from lowbit.packed.format import PackedFormat

_WIDTHS = (2, 4, 8)
_OPSET = 21


class Onnx(Exporter):
    format = "onnx"
    suffix = ".onnx"
    can_share = True  # each layer has its own copy in the file
    round_trip = "not read; outputs to 1e-5"

    def problem(self, name: str, layer: Layer) -> str | None:
        if layer.kind == "experts":
            return "holds experts, which ONNX has no operator for"
        if not isinstance(layer.format, (PackedFormat, CodebookFormat)):
            return f"must be of the families 'packed' or 'codebook': it is {layer.format.describe()}"
        return None

    def check(self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], tokenizer: Any) -> None:
        super().check(model, kept, floats, tokenizer)
        require_input_ids(model, self.format)
        try:
            for name in ("onnx", "onnxscript"):
                importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"to export as 'onnx', pip install onnx onnxscript: {error}") from error

    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any
    ) -> None:
        # tensors of packed layers are not needed again; others become float32, and the model's own must not
        same = {id(tensor): tensor for layer in kept.values() for tensor in (*layer.parameters(), *layer.buffers())}
        twin: Any = copy.deepcopy(model, same)
        for name, module in float_modules({name: layers(twin)[name] for name in floats}).items():
            put(twin, name, module)
        for name, layer in kept.items():
            put(twin, name, _module(layer))
        inputs, sizes = dynamic_inputs()
        with torch.no_grad():
            program = torch.onnx.export(
                Graph(twin.float()).eval(), inputs, dynamo=True, verbose=False, opset_version=_OPSET,
                input_names=["input_ids", "attention_mask"], output_names=["output"], dynamic_shapes=sizes,
            )  # fmt: skip
        assert program is not None
        program.save(str(target))


def _module(layer: Layer) -> nn.Module:
    """A module of operators that ONNX has, in the place of a layer."""
    if isinstance(layer, EmbeddingLayer):
        return _Embedding(layer)
    return _Linear(layer, _NBits(layer) if _block(layer.format) else _Product(layer))


def _block(format: Any) -> int | None:
    """The block size of MatMulNBits that a format has, if so: a power of 2, at least 16."""
    if not isinstance(format, PackedFormat) or format.outliers or format.zeros == "minimum":
        return None
    whole = 1 << max(4, (format.in_features - 1).bit_length())
    size = format.group_size if format.granularity == "group" else whole
    return size if size >= 16 and size & (size - 1) == 0 else None


class _Linear(nn.Module):
    """``y = product(x) + bias``; codes meet x as the layer holds it, outliers as it is."""

    order: Tensor | None
    x_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Layer, product: nn.Module) -> None:
        super().__init__()
        held, self.product, self.activation = layer.canonical(), product, layer.format.activation
        order = held.get("order")
        self.register_buffer("order", None if order is None else order.long())
        self.register_buffer("x_scale", held.get("x_scale"))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        rounded = x if self.activation.activations == "float" else self._as_int8(x)
        y: Tensor = self.product(rounded, x)
        return y if self.bias is None else y + self.bias

    def _as_int8(self, x: Tensor) -> Tensor:
        """The floats that the integers stand for."""
        rows, size = x.reshape(-1, x.shape[-1]), self.activation.activation_group_size
        size = size if size is not None and size < x.shape[-1] else 0
        q, inverse = quantize_activations(rows, self.x_scale, size)
        return (dequantize_activations(q, inverse, size) if size else q / inverse).view(x.shape)


class _NBits(nn.Module):
    """``x @ W.T`` by MatMulNBits."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        held, f, block = stored(layer), layer.format, _block(layer.format)
        assert block is not None
        self.n, self.k, self.block = f.out_features, f.in_features, block
        self.bits = next(width for width in _WIDTHS if width >= f.bits)
        blocks = -(-self.k // block)
        codes = torch.zeros(self.n, blocks * block, dtype=torch.uint8)
        codes[:, : self.k] = unpack(held["packed"], f.bits, self.k)
        self.register_buffer("codes", pack_bytes(codes, self.bits).reshape(self.n, blocks, -1))
        self.register_buffer("scales", _decoded(layer).scales.float().expand(self.n, blocks).contiguous())
        zeros = held.get("zeros", torch.full((1, 1), 1 << (f.bits - 1), dtype=torch.uint8)).expand(self.n, blocks)
        self.register_buffer("zeros", zeros.float() if zeros.is_floating_point() else pack_bytes(zeros, self.bits))

    def forward(self, x: Tensor, exact: Tensor) -> Tensor:
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", (x, self.codes, self.scales, self.zeros),
            {"K": self.k, "N": self.n, "bits": self.bits, "block_size": self.block},
            dtype=x.dtype, shape=(*x.shape[:-1], self.n), version=1,
        )  # fmt: skip
        return y


def _decoded(layer: Layer) -> Any:
    """The operands of a layer, with scales and zeros of one level."""
    operands: Any = layer.operands_class.of(layer.weight_arguments(layer.operands()))
    return operands.decoded()


class _Product(nn.Module):
    """``x @ W.T``, W computed from codes ``uint8 [N, K]``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight = _Weight(layer)

    def forward(self, x: Tensor, exact: Tensor) -> Tensor:
        if x is exact or not self.weight.has_outliers:
            return nn.functional.linear(x, self.weight())
        coded = self.weight.coded(None)
        outliers = self.weight.with_outliers(torch.zeros_like(coded))
        return nn.functional.linear(x, coded) + nn.functional.linear(exact, outliers)


class _Embedding(nn.Module):
    def __init__(self, layer: EmbeddingLayer) -> None:
        super().__init__()
        self.table, self.scale = _Weight(layer), float(layer.output_scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids)
        return rows if self.scale == 1.0 else rows * self.scale


class _Weight(nn.Module):
    """The float32 weight of codes, or rows of it."""

    codes: Tensor
    group: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    tables: Tensor | None
    outliers: Tensor
    outlier_columns: Tensor
    outlier_rows: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        held, f = stored(layer), layer.format
        self.bits, n, k = f.bits, f.out_features, f.in_features
        self.register_buffer("codes", unpack(held["packed"], f.bits, k))
        scales, zeros, tables = held.get("scales"), held.get("zeros"), held.get("codebook")
        if getattr(f, "scales", None) == "nested" or getattr(f, "scale_codes", None):
            decoded = _decoded(layer)
            scales, zeros = decoded.scales, getattr(decoded, "zeros", None)
        self.has_minima = getattr(f, "zeros", None) == "minimum"
        self.register_buffer("scales", None if scales is None else scales.float().expand(n, -1).contiguous())
        self.register_buffer("zeros", None if zeros is None else zeros.float().expand(n, -1).contiguous())
        self.register_buffer("tables", None if tables is None else tables.float().expand(n, -1, -1).contiguous())
        self.register_buffer("group", torch.arange(k) // f.group_size)
        self.has_outliers = bool(f.outliers)
        if self.has_outliers:
            self.register_buffer("outliers", held["outlier_values"].float())
            self.register_buffer("outlier_columns", column_indices(held["outlier_columns"]).long())
            self.register_buffer("outlier_rows", csr_row_indices(held["outlier_rows"].long()))

    def forward(self, ids: Tensor | None = None) -> Tensor:
        if not self.has_outliers:
            return self.coded(ids)
        weight = self.with_outliers(self.coded(None))
        return weight if ids is None else weight[ids]

    def with_outliers(self, weight: Tensor) -> Tensor:
        places = self.outlier_rows, self.outlier_columns
        return weight.index_put(places, weight[places] + self.outliers)  # no sum: each place is there once

    def coded(self, ids: Tensor | None) -> Tensor:
        def of(tensor: Tensor) -> Tensor:
            return tensor if ids is None else tensor[ids]

        def wide(tensor: Tensor) -> Tensor:  # [.., G] or [.., 1] to [.., K]
            return tensor if tensor.shape[-1] == 1 else tensor.index_select(-1, self.group)

        codes = of(self.codes)
        if self.tables is None:
            zeros = float(1 << (self.bits - 1)) if self.zeros is None else wide(of(self.zeros))
            assert self.scales is not None
            if self.has_minima:
                return codes.float() * wide(of(self.scales)) - zeros
            return (codes.float() - zeros) * wide(of(self.scales))
        entries, tables = self.tables.shape[-1], of(self.tables)
        index = codes.long()
        if tables.shape[-2] > 1:
            index = index + self.group * entries
        found = tables.flatten(-2).gather(-1, index)
        return found if self.scales is None else found * wide(of(self.scales))
