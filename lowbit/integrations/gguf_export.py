"""Models of transformers as GGUF files: the inverse of :mod:`lowbit.integrations.gguf`, and checked by it.

The config that the importer makes of the fields must be the model's own: what they cannot say is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.exporters.exporter import Exporter
from lowbit.checkpoint.exporters.gguf import Planned, encoded, write
from lowbit.checkpoint.importers.gguf.split import open_gguf
from lowbit.checkpoint.importers.gguf.types import FLOATS
from lowbit.integrations.gguf_config import ARCHITECTURES, config_of
from lowbit.integrations.gguf_config import FIELDS as NAMES
from lowbit.integrations.gguf_names import change_of, tensors_of
from lowbit.nn.layer import Layer, layers

# What says nothing of the numbers that a model computes, or is derived from the rest.
_NOT_COMPARED = frozenset((
    "dtype", "torch_dtype", "architectures", "transformers_version", "quantization_config", "_name_or_path",
    "use_cache", "initializer_range", "initializer_factor", "bos_token_id", "eos_token_id", "pad_token_id",
    "attention_dropout", "hidden_dropout", "embedding_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "task_specific_params", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "pretraining_tp", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "max_window_layers", "rope_theta", "id2label", "label2id", "problem_type", "return_dict",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "n_inner",
    "use_sliding_window", "n_ctx",
))  # fmt: skip
_IN_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")
_LLAMAS = {"mixtral": "llama", "mistral": "llama"}  # what llama.cpp calls them; Mistral without a window is a Llama
_TYPE_OF = {dtype: name for name, dtype in FLOATS.items()}


@dataclass
class _Plan:
    fields: dict[str, Any]
    tensors: dict[str, Planned]


class Gguf(Exporter):
    format = "gguf"
    suffix = ".gguf"
    can_share = True

    def problem(self, name: str, layer: Layer) -> str | None:
        found = encoded(layer)
        return found if isinstance(found, str) else None

    def check(self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], tokenizer: Any) -> None:
        _plan(model, kept, floats, tokenizer)

    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any = None
    ) -> None:
        plan = _plan(model, kept, floats, tokenizer)
        write(target, plan.fields, plan.tensors)


def _plan(model: Any, kept: Mapping[str, Layer], floats: Mapping[str, Layer], tokenizer: Any) -> _Plan:
    config = model.config
    model_type = config.model_type
    architecture = _LLAMAS.get(model_type) or next((a for a, m in ARCHITECTURES.items() if m == model_type), None)
    if architecture is None:
        known = ", ".join((*ARCHITECTURES.values(), *_LLAMAS))
        raise ValueError(f"model must be of a type that GGUF is read of, {known}: it is {model_type!r}")
    fields, extra = _fields(architecture, config)
    tensors = {**_tensors(architecture, model, kept, floats), **extra}
    fields |= _tokenizer(tokenizer)
    _compare(config, fields, tensors)
    return _Plan(fields, tensors)


# ----------------------------------------------------------------------------------------------------------- tensors


def _tensors(
    architecture: str, model: Any, kept: Mapping[str, Layer], floats: Mapping[str, Layer]
) -> dict[str, Planned]:
    config, found = model.config, dict[str, Planned]()
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied[target.rpartition(".")[0]] = source.rpartition(".")[0]
    every = layers(model, duplicates=True)
    known = tensors_of(config.model_type, config.num_hidden_layers)
    seen: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if owner in tied and leaf != "bias":
            continue
        layer = every.get(owner)
        if layer is not None and leaf != "bias":
            if owner not in seen:
                seen.add(owner)
                found.update(_of_layer(architecture, config, owner, layer, owner in floats, known))
            continue
        found.update(_of_float(architecture, config, name, tensor.detach(), known))
    return found


def _names_of(name: str, known: Mapping[str, list[str]]) -> list[str]:
    if name not in known:
        raise ValueError(f"{name}: GGUF has no name for it")
    return known[name]


def _of_layer(
    architecture: str, config: Any, name: str, layer: Layer, is_float: bool, known: Mapping[str, list[str]]
) -> dict[str, Planned]:
    names = _names_of(name if layer.kind == "experts" else f"{name}.weight", known)
    n, k = layer.format.out_features, layer.format.in_features
    if is_float:
        return _of_float(architecture, config, name if layer.kind == "experts" else f"{name}.weight",
                         layer.dequantize(), known, is_transposed=True)  # fmt: skip
    found = encoded(layer)
    assert not isinstance(found, str)
    type_name = found[0]
    if layer.kind == "experts":
        count: int = layer.num_experts  # type: ignore[assignment]
        shape = (count, n // count // len(names), k)
        return {each: Planned(type_name, shape, _expert_part(layer, count, len(names), i))
                for i, each in enumerate(names)}  # fmt: skip
    order = change_of(architecture, config, names[0]).order

    def content() -> Tensor:
        made = encoded(layer)
        assert not isinstance(made, str)
        return made[1] if order is None else made[1][torch.argsort(order)]

    return {names[0]: Planned(type_name, (n, k), content)}


def _expert_part(layer: Layer, count: int, parts: int, index: int) -> Callable[[], Tensor]:
    def content() -> Tensor:
        made = encoded(layer)
        assert not isinstance(made, str)
        return made[1].view(count, parts, -1, made[1].shape[1])[:, index]

    return content


def _of_float(
    architecture: str, config: Any, name: str, tensor: Tensor, known: Mapping[str, list[str]],
    is_transposed: bool = False,
) -> dict[str, Planned]:  # fmt: skip
    names = _names_of(name, known)
    change = change_of(architecture, config, names[0])
    if change.order is not None:
        tensor = tensor[torch.argsort(change.order)]
    if change.transposed and not is_transposed:
        tensor = tensor.t()
    if change.offset:
        tensor = tensor.float() + change.offset
    if tensor.dim() == 1 or names[0].endswith(_IN_FLOAT32):
        tensor = tensor.float()
    if tensor.dtype not in _TYPE_OF:
        raise ValueError(f"{name}: must be float32, float16 or bfloat16: it is {tensor.dtype}")
    parts = [tensor] if len(names) == 1 else list(tensor.chunk(len(names), 1))
    return {each: Planned(_TYPE_OF[part.dtype], tuple(part.shape), part.contiguous)
            for each, part in zip(names, parts, strict=True)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ fields


def _fields(architecture: str, config: Any) -> tuple[dict[str, Any], dict[str, Planned]]:
    own: dict[str, Any] = {}
    for name, attributes in NAMES.items():
        value = next((v for a in attributes if (v := getattr(config, a, None)) is not None), None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            own[name] = float(value) if name.endswith(("epsilon", "softcapping")) else int(value)
    heads, hidden = config.num_attention_heads, config.hidden_size
    if architecture == "gpt2":
        own["feed_forward_length"] = config.n_inner or 4 * hidden
        own.pop("attention.head_count_kv", None)
    size = getattr(config, "head_dim", None) or hidden // heads
    own["attention.key_length"] = own["attention.value_length"] = size
    own["vocab_size"] = config.vocab_size
    extra: dict[str, Planned] = {}
    rope = getattr(config, "rope_parameters", None)
    if rope:
        full = rope.get("full_attention", rope)
        if "sliding_attention" in rope and rope["sliding_attention"].get("rope_theta", 1e4) != 1e4:
            own["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        own["rope.freq_base"] = float(full["rope_theta"])
        own["rope.dimension_count"] = int(size * (full.get("partial_rotary_factor") or 1.0))
        more, extra = _scaling(config, full, size)
        own |= more
    general = {"general.architecture": architecture, "general.type": "model", "general.quantization_version": 2}
    return general | {f"{architecture}.{name}": value for name, value in own.items()}, extra


def _scaling(config: Any, rope: Mapping[str, Any], size: int) -> tuple[dict[str, Any], dict[str, Planned]]:
    kind = rope.get("rope_type", "default")
    original = getattr(config, "original_max_position_embeddings", None)
    own: dict[str, Any] = {} if original is None else {"rope.scaling.original_context_length": int(original)}
    if kind in ("linear", "yarn"):
        own |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            own["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
            betas = [beta for beta in ("beta_fast", "beta_slow") if rope.get(beta) is not None]
            own |= {f"rope.scaling.yarn_{beta}": float(rope[beta]) for beta in betas}
    if kind == "longrope":
        own["rope.scaling.type"] = kind
        if rope.get("attention_factor") is not None:
            own["rope.scaling.attn_factor"] = float(rope["attention_factor"])
        return own, {f"rope_factors_{name}.weight": _vector(rope[f"{name}_factor"]) for name in ("long", "short")}
    if kind == "llama3":
        factor, base = float(rope["factor"]), float(rope["rope_theta"])
        waves = 2 * math.pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        smooth = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
        return own, {"rope_freqs.weight": _vector((1 / ((1 - smooth) / factor + smooth)).tolist())}
    return own, {}


def _vector(values: Any) -> Planned:
    tensor = torch.tensor(values, dtype=torch.float32)
    return Planned("F32", tuple(tensor.shape), lambda: tensor)


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The fields of another GGUF file's tokenizer; without one, that there is none."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    file = Path(tokenizer) if isinstance(tokenizer, (str, Path)) else None
    if file is None or not file.is_file():
        raise ValueError(f"tokenizer must be the path of a GGUF file that has it: got {tokenizer!r:.100}")
    found = {key: value for key, value in open_gguf(file).fields.items() if key.startswith("tokenizer.")}
    if not found:
        raise ValueError(f"{file} has no tokenizer")
    return found


def _compare(config: Any, fields: dict[str, Any], tensors: Mapping[str, Planned]) -> None:
    """Refuse a config of which the fields say something else."""
    held = SimpleNamespace(
        file=Path("the GGUF file"), fields=fields, tensors=tensors,
        read=lambda name: tensors[name].content().view(torch.uint8)[None],
    )  # fmt: skip
    made = config_of(held).to_dict()  # type: ignore[arg-type]
    own = config.to_dict()
    if own.get("model_type") == "mistral":
        own["model_type"] = "llama"
    for said in (made, own):  # what no head_dim means
        said["head_dim"] = said.get("head_dim") or config.hidden_size // config.num_attention_heads
    for name in sorted((made.keys() | own.keys()) - _NOT_COMPARED):
        mine, theirs = own.get(name), made.get(name)
        if not _is_same(mine, theirs):
            raise ValueError(f"config.{name}={mine!r:.200} cannot be said in GGUF: its fields stand for "
                             f"{theirs!r:.200}")  # fmt: skip


def _is_same(mine: Any, theirs: Any) -> bool:
    """Equal, of floats as float32; what one of them leaves out is a default of None or False."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return all(_is_same(mine.get(key), theirs.get(key)) for key in mine.keys() | theirs.keys())
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(_is_same, mine, theirs))
    if isinstance(mine, float) or isinstance(theirs, float):
        return mine is not None and theirs is not None and math.isclose(mine, theirs, rel_tol=1e-6)
    return bool(mine == theirs) or (mine in (None, False) and theirs in (None, False))
