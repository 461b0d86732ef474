"""Family ``packed``: what the user asks for (:class:`Packed`), what a layer stores (:class:`PackedFormat`,
:class:`PackedWeight`).

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],    g = k // group_size      (+ sparse outliers)
    w[n, k] = code[n, k] * scale[n, g] - minimum[n, g]    with zeros="minimum": two roundings in float32

Symmetric formats have no zeros tensor: their zero is ``2**(bits-1)``. Ternary is the symmetric 2-bit case. Scales of
two levels are codes with a float factor for each block of groups, rounded once in float32:

    scale[n, g] = scale_factors[n, g // scale_block] * scales[n, g]    (a minimum: of zero_factors and zeros)
    scale[n, g] = scale_factors[0, 0] * scales[n, g]                   with one factor for all rows

Packed zeros are integers of ``bits`` bits, dense in the bytes of a row: zero g is bits ``[g*bits, (g+1)*bits)`` of the
row's stream, the lowest bit of a byte first. Each row takes ``ceil(G*bits/8)`` bytes, which must be fewer than G.

Beside minima, products with x are sums of codes, times scales, less sums of x, times minima. Where ``code * scale`` has
more than 24 bits, as with scales that fill a float32, an element of y may so be off by 2**-24 of
``sum |x * code * scale|`` besides.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.core.activations import ActivationSpec
from lowbit.core.bitpack import bytes_per_row, pack, pack_bytes, words_per_row
from lowbit.core.family import (
    FLOAT_DTYPES,
    GRANULARITIES,
    Activations,
    Format,
    Granularity,
    OutliersBy,
    Spec,
    TensorSpec,
    Weight,
    as_integer,
    check_coded_format,
    check_float_dtype,
    check_group_size,
    check_outliers,
    check_size,
    choice,
    describe_extras,
    dtype_name,
    is_integer,
    outlier_tensors,
)  # fmt: skip
from lowbit.core.quantizer import names

# What a Packed that does not say has: docs/quality.md shows the measurements that chose it.
GROUP_SIZE = 64  # a shorter row is one group
QUANTIZER = "mse"
CODE_DTYPES = {"uint8": torch.uint8, "int8": torch.int8}  # of scales of two levels
Zeros = Literal["none", "int", "float", "minimum"]
GROUPS_OF_A_FACTOR = 16  # of scales of 8 bits: a row of fewer groups shares its factor with all others
FLOAT_ZEROS_UP_TO = 4  # bits; finer grids lose nothing by integer zeros, which are smaller


def _describe(bits: int, granularity: Granularity | None, group_size: int | None) -> str:
    """``4-bit group 64``, ``8-bit per row``."""
    return f"{bits}-bit " + (f"group {group_size}" if granularity == "group" else f"per {granularity}")


def saves_bytes(groups: int, bits: int) -> bool:
    """Whether a row of so many packed zeros is shorter than with a byte for each."""
    return bytes_per_row(groups, bits) < groups


@dataclass(frozen=True)
class Packed(Spec):
    """How to quantize a float weight ``[N, K]`` into the ``packed`` family: the spec given to ``convert``.

    Args:
        bits: 2 to 8.
        group_size: input features that share one scale, 1 to K; the last group of a row may be shorter. Default: 64,
            or K in a shorter row.
        granularity: ``"group"`` (default), ``"row"`` (one scale per output feature) or ``"tensor"``.
        symmetric: levels ``{-n..n} * scale`` with ``n = 2**(bits-1) - 1`` (2 bits: ternary); else a zero point.
        zeros: of an asymmetric format: ``"int"`` (0..2**bits-1, stored as uint8) or ``"float"``. Default: ``"float"``
            up to 4 bits, ``"int"`` above.
        quantizer: ``"mse"`` (default) the clipping that minimises the squared weight error; ``"minmax"`` round to
            nearest over the full range; ``"mean"`` clips at ``gamma * mean|w|`` (QuantGPT, arXiv 2203.10705;
            symmetric); ``"gptq"`` error-compensating rounding (arXiv 2210.17323), ``"descent"`` the same, then scales,
            zeros and codes improved in turns, and layers corrected (``convert(correction=)``); ``"tuned"`` then learned
            rounding, :func:`lowbit.train.tune`. These three need calibration data.
        gamma: the factor of ``quantizer="mean"``.
        activations: ``"float"``; ``"int8"`` quantized per token when called; ``"int8_static"`` with one
            calibrated scale per layer.
        activation_group_size: of ``activations="int8"``: input features of a token that share one scale, a multiple
            of 32; where the weight has groups, one of the two sizes divides the other. None: the whole token.
        outliers: fraction of the weights, 0 to 0.1, kept aside in a sparse float matrix.
        outliers_by: which: ``"magnitude"`` the largest; ``"sensitivity"`` those whose rounding costs most, squared
            errors being weighed by how much the input matters where there is calibration data, and with a ``loss`` by
            the square of the weight's gradient (SqueezeLLM, arXiv 2306.07629), and without a ``loss`` chosen in turns
            with grids and codes by quantizers with error feedback (``gptq``, ``descent``, ``tuned``); ``"random"`` by
            ``seed``.
        seed: of random outliers.
        scale_dtype: of the stored scales; default float16 per group, float32 per row or tensor. With ``scale_bits`` of
            the factors; default bfloat16.
        packed_zeros: integer zeros take ``bits`` bits each instead of a byte, where a row of groups then takes fewer
            bytes. The same weight, bit for bit. On a GPU, kernels of Triton run it, not those of CUDA C++.
        scale_bits: 8: scales of groups are codes of 8 bits times a float factor: that of a row where it has 16 groups
            or more, else one for the whole weight. Zeros are integers then. None: floats. GPUs as with
            ``packed_zeros``, at less speed.

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
    """

    family = "packed"
    example = "bits=4"
    bits: int = 4
    group_size: int | None = None
    granularity: Granularity | None = None
    symmetric: bool = False
    zeros: Literal["int", "float"] | None = None
    quantizer: str = QUANTIZER
    gamma: float = 1.0
    activations: Activations = "float"
    outliers: float = 0.0
    scale_dtype: torch.dtype | None = None
    activation_group_size: int | None = None
    outliers_by: OutliersBy = "magnitude"
    seed: int = 0
    packed_zeros: bool = False
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "group_size", "activation_group_size", "seed", "scale_bits"):
            object.__setattr__(self, name, as_integer(getattr(self, name)))
        if not is_integer(self.bits) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer between 2 and 8: got bits={self.bits!r}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False: got symmetric={self.symmetric!r}")
        if not isinstance(self.packed_zeros, bool):
            raise ValueError(f"packed_zeros must be True or False: got packed_zeros={self.packed_zeros!r}")
        if self.granularity is None:
            object.__setattr__(self, "granularity", "group")
        if self.zeros is None:
            whole = self.bits > FLOAT_ZEROS_UP_TO or self.symmetric or self.packed_zeros or self.scale_bits is not None
            object.__setattr__(self, "zeros", "int" if whole else "float")
        choice("granularity", self.granularity, GRANULARITIES)
        choice("quantizer", self.quantizer, names("packed"))
        choice("zeros", self.zeros, ("int", "float"))
        if self.granularity != "group" and self.group_size is not None:
            raise ValueError(
                "group_size goes with granularity='group' and only with it: "
                f"got group_size={self.group_size}, granularity={self.granularity!r}"
            )
        if self.group_size is not None:
            check_size("group_size", self.group_size)
        self.activation.check(self.group_size)
        if self.quantizer == "mean" and not self.symmetric:
            raise ValueError("quantizer='mean' clips symmetrically: it requires symmetric=True")
        if self.symmetric and self.zeros == "float":
            raise ValueError("zeros='float' is a zero point, which symmetric=True does not have")
        if self.packed_zeros and (self.symmetric or self.zeros == "float"):
            given = "symmetric=True" if self.symmetric else "zeros='float'"
            raise ValueError(f"packed_zeros=True is of integer zeros: it excludes {given}")
        if self.scale_bits is not None:
            if self.scale_bits != 8:
                raise ValueError(f"scale_bits must be 8 or None: got scale_bits={self.scale_bits!r}")
            if self.granularity != "group" or self.zeros == "float":
                given = "zeros='float'" if self.granularity == "group" else f"granularity={self.granularity!r}"
                raise ValueError(f"scale_bits=8 is of scales of groups beside integer zeros or none: got {given}")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be greater than 0 and finite: got gamma={self.gamma}")
        check_outliers(self)
        check_float_dtype("scale_dtype", self.scale_dtype)

    @property
    def shares_over_rows(self) -> bool:
        return self.granularity == "tensor"

    def problem(self, n: int, k: int) -> str | None:
        if self.group_size is not None and self.group_size > k:
            return f"group_size must be between 1 and K: got group_size={self.group_size}, K={k}"
        return None

    def format(self, weight: Tensor, kind: str) -> PackedFormat:
        """The format of the quantized weight, unless its scales turn out not to fit their dtype."""
        n, k = weight.shape
        groups = -(-k // self.resolve_group_size(k)) if self.scale_bits is not None else None
        return PackedFormat(
            bits=self.bits,
            out_features=n,
            in_features=k,
            group_size=self.resolve_group_size(k),
            granularity=self.granularity or "row",
            zeros="none" if self.symmetric else self.zeros or "int",
            scale_dtype=dtype_name(self.resolve_scale_dtype()),
            outliers=round(self.outliers * n * k),
            packed_zeros=self.packs_zeros(k),
            scale_codes=None if groups is None else "uint8",
            scale_block=groups,
            one_factor=groups is not None and n > 1 and groups < GROUPS_OF_A_FACTOR,
            **asdict(ActivationSpec() if kind == "embedding" else self.activation),
        )

    def resolve_group_size(self, k: int) -> int:
        """The real group size for a weight with ``k`` input features; raises ``ValueError`` where it exceeds K."""
        if self.group_size is not None:
            check_group_size(self.group_size, k)
            return self.group_size
        if self.granularity != "group":
            return k
        columns = self.activation_group_size
        if columns is None:
            return min(GROUP_SIZE, k)
        size = GROUP_SIZE
        while size > k or (size % columns and columns % size):
            size //= 2
        return size

    def resolve_scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in unless their values do not fit it."""
        if self.scale_dtype is not None:
            return self.scale_dtype
        if self.scale_bits is not None:
            return torch.bfloat16
        return torch.float16 if self.granularity == "group" else torch.float32

    def packs_zeros(self, k: int) -> bool:
        """Whether the zeros of a weight with ``k`` input features are stored packed."""
        return self.packed_zeros and saves_bytes(-(-k // self.resolve_group_size(k)), self.bits)

    def describe(self) -> str:
        """One short line for tables, such as ``4-bit group 64 asymmetric``."""
        where = _describe(self.bits, self.granularity, self.group_size or GROUP_SIZE)
        return f"{where} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class PackedFormat(Format):
    """The stored form of one weight: everything that the shapes and dtypes of its tensors follow from.

    ``zeros`` is ``"none"`` (symmetric), ``"int"`` (uint8), ``"float"``, or ``"minimum"``: the tensor ``zeros`` then
    holds minima. ``scale_codes``, ``"uint8"`` or ``"int8"``, says that scales have two levels: codes in ``scales``,
    and for each ``scale_block`` groups of a row a factor of ``scale_dtype`` in ``scale_factors``; minima are then
    uint8 codes, with ``zero_factors``. With ``packed_zeros`` integer zeros take ``bits`` bits each, with
    ``one_factor`` all rows share a factor, ``[1, 1]``, where ``scale_block`` is G. ``outliers`` is the number of
    stored sparse entries. With ``act_order`` the columns are those of the weight in another order (GPTQ's
    activation order, arXiv 2210.17323): column k meets feature ``order[k]`` of x, and groups, scales and outliers
    are of columns.
    """

    family = "packed"
    bits: int
    out_features: int
    in_features: int
    group_size: int
    granularity: Granularity
    zeros: Zeros = "none"
    scale_dtype: str = "float32"
    outliers: int = 0
    outlier_dtype: str = "float16"
    activations: Activations = "float"
    activation_group_size: int | None = None
    act_order: bool = False
    scale_codes: Literal["uint8", "int8"] | None = None
    scale_block: int | None = None
    packed_zeros: bool = False
    one_factor: bool = False

    later = ("act_order", "scale_codes", "scale_block", "packed_zeros", "one_factor")

    def __post_init__(self) -> None:
        check_coded_format(self, min_bits=2)
        for name in ("act_order", "packed_zeros", "one_factor"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False: got {name}={getattr(self, name)!r}")
        choice("zeros", self.zeros, ("none", "int", "float", "minimum"))
        choice("scale_dtype", self.scale_dtype, tuple(FLOAT_DTYPES))
        if self.scale_codes is not None:
            choice("scale_codes", self.scale_codes, tuple(CODE_DTYPES))
        if (self.scale_codes is None) != (self.scale_block is None):
            raise ValueError("scale_codes and scale_block must be given together: "
                             f"got scale_codes={self.scale_codes!r}, scale_block={self.scale_block!r}")  # fmt: skip
        if self.scale_block is not None:
            check_size("scale_block", self.scale_block)
            if self.zeros == "float":
                raise ValueError("zeros must be 'none', 'int' or 'minimum' beside scale_codes: got zeros='float'")
            if self.scale_block > self.groups or self.granularity == "tensor":
                raise ValueError(
                    "scale_block must be between 1 and G, the groups of a row: got "
                    f"scale_block={self.scale_block}, G={self.groups}, granularity={self.granularity!r}"
                )
        if self.one_factor and self.scale_block != self.groups:
            raise ValueError(
                f"one_factor=True needs scale_block=G: got scale_block={self.scale_block}, G={self.groups}"
            )
        if self.packed_zeros and (self.zeros != "int" or not saves_bytes(self.groups, self.bits)):
            raise ValueError(
                "packed_zeros=True needs zeros='int' and rows that it makes shorter: "
                f"got zeros={self.zeros!r}, bits={self.bits}, G={self.groups}"
            )
        if self.granularity != "group" and self.group_size != self.in_features:
            raise ValueError(
                f"group_size must equal K with granularity={self.granularity!r}: "
                f"got group_size={self.group_size}, K={self.in_features}"
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.bits, self.group_size

    @property
    def numbers_behind(self) -> tuple[int, ...]:
        return self.zeros == "minimum", self.scale_block or 0

    @property
    def groups(self) -> int:
        """G = ceil(K / group_size)."""
        return -(-self.in_features // self.group_size)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """``[N, G]``, or ``[1, 1]`` per tensor."""
        return (1, 1) if self.granularity == "tensor" else (self.out_features, self.groups)

    def stacked(self, count: int) -> Any:
        # weights that are joined have factors of their own
        one_factor = self.one_factor and count == 1
        n, outliers = count * self.out_features, count * self.outliers
        return replace(self, out_features=n, outliers=outliers, one_factor=one_factor)

    def weight_tensors(self) -> dict[str, TensorSpec]:
        scale_dtype = FLOAT_DTYPES[self.scale_dtype]
        spec: dict[str, TensorSpec] = {
            "packed": ((self.out_features, words_per_row(self.in_features, self.bits)), torch.int32),
            "scales": (self.scale_shape, CODE_DTYPES[self.scale_codes] if self.scale_codes else scale_dtype),
        }
        if self.zeros != "none":
            coded = self.zeros == "int" or (self.zeros == "minimum" and self.scale_codes is not None)
            spec["zeros"] = (self.scale_shape, torch.uint8 if coded else scale_dtype)
        if self.packed_zeros:
            spec["zeros"] = ((self.out_features, bytes_per_row(self.groups, self.bits)), torch.uint8)
        if self.scale_block is not None:
            rows = 1 if self.one_factor else self.out_features
            factors = (rows, -(-self.groups // self.scale_block)), scale_dtype
            spec["scale_factors"] = factors
            if self.zeros == "minimum":
                spec["zero_factors"] = factors
        if self.act_order:
            spec["order"] = ((self.in_features,), torch.int32)
        return spec | outlier_tensors(self.out_features, self.in_features, self.outliers, self.outlier_dtype)

    def describe(self) -> str:
        """One short line for tables, such as ``4-bit group 64 asymmetric, int8 activations``."""
        text = f"{_describe(self.bits, self.granularity, self.group_size)} " + {
            "none": "symmetric", "int": "asymmetric", "float": "asymmetric, float zeros", "minimum": "with minima"
        }[self.zeros]  # fmt: skip
        if self.scale_codes is not None:
            text += f", {self.scale_codes} scales"
            text += " with one factor" if self.one_factor else f" in blocks of {self.scale_block}"
        if self.packed_zeros:
            text += ", packed zeros"
        return text + (", act-order" if self.act_order else "") + describe_extras(self)


@dataclass(frozen=True)
class PackedWeight(Weight):
    """``w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]``, g = k // group_size, + outliers; with minimum=True
    ``codes[n, k] * scales[n, g] - zeros[n, g]``.

    codes: uint8 [N, K], values 0 .. 2**bits - 1.
    scales: float16, bfloat16 or float32; [N, G] per group, [N, 1] per row, [1, 1] per tensor. With scale_factors:
        uint8 or int8, [N, G], to be multiplied by them.
    zeros: None (symmetric, zero = 2**(bits-1)), uint8, or the dtype of scales; the shape of scales.
    bits: of the codes, 2 to 8.
    group_size: input features per scale; None for one scale per row or tensor (by the shape of scales).
    outlier_values [nnz], outlier_columns [nnz] (int16; int32 when K > 32768), outlier_rows int32 [N+1]: the
        sparse part in CSR form, columns ascending within a row; all None without outliers.
    order: int32 [K], which feature of x each column meets: a permutation; None for their own order.
    minimum: whether zeros are minima, of the dtype of scales; uint8, to be multiplied by zero_factors, with
        scale_factors.
    scale_factors, zero_factors: float16, bfloat16 or float32 [N, ceil(G / scale_block)], or with scale_block = G
        [1, 1], for all rows; None for scales of one level.
    scale_block: groups of a row that share a factor.
    packed_zeros: whether uint8 zeros, here of a byte each, are stored in ``bits`` bits each.
    """

    family = "packed"
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int | None = None
    outlier_values: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_rows: Tensor | None = None
    order: Tensor | None = None
    minimum: bool = False
    scale_factors: Tensor | None = None
    zero_factors: Tensor | None = None
    scale_block: int | None = None
    packed_zeros: bool = False

    def format(self, activations: Activations = "float") -> PackedFormat:
        n, k = self.codes.shape
        if self.group_size is not None:
            granularity: Granularity = "group"
        else:
            granularity = "tensor" if tuple(self.scales.shape) == (1, 1) and self.scale_factors is None else "row"
        if self.minimum and self.zeros is None:
            raise ValueError("minimum=True needs zeros, which hold the minima: got None")
        if self.scale_factors is None and not self.scales.is_floating_point():
            raise ValueError(f"scales must be floats without scale_factors: got {self.scales.dtype}")
        is_float = self.zeros is not None and self.zeros.is_floating_point()
        floats = self.scales if self.scale_factors is None else self.scale_factors
        codes: Any = None if self.scale_factors is None else dtype_name(self.scales.dtype)
        format = PackedFormat(
            bits=self.bits,
            out_features=n,
            in_features=k,
            group_size=k if self.group_size is None else self.group_size,
            granularity=granularity,
            zeros="none" if self.zeros is None else "minimum" if self.minimum else "float" if is_float else "int",
            scale_dtype=dtype_name(floats.dtype),
            outliers=0 if self.outlier_values is None else len(self.outlier_values),
            outlier_dtype="float16" if self.outlier_values is None else dtype_name(self.outlier_values.dtype),
            activations=activations,
            act_order=self.order is not None,
            scale_codes=codes,
            scale_block=self.scale_block,
            packed_zeros=self.packed_zeros,
            one_factor=n > 1 and self.scale_factors is not None and len(self.scale_factors) == 1,
        )
        if tuple(self.scales.shape) != format.scale_shape:
            raise ValueError(f"scales must have shape {format.scale_shape}: got {tuple(self.scales.shape)}")
        return format

    def tensors(self) -> dict[str, Tensor]:
        zeros = self.zeros
        if self.packed_zeros and zeros is not None:
            zeros = pack_bytes(zeros, self.bits)
        found = {
            "packed": pack(self.codes, self.bits), "scales": self.scales, "zeros": zeros,
            "outlier_values": self.outlier_values, "outlier_columns": self.outlier_columns,
            "outlier_rows": self.outlier_rows, "order": self.order, "scale_factors": self.scale_factors,
            "zero_factors": self.zero_factors,
        }  # fmt: skip
        return {name: tensor for name, tensor in found.items() if tensor is not None}
