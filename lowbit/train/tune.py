"""``tune``: codes, with the scales, zeros or tables beside them, are learned from the float model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.model import candidates
from lowbit.model.calibrate import batches_of, evaluating
from lowbit.model.feed import without_cache
from lowbit.model.plan import require_model
from lowbit.model.surgery import put, restoring
from lowbit.nn.layer import layers, storage_of
from lowbit.nn.linear import LinearLayer
from lowbit.quality.distance import Distance
from lowbit.train.blocks import Blocks
from lowbit.train.progress import Finished, Saved, fingerprint
from lowbit.train.rounding import Rounding, rounding_of, why_not
from lowbit.train.steps import Draws, check_numbers, finite, frozen, go_on, mean, split, state

_WAY = {"model": 1.0, "block": 0.5}  # steps of the grid that an offset goes at most in all
_FINE, _WAY_OF_FINE = 4, 0.25  # from so many bits on so much of that
_OF_GRIDS = 0.5  # the learning rate of scales, zeros and tables, over that of offsets
_WARM_UP = 5  # steps until the whole learning rate


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` did.

    Attributes:
        before, after: the loss of the whole model on the batches that were not learned from.
        kept: whether what was learned was better there; else the model is as it was.
        blocks: block -> (before, after), the same of its own outputs; with ``by="block"``.
        left: layer -> why its codes were not learned.
    """

    before: float
    after: float
    kept: bool
    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        state = "kept" if self.kept else "no better: the model is as it was"
        left = [f"left as they are: {', '.join(self.left)}"] if self.left else []
        return "\n".join([f"held-out loss {self.before:.4f} -> {self.after:.4f} ({state})", *left])


@torch.inference_mode(False)
@torch.autocast("cpu", enabled=False)
def tune(
    model: nn.Module,
    reference: nn.Module,
    calibration: Iterable[Any],
    *,
    by: Literal["model", "block"] = "model",
    only: Collection[str] | None = None,
    steps: int = 200,
    batch: int = 4,
    lr: float | None = None,
    seed: int = 0,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    folder: str | Path | None = None,
) -> Tuning:
    """Learn how the linear layers of a packed model are rounded, in place: their codes, scales, float zeros and tables.
    Formats, sizes and speeds stay.

    Every weight has an offset, in steps of its grid, that is added before it is rounded. Offsets go ``lr`` against the
    sign of their gradient in each step (SignRound: Cheng et al., arXiv 2309.05516); scales, zeros and tables learn by
    Adam beside them. Rates fall linearly to 0. It begins with the codes that the layers have: convert by ``descent``
    or ``lnq`` first, with ``correction=0``.

    ``by="model"``: the loss is that of :func:`recover`, the KL divergence of the model's probabilities from the
    reference's (of encoders the relative squared error of ``last_hidden_state``, of tokens and of their mean). All
    layers learn together. Memory: both models, and for each float weight 3 float32 numbers. ``by="block"``: block after
    block of the model (the members of its ``nn.ModuleList``), the squared error of the block's output from the float
    block's, its inputs being those that the packed blocks before it give. Memory: two models, one block's numbers, and
    a block's inputs for all batches.

    One batch of eight is held out. A block that is not better there, and in the end the whole model, is as it was.

    Args:
        model: a packed model. What of it is trained already is an error: ``lowbit.convert(model)`` first.
        reference: the float model. It is not changed.
        calibration: a list of batches that both can be called with, as for :func:`lowbit.convert`; 32 and more texts.
        only: the names of the layers to tune; ``None``: all.
        batch: how many of them make a step.
        lr: how far an offset goes in a step of learning, at first, in steps of the grid. Default: 2 / ``steps`` for the
            model, so that in all it goes one step of the grid at most; 1 / ``steps`` for blocks; a quarter of that from
            4 bits on.
        seed: of the order of batches.
        loss: ``loss(model, batch)``, a scalar, instead, such as a :class:`Distillation`; for ``by="model"``.
        folder: finished blocks are saved there, or, ``by="model"``, from minute to minute what was learned so far. The
            same call goes on behind them, with the result of one that was not interrupted.

    Returns:
        A :class:`Tuning`, which also names the layers that were left as they are: embeddings and what is tied to them,
        experts, Kronecker factors, act-order.

    Raises:
        ValueError: no batches, no layer to tune, one that is trained already, one whose float layer ``reference`` does
            not have, no blocks, a ``folder`` of another run, or a bad number.
        FloatingPointError: the loss is not finite. The model is then as before.
    """
    require_model(model)
    require_model(reference)
    batches = batches_of(calibration)
    check_numbers(batches, steps=steps, batch=batch, lr=1.0 if lr is None else lr)
    if by not in _WAY:
        raise ValueError(f"by must be 'model' or 'block': got by={by!r}")
    if by == "block" and loss is not None:
        raise ValueError("loss goes with by='model': a block is measured by its output")
    found, left = _to_tune(model, only)
    weights = _float_weights(reference, found)
    blocks = Blocks(model, reference, found) if by == "block" else None
    learned, held_out = split(len(batches), torch.Generator().manual_seed(seed))
    learner = _Learner(steps, batch, lr or 2 * _WAY[by] / steps, seed, 1.0 if lr else _WAY_OF_FINE)
    finished = None
    if folder is not None:
        start = {name: layer.canonical() for name, layer in found.items()}
        formats = {name: layer.format.to_dict() for name, layer in found.items()}
        given = {"model": (start, formats), "reference": weights, "calibration": batches}
        run = {name: fingerprint(values) for name, values in given.items()}
        finished = Finished(folder, run | asdict(learner) | {"by": by})
    measure = partial(Distance(reference, batches).of, model) if loss is None else (lambda i: loss(model, batches[i]))
    before_it = {layer: layer.canonical() for layer in found.values()}
    measured: dict[str, tuple[float, float]] = {}
    kept = False
    with evaluating(model, reference), frozen(model, reference), without_cache(model, reference):
        before = finite(mean(measure, held_out), 0)
        saved = Saved(finished, before) if finished is not None and blocks is None else None
        try:
            if blocks is None:
                roundings = {name: rounding_of(layer, weights[name]) for name, layer in found.items()}
                with restoring(model, dict(found)):
                    for name, rounding in roundings.items():
                        put(model, name, rounding)
                    learner.learn(roundings.values(), learned, measure, "lowbit tune", saved)
                for name, rounding in roundings.items():
                    found[name].become(found[name].format, rounding.tensors())
            else:
                left |= {name: "in no block" for name in found if name not in blocks.inside}
                measured = _by_block(model, blocks, found, weights, batches, learner, learned, held_out, finished)
            after = mean(measure, held_out)
            kept = after < before
        finally:
            if not kept:
                for layer, tensors in before_it.items():
                    layer.become(layer.format, tensors)
    return Tuning(before, after, kept, measured, left)


def _by_block(
    model: nn.Module, blocks: Blocks, found: dict[str, LinearLayer], weights: dict[str, Tensor], batches: list[Any],
    learner: _Learner, learned: list[int], held_out: list[int], finished: Finished | None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """What each block's loss was on the held-out batches, before and after."""
    measured = {}
    for name, inside in blocks.each(batches):
        own = {n: found[n] for n in inside}
        if finished is not None and (part := finished.load(name)) is not None:
            for n, layer in own.items():
                layer.become(layer.format, {t: part[0][f"{n}:{t}"].to(layer.device) for t in layer.format.tensors()})
            measured[name] = (part[1]["before"], part[1]["after"])
            continue
        stored = {n: layer.canonical() for n, layer in own.items()}
        before = finite(mean(blocks.error, held_out), 0)
        roundings = {n: rounding_of(layer, weights[n]) for n, layer in own.items()}
        with restoring(model, dict(own)):
            for n, rounding in roundings.items():
                put(model, n, rounding)
            learner.learn(roundings.values(), learned, blocks.error, f"lowbit tune {name}")
        for n, rounding in roundings.items():
            own[n].become(own[n].format, rounding.tensors())
        after = mean(blocks.error, held_out)
        if not after < before:
            for n, layer in own.items():
                layer.become(layer.format, stored[n])
        measured[name] = before, min(before, after)
        if finished is not None:
            tensors = {f"{n}:{t}": tensor for n, layer in own.items() for t, tensor in layer.canonical().items()}
            finished.save(name, tensors, {"before": before, "after": measured[name][1]})
    return measured


@dataclass
class _Learner:
    steps: int
    batch: int
    lr: float
    seed: int
    of_fine: float  # times the rate from 4 bits on

    def learn(
        self, roundings: Collection[Rounding], batches: list[int], measure: Callable[[int], Tensor], title: str,
        saved: Saved | None = None,
    ) -> None:  # fmt: skip
        """Offsets by the sign of their gradients, what is beside them by Adam. It goes on from what was ``saved``."""
        draws = Draws(batches, self.batch, torch.Generator().manual_seed(self.seed))
        offsets = [(rounding.offsets, self._rate(rounding)) for rounding in roundings]
        groups = [
            {"params": [p for p in rounding.parameters() if p is not rounding.offsets], "rate": rate * _OF_GRIDS}
            for rounding, (_, rate) in zip(roundings, offsets, strict=True)
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        learned = [p for rounding in roundings for p in rounding.parameters()]
        done = 0
        if saved is not None and saved.found is not None:
            tensors, done = saved.found
            go_on(learned, adam, draws, tensors)
        with tqdm(total=self.steps, initial=done, desc=title, unit="step", disable=None) as progress:
            for step in range(done, self.steps):
                share = 1 - step / self.steps
                for rounding in roundings:
                    rounding.zero_grad()
                draws.backward(measure, step)
                with torch.no_grad():
                    for offset, rate in offsets:
                        if offset.grad is not None:
                            offset.sub_(offset.grad.sign_(), alpha=rate * share)
                for group in adam.param_groups:
                    group["lr"] = group["rate"] * share * min(1.0, (step + 1) / _WARM_UP)
                adam.step()
                if saved is not None and (saved.due() or step + 1 == self.steps):
                    saved.save(state(learned, adam, draws), step + 1)
                progress.update()

    def _rate(self, rounding: Rounding) -> float:
        return self.lr * (self.of_fine if rounding.layer.format.bits >= _FINE else 1.0)


def _to_tune(model: nn.Module, only: Collection[str] | None) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """(layers whose rounding is learned, why others are not), by name; raises ``ValueError``."""
    every = layers(model)
    if not every:
        raise ValueError("the model has no packed layer: convert it first")
    found: dict[str, LinearLayer] = {}
    left: dict[str, str] = {}
    storages = [storage_of(layer) for layer in every.values()]
    for name, layer in every.items():
        if only is not None and name not in only:
            continue
        if layer.trained():
            raise ValueError(f"{name or 'the model'}: {', '.join(layer.trained())} is trained already: end that by "
                             "lowbit.convert(model)")  # fmt: skip
        reason = why_not(layer) if name else "it is the whole model: wrap it in nn.Sequential"
        if reason is None and storages.count(storage_of(layer)) > 1:
            reason = "another layer shares its weight"
        if reason is not None:
            left[name] = reason
        elif isinstance(layer, LinearLayer):
            found[name] = layer
    if not found:
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left.items())
        raise ValueError(f"no layer can be tuned: {reasons:.500}")
    return found, left


def _float_weights(reference: nn.Module, found: dict[str, LinearLayer]) -> dict[str, Tensor]:
    """``[N, K]`` by the name of the layer; raises ``ValueError`` where the reference has another one, or none."""
    swaps = {name: swap for swap in candidates.find(reference)[0] for name in swap.names}
    weights = {}
    for name, layer in found.items():
        swap, wanted = swaps.get(name), [layer.format.out_features, layer.format.in_features]
        if swap is None or swap.kind != "linear" or swap.source is not None:
            raise ValueError(f"reference must be the float model: {name or 'it'} is no float linear layer there")
        weights[name] = swap.weight()
        if list(weights[name].shape) != wanted:
            raise ValueError(f"{name}: the weight of reference must be {wanted}: got {list(weights[name].shape)}")
    return weights
