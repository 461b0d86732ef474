"""Bugs planted in the CUDA C++ kernels, to show that their tests find them.

Each module of this package is a kernel's list: its ``BUGS``, and ``check(kernels, bits)``, which compares a few cases
of one width with float64, raises where one is wrong, and returns their number. The kernels are those of the emulation,
unless the module has ``why_not()`` and ``built(bits, bug)`` of its own (a bug, or None).

    python -m lowbit.testing.cuda_planted [KERNEL ...]           plants them in copies of the sources, prints the finds
    python -m lowbit.testing.cuda_planted --write [KERNEL ...]   and writes csrc/cuda/planted_bugs.md
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

from lowbit.testing import cuda_emulated
from lowbit.testing.ptx_emulator import Fault

DOCUMENT = cuda_emulated.ROOT / "csrc" / "cuda" / "planted_bugs.md"


@dataclass(frozen=True)
class Bug:
    """``old``, which is once in ``file`` (below ``csrc/cuda``), becomes ``new``; kernels of ``bits`` are built."""

    name: str
    bits: int
    old: str
    new: str
    file: str


def kernels() -> list[str]:
    """The kernels that have a list."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def suite(kernel: str) -> Any:
    """The module of a kernel."""
    return importlib.import_module(f"{__name__}.{kernel}")


def bugs() -> list[tuple[str, Bug]]:
    """Every kernel's."""
    return [(kernel, bug) for kernel in kernels() for bug in suite(kernel).BUGS]


def why_not(kernel: str) -> str | None:
    """Why the kernel cannot be built here; None: it can."""
    own = getattr(suite(kernel), "why_not", None)
    return own() if own else cuda_emulated.why_not()


def built(kernel: str, bits: int, bug: Bug | None = None) -> Any:
    """What :func:`suite` checks: the kernels of one width, as they are or with a bug."""
    own = getattr(suite(kernel), "built", None)
    if own:
        return own(bits, bug)
    width = None if kernel.startswith("kron") else bits  # of a factor any width is read by one kernel
    return cuda_emulated.planted(bug.file, bug.old, bug.new, width) if bug else cuda_emulated.kernels(width)


def caught(kernel: str, bug: Bug) -> str | None:
    """What found the bug; None: nothing."""
    planted = built(kernel, bug.bits, bug)
    try:
        suite(kernel).check(planted, bug.bits)
    except AssertionError:
        return "wrong numbers"
    except (RuntimeError, Fault) as fault:
        return re.split(r"\n| at: ", str(fault))[0]
    return None


# --- the document ----------------------------------------------------------------------------------------------------

HEAD = """# Planted bugs

Made by `python -m lowbit.testing.cuda_planted --write`. Each line is a bug that was planted in a copy of a kernel's
sources, and what found it on a CPU: in the emulation, or in the executed PTX. A test fails where a bug is missing here.
"""


def sections() -> dict[str, list[str]]:
    """The lines of the tables of the document, by kernel."""
    found: dict[str, list[str]] = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.exists() else ():
        if line.startswith("## "):
            found[line[3:]] = []
        elif found and line.startswith("| ") and not line.startswith("| planted |"):
            found[list(found)[-1]].append(line)
    return found


def document(tables: dict[str, list[str]]) -> str:
    parts = [HEAD]
    for kernel, lines in sorted(tables.items()):
        parts += [f"\n## {kernel}\n\n| planted | bits | found by |\n|---|---|---|\n", *(f"{line}\n" for line in lines)]
    return "".join(parts)


def described(table: list[str]) -> list[str]:
    """The names of the bugs of a table."""
    return [line.split(" | ")[0].removeprefix("| ") for line in table]
