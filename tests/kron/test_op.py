"""The ops of family ``kron`` as torch sees them: schemas, fakes, gradients, compile, export; and the backend."""

import pytest
import torch

from lowbit.backends import registry
from lowbit.testing.kron_cases import Kind, Weight, random_weight
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, activations
from lowbit.testing.transforms import opcheck
from lowbit.testing.where import everywhere, running

# rank, n1, k1, n2, k2: either product first, either factor the inner one
WEIGHTS = {
    "dense": random_weight((2, 3, 4, 5, 6), Kind(torch.float32), Kind(torch.float16)),
    "permuted": random_weight((1, 2, 1, 12, 130), Kind(torch.bfloat16), Kind(torch.bfloat16)).permuted(1),
    "packed": random_weight((2, 3, 4, 5, 6), Kind(torch.float16, 4, 3, zeros="int"), Kind(torch.float32)).permuted(2),
    "both packed": random_weight(
        (1, 20, 150, 1, 2), Kind(torch.float32, 3, 32, zeros="float"), Kind(torch.bfloat16, 8, None, True)
    ),
}


PLACES = [w for w in everywhere() if w.backend == "reference" or w.isa == everywhere()[1].isa]


@pytest.fixture(params=PLACES, ids=str)
def where(request):
    """The reference, and the compiled kernels on this machine's best ISA."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=WEIGHTS)
def weight(request) -> Weight:
    return WEIGHTS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(where, weight, dtype):
    x = activations(3, weight.k, dtype).requires_grad_()
    bias = torch.randn(weight.n, requires_grad=True)
    arguments = {
        name: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in weight.arguments.items()
    }
    opcheck(where, torch.ops.lowbit.kron_linear.default, (x,), {"bias": bias, **arguments})
    opcheck(where, torch.ops.lowbit.kron_dequantize.default, (), {"dtype": dtype, **weight.arguments})
    ids = torch.tensor([[1, 0], [7, 7]])
    opcheck(where, torch.ops.lowbit.kron_embedding.default, (ids,), {"dtype": dtype, **weight.arguments})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_input_is_grad_times_the_weight(where, weight, dtype):
    x = activations(5, weight.k, dtype).view(5, 1, -1).requires_grad_()
    bias = torch.randn(weight.n, requires_grad=True)
    dy = activations(5, weight.n, dtype, seed=2).view(5, 1, -1)
    weight.linear(x, bias).backward(dy)
    exact = dy.double() @ weight.dense()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert x.grad.dtype == dtype and bias.grad.dtype == bias.dtype
    assert float((x.grad.double() - exact).norm() / exact.norm()) < tolerance
    assert float((bias.grad.double() - dy.double().sum((0, 1))).norm()) < 1e-5


def dense_expression(weight: Weight, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """W in float64 as a differentiable expression of the trainable tensors, term by term."""

    def values(name: str) -> torch.Tensor:
        factor = getattr(weight, name)
        if not factor.kind.bits:
            return tensors[name]
        group = torch.arange(factor.values.shape[2]) // factor.numbers[1]
        zero = torch.full_like(factor.scales.double(), 2.0 ** (factor.kind.bits - 1))
        zero = tensors.get(f"{name}_zeros", zero if factor.zeros is None else factor.zeros.double())
        scales = tensors[f"{name}_scales"]
        return ((factor.codes.double() - zero[:, group]) * scales[:, group]).view_as(factor.values)

    a, b = values("a"), values("b")
    w = sum(torch.kron(a[r], b[r]) for r in range(weight.rank))
    if weight.output_permutation is not None:
        w = w[weight.output_permutation.long()]
    return w if weight.input_permutation is None else w[:, weight.input_permutation.long()]


def test_gradients_of_factors_scales_and_zeros(where, weight):
    """Against torch's own gradients of the dense expression, in float64."""
    floats = {
        name: value.clone().requires_grad_()
        for name, value in weight.arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    x, dy = activations(4, weight.k, torch.float32), activations(4, weight.n, torch.float32, 3)
    grads = torch.autograd.grad(weight.linear(x, **floats), list(floats.values()), dy)
    exact = {name: value.detach().double().requires_grad_() for name, value in floats.items()}
    expected = torch.autograd.grad(x.double() @ dense_expression(weight, exact).t(), list(exact.values()), dy.double())
    for name, value, grad, want in zip(floats, floats.values(), grads, expected, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[value.dtype]
        assert grad.dtype == value.dtype and grad.shape == value.shape, name
        assert float((grad.double() - want).norm() / want.norm()) < tolerance, name


def test_second_derivatives(where):
    """The gradient of the input is an op of its own: it can be differentiated again."""
    weight = random_weight((2, 3, 4, 5, 6))
    x = activations(3, weight.k, torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(weight.linear(x).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    w = weight.dense()
    exact = (torch.ones(3, weight.k).double() @ w.t()) @ w * 2
    assert float((ddx.double() - exact).norm() / exact.norm()) < 1e-5


def test_backward_refuses_factors_changed_after_forward(where):
    weight = random_weight((1, 2, 1, 12, 130))
    b = weight.b.tensor.clone().requires_grad_()
    y = weight.linear(activations(3, 130, torch.float32).requires_grad_(), b=b)
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Model(torch.nn.Module):
    """A tied pair: rows looked up, then multiplied with."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight
        self.bias = torch.nn.Parameter(torch.randn(weight.n))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.weight.linear(self.weight.embedding(ids), self.bias)) + 1


# a graph knows no backend: every weight meets both, one of them with sizes that change
@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("where", "weight", "dynamic"),
    [(PLACES[(i + dynamic) % len(PLACES)], name, dynamic) for i, name in enumerate(WEIGHTS) for dynamic in (0, 1)],
    indirect=["where", "weight"], ids=str,
)  # fmt: skip
def test_compile_fullgraph(where, weight, dynamic):
    torch._dynamo.reset()
    model = Model(weight)
    compiled = torch.compile(model, fullgraph=True, dynamic=bool(dynamic), backend="aot_eager")
    for shape in ((2, 3), (4, 5), (1, 1)):
        ids = torch.randint(0, weight.n, shape)
        assert_bitwise_equal(compiled(ids).detach(), model(ids).detach())


@pytest.mark.turns(3)
def test_compile_trains_factors(where, weight):
    torch._dynamo.reset()
    names = [name for name, t in weight.arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def run(function):
        x = activations(4, weight.k, torch.float32).requires_grad_()
        tensors = [weight.arguments[name].clone().requires_grad_() for name in names]
        function(x, *tensors).sin().sum().backward()
        return [x.grad, *(t.grad for t in tensors)]

    def linear(x, *tensors):
        return weight.linear(x, **dict(zip(names, tensors, strict=True)))

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for found, want in zip(run(compiled), run(linear), strict=True):
        torch.testing.assert_close(found, want)  # a graph may keep a factor transposed: sums in another order


def test_export(where, weight):
    model, ids = Model(weight), torch.randint(0, weight.n, (2, 3))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: batch}})
    other = torch.randint(0, weight.n, (5, 3))
    assert_bitwise_equal(program.module()(other).detach(), model(other).detach())


def test_meta_tensors_give_shapes_and_refuse_wrong_ones(weight):
    meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in weight.arguments.items()
    }
    x = torch.empty(2, 3, weight.k, device="meta", dtype=torch.bfloat16)
    y = weight.linear(x, **meta)
    assert y.shape == (2, 3, weight.n) and y.dtype == torch.bfloat16
    assert weight.dequantize(**meta).shape == (weight.n, weight.k)
    assert weight.embedding(torch.zeros(4, dtype=torch.int64, device="meta"), **meta).shape == (4, weight.k)
    with pytest.raises(RuntimeError, match="x must be of shape"):
        weight.linear(x[..., 1:], **meta)
    with pytest.raises(RuntimeError, match="b must be of shape|a must be of shape"):
        weight.linear(x, **{**meta, "rank": weight.rank + 1})


def test_autocast_casts_x_and_nothing_else(where, weight):
    def run(dtype):
        x = activations(3, weight.k, torch.float32).requires_grad_()
        y = weight.linear(x.to(dtype), torch.ones(weight.n))
        y.backward(activations(3, weight.n, torch.bfloat16, seed=2))
        return y.detach(), x.grad

    expected = run(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(torch.float32)
    for tensor, want in zip(found, expected, strict=True):
        assert_bitwise_equal(tensor, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(where, weight, dtype):
    x, ids = activations(3, weight.k, torch.float32), torch.tensor([3, 0])

    def run():
        given = x.clone().requires_grad_()
        weight.linear(given, torch.ones(weight.n, dtype=torch.float32)).sum().backward()
        return weight.linear(x), weight.dequantize(), weight.embedding(ids), given.grad

    expected, default = run(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(default)
    for tensor, want in zip(found, expected, strict=True):
        assert_bitwise_equal(tensor, want)


@pytest.mark.skipif(registry.why_unavailable("cpu") is not None, reason="no compiled kernels")
@pytest.mark.parametrize("op", ["kron_linear", "kron_dequantize", "kron_embedding"])
def test_a_named_backend_is_what_runs(op, monkeypatch):
    weight, called = WEIGHTS["dense"], []
    original = registry._references[op]
    monkeypatch.setitem(registry._references, op, lambda *a: called.append(1) or original(*a))
    call = {
        "kron_linear": lambda: weight.linear(activations(2, weight.k, torch.float32)),
        "kron_dequantize": weight.dequantize,
        "kron_embedding": lambda: weight.embedding(torch.tensor([1])),
    }[op]
    with registry.use_backend("reference"):
        call()
        assert called == [1]
    call()
    with registry.use_backend("cpu"):
        call()
    assert called == [1]
