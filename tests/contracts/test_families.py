"""What every family promises, run for every family that is registered: convert, report, save, load, move, refuse."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.core.family import Spec
from lowbit.nn.layer import Layer, build, canonical_state_dict, layer_class, layer_classes, layers
from lowbit.nn.linear import LinearLayer
from lowbit.testing.numerics import assert_bitwise_equal, frobenius_bound
from lowbit.testing.packed_cases import DTYPES
from lowbit.testing.where import call, everywhere, running

Codebook, Kronecker, Packed = lowbit.Codebook, lowbit.Kronecker, lowbit.Packed

SPECS: dict[str, list[Spec]] = {
    "packed": [
        Packed(bits=4, group_size=16), Packed(bits=3, symmetric=True), Packed(bits=8, granularity="tensor"),
        Packed(bits=2, group_size=12, zeros="float", outliers=0.02), Packed(bits=5, activations="int8"),
        Packed(bits=4, group_size=16, activations="int8", activation_group_size=32),
        Packed(bits=3, group_size=8, packed_zeros=True), Packed(bits=4, group_size=16, scale_bits=8),
    ],
    "codebook": [
        Codebook(bits=4), Codebook(bits=1, granularity="tensor"), Codebook(bits=3, group_size=20),
        Codebook(table="nf4", group_size=16), Codebook(table=(-1.0, 0.0, 0.5, 2.0)), Codebook(bits=6, scales=True),
        Codebook(bits=3, outliers=0.02, quantizer="optimal"), Codebook(bits=8, granularity="tensor"),
        Codebook(bits=4, activations="int8"),
    ],
    "kron": [
        Kronecker(), Kronecker(compression=4, rank=2), Kronecker(shape=(8, 4)), Kronecker(shape=(1, 1)),
        Kronecker(shape=(4, 8), rank=3, factors=Packed(bits=4, group_size=4)),
        Kronecker(factors=Packed(bits=8, symmetric=True)), Kronecker(dtype=torch.float16),
    ],
}  # fmt: skip
ALL = [spec for specs in SPECS.values() for spec in specs]
N, K, VOCAB = 40, 48, 64


def name(spec: Any) -> str:
    return f"{spec.family}: {spec.describe()}" if isinstance(spec, Spec) else str(spec)


class Model(nn.Module):
    """A tied embedding and head around two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, K)
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K, bias=False)
        self.head = nn.Linear(K, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        result: Tensor = self.head(x + self.down(self.up(x).relu()))
        return result


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{t}": value for n, layer in layers(model).items() for t, value in layer.named_tensors().items()}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """The same stored tensors, bit for bit, and the same outputs."""
    mine, theirs = stored(model), stored(other)
    assert mine.keys() == theirs.keys()
    for tensor in mine:
        assert_bitwise_equal(mine[tensor], theirs[tensor])
    assert_bitwise_equal(model(ids()), other(ids()))


@pytest.fixture(params=ALL, ids=name)
def spec(request: pytest.FixtureRequest) -> Any:
    return request.param


CONVERTED: dict[int, Model] = {}


@pytest.fixture
def model(spec: Spec) -> Model:
    """A copy of one converted model of each spec: fitting tables and factors takes longer than most tests."""
    if id(spec) not in CONVERTED:
        CONVERTED[id(spec)] = lowbit.convert(Model(), spec)
    torch.manual_seed(0)
    return copy.deepcopy(CONVERTED[id(spec)])


def test_no_family_is_forgotten() -> None:
    assert {family for family, _ in layer_classes()} == set(SPECS)
    for family in SPECS:
        kinds = {kind for f, kind in layer_classes() if f == family}
        assert kinds - {"experts"} == {"linear", "embedding"}
        for kind in kinds:
            cls = layer_class(family, kind)
            assert getattr(lowbit, cls.__name__) is cls
            assert cls.format_class.family == family


@pytest.mark.parametrize("where", everywhere(), ids=str)
def test_layers_are_their_dequantized_weight(model: Model, spec: Spec, where: Any) -> None:
    with running(where):
        model.to(where.device)
        for layer in (model.up, model.down, model.head):
            for dtype in DTYPES:
                x = torch.randn(7, layer.in_features).to(dtype)
                y = call(layer, x).detach()
                weight = layer.dequantize(torch.float32).cpu().double()
                bias = 0 if layer.bias is None else layer.bias.detach().cpu().double()
                exact = x.double() @ weight.t() + bias
                error = float((y.double() - exact).norm() / exact.norm())
                # int8 activations round x itself; a Kronecker sum has terms larger than itself
                bound = 2e-2 if spec.activations == "int8" else 4 * frobenius_bound(dtype, layer.in_features)
                assert y.dtype == dtype
                assert error <= bound, (dtype, error, bound)
        weight = model.embed.dequantize(torch.float32).cpu()
        assert_bitwise_equal(call(model.embed, ids()), weight[ids()])


def test_the_report_counts_the_bytes(model: Model, spec: Spec) -> None:
    report = lowbit.report(model)
    rows = {row.name: row for row in report.rows}
    for where, layer in layers(model).items():
        nbytes = sum(t.nbytes for t in layer.named_tensors().values())
        assert layer.format.nbytes == nbytes
        assert rows[where].bytes_after == (0 if rows[where].shares else nbytes)
        assert rows[where].scheme == layer.format.describe()
    assert [row.shares for row in report.rows].count("embed") == 1
    assert report.total_after == sum(t.nbytes for t in {*model.parameters(), *model.buffers()})


def test_a_dry_run_foretells_the_conversion(model: Model, spec: Spec) -> None:
    planned = {row.name: row for row in lowbit.convert(Model(), spec, dry_run=True).rows}
    for row in lowbit.report(model).rows:
        found = planned[row.name]
        assert (found.scheme, found.bytes_before, found.bytes_after) == (row.scheme, row.bytes_before, row.bytes_after)


def test_conversion_is_deterministic(model: Model, spec: Spec) -> None:
    assert_same(model, lowbit.convert(Model(), spec))


def test_tied_layers_share_one_storage(model: Model) -> None:
    assert model.embed.named_tensors().keys() == model.head.named_tensors().keys()
    for tensor, value in model.embed.named_tensors().items():
        assert model.head.named_tensors()[tensor] is value
    assert_bitwise_equal(model.embed.dequantize(), model.head.dequantize())


def test_saving_and_loading(model: Model, tmp_path: Path) -> None:
    lowbit.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = Model()
    loaded = lowbit.load(tmp_path, skeleton)
    assert_same(model, loaded)
    assert loaded.head.named_tensors().keys() == loaded.embed.named_tensors().keys()
    assert all(loaded.head.named_tensors()[n] is t for n, t in loaded.embed.named_tensors().items())
    before, after = lowbit.report(model).to_dict(), lowbit.report(loaded).to_dict()
    for row in before["layers"] + after["layers"]:
        row["weight_error"] = None if row["weight_error"] is None else round(row["weight_error"], 4)
    assert before == after


def test_state_dict_copy_and_pickle(model: Model) -> None:
    assert_same(model, copy.deepcopy(model))
    assert_same(model, pickle.loads(pickle.dumps(model)))
    other = copy.deepcopy(model)
    for value in stored(other).values():
        value.fill_(1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert_same(model, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moving_to_a_dtype_keeps_the_stored_form(model: Model, dtype: torch.dtype) -> None:
    before = {key: value.clone() for key, value in stored(model).items()}
    model.to(dtype)
    assert model(ids()).dtype == dtype
    assert model.up.weight.dtype == dtype
    for key, value in stored(model).items():
        assert_bitwise_equal(value, before[key])


def test_moving_to_a_dtype_keeps_gradients_in_that_of_their_tensors(model: Model) -> None:
    trained = [tensor for tensor in stored(model).values() if tensor.is_floating_point()]
    for tensor in trained:
        tensor.requires_grad_()
        tensor.grad = torch.ones_like(tensor)
    model.to(torch.bfloat16)
    for tensor in trained:
        assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype


def test_the_way_back(model: Model) -> None:
    plain = lowbit.dequantize(copy.deepcopy(model))
    assert not layers(plain)
    assert plain.head.weight is plain.embed.weight
    assert_bitwise_equal(plain.up.weight.detach(), model.up.dequantize())


def test_layers_that_share_a_part_are_different_weights(spec: Spec, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(64, 96))
    with torch.no_grad():
        model[1].weight.copy_(4 * model[0].weight)  # so that the formats are equal
    lowbit.convert(model, spec)
    first, second = layers(model).values()
    name, tensor = next(iter(first.named_tensors().items()))
    setattr(second, name, tensor)
    expected = second.dequantize()
    assert not torch.equal(expected, first.dequantize())
    assert all(row.shares is None for row in lowbit.report(model).rows)
    plain = lowbit.dequantize(copy.deepcopy(model))
    assert plain[0].weight is not plain[1].weight
    assert_bitwise_equal(plain[1].weight.detach(), expected)
    lowbit.save(model, tmp_path)
    loaded = lowbit.load(tmp_path, nn.Sequential(nn.Linear(64, 96), nn.Linear(64, 96)))
    assert stored(loaded)[f"0.{name}"] is stored(loaded)[f"1.{name}"]
    assert_bitwise_equal(loaded[1].dequantize(), expected)


def test_a_model_on_meta(spec: Spec) -> None:
    with torch.device("meta"):
        model = Model()
    lowbit.convert(model, spec)
    assert all(t.device.type == "meta" for t in stored(model).values())
    real = layers(lowbit.convert(Model(), spec))
    for where, layer in layers(model).items():
        assert type(layer) is type(real[where])
        # of equally near shapes, Kronecker takes the one of least error: that needs the values
        assert layer.format.nbytes == pytest.approx(real[where].format.nbytes, rel=0.2 if layer.family == "kron" else 0)


def test_config_rebuilds_the_layer(model: Model) -> None:
    for layer in layers(model).values():
        config = json.loads(json.dumps(layer.config()))
        other = build(config)
        assert type(other) is type(layer)
        assert other.format == layer.format
        assert other.config() == layer.config()
        assert {n: (t.shape, t.dtype) for n, t in other.state_dict().items()} == {
            n: (t.shape, t.dtype) for n, t in canonical_state_dict(layer).items()
        }


@pytest.mark.parametrize("value", [None, -1, 0, 1.5, "x", [], True])
def test_a_bad_field_is_named(model: Model, value: Any) -> None:
    """Whatever stands in a saved description, it is a ValueError, and never a layer of other values."""
    config = model.up.config()
    for field, right in config["format"].items():
        if value == right and type(value) is type(right):
            continue
        changed = {**config, "format": {**config["format"], field: value}}
        try:
            layer = build(changed)
        except ValueError:
            continue
        # a value that is valid too makes a layer of that form
        assert layer.config()["format"].get(field) == value
        assert layer.format != model.up.format


def test_a_missing_or_unknown_field_is_named(model: Model) -> None:
    config = model.up.config()
    with pytest.raises(ValueError, match=f"unknown field 'surprise' in a {model.up.family} format"):
        build({**config, "format": {**config["format"], "surprise": 1}})
    required = next(iter(config["format"]))
    rest = {field: value for field, value in config["format"].items() if field != required}
    with pytest.raises(ValueError, match=f"missing field '{required}' in a {model.up.family} format"):
        build({**config, "format": rest})


def test_a_malformed_tensor_is_named(model: Model) -> None:
    for tensor, value in model.up.named_tensors().items():
        for bad in (value.new_zeros(*value.shape, 2), value.to(torch.float64), None):
            layer = copy.deepcopy(model.up)
            layer._buffers[tensor] = bad
            with pytest.raises(ValueError, match=f"up.{tensor} (must|is missing)"):
                layer.validate("up")
        if value.is_floating_point():
            for bad_value in (float("nan"), float("inf")):
                layer = copy.deepcopy(model.up)
                layer._buffers[tensor][(-1,) * value.dim()] = bad_value  # type: ignore[index]
                with pytest.raises(ValueError, match=f"up.{tensor} must be finite"):
                    layer.validate("up")
                with pytest.raises(RuntimeError, match=f"up.{tensor} must be finite"):
                    model_of(model.up).load_state_dict({f"up.{k}": v for k, v in layer.state_dict().items()})


def test_a_bias_of_a_dtype_that_no_kernel_takes_is_named(model: Model, tmp_path: Path) -> None:
    model.up.bias = nn.Parameter(model.up.bias.detach().double())
    with pytest.raises(ValueError, match="up.bias must be float32, float16 or bfloat16: got torch.float64"):
        lowbit.save(model, tmp_path)
    plain = Model()
    plain.up.bias = nn.Parameter(plain.up.bias.detach().double())
    with pytest.raises(ValueError, match="up: the bias must be float32, float16 or bfloat16: got torch.float64"):
        lowbit.convert(plain, Packed(bits=4))


def model_of(layer: Layer) -> nn.Module:
    return nn.ModuleDict({"up": copy.deepcopy(layer)})


@pytest.mark.parametrize("missing", [True, False])
def test_a_saved_file_with_other_tensors_is_refused(model: Model, tmp_path: Path, missing: bool) -> None:
    from safetensors.torch import load_file, save_file

    lowbit.save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    for tensor in model.up.named_tensors():
        bad = dict(good)
        if missing:
            del bad[f"up.{tensor}"]
        else:
            bad[f"up.{tensor}"] = bad[f"up.{tensor}"].flatten()[:-1].clone()
        save_file(bad, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"up.{tensor}"):
            lowbit.load(tmp_path, Model())


def test_gradients_reach_the_input_and_the_bias(model: Model) -> None:
    x = torch.randn(6, K, requires_grad=True)
    y = model.up(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None
    exact = dy.double() @ model.up.dequantize(torch.float32).double()
    assert float((x.grad.double() - exact).norm() / exact.norm()) < 1e-5
    torch.testing.assert_close(model.up.bias.grad, dy.sum(0))


def test_gradients_of_an_embedding_reach_what_it_stores(model: Model) -> None:
    """Gathering rows ``ids`` and the product with their one-hot form pass the same gradient to the same weight."""
    names = [name for name in model.embed.trainable() if name == "scale_factors" or "scale_" not in name]
    lowbit.make_trainable(model, *names)
    trained = {name: getattr(model.embed, name) for name in names}
    rows = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(2))  # some of them twice
    g = torch.randn(30, K, generator=torch.Generator().manual_seed(3))

    def gradients() -> dict[str, Tensor]:
        found = {n: t.grad.clone() for n, t in trained.items() if t.grad is not None}
        model.zero_grad()
        return found

    model.embed(rows).backward(g)
    found = gradients()
    model.head(g).backward(torch.eye(VOCAB)[rows])
    expected = gradients()
    assert found.keys() == expected.keys() == trained.keys()
    for tensor, value in found.items():
        torch.testing.assert_close(value, expected[tensor], rtol=1e-3, atol=1e-4 * float(expected[tensor].abs().max()))


@pytest.mark.turns(4)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(spec: Spec, model: Model, dynamic: bool) -> None:
    expected = model(ids())
    if not dynamic:
        program = torch.export.export(model, (ids(),))
        torch.testing.assert_close(program.module()(ids()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()), expected)


def test_an_empty_batch(model: Model) -> None:
    assert model.up(torch.empty(0, K)).shape == (0, N)
    assert model(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, VOCAB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_another_dtype(spec: Spec, dtype: torch.dtype) -> None:
    model = lowbit.convert(Model().to(dtype), spec)
    assert model(ids()).dtype == dtype
    assert model.up.dtype == dtype


def test_conv1d_is_a_transposed_linear(spec: Spec) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    conv = transformers.pytorch_utils.Conv1D(N, K)  # weight [K, N]
    linear = nn.Linear(K, N)
    linear.weight.data, linear.bias.data = conv.weight.detach().t().contiguous(), conv.bias.detach().clone()
    x = torch.randn(2, 3, K)
    # sums over the weight may go another way round, and a scale differ in its last bit
    torch.testing.assert_close(lowbit.convert(conv, spec)(x), lowbit.convert(linear, spec)(x))


def test_families_mix_in_one_model(tmp_path: Path) -> None:
    model = lowbit.convert(
        Model(), {"*": Packed(bits=4), "up": Codebook(bits=3, outliers=0.01), "down": Kronecker(compression=2)}
    )
    assert {where: layer.family for where, layer in layers(model).items()} == {
        "embed": "packed", "up": "codebook", "down": "kron", "head": "packed",
    }  # fmt: skip
    lowbit.save(model, tmp_path)
    assert_same(model, lowbit.load(tmp_path, Model()))
    assert len({row.scheme for row in lowbit.report(model, ids()).rows}) == 3


@pytest.mark.turns(3)
def test_streaming_converts_as_in_memory(spec: Spec, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "float")
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec)
    loaded = lowbit.load(tmp_path / "packed").eval()
    lowbit.convert(model, spec)
    mine, theirs = stored(model), stored(loaded)
    assert mine.keys() == theirs.keys()
    for tensor in mine:
        assert_bitwise_equal(mine[tensor], theirs[tensor])
    assert_bitwise_equal(model(ids()).logits, loaded(ids()).logits)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert_bitwise_equal(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("activations", ["int8", "int8_static"])
@pytest.mark.parametrize("family", sorted(SPECS))
def test_int8_activations_or_a_clear_refusal(family: str, activations: str) -> None:
    make = {"packed": Packed, "codebook": Codebook, "kron": Kronecker}[family]
    if activations not in layer_class(family, "linear").format_class.supported_activations:
        with pytest.raises(ValueError, match=f"activations must be one of 'float': got activations='{activations}'"):
            make(activations=activations)
        return
    model = lowbit.convert(Model(), make(activations=activations), calibration=[ids()])
    assert isinstance(model.up, LinearLayer)
    x = torch.randn(9, K)
    exact = x.double() @ model.up.dequantize(torch.float32).double().t() + model.up.bias.detach().double()
    error = float((model.up(x).double() - exact).norm() / exact.norm())
    # static scales were calibrated on other inputs: x is partly clipped
    assert 1e-4 < error < (2e-2 if activations == "int8" else 0.5)


def test_activations_in_groups_or_a_clear_refusal() -> None:
    """Channels of very different size: with a scale per group the small ones keep their digits."""
    x, errors = torch.randn(9, K) * torch.cat([torch.ones(32), torch.full((K - 32,), 1e-3)]), {}
    for size in (None, 32):
        spec = Packed(bits=8, group_size=16, activations="int8", activation_group_size=size)
        layer = lowbit.convert(Model(), spec).up
        assert isinstance(layer, LinearLayer)
        assert layer.format.describe().endswith("int8 activations" if size is None else "int8 activations per 32")
        exact = x[:, 32:].double() @ layer.dequantize(torch.float32)[:, 32:].double().t()
        with torch.no_grad():
            found = layer(x).double() - layer(x * (torch.arange(K) < 32)).double()
        errors[size] = float((found - exact).norm() / exact.norm())
    assert errors[32] < 2e-2 < 0.2 < errors[None]
    for make in (Codebook, Kronecker):
        with pytest.raises(TypeError, match="activation_group_size"):
            make(activation_group_size=32)
        weight = make().quantize(torch.randn(16, 64))
        with pytest.raises(ValueError, match=r"is for the family packed: got activation_group_size=32, family="):
            layer_class(make.family, "linear").from_weight(weight, activation_group_size=32)


def test_a_state_dict_of_other_activation_groups_is_refused() -> None:
    def layer(size: int | None) -> Layer:
        spec = Packed(bits=4, group_size=16, activations="int8", activation_group_size=size)
        return layer_class("packed", "linear").from_float(torch.ones(16, 64), spec)

    for mine, theirs in ((None, 32), (32, None), (32, 64)):
        with pytest.raises(RuntimeError, match=f"saved with activation_group_size={theirs}: got .*={mine}"):
            layer(mine).load_state_dict(layer(theirs).state_dict())
    layer(32).load_state_dict(layer(32).state_dict())
