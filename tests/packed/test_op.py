"""The ops as torch sees them: schemas, fakes, gradients, compile, export; and the choice of a backend."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit.backends import reference, registry
from lowbit.backends.cpu import native
from lowbit.backends.reference import row_ranges
from lowbit.packed.format import PackedFormat
from lowbit.packed.module import PackedEmbedding, PackedLinear
from lowbit.packed.operands import PackedOperands
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, activations, random_weight
from lowbit.testing.transforms import opcheck
from lowbit.testing.where import everywhere, running

FORMATS = [
    PackedFormat(4, 10, 70, 16, "group", "int", "float16", outliers=9),
    PackedFormat(3, 10, 70, 70, "row", "float", "float32"),
    PackedFormat(2, 10, 70, 70, "tensor", "none", "bfloat16"),
]
format_ids = [f.describe() for f in FORMATS]


PLACES = [w for w in everywhere() if w.backend == "reference" or w.isa == everywhere()[1].isa]


@pytest.fixture(params=PLACES, ids=str)
def where(request):
    """The reference, and the compiled kernels on this machine's best ISA."""
    with running(request.param):
        yield request.param


def layer_of(format: PackedFormat, bias: bool = True) -> PackedLinear:
    weight = random_weight(format)
    layer = PackedLinear(format, bias)
    layer.store({"packed": weight.packed})
    layer.store({"scales": weight.scales})
    if weight.zeros is not None:
        layer.store({"zeros": weight.zeros})
    for name, tensor in zip(("values", "columns", "rows"), weight.outliers, strict=True):
        if tensor is not None:
            layer.store({f"outlier_{name}": tensor})
    if bias:
        nn.init.normal_(layer.bias)
    layer.validate()
    return layer


@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
def test_opcheck(where, format):
    w, k = random_weight(format), format.in_features
    x = activations(3, k, torch.float32).requires_grad_()
    bias = torch.randn(format.out_features, requires_grad=True)
    # finite differences of a rounded input say nothing: gradients are checked against formulas below
    for int8, x_group in ((False, 0), (True, 0), (True, 32)):
        opcheck(where, torch.ops.lowbit.packed_linear.default, (x, *w.operands, bias, None, int8, x_group))
    opcheck(where, torch.ops.lowbit.packed_dequantize.default, (*w.operands, k, torch.float16))
    ids = torch.tensor([[1, 0], [7, 7]])
    opcheck(where, torch.ops.lowbit.packed_embedding.default, (ids, *w.operands, k, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
def test_gradient_of_the_input_is_grad_times_the_weight(where, format, dtype):
    layer = layer_of(format)
    x = activations(5, format.in_features, dtype).view(5, 1, -1).requires_grad_()
    dy = activations(5, format.out_features, dtype, seed=2).view(5, 1, -1)
    layer(x).backward(dy)
    exact = dy.double() @ layer.dequantize(torch.float32).double()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert x.grad.dtype == dtype
    assert float((x.grad.double() - exact).norm() / exact.norm()) < tolerance
    assert float((layer.bias.grad.double() - dy.double().sum((0, 1))).norm()) < 10 * tolerance


@pytest.mark.parametrize("prepared", [False, True], ids=["canonical", "prepared"])
@pytest.mark.parametrize("format", [*FORMATS, replace(FORMATS[0], outliers=0)], ids=lambda f: f.describe())
def test_the_input_gradient_of_a_large_weight_is_summed_over_blocks(where, format, prepared, monkeypatch):
    """Prepared as ``convert`` leaves a layer: on a CPU, scales and zeros stand group after group."""
    layer = layer_of(replace(format, out_features=137))
    if prepared:
        layer.prepare()
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 3 * format.in_features)
    assert len(list(row_ranges(137, format.in_features))) == 3
    x = activations(5, format.in_features, torch.float32).requires_grad_()
    dy = activations(5, 137, torch.float32, seed=2)
    layer(x).backward(dy)
    exact = dy.double() @ layer.dequantize(torch.float32).double()
    assert float((x.grad.double() - exact).norm() / exact.norm()) < 1e-6


def test_backward_refuses_scales_changed_after_forward(where):
    layer = layer_of(FORMATS[1])
    layer.scales.requires_grad_()
    y = layer(activations(3, 70, torch.float32).requires_grad_())
    with torch.no_grad():
        layer.scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
def test_gradients_of_scales_zeros_and_outliers(where, format):
    """Against torch's own gradients of the dense expression."""
    layer = layer_of(format, bias=False)
    trainable = {
        name: nn.Parameter(tensor.detach().float().clone())
        for name, tensor in layer.named_tensors().items()
        if name in ("scales", "outlier_values") or (name == "zeros" and format.zeros == "float")
    }
    x, dy = activations(4, format.in_features, torch.float32), activations(4, format.out_features, torch.float32, 3)
    t = {**layer.named_tensors(), **trainable}
    weight = {name: t.get(name) for name in PackedOperands.tensor_names}
    numbers = dict(bits=format.bits, group_size=format.group_size, layout=0, minimum=False, scale_block=0)
    y = torch.ops.lowbit.packed_linear(x, **weight, **numbers, bias=None, x_scale=None, int8=False, x_group=0)
    grads = torch.autograd.grad(y, list(trainable.values()), dy)

    from lowbit.core.bitpack import unpack

    group = torch.arange(format.in_features) // format.group_size
    zeros = float(1 << (format.bits - 1)) if format.zeros == "none" else t["zeros"].float()[:, group]
    dense = (unpack(t["packed"], format.bits, format.in_features).float() - zeros) * t["scales"][:, group]
    if format.outliers:
        rows = t["outlier_rows"].long()
        row = torch.repeat_interleave(torch.arange(format.out_features), rows[1:] - rows[:-1])
        dense = dense.index_put((row, t["outlier_columns"].long()), t["outlier_values"], accumulate=True)
    expected = torch.autograd.grad(x @ dense.t(), list(trainable.values()), dy)
    for name, grad, want in zip(trainable, grads, expected, strict=True):
        assert float((grad - want).norm() / want.norm()) < 1e-5, name


@pytest.mark.parametrize("mode", [{}, {"int8": True}, {"int8": True, "x_group": 32}], ids=["float", "int8", "groups"])
def test_the_straight_through_gradient_of_int8_activations(where, mode):
    w, x = random_weight(FORMATS[1]), activations(3, 70, torch.float32).requires_grad_()
    w.linear(x, **mode).sum().backward()
    exact = w.dense().sum(0).expand(3, -1)
    assert float((x.grad.double() - exact).norm() / exact.norm()) < 1e-6


class Model(nn.Module):
    def __init__(self, format):
        super().__init__()
        self.up = layer_of(format)
        embedding = PackedFormat(4, 20, 70, 35, "group", "int", "float16")
        self.embed = PackedEmbedding(embedding)
        w = random_weight(embedding)
        for name, tensor in (("packed", w.packed), ("scales", w.scales), ("zeros", w.zeros)):
            self.embed.store({name: tensor})

    def forward(self, ids):
        return torch.relu(self.up(self.embed(ids))) + 1


# a graph knows no backend: every format meets both, one of them with sizes that change
@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("where", "format", "dynamic"),
    [(PLACES[(i + dynamic) % len(PLACES)], f, dynamic) for i, f in enumerate(FORMATS) for dynamic in (0, 1)],
    indirect=["where"], ids=lambda p: p.describe() if isinstance(p, PackedFormat) else str(p),
)  # fmt: skip
def test_compile_fullgraph(where, format, dynamic):
    torch._dynamo.reset()
    model = Model(format)
    compiled = torch.compile(model, fullgraph=True, dynamic=bool(dynamic), backend="aot_eager")
    for shape in ((2, 3), (4, 5), (1, 1)):
        ids = torch.randint(0, 20, shape)
        assert_bitwise_equal(compiled(ids).detach(), model(ids).detach())


def test_compile_trains_through_a_layer(where):
    torch._dynamo.reset()
    layer = layer_of(FORMATS[0])
    x = activations(4, 70, torch.float32).requires_grad_()
    torch.compile(lambda x: layer(x).sin().sum(), fullgraph=True, backend="aot_eager")(x).backward()
    compiled, x.grad = x.grad, None
    layer(x).sin().sum().backward()
    assert float((compiled - x.grad).norm() / x.grad.norm()) < 1e-6


def test_compile_inductor(where):
    torch._dynamo.reset()
    model, ids = Model(FORMATS[0]), torch.randint(0, 20, (2, 3))
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True)(ids)
        assert float((y - model(ids)).abs().max()) < 1e-5


def test_export(where):
    model, ids = Model(FORMATS[0]), torch.randint(0, 20, (2, 3))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes={"ids": {0: batch}})
    other = torch.randint(0, 20, (5, 3))
    assert_bitwise_equal(program.module()(other).detach(), model(other).detach())


def test_meta_tensors_give_shapes():
    model = Model(FORMATS[0]).to("meta")
    assert model(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 10)


def test_input_of_another_width_is_refused():
    layer = layer_of(FORMATS[0])
    with pytest.raises(ValueError, match=r"in_features=70 as its last size: got shape \(2, 69\)"):
        layer(torch.randn(2, 69))


def test_a_number_is_not_an_input(where):
    with pytest.raises((ValueError, RuntimeError)):
        layer_of(FORMATS[0])(torch.tensor(1.0))
    with pytest.raises((ValueError, RuntimeError)):
        random_weight(FORMATS[0]).linear(torch.tensor(1.0))


@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
def test_layers_are_called_by_keyword_like_those_they_replace(where, format):
    layer, x = layer_of(format), activations(3, 70, torch.float32)
    assert_bitwise_equal(layer(input=x).detach(), layer(x).detach())
    embed, ids = Model(format).embed, torch.tensor([3, 0])
    assert_bitwise_equal(embed(input=ids), embed(ids))


@pytest.mark.parametrize("mode", [{}, {"int8": True}, {"int8": True, "x_group": 32}], ids=["float", "int8", "groups"])
@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
def test_autocast_casts_x_and_nothing_else(where, format, mode):
    def run(dtype):
        x = activations(3, 70, torch.float32).requires_grad_()
        y = random_weight(format).linear(x.to(dtype), torch.ones(10), **mode)
        y.backward(activations(3, 10, torch.bfloat16, seed=2))
        return y.detach(), x.grad

    expected = run(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(torch.float32)
    for tensor, want in zip(found, expected, strict=True):
        assert_bitwise_equal(tensor, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
def test_the_default_dtype_changes_nothing(where, format, dtype):
    weight, x = random_weight(format), activations(3, 70, torch.float32)
    bias, x_scale, ids = torch.ones(10), torch.tensor([0.02]), torch.tensor([3, 0])

    def run():
        given = x.clone().requires_grad_()
        weight.linear(given, bias).sum().backward()
        return (
            weight.linear(x, bias), weight.linear(x, bias, int8=True), weight.linear(x, int8=True, x_scale=x_scale),
            weight.linear(x, int8=True, x_group=32), weight.dequantize(), weight.embedding(ids), given.grad,
        )  # fmt: skip

    expected, default = run(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(default)
    for tensor, want in zip(found, expected, strict=True):
        assert_bitwise_equal(tensor, want)


# ------------------------------------------------------------------------------------------- choosing a backend


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


LINEAR = """
import torch, lowbit
layer = lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed(bits=4))
"""


@pytest.mark.skipif(registry.why_unavailable("cpu") is not None, reason="no compiled kernels")
class TestForcing:
    def test_a_named_backend_is_what_runs(self):
        w = random_weight(FORMATS[1])
        called = []
        original = registry._references["packed_linear"]
        registry._references["packed_linear"] = lambda *a: called.append(1) or original(*a)
        try:
            x = activations(2, 70, torch.float32)
            with registry.use_backend("reference"):
                assert registry.active_backend() == "reference"
                w.linear(x)
                assert called == [1]
            w.linear(x)
            with registry.use_backend("cpu"):
                w.linear(x)
            assert called == [1]
        finally:
            registry._references["packed_linear"] = original

    def test_environment_forces_the_reference(self):
        done = run_python(LINEAR + "print(lowbit.dispatch.active_backend())", LOWBIT_BACKEND="reference")
        assert done.stdout.strip() == "reference" and not done.stderr, done.stderr

    def test_an_unknown_backend_is_an_error_at_the_first_call_not_at_import(self):
        done = run_python(LINEAR + "print('imported'); layer(torch.randn(1, 64))", LOWBIT_BACKEND="cuda9")
        assert done.returncode == 1 and done.stdout.strip() == "imported" and "unknown backend 'cuda9'" in done.stderr

    def test_environment_forces_the_isa(self):
        code = LINEAR + "layer(torch.randn(1, 64)); print(lowbit.native.isa())"
        assert run_python(code, LOWBIT_ISA="scalar").stdout.strip() == "scalar"

    def test_an_unknown_isa_is_an_error_that_lists_the_choices(self):
        done = run_python(LINEAR + "layer(torch.randn(1, 64))", LOWBIT_ISA="mmx")
        assert done.returncode == 1 and "mmx" in done.stderr and "scalar" in done.stderr
        with pytest.raises(RuntimeError, match=r"scalar.*mmx"):
            native.set_isa("mmx")


def test_without_the_library_the_reference_runs_and_says_so_once():
    code = LINEAR + "layer(torch.randn(1, 64)); layer(torch.randn(1, 64)); print(lowbit.dispatch.active_backend())"
    done = run_python(code, LOWBIT_LIBRARY="/nonexistent/lowbit.so")
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("slow torch reference") == 1 and "not compiled" in done.stderr


def test_a_named_backend_that_cannot_run_raises_with_the_reason():
    code = LINEAR + "layer(torch.randn(1, 64))"
    done = run_python(code, LOWBIT_LIBRARY="/nonexistent/lowbit.so", LOWBIT_BACKEND="cpu")
    assert done.returncode == 1 and "LOWBIT_BACKEND=cpu cannot run: not compiled" in done.stderr


def test_import_prints_nothing():
    done = run_python("import lowbit")
    assert done.returncode == 0 and not done.stdout and not done.stderr


def test_backends_lists_every_backend():
    rows = {row.name: row for row in registry.backends()}
    assert rows["reference"].available
    assert rows["cpu"].available or rows["cpu"].reason
