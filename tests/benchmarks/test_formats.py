"""The table of formats in docs/interoperability.md is what importers, exporters and fixtures say."""

import pytest

pytest.importorskip("transformers", minversion="5.0")

from benchmarks.tools import formats
from lowbit.checkpoint import foreign
from lowbit.checkpoint.importers import READERS


def test_the_document_has_the_table():
    assert formats.text() == formats.DOCUMENT.read_text(encoding="utf-8"), "python -m benchmarks.tools.formats --write"


def test_every_format_and_fixture_is_there():
    table = formats.table()
    assert all(f"| `{name}` |" in table for name in (*foreign.importers, "float", "onnx", "pt2"))
    assert all(f"| {reader.exact} |" in formats.line(reader.format) for reader in READERS)
    folders = [folder.name for folder in (formats.FIXTURES / "foreign").iterdir() if (folder / "model").is_dir()]
    assert all(f"`{name}`" in table for name in (*folders, "libraries.safetensors", "llama.gguf"))
    assert len(folders) > 15
