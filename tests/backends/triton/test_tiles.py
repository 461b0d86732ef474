"""Tiles: the order of codes that GPU kernels read, and the layers that hold it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lowbit
from lowbit.backends import registry
from lowbit.backends.cpu import blocks
from lowbit.backends.triton import tiles as layout
from lowbit.backends.triton.tiles import TILES
from lowbit.core.bitpack import pack, unpack
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.where import Where, running

needs_interpreter = pytest.mark.skipif("triton" not in registry.able_on("cpu"), reason="Triton's interpreter is not on")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 9), st.integers(1, 600), st.integers(0, 1 << 30))
def test_tiles_are_a_permutation_of_the_words(bits, n, k, seed):
    codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack(codes, bits)
    tiles = layout.tile(words, bits, k)
    assert tiles.dtype == torch.int32 and tiles.shape == (n, -(-k // 256), 8 * bits)
    assert_bitwise_equal(layout.untile(tiles, bits, k), words)
    assert_bitwise_equal(layout.tile_codes(tiles, bits)[:, :k], codes)
    assert not bool(layout.tile_codes(tiles, bits)[:, k:].any())
    if k % 256 == 0:
        assert tiles.nbytes == words.nbytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_where_each_bit_of_a_code_is(bits):
    """By the layout's description, written independently: one code at a time."""
    planes = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    for k in (0, 1, 31, 32, 33, 100, 255, 256, 300):
        codes = torch.zeros(1, 301, dtype=torch.uint8)
        codes[0, k] = (1 << bits) - 1
        octets = layout.tile(pack(codes, bits), bits, 301).view(torch.uint8)[0, k // 256].tolist()
        chunk, lane = k % 256 // 32, k % 32
        first = 0
        for width in planes:
            ones = (1 << width) - 1
            if width == 1:
                assert octets[first + lane] == ones << chunk
                octets[first + lane] = 0
            else:
                fields = 16 // width
                at = first + 2 * (32 * (chunk // fields) + lane)
                assert octets[at] | octets[at + 1] << 8 == ones << chunk % fields * width
                octets[at] = octets[at + 1] = 0
            first += 32 * width
        assert len(octets) == first and not any(octets)


def test_the_reference_reads_tiles(monkeypatch):
    """Same bits from canonical words and from tiles, gradients too."""
    layer = lowbit.PackedLinear.from_float(torch.randn(12, 300), lowbit.Packed(bits=3, group_size=20, outliers=0.01))
    layer.scales.requires_grad_()
    x = torch.randn(5, 300, requires_grad=True)
    with registry.use_backend("reference"):
        y = layer(x)
        grads = torch.autograd.grad(y.sum(), [x, layer.scales])
        layer._arrange((TILES,))
        assert layer.packed.dim() == 3
        tiled = layer(x)
        tiled_grads = torch.autograd.grad(tiled.sum(), [x, layer.scales])
    assert_bitwise_equal(y.detach(), tiled.detach())
    for a, b in zip(grads, tiled_grads, strict=True):
        assert_bitwise_equal(a, b)


SPECS = [
    lowbit.Packed(bits=4, group_size=32), lowbit.Packed(bits=7), lowbit.Codebook(bits=3),
    lowbit.Codebook(table="nf4", group_size=16), lowbit.Kronecker(),
]  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(40, 300), nn.Linear(300, 64), nn.Linear(64, 300), nn.Linear(300, 40, bias=False))
    tied[3].weight = tied[0].weight
    return tied


@pytest.fixture
def on_gpu(monkeypatch):
    """A switch: whether the CPU counts as a device whose kernels read tiles, or canonical words."""
    switch = {"on": False}
    monkeypatch.setattr(layout, "used_on", lambda device: switch["on"])
    monkeypatch.setattr(blocks, "used_on", lambda device: False)
    return switch


def snapshot(m: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in canonical_state_dict(m).items()}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_moving_saving_and_copying_keep_every_bit(spec, on_gpu, tmp_path):
    m = lowbit.convert(model(), spec)
    before = snapshot(m)
    tensors = {id(t) for t in (*m.parameters(), *m.buffers())}

    on_gpu["on"] = True
    m.to("cpu")  # as .to("cuda") would
    coded = [layer for layer in layers(m).values() if hasattr(layer, "layout")]
    assert all(layer.packed.dim() == 3 for layer in coded)
    assert {id(t) for t in (*m.parameters(), *m.buffers())} == tensors, "they stay the same objects"
    lowbit.report(m)
    for layer in layers(m).values():
        layer.validate("layer")
    for name, tensor in m.state_dict().items():
        assert_bitwise_equal(tensor, m.get_buffer(name) if "bias" not in name else before[name])
    for name, tensor in canonical_state_dict(m).items():
        assert_bitwise_equal(tensor, before[name])
    if coded:
        kept = canonical_state_dict(m)
        assert kept["0.packed"] is kept["3.packed"], "tied layers give one tensor"

    changed = {name: tensor.clone() for name, tensor in before.items()}
    if coded:
        changed["1.packed"] = changed["1.packed"].flip(0).contiguous()
    m.load_state_dict(changed)
    assert all(layer.packed.dim() == 3 for layer in coded)
    for name, tensor in canonical_state_dict(m).items():
        assert_bitwise_equal(tensor, changed[name])
    m.load_state_dict(before)

    lowbit.save(m, tmp_path / "saved")
    pickled, copied = pickle.dumps(m), copy.deepcopy(m)
    stream = io.BytesIO()
    torch.save(m.state_dict(), stream)
    assert all(copy_.packed.dim() == 3 for copy_ in layers(copied).values() if hasattr(copy_, "layout"))

    on_gpu["on"] = False
    stream.seek(0)
    fresh = lowbit.convert(model(), spec)
    fresh.load_state_dict(torch.load(stream, weights_only=True))  # tiles, into layers that hold canonical words
    states = [
        pickle.loads(pickled).state_dict(), lowbit.load(tmp_path / "saved", model()).state_dict(),
        fresh.state_dict(), m.to("cpu").state_dict(),
    ]  # fmt: skip
    assert all(layer.packed.dim() == 2 for layer in coded)
    for state in states:
        assert state.keys() == before.keys()
        for name, tensor in state.items():
            assert_bitwise_equal(tensor, before[name])


def test_what_is_made_on_a_gpu_is_prepared_there(on_gpu, tmp_path):
    m = lowbit.convert(model(), SPECS[0])
    lowbit.save(m, tmp_path)
    on_gpu["on"] = True
    with registry.use_backend("reference"):  # the CPU's kernels do not read tiles
        for made in (lowbit.convert(model(), SPECS[0]), lowbit.load(tmp_path, model())):
            assert all(layer.packed.dim() == 3 for layer in layers(made).values())
            assert made[0].packed is made[3].packed
        with torch.inference_mode():
            assert canonical_state_dict(lowbit.convert(model(), SPECS[0]))["1.packed"].dim() == 2


def test_a_state_dict_never_shows_another_layers_codes(on_gpu):
    """A kept state_dict, its layer gone, a new layer in its place; and codes that were changed in place."""
    on_gpu["on"] = True
    for _ in range(20):
        weight = torch.randn(12, 300)
        layer = lowbit.PackedLinear.from_float(weight, lowbit.Packed(bits=3))
        state = canonical_state_dict(layer)
        assert_bitwise_equal(state["packed"], lowbit.Packed(bits=3).quantize(weight).tensors()["packed"])
        layer.packed.data.zero_()
        with torch.no_grad():
            layer.packed.fill_(0)
        assert not bool(canonical_state_dict(layer)["packed"].any())
        del layer


def test_a_state_dict_of_another_shape_is_refused(on_gpu):
    on_gpu["on"] = True
    layer = lowbit.PackedLinear.from_float(torch.randn(12, 300), lowbit.Packed(bits=3))
    state = layer.state_dict()
    state["packed"] = state["packed"][:, :-1].contiguous()
    with pytest.raises(RuntimeError, match="packed must have shape"):
        layer.load_state_dict(state)
    layer._buffers["packed"] = layer.packed[:, :1].contiguous()
    with pytest.raises(ValueError, match=r"layer.packed must have shape \(12, 30\)"):
        layer.validate()


@needs_interpreter
def test_kernels_take_tiles_and_canonical_words(on_gpu):
    layer = lowbit.PackedLinear.from_float(torch.randn(20, 300), lowbit.Packed(bits=5, group_size=64))
    x = torch.randn(3, 300, dtype=torch.float16)
    with running(Where("triton")):
        y = layer(x)
        on_gpu["on"] = True
        layer.prepare()
        assert layer.packed.dim() == 3
        assert_bitwise_equal(layer(x), y)


def test_tiles_of_a_wrong_shape_are_refused():
    layer = lowbit.PackedLinear.from_float(torch.randn(8, 300), lowbit.Packed(bits=4))
    tiles = layout.tile(layer.packed.data, 4, 300)
    with registry.use_backend("reference"), pytest.raises(RuntimeError, match=r"packed in tiles must be \[N, 2, 32\]"):
        torch.ops.lowbit.packed_dequantize(
            tiles[:, :1].contiguous(), None, None, None, layer.scales, layer.zeros, None, None, 4, 300, TILES.number,
            False, 0, 300, torch.float32,
        )  # fmt: skip


def test_meta_tensors_are_arranged_by_shape(tmp_path: Path):
    words = torch.empty(8, 40, dtype=torch.int32, device="meta")
    tiles = layout.tile(words, 4, 300)
    assert tiles.shape == (8, 2, 32) and tiles.device.type == "meta"
    assert layout.untile(tiles, 4, 300).shape == words.shape
    assert unpack(pack(torch.zeros(0, 300, dtype=torch.uint8), 4), 4, 300).shape == (0, 300)
