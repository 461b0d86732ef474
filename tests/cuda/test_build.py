"""How ``setup.py`` builds the library of CUDA C++ kernels."""

from __future__ import annotations

import ctypes
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tools import cuda_compiled, runtimes
from benchmarks.tools.cuda_kernels import ARCHITECTURES, KERNELS, ROOT
from lowbit.testing import verdicts

needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")
PAIRS = [(kernel, name) for kernel in KERNELS.values() if len(kernel.architectures) > 1 for name in ("89", "120")]


def setup() -> dict[str, Any]:
    """What ``setup.py`` defines."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "setup"}
    exec(compile(text[: text.index("\nif PURE_PYTHON:")], "setup.py", "exec"), names)
    return names


def test_the_library_has_what_the_records_are_of():
    assert tuple(f"sm_{name}" for name in setup()["CUDA_ARCHITECTURES"]) == ARCHITECTURES


def test_every_source_is_compiled_for_what_it_runs_on(monkeypatch):
    """All kernels for all architectures, each width once; what has no kernel, or one of sm_90a, for one."""
    monkeypatch.chdir(ROOT)
    build = setup()
    *edges, link = build["cuda_edges"](Path("b"), build["CUDA_ARCHITECTURES"])
    codes = {re.match(r"build (\S+\.o)", text)[1]: set(re.findall(r"sm_\w+", text.split("\n", 1)[1])) for text in edges}
    assert set(link.split(" cuda_link ")[1].split()) == codes.keys()
    for kernel in KERNELS.values():
        for bits in kernel.compilations:
            name = kernel.source.removesuffix(".cu") + (".o" if bits is None else f"_{bits}.o")
            assert codes.pop(f"b/cuda/{name}") == set(kernel.architectures)
    assert codes.pop("b/cuda/older_glibc.o") == set()
    assert all(len(found) == 1 for found in codes.values())
    assert {Path(name).stem for name in codes} == {"library", "linear", "rows", "stack"}


@needs_nvcc
def test_the_library_says_what_it_was_compiled_for(tmp_path, monkeypatch):
    """It is in the object as a text."""
    monkeypatch.chdir(ROOT)
    edges = setup()["cuda_edges"](Path("b"), ["80", "90a", "120"])
    (flags,) = re.findall(r"flags = (.*LOWBIT_ARCHITECTURES.*)", "".join(edges))
    target = tmp_path / "library.o"
    command = ["nvcc", "-std=c++17", "-Icsrc", "-arch=sm_80", *shlex.split(flags)]
    subprocess.run([*command, "-c", "csrc/cuda/library.cu", "-o", str(target)], check=True)
    assert b"800,900,1200\x00" in target.read_bytes()


@needs_nvcc
@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: f"{PAIRS[n][0].name}-{PAIRS[n][1]}")
def test_one_ptx_serves_two_architectures(number, request):
    """What ``CUDA_PTX`` of ``setup.py`` relies on. `make test` compares one kernel, another at another commit."""
    verdicts.only_in_turn(request.config, number, len(PAIRS))
    kernel, name = PAIRS[number]
    bits = kernel.compilations[number % len(kernel.compilations)]

    def code(architecture: str) -> str:
        ptx = cuda_compiled.compile_ptx(kernel, f"sm_{architecture}", bits)
        return re.sub(r"^(//|\.target).*\n", "", ptx, flags=re.MULTILINE)

    assert code(name) == code(setup()["CUDA_PTX"][name])


@needs_nvcc
def test_the_cuda_runtime_runs_on_manylinux_2_28(tmp_path, request):
    """Linked into a library as into ours, which takes minutes; without older_glibc.cpp what is too new is named.

    `make test` does so at every third commit."""
    verdicts.only_in_turn(request.config, 0, 3)
    options = setup()["OLDER_LIBRARIES"]
    if not options:
        pytest.skip("x86_64 and glibc alone")
    source, library = tmp_path / "one.cu", tmp_path / "one.so"
    source.write_text('extern "C" int one() { return cudaGetLastError(); }')
    command = ["nvcc", "-shared", "-Xcompiler=-fPIC", str(source), "-o", str(library)]
    subprocess.run([*command, str(ROOT / "csrc/cuda/older_glibc.cpp"), *options], check=True)
    assert runtimes.asked_for(library) and not runtimes.too_new(library)
    ctypes.CDLL(str(library)).one()
    if tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 34):
        subprocess.run(command, check=True)
        assert "dlopen@GLIBC_2.34" in runtimes.too_new(library)
        assert runtimes.main([str(library)]) == 1
