"""``prepare``: layers become ones that are trained as they will be deployed; ``lowbit.convert`` ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from lowbit.codebook.format import Codebook
from lowbit.core.family import dtype_name
from lowbit.core.outliers import float16_holds
from lowbit.model import hooks
from lowbit.model.candidates import Swap
from lowbit.model.convert import convert
from lowbit.model.curvature import Loss
from lowbit.model.plan import Specs, make_plan, require_model
from lowbit.model.sources import Source, register_source
from lowbit.model.surgery import carry_over, put
from lowbit.nn.layer import layer_class, layers, make_trainable
from lowbit.packed.format import Packed, PackedFormat
from lowbit.train.fake_quant import FakeQuant, FakeQuantEmbedding, FakeQuantLinear, WeightFakeQuant
from lowbit.train.scaling import Scaling
from lowbit.train.trainable import PARTS
from lowbit.train.watch import watch


def prepare(
    model: nn.Module, specs: Specs, quantizer: Scaling | None = None, *, skip: Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None, loss: Loss | None = None,
) -> Any:  # fmt: skip
    """Let every layer that ``specs`` name compute in each call what its packed form will; in place; returns the model.

    With a quantizer each call rounds the weight, and the input where the spec says so. The float weights stay the
    Parameters that are trained, under their names. What the quantizer learns is added: ``<layer>.fake_quant.learned``.
    Layers that share a weight share it, and its scales.

    Without one the layers are packed now, as :func:`lowbit.convert` does, and their codes stay. What else they hold is
    trained: centroids, scales, factors and outliers (a fixed table is not). They are float32 masters, used as they will
    be stored; the gradient goes straight through that rounding. :func:`trainable` chooses among them afterwards.

    Make the optimizer afterwards. ``lowbit.convert(model)`` ends either: the model's outputs stay the same bits.

    Args:
        model: a float model, as for :func:`lowbit.convert`.
        specs: as for :func:`lowbit.convert`. With a quantizer: a :class:`~lowbit.Packed` with ``symmetric=True`` (but
            see :class:`SEQ`) and ``activations`` of ``"float"`` or ``"int8"``, or a mapping of name patterns to them.
        quantizer: how scales are found: :class:`Dynamic`, :class:`LSQ`, :class:`PACT`, :class:`MinMax` or
            :class:`SEQ`; or None.
        skip: patterns of layers to leave alone.
        calibration, loss: without a quantizer, as for :func:`lowbit.convert`.

    Raises:
        ValueError: listing every problem by layer name, or that nothing could be trained; the model is then as before.
        TypeError: ``quantizer`` is none of these.
    """
    require_model(model)
    if quantizer is None:
        return _prepare_packed(model, specs, skip, calibration, loss)
    if calibration is not None or loss is not None:
        raise ValueError("calibration and loss are of quantizer=None: a quantizer finds its scales in each step")
    if not isinstance(quantizer, Scaling):
        hint = f": write {quantizer.__name__}()" if isinstance(quantizer, type) else ""
        raise TypeError(f"quantizer must be a Dynamic, LSQ, PACT, MinMax or SEQ: got {quantizer!r}{hint}")
    hooks.before_convert(model)
    plan = make_plan(model, specs, skip)
    problems = [f"{swap.name}: {problem}" for swap in plan.swaps() if (problem := _problem(swap, quantizer))]
    if problems:
        raise ValueError("cannot prepare, nothing was changed:\n  " + "\n  ".join(problems))
    made = {name: module for group in plan.groups for name, module in _group(group, quantizer).items()}
    for swap in plan.swaps():
        for name in swap.names:
            model = put(model, name, made[swap.name])
    return model


def _prepare_packed(
    model: nn.Module, specs: Specs, skip: Sequence[str] | None, calibration: Iterable[Any] | None, loss: Loss | None
) -> Any:
    """Pack the layers, and train what is not codes."""
    plan = make_plan(model, specs, skip)
    names = {name: _trained_parts(swap) for swap in plan.swaps() for name in swap.names}
    if not any(names.values()):
        first = plan.swaps()[0]
        raise ValueError("cannot prepare, nothing was changed: no layer would have centroids, scales, factors or "
                         f"outliers to be trained: {first.name} has {first.spec}")  # fmt: skip
    before = list(model.parameters())
    model = convert(model, specs, skip=skip, calibration=calibration, loss=loss)
    packed = layers(model, duplicates=True)
    for parts in dict.fromkeys(filter(None, names.values())):  # together: tied layers share their masters
        make_trainable(nn.ModuleList(packed[name] for name in names if names[name] == parts and name in packed), *parts)
    now = dict(model.named_parameters())
    kept, known = set(map(id, now.values())), set(map(id, before))
    watch([p for p in before if id(p) not in kept], {name: p for name, p in now.items() if id(p) not in known})
    return model


def _trained_parts(swap: Swap) -> tuple[str, ...]:
    """The stored tensors of a layer that are trained unless somebody says which."""
    fixed = ("codebook",) if isinstance(swap.spec, Codebook) and swap.spec.values is not None else ()
    held = swap.format() if swap.source is None else swap.source.stored.format()
    floats = {name for name, (_, dtype) in held.weight_tensors().items() if dtype.is_floating_point}
    return tuple(name for part in PARTS.values() for name in part if name in floats and name not in fixed)


def _problem(swap: Swap, quantizer: Scaling) -> str | None:
    """Why a layer cannot be trained so."""
    spec = swap.spec
    if spec is None:
        return "it was trained quantized already: lowbit.convert(model) first"
    if swap.kind == "experts":
        return "stacks of experts have no fake-quant layer: leave them alone by skip="
    if not isinstance(spec, Packed):
        return f"a quantizer rounds to the levels of a Packed: got {spec}"
    if spec.scale_bits is not None:
        return f"scales are floats while they are found in each step: got scale_bits={spec.scale_bits}"
    if problem := quantizer.problem(spec):
        return problem
    if spec.outliers:
        return f"weights that are trained have no outliers: got outliers={spec.outliers}"
    if spec.activations == "int8_static":
        return "activations='int8_static' needs a calibrated scale: choose 'int8', one scale per token"
    if swap.weight().device.type == "meta":
        return "its weight has no values (it is on the meta device)"
    return None


def _group(group: list[Swap], quantizer: Scaling) -> dict[str, nn.Module]:
    """The fake-quant layers of swaps that share one weight."""
    first = group[0]
    weight: Any = first.module.get_parameter("weight")
    if first.transposed:
        weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    plain = _plain(first.format())
    fake_quant = WeightFakeQuant(quantizer, plain, weight, first.name)
    if plain.scale_dtype == "float16" and not float16_holds(fake_quant.scale(weight.detach()).detach()):
        plain = replace(plain, scale_dtype=dtype_name(torch.float32))
        fake_quant = WeightFakeQuant(quantizer, plain, weight, first.name)
    held, added = {id(p): p for p in (weight, first.module.get_parameter("weight"))}, {}
    if fake_quant.learned is not None:
        added[f"{first.name}.fake_quant.learned"] = fake_quant.learned
    if first.transposed:  # an optimizer would have the one that is no longer in the model
        added[f"{first.name}.weight"] = weight
    watch(held.values(), added)
    made: dict[str, nn.Module] = {}
    for swap in group:
        assert swap.spec is not None
        cls = layer_class("packed", swap.kind)
        layer: nn.Module
        if swap.kind == "embedding":
            packed = cls(fake_quant.format, False, weight.dtype, "meta", **swap.extras)
            layer = FakeQuantEmbedding(weight, fake_quant, packed, swap is first)
        else:
            format = fake_quant.format.with_activation(swap.spec.activation)
            bias = swap.bias()
            packed = cls(format, bias is not None, weight.dtype, "meta")
            layer = FakeQuantLinear(weight, bias, fake_quant, packed, swap is first)
        made[swap.name] = carry_over(swap.module, layer)
    return made


def _plain(format: Any) -> PackedFormat:
    """Of the weight alone, without what x is held as."""
    assert isinstance(format, PackedFormat)
    return replace(format, activations="float", activation_group_size=None)


def read_fake_quant(layer: nn.Module) -> Source:
    """What :func:`lowbit.convert` makes of a fake-quant layer."""
    assert isinstance(layer, FakeQuant)
    if isinstance(layer, FakeQuantEmbedding):
        return Source(layer.stored(), "embedding", weight=layer.dequantize, extras=layer.packed.extras())
    activation = layer.packed.format.activation
    return Source(layer.stored(), bias=layer.bias, **asdict(activation), weight=layer.dequantize)


register_source(FakeQuantLinear, read_fake_quant)
register_source(FakeQuantEmbedding, read_fake_quant)


def learned_scales(model: nn.Module) -> list[nn.Parameter]:
    """What the quantizers of ``model`` learn, as far as it is trained."""
    found = [module.learned for module in model.modules() if isinstance(module, WeightFakeQuant)]
    return [parameter for parameter in found if parameter is not None and parameter.requires_grad]


def parameter_groups(
    model: nn.Module, lr: float, *, scales: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: what quantizers learn, with a rate of its own (``scales``, default ``10 * lr``) and
    without decay, beside everything else that is trained.

    Raises ``ValueError`` where the model has nothing to train.
    """
    learned = learned_scales(model)
    known = {id(parameter) for parameter in learned}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    if not learned and not rest:
        raise ValueError("the model has no Parameter that requires a gradient: nothing to train")
    groups = [{"params": rest, "lr": lr, "weight_decay": weight_decay},
              {"params": learned, "lr": 10 * lr if scales is None else scales, "weight_decay": 0.0}]  # fmt: skip
    return [group for group in groups if group["params"]]
