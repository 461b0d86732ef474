"""From a planned swap to the layer that replaces a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.core.quantizer import Statistics
from lowbit.model import sources
from lowbit.model.plan import Plan, Swap
from lowbit.model.report import Row
from lowbit.model.surgery import carry_over
from lowbit.nn.layer import Layer, layer_class

_PROGRESS_FROM = 1 << 26  # weights; below that a conversion takes less than a few seconds


def build(plan: Plan) -> dict[str, nn.Module]:
    """Every replacement by the first name of its swap; no calibration data. The model is left as it is."""
    built: dict[str, nn.Module] = {}
    with progress_bar(plan) as progress:
        for group in plan.groups:
            built.update(build_group(group))
            progress.update()
    return built


def predicted_rows(plan: Plan) -> list[Row]:
    """What :func:`build` would make, as rows of the report: only trained modules are read, nothing is quantized."""
    return [row for group in plan.groups for row in _predicted_rows(group)]


def _predicted_rows(group: list[Swap]) -> list[Row]:
    rows = []
    for swap in group:
        if swap.source is not None:
            rows.append(Row.of_layer(swap.name, layer_from_source(swap)))
        elif swap.spec is not None:
            weight = swap.weight()
            format = swap.spec.format(weight, swap.kind)
            rows.append(Row.planned(swap.name, swap.kind, format, weight.dtype))
    for row in rows[1:]:
        row.share(rows[0].name)
    return rows


def build_group(
    group: list[Swap], statistics: Mapping[str, Statistics] | None = None
) -> dict[str, nn.Module]:
    """The replacements of swaps that share one weight: quantized once, the tensors shared."""
    first = group[0]
    if first.source is not None:
        wrapped = sources.wrap(first.module, layer_from_source(first))
        return {first.name: carry_over(first.module, wrapped)}
    assert first.spec is not None
    weight = first.weight()
    if weight.device.type == "meta":
        return _share([(swap, _empty(swap)) for swap in group])
    measured = {s.name: (statistics or {}).get(s.name, Statistics()) for s in group}
    spec = first.spec
    try:
        stored = spec.quantize(weight, statistics=_first_of(measured.values()))
    except ValueError as error:
        raise ValueError(f"{first.name}: {error}") from error
    made: list[tuple[Swap, Layer]] = []
    for swap in group:
        cls = layer_class(spec.family, swap.kind)
        if swap.kind == "embedding":
            layer = cls.from_weight(stored, dtype=weight.dtype, **swap.extras)
        else:
            layer = cls.from_weight(
                stored, swap.bias(),
                **asdict(spec.activation), x_scale=measured[swap.name].x_scale, dtype=weight.dtype,
            )  # fmt: skip
        made.append((swap, layer))
    weight_error = relative_error(weight, made[0][1])
    for _, layer in made:
        layer.weight_error = weight_error
    return _share(made)


def _first_of(measured: Iterable[Statistics]) -> Statistics:
    """Of each statistic, the first that was measured."""
    found = Statistics()
    for statistics in measured:
        for field in fields(Statistics):
            if getattr(found, field.name) is None:
                setattr(found, field.name, getattr(statistics, field.name))
    return found


def _share(layers: list[tuple[Swap, Layer]]) -> dict[str, nn.Module]:
    """Make the layers of one group hold the very same Parameters."""
    source = layers[0][1]
    for _, layer in layers[1:]:
        layer.share_weight(source)
        layer.prepare()
    return {swap.name: carry_over(swap.module, layer) for swap, layer in layers}


def _empty(swap: Swap) -> Layer:
    """A layer on meta for a swap on meta."""
    assert swap.spec is not None
    weight, cls = swap.weight(), layer_class(swap.spec.family, swap.kind)
    layer: Layer = cls(swap.spec.format(weight, swap.kind), False, weight.dtype, "meta", **swap.extras)
    layer.bias = swap.bias()
    return layer


def layer_from_source(swap: Swap) -> Layer:
    """The layer that holds what a trained module holds; refused where it does not reproduce the trained weight."""
    source = swap.source
    assert source is not None
    weight = source.weight() if callable(source.weight) else source.weight
    dtype = None if weight is None else weight.dtype
    cls = layer_class(source.stored.family, source.kind)
    layer: Layer
    try:
        if source.kind == "embedding":
            layer = cls.from_weight(source.stored, dtype=dtype, padding_idx=source.padding_idx)
        else:
            layer = cls.from_weight(
                source.stored, source.bias, activations=source.activations, x_scale=source.x_scale, dtype=dtype
            )
    except ValueError as error:
        raise ValueError(f"{swap.name}: {error}") from error
    layer.note = source.note
    if weight is not None:
        layer.weight_error = relative_error(weight.detach(), layer, weight.dtype)
        # bit-exact with integer zeros; with float zeros the module's own arithmetic may round once differently
        if layer.weight_error > max(1e-6, torch.finfo(weight.dtype).eps / 4):
            raise ValueError(
                f"{swap.name}: the recogniser's codes do not reproduce the trained weight: "
                f"relative error {layer.weight_error:.2e}"
            )
    return layer


def relative_error(weight: Tensor, layer: Layer, dtype: torch.dtype = torch.float32) -> float:
    """Frobenius norm of the weight's error over that of the weight, with the layer's weight rounded to ``dtype``."""
    difference = norm = 0.0
    step = max(1, (1 << 22) // weight.shape[1])
    dense = layer.dequantize(dtype)
    for start in range(0, weight.shape[0], step):
        w = weight[start : start + step].double()
        difference += float((w - dense[start : start + step]).square().sum())
        norm += float(w.square().sum())
    return float((difference / norm) ** 0.5) if norm else float(difference**0.5)


def progress_bar(plan: Plan) -> Any:
    """A progress bar for work of more than a few seconds, on a terminal."""
    total = sum(group[0].weight().numel() for group in plan.groups if group[0].spec is not None)
    quiet = None if total > _PROGRESS_FROM else True
    return tqdm(total=len(plan.groups), desc="lowbit convert", unit="layer", disable=quiet)
