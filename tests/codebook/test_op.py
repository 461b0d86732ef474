"""The ops of family ``codebook`` as torch sees them: schemas, fakes, gradients, compile, export."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit.backends import reference
from lowbit.backends.reference import row_ranges
from lowbit.codebook.format import CodebookWeight
from lowbit.codebook.gradient import with_mean_gradient
from lowbit.codebook.module import CodebookLinear
from lowbit.codebook.operands import CodebookOperands
from lowbit.core.bitpack import pack
from lowbit.testing.codebook_cases import Kind, Weight, random_weight
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, activations
from lowbit.testing.transforms import opcheck
from lowbit.testing.where import everywhere, running

KINDS = [
    Kind(4, 10, 70, 16, "tensor", "float", scale_dtype=torch.float16),
    Kind(4, 10, 70, 16, "tensor", "nested", outliers=9),
    Kind(3, 10, 70, 70, "row", "none", outliers=9),
    Kind(2, 10, 70, 16, "group", "none"),
    Kind(5, 10, 70, 70, "tensor", "none", dtype=torch.bfloat16),
    Kind(1, 10, 70, 16, "row", "float"),
]


PLACES = [w for w in everywhere() if w.backend == "reference" or w.isa == everywhere()[1].isa]


@pytest.fixture(params=PLACES, ids=str)
def where(request):
    """The reference, and the compiled kernels on this machine's best ISA."""
    with running(request.param):
        yield request.param


def trainable(w: Weight, *names: str) -> dict[str, nn.Parameter]:
    """Float32 copies of these tensors of ``w``, put in their places."""
    found = {}
    if "codebook" in names:
        w.codebook = found["codebook"] = nn.Parameter(w.codebook.float())
    if "scales" in names and w.scales is not None and w.scales.is_floating_point():
        w.scales = found["scales"] = nn.Parameter(w.scales.float())
    if "outlier_values" in names and w.outliers[0] is not None:
        found["outlier_values"] = nn.Parameter(w.outliers[0].float())
        w.outliers = (found["outlier_values"], *w.outliers[1:])
    return found


def dense_formula(w: Weight) -> torch.Tensor:
    """The weight as a differentiable expression of its tensors."""
    kind = w.kind
    row, group = torch.arange(kind.n)[:, None], torch.arange(kind.k) // kind.group_size
    dense = w.codebook.float().expand(kind.n, kind.groups, -1)[row, group, w.codes.long()]
    scale = w.scales if w.nested[0] is None else w.scale()
    if scale is not None:
        dense = dense * scale.float()[:, group]
    values, columns, rows = w.outliers
    if values is not None:
        at = torch.repeat_interleave(torch.arange(kind.n), (rows[1:] - rows[:-1]).long())
        dense = dense.index_put((at, columns.long()), values.float(), accumulate=True)
    return dense


def close(found: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    found, want = found.detach().double(), want.detach().double()
    return found.shape == want.shape and float((found - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(where, kind):
    w, int8 = random_weight(kind), kind in KINDS[::2]
    x = activations(3, kind.k, torch.float32).requires_grad_()
    bias = torch.randn(kind.n, requires_grad=True)
    trainable(w, "codebook", "scales", "outlier_values")
    opcheck(where, torch.ops.lowbit.codebook_linear.default, (x, *w.operands, bias, None, int8))
    w = random_weight(kind)
    opcheck(where, torch.ops.lowbit.codebook_dequantize.default, (*w.operands, kind.k, torch.float16))
    ids = torch.tensor([[1, 0], [7, 7]])
    opcheck(where, torch.ops.lowbit.codebook_embedding.default, (ids, *w.operands, kind.k, torch.bfloat16))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient_of_the_input_is_grad_times_the_weight(where, kind, dtype, int8):
    """For int8 activations too: their gradient is the straight-through estimator."""
    w = random_weight(kind)
    x = activations(5, kind.k, dtype).view(5, 1, -1).requires_grad_()
    bias = nn.Parameter(torch.randn(kind.n))
    dy = activations(5, kind.n, dtype, seed=2).view(5, 1, -1)
    w.linear(x, bias, int8=int8).backward(dy)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert x.grad.dtype == dtype
    assert close(x.grad, dy.double() @ w.dense(), tolerance)
    assert float((bias.grad.double() - dy.double().sum((0, 1))).norm()) < 10 * tolerance


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_large_weight_is_worked_on_in_blocks(where, kind, monkeypatch):
    kind = replace(kind, n=137)
    w = random_weight(kind)
    x = activations(5, kind.k, torch.float32).requires_grad_()
    dy = activations(5, kind.n, torch.float32, seed=2)
    y, rows = w.linear(x), w.dequantize()
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 3 * kind.k)
    assert len(list(row_ranges(kind.n, kind.k))) == 3
    assert_bitwise_equal(w.dequantize(), rows)
    assert close(w.linear(x), y, 1e-6)
    assert close(w.linear(x, int8=True), y, 0.05)
    w.linear(x).backward(dy)
    assert close(x.grad, dy.double() @ w.dense(), 1e-6)


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_tables_scales_and_outliers(where, kind, int8, mean):
    """Against torch's own gradients of the dense expression; the mean divides by the members of each entry."""
    w = random_weight(kind)
    found = trainable(w, "codebook", "scales", "outlier_values")
    x, dy = activations(4, kind.k, torch.float32), activations(4, kind.n, torch.float32, 3)
    grads = torch.autograd.grad(w.linear(x, int8=int8, mean_gradient=mean), list(found.values()), dy)
    expected = torch.autograd.grad(x @ dense_formula(w).t(), list(found.values()), dy)
    for name, grad, want in zip(found, grads, expected, strict=True):
        if name == "codebook" and mean:
            want = want / members(w).clamp(min=1)
        assert close(grad, want), name


def members(w: Weight) -> torch.Tensor:
    """How many weights use each entry of the codebook, counted one by one."""
    count = torch.zeros(w.codebook.shape)
    for n in range(w.kind.n):
        for k in range(w.kind.k):
            table = (n if count.shape[0] > 1 else 0, k // w.kind.group_size if count.shape[1] > 1 else 0)
            count[(*table, int(w.codes[n, k]))] += 1
    return count


def test_a_layer_says_what_the_gradient_of_its_centroids_is():
    w = random_weight(KINDS[3])
    stored = CodebookWeight(w.codes.to(torch.uint8), w.codebook, group_size=w.kind.group_size)
    layer = CodebookLinear.from_weight(stored)
    layer.codebook.requires_grad_()
    found = {}
    for layer.centroid_gradient in ("sum", "mean"):
        layer.codebook.grad = None
        layer(activations(4, w.kind.k, torch.float32)).square().sum().backward()
        found[layer.centroid_gradient] = layer.codebook.grad
    assert close(found["mean"] * members(w), found["sum"])
    assert not close(found["mean"], found["sum"])
    with pytest.raises(ValueError, match="centroid_gradient must be 'mean' or 'sum': got 'max'"):
        layer.centroid_gradient = "max"


def test_an_entry_without_members_has_no_gradient(where):
    w = random_weight(KINDS[2])
    w.codes.clamp_(max=6)
    w.packed = pack(w.codes, 3)
    (codebook,) = trainable(w, "codebook").values()
    w.linear(activations(4, 70, torch.float32), mean_gradient=True).sum().backward()
    assert not bool(codebook.grad[..., 7].any()) and bool(codebook.grad[..., :7].all())


def test_finite_differences(where):
    """In directions of every float input, where the float32 output is smooth."""
    w = random_weight(KINDS[0])
    inputs = {**trainable(w, "codebook", "scales"), "x": activations(4, 70, torch.float32).requires_grad_()}
    dy = activations(4, 10, torch.float32, seed=3)
    grads = torch.autograd.grad(w.linear(inputs["x"]), list(inputs.values()), dy)
    for tensor, grad in zip(inputs.values(), grads, strict=True):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                tensor.add_(direction, alpha=sign * 0.01)
                slopes.append(float((w.linear(inputs["x"]).double() * dy).sum()))
                tensor.sub_(direction, alpha=sign * 0.01)
        measured, expected = (slopes[0] - slopes[1]) / 0.02, float((grad.double() * direction).sum())
        assert abs(measured - expected) < 1e-3 * float(grad.norm()) * float(direction.norm())


def test_backward_refuses_a_table_changed_after_forward(where):
    w = random_weight(KINDS[2])
    (codebook,) = trainable(w, "codebook").values()
    y = w.linear(activations(3, 70, torch.float32).requires_grad_())
    with torch.no_grad():
        codebook.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Model(nn.Module):
    """An embedding and a linear layer, straight on the ops."""

    def __init__(self, kind: Kind):
        super().__init__()
        embedding = Kind(4, 20, 70, 35, "row", "float")
        self.kinds = {"embedding": embedding, "linear": kind}
        for part, w in (("embedding", random_weight(embedding)), ("linear", random_weight(kind))):
            for name in CodebookOperands.tensor_names:
                tensor = getattr(w.operands, name)
                setattr(self, f"{part}_{name}", None if tensor is None else nn.Buffer(tensor))
        self.codebook = nn.Parameter(self.linear_codebook.float())
        self.bias = nn.Parameter(torch.randn(kind.n))

    def operands(self, part):
        kind, names = self.kinds[part], CodebookOperands.tensor_names
        tensors = {name: getattr(self, f"{part}_{name}") for name in names}
        return CodebookOperands(**tensors, bits=kind.bits, group_size=kind.group_size, layout=0)

    def forward(self, ids):
        embedding = self.operands("embedding")
        x = torch.ops.lowbit.codebook_embedding(ids, *embedding, self.kinds["embedding"].k, torch.float32)
        linear = replace(self.operands("linear"), codebook=self.codebook)
        linear = with_mean_gradient(linear, self.kinds["linear"].k)
        y = torch.ops.lowbit.codebook_linear(x, *linear, self.bias, None, False)
        return torch.relu(y) + 1


# a graph knows no backend: each is met with sizes that change, and one with sizes that do not
@pytest.mark.parametrize(
    ("where", "kind", "dynamic"),
    [(PLACES[-1], KINDS[0], True), (PLACES[0], KINDS[1], True), (PLACES[-1], KINDS[1], False)],
    indirect=["where"], ids=str,
)  # fmt: skip
def test_compile_fullgraph(where, kind, dynamic):
    torch._dynamo.reset()
    model = Model(kind)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 3), (4, 5), (1, 1)):
        ids = torch.randint(0, 20, shape)
        assert_bitwise_equal(compiled(ids).detach(), model(ids).detach())


@pytest.mark.parametrize("kind", KINDS[1:4], ids=str)
def test_compile_trains_the_codebook(where, kind):
    torch._dynamo.reset()
    model, ids = Model(kind), torch.randint(0, 20, (2, 3))
    torch.compile(lambda ids: model(ids).sin().sum(), fullgraph=True, backend="aot_eager")(ids).backward()
    compiled, model.codebook.grad = model.codebook.grad, None
    model(ids).sin().sum().backward()
    assert close(compiled, model.codebook.grad, 1e-6)


def test_compile_inductor(where):
    torch._dynamo.reset()
    model, ids = Model(KINDS[1]), torch.randint(0, 20, (2, 3))
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True)(ids)
        assert float((y - model(ids)).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS[1:3], ids=str)
def test_export(where, kind):
    model, ids = Model(kind), torch.randint(0, 20, (2, 3))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: batch}})
    other = torch.randint(0, 20, (5, 3))
    assert_bitwise_equal(program.module()(other).detach(), model(other).detach())


def test_meta_tensors_give_shapes():
    model = Model(KINDS[1]).to("meta")
    assert model(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 10)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_autocast_casts_x_and_nothing_else(where, int8):
    def run(dtype):
        w = random_weight(KINDS[0])
        found = trainable(w, "codebook", "scales")
        x = activations(3, 70, torch.float32).requires_grad_()
        y = w.linear(x.to(dtype), torch.ones(10), int8=int8)
        return y.detach(), *torch.autograd.grad(y, [x, *found.values()], activations(3, 10, torch.bfloat16, seed=2))

    expected = run(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(torch.float32)
    for tensor, want in zip(found, expected, strict=True):
        assert_bitwise_equal(tensor, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_default_dtype_changes_nothing(where, kind, dtype):
    w, x = random_weight(kind), activations(3, 70, torch.float32)
    trainable(w, "codebook")
    bias, x_scale, ids = torch.ones(10), torch.tensor([0.02]), torch.tensor([3, 0])

    def run():
        given = x.clone().requires_grad_()
        grads = torch.autograd.grad(w.linear(given, bias, mean_gradient=True).sum(), [given, w.codebook])
        return (
            w.linear(x, bias), w.linear(x, bias, int8=True), w.linear(x, int8=True, x_scale=x_scale),
            w.dequantize(), w.embedding(ids), *grads,
        )  # fmt: skip

    expected, default = run(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(default)
    for tensor, want in zip(found, expected, strict=True):
        assert_bitwise_equal(tensor.detach(), want.detach())


FAKE_MALFORMED = {
    "table": (lambda w: {"codebook": w.codebook[..., :8]}, "codebook must be"),
    "scales": (lambda w: {"scales": w.scales[:, :-1]}, "scales must be"),
    "nested": (lambda w: {"nested": (w.nested[0], None, None)}, "must be given together"),
    "words": (lambda w: {"packed": w.packed[:, :-1]}, "words per row"),
}


@pytest.mark.parametrize("name", FAKE_MALFORMED)
def test_a_fake_refuses_what_the_kernel_refuses(name):
    w = random_weight(KINDS[1])
    change, message = FAKE_MALFORMED[name]
    w = replace(w, **change(w))
    given = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in w.arguments.items()}
    given["layout"] = 0
    x = torch.empty(2, 70, device="meta")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.codebook_linear(x, **given, bias=None, x_scale=None, int8=False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.codebook_dequantize(**given, in_features=70, dtype=torch.float32)
