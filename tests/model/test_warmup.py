"""Which layers Triton kernels are compiled and measured for, where another backend is asked before Triton."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import lowbit
from lowbit.backends import registry
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


def test_stacks_of_experts_have_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(warmup, "_may_run_triton", lambda device_type: True)
    linear = lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed())
    experts = lowbit.PackedExperts.from_float(torch.randn(2, 8, 64), lowbit.Packed())
    assert list(warmup._on_gpu(torch.nn.ModuleList([experts, linear]))) == [linear]


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
