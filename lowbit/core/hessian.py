"""What quantizers do with a Hessian H = X.T @ X: the importance of every input, and rounding with error feedback."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Feedback", "Left", "check_hessian", "check_importance", "damped", "error_feedback", "round_with_feedback"]

# Added to the diagonal, in units of its mean; the next one is tried when the factorization fails.
DAMPING = (0.01, 0.1, 1.0)
# Columns taken together: one matrix product feeds back the errors of all columns before them.
_COLUMNS = 64


def check_hessian(hessian: Tensor | None, k: int) -> None:
    """Raise ``ValueError`` unless ``hessian`` is ``None`` or a finite ``[K, K]``."""
    if hessian is None:
        return
    if hessian.shape != (k, k):
        raise ValueError(f"hessian must be [K, K] with K = {k}: got {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian must be finite: got Inf or NaN (check the calibration activations)")


def check_importance(importance: Tensor | None, weight: Tensor) -> None:
    """Raise ``ValueError`` unless ``importance`` is ``None`` or finite, not negative and of the shape of ``weight``."""
    if importance is None:
        return
    if importance.shape != weight.shape:
        raise ValueError(f"importance must have the shape of weight {list(weight.shape)}: got {list(importance.shape)}")
    if not bool(((importance >= 0) & torch.isfinite(importance)).all()):
        raise ValueError("importance must be finite and not negative: got Inf, NaN or a negative number")


def damped(importance: Tensor) -> Tensor | None:
    """``importance / mean + damping``: inputs that calibration never saw still count.

    ``None`` where all are 0.
    """
    mean = importance.double().mean()
    return (importance.double() / mean + DAMPING[0]).float() if mean > 0 else None


class Feedback(NamedTuple):
    """H[order][:, order] + damping = U D U.T, U unit upper triangular ``[K, K]``, float32.

    Then e H e.T = sum_j D[j] (e_j + sum_{i<j} e_i U[i, j])**2, so rounding column j against
    w_j + sum_{i<j} e_i U[i, j] minimises the j-th term: the error feedback of GPTQ, without inverting H.

    Attributes:
        factor: U - I.
        diagonal: D, over the mean of H's diagonal; 1 without a Hessian. D[j] is 1 / (H^-1)[j, j] of the columns that
            come after those before j: what an error costs that they make up for.
    """

    order: Tensor
    factor: Tensor
    diagonal: Tensor


class Left:
    """What rounding with error feedback leaves.

    Attributes:
        terms: ``[N, K]``, the square root of the term of each weight in the sum of :class:`Feedback`, were it coded:
            what it leaves after columns before it, and before those after it make up for it. 16 bits are enough to
            choose by.
        error: tr(E (H + damping) E.T) over the mean of H's diagonal.
    """

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.terms = torch.empty(n, k, dtype=torch.bfloat16, device=device)
        self.error = 0.0


def error_feedback(hessian: Tensor) -> Feedback:
    """The :class:`Feedback` of a Hessian ``[K, K]``."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    # float64 costs little up to a few thousand columns; beyond, damping alone keeps float32 well conditioned.
    h = hessian[order][:, order].to(torch.float64 if len(order) <= 4096 else torch.float32)
    mean = h.diagonal().mean()
    if mean == 0:
        return Feedback(order, torch.zeros_like(h, dtype=torch.float32), torch.ones_like(mean).expand(len(h)).float())
    for damping in DAMPING:
        trial = h.clone()
        trial.diagonal().add_(damping * mean)
        # Reversing rows and columns turns torch's lower factor into the upper one.
        lower, failed = torch.linalg.cholesky_ex(trial.flip(0, 1))
        if not bool(failed):
            upper = lower.flip(0, 1)
            diagonal = (upper.diagonal().square() / mean).float()
            return Feedback(order, (upper / upper.diagonal()).triu_(1).float(), diagonal)
    raise ValueError(f"hessian must be positive semidefinite: got one that fails with damping {DAMPING[-1]}")


def round_with_feedback(
    w: Tensor,
    feedback: Feedback,
    nearest: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    exact: Tensor | None,
    left: Left | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Codes, uint8 ``[rows, K]``: code_j is nearest to w_j + sum_{i<j} (w_i - q_i) factor[i, j], j in ``order``.

    ``nearest(column, targets)`` gives (codes, values) of one column; elements in ``exact`` (bool) have no error.
    ``left`` is told what is left of these ``rows``.
    """
    order, factor, diagonal = feedback
    # Transposed, so that a column is contiguous.
    w = w.t()[order].contiguous()
    exact = exact.t()[order] if exact is not None else None
    residual = torch.zeros_like(w)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    terms = None if left is None else torch.empty_like(w)
    columns = order.tolist()
    for start in range(0, len(w), _COLUMNS):
        end = min(start + _COLUMNS, len(w))
        target = w[start:end] + factor[:start, start:end].t() @ residual[:start]
        for j in range(start, end):
            code, value = nearest(columns[j], target[j - start])
            codes[j] = code
            residual[j] = w[j] - value
            if terms is not None:
                terms[j] = value - target[j - start]
            if exact is not None:
                residual[j].masked_fill_(exact[j], 0)
            target[j - start + 1 :].addr_(factor[j, j + 1 : end], residual[j])
        if left is not None:
            spent = w[start:end] - residual[start:end] - target  # of those that are exact: what others leave to them
            left.error += float((spent.square().sum(1).double() * diagonal[start:end]).sum())
    natural = torch.empty_like(codes)
    natural[order] = codes
    if left is not None and terms is not None:
        left.terms[rows, order] = (terms * diagonal.sqrt().unsqueeze(1)).t().to(left.terms.dtype)
    return natural.t()
