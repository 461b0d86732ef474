"""Milliseconds per generated token, and of a prompt of 128, of a 1.1B Llama: lowbit and its peers in turns.

    python -m benchmarks.models.decode --threads 2
    python -m benchmarks.models.decode --threads 1 --candidates "lowbit 4-bit g128 int8 compiled" "llama.cpp q4_k"

Each round runs every candidate once, so that a machine whose speed changes is as slow for all of them. A ratio is the
median over rounds of (time of the first candidate) / (time of this one). Candidates: benchmarks/models/test_decode.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.harness.candidate import Unavailable
from benchmarks.models import test_decode

CANDIDATES = [
    "llama.cpp q4_k", "openvino w4 g128 int8", "lowbit 4-bit g128 int8", "lowbit 4-bit g128 int8 compiled"
]  # fmt: skip


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    models = {}
    for candidate in given.candidates:
        try:
            models[candidate] = test_decode._prepare(candidate, given.threads)
        except (ImportError, Unavailable) as error:
            print(f"left out: {candidate}: {error}")
    if not models:
        return
    for what, tokens in (("generate", test_decode.GENERATED), ("prefill", 1)):
        runs = {candidate: getattr(model, what) for candidate, model in models.items()}
        for run in runs.values():
            run()
        rounds = [{candidate: seconds(run) / tokens for candidate, run in runs.items()} for _ in range(given.rounds)]
        print(f"| {what}, {given.threads} thread(s) | ms | x |\n|---|---|---|")
        first = next(iter(runs))
        for candidate in runs:
            ms = 1e3 * statistics.median(each[candidate] for each in rounds)
            ratio = statistics.median(each[first] / each[candidate] for each in rounds)
            print(f"| {candidate} | {ms:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
