"""Classes of transformers with experts that its interface does not serve: packed, they compute what they did."""

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowbit
from benchmarks.compatibility import architectures
from lowbit import Codebook, Packed
from lowbit.nn.layer import layers

pytest.importorskip("transformers", minversion="5.0")
CONFIG = SimpleNamespace(
    hidden_size=32, intermediate_size=48, num_local_experts=4, hidden_act="silu", moe_intermediate_size=48,
    expert_ffn_hidden_size=48, n_routed_experts=4, zero_expert_num=2, n_shared_experts=4, ffn_hidden_size=48,
    moe_num_experts=4, ffn_act_fn={},
)  # fmt: skip
TOKENS = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
INDEX = torch.tensor([[0, 1], [2, 0], [0, 3], [3, 2], [2, 0], [3, 0]])  # expert 1 has one token
SCORES = torch.rand(6, 2, generator=torch.Generator().manual_seed(4)) + 0.1


def chosen_by_factors():
    """Every token for every expert, multiplied by 0 where it was not chosen."""
    factors = torch.zeros(4, 6).scatter_(0, INDEX[:, :1].t(), SCORES[:, :1].t())
    return ((TOKENS * factors.unsqueeze(-1)).view(24, 32),)


ROUTED = (TOKENS, INDEX, SCORES)
CASES = {  # model, class, arguments of the class, of its forward, number of stacks
    "Llama-4": ("llama4", "Llama4TextExperts", (CONFIG,), chosen_by_factors(), 2),
    "JetMoE": ("jetmoe", "JetMoeParallelExperts", (4, 32, 48), (TOKENS, [3, 0, 1, 2]), 1),
    "JetMoE, the last ones": ("jetmoe", "JetMoeParallelExperts", (4, 32, 48), (TOKENS, [0, 0, 0, 6]), 1),
    "DBRX": ("dbrx", "DbrxExperts", (CONFIG,), (TOKENS.view(2, 3, 32), INDEX, SCORES), 3),
    "Step-3.7": ("step3p7", "Step3p7Experts", (CONFIG, 0.5), ROUTED, 2),
    "LongCat-Flash": ("longcat_flash", "LongcatFlashExperts", (CONFIG,), (TOKENS, (INDEX * 5) % 6, SCORES), 2),
    "Inkling, shared": ("inkling", "InklingSharedExperts", (CONFIG,), (TOKENS.view(2, 3, 32), torch.rand(6, 4)), 3),
}


def made(case):
    model, name, arguments, inputs, count = CASES[case]
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    experts = getattr(module, name)(*arguments).eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return nn.ModuleDict({"experts": experts}), inputs, count


@pytest.mark.parametrize("spec", [Packed(bits=4, group_size=16), Codebook(bits=3)], ids=["packed", "codebook"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_packed_module_computes_what_its_class_does(case, spec):
    model, inputs, count = made(case)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = type(model["experts"])
    lowbit.convert(model, spec)
    assert len(layers(model)) == count and not list(model.parameters())
    y, dense = model["experts"](*inputs), lowbit.dequantize(copy.deepcopy(model))
    assert type(dense["experts"]) is plain
    held = dict(dense.named_parameters())
    assert {name: p.shape for name, p in held.items()} == {name: p.shape for name, p in before.items()}
    assert all((held[name] - before[name]).norm() < 0.4 * before[name].norm() for name in before)
    exact = dense.double()["experts"](*[x.double() if torch.is_tensor(x) and x.is_floating_point() else x
                                        for x in inputs])  # fmt: skip
    assert y.shape == exact.shape and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["Llama-4", "DBRX", "JetMoE"])
@torch.no_grad()
def test_one_stack_alone_copies_pickles_and_folders(case, tmp_path):
    model, inputs, _ = made(case)
    name, *others = [name for name, _ in model.named_parameters()]
    lowbit.convert(model, {name: Packed(bits=4, group_size=16)})
    y = model["experts"](*inputs)
    assert list(layers(model)) == [name] and [name for name, _ in model.named_parameters()] == others
    torch.testing.assert_close(y, lowbit.dequantize(copy.deepcopy(model))["experts"](*inputs), rtol=1e-5, atol=1e-5)
    lowbit.save(model, tmp_path / "saved")
    loaded = lowbit.load(tmp_path / "saved", made(case)[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other["experts"](*inputs), y)
    lowbit.dequantize(loaded)
    assert torch.equal(loaded.get_parameter(name), lowbit.dequantize(model).get_parameter(name))


def fitted(case, name, weight, batch, x):
    """The share of weights of expert 0 that are not what GPTQ makes of them with the inputs x."""
    model, spec = made(case)[0], Packed(bits=3, group_size=16, quantizer="gptq")
    experts, x = model["experts"], x.double()
    hessian = x.t() @ x
    hessian += 32 / len(x) * hessian.diagonal().mean() * torch.eye(32)
    expected = spec.quantize(weight(model.get_parameter(name).detach()), hessian=hessian.float())
    model.forward = lambda *inputs: experts(*inputs)
    lowbit.convert(model, {name: spec}, calibration=[batch])
    stack = model.get_submodule(name)
    assert "reach experts 1" in stack.note
    return (stack.dequantize()[0] != lowbit.PackedLinear.from_weight(expected).dequantize()).float().mean()


def test_experts_are_fitted_to_their_own_tokens():
    index, scores = INDEX.repeat(4, 1), SCORES.repeat(4, 1)
    tokens = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(5))
    x = tokens.view(24, 32)[(index == 0).any(-1)]
    assert fitted("DBRX", "experts.mlp.w1", lambda w: w.view(4, 48, 32)[0].clone(), (tokens, index, scores), x) < 0.02
    (factored,) = chosen_by_factors()  # here x is what is left of the tokens of other experts, too
    x = factored.view(4, 6, 32).repeat(1, 4, 1)
    batch = (x.reshape(-1, 32),)
    mine = x[0][(x[0] != 0).any(-1)]
    assert len(mine) < len(x[0])
    assert fitted("Llama-4", "experts.gate_up_proj", lambda w: w[0].t().clone(), batch, mine) < 0.02


@pytest.mark.parametrize("name", ["Llama-4", "DBRX"])
@torch.no_grad()
def test_folders_are_converted_one_expert_at_a_time(name, tmp_path):
    model, spec = architectures.build(architectures.ROWS[name]), Packed(bits=4, group_size=16)
    model.save_pretrained(tmp_path / "float")
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec)
    loaded, inputs = lowbit.load(tmp_path / "packed").eval(), architectures.text()
    lowbit.convert(model, spec)
    assert layers(loaded).keys() == layers(model).keys()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
