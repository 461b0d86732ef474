"""``convert``: swap the layers of a trained model for packed ones. ``dequantize``: the way back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lowbit.model import hooks
from lowbit.model.build import build, predicted, remember_bytes
from lowbit.model.calibrate import batches_of
from lowbit.model.calibrated import build_calibrated
from lowbit.model.curvature import Loss
from lowbit.model.kept import with_earlier
from lowbit.model.plan import (
    Specs,
    check_calibration,
    check_correction,
    make_plan,
    require_model,
    unused_arguments,
)
from lowbit.model.report import warn_if_larger
from lowbit.model.sources import is_source
from lowbit.model.surgery import float_modules, put
from lowbit.nn.layer import freeze, layers


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
    loss: Loss | None = None,
    correction: float | None = None,
) -> Any:
    """Swap the linear layers, embeddings and experts of a trained model for packed ones, in place; returns the model.

    Args:
        model: any ``nn.Module``; ``nn.Linear``, ``nn.Embedding``, subclasses that compute the same (an embedding may
            be multiplied by a number), transformers' ``Conv1D`` and modules known to :func:`lowbit.register_source`
            are swapped. Layers that share one weight (tied embedding and head) share one packed storage afterwards;
            where one side stays float, the report says ``untied: a float copy of N bytes is kept``. A model that *is*
            such a layer is replaced: use the returned one. The 3-D weights of experts that transformers' interface for
            experts serves, and those of classes known to :func:`lowbit.register_experts`, are swapped as stacks,
            ``*.experts.gate_up_proj`` and ``*.experts.down_proj``; linear layers that choose the experts stay float
            unless ``spec`` has their very name. PEFT's adapters, and what is being trained while most of the model is
            frozen, are left alone; the report lists them. accelerate's hooks stay on their layers.
        spec: ``None`` swaps what was trained compressed, without loss, and ends the training of packed layers as
            :func:`lowbit.freeze` does. A :class:`Packed`, :class:`Codebook` or
            :class:`Kronecker` compresses every layer. A mapping of name patterns to specs (``None`` as a spec: stay
            float) compresses the layers that match; where several patterns match a layer the last one counts.
        skip: patterns of layers to leave alone. A pattern is a dotted name with ``*`` wildcards, or the name of a
            parent module. One that matches no layer is an error.
        dry_run: change nothing and return the :class:`Report` of what would be done.
        calibration: a list of batches (tensors, or tuples or dicts of arguments) that the model can be called with;
            needed by ``quantizer="gptq"`` and ``activations="int8_static"``; ``quantizer="mse"`` then weighs the error
            of each input feature by how much it matters on them. For embeddings such quantizers are given what errors
            of their rows cost: the second derivative of the loss, or without one of the distance of the outputs (KL
            divergence of logits, squared error of ``last_hidden_state``), from gradients. Where there are none, as of
            other outputs and without a loss of models of more than 2**30 weights, an embedding is quantized as without
            calibration, and the report says so.
        loss: ``loss(model, batch)``, a scalar tensor such as the negative log-likelihood of the batch. With it,
            ``Codebook(sensitivity=True)`` weighs each weight's squared error by the mean square of its gradient over
            the batches (the empirical Fisher information of SqueezeLLM, arXiv 2306.07629) instead of by its input, and
            errors of embeddings are weighed by it. Give one sample per batch, as gradients are squared after they were
            summed over a batch.
        correction: how much of the drift of its inputs, which rounding the layers before it causes, a linear layer
            makes up for, from 0 to 1: what is rounded is a weight that gives what the float model's layer gives
            (``lowbit/model/drift.py``). Of quantizers that want the Hessian to be measured, experts and tied heads left
            out. Runs each block about ten times on every batch. Default: 0.5 with ``"descent"`` and ``"lnq"``, else 0.

    Raises:
        ValueError: listing *every* problem by layer name; the model is then exactly as before. Also where another
            library quantized a layer that is to be converted.
        TypeError: for what is no model, no spec, or no list of batches.

    Warns where ``calibration``, ``loss`` or ``correction`` changes nothing, and where the model becomes larger.
    """
    require_model(model)
    hooks.before_convert(model)
    trained = spec is None and not dry_run and any(layer.trained() for layer in layers(model).values())
    if trained and not any(map(is_source, model.modules())):
        freeze(model)
        return model
    plan = make_plan(model, spec, skip)
    check_correction(correction, calibration)
    batches = None if calibration is None else batches_of(calibration)
    check_calibration(plan, batches, loss)
    if unused := unused_arguments(plan, calibration, loss, correction):
        warnings.warn(unused, stacklevel=5)
    if dry_run:
        return predicted(model, plan)
    replacements = build(plan) if batches is None else build_calibrated(model, plan, batches, loss, correction)
    ledger = remember_bytes(model, plan, replacements)
    for swap in plan.swaps():
        for name in swap.names:
            model = put(model, name, replacements[swap.name])
    if trained:  # only now: what was refused above has changed nothing
        freeze(model)
    model.lowbit_skipped = with_earlier(model, plan.skipped)  # type: ignore[assignment]
    hooks.after_convert(model)
    if not any(swap.source for swap in plan.swaps()):  # what others hold beside their Parameters is not counted
        warn_if_larger(ledger.before, ledger.after, stacklevel=5)  # the decorators
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Swap every packed layer for a plain torch layer with the dequantized weight, in place; returns the model.

    Layers that shared one packed storage share one float weight again. Raises ``ValueError`` when the model has no
    packed layer.
    """
    require_model(model)
    found = layers(model, duplicates=True)
    if not found:
        raise ValueError("the model has no packed layer: nothing to dequantize")
    for name, module in float_modules(found).items():
        model = put(model, name, module)
    for part in model.modules():  # a wrapper may show what the model in it has
        part.__dict__.pop("lowbit_skipped", None)
    hooks.after_dequantize(model)
    return model
