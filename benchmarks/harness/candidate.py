"""What a benchmark of ``y = x @ W.T`` times: a candidate prepares a weight ``[N, K]`` in its own form.

It also says which dense weight that form stands for, so that its result is checked in float64 before it is timed. Ours
are in ``cpu/ours.py`` and ``gpu/formats.py``, others in ``peers/``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit import batch_invariant
from lowbit.backends.cpu import native

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A call of a peer that is a whole graph makes as many products as read this much: its own cost is not the kernel's.
BYTES_PER_CALL = 4 << 20
ROWS_CHECKED = 8


class Unavailable(Exception):
    """A candidate cannot run here, or not with this weight; the message says why."""


def require(module: str) -> Any:
    """The imported module; raises :class:`Unavailable` where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{module.split('.')[0]} is not installed") from error


def int8_per_token(x: Tensor) -> Tensor:
    """``x`` after symmetric int8 quantization of every row, in float64."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    codes = (x.float() * (127 / largest)).round().clamp(-127, 127)
    return codes.double() * (largest.double() / 127)


def int8_per_group(x: Tensor, group: int) -> Tensor:
    """The same for every ``group`` columns of a row, whose number they divide."""
    return int8_per_token(x.unflatten(-1, (-1, group))).flatten(-2)


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in float64; infinite where an element is not finite."""
    error = float((y.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


@dataclass
class Prepared:
    """One weight, ready to be multiplied.

    Args:
        call: ``(weight, x [M, K]) -> y [M, N]``.
        weight: all that a call reads but ``x``, ``nbytes`` of it; ``make()`` makes another, by default a deep copy.
        dense: the matrix ``[N, K]`` that it stands for.
        tolerance: of the relative Frobenius error against ``round_x(x) @ dense.T`` in float64.
        x_dtype: of x. round_x: what happens to x first.
        products: how many products with different weights one call makes; its result is the first's.
        operations: per row of x, where that is not ``2 N K``.
        bind: ``(weight, x)`` to a call without arguments, where a call of ``call`` is not that.
    """

    call: Callable[[Any, Tensor], Tensor]
    weight: Any
    nbytes: int
    dense: Tensor
    tolerance: float
    round_x: Callable[[Tensor], Tensor] = torch.Tensor.double
    x_dtype: torch.dtype = F32
    make: Callable[[], Any] | None = None
    products: int = 1
    operations: int | None = None
    bind: Callable[[Any, Tensor], Callable[[], Tensor]] | None = None

    def copies(self, count: int) -> list[Any]:
        """The weight and copies of it, ``count`` in all."""
        make = self.make or functools.partial(copy.deepcopy, self.weight)
        return [self.weight, *(make() for _ in range(count - 1))]

    def bound(self, weight: Any, x: Tensor) -> Callable[[], Tensor]:
        """What is timed."""
        return self.bind(weight, x) if self.bind else functools.partial(self.call, weight, x)

    def error(self, x: Tensor, y: Tensor, rounded: bool = True) -> float:
        """Relative error of some rows, first and last among them; infinite where any element is not finite.

        ``rounded=False``: rounding x is an error, too.
        """
        rows = sorted({i * (len(x) - 1) // (ROWS_CHECKED - 1) for i in range(ROWS_CHECKED)})
        expected = (self.round_x(x[rows]) if rounded else x[rows].double()) @ self.dense.double().t()
        return relative_error(y[rows], expected) if bool(y.isfinite().all()) else math.inf


@dataclass(frozen=True, eq=False)
class Candidate:
    """One line of the tables: a name, and a way to prepare a weight.

    Args:
        prepare: ``(N, K, device, **needs)``; raises where it cannot run.
        facts: go into every row. Always ``family`` (``packed``, ``codebook``, ``kron``, ``dense``; a peer's name) but
            for some peers on a CPU, ``bits`` of a code. On a CPU ``who``, ``group`` (128, "row", ...),
            ``activations`` (what is multiplied: "fp32", "bf16", "int8"), ``x_group`` where groups of x have a scale
            each and, where they are forced, ``isa`` and ``batch_invariant``. On a GPU ``scheme``, ``dtype``, ``int8``.
        needs: what preparing depends on besides the weight: "threads", "m".
        fits: whether it has a form for a weight ``[N, K]``.
    """

    name: str
    prepare: Callable[..., Prepared]
    facts: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    fits: Callable[[int, int], bool] = lambda n, k: True

    def __str__(self) -> str:
        return self.name

    @property
    def family(self) -> str:
        return str(self.facts["family"])

    @property
    def bits(self) -> int | None:
        found: int | None = self.facts["bits"]
        return found

    @property
    def scheme(self) -> str:
        return str(self.facts["scheme"])

    @property
    def dtype(self) -> str:
        return str(self.facts["dtype"])

    @property
    def int8(self) -> bool:
        return bool(self.facts["int8"])

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Within the block, what its facts force holds."""
        with contextlib.ExitStack() as stack:
            if "isa" in self.facts:
                stack.enter_context(native.use_isa(self.facts["isa"]))
            if "batch_invariant" in self.facts:
                stack.enter_context(batch_invariant(self.facts["batch_invariant"]))
            yield


def on_gpu(
    name: str, dtype: str, prepare: Callable[[int, int, str], Prepared], family: str, bits: int | None = None,
    scheme: str = "", int8: bool = False, fits: Callable[[int, int], bool] = lambda n, k: True,
) -> Candidate:  # fmt: skip
    """A candidate with a GPU's facts. ``dtype``: of x; ``scheme``: what shares one scale or table; ``int8``: x is."""
    facts = {"family": family, "bits": bits, "scheme": scheme, "dtype": dtype, "int8": int8}
    return Candidate(name, prepare, facts, fits=fits)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def from_tensors(call: Callable[..., Tensor], weight: tuple[Tensor, ...], dense: Tensor, **options: Any) -> Prepared:
    """A weight that is some tensors, given to ``call(x, *tensors)``."""
    return Prepared(lambda made, x: call(x, *made), weight, nbytes(*weight), dense, **options)


def affine(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: uint8 codes ``[N, K]``, float16 scales and uint8 zeros ``[N, G]``."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = 2**bits - 1
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def symmetric(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Round to nearest around code ``2**(bits-1)``: uint8 codes ``[N, K]`` and float32 scales ``[N, G]``."""
    groups = weight.unflatten(1, (-1, group_size))
    middle = 2 ** (bits - 1)
    # an odd number of levels at 8 bits; with fewer, all of them, so that the largest weight is between two
    scales = groups.abs().amax(-1) / (middle - 1 if bits == 8 else middle - 0.5)
    codes = (groups / scales[..., None]).round().add(middle).clamp(0, 2 * middle - 1)
    return codes.flatten(1).to(torch.uint8), scales


def expand(t: Tensor, group_size: int) -> Tensor:
    """``[N, G]`` to float64 ``[N, K]``."""
    return t.double().repeat_interleave(group_size, dim=1)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[N, K]`` to ``[N, K * bits / 8]``: low bits first, for 2, 4 and 8 bits."""
    parts = codes.unflatten(1, (-1, 8 // bits)).int()
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    return (parts << shifts).sum(-1).to(torch.uint8)


@functools.lru_cache(maxsize=1)
def source(shape: tuple[int, int]) -> Tensor:
    """A float weight with rows of norm about 1, for those that quantize."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / math.sqrt(shape[1])


def random_codes(bits: int, n: int, k: int, device: str) -> Tensor:
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device)


def random_weight(n: int, k: int, dtype: str, device: str) -> Tensor:
    return (torch.randn(n, k, device=device) / k**0.5).to(DTYPES[dtype])
