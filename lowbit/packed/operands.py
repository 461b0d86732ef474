"""A weight of family ``packed`` as its ops take it, and the reference of what they do.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] (+ outlier S[n, k]),    g = k // group_size

The tensors are those of :class:`lowbit.packed.format.PackedFormat`. The weight is float32: the product is rounded once,
the sum with an outlier once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.operands import Activation, CodedOperands
from lowbit.backends.reference import quantize_activations, sum_per_scale
from lowbit.core.activations import ActivationSpec


@dataclass(frozen=True, kw_only=True)
class PackedActivation(Activation):
    """``x_group``: of dynamic int8 activations, columns that share a scale with their row; 0: the whole row."""

    x_group: int = 0

    @classmethod
    def numbers_of(cls, spec: ActivationSpec) -> tuple[Any, ...]:
        return (*super().numbers_of(spec), spec.activation_group_size or 0)

    def check(self, group_size: int, k: int) -> None:
        x_group = self.x_group
        if x_group == 0:
            return
        torch._check(
            x_group > 0 and x_group % 32 == 0,
            lambda: f"x_group must be 0 (one scale per row of x) or a positive multiple of 32: got x_group={x_group}",
        )
        torch._check(
            self.int8 and self.x_scale is None,
            lambda: "x_group is for int8 activations quantized when called: "
            f"got x_group={x_group} with {'x_scale' if self.int8 else 'int8=False'}",
        )
        torch._check(
            group_size >= k or group_size % x_group == 0 or x_group % group_size == 0,
            lambda: "x_group must divide group_size or be a multiple of it: "
            f"got x_group={x_group}, group_size={group_size}",
        )

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_activations(x, self.x_scale, self.x_group if self.x_group < x.shape[1] else 0)


@dataclass(frozen=True, kw_only=True)
class PackedOperands(CodedOperands):
    """``scales`` and the optional ``zeros``: ``[N, G]``, or ``[1, 1]`` for all; without zeros they are
    ``2**(bits-1)``."""

    scales: Tensor
    zeros: Tensor | None

    family = "packed"
    differentiable = ("scales", "zeros", "outlier_values")
    min_bits = 2
    activation = PackedActivation

    def check(self, k: int) -> None:
        self.check_codes(k)
        packed, scales, zeros = self.packed, self.scales, self.zeros
        groups = -(-k // self.group_size)
        torch._check(
            scales.dim() == 2
            and (scales.shape[0] == packed.shape[0] or scales.shape[0] == 1)
            and scales.shape[1] == groups,
            lambda: f"scales must be [N, {groups}] or [1, 1] for N={packed.shape[0]}, K={k}, "
            f"group_size={self.group_size}: got shape {tuple(scales.shape)}",
        )
        torch._check(scales.is_floating_point(), lambda: f"scales must be floating point: got {scales.dtype}")
        if zeros is not None:
            torch._check(
                zeros.shape == scales.shape,
                lambda: f"zeros must have the shape of scales {tuple(scales.shape)}: got {tuple(zeros.shape)}",
            )

    def _values_at(self, rows: slice | Tensor) -> dict[str, Any]:
        if self.scales.shape[0] == 1:  # one per tensor
            return {}
        return {"scales": self.scales[rows], "zeros": None if self.zeros is None else self.zeros[rows]}

    def _centered(self, group: Tensor) -> Tensor:
        """``code - zero`` as float32 ``[N, K]``; ``group[k]`` is the group of column k."""
        codes = self.codes(len(group)).float()
        if self.zeros is None:
            return codes - (1 << (self.bits - 1))
        return codes - self.zeros.float().index_select(1, group)

    def coded_part(self, k: int) -> Tensor:
        group = self.groups(k)
        return self._centered(group) * self.scales.float().index_select(1, group)

    def int8_products(self, q: Tensor, inverse: Tensor, activation: Activation) -> Tensor:
        """Integer dot products (exact in float64) of each run of columns that share a scale of the weight and one of x,
        then ``sum_runs dot * scale / inverse`` in float32; where x has one scale, it divides the sum."""
        q, k = q.double(), q.shape[-1]
        x_group = activation.x_group if isinstance(activation, PackedActivation) and activation.x_group < k else 0
        codes = self.codes(k).double()
        y = torch.zeros(q.shape[0], self.out_features, dtype=torch.float32, device=q.device)
        size = min(self.group_size, x_group or k)
        for start in range(0, k, size):
            run, g = slice(start, min(start + size, k)), start // self.group_size
            zero: Tensor | float = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros[:, g].double()
            dot = q[:, run] @ codes[:, run].t() - q[:, run].sum(-1, keepdim=True) * zero
            part = dot.float() * self.scales[:, g].float()
            y += part / inverse[:, start // x_group, None] if x_group else part
        return y if x_group else y / inverse

    def gradients(self, d: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """``d scale = sum_group D·(code − zero)``, ``d zero = −scale · sum_group D``."""
        found: dict[str, Tensor | None] = {}
        scales, zeros, group = self.scales, self.zeros, self.groups(d.shape[1])
        if "scales" in wanted:
            found["scales"] = sum_per_scale(d * self._centered(group), scales, group).to(scales.dtype)
        if "zeros" in wanted and zeros is not None:
            found["zeros"] = (-scales.float() * sum_per_scale(d, scales, group)).to(zeros.dtype)
        return found

    def coded_tangent(self, k: int, tangents: Mapping[str, Tensor]) -> list[Tensor]:
        """``(code − zero) · scale' − zero' · scale``."""
        parts, group = [], self.groups(k)
        if "scales" in tangents:
            parts.append(self._centered(group) * tangents["scales"].float().index_select(1, group))
        if "zeros" in tangents:
            moved = (-tangents["zeros"].float() * self.scales.float()).index_select(1, group)
            parts.append(moved.expand(self.out_features, -1))
        return parts
