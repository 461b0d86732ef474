"""The ops of family ``codebook``, made of :class:`lowbit.codebook.operands.CodebookOperands`
(:mod:`lowbit.backends.ops`)."""

from __future__ import annotations

from lowbit.backends.ops import FamilyOps
from lowbit.codebook.operands import CodebookOperands

OPS = FamilyOps(CodebookOperands)
