"""``lowbit convert --budget``: the folder has the planned specs and fits, and errors name the option."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.cli import command as cli
from lowbit.cli.evaluate import load_model
from lowbit.quality.budget import written
from tests.cli.test_eval import run as run_command
from tests.cli.test_eval import saved_llama

transformers = pytest.importorskip("transformers")

CANDIDATES = [f"Packed(bits={bits}, group_size=16, zeros='int')" for bits in (2, 4, 8)]
TEXT = "a little red fox\nthe big blue bear who ran\nonce upon a time\nthere was a bear\na fox and a bear ran\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("budget") / "llama", tie_word_embeddings=True, initializer_range=0.3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


run = partial(run_command, command="convert")


@pytest.mark.parametrize("fused", [True, False])
def test_the_folder_has_the_planned_specs_and_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, text: Path, fused: bool
) -> None:
    given = [part for spec in CANDIDATES for part in ("--candidate", spec)] + ([] if fused else ["--no-fused"])
    status, out, err = run(capsys, llama, tmp_path / "packed", "--budget", "4.5 bits", "--calibration-text", text,
                           "--json", tmp_path / "plan.json", "--skip", "*.up_proj", *given)  # fmt: skip
    assert status == 0, err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert f"{found['bits_per_weight']:.3f} bits per weight" in out and "held-out KL" in out
    layers = {row.name: row for row in lowbit.report(lowbit.load(tmp_path / "packed")).rows if row.shares is None}
    assert sum(row.bytes_after for row in layers.values()) == found["bytes"] <= found["budget"]
    expected = lowbit.plan(load_model(llama), 4.5, calibration=cli.calibration_batches(llama, text),
                           candidates=[cli.parse_spec(spec) for spec in CANDIDATES], skip=["*.up_proj"],
                           fused=fused)  # fmt: skip
    specs = {name: cli.parse_spec(spec) for name, spec in found["specs"].items()}
    assert specs == expected.specs and layers.keys() == specs.keys()
    of_one_input = {specs[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"}
    assert (len(of_one_input) == 1) == fused
    assert len(set(specs.values())) > 1 and not any("up_proj" in name for name in layers)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    bits = {name: layer["format"]["bits"] for layer in config["layers"] for name in layer["names"]}
    assert all(bits[name] == spec.bits for name, spec in specs.items())


def test_bytes_are_of_the_whole_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, text: Path
) -> None:
    status, _, err = run(capsys, llama, tmp_path / "packed", "--budget", "9 kB", "--calibration-text", text)
    assert status == 0, err
    assert 8000 < lowbit.report(lowbit.load(tmp_path / "packed")).total_after <= 9000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "4 bits"], "--budget needs --calibration-text FILE, a text file with one sample per line"),
        (["--budget", "4 pounds", "--calibration-text", "TEXT"], "--budget 4 pounds: budget must be such as"),
        (["--budget", "1 bit", "--calibration-text", "TEXT"], "--budget 1 bit: budget must hold the smallest"),
        (["--budget", "4 bits", "--bits", "4"], "--budget chooses the specs: leave out --bits"),
        (["--budget", "4 bits", "--spec", "Codebook(bits=3)"], "--budget chooses the specs: leave out --spec"),
        (["--candidate", "Packed(bits=3)"], "--candidate is of a plan: give --budget"),
        (["--no-fused"], "--no-fused is of a plan: give --budget"),
        (["--json", "plan.json"], "--json is of a plan: give --budget"),
        (["--budget", "4 bits", "--calibration-text", "TEXT", "--candidate", "Packed(bits=3)"],
         "--candidate must be given twice or more: got 'Packed(bits=3)' alone"),
        (["--budget", "4 bits", "--calibration-text", "TEXT", "--candidate", "Packed(bits=3)", "--candidate", "None"],
         "--candidate must be a spec: got None"),
        (["--budget", "4 bits", "--calibration-text", "ONE"], "at least two samples with --budget"),
    ],
)  # fmt: skip
def test_bad_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, text: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "one.txt").write_text("a fox\n")
    places = {"TEXT": text, "ONE": tmp_path / "one.txt"}
    status, _, err = run(capsys, llama, tmp_path / "packed", *(places.get(part, part) for part in arguments))
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "packed").exists()


def test_a_packed_folder_has_no_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, text: Path
) -> None:
    lowbit.convert_folder(llama, tmp_path / "packed", lowbit.Packed(bits=4))
    status, _, err = run(capsys, tmp_path / "packed", tmp_path / "again", "--budget", "4 bits",
                         "--calibration-text", text)  # fmt: skip
    assert status == 2 and "--budget needs a folder with a float model" in err


@pytest.mark.parametrize(
    "spec",
    [
        lowbit.Packed(bits=3, quantizer="gptq"),
        lowbit.Packed(bits=4, granularity="row", scale_dtype=torch.float16, outliers=0.01),
        lowbit.Codebook(bits=3, sensitivity=True),
        lowbit.Kronecker(compression=2, factors=lowbit.Packed(bits=8)),
    ],
)
def test_a_written_spec_is_read(spec: lowbit.Packed) -> None:
    assert cli.parse_spec(written(spec)) == spec
