"""What llama.cpp's converter does to the names and the tensors of a model of transformers, undone.

Source: github.com/ggml-org/llama.cpp (conversion/, gguf-py/gguf/tensor_mapping.py). Tests compare it with transformers'
own loader, which needs the package gguf.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_OWN = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "mixtral": _EXPERTS,
}
_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_STACKS = {"ffn_gate_exps": "gate_up_proj", "ffn_up_exps": "gate_up_proj", "ffn_down_exps": "down_proj"}
_FUSED = {"ffn_gate_up_exps": "gate_up_proj"}  # as some files have it; it is never written
_TENSOR = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class Change:
    """What makes a tensor of the file one of the model.

    Attributes:
        order: row n is row ``order[n]`` of the file.
        transposed: of GPT-2's Conv1D.
        offset: what was added to every value.
    """

    order: Tensor | None = None
    transposed: bool = False
    offset: float = 0.0


def name_in_model(model_type: str, tensor: str) -> str | None:
    """The name that a tensor of the file has in the model; of experts, that of their stack."""
    found = _TENSOR.fullmatch(tensor)
    if found is None:
        return None
    block, part, leaf = found["block"], found["part"], found["leaf"]
    is_gpt2 = model_type == "gpt2"
    stack = _STACKS.get(part, _FUSED.get(part))
    if block is not None and model_type in _OWN and _OWN[model_type] is _EXPERTS and stack is not None:
        return f"model.layers.{block}.mlp.experts.{stack}" if leaf == "weight" else None
    names = _GPT2 if is_gpt2 else _OUTER if block is None else {**_INNER, **_OWN.get(model_type, {})}
    name = names.get(part)
    if name is None or (is_gpt2 and name.startswith(("transformer.", "lm_head")) != (block is None)):
        return None
    prefix = "" if block is None else f"transformer.h.{block}." if is_gpt2 else f"model.layers.{block}."
    return f"{prefix}{name}.{leaf}"


def tensors_of(model_type: str, num_layers: int) -> dict[str, list[str]]:
    """Name in the model -> its tensors in a file: one, or of experts that are joined, gate and up."""
    parts = dict.fromkeys((*_OUTER, *_INNER, *_GEMMA, *_EXPERTS, *_STACKS, *_GPT2))
    found: dict[str, list[str]] = {}
    for prefix in ("", *(f"blk.{i}." for i in range(num_layers))):
        for tensor in (f"{prefix}{part}.{leaf}" for part in parts for leaf in ("weight", "bias")):
            if (name := name_in_model(model_type, tensor)) is not None:
                found.setdefault(name, []).append(tensor)
    return found


def change_of(architecture: str, config: Any, tensor: str) -> Change:
    """What the converter did to a tensor of the architecture that the file names.

    The rows of the queries and keys of "llama" are in the order of its own rotation: the two halves of a head that
    transformers rotates against each other lie there side by side.
    """
    part = tensor.split(".")[-2] if "." in tensor else tensor
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Change(torch.arange(heads * size).view(heads, -1, 2).transpose(1, 2).flatten())
    if architecture == "gpt2" and tensor.endswith(".weight"):
        return Change(transposed=part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
    if architecture in ("gemma2", "gemma3") and tensor.endswith("norm.weight"):
        return Change(offset=1.0)
    return Change()
