"""What else computes ``y = x @ W.T`` on a GPU: the vendor's library on dense weights, and other projects if installed.

A peer that is absent, or that fails, is named and gone without.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from benchmarks.harness.candidate import Candidate
from benchmarks.peers import bitsandbytes, torchao
from benchmarks.peers.gemlite import gemlite
from benchmarks.peers.torch import dense_on_gpu as dense
from benchmarks.peers.torch import int4pack_on_gpu as int4pack


def all_peers() -> list[Candidate]:
    """Every peer, the ones that the bars name first."""
    return [
        dense("fp16"), dense("bf16"), *(gemlite(bits) for bits in (4, 8, 2)), int4pack(),
        bitsandbytes.nf4("fp16"), bitsandbytes.nf4("bf16"), bitsandbytes.int8(),
        torchao.torchao("int4 weight-only", 4, "g128", lambda ao: ao.Int4WeightOnlyConfig(group_size=torchao.GROUP)),
        torchao.torchao("int8 weight-only", 8, "row", lambda ao: ao.Int8WeightOnlyConfig()),
    ]  # fmt: skip


PACKAGES = {"gemlite": "gemlite", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}


def absent(load: Callable[[str], Any] = importlib.import_module) -> dict[str, str]:
    """Family -> why it cannot be imported here."""
    reasons = {}
    for family, package in PACKAGES.items():
        try:
            load(package)
        except Exception as error:  # a broken installation raises anything
            reasons[family] = f"{package} cannot be imported: {type(error).__name__}: {str(error)[:200]}"
    return reasons
