"""``convert``, ``dequantize`` and ``report``: what is swapped, what is refused, and that refusals change nothing."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Packed, PackedEmbedding, PackedLinear
from lowbit.nn.layer import canonical_state_dict, layers
from lowbit.testing.numerics import assert_bitwise_equal


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied embedding and head, a shared block, a frozen layer."""

    def __init__(self, d=40, vocab=50):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, d, padding_idx=0)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.blocks.append(self.blocks[0])
        self.head = nn.Linear(d, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[1].up.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def ids():
    return torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def snapshot(model):
    return {name: (id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)}


@torch.no_grad()
def test_one_spec_swaps_every_layer_in_place(ids):
    model = Model().eval()
    before = model(ids)
    assert lowbit.convert(model, Packed(bits=8, group_size=20)) is model
    kinds = {name: type(layer) for name, layer in layers(model, duplicates=True).items()}
    assert kinds == {
        "embed": PackedEmbedding,
        **{f"blocks.{i}.{part}": PackedLinear for i in range(3) for part in ("up", "down")},
        "head": PackedLinear,
    }
    assert model.blocks[2] is model.blocks[0]
    assert model.head.packed is model.embed.packed and model.head.scales is model.embed.scales
    assert not any(module.training for module in model.modules())
    assert float((model(ids) - before).norm() / before.norm()) < 0.02
    assert model.embed.padding_idx == 0


def test_biases_are_kept_as_they_are():
    model = Model()
    bias = model.blocks[0].up.bias
    lowbit.convert(model, Packed())
    assert model.blocks[0].up.bias is bias and bias.requires_grad
    assert not model.blocks[1].up.bias.requires_grad


def test_patterns_the_last_match_counts():
    model = Model()
    lowbit.convert(model, {"*": Packed(bits=4), "*.down": Packed(bits=8), "blocks.1": Packed(bits=2), "embed": None})
    bits = {name: layer.format.bits for name, layer in layers(model).items()}
    assert bits == {"blocks.0.up": 4, "blocks.0.down": 8, "blocks.1.up": 2, "blocks.1.down": 2}
    assert type(model.head) is nn.Linear and model.head.weight is model.embed.weight
    assert model.lowbit_skipped == {"embed": "no spec for it", "head": "no spec for it"}


def test_a_tied_pair_is_one_layer_with_two_names():
    model = Model()
    lowbit.convert(model, {"*": Packed(bits=4), "embed": Packed(bits=2, granularity="row", activations="int8")})
    assert model.embed.format.bits == model.head.format.bits == 2
    assert model.head.format.activations == "int8" and model.embed.format.activations == "float"


def test_skipping_one_of_a_tied_pair_unties_it():
    model = Model()
    weight = model.head.weight
    lowbit.convert(model, Packed(bits=4), skip=["head"])
    assert isinstance(model.embed, PackedEmbedding) and type(model.head) is nn.Linear
    assert model.head.weight is weight
    assert model.lowbit_skipped == {
        "head": "skipped by the caller; untied: a float copy of 8000 bytes is kept (embed is packed)"
    }


REFUSED = {
    "group larger than K": (Packed(group_size=64), {}, r"embed, .*: group_size .* got group_size=64, K=40"),
    "every layer is named": (
        Packed(group_size=64), {}, r"(?s)embed, head and 2 more .*K=40.*skip=\['embed', 'blocks.\*.up', 'head'\]"),
    "pattern without match": ({"*.mlp.*": Packed()}, {}, r"spec pattern '\*\.mlp\.\*': matches no layer"),
    "skip without match": (Packed(), {"skip": ["lm_head"]}, r"skip pattern 'lm_head' matches no layer"),
    "pattern never decides": (
        {"blocks.*": Packed(), "*": Packed(bits=2)}, {}, r"spec pattern 'blocks\.\*': a later pattern takes"),
    "all of it skipped": ({"head": Packed()}, {"skip": ["head", "embed"]}, r"every layer it matches is skipped"),
    "everything skipped": (Packed(), {"skip": ["*"]}, r"nothing to convert: no layer was left"),
    "nothing trained quantized": (None, {}, r"nothing to convert: no module of the model was trained quantized"),
    "gptq without data": (Packed(quantizer="gptq"), {}, r"head: quantizer='gptq' needs calibration data"),
    "static without data": (
        {"*.up": Packed(activations="int8_static")}, {}, r"blocks.0.up: activations='int8_static' needs calib"),
    "layer that cannot": ({"blocks.0.norm": Packed()}, {}, r"spec pattern 'blocks.0.norm': matches no layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_layer_and_change_nothing(name):
    spec, arguments, message = REFUSED[name]
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lowbit.convert(model, spec, **arguments)
    assert snapshot(model) == before


def test_a_weight_that_is_not_finite_is_refused_before_anything_changed():
    model = Model()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 4] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.down: the weight must be finite"):
        lowbit.convert(model, Packed())
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("spec", "skip", "message"),
    [
        ("4bit", (), "spec must be None, a Packed, Codebook or Kronecker, or a mapping"),
        ({"*": 4}, (), r"'\*': 4"),
        (Packed(), "head", "not a string"),
    ],
)
def test_arguments_of_the_wrong_type(spec, skip, message):
    with pytest.raises(TypeError, match=message):
        lowbit.convert(Model(), spec, skip=skip)


SPECS = [
    (dict(bits=1), "bits must be an integer between 2 and 8: got bits=1"),
    (dict(bits=9), "got bits=9"),
    (dict(bits=True), "got bits=True"),
    (dict(group_size=0), "group_size must be an integer of at least 1: got group_size=0"),
    (dict(group_size=-1), "got group_size=-1"),
    (dict(granularity="row", group_size=32), "group_size goes with granularity='group'"),
    (dict(granularity="column"), "granularity must be one of 'tensor', 'row', 'group': got granularity='column'"),
    (dict(quantizer="best"), "quantizer must be one of"),
    (dict(quantizer="mean"), "requires symmetric=True"),
    (dict(activations="int4"), "activations must be one of"),
    (dict(activation_group_size=64), "goes with activations='int8' .*=64, activations='float'"),
    (dict(activations="int8_static", activation_group_size=64), "activations='int8' and only with it"),
    (dict(activations="int8", activation_group_size=48), "a positive multiple of 32 or None: got .*=48"),
    (dict(activations="int8", activation_group_size=0), "a positive multiple of 32 or None: got .*=0"),
    (dict(activations="int8", activation_group_size=True), "a positive multiple of 32 or None: got .*=True"),
    (dict(activations="int8", activation_group_size=64, group_size=96), "got activation_group_size=64, group_size=96"),
    (dict(outliers=0.5), "outliers must be a fraction between 0 and 0.1: got outliers=0.5"),
    (dict(gamma=0), "gamma must be"),
    (dict(gamma=float("inf")), "gamma must be"),
    (dict(symmetric="no"), "symmetric must be"),
    (dict(symmetric=True, zeros="float"), "zeros"),
    (dict(scale_dtype=torch.int8), "scale_dtype must be float32, float16 or bfloat16"),
]


@pytest.mark.parametrize(("fields", "message"), SPECS, ids=[str(fields) for fields, _ in SPECS])
def test_specs_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Packed(**fields)


def test_defaults():
    """docs/quality.md shows the measurements behind them."""
    for bits, zeros in ((2, "float"), (3, "float"), (4, "float"), (5, "int"), (8, "int")):
        spec = Packed(bits=bits)
        assert (spec.quantizer, spec.zeros, spec.granularity, spec.symmetric) == ("mse", zeros, "group", False)
        assert spec == Packed(bits=bits, granularity="group") and spec != Packed(bits=bits, granularity="row")
        for k, size in ((1, 1), (48, 48), (64, 64), (172, 64), (4096, 64)):
            assert spec.problem(8, k) is None
            weight = torch.randn(8, k)
            planned, made = spec.format(weight, "linear"), spec.quantize(weight).format()
            assert planned == made and made.group_size == size and made.groups == -(-k // size)
    assert Packed(symmetric=True).format(torch.empty(8, 100), "linear").zeros == "none"
    assert Packed(bits=8, granularity="row").format(torch.empty(8, 100), "linear").group_size == 100


@pytest.mark.parametrize(("k", "columns", "size"), [
    (256, 32, 64), (256, 64, 64), (256, 128, 64), (256, 96, 32), (256, 160, 32), (48, 32, 32), (20, 32, 16), (1, 32, 1),
])  # fmt: skip
def test_the_default_group_fits_groups_of_activations(k, columns, size):
    spec = Packed(bits=4, activations="int8", activation_group_size=columns)
    layer = lowbit.convert(nn.Linear(k, 16), spec)
    assert layer.format.group_size == size
    assert torch.isfinite(layer(torch.randn(3, k))).all()


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    spec = Packed(bits=numpy.int64(4), group_size=numpy.int32(8))
    assert spec == Packed(bits=4, group_size=8)
    layer = lowbit.convert(nn.Linear(16, 8), spec)
    assert json.loads(json.dumps(layer.format.to_dict())) == layer.format.to_dict()


def test_layers_that_cannot_be_swapped_stay_and_the_report_says_why(ids):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(8, 8)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.normed_by_a_hook = nn.utils.weight_norm(nn.Linear(8, 8))
            self.capped = nn.Embedding(5, 8, max_norm=1.0)
            self.attention = nn.MultiheadAttention(8, 2)
            self.bias_buffer = nn.Linear(8, 8)
            bias = self.bias_buffer.bias.detach()
            del self.bias_buffer.bias
            self.bias_buffer.register_buffer("bias", bias)
            self.patched = nn.Linear(8, 8)
            self.patched.forward = lambda x: x

    model = Odd()
    kept = {name: module for name, module in model.named_modules() if name not in ("", "plain")}
    lowbit.convert(model, Packed())
    assert isinstance(model.plain, PackedLinear)
    assert set(model.lowbit_skipped) == {
        "normed", "normed_by_a_hook", "capped", "attention.out_proj", "bias_buffer", "patched"
    }  # fmt: skip
    assert all(model.lowbit_skipped.values())
    assert all(model.get_submodule(name) is module for name, module in kept.items())
    assert "float: capped: max_norm" in str(lowbit.report(model))


def test_a_converted_model_is_not_converted_again():
    model = lowbit.convert(Model(), Packed())
    with pytest.raises(ValueError, match="already has 6 packed layers"):
        lowbit.convert(model, Packed())


def test_a_model_that_is_one_layer_is_returned_swapped():
    layer = nn.Linear(16, 8)
    packed = lowbit.convert(layer, Packed(bits=8))
    assert isinstance(packed, PackedLinear) and packed.bias is layer.bias
    assert type(lowbit.dequantize(packed)) is nn.Linear


def test_transformer_encoder_layers_run_our_kernels_not_the_fused_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    before = model(x)
    lowbit.convert(model, Packed(bits=8))
    with torch.no_grad():
        after = model(x)
    assert float((after - before).norm() / before.norm()) < 0.05


@torch.no_grad()
def test_transformer_encoders_with_padding():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    before = model(x, src_key_padding_mask=padding)[~padding]
    lowbit.convert(model, Packed(bits=8))
    after = model(x, src_key_padding_mask=padding)[~padding]
    assert float((after - before).norm() / before.norm()) < 0.02


def test_a_failed_calibration_leaves_transformer_layers_as_they_were():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    fused, before = layer.activation_relu_or_gelu, snapshot(layer)
    assert fused
    with pytest.raises(Exception, match="16"):
        lowbit.convert(
            layer, {"linear1": Packed(), "linear2": Packed(quantizer="gptq")}, calibration=[torch.randn(2, 5, 7)]
        )
    assert layer.activation_relu_or_gelu == fused and snapshot(layer) == before


def test_hooks_survive():
    model, calls = Model(), []
    model.blocks[0].up.register_forward_hook(lambda *_: calls.append("after"))
    model.blocks[0].up.register_forward_pre_hook(lambda *_: calls.append("before"))
    lowbit.convert(model, Packed())
    model.blocks[0](torch.randn(1, 40))
    assert calls == ["before", "after"]
    lowbit.dequantize(model)
    model.blocks[0](torch.randn(1, 40))
    assert calls == ["before", "after"] * 2


def test_backward_hooks_survive():
    model, calls = Model(), []
    model.blocks[0].up.register_full_backward_hook(lambda *_: calls.append("after"))
    model.blocks[0].up.register_full_backward_pre_hook(lambda *_: calls.append("before"))
    lowbit.convert(model, Packed())
    model.blocks[0](torch.randn(1, 40, requires_grad=True)).sum().backward()
    assert calls == ["before", "after"]


class BartScaledWordEmbedding(nn.Embedding):
    def __init__(self, *args, embed_scale, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = embed_scale

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", [1.0, 6.5])
def test_embeddings_there_and_back(ids, scale, training):
    torch.manual_seed(0)
    if scale == 1.0:
        embedding = nn.Embedding(50, 40, padding_idx=3)
    else:
        embedding = BartScaledWordEmbedding(50, 40, padding_idx=3, embed_scale=scale)
    model = nn.Sequential(embedding, nn.Linear(40, 8)).train(training)
    lowbit.convert(model, Packed(bits=4, group_size=20))
    layer = model[0]
    assert isinstance(layer, PackedEmbedding) and layer.output_scale == scale
    y = layer(ids).detach()
    assert_bitwise_equal(y, nn.functional.embedding(ids, layer.dequantize()) * scale)
    assert [packed.to_float().training for packed in model] == [training] * 2
    lowbit.dequantize(model)
    assert isinstance(model[0], nn.Embedding) and model[0].padding_idx == 3
    assert [module.training for module in model.modules()] == [training] * 3
    assert_bitwise_equal(model[0](ids).detach(), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("quantizer", ["minmax", "mse", "gptq", "descent"])
@pytest.mark.parametrize("activations", ["float", "int8", "int8_static"])
def test_the_default_dtype_changes_nothing(ids, activations, quantizer, dtype):
    original = Model().eval()
    spec = Packed(bits=4, group_size=20, outliers=0.02, quantizer=quantizer, activations=activations)

    @torch.no_grad()
    def run():
        model = lowbit.convert(copy.deepcopy(original), spec, calibration=[ids])
        return {**model.state_dict(), "y": model(ids)}

    default = torch.get_default_dtype()
    with lowbit.use_backend("reference"):
        expected = run()
        torch.set_default_dtype(dtype)
        try:
            found = run()
        finally:
            torch.set_default_dtype(default)
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name], tensor)


@pytest.mark.parametrize("quantizer", ["minmax", "mse", "gptq", "descent"])
def test_autocast_changes_nothing(ids, quantizer):
    original = Model().eval()
    spec = Packed(bits=4, group_size=20, quantizer=quantizer)
    calibration = [ids] if quantizer in ("gptq", "descent") else None
    expected = lowbit.convert(copy.deepcopy(original), spec, calibration=calibration)
    with torch.autocast("cpu", torch.bfloat16):
        found = lowbit.convert(copy.deepcopy(original), spec, calibration=calibration)
    for name, tensor in expected.state_dict().items():
        assert_bitwise_equal(found.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_models_of_every_dtype(ids, dtype):
    model = Model().to(dtype).eval()
    reference = copy.deepcopy(model).float()(ids)
    lowbit.convert(model, Packed(bits=8, group_size=20))
    y = model(ids)
    assert y.dtype == dtype and model.blocks[0].up.weight.dtype == dtype
    assert float((y.float() - reference).norm() / reference.norm()) < 0.04


def test_moves_keep_the_packed_form_bit_identical(ids):
    model = lowbit.convert(Model(), Packed(bits=3, group_size=16, outliers=0.02, zeros="float")).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(ids)
    for moved in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16().float()):
        assert moved.head.packed is moved.embed.packed
        for name, tensor in moved.state_dict().items():
            if "norm" not in name and "bias" not in name:
                assert_bitwise_equal(tensor, state[name])
    assert_bitwise_equal(pickle.loads(pickle.dumps(model))(ids), y)
    half = copy.deepcopy(model).half()
    assert half.blocks[0].up.weight.dtype == half.blocks[0].up.bias.dtype == torch.float16
    assert half.blocks[0].up.scales.dtype == model.blocks[0].up.scales.dtype


def test_state_dict_round_trip(ids):
    model = lowbit.convert(Model(), Packed(bits=5, group_size=16)).eval()
    other = Model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    lowbit.convert(other, Packed(bits=5, group_size=16)).eval()
    other.load_state_dict(model.state_dict())
    assert_bitwise_equal(other(ids), model(ids))


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("scales", lambda t: t.float(), r"blocks\.0\.up\.scales must be torch.float16: got torch.float32"),
        ("scales", lambda t: t * float("nan"), r"blocks\.0\.up\.scales must be finite"),
        ("packed", lambda t: t[:, 1:], r"blocks\.0\.up\.packed must have shape"),
        ("zeros", lambda t: t + 200, r"blocks\.0\.up\.zeros must be between 0 and 31 at bits=5: got 2"),
    ],
)
def test_a_malformed_state_dict_is_refused(tensor, change, message):
    model = lowbit.convert(Model(), Packed(bits=5, group_size=16))
    state = dict(model.state_dict())
    state[f"blocks.0.up.{tensor}"] = change(state[f"blocks.0.up.{tensor}"])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_a_state_dict_of_another_group_size_is_refused():
    weight = torch.randn(8, 128)
    layers = [PackedLinear.from_float(weight, Packed(group_size=size)) for size in (64, 100)]
    assert layers[0].scales.shape == layers[1].scales.shape
    with pytest.raises((RuntimeError, ValueError), match="group_size"):
        layers[1].load_state_dict(layers[0].state_dict())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_weight_errors_of_extreme_magnitudes(magnitude, symmetric, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16))
    with torch.no_grad():
        model[0].weight.mul_(magnitude)
    weight = model[0].weight.detach().double()
    lowbit.convert(model, Packed(bits=4, group_size=8, symmetric=symmetric))
    exact = float((model[0].dequantize().double() - weight).norm() / weight.norm())
    assert 0.01 < exact < 0.2 and model[0].weight_error == pytest.approx(exact, rel=1e-4)
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, nn.Sequential(nn.Linear(40, 16)))
    assert_bitwise_equal(other[0].dequantize(), model[0].dequantize())
    assert other[0].weight_error == pytest.approx(exact, rel=1e-4)


def test_dequantize_is_the_way_back(ids):
    model = lowbit.convert(Model(), Packed(bits=6, group_size=8)).eval()
    y = model(ids)
    weight = model.blocks[1].up.dequantize()
    assert lowbit.dequantize(model) is model
    assert not layers(model) and type(model.blocks[1].up) is nn.Linear and type(model.embed) is nn.Embedding
    assert model.head.weight is model.embed.weight and model.blocks[2] is model.blocks[0]
    assert_bitwise_equal(model.blocks[1].up.weight.detach(), weight)
    assert float((model(ids) - y).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="no packed layer"):
        lowbit.dequantize(model)


def test_meta_models_take_the_shape_of_the_real_conversion():
    spec = {"*": Packed(bits=3, group_size=16, outliers=0.01), "*.down": Packed(bits=8)}
    real = lowbit.convert(Model(), spec)
    with torch.device("meta"):
        meta = Model()
    bias = meta.blocks[1].up.bias
    lowbit.convert(meta, spec)
    assert meta.head.packed is meta.embed.packed
    assert isinstance(bias, nn.Parameter) and meta.blocks[1].up.bias is bias
    assert list(meta.state_dict()) == list(real.state_dict())
    stored = canonical_state_dict(real)
    for name, tensor in meta.state_dict().items():
        assert tensor.is_meta
        assert (tensor.shape, tensor.dtype) == (stored[name].shape, stored[name].dtype), name


def test_calibration_beats_plain_rounding_and_restores_the_model_on_error(ids):
    model, data = Model().eval(), [torch.randint(0, 50, (64, 7))]
    reference = model(ids)

    def error(quantizer):
        converted = copy.deepcopy(model)
        lowbit.convert(
            converted, {"*": Packed(bits=3, group_size=20, quantizer=quantizer), "embed": None}, calibration=data
        )
        return float((converted(ids) - reference).norm() / reference.norm())

    assert error("gptq") < 0.9 * error("minmax")
    broken = copy.deepcopy(model)
    broken.head.forward = None  # the forward fails in the middle of calibration
    before = snapshot(broken)
    with pytest.raises(TypeError):
        lowbit.convert(broken, Packed(bits=3, quantizer="gptq"), calibration=data)
    assert snapshot(broken) == before


def test_conversion_inside_inference_mode(ids):
    with torch.inference_mode():
        model = lowbit.convert(Model(), Packed(bits=4, quantizer="gptq"), calibration=[ids])
    x = torch.randn(2, 40, requires_grad=True)
    model.blocks[0].up(x).sum().backward()
    assert float(x.grad.norm()) > 0


def test_static_activations_are_calibrated(ids):
    model = Model().eval()
    reference = model(ids)
    lowbit.convert(model, Packed(bits=8, activations="int8_static"), calibration=[ids])
    assert float(model.blocks[0].up.x_scale) > 0 and model.embed.x_scale is None
    assert float((model(ids) - reference).norm() / reference.norm()) < 0.05


def test_an_input_that_is_always_zero_gets_a_static_scale():
    spec = Packed(bits=8, activations="int8_static")
    model = lowbit.convert(nn.Sequential(nn.Linear(16, 8)), spec, calibration=[torch.zeros(3, 16)])
    assert float(model[0].x_scale) == 1.0
    assert bool(torch.isfinite(model(torch.randn(3, 16))).all())


def test_a_failed_calibration_restores_every_name_of_a_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again, self.last = self.first, nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.again(self.first(x)))[:, 100]

    model = Twice()
    before = snapshot(model)
    with pytest.raises(IndexError):
        lowbit.convert(model, {"first": Packed(), "last": Packed(quantizer="gptq")}, calibration=[torch.randn(3, 8)])
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------------------- report


def test_report_counts_every_byte(ids):
    model = Model()
    float_model = copy.deepcopy(model)
    spec = Packed(bits=4, group_size=20)
    planned = lowbit.convert(model, spec, dry_run=True)
    assert not layers(model)
    lowbit.convert(model, spec)
    report = lowbit.report(model, ids, reference=float_model)
    planned_bytes = {row.name: row.bytes_after for row in planned.rows}
    assert planned_bytes == {row.name: row.bytes_after for row in report.rows}
    assert report.total_before == sum(p.numel() * 4 for p in float_model.parameters())
    assert report.total_after == sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    rows = {row.name: row for row in report.rows}
    # K=40: 2 blocks of 32 codes of 4 bits, 2 scales of 2 bytes, 2 zeros of 2 bytes
    assert rows["embed"].bytes_after == 50 * (2 * 16 + 4 + 4) and rows["embed"].bytes_before == 50 * 40 * 4
    assert rows["head"].shares == "embed" and rows["head"].bytes_after == 0
    assert rows["embed"].bits_per_weight == pytest.approx(8 * 40 / 40)
    up = rows["blocks.0.up"]
    assert 0.01 < up.weight_error < 0.2 and up.kernel_error < 1e-5 and 0.01 < up.output_error < 0.2
    weight = float_model.blocks[0].up.weight
    exact = (model.blocks[0].up.dequantize() - weight).norm() / weight.norm()
    assert up.weight_error == pytest.approx(float(exact), rel=1e-4)
    assert report.to_dict()["ratio"] == pytest.approx(report.total_before / report.total_after)
    assert "x smaller" in str(report) and "blocks.1.down" in str(report)


def test_report_of_a_float_model_is_an_error():
    with pytest.raises(ValueError, match="no packed layer"):
        lowbit.report(Model())


def test_report_measures_a_wrong_kernel(ids, monkeypatch):
    model = lowbit.convert(Model().eval(), Packed(bits=4, group_size=20))
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, *args, **kwargs: 1.01 * forward(self, *args, **kwargs))
    errors = [row.kernel_error for row in lowbit.report(model, ids).rows if row.kind == "linear"]
    assert errors == pytest.approx([0.01] * 5, rel=1e-3)


def test_report_names_the_backend():
    model = lowbit.convert(Model(), Packed())
    with lowbit.use_backend("reference"):
        report = lowbit.report(model)
    assert {row.backend for row in report.rows} == {"reference"} and "reference" in str(report)


class Keywords(nn.Module):
    """Layers called by keyword, and a norm with statistics."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 40), nn.BatchNorm1d(40), nn.Linear(40, 8)

    def forward(self, ids):
        return self.head(input=self.norm(self.embed(input=ids).flatten(0, 1)))


def test_report_runs_the_model_and_leaves_it_as_it_was(ids):
    model = lowbit.convert(Keywords(), Packed(bits=4, group_size=20))
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    report = lowbit.report(model, ids)
    assert {row.name: row.kernel_error for row in report.rows}["head"] < 1e-5
    for name, tensor in model.state_dict().items():
        assert_bitwise_equal(tensor, before[name])
    assert {name: module.training for name, module in model.named_modules()} == modes
    tensors = [*model.parameters(), *model.buffers()]
    assert report.total_after == sum(t.numel() * t.element_size() for t in tensors)
