"""One share of a linear layer, for tensor parallelism: some of its output features, or some of its input features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.core.bitpack import bytes_per_row, pack, pack_bytes, unpack, unpack_bytes
from lowbit.core.family import MAX_INT16_COLUMNS
from lowbit.core.outliers import column_indices
from lowbit.nn.coded import CodedLayer
from lowbit.nn.linear import LinearLayer
from lowbit.nn.rows import cut_rows

OUTPUT, INPUT = 0, 1  # the dimension of W [N, K] that is cut


@torch.no_grad()
def shard(layer: LinearLayer, dim: int, index: int, count: int) -> None:
    """Leave in ``layer`` the share ``index`` of ``count``, cut as ``torch.chunk`` cuts W ``[N, K]`` along ``dim``.

    The codes stay what they are. Cut along :data:`OUTPUT` the layer gives its share of y; along :data:`INPUT` it takes
    its share of x and gives a summand of y, without the bias, which the caller adds once. ``activations="int8"`` then
    takes its scales from that share of x. ``in_features`` and ``out_features`` stay those of the whole.

    Raises ``ValueError``, naming the layer: a form that cannot be cut (Kronecker factors, nested scales); groups that a
    cut would divide; a share without features.
    """
    format: Any = layer.format
    size = (format.out_features, format.in_features)[dim]
    step = -(-size // count)
    share = slice(index * step, min((index + 1) * step, size))
    problem = shard_problem(format, isinstance(layer, CodedLayer), dim, index, count)
    if problem is not None:
        raise ValueError(f"{layer.title()}: cannot be split over {count} devices: {problem}")
    whole = layer.out_features, layer.in_features
    tensors = layer.canonical()
    cut = (cut_rows if dim == OUTPUT else _columns)(tensors, format, share)
    fields = {"out_features" if dim == OUTPUT else "in_features": share.stop - share.start}
    if dim == INPUT and format.group_size == size:
        fields["group_size"] = share.stop - share.start
    elif dim == INPUT and getattr(format, "scale_block", None):
        fields["scale_block"] = min(format.scale_block, -(-(share.stop - share.start) // format.group_size))
    if dim == INPUT and getattr(format, "packed_zeros", False):
        fields["packed_zeros"] = cut["zeros"].shape[1] < cut["scales"].shape[1]
    layer.become(replace(format, **fields, outliers=len(cut.get("outlier_values", ()))), cut)
    layer.whole = whole


def shard_problem(format: Any, coded: bool, dim: int, index: int, count: int) -> str | None:
    """Why :func:`shard` cannot cut a layer of this format, whose class is a :class:`CodedLayer` where ``coded``;
    ``None``: it can."""
    size = (format.out_features, format.in_features)[dim]
    step = -(-size // count)
    if not coded or getattr(format, "scales", None) == "nested":
        return f"{format.describe()} cannot be cut"
    if index * step >= size:
        return f"{size} features leave nothing for share {index} of {count}"
    if dim == INPUT and getattr(format, "act_order", False):
        return "with act-order its columns are not in the order of the input features"
    if dim == INPUT and format.group_size < size and step % format.group_size:
        return f"group_size={format.group_size} must divide the {step} input features of a share"
    several = getattr(format, "scale_block", None) and format.scale_block < format.groups  # factors in a row
    if dim == INPUT and several and format.group_size < size:
        columns = format.scale_block * format.group_size  # that share a factor
        if step % columns and step < size:
            return f"{columns} columns that share a factor of their scales must divide the {step} input features"
    return None


def _columns(tensors: dict[str, Tensor], format: Any, share: slice) -> dict[str, Tensor]:
    k, groups = format.in_features, -(-format.in_features // format.group_size)
    codes = unpack(tensors["packed"], format.bits, k)[:, share]
    cut = {**tensors, "packed": pack(codes.contiguous(), format.bits)}
    of_groups = slice(share.start // format.group_size, -(-share.stop // format.group_size))
    packed_zeros = getattr(format, "packed_zeros", False)
    if packed_zeros:
        cut["zeros"] = unpack_bytes(tensors["zeros"], format.bits, groups)
    for name in ("scales", "zeros", "codebook"):
        if groups > 1 and name in tensors and cut[name].shape[1] == groups:
            cut[name] = cut[name][:, of_groups]
    if packed_zeros and bytes_per_row(count := cut["zeros"].shape[1], format.bits) < count:
        cut["zeros"] = pack_bytes(cut["zeros"], format.bits)
    for name in ("scale_factors", "zero_factors"):
        if groups > 1 and name in tensors:
            blocks = slice(of_groups.start // format.scale_block, -(-of_groups.stop // format.scale_block))
            cut[name] = tensors[name][:, blocks]
    if "outlier_rows" in tensors:
        columns, ends = column_indices(tensors["outlier_columns"]), tensors["outlier_rows"]
        inside = (columns >= share.start) & (columns < share.stop)
        cut["outlier_values"] = tensors["outlier_values"][inside]
        kept = columns[inside] - share.start
        cut["outlier_columns"] = kept.to(torch.int16 if share.stop - share.start <= MAX_INT16_COLUMNS else torch.int32)
        before = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
        cut["outlier_rows"] = before[ends.to(torch.int64)].to(torch.int32)
    return cut
