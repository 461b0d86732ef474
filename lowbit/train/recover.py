"""``recover``: what a packed model holds beside its codes is learned from the float model that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.model.calibrate import batches_of, evaluating
from lowbit.model.plan import require_model
from lowbit.nn.layer import Layer, freeze, layers, make_trainable
from lowbit.quality.distance import Distance
from lowbit.train.progress import Finished, Saved, fingerprint
from lowbit.train.steps import Draws, check_numbers, finite, frozen, go_on, mean, split, state

_WARM_UP = 5  # steps until the whole learning rate
_SMALLEST = 0.1  # of its first value: no scale becomes less


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` did.

    before, after: the loss on the batches that were not learned from.
    kept: whether what was learned was better there; else the model is as it was.
    """

    before: float
    after: float
    kept: bool
    steps: int

    def __str__(self) -> str:
        state = "kept" if self.kept else "no better: the model is as it was"
        return f"held-out loss {self.before:.4f} -> {self.after:.4f} after {self.steps} steps ({state})"


@torch.inference_mode(False)
@torch.autocast("cpu", enabled=False)
def recover(
    model: nn.Module,
    reference: nn.Module,
    calibration: Iterable[Any],
    *,
    steps: int = 100,
    lr: float = 0.005,
    batch: int = 4,
    seed: int = 0,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    folder: str | Path | None = None,
) -> Recovery:
    """Train scales, float zeros, tables, outliers and Kronecker factors of a packed model on the outputs of the float
    one, in place. Codes stay as they are, and so do format, size and speed.

    The loss is the KL divergence of the model's token or class probabilities from the reference's, the mean over tokens
    that count; of encoders, the relative squared error of ``last_hidden_state``, of tokens and of their mean. Adam,
    with a learning rate of ``lr`` times the mean magnitude of each tensor, which rises for 5 steps and falls linearly
    to 0. One batch of eight is held out; where the loss on those is not smaller in the end, the model is as it was
    before.

    Costs ``steps * batch`` forward and backward passes through both models; the float model has to be in memory.
    EfficientQAT (Chen et al., arXiv 2407.11062) trains scales end to end so; its loss is the task's.

    Args:
        model: a packed model. What of it is trained already is an error: ``lowbit.convert(model)`` first.
        reference: the float model. It is not changed.
        calibration: a list of batches that both can be called with, as for :func:`lowbit.convert`; 32 and more texts.
        batch: how many of them make a step.
        seed: of the order of batches.
        loss: ``loss(model, batch)``, a scalar, instead, such as a :class:`Distillation`.
        folder: what was learned so far is saved there, from minute to minute. The same call goes on behind it, with the
            result of one that was not interrupted.

    Raises:
        ValueError: no batches, no packed layer, nothing to train, one that is trained already, a ``folder`` of another
            run, or a bad number.
        FloatingPointError: the loss is not finite. The model is then as before.
    """
    require_model(model)
    require_model(reference)
    batches = batches_of(calibration)
    check_numbers(batches, steps=steps, batch=batch, lr=lr)
    names = _check(model)
    generator = torch.Generator().manual_seed(seed)
    learned, held_out = split(len(batches), generator)
    measure = partial(Distance(reference, batches).of, model) if loss is None else (lambda i: loss(model, batches[i]))
    stored = {(layer, name): layer._buffers.get(name) for layer in layers(model).values() for name in names}

    finished = None
    if folder is not None:
        start = {name: (layer.canonical(), layer.format.to_dict()) for name, layer in layers(model).items()}
        given = {"model": start, "reference": dict(reference.state_dict()), "calibration": batches}
        run = {name: fingerprint(values) for name, values in given.items()}
        finished = Finished(folder, {**run, "by": "recover", "steps": steps, "lr": lr, "batch": batch, "seed": seed})

    kept = False
    with frozen(model), evaluating(model, reference):
        try:
            before = finite(mean(measure, held_out), 0)
            saved = None if finished is None else Saved(finished, before)
            make_trainable(model, *names)
            _train(model, measure, steps, lr, Draws(learned, batch, generator), saved)
            after = mean(measure, held_out)  # with what will be stored
            kept = after < before
        finally:
            freeze(model)
            if not kept:
                for (layer, name), tensor in stored.items():
                    if tensor is not None:
                        layer._buffers[name] = tensor
    return Recovery(before, after, kept, steps)


def _check(model: nn.Module) -> list[str]:
    """The names of the tensors to train; raises ``ValueError``."""
    found = layers(model)
    if not found:
        raise ValueError("the model has no packed layer: convert it first")
    for name, layer in found.items():
        if layer.trained():
            raise ValueError(f"{name or 'the model'}: {', '.join(layer.trained())} is trained already: end that by "
                             "lowbit.convert(model)")  # fmt: skip
    names = list(dict.fromkeys(name for layer in found.values() for name in layer.trainable() if _is_held(layer, name)))
    if not names:
        raise ValueError("no layer of the model has a float tensor that could be trained")
    return names


def _is_held(layer: Layer, name: str) -> bool:
    tensor = layer._tensor(name)
    return tensor is not None and tensor.device.type != "meta"


def _train(
    model: nn.Module, measure: Callable[[int], Tensor], steps: int, lr: float, draws: Draws, saved: Saved | None
) -> None:
    """Adam on all Parameters that require a gradient. It goes on from what was ``saved``."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    rates = [lr * float(parameter.detach().abs().mean()) for parameter in parameters]
    least = {p: p.detach() * _SMALLEST for name, p in trained.items() if name.endswith("scales")}
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    done = 0
    if saved is not None and saved.found is not None:
        tensors, done = saved.found
        go_on(parameters, optimizer, draws, tensors)
    with tqdm(total=steps, initial=done, desc="lowbit recover", unit="step", disable=None) as progress:
        for step in range(done, steps):
            share = min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            optimizer.zero_grad()
            draws.backward(measure, step)
            optimizer.step()
            with torch.no_grad():
                for parameter, limit in least.items():
                    parameter.copy_(parameter.maximum(limit))
            if saved is not None and (saved.due() or step + 1 == steps):
                saved.save(state(parameters, optimizer, draws), step + 1)
            progress.update()
