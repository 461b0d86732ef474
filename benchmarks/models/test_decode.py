"""Tokens per second of a 1.1B Llama: 32 tokens by ``transformers``' greedy ``generate``, and a prompt of 128.

Packed layers beside bfloat16, beside the same codes in OpenVINO, which runs the whole model as one graph, and beside
llama.cpp with weights of Q4_K and Q6_K. Activations are bfloat16 in torch, float32 in the others; *compiled* is
float32 with the step of a token compiled by torch (docs/serving.md). Below the table: where the time goes.

Machines change their speed while one candidate after the other is timed: ``python -m benchmarks.models.decode`` takes
turns.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from benchmarks.harness.candidate import int8_per_token, relative_error, require
from benchmarks.models import llama
from lowbit.testing.numerics import frobenius_bound

CANDIDATES = [
    "torch bf16", "lowbit 4-bit g128 int8", "lowbit 4-bit g128 int8 compiled", "lowbit 2-bit g128 int8",
    "openvino w4 g128 int8", "llama.cpp q4_k",
]  # fmt: skip
ALL_CANDIDATES = [
    *CANDIDATES, "gptqmodel w4 g128", "lowbit 2-bit g128 bf16", "lowbit 4-bit g128 bf16", "lowbit 8-bit g128 int8"
]  # fmt: skip
GENERATED, START, PROMPT = 32, 8, 128  # tokens
TOLERANCE = 2e-2  # of OpenVINO's outputs of two layers with int8 activations against float32 ones


def prompt(length: int) -> Tensor:
    return torch.randint(32000, (1, length), generator=torch.Generator().manual_seed(length))


class Torch:
    """A model of ``transformers``."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self) -> Tensor:
        ids = prompt(START)
        tokens: Tensor = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GENERATED, pad_token_id=0
        )
        return tokens

    def prefill(self) -> Tensor:
        logits: Tensor = self.model(prompt(PROMPT), use_cache=True, logits_to_keep=1).logits
        return logits


class Compiled(Torch):
    """With a cache of a fixed size, and the step of a token compiled."""

    def __init__(self, model: Any) -> None:
        from transformers import CompileConfig

        super().__init__(model)
        options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.compile = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)
        self.compile._compile_all_devices = True

    def generate(self) -> Tensor:
        ids = prompt(START)
        tokens: Tensor = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GENERATED, pad_token_id=0,
            cache_implementation="static", compile_config=self.compile,
        )  # fmt: skip
        return tokens


class Peer:
    """A decoder of another library, from ``benchmarks/peers`` or ``llama_openvino.py``."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def generate(self) -> Tensor:
        tokens: Tensor = self.decoder.generate(prompt(START), GENERATED)
        return tokens

    def prefill(self) -> Tensor:
        logits: Tensor = self.decoder.prefill(prompt(PROMPT))
        return logits


def check_packed(model: Any) -> None:
    """One layer of it, in float64."""
    layer = model.model.layers[-1].mlp.up_proj
    x = torch.randn(START, layer.in_features).to(layer.dtype)
    rounded = int8_per_token(x) if layer.format.activations == "int8" else x.double()
    off = relative_error(layer(x), rounded @ layer.dequantize(torch.float32).double().T)
    assert off <= frobenius_bound(x.dtype, layer.in_features), f"the packed model is wrong: relative error {off:.1e}"


def check_openvino(threads: int) -> None:
    """A model of two layers against our float32 layers with the same codes."""
    from benchmarks.models.llama_openvino import Decoder

    model, layers = _float32(2)
    logits = Decoder(layers, 2, model.config, threads).prefill(prompt(START))
    off = relative_error(logits, model(prompt(START)).logits[:, -1:])
    assert off <= TOLERANCE, f"the OpenVINO model is wrong: relative error {off:.1e}"


def _float32(depth: int) -> tuple[Any, dict[str, Any]]:
    """Our 4-bit model in float32, and its layers, whose codes OpenVINO takes."""
    model = lowbit.convert(llama.on_meta(depth, torch.float32), llama.spec(4, "fp32"))
    return model, llama.fill(model)


def gptqmodel() -> Any:
    """A checkpoint of GPTQ's, 4 bits in groups of 128, as transformers loads it: with GPTQModel's kernels."""
    from transformers import AutoModelForCausalLM

    from benchmarks.models.imports import write

    require("gptqmodel")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model", "tinyllama", llama.LAYERS, "gptq")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model


_held: dict[tuple[str, int | None], Any] = {}  # one model at a time


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    _held.clear()


def prepared(candidate: str, threads: int | None) -> Any:
    """The model to time; OpenVINO's is made for a number of threads."""
    if (candidate, threads) not in _held:
        _held.clear()
        gc.collect()
        _held[candidate, threads] = _prepare(candidate, threads)
    return _held[candidate, threads]


def _prepare(candidate: str, threads: int | None) -> Any:
    if candidate.startswith("openvino"):
        from benchmarks.models.llama_openvino import Decoder

        check_openvino(threads or 1)
        model, layers = _float32(llama.LAYERS)
        return Peer(Decoder(layers, llama.LAYERS, model.config, threads or 1))
    if candidate.startswith("llama.cpp"):
        from benchmarks.peers.llama_cpp import Decoder as LlamaCpp

        return Peer(LlamaCpp(llama.LAYERS, threads or 1))
    if candidate.startswith("gptqmodel"):
        return Torch(gptqmodel())
    if candidate == "torch bf16":
        return Torch(llama.dense())
    bits, _, activations, *compiled = candidate.split()[1:]
    model = llama.packed(int(bits[0]), activations, dtype=torch.float32 if compiled else torch.bfloat16)
    check_packed(model)
    return Compiled(model) if compiled else Torch(model)


def shares(model: Torch) -> dict[str, float]:
    """Of the time of generating: our operations, torch's other ones (the largest by name), and what is outside them."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("generate"):
        assert model.generate().shape == (1, START + GENERATED)
    events = {e.key: e.self_cpu_time_total for e in found.key_averages()}
    outside = events.pop("generate")
    total = outside + sum(events.values())
    ours = sum(time for name, time in events.items() if name.startswith("lowbit::"))
    largest = sorted(((t, name) for name, t in events.items() if not name.startswith("lowbit::")), reverse=True)[:4]
    parts = {"lowbit": ours, "torch": sum(events.values()) - ours, "python": outside, **{n: t for t, n in largest}}
    return {name: round(time / total, 3) for name, time in parts.items()}


@pytest.mark.parametrize("what", ["generate", "prefill"])
def test_decode(
    measure: Callable[..., None], note: Callable[[str], None], full: bool, fewest_threads: int, candidate: str,
    threads: int, what: str,
) -> None:  # fmt: skip
    pytest.importorskip("transformers")
    if not full and threads != fewest_threads:
        pytest.skip("without --full whole models run with the fewest threads only")
    package = candidate.split()[0].replace("llama.cpp", "llama_cpp")
    if package not in ("torch", "lowbit"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model = prepared(candidate, None if package in ("torch", "lowbit") else threads)
    extra = {}
    if what == "generate" and isinstance(model, Torch):
        extra["profile"] = shares(model)
        note(f"time of generating, {candidate}, {threads} thread(s): {extra['profile']}")
    measure(
        getattr(model, what), op="decode" if what == "generate" else "prefill", name=candidate, shape="llama 1.1B",
        m=GENERATED if what == "generate" else PROMPT, who=package, **extra,
    )  # fmt: skip
