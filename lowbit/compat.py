"""The paths that modules had before version 0.2: imports and pickles that name them keep working."""

from __future__ import annotations

import importlib
import sys

from lowbit.core import quantizer

_MOVED = {
    "bitpack": "core.bitpack",
    "blocks": "backends.cpu.blocks",
    "calibrate": "model.calibrate",
    "codebook.read": "codebook.lossless",
    "convert": "model.convert",
    "dispatch": "backends.registry",
    "family": "core.family",
    "gpu": "backends.triton",
    "gpu.launch": "backends.triton.launch",
    "gpu.layout": "backends.triton.tiles",
    "gpu.models": "model.warmup",
    "gpu.tuning": "backends.triton.tuning",
    "hessian": "core.hessian",
    "invariance": "backends.invariance",
    "layer": "nn.layer",
    "layouts": "backends.layouts",
    "native": "backends.cpu.native",
    "outliers": "core.outliers",
    "reference": "backends.reference",
    "report": "model.report",
    "sources": "model.sources",
}


# What has left the module that an old path names: old path -> name -> module and name now.
_LEFT = {
    "convert": {
        "Plan": ("model.plan", "Plan"),
        "Specs": ("model.plan", "Specs"),
        "Statistics": ("core.quantizer", "Statistics"),
        "Target": ("model.plan", "Swap"),
        "build_group": ("model.build", "build_group"),
        "make_plan": ("model.plan", "make_plan"),
        "problem_of": ("model.plan", "problem_of"),
        "swap": ("model.surgery", "put"),
    },
    "layer": {
        "EmbeddingLayer": ("nn.embedding", "EmbeddingLayer"),
        "LinearLayer": ("nn.linear", "LinearLayer"),
        "ScaledEmbedding": ("nn.embedding", "ScaledEmbedding"),
    },
    "layouts": {
        "BLOCKS": ("backends.cpu.blocks", "BLOCKS"),
        "TILES": ("backends.triton.tiles", "TILES"),
    },
}


def install() -> None:
    """Let the old paths name the modules that there are now; called once, at the end of ``import lowbit``."""
    for old, new in _MOVED.items():
        module = importlib.import_module(f"lowbit.{new}")
        sys.modules[f"lowbit.{old}"] = module
        parent, _, name = f"lowbit.{old}".rpartition(".")
        if not hasattr(sys.modules[parent], name):  # functions of these names come first: lowbit.convert, lowbit.report
            setattr(sys.modules[parent], name, module)
    for old, names in _LEFT.items():
        for name, (new, name_now) in names.items():
            setattr(sys.modules[f"lowbit.{old}"], name, getattr(importlib.import_module(f"lowbit.{new}"), name_now))
    for family, constant in (("codebook", "QUANTIZERS"), ("kron", "SVDS"), ("packed", "QUANTIZERS")):
        setattr(sys.modules[f"lowbit.{family}.format"], constant, quantizer.names(family))
