"""A backend from outside the package, for tests: every op of every family in float64, a row of x at a time."""

import torch

from lowbit.backends import registry
from lowbit.codebook.op import OPS as CODEBOOK
from lowbit.kron.op import OPS as KRON
from lowbit.packed.op import OPS as PACKED


class Toy(registry.Backend):
    def __init__(self):
        super().__init__("toy", "cpu", priority=-1)
        self.calls = 0
        for family in (PACKED, CODEBOOK, KRON):
            self.ops[f"{family.family}_linear"] = lambda *args, family=family: self.linear(family, *args)
            self.ops[f"{family.family}_dequantize"] = lambda *args, family=family: self.dequantize(family, *args)
            self.ops[f"{family.family}_embedding"] = lambda *args, family=family: self.embedding(family, *args)

    def linear(self, family, x, *args):
        self.calls += 1
        weight, bias, activation = family.linear_arguments(x, *args)
        if activation is not None and activation.int8:
            return weight.linear(x, bias, activation)  # the definition
        dense = weight.dequantize(x.shape[-1], torch.float32).double()
        rows = [(dense * row).sum(1) for row in x.reshape(-1, x.shape[-1]).double()]
        y = torch.stack(rows) if rows else dense.new_empty(0, weight.out_features)
        y = y if bias is None else y + bias.double()
        return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)

    def dequantize(self, family, *args):
        weight, k, dtype = family.row_arguments(*args)
        return weight.dequantize(k, dtype)

    def embedding(self, family, ids, *args):
        weight, k, dtype = family.embedding_arguments(ids, *args)
        return weight.embedding(ids, k, dtype)


TOY = registry.register(Toy())
