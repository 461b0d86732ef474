"""Family ``codebook``: what the user asks for (:class:`Codebook`), what a layer stores (:class:`CodebookFormat`,
:class:`CodebookWeight`).

    w[n, k] = codebook[n, g, code[n, k]] (* scale[n, g]),    g = k // group_size      (+ sparse outliers)

with one table per tensor, per row or per group. k-means centroids (arXiv 2010.07109) need no scales; fixed tables
such as NF4 (arXiv 2305.14314) come with one scale per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.core.bitpack import pack, words_per_row
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
    check_outliers,
    check_size,
    choice,
    describe_extras,
    dtype_name,
    is_integer,
    outlier_tensors,
)  # fmt: skip
from lowbit.core.quantizer import names

NESTED_BLOCK = 256  # scales that share one scale of their own, as bitsandbytes stores them

# The quantiles of a normal distribution, scaled to [-1, 1] with an exact 0: appendix E of arXiv 2305.14314.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two exponent bits and one mantissa bit, scaled to [-1, 1], in the order of bitsandbytes' codes.
FP4 = (
    0.0, 0.0052083334, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25,
    0.0, -0.0052083334, -0.6666667, -1.0, -0.33333334, -0.5, -0.16666667, -0.25,
)  # fmt: skip
TABLES = {"nf4": NF4, "fp4": FP4}


@dataclass(frozen=True)
class Codebook(Spec):
    """How to bring a float weight ``[N, K]`` into the ``codebook`` family: the spec given to ``convert``.

    Args:
        bits: 1 to 8; with ``table``, log2 of its length.
        granularity: what shares one table: ``"tensor"``, ``"row"`` or ``"group"``. Default ``"tensor"`` for a fixed
            ``table`` and with ``scales``, ``"group"`` with ``group_size`` alone, else ``"row"``.
        group_size: input features of a group (of tables, or of scales), 1 to K; the last group of a row may be shorter.
        table: a fixed table instead of a learned one: ``"nf4"``, ``"fp4"``, or 2**bits finite values.
        scales: one scale per group (per row without ``group_size``): weights are divided by the group's ``max|w|``
            before a code is chosen. Default: on for a fixed ``table``.
        quantizer: how a table is learned: ``"kmeans"`` starts by k-means++ and makes ``iterations`` Lloyd rounds
            (arXiv 2010.07109); ``"optimal"`` finds the exact optimum of one-dimensional k-means; ``"lnq"`` starts with
            what ``sensitivity`` finds, then takes tables and scales by least squares and codes by coordinate descent on
            the error of the layer's output (LNQ, arXiv 2505.07004), of a corrected layer (``convert(correction=)``);
            ``"tuned"`` then learned rounding, :func:`lowbit.train.tune`. These two need calibration data.
            Default: ``"optimal"``; ``"kmeans"`` where its arguments are given, and for one table per tensor: it is
            faster there.
        iterations: Lloyd rounds of ``"kmeans"``.
        sensitivity: weigh each weight's squared error by how much its input matters on calibration data; where
            ``convert`` is given a ``loss``, by the square of the weight's gradient (SqueezeLLM, arXiv 2306.07629).
        outliers: fraction of the weights, 0 to 0.1, kept aside in a sparse float matrix (arXiv 2306.00014, 2306.07629).
        outliers_by: which: ``"magnitude"`` the largest; ``"sensitivity"`` those whose rounding costs most, weighed as
            by ``sensitivity`` where there is calibration data, and where codes are rounded with error feedback and
            there is no ``loss`` chosen in turns with tables and codes; ``"random"`` by ``seed``.
        activations: ``"float"``; ``"int8"`` quantized per token when called; ``"int8_static"`` with one calibrated
            scale per layer.
        seed: of the k-means++ start, and of random outliers; the same seed gives the same result.
        codebook_dtype, scale_dtype: of the stored tables and scales; default float32 for a table per tensor, float16
            otherwise (where the values fit).

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
    """

    family = "codebook"
    example = "bits=4"
    bits: int = 4
    granularity: Granularity | None = None
    group_size: int | None = None
    table: str | Sequence[float] | Tensor | None = None
    scales: bool | None = None
    quantizer: str | None = None
    iterations: int = 10
    sensitivity: bool = False
    outliers: float = 0.0
    activations: Activations = "float"
    seed: int = 0
    codebook_dtype: torch.dtype | None = None
    scale_dtype: torch.dtype | None = None
    outliers_by: OutliersBy = "magnitude"

    def __post_init__(self) -> None:
        for name in ("bits", "group_size", "iterations", "seed"):
            object.__setattr__(self, name, as_integer(getattr(self, name)))
        if not is_integer(self.bits) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer between 1 and 8: got bits={self.bits!r}")
        self.activation.check(None)
        check_size("iterations", self.iterations)
        check_outliers(self)
        if self.table is not None:
            self._check_table()
        if self.group_size is not None:
            check_size("group_size", self.group_size)
        if self.scales is None:
            object.__setattr__(self, "scales", self.table is not None)
        for name in ("scales", "sensitivity"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False: got {name}={getattr(self, name)!r}")
        if self.granularity is None:
            own = "tensor" if self.scales else "row" if self.group_size is None else "group"
            object.__setattr__(self, "granularity", own)
        choice("granularity", self.granularity, GRANULARITIES)
        if self.quantizer is None:
            seeded = self.seed != Codebook.seed and self.outliers_by != "random"
            asked_for = seeded or self.iterations != Codebook.iterations
            kmeans = asked_for or self.granularity == "tensor"
            object.__setattr__(self, "quantizer", "kmeans" if kmeans else "optimal")
        choice("quantizer", self.quantizer, names("codebook"))
        if self.granularity == "group" and (self.group_size is None or self.scales):
            raise ValueError(
                "granularity='group' is a table per group: it requires a group_size, and takes no scales "
                f"(they would be part of the table): got group_size={self.group_size}, scales={self.scales}"
            )
        if self.granularity != "group" and self.group_size is not None and not self.scales:
            raise ValueError(
                "group_size goes with granularity='group' or with scales=True: "
                f"got group_size={self.group_size}, granularity={self.granularity!r}, scales=False"
            )
        if self.table is not None and self.granularity != "tensor":
            raise ValueError(f"a fixed table serves the whole tensor: got granularity={self.granularity!r}")
        check_float_dtype("codebook_dtype", self.codebook_dtype)
        check_float_dtype("scale_dtype", self.scale_dtype)

    def _check_table(self) -> None:
        if isinstance(self.table, str):
            choice("table", self.table, TABLES)
            values: tuple[float, ...] = TABLES[self.table]
        else:
            try:
                values = tuple(float(value) for value in self.table)  # type: ignore[union-attr]
            except (TypeError, ValueError, RuntimeError):
                given = f"got table={self.table!r:.200}"
                raise ValueError(f"table must be a name or a sequence of numbers: {given}") from None
            object.__setattr__(self, "table", values)
        largest = torch.finfo(torch.float32).max
        if len(values) not in (2, 4, 8, 16, 32, 64, 128, 256) or not all(abs(value) <= largest for value in values):
            raise ValueError(f"table must hold 2, 4, 8, ... or 256 finite float32 values: got {values!r:.200}")
        bits = len(values).bit_length() - 1
        if self.bits not in (bits, Codebook.bits):
            raise ValueError(f"a table of {len(values)} values has {bits} bits: got bits={self.bits}")
        object.__setattr__(self, "bits", bits)

    @property
    def shares_over_rows(self) -> bool:
        return self.granularity == "tensor" and self.table is None

    @property
    def values(self) -> tuple[float, ...] | None:
        """The values of a fixed table; ``None`` when it is learned."""
        if isinstance(self.table, str):
            return TABLES[self.table]
        return self.table  # type: ignore[return-value]  # __post_init__ made it a tuple

    def for_embedding(self, *, tied: bool = False) -> Codebook:
        spec = replace(self, sensitivity=False) if self.sensitivity and not tied else self
        return super(Codebook, spec).for_embedding(tied=tied)  # type: ignore[no-any-return]

    def problem(self, n: int, k: int) -> str | None:
        if self.group_size is not None and self.group_size > k:
            return f"group_size must be between 1 and K: got group_size={self.group_size}, K={k}"
        return None

    def resolve_codebook_dtype(self) -> torch.dtype:
        """The dtype that tables are stored in unless their values do not fit it."""
        return self.codebook_dtype or (torch.float32 if self.granularity == "tensor" else torch.float16)

    def resolve_scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in unless their values do not fit it."""
        return self.scale_dtype or (torch.float32 if self.group_size is None else torch.float16)

    def format(self, weight: Tensor, kind: str) -> CodebookFormat:
        """The format of the quantized weight, unless values turn out not to fit their dtype."""
        n, k = weight.shape
        return CodebookFormat(
            bits=self.bits,
            out_features=n,
            in_features=k,
            group_size=k if self.group_size is None else self.group_size,
            granularity=self.granularity or "row",
            codebook_dtype=dtype_name(self.resolve_codebook_dtype()),
            scales=dtype_name(self.resolve_scale_dtype()) if self.scales else "none",
            outliers=round(self.outliers * n * k),
            activations="float" if kind == "embedding" else self.activations,
        )

    def describe(self) -> str:
        """One short line for tables, such as ``4-bit codebook per row``."""
        return _describe(self.bits, self.granularity or "row", self.group_size, bool(self.scales))


def _describe(bits: int, granularity: Granularity, group_size: int | None, scales: bool) -> str:
    where = f"group {group_size}" if granularity == "group" else f"per {granularity}"
    text = f"{bits}-bit codebook {where}"
    return text + (", scale per row" if group_size is None else f", scale per group {group_size}") * scales


@dataclass(frozen=True)
class CodebookFormat(Format):
    """The stored form of one weight: everything that the shapes and dtypes of its tensors follow from.

    ``granularity`` is what shares a table. ``scales`` is ``"none"``, their dtype, or ``"nested"``: uint8 codes of a
    second table of 256 values, with one scale per 256 of them and an offset (bitsandbytes' double quantization).
    ``outliers`` is the number of stored sparse entries.
    """

    family = "codebook"
    bits: int
    out_features: int
    in_features: int
    group_size: int
    granularity: Granularity
    codebook_dtype: str = "float32"
    scales: str = "none"
    outliers: int = 0
    outlier_dtype: str = "float16"
    activations: Activations = "float"

    def __post_init__(self) -> None:
        check_coded_format(self, min_bits=1)
        choice("codebook_dtype", self.codebook_dtype, FLOAT_DTYPES)
        choice("scales", self.scales, ("none", "nested", *FLOAT_DTYPES))
        if self.granularity == "group" and self.scales != "none":
            raise ValueError(f"scales must be 'none' with granularity='group': got scales={self.scales!r}")
        if self.granularity != "group" and self.scales == "none" and self.group_size != self.in_features:
            raise ValueError(
                f"group_size must equal K where nothing is stored per group: "
                f"got group_size={self.group_size}, K={self.in_features}"
            )

    @property
    def groups(self) -> int:
        """G = ceil(K / group_size)."""
        return -(-self.in_features // self.group_size)

    @property
    def codebook_shape(self) -> tuple[int, int, int]:
        """``[1, 1, 2**bits]`` per tensor, ``[N, 1, 2**bits]`` per row, ``[N, G, 2**bits]`` per group."""
        rows = 1 if self.granularity == "tensor" else self.out_features
        return rows, self.groups if self.granularity == "group" else 1, 1 << self.bits

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.bits, self.group_size

    def stacked(self, count: int) -> Any:
        return replace(self, out_features=count * self.out_features, outliers=count * self.outliers)

    def weight_tensors(self) -> dict[str, TensorSpec]:
        n, k = self.out_features, self.in_features
        spec: dict[str, TensorSpec] = {
            "packed": ((n, words_per_row(k, self.bits)), torch.int32),
            "codebook": (self.codebook_shape, FLOAT_DTYPES[self.codebook_dtype]),
        }
        if self.scales == "nested":
            spec["scales"] = ((n, self.groups), torch.uint8)
            spec["scale_codebook"] = ((256,), torch.float32)
            spec["scale_absmax"] = ((-(-n * self.groups // NESTED_BLOCK),), torch.float32)
            spec["scale_offset"] = ((1,), torch.float32)
        elif self.scales != "none":
            spec["scales"] = ((n, self.groups), FLOAT_DTYPES[self.scales])
        return spec | outlier_tensors(n, k, self.outliers, self.outlier_dtype)

    def describe(self) -> str:
        """One short line for tables, such as ``3-bit codebook per row, 0.5 % outliers``."""
        per_group = self.granularity == "group" or self.group_size != self.in_features
        group_size = self.group_size if per_group else None
        text = _describe(self.bits, self.granularity, group_size, self.scales != "none")
        return text + (" (nested)" if self.scales == "nested" else "") + describe_extras(self)


@dataclass(frozen=True)
class CodebookWeight(Weight):
    """``w[n, k] = codebook[n, g, codes[n, k]] (* scales[n, g])``, g = k // group_size, + outliers.

    codes: uint8 [N, K], values 0 .. 2**bits - 1.
    codebook: float16, bfloat16 or float32; [1, 1, 2**bits] per tensor, [N, 1, 2**bits] per row, [N, G, 2**bits] per
        group.
    scales: None; float [N, G]; or uint8 [N, G], with scale[n, g] = scale_codebook[scales[n, g]] *
        scale_absmax[(n*G + g) // 256] + scale_offset (nested; those three float32 [256], [ceil(N*G/256)], [1]).
    group_size: input features per table or scale; None where one serves a row or the tensor.
    outlier_values [nnz], outlier_columns [nnz] (int16; int32 when K > 32768), outlier_rows int32 [N+1]: the
        sparse part in CSR form, columns ascending within a row; all None without outliers.
    """

    family = "codebook"
    codes: Tensor
    codebook: Tensor
    scales: Tensor | None = None
    group_size: int | None = None
    scale_codebook: Tensor | None = None
    scale_absmax: Tensor | None = None
    scale_offset: Tensor | None = None
    outlier_values: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_rows: Tensor | None = None

    @property
    def bits(self) -> int:
        return self.codebook.shape[-1].bit_length() - 1

    def format(self, activations: Activations = "float") -> CodebookFormat:
        n, k = self.codes.shape
        if self.codebook.dim() != 3 or self.codebook.shape[-1] != 1 << self.bits:
            raise ValueError(
                f"codebook must have shape [1 or N, 1 or G, 2**bits]: got shape {tuple(self.codebook.shape)}"
            )
        per_group = self.codebook.shape[1] != 1 or (self.group_size is not None and self.scales is None)
        granularity: Granularity = "group" if per_group else "tensor" if self.codebook.shape[0] == 1 else "row"
        if self.scales is None:
            scales = "none"
        else:
            scales = dtype_name(self.scales.dtype) if self.scales.is_floating_point() else "nested"
        values = self.outlier_values
        format = CodebookFormat(
            bits=self.bits,
            out_features=n,
            in_features=k,
            group_size=k if self.group_size is None else self.group_size,
            granularity=granularity,
            codebook_dtype=dtype_name(self.codebook.dtype),
            scales=scales,
            outliers=0 if values is None else len(values),
            outlier_dtype="float16" if values is None else dtype_name(values.dtype),
            activations=activations,
        )
        for name, (shape, _) in format.tensors().items():
            tensor = getattr(self, name, None)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}: got {tuple(tensor.shape)}")
        return format

    def tensors(self) -> dict[str, Tensor]:
        found = {
            "packed": pack(self.codes, self.bits), "codebook": self.codebook, "scales": self.scales,
            "scale_codebook": self.scale_codebook, "scale_absmax": self.scale_absmax,
            "scale_offset": self.scale_offset, "outlier_values": self.outlier_values,
            "outlier_columns": self.outlier_columns, "outlier_rows": self.outlier_rows,
        }  # fmt: skip
        return {name: tensor for name, tensor in found.items() if tensor is not None}
