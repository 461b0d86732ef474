"""Runs the kernel tests on a library instrumented by AddressSanitizer and UndefinedBehaviorSanitizer; so CUDA kernels
that are emulated on the CPU. Instruction sets, widths of codes, emulated kernels and combinations of parameters take
turns: others at another commit.

    python tests/sanitize.py [pytest arguments]
    SANITIZE_ALL=1 python tests/sanitize.py     every instruction set, kernel and combination

Builds in build/sanitize, where ninja finds what did not change, and leaves the installed library alone. The tests run
on all cores where pytest-xdist is installed. Exit status 0: no finding, all tests passed. A finding ends the process
that it is in: tests/test_sanitize.py shows that this fails the run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowbit.backends.cpu import native
from lowbit.testing import cuda_emulated, verdicts

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
# Compiled and tested at one commit, beside the scalar kernels; what takes longest stands alone.
TURNS = ("avx512bf16", "avx512vnni", "avx512,avx2")


def runtime(name: str) -> str | None:
    """The path of the compiler's sanitizer runtime, which must be loaded before Python's own libraries."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def environment() -> dict[str, str]:
    """Of a Python process that loads instrumented code."""
    runtimes = [runtime(name) for name in ("libasan.so", "libubsan.so")]
    if None in runtimes:
        sys.exit("libasan.so and libubsan.so not found: the compiler must be GCC with its sanitizer runtimes installed")
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, runtimes)),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # Python itself never frees everything
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "OMP_NUM_THREADS": "1",  # the workers share the cores
        "TRITON_INTERPRET": "0",  # the kernels under test are compiled C++
    }


def isas() -> str:
    """The instruction sets of this commit that this machine runs; "": all of them."""
    if os.environ.get("SANITIZE_ALL"):
        return ""
    wanted = TURNS[verdicts.turn_of(len(TURNS), ROOT)].split(",")
    return ",".join(name for name in (*wanted, "scalar") if name in native.isas())


def build() -> Path:
    """The instrumented library."""
    environ = {**os.environ, "LOWBIT_SANITIZE": "address,undefined", "LOWBIT_ISAS": isas()}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(FOLDER), "--build-temp", f"{FOLDER}/objects"]
    subprocess.run(command, check=True, cwd=ROOT, env=environ)
    (library,) = Path(FOLDER, "lowbit").glob("_C*.so")
    return library


def run_tests(arguments: Sequence[str], extra: Mapping[str, str], cwd: Path = ROOT) -> int:
    """pytest's exit status. A worker that a finding ends is a failure of the test that it was at."""
    # --capture=sys: a finding is written to the process's stderr as it ends, past what pytest could still show
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--capture=sys"]
    if importlib.util.find_spec("xdist"):
        command += ["-p", "xdist.plugin", "--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    # other plugins are not used here, and take seconds to import in each process
    settings = {**environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **extra}
    return subprocess.run([*command, *arguments], env=settings, cwd=cwd).returncode


def part() -> list[str]:
    """Arguments for the part of the tests that is in turn."""
    return [] if os.environ.get("SANITIZE_ALL") else ["--verdicts"]


def run_emulated(arguments: Sequence[str]) -> int:
    """pytest's exit status of the checks of CUDA kernels, emulated and instrumented, of one width."""
    widths = {cuda_emulated.SANITIZE: str(1 + verdicts.turn_of(8, ROOT))}
    making = "from lowbit.testing import cuda_emulated; cuda_emulated.build_all()"  # here, where g++ preloads nothing
    subprocess.run([sys.executable, "-c", making], check=True, cwd=ROOT, env={**os.environ, **widths})
    tests = [str(ROOT / "tests" / "cuda" / "test_planted.py"), "-k", "a_kernel_as_it_is"]
    return run_tests([*tests, *part(), *arguments], widths)


def main(arguments: list[str]) -> int:
    tests = ROOT / "tests"
    more = (tests / "packed" / "test_levels.py", tests / "backends" / "test_gradients.py")
    files = sorted(str(file) for file in (*tests.glob("*/test_kernels.py"), *more))
    failed = run_tests([*files, "-k", "not reference", *part(), *arguments], {"LOWBIT_LIBRARY": str(build())})
    return failed or run_emulated(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
