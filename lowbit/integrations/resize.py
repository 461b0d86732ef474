"""``resize_token_embeddings`` of packed transformers models."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from lowbit.checkpoint.metadata import tied_groups
from lowbit.integrations.ties import retie
from lowbit.model.resize import resized
from lowbit.model.surgery import put
from lowbit.nn.layer import Layer, LayerConfig, layers


def install(cls: Any) -> None:
    """``resize_token_embeddings``: transformers resizes a float copy, and its new rows are packed as the others are."""
    embeddings, head, both = cls._get_resized_embeddings, cls._get_resized_lm_head, cls._resize_token_embeddings

    def get_resized_embeddings(
        self: Any, old: Any, new_num_tokens: int | None = None, multiple: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        multiple = kwargs.pop("pad_to_multiple_of", multiple)
        if not isinstance(old, Layer):
            return embeddings(self, old, new_num_tokens, multiple, *args, **kwargs)
        size = old.format.out_features if new_num_tokens is None else new_num_tokens
        if isinstance(multiple, int):
            size = -(-size // multiple) * multiple
        if size == old.format.out_features:
            return old
        return _packed_again(self, old, embeddings(self, old.to_float(), new_num_tokens, multiple, *args, **kwargs))

    def get_resized_lm_head(self: Any, old: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(old, Layer):
            return head(self, old, new_num_tokens, *args, **kwargs)
        if new_num_tokens is None or new_num_tokens == old.format.out_features:
            return old
        return _packed_again(self, old, head(self, old.to_float(), new_num_tokens, *args, **kwargs))

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not layers(self):
            return both(self, *args, **kwargs)
        getters = self.get_input_embeddings, self.get_output_embeddings
        before, tied = [get() for get in getters], tied_groups(self)
        group = next((names for names in tied if any(self.get_submodule(name) is before[0] for name in names)), [])
        packed = [end if isinstance(end, Layer) else None for end in before]
        trained = [{n: p.requires_grad for n, p in end.named_parameters()} if end else {} for end in packed]
        both(self, *args, **kwargs)
        _follow(self, group)
        for get, names in zip(getters, trained, strict=True):  # transformers looks at .weight for what is trained
            for name, parameter in get().named_parameters() if names else ():
                parameter.requires_grad_(names.get(name, parameter.requires_grad))
        retie(self)
        return self.get_input_embeddings()

    cls._get_resized_embeddings, cls._get_resized_lm_head = get_resized_embeddings, get_resized_lm_head
    cls._resize_token_embeddings = resize_token_embeddings


def _packed_again(model: Any, old: Layer, made: Any) -> nn.Module:
    """The float layer that transformers resized, in the form of ``old``; as it is, with a warning, where that cannot
    be."""
    new = resized(old, made.weight.detach(), getattr(made, "bias", None), getattr(made, "padding_idx", None))
    if new is not None:
        return new
    name = next((name for name, module in model.named_modules() if module is old), type(old).__name__)
    warnings.warn(
        f"{name}: {old.format.describe()} cannot be resized row by row: it is a float layer now. To pack it again, "
        f"call lowbit.convert(model, {{{name!r}: spec}})",
        stacklevel=4,
    )
    return made  # type: ignore[no-any-return]


def _follow(model: Any, names: list[str]) -> None:
    """Layers that shared the weight of the input embedding share that of the resized one."""
    source = model.get_input_embeddings()
    for name in names:
        layer: Any = model.get_submodule(name)
        if layer is source:
            continue
        if not isinstance(source, Layer):
            if isinstance(layer, Layer):  # transformers did not resize it
                layer = layer.to_float()
                put(model, name, layer)
            layer.weight = source.weight
            continue
        if layer.format.out_features != source.format.out_features:
            layer = _like(layer, source)
            put(model, name, layer)
        layer.share_weight(source)


def _like(layer: Layer, source: Layer) -> Layer:
    """``layer``, for the weight of ``source``, which has another number of rows."""
    config = LayerConfig.of(layer)
    size = source.format.out_features
    new = replace(config, format=source.format.with_activation(layer.format.activation)).build(layer.dtype)
    new.store(source.canonical())
    own = {name: t for name, t in layer.canonical().items() if name not in layer.format.weight_tensors()}
    new.store(own)
    if layer.bias is not None:
        bias = nn.functional.pad(layer.bias.detach(), (0, size - len(layer.bias)))
        new.bias = nn.Parameter(bias, layer.bias.requires_grad)
    return new.train(layer.training).prepare()
