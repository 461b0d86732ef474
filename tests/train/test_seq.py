"""SEQ: half-integer levels and ternary ones, its gradient by the formula in float64, and no bit lost."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import train
from lowbit.testing.tiny import IDS, LLAMA

K, N = 100, 37


def spec_of(bits=2, granularity="row", ternary=False, **others):
    if granularity == "group":
        others.setdefault("group_size", 32)
    if bits > 4:
        others.setdefault("zeros", "float")
    return lowbit.Packed(bits=bits, granularity=granularity, symmetric=ternary, **others)


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(K, 48), nn.GELU(), nn.Linear(48, N, bias=False))


def steps(model, *inputs):
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 1e-2))
    for _ in range(2):
        y = model(*inputs)
        optimizer.zero_grad()
        (y if isinstance(y, torch.Tensor) else y[0]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize(("bits", "ternary"), [(2, False), (2, True), (3, False), (4, False), (8, False)])
def test_convert_keeps_every_bit(bits, ternary, granularity, activations):
    spec = spec_of(bits, granularity, ternary, activations=activations)
    model, x = train.prepare(plain(), spec, train.SEQ()), torch.randn(3, 5, K)
    steps(model, x)
    for inputs in (x, x[:1, 0]):
        packed = lowbit.convert(copy.deepcopy(model))
        assert torch.equal(packed(inputs), model(inputs))
    scale = packed[0].scales.detach().float()
    zeros = packed[0].zeros
    assert (zeros is None) == ternary and (ternary or set(zeros.flatten().tolist()) == {2 ** (bits - 1) - 0.5})
    first = packed[0].dequantize()[:, :32] / (scale if granularity == "tensor" else scale[:, :1])
    end = 1.0 if ternary else 2 ** (bits - 1) - 0.5
    wanted = torch.arange(-end, end + 1)
    assert float((first.flatten()[:, None] - wanted).abs().amin(1).max()) < 1e-4
    assert bits > 3 or len(first.round(decimals=2).unique()) == len(wanted)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize(("bits", "ternary"), [(2, False), (2, True), (4, False)])
def test_gradients(bits, ternary, granularity):
    torch.manual_seed(1)
    layer = train.prepare(nn.Linear(K, N), spec_of(bits, granularity, ternary, scale_dtype=torch.float32), train.SEQ())
    learned = layer.fake_quant.learned
    w = layer.weight.detach()
    groups = [w] if granularity == "tensor" else w.split(32 if granularity == "group" else K, 1)
    starts = [part.abs().amax() if granularity == "tensor" else part.abs().amax(1) for part in groups]
    assert torch.equal(learned, torch.stack(starts, -1).reshape(learned.shape))
    learned.data *= 0.6  # some weights are beyond it
    x, d = torch.randn(6, K, requires_grad=True), torch.randn(6, N)
    layer(x).backward(d)
    d_q, d_w = (d.double().t() @ x.detach().double()), torch.zeros(N, K).double()
    expected = torch.zeros(learned.shape).double()
    steps, shift = (1.5, 0.0) if ternary else (2.0 ** (bits - 1), 0.5)
    top = (steps - shift) / steps if not ternary else 1 / 1.5
    for n in range(N):
        for k in range(K):
            where = (0, 0) if granularity == "tensor" else (n, k // 32 if granularity == "group" else 0)
            u = float(w[n, k].double() / learned[where].detach().double())
            if abs(u) <= 0.99:
                d_w[n, k] = d_q[n, k]
                expected[where] += d_q[n, k] * ((round(u * steps - shift) + shift) / steps - u)
            else:
                expected[where] += d_q[n, k] * (top if u > 0 else -top)
    expected /= (N * K * (2 ** (bits - 1) - 1)) ** 0.5
    torch.testing.assert_close(layer.weight.grad.double(), d_w, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(learned.grad.double(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(x.grad, d @ layer.dequantize(), rtol=2e-5, atol=2e-5)


def test_a_model_with_a_tied_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model = train.prepare(model, spec_of(activations="int8"), train.SEQ())
    steps(model, IDS)
    with torch.no_grad():
        before = model.eval()(IDS).logits
        packed = lowbit.convert(model)
        assert torch.equal(packed(IDS).logits, before)
        lowbit.save(packed, tmp_path / "small")
        assert torch.equal(lowbit.load(tmp_path / "small")(IDS).logits, before)
    assert packed.lm_head.packed is packed.model.embed_tokens.packed


def test_checkpointing_autocast_and_compilation(compiler):
    model, x = train.prepare(plain(), spec_of(), train.SEQ()), torch.randn(6, K)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for run in (lambda x: checkpoint(model, x, use_reentrant=False),
                torch.compile(model, fullgraph=True, backend="aot_eager")):  # fmt: skip
        model.zero_grad()
        y = run(x)
        assert torch.equal(y, model(x))
        y.sum().backward()
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, e)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, lowbit.convert(copy.deepcopy(model))(x))
        y.float().sum().backward()


def test_which_spec_it_needs():
    for spec, message in (
        (spec_of(3, ternary=True), r"0: SEQ has levels at half-integers, Packed\(symmetric=False, zeros=.float.\), or"),
        (spec_of(8, zeros="int"), r"0: the zeros of SEQ are half-integers: .*zeros='float'\) is required, got Packed"),
    ):
        with pytest.raises(ValueError, match=message):
            train.prepare(plain(), spec, train.SEQ())
    with pytest.raises(ValueError, match=r"symmetric=True\) is required"):
        train.prepare(plain(), spec_of(), train.LSQ())
