"""What the documents point at is there: links, headings, files."""

from __future__ import annotations

import re
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch

from lowbit.testing import samples

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *ROOT.glob("docs/**/*.md")]
)
MADE = ("benchmarks/results/gpu-*.json", "tests/verdicts.json")  # by commands that the documents name
FAMILIES = ("packed", "codebook", "kron")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]*)(?:#([^)\s]*))?\)")
NAMED = re.compile(r"`((?:lowbit|csrc|tests|benchmarks|docs)/[\w./*{},<>-]+)(?::[^`]*)?`")


def text_of(document: str | Path) -> str:
    """The document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def headings(document: Path) -> set[str]:
    """What links call the headings of a document."""
    found = re.findall(r"^#+ (.*)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def spellings(name: str) -> list[str]:
    """``a.{h,cpp}`` -> ``a.h``, ``a.cpp``."""
    parts = [part.split(",") for part in re.split(r"\{([^}]*)\}", name)]
    return ["".join(choice) for choice in product(*parts)]


def exists(name: str) -> bool:
    """Whether such files are there; ``<family>`` stands for any family that has one, ``<name>`` for anything."""
    name = re.sub(r"<(?!family>)\w+>", "*", name)
    families = FAMILIES if "<family>" in name else ("",)
    return name in MADE or all(
        any(any(ROOT.glob(spelling.replace("<family>", family))) for family in families) for spelling in spellings(name)
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for path, heading in LINK.findall(text_of(document)):
        if "://" in path:
            continue
        linked = (ROOT / document).parent / path if path else ROOT / document
        assert linked.exists(), path
        assert not heading or heading in headings(linked), f"{path}#{heading}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    assert [name for name in NAMED.findall(text_of(document)) if not exists(name)] == []


README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_the_readme_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(SNIPPETS) == 3
    code = SNIPPETS[number]
    if "transformers" in code:
        pytest.importorskip("transformers")
        code = code.replace("path/or/id", str(samples.folder("stories260k")))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", sorted((ROOT / "docs" / "tutorials").glob("*.md")), ids=lambda path: path.stem)
def test_the_tutorials_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code = "".join(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL))
    assert code.count("assert torch.equal(") >= 1
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        exec(compile(code, document.name, "exec"), {"__name__": "__main__"})


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.split()) <= 900


def test_what_is_not_there_is_noticed() -> None:
    assert exists("lowbit/<family>/op.py") and exists("csrc/cpu/isa.{h,cpp}") and exists("docs/results/")
    assert exists("lowbit/<room>/family.py") and exists("benchmarks/results/*.json")
    assert not exists("lowbit/<family>/nothing.py") and not exists("csrc/cpu/isa.{h,py}")
    assert NAMED.findall("`lowbit/core/`, `tests/a.py: BITS`, `x/y.py`, lowbit/z.py") == ["lowbit/core/", "tests/a.py"]
    assert "what-is-missed" in headings(ROOT / "docs" / "performance.md")
