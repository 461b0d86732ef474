"""``docs/compatibility.md`` says what its rows find: each row runs here, and is compared with its line."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.0")

import transformers

from benchmarks.compatibility import document, processes
from benchmarks.compatibility.checks import WORKS, Found

WRITTEN = document.lines()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("name", [name for name in document.names() if name not in processes.ROWS])
@pytest.mark.turns(3)
def test_row(name: str) -> None:
    compare(name)


@pytest.mark.turns(2)
def test_rows_of_two_processes() -> None:
    for name in processes.ROWS:
        compare(name)


def compare(name: str) -> None:
    if (package := document.missing(name)) is not None:
        pytest.skip(f"{package} is not installed")
    found = document.examine(name)
    if document.line(name, found) != WRITTEN.get(name):
        unexpected = next(iter(found.errors), None)
        line = document.line(name, found)
        raise AssertionError(f"{document.DOCUMENT.name} does not say what was found:\n{line}") from unexpected


def test_document_has_every_row_and_no_other() -> None:
    assert document.text(WRITTEN) == document.DOCUMENT.read_text(), "python -m benchmarks.compatibility --write"


def test_an_error_becomes_its_words() -> None:
    found = Found()

    def fail() -> None:
        raise ValueError("layer a.b:\n  a|b at 0x7f12 in /tmp/x/y.json")

    found.check("convert", fail)
    found.check("forward", lambda: None)
    assert found.cells == {"convert": r"ValueError: layer a.b: a\|b at 0x… in …", "forward": WORKS}
