"""Columns in another order than the features of x: GPTQ's activation order."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn.layer import build, make_trainable
from lowbit.nn.rows import join_rows
from lowbit.nn.shard import INPUT, OUTPUT, shard
from lowbit.packed.format import PackedFormat, PackedWeight
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close

N, K, GROUP = 24, 100, 32


def weight(bits=4, outliers=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = dict(
        codes=torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(N, 4, generator=generator) / 8 + 0.01).half(),
        zeros=torch.randint(0, 2**bits, (N, 4), dtype=torch.uint8, generator=generator),
        bits=bits, group_size=GROUP, order=torch.randperm(K, generator=generator).int(),
    )  # fmt: skip
    if outliers:
        parts |= dict(outlier_values=torch.arange(N).half(), outlier_columns=torch.arange(N).short() * 4 + 3,
                      outlier_rows=torch.arange(N + 1).int())  # fmt: skip
    return PackedWeight(**parts)


def float_weight(w):
    """Column by column, in float64."""
    made = torch.zeros(N, K, dtype=torch.float64)
    for k, feature in enumerate(w.order.tolist()):
        centered = w.codes[:, k].double() - w.zeros[:, k // GROUP].double()
        made[:, feature] = centered * w.scales[:, k // GROUP].double()
    if w.outlier_values is not None:
        for n, (column, value) in enumerate(zip(w.outlier_columns.tolist(), w.outlier_values.tolist(), strict=True)):
            made[n, w.order[column]] += value
    return made


def layer(**options):
    return lowbit.PackedLinear.from_weight(weight(), torch.arange(N).float(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "outliers"), [(2, False), (3, True), (4, False), (8, True)])
def test_the_product(bits, outliers, dtype):
    w = weight(bits, outliers)
    made = lowbit.PackedLinear.from_weight(w, dtype=dtype)
    dense = float_weight(w)
    torch.testing.assert_close(made.dequantize(torch.float64), dense, rtol=1e-6, atol=0)
    for rows in (1, 5, 70):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert_linear_close(made(x), x, dense)
    x = torch.randn(2, 3, K).to(dtype)
    assert_bitwise_equal(made(x), made(x.view(6, K)).view(2, 3, N))
    assert made(x[:0]).shape == (0, 3, N) and made(x[0, 0]).shape == (N,)


@pytest.mark.parametrize("options", [{}, {"activations": "int8"}, {"activations": "int8_static", "x_scale": 0.02},
                                     {"activations": "int8", "activation_group_size": 32}], ids=str)  # fmt: skip
def test_it_is_the_layer_in_order_on_features_in_that_order(options):
    if "x_scale" in options:
        options = {**options, "x_scale": torch.tensor(options["x_scale"])}
    made, w = layer(**options), weight()
    plain = lowbit.PackedLinear.from_weight(replace(w, order=None), torch.arange(N).float(), **options)
    x = torch.randn(3, K)
    assert_bitwise_equal(made(x), plain(x[:, w.order.long()]))
    torch.testing.assert_close(made.double()(x.double()), plain.double()(x.double()[:, w.order.long()]))


def test_gradients():
    made, w = layer(), weight()
    x = torch.randn(3, K, requires_grad=True)
    made(x).square().sum().backward()
    plain = made.to_float()
    again = x.detach().clone().requires_grad_()
    plain(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-3)
    make_trainable(made, "scales")
    made(x.detach()).square().sum().backward()
    scales = w.scales.float().requires_grad_()
    centered = w.codes.float() - w.zeros.float().repeat_interleave(GROUP, 1)[:, :K]
    inner = x.detach()[:, w.order.long()] @ (centered * scales.repeat_interleave(GROUP, 1)[:, :K]).t()
    (inner + made.bias.detach()).square().sum().backward()
    torch.testing.assert_close(made.scales.grad, scales.grad, rtol=1e-4, atol=1e-2)


def test_copies_graphs_and_files(tmp_path):
    made, x = layer(), torch.randn(3, K)
    y = made(x)
    for other in (
        copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.compile(made, fullgraph=True, backend="eager"),
        torch.export.export(made, (x,)).module(), torch.fx.symbolic_trace(made),
        torch.fx.symbolic_trace(nn.Sequential(made)), made.to(torch.bfloat16).to(torch.float32),
    ):  # fmt: skip
        assert_bitwise_equal(other(x), y)
    model = nn.Sequential(made)
    lowbit.save(model, tmp_path)
    loaded = lowbit.load(tmp_path, model=nn.Sequential(nn.Linear(K, N)))
    assert_bitwise_equal(loaded(x), y)
    assert "act-order" in str(lowbit.report(loaded))
    torch.testing.assert_close(lowbit.dequantize(loaded)(x), y, rtol=1e-4, atol=1e-4)
    empty = build(made.config())
    empty.load_state_dict(made.state_dict(), assign=True)
    assert_bitwise_equal(empty(x), y)


def test_shares():
    x, whole = torch.randn(3, K), layer()
    y, parts = whole(x), [layer() for _ in range(2)]
    for i, part in enumerate(parts):
        shard(part, OUTPUT, i, 2)
    torch.testing.assert_close(torch.cat([nn.functional.linear(x, p.dequantize()) for p in parts], -1) + whole.bias, y)
    with pytest.raises(ValueError, match="cannot be split over 2 devices: with act-order its columns"):
        shard(layer(), INPUT, 0, 2)


def test_joined_rows_have_one_order():
    first, second = ((part.canonical(), part.format) for part in (layer(), layer()))
    tensors, format = join_rows([first, second])
    assert format.act_order and format.out_features == 2 * N and torch.equal(tensors["order"], weight().order)
    second[0]["order"] = second[0]["order"].flip(0)
    with pytest.raises(ValueError, match="must have the same order to be joined"):
        join_rows([first, second])
    plain = lowbit.PackedLinear.from_weight(replace(weight(), order=None))
    with pytest.raises(ValueError, match="must be of one format"):
        join_rows([first, (plain.canonical(), plain.format)])


@pytest.mark.parametrize("change", ["twice", "too large", "negative"])
def test_an_order_that_is_none(change):
    w = weight()
    w.order[3] = {"twice": w.order[4], "too large": K, "negative": -1}[change]
    with pytest.raises(ValueError, match=r"order must have each of 0 to 99 once: got values in \["):
        lowbit.PackedLinear.from_weight(w)


def test_only_linear_layers_have_one():
    format = weight().format()
    with pytest.raises(ValueError, match="act_order is of linear layers: got it for a packed embedding"):
        lowbit.PackedEmbedding(format, device="meta")
    with pytest.raises(ValueError, match="act_order must be True or False: got act_order=1"):
        PackedFormat(**{**format.to_dict(), "act_order": 1})
