"""Stacks of experts of family ``codebook`` by the CUDA C++ kernels (``csrc/cuda/codebook/experts.cuh``)."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import CODEBOOK_EXPERTS, EXPERTS_SORT
from lowbit.testing import cuda_codebook, cuda_emulated, verdicts
from lowbit.testing.codebook_cases import Weight
from lowbit.testing.cuda_planted.codebook_experts import KINDS, SHAPES, stack
from lowbit.testing.cuda_planted.packed_experts import assert_right, some_ids
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")
WIDTHS = cuda_emulated.WIDTHS
DTYPES = (torch.float16, torch.bfloat16)


@needs_emulation
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_rows_meet_their_experts(number, bits):
    e, n, k, group_size, tokens, repeats = SHAPES[number]
    i = 2 * number + 5 * bits
    weight, x = stack(bits, e, n, k, group_size, i), activations(tokens, k, DTYPES[(number + bits) % 2])
    ids = some_ids(tokens * repeats, e, i, (torch.int64, torch.int32)[number % 2])
    bias = torch.randn(e * n) if i % 2 else None
    y = cuda_codebook.experts(weight, x, ids, e, bias, order=number % 2)
    assert_right(y, cuda_codebook.multiplied(weight, x.dtype), x, ids, e, bias)


def expert(weight: Weight, number: int, e: int) -> Weight:
    """Its rows of the stack, as a weight of its own, without outliers."""
    kind, n = weight.kind, weight.kind.n // e
    at = slice(number * n, (number + 1) * n)
    own = kind.tables != "tensor"
    scales = None if weight.scales is None else weight.scales[at].contiguous()
    cut, absmax, offset = weight.nested
    if absmax is not None:
        size = n * kind.groups // 256
        absmax = absmax[number * size : (number + 1) * size].clone()
    one = type(kind)(kind.bits, n, kind.k, kind.group_size, kind.tables, kind.scales, kind.dtype, kind.scale_dtype)
    tables = weight.codebook[at].contiguous() if own else weight.codebook
    codes, packed, none = weight.codes[at], weight.packed[at].contiguous(), (None, None, None)
    return Weight(one, codes, packed, tables, scales, (cut, absmax, offset), none)


@needs_emulation
@pytest.mark.parametrize("regime", ["decode", "batch"])
@pytest.mark.parametrize("bits", [4, 3, 6])
@pytest.mark.parametrize("kind", range(9), ids=lambda i: " ".join(KINDS[i]))
def test_a_row_has_the_bits_that_its_experts_linear_gives(kind, bits, regime):
    e, n, k, tokens, repeats = 3, 64, 128, 5, 2
    invariant = regime == "batch"
    if bits > 4 and KINDS[kind][0] == "group" and not invariant:
        return  # decode_simt's for a linear, batch's for a stack: other orders of sums
    weight = stack(bits, e, n, k, 32, kind, sparse=False)
    x, ids = activations(tokens, k, DTYPES[bits % 2]), some_ids(tokens * repeats, e, 1)
    bias, rows = torch.randn(e * n), torch.arange(tokens * repeats) // repeats
    y = cuda_codebook.experts(weight, x, ids, e, bias, batch_invariant=invariant)
    for number in ids.unique().tolist():
        if 0 <= number < e:
            mine, own = ids == number, bias.view(e, n)[number].clone()
            linear = cuda_codebook.linear(expert(weight, number, e), x[rows[mine]], own, batch_invariant=invariant)
            assert_bitwise_equal(y[mine], linear)


@needs_emulation
@pytest.mark.parametrize("tokens", [4, 33])
def test_small_integers_are_exact(tokens):
    e, n, k, repeats = 3, 9, 300, 2
    for bits, dtype in ((3, torch.float16), (4, torch.float16), (5, torch.bfloat16)):
        weight = stack(bits, e, n, k, 50, 4, integers=True)
        x = torch.randint(-2, 3, (tokens, k), generator=torch.Generator().manual_seed(1)).to(dtype)
        ids = some_ids(tokens * repeats, e, 2).clamp(min=0)
        y = cuda_codebook.experts(weight, x, ids, e)
        dense = torch.cat([weight.dense().view(e, n, k), torch.zeros(3, n, k, dtype=torch.float64)])
        exact = torch.einsum("snk,sk->sn", dense[ids], x.double().repeat_interleave(repeats, 0))
        assert_bitwise_equal(y, exact.to(dtype))


@needs_emulation
@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float32, {}, "x in float16 or bfloat16"),
        (torch.float16, dict(int8=True), "no int8 activations"),
    ],
)
def test_a_call_that_is_declined_says_why(dtype, options, reason):
    weight, x = stack(4, 2, 5, 64, 32, 1), activations(4, 64, dtype)
    with pytest.raises(ValueError, match=reason):
        cuda_codebook.experts(weight, x, some_ids(8, 2, 0), 2, **options)


@cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(CODEBOOK_EXPERTS, "sm_80", bits)


@cache
def sort_ptx() -> str:
    return cuda_compiled.compile_ptx(EXPERTS_SORT, "sm_80", None)


# (E, N, K, group_size, T, r): the ring goes round twice, N fills no block; an expert has whole blocks of nested scales
PTX_SHAPES = ((3, 5, 300, 60, 3, 2), (2, 64, 128, 32, 4, 2), (2, 35, 520, 128, 13, 2))


@needs_nvcc
@pytest.mark.parametrize("bits", range(1, 9))
def test_compiled_code(bits, request):
    """Every dtype × kernel of this width, tables and scales in rotation. Of the widths, `make test` takes one."""
    verdicts.only_in_turn(request.config, bits, 8)
    for i in range(6):
        batch, dtype = bool(i % 2), DTYPES[i // 2 % 2]
        e, n, k, group_size, tokens, repeats = PTX_SHAPES[(bits + i) % 3]
        weight = stack(bits, e, n, k, group_size, (2 if n == 64 else 0) + 3 * i + bits % 3)
        batch |= bits > 4 and cuda_codebook.tables_of(weight) == "group"  # decode has no such tables
        x, ids = activations(tokens, k, dtype), some_ids(tokens * repeats, e, bits + i)
        bias = torch.randn(e * n)
        y, statistics = cuda_codebook.execute_experts(
            ptx(bits), sort_ptx(), weight, x, ids, e, bias, batch=batch, stages=2 + bits % 2, copies=i % 2
        )
        assert_right(y, cuda_codebook.multiplied(weight, x.dtype), x, ids, e, bias)
        assert statistics.count("mma.sync") > 0
