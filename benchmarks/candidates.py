"""What a benchmark of ``y = x @ W.T`` times: a candidate turns a float weight ``[N, K]`` into its own form.

It also says which dense weight that form stands for, so that its result can be checked in float64 before it is timed.
Ours are in ``ours.py``, others in ``peers_*.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit import batch_invariant
from lowbit.backends.cpu import native

F32, BF16 = torch.float32, torch.bfloat16
DTYPE_NAMES = {F32: "fp32", BF16: "bf16"}
# A call of a peer that is a whole graph makes as many products as read this much: its own cost is not the kernel's.
BYTES_PER_CALL = 4 << 20


def unchanged(x: Tensor) -> Tensor:
    return x


def int8_per_token(x: Tensor) -> Tensor:
    """``x`` after symmetric int8 quantization of every row, in float64."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    codes = (x.float() * (127 / largest)).round().clamp(-127, 127)
    return codes.double() * (largest.double() / 127)


def int8_per_group(x: Tensor, group: int) -> Tensor:
    """The same for every ``group`` columns of a row, whose number they divide."""
    return int8_per_token(x.unflatten(-1, (-1, group))).flatten(-2)


@dataclass
class Prepared:
    """One weight, ready to be multiplied.

    ``make()`` gives everything that one call reads, ``nbytes`` of it, freshly made each time; ``bind(x, made)`` gives a
    call without arguments. ``dense`` is the float64 ``[N, K]`` matrix that it stands for, ``round_x`` models what
    happens to x, and ``tolerance`` bounds the relative Frobenius error against ``round_x(x) @ dense.T``.
    ``products``: how many products with different weights one call makes; its result is the first's.
    ``operations``: per row of x, where that is not ``2 N K``.
    """

    make: Callable[[], Any]
    bind: Callable[[Tensor, Any], Callable[[], Tensor]]
    nbytes: int
    dense: Tensor
    tolerance: float
    x_dtype: torch.dtype = F32
    round_x: Callable[[Tensor], Tensor] = unchanged
    products: int = 1
    operations: int | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A name for tables and a way to prepare a weight, which skips the test where it cannot run.

    ``facts`` go into every row: ``who``, ``bits`` (of a code), ``group`` (128, "row", ...), ``activations`` (what is
    multiplied: "fp32", "bf16", "int8"), ``x_group`` where groups of x have a scale each and, where they are forced,
    ``isa`` and ``batch_invariant``. ``needs`` names what preparing depends on
    besides the weight: "threads", "m".
    """

    name: str
    prepare: Callable[..., Prepared]
    facts: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Within the block, what its facts force holds."""
        with contextlib.ExitStack() as stack:
            if "isa" in self.facts:
                stack.enter_context(native.use_isa(self.facts["isa"]))
            if "batch_invariant" in self.facts:
                stack.enter_context(batch_invariant(self.facts["batch_invariant"]))
            yield


def nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def from_tensors(call: Callable[..., Tensor], weight: tuple[Tensor, ...], dense: Tensor, **options: Any) -> Prepared:
    """A weight that is some tensors, given to ``call(x, *tensors)``."""
    return Prepared(
        lambda: tuple(t.clone() for t in weight),
        lambda x, made: lambda: call(x, *made),
        nbytes(weight), dense, **options,
    )  # fmt: skip


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
