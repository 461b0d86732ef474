"""k-means against linear quantization, per tensor at 1 to 5 bits: ``python -m benchmarks.models.kmeans_accuracy``.

The setting of arXiv 2010.07109 (every Linear and Embedding, one table or one scale per matrix) without any fine-tuning:
float models with dequantized weights. Needs what benchmarks/models/accuracy.py needs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import accuracy
from lowbit import Packed
from lowbit.codebook.format import Codebook
from lowbit.codebook.quantize import quantize as quantize_codebook
from lowbit.packed.quantize import quantize as quantize_linear

Method = Callable[[Tensor, int], Tensor]  # (float weight, bits) -> dequantized weight


def codebook(quantizer: str) -> Method:
    def method(weight: Tensor, bits: int) -> Tensor:
        q = quantize_codebook(weight, Codebook(bits=bits, granularity="tensor", zeros="int", quantizer=quantizer))
        return q.codebook.flatten()[q.codes.int()]

    return method


def linear(quantizer: str) -> Method:
    """Asymmetric; at 1 bit, which Packed does not have, {min, max} and the least-squares {-s, s}, s = mean|w|."""

    def method(weight: Tensor, bits: int) -> Tensor:
        if bits == 1 and quantizer == "minmax":
            low, high = weight.min(), weight.max()
            return torch.where(weight > (low + high) / 2, high, low)
        if bits == 1:
            return torch.where(weight > 0, 1.0, -1.0) * weight.abs().mean()
        q = quantize_linear(weight, Packed(bits=bits, granularity="tensor", zeros="int", quantizer=quantizer))
        assert q.zeros is not None
        return (q.codes.float() - q.zeros.float()) * q.scales.float()

    return method


METHODS: dict[str, Method] = {
    "linear, min-max": linear("minmax"),
    "linear, least squares": linear("mse"),
    "k-means": codebook("kmeans"),
    "k-means, optimal": codebook("optimal"),
}


def quantized(model: nn.Module, method: Method, bits: int) -> nn.Module:
    """A copy whose every Linear and Embedding weight is quantized and dequantized; a tied one once."""
    model = copy.deepcopy(model)
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for weight in weights.values():
        weight.data.copy_(method(weight.data, bits))
    return model


def print_table(title: str, measure: Callable[[nn.Module], str], model: nn.Module, exact: str, bits: range) -> None:
    """Rows are bits, columns methods."""
    print(f"| {title} | " + " | ".join(METHODS) + " |")
    print("|---" * (1 + len(METHODS)) + "|")
    print("| float32 | " + " | ".join([exact] * len(METHODS)) + " |", flush=True)
    for b in bits:
        cells = [measure(quantized(model, method, b)) for method in METHODS.values()]
        print(f"| {b} bit | " + " | ".join(cells) + " |", flush=True)
    print()


def minilm(bits: range) -> None:
    model, tokenizer = accuracy.minilm()
    data = accuracy.StsB(tokenizer)
    exact = data.embed(model)

    def measure(model: nn.Module) -> str:
        embeddings = data.embed(model)
        return f"{float((embeddings * exact).sum(-1).mean()):.4f} / {data.spearman(embeddings):.4f}"

    print_table("MiniLM: mean cosine to float / STS-B dev Spearman", measure, model, measure(model), bits)


def stories(bits: range) -> None:
    model, texts = accuracy.stories260k()

    def measure(model: nn.Module) -> str:
        return f"{accuracy.perplexity(model, texts):.4g}"

    print_table("stories260k: perplexity", measure, model, measure(model), bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["minilm", "stories"])
    parser.add_argument("--bits", type=int, nargs=2, default=(1, 5), metavar=("FIRST", "LAST"))
    arguments = parser.parse_args()
    bits = range(arguments.bits[0], arguments.bits[1] + 1)
    if arguments.only in (None, "minilm"):
        minilm(bits)
    if arguments.only in (None, "stories"):
        stories(bits)


if __name__ == "__main__":
    main()
