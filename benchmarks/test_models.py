"""Sentences per second of all-MiniLM-L6-v2: float, and packed at several bit widths."""

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
    *(f"lowbit {bits}-bit g64 {activations}" for bits in (4, 8) for activations in ("float", "int8")),
]
# Cosine of every embedding to that of the float model with the same (dequantized) weights.
FLOOR = {"float": 0.99999, "int8": 0.99, "fp32": 0.99999, "bf16": 0.999}


@functools.cache
def source() -> tuple[torch.nn.Module, Any]:
    pytest.importorskip("transformers")
    pytest.importorskip(demo.MODEL_PACKAGE, reason=f"{demo.MODEL_PACKAGE} is not installed")
    logging.disable(logging.WARNING)
    model, tokenizer, _ = demo.load_float(demo.default_model())
    pairs = demo.sentence_pairs()
    return model, demo.batches(tokenizer, [p.first for p in pairs] + [p.second for p in pairs])


@functools.lru_cache(maxsize=1)
def prepared(candidate: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the model to time, the float32 model that it should agree with)."""
    model = copy.deepcopy(source()[0])
    if candidate.startswith("torch"):
        return (model.bfloat16() if candidate == "torch bf16" else model), source()[0]
    bits, _, activations = candidate.split()[1:]
    spec = lowbit.Packed(bits=int(bits[0]), group_size=64, quantizer="mse", activations=activations)  # type: ignore[arg-type]
    packed = lowbit.convert(model, spec)
    return packed, lowbit.dequantize(copy.deepcopy(packed))


def test_sentences(measure: Callable[..., None], candidate: str, threads: int) -> None:
    model, expected = prepared(candidate)
    inputs = source()[1]
    found = demo.embed(model, inputs).float()
    worst = float(F.cosine_similarity(found, demo.embed(expected, inputs)).min())
    assert worst >= FLOOR[candidate.split()[-1]], f"{candidate} is wrong: cosine {worst:.5f}"

    measure(
        lambda: demo.embed(model, inputs), op="sentences", name=candidate, shape="all-MiniLM-L6-v2",
        m=sum(len(batch["input_ids"]) for batch in inputs),
    )  # fmt: skip
