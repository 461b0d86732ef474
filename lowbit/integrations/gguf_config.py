"""The config of transformers that the fields of a GGUF file describe.

transformers' own map leaves out fields without a word (the size of a head of Qwen3, how positions are scaled, what a
logit is capped at, the widths of experts), and then has the values of the class. Here each field of the architecture is
either taken over, or checked, or refused by its name.

Source: github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py writes the fields, src/llama-model.cpp reads them).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.importers.gguf.container import GgufFile

# The architecture that the file names -> the model type of transformers. "llama" with experts is Mixtral.
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma2": "gemma2", "gemma3": "gemma3_text",
    "gpt2": "gpt2", "starcoder2": "starcoder2", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
}  # fmt: skip
# Field -> what configs call it: the first of them that the class has.
FIELDS = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
_REQUIRED = ("block_count", "embedding_length", "attention.head_count")
_FLOATS = ("epsilon", "softcapping")
_ROPE = "rope."
_CHECKED = ("attention.value_length", "attention.causal")
_NO_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")  # the embedding says how many rows it has
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# llama.cpp knows the largest Gemmas by their layers: their queries are scaled by what a head would have
_GEMMA_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class _Fields:
    """The fields of the architecture, without its name; what is not taken is refused at the end."""

    def __init__(self, content: GgufFile, architecture: str) -> None:
        self.content, self.architecture = content, architecture
        prefix = f"{architecture}."
        self.left = {k.removeprefix(prefix): v for k, v in content.fields.items() if k.startswith(prefix)}

    def refusal(self, name: str, requirement: str, value: object) -> ValueError:
        return ValueError(f"{self.content.file}: field '{self.architecture}.{name}' must be {requirement}: got "
                          f"{value!r:.200}")  # fmt: skip

    def take(self, name: str, is_float: bool = False) -> Any:
        """A number; ``None`` where there is no such field."""
        value = self.left.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float) if is_float else int):
            raise self.refusal(name, "a number" if is_float else "a whole number, the same for all layers", value)
        if value < 0 or not math.isfinite(value) or (name in _REQUIRED and value < 1):
            raise self.refusal(name, "positive", value)
        return value

    def check(self, name: str, expected: Any) -> None:
        value = self.left.pop(name, expected)
        if value != expected:
            raise self.refusal(name, f"{expected!r} for this architecture to be read", value)

    def finish(self) -> None:
        for name, value in self.left.items():
            raise ValueError(f"{self.content.file}: field '{self.architecture}.{name}' ({value!r:.80}) is not "
                             f"read of {self.architecture!r}: without it the model would be another")  # fmt: skip


def config_of(content: GgufFile) -> Any:
    """The config of the model that the file holds. Raises ``ValueError`` naming the file and the field."""
    from transformers import CONFIG_MAPPING

    file, architecture = content.file, architecture_of(content)
    fields = _Fields(content, architecture)
    model_type = ARCHITECTURES[architecture]
    if architecture == "llama" and "expert_count" in fields.left:
        model_type = "mixtral"
    cls = CONFIG_MAPPING[model_type]
    usual = cls()
    made: dict[str, Any] = {}

    def set_to(attribute: str, value: Any) -> None:
        made[cls.attribute_map.get(attribute, attribute)] = value

    for name, attributes in FIELDS.items():
        value = fields.take(name, name.endswith(_FLOATS))
        if name == "attention.sliding_window" and value == 0:
            continue  # as it is written where there is none
        if value is None and name in _REQUIRED:
            raise ValueError(f"{file}: field '{architecture}.{name}' is missing")
        attribute = next((a for a in attributes if a == "n_inner" or hasattr(usual, a)), None)
        if name == "attention.key_length" and value is not None and attribute is None:
            fields.left[name] = value  # checked below
        elif value is not None and attribute is None:
            fields.left[name] = value  # refused
        elif value is not None and attribute is not None:
            set_to(attribute, value)
    heads, hidden = made[cls.attribute_map.get("num_attention_heads", "num_attention_heads")], made[
        cls.attribute_map.get("hidden_size", "hidden_size")]  # fmt: skip
    if hasattr(usual, "num_key_value_heads"):
        made.setdefault("num_key_value_heads", heads)
    rotated = fields.take("rope.dimension_count")
    size = made.get("head_dim") or fields.take("attention.key_length")
    if size is None:
        size = rotated if rotated is not None and model_type in ("llama", "mixtral") else hidden // heads
    if hasattr(usual, "head_dim") or size * heads != hidden:  # some classes read it without declaring it
        made["head_dim"] = size
    fields.check("attention.value_length", size)
    fields.check("attention.causal", True)
    if hasattr(usual, "rope_parameters"):
        _set_rope(made, fields, usual, size, rotated)
    if architecture in _GEMMA_BY_WIDTH:
        by_width = made["num_hidden_layers"] == _GEMMA_BY_WIDTH[architecture]
        made["query_pre_attn_scalar"] = hidden // heads if by_width else size
    if model_type == "qwen3_moe":
        made["norm_topk_prob"] = True
    for name in _NO_EFFECT:
        fields.left.pop(name, None)
    fields.finish()
    _set_from_tensors(made, content, usual)
    for token, attribute in _TOKENS.items():
        value = content.fields.get(f"tokenizer.ggml.{token}")
        made[attribute] = value if type(value) is int else None
    try:
        config = cls(**made)
    except Exception as error:  # what transformers itself says of the values
        raise ValueError(f"{file}: its fields make no config of {model_type!r}: {error}") from None
    return config


def architecture_of(content: GgufFile) -> str:
    """``general.architecture``; raises ``ValueError`` for one that is not read."""
    found = content.fields.get("general.architecture")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise ValueError(
            f"{content.file}: the architecture {found!r:.200} is not read: lowbit reads {', '.join(ARCHITECTURES)}. "
            "Give the float model that it was made from"
        )
    version = content.fields.get("general.quantization_version", 2)
    if version != 2:
        raise ValueError(f"{content.file}: general.quantization_version must be 2: got {version!r:.200}")
    return found


def _set_from_tensors(made: dict[str, Any], content: GgufFile, usual: Any) -> None:
    embedding = content.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{content.file}: tensor 'token_embd.weight' must be there, with 2 sizes")
    made["vocab_size"] = embedding.shape[0]
    made["tie_word_embeddings"] = "output.weight" not in content.tensors
    if getattr(usual, "attention_bias", None) is False and "blk.0.attn_q.bias" in content.tensors:
        made["attention_bias"] = True


def _set_rope(made: dict[str, Any], fields: _Fields, usual: Any, size: int, rotated: int | None) -> None:
    """``rope_parameters``: the base, how much of a head is rotated, how positions are scaled."""
    content = fields.content
    base = fields.take("rope.freq_base", True) or 10000.0
    own: dict[str, Any] = {"rope_type": "default", "rope_theta": float(base)}
    if rotated not in (None, size):
        if "partial_rotary_factor" not in (usual.rope_parameters or {}):
            raise fields.refusal("rope.dimension_count", f"the size of a head, {size}", rotated)
        own["partial_rotary_factor"] = rotated / size
    length = fields.take("rope.scaling.original_context_length")
    kind, factor = fields.left.pop("rope.scaling.type", "none"), fields.take("rope.scaling.factor", True)
    attention = fields.take("rope.scaling.attn_factor", True)
    if kind == "linear":
        own.update(rope_type="linear", factor=float(factor or 1.0))
    elif kind == "yarn":
        if length is None or factor is None:
            raise fields.refusal("rope.scaling.type", "given with its factor and original_context_length", kind)
        own.update(rope_type="yarn", factor=float(factor), original_max_position_embeddings=length)
        for name in ("beta_fast", "beta_slow"):
            if (beta := fields.take(f"rope.scaling.yarn_{name}", True)) is not None:
                own[name] = float(beta)
    elif kind not in ("none", "longrope"):
        raise fields.refusal("rope.scaling.type", "none, linear, yarn or longrope", kind)
    elif kind == "none" and factor not in (None, 1.0):
        raise fields.refusal("rope.scaling.factor", "1 without a rope.scaling.type", factor)
    given = {name: _values(content, name) for name in ROPE_TENSORS if name in content.tensors}
    if "rope_freqs.weight" in given:
        own.update(_llama3(content.file, given.pop("rope_freqs.weight"), float(base), size))
    if given or kind == "longrope":
        if len(given) != 2 or length is None or not hasattr(usual, "original_max_position_embeddings"):
            raise ValueError(f"{content.file}: long positions need rope_factors_long.weight, rope_factors_short.weight "
                             f"and rope.scaling.original_context_length, of phi3: got {sorted(given)}")  # fmt: skip
        own.update(rope_type="longrope", long_factor=given["rope_factors_long.weight"].tolist(),
                   short_factor=given["rope_factors_short.weight"].tolist())  # fmt: skip
        if attention is not None:
            own["attention_factor"] = float(attention)
    elif attention not in (None, 1.0):
        raise fields.refusal("rope.scaling.attn_factor", "1 without long positions", attention)
    if length is not None and hasattr(usual, "original_max_position_embeddings"):
        made["original_max_position_embeddings"] = length
    nested = {name for name, value in (usual.rope_parameters or {}).items() if isinstance(value, dict)}
    local = fields.take("rope.freq_base_swa", True)
    if nested:
        made["rope_parameters"] = {
            "full_attention": own,
            "sliding_attention": {"rope_type": "default", "rope_theta": float(local or 10000.0)},
        }
    else:
        if local not in (None, base):
            raise fields.refusal("rope.freq_base_swa", "that of rope.freq_base", local)
        made["rope_parameters"] = own


def _values(content: GgufFile, name: str) -> Tensor:
    info = content.tensors[name]
    if info.type != "F32" or len(info.shape) != 1:
        raise ValueError(f"{content.file}: tensor {name!r} must be F32 with 1 size: got {info.type} {list(info.shape)}")
    return content.read(name).view(torch.float32)[0]


def _llama3(file: Path, factors: Tensor, base: float, size: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 that ``rope_freqs.weight`` holds: by how much each frequency is divided.

    The file has no other trace of it. Its only numbers but the factor are those of all Llama 3: 1, 4 and 8192.
    """
    factor = float(factors.max())
    waves = 2 * math.pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = ((8192 / waves - 1) / 3).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if len(factors) != len(expected) or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise ValueError(f"{file}: tensor 'rope_freqs.weight' must hold the scaling of Llama 3 for heads of {size}: it "
                         "has other values")  # fmt: skip
    if factor == 1.0:
        return {}
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
