"""Adapters and heads under training are left alone, and what is under them is converted where PEFT then works."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Packed
from lowbit.nn.layer import layers

SPEC = Packed(bits=4, group_size=16)
IDS = torch.tensor([[1, 2, 3, 5]])


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def logits_and_gradients(model):
    torch.manual_seed(1)  # dropout
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                 vocab_size=60)
    )  # fmt: skip


def spread(model):
    """Make adapters do something: most start at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# config, its arguments, whether the base layer is packed (q_proj), or why it is not
METHODS = {
    "lora": ("LoraConfig", {}, True),
    "dora": ("LoraConfig", dict(use_dora=True), "reads its weight (DoraLinearVariant)"),
    "adalora": ("AdaLoraConfig", dict(total_step=10), True),
    "ia3": ("IA3Config", dict(feedforward_modules=[]), True),
    "loha": ("LoHaConfig", {}, True),
    "vera": ("VeraConfig", {}, True),
    "hra": ("HRAConfig", {}, "may read its weight"),
    "shira": ("ShiraConfig", dict(r=2), "may read its weight"),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_peft_are_left_alone(method, peft):
    name, arguments, packed = METHODS[method]
    config = getattr(peft, name)(task_type="CAUSAL_LM", target_modules=["q_proj"], **arguments)
    model = peft.get_peft_model(llama(), config)
    spread(model)
    before = trainable(model)
    assert before
    lowbit.convert(model, SPEC)
    assert trainable(model) >= before and all("lora" not in n and "hada" not in n for n in layers(model))
    base = "base_model.model.model.layers.0.self_attn.q_proj.base_layer"
    report = lowbit.report(model)
    assert (base in layers(model)) is (packed is True)
    if packed is not True:
        assert packed in report.skipped[base]
    if method == "lora":
        assert "part of PEFT's lora.Linear" in report.skipped[base.replace("base_layer", "lora_A.default")]
        assert "float: base_model.model.model.layers.0.self_attn.q_proj.lora_" in str(report)
    y, gradients = logits_and_gradients(model)
    dense = lowbit.dequantize(copy.deepcopy(model))
    for parameter in dense.parameters():
        parameter.requires_grad_(False).grad = None
    for n in before:
        dense.get_parameter(n).requires_grad_(True)
    expected, others = logits_and_gradients(dense)
    assert float((y - expected).norm() / expected.norm()) < 1e-5
    for n in before:
        if others[n] is not None:
            assert float((gradients[n] - others[n]).norm()) <= 1e-4 * float(others[n].norm()) + 1e-9, n


def test_prompts_and_saved_modules_of_peft_are_left_alone(peft):
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    before = trainable(model)
    lowbit.convert(model, SPEC)
    assert trainable(model) == before == {"prompt_encoder.default.embedding.weight"}
    assert "adapter" in model.lowbit_skipped["prompt_encoder.default.embedding"]
    logits_and_gradients(model)

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    before = trainable(model)
    lowbit.convert(model, SPEC)
    assert trainable(model) == before and any("modules_to_save" in name for name in before)
    reasons = {n: r for n, r in model.lowbit_skipped.items() if "lm_head" in n}
    assert len(reasons) == 2 and all("PEFT's ModulesToSaveWrapper trains a copy" in r for r in reasons.values())


def test_adaption_prompts_stand_around_the_whole_model(peft):
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    model = peft.get_peft_model(llama(), config)
    spread(model)
    before = trainable(model)
    lowbit.convert(model, SPEC)
    assert trainable(model) == before and len(layers(model)) == 9
    y, gradients = logits_and_gradients(model)
    dense = lowbit.dequantize(copy.deepcopy(model))
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in before).grad = None
    expected, others = logits_and_gradients(dense)
    assert float((y - expected).norm() / expected.norm()) < 1e-5
    for name in before:
        assert float((gradients[name] - others[name]).norm()) <= 1e-4 * float(others[name].norm()), name


def test_lora_on_layers_of_bitsandbytes(peft):
    """QLoRA: what bitsandbytes holds in 4 bits is read without loss, the adapter stays and trains."""
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential()
    base.add_module("fc", bnb.nn.LinearNF4(64, 64, compute_dtype=torch.float32))
    base = base.to("cpu")  # quantizes
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["fc"]))
    spread(model)
    before, x = trainable(model), torch.randn(3, 64)
    dense = nn.functional.linear(x, lowbit.convert(copy.deepcopy(base.fc.base_layer)).dequantize(torch.float32),
                                 base.fc.base_layer.bias)  # fmt: skip
    lora = x @ base.fc.lora_A.default.weight.t() @ base.fc.lora_B.default.weight.t() * base.fc.scaling["default"]
    lowbit.convert(model)
    assert trainable(model) == before and set(layers(model)) == {"base_model.model.fc.base_layer"}
    y = model(x)
    assert float((y - dense - lora).norm() / y.norm()) < 1e-5
    y.sum().backward()
    assert all(float(model.get_parameter(name).grad.norm()) > 0 for name in before)


def test_a_merged_adapter_is_named(peft):
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.merge_adapter()
    lowbit.convert(model, SPEC)
    reason = model.lowbit_skipped["base_model.model.model.layers.0.self_attn.q_proj.base_layer"]
    assert "has merged an adapter" in reason
    merged = lowbit.convert(model.unload(), SPEC, skip=["lm_head"]) if not layers(model) else model
    assert layers(merged)


class Adapted(nn.Module):
    """An adapter of the user's own on a frozen layer."""

    def __init__(self, d, lora_name="down"):
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        self.add_module(lora_name, nn.Linear(d, 4, bias=False))
        self.back = nn.Linear(4, d, bias=False)


def test_what_is_trained_in_a_frozen_model_is_left_alone():
    model = nn.Sequential(Adapted(64), Adapted(64))
    before = trainable(model)
    lowbit.convert(model, Packed(bits=8))
    assert trainable(model) == before and set(layers(model)) == {"0.base", "1.base"}
    assert "being trained while most of the model is frozen" in model.lowbit_skipped["0.down"]
    # the very name in a spec asks for it
    model = nn.Sequential(Adapted(64))
    lowbit.convert(model, {"*": Packed(bits=8), "0.down": Packed(bits=8)})
    assert set(layers(model)) == {"0.base", "0.down"} and set(model.lowbit_skipped) == {"0.back"}
    # a model that is trained as a whole, or not at all, is converted as a whole
    for mode in (True, False):
        model = nn.Sequential(Adapted(64)).requires_grad_(mode)
        assert len(layers(lowbit.convert(model, Packed(bits=8)))) == 3


def test_frozen_word_vectors_are_no_frozen_model():
    model = nn.Sequential(nn.Embedding(1000, 32).requires_grad_(False), nn.Linear(32, 32), nn.Linear(32, 4))
    assert len(layers(lowbit.convert(model, Packed(bits=8)))) == 3
    # a prompt that is learned for a frozen model
    prompt, body = nn.Embedding(8, 32), [nn.Linear(32, 32).requires_grad_(False) for _ in range(2)]
    model = lowbit.convert(nn.Sequential(prompt, *body), Packed(bits=8))
    assert set(layers(model)) == {"1", "2"} and trainable(model) == {"0.weight"}
    # a head on a frozen body of another kind is a head under training
    model = nn.Sequential(nn.Conv1d(32, 64, 3).requires_grad_(False), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ValueError, match=r"no layer was left \(2: it is being trained while most"):
        lowbit.convert(model, Packed(bits=8))


def test_adapters_are_known_by_their_name():
    model = nn.Sequential(Adapted(16, "lora_A")).requires_grad_(True)
    lowbit.convert(model, Packed(bits=8))
    assert model.lowbit_skipped == {"0.lora_A": "it is an adapter, by its name"}
