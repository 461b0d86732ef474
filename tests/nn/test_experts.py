"""Layers that hold a stack of experts: what they compute, and that they move, copy, save and load as others do."""

import copy
import pickle

import pytest
import torch

from lowbit import Codebook, Kronecker, Packed
from lowbit.backends.layouts import CANONICAL
from lowbit.codebook.module import CodebookExperts
from lowbit.kron.module import KroneckerExperts
from lowbit.nn.experts import FloatExperts
from lowbit.nn.layer import build, canonical_state_dict, layers
from lowbit.packed.module import PackedExperts, PackedLinear

E, N, K = 4, 64, 96
IDS = torch.tensor([0, 3, 2, 4, 1, 1, 3, 3, 0, 2, 2, 2])  # 4: an expert that is elsewhere
KINDS = {
    "packed": (PackedExperts, Packed(bits=4, group_size=32)),
    "packed, outliers": (PackedExperts, Packed(bits=3, group_size=32, outliers=0.01)),
    "packed, int8": (PackedExperts, Packed(bits=8, activations="int8")),
    "codebook": (CodebookExperts, Codebook(bits=3)),
    "kron": (KroneckerExperts, Kronecker(rank=2)),
    "kron, packed factors": (KroneckerExperts, Kronecker(shape=(8, 12), factors=Packed(bits=6, group_size=4))),
    "codebook, one table": (CodebookExperts, Codebook(bits=4, granularity="tensor")),
}


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    cls, spec = KINDS[request.param]
    return cls.from_float(torch.randn(E, N, K), spec, bias=torch.randn(E, N))


def x(rows=6, seed=1):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def test_an_expert_is_the_linear_layer_of_its_weight(layer):
    y = layer(x(), IDS)
    assert y.shape == (len(IDS), N) and not y[3].any()
    if layer.format.activations == "float":
        for e in range(E):
            rows = (e == IDS).nonzero()[:, 0]
            dense = x().double()[rows // 2] @ layer.dequantize()[e].double().t() + layer.bias.view(E, N)[e].double()
            torch.testing.assert_close(y[rows].double(), dense, rtol=1e-5, atol=1e-5)


def test_its_rows_are_those_of_a_linear_layer_of_one_expert():
    weight, spec = torch.randn(E, N, K), Packed(bits=4, group_size=32)
    stack = PackedExperts.from_float(weight, spec)
    for e in range(E):
        one = PackedLinear.from_float(weight[e], spec)
        assert torch.equal(stack(x(), torch.full((6,), e)), one(x()))


def test_copies_and_pickles(layer):
    y = layer(x(), IDS)
    assert torch.equal(copy.deepcopy(layer)(x(), IDS), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x(), IDS), y)


def test_state_dict_and_config(layer):
    other = build(layer.config(), device="cpu")
    assert type(other) is type(layer) and other.num_experts == E and other.out_features == N
    other.load_state_dict(canonical_state_dict(layer))
    assert torch.equal(other(x(), IDS), layer(x(), IDS))
    other = build(layer.config(), device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x(), IDS), layer(x(), IDS))
    with pytest.raises(ValueError, match="num_experts must be an integer of at least 1: got num_experts=0"):
        build({**layer.config(), "num_experts": 0})
    with pytest.raises(ValueError, match=r"num_experts must divide the (rows|terms) of the weight, \d+: got num_ex"):
        build({**layer.config(), "num_experts": 3})
    without = {name: value for name, value in layer.config().items() if name != "num_experts"}
    with pytest.raises(ValueError, match="num_experts must be an integer of at least 1: got num_experts=None"):
        build(without)


def test_the_way_back(layer):
    plain = layer.to_float()
    assert isinstance(plain, FloatExperts) and plain.weight.shape == (E, N, K)
    assert torch.equal(plain.weight, layer.dequantize()) and layer.weight.shape == (E, N, K)
    if layer.format.activations == "float":
        torch.testing.assert_close(plain(x(), IDS), layer(x(), IDS), rtol=1e-4, atol=1e-4)


def test_dtypes_follow_to(layer):
    y = layer(x(), IDS)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16 and half(x().bfloat16(), IDS).dtype == torch.bfloat16
    double = copy.deepcopy(layer).double()
    assert double(x().double(), IDS).dtype == torch.float64
    torch.testing.assert_close(double(x().double(), IDS).float(), y, rtol=1e-4, atol=1e-4)


def test_a_bias_of_the_call():
    stack = PackedExperts.from_float(torch.randn(E, N, K), Packed(bits=4, group_size=32))
    bias = torch.randn(E, N)
    own = PackedExperts.from_weight(_weight(stack), bias, num_experts=E)
    assert torch.equal(stack(x(), IDS, bias), own(x(), IDS))


def _weight(stack):
    from lowbit import PackedWeight
    from lowbit.core.bitpack import unpack

    t = stack.canonical()
    return PackedWeight(unpack(t["packed"], 4, K), t["scales"], t.get("zeros"), 4, 32)


@pytest.mark.parametrize("n", [1, 24, 64, 100])
def test_codes_stay_in_words_where_an_expert_is_no_whole_number_of_panels(n):
    stack = PackedExperts.from_float(torch.randn(3, n, K), Packed(bits=4, group_size=32))
    assert (stack.layout is CANONICAL) == (n % 64 != 0 or stack.layouts(stack.device) == (CANONICAL,))
    assert stack(x(), torch.tensor([0, 1, 2, 2, 1, 0])).shape == (6, n)


def test_no_tokens(layer):
    assert layer(x(0), IDS[:0]).shape == (0, N)


def test_gradients_reach_x_and_the_bias(layer):
    given = x().requires_grad_()
    layer(given, IDS).square().sum().backward()
    assert bool(given.grad.abs().sum() > 0) and bool(layer.bias.grad.abs().sum() > 0)


def test_a_compiled_layer(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x(), IDS), layer(x(), IDS))


def test_an_input_of_another_size_is_refused(layer):
    with pytest.raises(ValueError, match=r"Experts.*: input must be \[tokens, in_features=96\]: got shape \(6, 95\)"):
        layer(torch.zeros(6, 95), IDS)
    with pytest.raises(ValueError, match=r"weight must be \[E, N, K\]: got shape \(3, 4\)"):
        PackedExperts.from_float(torch.zeros(3, 4), Packed(bits=4))


def test_a_module_that_has_one(layer):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = layer

    model = Model()
    assert list(layers(model)) == ["experts"]
    assert "num_experts=4, in_features=96, out_features=64" in repr(model)
