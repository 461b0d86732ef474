"""What each candidate of each layer costs the model: estimated from gradients, or measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.model.candidates import Swap
from lowbit.nn.layer import Layer, storage_of
from lowbit.quality.distance import Distance
from lowbit.quality.trial import Trial

PROBES = 256  # gradients that scores are means of
_KEPT = 1 << 30  # bytes of changes of weights that are held


def gradient_problem(swaps: dict[str, Swap], choices: list[list[dict[str, Layer]]]) -> str | None:
    """Why these layers cannot be scored by gradients, or ``None``; ``swaps``: by name of layer."""
    for group in choices[0]:
        for name in group:
            weight = swaps[name].module._parameters.get("weight")
            if swaps[name].kind == "experts" or weight is None or not weight.is_floating_point():
                return f"layer {name} has no weight [N, K] with a gradient"
    return None


def by_gradient(
    model: nn.Module, swaps: dict[str, Swap], choices: list[list[dict[str, Layer]]], distance: Distance, seed: int = 0
) -> Tensor:
    """``[G, C]``: the distance from ``model``, to second order in the change of the weights of a group.

        score[g, c] = mean of <G, W_c - W>**2 over gradients G of lowbit.model.outputs.probes

    Costs about as much as :data:`PROBES` backward passes of a batch, and one more float model of memory. Activations
    that a candidate rounds are not seen.

    Raises ``ValueError`` where the outputs do not depend on the weights differentiably.
    """
    names = [first_names(group) for group in choices[0]]
    group_of = {name: g for g, of in enumerate(names) for name in of}
    weights: dict[str, nn.Parameter] = {name: swaps[name].module.get_parameter("weight") for name in group_of}
    needed = {name: weight.requires_grad for name, weight in weights.items()}
    changes = _Changes(swaps, choices, group_of)
    each = -(-PROBES // len(distance.batches))
    total = torch.zeros(len(names), len(choices), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with tqdm(total=each * len(distance.batches), desc="lowbit plan", unit="gradient", disable=None) as progress:
            for index in range(len(distance.batches)):
                with torch.enable_grad():
                    outputs = distance.probes(model, index, each, generator)
                if not outputs[0].requires_grad:
                    raise ValueError("signal='gradient' requires outputs that depend on the weights differentiably")
                for i, output in enumerate(outputs):
                    gradients = torch.autograd.grad(
                        output, list(weights.values()), retain_graph=i + 1 < each, allow_unused=True
                    )
                    sums = torch.zeros_like(total)
                    for (name, g), gradient in zip(group_of.items(), gradients, strict=True):
                        if gradient is not None:
                            sums[g] += changes.times(name, gradient).cpu()
                    total += sums.square()
                    progress.update()
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(needed[name])
    return total / (each * len(distance.batches))


class _Changes:
    """W_c - W of every candidate; kept where that is little."""

    def __init__(
        self, swaps: dict[str, Swap], choices: list[list[dict[str, Layer]]], group_of: dict[str, int]
    ) -> None:
        self.swaps, self.choices, self.group_of = swaps, choices, group_of
        elements = sum(swaps[name].module.get_parameter("weight").numel() for name in group_of)
        self._known: dict[str, Tensor] | None = {} if 4 * elements * len(choices) <= _KEPT else None

    def times(self, name: str, gradient: Tensor) -> Tensor:
        """<G, W_c - W> of each candidate c: float64 ``[C]``."""
        wide = (gradient.t() if self.swaps[name].transposed else gradient).float()
        if self._known is not None:
            if name not in self._known:
                self._known[name] = torch.stack([self._of(name, c).flatten() for c in range(len(self.choices))])
            return (self._known[name] @ wide.flatten()).double()
        return torch.stack([torch.sum(self._of(name, c) * wide) for c in range(len(self.choices))]).double()

    def _of(self, name: str, candidate: int) -> Tensor:
        return self.choices[candidate][self.group_of[name]][name].dequantize(torch.float32) - self.swaps[name].weight()


def by_distance(trial: Trial) -> Tensor:
    """``[G, C]``: the distance when one group alone is as the candidate has it; a pass over the batches for each."""
    groups, count = len(trial.originals), len(trial.choices)
    scores = torch.zeros(groups, count, dtype=torch.float64)
    with tqdm(total=scores.numel(), desc="lowbit plan", unit="layer", disable=None) as progress:
        for g in range(groups):
            for c in range(count):
                scores[g, c] = trial([c if other == g else None for other in range(groups)])
                progress.update()
    return scores.clamp(min=0)


def first_names(group: dict[str, Layer]) -> list[str]:
    """One name for each weight: a pattern of a second one would decide nothing."""
    found: dict[tuple[int, ...], str] = {}
    for name, layer in group.items():
        found.setdefault(storage_of(layer), name)
    return list(found.values())
