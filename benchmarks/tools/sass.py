"""Follows one thread through NVIDIA machine code, to count what a kernel issues: loops, branches and all.

:func:`trace` executes integers and predicates, as ``nvdisasm`` prints them for sm_90. What is loaded, and what is
computed from it, is unknown here: kernels whose path does not depend on data never ask for it. A branch that does is an
error, and so is an instruction that is not known here. Whether the path is right shows in what it counts: the matrix
products and the bytes of weights of a whole call follow from its shape (``tests/cuda/test_static.py``).

References: NVIDIA, "CUDA Binary Utilities" (names of instructions); semantics from the PTX ISA, where they are those of
the instructions that ptxas makes of them.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WORD = 0xFFFFFFFF
STEPS = 2_000_000
Value = int | None  # None: depends on data


class Unknown(Exception):
    """The code asks for something that this program does not know."""


@dataclass(frozen=True)
class Instruction:
    """``@guard op operands``; of a jump, ``target`` is the number of the instruction that it leads to."""

    op: str
    operands: tuple[str, ...]
    guard: str = ""
    target: int = -1

    def __str__(self) -> str:
        return f"{self.guard} {self.op} {', '.join(self.operands)}".strip()


def functions(text: str) -> dict[str, list[Instruction]]:
    """By name, what ``nvdisasm -c`` prints of each function."""
    found = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name = part[: part.index(":")]
        found[name] = parse(part)
    return found


def parse(text: str) -> list[Instruction]:
    at: dict[str, int] = {}
    lines: list[tuple[str, str, tuple[str, ...], str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*([.$][\w.$]+):\s*$", line):
            at[label[1]] = len(lines)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;", line):
            operands = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", code[3]) if part.strip())
            target = re.search(r"`\(([.$][\w.$]+)\)", code[3])
            lines.append((code[2], code[1] or "", operands, target[1] if target else ""))
    return [Instruction(op, operands, guard, at.get(target, -1)) for op, guard, operands, target in lines]


@dataclass
class Trace:
    """How often each instruction was issued, and how often its guard let it do something."""

    code: Sequence[Instruction]
    issued: Counter[int] = field(default_factory=Counter)
    active: Counter[int] = field(default_factory=Counter)

    def ops(self) -> Counter[str]:
        """What was done, by name of the instruction."""
        found: Counter[str] = Counter()
        for number, times in self.active.items():
            found[self.code[number].op] += times
        return found

    @property
    def slots(self) -> int:
        return self.issued.total()


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def float_of(value: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", value & WORD))[0])


def bits_of(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip
# What never changes an integer or a predicate that a path depends on. Its results are unknown.
DATA = re.compile(
    r"LDG|LDS|LDSM|LDL|ATOM|HMMA|IMMA|HGMMA|FFMA|FADD|FMUL|FSEL|FMNMX|HADD2|HFMA2|HMUL2|HMNMX2|HSET2|F2FP|F2F|FRND|FCHK|"
    r"FSWZADD|SHFL|I2FP|I2IP|IDP|TMML|MATCH"
)
NOTHING = re.compile(
    r"NOP|BSSY|BSYNC|WARPSYNC|BAR|DEPBAR|LDGDEPBAR|LDGSTS|STS|STG|STSM|MEMBAR|ERRBAR|CCTL|FENCE|ARRIVES|WARPGROUP|SYNCS|"
    r"UTMA|UBLKCP|YIELD|PREEXIT|ACQBULK|USETMAXREG|R2B|BREAK|BMOV|UCGABAR|RED|NANOSLEEP|PMTRIG|ENDCOLLECTIVE|VIRTCOUNT"
)


class Thread:
    """One thread's registers and predicates, and the constants of its launch."""

    def __init__(self, constants: bytes, special: dict[str, int]) -> None:
        self.constants = constants
        self.special = special
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {"PT": True, "UPT": True}
        self.calls: list[int] = []
        self.loaded: Value = None  # what every load of 4 bytes finds

    # --- operands ---

    def constant(self, text: str, size: int) -> Value:
        match = re.match(r"c\[0x0\]\[(?:(?P<register>U?R\w+)\+)?(?P<offset>0x[0-9a-f]+|U?R\w+)\]", text)
        if match is None:
            return None
        parts = [match["register"] or "0x0", match["offset"]]
        offset = 0
        for part in parts:
            value = int(part, 16) if part.startswith("0x") else self.read(part)
            if value is None:
                return None
            offset += value
        return int.from_bytes(self.constants[offset : offset + size].ljust(size, b"\0"), "little")

    def read(self, text: str, size: int = 4) -> Value:
        """An operand as an unsigned integer of 4 or 8 bytes; of registers, a pair."""
        text = text.replace(".reuse", "")
        if text.startswith("-") and not text.startswith("-0x"):
            value = self.read(text[1:], size)
            return None if value is None else -value & ((1 << 8 * size) - 1)
        if text.startswith("~"):
            value = self.read(text[1:], size)
            return None if value is None else ~value & ((1 << 8 * size) - 1)
        if text.startswith("|"):
            value = self.read(text[1:-1])
            return None if value is None else abs(signed(value))
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return int(text, 16) & ((1 << 8 * size) - 1)
        if text in ("RZ", "URZ", "SRZ"):
            return 0
        if text.startswith("c["):
            return self.constant(text, size)
        match = re.fullmatch(r"(U?R)(\d+)(?:\.(?:64|U32|H0_H0|B0))?", text)
        if match is None:
            return None
        low = self.registers.get(match[1] + match[2])
        if size == 4:
            return low
        high = self.registers.get(f"{match[1]}{int(match[2]) + 1}")
        return None if low is None or high is None else high << 32 | low

    def write(self, text: str, value: Value, size: int = 4) -> None:
        match = re.fullmatch(r"(U?R)(\d+|Z)", text)
        if match is None:
            raise Unknown(f"no register: {text}")
        if match[2] == "Z":
            return
        for i in range(size // 4):
            self.registers[f"{match[1]}{int(match[2]) + i}"] = None if value is None else value >> 32 * i & WORD

    def truth(self, text: str) -> bool | None:
        if text.startswith("!"):
            value = self.truth(text[1:])
            return None if value is None else not value
        return self.predicates.get(text)

    def set_truth(self, text: str, value: bool | None) -> None:
        if text not in ("PT", "UPT"):
            self.predicates[text] = value


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def split(operands: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Predicates after the first operand, other operands, predicates at the end; the first operand is left out."""
    rest = list(operands[1:])
    first = []
    while rest and is_predicate(rest[0]):
        first.append(rest.pop(0))
    last: list[str] = []
    while rest and is_predicate(rest[-1]):
        last.insert(0, rest.pop())
    return first, rest, last


# --- instructions of integers ----------------------------------------------------------------------------------------


def add(t: Thread, i: Instruction) -> None:
    carries, parts, ins = split(i.operands)
    total: Value = 0
    extended = ".X" in i.op
    for text in parts:
        negative = text.startswith("-") and not text.startswith("-0x")
        value = t.read(text[1:] if negative else text)
        if value is None or total is None:
            total = None
            break
        total += (~value & WORD) + 1 if negative else value
    if extended and total is not None:
        for text in ins:
            carry = t.truth(text)
            total = None if carry is None else total + int(carry)
            if total is None:
                break
    t.write(i.operands[0], None if total is None else total & WORD)
    for number, text in enumerate(carries):
        t.set_truth(text, None if total is None else total >> 32 > number)


def multiply_add(t: Thread, i: Instruction) -> None:
    carries, (a, b, *rest), ins = split(i.operands)
    c = rest[0] if rest else "RZ"
    wide, high = ".WIDE" in i.op, ".HI" in i.op
    left, right, addend = t.read(a), t.read(b), t.read(c, 8 if wide or high else 4)
    total: Value = None
    if left == 0 and a in ("RZ", "URZ"):
        right = 0
    if left is not None and right is not None and addend is not None:
        if (wide or high) and ".U32" not in i.op:
            left, right = signed(left), signed(right)
        total = left * right + addend
        if ".X" in i.op:
            carry = t.truth(ins[0]) if ins else False
            total = None if carry is None else total + int(carry)
    if total is None:
        t.write(i.operands[0], None, 8 if wide else 4)
    elif high:
        t.write(i.operands[0], total >> 32 & WORD)
    else:
        t.write(i.operands[0], total & ((1 << 64) - 1), 8 if wide else 4)
    for text in carries:
        t.set_truth(text, None if total is None else bool(total >> (64 if wide else 32)))


def shift_add(t: Thread, i: Instruction) -> None:
    carries, parts, ins = split(i.operands)
    shift = int(parts[-1], 16)
    a, b = t.read(parts[0]), t.read(parts[1])
    if a is None or b is None:
        total: Value = None
    elif ".HI" in i.op:
        if ".SX32" in i.op:
            upper: Value = WORD if a >> 31 else 0
        else:
            upper = t.read(parts[2]) if len(parts) > 3 else 0
        total = None if upper is None else ((upper << 32 | a) << shift >> 32 & WORD) + b
    else:
        total = (a << shift & WORD) + b
    if ".X" in i.op and total is not None:
        carry = t.truth(ins[0])
        total = None if carry is None else total + int(carry)
    t.write(i.operands[0], None if total is None else total & WORD)
    for text in carries:
        t.set_truth(text, None if total is None else bool(total >> 32))


def shift(t: Thread, i: Instruction) -> None:
    a, by, c = (t.read(text) for text in i.operands[1:4])
    if by is None or (a is None and i.operands[1] not in ("RZ", "URZ")) or c is None:
        # a shift of zeros needs no other operand
        t.write(i.operands[0], None)
        return
    assert a is not None
    by &= 63
    if ".L" in i.op[3:6]:
        whole = (c << 32 | a) << by
    elif ".S32" in i.op or ".S64" in i.op:
        whole = ((signed(c) << 32) | a) >> by
    else:
        whole = (c << 32 | a) >> by
    t.write(i.operands[0], (whole >> 32 if ".HI" in i.op else whole) & WORD)


def looked_up(lut: int, a: int, b: int, c: int, mask: int) -> int:
    result = 0
    for i in range(8):
        if lut >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & mask


def logic(t: Thread, i: Instruction) -> None:
    operands = list(i.operands)
    predicate = operands.pop(0) if is_predicate(operands[0]) else ""
    into, *sources = operands[:4]
    lut = int(operands[4], 16)
    values = [t.read(text) for text in sources]
    for number in range(3):  # what the table does not look at need not be known
        half = 4 >> number
        if all((lut >> n & 1) == (lut >> (n ^ half) & 1) for n in range(8)):
            values[number] = 0
    if any(value is None for value in values):
        result: Value = None
        if lut == 0xC0 and 0 in values:
            result = 0
    else:
        result = looked_up(lut, *values, WORD)  # type: ignore[arg-type]
    t.write(into, result)
    if predicate:
        t.set_truth(predicate, None if result is None else result != 0)


def predicate_logic(t: Thread, i: Instruction) -> None:
    into, second, *rest = i.operands
    sources, luts = rest[:3], [int(text, 16) for text in rest[3:5]]
    values = [t.truth(text) for text in sources]
    for text, lut in zip((into, second), luts, strict=False):
        known = list(values)
        for number in range(3):
            half = 4 >> number
            if all((lut >> n & 1) == (lut >> (n ^ half) & 1) for n in range(8)):
                known[number] = False
        unknown = any(value is None for value in known)
        t.set_truth(text, None if unknown else bool(looked_up(lut, *map(int, known), 1)))  # type: ignore[arg-type]


def compare(t: Thread, i: Instruction) -> None:
    _, relation, *mods = i.op.split(".")
    into, second, left, right, combined, *lower = i.operands
    a, b, other = t.read(left), t.read(right), t.truth(combined)
    result: bool | None = None
    if a is not None and b is not None:
        if "U32" not in mods:
            a, b = signed(a), signed(b)
        result = COMPARE[relation](a, b)
        if "EX" in mods:
            below = t.truth(lower[0])
            if a == b:
                result = below
            elif relation in ("EQ", "NE"):
                result = relation == "NE"
    for text, value in ((into, result), (second, None if result is None else not result)):
        if "AND" in mods:
            found = False if value is False or other is False else None if value is None or other is None else True
        elif "OR" in mods:
            found = True if value or other else None if value is None or other is None else False
        else:
            found = None if value is None or other is None else value != other
        t.set_truth(text, found)


def select(t: Thread, i: Instruction) -> None:
    into, a, b, predicate = i.operands
    chosen = t.truth(predicate)
    t.write(into, None if chosen is None else t.read(a if chosen else b))


def least(t: Thread, i: Instruction) -> None:
    *_, a, b, predicate = i.operands
    left, right, smaller = t.read(a), t.read(b), t.truth(predicate)
    if left is None or right is None or smaller is None:
        t.write(i.operands[0], None)
        return
    key = (lambda v: v) if ".U32" in i.op else signed
    t.write(i.operands[0], (min if smaller else max)(left, right, key=key))


def permute(t: Thread, i: Instruction) -> None:
    into, a, selector, b = i.operands
    left, chosen, right = t.read(a), t.read(selector), t.read(b)
    if left is None or right is None or chosen is None:
        t.write(into, None)
        return
    both, result = right << 32 | left, 0
    for n in range(4):
        nibble = chosen >> 4 * n & 15
        byte = both >> 8 * (nibble & 7) & 255
        result |= (255 if byte >> 7 else 0) << 8 * n if nibble & 8 else byte << 8 * n
    t.write(into, result)


def load_constant(t: Thread, i: Instruction) -> None:
    size = 8 if ".64" in i.op else 2 if "16" in i.op else 1 if "8" in i.op.split(".", 1)[-1] else 4
    t.write(i.operands[0], t.constant(i.operands[1], size), 8 if size == 8 else 4)


def special(t: Thread, i: Instruction) -> None:
    into, name = i.operands
    size = 8 if i.op == "CS2R" else 4
    t.write(into, 0 if name == "SRZ" else t.special.get(name), size)


def move(t: Thread, i: Instruction) -> None:
    _, parts, _ = split(i.operands)
    t.write(i.operands[0], t.read(parts[0]))


def absolute(t: Thread, i: Instruction) -> None:
    value = t.read(i.operands[1])
    t.write(i.operands[0], None if value is None else abs(signed(value)))


def to_float(t: Thread, i: Instruction) -> None:
    value = t.read(i.operands[1])
    if value is None:
        t.write(i.operands[0], None)
        return
    whole = float(signed(value)) if ".S32" in i.op else float(value)
    bits = bits_of(whole)
    if ".RP" in i.op and float_of(bits) < whole:
        bits += 1
    t.write(i.operands[0], bits)


def reciprocal(t: Thread, i: Instruction) -> None:
    value = t.read(i.operands[1])
    known = value is not None and i.op == "MUFU.RCP" and float_of(value) != 0
    t.write(i.operands[0], bits_of(1 / float_of(value)) if known else None)  # type: ignore[arg-type]


def to_integer(t: Thread, i: Instruction) -> None:
    value = t.read(i.operands[1])
    if value is None or not math.isfinite(float_of(value)):
        t.write(i.operands[0], None)
        return
    t.write(i.operands[0], min(max(int(float_of(value)), 0), WORD) if "U32" in i.op else int(float_of(value)) & WORD)


def unknown_predicate(t: Thread, i: Instruction) -> None:
    for text in i.operands[:2]:
        if is_predicate(text):
            t.set_truth(text, None)


def granted(t: Thread, i: Instruction) -> None:
    """A phase of an mbarrier is over, registers are there, and the thread that is followed is the elected one."""
    t.set_truth(i.operands[0], True)


def quick_division(t: Thread, i: Instruction) -> None:
    """Divisors are no subnormals, quotients neither: these have a path of their own."""
    t.set_truth(i.operands[0], False)


def vote(t: Thread, i: Instruction) -> None:
    """The warps that are followed have no other threads."""
    t.set_truth(i.operands[0], t.truth(i.operands[-1]))


def from_predicates(t: Thread, i: Instruction) -> None:
    """``P2R R0, PR, R1, mask``: the predicates of the mask as bits, the other bits of R1."""
    into, _, other, text = i.operands
    mask, rest = int(text, 16), t.read(other)
    chosen = [(n, t.predicates.get(f"P{n}")) for n in range(7) if mask >> n & 1]
    if rest is None or any(value is None for _, value in chosen):
        t.write(into, None)
    else:
        t.write(into, rest & ~mask & WORD | sum(1 << n for n, value in chosen if value))


def to_predicates(t: Thread, i: Instruction) -> None:
    """``R2P PR, R0, mask``"""
    _, source, text = i.operands
    value = t.read(source)
    for n in range(7):
        if int(text, 16) >> n & 1:
            t.set_truth(f"P{n}", None if value is None else bool(value >> n & 1))


INTEGERS: tuple[tuple[str, Callable[[Thread, Instruction], None]], ...] = (
    (r"U?IADD3|VIADD$|U?VIADD", add), (r"U?IMAD", multiply_add), (r"U?LEA", shift_add), (r"U?SHF", shift),
    (r"U?LOP3", logic), (r"U?PLOP3", predicate_logic), (r"U?ISETP", compare), (r"U?SEL", select),
    (r"VIMNMX|IMNMX|UIMNMX", least), (r"U?PRMT", permute), (r"U?LDC", load_constant), (r"S2U?R|CS2R", special),
    (r"U?MOV|R2UR", move), (r"IABS", absolute), (r"I2F\.", to_float), (r"MUFU", reciprocal), (r"F2I\.", to_integer),
    (r"P2R$", from_predicates), (r"R2P$", to_predicates),
    (r"FSETP|HSETP2|DSETP", unknown_predicate), (r"FCHK", quick_division), (r"VOTEU\.ALL", vote),
)  # fmt: skip


def effect(op: str) -> Callable[[Thread, Instruction], None] | None:
    """What an instruction does to integers and predicates; None: nothing."""
    if DATA.match(op):
        return forget
    if re.match(r"SYNCS\.PHASECHK|ELECT|USETMAXREG\.TRY", op):
        return granted
    if NOTHING.match(op):
        return None
    for pattern, function in INTEGERS:
        if re.match(pattern, op):
            return function
    raise Unknown(f"an instruction that is not known here: {op}")


def forget(t: Thread, i: Instruction) -> None:
    """Makes the registers that are written unknown."""
    into = next((text for text in i.operands if not is_predicate(text)), "RZ")
    if not re.fullmatch(r"U?R(\d+|Z)", into) or into in ("RZ", "URZ"):
        return
    size = 16 if ".128" in i.op or re.match(r"HMMA|IMMA", i.op) else 8 if ".64" in i.op else 4
    t.write(into, t.loaded if re.fullmatch(r"LDG\.E(\.CONSTANT)?", i.op) else None, size)


def trace(code: Sequence[Instruction], constants: bytes, special: dict[str, int], loaded: Value = None) -> Trace:
    """What a thread issues until it leaves.

    Args:
        constants: bank 0: of sm_90, the parameters begin at 0x210.
        special: special registers, as ``SR_TID.X``.
        loaded: what every load of 4 bytes finds, for a path that depends on it alone.
    """
    effects = [None if jump.match(i.op) else effect(i.op) for i in code]
    found, thread, at = Trace(code), Thread(constants, special), 0
    thread.loaded = loaded
    for _ in range(STEPS):
        instruction = code[at]
        found.issued[at] += 1
        taken = thread.truth(instruction.guard[1:]) if instruction.guard else True
        if jump.match(instruction.op):
            conditions = [text for text in instruction.operands if is_predicate(text)]
            for text in conditions:
                also = thread.truth(text)
                taken = False if taken is False or also is False else None if taken is None or also is None else True
            if taken is None:
                raise Unknown(f"a path depends on data: {instruction}")
            found.active[at] += taken
            if taken and instruction.op.startswith("EXIT"):
                return found
            if taken and instruction.op.startswith("CALL"):
                thread.calls.append(at + 1)
            if taken and instruction.op.startswith("RET"):
                at = thread.calls.pop()
            elif taken and not instruction.op.startswith("BRA.DIV"):
                at = instruction.target
            else:
                at += 1
            continue
        run = effects[at]
        if taken:
            found.active[at] += 1
            if run:
                run(thread, instruction)
        elif taken is None and run:
            found.active[at] += 1
            forget(thread, instruction)
            unknown_predicate(thread, instruction)
        at += 1
    raise Unknown(f"more than {STEPS} instructions")


jump = re.compile(r"BRA|EXIT|CALL|RET|JMP")
