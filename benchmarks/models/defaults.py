"""Which defaults `Packed` should have: ``python -m benchmarks.models.defaults`` measures every choice on two models.

All linear and embedding layers of stories260k (a Llama; perplexity) and of all-MiniLM-L6-v2 (a BERT; mean cosine of
sentence embeddings to the float model's) are packed with every bits x quantizer x zero point x group size.
``--sentences`` and ``--stories`` set how much is measured. Needs the sample data.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from benchmarks.models.accuracy import calibration, minilm, perplexity, stories260k, sts_b, tokenized
from lowbit import Packed
from lowbit.nn.layer import Layer

BITS = (4, 3, 2, 8)
QUANTIZERS = ("minmax", "mse", "gptq")
ZEROS = ("symmetric", "int", "float")


def spec_of(bits: int, quantizer: str, zeros: Any, group: int | None) -> Packed:
    """No default is relied on."""
    where: dict[str, Any] = {"granularity": "row"} if group is None else {"granularity": "group", "group_size": group}
    if zeros == "symmetric":
        return Packed(bits=bits, quantizer=quantizer, symmetric=True, scale_dtype=torch.float16, **where)
    return Packed(bits=bits, quantizer=quantizer, zeros=zeros, scale_dtype=torch.float16, **where)


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits of all packed weights over their number, each storage counted once."""
    layers = {layer.packed.data_ptr(): layer.format for layer in model.modules() if isinstance(layer, Layer)}
    formats = layers.values()
    return 8 * sum(f.nbytes for f in formats) / sum(f.out_features * f.in_features for f in formats)


def fitting(model: nn.Module, group: int | None) -> dict[str, int | None]:
    """The group of every linear or embedding layer: clipped to its K, as a default must be."""
    found: dict[int, tuple[str, int | None]] = {}  # by weight: a tied head goes with its embedding
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            size = None if group is None else min(group, module.weight.shape[1])
            found.setdefault(id(module.weight), (name, size))
    return dict(found.values())


Choice = tuple[int, str, str, "int | None"]


def rows(
    model: nn.Module, batches: list[Any], measure: Callable[[nn.Module], float], choices: list[Choice]
) -> Iterator[dict[str, Any]]:
    yield {"bits": 32, "quantizer": "", "zeros": "", "group": 0, "size": 32.0, "value": measure(model)}
    for bits, quantizer, zeros, group in choices:
        specs = {name: spec_of(bits, quantizer, zeros, size) for name, size in fitting(model, group).items()}
        data = batches if quantizer == "gptq" else None
        packed = lowbit.convert(copy.deepcopy(model), specs, calibration=data)
        size, value = bits_per_weight(packed), measure(lowbit.dequantize(packed))
        what = {"bits": bits, "quantizer": quantizer, "zeros": zeros, "group": group or "row"}
        yield {**what, "size": size, "value": value}


def stories(count: int, choices: list[Choice]) -> Iterator[dict[str, Any]]:
    model, texts = stories260k()
    return rows(model, texts[:32], lambda m: perplexity(m, texts[32 : 32 + count]), choices)


def embedder(tokenizer: Any, count: int) -> Callable[[nn.Module], torch.Tensor]:
    """model -> the embeddings of ``count`` sentences of STS-B dev: the mean of the last hidden state, norm 1."""
    first, second, _ = sts_b("dev")
    distinct = sorted(set(first + second))
    batches = tokenized(tokenizer, sorted(distinct[:: max(1, len(distinct) // count)][:count], key=len))

    def embed(model: nn.Module) -> torch.Tensor:
        found = []
        with torch.inference_mode():
            for batch in batches:
                hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
                found.append(F.normalize((hidden * mask).sum(1), dim=-1))
        return torch.cat(found)

    return embed


def sentences(count: int, choices: list[Choice]) -> Iterator[dict[str, Any]]:
    model, tokenizer = minilm()
    embed = embedder(tokenizer, count)
    exact = embed(model)
    return rows(
        model, calibration(tokenizer, 128), lambda m: float((embed(m) * exact).sum(-1).mean()), choices
    )


def table(title: str, found: list[dict[str, Any]]) -> str:
    """Markdown: a row per bits and group, a column per quantizer and zero point, ``value (bits per weight)``."""
    measured = {(r["quantizer"], r["zeros"]) for r in found}
    columns = [each for each in itertools.product(QUANTIZERS, ZEROS) if each in measured]
    lines = [f"| {title} | " + " | ".join(f"{q}, {z}" for q, z in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    at = {(r["bits"], r["group"], r["quantizer"], r["zeros"]): r for r in found}
    for bits, group in itertools.product(sorted(BITS, reverse=True), ("row", 128, 64, 32)):
        cells = [at.get((bits, group, *column)) for column in columns]
        if any(cells):
            texts = (f"{cell['value']:.4g} ({cell['size']:.2f})" if cell else "" for cell in cells)
            lines.append(f"| {bits} bits, {group} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["stories", "minilm"])
    parser.add_argument("--stories", type=int, default=32)
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS)
    parser.add_argument("--groups", nargs="+", default=["32", "64", "128", "row"])
    options = parser.parse_args()
    groups = [None if group == "row" else int(group) for group in options.groups]
    choices = list(itertools.product(options.bits, options.quantizers, ZEROS, groups))
    measured = {}
    for name, title, found in (
        ("stories", "stories260k, perplexity (bits per weight)", lambda: stories(options.stories, choices)),
        ("minilm", "MiniLM, mean cosine (bits per weight)", lambda: sentences(options.sentences, choices)),
    ):
        if options.only in (None, name):
            measured[name] = []
            for row in found():
                measured[name].append(row)
                print(row, flush=True)
            print(f"\nfloat32: {measured[name][0]['value']:.4f}\n{table(title, measured[name])}\n")
            if options.json:
                options.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
