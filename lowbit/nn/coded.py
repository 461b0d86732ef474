"""What the modules of families with packed codes share: the layout that the codes are in."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.backends import layouts, registry
from lowbit.backends.layouts import CANONICAL, Layout, by_group, change
from lowbit.core.family import TensorSpec
from lowbit.nn.layer import Layer, once


class CodedLayer(Layer):
    """A layer whose codes, ``packed``, are held in the layout that the kernels on their device read.

    The layer records which one that is; the shape of ``packed`` says it, too.
    """

    group_tensors: ClassVar[tuple[str, ...]] = ()  # [N, G] or [1, 1]: some layouts want group after group in memory
    packed: Tensor

    def _derive(self) -> None:
        super()._derive()
        self._record(self.__dict__.get("_layout", CANONICAL))

    def _record(self, layout: Layout) -> Layout:
        self._layout, self._numbers = layout, (*self.format.numbers, layout.number, *self.format.numbers_behind)
        return layout

    @property
    def layout(self) -> Layout:
        """The layout of ``packed``. It is another one where somebody else put codes there, or moved those of a tied
        layer: their shape then says so."""
        packed, sizes = self._buffers["packed"], (self.format.in_features, self.format.bits)
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
        super().prepare(owned=owned)
        self._arrange(self.layouts(self.device), owned)
        if self._buffers["packed"] is not None:
            registry.settle(self.packed.data, self._layout)
        return self

    def _prepare_to_move(self, device: torch.device) -> None:
        self._arrange((CANONICAL, *self.layouts(device)))

    def _arrange(self, wanted: tuple[Layout, ...], owned: bool = False) -> None:
        """Bring codes that are in none of ``wanted`` into the first one, for all who share them."""
        packed, now = self._buffers["packed"], self.layout
        if packed is not None and now not in wanted:
            sizes = self.format.bits, self.format.in_features
            packed.data = change(packed.data, now, wanted[0], *sizes, owned)
            self._record(wanted[0])
        for name in self.group_tensors:
            values = self._tensor(name)
            if values is None or isinstance(values, nn.Parameter):
                continue  # what is trained stays contiguous: it may be sharded
            if wanted[0].values_by_group:
                values.data = by_group(values.data)
            elif not any(layout.values_by_group for layout in wanted):
                values.data = values.data.contiguous()

    def _held(self, name: str, tensor: Tensor) -> TensorSpec:
        shape, dtype = super()._held(name, tensor)
        if name != "packed":
            return shape, dtype
        sizes = self.format.in_features, self.format.bits
        layout = layouts.fitting(tensor, *sizes) or CANONICAL
        return (shape[0], *layout.row_shape(*sizes)), dtype

    def _as_held(self, name: str, tensor: Tensor) -> Tensor:
        held, sizes = self._buffers["packed"], (self.format.bits, self.format.in_features)
        if name != "packed" or held is None:
            return super()._as_held(name, tensor)
        given = layouts.fitting(tensor, *reversed(sizes)) or CANONICAL
        device = tensor.device if held.device.type == "meta" else held.device  # it may take the place of that on meta
        return tensor if given is self.layout else change(tensor.to(device), given, self.layout, *sizes)

    def _canonical(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        layout, sizes = self.layout, (self.format.bits, self.format.in_features)
        if name == "packed" and not layout.fits(tensor, *reversed(sizes)):  # held elsewhere, as it was then
            layout = layouts.fitting(tensor, *reversed(sizes)) or layout
        if name != "packed" or layout is CANONICAL:
            return super()._canonical(name, tensor, dtype)
        return once(tensor, "canonical", lambda codes: change(codes, layout, CANONICAL, *sizes))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()  # unpickled where other kernels run
