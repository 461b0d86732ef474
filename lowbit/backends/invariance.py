"""Whether a row's result may depend on the batch it sits in: one setting for every backend.

Environment:
    LOWBIT_BATCH_INVARIANT  1: it never does. 0: it may, wherever that is faster. Unset: it may on a GPU, not on a CPU
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowbit.backends.cpu import native

# None: every backend does what it does by default.
_asked: bool | None = {"": None, "0": False}.get(os.environ.get("LOWBIT_BATCH_INVARIANT", ""), True)


def on_gpu() -> bool:
    return _asked is True


def initialize() -> None:
    """Tell the native library, once it is loaded."""
    torch.ops.lowbit_native.set_batch_invariant(_asked is not False)


@contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Make every result independent of the batch it sits in, bit for bit (process-wide, within the block).

    On a GPU one configuration then serves every M, which costs speed at small and at large M. On a CPU it always holds
    but within ``batch_invariant(False)``: there ``Packed`` layers multiply few rows of bfloat16 activations as they do
    float32 ones (up to 4 bits one row, at 8 bits up to three; AVX-512 with BF16). That is faster and no less accurate,
    but the same row in a larger batch is rounded otherwise. ``LOWBIT_BATCH_INVARIANT=1`` (or ``0``) does the same for a
    whole process.
    """
    global _asked
    before = _asked
    try:
        _set(on)
        yield
    finally:
        _set(before)


def _set(asked: bool | None) -> None:
    global _asked
    _asked = asked
    if native.load() is None:
        initialize()
