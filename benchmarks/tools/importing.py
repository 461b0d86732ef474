"""How long a GGUF file of 1.1 billion weights takes to be read, and how much memory.

    python -m benchmarks.tools.importing [FILE]

FILE is made of random blocks where it is not there (640 MB; Q4_K, every other value and down projection Q6_K). The
figures: seconds and CPU seconds without imports; the peak beyond what was resident before, against the packed model.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import lowbit
from lowbit.checkpoint.exporters.gguf import Planned, row_bytes, write

HIDDEN, INNER, LAYERS, VOCABULARY, KEYS = 2048, 5632, 22, 32000, 256
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (KEYS, HIDDEN), "attn_v": (KEYS, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
HALVES = {"Q4_K": ((0, 2), 144), "Q6_K": ((208,), 210)}  # where a block has float16 numbers, and its bytes


def make(file: Path) -> None:
    """Write the file."""

    def blocks(name: str, rows: int, columns: int) -> Planned:
        places, nbytes = HALVES[name]

        def content() -> torch.Tensor:
            made = torch.randint(0, 256, (rows * row_bytes(name, columns) // nbytes, nbytes), dtype=torch.uint8)
            for at in places:
                made[:, at : at + 2] = torch.tensor([1e-3]).half().view(torch.uint8)
            return made

        return Planned(name, (rows, columns), content)

    ones = Planned("F32", (HIDDEN,), lambda: torch.ones(HIDDEN))
    tensors = {"token_embd.weight": blocks("Q4_K", VOCABULARY, HIDDEN), "output_norm.weight": ones,
               "output.weight": blocks("Q6_K", VOCABULARY, HIDDEN)}  # fmt: skip
    for i in range(LAYERS):
        for part, shape in SHAPES.items():
            finer = part in ("attn_v", "ffn_down") and i % 2 == 1
            tensors[f"blk.{i}.{part}.weight"] = blocks("Q6_K" if finer else "Q4_K", *shape)
        tensors |= {f"blk.{i}.{norm}.weight": ones for norm in ("attn_norm", "ffn_norm")}
    fields = {"block_count": LAYERS, "context_length": 2048, "embedding_length": HIDDEN, "feed_forward_length": INNER,
              "attention.head_count": 32, "attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5,
              "rope.freq_base": 1e4}  # fmt: skip
    general = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    write(file, {**general, **{f"llama.{name}": value for name, value in fields.items()}}, tensors)


def main(file: Path) -> None:
    """Read it once, and print the figures."""
    import transformers

    transformers.LlamaForCausalLM  # noqa: B018 - what is imported before counts for nothing
    if not file.exists():
        make(file)
    before, start, used = _resident(), time.perf_counter(), time.process_time()
    model = lowbit.load(file)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak, packed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, lowbit.report(model).total_after
    print(f"{seconds:.1f} s, {used:.1f} CPU s, {torch.get_num_threads()} threads")
    print(f"packed {packed / 1e6:.0f} MB of {file.stat().st_size / 1e6:.0f} MB")
    print(f"peak {peak / 1e6:.0f} MB: {peak / packed:.2f} x")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.gettempdir()) / "lowbit-1.1B.gguf")
