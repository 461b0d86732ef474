"""What ``lowbit.plan`` gains over one form for all: ``python -m benchmarks.models.plan`` (needs the sample data).

stories260k, a Llama of 260 k weights (calibrated on 24 stories or so in rows of 256 tokens; measured on 60 others by
perplexity), and a ViT of 500 k weights (512 images of MNIST; measured on 5,000 others by KL divergence). Budgets are
bits per weight, everything counted; ``=3``: the very bytes of 3 bits everywhere with float zeros in groups of 64;
``=3/32``: those of 3 bits in groups of 32, with packed zeros and scales of 8 bits. *Uniform* is the best of the
candidates that fit everywhere, by what the plan sees. *Excess* is ln(perplexity / the float model's), or the KL
divergence. Medians over seeds, which choose the calibration data. ``--json FILE`` writes every figure.

``--scores`` compares instead what each candidate of each layer costs by gradients and by the KL divergence with it
alone: rank correlation over all, its median over candidates (among layers), seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from benchmarks.models.accuracy import perplexity, stories260k
from benchmarks.models.quality import HELD_OUT, calibration
from lowbit import Packed
from lowbit.core.family import Spec
from lowbit.model.surgery import float_modules, put
from lowbit.nn.layer import layers
from lowbit.quality.budget import Planner, written
from lowbit.quality.distance import Distance
from lowbit.quality.statistics import rank_correlation
from lowbit.testing import samples

TOGETHER = 4  # rows of a batch
IMAGES = 512
CODED: dict[str, Any] = {"packed_zeros": True, "scale_bits": 8}
Task = tuple[nn.Module, Callable[[int], list[Tensor]], Callable[[nn.Module], float], list[str]]


def stories() -> Task:
    model, texts = stories260k()
    exact = perplexity(model, texts[:HELD_OUT])

    def batches(seed: int) -> list[Tensor]:
        rows = torch.cat(calibration(texts, seed))
        return list(rows[: len(rows) // TOGETHER * TOGETHER].split(TOGETHER))

    return model, batches, lambda packed: math.log(perplexity(packed, texts[:HELD_OUT]) / exact), []


def vit() -> Task:
    script, folder = samples.script("vit_mnist", "vit"), samples.folder("vit_mnist")
    model, (images, _) = script.load(folder), script.images(folder)

    def batches(seed: int) -> list[Tensor]:
        chosen = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:IMAGES]
        return list(images[chosen].split(64))

    distance = Distance(model, list(images[5000:].split(500)))

    @torch.no_grad()
    def excess(packed: nn.Module) -> float:
        for name, module in float_modules(layers(packed)).items():  # of the same weights; many rows are faster
            put(packed, name, module)
        return distance(packed)

    return model, batches, excess, ["patch"]


MODELS: dict[str, Callable[[], Task]] = {"stories260k": stories, "vit": vit}


def candidates(quantizer: str) -> list[Spec]:
    """The default ones, of 2 to 8 bits with packed zeros and scales of 8 bits; and float zeros up to 4."""
    def packed(bits: int, group: int, **options: Any) -> Spec:
        return Packed(bits=bits, quantizer=quantizer, group_size=group, **options)

    found = [packed(bits, 64, **CODED) for bits in (2, 3, 4, 5, 6, 8)]
    found += [packed(bits, group, **CODED) for group in (32, 16) for bits in (2, 3, 4)]
    found += [packed(bits, 64, zeros="float") for bits in (2, 3, 4)]
    return found + [packed(bits, 32, zeros="float") for bits in (2, 3)]


def bits_of(model: nn.Module, spec: Spec, batches: list[Tensor], skip: list[str]) -> float:
    rows = lowbit.convert(model, spec, skip=skip, dry_run=True, calibration=batches).rows
    return 8 * sum(row.bytes_after for row in rows) / sum(row.weights for row in rows if row.shares is None)


def measure(
    name: str, budgets: list[str], seed: int, signal: str, quantizer: str, trials: int, fused: bool
) -> list[dict[str, Any]]:
    model, data, excess, skip = MODELS[name]()
    batches, specs = data(seed), candidates(quantizer)
    planner = Planner(model, calibration=batches, candidates=specs, skip=skip, fused=fused, signal=signal,
                      trials=trials, seed=seed)  # fmt: skip
    found, quality = [], {}

    def quality_of(specs: Any) -> float:
        key = repr(specs)
        if key not in quality:
            packed = lowbit.convert(copy.deepcopy(model), specs, skip=skip if isinstance(specs, Spec) else None,
                                    calibration=batches)  # fmt: skip
            quality[key] = excess(packed)
        return quality[key]

    for budget in budgets:
        start = time.process_time()
        width, _, group = budget.lstrip("=").partition("/")
        bits = float(width)
        if budget.startswith("="):
            same = (Packed(bits=int(width), quantizer=quantizer, group_size=int(group), **CODED) if group
                    else Packed(bits=int(width), quantizer=quantizer, group_size=64))  # fmt: skip
            bits = bits_of(model, same, batches, skip) * (1 + 1e-12)
        plan = planner.within(bits)
        seconds = time.process_time() - start
        row = {
            "model": name, "budget": budget, "seed": seed, "signal": signal, "quantizer": quantizer, "trials": trials,
            "fused": fused,
            "bits": round(plan.bits_per_weight, 4), "bytes": plan.bytes, "limit": plan.budget,
            "uniform_bytes": plan.uniform_bytes, "uniform": written(plan.uniform_spec), "kept": plan.kept,
            "excess": round(quality_of(plan.specs), 5), "uniform_excess": round(quality_of(plan.uniform_spec), 5),
            "held_out_kl": round(plan.measured, 5), "predicted_kl": round(plan.predicted, 5),
            "seconds": round(seconds, 1),
        }  # fmt: skip
        assert plan.bytes <= plan.budget
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def scores(name: str, seed: int, quantizer: str) -> dict[str, Any]:
    model, data, _, skip = MODELS[name]()
    found, seconds, specs = {}, {}, candidates(quantizer)
    for signal in ("gradient", "kl"):
        planner = Planner(model, calibration=data(seed), candidates=specs, skip=skip, signal=signal, seed=seed)
        start = time.process_time()
        found[signal] = planner.prepared().scores
        seconds[signal] = round(time.process_time() - start, 1)
    mine, other = found["gradient"], found["kl"]
    each = [rank_correlation(mine[:, c], other[:, c]) for c in range(len(specs))]
    return {"model": name, "seed": seed, "groups": len(mine), "candidates": len(specs),
            "all": round(rank_correlation(mine.flatten(), other.flatten()), 4),
            "among_layers": round(statistics.median(each), 4), "lowest": round(min(each), 4),
            "seconds_with_conversion": seconds}  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Medians over seeds; a ratio is of the plan's excess to the uniform form's, the last column its worst."""
    lines = ["| model | budget, bits | budget, bytes | plan | uniform | its excess | the plan's | ratio | worst |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["model"], row["budget"]), []).append(row)
    for (model, budget), rows in groups.items():
        ratios = [row["excess"] / row["uniform_excess"] for row in rows]
        limit, size, same, uniform, plan = (
            statistics.median(row[key] for row in rows)
            for key in ("limit", "bytes", "uniform_bytes", "uniform_excess", "excess")
        )
        lines.append(f"| {model} | {budget} | {limit:,.0f} | {size:,.0f} | {same:,.0f} | {uniform:.4f} | {plan:.4f} | "
                     f"{statistics.median(ratios):.3f} | {max(ratios):.3f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", default=["2.5", "3", "=3", "3.5", "4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--signal", default="gradient", choices=["gradient", "kl"])
    parser.add_argument("--quantizer", default="gptq")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--apart", action="store_true", help="layers of one input may differ: fused=False")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scores", action="store_true", help="compare the two signals")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    if given.scores:
        found = [scores(name, seed, given.quantizer) for name in given.models for seed in range(given.seeds)]
        print(json.dumps(found, indent=1))
        return
    for name in given.models:
        for seed in range(given.seeds):
            found += measure(name, given.budgets, seed, given.signal, given.quantizer, given.trials,
                             not given.apart)  # fmt: skip
            if given.json:
                given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
