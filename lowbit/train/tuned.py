"""The quantizers ``tuned``: rounding that is learned where a model is converted, by :func:`lowbit.train.tune`."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import nn

from lowbit.codebook.quantize import LeastSquares
from lowbit.core.quantizer import register
from lowbit.packed.quantize import Descent
from lowbit.train.tune import tune

_WHOLE = 1 << 27  # weights; a larger model learns block by block


class _Tuned:
    """What :func:`tune` does with the layers that another quantizer made.

        lowbit.register_quantizer(train.TunedPacked("long", steps=1000))
        lowbit.convert(model, lowbit.Packed(bits=2, quantizer="long"), calibration=batches)

    ``by=None``: the whole model at once up to 2**27 weights, larger ones by block. Other arguments: those of
    :func:`tune`.
    """

    together = True
    correction = 0.0  # learning makes up for the drift; it came further from codes of the float weight itself

    def __init__(
        self, name: str = "tuned", *, by: Literal["model", "block"] | None = None, steps: int = 200, batch: int = 4,
        lr: float | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.name, self.by = name, by
        self.arguments: dict[str, Any] = {"steps": steps, "batch": batch, "lr": lr, "seed": seed}

    def finish(self, model: nn.Module, reference: nn.Module, names: list[str], batches: list[Any]) -> dict[str, str]:
        by = self.by or ("model" if sum(p.numel() for p in reference.parameters()) <= _WHOLE else "block")
        try:
            found = tune(model, reference, batches, by=by, only=names, **self.arguments)
        except (ValueError, FloatingPointError) as error:
            warnings.warn(f"quantizer={self.name!r} leaves layers as they were before learning: {error}", stacklevel=2)
            return dict.fromkeys(names, str(error))
        left = {name: reason for name, reason in found.left.items() if name in names}
        return left if found.kept else dict.fromkeys(names, "it was no better on held-out batches")


class TunedPacked(_Tuned, Descent):
    """``Packed(quantizer="tuned")``: what ``descent`` finds without a correction, then learned rounding."""


class TunedCodebook(_Tuned, LeastSquares):
    """``Codebook(quantizer="tuned")``: what ``lnq`` finds without a correction, then learned rounding."""


register(TunedPacked())
register(TunedCodebook())
