"""A weight that takes few values, read without loss: :func:`codebook_of`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.codebook.format import CodebookWeight
from lowbit.core.family import FLOAT_DTYPES, GRANULARITIES, Granularity, check_group_size, choice

_MOST_VALUES = 256


def codebook_of(
    weight: Tensor, granularity: Granularity = "tensor", *, group_size: int | None = None
) -> CodebookWeight:
    """The codebook form of a weight that is quantized in all but storage, such as k-means fake quantization.

        codebook[n, g, codes[n, k]] == weight[n, k]        bit for bit (a zero's sign aside)

    The tables hold the distinct values in rising order, in the weight's dtype; the bits are the fewest that index the
    longest one, and shorter tables repeat their last value.

    Args:
        weight: float32, float16 or bfloat16 ``[N, K]``.
        granularity: what shares one table: ``"tensor"``, ``"row"`` or ``"group"``.
        group_size: input features of a group, 1 to K; for ``"group"`` alone.

    Raises:
        ValueError: more than 256 distinct values share a table, or a value is not finite, or an argument is wrong.
    """
    choice("granularity", granularity, GRANULARITIES)
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in FLOAT_DTYPES.values():
        raise ValueError(
            f"weight must be a float32, float16 or bfloat16 tensor [N, K]: got {weight.dtype} {list(weight.shape)}"
        )
    if (granularity == "group") != (group_size is not None):
        raise ValueError(
            f"group_size goes with granularity='group': got group_size={group_size}, granularity={granularity!r}"
        )
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it holds NaN or infinity")
    n, k = weight.shape
    if granularity == "tensor":
        tables, codes = _tables(weight.reshape(1, n * k), granularity)
        return CodebookWeight(codes.view(n, k), tables.view(1, 1, -1))
    if group_size is None:
        tables, codes = _tables(weight, granularity)
        return CodebookWeight(codes, tables.view(n, 1, -1))
    check_group_size(group_size, k)
    groups = -(-k // group_size)
    # the last group may be shorter: a value that it holds adds none
    padded = F.pad(weight.unsqueeze(1), (0, groups * group_size - k), mode="replicate").view(-1, group_size)
    tables, codes = _tables(padded, granularity)
    return CodebookWeight(codes.view(n, -1)[:, :k].contiguous(), tables.view(n, groups, -1), group_size=group_size)


def _tables(blocks: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The distinct values of each row, padded to one power of two, and the uint8 index of each element in them."""
    ordered = blocks.sort(dim=1).values
    is_new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    place = is_new.cumsum(1)
    count = int(place.max()) + 1
    if count > _MOST_VALUES:
        raise ValueError(f"weight must take at most {_MOST_VALUES} distinct values per {granularity}: got {count}")
    bits = max(1, (count - 1).bit_length())
    tables = ordered[:, -1:].repeat(1, 1 << bits).scatter_(1, place, ordered)
    return tables, torch.searchsorted(tables, blocks.contiguous(), out_int32=True).to(torch.uint8)
