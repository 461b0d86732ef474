"""Quantizers as objects: what they declare is measured and handed over; one from outside the package is like ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.cli.command import parser
from lowbit.core import quantizer as registry
from lowbit.model.calibrate import collect_hessians, collect_sensitivities
from lowbit.packed.quantize import quantize


class Toy(lowbit.Quantizer[lowbit.Packed, lowbit.PackedWeight]):
    """Rounds to nearest, and keeps what it was given."""

    family = "packed"
    name = "toy"
    needs = frozenset({"hessian"})

    def __init__(self) -> None:
        self.given: list[lowbit.Statistics] = []

    def quantize(self, weight: Tensor, spec: lowbit.Packed, statistics: lowbit.Statistics) -> lowbit.PackedWeight:
        self.given.append(statistics)
        scales = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / scales).round().clamp(-7, 7) + 8
        return lowbit.PackedWeight(codes.to(torch.uint8), scales, None, spec.bits, None)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(registry._registry, "packed", dict(registry._registry["packed"]))
    quantizer = Toy()
    lowbit.register_quantizer(quantizer)
    return quantizer


TOY = dict(symmetric=True, quantizer="toy")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 24, generator=generator) for _ in range(3)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), torch.arange(len(batch)) % 8)


def test_a_quantizer_from_outside_is_given_what_it_needs(toy):
    found = lowbit.convert(model(), lowbit.Packed(**TOY), calibration=batches())
    first, second = toy.given
    float_model = model()
    hessian = collect_hessians(float_model, {"0": float_model[0]}, batches())["0"]
    assert torch.equal(first.hessian, hessian) and second.hessian.shape == (16, 16)
    assert first.sensitivity is None and first.x_scale is None
    expected = model()[0].weight / (scales := model()[0].weight.abs().amax(1, keepdim=True) / 7)
    assert torch.equal(found[0].dequantize(), expected.round() * scales)
    assert found(batches()[0]).shape == (5, 8)


def test_without_what_it_needs_nothing_is_changed(toy):
    spec, plain = lowbit.Packed(**TOY), model()
    assert spec.calibration_need == "quantizer='toy'" and spec.uses_hessian
    with pytest.raises(ValueError, match="0: quantizer='toy' needs calibration data"):
        lowbit.convert(plain, spec)
    with pytest.raises(ValueError, match="0: quantizer='toy' needs calibration data, which the weight of an embedding"):
        lowbit.convert(nn.Sequential(nn.Embedding(8, 24), *plain), spec, calibration=[torch.tensor([1, 2])])
    assert type(plain[0]) is nn.Linear and not toy.given
    toy.stand_in = "mse"
    assert spec.for_embedding().quantizer == "mse" and spec.for_embedding(tied=True) is spec


def test_a_quantizer_of_gradients_asks_for_a_loss(toy):
    toy.needs = frozenset({"sensitivity"})
    with pytest.raises(ValueError, match="0: quantizer='toy' needs the gradients of a loss: pass loss="):
        lowbit.convert(model(), lowbit.Packed(**TOY), calibration=batches())
    lowbit.convert(model(), lowbit.Packed(**TOY), calibration=batches(), loss=loss)
    float_model = model()
    expected = collect_sensitivities(float_model, {"0": float_model[0], "2": float_model[2]}, batches(), loss)
    for statistics, name in zip(toy.given, ("0", "2"), strict=True):
        assert torch.equal(statistics.sensitivity, expected[name]) and statistics.hessian is None


def test_the_command_line_and_the_factors_know_it(toy):
    options = parser().parse_args(["convert", "from", "to", "--quantizer", "toy"])
    assert options.quantizer == "toy"
    with pytest.raises(ValueError, match="quantizer='toy'"):
        lowbit.Kronecker(factors=lowbit.Packed(**TOY))


def test_bad_names():
    known = "'minmax', 'mse', 'mean', 'gptq', 'descent', 'tuned'"
    with pytest.raises(ValueError, match=f"quantizer must be one of {known}: got .*'toy'"):
        lowbit.Packed(**TOY)
    with pytest.raises(ValueError, match="svd must be one of 'auto', 'exact', 'randomized': got svd='fast'"):
        lowbit.Kronecker(svd="fast")
    wrong = Toy()
    wrong.needs = frozenset({"hesian"})
    with pytest.raises(ValueError, match="made of hessian, sensitivity, x_scale: got 'hesian'"):
        lowbit.register_quantizer(wrong)
    assert "toy" not in registry.names("packed")


@pytest.mark.parametrize("family", ["packed", "codebook", "kron"])
def test_every_quantizer_of_ours_is_found_by_its_name(family):
    for name in registry.names(family):
        found = registry.find(family, name)
        assert (found.family, found.name) == (family, name) and type(found).__doc__
        assert found.stand_in is None or found.stand_in in registry.names(family)
        assert not found.needs or found.stand_in is not None


def test_a_second_quantizer_of_a_name_replaces_the_first(toy):
    lowbit.register_quantizer(Toy())
    assert registry.find("packed", "toy") is not toy and registry.names("packed").count("toy") == 1


# ---------------------------------------------------------------------------------------------------- gradients


SENSITIVE = lowbit.Codebook(bits=2, sensitivity=True)


def test_a_loss_weighs_errors_by_squared_gradients():
    float_model = model()
    squares = collect_sensitivities(float_model, {"0": float_model[0]}, batches(), loss)["0"]
    hessian = collect_hessians(float_model, {"0": float_model[0]}, batches())["0"]
    weight = float_model[0].weight.detach()
    found = lowbit.convert(model(), SENSITIVE, calibration=batches(), loss=loss)[0]
    expected = SENSITIVE.quantize(weight, statistics=lowbit.Statistics(hessian=hessian, sensitivity=squares))
    assert torch.equal(found.codebook, expected.codebook)
    assert torch.equal(found.packed, lowbit.CodebookLinear.from_weight(expected).packed)
    by_inputs = lowbit.convert(model(), SENSITIVE, calibration=batches())[0]
    assert torch.equal(by_inputs.codebook, SENSITIVE.quantize(weight, hessian=hessian).codebook)
    assert not torch.equal(by_inputs.codebook, found.codebook)

    def error(layer: nn.Module) -> float:
        return float((squares * (layer.dequantize() - weight).square()).sum())

    nearest = [lowbit.Codebook(bits=2).quantize(weight), lowbit.Codebook(bits=2, sensitivity=True, iterations=50)]
    nearest[1] = nearest[1].quantize(weight, statistics=lowbit.Statistics(sensitivity=squares))
    plain, weighed = (error(lowbit.CodebookLinear.from_weight(each)) for each in nearest)
    assert weighed < plain


def test_a_loss_changes_nothing_where_no_gradient_is_asked_for():
    for spec in (lowbit.Packed(bits=3, quantizer="gptq"), lowbit.Codebook(bits=3)):
        found = [lowbit.convert(model(), spec, calibration=batches(), loss=given) for given in (None, loss)]
        for ours, expected in zip(*(each.state_dict().values() for each in found), strict=True):
            assert torch.equal(ours, expected)


def test_a_loss_needs_batches():
    for spec in (SENSITIVE, lowbit.Packed()):
        with pytest.raises(ValueError, match="loss needs calibration data: pass calibration="):
            lowbit.convert(model(), spec, loss=loss)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_gradients_of_a_tied_weight_and_of_a_transposed_one():
    from transformers.pytorch_utils import Conv1D

    def next_token(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:-1], ids[1:])

    ids = [torch.arange(9), torch.arange(8, 20)]
    tied = Tied()
    squares = collect_sensitivities(tied, {"head": tied.head}, ids, next_token)["head"]
    hessian = collect_hessians(tied, {"head": tied.head}, ids)["head"]
    found = lowbit.convert(copy.deepcopy(tied), SENSITIVE, calibration=ids, loss=next_token)
    given = lowbit.Statistics(hessian=hessian, sensitivity=squares)
    assert torch.equal(found.head.codebook, SENSITIVE.quantize(tied.head.weight, statistics=given).codebook)
    assert found.embed.codebook is found.head.codebook

    linear = model()
    conv = Conv1D(16, 24)
    conv.weight, conv.bias = nn.Parameter(linear[0].weight.t().clone()), linear[0].bias
    transposed = nn.Sequential(conv, *linear[1:])
    ours, expected = (
        lowbit.convert(m, SENSITIVE, calibration=batches(), loss=loss)[0] for m in (transposed, linear)
    )  # fmt: skip
    assert torch.equal(ours.codebook, expected.codebook) and torch.equal(ours.packed, expected.packed)


def test_the_functions_of_a_family_are_the_objects():
    weight = model()[0].weight.detach()
    spec = lowbit.Packed(bits=3, quantizer="mse")
    direct = registry.find("packed", "mse").quantize(weight, spec, lowbit.Statistics())
    for other in (spec.quantize(weight), quantize(weight, spec)):
        assert torch.equal(direct.codes, other.codes) and torch.equal(direct.scales, other.scales)
