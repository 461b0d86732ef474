"""What is done once for a model on a GPU: compiling its kernels, and measuring their configurations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import registry
from lowbit.backends.triton import launch, tuning
from lowbit.backends.triton.tuning import Config, Question
from lowbit.core.family import dtype_name
from lowbit.nn.embedding import EmbeddingLayer
from lowbit.nn.experts import ExpertsLayer
from lowbit.nn.layer import Layer, layers

# Beyond _EVERY_M_UP_TO rows, launches depend on M only through multiples of this.
_ROWS = 16
_EVERY_M_UP_TO = 256
# of a stack of more: as many for each row of x are counted on
_EXPERTS_OF_A_ROW = 16
# rows of x, each for an expert of its own, that stand for decoding where a stack is measured
_MET_IN_DECODING = 8


def warmup(model: nn.Module, max_m: int) -> int:
    """Compile every kernel that the packed layers of ``model`` can need for up to ``max_m`` rows of input.

    Args:
        model: a converted model; its layers on a GPU are prepared, those elsewhere have nothing to compile.
        max_m: the largest number of rows (tokens of a batch) that a layer will be given. Of a stack of experts a row
            may meet up to 16.

    Returns:
        How many kernels were compiled, or loaded from Triton's cache on disk.
        ``lowbit.backends.triton.launch.compilations()`` counts them, and does not rise any more for inputs of up to
        ``max_m`` rows in the layers' dtype.

    Raises:
        ValueError: ``max_m`` is below 1.
    """
    if not isinstance(max_m, int) or max_m < 1:
        raise ValueError(f"max_m must be an integer of at least 1: got max_m={max_m!r}")
    before = launch.compilations()
    seen: set[Any] = set()
    with torch.no_grad():
        for layer in _on_gpu(model):
            layer.prepare()
            for inputs in _inputs(layer, max_m):
                with launch.collecting() as planned:
                    layer.forward(*inputs)
                new = {step.signature for step in planned} - seen
                if new:
                    layer.forward(*inputs)
                    seen |= new
    return launch.compilations() - before


def _on_gpu(model: nn.Module) -> Iterator[Layer]:
    for layer in layers(model).values():
        if _may_run_triton(layer.device.type):
            yield layer


def _may_run_triton(device_type: str) -> bool:
    """Whether calls go to Triton, or fall through to it from the backend before it."""
    active = registry.active_backend(device_type)
    falls_through = registry.forced() == "auto" and active != "reference" and device_type == "cuda"
    return active == "triton" or (falls_through and "triton" in registry.able_on(device_type))


def _sizes(max_m: int) -> list[int]:
    few = range(1, min(max_m, _EVERY_M_UP_TO) + 1)
    return [*few, *range(_EVERY_M_UP_TO + _ROWS, max_m + _ROWS, _ROWS)]


def _inputs(layer: Layer, max_m: int) -> Iterator[tuple[Tensor, ...]]:
    """Inputs that together launch everything that up to ``max_m`` rows of x can."""
    if not isinstance(layer, ExpertsLayer):
        for m in _sizes(max_m):
            yield (_input(layer, m),)
        return
    # Launches depend on the rows of y, each with an expert: all alike, or, where they do not go round, a few.
    experts = layer.num_experts
    most = max(1, max_m * min(experts, _EXPERTS_OF_A_ROW) // experts)
    for s in [*range(1, experts), *(m * experts for m in _sizes(most))]:
        yield _experts_input(layer, 1 if s <= experts else s // experts, s)
        if 1 < s <= experts:
            yield _experts_input(layer, s, s)


def _input(layer: Layer, m: int) -> Tensor:
    if isinstance(layer, EmbeddingLayer):
        return torch.zeros(m, dtype=torch.int64, device=layer.device)
    return torch.zeros(m, layer.format.in_features, dtype=layer.dtype, device=layer.device)


def _experts_input(layer: ExpertsLayer, tokens: int, s: int) -> tuple[Tensor, Tensor]:
    """``tokens`` rows of x for S rows of y, the experts of which take turns."""
    x = torch.zeros(tokens, layer.in_features, dtype=layer.dtype, device=layer.device)
    return x, torch.arange(s, device=layer.device) % layer.num_experts


def tune(model: nn.Module, max_m: int = tuning.LARGEST_M) -> list[dict[str, Any]]:
    """Measure the configurations of the matrix products of a model's layers on this GPU, and keep the fastest.

    It takes minutes. The rows go to the user's file (:func:`lowbit.backends.triton.tuning.cache_file`), where every
    later process finds them. Nothing else measures.

    Args:
        model: a converted model on a GPU.
        max_m: the largest number of rows of input to measure for.

    Returns:
        The new rows, as in ``lowbit/backends/triton/tuned.json``.

    Raises:
        RuntimeError: no layer of the model runs Triton kernels on a GPU.
    """
    measurable = [layer for layer in _on_gpu(model) if layer.device.type == "cuda"]
    if not measurable:
        reason = registry.why_unavailable("triton") or "no packed layer of the model is on a GPU"
        raise RuntimeError(f"tune measures layers on a GPU: {reason}")
    rows: dict[Any, dict[str, Any]] = {}
    with torch.no_grad(), registry.use_backend("triton"):  # a backend before it would take the calls
        for layer in measurable:
            for m, question in _questions(layer, max_m):
                key = (question.kernel, question.x, question.bits, question.n, question.k, m)
                if key not in rows:
                    rows[key] = _measure(layer, m, question)
    tuning.remember(list(rows.values()))
    return list(rows.values())


def _questions(layer: Layer, max_m: int) -> Iterator[tuple[int, Question]]:
    """The products of a layer in each regime of M that the shipped table knows."""
    with tuning.asking() as asked, launch.collecting():
        layer.forward(*_input_of(layer, 1))
    for question in dict.fromkeys(asked):
        for m in tuning.regimes(question.target, question.kernel, question.x, question.bits):
            yield min(m, max_m), question
            if m >= max_m:
                break


def _input_of(layer: Layer, m: int) -> tuple[Tensor, ...]:
    """m rows of x, or for each expert that a call may meet m rows."""
    if not isinstance(layer, ExpertsLayer):
        return (_input(layer, m),)
    met = layer.num_experts if m > _ROWS else min(layer.num_experts, _MET_IN_DECODING)
    return _experts_input(layer, m * met, m * met)


def _measure(layer: Layer, m: int, question: Question) -> dict[str, Any]:
    from triton.testing import do_bench

    x, *ids = _input_of(layer, m)
    x = torch.randn_like(x, dtype=torch.float32).to(x.dtype)
    times: dict[Config, float] = {}
    for config in candidates(m, question):
        try:
            with tuning.using(config):
                times[config] = float(do_bench(lambda: layer.forward(x, *ids), warmup=5, rep=20, return_mode="median"))
        except _does_not_fit():
            continue
    best = min(times, key=lambda config: times[config])
    where = f"{torch.cuda.get_device_name(layer.device)}, torch {torch.__version__}"
    return {
        "kernel": question.kernel, "arch": question.target.name, "x": [dtype_name(question.x)],
        "bits": [question.bits], "n": question.n, "k": question.k, "max_m": m,
        "block_n": best.block_n, "block_m": best.block_m, "warps": best.warps, "stages": best.stages,
        "split": best.split, "dense": best.dense,
        "source": f"measured: {1e3 * times[best]:.1f} us by do_bench, {where}, {date.today()}",
    }  # fmt: skip


def _does_not_fit() -> tuple[type[Exception], ...]:
    """What Triton raises for a configuration that needs more shared memory or registers than there are."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def candidates(m: int, question: Question) -> Iterator[Config]:
    """What :func:`tune` measures: the shipped choice first."""
    q = question
    yield tuning.choose(q.target, q.kernel, q.x, q.bits, m, q.n, q.k, q.experts)
    if question.x != torch.int8 and not question.experts:
        yield Config(dense=True)
    largest = max(16, min(128, 1 << (m - 1).bit_length()))
    blocks = [(n, b) for n in (64, 128) for b in (16, 32, 64, 128) if b in (largest, largest // 2)]
    for (block_n, block_m), warps, stages in itertools.product(blocks, (4, 8), (2, 3, 4)):
        programs = -(-question.n // block_n) * -(-m // block_m) * max(1, question.experts)
        for split in (1, 2, 4, 8, 16):
            if split == 1 or (programs * split <= 8 * question.target.processors and split * 256 <= question.k):
                yield Config(block_n, block_m, warps, stages, split)
