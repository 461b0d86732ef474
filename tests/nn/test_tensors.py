"""Where a layer's tensors live: stored ones are buffers, the same in and outside ``state_dict``; trained ones are asked
for."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import lowbit
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.testing.numerics import assert_bitwise_equal

SPECS = [
    lowbit.Packed(bits=4, group_size=16, zeros="int", outliers=0.02),
    lowbit.Packed(bits=3, group_size=16, zeros="float"),
    lowbit.Codebook(bits=3, outliers=0.02), lowbit.Codebook(table="nf4", group_size=16), lowbit.Kronecker(),
    lowbit.Kronecker(factors=lowbit.Packed(bits=8)),
]  # fmt: skip
specs = pytest.mark.parametrize("spec", SPECS, ids=str)
IDS = torch.tensor([[3, 1, 39], [0, 7, 7]])


def model(spec: lowbit.Spec) -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 40, bias=False))
    tied[3].weight = tied[0].weight
    return lowbit.convert(tied, spec)


@specs
def test_stored_tensors_are_buffers_of_dtypes_that_collectives_know(spec):
    m = model(spec)
    assert [name for name, _ in m.named_parameters()] == ["1.bias"]
    assert next(m.parameters()).dtype == torch.float32
    known = {torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.int8}
    state, held = m.state_dict(), dict(m.named_buffers(remove_duplicate=False))
    assert held.keys() | {"1.bias"} == state.keys()
    for name, tensor in held.items():
        assert tensor.dtype in known, name
        assert_bitwise_equal(state[name], tensor)
        assert state[name].is_contiguous()
    assert sum(float((p**2).sum()) for p in m.parameters()) < 100
    m.requires_grad_(True)


@specs
def test_state_dicts_move_between_forms(spec):
    m = model(spec)
    y = m(IDS)
    for state in (m.state_dict(), canonical_state_dict(m)):
        for form in (nullcontext, lambda: lowbit.use_backend("reference")):
            with form():
                other = model(spec)
                for layer in layers(other).values():
                    layer.packed.zero_() if hasattr(layer, "packed") else layer.a.zero_()
                other.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
            assert_bitwise_equal(other.to("cpu")(IDS), y)
            assert_bitwise_equal(torch.func.functional_call(model(spec), dict(state), (IDS,), tie_weights=False), y)
    empty = nn.Module.to_empty(copy.deepcopy(m), device="meta")
    empty.load_state_dict({name: tensor.clone() for name, tensor in m.state_dict().items()}, assign=True)
    assert_bitwise_equal(empty(IDS), y)




@specs
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(
    "average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, {"avg_fn": get_ema_avg_fn(0.999)}],
    ids=["mean", "ema", "ema-one-by-one"],
)  # fmt: skip
def test_an_average_of_one_model_is_the_model(spec, average, use_buffers):
    m = model(spec)
    averaged = AveragedModel(m, use_buffers=use_buffers, **average)
    for _ in range(3):
        averaged.update_parameters(m)
    assert averaged.n_averaged == 3
    bias, stored = "1.bias", canonical_state_dict(m)
    for name, tensor in canonical_state_dict(averaged.module).items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-6 if name == bias else 0, atol=0)
    torch.testing.assert_close(averaged(IDS), m(IDS), rtol=1e-5, atol=1e-6)


def test_an_average_of_buffers_leaves_stored_tensors_out():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48))
    first, second = (lowbit.convert(copy.deepcopy(plain), lowbit.Packed(bits=4, group_size=16)) for _ in range(2))
    for m in (first, second):
        lowbit.make_trainable(m, "scales")
    with torch.no_grad():
        second[0].scales.mul_(3)
        second[0].packed.bitwise_not_()
        second[1].running_mean.fill_(2.0)
    with lowbit.use_backend("reference"):  # in another layout
        averaged = AveragedModel(first, use_buffers=True)
        averaged.to("cpu")
    for m in (first, second):
        averaged.update_parameters(m)
    found = averaged.module
    torch.testing.assert_close(found[0].scales, 2 * first[0].scales)
    torch.testing.assert_close(found[1].running_mean, torch.ones(48))
    assert_bitwise_equal(found[0].canonical()["packed"], second[0].canonical()["packed"])
    with pytest.raises(ValueError, match="model must have the 1 packed layers of the averaged one: got 0"):
        averaged.update_parameters(plain)
    averaged = AveragedModel(plain, use_buffers=True)  # nothing to do with us
    averaged.update_parameters(plain)
    assert_bitwise_equal(averaged.module[0].weight, plain[0].weight)


@specs
def test_ties_survive_moves_and_copies(spec):
    m = model(spec)
    y = m(IDS)
    copied = m._apply(torch.clone)  # new tensors, as from another device
    moves = [m.to("cpu"), m.bfloat16().float(), m.share_memory(), copied]
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), *moves):
        for name in other[0].format.weight_tensors():
            assert getattr(other[0], name) is getattr(other[3], name), name
        assert_bitwise_equal(other[0](IDS), m[0](IDS))
    assert y.shape == m(IDS).shape


@specs
def test_training_is_asked_for(spec):
    m = model(spec)
    y, stored = m(IDS).detach(), canonical_state_dict(m)
    names = sorted({name for layer in layers(m).values() for name in layer.trainable()} - {"scale_absmax"})
    parameters = lowbit.make_trainable(m, *names)
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_contiguous() for p in parameters)
    assert {id(p) for p in parameters} | {id(m[1].bias)} == {id(p) for p in m.parameters()}
    for name in names:
        assert getattr(m[0], name) is getattr(m[3], name), "tied layers train one tensor"
    assert_bitwise_equal(m(IDS).detach(), y)
    assert {n: t.dtype for n, t in canonical_state_dict(m).items()} == {n: t.dtype for n, t in stored.items()}
    for name, tensor in canonical_state_dict(m).items():
        assert_bitwise_equal(tensor, stored[name])

    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.Adam(parameters, lr=3e-4), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (m(IDS) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]

    trained = m(IDS).detach()
    copied = copy.deepcopy(m)
    copied.load_state_dict(m.state_dict())
    assert_bitwise_equal(copied(IDS).detach(), trained)
    frozen = model(spec)
    frozen.load_state_dict(canonical_state_dict(m))
    assert_bitwise_equal(frozen(IDS).detach(), trained)
    lowbit.freeze(m)
    assert [name for name, _ in m.named_parameters()] == ["1.bias"]
    assert_bitwise_equal(m(IDS).detach(), trained)
    assert m[0].format == frozen[0].format


@pytest.mark.parametrize("spec", [
    *SPECS, lowbit.Packed(bits=8, zeros="int", scale_dtype=torch.bfloat16),
    lowbit.Kronecker(factors=lowbit.Packed(bits=4, zeros="float")),
], ids=str)  # fmt: skip
def test_any_one_tensor_can_be_trained(spec):
    y = model(spec)(IDS).detach()
    for name in sorted({name for layer in layers(model(spec)).values() for name in layer.trainable()}):
        m = model(spec)
        parameters = lowbit.make_trainable(m, name)
        z = m(IDS)
        assert_bitwise_equal(z.detach(), y)
        z.square().mean().backward()
        assert parameters and all(p.grad is not None and bool(p.grad.any()) for p in parameters), name


def test_trained_tensors_in_a_compiled_graph():
    m = model(SPECS[1])
    lowbit.make_trainable(m, "scales")
    expected = torch.autograd.grad(m(IDS).square().sum(), m[1].scales)[0]
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(IDS).square().sum(), m[1].scales)[0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)  # the graph sums in another order


def interrupted(call, functions, line):
    """Call, with Ctrl-C before the ``line``-th line of these functions; whether they had that many."""
    seen = 0

    def lines(frame, event, argument):
        nonlocal seen
        seen += event == "line"
        if event == "line" and seen == line:
            raise KeyboardInterrupt
        return lines

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: lines if frame.f_code in functions else None)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@specs
def test_an_interrupt_leaves_every_tensor_in_its_layer(spec):
    functions = {lowbit.make_trainable.__code__, lowbit.freeze.__code__}

    def there_and_back():
        lowbit.make_trainable(m, name)
        lowbit.freeze(m)

    for line in itertools.count(1):
        m = model(spec)
        name = next(iter(m[1].trainable()))
        y = m(IDS)
        is_over = not interrupted(there_and_back, functions, line)
        assert_bitwise_equal(m(IDS), y)
        if is_over:
            break
    assert line > 20


def test_parameters_of_others_are_no_stored_tensors():
    m = model(SPECS[0])
    m[1].gate = nn.Parameter(torch.ones(3))
    m[1].register_buffer("mask", torch.ones(3))
    y = m(IDS)
    lowbit.make_trainable(m, "scales")
    assert m[1].trained() == ["scales"]
    assert_bitwise_equal(m(IDS), y)
    lowbit.freeze(m)
    assert isinstance(m[1].gate, nn.Parameter) and m[1].trained() == []
    assert_bitwise_equal(copy.deepcopy(m)(IDS), y)


def test_names_that_cannot_be_trained_are_refused():
    m = model(SPECS[0])
    for name in ("packed", "codebook", "weight", "zeros"):
        with pytest.raises(ValueError, match=f"names must be of outlier_values, scales: got '{name}'"):
            lowbit.make_trainable(m, name)
    for names, got in (((), "no name"), ((["scales"],), r"\['scales'\]"), ((3,), "3")):
        with pytest.raises(ValueError, match=f"names must be of outlier_values, scales: got {got}"):
            lowbit.make_trainable(m, *names)
    assert [name for name, _ in m.named_parameters()] == ["1.bias"]


def test_a_failed_move_changes_nothing():
    m = model(SPECS[0])
    y = m(IDS)
    with pytest.raises(ValueError, match="cannot move it to torch.float8_e4m3fn"):
        m[1].to(torch.float8_e4m3fn)
    assert_bitwise_equal(m(IDS), y)


@specs
def test_double_is_exact(spec, tmp_path):
    m = model(spec)
    y = m(IDS)
    dense = lowbit.dequantize(copy.deepcopy(m)).double()
    m.double()
    assert m(IDS).dtype == m[1].dequantize().dtype == m[1].weight.dtype == torch.float64
    torch.testing.assert_close(m(IDS), dense(IDS), rtol=1e-14, atol=1e-14)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(m[1], x)
    torch.testing.assert_close(torch.compile(m, backend="eager", fullgraph=True)(IDS), m(IDS))
    with pytest.raises(ValueError, match=r"in float64 cannot be saved: call model.float\(\) first"):
        lowbit.save(m, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert_bitwise_equal(m.float()(IDS), y)
