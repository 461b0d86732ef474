"""What torch asks an op for besides its result: every transform × family × op × tensor, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.packed.format import PackedFormat
from lowbit.testing import codebook_cases, kron_cases, packed_cases
from lowbit.testing.transforms import TRANSFORMS, assert_same

IDS = torch.tensor([[3, 0], [5, 3]])


@dataclass
class Case:
    """A random weight: the arguments of its ops by name, float32 tensors that have derivatives, W of all of them."""

    family: str
    weight: Any
    trained: tuple[str, ...]
    dense: Callable[[dict[str, Any]], Tensor]
    k: int

    def __post_init__(self) -> None:
        self.arguments = dict(self.weight.arguments)
        for name in self.trained:
            self.arguments[name] = self.arguments[name].float()
        self.sized = {} if self.family == "kron" else {"in_features": self.k}

    def op(self, kind: str, *first: Tensor, bias: Tensor | None = None, **changed: Any) -> Tensor:
        op = getattr(torch.ops.lowbit, f"{self.family}_{kind}")
        weight = {**self.arguments, **changed}
        if kind == "linear":
            activation = {} if self.family == "kron" else {"x_scale": None, "int8": False}
            activation |= {"x_group": 0} if self.family == "packed" else {}
            return op(*first, **{**activation, **weight}, bias=bias)
        return op(*first, **weight, **self.sized, dtype=torch.float32)

    def exact(self, kind: str, *first: Tensor, bias: Tensor | None = None, **changed: Tensor) -> Tensor:
        w = self.dense({**self.arguments, **changed})
        if kind == "linear":
            return F.linear(*(t.double() for t in first), w, None if bias is None else bias.double())
        return w if kind == "dequantize" else F.embedding(*first, w)


def outliers_of(a: dict[str, Any], n: int, k: int) -> Tensor:
    values, columns, rows = a["outlier_values"], a["outlier_columns"], a["outlier_rows"]
    at = torch.repeat_interleave(torch.arange(n), (rows[1:] - rows[:-1]).long()) * k + columns.long()
    return values.new_zeros(n * k, dtype=torch.float64).index_add(0, at, values.double()).view(n, k)


def per_column(values: Tensor, group: Tensor) -> Tensor:
    return values.double().index_select(1, group)


def packed_case() -> Case:
    weight = packed_cases.random_weight(PackedFormat(4, 6, 10, 4, "group", zeros="float", outliers=20))
    group = torch.arange(10) // 4

    def dense(a: dict[str, Any]) -> Tensor:
        coded = (weight.codes.double() - per_column(a["zeros"], group)) * per_column(a["scales"], group)
        return coded + outliers_of(a, 6, 10)

    return Case("packed", weight, ("scales", "zeros", "outlier_values"), dense, 10)


def codebook_case(tables: str, scales: str) -> Case:
    kind = codebook_cases.Kind(2, 6, 10, 4, tables, scales, outliers=20)
    weight = codebook_cases.random_weight(kind)
    group = torch.arange(10) // 4
    of_row = torch.arange(6 if weight.codebook.shape[0] > 1 else 1) * weight.codebook.shape[1] * 4
    place = of_row[:, None] + (group if tables == "group" else 0) * 4 + weight.codes.long()
    nested = ("scale_codebook", "scale_absmax", "scale_offset")

    def dense(a: dict[str, Any]) -> Tensor:
        coded = a["codebook"].double().reshape(-1).index_select(0, place.reshape(-1)).view(6, 10)
        if scales == "nested":
            table, absmax, offset = (a[name].double() for name in nested)
            scale = table.index_select(0, a["scales"].long().view(-1)).view(6, 3) * absmax + offset
            coded = coded * scale.index_select(1, group)
        elif scales == "float":
            coded = coded * per_column(a["scales"], group)
        return coded + outliers_of(a, 6, 10)

    trained = {"none": (), "float": ("scales",), "nested": nested}[scales]
    return Case("codebook", weight, ("codebook", *trained, "outlier_values"), dense, 10)


def kron_case(packed: bool) -> Case:
    a = kron_cases.Kind(torch.float32, 4, 2, zeros="float") if packed else kron_cases.DENSE[0]
    weight = kron_cases.random_weight((2, 3, 3, 2, 4), a).permuted(1)
    inputs, outputs = weight.input_permutation, weight.output_permutation

    def dense(t: dict[str, Any]) -> Tensor:
        left = t["a"].double()
        if packed:
            group = torch.arange(3) // 2
            left = (weight.a.codes.double() - per_column(t["a_zeros"], group)) * per_column(t["a_scales"], group)
        whole = left.reshape(2, 9).t() @ t["b"].double().reshape(2, 8)
        whole = whole.view(3, 3, 2, 4).transpose(1, 2).reshape(6, 12)
        return whole.index_select(0, outputs).index_select(1, inputs)

    return Case("kron", weight, ("a_scales", "a_zeros", "b") if packed else ("a", "b"), dense, 12)


CASES = {
    "packed": packed_case(),
    "codebook-row": codebook_case("row", "none"),
    "codebook-float": codebook_case("group", "float"),
    "codebook-nested": codebook_case("tensor", "nested"),
    "kron": kron_case(False),
    "kron-packed": kron_case(True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
trained = pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in CASES.values() for name in case.trained],
    ids=[f"{key}-{name}" for key, case in CASES.items() for name in case.trained],
)  # fmt: skip
transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def activations(case: Case) -> Tensor:
    return torch.randn(3, case.k, generator=torch.Generator().manual_seed(1))


@cases
@transforms
def test_of_x(case, transform):
    assert_same(transform, lambda x: case.op("linear", x), lambda x: case.exact("linear", x), activations(case))


@cases
def test_of_the_bias(case):
    x, bias = activations(case), torch.linspace(-1, 1, 6)
    for transform in TRANSFORMS:
        assert_same(transform, lambda b: case.op("linear", x, bias=b), lambda b: case.exact("linear", x, bias=b), bias)


@trained
@pytest.mark.parametrize("kind", ["linear", "embedding", "dequantize"])
def test_of_a_tensor_of_the_weight(case, name, kind):
    first = {"linear": [activations(case)], "embedding": [IDS], "dequantize": []}[kind]
    for transform in TRANSFORMS:
        assert_same(
            transform,
            lambda t: case.op(kind, *first, **{name: t}),
            lambda t: case.exact(kind, *first, **{name: t}),
            case.arguments[name],
        )


@cases
def test_of_everything_at_once(case):
    """Mixed second derivatives: of x by tensors, of tensors by x."""
    tensors = {name: case.arguments[name] for name in case.trained} | {"x": activations(case)}

    def loss(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda t: op("linear", t["x"], **{n: v for n, v in t.items() if n != "x"}).div(4).tanh().square().sum()

    exact = {name: tensor.double() for name, tensor in tensors.items()}
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        found = outer(torch.func.grad(loss(case.op)))(tensors)
        want = outer(torch.func.grad(loss(case.exact)))(exact)
        for a in tensors:
            for b in tensors:
                torch.testing.assert_close(found[a][b].double(), want[a][b], rtol=1e-4, atol=2e-5)


@cases
def test_a_batch_of_ids(case):
    batch = torch.stack([IDS, IDS.flip(0)])
    for dim in (0, 1):
        y = torch.vmap(lambda ids: case.op("embedding", ids), dim, dim)(batch)
        assert torch.equal(y, case.op("embedding", batch))
    name = case.trained[0]
    tensor = case.arguments[name]

    def gradients(op: Callable[..., Tensor], tensor: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda t, ids: op("embedding", ids, **{name: t}).square().sum())
        return torch.vmap(gradient, (None, 0))(tensor, batch)

    found, want = gradients(case.op, tensor), gradients(case.exact, tensor.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@cases
def test_a_batch_of_weights(case):
    """An ensemble: all tensors of the weight are batched, x is or is not."""
    stacked = {n: torch.stack([t, t]) for n, t in case.arguments.items() if isinstance(t, Tensor)}
    x = activations(case)
    y = torch.vmap(lambda tensors: case.op("linear", x, **tensors))(stacked)
    assert torch.equal(y, case.op("linear", x).expand_as(y))
    y = torch.vmap(lambda tensors, x: case.op("linear", x, **tensors))(stacked, torch.stack([x, -x]))
    assert torch.equal(y[1], case.op("linear", -x))
    empty = {n: t[:0] for n, t in stacked.items()}
    with pytest.raises(RuntimeError, match=rf"vmap of lowbit.{case.family}_linear.default over .* got 0"):
        torch.vmap(lambda tensors: case.op("linear", x, **tensors))(empty)


@trained
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_no_rows_have_derivatives_too(case, name, kind):
    first, tensor = activations(case)[:0] if kind == "linear" else IDS[:0], case.arguments[name]

    def f(tensor: Tensor) -> Tensor:
        return case.op(kind, first, **{name: tensor})

    gradient = torch.func.grad(lambda tensor: f(tensor).sum())(tensor)
    assert torch.equal(gradient, torch.zeros_like(tensor))
    assert torch.func.jvp(f, (tensor,), (tensor,))[1].shape == f(tensor).shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@cases
def test_half_precision(case, dtype):
    """In float32 inside, rounded once: as the product with the same numbers."""
    x = activations(case).to(dtype)
    found = torch.func.jvp(lambda x: case.op("linear", x), (x,), (x,))[1]
    assert found.dtype == dtype
    want = case.exact("linear", x)
    assert float((found.double() - want).norm() / want.norm()) < torch.finfo(dtype).eps


@cases
def test_int8_activations_are_straight_through(case):
    if case.family == "kron":
        pytest.skip("kron multiplies floats")
    x = activations(case)
    tangent = torch.func.jvp(lambda x: case.op("linear", x, int8=True), (x,), (x.cos(),))[1]
    torch.testing.assert_close(tangent.double(), case.exact("linear", x.cos()), rtol=1e-5, atol=1e-6)
    jacobian = torch.func.jacfwd(lambda x: case.op("linear", x, int8=True))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: case.op("linear", x, int8=True))(x))


def test_a_derivative_that_does_not_exist_is_named():
    case, scale = CASES["packed"], torch.tensor([0.1])
    x = activations(case)

    def f(scale: Tensor) -> Tensor:
        return case.op("linear", x, int8=True, x_scale=scale)

    with pytest.raises(RuntimeError, match="lowbit::packed_linear has no gradient with respect to x_scale"):
        torch.func.vjp(f, scale)[1](torch.ones(3, 6))
    with pytest.raises(RuntimeError, match="lowbit::packed_linear has no tangent with respect to x_scale"):
        torch.func.jvp(f, (scale,), (scale,))


@cases
def test_gradients_of_float32_masters_are_float32(case):
    """Not rounded to the dtype of x on the way: they hold what float16 would lose."""
    x = activations(case).half()
    for name in case.trained:
        tensor = case.arguments[name].clone().requires_grad_()
        dy = torch.full((3, 6), 1e-4, dtype=torch.float16)
        (found,) = torch.autograd.grad(case.op("linear", x, **{name: tensor}), tensor, dy)
        exact = tensor.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(case.exact("linear", x, **{name: exact}), exact, dy.double())
        assert found.dtype == torch.float32
        assert float((found - want).norm() / want.norm()) < 5e-6


@pytest.mark.turns(3)
@cases
def test_compiled(case):
    """Forward and backward of every op as one graph: what is differentiable stays so."""
    torch._dynamo.reset()
    name = case.trained[0]

    def f(t: Tensor, x: Tensor) -> Tensor:
        changed = {name: t * 1}
        results = [case.op("linear", x, **changed), case.op("embedding", IDS, **changed)]
        return sum(y.sin().sum() for y in (*results, case.op("dequantize", **changed)))

    found = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        t, x = case.arguments[name].clone().requires_grad_(), activations(case).requires_grad_()
        found.append(torch.autograd.grad(function(t, x), [t, x]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@cases
def test_opcheck(case):
    changed = {name: case.arguments[name].clone().requires_grad_() for name in case.trained}
    ops = torch.ops.lowbit
    weight = {**case.arguments, **changed}
    torch.library.opcheck(
        getattr(ops, f"{case.family}_dequantize").default, (), {**weight, **case.sized, "dtype": torch.float32}
    )
    torch.library.opcheck(
        getattr(ops, f"{case.family}_embedding").default, (IDS,), {**weight, **case.sized, "dtype": torch.float32}
    )
