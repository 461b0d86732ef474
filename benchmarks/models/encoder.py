"""An encoder at 3 and 2 bits: ``python -m benchmarks.models.encoder`` (needs the sample data).

Every Linear and Embedding of all-MiniLM-L6-v2 is packed, in forms whose file is no larger than that of 3 bits in groups
of 64 with integer zeros, and of 2 bits with float ones. Then ``train.recover`` learns what is not a code, on the
float model's embeddings: 1 - cosine of the mean of tokens. Calibrated on 1,024 sentences of the STS-B *train* set,
learned on 2,048; seeds choose them. Measured on all of the dev set: mean cosine to the float model's embeddings, and
Spearman's rank correlation of pairs with the human grades. Medians over seeds. ``--json FILE`` writes every figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from benchmarks.models.accuracy import StsB, file_megabytes, minilm, sts_b
from lowbit import Packed, train
from lowbit.core.family import Spec

SENTENCES, BATCH = 2048, 8
COMMON: dict[str, Any] = {"group_size": 64, "zeros": "int", "packed_zeros": True, "scale_bits": 8}
MOST = {3: 9.72, 2: 7.24}  # MB of a file


def forms(bits: int, quantizer: str) -> dict[str, Spec]:
    """Pattern -> spec. The bytes that packed zeros and scales of 8 bits save are spent where an error costs most."""
    def packed(bits: int) -> Spec:
        return Packed(bits=bits, quantizer=quantizer, **COMMON)

    if bits == 3:
        return {"*": packed(3), "*attention.output*": packed(4)}
    return {"*": packed(2), "*attention*": packed(3), "*layer.?.output.dense": packed(3)}


def sentences(tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """Batches of sentences of similar length; every second one is calibrated on."""
    first, second, _ = sts_b("train")
    distinct = sorted(set(first + second))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:SENTENCES]
    chosen = sorted((distinct[i] for i in order), key=len)
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")) for part in parts]


def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden state over the real tokens, norm 1."""
    mask = batch["attention_mask"].unsqueeze(-1).float()
    hidden: Tensor = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def loss_to(model: nn.Module) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """1 - cosine to the embeddings of ``model``, which are made once."""
    wanted: dict[int, Tensor] = {}

    def loss(packed: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        key = hash((ids.shape, ids.numpy().tobytes()))
        if key not in wanted:
            with torch.no_grad():
                wanted[key] = pooled(model, batch)
        return (1 - (pooled(packed, batch) * wanted[key]).sum(-1)).mean()

    return loss


def measure(bits: int, seed: int, quantizer: str, steps: int, lr: float) -> list[dict[str, Any]]:
    model, tokenizer = minilm()
    data, rows = StsB(tokenizer), sentences(tokenizer, seed)
    exact, start = data.embed(model), time.process_time()
    packed = lowbit.convert(copy.deepcopy(model), forms(bits, quantizer), calibration=rows[::2])
    found = []

    def note(method: str) -> None:
        embeddings = data.embed(packed)
        row = {
            "bits": bits, "seed": seed, "method": method, "MB": round(file_megabytes(packed), 3),
            "cosine": round(float((embeddings * exact).sum(-1).mean()), 4),
            "spearman": round(data.spearman(embeddings), 4), "seconds": round(time.process_time() - start),
        }  # fmt: skip
        assert row["MB"] <= MOST[bits], row
        found.append(row)
        print(json.dumps(row), flush=True)

    note(quantizer)
    train.recover(packed, model, rows, loss=loss_to(model), batch=4, steps=steps, lr=lr)
    note(f"{quantizer}, recover")
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| bits | method | file, MB | mean cosine | lowest | Spearman |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["bits"], row["method"]), []).append(row)
    for (bits, method), rows in groups.items():
        cosine, correlation = (statistics.median(row[key] for row in rows) for key in ("cosine", "spearman"))
        lowest = min(row["cosine"] for row in rows)
        lines.append(f"| {bits} | {method} | {rows[0]['MB']:.2f} | {cosine:.4f} | {lowest:.4f} | {correlation:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=list(MOST), default=list(MOST))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quantizer", default="descent")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for bits in given.bits:
        for seed in range(given.seeds):
            found += measure(bits, seed, given.quantizer, given.steps, given.lr)
            if given.json:
                given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
