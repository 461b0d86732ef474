"""Cases of family ``packed``: every format × shapes; backends and ISAs are in :mod:`lowbit.testing.where`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import layouts
from lowbit.core.bitpack import pack
from lowbit.core.family import FLOAT_DTYPES
from lowbit.packed.format import PackedFormat, saves_bytes
from lowbit.packed.operands import PackedOperands
from lowbit.testing.where import call

DTYPES = tuple(FLOAT_DTYPES.values())
BITS = tuple(range(2, 9))

# (N, K, group_size or None): odd on purpose; 172 in groups of 32 leaves a shorter last group
SHAPES = (
    (1, 1, None), (1, 1, 1), (3, 5, 2), (2, 31, None), (5, 33, 33), (7, 64, 16), (13, 172, 32), (9, 172, 7),
    (33, 257, 64), (6, 320, 128), (17, 96, None), (4, 1000, 96), (66, 40, 40),
)  # fmt: skip
ROWS = (0, 1, 2, 3, 5, 8, 17)


def formats(bits: int, n: int, k: int, group_size: int | None) -> Iterator[PackedFormat]:
    """Every granularity × zeros × outliers that a weight of this shape can have; scale dtypes in rotation."""
    granularities = ("group",) if group_size is not None else ("row", "tensor")
    for i, granularity in enumerate(granularities):
        for j, zeros in enumerate(("none", "int", "float")):
            for outliers in (0, max(1, n * k // 50)):
                yield PackedFormat(
                    bits=bits,
                    out_features=n,
                    in_features=k,
                    group_size=k if group_size is None else group_size,
                    granularity=granularity,  # type: ignore[arg-type]
                    zeros=zeros,  # type: ignore[arg-type]
                    scale_dtype=tuple(FLOAT_DTYPES)[(bits + i + j + n) % 3],
                    outliers=outliers,
                    outlier_dtype=tuple(FLOAT_DTYPES)[(bits + j + k) % 3],
                )


def more_formats(bits: int, n: int, k: int, group_size: int | None, *, turn: int = 0) -> Iterator[PackedFormat]:
    """Minima, scales of two levels and both, with one factor too, packed zeros; with outliers and dtypes in rotation
    from ``turn`` on."""
    groups = 1 if group_size is None else -(-k // group_size)
    granularity = "row" if group_size is None else "group"
    kinds: list[tuple[str, str | None, bool]] = [
        ("minimum", None, False), ("minimum", "uint8", False), ("none", "int8", False), ("int", "uint8", False),
        ("minimum", "int8", False), ("minimum", "uint8", True), ("none", "uint8", True),
    ]  # fmt: skip
    if saves_bytes(groups, bits):
        kinds += [("packed", None, False), ("packed", "int8", False), ("packed", "uint8", True)]
    for i, (zeros, codes, one_factor) in enumerate(kinds, turn):
        yield PackedFormat(
            bits=bits,
            out_features=n,
            in_features=k,
            group_size=group_size or k,
            granularity=granularity,  # type: ignore[arg-type]
            zeros="int" if zeros == "packed" else zeros,  # type: ignore[arg-type]
            packed_zeros=zeros == "packed",
            scale_dtype=tuple(FLOAT_DTYPES)[i % 3],
            outliers=max(1, n * k // 50) if i % 2 else 0,
            outlier_dtype=tuple(FLOAT_DTYPES)[(i + 1) % 3],
            scale_codes=codes,  # type: ignore[arg-type]
            scale_block=None if codes is None else groups if one_factor else min(groups, (1, 3, groups)[i % 3]),
            one_factor=one_factor,
        )
    if group_size is None:
        yield PackedFormat(bits, n, k, k, "tensor", "minimum", tuple(FLOAT_DTYPES)[turn % 3])


@dataclass
class Weight:
    """Random tensors of a format, in the order in which the ops take them."""

    format: PackedFormat
    codes: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    outliers: tuple[Tensor | None, Tensor | None, Tensor | None]
    scale_factors: Tensor | None = None
    zero_factors: Tensor | None = None
    _dense: dict[bool, Tensor] = field(default_factory=dict)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        int8: bool = False,
        x_scale: Tensor | None = None,
        x_group: int = 0,
    ) -> Tensor:
        activation = dict(x_scale=x_scale, int8=int8, x_group=x_group)
        return call(torch.ops.lowbit.packed_linear, x, **self.arguments, bias=bias, **activation)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        k = self.format.in_features
        return call(torch.ops.lowbit.packed_dequantize, **self.arguments, in_features=k, dtype=dtype)

    def embedding(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        k = self.format.in_features
        return call(torch.ops.lowbit.packed_embedding, ids, **self.arguments, in_features=k, dtype=dtype)

    @property
    def operands(self) -> PackedOperands:
        """:attr:`arguments` in one."""
        return PackedOperands(**self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """The weight's part of the ops' arguments, by name; ``packed`` may have been put into another layout."""
        f, (values, columns, rows) = self.format, self.outliers
        layout = layouts.fitting(self.packed, f.in_features, f.bits)
        return dict(
            packed=self.packed, outlier_values=values, outlier_columns=columns, outlier_rows=rows, scales=self.scales,
            zeros=self.zeros, scale_factors=self.scale_factors, zero_factors=self.zero_factors, bits=f.bits,
            group_size=f.group_size, layout=0 if layout is None else layout.number, minimum=f.zeros == "minimum",
            scale_block=f.scale_block or 0,
        )  # fmt: skip

    def plain_zeros(self) -> Tensor:
        """The zeros, packed ones with a byte for each."""
        f, zeros = self.format, self.zeros
        assert zeros is not None
        if not f.packed_zeros:
            return zeros
        rows, top = [int.from_bytes(bytes(row), "little") for row in zeros.tolist()], (1 << f.bits) - 1
        values = [[row >> g * f.bits & top for g in range(f.groups)] for row in rows]
        return torch.tensor(values, dtype=torch.uint8)

    def dense(self, outliers: bool = True) -> Tensor:
        """The float64 holding of the weight by the format's definition, written independently of the package."""
        f = self.format
        if outliers in self._dense:
            return self._dense[outliers]
        group = [k // f.group_size for k in range(f.in_features)]
        block = [g // f.scale_block for g in group] if f.scale_block else []

        def of_columns(values: Tensor, factors: Tensor | None) -> Tensor:
            spread = values.float().expand(f.out_features, -1)[:, group]
            return spread if factors is None else factors.float()[:, block] * spread

        scales = of_columns(self.scales, self.scale_factors)
        if self.zeros is None:
            zeros = torch.full_like(scales, 2.0 ** (f.bits - 1))
        else:
            zeros = of_columns(self.plain_zeros(), self.zero_factors)
        if f.zeros == "minimum":
            weight = self.codes.float() * scales
            weight -= zeros
        else:
            weight = (self.codes.float() - zeros) * scales
        values, columns, rows = self.outliers
        if outliers and values is not None and columns is not None and rows is not None:
            row_of = torch.repeat_interleave(torch.arange(f.out_features), rows.diff().long())
            weight.index_put_((row_of, columns.long()), values.float(), accumulate=True)
        self._dense[outliers] = weight.double()
        return self._dense[outliers]


def random_weight(format: PackedFormat, seed: int = 0, *, power_of_two: bool = False) -> Weight:
    """Codes over their whole range; scales around 1/sqrt(K), or powers of two for exact arithmetic."""
    g = torch.Generator().manual_seed(seed)
    n, k = format.out_features, format.in_features
    codes = torch.randint(0, 1 << format.bits, (n, k), generator=g, dtype=torch.uint8)
    spec = format.tensors()
    shape, scale_dtype = spec["scales"]
    if power_of_two:
        scales = torch.exp2(torch.randint(-2, 3, shape, generator=g).float())
    else:
        scales = (torch.rand(shape, generator=g) + 0.5) / (1 << format.bits)
    zeros = None
    if format.zeros == "int":
        zeros = torch.randint(0, 1 << format.bits, shape, generator=g, dtype=torch.uint8)
        if format.packed_zeros:
            streams = [sum(zero << i * format.bits for i, zero in enumerate(row)) for row in zeros.tolist()]
            zeros = torch.tensor([list(stream.to_bytes(spec["zeros"][0][1], "little")) for stream in streams])
            zeros = zeros.to(torch.uint8)
    elif format.zeros == "float":
        zeros = torch.rand(shape, generator=g) * (1 << format.bits)
        zeros = (zeros.round() if power_of_two else zeros).to(scale_dtype)
    elif format.zeros == "minimum":
        zeros = scales.to(scale_dtype).float() * torch.rand(shape, generator=g) * (1 << format.bits)
        if power_of_two:
            zeros = scales * torch.randint(0, 1 << format.bits, shape, generator=g)
        zeros = zeros.to(scale_dtype)
    factors: dict[str, Tensor] = {}
    if format.scale_codes is not None:
        low = -32 if format.scale_codes == "int8" else 0
        codes_of_scales = torch.randint(low, 64, shape, generator=g)
        held, float_dtype = spec["scale_factors"]
        like = torch.exp2(torch.randint(-8, -4, held, generator=g).float())
        drawn = like if power_of_two else like * (1 + torch.rand(held, generator=g))
        if power_of_two:  # as many bits as the products of codes have room for
            codes_of_scales //= 8
        factors["scale_factors"] = drawn.to(float_dtype)
        scales, scale_dtype = codes_of_scales.float(), torch.uint8 if low == 0 else torch.int8
        if format.zeros == "minimum":
            factors["zero_factors"] = (drawn * (4 if power_of_two else 0.3 * (1 << format.bits))).to(float_dtype)
            zeros = torch.randint(0, 8 if power_of_two else 64, shape, generator=g, dtype=torch.uint8)
    values = columns = rows = None
    if format.outliers:
        flat = torch.randperm(n * k, generator=g)[: format.outliers].sort().values
        columns = (flat % k).to(spec["outlier_columns"][1])
        counts = torch.bincount(flat // k, minlength=n)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        values = torch.randint(-8, 9, flat.shape, generator=g).float()
        values = (values if power_of_two else values + torch.rand(flat.shape, generator=g)).to(
            spec["outlier_values"][1]
        )
    return Weight(
        format, codes, pack(codes, format.bits), scales.to(scale_dtype), zeros, (values, columns, rows),
        factors.get("scale_factors"), factors.get("zero_factors"),
    )  # fmt: skip


def byte_pairs(columns: Tensor) -> Tensor:
    """Columns of outliers as ``uint8 [nnz, 2]``, the low byte first."""
    return torch.stack([columns & 255, columns >> 8], 1).to(torch.uint8)


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hard_rows(k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of x whose elements differ much: what small ones add must not drown in what large ones leave."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(9, k, generator=g)
    uniform = torch.rand(9, k, generator=g)
    one = torch.arange(k) == k // 3
    rows = torch.stack(
        [
            normal[0],
            torch.where(one, 1e4, normal[1]),  # one large column, as models have
            torch.where(one, -300.0, normal[2]),
            torch.where(one, 1e-3, 1000 * normal[3] + 3000),  # one small element
            torch.where(one, 0.004, torch.full((k,), 0.3)),
            normal[4].sign() * torch.exp2(20 * uniform[4] - 13),  # few of one size
            normal[5].sign() * torch.exp2((34 if dtype == torch.float16 else 140) * uniform[5] - 24),
            torch.where(uniform[6] < 0.3, 1e-6 * normal[6], normal[6]) * 1e-2,
            torch.where(uniform[7] < 0.9, 0.0, normal[7]),
            torch.where(uniform[8] < 0.5, 1e-40, normal[8]),  # subnormal numbers
            torch.where(one, -0.0, 1e-30 * normal[8]),
        ]
    )  # fmt: skip
    return (rows / 64 if dtype == torch.float16 else rows).to(dtype)  # so that y is finite
