"""What benchmarks import from each other, and from lowbit, is there: most of them are run by hand, and seldom."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import benchmarks

ROOT = Path(benchmarks.__file__).parent


def file_of(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] == "benchmarks":
        base = ROOT.joinpath(*parts[1:])
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(found.origin) if found is not None and found.origin is not None else None


def defined(path: Path) -> Iterator[str]:
    """Names that a module has after its top level has run."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)


def test_imported_names_exist() -> None:
    missing, seen = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if not isinstance(node, ast.ImportFrom) or module.partition(".")[0] not in ("benchmarks", "lowbit"):
                continue
            source = file_of(module)
            names = set() if source is None else set(defined(source))
            for alias in node.names:
                seen += 1
                if alias.name not in names and file_of(f"{module}.{alias.name}") is None:
                    missing.append(f"{path.relative_to(ROOT)}: from {module} import {alias.name}")
    assert not missing and seen > 100
