"""Architectures of transformers, each as a tiny model with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lowbit
from lowbit.nn.layer import layers

from . import checks
from .checks import Found, Inputs

PACKED = lowbit.Packed(bits=4, group_size=16)
VOCAB = 99  # odd: rows that do not fill a block


@dataclass(frozen=True)
class Architecture:
    """A class of transformers with a tiny configuration, and what goes into it."""

    kind: str
    model_class: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    labels: Callable[[], Any] | None = None
    spec: lowbit.Spec = PACKED
    skip: tuple[str, ...] = ()
    generates: bool = False


def tokens(length: int = 7, batch: int = 2) -> torch.Tensor:
    return torch.randint(5, VOCAB - 10, (batch, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def pair() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(4)}


def image() -> dict[str, Any]:
    return {"pixel_values": noise(2, 3, 16, 16)}


def classes() -> torch.Tensor:
    return torch.tensor([0, 2])


_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_MOE = {**_LLAMA, "num_hidden_layers": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = dict(
    **{**_LLAMA, "num_key_value_heads": 4, "head_dim": 8}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
_BERT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
)  # fmt: skip
_VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
    num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
_BART = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, scale_embedding=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    decoder_start_token_id=2, forced_eos_token_id=None, num_labels=3,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    dropout_rate=0.0, num_labels=3,
)  # fmt: skip
_TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
_GPT2_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_GPT = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def decoder(model_class: str, spec: lowbit.Spec = PACKED, skip: tuple[str, ...] = (), **config: Any) -> Architecture:
    return Architecture("decoder", model_class, config, text, tokens, spec, skip, generates=True)


def encoder(model_class: str, spec: lowbit.Spec = PACKED, skip: tuple[str, ...] = (), **config: Any) -> Architecture:
    return Architecture("encoder", model_class, config, text, classes, spec, skip)


def both(model_class: str, spec: lowbit.Spec = PACKED, skip: tuple[str, ...] = (), **config: Any) -> Architecture:
    labels = lambda: tokens(4)  # noqa: E731
    return Architecture("encoder-decoder", model_class, config, pair, labels, spec, skip, generates=True)


def vision(model_class: str, spec: lowbit.Spec = PACKED, skip: tuple[str, ...] = (), **config: Any) -> Architecture:
    return Architecture("vision", model_class, config, image, classes, spec, skip)


CODEBOOK, KRONECKER = lowbit.Codebook(bits=4), lowbit.Kronecker(rank=2)

ROWS: dict[str, Architecture] = {
    "Llama": decoder("LlamaForCausalLM", **_LLAMA),
    "Llama, tied head": decoder("LlamaForCausalLM", **_LLAMA, tie_word_embeddings=True),
    "Llama, codebooks": decoder("LlamaForCausalLM", CODEBOOK, **_LLAMA),
    "Llama, Kronecker": decoder("LlamaForCausalLM", KRONECKER, **_LLAMA),
    "Mistral": decoder("MistralForCausalLM", **_LLAMA, sliding_window=4),
    "Qwen2": decoder("Qwen2ForCausalLM", **_LLAMA),
    "Qwen3": decoder("Qwen3ForCausalLM", **_LLAMA),
    "Gemma2": decoder("Gemma2ForCausalLM", **_LLAMA, query_pre_attn_scalar=8, sliding_window=4),
    "Gemma3": decoder("Gemma3ForCausalLM", **_LLAMA, query_pre_attn_scalar=8, sliding_window=4),
    "Phi3": decoder("Phi3ForCausalLM", **_LLAMA),
    "OLMo2": decoder("Olmo2ForCausalLM", **_LLAMA),
    "Cohere": decoder("CohereForCausalLM", **_LLAMA),
    "Mixtral": decoder("MixtralForCausalLM", **_LLAMA, num_local_experts=2),
    "DeepSeek-V3": decoder("DeepseekV3ForCausalLM", **_DEEPSEEK),
    "DeepSeek-V2": decoder("DeepseekV2ForCausalLM", **_DEEPSEEK),
    "Qwen2-MoE": decoder("Qwen2MoeForCausalLM", **_MOE, num_experts=4, shared_expert_intermediate_size=16),
    "Qwen3-MoE": decoder("Qwen3MoeForCausalLM", **_MOE, num_experts=4),
    "Qwen3-MoE, codebooks": decoder("Qwen3MoeForCausalLM", CODEBOOK, **_MOE, num_experts=4),
    "GPT-OSS": decoder("GptOssForCausalLM", **_MOE, num_local_experts=4, sliding_window=4),
    "Granite-MoE": decoder("GraniteMoeForCausalLM", **_MOE, num_local_experts=4),
    "OLMoE": decoder("OlmoeForCausalLM", **_MOE, num_experts=4),
    "PhiMoE": decoder("PhimoeForCausalLM", **_MOE, num_local_experts=4),
    "GLM4-MoE": decoder(
        "Glm4MoeForCausalLM", **_MOE, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=0,
    ),
    "Jamba": decoder(
        "JambaForCausalLM", **{**_MOE, "num_hidden_layers": 2}, num_experts=4, mamba_d_state=8, mamba_dt_rank=16,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "Nemotron-H": decoder(
        "NemotronHForCausalLM", **{**_MOE, "num_hidden_layers": 2}, layers_block_type=["moe", "attention"],
        n_routed_experts=4, n_group=1, topk_group=1, moe_shared_expert_intermediate_size=16,
    ),
    "Llama-4": Architecture(
        "decoder", "Llama4ForCausalLM", {**_MOE, "num_experts_per_tok": 1, "num_local_experts": 4,
                                         "intermediate_size_mlp": 48}, text, tokens, generates=True,
    ),
    "JetMoE": decoder("JetMoeForCausalLM", **_MOE, num_local_experts=4, kv_channels=16),
    "DBRX": decoder(
        "DbrxForCausalLM", **_GPT, d_model=32, n_heads=2, n_layers=1, max_seq_len=64,
        attn_config=dict(kv_n_heads=1, clip_qkv=8, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=48, hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "LongCat-Flash": decoder(
        "LongcatFlashForCausalLM", **{k: v for k, v in _DEEPSEEK.items() if k != "num_hidden_layers"}, num_layers=1,
        ffn_hidden_size=16, expert_ffn_hidden_size=16, zero_expert_num=2, moe_topk=3,
    ),
    "Falcon": decoder("FalconForCausalLM", **_GPT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "GPT-2": decoder("GPT2LMHeadModel", **_GPT, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_GPT2_DROPOUT),
    "GPT-J": decoder("GPTJForCausalLM", **_GPT, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4,
                     **_GPT2_DROPOUT),
    "GPT-NeoX": decoder(
        "GPTNeoXForCausalLM", **_GPT, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "OPT": decoder(
        "OPTForCausalLM", **_GPT, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
    ),
    "Bloom": decoder("BloomForCausalLM", **_GPT, hidden_size=32, n_layer=2, n_head=4),
    "MPT": decoder("MptForCausalLM", **_GPT, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "Mamba": decoder("MambaForCausalLM", **_GPT, hidden_size=32, state_size=16, num_hidden_layers=1, time_step_rank=16),
    "BERT": encoder("BertForSequenceClassification", **_BERT),
    "BERT, masked words": Architecture("encoder", "BertForMaskedLM", _BERT, text, tokens),
    "RoBERTa": encoder("RobertaForSequenceClassification", CODEBOOK, **_BERT, pad_token_id=1),
    "ALBERT": encoder("AlbertForSequenceClassification", **_BERT, embedding_size=16),
    "DistilBERT": encoder(
        "DistilBertForSequenceClassification", vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3,
    ),
    "ELECTRA": encoder("ElectraForSequenceClassification", **_BERT, embedding_size=16),
    "DeBERTa-v2": encoder(
        "DebertaV2ForSequenceClassification", **_BERT, relative_attention=True, position_buckets=8,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True, pooler_hidden_size=32,
        pooler_dropout=0.0,
    ),
    "MPNet": encoder("MPNetForSequenceClassification", skip=("*.relative_attention_bias",), **_BERT),
    "ModernBERT": encoder(
        "ModernBertForSequenceClassification", **{**_BERT, "intermediate_size": 32}, pad_token_id=0, local_attention=8,
        global_attn_every_n_layers=2,
    ),
    "T5": both("T5ForConditionalGeneration", skip=("*.relative_attention_bias",), **_T5),
    "T5, gated": both(
        "T5ForConditionalGeneration", skip=("*.relative_attention_bias",), **_T5, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "BART": both("BartForConditionalGeneration", **_BART),
    "mBART": both("MBartForConditionalGeneration", **_BART),
    "Marian": both("MarianMTModel", **_BART),
    "Pegasus": both("PegasusForConditionalGeneration", KRONECKER, **_BART),
    "ViT": vision("ViTForImageClassification", **_VIT),
    "DeiT": vision("DeiTForImageClassification", **_VIT),
    "BEiT": vision("BeitForImageClassification", **_VIT, use_relative_position_bias=True),
    "DINOv2": vision(
        "Dinov2ForImageClassification", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=8, mlp_ratio=2, num_labels=3,
    ),
    "Swin": vision(
        "SwinForImageClassification", image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
        window_size=4, num_labels=3, hidden_dropout_prob=0.0, drop_path_rate=0.0,
    ),
    "YOLOS": Architecture(
        "vision", "YolosForObjectDetection", {**_VIT, "image_size": [16, 16], "num_detection_tokens": 5}, image,
    ),
    "Wav2Vec2": Architecture("audio", "Wav2Vec2ForCTC", {
        **_BERT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0,
        "final_dropout": 0.0, "apply_spec_augment": False, "pad_token_id": 0,
    }, lambda: {"input_values": noise(2, 800)}, lambda: tokens(3)),
    "Whisper": Architecture("audio", "WhisperForConditionalGeneration", {
        **_BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "suppress_tokens": None,
        "begin_suppress_tokens": None, "scale_embedding": False,
    }, lambda: {"input_features": noise(2, 8, 20), "decoder_input_ids": tokens(4)}, lambda: tokens(4), generates=True),
    "CLIP": Architecture("vision and text", "CLIPModel", {
        "text_config": {**_TOWER, "vocab_size": VOCAB, "max_position_embeddings": 16, "eos_token_id": 2},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8}, "projection_dim": 16,
    }, lambda: {**text(), **image(), "return_loss": True}),
    "SigLIP": Architecture("vision and text", "SiglipModel", {
        "text_config": {**_TOWER, "vocab_size": VOCAB, "max_position_embeddings": 16, "projection_size": 32},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
    }, lambda: {**text(), **image(), "return_loss": True}),
    "LLaVA": Architecture("vision and text", "LlavaForConditionalGeneration", {
        "text_config": {**_LLAMA, "model_type": "llama"},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"},
        "image_token_index": VOCAB - 1, "vision_feature_layer": -1,
    }, lambda: pictured(4), lambda: pictured(4)["input_ids"], generates=True),
    "Qwen2-VL": Architecture("vision and text", "Qwen2VLForConditionalGeneration", {
        "text_config": {**_LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 2,
                          "patch_size": 4, "temporal_patch_size": 2, "in_channels": 3},
        "image_token_id": VOCAB - 1, "vision_start_token_id": VOCAB - 2, "vision_end_token_id": VOCAB - 3,
        "video_token_id": VOCAB - 4,
    }, lambda: patches(), lambda: patches()["input_ids"], generates=True),
}  # fmt: skip


def pictured(places: int, batch: int = 2) -> dict[str, Any]:
    """Tokens with one picture in front, which takes so many places."""
    ids = torch.cat([torch.full((batch, places), VOCAB - 1), tokens(batch=batch)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(batch, 3, 16, 16)}


def patches() -> dict[str, Any]:
    """One picture of 4 x 4 patches, of which every 2 x 2 become a token."""
    inputs = pictured(4, 1)
    kinds = (inputs["input_ids"] == VOCAB - 1).int()
    grid = torch.tensor([[1, 4, 4]])
    return {**inputs, "pixel_values": noise(16, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def build(row: Architecture) -> Any:
    import transformers

    model_class = getattr(transformers, row.model_class)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**copy.deepcopy(row.config)))
    return checks.spread(model).eval()


def generated(model: Any, inputs: Inputs) -> torch.Tensor:
    """Greedy tokens."""
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    result: torch.Tensor = model.generate(**inputs, max_new_tokens=4, min_new_tokens=2, do_sample=False)
    return result


def examine(row: Architecture) -> Found:
    """Every column of one architecture."""
    found, inputs = Found(), row.inputs()
    labelled = {**inputs, "labels": row.labels()} if row.labels else inputs
    labelled.pop("decoder_input_ids", None) if row.labels else None
    model = build(row)
    assert sum(p.numel() for p in model.parameters()) < 200_000, "the model is too large for a test"

    def task() -> None:
        dense, other = checks.dequantized(model), reloaded[0]
        if row.generates:
            ours = generated(model, inputs)
            assert torch.equal(ours, generated(dense, inputs)) and torch.equal(ours, generated(other, inputs))
            return
        with torch.no_grad():
            ours = checks.loss_of(model, labelled)
            checks.assert_close(ours, checks.loss_of(dense, labelled))
            assert torch.equal(ours, checks.loss_of(other, labelled))

    reloaded: list[Any] = []
    with checks.quiet():
        found.check("convert", lambda: checks.converted(model, row.spec, row.skip))
        if not layers(model):
            return found
        found.packed = checks.packed_of(model)
        found.check("forward", lambda: checks.forward(model, inputs))
        found.check("reload", lambda: reloaded.append(checks.reload(model, inputs)))
        found.check("task", task)
        trained = ("a", "b") if isinstance(row.spec, lowbit.Kronecker) else (
            ("codebook",) if isinstance(row.spec, lowbit.Codebook) else ("scales",))  # fmt: skip
        found.check("training", lambda: checks.training(model, labelled, trained))
        found.notes.extend(checks.notes(model))
    return found
