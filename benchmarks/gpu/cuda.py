"""Part ``cuda``: whether the CUDA C++ kernels are right on this GPU, and how fast beside the Triton kernels.

First the self-check of the backend, then cases of every family against float64, a row alone and in a batch, another
stream, a graph. Only then are calls timed: in a graph, weights rotated through three times the last-level cache, the
Triton kernels beside them in the same process. ``lowbit/backends/cuda/dispatch.json`` is to say what these rows say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import lowbit
from benchmarks.harness import clock
from benchmarks.harness.bars import Row
from benchmarks.harness.cuda_limits import measured
from lowbit.backends import registry
from lowbit.backends.cuda import library
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close

from . import formats
from .bench import SECONDS_OF_A_ROW, Bench, Case, title
from .parts import Budget, Context, Section, stamp

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = (1, 3, 8, 16, 17, 64, 200)
Shape = tuple[int, int, int | None]
SHAPES: tuple[Shape, ...] = ((33, 257, 64), (70, 1109, 128), (13, 172, 7), (256, 4104, None))  # N, K, group_size
TIMED_SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096), (4096, 4096))  # N, K
TIMED_ROWS = (1, 16, 64, 4096)
# (bits, rows of x) at 8192 x 8192, groups of 128: at most so many microseconds
BARS = {(2, 1): 8.0, (3, 1): 10.5, (4, 1): 12.0, (8, 1): 20.0, (4, 64): 18.0}


def run(context: Context) -> Section:
    """The section of part ``cuda``: the library, what was checked, and rows."""
    head: Section = {**stamp(), "library": str(library.path())}
    reason = registry.why_unavailable("cuda")
    if reason is not None:
        return {**head, "problems": [f"the backend cuda cannot run: {reason}"]}
    head["architectures"] = list(library.architectures())
    checked, problems = check("cuda", context.budget)
    section: Section = {**head, "checked": checked, "problems": problems}
    if problems:
        return {**section, "left_out": ["the times: what is wrong is not timed"]}
    rows, left = timed(context)
    return {**section, "rows": rows, "bars": judged(rows), "left_out": left}


# ------------------------------------------------------------------------------------------------------------- right


@torch.no_grad()
def check(device: str, budget: Budget, shapes: Sequence[Shape] = SHAPES) -> tuple[int, list[str]]:
    """How many cases were right, and what was wrong. Every case runs on the backend ``cuda``."""
    right, problems = 0, []
    with lowbit.use_backend("cuda"):
        for name, case in _cases(device, shapes):
            if not budget:
                problems.append(f"the time was over before {name}")
                break
            try:
                case()
                right += 1
            except Exception as error:  # an assertion, or what CUDA says
                problems.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                if len(problems) == 20 or "CUDA error" in str(error):
                    break
    return right, problems


def _cases(device: str, shapes: Sequence[Shape]) -> Iterator[tuple[str, Callable[[], None]]]:
    for i, (n, k, group_size) in enumerate(shapes):
        for bits in range(2, 9):
            for j, dtype in enumerate(DTYPES):
                m = ROWS[(i + bits + 3 * j) % len(ROWS)]
                yield f"packed {bits} bits {n}x{k} M={m} {dtype}", _packed(bits, n, k, group_size, m, dtype, device)
        for bits in range(1, 9):
            for j, dtype in enumerate(DTYPES[:2]):
                m = ROWS[(i + bits + 3 * j) % len(ROWS)]
                yield f"codebook {bits} bits {n}x{k} M={m} {dtype}", _codebook(bits, n, k, m, dtype, device)
        for bits in (2, 3, 4, 8):
            m, dtype = ROWS[(i + bits) % len(ROWS)], DTYPES[(i + bits) % len(DTYPES)]
            for made in (lowbit.PackedLinear, lowbit.CodebookLinear):
                name = f"{made.__name__} {bits} bits {n}x{k} M={m} {dtype} as int8"
                yield name, _int8(made, bits, n, k, m, dtype, device)
    yield "a row alone and in a batch", lambda: _same_in_every_batch(device)
    if device != "cpu":
        yield "another stream", _another_stream
        yield "a graph", _graph


def _packed(
    bits: int, n: int, k: int, group_size: int | None, m: int, dtype: torch.dtype, device: str
) -> Callable[[], None]:
    from lowbit.testing.packed_cases import activations, formats, random_weight

    def case() -> None:
        found = list(formats(bits, n, k, group_size))
        weight = random_weight(found[(bits + m) % len(found)], m)
        x, bias = activations(m, k, dtype, m), torch.randn(n)
        args = (x, *weight.operands, bias, None, False, 0)
        y = torch.ops.lowbit.packed_linear(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
        assert_linear_close(y.cpu(), x, weight.dense(), bias)

    return case


def _codebook(bits: int, n: int, k: int, m: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    def case() -> None:
        layer = lowbit.CodebookLinear.from_float(torch.randn(n, k), lowbit.Codebook(bits=bits, granularity="tensor"))
        x = torch.randn(m, k).to(dtype)
        y = layer.to(device)(x.to(device)).cpu()
        assert_linear_close(y, x, layer.dequantize().cpu().to(dtype).double())

    return case


def _int8(made: Any, bits: int, n: int, k: int, m: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    def case() -> None:
        spec = lowbit.Packed if made is lowbit.PackedLinear else lowbit.Codebook
        layer = made.from_float(torch.randn(n, k), spec(bits=bits, activations="int8"))
        x = torch.randn(m, k).to(dtype)
        with lowbit.use_backend("reference"):
            expected = layer(x)
        torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), expected)

    return case


def _layer(device: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = lowbit.PackedLinear.from_float(torch.randn(96, 1024), lowbit.Packed(bits=4, group_size=128))
    return layer.half().to(device), torch.randn(100, 1024).half().to(device)


def _same_in_every_batch(device: str) -> None:
    layer, x = _layer(device)
    with lowbit.batch_invariant():
        whole = layer(x)
        for rows in (slice(3, 4), slice(0, 16), slice(40, 73)):
            assert_bitwise_equal(layer(x[rows].clone()).cpu(), whole[rows].cpu())


def _another_stream() -> None:
    layer, x = _layer("cuda")
    expected = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream is done before this
        late = x.clone()
        y = layer(late)
    stream.synchronize()
    assert_bitwise_equal(y.cpu(), expected.cpu())


def _graph() -> None:
    layer, x = _layer("cuda")
    held = [torch.empty(0, device="cuda")]
    graph = clock.capture([lambda: held.__setitem__(0, layer(x))])
    for rows in (x.flip(0), x):
        expected = layer(rows.clone())
        x.copy_(rows)
        graph.replay()
        assert_bitwise_equal(held[0].cpu(), expected.cpu())


# -------------------------------------------------------------------------------------------------------------- fast


@torch.no_grad()
def timed(context: Context) -> tuple[list[Row], list[str]]:
    """A row for each case and backend, and what there was no time for."""
    limits = context.machine.get("limits") or measured(clock.CudaClock())[0]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    bench = Bench(clock.CudaClock(), limits, getattr(properties, "L2_cache_size", 0) or 64 << 20)
    candidates = [*(formats.packed(bits, 128, "fp16") for bits in (4, 8, 2, 3, 6)), formats.codebook(4, "row", "fp16")]
    rows, left = [], []
    for shape in TIMED_SHAPES:
        for candidate in candidates:
            for m in TIMED_ROWS:
                for name in ("cuda", "triton"):
                    case = Case(candidate, shape, m)
                    if context.budget.left() < SECONDS_OF_A_ROW:
                        left.append(f"{candidate.name} {shape[0]}x{shape[1]} M={m} {name}")
                        continue
                    with lowbit.use_backend(name):
                        row = bench.row(case) | {"backend": name}
                    print(f"  {title(row)} {name}: {row.get('us_graph') or row.get('refused') or row.get('failed')}")
                    rows.append(row)
    return rows, left


def judged(rows: list[Row]) -> list[Row]:
    """The bars, and where the Triton kernels are faster: there ``dispatch.json`` must name them."""
    times = {(row["bits"], row["family"], row["shape"], row["m"], row["backend"]): row.get("us_graph") for row in rows}
    found: list[Row] = []
    for (bits, m), most in BARS.items():
        got = times.get((bits, "packed", "8192x8192", m, "cuda"))
        verdict = "not measured" if got is None else "met" if got <= most else "missed"
        found.append({"bar": f"{bits} bits 8192x8192 M={m}: µs", "wanted": most, "got": got, "verdict": verdict})
    for (bits, family, shape, m, name), us in times.items():
        other = times.get((bits, family, shape, m, "triton"))
        if name == "cuda" and us and other:
            verdict = "met" if us <= other else "missed"
            what = f"{family} {bits} bits {shape} M={m}: times Triton's"
            found.append({"bar": what, "wanted": 1.0, "got": round(us / other, 3), "verdict": verdict})
    return found
