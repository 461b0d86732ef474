"""Which weights are outliers: by magnitude, by what rounding costs, at random; costs against float64."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit.cli.command import parse_spec, parser
from lowbit.core import outliers as module
from lowbit.model.calibrate import collect_hessians, collect_sensitivities

N, K = 20, 70
COUNT = 14  # 1 %
SPECS = [
    lowbit.Packed(bits=3, granularity="row", quantizer="minmax"),
    lowbit.Packed(bits=2, group_size=32, symmetric=True),
    lowbit.Packed(bits=4, granularity="tensor", quantizer="gptq"),
    lowbit.Codebook(bits=2),
    lowbit.Codebook(bits=3, granularity="tensor"),
    lowbit.Codebook(table="nf4", group_size=32),
]


def weight(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=g) * torch.rand(N, 1, generator=g) ** 2


def hessian():
    x = torch.randn(300, K, generator=torch.Generator().manual_seed(5)) * (torch.arange(K) % 7 + 0.1)
    return x.t() @ x


def places(q):
    rows = torch.repeat_interleave(torch.arange(N), q.outlier_rows.diff())
    return {(int(r), int(c)) for r, c in zip(rows, module.column_indices(q.outlier_columns), strict=True)}


def dense(q, sparse=True):
    layer = lowbit.PackedLinear if isinstance(q, lowbit.PackedWeight) else lowbit.CodebookLinear
    w = layer.from_weight(q).dequantize().double()
    if not sparse:
        for (row, column), value in zip(sorted(places(q)), q.outlier_values.double(), strict=True):
            w[row, column] -= value
    return w


@pytest.mark.parametrize("measured", ["nothing", "inputs", "gradients"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
def test_sensitivity_is_what_rounding_costs(spec, measured):
    w, h = weight(), hessian()
    squares = torch.rand(N, K, generator=torch.Generator().manual_seed(7)) ** 4
    needs = "hessian" in spec.method.needs
    statistics = lowbit.Statistics(
        hessian=h if measured == "inputs" or needs else None, sensitivity=squares if measured == "gradients" else None
    )
    first = replace(spec, outliers=0.01)
    if needs:  # rounded to nearest
        first = replace(first, quantizer="mse", outliers=0.01)
    rest = w.double() - dense(first.quantize(w, statistics=statistics), sparse=False)
    importance = squares.double() if measured == "gradients" else torch.ones(N, K).double()
    if statistics.hessian is not None and measured != "gradients":
        importance = h.diagonal().double().expand(N, K)
    cost = (importance / importance.mean() + 0.01) * rest.square()
    if measured == "nothing" and not needs:
        cost = rest.square()
    expected = {(int(i) // K, int(i) % K) for i in cost.flatten().topk(COUNT).indices}
    q = replace(spec, outliers=0.01, outliers_by="sensitivity").quantize(w, statistics=statistics)
    assert places(q) == expected != places(first.quantize(w, statistics=statistics))
    error = (dense(q) - w).abs()
    assert all(float(error[place]) < 2e-3 * float(w.abs().max()) for place in expected)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=lambda spec: spec.describe())
def test_random_outliers_are_those_of_the_seed(spec, monkeypatch):
    w = weight()
    made = [replace(spec, outliers=0.01, outliers_by="random", seed=seed).quantize(w) for seed in (0, 0, 1)]
    found = [places(q) for q in made]
    assert found[0] == found[1] != found[2] and all(len(each) == COUNT for each in found)
    assert found[0] != places(replace(spec, outliers=0.01).quantize(w))
    assert places(replace(spec, outliers=0.01, outliers_by="random").quantize(weight(1))) == found[0]
    target = "packed.grid" if spec.family == "packed" else "codebook.tables"
    monkeypatch.setattr(f"lowbit.{target}._CHUNK", 100)
    assert places(replace(spec, outliers=0.01, outliers_by="random").quantize(w)) == found[0]
    rows = torch.tensor([row for row, _ in sorted(found[0])])
    assert len(rows.unique()) > 5  # all over the weight


def test_a_seed_of_outliers_chooses_no_quantizer():
    assert lowbit.Codebook(seed=3, outliers_by="random").quantizer == "optimal"
    assert lowbit.Codebook(seed=3).quantizer == "kmeans"


def test_calibration_reaches_the_choice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 3))
    batches = [torch.randn(1, K) * (torch.arange(K) % 5 + 0.1) for _ in range(60)]
    spec = {"0": replace(SPECS[0], outliers=0.01, outliers_by="sensitivity")}

    def loss(model, batch):
        return model(batch).square().sum()

    weight, first = model[0].weight.detach(), {"0": model[0]}
    hessians, squares = collect_hessians(model, first, batches), collect_sensitivities(model, first, batches, loss)
    statistics = lowbit.Statistics(hessians["0"], squares["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that calibration changes nothing
        measured = [({}, lowbit.Statistics()), ({"calibration": batches}, lowbit.Statistics(hessians["0"])),
                    ({"calibration": batches, "loss": loss}, statistics)]  # fmt: skip
        found = []
        for arguments, known in measured:
            copy = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 3))
            copy.load_state_dict(model.state_dict())
            layer = lowbit.convert(copy, spec, **arguments)[0]
            q = spec["0"].quantize(weight, statistics=known)
            assert torch.equal(layer.canonical()["outlier_values"], q.outlier_values)
            found.append(places(q))
    assert found[0] != found[1] != found[2] != found[0]


def test_it_lowers_the_weighed_error():
    w, h = weight(), torch.rand(N, K, generator=torch.Generator().manual_seed(7)) ** 4
    for spec in (*SPECS[:2], *SPECS[3:]):
        errors = []
        for by in ("sensitivity", "magnitude", "random"):
            q = replace(spec, outliers=0.02, outliers_by=by).quantize(w, statistics=lowbit.Statistics(sensitivity=h))
            errors.append(float((h * (dense(q) - w).square()).sum()))
        assert errors[0] < 0.95 * min(errors[1:])


def test_the_spec_says_so_everywhere():
    written = "Packed(bits=2, outliers=0.005, outliers_by='sensitivity', seed=3)"
    assert parse_spec(written) == lowbit.Packed(bits=2, outliers=0.005, outliers_by="sensitivity", seed=3)
    assert "outliers_by='sensitivity'" in repr(parse_spec(written))
    assert parser().parse_args(["convert", "a", "b", "--outliers-by", "random"]).outliers_by == "random"
    for cls in (lowbit.Packed, lowbit.Codebook):
        with pytest.raises(ValueError, match="outliers_by must be one of 'magnitude', 'sensitivity', 'random': got"):
            cls(outliers=0.01, outliers_by="size")
        with pytest.raises(ValueError, match="seed must be an integer of 64 bits: got seed='x'"):
            cls(seed="x")
    with pytest.raises(ValueError, match="importance must have the shape of weight"):
        SPECS[0].quantize(weight(), statistics=lowbit.Statistics(sensitivity=torch.ones(3, 3)))
