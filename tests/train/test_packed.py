"""``prepare`` without a quantizer: packed layers with float32 masters, and the same outputs once they are frozen."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import train
from lowbit.nn.layer import layers
from lowbit.testing.tiny import LLAMA

K, N = 100, 37
SPECS = {
    "scales": lowbit.Packed(bits=4, group_size=32),
    "rows": lowbit.Packed(bits=2, granularity="row", symmetric=True, activations="int8"),
    "outliers": lowbit.Packed(bits=3, outliers=0.02),
    "centroids": lowbit.Codebook(bits=3),
    "centroids per tensor": lowbit.Codebook(bits=4, granularity="tensor", outliers=0.02),
    "nf4": lowbit.Codebook(table="nf4", group_size=32),
    "factors": lowbit.Kronecker(),
    "packed factors": lowbit.Kronecker(factors=lowbit.Packed(bits=8, granularity="row")),
}
TRAINED = {
    "scales": {"scales"}, "rows": {"scales"}, "outliers": {"scales", "outlier_values"}, "centroids": {"codebook"},
    "centroids per tensor": {"codebook", "outlier_values"}, "nf4": {"scales"}, "factors": {"a", "b"},
    "packed factors": {"a", "b_scales"},
}  # fmt: skip


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(K, 48), nn.GELU(), nn.Linear(48, N, bias=False))


def steps(model, x, lr=1e-2):
    optimizer = torch.optim.AdamW(train.parameter_groups(model, lr))
    losses = []
    for _ in range(3):
        loss = model(x).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", SPECS)
def test_masters_are_trained_and_no_bit_is_lost(name):
    model, x = plain(), torch.randn(6, K)
    packed = lowbit.convert(copy.deepcopy(model), SPECS[name])
    prepared = train.prepare(model, SPECS[name])
    assert set(prepared[0].trained()) == TRAINED[name]
    assert all(prepared[0].get_parameter(part).dtype == torch.float32 for part in TRAINED[name])
    assert torch.equal(prepared(x), packed(x))
    losses = steps(prepared, x, 1e-5 if name == "packed factors" else 1e-2)  # scales of 8 bits are small
    assert losses[-1] < losses[0]
    for inputs in (x, x[:1]):
        before = prepared(inputs)
        after = lowbit.convert(copy.deepcopy(prepared))
        assert torch.equal(after(inputs), before) and not after[0].trained()
    assert not torch.equal(prepared(x), packed(x))


def test_what_is_trained_is_narrowed():
    model, x = train.prepare(plain(), SPECS["outliers"]), torch.randn(6, K)
    scales = model[0].scales.detach().clone()
    (chosen, *_) = train.trainable(model, "outliers")
    assert chosen is model[0].outlier_values and not model[0].scales.requires_grad
    steps(model, x)
    assert torch.equal(model[0].scales, scales) and model[0].outlier_values.grad is not None
    before = model(x)
    assert torch.equal(lowbit.convert(model)(x), before) and model[0].scales.dtype == torch.float16


def test_specs_patterns_and_calibration_are_those_of_convert():
    x = [torch.randn(4, K) for _ in range(40)]
    spec = {"*": lowbit.Packed(bits=4, quantizer="gptq", group_size=32), "2": None}
    packed = lowbit.convert(plain(), spec, calibration=x)
    prepared = train.prepare(plain(), spec, calibration=x)
    assert torch.equal(prepared(x[0]), packed(x[0])) and isinstance(prepared[2], nn.Linear)
    both = train.prepare(plain(), {"0": SPECS["nf4"], "2": SPECS["centroids"]})
    assert both[0].trained() == ["scales"] and both[2].trained() == ["codebook"]
    one = train.prepare(nn.Linear(K, N), SPECS["scales"], skip=())
    assert one.trained() == ["scales"]


def test_a_tied_head_shares_its_masters():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.arange(3, 12)[None]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model = train.prepare(model, lowbit.Codebook(bits=3))
    embedding, head = model.model.embed_tokens, model.lm_head
    assert embedding.codebook is head.codebook and isinstance(head.codebook, nn.Parameter)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 1e-2))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert torch.equal(lowbit.convert(model)(input_ids=ids).logits, before)
    assert model.lm_head.codebook is model.model.embed_tokens.codebook and len(layers(model)) > 2


@pytest.mark.parametrize("name", ["outliers", "centroids", "factors"])
def test_the_first_nan_stops_with_the_name(name):
    model, x = train.prepare(plain(), SPECS[name]), torch.randn(6, K)
    part = model[2].trained()[-1]
    with torch.no_grad():
        model[2].get_parameter(part).view(-1)[-1] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"^2 \(\w+ \[37, 48\]\): {part} is NaN or infinite: training has"):
        model(x)


def test_what_is_refused_changes_nothing():
    model = plain()
    before = list(model)
    for specs, message in (
        (lowbit.Codebook(table="nf4", scales=False, granularity="tensor"), "no layer would have .*: 0 has .*nf4"),
        ({"7": SPECS["scales"]}, "pattern '7': matches no layer"),
        (lowbit.Packed(bits=4, quantizer="gptq"), "needs calibration data"),
    ):
        with pytest.raises(ValueError, match=message):
            train.prepare(model, specs)
        assert list(model) == before
    with pytest.raises(ValueError, match="calibration and loss are of quantizer=None"):
        train.prepare(model, lowbit.Packed(symmetric=True), train.Dynamic(), calibration=[torch.randn(2, K)])
    with pytest.raises(ValueError, match="already has 2 packed layers"):
        train.prepare(lowbit.convert(model, SPECS["scales"]), SPECS["scales"])
