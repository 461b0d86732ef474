"""The ops of family ``kron``, made of :class:`lowbit.kron.operands.KronOperands` (:mod:`lowbit.backends.ops`)."""

from __future__ import annotations

from lowbit.backends.ops import FamilyOps
from lowbit.kron.operands import KronOperands

OPS = FamilyOps(KronOperands)
