"""transformers without lowbit must not load a packed folder; and the model card says how it is loaded."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.checkpoint import card
from lowbit.checkpoint.reader import Checkpoint, read_header
from lowbit.testing.tiny import BERT, GPT2, LLAMA, T5

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.quantizers import auto  # noqa: E402

from lowbit.integrations.matching import NOTICE  # noqa: E402

SPEC = lowbit.Packed(bits=4, group_size=32)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("packed")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = lowbit.convert(make(), SPEC, skip=["*.relative_attention_bias"] if name == "t5" else [])
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}-shards", max_shard_size="20KB")
    head = lowbit.convert(MODELS["llama"](), {"lm_head": SPEC})
    head.save_pretrained(root / "head")
    return root


@pytest.fixture
def without_lowbit(monkeypatch):
    """transformers as it is before ``import lowbit``: it does not know the method."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lowbit")


LOADS = [
    *[(name, cls) for name in ("llama", "llama-tied", "llama-shards", "llama-tied-shards")
      for cls in (LlamaForCausalLM, LlamaModel, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)],
    *[("bert", cls) for cls in (BertForMaskedLM, BertModel, AutoModel, AutoModelForSequenceClassification)],
    *[("t5", cls) for cls in (T5ForConditionalGeneration, T5EncoderModel, AutoModel)],
    *[("gpt2", cls) for cls in (GPT2LMHeadModel, AutoModel)],
    *[("mixtral", cls) for cls in (MixtralForCausalLM, AutoModel)],
    ("head", LlamaForCausalLM),
]  # fmt: skip


@pytest.mark.parametrize(("name", "cls"), LOADS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_loading_without_lowbit_raises(name, cls, folders, without_lowbit, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for options in ({}, {"device_map": "cpu"}) if cls is AutoModelForCausalLM else ({},):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            cls.from_pretrained(folders / name, **options)
    assert NOTICE in caplog.text  # its report says what to do


def test_a_pipeline_without_lowbit_raises(folders, without_lowbit):
    with pytest.raises((ValueError, RuntimeError, OSError), match="ignore_mismatched_sizes"):
        transformers.pipeline("text-generation", model=str(folders / "llama"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", ["", "-shards"])
def test_lowbit_leaves_out_the_guards_only(name, shards, folders):
    folder = folders / (name + shards)
    checkpoint = Checkpoint.of_folder(folder)
    guards = {key: entry for key, entry in checkpoint.entries.items() if entry.nbytes == 0}
    assert NOTICE in guards
    assert len(guards) >= 5
    model, info = type(MODELS[name]()).from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    # every stored tensor but the guards is in the model
    known = set(checkpoint.entries) - set(guards)
    assert known <= set(model.state_dict()) or name == "mixtral"
    assert load_file(next(folder.glob("model*.safetensors")))  # other tools read the files
    other = lowbit.load(folder)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_model_that_renames_what_it_saves(tmp_path):
    """"model." becomes "backbone." in its files, in the name of the notice, too."""
    made = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h").NemotronHForCausalLM
    config = made.config_class(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    )  # fmt: skip
    model = lowbit.convert(made(config).eval(), SPEC)
    lowbit.save(model, tmp_path)
    ids = torch.arange(6)[None]
    expected = model(ids, use_cache=False).logits
    assert torch.equal(lowbit.load(tmp_path)(ids, use_cache=False).logits, expected)
    loaded, info = made.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(loaded.eval()(ids, use_cache=False).logits, expected)
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_guards_are_small(folders):
    folder = folders / "llama"
    entries, _ = read_header(folder / "model.safetensors")
    guards = [key for key, entry in entries.items() if entry.nbytes == 0]
    assert sum(len(key) + 80 for key in guards) < 2000
    assert {key for key in guards if key != NOTICE} == {
        key.replace(".packed", ".weight") for key in entries if key.endswith(".packed")
    }


def test_folders_without_guards_load(folders, tmp_path):
    """As earlier versions wrote them."""
    model = lowbit.load(folders / "llama")
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({n: t for n, t in load_file(file).items() if t.numel()}, file, {"format": "pt"})
    content = json.loads(config.read_text())
    content["quantization_config"]["format_version"] = "1.2"
    config.write_text(json.dumps(content))
    for other in (lowbit.load(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path)):
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("tensor", [torch.ones(1), torch.ones(64, 64)])
def test_only_an_empty_tensor_is_a_guard(tensor, folders, tmp_path):
    lowbit.load(folders / "llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**load_file(file), name: tensor}, file, {"format": "pt"})
    for load in (lowbit.load, LlamaForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"'{name}' does not belong to the described format"):
            load(tmp_path)


def test_other_writers_and_readers_keep_guards(folders, tmp_path, capsys):
    from lowbit.cli.command import main

    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path / "float")
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", SPEC)
    assert NOTICE in Checkpoint.of_folder(tmp_path / "packed")
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert "lm_head" in capsys.readouterr().out
    model = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "again")
    first, second = (Checkpoint.of_folder(tmp_path / name).entries for name in ("packed", "again"))
    assert first.keys() == second.keys()
    lowbit.dequantize(model).save_pretrained(tmp_path / "plain")
    assert all(entry.nbytes for entry in Checkpoint.of_folder(tmp_path / "plain").entries.values())


# ------------------------------------------------------------------------------------------------------ model card


def test_the_card_says_what_and_how(folders):
    text = (folders / "llama-tied" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert 'pip install "lowbit[transformers]"' in text
    assert text.index("import lowbit") < text.index("from transformers import LlamaForCausalLM")
    model = lowbit.load(folders / "llama-tied")
    file = folders / "llama-tied" / "model.safetensors"
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")}
    stored = sum(entry.nbytes for entry in read_header(file)[0].values())
    before = 4 * sum(p.numel() for p in MODELS["llama-tied"]().parameters())
    assert [cell.strip() for cell in rows["all"]] == ["9", f"{before / 1e6:.2f}", f"{stored / 1e6:.2f}"]
    assert next(iter(rows)) == "stored as"
    assert model.lm_head.format.describe() in rows


def test_the_card_is_updated_and_yours_is_kept(tmp_path):
    torch.manual_seed(0)
    model = lowbit.convert(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), {"0": SPEC})
    lowbit.save(model, tmp_path)
    path = tmp_path / "README.md"
    first = path.read_text()
    assert "lowbit.load" in first
    path.write_text(first + "\nMy own words.\n")
    lowbit.convert(model, lowbit.Packed(bits=8, group_size=16))
    lowbit.save(model, tmp_path)
    second = path.read_text()
    assert second.endswith("\nMy own words.\n")
    assert "8-bit" in second
    assert second.count("# Sequential") == 1
    path.write_text("# Mine\n")
    lowbit.save(model, tmp_path)
    assert path.read_text() == "# Mine\n"


def test_convert_folder_puts_its_section_above_the_float_models_card(tmp_path):
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", SPEC)
    text = (tmp_path / "packed" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n")
    assert text.endswith("\n# A model\n")
    assert text.index("LlamaForCausalLM, stored in few bits") < text.index("# A model")
    assert (tmp_path / "float" / "README.md").read_text().startswith("---\nlicense: mit\n---\n\n# A model")


def test_the_card_of_push_to_hub(folders, tmp_path):
    """The template that transformers puts into a new repository gives way to ours, somebody's card does not."""
    model = lowbit.load(folders / "llama")
    for text, ours in ((f"{card._GENERATED} by us.", True), ("# Mine", False)):
        (tmp_path / "README.md").write_text(text)
        card.write(model, tmp_path, library="transformers")
        assert ("stored in few bits" in (tmp_path / "README.md").read_text()) == ours
