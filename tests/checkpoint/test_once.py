"""Loading does everything once: a description is parsed, names are tied; a layer is built, validated, prepared."""

from collections import Counter

import pytest
import torch
from torch import nn

import lowbit
from lowbit.checkpoint import folder, metadata
from lowbit.nn.layer import layer_classes, layers


@pytest.fixture
def calls(monkeypatch):
    """How often what has to be done once is done: by function, for a layer by function and layer."""
    counted: Counter = Counter()

    def count(owner, name, key=lambda *args: None):
        function = getattr(owner, name)

        def counting(*args, **kwargs):
            counted[name, key(*args)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for made in layer_classes().values():
        for name in ("__init__", "prepare", "validate", "_apply"):
            count(made, name, lambda layer, *_: id(layer))
    count(metadata, "parse")
    try:
        from lowbit.integrations import loading, pretrained, ties
    except ImportError:
        return counted
    monkeypatch.setattr(pretrained, "parse", metadata.parse)
    count(ties, "retie")
    for module in (loading, pretrained):
        monkeypatch.setattr(module, "retie", ties.retie)
    return counted


def check(calls: Counter, model: nn.Module, retied: int) -> None:
    found = layers(model)
    once = ("__init__", "prepare", "validate")
    expected = Counter({(name, id(layer)): 1 for name in once for layer in found.values()})
    expected["parse", None] = 1
    if retied:
        expected["retie", None] = retied
    assert calls == expected


class Net(nn.Module):
    """An embedding and its tied head, a block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(51, 48), nn.Linear(48, 51, bias=False)
        self.head.weight = self.embed.weight
        self.block = self.again = nn.Linear(48, 48)


def test_a_plain_folder(calls, tmp_path):
    lowbit.save(lowbit.convert(Net(), lowbit.Packed(bits=4)), tmp_path)
    calls.clear()
    with torch.device("meta"):
        skeleton = Net()
    check(calls, folder.load(tmp_path, skeleton), retied=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["saved dtype", "bfloat16"])
@pytest.mark.parametrize("loader", ["lowbit.load", "from_pretrained"])
def test_a_transformers_folder(loader, dtype, calls, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, dtype="float32" if dtype is None else "bfloat16",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype or torch.float32)
    lowbit.save(lowbit.convert(model, lowbit.Packed(bits=4)), tmp_path)
    calls.clear()
    if loader == "lowbit.load":
        loaded = lowbit.load(tmp_path)
    else:
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto")
    assert {layer.dtype for layer in layers(loaded).values()} == {dtype or torch.float32}
    check(calls, loaded, retied=1)
