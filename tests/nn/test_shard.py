"""Shares of a linear layer: what they give, put together, is what the layer gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn.layer import layer_class
from lowbit.nn.shard import INPUT, OUTPUT, shard

SPECS = [
    lowbit.Packed(bits=4, group_size=32), lowbit.Packed(bits=3, granularity="row", outliers=0.02),
    lowbit.Packed(bits=8, granularity="row", symmetric=True),
    lowbit.Packed(bits=5, granularity="tensor"), lowbit.Packed(bits=2, group_size=16, zeros="float"),
    lowbit.Codebook(bits=3, outliers=0.02), lowbit.Codebook(bits=4, granularity="group", group_size=32),
    lowbit.Codebook(bits=2, granularity="tensor"), lowbit.Codebook(table="nf4", group_size=16),
]  # fmt: skip


def linear(spec: lowbit.Spec, n: int = 90, k: int = 192) -> nn.Module:
    torch.manual_seed(0)
    return layer_class(spec.family, "linear").from_float(torch.randn(n, k), spec, torch.randn(n))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shares_are_parts_of_the_weight(spec, count):
    layer = linear(spec)
    for dim in (OUTPUT, INPUT):
        parts = []
        for index in range(count):
            part = copy.deepcopy(layer)
            shard(part, dim, index, count)
            part.bias = None
            part.validate()
            for name, tensor in part.named_tensors().items():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} keeps the whole layer's in memory"
            assert (part.in_features, part.out_features) == (192, 90)
            parts.append(part)
        found = torch.cat([part.dequantize() for part in parts], dim)
        assert torch.equal(found, layer.dequantize())
        x = torch.randn(3, 192)
        shares = [x] * count if dim == OUTPUT else x.chunk(count, -1)
        y = [part(share) for part, share in zip(parts, shares, strict=True)]
        y = torch.cat(y, -1) if dim == OUTPUT else sum(y)
        torch.testing.assert_close(y + layer.bias, layer(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_cut_is_named_and_unchanged():
    for spec, dim, count, words in (
        (lowbit.Packed(bits=4, group_size=64), INPUT, 2, r"group_size=64 must divide the 96 input features of a share"),
        (lowbit.Kronecker(), OUTPUT, 2, r"KroneckerLinear \[90, 192\].*Kronecker .* cannot be cut"),
        (lowbit.Packed(bits=4), OUTPUT, 88, r"90 features leave nothing for share 87 of 88"),
    ):
        layer = linear(spec)
        before = layer.dequantize()
        with pytest.raises(ValueError, match=words):
            shard(layer, dim, count - 1, count)
        assert torch.equal(layer.dequantize(), before)
