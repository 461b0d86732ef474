"""``plan``: which form each layer should have, so that a model of a given size stays near to the float one.

    minimise the sum over layers l of D[l, c(l)],   subject to   the sum of bytes[l, c(l)] <= budget

D[l, c]: by how much the KL divergence of the whole model's outputs from the float model's grows when layer l alone gets
candidate c, all others staying what they are: first the candidate whose size is nearest to the budget, then what the
first plan gave them. It is measured: the error of a layer says little of what it costs the model. The sum is minimised
exactly, by dynamic programming.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.core.family import Spec
from lowbit.model import calibrate
from lowbit.model.convert import convert
from lowbit.model.plan import make_plan, require_model
from lowbit.model.storage import storages
from lowbit.model.surgery import put, restoring
from lowbit.nn.layer import Layer, storage_of
from lowbit.packed.format import Packed
from lowbit.quality.distance import Distance

UNITS = 1 << 14  # steps of bytes between the smallest and the largest choice
_HELD_OUT = 4  # one batch of so many verifies the plan
_ROUNDS = 2  # plans, each measured around the one before
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class BudgetPlan:
    """What :func:`plan` found.

    Attributes:
        specs: layer name -> spec, for :func:`lowbit.convert`.
        bytes: of the weights of all these layers, with scales, zeros, tables and outliers.
        budget: what they might take.
        bits_per_weight: of these weights.
        predicted: the KL divergence from the float model that the sum says, on the batches that were measured.
        measured, uniform: that of the plan and of ``uniform_spec`` for all layers, on batches that were held out.
        uniform_spec: the best candidate that fits the budget everywhere.
        kept: whether the plan was better there; else ``specs`` are all ``uniform_spec``.
    """

    specs: dict[str, Spec]
    bytes: int
    budget: int
    bits_per_weight: float
    predicted: float
    measured: float
    uniform: float
    uniform_spec: Spec
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a spec is the call that makes it, as the command line takes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "specs": {name: written(spec) for name, spec in self.specs.items()},
                "uniform_spec": written(self.uniform_spec)}  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        chosen: dict[str, list[str]] = {}
        for name, spec in self.specs.items():
            chosen.setdefault(spec.describe(), []).append(name)
        lines = [f"{len(names):>4} layers  {text}" for text, names in chosen.items()]
        size, most = self.bytes / 1e6, self.budget / 1e6
        lines.append(f"{size:.3f} MB of {most:.3f}, {self.bits_per_weight:.3f} bits per weight")
        better = "" if self.kept else ", which was no worse and is taken"
        uniform = f"{self.uniform_spec.describe()} everywhere {self.uniform:.4f}"
        lines.append(f"held-out KL {self.measured:.4f}; {uniform}{better}")
        return "\n".join(lines)


@torch.inference_mode(False)
@torch.no_grad()
def plan(
    model: nn.Module,
    budget: str | float,
    *,
    calibration: Iterable[Any],
    candidates: Sequence[Spec] | None = None,
    skip: Sequence[str] | None = None,
    fused: bool = True,
) -> BudgetPlan:
    """The spec of each layer with which the model is nearest to the float one within ``budget``.

        found = lowbit.plan(model, "3.5 bits", calibration=batches)
        model = lowbit.convert(model, found.specs, calibration=batches)

    One batch of four is held out. Where the plan is not better on those than one candidate for all layers, that is what
    is returned. Costs one conversion for each candidate, and two passes over the batches for each layer and candidate.

    Args:
        model: a float model; it is not changed.
        budget: ``"3.5 bits"`` or 3.5, per weight of the layers that are converted, everything counted; or the size of
            the whole model with what stays float, ``"700 MB"`` (10**6 bytes; kB, GB, KiB, MiB, GiB).
        calibration: a list of batches, as for :func:`lowbit.convert`.
        candidates: specs to choose from. Default: :class:`~lowbit.Packed` with 2, 3, 4, 5, 6 and 8 bits, by ``gptq``.
        skip: patterns of layers to leave float.
        fused: layers that see the very same input (q, k and v; gate and up) get one spec: serving stacks fuse them.

    Raises:
        ValueError: a budget that cannot be read, or that the smallest candidate exceeds, with both sizes; what
            :func:`lowbit.convert` says of a candidate.
    """
    require_model(model)
    batches = calibrate.batches_of(calibration)
    if len(batches) < 2:
        raise ValueError(f"calibration must hold at least two batches, one to verify the plan: got {len(batches)}")
    kind, amount = _parsed(budget)
    specs = _candidates(candidates)
    apart = max(1, len(batches) // _HELD_OUT)
    held_out, seen = batches[:apart], batches[apart:]
    groups = _groups(model, specs[0], skip, seen, fused)
    _require_room(model, specs, skip, seen, groups, kind, amount)
    choices = [_converted(model, spec, skip, seen, groups) for spec in specs]
    sizes = torch.tensor([[sum(choice[g][name].format.nbytes for name in _first_names(choice[g])) for choice in choices]
                          for g in range(len(groups))])  # fmt: skip
    weights = sum(group[name].weights for group in choices[0] for name in _first_names(group))
    limit = _limit(model, groups, kind, amount, weights)
    base = _uniform(sizes, limit, specs)
    trial = copy.deepcopy(model)
    originals = {name: trial.get_submodule(name) for group in groups for name in group}
    with calibrate.evaluating(model, trial), restoring(trial, originals):
        search = _Search(trial, choices, Distance(model, seen))
        start = int((sizes.sum(0) - limit).abs().argmin())
        plans = [search.around([start] * len(groups), sizes, limit)]
        while len(plans) < _ROUNDS:
            plans.append(search.around(plans[-1][0], sizes, limit))
        chosen, predicted = min(plans, key=lambda plan: search.measured(plan[0]))
        search.distance = Distance(model, held_out)
        uniform, measured = search.measured([base] * len(groups)), search.measured(chosen)
    kept = measured < uniform
    final = chosen if kept else [base] * len(groups)
    total = int(sum(sizes[g, c] for g, c in enumerate(final)))
    named = {name: specs[c] for group, c in zip(choices[0], final, strict=True) for name in _first_names(group)}
    return BudgetPlan(named, total, limit, 8 * total / weights, predicted, measured, uniform, specs[base], kept)


class _Search:
    """Puts candidates into ``model`` and measures. ``choices``: candidate, group -> layers by name."""

    def __init__(self, model: nn.Module, choices: list[list[dict[str, Layer]]], distance: Distance) -> None:
        self.model, self.choices, self.distance = model, choices, distance

    def place(self, group: int, choice: int) -> None:
        for name, layer in self.choices[choice][group].items():
            put(self.model, name, layer)

    def measured(self, chosen: list[int]) -> float:
        for g, c in enumerate(chosen):
            self.place(g, c)
        return self.distance(self.model)

    def around(self, context: list[int], sizes: Tensor, limit: int) -> tuple[list[int], float]:
        """(the best plan by what is measured with the other layers as ``context`` has them, what it predicts)."""
        least = self.measured(context)
        growth = torch.zeros(sizes.shape, dtype=torch.float64)
        with tqdm(total=growth.numel(), desc="lowbit plan", unit="layer", disable=None) as progress:
            for g, own in enumerate(context):
                for c in range(len(self.choices)):
                    if c != own:
                        self.place(g, c)
                        growth[g, c] = self.distance(self.model) - least
                    progress.update()
                self.place(g, own)
        chosen = knapsack(growth, sizes, limit)
        return chosen, least + float(sum(growth[g, c] for g, c in enumerate(chosen)))


def written(value: Any) -> str:
    """The call that makes a spec, defaults left out: ``Packed(bits=3, quantizer='gptq')``."""
    if not isinstance(value, Spec):
        return repr(value)
    given = [(field.name, getattr(value, field.name)) for field in fields(value)  # type: ignore[arg-type]
             if getattr(value, field.name) != field.default]  # fmt: skip
    return f"{type(value).__name__}({', '.join(f'{name}={written(each)}' for name, each in given)})"


def _candidates(given: Sequence[Spec] | None) -> list[Spec]:
    if given is None:
        return [Packed(bits=bits, quantizer="gptq") for bits in (2, 3, 4, 5, 6, 8)]
    specs = list(given)
    if len(specs) < 2 or not all(isinstance(spec, Spec) for spec in specs):
        raise ValueError(f"candidates must be two specs or more, such as lowbit.Packed(bits=3): got {given!r:.200}")
    return specs


def _parsed(budget: str | float) -> tuple[str, float]:
    """("bits" or "bytes", how many)."""
    text = f"{budget} bits" if isinstance(budget, (int, float)) and not isinstance(budget, bool) else budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bits?|[kMG]i?B|KiB)\s*", text) if isinstance(text, str) else None
    if match is None or not float(match[1]) > 0 or (match[2][0] not in "b" and match[2] not in _UNITS):
        raise ValueError(f"budget must be such as '3.5 bits' or '700 MB': got budget={budget!r}")
    amount = float(match[1])
    return ("bits", amount) if match[2].startswith("bit") else ("bytes", amount * _UNITS[match[2]])


def _groups(
    model: nn.Module, spec: Spec, skip: Sequence[str] | None, batches: list[Any], fused: bool
) -> list[list[str]]:
    """Names of layers that get one spec: those of one weight, and with ``fused`` those of one input."""
    planned = make_plan(model, spec, skip)
    groups = [[name for swap in group for name in swap.names] for group in planned.groups]
    linear = [group[0] for group in planned.groups if len(group) == 1 and group[0].kind == "linear"]
    alone = {swap.name: swap.module for swap in linear}
    if not fused or not alone:
        return groups
    inputs = calibrate.same_input(model, alone, batches)
    together = {name: number for number, names in enumerate(inputs) for name in names}
    found: dict[Any, list[str]] = {}
    for names in groups:
        found.setdefault(together.get(names[0], names[0]), []).extend(names)
    return list(found.values())


def _converted(
    model: nn.Module, spec: Spec, skip: Sequence[str] | None, batches: list[Any], groups: list[list[str]]
) -> list[dict[str, Layer]]:
    """Of each group, the packed layers by name."""
    packed = convert(copy.deepcopy(model), spec, skip=skip, calibration=batches if spec.needs_calibration else None)
    return [{name: packed.get_submodule(name) for name in names} for names in groups]


def _first_names(group: dict[str, Layer]) -> list[str]:
    """One name for each weight: a pattern of a second one would decide nothing."""
    found: dict[tuple[int, ...], str] = {}
    for name, layer in group.items():
        found.setdefault(storage_of(layer), name)
    return list(found.values())


def _require_room(
    model: nn.Module, specs: list[Spec], skip: Sequence[str] | None, batches: list[Any], groups: list[list[str]],
    kind: str, amount: float,
) -> None:  # fmt: skip
    """Raise where no candidate can fit everywhere, by what formats say, before anything is quantized."""
    given = [batches if spec.needs_calibration else None for spec in specs]
    rows = [convert(model, spec, skip=skip, dry_run=True, calibration=data).rows
            for spec, data in zip(specs, given, strict=True)]  # fmt: skip
    totals = torch.tensor([[sum(row.bytes_after for row in of_spec) for of_spec in rows]])
    weights = sum(row.weights for row in rows[0] if row.shares is None)
    _uniform(totals, _limit(model, groups, kind, amount, weights), specs)


def _limit(model: nn.Module, groups: list[list[str]], kind: str, amount: float, weights: int) -> int:
    """Bytes that the weights of the converted layers may take."""
    if kind == "bits":
        return math.floor(amount * weights / 8)
    converted = [model.get_submodule(name)._parameters.get("weight") for names in groups for name in names]
    gone = storages([weight for weight in converted if weight is not None])
    held = storages([*model.parameters(), *model.buffers()])
    return math.floor(amount - sum(size for key, size in held.items() if key not in gone))


def _uniform(sizes: Tensor, limit: int, specs: list[Spec]) -> int:
    """The largest candidate that fits everywhere."""
    totals = sizes.sum(0)
    fitting = [c for c in range(len(specs)) if int(totals[c]) <= limit]
    if not fitting:
        least = int(totals.argmin())
        raise ValueError(f"budget must hold the smallest candidate, {specs[least].describe()}, which takes "
                         f"{int(totals[least]):,} bytes: got {limit:,} bytes for these layers")  # fmt: skip
    return max(fitting, key=lambda c: int(totals[c]))


def knapsack(costs: Tensor, sizes: Tensor, limit: int) -> list[int]:
    """Of each row of ``[G, C]`` a column, so that the sum of ``costs`` is least and that of ``sizes`` within ``limit``.

    Exact but for the unit of bytes, to which sizes are rounded up: 1/16384 of what there is to distribute.
    """
    least = sizes.amin(1)
    free = limit - int(least.sum())
    if free < 0:
        raise ValueError(f"limit must hold the smallest choices, {int(least.sum())}: got {limit}")
    unit = max(1, -(-free // UNITS))
    extra = (sizes - least[:, None] + unit - 1) // unit
    room = free // unit
    best = torch.zeros(room + 1, dtype=torch.float64)  # least cost with at most so many units
    picks = []
    for cost, more in zip(costs.double(), extra.tolist(), strict=True):
        options = torch.full((len(more), room + 1), math.inf, dtype=torch.float64)
        for c, units in enumerate(more):
            if units <= room:
                options[c, units:] = best[: room + 1 - units] + cost[c]
        best, pick = options.min(0)
        picks.append(pick)
    place, chosen = room, []
    for pick, more in zip(reversed(picks), reversed(extra.tolist()), strict=True):
        chosen.append(int(pick[place]))
        place -= more[chosen[-1]]
    return chosen[::-1]
