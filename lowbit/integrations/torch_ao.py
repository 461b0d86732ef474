"""Quantization-aware training (QAT) with torch.ao and torchao: their modules, read as they are.

Both keep a float weight and a *fake quantizer*, and multiply by ``fq(weight)``: floats that lie on the grid
``(q - zero_point) * scale``, ``low <= q <= high``. The integers are read back from those floats,

    codes = round(fq(weight) / scale + zeros),    zeros = zero_point - low

rather than by quantizing the weight once more, so how a library rounds does not matter. Neither library is
imported here: their types are known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.sources import Recogniser, Source, register_source_by_name, type_name
from lowbit.packed.format import PackedWeight

_QAT = "torch.ao.nn.qat"
_INTRINSIC = "torch.ao.nn.intrinsic.qat.modules"
_TORCHAO = "torchao.quantization.qat"


class _DeclinedError(Exception):
    """The module stays as it is; the message says why."""


def register() -> None:
    """Let :func:`lowbit.convert` read the QAT modules of torch.ao and torchao."""
    for name in ("modules.linear.Linear", "dynamic.modules.linear.Linear", "modules.embedding_ops.Embedding"):
        register_source_by_name(f"{_QAT}.{name}", _recogniser(_read_torch_ao))
    register_source_by_name(
        f"{_INTRINSIC}.linear_relu.LinearReLU", _recogniser(_read_torch_ao), epilogue=lambda module: nn.ReLU()
    )
    register_source_by_name(f"{_QAT}.modules.embedding_ops.EmbeddingBag", lambda module: "it sums embeddings")
    register_source_by_name(
        f"{_INTRINSIC}.linear_fused.LinearBn1d", lambda module: "a batch norm scales its weight on each call"
    )
    for name in (
        "linear.FakeQuantizedLinear",
        "linear.Int8DynActInt4WeightQATLinear",
        "linear.Int4WeightOnlyQATLinear",
        "embedding.FakeQuantizedEmbedding",
        "embedding.Int4WeightOnlyQATEmbedding",
    ):
        register_source_by_name(f"{_TORCHAO}.{name}", _recogniser(_read_torchao))


def _recogniser(read: Callable[[Any, Tensor], Source]) -> Recogniser:
    """What both libraries have in common: the checks before, and the module's own attributes after."""

    def recognise(module: Any) -> Source | str:
        if getattr(module, "max_norm", None) is not None:
            return "max_norm renormalises the weight while it is used"
        weight = module.weight.detach()
        if weight.is_meta:
            raise ValueError("its weight must hold values: it is on the meta device")
        try:
            with torch.no_grad():
                source = read(module, weight)
        except _DeclinedError as reason:
            return str(reason)
        except RuntimeError as error:  # torch checks scales and zero points too
            raise ValueError(f"its fake quantization of the weight fails: {error}") from error
        if isinstance(module, nn.Embedding):
            return replace(source, kind="embedding", padding_idx=module.padding_idx)
        return replace(source, bias=module.bias)

    return recognise


def _note(dtype: Any, where: str) -> str:
    return f"activations stay float: the fake quantization of its {where} to {_short(dtype)} is left out"


# --------------------------------------------------------------------------------------------------- torch.ao


def _read_torch_ao(module: Any, weight: Tensor) -> Source:
    """A module whose forward uses ``weight_fake_quant(weight)``."""
    fake_quant = module.weight_fake_quant
    if not _is_a(fake_quant, "torch.ao.quantization.fake_quantize.FakeQuantize"):
        raise _DeclinedError(f"weight_fake_quant is a {type(fake_quant).__name__}, not a FakeQuantize")
    if not bool(fake_quant.fake_quant_enabled[0]):
        raise _DeclinedError("the fake quantization of its weight is disabled")
    if _never_observed(fake_quant):
        raise ValueError(
            "weight_fake_quant must have observed the weight: its observer is off and its scale was never set"
        )
    if fake_quant.is_per_channel and fake_quant.ch_axis != 0:
        raise _DeclinedError(f"its weight has one scale per index of axis {fake_quant.ch_axis}, not per row")
    # a call of the fake quantizer updates its observer: let a copy do what the module's next call would do
    fake_quant = copy.deepcopy(fake_quant)
    value = fake_quant(weight)
    scale, zero_point = fake_quant.scale.reshape(-1, 1), fake_quant.zero_point.reshape(-1, 1)
    observer = fake_quant.activation_post_process
    low, high = int(observer.quant_min), int(observer.quant_max)
    # an observer, unless it is a fake quantizer
    activation: Any = getattr(module, "activation_post_process", None)
    enabled = getattr(activation, "fake_quant_enabled", None)
    note = _note(activation.dtype, "output") if enabled is not None and bool(enabled[0]) else None
    if zero_point.is_floating_point():
        stored = _with_float_zeros(value, scale, zero_point - low, low, high, None)
    else:
        stored = _with_integer_zeros(value, scale, zero_point, low, high, None)
    return Source(stored, weight=value, note=note)


def _never_observed(fake_quant: Any) -> bool:
    """Whether scale and zero point are still the constructor's, and no call will change them."""
    if bool(fake_quant.observer_enabled[0]):
        return False
    seen = getattr(fake_quant.activation_post_process, "min_val", None)
    unseen = isinstance(seen, Tensor) and (seen.numel() == 0 or bool(torch.isinf(seen).any()))
    return unseen and bool((fake_quant.scale == 1).all()) and bool((fake_quant.zero_point == 0).all())


# ---------------------------------------------------------------------------------------------------- torchao


def _read_torchao(module: Any, weight: Tensor) -> Source:
    """A module whose forward uses ``weight_fake_quantizer(weight)``."""
    quantizer = module.weight_fake_quantizer
    if quantizer is None:
        raise _DeclinedError("it has no weight_fake_quantizer")
    if not quantizer.enabled:
        raise _DeclinedError("the fake quantization of its weight is disabled")
    config = quantizer.config
    quantizer = copy.copy(quantizer)  # a call stores a new scale and zero point
    if _is_a(quantizer, f"{_TORCHAO}.fake_quantizer.IntxFakeQuantizer"):
        value = quantizer(weight)
        stored = _read_intx(config, value, quantizer.scale, quantizer.zero_point)
    elif _is_int4_bfloat16(quantizer):
        value = quantizer(weight)
        stored = _read_int4(weight, value, int(config.group_size))
    else:
        raise _DeclinedError(f"{config} has no packed form")
    activation = getattr(module, "activation_fake_quantizer", None)
    note = _note(activation.config.dtype, "input") if activation is not None and activation.enabled else None
    return Source(stored, weight=value, note=note)


def _read_intx(config: Any, value: Tensor, scale: Tensor, zero_point: Tensor) -> PackedWeight:
    """``IntxFakeQuantizeConfig``: ``(q - zero_point) * scale`` or ``(q - middle) * scale + zero_point``."""
    granularity = type(config.granularity).__name__
    if granularity not in ("PerAxis", "PerGroup"):
        raise _DeclinedError(f"a weight quantized {granularity} has no packed form")
    group_size = int(config.granularity.group_size) if granularity == "PerGroup" else None
    low, high = _integer_range(config.dtype)
    scale = scale.detach().reshape(value.shape[0], -1)
    zero_point = zero_point.detach().reshape(value.shape[0], -1)
    if config.zero_point_domain.name == "FLOAT":
        zeros = (low + high + 1) / 2 - low - zero_point.float() / scale.float()
        return _with_float_zeros(value, scale, zeros, low, high, group_size)
    return _with_integer_zeros(value, scale, zero_point, low, high, group_size)


def _integer_range(dtype: Any) -> tuple[int, int]:
    """``torch.int4``, ``torch.uint4`` or ``TorchAODType.INT4`` -> the least and greatest value."""
    name = _short(dtype)
    bits = int(name.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _is_int4_bfloat16(quantizer: Any) -> bool:
    """``Int4WeightFakeQuantizer`` for bfloat16 activations; for float8 ones it rounds the weight twice."""
    name = f"{_TORCHAO}.fake_quantizer.Int4WeightFakeQuantizer"
    return _is_a(quantizer, name) and quantizer.config.activation_dtype == torch.bfloat16


def _read_int4(weight: Tensor, value: Tensor, group_size: int) -> PackedWeight:
    """``q * scale + low`` with ``scale = (high - low) / 15``, ``low`` and ``high`` the group's range."""
    low, high = weight.float().view(weight.shape[0], -1, group_size).aminmax(dim=-1)
    scale = (high - low).clamp(min=1e-6) / 15
    return _with_float_zeros(value, scale, -low / scale, 0, 15, group_size)


# -------------------------------------------------------------------------------------------- from fq(weight)


def _with_integer_zeros(
    value: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, group_size: int | None
) -> PackedWeight:
    """Codes of ``value == (q - zero_point) * scale``; symmetric where ``q - zero_point`` always fits."""
    bits = _bits(low, high)
    if zero_point.is_floating_point() and not bool((zero_point == zero_point.round()).all()):
        raise _DeclinedError("its zero points are not whole numbers")
    first, last = int(zero_point.min()), int(zero_point.max())
    if first < low or last > high:
        raise ValueError(f"zero_point must be between quant_min={low} and quant_max={high}: got {first} to {last}")
    half = 1 << (bits - 1)
    symmetric = low - last >= -half and high - first < half
    zeros = None if symmetric else (zero_point - low).to(torch.uint8)
    shift: Tensor | float = float(half) if zeros is None else _spread(zeros, value, group_size).float()
    spread = _spread(scale, value, group_size).float()
    codes = _codes(value, spread, shift, bits)
    exact = (codes - shift).mul_(spread).to(value.dtype)
    if not torch.equal(exact, value):
        count = int((exact != value).sum())
        raise ValueError(f"its weight must be (q - zero_point) * scale once fake-quantized: {count} are not")
    return PackedWeight(codes.to(torch.uint8), scale.clone(), zeros, bits, group_size)


def _with_float_zeros(
    value: Tensor, scale: Tensor, zeros: Tensor, low: int, high: int, group_size: int | None
) -> PackedWeight:
    """Codes of ``value == (code - zeros) * scale``; scales become float32, so that the zeros lose nothing."""
    bits = _bits(low, high)
    scale, zeros = scale.float(), zeros.float()
    codes = _codes(value, _spread(scale, value, group_size), _spread(zeros, value, group_size), bits)
    return PackedWeight(codes.to(torch.uint8), scale.clone(), zeros.clone(), bits, group_size)


def _codes(value: Tensor, scale: Tensor, zeros: Tensor | float, bits: int) -> Tensor:
    """``round(value / scale + zeros)``, as floats; ``ValueError`` for a bad scale or a code out of range."""
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise ValueError("its scales must be positive and finite: they are not")
    codes = value.float().div(scale).add_(zeros).round_()
    if not bool(((codes >= 0) & (codes < 1 << bits)).all()):  # also False for NaN
        raise ValueError(
            f"its codes must be between 0 and {(1 << bits) - 1}: got values in "
            f"[{float(codes.min()):g}, {float(codes.max()):g}]"
        )
    return codes


def _bits(low: int, high: int) -> int:
    """The least number of bits, from 2, whose codes hold ``low`` to ``high``."""
    bits = max(2, (high - low).bit_length())
    if bits > 8:
        raise _DeclinedError(f"the range {low} to {high} needs {bits} bits, more than 8")
    return bits


def _spread(t: Tensor, value: Tensor, group_size: int | None) -> Tensor:
    """``[N, G]`` to one value per weight; ``[N, 1]`` and ``[1, 1]`` broadcast as they are."""
    return t if group_size is None else t.repeat_interleave(group_size, dim=1)[:, : value.shape[1]]


def _is_a(module: object, name: str) -> bool:
    return any(type_name(cls) == name for cls in type(module).__mro__)


def _short(dtype: Any) -> str:
    """``torch.int4`` and ``TorchAODType.INT4`` -> ``"int4"``."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.").lower()
