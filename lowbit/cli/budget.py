"""``lowbit convert --budget``: the spec of every layer, planned on the calibration text."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lowbit
from lowbit.checkpoint import foreign
from lowbit.cli.evaluate import load_model
from lowbit.core.family import Spec
from lowbit.core.folder import is_packed


def add_to(convert: argparse.ArgumentParser) -> None:
    """The options of a plan."""
    convert.add_argument("--budget", metavar="SIZE",
                         help="choose the spec of each layer by what it costs the model, so that the layers take "
                         "'3.5 bits' per weight, or the whole model '700 MB'; needs --calibration-text")  # fmt: skip
    convert.add_argument("--candidate", action="append", default=[], metavar="SPEC",
                         help="of --budget: a spec to choose from, such as 'Codebook(bits=3)'; two or more "
                         "(default: Packed with 2 to 8 bits, by gptq, nine forms)")  # fmt: skip
    convert.add_argument("--no-fused", action="store_true", help="of --budget: layers of one input (q, k and v; gate "
                         "and up) may get different specs: better plans, which serving stacks cannot fuse")  # fmt: skip
    convert.add_argument("--json", type=Path, metavar="FILE", help="of --budget: write the plan there")


def check(options: argparse.Namespace, others: Sequence[str]) -> None:
    """Raise ``ValueError`` for options that do not go together; ``others``: those given that also say a spec."""
    if options.budget is None:
        of_plan = (("--candidate", options.candidate), ("--no-fused", options.no_fused), ("--json", options.json))
        given = [flag for flag, value in of_plan if value]
        if given:
            raise ValueError(f"{given[0]} is of a plan: give --budget, such as --budget '3.5 bits'")
        return
    if others:
        raise ValueError(f"--budget chooses the specs: leave out {', '.join(others)}; --candidate says what from")
    if options.calibration_text is None:
        raise ValueError("--budget needs --calibration-text FILE, a text file with one sample per line")
    if len(options.candidate) == 1:
        raise ValueError(f"--candidate must be given twice or more: got {options.candidate[0]!r} alone")


def specs(
    options: argparse.Namespace, parse_spec: Callable[[str], Spec | None], batches: list[Any]
) -> dict[str, Spec | None]:
    """Plan, print the plan, and write it where that was asked for; the spec of each layer."""
    candidates = []
    for text in options.candidate:
        spec = parse_spec(text)
        if spec is None:
            raise ValueError("--candidate must be a spec: got None")
        candidates.append(spec)
    source: Path = options.source
    if not source.is_dir() or is_packed(source) or foreign.declared(source) is not None:
        raise ValueError(f"--budget needs a folder with a float model: {source} is none")
    if len(batches) < 2:
        raise ValueError("--calibration-text must hold at least two samples with --budget, one to verify the plan: "
                         f"{options.calibration_text} has {len(batches)}")  # fmt: skip
    try:
        found = lowbit.plan(load_model(source), options.budget, calibration=batches, candidates=candidates or None,
                            skip=options.skip, fused=not options.no_fused)  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--budget {options.budget}: {error}") from error
    print(found)
    if options.json is not None:
        options.json.write_text(found.to_json() + "\n", encoding="utf-8")
    return dict(found.specs)
