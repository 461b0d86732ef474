"""What is trained beside a frozen model: PEFT's adapters, prompts and copies, and layers of the user's own.

They are small, and packed layers are frozen: a conversion leaves them alone. PEFT is known by name, it need not be
installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

# Tuners of PEFT that only call the linear layer under them (checked with 0.21). Others read its weight.
_CALLING = frozenset((
    "adalora", "adamss", "beft", "boft", "deft", "delora", "fourierft", "gralora", "ia3", "lily", "loha", "lokr",
    "lora", "miss", "oft", "psoft", "pvera", "randlora", "road", "tinylora", "unilora", "vera", "waveft",
))  # fmt: skip
_LORA = frozenset(("Linear", "Linear4bit"))  # of lora's layers, those that only call it
# Hold the whole model, or a part of it that they only call.
_FRAMES = ("PeftModel", "PeftMixedModel", "BaseTuner", "AdaptionPromptModel", "_BaseAdaptedAttention")
_OWN_NAME = re.compile(r"(^|\.)lora_")
BEING_TRAINED = "it is being trained while most of the model is frozen; a spec for this very name converts it"


def left_alone(model: nn.Module) -> dict[str, str]:
    """The modules of ``model`` that are adapters, or whose adapter reads their weight: name -> reason."""
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = _peft_class(module)
        if kind is None or any(cls.__name__ in _FRAMES for cls in type(module).__mro__):
            continue
        base = getattr(module, "base_layer", None)
        for child, _ in module.named_children():
            path = f"{name}.{child}" if name else child
            if child == "base_layer" and isinstance(base, nn.Module):
                reason = None if isinstance(base, _peft_layer(module)) else _reads(module, kind, base)
            elif any(cls.__name__ == "AuxiliaryTrainingWrapper" for cls in type(module).__mro__):
                reason = f"PEFT's {kind} trains a copy of it"
            else:
                reason = f"it is an adapter: part of PEFT's {kind}"
            if reason is not None:
                found[path] = reason
    return found


def _peft_class(module: nn.Module) -> str | None:
    """``lora.Linear`` of a module that PEFT defines."""
    path = type(module).__module__.split(".")
    if path[0] != "peft":
        return None
    package = path[2] + "." if path[1:2] == ["tuners"] and len(path) > 3 else ""
    return package + type(module).__name__


def _peft_layer(module: nn.Module) -> tuple[type, ...]:
    """The class of tuner layers: one may be the base layer of another."""
    return tuple(cls for cls in type(module).__mro__ if cls.__name__ == "BaseTunerLayer")


def _reads(module: Any, kind: str, base: nn.Module) -> str | None:
    """Why the base layer of a tuner layer has to stay, or ``None``."""
    tuner, _, name = kind.rpartition(".")
    if isinstance(base, nn.Embedding):
        return f"PEFT's {kind} uses its weight"
    if name == "ParamWrapper":
        return f"PEFT's {kind} adapts its Parameter {getattr(module, 'parameter_name', '')!r}"
    if tuner not in _CALLING or (tuner == "lora" and name not in _LORA):
        return f"PEFT's {kind} may read its weight"
    if variants := sorted({type(v).__name__ if not isinstance(v, type) else v.__name__
                           for v in (getattr(module, "lora_variant", None) or {}).values()}):  # fmt: skip
        return f"PEFT's {kind} reads its weight ({', '.join(variants)})"
    if getattr(module, "merged_adapters", None):
        return f"PEFT's {kind} has merged an adapter into its weight: unmerge it first, or merge_and_unload"
    return None


def reason_for(name: str, alone: dict[str, str]) -> str | None:
    """Why the module ``name`` is left alone as an adapter, or as below one."""
    for path, reason in alone.items():
        if name == path or name.startswith(path + "."):
            return reason
    return "it is an adapter, by its name" if _OWN_NAME.search(name) else None


def mostly_frozen(model: nn.Module, without: Iterable[nn.Module] = ()) -> bool:
    """Whether something is trained, but less than half of the float values, with embeddings and without them.

    Frozen word vectors under a model that is trained are no frozen model. Modules of ``without`` do not count.
    """
    left_out = {id(parameter) for module in without for parameter in module.parameters()}
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    in_tables = {id(parameter) for table in tables for parameter in table.parameters()}
    floats = [p for p in model.parameters() if id(p) not in left_out and p.is_floating_point() and not is_lazy(p)]
    body = [p for p in floats if id(p) not in in_tables]

    def trained_part(parameters: list[nn.Parameter]) -> float:
        total = sum(p.numel() for p in parameters)
        return sum(p.numel() for p in parameters if p.requires_grad) / total if total else 0.0

    return 0 < trained_part(floats) < 0.5 and trained_part(body) < 0.5
