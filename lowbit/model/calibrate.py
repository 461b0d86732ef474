"""Statistics on calibration data: Hessians of layer inputs for error-compensating quantizers, their maxima for
static int8 scales, squared weight gradients, and the loop that quantizes a model in execution order.

A batch is what the model is called with: a mapping (keyword arguments), a tuple or list (positional ones) or
a single argument; ``forward(model, batch)`` replaces that call. Where a batch is a mapping with an
``attention_mask`` [B, T], its padding positions do not count. The model runs in eval mode, and without
gradients where none are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["calibrate_sequential", "collect_hessians", "collect_input_maxima", "collect_sensitivities"]

# Float32 Hessians held at a time; more of them need fewer passes over the batches.
_HESSIANS_AT_ONCE = 1 << 30

Forward = Callable[[nn.Module, Any], Any]
_Visit = Callable[[str, Tensor, "Tensor | None"], None]  # layer name, its input [..., K], padding mask


def collect_hessians(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """H = 2/n X.T X of every layer's input X [n, K] over all batches: float32 [K, K] by layer name.

    Layers that see the very same input share one tensor. Costs one pass over the batches, the first twice.

    Raises:
        ValueError: no batches; a layer that no batch reaches; an input that is not finite.
    """
    batches = list(batches)
    return _hessians(model, layers, _trace(model, layers, batches, forward), batches, forward)


def collect_input_maxima(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """max|x| of every layer's input over all batches, float32 [1] by layer name: x_scale = max|x| / 127.

    Raises:
        ValueError: no batches; a layer that no batch reaches; an input that is not finite.
    """
    maxima: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, mask: Tensor | None) -> None:
        rows = _samples(x, mask)
        if rows.numel():
            found = rows.abs().amax().float().reshape(1)
            maxima[name] = found.maximum(maxima[name]) if name in maxima else found

    _observe(model, layers, list(batches), forward, visit)
    _require_reached(layers, maxima)
    for name, value in maxima.items():
        _require_finite(name, value)
    return maxima


def collect_sensitivities(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Mean over the batches of (d loss / d weight)**2 of every layer: float32, shape of its weight, by layer name.

    With ``loss(model, batch)`` a negative log-likelihood and one sample per batch this is the diagonal of the
    empirical Fisher information, by which SqueezeLLM weighs each weight's error (Kim et al., arXiv 2306.07629).
    ``requires_grad`` and ``grad`` of the parameters stay as they are.

    Raises:
        ValueError: no batches; a layer whose weight the loss does not depend on; a gradient that is not finite.
    """
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    sums: dict[str, Tensor] = {}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    count = 0
    with _evaluating(model), torch.enable_grad():
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in batches:
                count += 1
                value = loss(model, batch)
                if not value.requires_grad:
                    break
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        square = gradient.float().square()
                        sums[name] = square if name not in sums else sums[name].add_(square)
        finally:
            for parameter, before in required.items():
                parameter.requires_grad_(before)
    _require_batches(count)
    missing = sorted(set(weights) - set(sums))
    if missing:
        raise ValueError(f"the loss must depend on every layer's weight: it does not on {', '.join(missing)}")
    for name, total in sums.items():
        if not bool(torch.isfinite(total.div_(count)).all()):
            raise ValueError(f"the gradient of layer {name} must be finite: got Inf or NaN")
    return {name: sums[name] for name in weights}


def calibrate_sequential(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    quantize_layer: Callable[[str, nn.Module, Tensor], None],
    *,
    forward: Forward | None = None,
    memory: int = 1 << 30,
) -> None:
    """Call ``quantize_layer(name, layer, hessian)`` in execution order, on the model as it is by then.

    ``quantize_layer`` changes the layer's weight, or swaps the module in the model. A pass over the batches measures
    as many layers as have Hessians of ``memory`` bytes together (at least the layers of one input), so these are
    fitted to the quantized layers of all passes before theirs. A small model takes one pass; ``memory=0`` makes a
    pass per input, so that every layer is fitted to what its quantized predecessors feed it (on trained models this
    helped at 2 bits and made no difference from 3 bits on). Raises as :func:`collect_hessians`.
    """
    batches = list(batches)
    groups = _trace(model, layers, batches, forward)
    while groups:
        count = 1
        while count < len(groups) and sum(4 * group.width**2 for group in groups[: count + 1]) <= memory:
            count += 1
        measured, groups = groups[:count], groups[count:]
        hessians = _hessians(model, layers, measured, batches, forward)
        for name in (name for group in measured for name in group.names):
            quantize_layer(name, layers[name], hessians[name])


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a mapping as keyword arguments, a tuple or list as positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@dataclass
class _Group:
    """Layers that see the very same input tensors [..., width], and how often one forward calls each of them."""

    names: list[str]
    calls: int
    width: int


class _Reached(Exception):
    """Ends a forward whose remaining layers are of no interest."""


def _trace(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], forward: Forward | None
) -> list[_Group]:
    """The groups in execution order, as the first batch shows them; layers it does not reach come last."""
    inputs: dict[str, list[int]] = {name: [] for name in layers}
    width: dict[str, int] = {}
    last: Tensor | None = None  # kept alive, so that `is` never meets a recycled object
    version = serial = 0

    def visit(name: str, x: Tensor, mask: Tensor | None) -> None:
        nonlocal last, version, serial
        if x is not last or x._version != version:
            last, version, serial = x, x._version, serial + 1
        inputs[name].append(serial)
        width[name] = x.shape[-1]

    _observe(model, layers, batches[:1], forward, visit)
    groups: dict[tuple[int, ...], _Group] = {}
    for name in sorted((n for n in inputs if inputs[n]), key=lambda n: inputs[n]):
        groups.setdefault(tuple(inputs[name]), _Group([], len(inputs[name]), width[name])).names.append(name)
    return [*groups.values(), *(_Group([name], 0, 0) for name in inputs if not inputs[name])]


def _hessians(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    groups: Sequence[_Group],
    batches: Sequence[Any],
    forward: Forward | None,
) -> dict[str, Tensor]:
    """Collected at the first layer of every group."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    one_call = len(groups) == 1 and groups[0].calls == 1

    def visit(name: str, x: Tensor, mask: Tensor | None) -> None:
        rows = _samples(x, mask).float()
        if name not in sums:
            sums[name], counts[name] = rows.new_zeros(rows.shape[1], rows.shape[1]), 0
        sums[name].addmm_(rows.t(), rows)
        counts[name] += rows.shape[0]
        if one_call:
            raise _Reached

    _observe(model, {group.names[0]: layers[group.names[0]] for group in groups}, batches, forward, visit)
    _require_reached([group.names[0] for group in groups], {name for name in counts if counts[name]})
    hessians: dict[str, Tensor] = {}
    for group in groups:
        name = group.names[0]
        hessian = sums[name].mul_(2 / counts[name])
        _require_finite(name, hessian)
        hessians.update(dict.fromkeys(group.names, hessian))
    return hessians


@torch.no_grad()
def _observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    forward: Forward | None,
    visit: _Visit,
) -> None:
    """Run the model over the batches and ``visit`` every call of a layer."""
    _require_batches(len(batches))
    mask: Tensor | None = None

    def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(name, args[0] if args else next(iter(kwargs.values())), mask)

    handles = [layer.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with _evaluating(model):
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                with suppress(_Reached):
                    call(model, batch) if forward is None else forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _samples(x: Tensor, mask: Tensor | None) -> Tensor:
    """The input as rows [n, K], without padding where the mask [B, T] fits it ([B, T, K] or [B*T, K])."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or mask.dim() != 2:
        return rows
    same = x.shape[:2] == mask.shape if x.dim() == 3 else x.dim() == 2 and len(rows) == mask.numel()
    return rows[mask.to(rows.device).bool().flatten()] if same else rows


def _require_batches(count: int) -> None:
    if not count:
        raise ValueError("calibration requires at least one batch: got none")


def _require_reached(names: Iterable[str], reached: Iterable[str]) -> None:
    missing = sorted(set(names) - set(reached))
    if missing:
        raise ValueError(f"calibration must call every layer that it quantizes: no batch reaches {', '.join(missing)}")


def _require_finite(name: str, statistic: Tensor) -> None:
    if not bool(torch.isfinite(statistic).all()):
        raise ValueError(f"the calibration input of layer {name} must be finite: got Inf or NaN")
