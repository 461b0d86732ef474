"""Seconds and memory of reading formats that ``imports.py`` does not write, and mixtures of experts.

    python -m benchmarks.models.import_memory [--format gptq] [--shape tinyllama] [--layers 22]
                                              [--folder /tmp/lowbit-imports]

Writes a checkpoint of random codes in the format (``--format``: one of FORMATS; gpt-oss-20b is always MXFP4), then
reads it by ``lowbit.load`` in a fresh process. Prints one JSON object: ``seconds``; ``resident`` and ``peak``, what
loading adds to the resident set, and at its highest, over ``native``, the bytes of the files. At most 60 seconds for
1.1 B weights on two cores, and a peak of 1.2 of the packed size and one layer, are wanted.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.memory import ROOT, SHAPES, load, weight_bytes, write_checkpoint

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=list(FORMATS), default="gptq")
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lowbit-imports"))
    parser.add_argument("--step", choices=["write", "load"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = SHAPES[options.shape][2] if options.layers is None else options.layers
    if options.step == "write":
        write(options.folder, options.shape, layers, options.format)
        return
    if options.step == "load":
        print(json.dumps(load(options.folder, "load")))
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    try:
        found = {}
        for step in ("write", "load"):
            command = [sys.executable, "-m", "benchmarks.models.import_memory", "--step", step, *sys.argv[1:]]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1]) if step == "load" else found
        native = weight_bytes(options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    over = {f"{name}_over_native": found[name] / native for name in ("resident", "peak")}
    told = {"format": options.format, "shape": options.shape, "layers": layers, "threads": torch.get_num_threads()}
    print(json.dumps({**told, "native": native, **found, **over}, indent=1))


if __name__ == "__main__":
    main()
