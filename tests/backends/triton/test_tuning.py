"""Configurations: the shipped table, the user's file, one for every batch; warm-up; which backend runs and why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.backends import registry
from lowbit.backends.triton import backend, launch, tuning
from lowbit.backends.triton.launch import TARGETS
from lowbit.model.warmup import _sizes, candidates
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.where import Where, running

ROOT = Path(__file__).resolve().parents[3]
H200 = TARGETS["sm_90"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
needs_interpreter = pytest.mark.skipif("triton" not in registry.able_on("cpu"), reason="Triton's interpreter is not on")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered from elsewhere."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    tuning._measured.cache_clear()
    tuning._choose.cache_clear()


def row(**changed: object) -> dict[str, object]:
    return {
        "kernel": "packed_linear", "arch": "sm_90", "x": ["float16"], "bits": [4], "n": 4096, "k": 4096, "max_m": 16,
        "block_n": 128, "block_m": 16, "warps": 8, "stages": 2, "split": 4, "source": "a test", **changed,
    }  # fmt: skip


def ask(m: int = 1, n: int = 4096, k: int = 4096, x: torch.dtype = torch.float16, bits: int = 4) -> tuning.Config:
    return tuning.choose(H200, "packed_linear", x, bits, m, n, k)


MEASURED = tuning.Config(128, 16, 8, 2, 4)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_the_shipped_table_answers_everything(target):
    kernels = {row["kernel"] for row in tuning._shipped()}
    assert {"packed_linear", "packed_linear_odd_groups"} <= kernels
    for kernel in kernels:
        for x in DTYPES:
            for bits in range(1, 9):
                for m in (1, 16, 17, 64, 65, 500, 513, 100_000):
                    config = tuning.choose(target, kernel, x, bits, m, 4096, 4096)
                    assert config.dense or (config.block_n >= 16 and config.block_m >= 16 and config.split >= 1)
                    assert not (config.dense and x == torch.int8), "int8 products are exact; the library's are not ours"


def test_every_shipped_row_says_where_it_comes_from_and_is_reachable():
    text = json.loads(tuning._SHIPPED.read_text())
    assert text["format"] == tuning.FORMAT
    for found in text["rows"]:
        assert len(found["source"]) > 10
        assert set(found) <= {
            "kernel", "arch", "x", "bits", "max_m", "block_n", "block_m", "warps", "stages", "waves", "max_split",
            "split", "dense", "source",
        }  # fmt: skip
    for before, after in pairwise(text["rows"]):
        same = all(before[name] == after[name] for name in ("kernel", "arch", "x"))
        same &= before.get("bits") in (None, after.get("bits"))
        assert not same or before.get("max_m", 1 << 62) < after.get("max_m", 1 << 62), (before, after)


def test_splits_fill_the_processors_and_no_more():
    few, many = ask(m=1, n=512), ask(m=1, n=1 << 17)
    assert few.split > 1 and many.split == 1
    assert ask(m=1, n=512, k=256).split == 1, "no more parts than tiles"


def test_no_row_is_an_error_that_names_the_question():
    with pytest.raises(LookupError, match="kernel=nothing, arch=sm_90, x=float16, bits=4, M=3"):
        tuning.choose(H200, "nothing", torch.float16, 4, 3, 8, 8)


def test_measured_rows_come_first_and_survive_the_process(cache):
    assert ask() != MEASURED
    tuning.remember([row()])
    assert ask() == ask(m=16) == MEASURED
    assert MEASURED not in (ask(m=17), ask(n=4097), ask(k=2048), ask(x=torch.bfloat16), ask(bits=3))
    forget()  # as a new process
    assert ask() == MEASURED
    tuning.remember([row(block_n=64), row(max_m=8, stages=4)])
    assert ask(m=16) == tuning.Config(64, 16, 8, 2, 4) and ask(m=3) == tuning.Config(128, 16, 8, 4, 4)
    saved = json.loads((cache / "tuned.json").read_text())
    assert len(saved["rows"]) == 2 and list(cache.iterdir()) == [cache / "tuned.json"], "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"format": 2, "rows": []}', '{"format": 1, "rows": 3}', '{"format": 1, "rows": [{}]}',
        json.dumps({"format": 1, "rows": [row(block_n="128")]}), json.dumps({"format": 1, "rows": [row(block_n=100)]}),
        json.dumps({"format": 1, "rows": [row(warps=0)]}), json.dumps({"format": 1, "rows": [row(max_m=None)]}),
        "\x00\xff",
    ],
)  # fmt: skip
def test_a_corrupt_file_is_warned_of_and_gone_without(cache, content):
    cache.mkdir()
    (cache / "tuned.json").write_text(content)
    before = tuning._shipped
    with pytest.warns(RuntimeWarning, match=r"tuned\.json: lowbit's tuned configurations are not used"):
        config = ask()
    assert before is tuning._shipped and config.block_n >= 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == config, "once"
    with pytest.warns(RuntimeWarning):
        tuning.remember([row()])
    assert ask() == MEASURED
    forget()
    assert ask() == MEASURED, "and the file is whole again"


def test_a_file_that_cannot_be_written_does_not_stop_anything(cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="serve this process only"):
        tuning.remember([row()])
    assert ask() == MEASURED


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    tuning.remember([row()])
    before = (cache / "tuned.json").read_text()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(RuntimeWarning, match="no space left"):
        tuning.remember([row(block_n=64)])
    assert (cache / "tuned.json").read_text() == before


def test_one_configuration_for_every_batch():
    tuning.remember([row()])
    with lowbit.batch_invariant():
        configs = {ask(m=m) for m in (1, 2, 16, 17, 64, 500, 5000, 100_000)}
        assert len(configs) == 1 and MEASURED not in configs and not configs.pop().dense
    assert ask() == MEASURED


@pytest.mark.turns(3)
@pytest.mark.parametrize(("value", "gpu", "cpu"), [("1", True, True), ("0", False, False), ("", False, True)])
def test_the_environment_says_whether_a_batch_may_matter(value, gpu, cpu):
    program = """
import lowbit, torch
from lowbit.backends import invariance
from lowbit.backends.cpu import native
native_value = torch.ops.lowbit_native.batch_invariant
cpu = native_value() if native.load() is None else None
print(invariance.on_gpu(), cpu)
with lowbit.batch_invariant(False):
    assert not invariance.on_gpu() and (cpu is None or not native_value())
with lowbit.batch_invariant():
    assert invariance.on_gpu() and (cpu is None or native_value())
assert cpu is None or native_value() == cpu
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "LOWBIT_BATCH_INVARIANT": value}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() in ([str(gpu), str(cpu)], [str(gpu), "None"])


@needs_interpreter
@pytest.mark.parametrize("spec", [lowbit.Packed(bits=4, group_size=64), lowbit.Packed(bits=3, activations="int8")])
def test_rows_do_not_depend_on_their_batch_where_asked(spec):
    layer = lowbit.PackedLinear.from_float(torch.randn(70, 800), spec)
    x = torch.randn(70, 800, dtype=torch.float16)
    with running(Where("triton")), lowbit.batch_invariant():
        y = layer(x)
        for i in (0, 1, 63, 64, 69):
            assert_bitwise_equal(layer(x[i : i + 1]), y[i : i + 1])


def test_tune_measures_the_shipped_choice_and_others():
    question = tuning.Question(H200, "packed_linear", torch.float16, 4, 1, 4096, 4096)
    found = list(candidates(1, question))
    assert found[0] == ask() and any(c.dense for c in found) and 10 < len(found) < 200
    assert not any(c.dense for c in candidates(1, tuning.Question(H200, "packed_linear", torch.int8, 4, 1, 512, 512)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so():
    layer = lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed())
    with pytest.raises(RuntimeError, match="tune measures layers on a GPU: "):
        lowbit.tune(layer)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "8"])
def test_warmup_refuses_sizes(bad):
    with pytest.raises(ValueError, match="max_m must be an integer of at least 1: got max_m="):
        lowbit.warmup(lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed()), bad)


LAYERS = {
    "packed": lambda: lowbit.PackedLinear.from_float(torch.randn(40, 300), lowbit.Packed(bits=4, group_size=50)),
    "packed int8": lambda: lowbit.PackedLinear.from_float(torch.randn(40, 512), lowbit.Packed(activations="int8")),
    "packed embedding": lambda: lowbit.PackedEmbedding.from_weight(
        lowbit.Packed(bits=3, outliers=0.01).quantize(torch.randn(40, 300))
    ),
    "codebook": lambda: lowbit.CodebookLinear.from_float(torch.randn(40, 512), lowbit.Codebook(bits=3)),
    "kron": lambda: lowbit.KroneckerLinear.from_float(torch.randn(40, 512), lowbit.Kronecker(shape=(8, 16))),
    "packed experts": lambda: lowbit.PackedExperts.from_float(torch.randn(6, 40, 300), lowbit.Packed(group_size=50)),
    "codebook experts": lambda: lowbit.CodebookExperts.from_float(
        torch.randn(6, 40, 300), lowbit.Codebook(bits=3, activations="int8")
    ),
}


@needs_interpreter
@pytest.mark.turns(3)
@pytest.mark.parametrize("name", LAYERS)
def test_warmup_covers_every_size(name, monkeypatch):
    """What warm-up launches has every signature that any M up to max_m asks for, also those it did not plan for."""
    layer, max_m = LAYERS[name](), 600
    warmed = set()
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: warmed.add(self.signature))
    with registry.use_backend("triton"), torch.no_grad():
        lowbit.warmup(layer, max_m)
        assert warmed
        for m in range(1, max_m + 1):
            with launch.collecting() as planned:
                if "embedding" in name:
                    layer(torch.zeros(m, dtype=torch.int64))
                elif "experts" in name:
                    repeats = 1 + m % layer.num_experts
                    x = torch.zeros(m, layer.in_features, dtype=layer.dtype)
                    layer(x, torch.zeros(m * repeats, dtype=torch.int64))
                else:
                    layer(torch.zeros(m, layer.in_features, dtype=layer.dtype))
            assert {step.signature for step in planned} <= warmed, m
    assert _sizes(3) == [1, 2, 3]


SIGNATURES = """
import torch
from benchmarks.tools.compiling import compile_launch, compiling_for
from lowbit.backends.triton import tuning
from lowbit.backends.triton.launch import TARGETS
from lowbit.packed import triton as kernels
from lowbit.packed.operands import PackedActivation, PackedOperands
target = TARGETS["sm_90"]
signatures, kernel = set(), kernels.packed_linear_kernel
for m in (1, 2, 16, 17, 48):
    for k in (512, 520):
        x, y = (torch.empty(m, s, dtype=torch.float16) for s in (k, 64))
        tiles, scales = torch.zeros(64, -(-k // 256), 32, dtype=torch.int32), torch.ones(64, 1, dtype=torch.float16)
        config = tuning.Config(64, 16, 4, 2, 1)
        weight = PackedOperands(
            packed=tiles, scales=scales, zeros=None, outlier_values=None, outlier_columns=None, outlier_rows=None,
            bits=4, group_size=k, layout=1,
        )
        plan = kernels.linear_launches(target, config, x, weight, None, PackedActivation(), y)
        for launch in plan:
            signatures.add(launch.signature)
            compile_launch(launch, target)
print(len(signatures), sum(len(caches[0]) for caches in kernel.device_caches.values()))
"""


def test_a_signature_is_what_triton_compiles_by():
    """As many entries in Triton's own cache as there are signatures; M alone makes no new one."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", SIGNATURES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    signatures, compiled = map(int, done.stdout.split())
    # k = 520 gives another kernel for its masks, and a third for its stride, which only one row does not have
    assert signatures == compiled <= 3


# ------------------------------------------------------------------------------------------ which backend, and why not


def test_the_backends_are_listed_with_reasons():
    rows = {status.name: status for status in lowbit.backends()}
    assert tuple(rows) == registry.names()
    assert rows["triton"].available == (registry.why_unavailable("triton") is None)
    assert rows["triton"].available or rows["triton"].reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_is_refused_with_the_reason():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = """
import torch, lowbit
layer = lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed())
print(*(row for row in lowbit.backends() if row.name == "triton"))
try:
    with lowbit.use_backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "triton: unavailable (torch finds no GPU (torch.cuda.is_available() is False))",
        "backend 'triton' cannot run: torch finds no GPU (torch.cuda.is_available() is False)",
    ]
    forced = {**environment, "LOWBIT_BACKEND": "triton"}
    code = "import sys, torch, lowbit; print('triton' in sys.modules, flush=True); torch.ops.lowbit.packed_dequantize("
    code += "torch.zeros(8, 8, dtype=torch.int32), None, None, None, torch.ones(8, 1), None, None, None, "
    code += "4, 64, 0, False, 0, 64, torch.float32)"
    done = subprocess.run([sys.executable, "-c", code], env=forced, capture_output=True, text=True)
    assert done.stdout.strip() == "False", "importing lowbit imports no triton"
    assert "LOWBIT_BACKEND=triton cannot run: torch finds no GPU" in done.stderr


def test_a_gpu_that_another_backend_was_forced_for(monkeypatch):
    """On a GPU tensor: the reference runs where it was asked for, and the CPU's kernels are refused."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "why_no_triton", lambda: None)
    monkeypatch.setattr(backend, "_why_not_device", lambda device: None)
    (triton,) = (one for one in registry._candidates("cuda") if one.name == "triton")
    assert registry._declines(triton, device) is None
    for name in ("cpu", "reference"):
        monkeypatch.setattr(registry, "_forced", name)
        assert registry._declines(triton, device) == f"the backend {name!r} was asked for"
    monkeypatch.setattr(registry, "_forced", "auto")
    monkeypatch.setattr(backend, "why_no_triton", lambda: "triton cannot be imported: gone")
    assert registry._declines(triton, device) == "triton cannot be imported: gone"


@needs_interpreter
def test_forcing_triton_leaves_no_way_around(monkeypatch):
    x = torch.randn(3, 64)
    layer = lowbit.PackedLinear.from_float(torch.randn(8, 64), lowbit.Packed())
    with registry.use_backend("triton"):
        assert registry.active_backend("cpu") == "triton"
        assert lowbit.report(layer).rows[0].backend == "triton"
        monkeypatch.setattr(backend, "interpreting", lambda: False)
        with pytest.raises(RuntimeError, match="LOWBIT_BACKEND=triton cannot run: "):
            layer(x)
