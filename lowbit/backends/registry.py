"""Which backend runs: torch's dispatcher picks the device, this module the backend inside it.

A :class:`Backend` runs ops on one type of device. Backends of one device form a list, the highest priority first: the
first one that does not decline a call runs it. Every op also has a *reference* implementation (plain torch, any
device), which runs when all decline. ``LOWBIT_BACKEND`` or :func:`use_backend` names a backend explicitly: it runs, or
it raises with the reason. ``auto`` may fall back to the reference, and says so once.

On a CPU the compiled kernels register themselves with torch when the library is loaded: as long as they come first, a
call goes from torch's dispatcher straight to C++.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.backends.layouts import CANONICAL, Layout

if TYPE_CHECKING:
    from lowbit.core.family import Format

NAMESPACE = "lowbit"
NATIVE_NAMESPACE = "lowbit_native"

Implementation = Callable[..., Any]


class Backend:
    """Kernels for one type of device.

    Args:
        name: what ``LOWBIT_BACKEND``, :func:`use_backend` and reports call it.
        device_type: ``"cpu"``, ``"cuda"``, … as in ``torch.device.type``.
        priority: of several backends on one device the highest is asked first; the kernels of the package have 0.
        ops: op name (``"packed_linear"``) → function with the op's arguments. Ops that are missing are declined.

    A subclass overrides what it has to say. Reasons are short texts for messages; ``None`` means yes.
    """

    def __init__(
        self, name: str, device_type: str, *, priority: int = 0, ops: Mapping[str, Implementation] | None = None
    ) -> None:
        self.name, self.device_type, self.priority = name, device_type, priority
        self.ops: dict[str, Implementation] = dict(ops or {})

    def initialize(self) -> None:
        """What ``import lowbit`` does for this backend. Never raises, asks no device anything."""

    def why_not(self, device: torch.device | None = None) -> str | None:
        """Why it cannot run on ``device`` (``None``: on this machine)."""
        return None

    def can_run(self, op: str, *args: Any) -> str | None:
        """Why it declines this call, though it can run here: formats, shapes or dtypes that it has no kernel for."""
        return None if op in self.ops else f"it has no {op}"

    def run(self, op: str, *args: Any) -> Any:
        return self.ops[op](*args)

    def layouts(self, format: Format, kind: str) -> tuple[Layout, ...]:
        """The layouts in which it reads the codes of a format, the best first; ``kind``: of the layer."""
        return (CANONICAL,)

    def settle(self, packed: Tensor, layout: Layout) -> None:
        """What it does once with codes that it will read, where they are now: advice about their memory, say."""

    def serves(self, device: torch.device) -> bool:
        """Whether layers on ``device`` hold their codes for this backend."""
        return active_backend(device.type) == self.name

    def also_runs_on(self, device_type: str) -> bool:
        """Whether it runs on a second type of device where it is named: an emulator does."""
        return False

    def details(self) -> dict[str, Any]:
        """For :func:`backends`: what it runs on. A ``RuntimeError`` makes it unavailable, with that reason."""
        return {}


class _Reference(Backend):
    """Plain torch: the definition of every op, and what runs where no kernel does."""

    def settle(self, packed: Tensor, layout: Layout) -> None:
        """What it does once with codes that it will read, where they are now: advice about their memory, say."""

    def serves(self, device: torch.device) -> bool:
        return False

    def details(self) -> dict[str, Any]:
        return {"runs on": "any device"}


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


_reference = _Reference("reference", "any")
_references = _reference.ops
_backends: list[Backend] = [_reference]  # in the order in which they are listed; the reference last
_override: torch.library.Library | None = None
_forced = "auto"
_fallback_announced = False


def register(backend: Backend) -> Backend:
    """Make a backend known; raises ``ValueError`` where one of its name is."""
    if backend.name == "auto" or any(known.name == backend.name for known in _backends):
        raise ValueError(f"a backend needs a name of its own: got name={backend.name!r}, known: {', '.join(names())}")
    _backends.insert(-1, backend)
    _route()
    return backend


def unregister(name: str) -> None:
    """Forget the backend ``name``; raises ``ValueError`` where there is none, or where it is in use."""
    if name == _reference.name or name == _forced or name not in names():
        raise ValueError(f"name must be that of a backend that is not in use: got name={name!r}")
    _backends.remove(_named(name))
    _route()


def names() -> tuple[str, ...]:
    """The names of all backends."""
    return tuple(backend.name for backend in _backends)


def _named(name: str) -> Backend:
    return next(backend for backend in _backends if backend.name == name)


# ------------------------------------------------------------------------------------------------------------- ops


def register_op(library: torch.library.Library, op: str, reference: Implementation) -> None:
    """Let calls of ``lowbit::op`` find their backend; ``reference`` is its definition in plain torch."""
    _references[op] = reference

    def call(*args: Any) -> Any:
        return _call(op, *args)

    library.impl(op, call, "CompositeExplicitAutograd")
    library.impl(op, call, "CUDA")


def reference(op: str) -> Implementation:
    """The definition of ``op`` in plain torch."""
    return _references[op]


def implement(backend: str, op: str, module: str, function: str) -> None:
    """Make ``function`` of ``module``, which is imported at the first call, what ``backend`` runs for ``op``."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    _named(backend).ops[op] = run


def _candidates(device_type: str) -> list[Backend]:
    """The backends of a type of device in the order in which they are asked, the reference not among them."""

    def runs(backend: Backend) -> bool:
        return backend.device_type == device_type or (backend.name == _forced and backend.also_runs_on(device_type))

    return sorted(filter(runs, _backends), key=lambda backend: -backend.priority)


def _declines(backend: Backend, device: torch.device) -> str | None:
    """Why ``backend`` runs nothing on ``device`` now."""
    if _forced not in ("auto", backend.name):
        return f"the backend {_forced!r} was asked for"
    return backend.why_not(device)


def _call(op: str, *args: Any) -> Any:
    """Run ``op`` on the first backend that does not decline."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    reasons: dict[str, str] = {}
    for backend in _candidates(device.type) if _forced != "reference" else ():
        reason = _declines(backend, device) or backend.can_run(op, *args)
        if reason is None:
            return backend.run(op, *args)
        reasons[backend.name] = reason
    if _forced not in ("auto", "reference"):
        unknown = why_unavailable(_forced) if _forced not in names() else None
        reason = unknown or reasons.get(_forced) or next(iter(reasons.values()), f"it does not run on {device}")
        where = "" if device.type == "cpu" else f" on {device}"
        raise RuntimeError(f"LOWBIT_BACKEND={_forced} cannot run{where}: {reason}")
    _announce_fallback("; ".join(reasons.values()) or "no kernel for this device")
    return _references[op](*args)


def _announce_fallback(reason: str) -> None:
    global _fallback_announced
    if not _fallback_announced and _forced == "auto":
        _fallback_announced = True
        warnings.warn(
            f"lowbit runs its slow torch reference: {reason} (see `lowbit doctor`)", RuntimeWarning, stacklevel=5
        )


def _route() -> None:
    """Send calls on a CPU through :func:`_call`, unless compiled kernels come first there: torch finds these by itself.

    No device is asked for anything: this also happens at import.
    """
    global _override
    if _override is not None:
        _override._destroy()
        _override = None
    candidates = _candidates("cpu")
    first = candidates[0] if candidates else None
    straight = first is not None and first.name == "cpu" and _declines(first, torch.device("cpu")) is None
    if straight or (_forced == "auto" and len(candidates) < 2):  # else what every device falls back to is enough
        return
    _override = torch.library.Library(NAMESPACE, "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for op, reference in _references.items():
            _override.impl(op, reference if _forced == "reference" else _caller(op))


def _caller(op: str) -> Implementation:
    return lambda *args: _call(op, *args)


# ---------------------------------------------------------------------------------------------------- what to run


def initialize() -> None:
    """Initialize every backend and apply the environment; called once by ``import lowbit``. Never raises."""
    for backend in _backends:
        backend.initialize()
    _force(os.environ.get("LOWBIT_BACKEND", "auto") or "auto")


def why_unavailable(backend: str) -> str | None:
    """``None`` when ``backend`` can run here, else the reason."""
    if backend == "auto":
        return None
    if backend not in names():
        return f"unknown backend {backend!r}: choose from auto, {', '.join(names())}"
    return _named(backend).why_not()


def _force(backend: str) -> None:
    global _forced
    _forced = backend
    _route()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of every family on the backend ``name`` inside a ``with`` block (process-wide).

    Args:
        name: ``"auto"``, ``"cpu"`` (the compiled kernels), ``"triton"`` (a GPU, or Triton's interpreter),
            ``"cuda"`` (compiled CUDA C++ kernels), ``"reference"`` (plain torch, any device) or a backend of your own.
            A backend that is named does not fall back: tensors on a device that it does not serve are an error.

    Raises:
        RuntimeError: the backend is unknown or cannot run on this machine; the message says why.
    """
    reason = why_unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    previous = _forced
    try:
        _force(name)
        yield
    finally:
        _force(previous)


def active_backend(device_type: str = "cpu") -> str:
    """The name of the backend that ops on ``device_type`` go to first now, as far as their arguments allow."""
    for backend in _candidates(device_type):
        elsewhere = None if backend.device_type == device_type else torch.device(device_type)
        if _forced in ("auto", backend.name) and backend.why_not(elsewhere) is None:
            return backend.name
    return _reference.name


def forced() -> str:
    """The backend that was asked for; ``"auto"``: none."""
    return _forced


def able_on(device_type: str) -> tuple[str, ...]:
    """The names of the backends that run on a type of device where they are named: emulators, too."""
    here = torch.device(device_type)
    able = (b.name for b in _backends if b.device_type == device_type or b.also_runs_on(device_type))
    return tuple(name for name in able if _named(name).why_not(here) is None)


_as_stored: ContextVar[bool] = ContextVar("as_stored", default=False)


@contextmanager
def as_stored() -> Iterator[None]:
    """Inside, codes stay canonical words, as files have them: of a model that is saved, and not run."""
    token = _as_stored.set(True)
    try:
        yield
    finally:
        _as_stored.reset(token)


def layouts(device: torch.device, format: Format, kind: str) -> tuple[Layout, ...]:
    """The layouts to hold the codes of a format in on ``device``, the best first."""
    if _as_stored.get():
        return (CANONICAL,)
    serving = next((backend for backend in _backends if backend.serves(device)), None)
    return (CANONICAL,) if serving is None else serving.layouts(format, kind)


def settle(packed: Tensor, layout: Layout) -> None:
    """Tell the backend that codes are where it will read them."""
    for backend in _backends:
        if backend.serves(packed.device):
            backend.settle(packed, layout)


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and if not, why not."""
    rows = []
    for backend in _backends:
        reason = backend.why_not()
        row = BackendStatus(backend.name, reason is None, reason or "")
        if reason is None:
            try:
                row.details = backend.details()
            except RuntimeError as error:
                row.available, row.reason = False, str(error).splitlines()[0]
        rows.append(row)
    return rows
