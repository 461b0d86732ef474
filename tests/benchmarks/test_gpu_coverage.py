"""``docs/gpu_coverage.md`` is what the checks say, and nothing that ships was left out of them.

Fingerprints are taken in a process without Triton's interpreter: this file run as a script.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tools import coverage, offline
from benchmarks.tools.coverage import Line
from lowbit.backends.triton.launch import TARGETS
from lowbit.testing import gpu_configurations as interpreted
from lowbit.testing.processes import outside_interpreter

ROOT = Path(__file__).resolve().parents[2]
LINE = Line("packed", 4, "float16")


def test_document_is_up_to_date_and_nothing_is_missing() -> None:
    done = outside_interpreter("-m", "benchmarks.tools.coverage", root=ROOT)
    assert done.returncode == 0, f"{done.stdout.decode()}{done.stderr.decode()}"
    if not offline.RECORD.exists():
        pytest.skip("compiled.json is still to be written: only what is interpreted was looked at")


def test_every_way_to_cut_a_product_is_interpreted() -> None:
    """Of any target, at some number of bits."""
    cases = [case for case in interpreted.configurations(*interpreted.PLANNED) if case.family != "kron"]
    found = {(case.kernel, case.kind, interpreted.cut(case.config)) for case in cases}
    for family in interpreted.FAMILIES.values():
        for target, kind, bits in product(TARGETS.values(), interpreted.KINDS, family.bits):
            for _, config in interpreted.rows(target, family.kernel, kind, bits):
                assert (family.kernel, kind, interpreted.cut(config)) in found, (target.name, bits, kind, config)


def test_a_case_left_out_is_a_hole() -> None:
    first, *_ = interpreted.PLANNED
    cases = interpreted.configurations(*interpreted.PLANNED)
    assert list(coverage.holes({coverage.INTERPRETED: coverage.of_cases(cases, first)})) == []
    fewer = [case for case in cases if (case.family, case.bits, case.kind, case.regime) != ("packed", 4, FLOAT16, 64)]
    checks = {coverage.INTERPRETED: coverage.of_cases(fewer, first)}
    assert list(coverage.holes(checks)) == ["interpreted: packed 4-bit float16: M ≤64"]


FLOAT16 = interpreted.KINDS[0]


def with_records() -> dict[str, Any]:
    """For the process without an interpreter: holes of a record of all that ships, and of one without an entry."""
    target = TARGETS["sm_80"]
    sound = {"spills": 0, "blocks": 1, "dots": 0, "tensor": 0, "weight_loads": {}}
    entries = {
        target.name: {name: {**entry, **sound} for name, entry in offline.fingerprints([target])[target.name].items()}
    }
    name = next(name for name in entries[target.name] if "4-bit per row float16 M=16, launch 1" in name)
    spilled = {target.name: {**entries[target.name], name: {**entries[target.name][name], "spills": 3}}}
    missing = {target.name: {key: entry for key, entry in entries[target.name].items() if key != name}}
    return {
        "whole": list(coverage.holes({"compiled sm_80": coverage.compiled(target, entries)})),
        "spilled": list(coverage.holes({"compiled sm_80": coverage.compiled(target, spilled)})),
        "missing": list(coverage.holes({"compiled sm_80": coverage.compiled(target, missing)})),
    }


@cache
def holes_of_records() -> dict[str, Any]:
    done = outside_interpreter(__file__, root=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_record_of_all_that_ships_has_no_hole() -> None:
    assert holes_of_records()["whole"] == []


@pytest.mark.parametrize("what", ["spilled", "missing"])
def test_code_that_is_missing_or_spills_is_a_hole(what: str) -> None:
    assert holes_of_records()[what] == ["compiled sm_80: packed 4-bit float16: M ≤16"]


def test_results_of_a_gpu_fill_its_column(tmp_path: Any) -> None:
    results = tmp_path / "gpu-nvidia-h200.json"
    failure = "tests.backends.triton.test_configurations::test_configuration[packed-4-float16-64-sm_90]"
    tests = {"passed": 9, "failed": 1, "errors": 0, "failures": [failure]}
    machine = {"properties": {"major": 9, "minor": 0}}
    for left_out, expected in ((None, {16, 512, "dense"}), (["tests"], set())):
        section = {**tests, **({"left_out": left_out} if left_out else {})}
        results.write_text(json.dumps({"device": "H200", "sections": {"tests": section, "machine": machine}}))
        assert coverage.run_on_gpus([results]).get(LINE, set()) == expected


def test_sample_of_executed_code_fills_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = (
        ("sm_90", "packed packed_linear 4-bit per row float16 M=16, launch 1: packed_linear_kernel"),
        ("sm_90", "packed packed_embedding 4-bit, launch 1: packed_rows_kernel"),
        ("sm_80", "kron linear 32x32 x 32x32, float32, dense factors, M=1, launch 1: kron_product_kernel"),
    )
    monkeypatch.setattr(coverage, "SAMPLE", sample)
    assert coverage.executed() == {LINE: {16}, Line("kron", 0, "float32"): {1}}


if __name__ == "__main__":
    json.dump(with_records(), sys.stdout)
