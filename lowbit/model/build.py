"""From a planned swap to the layer that replaces a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.core.family import Format, Weight
from lowbit.core.quantizer import Statistics
from lowbit.model import sources
from lowbit.model.candidates import Swap
from lowbit.model.plan import Plan
from lowbit.model.report import Report, Row, rows_of, usual_bytes_before
from lowbit.model.storage import Ledger
from lowbit.model.surgery import carry_over
from lowbit.nn.coded import CodedLayer
from lowbit.nn.experts import quantized
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


def predicted(model: nn.Module, plan: Plan) -> Report:
    """The report of what :func:`build` would make: only trained modules are read, nothing is quantized."""
    rows: list[Row] = []
    ledger = ledger_of(model, plan)
    for i, group in enumerate(plan.groups):
        if group[0].source is not None:
            made = build_group(group)
        else:
            found = _format_by_values(group[0])
            made = _share([(swap, _as_prepared(_empty(swap, found), swap.weight().device)) for swap in group])
        ledger.enter(i, made.values())
        rows += rows_of({swap.name: _layer_in(made[swap.name]) for swap in group})
    settle(ledger, plan, {row.name: row for row in rows})
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order.get(row.name, order[row.name.rpartition(".")[0]]))  # experts are in a module
    packed = [swap.module for swap in plan.swaps()]
    return Report.of(model, rows, packed, plan.skipped, ledger.before, ledger.after)


def _format_by_values(swap: Swap) -> Format | None:
    """The format of a weight whose values may not fit float16, which only quantizing it tells; else ``None``."""
    assert swap.spec is not None
    weight, format = swap.weight(), swap.format()
    halves = any(dtype == torch.float16 for _, dtype in format.weight_tensors().values())
    # factors have other values than the weight
    if weight.device.type == "meta" or not halves or not (format.family == "kron" or _is_unusual(weight, format)):
        return None
    spec = swap.spec if swap.spec.method.stand_in is None else swap.spec.for_embedding()
    try:
        if swap.kind == "experts":
            parts = [(made.tensors(), made.format()) for made in quantized(spec, swap.experts())]
            found: Format = layer_class(spec.family, "experts").joined(parts)[1]
        else:
            found = spec.quantize(weight).format()
    except ValueError:  # it needs statistics
        return None
    return found


def _is_unusual(weight: Tensor, format: Format) -> bool:
    """Whether some group of the weight is so narrow, or wide, that float16 may not hold its scale."""
    limits, bits = torch.finfo(torch.float16), getattr(format, "bits", 8)
    # a clipped grid is narrower than its group: with few levels and without its outliers much narrower
    clipped = (0.3 if bits <= 4 else 0.7) * (0.3 if getattr(format, "outliers", 0) else 1.0)
    group = min(getattr(format, "group_size", format.in_features), format.in_features)
    full = weight.shape[1] // group * group
    for rows in weight.split(max(1, (1 << 22) // weight.shape[1])):
        for part in (rows[:, :full].unflatten(1, (-1, group)), rows[:, full:].unsqueeze(1)):
            if not part.numel():
                continue
            low, high = (end.double() for end in torch.aminmax(part, dim=-1))
            step, largest = (high - low) / (2**bits - 1), torch.maximum(low.abs(), high.abs())
            if bool(((step * clipped < limits.tiny) & (largest > 0)).any()) or float(largest.max()) > limits.max / 2:
                return True
    return False


def ledger_of(model: nn.Module, plan: Plan) -> Ledger:
    return Ledger(model, [[swap.module for swap in group] for group in plan.groups])


def remember_bytes(model: nn.Module, plan: Plan, made: Mapping[str, nn.Module]) -> Ledger:
    """Let the layers of ``made`` know how many bytes of the model, before its swaps, went with them."""
    ledger = ledger_of(model, plan)
    for i, group in enumerate(plan.groups):
        ledger.enter(i, [made[swap.name] for swap in group])
    rows = [row for g in plan.groups for row in rows_of({swap.name: _layer_in(made[swap.name]) for swap in g})]
    settle(ledger, plan, {row.name: row for row in rows})
    for row in rows:
        layer = _layer_in(made[row.name])
        if row.shares is None and row.bytes_before != usual_bytes_before(layer):
            layer.bytes_before = row.bytes_before
    return ledger


def settle(ledger: Ledger, plan: Plan, rows: Mapping[str, Row]) -> None:
    """Give the rows of a plan what the ledger says of bytes before, so that their sums are the model's."""
    for group, freed, added in zip(plan.groups, ledger.freed(), ledger.added(), strict=True):
        first, *others = [rows[swap.name] for swap in group]
        first.bytes_before = freed + sum(row.bytes_after for row in (first, *others)) - added
        for row in others:
            row.bytes_before = 0


def _layer_in(module: nn.Module) -> Layer:
    return next(part for part in module.modules() if isinstance(part, Layer))


def build_group(
    group: list[Swap], statistics: Mapping[str, Statistics] | None = None
) -> dict[str, nn.Module]:
    """The replacements of swaps that share one weight: quantized once, the tensors shared."""
    first = group[0]
    if first.source is not None:
        made_of = [(swap, layer_from_source(swap)) for swap in group]
        for _, layer in made_of[1:]:
            layer.share_weight(made_of[0][1])
            layer.prepare()
        return {s.name: carry_over(s.module, sources.wrap(s.module, layer)) for s, layer in made_of}
    assert first.spec is not None
    weight = first.weight()
    if weight.device.type == "meta" and first.read is None:
        return _share([(swap, _empty(swap)) for swap in group])
    measured = {s.name: (statistics or {}).get(s.name, Statistics()) for s in group}
    spec = first.spec
    if first.kind == "experts":
        return _experts_of(group, measured)
    try:
        target = weight if first.target is None else first.target
        stored = spec.quantize(target, statistics=_first_of(measured.values()))
    except ValueError as error:
        raise ValueError(f"{first.name}: {error}") from error
    cls = layer_class(spec.family, first.kind)
    if first.kind == "embedding":
        layer = cls.from_weight(stored, dtype=weight.dtype, **first.extras)
    else:
        layer = cls.from_weight(
            stored, first.bias(),
            **asdict(spec.activation), x_scale=measured[first.name].x_scale, dtype=weight.dtype,
        )  # fmt: skip
    layer.note, layer.weight_error = first.note, relative_error(weight, layer)
    made: list[tuple[Swap, Layer]] = [(first, layer)]
    for swap in group[1:]:  # its tensors are those of the first: nothing is packed again
        other = _empty(swap, stored.format())
        other.weight_error = layer.weight_error
        if "x_scale" in other.format.tensors():
            scale = measured[swap.name].x_scale
            if scale is None:
                raise ValueError(f"{swap.name}: activations='int8_static' needs x_scale, the calibrated scale")
            other.store({"x_scale": scale.detach().reshape(1).float()})
        made.append((swap, other))
    return _share(made)


def _experts_of(group: list[Swap], measured: Mapping[str, Statistics]) -> dict[str, nn.Module]:
    """Stacks that share one weight: their tensors are those of the first, each has its own scale of the input."""
    first = group[0]
    assert first.spec is not None
    whole: Any = build_experts(first, quantized(first.spec, first.experts()), measured[first.name].x_scale)
    made: dict[str, nn.Module] = {first.name: whole}
    if len(group) > 1 and any(statistics.hessian is not None for statistics in measured.values()):
        whole.note = f"{group[1].name} has the same weight: quantized without calibration data"
    for swap in group[1:]:
        other: Any = layer_class(first.spec.family, "experts")(whole.format, False, whole.dtype, "meta", **swap.extras)
        other.note, other.weight_error, other.expert_errors = swap.note, whole.weight_error, whole.expert_errors
        if (scale := measured[swap.name].x_scale) is not None and "x_scale" in other.format.tensors():
            other.store({"x_scale": scale.detach().reshape(1).float()})
        other.share_weight(whole)
        made[swap.name] = carry_over(swap.module, other.prepare())
    return made


def build_experts(swap: Swap, weights: Iterable[Weight], x_scale: Tensor | None = None) -> nn.Module:
    """The packed stack of a swap, from the weights of its experts (:func:`~lowbit.nn.experts.quantized`)."""
    assert swap.spec is not None
    try:
        layer: Layer = layer_class(swap.spec.family, "experts").from_weights(
            weights, swap.bias(), **swap.extras,
            **asdict(swap.spec.activation), x_scale=x_scale, dtype=swap.module.get_parameter("weight").dtype,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{swap.name}: {error}") from error
    note_errors(layer, swap.experts())
    layer.note = swap.note
    return carry_over(swap.module, layer)


def note_errors(layer: Any, experts: Iterable[Tensor]) -> None:
    """Let a packed stack know the errors of its weights against the float ones."""
    squares = [_squares(weight, layer.expert(e), torch.float32) for e, weight in enumerate(experts)]
    layer.expert_errors = [_relative(*pair) for pair in squares]
    layer.weight_error = _relative(*map(sum, zip(*squares, strict=True)))


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


def _empty(swap: Swap, stored: Format | None = None) -> Layer:
    """A layer on meta for a swap; ``stored``: the format that its weight has, where that is known."""
    assert swap.spec is not None
    weight, cls = swap.weight(), layer_class(swap.spec.family, swap.kind)
    if stored is None:
        format = swap.format()
    else:
        format = stored if swap.kind == "embedding" else stored.with_activation(swap.spec.activation)
    layer: Layer = cls(format, False, weight.dtype, "meta", **swap.extras)
    layer.bias = swap.bias()
    layer.note = swap.note
    return layer


def _as_prepared(layer: Layer, device: torch.device) -> Layer:
    """Give a layer on meta the shape that its codes will have on ``device``."""
    if isinstance(layer, CodedLayer) and device.type != "meta":
        shape = layer.layouts(device)[0].row_shape(layer.format.in_features, layer.format.bits)
        layer.store({"packed": torch.empty(layer.format.out_features, *shape, dtype=torch.int32, device="meta")})
    return layer


def layer_from_source(swap: Swap) -> Layer:
    """The layer that holds what a trained module holds; refused where it does not reproduce the trained weight."""
    source = swap.source
    assert source is not None
    weight = source.weight() if callable(source.weight) else source.weight
    stored = source.stored.format()
    if weight is not None and tuple(weight.shape) != (stored.out_features, stored.in_features):
        raise ValueError(
            f"{swap.name}: {sources.recogniser_of(swap.module)} gives a weight "
            f"[N, K] = [{stored.out_features}, {stored.in_features}]: Source.weight() has {list(weight.shape)}"
        )
    dtype = None if weight is None else weight.dtype
    cls = layer_class(source.stored.family, source.kind)
    layer: Layer
    try:
        if source.kind == "embedding":
            layer = cls.from_weight(source.stored, dtype=dtype, **{"padding_idx": source.padding_idx, **source.extras})
        else:
            layer = cls.from_weight(
                source.stored, source.bias, x_scale=source.x_scale, dtype=dtype, activations=source.activations,
                activation_group_size=source.activation_group_size,
            )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{swap.name}: {error}") from error
    layer.note = "; ".join(note for note in (source.note, swap.note) if note) or None
    if weight is not None:
        layer.weight_error = relative_error(weight.detach(), layer, weight.dtype)
        # bit-exact with integer zeros; with float zeros the module's own arithmetic may round once differently
        if layer.weight_error > max(1e-6, torch.finfo(weight.dtype).eps / 4):
            raise ValueError(
                f"{swap.name}: the recogniser's codes do not reproduce the trained weight "
                f"({sources.recogniser_of(swap.module)}): "
                f"relative error {layer.weight_error:.2e}"
            )
    return layer


def relative_error(weight: Tensor, layer: Layer, dtype: torch.dtype = torch.float32) -> float:
    """Frobenius norm of the weight's error over that of the weight, with the layer's weight rounded to ``dtype``."""
    return _relative(*_squares(weight, layer, dtype))


def _squares(weight: Tensor, layer: Layer, dtype: torch.dtype) -> tuple[float, float]:
    """Squared Frobenius norms: of the weight's error, of the weight."""
    difference = norm = 0.0
    step = max(1, (1 << 22) // weight.shape[1])
    dense = layer.dequantize(dtype)
    for start in range(0, weight.shape[0], step):
        w = weight[start : start + step].double()
        difference += float((w - dense[start : start + step]).square().sum())
        norm += float(w.square().sum())
    return difference, norm


def _relative(difference: float, norm: float) -> float:
    return float((difference / norm) ** 0.5) if norm else float(difference**0.5)


def progress_bar(plan: Plan) -> Any:
    """A progress bar for work of more than a few seconds, on a terminal."""
    total = sum(group[0].module.get_parameter("weight").numel() for group in plan.groups if group[0].spec is not None)
    quiet = None if total > _PROGRESS_FROM else True
    return tqdm(total=len(plan.groups), desc="lowbit convert", unit="layer", disable=quiet)
