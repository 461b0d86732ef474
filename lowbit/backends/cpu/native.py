"""The native CPU library: loading it, and the instruction set (ISA) its kernels use.

Nothing here compiles, prints or raises at import. `load()` says why there is no library; the pure torch
reference then runs instead.

Environment:
    LOWBIT_LIBRARY  load this file instead of the one built next to the package
    LOWBIT_ISA      use this ISA's kernels; an error at the first use when the machine cannot run them
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import threading
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[2]
_NAME = "_C.abi3.so"
_CALLERS = ("core", "backends", "nn", "packed", "codebook", "kron")  # they define and call the ops
_lock = threading.Lock()
_tried = False
_reason: str | None = None


def path() -> Path:
    """The library's file: LOWBIT_LIBRARY, else the one built into the package (which may not exist).

    A source folder without one takes that of an installed lowbit, if the Python that calls its ops is the same.
    """
    override = os.environ.get("LOWBIT_LIBRARY")
    if override:
        return Path(override)
    own = _PACKAGE / _NAME
    return own if own.is_file() else next(filter(_fits, _installed()), own)


def _installed() -> list[Path]:
    """The compiled libraries of other installations that this Python would find."""
    found = (Path(str(each.locate_file(f"lowbit/{_NAME}"))) for each in distributions(name="lowbit"))
    return [file for file in dict.fromkeys(found) if file.is_file()]


def _fits(library: Path) -> bool:
    """Whether the files beside ``library`` that define and call its ops are those of this package."""

    def files(package: Path) -> set[Path]:
        return {file.relative_to(package) for name in _CALLERS for file in (package / name).rglob("*.py")}

    here = files(_PACKAGE)
    same = (filecmp.cmp(_PACKAGE / file, library.parent / file, shallow=False) for file in here)
    return here == files(library.parent) and all(same)


def load() -> str | None:
    """Loads the native library once. None when it is loaded, else the reason why it is not.

    The schemas of the ops it implements (namespace `lowbit`) must be defined before.
    """
    global _tried, _reason
    if _tried:  # no lock to leave held, should a signal raise
        return _reason
    with _lock:
        if not _tried:
            _reason = _load(path())
            _tried = True
        return _reason


def _load(file: Path) -> str | None:
    if not file.is_file():
        others = _installed() if file == _PACKAGE / _NAME else []
        other = "".join(f"; {each} belongs to other sources" for each in others)
        return f"not compiled: there is no {file}{other} (build it: pip install -e . --no-build-isolation)"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        return f"the native library needs torch >= 2.10: found {torch.__version__}"
    try:
        torch.ops.load_library(str(file))
    except Exception as error:  # whatever the loader says becomes the reason
        return f"{file} cannot be loaded: {error}"
    return None


def _require() -> None:
    reason = load()
    if reason is not None:
        raise RuntimeError(f"the native library is not available: {reason}")


def isas() -> list[str]:
    """The compiled ISAs this machine can run, best first; empty without the native library."""
    if load() is not None:
        return []
    return str(torch.ops.lowbit_native.isas()).split(",")


def isa() -> str:
    """The ISA in use. Raises RuntimeError without the native library, or when LOWBIT_ISA cannot run here."""
    _require()
    return str(torch.ops.lowbit_native.isa())


def set_isa(name: str) -> None:
    """Makes every CPU kernel of this process use the ISA `name`; "" returns to the automatic choice.

    Raises RuntimeError, listing the choices, when `name` is unknown or this machine cannot run it.
    """
    _require()
    torch.ops.lowbit_native.set_isa(name)


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """set_isa(name) inside a `with` block; the previous choice comes back afterwards."""
    previous = isa()
    try:
        set_isa(name)
        yield
    finally:
        set_isa(previous)
