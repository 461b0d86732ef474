"""Layers whose weight is float, and is rounded in each call: what training makes of the layers of a model.

Forward is the op of the packed layer that :func:`lowbit.convert` ends with, on codes that are made anew: the outputs
before and after are the same bits. Backward is that of the float layer with the rounded weight; the gradient goes
straight through every rounding (Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

import json
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.backends.reference import quantize_activations
from lowbit.core.bitpack import pack
from lowbit.core.family import FLOAT_DTYPES
from lowbit.nn.embedding import rounded
from lowbit.packed.format import PackedFormat, PackedWeight
from lowbit.packed.module import PackedEmbedding, PackedLinear
from lowbit.train.scaling import Levels, Scaling, each


class _Round(torch.autograd.Function):
    """``(w, scale, levels, clips, inside) -> (the nearest level, q * scale, and q)``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, levels: Levels, clips: bool, inside: bool) -> tuple[Tensor, Tensor]:
        q = w / scale
        if levels.shift:
            q = q - levels.shift
        q = (q.round() + levels.shift).clamp(-levels.end, levels.end)
        ctx.save_for_backward(w, scale, q)
        ctx.numbers = levels.limit, clips, inside
        ctx.mark_non_differentiable(q)
        return q * scale, q

    @staticmethod
    def backward(ctx: Any, d: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (w, scale, q), (limit, clips, inside) = ctx.saved_tensors, ctx.numbers
        u = w / scale
        within = u.abs() <= limit
        d_w = torch.where(within, d, 0.0) if clips else d
        d_scale = None
        if ctx.needs_input_grad[1]:
            moves = torch.where(within, q - u if inside else 0.0, q)
            d_scale = (d * moves).sum_to_size(scale.shape)
        return d_w, d_scale, None, None, None


class _Product(torch.autograd.Function):
    """``x @ w.T + bias`` by the packed op; ``w`` is what the codes stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, op: Any, weight: Any, activation: Any) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.activation = activation
        return cast(Tensor, op(x, *weight, bias, None, *activation))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        d_x = d_w = d_bias = None
        rows = d.reshape(-1, d.shape[-1])
        if ctx.needs_input_grad[0]:
            d_x = (d @ w.to(d.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            seen, (int8, x_group) = x.reshape(-1, x.shape[-1]), ctx.activation
            if int8:
                seen = as_int8(seen, x_group)
            d_w = (rows.t() @ seen.to(d.dtype)).to(w.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_w, d_bias, None, None, None


def as_int8(x: Tensor, group_size: int = 0) -> Tensor:
    """``x`` ``[M, K]`` as the kernels round it to int8."""
    group_size = group_size if group_size < x.shape[1] else 0
    q, inverse = quantize_activations(x, None, group_size)
    if group_size:
        inverse = inverse.repeat_interleave(group_size, 1)[:, : x.shape[1]]
    return (q / inverse).to(x.dtype)


class WeightFakeQuant(nn.Module):
    """Rounds a weight ``[N, K]`` to the levels of ``format``, by a :class:`~lowbit.train.scaling.Scaling`.

    Layers that share a weight share it. ``gamma`` or ``alpha``, in the shape of the scales: what is learned.
    """

    def __init__(self, scaling: Scaling, format: PackedFormat, weight: Tensor, name: str = "") -> None:
        super().__init__()
        self.scaling, self.format, self.name = scaling, format, name
        start = scaling.start(weight.detach().float().abs(), format)
        self.learned = None if start is None else nn.Parameter(start)

    def scale(self, weight: Tensor) -> Tensor:
        """float32 values of the stored dtype; the gradient goes through that rounding."""
        alpha = self.scaling.alpha(weight.detach().float().abs(), self.learned, self.format)
        scale = alpha / self.levels.steps
        scale = torch.where(scale == 0, 1.0, scale)  # all weights are 0
        stored = scale.detach().to(FLOAT_DTYPES[self.format.scale_dtype]).float()
        return scale + (stored - scale.detach())

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rounded weight in float32, that in steps of the scales, the scales). Raises ``FloatingPointError``, naming
        the layer, for a weight or a scale that is no number any more: its codes would be some."""
        scale, scaling = self.scale(weight), self.scaling
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(weight.float().sum() + scale.sum())):
            raise FloatingPointError(f"{self.name}: a weight or a scale is NaN or infinite: training has diverged")
        spread = each(scale, self.format)
        w, q = _Round.apply(weight.float(), spread, self.levels, scaling.clips, scaling.inside)  # type: ignore[no-untyped-call]
        return w, q, scale.detach()

    @property
    def levels(self) -> Levels:
        return Levels.of(self.scaling, self.format)  # not held: torch.compile would make its numbers inputs of a graph

    @property
    def zero(self) -> float:
        """The code of 0; of half-integers, between two codes."""
        return float(1 << (self.format.bits - 1)) - self.levels.shift

    def codes(self, q: Tensor) -> Tensor:
        return (q + self.zero).to(torch.uint8)

    def packed_values(self, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scales, zeros) as the packed layer holds them."""
        dtype = FLOAT_DTYPES[self.format.scale_dtype]
        scale = scale.to(dtype).expand(self.format.scale_shape)
        return scale, None if self.format.zeros == "none" else torch.full_like(scale, self.zero)

    @torch.no_grad()
    def stored(self, weight: Tensor) -> PackedWeight:
        """What the packed layer holds: for tied layers the very same, as long as somebody holds it."""
        now = [(t.data_ptr(), t._version) for t in (weight, self.learned) if t is not None]
        known, made_of = self.__dict__.get("_made", (lambda: None, None))
        made: PackedWeight | None = known()
        if made is None or made_of != now:
            made = self._store(weight)
            self.__dict__["_made"] = ref(made), now
        return made

    def _store(self, weight: Tensor) -> PackedWeight:
        _, q, scale = self(weight)
        scales, zeros = self.packed_values(scale)
        group_size = self.format.group_size if self.format.granularity == "group" else None
        return PackedWeight(self.codes(q), scales.contiguous(), zeros, self.format.bits, group_size)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_made", None)  # a weak reference is no part of a copy
        return state

    def extra_repr(self) -> str:
        return f"{self.scaling}, {self.format.describe()}"


class FakeQuant(nn.Module):
    """What the layers share. ``packed``: the layer, without tensors, that this one becomes."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    fake_quant: WeightFakeQuant
    packed: Any

    def _hold(self, weight: nn.Parameter, fake_quant: WeightFakeQuant, owner: bool, packed: Any) -> None:
        self.weight = weight
        if owner:
            self.fake_quant = fake_quant
        else:  # of a tied weight: checkpoints name it once
            self.__dict__["fake_quant"] = fake_quant
        self.__dict__["packed"] = packed

    def description(self) -> dict[str, Any]:
        """What a state_dict must have been made with to fit: the quantizer and the format."""
        return {"quantizer": type(self.fake_quant.scaling).__name__, **self.packed.format.to_dict()}

    def get_extra_state(self) -> Tensor:
        """:meth:`description`, as what files of tensors can hold."""
        return torch.frombuffer(bytearray(json.dumps(self.description()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """It was compared before anything was loaded."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        given = state_dict.get(f"{prefix}_extra_state")
        if given is not None:
            mine, theirs = self.description(), json.loads(bytes(given.tolist()))
            differing = [field for field in {**mine, **theirs} if theirs.get(field) != mine.get(field)]
            if differing:
                error_msgs += [f"{prefix[:-1]}: the state_dict was saved with {field}={theirs.get(field)}: got {field}="
                               f"{mine.get(field)}" for field in differing]  # fmt: skip
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def stored(self) -> PackedWeight:
        """The codes and scales that the packed layer is made of."""
        return self.fake_quant.stored(self.weight)

    def dequantize(self) -> Tensor:
        """The weight that forward multiplies by."""
        with torch.no_grad():
            return cast(Tensor, self.fake_quant(self.weight)[0].to(self.weight.dtype))


class FakeQuantLinear(FakeQuant):
    """``y = x @ Q(weight).T + bias``: input ``[..., K]``, output ``[..., N]``. ``weight`` is trained."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, fake_quant: WeightFakeQuant, packed: PackedLinear,
        owner: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self._hold(weight, fake_quant, owner, packed)
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        w, q, scale = self.fake_quant(self.weight)
        held: dict[str, Tensor | None] = dict.fromkeys(self.packed.operands_class.tensor_names)
        held["packed"] = pack(self.fake_quant.codes(q), self.fake_quant.format.bits)
        held["scales"], held["zeros"] = self.fake_quant.packed_values(scale)
        op, weight, activation = self.packed._op, self.packed.weight_arguments(held), self.packed._activation
        return cast(Tensor, _Product.apply(x, w, self.bias, op, weight, activation))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FakeQuantEmbedding(FakeQuant):
    """``y = Q(weight)[ids] * output_scale``. ``weight`` is trained."""

    def __init__(
        self, weight: nn.Parameter, fake_quant: WeightFakeQuant, packed: PackedEmbedding, owner: bool = True
    ) -> None:
        super().__init__()
        self._hold(weight, fake_quant, owner, packed)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx: int | None = packed.padding_idx
        self.output_scale: float = packed.output_scale

    def forward(self, ids: Tensor) -> Tensor:
        w = self.fake_quant(self.weight)[0]
        dtype = self.weight.dtype
        y = F.embedding(ids, w, self.padding_idx).to(dtype)
        scale = self.output_scale
        return y if scale == 1.0 else y * (rounded(scale, dtype) if self.packed.round_output_scale else scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
