"""This package's formats on a GPU, as candidates."""

from __future__ import annotations

from functools import partial

import lowbit
from benchmarks.harness.candidate import DTYPES, Candidate, Prepared, on_gpu
from benchmarks.harness.layers import codebook_weight, from_layer, kron_factors, kron_fits, packed_weight
from lowbit.backends import registry

KRON_SHAPES = ((64, 64), (2, 1), (1, 2))  # of A


def fallback() -> list[str]:
    """The problem, if there is one, that this package's ops do not run its kernels on the GPU."""
    if registry.active_backend("cuda") != "reference":
        return []
    return [f"the torch reference ran, not the kernels: {registry.why_unavailable('triton')}"]


def packed(bits: int, group_size: int | None, dtype: str, int8: bool = False) -> Candidate:
    """``(code - zero) * scale`` with float16 scales and integer zeros."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        weight, dense = packed_weight(n, k, bits, group_size, device)
        activations = "int8" if int8 else "float"
        layer = lowbit.PackedLinear.from_weight(weight, activations=activations, dtype=DTYPES[dtype])
        return from_layer(layer.to(device), dense, dtype, int8)

    scheme = f"g{group_size}" if group_size else "row"
    name = f"lowbit {bits}-bit {scheme} {dtype}" + ", int8 activations" * int8
    return on_gpu(name, dtype, prepare, "packed", bits, scheme, int8, lambda n, k: k >= (group_size or 1))


def codebook(bits: int, scheme: str, dtype: str) -> Candidate:
    """A table per ``"row"`` or ``"tensor"``, or ``"nf4"``: one table, and float16 scales per group of 64."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        weight, dense = codebook_weight(n, k, bits, scheme, device, 64 if scheme == "nf4" else None)
        layer = lowbit.CodebookLinear.from_weight(weight, dtype=DTYPES[dtype])
        return from_layer(layer.to(device), dense, dtype)

    name = f"lowbit {bits}-bit codebook {scheme} {dtype}"
    return on_gpu(name, dtype, prepare, "codebook", bits, scheme, fits=lambda n, k: k >= 64 or scheme != "nf4")


def kron(a: tuple[int, int], dtype: str) -> Candidate:
    """``A ⊗ B`` with A of this shape, both in the dtype of the activations."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        *both, dense = kron_factors(n, k, a, DTYPES[dtype], device)
        layer = lowbit.KroneckerLinear.from_weight(lowbit.KroneckerWeight(*both), dtype=DTYPES[dtype])
        return from_layer(layer.to(device), dense, dtype)

    scheme = f"{a[0]}x{a[1]}"
    return on_gpu(f"lowbit kron {scheme} {dtype}", dtype, prepare, "kron", None, scheme, fits=partial(kron_fits, a))


def all_formats() -> list[Candidate]:
    """Every format of this package that is timed, the ones that matter most first."""
    found = [packed(bits, group, "fp16") for group in (128, None) for bits in (4, 8, 2, 3, 5, 6, 7)]
    found += [codebook(bits, "row", "fp16") for bits in (4, 3, 2, 8)]
    found += [codebook(4, "nf4", "fp16"), *(codebook(bits, "tensor", "fp16") for bits in (4, 3, 2, 8))]
    found += [kron(shape, dtype) for shape in KRON_SHAPES for dtype in ("fp16", "bf16")]
    found += [packed(bits, 128, dtype, int8=True) for dtype in ("fp16", "bf16") for bits in (4, 8)]
    found += [packed(bits, group, "bf16") for group in (128, None) for bits in (4, 8, 2, 3, 5, 6, 7)]
    found += [codebook(bits, "row", "bf16") for bits in (4, 3, 2, 8)]
    return [*found, codebook(4, "nf4", "bf16")]
