"""``convert``: swap the layers of a trained model for packed ones. ``dequantize``: the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.core.family import FLOAT_DTYPES, Spec
from lowbit.model import calibrate, sources
from lowbit.model.report import Row, planned_report
from lowbit.nn.layer import Layer, layer_class, layers, storage_of

Specs = Spec | Mapping[str, Spec | None]

_SPECS = "a Packed, Codebook or Kronecker"
_PROGRESS_FROM = 1 << 26  # weights; below that a conversion takes less than a few seconds


@dataclass
class Target:
    """One module to swap, under all the names it has in the model."""

    names: list[str]
    module: nn.Module
    kind: str  # "linear" or "embedding"
    transposed: bool = False  # transformers' Conv1D keeps its weight as [in, out]
    spec: Spec | None = None
    source: sources.Source | None = None
    problem: str | None = None  # why its recogniser cannot read it
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    def weight(self) -> Tensor:
        """The float weight as ``[N, K]``."""
        weight = self.module.get_parameter("weight").detach()
        return weight.t() if self.transposed else weight

    def bias(self) -> nn.Parameter | None:
        """The bias as it is, the very same Parameter."""
        return self.module._parameters.get("bias")


@dataclass
class Plan:
    """What a conversion will do: groups of targets that share one weight, and the layers that stay float."""

    groups: list[list[Target]]
    skipped: dict[str, str]

    def targets(self) -> list[Target]:
        return [target for group in self.groups for target in group]


@torch.inference_mode(False)  # what is made here must be usable, and trainable, outside inference mode
@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def convert(
    model: nn.Module,
    spec: Specs | None = None,
    *,
    skip: Sequence[str] | None = None,
    dry_run: bool = False,
    calibration: Iterable[Any] | None = None,
) -> Any:
    """Swap the linear and embedding layers of a trained model for packed ones, in place; returns the model.

    Args:
        model: any ``nn.Module``; ``nn.Linear``, ``nn.Embedding``, transformers' ``Conv1D`` and modules known to
            :func:`lowbit.register_source` are swapped. Layers that share one weight (tied embedding and head)
            share one packed storage afterwards. A model that *is* such a layer is replaced: use the returned one.
        spec: ``None`` swaps what was trained compressed, without loss. A :class:`Packed`, :class:`Codebook` or
            :class:`Kronecker` compresses every layer. A mapping of name patterns to specs (``None`` as a spec: stay
            float) compresses the layers that match; where several patterns match a layer the last one counts.
        skip: patterns of layers to leave alone. A pattern is a dotted name with ``*`` wildcards, or the name of a
            parent module. One that matches no layer is an error.
        dry_run: change nothing and return the :class:`Report` of what would be done.
        calibration: batches (tensors, or tuples or dicts of arguments) that the model can be called with; needed
            by ``quantizer="gptq"`` and ``activations="int8_static"``; ``quantizer="mse"`` then weighs the error of
            each input feature by how much it matters on them.

    Raises:
        ValueError: listing *every* problem by layer name; the model is then exactly as before.
    """
    plan = make_plan(model, spec, skip or ())
    batches = None if calibration is None else list(calibration)
    _check_calibration(plan, batches)
    if dry_run:
        return planned_report([row for group in plan.groups for row in _predicted_rows(group)], plan.skipped)
    replacements = _build(model, plan, batches)
    for target in plan.targets():
        for name in target.names:
            model = swap(model, name, replacements[target.name])
    model.lowbit_skipped = plan.skipped  # type: ignore[assignment]
    _attach(model)
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Swap every packed layer for a plain torch layer with the dequantized weight, in place; returns the model.

    Layers that shared one packed storage share one float weight again. Raises ``ValueError`` when the model has no
    packed layer.
    """
    found = layers(model, duplicates=True)
    if not found:
        raise ValueError("the model has no packed layer: nothing to dequantize")
    floats: dict[int, nn.Module] = {}
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for layer in found.values():
        if id(layer) in floats:
            continue
        plain = layer.to_float()
        storage = storage_of(layer)
        if storage in weights:
            plain.weight = weights[storage]
        weights[storage] = plain.weight  # type: ignore[assignment]
        floats[id(layer)] = _carry_over(layer, plain)
    for name, layer in found.items():
        model = swap(model, name, floats[id(layer)])
    if hasattr(model, "lowbit_skipped"):
        del model.lowbit_skipped
    _detach(model)
    return model


# ------------------------------------------------------------------------------------------------------------ plan


def make_plan(model: nn.Module, spec: Specs | None, skip: Sequence[str] = ()) -> Plan:
    """Decide for every layer, validating everything; raises ``ValueError`` with all problems, changes nothing."""
    _check_arguments(spec, skip)
    candidates, skipped = _candidates(model)
    problems: list[str] = []
    for name, reason in list(skipped.items()):
        if _matching(skip, [name]):
            skipped[name] = "skipped by the caller"
        elif isinstance(spec, Mapping) and any(pattern == name for pattern in spec):
            problems.append(f"{name}: cannot be converted: {reason}")
    groups = _assign(candidates, spec, skip, skipped, problems)
    unfit = {t.name: problem for group in groups for t in group if (problem := problem_of(t)) is not None}
    if unfit:
        problems += [*unfit.values(), f"to leave these layers as they are: skip={list(unfit)}"]
    if problems:
        raise ValueError("cannot convert, nothing was changed:\n  " + "\n  ".join(problems))
    if not groups:
        raise ValueError(_nothing_to_do(spec, skipped, layers(model)))
    return Plan(groups, skipped)


def _check_arguments(spec: Specs | None, skip: Sequence[str]) -> None:
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, not a string: got skip={skip!r}; write skip=[{skip!r}]")
    if spec is None or isinstance(spec, Spec):
        return
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec must be None, {_SPECS}, or a mapping of patterns to them: got {type(spec).__name__}")
    for pattern, value in spec.items():
        if not isinstance(pattern, str) or not (value is None or isinstance(value, Spec)):
            raise TypeError(f"spec maps name patterns to {_SPECS} or to None: got {pattern!r}: {value!r}")


def _matching(patterns: Iterable[str], names: list[str]) -> list[str]:
    """The patterns that match one of the names, or a parent of it."""
    return [p for p in patterns if any(fnmatchcase(n, p) or fnmatchcase(n, p + ".*") for n in names)]


def _candidates(model: nn.Module) -> tuple[list[Target], dict[str, str]]:
    """Every module that could be swapped, and the linear-like ones that cannot, with the reason."""
    targets: dict[int, Target] = {}
    skipped: dict[str, str] = {}
    inside: set[str] = set()  # below a recognised module: its parts are not layers of their own
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(parent) for parent in inside):
            continue
        if id(module) in targets:
            targets[id(module)].names.append(name)
            continue
        target, reason = _examine(name, module)
        if target is not None:
            targets[id(module)] = target
            inside.add(name + "." if name else "")
            if not name:
                break
        elif reason is not None:
            skipped[name] = reason
    return list(targets.values()), skipped


def _examine(name: str, module: nn.Module) -> tuple[Target | None, str | None]:
    """(target, None) for a module that can be swapped, (None, reason) for one that looks like it but cannot."""
    if sources.is_source(module):
        try:
            source = sources.recognise(module)
        except ValueError as error:
            return Target([name], module, "linear", problem=str(error)), None
        if isinstance(source, str):
            return None, source
        return Target([name], module, source.kind, source=source), None
    kind, transposed = "linear", False
    extras: dict[str, Any] = {}
    if _is_conv1d(module):
        transposed = True
    elif type(module) is nn.Embedding:
        kind, extras = "embedding", {"padding_idx": module.padding_idx}
    elif isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", None)
        if not type(module).__name__.endswith("ScaledWordEmbedding") or not isinstance(scale, (int, float)):
            return None, f"{type(module).__name__} is a subclass of nn.Embedding with a forward of its own"
        kind, extras = "embedding", {"padding_idx": module.padding_idx, "output_scale": float(scale)}
    elif type(module) is not nn.Linear:
        if isinstance(module, nn.Linear):
            return None, f"{type(module).__name__} is a subclass of nn.Linear with a forward of its own"
        return None, None
    if kind == "embedding" and module.max_norm is not None:
        return None, "max_norm renormalises the weight while it is used"
    if "weight" not in module._parameters:
        return None, "its weight is computed on each call (parametrization or weight norm)"
    if getattr(module, "bias", None) is not None and "bias" not in module._parameters:
        return None, "its bias is not a Parameter"
    if "forward" in module.__dict__:
        return None, "it has a forward of its own"
    return Target([name], module, kind, transposed, extras=extras), None


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that transformers need not be installed
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _tied(targets: list[Target]) -> list[list[Target]]:
    """Group targets that share one weight."""
    groups: dict[tuple[int, bool], list[Target]] = {}
    for target in targets:
        key = id(target.module) if sources.is_source(target.module) else id(target.module.weight)
        groups.setdefault((key, target.transposed), []).append(target)
    return list(groups.values())


def _assign(
    targets: list[Target], spec: Specs | None, skip: Sequence[str], skipped: dict[str, str], problems: list[str]
) -> list[list[Target]]:
    """The groups to convert, each with its spec; patterns that match or decide nothing are problems.

    Layers that share a weight are one layer with several names: the last pattern that matches any of them counts.
    """
    groups: list[list[Target]] = []
    matched: set[str] = set()
    decided: set[str] = set()
    for tied in _tied(targets):
        group = [target for target in tied if not _matching(skip, target.names)]
        skipped.update({t.name: "skipped by the caller" for t in tied if t not in group})
        chosen = spec if isinstance(spec, Spec) else None
        if isinstance(spec, Mapping):
            patterns = _matching(spec, [name for target in group for name in target.names])
            matched.update(patterns)
            decided.update(patterns[-1:])
            chosen = spec[patterns[-1]] if patterns else None
        kinds = {target.kind for target in group}
        if chosen is not None and "embedding" in kinds:
            chosen = chosen.for_embedding(tied="linear" in kinds)
        for target in group:
            if target.source is None:
                target.spec = chosen
        wanted = [t for t in group if t.spec or t.source or t.problem]
        skipped.update({t.name: "no spec for it" for t in group if t not in wanted})
        if wanted:
            groups.append(wanted)
    names = [name for target in targets for name in target.names]
    for pattern in skip:
        if not _matching([pattern], names + list(skipped)):
            problems.append(f"skip pattern {pattern!r} matches no layer")
    for pattern in spec if isinstance(spec, Mapping) else ():
        if pattern not in matched:
            why = "every layer it matches is skipped" if _matching([pattern], names) else "matches no layer"
            problems.append(f"spec pattern {pattern!r}: {why}")
        elif pattern not in decided:
            problems.append(f"spec pattern {pattern!r}: a later pattern takes every layer it matches; put it last")
    return groups


def problem_of(target: Target) -> str | None:
    """Why this layer cannot be converted as asked, or ``None``."""
    if target.problem is not None:
        return f"{target.name}: {target.problem}"
    if target.spec is None:
        return None
    weight = target.weight()
    if 0 in weight.shape:
        return f"{target.name}: a weight needs N, K >= 1: got shape {tuple(weight.shape)}"
    if weight.dtype not in FLOAT_DTYPES.values():
        return f"{target.name}: the weight must be float32, float16 or bfloat16: got {weight.dtype}"
    bias = target.bias()
    if bias is not None and bias.dtype not in FLOAT_DTYPES.values():
        return f"{target.name}: the bias must be float32, float16 or bfloat16: got {bias.dtype}"
    if problem := target.spec.problem(*weight.shape):
        return f"{target.name}: {problem}"
    if weight.device.type != "meta" and not _all_finite(weight):
        return f"{target.name}: the weight must be finite: it holds NaN or infinity"
    return None


def _all_finite(weight: Tensor) -> bool:
    # min and max propagate NaN, and need no temporary of the weight's size
    low, high = torch.aminmax(weight)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _nothing_to_do(spec: Specs | None, skipped: dict[str, str], existing: dict[str, Layer]) -> str:
    if existing:
        return f"nothing to convert: the model already has {len(existing)} packed layers"
    if spec is not None:
        return "nothing to convert: no layer was left" + _listed(skipped)
    declined = {name: reason for name, reason in skipped.items() if reason != "no spec for it"}
    return (
        "nothing to convert: no module of the model was trained quantized. Pass a spec, such as "
        "lowbit.Packed(bits=4, group_size=64), to quantize it, or teach lowbit.register_source its modules"
        + _listed(declined)
    )


def _listed(reasons: dict[str, str]) -> str:
    return f" ({'; '.join(f'{n}: {reason}' for n, reason in list(reasons.items())[:5])})" if reasons else ""


def _check_calibration(plan: Plan, batches: list[Any] | None) -> None:
    needing = [t.name for t in plan.targets() if t.kind == "linear" and t.spec and t.spec.needs_calibration]
    if needing and not batches and not _on_meta(plan):
        spec = next(t.spec for t in plan.targets() if t.name == needing[0])
        assert spec is not None
        raise ValueError(
            f"{needing[0]}: {spec.calibration_need} needs calibration data: "
            "pass calibration=[...] with batches for the model"
        )


def _on_meta(plan: Plan) -> bool:
    return all(t.source is None and t.weight().device.type == "meta" for t in plan.targets())


# ----------------------------------------------------------------------------------------------------------- build


def _predicted_rows(group: list[Target]) -> list[Row]:
    rows = []
    for target in group:
        if target.source is not None:
            rows.append(Row.of_layer(target.name, _layer_from_source(target)))
        elif target.spec is not None:
            weight = target.weight()
            format = target.spec.format(weight, target.kind)
            rows.append(Row.planned(target.name, target.kind, format, weight.dtype))
    for row in rows[1:]:
        row.share(rows[0].name)
    return rows


def _build(model: nn.Module, plan: Plan, batches: list[Any] | None) -> dict[str, nn.Module]:
    """Every replacement by the target's first name; the model itself is left as it is."""
    if batches is not None and any(t.kind == "linear" and t.spec is not None for t in plan.targets()):
        return _build_calibrated(model, plan, batches)
    built: dict[str, nn.Module] = {}
    with _progress(plan.groups) as progress:
        for group in plan.groups:
            built.update(build_group(group))
            progress.update()
    return built


def build_group(
    group: list[Target], statistics: Mapping[str, Statistics] | None = None
) -> dict[str, nn.Module]:
    """The replacements of targets that share one weight: quantized once, the tensors shared."""
    first = group[0]
    if first.source is not None:
        wrapped = sources.wrap(first.module, _layer_from_source(first))
        return {first.name: _carry_over(first.module, wrapped)}
    assert first.spec is not None
    weight = first.weight()
    if weight.device.type == "meta":
        return _share([(t, _empty(t)) for t in group])
    measured = {t.name: (statistics or {}).get(t.name, Statistics()) for t in group}
    hessian = next((m.hessian for m in measured.values() if m.hessian is not None), None)
    spec = first.spec
    try:
        stored = spec.quantize(weight, hessian=hessian)
    except ValueError as error:
        raise ValueError(f"{first.name}: {error}") from error
    made: list[tuple[Target, Layer]] = []
    for target in group:
        cls = layer_class(spec.family, target.kind)
        if target.kind == "embedding":
            layer = cls.from_weight(stored, dtype=weight.dtype, **target.extras)
        else:
            layer = cls.from_weight(
                stored, target.bias(),
                activations=spec.activations, activation_group_size=spec.activation_group_size,
                x_scale=measured[target.name].x_scale, dtype=weight.dtype,
            )  # fmt: skip
        made.append((target, layer))
    weight_error = _relative_error(weight, made[0][1])
    for _, layer in made:
        layer.weight_error = weight_error
    return _share(made)


def _share(layers: list[tuple[Target, Layer]]) -> dict[str, nn.Module]:
    """Make the layers of one group hold the very same Parameters."""
    source = layers[0][1]
    for _, layer in layers[1:]:
        share_storage(source, layer)
        layer.prepare()
    return {target.name: _carry_over(target.module, layer) for target, layer in layers}


def share_storage(source: Layer, layer: Layer) -> None:
    """Let ``layer`` use the Parameters of ``source``: every stored tensor that both formats have."""
    for name in source.format.tensors():
        if name != "x_scale" and name in layer.format.tensors():
            layer._parameters[name] = source._parameters[name]


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def _carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give ``new`` what belongs to the module rather than to its weight: training mode and hooks."""
    new.train(old.training)
    new._is_full_backward_hook = old._is_full_backward_hook
    for hooks in _HOOKS:
        kept = {key: hook for key, hook in getattr(old, hooks).items() if not _is_observer_hook(hook)}
        getattr(new, hooks).update(kept)
    return new


def _is_observer_hook(hook: Any) -> bool:
    # torch.ao's observers hang on hooks that call a child of the old module, which the packed layer lacks
    names = ("_observer_forward_hook", "_observer_forward_pre_hook")
    return getattr(hook, "__name__", "") in names and hook.__module__ == "torch.ao.quantization.quantize"


def _empty(target: Target) -> Layer:
    """A layer on meta for a target on meta."""
    assert target.spec is not None
    weight, cls = target.weight(), layer_class(target.spec.family, target.kind)
    layer: Layer = cls(target.spec.format(weight, target.kind), False, weight.dtype, "meta", **target.extras)
    layer.bias = target.bias()
    return layer


def _layer_from_source(target: Target) -> Layer:
    source = target.source
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
        raise ValueError(f"{target.name}: {error}") from error
    layer.note = source.note
    if weight is not None:
        layer.weight_error = _relative_error(weight.detach(), layer, weight.dtype)
        # bit-exact with integer zeros; with float zeros the module's own arithmetic may round once differently
        if layer.weight_error > max(1e-6, torch.finfo(weight.dtype).eps / 4):
            raise ValueError(
                f"{target.name}: the recogniser's codes do not reproduce the trained weight: "
                f"relative error {layer.weight_error:.2e}"
            )
    return layer


def _relative_error(weight: Tensor, layer: Layer, dtype: torch.dtype = torch.float32) -> float:
    """Frobenius norm of the weight's error over that of the weight, with the layer's weight rounded to ``dtype``."""
    difference = norm = 0.0
    step = max(1, (1 << 22) // weight.shape[1])
    dense = layer.dequantize(dtype)
    for start in range(0, weight.shape[0], step):
        w = weight[start : start + step].double()
        difference += float((w - dense[start : start + step]).square().sum())
        norm += float(w.square().sum())
    return float((difference / norm) ** 0.5) if norm else float(difference**0.5)


def swap(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` at ``name``; returns the model, or ``module`` itself for the empty name."""
    if not name:
        return module
    path, _, child = name.rpartition(".")
    setattr(model.get_submodule(path), child, module)
    # torch's fused Transformer reads `.weight`: take the path that calls the layers
    ancestors = [model, *(model.get_submodule(path[: m.end()]) for m in re.finditer(r"[^.]+", path))]
    for parent in ancestors:
        for attribute, value in _FUSED_PATHS.get(type(parent), {}).items():
            setattr(parent, attribute, value)
    return model


_FUSED_PATHS: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"enable_nested_tensor": False, "use_nested_tensor": False},
}


def _attach(model: nn.Module) -> None:
    """Tell transformers, where the model is one of its own, that it is quantized now."""
    from lowbit.integrations import transformers

    transformers.attach(model)


def _detach(model: nn.Module) -> None:
    from lowbit.integrations import transformers

    transformers.detach(model)


# -------------------------------------------------------------------------------------------------- with calibration


@dataclass
class Statistics:
    """What calibration measured for one linear layer."""

    hessian: Tensor | None = None
    x_scale: Tensor | None = None


def _build_calibrated(model: nn.Module, plan: Plan, batches: list[Any]) -> dict[str, nn.Module]:
    """Quantize in execution order (see :func:`lowbit.model.calibrate.calibrate_sequential`).

    Finished layers stand in the model while later ones are calibrated; the originals are put back at the end.
    """
    linears = {t.name: t for t in plan.targets() if t.kind == "linear" and t.spec is not None}
    statistics = {name: Statistics() for name in linears}
    static = {n: t.module for n, t in linears.items() if t.spec and t.spec.activations == "int8_static"}
    if static:
        for name, peak in calibrate.collect_input_maxima(model, static, batches).items():
            # an input that is always zero needs some positive scale
            statistics[name].x_scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    fitted = {n: t for n, t in linears.items() if t.spec and t.spec.uses_hessian}
    group_of = {target.name: group for group in plan.groups for target in group}
    built: dict[str, nn.Module] = {}
    progress = _progress(plan.groups)

    def build(group: list[Target]) -> None:
        made = build_group(group, statistics)
        built.update(made)
        for target in group:
            for name in target.names:
                swap(model, name, made[target.name])
        progress.update()

    def quantize_layer(name: str, _: nn.Module, hessian: Tensor) -> None:
        statistics[name].hessian = hessian
        build(group_of[name])

    fused = [(m, a, getattr(m, a)) for m in model.modules() for a in _FUSED_PATHS.get(type(m), {})]
    try:
        # a head tied to the embedding has to be known before the first layer runs: calibrate it on the float model
        tied = {n: t.module for n, t in fitted.items() if len(group_of[n]) > 1}
        if tied:
            for name, hessian in calibrate.collect_hessians(model, tied, batches).items():
                statistics[name].hessian = hessian
        sequential = {n: t.module for n, t in fitted.items() if n not in tied}
        for group in plan.groups:
            if group[0].name not in sequential:
                build(group)
        if sequential:
            calibrate.calibrate_sequential(model, sequential, batches, quantize_layer)
    finally:
        progress.close()
        for target in plan.targets():
            for name in target.names:
                swap(model, name, target.module)
        for module, attribute, value in fused:
            setattr(module, attribute, value)
    return built


def _progress(groups: list[list[Target]]) -> Any:
    """A progress bar for work of more than a few seconds, on a terminal."""
    total = sum(group[0].weight().numel() for group in groups if group[0].spec is not None)
    quiet = None if total > _PROGRESS_FROM else True
    return tqdm(total=len(groups), desc="lowbit convert", unit="layer", disable=quiet)
