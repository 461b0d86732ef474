"""Which backend runs: torch's dispatcher picks the device, this module the backend inside it.

Each family's op has a *reference* implementation (plain torch, any device), on a CPU a compiled kernel that registers
itself with torch when the library is loaded (a call then goes from torch's dispatcher straight to C++), and on a GPU
Triton kernels, which are imported at the first call. ``LOWBIT_BACKEND`` or :func:`use_backend` names a backend
explicitly: it runs, or it raises with the reason. ``auto`` may fall back to the reference, and says so once.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from lowbit.backends import invariance
from lowbit.backends.cpu import native

BACKENDS = ("cpu", "triton", "reference")
_NAMESPACE = "lowbit"
# constexpr functions, and compilers whose faults the kernels do not work around, begin here
_OLDEST_TRITON = (3, 6)


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
_triton: dict[str, Callable[..., Any]] = {}
_override: torch.library.Library | None = None
_forced = "auto"
_unavailable: str | None = "the compiled library has not been loaded yet"
_fallback_announced = False


def register_reference(library: torch.library.Library, op: str, reference: Callable[..., Any]) -> None:
    """Make ``reference`` the implementation of ``lowbit::op`` on every device that has no kernel of its own."""
    _references[op] = reference

    def fallback(*args: Any) -> Any:
        _announce_fallback(_unavailable or "no kernel for this device")
        return reference(*args)

    library.impl(op, fallback, "CompositeExplicitAutograd")


def register_triton(library: torch.library.Library, op: str, module: str, function: str) -> None:
    """Make ``function`` of ``module``, imported at the first call, the Triton implementation of ``lowbit::op``."""

    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    def on_gpu(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        reason = _why_not_on_gpu(device)
        if reason is None:
            here = device.index in (None, torch.cuda.current_device())
            with nullcontext() if here else torch.cuda.device(device):
                return kernel(*args)
        if _forced not in ("auto", "reference"):
            raise RuntimeError(f"LOWBIT_BACKEND={_forced} cannot run on {device}: {reason}")
        _announce_fallback(reason)
        return _references[op](*args)

    _triton[op] = kernel
    library.impl(op, on_gpu, "CUDA")


def _why_not_on_gpu(device: torch.device) -> str | None:
    """``None`` when the Triton kernels run on this GPU now, else the reason."""
    if _forced not in ("auto", "triton"):
        return f"the backend {_forced!r} was asked for"
    return _why_no_triton() or _why_not_device(device)


@cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except Exception as error:  # whatever keeps it from being imported is the reason
        return f"triton cannot be imported: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton must be at least {'.'.join(map(str, _OLDEST_TRITON))}: got {triton.__version__}"
    return None


@cache
def _why_not_device(device: torch.device) -> str | None:
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        return f"the Triton kernels need compute capability 8.0: {found}"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    if _why_no_triton() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _announce_fallback(reason: str) -> None:
    global _fallback_announced
    if not _fallback_announced and _forced == "auto":
        _fallback_announced = True
        warnings.warn(
            f"lowbit runs its slow torch reference: {reason} (see `lowbit doctor`)", RuntimeWarning, stacklevel=4
        )


def initialize() -> None:
    """Load the compiled kernels and apply the environment; called once by ``import lowbit``. Never raises."""
    global _unavailable
    _unavailable = native.load()
    if _unavailable is None:
        invariance.initialize()
    requested = os.environ.get("LOWBIT_BACKEND", "auto") or "auto"
    _force(requested)


def why_unavailable(backend: str) -> str | None:
    """``None`` when ``backend`` can run here, else the reason."""
    if backend in ("auto", "reference"):
        return None
    if backend == "cpu":
        return _unavailable
    if backend == "triton":
        if (reason := _why_no_triton()) is not None or interpreting():
            return reason
        if not torch.cuda.is_available():
            return "torch finds no GPU (torch.cuda.is_available() is False)"
        return _why_not_device(torch.device("cuda", torch.cuda.current_device()))
    return f"unknown backend {backend!r}: choose from auto, {', '.join(BACKENDS)}"


def _force(backend: str) -> None:
    """Override the CPU key: with the reference, with Triton's interpreter, or with an error when the backend cannot
    run there. No device is asked for anything yet: this also happens at import."""
    global _override, _forced
    if _override is not None:
        _override._destroy()
        _override = None
    _forced = backend
    if backend != "reference" and backend != "triton" and why_unavailable(backend) is None:
        return
    _override = torch.library.Library(_NAMESPACE, "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for op, reference in _references.items():
            implementation = reference if backend == "reference" else _forced_on_cpu(backend, op)
            _override.impl(op, implementation)


def _forced_on_cpu(backend: str, op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if backend == "triton" and op in _triton and interpreting():
            return _triton[op](*args)
        reason = why_unavailable(backend) or "its kernels run on a GPU: got a tensor on the CPU"
        raise RuntimeError(f"LOWBIT_BACKEND={backend} cannot run: {reason}")

    return run


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of every family on the backend ``name`` inside a ``with`` block (process-wide).

    Args:
        name: ``"auto"``, ``"cpu"`` (the compiled kernels), ``"triton"`` (a GPU, or Triton's interpreter) or
            ``"reference"`` (plain torch, any device). A backend that is named does not fall back: tensors on a device
            that it does not serve are an error.

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
    """The backend that an op on ``device_type`` uses now, one of :data:`BACKENDS`."""
    if device_type == "cpu":
        if _forced == "triton" and interpreting():
            return "triton"
        return "cpu" if _forced != "reference" and _unavailable is None else "reference"
    if device_type == "cuda" and _forced in ("auto", "triton") and why_unavailable("triton") is None:
        return "triton"
    return "reference"


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and if not, why not."""
    rows = [BackendStatus("cpu", _unavailable is None, _unavailable or "")]
    if _unavailable is None:
        try:
            rows[0].details = {"isa": native.isa(), "isas": ", ".join(native.isas())}
        except RuntimeError as error:  # LOWBIT_ISA names what this machine cannot run
            rows[0].available, rows[0].reason = False, str(error).splitlines()[0]
    rows.append(_triton_status())
    rows.append(BackendStatus("reference", True, details={"runs on": "any device"}))
    return rows


def _triton_status() -> BackendStatus:
    reason = why_unavailable("triton")
    row = BackendStatus("triton", reason is None, reason or "")
    if reason is None:
        import triton

        devices = range(0 if interpreting() else torch.cuda.device_count())
        names = [torch.cuda.get_device_name(i) for i in devices] or ["Triton's interpreter, on the CPU"]
        row.details = {"runs on": ", ".join(dict.fromkeys(names)), "triton": triton.__version__}
    return row
