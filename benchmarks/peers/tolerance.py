"""What is allowed to peers on a GPU."""

from __future__ import annotations

import torch

from lowbit.testing.numerics import frobenius_bound

# Peers add up in 16 bits, or round activations in ways that are not modelled here: this shows a weight that was given
# to them in the wrong form, and says nothing about their precision (which is in the rows).
WRONG = 10


def gpu_tolerance(k: int) -> float:
    return WRONG * frobenius_bound(torch.bfloat16, k)
