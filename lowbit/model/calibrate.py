"""Statistics on calibration data: Hessians of layer inputs for error-compensating quantizers, their maxima for
static int8 scales, squared weight gradients, and the loop that quantizes a model in execution order.

A batch is what the model is called with: a mapping (keyword arguments), a tuple or list (positional ones) or
a single argument; ``forward(model, batch)`` replaces that call. Where a batch is a mapping with an
``attention_mask`` [B, T], its padding positions do not count. The model runs in eval mode, and without
gradients where none are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.nn.experts import FloatExperts

__all__ = ["Expert", "calibrate_sequential", "collect_hessians", "collect_input_maxima", "collect_sensitivities"]

# Float32 Hessians held at a time; more of them need fewer passes over the batches.
_HESSIANS_AT_ONCE = 1 << 30

# Fewer tokens than this say nothing of the inputs of an expert.
FEW_TOKENS = 8

Forward = Callable[[nn.Module, Any], Any]
_Visit = Callable[[str, Tensor, "Tensor | None"], None]  # layer name, its input [..., K], padding mask


@dataclass(frozen=True)
class Expert:
    """One expert of a stack, a module that is called with ``(x, ids)``: its inputs are the rows routed to it."""

    stack: nn.Module
    index: int


_Layers = Mapping[str, "nn.Module | Expert"]


def collect_hessians(
    model: nn.Module,
    layers: _Layers,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """H = 2/n X.T X of every layer's input X [n, K] over all batches: float32 [K, K] by layer name.

    Its diagonal is raised by K/n times its mean, which tends to 0 with more data: a covariance of few samples is far
    from that of the inputs (Ledoit and Wolf, 2004), and error feedback from it does harm. Measured on the
    layers of a trained Llama, rounding with it was better than without calibration from n = 8 on, on average; with the
    plain covariance it was worse up to n = 2 K.

    Layers that see the very same input share one tensor. An expert that fewer than ``FEW_TOKENS`` rows reach has none.
    Costs one pass over the batches, the first twice.

    Raises:
        ValueError: no batches; a layer that no batch reaches; an input that is not finite.
    """
    batches = list(batches)
    return hessians_of(model, layers, trace(model, layers, batches, forward), batches, forward)


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
        rows = samples(x, mask)
        if rows.numel():
            found = rows.abs().amax().float().reshape(1)
            _require_finite(name, found)
            maxima[name] = found.maximum(maxima[name]) if name in maxima else found

    observe(model, layers, list(batches), forward, visit)
    require_reached(layers, maxima)
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
    sums: dict[str, SumOfSquares] = {}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    count = 0
    with evaluating(model), torch.enable_grad():
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for i, batch in enumerate(batches):
                count += 1
                with _naming(model, i, batch):
                    value = loss(model, batch)
                    if not isinstance(value, Tensor) or value.numel() != 1:
                        raise ValueError(f"loss must return a scalar tensor: got {describe_batch(value)}")
                    if not value.requires_grad:
                        break
                    gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                    for name, gradient in zip(weights, gradients, strict=True):
                        if gradient is not None and not sums.setdefault(name, SumOfSquares()).add(gradient.float()):
                            raise ValueError(f"the gradient of layer {name} must be finite: got Inf or NaN")
        finally:
            for parameter, before in required.items():
                parameter.requires_grad_(before)
    _require_batches(count)
    missing = sorted(set(weights) - set(sums))
    if missing:
        raise ValueError(f"the loss must depend on every layer's weight: it does not on {', '.join(missing)}")
    return {name: sums[name].total().div_(count) for name in weights}


def calibrate_sequential(
    model: nn.Module,
    layers: _Layers,
    batches: Iterable[Any],
    quantize_layer: Callable[[str, Any, Any], None],
    *,
    forward: Forward | None = None,
    memory: int = 1 << 30,
) -> None:
    """Call ``quantize_layer(name, layer, hessian)`` in execution order, on the model as it is by then.

    ``quantize_layer`` changes the layer's weight, or swaps the module in the model. The Hessian is ``None`` for an
    expert that fewer than ``FEW_TOKENS`` rows reach. A pass over the batches measures
    as many layers as have Hessians of ``memory`` bytes together (at least the layers of one input), so these are
    fitted to the quantized layers of all passes before theirs. A small model takes one pass; ``memory=0`` makes a
    pass per input, so that every layer is fitted to what its quantized predecessors feed it (on trained models this
    helped at 2 bits and made no difference from 3 bits on). Raises as :func:`collect_hessians`.
    """
    batches = list(batches)
    groups = trace(model, layers, batches, forward)
    while groups:
        count = 1
        while count < len(groups) and sum(4 * group.width**2 for group in groups[: count + 1]) <= memory:
            count += 1
        measured, groups = groups[:count], groups[count:]
        hessians = hessians_of(model, layers, measured, batches, forward)
        for name in (name for group in measured for name in group.names):
            quantize_layer(name, layers[name], hessians.get(name))


def same_input(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[list[str]]:
    """The names of layers, those together that see the very same input tensor; as the first batch shows it."""
    return [group.names for group in trace(model, layers, list(batches), None)]


def batches_of(given: Any, argument: str = "calibration") -> list[Any]:
    """The batches of an argument as a list; raises ``TypeError`` for what is one batch, or text."""
    what = type(given).__name__
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{argument} must be a list of batches for the model: got a text, {given!r:.60}")
    if isinstance(given, (Tensor, Mapping)) or hasattr(given, "__array__"):
        described = describe_batch(given)
        raise TypeError(f"{argument} must be a list of batches: got one batch, {described}; wrap it in a list")
    if isinstance(given, nn.Module) or not hasattr(given, "__iter__"):
        raise TypeError(f"{argument} must be a list of batches for the model: got {what}")
    batches = list(given)
    for i, batch in enumerate(batches):
        if isinstance(batch, (str, bytes)) or (isinstance(batch, (list, tuple)) and batch
                                               and all(isinstance(part, str) for part in batch)):  # fmt: skip
            raise TypeError(f"{argument} must hold batches for the model, not texts: batch {i} is {batch!r:.60}; "
                            "give what the tokenizer makes of it")  # fmt: skip
    return batches


def describe_batch(batch: Any) -> str:
    """Its type and the shapes in it: ``Tensor [2, 5]``, ``dict {input_ids: Tensor [2, 5]}``."""
    if isinstance(batch, Tensor):
        return f"{type(batch).__name__} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} {{{', '.join(f'{k}: {describe_batch(v)}' for k, v in batch.items())}}}"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(describe_batch(part) for part in list(batch)[:4])}"
    return f"{type(batch).__name__} {batch!r:.40}"


@contextmanager
def _naming(model: nn.Module, index: int, batch: Any) -> Iterator[None]:
    """An exception inside says which batch it was, and the innermost module that was running."""
    try:
        yield
    except Reached:
        raise
    except Exception as error:
        if getattr(error, "_lowbit_named", False):
            raise
        names = {id(module): name for name, module in model.named_modules()}
        where, trace = "", error.__traceback__
        while trace is not None:
            where = names.get(id(trace.tb_frame.f_locals.get("self")), "") or where
            trace = trace.tb_next
        text = f"calibration batch {index} ({describe_batch(batch)})"
        text += f", in layer {where}" if where else ""
        text += f": {error}. Is calibration a list of batches that the model can be called with?"
        # of the same type, so that who expects it finds it
        kind = type(error) if type(error) in _PLAIN else RuntimeError
        named = kind(text)
        named._lowbit_named = True  # type: ignore[attr-defined]
        raise named from error


_PLAIN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a mapping as keyword arguments, a tuple or list as positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@dataclass
class Group:
    """Layers that see the very same input tensors [..., width], and how often one forward calls each of them."""

    names: list[str]
    calls: int
    width: int


class Reached(Exception):
    """Ends a forward whose remaining layers are of no interest."""


def trace(
    model: nn.Module, layers: _Layers, batches: Sequence[Any], forward: Forward | None
) -> list[Group]:
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

    observe(model, layers, batches[:1], forward, visit)
    groups: dict[tuple[int, ...], Group] = {}
    for name in sorted((n for n in inputs if inputs[n]), key=lambda n: inputs[n]):
        groups.setdefault(tuple(inputs[name]), Group([], len(inputs[name]), width[name])).names.append(name)
    return [*groups.values(), *(Group([name], 0, 0) for name in inputs if not inputs[name])]


class SumOfSquares:
    """A float32 sum of ``x.square()``, or of ``x.T @ x``; in a ``unit``, a power of 4, where some x is beyond 2**30.

    Such squares would overflow, and most of what is made of the sums does not depend on their unit.
    """

    def __init__(self, products: bool = False) -> None:
        self._products, self._shift = products, 0
        self._sum: Tensor | None = None

    @property
    def unit(self) -> float:
        return 4.0**self._shift

    def add(self, x: Tensor, left: Tensor | None = None) -> bool:
        """Add ``x``, float32; of products ``left.T @ x``. ``False`` where they are not finite."""
        if self._sum is None:
            self._sum = x.new_zeros((x.shape[1], x.shape[1]) if self._products else x.shape)
        ends = [end for t in (x, left) if t is not None and t.numel() for end in torch.aminmax(t)]
        peak = max((abs(float(end)) for end in ends), default=0.0)
        if not math.isfinite(peak):
            return False
        needed = max(0, math.frexp(peak)[1] - 30)
        if needed > self._shift:
            self._sum.mul_(4.0 ** (self._shift - needed))
            self._shift = needed
        if self._shift:
            x, left = x * 2.0**-self._shift, None if left is None else left * 2.0**-self._shift
        if self._products:
            self._sum.addmm_((x if left is None else left).t(), x)
        else:
            self._sum.add_(x.square())
        return True

    def total(self) -> Tensor:
        assert self._sum is not None
        return self._sum


def hessians_of(
    model: nn.Module,
    layers: _Layers,
    groups: Sequence[Group],
    batches: Sequence[Any],
    forward: Forward | None,
) -> dict[str, Tensor]:
    """Collected at the first layer of every group."""
    sums: dict[str, SumOfSquares] = {}
    counts: dict[str, int] = {}
    first = {group.names[0]: layers[group.names[0]] for group in groups}
    one_call = all(group.calls == 1 for group in groups) and len({id(_module(layer)) for layer in first.values()}) == 1
    last = next(reversed(first), None)

    def visit(name: str, x: Tensor, mask: Tensor | None) -> None:
        rows = samples(x, mask).float()
        if not sums.setdefault(name, SumOfSquares(products=True)).add(rows):
            raise ValueError(not_finite(name))
        counts[name] = counts.get(name, 0) + rows.shape[0]
        if one_call and name == last:
            raise Reached

    observe(model, first, batches, forward, visit)
    require_reached(first, {n for n, count in counts.items() if count or isinstance(first[n], Expert)})
    hessians: dict[str, Tensor] = {}
    for group in groups:
        name = group.names[0]
        if isinstance(first[name], Expert) and counts[name] < FEW_TOKENS:
            continue
        hessians.update(dict.fromkeys(group.names, hessian_of(sums[name].total(), counts[name])))
    return hessians


def hessian_of(squares: Tensor, count: int) -> Tensor:
    """What :func:`collect_hessians` makes of the sum ``X.T X`` of ``count`` rows; in place."""
    squares.mul_(2 / count)
    squares.diagonal().add_(len(squares) / count * squares.diagonal().mean())
    return squares


@torch.no_grad()
def observe(
    model: nn.Module,
    layers: _Layers,
    batches: Sequence[Any],
    forward: Forward | None,
    visit: _Visit,
) -> None:
    """Run the model over the batches and ``visit`` every call of a layer."""
    _require_batches(len(batches))
    mask: Tensor | None = None

    def see(names: Sequence[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        width = _width(module)
        if not isinstance(x, Tensor) or not x.dim() or (width is not None and x.shape[-1] != width):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"layer {names[0]} takes inputs [..., {width if width is not None else 'K'}]: got {got}")
        rows = mask if getattr(module, "by_token", True) else None  # of a stack
        for name in names:
            layer = layers[name]
            if isinstance(layer, Expert):
                visit(name, _routed(x, args[1], layer.index, rows), None)
            elif isinstance(module, FloatExperts):
                visit(name, x[_is_token(len(x), rows, x.device)], None)
            else:
                visit(name, x, mask)

    called: dict[nn.Module, list[str]] = {}
    for name, layer in layers.items():
        called.setdefault(_module(layer), []).append(name)
    handles: list[RemovableHandle] = []
    try:
        for module, names in called.items():
            handles.append(module.register_forward_pre_hook(partial(see, names), with_kwargs=True))
        with evaluating(model):
            for i, batch in enumerate(batches):
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                with suppress(Reached), _naming(model, i, batch):
                    call(model, batch) if forward is None else forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _module(layer: nn.Module | Expert) -> nn.Module:
    """What is called."""
    return layer.stack if isinstance(layer, Expert) else layer


def _routed(x: Tensor, ids: Tensor, index: int, mask: Tensor | None) -> Tensor:
    """The rows of x that go to expert ``index``, without those of padding; x[i] goes to r experts, which follow."""
    chosen = (ids == index) & _is_token(len(ids), mask, ids.device)
    return x.detach()[chosen.nonzero()[:, 0] // max(1, len(ids) // max(1, len(x)))]


def _is_token(rows: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """bool ``[rows]``: which rows are not of padding, where each token of the mask has the same number of rows."""
    if mask is None or mask.dim() != 2 or not mask.numel() or rows % mask.numel():
        return torch.ones(rows, dtype=torch.bool, device=device)
    return mask.to(device).bool().flatten().repeat_interleave(rows // mask.numel())


def _width(layer: nn.Module) -> int | None:
    """K of a linear layer; ``None`` where it does not say."""
    width = getattr(layer, "in_features", None)
    if width is None and isinstance(getattr(layer, "nf", None), int):  # transformers' Conv1D
        width = layer.get_parameter("weight").shape[0]
    return width if isinstance(width, int) else None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def samples(x: Tensor, mask: Tensor | None) -> Tensor:
    """The input as rows [n, K], without padding where the mask [B, T] fits it ([B, T, K] or [B*T, K])."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or mask.dim() != 2:
        return rows
    same = x.shape[:2] == mask.shape if x.dim() == 3 else x.dim() == 2 and len(rows) == mask.numel()
    return rows[mask.to(rows.device).bool().flatten()] if same else rows


def _require_batches(count: int) -> None:
    if not count:
        raise ValueError("calibration requires at least one batch: got none")


def require_reached(names: Iterable[str], reached: Iterable[str]) -> None:
    missing = sorted(set(names) - set(reached))
    if missing:
        raise ValueError(f"calibration must call every layer that it quantizes: no batch reaches {', '.join(missing)}")


def _require_finite(name: str, statistic: Tensor) -> None:
    if not bool(torch.isfinite(statistic).all()):
        raise ValueError(not_finite(name))


def not_finite(name: str) -> str:
    return f"the calibration input of layer {name} must be finite: got Inf or NaN"
