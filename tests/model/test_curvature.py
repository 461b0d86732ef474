"""What errors of embeddings cost the model: Hessians of rows against float64 gradients, and who is given them."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
import lowbit.model.plan
from lowbit import Codebook, Packed
from lowbit.core import quantizer as registry
from lowbit.model import calibrated, curvature
from lowbit.model.calibrate import collect_hessians
from lowbit.model.curvature import RowCosts, collect_row_costs, tied_hessian
from lowbit.model.outputs import probes
from lowbit.packed.quantize import Descent

N, K = 11, 8


class Net(nn.Module):
    """Tokens and positions, one layer, and a head that may be tied to the tokens."""

    def __init__(self, tied: bool = False, what: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.tokens, self.positions = nn.Embedding(N, K), nn.Embedding(6, K)
        self.norm, self.mid, self.head = nn.LayerNorm(K), nn.Linear(K, K), nn.Linear(K, N, bias=False)
        self.unused = nn.Embedding(3, K)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> object:
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        if attention_mask is not None:  # every token sees the mean of those that count
            counts = attention_mask.unsqueeze(-1).to(x.dtype)
            x = x + (x * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True)
        x = torch.tanh(self.mid(x))
        return SimpleNamespace(logits=self.head(x)) if self.what == "logits" else SimpleNamespace(last_hidden_state=x)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Padded, of ids below 8; the id 1 is twice in every text, the id 9 is padding alone."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(2, 8, (2, 6), generator=generator)
        ids[:, 1] = ids[:, 3] = 1
        ids[0, 4:] = 9
        found.append({"ids": ids, "attention_mask": (ids != 9).long()})
    return found


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    counts = batch["attention_mask"].bool()
    return F.cross_entropy(model(**batch).logits[counts], batch["ids"][counts])


def second_derivative(model: Net, weight: nn.Parameter, given: list[dict[str, Tensor]]) -> Tensor:
    """sum over rows of A[v] for probes, in float64 and without them: J.T F J, J of every row by itself."""
    total = torch.zeros(K, K, dtype=torch.float64)
    for batch in given:
        out = model(**batch)
        values = (out.logits if model.what == "logits" else out.last_hidden_state)[batch["attention_mask"].bool()]
        jacobian = torch.stack([torch.autograd.grad(v, weight, retain_graph=True)[0] for v in values.flatten()])
        jacobian = jacobian.unflatten(0, values.shape)  # [n, outputs, N, K]
        if model.what == "logits":
            p = values.detach().softmax(-1)
            fisher = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / (2 * len(p))
        else:
            fisher = (torch.eye(K, dtype=torch.float64) / values.detach().square().sum()).expand(len(values), K, K)
        total += torch.einsum("tavk,tab,tbvl->kl", jacobian, fisher, jacobian)
    return total


def test_of_a_loss_it_is_the_fisher_information_of_the_rows():
    """A row that a batch has twice gets one gradient, the sum; padding none; what is not read is left out."""
    model, given = Net(), batches()
    weights = {name: getattr(model, name).weight for name in ("tokens", "positions", "unused")}
    model.mid.weight.requires_grad_(False)
    found = collect_row_costs(model, weights, given, loss)
    assert found.keys() == {"tokens", "positions"}
    assert not model.mid.weight.requires_grad and model.head.weight.requires_grad and model.training
    assert all(p.grad is None for p in model.parameters())
    exact = copy.deepcopy(model).double()
    for name in found:
        weight, hessian, rows = getattr(exact, name).weight, 0, 0
        for batch in given:
            gradient = torch.autograd.grad(loss(exact, batch), weight)[0]
            hessian, rows = hessian + gradient.t() @ gradient, rows + gradient.square().sum(1)
        assert torch.allclose(found[name].hessian.double(), hessian, rtol=1e-4, atol=1e-4 * float(hessian.abs().max()))
        assert torch.allclose(found[name].rows.double(), rows, rtol=1e-4, atol=1e-9)
    assert not found["tokens"].rows[[0, 9, 10]].any() and found["tokens"].rows[1:2].all()
    assert found["tokens"].count == sum(len(set(batch["ids"].flatten().tolist()) - {9}) for batch in given)


@pytest.mark.parametrize("what", ["logits", "hidden"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_a_loss_it_is_the_second_derivative_of_the_outputs(tied, what, monkeypatch):
    if tied and what == "hidden":
        pytest.skip("an encoder that reads no head has nothing tied")
    monkeypatch.setattr(curvature, "PROBES", 6000)
    model, given = Net(tied, what), batches(2)
    found = collect_row_costs(model, {"tokens": model.tokens.weight}, given)["tokens"]
    exact = copy.deepcopy(model).double()
    expected = second_derivative(exact, exact.tokens.weight, given) * 3000  # probes of a batch
    assert (found.hessian.double() - expected).norm() < 0.06 * expected.norm()
    assert float(found.hessian.trace()) == pytest.approx(float(found.rows.sum()), rel=1e-4)
    if not tied:
        assert not found.rows[[0, 9, 10]].any()
        assert found.count == sum(len(set(batch["ids"].flatten().tolist()) - {9}) for batch in given)


def test_a_head_that_is_tied_is_measured_apart():
    model, given = Net(tied=True), batches()
    both = collect_row_costs(model, {"tokens": model.tokens.weight}, given, loss)["tokens"]
    plan = lowbit.model.plan.make_plan(model, {"tokens": Packed(bits=3, group_size=4, quantizer="gptq")}, None)
    with calibrated._apart(plan.groups) as weights:
        assert weights.keys() == {"tokens", "head"} and weights["tokens"] is not weights["head"]
        assert weights["tokens"].data_ptr() == weights["head"].data_ptr()
        found = collect_row_costs(model, weights, given, loss)
    assert model.head.weight is model.tokens.weight
    assert not found["tokens"].rows[[0, 9, 10]].any() and found["head"].rows.all()
    assert not torch.allclose(found["tokens"].hessian + found["head"].hessian, both.hessian)  # the cross terms
    inputs = torch.eye(K) * 3
    expected = torch.eye(K) * found["head"].hessian.trace() / K + found["tokens"].statistics().hessian
    assert torch.allclose(tied_hessian(inputs, found["head"], found["tokens"]), expected)


def test_statistics_are_raised_for_few_rows_and_smooth_over_them():
    hessian, rows = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([4.0, 0.0])
    found = RowCosts(hessian, rows, 5).statistics()
    assert torch.allclose(found.hessian, torch.diag(torch.tensor([1.8, 3.8])))
    assert torch.allclose(found.sensitivity, torch.tensor([[3.0], [1.0]]) * torch.tensor([1.8, 3.8]))
    assert torch.equal(hessian, torch.diag(torch.tensor([1.0, 3.0])))


class Watched(Descent):
    name = "watched"

    def quantize(self, weight, spec, statistics):
        self.given[tuple(weight.shape)] = statistics
        return super().quantize(weight, spec, statistics)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setitem(registry._registry, "packed", dict(registry._registry["packed"]))
    quantizer = Watched()
    quantizer.given = {}
    lowbit.register_quantizer(quantizer)
    quantizer.spec = Packed(bits=2, group_size=4, zeros="int", quantizer="watched")
    return quantizer


@pytest.mark.parametrize("with_loss", [False, True])
def test_embeddings_are_given_what_their_rows_cost(watched, with_loss):
    model, given = Net(), batches()
    chosen = loss if with_loss else None
    expected = collect_row_costs(model, {"p": model.positions.weight}, given, chosen)["p"].statistics()
    weight = model.positions.weight.detach().clone()
    packed = lowbit.convert(model, {"*": watched.spec}, calibration=given, loss=chosen)
    found = watched.given[6, K]
    assert torch.allclose(found.hessian, expected.hessian, rtol=1e-4) and found.sensitivity is not None
    made = watched.spec.quantize(weight, hessian=expected.hessian)
    assert torch.equal(packed.positions.dequantize(), type(packed.positions).from_weight(made).dequantize())
    assert packed.positions.note is None
    assert packed.unused.note == "quantized without calibration data: the calibration data gives it no gradient"


def test_what_is_tied_has_both_terms(watched):
    model, given = Net(tied=True), batches()
    inputs = collect_hessians(model, {"head": model.head}, given)["head"]
    packed = lowbit.convert(model, {"tokens": watched.spec}, calibration=given)
    assert packed.tokens.packed is packed.head.packed
    model = Net(tied=True)
    model.head.weight = nn.Parameter(model.head.weight.detach())
    costs = collect_row_costs(model, {"t": model.tokens.weight, "h": model.head.weight}, given)
    expected = tied_hessian(inputs, costs["h"], costs["t"])
    assert torch.allclose(watched.given[N, K].hessian, expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(expected / expected.trace(), inputs / inputs.trace(), rtol=0.05)


class Opaque(Net):
    def forward(self, ids, attention_mask=None):
        return (super().forward(ids, attention_mask).logits,)


class Detached(Net):
    def forward(self, ids, attention_mask=None):
        return SimpleNamespace(logits=super().forward(ids, attention_mask).logits.detach())


@pytest.mark.parametrize(("cls", "why"), [(Opaque, "must give logits or last_hidden_state: got tuple of Tensor"),
                                          (Detached, "gives it no gradient")])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_without_gradients_it_is_as_without_calibration(watched, cls, why, tied):
    model, given = cls(tied), batches()
    stand_in = copy.deepcopy(model)
    inputs = collect_hessians(model, {"head": model.head}, given)["head"]
    packed = lowbit.convert(model, {"tokens": watched.spec}, calibration=given)
    if tied:
        assert torch.equal(watched.given[N, K].hessian, inputs)
        return
    assert not watched.given and why in packed.tokens.note
    assert why in str(lowbit.report(packed))
    plain = lowbit.convert(stand_in, {"tokens": Packed(bits=2, group_size=4, zeros="int", quantizer="mse")})
    assert torch.equal(packed.tokens.dequantize(), plain.tokens.dequantize())


def test_large_models_are_differentiated_only_for_a_loss(watched, monkeypatch):
    monkeypatch.setattr(calibrated, "_WHOLE", 100)
    packed = lowbit.convert(Net(), {"tokens": watched.spec}, calibration=batches())
    assert not watched.given and "more than 100 weights" in packed.tokens.note
    lowbit.convert(Net(), {"tokens": watched.spec}, calibration=batches(), loss=loss)
    assert watched.given[N, K].hessian is not None


def test_a_loss_that_is_none_is_named_before_anything_changed(watched):
    model = Net()
    with pytest.raises(ValueError, match=r"batch 0 .*loss must return a scalar tensor: got Tensor \[2, 6, 11\]"):
        lowbit.convert(model, {"tokens": watched.spec}, calibration=batches(), loss=lambda m, b: m(**b).logits)
    assert type(model.tokens) is nn.Embedding and model.tokens.weight.requires_grad


@pytest.mark.parametrize("spec", [
    Packed(bits=2, group_size=4, quantizer="descent"), Packed(bits=3, granularity="tensor", quantizer="mse"),
    Packed(bits=2, group_size=4, quantizer="mse", outliers=0.05, outliers_by="sensitivity"),
    Codebook(bits=2, quantizer="lnq"), Codebook(bits=2, granularity="tensor", sensitivity=True),
], ids=lambda spec: f"{spec.describe()} {spec.quantizer}")  # fmt: skip
def test_it_costs_the_model_less(spec):
    """Beside a conversion without calibration, by the second derivative itself."""
    torch.manual_seed(3)
    model, given = Net(), batches(4)
    with torch.no_grad():  # so that columns differ in what they cost
        model.mid.weight.mul_(torch.tensor([4.0, 2, 1, 1, 0.5, 0.2, 0.1, 0.1]))
    exact = copy.deepcopy(model).double()
    h = second_derivative(exact, exact.tokens.weight, given)
    costs = []
    for calibration in (given, None):
        chosen = spec if calibration else spec.for_embedding()
        packed = lowbit.convert(copy.deepcopy(model), {"tokens": chosen}, calibration=calibration)
        error = (packed.tokens.dequantize().double() - exact.tokens.weight.detach())[1:8]
        costs.append(float((error @ h * error).sum()))
    assert costs[0] < costs[1]


def test_what_is_known_of_one_model_is_not_measured_again(watched, monkeypatch):
    calls = []
    monkeypatch.setattr(curvature, "probes", lambda *args: calls.append(1) or iter(probes(*args)))
    found = []
    with curvature.one_model():
        for _ in range(2):
            lowbit.convert(Net(), {"tokens": watched.spec}, calibration=batches(2))
            found.append(watched.given[N, K].hessian)
    assert len(calls) == 2 and torch.equal(*found)
    lowbit.convert(Net(), {"tokens": watched.spec}, calibration=batches(2))
    assert len(calls) == 4 and torch.equal(found[0], watched.given[N, K].hessian)
