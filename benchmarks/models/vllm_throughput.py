"""Tokens per second of vLLM with a packed folder beside the float one, with 1 and 16 requests at a time.

    python -m benchmarks.models.vllm_throughput --make FOLDER     # a 1.1 B Llama of random weights: float/ and packed/
    python -m benchmarks.models.vllm_throughput FOLDER/float FOLDER/packed --threads 2

The first needs transformers and 3 GB of disk; the second runs in an environment with vLLM (docs/serving.md). Each
folder is served in a process of its own; the first batch warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW = 32, 64  # tokens of a request, read and made


def make(folder: Path, depth: int, bits: int, activations: str) -> None:
    import torch

    from benchmarks.models import llama

    llama.dense(depth).save_pretrained(folder / "float")
    torch.manual_seed(0)
    llama.packed(bits, activations, depth).save_pretrained(folder / "packed")


def serve(folder: str, requests: list[int], repetitions: int, dtype: str, eager: bool) -> dict[int, float]:
    """Tokens per second by the number of requests; in a process of its own."""
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype=dtype, max_model_len=PROMPT + NEW, max_num_seqs=max(requests), enforce_eager=eager,
                skip_tokenizer_init=True, enable_prefix_caching=False)  # fmt: skip
    how = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True, detokenize=False)
    found = {}
    for count in requests:
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 3 for j in range(PROMPT)]} for i in range(count)]
        rates = []
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            model.generate(prompts, how, use_tqdm=False)
            rates.append(count * NEW / (time.perf_counter() - start))
        found[count] = statistics.median(rates[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--depth", type=int, default=22, help="layers of the model that --make makes")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--activations", choices=("float", "int8"), default="int8")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of x, in both folders")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.depth, given.bits, given.activations)
        return
    if given.child:
        print("RATES", json.dumps(serve(str(given.folders[0]), given.requests, given.repetitions, given.dtype,
                                          given.eager)))
        return
    threads = f"0-{given.threads - 1}" if given.threads > 1 else "0"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                   "VLLM_CPU_OMP_THREADS_BIND": threads, **os.environ}  # fmt: skip
    print(f"| folder, {given.dtype} | {' | '.join(f'{count} requests, tokens/s' for count in given.requests)} |")
    print("|---" * (1 + len(given.requests)) + "|")
    for folder in given.folders:
        arguments = [*map(str, given.requests), "--repetitions", str(given.repetitions), "--dtype", given.dtype,
                     *["--eager"] * given.eager]  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.models.vllm_throughput", str(folder), "--child", "--requests"]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RATES ")), None)
        if line is None:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        rates = json.loads(line.removeprefix("RATES "))
        print(f"| {folder} | {' | '.join(f'{rates[str(count)]:.1f}' for count in given.requests)} |", flush=True)


if __name__ == "__main__":
    main()
