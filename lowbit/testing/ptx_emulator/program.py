"""A kernel's PTX text as instructions, and the table of the instructions that are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lowbit.testing.ptx_emulator.values import BYTES, Fault


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: a register, a shared symbol or a parameter, and a constant."""

    base: str
    offset: int


@dataclass(frozen=True)
class BoxAddress:
    """``[map, {coordinates}]``: a box of a tensor."""

    tensor: str
    coordinates: tuple[str, ...]


Operand = str | Address | BoxAddress | tuple[str, ...]


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


# ---------------------------------------------------------------------------------------------------------------------
# The known instructions: implementation and the modifiers that it honours or may ignore. Another modifier is a Fault.

Implementation = Callable[[Any, Instruction], "str | None"]  # of a Machine; a label, "exit", "barrier" or None
INSTRUCTIONS: dict[str, tuple[Implementation, frozenset[str]]] = {}
SCOPES = "relaxed acquire release acq_rel volatile weak cta cluster gpu sys"
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


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


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
        array = re.fullmatch(r"([\w$]+)\[(\d+)\]", words[-1])
        if array is not None and ".b8" in words:
            program.parameters.append((array[1], int(array[2])))
        elif words[1].lstrip(".") in BYTES:
            program.parameters.append((words[-1], BYTES[words[1].lstrip(".")]))
        else:
            raise Fault(f"a parameter {parameter!r} is not modelled")
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
                    statement = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?![\w%$.@])", own, statement)
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
        match = re.fullmatch(r"\[\s*([\w%$@]+)\s*,\s*\{([^}]*)\}\s*\]", text)
        if match:
            return BoxAddress(match[1], tuple(part.strip() for part in match[2].split(",")))
    return text
