"""``lowbit.export``: what is written is the same weight, bit for bit, by our own readers and by the projects'."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.cli.command import main
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.0")

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def llama(**config):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=2, vocab_size=64, attention_bias=True)  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config})).eval()


def packed(spec=None, model=None, **arguments):
    spec = spec or lowbit.Packed(bits=4, group_size=32, symmetric=True)
    return lowbit.convert(llama() if model is None else model, {"*_proj": spec}, **arguments)


def act_ordered(model):
    """The same model, its columns in another order: other groups meet them."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers(model).values():
        order = torch.randperm(layer.in_features, generator=generator).int()
        layer.become(dataclasses.replace(layer.format, act_order=True), {**layer.canonical(), "order": order})
    return model


def weights(model):
    return {name: layer.dequantize(torch.float32) for name, layer in layers(model).items()}


SPECS = {
    "4-bit symmetric": lowbit.Packed(bits=4, group_size=32, symmetric=True),
    "4-bit": lowbit.Packed(bits=4, group_size=16, zeros="int"),
    "3-bit by row": lowbit.Packed(bits=3, granularity="row", zeros="int", scale_dtype=torch.float16),
    "8-bit": lowbit.Packed(bits=8, group_size=32),
    "2-bit": lowbit.Packed(bits=2, group_size=32, packed_zeros=True),
    "6-bit": lowbit.Packed(bits=6, group_size=8, packed_zeros=True),
    "5-bit by tensor": lowbit.Packed(bits=5, granularity="tensor", symmetric=True),
}


@pytest.mark.parametrize("order", ["", "act-order"])
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("name", SPECS)
def test_there_and_back(name, format, order, tmp_path):
    if (format == "gptq" and name[0] in "56") or (order and SPECS[name].granularity != "group"):
        return
    model = act_ordered(packed(SPECS[name])) if order else packed(SPECS[name])
    before, logits = weights(model), model(IDS).logits
    lowbit.export(model, tmp_path / "out", format=format)
    again = lowbit.load(tmp_path / "out")
    after = weights(again)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(again(IDS).logits, logits) and torch.equal(model(IDS).logits, logits)
    assert weights(model).keys() == before.keys()  # the model is as it was
    assert model.config.quantization_config.quant_method == "lowbit"


def test_several_forms_and_layers_as_floats(tmp_path):
    spec = {"*_proj": SPECS["4-bit symmetric"], "*mlp*": lowbit.Packed(bits=8, group_size=16, zeros="int"),
            "lm_head": lowbit.Packed(bits=4, group_size=32, zeros="float")}  # fmt: skip
    for format in ("gptq", "compressed-tensors"):
        model = lowbit.convert(llama(), spec)
        lowbit.export(model, tmp_path / format, format=format, skip=["lm_head", "*.k_proj"])
        again, expected = lowbit.load(tmp_path / format), weights(model)
        for name, weight in weights(again).items():
            assert torch.equal(weight, expected.pop(name))
        assert sorted(expected) == ["lm_head", "model.layers.0.self_attn.k_proj"]
        for name, weight in expected.items():
            assert torch.equal(again.get_submodule(name).weight, weight)


@pytest.mark.parametrize("name", ["4-bit symmetric", "8-bit", "3-bit by row"])
def test_compressed_tensors_reads_it(name, tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = packed(SPECS[name])
    lowbit.export(model, tmp_path / "out", format="compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(section).config_groups["group_0"]
    for layer, weight in weights(model).items():
        leaves = {n.removeprefix(f"{layer}."): t for n, t in tensors.items() if n.startswith(f"{layer}.weight_")}
        leaves["weight_scale"] = leaves["weight_scale"].float()
        found = PackedQuantizationCompressor.decompress(leaves, scheme)["weight"]
        assert torch.equal(found.float(), weight)


def test_transformers_loads_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.20")
    model = packed(SPECS["4-bit symmetric"])
    lowbit.export(model, tmp_path / "out", format="compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, model(IDS).logits, atol=1e-5)


def test_float(tmp_path):
    """Any family, tied too; plain transformers reads it."""
    model = lowbit.convert(llama(tie_word_embeddings=True), lowbit.Codebook(bits=3))
    lowbit.export(model, tmp_path / "out", format="float")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.model.embed_tokens) is torch.nn.Embedding and "quantization_config" not in (
        tmp_path / "out" / "config.json").read_text()  # fmt: skip
    for name, weight in weights(model).items():
        assert torch.equal(again.get_submodule(name).weight, weight)
    assert len(layers(model)) == 9


def test_a_transposed_module(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    model = lowbit.convert(transformers.GPT2LMHeadModel(config), {"*.h.*": SPECS["4-bit symmetric"]})
    expected = weights(model)
    for format in ("float", "gptq"):
        lowbit.export(model, tmp_path / format, format=format)
    assert all(torch.equal(expected[n], w) for n, w in weights(lowbit.load(tmp_path / "gptq")).items())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(plain.get_submodule("transformer.h.0.attn.c_attn").weight.t(),
                       expected["transformer.h.0.attn.c_attn"])


REFUSED = {
    "float zeros": (lowbit.Packed(bits=4, group_size=32, zeros="float"), "float zeros"),
    "a codebook": (lowbit.Codebook(bits=4), "family 'packed'"),
    "outliers": (lowbit.Packed(bits=4, group_size=32, symmetric=True, outliers=0.01), "no outliers"),
    "activations": (lowbit.Packed(bits=4, symmetric=True, activations="int8"), "float activations: it has int8"),
    "short groups": (lowbit.Packed(bits=4, group_size=48, symmetric=True), "group_size must divide K"),
}


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_format_cannot_hold(what, format, tmp_path):
    spec, words = REFUSED[what]
    model = packed(spec)
    with pytest.raises(ValueError, match="nothing was written") as caught:
        lowbit.export(model, tmp_path / "out", format=format)
    assert words in str(caught.value) and "model.layers.0.self_attn.q_proj: " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_gptq_alone(tmp_path):
    for spec, words in (
        (lowbit.Packed(bits=5, group_size=32, symmetric=True), "2, 3, 4 or 8 bits: it has 5"),
        (lowbit.Packed(bits=4, granularity="tensor", symmetric=True), "one per tensor"),
        (lowbit.Packed(bits=4, granularity="row", symmetric=True, scale_dtype=torch.float32), "values of float16"),
    ):
        with pytest.raises(ValueError, match=words):
            lowbit.export(packed(spec), tmp_path / "out", format="gptq")
    model = lowbit.convert(llama(tie_word_embeddings=True), SPECS["4-bit symmetric"])
    with pytest.raises(ValueError, match="shares that of") as caught:
        lowbit.export(model, tmp_path / "out", format="gptq")
    assert "model.embed_tokens: must be a linear layer: it is an embedding" in str(caught.value)
    lowbit.export(model, tmp_path / "out", format="gptq", skip=["model.embed_tokens", "lm_head"])
    assert torch.allclose(lowbit.load(tmp_path / "out")(IDS).logits, model(IDS).logits, atol=1e-5)


def test_arguments(tmp_path):
    model = packed()
    for arguments, words in (({"format": "gtpq"}, "did you mean 'gptq'"), ({"format": "gptq", "skip": ["*.nothing"]},
                             "matches no packed layer"), ({"format": "gptq", "skip": "lm_head"}, "list of patterns")):
        with pytest.raises(ValueError, match=words):
            lowbit.export(model, tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match="no packed layer"):
        lowbit.export(llama(), tmp_path / "out", format="float")
    plain = lowbit.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)), SPECS["4-bit symmetric"])
    with pytest.raises(ValueError, match="a model of transformers"):
        lowbit.export(plain, tmp_path / "out", format="gptq")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError):
        lowbit.export(model, tmp_path / "out", format="gptq")


def test_the_command(tmp_path):
    lowbit.save(packed(), tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer_config.json").write_text("{}")
    assert (tmp_path / "packed" / "README.md").is_file()  # ours
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "out"), "--format", "gptq"]) == 0
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and not (tmp_path / "out" / "README.md").exists()
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "two"), "--format", "awq"]) == 2
