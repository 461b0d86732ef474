"""Training models in the form that they are deployed in.

    spec = lowbit.Packed(bits=4, granularity="row", symmetric=True, activations="int8")
    model = train.prepare(model, spec, train.Dynamic())
    optimizer = torch.optim.AdamW(train.parameter_groups(model, lr=1e-3, scales=1e-2))
    ...                            # an ordinary loop
    model = lowbit.convert(model)  # packed: the same logits, bit for bit
"""

from typing import Any

from lowbit.train.distillation import Contrastive, Distillation, Intermediate, Logits, Task, Term
from lowbit.train.prepare import parameter_groups, prepare
from lowbit.train.recover import Recovery, recover
from lowbit.train.scaling import LSQ, PACT, SEQ, Dynamic, MinMax
from lowbit.train.trainable import trainable
from lowbit.train.tune import Tuning, tune
from lowbit.train.tuned import TunedCodebook, TunedPacked

__all__ = [
    "LSQ", "PACT", "SEQ", "Contrastive", "DistillTrainer", "Distillation", "Dynamic", "Intermediate", "Logits",
    "MinMax", "Recovery", "Task", "Term", "TunedCodebook", "TunedPacked", "Tuning", "parameter_groups", "prepare",
    "recover", "trainable", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "DistillTrainer":  # it needs transformers
        from lowbit.train.trainer import DistillTrainer

        return DistillTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
