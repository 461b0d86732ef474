"""Layers that make up for the drift of their inputs: what rounding the layers before them has changed.

    W' = W + correction * W @ C,    C = sum (x - q).T q @ (sum q.T q + damping)^-1

x ``[n, K]``: a layer's inputs in the float model; q: what the quantized layers before it make of them. ``W'`` is
rounded instead of W. With ``correction = 1`` and without damping it is the least squares fit of ``x @ W.T``, what the
float layer gives, to q; less of it fits other tokens better (QEP: Arai and Ichikawa, arXiv 2504.09629; its special case
GPTAQ: Li et al., arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model import calibrate
from lowbit.model.calibrate import Expert, Group, Reached, SumOfSquares
from lowbit.model.feed import Feed, blocks_of, without_cache
from lowbit.nn.experts import FloatExperts

DAMPING = 0.01  # of the mean of the diagonal
_ROWS = 1024  # of C that are float64 at a time

Layers = Mapping[str, "nn.Module | Expert"]
AsFloat = Callable[[str], AbstractContextManager[None]]  # takes the name of what is run


@torch.no_grad()
def calibrate_corrected(
    model: nn.Module,
    as_float: AsFloat,
    layers: Layers,
    batches: Iterable[Any],
    quantize_layer: Callable[[str, Any, Tensor | None, Tensor | None], None],
    *,
    memory: int = 1 << 30,
) -> None:
    """Call ``quantize_layer(name, layer, hessian, C)`` in execution order, on the model as it is by then.

    As :func:`lowbit.model.calibrate.calibrate_sequential`, but every input is measured when the layers before it are
    quantized, and in the float model too: inside ``as_float(name)`` the module ``name`` is as it was. Blocks run alone,
    from the hidden states that the block before gave, where the model has blocks
    (:class:`lowbit.model.feed.Feed`); else each input takes two passes over the batches. ``C`` is ``None`` for
    experts, whose rows are others in the float model, and where nothing has drifted.
    """
    batches = list(batches)
    with without_cache(model):
        traced = calibrate.trace(model, layers, batches, None)
        stages = _Stages(model, as_float, layers, traced, batches)
        for groups in _spans(traced, layers, memory):
            names = [name for group in groups for name in group.names]
            with calibrate.evaluating(model):  # not where layers are made, which take over the mode
                stages.go_to(names)
                if _can_drift(layers[names[0]]):
                    hessian, correction = _measured(model, layers, groups[0], batches, stages)
                    found = dict.fromkeys(names, hessian)
                else:
                    found = calibrate.hessians_of(model, layers, groups, batches, _in_order(stages.run_rounded))
                    correction = None
            for name in names:
                quantize_layer(name, layers[name], found.get(name), correction)


def _can_drift(layer: nn.Module | Expert) -> bool:
    return not isinstance(layer, (Expert, FloatExperts))


def _spans(groups: Sequence[Group], layers: Layers, memory: int) -> list[list[Group]]:
    """Groups that are measured together: one by one, experts as many as have Hessians of ``memory`` bytes."""
    spans: list[list[Group]] = []
    for group in groups:
        with_last = bool(spans) and not any(_can_drift(layers[g.names[0]]) for g in (spans[-1][-1], group))
        if with_last and sum(4 * g.width**2 for g in (*spans[-1], group)) <= memory:
            spans[-1].append(group)
        else:
            spans.append([group])
    return spans


def _measured(
    model: nn.Module, layers: Layers, group: Group, batches: Sequence[Any], stages: _Stages
) -> tuple[Tensor, Tensor | None]:
    """(H, C) of the group's input."""
    name = group.names[0]
    squares, products = SumOfSquares(products=True), SumOfSquares(products=True)
    exact: list[Tensor] = []  # of one batch, a matrix for each call
    rows_seen = 0
    in_float = comparable = True

    def visit(_: str, x: Tensor, mask: Tensor | None) -> None:
        nonlocal rows_seen, comparable
        rows = calibrate.samples(x, mask).float()
        if in_float:
            exact.append(rows.clone())
        else:
            if not squares.add(rows):
                raise ValueError(calibrate.not_finite(name))
            rows_seen += len(rows)
            before = exact.pop(0) if exact else rows.new_empty(0)
            comparable = comparable and before.shape == rows.shape and products.add(rows, before - rows)
        if group.calls == 1:
            raise Reached

    def run(index: int) -> None:
        nonlocal in_float
        in_float = True
        exact.clear()
        with suppress(Reached):
            stages.run_float(index)
        in_float = False
        stages.run_rounded(index)

    calibrate.observe(model, {name: layers[name]}, batches, _in_order(run), visit)
    calibrate.require_reached([name], [name] if rows_seen else [])
    correction = _correction(squares, products, rows_seen) if comparable else None
    return calibrate.hessian_of(squares.total(), rows_seen), correction


def _in_order(run: Callable[[int], None]) -> calibrate.Forward:
    """A forward that takes the batches by number, as they come."""
    numbers = count()
    return lambda *_: run(next(numbers))


def _correction(squares: SumOfSquares, products: SumOfSquares, rows: int) -> Tensor | None:
    """C, float32 ``[K, K]``."""
    drift = products.total()
    if not drift.any():
        return None
    hessian = squares.total().double() * (squares.unit / products.unit)
    hessian.diagonal().add_((DAMPING + len(hessian) / rows) * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(hessian)
    del hessian
    for some in drift.split(_ROWS):
        some.copy_(torch.cholesky_solve(some.t().double(), factor).t())
    return drift


class _Stages:
    """What has to run so that a layer is reached: its block alone, or all of the model."""

    def __init__(
        self, model: nn.Module, as_float: AsFloat, layers: Layers, groups: Sequence[Group], batches: Sequence[Any]
    ) -> None:
        self._model, self._as_float, self._layers, self._batches = model, as_float, layers, batches
        self._times = {name: group.calls for group in groups for name in group.names}
        order = {name: i for i, name in enumerate(self._times)}
        self._blocks = blocks_of(model, order)
        self._left = sorted(self._blocks, key=lambda block: order[self._blocks[block][0]])  # not yet come to
        self._in_blocks = ""  # where the feeds are
        self._alone: set[str] = set()  # layers that nothing but this block calls
        self._exact, self._rounded = (Feed(model, self._left, batches) for _ in range(2))
        self._now = ""  # the block that runs; else the model

    def go_to(self, names: Sequence[str]) -> None:
        """Run these layers next, which see one input or follow each other; in execution order."""
        block = next((block for block, inside in self._blocks.items() if set(names) <= set(inside)), "")
        if block and block != self._in_blocks and not self._enter(block):
            self._left, self._in_blocks = [], ""
        self._now = block if block == self._in_blocks and self._alone.issuperset(names) else ""

    def _enter(self, block: str) -> bool:
        """Whether the block follows, and can run alone."""
        if self._left[:1] != [block]:
            return False
        try:
            with self._as_float(""):
                self._exact.go_to(block)
            self._rounded.go_to(block)
            inside = {name: self._layers[name] for name in self._blocks[block]}
            traced = calibrate.trace(self._model, inside, self._batches, lambda *_: self._rounded.output(0))
        except Exception:  # the model runs as a whole, and says what is wrong where it cannot
            return False
        self._alone = {n for group in traced for n in group.names if group.calls == self._times[n]}
        self._in_blocks = self._left.pop(0)
        return True

    def run_float(self, index: int) -> None:
        with self._as_float(self._now):
            self._run(self._exact, index)

    def run_rounded(self, index: int) -> None:
        self._run(self._rounded, index)

    def _run(self, feed: Feed, index: int) -> None:
        if self._now:
            feed.output(index)
        else:
            calibrate.call(self._model, self._batches[index])
