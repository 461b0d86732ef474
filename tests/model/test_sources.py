"""Models that were trained quantized: torch.ao and torchao QAT modules, user types, a trained ternary Llama.

"Lossless" is the module's own ``fq(weight)``, bit for bit, and the integers of its formula written out here.
"""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.ao.nn.qat.dynamic as nnqatd
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.backends.reference import quantize_activations
from lowbit.packed.module import PackedLinear
from lowbit.testing import samples
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.where import everywhere, running

N, K = 24, 64


def codes_of(layer: Any) -> Tensor:
    return layer.layout.codes(layer.packed, layer.format.bits, layer.format.in_features)


def fake_quantize(observer: Any, low: int, high: int, qscheme: Any, dtype: Any = torch.qint8, **kwargs: Any) -> Any:
    return tq.FakeQuantize.with_args(
        observer=observer, quant_min=low, quant_max=high, dtype=dtype, qscheme=qscheme, **kwargs
    )


def per_tensor(low: int, high: int, qscheme: Any, dtype: Any = torch.qint8) -> Any:
    return fake_quantize(tq.MovingAverageMinMaxObserver, low, high, qscheme, dtype)


def per_row(low: int, high: int, qscheme: Any, dtype: Any = torch.qint8) -> Any:
    return fake_quantize(tq.MovingAveragePerChannelMinMaxObserver, low, high, qscheme, dtype, ch_axis=0)


# weight fake quantizer, the format it must become
TORCH_AO = {
    "default": (tq.default_weight_fake_quant, "8-bit per tensor symmetric"),
    "default per channel": (tq.default_per_channel_weight_fake_quant, "8-bit per row symmetric"),
    "fused": (tq.default_fused_wt_fake_quant, "8-bit per tensor symmetric"),
    "fused per channel": (tq.default_fused_per_channel_wt_fake_quant, "8-bit per row symmetric"),
    "int4": (per_row(-8, 7, torch.per_channel_symmetric), "4-bit per row symmetric"),
    "int4 narrow": (per_row(-7, 7, torch.per_channel_symmetric), "4-bit per row symmetric"),
    "ternary": (per_tensor(-1, 1, torch.per_tensor_symmetric), "2-bit per tensor symmetric"),
    "int3 affine": (per_row(-4, 3, torch.per_channel_affine), "3-bit per row asymmetric"),
    "uint4 affine": (per_tensor(0, 15, torch.per_tensor_affine, torch.quint8), "4-bit per tensor asymmetric"),
    "uint8 affine": (per_row(0, 255, torch.per_channel_affine, torch.quint8), "8-bit per row asymmetric"),
    "uint8 symmetric": (
        per_tensor(0, 255, torch.per_tensor_symmetric, torch.quint8),
        "8-bit per tensor asymmetric",  # torch's zero point is 127, so code 255 is 128 steps above it
    ),
    "7 bits": (per_row(0, 127, torch.per_channel_affine, torch.quint8), "7-bit per row asymmetric"),
}


def config(weight: Any, activation: Any = nn.Identity) -> tq.QConfig:
    return tq.QConfig(activation=activation, weight=weight)


def skewed(shape: tuple[int, ...] = (N, K), dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Weights off centre, so that an asymmetric grid differs from a symmetric one."""
    return nn.Parameter((torch.randn(shape) * 0.05 + 0.03).to(dtype))


def qat_linear(weight: Any, cls: Any = nnqat.Linear, dtype: torch.dtype = torch.float32) -> Any:
    layer = cls(K, N, qconfig=config(weight))
    layer.weight, layer.bias = skewed(dtype=dtype), skewed((N,), dtype)
    return layer


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------- torch.ao


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch's fused fake quantizer takes float32 only
CASES = [(name, dtype) for name in TORCH_AO for dtype in DTYPES[: 1 if name.startswith("fused") else 3]]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_torch_ao_linear_is_lossless(name: str, dtype: torch.dtype) -> None:
    weight_fake_quant, format = TORCH_AO[name]
    module = qat_linear(weight_fake_quant, dtype=dtype)
    value = module.weight_fake_quant(module.weight).detach()
    fq = module.weight_fake_quant
    scale, zero_point = fq.scale.float().view(-1, 1), fq.zero_point.view(-1, 1)
    low, high = fq.activation_post_process.quant_min, fq.activation_post_process.quant_max
    q = (torch.round(module.weight.detach().float() * (1 / scale)) + zero_point).clamp(low, high)
    assert_bitwise_equal(((q - zero_point) * scale).to(dtype), value)  # the formula is torch's

    layer = lowbit.convert(module)
    assert type(layer) is PackedLinear and layer.format.describe() == format
    zero = 2 ** (layer.format.bits - 1) if layer.zeros is None else layer.zeros.int()
    assert_bitwise_equal(codes_of(layer).int() - zero, (q - zero_point).int())
    assert_bitwise_equal(layer.dequantize(), value)
    assert layer.bias is module.bias and layer.dtype == dtype
    x = torch.randn(5, K, dtype=dtype)
    assert_linear_close(layer(x).detach(), x, layer.dequantize(torch.float32), layer.bias.detach())


def test_dry_run_and_conversion_leave_the_module_alone() -> None:
    module = qat_linear(tq.default_fused_per_channel_wt_fake_quant)
    model = nn.Sequential(module)
    before = state_of(module)
    report = lowbit.convert(model, dry_run=True)
    assert [row.scheme for row in report.rows] == ["8-bit per row symmetric"] and model[0] is module
    lowbit.convert(model)
    after = state_of(module)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_bitwise_equal(after[name], tensor)


@pytest.mark.parametrize("observing", [True, False])
def test_the_weight_is_what_the_next_call_would_use(observing: bool) -> None:
    module = qat_linear(tq.default_weight_fake_quant)
    module(torch.randn(2, K))
    if not observing:
        module.weight_fake_quant.disable_observer()
    module.weight.data.mul_(3)  # the last optimizer step: the stored scale is older than the weight
    layer = lowbit.convert(copy.deepcopy(module))
    stale = float(module.weight_fake_quant.scale)
    value = module.weight_fake_quant(module.weight).detach()  # a moving average: each call may change it
    assert_bitwise_equal(layer.dequantize(), value)
    assert (float(module.weight_fake_quant.scale) != stale) == observing


@pytest.mark.parametrize(
    ("bits", "weight"), [(8, tq.default_embedding_fake_quant), (4, tq.default_embedding_fake_quant_4bit)]
)
def test_torch_ao_embedding_with_float_zeros(bits: int, weight: Any) -> None:
    module = nnqat.Embedding(50, K, padding_idx=3, qconfig=config(weight))
    module.weight = skewed((50, K))
    module.weight.data[3] = 0
    value = module.weight_fake_quant(module.weight).detach()
    layer = lowbit.convert(module)
    assert layer.format.describe() == f"{bits}-bit per row asymmetric, float zeros" and layer.padding_idx == 3
    # torch may fuse (code - zero) * scale into one rounding
    assert float((layer.dequantize() - value).abs().max()) <= 2.0**-23 * float(value.abs().max())
    ids = torch.tensor([[0, 49], [3, 7]])
    assert_bitwise_equal(layer(ids), layer.dequantize()[ids])
    assert float(layer(ids)[1, 0].abs().max()) == 0


@pytest.mark.parametrize("skeleton", [None, "float", "trained"])
def test_a_fused_relu_is_kept(skeleton: str | None, tmp_path: Path) -> None:
    model = nn.Sequential(qat_linear(tq.default_per_channel_weight_fake_quant, nniqat.LinearReLU))
    x = torch.randn(7, K)
    expected = model(x).detach()
    assert float(expected.min()) == 0
    lowbit.convert(model)
    if skeleton is not None:
        lowbit.save(model, tmp_path)
        empty = nn.Sequential(nni.LinearReLU(nn.Linear(K, N), nn.ReLU()))
        if skeleton == "trained":
            empty = nn.Sequential(qat_linear(tq.default_per_channel_weight_fake_quant, nniqat.LinearReLU))
        model = lowbit.load(tmp_path, model=empty)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-6)
    assert float(model(x).min()) == 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.act(self.first(x)))
        return y


def trained(qconfig: tq.QConfig) -> Any:
    """A model through torch.ao's eager flow: prepared, fused, one training step."""
    model = Net().train()
    model.qconfig = qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tq.prepare_qat(tq.fuse_modules_qat(model, [["first", "act"]]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(16, K)).square().sum().backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("observer", [nn.Identity, tq.NoopObserver, tq.default_fused_act_fake_quant])
def test_the_eager_flow_of_torch_ao(observer: Any) -> None:
    model = trained(config(tq.default_per_channel_weight_fake_quant, observer))
    fakes = observer is tq.default_fused_act_fake_quant
    reference = copy.deepcopy(model)
    if fakes:  # they are left out, with a note: compare without them
        for module in (reference.first, reference.second):
            module.activation_post_process.disable_fake_quant()
    x = torch.randn(9, K)
    expected = reference(x).detach()
    lowbit.convert(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-6)
    text = str(lowbit.report(model))
    assert (
        "note: first.0 and 1 more: activations stay float: the fake quantization of its output to quint8" in text
    ) == fakes
    assert not any(hasattr(m, "weight_fake_quant") for m in model.modules())


def test_a_plain_layer_with_an_observer_hook_still_runs() -> None:
    model = nn.Sequential(nn.Embedding(10, K), nn.Linear(K, N)).train()
    model[0].qconfig = config(tq.default_weight_fake_quant, tq.NoopObserver)
    model[1].qconfig = config(tq.default_weight_fake_quant)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tq.prepare_qat(model, mapping={nn.Linear: nnqat.Linear})
    ids = torch.tensor([1, 2])
    lowbit.convert(model, lowbit.Packed(bits=8))
    assert model(ids).shape == (2, N)


def dynamic_linear() -> Any:
    activation = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=255,
        is_dynamic=True,
        averaging_constant=1,
    )
    return nnqatd.Linear(K, N, qconfig=config(tq.default_weight_fake_quant, activation))


def test_torch_ao_dynamic_linear() -> None:
    module = dynamic_linear()
    value = module.weight_fake_quant(module.weight).detach()
    assert_bitwise_equal(lowbit.convert(module).dequantize(), value)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def declined() -> Iterator[Any]:
    weight = tq.default_weight_fake_quant
    disabled = qat_linear(weight)
    disabled.weight_fake_quant.disable_fake_quant()
    yield pytest.param(disabled, "the fake quantization of its weight is disabled", id="disabled")
    columns = qat_linear(tq.default_per_channel_weight_fake_quant.with_args(ch_axis=1))
    yield pytest.param(columns, "one scale per index of axis 1", id="per column")
    custom = qat_linear(weight)
    custom.weight_fake_quant = Custom()
    yield pytest.param(custom, "weight_fake_quant is a Custom", id="custom")
    qconfig = config(tq.default_embedding_fake_quant)
    yield pytest.param(nnqat.Embedding(9, K, max_norm=1.0, qconfig=qconfig), "max_norm", id="max_norm")
    yield pytest.param(nnqat.EmbeddingBag(9, K, qconfig=qconfig), "it sums embeddings", id="bag")
    yield pytest.param(
        nniqat.LinearBn1d(K, N, qconfig=config(weight)), "a batch norm scales its weight", id="batch norm"
    )


@pytest.mark.parametrize(("module", "reason"), declined())
def test_what_has_no_packed_form_is_left_alone_with_a_reason(module: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"good": qat_linear(tq.default_weight_fake_quant), "odd": module})
    lowbit.convert(model)
    assert model["odd"] is module and isinstance(model["good"], PackedLinear)
    assert reason in lowbit.report(model).skipped["odd"]
    with pytest.raises(ValueError, match=rf"nothing to convert.*odd: .*{re.escape(reason)}"):
        lowbit.convert(nn.ModuleDict({"odd": module}))


def never_observed() -> Any:
    module = qat_linear(tq.default_weight_fake_quant)
    module.weight_fake_quant.disable_observer()
    return module


def bad_zero_point(weight: Any, value: int) -> Any:
    module = qat_linear(weight)
    module(torch.randn(1, K))
    module.weight_fake_quant.disable_observer()
    module.weight_fake_quant.zero_point.fill_(value)
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        pytest.param(never_observed, "weight_fake_quant must have observed the weight", id="never observed"),
        pytest.param(
            lambda: bad_zero_point(tq.default_per_channel_weight_fake_quant, 200),
            "zero_point",
            id="zero per row",
        ),
        pytest.param(lambda: bad_zero_point(per_tensor(-8, 7, torch.per_tensor_affine), 9), "zero_point", id="zero"),
        pytest.param(lambda: qat_linear(tq.default_weight_fake_quant).to("meta"), "on the meta device", id="meta"),
    ],
)
def test_what_cannot_be_right_is_an_error_that_names_the_layer(module: Any, message: str) -> None:
    bad = module()
    model = nn.ModuleDict({"good": qat_linear(tq.default_weight_fake_quant), "a": bad, "b": copy.deepcopy(bad)})
    with pytest.raises(ValueError, match=rf"(?s)a: .*{message}.*b: .*{message}"):
        lowbit.convert(model)
    assert not isinstance(model["good"], PackedLinear)
    lowbit.convert(model, skip=["a", "b"])
    assert isinstance(model["good"], PackedLinear) and model["a"] is bad


# ---------------------------------------------------------------------------------------------------- torchao


@pytest.fixture(scope="module")
def qat() -> Any:
    pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    from torchao.quantization import qat

    return qat


def torchao_linear(qat: Any, weight: Any, activation: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    layer = qat.FakeQuantizedLinear(K, N, True, activation, weight, dtype=dtype)
    layer.weight = skewed(dtype=dtype)
    return layer


INTX: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"int{bits} group": ({"dtype": f"int{bits}", "group_size": 32}, f"{bits}-bit group 32 symmetric")
        for bits in (2, 3, 4, 5, 8)
    },
    "int4 row": ({"dtype": "int4", "granularity": "per_channel"}, "4-bit per row symmetric"),
    "bfloat16 scales": (
        {"dtype": "int4", "group_size": 16, "scale_precision": torch.bfloat16}, "4-bit group 16 symmetric"
    ),
    "float zero points": (
        {"dtype": "int4", "group_size": 16, "zero_point_precision": torch.float32}, "4-bit group 16 symmetric"
    ),
    "asymmetric": ({"dtype": "int4", "group_size": 32, "is_symmetric": False}, "4-bit group 32 symmetric"),
    "unsigned": ({"dtype": "uint4", "group_size": 32, "is_symmetric": False}, "4-bit group 32 asymmetric"),
    "one group": ({"dtype": "int6", "group_size": K}, "6-bit group 64 symmetric"),
}  # fmt: skip


def intx(qat: Any, arguments: dict[str, Any]) -> Any:
    return qat.IntxFakeQuantizeConfig(**{**arguments, "dtype": getattr(torch, arguments["dtype"])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INTX)
def test_torchao_linear_is_lossless(qat: Any, name: str, dtype: torch.dtype) -> None:
    arguments, format = INTX[name]
    module = torchao_linear(qat, intx(qat, arguments), dtype=dtype)
    value = module.weight_fake_quantizer(module.weight).detach()
    layer = lowbit.convert(module)
    assert layer.format.describe() == format and layer.bias is module.bias
    assert_bitwise_equal(layer.dequantize(), value)
    x = torch.randn(5, K, dtype=dtype)
    assert_linear_close(layer(x).detach(), x, layer.dequantize(torch.float32), layer.bias.detach())


@pytest.mark.parametrize("kind", ["tinygemm", "int4"])
def test_torchao_float_zeros(qat: Any, kind: str) -> None:
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
    from torchao.quantization.quant_primitives import ZeroPointDomain

    if kind == "tinygemm":
        arguments = {
            "dtype": "uint4",
            "group_size": 16,
            "is_symmetric": False,
            "zero_point_precision": torch.float32,
        }
        weight = intx(qat, {**arguments, "zero_point_domain": ZeroPointDomain.FLOAT})
    else:
        weight = Int4WeightFakeQuantizeConfig(group_size=16, activation_dtype=torch.bfloat16)
    module = torchao_linear(qat, weight)
    value = module.weight_fake_quantizer(module.weight).detach()
    layer = lowbit.convert(module)
    assert layer.format.describe() == "4-bit group 16 asymmetric, float zeros"
    # the module adds the zero after the product, the packed form before it: a few float32 roundings
    assert float((layer.dequantize() - value).abs().max()) <= 8 * 2.0**-24 * float(value.abs().max())
    assert codes_of(layer).unique().tolist() == list(range(16))


def test_torchao_conversion_leaves_the_module_alone(qat: Any) -> None:
    module = torchao_linear(qat, intx(qat, INTX["int4 group"][0]))
    lowbit.convert(nn.Sequential(module))
    assert module.weight_fake_quantizer.scale is None and module.weight_fake_quantizer.zero_point is None


def test_torchao_embedding(qat: Any) -> None:
    module = qat.FakeQuantizedEmbedding(50, K, padding_idx=4, weight_config=intx(qat, INTX["int4 group"][0]))
    value = module.weight_fake_quantizer(module.weight).detach()
    layer = lowbit.convert(module)
    assert_bitwise_equal(layer.dequantize(), value)
    assert layer.padding_idx == 4
    ids = torch.tensor([4, 49])
    assert_bitwise_equal(layer(ids), module(ids).detach())


def test_torchao_range_learning(qat: Any) -> None:
    arguments = {"dtype": "int4", "group_size": 32, "is_dynamic": False, "range_learning": True}
    module = torchao_linear(qat, intx(qat, arguments))
    with pytest.raises(ValueError, match="must be initialized for range learning"):
        lowbit.convert(nn.ModuleDict({"layer": copy.deepcopy(module)}))
    qat.initialize_fake_quantizers(module, (torch.randn(1, K),))
    module.weight_fake_quantizer.scale.data.mul_(0.8)  # as learned
    value = module.weight_fake_quantizer(module.weight).detach()
    assert_bitwise_equal(lowbit.convert(module).dequantize(), value)

    odd = torchao_linear(qat, intx(qat, {**arguments, "is_symmetric": False, "zero_point_precision": torch.float32}))
    qat.initialize_fake_quantizers(odd, (torch.randn(1, K),))
    odd.weight_fake_quantizer.zero_point.data.fill_(0.25)
    with pytest.raises(ValueError, match="its zero points are not whole numbers"):
        lowbit.convert(nn.ModuleDict({"odd": odd}))


@pytest.mark.parametrize("scheme", ["8da4w", "int4", "intx"])
def test_torchao_qat_config_flow(qat: Any, scheme: str) -> None:
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )  # fmt: skip

    base = {
        "8da4w": lambda: Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
        "int4": lambda: Int4WeightOnlyConfig(group_size=32),
        "intx": lambda: IntxWeightOnlyConfig(torch.int3, PerGroup(32)),
    }[scheme]()
    model = nn.Sequential(nn.Linear(K, 128), nn.GELU(), nn.Linear(128, N))
    quantize_(model, qat.QATConfig(base, step="prepare"))
    model(torch.randn(4, K)).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    reference = copy.deepcopy(model)
    for module in (reference[0], reference[2]):
        module.activation_fake_quantizer = None  # left out, with a note
    x = torch.randn(6, K)
    expected = reference(x).detach()
    lowbit.convert(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-6)
    note = "note: 0 and 1 more: activations stay float: the fake quantization of its input to int8 is left out"
    assert (note in str(lowbit.report(model))) == (scheme == "8da4w")


def test_torchao_modules_without_a_packed_form(qat: Any) -> None:
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig

    disabled = torchao_linear(qat, intx(qat, INTX["int4 group"][0]))
    disabled.weight_fake_quantizer.enabled = False
    model = nn.ModuleDict(
        {
            "good": torchao_linear(qat, intx(qat, INTX["int4 group"][0])),
            "disabled": disabled,
            "none": torchao_linear(qat, None),
            "float8": torchao_linear(qat, qat.Float8FakeQuantizeConfig()),
            "twice": torchao_linear(qat, Int4WeightFakeQuantizeConfig(group_size=32)),
        }
    )
    lowbit.convert(model)
    skipped = lowbit.report(model).skipped
    assert sorted(skipped) == ["disabled", "float8", "none", "twice"]
    assert "disabled" in skipped["disabled"] and "no weight_fake_quantizer" in skipped["none"]
    assert "has no packed form" in skipped["float8"] and "has no packed form" in skipped["twice"]


def test_import_brings_no_other_library() -> None:
    code = "import torch, sys; before = set(sys.modules); import lowbit; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not [name for name in run.stdout.split() if name.startswith(("torchao", "torch.ao"))]


# ------------------------------------------------------------------------------------------------ user types


class Trained(nn.Module):
    """A user's layer; ``answer`` is what its recogniser returns or raises."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer


def answer(module: Any) -> Any:
    if isinstance(module.answer, Exception):
        raise module.answer
    return module.answer


def source(bits: int = 4, **changes: Any) -> lowbit.Source:
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    stored = lowbit.PackedWeight(codes, torch.rand(N, 1) + 0.5, None, bits=bits)
    return lowbit.Source(**{"stored": stored, **changes})


def test_user_types() -> None:
    lowbit.register_source(Trained, answer, epilogue=lambda module: nn.Tanh())
    good, noted = source(), source(note="rounds differently")
    model = nn.ModuleDict({"a": Trained(good), "b": Trained(noted), "c": Trained(None), "d": Trained("too old")})
    lowbit.convert(model)
    report = lowbit.report(model)
    assert report.skipped == {"c": "the recogniser of Trained declined it", "d": "too old"}
    assert [row.note for row in report.rows] == [None, "rounds differently"]
    assert "note: b.0: rounds differently" in str(report)
    x = torch.randn(3, K)
    assert_bitwise_equal(model["a"](x), model["a"][0](x).tanh())
    assert_bitwise_equal(codes_of(model["a"][0]), good.stored.codes)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ValueError("alpha must be positive: got alpha=-1"), "c: alpha must be positive: got alpha=-1"),
        (source(weight=torch.zeros(N, K)), "c: the recogniser's codes do not reproduce the trained weight"),
        (source(bits=3), r"c: codes must be in \[0, 7\] at bits=3"),
        (source(bits=9), "c: its recogniser answer gives .*: bits must be between 2 and 8"),
    ],
)
def test_a_wrong_user_source_is_named_and_nothing_changes(bad: Any, message: str) -> None:
    lowbit.register_source(Trained, answer)
    model = nn.ModuleDict({"a": Trained(source()), "c": Trained(bad)})
    before = dict(model.items())
    with pytest.raises(ValueError, match=message):
        lowbit.convert(model)
    assert dict(model.items()) == before


DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "trained_quantized.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.parametrize("block", range(7))
def test_the_documentation_runs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == 7
    if "import bitsandbytes" in BLOCKS[block]:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(BLOCKS[block], "trained_quantized.md", "exec"), {"__name__": "__main__"})


# ---------------------------------------------------------------------------------- a trained ternary Llama


class Normalize(nn.Module):
    """``x / ||x|| / sqrt(K)``: what BitLinear does first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** -0.5


def read_bit_linear(module: Any) -> lowbit.Source:
    codes = (module.ternary + 2).to(torch.uint8)
    stored = lowbit.PackedWeight(codes, scales=module.alpha.reshape(1, 1), zeros=None, bits=2)
    return lowbit.Source(stored, activations="int8", weight=module.ternary * module.alpha)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small products: threads that wait for each other on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bitllama() -> Any:
    module = samples.script("bitllama_1m", "bitllama")
    lowbit.register_source(module.BitLinear, read_bit_linear, prologue=lambda _: Normalize())
    return module


@pytest.fixture(scope="module")
def stories(bitllama: Any) -> list[Tensor]:
    """BOS + at most 512 tokens of each ASCII-only story, ``[1, T]``."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(samples.folder("bitllama_1m"))
    return [torch.tensor([tokenizer(text).input_ids[:512]]) for text in samples.tiny_stories()]


def perplexity(model: nn.Module, stories: list[Tensor]) -> tuple[float, int]:
    loss = tokens = 0.0
    with torch.inference_mode():
        for ids in stories:
            loss += F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    return math.exp(loss / tokens), int(tokens)


def load(bitllama: Any) -> Any:
    return bitllama.load(str(samples.folder("bitllama_1m") / "bit_model.bin"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("where", everywhere(interpreter=False), ids=str)
def test_ternary_accumulators_are_exact(bitllama: Any, stories: list[Tensor], where: Any) -> None:
    """On the activations of a real text, every layer has the model's own integers: q, and F.linear(q, T)."""
    model = load(bitllama)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, bitllama.BitLinear)}
    inputs: dict[str, Tensor] = {}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.inference_mode():
        model(stories[0][:, :32])
    assert len(inputs) == len(linears) == 56
    converted = lowbit.convert(copy.deepcopy(model))
    with running(where), torch.inference_mode():
        for name, module in linears.items():
            prologue, layer = converted.get_submodule(name)
            assert layer.format.describe() == "2-bit per tensor symmetric, int8 activations"
            x = Normalize()(inputs[name])
            q = (x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5))).round().clamp(-128, 127)
            assert_bitwise_equal(quantize_activations(prologue(inputs[name]).flatten(0, 1), None)[0], q.flatten(0, 1))
            exact = F.linear(q.double(), module.ternary.double())
            layer_of_ones = copy.deepcopy(layer)
            layer_of_ones.scales.fill_(1.0)  # and max|q| = 127: both scales are 1, the output is the accumulator
            assert_bitwise_equal(layer_of_ones(q).double(), exact)
            assert_bitwise_equal(converted.get_submodule(name)(inputs[name]), module(inputs[name]))


def test_ternary_storage(bitllama: Any) -> None:
    model = lowbit.convert(load(bitllama))
    rows = lowbit.report(model).rows
    weights = sum(m.format.in_features * m.format.out_features for m in model.modules() if isinstance(m, PackedLinear))
    assert len(rows) == 56 and weights == 1_179_648
    assert sum(row.bytes_after for row in rows) == weights // 4 + 4 * len(rows)  # 2 bits, and a scale per matrix
    assert all(row.weight_error == 0 for row in rows)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.turns(2)
def test_ternary_model_is_converted_without_loss(bitllama: Any, stories: list[Tensor]) -> None:
    """The very same logits, and so the very same perplexity."""
    model = load(bitllama)
    with torch.inference_mode():
        logits, before = model(stories[0]), perplexity(model, stories[:30])
        converted = lowbit.convert(model)
        assert_bitwise_equal(converted(stories[0]), logits)
        assert perplexity(converted, stories[:30]) == before
    after, tokens = perplexity(converted, stories)
    assert tokens == 100_816
    # 4.77030 on Zen 4, 4.77047 on a Xeon with AMX, whose torch sums floats in another order: an int8 rounding flips
    assert after == pytest.approx(4.7703, abs=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_ternary_round_trip(bitllama: Any, stories: list[Tensor], tmp_path: Path) -> None:
    model = lowbit.convert(load(bitllama))
    lowbit.save(model, tmp_path)
    loaded = lowbit.load(tmp_path, model=load(bitllama)).eval()
    assert [type(m) for m in loaded.blocks[0].q] == [Normalize, PackedLinear]
    ids = stories[1][:, :64]
    with torch.inference_mode():
        assert_bitwise_equal(loaded(ids), model(ids))
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert_bitwise_equal(tensor, expected[name])
