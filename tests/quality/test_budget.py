"""``plan``: the budget is kept to the byte, the search is exact, and the plan is what it measured."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.model.plan import make_plan
from lowbit.quality import budget as module
from lowbit.quality import scores
from lowbit.quality.distance import Distance
from lowbit.quality.scores import first_names
from lowbit.quality.trial import Trial

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
    uniform = lowbit.convert(copy.deepcopy(model), found.uniform_spec)
    assert packed_bytes(uniform) == found.uniform_bytes <= found.budget
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


def test_default_candidates_have_packed_zeros_and_scales_of_8_bits_and_suit_each_layer():
    forms = {}
    for width, skip in ((40, None), (20, None), (12, None), (12, ["before"])):
        model = Net()
        model.before = nn.Linear(width, 40)
        planner = module.Planner(model, calibration=batches(), skip=skip, fused=False)
        assert all(spec.packed_zeros and spec.scale_bits == 8 and spec.quantizer == "gptq" for spec in planner.specs)
        forms[width, skip is None] = {(spec.bits, spec.group_size) for spec in planner.specs}
    coarse = {(bits, None) for bits in (2, 3, 4, 5, 6, 8)}
    assert forms[12, True] == coarse
    assert forms[20, True] == coarse | {(2, 16), (3, 16), (4, 16)}
    assert forms[40, True] == forms[12, False] == forms[20, True] | {(2, 32), (3, 32), (4, 32)}


def test_what_is_held_out_is_not_planned_on():
    data = batches(9)
    planner = module.Planner(Net(), calibration=data, candidates=CANDIDATES)
    assert all(a is b for a, b in zip([*planner.held_out, *planner.seen], data, strict=True))
    assert len(planner.held_out) == 2
    assert planner.prepared().trial.distance.batches == planner.seen
    assert planner.prepared().held_out.batches == planner.held_out


def test_layers_of_one_input_may_differ_without_fused():
    found = lowbit.plan(Net(), 4.1, calibration=batches(), candidates=CANDIDATES, fused=False)
    assert len(found.specs) == 9 and len({found.specs[f"blocks.{b}.{n}"] for b in (0, 1) for n in ("q", "k")}) > 1


def test_a_plan_that_is_no_better_is_uniform(monkeypatch):
    monkeypatch.setattr(module, "search", lambda scores, *_, **__: ([0] * len(scores), 0.0))
    found = lowbit.plan(Net(), 5.6, calibration=batches(), candidates=CANDIDATES)
    assert not found.kept and set(found.specs.values()) == {CANDIDATES[2]} == {found.uniform_spec}
    assert "was no worse and is taken" in str(found)


def test_one_planner_serves_several_budgets(monkeypatch):
    calls, converted = [], module._converted
    monkeypatch.setattr(module, "_converted", lambda *given: calls.append(given) or converted(*given))
    planner = module.Planner(Net(), calibration=batches(), candidates=CANDIDATES, trials=4)
    found = [planner.within(bits) for bits in (5.0, 4.2)]
    assert len(calls) == len(CANDIDATES)
    assert found[1].specs == lowbit.plan(Net(), 4.2, calibration=batches(), candidates=CANDIDATES, trials=4).specs
    assert found[1].bytes <= found[1].budget < found[0].bytes


@torch.no_grad()
def trial_of(model: nn.Module, candidates: list[lowbit.Packed], data: list[Tensor]):
    planner = module.Planner(model, calibration=[data[0], *data], candidates=candidates)
    planner.held_out, planner.seen = data, data
    copied = copy.deepcopy(model)
    swaps = {name: swap for swap in make_plan(copied, candidates[0]).swaps() for name in swap.names}
    choices = [module._converted(model, spec, None, data, planner.groups) for spec in candidates]
    originals = [{name: swaps[name].module for name in group} for group in planner.groups]
    return Trial(copied, originals, choices, Distance(model, data)), swaps, planner.groups


def test_gradients_tell_the_distance_of_small_changes(monkeypatch):
    """A change of the weights by 2**-10 of what 3 bits change costs 2**-20 of the scores."""
    monkeypatch.setattr(scores, "PROBES", 1024)
    model = Net()
    trial, swaps, groups = trial_of(model, [lowbit.Packed(bits=3), lowbit.Packed(bits=4)], batches(2))
    frozen = trial.model.blocks[0].k.weight.requires_grad_(False)
    found = scores.by_gradient(trial.model, swaps, trial.choices, trial.distance)
    assert found.shape == (len(groups), 2)
    assert [p.requires_grad for p in trial.model.parameters()] == [p is not frozen for p in trial.model.parameters()]
    expected = torch.zeros_like(found)
    model = model.double()
    floats = {name: swap.weight().double() for name, swap in swaps.items()}
    for g in range(len(groups)):
        for c in (0, 1):
            changed = copy.deepcopy(model)
            for name, layer in trial.choices[c][g].items():
                weight = changed.get_submodule(name).weight
                weight.data = floats[name] + 2**-10 * (layer.dequantize(torch.float64) - floats[name])
            for ids in trial.distance.batches:
                p, q = (each(ids).detach().log_softmax(-1) for each in (model, changed))
                expected[g, c] += 2**20 * (p.exp() * (p - q)).sum(-1).mean() / len(trial.distance.batches)
    assert torch.allclose(found, expected, rtol=0.25)
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.05)


def test_transposed_weights_have_the_same_scores(monkeypatch):
    """transformers' Conv1D keeps its weight as [K, N]; a square one does not show it."""
    utilities = pytest.importorskip("transformers.pytorch_utils")
    monkeypatch.setattr(scores, "PROBES", 8)
    found = []
    for transposed in (False, True):
        model = Net()
        for block in model.blocks:
            if transposed:
                conv = utilities.Conv1D(32, 32)
                conv.weight.data, conv.bias.data = block.q.weight.detach().t().clone(), block.q.bias.detach()
                block.q = conv
        trial, swaps, _ = trial_of(model, [lowbit.Packed(bits=3), lowbit.Packed(bits=4)], batches(2))
        found.append(scores.by_gradient(trial.model, swaps, trial.choices, trial.distance))
        monkeypatch.setattr(scores, "_KEPT", 0)  # the second time without what is held
    assert torch.allclose(*found, rtol=1e-3)


@pytest.mark.parametrize("what", ["logits", "hidden"])
def test_probes_have_the_covariance_of_the_second_derivative(what):
    """Their gradients with respect to the outputs themselves; rows of padding have none."""
    values = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])

    class Same(nn.Module):
        def forward(self, attention_mask: Tensor) -> object:
            return values if what == "logits" else SimpleNamespace(last_hidden_state=values)

    distance = Distance(Same(), [{"attention_mask": mask}])
    probes = distance.probes(Same(), 0, 8000, torch.Generator().manual_seed(1))
    gradients = torch.stack([torch.autograd.grad(each, values, retain_graph=True)[0].flatten() for each in probes])
    assert not gradients[:, 8:].any()
    found = gradients[:, :8].t() @ gradients[:, :8] / len(gradients)
    if what == "logits":
        rows = values.detach()[0, :2].softmax(-1)
        expected = torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in rows)) / (2 * 2)
    else:
        expected = torch.eye(8) / values.detach()[0, :2].square().sum()
    assert (found - expected).norm() < 0.06 * expected.norm()


@torch.no_grad()
def test_a_trial_is_the_converted_model():
    candidates = [lowbit.Packed(bits=3), lowbit.Packed(bits=3, activations="int8"), lowbit.Packed(bits=8)]
    model, data = Net(), batches(2)
    trial, _, groups = trial_of(model, candidates, data)
    floats = trial([None] * len(groups))
    assert floats == 0
    for plan in ([0] * len(groups), [1] * len(groups), [(0, 1, 2)[g % 3] for g in range(len(groups))]):
        specs = {name: candidates[c] for g, c in enumerate(plan) for name in first_names(trial.choices[c][g])}
        packed = lowbit.convert(copy.deepcopy(model), specs)
        assert trial(plan) == pytest.approx(trial.distance(packed), rel=1e-4)
    assert trial([0] * len(groups)) != pytest.approx(trial([1] * len(groups)), rel=1e-3)
    assert trial([None] * len(groups)) == floats


@torch.no_grad()
def test_the_distance_of_each_candidate_alone():
    model, data = Net(), batches(2)
    trial, _, _ = trial_of(model, CANDIDATES[:2], data)
    found = scores.by_distance(trial)
    for g, c in ((0, 1), (3, 0)):
        packed = lowbit.convert(copy.deepcopy(model), dict.fromkeys(first_names(trial.choices[c][g]), CANDIDATES[c]))
        assert found[g, c] == pytest.approx(trial.distance(packed), rel=1e-4)


def test_the_signal_may_be_asked_for():
    found = lowbit.plan(Net(), 4.4, calibration=batches(), candidates=CANDIDATES, signal="kl", trials=3)
    assert found.kept and found.bytes <= found.budget

    class Fixed(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).detach()

    with pytest.raises(ValueError, match="signal='gradient' requires outputs that depend"):
        lowbit.plan(Fixed(), 4.4, calibration=batches(), candidates=CANDIDATES, signal="gradient")


def test_experts_are_tried_one_by_one():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    found = lowbit.plan(model, 4.4, calibration=batches(2), candidates=CANDIDATES, trials=2)
    packed = lowbit.convert(copy.deepcopy(model), found.specs)
    assert packed_bytes(packed) == found.bytes <= found.budget and any("experts" in name for name in found.specs)
    with pytest.raises(ValueError, match="signal='gradient': layer .*experts.* has no weight"):
        lowbit.plan(model, 4.4, calibration=batches(2), candidates=CANDIDATES, signal="gradient")


def test_encoders_and_models_in_training_are_planned():
    class Encoder(Net):
        def forward(self, ids: Tensor) -> object:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return SimpleNamespace(last_hidden_state=x)

    model = Encoder().train()
    model.head = nn.Identity()
    found = lowbit.plan(model, 4.4, calibration=batches(), candidates=CANDIDATES, trials=4)
    assert found.bytes <= found.budget and found.kept == (found.measured < found.uniform)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "3.5"}, "budget must be such as '3.5 bits' or '700 MB': got budget='3.5'"),
        ({"budget": -2}, "got budget=-2"),
        ({"budget": True}, "got budget=True"),
        ({"budget": 1.5}, "budget must hold the smallest candidate, 2-bit .* which takes"),
        ({"budget": "1 kB"}, "budget must hold the smallest candidate"),
        ({"calibration": batches(1)}, "at least two batches"),
        ({"model": nn.Linear(32, 8), "calibration": [torch.ones(2, 32)] * 4},
         "model must hold its layers: got a Linear, which is one: wrap it in nn.Sequential"),
        ({"candidates": [lowbit.Packed()]}, "candidates must be two specs or more"),
        ({"skip": ["nowhere"]}, "nowhere"),
        ({"signal": "error"}, "signal must be one of 'gradient', 'kl': got signal='error'"),
        ({"trials": 0}, "trials must be an integer of at least 1: got trials=0"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"model": Net(), "budget": 4.5, "calibration": batches(), "candidates": CANDIDATES, **arguments}
    with pytest.raises(ValueError, match=message):
        lowbit.plan(**given)
