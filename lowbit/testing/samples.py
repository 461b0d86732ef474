"""Real trained models and texts that some tests use; they are not part of the package, and may be absent."""

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(os.environ.get("LOWBIT_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def folder(name: str) -> Path:
    """The folder of a sample, or skip the test with the reason."""
    path = DATA / name
    if not path.is_dir():
        pytest.skip(f"sample data {name!r} is absent: no {path} (set LOWBIT_SHARED to the folder above data/)")
    return path


def script(name: str, file: str) -> ModuleType:
    """A sample's Python file as a module."""
    spec = importlib.util.spec_from_file_location(file, folder(name) / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_stories() -> list[str]:
    """The ASCII stories, cleaned as the models were trained on them."""
    stories = json.loads((folder("text") / "tinystories_300.json").read_text())
    return [s for s in (re.sub(r" *\n+ *", "\n", s.strip()) for s in stories) if s.isascii()]
