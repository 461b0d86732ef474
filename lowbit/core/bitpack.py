"""Codes to words and back: the canonical bit layout, executable.

Row-major along K, one dense least-significant-bit-first bitstream per row, in 32-bit words:
code ``j`` of a row occupies bits ``[j*bits, (j+1)*bits)`` of that row's stream, and bit ``i`` of the
stream is bit ``i % 32`` of word ``i // 32``. 32 codes fill exactly ``bits`` words; a shorter tail is
padded with zero codes, so a row of K codes always takes ``ceil(K / 32) * bits`` words.

    bits = 3:   word 0 = c0 | c1<<3 | ... | c9<<27 | (c10 & 3)<<30,   word 1 = c10>>2 | c11<<1 | ...

The same order is used by compressed-tensors (dense) and MLX; GPTQ stores its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_BLOCK = 32
# How the kernels' own layouts deal the bits of a code to planes of 8, 4, 2 and 1 bits: low bits first.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_ROWS_AT_ONCE = 1 << 22  # codes unpacked per step: bounds the temporaries to a few MiB each


def words_per_row(k: int, bits: int) -> int:
    """Number of int32 words that hold ``k`` codes: ``ceil(k / 32) * bits``."""
    return -(-k // CODES_PER_BLOCK) * bits


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8: got bits={bits}")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, an integer tensor ``[N, K]`` with values in ``[0, 2**bits)``, to words ``int32 [N, ceil(K/32)*bits]``.

    Raises ``ValueError`` for ``bits`` outside 1..8, a tensor that is not 2-d, and codes out of range.
    """
    _check_bits(bits)
    if codes.dim() != 2:
        raise ValueError(f"codes must be 2-d [N, K]: got shape {tuple(codes.shape)}")
    n, k = codes.shape
    if codes.device.type == "meta":
        return torch.empty(n, words_per_row(k, bits), dtype=torch.int32, device="meta")
    checked = not torch.compiler.is_compiling()  # a graph cannot depend on values
    if checked and codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        low, high = int(codes.min()), int(codes.max())
        raise ValueError(f"codes must be in [0, {(1 << bits) - 1}] at bits={bits}: got values in [{low}, {high}]")
    words = torch.empty(n, words_per_row(k, bits), dtype=torch.int32, device=codes.device)
    if k == 0:
        return words
    step = max(1, _ROWS_AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        words[start : start + step] = _pack_rows(codes[start : start + step], bits)
    return words


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    blocks = -(-k // CODES_PER_BLOCK)
    padded = torch.zeros(n, blocks * CODES_PER_BLOCK, dtype=torch.uint8, device=codes.device)
    padded[:, :k] = codes
    # bytes are the words' own, lowest first
    if 8 % bits == 0:  # no code straddles two of them
        fields = padded.view(n, blocks * 4 * bits, 8 // bits)
        packed = fields[..., 0].contiguous()
        for j in range(1, 8 // bits):
            packed |= fields[..., j] << (j * bits)
        return packed.view(torch.int32)
    columns = padded.view(n, 4 * blocks, 8)  # 8 codes fill `bits` bytes
    bytes_ = torch.zeros(n, 4 * blocks, bits, dtype=torch.uint8, device=codes.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        bytes_[..., byte] |= columns[..., j] << shift
        if shift + bits > 8:  # the code straddles two bytes
            bytes_[..., byte + 1] |= columns[..., j] >> (8 - shift)
    return bytes_.view(n, 4 * blocks * bits).view(torch.int32)


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """Words ``int32 [N, ceil(K/32)*bits]`` to codes ``uint8 [N, K]``: the inverse of :func:`pack`.

    Raises ``ValueError`` for ``bits`` outside 1..8 and for a word count that does not belong to ``k``.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != words_per_row(k, bits):
        raise ValueError(
            f"words must be int32 [N, {words_per_row(k, bits)}] for K={k}, bits={bits}: "
            f"got {words.dtype} {tuple(words.shape)}"
        )
    n = words.shape[0]
    if n == 0 or k == 0 or words.device.type == "meta":
        return torch.empty(n, k, dtype=torch.uint8, device=words.device)
    codes = torch.empty(n, k, dtype=torch.uint8, device=words.device)
    step = max(1, _ROWS_AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        codes[start : start + step] = _unpack_rows(words[start : start + step], bits)[:, :k]
    return codes


def bytes_per_row(k: int, bits: int) -> int:
    """Number of bytes that hold ``k`` codes: ``ceil(k * bits / 8)``."""
    return -(-k * bits // 8)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """The stream of :func:`pack` without its padding to whole blocks: ``uint8 [N, ceil(K*bits/8)]``."""
    words = pack(codes.contiguous(), bits)
    return words.view(torch.uint8)[:, : bytes_per_row(codes.shape[1], bits)].contiguous()


def unpack_bytes(stream: Tensor, bits: int, k: int) -> Tensor:
    """``uint8 [N, ceil(K*bits/8)]`` to codes ``uint8 [N, K]``: the inverse of :func:`pack_bytes`."""
    if stream.dtype != torch.uint8 or stream.dim() != 2 or stream.shape[1] != bytes_per_row(k, bits):
        raise ValueError(
            f"a stream must be uint8 [N, {bytes_per_row(k, bits)}] for K={k}, bits={bits}: "
            f"got {stream.dtype} {tuple(stream.shape)}"
        )
    whole = torch.nn.functional.pad(stream, (0, 4 * words_per_row(k, bits) - stream.shape[1]))
    return unpack(whole.view(torch.int32), bits, k)


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    n, mask = len(words), (1 << bits) - 1
    bytes_ = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        return torch.stack([bytes_ >> (j * bits) & mask for j in range(8 // bits)], -1).view(n, -1)
    bytes_ = bytes_.view(n, bytes_.shape[1] // bits, bits)
    codes = []
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        code = bytes_[..., byte] >> shift
        if shift + bits > 8:  # the code straddles two bytes
            code = code | bytes_[..., byte + 1] << (8 - shift)
        codes.append(code & mask)
    return torch.stack(codes, -1).view(n, -1)
