"""Default device and default dtype of torch change nothing in a conversion."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Codebook, Kronecker, Packed
from lowbit.nn.layer import layers
from lowbit.testing.numerics import assert_bitwise_equal


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.head = nn.Embedding(40, 32), nn.Linear(32, 48), nn.Linear(48, 40)

    def forward(self, ids):
        return self.head(self.up(self.embed(ids)))


IDS = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))
SPECS = {
    **{f"packed {q}": Packed(bits=3, group_size=16, quantizer=q, outliers=0.02)
       for q in ("minmax", "mse", "gptq", "descent")},
    "packed mean": Packed(bits=2, symmetric=True, quantizer="mean"),
    "packed float zeros": Packed(bits=3, zeros="float", activations="int8_static"),
    **{f"codebook {q}": Codebook(bits=3, quantizer=q, outliers=0.02) for q in ("kmeans", "optimal", "lnq")},
    "codebook sensitivity": Codebook(bits=3, sensitivity=True),
    "codebook per group": Codebook(bits=2, granularity="group", group_size=16),
    "codebook nf4": Codebook(bits=4, table="nf4", group_size=16),
    "kron": Kronecker(rank=2),
    "kron randomized": Kronecker(rank=1, svd="randomized"),
    "kron packed factors": Kronecker(compression=4, factors=Packed(bits=4)),
}  # fmt: skip


def loss(model, batch):
    return model(batch).float().logsumexp(-1).mean()


def convert(model, name):
    model = lowbit.convert(copy.deepcopy(model), SPECS[name], calibration=[IDS], loss=loss)
    rows = [(row.name, row.bytes_before, row.bytes_after, row.weight_error) for row in lowbit.report(model).rows]
    dense = {f"dense {name}": layer.dequantize() for name, layer in layers(model).items()}
    return {**model.state_dict(), **dense}, rows


@pytest.mark.parametrize("name", SPECS)
def test_the_default_device_and_dtype_change_nothing(name):
    model = Model().eval()
    expected, rows = convert(model, name)
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        on_meta = convert(model, name)
        torch.set_default_device(device)
        torch.set_default_dtype(torch.bfloat16)
        in_half = convert(model, name)
        torch.set_default_dtype(torch.float64)
        in_double = convert(model, name)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    for found, found_rows in (on_meta, in_half, in_double):
        assert found_rows == rows
        for key, tensor in expected.items():
            assert_bitwise_equal(found[key], tensor)


@pytest.mark.parametrize("name", ["packed mse", "codebook kmeans", "kron"])
def test_saving_loading_and_dequantizing_with_a_default_device(name, tmp_path):
    model = lowbit.convert(Model(), SPECS[name])
    skeleton, other = Model(), Model()
    try:
        torch.set_default_device("meta")
        lowbit.save(model, tmp_path / "saved")
        loaded = lowbit.load(tmp_path / "saved", skeleton)
        dense = lowbit.dequantize(copy.deepcopy(model))
        planned = lowbit.convert(other, SPECS[name], dry_run=True)
    finally:
        torch.set_default_device(None)
    assert planned.total_after == lowbit.report(model).total_after
    for key, tensor in model.state_dict().items():
        assert_bitwise_equal(loaded.state_dict()[key], tensor)
    assert_bitwise_equal(dense.up.weight.detach(), model.up.dequantize())
