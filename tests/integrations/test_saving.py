"""Models whose layers were packed in any way, saved by any library: reloading is bit-equal, or saving says why not."""

import copy
import json

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.testing.tiny import GPT2, IDS, LLAMA, TOWER

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

SPEC = lowbit.Packed(bits=4, group_size=32)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 2}, tie_word_embeddings=tied)).eval()


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    for tensor in model.parameters():
        tensor.data += 0.05 * torch.randn_like(tensor)
    return model


def same(model, other, inputs=IDS):
    state, reloaded = canonical_state_dict(model), canonical_state_dict(other)
    assert state.keys() == reloaded.keys()
    for name in state:
        assert torch.equal(state[name], reloaded[name]), name
    assert layers(model).keys() == layers(other).keys()
    with torch.no_grad():
        assert torch.equal(other(inputs)[0], model(inputs)[0])


SAVERS = {
    "lowbit.save": lowbit.save,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
}


def reloads(model, folder, save=lowbit.save):
    save(model, folder)
    same(model, lowbit.load(folder))
    other = type(model).from_pretrained(folder)
    same(model, other)
    return other


# ---------------------------------------------------------------------------------------------- part converted


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("tied", [False, True])
def test_layer_by_layer(save, tied, tmp_path):
    model = llama(tied)
    for layer in model.model.layers:
        lowbit.convert(layer, SPEC, skip=["self_attn.o_proj"])
    model.model.layers[0].mlp.up_proj.note = "a note"
    other = reloads(model, tmp_path, SAVERS[save])
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    names = [name for entry in section["layers"] for name in entry["names"]]
    assert sorted(names) == sorted(layers(model))
    assert section["skipped"] == {f"model.layers.{i}.self_attn.o_proj": "skipped by the caller" for i in (0, 1)}
    mine, theirs = layers(model), layers(other)
    for name in mine:
        assert theirs[name].weight_error == pytest.approx(mine[name].weight_error, rel=1e-5)
        assert theirs[name].note == mine[name].note
    if tied:
        assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other.generate(IDS, max_new_tokens=3, do_sample=False),
                       model.generate(IDS, max_new_tokens=3, do_sample=False))  # fmt: skip


@pytest.mark.parametrize("part", ["model", "lm_head", "model.layers", "model.embed_tokens"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_part(part, tied, tmp_path):
    model = llama(tied)
    if part in ("lm_head", "model.embed_tokens"):  # a layer put in by hand
        parent = model if part == "lm_head" else model.model
        made = lowbit.convert(copy.deepcopy(model.get_submodule(part)), SPEC)
        setattr(parent, part.rpartition(".")[2], made)
    else:
        lowbit.convert(model.get_submodule(part), SPEC)
    reloads(model, tmp_path)


def test_packed_layers_tied_by_hand(tmp_path):
    model = llama()
    lowbit.convert(model, SPEC)
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.share_weight(first)
    other = reloads(model, tmp_path)
    assert other.model.layers[1].mlp.up_proj.packed is other.model.layers[0].mlp.up_proj.packed


def test_a_tower_of_a_multimodal_model(tmp_path):
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=CLIPTextConfig(**TOWER, vocab_size=101, eos_token_id=11).to_dict(),
        vision_config=CLIPVisionConfig(**TOWER, image_size=32, patch_size=16).to_dict(),
    )
    model = CLIPModel(config).eval()
    lowbit.convert(model.text_model, SPEC)
    inputs = {"input_ids": IDS, "pixel_values": torch.rand(1, 3, 32, 32)}
    for convert_more in (None, model.vision_model):
        if convert_more is not None:
            lowbit.convert(convert_more, SPEC)
        folder = tmp_path / str(convert_more is None)
        model.save_pretrained(folder)
        other = CLIPModel.from_pretrained(folder)
        assert layers(other).keys() == layers(model).keys()
        content = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in content["text_config"]
        with torch.no_grad():
            torch.testing.assert_close(other(**inputs)[0], model(**inputs)[0])
        same_state(model, other)
        same_state(model, lowbit.load(folder))
    # the tower alone
    model.text_model.save_pretrained(tmp_path / "tower")
    tower = type(model.text_model).from_pretrained(tmp_path / "tower")
    same(model.text_model, tower)
    model.save_pretrained(tmp_path / "again")
    same_state(model, CLIPModel.from_pretrained(tmp_path / "again"))


def same_state(model, other):
    state, reloaded = canonical_state_dict(model), canonical_state_dict(other)
    assert state.keys() == reloaded.keys()
    assert all(torch.equal(state[name], reloaded[name]) for name in state)


@pytest.mark.parametrize("skip", [[], ["model"], ["lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_an_inner_model_saved_alone(skip, tied, tmp_path):
    model = lowbit.convert(llama(tied), SPEC, skip=skip)
    before = model.config.quantization_config.to_dict()
    model.model.save_pretrained(tmp_path / "inner")
    inner = LlamaModel.from_pretrained(tmp_path / "inner")
    same(model.model, inner)
    assert model.config.quantization_config.to_dict() == before
    same(model, reloads(model, tmp_path / "outer"))


# ------------------------------------------------------------------------------------------------- edited later


def test_a_layer_made_float_again_by_hand(tmp_path):
    model = lowbit.convert(llama(), SPEC)
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.to_float()
    other = reloads(model, tmp_path)
    assert type(other.model.layers[0].mlp.up_proj) is nn.Linear
    assert len(layers(other)) == 15


def test_a_square_conv1d_made_float_again_by_hand(tmp_path):
    model = lowbit.convert(gpt2(), SPEC)
    attention = model.transformer.h[0].attn
    attention.c_proj = attention.c_proj.to_float()
    with torch.no_grad():
        expected = model(IDS)[0]
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path)(IDS)[0], expected)


def test_every_layer_made_float_again_by_hand(tmp_path):
    model = lowbit.convert(llama(tied=True), {"lm_head": SPEC})
    assert model.lm_head.packed is model.model.embed_tokens.packed
    model.model.embed_tokens = model.model.embed_tokens.to_float()
    model.lm_head = model.lm_head.to_float()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    other = LlamaForCausalLM.from_pretrained(tmp_path)
    same(model, other)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_layer_packed_again_in_another_form(tmp_path):
    model = lowbit.convert(llama(), SPEC)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = lowbit.convert(mlp.down_proj.to_float(), lowbit.Codebook(bits=3))
    assert reloads(model, tmp_path).model.layers[1].mlp.down_proj.family == "codebook"


def test_dequantize_of_a_part(tmp_path):
    model = lowbit.convert(llama(tied=True), SPEC)
    lowbit.dequantize(model.model.layers)
    other = reloads(model, tmp_path)
    assert list(layers(other)) == ["model.embed_tokens", "lm_head"]


def test_ties_are_not_made_again(tmp_path):
    """A tie that one side left is not tied by saving or by loading."""
    model = lowbit.convert(llama(tied=True), SPEC)
    model.lm_head = lowbit.convert(model.lm_head.to_float(), lowbit.Packed(bits=8))
    other = reloads(model, tmp_path)
    assert (other.lm_head.format.bits, other.model.embed_tokens.format.bits) == (8, 4)


# --------------------------------------------------------------------------------------------------- other savers


def test_push_to_hub_writes_what_save_pretrained_does(tmp_path, monkeypatch):
    model = llama()
    lowbit.convert(model.model.layers, SPEC)
    seen = []

    class Stop(Exception):
        pass

    def save(self, folder, **kwargs):
        original(self, tmp_path / "hub", **kwargs)
        seen.append(folder)
        raise Stop

    original = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
    url = type("Url", (), {"repo_id": "a/b"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: url)
    card = transformers.utils.hub.ModelCard("")
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", lambda *args, **kwargs: card)  # not from the network
    with pytest.raises(Stop):
        model.push_to_hub("a/b")
    assert seen
    same(model, LlamaForCausalLM.from_pretrained(tmp_path / "hub"))


def test_torch_and_safetensors_files(tmp_path):
    from safetensors.torch import load_model, save_model

    model = llama(tied=True)
    skeleton = copy.deepcopy(model)
    lowbit.convert(model.model.layers, SPEC)
    lowbit.convert(skeleton.model.layers, lowbit.Packed(bits=4, group_size=32))
    torch.save(model, tmp_path / "model.pt")
    same(model, torch.load(tmp_path / "model.pt", weights_only=False))
    for layer in layers(skeleton).values():
        layer.load_state_dict({n: torch.zeros_like(t) for n, t in layer.state_dict().items()})
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(skeleton)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    same(model, other)
    save_model(model, tmp_path / "model.safetensors")
    load_model(skeleton, tmp_path / "model.safetensors")
    same(model, skeleton)


def test_diffusers_names_lowbit_save(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)

    def build():
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, patch_size=2,
            num_embeds_ada_norm=8, norm_num_groups=2,
        ).eval()  # fmt: skip

    model = build()
    model.save_pretrained(tmp_path / "float")  # a float one as before
    lowbit.convert(model, lowbit.Packed(bits=4, group_size=32))
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel holds \d+ packed layers.*lowbit\.save"):
        model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    lowbit.save(model, tmp_path / "packed")
    other = lowbit.load(tmp_path / "packed", build())
    inputs = torch.rand(1, 4, 8, 8), torch.tensor([3])
    with torch.no_grad():
        expected = model(*inputs, class_labels=torch.tensor([1])).sample
        assert torch.equal(other(*inputs, class_labels=torch.tensor([1])).sample, expected)


def test_hub_mixin_names_lowbit_save(tmp_path):
    mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin

    class Net(nn.Module, mixin):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 8)

    net = Net()
    net.save_pretrained(tmp_path / "float")
    lowbit.convert(net, SPEC)
    with pytest.raises(ValueError, match=r"Net holds 1 packed layers \(linear"):
        net.save_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("where", ["cpu", "cpu with buffers", "disk"])
def test_what_accelerate_holds_elsewhere_is_saved(where, save, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from lowbit.checkpoint.reader import Checkpoint

    plain, model = (lowbit.convert(llama(), SPEC) for _ in range(2))
    SAVERS[save](plain, tmp_path / "plain")
    if where == "disk":
        places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
                  "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
        accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=tmp_path / "disk", offload_buffers=True, force_hooks=True
        )
    else:
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=where == "cpu with buffers")
    SAVERS[save](model, tmp_path / "offloaded")
    written, expected = (Checkpoint.of_folder(tmp_path / folder) for folder in ("offloaded", "plain"))
    assert list(written) == list(expected)
    assert [name for name in expected if not torch.equal(written.read(name), expected.read(name))] == []
    same(plain, LlamaForCausalLM.from_pretrained(tmp_path / "offloaded"))
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], plain(IDS)[0])


def nomic_bert():
    """Its files have q, k and v in one."""
    config = transformers.NomicBertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.NomicBertModel(config), {"input_ids": torch.arange(9)[None]}


def dinov2():
    """Its files have gate and up in one, weights and biases apart."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    return transformers.Dinov2Model(config), {"pixel_values": torch.randn(1, 3, 28, 28)}


@pytest.mark.parametrize("skip", [[], ["*.q_proj", "*.up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("spec", [
    lowbit.Packed(bits=4, group_size=16, outliers=0.01), lowbit.Codebook(bits=3, granularity="tensor"),
], ids=["outliers", "one table"])  # fmt: skip
@pytest.mark.parametrize("make", [nomic_bert, dinov2])
@torch.no_grad()
def test_weights_that_float_files_have_in_one(make, spec, skip, tmp_path):
    """transformers cuts them when it loads, and joins them when it saves: packed ones are saved as they are."""
    torch.manual_seed(0)
    model, inputs = make()
    skip = [pattern for pattern in skip if any(name.endswith(pattern[2:]) for name, _ in model.named_modules())]
    y = lowbit.convert(model.eval(), spec, skip=skip)(**inputs)[0]
    model.save_pretrained(tmp_path)
    for load in (lowbit.load, type(model).from_pretrained):
        assert torch.equal(load(tmp_path).eval()(**inputs)[0], y)


def test_a_base_model_whose_files_have_the_names_of_another(tmp_path):
    """Its renamings add the prefix of the base model, which is taken away where the model has the tensor: a guard's is
    not there."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.PaddleOCRVLConfig(
        vision_config=dict(sizes, image_size=28, patch_size=14),
        text_config=dict(sizes, vocab_size=96, num_key_value_heads=2, head_dim=16, max_position_embeddings=64),
    )
    model = lowbit.convert(transformers.PaddleOCRVLModel(config), lowbit.Packed(bits=4, group_size=16))
    model.save_pretrained(tmp_path)
    state = canonical_state_dict(model)
    for load in (lowbit.load, type(model).from_pretrained):
        other = canonical_state_dict(load(tmp_path))
        assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
