"""Triton kernels of stacks of experts against float64 arithmetic; planted mistakes; that nothing waits for the GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.backends.reference import quantize_activations
from lowbit.backends.triton import tuning
from lowbit.backends.triton.launch import collecting, run
from lowbit.backends.triton.tiles import tile
from lowbit.core.family import dtype_name
from lowbit.packed.format import PackedFormat
from lowbit.testing import codebook_cases, packed_cases
from lowbit.testing.gpu_configurations import FAMILIES, KINDS, RARE, WHERE, in_another_order, is_int8
from lowbit.testing.mistakes import Mistake, plant
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations
from lowbit.testing.where import call, on_device, running

experts: Any = pytest.importorskip("lowbit.backends.triton.experts")
COMPARED_ROWS = experts.COMPARED_ROWS

PACKED, CODEBOOK = "lowbit.packed.triton", "lowbit.codebook.triton"
EXPERTS, SUMS = "lowbit.backends.triton.experts", "lowbit.backends.triton.activations"
OPS = ("lowbit.packed.op", "lowbit.codebook.op")
pytestmark = [
    pytest.mark.recorded("lowbit.backends", PACKED, CODEBOOK, *OPS),
    pytest.mark.skipif(not WHERE, reason="the backend triton runs neither here nor in its interpreter"),
]

K = 256 + 44  # a tile of codes, and a part of a second; two groups of 128 and a part of a third
N = 39
# (E, T, r)
CALLS = ((4, 9, 2), (3, 21, 1), (8, 1, 4), (5, 7, 3), (1, 5, 1), (6, 17, 2), (2, 3, 5), (5, 0, 1))
CUTS = ((32, 16, 1), (64, 16, 2), (16, 32, 1), (32, 16, 2))  # blocks of N and M, parts of K
CONFIGS = tuple(tuning.Config(n, m, split=split) for n, m, split in CUTS)


def drawn_ids(num_experts: int, s: int, seed: int, *, negative: bool = False) -> Tensor:
    """Many rows of one expert, none of some, ids of experts that are elsewhere, and where asked negative ones."""
    g, dtype = torch.Generator().manual_seed(seed), (torch.int64, torch.int32)[seed % 2]
    ids = torch.randint(-2 if negative else 0, num_experts + 2, (s,), generator=g, dtype=dtype)
    return torch.where(torch.rand(s, generator=g) < 0.5, num_experts // 2, ids)


@dataclass(frozen=True)
class Case:
    family: str
    bits: int
    kind: torch.dtype
    turn: int

    def __str__(self) -> str:
        return f"{self.family}-{self.bits}-{dtype_name(self.kind)}"

    @property
    def call(self) -> tuple[int, int, int]:
        return CALLS[self.turn % len(CALLS)]

    @property
    def config(self) -> tuning.Config:
        return CONFIGS[self.turn // 2 % len(CONFIGS)]

    def weight(self) -> Any:
        kinds = dict(FAMILIES[self.family].weights)
        kinds.update(make for (family, _), make in RARE.items() if family == self.family)
        make = list(kinds.values())[self.turn % len(kinds)]
        return make(self.bits, self.call[0] * N, K, self.kind, self.turn)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, ids, bias"""
        num_experts, tokens, repeats = self.call
        dtype = torch.float16 if is_int8(self.kind) else self.kind
        bias = None if self.turn % 3 == 1 else activations(1, num_experts * N, dtype, self.turn + 1)[0]
        ids = drawn_ids(num_experts, tokens * repeats, self.turn, negative=self.turn % 5 == 0)
        return activations(tokens, K, dtype, self.turn), ids, bias

    def check(self) -> None:
        weight, (x, ids, bias) = self.weight(), self.inputs()
        x_scale = torch.tensor([0.03]) if is_int8(self.kind) and self.turn % 2 else None
        with running(WHERE[0]), tuning.using(self.config):
            y = product(self.family, weight, x, ids, self.call[0], bias, int8=is_int8(self.kind), x_scale=x_scale)
            if self.turn % 3 == 0:
                tiled = replace(weight, packed=tile(weight.packed, self.bits, K))
                with in_another_order():
                    z = product(
                        self.family, tiled, x, ids, self.call[0], bias, int8=is_int8(self.kind), x_scale=x_scale
                    )
                assert_bitwise_equal(z, y)
        met, dense = x, weight.dense()
        if is_int8(self.kind):  # [x as quantized | x as it is] @ [what it meets | outliers].T
            q, inverse = quantize_activations(x, x_scale)
            met = torch.cat([q.double() / inverse.double(), x.double()], 1)
            outliers = dense - weight.dense(outliers=False)
            dense = torch.cat([FAMILIES[self.family].quantized(weight), outliers], 1)
        assert_experts_close(y, met, ids, dense.view(self.call[0], N, -1), bias)


def product(
    family: str, weight: Any, x: Tensor, ids: Tensor, num_experts: int, bias: Tensor | None = None, **activation: Any
) -> Tensor:
    activation = {"x_scale": None, "int8": False, **({"x_group": 0} if family == "packed" else {}), **activation}
    op = getattr(torch.ops.lowbit, f"{family}_experts")
    return call(op, x, ids, **weight.arguments, num_experts=num_experts, bias=bias, **activation)


def assert_experts_close(y: Tensor, x: Tensor, ids: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """``y`` against float64 products of ``x [T, K]`` with ``dense [E, N, K]``."""
    assert y.shape == (len(ids), dense.shape[1])
    for e in ids.unique().tolist():
        rows = (ids == e).nonzero()[:, 0]
        if e < 0:
            assert bool(y[rows].isnan().all())
        elif e >= len(dense):
            assert not bool(y[rows].any())
        else:
            own = None if bias is None else bias.view(len(dense), -1)[e]
            assert_linear_close(y[rows], x[rows * len(x) // len(ids)], dense[e], own)


def cases() -> Iterator[Case]:
    """Every number of bits and every kind of activations; what is stored, calls and configurations take turns."""
    turn = 0
    for family in ("packed", "codebook"):
        for bits in FAMILIES[family].bits:
            for kind in KINDS:
                yield Case(family, bits, kind, turn)
                turn += 1
            turn += 1  # so that no kind of activations keeps to some of the turns


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_products(case: Case) -> None:
    case.check()


def test_activations_in_groups() -> None:
    weight = FAMILIES["packed"].weights["group 128, outliers"](4, 3 * N, K, torch.float16, 1)
    x, ids = activations(4, K, torch.float32), drawn_ids(3, 8, 1)
    with running(WHERE[0]), tuning.using(CONFIGS[0]):
        y = product("packed", weight, x, ids, 3, int8=True, x_group=64)
        whole = weight.linear(x, int8=True, x_group=64)
    for row, e in zip(y, ids.tolist(), strict=True):
        assert e < 3 or not row.any()
    rows = (ids < 3).nonzero()[:, 0]
    assert_bitwise_equal(y[rows], whole[rows // 2].view(-1, 3, N)[torch.arange(len(rows)), ids[rows].long()])


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_steps_of_the_experts_that_rows_meet_are_enough(scales: str) -> None:
    """int8 activations meet 16-bit weights, which are made at each call: of many experts for those that rows meet."""
    weight = FAMILIES["codebook"].weights[scales](3, 40 * 8, K, torch.int8, 1)
    x, ids = activations(12, K, torch.float16), torch.cat([torch.full((19,), 21), torch.tensor([39, 0, 40, 3, -1])])
    with tuning.using(CONFIGS[3]), collecting() as launches:
        importlib.import_module(CODEBOOK).experts(x, ids, *weight.operands, 40, None, None, True)
    assert [step.grid for step in launches if step.kernel.fn.__name__ == "codebook_steps_kernel"] == [(8, 24)]
    with running(WHERE[0]), tuning.using(CONFIGS[3]):
        y = product("codebook", weight, x, ids, 40, int8=True)
    q, inverse = quantize_activations(x, None)
    met = q.double() / inverse.double()
    assert_experts_close(y, met, ids, FAMILIES["codebook"].quantized(weight).view(40, 8, K), None)


def test_strides_do_not_matter() -> None:
    """Of ids, such as a column of what a router chose, and of x."""
    weight = FAMILIES["packed"].weights["group 128"](4, 3 * N, K, torch.float16, 1)
    ids, x = drawn_ids(3, 18, 2).view(9, 2)[:, 1], activations(K, 9, torch.float16).t()
    assert not ids.is_contiguous() and not x.is_contiguous()
    with running(WHERE[0]), tuning.using(CONFIGS[0]):
        y = product("packed", weight, x, ids, 3)
        assert_bitwise_equal(product("packed", weight, x.contiguous(), ids.contiguous(), 3), y)


@pytest.mark.parametrize("kind", KINDS, ids=dtype_name)
@pytest.mark.parametrize("family", ["packed", "codebook"])
def test_a_row_is_that_of_the_linear_of_its_expert(family: str, kind: torch.dtype) -> None:
    """Bit for bit, with the configuration of either."""
    scales = list(FAMILIES[family].weights)[KINDS.index(kind)]
    weight = FAMILIES[family].weights[scales](3, 4 * N, K, kind, 2)
    dtype = torch.float16 if is_int8(kind) else kind
    x, ids, bias = activations(9, K, dtype), drawn_ids(4, 18, 2).clamp(max=3), activations(1, 4 * N, dtype)[0]
    for config in CONFIGS[:2]:
        with running(WHERE[0]), tuning.using(config):
            y = product(family, weight, x, ids, 4, bias, int8=is_int8(kind))
            whole = weight.linear(x, bias, int8=is_int8(kind))
        assert_bitwise_equal(y, whole.view(9, 4, N)[torch.arange(18) // 2, ids.long()])


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("family", ["packed", "codebook"])
def test_integers_are_exact(family: str, split: int) -> None:
    if family == "packed":
        form = PackedFormat(4, 3 * N, K, 64, "group", "int", "float32", outliers=50, outlier_dtype="float32")
        weight: Any = packed_cases.random_weight(form, split, power_of_two=True)
    else:
        kind = codebook_cases.Kind(4, 3 * N, K, 64, "row", "float", outliers=50)
        weight = codebook_cases.random_weight(kind, split, integers=True)
    x = torch.randint(-8, 9, (7, K), generator=torch.Generator().manual_seed(split)).float()
    ids, bias = drawn_ids(3, 14, split), torch.arange(3 * N).float()
    with running(WHERE[0]), tuning.using(tuning.Config(32, 16, split=split)):
        y = product(family, weight, x, ids, 3, bias)
    for i, e in enumerate(ids.tolist()):
        own = slice(e * N, (e + 1) * N)
        exact = weight.dense()[own] @ x[i // 2].double() + bias[own] if e < 3 else torch.zeros(N).double()
        assert_bitwise_equal(y[i].double(), exact)


@pytest.mark.parametrize(("family", "kind"), [("packed", torch.float16), ("codebook", torch.bfloat16)], ids=str)
def test_a_row_alone_is_the_row_of_a_batch(family: str, kind: torch.dtype) -> None:
    """Whatever the others are, and whoever their experts are."""
    weight = next(iter(FAMILIES[family].weights.values()))(4, 2 * 23, 4 * 256 + 44, kind, 1)
    x, ids = activations(50, 4 * 256 + 44, kind), drawn_ids(2, 50, 1)
    with running(WHERE[0]), lowbit.batch_invariant():
        y = product(family, weight, x, ids, 2)
        for row in (0, 31, 49):
            assert_bitwise_equal(product(family, weight, x[row : row + 1], ids[row : row + 1], 2), y[row : row + 1])


def test_shipped_configurations() -> None:
    """By the table, for few rows and for many: a stack has rows of its own there, none of them dense."""
    weight = FAMILIES["packed"].weights["group 128"](4, 2 * 70, K, torch.float16, 1)
    for tokens in (1, 40):
        x, ids = activations(tokens, K, torch.float16), drawn_ids(2, 2 * tokens, 0)
        with running(WHERE[0]), tuning.asking() as asked:
            y = product("packed", weight, x, ids, 2)
        met = min(2, 2 * tokens)
        assert [(q.kernel, q.m, q.n, q.k, q.experts) for q in asked] == [("packed_experts", tokens, 70, K, met)]
        assert_experts_close(y, x, ids, weight.dense().view(2, 70, K), None)


def test_an_experts_layer_holds_tiles_for_these_kernels() -> None:
    layer = lowbit.PackedExperts.from_float(torch.randn(3, 8, 64), lowbit.Packed(), torch.randn(3, 8))
    x, ids = torch.randn(4, 64), torch.tensor([0, 2, 1, 3, 2, 2, 0, 1])
    with running(WHERE[0]), torch.no_grad():
        y = call(torch.ops.lowbit.packed_experts, *layer.arguments(x, ids, layer.bias))
    assert_experts_close(y, x, ids, layer.dequantize(torch.float64), layer.bias.detach())


# --------------------------------------------------------------------------------------------------- tiles of rows


def as_lists(rows: Any, n: int, block_m: int) -> list[tuple[int, int, list[int]]]:
    """(expert, what it gets, its rows) of every tile that has rows, by its place."""
    found = []
    order = rows.order.tolist()
    for first_row, begin, end, what in sorted(rows.tiles.tolist(), key=lambda tile: tile[1]):
        if what != experts.NOTHING:
            found.append((first_row // n, what, order[begin : min(end, begin + block_m)]))
    return found


def expected_tiles(ids: Tensor, num_experts: int, block_m: int) -> list[tuple[int, int, list[int]]]:
    groups = [(e, experts.PRODUCTS, [i for i, id in enumerate(ids.tolist()) if id == e]) for e in range(num_experts)]
    groups += [(num_experts - 1, experts.ZEROS, [i for i, id in enumerate(ids.tolist()) if id >= num_experts])]
    groups += [(num_experts - 1, experts.NANS, [i for i, id in enumerate(ids.tolist()) if id < 0])]
    return [(e, what, some[i : i + block_m]) for e, what, some in groups for i in range(0, len(some), block_m)]


def check_tiles(module: Any, ids: Tensor, num_experts: int, block_m: int) -> None:
    expected, there = expected_tiles(ids, num_experts, block_m), on_device(ids)
    launches, rows = module.sorted_rows(there, len(ids), 10, num_experts, block_m)
    run(launches)
    order, tiles = module._sorted_by_torch(there, 10, num_experts, block_m)
    assert as_lists(rows, 10, block_m) == expected
    assert as_lists(replace(rows, order=order, tiles=tiles), 10, block_m) == expected
    assert len(tiles) <= min(len(ids), len(ids) // block_m + num_experts + 2)


SIZES = [(1, 1), (1, 40), (3, 2), (4, 150), (20, 7), (20, 77), (2, 32), (7, 129)]


@pytest.mark.parametrize(("num_experts", "s"), SIZES)
def test_tiles_of_rows(num_experts: int, s: int) -> None:
    """By either way, every row is in one tile, of its expert, with the rows that stand before it."""
    with running(WHERE[0]):
        for seed in range(2):
            check_tiles(experts, drawn_ids(num_experts, s, seed, negative=seed == 1), num_experts, 16)
        check_tiles(experts, torch.full((s,), num_experts - 1), num_experts, 32)


def test_many_rows_are_sorted_by_torch() -> None:
    weight = FAMILIES["packed"].weights["per row"](2, 2 * 8, 40, torch.float32, 1)
    x, ids = activations(COMPARED_ROWS + 9, 40, torch.float32), drawn_ids(2, COMPARED_ROWS + 9, 1, negative=True)
    with running(WHERE[0]), tuning.using(tuning.Config(16, 128)):
        y = product("packed", weight, x, ids, 2)
    assert_experts_close(y, x, ids, weight.dense().view(2, 8, 40), None)


@pytest.mark.parametrize("tokens", [3, COMPARED_ROWS])
@pytest.mark.parametrize("family", ["packed", "codebook"])
def test_nothing_is_looked_at_on_the_host(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call plans its launches without knowing a value: a tensor on the device meta has none."""
    weight = next(iter(FAMILIES[family].weights.values()))(4, 3 * N, K, torch.float16, 1)
    arguments = {name: a.to("meta") if isinstance(a, Tensor) else a for name, a in weight.arguments.items()}
    arguments["packed"] = tile(weight.packed, 4, K).to("meta")
    arguments["layout"] = 1
    activation = [None, True, 0] if family == "packed" else [None, True]
    x = torch.empty(tokens, K, dtype=torch.float16, device="meta")
    ids = torch.zeros(2 * tokens, dtype=torch.int64, device="meta")
    bias = torch.empty(3 * N, device="meta")
    module = importlib.import_module(f"lowbit.{family}.triton")
    with collecting() as launches:
        y = module.experts(x, ids, *arguments.values(), 3, bias, *activation)
    assert y.shape == (2 * tokens, N) and launches


# ------------------------------------------------------------------------------------------------- planted mistakes


def of(family: str, *, split: bool | None = None, kind: torch.dtype | None = None) -> Any:
    """Cases with a bias, of several experts, whose rows share rows of x."""

    def spoils(case: Case) -> bool:
        ours = case.family == family and case.turn % 3 != 1 and min(case.call) > 1
        return ours and split in (None, case.config.split > 1) and kind in (None, case.kind)

    return spoils


def no_case(case: Case) -> bool:
    """What spoils the tiles of rows alone is noticed there."""
    return False


# fmt: off
MISTAKES = {
    "the weight of the first expert": Mistake(
        PACKED, "n + first_row, n_row + first_row", "n, n_row", of("packed")
    ),
    "the table of the first expert": Mistake(
        CODEBOOK, "n + first_row, n_row + first_row", "n, n_row", of("codebook")
    ),
    "rows of y in the sorted order": Mistake(
        EXPERTS, "row = tl.load(order_ptr + tl.maximum(tl.minimum(place, end - 1), 0))",
        "row = tl.maximum(tl.minimum(place, end - 1), 0)", of("packed"),
    ),
    "something where there should be zeros": Mistake(EXPERTS, 'float("nan"), 0.0)', 'float("nan"), 1.0)', of("packed")),
    "a bias where there should be zeros": Mistake(
        CODEBOOK, "        sums = of_what(sums, what)\n", "        pass\n", of("codebook", split=False)
    ),
    "a negative id taken for one that is elsewhere": Mistake(
        EXPERTS, "tl.where(expert < 0, EXPERTS + 1,", "tl.where(expert < 0, EXPERTS,", no_case
    ),
    "a tile that begins a row late": Mistake(EXPERTS, "store(tile + 1, place,", "store(tile + 1, place + 1,", no_case),
    "a tile of a row more": Mistake(EXPERTS, "smaller + same, mask", "smaller + same + 1, mask", no_case),
    "no tile but the first of an expert": Mistake(EXPERTS, "(before % BLOCK_M == 0)", "(before == 0)", no_case),
    "rows of an expert in another order": Mistake(EXPERTS, "(j[None, :] < i[:, None])", "(j > i[:, None])", no_case),
    "tiles by torch that begin late": Mistake(EXPERTS, "(number - before[group])", "(number - group)", no_case),
    "the bias of the first expert": Mistake(
        PACKED, "tl.load(bias_ptr + n_row)", "tl.load(bias_ptr + n_row - first_row)", of("packed", split=False)
    ),
    "the bias of the first expert, to parts": Mistake(
        SUMS, "bias_ptr + expert * n_size + n", "bias_ptr + n", of("packed", split=True)
    ),
    "the step of the first expert": Mistake(
        CODEBOOK, "n, n_row = n + expert * n_size, n_row + expert * n_size", "n, n_row = n, n_row",
        of("codebook", split=True, kind=torch.int8),
    ),
    "for each row of y a row of x of its own": Mistake(
        PACKED, "row // repeats, n + first_row", "tl.minimum(row, m_size // repeats - 1), n + first_row", of("packed")
    ),
}
# fmt: on


def check_spoiled(mistake: Mistake, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What a mistake spoils: a case, or the tiles of rows."""
    case = next((case for case in cases() if mistake.spoils(case)), None)
    if case is not None:
        plant(mistake, [SUMS, f"lowbit.{case.family}.triton"], monkeypatch, folder)
        case.check()
        return
    plant(mistake, [], monkeypatch, folder)
    with running(WHERE[0]):
        for num_experts, s in SIZES:
            check_tiles(importlib.import_module(EXPERTS), drawn_ids(num_experts, s, 1, negative=True), num_experts, 16)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_planted_mistake_is_noticed(mistake: Mistake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_spoiled(mistake, monkeypatch, tmp_path)
