"""What the examples share: a small trained Llama, texts to train on and texts to judge by, one training loop.

The model is karpathy/tinyllamas' ``stories260k`` (in transformers' form) and the texts are 300 stories of TinyStories:
200 to train on, 100 held out. ``DATA`` is the folder that has both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import train

DATA = Path(os.environ.get("LOWBIT_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
LENGTH, BATCH = 256, 8  # tokens of a chunk, chunks of a step
TRAIN = 200  # stories


def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32).eval()


def stories() -> tuple[Tensor, list[Tensor]]:
    """(chunks ``[C, LENGTH]`` of the stories to train on, the token ids of those held out)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260k")
    texts = [re.sub(r" *\n+ *", "\n", text.strip())
             for text in json.loads((DATA / "text" / "tinystories_300.json").read_text())]  # fmt: skip
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    ids = [[1, *row[: 2 * LENGTH]] if text.isascii() else [] for text, row in zip(texts, ids, strict=True)]
    flat = torch.tensor([token for row in ids[:TRAIN] for token in row])
    return flat[: len(flat) // LENGTH * LENGTH].view(-1, LENGTH), [torch.tensor([row]) for row in ids[TRAIN:] if row]


@torch.no_grad()
def perplexity(model: nn.Module, held_out: list[Tensor]) -> float:
    """exp of the mean cross-entropy of a token."""
    loss, count = 0.0, 0
    for ids in held_out:
        logits = model(input_ids=ids, use_cache=False).logits
        loss += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(loss / count)


def distil(
    student: Any, teacher: nn.Module, chunks: Tensor, steps: int, groups: list[dict[str, Any]], *terms: train.Term
) -> Any:
    """Train with AdamW, a tenth of the steps to warm up, then a linear descent to 0."""
    if not steps:
        return student
    distillation = train.Distillation(teacher, *(terms or (train.Logits(),)))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    rounds = steps * BATCH // len(chunks) + 1
    order = torch.cat([torch.randperm(len(chunks)) for _ in range(rounds)])
    student.train()
    for step in range(steps):
        ids = chunks[order[step * BATCH : (step + 1) * BATCH]]
        loss = distillation(student, {"input_ids": ids, "labels": ids, "use_cache": False})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    distillation.close()
    return student.eval()


@torch.no_grad()
def deploy(model: Any, ids: Tensor) -> tuple[Any, int]:
    """Convert, save and load what was trained: (the loaded model, bytes of its file). The logits stay the same bits."""
    logits = model(input_ids=ids).logits
    packed = lowbit.convert(model)
    with tempfile.TemporaryDirectory() as folder:
        lowbit.save(packed, Path(folder) / "small")
        loaded = lowbit.load(Path(folder) / "small").eval()
        size = (Path(folder) / "small" / "model.safetensors").stat().st_size
    loaded.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(loaded(input_ids=ids).logits, logits), "the deployed model is another one"
    return loaded, size


def report(name: str, run: Callable[[int], dict[str, float]], seeds: int) -> dict[str, float]:
    """Run with each seed; print and return the medians, and beside them each figure that depends on the seed."""
    torch.set_num_threads(1)
    start, found = time.process_time(), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found.append({key: round(value, 4) for key, value in run(seed).items()})
    median = {key: statistics.median(one[key] for one in found) for key in found[0]}
    each = {key: [one[key] for one in found] for key in median if len({one[key] for one in found}) > 1}
    seconds = round((time.process_time() - start) / seeds)
    print(json.dumps({"row": name, **median, "seeds": seeds, "each": each, "seconds": seconds}), flush=True)
    return median


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    return parser
