"""Folders in foreign formats: what is stored is kept bit for bit, and what is not as the format says is refused.

fixtures/foreign/ holds folders that GPTQModel and compressed-tensors packed, with their own dequantized weights. The
decoders and packers here are loops over one integer per row, and know nothing of lowbit.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowbit
from lowbit.checkpoint import foreign
from lowbit.cli.command import main
from lowbit.model.foreign import IMPORTED
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.testing.foreign_folders import (
    CONFIG,
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
NAMES = sorted(
    folder.parent.name for folder in FIXTURES.glob("*/model") if re.fullmatch("awq.*|.*-[2-8]bit", folder.parent.name)
)
LEAVES = ("qweight", "qzeros", "scales", "g_idx")
PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
UP = "model.layers.0.mlp.up_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


# ------------------------------------------------------------------------------------------- the formats, as loops


def fields(words, bits, count):
    """The first ``count`` fields of a list of 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(count)]


def words_of(values, bits):
    """The inverse, as signed integers."""
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    found = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def weight_of(codes, zeros, scales, size):
    """``(code - zero) * scale`` in float32, of lists [N][K] and [G][N], and scales [G, N]."""
    scales = scales.float()
    rows = [[float(code - zeros[k // size][n]) for k, code in enumerate(row)] for n, row in enumerate(codes)]
    factors = torch.stack([scales[k // size] for k in range(len(codes[0]))], 1)
    return torch.tensor(rows) * factors


def gptq_weight(t, bits, size, zero_of):
    """``g_idx`` has the group of each column."""
    k, n = len(t["g_idx"]) if "g_idx" in t else len(t["qweight"]) * 32 // bits, t["scales"].shape[1]
    size = k if size == -1 else size
    codes = [fields(column, bits, k) for column in t["qweight"].t().tolist()]
    groups = t["g_idx"].tolist() if "g_idx" in t else [j // size for j in range(k)]
    zeros = [zero_of(row, n) for row in t["qzeros"].tolist()]
    return weight_of(codes, [zeros[g] for g in groups], t["scales"][groups], 1)


def awq_weight(t, size):
    def by_row(words):
        return [fields([words[n // 8]], 4, 8)[AWQ_ORDER.index(n % 8)] for n in range(8 * len(words))]

    columns = [by_row(words) for words in t["qweight"].tolist()]
    codes = [list(row) for row in zip(*columns, strict=True)]
    return weight_of(codes, [by_row(words) for words in t["qzeros"].tolist()], t["scales"], size)


def unpacked(words, bits, count, is_dense=True):
    """The fields of words that are one stream, or of which each begins with a field."""
    if is_dense:
        return fields(words, bits, count)
    return [fields([words[i // (32 // bits)]], bits, 32 // bits)[i % (32 // bits)] for i in range(count)]


def packed_weight(t, bits, size, is_dense=True):
    n, k = t["weight_shape"].tolist()
    codes = [unpacked(row, bits, k, is_dense) for row in t["weight_packed"].tolist()]
    scales = t["weight_scale"].reshape(-1, t["weight_scale"].shape[-1]).expand(n, -1).t()
    zeros = [[2 ** (bits - 1)] * n] * len(scales)
    if "weight_zero_point" in t:
        zeros = [unpacked(column, bits, n, is_dense) for column in t["weight_zero_point"].t().tolist()]
    return weight_of(codes, zeros, scales, k if size == -1 else size)


def v2(bits):
    return lambda words, n: fields(words, bits, n)


def v1(bits):
    return lambda words, n: [field + 1 for field in fields(words, bits, n)]


def v1_of_gptqmodel(bits):
    """Whole words of ones were subtracted; at 3 bits one from each field."""
    if bits == 3:
        return lambda words, n: [(field + 1) % 8 for field in fields(words, 3, n)]
    ones = sum(1 << i for i in range(0, 32, bits))
    return lambda words, n: fields([(word + ones) & 0xFFFFFFFF for word in words], bits, n)


# -------------------------------------------------------------------------------------------- what others wrote


def parts(tensors, layer):
    return {leaf: tensors[f"{layer}.{leaf}"] for leaf in (*LEAVES, *PACKED) if f"{layer}.{leaf}" in tensors}


@pytest.mark.parametrize("name", NAMES)
def test_what_others_wrote(name, tmp_path):
    source = FIXTURES / name / "model"
    model, tensors = lowbit.load(source), load_file(source / "model.safetensors")
    section = json.loads((source / "config.json").read_text())["quantization_config"]
    if name.startswith("compressed"):
        weights = section["config_groups"]["group_0"]["weights"]
        section = {"bits": weights["num_bits"], "group_size": weights.get("group_size", -1)}
    bits, size = section["bits"], section["group_size"]
    for layer, expected in load_file(FIXTURES / name / "expected.safetensors").items():
        found = model.get_submodule(layer).dequantize(torch.float32)
        assert torch.equal(found, expected)
        if name.startswith("awq"):
            mine = awq_weight(parts(tensors, layer), size)
        elif name.startswith("compressed"):
            mine = packed_weight(parts(tensors, layer), bits, size)
        else:
            is_raw = "v2" in name or section.get("packing_format") == "auto_round"
            zero_of = v2(bits) if is_raw else v1_of_gptqmodel(bits) if name.startswith("gptq") else v1(bits)
            mine = gptq_weight(parts(tensors, layer), bits, size, zero_of)
        assert torch.equal(found, mine)
    packed = [n for n, module in model.named_modules() if isinstance(module, lowbit.PackedLinear)]
    assert len(packed) == 7
    assert all(torch.equal(tensors[n], t) for n, t in model.state_dict().items() if "proj" not in n)
    lowbit.convert_folder(source, tmp_path / "packed")
    again = lowbit.load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert model(IDS).logits.dtype == (torch.bfloat16 if name.startswith("auto") else torch.float16)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(auto(IDS).logits, model(IDS).logits)


def test_the_package_reads_what_it_says():
    assert sorted(foreign.importers) == sorted(IMPORTED)
    assert len(NAMES) == 13


# ------------------------------------------------------------------------------------------ folders that are made here


def layer_tensors(n, k, bits, size, awq=False, zero=None, minus=1, order=None):
    """Random tensors of one layer, and the weight that they are; ``order``: its columns are these of one in groups."""
    size = k if size == -1 else size
    groups, top = -(-k // size), 2**bits - 1
    codes = torch.randint(0, top + 1, (n, k)).tolist()
    zeros = torch.randint(1, top + 1, (groups, n)).tolist() if zero is None else [[zero] * n] * groups
    scales = (torch.rand(groups, n) / 8 + 0.01).half()
    if awq:
        def pack(values):
            return [words_of([values[j + i] for i in AWQ_ORDER], 4)[0] for j in range(0, len(values), 8)]

        columns = [pack([row[j] for row in codes]) for j in range(k)]
        stored = {"qweight": columns, "qzeros": [pack(row) for row in zeros]}
    else:
        rows = [words_of(row, bits) for row in codes]
        stored = {"qweight": list(map(list, zip(*rows, strict=True))),
                  "qzeros": [words_of([z - minus for z in row], bits) for row in zeros],
                  "g_idx": [j // size for j in range(k)]}  # fmt: skip
    weight = weight_of(codes, zeros, scales, size)
    if order is not None:
        rows = [words_of([row[j] for j in order], bits) for row in codes]
        stored |= {"qweight": list(map(list, zip(*rows, strict=True))), "g_idx": [j // size for j in order]}
        weight = weight[:, order]
    made = {name: torch.tensor(values, dtype=torch.int32) for name, values in stored.items()}
    return {**made, "scales": scales}, weight


def gptq_section(bits=4, size=16, **more):
    section = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": False}
    return {**section, **more}


@pytest.mark.parametrize(
    ("bits", "size", "more"),
    [
        (2, 16, {}), (3, 24, {"checkpoint_format": "gptq_v2"}), (4, -1, {"format": "gptq"}), (8, 1000, {}),
        (4, 1, {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}),
    ],
)  # fmt: skip
def test_sizes_that_fill_no_words(bits, size, more, tmp_path):
    """K = 40 and 56 leave words and groups unfinished; a group size above K is one group."""
    minus = 0 if "gptq_v2" in more.values() else 1
    real = -1 if size == 1000 else size
    expected = folder_of(tmp_path, gptq_section(bits, size, **more),
                         lambda n, k: layer_tensors(n, k, bits, real, minus=minus))  # fmt: skip
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{UP}.g_idx"))
    model = lowbit.load(tmp_path)
    assert equal(model, expected)
    formats = {model.get_submodule(name).format.zeros for name in expected}
    assert formats == {"int"}


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 8), (4, 24), (8, 1), (4, -1)])
def test_act_order(bits, size, tmp_path):
    """Columns in any order: the weight is the file's, whose codes are held group after group."""
    expected = folder_of(
        tmp_path / "gptq", gptq_section(bits, size, desc_act=True),
        lambda n, k: layer_tensors(n, k, bits, size, order=torch.randperm(k).tolist()),
    )  # fmt: skip
    model = lowbit.load(tmp_path / "gptq")
    assert equal(model, expected)
    formats = [model.get_submodule(name).format for name in expected]
    assert {format.act_order for format in formats} == {size != -1}  # one group is in order
    plain = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    plain.load_state_dict({**model.state_dict(), **{f"{n}.weight": w for n, w in expected.items()}}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model.float()(IDS).logits, plain.float()(IDS).logits, rtol=1e-4, atol=1e-4)
    lowbit.convert_folder(tmp_path / "gptq", tmp_path / "packed")
    logits = lowbit.load(tmp_path / "gptq")(IDS).logits
    for load in (lowbit.load, transformers.AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path / "packed")
        assert equal(again, expected) and torch.equal(again(IDS).logits, logits)


def auto_round(packing, **more):
    section = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 16, "data_type": "int"}
    return {**section, **more}


PACKINGS = {"auto_round": dict(minus=0), "auto_round:exllamav2": dict(minus=0), "auto_round:auto_gptq": dict(minus=1),
            "auto_round:gptq": dict(minus=1), "auto_round:auto_awq": dict(awq=True)}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
def test_auto_round(packing, tmp_path):
    expected = folder_of(tmp_path, auto_round(packing), lambda n, k: layer_tensors(n, k, 4, 16, **PACKINGS[packing]))
    if "awq" not in packing:
        rewrite(tmp_path, lambda tensors: [tensors.pop(f"{layer}.g_idx") for layer in expected])
    assert equal(lowbit.load(tmp_path), expected)


def test_auto_rounds_own_sizes(tmp_path):
    """A name counts before patterns, of these the first; a pattern that is none counts for nothing."""
    extra = {".*up.*": {"bits": 7}, "(": {"bits": 3}, UP: {"bits": 6, "group_size": 8}, "down": {"group_size": -1},
             r"\.mlp\.": {"bits": 2}, "lm_head": {"bits": 16}}  # fmt: skip
    sizes = {"up_proj": (6, 8), "down_proj": (4, -1), "gate_proj": (2, 16), "q_proj": (4, 16)}
    for layer, (bits, size) in sizes.items():
        folder = tmp_path / layer
        expected = folder_of(folder, auto_round("auto_round", extra_config=extra),
                             lambda n, k, b=bits, s=size: layer_tensors(n, k, b, s, minus=0), only=layer)  # fmt: skip
        assert equal(lowbit.load(folder), expected)
    expected = folder_of(tmp_path / "awq", auto_round("auto_round:awq", extra_config={UP: {"group_size": 8}}),
                         lambda n, k: layer_tensors(n, k, 4, 8, awq=True), only="up_proj")  # fmt: skip
    assert equal(lowbit.load(tmp_path / "awq"), expected)


@pytest.mark.parametrize("size", [8, 40, -1])
def test_awq(size, tmp_path):
    section = {"quant_method": "awq", "w_bit": 4, "q_group_size": size, "zero_point": True, "version": "GEMM"}
    expected = folder_of(tmp_path, section, lambda n, k: layer_tensors(n, k, 4, size, awq=True))
    assert equal(lowbit.load(tmp_path), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_zeros_of_two_to_the_bits(bits, tmp_path):
    """A stored field of ``2**b - 1`` is a zero of ``2**b``: not 0, and nothing runs over into the next field."""

    def make(n, k):
        made, _ = layer_tensors(n, k, bits, 8)
        zeros = torch.randint(0, 2**bits, (-(-k // 8), n)).tolist()
        zeros[0][:4] = [2**bits - 1, 0, 2**bits - 1, 2**bits - 1]
        made["qzeros"] = torch.tensor([words_of(row, bits) for row in zeros], dtype=torch.int32)
        return made, gptq_weight(made, bits, 8, v1(bits))

    expected = folder_of(tmp_path, gptq_section(bits, 8), make, only="up_proj")
    model = lowbit.load(tmp_path)
    assert equal(model, expected)
    layer = model.get_submodule(UP)
    assert layer.zeros.max() == 2**bits and layer.zeros.dtype == torch.float16
    assert f"read as {2**bits}" in layer.note


def test_zeros_in_the_middle_are_symmetric(tmp_path):
    expected = folder_of(tmp_path, gptq_section(3), lambda n, k: layer_tensors(n, k, 3, 16, zero=4), only="up_proj")
    model = lowbit.load(tmp_path)
    assert equal(model, expected) and model.get_submodule(UP).zeros is None


def test_layers_of_their_own_sizes(tmp_path):
    """GPTQModel's ``dynamic``: the first pattern that matches counts; one with a minus was not quantized."""
    sizes = {"up_proj": (8, 8), "down_proj": (3, -1)}
    dynamic = {
        r"+:.*\.up_proj": {"bits": 8, "group_size": 8}, r"-:.*gate.*": {}, ".*down": {"bits": 3, "group_size": -1},
        ".*up.*": {"bits": 2},
    }  # fmt: skip
    for layer, (bits, size) in sizes.items():
        folder = tmp_path / layer
        expected = folder_of(folder, gptq_section(dynamic=dynamic),
                             lambda n, k, b=bits, s=size: layer_tensors(n, k, b, s), only=layer)  # fmt: skip
        assert equal(lowbit.load(folder), expected)


def test_a_quantized_head_and_a_bias(tmp_path):
    config = {"attention_bias": True, "mlp_bias": False}
    section = gptq_section(lm_head=True)
    expected = folder_of(tmp_path, section, lambda n, k: layer_tensors(n, k, 4, 16), config, only="lm_head")
    assert equal(lowbit.load(tmp_path), expected)
    query = "model.layers.0.self_attn.q_proj"
    shutil.rmtree(tmp_path)
    expected = folder_of(tmp_path, gptq_section(), lambda n, k: layer_tensors(n, k, 4, 16), config)
    bias = torch.randn(40)
    rewrite(tmp_path, lambda t: t.update({f"{query}.bias": bias, f"{UP}.bias": torch.zeros(56)}))
    model = lowbit.load(tmp_path)
    assert equal(model, expected) and torch.equal(model.get_submodule(query).bias, bias)
    assert model.get_submodule(UP).bias is None  # some writers store zeros where there is none
    rewrite(tmp_path, lambda t: t.update({f"{UP}.bias": torch.ones(56)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*up_proj\.bias': must be zero"):
        lowbit.load(tmp_path)
    rewrite(tmp_path, lambda t: (t.pop(f"{UP}.bias"), t.pop(f"{query}.bias")))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*q_proj\.bias' is missing"):
        lowbit.load(tmp_path)


def test_a_transposed_module(tmp_path):
    """GPT-2's Conv1D keeps its weight as [K, N]; the format does not."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    name, expected = "transformer.h.0.attn.c_attn", {}

    def change(tensors):
        k, n = tensors.pop(f"{name}.weight").shape
        made, expected[name] = layer_tensors(n, k, 4, 16)
        tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in made.items()})

    rewrite(tmp_path, change)
    configure(tmp_path, quantization_config=gptq_section())
    model = lowbit.load(tmp_path)
    assert expected[name].shape == (96, 32) and equal(model, expected)
    assert torch.isfinite(model(IDS).logits).all()


def put(leaf, value):
    return lambda tensors: tensors.update({f"{UP}.{leaf}": value(tensors[f"{UP}.{leaf}"])})


def swapped(index):
    return torch.cat([index[20:], index[:20]])


# ---------------------------------------------------------------------------------------------- compressed-tensors


def group(bits, size=16, strategy="group", symmetric=True, targets=("Linear",), **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size}
    return {"targets": list(targets), "weights": weights, "input_activations": None, **more}


def packed_section(*groups, **more):
    named = {f"group_{i}": one for i, one in enumerate(groups)}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named}
    return {**section, "version": "0.20.1", **more}


def packed_tensors(n, k, bits, strategy="group", symmetric=True, is_dense=True, size=16):
    """Random words, of which the loops above say what they are."""

    def width(count):
        return -(-count * bits // 32) if is_dense else -(-count // (32 // bits))

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)

    groups = -(-k // size) if strategy == "group" else 1
    scales = (torch.rand((1,) if strategy == "tensor" else (n, groups)) / 8).bfloat16()
    made = {"weight_packed": words(n, width(k)), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
    if not symmetric:
        made["weight_zero_point"] = words(width(n), groups)
    return made, packed_weight(made, bits, size if strategy == "group" else -1, is_dense)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_by_compressed_tensors(bits, tmp_path):
    """By group, channel and tensor; dense words, and padded ones where they are others."""
    cases = [("group", True), ("group", False), ("channel", False), ("tensor", True)]
    for i, (strategy, symmetric) in enumerate(cases):
        is_dense = i % 2 == 0
        folder = tmp_path / strategy / str(symmetric)
        section = packed_section(group(bits, 16, strategy, symmetric), version="0.19.0" if is_dense else "0.17.1")
        expected = folder_of(folder, section, lambda n, k, s=strategy, y=symmetric, d=is_dense:
                             packed_tensors(n, k, bits, s, y, d))  # fmt: skip
        assert equal(lowbit.load(folder), expected), (strategy, symmetric)


def test_groups_of_a_config(tmp_path):
    """A name counts before a pattern, a pattern before the class."""
    groups = [group(4), group(8, targets=["re:.*up_proj"]), group(2, targets=["model.layers.0.mlp.down_proj"]),
              group(3, targets=["re:.*down_proj", "lm_head"])]  # fmt: skip
    for layer, bits in (("gate_proj", 4), ("up_proj", 8), ("down_proj", 2), ("lm_head", 3)):
        folder = tmp_path / layer
        expected = folder_of(folder, packed_section(*groups), lambda n, k, b=bits: packed_tensors(n, k, b), only=layer)
        assert equal(lowbit.load(folder), expected)
    configure(folder, quantization_config=packed_section(*groups[1:3]))
    with pytest.raises(ValueError, match=r"config_groups must target the layer 'lm_head'"):
        lowbit.load(folder)


def test_compressed_tensors_own_packer(tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def make(n, k, bits, symmetric, size):
        half = 2 ** (bits - 1)
        scales = (torch.rand(n, -(-k // size)) / 8 + 0.01).bfloat16().float()
        zeros = torch.zeros_like(scales) if symmetric else torch.randint(-half, half, scales.shape)
        codes, index = torch.randint(-half, half, (n, k)), torch.arange(k) // size
        weight = (codes - zeros[:, index]) * scales[:, index]
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=size)
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
        made = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        return made, weight

    for bits, symmetric in ((2, True), (3, False), (4, False), (6, True), (8, False)):
        folder = tmp_path / f"{bits}{symmetric}"
        section = packed_section(group(bits, 8, symmetric=symmetric))
        expected = folder_of(folder, section, lambda n, k, b=bits, s=symmetric: make(n, k, b, s, 8))
        assert equal(lowbit.load(folder), expected)


WEIGHTS = group(4)["weights"]
PACKED_CHANGES = {
    "codes of another width": (put("weight_packed", lambda t: t[:, :3]), ("weight_packed", "shape must be (56, 5)")),
    "codes of fewer rows": (put("weight_packed", lambda t: t[:7]), ("weight_packed", "got (7, 5)")),
    "codes in uint8": (put("weight_packed", lambda t: t.byte()), ("weight_packed", "dtype must be torch.int32")),
    "no scales": (lambda t: t.pop(f"{UP}.weight_scale"), (f"'{UP}.weight_scale' is missing",)),
    "scales of one group": (put("weight_scale", lambda t: t[:, :1]), ("weight_scale", "shape must be (56, 3)")),
    "scales of infinity": (put("weight_scale", lambda t: t / 0), (UP, "scales must be finite")),
    "another shape": (put("weight_shape", lambda t: t.flip(0)), ("weight_shape", "[N, K] = [56, 40]: got [40, 56]")),
    "zeros of a symmetric one": (lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(56, 3, dtype=torch.int8)}),
                                 ("weight_zero_point", "must be zero", "symmetric=true")),
    "groups of other sizes": (lambda t: t.update({f"{UP}.weight_g_idx": swapped(torch.arange(40) // 20)}),
                              ("weight_g_idx", repr(UP), "each group must have 16 columns", "[20, 20, 0]")),
    "g_idx too large": (lambda t: t.update({f"{UP}.weight_g_idx": torch.arange(40)}), ("weight_g_idx", "[0, 3)")),
    "a global scale": (lambda t: t.update({f"{UP}.weight_global_scale": torch.ones(1)}), ("weight_global_scale",)),
}  # fmt: skip
PACKED_CONFIGS = {
    "no groups": (dict(config_groups={}), ("config_groups must be an object",)),
    "marlin": (dict(format="marlin-24"), ("format must be 'pack-quantized' or", UP.replace("up", "down"))),
    "floats": (dict(format="float-quantized"), ("type must be 'float' in 'float-quantized'",)),
    "not packed": (dict(format="int-quantized"), ("down_proj.weight' is missing",)),
    "another format of a group": (packed_section(group(4, format="nvfp4")), ("group_0: format must be",)),
    "activations": (packed_section(group(4, input_activations={"num_bits": 8})), ("input_scale' is missing",)),
    "activations of no fields": (packed_section(group(4, input_activations=8)), ("input_activations must be an",)),
    "output activations": (packed_section(group(4, output_activations={"num_bits": 8})), ("output_activations must",)),
    "9 bits": (packed_section(group(9)), ("num_bits must be 2 to 8", "got 9")),
    "float": (packed_section({**group(4), "weights": {**WEIGHTS, "type": "float"}}), ("type must be 'int'",)),
    "blocks": (packed_section(group(4, strategy="block")), ("strategy must be", "'block'")),
    "a zero for the tensor": (packed_section(group(4, strategy="tensor", symmetric=False)), ("symmetric must be",)),
    "asymmetric without zeros": (packed_section(group(4, symmetric=False)), ("weight_zero_point' is missing",)),
    "another width": (packed_section(group(8)), ("weight_packed", "shape must be (40, 14)", "num_bits=8")),
    "a strategy of no name": (packed_section(group(4, strategy={})), ("strategy must be", "got {}")),
    "an order that is missing": (packed_section({**group(4), "weights": {**WEIGHTS, "actorder": "group"}}),
                                 ("weight_g_idx' is missing", "actorder")),
    "no target": (packed_section(group(4, targets=["re:(("])), ("targets must be patterns",)),
    "a transform": (dict(transform_config={"config_groups": {"u": {}}}), ("transform_config must be empty",)),
    "a scheme of the cache": (dict(kv_cache_scheme="fp8"), ("kv_cache_scheme must be an object", "'fp8'")),
    "sparse": (dict(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config must be empty",)),
}


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    folder_of(folder, packed_section(group(4)), lambda n, k: packed_tensors(n, k, 4))
    return folder


@pytest.mark.parametrize("name", [*PACKED_CHANGES, *PACKED_CONFIGS])
def test_malformed_folders_of_compressed_tensors(name, packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    change, words = PACKED_CHANGES.get(name) or PACKED_CONFIGS[name]
    if name in PACKED_CHANGES:
        rewrite(folder, change)
    else:
        configure(folder, quantization_config={**packed_section(group(4)), **change})
    refused(folder, str(folder), *words)


def test_order_that_is_none_and_zeros_that_are_none(packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    more = {"weight_g_idx": torch.full((40,), -1), "weight_zero_point": torch.zeros(56, 3, dtype=torch.int8)}
    rewrite(folder, lambda t: t.update({f"{UP}.{leaf}": tensor for leaf, tensor in more.items()}))
    same = [model.get_submodule(UP).dequantize() for model in map(lowbit.load, (folder, packed_folder))]
    assert torch.equal(*same)


def test_scales_of_a_cache(packed_folder, tmp_path):
    """They are not read: the cache stays float, and the layers beside them say so. Without a scheme: refused."""
    folder = shutil.copytree(packed_folder, tmp_path / "model")
    rewrite(folder, lambda t: t.update({f"model.layers.0.self_attn.{n}_scale": torch.ones(1) for n in "kv"}))
    refused(folder, "model.layers.0.self_attn.k_scale")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    configure(folder, quantization_config={**packed_section(group(4)), "kv_cache_scheme": scheme})
    model, plain = lowbit.load(folder), lowbit.load(packed_folder)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert "cache of keys and values stays float" in model.get_submodule("model.layers.0.self_attn.k_proj").note
    assert model.get_submodule(UP).note is None


@pytest.mark.parametrize("symmetric", [False, True])
def test_act_order_of_compressed_tensors(symmetric, tmp_path):
    """The group of each column is the file's; codes stay where they are in it."""

    def ordered(n, k):
        groups = torch.arange(k)[torch.randperm(k)] // 16
        tensors, _ = packed_tensors(n, k, 4, symmetric=symmetric)
        codes = torch.tensor([fields(words, 4, k) for words in tensors["weight_packed"].tolist()])
        zeros = torch.full((n, 3), 8)
        if not symmetric:
            columns = tensors["weight_zero_point"].t()[: -(-k // 16)].tolist()
            zeros = torch.tensor([fields(words, 4, n) for words in columns]).t()
        weight = (codes - zeros[:, groups]).float() * tensors["weight_scale"].float()[:, groups]
        return {**tensors, "weight_g_idx": groups.int()}, weight

    section = packed_section(group(4, symmetric=symmetric, actorder="group"))
    expected = folder_of(tmp_path, section, ordered, only="up_proj")
    model = lowbit.load(tmp_path)
    assert equal(model, expected) and model.get_submodule(UP).format.act_order


@pytest.mark.parametrize("version", [None, "0.18.2", "main"])
def test_widths_that_two_layouts_have(version, tmp_path):
    """Of 56 columns at 3 bits, both layouts have 6 words; of 200, one has 19 and one 20: no version is asked for."""
    folder, section = tmp_path / "model", packed_section(group(3), version=version)
    folder_of(folder, section, lambda n, k: packed_tensors(n, k, 3), only="down_proj")
    refused(folder, "down_proj.weight_packed", "that of dense and of padded codes", f"got {version!r}")
    wide = {"intermediate_size": 200}
    for is_dense in (True, False):
        shutil.rmtree(folder)
        expected = folder_of(folder, section, lambda n, k, d=is_dense: packed_tensors(n, k, 3, is_dense=d), wide,
                             only="down_proj")  # fmt: skip
        assert equal(lowbit.load(folder), expected)


# ------------------------------------------------------------------------------------------------ the ways in


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "model"
    section = gptq_section()
    expected = folder_of(folder, section, lambda n, k: layer_tensors(n, k, 4, 16))
    (folder / "quantize_config.json").write_text(json.dumps(section))
    return folder, expected


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "model")


def test_the_rest_by_a_spec(written, tmp_path):
    source, expected = written
    lowbit.convert_folder(source, tmp_path / "packed", lowbit.Packed(bits=8), skip=["lm_head"])
    model = lowbit.load(tmp_path / "packed")
    assert equal(model, expected) and isinstance(model.model.embed_tokens, lowbit.PackedEmbedding)
    assert type(model.lm_head) is nn.Linear
    files = sorted(f.name for f in (tmp_path / "packed").iterdir())
    assert files == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def test_the_command(written, tmp_path, capsys):
    source, expected = written
    assert main(["convert", str(source), str(tmp_path / "plain")]) == 0
    assert "4-bit group 16 asymmetric" in capsys.readouterr().out
    model = lowbit.load(tmp_path / "plain")
    assert equal(model, expected) and type(model.lm_head) is nn.Linear
    assert main(["convert", str(source), str(tmp_path / "all"), "--bits", "8"]) == 0
    assert isinstance(lowbit.load(tmp_path / "all").lm_head, lowbit.PackedLinear)


@pytest.mark.parametrize("source", ["float", "gptq-act-order-4bit", "auto-round-2bit", "mxfp4", "qwen3_moe.gguf"])
@pytest.mark.filterwarnings("ignore:.*no tokenizer")
def test_what_is_written_is_in_memory_once(source, tmp_path, monkeypatch):
    """It is held as files have it: nothing is prepared for kernels, and nothing is made again to be written."""
    path = FIXTURES.parent / "gguf" / source if source.endswith(".gguf") else FIXTURES / source / "model"
    if source == "float":
        path = tmp_path / "float"
        mixture(tie_word_embeddings=True).save_pretrained(path)
    module, held = sys.modules["lowbit.checkpoint.convert_folder"], {}
    save = module.save

    def look(model, folder):
        held.update((name, tensor) for name, layer in layers(model).items()
                    for name, tensor in [(f"{name}.{n}", t) for n, t in layer.named_tensors().items()])  # fmt: skip
        written = canonical_state_dict(model)
        assert len(held) > 4 and all(written[name].data_ptr() == tensor.data_ptr() for name, tensor in held.items())
        save(model, folder)

    monkeypatch.setattr(module, "save", look)
    spec = lowbit.Packed(bits=3, outliers=0.01) if source == "float" else None
    lowbit.convert_folder(path, tmp_path / "packed", spec)
    with monkeypatch.context() as patched:
        patched.setattr("lowbit.nn.layer.once", lambda held, what, form: pytest.fail(f"{what} copies"))
        loaded = layers(lowbit.load(tmp_path / "packed" if source == "float" else path)).values()
    assert all(layer.layout in layer.layouts(layer.device) for layer in loaded)  # prepared, to be run


def test_a_config_file_of_its_own(folder, written):
    configure(folder, quantization_config={})  # AutoGPTQ's own file says it
    assert equal(lowbit.load(folder), written[1])


def test_what_only_float_folders_take(folder, tmp_path):
    target = tmp_path / "packed"
    with pytest.raises(ValueError, match="calibration and loss need a float model"):
        lowbit.convert_folder(folder, target, lowbit.Packed(), calibration=[IDS])
    with pytest.raises(ValueError, match=r"lm_head: quantizer='gptq' needs calibration data"):
        lowbit.convert_folder(folder, target, lowbit.Packed(quantizer="gptq"))
    with pytest.raises(ValueError, match="skip leaves layers float"):
        lowbit.convert_folder(folder, target, skip=["lm_head"])
    with pytest.raises(ValueError, match="skip pattern '.*up_proj' matches no layer"):
        lowbit.convert_folder(folder, target, lowbit.Packed(), skip=["*.up_proj"])
    with pytest.raises(ValueError, match="cannot be loaded into a Linear"):
        lowbit.load(folder, nn.Linear(2, 2))
    plain = tmp_path / "plain"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(plain)
    with pytest.raises(ValueError, match="nothing to convert: no module of the model was trained quantized"):
        lowbit.convert_folder(plain, target)
    assert not target.exists()


@pytest.mark.parametrize("method", IMPORTED)
def test_a_loaded_model_is_refused_with_the_remedy(method):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(5, 56, dtype=torch.int32))
    model.config.quantization_config = {"quant_method": method}
    model.config._is_quantized = True
    with pytest.raises(ValueError, match=r"up_proj: quantized by another library.*lowbit\.convert_folder\(src, dst\)"):
        lowbit.convert(model, lowbit.Packed())


# ------------------------------------------------------------------------------------------------ what is refused


CHANGES = {
    "qweight of other bits": (put("qweight", lambda t: torch.cat([t, t])),
                              ("qweight", "shape must be (5, 56)", "bits=4")),
    "qweight transposed": (put("qweight", lambda t: t.t()), ("qweight", "got (56, 5)")),
    "qweight flat": (put("qweight", lambda t: t.flatten()), ("qweight", "2 sizes")),
    "qweight in int64": (put("qweight", lambda t: t.long()), ("qweight", "dtype must be torch.int32: got torch.int64")),
    "qzeros of one group": (put("qzeros", lambda t: t[:1]), ("qzeros", "shape must be (3, 7)", "group_size=16")),
    "qzeros in float": (put("qzeros", lambda t: t.float()), ("qzeros", "dtype")),
    "scales transposed": (put("scales", lambda t: t.t()), ("scales", "shape must be (3, 56)")),
    "scales in int": (put("scales", lambda t: t.int()), ("scales", "dtype")),
    "scales of NaN": (put("scales", lambda t: t / 0 * 0), (UP, "scales must be finite")),
    "g_idx too long": (put("g_idx", lambda t: torch.cat([t, t])), ("g_idx", "shape must be (40,)")),
    "g_idx too large": (put("g_idx", lambda t: t + 1), ("g_idx", "values must be in [0, 3): got values in [1, 3]")),
    "g_idx negative": (put("g_idx", lambda t: t - 1), ("g_idx", "got values in [-1, 1]")),
    "groups of other sizes": (put("g_idx", lambda t: t.clamp(min=1)), ("g_idx", repr(UP), "16 columns", "[0, 32, 8]")),
    "g_idx of zeros": (put("g_idx", torch.zeros_like), ("g_idx", repr(UP), "the last one 8: got [40, 0, 0]")),
    "no scales": (lambda t: t.pop(f"{UP}.scales"), (f"'{UP}.scales' is missing",)),
    "no qzeros": (lambda t: t.pop(f"{UP}.qzeros"), (f"'{UP}.qzeros' is missing",)),
    "no qweight": (lambda t: t.pop(f"{UP}.qweight"), (f"'{UP}.qweight' is missing",)),
    "nothing of a layer": (lambda t: [t.pop(f"{UP}.{leaf}") for leaf in LEAVES], (f"{UP}",)),
    "scales alone": (lambda t: [t.pop(f"{UP}.{leaf}") for leaf in LEAVES if leaf != "scales"], (f"{UP}.scales",)),
    "a weight, too": (lambda t: t.update({f"{UP}.weight": torch.ones(56, 40)}), (f"'{UP}.weight'", "beside its codes")),
    "a tensor more": (lambda t: t.update({f"{UP}.input_scale": torch.ones(1)}), (f"'{UP}.input_scale'",)),
    "no norm": (lambda t: t.pop("model.norm.weight"), ("model.norm.weight",)),
    "a short norm": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), ("model.norm.weight", "shape")),
    "a layer of no module": (lambda t: t.update({n.replace("layers.0", "layers.7"): x for n, x in list(t.items())
                                                 if UP in n}), ("layers.7.mlp.up_proj", "no linear or embedding")),
    "another embedding": (lambda t: t.update({f"model.embed_tokens.{leaf}": t[f"{UP}.{leaf}"] for leaf in LEAVES})
                          or t.pop("model.embed_tokens.weight"),
                          ("model.embed_tokens.qweight", "shape must be (5, 48)", "(5, 56)")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_malformed_tensors(name, folder):
    change, words = CHANGES[name]
    rewrite(folder, change)
    refused(folder, *words)


CONFIGS = {
    "no bits": ({"bits": None}, ("bits must be 2, 3, 4 or 8: got None",)),
    "5 bits": ({"bits": 5}, ("bits must be 2, 3, 4 or 8: got 5",)),
    "bits of another width": ({"bits": 8}, ("qweight", "shape must be (14, 40)", "bits=8")),
    "bits as text": ({"bits": "4"}, ("bits must be",)),
    "group size 0": ({"group_size": 0}, ("group_size must be -1",)),
    "another group size": ({"group_size": 8}, ("qzeros", "shape must be (7, 5)", "group_size=8")),
    "planar": ({"format": "gptq_p"}, ("format must be 'gptq' or 'gptq_v2'", "gptq_p")),
    "marlin": ({"checkpoint_format": "marlin"}, ("checkpoint_format must be", "marlin")),
    "old marlin": ({"is_marlin_format": True}, ("is_marlin_format",)),
    "other words": ({"pack_dtype": "int16"}, ("pack_dtype must be", "int16")),
    "dynamic of texts": ({"dynamic": {"a": 3}}, ("dynamic must map",)),
    "dynamic of no pattern": ({"dynamic": {"+:*": {"bits": 8}}}, ("dynamic: '+:*' is no pattern",)),
    "dynamic of 5 bits": ({"dynamic": {".*up": {"bits": 5}}}, ("dynamic: '.*up' must have bits",)),
    "awq that is none": ({"quant_method": "awq"}, ("g_idx",)),
    "AutoRound, FP8": (auto_round("auto_round:fp8_static"), ("packing_format must be one of", "fp8_static")),
    "AutoRound, packed somehow": (auto_round({}), ("packing_format must be one of", "{}")),
    "AutoRound, floats": (auto_round("auto_round", data_type="mx_fp"), ("data_type must be 'int'", "mx_fp")),
    "AutoRound, activations": (auto_round("auto_round", act_bits=8), ("act_bits must be 16", "got 8")),
    "AutoRound, rotated": (auto_round("auto_round", rotation_config={"a": 1}), ("rotation_config must be empty",)),
    "AutoRound, a list": (auto_round("auto_round", extra_config=[1]), ("extra_config must be an object", "[1]")),
    "AutoRound, 9 bits": (auto_round("auto_round", bits=9), ("bits must be 2, 3, 4, 5, 6, 7 or 8: got 9",)),
    "AutoRound, 9 bits of one": (auto_round("auto_round", extra_config={UP: {"bits": 9}}), (repr(UP), "got bits=9")),
    "AutoRound, AWQ of 3 bits": (auto_round("auto_round:awq", extra_config={"up": {"bits": 3}}), ("g_idx",)),
    "awq, gemv": ({"quant_method": "awq", "version": "gemv"}, ("version must be 'gemm'", "gemv")),
    "awq of 8 bits": ({"quant_method": "awq", "bits": 8}, ("bits must be 4: got 8",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_malformed_configs(name, folder):
    change, words = CONFIGS[name]
    section = gptq_section(**change) if "bits" not in change else {**gptq_section(), **change}
    if "group_size" in change:
        section = {**gptq_section(), **change}
    configure(folder, quantization_config=section)
    refused(folder, str(folder), *words)


def places(section):
    """Every field of a section, and of what is in it: what holds it, and its key."""
    for key, value in list(section.items()):
        yield section, key
        if isinstance(value, dict):
            yield from places(value)


FUZZED = ["gptq_v2-4bit", "awq-gemm", "compressed-tensors-3bit", "auto-round-2bit", "fp8", "modelopt-nvfp4"]


@pytest.mark.parametrize("name", FUZZED)
def test_fields_of_any_kind(name, tmp_path):
    """What a field holds that it should not is refused by name, or nothing that is read depends on it."""
    folder = shutil.copytree(FIXTURES / name / "model", tmp_path / "model")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    expected, refusals = load_file(FIXTURES / name / "expected.safetensors"), []
    for holder, key in places(section):
        value = holder[key]
        for other in ({}, [], "x", -1):
            holder[key] = other
            configure(folder, quantization_config=section)
            try:
                assert equal(lowbit.load(folder), expected)
            except ValueError as error:
                refusals.append(str(error))
        holder[key] = value
    assert len(refusals) > 5 and all(str(folder) in text for text in refusals)


def test_an_order_that_is_missing(folder):
    rewrite(folder, lambda t: t.pop(f"{UP}.g_idx"))
    configure(folder, quantization_config=gptq_section(desc_act=True))
    refused(folder, f"'{UP}.g_idx' is missing", "desc_act")


def test_no_layer_in_the_format(folder, written, tmp_path):
    shutil.rmtree(folder)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    configure(folder, quantization_config=gptq_section())
    refused(folder, "config.json names the format 'gptq', but no tensor")


def test_a_tied_head(folder):
    configure(folder, tie_word_embeddings=True)
    rewrite(folder, lambda t: (t.update({f"lm_head.{n}": t[f"{UP}.{n}"] for n in LEAVES}), t.pop("lm_head.weight")))
    refused(folder, "layer 'lm_head'", "tie_word_embeddings")


# ------------------------------------------------------------------------------------------------------- embeddings

EMBEDDING = "model.embed_tokens"


def test_an_embedding_and_a_head(tmp_path):
    """Each by the group of its class, with bits of its own."""
    groups = [group(4), group(8, targets=["Embedding"])]

    def make(n, k):
        return packed_tensors(n, k, 8 if n == 37 else 4)

    expected = folder_of(tmp_path / "model", packed_section(*groups), make, {"vocab_size": 37}, only="")
    head = packed_tensors(37, 40, 4)
    rewrite(tmp_path / "model", lambda t: t.update({f"lm_head.{n}": tensor for n, tensor in head[0].items()}))
    expected["lm_head"] = head[1]
    assert len(expected) == 9
    model = lowbit.load(tmp_path / "model")
    assert equal(model, expected) and isinstance(model.model.embed_tokens, lowbit.PackedEmbedding)
    assert torch.equal(model.model.embed_tokens(IDS), expected[EMBEDDING][IDS])
    lowbit.convert_folder(tmp_path / "model", tmp_path / "packed")
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)
    configure(tmp_path / "model", quantization_config=packed_section(groups[0]))
    with pytest.raises(ValueError, match=r"config_groups must target the layer 'model.embed_tokens', .* 'Embedding'"):
        lowbit.load(tmp_path / "model")


@pytest.mark.parametrize("only", ["embed", ""])
def test_a_tied_head_shares_the_embedding(only, tmp_path):
    section, config = gptq_section(), {"tie_word_embeddings": True}
    expected = folder_of(tmp_path / "model", section, lambda n, k: layer_tensors(n, k, 4, 16), config, only=only)
    model = lowbit.load(tmp_path / "model")
    assert equal(model, {**expected, "lm_head": expected[EMBEDDING]})
    assert model.lm_head.packed.data_ptr() == model.model.embed_tokens.packed.data_ptr()
    states = model.model(IDS).last_hidden_state
    assert torch.allclose(model(IDS).logits, states @ expected[EMBEDDING].t(), rtol=1e-4, atol=1e-4)
    lowbit.convert_folder(tmp_path / "model", tmp_path / "packed")
    again = lowbit.load(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.packed.data_ptr() == again.model.embed_tokens.packed.data_ptr()
    files = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(name.endswith(".packed") for name in files) == len(expected)


def test_a_tied_head_with_a_bias_of_its_own(tmp_path):
    config = transformers.BertConfig(hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                                     vocab_size=48)  # fmt: skip
    bert = transformers.BertForMaskedLM(config).eval()
    bert.cls.predictions.bias.data.normal_()
    bias, name = bert.cls.predictions.bias.detach().clone(), "bert.embeddings.word_embeddings"
    expected = folder_of(tmp_path / "model", gptq_section(), lambda n, k: layer_tensors(n, k, 4, 16), only=name,
                         model=bert)  # fmt: skip
    bert.get_parameter(f"{name}.weight").data.copy_(expected[name])
    model = lowbit.load(tmp_path / "model")
    assert equal(model, {**expected, "cls.predictions.decoder": expected[name]})
    assert torch.equal(model.cls.predictions.decoder.bias, bias)
    assert torch.allclose(model(IDS).logits, bert(IDS).logits, rtol=1e-4, atol=1e-4)
    lowbit.convert_folder(tmp_path / "model", tmp_path / "packed")
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)


EXPERTS = {
    "gptq": (gptq_section(), lambda n, k: layer_tensors(n, k, 4, 16)),
    "gptq, with bias": (gptq_section(2), lambda n, k: with_bias(*layer_tensors(n, k, 2, 16))),
    "gptq, some symmetric": (gptq_section(3), lambda n, k: layer_tensors(n, k, 3, 16, zero=4 if n == 32 else None)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16}, lambda n, k: layer_tensors(n, k, 4, 16, awq=True)),
    "compressed-tensors": (packed_section(group(5, symmetric=False)),
                           lambda n, k: packed_tensors(n, k, 5, "group", False)),
    "by tensor": (packed_section(group(4, strategy="tensor")), lambda n, k: packed_tensors(n, k, 4, "tensor")),
}  # fmt: skip


def with_bias(made, weight):
    return {**made, "bias": torch.zeros(len(weight))}, weight


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tmp_path):
    check_experts(tmp_path, *EXPERTS[name], IDS)


def test_zeros_that_some_experts_have(tmp_path):
    """Of one expert symmetric, of another with a zero of ``2**b``: the stack has float zeros, exactly."""
    number = iter(range(100))

    def make(n, k):
        made, weight = layer_tensors(n, k, 4, 16, zero=8 if (i := next(number)) % 3 == 0 else None)
        if i % 3 == 1:
            made["qzeros"][:] = torch.tensor([words_of([15] * n, 4)])
            weight = gptq_weight(made, 4, 16, v1(4))
        return made, weight

    plain = mixture()
    expected = folder_of(tmp_path, gptq_section(), make, only=".experts.", model=plain)
    model = lowbit.load(tmp_path)
    check_mixture(model, plain, expected, IDS)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    assert stack.format.zeros == "float" and "read as 16" in stack.note


EXPERT = "model.layers.0.mlp.experts.1.up_proj"
EXPERT_CHANGES = {
    "one float": (lambda t: [t.update({f"{EXPERT}.weight": torch.ones(64, 32)}),
                             *(t.pop(f"{EXPERT}.{leaf}") for leaf in LEAVES)],
                  (f"'{EXPERT}' must be in the format 'gptq'", "gate_up_proj")),
    "one missing": (lambda t: [t.pop(f"{EXPERT}.{leaf}") for leaf in LEAVES],
                    ("gate_up_proj", "3 experts: the files have 2")),
    "one too short": (lambda t: t.update({f"{EXPERT}.scales": t[f"{EXPERT}.scales"][:1]}),
                      (EXPERT, "shape must be (2, 64)")),
    "one of other scales": (lambda t: t.update({f"{EXPERT}.scales": t[f"{EXPERT}.scales"].float()}),
                            (f"{EXPERT}.qweight", "one form", "scale_dtype='float16', this one 'float32'")),
    "one of infinity": (lambda t: t[f"{EXPERT}.scales"].fill_(torch.inf),
                        ("model.safetensors", "scales must be finite")),
    "a bias": (lambda t: t.update({f"{EXPERT}.bias": torch.ones(64)}), (f"{EXPERT}.bias", "must be zero")),
}  # fmt: skip


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "model"
    folder_of(folder, gptq_section(), lambda n, k: layer_tensors(n, k, 4, 16), only=".experts.", model=mixture())
    return folder


@pytest.mark.parametrize("name", EXPERT_CHANGES)
def test_malformed_experts(name, experts_folder, tmp_path):
    folder = shutil.copytree(experts_folder, tmp_path / "model")
    change, words = EXPERT_CHANGES[name]
    rewrite(folder, change)
    refused(folder, *words)


def test_layers_that_transformers_leaves_out(folder, written, monkeypatch):
    """Such as those that predict more tokens, which DeepSeek-V3 and GLM-4.5 have in their files."""
    rewrite(folder, lambda t: t.update({n.replace("layers.0", "layers.1"): tensor for n, tensor in list(t.items())}))
    refused(folder, "model.layers.1.mlp.down_proj", "no linear or embedding layer there")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1.*"])
    assert equal(lowbit.load(folder), written[1])


def test_experts_beside_float_ones(experts_folder, tmp_path):
    """What is stored as floats, a whole stack too, is packed by a spec."""
    folder = shutil.copytree(experts_folder, tmp_path / "model")
    down = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(3)]
    rewrite(folder, lambda t: [(t.pop(f"{n}.{leaf}"), t.update({f"{n}.weight": torch.randn(32, 64)}))
                               for n in down for leaf in LEAVES])  # fmt: skip
    lowbit.convert_folder(folder, tmp_path / "packed", lowbit.Codebook(bits=3))
    experts = lowbit.load(tmp_path / "packed").model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, lowbit.PackedExperts)
    assert isinstance(experts.down_proj, lowbit.CodebookExperts)
    assert type(lowbit.load(folder).model.layers[0].mlp.experts.down_proj) is nn.Parameter


# ------------------------------------------------------------------------------------------- the projects' own packers


def test_gptqmodels_own_packers(tmp_path):
    """Random layers, packed by the package where it is installed; the fixtures show the same where it is not."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    def make(n, k, cls, bits):
        scales, zeros = (torch.rand(n, 1) / 8 + 0.01).half().float(), torch.randint(0, 2**bits, (n, 1)).float()
        linear = nn.Linear(k, n, bias=False)
        linear.weight.data = (torch.randint(0, 2**bits, (n, k)) - zeros) * scales
        packed = cls(bits=bits, group_size=k, sym=False, desc_act=False, in_features=k, out_features=n,
                     pack_dtype=torch.int32, register_buffers=cls is TorchLinear)  # fmt: skip
        packed.pack(linear, scales, zeros, torch.zeros(k, dtype=torch.int32))
        leaves = LEAVES if cls is TorchLinear else LEAVES[:3]
        return {leaf: getattr(packed, leaf) for leaf in leaves}, linear.weight.data

    config = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    for cls, bits in ((TorchLinear, 2), (TorchLinear, 3), (TorchLinear, 4), (TorchLinear, 8), (AwqTorchLinear, 4)):
        folder = tmp_path / f"{cls.__name__}{bits}"
        section = gptq_section(bits, -1, checkpoint_format="gptq_v2")
        if cls is AwqTorchLinear:
            section = {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm"}
        expected = folder_of(folder, section, lambda n, k, c=cls, b=bits: make(n, k, c, b), config)
        assert equal(lowbit.load(folder), expected)


def test_the_document_names_what_is_read():
    text = (Path(__file__).resolve().parents[2] / "docs" / "interoperability.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert [format for format in IMPORTED if sum(f"(`{format}`)" in row for row in rows) != 1] == []
