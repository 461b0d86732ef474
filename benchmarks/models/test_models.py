"""Sentences per second of all-MiniLM-L6-v2, one at a time and 32 at once: float, and packed at several bit widths."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lowbit
from lowbit import demo

CANDIDATES = [
    "torch fp32",
    "torch bf16",
    "lowbit 4-bit g64 float",
    "lowbit 4-bit g64 int8",
    "lowbit 8-bit g64 int8",
]
ALL_CANDIDATES = [*CANDIDATES, "lowbit 4-bit g64 bf16", "lowbit 2-bit g64 int8", "lowbit 8-bit g64 float"]
MS = [1, 32]  # sentences in a batch
SENTENCES = 64
# Cosine of every embedding to that of the float model with the same (dequantized) weights.
FLOOR = {"float": 0.99999, "int8": 0.99, "fp32": 0.99999, "bf16": 0.999}


@functools.cache
def source(batch: int) -> tuple[torch.nn.Module, Any]:
    """The float model, and sentences in batches of similar length, as a server would sort them."""
    pytest.importorskip("transformers")
    pytest.importorskip(demo.MODEL_PACKAGE, reason=f"{demo.MODEL_PACKAGE} is not installed")
    logging.disable(logging.WARNING)
    model, tokenizer, _ = demo.load_float(demo.default_model())
    sentences = sorted((s for p in demo.sentence_pairs() for s in (p.first, p.second)), key=len)
    step = len(sentences) // SENTENCES
    chosen = sentences[: step * SENTENCES : step]
    return model, [b for i in range(0, SENTENCES, batch) for b in demo.batches(tokenizer, chosen[i : i + batch])]


@functools.lru_cache(maxsize=1)
def prepared(candidate: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the model to time, the float32 model that it should agree with)."""
    exact = source(1)[0]
    model = copy.deepcopy(exact)
    if candidate.startswith("torch"):
        return (model.bfloat16() if candidate == "torch bf16" else model), exact
    bits, _, activations = candidate.split()[1:]
    spec = lowbit.Packed(
        bits=int(bits[0]), group_size=64, quantizer="mse", activations="int8" if activations == "int8" else "float"
    )
    packed = lowbit.convert(model, spec)
    exact = lowbit.dequantize(copy.deepcopy(packed))
    return (packed.bfloat16() if activations == "bf16" else packed), exact


def test_sentences(measure: Callable[..., None], candidate: str, threads: int, m: int) -> None:
    model, expected = prepared(candidate)
    inputs = source(m)[1]
    found = demo.embed(model, inputs).float()
    worst = float(F.cosine_similarity(found, demo.embed(expected, inputs)).min())
    assert worst >= FLOOR[candidate.split()[-1]], f"{candidate} is wrong: cosine {worst:.5f}"

    measure(
        lambda: demo.embed(model, inputs), op="sentences", name=candidate, shape="all-MiniLM-L6-v2", m=m,
        products=len(inputs), who=candidate.split()[0],
    )  # fmt: skip
