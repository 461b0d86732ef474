"""Which layers Triton kernels are compiled and measured for, where another backend is asked before Triton."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import lowbit
from lowbit.backends import registry
from lowbit.backends.triton import tuning
from lowbit.backends.triton.launch import TARGETS
from lowbit.model import warmup


@pytest.mark.parametrize(
    ("forced", "active", "able", "expected"),
    [
        ("auto", "triton", ("triton",), True),
        ("auto", "cuda", ("cuda", "triton"), True),  # what the CUDA kernels decline falls through
        ("auto", "cuda", ("cuda",), False),
        ("auto", "reference", (), False),
        ("cuda", "cuda", ("cuda", "triton"), False),
        ("triton", "triton", ("triton",), True),
    ],
)
def test_calls_that_fall_through_to_triton_count(monkeypatch, forced, active, able, expected):
    monkeypatch.setattr(registry, "forced", lambda: forced)
    monkeypatch.setattr(registry, "active_backend", lambda device_type: active)
    monkeypatch.setattr(registry, "able_on", lambda device_type: able)
    assert warmup._may_run_triton("cuda") is expected


def test_stacks_of_experts_are_measured_like_linears(monkeypatch):
    """Few rows of a few experts, and many of all; no candidate makes a dense weight."""
    monkeypatch.setattr(warmup, "_may_run_triton", lambda device_type: True)
    layer = lowbit.PackedExperts.from_float(torch.randn(12, 8, 64), lowbit.Packed())
    assert list(warmup._on_gpu(torch.nn.ModuleList([layer]))) == [layer]
    shapes = {m: [tuple(t.shape) for t in warmup._input_of(layer, m)] for m in (1, 16, 17)}
    assert shapes == {1: [(8, 64), (8,)], 16: [(128, 64), (128,)], 17: [(204, 64), (204,)]}
    question = tuning.Question(TARGETS["sm_90"], "packed_experts", torch.float16, 4, 16, 4096, 4096, 8)
    found = list(warmup.candidates(16, question))
    assert len(found) > 10 and not any(config.dense for config in found)


def test_tune_measures_triton_alone(monkeypatch):
    """The calls that it times must not go to a backend before Triton."""
    layer = lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed())
    inside = []

    @contextmanager
    def use_backend(name):
        inside.append(name)
        yield
        inside.append("left")

    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(registry, "use_backend", use_backend)
    monkeypatch.setattr(warmup, "_on_gpu", lambda model: iter([OnGpu()]))
    monkeypatch.setattr(warmup, "_questions", lambda layer, max_m: inside.append("asked") or iter(()))
    monkeypatch.setattr(warmup.tuning, "remember", lambda rows: None)
    assert lowbit.tune(layer) == []
    assert inside == ["triton", "asked", "left"]
