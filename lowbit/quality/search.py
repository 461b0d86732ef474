"""Choosing one candidate per layer: exactly where costs are known, and by trials where they are only believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UNITS = 1 << 14  # steps of bytes between the smallest and the largest choice
# How wrong scores may be, as shares of each: all of them together, those of one layer, each by itself; and how much the
# cost of a whole choice differs from the sum of its parts beside that.
TOGETHER, LAYER, ALONE, REST = 0.5, 0.3, 0.2, 0.02


def knapsack(costs: Tensor, sizes: Tensor, limit: int) -> list[int]:
    """Of each row of ``[G, C]`` a column, so that the sum of ``costs`` is least and that of ``sizes`` within ``limit``.

    Exact but for the unit of bytes, to which sizes are rounded up: 1/16384 of what there is to distribute.
    """
    least = sizes.amin(1)
    free = limit - int(least.sum())
    if free < 0:
        raise ValueError(f"limit must hold the smallest choices, {int(least.sum())}: got {limit}")
    unit = max(1, -(-free // UNITS))
    extra = (sizes - least[:, None] + unit - 1) // unit
    room = free // unit
    best = torch.zeros(room + 1, dtype=torch.float64)  # least cost with at most so many units
    picks = []
    for cost, more in zip(costs.double(), extra.tolist(), strict=True):
        options = torch.full((len(more), room + 1), math.inf, dtype=torch.float64)
        for c, units in enumerate(more):
            if units <= room:
                options[c, units:] = best[: room + 1 - units] + cost[c]
        best, pick = options.min(0)
        picks.append(pick)
    place, chosen = room, []
    for pick, more in zip(reversed(picks), reversed(extra.tolist()), strict=True):
        chosen.append(int(pick[place]))
        place -= more[chosen[-1]]
    return chosen[::-1]


class Beliefs:
    """What is believed of the cost of each candidate: a Gaussian, by scores and by the costs of whole choices.

        cost[g, c] = score[g, c] * (1 + TOGETHER * a + LAYER * b[g] + ALONE * e[g, c]),    a, b, e ~ N(0, 1)
        y = sum over g of cost[g, c(g)] + REST * y * n,    n ~ N(0, 1)

    Args:
        scores: ``[G, C]``, not negative.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores.double()
        self._plans: list[list[int]] = []
        self._costs: list[float] = []

    def observe(self, plan: Sequence[int], cost: float) -> None:
        """``plan``, a candidate of each row, was measured."""
        self._plans.append(list(plan))
        self._costs.append(cost)

    def mean(self) -> Tensor:
        """``[G, C]``."""
        return self._updated(self.scores, torch.zeros(len(self._plans), dtype=torch.float64))

    def sample(self, generator: torch.Generator) -> Tensor:
        """``[G, C]``: a draw without measurements, corrected as the mean is (Matheron's rule, arXiv 2002.09309)."""
        groups, count = self.scores.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        factor = 1 + TOGETHER * normal(1) + LAYER * normal(groups, 1) + ALONE * normal(groups, count)
        rest = REST * torch.tensor(self._costs, dtype=torch.float64) * normal(len(self._plans))
        return self._updated(self.scores * factor, rest)

    def _updated(self, costs: Tensor, rest: Tensor) -> Tensor:
        """``costs`` after the measurements, whose other part is ``rest``."""
        if not self._plans:
            return costs
        parts = torch.stack([self._part(plan) for plan in self._plans])  # [T, G, C], scores where the plan has them
        of_plan, of_layer = parts.sum((1, 2)), parts.sum(2)
        shared = TOGETHER**2 * of_plan[:, None, None] + LAYER**2 * of_layer[:, :, None]
        covariance = self.scores * (shared + ALONE**2 * parts)  # of each cost with what each plan sums to
        taken = (parts != 0).double()
        measured = torch.tensor(self._costs, dtype=torch.float64)
        between = torch.einsum("tgc,sgc->ts", covariance, taken) + torch.diag((REST * measured).square())
        missing = measured - torch.einsum("tgc,gc->t", taken, costs) - rest
        smallest = 1e-12 * between.diagonal().mean() + torch.finfo(torch.float64).tiny
        between.diagonal().add_(smallest)
        return costs + torch.einsum("tgc,t->gc", covariance, torch.linalg.solve(between, missing))

    def _part(self, plan: list[int]) -> Tensor:
        part = torch.zeros_like(self.scores)
        rows = torch.arange(len(plan))
        part[rows, plan] = self.scores[rows, plan].clamp(min=torch.finfo(torch.float64).tiny)
        return part


def search(
    scores: Tensor,
    sizes: Tensor,
    limit: int,
    measure: Callable[[list[int]], float],
    trials: int,
    *,
    known: Sequence[tuple[list[int], float]] = (),
    seed: int = 0,
) -> tuple[list[int], float]:
    """The best choice that was measured, and its cost.

    Each trial takes the best choice by what is believed, and measures it; every second one, and where that is known, by
    a draw of what is believed (Thompson sampling). ``known``: choices that were measured before.
    """
    beliefs, generator = Beliefs(scores), torch.Generator().manual_seed(seed)
    found = {}
    for plan, cost in known:
        found[tuple(plan)] = cost
        beliefs.observe(plan, cost)
    for trial in range(trials):
        plan = knapsack(beliefs.sample(generator) if trial % 2 else beliefs.mean(), sizes, limit)
        for _ in range(8):
            if tuple(plan) not in found:
                break
            plan = knapsack(beliefs.sample(generator), sizes, limit)
        if tuple(plan) in found:
            break  # nothing else is likely
        found[tuple(plan)] = cost = measure(plan)
        beliefs.observe(plan, cost)
    best = min((plan for plan in found), key=lambda plan: found[plan])
    return list(best), found[best]
