"""Family ``packed`` with minima, scales of two levels and packed zeros, on every backend and ISA of this machine."""

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
from lowbit.packed.format import Packed, PackedFormat, PackedWeight
from lowbit.packed.module import PackedExperts, PackedLinear
from lowbit.packed.operands import PackedOperands
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import BITS, DTYPES, ROWS, Weight, activations, hard_rows, more_formats, random_weight
from lowbit.testing.transforms import opcheck
from lowbit.testing.verdicts import where_params
from lowbit.testing.where import Where, everywhere, running, share

# (N, K, group_size or None): groups of quads and of neither, a shorter last one, whole panels and rows behind them
SHAPES = ((3, 5, 2), (13, 172, 32), (9, 172, 7), (66, 40, 16), (70, 300, None), (130, 320, 32), (64, 1100, 1100))
WHERE = everywhere()
DTYPE_NAMES = ("float16", "bfloat16", "float32")


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


@pytest.mark.parametrize("bits", range(2, 8))
def test_packed_zeros_are_those_of_a_byte(where, bits):
    """The same results bit for bit, in blocks and group after group too."""
    shapes = ((83, 160, 16), (131, 190, 9)) if where.backend == "cpu" else ((5, 79, 10),)
    for i, (n, k, group_size) in enumerate(shapes):
        format = PackedFormat(bits, n, k, group_size, "group", "int", DTYPE_NAMES[(bits + i) % 3], packed_zeros=True)
        if (bits + i) % 2:
            format = replace(format, scale_codes="uint8", scale_block=2)
        weight = random_weight(format, i)
        plain = replace(weight, format=replace(format, packed_zeros=False), zeros=weight.plain_zeros())
        x, bias = activations(9, k, DTYPES[(bits + i) % 3], seed=i), torch.randn(n)
        for by_block in (False, True) if where.backend == "cpu" else (False,):
            for each in (weight, plain) if by_block else ():
                each.packed = blocks.block(each.packed, bits)
                each.scales, each.zeros = by_group(each.scales), by_group(each.zeros)
            for m in (1, 9) if where.backend == "cpu" else (2,) * (bits in (3, 4)):
                assert_bitwise_equal(weight.linear(x[:m], bias), plain.linear(x[:m], bias))
                assert_bitwise_equal(weight.linear(x[:m], int8=True), plain.linear(x[:m], int8=True))
            assert_bitwise_equal(weight.dequantize(), plain.dequantize())
        assert weight.zeros.shape == (n, -(-format.groups * bits // 8))


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
        weight.codes, weight.scales, None if weight.zeros is None else weight.plain_zeros(), f.bits, group, values,
        columns, rows, None, f.zeros == "minimum", weight.scale_factors, weight.zero_factors, f.scale_block,
        f.packed_zeros,
    )  # fmt: skip


def operands_of(layer: PackedLinear) -> PackedOperands:
    return PackedOperands.of(layer.weight_arguments(layer.operands()))


def each_format(bits: int, n: int, k: int, group_size: int, turn: int) -> PackedFormat:
    """Number ``turn`` of those in groups; 10: with one scale for all."""
    return list(more_formats(bits, n, k, group_size if turn < 10 else None, turn=turn))[turn if turn < 10 else -1]


@pytest.mark.parametrize("turn", range(11))
def test_layers(turn):
    """Layers hold it, count its bytes, train its floats, and say what it is."""
    format = each_format(4, 66, 96, 32, turn)
    weight = random_weight(format, turn)
    layer = PackedLinear.from_weight(packed_weight(weight))
    assert layer.format == replace(format, outlier_dtype=layer.format.outlier_dtype)
    assert ("minima" in layer.format.describe()) == (format.zeros == "minimum")
    assert ("packed zeros" in layer.format.describe()) == format.packed_zeros == (turn in (7, 8, 9))
    assert ("one factor" in layer.format.describe()) == format.one_factor == (turn in (5, 6, 9))
    assert layer.format.nbytes == sum(t.nbytes for t in layer.canonical().values())
    assert_bitwise_equal(layer.dequantize(torch.float32), weight.dense().float())
    assert PackedFormat.from_dict(format.to_dict()) == format


@pytest.mark.parametrize("turn", range(11))
def test_gradients(turn):
    """Of scales, minima and factors, against torch's own of the dense expression; and of a step along them."""
    format = each_format(4, 18, 96, 32, turn)
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
    held = weight.plain_zeros() if format.packed_zeros else arguments["zeros"]
    zeros = torch.tensor(8.0) if held is None else held.float().expand(18, -1)[:, group]
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
    (dict(packed_zeros=1), "packed_zeros must be True or False"),
    (dict(one_factor=True), "one_factor=True needs scale_block=G: got scale_block=None, G=3"),
    (dict(one_factor=True, scale_codes="uint8", scale_block=2), "scale_block=G: got scale_block=2, G=3"),
    (dict(packed_zeros=True), "packed_zeros=True needs zeros='int'.*got zeros='none'"),
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
    (dict(scale_factors=torch.ones(1, 1), zero_factors=torch.ones(1, 1), scale_block=2), "scale_factors"),
    (dict(zero_factors=torch.ones(1, 1)), "zero_factors"),
    (dict(minimum=False), "zero_factors must be given with minimum=True"),
    (dict(minimum=False, zero_factors=None, zeros=torch.zeros(8, 1, dtype=torch.uint8)), "zeros must"),
)


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(where, change, message):
    format = PackedFormat(4, 8, 96, 32, "group", "minimum", "float16", scale_codes="uint8", scale_block=3)
    given = {**random_weight(format).arguments, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.packed_linear(torch.randn(2, 96), **given, bias=None, x_scale=None, int8=False, x_group=0)


# ------------------------------------------------------------------------------------------------- parts of a layer


@pytest.mark.parametrize("turn", range(10))
def test_shares_of_a_layer(turn):
    """Rows, and columns where factors are not divided."""
    format = each_format(3, 66, 192, 16, turn)
    layer = PackedLinear.from_weight(packed_weight(random_weight(format, turn)))
    whole, block = layer.dequantize(), (format.scale_block or 1) * format.group_size
    for dim in (OUTPUT, INPUT):
        parts = [copy.deepcopy(layer) for _ in range(3)]
        if dim == INPUT and 64 % block and format.scale_block != format.groups:
            with pytest.raises(ValueError, match="columns that share a factor of their scales must divide the 64"):
                shard(parts[0], dim, 0, 3)
            assert torch.equal(parts[0].dequantize(), whole)
            continue
        for index, part in enumerate(parts):
            shard(part, dim, index, 3)
            part.validate()
        assert torch.equal(torch.cat([part.dequantize() for part in parts], dim), whole)


@pytest.mark.parametrize(("bits", "groups"), [(8, 9), (7, 7), (6, 3), (4, 1)])
def test_zeros_that_would_not_be_shorter_are_not_packed(bits, groups):
    with pytest.raises(ValueError, match=f"rows that it makes shorter: got zeros='int', bits={bits}, G={groups}"):
        PackedFormat(bits, 8, 8 * groups, 8, "group", "int", packed_zeros=True)
    spec, weight = Packed(bits=bits, group_size=8, zeros="int", packed_zeros=True), torch.randn(8, 8 * groups)
    made = spec.quantize(weight)
    assert made.format() == spec.format(weight, "linear") and not made.format().packed_zeros


@pytest.mark.parametrize("quantizer", ["minmax", "mse", "gptq", "descent"])
@pytest.mark.parametrize(("k", "group_size"), [(64, 16), (100, 6), (40, 64)])
def test_scales_of_8_bits(k, group_size, quantizer):
    """Codes are chosen for the scales as stored: the error is hardly more than with float scales. Rows of 16 groups or
    more have factors of their own; groups of zeros alone do not count in them."""
    torch.manual_seed(0)
    weight, hessian = torch.randn(9, k) * (0.2 + torch.rand(9, 1)), torch.eye(k) + 0.3
    weight[4], weight[0, :5] = 0, 0
    measured = hessian if quantizer in ("gptq", "descent") else torch.eye(k)  # what the quantizer makes small
    errors = []
    for scale_bits in (8, None):
        spec = Packed(bits=3, zeros="int", group_size=min(group_size, k), quantizer=quantizer, scale_bits=scale_bits)
        made = spec.quantize(weight, hessian=hessian)
        layer = PackedLinear.from_weight(made)
        f = layer.format
        assert f == spec.format(weight, "linear")
        assert f.nbytes == sum(t.nbytes for t in layer.canonical().values())
        off = layer.dequantize(torch.float32) - weight
        assert not off[4].any()
        if quantizer in ("minmax", "mse"):  # each code is that of the nearest level
            scales = operands_of(layer).decoded_scales().float().repeat_interleave(f.group_size, 1)[:, :k]
            zeros = layer.zeros.float().repeat_interleave(f.group_size, 1)[:, :k]
            assert torch.equal((weight / scales + zeros).round().clamp(0, 7), made.codes.float())
        errors.append(float(torch.einsum("nk,kl,nl->", off, measured, off)))
        if scale_bits:
            assert (f.scale_codes, f.scale_block, f.one_factor) == ("uint8", f.groups, f.groups < 16)
            assert int(made.scales.max()) > 245 and int(made.scales.min()) > 0
    assert errors[0] < 1.03 * errors[1]


@pytest.mark.parametrize("quantizer", ["minmax", "gptq", "descent"])
def test_a_spec_packs_zeros(quantizer):
    """The same codes, scales and zeros as without, in the bytes that the format says."""
    weight, hessian = torch.randn(9, 100), torch.eye(100) + 0.1
    found = []
    for packed_zeros in (True, False):
        spec = Packed(bits=3, group_size=16, zeros="int", quantizer=quantizer, packed_zeros=packed_zeros)
        made = spec.quantize(weight, hessian=hessian)
        layer = PackedLinear.from_weight(made)
        assert layer.format == spec.format(weight, "linear")
        assert layer.format.nbytes == sum(t.nbytes for t in layer.canonical().values())
        found.append(layer)
    packed, plain = found
    assert (packed.zeros.shape, plain.zeros.shape) == ((9, 3), (9, 7))
    assert plain.format.nbytes - packed.format.nbytes == 9 * 4
    assert_bitwise_equal(packed.dequantize(), plain.dequantize())


BAD_SPECS = (
    (dict(symmetric=True), "it excludes symmetric=True"),
    (dict(zeros="float"), "it excludes zeros='float'"),
    (dict(packed_zeros=1), "packed_zeros must be True or False: got packed_zeros=1"),
    (dict(scale_bits=4), "scale_bits must be 8 or None: got scale_bits=4"),
    (dict(scale_bits=8, zeros="float", packed_zeros=False), "integer zeros or none: got zeros='float'"),
    (dict(scale_bits=8, granularity="row"), "scales of groups .* got granularity='row'"),
)


@pytest.mark.parametrize(("fields", "message"), BAD_SPECS)
def test_bad_specs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Packed(**{"packed_zeros": True, **fields})


def test_weights_with_a_factor_each_are_joined_by_row():
    spec, weights = Packed(bits=4, group_size=16, scale_bits=8), torch.randn(3, 8, 64) * torch.rand(3, 1, 1)
    stack = PackedExperts.from_float(weights, spec)
    assert not stack.format.one_factor and stack.scale_factors.shape == (24, 1)
    each = [PackedLinear.from_float(weight, spec) for weight in weights]
    assert all(layer.format.one_factor for layer in each)
    assert torch.equal(stack.dequantize(), torch.stack([layer.dequantize() for layer in each]))


def test_a_share_of_one_group_has_zeros_of_a_byte():
    format = PackedFormat(3, 8, 96, 32, "group", "int", "float16", packed_zeros=True)
    layer = PackedLinear.from_weight(packed_weight(random_weight(format)))
    whole = layer.dequantize()
    parts = [copy.deepcopy(layer) for _ in range(3)]
    for index, part in enumerate(parts):
        shard(part, INPUT, index, 3)
    assert [part.format.packed_zeros for part in parts] == [False] * 3
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), whole)


@pytest.mark.parametrize("turn", range(10))
def test_more_rows(turn):
    """The rows of before stay bit for bit, and new ones are close to the floats."""
    format = replace(each_format(5, 40, 96, 16, turn), outliers=0, outlier_dtype="float16")
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
    ("zero_factors", float("nan"), "zero_factors must be finite"),
)


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_bad_values_are_refused(name, value, message):
    format = PackedFormat(4, 8, 96, 32, "group", "minimum", "float32", scale_codes="uint8", scale_block=3)
    weight = random_weight(format)
    getattr(weight, name)[0, 0] = value
    with pytest.raises(ValueError, match=message):
        PackedLinear.from_weight(packed_weight(weight))
