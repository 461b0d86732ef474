"""Experts in classes of transformers that its interface for experts does not serve (checked with 5.24).

Each forward computes what the class's own does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.model.experts import ExpertStack, Project, register_experts_by_name

_UP, _DOWN = "gate_up_proj", "down_proj"


def register() -> None:
    """Make these classes known to convert, by their names."""
    for model, name, stacks, forward in (
        ("llama4", "Llama4TextExperts", _llama4_stacks, _llama4),
        ("jetmoe", "JetMoeParallelExperts", lambda module: {"weight": ExpertStack(by_token=False)}, _jetmoe),
        ("dbrx", "DbrxExperts", _dbrx_stacks, _dbrx),
        ("step3p7", "Step3p7Experts", _two_stacks, _step3p7),
        ("longcat_flash", "LongcatFlashExperts", _two_stacks, _longcat_flash),
        ("inkling", "InklingSharedExperts", _inkling_stacks, _inkling),
    ):
        register_experts_by_name(f"transformers.models.{model}.modeling_{model}.{name}", stacks, forward)


def _two_stacks(module: Any) -> dict[str, ExpertStack]:
    return {_UP: ExpertStack(), _DOWN: ExpertStack()}


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    y: Tensor = up * module.act_fn(gate)
    return y


def _combined(y: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """``sum_j scores[t, j] * y[t, j]``, in a fixed order; an expert that is not here adds nothing."""
    return (y * scores.reshape(-1, 1)).view(*index.shape, -1).sum(1)


def _llama4_stacks(module: Any) -> dict[str, ExpertStack]:
    how = ExpertStack(transposed=True, by_token=False)  # all tokens for the first expert, then all for the second
    return {_UP: how, _DOWN: how}


def _llama4(module: Any, project: Project, hidden_states: Tensor) -> Tensor:
    """Every expert is given all tokens, those that it was not chosen for multiplied by 0: these are left out."""
    x = hidden_states.reshape(-1, module.hidden_size)
    ids = torch.arange(module.num_experts, device=x.device).repeat_interleave(len(x) // module.num_experts)
    ids = torch.where((x != 0).any(-1), ids, module.num_experts)
    return project(_DOWN, _gated(module, project(_UP, x, ids)), ids)


def _jetmoe(module: Any, project: Project, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
    """x is sorted by experts. Their sizes may be unknown when this is compiled."""
    rows, end = torch.arange(len(inputs), device=inputs.device), 0
    ids = torch.zeros_like(rows)
    for size in expert_size[:-1]:
        end = end + size
        ids = ids + (rows >= end).long()
    return project("weight", inputs, ids)


def _dbrx_stacks(module: Any) -> dict[str, ExpertStack]:
    up, down = (ExpertStack(transposed=t, num_experts=module.num_experts) for t in (False, True))
    return {"mlp.w1": up, "mlp.v1": up, "mlp.w2": down}


def _dbrx(module: Any, project: Project, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    x, ids = hidden_states.reshape(-1, module.hidden_size), top_k_index.reshape(-1)
    x = module.mlp.activation_fn(project("mlp.w1", x, ids)) * project("mlp.v1", x, ids)
    y = _combined(project("mlp.w2", x, ids), top_k_index, top_k_weights)
    return y.to(hidden_states.dtype).view(hidden_states.shape[0], -1, module.hidden_size)


def _step3p7(
    module: Any, project: Project, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    ids = top_k_index.reshape(-1)
    y = project(_DOWN, module._apply_gate(project(_UP, hidden_states, ids)), ids)
    return _combined(y, top_k_index, top_k_weights).to(hidden_states.dtype)


def _longcat_flash(
    module: Any, project: Project, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The last experts are the identity; the weights that ``gate_up_proj`` has for them are not used."""
    last, ids = module.num_routed_experts, top_k_index.reshape(-1)
    own = torch.where(ids < last, ids, module.total_experts)
    y = _combined(project(_DOWN, _gated(module, project(_UP, hidden_states, own)), own), top_k_index, top_k_weights)
    kept = top_k_weights.masked_fill(top_k_index < last, 0.0).sum(-1, keepdim=True)
    return (y + hidden_states * kept).to(hidden_states.dtype)


def _inkling_stacks(module: Any) -> dict[str, ExpertStack]:
    return {name: ExpertStack() for name in ("gate_proj", "up_proj", _DOWN)}


def _inkling(module: Any, project: Project, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """Every token goes to all experts."""
    x, count = hidden_states.reshape(-1, hidden_states.shape[-1]), module.n_shared_experts
    ids = torch.arange(count, device=x.device).repeat(len(x))
    x = module.act_fn(project("gate_proj", x, ids)) * project("up_proj", x, ids) * gammas.reshape(-1, 1)
    y = project(_DOWN, x, ids).view(-1, count, hidden_states.shape[-1])
    return y.float().sum(1).to(hidden_states.dtype).view(hidden_states.shape)
