"""A weight of family ``packed`` as its ops take it, and the reference of what they do.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] (+ outlier S[n, k]),    g = k // group_size
    w[n, k] = code[n, k] * scale[n, g] - minimum[n, g] (+ outlier S[n, k])    with minima

where scales and minima may be codes times factors, ``scale[n, g] = factor[n, g // scale_block] * code of the scale``.
Integer zeros may be packed, which the shape of their tensor says.
The tensors are those of :class:`lowbit.packed.format.PackedFormat`. The weight is float32: the product is rounded once,
the sum with an outlier once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import gradients
from lowbit.backends.operands import Activation, CodedOperands
from lowbit.backends.reference import quantize_activations, sum_per_scale
from lowbit.core.activations import ActivationSpec
from lowbit.core.bitpack import bytes_per_row, unpack_bytes


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
    ``2**(bits-1)``. Integer zeros may be packed in ``bits`` bits each: uint8 ``[N, ceil(G*bits/8)]``, fewer than G.

    minimum: ``zeros`` holds minima, of the dtype of scales.
    scale_block: groups that share a factor; 0: scales of one level. Else ``scales`` holds uint8 or int8 codes and
        ``scale_factors`` floats ``[N, ceil(G / scale_block)]``, or with ``scale_block = G`` ``[1, 1]``; minima are
        uint8 codes beside ``zero_factors``.
    """

    scales: Tensor
    zeros: Tensor | None
    scale_factors: Tensor | None = None
    zero_factors: Tensor | None = None
    minimum: bool = False
    scale_block: int = 0

    family = "packed"
    differentiable = ("scales", "zeros", "scale_factors", "zero_factors", "outlier_values")
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
        if self.scale_block:
            self._check_factors(groups)
        else:
            torch._check(scales.is_floating_point(), lambda: f"scales must be floating point: got {scales.dtype}")
            torch._check(
                self.scale_factors is None and self.zero_factors is None,
                lambda: "scale_factors and zero_factors need scale_block: got scale_block=0",
            )
        torch._check(
            not self.minimum or zeros is not None, lambda: "minimum=True needs zeros, which hold the minima: got None"
        )
        if zeros is not None:
            packed_shape = (packed.shape[0], bytes_per_row(groups, self.bits))
            torch._check(
                zeros.shape == scales.shape or (self.packed_zeros and zeros.shape == packed_shape),
                lambda: f"zeros must have the shape of scales {tuple(scales.shape)}"
                f"{f', or packed {list(packed_shape)}' if self.packed_zeros else ''}: got {tuple(zeros.shape)}",
            )

    @property
    def packed_zeros(self) -> bool:
        """Whether zeros take ``bits`` bits each: their rows are then shorter than those of scales."""
        zeros = self.zeros
        return (
            zeros is not None and zeros.dtype == torch.uint8 and not self.minimum and zeros.dim() == 2
            and zeros.shape[1] < self.scales.shape[1]
        )  # fmt: skip

    def _check_factors(self, groups: int) -> None:
        scales, zeros, block = self.scales, self.zeros, self.scale_block
        torch._check(
            1 <= block <= groups,
            lambda: f"scale_block must be between 1 and G: got scale_block={block}, G={groups}",
        )
        torch._check(
            scales.dtype in (torch.uint8, torch.int8),
            lambda: f"scales must be uint8 or int8 beside scale_factors: got {scales.dtype}",
        )
        torch._check(
            (self.zero_factors is not None) == self.minimum,
            lambda: "zero_factors must be given with minimum=True and scale_block, and only then",
        )
        torch._check(
            not self.minimum or (zeros is not None and zeros.dtype == torch.uint8),
            lambda: f"zeros must be uint8 beside zero_factors: got {None if zeros is None else zeros.dtype}",
        )
        first, one = self.scale_factors, self._one_factor
        torch._check(
            not one or block == groups,
            lambda: f"scale_factors of one row need scale_block=G: got scale_block={block}, G={groups}",
        )
        shape = (1 if one else self.out_features, -(-groups // block))
        for name, t in (("scale_factors", first), ("zero_factors", self.zero_factors)):
            torch._check(
                name == "zero_factors" if t is None else t.shape == shape and t.is_floating_point(),
                lambda name=name, t=t: f"{name} must be floating point {list(shape)}: "
                f"got {None if t is None else (t.dtype, tuple(t.shape))}",
            )

    def _values_at(self, rows: slice | Tensor) -> dict[str, Any]:
        if self.scales.shape[0] == 1 and not self.scale_block:  # one per tensor
            return {}
        names = ("scales", "zeros") if self._one_factor else ("scales", "zeros", "scale_factors", "zero_factors")
        return {
            name: None if tensor is None else tensor[rows] for name in names for tensor in [getattr(self, name)]
        }

    @property
    def _one_factor(self) -> bool:
        """Whether all rows share a factor."""
        return self.scale_factors is not None and len(self.scale_factors) == 1 and self.out_features > 1

    def _factors(self, factors: Tensor | None) -> Tensor:
        """float32 ``[N, G]``, of each group; one for all rows ``[1, G]``."""
        assert factors is not None
        groups = self.scales.shape[1]
        return factors.float().index_select(1, torch.arange(groups, device=self.device) // self.scale_block)

    def decoded_scales(self) -> Tensor:
        """The scales as floats: float32 of two levels, else as they are."""
        return self.scales if not self.scale_block else self._factors(self.scale_factors) * self.scales.float()

    def decoded_zeros(self) -> Tensor | None:
        """The zeros, or minima: float32 of two levels, else as they are; packed ones with a byte for each."""
        if self.zeros is not None and self.packed_zeros:
            return unpack_bytes(self.zeros, self.bits, self.scales.shape[1])
        if self.zeros is None or self.zero_factors is None:
            return self.zeros
        return self._factors(self.zero_factors) * self.zeros.float()

    def decoded(self) -> PackedOperands:
        """The same weight with scales and minima of one level, and zeros that are not packed."""
        if not self.scale_block and not self.packed_zeros:
            return self
        return replace(
            self, scales=self.decoded_scales(), zeros=self.decoded_zeros(), scale_factors=None, zero_factors=None,
            scale_block=0,
        )  # fmt: skip

    def _centered(self, group: Tensor) -> Tensor:
        """``code - zero``, or the code beside minima, as float32 ``[N, K]``; ``group[k]`` is the group of column k."""
        codes = self.codes(len(group)).float()
        if self.minimum:
            return codes
        zeros = self.decoded_zeros()
        if zeros is None:
            return codes - (1 << (self.bits - 1))
        return codes - zeros.float().index_select(1, group)

    def coded_part(self, k: int) -> Tensor:
        group = self.groups(k)
        products = self._centered(group) * self.decoded_scales().float().index_select(1, group)
        minima = self.decoded_zeros() if self.minimum else None
        return products if minima is None else products - minima.float().index_select(1, group)

    def int8_products(self, q: Tensor, inverse: Tensor, activation: Activation) -> Tensor:
        """Integer dot products (exact in float64) of each run of columns that share a scale of the weight and one of x,
        then ``sum_runs dot * scale / inverse`` in float32; where x has one scale, it divides the sum. Beside minima
        ``dot * scale - sum q * minimum`` is rounded once."""
        q, k = q.double(), q.shape[-1]
        x_group = activation.x_group if isinstance(activation, PackedActivation) and activation.x_group < k else 0
        codes = self.codes(k).double()
        y = torch.zeros(q.shape[0], self.out_features, dtype=torch.float32, device=q.device)
        size = min(self.group_size, x_group or k)
        scales, zeros = self.decoded_scales(), self.decoded_zeros()
        for start in range(0, k, size):
            run, g = slice(start, min(start + size, k)), start // self.group_size
            zero: Tensor | float = float(1 << (self.bits - 1)) if zeros is None else zeros[:, g].double()
            dot, of_x = q[:, run] @ codes[:, run].t(), q[:, run].sum(-1, keepdim=True)
            if self.minimum:
                part = (dot * scales[:, g].double() - of_x * zero).float()
            else:
                part = (dot - of_x * zero).float() * scales[:, g].float()
            y += part / inverse[:, start // x_group, None] if x_group else part
        return y if x_group else y / inverse

    def summed(self, wanted: Collection[str]) -> set[str]:
        names = {"scales", "zeros"} if self.zeros is not None else {"scales"}
        return {name for name in names if name in wanted or f"{name[:-1]}_factors" in wanted}

    def sums(self, d: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """scales: ``sum_group D·(code − zero)``; zeros: ``sum_group D``."""
        group, found = self.groups(d.shape[1]), {}
        if "zeros" in names:
            found["zeros"] = sum_per_scale(d, self.scales, group)
        if "scales" in names:
            found["scales"] = sum_per_scale(d * self._centered(group), self.scales, group)
        return found

    def final_sums(self, d: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        found, k = {}, d.shape[1]
        if "zeros" in names:
            found["zeros"] = gradients.sum_per_group(d, self.group_size)
        if "scales" in names:  # beside minima codes are as they are: their zero is 0
            zeros = torch.zeros_like(self.scales, dtype=torch.uint8) if self.minimum else self.zeros
            unscaled = replace(self, scales=torch.ones_like(self.scales), zeros=zeros, minimum=False)
            centered = torch.ops.lowbit.packed_dequantize(*unscaled, k, torch.float32)
            found["scales"] = gradients.sum_per_group(d.mul_(centered), self.group_size)
        one = len(self.scales) == 1
        return {name: t.sum(0, keepdim=True) if one else t for name, t in found.items()}

    def gradients(self, sums: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor | None]:
        """``d scale = sum_group D·(code − zero)``, ``d zero = −scale · sum_group D``; ``d minimum = −sum_group D``.
        Of a factor: the sum over its groups of ``code of the scale · d scale``."""
        found: dict[str, Tensor | None] = {}
        scales, zeros = self.scales, self.zeros

        def of_factors(factors: Tensor, codes: Tensor, of_groups: Tensor) -> Tensor:
            block = torch.arange(codes.shape[1], device=of_groups.device) // self.scale_block
            sums = of_groups.new_zeros(codes.shape[0], factors.shape[1])
            sums = sums.index_add(1, block, codes.float() * of_groups)
            return (sums.sum(0, keepdim=True) if self._one_factor else sums).to(factors.dtype)

        if "scales" in sums:
            if self.scale_factors is None:
                found["scales"] = sums["scales"].to(scales.dtype)
            else:
                found["scale_factors"] = of_factors(self.scale_factors, scales, sums["scales"])
        if "zeros" in sums and zeros is not None:
            if self.zero_factors is not None:
                found["zero_factors"] = of_factors(self.zero_factors, zeros, -sums["zeros"])
            else:
                of_zeros = -sums["zeros"] if self.minimum else -self.decoded_scales().float() * sums["zeros"]
                found["zeros"] = of_zeros.to(zeros.dtype)
        return found

    def coded_tangent(self, k: int, tangents: Mapping[str, Tensor]) -> list[Tensor]:
        """``(code − zero) · scale' − zero' · scale``; beside minima ``code · scale' − minimum'``."""
        parts, group = [], self.groups(k)
        if "scales" in tangents:
            parts.append(self._centered(group) * tangents["scales"].float().index_select(1, group))
        if "scale_factors" in tangents:
            moved = self._factors(tangents["scale_factors"]) * self.scales.float()
            parts.append(self._centered(group) * moved.index_select(1, group))
        if "zeros" in tangents:
            moved = -tangents["zeros"].float() * (1.0 if self.minimum else self.decoded_scales().float())
            parts.append(moved.index_select(1, group).expand(self.out_features, -1))
        if "zero_factors" in tangents and self.zeros is not None:
            moved = -self._factors(tangents["zero_factors"]) * self.zeros.float()
            parts.append(moved.index_select(1, group))
        return parts
