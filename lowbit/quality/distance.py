"""How far a model's outputs are from another one's, on batches: one number that can be learned from and planned by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.calibrate import call, describe_batch

_KEPT = 1 << 30  # bytes of the reference's outputs that are held


def between(output: Any, wanted: Any, batch: Any) -> Tensor:
    """KL divergence of the probabilities that logits give from those of ``wanted``, the mean over tokens or classes
    that count; of encoders the squared error of ``last_hidden_state`` over the mean square of ``wanted``'s, half of it
    that of tokens, half that of their mean for each text: errors of tokens that are alike do not average out there."""
    mine, other = (_values(each, output) for each in (output, wanted))
    if mine is None or other is None or mine.shape != other.shape:
        raise ValueError("model and reference must give logits or last_hidden_state of one shape: got "
                         f"{describe_batch(output)} and {describe_batch(wanted)}")  # fmt: skip
    mine, other = mine.float(), other.to(mine.device).float()
    counts = _counted(batch, mine)
    rows, wanted_rows = (mine, other) if counts is None else (mine[counts], other[counts])
    if _are_logits(output, mine):
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


def _name(output: Any) -> str:
    return "logits" if hasattr(output, "logits") or isinstance(output, Tensor) else "last_hidden_state"


def _values(output: Any, like: Any) -> Tensor | None:
    found = output if isinstance(output, Tensor) else getattr(output, _name(like), None)
    return found if isinstance(found, Tensor) else None


def _counted(batch: Any, values: Tensor) -> Tensor | None:
    """Which rows of the outputs are of tokens, where some are of padding."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    return mask.bool() if mask is not None and mask.shape == values.shape[:-1] else None


def _are_logits(output: Any, values: Tensor) -> bool:
    return _name(output) == "logits" and values.shape[-1] > 1


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
        """Scalars of one batch whose gradients G tell the distance of a small change of ``model``, the reference:

            mean of <G, W' - W>**2  ->  the distance of the model with W' in place of W,    to second order in W' - W

        Each is the sum of the outputs times random numbers. Of logits, with the probabilities p of n tokens, these
        are ``(r - p * sum(r)) / sqrt(2 * n)``, ``r = sqrt(p) * e``, e ~ N(0, 1): their covariance is the Fisher
        information, the second derivative of the KL divergence, over 2 n. Of encoders they are e over the norm of the
        outputs.
        """
        batch = self.batches[index]
        output = call(model, batch)
        values = _values(output, output)
        if values is None:
            raise ValueError(f"model must give logits or last_hidden_state: got {describe_batch(output)}")
        values = values.float()
        if (counts := _counted(batch, values)) is not None:
            values = values[counts]
        fixed = values.detach()
        found = []
        for _ in range(count):
            random = torch.randn(fixed.shape, generator=generator).to(fixed.device)
            if _are_logits(output, fixed):
                p = fixed.softmax(-1)
                root = p.sqrt() * random
                factor = (root - p * root.sum(-1, keepdim=True)) / (2 * fixed[..., 0].numel()) ** 0.5
            else:
                factor = random / fixed.norm().clamp(min=torch.finfo(torch.float32).tiny)
            found.append((factor * values).sum())
        return found

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
