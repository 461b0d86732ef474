"""Memory of converting and loading a model without ever holding it in float.

    python -m benchmarks.models.memory [--shape tinyllama] [--layers 22] [--bits 4] [--group-size 64]
                                       [--folder /tmp/lowbit-memory]

Writes a random bf16 checkpoint, shard by shard: of the TinyLlama shape (hidden 2048, intermediate 5632, 22 layers, 32
heads, 4 key/value heads, vocabulary 32000: 2.2 GB), or a layer of a mixture of experts, ``qwen3-30b-a3b`` (128 of
2048 x 768), ``mixtral`` (8 of 4096 x 14336) or ``gpt-oss-20b`` (32 of 2880 x 2880), in files as these models have
them. Then it measures in fresh processes:

- ``convert``: VmHWM (peak resident set of the whole process, the interpreter and torch included) of
  ``lowbit.convert_folder``, over the size of the bf16 weights; at most 1.3 is wanted.
- ``load``: what ``lowbit.load`` adds to the resident set, over the size of the packed file; at most 1.05 is wanted. The
  same for the peak while loading, and for ``from_pretrained``.

Prints one JSON object.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# class of the model, its configuration, and layers
SHAPES = {
    "tinyllama": ("Llama", dict(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000), 22),
    "qwen3-30b-a3b": ("Qwen3Moe", dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=32000), 1),
    "mixtral": ("Mixtral", dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=32000), 1),
    "gpt-oss-20b": ("GptOss", dict(
        hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
        num_local_experts=32, num_experts_per_tok=4, vocab_size=32000), 1),
}  # fmt: skip
SHAPE = SHAPES["tinyllama"][1]


def status(field: str) -> int:
    """A size in ``/proc/self/status``, in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(field)


def per_expert(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes in files that have a tensor for each expert."""
    found = {}
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        if len(shape) != 3:
            found[name] = shape
            continue
        experts, n, k = shape
        for e in range(experts):
            if leaf == "down_proj":
                found[f"{owner}.{e}.down_proj.weight"] = (n, k)
            else:
                found |= {f"{owner}.{e}.{part}.weight": (n // 2, k) for part in ("gate_proj", "up_proj")}
    return found


def in_mixtral(name: str) -> str:
    for own, theirs in (("mlp.", "block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(own, theirs)
    return name


def write_checkpoint(folder: Path, shape: str, layers: int) -> None:
    """A random bf16 checkpoint, one shard per decoder layer and some for experts, in constant memory."""
    import torch
    import transformers
    from safetensors.torch import save_file

    kind, sizes, _ = SHAPES[shape]
    cls = getattr(transformers, f"{kind}ForCausalLM")
    config = cls.config_class(**sizes, num_hidden_layers=layers, dtype="bfloat16", architectures=[cls.__name__])
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in cls(config).state_dict().items()}
    if kind != "GptOss":
        shapes = per_expert(shapes)
    if kind == "Mixtral":
        shapes = {in_mixtral(name): shape for name, shape in shapes.items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = ".".join(name.split(".")[2:6 if ".experts." in name else 3])
        shards.setdefault(layer if ".layers." in name else name, []).append(name)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weight_map = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02)
            for name in names
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def convert(src: Path, dst: Path, bits: int, group_size: int) -> dict:
    import lowbit

    start = time.perf_counter()
    lowbit.convert_folder(src, dst, lowbit.Packed(bits=bits, group_size=group_size, zeros="int", quantizer="minmax"))
    return {"seconds": time.perf_counter() - start, "peak": status("VmHWM")}


def load(folder: Path, how: str) -> dict:
    import torch
    import transformers

    import lowbit

    # the baseline has everything imported that loading imports
    tiny = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    lowbit.convert(transformers.LlamaForCausalLM(tiny), lowbit.Packed(bits=4))
    gc.collect()
    before = status("VmRSS")
    start = time.perf_counter()
    if how == "load":
        model = lowbit.load(folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - start
    gc.collect()
    result = {"seconds": seconds, "baseline": before, "resident": status("VmRSS") - before,
              "peak": status("VmHWM") - before}  # fmt: skip
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.isfinite().all()
    return {**result, "resident_after_forward": status("VmRSS") - before}


def in_process(step: str, arguments: list[str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.models.memory", "--step", step, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lowbit-memory"))
    parser.add_argument("--keep", action="store_true", help="leave the two folders behind")
    parser.add_argument("--step", choices=["write", "convert", "load", "from_pretrained"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = SHAPES[options.shape][2] if options.layers is None else options.layers
    src, dst = options.folder / "float", options.folder / "packed"
    if options.step == "write":
        write_checkpoint(src, options.shape, layers)
        print("{}")
    elif options.step == "convert":
        print(json.dumps(convert(src, dst, options.bits, options.group_size)))
    elif options.step:
        print(json.dumps(load(dst, options.step)))
    else:
        shutil.rmtree(options.folder, ignore_errors=True)
        try:
            in_process("write", sys.argv[1:])
            results = {"convert": in_process("convert", sys.argv[1:])}
            for how in ("load", "from_pretrained"):
                results[how] = in_process(how, sys.argv[1:])
            float_bytes, packed_bytes = weight_bytes(src), weight_bytes(dst)
        finally:
            if not options.keep:
                shutil.rmtree(options.folder, ignore_errors=True)
        results["convert"]["peak_over_float"] = results["convert"]["peak"] / float_bytes
        for how in ("load", "from_pretrained"):
            for name in ("resident", "peak", "resident_after_forward"):
                results[how][f"{name}_over_packed"] = results[how][name] / packed_bytes
        sizes = {"float_bytes": float_bytes, "packed_bytes": packed_bytes}
        print(json.dumps({"shape": options.shape, "layers": layers, **sizes, **results}, indent=1))


if __name__ == "__main__":
    main()
