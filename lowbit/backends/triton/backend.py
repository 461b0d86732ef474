"""Triton kernels on a GPU, or in Triton's interpreter: the backend ``triton``."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from lowbit.backends import registry
from lowbit.backends.layouts import Layout
from lowbit.backends.triton import tiles
from lowbit.core.family import Format

# constexpr functions, and compilers whose faults the kernels do not work around, begin here
_OLDEST_TRITON = (3, 6)


class TritonBackend(registry.Backend):
    """Its ops are the functions of the families' ``triton.py``, which are imported at the first call."""

    def __init__(self) -> None:
        super().__init__("triton", "cuda")

    def why_not(self, device: torch.device | None = None) -> str | None:
        if (reason := why_no_triton()) is not None:
            return reason
        on_gpu = device is not None and device.type == "cuda"
        if not on_gpu and interpreting():
            return None
        if not on_gpu and not torch.cuda.is_available():
            return "torch finds no GPU (torch.cuda.is_available() is False)"
        if device is not None and not on_gpu:
            return f"its kernels run on a GPU: got a tensor on the {device.type.upper()}"
        return _why_not_device(device or torch.device("cuda", torch.cuda.current_device()))

    def run(self, op: str, *args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        here = device.type != "cuda" or device.index in (None, torch.cuda.current_device())
        with nullcontext() if here else torch.cuda.device(device):
            return super().run(op, *args)

    def layouts(self, format: Format, kind: str) -> tuple[Layout, ...]:
        return (tiles.TILES,)

    def serves(self, device: torch.device) -> bool:
        return tiles.used_on(device)

    def also_runs_on(self, device_type: str) -> bool:
        return device_type == "cpu"

    def details(self) -> dict[str, Any]:
        import triton

        devices = range(0 if interpreting() else torch.cuda.device_count())
        names = [torch.cuda.get_device_name(i) for i in devices] or ["Triton's interpreter, on the CPU"]
        return {"runs on": ", ".join(dict.fromkeys(names)), "triton": triton.__version__}


@cache
def why_no_triton() -> str | None:
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
    if why_no_triton() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


registry.register(TritonBackend())
