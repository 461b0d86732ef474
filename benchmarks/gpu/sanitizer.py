"""Part ``sanitizer``: compute-sanitizer on every kernel of this package, and on a planted bug that each tool must see.

``python -m benchmarks.gpu.sanitizer`` is the program that runs under the tools: it calls every kernel once.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .parts import Budget, Context, Finished, Section, execute

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SOURCE = Path(__file__).with_name("planted.cu")
FOUND = 9  # exit status of compute-sanitizer when it has found something

# Every tensor is an allocation of its own, so that reading past its end is reading past an allocation's.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PROGRAM = [sys.executable, "-m", "benchmarks.gpu.sanitizer"]

Execute = Callable[..., Finished]


def run(context: Context) -> Section:
    """Verdicts by tool: what it says about the planted bug, and about our kernels."""
    return checked(context.budget, execute, shutil.which)


def checked(budget: Budget, execute: Execute, which: Callable[[str], str | None]) -> Section:
    """The section of part ``sanitizer``; ``execute`` runs commands, ``which`` finds them."""
    sanitizer = which("compute-sanitizer") or which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return {"absent": ["compute-sanitizer"], "tools": {}, "left_out": ["every tool: no compute-sanitizer here"]}
    # without a tool first: this compiles every kernel, and a kernel that fails anyway says nothing under a tool
    plain = execute(PROGRAM, budget.left(), env=ENVIRONMENT)
    if plain.code != 0:
        return {"tools": {}, "problems": [f"the kernels do not run even without a tool: {plain.why}\n{plain.tail}"]}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 * len(TOOLS)) as pool:
        planted, refusal = build_planted(Path(folder), execute, which)

        def under(tool: str, program: Sequence[str]) -> Finished:
            return execute([*command(sanitizer, tool), *program], budget.left(), env=ENVIRONMENT, lines=200)

        on_ours = {tool: pool.submit(under, tool, PROGRAM) for tool in TOOLS}
        on_planted = {tool: pool.submit(under, tool, [planted, tool]) for tool in TOOLS} if planted else {}
        tools = {
            tool: {
                "planted": verdict(on_planted[tool].result() if planted else None, refusal, expected="bug"),
                "kernels": verdict(on_ours[tool].result(), None, expected="clean"),
            }
            for tool in TOOLS
        }
    return {"tools": tools, **complaints(tools)}


def build_planted(
    folder: Path, execute: Execute, which: Callable[[str], str | None]
) -> tuple[str | None, str | None]:
    """The program that has the planted bugs, or why there is none."""
    nvcc = which("nvcc") or which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None, "no nvcc here: the planted bug was not built"
    target = str(folder / "planted")
    built = execute([nvcc, "-arch=native", "-lineinfo", "-o", target, str(SOURCE)], 60)
    return (target, None) if built.code == 0 else (None, f"nvcc failed: {built.tail[-500:]}")


def command(sanitizer: str, tool: str) -> list[str]:
    found = [sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=20"]
    return found + ["--racecheck-report=all"] * (tool == "racecheck")


SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def verdict(finished: Finished | None, refusal: str | None, *, expected: str) -> dict[str, Any]:
    """``outcome``: ``clean``, ``found`` so many errors, or ``not run`` (the tool says nothing: ``detail``).

    ``as_expected`` is None where the tool did not run.
    """
    if finished is None:
        return {"outcome": "not run", "as_expected": None, "detail": refusal}
    summary = SUMMARY.search(finished.tail)
    if finished.code is None or summary is None:
        return {"outcome": "not run", "as_expected": None, "detail": f"{finished.why}\n{finished.tail[-1500:]}"}
    errors = int(summary.group(1))
    found = bool(errors) or finished.code == FOUND
    result = {"outcome": "found" if found else "clean", "errors": errors, "as_expected": found == (expected == "bug")}
    if not result["as_expected"]:
        result["detail"] = finished.tail[:3000]
    return result


def complaints(tools: dict[str, dict[str, Any]]) -> Section:
    """What is wrong, and what could not be said."""
    problems, left = [], []
    for tool, verdicts in tools.items():
        if verdicts["planted"]["as_expected"] is False:
            problems.append(f"{tool} does not see the planted bug: that it finds nothing else says nothing")
        if verdicts["kernels"]["as_expected"] is False:
            problems.append(f"{tool}: {verdicts['kernels']['errors']} errors in this package's kernels")
        left += [f"{tool} on {what}" for what in ("planted", "kernels") if verdicts[what]["as_expected"] is None]
    return {"problems": problems, "left_out": left}


# ------------------------------------------------------------------------ the program that runs under the tools


def small_layers() -> Iterator[tuple[str, Any]]:
    """Every family × bits, on sizes that no tile divides, made on the CPU: only our kernels run on the GPU."""
    from .formats import codebook, kron, packed

    makers = [packed(bits, group, "fp16") for bits in range(2, 9) for group in (32, None)]
    makers += [packed(4, 32, "bf16"), packed(4, 32, "fp16", int8=True), packed(8, None, "bf16", int8=True)]
    makers += [codebook(bits, scheme, "fp16") for bits in (2, 3, 4, 8) for scheme in ("row", "tensor")]
    makers += [codebook(4, "nf4", "bf16"), kron((4, 2), "fp16"), kron((2, 4), "bf16")]
    for maker in makers:
        yield maker.name, maker.prepare(68, 132, "cpu").weight


def main() -> None:
    """Call every kernel once: few rows and many, dequantize and embedding."""
    with torch.no_grad():
        for name, layer in small_layers():
            layer = layer.to("cuda")
            for m in (1, 17, 70):
                layer(torch.ones(m, 132, dtype=layer.dtype).to("cuda"))
            layer.dequantize()
            torch.cuda.synchronize()
            print(name, flush=True)


if __name__ == "__main__":
    main()
