"""Fake-quant layers: what they compute is what the packed layers compute, gradients by their formulas in float64."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import train
from lowbit.backends.reference import quantize_activations
from lowbit.nn.layer import layers
from lowbit.testing.tiny import BERT, GPT2, IDS, LLAMA

K, N = 100, 37  # no multiple of a group, a word or a panel
SCALINGS = [train.Dynamic(), train.LSQ(), train.PACT(), train.MinMax()]
name_of = lambda scaling: type(scaling).__name__  # noqa: E731


def spec_of(bits=4, granularity="row", activations="int8", **others):
    if granularity == "group":
        others.setdefault("group_size", 32)
    return lowbit.Packed(bits=bits, granularity=granularity, symmetric=True, activations=activations, **others)


def plain(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(K, 48), nn.GELU(), nn.Linear(48, N, bias=False)).to(dtype)


def steps(model, *inputs, count=2, **rates):
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 1e-2, **rates))
    for _ in range(count):
        y = model(*inputs)
        loss = (y if isinstance(y, torch.Tensor) else y[0]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("scaling", SCALINGS, ids=name_of)
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_convert_keeps_every_bit(bits, granularity, activations, scaling):
    model, x = train.prepare(plain(), spec_of(bits, granularity, activations), scaling), torch.randn(3, 5, K)
    steps(model, x)
    for inputs in (x, x[:1, 0]):
        before = model(inputs)
        after = lowbit.convert(copy.deepcopy(model))(inputs)
        assert torch.equal(before, after)


@pytest.mark.parametrize("activation_group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_groups_of_x(dtype, activation_group_size):
    spec = spec_of(4, "group", "int8", group_size=32, activation_group_size=activation_group_size)
    model, x = train.prepare(plain(dtype), spec, train.Dynamic()), torch.randn(9, K, dtype=dtype)
    if dtype == torch.bfloat16:  # AdamW's eps is 0 in float16
        steps(model, x)
    assert torch.equal(model(x), lowbit.convert(copy.deepcopy(model))(x))


def test_sums_that_float32_cannot_hold():
    """K * 127 * 127 > 2**24."""
    torch.manual_seed(0)
    model = train.prepare(nn.Sequential(nn.Linear(3000, 33)), spec_of(8), train.Dynamic())
    x = torch.rand(4, 3000) + 0.5
    assert torch.equal(model(x), lowbit.convert(copy.deepcopy(model))(x))


# ------------------------------------------------------------------------------------------------------- gradients


def expected_gradients(weight, learned, x, d, bits, granularity, scaling):
    """By the formulas, weight after weight, in float64."""
    n, weight, d = 2 ** (bits - 1) - 1, weight.double(), d.double()
    shares = {"tensor": torch.zeros_like(weight), "row": torch.arange(N)[:, None].expand(N, K).double(),
              "group": (torch.arange(N)[:, None] * 4 + torch.arange(K)[None] // 32).double()}[granularity]  # fmt: skip
    q, inverse = quantize_activations(x, None)
    d_q = d.t() @ (q.double() / inverse.double())
    d_w, d_learned = torch.zeros_like(weight), []
    for share in shares.unique():
        mine = shares == share
        w, g = weight[mine], d_q[mine]
        mean = w.abs().mean()
        alpha = w.abs().max() if learned is None else learned.double().flatten()[len(d_learned)]
        if name_of(scaling) == "Dynamic":
            alpha = alpha * mean
        u = w / alpha
        inside = u.abs() <= 1
        d_w[mine] = torch.where(inside, g, 0.0) if name_of(scaling) != "MinMax" else g
        beyond = (g * w.sign())[~inside].sum()
        within = (g * ((u * n).round() / n - u))[inside].sum()
        d_learned.append({
            "Dynamic": mean * (within + beyond),
            "LSQ": (within + beyond) / (n * mine.sum()).sqrt(),
            "PACT": beyond,
            "MinMax": torch.tensor(0.0),
        }[name_of(scaling)])  # fmt: skip
    return d_w, torch.stack(d_learned)


@pytest.mark.parametrize("scaling", SCALINGS, ids=name_of)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients(bits, granularity, scaling):
    torch.manual_seed(1)
    linear = nn.Linear(K, N)
    layer = train.prepare(linear, spec_of(bits, granularity, scale_dtype=torch.float32), scaling)
    if layer.fake_quant.learned is not None:  # so that some weights are beyond alpha
        layer.fake_quant.learned.data *= 0.6 if bits == 4 else 1.0
    x, d = torch.randn(6, K, requires_grad=True), torch.randn(6, N)
    layer(x).backward(d)
    learned = layer.fake_quant.learned
    d_w, d_learned = expected_gradients(layer.weight.detach(), None if learned is None else learned.detach(),
                                           x.detach(), d, bits, granularity, scaling)  # fmt: skip
    near = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)
    near(layer.weight.grad.double(), d_w)
    if learned is not None:
        near(learned.grad.double().flatten(), d_learned, atol=2e-4)
        assert float(learned.grad.abs().min()) > 0 or name_of(scaling) == "PACT"
    near(x.grad, d @ layer.dequantize())
    near(layer.bias.grad, d.sum(0))


def test_gradients_of_float_x():
    layer = train.prepare(nn.Linear(K, N), spec_of(4, activations="float"), train.MinMax())
    x, d = torch.randn(6, K), torch.randn(6, N)
    layer(x).backward(d)
    torch.testing.assert_close(layer.weight.grad, d.t() @ x, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- models


def tokens(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids)[0]


def check(model, scaling=None, **specs):
    prepared = train.prepare(model, specs.get("specs", spec_of(4)), scaling or train.Dynamic())
    steps(prepared, IDS)
    before = tokens(prepared.eval())
    packed = lowbit.convert(copy.deepcopy(prepared))
    assert layers(packed) and torch.equal(tokens(packed), before)
    return prepared, packed


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    specs = {"*": spec_of(2, "tensor"), "*embed_tokens": spec_of(4)}
    prepared, packed = check(model, specs=specs)
    embedding, head = packed.model.embed_tokens, packed.lm_head
    assert (embedding.packed is head.packed) == tied == (prepared.model.embed_tokens.weight is prepared.lm_head.weight)
    assert "lm_head.fake_quant.learned" not in prepared.state_dict() or not tied
    lowbit.save(packed, tmp_path / "small")
    assert torch.equal(tokens(lowbit.load(tmp_path / "small")), tokens(packed))


def test_gpt2_keeps_its_weights_transposed():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    check(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)))


def test_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    check(transformers.BertModel(transformers.BertConfig(**BERT)), train.LSQ())


def test_scaled_embeddings():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BartConfig(d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                     decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=101,
                                     scale_embedding=True, max_position_embeddings=64)  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    _, packed = check(model, specs={"*": spec_of(4)})
    assert packed.model.shared.output_scale == 8.0 or packed.model.encoder.embed_tokens.output_scale == 8.0


# ------------------------------------------------------------------------------------- loops, checkpoints, mistakes


def test_training_is_resumed_bit_for_bit(tmp_path):
    x = torch.randn(8, K)

    def fresh():
        model = train.prepare(plain(), spec_of(2), train.Dynamic())
        return model, torch.optim.AdamW(train.parameter_groups(model, 1e-2, scales=1e-2))

    def run(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = fresh()
    run(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    run(model, optimizer, 2)
    again, other = fresh()
    state = torch.load(tmp_path / "state")
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    run(again, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_checkpointing_autocast_copies_and_pickles():
    model, x = train.prepare(plain(), spec_of(4), train.Dynamic()), torch.randn(6, K)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.bfloat16())
        assert y.dtype == torch.bfloat16 and torch.equal(y, lowbit.convert(copy.deepcopy(model))(x.bfloat16()))
        y.float().sum().backward()


def test_a_compiled_step(compiler):
    model, x = train.prepare(plain(), spec_of(4), train.Dynamic()), torch.randn(6, K)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, model(x))
    y.square().sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_parameter_groups():
    model = train.prepare(plain(), spec_of(4), train.Dynamic())
    weights, learned = train.parameter_groups(model, 1e-3, weight_decay=0.1)
    assert (weights["lr"], weights["weight_decay"], learned["lr"], learned["weight_decay"]) == (1e-3, 0.1, 1e-2, 0.0)
    assert {id(p) for p in learned["params"]} == {id(m.fake_quant.learned) for m in (model[0], model[2])}
    assert len(weights["params"]) == 3
    assert len(train.parameter_groups(train.prepare(plain(), spec_of(4), train.MinMax()), 1e-3)) == 1
    with pytest.raises(ValueError, match="nothing to train"):
        train.parameter_groups(plain().requires_grad_(False), 1e-3)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (lowbit.Packed(bits=4), r"0: .*symmetric=True\) is required"),
        ({"2": lowbit.Codebook(bits=4)}, "2: .*levels of a Packed: got"),
        (spec_of(4, outliers=0.01), "0: .*no outliers: got outliers=0.01"),
        (spec_of(4, activations="int8_static"), "0: .*choose 'int8'"),
        ({"5": spec_of(4)}, "spec pattern .5.: matches no layer"),
    ],
)
def test_what_is_refused_changes_nothing(specs, message):
    model = plain()
    before = list(model)
    with pytest.raises(ValueError, match=message):
        train.prepare(model, specs, train.Dynamic())
    assert list(model) == before


def test_mistakes():
    with pytest.raises(TypeError, match=r"write Dynamic\(\)"):
        train.prepare(plain(), spec_of(4), train.Dynamic)
    with pytest.raises(ValueError, match="gamma must be greater than 0 and finite: got gamma=-1"):
        train.Dynamic(gamma=-1)
    prepared = train.prepare(plain(), spec_of(4), train.Dynamic())
    with pytest.raises(ValueError, match="trained quantized already"):
        train.prepare(prepared, spec_of(4), train.Dynamic())
    with torch.no_grad():
        prepared[0].weight[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="0: a weight or a scale is NaN"):
        prepared(torch.randn(2, K))
    with pytest.raises(Exception, match="0: a weight or a scale is NaN"):
        lowbit.convert(prepared)


def test_a_row_of_zeros_stays_one():
    linear = nn.Linear(K, N, bias=False)
    with torch.no_grad():
        linear.weight[5] = 0
    layer = train.prepare(linear, spec_of(2), train.Dynamic())
    x = torch.randn(3, K)
    assert torch.equal(layer(x)[:, 5], torch.zeros(3))
    layer(x).sum().backward()
    assert torch.isfinite(layer.weight.grad).all() and torch.isfinite(layer.fake_quant.learned.grad).all()
    assert F.mse_loss(lowbit.convert(layer)(x), layer(x)) == 0


def test_a_refused_end_leaves_packed_layers_in_training():
    packed = lowbit.convert(plain(), {"0": lowbit.Packed(bits=4)})
    model = train.prepare(packed, {"2": spec_of(4)}, train.Dynamic())
    lowbit.make_trainable(model, "scales")
    weight = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[3, 4] = float("nan")
    with pytest.raises(Exception, match="2: a weight or a scale is NaN"):
        lowbit.convert(model)
    assert model[0].trained() == ["scales"]
    model[2].weight.data.copy_(weight)
    model = lowbit.convert(model)
    assert not model[0].trained() and len(layers(model)) == 2
