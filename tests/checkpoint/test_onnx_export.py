"""ONNX files: onnxruntime gives what the model gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lowbit
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
SPECS = {
    "4-bit": lowbit.Packed(bits=4, group_size=32, zeros="int"),
    "3-bit symmetric": lowbit.Packed(bits=3, group_size=16, symmetric=True),
    "float zeros": lowbit.Packed(bits=2, group_size=32, zeros="float"),
    "5-bit, groups that end before the row": lowbit.Packed(bits=5, group_size=40),
    "8-bit by row, int8 x": lowbit.Packed(bits=8, granularity="row", activations="int8"),
    "static int8 x": lowbit.Packed(bits=4, group_size=32, activations="int8_static"),
    "outliers": lowbit.Packed(bits=4, group_size=32, outliers=0.02),
    "outliers and int8 x": lowbit.Packed(bits=4, group_size=32, outliers=0.02, activations="int8"),
    "int8 x in groups": lowbit.Packed(bits=4, group_size=32, activations="int8", activation_group_size=32),
    "k-means": lowbit.Codebook(bits=3),
    "a table for each group": lowbit.Codebook(bits=2, group_size=24, outliers=0.01),
    "nf4": lowbit.Codebook(table="nf4", group_size=16),
}


def llama(**config):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **config)).eval()


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()


def assert_same(model, file):
    """With other sizes than those it was traced with, and padding."""
    ort = pytest.importorskip("onnxruntime")
    ids, mask = torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(1)), torch.ones(3, 11).long()
    mask[1, 7:] = 0
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    expected = output.logits if hasattr(output, "logits") else output.last_hidden_state
    kept = mask.bool().numpy()
    np.testing.assert_allclose(found[kept], expected.float().numpy()[kept], rtol=1e-4, atol=1e-5)
    return [node.op_type for node in pytest.importorskip("onnx").load(file).graph.node]


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


@pytest.mark.parametrize("name", SPECS)
def test_onnxruntime_gives_the_same(name, onnx, tmp_path):
    given = {"calibration": [torch.arange(40).view(4, 10)]} if SPECS[name].needs_calibration else {}
    model = lowbit.convert(bert(), SPECS[name], **given)
    lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    operators = assert_same(model, tmp_path / "model.onnx")
    by_kernel = isinstance(SPECS[name], lowbit.Packed) and not SPECS[name].outliers and "end before" not in name
    linear = sum(layer.kind == "linear" for layer in layers(model).values())
    assert operators.count("MatMulNBits") == (linear if by_kernel else 0)


def test_a_tied_head_an_order_of_columns_and_floats(onnx, tmp_path):
    model = lowbit.convert(llama(tie_word_embeddings=True), SPECS["4-bit"])
    layer = model.model.layers[0].mlp.up_proj
    order = torch.arange(64, dtype=torch.int32).flip(0)
    layer.become(replace(layer.format, act_order=True), {**layer.canonical(), "order": order})
    lowbit.export(model, tmp_path / "model.onnx", format="onnx", skip=["*.o_proj"])
    assert isinstance(model.model.layers[0].self_attn.o_proj, lowbit.PackedLinear)  # the model is as it was
    assert assert_same(model, tmp_path / "model.onnx").count("MatMulNBits") == 7


def test_nested_scales(onnx, tmp_path):
    """As NF4 of bitsandbytes has them."""
    model = lowbit.convert(bert(), SPECS["nf4"])
    layer = model.encoder.layer[0].output.dense
    held = layer.canonical()
    absmax = held["scales"].float().flatten().view(-1, 4).amax(-1)[:1] * torch.ones(-(-held["scales"].numel() // 256))
    nested = {"scales": torch.randint(0, 256, held["scales"].shape, dtype=torch.uint8), "scale_absmax": absmax,
              "scale_codebook": torch.rand(256) / 4, "scale_offset": torch.tensor([0.02])}  # fmt: skip
    layer.become(replace(layer.format, scales="nested"), held | nested)
    lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    assert_same(model, tmp_path / "model.onnx")


def test_a_model_of_two_bytes_stays_one(onnx, tmp_path):
    """The file computes in float32."""
    model = lowbit.convert(llama().bfloat16(), SPECS["4-bit"])
    lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert_same(model.float(), tmp_path / "model.onnx")


REFUSED = {
    "Kronecker": (bert, lowbit.Kronecker(), "must be of the families 'packed' or 'codebook'"),
    "pixels": (lambda: transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)),
        SPECS["4-bit"], "main input is 'pixel_values'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written(what, tmp_path):
    make, spec, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        lowbit.export(lowbit.convert(make().eval(), spec), tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_the_error_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model = lowbit.convert(bert(), SPECS["4-bit"])
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []
