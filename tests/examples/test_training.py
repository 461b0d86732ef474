"""The examples of training: the shortest run of each, and the table of what they gave."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import demo
from lowbit.testing import samples

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "training"
if not FOLDER.is_dir():
    pytest.skip("not run from a source checkout", allow_module_level=True)
RESULTS = ROOT / "benchmarks" / "results" / "training.json"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the examples can be imported from; few texts are judged by."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))
    common: Any = importlib.import_module("common")
    monkeypatch.setattr(common, "DATA", samples.DATA)
    stories = common.stories
    monkeypatch.setattr(common, "stories", lambda: (stories()[0], stories()[1][:3]))
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.mark.parametrize(("script", "before", "options"), [
    ("quantgpt", "untrained", "--bits 2-2-8 --steps 1 --contrastive 0.1"),
    ("kmeans", "untuned", "--bits 2 --steps 1"),
    ("prequant", "untuned", "--bits 2 --steps 1 --outliers-by random"),
    ("kngpt2", "untrained", "--steps 1 --ilkd"),
])  # fmt: skip
def test_the_shortest_run(
    script: str, before: str, options: str, examples: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    samples.folder("stories260k")
    module = importlib.import_module(script)
    if script == "prequant":
        chunks = torch.randint(512, (9, 64), generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(module, "shakespeare", lambda: (chunks, [chunks[:1]]))
    monkeypatch.setattr(sys, "argv", [script, *options.split(), "--seeds", "1"])
    module.main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["perplexity"] < row[before]
    assert row.get("times smaller", 12) > 11


def test_the_shortest_run_with_a_trainer(examples: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("transformers")
    samples.folder("glue")
    try:
        demo.default_model()
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    module = importlib.import_module("minilm")
    monkeypatch.setattr(sys, "argv", ["minilm", "--steps", "1", "--seeds", "1", "--sentences", "8"])
    module.main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < row["loss"] < 2 and row["trained"] == pytest.approx(0.005, rel=0.02)


def test_the_table_of_the_document(examples: None) -> None:
    everything: Any = importlib.import_module("all")
    expected = everything.table(json.loads(RESULTS.read_text())["rows"])
    assert expected in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_a_bar_that_is_missed_is_called_so(examples: None) -> None:
    everything: Any = importlib.import_module("all")
    name, other = "2-2-8, 60 steps", "2-2-8, 60 steps, LSQ"
    results = {name: {"perplexity": 22.0, "times smaller": 10.0}, other: {"perplexity": 40.0}}
    below, against, smaller = everything.ROWS[name].bars
    assert everything.verdict(below, name, results) == "≤ 26"
    assert everything.verdict(against, name, results) == "≤ 0.75 × LSQ: 0.550"
    assert everything.verdict(smaller, name, results) == "**missed** ≥ 11 × smaller: 10.00"
    results[other]["perplexity"] = 25.0
    assert everything.verdict(against, name, results) == "**missed** ≤ 0.75 × LSQ: 0.880"
    del results[other]
    assert everything.verdict(against, name, results) == "≤ 0.75 × LSQ"
