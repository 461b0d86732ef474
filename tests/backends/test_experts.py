"""The ops of experts as torch sees them: schemas, fakes, gradients, transforms, graphs."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from lowbit import Codebook, CodebookExperts, Packed, PackedExperts, make_trainable
from lowbit.nn.experts import experts_linear
from lowbit.packed.format import PackedFormat
from lowbit.testing import codebook_cases, packed_cases
from lowbit.testing.packed_cases import activations, random_weight
from lowbit.testing.transforms import TRANSFORMS, assert_same, opcheck
from lowbit.testing.where import everywhere, running

E, N, K = 3, 10, 70
FORMATS = [
    PackedFormat(4, E * N, K, 16, "group", "int", "float16", outliers=9),
    PackedFormat(3, E * N, K, K, "row", "float", "float32"),
    PackedFormat(2, E * N, K, K, "tensor", "none", "bfloat16"),
]
IDS = torch.tensor([1, 0, 3, 2, 2, 1, 0, 0])  # 3: an expert that is elsewhere
PLACES = [w for w in everywhere(False) if w.backend == "reference" or w.isa == everywhere(False)[1].isa]


@pytest.fixture(params=PLACES, ids=str)
def where(request):
    with running(request.param):
        yield request.param


def product(weight, x, ids=IDS, bias=None):
    activation = dict(x_scale=None, int8=False, x_group=0)
    return torch.ops.lowbit.packed_experts(x, ids, **weight.arguments, num_experts=E, bias=bias, **activation)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.describe())
def test_opcheck(where, format):
    w, bias = random_weight(format), torch.randn(E * N, requires_grad=True)
    x = activations(4, K, torch.float32).requires_grad_()
    for given, int8 in ((bias, False), (None, True)):
        opcheck(where, torch.ops.lowbit.packed_experts.default, (x, IDS, *w.operands, E, given, None, int8, 0))


def test_opcheck_of_a_codebook(where):
    kind = next(k for k in codebook_cases.kinds(3, E * N, K, 16) if k.scales == "float")
    w = codebook_cases.random_weight(kind)
    x = activations(4, K, torch.float32).requires_grad_()
    opcheck(where, torch.ops.lowbit.codebook_experts.default, (x, IDS, *w.operands, E, None, None, False))


@pytest.mark.parametrize("tensor", ["x", "bias"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, tensor):
    """Against float64, for a function of x, each row of which has two experts, and for one of a bias."""
    w = packed_cases.random_weight(PackedFormat(4, 3 * 4, 10, 4, "group", zeros="float", outliers=20))
    ids = torch.tensor([1, 0, 2, 2, 3, 1])  # 3: an expert that is elsewhere
    x, bias = activations(3, 10, torch.float32), activations(1, 12, torch.float32, 4)[0]
    activation = dict(x_scale=None, int8=False, x_group=0)
    chosen = torch.nn.functional.one_hot(ids, 4)[:, :3].double()

    def ours(t):
        given = (t, bias) if tensor == "x" else (x, t)
        op = torch.ops.lowbit.packed_experts
        return op(given[0], ids, **w.arguments, num_experts=3, bias=given[1], **activation)

    def exact(t):
        given_x, given_bias = (t, bias.double()) if tensor == "x" else (x.double(), t)
        every = (given_x.repeat_interleave(2, 0) @ w.dense().t() + given_bias).view(6, 3, 4)
        return (every * chosen[:, :, None]).sum(1)

    assert_same(name, ours, exact, x if tensor == "x" else bias)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("family", ["packed", "codebook"])
def test_gradients_of_the_tensors_of_the_weight(where, family, repeats):
    """Those of float64 autograd through the dense weights of the experts."""
    if family == "packed":
        layer, names = PackedExperts.from_float(torch.randn(E, N, K), Packed(bits=3, group_size=16, outliers=0.01)), (
            "scales", "zeros", "outlier_values")  # fmt: skip
    else:
        layer, names = CodebookExperts.from_float(torch.randn(E, N, K), Codebook(bits=2)), ("codebook",)
    make_trainable(layer, *names)
    x, ids, seed = activations(len(IDS) // repeats, K, torch.float32), IDS, torch.randn(len(IDS), N)
    (layer(x, ids) * seed).sum().backward()
    exact = copy.deepcopy(layer)
    for name in names:
        getattr(exact, name).grad = None
    (experts_linear(x.double(), ids, exact.dequantize().double(), None) * seed.double()).sum().backward()
    for name in names:
        assert getattr(layer, name).grad.any()
        torch.testing.assert_close(getattr(layer, name).grad, getattr(exact, name).grad, rtol=1e-4, atol=1e-4)


def test_vmap_is_one_call_after_the_other(where):
    w, x = random_weight(FORMATS[0]), activations(12, K, torch.float32).view(3, 4, K)
    ids = torch.stack([IDS, IDS.flip(0), IDS])
    y = torch.vmap(lambda x, ids: product(w, x, ids))(x, ids)
    for one, x_, ids_ in zip(y, x, ids, strict=True):
        assert torch.equal(one, product(w, x_, ids_))


def test_autocast_rounds_x_as_it_does_for_a_linear(where):
    w, x = random_weight(FORMATS[0]), activations(4, K, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = product(w, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, product(w, x.bfloat16()))


def test_a_graph_with_its_backward(where):
    w, x = random_weight(FORMATS[1]), activations(4, K, torch.float32)

    def loss(x):
        return product(w, x * 2).square().sum()

    expected = torch.autograd.functional.jacobian(loss, x)
    given = x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(given).backward()
    assert torch.equal(given.grad, expected)


def test_what_has_no_tangent_says_so(where):
    w = random_weight(FORMATS[1])
    with forward_ad.dual_level():
        moved = replace(w, scales=forward_ad.make_dual(w.scales, torch.ones_like(w.scales)))
        with pytest.raises(RuntimeError, match="packed_experts has no tangent with respect to scales"):
            product(moved, activations(4, K, torch.float32))
