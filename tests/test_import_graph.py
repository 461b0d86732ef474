"""The imports of the package: no circle, and no arrow from a lower room to a higher one.

Imports inside functions and under ``TYPE_CHECKING`` count like all others, and so do modules that are named by a
string, as ``importlib`` takes them.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit
from lowbit.model import plan, surgery

# Each room may import itself and the rooms below it.
ROOMS = (
    ("core",),
    ("backends",),
    ("nn",),
    ("packed",),
    ("codebook", "kron"),  # neither knows the other
    ("model",),
    ("quality",),
    ("checkpoint", "train"),
    ("integrations",),
    ("", "cli", "compat", "demo", "testing"),  # "": lowbit/__init__.py
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
NOT_SIDEWAYS = {("codebook", "packed")}  # a level apart only because kron stores packed factors

Arrows = dict[str, set[str]]


def modules_of(folder: Path, package: str) -> dict[str, Path]:
    """Every module under ``folder`` by its dotted name; a package by the name of its folder."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def named_in(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """What the statements of a module import: dotted names, of which a part may be a name inside a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            here = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*here, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


def arrows_of(folder: Path, package: str) -> Arrows:
    """Module -> the modules of the package that it imports."""
    modules = modules_of(folder, package)
    arrows: Arrows = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = set(named_in(tree, module, path.name == "__init__.py")) & set(modules)
        # importing a.b runs a/__init__.py first, unless this module is inside a
        outer = {".".join(name.split(".")[:end]) for name in named for end in range(2, name.count(".") + 1)}
        named |= {name for name in outer & set(modules) if not f"{module}.".startswith(f"{name}.")}
        # `from a import b` runs a/__init__.py, but inside a it asks for the module b alone
        inside = {name for name in named if f"{module}.".startswith(f"{name}.")}
        bare = {name for name in inside if not any(other.startswith(f"{name}.") for other in named)}
        arrows[module] = (named - inside | bare) - {module}
    return arrows


def circle(arrows: Arrows) -> list[str] | None:
    """Modules that import each other in a circle, the first one again at the end; ``None`` where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        found = next((found for name in sorted(arrows[module]) if (found := visit(name))), None)
        path.pop()
        done.add(module)
        return found

    return next((found for module in sorted(arrows) if (found := visit(module))), None)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(arrows: Arrows) -> list[tuple[str, str]]:
    """The arrows that point to a higher room, or to another room of the same height."""
    wrong = []
    for module, imported in arrows.items():
        for name in sorted(imported):
            here, there = room(module), room(name)
            up = LEVEL[there] > LEVEL[here]
            sideways = here != there and LEVEL[there] == LEVEL[here] and LEVEL[here] != LEVEL[""]
            if up or sideways or (here, there) in NOT_SIDEWAYS:
                wrong.append((module, name))
    return wrong


ARROWS = arrows_of(Path(lowbit.__file__).parent, "lowbit")


def test_every_module_has_a_room():
    assert {room(module) for module in ARROWS} <= set(LEVEL)


def test_no_module_imports_itself_in_a_circle():
    assert circle(ARROWS) is None


def test_benchmarks_neither_import_in_a_circle_nor_change_the_path():
    folder = Path(__file__).parents[1] / "benchmarks"
    assert circle(arrows_of(folder, "benchmarks")) is None
    assert [path.name for path in folder.rglob("*.py") if "sys.path" in path.read_text(encoding="utf-8")] == []


def test_imports_point_down():
    assert upward(ARROWS) == []


def test_what_left_the_module_convert_is_found_there():
    old = importlib.import_module("lowbit.convert")
    assert old.make_plan is plan.make_plan and old.Target is plan.Swap and old.swap is surgery.put
    assert old.convert is lowbit.convert and old.dequantize is lowbit.dequantize


PLANTED = {
    "at the top": "from package.model import a",
    "of a name": "from package.model.a import name",
    "in a function": "def f():\n    from package.model import a",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import package.model.a",
    "relative": "from ..model.a import name",
    "by a string": "import importlib\nimportlib.import_module('package.model.a')",
}


@pytest.mark.parametrize("statement", PLANTED.values(), ids=PLANTED)
def test_a_planted_circle_is_found(statement, tmp_path):
    for name, text in {"__init__": "", "model/__init__": "", "model/a": "import package.core.b",
                       "core/__init__": "", "core/b": statement}.items():  # fmt: skip
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    arrows = arrows_of(tmp_path, "package")
    assert circle(arrows) == ["package.core.b", "package.model.a", "package.core.b"]
    assert ("package.core.b", "package.model.a") in upward(arrows)
    (tmp_path / "core/b.py").write_text("")
    assert circle(arrows_of(tmp_path, "package")) is None
