"""Which modules of a model can be swapped, and why the others that look like it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lowbit.core.family import Format, Spec
from lowbit.model import accelerate, adapters, experts, sources
from lowbit.nn.experts import FloatExperts
from lowbit.nn.layer import Layer


@dataclass
class Swap:
    """One module to swap, under all the names it has in the model."""

    names: list[str]
    module: nn.Module
    kind: str  # "linear", "embedding" or "experts"
    transposed: bool = False  # transformers' Conv1D keeps its weight as [in, out]
    spec: Spec | None = None
    calibrated: Spec | None = None  # of an embedding: the spec where it is measured what errors of its rows cost
    source: sources.Source | None = None
    problem: str | None = None  # why its recogniser cannot read it
    note: str | None = None  # for the report
    target: Tensor | None = None  # ``[N, K]``: what is rounded instead of the weight (lowbit/model/drift.py)
    extras: dict[str, Any] = field(default_factory=dict)
    read: Callable[[int], Tensor] | None = None  # the weight of an expert that the module does not hold, as it would

    @property
    def name(self) -> str:
        return self.names[0]

    def weight(self) -> Tensor:
        """The float weight as ``[N, K]``; of experts, one below the other, ``[E*N, K]``."""
        if isinstance(self.module, FloatExperts):
            return self._stack(self.module).flatten(0, 1)
        weight = accelerate.held_tensor(self.module, "weight", self.module.get_parameter("weight"))
        assert weight is not None
        return weight.detach().t() if self.transposed else weight.detach()

    def _stack(self, module: FloatExperts) -> Tensor:
        weight, owner = module.weight, module.__dict__["owner"]
        held = weight if owner is None else accelerate.held_tensor(owner, module.attribute, weight)
        assert held is not None
        return module.stacked(held.detach())

    def experts(self) -> Iterator[Tensor]:
        """The float weights ``[N, K]`` of a stack, one after the other."""
        if self.read is not None:
            for e in range(self.extras["num_experts"]):
                one = self.read(e)
                yield one.t() if self.transposed else one
            return
        assert isinstance(self.module, FloatExperts)
        yield from self._stack(self.module).unbind()

    def format(self) -> Format:
        """The format that its spec gives the weight, as far as it is known beforehand."""
        assert self.spec is not None
        if self.kind != "experts" or self.spec.shares_over_rows:
            return self.spec.format(self.weight(), self.kind)
        one = self.spec.format(next(self.experts()), self.kind)
        return one.stacked(self.extras["num_experts"])  # type: ignore[no-any-return]

    def bias(self) -> nn.Parameter | None:
        """The bias as it is, the very same Parameter; a new one of a bias that is offloaded."""
        bias = self.module._parameters.get("bias")
        held = accelerate.held_tensor(self.module, "bias", bias)
        if bias is None or held is None or held is bias:
            return bias
        return nn.Parameter(held, requires_grad=bias.requires_grad)


def find(model: nn.Module) -> tuple[list[Swap], dict[str, str]]:
    """Every module that could be swapped, and the linear-like ones that cannot, with the reason."""
    swaps: dict[int, Swap] = {}
    skipped: dict[str, str] = {}
    inside: set[str] = set()  # below a recognised module: its parts are not layers of their own
    left_alone = adapters.left_alone(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if any(name.startswith(parent) for parent in inside):
            continue
        if id(module) in swaps:
            swaps[id(module)].names.append(name)
            continue
        _enter_stacks(name, module, left_alone, swaps, skipped)
        swap, reason = _examine(name, module)
        if swap is not None or reason is not None:
            parent = modules.get(name.rpartition(".")[0])
            reason = adapters.reason_for(name, left_alone) or _read_by(parent) or reason
        if swap is not None and reason is None:
            swaps[id(module)] = swap
            inside.add(name + "." if name else "")
            if not name:
                break
        elif reason is not None:
            skipped[name] = reason
    return list(swaps.values()), skipped


def _enter_stacks(
    name: str, module: nn.Module, left_alone: dict[str, str], swaps: dict[int, Swap], skipped: dict[str, str]
) -> None:
    for path, stack in experts.named_stacks(name, module):
        weight = stack.weight
        reason = adapters.reason_for(path, left_alone) or experts.reason_against(stack)
        if is_lazy(weight):
            reason = "its weight is not initialised yet: call the model once"
        elif _is_sharded(weight):
            reason = "its weight is sharded (DTensor): convert the model before that"
        known = next((swap for swap in swaps.values() if experts.is_same(swap.module, stack)), None)
        if reason is not None:
            skipped[path] = reason
        elif known is not None:
            known.names.append(path)
        else:
            extras = {"num_experts": stack.num_experts}
            swaps[id(stack)] = Swap([path], stack, "experts", transposed=stack.transposed, extras=extras)


def _read_by(parent: nn.Module | None) -> str | None:
    """Why a layer of ``parent`` has to stay, because that reads the weight instead of calling it."""
    return "nn.MultiheadAttention reads its weight" if isinstance(parent, nn.MultiheadAttention) else None


def _examine(name: str, module: nn.Module) -> tuple[Swap | None, str | None]:
    """(swap, None) for a module that can be swapped, (None, reason) for one that looks like it but cannot."""
    if sources.is_source(module):
        try:
            source = sources.recognise(module)
        except ValueError as error:
            return Swap([name], module, "linear", problem=str(error)), None
        if isinstance(source, str):
            return None, source
        return Swap([name], module, source.kind, source=source), None
    if isinstance(module, Layer) or not (_is_conv1d(module) or isinstance(module, (nn.Linear, nn.Embedding))):
        return None, None
    if reason := _reason_against(module):
        return None, reason
    if isinstance(module, nn.Embedding):
        extras = embedding_extras(module)
        return (None, _own_forward(module, nn.Embedding)) if extras is None else (
            Swap([name], module, "embedding", extras=extras), None)  # fmt: skip
    if isinstance(module, nn.Linear) and not _is_linear(module):
        return None, _own_forward(module, nn.Linear)
    return Swap([name], module, "linear", transposed=not isinstance(module, nn.Linear)), None


def _reason_against(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm renormalises the weight while it is used"
    if "weight" not in module._parameters or module._parameters["weight"] is None:
        return "its weight is computed on each call (parametrization or weight norm)"
    if is_lazy(module._parameters["weight"]):
        return "its weight is not initialised yet: call the model once"
    if getattr(module, "bias", None) is not None and "bias" not in module._parameters:
        return "its bias is not a Parameter"
    if _is_sharded(module._parameters["weight"]):
        return "its weight is sharded (DTensor): convert the model before that"
    if "forward" in module.__dict__ and not accelerate.is_hooked(module):
        return "it has a forward of its own"
    return None


def _is_sharded(weight: Tensor) -> bool:
    return any(cls.__module__.startswith("torch.distributed") for cls in type(weight).__mro__)


def _own_forward(module: nn.Module, base: type) -> str:
    return f"{type(module).__name__} is a subclass of nn.{base.__name__} with a forward of its own"


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that transformers need not be installed
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


# -------------------------------------------------------- what a subclass computes, asked with a small weight


def _is_linear(module: nn.Linear) -> bool:
    """Whether ``module(x) == F.linear(x, weight, bias)``: the forward is inherited, or gives just that."""
    if type(module).forward is nn.Linear.forward:
        return True
    if not _holds_only(module, "weight", "bias"):
        return False
    weight = _random(5, 7)
    bias = None if module.bias is None else _random(1, 5)[0]
    x = _random(6, 7).view(2, 3, 7)
    expected = F.linear(x, weight, bias)
    for training in (False, True):
        y = _ask(module, x, {"weight": weight, "bias": bias}, training)
        if not isinstance(y, Tensor) or y.shape != expected.shape or not torch.allclose(y, expected, rtol=1e-12):
            return False
    return True


def embedding_extras(module: nn.Embedding) -> dict[str, Any] | None:
    """What the packed embedding is given; ``None`` unless ``module(ids) == F.embedding(ids, weight) * a number``."""
    extras: dict[str, Any] = {"padding_idx": module.padding_idx}
    if type(module).forward is nn.Embedding.forward:
        return extras
    if not _holds_only(module, "weight"):
        return None
    # every id is asked, with rows of two columns: one may be treated in a way of its own
    ids = torch.arange(module.num_embeddings, device="cpu")
    weight = _random(module.num_embeddings, 2)
    scaled = _ask(module, ids, {"weight": torch.ones_like(weight)}, False)
    if not isinstance(scaled, Tensor) or scaled.shape != weight.shape:
        return None
    scale = float(scaled[0, 0])
    if _ask(module, _random(3, module.num_embeddings), {"weight": weight}, False) is not None:
        return None  # it takes more than ids: soft tokens are multiplied with the weight
    for training in (False, True):
        y = _ask(module, ids[None], {"weight": weight}, training)
        if not isinstance(y, Tensor) or y.shape != (1, *weight.shape) or not torch.equal(y[0], weight * scale):
            return None
    half = weight.bfloat16()
    y = _ask(module, ids, {"weight": half}, False)
    if scale == 1.0 or not isinstance(y, Tensor):
        return extras if scale == 1.0 else None
    extras["output_scale"] = scale
    rounded = torch.tensor(scale, dtype=torch.bfloat16, device="cpu")
    is_exact, is_rounded = torch.equal(y, half * scale), torch.equal(y, half * rounded)
    if is_rounded and (not is_exact or module._buffers):  # a number in a buffer follows the module's dtype
        return {**extras, "round_output_scale": True}
    return extras if is_exact else None


def _holds_only(module: nn.Module, *names: str) -> bool:
    """Whether a module has no tensors but these, and buffers of one number."""
    others = [p for name, p in module._parameters.items() if p is not None and name not in names]
    buffers = [b for b in module._buffers.values() if b is not None and b.numel() != 1]
    return not others and not buffers and not any(True for _ in module.children())


def _random(rows: int, columns: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def _ask(module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor | None], training: bool) -> Any:
    """What the class's forward gives with other parameters, on the CPU; ``None`` where it cannot run."""
    twin = type(module).__new__(type(module))
    buffers = {name: _number(module, name, buffer) for name, buffer in module._buffers.items()}
    held = {n: None if p is None else nn.Parameter(p, requires_grad=False) for n, p in parameters.items()}
    twin.__dict__ = {**module.__dict__, "training": training, "_parameters": held, "_buffers": buffers}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return type(module).forward(twin, x)
    except Exception:  # whatever a foreign forward may raise: it is not what was asked for
        return None


def _number(module: nn.Module, name: str, buffer: Tensor | None) -> Tensor | None:
    if buffer is None or buffer.device.type != "meta":
        return None if buffer is None else buffer.to("cpu")
    known = getattr(module, f"scalar_{name}", None)  # Gemma keeps the number beside its buffer
    return buffer if known is None else torch.tensor(known, dtype=buffer.dtype, device="cpu")
