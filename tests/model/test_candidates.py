"""Which modules are taken for linear layers and embeddings: by what they compute, not by their exact class."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import Packed, PackedEmbedding, PackedLinear
from lowbit.testing.numerics import assert_bitwise_equal

SPEC = Packed(bits=4, group_size=16)


class Sub(nn.Linear):
    """An inherited forward is no forward of its own."""

    def extra_repr(self):
        return "sub"


class Falcons(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OnlyInTraining(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class WithLora(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.a = nn.Parameter(torch.zeros(2, self.in_features))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ torch.ones(2, self.out_features)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


class SubEmbedding(nn.Embedding):
    pass


@pytest.mark.parametrize("cls", [Sub, Falcons])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_subclasses_that_compute_a_linear_layer(cls, bias, device):
    torch.manual_seed(0)
    model = nn.Sequential(cls(32, 24, bias, device=device))
    weight = model[0].weight
    lowbit.convert(model, SPEC)
    assert type(model[0]) is PackedLinear and (model[0].bias is not None) is bias
    if device == "cpu":
        other = PackedLinear.from_float(weight, SPEC, model[0].bias)
        x = torch.randn(3, 32)
        assert_bitwise_equal(model[0](x).detach(), other(x).detach())


@pytest.mark.parametrize("cls", [Scaled, OnlyInTraining, WithLora, Router])
def test_subclasses_that_compute_something_else(cls):
    state = torch.get_rng_state()
    model = nn.Sequential(cls(32, 24), nn.Linear(24, 16)).eval()
    torch.set_rng_state(state)
    lowbit.convert(model, SPEC)
    assert torch.equal(torch.get_rng_state(), state)  # asking a module what it computes draws no numbers
    assert type(model[0]) is cls
    assert model.lowbit_skipped == {"0": f"{cls.__name__} is a subclass of nn.Linear with a forward of its own"}


def test_a_lazy_layer_is_named():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    lowbit.convert(model, Packed())
    assert "not initialised yet" in model.lowbit_skipped["0"]


def test_a_subclass_of_embedding_is_converted():
    model = nn.Sequential(SubEmbedding(20, 16, padding_idx=3))
    lowbit.convert(model, SPEC)
    assert type(model[0]) is PackedEmbedding and model[0].padding_idx == 3 and model[0].output_scale == 1.0


def test_falcon_converts():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    model = lowbit.convert(transformers.FalconForCausalLM(config).eval(), SPEC)
    assert not model.lowbit_skipped
    dense = lowbit.dequantize(copy.deepcopy(model))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        y, expected = model(ids).logits, dense(ids).logits
    assert float((y - expected).norm() / expected.norm()) < 1e-5


def test_the_output_layer_of_torchs_attention_stays():
    """``nn.MultiheadAttention`` reads its weight and never calls it."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    model = nn.ModuleDict({"attention": attention, "linear": nn.Linear(16, 16)})
    x = torch.randn(1, 3, 16)
    before = attention(x, x, x)[0]
    lowbit.convert(model, SPEC)
    assert model.lowbit_skipped == {"attention.out_proj": "nn.MultiheadAttention reads its weight"}
    assert_bitwise_equal(attention(x, x, x)[0].detach(), before.detach())


# ------------------------------------------------------------------------------------------------------- accelerate


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False)).eval()


def dispatched(model, accelerate):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model, accelerate):
    return accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("hook", [dispatched, offloaded])
def test_modules_with_hooks_of_accelerate(hook):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(3, 32)
    expected = lowbit.convert(two_layers(), SPEC)(x).detach()
    model = hook(two_layers(), accelerate)
    hooks = [layer._hf_hook for layer in (model[0], model[2])]
    with pytest.raises(ValueError, match="group_size"):  # nothing has changed
        lowbit.convert(model, Packed(group_size=40))
    assert [layer._hf_hook for layer in (model[0], model[2])] == hooks
    lowbit.convert(model, SPEC)
    assert type(model[0]) is PackedLinear and type(model[0]._hf_hook) is type(hooks[0])
    assert model[0]._hf_hook.execution_device == hooks[0].execution_device
    for _ in range(2):
        assert_bitwise_equal(model(x).detach(), expected)
    if hook is offloaded:
        assert model[0].bias.is_meta  # the hook still takes tensors away
        with pytest.raises(ValueError, match=r"0: its tensors are offloaded"):
            lowbit.dequantize(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_bitwise_equal(model(x).detach(), expected)


def test_a_foreign_forward_still_stays():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].forward = lambda x: x
    lowbit.convert(model, SPEC)
    assert model.lowbit_skipped == {"0": "it has a forward of its own"}
