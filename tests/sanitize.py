"""Runs the kernel tests on a library instrumented by AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [pytest arguments]

Builds into a temporary folder and leaves the installed library alone. Exit status 0: no finding, all tests passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def runtime(name: str) -> str:
    """The path of the compiler's sanitizer runtime, which must be loaded before Python's own libraries."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"{name} not found: {command[0]} must be GCC with its sanitizer runtimes installed")
    return path


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="lowbit-sanitize-") as folder:
        build = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", f"{folder}/objects"]
        subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "LOWBIT_SANITIZE": "address,undefined"})
        (library,) = Path(folder, "lowbit").glob("_C*.so")
        environment = {
            **os.environ,
            "LOWBIT_LIBRARY": str(library),
            "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # Python itself never frees everything
            "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
            "OMP_NUM_THREADS": "2",
            "TRITON_INTERPRET": "0",  # the kernels under test are compiled C++
        }
        files = sorted(str(file) for file in (ROOT / "tests").glob("*/test_kernels.py"))
        tests = [sys.executable, "-m", "pytest", *files]
        # --capture=sys: a finding is written to the process's stderr as it ends, past what pytest could still show
        options = ["-q", "-k", "not reference", "-p", "no:cacheprovider", "--capture=sys"]
        return subprocess.run([*tests, *options, *arguments], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
