"""Matrix instructions.

Of a warp's 8x8 matrix of 16-bit elements, lane l holds elements 2 (l mod 4) and the next of row l div 4.
"""

from __future__ import annotations

import re

import numpy as np

from lowbit.testing.ptx_emulator.instructions import listed
from lowbit.testing.ptx_emulator.machine import Machine
from lowbit.testing.ptx_emulator.memory import WARP, Group
from lowbit.testing.ptx_emulator.program import Instruction, instruction
from lowbit.testing.ptx_emulator.values import BYTES, UNSIGNED, Array, Fault, decode, encode

WARPGROUP = 128


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
    m.forget_writes()


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
    if any(m.written_lately(register) for register in (*d, *(a if isinstance(a, tuple) else ()))):
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
    reserve(m, m.products.groups[-1])
    m.shared.hold(touched)


def reserve(m: Machine, group: Group) -> None:
    """The registers that a product in flight works on belong to it."""
    accumulators, operands, _ = group.item
    for registers, reserved in ((accumulators, m.unreadable), ((*accumulators, *operands), m.unwritable)):
        for register in registers:
            reserved[register] = reserved.get(register, False) | group.lanes


@instruction("wgmma.commit_group.sync.aligned")
def commit_products(m: Machine, i: Instruction) -> None:
    m.products.commit(m.active_mask)


@instruction("wgmma.wait_group.sync.aligned")
def wait_for_products(m: Machine, i: Instruction) -> None:
    for (_, _, touched), lanes in m.products.wait(m.active_mask, int(str(i.operands[0]), 0)):
        m.shared.let_go(touched, lanes)
    m.unreadable, m.unwritable = {}, {}
    for group in m.products.groups:
        reserve(m, group)
