"""Planted mistakes: a wrong text in place of the right one, in a copy of a module that the kernels of a family use."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@dataclass(frozen=True)
class Mistake:
    """``wrong`` for ``right`` in the source of a module, and which cases it spoils."""

    module: str
    right: str
    wrong: str
    spoils: Callable[[Any], Any] = lambda case: True


def plant(mistake: Mistake, importers: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a changed copy of a module, and copies of the modules that import it, where ops find them; in this order."""
    for name in dict.fromkeys((mistake.module, *importers)):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text, copy = Path(spec.origin).read_text(), folder / f"{name}.py"
        if name == mistake.module:
            assert text.count(mistake.right) == 1, (
                f"{mistake.right!r} must be in {name} once: got {text.count(mistake.right)}"
            )
            text = text.replace(mistake.right, mistake.wrong)
        copy.write_text(text)
        monkeypatch.setitem(sys.modules, name, load(name, copy))


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
