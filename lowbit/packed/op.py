"""The ops of family ``packed``, made of :class:`lowbit.packed.operands.PackedOperands` (:mod:`lowbit.backends.ops`)."""

from __future__ import annotations

from lowbit.backends.ops import FamilyOps
from lowbit.packed.operands import PackedOperands

OPS = FamilyOps(PackedOperands)
