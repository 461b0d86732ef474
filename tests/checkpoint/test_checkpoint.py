"""Plain modules: save and load. Also the description, the safetensors reader, and convert_folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.checkpoint import folder as folders
from lowbit.checkpoint import metadata
from lowbit.checkpoint.reader import DTYPES, Checkpoint
from lowbit.checkpoint.stream import empty_parameters
from lowbit.nn.layer import LayerConfig, layers


class Net(nn.Module):
    """Embedding and tied head, a block registered under two names, a buffer, a float layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(51, 48, padding_idx=0)
        self.block = nn.Linear(48, 48)
        self.again = self.block
        self.norm = nn.BatchNorm1d(48)
        self.small = nn.Linear(48, 5, bias=False)
        self.head = nn.Linear(48, 51, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3), persistent=False)

    def forward(self, ids):
        x = self.norm(self.again(self.block(self.embed(ids)).relu()))
        return self.head(x) + self.small(x).sum(-1, keepdim=True) + self.steps.sum()


IDS = torch.tensor([3, 0, 50, 7])


def make(spec=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Net().eval()
    model.norm.running_mean.normal_()
    if spec is None:
        spec = lowbit.Packed(bits=4, group_size=20, outliers=0.01)
    return lowbit.convert(model, spec, **{"skip": ["small"], **kwargs})


def same_bits(model, other):
    state, reloaded = model.state_dict(), other.state_dict()
    assert list(state) == list(reloaded)
    for name, tensor in state.items():
        assert tensor.dtype == reloaded[name].dtype, name
        assert torch.equal(tensor, reloaded[name]), name
    assert torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("skeleton", ["float", "meta", "empty_parameters"])
def test_reload_is_bit_equal(skeleton, tmp_path):
    model = make()
    lowbit.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "lowbit.json", "model.safetensors"]
    if skeleton == "float":
        empty = Net()
    elif skeleton == "empty_parameters":
        with empty_parameters():
            empty = Net()
    else:
        with torch.device("meta"):
            empty = Net()
        empty.steps = torch.arange(3)  # not saved: only the constructor knows it
    other = lowbit.load(tmp_path, empty).eval()
    assert other is empty
    same_bits(model, other)
    assert other.head.packed is other.embed.packed
    assert other.again is other.block
    assert other.embed.padding_idx == 0
    assert other.lowbit_skipped == model.lowbit_skipped == {"small": "skipped by the caller"}
    for name, layer in layers(model).items():
        assert layers(other)[name].weight_error == pytest.approx(layer.weight_error, rel=1e-5)
        assert all(not tensor.requires_grad for tensor in layers(other)[name].named_tensors().values())
    assert other.block.bias.requires_grad


@pytest.mark.parametrize(
    "spec",
    [
        lowbit.Packed(bits=2, symmetric=True),
        lowbit.Packed(bits=3, group_size=7),
        lowbit.Packed(bits=8, granularity="tensor", activations="int8"),
        lowbit.Packed(bits=4, group_size=16, activations="int8", activation_group_size=32),
        lowbit.Packed(bits=5, group_size=48, zeros="float", scale_dtype=torch.bfloat16),
        lowbit.Packed(bits=7, group_size=1, scale_dtype=torch.float32, outliers=0.1),
    ],
    ids=lambda spec: spec.describe(),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats_and_dtypes(spec, dtype, tmp_path):
    model = make(spec).to(dtype)
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, Net()).eval()
    assert other.embed.dtype == dtype
    same_bits(model, other)


def test_shared_tensors_are_stored_once(tmp_path):
    lowbit.save(make(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name in stored if name.endswith(".packed")] == ["block.packed", "embed.packed"]
    model = make()
    total = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert sum(t.numel() * t.element_size() for t in stored.values()) == total


def test_tied_layers_keep_their_own_static_scales(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(10 * self.first(x).sigmoid())

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(20, 48)
    peaks = [x.abs().max(), (10 * model.first(x).sigmoid()).max()]
    lowbit.convert(model, lowbit.Packed(bits=8, activations="int8_static"), calibration=[x])
    assert model.first.packed is model.second.packed
    scales = [float(layer.x_scale) for layer in (model.first, model.second)]
    assert scales == pytest.approx([float(peak) / 127 for peak in peaks])
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, Tied())
    assert other.first.packed is other.second.packed
    assert [float(layer.x_scale) for layer in (other.first, other.second)] == scales
    assert torch.equal(model(x), other(x))


def test_a_model_that_is_one_layer(tmp_path):
    torch.manual_seed(0)
    layer = lowbit.convert(nn.Linear(40, 6), lowbit.Packed(bits=4))
    lowbit.save(layer, tmp_path)
    other = lowbit.load(tmp_path, nn.Linear(40, 6))
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), other(x))


def test_load_into_an_already_packed_model(tmp_path):
    model = make(seed=1)
    lowbit.save(model, tmp_path)
    same_bits(model, lowbit.load(tmp_path, make(seed=2)))


def test_trained_module_with_a_prologue(tmp_path):
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.codes = nn.Parameter(torch.randint(0, 4, (8, 16)).float())

        def forward(self, x):
            return self.norm(x) @ ((self.codes - 2) * 0.5).T

    def recognise(module):
        scales = torch.full((1, 1), 0.5)
        return lowbit.Source(lowbit.PackedWeight(module.codes.detach().to(torch.uint8), scales, None, bits=2))

    lowbit.register_source(Trained, recognise, prologue=lambda module: module.norm)
    model = nn.Sequential(Trained(), nn.ReLU())
    model[0].norm.weight.data.normal_()
    lowbit.convert(model)
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, nn.Sequential(Trained(), nn.ReLU()))
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = make(seed=1)
    lowbit.save(model, tmp_path)

    def half(tensors, path, header):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        lowbit.save(make(seed=2), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "lowbit.json", "model.safetensors"]
    same_bits(model, lowbit.load(tmp_path, Net()).eval())


def test_errors_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="no packed layer"):
        lowbit.save(Net(), tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        lowbit.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither lowbit\.json nor config\.json"):
        lowbit.load(tmp_path)
    lowbit.save(make(), tmp_path)
    with pytest.raises(ValueError, match="pass the float model"):
        lowbit.load(tmp_path)
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match="steps is on meta"):
        lowbit.load(tmp_path, empty)
    broken = make()
    broken.block.scales.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"block\.scales must be finite"):
        lowbit.save(broken, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_skeleton_of_another_shape_changes_nothing(tmp_path):
    lowbit.save(make(), tmp_path)

    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(48, 52, bias=False)

    other = Wider()
    with pytest.raises(ValueError, match=r"layer 'head' was saved from a float linear of shape \[51, 48\]"):
        lowbit.load(tmp_path, other)
    assert not layers(other)

    class Biased(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(48, 51, bias=True)

    with pytest.raises(ValueError, match="'head' was saved without a bias"):
        lowbit.load(tmp_path, Biased())


def test_description_groups_equal_layers():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(50)])
    lowbit.convert(model, lowbit.Packed(bits=4))
    description = metadata.describe(model)
    assert len(description["layers"]) == 1
    assert description["layers"][0]["names"] == [str(i) for i in range(50)]
    parsed = metadata.parse(json.loads(json.dumps(description)))
    assert parsed.layers == {name: LayerConfig.of(layer) for name, layer in layers(model).items()}
    assert parsed.to_dict() == {**description, "weight_error": parsed.weight_error}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reader_agrees_with_safetensors(dtype, tmp_path):
    tensor = torch.arange(48).remainder(2).to(torch.uint8).view(3, 16).view(dtype)
    file = tmp_path / "model.safetensors"
    try:
        save_file({"b": tensor, "empty": tensor[:0].clone(), "scalar": tensor[0, 0].clone()}, file)
    except (RuntimeError, KeyError):
        pytest.skip(f"this safetensors cannot write {dtype}")
    checkpoint = Checkpoint.of_folder(tmp_path)
    for name, expected in load_file(file).items():
        found = checkpoint.read(name)
        assert found.dtype == expected.dtype == dtype
        assert found.shape == expected.shape
        assert torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


# ------------------------------------------------------------------------------------------------ convert_folder


@pytest.fixture
def float_llama(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def write(tied=False, dtype=torch.bfloat16, shard="5GB"):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=101, tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
        model.generation_config.repetition_penalty = 1.5
        model.save_pretrained(tmp_path / "float", max_shard_size=shard)
        (tmp_path / "float" / "tokenizer.json").write_text("{}")
        # what from_pretrained makes of it: .to(dtype) also rounded the rotary frequencies, which are not saved
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float")

    return write


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "shard"), [(torch.bfloat16, "30KB"), (torch.float16, "5GB"), (torch.float32, "5GB")])
@pytest.mark.parametrize("skip", [(), ("lm_head",), ("model.embed_tokens", "*.mlp")])
def test_convert_folder_equals_convert(tied, dtype, shard, skip, float_llama, tmp_path):
    spec = lowbit.Packed(bits=4, group_size=32)
    model = lowbit.convert(float_llama(tied, dtype, shard), spec, skip=skip)
    assert model.dtype == dtype
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec, skip=skip)
    other = lowbit.load(tmp_path / "packed")
    ids = torch.arange(8)[None]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert other.dtype == dtype
    assert other.lowbit_skipped == model.lowbit_skipped
    assert other.generation_config.repetition_penalty == 1.5
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    assert {f.name for f in tmp_path.iterdir()} == {"float", "packed"}


def test_convert_folder_of_other_models(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64)
    )
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=101
        )
    )
    ids = torch.arange(8)[None]
    for name, model in {"gpt2": gpt2, "bert": bert}.items():
        model.eval().save_pretrained(tmp_path / name)
        lowbit.convert_folder(tmp_path / name, tmp_path / f"{name}-packed", lowbit.Packed(bits=8))
        lowbit.convert(model, lowbit.Packed(bits=8))
        other = type(model).from_pretrained(tmp_path / f"{name}-packed")
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_convert_folder_with_calibration(float_llama, tmp_path):
    spec = lowbit.Packed(bits=4, group_size=32, quantizer="gptq")
    model = float_llama(dtype=torch.float32)
    batches = [torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(1))]
    with pytest.raises(ValueError, match="needs calibration"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec)
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec, calibration=batches)
    lowbit.convert(model, spec, calibration=batches)
    ids = torch.arange(8)[None]
    assert torch.equal(lowbit.load(tmp_path / "packed")(ids).logits, model(ids).logits)


def test_convert_folder_with_a_loss(float_llama, tmp_path):
    spec = lowbit.Codebook(bits=2, sensitivity=True)
    model = float_llama(dtype=torch.float32)
    batches = [torch.randint(0, 101, (1, 16), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def loss(model, ids):
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])

    with pytest.raises(ValueError, match="loss needs calibration data"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec, loss=loss)
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec, calibration=batches, loss=loss)
    by_inputs = lowbit.convert(float_llama(dtype=torch.float32), spec, calibration=batches)
    lowbit.convert(model, spec, calibration=batches, loss=loss)
    logits = lowbit.load(tmp_path / "packed")(batches[0]).logits
    assert torch.equal(logits, model(batches[0]).logits)
    assert not torch.equal(logits, by_inputs(batches[0]).logits)


def test_convert_folder_errors(float_llama, tmp_path):
    spec = lowbit.Packed(bits=4, group_size=32)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        lowbit.convert_folder(tmp_path, tmp_path / "packed", spec)
    float_llama()
    with pytest.raises(FileExistsError, match="must not exist"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "float", spec)
    with pytest.raises(ValueError, match="matches no layer"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec, skip=["nothing"])
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    poisoned = {
        **tensors,
        "model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"] * torch.nan,
    }
    save_file(poisoned, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec)
    assert [f.name for f in tmp_path.iterdir()] == ["float"]


@pytest.mark.turns(2)
def test_loading_adds_little_more_than_the_packed_bytes(tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    code = f"""
import gc, torch, lowbit, transformers
def rss():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
def config(n):
    return transformers.LlamaConfig(hidden_size=n, intermediate_size=2*n, num_hidden_layers=2, num_attention_heads=4,
                                    vocab_size=8000, dtype="bfloat16", architectures=["LlamaForCausalLM"])
small = lowbit.convert(transformers.LlamaForCausalLM(config(32)), lowbit.Packed(bits=4))
lowbit.save(small, {str(tmp_path)!r} + "/small"); lowbit.load({str(tmp_path)!r} + "/small")
gc.collect(); before = rss()
model = lowbit.load({str(tmp_path)!r} + "/big")
gc.collect(); print((rss() - before) / sum(t.nbytes for t in model.state_dict().values()))
"""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=4, vocab_size=8000,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    big = LlamaForCausalLM(config).to(torch.bfloat16)
    lowbit.save(lowbit.convert(big, lowbit.Packed(bits=8)), tmp_path / "big")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert float(done.stdout.split()[-1]) <= 1.05


# --------------------------------------------------------------------------------- what is trained, errors, tokenizer


def test_what_is_trained_is_trained_after_loading(tmp_path):
    model = make(lowbit.Codebook(bits=4, outliers=0.01))
    lowbit.make_trainable(model, "codebook", "outlier_values")
    assert model.head.codebook is model.embed.codebook
    with torch.no_grad():
        model.block.codebook += 0.001 * torch.randn_like(model.block.codebook)
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, Net()).eval()
    assert {n: p.requires_grad for n, p in other.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert other.head.codebook is other.embed.codebook
    assert other.again is other.block
    assert other.block.codebook.dtype == torch.float32
    assert torch.equal(model(IDS), other(IDS))
    other(IDS).sum().backward()
    assert all(other.block.get_parameter(name).grad is not None for name in ("codebook", "outlier_values"))
    lowbit.save(other, tmp_path / "again")
    stored = [load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again")]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    lowbit.freeze(other)
    lowbit.save(other, tmp_path / "frozen")
    assert "trained" not in json.loads((tmp_path / "frozen" / "lowbit.json").read_text())
    assert torch.equal(lowbit.load(tmp_path / "frozen", Net()).eval()(IDS), model(IDS))


@pytest.mark.parametrize("loader", ["load", "from_pretrained", "AutoModel"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained_in_a_transformers_model(loader, tied, float_llama, tmp_path):
    import transformers

    model = lowbit.convert(float_llama(tied, torch.float32), lowbit.Codebook(bits=3))
    lowbit.make_trainable(model.model.embed_tokens, "codebook")
    lowbit.make_trainable(model.model.layers[0].mlp, "codebook")
    if tied:
        lowbit.make_trainable(nn.ModuleList([model.model.embed_tokens, model.lm_head]), "codebook")
    lowbit.save(model, tmp_path / "packed")
    if loader == "load":
        other = lowbit.load(tmp_path / "packed")
    else:
        cls = transformers.AutoModel if loader == "AutoModel" else type(model)
        other = cls.from_pretrained(tmp_path / "packed")
    expected = {n for n, _ in model.named_parameters() if n.endswith(".codebook")}
    if loader == "AutoModel":
        expected = {n.removeprefix("model.") for n in expected if n.startswith("model.")}
    assert {n for n, p in other.named_parameters() if n.endswith(".codebook") and p.requires_grad} == expected
    if loader != "AutoModel":
        assert torch.equal(other(IDS[None]).logits, model(IDS[None]).logits)
        assert (other.lm_head.trained() == ["codebook"]) == (tied and model.lm_head.trained() == ["codebook"])


def state_of(model):
    tensors = {n: (id(t), t.clone() if t.device.type != "meta" else None) for n, t in
               [*model.named_parameters(), *model.named_buffers()]}  # fmt: skip
    return [(n, id(m), sorted(m.__dict__)) for n, m in model.named_modules()], tensors


def same_state(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (key, value) in before[1].items():
        assert after[1][name][0] == key, name
        assert value is None or torch.equal(after[1][name][1], value), name


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "values", "truncated", "alias"])
def test_a_skeleton_is_as_before_after_an_error(what, tmp_path):
    lowbit.save(make(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if what == "missing":
        del tensors["norm.weight"]
    elif what == "extra":
        tensors["norm.surprise"] = torch.ones(1)
    elif what == "shape":
        tensors["norm.weight"] = torch.ones(47)
    elif what == "values":
        tensors["block.scales"][0, 0] = float("nan")
    elif what == "alias":
        description = json.loads((tmp_path / "lowbit.json").read_text())
        description["shared"]["norm.weight"] = "nothing"
        (tmp_path / "lowbit.json").write_text(json.dumps(description))
    save_file(tensors, file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    torch.manual_seed(3)
    empty = Net()
    before = state_of(empty)
    with pytest.raises(ValueError):
        lowbit.load(tmp_path, empty)
    same_state(before, state_of(empty))
    assert not layers(empty)
    assert empty(IDS).shape == (4, 51)


@pytest.mark.parametrize("what", ["missing", "values"])
def test_a_transformers_skeleton_is_as_before_after_an_error(what, float_llama, tmp_path):
    model = lowbit.convert(float_llama(tied=True, dtype=torch.float32), lowbit.Packed(bits=4, group_size=32))
    lowbit.save(model, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    if what == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    empty = float_llama(tied=True, dtype=torch.float32)
    before, config = state_of(empty), empty.config.to_json_string()
    with pytest.raises(ValueError):
        lowbit.load(tmp_path / "packed", empty)
    same_state(before, state_of(empty))
    assert empty.config.to_json_string() == config
    assert empty.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_what_was_saved_and_what_was_given(float_llama, tmp_path):
    import transformers

    lowbit.save(lowbit.convert(float_llama(), lowbit.Packed(bits=4)), tmp_path / "packed")
    lowbit.save(make(), tmp_path / "plain")
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM of transformers.*into a Sequential"):
        lowbit.load(tmp_path / "packed", nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"layer 'embed' \(4 were saved\).*it is a Sequential"):
        lowbit.load(tmp_path / "plain", nn.Sequential(nn.Linear(4, 4)))
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="BertModel has no layer 'model.*saved from LlamaForCausalLM"):
        lowbit.load(tmp_path / "packed", bert)
    for folder in ("packed", "plain"):
        with pytest.raises(TypeError, match="model must be the float nn.Module to load into: got str"):
            lowbit.load(tmp_path / folder, "gpt2")
    model = float_llama()
    assert lowbit.load(tmp_path / "packed", model) is model


def test_the_tokenizer_is_saved_too(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    with pytest.raises(TypeError, match="tokenizer must be a tokenizer or processor of transformers: got str"):
        lowbit.save(make(), tmp_path / "packed", tokenizer="gpt2")
    assert not (tmp_path / "packed").exists()
    lowbit.save(make(), tmp_path / "packed", tokenizer=Tokenizer())
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
