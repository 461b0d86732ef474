"""Cases of family ``codebook``: every kind of weight × shapes; backends and ISAs are in :mod:`lowbit.testing.where`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import layouts
from lowbit.codebook.gradient import with_mean_gradient
from lowbit.codebook.operands import CodebookOperands
from lowbit.core.bitpack import pack
from lowbit.testing.packed_cases import DTYPES
from lowbit.testing.packed_cases import SHAPES as PACKED_SHAPES
from lowbit.testing.where import call

BITS = tuple(range(1, 9))
SHAPES = (*PACKED_SHAPES, (40, 104, 7))  # and one whose nested scales take three blocks of 256

Optional3 = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Kind:
    """One kind of weight: ``tables`` and ``scales`` say what is stored at which granularity."""

    bits: int
    n: int
    k: int
    group_size: int
    tables: str = "tensor"  # "tensor", "row" or "group"
    scales: str = "none"  # "none", "float" or "nested"
    dtype: torch.dtype = torch.float32  # of the tables
    scale_dtype: torch.dtype = torch.float32
    outliers: int = 0

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    def __str__(self) -> str:
        return f"{self.bits}-bit, table per {self.tables}, {self.scales} scales"


def kinds(bits: int, n: int, k: int, group_size: int | None) -> Iterator[Kind]:
    """Every granularity × kind of scales of a weight of this shape; dtypes and outliers in rotation."""
    tables_of = ("tensor", "row") if group_size is None else ("tensor", "row", "group")
    pairs = [(tables, scales) for tables in tables_of for scales in ("none", "float", "nested")]
    for i, (tables, scales) in enumerate(pairs):
        turn = bits + i + n
        yield Kind(
            bits, n, k, k if group_size is None else group_size, tables, scales, DTYPES[turn % 3],
            DTYPES[(turn // 2) % 3], max(1, n * k // 50) if (turn + k) % 2 else 0,
        )  # fmt: skip


@dataclass
class Weight:
    """Random tensors of a kind, in the order in which the ops take them."""

    kind: Kind
    codes: Tensor
    packed: Tensor
    codebook: Tensor
    scales: Tensor | None
    nested: Optional3
    outliers: Optional3
    _dense: dict[bool, Tensor] = field(default_factory=dict)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        int8: bool = False,
        x_scale: Tensor | None = None,
        mean_gradient: bool = False,
    ) -> Tensor:
        arguments = self.arguments
        if mean_gradient:
            arguments["codebook"] = with_mean_gradient(CodebookOperands(**arguments), self.kind.k).codebook
        activation = dict(x_scale=x_scale, int8=int8)
        return call(torch.ops.lowbit.codebook_linear, x, **arguments, bias=bias, **activation)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return call(torch.ops.lowbit.codebook_dequantize, **self.arguments, in_features=self.kind.k, dtype=dtype)

    def embedding(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return call(torch.ops.lowbit.codebook_embedding, ids, **self.arguments, in_features=self.kind.k, dtype=dtype)

    @property
    def operands(self) -> CodebookOperands:
        """:attr:`arguments` in one."""
        return CodebookOperands(**self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """The weight's part of the ops' arguments, by name; ``packed`` may have been put into another layout."""
        kind, (values, columns, rows) = self.kind, self.outliers
        layout = layouts.fitting(self.packed, kind.k, kind.bits)
        nested = zip(("scale_codebook", "scale_absmax", "scale_offset"), self.nested, strict=True)
        return dict(
            packed=self.packed, outlier_values=values, outlier_columns=columns, outlier_rows=rows,
            codebook=self.codebook, scales=self.scales, **dict(nested), bits=kind.bits, group_size=kind.group_size,
            layout=0 if layout is None else layout.number,
        )  # fmt: skip

    def scale(self) -> Tensor | None:
        """The float32 scales ``[N, G]``, by the format's definition."""
        codebook, absmax, offset = self.nested
        if self.scales is None or codebook is None or absmax is None or offset is None:
            return None if self.scales is None else self.scales.float()
        block = torch.arange(self.scales.numel()) // 256
        return (codebook[self.scales.flatten().long()] * absmax[block] + offset[0]).view(self.scales.shape)

    def dense(self, outliers: bool = True) -> Tensor:
        """The float64 holding of the weight by the format's definition, written independently of the package."""
        if outliers in self._dense:
            return self._dense[outliers]
        kind = self.kind
        group = torch.tensor([k // kind.group_size for k in range(kind.k)])
        row = torch.arange(kind.n)[:, None]
        tables = self.codebook.float().expand(kind.n, kind.groups, -1)
        weight = tables[row, group, self.codes.long()]
        scale = self.scale()
        if scale is not None:
            weight = weight * scale[row, group]
        values, columns, rows = self.outliers
        if outliers and values is not None and columns is not None and rows is not None:
            row_of = torch.repeat_interleave(torch.arange(kind.n), rows.diff().long())
            weight.index_put_((row_of, columns.long()), values.float(), accumulate=True)
        self._dense[outliers] = weight.double()
        return self._dense[outliers]

    def fixed_point(self) -> tuple[Tensor, Tensor]:
        """What int8 activations meet: integers in -32767..32767 as float64, and the float32 step ``[N, 1]``."""
        peak = self.codebook.float().abs().amax((1, 2)).expand(self.kind.n)
        scale = self.scale()
        if scale is not None:
            peak = scale.abs().amax(1) * peak
        step = peak / 32767
        step = torch.where(step < torch.finfo(torch.float32).tiny, torch.ones(()), step)[:, None]
        weight = self.dense(outliers=False).float()
        return (weight * (1 / step)).round().clamp(-32767, 32767).double(), step


def random_weight(kind: Kind, seed: int = 0, *, integers: bool = False) -> Weight:
    """Codes over their whole range; entries around 1 and scales around 1/sqrt(K), or integers and powers of two."""
    g = torch.Generator().manual_seed(seed)
    n, k, groups = kind.n, kind.k, kind.groups
    codes = torch.randint(0, 1 << kind.bits, (n, k), generator=g, dtype=torch.uint8)
    shape = {"tensor": (1, 1), "row": (n, 1), "group": (n, groups)}[kind.tables] + (1 << kind.bits,)
    if integers:
        codebook = torch.randint(-9, 10, shape, generator=g).float()
    else:
        codebook = torch.randn(shape, generator=g)
    scales: Tensor | None = None
    nested: Optional3 = (None, None, None)
    if kind.scales == "float":
        scales = (torch.rand((n, groups), generator=g) + 0.5) / k**0.5
        if integers:
            scales = torch.exp2(torch.randint(-2, 3, (n, groups), generator=g).float())
        scales = scales.to(kind.scale_dtype)
    elif kind.scales == "nested":
        scales = torch.randint(0, 256, (n, groups), generator=g, dtype=torch.uint8)
        blocks = -(-n * groups // 256)
        if integers:
            nested = (
                torch.randint(-2, 3, (256,), generator=g).float(),
                torch.exp2(torch.randint(-1, 2, (blocks,), generator=g).float()),
                torch.tensor([3.0]),
            )
        else:
            nested = (
                torch.rand(256, generator=g) - 0.5, torch.rand(blocks, generator=g) / k**0.5, torch.tensor([0.7]),
            )  # fmt: skip
    outliers: Optional3 = (None, None, None)
    if kind.outliers:
        flat = torch.randperm(n * k, generator=g)[: kind.outliers].sort().values
        columns = (flat % k).to(torch.int16 if seed % 2 else torch.int32)
        counts = torch.bincount(flat // k, minlength=n)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        values = torch.randint(-8, 9, flat.shape, generator=g).float()
        values = values if integers else values + torch.rand(flat.shape, generator=g)
        outliers = (values.to(DTYPES[seed % 3]), columns, rows)
    return Weight(kind, codes, pack(codes, kind.bits), codebook.to(kind.dtype), scales, nested, outliers)


def random_bias(i: int, n: int) -> Tensor | None:
    """The bias of case ``i``: none for every third, else of each dtype in turn."""
    return None if i % 3 == 0 else torch.randn(n, generator=torch.Generator().manual_seed(i)).to(DTYPES[i // 3 % 3])
