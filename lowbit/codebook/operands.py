"""A weight of family ``codebook`` as its ops take it, and the reference of what they do.

    w[n, k] = codebook[tn, tg, code[n, k]] (* scale[n, g]) (+ outlier S[n, k]),    g = k // group_size

The weight is float32: the product is rounded once, the sum with an outlier once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import gradients
from lowbit.backends.layouts import CANONICAL
from lowbit.backends.operands import Activation, CodedOperands
from lowbit.backends.reference import sum_per_scale
from lowbit.codebook.format import NESTED_BLOCK
from lowbit.core.family import FLOAT_DTYPES

_LARGEST_FIXED = 32767  # int8 activations meet weights of 16 bits


@dataclass(frozen=True, kw_only=True)
class CodebookOperands(CodedOperands):
    """With G = ceil(K / group_size):

    * ``codebook`` float: one table per tensor ``[1, 1, 2**bits]``, row ``[N, 1, 2**bits]`` or group
      ``[N, G, 2**bits]``.
    * ``scales`` float ``[N, G]``, optional. Or nested, as in bitsandbytes' double quantization: ``scales`` is uint8
      and, with ``scale_codebook`` ``[256]``, ``scale_absmax`` ``[ceil(N*G/256)]`` and ``scale_offset`` ``[1]``, all
      float32, ``scale[n, g] = scale_codebook[scales[n, g]] * scale_absmax[(n*G + g) // 256] + scale_offset``.
    """

    codebook: Tensor
    scales: Tensor | None
    scale_codebook: Tensor | None
    scale_absmax: Tensor | None
    scale_offset: Tensor | None

    family = "codebook"
    differentiable = ("codebook", "scales", "scale_codebook", "scale_absmax", "scale_offset", "outlier_values")
    min_bits = 1

    def check(self, k: int) -> None:
        self.check_codes(k)
        codebook, scales, bits, group_size = self.codebook, self.scales, self.bits, self.group_size
        n, groups, entries = self.out_features, -(-k // group_size), 1 << bits
        torch._check(
            codebook.dim() == 3
            and codebook.shape[2] == entries
            and (codebook.shape[1] == 1 or codebook.shape[1] == groups)
            and (codebook.shape[0] == n or (codebook.shape[0] == 1 and codebook.shape[1] == 1)),
            lambda: f"codebook must be [1, 1, {entries}], [N, 1, {entries}] or [N, {groups}, {entries}] for "
            f"bits={bits}, N={n}, K={k}, group_size={group_size}: got shape {tuple(codebook.shape)}",
        )
        torch._check(
            codebook.dtype in FLOAT_DTYPES.values(),
            lambda: f"codebook must be float32, float16 or bfloat16: got {codebook.dtype}",
        )
        given = sum(t is not None for t in (self.scale_codebook, self.scale_absmax, self.scale_offset))
        torch._check(given in (0, 3), lambda: "scale_codebook, scale_absmax and scale_offset must be given together")
        torch._check(
            scales is not None or not given,
            lambda: "scales must be given with scale_codebook, scale_absmax and scale_offset",
        )
        if scales is None:
            return
        torch._check(
            scales.dim() == 2 and scales.shape[0] == n and scales.shape[1] == groups,
            lambda: f"scales must be [N, {groups}] for N={n}, K={k}, group_size={group_size}: "
            f"got shape {tuple(scales.shape)}",
        )
        if not given:
            torch._check(
                scales.dtype in FLOAT_DTYPES.values(),
                lambda: f"scales must be float32, float16 or bfloat16 without scale_codebook: got {scales.dtype}",
            )
            return
        torch._check(
            scales.dtype == torch.uint8, lambda: f"scales must be uint8 with scale_codebook: got {scales.dtype}"
        )
        _check_nested("scale_codebook", self.scale_codebook, 256)
        _check_nested("scale_absmax", self.scale_absmax, (n * groups + 255) // 256)
        _check_nested("scale_offset", self.scale_offset, 1)

    def decoded(self) -> CodebookOperands:
        """Nested scales as float32 ``[N, G]``: the definition of the nested form."""
        scales, table, absmax, offset = self.scales, self.scale_codebook, self.scale_absmax, self.scale_offset
        if scales is None:
            return self
        if table is None or absmax is None or offset is None:
            return replace(self, scales=scales.float())
        code, block = self._nested_entries(scales)
        values = (table.index_select(0, code) * absmax.index_select(0, block) + offset).view(scales.shape)
        return replace(self, scales=values, scale_codebook=None, scale_absmax=None, scale_offset=None)

    def expert(self, index: int, num_experts: int) -> CodebookOperands:
        if self.scales is None or self.scale_absmax is None:
            return super().expert(index, num_experts)
        count = self.scales.numel() // num_experts
        if count % NESTED_BLOCK:
            return self.decoded().expert(index, num_experts)
        blocks = count // NESTED_BLOCK
        own = self.scale_absmax[index * blocks : (index + 1) * blocks]
        return replace(super().expert(index, num_experts), scale_absmax=own)

    @staticmethod
    def _nested_entries(scales: Tensor) -> tuple[Tensor, Tensor]:
        """Of each nested scale: its place in ``scale_codebook`` and in ``scale_absmax``."""
        return scales.reshape(-1).to(torch.int64), torch.arange(scales.numel(), device=scales.device) // 256

    def _values_at(self, rows: slice | Tensor) -> dict[str, Any]:
        return {
            "codebook": self.codebook if self.codebook.shape[0] == 1 else self.codebook[rows],
            "scales": None if self.scales is None else self.scales[rows],
        }

    def coded_part(self, k: int) -> Tensor:
        weight = self._table_values(self.codebook, self._entry(k))
        return weight if self.scales is None else weight * self.scales.index_select(1, self.groups(k))

    def _entry(self, k: int) -> Tensor:
        """The entry of each weight among those of its row's tables, int64 ``[N, K]``."""
        codes = self.codes(k).to(torch.int64)
        return codes if self.codebook.shape[1] == 1 else codes + (self.groups(k) << self.bits)

    def _table_values(self, tables: Tensor, entry: Tensor) -> Tensor:
        rows, groups, entries = tables.shape
        return tables.float().reshape(rows, groups * entries).expand(entry.shape[0], -1).gather(1, entry)

    def int8_products(self, q: Tensor, inverse: Tensor, activation: Activation) -> Tensor:
        fixed, step = self._fixed_point(self.coded_part(q.shape[-1]))
        sums = q.double() @ fixed.double().t()  # exact
        return sums.float() * step.t() / inverse

    def _fixed_point(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``weight`` as integers in -32767..32767 (held as float32) and the float32 step ``[N, 1]`` of each row.

        ``step = (max_g |scale| * max |entry of the row's tables|) / 32767``, 1 where that is below ``2**-126``;
        ``T = round(weight * (1 / step))``, halves to even.
        """
        peak = self.codebook.float().abs().amax((1, 2)).expand(weight.shape[0])
        if self.scales is not None:
            peak = self.scales.abs().amax(1) * peak
        step = (peak / _LARGEST_FIXED).unsqueeze(1)
        step = torch.where(step < 2.0**-126, 1.0, step)
        return (weight * step.reciprocal()).round().clamp(-_LARGEST_FIXED, _LARGEST_FIXED), step

    def summed(self, wanted: Collection[str]) -> set[str]:
        names = {"codebook"} & {*wanted}
        of_scales = self.scales is not None and any(name.startswith("scale") for name in wanted)
        return names | {"scales"} if of_scales else names

    def sums(self, d: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """codebook: D·scale over the weights of an entry; scales: ``sum_group D·codebook[code]``."""
        found = {}
        group, entry, scales = self.groups(d.shape[1]), self._entry(d.shape[1]), self.scales
        if "codebook" in names:
            scaled = d if scales is None else d * scales.float().index_select(1, group)
            found["codebook"] = self._per_entry(scaled, entry)
        if "scales" in names and scales is not None:
            found["scales"] = sum_per_scale(d * self._table_values(self.codebook, entry), scales, group)
        return found

    def final_sums(self, d: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        k = d.shape[1]
        if "codebook" in names:
            by_code = self._sums_by_code(d, k)
            found |= self.sums(d, {"codebook"}) if by_code is None else {"codebook": by_code}
        if "scales" in names:
            unscaled = replace(self, scales=None)
            values = torch.ops.lowbit.codebook_dequantize(*unscaled, k, torch.float32)
            found["scales"] = gradients.sum_per_group(d.mul_(values), self.group_size)
        return found

    def _sums_by_code(self, d: Tensor | None, k: int) -> Tensor | None:
        """What :meth:`sums` says of the codebook, or of D without scales that is 1 everywhere, by the compiled kernel;
        None where there is none."""
        kernel = gradients.compiled("sums_by_code", self.packed)
        if kernel is None or self._layout() is not CANONICAL:
            return None
        scales = None if d is None or self.scales is None else self.scales.float().contiguous()
        rows, groups, _ = self.codebook.shape
        sums = kernel(d, self.packed.contiguous(), scales, self.bits, k, self.group_size, groups > 1)
        return sums.sum(0, keepdim=True) if rows == 1 else sums

    def gradients(self, sums: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor | None]:
        """d codebook: the sum of D·scale over the weights of an entry; ``d scale = sum_group D·codebook[code]``."""
        found: dict[str, Tensor | None] = {}
        if "codebook" in sums:
            found["codebook"] = sums["codebook"].to(self.codebook.dtype)
        scales, table, absmax = self.scales, self.scale_codebook, self.scale_absmax
        if scales is None or "scales" not in sums:
            return found
        if table is None or absmax is None:
            return {**found, "scales": sums["scales"].to(scales.dtype)}
        code, block = self._nested_entries(scales)
        of_scales = sums["scales"].reshape(-1)
        of_table, of_absmax = of_scales * absmax.index_select(0, block), of_scales * table.index_select(0, code)
        found["scale_codebook"] = of_scales.new_zeros(table.shape).index_add_(0, code, of_table)
        found["scale_absmax"] = of_scales.new_zeros(absmax.shape).index_add_(0, block, of_absmax)
        found["scale_offset"] = of_scales.sum().reshape(1)
        return found

    def coded_tangent(self, k: int, tangents: Mapping[str, Tensor]) -> list[Tensor]:
        """``codebook'[code] · scale + codebook[code] · scale'``."""
        parts, group, entry = [], self.groups(k), self._entry(k)
        if "codebook" in tangents:
            moved, scale = self._table_values(tangents["codebook"], entry), self.decoded().scales
            parts.append(moved if scale is None else moved * scale.index_select(1, group))
        if (moved_scales := self._scales_tangent(tangents)) is not None:
            parts.append(self._table_values(self.codebook, entry) * moved_scales.index_select(1, group))
        return parts

    def _scales_tangent(self, tangents: Mapping[str, Tensor]) -> Tensor | None:
        if "scales" in tangents:
            return tangents["scales"].float()
        parts, scales, table, absmax = [], self.scales, self.scale_codebook, self.scale_absmax
        if scales is None or table is None or absmax is None:
            return None
        code, block = self._nested_entries(scales)
        if "scale_codebook" in tangents:
            parts.append(tangents["scale_codebook"].index_select(0, code) * absmax.index_select(0, block))
        if "scale_absmax" in tangents:
            parts.append(table.index_select(0, code) * tangents["scale_absmax"].index_select(0, block))
        if "scale_offset" in tangents:
            parts.append(tangents["scale_offset"].expand(scales.numel()))
        return sum(parts[1:], parts[0]).view(scales.shape) if parts else None

    def _per_entry(self, t: Tensor, entry: Tensor) -> Tensor:
        """``t [N, K]`` summed over the weights that use an entry, in the shape of the codebook."""
        sums = t.new_zeros(t.shape[0], self.codebook.shape[1] * self.codebook.shape[2]).scatter_add_(1, entry, t)
        return (sums.sum(0, keepdim=True) if self.codebook.shape[0] == 1 else sums).view(self.codebook.shape)

    def uses(self, k: int) -> Tensor:
        """How many weights use each entry, float32 in the shape of the codebook."""
        counts = self._sums_by_code(None, k) if gradients.is_plain(self.packed, self.codebook) else None
        if counts is not None:
            return counts
        entry = self._entry(k)
        return self._per_entry(torch.ones(entry.shape, dtype=torch.float32, device=entry.device), entry)


def _check_nested(name: str, t: Tensor | None, size: int) -> None:
    if t is not None:
        torch._check(
            t.dim() == 1 and t.shape[0] == size, lambda: f"{name} must be of shape [{size}]: got {tuple(t.shape)}"
        )
        torch._check(t.dtype == torch.float32, lambda: f"{name} must be float32: got {t.dtype}")
