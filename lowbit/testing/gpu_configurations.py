"""The cases of Triton's configurations: every one that ships, to be compared with float64 arithmetic.

Families of packed codes: each row of ``lowbit/backends/triton/tuned.json``. A case forces one, its blocks and its split
of K, on a weight of several tiles of K and several blocks of N, and of M where that is cheap, none of them filled. In
Triton's interpreter the rows of an H200 run at every number of bits and with every kind of activations; what other
targets cut in another way runs at one number of bits. On a GPU, its own rows run.

Family ``kron`` has no table: what its planner does for one row of x and for many, each way through its kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.backends.reference import quantize_activations
from lowbit.backends.triton import tuning
from lowbit.backends.triton.launch import TARGETS, Target, target_of
from lowbit.backends.triton.tiles import tile
from lowbit.core.family import dtype_name
from lowbit.packed.format import PackedFormat
from lowbit.testing import codebook_cases, kron_cases
from lowbit.testing import packed_cases as cases
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations
from lowbit.testing.where import everywhere, running

WHERE = [where for where in everywhere() if where.backend == "triton"]
K = 2 * 256 + 44  # two tiles and a part of a third; four groups of 128 and a part of a fifth
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.int8)  # of activations
LARGE = 4096  # rows and columns of the weight that a configuration is chosen for
DENSE = "dense"


def is_int8(kind: torch.dtype) -> bool:
    """Whether activations, float16 as they come, are quantized to int8."""
    return kind == torch.int8


# ------------------------------------------------------------------------------------------------------ the families


@dataclass(frozen=True)
class Family:
    """What differs between the families of packed codes.

    Args:
        kernel: its name in ``tuned.json``.
        weights: by the name of a kind of scales, (bits, n, k, kind of activations, seed) -> a random weight.
        quantized: weight -> what quantized activations meet, float64 ``[N, K]``.
    """

    kernel: str
    bits: Sequence[int]
    weights: dict[str, Callable[[int, int, int, torch.dtype, int], Any]]
    quantized: Callable[[Any], Tensor]


def packed(group_size: int | None = None, zeros: str = "none", outliers: int = 0) -> Callable[..., cases.Weight]:
    def weight(bits: int, n: int, k: int, kind: torch.dtype, seed: int) -> cases.Weight:
        granularity = "row" if group_size is None else "group"
        scale_dtype = ("float16", "bfloat16", "float32")[seed % 3]
        form = PackedFormat(bits, n, k, group_size or k, granularity, zeros, scale_dtype, outliers, "float16")  # type: ignore[arg-type]
        return cases.random_weight(form, seed)

    return weight


def codebook(
    tables: str, scales: str = "none", group_size: int | None = None, outliers: int = 0
) -> Callable[..., codebook_cases.Weight]:
    def weight(bits: int, n: int, k: int, kind: torch.dtype, seed: int) -> codebook_cases.Weight:
        entries = torch.float16 if is_int8(kind) else kind  # others are rounded to x's dtype
        scale_dtype = cases.DTYPES[seed % 3]
        form = codebook_cases.Kind(bits, n, k, group_size or k, tables, scales, entries, scale_dtype, outliers)
        return codebook_cases.random_weight(form, seed)

    return weight


def fixed_point(weight: codebook_cases.Weight) -> Tensor:
    integers, step = weight.fixed_point()
    return integers * step.double()


FAMILIES = {
    "packed": Family(
        "packed_linear",
        range(2, 9),
        {
            "per row": packed(),
            "group 128": packed(128, "int"),
            "per row, float zeros": packed(zeros="float"),
            "group 128, float zeros": packed(128, "float"),
            "per row, zeros": packed(zeros="int"),
            "group 128, outliers": packed(128, outliers=200),
        },
        lambda weight: weight.dense(outliers=False),
    ),
    "codebook": Family(
        "codebook_linear",
        range(1, 9),
        {
            "row": codebook("row"),
            "tensor": codebook("tensor", "float", 128),
            "row, scales per row": codebook("row", "float"),
            "group": codebook("group", group_size=128),
            "row, outliers": codebook("row", outliers=200),
            "nested": codebook("tensor", "nested", 64),
        },
        fixed_point,
    ),
}
# a row of tuned.json of its own, for what is rare: (family, kernel) -> name of the scales and weight
RARE = {
    ("packed", "packed_linear_odd_groups"): ("group 20", packed(20, "int")),
    ("codebook", "codebook_linear_odd_groups"): ("group 20", codebook("tensor", "float", 20)),
}


def families() -> list[str]:
    """Those of packed codes that have Triton kernels."""
    return [name for name in FAMILIES if has_kernels(name)]


def has_kernels(family: str) -> bool:
    return importlib.util.find_spec(f"lowbit.{family}.triton") is not None


# --------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A configuration of a family, and what it runs on.

    Args:
        kind: of the activations; int8: quantized from float16.
        regime: the largest M that it is for, or ``"dense"``.
        target: the GPU that it is for.
        m: rows of the activations.
    """

    family: str
    bits: int
    kind: torch.dtype
    regime: int | str
    target: str
    m: int
    seed: int

    def __str__(self) -> str:
        return f"{self.family}-{self.bits}-{dtype_name(self.kind)}-{self.regime}-{self.target}"

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of y."""
        return torch.float16 if is_int8(self.kind) else self.kind

    def activations(self, k: int) -> Tensor:
        return activations(self.m, k, self.dtype, self.seed)

    def bias(self, n: int) -> Tensor | None:
        return None if self.seed % 3 == 1 else activations(1, n, self.dtype, self.seed + 1)[0]

    def check(self) -> None:
        """The result against its definition, and, run again, against itself."""
        raise NotImplementedError


def rows(target: Target, kernel: str, kind: torch.dtype, bits: int) -> Iterator[tuple[int | str, tuning.Config]]:
    """(regime, configuration) of every row of ``tuned.json`` that products of large weights take."""
    for m in tuning.regimes(target, kernel, kind, bits):
        config = tuning.choose(target, kernel, kind, bits, m, LARGE, LARGE)
        yield DENSE if config.dense else m, config


@dataclass(frozen=True)
class RowOfTable(Case):
    """A row of ``tuned.json``.

    Args:
        n: rows of the weight.
        scales: which of the family's weights.
        again: what is run a second time and must give the same bits: ``"tiles"``, ``"order"`` or nothing.
    """

    kernel: str
    config: tuning.Config
    n: int
    scales: str
    again: str

    def weight(self) -> Any:
        rare = RARE.get((self.family, self.kernel))
        make = rare[1] if rare else FAMILIES[self.family].weights[self.scales]
        return make(self.bits, self.n, K, self.kind, self.seed)

    def run(self, weight: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        with running(WHERE[0]), tuning.using(self.config):
            result: Tensor = weight.linear(x, bias, int8=is_int8(self.kind))
        return result

    def check(self) -> None:
        weight, x, bias = self.weight(), self.activations(K), self.bias(self.n)
        y = self.run(weight, x, bias)
        assert y.dtype == x.dtype and y.shape == (self.m, self.n)
        if self.config.dense:
            dense = weight.dense().float().to(x.dtype)
            assert_bitwise_equal(y, F.linear(x, dense, bias))
            assert_linear_close(y, x, dense, bias)
        elif is_int8(self.kind):
            q, inverse = quantize_activations(x, None)
            # [x as quantized | x as it is] @ [what it meets | outliers].T
            outliers = weight.dense() - weight.dense(outliers=False)
            both = torch.cat([q.double() / inverse.double(), x.double()], 1)
            assert_linear_close(y, both, torch.cat([FAMILIES[self.family].quantized(weight), outliers], 1), bias)
        else:
            assert_linear_close(y, x, weight.dense(), bias)
        if self.again == "tiles":
            tiled = replace(weight, packed=tile(weight.packed, self.bits, K))
            assert_bitwise_equal(self.run(tiled, x, bias), y)
        elif self.again == "order":
            with in_another_order():
                assert_bitwise_equal(self.run(weight, x, bias), y)


def in_another_order() -> Any:
    """Programs run in another order, where there is one."""
    interpreter = sys.modules.get("lowbit.testing.interpreter")
    return nullcontext() if interpreter is None else interpreter.checks(shuffle=1)


def rows_of_tables(targets: Sequence[Target]) -> Iterator[RowOfTable]:
    """What the numbers of bits share is dealt out among them in turn: kinds of scales, rows of x, second runs."""
    for family in families():
        for j, kind in enumerate(KINDS):
            yield from _rows(targets, family, FAMILIES[family].kernel, list(FAMILIES[family].weights), kind, j)
            for (of, kernel), (name, _) in RARE.items():
                if of == family:
                    yield from _rows(targets, family, kernel, [name], kind, j)


def _rows(
    targets: Sequence[Target], family: str, kernel: str, scales: list[str], kind: torch.dtype, j: int
) -> Iterator[RowOfTable]:
    bits_of, (first, *others) = FAMILIES[family].bits, targets
    seen = set()
    for i, bits in enumerate(bits_of):
        if len(scales) == 1 and i % len(KINDS) != j:
            continue
        for r, (regime, config) in enumerate(rows(first, kernel, kind, bits)):
            seen.add(cut(config))
            yield _row(family, bits, kind, regime, first, 2 * i + j + r, kernel, config, scales)
    for t, target in enumerate(others):
        start = (2 * t + j) % len(bits_of)
        for bits in (*bits_of[start:], *bits_of[:start]):
            for r, (regime, config) in enumerate(rows(target, kernel, kind, bits)):
                if cut(config) in seen:
                    continue
                seen.add(cut(config))
                yield _row(family, bits, kind, regime, target, t + j + r, kernel, config, scales)


def cut(config: tuning.Config) -> tuple[int, int, int]:
    """What decides how numbers are added; warps and stages do not."""
    return config.block_n, config.block_m, config.split


def _row(
    family: str, bits: int, kind: torch.dtype, regime: int | str, target: Target, turn: int, kernel: str,
    config: tuning.Config, scales: list[str],
) -> RowOfTable:  # fmt: skip
    if config.dense:
        m, n = 5, 39
    else:  # a second block of M costs as many programs again as there are parts of K
        several = config.split == 1 or turn % 4 == 0
        m, n = config.block_m + 3 if several else min(config.block_m, 19) - turn % 3, config.block_n + 7
    again = ("tiles", "order", "")[turn % 3]
    return RowOfTable(
        family, bits, kind, regime, target.name, m, turn, kernel, config, n, scales[turn % len(scales)], again
    )


# ------------------------------------------------------------------------------------------------------ family kron


@dataclass(frozen=True)
class Way:
    """A way through the kernels.

    Args:
        kernel: that of its last launch.
        shape: rank, n1, k1, n2, k2 of a weight that takes it.
        many: rows of x that are cut like a large number of them.
        only_narrow: whether it takes factors of 16 bits.
    """

    kernel: str
    shape: tuple[int, int, int, int, int]
    many: int
    only_narrow: bool = False


KRON_BITS = (0, *cases.BITS)  # of the factors; 0: they are dense
KRON_REGIMES = (1, LARGE)
WAYS = {
    "resident": Way("kron_resident_kernel", (1, 37, 40, 35, 44), 19, only_narrow=True),
    "a matrix product of each row": Way("kron_fused_kernel", (2, 21, 20, 37, 18), 5, only_narrow=True),
    "a sum": Way("kron_summed_kernel", (1, 2, 1, 70, 150), 19),
    "two launches": Way("kron_product_kernel", (2, 131, 9, 133, 10), 3),
}


@dataclass(frozen=True)
class KronPlan(Case):
    """What the planner does for one row of x, or for so many that they give every processor work."""

    way: str

    def weight(self) -> kron_cases.Weight:
        kinds = {0: kron_cases.Kind(self.kind)}
        if self.bits:
            group_size, zeros = (None, 7, 32)[self.seed % 3], ("none", "int", "float")[self.seed // 3 % 3]
            kinds[self.bits] = kron_cases.Kind(self.kind, self.bits, group_size, False, zeros)
        a, b = kinds[self.bits], kinds[self.bits if self.seed % 2 else 0]
        weight = kron_cases.random_weight(WAYS[self.way].shape, a, b, self.seed)
        return weight.permuted(self.seed) if self.seed % 4 == 3 else weight

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Plans are for the case's target, which, where there are many rows, seems to have one processor."""
        planner: Any = importlib.import_module("lowbit.kron.triton")
        before = planner.target_of
        on_gpu = WHERE[0].device == "cuda"
        target = target_of(torch.device("cuda")) if on_gpu else replace(TARGETS[self.target], inline_ptx=False)
        if self.regime == LARGE:
            target = replace(target, processors=1)
        try:
            planner.target_of = lambda device: target
            with running(WHERE[0]):
                yield
        finally:
            planner.target_of = before

    def check(self) -> None:
        weight = self.weight()
        x, bias = self.activations(weight.k), self.bias(weight.n)
        with self.planning():
            y = weight.linear(x, bias)
            assert y.dtype == x.dtype and y.shape == (self.m, weight.n)
            weight.assert_close(y, x, bias)
            if self.seed % 3 == 0:
                with in_another_order():
                    assert_bitwise_equal(weight.linear(x, bias), y)


def kron_plans(targets: Sequence[Target]) -> Iterator[KronPlan]:
    """Every way for dense factors; for packed ones, whose kind of activations and number of bits take turns."""
    if not has_kernels("kron"):
        return
    first, *others = (target.name for target in targets)
    for i, bits in enumerate(KRON_BITS):
        for j, kind in enumerate(cases.DTYPES):
            narrow = bits == 0 and kind != torch.float32
            ways = [name for name, way in WAYS.items() if narrow or not way.only_narrow]
            for r, regime in enumerate(KRON_REGIMES):
                for w, way in enumerate(ways):
                    if bits == 0 or (i + j + r) % 2 == w:
                        yield _kron_plan(bits, kind, regime, first, i + j + r + w, way)
    for t, target in enumerate(others):
        for r, regime in enumerate(KRON_REGIMES):
            way = list(WAYS)[(t + r) % len(WAYS)]
            yield _kron_plan(0, (torch.float16, torch.bfloat16)[t % 2], regime, target, t + r, way)


def _kron_plan(bits: int, kind: torch.dtype, regime: int, target: str, turn: int, way: str) -> KronPlan:
    return KronPlan("kron", bits, kind, regime, target, 1 if regime == 1 else WAYS[way].many, turn, way)


@cache
def configurations(*targets: Target) -> list[Case]:
    """Every case; all rows of the first target, and what others do in another way."""
    return [*rows_of_tables(targets), *kron_plans(targets)]


# in Triton's interpreter
PLANNED = (TARGETS["sm_90"], *(target for name, target in TARGETS.items() if name != "sm_90"))


def here() -> tuple[Target, ...]:
    """Whose configurations run here."""
    return (target_of(torch.device("cuda")),) if WHERE and WHERE[0].device == "cuda" else PLANNED
