"""Family ``packed``: uniform low-bit weights with scales and optional zero points."""

from lowbit.packed import op as op  # registers the ops
from lowbit.packed import quantize as quantize  # registers the quantizers

op.OPS.implement("triton", "lowbit.packed.triton")
