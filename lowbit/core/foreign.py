"""What tensors are called in the quantized formats of other libraries: in their files, and on their modules."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """A kind of names.

    Attributes:
        names: a pattern of the last part of a tensor's name, all of it.
        format: whose tensor that is; empty where several formats have it.
        alone: whether the name is enough: no module with a float weight has such a tensor.
    """

    names: str
    format: str
    alone: bool = True


# The first that fits counts.
SIGNS = (
    Sign("q_?weight|qzeros", "GPTQ or AWQ"),
    Sign("g_idx", "GPTQ or AWQ", alone=False),
    Sign("weight_packed|weight_zero_points?|weight_global_scale", "compressed-tensors"),
    Sign("weight_shape|weight_g_idx", "compressed-tensors", alone=False),
    Sign(".*_scale_inv", "FP8 in blocks"),
    Sign(".*scale_inv", "FP8 in blocks", alone=False),
    Sign("weight_blocks", "MXFP4"),
    Sign(".*_(blocks|scales)", "MXFP4", alone=False),
    Sign("quant_map|quant_state", "bitsandbytes, 4 bits"),
    Sign(".*(absmax|quant_map|quant_state|bitsandbytes).*", "bitsandbytes, 4 bits", alone=False),
    Sign("SCB|weight_scb", "bitsandbytes, 8 bits"),
    Sign("weight_format", "bitsandbytes, 8 bits", alone=False),
    Sign(".*qdata.*", "torchao", alone=False),
    Sign("_packed_params", "torch.ao"),
    Sign("W_q", "HQQ"),
    Sign("_(data|scale|shift)", "quanto", alone=False),
    Sign("code(book)?s", "AQLM", alone=False),
    Sign("trellis|suh|svh", "EXL3 or QTIP"),
    Sign("(res_)?centroids|(res_|outlier_)?indices", "VPTQ", alone=False),
    Sign(".*scale.*|.*zero_?(point)?s?|.*amax.*", "", alone=False),
)


def _sign(name: str) -> Sign | None:
    return next((sign for sign in SIGNS if re.fullmatch(sign.names, name)), None)


def sign_of(name: str) -> str | None:
    """Whose quantized tensors are called ``name``: a format, ``""`` where several do, ``None`` where none does."""
    sign = _sign(name)
    return None if sign is None else sign.format


def is_foreign(name: str) -> bool:
    """Whether a module that has a tensor ``name`` was quantized by another library."""
    sign = _sign(name)
    return sign is not None and sign.alone
