"""Folders in other libraries' formats, made of tiny models of transformers, for tests of importers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit

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
        for layer in [n.removesuffix(".weight") for n in tensors if only in n and n.endswith(".weight")]:
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
