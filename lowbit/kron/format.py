"""Family ``kron``: what the user asks for (:class:`Kronecker`), what a layer stores (:class:`KroneckerFormat`,
:class:`KroneckerWeight`).

    W = sum_r A_r ⊗ B_r,    W[n1*N2 + n2, k1*K2 + k2] = sum_r A[r, n1, k1] * B[r, n2, k2]

with A ``[R, N1, K1]`` and B ``[R, N2, K2]``, each dense or itself in the ``packed`` family (KnGPT2, arXiv 2110.08152).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.core.family import (
    FLOAT_DTYPES,
    Activations,
    Format,
    Spec,
    TensorSpec,
    Weight,
    as_integer,
    check_float_dtype,
    check_seed,
    check_size,
    choice,
    dtype_name,
    written_spec,
)  # fmt: skip
from lowbit.core.quantizer import find, names
from lowbit.kron.shapes import nearest_shapes, shape_problem
from lowbit.packed.format import Packed, PackedFormat, PackedWeight


@dataclass(frozen=True)
class Kronecker(Spec):
    """How to bring a float weight ``[N, K]`` into the ``kron`` family: the spec given to ``convert``.

    The factors are those of the nearest Kronecker product (Van Loan and Pitsianis, 1993), in the Frobenius norm.

    Args:
        compression: target of N*K / (R*(N1*K1 + N2*K2)), 2 by default; the factor shapes whose size comes nearest are
            taken, and of equally near ones those of least error. An embedding splits its features alone, whether
            tied to a head or not: see ``features_only``.
        shape: instead of ``compression``, the shape ``(N1, K1)`` of A; it must divide the weight's.
        rank: number R of terms.
        features_only: N1 = N and N2 = 1: A ``[N, K/f]``, B ``[1, f]`` (with ``compression``), as for embeddings.
        factors: a :class:`Packed` spec to quantize the factors with; ``None`` keeps them dense. A group size larger
            than a factor's K becomes one group per row; a factor that would not become smaller stays dense.
        dtype: of dense factors; default that of the weight.
        svd: ``"exact"``; ``"randomized"`` (Halko et al., 2011) for large matrices; ``"auto"`` decides by the size.
        seed: of the randomized SVD.

    Raises:
        ValueError: an argument out of range, or two that exclude each other.
    """

    family = "kron"
    example = "compression=2"
    compression: float | None = None
    shape: tuple[int, int] | None = None
    rank: int = 1
    features_only: bool = False
    factors: Packed | None = None
    dtype: torch.dtype | None = None
    svd: str = "auto"
    seed: int = 0
    activations: Activations = "float"

    def __post_init__(self) -> None:
        if self.compression is not None and self.shape is not None:
            raise ValueError(
                "compression chooses the shape of the factors: give one of them: "
                f"got compression={self.compression}, shape={self.shape}"
            )
        if self.shape is None:
            object.__setattr__(self, "compression", 2.0 if self.compression is None else float(self.compression))
            if not 1.0 < self.compression < float("inf"):  # type: ignore[operator]
                raise ValueError(f"compression must be greater than 1 and finite: got compression={self.compression}")
        else:
            shape = tuple(map(as_integer, self.shape)) if isinstance(self.shape, (tuple, list)) else ()
            if len(shape) != 2:
                raise ValueError(f"shape must be (N1, K1), the shape of A: got shape={self.shape}")
            object.__setattr__(self, "shape", shape)
            for name, size in zip(("N1", "K1"), shape, strict=True):
                check_size(f"shape: {name}", size)
        if not isinstance(self.features_only, bool):
            raise ValueError(f"features_only must be True or False: got features_only={self.features_only!r}")
        if self.features_only and self.shape is not None:
            raise ValueError(f"features_only goes with compression: leave it out with shape={self.shape}")
        for name in ("rank", "seed"):
            object.__setattr__(self, name, as_integer(getattr(self, name)))
        check_size("rank", self.rank)
        check_seed(self.seed)
        if self.factors is not None:
            if isinstance(self.factors, Packed) and (self.factors.packed_zeros or self.factors.scale_bits):
                raise ValueError(
                    "factors takes zeros of a byte and float scales: "
                    f"got packed_zeros={self.factors.packed_zeros}, scale_bits={self.factors.scale_bits}"
                )
            if not isinstance(self.factors, Packed):
                made = written_spec(self.factors)
                instead = f"the class itself: write factors={made}" if made else type(self.factors).__name__
                raise ValueError(f"factors must be a Packed or None: got {instead}")
            if self.factors.activations != "float" or self.factors.outliers or self.factors.needs:
                raise ValueError(
                    "factors takes float activations, no outliers and no quantizer='gptq': "
                    f"got activations={self.factors.activations!r}, outliers={self.factors.outliers}, "
                    f"quantizer={self.factors.quantizer!r}"
                )
            if self.dtype is not None:
                raise ValueError("dtype is that of dense factors: leave it out with factors=Packed(...)")
        check_float_dtype("dtype", self.dtype)
        choice("svd", self.svd, names("kron"))
        self.activation.check(None, KroneckerFormat.supported_activations)

    @property
    def method(self) -> Any:
        return find("kron", self.svd)

    def factor_shapes(self, n: int, k: int) -> list[tuple[int, int]]:
        """The shapes ``(N1, K1)`` of A to choose from for a weight ``[n, k]``, the smallest A first.

        They are those of :func:`lowbit.kron.shapes.nearest_shapes`. ``shape``, where given, is the only one.
        """
        if self.shape is not None:
            return [] if shape_problem(n, k, self.shape, self.rank) else [self.shape]
        assert self.compression is not None
        return nearest_shapes(
            n, k, rank=self.rank, compression=self.compression, features_only=self.features_only
        )  # fmt: skip

    def problem(self, n: int, k: int) -> str | None:
        if self.shape is not None:
            return shape_problem(n, k, self.shape, self.rank)
        if self.factor_shapes(n, k):
            return None
        features = " with features_only" if self.features_only else ""
        return f"no factor shapes of [{n}, {k}]{features} come near compression={self.compression:g}, rank={self.rank}"

    def format(self, weight: Tensor, kind: str) -> KroneckerFormat:
        """The format of the quantized weight, unless packed scales turn out not to fit their dtype.

        On meta no shape can be found to be the best: it is then that of the first of :meth:`factor_shapes`.
        """
        return self.method.predicted_format(weight, self, kind)  # type: ignore[no-any-return]

    def for_more(self, format: Any) -> Kronecker:
        return replace(self, compression=None, shape=(format.n1, format.k1), features_only=False)

    def for_embedding(self, *, tied: bool = False) -> Kronecker:
        return self if self.shape is not None else replace(self, features_only=True)

    def describe(self) -> str:
        """One short line for tables, such as ``Kronecker 2x smaller``."""
        where = f"{self.compression:g}x smaller" if self.shape is None else f"A {self.shape[0]}x{self.shape[1]}"
        return f"Kronecker {where}" + f", rank {self.rank}" * (self.rank > 1)


@dataclass(frozen=True)
class KroneckerFormat(Format):
    """The stored form of one weight: everything that the shapes and dtypes of its tensors follow from.

    ``n1, k1`` and ``n2, k2`` are the shapes of the factors A and B, ``dtype`` that of dense ones; ``a`` and ``b`` are
    the format of a packed factor as the matrix ``[R*N1, K1]`` or ``[R*N2, K2]``, else ``None``.
    """

    family = "kron"
    supported_activations = ("float",)
    n1: int
    k1: int
    n2: int
    k2: int
    rank: int = 1
    dtype: str = "float32"
    a: PackedFormat | None = None
    b: PackedFormat | None = None
    input_permutation: bool = False
    output_permutation: bool = False
    activations: Activations = "float"

    def __post_init__(self) -> None:
        for name in ("n1", "k1", "n2", "k2", "rank"):
            check_size(name, getattr(self, name))
        choice("dtype", self.dtype, FLOAT_DTYPES)
        for name in ("input_permutation", "output_permutation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false: got {name}={getattr(self, name)!r}")
        self.activation.check(None, self.supported_activations)
        for name, factor, n, k in (("a", self.a, self.n1, self.k1), ("b", self.b, self.n2, self.k2)):
            if factor is None:
                continue
            if not isinstance(factor, PackedFormat):
                raise ValueError(f"{name} must be a packed format or null: got {factor!r:.200}")
            if (factor.out_features, factor.in_features) != (self.rank * n, k):
                raise ValueError(
                    f"{name} must be of shape [rank*n, k] = [{self.rank * n}, {k}]: "
                    f"got [{factor.out_features}, {factor.in_features}]"
                )
            if factor.outliers or factor.activations != "float":
                raise ValueError(f"{name} takes no outliers and float activations: got {factor.describe()}")

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.n1 * self.n2

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.k1 * self.k2

    @property
    def numbers(self) -> tuple[int, ...]:
        """The integers that the ops take: R, N1, K1, N2, K2, then bits (0: dense) and group size of A and of B."""
        packed = [(0, 0) if factor is None else (factor.bits, factor.group_size) for factor in (self.a, self.b)]
        return self.rank, self.n1, self.k1, self.n2, self.k2, *packed[0], *packed[1]

    def stacked(self, count: int) -> Any:
        a, b = (None if factor is None else factor.stacked(count) for factor in (self.a, self.b))
        return replace(self, rank=count * self.rank, a=a, b=b)

    def weight_tensors(self) -> dict[str, TensorSpec]:
        spec: dict[str, TensorSpec] = {}
        shapes = {"a": (self.rank, self.n1, self.k1), "b": (self.rank, self.n2, self.k2)}
        for name, shape in shapes.items():
            factor: PackedFormat | None = getattr(self, name)
            if factor is None:
                spec[name] = (shape, FLOAT_DTYPES[self.dtype])
                continue
            for part, tensor in factor.tensors().items():
                spec[name if part == "packed" else f"{name}_{part}"] = tensor
        if self.input_permutation:
            spec["input_permutation"] = ((self.in_features,), torch.int32)
        if self.output_permutation:
            spec["output_permutation"] = ((self.out_features,), torch.int32)
        return spec

    def describe(self) -> str:
        """One short line for tables, such as ``Kronecker 2x1 ⊗ 384x3072``."""
        parts = []
        for n, k, factor in ((self.n1, self.k1, self.a), (self.n2, self.k2, self.b)):
            parts.append(f"{n}x{k}" + ("" if factor is None else f" ({factor.describe()})"))
        text = f"Kronecker {' ⊗ '.join(parts)}"
        return text + f", rank {self.rank}" * (self.rank > 1) + ", permuted" * (
            self.input_permutation or self.output_permutation
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KroneckerFormat:
        values = dict(values)
        for name in ("a", "b"):
            if isinstance(values.get(name), dict):
                values[name] = PackedFormat.from_dict(values[name])
        format: KroneckerFormat = super().from_dict(values)
        return format


@dataclass(frozen=True)
class KroneckerWeight(Weight):
    """``W = (sum_r a[r] ⊗ b[r])[output_permutation][:, input_permutation]``.

    a: float [R, N1, K1] (float32, float16 or bfloat16), or a :class:`PackedWeight` of the matrix [R*N1, K1].
    b: float [R, N2, K2], or a :class:`PackedWeight` of the matrix [R*N2, K2].
    rank: R; needed when both factors are packed, else taken from the dense one.
    input_permutation, output_permutation: int [K] and [N], or None: W[n, k] is element
        [output_permutation[n], input_permutation[k]] of the sum of products.
    """

    family = "kron"
    a: Tensor | PackedWeight
    b: Tensor | PackedWeight
    rank: int | None = None
    input_permutation: Tensor | None = None
    output_permutation: Tensor | None = None

    def format(self, activations: Activations = "float") -> KroneckerFormat:
        dense = {name: t for name, t in (("a", self.a), ("b", self.b)) if isinstance(t, Tensor)}
        for name, tensor in dense.items():
            if tensor.dim() != 3 or tensor.dtype not in FLOAT_DTYPES.values():
                raise ValueError(
                    f"{name} must be a float32, float16 or bfloat16 tensor [R, N, K]: "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        ranks = {tensor.shape[0] for tensor in dense.values()} | ({self.rank} - {None})
        if len(ranks) != 1:
            raise ValueError(f"rank must be one number R for both factors: got {sorted(map(str, ranks)) or None}")
        if len({tensor.dtype for tensor in dense.values()}) > 1:
            raise ValueError(f"dense factors must have one dtype: got {[str(t.dtype) for t in dense.values()]}")
        rank = int(ranks.pop())  # type: ignore[arg-type]
        shapes: dict[str, tuple[int, int]] = {}
        packed: dict[str, PackedFormat] = {}
        for name in ("a", "b"):
            factor = getattr(self, name)
            if isinstance(factor, Tensor):
                shapes[name] = (factor.shape[1], factor.shape[2])
                continue
            packed[name] = factor.format()
            rows, k = factor.codes.shape
            if rows % rank:
                raise ValueError(f"{name} must have rank*N = {rank}*N rows: got {rows}")
            shapes[name] = (rows // rank, k)
        (n1, k1), (n2, k2) = shapes["a"], shapes["b"]
        dtype = next((dtype_name(tensor.dtype) for tensor in dense.values()), "float32")
        return KroneckerFormat(
            n1, k1, n2, k2, rank, dtype, packed.get("a"), packed.get("b"),
            self.input_permutation is not None, self.output_permutation is not None, activations,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in ("a", "b"):
            factor = getattr(self, name)
            if isinstance(factor, Tensor):
                found[name] = factor.detach()
                continue
            for part, tensor in factor.tensors().items():
                found[name if part == "packed" else f"{name}_{part}"] = tensor
        for name in ("input_permutation", "output_permutation"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name).to(torch.int32)
        return found
