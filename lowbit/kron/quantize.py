"""The nearest Kronecker products of a float weight (Van Loan and Pitsianis, 1993).

Rearranged to

    M[n1*K1 + k1, n2*K2 + k2] = W[n1*N2 + n2, k1*K2 + k2],

a Kronecker product is a matrix of rank 1, and a sum of R of them has rank R. So the nearest sum in the Frobenius norm
is the truncated singular value decomposition of M. Its squared error is the sum of the squared singular values that are
left out. The decomposition comes from M.T @ M in float64. The shorter side m of M is at most the square root of N*K.
Singular values below 1e-8 of the largest one are lost, but a float32 weight does not hold them either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lowbit.backends.layouts import CANONICAL
from lowbit.core.family import FLOAT_DTYPES, as_integer, check_size, choice, dtype_name
from lowbit.core.quantizer import Quantizer, Statistics, find, names, register
from lowbit.kron.format import Kronecker, KroneckerFormat, KroneckerWeight
from lowbit.kron.shapes import shape_problem
from lowbit.packed.format import Packed, PackedFormat, PackedWeight
from lowbit.packed.operands import PackedOperands
from lowbit.packed.quantize import quantize

__all__ = ["decompose", "factor_shapes", "nearest_kronecker", "predicted_format"]

_T = TypeVar("_T")

# Elements of M at a time in float64: small enough to stay in cache, large enough to hide the cost of a torch call.
_CHUNK = 1 << 18

# Multiply-additions that svd="auto" spends on the exact decomposition: less than a second on one core. Forming
# M.T @ M takes m * N*K of them, its eigenvectors about 10 * m**3.
_EXACT_WORK = 10**10

# The randomized SVD: vectors beyond the rank, and multiplications with M.T @ M, each followed by QR. Keeping what every
# one of them gave (Krylov) instead of the last alone costs little. Gaussian weights, whose singular values are nearly
# equal, are the worst case: of what the nearest factors hold, 6 multiplications alone lost 5 %, kept ones 0.6 %.
_OVERSAMPLING, _POWER_ITERATIONS = 10, 8

# Of two shapes, rounding alone must not decide: the later one has to hold more by this fraction.
_TIE = 1e-9


@torch.no_grad()
def nearest_kronecker(
    weight: Tensor,
    shape_a: tuple[int, int],
    rank: int = 1,
    *,
    svd: Literal["auto", "exact", "randomized"] = "auto",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The factors A ``[R, N1, K1]`` and B ``[R, N2, K2]`` of least ‖W - sum_r A_r ⊗ B_r‖ (Frobenius).

    The terms are orthogonal, in order of falling norm. The two factors of a term have equal norm. The element of
    largest magnitude of the smaller factor (of B, where both have one size) is positive. Both are float32, or float64
    for a float64 weight.

    Args:
        weight: ``[N, K]``, any float dtype and strides.
        shape_a: ``(N1, K1)``, which divides ``(N, K)``; N2 = N/N1 and K2 = K/K1.
        rank: number R of terms, at most m = min(N1*K1, N2*K2).
        svd: ``"exact"``; ``"randomized"`` (Halko, Martinsson and Tropp, 2011, in the block Krylov form of Musco and
            Musco, 2015): nearly optimal, from a few passes over the weight; ``"auto"``: exact where
            m*N*K + 10*m**3 is at most 1e10, such as m = 512 for 4096 x 4096.
        seed: of the randomized SVD; the same call gives the same factors.

    Raises:
        ValueError: the weight is not a finite, non-empty ``[N, K]`` float tensor; the shape does not divide its
            shape; the rank exceeds its limit.
    """
    _check(weight)
    choice("svd", svd, names("kron"))
    shape_a, rank = (as_integer(shape_a[0]), as_integer(shape_a[1])), as_integer(rank)  # type: ignore[assignment]
    for name, size in (("N1", shape_a[0]), ("K1", shape_a[1]), ("rank", rank)):
        check_size(name, size)
    if problem := shape_problem(weight.shape[0], weight.shape[1], shape_a, rank):
        raise ValueError(problem)
    matrix = _Rearranged(weight, shape_a)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    method: Any = find("kron", svd)
    small = matrix.leading(rank, method.is_exact, seed)[0].to(dtype)
    large = matrix.complement(small.double(), dtype)
    return matrix.ordered(large.view(rank, *matrix.large_shape), small.view(rank, *matrix.small_shape))


def factor_shapes(n: int, k: int, spec: Kronecker) -> list[tuple[int, int]]:
    """The shapes ``(N1, K1)`` of A to choose from: :meth:`Kronecker.factor_shapes`."""
    return spec.factor_shapes(n, k)


@torch.no_grad()
def predicted_format(weight: Tensor, spec: Kronecker, kind: str) -> KroneckerFormat:
    """The format that :func:`decompose` gives ``weight``, unless packed scales turn out not to fit their dtype.

    On meta no shape can be found to be the best: it is then that of the first of :func:`factor_shapes`.
    """
    return spec.format(weight, kind)


@torch.no_grad()
def decompose(weight: Tensor, spec: Kronecker) -> KroneckerWeight:
    """The nearest sum of Kronecker products to ``weight`` (``[N, K]``, any float dtype), stored as ``spec`` says.

    It takes the shape of least error among :func:`factor_shapes`. The smaller factor is rounded, or quantized, first.
    The larger one is then the least squares fit to it as stored, which makes up for a part of its error.

    Raises:
        ValueError: the weight is not a finite, non-empty ``[N, K]`` float tensor; the spec does not fit it.
    """
    return spec.quantize(weight)  # type: ignore[no-any-return]


class NearestKronecker(Quantizer[Kronecker, KroneckerWeight]):
    """The nearest sum of Kronecker products, by a singular value decomposition. A subclass says of which kind."""

    family = "kron"

    def is_exact(self, work: int) -> bool:
        """Whether to decompose exactly where that takes ``work`` multiply-additions."""
        raise NotImplementedError

    def argument(self, spec: Kronecker) -> str:
        return f"svd={self.name!r}"

    @torch.no_grad()
    def predicted_format(self, weight: Tensor, spec: Kronecker, kind: str) -> KroneckerFormat:
        """The format of the weight that :meth:`quantize` gives."""
        if kind == "embedding":
            spec = spec.for_embedding()
        if weight.device.type == "meta":
            n1, k1 = _candidates(weight, spec)[0]
        else:
            n1, k1 = self._best(weight, spec)[0].shape_a
        n2, k2 = weight.shape[0] // n1, weight.shape[1] // k1
        dtype = _dense_dtype(weight, spec)
        a, b = (_packed_format(spec, rows, columns, dtype) for rows, columns in ((n1, k1), (n2, k2)))
        return KroneckerFormat(n1, k1, n2, k2, spec.rank, "float32" if a and b else dtype_name(dtype), a, b)

    @torch.no_grad()
    def quantize(self, weight: Tensor, spec: Kronecker, statistics: Statistics) -> KroneckerWeight:
        matrix, small = self._best(weight, spec)
        dtype = _dense_dtype(weight, spec)
        stored_small = _store(small, matrix.small_shape, spec, dtype)
        large = matrix.complement(_values(stored_small, spec.rank), torch.float32)
        stored_large = _store(large, matrix.large_shape, spec, dtype)
        return KroneckerWeight(*matrix.ordered(stored_large, stored_small), spec.rank)

    def _best(self, weight: Tensor, spec: Kronecker) -> tuple[_Rearranged, Tensor]:
        """(M, its smaller factor [R, columns]) for the candidate of least error, which holds most of the weight."""
        _check(weight)
        found: tuple[_Rearranged, Tensor] | None = None
        most = 0.0
        for shape in _candidates(weight, spec):
            matrix = _Rearranged(weight, shape)
            small, held = matrix.leading(spec.rank, self.is_exact, spec.seed)
            if found is None or held > most * (1 + _TIE):
                found, most = (matrix, small), held
        assert found is not None
        return found


class Auto(NearestKronecker):
    """Exact where that is quick."""

    name = "auto"

    def is_exact(self, work: int) -> bool:
        return work <= _EXACT_WORK


class Exact(NearestKronecker):
    """All of the decomposition."""

    name = "exact"

    def is_exact(self, work: int) -> bool:
        return True


class Randomized(NearestKronecker):
    """The leading terms alone, nearly optimal."""

    name = "randomized"

    def is_exact(self, work: int) -> bool:
        return False


for _quantizer in (Auto(), Exact(), Randomized()):
    register(_quantizer)


# ---------------------------------------------------------------------------------------------------- decomposition


class _Rearranged:
    """M of a weight, turned so that it is tall: [rows, columns] with columns <= rows; read some rows at a time."""

    def __init__(self, weight: Tensor, shape_a: tuple[int, int]) -> None:
        (n, k), (n1, k1) = weight.shape, shape_a
        self.shape_a, shape_b = shape_a, (n // n1, k // k1)
        # A view: splitting a dimension never needs a copy.
        blocks = weight.view(n1, shape_b[0], k1, shape_b[1])
        self.turned = n1 * k1 < shape_b[0] * shape_b[1]
        self.blocks = blocks.permute(1, 3, 0, 2) if self.turned else blocks.permute(0, 2, 1, 3)
        self.large_shape, self.small_shape = (shape_b, shape_a) if self.turned else (shape_a, shape_b)
        self.rows, self.columns = math.prod(self.large_shape), math.prod(self.small_shape)

    def ordered(self, large: _T, small: _T) -> tuple[_T, _T]:
        """(A, B)"""
        return (small, large) if self.turned else (large, small)

    def chunks(self) -> Iterator[Tensor]:
        step = max(1, _CHUNK // self.blocks[0].numel())
        for start in range(0, len(self.blocks), step):
            part = self.blocks[start : start + step]
            yield part.to(torch.float64, memory_format=torch.contiguous_format).reshape(-1, self.columns)

    def squared(self, x: Tensor | None = None) -> Tensor:
        """M.T @ M, or M.T @ (M @ x)."""
        width = self.columns if x is None else x.shape[1]
        total = torch.zeros(self.columns, width, dtype=torch.float64, device=self.blocks.device)
        for part in self.chunks():
            total.addmm_(part.t(), part if x is None else part @ x)
        return total

    def leading(self, rank: int, is_exact: Callable[[int], bool], seed: int) -> tuple[Tensor, float]:
        """([R, columns]: right singular vectors times the root of their singular values, sum of squares of these).

        ``is_exact`` decides by the multiply-additions that an exact decomposition takes.
        """
        width = rank + _OVERSAMPLING
        if width >= self.columns or is_exact(self.columns**2 * (self.rows + 10 * self.columns)):
            squares, vectors = torch.linalg.eigh(self.squared())
        else:
            generator = torch.Generator("cpu").manual_seed(seed)
            start = torch.randn(self.columns, width, generator=generator, dtype=torch.float64, device="cpu")
            blocks = [torch.linalg.qr(start.to(self.blocks.device)).Q]
            for _ in range(_POWER_ITERATIONS):
                blocks.append(torch.linalg.qr(self.squared(blocks[-1])).Q)
            basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
            squares, vectors = torch.linalg.eigh(basis.t() @ self.squared(basis))
            vectors = basis @ vectors
        squares, vectors = squares[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].t().flip(0)
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        scaled = vectors * largest.sign() * squares.unsqueeze(1) ** 0.25
        return scaled.contiguous(), float(squares.sum())

    def complement(self, small: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor X [R, rows] of least ‖M - X.T @ small‖, given ``small`` [R, columns]."""
        # small @ small.T is singular where terms vanish: the weight may be zero, or have fewer of them.
        solution = small.t() @ torch.linalg.pinv(small @ small.t(), hermitian=True)
        large = torch.empty(len(small), self.rows, dtype=dtype, device=small.device)
        done = 0
        for part in self.chunks():
            large[:, done : done + len(part)] = (part @ solution).t()
            done += len(part)
        return large


def _candidates(weight: Tensor, spec: Kronecker) -> list[tuple[int, int]]:
    n, k = weight.shape
    if problem := spec.problem(n, k):
        raise ValueError(problem)
    return spec.factor_shapes(n, k)


def _check(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"weight must be a non-empty float tensor [N, K]: got {weight.dtype} {list(weight.shape)}")
    if weight.device.type == "meta":
        raise ValueError("weight must hold values to decompose: got a tensor on meta")
    if not _finite(weight):
        raise ValueError("weight must be finite in float32: got Inf or NaN")


def _finite(tensor: Tensor) -> bool:
    # min and max propagate NaN, and need no temporary of the tensor's size
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor)).float()).all())


# ----------------------------------------------------------------------------------------------------------- storage


def _store(factor: Tensor, shape: tuple[int, int], spec: Kronecker, dtype: torch.dtype) -> Tensor | PackedWeight:
    """The factor ``[R, elements]`` as it is stored."""
    if spec.factors is not None and _packed_format(spec, *shape, dtype) is not None:
        return quantize(factor.view(-1, shape[1]), _packed_spec(spec.factors, shape[1]))
    dense = factor.to(dtype)
    if not _finite(dense):
        raise ValueError(f"dtype must hold the factors: got {dtype}, elements up to {float(factor.abs().max()):g}")
    return dense.view(-1, *shape)


def _values(stored: Tensor | PackedWeight, rank: int) -> Tensor:
    """What a stored factor holds, as float64 ``[R, elements]``."""
    if isinstance(stored, Tensor):
        return stored.double().flatten(1)
    format, parts = stored.format(), stored.tensors()
    operands = PackedOperands(
        packed=parts["packed"], scales=parts["scales"], zeros=parts.get("zeros"), outlier_values=None,
        outlier_columns=None, outlier_rows=None, bits=format.bits, group_size=format.group_size,
        layout=CANONICAL.number,
    )  # fmt: skip
    return operands.dense(format.in_features).double().view(rank, -1)


def _packed_format(spec: Kronecker, n: int, k: int, dtype: torch.dtype) -> PackedFormat | None:
    """How a factor ``[R, n, k]`` is packed; ``None`` where it stays dense, which may well be smaller."""
    if spec.factors is None:
        return None
    stacked = torch.empty(spec.rank * n, k, dtype=dtype, device="meta")
    format = _packed_spec(spec.factors, k).format(stacked, "linear")
    return format if format.nbytes < stacked.nbytes else None


def _packed_spec(factors: Packed, k: int) -> Packed:
    return factors if factors.group_size is None else replace(factors, group_size=min(factors.group_size, k))


def _dense_dtype(weight: Tensor, spec: Kronecker) -> torch.dtype:
    if spec.dtype is not None:
        return spec.dtype
    return weight.dtype if weight.dtype in FLOAT_DTYPES.values() else torch.float32
