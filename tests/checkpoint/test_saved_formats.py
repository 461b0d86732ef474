"""Folders that past versions saved: each must load as it did. fixtures/format-<version>/ holds, for each format
version, ``model/`` as ``lowbit.save`` wrote it and ``expected.safetensors``, the weights and outputs it stands for.

A new format version adds a folder, which ``python tests/checkpoint/test_saved_formats.py`` writes. None ever changes.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import Codebook, Kronecker, Packed
from lowbit.checkpoint.metadata import FORMAT_VERSION
from lowbit.nn.layer import layers
from lowbit.packed.format import PackedFormat, PackedWeight
from lowbit.testing.packed_cases import random_weight

FIXTURES = Path(__file__).resolve().parent / "fixtures"
IDS = torch.arange(12).view(3, 4)


class Packed10(nn.Module):
    """A layer of every kind of format that version 1.0 knew."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 40)
        self.grouped, self.rows = nn.Linear(40, 36), nn.Linear(36, 20, bias=False)
        self.ternary, self.outliers = nn.Linear(20, 24), nn.Linear(24, 40)
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.rows(torch.tanh(self.grouped(self.embed(ids))))
        return self.head(self.norm(self.outliers(torch.tanh(self.ternary(x)))))


class Families11(nn.Module):
    """The same for the families that version 1.1 added."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 40), nn.Linear(40, 12, bias=False)
        self.head.weight = self.embed.weight
        self.rows, self.tensor, self.grouped = nn.Linear(40, 36), nn.Linear(36, 20, bias=False), nn.Linear(20, 24)
        self.nf4, self.scaled = nn.Linear(24, 32), nn.Linear(32, 24)
        self.dense, self.ranks, self.small = nn.Linear(24, 20), nn.Linear(20, 24), nn.Linear(24, 40)
        self.table = nn.Embedding(12, 40)

    def forward(self, ids):
        x = torch.tanh(self.embed(ids) + self.table(ids))
        for layer in (self.rows, self.tensor, self.grouped, self.nf4, self.scaled, self.dense, self.ranks, self.small):
            x = torch.tanh(layer(x))
        return self.head(x)


class Groups12(nn.Module):
    """What version 1.2 added: activations in groups, beside a layer that knows nothing of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 80), nn.Linear(80, 12, bias=False)
        self.head.weight = self.embed.weight
        self.grouped, self.rows, self.plain = nn.Linear(80, 72), nn.Linear(72, 40, bias=False), nn.Linear(40, 80)

    def forward(self, ids):
        x = self.rows(torch.tanh(self.grouped(self.embed(ids))))
        return self.head(self.plain(torch.tanh(x)))


def llama20():
    """What version 2.0 added: guards in the file of a transformers model."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=12,
            max_position_embeddings=16, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


class Trained21(nn.Module):
    """What version 2.1 added: tensors that are trained, of a tied pair too."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 40), nn.Linear(40, 12, bias=False)
        self.head.weight = self.embed.weight
        self.codes = nn.Linear(40, 40)

    def forward(self, ids):
        return self.head(torch.tanh(self.codes(self.embed(ids))))


def mixtral22():
    """What version 2.2 added: stacks of experts, of every family."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=8,
        )
    ).eval()  # fmt: skip


class ActOrder23(nn.Module):
    """What version 2.3 added: columns in another order than the input's features."""

    def __init__(self):
        super().__init__()
        self.embed, self.ordered, self.head = nn.Embedding(12, 40), nn.Linear(40, 24), nn.Linear(24, 12)

    def forward(self, ids):
        return self.head(torch.tanh(self.ordered(self.embed(ids))))


class Levels24(nn.Module):
    """What version 2.4 added: minima, and scales of two levels."""

    def __init__(self):
        super().__init__()
        self.embed, self.minima = nn.Embedding(12, 64), nn.Linear(64, 24, bias=False)
        self.signed = nn.Linear(24, 32, bias=False)
        self.levels, self.head = nn.Linear(32, 64, bias=False), nn.Linear(64, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.levels(torch.tanh(self.signed(torch.tanh(self.minima(self.embed(ids)))))))


class Zeros25(nn.Module):
    """What version 2.5 added: packed zeros, and one factor for the scales of all rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.zeros = nn.Embedding(12, 40), nn.Linear(40, 36)
        self.levels, self.head = nn.Linear(36, 40, bias=False), nn.Linear(40, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.levels(torch.tanh(self.zeros(self.embed(ids)))))


def levels24():
    model = Levels24()
    for name, format in LEVELS24.items():
        made = random_weight(format, seed=1)
        weight = PackedWeight(
            made.codes, made.scales, made.zeros, format.bits, format.group_size if format.groups > 1 else None,
            *made.outliers, minimum=format.zeros == "minimum", scale_factors=made.scale_factors,
            zero_factors=made.zero_factors, scale_block=format.scale_block,
        )  # fmt: skip
        if name == "embed":
            model.embed = lowbit.PackedEmbedding.from_weight(weight)
        else:
            setattr(model, name, lowbit.PackedLinear.from_weight(weight, activations=format.activations))
    model.head = lowbit.PackedLinear(format=model.embed.format)
    model.head.share_weight(model.embed)
    return model


LEVELS24 = {
    "embed": PackedFormat(4, 12, 64, 16, "group", "minimum", "float16", scale_codes="uint8", scale_block=2),
    "minima": PackedFormat(5, 24, 64, 64, "row", "minimum", "bfloat16", outliers=12),
    "signed": PackedFormat(6, 32, 24, 8, "group", "none", "float32", scale_codes="int8", scale_block=3),
    "levels": PackedFormat(3, 64, 32, 8, "group", "int", "float16", scale_codes="uint8", scale_block=3, outliers=9,
                           activations="int8"),
}  # fmt: skip


PACKED10 = {
    "embed": Packed(bits=8, granularity="row"),
    "grouped": Packed(bits=4, group_size=16),
    "rows": Packed(bits=5, granularity="row", zeros="float", activations="int8"),
    "ternary": Packed(bits=2, granularity="tensor", symmetric=True, quantizer="mean", activations="int8_static"),
    "outliers": Packed(bits=3, group_size=7, symmetric=True, outliers=0.02, scale_dtype=torch.bfloat16),
}


FAMILIES11 = {
    "embed": Codebook(bits=5),
    "rows": Codebook(bits=3, outliers=0.02, activations="int8"),
    "tensor": Codebook(bits=1, granularity="tensor", activations="int8_static"),
    "grouped": Codebook(bits=2, group_size=7, codebook_dtype=torch.bfloat16),
    "nf4": Codebook(table="nf4", group_size=16),
    "scaled": Codebook(bits=8, scales=True, scale_dtype=torch.float32),
    "dense": Kronecker(compression=2),
    "ranks": Kronecker(shape=(4, 5), rank=3, dtype=torch.bfloat16),
    "small": Kronecker(shape=(4, 4), factors=Packed(bits=4, group_size=2, zeros="float")),
    "table": Kronecker(compression=4),
}
GROUPS12 = {
    "embed": Packed(bits=8, activations="int8", activation_group_size=32),
    "grouped": Packed(bits=4, group_size=16, activations="int8", activation_group_size=32),
    "rows": Packed(bits=3, symmetric=True, activations="int8", activation_group_size=64, outliers=0.02),
    "plain": Packed(bits=5, activations="int8"),
}
LLAMA20 = {"model": Packed(bits=4, group_size=16), "*.down_proj": Codebook(bits=3), "*.o_proj": Kronecker()}
TRAINED21 = {"embed": Codebook(bits=4), "codes": Packed(bits=4, group_size=16, outliers=0.02)}
MIXTRAL22 = {
    "*.experts.gate_up_proj": Packed(bits=4, group_size=8, outliers=0.02),
    "*.experts.down_proj": Codebook(bits=3),
    "*.layers.1.*.experts.down_proj": Kronecker(factors=Packed(bits=8, group_size=4)),
    "lm_head": Packed(bits=8),
}
ACT_ORDER23 = {"ordered": Packed(bits=3, group_size=16, symmetric=False, zeros="int", activations="int8")}
ZEROS25 = {
    "embed": Packed(bits=3, group_size=8, packed_zeros=True, scale_bits=8),
    "zeros": Packed(bits=5, group_size=7, packed_zeros=True, outliers=0.02, activations="int8"),
    "levels": Packed(bits=4, group_size=2, scale_bits=8),
}
VERSIONS = {
    "1.0": (Packed10, PACKED10),
    "1.1": (Families11, FAMILIES11),
    "1.2": (Groups12, GROUPS12),
    "2.0": (llama20, LLAMA20),
    "2.1": (Trained21, TRAINED21),
    "2.2": (mixtral22, MIXTRAL22),
    "2.3": (ActOrder23, ACT_ORDER23),
    "2.4": (Levels24, {}),
    "2.5": (Zeros25, ZEROS25),
}


def model_of(folder: Path) -> nn.Module:
    return VERSIONS[folder.name.removeprefix("format-")][0]()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = {name: layer.dequantize(torch.float32) for name, layer in layers(model).items()}
        output = model(IDS)
        return {**found, "output": getattr(output, "logits", output)}


def write(folder: Path) -> None:
    torch.manual_seed(0)
    make, specs = VERSIONS[FORMAT_VERSION]
    model = levels24() if make is Levels24 else lowbit.convert(make(), specs, calibration=[IDS])
    if specs is ACT_ORDER23:
        order = torch.randperm(40, dtype=torch.int32)
        model.ordered.become(
            replace(model.ordered.format, act_order=True), {**model.ordered.canonical(), "order": order}
        )
    lowbit.save(model, folder / "model")
    save_file({name: t.contiguous() for name, t in values(model).items()}, folder / "expected.safetensors")


def test_the_current_version_has_a_fixture():
    folder = FIXTURES / f"format-{FORMAT_VERSION}"
    assert folder.is_dir(), "run python tests/checkpoint/test_saved_formats.py and commit it"


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("format-*")), ids=lambda f: f.name)
def test_a_saved_folder_still_means_the_same(folder):
    model = lowbit.load(folder / "model", model=model_of(folder))
    expected = load_file(folder / "expected.safetensors")
    found = values(model)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"output"}:
        assert torch.equal(found[name], expected[name]), name
    # the sums' order depends on the ISA
    torch.testing.assert_close(found["output"], expected["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("format-*")), ids=lambda f: f.name)
def test_saving_again_changes_no_tensor(folder, tmp_path):
    lowbit.save(lowbit.load(folder / "model", model=model_of(folder)), tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder / "model", tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_version_12_added_is_only_in_files_that_use_it():
    """A reader of version 1.1 takes the others, and names the field of these."""
    description = json.loads((FIXTURES / "format-1.2" / "model" / "lowbit.json").read_text())
    fields = {name: entry["format"] for entry in description["layers"] for name in entry["names"]}
    with_groups = {name for name, format in fields.items() if "activation_group_size" in format}
    assert with_groups == {"grouped", "rows", "head"}


def test_what_version_21_added_is_trained():
    folder = FIXTURES / "format-2.1"
    model = lowbit.load(folder / "model", model=model_of(folder))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "embed.codebook", "codes.outlier_values", "codes.bias",
    }  # fmt: skip
    assert model.head.codebook is model.embed.codebook


def test_what_version_22_added_is_experts():
    folder = FIXTURES / "format-2.2"
    model = lowbit.load(folder / "model", model=model_of(folder))
    assert [type(layer).__name__ for layer in layers(model).values()] == [
        "PackedExperts", "CodebookExperts", "PackedExperts", "KroneckerExperts", "PackedLinear",
    ]  # fmt: skip


def test_what_version_23_added_is_only_in_files_that_use_it():
    description = json.loads((FIXTURES / "format-2.3" / "model" / "lowbit.json").read_text())
    fields = {name: entry["format"] for entry in description["layers"] for name in entry["names"]}
    assert fields["ordered"]["act_order"] is True
    assert "act_order" not in lowbit.convert(nn.Linear(40, 24), Packed(bits=4)).format.to_dict()


def test_what_version_24_added_is_only_in_files_that_use_it():
    description = json.loads((FIXTURES / "format-2.4" / "model" / "lowbit.json").read_text())
    fields = {name: entry["format"] for entry in description["layers"] for name in entry["names"]}
    assert {name: (f["zeros"], f.get("scale_codes"), f.get("scale_block")) for name, f in fields.items()} == {
        "embed": ("minimum", "uint8", 2), "head": ("minimum", "uint8", 2), "minima": ("minimum", None, None),
        "signed": ("none", "int8", 3), "levels": ("int", "uint8", 3),
    }  # fmt: skip
    assert lowbit.convert(nn.Linear(40, 24), Packed(bits=4)).format.to_dict().keys().isdisjoint(
        {"scale_codes", "scale_block"}
    )


def test_what_version_25_added_is_only_in_files_that_use_it():
    description = json.loads((FIXTURES / "format-2.5" / "model" / "lowbit.json").read_text())
    fields = {name: entry["format"] for entry in description["layers"] for name in entry["names"]}
    assert {name: (f.get("packed_zeros"), f.get("one_factor")) for name, f in fields.items()} == {
        "embed": (True, True), "head": (True, True), "zeros": (True, None), "levels": (None, None),
    }  # fmt: skip
    tensors = load_file(FIXTURES / "format-2.5" / "model" / "model.safetensors")
    assert tensors["embed.zeros"].shape == (12, 2) and tensors["zeros.zeros"].shape == (36, 4)


def test_layers_that_were_pickled_before_rooms_moved_run_as_they_did():
    """``torch.save`` of whole layers at 389ab03: their modules had other paths, and they lack what is derived now."""
    pickled = torch.load(FIXTURES / "pickled-0.1" / "layers.pt", weights_only=False)
    for found in pickled.values():
        with lowbit.use_backend("reference"):
            assert torch.equal(found["embedding"](found["ids"]), found["rows"])
            y = found["linear"](found["x"]).detach()
            torch.testing.assert_close(y, found["y"], rtol=1e-5, atol=2e-6)  # of torch's own sums of 64 products
        # the sums' order depends on the ISA
        torch.testing.assert_close(found["linear"](found["x"]).detach(), found["y"], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    write(FIXTURES / f"format-{FORMAT_VERSION}")
