"""``lowbit.export(..., format="gguf")``: what is read back is the same model, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.checkpoint.importers.gguf.container import GgufFile
from lowbit.checkpoint.importers.gguf.types import format_of, weight_of
from lowbit.cli.command import main
from lowbit.nn.layer import layer_class, layers
from lowbit.testing.packed_cases import random_weight

transformers = pytest.importorskip("transformers", minversion="5.0")

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "gguf"
MODELS = sorted(name[7:] for name in load_file(FIXTURES / "expected.safetensors") if name.startswith("logits."))
IDS = torch.arange(12)[None] * 7 % 32
UP = "model.layers.0.mlp.up_proj"


def weights(model):
    return {name: layer.dequantize(torch.float32) for name, layer in layers(model).items()}


def same(first, second):
    mine, theirs = weights(first), weights(second)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_is_written(name, tmp_path):
    """Tensors and fields of llama.cpp's own files come back: names, orders, offsets, experts, ties, positions."""
    source = FIXTURES / f"{name}.gguf"
    model = lowbit.load(source)
    lowbit.export(model, tmp_path / "x.gguf", format="gguf")
    again = lowbit.load(tmp_path / "x.gguf")
    assert same(again, model) and torch.equal(again(IDS).logits, model(IDS).logits)
    theirs, mine = GgufFile(source), GgufFile(tmp_path / "x.gguf")
    assert theirs.tensors.keys() == mine.tensors.keys()
    for tensor, info in theirs.tensors.items():
        found = mine.read(tensor).flatten()
        if tensor == "rope_freqs.weight":
            assert torch.allclose(found.view(torch.float32), theirs.read(tensor).flatten().view(torch.float32))
        else:
            assert mine.tensors[tensor].type == info.type and torch.equal(found, theirs.read(tensor).flatten())


def llama(**config):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=2, vocab_size=64)  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config})).eval()


SPECS = {
    "Q4_0": lowbit.Packed(bits=4, group_size=32, symmetric=True),
    "Q4_0 of 2 bits": lowbit.Packed(bits=2, group_size=32, zeros="int"),
    "Q4_0 by row": lowbit.Packed(bits=3, granularity="row", symmetric=True, scale_dtype=torch.float16),
    "Q5_0 of 4 bits": lowbit.Packed(bits=4, group_size=64, zeros="int"),
    "Q5_0": lowbit.Packed(bits=5, group_size=32, symmetric=True),
    "Q8_0 of 6 bits": lowbit.Packed(bits=6, group_size=32, zeros="int"),
    "Q8_0": lowbit.Packed(bits=8, group_size=32, symmetric=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_types(name, tmp_path):
    model = lowbit.convert(llama(tie_word_embeddings=name == "Q4_0"), SPECS[name])
    lowbit.export(model, tmp_path / "x.gguf", format="gguf")
    again, content = lowbit.load(tmp_path / "x.gguf"), GgufFile(tmp_path / "x.gguf")
    assert same(again, model)
    types = {info.type for info in content.tensors.values() if len(info.shape) == 2}
    assert types <= {name.split()[0], "Q4_0"}
    gguf = pytest.importorskip("gguf")
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(found, weights(model)[UP])


@pytest.mark.parametrize("name", ["Mixtral", "Mistral"])
def test_what_llama_cpp_calls_llama(name, tmp_path):
    """Without a head_dim of its own in the config; read as a Llama where it has no experts."""
    torch.manual_seed(0)
    own = dict(num_local_experts=2, num_experts_per_tok=1) if name == "Mixtral" else dict(sliding_window=None)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, **own,
    )  # fmt: skip
    model = lowbit.convert(getattr(transformers, f"{name}ForCausalLM")(config).eval(), SPECS["Q8_0"])
    lowbit.export(model, tmp_path / "x.gguf", format="gguf")
    again = lowbit.load(tmp_path / "x.gguf")
    assert type(again).__name__ == ("LlamaForCausalLM" if name == "Mistral" else "MixtralForCausalLM")
    assert same(again, model) and torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-6)
    if name == "Mistral":
        model.config.sliding_window = 16
        with pytest.raises(ValueError, match="sliding_window"):
            lowbit.export(model, tmp_path / "y.gguf", format="gguf")


def test_every_type_that_can_be_written(tmp_path):
    """The blocks of the fixture are the ones that are written again."""
    from lowbit.checkpoint.exporters.gguf import encoded

    content = GgufFile(FIXTURES / "types.gguf")
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"):
        weight = weight_of(name, content.read(name))
        found = encoded(layer_class(weight.family, "linear").from_weight(weight))
        assert found[0] == name and torch.equal(found[1], content.read(name))
    for name in ("Q2_K", "Q3_K"):
        why = encoded(lowbit.PackedLinear.from_weight(weight_of(name, content.read(name))))
        assert "as Q4_K, Q5_K or Q6_K have them" in why
    weight = weight_of("Q4_1", content.read("Q4_1"))
    floats = dict(minimum=False, scales=weight.scales.float())
    odd = replace(weight, zeros=torch.full_like(weight.zeros, 0.3).float(), **floats)
    assert "not exact in Q4_1" in encoded(lowbit.PackedLinear.from_weight(odd))
    whole = replace(weight, zeros=torch.full_like(weight.zeros, 4.0).float(), **floats)
    plain = lowbit.PackedLinear.from_weight(whole)  # nothing is rounded
    name, blocks = encoded(plain)
    again = lowbit.PackedLinear.from_weight(weight_of("Q4_1", blocks))
    assert name == "Q4_1" and torch.equal(again.dequantize(torch.float32), plain.dequantize(torch.float32))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_minima_and_scales_of_two_levels(name, tmp_path):
    """Of a tied embedding and of rows in llama.cpp's order, through a file; as the package gguf reads them."""
    model = lowbit.convert(llama(hidden_size=256, intermediate_size=256, tie_word_embeddings=True), SPECS["Q4_0"])
    for seed, layer in enumerate(layers(model).values()):
        if layer is model.lm_head:
            continue
        made = random_weight(format_of(name, *layer.dequantize().shape), seed)
        held = dict(packed=made.packed, scales=made.scales, zeros=made.zeros, scale_factors=made.scale_factors,
                    zero_factors=made.zero_factors)  # fmt: skip
        layer.become(made.format, {leaf: tensor for leaf, tensor in held.items() if tensor is not None})
    model.lm_head = lowbit.PackedLinear(model.model.embed_tokens.format)
    model.lm_head.share_weight(model.model.embed_tokens)
    lowbit.export(model, tmp_path / "x.gguf", format="gguf")
    content, again = GgufFile(tmp_path / "x.gguf"), lowbit.load(tmp_path / "x.gguf")
    assert {info.type for info in content.tensors.values() if len(info.shape) == 2} == {name}
    assert same(again, model) and torch.equal(again(IDS).logits, model(IDS).logits)
    gguf = pytest.importorskip("gguf")
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(theirs, weights(model)[UP])


def test_floats_beside_them_and_a_tokenizer(tmp_path):
    """Layers that are skipped are floats in the file; the tokenizer is another file's."""
    model = lowbit.convert(llama().bfloat16(), {"*_proj": SPECS["Q4_0"]})
    with pytest.raises(ValueError, match="has no tokenizer|must be the path"):
        lowbit.export(model, tmp_path / "x.gguf", format="gguf", tokenizer=tmp_path)
    lowbit.export(model, tmp_path / "x.gguf", format="gguf", skip=["*.q_proj"], tokenizer=FIXTURES / "llama.gguf")
    content = GgufFile(tmp_path / "x.gguf")
    assert content.fields["tokenizer.ggml.model"] == "no_vocab"
    assert content.tensors["blk.0.attn_q.weight"].type == content.tensors["output.weight"].type == "BF16"
    again = lowbit.load(tmp_path / "x.gguf")
    query = "model.layers.0.self_attn.q_proj"
    assert torch.equal(again.get_submodule(query).weight, model.get_submodule(query).dequantize().float())
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())


REFUSED = {
    "groups": (llama, lowbit.Packed(bits=4, group_size=48, symmetric=True), "multiples of 32: got K=64, group_size=48"),
    "float zeros": (llama, lowbit.Packed(bits=4, group_size=32, zeros="float"), "not exact in Q4_1"),
    "wide scales": (llama, lowbit.Packed(bits=4, granularity="row", symmetric=True, scale_dtype=torch.float32),
                    "values of float16"),
    "8 bits with zeros": (llama, lowbit.Packed(bits=8, group_size=32, zeros="int"), "must be in [-128, 127]"),
    "k-means": (llama, lowbit.Codebook(bits=4), "4-bit table of GGUF"),
    "nf4": (llama, lowbit.Codebook(table="nf4", group_size=64), "IQ4_NL or of MXFP4"),
    "Kronecker": (llama, lowbit.Kronecker(), "families 'packed' or 'codebook'"),
    "an activation": (lambda: llama(hidden_act="relu"), SPECS["Q4_0"], "config.hidden_act='relu' cannot be said"),
    "a rotation": (lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
                   SPECS["Q4_0"], "config.rope_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written(what, tmp_path):
    make, spec, words = REFUSED[what]
    model = lowbit.convert(make(), {"*_proj": spec})
    with pytest.raises(ValueError) as caught:
        lowbit.export(model, tmp_path / "x.gguf", format="gguf")
    assert words in str(caught.value) and list(tmp_path.iterdir()) == []


def test_columns_in_another_order(tmp_path):
    model = lowbit.convert(llama(), {"*.up_proj": SPECS["Q4_0"]})
    layer = model.model.layers[0].mlp.up_proj
    order = torch.arange(layer.in_features, dtype=torch.int32).flip(0)
    layer.become(replace(layer.format, act_order=True), {**layer.canonical(), "order": order})
    with pytest.raises(ValueError, match=r"up_proj: must have its columns in the order of x: it has act-order"):
        lowbit.export(model, tmp_path / "x.gguf", format="gguf")


def test_models_of_other_types(tmp_path):
    config = transformers.OPTConfig(hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
                                    vocab_size=32, word_embed_proj_dim=64)  # fmt: skip
    model = lowbit.convert(transformers.OPTForCausalLM(config), {"*.fc1": SPECS["Q4_0"]})
    with pytest.raises(ValueError, match="it is 'opt'"):
        lowbit.export(model, tmp_path / "x.gguf", format="gguf")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(FileExistsError):
        lowbit.export(lowbit.convert(llama(), SPECS["Q4_0"]), tmp_path / "x.gguf", format="gguf")


def test_the_command(tmp_path):
    lowbit.save(lowbit.convert(llama(), {"*_proj": SPECS["Q8_0"]}), tmp_path / "packed")
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "x.gguf"), "--format", "gguf"]) == 0
    assert same(lowbit.load(tmp_path / "x.gguf"), lowbit.load(tmp_path / "packed"))
