"""Folders and modules in other libraries' quantized formats: refused by name before anything is computed or written."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.checkpoint import foreign
from lowbit.core.foreign import is_foreign, sign_of

transformers = pytest.importorskip("transformers", minversion="5.0")

SPEC = lowbit.Packed(bits=8)
PROJ = "model.layers.0.mlp.up_proj"
CONFIG = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=61,
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("float") / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, folder / "model.safetensors", {"format": "pt"})


def configure(folder, name="config.json", nested=None, **section):
    file = folder / name
    config = json.loads(file.read_text()) if file.exists() else {}
    if nested is None:
        config.update(section)
    else:
        config[nested] = {**config.get(nested, {}), **section}
    file.write_text(json.dumps(config))


def quantized(replace, only=None):
    """Every linear's weight replaced by the tensors that ``replace(weight)`` gives, named by what follows the layer."""

    def change(tensors):
        out = {}
        for name, tensor in tensors.items():
            layer, _, leaf = name.rpartition(".")
            is_linear = "proj" in layer and leaf == "weight" and (only is None or layer == only)
            out.update({f"{layer}.{n}": t for n, t in replace(tensor).items()} if is_linear else {name: tensor})
        return out

    return change


def fp8(w):
    scale = w.abs().amax(1, keepdim=True) / 448
    return {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_blocks(w):
    return {"weight": w.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}


def gptq(w):
    n, k = w.shape
    ints = {"qweight": (k // 8, n), "qzeros": (1, n // 8), "g_idx": (k,)}
    return {name: torch.zeros(shape, dtype=torch.int32) for name, shape in ints.items()} | {"scales": torch.ones(1, n)}


def packed_tensors(w):
    return {"weight_packed": torch.zeros(len(w), 4, dtype=torch.int32), "weight_scale": torch.ones(len(w), 1),
            "weight_shape": torch.tensor(w.shape)}  # fmt: skip


def bitnet(w):
    return {"weight": torch.zeros(len(w) // 4, w.shape[1], dtype=torch.uint8), "weight_scale": torch.ones(1)}


def bitsandbytes(w):
    return {"weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8), "weight.absmax": torch.ones(w.numel() // 64),
            "weight.quant_map": torch.ones(16)}  # fmt: skip


# what is done to the float folder, the config that says so, and the words that the error must have
FORMATS = {
    "compressed-tensors": (fp8, {"quant_method": "compressed-tensors", "format": "sparse-bitmask"}, "sparse-bitmask"),
    "fbgemm-fp8": (fp8_blocks, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "'fbgemm_fp8'"),
    "auto-round": (gptq, {"quant_method": "auto-round", "packing_format": "auto_round:nv_fp"}, "auto-round"),
    "vptq": (bitnet, {"quant_method": "vptq"}, "vptq"),
    "spqr": (bitsandbytes, {"quant_method": "spqr", "bits": 3}, "spqr"),
    "aqlm": (None, {"quant_method": "aqlm", "in_group_size": 8}, "aqlm"),
    "unheard-of": (None, {"bits": 3}, "unknown"),
}


def refused(folder, *words, spec=SPEC, calibration=()):
    target = folder.parent / "packed"
    for kwargs in ({}, *calibration):
        with pytest.raises(ValueError) as caught:
            lowbit.convert_folder(folder, target, spec, **kwargs)
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
        assert [f.name for f in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("nested", [None, "text_config"])
@pytest.mark.parametrize("name", FORMATS)
def test_declared_formats(name, nested, folder):
    change, section, word = FORMATS[name]
    if change is not None:
        rewrite(folder, quantized(change))
    if nested is None:
        configure(folder, quantization_config=section)
    else:
        configure(folder, nested=nested, quantization_config=section)
    words = [str(folder / "config.json"), word, section.get("quant_method", "unknown")]
    refused(folder, *words, *([PROJ.replace("up", "down"), "model.safetensors"] if change else []))
    with pytest.raises(ValueError, match=re.escape(words[0])):
        lowbit.load(folder)
    if nested is None:  # transformers refuses to load in one format what is in another one, where it knows that
        config = lowbit.integrations.transformers.LowbitConfig(spec=SPEC)
        with pytest.raises((ValueError, ImportError)):
            transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("change", [fp8, fp8_blocks, gptq, packed_tensors, bitnet, bitsandbytes],
                         ids=lambda change: change.__name__)  # fmt: skip
@pytest.mark.parametrize("only", [None, PROJ])
def test_undeclared_formats(change, only, folder):
    """Where no config file says a word: a tensor that no module takes, or a weight that is not stored in floats."""
    rewrite(folder, quantized(change, only))
    words = [str(folder / "model.safetensors"), "LlamaForCausalLM", PROJ if only else "model.layers.0"]
    refused(folder, *words, calibration=[{"calibration": [torch.arange(4)[None]]}])
    config = lowbit.integrations.transformers.LowbitConfig(spec=SPEC)
    with pytest.raises(ValueError, match="give the float model"):
        transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


NAMES = {  # the last part of a name: whose it is in a file; whether a module that has it is quantized
    "qweight": ("GPTQ or AWQ", True), "g_idx": ("GPTQ or AWQ", False), "weight_packed": ("compressed-tensors", True),
    "weight_zero_point": ("compressed-tensors", True), "weight_scale_inv": ("FP8 in blocks", True),
    "gate_up_proj_blocks": ("MXFP4", False), "quant_map": ("bitsandbytes, 4 bits", True),
    "nested_absmax": ("bitsandbytes, 4 bits", False), "SCB": ("bitsandbytes, 8 bits", True), "W_q": ("HQQ", True),
    "weight_qdata": ("torchao", False), "_scale": ("quanto", False), "codes": ("AQLM", False),
    "weight_scale": ("", False), "zeros": ("", False), "input_amax": ("", False), "logit_scale": ("", False),
    "weight": (None, False), "bias": (None, False), "gamma": (None, False), "q_proj": (None, False),
    "k_zero_conv": (None, False),
}  # fmt: skip


def test_names_in_files_and_on_modules():
    assert {name: (sign_of(name), is_foreign(name)) for name in NAMES} == NAMES


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_a_weight_that_is_not_stored_in_floats(dtype, folder):
    rewrite(folder, quantized(lambda w: {"weight": (w * 4).to(dtype)}, PROJ))
    refused(folder, f"'{PROJ}.weight' is stored as {str(dtype)[6:]}")


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ("model.layers.0.self_attn.k_scale", "k_scale"),
        ("model.layers.0.mlp.experts.0.up_proj.weight_scale", "weight_scale"),
        ("model.layers.0.mlp.gate_up_proj_blocks", "MXFP4"),
        ("lm_head.weight_scale", "lm_head"),
        (f"{PROJ}.bias", "up_proj.bias"),  # the model would run without it
        (f"{PROJ}.weight._data", "quanto"),
        ("score.scale", "score"),  # of a module that the model does not have
        ("score.input_scale", "input_scale"),
        ("vision_tower.layers.0.proj.weight_packed", "compressed-tensors"),
        ("mtp.0.proj.qweight", "GPTQ"),
        ("absent.weight_zero_point", "compressed-tensors"),
        ("qweight", "GPTQ"),
    ],
)
def test_a_tensor_that_no_module_takes(extra, word, folder):
    rewrite(folder, lambda tensors: {**tensors, extra: torch.ones(3)})
    refused(folder, word, repr(extra))


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_other_config_files(file, folder):
    (folder / file).write_text(json.dumps({"bits": 4, "quantization": {"quant_algo": "FP8"}}))
    refused(folder, str(folder / file))


def test_gguf_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model-q4_k.gguf").write_bytes(b"GGUF")
    refused(folder, "model-q4_k.gguf is truncated: a GGUF file has at least 24 bytes")
    (folder / "config.json").unlink()
    refused(folder, "model-q4_k.gguf is truncated")


def test_pickled_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(quantized(fp8, PROJ)(tensors), folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", PROJ)
    torch.save(tensors, folder / "pytorch_model.bin")
    lowbit.convert_folder(folder, folder.parent / "packed", SPEC)
    del tensors[f"{PROJ}.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    shutil.rmtree(folder.parent / "packed")
    refused(folder, f"'{PROJ}.weight' of LlamaForCausalLM is missing")


def test_fused_experts(tmp_path):
    """Mixtral's files hold the experts one by one, its model all in one tensor."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=61, num_local_experts=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    expert = next(n for n in load_file(folder / "model.safetensors") if "experts" in n and n.endswith(".weight"))
    rewrite(folder, lambda tensors: {**tensors, f"{expert}_scale": torch.ones(1)})
    refused(folder, f"{expert}_scale")
    rewrite(folder, lambda tensors: {n: t.to(torch.float8_e4m3fn) if n == expert else t
                                     for n, t in tensors.items() if not n.endswith("_scale")})  # fmt: skip
    refused(folder, repr(expert), "float8_e4m3fn")


@pytest.mark.parametrize(
    ("extra", "warned"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),  # transformers leaves it out without a word
        ("model.embeddings.position_ids", True),
        ("model.layers.0.self_attn.masked_bias", True),
        ("score.weight", True),  # a head that this class does not have
        ("logit_scale", True),  # learned: no layer's
        ("model.layers.7.mlp.up_proj.weight", True),
    ],
)
def test_float_folders_with_more_than_the_model_takes(extra, warned, folder):
    lowbit.convert_folder(folder, folder.parent / "plain", SPEC)
    rewrite(folder, lambda tensors: {**tensors, extra: torch.ones(2, 3)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowbit.convert_folder(folder, folder.parent / "packed", SPEC)
    texts = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert texts == ([f"left out, LlamaForCausalLM has no module for it: {extra}"] if warned else [])
    plain, packed = (load_file(folder.parent / name / "model.safetensors") for name in ("plain", "packed"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in packed.items())


def test_a_base_model_folder_with_the_tensors_of_a_head(tmp_path):
    """Names in the file have the prefix of the base model; its scales must be seen all the same."""
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=61
    )
    folder = tmp_path / "model"
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    configure(folder, architectures=["BertModel"])
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    rewrite(folder, lambda tensors: {**tensors, **pooler})
    with pytest.warns(UserWarning, match=r"left out, BertModel has no module for it: cls\.predictions"):
        lowbit.convert_folder(folder, tmp_path / "packed", SPEC)
    shutil.rmtree(tmp_path / "packed")
    rewrite(folder, lambda t: {**t, "bert.encoder.layer.0.output.dense.weight_scale": torch.ones(1)})
    refused(folder, "bert.encoder.layer.0.output.dense")


def test_learned_scales(tmp_path):
    """A model's own scales are taken; those of a tower that another class leaves out need not be anybody's codes'."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    text, vision = dict(sizes, vocab_size=61), dict(sizes, image_size=8, patch_size=4)
    folder = tmp_path / "model"
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    config = lowbit.integrations.transformers.LowbitConfig(spec=SPEC)

    def load_text():
        return transformers.CLIPTextModel.from_pretrained(folder, quantization_config=config)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowbit.convert_folder(folder, tmp_path / "packed", SPEC)
    assert lowbit.load(tmp_path / "packed").logit_scale.item() == 3.0
    shutil.rmtree(tmp_path / "packed")
    extra = "vision_model.encoder.layers.0.layer_scale1.scale"
    rewrite(folder, lambda t: {**t, extra: torch.ones(32)})
    with pytest.warns(UserWarning, match="left out, CLIPTextModel has no module for it: logit_scale"):
        load_text()
    refused(folder, extra)
    rewrite(folder, lambda t: {**t, extra.replace("scale1.scale", "scale1.weight"): torch.ones(4, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=re.escape(repr(extra))):
        load_text()


def test_an_importer_takes_its_format(folder, monkeypatch):
    def importer(folder, spec, skip):
        return lowbit.convert(transformers.LlamaForCausalLM(CONFIG), spec, skip=skip)

    monkeypatch.setitem(foreign.importers, "gptq", importer)
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    lowbit.convert_folder(folder, folder.parent / "packed", SPEC, skip=["lm_head"])
    assert isinstance(lowbit.load(folder.parent / "packed").lm_head, nn.Linear)


# ------------------------------------------------------------------------------------------------- what a folder is


def test_the_wrong_kind_of_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="holds a float model.*convert_folder"):
        lowbit.load(folder)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder$"):
        lowbit.convert_folder(tmp_path / "nowhere", tmp_path / "packed", SPEC)
    for call in (lowbit.load, lambda f: lowbit.convert_folder(f, tmp_path / "packed", SPEC)):
        with pytest.raises(FileNotFoundError, match="is not a folder but a file"):
            call(folder / "config.json")
    lowbit.convert_folder(folder, tmp_path / "packed", SPEC)
    lowbit.save(lowbit.convert(nn.Sequential(nn.Linear(32, 8)), SPEC), tmp_path / "plain")
    for name in ("packed", "plain"):
        with pytest.raises(ValueError, match="is a lowbit folder already"):
            lowbit.convert_folder(tmp_path / name, tmp_path / "again", SPEC)
    assert not (tmp_path / "again").exists()


# ----------------------------------------------------------------------------------------------------- in memory


class Other(nn.Module):
    """What layers of other libraries look like: integer codes and scales, no float weight."""

    def __init__(self, name="qweight", dtype=torch.int32):
        super().__init__()
        self.register_buffer(name, torch.zeros(4, 8).to(dtype))
        self.register_buffer("scales", torch.ones(1, 8))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "make",
    [
        Other,
        lambda: Other("weight_packed"),
        lambda: Other("weight", torch.uint8),
        lambda: Other("weight", torch.float8_e4m3fn),
        lambda: Other("W_q", torch.uint8),
        lambda: torch.ao.nn.quantized.dynamic.Linear(8, 8),
    ],
)
def test_modules_of_other_libraries_are_named(make):
    model = nn.Sequential(nn.Embedding(16, 8), nn.Sequential(make()), nn.Linear(8, 4))
    for spec in (SPEC, {"1.*": SPEC, "2": SPEC}):
        with pytest.raises(ValueError, match=r"1\.0: quantized by another library"):
            lowbit.convert(model, spec)
    assert type(model[2]) is nn.Linear
    lowbit.convert(model, {"2": SPEC})  # asked for by name
    assert type(model[0]) is nn.Embedding
    assert "another library" in model.lowbit_skipped["1.0"]
    lowbit.convert(model, SPEC, skip=["1"])
    assert model[0].format.bits == 8


def test_modules_of_transformers_integrations():
    from transformers.integrations.bitnet import AutoBitLinear

    model = nn.Sequential(nn.Linear(8, 8), AutoBitLinear(8, 8))
    with pytest.raises(ValueError, match=r"1: quantized by another library: it is a .*AutoBitLinear"):
        lowbit.convert(model, SPEC)


def test_a_model_whose_format_transformers_did_not_load(folder):
    configure(folder, quantization_config={"quant_method": "nobody-knows", "bits": 4})
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="'nobody-knows', which transformers did not load"):
        lowbit.convert(model, SPEC)
    wrapped = nn.Sequential(model)
    with pytest.raises(ValueError, match="0: config"):
        lowbit.convert(wrapped, SPEC)
    model.config.quantization_config = None
    lowbit.convert(model, SPEC)


UNREAD = {
    "scales beside codes": lambda w: {"weight": w * 9, "weight_scale_inv": torch.ones(1, 1)},
    "nameless factors": lambda w: {"weight": w * 9, "alpha": torch.ones(len(w))},
    "VPTQ": lambda w: {"indices": torch.zeros(8, 8, dtype=torch.int32), "centroids.weight": torch.ones(1, 64)},
    "QuIP": lambda w: {"Qidxs": torch.zeros(8, 8, dtype=torch.int64), "SU": torch.ones(len(w))},
    "an adapter's base": lambda w: {"base_layer.weight": w, "lora_A.weight": torch.ones(2, w.shape[1])},
}


@pytest.mark.parametrize("replace", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("cls", [transformers.LlamaForCausalLM, transformers.LlamaModel])
def test_a_model_whose_layers_transformers_left_unread(replace, cls, folder):
    """No config file says a word, and transformers only logs it: such a weight is random, or codes without scales."""
    rewrite(folder, quantized(replace, PROJ))
    model = cls.from_pretrained(folder)
    before = {name: id(module) for name, module in model.named_modules()}
    words = re.escape(f"such as '{PROJ}.")
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match=f"{cls.__name__ if whole is model else '0'}: .*unread.*{words}"):
            lowbit.convert(whole, SPEC)
    assert before == {name: id(module) for name, module in model.named_modules()}
    del model.lowbit_unread
    lowbit.convert(model, SPEC)


@pytest.mark.parametrize(("section", "format"), [("quip", "quip"), ([{"quant_method": "fp8"}], "unknown")])
def test_a_section_that_is_no_object(section, format, folder, tmp_path):
    configure(folder, quantization_config=section)
    with pytest.raises(ValueError, match=f"config.json: the model is quantized in the format '{format}'"):
        lowbit.convert_folder(folder, tmp_path / "packed", SPEC)
    with pytest.raises(ValueError, match=f"config.json: the model is quantized in the format '{format}'"):
        lowbit.load(folder)
    assert not (tmp_path / "packed").exists()


def test_an_empty_section_says_nothing(folder, tmp_path):
    configure(folder, quantization_config={})
    lowbit.convert_folder(folder, tmp_path / "packed", SPEC)
    assert lowbit.report(lowbit.load(tmp_path / "packed")).rows


def test_what_no_layer_would_have_read_is_no_matter(folder):
    extra = ("score.weight", "logit_scale", "model.layers.0.self_attn.k_scale")
    rewrite(folder, lambda tensors: {**tensors, **{name: torch.ones(1) for name in extra}})
    for cls in (transformers.LlamaForCausalLM, transformers.LlamaModel):
        lowbit.convert(cls.from_pretrained(folder), SPEC)
