"""Folders in other libraries' formats, made of tiny models of transformers, for tests of importers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.nn.layer import Layer

transformers = pytest.importorskip("transformers", minversion="5.0")
CONFIG = dict(hidden_size=40, intermediate_size=56, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
              head_dim=20, vocab_size=48)  # fmt: skip


def folder_of(
    path: Path,
    section: dict[str, Any],
    make: Callable[[int, int], tuple[dict[str, Tensor], Any]],
    config: dict[str, Any] | None = None,
    only: str = "proj",
    model: Any = None,
) -> dict[str, Any]:
    """``model``, or a tiny Llama, in ``path``, the layers that ``only`` names made by ``make(n, k)``; and what it
    says of each: its weight."""
    torch.manual_seed(0)
    if model is None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**CONFIG, **(config or {})}))
    model.save_pretrained(path)
    expected: dict[str, Any] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        weights = [n for n, tensor in tensors.items() if only in n and n.endswith(".weight") and tensor.dim() == 2]
        for layer in [n.removesuffix(".weight") for n in weights]:
            made, expected[layer] = make(*tensors.pop(f"{layer}.weight").shape)
            tensors.update({f"{layer}.{leaf}": tensor for leaf, tensor in made.items()})

    rewrite(path, change)
    configure(path, quantization_config=section)
    return expected


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder by name, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    """Set fields of ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def equal(model: Any, expected: dict[str, Tensor]) -> bool:
    """Whether the layers have these weights in float32, bit for bit."""
    found = {name: model.get_submodule(name).dequantize(torch.float32) for name in expected}
    return bool(expected) and all(torch.equal(found[name], weight) for name, weight in expected.items())


def mixture(**config: Any) -> Any:
    """A tiny mixture of experts, whose files have the experts one by one."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, head_dim=16,
                 num_attention_heads=2, num_key_value_heads=2, vocab_size=48, num_experts=3,
                 num_experts_per_tok=2)  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**sizes, **config})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def check_mixture(model: Any, plain: Any, expected: dict[str, Tensor], x: Tensor) -> None:
    """The experts of ``model`` have these weights, by their names in the files, and with ``float`` activations the
    logits are those of the float model ``plain``, which is given the weights."""
    assert expected
    for key, weight in expected.items():
        stacked = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", key)
        if stacked is None:
            assert torch.equal(model.get_submodule(key).dequantize(torch.float32), weight), key
            plain.get_parameter(f"{key}.weight").data.copy_(weight)
            continue
        place, e, part = stacked[1], int(stacked[2]), stacked[3]
        name = f"{place}.down_proj" if part == "down" else f"{place}.gate_up_proj"
        rows = {"gate": slice(None, len(weight)), "up": slice(len(weight), None), "down": slice(None)}[part]
        assert torch.equal(model.get_submodule(name).dequantize(torch.float32)[e, rows], weight), key
        plain.get_parameter(name).data[e, rows] = weight
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if all(layer.format.activations == "float" for layer in layers):
        found, wanted = (m(x).logits.double() for m in (model, plain))
        assert float((found - wanted).detach().norm() / wanted.norm()) < 1e-5


def check_experts(path: Path, section: dict[str, Any], make: Callable[[int, int], tuple[dict[str, Tensor], Any]],
                  x: Tensor) -> None:  # fmt: skip
    """The experts of a mixture that is stored so are read, and written again."""
    plain = mixture()
    expected = folder_of(path / "model", section, make, model=plain)
    assert sum(".experts." in layer for layer in expected) == 9
    model = lowbit.load(path / "model")
    check_mixture(model, plain, expected, x)
    lowbit.convert_folder(path / "model", path / "packed")
    assert torch.equal(lowbit.load(path / "packed")(x).logits, model(x).logits)


def refused(folder: Path, *words: str) -> None:
    """By both ways in, with these words, and nothing is written."""
    ways: tuple[Callable[[Path], object], ...] = (
        lowbit.load,
        lambda source: lowbit.convert_folder(source, folder.parent / "packed"),
    )
    for way in ways:
        with pytest.raises(ValueError) as caught:
            way(folder)
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]
