"""The compiled C++ kernels, on any CPU: the backend ``cpu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.backends import invariance, registry
from lowbit.backends.cpu import blocks, native
from lowbit.backends.layouts import CANONICAL, Layout
from lowbit.core.family import Format


class CpuBackend(registry.Backend):
    """Its ops are the native library's: torch calls them directly where no other backend comes first on a CPU."""

    def __init__(self) -> None:
        super().__init__("cpu", "cpu")
        self._unavailable: str | None = "the compiled library has not been loaded yet"

    def initialize(self) -> None:
        self._unavailable = native.load()
        if self._unavailable is None:
            invariance.initialize()

    def why_not(self, device: torch.device | None = None) -> str | None:
        return self._unavailable

    def can_run(self, op: str, *args: Any) -> str | None:
        return None if hasattr(torch.ops.lowbit_native, op) else f"it has no {op}"

    def run(self, op: str, *args: Any) -> Any:
        return getattr(torch.ops.lowbit_native, op)(*args)

    def layouts(self, format: Format, kind: str) -> tuple[Layout, ...]:
        if format.family != "packed":
            return (CANONICAL,)
        if kind != "embedding":
            return (blocks.BLOCKS,) if format.out_features >= blocks.ROWS else (CANONICAL,)
        return (CANONICAL, blocks.BLOCKS)  # blocks, where a linear layer shares the codes

    def settle(self, packed: Tensor, layout: Layout) -> None:
        """Fewer, larger pages under canonical words, by advice to the operating system; making blocks asks itself."""
        if layout is CANONICAL and packed.is_contiguous():
            torch.ops.lowbit_native.huge_pages(packed)

    def serves(self, device: torch.device) -> bool:
        return blocks.used_on(device)

    def details(self) -> dict[str, Any]:
        # LOWBIT_ISA may name what this machine cannot run
        return {"isa": native.isa(), "isas": ", ".join(native.isas())}


registry.register(CpuBackend())
