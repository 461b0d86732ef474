"""What is given as calibration data: mistakes are named, what is not used is said, large inputs are finite."""

import warnings

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Codebook, Packed
from lowbit.model.calibrate import collect_hessians, collect_sensitivities


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x, scale=1.0):
        return self.body(x) * scale


GPTQ = Packed(bits=3, group_size=16, quantizer="gptq")
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

ONE_BATCH = [
    (X, r"got one batch, Tensor \[5, 32\]; wrap it in a list"),
    ({"x": X}, r"got one batch, dict {x: Tensor \[5, 32\]}; wrap it in a list"),
    (X.numpy(), "got one batch, ndarray"),
    ("some text", "got a text, 'some text'"),
    (["some text"], "not texts: batch 0 is 'some text'; give what the tokenizer"),
    ([["some", "texts"]], r"batch 0 is \['some', 'texts'\]"),
    (3, "must be a list of batches for the model: got int"),
]


@pytest.mark.parametrize(("calibration", "message"), ONE_BATCH, ids=[m for _, m in ONE_BATCH])
def test_what_is_no_list_of_batches(calibration, message):
    model = Model()
    with pytest.raises(TypeError, match=message):
        lowbit.convert(model, GPTQ, calibration=calibration)
    assert type(model.body[0]) is nn.Linear


BAD = [
    ([X, torch.randn(5, 31)], (ValueError, RuntimeError),
     r"calibration batch 1 \(Tensor \[5, 31\]\), in layer body\.0: (layer body\.0 takes inputs .* got|mat1)"),
    ([torch.tensor(1.0)], (ValueError, RuntimeError),
     r"batch 0 \(Tensor \[\]\), in layer body\.0: (layer body\.0 takes inputs \[\.\.\., 32\]: got \[\]|both)"),
    ([{"x": X, "mask": X}], TypeError,
     r"batch 0 \(dict {x: Tensor \[5, 32\], mask: .*unexpected keyword argument 'mask'"),
    ([(X, torch.ones(7))], RuntimeError, r"calibration batch 0 \(tuple of Tensor \[5, 32\], Tensor \[7\]\): .*size"),
    (X, TypeError, "wrap it in a list"),
]  # fmt: skip


@pytest.mark.parametrize(("batches", "kind", "message"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("spec", [GPTQ, Packed(activations="int8_static"), Codebook(bits=3, sensitivity=True)],
                         ids=["hessian", "x_scale", "sensitivity"])  # fmt: skip
def test_a_failing_batch_is_named(spec, batches, kind, message):
    model = Model()
    with pytest.raises(kind, match=message):
        lowbit.convert(model, spec, calibration=batches, loss=lambda m, b: m(*b).sum() if isinstance(b, tuple) else
                       (m(**b) if isinstance(b, dict) else m(b)).sum())  # fmt: skip
    assert type(model.body[0]) is nn.Linear and not model.body[0]._forward_pre_hooks


@pytest.mark.parametrize("spec", [GPTQ, Packed(activations="int8_static"), Codebook(bits=3, sensitivity=True)],
                         ids=["hessian", "x_scale", "sensitivity"])  # fmt: skip
def test_a_batch_that_is_not_finite_is_named(spec):
    batches = [X, X.clone().index_fill_(0, torch.tensor([2]), float("nan")), X]
    with pytest.raises(ValueError, match=r"calibration batch 1 \(.*layer body\.\d must be finite: got Inf or NaN"):
        lowbit.convert(Model(), spec, calibration=batches, loss=loss)


def test_a_loss_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"batch 0 .*loss must return a scalar tensor: got Tensor \[5, 8\]"):
        lowbit.convert(Model(), Codebook(bits=3, sensitivity=True), calibration=[X], loss=lambda m, b: m(b))


def loss(model, batch):
    return model(batch).square().sum()


UNUSED = [
    (Packed(quantizer="minmax"), {}, r"^calibration= changes nothing: no spec makes use of it$"),
    (Packed(quantizer="minmax"), {"loss": loss}, r"^calibration= and loss= changes nothing"),
    (GPTQ, {"loss": loss}, r"^loss= changes nothing"),
    (GPTQ, {}, None),
    (Packed(quantizer="mse"), {}, None),
    (Codebook(bits=3, sensitivity=True), {"loss": loss}, None),
    ({"*.0": Packed(quantizer="minmax"), "*.2": GPTQ}, {}, None),
]


@pytest.mark.parametrize(("spec", "arguments", "message"), UNUSED, ids=range(len(UNUSED)))
def test_what_is_not_used_is_said(spec, arguments, message):
    if message is not None:
        with pytest.warns(UserWarning, match=message):
            lowbit.convert(Model(), spec, calibration=[X], **arguments)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowbit.convert(Model(), spec, calibration=[X], **arguments)


@pytest.mark.parametrize("magnitude", [1e30, 1e19])
@pytest.mark.parametrize("quantizer", ["gptq", "mse"])
def test_large_inputs_are_finite(quantizer, magnitude):
    """A Hessian of inputs times 2**k is the Hessian times 4**k: the weight is quantized alike, bit for bit."""
    factor = 2.0 ** round(torch.log2(torch.tensor(magnitude)).item())
    spec = Packed(bits=3, group_size=16, quantizer=quantizer)

    def quantized(x):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16))
        return lowbit.convert(model, spec, calibration=[x[:3], x[3:]])[0].dequantize()

    assert torch.equal(quantized(X * factor), quantized(X))


def test_sums_of_very_different_batches():
    layer = nn.Linear(32, 16)
    batches = [X, X * 2.0**60, X * 2.0**20]
    hessian = collect_hessians(nn.Sequential(layer), {"0": layer}, batches)["0"].double()
    exact = sum(b.double().t() @ b.double() for b in batches) * 2 / 15
    exact += 32 / 15 * exact.diagonal().mean() * torch.eye(32)  # of 15 tokens
    scale = float(hessian.diagonal().sum() / exact.diagonal().sum())
    assert scale == pytest.approx(4.0 ** round(torch.log2(torch.tensor(scale)).item() / 2), rel=1e-5)
    assert float((hessian / scale - exact).norm() / exact.norm()) < 1e-6
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="layer 0 must be finite: got Inf or NaN"):
            collect_hessians(nn.Sequential(layer), {"0": layer}, [X, X.clone().fill_(bad)])


def test_large_gradients_are_finite():
    layer = nn.Linear(32, 16)
    model = nn.Sequential(layer)
    found = [collect_sensitivities(model, {"0": layer}, [X], lambda m, b, f=factor: loss(m, b) * f)["0"]
             for factor in (1.0, 2.0**80)]  # fmt: skip
    assert bool(torch.isfinite(found[1]).all())
    ratio = found[1] / found[1].max(), found[0] / found[0].max()
    assert float((ratio[0] - ratio[1]).abs().max()) < 1e-6
