"""What compiled GPU code says of itself: registers, shared memory, spills, load widths, tensor-core instructions.

Everything is read from what the Triton package itself carries: the LLVM IR (which argument a load reads, how wide),
and the machine code: of NVIDIA through its ``cuobjdump`` and ``nvdisasm``, of AMD from the assembly it keeps.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from triton import knobs

from lowbit.backends.triton.launch import Target

WEIGHTS = "tiles"  # how the names of the arguments begin that hold packed weights in a GPU's own layout


@dataclass(frozen=True)
class Line:
    """An instruction, or a label if ``op`` is empty; ``to`` are the labels that it may jump to."""

    op: str
    text: str
    label: str = ""
    to: tuple[str, ...] = ()


def loops(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Innermost loops as (first, last) line: a jump to a label further up that no other such jump lies within."""
    at = {line.label: number for number, line in enumerate(lines) if line.label}
    found = [(at[to], end) for end, line in enumerate(lines) for to in line.to if at.get(to, end) < end]
    return [one for one in found if not any(one != o and one[0] <= o[0] and o[1] <= one[1] for o in found)]


def main_loop(lines: Sequence[Line]) -> list[Line]:
    """Instructions of the longest innermost loop; of everything where there is no loop."""
    first, last = max(loops(lines), key=lambda loop: loop[1] - loop[0], default=(0, len(lines)))
    return [line for line in lines[first : last + 1] if line.op]


# --- LLVM IR: what is loaded -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One load from global memory, as every thread runs it."""

    argument: str
    bytes: int


GLOBAL_POINTER = re.compile(r"ptr addrspace\([18]\)(?: [a-z_]+(?:\([^)]*\))?)* (%[\w.]+)")
WIDTHS = (
    # NVIDIA: inline PTX, for example ld.global.v4.b32 and cp.async.cg.shared.global [..], [..], 0x10
    (re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)"), lambda m: int(m[1] or 1) * int(m[2]) // 8),
    (re.compile(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(\w+)"), lambda m: int(m[1], 16)),
    (re.compile(r"@llvm\.nvvm\.cp\.async\.c[ag]\.shared\.global\.(\d+)"), lambda m: int(m[1])),
    # AMD: llvm.amdgcn.raw.ptr.buffer.load.v4i32, and straight into shared memory with the size as an operand
    (re.compile(r"load(?:\.async)?\.(?:to\.)?lds\S*\(.*?ptr addrspace\(3\) [^,]+, i32 (\d+)"), lambda m: int(m[1])),
    (re.compile(r"buffer\.load\.(?:v(\d+))?[if](\d+)"), lambda m: int(m[1] or 1) * int(m[2]) // 8),
    (re.compile(r"= load (?:volatile )?<(\d+) x (\w+)>"), lambda m: int(m[1]) * SIZES[m[2]]),
    (re.compile(r"= load (?:volatile )?(\w+),"), lambda m: SIZES[m[1]]),
)
SIZES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "half": 2, "bfloat": 2, "float": 4, "double": 8, "i1": 1}


def parse_llvm(text: str) -> tuple[list[str], list[Line]]:
    """Names of the arguments of the kernel in LLVM IR, and its lines."""
    body = text[text.index("\ndefine ") + 1 :]
    body = body[: body.index("\n}")]
    header, *rest = body.splitlines()
    lines = []
    for line in rest:
        if label := re.match(r"([\w.$-]+):", line):
            lines.append(Line("", line, label[1]))
        elif op := re.match(r"\s+(?:(%[\w.]+) = )?(?:tail |musttail )?(\w+)", line):
            to = tuple(re.findall(r"label %([\w.$-]+)", line)) if op[2] in ("br", "switch") else ()
            lines.append(Line(op[2], line, to=to))
    return re.findall(r"(%\d+)(?=[,)])", header), lines


def sources(names: Sequence[str], lines: Iterable[Line]) -> dict[str, frozenset[str]]:
    """Which arguments each pointer in LLVM IR is derived from."""
    sources = {name: frozenset({name}) for name in names}
    defined = []
    for line in lines:
        if into := re.match(r"\s+(%[\w.]+) = ", line.text):
            operands = GLOBAL_POINTER.findall(line.text)
            if line.op == "phi" and "= phi ptr addrspace" in line.text:
                operands = re.findall(r"\[ (%[\w.]+),", line.text)
            if operands:
                defined.append((into[1], operands))
    changed = True
    while changed:  # a phi may read what stands below it
        changed = False
        for into, operands in defined:
            union = frozenset().union(*(sources.get(operand, frozenset()) for operand in operands))
            changed |= sources.get(into, frozenset()) != union
            sources[into] = union
    return sources


def loads(compiled: Any, lines: Sequence[Line] | None = None) -> list[Load]:
    """Loads from global memory in the compiled kernel, or only in ``lines`` of its LLVM IR."""
    names, every = parse_llvm(compiled.asm["llir"])
    arguments = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    named = dict(zip(names, arguments, strict=False))  # Triton appends pointers of its own
    derived = sources(names, every)
    found = []
    for line in every if lines is None else lines:
        pointers = GLOBAL_POINTER.findall(line.text)
        width = next((size(match) for pattern, size in WIDTHS if (match := pattern.search(line.text))), None)
        if pointers and width is not None:
            origin = {named.get(name, name) for pointer in pointers for name in derived.get(pointer, ())}
            found.append(Load("/".join(sorted(origin)), width))
    return found


# --- machine code ------------------------------------------------------------------------------------------------

TENSOR = "tensor"
# Which unit an instruction keeps busy, by how its name begins; the first match counts.
CUDA_UNITS = (
    (TENSOR, r"HMMA|IMMA|QMMA|OMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA"),
    ("local", r"LDL|STL"),
    ("global", r"LDGSTS|LDG(?!DEPBAR)|STG|ATOMG|ATOM|RED(?!UX)|LD\b|ST\b|UBLKCP|UTMA"),
    ("shared", r"LDSM|LDS|STSM|STS|ATOMS|SHFL|LDTM|STTM"),
    ("special", r"MUFU|I2F(?!P)|F2I(?!P)|F2F(?!P)|POPC|FLO"),
    ("half", r"HFMA2|HADD2|HMUL2|HMNMX2|HSET"),
    ("fma", r"FFMA|FADD|FMUL|IMAD|FSWZADD|IDP"),
    ("uniform", r"U[A-Z]|R2UR|S2UR|LDC|LDCU"),
    ("sync", r"BAR|DEPBAR|LDGDEPBAR|SYNCS|WARPSYNC|WARPGROUP|ARRIVES|MEMBAR|FENCE|CCTL"),
    ("control", r"BRA|EXIT|BSSY|BSYNC|NOP|RET|CALL|BREAK|YIELD|WARPGROUP"),
    ("alu", r"."),
)
HIP_UNITS = (
    (TENSOR, r"v_mfma|v_wmma|v_smfmac|v_swmmac"),
    ("local", r"scratch_"),
    ("global", r"global_|buffer_|flat_"),
    ("shared", r"ds_"),
    ("sync", r"s_wait|s_barrier"),
    ("control", r"s_cbranch|s_branch|s_endpgm|s_nop"),
    ("uniform", r"s_"),
    ("alu", r"."),
)


def unit(op: str, target: Target) -> str:
    units = CUDA_UNITS if target.backend == "cuda" else HIP_UNITS
    return next(name for name, pattern in units if re.match(pattern, op))


def by_unit(lines: Iterable[Line], target: Target) -> dict[str, int]:
    return dict(sorted(Counter(unit(line.op, target) for line in lines if line.op).items()))


def parse_sass(text: str) -> list[Line]:
    """NVIDIA machine code as ``nvdisasm -c`` prints it."""
    lines = []
    for line in text[text.index("\n.text.") + 1 :].splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            lines.append(Line("", line, label[1]))
        elif op := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            to = tuple(re.findall(r"\((\.L_x_\d+)\)", line)) if op[1].startswith("BRA") else ()
            lines.append(Line(op[1], line, to=to))
    return lines


def parse_amdgcn(text: str) -> list[Line]:
    """AMD assembly as LLVM prints it."""
    lines = []
    for line in text[: text.index("s_endpgm") + 8].splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            lines.append(Line("", line, label[1]))
        elif op := re.match(r"\s+([a-z]+_\w+)", line):
            to = tuple(re.findall(r"\.LBB\d+_\d+", line)) if op[1].startswith(("s_cbranch", "s_branch")) else ()
            lines.append(Line(op[1], line, to=to))
    return lines


def nvidia_tool(tool: Any, *arguments: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool.path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(compiled: Any, target: Target) -> list[Line]:
    """Instructions and labels of the compiled kernel."""
    if target.backend == "cuda":
        return parse_sass(nvidia_tool(knobs.nvidia.nvdisasm, "-c", cubin=compiled.asm["cubin"]))
    return parse_amdgcn(compiled.asm["amdgcn"])


# --- resources ---------------------------------------------------------------------------------------------------

# Warps and blocks that a multiprocessor holds at once: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability". Each of their four parts has 16384 registers, given to a warp 256 at a time; 1 KiB of shared
# memory per block is kept back.
CUDA_RESIDENT = {80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}
RESERVED = 1024
TENSOR_MEMORY_COLUMNS = 512  # sm_100: PTX ISA, "Tensor Memory"


def cuda_blocks(target: Target, warps: int, registers: int, shared: int, columns: int) -> dict[str, int]:
    """How many blocks each resource lets a multiprocessor hold."""
    most_warps, most_blocks = CUDA_RESIDENT[int(target.arch)]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = {
        "warps": most_warps // warps,
        "blocks": most_blocks,
        "registers": 16384 // per_warp * 4 // warps,
        "shared memory": (target.shared_memory + RESERVED) // (shared + RESERVED),
    }
    if columns:
        blocks["tensor memory"] = TENSOR_MEMORY_COLUMNS // columns
    return blocks


def hip_blocks(target: Target, warps: int, waves: int, shared: int) -> dict[str, int]:
    """The same for a compute unit; ``waves`` per SIMD are what LLVM says the registers allow."""
    simds = 4 if target.warp_size == 64 else 2
    return {"registers": waves * simds // warps, "shared memory": target.shared_memory // max(shared, 1)}


def resources(compiled: Any, target: Target, code: Sequence[Line] | None = None) -> dict[str, Any]:
    """What a program of the compiled kernel needs and does; ``code`` is its :func:`machine_code`, if at hand.

    Returns a dict:
        registers: per thread; spills: instructions that access spilled registers (AMD: registers spilled).
        shared: bytes of shared memory of a block; blocks: that fit on a multiprocessor, held back by ``limit``.
        weight_loads: bytes of the narrowest load from each argument of packed weights.
        dots: matrix products in the kernel's own (Triton) code that tensor cores can do; tensor: tensor-core
            instructions; code: instructions; loop: those of the main loop, by unit.
    """
    code = code or machine_code(compiled, target)
    counts = by_unit(code, target)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.backend == "cuda":
        usage = nvidia_tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin=compiled.asm["cubin"])
        registers, spills = int(re.search(r"REG:(\d+)", usage)[1]), counts.get("local", 0)
        blocks = cuda_blocks(target, warps, registers, shared, getattr(compiled.metadata, "tmem_size", 0) or 0)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        blocks = hip_blocks(target, warps, int(re.search(r"; Occupancy: (\d+)", text)[1]), shared)
    narrowest: dict[str, int] = {}
    for load in loads(compiled):
        if load.argument.startswith(WEIGHTS):
            narrowest[load.argument] = min(load.bytes, narrowest.get(load.argument, load.bytes))
    limit = min(blocks, key=lambda name: blocks[name])
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "blocks": blocks[limit],
        "limit": limit,
        "weight_loads": narrowest,
        "dots": len(re.findall(r"tt\.dot .*tensor<\w+x(?:i8|f16|bf16)> \*", compiled.asm["ttir"])),
        "tensor": counts.get(TENSOR, 0),
        "code": sum(counts.values()),
        "loop": by_unit(main_loop(code), target),
    }
