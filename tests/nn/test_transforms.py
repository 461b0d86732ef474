"""Layers under what torch does with a model: derivatives and transforms, autocast, checkpointing, tracers; and that an
exception, wherever it comes, leaves torch as it was. Each is what the dequantized model gives."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lowbit
from lowbit.backends import registry
from lowbit.backends.cpu import native
from lowbit.backends.triton import launch, tuning
from lowbit.checkpoint import stream
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.transforms import TRANSFORMS, assert_same

SPECS = [
    lowbit.Packed(bits=4, group_size=8, outliers=0.02),
    lowbit.Codebook(bits=3, outliers=0.02),
    lowbit.Kronecker(),
]
family = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)


def converted(*modules: nn.Module, spec: lowbit.Spec) -> tuple[nn.Module, nn.Module]:
    """A converted model, and the same dequantized in float64."""
    torch.manual_seed(0)
    for module in modules:
        getattr(module, "reset_parameters", lambda: None)()
    packed = lowbit.convert(nn.Sequential(*modules), spec)
    return packed, lowbit.dequantize(copy.deepcopy(packed)).double()


def mlp(spec: lowbit.Spec) -> tuple[nn.Module, nn.Module]:
    return converted(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 6), spec=spec)


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# --------------------------------------------------------------------------------------- derivatives and transforms


@family
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_transforms_of_a_model(spec, grad_mode):
    packed, dense = mlp(spec)
    packed.requires_grad_(grad_mode is torch.enable_grad), dense.requires_grad_(False)
    backward = ("backward", "double backward", "reverse over forward AD", "jacobian", "vectorized jacobian",
                "vectorized hessian", "forward-mode hessian")  # fmt: skip
    for name in TRANSFORMS:
        with nullcontext() if name in backward else grad_mode():
            assert_same(name, packed, dense, x_of(3, 20))


@family
def test_transforms_of_parameters_through_functional_call(spec):
    """Of a bias, and of the output of an embedding in the same model."""
    packed, dense = converted(nn.Embedding(9, 20), nn.Linear(20, 6), spec=spec)
    ids = torch.tensor([[1, 8], [0, 3]])
    for name in ("func.grad", "func.jvp", "jacrev", "jacfwd", "hessian", "backward", "forward AD", "vmap of grad"):
        assert_same(
            name,
            lambda b: torch.func.functional_call(packed, {"1.bias": b}, (ids,)),
            lambda b: torch.func.functional_call(dense, {"1.bias": b}, (ids,)),
            packed[1].bias.detach(),
        )
    for dim in (0, 1):
        found = torch.vmap(packed, dim)(ids)
        torch.testing.assert_close(found, packed(ids.movedim(dim, 0)), rtol=1e-6, atol=1e-6)


@family
def test_compiled_derivatives(spec):
    torch._dynamo.reset()
    packed, dense = mlp(spec)
    dense.requires_grad_(False)

    def gradient(model, x):
        return torch.func.grad(lambda x: model(x).tanh().square().sum())(x)

    found = torch.compile(partial(gradient, packed), fullgraph=True, backend="aot_eager")(x_of(3, 20))
    torch.testing.assert_close(found.double(), gradient(dense, x_of(3, 20).double()), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ checkpointing


def _selective():
    return create_selective_checkpoint_contexts(
        lambda _context, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE if "lowbit" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


CHECKPOINTS = {
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "selective": lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=_selective),
    "of a part": lambda model, x: model[2](checkpoint(model[:2], x, use_reentrant=False)),
}


@family
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing_gives_the_same_gradients(spec, how):
    packed, _ = mlp(spec)
    found = []
    for run in (lambda model, x: model(x), CHECKPOINTS[how]):
        x = x_of(3, 20).requires_grad_()
        packed.zero_grad()
        run(packed, x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in packed.parameters() if p.requires_grad)])
    assert len(found[0]) > 2
    for a, b in zip(*found, strict=True):
        assert_bitwise_equal(a, b)


@family
def test_saved_tensors_go_through_hooks_once(spec):
    packed, _ = mlp(spec)
    x = x_of(3, 20).requires_grad_()
    (want,) = torch.autograd.grad(packed(x).square().sum(), x)
    packs, unpacks = [], []

    def pack(t):
        packs.append(t)
        return t

    def unpack(t):
        unpacks.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = packed(x).square().sum()
    (found,) = torch.autograd.grad(y, x)
    assert len(packs) == len(unpacks)
    assert_bitwise_equal(found, want)
    with torch.autograd.graph.save_on_cpu():
        y = packed(x).square().sum()
    assert_bitwise_equal(torch.autograd.grad(y, x)[0], want)


# ----------------------------------------------------------------------------------------------------------- autocast


@family
@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_followed_as_by_a_float_layer(spec, dtype, fast):
    packed, dense = mlp(spec)
    layer, linear = packed[2], dense[2].float()
    x = x_of(3, 12, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", fast):
        y = layer(x)
        assert y.dtype == linear(x).dtype == fast
        assert layer._op(*layer.arguments(x)).dtype == fast, "a direct call of the op"
        with torch.no_grad():
            assert_bitwise_equal(layer(x), y.detach())
        with torch.inference_mode():
            assert layer(x).dtype == fast
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == dtype
    assert_bitwise_equal(y, layer(x.to(fast)))
    y.square().sum().backward()
    assert x.grad.dtype == dtype and layer.bias.grad.dtype == torch.float32
    want = torch.autograd.grad(layer(x.to(fast)).square().sum(), x)[0]
    assert_bitwise_equal(x.grad, want)
    assert layer(x).dtype == dtype


@family
def test_autocast_leaves_float64_embeddings_and_dequantize_alone(spec):
    packed, _ = converted(nn.Embedding(9, 20), nn.Linear(20, 6), spec=spec)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed[0](torch.tensor([1, 2])).dtype == torch.float32
        assert packed[1].dequantize().dtype == torch.float32
        assert packed(torch.tensor([1, 2])).dtype == torch.bfloat16
        cache = torch.zeros(2, 6, dtype=torch.bfloat16)
        cache[torch.arange(2)] = packed(torch.tensor([1, 2]))
        with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16: got (torch.float64|Double)"):
            packed[1](x_of(2, 20).double())  # as F.linear, which asks for one dtype


@family
def test_autocast_in_transforms_and_in_graphs(spec):
    torch._dynamo.reset()
    packed, _ = mlp(spec)
    x = x_of(3, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        primal, tangent = torch.func.jvp(packed, (x,), (x,))
        assert primal.dtype == tangent.dtype == torch.bfloat16
        assert_bitwise_equal(primal, y)
        assert torch.func.grad(lambda x: packed(x).float().sum())(x).dtype == torch.float32
        assert torch.vmap(packed)(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert_bitwise_equal(torch.export.export(packed, (x,)).module()(x), y)

    def whole(x):
        with torch.autocast("cpu", torch.bfloat16):
            return packed(x)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    found = []
    for function in (whole, compiled):
        given = x.clone().requires_grad_()
        y = function(given)
        found += [(y.detach(), torch.autograd.grad(y.float().square().sum(), given)[0])]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------------------ tracers


@family
def test_fx_takes_layers_as_leaves(spec):
    model = converted(nn.Embedding(9, 20), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 6), spec=spec)[0]
    ids = torch.tensor([[1, 8], [0, 3]])
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert_bitwise_equal(graph(ids), model(ids))
    for layer, x in ((model[0], ids), (model[1], x_of(2, 20))):
        graph = torch.fx.symbolic_trace(layer)  # alone: a call of its op
        assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [layer._op]
        assert_bitwise_equal(graph(x), layer(x))


@family
def test_jit(spec):
    model = mlp(spec)[0]
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .*Linear.*torch.export"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, x_of(3, 20))
    assert_bitwise_equal(traced(x_of(5, 20)), model(x_of(5, 20)))
    assert f"lowbit::{spec.family}_linear" in str(traced.inlined_graph)


# --------------------------------------------------------------------------------------------------------- exceptions


class Signal(BaseException):
    """What a handler of a signal raises."""


def interrupted_everywhere(call, check, *, until=lambda: False, alive=True):
    """Run ``call`` again and again, each time with an exception before another bytecode instruction of lowbit's frames
    (and of contextlib's), until each had one; then ``check(where it was)``. ``until()``: no more from here on.
    ``alive``: the exception, and so its frames, still is when this is checked."""
    call()  # what is imported at the first call is not to be interrupted
    seen = set()
    while True:
        at = None

        def trace(frame, event, arg):
            nonlocal at
            code = frame.f_code
            if not any(part in code.co_filename for part in ("/lowbit/", "<string>", "contextlib")):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and (code, frame.f_lasti) not in seen and not until():
                seen.add((code, frame.f_lasti))
                at = f"{code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise Signal
            return trace

        before = sys.gettrace()
        try:
            sys.settrace(trace)
            call()
        except Signal:
            sys.settrace(before)
            if alive:
                check(at)
        finally:
            sys.settrace(before)
        if at is None:
            assert len(seen) > 3, "the call was not interrupted"
            return
        check(at)


def assert_torch_is_as_before(at):
    product = torch.ones(1, requires_grad=True) * 2
    assert product.requires_grad, at
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), at
    key = torch._C.DispatchKey
    for excluded in (key.AutogradFunctionality, key.AutogradOther, key.AutocastCPU):
        assert torch._C._dispatch_tls_is_dispatch_key_excluded(excluded) == (excluded == key.AutocastCPU), at


@family
@pytest.mark.turns(3)
def test_an_exception_at_any_bytecode_leaves_autograd_as_it_was(spec):
    """As from a signal: the frames of the exception are alive when this is looked at."""
    packed, _ = converted(nn.Embedding(9, 20), nn.Linear(20, 6), spec=spec)
    packed.requires_grad_(False)
    rows, linear, x, ids = packed[0], packed[1], x_of(1, 20), torch.tensor([1])
    wanted = x.clone().requires_grad_()
    arguments = linear.arguments(x)
    for call in (lambda: linear(x), lambda: rows(ids), lambda: linear(wanted), lambda: linear._op(*arguments)):
        interrupted_everywhere(call, assert_torch_is_as_before)
    interrupted_everywhere(lambda: torch.autograd.grad(linear(wanted).sum(), wanted), assert_torch_is_as_before)
    assert linear(wanted).requires_grad and linear(wanted).dtype == torch.float32


@family
@pytest.mark.turns(3)
def test_an_exception_at_any_bytecode_leaves_autocast_as_it_was(spec):
    linear, x = mlp(spec)[0][0], x_of(1, 20)

    def check(at):
        assert torch.is_autocast_enabled("cpu"), at
        assert F.linear(x, x).dtype == torch.bfloat16, at
        assert (torch.ones(1, requires_grad=True) * 2).requires_grad, at

    for backend in ("auto", "reference"):
        with registry.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            interrupted_everywhere(lambda: linear(x), check)


STATE = {
    "use_backend": (lambda: lowbit.use_backend("reference"), lambda: registry.active_backend("cpu")),
    "batch_invariant": (lambda: lowbit.batch_invariant(False), lambda: torch.ops.lowbit_native.batch_invariant()),
    "use_isa": (lambda: native.use_isa("scalar"), native.isa),
    "collecting": (launch.collecting, lambda: launch._collected),
    "asking": (tuning.asking, lambda: tuning._asked),
    "empty_parameters": (stream.empty_parameters, lambda: nn.Module.register_parameter),
}


@pytest.mark.parametrize("name", STATE)
def test_an_exception_while_a_context_is_entered_leaves_the_state_as_it_was(name):
    manager, state = STATE[name]
    if name in ("batch_invariant", "use_isa") and registry.active_backend("cpu") != "cpu":
        pytest.skip("no compiled kernels")
    before, inside = state(), False

    def call():
        nonlocal inside
        inside = False
        with manager():
            inside = True
            assert state() != before

    def check(at):
        assert state() == before, at

    # a context manager that is a generator ends with the frames of the exception
    interrupted_everywhere(call, check, until=lambda: inside, alive=False)
    assert state() == before


@contextmanager
def hooks_of(model):
    count = sum(len(m._forward_pre_hooks) for m in model.modules())
    training = [m.training for m in model.modules()]
    yield
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == count
    assert [m.training for m in model.modules()] == training


def test_a_model_that_fails_in_calibration_or_in_a_report_has_no_hooks_left():
    class Fails(nn.Module):
        def forward(self, x):
            raise Signal

    model = nn.Sequential(nn.Linear(8, 8), Fails()).train()
    with hooks_of(model), pytest.raises(Signal):
        lowbit.convert(model, {"0": lowbit.Packed(bits=4, quantizer="gptq")}, calibration=[x_of(2, 8)])
    lowbit.convert(model, {"0": lowbit.Packed(bits=4)})
    with hooks_of(model), pytest.raises(Signal):
        lowbit.report(model, x_of(2, 8))
