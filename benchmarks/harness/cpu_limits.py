"""What the machine can do at best, measured by ``cpu_limits.cpp``, which is compiled for it once.

``python -m benchmarks.harness.cpu_limits [THREADS ...]`` prints the limits. A figure's share of the right one says
how much is left: of streaming bandwidth where every weight is used once (M = 1), of the peak rate of products where M
is large.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.demo import cpu_model

SOURCE = Path(__file__).with_name("cpu_limits.cpp")
FLAGS = ["-std=c++17", "-O2", "-march=native", "-pthread"]
MIN_BYTES, MAX_BYTES = 256 << 20, 2 << 30  # read by all threads together
# activations -> ISAs, best first, whose instructions multiply them
INSTRUCTIONS = {
    "fp32": ("avx512", "avx2"),
    "bf16": ("avx512bf16",),
    "int8": ("avx512vnni", "avx512", "avx2"),
}
ISAS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16")

Limits = dict[str, Any]


@functools.cache
def program() -> Path:
    """The compiled program, out of a cache folder. Raises ``RuntimeError`` with the reason where there is none."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and _found(c)), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (tried CXX, c++, g++, clang++)")
    key = "\n".join([SOURCE.read_text(), compiler, cpu_model(), *FLAGS])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    file = folder / f"limits-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(new)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cpu_limits.cpp does not compile here: {done.stderr.strip().splitlines()[:1]}")
        new.replace(file)
    return file


def _found(command: str) -> bool:
    return shutil.which(shlex.split(command)[0]) is not None


def measure(threads: int, total_bytes: int) -> Limits:
    """One measurement: ``{"read_gb_s": {"huge pages", "4 KiB pages"}, "peak_gop_s": {"int8 avx512vnni", ...}}``.

    ``total_bytes`` are read by all threads together: several times the last-level cache. A product and a sum are two
    operations. Raises ``RuntimeError`` with the reason where nothing can be measured.
    """
    share = min(max(total_bytes, MIN_BYTES), MAX_BYTES) // threads
    done = subprocess.run([str(program()), str(threads), str(share)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cpu_limits.cpp fails here: {done.stderr.strip() or done.returncode}")
    found: Limits = json.loads(done.stdout)
    return found


def median(measured: Sequence[Limits]) -> Limits:
    """Of each figure of several measurements."""
    return {
        kind: {name: round(statistics.median(one[kind][name] for one in measured), 1) for name in names}
        for kind, names in measured[0].items()
    }


def bandwidth(limits: Limits) -> float:
    """Bytes per second that the threads can stream."""
    return 1e9 * float(limits["read_gb_s"]["huge pages"])


def peak(limits: Limits, activations: str, isa: str | None = None) -> float | None:
    """Operations per second of the best instruction for ``activations`` among those that ``isa`` has (default: all).

    None where no such instruction was measured; bf16 without instructions of its own is multiplied as fp32.
    """
    for kind in (activations, "fp32") if activations == "bf16" else (activations,):
        for instructions in INSTRUCTIONS[kind]:
            rate = limits["peak_gop_s"].get(f"{kind} {instructions}")
            if rate and (isa is None or ISAS.index(instructions) <= ISAS.index(isa)):
                return 1e9 * float(rate)
    return None


def huge_pages() -> str:
    """The system's policy: ``always``, ``madvise`` (on request), ``never``, or ``unknown``."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.split("[")[1].split("]")[0]


if __name__ == "__main__":
    for count in [int(text) for text in sys.argv[1:]] or [1, os.cpu_count() or 1]:
        print(count, "thread(s):", json.dumps(measure(count, 0)))
