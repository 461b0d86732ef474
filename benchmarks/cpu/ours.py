"""Our layers as candidates: made, arranged and called as modules, as a model does."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.candidate import (
    BF16,
    DTYPE_NAMES,
    F32,
    Candidate,
    Prepared,
    Unavailable,
    affine,
    expand,
    int8_per_group,
    int8_per_token,
)  # fmt: skip
from lowbit.codebook.format import CodebookWeight
from lowbit.codebook.module import CodebookLinear
from lowbit.kron.format import KroneckerWeight
from lowbit.kron.module import KroneckerLinear
from lowbit.nn.layer import Layer, LinearLayer
from lowbit.packed.format import PackedWeight
from lowbit.packed.module import PackedLinear
from lowbit.testing.numerics import frobenius_bound

Group = int | str  # group size, or "row"
ACTIVATIONS = ("int8", "fp32", "bf16")


def dtype_of(activations: str) -> torch.dtype:
    """Of x: int8 activations are made from float32 ones."""
    return BF16 if activations == "bf16" else F32


def another(layer: Layer) -> Layer:
    """A layer with the same values and memory of its own, arranged for the kernels on this device."""
    new = type(layer)(layer.format, dtype=layer.dtype)
    new.load_state_dict(layer.state_dict())
    return new.prepare().eval()


def layer_nbytes(layer: Layer) -> int:
    return sum(t.numel() * t.element_size() for t in layer.named_tensors().values())


def from_layer(layer: LinearLayer, dense: Tensor, activations: str, **options: Any) -> Prepared:
    dtype = dtype_of(activations)
    tolerance = frobenius_bound(dtype, dense.shape[1])
    options = {"tolerance": tolerance, **({"round_x": int8_per_token} if activations == "int8" else {}), **options}
    return Prepared(
        lambda layer, x: layer(x), layer, layer_nbytes(layer), dense, x_dtype=dtype,
        make=lambda: another(layer), bind=functools.partial, **options,
    )  # fmt: skip


def _facts(family: str, bits: int, group: Group, activations: str, **more: Any) -> dict[str, Any]:
    return {"who": "lowbit", "family": family, "bits": bits, "group": group, "activations": activations, **more}


def _spec(activations: str) -> str:
    return "int8" if activations == "int8" else "float"


@functools.lru_cache(maxsize=1)
def _packed(weight: Tensor, bits: int, group: Group) -> tuple[PackedWeight, Tensor]:
    """The weight and the dense matrix it stands for: the same for every kind of activations."""
    group_size = weight.shape[1] if group == "row" else int(group)
    codes, scales, zeros = affine(weight, bits, group_size)
    if group == "row":
        scales = scales.float()
    dense = (codes.double() - expand(zeros, group_size)) * expand(scales, group_size)
    return PackedWeight(codes, scales, zeros, bits, None if group == "row" else group_size), dense


def group_name(group: Group) -> str:
    return "row" if group == "row" else f"g{group}"


def packed(
    bits: int, group: Group, activations: str, isa: str | None = None, x_group: int | None = None
) -> Candidate:
    """Asymmetric, integer zeros; float16 scales per group, float32 ones per row. ``x_group``: of int8 activations."""

    def prepare(weight: Tensor) -> Prepared:
        form, dense = _packed(weight, bits, group)
        layer = PackedLinear.from_weight(
            form, activations=_spec(activations), activation_group_size=x_group, dtype=dtype_of(activations)
        )
        options = {} if x_group is None else {"round_x": functools.partial(int8_per_group, group=x_group)}
        return from_layer(layer, dense, activations, **options)

    name = f"lowbit {bits}-bit {group_name(group)} {activations}"
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


@functools.lru_cache(maxsize=1)
def _codebook(weight: Tensor, bits: int, group: Group) -> tuple[CodebookWeight, Tensor]:
    """One table and scales per group, as NF4 has them, or a table per row; random values."""
    generator = torch.Generator().manual_seed(bits)
    n, k = weight.shape
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    table = torch.randn(n if group == "row" else 1, 1, 1 << bits, generator=generator).half()
    dense = table[:, 0].float().expand(n, -1).gather(1, codes)
    codes = codes.to(torch.uint8)
    if group == "row":
        return CodebookWeight(codes, table), dense.double()
    scales = torch.rand(n, k // int(group), generator=generator).half() / k**0.5
    dense *= scales.float().repeat_interleave(int(group), 1)
    return CodebookWeight(codes, table, scales, int(group)), dense.double()


def codebook(bits: int, group: Group, activations: str) -> Candidate:
    def prepare(weight: Tensor) -> Prepared:
        form, dense = _codebook(weight, bits, group)
        layer = CodebookLinear.from_weight(form, activations=_spec(activations), dtype=dtype_of(activations))
        # int8: tables are rounded to 16 bits
        options = {"tolerance": 1e-4} if activations == "int8" else {}
        return from_layer(layer, dense, activations, **options)

    form = "codebook row" if group == "row" else f"codebook g{group} scales"
    facts = _facts("codebook", bits, group, activations)
    return Candidate(f"lowbit {bits}-bit {form} {activations}", prepare, facts)


KRON_SHAPES = ((2, 1), (1, 2), (64, 64))  # of A


def factors(a_shape: tuple[int, int], weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random factors [1, N1, K1], [1, N2, K2] of the weight's shape, and their product in float64; skips a misfit."""
    n, k = weight.shape
    n1, k1 = a_shape
    if n % n1 or k % k1 or (a_shape == (64, 64) and n != k):
        raise Unavailable(f"A {n1}x{k1} is not for a weight of shape {[n, k]}")
    generator = torch.Generator().manual_seed(n1 + k1)
    a = (torch.randn(1, n1, k1, generator=generator) / k1**0.5).to(dtype)
    b = (torch.randn(1, n // n1, k // k1, generator=generator) / (k // k1) ** 0.5).to(dtype)
    return a, b, torch.kron(a[0].double(), b[0].double())


def kron_operations(a: Tensor, b: Tensor) -> int:
    """Per row of x, of the better order of the two products."""
    (n1, k1), (n2, k2) = a.shape[1:], b.shape[1:]
    return 2 * min(k1 * n2 * (k2 + n1), n1 * k2 * (k1 + n2))


def kron_tolerance(dtype: torch.dtype) -> float:
    """Two products: in bfloat16 what lies between them is rounded too."""
    return 1e-5 if dtype == F32 else 8e-3


def kron(a_shape: tuple[int, int], dtype: torch.dtype) -> Candidate:
    def prepare(weight: Tensor) -> Prepared:
        a, b, dense = factors(a_shape, weight, dtype)
        layer = KroneckerLinear.from_weight(KroneckerWeight(a, b), dtype=dtype)
        return from_layer(
            layer, dense, DTYPE_NAMES[dtype], tolerance=kron_tolerance(dtype), operations=kron_operations(a, b)
        )

    return Candidate(f"lowbit kron {a_shape[0]}x{a_shape[1]} {DTYPE_NAMES[dtype]}", prepare, kron_facts(a_shape, dtype))


def kron_facts(a_shape: tuple[int, int], dtype: torch.dtype, who: str = "lowbit") -> dict[str, Any]:
    return {"who": who, "family": "kron", "a": list(a_shape), "activations": DTYPE_NAMES[dtype]}


