"""What :func:`~lowbit.train.recover` and :func:`~lowbit.train.tune` have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HELD_OUT = 8  # one batch of so many is not learned from


def check_numbers(batches: list[Any], *, steps: int, batch: int, lr: float) -> None:
    """Raise ``ValueError`` for what cannot be learned with."""
    for argument, value, least in (("steps", steps, 1), ("batch", batch, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{argument} must be an integer of at least {least}: got {argument}={value!r}")
    if not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be greater than 0 and finite: got lr={lr!r}")
    if not batches:
        raise ValueError("calibration must hold at least one batch: got none")


def split(count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """(batches that are learned from, one of eight that is held out); of less than four batches all are both."""
    order = torch.randperm(count, generator=generator).tolist()
    apart = max(1, count // _HELD_OUT) if count > 3 else 0
    return order[apart:], order[:apart] or order


def finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} in step {step}: a smaller lr may help")
    return value


@torch.no_grad()
def mean(measure: Callable[[int], Tensor], batches: list[int]) -> float:
    """Of a loss over batches."""
    return sum(float(measure(i)) for i in batches) / len(batches)


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No Parameter of now requires a gradient inside the block."""
    required = {parameter: parameter.requires_grad for model in models for parameter in model.parameters()}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in required.items():
            parameter.requires_grad_(before)


class Draws:
    """Gradients of the mean loss of ``count`` batches, drawn anew from ``generator`` once all were taken."""

    def __init__(self, batches: list[int], count: int, generator: torch.Generator) -> None:
        self._batches, self._count, self._generator = batches, count, generator
        self._order: list[int] = []

    def state(self) -> dict[str, Tensor]:
        """What comes next, as tensors; :meth:`go_on` takes them."""
        return {"order": torch.tensor(self._order, dtype=torch.int64), "generator": self._generator.get_state()}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        self._order = state["order"].tolist()
        self._generator.set_state(state["generator"])

    @torch.enable_grad()
    def backward(self, measure: Callable[[int], Tensor], step: int) -> None:
        for _ in range(self._count):
            self._order = self._order or torch.randperm(len(self._batches), generator=self._generator).tolist()
            value = measure(self._batches[self._order.pop()]) / self._count
            finite(float(value.detach()), step)
            value.backward()


def state(learned: list[nn.Parameter], optimizer: torch.optim.Optimizer, draws: Draws) -> dict[str, Tensor]:
    """All that the next step depends on; :func:`go_on` takes it."""
    found: dict[str, Tensor] = {f"learned:{i}": parameter for i, parameter in enumerate(learned)}
    found |= {f"draws:{name}": tensor for name, tensor in draws.state().items()}
    moments = optimizer.state_dict()["state"]
    return found | {f"moments:{i}:{name}": tensor for i, each in moments.items() for name, tensor in each.items()}


@torch.no_grad()
def go_on(
    learned: list[nn.Parameter], optimizer: torch.optim.Optimizer, draws: Draws, tensors: Mapping[str, Tensor]
) -> None:
    for i, parameter in enumerate(learned):
        parameter.copy_(tensors[f"learned:{i}"])
    draws.go_on({name: tensors[f"draws:{name}"] for name in draws.state()})
    before = optimizer.state_dict()
    for key, tensor in tensors.items():
        kind, *names = key.split(":")
        if kind == "moments":
            before["state"].setdefault(int(names[0]), {})[names[1]] = tensor
    optimizer.load_state_dict(before)
