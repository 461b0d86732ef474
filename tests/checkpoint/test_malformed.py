"""Malformed files: every one is refused by every loader, before any kernel runs, naming tensor and field."""

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.checkpoint.reader import INDEX_FILE, SINGLE_FILE

LAYER = "model.layers.0.mlp.up_proj"
SPEC = lowbit.Packed(bits=3, group_size=20, zeros="int", outliers=0.02)


def skeleton():
    """A plain module with the same layer names as the transformers model."""

    class Tree(nn.Module):
        pass

    root = Tree()
    root.model = Tree()
    root.model.embed_tokens = nn.Embedding(61, 32)
    block = Tree()
    block.mlp = Tree()
    block.mlp.up_proj = nn.Linear(32, 48, bias=False)
    block.mlp.down_proj = nn.Linear(48, 32, bias=False)
    root.model.layers = nn.ModuleList([block])
    root.lm_head = nn.Linear(32, 61, bias=False)
    return root


def load_plain(folder):
    return lowbit.load(folder, skeleton())


def load_transformers(folder):
    return lowbit.load(folder)


def from_pretrained(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


LOADERS = {"plain": load_plain, "load": load_transformers, "from_pretrained": from_pretrained}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    lowbit.save(lowbit.convert(skeleton(), SPEC), root / "plain")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, logging
    except ImportError:
        return root
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=61
    )
    lowbit.save(lowbit.convert(LlamaForCausalLM(config), SPEC), root / "transformers")
    return root


@pytest.fixture(params=LOADERS)
def saved(request, originals, tmp_path):
    """(a fresh copy of the saved folder, how to load it)"""
    kind = "plain" if request.param == "plain" else "transformers"
    if not (originals / kind).exists():
        pytest.skip("transformers is not installed")
    shutil.copytree(originals / kind, tmp_path / "saved")
    return tmp_path / "saved", LOADERS[request.param]


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})


def describe(folder: Path, change) -> None:
    """Change the description in lowbit.json or config.json."""
    file = next(folder / name for name in ("lowbit.json", "config.json") if (folder / name).exists())
    content = json.loads(file.read_text())
    change(content if file.name == "lowbit.json" else content["quantization_config"])
    file.write_text(json.dumps(content))


def entry_of(description, name=LAYER):
    """The entry of one layer, split from that of the layers with the same configuration."""
    entry = next(entry for entry in description["layers"] if name in entry["names"])
    if len(entry["names"]) > 1:
        entry["names"].remove(name)
        entry = {**copy.deepcopy(entry), "names": [name]}
        description["layers"].append(entry)
    return entry


def refused(saved, *words, error=ValueError):
    folder, load = saved
    with pytest.raises(error) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_the_unchanged_folder_loads(saved):
    folder, load = saved
    assert load(folder).lm_head.format.bits == 3


# -------------------------------------------------------------------------------------------------------- values


def put(tensor, value, *index):
    def change(tensors):
        tensors[f"{LAYER}.{tensor}"] = tensors[f"{LAYER}.{tensor}"].clone()
        tensors[f"{LAYER}.{tensor}"][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("scales", float("nan"), 0, 0), ["scales", "finite"]),
        (put("scales", float("inf"), 5, 1), ["scales", "finite"]),
        (put("zeros", 8, 2, 1), ["zeros", "between 0 and 7", "8"]),
        (put("outlier_values", float("nan"), 3), ["outlier_values", "finite"]),
        (put("outlier_rows", 1, 0), ["outlier_rows"]),
        (put("outlier_rows", 9999, -1), ["outlier_rows", "9999"]),
        (put("outlier_rows", -5, 7), ["outlier_rows", "smallest step -"]),
        (put("outlier_columns", 32, 0), ["outlier_columns", "[0, 32)", "32"]),
        (put("outlier_columns", 0, slice(None)), ["outlier_columns", "increase"]),
    ],
    ids=["nan-scale", "inf-scale", "zero-too-large", "nan-outlier", "rows-first", "rows-last", "rows-negative",
         "column-out-of-range", "columns-unsorted"],
)  # fmt: skip
def test_values_out_of_range(change, words, saved):
    rewrite(saved[0], change)
    refused(saved, LAYER, *words)


# ---------------------------------------------------------------------------------------------- tensors and files


def replace(tensor, change_tensor):
    def change(tensors):
        tensors[f"{LAYER}.{tensor}"] = change_tensor(tensors[f"{LAYER}.{tensor}"]).clone().contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.scales"), [f"{LAYER}.scales", "missing"]),
        (lambda t: t.pop(f"{LAYER}.packed"), [f"{LAYER}.packed", "missing"]),
        (lambda t: t.pop(f"{LAYER}.zeros"), [f"{LAYER}.zeros", "missing"]),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(48, 32)}), [f"{LAYER}.weight", "belong"]),
        (lambda t: t.update({f"{LAYER}.x_scale": torch.ones(1)}), [f"{LAYER}.x_scale", "belong"]),
        (lambda t: t.update({"somewhere.else": torch.ones(1)}), ["somewhere.else", "belongs to no module"]),
        (replace("packed", lambda t: t[:-1]), ["packed", "shape", "(47, 3)"]),
        (replace("packed", lambda t: t.T), ["packed", "shape"]),
        (replace("packed", lambda t: t.to(torch.int64)), ["packed", "dtype", "int64"]),
        (replace("packed", lambda t: t.float()), ["packed", "dtype", "float32"]),
        (replace("scales", lambda t: t.float()), ["scales", "dtype", "float32"]),
        (replace("scales", lambda t: t[:, :1]), ["scales", "shape"]),
        (replace("zeros", lambda t: t.half()), ["zeros", "dtype", "float16"]),
        (replace("outlier_columns", lambda t: t.to(torch.int32)), ["outlier_columns", "dtype"]),
        (replace("outlier_values", lambda t: t[1:]), ["outlier_values", "shape"]),
        (replace("outlier_rows", lambda t: t[1:]), ["outlier_rows", "shape"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_tensors_that_disagree_with_the_description(change, words, saved):
    rewrite(saved[0], change)
    refused(saved, *words, *([] if "somewhere.else" in words else [LAYER]))


def test_missing_float_tensor(saved):
    folder, load = saved
    if load is load_plain:
        pytest.skip("the plain model has packed layers only")
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    refused(saved, "model.norm.weight", "missing")


def header_of(folder: Path):
    data = (folder / SINGLE_FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(folder: Path, header, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def field(name, value):
    def change(header):
        header[f"{LAYER}.packed"][name] = value

    return change


def overlap(header):
    begin, end = header[f"{LAYER}.packed"]["data_offsets"]
    header[f"{LAYER}.packed"]["data_offsets"] = [begin - 4, end - 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (field("dtype", "Q3"), ["dtype", "Q3"]),
        (field("dtype", ["I32"]), ["dtype"]),
        (field("shape", [48, -3]), ["shape", "-3"]),
        (field("shape", "48"), ["shape", "48"]),
        (field("shape", [48, 3.0]), ["shape"]),
        (field("shape", [1 << 62, 1 << 62]), ["data_offsets"]),
        (field("data_offsets", [0]), ["data_offsets"]),
        (field("data_offsets", [0, 1 << 60]), ["data_offsets"]),
        (overlap, ["data_offsets"]),
        (lambda header: header[f"{LAYER}.packed"].pop("shape"), ["shape"]),
        (lambda header: header.update({f"{LAYER}.packed": 3}), ["dtype, shape and data_offsets"]),
    ],
)
def test_bad_header_fields(change, words, saved):
    header, data = header_of(saved[0])
    change(header)
    write_header(saved[0], header, data)
    # an overlap is noticed at whichever of the two tensors comes second
    refused(saved, SINGLE_FILE, *([] if change is overlap else [f"{LAYER}.packed"]), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda data: data[:-10], ["truncated"]),
        (lambda data: data[: len(data) // 2], ["truncated"]),
        (lambda data: data[:100], ["truncated"]),
        (lambda data: data[:5], ["truncated"]),
        (lambda data: b"", ["truncated"]),
        (lambda data: data + b"12345678", ["end at byte"]),
        (lambda data: struct.pack("<Q", 1 << 40) + data[8:], ["header"]),
        (lambda data: struct.pack("<Q", 64) + data[8:], ["not valid JSON"]),
        (lambda data: data[:8] + b"[" + data[9:], ["not valid JSON"]),
        (lambda data: data[:8] + b"\xff\xfe" + data[10:], ["not valid JSON"]),
    ],
)
def test_truncated_and_garbled_files(content, words, saved):
    file = saved[0] / SINGLE_FILE
    file.write_bytes(content(file.read_bytes()))
    refused(saved, SINGLE_FILE, *words)


def test_duplicate_tensor_names(saved):
    header, data = header_of(saved[0])
    text = json.dumps(header)
    twice = text[:-1] + f', "{LAYER}.packed": {json.dumps(header[f"{LAYER}.packed"])}}}'
    write_header(saved[0], twice.encode(), data)
    refused(saved, SINGLE_FILE, f"{LAYER}.packed", "duplicate")


# ---------------------------------------------------------------------------------------------------- description


def set_format(name, value):
    return lambda description: entry_of(description)["format"].update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format_version="3.0"), ["format_version", "3.0"]),
        (lambda d: d.update(format_version="0.9"), ["format_version", "0.9"]),
        (lambda d: d.update(format_version=1), ["format_version"]),
        (lambda d: d.pop("format_version"), ["format_version"]),
        (lambda d: d.update(surprise=1), ["surprise"]),
        (lambda d: d.update(layers={}), ["layers"]),
        (lambda d: d.update(layers=[3]), ["layers"]),
        (lambda d: entry_of(d).update(names=[]), ["names"]),
        (lambda d: entry_of(d)["names"].append(LAYER), ["names", LAYER]),
        (lambda d: d["layers"].append(entry_of(d)), ["names", "unique"]),
        (lambda d: entry_of(d).update(family="magic"), [LAYER, "family", "magic"]),
        (lambda d: entry_of(d).update(kind=""), [LAYER, "kind"]),
        (lambda d: entry_of(d).update(kind="convolution"), [LAYER, "kind", "convolution"]),
        (lambda d: entry_of(d).update(family=["packed"]), [LAYER]),
        (lambda d: entry_of(d).update(dtype="int8"), [LAYER, "dtype", "int8"]),
        (lambda d: entry_of(d).update(bias="no"), [LAYER, "bias"]),
        (lambda d: entry_of(d).update(colour="red"), [LAYER, "colour"]),
        (lambda d: entry_of(d).update(format=7), [LAYER, "format"]),
        (set_format("bits", 9), [LAYER, "bits", "9"]),
        (set_format("bits", "4"), [LAYER, "bits"]),
        (set_format("group_size", 0), [LAYER, "group_size"]),
        (set_format("group_size", 33), [LAYER, "group_size", "33"]),
        (set_format("outliers", -1), [LAYER, "outliers"]),
        (set_format("zeros", "maybe"), [LAYER, "zeros", "maybe"]),
        (set_format("scale_dtype", "float8"), [LAYER, "scale_dtype", "float8"]),
        (set_format("codebook", 3), [LAYER, "codebook"]),
        (lambda d: entry_of(d)["format"].pop("bits"), [LAYER, "bits"]),
        (lambda d: d.update(tied=[["nobody", LAYER]]), ["tied", "nobody"]),
        (lambda d: d.update(tied=[[LAYER, "lm_head"]]), ["tied", LAYER]),
        (lambda d: d.update(weight_error={LAYER: "small"}), ["weight_error", LAYER]),
        (lambda d: d.update(weight_error={"nobody": 0.1}), ["weight_error", "nobody"]),
        (lambda d: d.update(skipped={"x": 1}), ["skipped", "x"]),
        # consistent in itself, but not with the files or the model
        (set_format("bits", 4), [f"{LAYER}.packed", "shape"]),
        (set_format("group_size", 32), [f"{LAYER}.", "shape"]),
        (set_format("outliers", 1), [f"{LAYER}.outlier_values", "shape"]),
        (set_format("scale_dtype", "float32"), [f"{LAYER}.scales", "dtype"]),
        (set_format("zeros", "none"), [f"{LAYER}.zeros"]),
        (set_format("zeros", "float"), [f"{LAYER}.zeros", "dtype"]),
        (set_format("activations", "int8_static"), [f"{LAYER}.x_scale", "missing"]),
        (set_format("out_features", 47), [LAYER, "shape"]),
        (set_format("in_features", 31), [LAYER, "shape"]),
        (lambda d: entry_of(d).update(bias=True), [LAYER, "bias"]),
        (lambda d: entry_of(d).update(kind="embedding"), [LAYER]),
        (lambda d: entry_of(d)["names"].append("model.layers.7.mlp.up_proj"), ["model.layers.7.mlp.up_proj"]),
        (lambda d: (d["layers"].remove(entry_of(d)), d.update(weight_error={})), [LAYER]),
    ],
)  # fmt: skip
def test_bad_descriptions(change, words, saved):
    describe(saved[0], change)
    refused(saved, *words)


def test_a_later_minor_version_may_add_fields(saved):
    describe(saved[0], lambda description: description.update(format_version="2.7", novelty=True))
    folder, load = saved
    assert load(folder).lm_head.format.bits == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": "1.0", "format_version": "1.0"}', "\x00"])
def test_metadata_that_is_not_json(text, originals, tmp_path):
    shutil.copytree(originals / "plain", tmp_path / "saved")
    (tmp_path / "saved" / "lowbit.json").write_text(text)
    with pytest.raises(ValueError, match=r"lowbit\.json"):
        load_plain(tmp_path / "saved")


@pytest.mark.parametrize("shared", [[], {"lm_head.packed": "nowhere"}, {"nowhere": "lm_head.packed"}])
def test_bad_shared_names(shared, originals, tmp_path):
    shutil.copytree(originals / "plain", tmp_path / "saved")
    describe(tmp_path / "saved", lambda description: description.update(shared=shared))
    with pytest.raises(ValueError, match="shared must"):
        load_plain(tmp_path / "saved")


# ------------------------------------------------------------------------------------------------------------ index


def shard(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, folder / f"part{number}.safetensors", {"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"part{number}.safetensors"))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / SINGLE_FILE).unlink()


@pytest.mark.parametrize("kind", ["plain", "transformers"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: None, []),
        (lambda m: m.update({f"{LAYER}.packed": "part7.safetensors"}), ["part7.safetensors"]),
        (lambda m: m.update({f"{LAYER}.packed": "../saved/part0.safetensors"}), ["../saved"]),
        (lambda m: m.update({f"{LAYER}.packed": 3}), ["weight_map"]),
        (lambda m: m.pop(f"{LAYER}.packed"), [f"{LAYER}.packed", "not in the index"]),
        (lambda m: m.update({"ghost": "part0.safetensors"}), ["ghost", "in no shard"]),
    ],
)
def test_index_of_shards(change, words, kind, originals, tmp_path):
    folder = tmp_path / "saved"
    if not (originals / kind).exists():
        pytest.skip("transformers is not installed")
    shutil.copytree(originals / kind, folder)
    shard(folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))
    load = load_plain if kind == "plain" else load_transformers
    if words:
        refused((folder, load), *words, error=(ValueError, FileNotFoundError))
    else:
        assert load(folder).lm_head.format.bits == 3


def test_the_same_tensor_in_two_shards(originals, tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(originals / "plain", folder)
    shard(folder)
    name = next(iter(load_file(folder / "part0.safetensors")))
    both = {**load_file(folder / "part1.safetensors"), name: torch.zeros(1)}
    save_file(both, folder / "part1.safetensors", {"format": "pt"})
    refused((folder, load_plain), name, "is also in")
