"""The numerics contract of family ``kron``, on every backend and ISA of this machine.

Also what the sanitizer build runs, so nothing here compiles or needs more than torch.
"""

import functools

import pytest
import torch

from lowbit.backends import registry
from lowbit.backends.cpu import native
from lowbit.testing.kron_cases import DENSE, SHAPES, Kind, Weight, packed_kinds, random_weight
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import BITS, DTYPES, ROWS, activations
from lowbit.testing.verdicts import where_params
from lowbit.testing.where import Where, everywhere, running, share

WHERE = everywhere()


@pytest.fixture(params=where_params(WHERE, "lowbit.backends", "lowbit.kron.op", "lowbit.kron.triton"), ids=str)
def where(request):
    with running(request.param):
        yield request.param


@functools.cache
def dense_weights(a: Kind, b: Kind) -> list[Weight]:
    weights = [random_weight(shape, a, b, seed) for seed, shape in enumerate(SHAPES)]
    # with permutations of both sides, and of each
    return [
        *weights,
        *(weight.permuted(i, inputs=i % 3 != 1, outputs=i % 3 != 2) for i, weight in enumerate(weights)),
    ]


@functools.cache
def packed_weights(bits: int) -> list[Weight]:
    """Every kind of packed factor, on one side or the other, with a dense or a packed other; shapes in rotation."""
    kinds = list(packed_kinds(bits))
    weights = []
    for i, kind in enumerate(kinds):
        other = (*DENSE, kinds[(i * 5 + 3) % len(kinds)])[(i // 2 + bits) % 4]
        a, b = (kind, other) if (i + bits) % 2 else (other, kind)
        weight = random_weight(SHAPES[(i * 5 + bits) % len(SHAPES)], a, b, seed=i)
        weights.append(weight.permuted(i) if i % 5 == 0 else weight)
    return weights


def test_the_compiled_kernels_are_what_is_tested():
    """On a machine with a compiler this suite must not silently shrink to the reference."""
    reason = registry.why_unavailable("cpu")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    assert native.isas()[-1] == "scalar"
    assert [str(w) for w in WHERE][: 1 + len(native.isas())] == ["reference", *native.isas()]


def check_linear(where: Where, weights: list[Weight], dtype: torch.dtype) -> None:
    for i, weight in share(where, weights, DTYPES.index(dtype), 3):
        m = ROWS[i % len(ROWS)] if weight.k * weight.n < 1 << 14 else (1, 6, 29)[i % 3]
        x = activations(m, weight.k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, weight.n, DTYPES[i % 3], seed=i + 1)[0]
        y = weight.linear(x, bias)
        assert y.dtype == dtype and y.shape == (m, weight.n)
        weight.assert_close(y, x, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a", "b"), [(DENSE[0], DENSE[0]), (DENSE[2], DENSE[2]), (DENSE[1], DENSE[2])], ids=str)
def test_linear_of_dense_factors(where, a, b, dtype):
    check_linear(where, dense_weights(a, b), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear_of_packed_factors(where, bits, dtype):
    check_linear(where, packed_weights(bits), dtype)


# Sums of odd length in either product; lanes along rows of up to 511 columns, with avx512bf16; the larger factor first.
BF16_SHAPES = (
    (2, 40, 9, 21, 151), (1, 9, 40, 151, 21), (2, 10, 41, 70, 151), (1, 66, 150, 20, 17), (1, 9, 8, 20, 511),
    (1, 9, 8, 20, 513),
)  # fmt: skip


@pytest.mark.parametrize("shape", BF16_SHAPES, ids=str)
def test_linear_all_in_bfloat16(where, shape):
    weight = random_weight(shape, DENSE[2], DENSE[2])
    for i, w in enumerate((weight, weight.permuted(1))):
        x, bias = activations(7, w.k, torch.bfloat16, seed=i), activations(1, w.n, torch.bfloat16, seed=2)[0]
        w.assert_close(w.linear(x, bias), x, bias)


def test_linear_in_several_blocks_of_rows(where):
    """More rows than are multiplied at a time, and more than go through memory at a time."""
    weight = random_weight((1, 2, 1, 33, 140)).permuted(3)
    x = activations(90 if where == Where("triton") else 900, 140, torch.float32)
    weight.assert_close(weight.linear(x), x)
    if where.backend == "cpu" and where.isa == native.isas()[0]:
        weight, x = random_weight((2, 1, 4, 3, 600)), activations(3600, 2400, torch.bfloat16)
        y = weight.linear(x)
        weight.assert_close(y, x)
        assert_bitwise_equal(weight.linear(x[3590:]), y[3590:])


def definition(weight: Weight) -> torch.Tensor:
    """In float32: one rounding per product, and one per sum."""
    rounded = torch.zeros(weight.n, weight.k)
    for term in weight.terms():
        rounded += term.float()
    return rounded


@pytest.mark.parametrize("bits", [0, *BITS])
def test_dequantize_is_the_definition(where, bits):
    weights = packed_weights(bits) if bits else [w for i in range(3) for w in dense_weights(DENSE[i], DENSE[i - 1])]
    for i, weight in share(where, weights, bits % 3, 3):
        dtype = DTYPES[i % 3]
        assert_bitwise_equal(weight.dequantize(dtype), definition(weight).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, *BITS])
def test_identity_activations_give_the_dequantized_weight(where, bits, dtype):
    """Bit for bit with one term: its products round once. With more, a kernel may fuse a product and a sum."""
    weights = packed_weights(bits) if bits else dense_weights(Kind(dtype), Kind(dtype))
    for _, weight in share(where, weights, DTYPES.index(dtype), 6):
        some = slice(None) if weight.k < 200 else slice(weight.k % 7, None, 37)
        eye = torch.eye(weight.k)[some].to(dtype)
        y = weight.linear(eye)
        if weight.rank == 1:
            assert_bitwise_equal(y.t().contiguous(), weight.dequantize(dtype)[:, some])
        else:
            weight.assert_close(y, eye)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, *BITS])
def test_integer_arithmetic_is_exact(where, bits, dtype):
    """Integers times powers of two: every product and sum is exact, so the result has one right value."""
    kinds = list(packed_kinds(bits)) if bits else DENSE
    for seed, shape in share(where, SHAPES, (bits + DTYPES.index(dtype)) % 6, 6):
        kind, other = kinds[seed % len(kinds)], (*DENSE, kinds[(5 * seed + 1) % len(kinds)])[seed % 4]
        a, b = (kind, other) if seed % 2 else (other, kind)
        weight = random_weight(shape, a, b, seed, integers=True)
        if seed % 3 == 0:
            weight = weight.permuted(seed)
        # fp32 holds 24 bits, the unit of every partial sum is at least 1/4: so many columns of x may be 1 or -1
        columns = int(2**22 / float(sum(t.abs() for t in weight.terms()).max()))
        assert columns > 3
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 2, (7, weight.k), generator=g).mul(2).sub(1)
        x[:, torch.randperm(weight.k, generator=g)[columns:]] = 0
        x = x.to(dtype)
        exact = x.double() @ weight.dense().t()
        assert_bitwise_equal(weight.linear(x), exact.float().to(dtype))
        assert_bitwise_equal(weight.dequantize(), weight.dense().float())


BATCH_SHAPES = (
    (1, 2, 1, 130, 256), (1, 1, 2, 70, 256), (2, 70, 300, 1, 2), (1, 70, 129, 2, 1), (1, 64, 64, 64, 64),
    (3, 10, 12, 70, 20), (1, 3, 40, 130, 50), (1, 2, 3, 35, 1056), (2, 33, 9, 21, 71), (2, 21, 33, 35, 17),
)  # fmt: skip


@pytest.mark.parametrize("shape", BATCH_SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_the_threads_or_the_call(where, shape):
    if where.backend != "cpu":
        pytest.skip("promised for the compiled kernels: the reference is torch's matmul, and a GPU has its own test")
    kinds = (*DENSE, Kind(torch.float16, 4, 32, zeros="int"))
    for i, dtype in enumerate((*DTYPES, torch.bfloat16, torch.bfloat16)):
        a, b = (kinds[(i + 1) % 4], kinds[i]) if i < 4 else (DENSE[2], DENSE[2])  # at last all in bfloat16
        weight = random_weight(shape, a, b, seed=i)
        weight = weight.permuted(i) if i == 1 else weight
        for m in (2, 5, 16, 70):
            x = activations(m, weight.k, dtype, seed=m)
            torch.set_num_threads(1)
            y = weight.linear(x)
            assert_bitwise_equal(weight.linear(x), y)
            for row in (0, m // 2, m - 1):
                assert_bitwise_equal(weight.linear(x[row : row + 1]), y[row : row + 1])
            torch.set_num_threads(3)
            assert_bitwise_equal(weight.linear(x), y)
            torch.set_num_threads(1)


@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 7, 140), (1, 1, 2, 9, 140), (2, 6, 8, 5, 12), (1, 40, 150, 1, 2), (1, 9, 13, 20, 33)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_a_number_stays_in_its_row(where, shape, dtype):
    weight = random_weight(shape, Kind(dtype), Kind(dtype))
    x = activations(4, weight.k, dtype)
    clean = weight.linear(x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, weight.k // 2] = bad
        y = weight.linear(spoiled)
        assert not bool(torch.isfinite(y[2]).any())
        kept = torch.tensor([0, 1, 3])
        assert bool(torch.isfinite(y[kept]).all())
        if where.backend == "cpu":
            assert_bitwise_equal(y[kept], clean[kept])


@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 7, 139), (1, 1, 2, 9, 139), (2, 6, 8, 5, 11), (1, 40, 149, 1, 2), (1, 9, 13, 20, 33)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_weights_spoil_their_own_outputs_alone(where, shape, dtype):
    """And give infinities: no zero of the padding meets them."""
    for factor in ("a", "b"):
        weight = random_weight(shape, Kind(dtype), Kind(dtype))
        weight.a.tensor.abs_()
        weight.b.tensor.abs_()
        getattr(weight, factor).tensor[0, 0, 0] = float("inf")
        bad = weight.dequantize().isinf().any(1)
        assert bool(bad.any())
        y = weight.linear((torch.rand(3, weight.k) + 0.5).to(dtype))
        # Triton's kernels take what lies between bfloat16 products apart into pieces: of an infinity that leaves NaN
        taken_apart = where.backend == "triton" and dtype == torch.bfloat16
        assert bool((~torch.isfinite(y) if taken_apart else torch.isinf(y))[:, bad].all())
        assert bool(torch.isfinite(y[:, ~bad]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0, 2, 5])
def test_embedding_gathers_rows(where, bits, dtype):
    weights = packed_weights(bits) if bits else dense_weights(Kind(dtype), DENSE[0])
    for i, weight in share(where, weights, DTYPES.index(dtype), 3):
        rows = weight.dequantize(dtype)
        for shape in ((), (0,), (7,), (2, 3)):
            ids = torch.randint(0, weight.n, shape, dtype=torch.int32 if i % 2 else torch.int64)
            assert_bitwise_equal(weight.embedding(ids, dtype), rows[ids.long()])


@pytest.mark.parametrize("bad", [-1, 12, 1 << 40])
def test_embedding_refuses_ids_out_of_range(where, bad):
    if where.backend == "triton":  # checking would wait for the GPU: the row is NaN, the others are not touched
        weight = random_weight((1, 4, 5, 3, 2))
        rows, whole = weight.embedding(torch.tensor([0, bad, 1])), weight.dequantize()
        assert bool(rows[1].isnan().all())
        assert_bitwise_equal(rows[[0, 2]], whole[[0, 1]])
        return
    with pytest.raises(RuntimeError, match=rf"num_embeddings=12.*{bad}"):
        random_weight((1, 4, 5, 3, 2)).embedding(torch.tensor([0, bad, 1]))


def test_inputs_of_any_layout(where):
    weight = random_weight((1, 3, 7, 5, 10))
    x = activations(12, 140, torch.float32)
    for strided in (x[:, ::2], x[::3, :70], x[:, :70].t().contiguous().t(), x[:6, 70:].flip(0)):
        assert_bitwise_equal(weight.linear(strided), weight.linear(strided.contiguous()))
        weight.assert_close(weight.linear(strided), strided)
    cube = x[:, :70].reshape(2, 3, 2, 70)
    assert_bitwise_equal(weight.linear(cube), weight.linear(cube.reshape(-1, 70)).view(2, 3, 2, 15))
    assert weight.linear(x[0, :70]).shape == (15,)
    assert weight.linear(x[:0, :70].reshape(0, 4, 70)).shape == (0, 4, 15)


def test_the_output_rounds_like_torch(where):
    """Overflow to infinity, subnormals, ties."""
    weight = random_weight((1, 1, 1, 1, 1), integers=True)
    weight.a.tensor.fill_(1)
    weight.b.tensor.fill_(1)
    x = torch.tensor([65504.0, 65519.9, 65520.0, 1e-7, 6e-8, 2.9e-8, 3.1e-8, 1.0009765625])[:, None]
    for dtype in DTYPES:
        narrow = x.to(dtype)
        y = weight.linear(narrow)
        # Triton's kernels take float32 apart into pieces: of an infinity that leaves NaN
        same = torch.isfinite(narrow) if where.backend == "triton" else torch.ones_like(narrow, dtype=torch.bool)
        assert_bitwise_equal(y[same], narrow[same])
        assert not bool(torch.isfinite(y[~same]).any())
        weight.b.tensor = x.view(1, 8, 1)
        weight.b.values = weight.b.tensor.double()
        assert_bitwise_equal(weight.linear(torch.ones(1, 1, dtype=dtype)), x.t().to(dtype))
        assert_bitwise_equal(weight.dequantize(dtype), x.to(dtype))
        weight.b.tensor, weight.b.values = torch.ones(1, 1, 1), torch.ones(1, 1, 1).double()


def test_more_threads_than_rows(where):
    weight, x = random_weight((1, 1, 2, 3, 20)), activations(3, 40, torch.float32)
    torch.set_num_threads(4)
    try:
        weight.assert_close(weight.linear(x), x)
    finally:
        torch.set_num_threads(1)


def test_more_than_two_to_the_31_weights():
    """Offsets beyond 32 bits in the weight, which is never formed."""
    if registry.why_unavailable("cpu") is not None:
        pytest.skip("no compiled kernels")
    weight = random_weight((1, 300, 250, 160, 250))
    assert weight.n * weight.k > 1 << 31
    x = activations(1, weight.k, torch.float32)
    y = weight.linear(x).view(300, 160)
    rows = torch.tensor([0, 159, 47_999])
    dense = weight.embedding(rows)
    assert_linear_close(y.flatten()[None, rows], x, torch.stack([
        torch.kron(weight.a.values[0, n // 160], weight.b.values[0, n % 160]) for n in rows.tolist()
    ]))  # fmt: skip
    assert_bitwise_equal(dense[2], torch.kron(weight.a.tensor[0, 299], weight.b.tensor[0, 159]))


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool], ids=str)
def test_activations_of_another_dtype_are_refused(where, dtype):
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        random_weight((1, 2, 3, 4, 5)).linear(torch.ones(2, 15, dtype=dtype))


def test_activations_of_another_width_are_refused(where):
    weight = random_weight((1, 2, 3, 4, 5))
    for x in (torch.randn(2, 14), torch.randn(2, 16), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="x must"):
            weight.linear(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool], ids=str)
def test_ids_of_another_dtype_are_refused(where, dtype):
    with pytest.raises(RuntimeError, match="ids must be int32 or int64"):
        random_weight((1, 2, 3, 4, 5)).embedding(torch.ones(2, dtype=dtype))


def first_twice(size: int) -> torch.Tensor:
    return torch.cat([torch.zeros(1), torch.arange(size - 1)]).int()


# On (2, 3, 4, 6, 5): a is packed in 4 bits, in groups of 2 with integer zeros; b is dense.
MALFORMED = {
    "rank 0": ({"rank": 0}, r"rank must be between 1 and 2\^31 - 1: got 0"),
    "n1 0": ({"n1": 0}, r"n1 must be between 1 and 2\^31 - 1: got 0"),
    "k2 negative": ({"k2": -5}, r"k2 must be between 1 and 2\^31 - 1: got -5"),
    "n too large": ({"n1": 1 << 16, "n2": 1 << 15}, r"n1\*n2 and k1\*k2 must be below 2\^31"),
    "rank": ({"rank": 3}, r"a must be of shape \[9, 4\]"),
    "n1": ({"n1": 4}, r"a must be of shape \[8, 4\]"),
    "k1": ({"k1": 40}, r"a must be of shape \[6, 8\]"),
    "n2": ({"n2": 5}, r"b must be of shape \[2, 5, 5\]: got \[2, 6, 5\]"),
    "k2": ({"k2": 6}, r"b must be of shape \[2, 6, 6\]: got \[2, 6, 5\]"),
    "a_bits 1": ({"a_bits": 1}, "a_bits must be between 2 and 8, or 0 for a dense factor: got a_bits=1"),
    "a_bits 9": ({"a_bits": 9}, "a_bits must be between 2 and 8, or 0 for a dense factor: got a_bits=9"),
    "b_bits -1": ({"b_bits": -1}, "b_bits must be between 2 and 8, or 0 for a dense factor: got b_bits=-1"),
    "a_bits 0": ({"a_bits": 0}, "a must be float32, float16 or bfloat16"),
    "b_bits 4": ({"b_bits": 4, "b_group_size": 5}, "b must be int32 when packed"),
    "a_group_size 0": ({"a_group_size": 0}, "a_group_size must be between 1 and 4: got 0"),
    "a_group_size 5": ({"a_group_size": 5}, "a_group_size must be between 1 and 4: got 5"),
    "a long": ({"a": lambda w: w.a.tensor.long()}, "a must be int32 when packed"),
    "a words": ({"a": lambda w: w.a.tensor[:, :-1].contiguous()}, r"a must be of shape \[6, 4\]: got \[6, 3\]"),
    "b double": ({"b": lambda w: w.b.tensor.double()}, "b must be float32, float16 or bfloat16"),
    "b flat": ({"b": lambda w: w.b.tensor.flatten()}, r"b must be of shape \[2, 6, 5\]: got \[60\]"),
    "no a_scales": ({"a_scales": None}, "a_scales must be given for a packed factor: got a_bits=4"),
    "a_scales": ({"a_scales": lambda w: w.a.scales[:, :1].contiguous()}, r"a_scales must be of shape \[6, 2\]"),
    "a_scales rows": ({"a_scales": lambda w: w.a.scales[:1].contiguous()}, r"a_scales must be of shape \[6, 2\]"),
    "a_scales int": ({"a_scales": lambda w: w.a.scales.int()}, "a_scales must be float32, float16 or bfloat16"),
    "a_zeros": ({"a_zeros": lambda w: w.a.zeros[:, :1].contiguous()}, r"a_zeros must be of shape \[6, 2\]"),
    "a_zeros int": ({"a_zeros": lambda w: w.a.zeros.int()}, "a_zeros must be uint8 or of the dtype of a_scales"),
    "b_scales": ({"b_scales": lambda w: w.a.scales}, "b_scales and b_zeros belong to a packed factor: got b_bits=0"),
    "b_zeros": ({"b_zeros": lambda w: w.a.zeros}, "b_scales and b_zeros belong to a packed factor: got b_bits=0"),
    "inputs long": ({"input_permutation": torch.arange(20)}, "input_permutation must be int32"),
    "inputs short": ({"input_permutation": torch.arange(19).int()}, r"input_permutation must be of shape \[20\]"),
    "inputs 20": ({"input_permutation": torch.arange(1, 21).int()}, "input_permutation must hold.* 0 to 19: got 20"),
    "inputs -1": ({"input_permutation": torch.arange(-1, 19).int()}, "input_permutation must hold.* 0 to 19: got -1"),
    "inputs twice": ({"input_permutation": first_twice(20)}, "input_permutation must hold every number once: got 0"),
    "outputs long": ({"output_permutation": torch.arange(18)}, "output_permutation must be int32"),
    "outputs 2d": ({"output_permutation": torch.arange(18).int()[None]}, r"output_permutation must be of shape \[18\]"),
    "outputs 18": ({"output_permutation": torch.arange(1, 19).int()}, "output_permutation must hold.* 0 to 17: got 18"),
    "outputs twice": ({"output_permutation": first_twice(18)}, "output_permutation must hold every number once: got 0"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_arguments_are_refused(where, name):
    weight = random_weight((2, 3, 4, 6, 5), Kind(bits=4, group_size=2, zeros="int"))
    change, message = MALFORMED[name]
    if where.backend == "triton" and "must hold" in message:
        pytest.skip("looking at values would wait for the GPU: the layer has checked them")
    changed = {key: value(weight) if callable(value) else value for key, value in change.items()}
    with pytest.raises(RuntimeError, match=message):
        weight.linear(torch.randn(2, 20), **changed)
    with pytest.raises(RuntimeError, match=message):
        weight.dequantize(**changed)
    with pytest.raises(RuntimeError, match=message):
        weight.embedding(torch.tensor([0]), **changed)


@pytest.mark.parametrize(
    ("bias", "message"),
    [(torch.ones(17), r"bias must be of shape \[18\]"), (torch.ones(18).int(), "bias must be float32")],
    ids=["shape", "dtype"],
)
def test_a_malformed_bias_is_refused(where, bias, message):
    with pytest.raises(RuntimeError, match=message):
        random_weight((2, 3, 4, 6, 5)).linear(torch.randn(2, 20), bias)
