"""Family ``kron``: ``W = sum_r A_r ⊗ B_r``, each factor dense or itself packed."""

from lowbit.kron import op as op  # registers the ops
from lowbit.kron import quantize as quantize  # registers the quantizers

op.OPS.implement("triton", "lowbit.kron.triton")
