"""A call of a layer: short where no gradient is wanted, and still what autograd, tracing and torch's modes expect."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit.backends import registry
from lowbit.backends.layouts import CANONICAL
from lowbit.nn.layer import layer_class
from lowbit.testing.numerics import assert_bitwise_equal

SPECS = [lowbit.Packed(bits=4, group_size=16), lowbit.Codebook(bits=4), lowbit.Kronecker()]
family = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)


def linear(spec: lowbit.Spec, trains: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = layer_class(spec.family, "linear").from_float(torch.randn(24, 48), spec, torch.randn(24))
    return layer.requires_grad_(False) if not trains else layer


def embedding(spec: lowbit.Spec) -> nn.Module:
    torch.manual_seed(0)
    return layer_class(spec.family, "embedding").from_weight(spec.for_embedding().quantize(torch.randn(24, 48)))


def python_files(call) -> set[str]:
    """The files whose Python functions run in ``call()``."""
    files = set()
    sys.setprofile(lambda frame, event, arg: files.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {name.rpartition("/")[2] for name in files}


@family
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_no_python_between_the_module_and_the_kernel(spec, mode):
    if registry.active_backend("cpu") != "cpu":
        pytest.skip("no compiled kernels")
    layer, rows, x, ids = linear(spec), embedding(spec), torch.randn(2, 48), torch.tensor([1, 2])
    with mode():
        for call in (lambda: layer(x), lambda: rows(ids)):
            assert "transforms.py" not in python_files(call)
    wanted = x.clone().requires_grad_()
    assert "transforms.py" in python_files(lambda: layer(wanted)), "the name of the file that must not run has changed"


@family
def test_gradients_come_where_they_are_wanted(spec):
    layer, x = linear(spec), torch.randn(2, 48)
    assert not layer(x).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not layer(x).requires_grad
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, layer.dequantize(torch.float32).sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x.detach()), dx)
    trains = linear(spec, trains=True)
    trains(x.detach()).sum().backward()
    assert_bitwise_equal(trains.bias.grad, torch.full((24,), 2.0))
    with torch.inference_mode():
        y = layer(x.detach())
    assert y.is_inference()
    with torch.no_grad():
        y = layer(x.detach())
    assert not y.is_inference()


def test_another_format_counts_in_the_next_call():
    layer, x = linear(lowbit.Packed(bits=4, group_size=16)), torch.randn(3, 48)
    tied = copy.deepcopy(layer)
    tied.share_weight(layer)
    y, before, held = layer(x), layer.format, layer.named_tensors()
    int8 = copy.deepcopy(layer)
    int8.become(replace(before, activations="int8"), layer.canonical())
    expected = int8(x)
    assert not torch.equal(expected, y)
    layer.format = replace(before, activations="int8")
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise_equal(other(x), expected)
    assert layer.named_tensors().keys() == held.keys()
    assert all(tensor is held[name] for name, tensor in layer.named_tensors().items())
    assert_bitwise_equal(tied(x), y)
    layer.format = before
    assert_bitwise_equal(layer(x), y)


def test_another_output_scale_counts_in_the_next_call():
    layer, ids = embedding(lowbit.Packed(bits=4)), torch.tensor([3, 1])
    y = layer(ids)
    layer.output_scale = 3.3
    assert_bitwise_equal(layer(ids), y * 3.3)
    layer.output_scale = 0.7
    assert_bitwise_equal(layer(ids), y * 0.7)
    layer.round_output_scale = True
    for other in (layer.bfloat16(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise_equal(other(ids), layer.dequantize()[ids] * torch.tensor(0.7, dtype=torch.bfloat16))
    layer.dtype = torch.float32
    assert_bitwise_equal(layer(ids), y * torch.tensor(0.7))


@family
def test_a_format_with_other_tensors_is_refused(spec):
    layer, x = linear(spec), torch.randn(2, 48)
    y, before = layer(x), layer.format
    others = {
        "packed": [dict(bits=8), dict(group_size=24), dict(zeros="int"), dict(outliers=3), dict(in_features=50),
                   dict(activations="int8_static")],
        "codebook": [dict(bits=3), dict(out_features=23), dict(scales="float16")],
        "kron": [dict(rank=2), dict(n1=24, n2=1, k1=1, k2=48), dict(dtype="float16")],
    }[spec.family]  # fmt: skip
    for fields in others:
        other = replace(before, **fields)
        with pytest.raises(ValueError, match=r"Linear \[24, 48\]: the tensors of .*write layer\.become\("):
            layer.format = other
        with pytest.raises(ValueError, match=r"Linear \[24, 48\]\)?\.\w+ (must have|must be|is missing)"):
            layer.become(other, layer.canonical())
        assert layer.format is before
        assert_bitwise_equal(layer(x), y)
    with pytest.raises(TypeError, match=rf"format must be a {type(before).__name__}: got 'int8'"):
        layer.format = "int8"


@family
def test_a_layer_that_becomes_another_is_frozen(spec):
    layer, x = linear(spec), torch.randn(2, 48)
    y = layer(x)
    lowbit.make_trainable(layer, *layer.trainable())
    layer.become(layer.format, layer.canonical())
    assert not layer.trained()
    assert_bitwise_equal(layer(x), y)


@family
def test_an_error_leaves_autograd_as_it_was(spec):
    layer, x = linear(spec), torch.randn(2, 48, requires_grad=True)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
            layer(x.double())
        required = r"Linear \[.*\]: input must have in_features=48 as its last size"
        with pytest.raises(ValueError, match=rf"{required}: got shape \(2, 47\)"):
            layer(x[:, :-1])
        with pytest.raises(ValueError, match=r"got shape \(\)"):
            layer(torch.tensor(1.0))
    assert layer(x).requires_grad and (x * 2).requires_grad
    seen = []
    with torch.no_grad():
        layer(x)
        thread = threading.Thread(target=lambda: seen.append(layer(x).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True], "another thread has a gradient mode of its own"


@family
def test_modes_and_tracers_see_the_op(spec):
    layer, x = linear(spec), torch.randn(2, 48)
    name = f"lowbit.{spec.family}_linear.default"
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            seen.clear()
            with Watch():
                y = layer(x)
            assert name in seen
            program = make_fx(lambda x: layer(x))(x) if mode is not torch.inference_mode else None
            if program is not None:
                assert name in {str(node.target) for node in program.graph.nodes}
                assert_bitwise_equal(program(x), y)
    with torch.no_grad():
        for compiled in (
            torch.compile(layer, fullgraph=True, backend="aot_eager"),
            torch.export.export(layer, (x,)).module(),
        ):
            assert_bitwise_equal(compiled(x), y)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x)
    assert f"lowbit::{spec.family}_linear" in {event.key for event in profile.key_averages()}


@family
def test_parameters_that_are_swapped_are_read(spec):
    layer, x = linear(spec), torch.randn(2, 48)
    y = torch.func.functional_call(layer, {"bias": layer.bias + 1}, (x,))
    torch.testing.assert_close(y, layer(x) + 1)
    replica = layer._replicate_for_data_parallel()  # as torch.nn.parallel.replicate fills it
    for key, parameter in layer._parameters.items():
        if parameter is None:
            replica._parameters[key] = None
        else:
            setattr(replica, key, parameter.detach().clone())
    assert_bitwise_equal(replica(x), layer(x))
    without = layer_class(spec.family, "linear").from_float(layer.dequantize(), spec)
    assert without.bias is None and "bias" not in without.state_dict()
    without.bias = layer.bias
    assert_bitwise_equal(without(torch.zeros(1, 48)), layer.bias[None])


def test_a_torch_without_the_names_that_are_not_public_makes_the_plain_call(monkeypatch):
    layer = lowbit.PackedLinear.from_float(torch.randn(32, 64), lowbit.Packed(bits=4))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr("lowbit.nn.call._CAN_SKIP", False)
        monkeypatch.setattr("lowbit.nn.call._in_transform", None)
        monkeypatch.setattr("lowbit.nn.call._below_autograd", None)
        assert torch.equal(layer(x), expected)


def test_a_tied_model_that_has_not_run_is_exported():
    """A tied layer learns of its layout in the first call: the call that failed must not be in the graph."""
    model = nn.Sequential(nn.Embedding(40, 64), nn.Tanh(), nn.Linear(64, 40, bias=False))
    model[2].weight = model[0].weight
    lowbit.convert(model, lowbit.Packed(bits=4, group_size=16))
    ids = torch.tensor([[3, 1, 39]])
    for strict in (False, True):
        fresh = copy.deepcopy(model)
        fresh[0]._record(CANONICAL)  # the head has moved the codes since
        program = torch.export.export(fresh, (ids,), strict=strict)
        torch.testing.assert_close(program.module()(ids), model(ids))
