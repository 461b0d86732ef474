"""The nearest Kronecker products against the singular values of the rearranged weight, in float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit.kron.quantize as module
from lowbit.core.family import Spec
from lowbit.kron.format import Kronecker, KroneckerFormat, KroneckerWeight
from lowbit.kron.quantize import decompose, factor_shapes, nearest_kronecker, predicted_format
from lowbit.packed.format import Packed, PackedFormat, PackedWeight
from lowbit.packed.quantize import quantize

# ((N, K), (N1, K1)): thin and square rearrangements, primes, vectors, single elements
CASES = [
    ((1, 1), (1, 1)), ((7, 11), (1, 1)), ((7, 11), (7, 11)), ((7, 11), (7, 1)), ((7, 11), (1, 11)), ((1, 30), (1, 5)),
    ((30, 1), (6, 1)), ((12, 10), (2, 1)), ((12, 10), (6, 10)), ((12, 10), (1, 2)), ((12, 10), (12, 5)),
    ((24, 36), (4, 6)), ((24, 35), (8, 5)), ((36, 36), (6, 6)), ((13, 34), (13, 17)), ((2, 97), (2, 1)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rearranged(w: Tensor, shape_a: tuple[int, int]) -> Tensor:
    """M[n1*K1 + k1, n2*K2 + k2] = W[n1*N2 + n2, k1*K2 + k2]: every block of W as a row."""
    n2, k2 = w.shape[0] // shape_a[0], w.shape[1] // shape_a[1]
    blocks = [
        w[n1 * n2 : (n1 + 1) * n2, k1 * k2 : (k1 + 1) * k2].flatten()
        for n1 in range(shape_a[0])
        for k1 in range(shape_a[1])
    ]
    return torch.stack(blocks).double()


def product(a: Tensor, b: Tensor) -> Tensor:
    return sum((torch.kron(x, y) for x, y in zip(a.double(), b.double(), strict=True)), torch.zeros(()).double())


def dense(factor: Tensor | PackedWeight, rank: int) -> Tensor:
    """[R, N, K] of a factor, by the definition of the format."""
    if isinstance(factor, Tensor):
        return factor
    k = factor.codes.shape[1]
    group = torch.arange(k) // (factor.group_size or k)
    zeros = torch.full_like(factor.scales, 2 ** (factor.bits - 1)) if factor.zeros is None else factor.zeros
    zeros, scales = (t.float().expand(len(factor.codes), -1)[:, group] for t in (zeros, factor.scales))
    return ((factor.codes.float() - zeros) * scales).view(rank, -1, k)


def weight_of(stored: KroneckerWeight) -> Tensor:
    rank = stored.format().rank
    return product(dense(stored.a, rank), dense(stored.b, rank))


def relative(found: Tensor, w: Tensor) -> float:
    return float((found - w.double()).norm() / w.double().norm())


def kronecker_sum(rank: int, n1: int, k1: int, n2: int, k2: int) -> Tensor:
    return product(torch.randn(rank, n1, k1), torch.randn(rank, n2, k2))


def weight_with_spectrum(n: int, k: int, shape: tuple[int, int], fall: float) -> Tensor:
    """Singular values of the rearranged weight 1, fall, fall**2, ..."""
    n1, k1 = shape
    n2, k2 = n // n1, k // k1
    m = min(n1 * k1, n2 * k2)
    left, right = (torch.linalg.qr(torch.randn(size, m, dtype=torch.float64)).Q for size in (n1 * k1, n2 * k2))
    matrix = left * fall ** torch.arange(m) @ right.t()
    return matrix.view(n1, k1, n2, k2).permute(0, 2, 1, 3).reshape(n, k)


# ----------------------------------------------------------------------------------------------- nearest_kronecker


@pytest.mark.parametrize("svd", ["exact", "randomized", "auto"])
@pytest.mark.parametrize(("shape", "shape_a"), CASES)
def test_the_squared_error_is_that_of_the_singular_values_left_out(
    shape: tuple[int, int], shape_a: tuple[int, int], svd: Any
) -> None:
    w = torch.randn(shape, dtype=torch.float64)
    sigma = torch.linalg.svdvals(rearranged(w, shape_a))
    for rank in {1, min(2, len(sigma)), min(5, len(sigma)), len(sigma)}:
        a, b = nearest_kronecker(w, shape_a, rank, svd=svd)
        assert a.shape == (rank, *shape_a)
        assert b.shape == (rank, shape[0] // shape_a[0], shape[1] // shape_a[1])
        assert a.dtype == b.dtype == torch.float64
        assert a.is_contiguous() and b.is_contiguous()
        error = (product(a, b) - w).square().sum()
        assert float(error) == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("shape", "shape_a"), CASES)
def test_terms_are_orthogonal_sorted_balanced_and_of_fixed_sign(
    shape: tuple[int, int], shape_a: tuple[int, int]
) -> None:
    w = torch.randn(shape, dtype=torch.float64)
    sigma = torch.linalg.svdvals(rearranged(w, shape_a))
    a, b = (t.flatten(1) for t in nearest_kronecker(w, shape_a, min(3, len(sigma))))
    sigma = sigma[: len(a)]
    for factor in (a, b):
        assert torch.allclose(factor @ factor.t(), sigma.diag(), rtol=1e-7, atol=1e-7 * float(sigma[0]))
    small = a if a.shape[1] < b.shape[1] else b
    assert bool((small.gather(1, small.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.allclose(nearest_kronecker(-w, shape_a, len(a))[0].abs().flatten(1), a.abs())


def test_no_nearby_factors_are_better() -> None:
    w = torch.randn(24, 35, dtype=torch.float64)
    a, b = nearest_kronecker(w, (4, 7), 2)
    least = float((product(a, b) - w).square().sum())
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(30):
            moved = product(a + size * torch.randn_like(a), b + size * torch.randn_like(b))
            assert float((moved - w).square().sum()) > least


@pytest.mark.parametrize("svd", ["exact", "randomized", "auto"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(8, 12, 10, 6), (2, 2, 40, 30), (40, 30, 2, 2), (64, 1, 1, 50), (32, 32, 16, 16)])
def test_a_sum_of_kronecker_products_is_recovered(sizes: tuple[int, int, int, int], rank: int, svd: Any) -> None:
    w = kronecker_sum(rank, *sizes)
    for dtype, bound in ((torch.float32, 2e-7), (torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        a, b = nearest_kronecker(w.to(dtype), sizes[:2], rank, svd=svd)
        assert relative(product(a, b), w) < bound


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_terms_of_very_different_size_are_recovered(svd: Any) -> None:
    w = sum((size * kronecker_sum(1, 16, 16, 8, 16) for size in (1.0, 1e-3, 1e-6)), torch.zeros(()))
    a, b = nearest_kronecker(w, (16, 16), 3, svd=svd)
    assert relative(product(a, b), w) < 1e-8  # the smallest term is 1e-6 of the weight
    a, b = nearest_kronecker(w * 1e-30, (16, 16), 3, svd=svd)
    assert relative(product(a, b), w * 1e-30) < 1e-8


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(("fall", "excess"), [(0.7, 1e-12), (0.97, 1e-12), (0.995, 1e-5)])
def test_randomized_agrees_with_exact(fall: float, excess: float, rank: int) -> None:
    """The flatter the spectrum, the harder: 0.995 leaves a ratio of 0.95 over the ten vectors beyond the rank."""
    shape = (16, 20)
    w = weight_with_spectrum(384, 320, shape, fall)
    exact, randomized = (product(*nearest_kronecker(w, shape, rank, svd=svd)) for svd in ("exact", "randomized"))
    assert not torch.equal(exact, randomized)
    best, found = (float((t - w).square().sum()) for t in (exact, randomized))
    assert best * (1 - 1e-12) <= found <= best * (1 + excess)
    if fall < 0.99:
        assert relative(randomized, exact) < 1e-9


@pytest.mark.parametrize(("shape", "kind"), [((8, 16), "exact"), ((16, 32), "exact"), ((32, 32), "randomized")])
def test_auto_decides_by_the_size(shape: tuple[int, int], kind: str) -> None:
    w = torch.randn(1024, 2048)
    found = {svd: nearest_kronecker(w, shape, svd=svd)[0] for svd in ("exact", "randomized", "auto")}  # type: ignore[arg-type]
    assert torch.equal(found["auto"], found[kind])
    assert not torch.equal(found["exact"], found["randomized"])


def test_deterministic() -> None:
    w = torch.randn(256, 256)
    for svd in ("exact", "randomized"):
        first, second, other = (nearest_kronecker(w, (16, 16), 2, svd=svd, seed=s) for s in (3, 3, 4))  # type: ignore[arg-type]
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert torch.equal(first[0], other[0]) == (svd == "exact")
    state = torch.get_rng_state()
    nearest_kronecker(w, (16, 16), 2, svd="randomized")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_strides(dtype: torch.dtype) -> None:
    w = torch.randn(24, 36).to(dtype)
    expected = nearest_kronecker(w.double(), (6, 4), 2)
    for given in (w, w.t().contiguous().t(), torch.stack([w, w], dim=-1)[..., 0], torch.nn.Parameter(w)):
        found = nearest_kronecker(given, (6, 4), 2)
        for part, exact in zip(found, expected, strict=True):
            assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert not part.requires_grad
            assert torch.allclose(part.double(), exact, rtol=1e-6, atol=1e-6)
    assert nearest_kronecker(w[:1].expand(24, 36), (6, 4))[0].shape == (1, 6, 4)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(30, 56)
    whole = {shape: nearest_kronecker(w, shape, 2) for shape in ((6, 7), (30, 7), (2, 1), (1, 56), (10, 56))}
    for size in (1, 100, 1000):
        monkeypatch.setattr(module, "_CHUNK", size)
        for shape, expected in whole.items():
            for part, exact in zip(nearest_kronecker(w, shape, 2), expected, strict=True):
                assert torch.allclose(part, exact, atol=1e-5)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_terms_that_the_weight_does_not_have_are_zero(svd: Any) -> None:
    for part in nearest_kronecker(torch.zeros(32, 48), (4, 6), 3, svd=svd):
        assert bool((part == 0).all())
    w = kronecker_sum(1, 6, 8, 8, 8)
    a, b = nearest_kronecker(w, (6, 8), 40, svd=svd)
    assert relative(product(a[:1], b[:1]), w) < 1e-7
    assert float(product(a[1:], b[1:]).norm()) < 1e-7 * float(w.norm())


@pytest.mark.parametrize(
    ("w", "shape", "arguments", "message"),
    [
        (torch.ones(4), (1, 1), {}, r"weight must be .* \[N, K\]"),
        (torch.ones(0, 4), (1, 1), {}, "non-empty"),
        (torch.ones(4, 4, dtype=torch.int32), (1, 1), {}, "float tensor"),
        (torch.full((4, 4), torch.nan), (2, 2), {}, "finite"),
        (torch.full((4, 4), -torch.inf), (2, 2), {}, "finite"),
        (torch.full((4, 4), 1e300, dtype=torch.float64), (2, 2), {}, "finite in float32"),
        (torch.ones(4, 4, device="meta"), (2, 2), {}, "meta"),
        (torch.ones(4, 6), (3, 2), {}, r"shape must divide the weight's \[4, 6\]: got shape=\(3, 2\)"),
        (torch.ones(4, 6), (2, 4), {}, r"shape must divide .* got shape=\(2, 4\)"),
        (torch.ones(4, 6), (0, 1), {}, "N1 must be an integer of at least 1: got N1=0"),
        (torch.ones(4, 6), (1, 2), {"rank": 3}, r"rank must be at most min\(N1\*K1, N2\*K2\) = 2 .* got rank=3"),
        (torch.ones(4, 6), (1, 2), {"rank": 0}, "rank must be an integer of at least 1: got rank=0"),
        (torch.ones(4, 6), (1, 2), {"svd": "fast"}, "svd must be one of .* got svd='fast'"),
    ],
)
def test_errors(w: Tensor, shape: tuple[int, int], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_kronecker(w, shape, **arguments)


# --------------------------------------------------------------------------------------------------- factor_shapes


def sizes(n: int, k: int, rank: int) -> dict[tuple[int, int], int]:
    """Parameters by the shape of A, of every shape that divides and allows the rank."""
    return {
        (n1, k1): rank * (n1 * k1 + n * k // (n1 * k1))
        for n1 in range(1, n + 1)
        for k1 in range(1, k + 1)
        if n % n1 == 0 and k % k1 == 0 and rank <= min(n1 * k1, n * k // (n1 * k1))
    }


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("compression", [1.1, 1.5, 2, 3, 4, 7.3, 20, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (4, 4), (7, 11), (24, 36), (97, 60), (64, 64), (18, 50)])
def test_factor_shapes_are_all_the_nearest_ones(shape: tuple[int, int], compression: float, rank: int) -> None:
    n, k = shape
    found = factor_shapes(n, k, Kronecker(compression=compression, rank=rank))
    smaller = {s: size for s, size in sizes(n, k, rank).items() if size < n * k}
    off = {s: max(size * compression / (n * k), n * k / (size * compression)) for s, size in smaller.items()}
    nearest = min(off.values(), default=math.inf)
    expected = [s for s, ratio in off.items() if ratio <= nearest * (1 + 1e-12)] if nearest <= 1.25 else []
    assert sorted(found) == sorted(expected)
    assert found == sorted(found, key=lambda s: (s[0] * s[1], -s[0]))


def test_factor_shapes_by_example() -> None:
    spec = Kronecker(compression=2)
    assert factor_shapes(768, 3072, spec) == [(2, 1), (1, 2), (768, 1536), (384, 3072)]
    assert factor_shapes(50257, 768, spec) == [(1, 2), (50257, 384)]  # the vocabulary is odd
    assert factor_shapes(4, 4, spec) == [(4, 1), (2, 2), (1, 4)]
    assert factor_shapes(2, 2, spec) == factor_shapes(7, 11, spec) == factor_shapes(1, 1, spec) == []
    halves = Kronecker(compression=4, rank=2)
    assert factor_shapes(768, 768, halves) == factor_shapes(768, 768, Kronecker(compression=8))
    assert factor_shapes(64, 64, Kronecker(shape=(4, 8))) == [(4, 8)]
    assert factor_shapes(64, 64, Kronecker(shape=(3, 8))) == []
    assert factor_shapes(64, 64, Kronecker(shape=(1, 2), rank=3)) == []


def test_an_embedding_splits_its_features() -> None:
    spec = Kronecker(compression=2)
    for tied in (False, True):
        assert spec.for_embedding(tied=tied) == Kronecker(compression=2, features_only=True)
    assert factor_shapes(50257, 768, spec.for_embedding()) == [(50257, 384)]
    assert factor_shapes(12, 768, Kronecker(compression=4, features_only=True)) == [(12, 192)]
    assert factor_shapes(1000, 768, Kronecker(rank=3, features_only=True)) == [(1000, 128)]
    assert factor_shapes(1000, 97, Kronecker(features_only=True)) == []
    given = Kronecker(shape=(4, 8))
    assert given.for_embedding() is given
    stored = decompose(torch.randn(31, 8), spec.for_embedding()).format()
    assert (stored.n1, stored.k1, stored.n2, stored.k2) == (31, 4, 1, 2)
    assert Packed().for_embedding() == Packed()
    gptq: Spec = Packed(quantizer="gptq")
    assert gptq.for_embedding(tied=True) is gptq
    assert gptq.for_embedding() == Packed(quantizer="mse")


def test_gpt2_small_at_factor_2() -> None:
    """KnGPT2: the embedding and half of the layers take GPT-2 small from 124.4 to 83.9 million parameters."""
    spec = Kronecker(compression=2)
    total = 124_439_808
    weights = [((50257, 768), "embedding", 1)]
    weights += [(shape, "linear", 6) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]
    for (n, k), kind, count in weights:
        format = predicted_format(torch.empty(n, k, device="meta"), spec, kind)
        assert (format.out_features, format.in_features) == (n, k)
        parameters = sum(math.prod(shape) for shape, _ in format.tensors().values())
        assert parameters == n * k // 2 + 2
        total -= count * (n * k - parameters)
    assert 83.8e6 < total < 84.0e6


@pytest.mark.parametrize("arguments", [{"features_only": 1}, {"features_only": True, "shape": (2, 2)}])
def test_features_only_is_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="features_only"):
        Kronecker(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(compression=1), "compression must be greater than 1 and finite: got compression=1.0"),
        (dict(shape=5), "shape must be (N1, K1), the shape of A: got shape=5"),
        (dict(shape=(2, 0)), "shape: K1 must be an integer of at least 1"),
        (dict(shape=(2, 2), compression=2), "give one of them"),
        (dict(rank=0), "rank must be an integer of at least 1: got rank=0"),
        (dict(seed="a"), "seed must be an integer of 64 bits: got seed='a'"),
        (dict(factors=4), "factors must be a Packed or None: got int"),
        (dict(factors=Packed(packed_zeros=True)), "factors takes zeros of a byte and float scales"),
        (dict(factors=Packed(outliers=0.01)), "factors takes float activations, no outliers and no quantizer='gptq'"),
        (dict(factors=Packed(), dtype=torch.float16), "dtype is that of dense factors"),
        (dict(activations="int8"), "activations must be one of 'float': got activations='int8'"),
    ],
)
def test_arguments_of_a_spec(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Kronecker(**arguments)


def test_a_packed_factor_has_neither_outliers_nor_int8_activations() -> None:
    for extra in (dict(outliers=1), dict(activations="int8")):
        factor = PackedFormat(bits=4, out_features=4, in_features=6, group_size=6, granularity="row", **extra)
        with pytest.raises(ValueError, match="a takes no outliers and float activations"):
            KroneckerFormat(n1=4, k1=6, n2=2, k2=2, a=factor)


# ------------------------------------------------------------------------------------------------------- decompose

SPECS = [
    Kronecker(),
    Kronecker(compression=4, rank=2),
    Kronecker(shape=(8, 6)),
    Kronecker(shape=(8, 6), rank=3, svd="randomized"),
    Kronecker(shape=(8, 6), dtype=torch.bfloat16),
    Kronecker(features_only=True),
    Kronecker(shape=(8, 6), rank=3, factors=Packed(bits=8, group_size=4)),
    Kronecker(shape=(4, 4), rank=2, factors=Packed(bits=4, group_size=8, symmetric=True)),
    Kronecker(shape=(4, 4), factors=Packed(bits=8, granularity="tensor", quantizer="mse")),
    Kronecker(factors=Packed(bits=4, group_size=64)),
    Kronecker(features_only=True, factors=Packed(bits=3, zeros="float")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_stored_form_is_the_predicted_one(spec: Kronecker, dtype: torch.dtype) -> None:
    w = torch.randn(96, 120).to(dtype)
    stored = decompose(w, spec)
    format = stored.format()
    assert format == predicted_format(w, spec, "linear") == spec.format(w, "linear")
    assert (format.out_features, format.in_features, format.rank) == (96, 120, spec.rank)
    assert format.dtype == ("float32" if format.a and format.b else str(spec.dtype or dtype).removeprefix("torch."))
    tensors = stored.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == format.tensors()
    assert all(t.is_contiguous() for t in tensors.values())
    assert spec.problem(96, 120) is None
    meta = predicted_format(w.to("meta"), spec, "linear")
    assert (meta.n1, meta.k1) == factor_shapes(96, 120, spec)[0]
    assert meta.nbytes == format.nbytes or spec.factors is not None
    assert meta.dtype == format.dtype
    embedding = predicted_format(w, spec, "embedding")
    assert embedding == decompose(w, spec.for_embedding()).format()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.factors is None], ids=repr)
def test_dense_factors_are_the_nearest(spec: Kronecker) -> None:
    """Within the rounding of the factors, over all the shapes of the given size."""
    w = torch.randn(96, 120)
    errors = []
    for shape in factor_shapes(96, 120, spec):
        sigma = torch.linalg.svdvals(rearranged(w, shape))
        errors.append(float(sigma[spec.rank :].square().sum()))
    found = float((weight_of(decompose(w, spec)) - w).square().sum())
    unit = 2.0**-8 if spec.dtype == torch.bfloat16 else 2.0**-24
    slack = 2e-3 if spec.svd == "randomized" else 0
    assert min(errors) * (1 - 1e-6) <= found <= min(errors) * (1 + slack + 1e-6) + (2 * unit * float(w.norm())) ** 2


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (48, 120), (96, 60)])
def test_the_shape_of_least_error_is_taken(shape: tuple[int, int]) -> None:
    exact = kronecker_sum(1, *shape, 96 // shape[0], 120 // shape[1]).float()
    w = exact + 0.1 * torch.randn(96, 120)
    assert len(factor_shapes(96, 120, Kronecker())) == 4
    format = decompose(w, Kronecker()).format()
    assert (format.n1, format.k1) == shape
    assert relative(weight_of(decompose(exact, Kronecker())), exact) < 2e-7


def test_all_terms_count_in_the_choice_of_the_shape() -> None:
    """One large term in one shape, two smaller ones that hold more together in another."""
    spec = Kronecker(compression=4, rank=2)
    assert {(8, 1), (1, 8)} < set(factor_shapes(96, 120, spec))
    one, two = kronecker_sum(1, 8, 1, 12, 120), kronecker_sum(2, 1, 8, 96, 15)
    for share, shape in ((1.2, (1, 8)), (0.5, (8, 1))):
        format = decompose(one / one.norm() + share * two / two.norm(), spec).format()
        assert (format.n1, format.k1) == shape


def test_of_equally_good_shapes_the_first_is_taken() -> None:
    """The halves of a symmetric weight are as alike side by side as one above the other."""
    for _ in range(20):
        w = torch.randn(64, 64)
        format = decompose(w + w.t(), Kronecker()).format()
        assert (format.n1, format.k1) in ((2, 1), (64, 32))
    zeros = decompose(torch.zeros(96, 120), Kronecker())
    assert (zeros.format().n1, zeros.format().k1) == (2, 1)
    assert bool((weight_of(zeros) == 0).all())


@pytest.mark.parametrize(("n", "k"), [(7, 11), (1, 1), (13, 13)])
def test_a_weight_that_cannot_be_split_is_a_problem(n: int, k: int) -> None:
    problem = Kronecker().problem(n, k)
    assert problem is not None and f"[{n}, {k}]" in problem and "compression=2" in problem
    for call in (decompose, lambda w, spec: predicted_format(w, spec, "linear")):
        with pytest.raises(ValueError, match="no factor shapes .* come near compression=2, rank=1"):
            call(torch.ones(n, k), Kronecker())
    assert "shape=(2, 1)" in str(Kronecker(shape=(2, 1)).problem(n, k))
    assert "got rank=2" in str(Kronecker(shape=(1, 1), rank=2).problem(n, k))
    with pytest.raises(ValueError, match="finite"):
        decompose(torch.full((4, 4), torch.nan), Kronecker())
    with pytest.raises(ValueError, match="meta"):
        decompose(torch.ones(4, 4, device="meta"), Kronecker())


def test_a_dtype_too_small_for_the_factors() -> None:
    w = torch.full((64, 64), 3e9)
    with pytest.raises(ValueError, match=r"dtype must hold the factors: got torch.float16, elements up to"):
        decompose(w, Kronecker(shape=(1, 1), dtype=torch.float16))
    assert relative(weight_of(decompose(w, Kronecker(shape=(8, 8), dtype=torch.float16))), w) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("quantizer", ["minmax", "mse"])
def test_packed_factors_are_the_quantized_ones(bits: int, quantizer: Any) -> None:
    """The smaller factor is the nearest one, quantized; the larger one the least squares fit to it, quantized."""
    packed = Packed(bits=bits, group_size=16, quantizer=quantizer)
    w = kronecker_sum(3, 12, 40, 16, 20).float() + 0.1 * torch.randn(192, 800)
    stored = decompose(w, Kronecker(shape=(12, 40), rank=2, factors=packed))
    assert isinstance(stored.a, PackedWeight) and isinstance(stored.b, PackedWeight)
    assert stored.rank == 2
    expected = quantize(nearest_kronecker(w, (12, 40), 2)[1].flatten(0, 1), packed)
    assert torch.equal(stored.b.codes, expected.codes)
    assert torch.equal(stored.b.scales, expected.scales)
    small = dense(stored.b, 2).flatten(1).double()
    fit = torch.linalg.lstsq(small.t(), rearranged(w, (12, 40)).t()).solution.reshape(-1, 40)
    expected = quantize(fit, packed)
    assert float((stored.a.codes != expected.codes).double().mean()) < 0.01
    assert relative(dense(stored.a, 2), dense(expected, 2)) < 1e-2
    error, unquantized = (relative(t, w) for t in (weight_of(stored), product(*nearest_kronecker(w, (12, 40), 2))))
    assert unquantized < error < unquantized + 2.0 ** (1 - bits)


def test_a_factor_that_packing_would_not_shrink_stays_dense() -> None:
    w = torch.randn(64, 512)
    for dtype in (torch.float32, torch.float16):
        stored = decompose(w.to(dtype), Kronecker(shape=(1, 2), factors=Packed(bits=4, group_size=64)))
        assert isinstance(stored.a, Tensor) and stored.a.dtype == dtype
        assert isinstance(stored.b, PackedWeight)
        column = decompose(w.to(dtype), Kronecker(shape=(64, 1), factors=Packed(bits=4, group_size=64)))
        assert isinstance(column.a, Tensor) and isinstance(column.b, PackedWeight)
        for packed in (stored, column):
            plain = sum(t.nbytes for t in decompose(w.to(dtype), Kronecker(shape=(1, 2))).tensors().values())
            assert packed.format().nbytes < plain


def test_a_group_larger_than_a_factor_is_a_row() -> None:
    stored = decompose(torch.randn(64, 512), Kronecker(shape=(8, 16), factors=Packed(bits=4, group_size=24)))
    assert stored.format() == KroneckerFormat(
        8, 16, 8, 32, 1, "float32", stored.a.format(), stored.b.format()  # type: ignore[union-attr, arg-type]
    )
    assert stored.format().a is not None and stored.format().b is not None
    assert stored.format().a.group_size == 16 and stored.format().b.group_size == 24  # type: ignore[union-attr]
    assert stored.a.scales.shape == (8, 1) and stored.b.scales.shape == (8, 2)  # type: ignore[union-attr]
