"""The layouts of packed codes: named orders of the same codes in memory, objects in a registry.

| layout | shape, int32 | read by |
|---|---|---|
| ``canonical words`` (:mod:`lowbit.core.bitpack`) | ``[N, ceil(K/32)*bits]`` | every backend; what is saved and moved |
| ``tiles`` (:mod:`lowbit.backends.triton.tiles`) | ``[N, ceil(K/256), 8*bits]`` | the Triton kernels of every family |
| ``blocks`` (:mod:`lowbit.backends.cpu.blocks`) | ``[N, ceil(K/32), bits, 1]`` | the CPU kernels of family ``packed`` |

A layer records the layout that its codes are in, and hands its number to the ops. Each layout holds the same codes bit
for bit; the way from one to another goes through canonical words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowbit.core.bitpack import unpack, words_per_row

_SAMPLE = (1000, 3)  # K and bits at which shapes are looked at


@dataclass(frozen=True, eq=False)
class Layout:
    """How codes lie in memory.

    Attributes:
        name: for messages and records.
        number: what the ops' argument ``layout`` says; it is in exported graphs, so it never changes.
        row_shape: (K, bits) -> the shape behind the first dimension, N.
        from_canonical, to_canonical: (tensor, bits, K) -> tensor.
        codes: (tensor, bits, K) -> the codes, uint8 ``[N, K]``.
        rows: (tensor, rows, bits) -> some rows, in any order, as canonical words; ``None``: rows are independent, and
            stay in this layout.
        in_place: :attr:`from_canonical` in the memory of its argument, which nobody else needs.
        rows_together: a range of rows that begins at a multiple of this is in this layout by itself.
        dim: the number of dimensions.
        values_by_group: kernels read the scales and zeros of one group of columns for many rows at a time.
    """

    name: str
    number: int
    row_shape: Callable[[int, int], tuple[int, ...]]
    from_canonical: Callable[[Tensor, int, int], Tensor]
    to_canonical: Callable[[Tensor, int, int], Tensor]
    codes: Callable[[Tensor, int, int], Tensor]
    rows: Callable[[Tensor, Tensor, int], Tensor] | None = None
    in_place: Callable[[Tensor, int, int], Tensor] | None = None
    rows_together: int = 1
    values_by_group: bool = False
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", 1 + len(self.row_shape(*_SAMPLE)))

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.name,)  # copies and pickles stay the one in the registry

    def fits(self, packed: Tensor, in_features: int, bits: int) -> bool:
        """Whether the shape of ``packed`` is that of this layout."""
        return tuple(packed.shape[1:]) == self.row_shape(in_features, bits)


_layouts: dict[int, Layout] = {}


def register(layout: Layout) -> Layout:
    """Make a layout known.

    Raises ``ValueError`` where its name, its number or the shape of its tensors is another's: a tensor that somebody
    else put into a layer is never taken for one in another layout.
    """
    for known in _layouts.values():
        for what in ("name", "number"):
            if getattr(layout, what) == getattr(known, what):
                raise ValueError(f"a layout needs a {what} of its own: got {what}={getattr(layout, what)!r}")
        if layout.row_shape(*_SAMPLE) == known.row_shape(*_SAMPLE):
            raise ValueError(f"a layout needs shapes of its own: {layout.name!r} has those of {known.name!r}")
    _layouts[layout.number] = layout
    return layout


def unregister(layout: Layout) -> None:
    """Forget a layout."""
    del _layouts[layout.number]


def named(name: str) -> Layout:
    """The layout of this name; raises ``ValueError`` naming those there are."""
    for layout in _layouts.values():
        if layout.name == name:
            return layout
    raise ValueError(f"layout must be one of {', '.join(repr(x.name) for x in _layouts.values())}: got layout={name!r}")


def numbered(number: int) -> Layout | None:
    """The layout that the ops' argument ``layout`` means, if any."""
    return _layouts.get(number)


def fitting(packed: Tensor, in_features: int, bits: int) -> Layout | None:
    """The layout that a tensor of this shape can be in."""
    return next((layout for layout in _layouts.values() if layout.fits(packed, in_features, bits)), None)


CANONICAL = register(
    Layout(
        "canonical words",
        0,
        row_shape=lambda k, bits: (words_per_row(k, bits),),
        from_canonical=lambda packed, bits, k: packed,
        to_canonical=lambda packed, bits, k: packed,
        codes=unpack,
    )
)


def rows_together() -> int:
    """A range of rows that begins at a multiple of this keeps every layout whole."""
    return max(layout.rows_together for layout in _layouts.values())


def change(packed: Tensor, now: Layout, to: Layout, bits: int, in_features: int, owned: bool = False) -> Tensor:
    """The codes of ``packed``, which is in ``now``, in the layout ``to``, on their device.

    ``owned``: nobody else needs the memory of ``packed``, which may be rearranged where it is.
    """
    if now is to:
        return packed
    if owned and now is CANONICAL and to.in_place is not None:
        return to.in_place(packed, bits, in_features)
    return to.from_canonical(now.to_canonical(packed, bits, in_features), bits, in_features)


def by_group(values: Tensor) -> Tensor:
    """Scales or zeros ``[N, G]``, the same tensor with group after group in memory.

    Kernels whose lanes are output rows then read them as they stand.
    """
    return values.t().contiguous().t()
