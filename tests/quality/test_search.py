"""The search of ``plan``: exact where costs are known, learning where they are not."""

import itertools

import pytest
import torch

from lowbit.quality import search as module
from lowbit.quality.search import ALONE, LAYER, REST, TOGETHER, Beliefs, knapsack, search


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(values, plan) -> float:
    return float(sum(values[g, c] for g, c in enumerate(plan)))


@pytest.mark.parametrize("limit", [27, 31, 40, 55, 70])
def test_the_knapsack_is_exact(limit):
    costs = random(5, 3, seed=limit)
    sizes = torch.randint(3, 20, (5, 3), generator=torch.Generator().manual_seed(2))
    fitting = [pick for pick in itertools.product(range(3), repeat=5) if total(sizes, pick) <= limit]
    if not fitting:
        with pytest.raises(ValueError, match="limit must hold the smallest choices"):
            knapsack(costs, sizes, limit)
        return
    found = knapsack(costs, sizes, limit)
    assert total(sizes, found) <= limit
    assert total(costs, found) == pytest.approx(min(total(costs, pick) for pick in fitting), rel=1e-12)


def test_the_last_byte_is_used():
    sizes, costs = torch.tensor([[2, 5], [3, 4]]), torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    assert [knapsack(costs, sizes, limit) for limit in (5, 6, 7, 8, 9)] == [[0, 0], [0, 1], [0, 1], [1, 0], [1, 1]]


def test_large_sizes_stay_within_the_limit(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    costs, sizes = random(60, 4), torch.randint(10**6, 10**8, (60, 4), generator=generator)
    limit = int(sizes.float().mean() * 60)
    assert limit * 0.98 < total(sizes, knapsack(costs, sizes, limit)) <= limit
    monkeypatch.setattr(module, "UNITS", 7)  # very coarse: it must still be kept
    assert all(total(sizes, knapsack(random(60, 4, seed=s), sizes, limit)) <= limit for s in range(5))


@pytest.mark.parametrize("rest", [REST, 0.4])
def test_beliefs_are_the_conditional_of_the_gaussian(monkeypatch, rest):
    monkeypatch.setattr(module, "REST", rest)
    scores, plans, measured = random(4, 3) + 0.1, [[0, 1, 2, 0], [1, 1, 0, 2], [2, 2, 2, 2]], [1.5, 3.0, 0.7]
    beliefs = Beliefs(scores)
    for plan, cost in zip(plans, measured, strict=True):
        beliefs.observe(plan, cost)
    s, layer = scores.flatten(), torch.arange(12) // 3
    prior = TOGETHER**2 + LAYER**2 * (layer[:, None] == layer).double() + ALONE**2 * torch.eye(12)
    prior = prior * s[:, None] * s
    taken = torch.zeros(3, 12, dtype=torch.float64)
    for row, plan in zip(taken, plans, strict=True):
        row[torch.arange(4) * 3 + torch.tensor(plan)] = 1
    y = torch.tensor(measured, dtype=torch.float64)
    gain = prior @ taken.t() @ torch.linalg.inv(taken @ prior @ taken.t() + torch.diag((rest * y).square()))
    mean, covariance = s + gain @ (y - taken @ s), prior - gain @ taken @ prior
    assert torch.allclose(beliefs.mean().flatten(), mean, rtol=1e-8)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([beliefs.sample(generator).flatten() for _ in range(4000)])
    assert torch.allclose(draws.mean(0), mean, atol=4 * float(covariance.diagonal().max().sqrt()) / 4000**0.5)
    assert (draws.t().cov() - covariance).norm() < 0.08 * covariance.norm()


def test_a_cost_of_nothing_is_no_division():
    beliefs = Beliefs(torch.zeros(3, 2))
    beliefs.observe([0, 1, 0], 0.0)
    assert bool(beliefs.mean().isfinite().all())


def test_trials_find_what_scores_do_not_know(monkeypatch):
    """Half of the layers cost twice what their scores say."""
    means, mean = [], Beliefs.mean
    monkeypatch.setattr(Beliefs, "mean", lambda *given: means.append(given) or mean(*given))
    bits, weight = torch.arange(2, 7), random(20, 1, seed=5) + 0.2
    scores = weight * 4.0 ** -bits[None].double()
    costs = scores * torch.where(random(20, 1, seed=3) < 0.5, 2.0, 1.0)
    sizes = (bits * 100).repeat(20, 1)
    calls = []

    def measure(plan):
        calls.append(plan)
        return total(costs, plan)

    first = knapsack(scores, sizes, 20 * 400)
    best, cost = search(scores, sizes, 20 * 400, measure, 32)
    optimum = total(costs, knapsack(costs, sizes, 20 * 400))
    assert calls[0] == first and len(calls) <= 32 and len({tuple(plan) for plan in calls}) == len(calls)
    assert cost == min(total(costs, plan) for plan in calls) == total(costs, best)
    assert all(total(sizes, plan) <= 20 * 400 for plan in calls)
    assert len(means) == 16  # and every second trial is a draw
    assert cost - optimum < 0.3 * (total(costs, first) - optimum)


def test_what_is_known_may_be_the_best():
    scores, sizes = torch.tensor([[0.1, 0.2]]), torch.tensor([[2, 1]])
    assert search(scores, sizes, 2, lambda plan: 5.0, 3, known=[([1], 0.25)]) == ([1], 0.25)
