"""Family ``codebook``: ``w = codebook[codes] (* scales) (+ outliers)``; k-means tables, NF4, FP4 and any other."""

from lowbit.codebook import op as op  # registers the ops
from lowbit.codebook import quantize as quantize  # registers the quantizers

op.OPS.implement("triton", "lowbit.codebook.triton")
