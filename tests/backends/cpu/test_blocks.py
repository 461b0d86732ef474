"""Blocks: the order of codes that the CPU kernels of packed linears read, and the layers that hold it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lowbit
from lowbit.backends import reference, registry
from lowbit.backends.cpu import blocks
from lowbit.backends.cpu.blocks import BLOCKS
from lowbit.backends.layouts import CANONICAL, change
from lowbit.backends.triton import tiles
from lowbit.backends.triton.tiles import TILES
from lowbit.core.bitpack import pack
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.packed.format import PackedFormat
from lowbit.packed.module import PackedEmbedding, PackedLinear
from lowbit.testing import verdicts
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations, random_weight
from lowbit.testing.transforms import opcheck
from lowbit.testing.where import everywhere, running

BITS = range(1, 9)
COMPILED = registry.why_unavailable("cpu") is None
needs_compiled = pytest.mark.skipif(not COMPILED, reason="no compiled kernels")


def random_codes(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_definition(codes: torch.Tensor, bits: int) -> list[int]:
    """The words of blocks, unsigned: one bit of one code at a time, by the layout's description."""
    n, k = codes.shape
    units = -(-k // 32)
    words = [0] * (n * units * bits)
    widths = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    for row in range(n // 16 * 16):
        panel, place = divmod(row // 16, 4)
        count = min(4, n // 16 - 4 * panel)
        for column in range(k):
            unit, quad, byte = column // 32, column % 32 // 4, column % 4
            first = 0  # bit of the code, and vector of the unit
            for width in widths:
                vector, field = divmod(quad, 8 // width)
                word = ((4 * panel * units + unit * count) * bits + (first + vector) * count + place) * 16 + row % 16
                words[word] |= (int(codes[row, column]) >> first & (1 << width) - 1) << 8 * byte + width * field
                first += width
    rest = [int(word) & 0xFFFFFFFF for word in pack(codes[n // 16 * 16 :], bits).flatten()]
    if rest:
        words[-len(rest) :] = rest
    return words


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiled)])
@pytest.mark.parametrize("bits", BITS)
def test_every_bit_is_where_the_definition_says(bits, backend):
    for n, k in ((16, 32), (37, 77), (15, 40), (48, 1), (130, 70), (64, 33)):
        codes = random_codes(n, k, bits)
        with registry.use_backend(backend):
            found = blocks.block(pack(codes, bits), bits)
        assert found.dtype == torch.int32 and found.shape == (n, -(-k // 32), bits, 1) and found.is_contiguous()
        assert [word & 0xFFFFFFFF for word in found.flatten().tolist()] == by_definition(codes, bits)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(1, 600), st.integers(0, 1 << 30))
def test_there_and_back(bits, n, k, seed):
    codes = random_codes(n, k, bits, seed)
    words = pack(codes, bits)
    results = []
    for backend in ("reference", *(["cpu"] if COMPILED else [])):
        with registry.use_backend(backend):
            results.append(blocks.block(words, bits))
            assert_bitwise_equal(blocks.unblock(results[-1], bits), words)
    assert_bitwise_equal(results[0], results[-1])
    assert results[0].nbytes == words.nbytes
    assert_bitwise_equal(blocks.codes_of_blocks(results[0], bits)[:, :k], codes)
    assert not bool(blocks.codes_of_blocks(results[0], bits)[:, k:].any())
    if n:
        rows = torch.randint(0, n, (9,), generator=torch.Generator().manual_seed(seed))
        assert_bitwise_equal(blocks.rows_of_blocks(results[0], rows, bits), words[rows])
    for to in (TILES, CANONICAL, BLOCKS):
        there = change(results[0], BLOCKS, to, bits, k)
        assert there.shape == (n, *to.row_shape(k, bits))
        assert_bitwise_equal(to.codes(there, bits, k), codes)
        assert_bitwise_equal(change(there, to, BLOCKS, bits, k), results[0])


@pytest.mark.parametrize("bits", BITS)
def test_slices_of_whole_panels_are_blocks(bits):
    words = pack(random_codes(203, 70, bits), bits)
    whole = blocks.block(words, bits)
    for rows in (slice(0, 64), slice(64, 203), slice(128, 203), slice(192, 203)):
        assert_bitwise_equal(blocks.unblock(whole[rows], bits), words[rows])


@pytest.mark.parametrize("bits", BITS)
def test_large_weights_on_any_number_of_threads(bits):
    """More than the torch form arranges at a time, more than one task, odd sizes; inputs that are not contiguous."""
    words = torch.randint(-(2**31), 2**31, (2063, 67 * bits), dtype=torch.int32)
    with registry.use_backend("reference"):
        found = blocks.block(words, bits)
        assert_bitwise_equal(blocks.unblock(found, bits), words)
    if COMPILED:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                assert_bitwise_equal(blocks.block(words, bits), found)
                assert_bitwise_equal(blocks.unblock(found, bits), words)
            finally:
                torch.set_num_threads(1)
    strided = words.t().contiguous().t()
    assert_bitwise_equal(blocks.block(strided, bits), found)


@needs_compiled
@pytest.mark.slow
def test_more_than_two_to_the_31_bytes(request):
    verdicts.only_in_turn(request.config, 0, 4)
    bits, n, units = 8, 4128, 17000
    words = torch.zeros(n, units * bits, dtype=torch.int32)
    words[-32:] = last = torch.randint(-(2**31), 2**31, (32, units * bits), dtype=torch.int32)
    found = torch.ops.lowbit_native.block(words, bits)
    assert found.nbytes > 1 << 31
    assert_bitwise_equal(found[-32:], blocks.block(last, bits))  # the last panel, of two blocks
    del words
    assert_bitwise_equal(torch.ops.lowbit_native.unblock(found, bits)[-32:], last)


@needs_compiled
def test_what_the_compiled_ops_refuse():
    words = torch.zeros(16, 12, dtype=torch.int32)
    block, unblock = torch.ops.lowbit_native.block, torch.ops.lowbit_native.unblock
    good = block(words, 4)
    for call, arguments, message in (
        (block, (words, 0), "bits must be between 1 and 8: got bits=0"),
        (block, (words, 9), "bits must be between 1 and 8: got bits=9"),
        (block, (words, 5), "packed must have a multiple of bits=5 words per row: got 12"),
        (block, (words.long(), 4), "packed must be int32: got Long"),
        (block, (words[0], 4), r"packed must have 2 dimensions: got shape \[12\]"),
        (block, (words.t(), 4), "packed must be contiguous"),
        (unblock, (words, 4), r"blocks must have 4 dimensions: got shape \[16, 12\]"),
        (unblock, (good, 3), r"blocks must be of shape \[N, ceil\(K/32\), 3, 1\]: got \[16, 3, 4, 1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


def test_meta_tensors_are_arranged_by_shape():
    found = blocks.block(torch.empty(40, 12, dtype=torch.int32, device="meta"), 4)
    assert found.shape == (40, 3, 4, 1) and found.device.type == "meta"
    assert blocks.unblock(found, 4).shape == (40, 12)


# ------------------------------------------------------------------------------------------------------------- ops

FORMATS = [
    PackedFormat(4, 37, 70, 16, "group", "int", "float16", outliers=9),
    PackedFormat(3, 37, 70, 70, "row", "float", "float32"),
    PackedFormat(2, 48, 70, 70, "tensor", "none", "bfloat16"),
    PackedFormat(7, 16, 33, 33, "row", "int", "float32", outliers=5),
]
format_ids = [f.describe() for f in FORMATS]
WHERE = everywhere()


@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_ops_read_blocks(where, format):
    """As the same codes in the canonical order, gradients too; how exact products are: tests/packed/test_kernels.py."""
    w, f = random_weight(format), format
    if where.device != "cpu":
        pytest.skip("blocks are for CPUs")
    x = activations(5, f.in_features, torch.float32).requires_grad_()
    dy = activations(5, f.out_features, torch.float32, seed=2)
    scales = w.scales.float().requires_grad_()
    ids = torch.tensor([[0, 15], [f.out_features - 1, 3]])
    results = []
    for packed in (w.packed, blocks.block(w.packed, f.bits)):
        found = []
        zeros = w.zeros if f.zeros != "float" else w.zeros.float()
        weight = replace(w, packed=packed, scales=scales, zeros=zeros).arguments
        with running(where):
            for int8 in (False, True):
                y = torch.ops.lowbit.packed_linear(x, **weight, bias=None, x_scale=None, int8=int8, x_group=0)
                found += [*torch.autograd.grad(y, [x, scales], dy), *([] if where.backend == "cpu" else [y.detach()])]
            sizes = dict(in_features=f.in_features, dtype=torch.float32)
            found.append(torch.ops.lowbit.packed_dequantize(**weight, **sizes).detach())
            y = torch.ops.lowbit.packed_embedding(ids, **weight, **sizes)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), [scales])]
        results.append(found)
    for canonical, blocked in zip(*results, strict=True):
        assert_bitwise_equal(blocked, canonical)


@pytest.mark.parametrize("format", FORMATS, ids=format_ids)
@pytest.mark.parametrize("where", [w for w in WHERE if w.backend != "triton"][:2], ids=str)
def test_opcheck(where, format):
    w, f = random_weight(format), format
    weight = tuple(replace(w, packed=blocks.block(w.packed, f.bits)).operands)
    x = activations(3, f.in_features, torch.float32).requires_grad_()
    with running(where):
        opcheck(where, torch.ops.lowbit.packed_linear.default, (x, *weight, None, None, False, 0))
        opcheck(where, torch.ops.lowbit.packed_dequantize.default, (*weight, f.in_features, torch.float16))
        ids = torch.tensor([[1, 0], [15, 15]])
        opcheck(where, torch.ops.lowbit.packed_embedding.default, (ids, *weight, f.in_features, torch.bfloat16))


@pytest.mark.parametrize("outliers", [0, 20])
def test_the_input_gradient_cuts_blocks_whole(outliers, monkeypatch):
    """Rows are dequantized a few at a time: only at multiples of 16."""
    w = random_weight(replace(FORMATS[0], out_features=75, outliers=outliers))
    x = activations(5, 70, torch.float32).requires_grad_()
    dy = activations(5, 75, torch.float32, seed=2)
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 3 * 70)
    with registry.use_backend("reference"):
        for packed in (w.packed, blocks.block(w.packed, 4)):
            y = torch.ops.lowbit.packed_linear(x, *replace(w, packed=packed).operands, None, None, False, 0)
            (dx,) = torch.autograd.grad(y, x, dy)
            exact = dy.double() @ w.dense().double()
            assert float((dx.double() - exact).norm() / exact.norm()) < 1e-6


def test_blocks_of_a_wrong_shape_are_refused():
    w = random_weight(FORMATS[1])
    packed = blocks.block(w.packed, 3)
    arguments = {**w.arguments, "layout": BLOCKS.number, "in_features": 70, "dtype": torch.float32}
    with registry.use_backend("reference"):
        for bad in (packed[:, :1], packed.view(37, 3, 1, 3), packed.expand(-1, -1, -1, 2)):
            with pytest.raises(RuntimeError, match=r"packed in blocks must be \[N, 3, 3, 1\] for K=70, bits=3"):
                torch.ops.lowbit.packed_dequantize(**{**arguments, "packed": bad})


# ---------------------------------------------------------------------------------------------------------- layers


@pytest.fixture
def kernels(monkeypatch):
    """Compiled kernels of packed linears that read blocks, and a switch to those that do not."""
    switch = {"read_blocks": True}
    monkeypatch.setattr(blocks, "used_on", lambda device: switch["read_blocks"] and device.type == "cpu")
    with nullcontext() if COMPILED else registry.use_backend("reference"):
        yield switch


def model() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(40, 300), nn.Linear(300, 64), nn.Linear(64, 300), nn.Linear(300, 40, bias=False))
    tied[3].weight = tied[0].weight
    for linear in tied[1:3]:
        nn.init.ones_(linear.bias)  # the same in every dtype
    return tied


def snapshot(m: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in canonical_state_dict(m).items()}


def check(m: nn.Module, before: dict[str, torch.Tensor], dimensions: int = 4) -> None:
    """Every linear (and who shares its codes) in blocks, or none; the state as held, and in files as it was; ties
    kept."""
    for layer in layers(m).values():
        layer.validate()
        assert layer.packed.dim() == dimensions
    assert m[0].packed is m[3].packed
    held = m.state_dict()
    assert held["0.packed"].data_ptr() == held["3.packed"].data_ptr()
    for name, buffer in m.named_buffers():
        assert_bitwise_equal(held[name], buffer)
    state = canonical_state_dict(m)
    assert state["0.packed"] is state["3.packed"] or state["0.packed"].data_ptr() == state["3.packed"].data_ptr()
    assert state.keys() == before.keys() == held.keys()
    for name, tensor in state.items():
        assert_bitwise_equal(tensor, before[name])


SPECS = [lowbit.Packed(bits=4, group_size=32), lowbit.Packed(bits=7), lowbit.Packed(bits=3, outliers=0.01)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_moving_saving_and_copying_keep_every_bit(spec, kernels, tmp_path):
    kernels["read_blocks"] = False
    m = lowbit.convert(model(), spec)
    before = snapshot(m)
    check(m, before, 2)
    tensors = {id(t) for t in (*m.parameters(), *m.buffers())}
    ids = torch.arange(40)
    with registry.use_backend("reference"):
        y = m(ids)

    kernels["read_blocks"] = True
    for move in (lambda: m.to("cpu"), lambda: m.bfloat16().float(), m.share_memory):
        move()
        check(m, before)
    assert {id(t) for t in (*m.parameters(), *m.buffers())} == tensors, "they stay the same objects"
    with registry.use_backend("reference"):
        assert_bitwise_equal(m(ids), y)
    lowbit.report(m)

    changed = {name: tensor.clone() for name, tensor in before.items()}
    changed["1.packed"] = changed["1.packed"].flip(0).contiguous()
    changed["0.packed"] = changed["3.packed"] = changed["3.packed"].flip(0).contiguous()
    m.load_state_dict(changed)
    check(m, changed)
    m.load_state_dict(before)

    lowbit.save(m, tmp_path / "saved")
    pickled, copied = pickle.dumps(m), copy.deepcopy(m)
    check(copied, before)
    check(pickle.loads(pickled), before)
    stream = io.BytesIO()
    torch.save(m.state_dict(), stream)
    stream.seek(0)
    written = torch.load(stream, weights_only=True)
    m.load_state_dict(written)
    check(m, before)
    check(lowbit.load(tmp_path / "saved", model()), before)
    with torch.device("meta"):
        skeleton = model()
    check(lowbit.load(tmp_path / "saved", skeleton), before)

    empty = lowbit.convert(skeleton_of_floats(), spec).to_empty(device="cpu")
    empty[3].packed = empty[0].packed
    empty.load_state_dict(before)
    check(empty, before)

    kernels["read_blocks"] = False
    check(pickle.loads(pickled), before, 2)
    check(lowbit.load(tmp_path / "saved", model()), before, 2)
    check(m.to("cpu"), before, 2)
    m.load_state_dict(written)  # blocks, into a layer that holds canonical words
    check(m, before, 2)
    older = pickle.dumps(m)
    kernels["read_blocks"] = True
    check(pickle.loads(older), before)


def skeleton_of_floats() -> nn.Module:
    with torch.device("meta"):
        return model()


def test_what_is_made_is_prepared(kernels):
    m = lowbit.convert(model(), SPECS[0])
    assert all(layer.packed.dim() == 4 for layer in layers(m).values())
    assert m[0].packed is m[3].packed
    with torch.inference_mode():
        assert canonical_state_dict(lowbit.convert(model(), SPECS[0]))["1.packed"].dim() == 2
    assigned = lowbit.convert(skeleton_of_floats(), SPECS[0])
    assigned.load_state_dict(m.state_dict(), assign=True)
    assert assigned[1].packed.dim() == 4
    for name, tensor in canonical_state_dict(assigned).items():
        assert_bitwise_equal(tensor, canonical_state_dict(m)[name])


def test_only_packed_linears_of_16_rows_hold_blocks(kernels):
    weight = torch.randn(16, 40)
    spec = lowbit.Packed(bits=4)
    assert PackedLinear.from_float(weight, spec).packed.dim() == 4
    assert PackedLinear.from_float(weight[:15], spec).packed.dim() == 2
    assert PackedEmbedding.from_weight(spec.quantize(weight)).packed.dim() == 2
    assert lowbit.CodebookLinear.from_float(weight, lowbit.Codebook(bits=4)).packed.dim() == 2
    with torch.device("meta"):
        assert PackedLinear(spec.quantize(weight.to("cpu")).format()).packed.dim() == 2


def test_where_blocks_are_used():
    """Where the compiled kernels run, and nowhere else."""
    cpu, weight = torch.device("cpu"), lowbit.Packed(bits=4).quantize(torch.randn(20, 40))
    with registry.use_backend("reference"):
        assert not blocks.used_on(cpu)
        assert PackedLinear.from_weight(weight).packed.dim() == 2
    assert blocks.used_on(cpu) is COMPILED
    assert not blocks.used_on(torch.device("cuda"))
    assert not blocks.used_on(torch.device("meta"))


def test_from_tiles_to_blocks_and_back(kernels, monkeypatch):
    """As between a GPU and a CPU."""
    m = lowbit.convert(model(), SPECS[0])
    before = snapshot(m)
    gpu = {"on": True}
    monkeypatch.setattr(tiles, "used_on", lambda device: gpu["on"])
    on_cpu = blocks.used_on
    monkeypatch.setattr(blocks, "used_on", lambda device: not gpu["on"] and on_cpu(device))
    check(m.to("cpu"), before, 3)
    gpu["on"] = False
    check(m.to("cpu"), before)


def test_a_state_dict_never_shows_another_layers_codes(kernels):
    """A kept state_dict, its layer gone, a new layer in its place; and codes that were changed in place."""
    for _ in range(20):
        weight = torch.randn(33, 300)
        layer = PackedLinear.from_float(weight, lowbit.Packed(bits=3))
        packed = lowbit.Packed(bits=3).quantize(weight).tensors()["packed"]
        assert_bitwise_equal(canonical_state_dict(layer)["packed"], packed)
        layer.packed.data.zero_()
        with torch.no_grad():
            layer.packed.fill_(0)
        assert not bool(canonical_state_dict(layer)["packed"].any())
        del layer


def test_a_state_dict_of_another_shape_is_refused(kernels):
    layer = PackedLinear.from_float(torch.randn(20, 300), lowbit.Packed(bits=3))
    state = layer.state_dict()
    state["packed"] = state["packed"][:, :-1].contiguous()
    with pytest.raises(RuntimeError, match="packed must have shape"):
        layer.load_state_dict(state)
    layer._buffers["packed"] = layer.packed[:, :1].contiguous()
    with pytest.raises(ValueError, match=r"layer.packed must have shape \(20, 30\)"):
        layer.validate()


@pytest.mark.skipif("triton" not in registry.able_on("cpu"), reason="Triton's interpreter is not on")
def test_triton_takes_blocks(kernels):
    layer = PackedLinear.from_float(torch.randn(20, 300), lowbit.Packed(bits=5, group_size=64))
    assert layer.packed.dim() == 4
    x = torch.randn(3, 300, dtype=torch.float16)
    with registry.use_backend("triton"):
        y = layer(x)
        layer._arrange((CANONICAL,))
        assert_bitwise_equal(layer(x), y)


PREPARE = """
import torch, lowbit
from lowbit.backends.cpu import blocks
from lowbit.packed.format import PackedFormat

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

torch.set_num_threads(1)
made = [lowbit.PackedLinear(PackedFormat(4, 4096, 4096, 4096, "row", "none", "float32")) for _ in range(16)]
for layer in made:
    layer.packed.data.fill_(5)
before = peak()
for layer in made:
    layer.prepare()
assert all(layer.packed.dim() == 4 for layer in made)
print((peak() - before) / made[0].packed.nbytes)
"""


@needs_compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.turns(2)
def test_preparing_takes_one_layers_codes_beyond_the_model():
    done = subprocess.run([sys.executable, "-c", PREPARE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5
