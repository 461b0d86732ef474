"""Which backend runs: torch's dispatcher picks the device, this module the backend inside it.

Each family's op has a *reference* implementation (plain torch, any device) and, on a CPU, a compiled
kernel that registers itself with torch when the library is loaded; a call then goes from torch's dispatcher
straight to C++. ``LOWBIT_BACKEND`` or :func:`use_backend` names a backend explicitly: it runs, or it raises
with the reason. ``auto`` may fall back to the reference, and says so once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit import native

BACKENDS = ("cpu", "reference")
_NAMESPACE = "lowbit"


@dataclass
class BackendStatus:
    """One row of :func:`backends`."""

    name: str
    available: bool
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        details = ", ".join(f"{k}: {v}" for k, v in self.details.items()) or self.reason
        return f"{self.name}: {'available' if self.available else 'unavailable'}" + (f" ({details})" if details else "")


_references: dict[str, Callable[..., Any]] = {}
_override: torch.library.Library | None = None
_forced = "auto"
_unavailable: str | None = "the compiled library has not been loaded yet"
_fallback_announced = False


def register_reference(library: torch.library.Library, op: str, reference: Callable[..., Any]) -> None:
    """Make ``reference`` the implementation of ``lowbit::op`` on every device that has no kernel of its own."""
    _references[op] = reference

    def fallback(*args: Any) -> Any:
        _announce_fallback()
        return reference(*args)

    library.impl(op, fallback, "CompositeExplicitAutograd")


def _announce_fallback() -> None:
    global _fallback_announced
    if not _fallback_announced and _forced == "auto":
        _fallback_announced = True
        reason = _unavailable or "no kernel for this device"
        warnings.warn(
            f"lowbit runs its slow torch reference: {reason} (see `lowbit doctor`)", RuntimeWarning, stacklevel=4
        )


def initialize() -> None:
    """Load the compiled kernels and apply ``LOWBIT_BACKEND``; called once by ``import lowbit``. Never raises."""
    global _unavailable
    _unavailable = native.load()
    requested = os.environ.get("LOWBIT_BACKEND", "auto") or "auto"
    _force(requested)


def why_unavailable(backend: str) -> str | None:
    """``None`` when ``backend`` can run here, else the reason."""
    if backend in ("auto", "reference"):
        return None
    if backend == "cpu":
        return _unavailable
    return f"unknown backend {backend!r}: choose from auto, {', '.join(BACKENDS)}"


def _force(backend: str) -> None:
    """Override the CPU key: with the reference, or with an error when a named backend cannot run."""
    global _override, _forced
    if _override is not None:
        _override._destroy()
        _override = None
    _forced = backend
    reason = why_unavailable(backend)
    if backend != "reference" and reason is None:
        return
    _override = torch.library.Library(_NAMESPACE, "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for op, reference in _references.items():
            _override.impl(op, reference if reason is None else _refusal(backend, reason))


def _refusal(backend: str, reason: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"LOWBIT_BACKEND={backend} cannot run: {reason}")

    return refuse


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the CPU ops of every family on the backend ``name`` inside a ``with`` block (process-wide).

    Args:
        name: ``"auto"``, ``"cpu"`` (the compiled kernels) or ``"reference"`` (plain torch).

    Raises:
        RuntimeError: the backend is unknown or cannot run on this machine; the message says why.
    """
    reason = why_unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    previous = _forced
    _force(name)
    try:
        yield
    finally:
        _force(previous)


def active_backend(device_type: str = "cpu") -> str:
    """The backend that an op on ``device_type`` uses now: ``"cpu"`` or ``"reference"``."""
    if device_type == "cpu" and _forced != "reference" and _unavailable is None:
        return "cpu"
    return "reference"


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and if not, why not."""
    rows = [BackendStatus("cpu", _unavailable is None, _unavailable or "")]
    if _unavailable is None:
        try:
            rows[0].details = {"isa": native.isa(), "isas": ", ".join(native.isas())}
        except RuntimeError as error:  # LOWBIT_ISA names what this machine cannot run
            rows[0].available, rows[0].reason = False, str(error).splitlines()[0]
    rows.append(BackendStatus("reference", True, details={"runs on": "any device"}))
    return rows
