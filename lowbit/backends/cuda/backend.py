"""Compiled CUDA C++ kernels (``csrc/cuda``): the backend ``cuda``.

They read what the Triton kernels read. ``dispatch.json`` says which calls they take; Triton takes the others.
``LOWBIT_BACKEND=cuda`` or ``lowbit.use_backend("cuda")`` forces them. No GPU has run them yet, so on each GPU a
product of every kernel is first compared with the reference: where one is wrong, the backend is unavailable.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lowbit.backends import invariance, ops, registry
from lowbit.backends.cuda import library, self_check
from lowbit.backends.layouts import Layout
from lowbit.backends.triton.tiles import TILES, tiles_of
from lowbit.core.family import Format

STATE = "verified on emulators, not yet on a GPU"


@cache
def dispatch() -> list[dict[str, Any]]:
    """The rows of ``dispatch.json``: an op, dtypes, the most rows of x that it takes, where that is from, and why."""
    text = Path(__file__).with_name("dispatch.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


class CudaBackend(registry.Backend):
    """Its ops are those of namespace ``lowbit_cuda`` in the compiled library (``csrc/cuda/ops``)."""

    def __init__(self) -> None:
        super().__init__("cuda", "cuda")

    def why_not(self, device: torch.device | None = None) -> str | None:
        if (reason := library.load()) is not None:
            return reason
        on_gpu = device is not None and device.type == "cuda"
        if not library.architectures():
            return "its library is the emulation, which runs on a CPU" if on_gpu else None
        if not on_gpu and not torch.cuda.is_available():
            return "torch finds no GPU (torch.cuda.is_available() is False)"
        if device is not None and not on_gpu:
            return f"its kernels run on a GPU: got a tensor on the {device.type.upper()}"
        here = device or torch.device("cuda", torch.cuda.current_device())
        if (reason := _why_not_device(here)) is not None:
            return reason
        # Nothing can be checked while a graph is captured; what was checked before is known.
        return None if torch.cuda.is_current_stream_capturing() else why_not_checked(here)

    def can_run(self, op: str, *args: Any) -> str | None:
        if not library.has(op):
            return f"it has no {op}"
        reason = getattr(torch.ops.lowbit_cuda, f"{op}_declines")(*_in_tiles(op, args))
        return reason or (None if registry.forced() == self.name else _why_another(op, args))

    def run(self, op: str, *args: Any) -> Any:
        return getattr(torch.ops.lowbit_cuda, op)(*_in_tiles(op, args))

    def layouts(self, format: Format, kind: str) -> tuple[Layout, ...]:
        return (TILES,)

    def also_runs_on(self, device_type: str) -> bool:
        return device_type == "cpu" and library.load() is None and not library.architectures()

    def details(self) -> dict[str, Any]:
        compiled = ", ".join(f"sm_{number}" for number in library.architectures()) or "none: the emulation"
        return {"state": STATE, "library": str(library.path()), "architectures": compiled}


def _in_tiles(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with codes in tiles: as they are, where the layer was prepared for a GPU."""
    family, kind = op.split("_", 1)
    names = list(ops.families[family].operands.types)
    if "layout" not in names:
        return args
    first = {"dequantize": 0, "experts": 2}.get(kind, 1)
    at = {name: first + names.index(name) for name in ("packed", "layout", "bits")}
    if args[at["layout"]] == TILES.number:
        return args
    k = args[0].shape[-1] if kind in ("linear", "experts") else args[first + len(names)]
    given = list(args)
    given[at["packed"]] = tiles_of(args[at["packed"]], args[at["layout"]], args[at["bits"]], k)
    given[at["layout"]] = TILES.number
    return tuple(given)


def _why_another(op: str, args: tuple[Any, ...]) -> str | None:
    """Why another backend is taken for this call: ``dispatch.json``."""
    family, kind = op.split("_", 1)
    if kind not in ("linear", "experts"):
        return None
    x = args[0]
    rows_of_x, dtype = x.numel() // max(1, x.shape[-1]), str(x.dtype).removeprefix("torch.")
    activation = ops.families[family].operands.activation
    names = list(activation.types) if activation else []  # the last arguments
    if "int8" in names and args[names.index("int8") - len(names)]:
        dtype = "int8"
    for row in dispatch():
        if row["op"] == op and dtype in row["dtypes"] and _takes(row, rows_of_x, x.device):
            return None
    return f"dispatch.json gives {rows_of_x} rows of {dtype} to another backend"


def _takes(row: dict[str, Any], rows_of_x: int, device: torch.device) -> bool:
    architecture = 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if architecture not in row.get("architectures", [architecture]):
        return False
    if row["most_rows"] < 0:
        return True
    if invariance.on_gpu():  # one backend takes every number of rows
        return bool(row.get("batch_invariant", False))
    return bool(rows_of_x <= row["most_rows"])


@cache
def _why_not_device(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    # Compiled code runs on its own and on later minor versions of the same major one.
    if any(number // 10 == major and number % 10 <= minor for number in library.architectures()):
        return None
    compiled = ", ".join(f"sm_{number}" for number in library.architectures())
    return (
        f"{library.path().name} was compiled for {compiled}: {torch.cuda.get_device_name(device)} is sm_{major}{minor}"
    )


@cache
def why_not_checked(device: torch.device) -> str | None:
    """What the self-check finds wrong on ``device``, once."""
    return self_check.why_wrong(device, _in_tiles)


registry.register(CudaBackend())
