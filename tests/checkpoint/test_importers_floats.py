"""Folders of integers that are not packed, and of small floats: kept bit for bit, or refused by name.

The decoders are loops over single values, and know nothing of lowbit; fixtures/foreign/ has the projects' own.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.checkpoint.importers import small_floats
from lowbit.testing.foreign_folders import (
    check_experts,
    check_mixture,
    configure,
    equal,
    folder_of,
    mixture,
    refused,
    rewrite,
)

transformers = pytest.importorskip("transformers", minversion="5.0")

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "foreign"
UP = "model.layers.0.mlp.up_proj"
IDS = torch.tensor([[3, 1, 4, 1, 5]])
E4M3 = torch.float8_e4m3fn


# ------------------------------------------------------------------------------------------- the formats, as loops


def e4m3(byte):
    """The value of a byte by the definition of the format."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7)
    return -value if byte >> 7 else value


E2M1 = [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]


def nibbles(row):
    """Two values of e2m1 in each byte, the first in the lower bits."""
    return [E2M1[code] for byte in row for code in (byte & 15, byte >> 4)]


def fp4_weight(t):
    """MXFP4, with bytes of exponents, or NVFP4: the scale of a group is a quotient in float32."""
    rows = [nibbles(row) for row in t["weight_packed" if "weight_packed" in t else "weight"].tolist()]
    if t["weight_scale"].dtype == E4M3:
        scales = torch.tensor([[e4m3(byte) for byte in row] for row in t["weight_scale"].view(torch.uint8).tolist()])
        scales = scales * t["weight_scale_2"] if "weight_scale_2" in t else scales / t["weight_global_scale"]
        return scaled(rows, scales, (1, 16))
    return scaled(rows, torch.tensor([[2.0 ** (e - 127) for e in row] for row in t["weight_scale"].tolist()]), (1, 32))


def scaled(rows, scales, block):
    """``value * scale`` in float32, of lists [N][K] and one scale for each block ``[rows, columns]``."""
    scales = scales.float().reshape(-1, scales.shape[-1] if scales.dim() else 1)
    factors = [[scales[n // block[0], k // block[1]] for k in range(len(row))] for n, row in enumerate(rows)]
    return torch.tensor(rows) * torch.tensor(factors)


def block_of(n, k, scales):
    """Without groups: one scale for each row, or one."""
    return (1 if scales.numel() == n else n), k


def plain_weight(t, block=None):
    """Of int8 or e4m3; ``block``: [rows, columns]."""
    n, k = t["weight"].shape
    scales = t["weight_scale_inv" if "weight_scale_inv" in t else "weight_scale"]
    block = block_of(n, k, scales) if block is None else block
    if t["weight"].dtype == torch.int8:
        zeros = t.get("weight_zero_point", torch.zeros(scales.shape)).int().reshape(-1, scales.shape[-1])
        rows = [[float(q - zeros[i // block[0], j // block[1]]) for j, q in enumerate(row)]
                for i, row in enumerate(t["weight"].tolist())]  # fmt: skip
    else:
        rows = [[e4m3(byte) for byte in row] for row in t["weight"].view(torch.uint8).tolist()]
    return scaled(rows, scales, block)


def block_in(section):
    if section["quant_method"] == "fp8":
        return section["weight_block_size"]
    return section["config_groups"]["group_0"]["weights"].get("block_structure")


def parts(tensors, layer):
    return {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}


# the family, how x is held, and whether x is as the config asks for
PLAIN = {
    "compressed-tensors-w8a8": ("packed", "int8", True), "compressed-tensors-fp8": ("codebook", "float", False),
    "fp8": ("codebook", "float", False), "compressed-tensors-mxfp4": ("codebook", "float", True),
    "compressed-tensors-nvfp4": ("codebook", "float", False), "modelopt-nvfp4": ("codebook", "float", False),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_what_others_wrote(name, tmp_path):
    source, (family, activations, is_done) = FIXTURES / name / "model", PLAIN[name]
    model, tensors = lowbit.load(source), load_file(source / "model.safetensors")
    section = json.loads((source / "config.json").read_text())["quantization_config"]
    expected = load_file(FIXTURES / name / "expected.safetensors")
    assert len(expected) == 2 and equal(model, expected)
    own = {layer: parts(tensors, layer) for layer in expected}
    assert equal(model, {layer: fp4_weight(t) if "fp4" in name else plain_weight(t, block_in(section))
                         for layer, t in own.items()})  # fmt: skip
    layers = [m for m in model.modules() if isinstance(m, (lowbit.PackedLinear, lowbit.CodebookLinear))]
    assert {(m.family, m.format.activations) for m in layers} == {(family, activations)} and len(layers) == 7
    assert all(("x stays float" in (m.note or "")) != is_done for m in layers)
    lowbit.convert_folder(source, tmp_path / "packed")
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)


# ---------------------------------------------------------------------------------- compressed-tensors, not packed


def compressed(form, kind, strategy, bits=8, symmetric=True, inputs=None, block=None):
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": 16,
               "block_structure": block}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def inputs(dynamic=True, **more):
    return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": dynamic,
            "strategy": "token" if dynamic else "tensor", **more}  # fmt: skip


def integers(n, k, strategy="channel", bits=8, symmetric=True, block=(24, 16)):
    half = 2 ** (bits - 1)
    groups = -(-k // 16) if strategy in ("group", "block") else 1
    shape = {"tensor": (1,), "channel": (n, 1), "group": (n, groups), "block": (-(-n // block[0]), groups)}[strategy]
    made = {"weight": torch.randint(-half, half, (n, k), dtype=torch.int8),
            "weight_scale": (torch.rand(shape) / 8 + 0.01).bfloat16()}  # fmt: skip
    if not symmetric:
        made["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    sizes = {"group": (1, 16), "block": block}.get(strategy)
    return made, plain_weight(made, sizes)


def floats(n, k, shape=None, scale="weight_scale", dtype=torch.float32, block=None):
    """Random e4m3 with every code that is a number."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    codes = codes.flatten()
    codes[:256] = torch.arange(256, dtype=torch.uint8)
    codes = codes.masked_fill((codes & 127) == 127, 7).view(n, k).view(E4M3)
    made = {"weight": codes, scale: (torch.rand(() if shape is None else shape) / 64 + 1e-3).to(dtype)}
    return made, plain_weight(made, block)


@pytest.mark.parametrize(
    ("strategy", "bits", "symmetric"),
    [("tensor", 8, True), ("channel", 8, False), ("group", 4, False), ("group", 8, True), ("block", 8, True)],
)
def test_integers(strategy, bits, symmetric, tmp_path):
    section = compressed("int-quantized", "int", strategy, bits, symmetric, inputs(), [24, 16])
    expected = folder_of(tmp_path, section, lambda n, k: integers(n, k, strategy, bits, symmetric))
    model = lowbit.load(tmp_path)
    assert equal(model, expected)
    assert {model.get_submodule(layer).format.activations for layer in expected} == {"int8"}


def test_static_activations(tmp_path):
    """``q = round(x / input_scale)``, in -127 to 127."""
    section = compressed("int-quantized", "int", "channel", inputs=inputs(dynamic=False))

    def make(n, k):
        made, weight = integers(n, k)
        zero = torch.zeros(1, dtype=torch.int8)
        return {**made, "input_scale": torch.tensor([0.03125]), "input_zero_point": zero}, weight

    expected = folder_of(tmp_path / "model", section, make)
    layer = lowbit.load(tmp_path / "model").get_submodule(UP)
    assert layer.format.activations == "int8_static" and layer.x_scale.item() == 0.03125
    x = torch.randn(3, 40)
    q = (x.double() / 0.03125).round().clamp(-127, 127) * 0.03125
    assert torch.allclose(layer(x).double(), q @ expected[UP].double().t(), rtol=1e-5, atol=1e-4)
    rewrite(tmp_path / "model", lambda t: t.pop(f"{UP}.input_scale"))
    refused(tmp_path / "model", f"'{UP}.input_scale' is missing", "not dynamic")


@pytest.mark.parametrize(
    "asked", [inputs(symmetric=False), inputs(num_bits=4), inputs(dynamic=False, strategy="group"), {"type": "float"}]
)
def test_activations_that_stay_float(asked, tmp_path):
    section = compressed("int-quantized", "int", "channel", inputs=asked)
    expected = folder_of(tmp_path, section, integers, only="up_proj")
    model = lowbit.load(tmp_path)
    assert equal(model, expected)
    layer = model.get_submodule(UP)
    assert layer.format.activations == "float" and "x stays float" in layer.note
    assert "x stays float" in str(lowbit.report(model))


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_floats_of_compressed_tensors(strategy, tmp_path):
    block = {"block": [24, 16], "group": [1, 16]}.get(strategy)

    def make(n, k):
        groups = -(-k // 16)
        shape = {"tensor": (1,), "channel": (n, 1), "group": (n, groups), "block": (-(-n // 24), groups)}[strategy]
        return floats(n, k, shape, dtype=torch.bfloat16, block=block)

    section = compressed("float-quantized", "float", strategy, block=block, inputs=inputs(type="float"))
    expected = folder_of(tmp_path, section, make)
    assert equal(lowbit.load(tmp_path), expected)


def test_bytes():
    """Of a layer as large as they are, beside those of its files."""
    native = 4096 * 4096 + 4 * 32 * 32
    assert small_floats.e4m3_format(4096, 4096, 128, torch.float32).nbytes <= 1.04 * native
    weights = 4096 * 2880
    assert small_floats.mxfp4_format(4096, 2880).nbytes <= 1.06 * weights * (1 / 2 + 1 / 32)
    assert small_floats.nvfp4_format(4096, 2880).nbytes <= 1.003 * weights * (1 / 2 + 1 / 16)


def test_compressed_tensors_own_compressors(tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def make(n, k, form, weights, shape):
        scales, zeros = (torch.rand(shape) / 8 + 0.01).bfloat16().float(), torch.zeros(shape, dtype=torch.int8)
        if not weights.get("symmetric", True):
            zeros = torch.randint(-128, 128, shape, dtype=torch.int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor = BaseCompressor.get_value_from_registry(form)
        made = compressor.compress({"weight": torch.randn(n, k), "weight_scale": scales, "weight_zero_point": zeros},
                                   scheme)  # fmt: skip
        return made, compressor.decompress(made, scheme)["weight"]

    for i, (form, kind, strategy, more) in enumerate((
        ("int-quantized", "int", "channel", {"symmetric": False}), ("int-quantized", "int", "group", {"group_size": 8}),
        ("float-quantized", "float", "tensor", {}), ("naive-quantized", "float", "channel", {}),
        ("float-quantized", "float", "block", {"block_structure": [8, 8]}),
    )):  # fmt: skip
        weights = {"num_bits": 8, "type": kind, "strategy": strategy, **more}
        section = compressed(form, kind, strategy)
        section["config_groups"]["group_0"]["weights"] = weights

        def made(n, k, form=form, weights=weights, strategy=strategy):
            shape = {"tensor": (1,), "channel": (n, 1), "group": (n, k // 8), "block": (n // 8, k // 8)}[strategy]
            return make(n, k, form, weights, shape)

        expected = folder_of(tmp_path / str(i), section, made)
        assert equal(lowbit.load(tmp_path / str(i)), expected), (form, strategy)


# ----------------------------------------------------------------------------------------------------- fp8 in blocks


def fp8(block=(16, 16), **more):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block), **more}


@pytest.mark.parametrize(
    ("block", "shape", "scale", "dtype"),
    [
        ((16, 16), None, "weight_scale_inv", torch.float32), ((24, 1000), None, "weight_scale_inv", torch.bfloat16),
        (None, (), "weight_scale_inv", torch.float32), (None, (1,), "weight_scale", torch.float16),
    ],
)  # fmt: skip
def test_fp8(block, shape, scale, dtype, tmp_path):
    """Blocks that N and K leave unfinished; without blocks one scale."""

    def make(n, k):
        own = (-(-n // block[0]), -(-k // block[1])) if block else shape
        made, weight = floats(n, k, own, scale, dtype, block)
        return {**made, "input_scale": torch.ones(1)}, weight

    expected = folder_of(tmp_path, fp8(block), make)
    assert equal(lowbit.load(tmp_path), expected)


def test_a_block_that_no_config_names(tmp_path):
    section = {"quant_method": "fp8"}
    config = {"intermediate_size": 200}
    expected = folder_of(tmp_path / "a", section, lambda n, k: floats(n, k, (-(-n // 128), -(-k // 128)),
                         "weight_scale_inv", block=(128, 128)), config, only="down_proj")  # fmt: skip
    assert equal(lowbit.load(tmp_path / "a"), expected)
    expected = folder_of(tmp_path / "b", section, lambda n, k: floats(n, k, (n, 1)), only="down_proj")
    assert equal(lowbit.load(tmp_path / "b"), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_as_scales(dtype, tmp_path):
    """Every one, down to 2**-127, which is no normal float32."""

    def make(n, k):
        shape = -(-n // 2), -(-k // 2)
        exponents = (torch.arange(shape[0] * shape[1]) % 200).to(torch.uint8).view(shape)
        exponents[0, :2] = torch.tensor([0, 1])
        made, _ = floats(n, k, shape, "weight_scale_inv", block=(2, 2))
        values = torch.tensor([[2.0 ** (e - 127) for e in row] for row in exponents.tolist()])
        weight = plain_weight({**made, "weight_scale_inv": values}, (2, 2))
        return {**made, "weight_scale_inv": exponents.view(dtype)}, weight

    expected = folder_of(tmp_path / "model", fp8((2, 2), scale_fmt="ue8m0"), make)
    assert equal(lowbit.load(tmp_path / "model"), expected)
    rewrite(tmp_path / "model", lambda t: t[f"{UP}.weight_scale_inv"].view(torch.uint8)[0].fill_(255))
    refused(tmp_path / "model", f"'{UP}.weight_scale_inv': must be finite", "255")


@pytest.fixture(scope="module")
def made_fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "model"
    folder_of(folder, fp8(), lambda n, k: floats(n, k, (-(-n // 16), -(-k // 16)), "weight_scale_inv", block=(16, 16)))
    return folder


def put(leaf, value):
    return lambda tensors: tensors.update({f"{UP}.{leaf}": value(tensors[f"{UP}.{leaf}"])})


def nan_at(row, code):
    def change(weight):
        weight.view(torch.uint8)[row, 2] = code
        return weight

    return change


CHANGES = {
    "NaN": (put("weight", nan_at(0, 0x7F)), (f"tensor '{UP}.weight'", "must be finite", "NaN")),
    "negative NaN": (put("weight", nan_at(55, 0xFF)), (f"tensor '{UP}.weight'", "must be finite")),
    "floats": (put("weight", lambda t: t.float()), (f"'{UP}.weight'", "dtype must be torch.float8_e4m3fn", "float32")),
    "e5m2": (put("weight", lambda t: t.float().to(torch.float8_e5m2)), ("dtype must be torch.float8_e4m3fn", "e5m2")),
    "integers": (put("weight", lambda t: t.view(torch.int8)), ("dtype must be", "int8")),
    "fewer rows": (put("weight", lambda t: t[:40]), (f"{UP}", "(40, 40)")),
    "three sizes": (put("weight", lambda t: t[None]), ("2 sizes",)),
    "scales of another block": (put("weight_scale_inv", lambda t: t[:2]), ("(4, 3)", "weight_block_size=[16, 16]")),
    "scales in int": (put("weight_scale_inv", lambda t: t.int()), ("weight_scale_inv", "dtype must be")),
    "scales of NaN": (put("weight_scale_inv", lambda t: t / 0 * 0), (UP, "scales must be finite")),
    "no weight": (lambda t: t.pop(f"{UP}.weight"), (f"'{UP}.weight' is missing",)),
    "no scales": (lambda t: t.pop(f"{UP}.weight_scale_inv"), (f"{UP}.weight", "float8_e4m3fn")),
    "two kinds of scales": (lambda t: t.update({f"{UP}.weight_scale": torch.ones(1)}), (f"{UP}.weight_scale",)),
    "no layer": (lambda t: [t.pop(n) for n in list(t) if "scale_inv" in n], ("names the format 'fp8', but no tensor",)),
}  # fmt: skip
CONFIGS = {
    "one size": (fp8([16]), ("weight_block_size must be null or two sizes",)),
    "sizes of 0": (fp8([0, 16]), ("weight_block_size must be", "[0, 16]")),
    "another block": (fp8([32, 16]), ("weight_scale_inv", "shape must be (2, 4)", "weight_block_size=[32, 16]")),
    "no blocks": (fp8(None), ("weight_scale_inv", "shape must be () or (1,)")),
    "e5m2": (fp8(fmt="e5m2"), ("fmt must be 'e4m3'", "e5m2")),
    "a scale of another format": (fp8(scale_fmt="x"), ("scale_fmt must be",)),
    "exponents that no config names": (fp8(), ("weight_scale_inv", "scale_fmt='ue8m0'")),
}


@pytest.mark.parametrize("name", [*CHANGES, *CONFIGS])
def test_malformed_folders_of_fp8(name, made_fp8, tmp_path):
    folder = shutil.copytree(made_fp8, tmp_path / "model")
    change, words = CHANGES.get(name) or CONFIGS[name]
    if name in CHANGES:
        rewrite(folder, change)
    else:
        configure(folder, quantization_config=change)
    if name.startswith("exponents"):
        rewrite(folder, put("weight_scale_inv", lambda t: t.byte()))
    refused(folder, str(folder), *words)


INTEGERS = {
    "values of more bits": (put("weight", lambda t: t * 0 + 9), {"bits": 4}, ("[-8, 7]", "num_bits=4", "[9, 9]")),
    "unsigned": (put("weight", lambda t: t.view(torch.uint8)), {}, ("dtype must be torch.int8: got torch.uint8",)),
    "scales by tensor": (put("weight_scale", lambda t: t[:1, 0]), {}, ("weight_scale", "shape must be (56, 1)")),
    "zeros of a symmetric one": (lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(56, 1, dtype=torch.int8)}),
                                 {}, ("weight_zero_point", "must be zero")),
    "no zeros": (lambda t: None, {"symmetric": False}, ("weight_zero_point' is missing", "symmetric=false")),
    "a weight packed": (lambda t: t.update({f"{UP}.weight_packed": torch.ones(56, 10, dtype=torch.int32)}), {},
                        (f"{UP}.weight_packed",)),
    "3 sizes of a block": (lambda t: None, {"strategy": "block", "block": [1, 2, 3]}, ("block_structure must be two",)),
    "16 bits": (lambda t: None, {"bits": 16}, ("num_bits must be 2 to 8", "got 16")),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
def test_malformed_integers(name, tmp_path):
    change, config, words = INTEGERS[name]
    section = compressed(**{"form": "int-quantized", "kind": "int", "strategy": "channel", **config})
    folder_of(tmp_path / "model", section, integers, only="up_proj")
    rewrite(tmp_path / "model", change)
    refused(tmp_path / "model", str(tmp_path), *words)


# ------------------------------------------------------------------------------------- MXFP4, NVFP4 and MXFP8


def small(form, **more):
    bits, strategy = (8 if "8" in form else 4), "tensor_group" if "nv" in form else "group"
    section = compressed(form, "float", strategy, bits)
    section["config_groups"]["group_0"]["weights"].update({"group_size": 16 if "nv" in form else 32, **more})
    return section


MXFP4, NVFP4, MXFP8 = "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized"


def fp4(n, k, two_levels=False, whole=None):
    """Random codes; K may leave the last group unfinished."""
    made = {"weight_packed": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)}
    if two_levels:
        scales = torch.randint(1, 127, (n, -(-k // 16)), dtype=torch.uint8)
        scales[0, :2] = torch.tensor([0, 129])  # 0, and a negative one
        whole = torch.rand(1) * 1000 + 300 if whole is None else torch.tensor([whole])
        made |= {"weight_scale": scales.view(E4M3), "weight_global_scale": whole}
    else:
        made["weight_scale"] = torch.randint(110, 130, (n, -(-k // 32)), dtype=torch.uint8)
        made["weight_scale"][0, 0] = 0  # 2**-127
    return made, fp4_weight(made)


def mxfp8(n, k):
    made, _ = floats(n, k, (n, -(-k // 32)), block=(1, 32))
    exponents = torch.randint(110, 130, (n, -(-k // 32)), dtype=torch.uint8)
    values = torch.tensor([[2.0 ** (e - 127) for e in row] for row in exponents.tolist()])
    return {**made, "weight_scale": exponents}, plain_weight({**made, "weight_scale": values}, (1, 32))


SMALL = {MXFP4: fp4, NVFP4: lambda n, k: fp4(n, k, True), MXFP8: mxfp8}


@pytest.mark.parametrize("form", SMALL)
def test_small_floats(form, tmp_path):
    expected = folder_of(tmp_path, small(form), SMALL[form])
    model = lowbit.load(tmp_path)
    assert equal(model, expected)
    x, largest = torch.randn(3, 40), float(expected[UP].abs().max())
    assert torch.allclose(model.get_submodule(UP)(x), x @ expected[UP].t(), rtol=1e-4, atol=1e-4 * largest)


def test_packers_of_small_floats(tmp_path):
    """Random layers, by compressed-tensors' own packers: what they decode is rounded to bfloat16."""
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for form in (MXFP4, NVFP4, MXFP8):
        section = small(form, **({"scale_dtype": "torch.uint8"} if form == MXFP8 else {}))
        weights = section["config_groups"]["group_0"]["weights"]
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor, size = BaseCompressor.get_value_from_registry(form), weights["group_size"]

        def make(n, k, form=form, scheme=scheme, compressor=compressor, size=size):
            w = torch.randn(n, k)
            top = w.view(n, k // size, size).abs().amax(-1)
            if form == NVFP4:
                whole = 2688 / w.abs().max().reshape(1)
                state = {"weight_scale": (top / 6 * whole).to(E4M3).float(), "weight_global_scale": whole}
            else:
                state = {"weight_scale": torch.exp2(torch.log2(top).ceil() - (8 if form == MXFP8 else 2))}
            made = compressor.compress({"weight": w, **state}, scheme)
            return made, compressor.decompress(made, scheme)["weight"]

        config = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
        expected = folder_of(tmp_path / form, section, make, config)
        model = lowbit.load(tmp_path / form)
        assert all(torch.equal(model.get_submodule(layer).dequantize(torch.float32).bfloat16(), weight.bfloat16())
                   for layer, weight in expected.items()), form  # fmt: skip


FP4_CHANGES = {
    "a scale of NaN": (NVFP4, put("weight_scale", nan_at(0, 0x7F)), ("weight_scale", "must be finite")),
    "a global scale of 0": (NVFP4, put("weight_global_scale", lambda t: t * 0), ("global_scale", "must be finite")),
    "a global scale of NaN": (NVFP4, put("weight_global_scale", lambda t: t / 0 * 0), ("weight_global_scale",)),
    "two global scales": (NVFP4, put("weight_global_scale", lambda t: torch.cat([t, t])), ("must be (1,) or ()",)),
    "no global scale": (NVFP4, lambda t: t.pop(f"{UP}.weight_global_scale"), ("weight_global_scale' is missing",)),
    "a global scale too many": (MXFP4, lambda t: t.update({f"{UP}.weight_global_scale": torch.ones(1)}),
                                ("weight_global_scale",)),
    "an exponent of NaN": (MXFP4, put("weight_scale", lambda t: t | 255), ("weight_scale", "exponent 255")),
    "scales in float": (MXFP4, put("weight_scale", lambda t: t.float()), ("weight_scale", "dtype must be torch.uint8")),
    "scales of the other": (NVFP4, put("weight_scale", lambda t: t.view(torch.uint8)), ("dtype must be torch.float8",)),
    "codes in int8": (MXFP4, put("weight_packed", lambda t: t.view(torch.int8)), ("weight_packed", "torch.uint8")),
    "codes of half the width": (MXFP4, put("weight_packed", lambda t: t[:, :10]), ("weight_packed", "(56, 20)")),
}  # fmt: skip
FP4_CONFIGS = {
    "another group": (small(NVFP4, group_size=32), ("group_size must be 16", "got 32")),
    "another strategy": (small(MXFP4, strategy="channel"), ("strategy must be 'group' or 'tensor_group'",)),
    "8 bits": (small(MXFP4, num_bits=8), ("num_bits must be 4", "got 8")),
    "integers": (small(MXFP4, type="int"), ("type must be 'float'",)),
    "not symmetric": (small(NVFP4, symmetric=False), ("symmetric must be true",)),
}


@pytest.mark.parametrize("name", [*FP4_CHANGES, *FP4_CONFIGS])
def test_malformed_small_floats(name, tmp_path):
    form, change, words = FP4_CHANGES.get(name) or (MXFP4, None, FP4_CONFIGS[name][1])
    folder_of(tmp_path / "model", small(form), SMALL[form], only="up_proj")
    if change is None:
        configure(tmp_path / "model", quantization_config=FP4_CONFIGS[name][0])
    else:
        rewrite(tmp_path / "model", change)
    refused(tmp_path / "model", str(tmp_path), *words)


# ---------------------------------------------------------------------------------------------------------- modelopt


def modelopt(algorithm, **more):
    size = 16 if "NVFP4" in algorithm else None
    return {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": size, **more}


def nvfp4(n, k):
    made, _ = fp4(n, k, True)
    made = {"weight": made["weight_packed"], "weight_scale": made["weight_scale"],
            "weight_scale_2": torch.rand(()) / 1000}  # fmt: skip
    return {**made, "input_scale": torch.tensor(0.5)}, fp4_weight(made)


def blocks_of_128(n, k):
    made, weight = floats(n, k, (-(-n // 128), -(-k // 128)), block=(128, 128))
    return {**made, "weight_scale": made["weight_scale"][:, None, :, None]}, weight


def by_row(n, k):
    made, _ = floats(n, k, (n, 1))
    return {**made, "weight_scale": made["weight_scale"].flatten()}, plain_weight(made)


MODELOPT = {
    "NVFP4": nvfp4, "W4A16_NVFP4": nvfp4, "FP8": floats, "FP8_PER_CHANNEL_PER_TOKEN": by_row,
    "FP8_PB_WO": blocks_of_128, "MXFP8": mxfp8, "MIXED_PRECISION": lambda n, k: (nvfp4 if n == 40 else floats)(n, k),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", MODELOPT)
def test_modelopt(algorithm, tmp_path):
    expected = folder_of(tmp_path, {}, MODELOPT[algorithm], {"intermediate_size": 136})
    if algorithm == "FP8":  # by the file of its own, and with scales of a cache
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
        keys = "model.layers.0.self_attn.k_proj"
        rewrite(tmp_path, lambda t: t.update({f"{keys}.k_scale": torch.ones(())}))
    else:
        configure(tmp_path, quantization_config=modelopt(algorithm))
    model = lowbit.load(tmp_path)
    assert equal(model, expected)
    notes = [model.get_submodule(layer).note or "" for layer in expected]
    assert all(("x stays float" in note) == (algorithm != "W4A16_NVFP4") for note in notes)
    assert sum("the cache of keys and values stays float" in note for note in notes) == (algorithm == "FP8")


MODELOPT_CHANGES = {
    "no second scale": (lambda t: t.pop(f"{UP}.weight_scale_2"), {}, ("weight_scale_2' is missing",)),
    "a second scale of infinity": (put("weight_scale_2", lambda t: t / 0), {}, ("weight_scale_2", "must be finite")),
    "second scales": (put("weight_scale_2", lambda t: torch.ones(56)), {}, ("weight_scale_2", "() or (1,)")),
    "scales in float": (put("weight_scale", lambda t: t.float()), {}, ("weight_scale", "dtype must be torch.float8")),
    "half of the codes": (put("weight", lambda t: t[:, :10]), {}, (f"{UP}.weight", "(56, 20)")),
    "codes in int8": (put("weight", lambda t: t.view(torch.int8)), {}, (f"{UP}.weight_scale_2",)),
    "a scale of the input's columns": (lambda t: t.update({f"{UP}.pre_quant_scale": torch.ones(40)}), {},
                                       (f"{UP}.pre_quant_scale",)),
    "AWQ": (lambda t: None, {"quant_algo": "NVFP4_AWQ"}, ("quant_algo must be 'NVFP4' or", "NVFP4_AWQ")),
    "no algorithm": (lambda t: None, {"quant_algo": None}, ("quant_algo must be", "got None")),
    "another group": (lambda t: None, {"group_size": 32}, ("group_size must be 16", "got 32")),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELOPT_CHANGES)
def test_malformed_modelopt(name, tmp_path):
    change, section, words = MODELOPT_CHANGES[name]
    folder_of(tmp_path / "model", {**modelopt("NVFP4"), **section}, nvfp4, only="up_proj")
    rewrite(tmp_path / "model", change)
    refused(tmp_path / "model", str(tmp_path), *words)


# ----------------------------------------------------------------------------------------------------------- gpt-oss

PLACE = "model.layers.0.mlp.experts"


def test_gpt_oss(tmp_path):
    source = FIXTURES / "mxfp4" / "model"
    model, tensors = lowbit.load(source), load_file(source / "model.safetensors")
    expected = load_file(FIXTURES / "mxfp4" / "expected.safetensors")
    assert len(expected) == 2
    for name, weight in expected.items():
        layer, blocks, scales = model.get_submodule(name), tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        found = layer.dequantize(torch.float32)
        assert isinstance(layer, lowbit.CodebookExperts) and torch.equal(found, weight.float())
        for e in range(2):
            assert torch.equal(found[e], fp4_weight({"weight_packed": blocks[e].flatten(1), "weight_scale": scales[e]}))
        assert layer.format.nbytes <= 1.1 * (blocks.numel() + scales.numel()) + 64
    lowbit.convert_folder(source, tmp_path / "packed")
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)
    config = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    wanted, found = theirs(IDS).logits, model.float()(IDS).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def put_expert(leaf, value):
    return lambda tensors: tensors.update({f"{PLACE}.down_proj_{leaf}": value(tensors[f"{PLACE}.down_proj_{leaf}"])})


GPT_OSS = {
    "no scales": (lambda t: t.pop(f"{PLACE}.down_proj_scales"), ("down_proj_scales' is missing",)),
    "no blocks": (lambda t: t.pop(f"{PLACE}.down_proj_blocks"), ("down_proj_scales",)),
    "another expert": (put_expert("blocks", lambda t: torch.cat([t, t])), ("shape must be (2, 32, 2, 16)", "(4, 32,")),
    "a scale of NaN": (put_expert("scales", lambda t: t | 255), ("down_proj_scales', expert 0", "exponent 255")),
    "blocks of int8": (put_expert("blocks", lambda t: t.view(torch.int8)), ("dtype must be torch.uint8",)),
    "flat blocks": (put_expert("blocks", lambda t: t.flatten(2)), ("shape must have 4 sizes",)),
    "a weight beside them": (lambda t: t.update({f"{PLACE}.down_proj": torch.ones(2, 64, 32)}), ("beside its codes",)),
    "no bias": (lambda t: t.pop(f"{PLACE}.down_proj_bias"), ("down_proj_bias",)),
    "of no module": (lambda t: t.update({n.replace("down", "x"): tensor for n, tensor in list(t.items())}),
                     ("x_proj", "belongs to no module of GptOssForCausalLM")),
}  # fmt: skip


@pytest.mark.parametrize("name", GPT_OSS)
def test_malformed_gpt_oss(name, tmp_path):
    folder = shutil.copytree(FIXTURES / "mxfp4" / "model", tmp_path / "model")
    change, words = GPT_OSS[name]
    rewrite(folder, change)
    refused(folder, str(folder), *words)


# ------------------------------------------------------------------------------------------------- tied embeddings

TIED = {
    "fp8": (fp8((16, 16)), lambda n, k: floats(n, k, (-(-n // 16), -(-k // 16)), "weight_scale_inv", block=(16, 16))),
    "nvfp4": (modelopt("NVFP4"), nvfp4),
    "int8": (compressed("int-quantized", "int", "channel", inputs=inputs()), integers),
    "int8, static": (compressed("int-quantized", "int", "channel", inputs=inputs(dynamic=False)),
                     lambda n, k: (integers(n, k)[0] | {"input_scale": torch.tensor([0.25])}, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_shares_the_embedding(name, tmp_path):
    """Where the config asks for int8 activations, the head has them."""
    section, make = TIED[name]
    if "config_groups" in section:
        section["config_groups"]["group_0"]["targets"] = ["re:.*embed_tokens"]
    expected = folder_of(tmp_path, section, make, {"tie_word_embeddings": True}, only="embed_tokens")
    model = lowbit.load(tmp_path)
    head, embedding = model.lm_head, model.model.embed_tokens
    found = embedding.dequantize(torch.float32)
    assert expected["model.embed_tokens"] is None or torch.equal(found, expected["model.embed_tokens"])
    assert torch.equal(head.dequantize(torch.float32), found) and torch.equal(embedding(IDS), found[IDS])
    assert head.packed.data_ptr() == embedding.packed.data_ptr()
    wanted = {"int8": "int8", "int8, static": "int8_static"}.get(name, "float")
    assert (head.format.activations, embedding.format.activations) == (wanted, "float")
    assert torch.isfinite(model(IDS).logits).all() and (wanted != "int8_static" or head.x_scale == 0.25)


# ------------------------------------------------------------------------------------------------------- of experts


EXPERTS = {
    "fp8": (fp8(), lambda n, k: floats(n, k, (n // 16, k // 16), "weight_scale_inv", block=(16, 16))),
    "by tensor": (compressed("float-quantized", "float", "tensor"), floats),
    "int8": (compressed("int-quantized", "int", "channel", inputs=inputs()), integers),
    "mxfp4": (small(MXFP4), fp4),
    "modelopt": (modelopt("NVFP4"), nvfp4),
    "nvfp4": (small(NVFP4), lambda n, k: fp4(n, k, True)),
    "int8 by tensor": (compressed("int-quantized", "int", "tensor"), lambda n, k: integers(n, k, "tensor")),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tmp_path):
    check_experts(tmp_path, *EXPERTS[name], IDS)


@pytest.mark.parametrize(
    ("section", "make", "scales"),
    [
        (modelopt("NVFP4"), nvfp4, "nested"), (small(NVFP4), lambda n, k: fp4(n, k, True), "float32"),
        (small(NVFP4), lambda n, k: fp4(n, k, True, 512.0), "nested"),
    ],
    ids=["products", "quotients", "quotients that are products"],
)  # fmt: skip
def test_experts_with_scales_of_two_levels(section, make, scales, tmp_path):
    """A stack has one table, and for each expert whole blocks of scales: each has a factor of its own."""
    plain = mixture(hidden_size=64)
    expected = folder_of(tmp_path / "model", section, make, only=".experts.", model=plain)
    model = lowbit.load(tmp_path / "model")
    check_mixture(model, plain, expected, IDS)
    for stack in (model.model.layers[0].mlp.experts.gate_up_proj, model.model.layers[0].mlp.experts.down_proj):
        assert stack.format.scales == scales
        assert all(torch.equal(stack.expert(e).dequantize(), stack.dequantize()[e]) for e in range(3))
    native = 9 * 64 * 64 * (1 / 2 + 1 / 16)
    layers = [m for m in model.modules() if isinstance(m, lowbit.CodebookExperts)]
    stored = sum(layer.format.nbytes for layer in layers)
    assert (stored <= 1.01 * native + 2 * 4 * (16 + 256 + 1)) == (scales == "nested")
    lowbit.convert_folder(tmp_path / "model", tmp_path / "packed")
    again = lowbit.load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("same", [True, False])
def test_experts_with_static_activations(same, tmp_path):
    """One scale of all inputs is held; several are not, and x stays float."""
    number = iter(range(1, 100))

    def make(n, k):
        made, weight = integers(n, k)
        return {**made, "input_scale": torch.tensor([0.5 if same else 0.5 * next(number)])}, weight

    section, plain = compressed("int-quantized", "int", "channel", inputs=inputs(dynamic=False)), mixture()
    expected = folder_of(tmp_path, section, make, only=".experts.", model=plain)
    model = lowbit.load(tmp_path)
    check_mixture(model, plain, expected, IDS)
    stack = model.model.layers[0].mlp.experts.down_proj
    assert stack.format.activations == ("int8_static" if same else "float")
    assert stack.x_scale == 0.5 if same else "x stays float" in stack.note
