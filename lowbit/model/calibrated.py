"""The build with calibration data: statistics first, then one weight after the other in execution order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.family import Weight
from lowbit.core.quantizer import Quantizer, Statistics
from lowbit.model import calibrate, experts
from lowbit.model.build import build, build_experts, build_group, progress_bar, relative_error
from lowbit.model.curvature import Loss, RowCosts, collect_row_costs, tied_hessian
from lowbit.model.drift import calibrate_corrected
from lowbit.model.plan import Plan, Swap, is_weighed
from lowbit.model.surgery import put, restoring, shared_copy
from lowbit.nn.experts import FloatExperts, quantized

# Weights of a model whose activations are held for gradients that nobody asked for by giving a loss.
_WHOLE = 1 << 30

# What a model that cannot be differentiated may raise; what is wrong with the batches is named when it runs without.
_CANNOT = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


def build_calibrated(
    model: nn.Module, plan: Plan, batches: list[Any], loss: Loss | None = None,
    correction: float | None = None,
) -> dict[str, nn.Module]:
    """Quantize in execution order (see :func:`lowbit.model.calibrate.calibrate_sequential`; with a correction
    :func:`lowbit.model.drift.calibrate_corrected`).

    Finished layers stand in the model while later ones are calibrated; the originals are put back at the end. What the
    quantizers need or use is measured: scales of inputs and gradients on the float model, Hessians on the model as it
    is when the layer's turn comes. Those of embeddings are made of gradients (:mod:`lowbit.model.curvature`).
    """
    swaps = {s.name: s for s in plan.swaps() if s.kind != "embedding" and s.spec is not None}
    weighed = [group for group in plan.groups if is_weighed(group)]
    if not swaps and not weighed:
        return build(plan)
    statistics = {name: Statistics() for name in swaps}
    originals = {name: swap.module for swap in plan.swaps() for name in swap.names}
    with restoring(model, originals), progress_bar(plan) as progress:
        for swap in swaps.values():
            if isinstance(swap.module, FloatExperts):
                experts.expose(swap.module)
        _measure(model, swaps, statistics, batches, loss)
        costs = _measure_embeddings(model, weighed, statistics, batches, loss)
        built = _build_in_order(model, plan, swaps, statistics, batches, progress, costs, correction)
        _finish(model, plan, originals, built, batches)
        return built


def _finish(
    model: nn.Module, plan: Plan, originals: dict[str, nn.Module], built: dict[str, nn.Module], batches: list[Any]
) -> None:
    """What quantizers do with their layers together, once all stand in the model."""
    of_method: dict[Quantizer[Any, Any], list[Swap]] = {}
    multiplied = [group for group in plan.groups if any(swap.kind != "embedding" for swap in group)]
    for swap in (swap for group in multiplied for swap in group):
        if swap.spec is not None and swap.spec.method.together:
            of_method.setdefault(swap.spec.method, []).append(swap)
    if not of_method:
        return
    alone = "" in originals  # a layer that is the model: nothing stands in anything
    reference = None if alone else shared_copy(model, originals)
    for method, swaps in of_method.items():
        names = [swap.name for swap in swaps]
        left = dict.fromkeys(names, "it is the whole model") if reference is None else (
            method.finish(model, reference, names, batches))  # fmt: skip
        for swap in swaps:
            layer: Any = built[swap.name]
            if swap.name in left:
                layer.note = "; ".join(filter(None, (layer.note, f"not {method.name}: {left[swap.name]}")))
            elif swap.kind == "linear":
                layer.weight_error = relative_error(swap.weight(), layer)


def _measure(
    model: nn.Module, swaps: dict[str, Swap], statistics: dict[str, Statistics], batches: list[Any], loss: Loss | None
) -> None:
    """What is measured on the float model."""
    if static := _modules(swaps, "x_scale"):
        for name, peak in calibrate.collect_input_maxima(model, static, batches).items():
            # an input that is always zero needs some positive scale
            statistics[name].x_scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    weighed = _modules(swaps, "sensitivity")
    if weighed and loss is not None:
        for name, squares in calibrate.collect_sensitivities(model, weighed, batches, loss).items():
            swap = swaps[name]
            if isinstance(swap.module, FloatExperts):
                statistics[name].sensitivity = swap.module.stacked(squares)
            else:
                statistics[name].sensitivity = squares.t() if swap.transposed else squares


def _measure_embeddings(
    model: nn.Module,
    groups: list[list[Swap]],
    statistics: dict[str, Statistics],
    batches: list[Any],
    loss: Loss | None,
) -> dict[str, RowCosts]:
    """What errors of the rows of embeddings, and of heads tied to them, cost; on the float model. Where that is known,
    an embedding that is not tied gets the quantizer that was asked for."""
    costs: dict[str, RowCosts] = {}
    why = "the calibration data gives it no gradient"
    if not groups:
        return costs
    if loss is None and sum(p.numel() for p in model.parameters()) > _WHOLE:
        why = f"gradients of a model of more than {_WHOLE} weights are taken where a loss is given"
    else:
        try:
            with _apart(groups) as weights:
                costs = collect_row_costs(model, weights, batches, loss)
        except _CANNOT as error:
            if loss is not None:
                raise
            why = str(error)
    for group in groups:
        tied = [swap for swap in group if swap.kind == "linear"]
        found = costs.get(group[0].name)
        if found is None:
            if not tied and group[0].spec != group[0].calibrated:
                note = f"quantized without calibration data: {why}"
                group[0].note = "; ".join(filter(None, (group[0].note, note)))
        elif not tied:
            statistics[group[0].name] = found.statistics()
            for swap in group:
                swap.spec = swap.calibrated
    return costs


@contextmanager
def _apart(groups: list[list[Swap]]) -> Iterator[dict[str, nn.Parameter]]:
    """The weights, by name of a swap; inside, heads have a Parameter of their own, on the same values."""
    weights: dict[str, nn.Parameter] = {}
    tied: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for swap in (swap for group in groups for swap in group):
            weight = swap.module.get_parameter("weight")
            if swap.kind == "linear":
                tied.append((swap.module, weight))
                swap.module._parameters["weight"] = weight = nn.Parameter(weight.detach(), requires_grad=False)
            weights[swap.name] = weight
        yield weights
    finally:
        for module, weight in tied:
            module._parameters["weight"] = weight


def _build_in_order(
    model: nn.Module,
    plan: Plan,
    swaps: dict[str, Swap],
    statistics: dict[str, Statistics],
    batches: list[Any],
    progress: Any,
    costs: dict[str, RowCosts],
    correction: float | None,
) -> dict[str, nn.Module]:
    fitted = _modules(swaps, "hessian")
    stacks = {name: _Stack(swaps[name], statistics[name]) for name in fitted if swaps[name].kind == "experts"}
    group_of = {swap.name: group for group in plan.groups for swap in group}
    built: dict[str, nn.Module] = {}

    def replace(group: list[Swap]) -> None:
        made = build_group(group, statistics)
        built.update(made)
        for swap in group:
            statistics.pop(swap.name, None)  # as large as the weight, or larger
            for name in swap.names:
                put(model, name, made[swap.name])
        progress.update()

    def quantize_layer(name: str, layer: Any, hessian: Tensor | None, of_drift: Tensor | None = None) -> None:
        if not isinstance(layer, calibrate.Expert):
            statistics[name].hessian = hessian
            swap = group_of[name][0]
            strength = _strength(swap, correction)
            if of_drift is not None and strength:
                weight = swap.weight().float()
                swap.target = weight.addmm(weight, of_drift, alpha=strength)
            replace(group_of[name])
            swap.target = None
        elif (whole := stack_of[name].add(hessian)) is not None:
            stack = stack_of[name].swap.name
            built[stack] = whole
            put(model, stack, whole)
            progress.update()

    # a head tied to the embedding has to be known before the first layer runs: calibrate it on the float model
    tied = {name: module for name, module in fitted.items() if len(group_of[name]) > 1}
    if tied:
        for name, hessian in calibrate.collect_hessians(model, tied, batches).items():
            embedding = next((costs[s.name] for s in group_of[name] if s.kind == "embedding" and s.name in costs), None)
            if embedding is not None and name in costs:
                hessian = tied_hessian(hessian, costs[name], embedding)
            statistics[name].hessian = hessian
    for group in plan.groups:
        if group[0].name not in fitted or group[0].name in tied:
            replace(group)
    sequential: dict[str, Any] = {}
    stack_of: dict[str, _Stack] = {}
    for name in [name for name in fitted if name not in tied]:
        parts = stacks[name].parts() if name in stacks else {name: fitted[name]}
        sequential.update(parts)
        stack_of.update(dict.fromkeys(parts, stacks[name]) if name in stacks else {})
    if not sequential:
        return built
    alone = "" in built.keys() | sequential.keys()  # a layer that is the model has none before it
    if not alone and any(_strength(swaps[name], correction) for name in sequential if name in swaps):  # no experts
        as_float = partial(_as_float, model, {name: swap.module for swap in plan.swaps() for name in swap.names})
        calibrate_corrected(model, as_float, sequential, batches, quantize_layer)
    else:
        calibrate.calibrate_sequential(model, sequential, batches, quantize_layer)
    return built


def _strength(swap: Swap, correction: float | None) -> float:
    """How much of the drift of its inputs a layer makes up for."""
    assert swap.spec is not None
    return swap.spec.method.correction if correction is None else correction


@contextmanager
def _as_float(model: nn.Module, originals: dict[str, nn.Module], part: str) -> Iterator[None]:
    """Inside, those of ``originals`` that are in module ``part`` are at their names; then what was there before."""
    inside = [name for name in originals if not part or name.startswith(f"{part}.")]
    now = {name: model.get_submodule(name) for name in inside}
    replaced = [name for name, module in now.items() if module is not originals[name]]
    try:
        with calibrate.evaluating(*(originals[name] for name in replaced)):
            for name in replaced:
                put(model, name, originals[name])
            yield
    finally:
        for name in replaced:
            put(model, name, now[name])


class _Stack:
    """A stack of experts that is quantized one expert after the other, as their Hessians come."""

    def __init__(self, swap: Swap, statistics: Statistics) -> None:
        self.swap, self._statistics = swap, statistics
        self._experts = list(swap.experts())
        self._measured: list[Statistics] = []
        self._weights: list[Weight] = []

    def parts(self) -> dict[str, calibrate.Expert]:
        """The experts by name."""
        count = len(self._experts)
        return {f"{self.swap.name}.{e}": calibrate.Expert(self.swap.module, e) for e in range(count)}

    def add(self, hessian: Tensor | None) -> nn.Module | None:
        """Quantize the next expert; ``hessian``: ``None`` where too few tokens reached it. The packed stack with the
        last one."""
        spec, e = self.swap.spec, len(self._measured)
        assert spec is not None
        own, weighed = Statistics(), self._statistics.sensitivity
        if hessian is not None:
            own = Statistics(hessian, None if weighed is None else weighed[e])
        if spec.shares_over_rows:  # a diagonal is all that is used, and small
            if own.sensitivity is None and hessian is not None:
                own.sensitivity = hessian.diagonal().clone()
            own.hessian = None
        else:
            fitted = spec if hessian is not None else spec.for_embedding()
            self._weights += quantized(fitted, [self._experts[e]], [own])
        self._measured.append(own)
        if len(self._measured) < len(self._experts):
            return None
        weights = quantized(spec, self._experts, self._measured) if spec.shares_over_rows else self._weights
        whole = build_experts(self.swap, weights, self._statistics.x_scale)
        whole.note = self._note()  # type: ignore[assignment]
        return whole

    def _note(self) -> str | None:
        few = [e for e, own in enumerate(self._measured) if own.hessian is None and own.sensitivity is None]
        if not few:
            return None
        return (
            f"fewer than {calibrate.FEW_TOKENS} tokens of the calibration data reach experts {', '.join(map(str, few))}"
            ": quantized without it"
        )


def _modules(swaps: dict[str, Swap], statistic: str) -> dict[str, nn.Module]:
    """The modules for which a statistic is to be measured."""
    return {name: swap.module for name, swap in swaps.items() if swap.spec and statistic in swap.spec.statistics}
