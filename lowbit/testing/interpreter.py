"""Triton's interpreter as an oracle: what a kernel computes, and whether it may, without a GPU.

``TRITON_INTERPRET=1`` runs a kernel's programs one after the other in numpy. As Triton 3.6 to 3.9 ship it, that is not
yet a check: bfloat16 is computed on its raw 16 bits, memory may be read and written anywhere, and programs always run
in the same order. :func:`install` mends this for the whole process:

- **bfloat16** operations, casts, reductions and dot products have their IEEE values, rounded once to nearest even;
- **tl.dot** accumulates in float32 (int8: exactly, in int32), has a GPU's smallest shapes, and in its ``tf32``
  precision sees no more of a float32 than a GPU does;
- **bounds**: a lane that is not masked lies inside the tensor whose pointer it came from, gaps between the rows of a
  strided view left out, else :class:`OutOfBounds`; masked lanes without ``other`` are NaN, or 0x5A in every byte;
- **races**: memory that one program stores is not touched by another program of the launch, and one store has one
  value for each address, else :class:`Race`. Integer atomics of several programs may meet; floating-point atomics,
  whose sum depends on their order, are refused;
- **order**: programs run in a shuffled order, so that a result that depends on it shows;
- :data:`launches` counts the launches of each kernel.

Not seen: a race between the threads of one program, and what only the compiler does (fused multiply-adds among it).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

launches: Counter[str] = Counter()  # by name of the kernel


class LaunchError(Exception):
    """A kernel did what no launch may do."""


class OutOfBounds(LaunchError):
    """A lane that is not masked lies outside the tensor that its pointer came from."""


class Race(LaunchError):
    """The result depends on the order in which programs or lanes run."""


@dataclass(frozen=True)
class Checks:
    """What is checked. ``shuffle`` is the seed of the programs' order; ``None``: ascending."""

    bounds: bool = True
    race: bool = True
    shuffle: int | None = 0


_checks = Checks()


@contextmanager
def checks(**changes: Any) -> Iterator[None]:
    """Other :class:`Checks` inside the ``with`` block: ``with checks(shuffle=3, race=False): ...``."""
    global _checks
    before = _checks
    try:
        _checks = replace(_checks, **changes)
        yield
    finally:
        _checks = before


def install() -> None:
    """Mend the interpreter of this process. May be called again.

    Raises:
        RuntimeError: TRITON_INTERPRET was not set before triton was imported.
    """
    if not isinstance(tl.sum, stock.InterpretedFunction) or not triton.knobs.runtime.interpret:
        value = os.environ.get("TRITON_INTERPRET")
        raise RuntimeError(f"TRITON_INTERPRET must be 1 before triton is imported, and stay so: it is {value!r} now")
    stock.interpreter_builder.__class__ = _Builder
    stock.interpreter_builder.codegen_fns["min_dot_size"] = _smallest_dot
    stock.GridExecutor, stock.ReduceOps, stock.ScanOps = _Grid, _Reduce, _Scan
    stock._implicit_cvt = _to_interpreter
    stock._patch_lang = _patch_modules
    stock._patch_lang_tensor = _patch_tensor


# ------------------------------------------------------------------------------------------------ bfloat16
# The interpreter holds a bfloat16 as the uint16 of its bits.


def _is_bfloat16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def decode_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 or float64 -> uint16, rounded once to nearest even. Every NaN becomes 0x7FC0."""
    if values.dtype == np.float64:
        single = values.astype(np.float32)
        values = _to_odd(single, values - single.astype(np.float64))
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _to_odd(rounded: np.ndarray, residue: np.ndarray) -> np.ndarray:
    """Of the two neighbours that enclose ``rounded + residue``, the one with an odd last bit.

    Rounded to odd, a value can be rounded again to at least two bits less as if it had been rounded once (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    even = (rounded.view(f"u{rounded.itemsize}") & 1) == 0
    towards = np.where(residue > 0, np.inf, -np.inf).astype(rounded.dtype)
    inexact = (residue > 0) | (residue < 0)  # false for the NaN residue of an infinity
    return np.where(inexact & even, np.nextafter(rounded, towards), rounded)


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(decode_bfloat16(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(encode_bfloat16(handle.data), tl.bfloat16)


def _multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of 16-bit or float32 values as a float64 rounded to odd."""
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)  # the product is exact
    total = product + z
    part = total - product
    return _to_odd(total, (product - (total - part)) + (z - part))


def _smaller_number(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The operand that is no NaN. Triton 3.6 gives NaN here, as np.fmin may do for a signalling NaN."""
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.minimum(x, y)))


def _larger_number(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.maximum(x, y)))


def _smallest_dot(lhs: tl.dtype, rhs: tl.dtype) -> tuple[int, int, int]:
    """(M, N, K) that the NVIDIA backends of every supported version of Triton accept."""
    return 1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16


# ------------------------------------------------------------------------------------------------ memory

# What meets another program's access of which kind in a race.
_CONFLICTS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
_SEVERAL = -1  # in a shadow, where otherwise 0 is nobody and p + 1 is program p
_SHADOW_LIMIT = 64 << 20


class _Region:
    """A range of memory that arguments of the launch occupy, and which programs touched each of its cells."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self.cell = 0  # bytes; 0 before the first access
        self.shadows: dict[str, np.ndarray] = {}

    def touch(self, kind: str, offsets: np.ndarray, size: int, program: int) -> tuple[int, int] | None:
        """Note the access. Where it meets another program's: the byte, and that program's number or ``_SEVERAL``."""
        if not self._fit(offsets, size):
            return None
        cells = offsets // self.cell
        if size > self.cell:
            cells = (cells[:, None] + np.arange(size // self.cell)).reshape(-1)
        for other in _CONFLICTS[kind]:
            if other in self.shadows:
                owners = self.shadows[other][cells]
                foreign = (owners != 0) & (owners != program + 1)
                if foreign.any():
                    at = int(foreign.argmax())
                    owner = int(owners[at])
                    return int(cells[at]) * self.cell, owner if owner == _SEVERAL else owner - 1
        if kind not in self.shadows:
            self.shadows[kind] = np.zeros(-(-self.size // self.cell), dtype=np.int32)
        shadow = self.shadows[kind]
        owners = shadow[cells]
        shadow[cells] = np.where((owners == 0) | (owners == program + 1), program + 1, _SEVERAL)
        return None

    def _fit(self, offsets: np.ndarray, size: int) -> bool:
        """Make cells that this access covers whole, as small as it and all before it need; false: too many of them."""
        before, self.cell = self.cell, math.gcd(self.cell, size)
        if (offsets % self.cell).any():
            self.cell = 1
        if 4 * len(_CONFLICTS) * (self.size // self.cell) > _SHADOW_LIMIT:
            self.shadows.clear()
            return False
        if before != self.cell:
            self.shadows = {kind: shadow.repeat(before // self.cell) for kind, shadow in self.shadows.items()}
        return True


@dataclass
class _Argument:
    """A tensor that a kernel was launched with; sizes and strides in bytes."""

    name: str
    start: int
    size: int
    item: int
    dimensions: list[tuple[int, int]] = field(default_factory=list)  # (stride, extent); empty: without gaps
    description: str = ""
    region: _Region = field(default_factory=lambda: _Region(0, 0))

    @classmethod
    def of(cls, name: str, tensor: Any) -> _Argument:
        item = tensor.element_size()
        used = [(stride * item, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and stride]
        used.sort(reverse=True)
        size = item + sum(stride * (n - 1) for stride, n in used) if tensor.numel() else 0
        nested = all(a >= b * n for (a, _), (b, n) in pairwise([*used, (item, 1)]))
        gaps = nested and size > item * math.prod(n for _, n in used)
        description = f"{name} (shape {tuple(tensor.shape)}, stride {tensor.stride()}, {tensor.dtype})"
        return cls(name, tensor.data_ptr(), size, item, used if gaps else [], description)

    def holds(self, offsets: np.ndarray, size: int) -> np.ndarray:
        inside = (offsets >= 0) & (offsets + size <= self.size)
        if self.dimensions and size <= self.item:
            rest = offsets
            for stride, n in self.dimensions:
                index = rest // stride
                inside &= index < n
                rest = rest - index * stride
            inside &= rest + size <= self.item
        return inside


class _Memory:
    """The arguments of one launch and what its programs did to them."""

    def __init__(self, named: list[tuple[str, Any]], checks: Checks) -> None:
        self.checks = checks
        self.patched: set[Any] = set()  # modules of triton.language whose functions now run in the interpreter
        self.patches = stock._LangPatchScope()
        self.arguments: dict[int, _Argument] = {}  # by id of the tensor
        for name, value in named:
            self._add(name, value)
        region = _Region(0, 0)
        for argument in sorted(self.arguments.values(), key=lambda a: a.start):
            if argument.start >= region.start + region.size:
                region = _Region(argument.start, 0)
            region.size = max(region.size, argument.start + argument.size - region.start)
            argument.region = region

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for i, element in enumerate(value):
                self._add(f"{name}[{i}]", element)
        elif hasattr(value, "data_ptr"):
            self.arguments[id(value)] = _Argument.of(name, stock._unwrap_tensor(value))

    def access(self, kind: str, pointers: TensorHandle, mask: np.ndarray | None, builder: _Builder) -> None:
        addresses = pointers.data.reshape(-1) if mask is None or mask.all() else pointers.data[mask]
        if not addresses.size:
            return
        addresses = addresses.astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        own = pointers.attr.get("argument")
        # a pointer whose origin is not known, out of tl.where say, may point into any argument
        for argument in [own] if own else self.arguments.values():
            offsets = addresses - argument.start
            inside = argument.holds(offsets, size)
            if self.checks.race and inside.any():
                region = argument.region
                at = addresses[inside] - region.start
                met = region.touch(kind, at, size, builder.program)
                if met:
                    byte, other = met[0] + region.start - argument.start, met[1]
                    name = "several programs" if other == _SEVERAL else builder.name_of(other)
                    raise Race(
                        f"{builder.name_of(builder.program)}: {kind} of byte {byte} of {argument.description}, "
                        f"which {name} touched as well"
                    )
            if not self.checks.bounds:
                continue
            if own and not inside.all():
                raise OutOfBounds(
                    f"{builder.name_of(builder.program)}: {kind} of {size} bytes at byte {offsets[~inside][0]} of "
                    f"{argument.size} of {argument.description}, in {int((~inside).sum())} of {inside.size} lanes"
                )
            addresses = addresses[~inside]
        if self.checks.bounds and not own and addresses.size:
            raise OutOfBounds(f"{builder.name_of(builder.program)}: {kind} of {size} bytes outside every argument")


def _moves_pointer(name: str) -> Callable[..., TensorHandle]:
    """The builder's method of that name, whose result points into the same argument as its first operand's."""
    method = getattr(stock.InterpreterBuilder, name)

    def moved(self: _Builder, *args: Any, **kwargs: Any) -> TensorHandle:
        result = method(self, *args, **kwargs)
        for operand in args:
            if isinstance(operand, TensorHandle) and "argument" in operand.attr:
                result.attr["argument"] = operand.attr["argument"]
        return result

    return moved


def _to_interpreter(value: Any, convert: Callable[[Any], Any] = stock._implicit_cvt) -> Any:
    """A kernel's argument as the interpreter holds it; a pointer knows its tensor."""
    converted = convert(value)
    memory = stock.interpreter_builder.memory
    if memory is not None and id(value) in memory.arguments:
        converted.handle.attr["argument"] = memory.arguments[id(value)]
    return converted


def _patch_modules(fn: Any, patch: Callable[[Any], Any] = stock._patch_lang) -> Any:
    """Once per launch: what Triton ships repeats it, half a millisecond each, in every call of a device function."""
    memory = stock.interpreter_builder.memory
    modules = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
    if modules <= memory.patched:
        return stock._LangPatchScope()
    memory.patched |= modules
    memory.patches._changes += patch(fn)._changes  # all restored when the launch ends
    return memory.patches


def _patch_tensor(tensor: Any, scope: Any, patch: Callable[..., None] = stock._patch_lang_tensor) -> None:
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # 3.6: numpy >= 2.4 refuses [1]


# ------------------------------------------------------------------------------------------------ the interpreter


class _Builder(stock.InterpreterBuilder):
    """What the interpreter calls for every operation of a kernel."""

    memory: _Memory | None = None
    program = 0

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        count, seed = nx * ny * nz, _checks.shuffle
        self.order = np.arange(count)
        if seed is not None and count > 1:
            generator = np.random.default_rng(seed)
            while (np.diff(self.order) == 1).all():  # two programs should not stay in order by chance
                generator.shuffle(self.order)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        nx, ny, _ = self.grid_dim
        self.program = int(self.order[x + nx * (y + ny * z)])
        super().set_grid_idx(*self._index(self.program))

    def _index(self, program: int) -> tuple[int, int, int]:
        nx, ny, _ = self.grid_dim
        return program % nx, program // nx % ny, program // (nx * ny)

    def name_of(self, program: int) -> str:
        return f"program {self._index(program)}"

    # arithmetic

    def get_bf16(self, value: float) -> TensorHandle:
        return _narrow(self.get_fp32(value))

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        result = super().unary_op(_widen(arg), op)
        return _narrow(result) if _is_bfloat16(arg) else result

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        result = super().binary_op(_widen(lhs), _widen(rhs), op)
        if result.data.dtype == np.bool_:  # a comparison's result does not have the type of what is compared
            return TensorHandle(result.data, tl.int1)
        return _narrow(result) if _is_bfloat16(lhs) else result

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bfloat16(other) or op is np.where:
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(super().ternary_op(_widen(lhs), _widen(rhs), _widen(other), op))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.dtype.scalar == tl.float64:
            return super().create_fma(x, y, z)
        exact = _multiply_add(_widen(x).data, _widen(y).data, _widen(z).data)
        data = encode_bfloat16(exact) if _is_bfloat16(z) else exact.astype(z.data.dtype)
        return TensorHandle(data, z.dtype.scalar)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, _smaller_number)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, _larger_number)

    def create_clampf(self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate: Any) -> TensorHandle:
        if propagate == stock._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.ternary_op(arg, lo, hi, np.clip)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        data = _widen(src).data
        if dst_type.scalar == tl.bfloat16:
            data = data if data.dtype == np.float64 else data.astype(np.float32)  # as a GPU does with integers too
            return TensorHandle(encode_bfloat16(data), tl.bfloat16)
        return TensorHandle(data.astype(stock._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        types, nearest = (src.dtype.scalar, dst_type.scalar), (None, stock._ir.ROUNDING_MODE.RTNE)
        if any(dtype.is_fp8() for dtype in types) or rounding_mode not in nearest:
            raise NotImplementedError(f"only casts to nearest, and none of fp8: got {types}, {rounding_mode}")
        return self.cast_impl(src, dst_type)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *rest: Any) -> TensorHandle:
        accumulator = d.dtype.scalar
        if a.dtype.scalar == tl.int8:
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.int64)  # exact
            return TensorHandle((product + d.data).astype(np.int32), accumulator)  # wraps as int32 does
        if a.dtype.primitive_bitwidth <= 32 and accumulator != tl.float32:
            raise TypeError(f"tl.dot of {a.dtype} must accumulate in float32: got {accumulator}")
        x, y = _widen(a).data, _widen(b).data
        if x.dtype == np.float32 and a.dtype.scalar == tl.float32 and precision == stock._ir.INPUT_PRECISION.TF32:
            x, y = _as_tf32(x), _as_tf32(y)
        return TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, accumulator)

    # memory

    create_addptr = _moves_pointer("create_addptr")
    create_bitcast = _moves_pointer("create_bitcast")
    create_broadcast = _moves_pointer("create_broadcast")
    create_expand_dims = _moves_pointer("create_expand_dims")
    create_reshape = _moves_pointer("create_reshape")
    create_splat = _moves_pointer("create_splat")
    create_trans = _moves_pointer("create_trans")

    def _access(self, kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
        if self.memory is not None:
            lanes = None if mask is None else np.broadcast_to(mask.data, pointers.data.shape)
            self.memory.access(kind, pointers, lanes, self)

    def create_masked_load(self, ptrs: TensorHandle, mask: Any, other: Any, *args: Any, **kwargs: Any) -> TensorHandle:
        self._access("load", ptrs, mask)
        if other is None and not mask.data.all():
            other = _poison(ptrs)
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *args: Any, **kws: Any) -> None:
        self._access("store", ptrs, mask)
        super().create_masked_store(ptrs, value, mask, *args, **kws)
        if _checks.race:
            stored = stock._interpreter.load(ptrs.data, mask.data, value.data, value.data.dtype)
            if stored.tobytes() != np.ascontiguousarray(value.data).tobytes():
                raise Race(f"{self.name_of(self.program)}: one store writes different values to one address")

    def create_atomic_rmw(
        self, op: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *args: Any
    ) -> TensorHandle:
        if val.dtype.scalar.is_floating():
            raise Race(f"{self.name_of(self.program)}: the result of a {val.dtype} atomic depends on the order")
        self._access("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def create_atomic_cas(self, ptr: TensorHandle, *args: Any) -> TensorHandle:
        self._access("atomic", ptr, None)
        return super().create_atomic_cas(ptr, *args)


def _as_tf32(values: np.ndarray) -> np.ndarray:
    """The 19 bits of a float32 that a tensor core sees."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _poison(pointers: TensorHandle) -> TensorHandle:
    """What a lane holds that was not loaded."""
    dtype = pointers.get_element_ty()
    if dtype.is_floating():
        data = np.full(pointers.data.shape, np.nan, dtype=np.float32)
        data = encode_bfloat16(data) if dtype == tl.bfloat16 else data.astype(stock._get_np_dtype(dtype))
    else:
        item = stock._get_np_dtype(dtype)
        data = np.full(pointers.data.shape, np.frombuffer(b"\x5a" * item.itemsize, dtype=item)[0])
    return TensorHandle(data, dtype)


class _Grid(stock.GridExecutor):
    """One launch."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, named = super()._init_args_hst(args_dev, kwargs)
        arguments = [*zip(self.arg_names, args, strict=False), *named.items()]
        stock.interpreter_builder.memory = _Memory(arguments, _checks)
        return args, named

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        launches[self.fn.__name__] += 1
        try:
            with np.errstate(all="ignore"):  # as silent as a GPU
                super().__call__(*args, **kwargs)
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, LaunchError):
                raise cause from None
            raise
        finally:
            stock.interpreter_builder.memory = None


class _Reduce(stock.ReduceOps):
    """Reductions of bfloat16 values, and sums of both 16-bit types: rounded after every addition, as on a GPU."""

    def sum(self, input: tl.tensor) -> tl.tensor:
        if input.dtype not in (tl.bfloat16, tl.float16):
            return super().sum(input)
        cast = stock.interpreter_builder.cast_impl
        axis = 0 if self.axis is None else self.axis
        data = cast(input.handle, tl.float32).data
        halves = np.moveaxis(data.reshape(-1) if self.axis is None else data, axis, 0)
        while len(halves) > 1:  # lengths are powers of two
            total = halves[: len(halves) // 2] + halves[len(halves) // 2 :]
            halves = cast(cast(TensorHandle(total, tl.float32), input.dtype), tl.float32).data
        result = halves[0]
        if self.keep_dims:
            result = result.reshape((1,) * data.ndim) if self.axis is None else np.expand_dims(result, axis)
        return self._as(self.to_tensor(result, tl.float32), input.dtype)

    def min_max(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        values = input[0] if isinstance(input, tuple) else input
        if values.dtype != tl.bfloat16:
            return super().min_max(values, *args, **kwargs)
        wide = tl.tensor(_widen(values.handle), values.type.with_element_ty(tl.float32))
        result = super().min_max(wide, *args, **kwargs)
        if isinstance(result, tuple):
            return self._as(result[0], tl.bfloat16), result[1]
        return self._as(result, tl.bfloat16)

    @staticmethod
    def _as(values: tl.tensor, dtype: tl.dtype) -> tl.tensor:
        kind = values.type.with_element_ty(dtype) if values.type.is_block() else dtype
        return tl.tensor(stock.interpreter_builder.cast_impl(values.handle, dtype), kind)


class _Scan(stock.ScanOps):
    """Running sums and products of 16-bit types: rounded after every step."""

    def cumsum(self, input: tl.tensor) -> Any:
        return self.generic_scan((input,)) if input.dtype in (tl.bfloat16, tl.float16) else super().cumsum(input)

    def cumprod(self, input: tl.tensor) -> Any:
        return self.generic_scan((input,)) if input.dtype in (tl.bfloat16, tl.float16) else super().cumprod(input)
