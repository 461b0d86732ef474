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
from lowbit.integrations import tensor_parallel
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.0")
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
    model.forward = lambda *inputs, attention_mask=None, **named: experts(*inputs, *named.values())
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


@pytest.mark.parametrize("case", ["JetMoE", "Llama-4"])
def test_padding_is_not_taken_from_rows_in_another_order(case):
    """x is sorted by experts: which of its rows are of padding is not known."""
    x, mask = torch.randn(48, 32, generator=torch.Generator().manual_seed(6)), torch.ones(1, 48)
    mask[0, ::2] = 0
    if case == "JetMoE":
        batch = {"inputs": x, "expert_size": [20, 4, 14, 10], "attention_mask": mask}
        assert fitted(case, "experts.weight", lambda w: w[0].clone(), batch, x[:20]) < 0.02
    else:
        x[12:20] = 0  # of the second expert
        batch = {"hidden_states": x, "attention_mask": mask}
        assert fitted(case, "experts.gate_up_proj", lambda w: w[0].t().clone(), batch, x[:12]) < 0.02


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


# ------------------------------------------------------------------------------- what others do with the module

IDS = torch.arange(22).view(2, 11) * 5 % 96
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
SPEC = Packed(bits=4, group_size=16)


def mixtral(depth=1):
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=depth, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_local_experts=5, num_experts_per_tok=2,
    )).eval()  # fmt: skip


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_another_implementation_of_experts_is_for_the_float_ones(tmp_path):
    model = lowbit.convert(mixtral(), SPEC)
    y = logits(model)
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert torch.equal(logits(model), y)
    model.save_pretrained(tmp_path)
    assert "lowbit_experts" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path, experts_implementation="eager").eval()), y)
    torch.testing.assert_close(logits(lowbit.dequantize(model)), y, rtol=2e-5, atol=2e-5)
    assert model.config._experts_implementation == "batched_mm"


def test_a_subclass_with_a_forward_of_its_own_stays_float():
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("Twice", (type(experts),), {"forward": lambda self, *args: 2 * torch.zeros_like(args[0])})
    report = lowbit.report(lowbit.convert(model, SPEC))
    assert not [row for row in report.rows if row.kind == "experts"]
    assert {kept.name for kept in report.kept if "see lowbit.register_experts" in kept.reason} == {UP, DOWN}


def test_layers_that_share_their_experts(tmp_path):
    def shared(depth=2):
        model = mixtral(depth)
        first, second = (layer.mlp.experts for layer in model.model.layers)
        second.gate_up_proj = first.gate_up_proj
        return model

    other = UP.replace("layers.0", "layers.1")
    predicted = lowbit.convert(shared(), SPEC, dry_run=True)
    model = lowbit.convert(shared(), SPEC)
    report, y = lowbit.report(model), logits(model)
    assert (predicted.total_before, predicted.total_after) == (report.total_before, report.total_after)
    assert {row.name: row.shares for row in report.rows if row.shares} == {other: UP}
    assert model.get_submodule(other).packed is model.get_submodule(UP).packed
    model.save_pretrained(tmp_path)
    for loaded in (lowbit.load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded.eval()), y) and lowbit.report(loaded).total_after == report.total_after
    dense = lowbit.dequantize(copy.deepcopy(model))
    assert dense.get_parameter(other) is dense.get_parameter(UP)
    torch.testing.assert_close(logits(dense), y, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="has the same weight: choose another quantizer"):
        lowbit.convert(shared(), Packed(bits=4, group_size=16, quantizer="gptq"), calibration=[IDS])
    whole = mixtral(2)
    whole.model.layers[1].mlp.experts = whole.model.layers[0].mlp.experts  # one module with two names
    y = logits(lowbit.convert(whole, SPEC))
    torch.testing.assert_close(logits(lowbit.dequantize(whole)), y, rtol=2e-5, atol=2e-5)


def test_hooks_of_accelerate_around_experts():
    hooks = pytest.importorskip("accelerate.hooks")
    y = logits(lowbit.convert(mixtral(), SPEC))
    model = mixtral()
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    lowbit.convert(model, SPEC)
    assert not model.lowbit_skipped and torch.equal(logits(model), y)
    assert torch.equal(logits(copy.deepcopy(model)), y)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), y)
    from accelerate import cpu_offload

    model = mixtral()
    cpu_offload(model, execution_device="cpu")
    lowbit.convert(model, SPEC)
    assert model.get_submodule(UP).packed.is_meta and torch.equal(logits(model), y)  # they are still offloaded


def test_experts_in_tensor_parallelism_are_refused():
    model = lowbit.convert(mixtral(), SPEC)
    model._tp_size = 2
    with pytest.raises(ValueError, match=f"{UP}: packed experts cannot be divided between 2 processes"):
        tensor_parallel.split(model, {})


def test_peft_adapts_float_experts_only():
    peft = pytest.importorskip("peft")
    for modules in ([], ["q_proj"]):
        config = peft.LoraConfig(r=2, target_modules=modules, target_parameters=["mlp.experts.down_proj"])
        with pytest.raises(ValueError, match=f"'mlp.experts.down_proj', and {DOWN} is a packed stack"):
            peft.get_peft_model(lowbit.convert(mixtral(), SPEC), config)
    model = peft.get_peft_model(mixtral(), config)  # put around the float experts before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    expected = lowbit.convert(copy.deepcopy(model), SPEC, skip=["*.experts.*"])
    lowbit.convert(model, SPEC)
    name = "base_model.model.model.layers.0.mlp.experts.base_layer.down_proj"
    assert model.lowbit_skipped[name] == "PEFT's lora.ParamWrapper adapts its Parameter 'down_proj'"
    assert torch.equal(logits(model), logits(expected))
    plain = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert "experts" in {row.kind for row in lowbit.report(lowbit.convert(plain, SPEC)).rows}


def test_training_with_checkpoints_of_gradients():
    models = [lowbit.convert(mixtral(), SPEC).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    for model in models:
        lowbit.make_trainable(model, "scales")
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert f"{UP}.scales" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_export():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = lowbit.convert(mixtral(), {"*.experts": SPEC})

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    module = Logits()
    with torch.no_grad():
        assert torch.equal(torch.export.export(module, (IDS,)).module()(IDS), module(IDS))
