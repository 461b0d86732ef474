"""What the modules of families with packed codes share: the layout that the codes are in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.backends import layouts, registry
from lowbit.backends.layouts import CANONICAL, Layout, by_group, change
from lowbit.core.family import Format
from lowbit.nn.layer import Layer


class CodedLayer(Layer):
    """A layer whose codes, ``packed``, are held in the layout that the kernels on their device read.

    The layer records which one that is. ``state_dict()`` always gives canonical words.
    """

    group_tensors: ClassVar[tuple[str, ...]] = ()  # [N, G] or [1, 1]: some layouts want group after group in memory
    packed: nn.Parameter

    def __init__(self, format: Format, *args: Any, **kwargs: Any) -> None:
        super().__init__(format, *args, **kwargs)
        self._record(CANONICAL)

    def _record(self, layout: Layout) -> Layout:
        self._layout, self._numbers = layout, (*self.format.numbers, layout.number)
        return layout

    @property
    def layout(self) -> Layout:
        """The layout of ``packed``. It is another one where somebody else put codes there, or moved those of a tied
        layer: their shape then says so."""
        packed, sizes = super().operands()["packed"], (self.format.in_features, self.format.bits)
        if packed is None or self._layout.fits(packed, *sizes):
            return self._layout
        return self._record(layouts.fitting(packed, *sizes) or self._layout)

    def _is_outdated(self) -> bool:
        return self._layout is not self.layout

    def share_weight(self, source: Layer) -> None:
        super().share_weight(source)
        assert isinstance(source, CodedLayer)
        self._record(source.layout)

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        """The layouts that the codes may stay in on ``device``; the first one is the best."""
        return registry.layouts(device, self.format, self.kind)

    def prepare(self, *, owned: bool = False) -> Layer:
        self._arrange(self.layouts(self.device), owned)
        if self._parameters["packed"] is not None:
            registry.settle(self.packed.data, self._layout)
        return self

    def _prepare_to_move(self, device: torch.device) -> None:
        self._arrange((CANONICAL, *self.layouts(device)))

    def _arrange(self, wanted: tuple[Layout, ...], owned: bool = False) -> None:
        """Bring codes that are in none of ``wanted`` into the first one, for all who share them."""
        packed, now = self._parameters["packed"], self.layout
        if packed is not None and now not in wanted:
            sizes = self.format.bits, self.format.in_features
            packed.data = change(packed.data, now, wanted[0], *sizes, owned)
            self._record(wanted[0])
        for name in self.group_tensors:
            values = self._parameters[name]
            if values is not None and wanted[0].values_by_group:
                values.data = by_group(values.data)
            elif values is not None and not any(layout.values_by_group for layout in wanted):
                values.data = values.data.contiguous()

    def _held_shape(self, tensor_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if tensor_name != "packed":
            return shape
        return (shape[0], *self.layout.row_shape(self.format.in_features, self.format.bits))

    def _as_held(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        packed, key, layout = self._parameters["packed"], prefix + "packed", self.layout
        if key not in state_dict or packed is None or layout is CANONICAL:
            return state_dict
        words = state_dict[key].to(packed.device)
        codes = change(words, CANONICAL, layout, self.format.bits, self.format.in_features)
        return {**state_dict, key: codes}

    def _as_saved(self, state: dict[str, Any], prefix: str) -> None:
        packed, layout = self._parameters["packed"], self.layout
        if packed is not None and prefix + "packed" in state and layout is not CANONICAL:
            sizes = self.format.bits, self.format.in_features
            state[prefix + "packed"] = _canonical_form(packed, lambda codes: change(codes, layout, CANONICAL, *sizes))
        for name in self.group_tensors:
            values, key = self._parameters[name], prefix + name
            if values is None or key not in state or values.is_contiguous() or state[key] is values:
                continue  # the last: keep_vars wants what is trained
            state[key] = _canonical_form(values, Tensor.contiguous)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._record(self.__dict__.get("_layout", CANONICAL))
        self.prepare()  # unpickled where other kernels run


# What state_dict() made of tensors that are held in another order, as long as somebody holds it: tied layers give one
# tensor.
_canonical = WeakTensorKeyDictionary()


def _canonical_form(parameter: nn.Parameter, form: Callable[[Tensor], Tensor]) -> Tensor:
    contents = parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
    known, made_of = _canonical.get(parameter, (lambda: None, None))
    canonical: Tensor | None = known()
    if canonical is None or made_of != contents:
        canonical = form(parameter.detach())
        _canonical[parameter] = ref(canonical), contents
    return canonical
