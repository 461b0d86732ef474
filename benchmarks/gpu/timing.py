"""Two clocks for a call: inside a CUDA graph, without the cost of launching, and as ``do_bench`` sees it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

# A graph of fewer calls would measure how one graph follows another.
CALLS_PER_GRAPH = 20
MILLISECONDS = 40.0
SAMPLES = 9


class Timer(Protocol):
    """Microseconds of one call."""

    def in_graph(self, calls: Sequence[Call]) -> float:
        """Of each of ``calls``, made one after another again and again."""

    def alone(self, call: Call) -> float:
        """Of a call after which the GPU waits, and before which its cache is emptied."""


class CudaTimer:
    """Measures with CUDA events, on the current device."""

    def in_graph(self, calls: Sequence[Call]) -> float:
        """The median over samples of replays of one graph that holds all calls.

        Raises ``RuntimeError`` where a call cannot be captured.
        """
        rounds = math.ceil(CALLS_PER_GRAPH / len(calls))
        graph = capture([*calls] * rounds)
        once = max(replay_milliseconds(graph, 1), 1e-3)  # also the first replay, which uploads the graph
        replays = max(1, round(MILLISECONDS / SAMPLES / once))
        replay_milliseconds(graph, replays)
        samples = [replay_milliseconds(graph, replays) for _ in range(SAMPLES)]
        return 1e3 * statistics.median(samples) / (replays * rounds * len(calls))

    def alone(self, call: Call) -> float:
        from triton.testing import do_bench

        return 1e3 * float(do_bench(call, warmup=10, rep=30, return_mode="median"))


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, each made once before on a side stream, as capturing requires."""
    warm_up(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def warm_up(calls: Sequence[Call]) -> None:
    """Compile and allocate on a stream that is not the one of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def replay_milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Of all replays together."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
