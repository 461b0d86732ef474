"""``resize_token_embeddings`` of packed models: kept rows stay bit for bit, new ones are transformers' own, packed."""

import copy

import pytest
import torch

import lowbit
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import (  # noqa: E402
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

OLD = 50
IDS = torch.arange(3, 12)[None]
SPEC = lowbit.Packed(bits=4, group_size=16)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=OLD)
BART = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=OLD, max_position_embeddings=32,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=0)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=OLD)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, vocab_size=OLD, bos_token_id=1)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(name="llama", spec=SPEC):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for tensor in model.parameters():
        tensor.data += 0.05 * torch.randn_like(tensor)
    return lowbit.convert(model, spec, skip=["*.relative_attention_bias"] if name == "t5" else [])


def resize(model, *args, **kwargs):
    torch.manual_seed(1)
    return model.resize_token_embeddings(*args, **kwargs)


def run(model):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs)[0]


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


def canonical(layer):
    return {name: tensor.clone() for name, tensor in layer.canonical().items()}


@pytest.mark.parametrize("new", [OLD, 64, 40, 51])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_has_the_new_size(name, new, tmp_path):
    model = make(name)
    before = [canonical(end) for end in ends(model)]
    logits, tied = run(model), ends(model)[0].packed is ends(model)[1].packed
    assert resize(model, new) is model.get_input_embeddings()
    for end, old in zip(ends(model), before, strict=True):
        assert end.format.out_features == new == len(end.weight)
        kept = min(new, OLD)
        for tensor, value in canonical(end).items():
            assert torch.equal(value[:kept], old[tensor][:kept]), tensor
    assert model.config.vocab_size == new
    assert (ends(model)[0].packed is ends(model)[1].packed) == tied
    torch.testing.assert_close(run(model)[..., :40], logits[..., :40])
    assert run(model).shape[-1] == new
    if name == "bert":
        assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
        assert model.cls.predictions.bias.requires_grad
        assert len(model.cls.predictions.bias) == new
    model.save_pretrained(tmp_path)
    for other in (type(model).from_pretrained(tmp_path), lowbit.load(tmp_path)):
        assert torch.equal(run(other), run(model))
        assert (ends(other)[0].packed is ends(other)[1].packed) == tied
    if name != "bert":
        options = dict(max_new_tokens=3, do_sample=False)
        assert torch.equal(other.generate(IDS, **options), model.generate(IDS, **options))
    resize(model, OLD)  # and back
    assert len(ends(model)[0].weight) == len(ends(model)[1].weight) == OLD


FORMATS = [
    lowbit.Packed(bits=4, group_size=16),
    lowbit.Packed(bits=3, granularity="row", symmetric=True),
    lowbit.Packed(bits=5, group_size=20, zeros="float", outliers=0.02),
    lowbit.Packed(bits=4, granularity="row", activations="int8"),
    lowbit.Codebook(bits=3),
    lowbit.Codebook(bits=2, group_size=16, outliers=0.02),
    lowbit.Codebook(table="nf4", group_size=16),
    lowbit.Codebook(bits=4, scales=True, granularity="row", group_size=16),
]
# the relative error that a format may have on new rows, which are nearly constant or normal
ERRORS = {2: 0.7, 3: 0.3, 4: 0.15, 5: 0.1, 8: 0.02}


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("new", [43, 60])
@pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.describe())
def test_formats(spec, new, mean_resizing):
    model = make(spec=spec)
    twin = lowbit.dequantize(copy.deepcopy(model))
    before, weights = [canonical(end) for end in ends(model)], [end.weight.detach().clone() for end in ends(twin)]
    for each in (model, twin):
        resize(each, new, mean_resizing=mean_resizing)
    kept = min(new, OLD)
    for end, old, weight, plain in zip(ends(model), before, weights, ends(twin), strict=True):
        found = end.dequantize()
        assert torch.equal(found[:kept], weight[:kept])
        assert torch.equal(end.canonical()["packed"][:kept], old["packed"][:kept])
        if new > OLD:
            rows = plain.weight[OLD:].detach()
            assert float((found[OLD:] - rows).norm() / rows.norm()) < ERRORS[end.format.bits]
        assert end.format.describe().split(",")[0] == spec.describe().split(",")[0]
    if spec.activations == "float":
        torch.testing.assert_close(run(model)[..., :40], run(twin)[..., :40], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_new_rows_are_quantized_as_convert_would(bits):
    spec = lowbit.Packed(bits=bits, group_size=16, quantizer="minmax")
    model = make(spec=spec)
    twin = lowbit.dequantize(copy.deepcopy(model))
    for each in (model, twin):
        resize(each, 60, mean_resizing=False)
    for end, plain in zip(ends(model), ends(twin), strict=True):
        expected = spec.quantize(plain.weight[OLD:].detach()).tensors()
        for name, tensor in end.canonical().items():
            assert torch.equal(tensor[OLD:], expected[name]), name


def test_padding_to_a_multiple():
    model = make("llama-tied")
    assert len(resize(model, None).weight) == OLD
    assert len(resize(model, pad_to_multiple_of=64).weight) == 64
    assert len(resize(model, 70, pad_to_multiple_of=16).weight) == 80
    assert run(model).shape[-1] == 80
    with pytest.raises(ValueError, match="not and integer"):
        resize(model, 70, pad_to_multiple_of=1.5)


def test_padding_idx_beyond_the_end():
    model = make("llama")
    model.model.embed_tokens.padding_idx = 49
    assert resize(model, 40).padding_idx is None
    assert make("llama").model.embed_tokens.padding_idx == resize(make("llama"), 40).padding_idx == 0


PER_TENSOR = [lowbit.Packed(bits=8, granularity="tensor"), lowbit.Codebook(bits=4, granularity="tensor")]


@pytest.mark.parametrize("spec", PER_TENSOR, ids=lambda spec: spec.describe())
def test_one_scale_per_tensor_can_be_cut(spec):
    model = make("llama-tied", spec)
    weight = model.lm_head.dequantize()
    resize(model, 40)
    assert torch.equal(model.lm_head.dequantize(), weight[:40])
    assert model.lm_head.packed is model.model.embed_tokens.packed


FLOAT = [(lowbit.Kronecker(), 40), (lowbit.Kronecker(), 60), *[(spec, 60) for spec in PER_TENSOR]]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(("spec", "new"), FLOAT, ids=lambda value: getattr(value, "describe", lambda: None)())
def test_a_form_that_has_no_rows_becomes_float(name, spec, new, tmp_path):
    model = make(name, spec)
    weights = [end.dequantize() for end in ends(model)]
    with pytest.warns(UserWarning, match=r"model\.embed_tokens: .* it is a float layer now"):
        resize(model, new)
    for end, weight in zip(ends(model), weights, strict=True):
        assert torch.equal(end.weight[:40], weight[:40])
        assert len(end.weight) == new
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "llama-tied")
    assert len(layers(model)) == 7
    model.save_pretrained(tmp_path)
    other = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(run(other), run(model))
    lowbit.convert(model, {"*": lowbit.Packed(bits=8)})
    assert len(layers(model)) == 9


def test_one_end_packed():
    for skip in ("lm_head", "model.embed_tokens"):
        torch.manual_seed(0)
        model = lowbit.convert(MODELS["llama"]().eval(), SPEC, skip=[skip])
        resize(model, 60)
        assert [len(end.weight) for end in ends(model)] == [60, 60]
        assert run(model).shape[-1] == 60


def test_what_is_trained_stays_so():
    model = make("llama", lowbit.Codebook(bits=3))
    lowbit.nn.layer.make_trainable(model.lm_head, "codebook")
    resize(model, 60)
    assert model.lm_head.trained() == ["codebook"]
    assert model.lm_head.codebook.requires_grad
    assert model.lm_head.codebook.shape[0] == 60


def test_float_models_are_resized_as_before():
    torch.manual_seed(0)
    model = MODELS["llama-tied"]()
    resize(model, 60)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.lm_head.weight) == 60
