"""What errors of a weight's rows cost the model, to second order: Hessians for embeddings, and heads tied to them.

An embedding multiplies no input whose products would say which errors of its rows matter. Gradients do: with
G = d s / d weight ``[N, K]``, for scalars s whose gradients have the second derivative of the loss as their covariance,

    cost of an error E  ~  sum over rows v of E[v] A[v] E[v].T,    A[v] = mean over s of G[v].T G[v]

(Gauss-Newton; for a negative log-likelihood as s the empirical Fisher information).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.quantizer import Statistics
from lowbit.model import calibrate
from lowbit.model.outputs import probes

__all__ = ["PROBES", "Loss", "RowCosts", "collect_row_costs", "one_model", "tied_hessian"]

PROBES = 16  # gradients of the model's outputs, for all batches together; at least one for each

Loss = Callable[[nn.Module, Any], Tensor]

_known: ContextVar[dict[tuple[str, ...], dict[str, RowCosts]] | None] = ContextVar("row costs", default=None)


@contextmanager
def one_model() -> Iterator[None]:
    """Inside, all conversions are of one float model with the same batches: its weights are measured once."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


@dataclass
class RowCosts:
    """What was measured of a weight ``[N, K]``.

    Attributes:
        hessian: float32 ``[K, K]``: the sum of A[v] over the rows.
        rows: float32 ``[N]``: the trace of each A[v].
        count: how many rows had a gradient, all batches together.
    """

    hessian: Tensor
    rows: Tensor
    count: int

    def statistics(self) -> Statistics:
        """For a quantizer of the weight alone:

        - ``hessian`` with K/count times its mean on the diagonal, as :func:`~lowbit.model.calibrate.collect_hessians`;
        - ``sensitivity[v, k] = (rows[v] + mean(rows)) * hessian[k, k]``. A row that calibration met once, or never, has
          too few gradients of its own for more.
        """
        hessian = self.hessian.clone()
        hessian.diagonal().add_(len(hessian) / self.count * hessian.diagonal().mean())
        weighed = (self.rows / self.rows.mean() + 1).unsqueeze(1) * hessian.diagonal()
        return Statistics(hessian=hessian, sensitivity=weighed)


def collect_row_costs(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Sequence[Any], loss: Loss | None = None
) -> dict[str, RowCosts]:
    """Of every weight, by name, that has a gradient; without one that has an infinite one.

    The scalars s are ``loss(model, batch)``; without a loss random ones of the model's outputs, which need no labels:
    then A is the second derivative of the KL divergence of its probabilities from what they are, or of the relative
    squared error of ``last_hidden_state`` (:func:`~lowbit.model.outputs.probes`). A row that is read several times in
    a batch gets the sum of its gradients. Padding counts as far as s depends on it: in no outputs' s.

    Costs a forward pass for each batch and ``PROBES`` backward passes, with their memory. ``requires_grad`` and
    ``grad`` of the parameters stay as they are.

    Raises:
        ValueError: no batches; outputs that are neither; a loss that is no scalar.
    """
    known = _known.get()
    if known is not None and tuple(weights) in known:
        return known[tuple(weights)]
    if not batches:
        raise ValueError("calibration requires at least one batch: got none")
    found: dict[str, RowCosts] = {}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with calibrate.evaluating(model), torch.enable_grad():
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for scalar, last in _scalars(model, batches, loss):
                if not scalar.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    scalar, list(weights.values()), retain_graph=not last, allow_unused=True
                )
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is not None:
                        _add(found.setdefault(name, _none(weight)), gradient)
        finally:
            for parameter, before in required.items():
                parameter.requires_grad_(before)
    each = 1 if loss is not None else _each(batches)
    for costs in found.values():
        costs.count = -(-costs.count // each)
    found = {name: costs for name, costs in found.items() if costs.count and bool(costs.rows.isfinite().all())}
    if known is not None:
        known[tuple(weights)] = found
    return found


def _each(batches: Sequence[Any]) -> int:
    """How many probes of a batch."""
    return -(-PROBES // len(batches))


def _scalars(model: nn.Module, batches: Sequence[Any], loss: Loss | None) -> Iterator[tuple[Tensor, bool]]:
    """Each scalar, and whether it is the last one of its batch."""
    generator = torch.Generator().manual_seed(0)
    each = _each(batches)
    for i, batch in enumerate(batches):
        with calibrate._naming(model, i, batch):
            if loss is not None:
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    raise ValueError(f"loss must return a scalar tensor: got {calibrate.describe_batch(value)}")
                yield value, True
                continue
            output = calibrate.call(model, batch)
            for j, scalar in enumerate(probes(output, batch, each, generator)):
                yield scalar, j + 1 == each


def _none(weight: Tensor) -> RowCosts:
    n, k = weight.shape
    sums = torch.zeros(k, k, dtype=torch.float32, device=weight.device)
    return RowCosts(sums, torch.zeros(n, dtype=torch.float32, device=weight.device), 0)


def _add(costs: RowCosts, gradient: Tensor) -> None:
    gradient = gradient.float()
    squares = gradient.square().sum(1)
    read = squares.nonzero()[:, 0]
    rows = gradient if len(read) == len(gradient) else gradient[read]
    costs.hessian.addmm_(rows.t(), rows)
    costs.rows += squares
    costs.count += len(read)


def tied_hessian(inputs: Tensor, head: RowCosts, embedding: RowCosts) -> Tensor:
    """``[K, K]`` for a weight that an embedding and a head share: the Hessian of the head's ``inputs``, in the unit of
    the loss that its gradients give it, and that of the embedding."""
    hessian = embedding.statistics().hessian
    assert hessian is not None
    return inputs * (head.hessian.trace() / inputs.trace()) + hessian
