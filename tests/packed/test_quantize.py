"""The quantizers of family packed against float64 oracles written from their formulas."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lowbit.packed.grid as module
from lowbit.core.outliers import column_indices
from lowbit.packed import descent
from lowbit.packed.format import Packed, PackedWeight
from lowbit.packed.module import PackedLinear
from lowbit.packed.quantize import quantize

N, K, GROUP = 24, 172, 32  # the last group is shorter
SPECS = [
    Packed(bits=bits, granularity=granularity, group_size=GROUP if granularity == "group" else None,
           symmetric=symmetric, zeros=zeros, quantizer="minmax")
    for bits, granularity, (symmetric, zeros) in itertools.product(
        (2, 3, 4, 5, 8), ("group", "row", "tensor"), ((True, "int"), (False, "int"), (False, "float"))
    )
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def with_(spec: Packed, **changes: object) -> Packed:
    return replace(spec, **changes)  # type: ignore[arg-type]


def name(spec: Packed) -> str:
    zeros = "symmetric" if spec.symmetric else f"{spec.zeros}-zeros"
    return f"{spec.bits}-{spec.granularity}-{zeros}-{spec.quantizer}"


def columns(values: Tensor, spec: Packed, k: int = K) -> Tensor:
    """Per-group values as float64, broadcastable to [N, K]."""
    return values.double().repeat_interleave(spec.resolve_group_size(k), dim=1)[:, :k]


def grid(q: PackedWeight, spec: Packed, k: int = K) -> tuple[Tensor, Tensor]:
    zeros = torch.full_like(q.scales, 2 ** (spec.bits - 1)) if q.zeros is None else q.zeros
    return columns(q.scales, spec, k), columns(zeros, spec, k)


def outliers(q: PackedWeight) -> Tensor:
    dense = torch.zeros(q.codes.shape, dtype=torch.float64)
    if q.outlier_values is not None:
        assert q.outlier_rows is not None
        assert q.outlier_columns is not None
        rows = torch.repeat_interleave(torch.arange(len(q.codes)), q.outlier_rows.diff())
        dense[rows, q.outlier_columns.long()] = q.outlier_values.double()
    return dense


def dequantize(q: PackedWeight, spec: Packed) -> Tensor:
    scales, zeros = grid(q, spec, q.codes.shape[1])
    return (q.codes.double() - zeros) * scales + outliers(q)


def assert_nearest(weight: Tensor, q: PackedWeight, spec: Packed) -> None:
    """No other code of the stored grid is nearer (up to a tie)."""
    scales, zeros = grid(q, spec, weight.shape[1])
    low = 1 if spec.symmetric else 0
    best = ((weight.double() / scales) + zeros).round().clamp(low, 2**spec.bits - 1)
    error = ((q.codes.double() - zeros) * scales - weight.double()).abs()
    least = ((best - zeros) * scales - weight.double()).abs()
    slack = 1e-6 * (scales * 2**spec.bits + weight.double().abs())
    assert bool((error <= least + slack).all())


def weight(n: int = N, k: int = K, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) * 0.05 + 0.01).to(dtype)


def hessian(k: int = K, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return x.t() @ x / len(x)


@pytest.mark.parametrize("quantizer", ["minmax", "mse"])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_codes_are_nearest_on_the_stored_grid(spec: Packed, quantizer: str) -> None:
    spec = with_(spec, quantizer=quantizer)
    w = weight()
    q = quantize(w, spec)
    groups = -(-K // GROUP)
    shape = {"group": (N, groups), "row": (N, 1), "tensor": (1, 1)}[str(spec.granularity)]
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (N, K)
    assert q.scales.shape == shape
    assert q.scales.dtype == (torch.float16 if spec.granularity == "group" else torch.float32)
    if spec.symmetric:
        assert q.zeros is None
        assert int(q.codes.min()) >= 1
    else:
        assert q.zeros is not None
        assert q.zeros.shape == shape
        assert q.zeros.dtype == (torch.uint8 if spec.zeros == "int" else q.scales.dtype)
    assert int(q.codes.max()) <= 2**spec.bits - 1
    assert q.outlier_values is q.outlier_columns is q.outlier_rows is None
    assert_nearest(w, q, spec)
    if quantizer == "minmax":  # nothing is clipped, so half a step bounds the error (a float16 scale: a bit more)
        scales, _ = grid(q, spec)
        allowed = 0.5 + 2**spec.bits * 2.0**-11 + 1e-5
        if not spec.symmetric and spec.zeros == "int":
            allowed += 0.5  # the rounded zero moves the span by up to half a step
        assert bool(((dequantize(q, spec) - w).abs() <= allowed * scales).all())


@pytest.mark.parametrize("quantizer", ["minmax", "mse"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.zeros == "int"], ids=name)
def test_a_weight_on_a_grid_is_recovered_exactly(spec: Packed, scale_dtype: torch.dtype, quantizer: str) -> None:
    spec = with_(spec, scale_dtype=scale_dtype, quantizer=quantizer)
    generator = torch.Generator().manual_seed(spec.bits)
    top, middle = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    groups = -(-K // GROUP)
    shape = {"group": (N, groups), "row": (N, 1), "tensor": (1, 1)}[str(spec.granularity)]
    scales = (torch.rand(shape, generator=generator) * 0.1 + 1e-3).to(scale_dtype)
    low = 1 if spec.symmetric else 0
    codes = torch.randint(low, top + 1, (N, K), generator=generator)
    codes[:, ::GROUP], codes[:, 1::GROUP] = low, top
    zeros = torch.full(shape, middle)
    if not spec.symmetric:
        zeros = torch.randint(0, top + 1, shape, generator=generator)
    w = (codes.float() - columns(zeros, spec).float()) * columns(scales, spec).float()
    q = quantize(w, spec)
    assert torch.equal(q.codes, codes.to(torch.uint8))
    stored = columns(q.scales, spec).float()
    stored_zeros = columns(zeros if q.zeros is None else q.zeros, spec).float()
    assert torch.equal((q.codes.float() - stored_zeros) * stored, w)
    if scale_dtype != torch.float32:
        assert torch.equal(q.scales, scales)


def test_float_zeros_on_a_grid_are_recovered_exactly() -> None:
    spec = Packed(bits=4, group_size=GROUP, zeros="float")
    scales = (torch.rand(N, 6) * 0.1 + 1e-3).half()
    zeros = (torch.rand(N, 6) * 15).half()
    codes = torch.randint(0, 16, (N, K))
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 15
    w = ((codes - columns(zeros, spec)) * columns(scales, spec)).float()
    q = quantize(w, spec)
    assert torch.equal(q.codes, codes.to(torch.uint8))
    assert torch.equal(q.scales, scales)
    assert q.zeros is not None
    assert torch.equal(q.zeros, zeros)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_strides(dtype: torch.dtype) -> None:
    spec = Packed(bits=4, group_size=GROUP)
    w = weight(dtype=dtype)
    expected = quantize(w.float(), spec)
    for given in (w, w.t().contiguous().t(), torch.stack([w, w], dim=-1)[..., 0]):
        assert torch.equal(quantize(given, spec).codes, expected.codes)


@pytest.mark.parametrize("quantizer", ["minmax", "mse"])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits in (2, 4)], ids=name)
def test_degenerate_groups(spec: Packed, quantizer: str) -> None:
    spec = with_(spec, quantizer=quantizer)
    w = weight()
    w[0], w[1], w[2] = 0, 0.3, -0.3
    w[3] = 100 + torch.arange(K) * 1e-3  # a narrow range far from 0
    w[4, 5:] = 0
    q = quantize(w, spec)
    values = dequantize(q, spec)
    assert bool(torch.isfinite(values).all())
    assert bool((q.scales > 0).all())
    if spec.granularity != "tensor":
        assert bool((values[0] == 0).all())
        constant = (values[1:3] - w[1:3].double()).abs().max()
        assert constant <= 0.3 * 2**-9
        step = 100 * 2.0**-9 if spec.symmetric or spec.zeros == "float" else 101 * 2.0**-9
        assert (values[3] - w[3].double()).abs().max() <= step + 0.18
    assert_nearest(w, q, spec)


def test_single_elements() -> None:
    w = weight()
    for spec in (Packed(bits=4, group_size=1), Packed(bits=4, group_size=1, symmetric=True)):
        assert torch.allclose(dequantize(quantize(w, spec), spec), w.double(), rtol=2**-10, atol=0)
    for k in (1, 2, 33):
        spec = Packed(bits=3, group_size=min(k, 32))
        assert quantize(weight(1, k), spec).codes.shape == (1, k)


@pytest.mark.parametrize("quantizer", ["minmax", "mse"])
@pytest.mark.parametrize("magnitude", [1e-35, 1e-20, 1e-6, 1e5, 1e20, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_magnitudes_fall_back_to_float32_scales(magnitude: float, symmetric: bool, quantizer: str) -> None:
    w = weight()
    w = w / w.abs().max() * magnitude
    w[0, 0], w[0, 1] = magnitude, -magnitude
    spec = Packed(bits=8, group_size=GROUP, symmetric=symmetric, quantizer=quantizer)
    q = quantize(w, spec)
    expected = torch.float16 if magnitude == 1e5 else torch.float32
    assert q.scales.dtype == expected
    error = (dequantize(q, spec) - w).abs().max() / magnitude
    assert error <= 2 / 255
    if quantizer == "minmax":
        assert_nearest(w, q, spec)


def squared_error(w: Tensor, scale: Tensor, zero: Tensor, spec: Packed, h: Tensor | None = None) -> Tensor:
    code = (w / scale + zero).round().clamp(1 if spec.symmetric else 0, 2**spec.bits - 1)
    error = ((code - zero) * scale - w) ** 2
    return (error if h is None else error * h).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_close_to_a_brute_force_search(bits: int, symmetric: bool, weighted: bool) -> None:
    n, k = 64, 64
    w = weight(n, k)
    generator = torch.Generator().manual_seed(5)
    h = torch.diag(torch.rand(k, generator=generator) * 5 + 0.1) if weighted else None
    spec = Packed(bits=bits, group_size=k, symmetric=symmetric, quantizer="mse")
    q = quantize(w, spec, hessian=h)
    importance = None if h is None else h.diagonal().double()
    scales, zeros = grid(q, spec, k)
    found = squared_error(w.double(), scales, zeros, spec, importance)
    best = torch.full((n,), torch.inf, dtype=torch.float64)
    extent = w.double().abs().amax(1, keepdim=True)
    for ratio in torch.linspace(0.05, 2.0, 400):
        scale = extent * ratio / (2 ** (bits - 1))
        for zero in [2 ** (bits - 1)] if symmetric else range(2**bits):
            best = torch.minimum(best, squared_error(w.double(), scale, torch.tensor(float(zero)), spec, importance))
    assert float(found.mean() / best.mean()) < (1.01 if symmetric else 1.03)
    plain = quantize(w, with_(spec, quantizer="minmax"))
    naive = squared_error(w.double(), *grid(plain, spec, k), spec, importance)
    assert bool((found <= naive * (1 + 1e-3 + 0.02 * weighted)).all())


@pytest.mark.parametrize("granularity", ["group", "row", "tensor"])
def test_mean_is_the_formula(granularity: str) -> None:
    spec = Packed(bits=3, granularity=granularity, group_size=GROUP if granularity == "group" else None,
                  symmetric=True, quantizer="mean", gamma=1.7, scale_dtype=torch.float32)  # fmt: skip
    w = weight()
    q = quantize(w, spec)
    parts = w.double().abs().split(GROUP if granularity == "group" else K, dim=1)
    mean = torch.stack([p.mean(1) for p in parts], dim=1)
    if granularity == "tensor":
        mean = w.double().abs().mean().reshape(1, 1)
    alpha = columns(1.7 * mean, spec)
    expected = alpha * (w.double().clamp(-alpha, alpha) / alpha * 3).round() / 3
    assert torch.allclose(dequantize(q, spec), expected, rtol=1e-6, atol=0)


def gptq_oracle(w: Tensor, h: Tensor, q: PackedWeight, spec: Packed) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 as published (inverse Hessian, block of one), on the grids of ``q``."""
    w, h = w.double().clone(), h.double()
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scales, zeros = grid(q, spec, w.shape[1])
    scales, zeros = scales.expand_as(w), zeros.expand_as(w)
    codes = torch.empty_like(w)
    for i, column in enumerate(order.tolist()):
        scale, zero = scales[:, column], zeros[:, column]
        code = (w[:, column] / scale + zero).round().clamp(1 if spec.symmetric else 0, 2**spec.bits - 1)
        codes[:, column] = code
        error = (w[:, column] - (code - zero) * scale) / inverse[i, i]
        w[:, order[i:]] -= error[:, None] * inverse[i, i:]
    return codes


def proxy_loss(error: Tensor, h: Tensor) -> float:
    return float((error @ h.double() * error).sum())


@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits in (2, 4)], ids=name)
def test_gptq_is_the_published_algorithm(spec: Packed) -> None:
    spec = with_(spec, quantizer="gptq")
    w, h = weight(), hessian()
    q = quantize(w, spec, hessian=h)
    oracle = gptq_oracle(w, h, q, spec)
    agree = (q.codes == oracle).double().mean()
    assert agree > 0.99  # a tie decided the other way changes the codes that follow
    nearest = quantize(w, with_(spec, quantizer="mse"), hessian=h)
    loss = proxy_loss(dequantize(q, spec) - w, h)
    assert loss < 0.7 * proxy_loss(dequantize(nearest, spec) - w, h)
    scales, zeros = grid(q, spec)
    assert loss == pytest.approx(proxy_loss((oracle - zeros) * scales - w, h), rel=0.01)


@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_descent_improves_on_gptq(spec: Packed, outliers: float) -> None:
    """In the whole and in every row; codes and grids are valid, and one code or one grid changed makes it worse."""
    w, h = weight(), hessian()
    first = quantize(w, with_(spec, quantizer="gptq", outliers=outliers), hessian=h)
    q = quantize(w, with_(spec, quantizer="descent", outliers=outliers), hessian=h)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(K)).double()

    def errors(q: PackedWeight) -> Tensor:
        e = dequantize(q, spec) - w
        if outliers:  # what is kept apart is rounded to float16
            e = e.masked_fill(kept_apart(q) != 0, 0)
        return (e @ damped * e).sum(1)

    def kept_apart(q: PackedWeight) -> Tensor:
        dense = torch.zeros(q.codes.shape)
        rows = torch.arange(N).repeat_interleave(q.outlier_rows.diff().long())
        dense[rows, q.outlier_columns.long()] = 1
        return dense

    before, after = errors(first), errors(q)
    assert bool((after <= before * (1 + 1e-4)).all())
    limit = {2: 0.95, 3: 0.97, 4: 0.99, 8: 1.0}.get(spec.bits, 1.0)
    assert float(after.sum()) < limit * float(before.sum()) or spec.granularity == "tensor"
    low = 1 if spec.symmetric else 0
    assert int(q.codes.min()) >= low and int(q.codes.max()) < 2**spec.bits
    assert q.scales.dtype == first.scales.dtype and bool((q.scales > 0).all())
    if spec.granularity == "tensor":
        assert torch.equal(q.scales, first.scales)


@pytest.mark.parametrize("zeros", ["int", "float", "none"])
def test_descent_ends_where_no_code_is_better(zeros: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many sweeps, no other code of one weight, and no other scale of one group, has less error."""
    monkeypatch.setattr(descent, "_SWEEPS", 60)
    symmetric = zeros == "none"
    spec = Packed(bits=3, group_size=16, symmetric=symmetric, zeros=None if symmetric else zeros, quantizer="descent",
                  scale_dtype=torch.float32)  # fmt: skip
    w, h = weight(8, 48), hessian(48)
    q = quantize(w, spec, hessian=h)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(48)).double()
    scales, zero = grid(q, spec, 48)
    scales, zero = scales.expand(8, 48), zero.expand(8, 48)

    def errors(codes: Tensor, scales: Tensor) -> Tensor:
        e = (codes - zero) * scales - w.double()
        return (e @ damped * e).sum(1)

    codes = q.codes.double()
    least = errors(codes, scales)
    for k in range(48):
        for step in (-1, 1):
            other = codes.clone()
            other[:, k] = (other[:, k] + step).clamp(1 if symmetric else 0, 7)
            assert bool((errors(other, scales) >= least * (1 - 1e-5)).all())
    for g in range(3):
        for factor in (0.999, 1.001):
            other = scales.clone()
            other[:, 16 * g : 16 * (g + 1)] *= factor
            assert bool((errors(codes, other) >= least * (1 - 1e-5)).all())


def test_gptq_without_information_is_mse() -> None:
    w = weight()
    spec = Packed(bits=4, group_size=GROUP, quantizer="gptq")
    expected = quantize(w, with_(spec, quantizer="mse"))
    for h in (torch.zeros(K, K), torch.eye(K)):
        assert torch.equal(quantize(w, spec, hessian=h).codes, expected.codes)
    descended = quantize(w, with_(spec, quantizer="descent"), hessian=torch.zeros(K, K))
    assert torch.equal(descended.codes, expected.codes) and torch.equal(descended.scales, expected.scales)


def test_gptq_with_dead_and_dependent_columns() -> None:
    x = torch.randn(20, K)  # rank 20 < K
    x[:, 7:50] = 0
    x[:, 60] = x[:, 61]
    w = weight()
    spec = Packed(bits=4, group_size=GROUP, quantizer="gptq")
    q = quantize(w, spec, hessian=x.t() @ x)
    error = dequantize(q, spec) - w
    scales, zeros = grid(q, spec)
    nearest_codes = (w.double() / scales + zeros).round().clamp(0, 15)
    assert torch.equal(q.codes[:, 7:50].double(), nearest_codes[:, 7:50])  # a dead column is left to itself
    nearest = dequantize(quantize(w, with_(spec, quantizer="mse")), spec) - w
    assert (x.double() @ error.t()).norm() < 0.3 * (x.double() @ nearest.t()).norm()


@pytest.mark.parametrize("quantizer", ["minmax", "mse", "mean", "gptq", "descent"])
@pytest.mark.parametrize("granularity", ["group", "row", "tensor"])
def test_outliers(granularity: str, quantizer: str) -> None:
    spec = Packed(bits=4, granularity=granularity, group_size=GROUP if granularity == "group" else None,
                  symmetric=quantizer == "mean", quantizer=quantizer, outliers=0.01)  # fmt: skip
    w = weight()
    count = round(0.01 * N * K)
    generator = torch.Generator().manual_seed(3)
    at = torch.randperm(N * K, generator=generator)[:count]
    spread = w.clone()
    spread.view(-1)[at] = 5 + torch.rand(count, generator=generator)
    h = hessian() if quantizer in ("gptq", "descent") else None
    q = quantize(spread, spec, hessian=h)
    assert q.outlier_values is not None
    assert q.outlier_columns is not None
    assert q.outlier_rows is not None
    assert q.outlier_values.dtype == torch.float16
    assert q.outlier_rows.dtype == torch.int32
    assert q.outlier_rows[0] == 0
    assert q.outlier_rows[-1] == len(q.outlier_values) == len(q.outlier_columns) == count
    for start, end in itertools.pairwise(q.outlier_rows.tolist()):
        found = q.outlier_columns[start:end].tolist()
        assert found == sorted(set(found))
    assert set(outliers(q).flatten().nonzero().flatten().tolist()) == set(at.tolist())
    error = (dequantize(q, spec) - spread).view(-1)
    assert error[at].abs().max() <= 6 * 2.0**-11
    larger = spread.clone()
    larger.view(-1)[at] *= 100
    assert torch.equal(quantize(larger, spec, hessian=h).scales, q.scales)  # grids do not see them


def test_outliers_count_ties_and_overflow() -> None:
    w = torch.ones(10, 10)
    q = quantize(w, Packed(bits=4, outliers=0.07))
    assert q.outlier_values is not None
    assert len(q.outlier_values) == 7
    assert quantize(w, Packed(bits=4, outliers=0.001)).outlier_values is None
    w[3, 3] = 1e6
    q = quantize(w, Packed(bits=4, granularity="row", zeros="int", quantizer="minmax", outliers=0.01))
    assert q.outlier_values is not None
    assert q.outlier_values.dtype == torch.float32
    assert float(outliers(q)[3, 3]) == pytest.approx(1e6, rel=1e-6)


@pytest.mark.parametrize(("k", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_the_dtype_of_outlier_columns_holds_the_last_column(k: int, dtype: torch.dtype) -> None:
    w = weight(2, k)
    w[:, -1] = 100.0
    layer = PackedLinear.from_float(w, Packed(bits=4, outliers=1 / k))
    assert layer.outlier_columns is not None
    columns = layer.canonical()["outlier_columns"]
    assert columns.dtype == layer.format.tensors()["outlier_columns"][1] == dtype
    assert columns.tolist() == column_indices(layer.outlier_columns).tolist() == [k - 1, k - 1]
    assert layer.dequantize()[:, -1].tolist() == pytest.approx([100.0, 100.0], rel=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_outliers_do_not_worsen_gptq(bits: int) -> None:
    w, h = weight(), hessian()
    spec = Packed(bits=bits, group_size=GROUP, quantizer="gptq")
    plain = proxy_loss(dequantize(quantize(w, spec, hessian=h), spec) - w, h)
    with_outliers = with_(spec, outliers=0.02)
    assert proxy_loss(dequantize(quantize(w, with_outliers, hessian=h), spec) - w, h) <= plain


@pytest.mark.parametrize("spec", SPECS[::4], ids=name)
def test_chunks_do_not_change_the_result(spec: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [with_(spec, quantizer=q, outliers=0.02) for q in ("minmax", "mse", "gptq", "descent")]
    h = hessian()
    whole = [quantize(weight(), s, hessian=h) for s in specs]
    monkeypatch.setattr(module, "_CHUNK", 3 * K)
    monkeypatch.setattr(module, "_FEEDBACK_CHUNK", 5 * K)
    monkeypatch.setattr(descent, "_CHUNK", 5 * K)
    for s, expected in zip(specs, whole, strict=True):
        found = quantize(weight(), s, hessian=h)
        if s.quantizer == "descent":  # a sum that is rounded otherwise may decide a tie, and what follows from it
            losses = [proxy_loss(dequantize(q, s) - weight(), h) for q in (found, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=0.01)
            continue
        if spec.granularity == "tensor" and s.quantizer != "minmax":  # sums are rounded in another order
            assert torch.allclose(found.scales, expected.scales, rtol=1e-5)
        else:
            assert torch.equal(found.scales, expected.scales)
        if s.quantizer != "gptq" and torch.equal(found.scales, expected.scales):
            assert torch.equal(found.codes, expected.codes)
        assert (found.codes != expected.codes).double().mean() < 0.01


def test_deterministic() -> None:
    spec = Packed(bits=4, group_size=GROUP, quantizer="gptq", outliers=0.01)
    first, second = (quantize(weight(), spec, hessian=hessian()) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "rows"), [("minmax", 32000), ("gptq", 8000), ("descent", 2500)])
@pytest.mark.turns(2)
def test_temporaries_are_small(quantizer: str, rows: int) -> None:
    """MiB beyond the weight and its codes."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/statm")
    script = f"""
import resource, threading, time, torch
from lowbit.packed.format import Packed, PackedWeight
from lowbit.packed.quantize import quantize

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def watch():
    while not done:
        peak.append(max(peak.pop(), resident()))
        time.sleep(0.005)

torch.set_num_threads(1)
hessian = torch.eye(2048)
spec = Packed(bits=4, group_size=64, quantizer={quantizer!r}, outliers=0.001)
quantize(torch.randn(64, 2048), spec, hessian=hessian)
weight = torch.randn({rows}, 2048).bfloat16()
before, done = resident(), []
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
quantize(weight, spec, hessian=hessian)
done.append(True)
thread.join()
print((peak[0] - before - weight.numel()) >> 20)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 300


@pytest.mark.parametrize(
    ("given", "spec", "h", "message"),
    [
        (torch.ones(4), Packed(), None, r"weight must be .* \[N, K\]"),
        (torch.ones(0, 4), Packed(), None, "non-empty"),
        (torch.ones(4, 4, dtype=torch.int32), Packed(), None, "float tensor"),
        (torch.full((4, 4), torch.nan), Packed(), None, "finite"),
        (torch.full((4, 4), 1e300, dtype=torch.float64), Packed(), None, "finite in float32"),
        (torch.ones(4, 4), Packed(group_size=8), None, "group_size=8"),
        (torch.ones(4, 4), Packed(quantizer="gptq"), None, "calibration"),
        (torch.ones(4, 4), Packed(quantizer="gptq"), torch.eye(3), r"\[K, K\]"),
        (torch.ones(4, 4), Packed(quantizer="descent"), None, "calibration"),
        (torch.ones(4, 4), Packed(quantizer="gptq"), torch.full((4, 4), torch.nan), "hessian must be finite"),
        (torch.ones(4, 4), Packed(quantizer="gptq"), torch.eye(4) - 5 * torch.ones(4, 4), "semidefinite"),
    ],
)
def test_errors(given: Tensor, spec: Packed, h: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(given, spec, hessian=h)
