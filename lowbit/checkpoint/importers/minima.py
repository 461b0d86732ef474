"""Weights that are stored with a minimum, ``scale * q - minimum``, as ``(q - zero) * scale`` with a float zero.

    zero = fl(minimum / scale);    where the scale is 0, all weights of the group are (0 - 1) * minimum, exactly

Both are the same number, rounded at another place: ``|difference| <= 2**-24 * (|minimum| + 3 * |w|)`` in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_zeros(codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros, of codes with ``len(scale.flatten())`` groups in a row, and float32 ``[..., G]``."""
    constant = scale == 0
    if not bool(constant.any()):
        return codes, scale, minimum / scale
    zero = torch.where(constant, 1.0, minimum / torch.where(constant, 1.0, scale))
    grouped = codes.view(*scale.shape, -1)
    return torch.where(constant[..., None], 0, grouped).view(codes.shape), torch.where(constant, minimum, scale), zero
