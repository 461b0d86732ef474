"""Parameters and bytes on disk of GPT-2 small's shape with the Kronecker factors of KnGPT2 (arXiv 2110.08152).

``python -m benchmarks.models.kron_sizes`` saves the shape with random weights in float32, and converted: the token
embedding (tied to the head) and the block matrices of the odd-numbered layers, at half of their size. The paper goes
from 124 to about 83 million parameters. A folder counts whole; the last column is the relative error of the converted
weights.
"""

from __future__ import annotations

from torch import nn

import lowbit
from benchmarks.models.sizes import folder_bytes, shapes
from lowbit import Kronecker, Packed
from lowbit.nn.layer import layers

SETTINGS: dict[str, Kronecker | None] = {
    "float32": None,
    "compression=2": Kronecker(compression=2),
    "compression=2, 8-bit factors": Kronecker(
        compression=2, factors=Packed(bits=8, granularity="row", quantizer="minmax")
    ),
    "compression=4": Kronecker(compression=4),
}


def convert(model: nn.Module, spec: Kronecker) -> nn.Module:
    """The embedding and layers 1, 3, ..., 11, as in KnGPT2."""
    return lowbit.convert(model, {"transformer.wte": spec, **{f"transformer.h.{i}.*": spec for i in range(1, 12, 2)}})


def parameters(model: nn.Module) -> int:
    """Every parameter once, a tied one too; of a packed factor its elements."""
    found = layers(model).values()
    factors = {id(tensor) for layer in found for tensor in layer.named_tensors().values()}
    count = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in factors)
    for form in {id(layer.a): layer.format for layer in found}.values():
        count += form.rank * (form.n1 * form.k1 + form.n2 * form.k2)
    return count


def main() -> None:
    print("| setting | million parameters | MiB on disk | times smaller | weight error |\n|---|---|---|---|---|")
    exact = 0
    for setting, spec in SETTINGS.items():
        model, _ = shapes()["GPT-2 small"]
        error = "0"
        if spec is not None:
            errors = [e for row in lowbit.report(convert(model, spec)).rows if (e := row.weight_error) is not None]
            error = f"{min(errors):.3f} to {max(errors):.3f}"
        size = folder_bytes(model)
        exact = exact or size
        millions = parameters(model) / 1e6
        print(f"| {setting} | {millions:.2f} | {size / 2**20:.2f} | {exact / size:.2f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
