"""``tune``: what is learned is what is stored, a model or a block that would be no better stays as it was."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import train
from lowbit.core import quantizer as registry
from lowbit.core.bitpack import pack, unpack
from lowbit.nn.layer import layers
from lowbit.nn.linear import LinearLayer
from lowbit.packed.format import PackedWeight
from lowbit.packed.module import PackedLinear
from lowbit.train import progress
from lowbit.train.rounding import _PackedRound, rounding_of
from lowbit.train.steps import Draws
from lowbit.train.tune import _Learner
from tests.train.test_recover import BAD_ARGUMENTS, batches


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 40, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


SPECS = {
    "float zeros": lowbit.Packed(bits=2, group_size=16, zeros="float"),
    "integer zeros": lowbit.Packed(bits=3, group_size=20, zeros="int"),
    "packed zeros": lowbit.Packed(bits=3, group_size=16, zeros="int", packed_zeros=True),
    "scales of 8 bits": lowbit.Packed(bits=2, group_size=16, packed_zeros=True, scale_bits=8),
    "symmetric": lowbit.Packed(bits=2, granularity="row", symmetric=True),
    "per tensor": lowbit.Packed(bits=3, granularity="tensor"),
    "outliers": lowbit.Packed(bits=2, group_size=16, outliers=0.02),
    "int8": lowbit.Packed(bits=3, group_size=32, activations="int8", activation_group_size=32),
    "table per row": lowbit.Codebook(bits=2),
    "table per group": lowbit.Codebook(bits=2, group_size=20),
    "table per tensor": lowbit.Codebook(bits=2, granularity="tensor", outliers=0.02),
    "nf4": lowbit.Codebook(table="nf4", group_size=16),
}


def minima(weight: Tensor, nested: bool) -> PackedLinear:
    """2 bits with minima, groups of 16: as files of other tools have them."""
    groups = weight.unflatten(1, (-1, 16))
    low, high = groups.amin(-1), groups.amax(-1)
    scales, zeros, factors = (high - low) / 3, -low, {}
    if nested:
        first, second = (each.amax(1, keepdim=True) / 255 for each in (scales, zeros))
        factors = {"scale_factors": first.half(), "zero_factors": second.half(), "scale_block": groups.shape[1]}
        scales, zeros = ((scales / first).round().to(torch.uint8), (zeros / second).round().to(torch.uint8))
    else:
        scales, zeros = scales.half(), zeros.half()
    codes = ((groups - low[..., None]) / (high - low)[..., None] * 3).round().to(torch.uint8).flatten(1)
    return PackedLinear.from_weight(
        PackedWeight(codes, scales, zeros, 2, 16, minimum=True, **factors), activations="float", dtype=torch.float32
    )


def layer_of(form: str, weight: Tensor) -> LinearLayer:
    if form not in SPECS:
        return minima(weight, form == "nested minima")
    model = nn.Linear(*weight.t().shape)
    model.weight.data = weight.clone()
    return lowbit.convert(model, SPECS[form])


@pytest.mark.parametrize("form", [*SPECS, "minima", "nested minima"])
def test_learning_begins_with_what_is_stored_and_ends_with_it(form):
    torch.manual_seed(0)
    weight = torch.randn(24, 64) * 0.1
    layer = layer_of(form, weight)
    codes = unpack(layer.canonical()["packed"], layer.format.bits, 64)
    moved = (codes.int() + torch.randint(-1, 2, codes.shape)).clamp(layer.format.family == "packed", codes.max())
    stored = layer.canonical()
    if layer.format.family == "codebook":  # tables need not ascend
        moved = (moved + 1) % stored["codebook"].shape[-1]
        stored["codebook"] = stored["codebook"].roll(1, -1)
    layer.become(layer.format, stored | {"packed": pack(moved.to(torch.uint8), layer.format.bits)})
    rounding = rounding_of(layer, weight)
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(rounding.weight(), layer.dequantize(), **tolerance)
    codes = layer.canonical()["packed"]
    if layer.format.family == "packed":  # tables are stored in the order of values
        assert torch.equal(rounding.tensors()["packed"], codes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in rounding.parameters():
            size = 0.7 if parameter is rounding.offsets else 0.05
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    wanted = rounding.weight().detach()
    x = torch.randn(5, 64, generator=generator)
    y = rounding(x).detach()
    layer.become(layer.format, rounding.tensors())
    layer.validate()
    assert not torch.equal(layer.canonical()["packed"], codes)
    # an outlier is stored in float16
    torch.testing.assert_close(layer.dequantize(), wanted, rtol=1e-6, atol=1e-3 if layer.format.outliers else 1e-7)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=5e-3 if layer.format.outliers else 1e-4)


def test_a_scale_of_8_bits_stays_above_zero():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0, :16] /= 250  # its scale has code 1
    layer = layer_of("scales of 8 bits", weight)
    rounding = rounding_of(layer, weight)
    assert int(layer.canonical()["scales"].min()) < 4
    with torch.no_grad():
        rounding.scales.fill_(0)
    assert int(rounding.tensors()["scales"].min()) == 1


@pytest.mark.parametrize("minimum", [False, True])
def test_gradients_of_a_grid_are_those_of_straight_through_rounding(minimum):
    generator = torch.Generator().manual_seed(0)
    w, offsets, d = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = 0.2 + torch.rand(6, 1, generator=generator, dtype=torch.float64)
    zero = 3 * torch.rand(6, 1, generator=generator, dtype=torch.float64)
    inputs = [each.clone().requires_grad_(True) for each in (offsets, scale, zero)]
    _PackedRound.apply(w, *inputs, 0, 3, minimum).backward(d)
    found = [each.grad for each in inputs]
    free = [each.clone().requires_grad_(True) for each in (offsets, scale, zero)]
    exact = (w + free[2]) / free[1] + free[0] if minimum else w / free[1] + free[2] + free[0]
    rounded = exact + (exact.round() - exact).detach()
    code = rounded.clamp(0, 3)
    assert {0.0, 3.0} < set(code.flatten().tolist()) and bool((exact.round() > 3).any())
    (code * free[1] - free[2] if minimum else (code - free[2]) * free[1]).backward(d)
    for a, b in zip(found, free, strict=True):
        torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize("form", ["float zeros", "outliers", "int8", "scales of 8 bits", "table per row"])
def test_a_model_becomes_better_in_the_form_that_it_has(by, form):
    reference = net()
    model = lowbit.convert(copy.deepcopy(reference), SPECS[form])
    before = {name: (layer.format, layer.canonical()) for name, layer in layers(model).items()}
    found = train.tune(model, reference, batches(), by=by, steps=30, lr=0.03)
    assert found.kept and found.after < 0.9 * found.before
    assert found.left == {"embedding": f"the codes of a {model.embedding.family} embedding are not learned"} | (
        {"head": "in no block"} if by == "block" else {})  # fmt: skip
    assert list(found.blocks) == (["blocks.0", "blocks.1"] if by == "block" else [])
    assert all(after < 0.9 * start for start, after in found.blocks.values())
    for name, layer in layers(model).items():
        format, tensors = before[name]
        assert layer.format == format
        now = layer.canonical()
        assert torch.equal(now["packed"], tensors["packed"]) == (name in found.left)
        beside = "codebook" if "codebook" in now else "scales"
        assert torch.equal(now[beside], tensors[beside]) == (name in found.left)
        assert {n: (t.shape, t.dtype) for n, t in now.items()} == {n: (t.shape, t.dtype) for n, t in tensors.items()}


@pytest.mark.parametrize("by", ["model", "block"])
def test_it_is_deterministic_and_leaves_everything_else_alone(by):
    reference = net().train()
    floats = copy.deepcopy(reference.state_dict())
    models = [lowbit.convert(net(), lowbit.Packed(bits=3)).train() for _ in range(2)]
    models[0].blocks[0].up.bias.requires_grad_(False)
    state = torch.get_rng_state()
    for model in models:
        train.tune(model, reference, batches(), by=by, steps=5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert models[0].training and reference.training
    assert models[0].blocks[1].up.bias.requires_grad and not models[0].blocks[0].up.bias.requires_grad
    assert all(p.grad is None for p in (*models[0].parameters(), *reference.parameters()))
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, floats[name])


@pytest.mark.parametrize("by", ["model", "block"])
def test_what_is_no_better_is_not_kept(by):
    reference = net()
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = train.tune(model, reference, batches(), by=by, steps=6, lr=30.0)
    assert not found.kept and "as it was" in str(found)
    assert all(after <= start for start, after in found.blocks.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loss_that_is_no_number_ends_it_and_changes_nothing():
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    inside = dict(model.named_modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(batch)
        return model(**batch).sum() * (math.nan if len(calls) > 6 else 1)

    with pytest.raises(FloatingPointError, match="the loss is nan in step"):
        train.tune(model, net(), batches(), steps=9, loss=loss)
    assert dict(model.named_modules()) == inside
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_padding_does_not_count_in_a_block():
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    results = []
    for filler in (0, 7):
        given = [{"input_ids": torch.where(mask.bool(), batch["input_ids"], filler), "attention_mask": mask}
                 for batch in batches(5)]  # fmt: skip
        model = lowbit.convert(net(), lowbit.Packed(bits=2, group_size=16))
        blocks = train.tune(model, net(), given, by="block", steps=3).blocks
        results.append([number for pair in blocks.values() for number in pair])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_blocks_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config, cls = {
        "llama": (transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                           num_attention_heads=2, **small), transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, **small), transformers.GPT2LMHeadModel),
        "bert": (transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=48, **small), transformers.BertModel),
        "t5": (transformers.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                                     decoder_start_token_id=0, **small), transformers.T5ForConditionalGeneration),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    reference = cls(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # that attention attends
    given = [{**batch, "decoder_input_ids": batch["input_ids"]} if kind == "t5" else batch for batch in batches(8)]
    layers = {"llama": "*proj", "gpt2": "*.h.*", "bert": "encoder.*", "t5": "*.layer.*"}[kind]
    spec = {layers: lowbit.Packed(bits=2, group_size=16), "*relative*": None}
    model = lowbit.convert(copy.deepcopy(reference), spec if kind == "t5" else {layers: spec[layers]})
    used = model.config.use_cache if hasattr(model.config, "use_cache") else None
    found = train.tune(model, reference, given, by="block", steps=12, lr=0.03)
    assert len(found.blocks) == {"llama": 3, "gpt2": 2, "bert": 2, "t5": 4}[kind]
    assert all(after < before for before, after in found.blocks.values())
    assert found.kept and found.after < found.before
    assert getattr(model.config, "use_cache", None) == used


class Twice(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(self.blocks[0](self.blocks[0](x)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.one = nn.Embedding(40, 32), nn.Linear(32, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.one(self.embedding(input_ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD_ARGUMENTS,
        ({"by": "layer"}, "by must be 'model' or 'block': got by='layer'"),
        ({"model": lowbit.convert(nn.Linear(32, 8), lowbit.Packed()), "reference": nn.Linear(32, 8)},
         "no layer can be tuned: the model: it is the whole model: wrap it in nn.Sequential"),
        ({"by": "block", "loss": print}, "loss goes with by='model'"),
        ({"reference": lowbit.convert(net(), lowbit.Packed())}, "reference must be the float model: blocks.0.up is no"),
        ({"reference": Flat()}, "reference must be the float model: blocks.0.up is no float linear layer there"),
        ({"model": lowbit.convert(Flat(), lowbit.Packed()), "reference": Flat(), "by": "block"},
         "needs layers in the members of an nn.ModuleList: the model has none"),
        ({"model": lowbit.convert(Twice(), lowbit.Packed()), "reference": Twice(), "by": "block"},
         "block blocks.0 must be called once for a batch: got 2 calls"),
        ({"model": lowbit.convert(net(), lowbit.Kronecker(compression=2))},
         "no layer can be tuned: embedding: the codes of a kron embedding are not learned"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    with pytest.raises(ValueError, match=message):
        train.tune(**{"model": model, "reference": net(), "calibration": batches(2), **arguments})


def test_what_is_trained_already_is_named():
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    train.trainable(model, "scales")
    with pytest.raises(ValueError, match=r"embedding: scales is trained already: end that by lowbit.convert\(model\)"):
        train.tune(model, net(), batches(2))


def test_tied_layers_are_left():
    reference = net()
    reference.head.weight = reference.embedding.weight
    model = lowbit.convert(copy.deepcopy(reference), lowbit.Packed(bits=2, group_size=16))
    found = train.tune(model, reference, batches(), steps=10, lr=0.03)
    assert found.left["head"] == "another layer shares its weight"
    assert model.head.packed is model.embedding.packed


@pytest.mark.parametrize("spec", [lowbit.Packed(bits=2, group_size=16), lowbit.Codebook(bits=2)])
@pytest.mark.turns(2)
def test_the_quantizer_learns_what_its_layers_round_to(spec):
    reference = net()
    model, start = (
        lowbit.convert(copy.deepcopy(reference), {
            "blocks.*": replace(spec, quantizer=quantizer), "head": lowbit.Packed(quantizer="descent")
        }, calibration=batches(), correction=0.0)
        for quantizer in ("tuned", "descent" if isinstance(spec, lowbit.Packed) else "lnq")
    )  # fmt: skip
    by_hand = copy.deepcopy(start)
    found = train.tune(by_hand, reference, batches(), only=[n for n in layers(start) if n.startswith("blocks.")])
    assert found.kept and found.after < 0.9 * found.before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name])
    assert not torch.equal(model.blocks[0].up.packed, start.blocks[0].up.packed)
    rows = {row.name: row for row in lowbit.report(model).rows}
    up = reference.blocks[0].up.weight
    wanted = float((model.blocks[0].up.dequantize() - up).detach().norm() / up.detach().norm())
    assert rows["blocks.0.up"].weight_error == pytest.approx(wanted, rel=1e-5)


def test_layers_that_cannot_learn_are_named(monkeypatch):
    model = Twice()
    monkeypatch.setitem(registry._registry, "packed", dict(registry._registry["packed"]))
    lowbit.register_quantizer(train.TunedPacked("by block", by="block", steps=2))
    with pytest.warns(UserWarning, match="leaves layers as they were before learning: block blocks.0 must"):
        lowbit.convert(model, {"blocks.0": lowbit.Packed(bits=2, quantizer="by block")}, calibration=batches(4))
    assert "not by block: block blocks.0 must be called once" in model.blocks[0].up.note
    alone = lowbit.convert(nn.Linear(32, 8), lowbit.Packed(bits=2, quantizer="tuned"), calibration=[torch.randn(9, 32)])
    assert alone.note == "not tuned: it is the whole model"
    tied = net()
    tied.head.weight = tied.embedding.weight
    lowbit.convert(tied, lowbit.Packed(bits=2, quantizer="tuned"), calibration=batches(8))
    assert tied.head.note == "not tuned: another layer shares its weight" and tied.blocks[0].up.note is None


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    reference = net()
    whole, model = (lowbit.convert(net(), lowbit.Packed(bits=2, group_size=16, outliers=0.02)) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {"calibration": batches(), "by": "block", "steps": 6}
    expected = train.tune(whole, reference, **arguments)
    learn, calls = _Learner.learn, []

    def interrupted(self: _Learner, *given: object) -> None:
        calls.append(given[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        learn(self, *given)

    monkeypatch.setattr(_Learner, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.tune(model, reference, **arguments, folder=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["blocks.0.safetensors"]
    with pytest.raises(ValueError, match=r"what this very run has finished, or nothing: .*blocks.0.safetensors is of"):
        train.tune(model, reference, **{**arguments, "steps": 7}, folder=tmp_path)
    with pytest.raises(ValueError, match="is of another model, calibration or arguments"):
        train.tune(model, reference, **{**arguments, "calibration": batches(11)}, folder=tmp_path)
    found = train.tune(model, reference, **arguments, folder=tmp_path)
    assert calls == ["lowbit tune blocks.0", "lowbit tune blocks.1", "lowbit tune blocks.1"]
    assert found.blocks == expected.blocks and found.after == expected.after
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])


def held_out_of(count: int, seed: int) -> list[int]:
    """One batch of eight, in the order of the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()[: count // 8]


def test_what_is_held_out_is_measured_and_not_learned_from():
    model, given = lowbit.convert(net(), SPECS["float zeros"]), batches(17)
    start, held_out = copy.deepcopy(model), held_out_of(17, 2)
    learned = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            learned.append(next(i for i, each in enumerate(given) if each is batch))
        return model(**batch).square().mean()

    found = train.tune(model, net(), given, steps=15, batch=2, lr=0.03, seed=2, loss=loss)
    assert sorted(learned) == sorted(2 * [i for i in range(17) if i not in held_out])
    with torch.no_grad():
        wanted = [sum(float(loss(each, given[i])) for i in held_out) / 2 for each in (start, model)]
    assert found.kept and [found.before, found.after] == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_a_block_is_measured_on_what_the_learned_blocks_before_it_give():
    reference, given = net(), batches(16)
    for i, batch in enumerate(given):
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < 3 + i % 5).expand_as(batch["input_ids"])
    model = lowbit.convert(net(), SPECS["float zeros"])
    start, held_out = copy.deepcopy(model), held_out_of(16, 1)
    found = train.tune(model, reference, given, by="block", steps=12, lr=0.03, seed=1)
    inputs = [model.embedding(batch["input_ids"]) for batch in given]
    floats = [reference.embedding(batch["input_ids"]) for batch in given]
    for i in range(2):
        wanted = [reference.blocks[i](x, scale=0.5) for x in floats]

        def square(values: Tensor, batch: int) -> Tensor:
            return values[given[batch]["attention_mask"].bool()].square().mean()

        size = sum(square(b - a, j) for j, (a, b) in enumerate(zip(floats, wanted, strict=True))) / 16
        error = [float(sum(square(each.blocks[i](inputs[j], scale=0.5) - wanted[j], j) for j in held_out) / 2 / size)
                 for each in (start, model)]  # fmt: skip
        assert found.blocks[f"blocks.{i}"] == pytest.approx(error, rel=1e-3) and error[1] < error[0]
        inputs, floats = [model.blocks[i](x, scale=0.5) for x in inputs], wanted


def test_a_block_that_is_no_better_is_as_it_was(monkeypatch):
    model = lowbit.convert(net(), SPECS["float zeros"])
    start, learn = copy.deepcopy(model), _Learner.learn

    def spoiled(self: _Learner, roundings: list, *given: object) -> None:
        learn(self, roundings, *given)
        if "blocks.1" in str(given):
            for rounding in roundings:
                rounding.offsets.data += 2

    monkeypatch.setattr(_Learner, "learn", spoiled)
    found = train.tune(model, net(), batches(), by="block", steps=12, lr=0.03)
    assert found.kept and found.blocks["blocks.0"][1] < found.blocks["blocks.0"][0]
    assert found.blocks["blocks.1"][1] == found.blocks["blocks.1"][0]
    for name, tensor in start.blocks[1].state_dict().items():
        assert torch.equal(tensor, model.blocks[1].state_dict()[name])
    assert not torch.equal(start.blocks[0].up.packed, model.blocks[0].up.packed)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("learn", "form"),
    [(train.tune, "float zeros"), (train.tune, "table per group"), (train.tune, "packed zeros"),
     (train.recover, "table per group")],
)  # fmt: skip
def test_a_model_that_learns_as_a_whole_goes_on_with_the_same_bits(learn, form, tmp_path, monkeypatch):
    reference = net()
    made = lowbit.convert(net(), SPECS[form])
    whole = copy.deepcopy(made)
    arguments = {"calibration": batches(12), "steps": 9, "batch": 2, "lr": 0.03, "seed": 1}
    expected = learn(whole, reference, **arguments)
    assert expected.kept
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    monkeypatch.setattr(progress, "_SHARE", 0)
    backward, done = Draws.backward, []

    def stop_at(last: int) -> None:
        def interrupted(self: Draws, measure: object, step: int) -> None:
            backward(self, measure, step)
            if step == last:
                raise Interrupted
            done.append(step)

        monkeypatch.setattr(Draws, "backward", interrupted)

    for last in (0, 4, 8):  # the gradient of that step is lost
        stop_at(last)
        model = copy.deepcopy(made)
        with pytest.raises(Interrupted):
            learn(model, reference, **arguments, folder=tmp_path)
        assert all(torch.equal(t, made.state_dict()[name]) for name, t in model.state_dict().items())
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"] * (last > 0)
    for _ in range(2):  # also once it is finished
        stop_at(-1)
        model = copy.deepcopy(made)
        assert learn(model, reference, **arguments, folder=tmp_path) == expected
        assert done == list(range(9))
        assert all(torch.equal(t, whole.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("learn", [train.tune, train.recover])
def test_a_state_of_another_run_is_refused(learn, tmp_path):
    reference, made = net(), lowbit.convert(net(), SPECS["float zeros"])
    arguments = {"model": made, "reference": reference, "calibration": batches(8), "steps": 2, "lr": 0.03}
    before = copy.deepcopy(made.state_dict())
    learn(**{**arguments, "model": copy.deepcopy(made)}, folder=tmp_path)
    other = {"model": lowbit.convert(net(3), SPECS["float zeros"]), "reference": net(4), "calibration": batches(9),
             "steps": 3, "batch": 2, "lr": 0.02, "seed": 5, "spec": lowbit.convert(net(), SPECS["packed zeros"]),
             "loss": lambda model, batch: model(**batch).square().mean()}  # fmt: skip
    other |= {"only": ["head"], "by": "block"} if learn is train.tune else {}
    for name, value in other.items():
        given = {**arguments, ("model" if name == "spec" else name): value}
        with pytest.raises(ValueError, match=r"folder must hold .* nothing: .*model.safetensors is of another model"):
            learn(**given, folder=tmp_path)
    with pytest.raises(ValueError, match="is of another model"):
        ({train.tune, train.recover} - {learn}).pop()(**arguments, folder=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
