"""Compile every GPU kernel that ships, on a machine without a GPU, and keep what comes out of it as a record.

    python -m benchmarks.tools.offline             # what of compiled.json is out of date, and what breaks a gate
    python -m benchmarks.tools.offline --write [--jobs 2] [--targets sm_80,gfx942]
    python -m benchmarks.tools.offline --sample    # recompile some of it and compare, too

The record (``compiled.json``) has one line for each piece of compiled code: what it needs of a GPU
(:func:`.resources.resources`), what may be expected of it (:mod:`.predict`), and a fingerprint of what it was compiled
from. Only what has another fingerprint is compiled anew. Nothing is needed but the Triton package, which carries its
own assembler and disassembler for NVIDIA and LLVM for AMD.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import sys
import tokenize
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.runtime.jit import JITCallable

from lowbit.backends.triton.launch import TARGETS, Launch, Target

from .compiling import check_compiled, compile_launch, compiling_for
from .predict import predict
from .resources import machine_code, resources

FAMILIES = ("packed", "codebook", "kron")
RECORD = Path(__file__).with_name("compiled.json")


# What is compiled and gated; the others are planned for like their nearest neighbour here.
RECORDED = {name: TARGETS[name] for name in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")}


# --- what ships --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """Code that ships: a launch, planned for a target, with a name of its own among those of the target."""

    target: Target
    name: str
    launch: Launch


def kernel_sources(kernel: Any) -> list[tuple[str, str]]:
    """What decides what a kernel means, outside Triton: (name, code) of functions, (name, value) of globals.

    Triton's own ``cache_key`` also holds line numbers, so that a comment above a kernel would change it. Modules do not
    count: a function that moves is the same function.
    """
    found: set[tuple[str, str]] = set()

    def visit(function: Any) -> None:
        module, code = function.fn.__module__, function.fn.__code__
        source = without_comments(function.src)
        if module.startswith("triton.") or (code.co_name, source) in found:
            return
        found.add((code.co_name, source))
        scope = dict(function.fn.__globals__)
        for value in [scope[name] for name in code.co_names if isinstance(scope.get(name), ModuleType)]:
            if not value.__name__.startswith("triton"):
                scope = {**vars(value), **scope}  # what is written helpers.function
        for name in code.co_names:
            value = scope.get(name)
            if isinstance(value, JITCallable):
                visit(value)
            elif isinstance(value, (int, float, str, tuple, list, dict, triton.language.constexpr)):
                found.add((name, repr(value)))

    visit(kernel)
    return sorted(found)


@cache
def without_comments(source: str) -> str:
    """The source of a function without what changes nothing: comments, its docstring, blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    (function,) = ast.parse(source).body
    if isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines[docstring.lineno - 1 : docstring.end_lineno] = []
    return "\n".join(line.rstrip() for line in lines if line.strip())


def fingerprint(launch: Launch, target: Target) -> str:
    """Equal for launches that compile to the same code with one version of Triton, and otherwise not."""
    check_compiled(launch.kernel)
    with compiling_for(target):
        *_, binder = launch.kernel.device_caches[target.name]
        _, specialization, _ = binder(**launch.arguments, **launch.constants, **launch.options, debug=False)
    parts = [target.name, kernel_sources(launch.kernel), [str(part) for part in specialization], launch.options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def configurations(targets: Iterable[Target] = RECORDED.values()) -> Iterator[tuple[str, Configuration]]:
    """Every configuration that ships, with its fingerprint; what compiles to the same code comes once."""
    for target in targets:
        names: dict[str, str] = {}  # by fingerprint
        for family in FAMILIES:
            module = importlib.import_module(f"lowbit.{family}.triton")
            for label, launches in module.shipped(target):
                for number, launch in enumerate(launches, 1):
                    mark = fingerprint(launch, target)
                    if mark in names:
                        continue
                    name = f"{family} {label}, launch {number}: {launch.kernel.__name__}"
                    if name in names.values():
                        raise ValueError(
                            f"{family}.shipped must give every configuration a name of its own: got {label!r}"
                        )
                    names[mark] = name
                    yield mark, Configuration(target, name, launch)


# --- gates -------------------------------------------------------------------------------------------------------


# Bytes that a load of weights must have in a matrix product. What tiles8 points to is a plane of one bit, of which a
# row of a tile has 32 bytes: in loads of 8 as in loads of 16 a warp reads whole sectors.
WEIGHT_LOADS = {"tiles8_ptr": 8}


def complaints(entry: dict[str, Any]) -> list[str]:
    """What is wrong with compiled code, by its entry in the record."""
    if "error" in entry:
        return [f"does not compile: {entry['error']}"]
    found = []
    if entry["spills"]:
        found.append(f"spills: must be 0: got {entry['spills']}")
    if entry["blocks"] < 1:
        found.append(f"blocks per multiprocessor: must be at least 1: got {entry['blocks']} ({entry['limit']})")
    if entry["dots"] and not entry["tensor"]:
        found.append(f"tensor-core instructions: must be there for {entry['dots']} matrix products: got 0")
    for argument, width in entry["weight_loads"].items() if entry["dots"] else ():
        least = WEIGHT_LOADS.get(argument, 16)
        if width < least:
            found.append(f"loads of weights: must be {least} bytes wide: got {width} ({argument})")
    return found


# --- the record --------------------------------------------------------------------------------------------------

Entries = dict[str, dict[str, dict[str, Any]]]  # by target, by name


def read_record(path: Path = RECORD) -> tuple[str, Entries]:
    """The version of Triton that made the record, and its entries."""
    record = json.loads(path.read_text())
    return record["triton"], record["entries"]


def write_record(entries: Entries, path: Path = RECORD) -> None:
    """One line for each entry, so that a change shows as what it is."""
    blocks = []
    for target in (name for name in TARGETS if entries.get(name)):
        lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries[target].items()))
        blocks.append(f' "{target}": {{\n' + ",\n".join(lines) + "\n }")
    path.write_text(f'{{"triton": "{triton.__version__}", "entries": {{\n' + ",\n".join(blocks) + "\n}}\n")


def entry(mark: str, configuration: Configuration) -> dict[str, Any]:
    """Compile a configuration for the record."""
    launch, target = configuration.launch, configuration.target
    try:
        compiled = compile_launch(launch, target)
    except Exception as error:  # whatever the compiler says belongs in the record
        return {"fingerprint": mark, "error": f"{type(error).__name__}: {error}"[:300]}
    code = machine_code(compiled, target)
    used = resources(compiled, target, code)
    return {"fingerprint": mark, **used, "prediction": predict(compiled, launch, target, code, used["blocks"])}


@cache
def _configurations_by_name(target: str) -> dict[str, tuple[str, Configuration]]:
    return {configuration.name: (mark, configuration) for mark, configuration in configurations([TARGETS[target]])}


def _entry_by_name(target: str, name: str) -> dict[str, Any]:
    return entry(*_configurations_by_name(target)[name])


def compile_all(wanted: Iterable[tuple[str, str]], jobs: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(target, name, entry) of every wanted (target, name), as they are done, compiled in ``jobs`` processes."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(_entry_by_name, *key): key for key in wanted}
        try:
            for done in as_completed(pending):
                yield (*pending[done], done.result())
        finally:
            pool.shutdown(cancel_futures=True)


def outdated(entries: Entries, shipped: Entries) -> Iterator[str]:
    """What keeps the record from being that of what ships; ``shipped`` needs nothing but fingerprints."""
    for target in {**shipped, **entries}:
        have, want = entries.get(target, {}), shipped.get(target, {})
        yield from (f"{target} {name}: not in the record" for name in want if name not in have)
        yield from (f"{target} {name}: no longer shipped" for name in have if name not in want)
        for name in want:
            if name in have and have[name]["fingerprint"] != want[name]["fingerprint"]:
                yield f"{target} {name}: compiled from other sources"


def fingerprints(targets: Iterable[Target] = RECORDED.values()) -> Entries:
    """The record that ships, with fingerprints alone."""
    found: Entries = {}
    for mark, configuration in configurations(targets):
        found.setdefault(configuration.target.name, {})[configuration.name] = {"fingerprint": mark}
    return found


def update(targets: list[Target], jobs: int, path: Path = RECORD) -> None:
    """Bring the record of these targets up to date."""
    made_with, entries = read_record(path) if path.exists() else ("", {})
    shipped = fingerprints(targets)
    wanted = []
    for target, names in shipped.items():
        old = entries.get(target, {}) if made_with == triton.__version__ else {}
        kept = {name: old[name] for name in names if old.get(name, {}).get("fingerprint") == names[name]["fingerprint"]}
        entries[target] = kept
        wanted += [(target, name) for name in names if name not in kept]
    for number, (target, name, result) in enumerate(compile_all(wanted, jobs), 1):
        entries[target][name] = result
        print(f"{number}/{len(wanted)} {target} {name}", *complaints(result), sep="; ", file=sys.stderr, flush=True)
        if number % 16 == 0:  # it takes long: keep what is done
            write_record(entries, path)
    write_record(entries, path)


def sample(entries: Entries) -> list[tuple[str, str]]:
    """(target, name) of a few entries: one for each target, one for each kernel, the same as long as these are."""
    order = sorted(
        (one["fingerprint"], target, name) for target, names in entries.items() for name, one in names.items()
    )
    first: dict[str, tuple[str, str]] = {}
    for _, target, name in order:
        first.setdefault(target, (target, name))
    for _, target, name in order:
        first.setdefault(name.split(": ")[-1], (target, name))
    return list(dict.fromkeys(first.values()))


def differences(entries: Entries, wanted: list[tuple[str, str]], jobs: int, exact: bool) -> Iterator[str]:
    """Where compiling anew gives something else than the record has, or, not ``exact``, where it breaks a gate."""
    for target, name, result in compile_all(wanted, jobs):
        yield from (f"{target} {name}: compiled anew: {what}" for what in complaints(result))
        have = entries[target][name]
        for field in {**have, **result} if exact else ():
            if have.get(field) != result.get(field):
                yield f"{target} {name}: {field}: {have.get(field)} in the record, {result.get(field)} compiled anew"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="bring compiled.json up to date")
    parser.add_argument("--sample", action="store_true", help="recompile a sample and compare it with compiled.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--targets", default=",".join(RECORDED), help="comma-separated names (default: all recorded)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets.split(",") if name not in TARGETS]
    if unknown:
        parser.error(f"--targets must be of {', '.join(TARGETS)}: got {', '.join(unknown)}")
    targets = [TARGETS[name] for name in options.targets.split(",")]
    if options.write:
        update(targets, options.jobs)
    made_with, entries = read_record()
    entries = {target.name: entries.get(target.name, {}) for target in targets}
    problems = list(outdated(entries, fingerprints(targets)))
    for target, names in entries.items():
        problems += [f"{target} {name}: {what}" for name, one in names.items() for what in complaints(one)]
    if options.sample and not problems:
        problems += differences(entries, sample(entries), options.jobs, exact=made_with == triton.__version__)
    print(*problems, sep="\n")
    print(f"{sum(map(len, entries.values()))} entries, made with Triton {made_with}; {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
