"""Folders of bitsandbytes, HQQ, torchao, BitNet, quanto and MLX: what is stored is kept, or refused by name.

fixtures/foreign/libraries.safetensors has layers that the projects packed, with their own weights. The decoders here
are loops over single values, and know nothing of lowbit.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.testing.foreign_folders import configure, equal, folder_of, refused, rewrite

transformers = pytest.importorskip("transformers", minversion="5.0")

FIXTURE = load_file(Path(__file__).resolve().parent / "fixtures" / "foreign" / "libraries.safetensors")
KINDS = sorted({name.partition("/")[0] for name in FIXTURE})
UP = "model.layers.0.mlp.up_proj"
IDS = torch.tensor([[3, 1, 4, 1, 5]])
SIZES = dict(hidden_size=64, intermediate_size=8, head_dim=32)
ULP = 2.0**-24


def near(found, expected):
    """As close as another order of rounding allows."""
    found, expected = found.double(), expected.double()
    return bool(((found - expected).abs() <= 1.001 * ULP * 3 * expected.abs()).all())


def only_up(path, section, leaves, **config):
    """A folder whose up_proj has these leaves."""
    folder_of(path, section, lambda n, k: (leaves, None), {**SIZES, **config}, only="up_proj")


def up_of(path):
    return lowbit.load(path).get_submodule(UP)


def put(leaf, value):
    return lambda tensors: tensors.update({f"{UP}.{leaf}": value(tensors[f"{UP}.{leaf}"])})


# ------------------------------------------------------------------------------------------- what the projects packed


def prepared(path, kind, **config):
    """The folder of a layer of the fixture."""
    library, _, variant = kind.partition("-")
    leaves = {name.partition("/")[2]: t for name, t in FIXTURE.items() if name.startswith(f"{kind}/")}
    expected = leaves.pop("expected")
    section = {"hqq": {"quant_method": "hqq", "quant_config": {}}}.get(library)
    only_up(path, section, leaves, **config)
    saved = json.loads((path / "config.json").read_text())
    if section is None:
        del saved["quantization_config"]
        (path / "config.json").write_text(json.dumps(saved))
    if library == "quanto":
        said = {UP: {"weights": variant.replace("qfloat8_e4m3fn", "qfloat8"), "activations": "none"}}
        (path / "quanto_qmap.json").write_text(json.dumps(said))
    if library == "mlx":
        configure(path, quantization={"group_size": 32, "bits": int(variant)})
    return leaves, expected


def decoded(kind, t):
    """The layer as loops read it: ``[8][64]`` pairs of a code and its group, and what is done with them."""
    if kind.startswith("mlx"):
        bits = int(kind[-1])
        streams = [sum(w << (32 * i) for i, w in enumerate(row)) for row in t["weight"].tolist()]
        codes = [[(stream >> (bits * k)) & (2**bits - 1) for k in range(64)] for stream in streams]
        return torch.tensor(codes), t["scales"], t["biases"]
    if kind.startswith("hqq"):
        bits = int(kind[-1])
        words, parts = t["W_q"].tolist(), {2: 4, 3: 10, 4: 2, 8: 1}[bits]
        rows = [[word >> (bits * (parts - 1 - part)) & (2**bits - 1) for word in row]
                for part in range(parts) for row in words][:16]  # fmt: skip
        return torch.tensor(rows).view(8, 64), t["scale"].view(8, 2), t["zero"].view(8, 2)
    if "qint8" in kind or "qfloat8" in kind:
        return t["weight._data"].float(), t["weight._scale"], None
    bits = int(kind[-1])
    rows = [[byte >> (bits * part) & (2**bits - 1) for byte in row]
            for part in range(8 // bits) for row in t["weight._data._data"].tolist()]  # fmt: skip
    return torch.tensor(rows), t["weight._scale"], t["weight._shift"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_packed(kind, tmp_path):
    t, expected = prepared(tmp_path / "a", kind)
    codes, scales, other = decoded(kind, t)
    groups = torch.arange(64) // (64 // scales.shape[1])
    found = up_of(tmp_path / "a").dequantize(torch.float32)
    scales, other = scales[:, groups], None if other is None else other[:, groups]
    if other is None or kind.startswith("hqq"):
        mine = codes.float() * scales if other is None else (codes.float() - other) * scales
    else:  # two roundings
        mine = codes.float() * scales.float() + other.float() * (1 if kind.startswith("mlx") else -1)
    assert torch.equal(found, mine)
    assert torch.equal(found, expected) or (kind.startswith("mlx") and near(expected, mine))  # fused there
    model = lowbit.load(tmp_path / "a")
    lowbit.convert_folder(tmp_path / "a", tmp_path / "packed")
    assert torch.equal(lowbit.load(tmp_path / "packed")(IDS).logits, model(IDS).logits)


def test_groups_of_quanto(tmp_path):
    """Rows of several groups, whole shifts, and another number of rows than fill the bytes."""
    codes, scales = torch.randint(0, 16, (24, 64)), (torch.rand(24, 1) + 0.1).half()
    shifts = torch.randint(0, 16, (24, 1), dtype=torch.int8)
    packed = (codes[:12] | codes[12:] << 4).to(torch.uint8)
    expected = ((codes - shifts).float() * scales.float()).view(8, 192)
    leaves = {"weight._data._data": packed, "weight._scale": scales, "weight._shift": shifts}
    only_up(tmp_path, {}, leaves, hidden_size=192, head_dim=96)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({UP: {"weights": "qint4", "activations": "qint8"}}))
    layer = up_of(tmp_path)
    assert torch.equal(layer.dequantize(torch.float32), expected)
    assert (layer.format.group_size, layer.format.zeros, layer.note) == (64, "int", "x stays float: quanto rounds it")


def test_embeddings_of_mlx(tmp_path):
    """A tied embedding is packed, and the head has its storage; a layer has sizes of its own, or is float."""
    folder_of(tmp_path, {}, lambda n, k: ({"weight": torch.zeros(n, k)}, None),
              dict(hidden_size=64, intermediate_size=64, head_dim=32, tie_word_embeddings=True), only="up_proj")
    made = {}

    def change(tensors):
        for name, bits, size in (("model.embed_tokens", 4, 32), (UP, 6, 64)):
            n, k = tensors[f"{name}.weight"].shape
            codes = torch.randint(0, 2**bits, (n, k))
            scales, biases = (torch.rand(n, k // size) + 0.1).half(), torch.randn(n, k // size).half()
            streams = [sum(c << (bits * i) for i, c in enumerate(row)) for row in codes.tolist()]
            words = [[stream >> (32 * i) & 0xFFFFFFFF for i in range(k * bits // 32)] for stream in streams]
            tensors[f"{name}.weight"] = torch.tensor(words).to(torch.uint32)
            tensors |= {f"{name}.scales": scales, f"{name}.biases": biases}
            index = torch.arange(k) // size
            made[name] = codes.float() * scales[:, index].float() + biases[:, index].float()

    rewrite(tmp_path, change)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["quantization_config"]
    saved["quantization"] = {"group_size": 32, "bits": 4, UP: {"group_size": 64, "bits": 6},
                             "model.layers.0.mlp.down_proj": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = lowbit.load(tmp_path)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, lowbit.PackedEmbedding) and head.packed is embedding.packed
    for name, weight in made.items():
        assert torch.equal(model.get_submodule(name).dequantize(torch.float32), weight)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    lowbit.convert_folder(tmp_path, tmp_path.parent / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path.parent / "packed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("bits", [3, 4])
def test_squeezellm(bits, tmp_path):
    codes, table = torch.randint(0, 2**bits, (8, 64)), torch.randn(8, 2**bits).half()
    streams = [sum(code << (bits * i) for i, code in enumerate(row)) for row in codes.tolist()]
    words = torch.tensor([[stream >> (32 * i) & 0xFFFFFFFF for stream in streams] for i in range(2 * bits)])
    leaves = {"qweight": words.to(torch.uint32).view(torch.int32), "lookup_table": table}
    only_up(tmp_path / "a", {"quant_method": "squeezellm", "wbits": bits}, leaves)
    assert torch.equal(up_of(tmp_path / "a").dequantize(torch.float32), table.float().gather(1, codes))
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    del saved["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(saved))
    (tmp_path / "a" / "quant_config.json").write_text(json.dumps({"wbits": bits}))
    assert torch.equal(up_of(tmp_path / "a").dequantize(torch.float32), table.float().gather(1, codes))


SPARSE = {"rows": torch.tensor([0, 2, 2, 3, 3, 3, 3, 4, 4], dtype=torch.int32),
          "cols": torch.tensor([5, 63, 0, 31], dtype=torch.int32), "vals": torch.tensor([1.5, -2.25, 3.1, 0.7]),
          "startrows": torch.zeros(128, dtype=torch.int32)}  # fmt: skip
FULL = {"full_rows": torch.arange(128.0).view(64, 2) * (torch.arange(128).view(64, 2) % 3 > 0),
        "full_row_indices": torch.tensor([7, 3], dtype=torch.int32)}  # fmt: skip


def squeezed(path, sparse):
    """A folder of 4 bits with a sparse part, and the weight of its layer, by loops."""
    torch.manual_seed(0)
    codes, table = torch.randint(0, 16, (8, 64)), torch.randn(8, 16)
    words = [[sum(int(codes[n, 8 * i + j]) << (4 * j) for j in range(8)) for n in range(8)] for i in range(8)]
    leaves = {"qweight": torch.tensor(words).to(torch.uint32).view(torch.int32), "lookup_table": table, **sparse}
    only_up(path, {"quant_method": "squeezellm", "wbits": 4}, leaves)
    weight = table.gather(1, codes)
    for n in range(8 if "rows" in sparse else 0):
        for i in range(sparse["rows"][n], sparse["rows"][n + 1]):
            weight[n, sparse["cols"][i]] += sparse["vals"][i]
    for x, n in enumerate(sparse.get("full_row_indices", torch.zeros(0)).int().tolist()):
        weight[n] += sparse["full_rows"][:, x]
    return weight


@pytest.mark.parametrize(("sparse", "count"), [(SPARSE, 4), (FULL, 85), (SPARSE | FULL, 89), (
    {"rows": torch.zeros(9).int(), "cols": torch.zeros(0).int(), "vals": torch.zeros(0)}, 0)])  # fmt: skip
def test_the_sparse_part_of_squeezellm(sparse, count, tmp_path):
    weight = squeezed(tmp_path / "a", sparse)
    layer = up_of(tmp_path / "a")
    assert torch.equal(layer.dequantize(torch.float32), weight) and layer.format.outliers == count
    lowbit.convert_folder(tmp_path / "a", tmp_path / "packed")
    assert torch.equal(up_of(tmp_path / "packed").dequantize(torch.float32), weight)


NOT_SPARSE = {
    "rows that fall": ({"rows": torch.tensor([0, 2, 1, 3, 3, 3, 3, 4, 4]).int()}, "values must rise from 0 to 4"),
    "other rows": ({"rows": torch.tensor([0, 2, 2, 3, 3, 3, 3, 3, 3]).int()}, "values must rise from 0 to 4"),
    "a row less": ({"rows": torch.zeros(8).int()}, "shape must be (9,)"),
    "a column too many": ({"cols": torch.tensor([5, 64, 0, 31]).int()}, "must be in [0, 64)"),
    "a negative column": ({"cols": torch.tensor([5, -1, 0, 31]).int()}, "must be in [0, 64)"),
    "wide columns": ({"cols": torch.tensor([5, 63, 0, 31])}, "dtype must be torch.int32"),
    "a value more": ({"vals": torch.ones(5)}, "shape must be (5,)"),
    "one twice": ({"cols": torch.tensor([5, 5, 0, 31]).int()}, "row 0, column 5 twice"),
    "in both parts": ({**FULL, "full_row_indices": torch.tensor([0, 3]).int()}, "twice"),
    "a full row elsewhere": ({**FULL, "full_row_indices": torch.tensor([8, 3]).int()}, "must be in [0, 8)"),
    "full rows of another width": ({**FULL, "full_rows": torch.ones(2, 64)}, "shape must be (64, 2)"),
    "a number": ({"vals": torch.tensor(1.0)}, "shape must be"),
    "no number": ({"vals": torch.tensor([1.0, float("nan"), 2.0, 3.0])}, "finite"),
    "no columns": ({"cols": None}, "'model.layers.0.mlp.up_proj.cols' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_SPARSE)
def test_what_is_no_sparse_part(what, tmp_path):
    change, words = NOT_SPARSE[what]
    squeezed(tmp_path / "a", SPARSE)
    held = {f"{UP}.{leaf}": tensor for leaf, tensor in change.items()}
    rewrite(tmp_path / "a", lambda t: t.pop(f"{UP}.cols") if None in held.values() else t.update(held))
    refused(tmp_path / "a", f"{UP}", words)


# ---------------------------------------------------------------------------------------------------- any-precision


def any_precision(path, hidden, change=lambda leaves: None, **section):
    """A folder of 3 to 5 bits, its codes and tables; bits are put by loops, as the packer's kernels read them."""
    torch.manual_seed(0)
    codes = torch.randint(0, 32, (8, hidden))
    planes = torch.zeros(5, 8, hidden // 8, dtype=torch.uint8)
    for b in range(5):
        for n in range(8):
            for k in range(hidden):
                i, begin = k // 8, k // 8 // 128 * 128
                threads = 32 if begin + 128 <= hidden // 8 else (hidden // 8 - begin) // 4
                place = begin + (i - begin) % threads * 4 + ((i - begin) // threads ^ 3)
                planes[b, n, place] |= (int(codes[n, k]) >> (4 - b) & 1) << (7 - k % 8)
    tables = {f"lut{bits}": torch.randn(8, 2**bits).half() for bits in (3, 4, 5)}
    leaves = {"qweight": planes.view(torch.int32), **tables}
    change(leaves)
    only_up(path, None, leaves, hidden_size=hidden, head_dim=hidden // 2)
    saved = json.loads((path / "config.json").read_text())
    del saved["quantization_config"]
    saved["anyprec"] = {"seed_precision": 3, "parent_precision": 5, "group_count": 1, "arch_config": {}, **section}
    (path / "config.json").write_text(json.dumps(saved))
    return codes, tables


@pytest.mark.parametrize("hidden", [64, 1024, 1120])
def test_any_precision(hidden, tmp_path):
    codes, tables = any_precision(tmp_path / "a", hidden)
    expected = tables["lut5"].float().gather(1, codes)
    assert torch.equal(up_of(tmp_path / "a").dequantize(torch.float32), expected)
    lowbit.convert_folder(tmp_path / "a", tmp_path / "packed")
    layer = up_of(tmp_path / "packed")
    assert torch.equal(layer.dequantize(torch.float32), expected) and layer.format.bits == 5


def test_any_precision_as_its_project_saves_it(tmp_path):
    any_precision(tmp_path / "a", 64)
    torch.save(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "a" / "pytorch_model.bin")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is pickled: save its tensors with safetensors"):
        lowbit.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "section", "words"),
    [
        (lambda t: t.pop("lut5"), {}, "lut5"),
        (lambda t: t.update(lut5=t["lut4"]), {}, "shape must be (8, 32)"),
        (lambda t: t.update(qweight=t["qweight"][:4]), {}, "shape must be (5, 8, 2)"),
        (lambda t: t.update(qweight=t["qweight"].long()), {}, "dtype must be torch.int32"),
        (lambda t: None, {"parent_precision": 9}, "parent_precision must be 2 to 8: got 9"),
        (lambda t: None, {"seed_precision": 6}, "seed_precision must be 2 to 5: got 6"),
        (lambda t: None, {"group_count": 4}, "group_count must be 1"),
    ],
)
def test_what_is_no_any_precision(change, section, words, tmp_path):
    any_precision(tmp_path / "a", 64, change, **section)
    with pytest.raises(ValueError) as error:
        lowbit.load(tmp_path / "a")
    assert words in str(error.value)


# ----------------------------------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("hidden", [64, 96])
def test_bitsandbytes_4bit(quant_type, nested, hidden, tmp_path):
    """Blocks that are rows' own, and blocks that run over their ends."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(8, hidden)
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type, blocksize=64, compress_statistics=nested)
    leaves = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": quant_type}
    only_up(tmp_path, section, leaves, hidden_size=hidden, head_dim=hidden // 2)
    layer = up_of(tmp_path)
    found = layer.dequantize(torch.float32)
    if hidden == 64:  # its CPU kernel gives each row blocks of its own, which is not how it was quantized
        assert torch.equal(found, functional.dequantize_4bit(packed, state))
    assert layer.format.scales == ("nested" if nested and hidden == 64 else "float32")
    table, data = leaves["weight.quant_map"].tolist(), packed.flatten().tolist()
    codes = [nibble for byte in data for nibble in (byte >> 4, byte & 15)]
    absmax = leaves["weight.absmax"]
    if nested:
        absmax = torch.tensor([leaves["weight.nested_quant_map"][c] for c in absmax.tolist()])
        absmax = absmax * leaves["weight.nested_absmax"] + state.offset
    mine = torch.tensor([table[c] for c in codes]) * absmax.repeat_interleave(64)[: 8 * hidden]
    assert torch.equal(mine.view(8, hidden), found)


def test_bitsandbytes_8bit(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, largest, _ = functional.int8_vectorwise_quant(torch.randn(8, 64).half())
    leaves = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    only_up(tmp_path / "a", {"quant_method": "bitsandbytes", "load_in_8bit": True}, leaves)
    layer = up_of(tmp_path / "a")
    found = layer.dequantize(torch.float32)
    assert torch.equal(found, codes.float() * (largest / 127)[:, None]) and "x stays float" in layer.note
    assert near(functional.int8_vectorwise_dequant(codes, largest), codes.double() * largest.double()[:, None] / 127)
    rewrite(tmp_path / "a", put("weight_format", lambda t: t + 2))
    refused(tmp_path / "a", "weight_format", "must be 0", "got 2")


# ----------------------------------------------------------------------------------------------------------- torchao


def described(path, kind, numbers):
    """The metadata of torchao beside the tensors."""
    said = {f"{UP}.weight": json.dumps({"_type": kind, "_data": numbers})}
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors", {"format": "pt", **said})


def ao_folder(path, kind, leaves, **numbers):
    only_up(path, {"quant_method": "torchao"}, {f"_weight_{leaf}": t for leaf, t in leaves.items()})
    described(path, kind, {"dtype": {"_type": "torch.dtype", "_data": "bfloat16"}, **numbers})


TARGET = {"_type": "torch.dtype", "_data": "int3"}
BY_TOKEN = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": {"_type": "PerRow"}, "mapping_type": {
    "_type": "MappingType", "_data": "SYMMETRIC"}}}  # fmt: skip


@pytest.mark.parametrize("kind", ["Int8Tensor", "Int8Tensor, x too", "IntxUnpackedToInt8Tensor", "Float8Tensor",
                                  "Int4Tensor"])  # fmt: skip
def test_torchao(kind, tmp_path):
    codes, groups = torch.randint(-128, 128, (8, 64), dtype=torch.int8), torch.arange(64) // 32
    scales, zeros = (torch.rand(8, 2) / 8 + 0.01).bfloat16(), torch.zeros(8, 2, dtype=torch.int8)
    if kind == "Int4Tensor":
        minimum = torch.randn(2, 8).bfloat16()
        ao_folder(tmp_path, kind, {"qdata": codes[:, :32], "scale": scales.t(), "zero_point": minimum},
                  block_size=[1, 32], shape=[8, 64])
        nibbles = [[(byte & 15, byte >> 4 & 15) for byte in row] for row in codes[:, :32].tolist()]
        signed = torch.tensor([[n - 16 if n > 7 else n for pair in row for n in pair] for row in nibbles])
        mine = signed.float() * scales[:, groups].float() + minimum.t()[:, groups].float()
        assert torch.equal(up_of(tmp_path).dequantize(torch.float32), mine) and up_of(tmp_path).note is None
        rewrite(tmp_path, put("_weight_zero_point", lambda t: t * 0 + 1e-6))
        described(tmp_path, kind, {"block_size": [1, 32], "shape": [8, 64]})
        assert "of 16 of 16 groups are rounded" in up_of(tmp_path).note
        return
    if kind == "Float8Tensor":
        stored = (codes & 0x3F).view(torch.float8_e4m3fn)
        ao_folder(tmp_path, kind, {"qdata": stored, "scale": scales[:, :1].float()}, block_size=[1, 64])
        expected = stored.float() * scales[:, :1].float()
    elif kind == "IntxUnpackedToInt8Tensor":
        codes, zeros = codes.clamp(-4, 3), torch.randint(-4, 4, (8, 2), dtype=torch.int8)
        ao_folder(tmp_path, kind, {"qdata": codes, "scale": scales, "zero_point": zeros}, block_size=[1, 32],
                  target_dtype=TARGET, activation_quantization="int8_asym_per_token")
        expected = (codes.float() - zeros[:, groups]) * scales[:, groups].float()
    else:
        used = {"act_quant_kwargs": BY_TOKEN} if "x too" in kind else {}
        ao_folder(tmp_path, "Int8Tensor", {"qdata": codes, "scale": scales[:, :1].float(), "zero_point": zeros[:, :1]},
                  block_size=[1, 64], **used)
        expected = codes.float() * scales[:, :1].float()
    layer = up_of(tmp_path)
    assert torch.equal(layer.dequantize(torch.float32), expected)
    assert layer.format.activations == ("int8" if "x too" in kind else "float")
    assert (layer.note is not None) == (kind == "IntxUnpackedToInt8Tensor")


def test_what_torchao_saves(tmp_path):
    """The whole way, by the project: quantize_, and transformers' save_pretrained."""
    quantization = pytest.importorskip("torchao.quantization")
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=32,
                                      num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    used = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32), version=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=torch.float32, quantization_config=transformers.TorchAoConfig(used), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "a")
    layer, weight = up_of(tmp_path / "a"), theirs.get_submodule(UP).weight
    assert torch.equal(layer.dequantize(torch.float32), weight.dequantize())
    assert (layer.format.bits, layer.format.zeros) == (4, "none")


# ------------------------------------------------------------------------------------------------------------ BitNet


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_bitnet(linear_class, tmp_path):
    from transformers.integrations.bitnet import pack_weights

    values, scale = torch.randint(-1, 2, (8, 64)), torch.tensor([3.7]).bfloat16()
    section = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    packed = pack_weights(values.clone())
    only_up(tmp_path / "a", section, {"weight": packed, "weight_scale": scale})
    factor = scale.float() if linear_class == "autobitlinear" else 1 / scale.float()
    rows = [[(byte >> (2 * part) & 3) - 1 for byte in row] for part in range(4) for row in packed.tolist()]
    layer = up_of(tmp_path / "a")
    assert torch.equal(layer.dequantize(torch.float32), values * factor) and torch.equal(values, torch.tensor(rows))
    assert layer.format.activations == "int8" and layer.format.bits == 2
    rewrite(tmp_path / "a", put("weight", lambda t: t | 3))
    refused(tmp_path / "a", f"'{UP}.weight'", "codes of 0 to 2")
    configure(tmp_path / "a", quantization_config={**section, "use_rms_norm": True})
    refused(tmp_path / "a", "use_rms_norm must be false")


# ----------------------------------------------------------------------------------------------------- what is refused


HQQ = "hqq-4"
CHANGES = {
    "another axis": (HQQ, put("axis", lambda t: t * 0), ("axis", "must be 1", "got [0]")),
    "another width": (HQQ, put("nbits", lambda t: t - 3), ("nbits", "2, 3, 4 or 8", "got [1]")),
    "another shape": (HQQ, put("shape", lambda t: t.flip(0)), ("shape", "[8, 64]")),
    "scales in integers": (HQQ, put("quant_scale", lambda t: t + 1), ("quant_scale", "must be 0")),
    "another group": (HQQ, put("group_size", lambda t: t * 2), ("group_size", "32", "got [64]")),
    "half the codes": (HQQ, put("W_q", lambda t: t[:4]), ("W_q", "shape must be (8, 32)")),
    "no zeros": (HQQ, lambda t: t.pop(f"{UP}.zero"), ("zero' is missing",)),
    "zeros of another dtype": (HQQ, put("zero", lambda t: t.half()), ("zero", "torch.float32")),
    "NaN": (HQQ, put("scale", lambda t: t * torch.nan), ("up_proj", "finite")),
    "short rows": ("quanto-qint4", put("weight._data._data", lambda t: t[:, :30]), ("must divide K = 64",)),
    "few shifts": ("quanto-qint4", put("weight._shift", lambda t: t[:3]), ("_shift", "shape must be (8, 1)")),
    "int8 as float": ("quanto-qint8", put("weight._data", lambda t: t.float()), ("_data", "dtype must be torch.int8")),
    "few words": ("mlx-4", put("weight", lambda t: t[:, :7]), ("weight", "shape must be (8, 8)")),
    "signed words": ("mlx-4", put("weight", lambda t: t.view(torch.int32)), ("weight", "torch.uint32")),
    "no scales": ("mlx-4", lambda t: t.pop(f"{UP}.scales"), ("scales' is missing",)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_malformed_layers(what, tmp_path):
    kind, change, words = CHANGES[what]
    prepared(tmp_path / "a", kind)
    rewrite(tmp_path / "a", change)
    refused(tmp_path / "a", *words)


def test_configs_that_are_refused(tmp_path):
    prepared(tmp_path / "a", "mlx-4")
    for said, words in (({"bits": 7}, "bits=7"), ({"group_size": 0}, "group_size=0"), ({"mode": "mxfp4"}, "'affine'")):
        configure(tmp_path / "a", quantization={"bits": 4, "group_size": 32, **said})
        refused(tmp_path / "a", "config.json", words)
    quanto = tmp_path / "b" / "c"
    prepared(quanto, "quanto-qint4")
    for said in ({UP: {"weights": "qint5"}}, {"another": {"weights": "qint4"}}):
        (quanto / "quanto_qmap.json").write_text(json.dumps(said))
        refused(quanto, "quanto_qmap.json", UP, "qint4")


def test_torchao_that_is_refused(tmp_path):
    codes, scales = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1)
    ao_folder(tmp_path / "a", "Int8Tensor", {"qdata": codes, "scale": scales}, block_size=[1, 64])
    wrong = [
        ("Int4TilePackedTo4dTensor", {"block_size": [1, 32]}, "Int4TilePackedTo4dTensor is not read"),
        ("Int8Tensor", {"block_size": [2, 64]}, "block_size must be [1, columns]"),
        ("Int8Tensor", {"block_size": None}, "block_size must be two numbers"),
        ("Int8Tensor", {"block_size": [1, 32]}, "shape must be (8, 2)"),
        ("IntxUnpackedToInt8Tensor", {"block_size": [1, 64], "target_dtype": {"_data": "int9"}}, "int2 to int8"),
    ]
    for kind, numbers, words in wrong:
        described(tmp_path / "a", kind, numbers)
        refused(tmp_path / "a", "model.safetensors", words)
    save_file(load_file(tmp_path / "a" / "model.safetensors"), tmp_path / "a" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "a", "the metadata must say")


def test_bitsandbytes_that_is_refused(tmp_path):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [8, 64]}

    def folder(path, said=state, count=256, **config):
        text = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        leaves = {"weight": torch.zeros(count, 1, dtype=torch.uint8), "weight.absmax": torch.ones(8),
                  "weight.quant_map": torch.zeros(16), "weight.quant_state.bitsandbytes__nf4": text}  # fmt: skip
        only_up(path, {"quant_method": "bitsandbytes", **config}, leaves)
        return path

    assert equal(lowbit.load(folder(tmp_path / "good")), {UP: torch.zeros(8, 64)})
    refused(folder(tmp_path / "1" / "a", {**state, "shape": [64, 8]}), "quant_state", "[64, 8]")
    refused(folder(tmp_path / "2" / "a", {**state, "blocksize": 0}), "blocksize", "got 0")
    refused(folder(tmp_path / "3" / "a", {}), "quant_state", "JSON object")
    refused(folder(tmp_path / "4" / "a", count=255), "must have 256 bytes", "got 255")
    refused(folder(tmp_path / "5" / "a", {**state, "blocksize": 4096}), "absmax", "shape must be (1,)")
    refused(folder(tmp_path / "6" / "a", bnb_4bit_quant_type="int3"), "bnb_4bit_quant_type", "'int3'")


@pytest.mark.parametrize("method", ["aqlm", "vptq", "quip", "exl3", "eetq", "higgs", "spqr"])
def test_other_methods_are_refused_by_name(method, tmp_path):
    folder_of(tmp_path / "a", {"quant_method": method}, lambda n, k: ({"codes": torch.zeros(n, k)}, None), SIZES)
    refused(tmp_path / "a", f"'{method}'", "which lowbit does not read", "float model")


