"""What a conversion will do: which modules are swapped, each with its spec, and which stay float, with the reason."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.family import FLOAT_DTYPES, Spec, written_spec
from lowbit.core.folder import is_packed
from lowbit.core.quantizer import check_share
from lowbit.model import adapters, candidates, experts, foreign, sources
from lowbit.model.candidates import Swap as Swap
from lowbit.model.kept import kept_float, untied
from lowbit.model.storage import named_tensors, overlap, place, storages
from lowbit.nn.experts import ExpertsLayer, FloatExperts
from lowbit.nn.layer import Layer, layer_classes, layers

Specs = Spec | Mapping[str, Spec | None]

_SPECS = "a Packed, Codebook or Kronecker"
_NO_SPEC = "no spec for it"
ROUTER = "it chooses the experts of each token"


@dataclass
class Plan:
    """What a conversion will do: groups of swaps that share one weight, and the layers that stay float."""

    groups: list[list[Swap]]
    skipped: dict[str, str]

    def swaps(self) -> list[Swap]:
        return [swap for group in self.groups for swap in group]


def make_plan(model: nn.Module, spec: Specs | None, skip: Iterable[str] | None = ()) -> Plan:
    """Decide for every layer, validating everything; raises ``ValueError`` with all problems, changes nothing."""
    skip = check_arguments(spec, skip)
    found, skipped = candidates.find(model)
    found = _refuse_foreign(model, found, spec, skip, skipped)
    found = _without_routers(model, found, spec, skipped)
    found = _without_trained(model, found, spec, skipped)
    problems: list[str] = []
    for name, reason in list(skipped.items()):
        if _matching(skip, [name]):
            skipped[name] = "skipped by the caller"
        elif isinstance(spec, Mapping) and any(pattern == name for pattern in spec):
            problems.append(f"{name}: cannot be converted: {reason}")
    groups = _assign(model, found, spec, skip, skipped, problems)
    unfit = {s.name: problem for group in groups for s in group if (problem := cause_of(s)) is not None}
    if unfit:
        problems += [*_by_cause(unfit), f"to leave these layers as they are: skip={_short(unfit, found)}"]
    if problems:
        raise ValueError("cannot convert, nothing was changed:\n  " + "\n  ".join(problems))
    if not groups:
        raise ValueError(_nothing_to_do(model, spec, skipped, layers(model)))
    _say_untied(model, groups, skipped)
    return Plan(groups, skipped)


def _refuse_foreign(
    model: nn.Module, found: list[Swap], spec: Specs | None, skip: Sequence[str], skipped: dict[str, str]
) -> list[Swap]:
    """Refuse what another library quantized where it is asked for: what is left would be half a model."""
    others = foreign.find(model)
    skipped.update(others)
    asked = {
        name: sign for name, sign in others.items()
        if not _matching(skip, [name]) and (not isinstance(spec, Mapping) or _matching(spec, [name]))
    }  # fmt: skip
    problem = foreign.problem(model, asked, bool(others) or any(sources.is_source(swap.module) for swap in found))
    if problem is not None:
        raise ValueError(f"cannot convert, nothing was changed: {problem}")
    return [swap for swap in found if not any(f"{swap.name}.".startswith(f"{name}.") for name in others)]


def _without_routers(
    model: nn.Module, found: list[Swap], spec: Specs | None, skipped: dict[str, str]
) -> list[Swap]:
    """Leave alone the linear layers that choose experts, unless a pattern is their very name: a small error of theirs
    sends tokens to other experts."""
    blocks = {name.rpartition(".")[0]: counts for name, module in model.named_modules()
              if (counts := experts.counts(module))}  # fmt: skip
    kept = []
    for swap in found:
        linear = swap.kind == "linear" and swap.source is None and swap.problem is None
        counts = {count for b in blocks if b and swap.name.startswith(f"{b}.") for count in blocks[b]}
        named = isinstance(spec, Mapping) and any(name in spec for name in swap.names)
        if counts and linear and not named and swap.weight().shape[0] in counts:
            skipped[swap.name] = ROUTER
        else:
            kept.append(swap)
    return kept


def _without_trained(
    model: nn.Module, found: list[Swap], spec: Specs | None, skipped: dict[str, str]
) -> list[Swap]:
    """Leave alone what is being trained while most of the model is frozen, unless a pattern is its very name."""
    others = [model.get_submodule(n) for n, reason in skipped.items() if reason.startswith(foreign.QUANTIZED)]
    if not adapters.mostly_frozen(model, others):
        return found
    kept = []
    for swap in found:
        weight = swap.module._parameters.get("weight") if swap.source is None and swap.problem is None else None
        named = isinstance(spec, Mapping) and any(name in spec for name in swap.names)
        if weight is not None and weight.requires_grad and not named:
            skipped[swap.name] = adapters.BEING_TRAINED
        else:
            kept.append(swap)
    return kept


def _by_cause(problems: dict[str, str]) -> list[str]:
    """One line for all layers with the same problem."""
    causes: dict[str, list[str]] = {}
    for name, problem in problems.items():
        causes.setdefault(problem, []).append(name)
    lines = []
    for problem, names in causes.items():
        some = names if len(names) < 3 else [f"{', '.join(names[:2])} and {len(names) - 2} more layers"]
        lines += [f"{name or 'the model'}: {problem}" for name in some]
    return lines


def _short(names: Iterable[str], found: list[Swap]) -> list[str]:
    """Patterns that match just these layers: one for all that differ in a number only, where that is so."""
    names = set(names)
    patterns: dict[str, None] = {}
    for name in sorted(names, key=[swap.name for swap in found].index):
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        others = [n for swap in found if swap.name not in names for n in swap.names]
        alone = pattern == name or any(_matching([pattern], [other]) for other in others)
        patterns[name if alone else pattern] = None
    return list(patterns)


def _say_untied(model: nn.Module, groups: list[list[Swap]], skipped: dict[str, str]) -> None:
    """Record what shares its values with a weight that is packed, and stays float or is packed a second time."""
    weights: dict[int, list[tuple[str, Tensor]]] = {}
    for group in groups:
        weight = group[0].module._parameters.get("weight")
        for key in storages([weight]) if weight is not None else ():
            assert weight is not None
            for name, other in weights.get(key, ()):
                if overlap(weight, other):
                    group[0].note = f"untied: {name} has the same values in another shape, and is packed too"
            weights.setdefault(key, []).append((group[0].name, weight))
    said: set[tuple[Any, ...]] = set()
    for name, _, tensor in named_tensors(model, [swap.module for group in groups for swap in group]):
        for key in storages([tensor]).keys() & weights.keys():
            owner = next((owner for owner, weight in weights[key] if overlap(tensor, weight)), None)
            if owner is None or place(tensor) in said:
                continue
            said.add(place(tensor))
            where = name.removesuffix(".weight")
            size = tensor.numel() * tensor.dtype.itemsize
            text = untied(size, owner or "the model")
            skipped[where] = f"{skipped[where]}; {text}" if where in skipped else text


def check_arguments(spec: Specs | None, skip: Iterable[str] | None) -> tuple[str, ...]:
    """The patterns of ``skip``; raises ``TypeError`` for what is no spec, or no patterns, saying what to write."""
    patterns = _patterns(skip)
    _check_spec(spec)
    return patterns


def _patterns(skip: Iterable[str] | None) -> tuple[str, ...]:
    if skip is None:
        return ()
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of patterns, not a string: got skip={skip!r}; write skip=[{skip!r}]")
    if not isinstance(skip, Iterable):
        raise TypeError(f"skip must be a sequence of patterns: got {type(skip).__name__} {skip!r:.200}")
    patterns = tuple(skip)  # an iterator gives them once
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip must be a sequence of patterns, texts: got {pattern!r:.200}")
    return patterns


def _check_spec(spec: Specs | None) -> None:
    if spec is None or isinstance(spec, Spec):
        return
    if made := written_spec(spec):
        raise TypeError(f"spec must be made, not the class itself: write {made}")
    if isinstance(spec, (list, tuple, set)):
        raise TypeError(f"spec must be one spec, or a mapping of patterns to specs, such as "
                        f"{{'*.mlp.*': lowbit.Packed(bits=4)}}: got a {type(spec).__name__} {spec!r:.200}")  # fmt: skip
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec must be None, {_SPECS}, or a mapping of patterns to them: "
                        f"got {type(spec).__name__} {spec!r:.200}")  # fmt: skip
    for pattern, value in spec.items():
        if made := written_spec(value):
            raise TypeError(f"spec must map patterns to specs, not to their class: for {pattern!r}, write {made}")
        if not isinstance(pattern, str) or not (value is None or isinstance(value, Spec)):
            raise TypeError(f"spec maps name patterns to {_SPECS} or to None: got {pattern!r}: {value!r}")


def require_model(model: object) -> None:
    """Raise ``TypeError`` for what is no model, such as the name or the folder of one, saying what to do with it."""
    if not isinstance(model, nn.Module):
        raise TypeError(_no_model(model))


def _no_model(model: object) -> str:
    text = f"model must be an nn.Module: got {type(model).__name__} {model!r:.200}"
    if not isinstance(model, (str, os.PathLike)):
        return text
    folder = Path(model)
    if is_packed(folder):
        return f"{text}, which is already a lowbit folder: lowbit.load({str(model)!r}) gives its model"
    if (folder / "config.json").is_file():
        return f"{text}: load the model first, or convert the folder with lowbit.convert_folder(src, dst, spec)"
    return f"{text}: load the model first, for example with AutoModelForCausalLM.from_pretrained({str(model)!r})"


def _matching(patterns: Iterable[str], names: list[str]) -> list[str]:
    """The patterns that match one of the names, or a parent of it."""
    return [p for p in patterns if any(fnmatchcase(n, p) or fnmatchcase(n, p + ".*") for n in names)]


def _tied(swaps: list[Swap]) -> list[list[Swap]]:
    """Group swaps that share one weight."""
    groups: dict[tuple[Any, ...], list[Swap]] = {}
    for swap in swaps:
        if swap.source is not None:
            values: tuple[Any, ...] = (id(swap.source.stored),)
        elif sources.is_source(swap.module):
            values = (id(swap.module),)
        else:
            values = place(swap.module.get_parameter("weight"))
        groups.setdefault((swap.transposed, *values), []).append(swap)
    return list(groups.values())


def _instead(model: nn.Module, pattern: str, names: list[str]) -> str:
    """What a pattern that matches no layer may have meant."""
    stack, _, expert = pattern.rpartition(".")
    is_stack = {name for name, part in experts.named_parts(model) if isinstance(part, (FloatExperts, ExpertsLayer))}
    if expert.isdigit() and any(fnmatchcase(name, stack) for name in is_stack):
        return f": the experts of a stack have one format; {stack!r} is all of them"
    if _matching([f"*.{pattern}"], names):
        return f"; did you mean '*.{pattern}'?"
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if matched := [name for name in modules if fnmatchcase(name, pattern)]:
        what = type(model.get_submodule(matched[0])).__name__
        return f": {matched[0]} is a {what}, and has no layer that convert swaps"
    leaf = pattern.rpartition(".")[2]
    leaves = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    for word, choices in ((pattern, names), (leaf, list(leaves))):
        if near := difflib.get_close_matches(word, choices, 1):
            meant = near[0] if word == pattern and near[0] in names else pattern.removesuffix(leaf) + near[0]
            if not _matching([meant], names):
                meant = f"*.{near[0]}"
            return f"; did you mean {meant!r}?" if _matching([meant], names) else ""
    return ""


def _assign(
    model: nn.Module,
    swaps: list[Swap],
    spec: Specs | None,
    skip: Sequence[str],
    skipped: dict[str, str],
    problems: list[str],
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
        calibrated: Spec | None = None
        if chosen is not None and "embedding" in kinds:
            calibrated = chosen.for_embedding(tied=True)
            chosen = chosen.for_embedding(tied="linear" in kinds)
            if "linear" not in kinds and chosen.method.needs_for(chosen):
                problems.append(f"{group[0].name}: {chosen.method.argument(chosen)} needs calibration data, which the "
                                "weight of an embedding cannot have")  # fmt: skip
        if chosen is not None and "experts" in kinds and (chosen.family, "experts") not in layer_classes():
            skipped[group[0].name] = f"family {chosen.family!r} has no form for a stack of experts"
            continue
        if chosen is not None and "experts" in kinds and chosen.shares_over_rows and "hessian" in chosen.method.needs:
            problems.append(f"{group[0].name}: quantizer={chosen.quantizer!r} fits every expert to its own inputs, and "
                            "granularity='tensor' is one scale for all experts: choose 'row' or 'group'")  # fmt: skip
        if chosen is not None and "experts" in kinds and len(group) > 1 and "hessian" in chosen.method.needs:
            problems.append(f"{group[0].name}: quantizer={chosen.quantizer!r} fits a weight to the inputs of one "
                            f"layer, and {group[1].name} has the same weight: choose another quantizer")  # fmt: skip
        for swap in group:
            if swap.source is None:
                swap.spec, swap.calibrated = chosen, calibrated
        wanted = [s for s in group if s.spec or s.source or s.problem]
        skipped.update({s.name: _NO_SPEC for s in group if s not in wanted})
        if wanted:
            groups.append(wanted)
    names = [name for swap in swaps for name in swap.names]
    known = names + list(skipped)
    for pattern in skip:
        if not _matching([pattern], known):
            problems.append(f"skip pattern {pattern!r} matches no layer{_instead(model, pattern, known)}")
    for pattern in spec if isinstance(spec, Mapping) else ():
        if pattern not in matched:
            stays = next((name for name in skipped if _matching([pattern], [name])), None)
            if _matching([pattern], names):
                why = "every layer it matches is skipped"
            elif stays is not None:
                why = f"what it matches stays float anyway: {stays}: {skipped[stays]}"
            else:
                why = "matches no layer" + _instead(model, pattern, known)
            problems.append(f"spec pattern {pattern!r}: {why}")
        elif pattern not in decided:
            problems.append(f"spec pattern {pattern!r}: a later pattern takes every layer it matches; put it last")
    return groups


def problem_of(swap: Swap) -> str | None:
    """Why this layer cannot be converted as asked, with its name, or ``None``."""
    cause = cause_of(swap)
    return None if cause is None else f"{swap.name}: {cause}"


def cause_of(swap: Swap) -> str | None:
    """:func:`problem_of` without the name: layers with the same problem are named together."""
    if swap.problem is not None:
        return swap.problem
    if swap.spec is None:
        return None
    weight = swap.weight()
    if 0 in weight.shape:
        return f"a weight needs N, K >= 1: got shape {tuple(weight.shape)}"
    if weight.layout is not torch.strided:
        return f"the weight must be dense: got layout {weight.layout}"
    if weight.dtype not in FLOAT_DTYPES.values():
        return f"the weight must be float32, float16 or bfloat16: got {weight.dtype}"
    bias = swap.bias()
    if bias is not None and bias.dtype not in FLOAT_DTYPES.values():
        return f"the bias must be float32, float16 or bfloat16: got {bias.dtype}"
    if problem := swap.spec.problem(*weight.shape):
        return problem
    if weight.device.type != "meta" and not all_finite(weight):
        return "the weight must be finite: it holds NaN or infinity"
    return None


def all_finite(weight: Tensor) -> bool:
    # min and max propagate NaN, and need no temporary of the weight's size
    low, high = torch.aminmax(weight)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _nothing_to_do(
    model: nn.Module, spec: Specs | None, skipped: dict[str, str], existing: dict[str, Layer]
) -> str:
    if existing:
        return f"nothing to convert: the model already has {len(existing)} packed layers"
    if spec is not None:
        there = {kept.name: kept.reason for kept in kept_float(model, (), {}, 0)
                 if not {kept.name, kept.name.rpartition(".")[0]} & skipped.keys()}  # fmt: skip
        return "nothing to convert: no layer was left" + _listed({**skipped, **there})
    declined = {name: reason for name, reason in skipped.items() if reason != _NO_SPEC}
    return (
        "nothing to convert: no module of the model was trained quantized. Pass a spec, such as "
        "lowbit.Packed(bits=4, group_size=64), to quantize it, or teach lowbit.register_source its modules"
        + _listed(declined)
    )


def _listed(reasons: dict[str, str]) -> str:
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f" ({'; '.join(f'{n}: {reason}' for n, reason in list(reasons.items())[:5])}{more})" if reasons else ""


def check_calibration(plan: Plan, batches: list[Any] | None, loss: Any) -> None:
    """Raise ``ValueError`` unless there is what the statistics that are needed are measured with."""
    if loss is not None and batches is None:
        raise ValueError("loss needs calibration data: pass calibration=[...] with batches for the model")
    if _on_meta(plan):
        return
    for swap in plan.swaps():
        if swap.kind == "embedding" or swap.spec is None:
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


def check_correction(correction: float | None, calibration: Any) -> None:
    """Raise ``ValueError`` for a correction that is no share, or that has no calibration data to be made from."""
    if correction is None:
        return
    check_share("correction", correction)
    if correction and calibration is None:
        raise ValueError(f"correction={correction!r} needs calibration, a list of batches: got None")


def unused_arguments(plan: Plan, calibration: Any, loss: Any, correction: float | None) -> str | None:
    """What to say of arguments that no spec of the plan makes use of."""
    specs = {swap.spec for swap in plan.swaps() if swap.spec is not None and swap.kind != "embedding"}
    measured = {statistic for spec in specs for statistic in spec.statistics}
    weighed = any(map(is_weighed, plan.groups))
    unused = [name for name, given, used in (
        ("calibration", calibration is not None, bool(measured) or weighed),
        ("loss", loss is not None, "sensitivity" in measured or weighed),
        ("correction", bool(correction), calibration is not None and "hessian" in measured),
    ) if given and not used]  # fmt: skip
    if not unused or _on_meta(plan):
        return None
    why = "no layer is quantized" if not specs else "no spec makes use of it"
    return f"{' and '.join(f'{name}=' for name in unused)} changes nothing: {why}"


def is_weighed(group: list[Swap]) -> bool:
    """Whether a weight is that of an embedding, and its quantizer wants to know what errors of its rows cost."""
    specs = [swap.calibrated for swap in group if swap.kind == "embedding" and swap.calibrated is not None]
    wanted = {field for spec in specs for field in spec.method.needs_for(spec) | spec.method.uses_for(spec)}
    return bool(wanted & {"hessian", "sensitivity"})


def _on_meta(plan: Plan) -> bool:
    return all(s.source is None and s.weight().device.type == "meta" for s in plan.swaps())
