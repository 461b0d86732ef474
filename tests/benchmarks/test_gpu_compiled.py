"""The record of compiled GPU code: it is that of the sources, and what it says passes the gates.

Kernels compile only in a process without Triton's interpreter, so a second one compiles the kernels of this file
(this file run as a script) and prints what came out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import lowbit
from benchmarks.tools import offline
from benchmarks.tools.offline import Configuration, complaints
from benchmarks.tools.predict import launches_of, predict, work
from benchmarks.tools.resources import Line, cuda_blocks, loads, loops, machine_code, main_loop
from lowbit.backends.triton.launch import TARGETS, Launch
from lowbit.testing.processes import outside_interpreter

ROOT = Path(__file__).resolve().parents[2]


# --- the record ---


@pytest.mark.turns(3)
def test_record_is_that_of_the_sources_and_a_sample_compiles_to_it() -> None:
    done = outside_interpreter("-m", "benchmarks.tools.offline", "--sample", "--jobs", "2", root=ROOT)
    assert done.returncode == 0, f"{(done.stdout + done.stderr).decode()}\npython -m benchmarks.tools.offline --write"


@pytest.mark.parametrize("target", offline.RECORDED)
def test_gates(target: str) -> None:
    names = offline.read_record()[1][target]
    assert names
    assert {name: complaints(entry) for name, entry in names.items() if complaints(entry)} == {}


def test_an_outdated_record_is_noticed() -> None:
    shipped: offline.Entries = {"sm_80": {"a": {"fingerprint": "1"}, "b": {"fingerprint": "2"}}}
    assert list(offline.outdated(shipped, shipped)) == []
    assert list(offline.outdated({}, {"sm_80": {"a": {"fingerprint": "1"}}})) == ["sm_80 a: not in the record"]
    assert list(offline.outdated(shipped, {"sm_80": {"a": {"fingerprint": "1"}}})) == ["sm_80 b: no longer shipped"]
    changed: offline.Entries = {"sm_80": {"a": {"fingerprint": "3"}, "b": {"fingerprint": "2"}}}
    assert list(offline.outdated(changed, shipped)) == ["sm_80 a: compiled from other sources"]


def test_update_compiles_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "compiled.json"
    old = {"spills": 0, "blocks": 1, "dots": 0, "tensor": 0, "weight_loads": {}}
    names = ("same", "changed", "gone")
    offline.write_record({"sm_80": {name: {"fingerprint": "1", **old} for name in names}, "sm_90": {}}, record)
    shipped = {"sm_80": {name: {"fingerprint": mark} for name, mark in (("same", "1"), ("changed", "2"), ("new", "3"))}}
    compiled = []

    def compile_all(wanted: list[tuple[str, str]], jobs: int) -> Any:
        for target, name in wanted:
            compiled.append(name)
            yield target, name, {**shipped[target][name], **old}

    monkeypatch.setattr(offline, "fingerprints", lambda targets: shipped)
    monkeypatch.setattr(offline, "compile_all", compile_all)
    offline.update([TARGETS["sm_80"]], 1, record)
    assert sorted(compiled) == ["changed", "new"]
    version, entries = offline.read_record(record)
    assert version == triton.__version__
    assert {name: entry["fingerprint"] for name, entry in entries["sm_80"].items()} == {
        "same": "1", "changed": "2", "new": "3",
    }  # fmt: skip


def test_a_difference_from_the_record_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    have = compiled()["sound"]["entry"]
    for result, exact, expected in (
        (have, True, []),
        ({**have, "registers": 1}, True, [f"registers: {have['registers']} in the record, 1 compiled anew"]),
        ({**have, "registers": 1}, False, []),
        ({**have, "spills": 3}, False, ["compiled anew: spills: must be 0: got 3"]),
    ):
        monkeypatch.setattr(offline, "compile_all", lambda wanted, jobs, result=result: [("sm_80", "a", result)])
        found = list(offline.differences({"sm_80": {"a": have}}, [("sm_80", "a")], 1, exact))
        assert found == [f"sm_80 a: {what}" for what in expected]


def test_sample_has_every_target_and_every_kernel() -> None:
    entries = offline.read_record()[1]
    chosen = offline.sample(entries)
    assert {target for target, _ in chosen} == set(entries)
    kernels = {name.split(": ")[-1] for names in entries.values() for name in names}
    assert {name.split(": ")[-1] for _, name in chosen} == kernels


# --- kernels with planted mistakes ---


@triton.jit
def scaled(x):
    return x * 0.5


@triton.jit
def product_kernel(
    x_ptr, tiles16_ptr, y_ptr, n_size, k_size,
    SHIFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x @ (weights * 0.5).T; SHIFT puts the weights at an address that is no multiple of 16."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, k_size, BLOCK_K):
        words = tl.load(tiles16_ptr + SHIFT + n[:, None] * k_size + start + k[None, :])
        x = tl.load(x_ptr + m[None, :] * k_size + start + k[:, None])
        sums = tl.dot(scaled(words.to(tl.float16)), x, sums)
    tl.store(y_ptr + m[None, :] * n_size + n[:, None], sums)


@triton.jit
def refused_kernel(y_ptr):
    tl.static_assert(False)


N, M, K = 512, 64, 1024


def product(
    block_n: int = 64, block_m: int = 16, block_k: int = 64, warps: int = 4, stages: int = 3, shift: int = 0, n: int = N
) -> Launch:
    tensors = dict(
        x_ptr=torch.empty(M, K, dtype=torch.float16, device="meta"),
        tiles16_ptr=torch.empty(n, K, dtype=torch.int16, device="meta"),
        y_ptr=torch.empty(M, n, device="meta"),
    )
    blocks = dict(SHIFT=shift, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k)
    return Launch(product_kernel, (n // block_n,), dict(**tensors, n_size=n, k_size=K), blocks, warps, stages)


LAUNCHES = {
    "sound": product(),
    "spills": product(block_n=128, block_m=128, warps=1, stages=1),
    "narrow": product(shift=3),
    "shared memory": product(block_m=64, block_k=256, stages=6),
    "refused": Launch(refused_kernel, (1,), dict(y_ptr=torch.empty(1, device="meta")), {}),
}


def compile_these() -> dict[str, Any]:
    """For the process without an interpreter: everything that the tests below look at."""
    target = TARGETS["sm_80"]
    found: dict[str, Any] = {}
    for name, launch in LAUNCHES.items():
        mark = offline.fingerprint(launch, target)
        found[name] = {"entry": offline.entry(mark, Configuration(target, name, launch))}
    sound = LAUNCHES["sound"]
    done = offline.compile_launch(sound, target)
    found["loads"] = [(load.argument, load.bytes) for load in loads(done)]
    found["work"] = vars(work(done.asm["ttir"], sound))
    found["targets"] = {
        name: offline.entry("", Configuration(one, name, product())) for name, one in TARGETS.items()
    }  # fmt: skip
    wide = product(n=1 << 16)
    code = machine_code(offline.compile_launch(wide, target), target)
    found["prediction"] = predict(offline.compile_launch(wide, target), wide, target, code, blocks=4)
    family = ModuleType("lowbit.planted.triton")
    family.shipped = lambda target: [("a", [sound, replace(sound, grid=(1,))]), ("b", [sound, LAUNCHES["narrow"]])]
    sys.modules[family.__name__], offline.FAMILIES = family, ("planted",)
    found["names"] = [configuration.name for _, configuration in offline.configurations([target])]
    found["sources"] = offline.kernel_sources(product_kernel)
    marks = {
        "same": replace(product(), grid=(1,)),
        "constants": product(block_n=128),
        "warps": product(warps=8),
        "divisibility": replace(product(), arguments={**product().arguments, "n_size": N + 1}),
        "dtype": replace(product(), arguments={**product().arguments, "y_ptr": torch.empty(M, N, dtype=torch.float16)}),
    }
    found["marks"] = {name: offline.fingerprint(launch, target) for name, launch in marks.items()}
    return found


@cache
def compiled() -> dict[str, Any]:
    done = outside_interpreter(__file__, root=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("target", TARGETS)
def test_sound_code_passes_on_every_target(target: str) -> None:
    entry = compiled()["targets"][target]
    assert complaints(entry) == []
    assert entry["registers"] >= 16 and entry["dots"] == 1 and entry["tensor"] > 0 and entry["loop"]["tensor"] > 0
    assert entry["weight_loads"] == {"tiles16_ptr": 16}
    assert (entry["prediction"] is None) == target.startswith("gfx")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("spills", "spills: must be 0"),
        ("narrow", "loads of weights: must be 16 bytes wide: got 2"),
        ("shared memory", "blocks per multiprocessor: must be at least 1: got 0 (shared memory)"),
        ("refused", "does not compile"),
    ],
)
def test_planted_mistake_is_flagged(name: str, complaint: str) -> None:
    assert any(complaint in what for what in complaints(compiled()[name]["entry"]))


def test_matrix_product_without_tensor_cores_is_flagged() -> None:
    entry = compiled()["sound"]["entry"]
    assert complaints(entry) == []
    assert complaints({**entry, "tensor": 0}) == [
        "tensor-core instructions: must be there for 1 matrix products: got 0"
    ]


def test_narrow_load_outside_a_matrix_product_is_none_of_the_gates() -> None:
    assert complaints({**compiled()["narrow"]["entry"], "dots": 0}) == []


# --- what is read from compiled code ---


def test_loads_are_told_apart_by_argument() -> None:
    found = compiled()["loads"]
    assert {argument for argument, _ in found} == {"x_ptr", "tiles16_ptr"}


def test_work_of_a_program() -> None:
    trips = K // 64
    assert compiled()["work"] == {
        "loaded": {"tiles16_ptr": trips * 64 * 64 * 2, "x_ptr": trips * 16 * 64 * 2},
        "stored": {"y_ptr": 64 * 16 * 4},
        "products": {"f16": 64 * 16 * K},
        "trips": trips,
    }


def test_prediction_of_a_product_that_waits_for_memory() -> None:
    """On an A100, 2039 GB/s: the weights, the 64 rows of x that there are, 16 rows of y."""
    prediction = compiled()["prediction"]
    moved = (1 << 16) * K * 2 + M * K * 2 + (1 << 16) * 16 * 4
    assert prediction["machine"] == "A100"
    assert prediction["us"] * prediction["dram"] == pytest.approx(moved / 2039e3, rel=0.02)


def test_launches_of_a_layer_are_found() -> None:
    format = lowbit.Packed(bits=4, group_size=128).format(torch.empty(512, 1024, device="meta"), "linear")
    layer = lowbit.PackedLinear(format, dtype=torch.float16, device="meta")
    launches = launches_of(layer, torch.empty(3, 1024, dtype=torch.float16, device="meta"), TARGETS["sm_90"])
    read = {
        name: value.nbytes
        for launch in launches
        for name, value in launch.arguments.items()
        if "tiles" in name and isinstance(value, torch.Tensor)
    }
    assert set(read.values()) == {512 * 1024 // 2}


def test_what_compiles_to_the_same_code_comes_once() -> None:
    assert compiled()["names"] == ["planted a, launch 1: product_kernel", "planted b, launch 2: product_kernel"]


def test_fingerprint_follows_what_is_compiled_and_nothing_else() -> None:
    marks = compiled()["marks"]
    sound = compiled()["sound"]["entry"]["fingerprint"]
    assert marks.pop("same") == sound
    assert len({sound, *marks.values()}) == 1 + len(marks)
    assert any(name == "scaled" and "x * 0.5" in text for name, text in compiled()["sources"])


def test_comments_and_docstrings_are_not_what_is_compiled() -> None:
    source = """def kernel(x_ptr, y_ptr):
    \"\"\"Twice x.

    As text: "# no comment".
    \"\"\"
    # a comment

    text = "# no comment"  # a comment
    tl.store(y_ptr, 2 * tl.load(x_ptr))
"""
    kept = 'def kernel(x_ptr, y_ptr):\n    text = "# no comment"\n    tl.store(y_ptr, 2 * tl.load(x_ptr))'
    assert offline.without_comments(source) == kept
    assert offline.without_comments(source.replace("2 *", "3 *")) != kept
    assert offline.without_comments("def one():\n    return 1\n") == "def one():\n    return 1"


def test_interpreted_kernel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must be unset"):
        offline.compile_launch(Launch(object(), (1,), {}, {}), TARGETS["sm_90"])


def test_loops_are_found() -> None:
    def code(*ops: str) -> list[Line]:
        return [
            Line("", op, op[:-1]) if op.endswith(":") else Line(op.split()[0], op, to=tuple(op.split()[1:]))
            for op in ops
        ]

    lines = code("a", "outer:", "b", "inner:", "c", "c", "jump inner", "d", "jump outer", "jump end", "e", "end:", "f")
    assert loops(lines) == [(3, 6)]
    assert [line.op for line in main_loop(lines)] == ["c", "c", "jump"]
    assert [line.op for line in main_loop(code("a", "jump end", "b", "end:"))] == ["a", "jump", "b"]


def test_blocks_of_a_multiprocessor() -> None:
    """Worked out by hand: blocks of 4 warps of 72 registers, 48 KiB of shared memory."""
    blocks = cuda_blocks(TARGETS["sm_90"], 4, 72, 48 << 10, 0)
    assert blocks == {"warps": 16, "blocks": 32, "registers": 7, "shared memory": 4}
    assert cuda_blocks(TARGETS["sm_86"], 4, 72, 48 << 10, 0)["shared memory"] == 2
    assert cuda_blocks(TARGETS["sm_100"], 4, 72, 0, 256)["tensor memory"] == 2


if __name__ == "__main__":
    json.dump(compile_these(), sys.stdout)
