"""Adapters of PEFT on a model that is packed already: as on the dequantized one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lowbit
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

SPEC = lowbit.Packed(bits=4, group_size=16)
IDS = torch.tensor([[3, 1, 39, 8], [7, 7, 20, 4]])


def packed(cls: str = "LlamaForCausalLM", **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    model_class = getattr(transformers, cls)
    return lowbit.convert(model_class(model_class.config_class(**(config or sizes))).eval(), SPEC)


def adapted(model: Any, config: Any) -> Any:
    """The model with adapters that do something."""
    torch.manual_seed(1)
    made = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def logits_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]),
    "all-linear": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_dora=True),
    "head": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompts": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_a_packed_model(kind: str, tmp_path: Any) -> None:
    config = CONFIGS[kind]()
    model = adapted(packed(), config)
    dense = adapted(lowbit.dequantize(packed()), config)
    logits, gradients = logits_and_gradients(model)
    expected, theirs = logits_and_gradients(dense)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == theirs.keys() and gradients
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6)
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(packed(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not layers(lowbit.dequantize(other))


@pytest.mark.filterwarnings("ignore")
def test_lora_on_what_was_a_conv1d() -> None:
    model = packed("GPT2LMHeadModel", n_embd=32, n_layer=1, n_head=2, vocab_size=60, n_positions=16)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    made = adapted(model, config)
    assert made.base_model.model.transformer.h[0].attn.c_attn.fan_in_fan_out is False
    _, gradients = logits_and_gradients(made)
    assert gradients and all(g is not None for g in gradients.values())


@pytest.mark.filterwarnings("ignore")
def test_what_writes_a_packed_weight_names_the_layer() -> None:
    model = adapted(packed(), CONFIGS["lora"]())
    with pytest.raises(RuntimeError, match=r"model.layers.0.self_attn.q_proj .*\.weight cannot be written"):
        model.merge_and_unload()
    with pytest.raises(RuntimeError, match=r"model.layers.0.self_attn.q_proj .*\.weight cannot be written"):
        peft.get_peft_model(packed(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_goes_through_the_dequantized_model(kind: str) -> None:
    model = adapted(packed(), CONFIGS[kind]())
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with pytest.raises(RuntimeError, match=r"Go back to a float layer with lowbit.dequantize"):
            model.merge_and_unload()
        assert torch.equal(model(input_ids=IDS).logits, expected)  # nothing was changed
        merged = lowbit.dequantize(model).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        again = lowbit.convert(merged, lowbit.Packed(bits=8, group_size=16))
        assert len(layers(again)) == 9
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0.05, atol=0.01)
