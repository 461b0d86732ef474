"""Bugs of csrc/cuda/kron/fused.cuh. Of bits 0: found with dense factors; the others with packed ones."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.testing import cuda_emulated
from lowbit.testing.cuda_planted import Bug
from lowbit.testing.kron_cases import DENSE, Kind, random_weight
from lowbit.testing.packed_cases import DTYPES, activations

FUSED = "kron/fused.cuh"
BUGS = (
    Bug("factors and x are multiplied before all threads have them", 0, "barrier();  // factors and x", "// ", FUSED),
    Bug("results are written before all sums are there", 0, "barrier();  // so are the sums", "// ", FUSED),
    Bug("one copy too few is waited for", 0, "wait_copies<1>", "wait_copies<2>", FUSED),
    Bug("the next rows of x overwrite those that are read", 0, "stages > 1 ? 1 - stage : 0", "0", FUSED),
    Bug("an operand has its rows exchanged", 0, "upper.x, lower.x, upper.y, lower.y",
        "lower.x, upper.x, upper.y, lower.y", FUSED),
    Bug("columns of x that are padding are not zeros", 0, "kq >= KQ || kp >= KP", "kp >= KP", FUSED),
    Bug("rows of x that are padding are not zeros", 0, "kq >= KQ || kp >= KP", "kq >= KQ", FUSED),
    Bug("a factor is copied past its rows", 0, "beyond = row >= count || column >= factor.columns;\n        const",
        "beyond = row > count || column >= factor.columns;\n        const", FUSED),
    Bug("a piece does not leave out what the one before it holds", 0,
        "first = rest_of(first), second = rest_of(second);", "", FUSED),
    Bug("the last piece of T is left out", 0, "for (int piece = 2; piece >= 0", "for (int piece = 1; piece >= 0",
        FUSED),
    Bug("all planes of P are the first one", 0, "p_first + plane * p_plane", "p_first", FUSED),
    Bug("products of upper with lower planes are left out", 0, "if (plane + other > most) continue;",
        "if (plane + other > most - 2) continue;", FUSED),
    Bug("every term has the first Q", 0, "term * q_planes * q_plane + (16", "term * 0 + (16", FUSED),
    Bug("columns of T are in the order of their tiles", 0, "kp + 2 * n + x_row", "kp + 8 * n + g", FUSED),
    Bug("half of KP is left out", 0, "kp < KP; kp += 32", "kp < KP; kp += 64", FUSED),
    Bug("x is not wholly transposed where a is first", 0, "kp = a_first ? k2 : k1, kq", "kp = k1, kq", FUSED),
    Bug("one number of a place in y is the other order's", 0, "n1 = a_first ? row : column, n2", "n1 = row, n2", FUSED),
    Bug("rows of T that are padding are kept", 0, "if (row >= NQ || column >= NP)", "if (column >= NP)", FUSED),
    Bug("the bias is permuted", 0, "DType(bias_dtype), n);\n        store_y",
        "DType(bias_dtype), from);\n        store_y", FUSED),
    Bug("rows past the last one are written", 0, "if (m >= M) break;\n      const int y_first", "const int y_first",
        FUSED),
    Bug("some rows of x are nobody's", 0, "step < steps; step += blocks", "step < steps; step += blocks + 1", FUSED),
    Bug("a code does not go on in the next word", 3, "bit + bits > 32", "bit + bits > 64", "kron/stored.h"),
    Bug("the zero of symmetric formats is one too low", 4, "static_cast<float>(1 << (bits - 1))",
        "static_cast<float>((1 << (bits - 1)) - 1)", "kron/stored.h"),
    Bug("groups are twice as long", 4, "column / group_size", "column / group_size / 2", "kron/stored.h"),
)  # fmt: skip

# rank, n1, k1, n2, k2: either product first; several chunks and strips of each, cut; NP beyond 64; sizes of one
SHAPES = (
    (2, 5, 9, 7, 11), (1, 20, 40, 24, 36), (1, 72, 8, 20, 24), (1, 20, 9, 66, 17), (1, 16, 40, 8, 24), (1, 1, 1, 1, 1),
)  # fmt: skip


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases with float64; raises where one is wrong. The number of cases."""
    # factors have 2 bits or more, or are dense
    packed = [Kind(torch.float16, bits, 7), Kind(torch.bfloat16, bits, None, zeros="int")]
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(DTYPES):
            a, b = (packed[(i + j) % 2], packed[j % 2]) if bits > 1 else (DENSE[(i + j) % 3], DENSE[(i + 2 * j) % 3])
            weight = random_weight(shape, a, b, seed=i)
            if (i + j) % 3 == 0:
                weight = weight.permuted(i)
            x, bias = activations(5, weight.k, dtype, seed=j), torch.randn(weight.n)
            y = cuda_emulated.kron_linear(weight, x, bias, order=j % 2, of=kernels, processors=1)
            weight.assert_close(y, x, bias)
            cases += 1
    return cases
