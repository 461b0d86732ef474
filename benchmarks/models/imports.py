"""Time and memory of reading a folder in another library's format, of a Llama with 1.1 billion parameters.

    python -m benchmarks.models.imports [--format gptq] [--layers 22] [--threads 2] [--folder /tmp/lowbit-import]

Writes a folder in the format (linear layers of 4 bits in groups of 128, of GGUF Q4_0; embedding and head in bfloat16),
then measures in fresh processes:

- ``convert_folder``: seconds; and VmHWM (peak resident set) beyond what importing lowbit and transformers takes, over
  the size of the packed files.
- ``load``: the same of ``lowbit.load`` from the foreign folder at once.

Prints one JSON object. At most 60 s are wanted, and 1.2 of the packed size.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.models.memory import ROOT, status

FORMATS = ("gptq", "compressed-tensors", "gguf")


def write(folder: Path, format: str, layers: int) -> None:
    import torch

    import lowbit
    from benchmarks.models import llama

    group = 32 if format == "gguf" else llama.GROUP
    spec = lowbit.Packed(bits=4, group_size=group, symmetric=True)
    with torch.no_grad():
        model: Any = lowbit.convert(llama.on_meta(layers, torch.bfloat16), {"model.layers.*": spec})
        for name in ("model.embed_tokens", "lm_head"):
            module = model.get_submodule(name)
            values = torch.empty(module.weight.shape, dtype=torch.bfloat16).normal_(0, llama.SPREAD)
            module.weight = torch.nn.Parameter(values, requires_grad=False)
        llama.fill(model)
    lowbit.export(model, folder / "model.gguf" if format == "gguf" else folder, format=format)


def read(src: Path, dst: Path, how: str, threads: int) -> dict[str, Any]:
    import torch
    import transformers

    import lowbit

    torch.set_num_threads(threads)
    tiny = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    lowbit.convert(transformers.LlamaForCausalLM(tiny), lowbit.Packed(bits=4))  # imports all that reading imports
    gc.collect()
    before, start = status("VmRSS"), time.perf_counter()
    source = next(iter(src.glob("*.gguf")), src)
    model = lowbit.load(source) if how == "load" else lowbit.convert_folder(source, dst)
    seconds = time.perf_counter() - start
    assert how != "load" or any(isinstance(module, lowbit.PackedLinear) for module in model.modules())
    peak, resident = status("VmHWM") - before, status("VmRSS") - before
    return {"seconds": seconds, "baseline": before, "peak": peak, "resident": resident}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="gptq")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lowbit-import"))
    parser.add_argument("--step", choices=["write", "convert_folder", "load"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    src, dst = options.folder / options.format, options.folder / "packed"
    if options.step == "write":
        write(src, options.format, options.layers)
    elif options.step:
        print(json.dumps(read(src, dst, options.step, options.threads)))
    else:
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)

        def run(step: str) -> Any:
            command = [sys.executable, "-m", "benchmarks.models.imports", "--step", step, *sys.argv[1:]]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None

        try:
            run("write")
            results = {how: run(how) for how in ("convert_folder", "load")}
            sizes = {"foreign_bytes": weight_bytes(src), "packed_bytes": weight_bytes(dst)}
        finally:
            shutil.rmtree(options.folder, ignore_errors=True)
        for found in results.values():
            found |= {f"{name}_over_packed": found[name] / sizes["packed_bytes"] for name in ("peak", "resident")}
        facts = {"format": options.format, "layers": options.layers, "threads": options.threads}
        print(json.dumps({**facts, **sizes, **results}, indent=1))


if __name__ == "__main__":
    main()
