"""What a long run has done, in a folder: it goes on there when it is started again."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

_PAUSE = 60.0  # seconds from one save of a state to the next, at least
_SHARE = 20  # and so many times as long as a save took


class Finished:
    """Finished parts of a run, a file each. ``run`` says which run this is, as JSON.

    Raises:
        ValueError: the folder has parts of another run.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        self.folder, self._run = Path(folder), json.dumps(run, sort_keys=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                found = stored.metadata() or {}
            if found.get("run") != self._run:
                raise self._of_another(file)

    @staticmethod
    def _of_another(file: Path) -> ValueError:
        return ValueError(f"folder must hold what this very run has finished, or nothing: {file} is of another model, "
                          "calibration or arguments")  # fmt: skip

    def load(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, numbers) of a part; ``None`` where it is not finished."""
        file = self._file(part)
        if not file.exists():
            return None
        with safe_open(file, "pt") as stored:
            numbers = json.loads(stored.metadata()["numbers"])
            return {name: stored.get_tensor(name) for name in stored.keys()}, numbers  # noqa: SIM118 (no mapping)

    def save(self, part: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        file = self._file(part)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, f"{file}.new", {"run": self._run, "numbers": json.dumps(numbers)})
        Path(f"{file}.new").replace(file)  # whole, or not there

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


class Saved:
    """How far the one part of a run that learns as a whole has come: one file, written anew from time to time.

    ``before``: the loss that it begins with, which says what ``run`` cannot: which function it is.

    Raises:
        ValueError: the folder has the state of a run with another loss.
    """

    _part = "model"

    def __init__(self, finished: Finished, before: float) -> None:
        self._finished, self._before = finished, before
        self._next = time.monotonic() + _PAUSE
        found = finished.load(self._part)
        if found is not None and not math.isclose(found[1]["before"], before, rel_tol=1e-3):
            raise finished._of_another(finished._file(self._part))
        self.found = None if found is None else (found[0], int(found[1]["step"]))  # tensors, and the steps done

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, tensors: Mapping[str, Tensor], step: int) -> None:
        start = time.monotonic()
        self._finished.save(self._part, tensors, {"before": self._before, "step": step})
        now = time.monotonic()
        self._next = now + max(_PAUSE, _SHARE * (now - start))


def fingerprint(values: Any) -> str:
    """Of the tensors, numbers and texts in nested containers."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
