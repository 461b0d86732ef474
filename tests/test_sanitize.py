"""`make sanitize` fails on a finding, also when it is a worker's."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

PLANTED = """
#include <stdlib.h>
extern "C" int overflow(int n) { char* x = (char*)malloc(8); int y = x[n]; free(x); return y; }
extern "C" int shift(int n) { return 1 << n; }
"""
TESTS = """
import ctypes, os
planted = ctypes.CDLL(os.environ["PLANTED"])

def test_before(): pass
def test_overflow(): planted.overflow(int(os.environ["AT"]))
def test_shift(): planted.shift(int(os.environ["BY"]))
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", Path(__file__).with_name("sanitize.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("at", "by", "found"),
    [("0", "1", None), ("8", "1", "heap-buffer-overflow"), ("0", "40", "shift exponent")],
    ids=["sound", "overflow", "undefined"],
)
def test_a_finding_fails_the_run(tmp_path: Path, capfd, at: str, by: str, found: str | None) -> None:
    sanitize = load()
    try:
        absent = sanitize.runtime("libasan.so") is None
    except (OSError, subprocess.CalledProcessError):
        absent = True
    if absent:
        pytest.skip("no compiler with sanitizer runtimes here")
    (tmp_path / "planted.cpp").write_text(PLANTED)
    (tmp_path / "test_planted.py").write_text(TESTS)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*compiler, *flags, "planted.cpp", "-o", "planted.so"], cwd=tmp_path, check=True)
    extra = {"PLANTED": str(tmp_path / "planted.so"), "AT": at, "BY": by}
    status = sanitize.run_tests(["test_planted.py", f"--rootdir={tmp_path}"], extra, cwd=tmp_path)
    said = "".join(capfd.readouterr())
    assert (status == 0) == (found is None), said
    assert found is None or found in said
