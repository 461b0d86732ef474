"""A record of verdicts: tests that are pure functions of source texts need not run again while these stay.

What Triton's interpreter and the PTX emulator say depends on nothing but the kernels, the emulators, the tests and the
compiler. A test that is marked ``recorded(*modules)`` has a fingerprint: a hash of

- its file, ``tests/conftest.py``, the named modules, and all modules of the project that any of these import, without
  comments, docstrings and line breaks; and the data files (``*.json``) in the modules' folders;
- with ``recorded(..., sources=["csrc/cuda"])``, the C++ and CUDA texts in these folders, without comments, and the
  versions of g++ and nvcc: what is emulated is compiled from them;
- the versions of torch, numpy and triton, and the kind of machine.

The record (``tests/verdicts.json``) holds, for each file of tests, the fingerprint and which tests passed under it.

- ``pytest`` runs everything and looks at no record.
- ``pytest --verdicts`` skips what passed under the same fingerprint, but for a sample: one test of each file, and about
  one in forty of the others. Every commit has another sample, so that a record that is wrong is noticed. Files whose
  tests compile sources rest while their fingerprint is that of the record, but for one in eight at a commit: nothing
  of them runs, nor what was in turn at another commit.
- ``pytest --record`` writes into the record what passed; with ``--verdicts`` it runs only what is not in it.

Other tests of many combinations of parameters run a part of these with ``--verdicts``: every value of every parameter
once, and which values meet is another choice at another commit. Of tests marked ``turns(n)``, because they take long,
one in n runs: of a test without parameters, at one commit in n.

Where there is a GPU, everything runs. Tests by hypothesis, whose examples are random, are never recorded.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.testing.where import Where

Record = dict[str, dict[str, Any]]  # by file: {"fingerprint": str, "passed": {test: [parameters]}, "failed": [name]}

PROJECT = ("lowbit", "benchmarks")
PACKAGES = ("torch", "numpy", "triton")
SAMPLE, COMPILED_FILES = 40, 8
COMPILED = (".cu", ".cuh", ".cpp", ".h")
MARKER = "recorded(*modules, sources=()): its verdict depends on these modules and folders, its file, and their imports"

TURNS = "turns(n): it takes long, so `make test` runs one in n of its parameters, or of its commits"


def where_params(everywhere: Iterable[Where], *modules: str) -> list[Any]:
    """Parameters of a fixture: the interpreter's tests are marked ``recorded(*modules)``, the others always run."""
    interpreted = pytest.mark.recorded(*modules)
    return [pytest.param(where, marks=interpreted) if where == Where("triton") else where for where in everywhere]


# ----------------------------------------------------------------------------------------------------- fingerprints


def essence(source: str) -> str:
    """A Python text without what does not run: comments, docstrings, line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


class Sources:
    """The project's modules below ``root``, and what each of them imports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._texts: dict[Path, str] = {}
        self._imports: dict[Path, frozenset[Path]] = {}
        self._public = self._names_of(root / "lowbit" / "__init__.py")

    @staticmethod
    def _names_of(facade: Path) -> dict[str, str]:
        """What a name of ``lowbit`` is in full: the facade imports everything, so only names that are used count."""
        nodes = ast.walk(ast.parse(facade.read_text(encoding="utf-8"))) if facade.is_file() else iter(())
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def file_of(self, name: str) -> Path | None:
        """The file of a module, or of that which ``name`` is in; None for the facade and for other projects."""
        parts = name.split(".")
        for length in (len(parts), len(parts) - 1):
            path = self.root.joinpath(*parts[:length])
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if parts[0] in PROJECT and length and parts[:length] != ["lowbit"] and file.is_file():
                    return file
        return None

    def imports(self, file: Path) -> frozenset[Path]:
        """The files of the project that a file imports, anywhere in it."""
        if file not in self._imports:
            package = file.relative_to(self.root).parent.parts
            names: set[str] = set()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    above = package[: len(package) + 1 - node.level] if node.level else ()
                    module = ".".join([*above, *([node.module] if node.module else [])])
                    names.update(f"{module}.{alias.name}" for alias in node.names)
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lowbit":
                    names.add(f"lowbit.{node.attr}")
            public = [self._public[name[7:]] for name in names if name[:7] == "lowbit." and name[7:] in self._public]
            found = {self.file_of(name) for name in (*names, *public)}
            self._imports[file] = frozenset(path for path in found if path is not None)
        return self._imports[file]

    def closure(self, files: Iterable[Path]) -> list[Path]:
        """These files and all that they import, directly or not."""
        found: set[Path] = set()
        waiting = list(files)
        while waiting:
            file = waiting.pop()
            if file not in found and file.resolve() != Path(__file__).resolve():  # what is here decides no verdict
                found.add(file)
                waiting += self.imports(file)
        return sorted(found)

    def text(self, file: Path) -> str:
        if file not in self._texts:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".py":
                text = essence(text)
            elif file.suffix in COMPILED:
                text = re.sub(r"\s*//[^\n]*", "", text)
            self._texts[file] = text
        return self._texts[file]

    def of(self, test_file: Path, modules: Iterable[str], folders: Iterable[str] = ()) -> list[Path]:
        """What the verdicts of a file of tests depend on; ``folders`` have sources that it compiles."""
        files = [test_file]
        if (conftest := self.root / "tests" / "conftest.py").is_file():
            files.append(conftest)
        for module in modules:
            file = self.file_of(module)
            if file is None:
                known = " or ".join(PROJECT)
                raise pytest.UsageError(f"{module} must be a module of {known}: there is none (marked in {test_file})")
            files.append(file)
        files = self.closure(files)
        packages = {file.parent for file in files if file.is_relative_to(self.root / "lowbit")}
        compiled = {file for name in folders for file in self.root.joinpath(name).rglob("*")}
        return [
            *files,
            *sorted(data for folder in packages for data in folder.glob("*.json")),
            *sorted(file for file in compiled if file.suffix in COMPILED),
        ]

    def fingerprint(self, test_file: Path, modules: Iterable[str], folders: Sequence[str] = ()) -> str:
        digest = hashlib.sha256("\n".join((*surroundings(), *(compilers() if folders else ()))).encode())
        for file in self.of(test_file, modules, folders):
            digest.update(f"\n{file.relative_to(self.root)}\n{self.text(file)}".encode())
        return digest.hexdigest()[:16]


@cache
def surroundings() -> tuple[str, ...]:
    """What besides the project's texts a verdict depends on."""
    found = [platform.machine()]
    for package in PACKAGES:
        try:
            found.append(f"{package} {'.'.join(version(package).split('.')[:2])}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return tuple(found)


@cache
def compilers() -> tuple[str, ...]:
    """What compiles the sources that tests ask for."""
    found = []
    for command in (["g++", "-dumpfullversion"], ["nvcc", "--version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            found.append(f"{command[0]} {done.stdout.strip()}")
        except OSError:
            found.append(f"no {command[0]}")
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- the record


def parts(nodeid: str) -> tuple[str, str, str]:
    """(file, test, parameters) of a test's name."""
    file, _, rest = nodeid.partition("::")
    test, _, parameters = rest.partition("[")
    return file, test, parameters.removesuffix("]")


def holds(record: Record, nodeid: str, fingerprint: str) -> bool:
    """Whether the record says that the test passed under this fingerprint."""
    file, test, parameters = parts(nodeid)
    entry = record.get(file, {})
    return entry.get("fingerprint") == fingerprint and parameters in entry["passed"].get(test, ())


def updated(record: Record, verdicts: dict[str, tuple[str, bool]], exists: Callable[[str], bool]) -> Record:
    """The record with more verdicts, by name of the test: (fingerprint, whether it passed)."""
    passed = {file: {test: set(names) for test, names in entry["passed"].items()} for file, entry in record.items()}
    failed = {file: set(entry.get("failed", ())) for file, entry in record.items()}
    marks = {file: entry["fingerprint"] for file, entry in record.items()}
    for nodeid, (fingerprint, good) in verdicts.items():
        file, test, parameters = parts(nodeid)
        if marks.get(file) != fingerprint:
            marks[file], passed[file], failed[file] = fingerprint, {}, set()
        names = passed[file].setdefault(test, set())
        (names.add if good else names.discard)(parameters)
        (failed[file].discard if good else failed[file].add)(nodeid.partition("::")[2])
    found: Record = {}
    for file, tests in sorted(passed.items()):
        if exists(file) and any(tests.values()):
            names_of = {test: sorted(names) for test, names in sorted(tests.items()) if names}
            found[file] = {"fingerprint": marks[file], "passed": names_of}
            if failed[file]:
                found[file]["failed"] = sorted(failed[file])
    return found


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def write(path: Path, record: Record) -> None:
    """One line for each test."""
    lines = []
    for file, entry in record.items():
        tests = [f"   {json.dumps(test)}: {json.dumps(names)}" for test, names in entry["passed"].items()]
        mark = json.dumps(entry["fingerprint"])
        failed = f', "failed": {json.dumps(entry["failed"])}' if "failed" in entry else ""
        text = ",\n".join(tests)
        lines.append(f' {json.dumps(file)}: {{"fingerprint": {mark}, "passed": {{\n{text}}}{failed}}}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def chance(seed: str, name: str) -> int:
    """A number below 2**64, as if by chance; another for another seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def resting(compiled: Iterable[str], seed: str) -> set[str]:
    """Of files that compile, those that are not in turn: all but about one in :data:`COMPILED_FILES`."""
    return {file for file in compiled if chance(seed, file) % COMPILED_FILES}


def sample(nodeids: Iterable[str], seed: str, out: Collection[str] = ()) -> set[str]:
    """One test of each file but those in ``out``, and of the others about one in :data:`SAMPLE`; another choice for
    another seed."""
    nodeids = [nodeid for nodeid in nodeids if parts(nodeid)[0] not in out]
    first: dict[str, str] = {}
    for nodeid in sorted(nodeids, key=lambda nodeid: chance(seed, nodeid)):
        first.setdefault(parts(nodeid)[0], nodeid)
    return {*first.values(), *(nodeid for nodeid in nodeids if chance(seed, nodeid) % SAMPLE == 0)}


def values_of(item: pytest.Item) -> frozenset[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The value of each parameter; names that were given together are one, with a value for each of their rows."""
    params: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    together = []
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs["argnames"]
        together.append(tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names)))
    together += [(name,) for name in params.keys() - {name for names in together for name in names}]
    # what a parametrization lists is one object in all its tests
    return frozenset((names, tuple(id(params[name]) for name in names if name in params)) for names in together)


def combinations(items: Iterable[pytest.Item], seed: str) -> set[str]:
    """Tests in which every value of every parameter is, of those that a function has: names.

    They are taken in an order that ``seed`` says, and a test none of whose values is wanted any more is left out. So a
    function of one parameter has all its tests, but where it is marked ``turns(n)``: then the first of its n-th part,
    and of what is left over by n one more, at as large a part of all commits.
    """
    found: set[str] = set()
    seen: set[object] = set()
    items = sorted(items, key=lambda item: chance(seed, item.nodeid))
    function = {item.nodeid: item.nodeid.partition("[")[0] for item in items}
    count, taken = Counter(function.values()), Counter[str]()
    for item in items:
        name, values = function[item.nodeid], values_of(item)
        turns = item.get_closest_marker("turns")
        n = turns.args[0] if turns else 1
        room = count[name] // n + (chance(seed, name) % n < count[name] % n)
        if taken[name] < room and (not values or any((name, value) not in seen for value in values)):
            found.add(item.nodeid)
            taken[name] += 1
            seen.update((name, value) for value in values)
    return found


def commit(root: Path) -> str:
    """The commit that is checked out; without one, a constant."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return "no git"
    return done.stdout.strip() or "no commit"


def turn_of(choices: int, root: Path) -> int:
    """Another number below ``choices`` at another commit."""
    return int(hashlib.sha256(commit(root).encode()).hexdigest(), 16) % choices


def in_turn(config: pytest.Config, number: int, choices: int) -> bool:
    """Whether a case runs at this commit; all do where verdicts are not trusted."""
    return not config.getoption("verdicts") or number % choices == turn_of(choices, config.rootpath)


def only_in_turn(config: pytest.Config, number: int, choices: int) -> None:
    """Where verdicts are trusted, skip a test but at every ``choices``-th commit; ``number`` says at which."""
    if not in_turn(config, number, choices):
        pytest.skip("`make test` runs a sample of these, another at another commit; `make test-all` runs all")


# ------------------------------------------------------------------------------------------------------- the plugin


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("verdicts", "recorded verdicts (lowbit.testing.verdicts)")
    group.addoption("--verdicts", action="store_true", help="skip tests that the record says pass, but for a sample")
    group.addoption("--record", action="store_true", help="write into the record which marked tests passed")
    group.addoption("--verdict-file", default="tests/verdicts.json", help="the record, below the root folder")


class Verdicts:
    """The plugin. In a run by xdist there is one in each worker, and the controller's writes the record."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path = config.rootpath / config.getoption("verdict_file")
        self.worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        self.seed = self.worker["verdict_seed"] if self.worker else commit(config.rootpath)
        self.verdicts: dict[str, tuple[str, bool]] = {}
        self.skipped: set[str] = set()
        self.compiled: set[str] = set()  # files whose tests compile sources
        config.addinivalue_line("markers", MARKER)
        config.addinivalue_line("markers", TURNS)

    @property
    def on_gpu(self) -> bool:
        return os.environ.get("LOWBIT_TEST_DEVICE") == "cuda" or torch.cuda.is_available()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["verdict_seed"] = self.seed

    def marked(self, items: Iterable[pytest.Item]) -> Iterator[tuple[pytest.Item, str]]:
        """The tests whose verdicts may be recorded, with their fingerprints."""
        sources = Sources(self.config.rootpath)
        known: dict[Path, str] = {}
        by_file: dict[Path, set[str]] = {}
        folders: dict[Path, set[str]] = {}
        chosen = []
        for item in items:
            markers = list(item.iter_markers("recorded"))
            by_chance = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            if markers and not by_chance:
                by_file.setdefault(item.path, set()).update(*(marker.args for marker in markers))
                folders.setdefault(item.path, set()).update(*(m.kwargs.get("sources", ()) for m in markers))
                chosen.append(item)
        self.compiled = {parts(item.nodeid)[0] for item in chosen if folders[item.path]}
        for item in chosen:
            path = item.path
            if path not in known:
                known[path] = sources.fingerprint(path, sorted(by_file[path]), sorted(folders[path]))
            yield item, known[path]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        trusting, recording = self.config.getoption("verdicts"), self.config.getoption("record")
        if self.on_gpu or not (trusting or recording):
            return
        record = read(self.path)
        marked = list(self.marked(items))
        held = [item.nodeid for item, mark in marked if trusting and holds(record, item.nodeid, mark)]
        out = resting(self.compiled, self.seed)
        again = sample(held, self.seed, out)
        held_ids = set(held)
        if trusting and not recording:
            self.take_turns(items, {item.nodeid for item, _ in marked})
        for item, mark in marked:
            if item.nodeid in held_ids and item.nodeid not in again:
                item.add_marker(pytest.mark.skip(reason=f"the record says that these pass (fingerprint {mark})"))
                self.skipped.add(item.nodeid)
            elif trusting and not recording and self.rests(item, mark, out, record):
                item.add_marker(pytest.mark.skip(reason="its sources are those of the record: it runs in turn"))
                self.skipped.add(item.nodeid)
            else:
                item.user_properties.append(("fingerprint", mark))
                item.user_properties.append(("recorded", item.nodeid in held_ids))

    @staticmethod
    def rests(item: pytest.Item, mark: str, out: Collection[str], record: Record) -> bool:
        """Whether nothing of the test's file runs: another is in turn, and nothing failed under this fingerprint."""
        file = parts(item.nodeid)[0]
        entry = record.get(file, {})
        return file in out and entry.get("fingerprint") == mark and "failed" not in entry

    def take_turns(self, items: list[pytest.Item], marked: set[str]) -> None:
        """Leave out, of tests whose verdicts are not recorded, combinations of parameters that are not in turn."""
        chosen = combinations((item for item in items if item.nodeid not in marked), self.seed)
        left_out = [item for item in items if item.nodeid not in marked and item.nodeid not in chosen]
        if left_out:
            items[:] = [item for item in items if item.nodeid in marked or item.nodeid in chosen]
            self.config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and dict(item.user_properties).get("recorded"):
            name = self.path.relative_to(self.config.rootpath)
            report.sections.append(("verdict", f"{name} says that this test passes: the record is stale"))
        if report.skipped and item.nodeid in self.skipped and isinstance(report.longrepr, tuple):
            report.longrepr = (str(item.path), 1, report.longrepr[2])  # the summary has one line for each file
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a verdict: passed is what passed its call, and did not fail before or after it."""
        mark = dict(report.user_properties).get("fingerprint")
        if self.worker is None and isinstance(mark, str):
            if report.failed:
                self.verdicts[report.nodeid] = (mark, False)
            elif report.when == "call" and report.passed:
                self.verdicts.setdefault(report.nodeid, (mark, True))

    def pytest_sessionfinish(self) -> None:
        if self.worker is None and self.config.getoption("record") and self.verdicts:
            exists = (self.config.rootpath).joinpath
            record = updated(read(self.path), self.verdicts, lambda file: exists(file).is_file())
            write(self.path, record)
