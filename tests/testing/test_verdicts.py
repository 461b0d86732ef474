"""The record of verdicts: what it skips, what it must never skip, and that a stale record is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.testing import verdicts
from lowbit.testing.verdicts import Sources, essence, holds, parts, resting, sample, updated, where_params
from lowbit.testing.where import Where

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
from lowbit.testing import verdicts

def pytest_addoption(parser):
    verdicts.add_options(parser)

def pytest_configure(config):
    config.pluginmanager.register(verdicts.Verdicts(config), "verdicts")
"""
TESTS = """
import os, pytest
from pathlib import Path

@pytest.mark.recorded("lowbit.kernel")
@pytest.mark.parametrize("n", range(5))
def test_marked(n):
    assert str(n) not in os.environ.get("WRONG", "")

def test_other():
    pass
"""


# plugins that cost time and have no say here
WITHOUT = [option for name in ("cacheprovider", "benchmark", "hypothesispytest") for option in ("-p", f"no:{name}")]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with a kernel that nobody imports, five marked tests and one that is not."""
    monkeypatch.delenv("LOWBIT_TEST_DEVICE", raising=False)
    monkeypatch.setattr(verdicts.torch.cuda, "is_available", lambda: False)
    pytester.makefile(".toml", pyproject="[tool.pytest.ini_options]\n")
    texts = {"lowbit/kernel.py": "SIZE = 1\n", "tests/conftest.py": CONFTEST, "tests/test_a.py": TESTS}
    for name, text in texts.items():
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return pytester


def outcomes(project: pytest.Pytester, *options: str) -> dict[str, int]:
    return run(project, *options).parseoutcomes()


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    return project.runpytest("tests", *WITHOUT, *options)


def passed(project: pytest.Pytester) -> dict[str, list[str]]:
    """What the record says of the file."""
    record = verdicts.read(project.path / "tests/verdicts.json")
    found: dict[str, list[str]] = record["tests/test_a.py"]["passed"]
    return found


def failed(project: pytest.Pytester) -> list[str]:
    found: list[str] = verdicts.read(project.path / "tests/verdicts.json")["tests/test_a.py"].get("failed", [])
    return found


def change(project: pytest.Pytester, name: str, *texts: str) -> None:
    path = project.path / name
    path.write_text(path.read_text().replace(*texts) if len(texts) == 2 else texts[0])


def test_what_passed_is_skipped_but_for_a_sample(project) -> None:
    assert outcomes(project, "--record") == {"passed": 6}
    assert outcomes(project, "--verdicts") == {"passed": 2, "skipped": 4}
    assert outcomes(project) == {"passed": 6}


@pytest.mark.parametrize(
    ("name", "texts", "runs"),
    [
        ("lowbit/kernel.py", ("SIZE = 2\n",), True),
        ("lowbit/kernel.py", ("SIZE = 1  # of a block\n",), False),
        ("lowbit/kernel.py", ('"""A kernel."""\nSIZE = (\n    1\n)\n',), False),
        ("tests/test_a.py", ("pass", "assert True"), True),
        ("tests/conftest.py", ("import verdicts\n", "import verdicts\nOTHER = 1\n"), True),
        ("lowbit/other.py", ("SIZE = 2\n",), False),
    ],
)
def test_a_changed_source_runs_and_a_comment_does_not(project, name: str, texts: Any, runs: bool) -> None:
    (project.path / "lowbit/other.py").write_text("")
    outcomes(project, "--record")
    change(project, name, *texts)
    assert outcomes(project, "--verdicts") == ({"passed": 6} if runs else {"passed": 2, "skipped": 4})


@pytest.mark.parametrize(
    ("name", "text", "runs"),
    [
        ("csrc/cuda/a.cuh", "int b;  // one\n", True),
        ("csrc/cuda/a.cuh", "int a;  // another\n", False),
        ("csrc/cuda/more/b.h", "int b;\n", True),
        ("csrc/cuda/README.md", "int b;\n", False),
        ("csrc/cpu/a.h", "int b;\n", False),
    ],
)
def test_a_changed_source_that_is_compiled_runs(project, name: str, text: str, runs: bool, monkeypatch) -> None:
    monkeypatch.setattr(verdicts, "COMPILED_FILES", 1)
    change(project, "tests/test_a.py", '"lowbit.kernel"', '"lowbit.kernel", sources=["csrc/cuda"]')
    (project.path / "csrc/cuda").mkdir(parents=True)
    (project.path / "csrc/cuda/a.cuh").write_text("int a;  // one\n")
    assert outcomes(project, "--record") == {"passed": 6}
    (project.path / name).parent.mkdir(parents=True, exist_ok=True)
    (project.path / name).write_text(text)
    assert outcomes(project, "--verdicts") == ({"passed": 6} if runs else {"passed": 2, "skipped": 4})
    monkeypatch.setattr(verdicts, "compilers", lambda: ("another g++",))
    assert outcomes(project, "--verdicts") == {"passed": 6}


CHOOSING = """
import pytest
from lowbit.testing import verdicts

@pytest.mark.recorded("lowbit.kernel", sources=["csrc/cuda"])
@pytest.mark.parametrize("n", range(6))
def test_marked(n, request):
    verdicts.only_in_turn(request.config, n, 3)
    assert n != WRONG

def test_other():
    pass
"""


def test_a_file_that_compiles_rests_while_nothing_changed(project, monkeypatch) -> None:
    """Also what is not held, as it was not in turn when the record was made; not where something failed."""
    change(project, "tests/test_a.py", CHOOSING.replace("WRONG", "6"))
    monkeypatch.setattr(verdicts, "turn_of", lambda choices, root: 1)
    assert outcomes(project, "--verdicts", "--record") == {"passed": 3, "skipped": 4}
    monkeypatch.setattr(verdicts, "turn_of", lambda choices, root: 2)
    monkeypatch.setattr(verdicts, "resting", lambda compiled, seed: set())
    assert outcomes(project, "--verdicts") == {"passed": 3, "skipped": 4}  # the sample of what is held is not in turn
    monkeypatch.setattr(verdicts, "resting", lambda compiled, seed: set(compiled))
    assert outcomes(project, "--verdicts") == {"passed": 1, "skipped": 6}
    change(project, "lowbit/kernel.py", "SIZE = 2\n")
    assert outcomes(project, "--verdicts") == {"passed": 3, "skipped": 4}
    change(project, "tests/test_a.py", "6))", "6))  # ")
    change(project, "tests/test_a.py", "n != 6", "n != 5")
    assert outcomes(project, "--verdicts", "--record") == {"passed": 2, "failed": 1, "skipped": 4}
    assert outcomes(project, "--verdicts") == {"passed": 1, "failed": 1, "skipped": 5}


def test_other_versions_run(project, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes(project, "--record")
    monkeypatch.setattr(verdicts, "surroundings", lambda: ("another triton",))
    assert outcomes(project, "--verdicts") == {"passed": 6}


def test_a_test_that_is_not_in_the_record_runs(project) -> None:
    outcomes(project, "--record")
    record = project.path / "tests/verdicts.json"
    held = json.loads(record.read_text())
    del held["tests/test_a.py"]["passed"]["test_marked"][1:]
    record.write_text(json.dumps(held))
    assert outcomes(project, "--verdicts") == {"passed": 6}  # one of them as the sample


def test_a_failure_is_never_recorded_and_what_is_missing_can_be_added(project, monkeypatch) -> None:
    monkeypatch.setenv("WRONG", "3")
    assert outcomes(project, "--record") == {"passed": 5, "failed": 1}
    assert passed(project) == {"test_marked": ["0", "1", "2", "4"]}
    assert failed(project) == ["test_marked[3]"]
    assert outcomes(project, "--verdicts") == {"passed": 2, "failed": 1, "skipped": 3}
    monkeypatch.delenv("WRONG")
    assert outcomes(project, "--verdicts", "--record") == {"passed": 3, "skipped": 3}
    assert failed(project) == []
    assert outcomes(project, "--verdicts") == {"passed": 2, "skipped": 4}


def test_a_verdict_that_became_wrong_leaves_the_record(project, monkeypatch) -> None:
    outcomes(project, "--record")
    monkeypatch.setenv("WRONG", "2")
    outcomes(project, "--record")
    assert passed(project) == {"test_marked": ["0", "1", "3", "4"]}


def test_a_stale_record_is_caught_by_the_sample(project, monkeypatch) -> None:
    outcomes(project, "--record")
    monkeypatch.setenv("WRONG", "01234")
    result = run(project, "--verdicts")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*tests/verdicts.json says that this test passes: the record is stale*"])


def test_every_commit_has_another_sample(project, monkeypatch) -> None:
    """Before long, each test was in one."""
    outcomes(project, "--record")
    names = [f"tests/test_a.py::test_marked[{n}]" for n in range(5)]
    seeds = {min(sample(names, seed)): seed for seed in map(str, range(40)) if len(sample(names, seed)) == 1}
    assert sorted(seeds) == names
    monkeypatch.setenv("WRONG", "4")
    for name in names[3:]:
        monkeypatch.setattr(verdicts, "commit", lambda root, seed=seeds[name]: seed)
        assert ("failed" in outcomes(project, "--verdicts")) == (name == names[4])


@pytest.mark.parametrize("gpu", ["environment", "torch"])
def test_on_a_gpu_everything_runs(project, monkeypatch, gpu: str) -> None:
    outcomes(project, "--record")
    if gpu == "environment":
        monkeypatch.setenv("LOWBIT_TEST_DEVICE", "cuda")
    else:
        monkeypatch.setattr(verdicts.torch.cuda, "is_available", lambda: True)
    assert outcomes(project, "--verdicts") == {"passed": 6}


def test_a_module_that_is_not_there_is_an_error(project) -> None:
    change(project, "tests/test_a.py", '"lowbit.kernel"', '"lowbit.colonel"')
    result = run(project, "--record")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*lowbit.colonel must be a module of lowbit or benchmarks: there is none*"])


def test_workers_agree(project, monkeypatch) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others take seconds to import in each process
    command = ("tests", *WITHOUT, "-p", "xdist.plugin", "-n", "2")
    outcomes(project, "--record", "-k", "0 or 1 or 2")
    done = project.runpytest_subprocess(*command, "--record", "--verdicts")  # starting processes takes longest: one run
    assert done.parseoutcomes() == {"passed": 4, "skipped": 2} and len(passed(project)["test_marked"]) == 5


COMBINED = """
import itertools, pytest

@pytest.fixture(params=["w0", "w1", "w2", "w3", "w4"])
def where(request):
    return request.param

@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("dtype", ["d0", "d1", "d2"])
def test_product(where, bits, dtype): pass

@pytest.mark.parametrize(("a", "b"), itertools.product(["a0", "a1", "a2"], ["b0", "b1", "b2"]))
def test_rows(a, b): pass

@pytest.mark.parametrize("bits", range(8))
def test_one(bits): pass

@pytest.mark.turns(3)
@pytest.mark.parametrize("bits", range(8))
def test_slow(bits): pass

@pytest.mark.recorded()
@pytest.mark.parametrize("a", range(9))
@pytest.mark.parametrize("b", range(9))
def test_recorded(a, b): pass
"""


def test_combinations_take_turns_and_every_value_has_its_tests(project, monkeypatch) -> None:
    """Of what was listed in rows, or beside nothing, or what is to be recorded, nothing is left out unless marked."""
    (project.path / "tests/test_b.py").write_text(COMBINED)
    seen = []
    for seed in ("one commit", "one commit", "another"):
        monkeypatch.setattr(verdicts, "commit", lambda _, seed=seed: seed)
        out = run(project, "--verdicts", "-v").stdout.str()
        names = [line.split("::")[1].split()[0] for line in out.splitlines() if "PASSED" in line]
        tests = ("product", "rows", "one", "slow", "recorded")
        ran = {test: [n for n in names if n.startswith(f"test_{test}[")] for test in tests}
        assert [len(ran[test]) for test in ("rows", "one", "recorded")] == [9, 8, 81]
        assert len(ran["slow"]) in (2, 3)  # a third of 8
        assert 8 <= len(ran["product"]) < 30
        values = [f"w{i}" for i in range(5)] + [f"d{i}" for i in range(3)] + [f"-{i}" for i in range(8)]
        found = [name.replace("]", "-") for name in ran["product"]]
        assert all(any(f"{value}-" in name for name in found) for value in values)
        seen.append(names)
    assert seen[0] == seen[1] != seen[2]
    assert len([line for line in run(project, "-v").stdout.lines if "PASSED" in line]) == 120 + 9 + 8 + 8 + 81 + 6


def test_examples_by_chance_are_never_recorded(project) -> None:
    change(
        project,
        "tests/test_a.py",
        "def test_other",
        "from hypothesis import given, strategies\n@pytest.mark.recorded()\n@given(strategies.none())\ndef test_other",
    )
    change(project, "tests/test_a.py", "test_other()", "test_other(n)")
    outcomes(project, "--record")
    assert list(passed(project)) == ["test_marked"]


# ------------------------------------------------------------------------------------------------------ its parts


def test_names_are_taken_apart() -> None:
    assert parts("tests/a/test_b.py::Class::test_c[x[1]-y]") == ("tests/a/test_b.py", "Class::test_c", "x[1]-y")
    assert parts("tests/a/test_b.py::test_c") == ("tests/a/test_b.py", "test_c", "")


def test_essence_is_what_runs() -> None:
    assert essence('"""What."""\ndef f():\n    "Why."\n    # how\n    return 1\n') == "def f():\n    return 1"
    assert essence('class Error(Exception):\n    """Wrong."""\n') == "class Error(Exception):\n    pass"
    assert essence("x = 'text'\n") != essence("x = 'test'\n")


def test_the_record_is_merged_by_fingerprint() -> None:
    found = {"a.py::t[1]": ("f", True), "a.py::t[2]": ("f", True), "b.py::t": ("g", True)}
    record = updated({}, found, lambda file: True)
    assert holds(record, "a.py::t[1]", "f") and holds(record, "b.py::t", "g")
    assert not holds(record, "a.py::t[1]", "other") and not holds(record, "a.py::t[3]", "f")
    record = updated(record, {"a.py::t[3]": ("f", True), "a.py::t[1]": ("f", False)}, lambda file: True)
    assert record["a.py"]["passed"] == {"t": ["2", "3"]}
    record = updated(record, {"a.py::t[1]": ("h", True)}, lambda file: file != "b.py")  # b.py is gone
    assert record == {"a.py": {"fingerprint": "h", "passed": {"t": ["1"]}}}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = {'a.py::t["x"]': ("f", True), "b.py::t": ("g", True), "b.py::u": ("g", True)}
    record = updated({}, found, lambda file: True)
    verdicts.write(tmp_path / "r.json", record)
    assert verdicts.read(tmp_path / "r.json") == record
    assert verdicts.read(tmp_path / "none.json") == {}


def test_the_sample_has_one_of_each_file_and_few_others() -> None:
    names = [f"tests/{file}.py::test[{i}]" for file in "abc" for i in range(400)]
    for seed in "12":
        assert {parts(name)[0] for name in sample(names, seed)} == {f"tests/{file}.py" for file in "abc"}
        assert 10 < len(sample(names, seed)) < 60
    assert sample(names, "1") != sample(names, "2") and sample([], "1") == set()


def test_files_that_compile_take_turns() -> None:
    files = [f"tests/{file}.py" for file in "abcdefghijklmnop"]
    names = [f"{file}::test[{i}]" for file in files for i in range(40)]
    found = [
        {parts(name)[0] for name in sample(names, str(seed), resting(files[1:], str(seed)))} for seed in range(100)
    ]
    assert set().union(*found) == set(files)
    assert all(files[0] in chosen for chosen in found)
    assert sum(map(len, found)) == pytest.approx(100 * (1 + 15 / verdicts.COMPILED_FILES), rel=0.2)


def test_only_the_interpreters_parameters_are_marked() -> None:
    native, interpreted = where_params([Where("cpu", "avx2"), Where("triton")], "lowbit.packed.triton")
    assert native == Where("cpu", "avx2") and [mark.args for mark in interpreted.marks] == [("lowbit.packed.triton",)]
    assert where_params([Where("triton", device="cuda")]) == [Where("triton", device="cuda")]


# ---------------------------------------------------------------------------------------------- what ours depend on

BELOW = ("backends/__init__.py", "backends/ops.py", "backends/triton/backend.py", "backends/cpu/backend.py")
BELOW += ("backends/registry.py", "backends/reference.py", "backends/layouts.py", "core/bitpack.py")
TRITON = ("launch.py", "tuning.py", "tuned.json", "tiles.py", "checks.py", "activations.py")
ORACLE = ("numerics.py", "packed_cases.py", "where.py", "interpreter.py")


@pytest.mark.parametrize("family", ["packed", "codebook", "kron"])
def test_verdicts_of_kernels_depend_on_all_below_them(family: str) -> None:
    modules = ["lowbit.backends", f"lowbit.{family}.op", f"lowbit.{family}.triton"]
    found = Sources(ROOT).of(ROOT / f"tests/{family}/test_kernels.py", modules)
    names = {str(path.relative_to(ROOT)) for path in found}
    wanted = [*BELOW, f"{family}/op.py", f"{family}/triton.py", f"testing/{family}_cases.py"]
    wanted += [f"backends/triton/{name}" for name in TRITON] + [f"testing/{name}" for name in ORACLE]
    assert {f"lowbit/{name}" for name in wanted} | {"tests/conftest.py", f"tests/{family}/test_kernels.py"} <= names
    others = {"packed", "codebook", "kron"} - {family}
    assert not names & {f"lowbit/{other}/triton.py" for other in others} and "lowbit/__init__.py" not in names


def test_verdicts_of_emulated_kernels_depend_on_their_sources() -> None:
    found = Sources(ROOT).of(ROOT / "tests/cuda/test_experts.py", [], ["csrc/common", "csrc/cuda"])
    names = {str(path.relative_to(ROOT)) for path in found}
    wanted = {"cuda/experts.cuh", "cuda/packed/experts.cu", "cuda/emulated/emulation.h", "common/operands.h"}
    python = {"cuda_emulated.py", "cuda_planted/packed_experts.py", "cuda_ptx.py"}
    assert {f"csrc/{name}" for name in wanted} | {f"lowbit/testing/{name}" for name in python} <= names
    assert not any(name.startswith("csrc/cpu") or name.endswith(".md") for name in names)


def test_names_of_the_facade_count() -> None:
    used = Sources(ROOT).imports(ROOT / "tests/backends/triton/test_configurations.py")
    assert ROOT / "lowbit/backends/invariance.py" in used  # lowbit.batch_invariant


def test_the_machinery_of_the_record_decides_no_verdict() -> None:
    found = Sources(ROOT).of(ROOT / "tests/testing/test_interpreter.py", [])
    assert ROOT / "lowbit/testing/verdicts.py" not in found and ROOT / "lowbit/testing/interpreter.py" in found
