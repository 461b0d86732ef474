"""A Llama of 1.1 billion parameters (TinyLlama's shape) with random weights, made layer by layer in packed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowbit
from benchmarks.models.memory import SHAPE
from lowbit.nn.layer import Layer, layers

LAYERS = 22
GROUP = 128
SPREAD = 0.02  # standard deviation of the weights


def config(depth: int = LAYERS) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPE, num_hidden_layers=depth, attn_implementation="sdpa")


def on_meta(depth: int, dtype: torch.dtype) -> nn.Module:
    """Shapes only; but for the norms, which are ones, and the rotary embedding, which has no weights."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(config(depth)).to(dtype)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype), requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config(depth))
    model.generation_config.eos_token_id = None
    return model.eval()


def spec(bits: int, activations: str) -> lowbit.Packed:
    return lowbit.Packed(
        bits=bits, group_size=GROUP, symmetric=True, activations="int8" if activations == "int8" else "float"
    )


def random_tensors(layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of a symmetric packed layer, in the canonical order: any bits are codes, scales make the spread right."""
    shapes = {name: shape for name, (shape, _) in layer.format.tensors().items()}
    codes = 2**layer.format.bits
    scale = SPREAD / ((codes**2 - 1) / 12) ** 0.5
    return {
        "packed": torch.empty(shapes["packed"], dtype=torch.int32).random_(-(2**31), 2**31 - 1, generator=generator),
        "scales": torch.full(shapes["scales"], scale, dtype=torch.float16),
    }


def fill(model: nn.Module, seed: int = 0) -> dict[str, Layer]:
    """Give every (meta) layer of a converted model random tensors, codes in the canonical order; returns the layers.

    The n-th layer has the same codes whatever the kind of activations.
    """
    filled = layers(model)
    for i, layer in enumerate(filled.values()):
        layer.store(random_tensors(layer, torch.Generator().manual_seed(seed + i)))
    return filled


def packed(bits: int, activations: str, depth: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Every linear layer, the embedding and the head packed, and arranged for the kernels on this device."""
    model = lowbit.convert(on_meta(depth, dtype), spec(bits, activations))
    for layer in fill(model).values():
        layer.prepare()
    return model


def dense(depth: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The same shape in floats: random rows, each used many times."""
    model = on_meta(depth, dtype)
    rows = torch.randn(64, SHAPE["intermediate_size"]).mul_(SPREAD).to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            n, k = module.weight.shape
            weight = rows[:, :k].repeat(-(-n // len(rows)), 1)[:n].contiguous()
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model
