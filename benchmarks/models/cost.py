"""What quantizers cost: ``python -m benchmarks.models.cost [--model minilm | llama]``.

Each method converts in a process of its own, with one thread: seconds of CPU time, and by how much the process's memory
rises above what the model and its calibration data take. ``minilm``: all-MiniLM-L6-v2, its linear layers, 512 sentences
of STS-B. ``llama``: one block of the shape of TinyLlama 1.1B (2048, 5632; 44 M weights), random, 32 rows of 256 tokens;
``tuned`` makes 10 of its 200 steps, and the seconds of steps are extrapolated. 22 such blocks are the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

import lowbit
from benchmarks.models.accuracy import calibration, minilm
from lowbit import Codebook, Packed, train

METHODS: dict[str, Any] = {
    "minmax": Packed(bits=3, quantizer="minmax"),
    "mse": Packed(bits=3),
    "gptq": Packed(bits=3, quantizer="gptq"),
    "descent": Packed(bits=3, quantizer="descent"),
    "tuned": Packed(bits=3, quantizer="descent"),  # then train.tune
    "tuned by block": Packed(bits=3, quantizer="descent"),
    "codebook optimal": Codebook(bits=3),
    "codebook sensitivity": Codebook(bits=3, sensitivity=True),
    "codebook lnq": Codebook(bits=3, quantizer="lnq"),
}
STEPS = {"minilm": 200, "llama": 10}


def model_of(name: str) -> tuple[nn.Module, list[Any], str]:
    """(float model, batches, pattern of the layers)."""
    if name == "minilm":
        model, tokenizer = minilm()
        return model, calibration(tokenizer, 512), "encoder.*"
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1,
                         num_attention_heads=32, num_key_value_heads=4)  # fmt: skip
    rows = list(torch.randint(256, (32, 1, 256), generator=torch.Generator().manual_seed(0)))
    return LlamaForCausalLM(config).eval(), rows, "*proj"


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, method: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, batches, layers = model_of(name)
    with torch.no_grad():
        model(**batches[0]) if isinstance(batches[0], dict) else model(batches[0])
    tuned, spec, steps = "tuned" in method, METHODS[method], STEPS[name]
    float_model = model_of(name)[0] if tuned else None
    before, start = peak(), time.process_time()
    lowbit.convert(model, {layers: spec}, calibration=batches if spec.needs_calibration else None)
    seconds = time.process_time() - start
    if float_model is not None:
        start = time.process_time()
        train.tune(model, float_model, batches, by="block" if "block" in method else "model", steps=steps)
        seconds += (time.process_time() - start) * 200 / steps
    return {"model": name, "method": method, "seconds": round(seconds, 1), "MiB": round(peak() - before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "llama"], nargs="+", default=["minilm", "llama"])
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--here", action="store_true", help="measure in this process")
    given = parser.parse_args()
    for name in given.model:
        for method in given.method:
            if given.here:
                print(json.dumps(measure(name, method)), flush=True)
                continue
            command = [sys.executable, "-m", "benchmarks.models.cost", "--here", "--model", name, "--method", method]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
