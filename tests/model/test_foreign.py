"""Modules that another library quantized: known by what they hold, named together, never half of a conversion."""

import types

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Packed

SPEC = Packed(bits=8)


def model(*made):
    return nn.Sequential(nn.Embedding(16, 32), *made, nn.Linear(32, 32))


def bitsandbytes():
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(32, 32, has_fp16_weights=False)


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer[0]


def compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    layer = nn.Sequential(nn.Linear(32, 32))
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
    quantization.apply_quantization_config(layer, quantization.QuantizationConfig(config_groups=groups))
    return layer[0]


def holding(**tensors):
    """A module with these buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def sized():
    """A linear layer of somebody's, by its sizes; names tell nothing."""
    module = holding(q=torch.zeros(32, 8, dtype=torch.int32), s=torch.ones(32))
    module.in_features, module.out_features = 32, 32
    return module


FOREIGN = {
    "bitsandbytes": (bitsandbytes, "its weight is a Int8Params of bitsandbytes"),
    "torchao": (torchao, r"its weight is a \w+ of torchao"),
    "compressed-tensors": (compressed_tensors, "compressed-tensors computes its forward"),
    "experts": (lambda: holding(up_proj=torch.zeros(2, 8, 8).to(torch.float8_e4m3fn)), "up_proj as float8_e4m3fn"),
    "mxfp4": (lambda: holding(down_proj_blocks=torch.zeros(2, 8, 8, dtype=torch.uint8)), "down_proj_blocks as uint8"),
    "awq": (lambda: holding(qzeros=torch.zeros(4, dtype=torch.int32), scales=torch.ones(4)), "qzeros"),
    "aqlm": (lambda: holding(codes=torch.zeros(4, 1, dtype=torch.int8), codebooks=torch.ones(1, 4)), "codebooks"),
    "sized": (sized, "q as int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_modules_are_named_in_one_error(name):
    make, sign = FOREIGN[name]
    whole = model(make(), make(), make(), make())
    types_before = [type(part) for part in whole]
    for spec in (SPEC, None, {"*": SPEC}):
        with pytest.raises(ValueError, match=rf"1, 2, 3 and 1 more: quantized by another library: .*{sign}"):
            lowbit.convert(whole, spec)
    with pytest.raises(ValueError, match="3, 4: quantized"):
        lowbit.convert(whole, SPEC, skip=["1", "2"])
    assert [type(part) for part in whole] == types_before
    lowbit.convert(whole, SPEC, skip=["[1-4]"])
    assert len(lowbit.report(whole).rows) == 2
    assert set(whole.lowbit_skipped) == {"1", "2", "3", "4"}


def test_float_modules_are_not_taken_for_foreign_ones():
    class FakeQuantized(nn.Linear):
        """Trained with a scale of its own: float all the same."""

        def __init__(self):
            super().__init__(32, 32)
            self.weight_scale = nn.Parameter(torch.ones(32, 1))

        def forward(self, x):
            return nn.functional.linear(x, (self.weight / self.weight_scale).round() * self.weight_scale)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales, self.position_ids = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(1, 32))
            self.register_buffer("index", torch.zeros(8, 8, dtype=torch.int64))
            self.register_buffer("mask", torch.zeros(8, 8, dtype=torch.bool))

        def forward(self, x):
            return x * self.scales

    whole = lowbit.convert(model(FakeQuantized(), Norm()), SPEC)
    assert whole.lowbit_skipped == {"1": "FakeQuantized is a subclass of nn.Linear with a forward of its own"}


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_config_that_names_a_format_while_every_module_is_float(as_dict):
    whole = model()
    fields = {"quant_method": "fp8", "dequantize": False}
    whole.config = types.SimpleNamespace(quantization_config=fields if as_dict else types.SimpleNamespace(**fields))
    with pytest.raises(ValueError, match="quantization_config says 'fp8'|names the format 'fp8'"):
        lowbit.convert(whole, SPEC)
    whole.config.quantization_config = {"quant_method": "fp8", "dequantize": True}  # transformers made it float
    assert len(lowbit.report(lowbit.convert(whole, SPEC)).rows) == 2
