"""Families of models, in training and after it; masters under checkpointing, autocast and compilation."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowbit
from benchmarks.models import kron_sizes
from lowbit import train
from lowbit.nn.layer import layers
from lowbit.testing.tiny import BERT, GPT2, TOWER
from lowbit.train.fake_quant import FakeQuant

transformers = pytest.importorskip("transformers")

QAT = lowbit.Packed(bits=4, granularity="row", symmetric=True, activations="int8")
IDS = torch.arange(3, 15).view(2, 6)
PREPARED = {
    "fake quant": lambda model: train.prepare(model, QAT, train.Dynamic()),
    "seq": lambda model: train.prepare(model, lowbit.Packed(bits=2, granularity="row"), train.SEQ()),
    "centroids": lambda model: train.prepare(model, lowbit.Codebook(bits=3)),
    "factors": lambda model: train.prepare(model, lowbit.Kronecker()),
}


def made(cls, config, **arguments):
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**arguments)).eval()


def steps(model, loss, count=2):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    for _ in range(count):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def ended(model, call):
    """The model at its end, after it gave the same bits as before."""
    with torch.no_grad():
        before = call(model)
        packed = lowbit.convert(copy.deepcopy(model))
        assert torch.equal(call(packed), before)
    assert layers(packed) and not any(isinstance(m, FakeQuant) or (m in layers(packed).values() and m.trained())
                                      for m in packed.modules())  # fmt: skip
    return packed


@pytest.mark.parametrize("name", PREPARED)
def test_albert_keeps_its_layers_shared(name):
    model = made("AlbertForSequenceClassification", "AlbertConfig", **{**TOWER, "num_hidden_layers": 3}, vocab_size=101,
                 embedding_size=32)  # fmt: skip
    count = len(list(model.modules()))
    model = PREPARED[name](model)
    seen = []
    query = next(module for key, module in model.named_modules() if key.endswith("attention.query"))
    hook = query.register_forward_hook(lambda *_: seen.append(1))
    steps(model, lambda m: m(input_ids=IDS, labels=torch.tensor([0, 1])).loss)
    hook.remove()
    assert len(seen) == 6  # one layer, three times in each of two steps
    packed = ended(model, lambda m: m(input_ids=IDS).logits)
    assert len(list(packed.modules())) == count


@pytest.mark.parametrize("name", PREPARED)
def test_a_module_under_several_names(name):
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = PREPARED[name](nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), shared))
    assert model[0] is model[2] is model[4]
    x = torch.randn(3, 64)
    steps(model, lambda m: m(x).square().mean())
    packed = ended(model, lambda m: m(x))
    assert packed[0] is packed[2] is packed[4] and len(layers(packed)) == 1


@pytest.mark.parametrize("cls", ["Bart", "T5"])
@pytest.mark.parametrize("name", ["fake quant", "centroids"])
def test_an_encoder_and_a_decoder_distilled(name, cls):
    sizes = {
        "Bart": dict(d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64),
        "T5": dict(d_model=64, d_kv=16, d_ff=96, num_layers=1, decoder_start_token_id=0),
    }[cls]  # fmt: skip
    teacher = made(f"{cls}ForConditionalGeneration", f"{cls}Config", vocab_size=101, **sizes)
    model = PREPARED[name](copy.deepcopy(teacher))
    distillation = train.Distillation(teacher, train.Logits(), 0.1 * train.Contrastive())
    batch = {"input_ids": IDS, "labels": torch.tensor([[4, 5, 6], [7, 8, -100]])}
    steps(model, lambda m: distillation(m, batch))
    assert len(distillation.terms[1].bank) == 2 and next(iter(distillation.terms[1].bank.values())).shape == (3, 64)
    distillation.close()
    packed = ended(model, lambda m: m(**batch).logits)
    asked = dict(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(packed.generate(**asked), model.generate(**asked))


@pytest.mark.parametrize("name", ["seq", "centroids", "factors"])
def test_gpt2_with_a_tied_head(name):
    model = PREPARED[name](made("GPT2LMHeadModel", "GPT2Config", **GPT2))
    steps(model, lambda m: m(input_ids=IDS, labels=IDS).loss)
    packed = ended(model, lambda m: m(input_ids=IDS).logits)
    assert all(a is b for a, b in zip(*(m.named_tensors().values() for m in (packed.lm_head, packed.transformer.wte)),
                                      strict=True))  # fmt: skip


@pytest.mark.parametrize("cls", ["Bert", "ViT"])
def test_outliers_and_a_classifier(cls):
    images = torch.randn(2, 3, 16, 16)
    if cls == "Bert":
        model = made("BertForSequenceClassification", "BertConfig", **BERT)
        call = lambda m: m(input_ids=IDS).logits  # noqa: E731
    else:
        model = made("ViTForImageClassification", "ViTConfig", **TOWER, image_size=16, patch_size=8)
        call = lambda m: m(pixel_values=images).logits  # noqa: E731
    model = lowbit.convert(model, lowbit.Packed(bits=2, outliers=0.02), skip=["classifier"])
    trained = train.trainable(model, "outliers", also=["classifier"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, lambda m: nn.functional.cross_entropy(call(m), torch.tensor([0, 1])))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(trained) == len(moved) and {name.rpartition(".")[2] for name in moved} == {
        "outlier_values", "weight", "bias"}  # fmt: skip
    assert {name for name in moved if "outlier" not in name} == {"classifier.weight", "classifier.bias"}
    ended(model, call)


@pytest.mark.parametrize("name", ["centroids", "factors"])
def test_masters_under_checkpointing_autocast_and_compilation(name, compiler):
    torch.manual_seed(0)
    model, x = PREPARED[name](nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32))), torch.randn(6, 64)
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
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        with torch.no_grad():
            assert torch.equal(lowbit.convert(copy.deepcopy(model))(x), y)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_kngpt2_has_its_head_once(tmp_path):
    """124.4 M weights become 83.9 M: the embedding, and with it the head, and all matrices of the odd layers halve."""
    safetensors = pytest.importorskip("safetensors")
    config = {**GPT2, "n_layer": 4, "bos_token_id": None, "eos_token_id": None}
    model = made("GPT2LMHeadModel", "GPT2Config", **config)
    spec, d = lowbit.Kronecker(compression=2), config["n_embd"]
    halved = [(config["vocab_size"], d), *2 * [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]]
    before = sum(p.numel() for p in model.parameters())
    expected = before - sum(n * k // 2 - 2 for n, k in halved)
    specs = {"transformer.wte": spec, "transformer.h.1.*": spec, "transformer.h.3.*": spec}
    model = train.prepare(model, specs)
    assert model.transformer.wte.a.shape == (1, 101, 32) and model.transformer.wte.b.shape == (1, 1, 2)
    assert sum(p.numel() for p in model.parameters()) == expected == kron_sizes.parameters(model)
    steps(model, lambda m: m(input_ids=IDS, labels=IDS).loss)
    model = ended(model, lambda m: m(input_ids=IDS).logits)
    assert kron_sizes.parameters(model) == expected
    lowbit.save(model, tmp_path / "small")
    (file,) = (tmp_path / "small").glob("*.safetensors")
    with safetensors.safe_open(file, "pt") as held:
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        head = int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(t.numel() for t in tensors.values()) == expected and not any("lm_head" in name for name in tensors)
    assert file.stat().st_size == 8 + head + 4 * expected
    again = lowbit.load(tmp_path / "small")
    assert again.lm_head.a is again.transformer.wte.a
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_gpt2_small_as_kngpt2():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.tie_weights()
    assert kron_sizes.parameters(model) == 124_439_808
    assert kron_sizes.parameters(kron_sizes.convert(model, lowbit.Kronecker(compression=2))) == 83_907_506
