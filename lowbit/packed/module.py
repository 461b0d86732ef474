"""Drop-in modules of family ``packed``: :class:`PackedLinear` and :class:`PackedEmbedding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bitpack import pack, unpack
from lowbit.layer import FLOAT_DTYPES, Layer
from lowbit.packed.format import Packed, PackedFormat
from lowbit.packed.op import csr_row_indices
from lowbit.packed.quantize import Quantized, quantize

_CONFIG_FIELDS = {"family", "kind", "dtype", "bias", "format"}


class PackedLayer(Layer):
    """Tensors and checks common to the linear and the embedding of family ``packed``."""

    family = "packed"
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

    def store(self, quantized: Quantized) -> None:
        """Fill the (meta) parameters from a quantizer's result, packing the codes."""
        self._set("packed", pack(quantized.codes, self.format.bits))
        for name in ("scales", "zeros", "outlier_values", "outlier_columns", "outlier_rows"):
            tensor = getattr(quantized, name)
            if tensor is not None:
                self._set(name, tensor)

    def _set(self, name: str, tensor: Tensor) -> None:
        self._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)

    def validate_values(self, name: str) -> None:
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError(f"{name}.scales must be finite: got NaN or infinity")
        if self.zeros is not None:
            if self.zeros.is_floating_point():
                if not bool(torch.isfinite(self.zeros).all()):
                    raise ValueError(f"{name}.zeros must be finite: got NaN or infinity")
            elif self.zeros.numel() and int(self.zeros.max()) >= 1 << self.format.bits:
                raise ValueError(
                    f"{name}.zeros must be between 0 and {(1 << self.format.bits) - 1} at "
                    f"bits={self.format.bits}: got {int(self.zeros.max())}"
                )
        if self.x_scale is not None and not (bool(torch.isfinite(self.x_scale).all()) and float(self.x_scale) > 0):
            raise ValueError(f"{name}.x_scale must be finite and positive: got {float(self.x_scale)}")
        if self.outlier_rows is not None:
            self._validate_outliers(name)

    def _validate_outliers(self, name: str) -> None:
        values, columns, rows = self.outlier_values, self.outlier_columns, self.outlier_rows
        assert values is not None and columns is not None and rows is not None
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}.outlier_values must be finite: got NaN or infinity")
        pointers = rows.to(torch.int64)
        counts = pointers[1:] - pointers[:-1]
        if int(pointers[0]) != 0 or int(pointers[-1]) != len(values) or bool((counts < 0).any()):
            raise ValueError(
                f"{name}.outlier_rows must rise from 0 to the number of outliers {len(values)}: "
                f"got first {int(pointers[0])}, last {int(pointers[-1])}, smallest step {int(counts.min())}"
            )
        column = columns.to(torch.int64)
        if bool((column < 0).any()) or bool((column >= self.format.in_features).any()):
            raise ValueError(
                f"{name}.outlier_columns must be in [0, {self.format.in_features}): "
                f"got values in [{int(column.min())}, {int(column.max())}]"
            )
        position = csr_row_indices(pointers) * self.format.in_features + column
        if bool((position[1:] <= position[:-1]).any()):
            raise ValueError(f"{name}.outlier_columns must increase within each row: they do not")

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str = "meta") -> Layer:
        extras = dict(config)
        fields = {key: extras.pop(key, None) for key in _CONFIG_FIELDS}
        if fields["dtype"] not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}: got dtype={fields['dtype']!r}")
        if not isinstance(fields["bias"], bool):
            raise ValueError(f"bias must be true or false: got bias={fields['bias']!r}")
        if not isinstance(fields["format"], dict):
            raise ValueError(f"format must be an object: got format={fields['format']!r}")
        format = PackedFormat.from_dict(fields["format"])
        return cls._from_fields(format, fields["bias"], FLOAT_DTYPES[fields["dtype"]], device, extras)

    @classmethod
    def _from_fields(
        cls, format: PackedFormat, bias: bool, dtype: torch.dtype, device: Any, extras: dict[str, Any]
    ) -> Layer:
        if extras:
            raise ValueError(f"unknown field {sorted(extras)[0]!r} for a {cls.family} {cls.kind}")
        return cls(format, bias, dtype, device)


class PackedLinear(PackedLayer):
    """``y = x @ W.T + bias`` with ``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, ``g = k // group_size``.

    Input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in the input's dtype; sums are float32.
    Parameters (all frozen but the bias): ``packed`` int32 ``[N, ceil(K/32)*bits]``, ``scales`` ``[N, G]``,
    ``[N, 1]`` or ``[1, 1]``, optional ``zeros`` of the same shape, optional CSR outliers, optional ``x_scale``.
    """

    kind = "linear"

    @property
    def in_features(self) -> int:
        return self.format.in_features

    @property
    def out_features(self) -> int:
        return self.format.out_features

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        spec: Packed,
        bias: Tensor | None = None,
        *,
        hessian: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> PackedLinear:
        """Quantize a float weight ``[N, K]`` with ``spec``; the bias is kept as it is.

        Raises ``ValueError`` when the spec does not fit the weight, or needs calibration that is not given.
        """
        quantized = quantize(weight, spec, hessian=hessian)
        return cls.from_quantized(
            quantized, spec.bits, spec.group_size, bias,
            activations=spec.activations, x_scale=x_scale, dtype=weight.dtype,
        )  # fmt: skip

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        bits: int,
        group_size: int | None = None,
        bias: Tensor | None = None,
        *,
        activations: str = "float",
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """Pack given codes and scales as they are (see :class:`Quantized`); nothing is rounded again."""
        format = format_of(quantized, bits, group_size, activations)
        layer = cls(format, bias is not None, dtype, "meta")
        layer.store(quantized)
        if activations == "int8_static":
            if x_scale is None:
                raise ValueError("activations='int8_static' needs x_scale, the calibrated scale of the input")
            layer._set("x_scale", x_scale.detach().reshape(1).float())
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer.validate()
        return layer

    def forward(self, input: Tensor) -> Tensor:
        format = self.format
        if input.dim() == 0 or input.shape[-1] != format.in_features:
            shape = tuple(input.shape)
            raise ValueError(f"input must have in_features={format.in_features} as its last size: got shape {shape}")
        y: Tensor = torch.ops.lowbit.packed_linear(
            input, self.packed, self.scales, self.zeros, self.bias,
            self.outlier_values, self.outlier_columns, self.outlier_rows, self.x_scale,
            format.bits, format.group_size, format.activations != "float",
        )  # fmt: skip
        return y

    def to_float(self) -> nn.Linear:
        """``nn.Linear`` with the dequantized weight and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.dequantize())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


class PackedEmbedding(PackedLayer):
    """``y = W[ids] * output_scale`` with the ``W`` of :class:`PackedLinear`; ``[..., embedding_dim]`` in ``dtype``.

    ``output_scale`` serves scaled word embeddings (BART, MBART); it is 1.0 otherwise. Raises ``RuntimeError`` for an
    id outside ``[0, num_embeddings)``.
    """

    kind = "embedding"

    def __init__(
        self,
        format: PackedFormat,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
    ) -> None:
        if bias:
            raise ValueError("an embedding has no bias: got bias=True")
        super().__init__(format, False, dtype, device)
        self.padding_idx = padding_idx
        self.output_scale = output_scale

    @property
    def num_embeddings(self) -> int:
        return self.format.out_features

    @property
    def embedding_dim(self) -> int:
        return self.format.in_features

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        bits: int,
        group_size: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
    ) -> PackedEmbedding:
        """Pack given codes and scales ``[num_embeddings, embedding_dim]`` as they are."""
        format = format_of(quantized, bits, group_size, "float")
        layer = cls(format, False, dtype, "meta", padding_idx=padding_idx, output_scale=output_scale)
        layer.store(quantized)
        layer.validate()
        return layer

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = torch.ops.lowbit.packed_embedding(
            input, self.packed, self.scales, self.zeros,
            self.outlier_values, self.outlier_columns, self.outlier_rows,
            self.format.bits, self.format.group_size, self.format.in_features, self.dtype,
        )  # fmt: skip
        return y if self.output_scale == 1.0 else y * self.output_scale

    def to_float(self) -> nn.Module:
        """``nn.Embedding`` with the dequantized weight (followed by the scale where ``output_scale`` is not 1)."""
        weight = nn.Parameter(self.dequantize())
        if self.output_scale != 1.0:
            return ScaledEmbedding(weight, self.padding_idx, self.output_scale).train(self.training)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight.data)
        embedding.weight = weight
        return embedding.train(self.training)

    def config(self) -> dict[str, Any]:
        config = super().config()
        if self.padding_idx is not None:
            config["padding_idx"] = self.padding_idx
        if self.output_scale != 1.0:
            config["output_scale"] = self.output_scale
        return config

    @classmethod
    def _from_fields(
        cls, format: PackedFormat, bias: bool, dtype: torch.dtype, device: Any, extras: dict[str, Any]
    ) -> Layer:
        padding_idx, output_scale = extras.pop("padding_idx", None), extras.pop("output_scale", 1.0)
        if extras:
            raise ValueError(f"unknown field {sorted(extras)[0]!r} for a packed embedding")
        if padding_idx is not None and not isinstance(padding_idx, int):
            raise ValueError(f"padding_idx must be an integer: got padding_idx={padding_idx!r}")
        if not isinstance(output_scale, (int, float)) or isinstance(output_scale, bool):
            raise ValueError(f"output_scale must be a number: got output_scale={output_scale!r}")
        return cls(format, bias, dtype, device, padding_idx=padding_idx, output_scale=float(output_scale))

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, {self.format.describe()}"
        return text if self.output_scale == 1.0 else text + f", output_scale={self.output_scale}"


class ScaledEmbedding(nn.Embedding):
    """``F.embedding(ids, weight) * output_scale``: what a scaled :class:`PackedEmbedding` dequantizes to."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None, output_scale: float) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding_idx, _weight=weight.data)
        self.weight = weight
        self.output_scale = output_scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.output_scale


def format_of(quantized: Quantized, bits: int, group_size: int | None, activations: str) -> PackedFormat:
    """The :class:`PackedFormat` that a quantizer's result has; raises ``ValueError`` where its parts disagree."""
    n, k = quantized.codes.shape
    scales, zeros, values = quantized.scales, quantized.zeros, quantized.outlier_values
    if group_size is not None:
        granularity = "group"
    else:
        granularity = "tensor" if tuple(scales.shape) == (1, 1) else "row"
    format = PackedFormat(
        bits=bits,
        out_features=n,
        in_features=k,
        group_size=k if group_size is None else group_size,
        granularity=granularity,  # type: ignore[arg-type]
        zeros="none" if zeros is None else "float" if zeros.is_floating_point() else "int",
        scale_dtype=str(scales.dtype).removeprefix("torch."),
        outliers=0 if values is None else len(values),
        outlier_dtype="float16" if values is None else str(values.dtype).removeprefix("torch."),
        activations=activations,  # type: ignore[arg-type]
    )
    if tuple(scales.shape) != format.scale_shape:
        raise ValueError(f"scales must have shape {format.scale_shape}: got {tuple(scales.shape)}")
    return format


def codes_of(layer: PackedLayer) -> Tensor:
    """The codes ``uint8 [N, K]`` of a layer."""
    return unpack(layer.packed, layer.format.bits, layer.format.in_features)
