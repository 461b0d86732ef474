"""GGUF files: what is in their blocks stays as it is, and what is not as the format says is refused.

fixtures/gguf/ has models that llama.cpp's converter wrote, with the logits of transformers' model, and a tensor of each
type, with what the package gguf makes of it. The loops here know nothing of lowbit.
"""

import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.checkpoint import foreign
from lowbit.checkpoint.importers.gguf.container import TYPES, GgufFile
from lowbit.checkpoint.importers.gguf.types import BLOCKS, format_of, weight_of
from lowbit.cli.command import main
from lowbit.nn.layer import layer_class, layers

transformers = pytest.importorskip("transformers", minversion="5.0")

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "gguf"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
MODELS = sorted(name.removeprefix("logits.") for name in EXPECTED if name.startswith("logits."))
IDS = torch.arange(12)[None] * 7 % 32
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, IQ2_XXS, IQ4_XS = 0, 1, 2, 8, 12, 14, 16, 23
SIZES = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), Q4_K: (256, 144), Q6_K: (256, 210),
         IQ2_XXS: (256, 66), IQ4_XS: (256, 136)}  # fmt: skip


RATIOS = {"Q2_K": 1.2, "Q3_K": 1.04, "TQ1_0": 1.23}  # bytes of packed weights to the file's, where above 1.03


# ------------------------------------------------------------------------------------------------------ the types


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_types(name):
    content = GgufFile(FIXTURES / "types.gguf")
    weight, expected = weight_of(name, content.read(name)), EXPECTED[f"types.{name}"]
    assert weight.format() == format_of(name, *expected.shape)
    found = layer_class(weight.family, "linear").from_weight(weight).dequantize(torch.float32)
    assert torch.equal(found, expected)
    size, nbytes = {each: (size, count) for each, size, count in TYPES.values()}[name]
    if weight.family == "packed":
        assert weight.format().nbytes <= RATIOS.get(name, 1.03) * (found.numel() // size * nbytes)


def test_groups_that_are_their_minimum():
    """Their scale is 0: the weights are the minima."""
    for name, size in (("Q2_K", 16), ("Q4_K", 32)):
        weight = weight_of(name, GgufFile(FIXTURES / "types.gguf").read(name))
        first = EXPECTED[f"types.{name}"][0, :size]
        assert first[0] != 0 and bool((first == first[0]).all())
        assert weight.scales[0, 0] == 0
        assert torch.equal(-weight.zeros[0, 0].float() * weight.zero_factors[0, 0].float(), first[0])
        layer = lowbit.PackedLinear.from_weight(weight)
        y = layer(torch.ones(1, weight.codes.shape[1]))[0, 0].detach()
        assert torch.allclose(y.double(), EXPECTED[f"types.{name}"][0].double().sum(), rtol=1e-5)


def test_rows_in_another_order():
    rows = torch.cat([GgufFile(FIXTURES / "types.gguf").read("Q6_K")] * 5)
    rows[:, 192:208] = torch.arange(5, dtype=torch.uint8)[:, None] + 1
    plain, moved = weight_of("Q6_K", rows), weight_of("Q6_K", rows, torch.tensor([3, 0, 4, 2, 1]))
    assert torch.equal(moved.scales, plain.scales[[3, 0, 4, 2, 1]])


def test_floats():
    content = GgufFile(FIXTURES / "types.gguf")
    for name, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        assert torch.equal(content.read(name).view(dtype).float(), EXPECTED[f"types.{name}"])


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_types_against_the_package(name):
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize

    kind = gguf.GGMLQuantizationType[name]
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows = torch.randint(0, 256, (3, 512 // size * nbytes), dtype=torch.uint8)
    known = GgufFile(FIXTURES / "types.gguf").read(name).view(-1, nbytes)
    blocks = rows.view(-1, nbytes)
    own = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 0}.get(name, 0)
    blocks[:, own : None if own else 4] = known[:1, own : None if own else 4]  # its halves are numbers
    if name == "TQ2_0":
        blocks[:] = known[:1]
    weight, expected = weight_of(name, rows), torch.from_numpy(dequantize(rows.numpy(), kind).copy())
    found = layer_class(weight.family, "linear").from_weight(weight).dequantize(torch.float32)
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", MODELS)
def test_what_llama_cpp_wrote(name, tmp_path):
    file = FIXTURES / f"{name}.gguf"
    model = lowbit.load(file)
    logits = model(IDS).logits[0].detach()
    expected = EXPECTED[f"logits.{name}"]
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert model.config.model_type.removesuffix("_text") == name
    blocks = [t for t, info in GgufFile(file).tensors.items() if info.type == "Q8_0"]
    packed = layers(model)
    joined = sum("ffn_up_exps" in tensor for tensor in blocks)  # with ffn_gate_exps
    tied = model.config.tie_word_embeddings
    assert len(packed) == len(blocks) - joined + tied
    with pytest.warns(UserWarning, match="no tokenizer"):
        lowbit.convert_folder(file, tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(IDS).logits[0], logits)
    assert [f.name for f in (tmp_path / "packed").glob("*.gguf")] == []


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value_of(value):
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        inside = [value_of(each) for each in value]
        return struct.pack("<I", 9) + inside[0][:4] + struct.pack("<Q", len(value)) + b"".join(v[4:] for v in inside)
    return struct.pack("<I", 8) + text(value)


def gguf_file(path, fields, tensors):
    """Writes ``{name: (type, shape, bytes)}``."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    out += b"".join(text(key) + value_of(value) for key, value in fields.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += text(name) + sizes + struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(out + bytes(-len(out) % 32) + data)


def parts_of(path):
    """The fields and tensors of a file, as :func:`gguf_file` takes them."""
    content, kinds = GgufFile(path), {"F32": F32, "Q8_0": Q8_0}
    tensors = {n: (kinds[t.type], t.shape, content.read(n).numpy().tobytes()) for n, t in content.tensors.items()}
    return dict(content.fields), tensors


def q8_0(weight):
    """Blocks of a float weight, and the weight that they are."""
    groups = weight.reshape(-1, 32)
    scales = (groups.abs().amax(1) / 127).half()
    codes = (groups / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    blocks = torch.cat([scales[:, None].view(torch.uint8), codes.view(torch.uint8)], 1)
    return blocks.numpy().tobytes(), (codes.float() * scales.float()[:, None]).view(weight.shape)


OTHERS = {
    "mixtral": ("llama", transformers.MixtralConfig, dict(num_local_experts=3, num_experts_per_tok=2),
                dict(expert_count=3, expert_used_count=2)),
    "qwen3": ("qwen3", transformers.Qwen3Config, dict(head_dim=16, attention_bias=False),
              {"attention.key_length": 16, "attention.value_length": 16}),
    "gemma2": ("gemma2", transformers.Gemma2Config, dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=4,
                                                         attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
               {"attention.key_length": 16, "attention.sliding_window": 4, "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 2.0}),
    "llama": ("llama", transformers.LlamaConfig, dict(attention_bias=True, rope_parameters={
        "rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 5e4, "rope.dimension_count": 8}),
}  # fmt: skip
def in_pairs(weight, heads):
    """llama.cpp's order of the rows of queries and keys: row i of each half of a head side by side."""
    half = len(weight) // heads // 2
    return torch.stack([weight[(2 * h + j) * half + i] for h in range(heads) for i in range(half) for j in range(2)])


LEAVES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "mlp.gate": "ffn_gate_inp", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def written(name, model):
    """Tensors of a file that holds ``model``, whose matrices are rounded to what is written."""
    tensors = {}
    for n, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.1 if "norm" in n else 0.2)
        is_float = p.dim() == 1 or n.endswith("mlp.gate.weight")
        p.data = p.data if is_float else q8_0(p.data)[1]
        leaf, _, kind = n.removeprefix("model.layers.0.").rpartition(".")
        outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        if name == "gemma2" and leaf == "post_attention_layernorm":
            leaf = "post_attention_norm"
        parts = {f"{outer[leaf]}.{kind}" if leaf in outer else f"blk.0.{LEAVES.get(leaf, leaf)}.{kind}": p.data}
        if name in ("llama", "mixtral") and leaf in ("self_attn.q_proj", "self_attn.k_proj"):
            parts = {key: in_pairs(w, 4 if "q_proj" in n else 2) for key, w in parts.items()}
        if kind == "gate_up_proj":
            gate, up = p.data.chunk(2, 1)
            parts = {"blk.0.ffn_gate_exps.weight": gate, "blk.0.ffn_up_exps.weight": up}
        if kind == "down_proj":
            parts = {"blk.0.ffn_down_exps.weight": p.data}
        if name == "gemma2" and "norm" in n:
            parts = {key: w + 1 for key, w in parts.items()}
        for key, w in parts.items():
            raw = w.contiguous().numpy().tobytes() if is_float else q8_0(w.contiguous())[0]
            tensors[key] = (F32 if is_float else Q8_0, tuple(w.shape), raw)
    return tensors


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_models_that_are_written_here(name, tmp_path):
    architecture, config_class, own, fields = OTHERS[name]
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    config = config_class(**sizes, **own)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config).eval()
    common = {
        "block_count": 1, "context_length": 2048, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
    }  # fmt: skip
    named = {f"{architecture}.{key}": value for key, value in {**common, **fields}.items()}
    gguf_file(tmp_path / "x.GGUF", {"general.architecture": architecture, **named}, written(name, model))
    found = lowbit.load(tmp_path / "x.GGUF")
    assert type(found) is type(model)
    with torch.no_grad():
        difference = found(IDS).logits - model(IDS).logits
        assert float(difference.norm() / model(IDS).logits.norm()) < 1e-5
    for n, layer in layers(found).items():
        assert torch.equal(layer.dequantize(torch.float32), model.get_parameter(n if "experts" in n else f"{n}.weight"))


def test_experts_whose_gate_and_up_are_one_tensor(tmp_path):
    fields, tensors = parts_of(FIXTURES / "qwen3_moe.gguf")
    parts = [tensors.pop(f"blk.0.ffn_{part}_exps.weight") for part in ("gate", "up")]
    (kind, (count, rows, columns), _), size = parts[0], len(parts[0][2]) // parts[0][1][0]
    joined = b"".join(raw[e * size : (e + 1) * size] for e in range(count) for _, _, raw in parts)
    tensors["blk.0.ffn_gate_up_exps.weight"] = (kind, (count, 2 * rows, columns), joined)
    gguf_file(tmp_path / "x.gguf", fields, tensors)
    plain = lowbit.load(FIXTURES / "qwen3_moe.gguf")(IDS).logits
    assert torch.equal(lowbit.load(tmp_path / "x.gguf")(IDS).logits, plain)
    tensors["blk.0.ffn_up_exps.weight"] = parts[1]
    gguf_file(tmp_path / "x.gguf", fields, tensors)
    refused(tmp_path / "x.gguf", "must be ffn_gate_exps and ffn_up_exps, or ffn_gate_up_exps")


def test_numbers_of_yarn(tmp_path):
    fields, tensors = parts_of(FIXTURES / "qwen2.gguf")
    plain = lowbit.load(FIXTURES / "qwen2.gguf")(IDS).logits
    for betas, is_same in (((32.0, 1.0), True), ((4.0, 0.01), False)):
        fields |= {f"qwen2.rope.scaling.yarn_beta_{n}": b for n, b in zip(("fast", "slow"), betas, strict=True)}
        gguf_file(tmp_path / "x.gguf", fields, tensors)
        model = lowbit.load(tmp_path / "x.gguf")
        assert torch.equal(model(IDS).logits, plain) == is_same
        assert model.config.rope_parameters["beta_fast"] == betas[0]


# ------------------------------------------------------------------------------------------- what else a file may be


def blocks_of(name, rows, columns):
    """Random blocks that are valid: those of the fixture, in another order."""
    raw = GgufFile(FIXTURES / "types.gguf").read(name).view(-1, SIZES[KINDS[name]][1])
    count = rows * columns // SIZES[KINDS[name]][0]
    return raw[torch.randint(0, len(raw), (count,))].numpy().tobytes()


KINDS = {"Q4_0": Q4_0, "Q4_K": Q4_K, "Q6_K": Q6_K, "IQ4_XS": IQ4_XS}


def wide_llama(path, kinds, **fields):
    """A Llama of 256 columns, tied, whose matrices have these types: ``{part: name}``."""
    shapes = {"token_embd": (300, 256), "output_norm": (256,), "blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,),
              "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256),
              "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (256, 256), "blk.0.ffn_up": (256, 256),
              "blk.0.ffn_down": (256, 256)}  # fmt: skip
    tensors = {}
    for part, shape in shapes.items():
        kind = kinds.get(part.removeprefix("blk.0."), kinds[""] if len(shape) == 2 else F32)
        if kind in (F32, F16):
            raw = (torch.rand(shape) / 8 + (len(shape) == 1)).to((torch.float32, torch.float16)[kind])
            tensors[f"{part}.weight"] = (kind, shape, raw.numpy().tobytes())
        else:
            tensors[f"{part}.weight"] = (KINDS[kind], shape, blocks_of(kind, *shape))
    given = {"block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 256,
             "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
             "rope.freq_base": 1e4}  # fmt: skip
    named = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in given.items()}, **fields}
    gguf_file(path, named, tensors)


MIXED = {"": "Q4_K", "token_embd": "Q6_K", "attn_v": "Q6_K", "ffn_down": "IQ4_XS", "ffn_up": "Q4_0", "ffn_gate": F16}


def test_a_mixture_with_a_tied_embedding(tmp_path):
    wide_llama(tmp_path / "model.gguf", MIXED)
    model = lowbit.load(tmp_path)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(embedding, lowbit.PackedEmbedding) and embedding.format.bits == 6
    assert head.packed is embedding.packed and head.scales is embedding.scales
    content = GgufFile(tmp_path / "model.gguf")
    assert torch.equal(embedding(torch.arange(300)), head.dequantize(torch.float32))
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    assert isinstance(mlp.down_proj, lowbit.CodebookLinear) and type(mlp.gate_proj) is torch.nn.Linear
    gate = content.read("blk.0.ffn_gate.weight").view(torch.float16).float()
    assert torch.equal(mlp.gate_proj.weight, gate) and "no spec" in str(lowbit.report(model))
    queries = weight_of("Q4_K", content.read("blk.0.attn_q.weight"))
    plain = lowbit.PackedLinear.from_weight(queries).dequantize(torch.float32)
    assert torch.equal(in_pairs(attention.q_proj.dequantize(torch.float32), 4), plain)
    logits = model(IDS).logits
    assert bool(torch.isfinite(logits).all())
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "packed")]) == 0
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, logits)
    lowbit.convert_folder(tmp_path / "model.gguf", tmp_path / "more", lowbit.Packed(bits=8))
    more = lowbit.load(tmp_path / "more")
    assert more.model.layers[0].mlp.gate_proj.format.bits == 8
    assert torch.equal(more.model.layers[0].mlp.down_proj.packed, mlp.down_proj.packed)
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "one GGUF file", "model.gguf, second.gguf")


def test_a_file_of_floats(tmp_path):
    wide_llama(tmp_path / "x.gguf", {"": F16})
    refused(tmp_path / "x.gguf", "holds floats only: give a spec")
    lowbit.convert_folder(tmp_path / "x.gguf", tmp_path / "packed", lowbit.Packed(bits=4))
    model = lowbit.load(tmp_path / "packed")
    assert model.dtype == torch.float16 and len(layers(model)) == 9


def test_the_tokenizer(tmp_path):
    """Byte-level pieces with two merges, and one control token."""
    pytest.importorskip("transformers.integrations.gguf.reader")  # before, transformers asked the package gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = sorted(bytes_to_unicode().values())
    tokens = [*alphabet, "he", "hel", "<|end|>"]
    tokens += [f"[unused{i}]" for i in range(300 - len(tokens))]
    wide_llama(tmp_path / "x.gguf", MIXED, **{
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["h e", "he l"],
        "tokenizer.ggml.token_type": [3 if t == "<|end|>" else 1 for t in tokens], "tokenizer.ggml.eos_token_id": 258,
    })  # fmt: skip
    lowbit.convert_folder(tmp_path / "x.gguf", tmp_path / "packed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert tokenizer("hello<|end|>")["input_ids"] == [tokens.index(t) for t in ("hel", "l", "o", "<|end|>")]
    assert tokenizer.eos_token == "<|end|>"
    assert lowbit.load(tmp_path / "packed").config.eos_token_id == 258


def refused(path, *words, target="never"):
    """By both ways in, with these words, and nothing is written."""
    for way in (lowbit.load, lambda source: lowbit.convert_folder(source, path.parent / target)):
        with pytest.raises(ValueError) as caught:
            way(path)
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert not (path.parent / target).exists()


def tensor(name, at, value):
    def change(fields, tensors):
        found = list(tensors[name])
        found[at] = value
        tensors[name] = tuple(found)
    return change


UP, EMBEDDING = "blk.0.ffn_up.weight", "token_embd.weight"
CHANGES = {
    "another architecture": (lambda f, t: f.update({"general.architecture": "clip"}), ("'clip' is not read",)),
    "no architecture": (lambda f, t: f.pop("general.architecture"), ("architecture None",)),
    "an old layout": (lambda f, t: f.update({"general.quantization_version": 1}), ("quantization_version must be 2",)),
    "one of several": (lambda f, t: f.update({"split.count": 3}), ("one of 3 files",)),
    "a field that is not known": (lambda f, t: f.update({"llama.logit_scale": 2.0}), ("'llama.logit_scale' (2.0)",)),
    "a field that is missing": (lambda f, t: f.pop("llama.block_count"), ("'llama.block_count' is missing",)),
    "layers of several widths": (lambda f, t: f.update({"llama.feed_forward_length": [32, 32]}), ("same for all",)),
    "a negative": (lambda f, t: f.update({"llama.attention.layer_norm_rms_epsilon": -1.0}), ("positive", "-1.0")),
    "not a number": (lambda f, t: f.update({"llama.rope.freq_base": float("nan")}), ("positive", "nan")),
    "another scaling": (lambda f, t: f.update({"llama.rope.scaling.type": "su"}), ("scaling.type", "'su'")),
    "a scaling without its type": (lambda f, t: f.update({"llama.rope.scaling.factor": 2.0}), ("scaling.factor",)),
    "half a rotation": (lambda f, t: f.update({"llama.rope.dimension_count": 4}), ("size of a head, 8", "got 4")),
    "other values than keys": (lambda f, t: f.update({"llama.attention.value_length": 4}), ("value_length",)),
    "experts without experts": (lambda f, t: f.update({"llama.expert_count": 2}), ("belongs to no module of Mixtral",)),
    "a type that is not read": (tensor(UP, 0, IQ2_XXS), (f"{UP!r}", "sizes", "IQ2_XXS")),
    "no type": (tensor(UP, 0, 77), (f"{UP!r}", "got 77")),
    "another width": (lambda f, t: f.update({"llama.feed_forward_length": 64}), ("must be (32, 64): got (32, 32)",)),
    "too few rows": (lambda f, t: t.update({UP: (F32, (3, 32), bytes(384))}), (f"{UP!r}", "(3, 32)")),
    "a layer more": (lambda f, t: f.update({"llama.block_count": 2}), ("'model.layers.1", "is missing")),
    "a tensor more": (lambda f, t: t.update({"blk.0.lora.weight": t[UP]}), ("'blk.0.lora.weight' belongs to no",)),
    "a tensor less": (lambda f, t: t.pop(UP), ("'model.layers.0.mlp.up_proj.weight'", "is missing")),
    "no embedding": (lambda f, t: t.pop(EMBEDDING), (f"{EMBEDDING!r} must be there",)),
    "a scale that is no number": (tensor(UP, 2, bytes([0, 124]) + bytes(34 * 32 - 2)), (f"{UP!r}", "finite")),
    "other frequencies": (tensor("rope_freqs.weight", 2, bytes(16)), ("'rope_freqs.weight' must hold",)),
    "integers": (lambda f, t: t.update({"output_norm.weight": (26, (32,), bytes(128))}), ("type I32 is not read",)),
    "three sizes": (tensor("blk.0.attn_k.weight", 1, (2, 8, 32)), ("attn_k", "shape must be (16, 32)")),
}  # fmt: skip


def split(folder, change=lambda i, fields, tensors: None, first=0):
    """llama.gguf in three files; of those ``first`` of the tensors are in the first one."""
    fields, tensors = parts_of(FIXTURES / "llama.gguf")
    own, folder = list(tensors), Path(folder)
    cuts = [own[:first], own[first:7], own[7:]]
    folder.mkdir()
    for i, names in enumerate(cuts):
        held, numbers = {name: tensors[name] for name in names}, dict(fields) if i == 0 else {}
        numbers |= {"split.no": i, "split.count": 3, "split.tensors.count": len(tensors)}
        change(i, numbers, held)
        gguf_file(folder / f"llama-{i + 1:05}-of-00003.gguf", numbers, held)
    return folder


@pytest.mark.parametrize("first", [0, 4])
def test_models_in_several_files(first, tmp_path):
    folder = split(tmp_path / "parts", first=first)
    expected = lowbit.load(FIXTURES / "llama.gguf")(IDS).logits
    for path in (folder, *sorted(folder.iterdir())):
        assert torch.equal(lowbit.load(path)(IDS).logits, expected)
    with pytest.warns(UserWarning, match="no tokenizer"):
        lowbit.convert_folder(folder / "llama-00002-of-00003.gguf", tmp_path / "packed")
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, expected)
    (folder / "llama-00002-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"llama-00002-of-00003.gguf does not exist: .*one of 3"):
        lowbit.load(folder / "llama-00003-of-00003.gguf")
    refused(folder, "must have one GGUF file", "llama-00003-of-00003.gguf", target="../never")


def in_second(change):
    return lambda i, fields, tensors: change(fields, tensors) if i == 1 else None


SPLITS = {
    "another place": (in_second(lambda f, t: f.update({"split.no": 2})), ("'split.no' must be 1", "got 2")),
    "no place": (in_second(lambda f, t: f.pop("split.no")), ("'split.no' must be 1", "got None")),
    "another count": (in_second(lambda f, t: f.update({"split.count": 4})), ("'split.count' must be 3", "got 4")),
    "a tensor less": (in_second(lambda f, t: t.pop(list(t)[1])), ("'split.tensors.count' must be", "00001-of")),
    "a tensor of another": (in_second(lambda f, t: t.update({"output_norm.weight": t.popitem()[1]})), ("is also in",)),
    "another field": (in_second(lambda f, t: f.update({"llama.block_count": 2})), ("'llama.block_count' must be as",)),
    "a tensor that is wrong": (in_second(lambda f, t: t.update({t.popitem()[0]: (F32, (3,), bytes(12))})), ("shape",)),
}  # fmt: skip


@pytest.mark.parametrize("what", SPLITS)
def test_files_that_are_not_the_parts_of_one(what, tmp_path):
    change, words = SPLITS[what]
    folder = split(tmp_path / "parts", change, first=3)
    refused(folder, *words, *(() if "tensor less" in what else ("00002-of-00003.gguf",)), target="../never")


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_refused(what, tmp_path):
    change, words = CHANGES[what]
    fields, tensors = parts_of(FIXTURES / "llama.gguf")
    change(fields, tensors)
    gguf_file(tmp_path / "x.gguf", fields, tensors)
    refused(tmp_path / "x.gguf", str(tmp_path / "x.gguf"), *words)


def test_types_that_are_not_read(tmp_path):
    wide_llama(tmp_path / "x.gguf", MIXED)
    content, kinds = GgufFile(tmp_path / "x.gguf"), {"F32": F32, "F16": F16, **KINDS}
    tensors = {n: (kinds[t.type], t.shape, content.read(n).numpy().tobytes()) for n, t in content.tensors.items()}
    tensors[UP] = (IQ2_XXS, (256, 256), bytes(256 * 66))
    gguf_file(tmp_path / "x.gguf", content.fields, tensors)
    refused(tmp_path / "x.gguf", f"{UP!r}: type IQ2_XXS is not read", "Q4_K")


def header(version=3, tensors=0, fields=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


BROKEN = {
    "empty": (b"", "at least 24 bytes"),
    "no magic": (b"GGML" + header()[4:], "must begin with"),
    "version 1": (header(1), "version must be 2 or 3: got 1"),
    "big-endian": (header(3 << 24), "little-endian"),
    "many fields": (header(fields=2**62), "list of 4611686018427387904 fields needs"),
    "many tensors": (header(tensors=2**62), "list of 4611686018427387904 tensors needs"),
    "a long name": (header(fields=1, rest=struct.pack("<Q", 2**63) + bytes(32)), "the name of field 0 needs"),
    "no text": (header(fields=1, rest=text(b"\xff\xfe") + bytes(32)), "is not valid UTF-8"),
    "no such type": (header(fields=1, rest=text("k") + struct.pack("<I", 13) + bytes(8)), "'k': type must be"),
    "truth of 2": (header(fields=1, rest=text("k") + struct.pack("<IB", 7, 2) + bytes(8)), "must be 0 or 1: got 2"),
    "a long list": (header(fields=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 2**60)), "field 'k' needs"),
    "a list of lists": (header(fields=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(32)), "array of arrays"),
    "twice": (header(fields=2, rest=2 * (text("k") + value_of(1)) + bytes(9)), "'k' occurs twice"),
    "no alignment": (header(fields=1, rest=text("general.alignment") + value_of(3)), "power of two: got 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_containers(what, tmp_path):
    content, words = BROKEN[what]
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", str(tmp_path / "x.gguf"), words)


def test_tensors_that_lie_elsewhere(tmp_path):
    def info(name, sizes, kind, offset):
        return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)

    wrong = {
        "overlap": (info("a", [32], F32, 0) + info("b", [32], F32, 64), "'b': offset must be 128"),
        "gap": (info("a", [32], F32, 0) + info("b", [32], F32, 256), "'b': offset must be 128"),
        "end": (info("a", [32], F32, 0) + info("b", [2**40], F32, 128), "truncated: tensor 'b' ends at byte"),
        "size 0": (info("a", [32, 0], F32, 0) + info("b", [32], F32, 0), "'a': sizes must be at least 1"),
        "half a block": (info("a", [33], Q8_0, 0) + info("b", [32], F32, 0), "'a': sizes must be"),
        "many sizes": (info("a", [1] * 5, F32, 0) + info("b", [32], F32, 32), "'a' must have 1 to 4 sizes: got 5"),
        "twice": (info("a", [32], F32, 0) + info("a", [32], F32, 128), "'a' occurs twice"),
    }
    for rest, words in wrong.values():
        (tmp_path / "x.gguf").write_bytes(header(tensors=2, rest=rest + bytes(2048)))
        with pytest.raises(ValueError, match=r"x\.gguf") as caught:
            GgufFile(tmp_path / "x.gguf")
        assert words in str(caught.value)


def test_damaged_files(tmp_path):
    """Bytes are changed, or cut off: what is read then is refused by name, or has the sizes that it says."""
    whole = (FIXTURES / "types.gguf").read_bytes()
    generator, opened = random.Random(0), 0
    end = max(whole.find(name) for name in (b"BF16", b"F16")) + 60
    for _ in range(250):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(end)] = generator.choice([0, 1, 255, generator.randrange(256)])
        cut = generator.random() < 0.3
        (tmp_path / "x.gguf").write_bytes(content[: generator.randrange(len(content))] if cut else content)
        try:
            found = GgufFile(tmp_path / "x.gguf")
        except ValueError as error:
            assert str(tmp_path / "x.gguf") in str(error)  # noqa: PT017
            continue
        opened += 1
        assert all(found.read(name).numel() == info.nbytes for name, info in found.tensors.items())
    assert 0 < opened < 200


def test_the_package_reads_the_same(tmp_path):
    gguf = pytest.importorskip("gguf")
    for name in ("types", *MODELS):
        mine, theirs = GgufFile(FIXTURES / f"{name}.gguf"), gguf.GGUFReader(FIXTURES / f"{name}.gguf")
        assert list(mine.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            assert mine.tensors[t.name].type == t.tensor_type.name
            assert bytes(mine.read(t.name).numpy().data) == t.data.tobytes()
        fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
        assert mine.fields == pytest.approx(fields) if name == "types" else mine.fields == fields


@pytest.mark.parametrize("name", MODELS)
def test_names_and_orders_are_transformers_own(name):
    pytest.importorskip("gguf")
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    from lowbit.integrations.gguf_names import change_of, name_in_model

    content = GgufFile(FIXTURES / f"{name}.gguf")
    model, architecture = lowbit.load(FIXTURES / f"{name}.gguf"), content.fields["general.architecture"]
    processor = loading.TENSOR_PROCESSORS.get(architecture, loading.TensorProcessor)(config=model.config.to_dict())
    config = lowbit.dequantize(model)
    theirs = loading.get_gguf_hf_weights_map(config, processor, model_type=architecture)
    for tensor, info in content.tensors.items():
        if tensor == "output.weight" or tensor.startswith("rope_f"):
            continue
        assert name_in_model(name.replace("gemma3", "gemma3_text"), tensor) == theirs.get(
            tensor, theirs.get(tensor.removesuffix(".weight")))  # fmt: skip
        if "exps" in tensor or "shexp" in tensor:
            continue
        change, values = change_of(architecture, model.config, tensor), torch.rand(info.shape)
        mine = values if change.order is None else values[change.order]
        mine = (mine.t() if change.transposed else mine) - change.offset
        assert torch.equal(mine, torch.from_numpy(processor.process(values.numpy(), name=tensor).weights.copy()))


def test_a_file_goes_into_no_model():
    with pytest.raises(ValueError, match="Call lowbit.load"):
        lowbit.load(FIXTURES / "llama.gguf", torch.nn.Linear(2, 2))
    assert foreign.declared(FIXTURES / "llama.gguf").format == "gguf"
    assert foreign.declared(FIXTURES / "none.gguf") is None
