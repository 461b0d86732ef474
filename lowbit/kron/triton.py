"""Triton kernels of family ``kron``; what they compute is in :mod:`lowbit.kron.op`.

One of the two factors is multiplied first, Q ``[rank, NQ, KQ]``, the other second, P ``[rank, NP, KP]``. Either may be
A. With every row m of x read as ``X[kp, kq]``,

    T[m, nq, kp] = sum_kq Q[nq, kq] X[m, kp, kq]        y[m, np, nq] = sum_r sum_kp P[np, kp] T[m, nq, kp]

A program makes a register tile ``[nq, (m, kp)]`` of T, in float32. Four kernels differ in what follows:

- ``kron_resident_kernel``: the columns of the register tile are the KP of one row m, and the second product is a matrix
  product of it with P. Both factors stay on chip, while the program goes over the rows of x. For one term.
- ``kron_fused_kernel``: the same, but the factors are read part by part. For any number of terms.
- ``kron_summed_kernel``: KP is too small for a matrix product. The register tile has the columns of several rows, and
  the second product is a sum of KP products. For one term.
- ``kron_product_kernel``: one product only. One launch writes T to memory, and another one multiplies it with P.

Products of two 16-bit floats are exact in float32. If both factors have 16 bits, T goes through matrix units in
bfloat16 pieces. If not, each of its products with P is rounded once, in float32 units. Either way one-hot activations
give the dequantized weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton import tuning
from lowbit.backends.triton.activations import aligned_rows
from lowbit.backends.triton.checks import check_tensors
from lowbit.backends.triton.float32_dot import PIECES, dot_pieces
from lowbit.backends.triton.launch import Launch, Target, run, target_of
from lowbit.kron.op import OPS
from lowbit.kron.operands import Factor, KronOperands, Product

# ---------------------------------------------------------------------------------------------------- on the device


@triton.jit
def _unpacked(values_ptr, scales_ptr, zeros_ptr, row, column, inside, words, groups, group_size, BITS: tl.constexpr):
    """``(code - zero) * scale`` in float32; ``groups`` is 0 where one scale serves all rows."""
    bit = column % 32 * BITS
    word = values_ptr + row * words + (column // 32 * BITS + bit // 32)
    code = tl.load(word, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (bit % 32).to(tl.uint32)
    if 32 % BITS != 0:
        # A code may end in the next word. Where it does not, what this adds lies above the code or is the code itself.
        rest = tl.load(word + (bit % 32 + BITS > 32).to(tl.int32), mask=inside, other=0).to(tl.uint32, bitcast=True)
        code |= rest << ((32 - bit % 32) & 31).to(tl.uint32)
    code = (code & ((1 << BITS) - 1)).to(tl.float32)
    at = row * groups + column // group_size
    if zeros_ptr is None:
        code -= 1 << (BITS - 1)
    else:
        code -= tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # not a product, which could fuse with the subtraction that splits it into pieces, and so not be rounded
    return tl.fma(code, scale, tl.zeros(code.shape, tl.float32))


@triton.jit
def _values(
    values_ptr, scales_ptr, zeros_ptr, row, column, inside, columns, words, groups, group_size, BITS: tl.constexpr
):
    """Elements of a factor, 0 where not ``inside``: of a dense one in its dtype, of a packed one in float32.

    ``row`` (int64) counts over all terms.
    """
    if BITS == 0:
        values = tl.load(values_ptr + row * columns + column, mask=inside, other=0.0)
    else:
        values = _unpacked(values_ptr, scales_ptr, zeros_ptr, row, column, inside, words, groups, group_size, BITS)
    return values


@triton.jit
def _dot(a, b, sums, A: tl.constexpr, B: tl.constexpr):
    """``sums + a @ b`` in A and B pieces; where A is 0, of one 16-bit dtype as it is or in float32 units."""
    if A > 0:
        sums = dot_pieces(a, b, sums, A, B)
    elif a.dtype == b.dtype:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    else:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return sums


@triton.jit
def _x_tile(x_rows, source_ptr, at, inside, k_size):
    """x at elements ``at`` of its rows, or where ``source`` says that they are; 0 where not ``inside``."""
    if source_ptr is not None:
        at = tl.load(source_ptr + at, mask=inside, other=-1)
        inside &= (at >= 0) & (at < k_size)
    return tl.load(x_rows + at, mask=inside, other=0.0)


@triton.jit
def _first_product(
    sums, x_rows, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr, x_at, x_inside, nq, q_row, k_size, x_q, q_rows,
    q_columns, q_words, q_groups, q_group_size, Q_BITS: tl.constexpr, Q_PIECES: tl.constexpr, X_PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sums + Q X``: a tile ``[nq, (m, kp)]`` of T for the term whose rows of Q begin at ``q_row``."""
    row = q_row + nq.to(tl.int64)
    for start in range(0, q_columns, BLOCK_K):
        kq = start + tl.arange(0, BLOCK_K)
        inside = kq < q_columns
        q = _values(
            q_ptr, q_scales_ptr, q_zeros_ptr, row[:, None], kq[None, :], (nq < q_rows)[:, None] & inside[None, :],
            q_columns, q_words, q_groups, q_group_size, Q_BITS,
        )  # fmt: skip
        x = _x_tile(
            x_rows[None, :], source_ptr, x_at[None, :] + kq[:, None] * x_q, x_inside[None, :] & inside[:, None], k_size
        )
        sums = _dot(q, x, sums, Q_PIECES, X_PIECES)
    return sums


@triton.jit
def _store(y_ptr, bias_ptr, target_ptr, n_size, y_row, m, n, inside, sums):
    """``y[m, target[n]] = sums + bias``, rounded to y's dtype; m, n and inside broadcast to the shape of sums."""
    if target_ptr is not None:
        n = tl.load(target_ptr + n, mask=inside, other=-1)
        inside &= (n >= 0) & (n < n_size)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * y_row + n, sums.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m_size"])
def kron_resident_kernel(
    x_ptr, source_ptr, bias_ptr, target_ptr, y_ptr, m_size, n_size, k_size, x_row, x_p, x_q, y_row, y_p, y_q,
    q_ptr, q_scales_ptr, q_zeros_ptr, q_rows, q_columns, q_words, q_groups, q_group_size,
    p_ptr, p_scales_ptr, p_zeros_ptr, p_rows, p_columns, p_words, p_groups, p_group_size,
    Q_BITS: tl.constexpr, P_BITS: tl.constexpr, Q_PIECES: tl.constexpr, X_PIECES: tl.constexpr,
    T_PIECES: tl.constexpr, P_PIECES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of Q times rows of x, one after the other; KQ fits BLOCK_K, NP fits BLOCK_P and KP fits PARTS."""
    nq = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    np = tl.arange(0, BLOCK_P)
    kq = tl.arange(0, BLOCK_K)
    kp = tl.arange(0, PARTS)
    q = _values(
        q_ptr, q_scales_ptr, q_zeros_ptr, nq[:, None].to(tl.int64), kq[None, :],
        (nq < q_rows)[:, None] & (kq < q_columns)[None, :], q_columns, q_words, q_groups, q_group_size, Q_BITS,
    )  # fmt: skip
    p = _values(
        p_ptr, p_scales_ptr, p_zeros_ptr, np[None, :].to(tl.int64), kp[:, None],
        (np < p_rows)[None, :] & (kp < p_columns)[:, None], p_columns, p_words, p_groups, p_group_size, P_BITS,
    )  # fmt: skip
    x_at = kp[None, :] * x_p + kq[:, None] * x_q
    x_inside = (kp < p_columns)[None, :] & (kq < q_columns)[:, None]
    n = nq[:, None] * y_q + np[None, :] * y_p
    n_inside = (nq < q_rows)[:, None] & (np < p_rows)[None, :]
    programs = tl.num_programs(1)
    for step in range(tl.cdiv(m_size - tl.program_id(1), programs)):
        m = tl.program_id(1) + step * programs
        x = _x_tile(x_ptr + m.to(tl.int64) * x_row, source_ptr, x_at, x_inside, k_size)
        t = _dot(q, x, tl.zeros((BLOCK_Q, PARTS), tl.float32), Q_PIECES, X_PIECES)
        t = tl.where((kp < p_columns)[None, :], t, 0.0)  # as in _t_tile
        sums = _dot(t, p, tl.zeros((BLOCK_Q, BLOCK_P), tl.float32), T_PIECES, P_PIECES)
        _store(y_ptr, bias_ptr, target_ptr, n_size, y_row, m, n, n_inside, sums)


@triton.jit
def _t_tile(
    x_rows, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr, row_valid, kp, nq, q_row, k_size, x_p, x_q, q_rows,
    q_columns, q_words, q_groups, q_group_size, p_columns, Q_BITS: tl.constexpr, Q_PIECES: tl.constexpr,
    X_PIECES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One term's tile ``[nq, (m, kp)]`` of T, 0 where there is no kp."""
    t = _first_product(
        tl.zeros((nq.shape[0], kp.shape[0]), tl.float32), x_rows, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr,
        kp * x_p, row_valid & (kp < p_columns), nq, q_row, k_size, x_q, q_rows, q_columns, q_words, q_groups,
        q_group_size, Q_BITS, Q_PIECES, X_PIECES, BLOCK_K,
    )  # fmt: skip
    return tl.where((kp < p_columns)[None, :], t, 0.0)  # an infinite weight times the padding is no number


@triton.jit(do_not_specialize=["m_size"])
def kron_fused_kernel(
    x_ptr, source_ptr, bias_ptr, target_ptr, y_ptr, m_size, n_size, k_size, x_row, x_p, x_q, y_row, y_p, y_q,
    q_ptr, q_scales_ptr, q_zeros_ptr, q_rows, q_columns, q_words, q_groups, q_group_size,
    p_ptr, p_scales_ptr, p_zeros_ptr, p_rows, p_columns, p_words, p_groups, p_group_size,
    RANK: tl.constexpr, ONCE: tl.constexpr, Q_BITS: tl.constexpr, P_BITS: tl.constexpr, Q_PIECES: tl.constexpr,
    X_PIECES: tl.constexpr, T_PIECES: tl.constexpr, P_PIECES: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of Q times one row of x, BLOCK_K of KQ and PARTS of KP at a time.

    ONCE: there is one term and PARTS are all of KP, so that T is the same for every BLOCK_P of NP.
    """
    tiles = tl.cdiv(q_rows, BLOCK_Q)
    nq = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m = tl.program_id(0) // tiles
    x_rows = x_ptr + m.to(tl.int64) * x_row + tl.zeros((PARTS,), tl.int64)
    row_valid = m + tl.zeros((PARTS,), tl.int32) < m_size
    if ONCE:
        t = _t_tile(
            x_rows, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr, row_valid, tl.arange(0, PARTS), nq, 0, k_size, x_p,
            x_q, q_rows, q_columns, q_words, q_groups, q_group_size, p_columns, Q_BITS, Q_PIECES, X_PIECES, BLOCK_K,
        )  # fmt: skip
    for np_start in range(0, p_rows, BLOCK_P):
        np = np_start + tl.arange(0, BLOCK_P)
        sums = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        for term in range(RANK):
            for kp_start in range(0, p_columns, PARTS):
                kp = kp_start + tl.arange(0, PARTS)
                if not ONCE:
                    t = _t_tile(
                        x_rows, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr, row_valid, kp, nq, term * q_rows, k_size,
                        x_p, x_q, q_rows, q_columns, q_words, q_groups, q_group_size, p_columns, Q_BITS, Q_PIECES,
                        X_PIECES, BLOCK_K,
                    )  # fmt: skip
                p = _values(
                    p_ptr, p_scales_ptr, p_zeros_ptr, (term * p_rows + np).to(tl.int64)[None, :], kp[:, None],
                    (np < p_rows)[None, :] & (kp < p_columns)[:, None], p_columns, p_words, p_groups, p_group_size,
                    P_BITS,
                )  # fmt: skip
                sums = _dot(t, p, sums, T_PIECES, P_PIECES)
        n = nq[:, None] * y_q + np[None, :] * y_p
        _store(
            y_ptr, bias_ptr, target_ptr, n_size, y_row, m, n, (nq < q_rows)[:, None] & (np < p_rows)[None, :], sums
        )


@triton.jit(do_not_specialize=["m_size"])
def kron_summed_kernel(
    x_ptr, source_ptr, bias_ptr, target_ptr, y_ptr, m_size, n_size, k_size, x_row, x_p, x_q, y_row, y_p, y_q,
    q_ptr, q_scales_ptr, q_zeros_ptr, q_rows, q_columns, q_words, q_groups, q_group_size,
    p_ptr, p_scales_ptr, p_zeros_ptr, p_rows, p_columns, p_words, p_groups, p_group_size,
    Q_BITS: tl.constexpr, P_BITS: tl.constexpr, Q_PIECES: tl.constexpr, X_PIECES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of Q times BLOCK_M rows of x; KP fits PARTS."""
    tiles = tl.cdiv(q_rows, BLOCK_Q)
    nq = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.program_id(0) // tiles * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    row = first + tl.arange(0, BLOCK_M * PARTS) // PARTS
    t = _t_tile(
        x_ptr + row.to(tl.int64) * x_row, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr, row < m_size,
        tl.arange(0, BLOCK_M * PARTS) % PARTS, nq, 0, k_size, x_p, x_q, q_rows, q_columns, q_words, q_groups,
        q_group_size, p_columns, Q_BITS, Q_PIECES, X_PIECES, BLOCK_K,
    )  # fmt: skip
    t = tl.reshape(t, (BLOCK_Q, BLOCK_M, PARTS))
    kp = tl.arange(0, PARTS)
    for np in range(p_rows):
        p = _values(
            p_ptr, p_scales_ptr, p_zeros_ptr, (np + kp * 0).to(tl.int64), kp, kp < p_columns, p_columns, p_words,
            p_groups, p_group_size, P_BITS,
        ).to(tl.float32)  # fmt: skip
        n = nq[:, None] * y_q + (m * 0 + np * y_p)[None, :]
        inside = (nq < q_rows)[:, None] & (m < m_size)[None, :]
        _store(y_ptr, bias_ptr, target_ptr, n_size, y_row, m[None, :], n, inside, tl.sum(t * p[None, None, :], 2))


@triton.jit(do_not_specialize=["m_size"])
def kron_product_kernel(
    x_ptr, source_ptr, bias_ptr, target_ptr, y_ptr, m_size, n_size, k_size, x_row, x_p, x_q, y_row, y_p, y_q,
    q_ptr, q_scales_ptr, q_zeros_ptr, q_rows, q_columns, q_words, q_groups, q_group_size, p_columns, x_term, y_term,
    TERMS: tl.constexpr, Q_BITS: tl.constexpr, Q_PIECES: tl.constexpr, X_PIECES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``y[m, nq, kp] = sum_kq Q[nq, kq] X[m, kp, kq]``, summed over TERMS terms; the second axis counts such sums."""
    tiles = tl.cdiv(q_rows, BLOCK_Q)
    nq = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * TERMS
    m = column // p_columns
    part = column % p_columns
    x_rows = x_ptr + m.to(tl.int64) * x_row
    sums = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    for term in range(first, first + TERMS):
        sums = _first_product(
            sums, x_rows, source_ptr, q_ptr, q_scales_ptr, q_zeros_ptr, term * x_term + part * x_p, m < m_size,
            nq, term * q_rows, k_size, x_q, q_rows, q_columns, q_words, q_groups, q_group_size, Q_BITS,
            Q_PIECES, X_PIECES, BLOCK_K,
        )  # fmt: skip
    n = first * y_term + nq[:, None] * y_q + part[None, :] * y_p
    inside = (nq < q_rows)[:, None] & (m < m_size)[None, :]
    _store(y_ptr, bias_ptr, target_ptr, n_size, y_row, m[None, :], n, inside, sums)


@triton.jit
def invert_kernel(permutation_ptr, inverse_ptr, size, BLOCK: tl.constexpr):
    """``inverse[permutation[i]] = i``; what lies outside is left out."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    to = tl.load(permutation_ptr + i, mask=i < size, other=-1)
    tl.store(inverse_ptr + to, i, mask=(to >= 0) & (to < size))


@triton.jit(do_not_specialize=["m_size"])
def kron_rows_kernel(
    ids_ptr, input_permutation_ptr, output_permutation_ptr, y_ptr, m_size,
    a_ptr, a_scales_ptr, a_zeros_ptr, a_rows, a_columns, a_words, a_groups, a_group_size,
    b_ptr, b_scales_ptr, b_zeros_ptr, b_rows, b_columns, b_words, b_groups, b_group_size,
    RANK: tl.constexpr, A_BITS: tl.constexpr, B_BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``y[i] = W[ids[i]]`` (``W[i]`` without ids); NaN for what is out of range."""
    n_size = a_rows * b_rows
    k_size = a_columns * b_columns
    tiles = tl.cdiv(k_size, BLOCK_K)
    i = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    n, column = i, k
    if ids_ptr is not None:
        n = tl.load(ids_ptr + i, mask=i < m_size, other=-1).to(tl.int64)
    n_valid = (n >= 0) & (n < n_size)
    if output_permutation_ptr is not None:
        n = tl.load(output_permutation_ptr + n, mask=n_valid, other=-1).to(tl.int64)
        n_valid = (n >= 0) & (n < n_size)
    if input_permutation_ptr is not None:
        column = tl.load(input_permutation_ptr + k, mask=k < k_size, other=-1)
    valid = n_valid[:, None] & ((column >= 0) & (column < k_size))[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for term in range(RANK):
        a = _values(
            a_ptr, a_scales_ptr, a_zeros_ptr, (term * a_rows + n // b_rows)[:, None], (column // b_columns)[None, :],
            valid, a_columns, a_words, a_groups, a_group_size, A_BITS,
        ).to(tl.float32)  # fmt: skip
        b = _values(
            b_ptr, b_scales_ptr, b_zeros_ptr, (term * b_rows + n % b_rows)[:, None], (column % b_columns)[None, :],
            valid, b_columns, b_words, b_groups, b_group_size, B_BITS,
        ).to(tl.float32)  # fmt: skip
        sums += a * b
    sums = tl.where(valid, sums, float("nan"))
    inside = (i < m_size)[:, None] & (k < k_size)[None, :]
    tl.store(y_ptr + i[:, None] * k_size + k[None, :], sums.to(y_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------- on the host

MOST_SUMMED = 8  # of KP: a sum of products takes it, no matrix product
MOST_PARTS = 64  # of KP at a time: T in pieces fills the registers
MOST_SUMS = 128  # of NP at a time
WORKSPACE = 1 << 24  # elements of T that go through memory at a time


def _block(size: int, least: int, most: int) -> int:
    """The smallest power of two in [least, most] that is at least ``size``; ``most`` where there is none."""
    return min(max(least, 1 << (size - 1).bit_length()), most)


def _dtype(factor: Factor) -> torch.dtype:
    """What the kernels' arithmetic takes the factor's values for."""
    return torch.float32 if factor.bits else factor.values.dtype


def _pieces(left: torch.dtype, right: torch.dtype) -> tuple[int, int]:
    """Into how many pieces the operands of a matrix product are split; 0: it is one product of a common dtype."""
    return (0, 0) if left == right else (PIECES[left], PIECES[right])


def _arguments(name: str, factor: Factor) -> dict[str, Any]:
    """The kernels' arguments of a factor, those that begin with ``name``."""
    words = groups = 0
    if factor.scales is not None:
        words = factor.values.shape[1]
        shared = factor.scales.shape[0] < factor.rank * factor.n
        groups = 0 if shared else factor.scales.shape[1]
    values = dict(
        ptr=factor.values, scales_ptr=factor.scales, zeros_ptr=factor.zeros, rows=factor.n, columns=factor.k,
        words=words, groups=groups, group_size=max(1, factor.group_size),
    )  # fmt: skip
    return {f"{name}_{key}": value for key, value in values.items()}


class _Order(NamedTuple):
    """Which factor comes first, and the strides of ``kp, kq`` in a row of x and of ``np, nq`` in one of y."""

    q: Factor
    p: Factor
    strides: dict[str, int]

    @property
    def narrow(self) -> bool:
        """Whether products of the factors are exact in float32."""
        return torch.float32 not in (_dtype(self.q), _dtype(self.p))

    @property
    def fused(self) -> bool:
        """Whether one launch can do both products without making T more than once."""
        if self.p.k <= MOST_SUMMED:
            return self.q.rank == 1
        return self.narrow and (self.p.n <= MOST_SUMS or (self.q.rank == 1 and self.p.k <= MOST_PARTS))

    @property
    def cost(self) -> int:
        """Products per row of x and term; the traffic of T counts as much as three times its products."""
        return self.p.k * self.q.n * (self.q.k + self.p.n) * (1 if self.fused else 4)


def _order(w: Product) -> _Order:
    """The cheaper of the two."""
    a, b = w.a, w.b
    b_first = _Order(b, a, dict(x_p=b.k, x_q=1, y_p=b.n, y_q=1))
    a_first = _Order(a, b, dict(x_p=1, x_q=b.k, y_p=1, y_q=b.n))
    return min(b_first, a_first, key=lambda order: order.cost)


def _inverse(permutation: Tensor | None, launches: list[Launch]) -> Tensor | None:
    """The inverse of a permutation; adds the launch that makes it."""
    if permutation is None:
        return None
    inverse, size = torch.empty_like(permutation), len(permutation)
    arguments = dict(permutation_ptr=permutation, inverse_ptr=inverse, size=size)
    launches.append(Launch(invert_kernel, (triton.cdiv(size, 1024),), arguments, {"BLOCK": 1024}))
    return inverse


def linear_launches(target: Target, x: Tensor, w: Product, bias: Tensor | None, y: Tensor) -> list[Launch]:
    """The launches of ``y [M, N] = x [M, K] @ W.T + bias``; the rows of x and of y are contiguous."""
    m = x.shape[0]
    launches: list[Launch] = []
    if m == 0:
        return launches
    source = _inverse(w.input_permutation, launches)
    destination = _inverse(w.output_permutation, launches)
    order = _order(w)
    q, p = order.q, order.p
    first = _pieces(_dtype(q), x.dtype)
    second = _pieces(torch.float32, _dtype(p)) if order.narrow else (0, 0)
    arguments = dict(
        x_ptr=x, source_ptr=source, bias_ptr=bias, target_ptr=destination, y_ptr=y, m_size=m, n_size=w.n, k_size=w.k,
        x_row=x.stride(0) if m > 1 else w.k, y_row=w.n, **order.strides, **_arguments("q", q),
    )  # fmt: skip
    constants = dict(Q_BITS=q.bits, Q_PIECES=first[0], X_PIECES=first[1])
    if not order.fused:
        return [*launches, *_two_launches(target, order, arguments, constants, second)]
    arguments |= _arguments("p", p)
    if p.k <= MOST_SUMMED:
        return [*launches, _summed_launch(target, order, arguments, constants)]
    return [*launches, _fused_launch(target, order, arguments, constants, second)]


class _Tile(NamedTuple):
    """The register tile of the first product: rows of Q by columns ``(m, kp)``, ``depth`` of KQ at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _pieces_rows(target: Target) -> int:
    """How many rows of a register tile in pieces fit: more where matrix units read an operand from shared memory."""
    return 64 if target.backend == "hip" or target.arch in (90, 100) else 32


def _tile(target: Target, q: Factor, x: torch.dtype, m: int, width: int) -> _Tile:
    """Sizes that were found, by compiling, to need no more registers and shared memory than there are; for m rows of
    x with ``width`` columns each."""
    columns = tuning.rows_for_launches(m) * width
    q_pieces, x_pieces = _pieces(_dtype(q), x)
    dots = q_pieces * x_pieces  # 0: one product of a common dtype
    cuda = target.backend == "cuda"
    if x == torch.float32 == _dtype(q):
        tile = _Tile(64, 64, 16, 8 if columns > 16 else 4, 2)
    elif columns <= 16:
        rows = 16 if triton.cdiv(q.n, 64) < target.processors else 64
        tile = _Tile(rows, 16, 32 if dots else 128, 4, 4 if cuda and not dots else 2)
    elif dots:
        tile = _Tile(_pieces_rows(target), 32 if q.bits else 64, 32 if dots > 3 or q.bits else 64, 4, 2)
    elif triton.cdiv(q.n, 128) * triton.cdiv(columns, 128) < target.processors:
        tile = _Tile(64, 64, 64, 4, 3 if cuda else 2)
    else:
        tile = _Tile(128, 128, 64, 8, 3 if cuda else 2)
    return tile._replace(
        rows=_block(q.n, 16, tile.rows), columns=_block(m * width, 16, tile.columns), depth=_block(q.k, 16, tile.depth)
    )


def _summed_launch(target: Target, order: _Order, arguments: dict[str, Any], constants: dict[str, Any]) -> Launch:
    """Both products in one launch, the second by sums of KP products."""
    q, m = order.q, arguments["m_size"]
    parts = _block(order.p.k, 1, MOST_SUMMED)
    tile = _tile(target, q, arguments["x_ptr"].dtype, m, parts)
    constants = dict(
        P_BITS=order.p.bits, BLOCK_Q=tile.rows, BLOCK_K=tile.depth, BLOCK_M=tile.columns // parts, PARTS=parts,
        **constants,
    )  # fmt: skip
    grid = (triton.cdiv(q.n, tile.rows) * triton.cdiv(m, constants["BLOCK_M"]),)
    return Launch(kron_summed_kernel, grid, arguments, constants, tile.warps, tile.stages)


def _fused_launch(
    target: Target, order: _Order, arguments: dict[str, Any], constants: dict[str, Any], second: tuple[int, int]
) -> Launch:
    """Both products in one launch, the second a matrix product of each row's T."""
    constants = dict(constants, P_BITS=order.p.bits, T_PIECES=second[0], P_PIECES=second[1])
    q, p, m = order.q, order.p, arguments["m_size"]
    splits = constants["Q_PIECES"] * constants["X_PIECES"]
    block_q, block_p = _block(q.n, 16, _pieces_rows(target)), _block(p.n, 16, MOST_SUMS)
    tiles = triton.cdiv(q.n, block_q)
    # T in pieces fills the registers, and the sums do
    parts = _block(p.k, 16, 32 if block_p > 64 and constants["P_PIECES"] > 1 else MOST_PARTS)
    constants |= dict(BLOCK_Q=block_q, BLOCK_P=block_p, PARTS=parts)
    if q.rank == 1 and max(p.n, p.k, q.k) <= 64 and splits <= 3:
        programs = min(m, triton.cdiv(4 * target.processors, tiles), 65535)
        constants |= dict(BLOCK_K=_block(q.k, 16, 64))
        stages = 3 if target.backend == "cuda" else 2
        return Launch(kron_resident_kernel, (tiles, programs), arguments, constants, 4, stages)
    once = q.rank == 1 and p.k <= parts
    constants |= dict(RANK=q.rank, ONCE=once, BLOCK_K=_block(q.k, 16, 32 if splits > 3 else 64))
    return Launch(kron_fused_kernel, (tiles * m,), arguments, constants, 4, 2)


def _two_launches(
    target: Target, order: _Order, arguments: dict[str, Any], constants: dict[str, Any], second: tuple[int, int]
) -> Iterator[Launch]:
    """The first product into a workspace T ``[M, rank, NQ, KP]``, then the second; some rows of x at a time."""
    q, p, x, y = order.q, order.p, arguments["x_ptr"], arguments["y_ptr"]
    term, row = q.n * p.k, q.rank * q.n * p.k
    step = max(1, WORKSPACE // row)
    t = torch.empty(min(step, len(x)), row, dtype=torch.float32, device=x.device)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        m = len(x[rows])
        into = {
            **arguments, "x_ptr": x[rows], "y_ptr": t, "bias_ptr": None, "target_ptr": None, "m_size": m,
            "n_size": row, "y_row": row, "y_p": 1, "y_q": p.k, "p_columns": p.k, "x_term": 0, "y_term": term,
        }  # fmt: skip
        yield _product_launch(target, q, p.k, (q.rank, 1), into, constants)
        # T is the x of the second product: [nq, kp] is its [kp, kq]
        out = {
            **arguments, **_arguments("q", p), "x_ptr": t, "y_ptr": y[rows], "source_ptr": None, "m_size": m,
            "k_size": row, "x_row": row, "x_p": p.k, "x_q": 1, "y_p": arguments["y_q"], "y_q": arguments["y_p"],
            "p_columns": q.n, "x_term": term, "y_term": 0,
        }  # fmt: skip
        yield _product_launch(
            target, p, q.n, (1, q.rank), out, dict(Q_BITS=p.bits, Q_PIECES=second[1], X_PIECES=second[0])
        )


def _product_launch(
    target: Target, q: Factor, width: int, sums: tuple[int, int], arguments: dict[str, Any], constants: dict[str, Any]
) -> Launch:
    """One product, with ``width`` columns for each row of x; ``sums``: how many sums, and of how many terms each."""
    columns = arguments["m_size"] * width
    exact = constants["Q_PIECES"] > 0 or arguments["x_ptr"].dtype == _dtype(q)
    tile = _tile(target, q if exact else q._replace(bits=8), arguments["x_ptr"].dtype, arguments["m_size"], width)
    grid = (triton.cdiv(q.n, tile.rows) * triton.cdiv(columns, tile.columns), sums[0])
    constants = dict(constants, TERMS=sums[1], BLOCK_Q=tile.rows, BLOCK_K=tile.depth, COLUMNS=tile.columns)
    return Launch(kron_product_kernel, grid, arguments, constants, tile.warps, tile.stages)


def rows_launches(ids: Tensor | None, w: Product, y: Tensor) -> list[Launch]:
    """The launches of ``y [rows, K] = W[ids]``, or of all of W where ids is None."""
    arguments = dict(
        ids_ptr=ids, input_permutation_ptr=w.input_permutation, output_permutation_ptr=w.output_permutation, y_ptr=y,
        m_size=y.shape[0], **_arguments("a", w.a), **_arguments("b", w.b),
    )  # fmt: skip
    block_k = _block(w.k, 32, 256)
    block_m = _block(y.shape[0], 1, 1024 // block_k)
    constants = dict(RANK=w.rank, A_BITS=w.a.bits, B_BITS=w.b.bits, BLOCK_M=block_m, BLOCK_K=block_k)
    grid = (triton.cdiv(y.shape[0], block_m) * triton.cdiv(w.k, block_k),)
    return [Launch(kron_rows_kernel, grid, arguments, constants, fuse=False)]


def _check(device: torch.device, weight: Product, bias: Tensor | None = None) -> None:
    a, b = weight.a, weight.b
    check_tensors(
        device, a=a.values, a_scales=a.scales, a_zeros=a.zeros, b=b.values, b_scales=b.scales, b_zeros=b.zeros,
        bias=bias, input_permutation=weight.input_permutation, output_permutation=weight.output_permutation,
    )  # fmt: skip


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::kron_linear`` on a GPU. Permutations are not checked: that would wait for the GPU."""
    weight, bias, _ = OPS.linear_arguments(x, *arguments)
    product = weight.product
    _check(x.device, product, bias)
    rows = x.reshape(-1, product.k)
    y = torch.empty(rows.shape[0], product.n, dtype=x.dtype, device=x.device)
    if len(rows):
        run(linear_launches(target_of(x.device), aligned_rows(rows), product, bias, y))
    return y.view(*x.shape[:-1], product.n)


def embedding(ids: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::kron_embedding`` on a GPU. An id out of range gives a row of NaN: checking would wait for the GPU."""
    weight, k, dtype = OPS.embedding_arguments(ids, *arguments)
    product = weight.product
    _check(ids.device, product)
    y = torch.empty(ids.numel(), k, dtype=dtype, device=ids.device)
    if len(y):
        run(rows_launches(ids.reshape(-1).contiguous(), product, y))
    return y.view(*ids.shape, k)


def dequantize(*arguments: Any) -> Tensor:
    """``lowbit::kron_dequantize`` on a GPU."""
    weight, k, dtype = OPS.row_arguments(*arguments)
    product = weight.product
    _check(weight.device, product)
    y = torch.empty(product.n, k, dtype=dtype, device=weight.device)
    run(rows_launches(None, product, y))
    return y


def shipped(target: Target) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every configuration that ships for ``target``, on tensors without memory."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    # (rank, n1, k1, n2, k2): one for each way that linear_launches can take
    shapes = {
        "64x64 x 64x64": (1, 64, 64, 64, 64),
        "128x128 x 128x128": (1, 128, 128, 128, 128),
        "two terms of 64x64 x 64x64": (2, 64, 64, 64, 64),
        "2x1 x 384x3072": (1, 2, 1, 384, 3072),
        "50257x384 x 1x2": (1, 50257, 384, 1, 2),
        "256x256 x 256x256": (1, 256, 256, 256, 256),
    }
    for shape_name, shape in shapes.items():
        for x_name, x_dtype in dtypes.items():
            for bits in (0, 4) if x_dtype == torch.float16 else (0,):
                for m in (1, 4096):
                    product = _example(shape, x_dtype, bits, permuted=shape[0] == 2)
                    x = torch.empty(m, shape[2] * shape[4], dtype=x_dtype, device="meta")
                    y = torch.empty(m, shape[1] * shape[3], dtype=x_dtype, device="meta")
                    bias = torch.empty(y.shape[1], dtype=x_dtype, device="meta")
                    launches = linear_launches(target, x, product, bias, y)
                    factors = f"{bits}-bit factors" if bits else "dense factors"
                    yield f"linear {shape_name}, {x_name}, {factors}, M={m}", launches
    for name, dtype in dtypes.items():
        for bits in (0, 4):
            product = _example(shapes["50257x384 x 1x2"], dtype, bits, permuted=False)
            y = torch.empty(4096, 768, dtype=dtype, device="meta")
            ids = torch.empty(4096, dtype=torch.int64, device="meta")
            factors = f"{bits}-bit factors" if bits else "dense factors"
            yield f"embedding {name}, {factors}", rows_launches(ids, product, y)
            y = torch.empty(50257, 768, dtype=dtype, device="meta")
            yield f"dequantize {name}, {factors}", rows_launches(None, product, y)


def _example(shape: tuple[int, ...], dtype: torch.dtype, bits: int, permuted: bool) -> Product:
    """A weight without memory."""

    def empty(*size: int, of: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def factor(n: int, k: int) -> tuple[Tensor | None, ...]:
        if not bits:
            return empty(rank, n, k, of=dtype), None, None
        groups = triton.cdiv(k, 128)
        scales, zeros = empty(rank * n, groups, of=dtype), empty(rank * n, groups, of=torch.uint8)
        return empty(rank * n, triton.cdiv(k, 32) * bits, of=torch.int32), scales, zeros

    rank, n1, k1, n2, k2 = shape
    permutations = [empty(size, of=torch.int32) if permuted else None for size in (k1 * k2, n1 * n2)]
    groups = (min(k1, 128), min(k2, 128)) if bits else (0, 0)
    arguments = (*factor(n1, k1), *factor(n2, k2), *permutations, *shape, bits, groups[0], bits, groups[1])
    return KronOperands.of(arguments).product
