"""The build with calibration data: statistics first, then one weight after the other in execution order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.quantizer import Statistics
from lowbit.model import calibrate
from lowbit.model.build import build, build_group, progress_bar
from lowbit.model.plan import Plan, Swap
from lowbit.model.surgery import put, restoring

Loss = Callable[[nn.Module, Any], Tensor]


def build_calibrated(
    model: nn.Module, plan: Plan, batches: list[Any], loss: Loss | None = None
) -> dict[str, nn.Module]:
    """Quantize in execution order (see :func:`lowbit.model.calibrate.calibrate_sequential`).

    Finished layers stand in the model while later ones are calibrated; the originals are put back at the end. What the
    quantizers need or use is measured: scales of inputs and gradients on the float model, Hessians on the model as it
    is when the layer's turn comes.
    """
    linears = {s.name: s for s in plan.swaps() if s.kind == "linear" and s.spec is not None}
    if not linears:
        return build(plan)
    statistics = {name: Statistics() for name in linears}
    if static := _modules(linears, "x_scale"):
        for name, peak in calibrate.collect_input_maxima(model, static, batches).items():
            # an input that is always zero needs some positive scale
            statistics[name].x_scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    weighed = _modules(linears, "sensitivity")
    if weighed and loss is not None:
        for name, squares in calibrate.collect_sensitivities(model, weighed, batches, loss).items():
            statistics[name].sensitivity = squares.t() if linears[name].transposed else squares
    fitted = _modules(linears, "hessian")
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

    def quantize_layer(name: str, _: nn.Module, hessian: Tensor) -> None:
        statistics[name].hessian = hessian
        replace(group_of[name])

    originals = {name: swap.module for swap in plan.swaps() for name in swap.names}
    with restoring(model, originals), progress_bar(plan) as progress:
        # a head tied to the embedding has to be known before the first layer runs: calibrate it on the float model
        tied = {name: module for name, module in fitted.items() if len(group_of[name]) > 1}
        if tied:
            for name, hessian in calibrate.collect_hessians(model, tied, batches).items():
                statistics[name].hessian = hessian
        sequential = {name: module for name, module in fitted.items() if name not in tied}
        for group in plan.groups:
            if group[0].name not in sequential:
                replace(group)
        if sequential:
            calibrate.calibrate_sequential(model, sequential, batches, quantize_layer)
    return built


def _modules(swaps: dict[str, Swap], statistic: str) -> dict[str, nn.Module]:
    """The modules for which a statistic is to be measured."""
    return {name: swap.module for name, swap in swaps.items() if swap.spec and statistic in swap.spec.statistics}
