"""A sample of what ships, compiled for sm_80 and sm_90, its PTX executed on the CPU against the float64 oracle.

:data:`~lowbit.testing.ptx_sample.SAMPLE` names entries of ``benchmarks/tools/compiled.json``: each runs with the
blocks, warps and stages of its row of the table, on a smaller weight.
"""

from __future__ import annotations

import functools
import pickle
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lowbit.backends.reference import quantize_activations
from lowbit.backends.triton import launch, tuning
from lowbit.backends.triton.launch import TARGETS, Launch
from lowbit.kron.operands import KronOperands
from lowbit.packed.format import PackedFormat
from lowbit.testing import codebook_cases, kron_cases
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations, random_weight
from lowbit.testing.processes import outside_interpreter
from lowbit.testing.ptx_emulator import Compiled, Statistics, run_launch
from lowbit.testing.ptx_sample import ARCHITECTURES, NAMES

pytest.importorskip("triton")
FAMILIES = ("packed", "codebook", "kron")
pytestmark = pytest.mark.recorded("lowbit.backends", *(f"lowbit.{family}.triton" for family in FAMILIES))

ROOT = Path(__file__).resolve().parents[3]
ROWS, N, K = 5, 70, 512
IDS = torch.tensor([1, 0, 99, 2, 2, 1, 0, 0, 1, 1])  # two experts for each row of x; one is elsewhere
EXPERTS = {"packed": 3, "codebook": 12}  # fewer and more than there are tiles of rows


class Case:
    """The launches of one entry of the sample, and the check of what they write."""

    def __init__(self, target: str, name: str) -> None:
        family, _, label = name.partition(" ")
        with ExitStack() as stack:
            module = __import__(f"lowbit.{family}.triton", fromlist=["linear"])
            stack.enter_context(patch.object(module, "target_of", lambda device: TARGETS[target]))
            self.launches = stack.enter_context(launch.collecting())
            stack.enter_context(tuning.asking())
            make: dict[str, Callable[..., tuple[Tensor, Callable[[Tensor], None]]]] = {
                "packed": self._packed, "codebook": self._codebook, "kron": self._kron,
            }  # fmt: skip
            self.y, self.compare = make[family](module, TARGETS[target], label, stack)

    def check(self, compiled: list[Compiled]) -> Statistics:
        self.y.fill_(torch.nan)
        total = Statistics()
        for code, step in zip(compiled, self.launches, strict=True):
            total.executed += run_launch(code, step).executed
        self.compare(self.y)
        return total

    @staticmethod
    def _configured(kernel: str, target: launch.Target, label: str, stack: ExitStack) -> tuple[int, str, bool]:
        """Bits, dtype and int8 of a label; its configuration is taken, K cut in two for few rows."""
        bits, dtype, m = re.search(r"(\d)-bit.* (\w+) M=(\d+)", label).groups()  # type: ignore[union-attr]
        x = getattr(torch, dtype)
        config = tuning.choose(target, kernel, x, int(bits), int(m), 4096, 4096)
        stack.enter_context(tuning.using(replace(config, split=2 if m == "16" else 1)))
        return int(bits), "float16" if x == torch.int8 else dtype, x == torch.int8

    @staticmethod
    def _product(module, label, x, weight, *activation):
        """(y, its check, given x as it is multiplied and the dense weight)."""
        if "_experts" not in label:
            return module.linear(x, *weight.operands, None, *activation), assert_linear_close
        experts = EXPERTS[label.partition("_")[0]]
        bias = activations(1, experts * N, x.dtype)[0]

        def assert_close(y, x, dense):
            for e in range(3):
                own, rows = slice(e * N, (e + 1) * N), (e == IDS).nonzero()[:, 0]
                assert_linear_close(y[rows], x[rows // 2], dense[own], bias[own])
            assert not y[IDS == 99].any()

        return module.experts(x, IDS, *weight.operands, experts, bias, *activation), assert_close

    def _packed(self, module, target, label, stack):
        bits, dtype, int8 = self._configured(label.split()[0], target, label, stack)
        n = N * (EXPERTS["packed"] if "_experts" in label else 1)
        form = (K, "row", "none") if "per row" in label else (128, "group", "int")
        weight = random_weight(PackedFormat(bits, n, K, *form, "float16"), bits)
        x = activations(ROWS, K, getattr(torch, dtype), seed=bits)
        y, assert_close = self._product(module, label, x, weight, None, int8, 0)
        q, inverse = quantize_activations(x, None)
        return y, lambda y: assert_close(y, q.double() / inverse.double() if int8 else x, weight.dense())

    def _codebook(self, module, target, label, stack):
        bits, dtype, int8 = self._configured(label.split()[0], target, label, stack)
        n = N * (EXPERTS["codebook"] if "_experts" in label else 1)
        tables, scales, group = ("row", "none", K) if " row " in label else ("tensor", "float", 64)
        table_dtype = torch.float16 if tables == "row" else torch.float32
        kind = codebook_cases.Kind(bits, n, K, group, tables, scales, table_dtype, torch.float16)
        weight = codebook_cases.random_weight(kind, bits)
        x = activations(ROWS, K, getattr(torch, dtype), seed=bits)
        y, assert_close = self._product(module, label, x, weight, None, int8)
        if int8:
            q, inverse = quantize_activations(x, None)
            fixed, step = weight.fixed_point()
            return y, lambda y: assert_close(y, q.double() / inverse.double(), fixed * step.double())
        if x.dtype != torch.float32:  # entries are rounded to the dtype of x
            weight = replace(weight, codebook=weight.codebook.to(x.dtype).float(), _dense={})
        return y, lambda y: assert_close(y, x, weight.dense())

    def _kron(self, module, target, label, stack):
        shape = (1, 64, 64, 64, 64) if "64x64" in label else (1, 2, 1, 40, 320)
        dtype = getattr(torch, label.split(", ")[1])
        weight = kron_cases.random_weight(shape, kron_cases.Kind(dtype), kron_cases.Kind(dtype))
        x = activations(3, weight.k, dtype)
        y = module.linear(x, *KronOperands(**weight.arguments), None)
        return y, lambda y: weight.assert_close(y, x)


@functools.cache
def compiled(target: str) -> dict[str, list[Compiled]]:
    """The sample, compiled for a target by a process of its own, outside of the interpreter."""
    done = outside_interpreter(__file__, target, root=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    results: dict[str, list[Compiled]] = pickle.loads(done.stdout)
    return results


def main(target: str) -> None:
    """Compiles, and writes a pickle of the results by name."""
    from benchmarks.tools.compiling import compile_launch

    def code(step: Launch) -> Compiled:
        return Compiled.of(compile_launch(step, TARGETS[target]))

    results = {name: [code(step) for step in Case(target, name).launches] for name in NAMES}
    sys.stdout.buffer.write(pickle.dumps(results))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_compiled_code_computes_the_oracle(target: str, name: str) -> None:
    case = Case(target, name)
    kernel = name.rpartition(": ")[2]
    assert kernel in [step.kernel.fn.__name__ for step in case.launches]
    statistics = case.check(compiled(target)[name])
    assert statistics.count("mma.sync" if target == "sm_80" else "wgmma.mma_async") or statistics.count("mma.sync")


if __name__ == "__main__":
    main(sys.argv[1])
