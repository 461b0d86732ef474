"""Seconds and memory of arranging a 1.1B model's packed layers for this device's kernels: ``layer.prepare()``.

    python -m benchmarks.models.prepare [--bits 4] [--threads 2] [--layers 22]

Makes the layers with their codes in the canonical order, as a file has them, then arranges them one after the other.
Prints one JSON object; ``arranged`` is how many layers that changed (none where the kernels read the canonical order),
``peak`` what it needs beyond the model, ``peak_over_packed`` its share of the model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import lowbit
from benchmarks.models import llama
from benchmarks.models.memory import status


def measure(bits: int, depth: int) -> dict[str, float | int]:
    model = lowbit.convert(llama.on_meta(depth, torch.bfloat16), llama.spec(bits, "int8"))
    layers = llama.fill(model)
    packed = sum(t.nbytes for layer in layers.values() for t in layer.named_tensors().values())
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    start = time.perf_counter()
    for layer in layers.values():
        layer.prepare()
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    arranged = sum(tensor.dim() > 2 for layer in layers.values() for tensor in layer.named_tensors().values())
    return {
        "bits": bits, "threads": torch.get_num_threads(), "layers": len(layers), "arranged": arranged,
        "packed_bytes": packed, "seconds": round(seconds, 3),
        "peak": peak, "peak_over_packed": round(peak / packed, 3), "kept": status("VmRSS") - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=llama.LAYERS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.bits, options.layers)))


if __name__ == "__main__":
    main()
