"""Stacks of experts: every row is, bit for bit, what the linear layer of its expert gives, wherever it stands."""

import pytest
import torch

from lowbit.backends import registry
from lowbit.backends.cpu import blocks
from lowbit.backends.layouts import by_group
from lowbit.testing import codebook_cases, packed_cases
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import DTYPES, activations, formats
from lowbit.testing.where import call, everywhere, running

WHERE = [where for where in everywhere(interpreter=False) if where.backend in ("reference", "cpu")]
# (E, N, K, group_size): one row an expert, ragged, whole panels of 64 rows
STACKS = ((3, 1, 5, 2), (4, 7, 33, None), (5, 24, 172, 32), (2, 66, 40, 40), (3, 64, 96, 32), (2, 128, 70, 7))
# (T, rows of y for each row of x)
TOKENS = ((0, 1), (1, 1), (1, 4), (3, 2), (9, 1), (40, 2), (390, 3))


@pytest.fixture(params=WHERE, ids=str)
def where(request):
    with running(request.param):
        yield request.param


def ids_of(tokens: int, repeats: int, num_experts: int, seed: int) -> torch.Tensor:
    """The same expert for many rows, none for some, and ids of experts that are elsewhere."""
    g, dtype = torch.Generator().manual_seed(seed), (torch.int32, torch.int64)[seed % 2]
    ids = torch.randint(0, num_experts + 1, (tokens * repeats,), generator=g, dtype=dtype)
    return torch.where(torch.rand(ids.shape, generator=g) < 0.4, num_experts // 2, ids)


def gathered(whole: torch.Tensor, ids: torch.Tensor, n: int) -> torch.Tensor:
    """Of y ``[T, E*N]`` of all experts, what the rows of ids ask for."""
    y = torch.zeros(len(ids), n, dtype=whole.dtype)
    for i, e in enumerate(ids.tolist()):
        if (e + 1) * n <= whole.shape[1]:
            y[i] = whole[i * len(whole) // len(ids), e * n : (e + 1) * n]
    return y


def packed_stacks(bits, turn):
    """A third of the stacks: each dtype has another one."""
    for i, (experts, n, k, group_size) in enumerate(STACKS):
        if (bits + i) % 3 != turn:
            continue
        choices = list(formats(bits, experts * n, k, group_size))
        weight = packed_cases.random_weight(choices[(bits + i) % len(choices)], i)
        yield i, experts, n, weight
        if n % 64 == 0 and registry.active_backend("cpu") == "cpu":
            weight.packed = blocks.block(weight.packed, bits)
            if weight.format.granularity == "group":
                weight.scales = by_group(weight.scales)
                weight.zeros = None if weight.zeros is None else by_group(weight.zeros)
            yield i, experts, n, weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", packed_cases.BITS)
def test_packed(where, bits, dtype):
    for i, experts, n, weight in packed_stacks(bits, DTYPES.index(dtype)):
        bias = None if i % 3 == 0 else activations(1, experts * n, DTYPES[i % 3], seed=n)[0]
        for j, (tokens, repeats) in enumerate(TOKENS):
            x, ids = activations(tokens, weight.format.in_features, dtype, seed=i), ids_of(tokens, repeats, experts, j)
            for int8, x_group in ((False, 0), (True, 0)):
                activation = dict(x_scale=None, int8=int8, x_group=x_group)
                op, arguments = torch.ops.lowbit.packed_experts, dict(num_experts=experts, bias=bias)
                y = call(op, x, ids, **weight.arguments, **arguments, **activation)
                assert y.dtype == dtype and y.shape == (tokens * repeats, n)
                check(where, y, weight.linear(x, bias, int8=int8), ids, x, weight, bias, int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", codebook_cases.BITS)
def test_codebook(where, bits, dtype):
    for i, (experts, n, k, group_size) in enumerate(STACKS):
        if (bits + i) % 3 != DTYPES.index(dtype):
            continue
        choices = [kind for kind in codebook_cases.kinds(bits, experts * n, k, group_size) if kind.scales != "nested"]
        weight = codebook_cases.random_weight(choices[(bits + i) % len(choices)], i)
        bias = None if i % 3 == 0 else activations(1, experts * n, DTYPES[i % 3], seed=n)[0]
        for j, (tokens, repeats) in enumerate(TOKENS):
            x, ids = activations(tokens, k, dtype, seed=i), ids_of(tokens, repeats, experts, j)
            for int8 in (False, True):
                activation = dict(x_scale=None, int8=int8)
                op, arguments = torch.ops.lowbit.codebook_experts, dict(num_experts=experts, bias=bias)
                y = call(op, x, ids, **weight.arguments, **arguments, **activation)
                check(where, y, weight.linear(x, bias, int8=int8), ids, x, weight, bias, int8)


def test_codebook_with_nested_scales(where):
    """Each expert has whole blocks of 256 scales."""
    experts, n, k, group_size = 3, 64, 92, 23
    weight = codebook_cases.random_weight(codebook_cases.Kind(4, experts * n, k, group_size, "tensor", "nested"), 1)
    x, ids = activations(40, k, torch.float32), ids_of(40, 2, experts, 1)
    for int8 in (False, True):
        given = dict(num_experts=experts, bias=None, x_scale=None, int8=int8)
        y = call(torch.ops.lowbit.codebook_experts, x, ids, **weight.arguments, **given)
        check(where, y, weight.linear(x, None, int8=int8), ids, x, weight, None, int8)


def check(where, y, whole, ids, x, weight, bias, int8):
    """``whole``: y of all experts ``[T, E*N]``, by the linear layer that the stack would be."""
    dense, n = weight.dense(), y.shape[1]
    expected = gathered(whole, ids, n)
    if where.backend == "cpu":  # of which the linear layer's tests say that it is right
        assert_bitwise_equal(y, expected)
        return
    if int8:  # exact sums; those of floats depend on how many rows there are, so they are held against float64
        torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(y.dtype).eps, atol=1e-5)
    for e in () if int8 else ids.unique().tolist():
        rows, own = (ids == e).nonzero()[:, 0], slice(e * n, (e + 1) * n)
        if own.stop <= len(dense):
            picked = x[rows * len(x) // len(ids)]
            assert_linear_close(y[rows], picked, dense[own], None if bias is None else bias[own])
        else:
            assert not y[rows].any()


def test_a_call_of_more_rows_than_scratch_memory_holds(where):
    """They are prepared in several steps."""
    weight = packed_cases.random_weight(list(formats(4, 6 * 64, 1024, 64))[3], 1)
    x, ids = activations(900, 1024, torch.float32), ids_of(900, 2, 6, 3)
    activation = dict(bias=None, x_scale=None, int8=False, x_group=0)
    y = call(torch.ops.lowbit.packed_experts, x, ids, **weight.arguments, num_experts=6, **activation)
    check(where, y, weight.linear(x), ids, x, weight, None, False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(where, threads):
    weight = packed_cases.random_weight(list(formats(4, 5 * 130, 256, 64))[2], 1)
    x, ids = activations(40, 256, torch.bfloat16), ids_of(40, 3, 5, 3)
    activation = dict(bias=None, x_scale=None, int8=False, x_group=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = call(torch.ops.lowbit.packed_experts, x, ids, **weight.arguments, num_experts=5, **activation)
    finally:
        torch.set_num_threads(before)
    check(where, y, weight.linear(x), ids, x, weight, None, False)


def test_what_is_not_finite_stays_in_its_rows(where):
    weight = packed_cases.random_weight(list(formats(4, 3 * 64, 96, 32))[2], 1)
    x, ids = activations(6, 96, torch.float32), torch.tensor([0, 1, 2, 0, 1, 3, 2, 2, 1, 0, 1, 2])
    activation = dict(bias=None, x_scale=None, int8=False, x_group=0)

    def product(x):
        return call(torch.ops.lowbit.packed_experts, x, ids, **weight.arguments, num_experts=3, **activation)

    y, bad = product(x), x.clone()
    bad[2, 5] = torch.nan
    z = product(bad)
    assert bool(z[4].isnan().all()) and bool((z[5] == 0).all())  # row 5 has an expert that is elsewhere
    rest = torch.tensor([i for i in range(12) if i // 2 != 2])
    assert_bitwise_equal(z[rest], y[rest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.tensor([0, 1, -1])), "ids must not be negative: got -1"),
        (dict(ids=torch.tensor([0, 1])), r"ids must be .*S\], S a multiple of T=3: got (shape \(2,\)|\[2\])"),
        (dict(ids=torch.tensor([0.0, 1.0, 0.0])), "ids must be int32 or int64"),
        (dict(num_experts=5), "num_experts must divide the rows of the weight, 128: got num_experts=5"),
        (dict(num_experts=0), "num_experts must divide the rows of the weight, 128: got num_experts=0"),
        (dict(x=torch.zeros(1, 3, 96)), r"x must be .*\[T, K\]: got (shape )?"),
        (dict(x=torch.zeros(3, 64)), "packed must have ceil.K/32..bits = 8 words per row"),
        (dict(bias=torch.zeros(64)), "bias must (be of|have) shape"),
    ],
)
def test_errors(where, change, message):
    weight = packed_cases.random_weight(list(formats(4, 128, 96, 32))[2], 1)
    given = dict(x=torch.zeros(3, 96), ids=torch.tensor([0, 1, 1]), **weight.arguments, num_experts=2, bias=None)
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.lowbit.packed_experts, **{**given, **change}, x_scale=None, int8=False, x_group=0)


def test_stacks_that_cannot_be_cut_are_refused():
    if registry.why_unavailable("cpu") is not None:
        pytest.skip("no compiled kernels")
    weight = packed_cases.random_weight(list(formats(4, 128, 96, 32))[2], 1)
    weight.packed = blocks.block(weight.packed, 4)
    x, ids = torch.zeros(1, 96), torch.tensor([0])
    given = dict(bias=None, x_scale=None, int8=False, x_group=0)
    with pytest.raises(RuntimeError, match=r"experts in blocks \(layout=2\) must have a multiple of 64 rows: got N=32"):
        torch.ops.lowbit.packed_experts(x, ids, **weight.arguments, num_experts=4, **given)
    nested = next(kind for kind in codebook_cases.kinds(4, 12, 96, 32) if kind.scales == "nested")
    table = codebook_cases.random_weight(nested, 1)
    given = dict(bias=None, x_scale=None, int8=False)
    with pytest.raises(RuntimeError, match="quantized scales must have a multiple of 256 scales: got N=4, G=3"):
        torch.ops.lowbit.codebook_experts(x, ids, **table.arguments, num_experts=3, **given)
