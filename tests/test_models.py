"""Real trained models, converted: what accuracy they keep. Skipped where the sample data is absent."""

import copy
import math

import lowbit
import pytest
import torch
import torch.nn.functional as F
from lowbit import Packed
from lowbit.layer import layers
from shared_data import folder, script, tiny_stories


@pytest.fixture(scope="module")
def stories260k():
    """(model, token ids of the stories): a trained Llama, FFN width 172, tied head."""
    transformers = pytest.importorskip("transformers")
    path = folder("stories260k")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return model, [torch.tensor([tokenizer(story).input_ids[:512]]) for story in tiny_stories()]


def perplexity(model, stories) -> float:
    loss, count = 0.0, 0
    with torch.inference_mode():
        for ids in stories:
            logits = model(ids).logits
            loss += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(loss / count)


def test_a_trained_llama_at_8_bits_keeps_its_perplexity(stories260k):
    model, stories = stories260k
    exact = perplexity(model, stories)
    assert exact == pytest.approx(4.45214, abs=1e-4)
    packed = lowbit.convert(copy.deepcopy(model), Packed(bits=8))
    assert packed.lm_head.packed is packed.model.embed_tokens.packed
    assert perplexity(packed, stories) == pytest.approx(exact, rel=1e-3)


def test_a_trained_llama_with_int8_activations(stories260k):
    model, stories = stories260k
    stories = stories[:60]
    packed = lowbit.convert(copy.deepcopy(model), Packed(bits=8, activations="int8"))
    assert perplexity(packed, stories) == pytest.approx(perplexity(model, stories), rel=5e-3)


def test_a_trained_llama_at_4_bits_equals_its_own_dequantization(stories260k):
    """K = 172 in groups of 32: the last group is shorter."""
    model, stories = stories260k
    packed = lowbit.convert(copy.deepcopy(model), Packed(bits=4, group_size=32))
    assert packed.model.layers[0].mlp.down_proj.format.groups == 6
    dense = lowbit.dequantize(copy.deepcopy(packed))
    assert not layers(dense)
    subset = stories[:60]
    assert perplexity(packed, subset) == pytest.approx(perplexity(dense, subset), rel=1e-5)


def test_calibrated_rounding_earns_its_place(stories260k):
    model, stories = stories260k
    calibration, held_out = stories[:32], stories[32:72]

    def at_3_bits(quantizer):
        spec = Packed(bits=3, group_size=32, quantizer=quantizer)
        return perplexity(lowbit.convert(copy.deepcopy(model), spec, calibration=calibration), held_out)

    plain, calibrated = at_3_bits("minmax"), at_3_bits("gptq")
    assert calibrated < 0.85 * plain, (calibrated, plain)


@pytest.mark.parametrize(("bits", "loss"), [(8, 0.0005), (4, 0.005)])
def test_a_plain_module_keeps_its_accuracy(bits, loss):
    vit = script("vit_mnist", "vit")
    model = vit.load(folder("vit_mnist"))
    x, y = vit.images(folder("vit_mnist"))
    x, y = x[:2000], y[:2000]

    def accuracy():
        with torch.inference_mode():
            return float((torch.cat([model(b) for b in x.split(500)]).argmax(-1) == y).float().mean())

    exact = accuracy()
    lowbit.convert(model, Packed(bits=bits, group_size=16))
    assert len(layers(model)) == 26
    assert accuracy() >= exact - loss
