"""Seconds and memory of reading a folder or file in another library's format.

    python -m benchmarks.models.imports [--format gptq] [--shape tinyllama] [--layers 22] [--threads 2]
                                        [--folder /tmp/lowbit-imports]

Writes random codes in the format: of a shape of ``memory.py``, gpt-oss-20b always as MXFP4; a GGUF file is always of
the shape of TinyLlama, Q4_K with every other value and down projection Q6_K. Then it reads them in fresh processes, by
``lowbit.load`` and by ``lowbit.convert_folder``, and prints one JSON object: seconds; ``peak``, the highest resident
set beyond what is resident with everything imported; and that over the bytes of the packed model. At most 60 seconds
for 1.1 B weights on two cores, and a peak of 1.2 of the packed size and one layer, are wanted.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.memory import ROOT, SHAPE, SHAPES, status, write_checkpoint

GROUP = 128


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 120, shape, dtype=torch.uint8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape) / 1000 + 1e-4


def gptq(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"qweight": words(k // 8, n), "qzeros": words(k // GROUP, n // 8) & 0x66666666,
            "scales": scales(k // GROUP, n).half(), "g_idx": torch.arange(k, dtype=torch.int32) // GROUP}  # fmt: skip


def awq(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"qweight": words(k, n // 8), "qzeros": words(k // GROUP, n // 8), "scales": scales(k // GROUP, n).half()}


def pack_quantized(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight_packed": words(n, k // 8), "weight_scale": scales(n, k // GROUP).bfloat16(),
            "weight_shape": torch.tensor([n, k])}  # fmt: skip


def int_quantized(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight": codes(n, k).view(torch.int8), "weight_scale": scales(n, 1).bfloat16()}


def fp8(n: int, k: int) -> dict[str, torch.Tensor]:
    blocks = scales(-(-n // 128), -(-k // 128))
    return {"weight": codes(n, k).view(torch.float8_e4m3fn), "weight_scale_inv": blocks}


def nvfp4(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight": codes(n, k // 2), "weight_scale": codes(n, k // 16).view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(1e-5)}  # fmt: skip


def compressed(form: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "version": "0.20.1", "config_groups": {"g": group}}


FORMATS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "pack-quantized": (pack_quantized,
                       compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP)),
    "int-quantized": (int_quantized, compressed("int-quantized", num_bits=8, strategy="channel")),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}  # fmt: skip


# of GGUF: where a block has float16 numbers, and its bytes
HALVES = {"Q4_K": ((0, 2), 144), "Q6_K": ((208,), 210)}


def write_gguf(file: Path, layers: int) -> None:
    from lowbit.checkpoint.exporters.gguf import Planned, row_bytes
    from lowbit.checkpoint.exporters.gguf import write as write_file

    hidden, inner, heads, groups, vocabulary = SHAPE.values()
    keys = hidden // heads * groups
    shapes = {
        "attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip

    def blocks(kind: str, rows: int, columns: int) -> Planned:
        places, nbytes = HALVES[kind]

        def content() -> torch.Tensor:
            made = torch.randint(0, 256, (rows * row_bytes(kind, columns) // nbytes, nbytes), dtype=torch.uint8)
            for at in places:
                made[:, at : at + 2] = torch.tensor([1e-3]).half().view(torch.uint8)
            return made

        return Planned(kind, (rows, columns), content)

    ones = Planned("F32", (hidden,), lambda: torch.ones(hidden))
    tensors = {"token_embd.weight": blocks("Q4_K", vocabulary, hidden), "output_norm.weight": ones,
               "output.weight": blocks("Q6_K", vocabulary, hidden)}  # fmt: skip
    for i in range(layers):
        for part, shape in shapes.items():
            finer = part in ("attn_v", "ffn_down") and i % 2 == 1
            tensors[f"blk.{i}.{part}.weight"] = blocks("Q6_K" if finer else "Q4_K", *shape)
        tensors |= {f"blk.{i}.{norm}.weight": ones for norm in ("attn_norm", "ffn_norm")}
    fields = {"block_count": layers, "context_length": 2048, "embedding_length": hidden, "feed_forward_length": inner,
              "attention.head_count": heads, "attention.head_count_kv": groups,
              "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "vocab_size": vocabulary}  # fmt: skip
    general = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    write_file(file, {**general, **{f"llama.{name}": value for name, value in fields.items()}}, tensors)


def quantize(tensors: dict[str, torch.Tensor], make: object) -> dict[str, torch.Tensor]:
    """The tensors of a shard, its linear layers and experts in the format."""
    made = {}
    for name, tensor in tensors.items():
        layer, leaf = name.removesuffix(".weight"), name.rpartition(".")[2]
        if tensor.dim() == 3:  # gpt-oss: [E, K, N]
            e, k, n = tensor.shape
            made |= {f"{name}_blocks": codes(e, n, k // 32, 16), f"{name}_scales": codes(e, n, k // 32) % 16 + 110}
        elif leaf == "weight" and tensor.dim() == 2 and ("proj" in name or ".experts." in name) and callable(make):
            made |= {f"{layer}.{own}": value for own, value in make(*tensor.shape).items()}
        else:
            made[name] = tensor
    return made


def write(folder: Path, shape: str, layers: int, format: str) -> None:
    if format == "gguf":
        folder.mkdir(parents=True)
        write_gguf(folder / "model.gguf", layers)
        return
    write_checkpoint(folder, shape, layers)
    is_gpt_oss = SHAPES[shape][0] == "GptOss"
    make, section = (None, {"quant_method": "mxfp4"}) if is_gpt_oss else FORMATS[format]
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = quantize(load_file(file), make)
        save_file(tensors, file, {"format": "pt"})
        names.update(dict.fromkeys(tensors, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))


def read(src: Path, dst: Path, how: str, threads: int) -> dict[str, Any]:
    import transformers

    import lowbit

    torch.set_num_threads(threads)
    tiny = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    lowbit.convert(transformers.LlamaForCausalLM(tiny), lowbit.Packed(bits=4))  # imports all that reading imports
    gc.collect()
    source, before, start = next(iter(src.glob("*.gguf")), src), status("VmRSS"), time.perf_counter()
    model = lowbit.load(source) if how == "load" else lowbit.convert_folder(source, dst)
    seconds, peak = time.perf_counter() - start, status("VmHWM") - before
    del model
    return {"seconds": seconds, "baseline": before, "peak": peak}


def nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for suffix in ("safetensors", "gguf") for file in folder.glob(f"*.{suffix}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=[*FORMATS, "gguf"], default="gptq")
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lowbit-imports"))
    parser.add_argument("--step", choices=["write", "load", "convert_folder"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = SHAPES[options.shape][2] if options.layers is None else options.layers
    src, dst = options.folder / "foreign", options.folder / "packed"
    if options.step == "write":
        write(src, options.shape, layers, options.format)
    elif options.step:
        print(json.dumps(read(src, dst, options.step, options.threads)))
    else:
        shutil.rmtree(options.folder, ignore_errors=True)

        def run(step: str) -> Any:
            command = [sys.executable, "-m", "benchmarks.models.imports", "--step", step, *sys.argv[1:]]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1]) if step != "write" else None

        try:
            run("write")
            found = {step: run(step) for step in ("load", "convert_folder")}
            sizes = {"native": nbytes(src), "packed": nbytes(dst)}
        finally:
            shutil.rmtree(options.folder, ignore_errors=True)
        for each in found.values():
            each["peak_over_packed"] = each["peak"] / sizes["packed"]
        told = {"format": options.format, "shape": options.shape, "layers": layers, "threads": options.threads}
        print(json.dumps({**told, **sizes, **found}, indent=1))


if __name__ == "__main__":
    main()
