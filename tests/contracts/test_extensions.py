"""What may be added from outside the package, each in a few lines and held to the contracts of what ships."""

import copy
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.backends import layouts, registry
from lowbit.backends.layouts import CANONICAL
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.testing.numerics import assert_bitwise_equal

HERE = Path(__file__).parent
TESTS = HERE.parent


# ------------------------------------------------------------------------------------------------------------ backends


@pytest.mark.parametrize("family", ["packed", "codebook", "kron"])
@pytest.mark.turns(3)
def test_the_numerics_of_a_family_hold_on_a_backend_from_outside(family):
    """Every test of the kernels' suite, at 3, 4 and 8 bits and for dense factors; nothing changes but that there is a
    backend, of less than 40 lines. What it refuses is its own affair."""
    lines = (HERE / "toy_backend.py").read_text().split("class Toy")[1].splitlines()
    assert len(lines) < 40
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    chosen = " and ".join(["toy", "not refused", *(f"not toy-{bits}" for bits in (1, 2, 5, 6, 7))])
    options = ["-q", "-p", "toy_backend", "-p", "no:cacheprovider", "-p", "no:benchmark", "-k", chosen]
    command = [sys.executable, "-m", "pytest", str(TESTS / family / "test_kernels.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60, done.stdout[-1000:]


class Even(registry.Backend):
    """Runs packed linears with an even number of rows, and notes them."""

    def __init__(self, priority):
        super().__init__("even", "cpu", priority=priority, ops={"packed_linear": self.linear})
        self.rows = []

    def can_run(self, op, *args):
        odd = op == "packed_linear" and args[0].shape[0] % 2
        return super().can_run(op, *args) or ("the rows of x are odd" if odd else None)

    def linear(self, x, *args):
        self.rows.append(x.shape[0])
        return registry._references["packed_linear"](x, *args)


@pytest.fixture(params=[1, -1])
def even(request):
    backend = registry.register(Even(request.param))
    try:
        yield backend
    finally:
        registry.unregister("even")


def test_backends_of_one_device_are_asked_in_order(even):
    layer = lowbit.PackedLinear.from_float(torch.randn(24, 64), lowbit.Packed(bits=4))
    x = torch.randn(5, 64)
    first = even.priority > 0 or registry.why_unavailable("cpu") is not None
    assert registry.active_backend("cpu") == ("even" if first else "cpu")
    for m in (4, 5, 2):
        layer(x[:m])
    assert even.rows == ([4, 2] if first else []), "a call that it declines falls through to the next"
    with lowbit.use_backend("even"):
        layer(x[:2])
        with pytest.raises(RuntimeError, match="LOWBIT_BACKEND=even cannot run: the rows of x are odd"):
            layer(x)
        with pytest.raises(RuntimeError, match="LOWBIT_BACKEND=even cannot run: it has no packed_dequantize"):
            layer.dequantize()
    assert [row.name for row in lowbit.backends()] == ["cpu", "cuda", "triton", "even", "reference"]
    with pytest.raises(ValueError, match="a backend needs a name of its own: got name='even'"):
        registry.register(Even(0))


@pytest.mark.skipif(registry.why_unavailable("cpu") is not None, reason="no compiled kernels")
def test_a_call_that_falls_through_reaches_the_compiled_kernels(even):
    layer = lowbit.PackedLinear.from_float(torch.randn(24, 64), lowbit.Packed(bits=4, activations="int8"))
    x = torch.randn(5, 64)
    through = layer(x)
    with lowbit.use_backend("cpu"):
        assert_bitwise_equal(through, layer(x))


def test_a_backend_without_kernels_for_a_machine_says_why():
    class Never(registry.Backend):
        def why_not(self, device=None):
            return "it is not finished"

    registry.register(Never("never", "cpu"))
    try:
        row = next(row for row in lowbit.backends() if row.name == "never")
        assert str(row) == "never: unavailable (it is not finished)"
        refused = pytest.raises(RuntimeError, match="backend 'never' cannot run: it is not finished")
        with refused, lowbit.use_backend("never"):
            pass
    finally:
        registry.unregister("never")


# ------------------------------------------------------------------------------------------------------------- layouts


def reversed_words(packed, bits, k):
    return packed.flip(1).unsqueeze(0).movedim(0, 1).contiguous()  # [N, 1, words]


BACKWARDS = layouts.Layout(
    "backwards",
    77,
    row_shape=lambda k, bits: (1, layouts.words_per_row(k, bits)),
    from_canonical=reversed_words,
    to_canonical=lambda packed, bits, k: packed[:, 0].flip(1).contiguous(),
    codes=lambda packed, bits, k: CANONICAL.codes(packed[:, 0].flip(1), bits, k),
)


class ReadsBackwards(registry.Backend):
    def __init__(self):
        super().__init__("reads backwards", "cpu", priority=5)
        self.seen = set()
        for op, reference in registry._references.items():
            self.ops[op] = lambda *args, op=op, reference=reference: self.note(op, args) or reference(*args)

    def note(self, op, args):
        if not op.startswith("kron"):
            self.seen.add(BACKWARDS.number in [a for a in args if type(a) is int])

    def layouts(self, format, kind):
        return (BACKWARDS,)


@pytest.fixture
def backwards():
    """A layout, and a backend whose kernels read it."""
    layouts.register(BACKWARDS)
    backend = registry.register(ReadsBackwards())
    try:
        yield backend
    finally:
        registry.unregister(backend.name)
        layouts.unregister(BACKWARDS)


SPECS = [
    lowbit.Packed(bits=3, group_size=20, outliers=0.02), lowbit.Codebook(bits=5), lowbit.Packed(activations="int8"),
]  # fmt: skip


def model():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Embedding(64, 100), nn.Linear(100, 70), nn.Linear(70, 100), nn.Linear(100, 64, bias=False))
    m[3].weight = m[0].weight
    return m


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_layout_from_outside_is_held_moved_saved_and_multiplied(spec, backwards, tmp_path):
    ids = torch.randint(0, 64, (7,))
    m = lowbit.convert(model(), spec)
    assert {layer.layout for layer in layers(m).values()} == {BACKWARDS}
    y, state = m(ids), m.state_dict()
    assert backwards.seen == {True}, "the layout that the op was given"
    assert_bitwise_equal(state["1.packed"], m[1].packed)
    canonical = canonical_state_dict(m)
    assert canonical["1.packed"].dim() == 2 and canonical["0.packed"] is canonical["3.packed"]
    copied, pickled = copy.deepcopy(m), pickle.loads(pickle.dumps(m))
    lowbit.save(m, tmp_path / "saved")
    loaded = lowbit.load(tmp_path / "saved", model())
    for other in (copied, pickled, loaded):
        assert {layer.layout for layer in layers(other).values()} == {BACKWARDS}
        assert_bitwise_equal(other(ids), y)
        assert other[0].packed is other[3].packed, "tied"
    m[0].prepare()
    with lowbit.use_backend("reference"):
        m.to("cpu")
        assert {layer.layout for layer in layers(m).values()} == {CANONICAL}
        assert_bitwise_equal(m(ids), y)
        m.load_state_dict(state)
        assert_bitwise_equal(m(ids), y)
        m.load_state_dict(canonical)
        assert_bitwise_equal(m(ids), y)
    for name, tensor in m.to("cpu").state_dict().items():
        assert_bitwise_equal(tensor, state[name])


def test_codes_that_somebody_else_put_into_a_layer_are_canonical(backwards):
    """As libraries do that read files on their own."""
    layer = lowbit.PackedLinear.from_float(torch.randn(24, 64), lowbit.Packed(bits=4))
    x = torch.randn(2, 64)
    y, words = layer(x), canonical_state_dict(layer)["packed"]
    layer._buffers["packed"] = words
    assert_bitwise_equal(layer(x), y)
    assert layer.layout is CANONICAL and layer.prepare().layout is BACKWARDS


def test_a_layout_needs_a_name_a_number_and_shapes_of_its_own(backwards):
    fields = {p: getattr(BACKWARDS, p) for p in inspect.signature(layouts.Layout).parameters}
    taken = {
        "name": dict(number=78, row_shape=lambda k, bits: (3, k, bits)),
        "number": dict(name="other", row_shape=lambda k, bits: (3, k, bits)),
        "shapes": dict(name="other", number=78),
    }
    for what, changed in taken.items():
        with pytest.raises(ValueError, match=f"a layout needs .*{what} of its own"):
            layouts.register(layouts.Layout(**{**fields, **changed}))
    with pytest.raises(ValueError, match="layout must be one of 'canonical words'.*: got layout='sideways'"):
        layouts.named("sideways")


def test_an_op_refuses_a_layout_that_it_does_not_know():
    layer = lowbit.PackedLinear.from_float(torch.randn(24, 64), lowbit.Packed(bits=4))
    arguments = [*layer.weight_arguments(layer.operands()), None, None, False, 0]
    arguments[10] = 55
    for backend in ("auto", "reference"):
        with lowbit.use_backend(backend), pytest.raises(RuntimeError, match="layout must be .*: got layout=55"):
            torch.ops.lowbit.packed_linear(torch.randn(2, 64), *arguments)
