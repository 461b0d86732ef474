"""Where tests run: every backend and ISA of this machine, and how a test makes sure that it runs there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.backends import registry
from lowbit.backends.cpu import native


@dataclass(frozen=True)
class Where:
    """A backend, for the compiled one an ISA, and the device whose tensors it is given."""

    backend: str
    isa: str = ""
    device: str = "cpu"

    def __str__(self) -> str:
        return self.isa or (self.backend if self.device == "cpu" else f"{self.backend}-{self.device}")


def everywhere(interpreter: bool = True) -> list[Where]:
    """The reference and every backend that runs on a CPU, the compiled one with every ISA of this machine (or the one
    that LOWBIT_ISA forces); Triton in its interpreter, unless that is not wanted or there is a GPU. With
    LOWBIT_TEST_DEVICE=cuda, what runs on a GPU and nothing else.
    """
    if os.environ.get("LOWBIT_TEST_DEVICE") == "cuda":
        return [Where("triton", device="cuda"), Where("reference", device="cuda")]
    found = [Where("reference")]
    for name in registry.able_on("cpu"):
        if name == "cpu":
            found += [Where(name, isa) for isa in native.isas()]
        elif name != "triton" or interpreter:
            found.append(Where(name))
    return found


Case = TypeVar("Case")


def share(where: Where, items: Sequence[Case], turn: int, turns: int) -> list[tuple[int, Case]]:
    """(i, items[i]) of all items; for Triton's interpreter, which is slow, of every ``turns``-th, from ``turn`` on.

    Tests with ``turns`` parameters (dtypes, say) so run every case there once, and each parameter on a share of them.
    """
    numbered = list(enumerate(items))
    return numbered[turn::turns] if where == Where("triton") else numbered


_device = torch.device("cpu")


@contextmanager
def running(where: Where) -> Iterator[None]:
    """Force ``where``, make sure that it is what runs, and give :func:`call` its device."""
    global _device
    with ExitStack() as stack:
        stack.enter_context(registry.use_backend(where.backend))
        if where.isa:
            stack.enter_context(native.use_isa(where.isa))
            assert native.isa() == where.isa
        assert registry.active_backend(where.device) == where.backend
        try:
            _device = torch.device(where.device)
            yield
        finally:
            _device = torch.device("cpu")


def call(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    """``op`` of the arguments moved to the device under test, its result on the CPU."""
    if _device.type == "cpu":
        launched = _interpreted()
        result: Tensor = op(*args, **kwargs)
        if registry.active_backend("cpu") == "triton":
            assert _interpreted() > launched or not result.numel(), f"{op} launched no kernel"
        return result
    moved = [on_device(a) if isinstance(a, Tensor) else a for a in args]
    named = {name: on_device(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    return op(*moved, **named).cpu()  # type: ignore[no-any-return]


def _interpreted() -> int:
    """Launches in Triton's interpreter so far."""
    interpreter = sys.modules.get("lowbit.testing.interpreter")
    return sum(interpreter.launches.values()) if interpreter is not None else 0


def on_device(t: Tensor) -> Tensor:
    """``t`` on the device under test, its strides kept."""
    if t.is_contiguous():
        return t.to(_device)
    whole = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return whole.to(_device).as_strided(t.size(), t.stride(), t.storage_offset())
