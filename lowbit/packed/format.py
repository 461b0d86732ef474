"""Family ``packed``: what the user asks for (:class:`Packed`), what a layer stores (:class:`PackedFormat`).

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],    g = k // group_size      (+ sparse outliers)

Symmetric formats have no zeros tensor: their zero is ``2**(bits-1)``. Ternary is the symmetric 2-bit case.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from operator import index
from typing import Any, Literal, SupportsIndex

import torch

from lowbit.bitpack import words_per_row
from lowbit.layer import FLOAT_DTYPES

Granularity = Literal["tensor", "row", "group"]
Activations = Literal["float", "int8", "int8_static"]

GRANULARITIES = ("tensor", "row", "group")
QUANTIZERS = ("minmax", "mse", "mean", "gptq")
ACTIVATIONS = ("float", "int8", "int8_static")
MAX_INT16_COLUMNS = 1 << 15


def _describe(format: Packed | PackedFormat) -> str:
    """``4-bit group 64``, ``8-bit per row``."""
    where = f"group {format.group_size}" if format.granularity == "group" else f"per {format.granularity}"
    return f"{format.bits}-bit {where}"


def _choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}: got {argument}={value!r}")


@dataclass(frozen=True)
class Packed:
    """How to quantize a float weight ``[N, K]`` into the ``packed`` family: the spec given to ``convert``.

    Args:
        bits: 2 to 8.
        group_size: input features that share one scale, 1 to K; the last group of a row may be shorter.
        granularity: ``"group"``, ``"row"`` (one scale per output feature) or ``"tensor"``;
            default ``"group"`` when ``group_size`` is given, else ``"row"``.
        symmetric: levels ``{-n..n} * scale`` with ``n = 2**(bits-1) - 1`` (2 bits: ternary); else a zero point.
        zeros: of an asymmetric format: ``"int"`` (0..2**bits-1, stored as uint8) or ``"float"``.
        quantizer: ``"minmax"`` round to nearest over the full range; ``"mse"`` the clipping that minimises the
            squared weight error; ``"mean"`` clips at ``gamma * mean|w|`` (QuantGPT, arXiv 2203.10705; symmetric);
            ``"gptq"`` error-compensating rounding (arXiv 2210.17323), which needs calibration data.
        gamma: the factor of ``quantizer="mean"``.
        activations: ``"float"``; ``"int8"`` quantized per token when called; ``"int8_static"`` with one
            calibrated scale per layer.
        outliers: fraction of the weights, 0 to 0.1, kept aside in a sparse float matrix.
        scale_dtype: of the stored scales; default float16 per group, float32 per row or tensor.

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
    """

    bits: int = 4
    group_size: int | None = None
    granularity: Granularity | None = None
    symmetric: bool = False
    zeros: Literal["int", "float"] = "int"
    quantizer: Literal["minmax", "mse", "mean", "gptq"] = "minmax"
    gamma: float = 1.0
    activations: Activations = "float"
    outliers: float = 0.0
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "group_size"):
            value = getattr(self, name)
            if isinstance(value, SupportsIndex) and not isinstance(value, bool):
                object.__setattr__(self, name, index(value))  # numpy integers too
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer between 2 and 8: got bits={self.bits!r}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False: got symmetric={self.symmetric!r}")
        if self.granularity is None:
            object.__setattr__(self, "granularity", "row" if self.group_size is None else "group")
        _choice("granularity", self.granularity, GRANULARITIES)
        _choice("quantizer", self.quantizer, QUANTIZERS)
        _choice("activations", self.activations, ACTIVATIONS)
        _choice("zeros", self.zeros, ("int", "float"))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                "group_size goes with granularity='group' and only with it: "
                f"got group_size={self.group_size}, granularity={self.granularity!r}"
            )
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1
        ):
            raise ValueError(f"group_size must be an integer between 1 and K: got group_size={self.group_size!r}")
        if self.quantizer == "mean" and not self.symmetric:
            raise ValueError("quantizer='mean' clips symmetrically: it requires symmetric=True")
        if self.symmetric and self.zeros == "float":
            raise ValueError("zeros='float' is a zero point, which symmetric=True does not have")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be greater than 0 and finite: got gamma={self.gamma}")
        if not 0.0 <= self.outliers <= 0.1:
            raise ValueError(f"outliers must be a fraction between 0 and 0.1: got outliers={self.outliers}")
        if self.scale_dtype is not None and self.scale_dtype not in FLOAT_DTYPES.values():
            raise ValueError(
                f"scale_dtype must be float32, float16 or bfloat16: got scale_dtype={self.scale_dtype}"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing with this spec requires calibration data."""
        return self.quantizer == "gptq" or self.activations == "int8_static"

    def resolve_group_size(self, k: int) -> int:
        """The real group size for a weight with ``k`` input features; raises ``ValueError`` when it exceeds K."""
        if self.group_size is None:
            return k
        if self.group_size > k:
            raise ValueError(f"group_size must be between 1 and K: got group_size={self.group_size}, K={k}")
        return self.group_size

    def resolve_scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in unless their values do not fit it."""
        if self.scale_dtype is not None:
            return self.scale_dtype
        return torch.float16 if self.granularity == "group" else torch.float32

    def describe(self) -> str:
        """One short line for tables, such as ``4-bit group 64 asymmetric``."""
        return f"{_describe(self)} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class PackedFormat:
    """The stored form of one weight: everything that the shapes and dtypes of its tensors follow from.

    It is what a saved folder records per layer and what a file is checked against. ``zeros`` is ``"none"``
    (symmetric), ``"int"`` (uint8) or ``"float"``; ``outliers`` is the number of stored sparse entries.
    """

    bits: int
    out_features: int
    in_features: int
    group_size: int
    granularity: Granularity
    zeros: Literal["none", "int", "float"] = "none"
    scale_dtype: str = "float32"
    outliers: int = 0
    outlier_dtype: str = "float16"
    activations: Activations = "float"

    def __post_init__(self) -> None:
        for name in ("bits", "out_features", "in_features", "group_size", "outliers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer: got {name}={value!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be between 2 and 8: got bits={self.bits}")
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"a weight needs N, K >= 1: got N={self.out_features}, K={self.in_features}")
        _choice("granularity", self.granularity, GRANULARITIES)
        _choice("zeros", self.zeros, ("none", "int", "float"))
        _choice("scale_dtype", self.scale_dtype, tuple(FLOAT_DTYPES))
        _choice("outlier_dtype", self.outlier_dtype, tuple(FLOAT_DTYPES))
        _choice("activations", self.activations, ACTIVATIONS)
        if not 1 <= self.group_size <= self.in_features:
            raise ValueError(
                f"group_size must be between 1 and K: got group_size={self.group_size}, K={self.in_features}"
            )
        if self.granularity != "group" and self.group_size != self.in_features:
            raise ValueError(
                f"group_size must equal K with granularity={self.granularity!r}: "
                f"got group_size={self.group_size}, K={self.in_features}"
            )
        if not 0 <= self.outliers <= self.out_features * self.in_features:
            raise ValueError(f"outliers must be between 0 and N*K: got outliers={self.outliers}")

    @property
    def groups(self) -> int:
        """G = ceil(K / group_size)."""
        return -(-self.in_features // self.group_size)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """``[N, G]``, or ``[1, 1]`` per tensor."""
        return (1, 1) if self.granularity == "tensor" else (self.out_features, self.groups)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every stored tensor except the bias."""
        scale_dtype = FLOAT_DTYPES[self.scale_dtype]
        spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "packed": ((self.out_features, words_per_row(self.in_features, self.bits)), torch.int32),
            "scales": (self.scale_shape, scale_dtype),
        }
        if self.zeros != "none":
            spec["zeros"] = (self.scale_shape, torch.uint8 if self.zeros == "int" else scale_dtype)
        if self.outliers:
            columns = torch.int16 if self.in_features <= MAX_INT16_COLUMNS else torch.int32
            spec["outlier_values"] = ((self.outliers,), FLOAT_DTYPES[self.outlier_dtype])
            spec["outlier_columns"] = ((self.outliers,), columns)
            spec["outlier_rows"] = ((self.out_features + 1,), torch.int32)
        if self.activations == "int8_static":
            spec["x_scale"] = ((1,), torch.float32)
        return spec

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, the bias excluded."""
        total = 0
        for shape, dtype in self.tensors().values():
            count = 1
            for size in shape:
                count *= size
            total += count * dtype.itemsize
        return total

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by N*K: codes, scales, zeros and outliers included."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def describe(self) -> str:
        """One short line for tables, such as ``4-bit group 64 asymmetric, int8 activations``."""
        text = f"{_describe(self)} " + {
            "none": "symmetric", "int": "asymmetric", "float": "asymmetric, float zeros"
        }[self.zeros]  # fmt: skip
        if self.outliers:
            text += f", {100 * self.outliers / (self.out_features * self.in_features):.2g} % outliers"
        if self.activations != "float":
            text += ", int8 activations" if self.activations == "int8" else ", static int8 activations"
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PackedFormat:
        """Build from stored fields; raises ``ValueError`` naming an unknown, missing or invalid field."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} in a packed format")
        missing = [n for n in ("bits", "out_features", "in_features", "group_size", "granularity") if n not in fields]
        if missing:
            raise ValueError(f"missing field {missing[0]!r} in a packed format")
        return cls(**fields)
