"""Executes compiled PTX on the CPU: what a GPU would run, checked without one.

:func:`execute` runs one kernel of a PTX text, :func:`run_launch` a compiled
:class:`~lowbit.backends.triton.launch.Launch`. Every thread of a batch of blocks is a lane of numpy arrays: one
register is one array, and an instruction is executed for all lanes that stand at it. Known is what Triton emits for
sm_80 and sm_90 matrix products; anything else is a :class:`Fault` that names it. An error of the program is a Fault
too, where the hardware would only give wrong numbers:

- an access out of bounds or misaligned; shared memory read before it is written; a register that is not written yet,
  or was computed from one in this thread, as an address, a condition, a stored value or an operand of a matrix product;
- two warps of a block that touch the same shared bytes, one of them writing, with no ``bar.sync`` between;
- shared bytes read while a ``cp.async`` to them is in flight; accumulators or operands of a ``wgmma`` touched, or its
  shared operands overwritten, before its ``wait_group``; its registers written since the last ``wgmma.fence``, or its
  shared operands stored since the last ``fence.proxy.async``.

Not modelled: speed, caches, memory ordering between blocks, races inside a warp, the tensor memory
accelerator, mbarriers, clusters. Matrix instructions sum one instruction's products in float64 and round once, so
they are a little more precise than tensor cores.

References: NVIDIA, "PTX ISA", sections "Instruction Set" (semantics), "Warp Level Matrix Instructions" (fragments),
"Asynchronous Warpgroup Level Matrix Instructions" (descriptors, swizzling).
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WARP = 32
WARPGROUP = 128
BATCH_LANES = 8192
STEP_LIMIT = 5_000_000
SHARED_LIMIT = 232448  # bytes for one block, of sm_90; sm_80 has less


class Fault(Exception):
    """The program did something wrong, or something that this machine does not know."""


@dataclass
class Statistics:
    """What a run did.

    Args:
        executed: instructions by full opcode, counted once per warp that had an active thread.
        conflicts: bytes of shared memory to which two threads of a warp stored different values by one instruction;
            one of them stays, and the hardware says which. Here it is the last.
    """

    executed: Counter[str] = field(default_factory=Counter)
    conflicts: int = 0

    def count(self, prefix: str) -> int:
        """How many instructions whose opcode is ``prefix`` or starts with ``prefix.``."""
        return sum(n for opcode, n in self.executed.items() if opcode == prefix or opcode.startswith(prefix + "."))


# ---------------------------------------------------------------------------------------------------------------------
# Types. A register is an array of unsigned integers ("raw"); a type says how an instruction reads it.

BYTES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "s16x2": 4, "u16x2": 4, "tf32": 4,
    "pred": 1,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = frozenset({"f16", "bf16", "f32", "f64", "f16x2", "bf16x2"})


def raw_dtype(type_: str) -> Any:
    return np.bool_ if type_ == "pred" else UNSIGNED[BYTES[type_]]


def decode(raw: Array, type_: str) -> Array:
    """Raw bits as numbers. float16 and bfloat16 become float32; a packed pair becomes two elements."""
    if type_.endswith("x2"):
        return decode(np.ascontiguousarray(raw).view(np.uint16), type_[:-2])
    if type_ == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_ == "f16":
        return raw.view(np.float16).astype(np.float32)
    if type_ in ("f32", "f64"):
        return raw.view(np.float32 if type_ == "f32" else np.float64)
    if type_ == "tf32":  # the hardware ignores the low 13 bits
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)
    return raw.view(SIGNED[BYTES[type_]]) if type_[0] == "s" else raw


def encode(values: Array, type_: str, rounding: str = "rn") -> Array:
    """Numbers as raw bits, floats rounded once: to nearest even (``rn``) or towards zero (``rz``)."""
    if type_.endswith("x2"):
        return encode(values, type_[:-2], rounding).view(np.uint32)
    if type_ == "bf16":
        return to_bfloat16(values, rounding)
    if type_ in ("f16", "f32", "f64"):
        dtype: Any = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[type_]
        result = np.ascontiguousarray(values).astype(dtype)
        if rounding == "rz":
            beyond = np.abs(result.astype(np.float64)) > np.abs(values.astype(np.float64))
            result = np.where(beyond, np.nextafter(result, dtype(0)), result)
        return result.view(UNSIGNED[BYTES[type_]])
    size = BYTES[type_]
    return np.ascontiguousarray(values).astype(SIGNED[size] if type_[0] == "s" else UNSIGNED[size]).view(UNSIGNED[size])


def to_bfloat16(values: Array, rounding: str) -> Array:
    single = np.ascontiguousarray(values).astype(np.float32)
    # Rounded twice to nearest, a value near a tie could end on the wrong side; through an odd float32 it cannot.
    inexact = single.astype(np.float64) != values.astype(np.float64)
    if inexact.any():
        even = (single.view(np.uint32) & 1) == 0
        towards = np.where(values.astype(np.float64) > single, np.float32(np.inf), np.float32(-np.inf))
        odd = np.where(even, np.nextafter(single, towards), single)
        single = np.where(inexact & np.isfinite(values), odd, single)
    bits = single.view(np.uint32)
    if rounding == "rn":
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(single), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a*b + c in float64 with the inexact sums made odd, so that rounding the result again is rounding once.

    The product of two float32 is exact in float64. S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), 2008.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even & np.isfinite(total), odd, total)


# ---------------------------------------------------------------------------------------------------------------------
# Program text


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: a register, a shared symbol or a parameter, and a constant."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """``@{!}predicate opcode operands``; the opcode's parts are the name (``cp.async``), modifiers and types."""

    text: str
    opcode: str
    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool

    @property
    def type(self) -> str:
        if not self.types:
            raise Fault("an instruction without a type")
        return self.types[-1]


@dataclass
class Program:
    parameters: list[tuple[str, int]] = field(default_factory=list)  # name, bytes
    shared: dict[str, int] = field(default_factory=dict)  # symbol: offset
    shared_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # name, or prefix of numbered names: type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def register_type(self, name: str) -> str | None:
        return self.registers.get(name) or self.registers.get(name.rstrip("0123456789") + "<>")


def parse(ptx: str, kernel: str) -> Program:
    """The kernel named ``kernel``. Registers declared inside braces (inline assembly) get a name of their own."""
    ptx = re.sub(r"//\s*implicit-def:\s*(%\w+)[^\n]*", r"implicit_def \1;", ptx)
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    ptx = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*$", "", ptx, flags=re.M)
    entry = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(([^)]*)\)", ptx)
    if entry is None:
        raise Fault(f"no .entry {kernel}")
    program = Program()
    for parameter in filter(None, map(str.strip, entry[1].split(","))):
        words = parameter.split()
        if words[1].lstrip(".") not in BYTES:
            raise Fault(f"a parameter {parameter!r} is not modelled")
        program.parameters.append((words[-1], BYTES[words[1].lstrip(".")]))
    for variable in re.finditer(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]", ptx):
        align = int(variable[1] or 1)
        program.shared[variable[2]] = offset = -(-program.shared_bytes // align) * align
        program.shared_bytes = offset + int(variable[3] or 0)
    scopes: list[dict[str, str]] = []
    opened = 0
    for statement in statements(ptx, ptx.index("{", entry.end())):
        if statement == "{":
            scopes.append({})
            opened += 1
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.instructions)
        elif statement.startswith(".reg"):
            _, type_, names = statement.split(None, 2)
            for name in map(str.strip, names.split(",")):
                stem, _, count = name.rstrip(">").partition("<")
                if len(scopes) == 1:
                    program.registers[stem + "<>" if count else name] = type_.lstrip(".")
                    continue
                for local in (f"{stem}{n}" for n in range(int(count))) if count else (name,):
                    scopes[-1][local] = f"{local}@{opened}"
                    program.registers[f"{local}@{opened}"] = type_.lstrip(".")
        elif not statement.startswith("."):
            for scope in reversed(scopes):
                for name, own in scope.items():
                    statement = re.sub(rf"(?<![\w%$.@]){re.escape(name)}(?![\w%$.@])", own, statement)
            program.instructions.append(instruction_of(statement))
    return program


def statements(text: str, start: int) -> Iterator[str]:
    """The statements of the body that opens at ``start``: ``{``, ``}``, ``label:``, or what ends with a semicolon."""
    token = re.compile(r"\s*(?:([{}])|([\w$]+:)(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
    depth, position = 0, start
    while match := token.match(text, position):
        position = match.end()
        statement = (match[1] or match[2] or match[3] or "").strip()
        depth += (statement == "{") - (statement == "}")
        if statement:
            yield statement
        if depth == 0:
            return
    raise Fault(f"cannot read {text[position : position + 60]!r}")


def instruction_of(text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([\w%$@]+)\s+)?([\w.:]+)\s*(.*)", text, flags=re.S)
    if match is None:
        raise Fault(f"cannot read {text!r}")
    negated, predicate, opcode, rest = match.groups()
    parts = opcode.split(".")
    known = [n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in INSTRUCTIONS]
    length = known[0] if known else 1
    suffixes = parts[length:]
    return Instruction(
        text=" ".join(text.split()),
        opcode=opcode,
        name=".".join(parts[:length]),
        modifiers=tuple(s for s in suffixes if s not in BYTES),
        types=tuple(s for s in suffixes if s in BYTES),
        operands=tuple(operand_of(o) for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)),
        predicate=predicate,
        negated=bool(negated),
    )


def operand_of(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*([\w%$.@]+)\s*(?:\+?\s*(-?\s*\d+))?\s*\]", text)
        if match:
            return Address(match[1], int((match[2] or "0").replace(" ", "")))
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class GlobalMemory:
    """The arrays of the arguments, each at an address of its own, far from the others.

    An address keeps its place within 64 bytes, so what is misaligned for the GPU is misaligned here.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[int, int, Array]] = []  # address, bytes, memory from 16-byte boundary on
        self.end = 0x7000_0000_0000

    def add(self, pointer: int, size: int) -> int:
        """Maps ``size`` bytes at ``pointer`` of this process; returns their address in the machine."""
        address = (self.end + 0x10_0000 & ~0xFFF) + pointer % 64
        self.end = address + size
        lead = pointer % 16
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (lead + size)).from_address(pointer - lead))
        self.buffers.append((address, size, memory))
        return address

    def rows(self, addresses: Array, size: int) -> Iterator[tuple[Array, Array, Array]]:
        """(memory in rows of ``size`` bytes, index of each access, which of ``addresses`` these are)."""
        if (addresses % size).any():
            bad = int(addresses[addresses % size != 0][0])
            raise Fault(f"global address {bad:#x} is misaligned for {size} bytes")
        left = np.ones(len(addresses), bool)
        for base, length, memory in self.buffers:
            inside = left & (addresses >= base) & (addresses + size <= base + length)
            if inside.any():
                usable = memory[: len(memory) // size * size].reshape(-1, size)
                yield usable, (addresses[inside] - (base - base % 16)) // size, inside
                left &= ~inside
                if not left.any():
                    return
        if left.any():
            address = int(addresses[left][0])
            base, length, _ = min(self.buffers, key=lambda b: abs(address - b[0]), default=(0, 0, None))
            raise Fault(
                f"global address {address:#x} is out of bounds: "
                f"{size} bytes at {address - base} of an argument of {length} bytes"
            )

    def load(self, lanes: Array, addresses: Array, size: int) -> Array:
        out = np.empty((len(addresses), size), np.uint8)
        for memory, index, which in self.rows(addresses, size):
            out[which] = memory[index]
        return out

    def store(self, lanes: Array, addresses: Array, data: Array) -> None:
        for memory, index, which in self.rows(addresses, data.shape[1]):
            memory[index] = data[which]


class SharedMemory:
    """The shared memory of a batch of blocks, with a shadow that finds unsynchronised accesses.

    For each byte: whether it was written, whether an asynchronous copy to it is in flight, which warp (number + 1)
    wrote or read it since the last barrier, and whether a store to it is still to be made visible to wgmma by a fence.
    """

    SEVERAL = 255

    def __init__(self, blocks: int, threads: int, size: int) -> None:
        self.size, self.pitch = size, max(128, -(-size // 128) * 128)
        self.block = np.repeat(np.arange(blocks), threads)
        self.warp = (np.tile(np.arange(threads), blocks) // WARP + 1).astype(np.uint8)
        self.data = np.full(blocks * self.pitch, 0xFF, np.uint8)
        self.written, self.in_flight, self.writer, self.reader, self.unfenced = (
            np.zeros(self.data.shape, np.uint8) for _ in range(5)
        )
        self.conflicts = 0
        self.held: list[Array] = []  # byte indices that asynchronous matrix products still read

    def locate(self, lanes: Array, addresses: Array, size: int) -> Array:
        bad = (addresses < 0) | (addresses + size > self.size)
        if bad.any():
            raise Fault(f"shared address {int(addresses[bad][0])} is out of bounds: {size} bytes of {self.size}")
        if (addresses % size).any():
            raise Fault(f"shared address {int(addresses[addresses % size != 0][0])} is misaligned for {size} bytes")
        return (self.block[lanes] * self.pitch + addresses) // size

    def refuse(self, bad: Array, addresses: Array, lanes: Array, what: str) -> None:
        if bad.any():
            at = int(np.nonzero(bad.reshape(len(addresses), -1).any(1))[0][0])
            lane = int(lanes[at])
            raise Fault(f"shared address {int(addresses[at])} (block {self.block[lane]} of the batch): {what}")

    def load(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self.locate(lanes, addresses, size)
        me = self.warp[lanes][:, None]
        self.refuse(self.written.reshape(-1, size)[at] == 0, addresses, lanes, "read before it is written")
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, addresses, lanes, "read with a cp.async in flight")
        writer = self.writer.reshape(-1, size)[at]
        self.refuse((writer != 0) & (writer != me), addresses, lanes, "written by another warp since the last bar.sync")
        reader = self.reader.reshape(-1, size)
        seen = reader[at]
        mine = np.where((seen == 0) | (seen == me), me, np.uint8(self.SEVERAL))
        reader[at] = mine
        lost = (reader[at] != mine).any(1)  # several warps read the same bytes at once: one of them was recorded
        reader[at[lost]] = self.SEVERAL
        return self.data.reshape(-1, size)[at]

    def check_store(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self.locate(lanes, addresses, size)
        me = self.warp[lanes][:, None]
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, addresses, lanes, "written with a cp.async in flight")
        reader = self.reader.reshape(-1, size)[at]
        what = "read by another warp since the last bar.sync, or by a wgmma in flight"
        self.refuse((reader != 0) & (reader != me), addresses, lanes, what)
        return at

    def store(self, lanes: Array, addresses: Array, data: Array) -> None:
        size = data.shape[1]
        at = self.check_store(lanes, addresses, size)
        self.put(at, lanes, addresses, data)
        self.unfenced.reshape(-1, size)[at] = 1

    def put(self, at: Array, lanes: Array, addresses: Array, data: Array) -> None:
        """Writes rows; several warps may write a byte without a barrier only if they all write the same value."""
        size = data.shape[1]
        me = self.warp[lanes][:, None]
        memory, writer = self.data.reshape(-1, size), self.writer.reshape(-1, size)
        before = writer[at]
        foreign = (before != 0) & (before != me) & (memory[at] != data)
        self.refuse(foreign, addresses, lanes, "written by two warps without a bar.sync between")
        memory[at], writer[at] = data, me
        lost, other_warp = memory[at] != data, writer[at] != me
        self.refuse(lost & other_warp, addresses, lanes, "written by two warps without a bar.sync between")
        self.conflicts += int((lost & ~other_warp).sum())
        self.written.reshape(-1, size)[at] = 1

    def begin_copy(self, lanes: Array, addresses: Array, size: int) -> None:
        self.in_flight.reshape(-1, size)[self.check_store(lanes, addresses, size)] = 1

    def end_copy(self, lanes: Array, addresses: Array, data: Array) -> None:
        at = self.locate(lanes, addresses, data.shape[1])
        self.in_flight.reshape(-1, data.shape[1])[at] = 0
        self.put(at, lanes, addresses, data)

    def read_matrix(self, lanes: Array, addresses: Array, size: int) -> tuple[Array, Array]:
        """Elements of ``size`` bytes read by the warpgroups of ``lanes``: raw values, and the indices of their bytes.

        ``addresses``: (warpgroups, ...). The whole warpgroup reads, so a barrier must follow the writes of any warp.
        """
        flat = addresses.reshape(-1)
        of_lane = np.repeat(lanes, flat.size // max(1, len(lanes)))
        at = self.locate(of_lane, flat, size)
        self.refuse(self.written.reshape(-1, size)[at] == 0, flat, of_lane, "read before it is written")
        self.refuse(self.in_flight.reshape(-1, size)[at] != 0, flat, of_lane, "read with a cp.async in flight")
        self.refuse(self.writer.reshape(-1, size)[at] != 0, flat, of_lane, "written since the last bar.sync")
        self.refuse(self.unfenced.reshape(-1, size)[at] != 0, flat, of_lane, "stored since the last fence.proxy.async")
        self.reader.reshape(-1, size)[at] = self.SEVERAL
        touched = np.unique(at)
        return (
            self.data.view(UNSIGNED[size])[at].reshape(addresses.shape),
            (touched[:, None] * size + np.arange(size)).reshape(-1),
        )

    def barrier(self, blocks: Array | None = None) -> None:
        """What came before is visible now to the whole block; ``None`` stands for all blocks."""
        which = slice(None) if blocks is None else blocks
        self.writer.reshape(-1, self.pitch)[which] = 0
        self.reader.reshape(-1, self.pitch)[which] = 0
        for held in self.held:
            self.reader[held] = self.SEVERAL

    def fence(self, blocks: Array) -> None:
        """Stores (``st``, ``stmatrix``) before a fence can be read by matrix products after it."""
        self.unfenced.reshape(-1, self.pitch)[blocks] = 0


@dataclass
class Group:
    item: Any
    number: Array  # of the group, per lane
    lanes: Array  # still in flight, as a mask


class AsyncGroups:
    """Operations that complete when a thread waits for the group into which it committed them."""

    def __init__(self, lanes: int) -> None:
        self.open = np.zeros(lanes, np.int64)
        self.groups: list[Group] = []

    def issue(self, item: Any, lanes: Array) -> None:
        self.groups.append(Group(item, self.open.copy(), lanes.copy()))

    def commit(self, lanes: Array) -> None:
        self.open[lanes] += 1

    def wait(self, lanes: Array, allowed: int | None) -> list[tuple[Any, Array]]:
        """Completes all but the ``allowed`` latest groups (None: everything, committed or not)."""
        completed = []
        for group in self.groups:
            now = group.lanes & lanes
            if allowed is not None:
                now &= group.number < self.open - allowed
            if now.any():
                group.lanes = group.lanes & ~now
                completed.append((group.item, now))
        self.groups = [group for group in self.groups if group.lanes.any()]
        return completed


# ---------------------------------------------------------------------------------------------------------------------
# The machine


class Machine:
    """A batch of blocks that runs a program. Instructions read and write registers under :attr:`mask`."""

    def __init__(
        self,
        program: Program,
        parameters: dict[str, int],
        memory: GlobalMemory,
        grid: Sequence[int],
        threads: Sequence[int],
        blocks: Array,
        shared_bytes: int,
        statistics: Statistics,
    ) -> None:
        per_block = math.prod(threads)
        self.program, self.parameters, self.statistics = program, parameters, statistics
        self.lanes = len(blocks) * per_block
        self.every_lane = np.arange(self.lanes)
        self.everyone = np.ones(self.lanes, bool)
        self.block = np.repeat(np.arange(len(blocks)), per_block)
        self.global_memory = memory
        self.shared = SharedMemory(len(blocks), per_block, program.shared_bytes + shared_bytes)
        self.copies, self.products = AsyncGroups(self.lanes), AsyncGroups(self.lanes)
        self.mask: Array | None = None  # active lanes of the instruction; None: all
        self.registers: dict[str, Array] = {}
        self.undefined: dict[str, Array] = {}  # lanes in which a register's value depends on one not written yet
        self.tainted: tuple[str, Array] | None = None  # such a register that this instruction reads, and the lanes
        self.unreadable: dict[str, Array] = {}  # lanes in which a register is the accumulator of a wgmma in flight
        self.unwritable: dict[str, Array] = {}  # lanes in which it is its accumulator or operand
        self.written_since_fence: set[str] = set()
        self.constants: dict[tuple[str, str], Array] = {}
        thread, block = np.tile(np.arange(per_block), len(blocks)), np.repeat(blocks, per_block)
        self.special: dict[str, Array] = {"%laneid": thread % WARP, "%warpid": thread // WARP}
        for n, axis in enumerate("xyz"):
            self.special[f"%tid.{axis}"] = thread // math.prod(threads[:n]) % threads[n]
            self.special[f"%ctaid.{axis}"] = block // math.prod(grid[:n]) % grid[n]
            self.special[f"%ntid.{axis}"] = np.full(self.lanes, threads[n])
            self.special[f"%nctaid.{axis}"] = np.full(self.lanes, grid[n])

    # Registers and operands

    def read(self, operand: Operand, type_: str) -> Array:
        """Raw bits, one element per lane, of the type's width."""
        assert isinstance(operand, str), operand
        raw = self.registers.get(operand)
        if raw is None:
            return self.constant(operand, type_)
        if operand in self.undefined:
            lanes = self.undefined[operand]
            self.tainted = (operand, lanes if self.tainted is None else self.tainted[1] | lanes)
        self.refuse_lanes(self.unreadable, operand, "is read before wgmma.wait_group")
        dtype = raw_dtype(type_)
        if raw.dtype == dtype:
            return raw
        if raw.dtype.itemsize < np.dtype(dtype).itemsize or np.bool_ in (raw.dtype, dtype):
            raise Fault(f"register {operand} does not hold a .{type_}")
        return raw.astype(dtype)

    def numbers(self, operand: Operand, type_: str) -> Array:
        return decode(self.read(operand, type_), type_)

    def require_defined(self) -> None:
        """What this instruction has read so far is defined in every active thread."""
        if self.tainted is not None and (self.tainted[1] & self.active_mask).any():
            raise Fault(f"register {self.tainted[0]} is read before it is written")

    def refuse_lanes(self, lanes_of: dict[str, Array], register: str, what: str) -> None:
        if not lanes_of:
            return
        lanes = lanes_of.get(register)
        if lanes is not None and (lanes if self.mask is None else lanes & self.mask).any():
            raise Fault(f"register {register} {what}")

    def constant(self, operand: str, type_: str) -> Array:
        key = (operand, type_)
        if key not in self.constants:
            dtype = raw_dtype(type_)
            if operand in self.special:
                self.constants[key] = self.special[operand].astype(dtype)
            else:
                self.constants[key] = np.full(self.lanes, self.immediate(operand, type_), dtype)
        return self.constants[key]

    def immediate(self, operand: str, type_: str) -> Any:
        if operand in self.program.shared:
            return self.program.shared[operand]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", operand):
            return int(operand[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0)
            return value != 0 if type_ == "pred" else value & ((1 << 8 * BYTES[type_]) - 1)
        if type_ in FLOATS and re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", operand):
            return encode(np.array([float(operand)]), type_)[0]
        if self.program.register_type(operand):
            raise Fault(f"register {operand} is read before it is written")
        raise Fault(f"unknown operand {operand}")

    def write(self, register: Operand, raw: Array, signed: bool = False) -> None:
        """Writes the active lanes; what is narrower than the register is extended by zeros, or by its sign."""
        assert isinstance(register, str), register
        if register == "_":
            return
        type_ = self.program.register_type(register)
        if type_ is None:
            raise Fault(f"{register} is not a declared register")
        dtype = raw_dtype(type_)
        if raw.dtype != dtype:
            if raw.dtype.itemsize > np.dtype(dtype).itemsize or np.bool_ in (raw.dtype, dtype):
                raise Fault(f"{register} is a .{type_} register: it cannot hold {raw.dtype}")
            raw = raw.view(SIGNED[raw.itemsize]).astype(dtype) if signed else raw.astype(dtype)
        self.refuse_lanes(self.unwritable, register, "is written before wgmma.wait_group")
        self.written_since_fence.add(register)
        old = self.registers.get(register)
        before = self.undefined.pop(register, None)
        if old is None:
            old, before = self.poison(register), self.everyone
        self.registers[register] = raw if self.mask is None else np.where(self.mask, raw, old)
        if before is None and self.tainted is None:
            return
        undefined = np.zeros(self.lanes, bool) if before is None or self.mask is None else before & ~self.mask
        if self.tainted is not None:
            undefined = undefined | self.tainted[1] & self.active_mask
        if undefined.any():
            self.undefined[register] = undefined

    def poison(self, register: str) -> Array:
        """All ones: NaN in every floating-point type."""
        dtype = raw_dtype(self.program.register_type(register) or "b32")
        return np.full(self.lanes, True if dtype == np.bool_ else np.iinfo(dtype).max, dtype)

    def address(self, operand: Operand) -> Array:
        """One int64 per lane."""
        if not isinstance(operand, Address):
            raise Fault(f"unknown address {operand}")
        if operand.base in self.registers:
            width = "b64" if self.registers[operand.base].itemsize == 8 else "b32"
            base = self.read(operand.base, width)
            self.require_defined()
            return base.astype(np.int64) + operand.offset
        return self.constant(operand.base, "b64").astype(np.int64) + operand.offset

    def space(self, instruction: Instruction) -> GlobalMemory | SharedMemory:
        shared = any(modifier.startswith("shared") for modifier in instruction.modifiers)
        return self.shared if shared else self.global_memory

    @property
    def active(self) -> Array:
        """Indices of the active lanes."""
        return self.every_lane if self.mask is None else np.nonzero(self.mask)[0]

    @property
    def active_mask(self) -> Array:
        return self.everyone if self.mask is None else self.mask

    def whole(self, threads: int, what: str) -> None:
        """Every warp (or warpgroup) that executes the instruction must do so with all its threads."""
        if self.mask is not None:
            together = self.mask.reshape(-1, threads)
            if (together.any(1) != together.all(1)).any():
                raise Fault(f"only a part of a {what} is active")

    def spread(self, values: Array) -> Array:
        """Values of the active lanes as an array with a row for every lane."""
        if self.mask is None:
            return values
        out = np.zeros((self.lanes, *values.shape[1:]), values.dtype)
        out[self.mask] = values
        return out

    # Execution

    def run(self) -> None:
        """The lanes that stand lowest in the program go first, together, so that they meet again after a branch."""
        program = self.program.instructions
        position: int | None = 0  # of all lanes, while all stand at the same instruction
        place = np.zeros(self.lanes, np.int64)
        done, waiting = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        for _ in range(STEP_LIMIT):
            if position is None:
                runnable = ~(done | waiting)
                if not runnable.any():
                    if not waiting.any():
                        return
                    self.release(waiting, place)
                    waiting[:] = False
                    continue
                at = int(place[runnable].min())
                active = runnable & (place == at)
                if active.all():
                    position, active = at, None
            else:
                at, active = position, None
            if at >= len(program):
                raise Fault("execution runs past the end of the kernel")
            instruction = program[at]
            outcome = self.step(instruction, active)
            if outcome is None:
                if active is None:
                    position = at + 1
                else:
                    place[active] = at + 1
                continue
            if self.mask is None:  # the whole batch leaves this instruction together
                if outcome == "exit":
                    return
                if outcome == "barrier":
                    self.shared.barrier()
                    position = at + 1
                else:
                    position = self.program.labels[outcome]
                continue
            place[slice(None) if active is None else active] = at + 1
            position = None
            if outcome == "exit":
                done |= self.mask
            elif outcome == "barrier":
                waiting |= self.mask
            else:
                place[self.mask] = self.program.labels[outcome]
        raise Fault(f"still running after {STEP_LIMIT} instructions")

    def release(self, waiting: Array, place: Array) -> None:
        blocks = np.unique(self.block[waiting])
        for block in blocks:
            if len(np.unique(place[waiting & (self.block == block)])) > 1:
                raise Fault("threads of a block wait at different bar.sync")
        self.shared.barrier(blocks)

    def step(self, instruction: Instruction, active: Array | None) -> str | None:
        """Executes for the active lanes; returns a label, "exit" or "barrier" for those of :attr:`mask`."""
        self.mask, self.tainted = active, None
        try:
            if instruction.predicate is not None:
                condition = self.read(instruction.predicate, "pred")
                self.require_defined()
                self.tainted = None  # in threads that do not execute
                if instruction.negated:
                    condition = ~condition
                mask = condition if active is None else condition & active
                if not mask.any():
                    return None
                self.mask = None if mask.all() else mask
            warps = self.lanes // WARP if self.mask is None else int(self.mask.reshape(-1, WARP).any(1).sum())
            self.statistics.executed[instruction.opcode] += warps
            return implementation(instruction)(self, instruction)
        except Fault as fault:
            raise Fault(f"{fault}\n  at: {instruction.text}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Instructions: implementation and the modifiers that it honours or may ignore. Any other modifier is a Fault.

Implementation = Callable[[Machine, Instruction], str | None]
INSTRUCTIONS: dict[str, tuple[Implementation, frozenset[str]]] = {}
SCOPES = "relaxed acquire release acq_rel volatile weak cta gpu sys"
CACHES = (
    "ca cg cs lu cv wb wt nc L1::evict_last L1::evict_first L1::evict_normal L1::no_allocate "
    "L2::cache_hint L2::64B L2::128B L2::256B"
)


def instruction(*names: str, accepts: str = "") -> Callable[[Implementation], Implementation]:
    def register(function: Implementation) -> Implementation:
        for name in names:
            INSTRUCTIONS[name] = function, frozenset(accepts.split())
        return function

    return register


def implementation(instruction: Instruction) -> Implementation:
    if instruction.name not in INSTRUCTIONS:
        raise Fault(f"unknown instruction {instruction.opcode}")
    function, accepts = INSTRUCTIONS[instruction.name]
    for modifier in instruction.modifiers:
        if modifier not in accepts and not re.fullmatch(r"m\d+n\d+(k\d+)?", modifier):
            raise Fault(f"unknown modifier .{modifier} of {instruction.name}")
    return function


# Control


@instruction("bra", accepts="uni")
def branch(m: Machine, i: Instruction) -> str:
    label = i.operands[0]
    if not isinstance(label, str) or label not in m.program.labels:
        raise Fault(f"no label {label}")
    return label


@instruction("ret", "exit", accepts="uni")
def leave(m: Machine, i: Instruction) -> str:
    return "exit"


@instruction("bar.sync", "barrier.sync", "barrier.cta.sync", accepts="aligned")
def block_barrier(m: Machine, i: Instruction) -> str:
    if i.operands[0] != "0" or len(i.operands) > 1:
        raise Fault("only barrier 0 of the whole block is modelled")
    return "barrier"


# Orders memory accesses, which happen in program order here, or advises the hardware.
@instruction("bar.warp.sync", "membar", "fence", "griddepcontrol", "prefetch",
             accepts=f"{SCOPES} gl sc global wait launch_dependents L1 L2")  # fmt: skip
def nothing(m: Machine, i: Instruction) -> None:
    pass


@instruction("fence.proxy.async", accepts="global shared::cta")
def fence_proxy(m: Machine, i: Instruction) -> None:
    m.shared.fence(np.unique(m.block[m.active]))


@instruction("implicit_def")  # the compiler's comment: any value will do
def define(m: Machine, i: Instruction) -> None:
    m.write(i.operands[0], m.poison(str(i.operands[0])))


# Moves


@instruction("mov")
def move(m: Machine, i: Instruction) -> None:
    target, source = i.operands
    if isinstance(target, tuple):
        whole = m.read(source, i.type)
        bits = 8 * BYTES[i.type] // len(target)
        for n, part in enumerate(target):
            m.write(part, (whole >> whole.dtype.type(bits * n)).astype(UNSIGNED[bits // 8]))
    elif isinstance(source, tuple):
        bits = 8 * BYTES[i.type] // len(source)
        whole = np.zeros(m.lanes, UNSIGNED[BYTES[i.type]])
        for n, part in enumerate(source):
            whole |= m.read(part, f"b{bits}").astype(whole.dtype) << whole.dtype.type(bits * n)
        m.write(target, whole)
    else:
        known = m.registers.get(str(source)) is None or source not in m.written_since_fence
        m.write(target, m.read(source, i.type))
        if known:  # a copy that the assembler folds away, wherever the compiler left it
            m.written_since_fence.discard(str(target))


@instruction("cvta.to.global")
def to_global(m: Machine, i: Instruction) -> None:
    m.write(i.operands[0], m.read(i.operands[1], i.type))


@instruction("createpolicy", accepts="fractional L2::evict_last L2::evict_first L2::evict_normal L2::evict_unchanged")
def create_policy(m: Machine, i: Instruction) -> None:
    m.write(i.operands[0], np.zeros(m.lanes, np.uint64))


@instruction("selp")
def select(m: Machine, i: Instruction) -> None:
    target, yes, no, condition = i.operands
    m.write(target, np.where(m.read(condition, "pred"), m.read(yes, i.type), m.read(no, i.type)))


@instruction("prmt")
def permute_bytes(m: Machine, i: Instruction) -> None:
    a, b, selector = (m.read(operand, "b32") for operand in i.operands[1:])
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(m.lanes, np.uint32)
    for n in range(4):
        pick = selector >> np.uint32(4 * n) & np.uint32(15)
        byte = (pair >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
        result |= np.where(pick & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * n)
    m.write(i.operands[0], result)


@instruction("shfl.sync", accepts="idx up down bfly")
def shuffle(m: Machine, i: Instruction) -> None:
    m.whole(WARP, "warp")
    target, source, offset, clamp, _ = i.operands
    b, c = (m.read(operand, "b32").reshape(-1, WARP).astype(np.int64) for operand in (offset, clamp))
    m.require_defined()
    value = m.read(source, "b32").reshape(-1, WARP)
    lane, segment = np.arange(WARP), c >> 8 & 31
    lowest, highest = lane & segment, (lane & segment) | (c & 31 & ~segment)
    mode = i.modifiers[0]
    other = {"idx": lowest | (b & 31 & ~segment), "up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
    valid = other >= highest if mode == "up" else other <= highest
    other = np.where(valid, other, lane) & 31
    result = np.take_along_axis(value, other, 1)
    if m.tainted is not None:
        m.tainted = m.tainted[0], np.take_along_axis(m.tainted[1].reshape(-1, WARP), other, 1).reshape(-1)
    register, _, predicate = str(target).partition("|")
    m.write(register, result.reshape(-1))
    if predicate:
        m.write(predicate, valid.reshape(-1))


@instruction("redux.sync", accepts="add min max and or xor")
def reduce_warp(m: Machine, i: Instruction) -> None:
    m.whole(WARP, "warp")
    operation: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
    operation |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    values = m.numbers(i.operands[1], i.type).reshape(-1, WARP)
    m.require_defined()
    result = operation[i.modifiers[0]].reduce(values, axis=1, dtype=values.dtype)
    m.write(i.operands[0], encode(np.repeat(result, WARP), i.type))


# Comparison and logic

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip


@instruction("setp", accepts="eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz")
def compare(m: Machine, i: Instruction) -> None:
    target, *sources = i.operands
    a, b = (flush(m.numbers(operand, i.type), i) for operand in sources[:2])
    name, *combine = (modifier for modifier in i.modifiers if modifier != "ftz")
    unordered = np.isnan(a) | np.isnan(b) if i.type in FLOATS else np.zeros(m.lanes, bool)
    if name in ("num", "nan"):
        result = unordered if name == "nan" else ~unordered
    elif name in COMPARISONS:
        result = COMPARISONS[name](a, b) & ~unordered
    else:
        result = COMPARISONS[name[:-1]](a, b) | unordered
    operation = LOGIC[combine[0]] if combine else None
    other = str(sources[2]) if len(sources) > 2 else ""
    accompanying = m.read(other.lstrip("!"), "pred") if other else None
    if accompanying is not None and other.startswith("!"):
        accompanying = ~accompanying
    for register, outcome in zip(str(target).split("|"), (result, ~result), strict=False):
        m.write(register, outcome if operation is None else operation(outcome, accompanying))


@instruction("and", "or", "xor", "not")
def bitwise(m: Machine, i: Instruction) -> None:
    m.write(i.operands[0], LOGIC[i.name](*(m.read(operand, i.type) for operand in i.operands[1:])))


@instruction("lop3")
def three_input_logic(m: Machine, i: Instruction) -> None:
    a, b, c = (m.read(operand, "b32") for operand in i.operands[1:4])
    table = int(str(i.operands[4]), 0)
    result = np.zeros(m.lanes, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    m.write(i.operands[0], result)


@instruction("shl", "shr")
def shift(m: Machine, i: Instruction) -> None:
    bits = 8 * BYTES[i.type]
    value = m.numbers(i.operands[1], i.type)
    amount = m.read(i.operands[2], "b32")
    last = np.minimum(amount, bits - 1).astype(value.dtype)
    result = value << last if i.name == "shl" else value >> last
    if i.name == "shl" or i.type[0] != "s":  # an arithmetic shift by too much leaves the sign
        result = np.where(amount >= bits, value.dtype.type(0), result)
    m.write(i.operands[0], encode(result, i.type))


@instruction("shf", accepts="l r wrap clamp")
def funnel_shift(m: Machine, i: Instruction) -> None:
    low, high, amount = (m.read(operand, "b32").astype(np.uint64) for operand in i.operands[1:])
    amount = amount & np.uint64(31) if "wrap" in i.modifiers else np.minimum(amount, np.uint64(32))
    pair = low | high << np.uint64(32)
    result = pair << amount >> np.uint64(32) if "l" in i.modifiers else pair >> amount
    m.write(i.operands[0], result.astype(np.uint32))


def low_bits(count: Array) -> Array:
    """uint64 with the lowest ``count`` bits set."""
    return np.where(count >= 64, np.uint64(2**64 - 1), (np.uint64(1) << (count % 64).astype(np.uint64)) - np.uint64(1))


@instruction("bfe")
def extract_bits(m: Machine, i: Instruction) -> None:
    bits = 8 * BYTES[i.type]
    position, length = (m.read(operand, "b32").astype(np.int64) & 255 for operand in i.operands[2:])
    end = np.minimum(position + length, bits)
    wide = np.int64 if i.type[0] == "s" else np.uint64
    value = m.numbers(i.operands[1], i.type).astype(wide)
    # to the top of 64 bits, then down again: the second shift fills with zeros or with the field's sign
    top = value << (64 - np.maximum(end, 1)).astype(wide)
    result = top >> np.minimum(64 - end + position, 63).astype(wide)
    if wide is np.uint64:
        result = np.where(position >= bits, np.uint64(0), result)
    m.write(i.operands[0], encode(np.where(length == 0, wide(0), result), i.type))


@instruction("bfi")
def insert_bits(m: Machine, i: Instruction) -> None:
    a, b = (m.read(operand, i.type).astype(np.uint64) for operand in i.operands[1:3])
    position, length = (m.read(operand, "b32").astype(np.int64) & 255 for operand in i.operands[3:])
    field_ = np.where(position >= 64, np.uint64(0), low_bits(length) << (position % 64).astype(np.uint64))
    m.write(i.operands[0], encode((b & ~field_) | (a << (position % 64).astype(np.uint64) & field_), i.type))


@instruction("popc", "clz", "brev")
def count_bits(m: Machine, i: Instruction) -> None:
    raw = m.read(i.operands[1], i.type)
    big_endian = raw.dtype.newbyteorder(">")
    digits = np.unpackbits(raw.astype(big_endian).view(np.uint8)).reshape(m.lanes, -1)
    if i.name == "brev":
        m.write(i.operands[0], np.packbits(digits[:, ::-1]).view(big_endian).astype(raw.dtype))
        return
    leading = np.where(digits.any(1), digits.argmax(1), digits.shape[1])
    m.write(i.operands[0], (digits.sum(1) if i.name == "popc" else leading).astype(np.uint32))


# Arithmetic


def flush(values: Array, i: Instruction) -> Array:
    """With ``.ftz`` subnormal float32 are zeros."""
    if "ftz" in i.modifiers and values.dtype == np.float32:
        return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)
    return values


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
    "mul.lo": np.multiply,
}  # fmt: skip
FLOAT_ARITHMETIC: dict[str, Callable[..., Array]] = {
    **ARITHMETIC, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "fma": fused_multiply_add, "div": np.divide,
    "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@instruction("add", "sub", "mul", "mul.lo", "fma", "div", "min", "max", "neg", "abs", "rcp", "sqrt", "rsqrt", "ex2",
             "lg2", "sin", "cos", "tanh", accepts="rn ftz approx full NaN")  # fmt: skip
def arithmetic(m: Machine, i: Instruction) -> None:
    """Approximations (``.approx``, ``.full``) are computed exactly and rounded."""
    values = [flush(m.numbers(operand, i.type), i) for operand in i.operands[1:]]
    if i.type == "f64" and i.name == "fma":
        raise Fault("fma of float64 is not modelled")
    if i.type in FLOATS:
        operation = ARITHMETIC[i.name] if "NaN" in i.modifiers else FLOAT_ARITHMETIC[i.name]
        if i.name in ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt"):
            values = [v.astype(np.float64) for v in values]
        raw = encode(operation(*values), i.type)
        m.write(i.operands[0], encode(flush(decode(raw, i.type), i), i.type) if "ftz" in i.modifiers else raw)
    elif i.name == "div":
        m.write(i.operands[0], encode(quotient(m, *values)[0], i.type))
    elif i.name in ARITHMETIC:
        m.write(i.operands[0], encode(ARITHMETIC[i.name](*values), i.type))
    else:
        raise Fault(f"{i.name} of integers is not modelled")


def quotient(m: Machine, a: Array, b: Array) -> tuple[Array, Array]:
    """Integer quotient rounded towards zero, and remainder with the sign of ``a``."""
    if (b[m.active] == 0).any():
        raise Fault("division by zero")
    divisor = np.where(b == 0, b.dtype.type(1), b)
    remainder = np.fmod(a, divisor)
    return (a - remainder) // divisor, remainder


@instruction("rem")
def remainder(m: Machine, i: Instruction) -> None:
    a, b = (m.numbers(operand, i.type) for operand in i.operands[1:])
    m.write(i.operands[0], encode(quotient(m, a, b)[1], i.type))


@instruction("mad.lo")
def multiply_add(m: Machine, i: Instruction) -> None:
    a, b, c = (m.numbers(operand, i.type) for operand in i.operands[1:])
    m.write(i.operands[0], encode(a * b + c, i.type))


@instruction("mul.wide", "mad.wide")
def multiply_wide(m: Machine, i: Instruction) -> None:
    size = 2 * BYTES[i.type]
    dtype = SIGNED[size] if i.type[0] == "s" else UNSIGNED[size]
    a, b = (m.numbers(operand, i.type).astype(dtype) for operand in i.operands[1:3])
    wide = f"{i.type[0]}{8 * size}"
    result = a * b
    if i.name == "mad.wide":
        result = result + m.numbers(i.operands[3], wide)
    m.write(i.operands[0], encode(result, wide))


@instruction("mul.hi", "mad.hi")
def multiply_high(m: Machine, i: Instruction) -> None:
    bits = 8 * BYTES[i.type]
    a, b = (m.numbers(operand, i.type).astype(object) for operand in i.operands[1:3])
    high = np.array([x & ((1 << bits) - 1) for x in (a * b) >> bits], UNSIGNED[bits // 8])
    m.write(i.operands[0], high + m.read(i.operands[3], i.type) if i.name == "mad.hi" else high)


@instruction("dp4a")
def dot_of_four(m: Machine, i: Instruction) -> None:
    total = m.read(i.operands[3], "b32").astype(np.int64)
    raw = [m.read(operand, "b32").view(np.uint8).reshape(-1, 4) for operand in i.operands[1:3]]
    a, b = (decode(bytes_, type_[0] + "8").astype(np.int64) for bytes_, type_ in zip(raw, i.types, strict=True))
    m.write(i.operands[0], (total + (a * b).sum(1)).astype(np.uint32))


@instruction("cvt", accepts="rn rz rni rzi rmi rpi ftz sat rna satfinite")
def convert(m: Machine, i: Instruction) -> None:
    """``cvt.rn.f16x2.f32 d, a, b`` puts a into the upper half."""
    target, *sources = i.operands
    to, of = i.types
    if "satfinite" in i.modifiers:
        raise Fault("unknown modifier .satfinite of cvt")
    rounding = "rz" if "rz" in i.modifiers else "rn"
    values = [flush(m.numbers(source, of), i) for source in sources]
    if to in ("f16x2", "bf16x2"):
        high, low = (encode(v, to[:-2], rounding).astype(np.uint32) for v in values)
        m.write(target, high << np.uint32(16) | low)
        return
    (value,) = values
    if to == "tf32":  # to nearest, ties away from zero
        m.write(target, value.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000))
        return
    if to not in FLOATS:
        holder: Any = SIGNED[BYTES[to]] if to[0] == "s" else UNSIGNED[BYTES[to]]
        limits = np.iinfo(holder)
        if of in FLOATS:
            value = to_integer(value, i, limits)
        elif "sat" in i.modifiers:
            value = np.clip(value.astype(object), limits.min, limits.max)
        m.write(target, encode(value, to), signed=to[0] == "s")
        return
    if of in FLOATS and {"rni", "rzi", "rmi", "rpi"} & set(i.modifiers):
        value = to_integral(value, i)
    elif of not in FLOATS and to != "f32":
        value = value.astype(np.float64)  # numpy would round twice on the way to float16
    if "sat" in i.modifiers:
        value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
    m.write(target, encode(value, to, rounding))


def to_integral(value: Array, i: Instruction) -> Array:
    modes = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    (mode,) = (modes[modifier] for modifier in i.modifiers if modifier in modes)
    return mode(value)


def to_integer(value: Array, i: Instruction, limits: Any) -> Array:
    """Rounded and saturated; NaN becomes 0."""
    whole = to_integral(value.astype(np.float64), i)
    inside = (whole >= float(limits.min)) & (whole < float(limits.max) + 1)
    result = np.where(inside, whole, 0).astype(limits.dtype)
    result = np.where(whole >= float(limits.max) + 1, limits.dtype.type(limits.max), result)
    return np.where(whole < float(limits.min), limits.dtype.type(limits.min), result)


# Memory


def listed(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (str(operand),)


@instruction("ld", accepts=f"param global shared shared::cta v2 v4 {SCOPES} {CACHES}")
def load(m: Machine, i: Instruction) -> None:
    targets, address = listed(i.operands[0]), i.operands[1]
    size = BYTES[i.type]
    if "param" in i.modifiers:
        assert isinstance(address, Address), address
        if address.base not in m.parameters or address.offset:
            raise Fault(f"unknown parameter {address}")
        value = m.parameters[address.base] & ((1 << 8 * size) - 1)
        m.write(targets[0], np.full(m.lanes, value, UNSIGNED[size]), signed=i.type[0] == "s")
        return
    lanes = m.active
    data = m.space(i).load(lanes, m.address(address)[lanes], size * len(targets))
    words = m.spread(np.ascontiguousarray(data).view(UNSIGNED[size]))
    for n, target in enumerate(targets):
        m.write(target, np.ascontiguousarray(words[:, n]), signed=i.type[0] == "s")


@instruction("st", accepts=f"global shared shared::cta v2 v4 {SCOPES} {CACHES}")
def store(m: Machine, i: Instruction) -> None:
    lanes = m.active
    words = np.stack([m.read(source, i.type)[lanes] for source in listed(i.operands[1])], axis=1)
    m.require_defined()
    m.space(i).store(lanes, m.address(i.operands[0])[lanes], words.view(np.uint8))


@instruction("atom", "red", accepts=f"global add min max exch and or xor cas noftz {SCOPES} {CACHES}")
def atomic(m: Machine, i: Instruction) -> None:
    """In global memory, lane after lane."""
    operands = list(i.operands)
    target = operands.pop(0) if i.name == "atom" else "_"
    address, *sources = operands
    known: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda old, new: new}
    known |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "cas": None}
    (name,) = (modifier for modifier in i.modifiers if modifier in known)
    old = np.zeros(m.lanes, UNSIGNED[BYTES[i.type]])
    addresses, raw = m.address(address), [m.read(source, i.type) for source in sources]
    m.require_defined()
    for lane in m.active:
        one = np.array([lane])
        data = m.global_memory.load(one, addresses[one], BYTES[i.type])
        word = data.view(old.dtype).reshape(-1)
        old[one] = word
        if name == "cas":
            new = raw[1][one] if word == raw[0][one] else word
        else:
            new = encode(known[name](decode(word, i.type), decode(raw[0][one], i.type)), i.type)
        m.global_memory.store(one, addresses[one], new.view(np.uint8).reshape(1, -1))
    m.write(target, old)


@instruction("cp.async", accepts=f"shared shared::cta global {CACHES}")
def copy_async(m: Machine, i: Instruction) -> None:
    """Reads now, writes when waited for: the latest moment at which the hardware may do it."""
    target, source, size_text, *rest = i.operands
    size = int(str(size_text), 0)
    if "L2::cache_hint" in i.modifiers:
        rest = rest[:-1]
    lanes = m.active
    wanted = m.read(rest[0], "b32")[lanes] if rest else np.full(len(lanes), size, np.uint32)
    m.require_defined()
    if not np.isin(wanted, (0, size)).all():
        raise Fault(f"cp.async of a part of its {size} bytes is not modelled")
    data = np.zeros((m.lanes, size), np.uint8)  # what is not wanted is filled with zeros
    filled = lanes[wanted == size]
    if len(filled):
        data[filled] = m.global_memory.load(filled, m.address(source)[filled], size)
    addresses = m.address(target)
    m.shared.begin_copy(lanes, addresses[lanes], size)
    m.copies.issue((addresses, data), m.active_mask)


@instruction("cp.async.commit_group")
def commit_copies(m: Machine, i: Instruction) -> None:
    m.copies.commit(m.active_mask)


@instruction("cp.async.wait_group", "cp.async.wait_all")
def wait_for_copies(m: Machine, i: Instruction) -> None:
    allowed = int(str(i.operands[0]), 0) if i.operands else None
    for (addresses, data), mask in m.copies.wait(m.active_mask, allowed):
        lanes = np.nonzero(mask)[0]
        m.shared.end_copy(lanes, addresses[lanes], data[lanes])


# Matrices. A warp's 8x8 matrix of 16-bit elements: lane l holds elements 2(l mod 4) and the next of row l div 4.


@instruction("ldmatrix.sync.aligned.m8n8", accepts="x1 x2 x4 trans shared shared::cta")
def load_matrices(m: Machine, i: Instruction) -> None:
    m.whole(WARP, "warp")
    targets = listed(i.operands[0])
    lanes = m.active[m.active % WARP < 8 * len(targets)]  # lane 8i + r has the address of row r of matrix i
    rows = np.zeros((m.lanes, 8), np.uint16)
    rows[lanes] = m.shared.load(lanes, m.address(i.operands[1])[lanes], 16).view(np.uint16)
    matrices = rows.reshape(-1, 4, 8, 8)
    if "trans" in i.modifiers:
        matrices = matrices.swapaxes(2, 3)
    for n, target in enumerate(targets):
        m.write(target, np.ascontiguousarray(matrices[:, n]).view(np.uint32).reshape(-1))


@instruction("stmatrix.sync.aligned.m8n8", accepts="x1 x2 x4 trans shared shared::cta")
def store_matrices(m: Machine, i: Instruction) -> None:
    m.whole(WARP, "warp")
    sources = listed(i.operands[1])
    matrices = np.zeros((m.lanes // WARP, 4, 8, 8), np.uint16)
    for n, source in enumerate(sources):
        matrices[:, n] = np.ascontiguousarray(m.read(source, "b32")).view(np.uint16).reshape(-1, 8, 8)
    m.require_defined()
    if "trans" in i.modifiers:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    lanes = m.active[m.active % WARP < 8 * len(sources)]
    rows = matrices.reshape(m.lanes, 8)[lanes]
    m.shared.store(lanes, m.address(i.operands[0])[lanes], rows.view(np.uint8))


def elements(m: Machine, registers: tuple[str, ...], type_: str, lanes: int) -> Array:
    """(groups of ``lanes``, lane, register, element of the register) of operand registers, as float64."""
    raw = np.stack([m.read(register, "b32") for register in registers], axis=1)
    m.require_defined()
    values = decode(raw.reshape(-1).view(UNSIGNED[BYTES[type_]]), type_)
    return values.astype(np.float64).reshape(-1, lanes, len(registers), 4 // BYTES[type_])


def fragment_rows(registers: int) -> tuple[Array, Array]:
    """Row and column, in units of one register, of each (lane, register) of a 16-row operand A."""
    lane, register = np.arange(WARP)[:, None], np.arange(registers)[None, :]
    return lane // 4 + 8 * (register % 2), lane % 4 + 4 * (register // 2)


def matrix_a(m: Machine, registers: tuple[str, ...], type_: str) -> Array:
    """(warps, 16, k) from the registers of operand A."""
    values = elements(m, registers, type_, WARP)
    per_register = values.shape[-1]
    rows, columns = fragment_rows(len(registers))
    out = np.zeros((len(values), 16, 2 * len(registers), per_register))
    out[:, rows, columns] = values
    return out.reshape(len(values), 16, -1)


def matrix_b(m: Machine, registers: tuple[str, ...], type_: str) -> Array:
    """(warps, k, 8) from the registers of operand B."""
    values = elements(m, registers, type_, WARP)
    lane, register = np.arange(WARP)[:, None], np.arange(len(registers))[None, :]
    out = np.zeros((len(values), 8, 4 * len(registers), values.shape[-1]))
    out[:, lane // 4, lane % 4 + 4 * register] = values
    return out.reshape(len(values), 8, -1).swapaxes(1, 2)


def accumulate(product: Array, before: Array, type_: str, saturate: bool) -> Array:
    """The sum as raw 32-bit words: float32 rounded once, int32 modulo 2**32 or saturated."""
    total = product + before
    if type_ == "f32":
        return encode(total, type_)
    if saturate:
        total = np.clip(total, -(2.0**31), 2.0**31 - 1)
    return encode(total.astype(np.int64), type_)


OPERAND_TYPES = {"f16": "f32", "bf16": "f32", "tf32": "f32", "s8": "s32", "u8": "s32"}  # and their accumulator


@instruction("mma.sync.aligned", accepts="row col satfinite")
def multiply_matrices(m: Machine, i: Instruction) -> None:
    m.whole(WARP, "warp")
    of_d, of_a, of_b, of_c = i.types
    if i.modifiers[1:3] != ("row", "col") or (OPERAND_TYPES.get(of_a), of_d) != (of_d, of_c):
        raise Fault("an unknown kind of mma")
    d, a, b, c = (listed(operand) for operand in i.operands)
    left, right = matrix_a(m, a, of_a), matrix_b(m, b, of_b)
    if i.modifiers[0] != f"m16n8k{left.shape[2]}" or left.shape[2] != right.shape[1] or len(c) != len(d) != 4:
        raise Fault("an unknown shape of mma")
    lane, register = np.arange(WARP)[:, None], np.arange(4)[None, :]
    rows, columns = lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2
    before = elements(m, c, of_c, WARP)[..., 0]
    result = accumulate((left @ right)[:, rows, columns], before, of_d, "satfinite" in i.modifiers).reshape(-1, 4)
    for n, target in enumerate(d):
        m.write(target, np.ascontiguousarray(result[:, n]))


def described_matrix(m: Machine, operand: str, rows: int, type_: str, transposed: bool) -> tuple[Array, Array]:
    """(warpgroups, rows, k) of the matrix that a shared-memory descriptor describes, and its bytes' indices.

    A descriptor holds the start, the leading and the stride offset in units of 16 bytes, and the swizzle: rows of 128,
    64 or 32 bytes whose 16-byte pieces are exchanged by XOR with the row number. Eight rows make a pattern. Rows run
    along k; of a transposed matrix along the other side.
    """
    groups = m.active.reshape(-1, WARPGROUP)
    words = m.read(operand, "b64")[groups]
    m.require_defined()
    if (words != words[:, :1]).any():
        raise Fault(f"the descriptor {operand} differs between the threads of a warpgroup")
    word = words[:, 0]
    start, leading, stride = ((word >> np.uint64(n) & np.uint64(0x3FFF)).astype(np.int64) * 16 for n in (0, 16, 32))
    swizzles = set((word >> np.uint64(62)).tolist())
    if len(swizzles) != 1 or swizzles == {0} or (word >> np.uint64(49) & np.uint64(7)).any():
        raise Fault("a descriptor without swizzle, or with a base offset, is not modelled")
    width = {1: 128, 2: 64, 3: 32}[swizzles.pop()]
    size = BYTES[type_]
    row, column = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
    if transposed and size != 2:
        raise Fault("only 16-bit matrices can be transposed")
    if transposed:
        per_row = width // size
        address = start + row // per_row * leading + column // 8 * stride + column % 8 * width + row % per_row * size
    else:
        address = start + row // 8 * stride + row % 8 * width + column * size
    address = address ^ ((address >> 7 & width // 16 - 1) << 4)
    raw, touched = m.shared.read_matrix(groups[:, 0], address, size)
    return decode(raw.reshape(-1), type_).astype(np.float64).reshape(raw.shape), touched


@instruction("wgmma.fence.sync.aligned")
def fence_products(m: Machine, i: Instruction) -> None:
    m.written_since_fence.clear()


@instruction("wgmma.mma_async.sync.aligned", accepts="satfinite")
def multiply_matrices_async(m: Machine, i: Instruction) -> None:
    """A (64 x k, registers or shared) times B (k x n, shared), added to D; D belongs to it until waited for."""
    m.whole(WARPGROUP, "warpgroup")
    of_d, of_a, of_b = i.types
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.modifiers[0])
    if shape is None or OPERAND_TYPES.get(of_a) != of_d:
        raise Fault("an unknown kind of wgmma")
    d, (a, b, keep, *flags) = listed(i.operands[0]), i.operands[1:]
    numbers = [int(str(flag)) for flag in flags] or [1, 1]
    sign_a, sign_b, *transpositions = numbers
    transpose_a = bool(transpositions[0]) if len(transpositions) == 2 else False
    transpose_b = bool(transpositions[-1]) if transpositions else False
    if not m.written_since_fence.isdisjoint((*d, *(a if isinstance(a, tuple) else ()))):
        raise Fault("registers of a wgmma are written since the last wgmma.fence")
    touched: list[Array] = []
    if isinstance(a, tuple):
        warps = matrix_a(m, a, of_a)
        left = warps.reshape(-1, 64, warps.shape[2])[m.active[::WARPGROUP] // WARPGROUP]
    else:
        left, bytes_a = described_matrix(m, str(a), 64, of_a, transpose_a)
        touched.append(bytes_a)
    right, bytes_b = described_matrix(m, str(b), int(shape[1]), of_b, transpose_b)
    touched.append(bytes_b)
    if left.shape[2] != int(shape[2]) or len(d) != int(shape[1]) // 2:
        raise Fault("an unknown shape of wgmma")
    product = sign_a * sign_b * (left @ right.swapaxes(1, 2))
    lane, register = np.arange(WARPGROUP)[:, None], np.arange(len(d))[None, :]
    rows = lane // WARP * 16 + lane % WARP // 4 + register // 2 % 2 * 8
    columns = register // 4 * 8 + lane % 4 * 2 + register % 2
    lanes = m.active
    mine = product[:, rows, columns].reshape(len(lanes), len(d))
    adds = m.read(keep, "pred")[lanes]
    for n, target in enumerate(d):
        before = np.zeros(len(lanes))
        if adds.any():
            m.refuse_lanes(m.undefined, target, "is read before it is written")
            if target not in m.registers:
                raise Fault(f"register {target} is read before it is written")
            before = np.where(adds, decode(m.registers[target][lanes], of_d).astype(np.float64), 0)
        old = m.registers.get(target, m.poison(target)).copy()
        old[lanes] = accumulate(mine[:, n], before, of_d, "satfinite" in i.modifiers)
        m.registers[target] = old
    m.products.issue((d, a if isinstance(a, tuple) else (), touched), m.active_mask)
    reserve(m)


def reserve(m: Machine) -> None:
    """What the products in flight work on belongs to them."""
    m.unreadable, m.unwritable, m.shared.held = {}, {}, []
    for group in m.products.groups:
        accumulators, operands, touched = group.item
        m.shared.held += touched
        for registers, reserved in ((accumulators, m.unreadable), ((*accumulators, *operands), m.unwritable)):
            for register in registers:
                reserved[register] = reserved.get(register, False) | group.lanes


@instruction("wgmma.commit_group.sync.aligned")
def commit_products(m: Machine, i: Instruction) -> None:
    m.products.commit(m.active_mask)


@instruction("wgmma.wait_group.sync.aligned")
def wait_for_products(m: Machine, i: Instruction) -> None:
    m.products.wait(m.active_mask, int(str(i.operands[0]), 0))
    reserve(m)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def execute(
    ptx: str,
    kernel: str,
    grid: Sequence[int],
    threads: int | Sequence[int],
    arguments: Sequence[Any],
    shared_bytes: int = 0,
) -> Statistics:
    """Runs ``kernel`` on ``grid`` blocks.

    Args:
        threads: per block; a multiple of 32.
        arguments: one per parameter: an array or tensor in the CPU's memory (a pointer to it, written in place), an
            integer, or a float, which is passed with the parameter's width.
        shared_bytes: dynamic shared memory per block.

    Raises:
        Fault: see the module.
    """
    program = parse(ptx, kernel)
    if len(arguments) != len(program.parameters):
        raise Fault(f"{kernel} has {len(program.parameters)} parameters: got {len(arguments)} arguments")
    if program.shared_bytes + shared_bytes > SHARED_LIMIT:
        raise Fault(f"shared_bytes must be at most {SHARED_LIMIT}: got {program.shared_bytes + shared_bytes}")
    memory = GlobalMemory()
    parameters = {
        name: argument_bits(argument, size, memory)
        for (name, size), argument in zip(program.parameters, arguments, strict=True)
    }
    along = (*((threads,) if isinstance(threads, int) else threads), 1, 1)[:3]
    blocks, per_block = (*grid, 1, 1)[:3], math.prod(along)
    if per_block % WARP:
        raise Fault(f"threads must be a multiple of {WARP}: got {per_block}")
    statistics = Statistics()
    batch = max(1, BATCH_LANES // per_block)
    with np.errstate(all="ignore"):
        for first in range(0, math.prod(blocks), batch):
            numbers = np.arange(first, min(first + batch, math.prod(blocks)))
            machine = Machine(program, parameters, memory, blocks, along, numbers, shared_bytes, statistics)
            machine.run()
            statistics.conflicts += machine.shared.conflicts
    return statistics


def argument_bits(argument: Any, size: int, memory: GlobalMemory) -> int:
    if hasattr(argument, "data_ptr"):  # a tensor: all bytes from its first to its last element
        extent = sum((n - 1) * stride for n, stride in zip(argument.shape, argument.stride(), strict=True)) + 1
        return memory.add(argument.data_ptr(), extent * argument.element_size() if argument.numel() else 0)
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise Fault("an array must be contiguous")
        return memory.add(argument.ctypes.data, argument.nbytes)
    if isinstance(argument, (float, np.floating)):
        return int(np.array(argument, {2: np.float16, 4: np.float32, 8: np.float64}[size]).view(UNSIGNED[size]))
    return int(argument) & ((1 << 8 * size) - 1)


@dataclass(frozen=True)
class Compiled:
    """What running a launch needs of what Triton compiled for it; can be sent to another process.

    Args:
        parameters: the arguments of the launch that the compiled kernel takes, in order. What it is specialised on
            (constants, ``None``, the value 1) is not among them.
    """

    ptx: str
    name: str
    threads: int
    shared_bytes: int
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, kernel: Any) -> Compiled:
        """Of a ``triton.compiler.CompiledKernel``."""
        return cls(
            ptx=kernel.asm["ptx"],
            name=kernel.metadata.name,
            threads=WARP * kernel.metadata.num_warps,
            shared_bytes=kernel.metadata.shared,
            parameters=tuple(name for name, type_ in kernel.src.signature.items() if type_ != "constexpr"),
        )


def run_launch(compiled: Any, launch: Any) -> Statistics:
    """Runs a compiled launch on the launch's own CPU tensors, in place.

    ``compiled``: a ``triton.compiler.CompiledKernel``, or :class:`Compiled`. Scratch pointers that Triton appends to
    the parameters are null.
    """
    code = compiled if isinstance(compiled, Compiled) else Compiled.of(compiled)
    arguments = [launch.arguments[name] for name in code.parameters]
    scratch = len(parse(code.ptx, code.name).parameters) - len(arguments)
    return execute(code.ptx, code.name, launch.grid, code.threads, arguments + [0] * scratch, code.shared_bytes)
