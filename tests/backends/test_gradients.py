"""Gradients of a weight's tensors out of ranges of rows and at the places of outliers, on every ISA, against float64.

Also what the sanitizer build runs, so nothing here compiles or needs more than torch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.backends import gradients
from lowbit.backends.cpu import blocks
from lowbit.backends.layouts import by_group
from lowbit.backends.operands import CodedOperands
from lowbit.core.bitpack import pack
from lowbit.testing import codebook_cases, packed_cases
from lowbit.testing.numerics import OUTPUT_ROUNDING, U
from lowbit.testing.packed_cases import DTYPES, activations
from lowbit.testing.where import Where, everywhere, running

ROWS = (1, 130, 17, 300, 128)  # of x: kernels take 128 together
WHERE = [where for where in everywhere(interpreter=False) if where.backend in ("cpu", "reference")]


@pytest.fixture(params=WHERE, ids=str)
def where(request):
    with running(request.param):
        yield request.param


@pytest.fixture
def ran(monkeypatch):
    """How often each compiled kernel ran; D as a whole is an error."""
    calls: Counter[str] = Counter()
    compiled = gradients.compiled

    def counted(op: str, t: Tensor) -> Any:
        kernel = compiled(op, t)
        return kernel and (lambda *args: (calls.update([op]), kernel(*args))[1])

    def whole(*_: Any) -> None:
        raise AssertionError("D was made as a whole")

    monkeypatch.setattr(gradients, "compiled", counted)
    monkeypatch.setattr(CodedOperands, "dense_gradients", whole)
    return calls


def spread(values: Tensor, per: int, count: int) -> Tensor:
    """Of groups of ``per``, one for each of ``count`` columns."""
    return values[:, torch.arange(count) // per]


def outlier_part(a: dict[str, Any], n: int, k: int) -> Tensor | float:
    if a["outlier_values"] is None:
        return 0.0
    at = torch.repeat_interleave(torch.arange(n), a["outlier_rows"].diff().long()), a["outlier_columns"].long()
    return a["outlier_values"].new_zeros(n, k).index_put(at, a["outlier_values"], accumulate=True)


def dense_codebook(a: dict[str, Any], codes: Tensor) -> Tensor:
    n, k = codes.shape
    table = torch.arange(k) // a["group_size"] if a["codebook"].shape[1] > 1 else torch.zeros(k, dtype=torch.int64)
    row = torch.arange(n)[:, None] if a["codebook"].shape[0] > 1 else torch.zeros(n, 1, dtype=torch.int64)
    weight, scales = a["codebook"][row, table, codes.long()], a["scales"]
    if a["scale_codebook"] is not None:
        block = torch.arange(scales.numel()) // 256
        scales = a["scale_codebook"][scales.flatten().long()] * a["scale_absmax"][block] + a["scale_offset"]
        scales = scales.view(n, -1)
    weight = weight if scales is None else weight * spread(scales, a["group_size"], k)
    return weight + outlier_part(a, n, k)


def dense_packed(a: dict[str, Any], codes: Tensor) -> Tensor:
    (n, k), block = codes.shape, a["scale_block"]
    scales, zeros = a["scales"].double(), a["zeros"]
    if block:
        scales = scales * spread(a["scale_factors"], block, scales.shape[1])
    if zeros is None:
        zeros = torch.full_like(scales, 2.0 ** (a["bits"] - 1))
    elif zeros.shape[1] < scales.shape[1]:  # a stream of bits, the lowest of a byte first
        bits = zeros.long()[..., None].bitwise_right_shift(torch.arange(8)).bitwise_and(1).flatten(1)
        bits = bits[:, : a["bits"] * scales.shape[1]].unflatten(1, (-1, a["bits"]))
        zeros = (bits << torch.arange(a["bits"])).sum(-1)
    zeros = zeros.double()
    if a["zero_factors"] is not None:
        zeros = zeros * spread(a["zero_factors"], block, zeros.shape[1])
    scales, zeros = (spread(t, a["group_size"], k) for t in (scales, zeros))
    weight = codes.double() * scales - zeros if a["minimum"] else (codes.double() - zeros) * scales
    return weight + outlier_part(a, n, k)


def check(family: str, weight: Any, m: int, dtype: torch.dtype, trained: torch.dtype | None = torch.float32) -> None:
    """Every gradient of a weight: element by element no further off than float32 sums in any order may be."""
    dense = {"codebook": dense_codebook, "packed": dense_packed}[family]
    arguments = weight.arguments
    operands: Any = type(weight.operands)
    floats = {
        name: arguments[name] if trained is None else arguments[name].to(trained)
        for name in operands.differentiable
        if arguments[name] is not None and arguments[name].is_floating_point() and arguments[name].numel()
    }
    n, k = weight.codes.shape
    x, dy = activations(m, k, dtype, seed=m), activations(m, n, dtype, seed=m + 1)
    with torch.no_grad():
        found = operands(**{**arguments, **floats}).weight_gradients(x, dy, set(floats))
    assert found.keys() == floats.keys()
    exact = {name: t.double() for name, t in floats.items()}
    d, largest = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    for name, t in exact.items():

        def moved(t: Tensor, name: str = name) -> Tensor:
            return dense({**arguments, **exact, name: t}, weight.codes)

        one, back = torch.func.vjp(moved, t)
        slope = torch.func.jvp(moved, (t,), (torch.ones_like(t),))[1]  # each weight depends on one element
        want, magnitude = back(d)[0], back(slope.sign() * largest)[0]
        terms = m * one.numel() / max(1, t.shape[0] if t.dim() > 1 else t.numel())
        bound = (16 + math.sqrt(terms)) * U * magnitude + OUTPUT_ROUNDING[found[name].dtype] * want.abs() + 1e-40
        assert found[name].dtype == floats[name].dtype and found[name].shape == t.shape
        worst = float(((found[name].double() - want).abs() - bound).max())
        assert worst <= 0, (name, weight.arguments["bits"], (n, k), m, dtype, worst)


def in_turn(where: Where, bits: int, items: list[Any], turns: int) -> list[tuple[int, Any]]:
    """Every ``turns``-th of the items, others on other ISAs and with other bits."""
    return list(enumerate(items))[(bits + 3 * WHERE.index(where)) % turns :: turns]


@pytest.mark.parametrize("bits", codebook_cases.BITS)
def test_of_tables_and_their_scales(where, ran, bits):
    every = [kind for shape in codebook_cases.SHAPES for kind in codebook_cases.kinds(bits, *shape)]
    more = [*codebook_cases.kinds(bits, 150, 70, 24)][bits % 3 :: 3]
    for i, kind in [*in_turn(where, bits, every, 17), *enumerate(more)]:
        check("codebook", codebook_cases.random_weight(kind, i), ROWS[(i + bits) % 5], DTYPES[i % 3])
    assert (where.backend == "cpu") == (ran["sums_by_code"] > 0)


@pytest.mark.parametrize("bits", packed_cases.BITS)
def test_of_scales_zeros_and_factors(where, ran, bits):
    shapes = [*packed_cases.SHAPES, (150, 70, 24), (129, 40, None)]
    every = [format for shape in shapes for format in packed_cases.formats(bits, *shape)]
    every += [format for shape in shapes for format in packed_cases.more_formats(bits, *shape, turn=bits)]
    for i, format in in_turn(where, bits, every, 17):
        weight = packed_cases.random_weight(format, i)
        if where.backend == "cpu" and i % 2:  # as `convert` leaves a layer
            weight.packed = blocks.block(weight.packed, bits)
            weight.scales = by_group(weight.scales)
            weight.zeros = None if weight.zeros is None else by_group(weight.zeros)
        check("packed", weight, ROWS[(i + bits) % 5], DTYPES[i % 3])
    assert (where.backend == "cpu") == (ran["sampled_products"] > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_tensors_as_they_are_stored(where, ran, dtype):
    """Rounded once, to the dtype of what they are for."""
    kind = codebook_cases.Kind(3, 70, 104, 8, "group", "float", dtype, dtype, outliers=200)
    check("codebook", codebook_cases.random_weight(kind), 33, torch.float32, None)
    format = packed_cases.PackedFormat(4, 70, 104, 8, "group", "float", str(dtype).removeprefix("torch."))
    check("packed", packed_cases.random_weight(format), 33, torch.float32, None)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_of_rows_that_were_gathered(where, ran, bits):
    """Against all rows, those of D that nobody gathered being 0."""
    ids = torch.tensor([[5, 0, 5], [149, 7, 0]])
    format = packed_cases.PackedFormat(bits, 150, 70, 24, "group", "float", outliers=999)
    forms = (("tensor", "nested"), ("row", "none"), ("group", "float"))
    kinds = [codebook_cases.Kind(bits, 150, 70, 24, *form, outliers=999) for form in forms]
    grad = activations(6, 70, torch.float32).view(2, 3, 70)
    for weight in (packed_cases.random_weight(format), *map(codebook_cases.random_weight, kinds)):
        operands, arguments = type(weight.operands), weight.arguments
        floats = [n for n in operands.differentiable if arguments[n] is not None and arguments[n].is_floating_point()]
        weight = operands(**{n: a.float() if n in floats else a for n, a in arguments.items()})
        with torch.no_grad():
            found = weight.row_gradients(ids, grad, set(floats))
        d = torch.zeros(150, 70).index_add_(0, ids.flatten(), grad.flatten(0, 1))
        want = weight.gradients(weight.decoded().sums(d, weight.summed(floats)), floats)
        at = torch.repeat_interleave(torch.arange(150), weight.outlier_rows.diff().long())
        want["outlier_values"] = d[at, weight.outlier_columns.long()]
        assert found.keys() == want.keys() == set(floats)
        for name in floats:
            torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True], ids=["uint16", "int32"])
def test_outliers_of_every_row(where, ran, wide):
    """None, some and all of a row, in each form of columns; more rows of x than are taken together."""
    n, k = 35, 150
    chosen = torch.rand(n, k, generator=torch.Generator().manual_seed(1)) < 0.1
    chosen[3], chosen[4], chosen[-1] = False, True, False
    rows = torch.cat([torch.zeros(1), chosen.sum(1).cumsum(0)]).int()
    columns = chosen.nonzero()[:, 1].to(torch.int32 if wide else torch.uint16)
    for m, dtype in ((0, torch.float32), (259, torch.bfloat16), (128, torch.float16), (3, torch.float32)):
        x, dy = activations(m, k, dtype), activations(m, n, dtype, seed=2)
        x, dy = x.t().contiguous().t(), dy.repeat(1, 2)[:, :n]  # strided, as a view may be
        found = gradients.sampled_products(dy, x, torch.empty(len(columns)), columns, rows)
        want, largest = (dy.double().t() @ x.double())[chosen], (dy.double().abs().t() @ x.double().abs())[chosen]
        assert bool(((found - want).abs() <= (8 + math.sqrt(m)) * U * largest).all())


@pytest.mark.parametrize("bits", codebook_cases.BITS)
def test_members_of_entries(where, ran, bits):
    """Counted exactly, whatever the tables."""
    for tables, group_size in (("tensor", 75), ("row", 75), ("group", 7)):
        weight = codebook_cases.random_weight(codebook_cases.Kind(bits, 9, 75, group_size, tables, "float"))
        place = torch.arange(9)[:, None] * (tables != "tensor") + torch.zeros(75, dtype=torch.int64)
        if tables == "group":
            place = place * 11 + torch.arange(75) // 7
        entry = (place * (1 << bits) + weight.codes).flatten()
        want = torch.bincount(entry, minlength=weight.codebook.numel()).view(weight.codebook.shape)
        assert torch.equal(weight.operands.uses(75), want.float())
    assert ran["sums_by_code"] == 3 * (where.backend == "cpu")


def test_one_sum_whatever_the_threads(where, ran):
    weight = codebook_cases.random_weight(codebook_cases.Kind(4, 300, 200, 40, "tensor", "float", outliers=999))
    x, dy = activations(140, 200, torch.float32), activations(140, 300, torch.float32, seed=1)
    values, columns, rows = weight.outliers
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums = weight.operands.final_sums(torch.ones(300, 200).cumsum(1).sin(), {"codebook"})["codebook"]
            found.append((sums, gradients.sampled_products(dy, x, values, columns, rows)))
    finally:
        torch.set_num_threads(before)
    if where.backend == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sums_of_many_weights(where, ran):
    """Of one sign, so that an error of float32 sums would grow with their number."""
    n, k = 512, 4096
    codes = torch.randint(0, 2, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kind = codebook_cases.Kind(1, n, k, k)
    weight = replace(codebook_cases.random_weight(replace(kind, n=1)), kind=kind, codes=codes, packed=pack(codes, 1))
    d = torch.rand(n, k, generator=torch.Generator().manual_seed(2)) + 0.1
    want = torch.zeros(2, dtype=torch.float64).index_add(0, codes.long().flatten(), d.double().flatten())
    found = weight.operands.final_sums(d, {"codebook"})["codebook"].flatten()
    assert float(((found - want) / want).abs().max()) < (2e-7 if where.backend == "cpu" else 1e-6)


def test_gradients_of_gradients_take_the_formulas(ran):
    """Where they may be asked for, D is made as a whole: with a graph, in a trace, in a batch."""
    weight = codebook_cases.random_weight(codebook_cases.Kind(2, 6, 10, 4, "tensor", "none"))
    x, table = activations(3, 10, torch.float32), weight.codebook.clone().requires_grad_()

    def linear(table: Tensor) -> Tensor:
        return torch.ops.lowbit.codebook_linear(
            x, **{**weight.arguments, "codebook": table}, bias=None, x_scale=None, int8=False
        )

    torch.autograd.grad(linear(table).square().sum(), table)
    for f in (
        lambda: torch.autograd.grad(linear(table).square().sum(), table, create_graph=True),
        lambda: torch.func.grad(lambda t: linear(t).square().sum())(table.detach()),
        lambda: torch.autograd.grad(linear(table), table, torch.randn(2, 3, 6), is_grads_batched=True),
    ):
        with pytest.raises(AssertionError, match="as a whole"):
            f()


def test_a_library_without_these_kernels(monkeypatch):
    """One of an earlier version: the formulas serve, in ranges of rows."""
    weight = codebook_cases.random_weight(codebook_cases.Kind(4, 150, 70, 24, "group", "float", outliers=99))
    monkeypatch.setattr(gradients, "compiled", lambda op, t: None)
    check("codebook", weight, 17, torch.float32)


BAD = (
    (dict(d=torch.ones(3, 31)), r"d must be of shape \[3, 32\]: got \[3, 31\]"),
    (dict(d=torch.ones(3, 32).double()), "d must be float32: got Double"),
    (dict(scales=torch.ones(3, 5)), r"scales must be of shape \[3, 4\]: got \[3, 5\]"),
    (dict(d=None, scales=torch.ones(3, 4)), "scales are for d: got scales without it"),
    (dict(bits=9), "bits must be between 1 and 8: got bits=9"),
    (dict(group_size=0), "group_size must be between 1 and K: got group_size=0, K=32"),
)


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_sums_by_code_refuses_what_does_not_fit(changed, message):
    kernel = gradients.compiled("sums_by_code", torch.empty(0))
    if kernel is None:
        pytest.skip("the compiled library is not here")
    packed = torch.zeros(3, 2, dtype=torch.int32)
    numbers = dict(bits=2, in_features=32, group_size=8, grouped=True)
    arguments = dict(d=torch.ones(3, 32), packed=packed, scales=None, **numbers)
    with pytest.raises(RuntimeError, match=f"sums_by_code: {message}"):
        kernel(**{**arguments, **changed})


def test_sampled_products_refuses_what_does_not_fit():
    kernel = gradients.compiled("sampled_products", torch.empty(0))
    if kernel is None:
        pytest.skip("the compiled library is not here")
    given = dict(
        dy=torch.ones(4, 2), x=torch.ones(4, 8), outlier_values=torch.ones(2),
        outlier_columns=torch.tensor([1, 7]).int(), outlier_rows=torch.tensor([0, 1, 2]).int(),
    )  # fmt: skip
    for changed, message in (
        (dict(dy=torch.ones(3, 2)), r"dy and x must have as many rows: got shapes \[3, 2\] and \[4, 8\]"),
        (dict(x=torch.ones(4, 7)), "outlier_columns must be between 0 and K - 1: got 7, K=7"),
        (dict(dy=torch.ones(4, 3)), r"outlier_rows must be of shape \[4\]: got \[3\]"),
        (dict(x=torch.ones(4, 8).int()), "x must be float32, float16 or bfloat16: got Int"),
    ):
        with pytest.raises(RuntimeError, match=f"sampled_products: {message}"):
            kernel(**{**given, **changed})
