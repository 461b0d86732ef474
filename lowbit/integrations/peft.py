"""PEFT on a packed model: what its code finds by the classes and Parameters of float layers, packed ones have too.

LoRA stands around packed linear layers, ``target_modules="all-linear"`` finds them, ``modules_to_save`` trains a float
copy of them, and prompts find a packed word embedding. Other tuners are put around the float model, before
``lowbit.convert``. Names inside PEFT that this file depends on were checked with 0.21; a PEFT without one of them is
left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lowbit.integrations.after_import import after_import
from lowbit.model.convert import dequantize
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.layer import layers
from lowbit.nn.linear import LinearLayer


def register() -> None:
    """Watch PEFT, now or when it is imported."""
    after_import("peft.tuners.lora.model", _install_lora)
    after_import("peft.tuners.tuners_utils", _install_all_linear)
    after_import("peft.tuners.tuners_utils", _install_parameters)
    after_import("peft.utils.other", _install_copies)
    after_import("peft.peft_model", _install_prompts)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """``owner.name = make(owner.name)``, once and where there is one."""
    original = getattr(owner, name, None)
    if original is None or getattr(original, "_lowbit", False):
        return
    made: Any = functools.wraps(original)(make(original))
    made._lowbit = True
    setattr(owner, name, staticmethod(made) if isinstance(vars(owner).get(name), staticmethod) else made)


def _install_lora(module: ModuleType) -> None:
    def around(original: Any) -> Any:
        def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
            base = target.get_base_layer() if hasattr(target, "get_base_layer") else target  # type: ignore[operator]
            if not isinstance(base, LinearLayer):
                return original(lora_config, adapter_name, target, **kwargs)
            from peft.tuners.lora import Linear

            lora_config._register_custom_module({LinearLayer: Linear})
            lora_config.fan_in_fan_out = kwargs["fan_in_fan_out"] = False  # also for what was a Conv1D
            return original(lora_config, adapter_name, target, **kwargs)

        return create_new_module

    _replace(getattr(module, "LoraModel", None), "_create_new_module", around)


def _install_all_linear(module: ModuleType) -> None:
    def around(original: Any) -> Any:
        def include_all_linear(peft_config: Any, model: nn.Module) -> Any:
            asked = getattr(peft_config, "target_modules", None)
            result = original(peft_config, model)
            if isinstance(asked, str) and asked.lower() == "all-linear":
                heads = {getattr(model, name, None) for name in getattr(module, "SEQ_CLS_HEAD_NAMES", ())}
                if hasattr(model, "get_output_embeddings"):
                    heads.add(model.get_output_embeddings())  # type: ignore[operator]
                found = layers(model).items()
                linear = {n for n, layer in found if isinstance(layer, LinearLayer) and layer not in heads}
                result.target_modules = {*result.target_modules, *linear}
            return result

        return include_all_linear

    _replace(module, "_maybe_include_all_linear_layers", around)


def _install_parameters(module: ModuleType) -> None:
    def around(original: Any) -> Any:
        def inject_parameters(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stacks = [name for name, layer in layers(model).items() if layer.kind == "experts"]
            for target in sorted(peft_config.target_parameters):
                name = next((n for n in stacks if n == target or n.endswith(f".{target}")), None)
                if name is not None:
                    raise ValueError(
                        f"target_parameters has {target!r}, and {name} is a packed stack of experts, which PEFT cannot "
                        f"adapt: put the adapter around the float model before lowbit.convert, or skip=['*.{target}']"
                    )
            return original(self, peft_config, model, *args, **kwargs)

        return inject_parameters

    _replace(getattr(module, "BaseTuner", None), "_inject_parameters", around)


def _install_copies(module: ModuleType) -> None:
    def around(original: Any) -> Any:
        def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
            result = original(self, adapter_name, *args, **kwargs)
            copied = self.modules_to_save[adapter_name]
            if layers(copied):  # a packed copy would have nothing to train
                trained = adapter_name == self.active_adapter
                self.modules_to_save[adapter_name] = dequantize(copied).requires_grad_(trained)
            return result

        return update

    _replace(getattr(module, "ModulesToSaveWrapper", None), "update", around)


def _install_prompts(module: ModuleType) -> None:
    def around(original: Any) -> Any:
        def setup_prompt_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
            find = getattr(self.base_model, "get_input_embeddings", None)
            words = find() if find is not None else None
            if not isinstance(words, EmbeddingLayer):
                return original(self, *args, **kwargs)
            # PEFT looks for a Parameter ``weight`` with as many rows as there are words
            words._parameters["weight"] = nn.Parameter(torch.empty(words.num_embeddings, 0), requires_grad=False)
            try:
                return original(self, *args, **kwargs)
            finally:
                del words._parameters["weight"]

        return setup_prompt_encoder

    _replace(getattr(module, "PeftModel", None), "_setup_prompt_encoder", around)
