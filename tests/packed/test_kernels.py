"""The numerics contract of family ``packed``, on every backend and ISA of this machine.

Also what the sanitizer build runs, so nothing here compiles or needs more than torch.
"""

import functools
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.backends import registry
from lowbit.backends.cpu import blocks, native
from lowbit.backends.layouts import by_group, words_per_row
from lowbit.backends.reference import quantize_activations
from lowbit.core.bitpack import pack
from lowbit.packed.format import PackedFormat
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import (
    BITS,
    DTYPES,
    ROWS,
    SHAPES,
    Weight,
    activations,
    byte_pairs,
    formats,
    hard_rows,
    random_weight,
)
from lowbit.testing.verdicts import where_params
from lowbit.testing.where import call, everywhere, running, share

WHERE = everywhere()


@pytest.fixture(params=where_params(WHERE, "lowbit.backends", "lowbit.packed.op", "lowbit.packed.triton"), ids=str)
def where(request):
    with running(request.param):
        yield request.param


def row_format(bits: int, n: int, k: int, **fields) -> PackedFormat:
    return PackedFormat(bits, n, k, k, "row", **fields)


def grouped(bits: int, n: int, k: int, group_size: int, **fields) -> PackedFormat:
    return PackedFormat(bits, n, k, group_size, "group", **fields)


@functools.cache
def all_weights(bits: int) -> list[Weight]:
    return [random_weight(f, seed) for seed, shape in enumerate(SHAPES) for f in formats(bits, *shape)]


def test_the_compiled_kernels_are_what_is_tested():
    """On a machine with a compiler this suite must not silently shrink to the reference."""
    reason = registry.why_unavailable("cpu")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    assert native.isas()[-1] == "scalar"
    assert [str(w) for w in WHERE][: 1 + len(native.isas())] == ["reference", *native.isas()]


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_definition(where, bits):
    for i, weight in share(where, all_weights(bits), bits % 2, 2):
        exact = weight.dense()
        for _, dtype in share(where, DTYPES, i % 3, 3):
            assert_bitwise_equal(weight.dequantize(dtype), exact.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear(where, bits, dtype):
    for i, weight in share(where, all_weights(bits), DTYPES.index(dtype), 3):
        n, k = weight.format.out_features, weight.format.in_features
        dense, m = weight.dense(), ROWS[i % len(ROWS)]
        x = activations(m, k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, n, DTYPES[i % 3], seed=n)[0]
        y = weight.linear(x, bias)
        assert y.dtype == dtype and y.shape == (m, n)
        assert_linear_close(y, x, dense, bias)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear_int8(where, bits, dtype, static):
    for i, weight in share(where, all_weights(bits), DTYPES.index(dtype) + 3 * static, 6):
        n, k = weight.format.out_features, weight.format.in_features
        m = ROWS[i % len(ROWS)]
        x = activations(m, k, dtype, seed=i)
        x_scale = torch.tensor([0.011]) if static else None
        bias = None if i % 3 == 0 else activations(1, n, DTYPES[i % 3], seed=n)[0]
        y = weight.linear(x, bias, int8=True, x_scale=x_scale)
        assert y.dtype == dtype and y.shape == (m, n)
        q, inverse = quantize_activations(x, x_scale)
        # [x as quantized | x as it is] @ [codes part | outliers].T
        codes_part = weight.dense(outliers=False)
        both = torch.cat([q.double() / inverse.double(), x.double()], 1)
        assert_linear_close(y, both, torch.cat([codes_part, weight.dense() - codes_part], 1), bias)


# Whole panels of 64 rows, blocks of 16 behind them and rows behind those; groups of whole units, of quads, of neither
BLOCKED = ((64, 96, None), (148, 260, 64), (83, 160, 32), (64, 2304, 128), (133, 90, 20), (64, 70, 7), (80, 1100, 1100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_codes_in_blocks(where, bits, dtype):
    """Every number of rows of x that has a tile of its own: right, and bit for bit what canonical words give."""
    if where.backend != "cpu":
        pytest.skip("blocks are what the compiled kernels read")
    for i, (n, k, group_size) in enumerate(BLOCKED):
        formats_ = list(formats(bits, n, k, group_size))
        weight = random_weight(formats_[(bits + i + 2 * DTYPES.index(dtype)) % len(formats_)], i)
        words, dense = weight.packed, weight.dense()
        bias, x = torch.randn(n), activations(131, k, dtype, seed=i)
        plain, int8 = weight.linear(x, bias), weight.linear(x, bias, int8=True)
        assert_linear_close(plain, x, dense, bias)
        weight.packed = blocks.block(words, bits)
        if weight.format.granularity == "group":
            weight.scales = by_group(weight.scales)
            weight.zeros = None if weight.zeros is None else by_group(weight.zeros)
        assert weight.packed.dim() == 4
        numbers = (1, 2, 3, 4, 5, 8, 11, 16, 19, 31, 38, 128, 131)
        # of a large weight every other number, the others at the next number of bits and of the next dtype
        for m in numbers if n * k < 50_000 else numbers[(bits + i + DTYPES.index(dtype)) % 2 :: 2]:
            assert_bitwise_equal(weight.linear(x[:m], bias), plain[:m])
            assert_bitwise_equal(weight.linear(x[:m], bias, int8=True), int8[:m])
        assert_bitwise_equal(weight.dequantize(), dense.float())
        ids = torch.tensor([0, n - 1, 17 % n])
        assert_bitwise_equal(weight.embedding(ids), dense.float()[ids])


@pytest.mark.parametrize("bits", BITS)
def test_codes_in_blocks_with_activations_in_groups(where, bits):
    """Every number of rows of x that has a tile of its own: bit for bit what canonical words and more rows give."""
    if where.backend != "cpu":
        pytest.skip("blocks are what the compiled kernels read")
    for i, (n, k, group_size, x_group) in enumerate(IN_GROUPS):
        choices = list(formats(bits, n, k, group_size))
        weight = random_weight(choices[(bits + i) % len(choices)], i)
        bias, x = torch.randn(n), uneven(131, k, DTYPES[(bits + i) % 3], seed=i)
        y = weight.linear(x, bias, int8=True, x_group=x_group)
        weight.packed = blocks.block(weight.packed, bits)
        if weight.format.granularity == "group":
            weight.scales = by_group(weight.scales)
            weight.zeros = None if weight.zeros is None else by_group(weight.zeros)
        numbers = (*range(1, 20), 131)
        for m in numbers if n * k < 50_000 else numbers[(bits + i) % 2 :: 2]:  # the others at the next number of bits
            assert_bitwise_equal(weight.linear(x[:m], bias, int8=True, x_group=x_group), y[:m])


@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_int8_rows_of_small_magnitude(where, zeros):
    """Against float64 arithmetic on q = round(x * 127 / max|x|); below 2**-100 a row counts as zero."""
    weight = random_weight(grouped(4, 9, 172, 32, zeros=zeros))
    x = activations(5, 172, torch.float32)
    x *= (torch.tensor([1.0, 1e-5, 1e-25, 1e-32, 0.0]) / x.abs().amax(-1))[:, None]
    bias = torch.randn(9)
    scale = x[:3].double().abs().amax(-1, keepdim=True) / 127
    quantized = (x[:3].double() / scale).round() * scale
    y = weight.linear(x, int8=True)
    assert_linear_close(y[:3], quantized, weight.dense())
    assert_bitwise_equal(y[3:], torch.zeros(2, 9))
    assert_linear_close(weight.linear(x, bias, int8=True)[:3], quantized, weight.dense(), bias)
    assert_bitwise_equal(weight.linear(x, bias, int8=True)[3:], bias.expand(2, -1))


# (N, K, group_size or None, x_group): groups of x as fine as those of w, finer, coarser; cut by a segment, and longer
# than one; whole panels, blocks behind them, rows behind those; a last group that is shorter, or alone
IN_GROUPS = (
    (64, 96, None, 32), (13, 172, 32, 32), (83, 172, None, 64), (66, 260, 64, 32), (148, 300, 32, 128),
    (80, 500, 7, 224), (17, 130, 20, 160), (33, 200, 8, 96), (64, 2400, 2304, 768), (5, 5000, None, 3072),
    (70, 4500, 128, 4096), (9, 33, 33, 32), (16, 100, 50, 1600), (1, 31, None, 64),
)  # fmt: skip


def as_quantized(x: torch.Tensor, x_group: int) -> torch.Tensor:
    """What x stands for, in float64: of each group ``q / inverse``, ``q = round(x * inverse)``, ``inverse = 127 / max``
    with the two float32 roundings of ``(1 / max) * 127``."""
    parts = []
    for part in x.float().split(x_group, 1):
        inverse = part.abs().amax(1, keepdim=True).reciprocal() * 127
        parts.append((part * inverse).round().double() / inverse.double())
    return torch.cat(parts, 1)


def uneven(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Activations whose magnitude changes every 32 columns: a scale of another group is far off."""
    steps = torch.randint(-4, 5, (-(-k // 32),), generator=torch.Generator().manual_seed(seed))
    return (activations(m, k, torch.float32, seed) * torch.exp2(steps.float()).repeat_interleave(32)[:k]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear_int8_in_groups(where, bits, dtype):
    turn = bits + 2 * DTYPES.index(dtype)
    for i, (n, k, group_size, x_group) in share(where, IN_GROUPS, turn % 7, 7):
        choices = list(formats(bits, n, k, group_size))
        weight = random_weight(choices[(turn + i) % len(choices)], i)
        m, bias = ROWS[(turn + i) % len(ROWS)], None if i % 3 == 0 else activations(1, n, DTYPES[i % 3], seed=n)[0]
        x = uneven(m, k, dtype, seed=i)
        y = weight.linear(x, bias, int8=True, x_group=x_group)
        assert y.dtype == dtype and y.shape == (m, n)
        # [x as quantized | x as it is] @ [codes part | outliers].T
        codes_part = weight.dense(outliers=False)
        both = torch.cat([as_quantized(x, x_group), x.double()], 1)
        assert_linear_close(y, both, torch.cat([codes_part, weight.dense() - codes_part], 1), bias)


@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_in_groups_is_exact(where, bits):
    for i, (n, k, group_size, x_group) in share(where, IN_GROUPS, bits % 7, 7):
        choices = list(formats(bits, n, k, group_size))
        weight = random_weight(choices[(bits + i) % len(choices)], i, power_of_two=True)
        x = torch.randint(-15, 16, (5, k), generator=torch.Generator().manual_seed(i)).float()
        x[:, ::x_group] = 127.0  # every group: a power of two as its scale
        x *= torch.exp2(torch.arange(-(-k // x_group)) % 3 - 1.0).repeat_interleave(x_group)[:k]
        exact = (x.double() @ weight.dense().t()).float()
        assert_bitwise_equal(weight.linear(x, int8=True, x_group=x_group), exact)


@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_int8_groups_of_any_magnitude(where, zeros):
    """Groups far apart in size, and close to the ends of float32; below 2**-100 a group counts as zero."""
    weight = random_weight(grouped(4, 9, 172, 32, zeros=zeros))
    x = activations(4, 172, torch.float32)
    x *= torch.tensor([1.0, 1e-5, 1e-25, 5e35])[:, None]
    x[0] *= torch.tensor([1.0, 1e-3, 1e10, 1.0, 1e-10, 1e5]).repeat_interleave(32)[:172]
    x[1, 32:64], x[2, 160:] = 1e-32, 0.0
    stands_for = as_quantized(x, 32)
    stands_for[1, 32:64], stands_for[2, 160:] = 0.0, 0.0
    assert_linear_close(weight.linear(x, int8=True, x_group=32), stands_for, weight.dense())
    assert_bitwise_equal(weight.linear(torch.zeros(2, 172), int8=True, x_group=64), torch.zeros(2, 9))


def test_one_group_of_activations_is_a_row(where):
    weight, x = random_weight(grouped(5, 70, 172, 32, outliers=9)), activations(7, 172, torch.float32)
    for x_group in (192, 1024):
        assert_bitwise_equal(weight.linear(x, int8=True, x_group=x_group), weight.linear(x, int8=True))


BAD_GROUPS = (
    (dict(x_group=48), "x_group must be 0 .* multiple of 32: got x_group=48"),
    (dict(x_group=-32), "x_group must be 0 .* multiple of 32: got x_group=-32"),
    (dict(x_group=64), "must divide group_size or be a multiple of it: got x_group=64, group_size=48"),
    (dict(x_group=96, int8=False), "int8 activations quantized when called: got x_group=96 with int8=False"),
    (dict(x_group=96, x_scale=torch.ones(1)), "int8 activations quantized when called: got x_group=96 with x_scale"),
)


@pytest.mark.parametrize(("arguments", "message"), BAD_GROUPS, ids=[message[-20:] for _, message in BAD_GROUPS])
def test_bad_groups_of_activations_are_refused(where, arguments, message):
    weight = random_weight(grouped(4, 8, 480, 48))
    with pytest.raises((RuntimeError, ValueError), match=message):
        weight.linear(torch.randn(2, 480), **{"int8": True, **arguments})


def test_activation_quantization_rounds_half_to_even_and_saturates():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0], [0.0] * 6, [1e-3, -2e-3, 5e-4, 0, 0, 0]])
    q, inverse = quantize_activations(x, None)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -127] and float(inverse[0]) == 1.0
    assert q[1].tolist() == [0] * 6 and float(inverse[1]) == 1.0
    assert q[2].tolist() == [64, -127, 32, 0, 0, 0]
    q, inverse = quantize_activations(x, torch.tensor([0.5]))
    assert q[0].tolist() == [127, 1, 3, 5, -1, -127] and inverse.flatten().tolist() == [2.0] * 3


@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(where, bits):
    """Integers times powers of two: every product and sum is exact, so the result has one right value."""
    for seed, (n, k, group_size) in enumerate(SHAPES):
        for _, format in share(where, list(formats(bits, n, k, group_size)), seed % 3, 3):
            weight = random_weight(format, seed, power_of_two=True)
            x = torch.randint(-127, 128, (5, k), generator=torch.Generator().manual_seed(seed)).float()
            x[:, 0] = 127  # int8 activations: scale 1
            exact = (x.double() @ weight.dense().t()).float()
            assert_bitwise_equal(weight.linear(x), exact)
            assert_bitwise_equal(weight.linear(x, int8=True), exact)
            assert_bitwise_equal(weight.linear(x, int8=True, x_scale=torch.ones(1)), exact)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_sums_do_not_overflow(where, bits):
    """K where the int32 sum of extreme codes and activations would pass 2**31."""
    k = 70_001
    format = row_format(bits, 2, k, zeros="int")
    weight = random_weight(format)
    weight.codes.fill_((1 << bits) - 1)
    weight.packed.copy_(pack(weight.codes, bits))
    assert weight.zeros is not None
    weight.zeros.zero_()
    weight.scales.fill_(2.0**-10)
    x = torch.full((2, k), 127.0)
    x[1] = -127.0
    exact = x.double() @ weight.dense().t()
    assert float((weight.linear(x, int8=True).double() - exact).abs().max()) <= float(exact.abs().max()) * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_identity_activations_give_the_dequantized_weight(where, bits, dtype):
    for _, weight in share(where, all_weights(bits), DTYPES.index(dtype), 12):
        k = weight.format.in_features
        some = slice(None) if k < 200 else slice(DTYPES.index(dtype), None, 3)  # of the dtypes together all
        eye = torch.eye(k)[some].to(dtype)
        assert_bitwise_equal(weight.linear(eye).t().contiguous(), weight.dequantize(dtype)[:, some])


MODES = ("float", "int8", "int8 in groups")


def mode_of(mode: str, group_size: int | None) -> dict[str, int]:
    """How ``Weight.linear`` takes its activations."""
    size = group_size or 32
    x_group = size if size % 32 == 0 else 32 * size
    return {"float": {}, "int8": {"int8": True}, "int8 in groups": {"int8": True, "x_group": x_group}}[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_its_batch_the_threads_or_the_call(where, bits, mode):
    if where.backend != "cpu":
        pytest.skip("promised for the compiled kernels: the reference is torch's matmul, and a GPU has its own test")
    for turn, (n, k, group_size) in enumerate([(37, 172, 32), (130, 256, None), (64, 320, 64), (19, 300, 7)]):
        for i, format in enumerate(formats(bits, n, k, group_size)):
            # half of the product: every two of shape, zeros, outliers, bits and mode meet
            if (i + i // 2 + turn + bits + MODES.index(mode)) % 2:
                continue
            weight = random_weight(format, i)
            for m in (2, 5, 16, 33, 70):
                x = activations(m, k, DTYPES[i % 3], seed=m)
                torch.set_num_threads(1)
                y = weight.linear(x, **mode_of(mode, group_size))
                assert_bitwise_equal(weight.linear(x, **mode_of(mode, group_size)), y)
                for row in range(0, m, 7):
                    assert_bitwise_equal(weight.linear(x[row : row + 1], **mode_of(mode, group_size)), y[row : row + 1])
                torch.set_num_threads(3)
                assert_bitwise_equal(weight.linear(x, **mode_of(mode, group_size)), y)
                torch.set_num_threads(1)


@pytest.mark.parametrize("bits", BITS)
def test_few_rows_where_the_batch_may_matter(where, bits):
    """bfloat16 rows are then multiplied as float32 ones are: up to 4 bits one, at 8 bits up to three."""
    if where.backend != "cpu":
        pytest.skip("how the compiled kernels run")
    few, differ = {2: 1, 3: 1, 4: 1, 8: 3}.get(bits, 0) if where.isa == "avx512bf16" else 0, False
    for i, format in enumerate(formats(bits, 70, 644, 64)):
        weight = random_weight(format, i)
        for m in (1, 2, 3, 4, 16):
            x = (activations(m, 644, torch.float32, seed=m) * 10 ** torch.arange(644).sin()).bfloat16()
            bias = -weight.linear(x[:1].float())[0]  # what is left of the first row is what the roundings differ by
            y, as_float32 = weight.linear(x, bias), weight.linear(x.float(), bias)
            with lowbit.batch_invariant(False):
                faster = weight.linear(x, bias)
                assert_bitwise_equal(weight.linear(x.float(), bias), as_float32)
            assert_bitwise_equal(faster, as_float32.to(torch.bfloat16) if m <= few else y)
            assert_bitwise_equal(weight.linear(x, bias), y)
            differ |= m > 4 and not torch.equal(y, as_float32.to(torch.bfloat16))
    assert differ == (where.isa == "avx512bf16")


@pytest.mark.parametrize("mode", MODES)
def test_many_rows_are_multiplied_in_several_passes(where, mode):
    """More than the working memory that is kept has room for."""
    if where.backend != "cpu":
        pytest.skip("how the compiled kernels run")
    weight = random_weight(PackedFormat(4, 20, 4096, 4096, "row", "int", "float32", outliers=9))
    x = activations(1200, 4096, torch.float32)
    y = weight.linear(x, **mode_of(mode, None))
    for row in (0, 1, 383, 384, 767, 768, 1151, 1152, 1199):
        assert_bitwise_equal(weight.linear(x[row : row + 1], **mode_of(mode, None)), y[row : row + 1])


def test_columns_of_outliers_as_pairs_of_bytes(where):
    """Bit for bit what other integers give; at any address."""
    weight = random_weight(grouped(4, 20, 700, 64, outliers=40))
    values, columns, rows = weight.outliers
    columns[-1] = 699
    spaced = torch.zeros(81, dtype=torch.uint8)
    pairs = spaced[where.backend == "cpu" :][:80].view(40, 2).copy_(byte_pairs(columns))
    paired = replace(weight, outliers=(values, pairs, rows))
    x = activations(2, 700, torch.float32)
    assert_bitwise_equal(paired.linear(x), weight.linear(x))
    assert_bitwise_equal(paired.dequantize(), weight.dequantize())
    assert_bitwise_equal(paired.embedding(torch.tensor([19, 0])), weight.embedding(torch.tensor([19, 0])))


@pytest.mark.parametrize("mode", MODES)
def test_not_a_number_stays_in_its_row(where, mode):
    weight = random_weight(grouped(4, 9, 96, 32))
    x = activations(4, 96, torch.float32)
    clean = weight.linear(x, **mode_of(mode, 32))
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, 50] = bad
        y = weight.linear(spoiled, **mode_of(mode, 32))
        assert not bool(torch.isfinite(y[2]).any())
        kept = torch.tensor([0, 1, 3])
        assert bool(torch.isfinite(y[kept]).all())
        if where.backend == "cpu":
            assert_bitwise_equal(y[kept], clean[kept])


def test_static_int8_saturates_infinity_and_keeps_nan(where):
    weight, x = random_weight(row_format(8, 3, 40)), torch.zeros(2, 40)
    x[0, 3], x[1, 3] = float("inf"), float("nan")
    y = weight.linear(x, int8=True, x_scale=torch.tensor([0.5]))
    limit = torch.zeros(1, 40)
    limit[0, 3] = 127 * 0.5
    assert_linear_close(y[:1], limit, weight.dense())
    assert bool(y[1].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_embedding_gathers_rows(where, bits, dtype):
    for i, weight in share(where, all_weights(bits), 2 * DTYPES.index(dtype) + bits % 2, 6):
        n = weight.format.out_features
        rows = weight.dequantize(dtype)
        for shape in ((), (0,), (7,), (2, 3)):
            ids = torch.randint(0, n, shape, dtype=torch.int32 if i % 2 else torch.int64)
            assert_bitwise_equal(weight.embedding(ids, dtype), rows[ids.long()])


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_embedding_refuses_ids_out_of_range(where, bad):
    weight = random_weight(row_format(4, 5, 33))
    if where.backend == "triton":  # checking would wait for the GPU: the row is NaN, the others are not touched
        rows, whole = weight.embedding(torch.tensor([0, bad, 1])), weight.dequantize()
        assert bool(rows[1].isnan().all())
        assert_bitwise_equal(rows[[0, 2]], whole[[0, 1]])
        return
    with pytest.raises(RuntimeError, match=rf"num_embeddings=5.*{bad}"):
        weight.embedding(torch.tensor([0, bad, 1]))


def test_inputs_of_any_layout(where):
    weight = random_weight(grouped(3, 11, 70, 16))
    x = activations(12, 140, torch.float32)
    dense = weight.dense()
    for strided in (x[:, ::2], x[::3, :70], x[:, :70].t().contiguous().t(), x[:6, 70:].flip(0)):
        assert_bitwise_equal(weight.linear(strided), weight.linear(strided.contiguous()))
        assert_linear_close(weight.linear(strided), strided, dense)
    cube = x[:, :70].reshape(2, 3, 2, 70)
    assert_bitwise_equal(weight.linear(cube), weight.linear(cube.reshape(-1, 70)).view(2, 3, 2, 11))
    assert weight.linear(x[0, :70]).shape == (11,)
    assert weight.linear(x[:0, :70].reshape(0, 4, 70)).shape == (0, 4, 11)


def test_large_magnitudes_and_subnormals_round_like_torch(where):
    """The output's conversion: overflow to infinity, subnormals, ties."""
    n, k = 1, 32
    weight = random_weight(row_format(8, n, k))
    weight.codes.fill_(129)  # code - zero = 1
    weight.packed.copy_(pack(weight.codes, 8))
    weight.scales.fill_(1.0)
    x = torch.zeros(64, k)
    x[:, 0] = torch.tensor([65504.0, 65519.9, 65520.0, 1e-7, 6e-8, 2.9e-8, 3.1e-8, 1.0009765625] * 8)
    x = (x.view(torch.int32) & -4).view(torch.float32)  # 22 bits, which every instruction set holds exactly
    y32 = weight.linear(x)
    assert_bitwise_equal(y32[:, 0], x[:, 0])
    for dtype in (torch.float16, torch.bfloat16):
        narrow = x.to(dtype)
        finite = torch.isfinite(narrow).all(1)
        assert_bitwise_equal(weight.linear(narrow[finite])[:, 0], narrow[finite][:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_every_element_of_x_counts_whatever_its_weights_are(where, bits, dtype):
    """A row of W with one weight that is not 0 (with float zeros: close to 0), or a column of zeros."""
    if where.backend == "triton":
        pytest.skip("said of the compiled kernels and of the reference")
    for i, (n, k, group_size) in enumerate([(66, 700, 64), (83, 256, 32), (16, 1100, None), (35, 130, 7)]):
        choices = [f for f in formats(bits, n, k, group_size) if f.granularity != "tensor" and not f.outliers]
        weight = random_weight(choices[(bits + i + DTYPES.index(dtype)) % len(choices)], i)
        zeros = torch.full_like(weight.scales, 2.0 ** (bits - 1)) if weight.zeros is None else weight.zeros
        group = torch.arange(k) // weight.format.group_size
        nearest = zeros.float().round().clamp(0, 2**bits - 1).byte()[:, group]
        g = torch.Generator().manual_seed(i)
        single = torch.nn.functional.one_hot(torch.randint(k, (n,), generator=g), k).bool()
        single[:: 3, k // 3] = True
        columns = (torch.arange(n)[:, None] % 2 == 1) & (torch.arange(k) != k // 3)
        weight.codes[...] = torch.where(single | columns, weight.codes, nearest)
        weight.packed = pack(weight.codes, bits)
        x = hard_rows(k, dtype, i)
        y = weight.linear(x)
        in_pieces = where.isa in ("avx512vnni", "avx512bf16") and dtype == torch.float32
        summed_by_torch = where.backend == "reference"  # in an order that is not promised
        assert_linear_close(y, x, weight.dense(), any_x=in_pieces or summed_by_torch)
        if where.backend != "cpu":
            continue
        weight.packed = blocks.block(weight.packed, bits)
        for rows in (x[:1], x[1:2], x[3:4], x[:2], x, torch.cat([x] * 12)):
            at = [next(j for j in range(len(x)) if torch.equal(x[j], row)) for row in rows]
            assert_bitwise_equal(weight.linear(rows), y[at])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_large_columns_of_x_are_exact_beside_small_ones(where, bits):
    """Columns that are hundreds of times the others: exact where products and sums are."""
    weight = random_weight(grouped(bits, 80, 512, 128, zeros="int"), bits, power_of_two=True)
    x = torch.randint(-2, 3, (20, 512), generator=torch.Generator().manual_seed(bits)).float()
    x[:, [3, 200, 201, 500]] *= 512
    exact = x.double() @ weight.dense().t()
    assert float(exact.abs().max()) < 2**22  # in quarters
    assert_bitwise_equal(weight.linear(x).double(), exact)


def test_more_threads_than_rows(where):
    weight, x = random_weight(row_format(5, 1, 40)), activations(3, 40, torch.float32)
    torch.set_num_threads(4)
    try:
        assert_linear_close(weight.linear(x), x, weight.dense())
    finally:
        torch.set_num_threads(1)


def test_more_than_two_to_the_31_weights():
    """Offsets beyond 32 bits: the rows at the far end of a 0.5 GB tensor."""
    if registry.why_unavailable("cpu") is not None:
        pytest.skip("no compiled kernels")
    n, k, bits = 33_000, 65_536, 2
    assert n * k > 1 << 31
    last = torch.randint(0, 4, (2, k), dtype=torch.uint8)
    packed = torch.zeros(n, words_per_row(k, bits), dtype=torch.int32)  # pages that are not touched cost nothing
    packed[-2:] = pack(last, bits)
    weight = Weight(row_format(bits, n, k), last, packed, torch.full((n, 1), 0.5), None, (None, None, None))
    dense = (last.double() - 2) * 0.5
    x = torch.randint(-3, 4, (1, k)).float()
    for int8 in (False, True):
        y = weight.linear(torch.cat([x[:, :-1], torch.full((1, 1), 127.0)], 1), int8=int8)
        x[:, -1] = 127.0
        assert_bitwise_equal(y[:, -2:], (x.double() @ dense.t()).float())
        assert_bitwise_equal(y[:, :1], (x.double().sum(-1, keepdim=True) * -1).float())
    assert_bitwise_equal(weight.embedding(torch.tensor([n - 1, n - 2])), dense.flip(0).float())


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool], ids=str)
def test_activations_of_another_dtype_are_refused(where, dtype, int8):
    weight = random_weight(grouped(4, 8, 96, 32))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        weight.linear(torch.ones(2, 96, dtype=dtype), int8=int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool], ids=str)
def test_ids_of_another_dtype_are_refused(where, dtype):
    weight = random_weight(grouped(4, 8, 96, 32))
    with pytest.raises(RuntimeError, match="ids"):
        weight.embedding(torch.ones(2, dtype=dtype))


MALFORMED = {
    "words": (lambda w: {"packed": w.packed[:, :-1].contiguous()}, "words per row"),
    "dtype": (lambda w: {"packed": w.packed.long()}, "int32"),
    "scales": (lambda w: {"scales": w.scales[:, :-1].contiguous()}, "scales must be"),
    "scale rows": (lambda w: {"scales": w.scales[:-1].contiguous()}, "scales must be"),
    "scale dtype": (lambda w: {"scales": w.scales.int()}, "scales must be"),
    "zeros": (lambda w: {"zeros": w.scales[:, :-1].contiguous()}, "zeros must"),
    "bits": (lambda w: {"bits": 9}, "bits must be between 2 and 8: got bits=9"),
    "group 0": (lambda w: {"group_size": 0}, "group_size must be between 1 and K: got group_size=0"),
    "group > K": (lambda w: {"group_size": 97}, "group_size must be between 1 and K: got group_size=97"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_arguments_are_refused(where, name):
    weight = random_weight(grouped(4, 8, 96, 32))
    change, message = MALFORMED[name]
    arguments = {**weight.arguments, "zeros": None, **change(weight)}
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(
            torch.ops.lowbit.packed_linear,
            torch.randn(2, 96), **arguments, bias=None, x_scale=None, int8=False, x_group=0,
        )  # fmt: skip
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(
            torch.ops.lowbit.packed_dequantize,
            **arguments, in_features=96, dtype=torch.float32,
        )  # fmt: skip
