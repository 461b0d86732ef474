"""bitsandbytes' 4-bit modules (QLoRA, arXiv 2305.14314), read as they are.

A quantized ``weight`` holds one 4-bit code per value, the first of two in the high nibble, and the scales of blocks
that run over the flattened weight:

    w.flatten()[i] = code[codes[i]] * absmax[i // blocksize]

where ``absmax`` is float32, or nested: uint8 codes of a second table, in blocks of 256, plus an offset. bitsandbytes
is not imported here: its types are known by name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.codebook.format import NESTED_BLOCK, CodebookWeight
from lowbit.core.family import dtype_name
from lowbit.model.sources import Source, register_source_by_name

_MODULES = "bitsandbytes.nn.modules"
_SMALLEST_GROUP = 16  # below that float32 scales take more than two bits per weight
_CPU_ROWS = 32  # rows that the layout for its CPU kernel interleaves


def register() -> None:
    """Let :func:`lowbit.convert` read the 4-bit modules of bitsandbytes."""
    for name in ("Linear4bit", "LinearNF4", "LinearFP4", "Embedding4bit", "EmbeddingNF4", "EmbeddingFP4"):
        register_source_by_name(f"{_MODULES}.{name}", _recognise)


def _recognise(module: Any) -> Source | str:
    weight, is_embedding = module.weight, isinstance(module, nn.Embedding)
    state = getattr(weight, "quant_state", None)
    if state is None:  # FSDP makes a plain Parameter of the weight
        state = getattr(module, "quant_state", None)
    if state is None:
        return "its weight is not quantized yet: bitsandbytes does that when the model is moved, .to('cpu') for example"
    if weight.is_meta:
        raise ValueError("its weight must hold values: it is on the meta device")
    rows, columns = ("num_embeddings", "embedding_dim") if is_embedding else ("out_features", "in_features")
    n, k = getattr(module, rows), getattr(module, columns)
    if tuple(state.shape) != (n, k):
        raise ValueError(f"quant_state.shape must be [{rows}, {columns}] = [{n}, {k}]: got {list(state.shape)}")
    with torch.no_grad():
        return _read(module, weight.detach().as_subclass(Tensor), state, n, k, is_embedding)


def _read(module: Any, data: Tensor, state: Any, n: int, k: int, is_embedding: bool) -> Source | str:
    group_size = math.gcd(k, state.blocksize)
    if group_size < min(k, _SMALLEST_GROUP):
        return (
            f"its blocks of {state.blocksize} weights do not end with its rows of {k}: "
            f"one scale per {group_size} weights would be needed"
        )
    codes, absmax, notes = _codes(data, state, n, k), state.absmax, []
    if absmax.dim() == 2:  # the layout of its CPU kernel, [G, N]; leaving that layout does not turn it back
        absmax = absmax.t()
        notes.append("its scales were rounded to bfloat16 by bitsandbytes when it ran on a CPU")
    absmax = absmax.reshape(-1)
    blocks = -(-n * k // state.blocksize)
    if len(absmax) != blocks:
        raise ValueError(f"absmax must hold one scale per block of {state.blocksize}, {blocks}: got {len(absmax)}")
    scales = _scales(state, absmax)
    dtype = module.dtype if is_embedding else _dtype(state)
    weight = partial(_dequantized, codes, state.code, scales, state.blocksize, dtype)
    nested: dict[str, Tensor] = {}
    if state.nested and k % state.blocksize == 0 and _is_like_ours(state.state2):
        scales = absmax
        nested = {
            "scale_codebook": state.state2.code.clone(),  # one tensor serves all modules
            "scale_absmax": state.state2.absmax.clone(),
            "scale_offset": state.offset.float().reshape(1).clone(),
        }
    elif state.nested:
        notes.append("its nested scales are stored as float32")
    # a block may be several groups, and the last one end with the weight
    scales = scales.repeat_interleave(state.blocksize // group_size)[: n * k // group_size].view(n, -1)
    codebook = state.code.float().reshape(1, 1, -1).clone()
    stored = CodebookWeight(codes, codebook, scales, group_size, **nested)
    source = Source(stored, weight=weight)
    if is_embedding:
        return replace(source, kind="embedding", padding_idx=module.padding_idx, note="; ".join(notes) or None)
    compute = module.compute_dtype
    if compute is not None and compute != _dtype(state):
        notes.append(f"it computed in {dtype_name(compute)}: the packed layer computes in the dtype of its input")
    return replace(source, bias=module.bias, note="; ".join(notes) or None)


def _dtype(state: Any) -> torch.dtype:
    """The dtype of the weight before it was quantized."""
    dtype: torch.dtype = state.original_dtype if _is_for_cpu(state) else state.dtype
    return dtype


def _is_for_cpu(state: Any) -> bool:
    """Whether the weight has the layout of its bfloat16 CPU kernel, which its first call there may give it."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _codes(data: Tensor, state: Any, n: int, k: int) -> Tensor:
    """uint8 ``[n, k]``."""
    data = data.contiguous().view(torch.uint8).reshape(-1)
    if 2 * len(data) < n * k:
        raise ValueError(f"its weight must hold [{n}, {k}] values of 4 bits: got {len(data)} bytes")
    if _is_for_cpu(state):
        # 32 bytes hold, for 32 rows, the codes of two columns: of the first 16 rows in the low nibbles
        halves = torch.stack([data.view(-1, _CPU_ROWS) & 15, data.view(-1, _CPU_ROWS) >> 4], dim=1)
        return halves.view(n // _CPU_ROWS, k // 2, _CPU_ROWS, 2).transpose(1, 2).reshape(n, k)
    return torch.stack([data >> 4, data & 15], dim=1).view(-1)[: n * k].view(n, k)


def _is_like_ours(state2: Any) -> bool:
    """Whether nested scales are what a nested :class:`CodebookWeight` can hold."""
    return bool(state2.blocksize == NESTED_BLOCK and state2.dtype == torch.float32 and len(state2.code) == 256)


def _scales(state: Any, absmax: Tensor) -> Tensor:
    """The scale of each block, not nested: float32, or bfloat16 where that is all bitsandbytes kept."""
    if not state.nested:
        return absmax
    inner = state.state2
    scales: Tensor = inner.code[absmax.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(absmax)]
    return scales.to(inner.dtype).add_(state.offset).float()


def _dequantized(codes: Tensor, code: Tensor, scales: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' definition of the weight, block by block over the flattened codes."""
    flat = code.float()[codes.flatten().int()]
    full = len(flat) // blocksize
    flat[: full * blocksize].view(full, blocksize).mul_(scales[:full].float().view(-1, 1))
    flat[full * blocksize :].mul_(scales[-1].float())
    return flat.view(codes.shape).to(dtype)
