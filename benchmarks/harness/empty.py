"""A Triton kernel that does nothing: what a launch costs. Importing this needs triton."""

from __future__ import annotations

import triton


@triton.jit
def empty(pointer):
    return
