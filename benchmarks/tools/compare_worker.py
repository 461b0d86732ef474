"""One side of ``compare``: makes layers with the ``lowbit`` of one source tree and times calls of them.

It is run by path in a process of its own, and imports nothing but torch and that ``lowbit``: of the tree's modules only
names that every version has. Each line of standard input is a command in JSON, each line of standard output its answer:

- ``{"layer": {...}}`` forks a process, which makes the layer and answers what follows, until ``{"end": true}``: so each
  layer lies in memory of its own;
- ``{"m": M}`` answers with ``digest`` (of the result's bytes) and ``seconds`` of one call;
- ``{"calls": n}`` answers with ``seconds`` of one of n calls: of CPU time, with several threads of wall time.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.codebook.format import CodebookWeight
from lowbit.kron.format import KroneckerWeight
from lowbit.packed.format import PackedWeight

COLD_BYTES = 96 << 20  # copies of a layer that take turns: together more than a last-level cache
MAX_COPIES = 64
WARM_UP = 0.1  # seconds


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def packed_weight(n: int, k: int, bits: int, group: int | None) -> PackedWeight:
    """Random codes with scales and zeros per group, or per row."""
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator(), dtype=torch.uint8)
    scales = torch.rand(n, k // (group or k), generator=generator()).add(0.5).div(2**bits * k**0.5)
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    return PackedWeight(codes, scales.half() if group else scales, zeros, bits, group)


def codebook_weight(n: int, k: int, bits: int, group: int | None) -> CodebookWeight:
    """Random codes; a table per row, or one table and scales per group, as NF4 has them."""
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator(), dtype=torch.uint8)
    table = torch.randn(1 if group else n, 1, 1 << bits, generator=generator()).half()
    if not group:
        return CodebookWeight(codes, table)
    scales = torch.rand(n, k // group, generator=generator()).half() / k**0.5
    return CodebookWeight(codes, table, scales, group)


def kron_weight(n: int, k: int, a: list[int], bits: int, dtype: torch.dtype) -> KroneckerWeight:
    """Random dense factors, or packed ones of ``bits``."""
    n1, k1 = a
    shapes = ((n1, k1), (n // n1, k // k1))
    if bits:
        return KroneckerWeight(*(packed_weight(*shape, bits, None) for shape in shapes), rank=1)
    dense = [torch.randn(1, *shape, generator=generator()) / shape[1] ** 0.5 for shape in shapes]
    return KroneckerWeight(*(factor.to(dtype) for factor in dense))


def make_layer(what: dict[str, Any]) -> nn.Module:
    """A linear layer, or an embedding, of any family; arranged for the kernels of this device."""
    n, k = what["shape"]
    bits, group = what.get("bits", 0), what.get("group")
    dtype = torch.bfloat16 if what["activations"] == "bf16" else torch.float32
    if what["family"] == "packed":
        weight, classes = packed_weight(n, k, bits, group), (lowbit.PackedLinear, lowbit.PackedEmbedding)
    elif what["family"] == "codebook":
        weight, classes = codebook_weight(n, k, bits, group), (lowbit.CodebookLinear, lowbit.CodebookEmbedding)
    else:
        weight = kron_weight(n, k, what["a"], bits, dtype)
        classes = lowbit.KroneckerLinear, lowbit.KroneckerEmbedding
    if what["op"] == "gather":
        return classes[1].from_weight(weight, dtype=dtype).eval()
    activations = "int8" if what["activations"] == "int8" else "float"
    return classes[0].from_weight(weight, activations=activations, dtype=dtype).eval()


def copies(layer: nn.Module, cold: bool) -> list[nn.Module]:
    """So many that each comes from memory when its turn comes; ``cold=False``: the layer alone."""
    nbytes = sum(t.nbytes for t in itertools.chain(layer.buffers(), layer.parameters()))
    count = min(MAX_COPIES, math.ceil(COLD_BYTES / max(1, nbytes))) if cold else 1
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def input_of(what: dict[str, Any], m: int) -> Tensor:
    if what["op"] == "gather":
        return torch.randint(what["shape"][0], (m,), generator=generator())
    x = torch.randn(m, what["shape"][1], generator=generator())
    return x.bfloat16() if what["activations"] == "bf16" else x


def digest(y: Tensor) -> str:
    return hashlib.sha256(y.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Timed:
    """A layer, and a call of it that is timed."""

    def __init__(self, what: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.what = what
        self.layers = copies(make_layer(what), what["cold"])
        self.call: Callable[[], Any] = int

    def set_rows(self, m: int) -> dict[str, Any]:
        x = input_of(self.what, m)
        found = digest(self.layers[0](x))
        turn = itertools.cycle(self.layers)
        self.call = (lambda: next(turn)(x)) if len(self.layers) > 1 else functools.partial(self.layers[0], x)
        until, calls, start = time.perf_counter() + WARM_UP, 0, self.clock()
        while not calls or time.perf_counter() < until:
            self.call()
            calls += 1
        return {"digest": found, "seconds": (self.clock() - start) / calls}

    def time(self, calls: int) -> dict[str, Any]:
        call, clock = self.call, self.clock
        call()  # the other side had the core
        start = clock()
        for _ in range(calls):
            call()
        return {"seconds": (clock() - start) / calls}


Answer = Callable[[dict[str, Any]], None]


def serve(what: dict[str, Any], threads: int, answer: Answer) -> None:
    """What one layer's process does; an error is an answer, too."""
    timed: Timed | None = None
    command: dict[str, Any] = {"layer": what}
    while "end" not in command:
        try:
            if timed is None:
                timed = Timed(what, threads)
                answer({})
            else:
                answer(timed.set_rows(command["m"]) if "m" in command else timed.time(command["calls"]))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
        command = json.loads(sys.stdin.readline() or '{"end": true}')
    answer({})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not answer

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers)

    answer({"lowbit": lowbit.__file__, "backend": str(lowbit.backends()[0])})
    while line := sys.stdin.readline():
        process = os.fork()
        if not process:
            with torch.inference_mode():
                serve(json.loads(line)["layer"], int(sys.argv[1]), answer)
            os._exit(0)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
