"""transformers models: convert, save_pretrained, from_pretrained, lowbit.load. Reloading is bit-equal throughout."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

SPEC = lowbit.Packed(bits=4, group_size=32)
VOCAB = 101  # odd: rows that do not fill a block
T5_BIAS = ["*.relative_attention_bias"]  # K = number of heads, smaller than a group

BERT = BertConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
    max_position_embeddings=64, num_labels=3,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)
BART = BartConfig(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=VOCAB, max_position_embeddings=64, scale_embedding=True,
)  # fmt: skip
T5 = T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0)
OPT = OPTConfig(
    hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
    max_position_embeddings=64, word_embed_proj_dim=64,
)  # fmt: skip
MIXTRAL = MixtralConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, num_local_experts=2,
)  # fmt: skip


def llama(tied):
    return LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, tie_word_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "llama": (LlamaForCausalLM, llama(tied=False)),
    "llama-tied": (LlamaForCausalLM, llama(tied=True)),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "bert": (BertModel, BERT),
    "bert-mlm": (BertForMaskedLM, BERT),
    "bert-classify": (BertForSequenceClassification, BERT),
    "bart": (BartForConditionalGeneration, BART),
    "t5": (T5ForConditionalGeneration, T5),
    "opt": (OPTForCausalLM, OPT),
    "mixtral": (MixtralForCausalLM, MIXTRAL),  # its files hold experts one by one: they do not map one to one
}
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(name, spec=SPEC, skip=(), dtype=None):
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model = cls(copy.deepcopy(config)).eval()
    for tensor in model.parameters():  # biases and norms start at 0 and 1: make every tensor matter
        tensor.data += 0.05 * torch.randn_like(tensor)
    model.tie_weights()
    if dtype is not None:
        model.to(dtype)
        model.config.dtype = dtype
    skip = [*skip, *(T5_BIAS if name == "t5" else [])]
    return model if spec is None else lowbit.convert(model, spec, skip=skip)


def run(model):
    inputs = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs)[0]


def same_bits(model, other):
    state, reloaded = model.state_dict(), other.state_dict()
    assert list(state) == list(reloaded)
    for name in state:
        assert state[name].dtype == reloaded[name].dtype, name
        assert torch.equal(state[name], reloaded[name]), name
    assert torch.equal(run(model), run(other))


@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
@pytest.mark.parametrize("name", MODELS)
def test_reload_is_bit_equal(name, loader, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path) if loader == "from_pretrained" else lowbit.load(tmp_path)
    assert type(other) is type(model)
    assert layers(other, duplicates=True).keys() == layers(model, duplicates=True).keys()
    assert other.dtype == model.dtype == torch.float32
    assert not any(t.requires_grad for layer in layers(other).values() for t in layer.named_tensors().values())
    assert other.lowbit_skipped == model.lowbit_skipped
    same_bits(model, other)
    # and the reloaded model can be saved again
    other.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama-tied", [["model.embed_tokens", "lm_head"]]),
        ("gpt2", [["transformer.wte", "lm_head"]]),
        ("bert-mlm", [["bert.embeddings.word_embeddings", "cls.predictions.decoder"]]),
        ("bart", [["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"]]),
        ("t5", [["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]]),
    ],
)
@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
def test_tied_layers_share_one_storage(name, groups, loader, tmp_path):
    model = make(name)
    lowbit.save(model, tmp_path)
    other = type(model).from_pretrained(tmp_path) if loader == "from_pretrained" else lowbit.load(tmp_path)
    for group in groups:
        for tensor in ("packed", "scales", "zeros"):
            pointers = {other.get_submodule(n).get_buffer(tensor).data_ptr() for n in group}
            assert len(pointers) == 1, (group, tensor)
    if name == "bert-mlm":
        assert other.cls.predictions.bias is other.cls.predictions.decoder.bias
    stored = sum(1 for key in transformers_keys(tmp_path) if key.endswith(".packed"))
    assert stored == len({layer.packed.data_ptr() for layer in layers(model).values()})


def transformers_keys(folder: Path):
    from lowbit.checkpoint.reader import Checkpoint

    return list(Checkpoint.of_folder(folder))


@torch.no_grad()
def test_conv1d_and_linear_that_share_a_square_weight():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear = Conv1D(32, 32), torch.nn.Linear(32, 32)
    torch.nn.init.normal_(conv.weight)
    linear.weight = conv.weight
    weight = conv.weight.detach().clone()
    model = lowbit.convert(torch.nn.ModuleList([conv, linear]), lowbit.Packed(bits=8))
    for layer, expected in ((model[0], weight.t()), (model[1], weight)):
        assert float((layer.dequantize() - expected).norm() / expected.norm()) < 0.01
        x = torch.randn(3, 32)
        assert float((layer(x) - layer.bias - x @ expected.t()).norm() / (x @ expected.t()).norm()) < 0.01


@pytest.mark.parametrize("skip", [["lm_head"], ["model.embed_tokens"]])
@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
def test_half_of_a_tied_pair_packed(skip, loader, tmp_path):
    model = make("llama-tied", skip=skip)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path) if loader == "from_pretrained" else lowbit.load(tmp_path)
    same_bits(model, other)
    other.tie_weights()  # must not tie what is not tied any more
    same_bits(model, other)


@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
def test_sharded(loader, tmp_path):
    model = make("llama-tied")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    other = type(model).from_pretrained(tmp_path) if loader == "from_pretrained" else lowbit.load(tmp_path)
    same_bits(model, other)


@pytest.mark.parametrize(
    "spec",
    [
        lowbit.Packed(bits=3, group_size=20, outliers=0.02),
        lowbit.Packed(bits=2, symmetric=True),
        lowbit.Packed(bits=8, granularity="tensor", activations="int8"),
        lowbit.Packed(bits=4, activations="int8", activation_group_size=32),
        lowbit.Packed(bits=5, group_size=64, zeros="float", scale_dtype=torch.bfloat16),
    ],
    ids=lambda spec: spec.describe(),
)
def test_formats(spec, tmp_path):
    model = make("gpt2", spec)
    model.save_pretrained(tmp_path)
    same_bits(model, GPT2LMHeadModel.from_pretrained(tmp_path))
    same_bits(model, lowbit.load(tmp_path))


def test_static_activation_scales_are_each_layers_own(tmp_path):
    spec = lowbit.Packed(bits=8, granularity="row", activations="int8_static")
    plain = make("gpt2", spec=None)
    model = lowbit.convert(plain, spec, calibration=[IDS])
    model.save_pretrained(tmp_path)
    assert "lm_head.x_scale" in transformers_keys(tmp_path)
    same_bits(model, GPT2LMHeadModel.from_pretrained(tmp_path))
    same_bits(model, lowbit.load(tmp_path))


@pytest.mark.parametrize(
    ("saved", "auto", "attribute"),
    [
        ("llama", AutoModel, "model"),
        ("gpt2", AutoModel, "transformer"),
        ("bert-mlm", AutoModel, "bert"),
        ("opt", AutoModel, "model"),
        ("bart", AutoModel, "model"),
        ("t5", AutoModel, None),
        ("t5", T5EncoderModel, None),
    ],
)
def test_base_model_from_a_head_folder(saved, auto, attribute, tmp_path):
    model = make(saved)
    model.save_pretrained(tmp_path)
    base = auto.from_pretrained(tmp_path)
    inner = model if attribute is None else getattr(model, attribute)
    expected = layers(inner, duplicates=True)
    found = layers(base, duplicates=True)
    assert len(found) >= 10
    if auto is AutoModel:
        assert found.keys() == expected.keys() - {"lm_head"}
    for name, layer in found.items():
        theirs = expected[name].canonical()
        for tensor_name, tensor in layer.canonical().items():
            assert torch.equal(tensor, theirs[tensor_name]), name


def test_head_model_from_a_base_folder(tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inner = layers(other.bert)
    assert inner.keys() == layers(model).keys()
    assert torch.equal(inner["pooler.dense"].packed, model.pooler.dense.packed)
    # a head whose weight is tied to a packed embedding becomes packed with it
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert masked.cls.predictions.decoder.packed is masked.bert.embeddings.word_embeddings.packed


def test_another_architecture_is_refused(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(GPT2)
    config.quantization_config = model.config.quantization_config.to_dict()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layer 'model"):
        GPT2LMHeadModel.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_other_dtype(name, dtype, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert other.dtype == dtype
    for layer_name, layer in layers(other).items():
        kept = name == "t5" and dtype == torch.float16 and layer_name.endswith(".wo")  # transformers keeps it
        assert layer.dtype == (torch.float32 if kept else dtype), layer_name
        theirs = model.get_submodule(layer_name).state_dict()
        for tensor_name in layer.named_tensors():
            assert torch.equal(layer.state_dict()[tensor_name], theirs[tensor_name])
    if dtype == torch.bfloat16:
        assert run(other).dtype == dtype
        assert (run(other).float() - run(model)).norm() < 0.05 * run(model).norm()
        # saved from bf16, it reloads as bf16, bit for bit
        other.save_pretrained(tmp_path / "bf16")
        again = type(model).from_pretrained(tmp_path / "bf16")
        assert again.dtype == dtype
        same_bits(other, again)
        same_bits(other, lowbit.load(tmp_path / "bf16"))


def test_half_and_float_cast_a_packed_model(tmp_path):
    model = make("llama-tied")
    before = {n: t.clone() for layer in layers(model).values() for n, t in layer.named_tensors().items()}
    assert model.half() is model and model.dtype == torch.float16 and run(model).dtype == torch.float16
    assert model.float() is model and model.dtype == torch.float32
    after = {n: t for layer in layers(model).values() for n, t in layer.named_tensors().items()}
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    model.half().save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map, tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    same_bits(model, AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map))


def test_deepcopy_and_pickle(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    other = GPT2LMHeadModel.from_pretrained(tmp_path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(other)):
        same_bits(model, twin)
        assert twin.lm_head.packed is twin.transformer.wte.packed
        twin.save_pretrained(tmp_path / "twin")
        same_bits(model, GPT2LMHeadModel.from_pretrained(tmp_path / "twin"))


@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
def test_save_over_a_folder_of_a_plain_model(loader, tmp_path):
    lowbit.save(lowbit.convert(torch.nn.Sequential(torch.nn.Linear(32, 8)), SPEC), tmp_path)
    model = make("bert")
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path) if loader == "load" else BertModel.from_pretrained(tmp_path)
    same_bits(model, other.eval())
    assert not (tmp_path / "lowbit.json").exists()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "bart"])
def test_generate(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    for other in (type(model).from_pretrained(tmp_path), lowbit.load(tmp_path)):
        options = dict(max_new_tokens=6, do_sample=False)
        assert torch.equal(other.generate(IDS, **options), model.generate(IDS, **options))


def test_convert_while_loading(tmp_path):
    plain = make("gpt2", spec=None)
    plain.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"write Packed\(bits=4\)$"):
        lowbit.integrations.transformers.LowbitConfig(spec=lowbit.Packed)
    config = lowbit.integrations.transformers.LowbitConfig(spec=SPEC, skip=["*.attn"])
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
    same_bits(model, make("gpt2", skip=["*.attn"]))
    model.save_pretrained(tmp_path / "packed")
    same_bits(model, GPT2LMHeadModel.from_pretrained(tmp_path / "packed"))


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm", "t5"])
def test_dequantized_model_is_a_plain_one(name, tmp_path):
    model = make(name)
    before = run(model)
    lowbit.dequantize(model)
    assert not layers(model)
    assert torch.allclose(run(model), before, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    other = type(model).from_pretrained(tmp_path)
    same_bits(model, other)


def test_wrapper_around_a_transformers_model(tmp_path):
    class Pooled(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.project = encoder, torch.nn.Linear(64, 32)

        def forward(self, ids):
            return self.project(self.encoder(ids)[0].mean(1))

    torch.manual_seed(0)
    model = lowbit.convert(Pooled(make("bert", spec=None)), SPEC)
    expected = model(IDS)
    lowbit.save(model, tmp_path / "all")
    other = lowbit.load(tmp_path / "all", Pooled(BertModel(copy.deepcopy(BERT))).eval())
    assert torch.equal(other(IDS), expected)
    model.encoder.save_pretrained(tmp_path / "encoder")
    same_bits(model.encoder, BertModel.from_pretrained(tmp_path / "encoder"))


def test_loaded_model_takes_gradients(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.transformer.ln_f.weight.grad is not None
    assert model.transformer.h[0].attn.c_attn.bias.grad is not None
    assert model.transformer.h[0].attn.c_attn.scales.grad is None


def test_import_order_and_cost():
    code = (
        "import sys, lowbit\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers.quantizers.auto as auto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['lowbit'].__name__ == 'LowbitQuantizer'\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['lowbit'].__name__ == 'LowbitConfig'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
def test_bias_buffer_is_stored_unless_zero(value, loader, tmp_path):
    model = make("bart")
    model.final_logits_bias[0, 3] = value
    model.save_pretrained(tmp_path)
    assert ("final_logits_bias" in transformers_keys(tmp_path)) == bool(value)
    other = type(model).from_pretrained(tmp_path) if loader == "from_pretrained" else lowbit.load(tmp_path)
    same_bits(model, other)
    model.final_logits_bias[0, 3] = 0.5 - value
    model.save_pretrained(tmp_path / "changed")
    assert ("final_logits_bias" in transformers_keys(tmp_path / "changed")) != bool(value)


def test_config_is_compact():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    lowbit.convert(model, lowbit.Packed(bits=4, group_size=64))
    assert len(model.config.to_json_string()) < 60_000


@pytest.mark.turns(3)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_compiles_as_one_graph(name):
    """What models do around the layers (reading `.weight.dtype` in T5) must not break the graph either."""
    torch._dynamo.reset()
    model = make(name)
    model.config.use_cache = False  # filling a cache takes longer to trace than the layers
    inputs = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, **inputs)[0], model(IDS, **inputs)[0], rtol=0, atol=0)
