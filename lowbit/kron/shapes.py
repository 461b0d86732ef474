"""The shapes that the factors of a Kronecker product may have."""

from __future__ import annotations

import math

# How far the size of the factors may be from the one asked for, either way.
_NEAR = 1.25

# Two ratios nearer to each other than this are equal but for rounding.
_TIE = 1e-9


def shape_problem(n: int, k: int, shape_a: tuple[int, int], rank: int) -> str | None:
    """Why a weight ``[n, k]`` cannot be ``rank`` terms with A of this shape, or ``None``."""
    n1, k1 = shape_a
    if n % n1 or k % k1:
        return f"shape must divide the weight's [{n}, {k}]: got shape={shape_a}"
    limit = min(n1 * k1, n // n1 * (k // k1))
    if rank > limit:
        return f"rank must be at most min(N1*K1, N2*K2) = {limit} for shape={shape_a} of [{n}, {k}]: got rank={rank}"
    return None


def nearest_shapes(
    n: int, k: int, *, rank: int, compression: float, features_only: bool = False
) -> list[tuple[int, int]]:
    """The shapes ``(N1, K1)`` of A to choose from for a weight ``[n, k]``, the smallest A first.

    They are all shapes whose R*(N1*K1 + N2*K2) parameters come nearest, as a ratio, to n*k / compression. A shape does
    not count when its factors are not smaller than the weight, or allow fewer than R terms. There are none when the
    nearest is off by more than a factor of 1.25. ``features_only``: N1 = n.
    """
    found: list[tuple[float, int, int]] = []
    for n1 in [n] if features_only else _divisors(n):
        for k1 in _divisors(k):
            size = rank * (n1 * k1 + n // n1 * (k // k1))
            if size < n * k and shape_problem(n, k, (n1, k1), rank) is None:
                found.append((abs(math.log(size * compression / (n * k))), n1, k1))
    nearest = min((distance for distance, _, _ in found), default=math.inf)
    if nearest > math.log(_NEAR) + _TIE:
        return []
    shapes = [(n1, k1) for distance, n1, k1 in found if distance <= nearest + _TIE]
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], -shape[0]))


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]
