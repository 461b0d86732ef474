"""``transformers.Trainer`` with a :class:`~lowbit.train.distillation.Distillation` for its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lowbit.train.distillation import Distillation
from lowbit.train.prepare import learned_scales
from lowbit.train.state import check_training_state, load_masters, training_state

STATE = "lowbit_training.pt"  # in a checkpoint's folder


class _Keeper(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, distillation: Distillation | None) -> None:
        self.distillation = distillation

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            terms = {} if self.distillation is None else self.distillation.state_dict()
            torch.save({"model": training_state(model), "terms": terms}, folder / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.distillation is not None:
            self.distillation.close()


class DistillTrainer(transformers.Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose loss is ``distillation(model, inputs)``; what quantizers learn has a learning rate of its own
    and no decay. Everything else is transformers'. Checkpoints hold what the terms remember, never the teacher, and
    the float32 masters of packed layers, which the files of the model have rounded. One of a model that was prepared in
    another way is refused.

    Args:
        distillation: the loss. Without it: the model's own.
        scales: learning rate of what quantizers learn; default: ten times that of the rest.
        others: those of ``transformers.Trainer``.
    """

    def __init__(
        self, *arguments: Any, distillation: Distillation | None = None, scales: float | None = None, **others: Any
    ) -> None:
        super().__init__(*arguments, **others)
        self.distillation, self.scales = distillation, scales
        if distillation is not None:
            self.loss_is_scaled_for_ga = False
        self.add_callback(_Keeper(distillation))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        teacher = self.distillation.teacher
        first = next(teacher.parameters(), None)
        if first is not None and first.device != self.args.device:
            teacher.to(self.args.device)
        loss, outputs = self.distillation.with_outputs(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:  # type: ignore[has-type]
            whole = self.model if model is None else model
            learned = {id(parameter) for parameter in learned_scales(whole)}
            decayed = set(self.get_decay_parameter_names(whole))
            groups: list[list[nn.Parameter]] = [[], [], []]
            for name, parameter in whole.named_parameters():
                if parameter.requires_grad:
                    groups[2 if id(parameter) in learned else 1 if name not in decayed else 0].append(parameter)
            rate = 10 * self.args.learning_rate if self.scales is None else self.scales
            options: list[dict[str, Any]] = [{"weight_decay": self.args.weight_decay}, {"weight_decay": 0.0},
                                             {"weight_decay": 0.0, "lr": rate}]  # fmt: skip
            cls, keywords = self.get_optimizer_cls_and_kwargs(self.args, whole)
            filled = [{"params": group, **option} for group, option in zip(groups, options, strict=True) if group]
            self.optimizer = cls(filled, **keywords)
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole = self.model if model is None else model
        file = Path(resume_from_checkpoint) / STATE
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: the checkpoint is not of a DistillTrainer")
        state = torch.load(file, weights_only=True, map_location="cpu")
        check_training_state(whole, state["model"])
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_masters(whole, state["model"])
        if self.distillation is not None:
            self.distillation.load_state_dict(state["terms"])
