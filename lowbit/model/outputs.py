"""What a model gives, and random scalars of it whose gradients tell how far a change of its weights takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.model.calibrate import describe_batch


def output_values(output: Any, like: Any) -> Tensor | None:
    """The logits, or the ``last_hidden_state``, whichever ``like`` has; a tensor is what it is."""
    found = output if isinstance(output, Tensor) else getattr(output, _name(like), None)
    return found if isinstance(found, Tensor) else None


def are_logits(output: Any, values: Tensor) -> bool:
    """Whether ``values`` of ``output`` are logits of more than one class."""
    return _name(output) == "logits" and values.shape[-1] > 1


def counted(batch: Any, values: Tensor) -> Tensor | None:
    """Which rows of ``values`` are of tokens, where some are of padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if mask is not None and mask.shape == values.shape[:-1] else None


def _name(output: Any) -> str:
    return "logits" if hasattr(output, "logits") or isinstance(output, Tensor) else "last_hidden_state"


def probes(output: Any, batch: Any, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Scalars of a model's output for a batch, whose gradients G tell the distance of a small change of the model:

        mean of <G, W' - W>**2  ->  the distance of the model with W' in place of W,    to second order in W' - W

    Each is the sum of the outputs times random numbers. Of logits, with the probabilities p of n tokens, these
    are ``(r - p * sum(r)) / sqrt(2 * n)``, ``r = sqrt(p) * e``, e ~ N(0, 1): their covariance is the Fisher
    information, the second derivative of the KL divergence, over 2 n. Of encoders they are e over the norm of the
    outputs. Rows of padding count in none.

    Raises ``ValueError`` for an output that has neither logits nor ``last_hidden_state``.
    """
    values = output_values(output, output)
    if values is None:
        raise ValueError(f"model must give logits or last_hidden_state: got {describe_batch(output)}")
    values = values.float()
    if (counts := counted(batch, values)) is not None:
        values = values[counts]
    fixed = values.detach()
    for _ in range(count):
        random = torch.randn(fixed.shape, generator=generator, dtype=torch.float32, device="cpu").to(fixed.device)
        if are_logits(output, fixed):
            p = fixed.softmax(-1)
            root = p.sqrt() * random
            factor = (root - p * root.sum(-1, keepdim=True)) / (2 * fixed[..., 0].numel()) ** 0.5
        else:
            factor = random / fixed.norm().clamp(min=torch.finfo(torch.float32).tiny)
        yield (factor * values).sum()
