"""ONNX files: onnxruntime gives what the model gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lowbit
from lowbit.nn.layer import layers
from lowbit.packed.format import PackedFormat
from lowbit.testing.packed_cases import random_weight

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
NIBBLES = lowbit.Packed(bits=4, group_size=32, zeros="int")
# a form of each kind for a layer of BERT, in two models: an export takes seconds
KERNEL = {
    "attention.self.query": lowbit.Packed(bits=4, group_size=32, activations="int8", activation_group_size=32),
    "attention.self.key": lowbit.Packed(bits=8, granularity="row", activations="int8"),
    "attention.self.value": lowbit.Packed(bits=4, group_size=16, packed_zeros=True, activations="int8_static"),
    "attention.output.dense": lowbit.Packed(bits=3, group_size=16, symmetric=True),
    "intermediate.dense": lowbit.Packed(bits=2, group_size=32, zeros="float"),
    "layer.0.output.dense": NIBBLES,
    "embeddings": NIBBLES,
}
OPERATORS = {
    "attention.self.query": lowbit.Packed(bits=4, group_size=32, outliers=0.02, activations="int8"),
    "attention.self.key": lowbit.Packed(bits=4, group_size=32, outliers=0.02),
    "attention.self.value": lowbit.Packed(bits=5, group_size=12, packed_zeros=True),  # which ends before the row
    "attention.output.dense": lowbit.Codebook(bits=3),
    "intermediate.dense": lowbit.Codebook(bits=2, group_size=24, outliers=0.01),
    "layer.0.output.dense": lowbit.Codebook(table="nf4", group_size=16),
    "embeddings": lowbit.Codebook(bits=4),
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


def packed_bert(specs):
    given = {"calibration": [torch.arange(40).view(4, 10)]} if specs is KERNEL else {}
    model = lowbit.convert(bert(), {f"*{name}*": spec for name, spec in specs.items()}, **given)
    assert all(any(name in layer for layer in layers(model)) for name in specs)
    return model


def with_levels(layer, format):
    """Make a layer one of scales of two levels."""
    made = random_weight(replace(format, in_features=layer.in_features, out_features=layer.out_features))
    made.scale_factors /= 256
    held = dict(packed=made.packed, scales=made.scales, scale_factors=made.scale_factors)
    if made.zeros is not None:
        held |= dict(zeros=made.zeros, zero_factors=made.zero_factors / 256)
    layer.become(made.format, held)


def test_by_the_kernel_of_onnxruntime(onnx, tmp_path):
    model = packed_bert(KERNEL)
    signed = PackedFormat(3, 1, 64, 16, "group", "none", "float16", scale_codes="int8", scale_block=3)
    with_levels(model.encoder.layer[0].attention.output.dense, signed)
    lowbit.export(model, tmp_path / "model.onnx", format="onnx", skip=["*.position_embeddings"])
    assert isinstance(model.embeddings.position_embeddings, lowbit.PackedEmbedding)  # the model is as it was
    assert assert_same(model, tmp_path / "model.onnx").count("MatMulNBits") == 6


def test_by_operators(onnx, tmp_path):
    """The last layer has nested scales, as NF4 of bitsandbytes has; another minima, and scales of two levels."""
    model = packed_bert(OPERATORS)
    layer = model.encoder.layer[0].output.dense
    held = layer.canonical()
    absmax = held["scales"].float().flatten().view(-1, 4).amax(-1)[:1] * torch.ones(-(-held["scales"].numel() // 256))
    nested = {"scales": torch.randint(0, 256, held["scales"].shape, dtype=torch.uint8), "scale_absmax": absmax,
              "scale_codebook": torch.rand(256) / 4, "scale_offset": torch.tensor([0.02])}  # fmt: skip
    layer.become(replace(layer.format, scales="nested"), held | nested)
    minima = PackedFormat(5, 1, 64, 16, "group", "minimum", "float16", scale_codes="uint8", scale_block=3)
    with_levels(model.encoder.layer[0].attention.self.value, minima)
    lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    assert assert_same(model, tmp_path / "model.onnx").count("MatMulNBits") == 0


def test_a_tied_head_and_an_order_of_columns(onnx, tmp_path):
    """Of a model of two bytes, which stays one; the file computes in float32."""
    model = lowbit.convert(llama(tie_word_embeddings=True).bfloat16(), NIBBLES)
    layer = model.model.layers[0].mlp.up_proj
    order = torch.arange(64, dtype=torch.int32).flip(0)
    layer.become(replace(layer.format, act_order=True), {**layer.canonical(), "order": order})
    lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert assert_same(model.float(), tmp_path / "model.onnx").count("MatMulNBits") == 8


REFUSED = {
    "Kronecker": (bert, lowbit.Kronecker(), "must be of the families 'packed' or 'codebook'"),
    "pixels": (lambda: transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)),
        NIBBLES, "main input is 'pixel_values'"),
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
    model = lowbit.convert(bert(), NIBBLES)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        lowbit.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []
