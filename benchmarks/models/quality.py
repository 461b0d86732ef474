"""How good quantizers are at equal codes: ``python -m benchmarks.models.quality`` (AutoRound where it is installed).

The linear layers of stories260k, groups of 32; AutoRound leaves out those whose width, 172, is no multiple of the
group, so beside it ``--layers "*self_attn*"``. The same 32 stories of TinyStories calibrate every method, in rows of
256 tokens; 60 other stories are the measure. *Excess* is ln(perplexity / the float model's). Medians over seeds, which
choose the calibration stories. ``--json FILE`` writes every figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from benchmarks.models.accuracy import perplexity, stories260k
from lowbit import Codebook, Packed, train
from lowbit.testing import samples

ROWS = 256  # tokens
HELD_OUT, CALIBRATION = 60, 32  # stories


def calibration(texts: list[Tensor], seed: int) -> list[Tensor]:
    """Rows ``[1, 256]`` of stories that are not among those held out."""
    order = torch.randperm(len(texts) - HELD_OUT, generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = torch.cat([texts[HELD_OUT + i][0] for i in order[:CALIBRATION]])
    return list(tokens[: len(tokens) // ROWS * ROWS].view(-1, 1, ROWS))


Method = Callable[..., tuple[nn.Module, float]]  # (float model, calibration, seed) -> (model, bits per weight)


def lowbit_method(spec: Any, layers: str, recover: bool = False) -> Method:
    def run(model: nn.Module, rows: list[Tensor], seed: int) -> tuple[nn.Module, float]:
        packed = lowbit.convert(copy.deepcopy(model), {layers: spec}, calibration=rows)
        if recover:
            train.recover(packed, model, rows, seed=seed)
        rows_of = lowbit.report(packed).rows
        return packed, 8 * sum(row.bytes_after for row in rows_of) / sum(row.weights for row in rows_of)

    return run


def autoround(bits: int, iterations: int) -> Method:
    """AutoRound with its defaults, asymmetric; of 32 weights it stores a float16 scale and a zero of ``bits`` bits."""

    def run(model: nn.Module, rows: list[Tensor], seed: int) -> tuple[nn.Module, float]:
        from auto_round import AutoRound
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(samples.folder("stories260k"))
        tuner = AutoRound(
            copy.deepcopy(model), tokenizer, bits=bits, group_size=32, sym=False, iters=iterations, seed=seed,
            dataset=[{"input_ids": row} for row in rows], seqlen=ROWS, nsamples=len(rows), device_map="cpu",
            enable_torch_compile=False,
        )  # fmt: skip
        return tuner.quantize()[0].eval(), bits + (16 + bits) / 32

    return run


def methods(bits: int, layers: str, iterations: int) -> dict[str, Method]:
    def packed(quantizer: str, zeros: str, scale_bits: int | None = None, group: int = 32) -> Packed:
        coded = zeros == "int"
        return Packed(bits=bits, group_size=group, zeros=zeros, quantizer=quantizer, packed_zeros=coded,  # type: ignore[arg-type]
                      scale_bits=scale_bits)  # fmt: skip

    found = {}
    for zeros in ("int", "float"):
        for quantizer in ("gptq", "descent"):
            found[f"{quantizer}, {zeros} zeros"] = lowbit_method(packed(quantizer, zeros), layers)
        found[f"descent + recover, {zeros} zeros"] = lowbit_method(packed("descent", zeros), layers, recover=True)
        found[f"tuned, {zeros} zeros"] = lowbit_method(packed("tuned", zeros), layers)
    for quantizer in ("descent", "tuned"):
        found[f"{quantizer}, int zeros, scales of 8 bits"] = lowbit_method(packed(quantizer, "int", 8), layers)
        smaller = packed(quantizer, "int", 8, group=16)
        found[f"{quantizer}, int zeros, scales of 8 bits, groups of 16"] = lowbit_method(smaller, layers)
    table = Codebook(bits=bits, sensitivity=True)
    best = Codebook(bits=bits, quantizer="lnq")
    for name, spec in (("codebook", table), ("lnq", best)):
        found[f"{name} per row"] = lowbit_method(spec, layers)
        found[f"{name} per row + recover"] = lowbit_method(spec, layers, recover=True)
    found["tuned per row"] = lowbit_method(Codebook(bits=bits, quantizer="tuned"), layers)
    try:
        import auto_round  # noqa: F401
    except ImportError:
        return found
    return {**found, f"AutoRound, {iterations} iterations": autoround(bits, iterations)}


def measure(
    bits: list[int], layers: str, seeds: int, iterations: int, only: list[str]
) -> list[dict[str, Any]]:
    model, texts = stories260k()
    held_out = texts[:HELD_OUT]
    exact, found = perplexity(model, held_out), []
    print(f"float {exact:.4f}", flush=True)
    for width in bits:
        for name, method in methods(width, layers, iterations).items():
            if not any(fnmatch(name, pattern) for pattern in only):
                continue
            values, start = [], time.process_time()
            for seed in range(seeds):
                torch.manual_seed(seed)
                quantized, size = method(model, calibration(texts, seed), seed)
                values.append(perplexity(quantized, held_out))
            seconds = (time.process_time() - start) / seeds
            value = statistics.median(values)
            row = {
                "bits": width, "layers": layers, "method": name, "perplexity": round(value, 4),
                "lowest": round(min(values), 4), "highest": round(max(values), 4),
                "excess": round(math.log(value / exact), 4), "bits_per_weight": round(size, 4), "seeds": seeds,
                "seconds": round(seconds),
            }  # fmt: skip
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--layers", default="*proj", help="pattern of those that are quantized")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of methods: 'tuned*'")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.bits, given.layers, given.seeds, given.iterations, given.only)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
