"""Folders that past versions saved: each must load as it did. tests/fixtures/format-<version>/ holds, for each format
version, ``model/`` as ``lowbit.save`` wrote it and ``expected.safetensors``, the weights and outputs it stands for.

A new format version adds a folder (``python tests/test_saved_formats.py`` writes it) and never changes an old one.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import Packed
from lowbit.checkpoint.metadata import FORMAT_VERSION
from lowbit.layer import layers

FIXTURES = Path(__file__).resolve().parent / "fixtures"
IDS = torch.arange(12).view(3, 4)


class Model(nn.Module):
    """A layer of every kind of format."""

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


SPECS = {
    "embed": Packed(bits=8, granularity="row"),
    "grouped": Packed(bits=4, group_size=16),
    "rows": Packed(bits=5, granularity="row", zeros="float", activations="int8"),
    "ternary": Packed(bits=2, granularity="tensor", symmetric=True, quantizer="mean", activations="int8_static"),
    "outliers": Packed(bits=3, group_size=7, symmetric=True, outliers=0.02, scale_dtype=torch.bfloat16),
}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = {name: layer.dequantize(torch.float32) for name, layer in layers(model).items()}
        return {**found, "output": model(IDS)}


def write(folder: Path) -> None:
    torch.manual_seed(0)
    model = lowbit.convert(Model(), SPECS, calibration=[IDS])
    lowbit.save(model, folder / "model")
    save_file({name: t.contiguous() for name, t in values(model).items()}, folder / "expected.safetensors")


def test_the_current_version_has_a_fixture():
    assert (FIXTURES / f"format-{FORMAT_VERSION}").is_dir(), "run python tests/test_saved_formats.py and commit it"


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("format-*")), ids=lambda f: f.name)
def test_a_saved_folder_still_means_the_same(folder):
    model = lowbit.load(folder / "model", model=Model())
    expected = load_file(folder / "expected.safetensors")
    found = values(model)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"output"}:
        assert torch.equal(found[name], expected[name]), name
    # the sums' order depends on the ISA
    torch.testing.assert_close(found["output"], expected["output"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("format-*")), ids=lambda f: f.name)
def test_saving_again_changes_no_tensor(folder, tmp_path):
    lowbit.save(lowbit.load(folder / "model", model=Model()), tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder / "model", tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


if __name__ == "__main__":
    write(FIXTURES / f"format-{FORMAT_VERSION}")
