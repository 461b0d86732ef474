"""What a conversion will do: which modules are swapped, each with its spec, and which stay float, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.family import FLOAT_DTYPES, Spec
from lowbit.model import foreign, sources
from lowbit.nn.layer import Layer, layers

Specs = Spec | Mapping[str, Spec | None]

_SPECS = "a Packed, Codebook or Kronecker"


@dataclass
class Swap:
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
    """What a conversion will do: groups of swaps that share one weight, and the layers that stay float."""

    groups: list[list[Swap]]
    skipped: dict[str, str]

    def swaps(self) -> list[Swap]:
        return [swap for group in self.groups for swap in group]


def make_plan(model: nn.Module, spec: Specs | None, skip: Sequence[str] = ()) -> Plan:
    """Decide for every layer, validating everything; raises ``ValueError`` with all problems, changes nothing."""
    _check_arguments(spec, skip)
    candidates, skipped = _candidates(model)
    problems: list[str] = []
    quantized: list[str] = []
    for name, reason in list(skipped.items()):
        if _matching(skip, [name]):
            skipped[name] = "skipped by the caller"
        elif isinstance(spec, Mapping) and any(pattern == name for pattern in spec):
            problems.append(f"{name}: cannot be converted: {reason}")
        elif reason.startswith(foreign.QUANTIZED) and (isinstance(spec, Spec) or _matching(spec or (), [name])):
            quantized.append(name)
    if quantized:  # what is left would be half a model: it is to be asked for
        listed = ", ".join(quantized[:3]) + (f" and {len(quantized) - 3} more" if len(quantized) > 3 else "")
        problems.append(f"{listed}: {skipped[quantized[0]]}. Load the float model, or leave them as they are by skip=")
    groups = _assign(candidates, spec, skip, skipped, problems)
    unfit = {s.name: problem for group in groups for s in group if (problem := problem_of(s)) is not None}
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


def _candidates(model: nn.Module) -> tuple[list[Swap], dict[str, str]]:
    """Every module that could be swapped, and the linear-like ones that cannot, with the reason."""
    swaps: dict[int, Swap] = {}
    skipped: dict[str, str] = {}
    inside: set[str] = set()  # below a recognised module: its parts are not layers of their own
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(parent) for parent in inside):
            continue
        if id(module) in swaps:
            swaps[id(module)].names.append(name)
            continue
        swap, reason = _examine(name, module)
        if swap is not None:
            swaps[id(module)] = swap
            inside.add(name + "." if name else "")
            if not name:
                break
        elif reason is not None:
            skipped[name] = reason
    return list(swaps.values()), skipped


def _examine(name: str, module: nn.Module) -> tuple[Swap | None, str | None]:
    """(swap, None) for a module that can be swapped, (None, reason) for one that looks like it but cannot."""
    if sources.is_source(module):
        try:
            source = sources.recognise(module)
        except ValueError as error:
            return Swap([name], module, "linear", problem=str(error)), None
        if isinstance(source, str):
            return None, source
        return Swap([name], module, source.kind, source=source), None
    if not isinstance(module, Layer) and (reason := foreign.why_foreign(module)) is not None:
        return None, reason
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
    return Swap([name], module, kind, transposed, extras=extras), None


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that transformers need not be installed
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _tied(swaps: list[Swap]) -> list[list[Swap]]:
    """Group swaps that share one weight."""
    groups: dict[tuple[int, bool], list[Swap]] = {}
    for swap in swaps:
        key = id(swap.module) if sources.is_source(swap.module) else id(swap.module.weight)
        groups.setdefault((key, swap.transposed), []).append(swap)
    return list(groups.values())


def _assign(
    swaps: list[Swap], spec: Specs | None, skip: Sequence[str], skipped: dict[str, str], problems: list[str]
) -> list[list[Swap]]:
    """The groups to convert, each with its spec; patterns that match or decide nothing are problems.

    Layers that share a weight are one layer with several names: the last pattern that matches any of them counts.
    """
    groups: list[list[Swap]] = []
    matched: set[str] = set()
    decided: set[str] = set()
    for tied in _tied(swaps):
        group = [swap for swap in tied if not _matching(skip, swap.names)]
        skipped.update({s.name: "skipped by the caller" for s in tied if s not in group})
        chosen = spec if isinstance(spec, Spec) else None
        if isinstance(spec, Mapping):
            patterns = _matching(spec, [name for swap in group for name in swap.names])
            matched.update(patterns)
            decided.update(patterns[-1:])
            chosen = spec[patterns[-1]] if patterns else None
        kinds = {swap.kind for swap in group}
        if chosen is not None and "embedding" in kinds:
            chosen = chosen.for_embedding(tied="linear" in kinds)
            if "linear" not in kinds and chosen.method.needs_for(chosen):
                problems.append(f"{group[0].name}: {chosen.method.argument(chosen)} needs calibration data, which the "
                                "weight of an embedding cannot have")  # fmt: skip
        for swap in group:
            if swap.source is None:
                swap.spec = chosen
        wanted = [s for s in group if s.spec or s.source or s.problem]
        skipped.update({s.name: "no spec for it" for s in group if s not in wanted})
        if wanted:
            groups.append(wanted)
    names = [name for swap in swaps for name in swap.names]
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


def problem_of(swap: Swap) -> str | None:
    """Why this layer cannot be converted as asked, or ``None``."""
    if swap.problem is not None:
        return f"{swap.name}: {swap.problem}"
    if swap.spec is None:
        return None
    weight = swap.weight()
    if 0 in weight.shape:
        return f"{swap.name}: a weight needs N, K >= 1: got shape {tuple(weight.shape)}"
    if weight.dtype not in FLOAT_DTYPES.values():
        return f"{swap.name}: the weight must be float32, float16 or bfloat16: got {weight.dtype}"
    bias = swap.bias()
    if bias is not None and bias.dtype not in FLOAT_DTYPES.values():
        return f"{swap.name}: the bias must be float32, float16 or bfloat16: got {bias.dtype}"
    if problem := swap.spec.problem(*weight.shape):
        return f"{swap.name}: {problem}"
    if weight.device.type != "meta" and not _all_finite(weight):
        return f"{swap.name}: the weight must be finite: it holds NaN or infinity"
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



def check_calibration(plan: Plan, batches: list[Any] | None, loss: Any) -> None:
    """Raise ``ValueError`` unless there is what the statistics that are needed are measured with."""
    if loss is not None and batches is None:
        raise ValueError("loss needs calibration data: pass calibration=[...] with batches for the model")
    if _on_meta(plan):
        return
    for swap in plan.swaps():
        if swap.kind != "linear" or swap.spec is None:
            continue
        needs = swap.spec.needs
        if needs and not batches:
            raise ValueError(
                f"{swap.name}: {swap.spec.calibration_need} needs calibration data: "
                "pass calibration=[...] with batches for the model"
            )
        if "sensitivity" in needs and loss is None:
            raise ValueError(
                f"{swap.name}: {needs['sensitivity']} needs the gradients of a loss: "
                "pass loss=..., a function of the model and a batch"
            )


def _on_meta(plan: Plan) -> bool:
    return all(s.source is None and s.weight().device.type == "meta" for s in plan.swaps())
