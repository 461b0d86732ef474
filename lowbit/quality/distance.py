"""How far a model's outputs are from another one's, on batches: one number that can be learned from and planned by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.calibrate import call, describe_batch
from lowbit.model.outputs import are_logits, counted, output_values, probes

_KEPT = 1 << 30  # bytes of the reference's outputs that are held


def between(output: Any, wanted: Any, batch: Any) -> Tensor:
    """KL divergence of the probabilities that logits give from those of ``wanted``, the mean over tokens or classes
    that count; of encoders the squared error of ``last_hidden_state`` over the mean square of ``wanted``'s, half of it
    that of tokens, half that of their mean for each text: errors of tokens that are alike do not average out there."""
    mine, other = (output_values(each, output) for each in (output, wanted))
    if mine is None or other is None or mine.shape != other.shape:
        raise ValueError("model and reference must give logits or last_hidden_state of one shape: got "
                         f"{describe_batch(output)} and {describe_batch(wanted)}")  # fmt: skip
    mine, other = mine.float(), other.to(mine.device).float()
    counts = counted(batch, mine)
    rows, wanted_rows = (mine, other) if counts is None else (mine[counts], other[counts])
    if are_logits(output, mine):
        p = wanted_rows.log_softmax(-1)
        return (p.exp() * (p - rows.log_softmax(-1))).sum(-1).mean()
    of_tokens = _relative(rows, wanted_rows)
    if mine.dim() != 3:
        return of_tokens
    return (of_tokens + _relative(_mean(mine, counts), _mean(other, counts))) / 2


def _relative(mine: Tensor, other: Tensor) -> Tensor:
    return (mine - other).square().mean() / other.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _mean(values: Tensor, counts: Tensor | None) -> Tensor:
    """Of the tokens of each text that count."""
    if counts is None:
        return values.mean(1)
    weights = counts.unsqueeze(-1).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)


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

    def probes(self, model: nn.Module, index: int, count: int, generator: torch.Generator) -> list[Tensor]:
        """Those of one batch (:func:`lowbit.model.outputs.probes`); ``model`` is the reference."""
        batch = self.batches[index]
        return list(probes(call(model, batch), batch, count, generator))

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
