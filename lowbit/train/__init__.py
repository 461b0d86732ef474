"""Training models in the form that they are deployed in.

    spec = lowbit.Packed(bits=4, granularity="row", symmetric=True, activations="int8")
    model = train.prepare(model, spec, train.Dynamic())
    optimizer = torch.optim.AdamW(train.parameter_groups(model, lr=1e-3, scales=1e-2))
    ...                            # an ordinary loop
    model = lowbit.convert(model)  # packed: the same logits, bit for bit
"""

from lowbit.train.prepare import parameter_groups, prepare
from lowbit.train.scaling import LSQ, PACT, Dynamic, MinMax

__all__ = ["LSQ", "PACT", "Dynamic", "MinMax", "parameter_groups", "prepare"]
