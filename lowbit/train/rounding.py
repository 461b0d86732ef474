"""Linear layers whose rounding is learned: codes, with the scales, zeros or tables beside them.

    code = that of the value nearest to  w + offset * step

w: the float weight; ``offset`` ``[N, K]`` is learned, in steps of the grid or table (SignRound: Cheng et al., arXiv
2309.05516). The gradient goes straight through the rounding (Bengio et al., arXiv 1308.3432), though not past the ends
of the grid. Scales and zeros learn as in LSQ+ (Bhalgat et al., arXiv 2004.09576).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.backends.reference import csr_places
from lowbit.codebook.operands import CodebookOperands
from lowbit.core.bitpack import pack
from lowbit.nn.layer import Layer
from lowbit.nn.linear import LinearLayer
from lowbit.packed.operands import PackedOperands

_INSIDE = 0.49  # steps from its code, where learning begins for a weight that another code is nearer to
_SMALLEST = 0.1  # of its first value: no scale becomes less


def why_not(layer: Layer) -> str | None:
    """Why the rounding of a packed layer cannot be learned; ``None`` where it can."""
    if not isinstance(layer, LinearLayer) or layer.family not in _CLASSES:
        return f"the codes of a {layer.family} {layer.kind} are not learned"
    if getattr(layer.format, "act_order", False):
        return "act_order: its columns are in another order"
    if getattr(layer.format, "scales", None) == "nested":
        return "its scales have a table of their own"
    if layer.device.type == "meta":
        return "its tensors are elsewhere (meta)"
    return None


def rounding_of(layer: LinearLayer, weight: Tensor) -> Rounding:
    """The module that learns how to round ``weight`` ``[N, K]`` to the form of ``layer``; it begins with its codes."""
    return _CLASSES[layer.family](layer, weight)


class Rounding(nn.Module):
    """``y = x @ W.T + bias`` with W as it will be stored.

    Attributes:
        layer: the packed layer, which stays as it is.
        offsets: a Parameter, ``[N, K]``.
    """

    offsets: nn.Parameter

    def __init__(self, layer: LinearLayer, weight: Tensor) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a part of this module
        self.float_weight = weight.detach().to(layer.device, torch.float32)
        operands: Any = layer.operands_class.of(layer.weight_arguments(layer.operands()))
        self.operands = operands
        self.places: Tensor | None = None
        if operands.outlier_values is not None:  # these weights stay what they are
            self.places = csr_places(operands.outlier_columns, operands.outlier_rows, layer.format.in_features)
            self.apart = layer.dequantize(torch.float32).flatten()[self.places]

    layer: LinearLayer

    def coded(self) -> Tensor:
        """What the codes stand for, float32 ``[N, K]``; differentiable."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the layer is to store, as files have it."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """W, float32."""
        coded = self.coded()
        if self.places is None:
            return coded
        return coded.flatten().index_put((self.places,), self.apart).view_as(coded)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.layer.bias
        if self.layer.format.activations != "float":
            x = self._as_int8(x)
        return nn.functional.linear(x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _as_int8(self, x: Tensor) -> Tensor:
        layer, kind = self.layer, cast(Any, self.layer.operands_class.activation)
        own = {name: layer._buffers[name] for name in kind.tensor_names}
        numbers = [name for name in kind.types if name not in own]
        activation = kind(**own, **dict(zip(numbers, layer._activation, strict=True)))
        rows = x.detach().reshape(-1, x.shape[-1])
        q, inverse = activation.quantize(rows)
        if inverse.shape[1] > 1:
            inverse = inverse.repeat_interleave(activation.x_group, 1)[:, : rows.shape[1]]
        return straight_through(x, (q / inverse).to(x.dtype).view_as(x))

    def _with_the_rest(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With what is stored besides; outliers are what the codes leave of their weights."""
        found = self.layer.canonical() | tensors
        if self.places is not None:
            values = found["outlier_values"]
            limits = torch.finfo(values.dtype)
            rest = self.apart - self.coded().flatten()[self.places]
            found["outlier_values"] = rest.clamp(limits.min, limits.max).to(values.dtype)
        return found


def straight_through(value: Tensor, held: Tensor) -> Tensor:
    """``held``, with the gradient of ``value``."""
    return value + (held - value).detach()


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


class PackedRounding(Rounding):
    """``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``; learned are offsets, scales, and float zeros or minima.

    ``scales`` and ``zeros`` are relative to the first ones: scale = first * scales, zero = first + zeros.
    """

    operands: PackedOperands

    def __init__(self, layer: LinearLayer, weight: Tensor) -> None:
        super().__init__(layer, weight)
        format: Any = layer.format
        self.bottom, self.top = 1 if format.zeros == "none" else 0, (1 << format.bits) - 1
        first = self.operands.decoded_scales().float().contiguous()
        zeros = self.operands.decoded_zeros()
        if zeros is None:
            zeros = torch.full_like(first, 1 << (format.bits - 1))
        zeros = zeros.float().contiguous()
        self.first, self.first_zeros = first, zeros / _nonzero(first) if self.operands.minimum else zeros
        codes = self.operands.codes(format.in_features).float()
        exact = _nearest(self.float_weight, 0.0, self._columns(first), self._columns(zeros), self.operands.minimum)
        # what lies beyond the ends of the grid stays there
        low = torch.where(codes <= self.bottom, -torch.inf, codes - _INSIDE)
        high = torch.where(codes >= self.top, torch.inf, codes + _INSIDE)
        self.offsets = nn.Parameter(exact.maximum(low).minimum(high) - exact)
        self.scales = nn.Parameter(torch.ones_like(first))
        self.zeros = nn.Parameter(torch.zeros_like(first)) if format.zeros in ("float", "minimum") else None

    def _columns(self, values: Tensor) -> Tensor:
        """Values of groups as those of columns: broadcastable to ``[N, K]``."""
        if values.shape[1] == 1:
            return values
        format: Any = self.layer.format
        return values.unsqueeze(-1).expand(-1, -1, format.group_size).flatten(1)[:, : format.in_features]

    def grid(self) -> tuple[Tensor, Tensor]:
        """(scales, zeros or minima) as they will be stored, float32; the gradient goes straight through that."""
        scale = self.first * self.scales.clamp(min=_SMALLEST)
        scale = straight_through(scale, self._held("scales", scale.detach())[1])
        if self.zeros is None:
            return scale, self.first_zeros
        zero = self.first_zeros + self.zeros
        zero = zero * scale if self.operands.minimum else zero
        return scale, straight_through(zero, self._held("zeros", zero.detach())[1])

    def _held(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """(what is stored of scales or zeros, what that stands for)."""
        dtype = cast(Tensor, self.layer._tensor(name)).dtype
        factors = getattr(self.operands, f"{name[:-1]}_factors")
        if factors is None:
            limits = torch.finfo(dtype)
            stored = values.clamp(limits.tiny if name == "scales" else limits.min, limits.max).to(dtype)
            return stored, stored.float()
        factor, whole = self.operands._factors(factors), torch.iinfo(dtype)
        least = 1 if name == "scales" and whole.min == 0 else whole.min
        codes = (values / _nonzero(factor)).round().clamp(least, whole.max)
        return codes.to(dtype), factor * codes

    def coded(self) -> Tensor:
        scale, zero = map(self._columns, self.grid())
        limits = self.bottom, self.top, self.operands.minimum
        found: Tensor = _PackedRound.apply(self.float_weight, self.offsets, scale, zero, *limits)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        scale, zero = self.grid()
        columns = self._columns(scale), self._columns(zero)
        exact = _nearest(self.float_weight, self.offsets, *columns, self.operands.minimum)
        codes = exact.round_().clamp_(self.bottom, self.top).to(torch.uint8)
        found = {"packed": pack(codes, self.operands.bits), "scales": self._held("scales", scale)[0]}
        if self.zeros is not None:
            found["zeros"] = self._held("zeros", zero)[0]
        return self._with_the_rest(found)


def _nearest(w: Tensor, offsets: Tensor | float, scale: Tensor, zero: Tensor, minimum: bool) -> Tensor:
    """The code, before it is rounded."""
    scale = _nonzero(scale)
    return (w + zero) / scale + offsets if minimum else w / scale + zero + offsets


class _PackedRound(torch.autograd.Function):
    """``(w, offsets, scale, zero) -> (code - zero) * scale``, or with minima ``code * scale - zero``."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, offsets: Tensor, scale: Tensor, zero: Tensor, bottom: int, top: int, minimum: bool
    ) -> Tensor:
        code = _nearest(w, offsets, scale, zero, minimum).round_().clamp_(bottom, top)
        ctx.save_for_backward(w, offsets, scale, zero)
        ctx.limits, ctx.minimum = (bottom, top), minimum
        return code * scale - zero if minimum else (code - zero) * scale

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        w, offsets, scale, zero = ctx.saved_tensors
        rounded = _nearest(w, offsets, scale, zero, ctx.minimum).round_()
        code = rounded.clamp(*ctx.limits)
        by_code = torch.where(code == rounded, d * scale, 0.0)
        divisor = _nonzero(scale)
        if ctx.minimum:
            by_scale = d * code - by_code * ((w + zero) / divisor.square())
            by_zero = by_code / divisor - d
        else:
            by_scale = d * (code - zero) - by_code * (w / divisor.square())
            by_zero = by_code - d * scale
        return None, by_code, by_scale.sum_to_size(scale.shape), by_zero.sum_to_size(zero.shape), None, None, None


class CodebookRounding(Rounding):
    """``W[n, k] = table[n, g, code[n, k]] (* scale[n, g])``; learned are offsets, tables and scales.

    A step is the mean distance of neighbours in a table. ``tables`` and ``scales`` are relative to the first ones:
    table = first + tables * mean|first|, scale = first * scales.
    """

    operands: CodebookOperands

    def __init__(self, layer: LinearLayer, weight: Tensor) -> None:
        super().__init__(layer, weight)
        table, order = self.operands.codebook.float().sort(-1)
        scales = None if self.operands.scales is None else self.operands.scales.float()
        step = (table[..., -1:] - table[..., :1]) / (table.shape[-1] - 1)
        self.first, self.first_scales, self.size, self.step = table, scales, table.abs().mean(), _nonzero(step)
        self.tables = nn.Parameter(torch.zeros_like(table))
        self.scales = None if scales is None else nn.Parameter(torch.ones_like(scales))
        codes = self._grouped(self.operands.codes(layer.format.in_features).long())
        codes = order.argsort(-1).expand(*codes.shape[:2], -1).gather(-1, codes)  # in the order of values
        middles = (table[..., 1:] + table[..., :-1]) / 2
        low, high = (nn.functional.pad(middles, side, value=end).expand(*codes.shape[:2], -1).gather(-1, codes)
                     for side, end in (((1, 0), -torch.inf), ((0, 1), torch.inf)))  # fmt: skip
        exact, margin = self._exact(0.0), (0.5 - _INSIDE) * self.step
        wanted = exact.maximum(low + margin).minimum(high - margin)
        self.offsets = nn.Parameter(self._ungrouped((wanted - exact) / self.step).contiguous())

    def _grouped(self, values: Tensor) -> Tensor:
        """``[N, K]`` as ``[rows, tables of a row, values of a table]``."""
        rows, groups, _ = self.operands.codebook.shape
        if rows == 1:
            return values.reshape(1, 1, -1)
        size: int = values.shape[1] if groups == 1 else self.operands.group_size
        padded = nn.functional.pad(values, (0, groups * size - values.shape[1]))
        return padded.view(len(values), groups, size)

    def _ungrouped(self, values: Tensor) -> Tensor:
        """The inverse."""
        return values.reshape(self.layer.format.out_features, -1)[:, : self.layer.format.in_features]

    def _scale(self) -> Tensor | None:
        """Of each column, as it will be stored."""
        if self.scales is None or self.first_scales is None:
            return None
        scale = self.first_scales * self.scales.clamp(min=_SMALLEST)
        scale = straight_through(scale, scale.detach().to(cast(Tensor, self.operands.scales).dtype).float())
        columns: Tensor = scale.unsqueeze(-1).expand(-1, -1, self.operands.group_size).flatten(1)
        return columns[:, : cast(int, self.layer.format.in_features)]

    def _table(self) -> Tensor:
        """Ascending, as it will be stored."""
        table = (self.first + self.tables * self.size).sort(-1).values
        limits = torch.finfo(self.operands.codebook.dtype)
        stored = table.detach().clamp(limits.min, limits.max).to(self.operands.codebook.dtype)
        return straight_through(table, stored.float())

    def _exact(self, offsets: Tensor | float) -> Tensor:
        """What is rounded to a value of the table, grouped."""
        scale = self._scale()
        exact = self.float_weight if scale is None else self.float_weight / _nonzero(scale)
        exact = self._grouped(exact)
        return exact if isinstance(offsets, float) else exact + self._grouped(offsets) * self.step

    def _codes(self, exact: Tensor, table: Tensor) -> Tensor:
        middles = ((table[..., 1:] + table[..., :-1]) / 2).expand(*exact.shape[:2], -1).contiguous()
        return torch.searchsorted(middles, exact.detach().contiguous())

    def coded(self) -> Tensor:
        exact, table, scale = self._exact(self.offsets), self._table(), self._scale()
        codes = self._codes(exact, table)
        values = table.expand(*exact.shape[:2], -1).gather(-1, codes)
        inside = (exact >= table[..., :1]) & (exact <= table[..., -1:])
        values = self._ungrouped(values + torch.where(inside, exact - exact.detach(), 0.0))
        return values if scale is None else values * scale

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        exact, table = self._exact(self.offsets), self._table()
        codes = self._ungrouped(self._codes(exact, table)).to(torch.uint8)
        found = {"packed": pack(codes, self.operands.bits), "codebook": table.to(self.operands.codebook.dtype)}
        if self.scales is not None and self.first_scales is not None:
            scale = self.first_scales * self.scales.clamp(min=_SMALLEST)
            found["scales"] = scale.to(cast(Tensor, self.operands.scales).dtype)
        return self._with_the_rest(found)


_CLASSES: dict[str, type[Rounding]] = {"packed": PackedRounding, "codebook": CodebookRounding}
