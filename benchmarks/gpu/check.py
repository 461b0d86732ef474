"""Parts ``tests``, ``opcheck`` and ``graphs``: whether the kernels are right on this GPU, and fit into a program."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

import lowbit
from benchmarks.harness import clock

from . import formats
from .parts import ROOT, Context, Section, execute

# ------------------------------------------------------------------------------------------------------ tests

TESTS = ("*/test_kernels.py", "contracts/test_*.py", "backends/triton/test_*.py", "benchmarks/test_gpu_*.py")
WORKERS = 8
OPTIONAL = {"xdist": "pytest-xdist", "hypothesis": "hypothesis", "numpy": "numpy", "transformers": "transformers"}


def run_tests(context: Context) -> Section:
    """The project's own tests, with its kernels on this GPU: ``{"passed", "failed", ..., "failures": names}``."""
    absent = [package for module, package in OPTIONAL.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("pytest") is None:
        return {"absent": ["pytest", *absent], "problems": ["pytest is not installed: no test ran"]}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = pytest_command(report, parallel="pytest-xdist" not in absent)
        finished = execute(command, context.budget.left(), env={"LOWBIT_TEST_DEVICE": "cuda"})
        counted = count_tests(report) if report.is_file() else {}
    section: Section = {"absent": absent, **counted}
    if finished.code is None:
        section["left_out"] = ["the tests that had not run when the time was over"]
    section["problems"] = run_problems(counted, finished.code, finished.tail)
    return section


def pytest_command(report: Path, parallel: bool) -> list[str]:
    files = sorted(path for pattern in TESTS for path in glob.glob(str(ROOT / "tests" / pattern)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    # a module whose own imports are missing here must not cost the others
    command += ["--continue-on-collection-errors", "--tb=short", f"--junitxml={report}"]
    return [*command, *(["-n", str(WORKERS)] if parallel else []), *files]


def count_tests(report: Path) -> Section:
    """Counts and the names of failures from pytest's JUnit file."""
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    failures, reasons = [], {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        counts[{"failure": "failed", "error": "errors"}.get(outcome, outcome)] += 1
        if outcome in ("failure", "error"):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append(name)
            element = case.find(outcome)
            reasons[name] = str(element.get("message") if element is not None else "")[:200]
    return {**counts, "failures": failures[:500], "reasons": dict(list(reasons.items())[:20])}


def run_problems(counted: Section, code: int | None, tail: str) -> list[str]:
    """What is wrong with a test run; pytest's status 1 is failures, which are counted."""
    problems = [f"{counted[what]} {what}" for what in ("failed", "errors") if counted.get(what)]
    if code is not None and (code not in (0, 1) or (code == 1 and not problems)):
        problems.append(f"pytest ended with status {code}: {tail[-1500:]}")
    if code is None and not counted:
        problems.append(f"pytest did not end in time and left no report: {tail[-1500:]}")
    if counted and not counted["passed"]:
        problems.append("no test passed")
    return problems


# ---------------------------------------------------------------------------------------------------- opcheck


def run_opcheck(context: Context) -> Section:
    """``torch.library.opcheck`` of every op of the three families on tensors of this GPU."""
    passed, problems, left = [], [], []
    for name, op, args, kwargs in op_calls("cuda"):
        if not context.budget:
            left.append(name)
            continue
        try:
            torch.library.opcheck(op, args, kwargs)
            passed.append(name)
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:600]}")
    return {"passed": passed, "problems": problems, "left_out": left}


Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def op_calls(device: str) -> Iterator[Call]:
    """Name, op and arguments: linear, dequantize and embedding of every family, floats that can be trained included."""
    yield from _packed_calls(device)
    yield from _codebook_calls(device)
    yield from _kron_calls(device)


def _x(k: int, dtype: torch.dtype, device: str) -> Tensor:
    from lowbit.testing.packed_cases import activations

    return activations(3, k, dtype).to(device).requires_grad_()


def _ids(device: str) -> Tensor:
    return torch.tensor([[1, 0], [7, 7]], device=device)


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _packed_calls(device: str) -> Iterator[Call]:
    from lowbit.packed.format import PackedFormat
    from lowbit.testing.packed_cases import random_weight

    for bits, dtype, int8 in ((2, torch.float16, False), (4, torch.bfloat16, True), (5, torch.float32, False)):
        format = PackedFormat(bits, 9, 70, 32, "group", "int", "float16", outliers=12, outlier_dtype="float16")
        w = random_weight(format)
        weight = tuple(_to(value, device) for value in w.operands)
        yield from _coded_calls("packed", weight, 70, dtype, int8, f"packed {bits}-bit {dtype}")


def _coded_calls(
    family: str, weight: tuple[Any, ...], k: int, dtype: torch.dtype, int8: bool, name: str
) -> Iterator[Call]:
    """The ops of a family of packed codes on a weight ``[9, k]``."""
    device = weight[0].device.type
    linear, dequantize, embedding = (
        getattr(torch.ops.lowbit, f"{family}_{op}").default for op in ("linear", "dequantize", "embedding")
    )
    bias = torch.randn(9, device=device, requires_grad=True)
    activation = (None, int8, 0) if family == "packed" else (None, int8)
    yield f"{name} linear", linear, (_x(k, dtype, device), *weight, bias, *activation), {}
    yield f"{name} dequantize", dequantize, (*weight, k, dtype), {}
    yield f"{name} embedding", embedding, (_ids(device), *weight, k, dtype), {}


def _codebook_calls(device: str) -> Iterator[Call]:
    from lowbit.testing.codebook_cases import Kind, random_weight

    kinds = [
        (Kind(4, 9, 70, 32, "tensor", "float", outliers=12), torch.float16, False),
        (Kind(3, 9, 70, 70, "row", "none"), torch.bfloat16, False),
        (Kind(2, 9, 70, 32, "tensor", "nested"), torch.float32, True),
    ]
    for kind, dtype, int8 in kinds:
        w = random_weight(kind)
        weight = tuple(_to(value, device) for value in w.operands)
        yield from _coded_calls("codebook", weight, kind.k, dtype, int8, f"codebook {kind} {dtype}")


def _kron_calls(device: str) -> Iterator[Call]:
    from lowbit.testing.kron_cases import Kind, random_weight

    ops = torch.ops.lowbit
    cases = [
        (random_weight((2, 3, 4, 5, 6)).permuted(0), torch.float16),
        (random_weight((1, 3, 4, 5, 6), Kind(torch.bfloat16), Kind(torch.float16, bits=4)), torch.bfloat16),
        (random_weight((1, 3, 4, 5, 6)), torch.float32),
    ]
    for i, (w, dtype) in enumerate(cases):
        arguments = {name: _to(value, device) for name, value in w.arguments.items()}
        bias = torch.randn(w.n, device=device, requires_grad=True)
        name = f"kron case {i} {dtype}"
        yield f"{name} linear", ops.kron_linear.default, (_x(w.k, dtype, device),), {"bias": bias, **arguments}
        yield f"{name} dequantize", ops.kron_dequantize.default, (), {"dtype": dtype, **arguments}
        yield f"{name} embedding", ops.kron_embedding.default, (_ids(device),), {"dtype": dtype, **arguments}


# ----------------------------------------------------------------------------------------------------- graphs

MAX_M = 300
ROWS = (1, 3, 16, 40, 257)


def run_graphs(context: Context) -> Section:
    """Every check of :data:`CHECKS` on a layer of every family: ``{"passed": names, "problems": what failed}``."""
    passed: list[str] = []
    problems: list[str] = []
    left: list[str] = []
    with torch.no_grad():
        layers = some_layers("cuda")
        for check_name, check in CHECKS.items():
            for layer_name, layer in layers.items():
                name = f"{check_name}: {layer_name}"
                if not context.budget:
                    left.append(name)
                    continue
                found = attempt(check, layer)
                problems += [f"{name}: {problem}" for problem in found]
                passed += [] if found else [name]
    return {"passed": passed, "problems": [*formats.fallback(), *problems], "left_out": left}


def attempt(check: Callable[[nn.Module], list[str]], layer: nn.Module) -> list[str]:
    try:
        return check(layer)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:400]} ({_where(error)})"]


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno}"


def some_layers(device: str, n: int = 384, k: int = 512) -> dict[str, nn.Module]:
    """A small layer of every family and kind of activation."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half()
    packed, codebook, kron = lowbit.PackedLinear, lowbit.CodebookLinear, lowbit.KroneckerLinear
    half = weight.half()
    per_row: dict[str, Any] = {"granularity": "row", "zeros": "int"}
    layers = {
        "packed 4-bit g64 fp16": packed.from_float(half, lowbit.Packed(bits=4, group_size=64, zeros="int"), bias),
        "packed 3-bit row bf16": packed.from_float(weight.bfloat16(), lowbit.Packed(bits=3, **per_row)),
        "packed 8-bit int8 fp16": packed.from_float(half, lowbit.Packed(bits=8, activations="int8", **per_row), bias),
        "packed 2-bit fp32, outliers": packed.from_float(weight, lowbit.Packed(bits=2, outliers=0.01, **per_row)),
        "codebook nf4 g64 fp16": codebook.from_float(half, lowbit.Codebook(table="nf4", group_size=64), bias),
        "codebook 3-bit row bf16": codebook.from_float(weight.bfloat16(), lowbit.Codebook(bits=3, iterations=2)),
        "kron 16x16 fp16": kron.from_float(half, lowbit.Kronecker(shape=(16, 16)), bias),
        "kron 2x1 bf16": kron.from_float(weight.bfloat16(), lowbit.Kronecker(shape=(2, 1))),
    }
    return {name: layer.to(device).eval() for name, layer in layers.items()}


def inputs(layer: Any, m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + m)
    return torch.randn(m, layer.in_features, generator=generator).to(layer.device, layer.dtype)


def difference(got: Tensor, want: Tensor) -> str | None:
    """How ``got`` differs from ``want`` bit for bit; None where it does not."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    integer = {2: torch.int16, 4: torch.int32}[got.element_size()]
    differ = got.contiguous().view(integer) != want.contiguous().view(integer)
    count = int(differ.sum())
    if not count:
        return None
    largest = float((got.double() - want.double()).abs().max())
    return f"{count} of {got.numel()} elements differ, by at most {largest:.3g}"


def compared(results: Iterator[tuple[str, Tensor, Tensor]]) -> list[str]:
    """What differs, of (name, got, want)."""
    found = ((name, difference(got, want)) for name, got, want in results)
    return [f"{name}: {problem}" for name, problem in found if problem]


def replay(layer: Any) -> list[str]:
    """A replayed CUDA graph equals an eager call, on the captured input and on others."""
    def results() -> Iterator[tuple[str, Tensor, Tensor]]:
        for m in ROWS:
            x = inputs(layer, m)
            outputs: list[Tensor] = []
            graph = clock.capture([lambda x=x, outputs=outputs: outputs.append(layer(x))])
            for seed in range(3):
                x.copy_(inputs(layer, m, seed))
                outputs[-1].fill_(torch.nan)  # an output that the graph does not write shows
                graph.replay()
                yield f"M={m}, input {seed}", outputs[-1].clone(), layer(inputs(layer, m, seed))

    return compared(results())


def compiled(layer: Any) -> list[str]:
    """``torch.compile(fullgraph=True, dynamic=True)`` equals an eager call, for every number of rows."""
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, dynamic=True)
    return compared((f"M={m}", fast(inputs(layer, m)), layer(inputs(layer, m))) for m in ROWS)


def streams(layer: Any) -> list[str]:
    """Two streams at once equal one call after the other."""

    def results() -> Iterator[tuple[str, Tensor, Tensor]]:
        for m in ROWS:
            xs = [inputs(layer, m, seed) for seed in range(2)]
            want = [layer(x) for x in xs]
            got: list[list[Tensor]] = [[], []]
            both = [torch.cuda.Stream(), torch.cuda.Stream()]
            torch.cuda.synchronize()
            for _ in range(20):
                for i, stream in enumerate(both):
                    with torch.cuda.stream(stream):
                        got[i].append(layer(xs[i]))
            torch.cuda.synchronize()
            yield from ((f"M={m}, stream {i}", y, want[i]) for i in range(2) for y in got[i])

    return compared(results())


def other_device(layer: Any) -> list[str]:
    """A layer on a device that is not the current one; passes where there is only one."""
    if torch.cuda.device_count() < 2:
        return []
    import copy

    want = layer(inputs(layer, 3))
    moved = copy.deepcopy(layer).to("cuda:1")
    return compared(iter([("cuda:1", moved(inputs(moved, 3)).to(want.device), want)]))


def no_synchronisation(layer: Any) -> list[str]:
    """After its first call, a layer never makes the CPU wait for the GPU."""
    xs = [inputs(layer, m) for m in ROWS]
    for x in xs:
        layer(x)
    torch.cuda.synchronize()
    with refusing_synchronisation():
        for x in xs:
            layer(x)
    return []


@contextmanager
def refusing_synchronisation() -> Iterator[None]:
    """Whatever waits for the GPU raises; checked first on something that does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        refused = False
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError:
            refused = True
        if not refused:
            raise RuntimeError("this torch does not notice synchronisation: nothing can be said")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_compilation(layer: Any) -> list[str]:
    """After ``lowbit.warmup(layer, MAX_M)`` no number of rows up to MAX_M compiles a kernel."""
    if not hasattr(lowbit, "warmup"):
        return ["lowbit.warmup does not exist"]
    if not sees_compilations():
        return ["this Triton does not tell of compilations: nothing can be said"]
    with counting_compilations() as count:
        lowbit.warmup(layer, MAX_M)
        before = count[0]
        for m in range(1, MAX_M + 1):
            layer(inputs(layer, m))
    late = count[0] - before
    return [f"{late} kernels were compiled after warmup, for M up to {MAX_M}"] if late else []


@contextmanager
def counting_compilations() -> Iterator[list[int]]:
    """Counts kernels that Triton compiles, or loads from its cache on disk, for the first time in this process."""
    from triton import knobs

    count = [0]

    def hook(*_: Any, **__: Any) -> None:
        count[0] += 1

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = hook
    try:
        yield count
    finally:
        knobs.runtime.jit_post_compile_hook = before


def sees_compilations() -> bool:
    """Whether a kernel that this process has not compiled yet is counted."""
    import triton

    from benchmarks.harness.empty import empty

    with counting_compilations() as count:
        triton.jit(empty.fn)[(1,)](torch.zeros(16, device="cuda"), num_warps=1, enable_fp_fusion=True)
    return count[0] > 0


# Warm-up comes first: afterwards nothing is left to compile.
CHECKS: dict[str, Callable[[Any], list[str]]] = {
    "no compilation after warmup": no_compilation,
    "graph replay equals eager": replay,
    "two streams equal one": streams,
    "not the current device": other_device,
    "no synchronisation": no_synchronisation,
    "torch.compile equals eager": compiled,
}
