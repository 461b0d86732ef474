"""Layers that make up for what rounding the layers before them changed: docs in lowbit/model/drift.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import Codebook, Packed
from lowbit.core import quantizer
from lowbit.core.quantizer import Statistics
from lowbit.model import drift
from lowbit.model.feed import Feed
from lowbit.nn.layer import layers
from lowbit.packed.quantize import Descent, Gptq
from lowbit.testing import tiny

K = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(torch.tanh(self.up(x)) * self.gate(x))


class Model(nn.Module):
    """Blocks in a list, which run alone, or beside each other, where all of the model runs."""

    def __init__(self, listed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, K), nn.Linear(K, 4)
        blocks = [Block() for _ in range(3)]
        self.blocks = nn.ModuleList(blocks) if listed else nn.Sequential(*blocks)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    masks = [(torch.arange(9 + i) < 8).expand(4, -1).long() for i in range(count)]
    return [{"ids": torch.randint(0, 20, (4, 9 + i)), "attention_mask": masks[i]} for i in range(count)]


@pytest.fixture
def recording() -> Iterator[dict[str, Any]]:
    """The weights that a quantizer was given, in order; it is called "recording"."""
    seen: dict[str, Any] = {"weights": [], "hessians": []}

    class Recording(Gptq):
        name = "recording"

        def quantize(self, weight: Tensor, spec: Packed, statistics: Statistics) -> Any:
            seen["weights"].append(weight.clone())
            seen["hessians"].append(statistics.hessian)
            return super().quantize(weight, spec, statistics)

    quantizer.register(Recording())
    yield seen
    del quantizer._registry["packed"]["recording"]


def inputs(model: nn.Module, name: str, data: list[Any]) -> Tensor:
    """float64 ``[n, K]``, without padding."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found, data, strict=True)]).double()


ORDER = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "gate", "down")] + ["head"]


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("correction", [0.5, 1.0])
def test_what_is_rounded_is_the_formula(recording, listed: bool, correction: float) -> None:
    model, data = Model(listed), batches()
    spec = {"*up": (one := Packed(bits=2, quantizer="recording")), "*gate": one, "*down": one, "head": one}
    packed = lowbit.convert(copy.deepcopy(model), spec, calibration=data, correction=correction)
    partial = copy.deepcopy(model)  # quantized up to the layer
    for name, given, hessian in zip(ORDER, recording["weights"], recording["hessians"], strict=True):
        x, q = inputs(model, name, data), inputs(partial, name, data)
        h = 2 / len(q) * q.T @ q
        h.diagonal().add_(K / len(q) * h.diagonal().mean())
        assert torch.allclose(hessian.double(), h, rtol=1e-4, atol=1e-6)
        squares = q.T @ q
        squares.diagonal().add_((drift.DAMPING + K / len(q)) * squares.diagonal().mean())
        w = model.get_submodule(name).weight.double()
        wanted = w + correction * w @ ((x - q).T @ q) @ torch.linalg.inv(squares)
        assert torch.allclose(given.double(), wanted, rtol=1e-4, atol=1e-5), name
        changed = (given.double() - w).norm() / w.norm()
        assert changed == 0 if name in ("blocks.0.up", "blocks.0.gate") else changed > 0.01
        layer = packed.get_submodule(name)
        partial.get_submodule(name).weight = nn.Parameter(layer.dequantize(torch.float32))
        error = (layer.dequantize(torch.float32).double() - w).norm() / w.norm()
        assert layer.weight_error == pytest.approx(float(error.detach()), rel=1e-4)  # of the float weight


def test_blocks_run_alone() -> None:
    """Each block a few times on every batch, the model a fixed number of times."""
    calls = {"model": 0, "block": 0}
    model, data = Model(), batches()
    model.register_forward_pre_hook(lambda *_: calls.update(model=calls["model"] + 1))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.update(block=calls["block"] + 1))
    lowbit.convert(model, Packed(bits=3, quantizer="descent"), skip=["embedding"], calibration=data)
    once = len(data)
    # the trace (1 batch), both feeds, and the head twice
    assert calls["model"] == 1 + 4 * once
    # 2 inputs in both models, then the output of both; in the model: trace, feeds and head. Of the first block the
    # outputs are compared with those in the model, and of each block the calls are counted, with one batch
    assert calls["block"] <= 3 * (4 + 2) * once + 3 * calls["model"] + 2 * once + 3


@pytest.mark.parametrize(
    ("spec", "strength"),
    [
        (Packed(bits=2, quantizer="descent"), 0.5),
        (Codebook(bits=2, quantizer="lnq"), 0.5),
        (Packed(bits=2, quantizer="gptq"), 0.0),
        (Codebook(bits=2, sensitivity=True), 0.0),
        (Packed(bits=2, quantizer="mse"), 0.0),
    ],
    ids=["descent", "lnq", "gptq", "sensitivity", "mse"],
)
def test_each_quantizer_has_its_default(spec, strength: float) -> None:
    def codes(**given: Any) -> list[Tensor]:
        packed = lowbit.convert(Model(), spec, calibration=batches(), **given)
        return [packed.get_submodule(name).dequantize(torch.float32) for name in ORDER]

    default = codes()
    same = {given: all(map(torch.equal, default, codes(correction=given))) for given in (0.0, 0.5)}
    assert same == {0.0: strength == 0.0, 0.5: strength == 0.5}


def test_it_brings_the_model_nearer_to_the_float_one() -> None:
    model, data = Model(), batches(24)
    wanted = torch.cat([model(**batch).detach()[batch["attention_mask"].bool()] for batch in data])

    def error(correction: float) -> float:
        spec = Packed(bits=2, group_size=8, quantizer="gptq")
        packed = lowbit.convert(copy.deepcopy(model), spec, skip=["embedding"], calibration=data, correction=correction)
        found = torch.cat([packed(**batch).detach()[batch["attention_mask"].bool()] for batch in data])
        return float((found - wanted).norm() / wanted.norm())

    assert error(0.5) < 0.9 * error(0.0)


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", tiny.LLAMA | {"num_hidden_layers": 2}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", tiny.GPT2 | {"n_layer": 2}),
    "BERT": ("BertModel", "BertConfig", tiny.BERT | {"num_hidden_layers": 2}),
    "T5": ("T5EncoderModel", "T5Config", tiny.T5 | {"num_layers": 2}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", tiny.LLAMA | {"num_hidden_layers": 2, "num_local_experts": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, monkeypatch) -> None:
    """Blocks that run alone give what the model gives as a whole: their masks, positions and caches are right."""
    transformers = pytest.importorskip("transformers")
    model_class, config_class, arguments = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    masks = torch.ones(4, 12, dtype=torch.long).tril(8)
    data = [{"input_ids": torch.randint(3, 100, (4, 12)), "attention_mask": masks} for _ in range(6)]
    spec = {"*": Packed(bits=8, quantizer="gptq", group_size=16), "*attention_bias": None}
    if name != "T5":
        del spec["*attention_bias"]
    assert compare_with_whole(model, spec, data, monkeypatch) > 50


def compare_with_whole(model: nn.Module, spec: Any, data: list[Any], monkeypatch: Any, tolerance: float = 1e-3) -> int:
    """How often a block ran alone; what is made must be what running all of the model makes."""
    whole = copy.deepcopy(model)
    outputs = []
    with monkeypatch.context() as patched:
        original = Feed.output
        patched.setattr(Feed, "output", lambda self, index: outputs.append(index) or original(self, index))
        packed = lowbit.convert(model, spec, calibration=data, correction=1.0)

        def refuse(self: Feed, name: str) -> None:
            raise ValueError("it does not run alone")

        patched.setattr(Feed, "go_to", refuse)
        count = len(outputs)
        wanted = lowbit.convert(whole, spec, calibration=data, correction=1.0)
        assert len(outputs) == count
    found = layers(wanted)
    for name, layer in layers(packed).items():
        one, other = (x.dequantize(torch.float32) for x in (layer, found[name]))
        assert float((one - other).norm() / other.norm()) <= tolerance, name
    return count


class Skips(Model):
    """The last block is given what the first one gave, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.blocks[0](self.embedding(ids))
        x = self.blocks[1](x)
        return self.head(self.blocks[2](x, 1 + first))


class Adds(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x += super().forward(x, scale)  # into its input
        return x


class ChangesBetween(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
            x += torch.sin(3 * x)
        return self.head(x)


class ByKeyword(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x=x)
        return self.head(x)


class Named(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return {"hidden": super().forward(x, scale)}


class Reads(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)["hidden"]
        return self.head(x)


class Told(Block):
    length = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale) * torch.linspace(0.5, 1, self.length)[:, None]


class Tells(Model):
    """What a block needs is written into it before it is called."""

    def forward(self, ids: Tensor) -> Tensor:
        for block in self.blocks:
            block.length = ids.shape[1]
        return super().forward(ids)


class Remembers(Block):
    seen: Tensor | None = None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.seen = x if self.seen is None else torch.cat([self.seen, x], 1)
        return super().forward(x, scale) + self.seen.mean(1, keepdim=True)


class Forgets(Model):
    def forward(self, ids: Tensor) -> Tensor:
        for block in self.blocks:
            block.seen = None
        return super().forward(ids)


class LayerBetween(Model):
    """A layer that is in no block makes what the blocks behind it take."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(K, K)

    def forward(self, ids: Tensor) -> Tensor:
        x = start = self.embedding(ids)
        x = self.blocks[0](x)
        scale = 1 + self.between(start)
        for block in self.blocks[1:]:
            x = block(x, scale)
        return self.head(x)


class CallsInside(Model):
    """A layer of the second block is called by the model, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks[0](self.embedding(ids))
        x = torch.tanh(self.blocks[1].up(self.blocks[1](x)))
        return self.head(self.blocks[2](x))


class TwoLists(Model):
    """Members of two lists in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block, other in zip(self.blocks, self.others, strict=False):
            x = other(block(x))
        return self.head(self.blocks[2](x))


class CodesFirst(Model):
    """What is called first was made last: a decoder and its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = y = self.embedding(ids)
        for block in self.encoder:
            y = block(y)
        for block in self.blocks:
            x = block(x, y)
        return self.head(x)


def with_blocks(model: Model, block: type[Block]) -> Model:
    torch.manual_seed(0)
    model.blocks = nn.ModuleList([block() for _ in model.blocks])
    return model


def sharing(what: str) -> Model:
    model = Model()
    if what == "block":
        model.blocks[2] = model.blocks[0]
    elif what == "layer":
        model.blocks[2].up = model.blocks[0].up
    else:
        model.blocks[2].up.weight = model.blocks[0].up.weight
    return model


KINDS: dict[str, tuple[Any, bool]] = {  # the model, and whether its blocks can run alone
    "half": (lambda: Model().half(), True),
    "skip connection": (Skips, True),
    "in place": (lambda: with_blocks(Model(), Adds), True),
    "changed in place between blocks": (ChangesBetween, True),
    "by keyword": (ByKeyword, False),
    "a mapping": (lambda: with_blocks(Reads(), Named), False),
    "told": (lambda: with_blocks(Tells(), Told), False),
    "remembers": (lambda: with_blocks(Forgets(), Remembers), False),
    "layer between": (LayerBetween, True),
    "called from outside": (CallsInside, True),
    "two lists": (TwoLists, True),
    "encoder last": (CodesFirst, True),
    "shared block": (lambda: sharing("block"), False),
    "shared layer": (lambda: sharing("layer"), True),
    "shared weight": (lambda: sharing("weight"), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_run_alone_do_what_they_do_in_the_model(kind: str, monkeypatch) -> None:
    made, alone = KINDS[kind]
    torch.manual_seed(1)
    data = [torch.randint(0, 20, (4, 9 + i)) for i in range(3)]
    spec = {"*": Packed(bits=3, quantizer="gptq"), "embedding": None}
    count = compare_with_whole(made(), spec, data, monkeypatch, 1e-5)
    assert (count > 0) == alone


def test_a_layer_that_is_called_twice_and_one_that_is_the_model(recording) -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))

    data = [torch.randn(32, K) for _ in range(3)]
    lowbit.convert(Twice(), Packed(bits=2, quantizer="recording"), calibration=data, correction=1.0)
    assert len(recording["weights"]) == 2
    alone = nn.Linear(K, K)
    wanted = lowbit.convert(copy.deepcopy(alone), Packed(bits=2, quantizer="gptq"), calibration=data)
    found = lowbit.convert(copy.deepcopy(alone), Packed(bits=2, quantizer="gptq"), calibration=data, correction=0.5)
    assert torch.equal(wanted.dequantize(torch.float32), found.dequantize(torch.float32))


def test_a_failure_leaves_the_model_as_it_was(monkeypatch) -> None:
    model = Model()
    modules, weights = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    count = 0

    def fails(self: Any, weight: Tensor, spec: Packed, statistics: Statistics) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise ValueError("no more")
        return original(self, weight, spec, statistics)

    original = Descent.quantize
    monkeypatch.setattr(Descent, "quantize", fails)
    with pytest.raises(ValueError, match=r"blocks\.1\.gate: no more"):
        lowbit.convert(model, Packed(bits=3, quantizer="descent"), skip=["embedding"], calibration=batches())
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in modules.values())


def test_modes_are_those_of_before() -> None:
    """Packed layers take over the training mode; float ones that stand in the model again for a pass do not train."""
    model = Model()
    modes = []
    model.blocks[0].up.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.blocks[1].eval()
    packed = lowbit.convert(
        model, {"*": Packed(bits=3, quantizer="gptq"), "*.up": Packed(bits=8), "head": None}, calibration=batches(2),
        correction=0.5)  # fmt: skip
    training = {name: module.training for name, module in packed.named_modules() if name}
    assert training == {name: not name.startswith("blocks.1") for name in training}
    assert modes and not any(modes)


def test_a_bad_batch_is_named() -> None:
    data = [torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), 20)]  # the second is no id
    with pytest.raises(IndexError, match=r"calibration batch 1 \(Tensor \[2, 8\]\), in layer embedding"):
        lowbit.convert(Model(), Packed(bits=3, quantizer="descent"), skip=["embedding"], calibration=data)


def test_arguments() -> None:
    spec = Packed(bits=3, quantizer="gptq")
    for wrong in (-0.1, 1.5, True, "half", float("nan")):
        with pytest.raises(ValueError, match="correction must be a number between 0 and 1"):
            lowbit.convert(Model(), spec, calibration=batches(), correction=wrong)
    with pytest.raises(ValueError, match="correction=0.5 needs calibration"):
        lowbit.convert(Model(), Packed(bits=3), correction=0.5)
    with pytest.warns(UserWarning, match="correction= changes nothing"):
        lowbit.convert(Model(), Packed(bits=3, quantizer="minmax"), calibration=batches(), correction=0.5)

    class Wrong(Gptq):
        name, correction = "wrong", 2.0

    with pytest.raises(ValueError, match="correction must be a number between 0 and 1: got 2.0"):
        lowbit.register_quantizer(Wrong())
