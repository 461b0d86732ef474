"""``plan``: which form each layer should have, so that a model of a given size stays near to the float one.

    minimise KL(float model, model with c(l) in layer l, for all l),   subject to   the sum of bytes[l, c(l)] <= budget

The error of a layer says little of what it costs the model, so that is asked for: from gradients, which tell the KL
divergence that each candidate of each layer causes to second order, or by trying them one by one. The sum of these
costs is minimised exactly, by dynamic programming. What it leaves out, that layers act upon each other, is learned from
trials of whole plans; the best one that was measured is taken.
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

from lowbit.core.family import Spec, check_size, choice
from lowbit.model import calibrate, curvature
from lowbit.model.candidates import Swap
from lowbit.model.convert import convert
from lowbit.model.plan import make_plan, require_model
from lowbit.model.storage import storages
from lowbit.nn.layer import Layer
from lowbit.packed.format import Packed
from lowbit.quality.distance import Distance
from lowbit.quality.scores import by_distance, by_gradient, first_names, gradient_problem
from lowbit.quality.search import search
from lowbit.quality.trial import Trial

SIGNALS = ("gradient", "kl")
TRIALS = 32  # plans that are measured
_HELD_OUT = 4  # one batch of so many verifies the plan
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class BudgetPlan:
    """What :func:`plan` found.

    Attributes:
        specs: layer name -> spec, for :func:`lowbit.convert`.
        bytes: of the weights of all these layers, with scales, zeros, tables and outliers.
        budget: what they might take.
        bits_per_weight: of these weights.
        predicted: the KL divergence from the float model that the scores of its layers sum to.
        measured, uniform: that of the plan and of ``uniform_spec`` for all layers, on batches that were held out.
        uniform_spec: of the candidates that fit the budget everywhere, the best on the other batches.
        uniform_bytes: of the weights with ``uniform_spec``.
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
    uniform_bytes: int
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
        uniform = f"{self.uniform_spec.describe()} everywhere, {self.uniform_bytes / 1e6:.3f} MB, {self.uniform:.4f}"
        lines.append(f"held-out KL {self.measured:.4f}; {uniform}{better}")
        return "\n".join(lines)


def plan(
    model: nn.Module,
    budget: str | float,
    *,
    calibration: Iterable[Any],
    candidates: Sequence[Spec] | None = None,
    skip: Sequence[str] | None = None,
    fused: bool = True,
    signal: str | None = None,
    trials: int = TRIALS,
    seed: int = 0,
) -> BudgetPlan:
    """The spec of each layer with which the model is nearest to the float one within ``budget``.

        found = lowbit.plan(model, "3.5 bits", calibration=batches)
        model = lowbit.convert(model, found.specs, calibration=batches)

    One batch of four is held out. Where the plan is not better on those than one candidate for all layers, that is what
    is returned. Costs one conversion for each candidate, the scores, and a pass over the batches for each trial.

    Args:
        model: a float model; it is not changed.
        budget: ``"3.5 bits"`` or 3.5, per weight of the layers that are converted, everything counted; or the size of
            the whole model with what stays float, ``"700 MB"`` (10**6 bytes; kB, GB, KiB, MiB, GiB).
        calibration: a list of batches, as for :func:`lowbit.convert`.
        candidates: specs to choose from; the finer their sizes, the better. Default: :class:`~lowbit.Packed` by
            ``gptq`` with packed zeros and scales of 8 bits: 2, 3, 4, 5, 6 and 8 bits in groups of 64 (or K, where that
            is less), 2, 3 and 4 in groups of 32 and of 16, where no layer is narrower. On a GPU, kernels of Triton run
            these, not those of CUDA C++. For the latter: ``[Packed(bits=bits, quantizer="gptq", zeros=zeros) for bits
            in (2, 3, 4, 5, 6) for zeros in ("int", "float")]``.
        skip: patterns of layers to leave float.
        fused: layers that see the very same input (q, k and v; gate and up) get one spec: serving stacks fuse them.
        signal: what scores a candidate of a layer before plans are tried. ``"gradient"``: the KL divergence to second
            order, from the Fisher information of the outputs: 256 backward passes of a batch, whatever the number of
            layers and candidates; activations that are rounded are not seen. ``"kl"``: the KL divergence with it alone,
            a pass over the batches for each layer and candidate. Default: ``"gradient"`` where all layers have
            gradients (experts have none here), else ``"kl"``.
        trials: how many plans are measured.
        seed: of the random numbers of gradients and trials.

    Raises:
        ValueError: a budget that cannot be read, or that the smallest candidate exceeds, with both sizes; what
            :func:`lowbit.convert` says of a candidate; ``signal="gradient"`` for layers that have none.
    """
    planner = Planner(model, calibration=calibration, candidates=candidates, skip=skip, fused=fused, signal=signal,
                      trials=trials, seed=seed)  # fmt: skip
    return planner.within(budget)


class Planner:
    """Plans of one model within several budgets; what they share is made once. Arguments as for :func:`plan`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        calibration: Iterable[Any],
        candidates: Sequence[Spec] | None = None,
        skip: Sequence[str] | None = None,
        fused: bool = True,
        signal: str | None = None,
        trials: int = TRIALS,
        seed: int = 0,
    ) -> None:
        require_model(model)
        batches = calibrate.batches_of(calibration)
        if len(batches) < 2:
            raise ValueError(f"calibration must hold at least two batches, one to verify the plan: got {len(batches)}")
        if signal is not None:
            choice("signal", signal, SIGNALS)
        check_size("trials", trials)
        self.model, self.skip, self.signal, self.trials, self.seed = model, skip, signal, trials, seed
        self.specs = _defaults(model, skip) if candidates is None else _candidates(candidates)
        apart = max(1, len(batches) // _HELD_OUT)
        self.held_out, self.seen = batches[:apart], batches[apart:]
        self.groups = _groups(model, self.specs[0], skip, self.seen, fused)
        if any("" in group for group in self.groups):
            raise ValueError(f"model must hold its layers: got a {type(model).__name__}, which is one: wrap it in "
                             "nn.Sequential")  # fmt: skip
        self._ready: Prepared | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def within(self, budget: str | float) -> BudgetPlan:
        """The plan."""
        kind, amount = _parsed(budget)
        self._require_room(kind, amount)
        ready = self.prepared()
        limit = _limit(self.model, self.groups, kind, amount, ready.weights)
        fitting = _fitting(ready.sizes.sum(0).tolist(), limit, self.specs)
        trial, sizes, count = ready.trial, ready.sizes, len(self.groups)
        with calibrate.evaluating(self.model, trial.model):
            for c in fitting:
                ready.everywhere.setdefault(c, trial([c] * count))
            best = min(fitting, key=lambda c: ready.everywhere[c])
            known = [([best] * count, ready.everywhere[best])]
            chosen, _ = search(ready.scores, sizes, limit, trial, self.trials, known=known, seed=self.seed)
            uniform, measured = (trial(each, ready.held_out) for each in ([best] * count, chosen))
        kept = measured < uniform
        final = chosen if kept else [best] * count
        total = int(sum(sizes[g, c] for g, c in enumerate(final)))
        return BudgetPlan(
            specs={name: self.specs[c] for names, c in zip(ready.names, final, strict=True) for name in names},
            bytes=total,
            budget=limit,
            bits_per_weight=8 * total / ready.weights,
            predicted=float(sum(ready.scores[g, c] for g, c in enumerate(chosen))),
            measured=measured,
            uniform=uniform,
            uniform_spec=self.specs[best],
            uniform_bytes=int(sizes[:, best].sum()),
            kept=kept,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepared(self) -> Prepared:
        """The candidates of each layer, and what they cost."""
        if self._ready is not None:
            return self._ready
        with curvature.one_model():
            choices = [_converted(self.model, spec, self.skip, self.seen, self.groups) for spec in self.specs]
        names = [first_names(group) for group in choices[0]]
        sizes = torch.tensor([[sum(choice[g][name].format.nbytes for name in names[g]) for choice in choices]
                              for g in range(len(names))])  # fmt: skip
        weights = sum(choices[0][g][name].weights for g, of in enumerate(names) for name in of)
        copied = copy.deepcopy(self.model)
        swaps = {name: swap for swap in make_plan(copied, self.specs[0], self.skip).swaps() for name in swap.names}
        originals = [{name: swaps[name].module for name in group} for group in self.groups]
        with calibrate.evaluating(self.model, copied):
            trial = Trial(copied, originals, choices, Distance(self.model, self.seen))
            scores = self._scores(trial, swaps)
        self._ready = Prepared(trial, scores, sizes, weights, names, Distance(self.model, self.held_out), {})
        return self._ready

    def _scores(self, trial: Trial, swaps: dict[str, Swap]) -> Tensor:
        """``[G, C]``."""
        problem = gradient_problem(swaps, trial.choices)
        if problem is not None and self.signal == "gradient":
            raise ValueError(f"signal='gradient': {problem}: signal='kl' needs none")
        if self.signal == "kl" or (self.signal is None and problem is not None):
            return by_distance(trial)
        return by_gradient(trial.model, swaps, trial.choices, trial.distance, self.seed)

    def _require_room(self, kind: str, amount: float) -> None:
        """Raise where no candidate can fit everywhere, by what formats say, before anything is quantized."""
        given = [self.seen if spec.needs_calibration else None for spec in self.specs]
        rows = [convert(self.model, spec, skip=self.skip, dry_run=True, calibration=data).rows
                for spec, data in zip(self.specs, given, strict=True)]  # fmt: skip
        totals = [sum(row.bytes_after for row in of_spec) for of_spec in rows]
        weights = sum(row.weights for row in rows[0] if row.shares is None)
        _fitting(totals, _limit(self.model, self.groups, kind, amount, weights), self.specs)


@dataclass
class Prepared:
    """What is made once.

    Attributes:
        trial: a model with each candidate of each group.
        scores, sizes: ``[G, C]``: what a candidate of a group of layers costs, and its bytes.
        weights: how many there are.
        names: of each group, one for each weight.
        held_out: the distance on the batches that verify.
        everywhere: candidate -> the distance with it everywhere.
    """

    trial: Trial
    scores: Tensor
    sizes: Tensor
    weights: int
    names: list[list[str]]
    held_out: Distance
    everywhere: dict[int, float]


def written(value: Any) -> str:
    """The call that makes a spec, defaults left out: ``Packed(bits=3, quantizer='gptq')``."""
    if not isinstance(value, Spec):
        return repr(value)
    given = [(field.name, getattr(value, field.name)) for field in fields(value)  # type: ignore[arg-type]
             if getattr(value, field.name) != field.default]  # fmt: skip
    return f"{type(value).__name__}({', '.join(f'{name}={written(each)}' for name, each in given)})"


def _defaults(model: nn.Module, skip: Sequence[str] | None) -> list[Spec]:
    """Packed zeros and scales of 8 bits, as they take the fewest bytes; those that suit each layer."""
    forms = [(bits, None) for bits in (2, 3, 4, 5, 6, 8)] + [(bits, group) for group in (32, 16) for bits in (2, 3, 4)]
    specs = [Packed(bits=bits, group_size=group, quantizer="gptq", packed_zeros=True, scale_bits=8)
             for bits, group in forms]  # fmt: skip
    shapes = {swap.weight().shape for swap in make_plan(model, specs[0], skip).swaps() if swap.source is None}
    return [spec for spec in specs if not any(spec.problem(*shape) for shape in shapes)]


def _candidates(given: Sequence[Spec]) -> list[Spec]:
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
    packed = convert(copy.deepcopy(model), spec, skip=skip, calibration=batches if spec.needs_calibration else None,
                     correction=0.0)  # what has drifted is another thing in each plan
    return [{name: packed.get_submodule(name) for name in names} for names in groups]


def _fitting(totals: list[int], limit: int, specs: list[Spec]) -> list[int]:
    """The candidates that fit everywhere."""
    least = totals.index(min(totals))
    if totals[least] > limit:
        raise ValueError(f"budget must hold the smallest candidate, {specs[least].describe()}, which takes "
                         f"{totals[least]:,} bytes: got {limit:,} bytes for these layers")  # fmt: skip
    return [c for c, total in enumerate(totals) if total <= limit]


def _limit(model: nn.Module, groups: list[list[str]], kind: str, amount: float, weights: int) -> int:
    """Bytes that the weights of the converted layers may take."""
    if kind == "bits":
        return math.floor(amount * weights / 8)
    converted = [model.get_submodule(name)._parameters.get("weight") for names in groups for name in names]
    gone = storages([weight for weight in converted if weight is not None])
    held = storages([*model.parameters(), *model.buffers()])
    return math.floor(amount - sum(size for key, size in held.items() if key not in gone))


