"""Stacks of experts by the CUDA C++ kernels (``csrc/cuda/packed/experts.cuh``), emulated: against float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import EXPERTS_SORT, PACKED_EXPERTS
from benchmarks.tools.cuda_kernels import WIDTHS as COMPILED
from lowbit.packed.format import PackedFormat
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.cuda_emulated import packed_experts, packed_linear
from lowbit.testing.cuda_planted.packed_experts import SHAPES, ZEROS, assert_right, some_ids, stack
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, Weight, activations

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")
WIDTHS = cuda_emulated.WIDTHS


def expert(weight: Weight, e: int, n: int) -> Weight:
    """Its rows of the stack, as a weight of its own."""
    f, (values, columns, rows) = weight.format, weight.outliers
    at = slice(e * n, (e + 1) * n)
    if rows is not None and values is not None and columns is not None:
        ends = rows[at.start : at.stop + 1]
        values, columns, rows = values[ends[0] : ends[-1]], columns[ends[0] : ends[-1]], ends - ends[0]
        if not len(values):
            values = columns = rows = None
    own = weight.scales.shape[0] > 1
    cut = lambda t: t[at].contiguous() if own else t  # noqa: E731
    zeros = None if weight.zeros is None else cut(weight.zeros)
    one = PackedFormat(**{**f.__dict__, "out_features": n, "outliers": 0 if values is None else len(values)})
    codes, packed, outliers = weight.codes[at], weight.packed[at].contiguous(), (values, columns, rows)
    return Weight(one, codes, packed, cut(weight.scales), zeros, outliers)


@needs_emulation
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_rows_meet_their_experts(number, bits):
    e, n, k, group_size, tokens, repeats = SHAPES[number]
    i = number + bits
    weight = stack(bits, e, n, k, group_size, i)
    x = activations(tokens, k, DTYPES[(number + bits) % 3])
    ids = some_ids(tokens * repeats, e, i, (torch.int64, torch.int32)[i % 2])
    bias = activations(1, e * n, DTYPES[bits % 3])[0] if i % 2 else None
    y = packed_experts(weight, x, ids, e, bias, order=i % 2, by_group=i % 3 == 0)
    assert_right(y, weight.dense(), x, ids, e, bias)


EXACT = {"few rows of each": (5, 9, 300, 64, 4, 4), "many": (2, 9, 300, 20, 33, 2)}


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", EXACT)
def test_small_integers_are_exact(regime, dtype):
    """No rounding anywhere: what float64 gives."""
    e, n, k, group_size, tokens, repeats = EXACT[regime]
    bits = (3, 4, 5)[DTYPES.index(dtype)]
    weight = stack(bits, e, n, k, group_size, 1, exact=True)
    x = torch.randint(-2, 3, (tokens, k), generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = some_ids(tokens * repeats, e, 2).clamp(min=0)
    y = packed_experts(weight, x, ids, e)
    dense = torch.cat([weight.dense().view(e, n, k), torch.zeros(3, n, k, dtype=torch.float64)])
    exact = torch.einsum("snk,sk->sn", dense[ids], x.double().repeat_interleave(repeats, 0))
    assert_bitwise_equal(y, exact.to(dtype))


@needs_emulation
@pytest.mark.parametrize("zeros", range(3), ids=ZEROS)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (3, 7), (7, None)])
@pytest.mark.parametrize("regime", ["decode", "batch"])
def test_a_row_has_the_bits_that_its_experts_linear_gives(regime, bits, group_size, zeros):
    e, n, k, tokens, repeats = 3, 33, 600, 5, 2
    invariant = regime == "batch"
    weight = stack(bits, e, n, k, group_size, zeros + 3)
    x = activations(tokens, k, (torch.float16, torch.bfloat16)[bits % 2])
    ids, bias = some_ids(tokens * repeats, e, 1), torch.randn(e * n)
    y = packed_experts(weight, x, ids, e, bias, batch_invariant=invariant)
    rows = torch.arange(len(ids)) // repeats
    for number in ids.unique().tolist():
        if 0 <= number < e:
            mine, own = ids == number, bias.view(e, n)[number].clone()
            linear = packed_linear(expert(weight, number, n), x[rows[mine]], own, batch_invariant=invariant)
            assert_bitwise_equal(y[mine], linear)


@needs_emulation
@pytest.mark.parametrize(("tokens", "dtype"), [(4, torch.float32), (4, torch.float16), (40, torch.bfloat16)])
def test_a_row_does_not_depend_on_the_others(tokens, dtype):
    """Of float32 and where it is asked for: any rows, in any order, of any experts."""
    e, n, k, repeats = 4, 19, 520, 2
    weight, x = stack(4, e, n, k, 128, 5), activations(tokens, k, dtype)
    ids = some_ids(tokens * repeats, e, 4).view(tokens, repeats)
    whole = packed_experts(weight, x, ids.flatten(), e, batch_invariant=True).view(tokens, repeats, n)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    for some in (order, order[:1], order[: tokens // 2]):
        part = packed_experts(weight, x[some], ids[some].flatten(), e, batch_invariant=True, order=1)
        assert_bitwise_equal(part.view(-1, repeats, n), whole[some])


@needs_emulation
@pytest.mark.parametrize("tokens", [2, 30])
def test_ids_of_no_expert_here(tokens):
    """All elsewhere; negative ones; ids beyond 32 bits; and, with them, rows that have an expert."""
    e, n, k = 3, 35, 64
    weight, x = stack(5, e, n, k, 32, 2), activations(tokens, k, torch.bfloat16)
    for pattern in ([3, 4], [-1, -7], [2**40, -(2**40)], [-1, 1, 3, 2**32 + 1, -(2**32), 0]):
        ids = torch.tensor(pattern).repeat(tokens)
        assert_right(packed_experts(weight, x, ids, e), weight.dense(), x, ids, e)
    none = packed_experts(weight, x[:0], ids[:0], e)
    assert none.shape == (0, n)


@needs_emulation
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_what_is_not_finite_stays_in_its_rows(tokens, value):
    e, n, k = 2, 9, 300
    weight, x = stack(4, e, n, k, 32, 5), activations(tokens, k, torch.float16)
    ids = torch.arange(2 * tokens) % 3  # of a token, one expert or two
    before = packed_experts(weight, x, ids, e)
    x[1, 299] = value
    y = packed_experts(weight, x, ids, e).view(tokens, 2, n)
    rest = torch.arange(tokens) != 1
    assert_bitwise_equal(y[rest], before.view(tokens, 2, n)[rest])
    here = ids.view(tokens, 2)[1] < e
    assert not y[1][here].isfinite().any()


@needs_emulation
@pytest.mark.parametrize("tokens", [3, 40])
def test_x_at_any_address_and_little_shared_memory(tokens):
    """Rows that begin at no multiple of 16 bytes give the same; so do tiles of fewer rows of float32."""
    e, n, k = 3, 19, 1048
    weight, ids = stack(4, e, n, k, 64, 2), some_ids(2 * tokens, e, 2)
    for dtype in DTYPES:
        room = torch.empty(tokens * k + 1, dtype=dtype)
        x = activations(tokens, k, dtype)
        elsewhere = room[1:].view(tokens, k).copy_(x)
        assert x.data_ptr() % 16 == 0 and elsewhere.data_ptr() % 16
        y = packed_experts(weight, x, ids, e)
        assert_bitwise_equal(packed_experts(weight, elsewhere, ids, e), y)
        assert_bitwise_equal(packed_experts(weight, x, ids, e, shared_bytes=99 << 10), y)


@needs_emulation
def test_a_call_that_is_declined_says_why():
    weight, x = stack(4, 2, 5, 64, 32, 1), activations(20, 64, torch.float16)
    ids = some_ids(40, 2, 0)
    for options, reason in ((dict(int8=True), "no int8 activations"), (dict(shared_bytes=48 << 10), "99 KiB")):
        with pytest.raises(ValueError, match=reason):
            packed_experts(weight, x, ids, 2, **options)


# ------------------------------------------------------------------------------------------------------- compiled code

# (E, N, K, group_size or None, T, r) of decode, and of batch: the ring goes round twice, N fills no block
PTX_SHAPES = ((3, 5, 300, 64, 3, 2), (2, 35, 172, 20, 4, 3), (4, 3, 1400, None, 2, 3))
MORE_PTX_SHAPES = ((2, 7, 429, 64, 20, 2), (3, 5, 308, 20, 13, 1), (1, 33, 520, 128, 35, 1))


@cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(PACKED_EXPERTS, "sm_80", bits)


@cache
def sort_ptx() -> str:
    return cuda_compiled.compile_ptx(EXPERTS_SORT, "sm_80", None)


@needs_nvcc
@pytest.mark.parametrize("bits", COMPILED)
def test_compiled_code(bits, request):
    """Every dtype × kernel of this width, on shapes in rotation. Of the widths, `make test` takes one."""
    verdicts.only_in_turn(request.config, bits, 8)
    for batch, shapes in ((False, PTX_SHAPES), (True, MORE_PTX_SHAPES)):
        for i, dtype in enumerate(DTYPES[batch:]):
            e, n, k, group_size, tokens, repeats = shapes[(bits + i) % 3]
            weight, x = stack(bits, e, n, k, group_size, bits + i), activations(tokens, k, dtype)
            ids = some_ids(tokens * repeats, e, bits + i, (torch.int64, torch.int32)[i % 2])
            bias = torch.randn(e * n)
            y, statistics = cuda_ptx.packed_experts(
                ptx(bits), sort_ptx(), weight, x, ids, e, bias, batch=batch, stages=2 + bits % 2
            )
            assert_right(y, weight.dense(), x, ids, e, bias)
            assert statistics.count("mma.sync") > 0


@needs_nvcc
def test_the_compiled_sort():
    """Tiles that have numbers of their places and that have not, and more rows than threads, against torch's sort."""
    for e, tokens, repeats, shift in ((3, 3, 2, 3), (2, 40, 2, 5), (5, 300, 2, 3)):
        ids = some_ids(tokens * repeats, e, shift)
        tiles, order = cuda_ptx.sorted_rows(sort_ptx(), ids, tokens, e, shift)
        group = torch.where(ids < 0, e + 1, ids.clamp(max=e))
        rows = group.sort(stable=True).indices
        assert_bitwise_equal(order, torch.stack([rows // repeats, rows], 1).int())
        found = [tuple(t) for t in tiles.tolist() if t[3]]
        expected, first = [], 0
        for g, count in enumerate(torch.bincount(group, minlength=e + 2).tolist()):
            for start in range(0, count, 1 << shift):
                what = 1 if g < e else 2 if g == e else 3
                expected.append((g, first + start, min(count - start, 1 << shift), what))
            first += count
        assert found == expected
