"""A float transformers folder: every layer dequantized, in its compute dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.checkpoint.exporters.exporter import Exporter, save_folder
from lowbit.nn.layer import Layer


class Floats(Exporter):
    format = "float"
    can_share = True
    round_trip = "floats, as a float folder"

    def problem(self, name: str, layer: Layer) -> str | None:
        return None

    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any
    ) -> None:
        save_folder(model, {}, {**kept, **floats}, None, target)
