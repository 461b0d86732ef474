"""The clocks: of a CPU, and of a GPU, inside a CUDA graph and as ``do_bench`` sees a call."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.harness import machine

Call = Callable[[], Any]

ROUND = 1e-3  # seconds at least, so that neither the clock nor the loop around a call matters


class CpuClock:
    """CPU time of one thread, which other work on the machine hardly disturbs; of several threads wall time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.now = time.process_time if threads == 1 else time.perf_counter

    def waited(self) -> float:
        """Seconds that the threads have waited for a core; with one thread they do not count."""
        return machine.waited_seconds() if self.threads > 1 else 0.0

    def median(self, call: Call, seconds: float, least: int = 5) -> float:
        """Seconds of one call: the median of so many seconds' rounds, that of quiet ones where these are enough."""
        for _ in range(2):
            call()
        calls = calls_per_round(wall_seconds(call))
        times: list[float] = []
        waits: list[float] = []
        until = time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < until:
            waited, start = self.waited(), self.now()
            for _ in range(calls):
                call()
            times.append(self.now() - start)
            waits.append(self.waited() - waited)
        return undisturbed_median(times, waits) / calls


def wall_seconds(call: Call) -> float:
    """Of one call, roughly."""
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)


def calls_per_round(once: float) -> int:
    """Of a call that takes ``once`` seconds."""
    return max(1, math.ceil(ROUND / once))


def undisturbed_median(times: list[float], waited: list[float]) -> float:
    """Of the rounds whose threads hardly waited for a core (2 %); of all, where those are fewer than three."""
    quiet = [t for t, w in zip(times, waited, strict=True) if w <= 0.02 * t]
    return statistics.median(quiet if len(quiet) >= 3 else times)


# ----------------------------------------------------------------------------------------------------- of a GPU

# A graph of fewer calls would measure how one graph follows another.
CALLS_PER_GRAPH = 20
MILLISECONDS = 40.0
SAMPLES = 9


class GpuClock(Protocol):
    """Microseconds of one call."""

    def in_graph(self, calls: Sequence[Call]) -> float:
        """Of each of ``calls``, made one after another again and again."""

    def alone(self, call: Call) -> float:
        """Of a call after which the GPU waits, and before which its cache is emptied."""


class CudaClock:
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
