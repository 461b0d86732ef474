"""The experts of one layer of a mixture, from hidden states to their weighted sum: ours, our linear layers one after
the other, transformers' own in bfloat16, and llama.cpp's, which rounds x to int8 in blocks of 32.

A shape is (E, hidden size, intermediate size, experts for each token): Mixtral 8x7B's and Qwen3-30B-A3B's. Single
tokens choose experts in turn, so that those of one call are not in a cache from the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import layers
from benchmarks.harness.candidate import BF16, int8_per_token, relative_error
from benchmarks.peers import ggml
from lowbit.core.activations import ActivationSpec
from lowbit.model import experts
from lowbit.packed.module import PackedExperts

GROUP = 64
OURS = [(bits, kind) for bits in (4, 8) for kind in ("bf16", "int8")]
CANDIDATES = [
    *(f"lowbit {bits}-bit g{GROUP} {kind}" for bits, kind in OURS),
    *(f"lowbit linears {bits}-bit g{GROUP} {kind}" for bits, kind in OURS),
    "transformers grouped_mm bf16",
    "transformers eager bf16",
    "llama.cpp q4_0",
    "llama.cpp q8_0",
]
MS = [1, 4, 64, 512]
SHAPES = [(8, 4096, 14336, 2), (128, 2048, 768, 8)]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def module(shape: tuple[int, int, int, int], implementation: str) -> Any:
    """transformers' module of experts with a gate, its weights on meta."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    count, hidden, width, chosen = shape
    config = transformers.MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_local_experts=count, num_experts_per_tok=chosen
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return modeling.MixtralExperts(config).to(BF16).eval()


def stack(count: int, n: int, k: int, bits: int, kind: str) -> PackedExperts:
    """Of random codes: quantizing would take minutes."""
    weights = (layers.packed_weight(n, k, bits, GROUP, "cpu", centered=True)[0] for _ in range(count))
    activations = ActivationSpec("int8" if kind == "int8" else "float").activations
    return PackedExperts.from_weights(weights, num_experts=count, dtype=BF16, activations=activations).eval()


@functools.lru_cache(maxsize=1)
def packed(shape: tuple[int, int, int, int], bits: int, kind: str) -> Any:
    made, (count, hidden, width, _) = module(shape, "eager"), shape
    experts.put(made, "gate_up_proj", stack(count, 2 * width, hidden, bits, kind))
    experts.put(made, "down_proj", stack(count, hidden, width, bits, kind))
    return made


@functools.lru_cache(maxsize=1)
def linears(shape: tuple[int, int, int, int], bits: int, kind: str) -> list[tuple[Any, Any]]:
    made = packed(shape, bits, kind)
    return [(made.gate_up_proj.expert(e).eval(), made.down_proj.expert(e).eval()) for e in range(shape[0])]


def one_after_the_other(shape: tuple[int, int, int, int], bits: int, kind: str) -> Call:
    """Each expert that is chosen, called as linear layers with its rows; the same function as :func:`packed`."""
    parts, owner = linears(shape, bits, kind), packed(shape, bits, kind)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = x.new_empty(ids.numel(), x.shape[1])
        flat = ids.flatten()
        for e in flat.unique().tolist():
            rows = (flat == e).nonzero()[:, 0]
            up, down = parts[e]
            y[rows] = down(owner._apply_gate(up(x[rows // ids.shape[1]])))
        return (y * weights.reshape(-1, 1)).view(*ids.shape, -1).sum(1)

    return call


@functools.lru_cache(maxsize=1)
def plain(shape: tuple[int, int, int, int], implementation: str) -> Any:
    packed.cache_clear()
    linears.cache_clear()
    made = module(shape, implementation)
    for name, parameter in list(made.named_parameters()):
        values = torch.empty(parameter.shape, dtype=BF16).normal_(0, shape[1] ** -0.5)
        setattr(made, name, nn.Parameter(values, requires_grad=False))
    return made


@functools.lru_cache(maxsize=1)
def of_ggml(shape: tuple[int, int, int, int], kind: str, threads: int) -> ggml.Experts:
    packed.cache_clear()
    linears.cache_clear()
    plain.cache_clear()
    return ggml.Experts(shape, kind, threads)


def test_experts(
    measure: Callable[..., None], candidate: str, shape: tuple[int, int, int, int], threads: int, m: int
) -> None:
    count, hidden, width, chosen = shape
    who, *rest = candidate.split()
    facts: dict[str, Any] = {"who": who, "family": "experts", "activations": candidate.split()[-1]}
    call: Call
    if who == "transformers":
        call, bits = plain(shape, rest[0]), 16.0
    elif who == "llama.cpp":
        peer = of_ggml(shape, rest[0], threads)
        call, bits = peer.prepared(m), 8 * peer.nbytes / (count * 3 * width * hidden)
        facts |= {"bits": int(rest[0][1]), "group": 32, "activations": "int8"}
    else:
        width_of_codes = int(rest[-3].split("-")[0])
        owner = packed(shape, width_of_codes, rest[-1])
        call = one_after_the_other(shape, width_of_codes, rest[-1]) if rest[0] == "linears" else owner
        bits = 8 * layers.layer_nbytes(owner.gate_up_proj) / (count * 2 * width * hidden)
        facts |= {"bits": width_of_codes, "group": GROUP, "linears": rest[0] == "linears"}
    x = torch.randn(m, hidden, dtype=BF16, generator=torch.Generator().manual_seed(m))
    weights = torch.full((m, chosen), 1 / chosen, dtype=BF16)
    if m == 1:  # in turn: every call reads other experts than the one before
        turns = [torch.arange(i, i + chosen)[None] % count for i in range(0, count * chosen, chosen)]
    else:
        order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(m)])
        turns = [order[:, :chosen].contiguous()]
    if who != "transformers":
        one = torch.full((1, chosen), 1, dtype=torch.int64)
        if who == "lowbit":
            up, down = (stack.expert(1).dequantize(BF16).double() for stack in (owner.gate_up_proj, owner.down_proj))
            y = call(x[:1], one, weights[:1])
        else:
            up, down = peer.stack("gate_up"), peer.stack("down")
            y = peer.prepared(1)(x[:1], one, weights[:1])
        rounded = int8_per_token if rest[-1] == "int8" else torch.Tensor.double
        gate, other = (rounded(x[:1]) @ up.t()).to(y.dtype).chunk(2, -1)  # before int8 every rounding counts
        error = relative_error(y, rounded(nn.functional.silu(gate) * other) @ down.t())
        assert error < 2e-2, f"{candidate} is wrong by {error}"
    step = 0

    def run() -> Tensor:
        nonlocal step
        step += 1
        return call(x, turns[step % len(turns)], weights)

    active = len(turns[0].unique()) * 3 * width * hidden
    measure(
        run, op="experts", name=candidate, shape="x".join(map(str, shape)), m=m, nbytes=round(active * bits / 8),
        operations=2 * m * chosen * 3 * width * hidden, **facts,
    )  # fmt: skip
