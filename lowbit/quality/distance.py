"""How far a model's outputs are from another one's, on batches: one number that can be learned from and planned by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.calibrate import call, describe_batch

_KEPT = 1 << 30  # bytes of the reference's outputs that are held


def between(output: Any, wanted: Any, batch: Any) -> Tensor:
    """KL divergence of the probabilities that logits give from those of ``wanted``, the mean over tokens or classes
    that count; of encoders the squared error of ``last_hidden_state``, over the mean square of ``wanted``'s."""
    name = "logits" if hasattr(output, "logits") or isinstance(output, Tensor) else "last_hidden_state"
    mine, other = (each if isinstance(each, Tensor) else getattr(each, name, None) for each in (output, wanted))
    if not isinstance(mine, Tensor) or not isinstance(other, Tensor) or mine.shape != other.shape:
        raise ValueError("model and reference must give logits or last_hidden_state of one shape: got "
                         f"{describe_batch(output)} and {describe_batch(wanted)}")  # fmt: skip
    mine, other = mine.float(), other.to(mine.device).float()
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is not None and mask.shape == mine.shape[:-1]:
        mine, other = mine[mask.bool()], other[mask.bool()]
    if name == "logits" and mine.shape[-1] > 1:
        p = other.log_softmax(-1)
        return (p.exp() * (p - mine.log_softmax(-1))).sum(-1).mean()
    return (mine - other).square().mean() / other.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


class Distance:
    """The mean over ``batches`` of :func:`between`; what ``reference`` gives is computed once where it fits."""

    def __init__(self, reference: nn.Module, batches: list[Any]) -> None:
        self.reference, self.batches = reference, batches
        self._known: dict[int, Tensor] = {}
        self._bytes = 0

    def __call__(self, model: nn.Module) -> float:
        return sum(float(self.of(model, i)) for i in range(len(self.batches))) / len(self.batches)

    def of(self, model: nn.Module, index: int) -> Tensor:
        """Of one batch; differentiable."""
        batch = self.batches[index]
        output = call(model, batch)
        return between(output, self._wanted(index, output), batch)

    @torch.no_grad()
    def _wanted(self, index: int, like: Any) -> Any:
        if (known := self._known.get(index)) is not None:
            return known if isinstance(like, Tensor) else _Output(known)
        wanted = call(self.reference, self.batches[index])
        values: Any = wanted if isinstance(wanted, Tensor) else getattr(wanted, "logits", None)
        values = getattr(wanted, "last_hidden_state", None) if values is None else values
        if isinstance(values, Tensor) and self._bytes + values.nbytes <= _KEPT:
            self._known[index], self._bytes = values, self._bytes + values.nbytes
        return wanted


class _Output:
    def __init__(self, values: Tensor) -> None:
        self.logits = self.last_hidden_state = values
