"""``plan``: the budget is kept to the byte, the search is exact, and the plan is what it measured."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.quality import budget as module
from lowbit.quality.budget import knapsack

CANDIDATES = [lowbit.Packed(bits=bits, group_size=16, zeros="int") for bits in (2, 3, 4, 8)]


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(d, d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(self.q(x)) * self.k(x)
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """The second block matters little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList([Block(32), Block(32)])
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for parameter in self.blocks[1].parameters():
                parameter *= 0.02
            for parameter in self.blocks[0].parameters():
                parameter *= 3

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2, 12), generator=generator) for _ in range(count)]


def packed_bytes(model: nn.Module) -> int:
    return sum(row.bytes_after for row in lowbit.report(model).rows)


@pytest.mark.parametrize("bits", [4.0, 4.4, 5.7])
def test_the_budget_is_kept_and_where_it_matters_there_are_more_bits(bits):
    model = Net()
    floats = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = lowbit.plan(model, f"{bits} bits", calibration=batches(), candidates=CANDIDATES)
    assert all(torch.equal(tensor, floats[name]) for name, tensor in model.state_dict().items())
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    packed = lowbit.convert(copy.deepcopy(model), found.specs)
    assert packed_bytes(packed) == found.bytes <= found.budget == int(bits * weights / 8)
    assert found.bits_per_weight == pytest.approx(8 * found.bytes / weights) and found.bits_per_weight <= bits
    assert found.kept and found.measured < found.uniform
    p, q = (torch.cat([each(ids) for ids in batches()[:1]]).double().log_softmax(-1) for each in (model, packed))
    assert found.measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean().detach()), rel=1e-4)
    width = {name: spec.bits for name, spec in found.specs.items()}
    assert width["blocks.0.q"] == width["blocks.0.k"] and "head" not in width  # tied to the embedding
    first, second = (sum(width[f"blocks.{block}.{name}"] for name in ("q", "up", "down")) for block in (0, 1))
    assert first > second
    assert f"{found.bits_per_weight:.3f} bits per weight" in str(found)


def test_bytes_count_what_stays_float():
    model = Net()
    whole = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    found = lowbit.plan(model, "9 kB", calibration=batches(), candidates=CANDIDATES)
    packed = lowbit.convert(copy.deepcopy(model), found.specs)
    assert lowbit.report(packed).total_after <= 9000 < whole
    assert lowbit.report(packed).total_after > 9000 - 600  # of one group's next step
    without = lowbit.plan(model, "30.5 kB", calibration=batches(2), candidates=CANDIDATES, skip=["blocks.1"])
    assert not any(name.startswith("blocks.1") for name in without.specs)
    assert 30000 < lowbit.report(lowbit.convert(copy.deepcopy(model), without.specs)).total_after <= 30500


def test_the_candidates_are_those_of_gptq_by_default():
    found = lowbit.plan(Net(), 4.0, calibration=batches())
    assert {spec.quantizer for spec in found.specs.values()} == {"gptq"}
    assert len({spec.bits for spec in found.specs.values()}) > 1 and 3.5 < found.bits_per_weight <= 4
    packed = lowbit.convert(Net(), found.specs, calibration=batches()[1:])
    assert packed_bytes(packed) == found.bytes


def test_layers_of_one_input_may_differ_without_fused():
    found = lowbit.plan(Net(), 4.1, calibration=batches(), candidates=CANDIDATES, fused=False)
    assert len(found.specs) == 9 and len({found.specs[f"blocks.{b}.{n}"] for b in (0, 1) for n in ("q", "k")}) > 1


def test_a_plan_that_is_no_better_is_uniform(monkeypatch):
    monkeypatch.setattr(module, "knapsack", lambda costs, sizes, limit: [0] * len(costs))
    found = lowbit.plan(Net(), 5.6, calibration=batches(), candidates=CANDIDATES)
    assert not found.kept and set(found.specs.values()) == {CANDIDATES[2]} == {found.uniform_spec}
    assert "was no worse and is taken" in str(found)


def test_the_search_is_exact():
    generator = torch.Generator().manual_seed(0)
    for limit in (40, 55, 70):
        costs = torch.rand(5, 3, generator=generator)
        sizes = torch.randint(3, 20, (5, 3), generator=generator)
        fitting = [pick for pick in itertools.product(range(3), repeat=5)
                   if sum(int(sizes[g, c]) for g, c in enumerate(pick)) <= limit]  # fmt: skip
        best = min(sum(float(costs[g, c]) for g, c in enumerate(pick)) for pick in fitting)
        found = knapsack(costs, sizes, limit)
        assert sum(int(sizes[g, c]) for g, c in enumerate(found)) <= limit
        assert sum(float(costs[g, c]) for g, c in enumerate(found)) == pytest.approx(best, rel=1e-6)


def test_large_sizes_stay_within_the_limit():
    generator = torch.Generator().manual_seed(0)
    costs, sizes = torch.rand(60, 4, generator=generator), torch.randint(10**6, 10**8, (60, 4), generator=generator)
    limit = int(sizes.float().mean() * 60)
    found = knapsack(costs, sizes, limit)
    assert limit * 0.98 < sum(int(sizes[g, c]) for g, c in enumerate(found)) <= limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "3.5"}, "budget must be such as '3.5 bits' or '700 MB': got budget='3.5'"),
        ({"budget": -2}, "got budget=-2"),
        ({"budget": True}, "got budget=True"),
        ({"budget": 1.5}, "budget must hold the smallest candidate, 2-bit .* which takes"),
        ({"budget": "1 kB"}, "budget must hold the smallest candidate"),
        ({"calibration": batches(1)}, "at least two batches"),
        ({"candidates": [lowbit.Packed()]}, "candidates must be two specs or more"),
        ({"skip": ["nowhere"]}, "nowhere"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"budget": 4.5, "calibration": batches(), "candidates": CANDIDATES, **arguments}
    with pytest.raises(ValueError, match=message):
        lowbit.plan(Net(), **given)
