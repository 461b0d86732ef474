"""The numerics contract of family ``codebook``, on every backend and ISA of this machine.

Also what the sanitizer build runs, so nothing here compiles or needs more than torch.
"""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch

from lowbit.backends import registry
from lowbit.backends.cpu.backend import CpuBackend
from lowbit.backends.layouts import CANONICAL
from lowbit.backends.reference import quantize_activations
from lowbit.backends.triton import tuning
from lowbit.backends.triton.launch import target_of
from lowbit.codebook.format import CodebookFormat
from lowbit.codebook.module import CodebookLinear
from lowbit.core.bitpack import pack, words_per_row
from lowbit.testing.codebook_cases import BITS, SHAPES, Kind, Weight, kinds, random_bias, random_weight
from lowbit.testing.numerics import U, assert_bitwise_equal, assert_linear_close, frobenius_bound
from lowbit.testing.packed_cases import DTYPES, ROWS, activations, byte_pairs
from lowbit.testing.verdicts import where_params
from lowbit.testing.where import Where, everywhere, running, share

WHERE = everywhere()


@pytest.fixture(params=where_params(WHERE, "lowbit.backends", "lowbit.codebook.op", "lowbit.codebook.triton"), ids=str)
def where(request):
    with running(request.param):
        yield request.param


@functools.cache
def all_weights(bits: int, integers: bool = False) -> list[Weight]:
    return [random_weight(kind, seed, integers=integers) for seed, s in enumerate(SHAPES) for kind in kinds(bits, *s)]


def multiplied(where: Where, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight that float activations of ``dtype`` meet: where they are multiplied in bfloat16, it is rounded.

    Triton's kernels round the table's entries to float16 or bfloat16, and multiply by scales afterwards.
    """
    if where.backend == "triton" and dtype != torch.float32:
        rounded = weight.codebook.to(dtype).float()
        outliers = weight.dense() - weight.dense(outliers=False)
        return replace(weight, codebook=rounded, _dense={}).dense(outliers=False) + outliers
    dense = weight.dense()
    return dense.bfloat16().double() if where.isa == "avx512bf16" and dtype == torch.bfloat16 else dense


def multiplied_densely(weight: Weight, m: int, dtype: torch.dtype) -> bool:
    """Whether so many rows go through the library's product, with the weight dequantized to ``dtype``."""
    target = target_of(torch.device("cpu"))
    kind = weight.kind
    return tuning.choose(target, "codebook_linear", dtype, kind.bits, m, kind.n, kind.k).dense


def test_the_cases_cover_every_kind():
    """Tables, scales and outliers in every combination, at every number of bits."""
    for bits in BITS:
        found = {(w.kind.tables, w.kind.scales, bool(w.kind.outliers)) for w in all_weights(bits)}
        assert found == set(product(("tensor", "row", "group"), ("none", "float", "nested"), (False, True)))


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_definition(where, bits):
    for i, weight in share(where, all_weights(bits), bits % 4, 4):
        exact = weight.dense()
        for _, dtype in share(where, DTYPES, i % 3, 3):
            assert_bitwise_equal(weight.dequantize(dtype), exact.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear(where, bits, dtype):
    for i, weight in share(where, all_weights(bits), DTYPES.index(dtype), 3):
        n, k, m = weight.kind.n, weight.kind.k, ROWS[i % len(ROWS)]
        x = activations(m, k, dtype, seed=i)
        bias = random_bias(i, n)
        y = weight.linear(x, bias)
        assert y.dtype == dtype and y.shape == (m, n)
        assert_linear_close(y, x, multiplied(where, weight, dtype), bias)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_rounded_to_bfloat16_costs_no_more_than_the_output(where, bits):
    weight = random_weight(Kind(bits, 96, 1024, 64, "tensor", "float"))
    x = activations(16, 1024, torch.bfloat16)
    exact = x.double() @ weight.dense().t()
    assert float((weight.linear(x).double() - exact).norm() / exact.norm()) <= frobenius_bound(torch.bfloat16, 1024)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("bits", BITS)
def test_linear_int8(where, bits, static):
    for i, weight in share(where, all_weights(bits), int(static), 2):
        n, k, m, dtype = weight.kind.n, weight.kind.k, ROWS[i % len(ROWS)], DTYPES[i % 3]
        x = activations(m, k, dtype, seed=i)
        x_scale = torch.tensor([0.011]) if static else None
        bias = random_bias(i, n)
        y = weight.linear(x, bias, int8=True, x_scale=x_scale)
        assert y.dtype == dtype and y.shape == (m, n)
        q, inverse = quantize_activations(x, x_scale)
        fixed, step = weight.fixed_point()
        # [x as quantized | x as it is] @ [codes part | outliers].T
        both = torch.cat([q.double() / inverse.double(), x.double()], 1)
        parts = torch.cat([fixed * step.double(), weight.dense() - weight.dense(outliers=False)], 1)
        assert_linear_close(y, both, parts, bias)


@pytest.mark.parametrize("bits", BITS)
def test_fixed_point_weights_are_rounded_as_defined(where, bits):
    """Few small activations, so that sum T·q is below 2**24: then every step has one right result."""
    for i, weight in share(where, all_weights(bits), bits % 3, 3):
        if weight.kind.outliers:
            continue
        g = torch.Generator().manual_seed(i)
        q = torch.randint(-2, 3, (3, weight.kind.k), generator=g).double()
        q *= torch.rand(weight.kind.k, generator=g) < 200 / weight.kind.k
        fixed, step = weight.fixed_point()
        assert float((q.abs() @ fixed.abs().t()).max()) < 1 << 24
        exact = (q @ fixed.t()).float() * step.t() / 2
        assert_bitwise_equal(weight.linear(q.float() / 2, int8=True, x_scale=torch.tensor([0.5])), exact)


@pytest.mark.parametrize("bits", BITS)
def test_fixed_point_weights_are_within_half_a_step(where, bits):
    """And the three float32 roundings before an integer of at most 32767."""
    for _, weight in share(where, all_weights(bits), bits % 8, 8):
        if weight.kind.outliers:
            continue
        one = torch.ones(1)
        found = weight.linear(torch.eye(weight.kind.k), int8=True, x_scale=one).t().double()
        _, step = weight.fixed_point()
        assert float(((found - weight.dense()).abs() / step.double()).max()) <= 0.5 + 4 * 32767 * U


@pytest.mark.parametrize("entry", [0.0, 1e-40, -3e-38])
def test_int8_with_tables_of_zeros_and_of_subnormals(where, entry):
    """Too small for a step: such a weight counts as zero."""
    weight = random_weight(Kind(3, 5, 40, 40, "row"))
    weight.codebook[2] = entry
    y = weight.linear(activations(3, 40, torch.float32), int8=True)
    assert bool(torch.isfinite(y).all()) and not bool(y[:, 2].any())
    assert bool(y[:, [0, 1, 3, 4]].all())


@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(where, bits):
    """Integers times powers of two: every product and sum is exact, so the result has one right value."""
    for seed, weight in share(where, all_weights(bits, integers=True), bits % 3, 3):
        x = torch.randint(-127, 128, (5, weight.kind.k), generator=torch.Generator().manual_seed(seed)).float()
        exact = (x.double() @ weight.dense().t()).float()
        assert_bitwise_equal(weight.linear(x), exact)
        if seed % 2:
            assert_bitwise_equal(weight.linear(x.bfloat16()), exact.bfloat16())


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_int8_sums_do_not_overflow(where, bits):
    """K where the int32 sum of extreme weights and activations would pass 2**31 many times."""
    k = 70_001
    weight = random_weight(Kind(bits, 2, k, k))
    weight.codes.fill_((1 << bits) - 1)
    weight.packed.copy_(pack(weight.codes, bits))
    weight.codebook[..., -1] = 5.0
    weight.codebook.clamp_(-5, 5)
    x = torch.full((2, k), 127.0)
    x[1] = -127.0
    assert_linear_close(weight.linear(x, int8=True), x, weight.dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_identity_activations_give_the_dequantized_weight(where, bits, dtype):
    for _, weight in share(where, all_weights(bits), DTYPES.index(dtype), 16):
        some = slice(None) if weight.kind.k < 200 else slice(DTYPES.index(dtype), None, 3)  # of the dtypes together all
        eye = torch.eye(weight.kind.k)[some].to(dtype)
        y = weight.linear(eye).t().contiguous()
        if where.backend == "triton" and dtype != torch.float32 and not multiplied_densely(weight, len(eye), dtype):
            # one rounding of the entry, and one of the result
            assert_bitwise_equal(y, multiplied(where, weight, dtype).float().to(dtype)[:, some])
        else:
            assert_bitwise_equal(y, weight.dequantize(dtype)[:, some])


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_its_batch_the_threads_or_the_call(where, bits, int8):
    if where.backend != "cpu":
        pytest.skip("promised for the compiled kernels: the reference is torch's matmul, and a GPU has its own test")
    for turn, (n, k, group_size) in enumerate([(37, 172, 32), (130, 256, None), (64, 1088, 64), (19, 100, 7)]):
        for i, kind in enumerate(kinds(bits, n, k, group_size)):
            if (i + turn + bits + int8) % 2:  # half of the product: every two of shape, kind, bits and int8 meet
                continue
            weight = random_weight(kind, i)
            for m, dtype in ((2, DTYPES[i % 2]), (4, DTYPES[2]), (5, DTYPES[i % 3]), (33, DTYPES[(i + bits) % 3])):
                x = activations(m, k, dtype, seed=m)
                torch.set_num_threads(1)
                y = weight.linear(x, int8=int8)
                assert_bitwise_equal(weight.linear(x, int8=int8), y)
                for row in range(0, m, 7):
                    assert_bitwise_equal(weight.linear(x[row : row + 1], int8=int8), y[row : row + 1])
                torch.set_num_threads(3)
                assert_bitwise_equal(weight.linear(x, int8=int8), y)
                torch.set_num_threads(1)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("bits", BITS)
def test_wide_rows_and_many(where, bits, arithmetic):
    """K over several chunks and not in whole blocks, groups of a block or a part of it; M over several blocks."""
    if where.isa not in ("avx512vnni", "avx512bf16") and (bits not in (1, 4) or arithmetic == "float32"):
        pytest.skip("the same code for every number of bits, tested above")
    if where == Where("triton"):
        pytest.skip("too much for the interpreter: backends/triton/test_configurations.py has several tiles and blocks")
    int8, dtype = arithmetic == "int8", torch.float32 if arithmetic == "float32" else torch.bfloat16
    turn = WHERE.index(where) + bits + ("float32", "bfloat16", "int8").index(arithmetic)
    for i, (group_size, tables, scales, outliers) in enumerate(
        [(64, "tensor", "float", 0), (32, "row", "nested", 0), (128, "group", "none", 0), (4200, "row", "float", 0),
         (96, "tensor", "float", 0), (64, "group", "float", 500), (16, "row", "float", 0), (32, "tensor", "float", 500),
         (4200, "tensor", "none", 500), (128, "tensor", "float", 0), (384, "row", "nested", 0),
         (192, "tensor", "float", 0)]
    ):  # fmt: skip
        if (i + turn) % 2:  # half of the product: every two of kind, bits, arithmetic and instruction set meet
            continue
        kind = Kind(bits, 39, 4200, group_size, tables, scales, DTYPES[i % 3], DTYPES[-i % 3], outliers)
        weight = random_weight(kind)
        x = activations(140, 4200, dtype, seed=i)
        y = weight.linear(x, int8=int8)
        if int8:
            q, inverse = quantize_activations(x, None)
            fixed, step = weight.fixed_point()
            both = torch.cat([q.double() / inverse.double(), x.double()], 1)
            parts = torch.cat([fixed * step.double(), weight.dense() - weight.dense(outliers=False)], 1)
            assert_linear_close(y, both, parts)
        else:
            assert_linear_close(y, x, multiplied(where, weight, dtype))
        for rows in (slice(0, 1), slice(130, 133), slice(5, 21), slice(3, 20), slice(0, 133), slice(7, 11)):
            if where.backend == "cpu":
                assert_bitwise_equal(weight.linear(x[rows], int8=int8), y[rows])


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_stays_in_its_row(where, int8, dtype):
    weight = random_weight(Kind(4, 9, 96, 32, "tensor", "float", outliers=20))
    x = activations(4, 96, dtype)
    clean = weight.linear(x, int8=int8)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, 50] = bad
        y = weight.linear(spoiled, int8=int8)
        assert not bool(torch.isfinite(y[2]).any())
        kept = torch.tensor([0, 1, 3])
        assert bool(torch.isfinite(y[kept]).all())
        if where.backend == "cpu":
            assert_bitwise_equal(y[kept], clean[kept])


def test_static_int8_saturates_infinity_and_keeps_nan(where):
    weight, x = random_weight(Kind(8, 3, 40, 40)), torch.zeros(2, 40)
    x[0, 3], x[1, 3] = float("inf"), float("nan")
    y = weight.linear(x, int8=True, x_scale=torch.tensor([0.5]))
    limit = torch.zeros(1, 40)
    limit[0, 3] = 127 * 0.5
    fixed, step = weight.fixed_point()
    assert_linear_close(y[:1], limit, fixed * step.double())
    assert bool(y[1].isnan().all())


@pytest.mark.parametrize("bits", BITS)
def test_embedding_gathers_rows(where, bits):
    for i, weight in share(where, all_weights(bits), bits % 6, 6):
        dtype = DTYPES[i % 3]
        rows = weight.dequantize(dtype)
        for shape in ((), (0,), (2, 3)):
            ids = torch.randint(0, weight.kind.n, shape, dtype=torch.int32 if i % 2 else torch.int64)
            assert_bitwise_equal(weight.embedding(ids, dtype), rows[ids.long()])


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_embedding_refuses_ids_out_of_range(where, bad):
    weight = random_weight(Kind(4, 5, 33, 33))
    if where.backend == "triton":  # checking would wait for the GPU: the row is NaN, the others are not touched
        rows, whole = weight.embedding(torch.tensor([0, bad, 1])), weight.dequantize()
        assert bool(rows[1].isnan().all())
        assert_bitwise_equal(rows[[0, 2]], whole[[0, 1]])
        return
    with pytest.raises(RuntimeError, match=rf"num_embeddings=5.*{bad}"):
        weight.embedding(torch.tensor([0, bad, 1]))


def test_inputs_of_any_layout(where):
    weight = random_weight(Kind(3, 11, 70, 16, "group"))
    x = activations(12, 140, torch.float32)
    dense = weight.dense()
    for strided in (x[:, ::2], x[::3, :70], x[:, :70].t().contiguous().t(), x[:6, 70:].flip(0)):
        assert_bitwise_equal(weight.linear(strided), weight.linear(strided.contiguous()))
        assert_linear_close(weight.linear(strided), strided, dense)
    cube = x[:, :70].reshape(2, 3, 2, 70)
    assert_bitwise_equal(weight.linear(cube), weight.linear(cube.reshape(-1, 70)).view(2, 3, 2, 11))
    assert weight.linear(x[0, :70]).shape == (11,)
    assert weight.linear(x[:0, :70].reshape(0, 4, 70)).shape == (0, 4, 11)


@pytest.mark.parametrize("bits", BITS)
def test_entries_of_any_magnitude_come_back(where, bits):
    """Every bit pattern of a table's entry, subnormals and infinities too, by look-up alone."""
    weight = random_weight(Kind(bits, 3, 200, 200, "row"))
    patterns = torch.randint(-(2**31), 2**31, weight.codebook.shape, dtype=torch.int64).int().view(torch.float32)
    patterns[patterns.isnan()] = float("-inf")
    weight.codebook.copy_(patterns)
    assert_bitwise_equal(weight.dequantize().view(torch.int32), weight.dense().float().view(torch.int32))


def test_huge_pages_are_asked_for_under_canonical_codes(monkeypatch):
    """Advice: the codes stay where and what they are, whatever the system makes of it."""
    if registry.active_backend("cpu") != "cpu":
        pytest.skip("only the compiled kernels ask")
    packed = torch.randint(-(2**31), 2**31, (2048, 1024), dtype=torch.int32)  # several pages of 2 MiB
    place, copy = packed.data_ptr(), packed.clone()
    registry.settle(packed, CANONICAL)
    assert packed.data_ptr() == place
    assert_bitwise_equal(packed, copy)
    asked = []
    monkeypatch.setattr(CpuBackend, "settle", lambda self, codes, layout: asked.append(codes.data_ptr()))
    layer = CodebookLinear(CodebookFormat(4, 64, 64, 64, "row", "float16", "none"), device="cpu")
    layer.prepare()
    assert asked == [layer.packed.data_ptr()]


def test_more_threads_than_rows(where):
    weight, x = random_weight(Kind(5, 1, 40, 40)), activations(3, 40, torch.float32)
    torch.set_num_threads(4)
    try:
        assert_linear_close(weight.linear(x), x, weight.dense())
    finally:
        torch.set_num_threads(1)


def test_more_than_two_to_the_31_weights():
    """Offsets beyond 32 bits: the rows at the far end of a 0.27 GB tensor."""
    if registry.why_unavailable("cpu") is not None:
        pytest.skip("no compiled kernels")
    n, k, bits = 33_000, 65_536, 1
    assert n * k > 1 << 31
    last = torch.randint(0, 2, (2, k), dtype=torch.uint8)
    packed = torch.zeros(n, words_per_row(k, bits), dtype=torch.int32)  # pages that are not touched cost nothing
    packed[-2:] = pack(last, bits)
    codebook = torch.tensor([-1.0, 0.5]).view(1, 1, 2)
    weight = Weight(Kind(bits, n, k, k), last, packed, codebook, None, (None, None, None), (None, None, None))
    dense = codebook.flatten()[last.long()].double()
    x = torch.randint(-3, 4, (1, k)).float()
    for dtype in (torch.float32, torch.bfloat16):
        y = weight.linear(x.to(dtype))
        assert_bitwise_equal(y[:, -2:], (x.double() @ dense.t()).to(dtype))
        assert_bitwise_equal(y[:, :1], (-x.double().sum(-1, keepdim=True)).to(dtype))
    assert_bitwise_equal(weight.embedding(torch.tensor([n - 1, n - 2])), dense.flip(0).float())


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool], ids=str)
def test_activations_of_another_dtype_are_refused(where, dtype, int8):
    weight = random_weight(Kind(4, 8, 96, 32))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        weight.linear(torch.ones(2, 96, dtype=dtype), int8=int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool], ids=str)
def test_ids_of_another_dtype_are_refused(where, dtype):
    weight = random_weight(Kind(4, 8, 96, 32))
    with pytest.raises(RuntimeError, match="ids"):
        weight.embedding(torch.ones(2, dtype=dtype))


def of_nested(index: int, change):
    """A change to one of scale_codebook, scale_absmax and scale_offset."""
    return lambda w: {"nested": tuple(change(t) if i == index else t for i, t in enumerate(w.nested))}


# a change to a 4-bit weight [100, 96] in groups of 32 (G = 3) with nested scales: the arguments, and the error's words
MALFORMED = {
    "words": (lambda w: {"packed": w.packed[:, :-1].contiguous()}, "words per row"),
    "dtype": (lambda w: {"packed": w.packed.long()}, "packed must be int32"),
    "packed 1-d": (lambda w: {"packed": w.packed[0]}, "packed must"),
    "bits 0": (lambda w: {"kind": replace(w.kind, bits=0)}, "bits must be between 1 and 8: got bits=0"),
    "bits 9": (lambda w: {"kind": replace(w.kind, bits=9)}, "bits must be between 1 and 8: got bits=9"),
    "group 0": (
        lambda w: {"kind": replace(w.kind, group_size=0)}, "group_size must be between 1 and K: got group_size=0"
    ),
    "group > K": (
        lambda w: {"kind": replace(w.kind, group_size=97)}, "group_size must be between 1 and K: got group_size=97"
    ),
    "table size": (lambda w: {"codebook": w.codebook[..., :8].contiguous()}, "codebook must be"),
    "tables of other rows": (lambda w: {"codebook": w.codebook.expand(99, 1, 16).contiguous()}, "codebook must be"),
    "tables of other groups": (lambda w: {"codebook": w.codebook.expand(100, 2, 16).contiguous()}, "codebook must be"),
    "tables per group of one row": (
        lambda w: {"codebook": w.codebook.expand(1, 3, 16).contiguous()}, "codebook must be"
    ),
    "flat table": (lambda w: {"codebook": w.codebook.flatten()}, "codebook must be"),
    "table dtype": (lambda w: {"codebook": w.codebook.double()}, "codebook must be float32, float16 or bfloat16"),
    "scale shape": (lambda w: {"scales": w.scales[:, :-1].contiguous()}, "scales must be"),
    "scale rows": (lambda w: {"scales": w.scales[:-1].contiguous()}, "scales must be"),
    "float scales with nested": (lambda w: {"scales": w.scales.float()}, "scales must be uint8 with scale_codebook"),
    "uint8 scales alone": (lambda w: {"nested": (None, None, None)}, "scales must be float32, float16 or bfloat16"),
    "nested without scales": (lambda w: {"scales": None}, "scales must be given with scale_codebook"),
    "nested in part": (of_nested(1, lambda t: None), "must be given together"),
    "nested codebook": (of_nested(0, lambda t: t[:255]), "scale_codebook must be"),
    "nested absmax": (of_nested(1, lambda t: t[:1]), "scale_absmax must be"),
    "nested offset": (of_nested(2, lambda t: t.expand(2).contiguous()), "scale_offset must be"),
    "nested dtype": (of_nested(0, lambda t: t.half()), "scale_codebook must be float32"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_arguments_are_refused(where, name):
    weight = random_weight(Kind(4, 100, 96, 32, "tensor", "nested"))
    change, message = MALFORMED[name]
    weight = replace(weight, **change(weight))
    for call in (
        lambda: weight.linear(torch.randn(2, 96)),
        lambda: weight.linear(torch.randn(2, 96), int8=True),
        lambda: weight.dequantize(),
        lambda: weight.embedding(torch.tensor([0])),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


# what only the kernels check, because it would make them read outside of a tensor or divide by zero
UNSAFE = {
    "a column too large": (lambda v, c, r: (v, c.fill_(96), r), "outlier_columns must be between 0 and K - 1: got 96"),
    "a negative column": (lambda v, c, r: (v, c.fill_(-1), r), "outlier_columns must be between 0 and K - 1: got -1"),
    "columns of another dtype": (lambda v, c, r: (v, c.long(), r), "outlier_columns must be int16"),
    "values of another dtype": (lambda v, c, r: (v.double(), c, r), "outlier_values must be float32"),
    "rows that fall": (lambda v, c, r: (v, c, r.flip(0)), "outlier_rows must rise from 0"),
    "rows beyond the end": (lambda v, c, r: (v, c, r + 1), "outlier_rows must rise from 0"),
    "rows of another dtype": (lambda v, c, r: (v, c, r.long()), "outlier_rows must be int32"),
    "too few rows": (lambda v, c, r: (v, c, r[:-1]), "outlier_rows must be of shape"),
    "too few columns": (lambda v, c, r: (v, c[:-1], r), "outlier_columns must be of shape"),
    "pairs that are singles": (lambda v, c, r: (v, c.byte(), r), "outlier_columns must be of shape .*11, 2]"),
    "too few pairs": (lambda v, c, r: (v, byte_pairs(c)[:-1], r), "outlier_columns must be of shape .*11, 2]"),
    "bytes in threes": (lambda v, c, r: (v, c.byte()[:, None].expand(-1, 3), r), "outlier_columns must be of shape"),
    "values alone": (lambda v, c, r: (v, None, None), "must be given together"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_malformed_outliers_are_refused(where, name):
    if where.backend == "reference":
        pytest.skip("torch checks its own indices")
    if where.backend == "triton" and ("be between" in UNSAFE[name][1] or "rise" in UNSAFE[name][1]):
        pytest.skip("looking at values would wait for the GPU: the layer has checked them")
    weight = random_weight(Kind(4, 8, 96, 32, outliers=11))
    change, message = UNSAFE[name]
    weight = replace(weight, outliers=change(*weight.outliers))
    x, ids = torch.randn(2, 96), torch.tensor([0])
    for call in (lambda: weight.linear(x), weight.dequantize, lambda: weight.embedding(ids)):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("int8", [False, True])
def test_columns_of_outliers_as_pairs_of_bytes(where, int8):
    """Bit for bit what other integers give, also beyond int16."""
    for k in (96, 700, 40000):
        weight = random_weight(Kind(2, 3, k, 32, outliers=40))
        values, columns, rows = weight.outliers
        columns[-1] = k - 1
        paired = replace(weight, outliers=(values, byte_pairs(columns.int()), rows))
        x = activations(2, k, torch.float32)
        assert_bitwise_equal(paired.linear(x, int8=int8), weight.linear(x, int8=int8))
        assert_bitwise_equal(paired.dequantize(), weight.dequantize())
        assert_bitwise_equal(paired.embedding(torch.tensor([2, 0])), weight.embedding(torch.tensor([2, 0])))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_a_static_scale_that_cannot_be_is_refused(where, value):
    if where.backend != "cpu":
        pytest.skip("the layer checks it; the CPU's kernels because they divide by it")
    weight, x = random_weight(Kind(4, 8, 96, 32)), torch.randn(2, 96)
    with pytest.raises(RuntimeError, match="x_scale must be positive and finite"):
        weight.linear(x, int8=True, x_scale=torch.tensor([value]))
    with pytest.raises(RuntimeError, match="x_scale is for int8 activations"):
        weight.linear(x, x_scale=torch.ones(1))


def test_bias_of_another_shape_is_refused(where):
    weight = random_weight(Kind(4, 8, 96, 32))
    with pytest.raises(RuntimeError, match=r"bias must be of shape|size of tensor"):
        weight.linear(torch.randn(2, 96), torch.zeros(7))
