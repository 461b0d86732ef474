"""Bytes on disk of GPT-2-small and BART-base shapes at the W-E-A settings of QuantGPT (ACL 2022, arXiv 2203.10705).

``python -m benchmarks.models.sizes`` saves each shape with random weights in float32, and converted: block matrices
with one scale each, the token embedding (tied to the head) with one float16 scale per row, everything else float32,
8-bit activations. A folder counts whole. The paper reports 14.4x (GPT-2 small) and 13.4x (BART-base) at 2-2-8.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import lowbit
from lowbit import Packed

SETTINGS = {"8-8-8": (8, 8), "4-4-8": (4, 4), "2-2-8": (2, 2)}


def shapes() -> dict[str, tuple[nn.Module, str]]:
    """Name -> (model, pattern of its token embedding)."""
    from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

    bart = BartConfig(d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
                      encoder_attention_heads=12, decoder_attention_heads=12, vocab_size=50265)  # fmt: skip
    return {
        "GPT-2 small": (GPT2LMHeadModel(GPT2Config()), "transformer.wte"),
        "BART-base": (BartForConditionalGeneration(bart), "model.shared"),
    }


def quantgpt(weight_bits: int, embedding_bits: int, embedding: str) -> dict[str, Packed | None]:
    """The spec of a W-E-A setting with 8-bit activations."""
    common = {"symmetric": True, "quantizer": "mean", "gamma": 2.0, "activations": "int8"}
    return {
        "*": Packed(bits=weight_bits, granularity="tensor", **common),  # type: ignore[arg-type]
        "*.wpe": None,
        embedding: Packed(bits=embedding_bits, granularity="row", scale_dtype=torch.float16, **common),  # type: ignore[arg-type]
    }


def folder_bytes(model: nn.Module) -> int:
    """Bytes of everything that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def main() -> None:
    print("| shape | setting | MiB on disk | times smaller |\n|---|---|---|---|")
    for name in shapes():
        for setting, bits in {"float32": None, **SETTINGS}.items():
            model, embedding = shapes()[name]
            if bits is None:
                exact = size = folder_bytes(model)
            else:
                spec = quantgpt(*bits, embedding)
                lowbit.convert(model, {k: v for k, v in spec.items() if v or "GPT" in name})
                size = folder_bytes(model)
            print(f"| {name} | {setting} | {size / 2**20:.2f} | {exact / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
