"""Our layers on a CPU, as candidates."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.candidate import BF16, DTYPE_NAMES, F16, F32, Candidate, Prepared, int8_per_group
from benchmarks.harness.layers import another, codebook_weight, from_layer, kron_candidate, packed_weight
from lowbit.codebook.module import CodebookLinear
from lowbit.kron.format import KroneckerWeight
from lowbit.kron.module import KroneckerLinear
from lowbit.nn.linear import LinearLayer
from lowbit.packed.module import PackedLinear

Group = int | str  # group size, or "row"
ACTIVATIONS = ("int8", "fp32", "bf16")
KRON_SHAPES = ((2, 1), (1, 2), (64, 64))  # of A


def dtype_of(activations: str) -> torch.dtype:
    """Of x: int8 activations are made from float32 ones."""
    return BF16 if activations == "bf16" else F32


def _of_layer(layer: LinearLayer, dense: Tensor, activations: str, **options: Any) -> Prepared:
    dtype, int8 = DTYPE_NAMES[dtype_of(activations)], activations == "int8"
    return from_layer(layer, dense, dtype, int8, make=functools.partial(another, layer), **options)


def _facts(family: str, bits: int, group: Group, activations: str, **more: Any) -> dict[str, Any]:
    return {"who": "lowbit", "family": family, "bits": bits, "group": group, "activations": activations, **more}


def _options(activations: str) -> dict[str, Any]:
    return {"activations": "int8" if activations == "int8" else "float", "dtype": dtype_of(activations)}


def group_size(group: Group) -> int | None:
    return None if group == "row" else int(group)


def packed(bits: int, group: Group, activations: str, isa: str | None = None, x_group: int | None = None) -> Candidate:
    """Asymmetric, integer zeros; float16 scales per group, float32 ones per row. ``x_group``: of int8 activations."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        weight, dense = packed_weight(
            n, k, bits, group_size(group), device, F32 if group == "row" else F16, centered=True
        )
        layer = PackedLinear.from_weight(weight, activation_group_size=x_group, **_options(activations))
        options = {} if x_group is None else {"round_x": functools.partial(int8_per_group, group=x_group)}
        return _of_layer(layer, dense, activations, **options)

    name = f"lowbit {bits}-bit {'row' if group == 'row' else f'g{group}'} {activations}"
    facts = _facts("packed", bits, group, activations)
    if x_group is not None:
        name, facts = f"{name} g{x_group} activations", {**facts, "x_group": x_group}
    if isa is None:
        return Candidate(name, prepare, facts)
    return Candidate(f"{name} {isa}", prepare, {**facts, "isa": isa})


def packed_in_any_batch(bits: int, group: Group) -> Candidate:
    """bf16 activations, few rows of which may be rounded otherwise than in a larger batch."""
    one = packed(bits, group, "bf16")
    return Candidate(f"{one.name} batch_invariant(False)", one.prepare, {**one.facts, "batch_invariant": False})


def every_packed(bits: Iterable[int], groups: Iterable[Group], activations: Iterable[str]) -> list[Candidate]:
    groups, activations = list(groups), list(activations)
    return [packed(b, group, kind) for b in bits for group in groups for kind in activations]


def codebook(bits: int, group: Group, activations: str) -> Candidate:
    """One table and scales per group, as NF4 has them, or a table per row; random values."""

    def prepare(n: int, k: int, device: str) -> Prepared:
        scheme = "row" if group == "row" else "tensor"
        weight, dense = codebook_weight(n, k, bits, scheme, device, group_size(group))
        layer = CodebookLinear.from_weight(weight, **_options(activations))
        # int8: tables are rounded to 16 bits
        return _of_layer(layer, dense, activations, **({"tolerance": 1e-4} if activations == "int8" else {}))

    form = "codebook row" if group == "row" else f"codebook g{group} scales"
    facts = _facts("codebook", bits, group, activations)
    return Candidate(f"lowbit {bits}-bit {form} {activations}", prepare, facts)


def kron(a: tuple[int, int], dtype: torch.dtype) -> Candidate:
    def prepare(first: Tensor, second: Tensor, dense: Tensor, **options: Any) -> Prepared:
        layer = KroneckerLinear.from_weight(KroneckerWeight(first, second), dtype=dtype)
        return _of_layer(layer, dense, DTYPE_NAMES[dtype], **options)

    return kron_candidate("lowbit kron", a, dtype, prepare)
