"""The quantizers of family codebook against brute force and float64 oracles written from their formulas."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit.codebook.tables as module
from lowbit.backends.cpu import native
from lowbit.codebook import descent
from lowbit.codebook.format import FP4, NF4, Codebook, CodebookWeight
from lowbit.codebook.kmeans import _Points, boundaries, kmeans, optimal
from lowbit.codebook.quantize import quantize
from lowbit.codebook.tables import TableFit

N, K, GROUP = 24, 172, 32  # the last group is shorter
LEARNED = [
    Codebook(bits=bits, granularity=granularity, group_size=group_size, scales=scales)
    for bits, (granularity, group_size, scales) in itertools.product(
        (1, 2, 3, 4, 8),
        (("tensor", None, False), ("row", None, False), ("group", GROUP, False), ("tensor", None, True),
         ("tensor", GROUP, True), ("row", GROUP, True)),
    )
]  # fmt: skip
FIXED = [
    Codebook(table="nf4", group_size=GROUP),
    Codebook(table="fp4", group_size=GROUP),
    Codebook(table="nf4"),
    Codebook(table=(3.0, -1.0, 0.0, 7.0), group_size=GROUP),
    Codebook(table=(-0.06, -0.02, 0.02, 0.06), granularity="tensor", scales=False),
]
QUANTIZERS = ("kmeans", "optimal")


def with_(spec: Codebook, **changes: object) -> Codebook:
    return replace(spec, **changes)  # type: ignore[arg-type]


def name(spec: Codebook) -> str:
    return spec.describe().replace(", ", "-").replace(" ", "-") + (f"-{spec.table}" if spec.table else "")


@pytest.fixture(params=["compiled", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of the exact optimum."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "load", lambda: "absent")
    elif native.load() is not None:
        pytest.skip(f"no native library: {native.load()}")
    return str(request.param)


def weight(n: int = N, k: int = K, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) * 0.05 + 0.01).to(dtype)


def hessian(k: int = K, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return x.t() @ x / len(x)


def values(q: CodebookWeight) -> Tensor:
    """What every code of every weight would stand for, float64 [N, K, L]: fl(codebook * scale)."""
    n, k = q.codes.shape
    groups = torch.arange(k) // (q.group_size or k)
    tables = q.codebook.float().expand(n, -1, -1)
    tables = tables[:, groups] if tables.shape[1] != 1 else tables.expand(-1, k, -1)
    return (tables if q.scales is None else tables * q.scales.float()[:, groups, None]).double()


def outliers(q: CodebookWeight) -> Tensor:
    dense = torch.zeros(q.codes.shape, dtype=torch.float64)
    if q.outlier_values is not None:
        assert q.outlier_rows is not None and q.outlier_columns is not None
        rows = torch.repeat_interleave(torch.arange(len(q.codes)), q.outlier_rows.diff())
        dense[rows, q.outlier_columns.long()] = q.outlier_values.double()
    return dense


def dequantize(q: CodebookWeight) -> Tensor:
    return values(q).gather(-1, q.codes.long().unsqueeze(-1)).squeeze(-1) + outliers(q)


def squared_error(x: Tensor, h: Tensor | None, centroids: Tensor) -> Tensor:
    """Of every row of x, inf meaning absent."""
    error = (x.double().unsqueeze(-1) - centroids.double().unsqueeze(1)).square().amin(-1)
    return (error if h is None else error * h).masked_fill(~torch.isfinite(x), 0).sum(1)


# ---------------------------------------------------------------------------------------------- k-means itself


def best_error(x: Tensor, h: Tensor | None, clusters: int) -> float:
    """Over all ways to cut the sorted values into ``clusters`` runs."""
    order = x.argsort()
    x, h = x[order].double(), (torch.ones_like(x) if h is None else h)[order].double()
    best = math.inf
    for cuts in itertools.combinations(range(1, len(x)), min(clusters, len(x)) - 1):
        total = 0.0
        for start, end in itertools.pairwise((0, *cuts, len(x))):
            part, mass = x[start:end], h[start:end]
            total += float(((part - (part * mass).sum() / mass.sum()).square() * mass).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["distinct", "ties", "clumps", "far", "tiny"])
@pytest.mark.parametrize(("n", "clusters"), [(1, 2), (2, 2), (7, 2), (8, 3), (9, 4), (10, 8), (11, 5)])
def test_optimal_is_the_brute_force_optimum(n: int, clusters: int, kind: str, weighted: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(6, n, generator=generator)
    unit = 1.0
    if kind == "ties":
        x = x.round()
    elif kind == "clumps":
        x = x.round() * 10 + x * 0.01
    elif kind == "far":
        x = 1000 + x * 0.01
        unit = 0.01
    elif kind == "tiny":
        x, unit = x * 1e-25, 1e-25
    h = torch.rand(6, n, generator=generator) * 5 + 0.01 if weighted else None
    found = optimal(x, h, clusters)
    assert found.dtype == torch.float32 and found.shape == (6, clusters)
    assert bool((found.diff(dim=1) >= 0).all())
    errors = squared_error(x, h, found)
    for row in range(6):
        expected = best_error(x[row], None if h is None else h[row], clusters)
        # the centroid's float32 rounding, squared, is all that may be added
        slack = 60 * (float(x[row].abs().max()) * 2.0**-24) ** 2 + 1e-12 * unit**2
        assert expected - slack <= float(errors[row]) <= expected * (1 + 1e-9) + slack


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "n", "clusters"), [(30, 100, 8), (4, 700, 16), (3, 300, 128), (1, 80000, 3)])
def test_numpy_and_compiled_agree(rows: int, n: int, clusters: int, weighted: bool) -> None:
    """80,000 values are long enough for the compiled one to cut a layer into segments."""
    if native.load() is not None:
        pytest.skip(f"no native library: {native.load()}")
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n, generator=generator)
    x[rows // 2 :] = (x[rows // 2 :] * (8 if rows > 1 else 1e4)).round() / 8
    x[0, : n // 10] = torch.inf
    h = torch.rand(rows, n, generator=generator) + 0.01 if weighted else None
    compiled = optimal(x, h, clusters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: "absent")
        assert torch.equal(optimal(x, h, clusters), compiled)
    assert bool((squared_error(x, h, compiled) <= squared_error(x, h, kmeans(x, h, clusters)) * (1 + 1e-6)).all())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("clusters", [2, 3, 16, 33])
def test_halving_the_problem_finds_the_same_optimum(clusters: int, threads: int) -> None:
    """What a huge tensor does, forced on a smaller one by keeping few choices."""
    if native.load() is not None:
        pytest.skip(f"no native library: {native.load()}")
    x = torch.randn(1, 70000, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = torch.ops.lowbit_native.kmeans_optimal(x, None, clusters)
        halved = torch.ops.lowbit_native.kmeans_optimal(x, None, clusters, 70001)
    finally:
        torch.set_num_threads(before)
    # among 70,000 values, moving a cut by one changes the error by less than its rounding
    assert torch.allclose(whole, halved, rtol=0, atol=1e-4)
    assert torch.allclose(squared_error(x, None, whole), squared_error(x, None, halved), rtol=1e-9)


def test_compiled_op_names_bad_arguments() -> None:
    if native.load() is not None:
        pytest.skip(f"no native library: {native.load()}")
    op, x = torch.ops.lowbit_native.kmeans_optimal, torch.zeros(2, 3)
    for arguments, message in [
        ((x.double(), None, 2), "x must be float32"), ((x[0], None, 2), r"\[R, n\]"), ((x, None, 0), "clusters"),
        ((x, None, 257), "clusters"), ((x, x[:1], 2), "weights must be of shape"),
        ((x.t(), None, 2), "contiguous"), ((x, x.half(), 2), "weights must be float32"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [2, 4, 16, 64])
def test_lloyd_rounds_only_improve_and_end_at_a_fixed_point(clusters: int, weighted: bool) -> None:
    x = weight()
    x[3] = (x[3] * 50).round()
    x[4, 20:] = torch.inf
    h = torch.rand(N, K) * 4 + 0.1 if weighted else None
    errors = [squared_error(x, h, kmeans(x, h, clusters, iterations=i)) for i in (1, 2, 3, 5, 8, 13, 200)]
    for earlier, later in itertools.pairwise(errors):
        assert bool((later <= earlier * (1 + 1e-6) + 1e-12).all())
    assert float(errors[-1].sum()) < float(errors[0].sum())
    found = kmeans(x, h, clusters, iterations=200).double()
    nearest = (x.double().unsqueeze(-1) - found.unsqueeze(1)).abs().argmin(-1)
    mass = torch.ones_like(x) if h is None else h
    mass = mass.double().masked_fill(~torch.isfinite(x), 0)
    total, sums = torch.zeros_like(found), torch.zeros_like(found)
    total.scatter_add_(1, nearest, mass)
    sums.scatter_add_(1, nearest, x.double().masked_fill(~torch.isfinite(x), 0) * mass)
    member = total > 0
    assert torch.allclose((sums / total)[member], found[member], rtol=1e-4, atol=1e-6)
    assert bool((squared_error(x, h, optimal(x, h, clusters)) <= errors[-1] * (1 + 1e-6) + 1e-12).all())


def test_kmeans_plus_plus_draws_by_squared_distance() -> None:
    """All pairs of 60 evenly spaced random numbers, against the distribution by its definition."""
    x = torch.tensor([[0.0, 1.0, 1.5, 4.0, torch.inf]])
    h = torch.tensor([[1.0, 2.0, 0.5, 1.0, 7.0]])
    points, steps = _Points.of(x, h), 60
    counts: dict[tuple[float, ...], int] = {}
    for first, second in itertools.product(range(steps), repeat=2):
        drawn = points.plus_plus(torch.tensor([[first + 0.5, second + 0.5]], dtype=torch.float64) / steps)
        counts[tuple(drawn[0].tolist())] = counts.get(tuple(drawn[0].tolist()), 0) + 1
    real, mass = x[0, :4].double(), h[0, :4].double()
    for a, b in itertools.combinations(range(4), 2):
        expected = 0.0
        for i, j in ((a, b), (b, a)):
            square = mass * (real - real[i]) ** 2
            expected += float(mass[i] / mass.sum() * square[j] / square.sum())
        assert counts.pop((float(real[a]), float(real[b])), 0) / steps**2 == pytest.approx(expected, abs=2 / steps)
    assert not counts


def test_kmeans_is_near_the_optimum() -> None:
    """What 10 rounds leave on normal weights, on the average over the rows: more with more clusters."""
    x = weight(64, 768)
    for clusters, ratio in ((2, 1.01), (4, 1.05), (8, 1.12), (16, 1.2)):
        for seed in range(3):
            found = squared_error(x, None, kmeans(x, None, clusters, seed=seed)).sum()
            assert found <= ratio * squared_error(x, None, optimal(x, None, clusters)).sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_with_few_or_no_values(weighted: bool, backend: str) -> None:
    x = torch.full((4, 9), torch.inf)
    x[1, :3] = torch.tensor([2.0, -1.0, 2.0])
    x[2] = 5.0
    x[3] = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 4.0])
    h = torch.rand(4, 9) + 0.1 if weighted else None
    expected = [[0.0] * 4, [-1.0, 2.0, 2.0, 2.0], [5.0] * 4, [1.0, 2.0, 3.0, 4.0]]
    assert optimal(x, h, 4).tolist() == expected
    assert kmeans(x, h, 4).tolist() == expected


def test_boundaries_separate_the_nearest_values() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(500, 4, generator=generator).sort(dim=1).values
    tables[:100, 1] = tables[:100, 0].nextafter(torch.tensor(9.0))  # neighbours without a float between them
    tables = tables.sort(dim=1).values
    limits = boundaries(tables)
    for x in (limits, limits.nextafter(torch.tensor(9.0)), limits.nextafter(torch.tensor(-9.0))):
        left, right = (x.double() - tables[:, :-1].double()).abs(), (x.double() - tables[:, 1:].double()).abs()
        assert torch.equal(x > limits, right < left)


# ---------------------------------------------------------------------------------------------- whole weights


def assert_nearest(w: Tensor, q: CodebookWeight) -> None:
    """No other code stands for a nearer value, and of equally near values it is one of the least."""
    error = (values(q) - w.double().unsqueeze(-1)).abs()
    chosen = error.gather(-1, q.codes.long().unsqueeze(-1))
    assert torch.equal(chosen, error.amin(-1, keepdim=True))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("spec", LEARNED + FIXED, ids=name)
def test_codes_are_nearest_in_the_stored_table(spec: Codebook, quantizer: str) -> None:
    spec = with_(spec, quantizer=quantizer)
    w = weight()
    q = quantize(w, spec)
    assert q.format() == spec.format(w, "linear")
    assert q.codes.dtype == torch.uint8 and q.codes.shape == (N, K)
    assert q.codebook.is_contiguous()
    assert q.outlier_values is q.outlier_columns is q.outlier_rows is None
    if spec.values is None:
        assert bool((q.codebook.float().diff(dim=-1) >= 0).all())
    else:
        assert q.codebook.flatten().tolist() == pytest.approx(list(spec.values), rel=1e-7)
    assert_nearest(w, q)
    if spec.bits == 8 and spec.values is None:
        assert (dequantize(q) - w).norm() < 0.02 * w.norm()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_a_weight_on_a_table_is_reproduced_exactly(
    granularity: str, bits: int, dtype: torch.dtype, quantizer: str
) -> None:
    group_size = GROUP if granularity == "group" else None
    spec = Codebook(bits=bits, granularity=granularity, group_size=group_size, quantizer=quantizer,
                    codebook_dtype=dtype)  # fmt: skip
    generator = torch.Generator().manual_seed(bits)
    shape = {"tensor": (1, 1), "row": (N, 1), "group": (N, 6)}[granularity]
    tables = torch.randn(*shape, 1 << bits, generator=generator).to(dtype).float().expand(N, -1, -1)
    groups = torch.arange(K) // GROUP if granularity == "group" else torch.zeros(K, dtype=torch.int64)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator)
    w = tables[:, groups].gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    q = quantize(w, spec)
    assert q.codebook.dtype == dtype
    assert torch.equal(dequantize(q), w.double())


@pytest.mark.parametrize("spec", LEARNED, ids=name)
def test_optimal_is_never_worse_than_kmeans(spec: Codebook) -> None:
    spec = with_(spec, codebook_dtype=torch.float32, scale_dtype=torch.float32)
    for seed in range(3):
        w = weight(seed=seed)
        best, found = (
            (dequantize(quantize(w, with_(spec, quantizer=quantizer, seed=seed))) - w).square().sum()
            for quantizer in ("optimal", "kmeans")
        )
        assert best <= found * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [LEARNED[12], LEARNED[13], LEARNED[17], FIXED[0]], ids=name)
def test_any_float_dtype_and_strides(spec: Codebook, dtype: torch.dtype) -> None:
    w = weight(dtype=dtype)
    expected = quantize(w.float(), spec)
    for given in (w, w.t().contiguous().t(), torch.stack([w, w], dim=-1)[..., 0]):
        found = quantize(given, spec)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.codebook, expected.codebook)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_small_and_odd_shapes(quantizer: str) -> None:
    for n, k in [(1, 1), (1, 2), (3, 1), (5, 33)]:
        for group_size in {1, min(k, 3), k}:
            specs = [Codebook(bits=3), Codebook(bits=3, granularity="tensor"), Codebook(bits=3, group_size=group_size),
                     Codebook(table="nf4", group_size=group_size)]  # fmt: skip
            for spec in specs:
                spec = with_(spec, quantizer=quantizer)
                w = weight(n, k)
                q = quantize(w, spec)
                # the only row's table has the shape of the tensor's
                expected = with_(spec, granularity="tensor") if (n, spec.granularity) == (1, "row") else spec
                assert replace(q.format(), codebook_dtype="float16") == replace(
                    expected.format(w, "linear"), codebook_dtype="float16"
                )
                assert_nearest(w, q)
    w = weight().abs() + 0.01
    single = dequantize(quantize(w, Codebook(bits=2, group_size=1, quantizer=quantizer)))
    assert torch.equal(single, w.half().double())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("spec", [*LEARNED[12:18], *FIXED], ids=name)
def test_degenerate_groups(spec: Codebook, quantizer: str) -> None:
    spec = with_(spec, quantizer=quantizer)
    w = weight()
    w[0], w[1], w[2] = 0, 0.25, -0.25
    w[3] = 100 + torch.arange(K) * 1e-3  # a narrow range far from 0
    w[4, 5:] = 0
    q = quantize(w, spec)
    found = dequantize(q)
    assert bool(torch.isfinite(found).all())
    assert_nearest(w, q)
    if q.scales is not None:
        assert bool((q.scales[1:4] > 0).all())
        assert bool((q.scales[0] == 0).all())  # nothing to scale
        assert bool((q.scales[4, 1:] == 0).all())
        assert bool((found[0] == 0).all())
    if spec.granularity != "tensor":
        assert torch.equal(found[:3], w[:3].double())
    if spec.granularity == "row" and q.scales is None and spec.codebook_dtype == torch.float32:
        assert (found[3] - w[3].double()).abs().max() < 0.02
    everything_zero = quantize(torch.zeros(4, 40), with_(spec, group_size=spec.group_size))
    assert bool((dequantize(everything_zero) == 0).all()) or (not spec.scales and spec.values and 0 not in spec.values)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_rows_of_zeros_are_zero_and_change_no_other_row(granularity: str, quantizer: str) -> None:
    # a padding row: its scale must neither be that of a table without a 0, nor weigh in the fit of the others
    spec = Codebook(bits=1, scales=True, granularity=granularity, quantizer=quantizer)
    w = weight(40, 32) * 0.02
    padded = torch.cat([w, torch.zeros(8, 32)])
    q = quantize(padded, spec)
    assert bool((dequantize(q)[40:] == 0).all())
    error, alone = (dequantize(q)[:40] - w).norm(), (dequantize(quantize(w, spec)) - w).norm()
    assert error <= 1.02 * alone
    fixed = quantize(padded, Codebook(table=(-1.0, -0.3, 0.3, 1.0), group_size=16))
    assert bool((dequantize(fixed)[40:] == 0).all())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("magnitude", [1e-35, 1e-20, 1e-6, 1e4, 1e5, 1e20, 3e38])
@pytest.mark.parametrize("spec", [*LEARNED[24:30], FIXED[0]], ids=name)
def test_extreme_magnitudes_fall_back_to_float32(spec: Codebook, magnitude: float, quantizer: str) -> None:
    spec = with_(spec, quantizer=quantizer)
    w = weight()
    w = w / w.abs().max() * magnitude
    w[:, 0], w[:, 1] = magnitude, -magnitude
    q = quantize(w, spec)
    stored = q.codebook if q.scales is None else q.scales
    wanted = spec.resolve_codebook_dtype() if q.scales is None else spec.resolve_scale_dtype()
    assert stored.dtype == (torch.float32 if magnitude != 1e4 else wanted)
    assert_nearest(w, q)
    error = (dequantize(q) - w).norm() / w.double().norm()
    assert error < (0.02 if spec.bits == 8 else 0.2)


def test_float16_tables_may_hold_subnormal_values() -> None:
    w = weight()
    w[0] = torch.linspace(-1e-5, 1e-5, K)
    assert quantize(w, Codebook(bits=2)).codebook.dtype == torch.float16
    assert (dequantize(quantize(w, Codebook(bits=2, quantizer="optimal")))[0] - w[0]).abs().max() < 0.27e-5
    assert quantize(w, Codebook(bits=8)).codebook.dtype == torch.float32
    w[0] *= 0.01
    assert quantize(w, Codebook(bits=2)).codebook.dtype == torch.float32


def test_scales_are_the_largest_magnitudes() -> None:
    w = weight()
    for spec in (Codebook(bits=4, group_size=GROUP, scales=True), Codebook(table="nf4", group_size=GROUP)):
        parts = w.abs().split(GROUP, dim=1)
        expected = torch.stack([part.amax(1) for part in parts], 1)
        q = quantize(w, spec)
        assert q.scales is not None
        assert torch.equal(q.scales, expected.half())
        exact = quantize(w, with_(spec, scale_dtype=torch.float32))
        assert torch.equal(exact.scales, expected)
    table = (3.0, -1.0, 0.0, 7.0)
    q = quantize(w, Codebook(table=table, scale_dtype=torch.float32))
    assert torch.equal(q.scales, w.abs().amax(1, keepdim=True) / 7)  # the group's largest meets the table's largest


def test_scaled_tables_minimise_the_error_of_the_weights_themselves() -> None:
    """Groups of very different size: the table must serve the large ones, not all normalised weights alike."""
    w = weight(16, 256)
    w[:, ::2] *= 1e-3
    w = w[:, torch.cat([torch.arange(0, 256, 2), torch.arange(1, 256, 2)])]  # small ones first
    w[:, :128] = w[:, :128].abs()
    spec = Codebook(bits=2, group_size=128, scales=True, quantizer="optimal", scale_dtype=torch.float32)
    q = quantize(w, spec)
    assert q.scales is not None
    normal = (w.view(16, 2, 128) / q.scales.unsqueeze(-1)).reshape(1, -1)
    h = q.scales.unsqueeze(-1).square().expand(-1, -1, 128).reshape(1, -1)
    assert torch.allclose(q.codebook.flatten(), optimal(normal, h, 4).flatten(), rtol=1e-5)
    assert not torch.allclose(q.codebook.flatten(), optimal(normal, None, 4).flatten(), rtol=1e-2)


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_fixed_tables_agree_with_bitsandbytes(table: str, group_size: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(48, 256)
    w[0] = 0
    packed, state = functional.quantize_4bit(w, blocksize=group_size, quant_type=table)
    q = quantize(w, Codebook(table=table, group_size=group_size, scale_dtype=torch.float32))
    assert q.scales is not None
    assert torch.allclose(q.codebook.flatten(), state.code.float(), rtol=0, atol=1e-7)
    assert torch.equal(q.scales, state.absmax.view(48, -1))
    theirs = functional.dequantize_4bit(packed, state).double()
    ours = dequantize(q)
    same = torch.isclose(ours, theirs, rtol=1e-6, atol=1e-9)
    step = q.scales.double().repeat_interleave(group_size, 1)
    tie = (((ours - w).abs() - (theirs - w).abs()).abs() <= 1e-6 * step)
    assert bool((same | tie).all())
    assert same.double().mean() > 0.999


def test_a_fixed_table_keeps_its_order() -> None:
    table = (0.5, -1.0, 0.5, 1.0, 0.0, -0.25, 0.0, -0.0)
    w = torch.tensor([[-1.0, -0.26, -0.01, 0.0, 0.01, 0.49, 0.51, 1.0, 0.75]])
    q = quantize(w, Codebook(table=table))
    assert q.codebook.flatten().tolist() == list(table)
    assert q.codes.tolist() == [[1, 5, 4, 4, 4, 0, 0, 3, 0]]  # the first of equal values, the lower of two as near
    assert quantize(torch.zeros(2, 3), Codebook(table="fp4")).codes.tolist() == [[0] * 3] * 2


# ---------------------------------------------------------------------------------------------- sensitivity


@pytest.mark.parametrize("spec", LEARNED[6:18], ids=name)
def test_importance_moves_the_fit(spec: Codebook) -> None:
    """The error weighed by importance falls, against the plain fit."""
    w = weight()
    generator = torch.Generator().manual_seed(2)
    h = torch.rand(N, K, generator=generator) ** 8 * 100
    spec = with_(spec, quantizer="optimal", codebook_dtype=torch.float32, scale_dtype=torch.float32)
    plain = dequantize(quantize(w, spec))
    fitted = dequantize(quantize(w, with_(spec, sensitivity=True), importance=h))
    damped = h / h.mean() + 0.01
    assert (damped * (fitted - w).square()).sum() < (damped * (plain - w).square()).sum()
    assert (fitted - w).square().sum() > (plain - w).square().sum()


@pytest.mark.parametrize("spec", [LEARNED[12], LEARNED[13], LEARNED[14], LEARNED[16]], ids=name)
def test_importance_of_rows_of_a_table_is_the_weighted_optimum(spec: Codebook) -> None:
    spec = with_(spec, quantizer="optimal", codebook_dtype=torch.float32, sensitivity=True)
    w, h = weight(), torch.rand(N, K)
    q = quantize(w, spec, importance=h)
    h = (h.double() / h.double().mean() + 0.01).float()
    if spec.scales:
        assert q.scales is not None
        scale = q.scales.float().repeat_interleave(GROUP, 1)[:, :K]
        x, h = (w / scale).view(1, -1), (h * (scale / q.scales.float().max()) ** 2).view(1, -1)
    elif spec.granularity == "tensor":
        x, h = w.view(1, -1), h.view(1, -1)
    else:
        group = GROUP if spec.granularity == "group" else K
        pad = -K % group
        x = torch.nn.functional.pad(w, (0, pad), value=torch.inf).view(-1, group)
        h = torch.nn.functional.pad(h, (0, pad), value=1).view(-1, group)
    assert torch.allclose(q.codebook.reshape(len(x), -1), optimal(x, h, 1 << spec.bits), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", LEARNED[12:18], ids=name)
def test_equal_importance_is_none(spec: Codebook) -> None:
    spec = with_(spec, quantizer="optimal")
    w = weight()
    expected = quantize(w, spec)
    sensitive = with_(spec, sensitivity=True)
    for given in (dict(hessian=torch.eye(K)), dict(hessian=torch.zeros(K, K)), dict(importance=torch.full((N, K), 3.0)),
                  dict(importance=torch.zeros(N, K))):  # fmt: skip
        found = quantize(w, sensitive, **given)  # type: ignore[arg-type]
        assert torch.allclose(found.codebook.float(), expected.codebook.float(), rtol=1e-3, atol=1e-6)
        assert (found.codes != expected.codes).double().mean() < 0.01
    ignored = quantize(w, spec, hessian=hessian(), importance=torch.rand(N, K))  # not asked for
    assert torch.equal(ignored.codes, expected.codes)


def proxy_loss(error: Tensor, h: Tensor) -> float:
    return float((error @ h.double() * error).sum())


def feedback_oracle(w: Tensor, h: Tensor, q: CodebookWeight) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 as published (inverse Hessian, block of one), on the tables of ``q``."""
    w, h = w.double().clone(), h.double()
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    table = values(q)
    result = torch.empty_like(w)
    for i, column in enumerate(order.tolist()):
        code = (table[:, column] - w[:, column, None]).abs().argmin(-1)
        result[:, column] = table[:, column].gather(-1, code[:, None])[:, 0]
        error = (w[:, column] - result[:, column]) / inverse[i, i]
        w[:, order[i:]] -= error[:, None] * inverse[i, i:]
    return result


@pytest.mark.parametrize("spec", [*LEARNED[6:18], *FIXED], ids=name)
def test_a_hessian_brings_error_feedback(spec: Codebook) -> None:
    w, h = weight(), hessian()
    q = quantize(w, with_(spec, sensitivity=True), hessian=h)
    oracle = feedback_oracle(w, h, q)
    assert (dequantize(q) == oracle).double().mean() > 0.99  # a tie decided the other way changes what follows
    loss = proxy_loss(dequantize(q) - w, h)
    assert loss == pytest.approx(proxy_loss(oracle - w, h), rel=0.02)
    assert loss < 0.8 * proxy_loss(dequantize(quantize(w, spec)) - w, h)


# ---------------------------------------------------------------------------------------------- least squares


def kept_apart(q: CodebookWeight) -> Tensor:
    apart = torch.zeros(q.codes.shape, dtype=torch.bool)
    if q.outlier_rows is not None and q.outlier_columns is not None:
        rows = torch.repeat_interleave(torch.arange(len(q.codes)), q.outlier_rows.diff())
        apart[rows, q.outlier_columns.long()] = True
    return apart


def damped_hessian(h: Tensor) -> Tensor:
    return (h + 0.01 * h.diagonal().mean() * torch.eye(len(h))).double()


def row_errors(w: Tensor, q: CodebookWeight, h: Tensor) -> Tensor:
    """Of each row, in float64; what is kept apart has none."""
    e = (dequantize(q) - w.double()).masked_fill(kept_apart(q), 0)
    return (e @ damped_hessian(h) * e).sum(1)


@pytest.mark.parametrize("spec", [*LEARNED[6:18], *FIXED], ids=name)
def test_least_squares_improves_in_every_row(spec: Codebook) -> None:
    """On what ``sensitivity`` finds, of which dtypes, order and a given table are kept; the same every time."""
    w, h = weight(), hessian()
    spec = with_(spec, outliers=0.02 if spec.bits == 3 or spec.table == "fp4" else 0.0)
    first, q = (quantize(w, with_(spec, **s), hessian=h) for s in (dict(sensitivity=True), dict(quantizer="lnq")))
    before, after = row_errors(w, first, h), row_errors(w, q, h)
    if spec.shares_over_rows:
        before, after = before.sum(0), after.sum(0)
    assert bool((after <= before * (1 + 1e-4)).all())
    only_codes = spec.values is not None and not spec.scales
    assert float(after.sum()) < (0.99 if only_codes else 0.9) * float(before.sum())
    assert q.format() == first.format() == spec.format(w, "linear")
    assert torch.equal(kept_apart(q), kept_apart(first))
    if spec.values is None:
        assert bool((q.codebook.float().diff(dim=-1) >= 0).all())
    else:
        assert torch.equal(q.codebook, first.codebook)
    assert int(q.codes.max()) < 1 << spec.bits and (q.scales is None or bool((q.scales > 0).all()))
    if spec.bits == 2:
        again = quantize(w, with_(spec, quantizer="lnq"), hessian=h)
        assert torch.equal(again.codes, q.codes) and torch.equal(again.codebook, q.codebook)


@pytest.mark.parametrize("spec", [*LEARNED[6:12], FIXED[0]], ids=name)
def test_least_squares_ends_where_nothing_alone_is_better(spec: Codebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many sweeps no other code of one weight, no other value of a table, no other scale has less error."""
    monkeypatch.setattr(descent, "_SWEEPS", 60)
    n, k = 8, 2 * GROUP + 7
    spec = with_(spec, quantizer="lnq", codebook_dtype=torch.float32, scale_dtype=torch.float32)
    w, h = weight(n, k), hessian(k)
    q = quantize(w, spec, hessian=h)
    damped, e = damped_hessian(h), dequantize(q) - w.double()
    gradient, least = e @ damped, (e @ damped * e).sum()

    change = values(q) - dequantize(q).unsqueeze(-1)  # of one weight
    after = 2 * change * gradient.unsqueeze(-1) + change.square() * damped.diagonal()[:, None]
    assert float(after.min()) >= -1e-5 * float(least)

    # what a change of one table value, or scale, does to Q: the error's slope in its direction is none
    one_hot = torch.nn.functional.one_hot(q.codes.long(), 1 << spec.bits).double()
    groups = torch.nn.functional.one_hot(torch.arange(k) // (q.group_size or k)).double()
    scale = torch.ones(n, k) if q.scales is None else q.scales.repeat_interleave(q.group_size or k, 1)[:, :k]
    table = q.codebook.double().expand(n, -1, -1)
    directions = []  # [..., n, k]
    if spec.values is None:
        per_row = one_hot * scale.double().unsqueeze(-1)
        if spec.granularity == "group":
            directions += list(torch.einsum("nkl,kg->glnk", per_row, groups).flatten(0, 1))
        else:
            directions += list(per_row.permute(2, 0, 1))
    if q.scales is not None:
        directions += list(torch.einsum("nkl,nl,kg->gnk", one_hot, table[:, 0], groups))
    assert directions
    together = spec.shares_over_rows
    for i, direction in enumerate(directions):
        slope = (direction * gradient).sum(1)
        curvature = (direction @ damped * direction).sum(1)
        if together and i < 1 << spec.bits:
            slope, curvature = slope.sum(0, keepdim=True), curvature.sum(0, keepdim=True)
        gain = torch.where(curvature > 0, slope.square() / curvature, 0)  # of the best step
        assert float(gain.max()) <= 1e-4 * float(least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", [*LEARNED[6:9], *LEARNED[12:15], *FIXED[:2]], ids=name)
def test_least_squares_finds_what_the_weight_was_made_of(
    spec: Codebook, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From tables, or scales, that are a little wrong: the error is 0 again."""
    monkeypatch.setattr(descent, "_STEPS", 48)  # as many as a row has values of tables
    spec = with_(spec, codebook_dtype=dtype, scale_dtype=dtype)
    generator, levels = torch.Generator().manual_seed(spec.bits), 1 << spec.bits
    fit = TableFit(weight(), spec, None, lambda values, weights, row: optimal(values, weights, levels))
    fit.fit_scales()
    fit.fit_tables()
    codes = torch.randint(0, levels, (N, K), generator=generator).to(torch.uint8)
    codes = codes if spec.table != "fp4" else fit.order()[codes.int()].to(torch.uint8)
    fit.weight = torch.zeros(N, K)
    exact = torch.cat([-rest for rest, _ in fit.rest(codes)])
    fit.weight = exact

    def wrong(t: Tensor) -> Tensor:
        return (t * (1 + 0.003 * torch.randn(t.shape, generator=generator))).to(t.dtype)

    if spec.values is None:
        fit.tables = wrong(fit.tables)
    if fit.scales is not None:
        fit.scales = wrong(fit.scales)
    x = torch.randn(400, K, generator=generator)
    found = descent.descend(fit, codes, x.t() @ x)
    assert torch.equal(found, codes)
    left = torch.cat([rest for rest, _ in fit.rest(codes)]).abs()
    assert float(left.max()) <= (1e-6 * float(exact.abs().max()) if dtype == torch.float32 else 0)


@pytest.mark.parametrize("spec", [LEARNED[6], LEARNED[7], FIXED[1]], ids=name)
def test_least_squares_starts_again(spec: Codebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no row loses by, nor their sum where they share a table."""
    spec, w, h, errors = with_(spec, quantizer="lnq", outliers=0.02), weight(), hessian(), []
    for starts in (1, 2, 4):
        monkeypatch.setattr(descent, "_STARTS", starts)
        errors.append(row_errors(w, quantize(w, spec, hessian=h), h))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-4)).all()) or spec.shares_over_rows
        assert float(after.sum()) < float(before.sum()) * (1 + 1e-4 if spec.shares_over_rows else 1)


@pytest.mark.parametrize("spec", [LEARNED[7], LEARNED[11], FIXED[1]], ids=name)
def test_least_squares_in_chunks(spec: Codebook, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_(spec, quantizer="lnq", outliers=0.02)
    whole = quantize(weight(), spec, hessian=hessian())
    monkeypatch.setattr(descent, "_CHUNK", 5 * K)
    parts = quantize(weight(), spec, hessian=hessian())
    # a sum that is rounded otherwise may decide a tie, and what follows from it
    assert torch.allclose(*(row_errors(weight(), q, hessian()).sum() for q in (whole, parts)), rtol=0.01)


def test_least_squares_of_small_and_unusual_weights() -> None:
    """Odd shapes; rows of equal weights; inputs that never occur; no information at all."""
    for n, k in [(1, 1), (1, 2), (3, 1), (5, 33)]:
        for group_size in {1, min(k, 3), k}:
            specs = [Codebook(bits=3), Codebook(bits=3, granularity="tensor"), Codebook(bits=3, group_size=group_size),
                     Codebook(table="nf4", group_size=group_size)]  # fmt: skip
            for spec in specs:
                w, h = weight(n, k), hessian(k)
                first, q = (quantize(w, with_(spec, **s), hessian=h)
                            for s in (dict(sensitivity=True), dict(quantizer="lnq")))  # fmt: skip
                assert q.codes.shape == (n, k) and bool(torch.isfinite(dequantize(q)).all())
                assert row_errors(w, q, h).sum() <= row_errors(w, first, h).sum() * (1 + 1e-4)
    w, h = weight(), hessian()
    w[0], w[1] = 0, 0.25
    h[:, 40:50] = h[40:50] = 0
    for spec in (*LEARNED[6:9], LEARNED[11], FIXED[0]):
        q = quantize(w, with_(spec, quantizer="lnq"), hessian=h)
        assert bool(torch.isfinite(dequantize(q)).all())
        if spec.granularity != "tensor":
            assert torch.equal(dequantize(q)[:2], w[:2].double())
        specs = [with_(spec, sensitivity=True), with_(spec, quantizer="lnq")]
        plain, same = (quantize(w, s, hessian=torch.zeros(K, K)) for s in specs)
        assert torch.equal(same.codes, plain.codes) and torch.equal(same.codebook, plain.codebook)


def test_least_squares_starts_from_importances_where_they_are_given() -> None:
    """And ends there without a Hessian, as where experts share one table."""
    w, importance = weight(), torch.rand(N, K, generator=torch.Generator().manual_seed(2)) ** 8
    found, expected = (quantize(w, with_(Codebook(bits=3), **s), importance=importance)
                       for s in (dict(quantizer="lnq"), dict(sensitivity=True)))  # fmt: skip
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.codebook, expected.codebook)
    spec = Codebook(bits=3, quantizer="lnq")
    by_importance, by_inputs = (quantize(w, spec, hessian=hessian(), importance=i) for i in (importance, None))
    assert not torch.equal(by_importance.codebook, by_inputs.codebook)


def test_what_least_squares_needs() -> None:
    spec = Codebook(bits=3, quantizer="lnq")
    assert spec.needs == {"hessian": "quantizer='lnq'"} and spec.statistics == {"hessian", "sensitivity"}
    assert with_(spec, sensitivity=True).calibration_need == "quantizer='lnq'"
    assert Codebook(sensitivity=True).calibration_need == "sensitivity=True"
    assert spec.for_embedding() == Codebook(bits=3, quantizer="optimal") and spec.for_embedding(tied=True) == spec


# ---------------------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("how", ["plain", "sensitivity", "lnq"])
@pytest.mark.parametrize("spec", [*LEARNED[18:24], *FIXED], ids=name)
def test_outliers(spec: Codebook, how: str) -> None:
    spec = with_(spec, outliers=0.01, sensitivity=how == "sensitivity", quantizer="lnq" if how == "lnq" else None)
    w = weight()
    count = round(0.01 * N * K)
    generator = torch.Generator().manual_seed(3)
    at = torch.randperm(N * K, generator=generator)[:count]
    spread = w.clone()
    spread.view(-1)[at] = 5 + torch.rand(count, generator=generator)
    h = None if how == "plain" else hessian()
    q = quantize(spread, spec, hessian=h)
    assert q.format() == spec.format(w, "linear")
    assert q.outlier_values is not None and q.outlier_columns is not None and q.outlier_rows is not None
    assert q.outlier_values.dtype == torch.float16
    assert q.outlier_rows.dtype == torch.int32 and q.outlier_rows[0] == 0
    assert q.outlier_rows[-1] == len(q.outlier_values) == len(q.outlier_columns) == count
    for start, end in itertools.pairwise(q.outlier_rows.tolist()):
        found = q.outlier_columns[start:end].tolist()
        assert found == sorted(set(found))
    assert set(outliers(q).flatten().nonzero().flatten().tolist()) == set(at.tolist())
    error = (dequantize(q) - spread).view(-1)
    assert error[at].abs().max() <= 6 * 2.0**-11
    larger = spread.clone()
    larger.view(-1)[at] *= 100
    again = quantize(larger, spec, hessian=h)
    assert torch.equal(again.codebook, q.codebook)  # neither tables nor scales see them
    assert q.scales is None or torch.equal(again.scales, q.scales)


def test_a_row_of_nothing_but_outliers() -> None:
    w = weight()
    w[2] = 50 + torch.arange(K) * 0.5
    for granularity in ("row", "group"):
        spec = Codebook(bits=3, granularity=granularity, group_size=GROUP if granularity == "group" else None,
                        outliers=1 / N)  # fmt: skip
        for quantizer in QUANTIZERS:
            q = quantize(w, with_(spec, quantizer=quantizer))
            assert bool((q.codebook[2] == 0).all())
            assert (dequantize(q)[2] - w[2]).abs().max() <= 150 * 2.0**-11


# ---------------------------------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("spec", [*LEARNED[18:24], FIXED[0]], ids=name)
def test_chunks_and_threads_do_not_change_the_result(
    spec: Codebook, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = hessian()
    specs = [with_(spec, quantizer=quantizer, outliers=0.02, sensitivity=sensitive) for sensitive in (False, True)]
    whole = [quantize(weight(), s, hessian=h) for s in specs]
    monkeypatch.setattr(module, "_CHUNK", 3 * K)
    monkeypatch.setattr(module, "_FIT_CHUNK", 7 * K)
    monkeypatch.setattr(module, "_FEEDBACK_CHUNK", 5 * K)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found = [quantize(weight(), s, hessian=h) for s in specs]
        finally:
            torch.set_num_threads(before)
        for ours, expected in zip(found, whole, strict=True):
            assert torch.equal(ours.codebook, expected.codebook)
            assert ours.scales is None or torch.equal(ours.scales, expected.scales)
        assert torch.equal(found[0].codes, whole[0].codes)
        assert (found[1].codes != whole[1].codes).double().mean() < 0.01  # matrix products round in another order


def test_the_seed_decides() -> None:
    spec = Codebook(bits=4, iterations=1)
    first, second, other = (quantize(weight(), with_(spec, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.codebook, other.codebook)
    state = torch.get_rng_state()
    quantize(weight(), spec)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_do_not_see_each_other() -> None:
    w = weight()
    for spec in (Codebook(bits=3), Codebook(bits=3, group_size=GROUP), Codebook(table="nf4", group_size=GROUP)):
        whole, alone = quantize(w, spec), quantize(w[:5], spec)
        assert torch.equal(dequantize(whole)[:5], dequantize(alone))


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.turns(2)
def test_temporaries_are_small(quantizer: str) -> None:
    """MiB beyond the weight and its codes."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/statm")
    script = f"""
import resource, threading, time, torch
from lowbit.codebook.format import Codebook
from lowbit.codebook.quantize import quantize
from lowbit.codebook.tables import TableFit

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def watch():
    while not done:
        peak.append(max(peak.pop(), resident()))
        time.sleep(0.005)

torch.set_num_threads(1)
spec = Codebook(bits=3, quantizer={quantizer!r}, outliers=0.001)
quantize(torch.randn(64, 2048), spec)
weight = torch.randn(8000, 2048).bfloat16()
before, done = resident(), []
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
quantize(weight, spec)
done.append(True)
thread.join()
print((peak[0] - before - weight.numel()) >> 20)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bits=9), "bits must be an integer between 1 and 8: got bits=9"),
        (dict(seed=1 << 63), "seed must be an integer of 64 bits: got seed=9223372036854775808"),
        (dict(seed=1.5), "seed must be an integer of 64 bits: got seed=1.5"),
        (dict(sensitivity="no"), "sensitivity must be True or False: got sensitivity='no'"),
        (dict(scales=1), "scales must be True or False: got scales=1"),
        (dict(outliers="1%"), "outliers must be a fraction between 0 and 0.1: got outliers=1%"),
        (dict(granularity="group"), "it requires a group_size"),
        (dict(granularity="group", group_size=8, scales=True), "takes no scales"),
        (dict(granularity="row", group_size=8), "group_size goes with granularity='group' or with scales=True"),
        (dict(table="nf5"), "table must be one of 'nf4', 'fp4': got table='nf5'"),
        (dict(table="nf4", granularity="row"), "a fixed table serves the whole tensor: got granularity='row'"),
        (dict(table="nf4", bits=3), "a table of 16 values has 4 bits: got bits=3"),
        (dict(table=5), "table must be a name or a sequence of numbers: got table=5"),
        (dict(table=[1, "a"]), "table must be a name or a sequence of numbers: got table=[1, 'a']"),
        (dict(table=torch.zeros(4, 4)), "table must be a name or a sequence of numbers"),
        (dict(table=[1, 2, 3]), "table must hold 2, 4, 8, ... or 256 finite float32 values: got (1.0, 2.0, 3.0)"),
        (dict(table=[1e39, 0]), "table must hold 2, 4, 8, ... or 256 finite float32 values: got (1e+39, 0.0)"),
    ],
)
def test_arguments_of_a_spec(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Codebook(**arguments)


def test_a_group_as_wide_as_the_row_is_described() -> None:
    assert quantize(weight(4, 32), Codebook(bits=2, group_size=32)).format().describe() == "2-bit codebook group 32"


def test_only_an_embedding_that_is_tied_can_be_sensitive() -> None:
    spec = Codebook(bits=3, sensitivity=True)
    assert spec.for_embedding(tied=True) == spec
    assert spec.for_embedding() == Codebook(bits=3)


SENSITIVE = Codebook(sensitivity=True)


@pytest.mark.parametrize(
    ("given", "spec", "h", "importance", "message"),
    [
        (torch.ones(4), Codebook(), None, None, r"weight must be .* \[N, K\]"),
        (torch.ones(0, 4), Codebook(), None, None, "non-empty"),
        (torch.ones(4, 4, dtype=torch.int32), Codebook(), None, None, "float tensor"),
        (torch.full((4, 4), torch.nan), Codebook(), None, None, "weight must be finite"),
        (torch.full((4, 4), 1e300, dtype=torch.float64), Codebook(), None, None, "finite in float32"),
        (torch.ones(4, 4), Codebook(group_size=8), None, None, "group_size=8"),
        (torch.ones(4, 4), SENSITIVE, None, None, "calibration"),
        (torch.ones(4, 4), Codebook(quantizer="lnq"), None, None, "quantizer='lnq' requires calibration .*'optimal'"),
        (torch.ones(4, 4), SENSITIVE, torch.eye(3), None, r"hessian must be \[K, K\]"),
        (torch.ones(4, 4), SENSITIVE, torch.full((4, 4), torch.nan), None, "hessian must be finite"),
        (torch.ones(4, 4), SENSITIVE, torch.eye(4) - 5 * torch.ones(4, 4), None, "semidefinite"),
        (torch.ones(4, 4), SENSITIVE, None, torch.ones(4, 3), "importance must have the shape"),
        (torch.ones(4, 4), SENSITIVE, None, -torch.ones(4, 4), "not negative"),
        (torch.ones(4, 4), SENSITIVE, None, torch.full((4, 4), torch.inf), "importance must be finite"),
    ],
)
def test_errors(given: Tensor, spec: Codebook, h: Tensor | None, importance: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(given, spec, hessian=h, importance=importance)


def test_tables_are_those_of_the_papers() -> None:
    """NF4 is 16 quantiles of a normal distribution; FP4 is +-{0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}."""
    assert sorted(NF4) == list(NF4) and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1
    assert sorted({abs(v) for v in FP4}) == pytest.approx([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1], abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kmeans_finds_the_values_of_a_weight_that_was_trained_by_kmeans(bits: int) -> None:
    """The recipe of docs/trained_quantized.md, some values rare."""
    shares = torch.rand(2**bits) ** 3 + 1e-3
    codes = torch.multinomial(shares, 64 * 96, replacement=True).view(64, 96)
    weight = torch.randn(2**bits)[codes]
    found = Codebook(bits=bits, granularity="tensor").quantize(weight)
    assert torch.equal(found.codebook.flatten()[found.codes.long()], weight)
    weight = torch.randn(64, 2**bits).gather(1, codes)
    found = Codebook(bits=bits, codebook_dtype=torch.float32).quantize(weight)
    assert torch.equal(found.codebook[:, 0].gather(1, found.codes.long()), weight)


def test_the_default_quantizer() -> None:
    """Exact, but where k-means is asked for by its arguments, or one table serves the tensor (docs/quality.md)."""
    assert Codebook().quantizer == Codebook(bits=2, group_size=16).quantizer == "optimal"
    assert Codebook(granularity="tensor").quantizer == Codebook(scales=True).quantizer == "kmeans"
    assert Codebook(iterations=20).quantizer == Codebook(seed=1).quantizer == "kmeans"
    assert Codebook(iterations=20, quantizer="optimal").quantizer == "optimal"
