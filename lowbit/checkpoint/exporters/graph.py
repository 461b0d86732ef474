"""What exporters of graphs share: a model as a function of ``input_ids`` and ``attention_mask``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Graph(nn.Module):
    """What is exported: logits, or the last hidden state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        cached = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **cached)
        found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return found


def require_input_ids(model: nn.Module, format: str) -> None:
    """Raise ``ValueError`` for a model that takes something else."""
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(f"model must take input_ids to be exported as {format!r}: its main input is "
                         f"{getattr(model, 'main_input_name', None)!r}")  # fmt: skip


def dynamic_inputs(device: torch.device | str = "cpu") -> tuple[tuple[Tensor, Tensor], tuple[Any, Any]]:
    """Inputs to trace :class:`Graph` with, and which of their sizes may be others: ``[batch, length]``, both."""
    ids = torch.ones(2, 8, dtype=torch.int64, device=device)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    return (ids, torch.ones_like(ids)), ({**sizes}, {**sizes})
