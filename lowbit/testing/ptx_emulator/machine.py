"""The machine: registers, operands, and the order in which threads run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.testing.ptx_emulator.memory import WARP, AsyncGroups, GlobalMemory, SharedMemory
from lowbit.testing.ptx_emulator.program import Address, Instruction, Operand, Program, implementation
from lowbit.testing.ptx_emulator.values import BYTES, FLOATS, SIGNED, Array, Fault, decode, encode, raw_dtype

STEP_LIMIT = 5_000_000


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


def parameter_address(number: int) -> int:
    """Where a kernel's parameter lies, for instructions that take its address."""
    return 0x5EED_0000_0000 + 4096 * number


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
        # lanes that wrote a register since their last wgmma.fence; None: nobody asks
        self.written_since_fence: dict[str, Array] | None = None
        if any(instruction.name.startswith("wgmma") for instruction in program.instructions):
            self.written_since_fence = {}
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
        if operand in self.parameters:
            return parameter_address(list(self.parameters).index(operand))
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
        if self.written_since_fence is not None:
            if register not in self.written_since_fence:
                self.written_since_fence[register] = np.zeros(self.lanes, bool)
            self.written_since_fence[register] |= self.active_mask
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

    def written_lately(self, register: str) -> bool:
        """Whether an active thread wrote the register since its last ``wgmma.fence``."""
        lanes = (self.written_since_fence or {}).get(register)
        return lanes is not None and bool((lanes & self.active_mask).any())

    def forget_writes(self, register: str | None = None) -> None:
        """The active threads have written no register (None), or not this one, since their last ``wgmma.fence``."""
        writes = self.written_since_fence or {}
        for name in writes if register is None else {register} & writes.keys():
            writes[name] &= ~self.active_mask

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
        shared = [modifier for modifier in instruction.modifiers if modifier.startswith("shared")]
        self.shared.whole_cluster = shared == ["shared::cluster"]
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

    def fence(self) -> None:
        """What the active threads stored becomes visible to what reads asynchronously."""
        self.shared.fence(self.active)

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
