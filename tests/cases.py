"""What the kernel tests run over: every format of the family × shapes × backends and ISAs of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.backends import registry
from lowbit.backends.cpu import native
from lowbit.core.bitpack import pack
from lowbit.core.family import FLOAT_DTYPES
from lowbit.packed.format import PackedFormat

DTYPES = tuple(FLOAT_DTYPES.values())
BITS = tuple(range(2, 9))

# (N, K, group_size or None): odd on purpose; 172 in groups of 32 leaves a shorter last group
SHAPES = (
    (1, 1, None), (1, 1, 1), (3, 5, 2), (2, 31, None), (5, 33, 33), (7, 64, 16), (13, 172, 32), (9, 172, 7),
    (33, 257, 64), (6, 320, 128), (17, 96, None), (4, 1000, 96), (66, 40, 40),
)  # fmt: skip
ROWS = (0, 1, 2, 3, 5, 8, 17)


@dataclass(frozen=True)
class Where:
    """A backend, for the compiled one an ISA, and the device whose tensors it is given."""

    backend: str
    isa: str = ""
    device: str = "cpu"

    def __str__(self) -> str:
        return self.isa or (self.backend if self.device == "cpu" else f"{self.backend}-{self.device}")


def everywhere(interpreter: bool = True) -> list[Where]:
    """The reference, every ISA this machine can run (or the one that LOWBIT_ISA forces), and, unless it is not wanted,
    Triton in its interpreter where there is no GPU. With LOWBIT_TEST_DEVICE=cuda, what runs on a GPU and nothing else.
    """
    if os.environ.get("LOWBIT_TEST_DEVICE") == "cuda":
        return [Where("triton", device="cuda"), Where("reference", device="cuda")]
    compiled = [] if registry.why_unavailable("cpu") else [Where("cpu", isa) for isa in native.isas()]
    return [Where("reference"), *compiled, *([Where("triton")] if interpreter and registry.interpreting() else [])]


Case = TypeVar("Case")


def share(where: Where, items: Sequence[Case], turn: int, turns: int) -> list[tuple[int, Case]]:
    """(i, items[i]) of all items; for Triton's interpreter, which is slow, of every ``turns``-th, from ``turn`` on.

    Tests with ``turns`` parameters (dtypes, say) so run every case there once, and each parameter on a share of them.
    """
    numbered = list(enumerate(items))
    return numbered[turn::turns] if where == Where("triton") else numbered


_device = torch.device("cpu")


@contextmanager
def running(where: Where) -> Iterator[None]:
    """Force ``where``, make sure that it is what runs, and give :func:`call` its device."""
    global _device
    with ExitStack() as stack:
        stack.enter_context(registry.use_backend(where.backend))
        if where.isa:
            stack.enter_context(native.use_isa(where.isa))
            assert native.isa() == where.isa
        assert registry.active_backend(where.device) == where.backend
        _device = torch.device(where.device)
        try:
            yield
        finally:
            _device = torch.device("cpu")


def call(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    """``op`` of the arguments moved to the device under test, its result on the CPU."""
    if _device.type == "cpu":
        launched = _interpreted()
        result: Tensor = op(*args, **kwargs)
        if registry.active_backend("cpu") == "triton":
            assert _interpreted() > launched or not result.numel(), f"{op} launched no kernel"
        return result
    moved = [on_device(a) if isinstance(a, Tensor) else a for a in args]
    named = {name: on_device(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    return op(*moved, **named).cpu()  # type: ignore[no-any-return]


def _interpreted() -> int:
    """Launches in Triton's interpreter so far."""
    return sum(sys.modules["interpreter"].launches.values()) if "interpreter" in sys.modules else 0


def on_device(t: Tensor) -> Tensor:
    """``t`` on the device under test, its strides kept."""
    if t.is_contiguous():
        return t.to(_device)
    whole = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return whole.to(_device).as_strided(t.size(), t.stride(), t.storage_offset())


def formats(bits: int, n: int, k: int, group_size: int | None) -> Iterator[PackedFormat]:
    """Every granularity × zeros × outliers that a weight of this shape can have; scale dtypes in rotation."""
    granularities = ("group",) if group_size is not None else ("row", "tensor")
    for i, granularity in enumerate(granularities):
        for j, zeros in enumerate(("none", "int", "float")):
            for outliers in (0, max(1, n * k // 50)):
                yield PackedFormat(
                    bits=bits,
                    out_features=n,
                    in_features=k,
                    group_size=k if group_size is None else group_size,
                    granularity=granularity,  # type: ignore[arg-type]
                    zeros=zeros,  # type: ignore[arg-type]
                    scale_dtype=tuple(FLOAT_DTYPES)[(bits + i + j + n) % 3],
                    outliers=outliers,
                    outlier_dtype=tuple(FLOAT_DTYPES)[(bits + j + k) % 3],
                )


@dataclass
class Weight:
    """Random tensors of a format, in the order in which the ops take them."""

    format: PackedFormat
    codes: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    outliers: tuple[Tensor | None, Tensor | None, Tensor | None]
    _dense: dict[bool, Tensor] = field(default_factory=dict)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        int8: bool = False,
        x_scale: Tensor | None = None,
        x_group: int = 0,
    ) -> Tensor:
        f = self.format
        return call(
            torch.ops.lowbit.packed_linear,
            x, self.packed, self.scales, self.zeros, bias, *self.outliers, x_scale, f.bits, f.group_size, int8, x_group
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        f = self.format
        return call(
            torch.ops.lowbit.packed_dequantize,
            self.packed, self.scales, self.zeros, *self.outliers, f.bits, f.group_size, f.in_features, dtype
        )

    def embedding(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        f = self.format
        return call(
            torch.ops.lowbit.packed_embedding,
            ids, self.packed, self.scales, self.zeros, *self.outliers, f.bits, f.group_size, f.in_features, dtype
        )

    def dense(self, outliers: bool = True) -> Tensor:
        """The float64 holding of the weight by the format's definition, written independently of the package."""
        f = self.format
        if outliers in self._dense:
            return self._dense[outliers]
        group = [k // f.group_size for k in range(f.in_features)]
        scales = self.scales.float().expand(f.out_features, -1)[:, group]
        if self.zeros is None:
            zeros = torch.full_like(scales, 2.0 ** (f.bits - 1))
        else:
            zeros = self.zeros.float().expand(f.out_features, -1)[:, group]
        weight = (self.codes.float() - zeros) * scales
        values, columns, rows = self.outliers
        if outliers and values is not None and columns is not None and rows is not None:
            for n in range(f.out_features):
                for i in range(int(rows[n]), int(rows[n + 1])):
                    weight[n, int(columns[i])] += float(values[i])
        self._dense[outliers] = weight.double()
        return self._dense[outliers]


def random_weight(format: PackedFormat, seed: int = 0, *, power_of_two: bool = False) -> Weight:
    """Codes over their whole range; scales around 1/sqrt(K), or powers of two for exact arithmetic."""
    g = torch.Generator().manual_seed(seed)
    n, k = format.out_features, format.in_features
    codes = torch.randint(0, 1 << format.bits, (n, k), generator=g, dtype=torch.uint8)
    spec = format.tensors()
    shape, scale_dtype = spec["scales"]
    if power_of_two:
        scales = torch.exp2(torch.randint(-2, 3, shape, generator=g).float())
    else:
        scales = (torch.rand(shape, generator=g) + 0.5) / (1 << format.bits)
    zeros = None
    if format.zeros == "int":
        zeros = torch.randint(0, 1 << format.bits, shape, generator=g, dtype=torch.uint8)
    elif format.zeros == "float":
        zeros = torch.rand(shape, generator=g) * (1 << format.bits)
        zeros = (zeros.round() if power_of_two else zeros).to(scale_dtype)
    values = columns = rows = None
    if format.outliers:
        flat = torch.randperm(n * k, generator=g)[: format.outliers].sort().values
        columns = (flat % k).to(spec["outlier_columns"][1])
        counts = torch.bincount(flat // k, minlength=n)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        values = torch.randint(-8, 9, flat.shape, generator=g).float()
        values = (values if power_of_two else values + torch.rand(flat.shape, generator=g)).to(
            spec["outlier_values"][1]
        )
    return Weight(format, codes, pack(codes, format.bits), scales.to(scale_dtype), zeros, (values, columns, rows))


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
