"""Family ``packed`` with minima and with scales of two levels, on every backend and ISA of this machine."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lowbit.backends.cpu import blocks
from lowbit.backends.layouts import by_group
from lowbit.backends.reference import quantize_activations
from lowbit.core.bitpack import pack
from lowbit.model.resize import resized
from lowbit.nn.shard import INPUT, OUTPUT, shard
from lowbit.packed.format import PackedFormat, PackedWeight
from lowbit.packed.module import PackedLinear
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import BITS, DTYPES, ROWS, Weight, activations, hard_rows, more_formats, random_weight
from lowbit.testing.transforms import opcheck
from lowbit.testing.verdicts import where_params
from lowbit.testing.where import Where, everywhere, running, share

# (N, K, group_size or None): groups of quads and of neither, a shorter last one, whole panels and rows behind them
SHAPES = ((3, 5, 2), (13, 172, 32), (9, 172, 7), (66, 40, 16), (70, 300, None), (130, 320, 32), (64, 1100, 1100))
WHERE = everywhere()


@pytest.fixture(params=where_params(WHERE, "lowbit.backends", "lowbit.packed.op", "lowbit.packed.triton"), ids=str)
def where(request):
    with running(request.param):
        yield request.param


def weights(where: Where, bits: int) -> list[Weight]:
    """Those of the interpreter, which is slow, are small; instruction sets share the others with the next width."""
    shapes = SHAPES[:4] if where == Where("triton") else SHAPES
    formats = [(f, i) for i, shape in enumerate(shapes) for f in more_formats(bits, *shape, turn=bits + i)]
    if where.isa:
        formats = formats[(WHERE.index(where) + bits) % 2 :: 2]
    return [random_weight(format, seed) for format, seed in formats]


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_definition(where, bits):
    for i, weight in share(where, weights(where, bits), bits % 5, 5):
        exact = weight.dense()
        dtype = DTYPES[i % 3]
        assert_bitwise_equal(weight.dequantize(dtype), exact.float().to(dtype))
        ids = torch.tensor([weight.format.out_features - 1, 0])
        assert_bitwise_equal(weight.embedding(ids), exact.float()[ids])


@pytest.mark.parametrize("mode", ["float", "int8", "static", "groups"])
@pytest.mark.parametrize("bits", BITS)
def test_linear(where, bits, mode):
    turn = bits + ["float", "int8", "static", "groups"].index(mode)
    for i, weight in share(where, weights(where, bits), turn % 10, 10):
        f, dtype, m = weight.format, DTYPES[(turn + i) % 3], ROWS[(turn + i) % len(ROWS)]
        x, bias = activations(m, f.in_features, dtype, seed=i), None if i % 3 == 0 else torch.randn(f.out_features)
        if mode == "float":
            assert_linear_close(weight.linear(x, bias), x, weight.dense(), bias)
            continue
        x_scale = torch.tensor([0.011]) if mode == "static" else None
        x_group = 32 * f.group_size if mode == "groups" else 0
        y = weight.linear(x, bias, int8=True, x_scale=x_scale, x_group=x_group)
        q, inverse = quantize_activations(x, x_scale, x_group if x_group < f.in_features else 0)
        if x_group and x_group < f.in_features:
            inverse = inverse.repeat_interleave(x_group, 1)[:, : f.in_features]
        codes_part = weight.dense(outliers=False)
        both = torch.cat([q.double() / inverse.double(), x.double()], 1)
        assert_linear_close(y, both, torch.cat([codes_part, weight.dense() - codes_part], 1), bias)


@pytest.mark.parametrize("bits", BITS)
def test_identity_activations_give_the_dequantized_weight(where, bits):
    for i, weight in share(where, weights(where, bits), bits % 20, 20):
        k, dtype = weight.format.in_features, DTYPES[(bits + i) % 3]
        some = slice(None) if k < 200 else slice(bits % 3, None, 3)
        eye = torch.eye(k)[some].to(dtype)
        assert_bitwise_equal(weight.linear(eye).t().contiguous(), weight.dequantize(dtype)[:, some])


@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(where, bits):
    for i, shape in enumerate(SHAPES[:3] if where == Where("triton") else SHAPES[:5]):
        for _, format in share(where, list(more_formats(bits, *shape, turn=bits)), (bits + i) % 5, 5):
            weight = random_weight(format, i, power_of_two=True)
            x = torch.randint(-127, 128, (5, shape[1]), generator=torch.Generator().manual_seed(i)).float()
            x[:, 0] = 127  # int8 activations: scale 1
            exact = (x.double() @ weight.dense().t()).float()
            assert_bitwise_equal(weight.linear(x), exact)
            assert_bitwise_equal(weight.linear(x, int8=True), exact)


@pytest.mark.parametrize("bits", BITS)
def test_codes_in_blocks(where, bits):
    """Bit for bit what canonical words and more rows of x give, scales stored group after group."""
    if where.backend != "cpu":
        pytest.skip("blocks are what the compiled kernels read")
    for i, shape in enumerate(((64, 96, 32), (148, 260, 64), (83, 160, 16), (133, 90, 20), (64, 70, None))):
        formats = list(more_formats(bits, *shape, turn=bits + i))
        weight = random_weight(formats[(bits + i) % len(formats)], i)
        bias, x = torch.randn(shape[0]), activations(19, shape[1], DTYPES[(bits + i) % 3], seed=i)
        plain, int8 = weight.linear(x, bias), weight.linear(x, bias, int8=True)
        assert_linear_close(plain, x, weight.dense(), bias)
        weight.packed = blocks.block(weight.packed, bits)
        if weight.format.granularity == "group":
            weight.scales = by_group(weight.scales)
            weight.zeros = None if weight.zeros is None else by_group(weight.zeros)
        for m in (1, 2, 3, 5, 8, 11, 16, 19):
            assert_bitwise_equal(weight.linear(x[:m], bias), plain[:m])
            assert_bitwise_equal(weight.linear(x[:m], bias, int8=True), int8[:m])
        assert_bitwise_equal(weight.dequantize(), weight.dense().float())


def of_groups(scale: float, minimum: float, code: int, dtype: torch.dtype = torch.float16, bits: int = 4) -> Weight:
    """All weights of the same code."""
    weight = random_weight(PackedFormat(bits, 70, 96, 32, "group", "minimum", str(dtype).removeprefix("torch.")))
    assert weight.zeros is not None
    weight.codes.fill_(code)
    weight.packed.copy_(pack(weight.codes, bits))
    weight.scales.fill_(scale)
    weight.zeros.fill_(minimum)
    return weight


# code * scale about the minimum, so that weights are far smaller; equal to it; a scale of 0; of both signs
CLOSE = (
    (0.25, 2.001, 8), (0.25, 2.0, 8), (0.0, 1.5, 3), (0.0, -1.5, 3), (-0.5, -3.5, 7), (-0.5, 2.0, 7), (1e-4, 10.0, 15),
    (0.25, 5.0, 15), (1e-7, 1e-6, 9), (2.0, 0.0, 0),
)  # fmt: skip


@pytest.mark.parametrize(("scale", "minimum", "code"), CLOSE)
def test_small_weights_of_large_parts(where, scale, minimum, code):
    weight = of_groups(scale, minimum, code)
    for _, dtype in share(where, DTYPES, code % 3, 3):
        x = activations(3, 96, dtype)
        x[1, 5] *= 1000  # more digits, or listed
        assert_linear_close(weight.linear(x), x, weight.dense())
    q, inverse = quantize_activations(x, None)
    assert_linear_close(weight.linear(x, int8=True), q.double() / inverse.double(), weight.dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_activations(where, dtype):
    """Rows that are multiplied in float32, elements that are listed, digits that are not enough."""
    for _, turn in share(where, range(5), DTYPES.index(dtype), 5):
        format = list(more_formats(4, 70, 320, 32, turn=turn))[turn]
        if format.scale_dtype == "float32":  # whose products with codes round: see PackedFormat
            format = replace(format, scale_dtype="bfloat16")
        weight, x = random_weight(format, turn), activations(6, 320, torch.float32)
        x[0] *= 1e-30
        x[1, 7], x[2, :64] = 30.0 if dtype == torch.float16 else 3e4, 1e-6
        x[3, ::3], x[4] = 0.0, x[4] * torch.logspace(-6, 1, 320)
        x[5] = 0.0
        x = x.to(dtype)
        assert_linear_close(weight.linear(x), x, weight.dense())
    if dtype != torch.float16:
        x[0], x[1, 0] = x[0] * 1e30, float("nan")
        y = weight.linear(x)
        assert y[1].isnan().all() and y[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_element_of_x_counts_whatever_its_weights_are(where, bits, dtype):
    """A row of W with one weight that is not close to 0."""
    if where.backend != "cpu":
        pytest.skip("said of the compiled kernels: the reference is torch's matmul")
    for i, (n, k, group_size) in enumerate([(66, 700, 64), (16, 1100, None), (35, 130, 7)]):
        form = next(more_formats(bits, n, k, group_size, turn=1 + i % 2))
        weight = random_weight(replace(form, outliers=0), i)
        group = torch.arange(k) // weight.format.group_size
        g = torch.Generator().manual_seed(i)
        base = torch.randint(0, 1 << bits, weight.scales.shape, generator=g)
        weight.zeros = (weight.scales.float() * base).to(weight.scales.dtype)
        single = torch.nn.functional.one_hot(torch.randint(k, (n,), generator=g), k).bool()
        single[::3, k // 3] = True
        weight.codes[...] = torch.where(single, weight.codes, base[:, group].byte())
        weight.packed = pack(weight.codes, bits)
        x = hard_rows(k, dtype, i)
        in_pieces = where.isa in ("avx512vnni", "avx512bf16") and dtype == torch.float32
        assert_linear_close(weight.linear(x), x, weight.dense(), any_x=in_pieces)


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_experts(where, mode):
    for _, turn in share(where, range(5), 1 + (mode == "int8"), 5):
        format = list(more_formats(4, 3 * 64, 160, 32, turn=turn))[turn]
        weight = random_weight(format, turn)
        ids, x = torch.tensor([2, 0, 1, 2, 3, 0]), activations(3, 160, torch.float32, seed=turn)
        arguments = (*weight.operands, 3, None, None, mode == "int8", 0)
        y = torch.ops.lowbit.packed_experts(x, ids, *arguments)
        met = x.double().repeat_interleave(2, 0)
        if mode == "int8":
            q, inverse = quantize_activations(x, None)
            met = (q.double() / inverse.double()).repeat_interleave(2, 0)
        coded, dense = weight.dense(outliers=False).view(3, 64, 160), weight.dense().view(3, 64, 160)
        for i, expert in enumerate(ids.tolist()):
            if expert == 3:
                assert not y[i].any()
                continue
            both = torch.cat([met[i : i + 1], x.double().repeat_interleave(2, 0)[i : i + 1]], 1)
            w = torch.cat([coded[expert], dense[expert] - coded[expert]], 1)
            assert_linear_close(y[i : i + 1], both, w)


@pytest.mark.parametrize("turn", [0, 1])
def test_opcheck(where, turn):
    if where == Where("triton"):
        pytest.skip("what is checked lies above the backends")
    w = random_weight(list(more_formats(3, 20, 96, 32, turn=turn))[1])
    opcheck(where, torch.ops.lowbit.packed_linear.default, (torch.randn(2, 96), *w.operands, None, None, False, 0))
    opcheck(where, torch.ops.lowbit.packed_dequantize.default, (*w.operands, 96, torch.float16))
    opcheck(where, torch.ops.lowbit.packed_embedding.default, (torch.tensor([3, 0]), *w.operands, 96, torch.float32))


def packed_weight(weight: Weight) -> PackedWeight:
    f, (values, columns, rows) = weight.format, weight.outliers
    group = f.group_size if f.granularity == "group" else None
    return PackedWeight(
        weight.codes, weight.scales, weight.zeros, f.bits, group, values, columns, rows, None, f.zeros == "minimum",
        weight.scale_factors, weight.zero_factors, f.scale_block,
    )  # fmt: skip


@pytest.mark.parametrize("turn", range(6))
def test_layers(turn):
    """Layers hold it, count its bytes, train its floats, and say what it is."""
    format = list(more_formats(4, 66, 96, 32 if turn < 5 else None, turn=turn))[turn]
    weight = random_weight(format, turn)
    layer = PackedLinear.from_weight(packed_weight(weight))
    assert layer.format == replace(format, outlier_dtype=layer.format.outlier_dtype)
    assert ("minima" in layer.format.describe()) == (format.zeros == "minimum")
    assert layer.format.nbytes == sum(t.nbytes for t in layer.canonical().values())
    assert_bitwise_equal(layer.dequantize(torch.float32), weight.dense().float())
    assert PackedFormat.from_dict(format.to_dict()) == format


@pytest.mark.parametrize("turn", range(6))
def test_gradients(turn):
    """Of scales, minima and factors, against torch's own of the dense expression; and of a step along them."""
    format = list(more_formats(4, 18, 96, 32 if turn < 5 else None, turn=turn))[turn]
    weight = random_weight(format, turn)
    given = {n: t.float() if t.is_floating_point() else t for n, t in weight.arguments.items() if torch.is_tensor(t)}
    names = ("scales", "zeros", "scale_factors", "zero_factors", "outlier_values")
    floats = {n: given[n].requires_grad_() for n in names if n in given and given[n].is_floating_point()}
    arguments = {**weight.arguments, **given, **floats}
    x, dy = activations(3, 96, torch.float32), activations(3, 18, torch.float32, 3)
    y = torch.ops.lowbit.packed_linear(x, **arguments, bias=None, x_scale=None, int8=False, x_group=0)
    found = torch.autograd.grad(y, list(floats.values()), dy)
    group = torch.arange(96) // format.group_size
    block = group // (format.scale_block or 1)
    scales = arguments["scales"].float().expand(18, -1)[:, group]
    if format.scale_block:
        scales = scales * arguments["scale_factors"][:, block]
    zeros = torch.tensor(8.0) if weight.zeros is None else arguments["zeros"].float().expand(18, -1)[:, group]
    if "zero_factors" in floats:
        zeros = zeros * arguments["zero_factors"][:, block]
    codes = weight.codes.float()
    dense = codes * scales - zeros if format.zeros == "minimum" else (codes - zeros) * scales
    if format.outliers:
        _, columns, rows = weight.outliers
        at = torch.repeat_interleave(torch.arange(18), rows.diff().long()), columns.long()
        dense = dense.index_put(at, floats["outlier_values"], accumulate=True)
    expected = torch.autograd.grad(x @ dense.t(), list(floats.values()), dy)
    for name, one, other in zip(floats, found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5, name
    steps = {name: torch.randn_like(t) for name, t in floats.items()}
    moved = weight.operands.tangent(96, steps)
    along = sum((steps[name] * one).sum() for name, one in zip(floats, found, strict=True))
    assert abs(float((moved * (dy.t() @ x)).sum() - along)) < 1e-4 * float(sum(one.abs().sum() for one in found))


BAD = (
    (dict(scale_codes="uint8"), "scale_codes and scale_block must be given together"),
    (dict(scale_codes="int4", scale_block=1), "scale_codes must be one of 'uint8', 'int8'"),
    (dict(scale_codes="int8", scale_block=4), "scale_block must be between 1 and G.*scale_block=4, G=3"),
    (dict(scale_codes="int8", scale_block=1, zeros="float"), "beside scale_codes: got zeros='float'"),
    (dict(zeros="maximum"), "zeros must be one of"),
)


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_formats_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PackedFormat(4, 8, 96, 32, "group", **fields)


BAD_ARGUMENTS = (
    (dict(scale_block=0), "scale"),
    (dict(scale_block=9), "scale_block must be between 1 and G"),
    (dict(scale_factors=None), "scale_factors"),
    (dict(zero_factors=None), "zero_factors"),
    (dict(zeros=None), "minimum=True needs zeros|zeros must be uint8"),
    (dict(scales=torch.ones(8, 3)), "scales must be uint8 or int8 beside scale_factors"),
    (dict(scale_factors=torch.ones(8, 2)), r"scale_factors must"),
    (dict(minimum=False), "zero_factors must be given with minimum=True"),
)


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(where, change, message):
    format = PackedFormat(4, 8, 96, 32, "group", "minimum", "float16", scale_codes="uint8", scale_block=3)
    given = {**random_weight(format).arguments, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.packed_linear(torch.randn(2, 96), **given, bias=None, x_scale=None, int8=False, x_group=0)


# ------------------------------------------------------------------------------------------------- parts of a layer


@pytest.mark.parametrize("turn", range(5))
def test_shares_of_a_layer(turn):
    """Rows, and columns where factors are not divided."""
    format = list(more_formats(4, 66, 192, 16, turn=turn))[turn]
    layer = PackedLinear.from_weight(packed_weight(random_weight(format, turn)))
    whole, block = layer.dequantize(), (format.scale_block or 1) * format.group_size
    for dim in (OUTPUT, INPUT):
        parts = [copy.deepcopy(layer) for _ in range(3)]
        if dim == INPUT and 64 % block:
            with pytest.raises(ValueError, match="columns that share a factor of their scales must divide the 64"):
                shard(parts[0], dim, 0, 3)
            assert torch.equal(parts[0].dequantize(), whole)
            continue
        for index, part in enumerate(parts):
            shard(part, dim, index, 3)
            part.validate()
        assert torch.equal(torch.cat([part.dequantize() for part in parts], dim), whole)


@pytest.mark.parametrize("turn", range(5))
def test_more_rows(turn):
    """The rows of before stay bit for bit, and new ones are close to the floats."""
    format = replace(list(more_formats(5, 40, 96, 16, turn=turn))[turn], outliers=0, outlier_dtype="float16")
    layer = PackedLinear.from_weight(packed_weight(random_weight(format, turn)))
    rows = torch.randn(50, 96)
    for m in (50, 30):
        made = resized(layer, rows[:m], None)
        assert made is not None and made.format == replace(format, out_features=m)
        found = made.dequantize(torch.float32)
        assert torch.equal(found[:40], layer.dequantize(torch.float32)[:m])
        assert float((found[40:] - rows[40:m]).norm()) <= 0.1 * float(rows[40:m].norm())


BAD_VALUES = (
    ("scale_factors", 1e38, "scale_factors times 255 must be finite"),
    ("zero_factors", float("nan"), "zero_factors times 255 must be finite"),
)


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_bad_values_are_refused(name, value, message):
    format = PackedFormat(4, 8, 96, 32, "group", "minimum", "float32", scale_codes="uint8", scale_block=3)
    weight = random_weight(format)
    getattr(weight, name)[0, 0] = value
    with pytest.raises(ValueError, match=message):
        PackedLinear.from_weight(packed_weight(weight))
