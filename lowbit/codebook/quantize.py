"""Quantizers of the codebook family: a float weight to codes, tables and scales.

1. *scale* (where asked for): every group is divided by its ``max|w|``;
2. *fit* one table per tensor, row or group by one-dimensional k-means, or take the given one;
3. *round* every weight to the code of the nearest table value, or with error feedback from the Hessian;
   ``lnq`` then improves all of it;

and codes are always chosen against the table and scale as stored (rounded to their dtype), never before.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lowbit.codebook.descent import descend
from lowbit.codebook.format import Codebook, CodebookWeight
from lowbit.codebook.kmeans import kmeans, optimal
from lowbit.codebook.tables import TableFit
from lowbit.core.hessian import Left, check_hessian, check_importance, damped, error_feedback
from lowbit.core.outliers import costliest, jointly, measured_for, sparse_rest
from lowbit.core.quantizer import Quantizer, Statistics, register

__all__ = ["TableQuantizer", "quantize"]


def quantize(
    weight: Tensor, spec: Codebook, *, hessian: Tensor | None = None, importance: Tensor | None = None
) -> CodebookWeight:
    """Quantize ``weight`` ([N, K], any float dtype) as ``spec`` says.

    A learned table minimises sum h (w - dequantized)**2 over the weights that share it: ``kmeans`` by k-means++ and
    Lloyd rounds (Zhao et al., arXiv 2010.07109), ``optimal`` exactly. h is 1, or with ``sensitivity``

    - ``importance`` [N, K], one per weight, such as the Fisher information of
      :func:`lowbit.model.calibrate.collect_sensitivities` (SqueezeLLM, Kim et al., arXiv 2306.07629);
    - else diag(``hessian``) [K], ``hessian`` [K, K] being proportional to X.T @ X of the layer's inputs.

    With a Hessian codes are then rounded column after column so that tr((W - Q) H (W - Q).T) falls (GPTQ's error
    feedback, arXiv 2210.17323), else every weight takes the nearest value; of two equally near ones the lower.

    ``lnq`` requires the Hessian. It starts with what ``sensitivity`` finds, and makes the same error smaller: tables
    and scales by least squares, codes by coordinate descent, in turns (LNQ, arXiv 2505.07004;
    :mod:`lowbit.codebook.descent`).

    ``spec.scales``: a group's scale is max|w| over max|table| (1 for a learned table), so 0 where all its weights are;
    the table is learned on the scaled weights, each counting scale**2. ``spec.outliers`` = f keeps round(f*N*K)
    weights in the sparse part: those of largest magnitude, which scales and tables are not fitted to, or random ones,
    or with ``outliers_by="sensitivity"`` those that cost most, rounded to what is fitted without the largest. With a
    Hessian and no ``importance`` it goes on from those in turns: the weights that error feedback leaves most of become
    the outliers, and scales and tables are fitted without them (:func:`lowbit.core.outliers.jointly`). float16 tables
    or scales become float32 in a layer where one would overflow or lose precision.

    Raises:
        ValueError: the weight is not a finite, non-empty [N, K] float tensor; the group size exceeds K; with
            ``sensitivity`` or ``lnq`` neither a Hessian nor importances are given, or they are misshapen, not finite or
            negative.
    """
    statistics = Statistics(hessian=hessian, sensitivity=importance)
    return spec.quantize(weight, statistics=statistics)  # type: ignore[no-any-return]


class TableQuantizer(Quantizer[Codebook, CodebookWeight]):
    """Learns one table per tensor, row or group, then gives every weight a code. A subclass says how it learns."""

    family = "codebook"
    turns = 1  # of outliers and the rest, where codes are rounded with error feedback (:func:`jointly`)

    def learn(self, spec: Codebook, values: Tensor, weights: Tensor | None, first_row: int) -> Tensor:
        """Tables [R, 2**bits] for the rows of ``values`` [R, n]; ``first_row``: the number of the first one."""
        raise NotImplementedError

    def weighs(self, spec: Codebook) -> bool:
        """Whether errors are weighed, and codes rounded with error feedback."""
        return spec.sensitivity

    def improve(self, fit: TableFit, codes: Tensor, statistics: Statistics) -> Tensor:
        """Codes as they are stored, of those that were rounded; tables and scales of ``fit`` may be changed too."""
        return codes

    def needs_for(self, spec: Codebook) -> frozenset[str]:
        return self.needs | ({"hessian"} if spec.sensitivity else set())

    def uses_for(self, spec: Codebook) -> frozenset[str]:
        return self.uses | ({"sensitivity"} if self.weighs(spec) else set()) | measured_for(spec)

    def argument(self, spec: Codebook) -> str:
        return super().argument(spec) if self.needs or not spec.sensitivity else "sensitivity=True"

    @torch.no_grad()
    def quantize(self, weight: Tensor, spec: Codebook, statistics: Statistics) -> CodebookWeight:
        hessian, sensitivity = statistics.hessian, statistics.sensitivity
        self._check(weight, spec, hessian, sensitivity)
        importance, weighs = None, self.weighs(spec)
        if weighs:
            given = sensitivity if sensitivity is not None else hessian.diagonal().expand(1, -1)  # type: ignore[union-attr]
            importance = damped(given)
        fit = TableFit(weight, spec, importance, partial(self.learn, spec))
        fit.fit_scales()
        fit.fit_tables()
        by_cost = fit.outliers is not None and spec.outliers_by == "sensitivity"
        if by_cost:
            fit.outliers = costliest(spec, partial(fit.rest, fit.nearest_codes()), statistics, fit.n, fit.k)
        if by_cost and weighs and hessian is not None and sensitivity is None:
            fit, codes = self._jointly(fit, hessian)
        else:
            codes = fit.codes_with_feedback(hessian) if weighs and hessian is not None else fit.nearest_codes()
        codes = self.improve(fit, codes, statistics)
        outliers = sparse_rest(partial(fit.rest, codes), fit.outliers)
        return CodebookWeight(
            codes=codes,
            codebook=fit.tables,
            scales=fit.scales,
            group_size=spec.group_size,
            outlier_values=outliers[0],
            outlier_columns=outliers[1],
            outlier_rows=outliers[2],
        )

    def _jointly(self, fit: TableFit, hessian: Tensor) -> tuple[TableFit, Tensor]:
        """Outliers, tables and codes, in turns: the fit, codes."""
        feedback = error_feedback(hessian)

        def coded(fit: TableFit) -> tuple[Tensor, Left]:
            left = Left(fit.n, fit.k, fit.weight.device)
            return fit.codes_with_feedback(feedback, left), left

        def again(fit: TableFit) -> tuple[Tensor, Left]:
            fit.fit_scales()
            fit.fit_tables()
            return coded(fit)

        return jointly(fit, coded(fit), again, self.turns)

    def _check(self, weight: Tensor, spec: Codebook, hessian: Tensor | None, importance: Tensor | None) -> None:
        if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
            raise ValueError(f"weight must be a non-empty float tensor [N, K]: got {weight.dtype} {list(weight.shape)}")
        problem = spec.problem(*weight.shape)
        if problem is not None:
            raise ValueError(problem)
        if self.weighs(spec) and hessian is None and importance is None:
            instead = "sensitivity=False" if self.stand_in is None else f"quantizer={self.stand_in!r}"
            raise ValueError(
                f"{self.argument(spec)} requires calibration data: got hessian=None and importance=None "
                f"(give calibration batches, or use {instead})"
            )
        check_hessian(hessian, weight.shape[1])
        check_importance(importance, weight)


class KMeans(TableQuantizer):
    """k-means++ and Lloyd rounds."""

    name = "kmeans"

    def learn(self, spec: Codebook, values: Tensor, weights: Tensor | None, first_row: int) -> Tensor:
        levels = 1 << spec.bits
        return kmeans(values, weights, levels, iterations=spec.iterations, seed=spec.seed, first_row=first_row)


class Optimal(TableQuantizer):
    """The exact optimum of one-dimensional k-means."""

    name = "optimal"

    def learn(self, spec: Codebook, values: Tensor, weights: Tensor | None, first_row: int) -> Tensor:
        return optimal(values, weights, 1 << spec.bits)


class LeastSquares(TableQuantizer):
    """What ``sensitivity=True`` finds, then tables, scales and codes improved in turns: :mod:`lowbit.codebook.descent`.

    Without a Hessian, as of a stack of experts that share one table, it is what the importances find.
    """

    name = "lnq"
    turns = 3  # cheap beside what follows
    needs = frozenset({"hessian"})
    stand_in = "optimal"
    correction = 0.5

    def weighs(self, spec: Codebook) -> bool:
        return True

    def learn(self, spec: Codebook, values: Tensor, weights: Tensor | None, first_row: int) -> Tensor:
        start = KMeans() if spec.granularity == "tensor" else Optimal()
        return start.learn(spec, values, weights, first_row)

    def improve(self, fit: TableFit, codes: Tensor, statistics: Statistics) -> Tensor:
        return codes if statistics.hessian is None else descend(fit, codes, statistics.hessian)


for _quantizer in (KMeans(), Optimal(), LeastSquares()):
    register(_quantizer)
