"""``python -m benchmarks.gpu`` (``make gpu-check``): everything that only a GPU can show, in one command.

Parts, in order: ``machine`` (what it is, and its measured limits), ``tests``, ``opcheck``, ``graphs``, ``cuda`` (the
CUDA C++ kernels), ``sanitizer``, ``bench`` and ``report``. Each writes its section to ``<out>/gpu-<device>.json`` and
keeps the others'. It needs no network and no virtual environment; what is not installed is named and gone without.

Exit status: 0 all is well, 1 something failed or is incomplete, 2 there is no GPU (or a wrong argument).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .parts import (
    LOST,
    RESULTS,
    ROOT,
    Budget,
    Context,
    Part,
    Results,
    Runner,
    Section,
    choose,
    execute,
    launch_process,
    run_here,
)

SECONDS = 540.0
SUMMARY_LINES = 58
LIBRARY = ROOT / "lowbit" / "_C.abi3.so"


def all_parts() -> list[Part]:
    """In the order in which they run; a share is of the time that the parts before left."""
    from . import bench, check, cuda, report, sanitizer

    return [
        Part("machine", run_machine, 5),
        Part("tests", check.run_tests, 34),
        Part("opcheck", check.run_opcheck, 7),
        Part("graphs", check.run_graphs, 9),
        Part("cuda", cuda.run, 20),
        Part("sanitizer", sanitizer.run, 15),
        Part("bench", bench.run, 28),
        Part("report", report.run, 2, needs_gpu=False),
    ]


def run_machine(context: Context) -> Section:
    """The section of part ``machine``."""
    from benchmarks.harness import cuda_limits
    from benchmarks.harness.clock import CudaClock

    limits, problems = cuda_limits.measured(CudaClock())
    return {**cuda_limits.described(), "limits": limits, "problems": problems}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", metavar="NAME[,NAME]", help="these parts alone (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts together (default: {SECONDS:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that an earlier run has measured")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if not found.seconds > 0:
        parser.error(f"--seconds must be greater than 0: got {found.seconds:g}")
    return found


def build_native(budget: Budget) -> str:
    """Compile the CPU kernels in place, where there is a compiler and they are not up to date; says what was done."""
    sources = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]
    newest = max((path.stat().st_mtime for path in sources if path.is_file()), default=0.0)
    if LIBRARY.is_file() and LIBRARY.stat().st_mtime >= newest:
        return "CPU kernels: up to date"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "CPU kernels: not built, no C++ compiler here"
    seconds = budget.left() / 3
    jobs = {"MAX_JOBS": str(os.cpu_count() or 1)}
    built = execute([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, env=jobs)
    if built.code == 0 and LIBRARY.is_file():
        return "CPU kernels: built"
    return f"CPU kernels: not built ({built.why}): {built.tail[-300:].strip()}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    budget = Budget(options.seconds)
    if importlib.util.find_spec("torch") is None:
        print(f"torch is not installed for {sys.executable}: name another interpreter", file=sys.stderr)
        return 2
    try:
        chosen = choose(all_parts(), options.part)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.in_process:
        print(build_native(budget), flush=True)
    from benchmarks.harness.cuda_limits import device_name

    device = device_name()
    results = Results(options.out.resolve(), device or "none")
    possible = [part for part in chosen if device is not None or not part.needs_gpu]
    context = Context(budget, results, options.fresh)
    if options.in_process:
        leave(LOST if run_here(possible[0], context).get("device_lost") else 0)
    if device is None:
        return without_gpu(chosen, possible, context)
    runner = Runner(possible, results, budget, launch_process(options.out.resolve(), options.fresh))
    runner.run()
    sections = results.sections()
    print(summary(device, results, sections, [part.name for part in chosen], runner.skipped))
    passed = all(sections.get(part.name, {}).get("status") == "passed" for part in chosen)
    return 0 if passed else 1


def leave(status: int) -> None:
    """End this process at once: taking down a CUDA context that an error has made useless may abort it instead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def without_gpu(chosen: Sequence[Part], possible: Sequence[Part], context: Context) -> int:
    """Run what needs no GPU, here, without a results file of its own; the exit status."""
    for part in possible:
        print(f"{part.name}: {part.run(context)}")
    missing = [part.name for part in chosen if part.needs_gpu]
    if not missing:
        return 0
    print(f"no GPU: torch {_torch_version()} finds no CUDA device, so these parts did not run: {', '.join(missing)}")
    return 2


def _torch_version() -> str:
    import torch

    return torch.__version__


def summary(
    device: str, results: Results, sections: dict[str, Section], names: Sequence[str], skipped: Sequence[str] = ()
) -> str:
    """What a person wants to know, in fewer than 60 lines."""
    from .report import said

    lines = [f"== {device}: {results.path}"]
    limits = sections.get("machine", {}).get("limits", {})
    lines += ["   " + ", ".join(f"{name} {value:g}" for name, value in limits.items())] * bool(limits)
    for name in names:
        section = sections.get(name, {})
        state = "no time" if name in skipped else section.get("status", "not run")
        lines.append(f"{state:>10}  {name}: {said(name, section)}")
        lines += [f"            - {line}" for line in first_lines(section, 4)]
    bars = sections.get("bench", {}).get("bars", []) if "bench" in names else []
    missed = [bar for bar in bars if bar["verdict"] == "missed"]
    room = SUMMARY_LINES - len(lines) - 1
    lines += [f"    missed  {bar['bar']}: {bar['got']:g}, wanted {bar['wanted']:g}" for bar in missed[:room]]
    if len(missed) > room:
        lines.append(f"            ... and {len(missed) - room} more missed bars")
    return "\n".join(lines)


def first_lines(section: Section, count: int) -> list[str]:
    """The first problems, a line each, and how many more there are."""
    problems = [*section.get("problems", []), *section.get("failures", [])]
    lines = [str(problem).strip().splitlines()[0][:150] for problem in problems[:count] if str(problem).strip()]
    return [*lines, f"... and {len(problems) - count} more"] if len(problems) > count else lines


if __name__ == "__main__":
    sys.exit(main())
