"""Control, moves, logic, arithmetic and memory: what each instruction does to a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit.testing.ptx_emulator.machine import Machine
from lowbit.testing.ptx_emulator.memory import WARP
from lowbit.testing.ptx_emulator.program import CACHES, SCOPES, Address, Instruction, Operand, instruction
from lowbit.testing.ptx_emulator.values import (
    BYTES,
    FLOATS,
    SIGNED,
    UNSIGNED,
    Array,
    Fault,
    decode,
    encode,
    fused_multiply_add,
)  # fmt: skip

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


# Orders memory accesses, which happen in program order here, or advises the hardware.
@instruction("bar.warp.sync", "membar", "fence", "griddepcontrol", "prefetch",
             accepts=f"{SCOPES} gl sc global wait launch_dependents L1 L2")  # fmt: skip
def nothing(m: Machine, i: Instruction) -> None:
    pass


@instruction("fence.proxy.async", accepts="global shared::cta")
def fence_proxy(m: Machine, i: Instruction) -> None:
    m.fence()


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
        known = not m.written_lately(str(source))
        m.write(target, m.read(source, i.type))
        if known:  # a copy that the assembler folds away, wherever the compiler left it
            m.forget_writes(str(target))


@instruction("cvta.to.global")
def to_global(m: Machine, i: Instruction) -> None:
    m.write(i.operands[0], m.read(i.operands[1], i.type))


@instruction("cvta.param")  # the address of a parameter, which is a generic one already
def to_parameter(m: Machine, i: Instruction) -> None:
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
             "lg2", "sin", "cos", "tanh", accepts="rn ftz approx full NaN relu")  # fmt: skip
def arithmetic(m: Machine, i: Instruction) -> None:
    """Approximations (``.approx``, ``.full``) are computed exactly and rounded. ``.relu``: no result below 0."""
    if "relu" in i.modifiers and (i.name not in ("min", "max") or i.type != "s32"):
        raise Fault(f"unknown modifier .relu of {i.name}.{i.type}")
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
        result = ARITHMETIC[i.name](*values)
        m.write(i.operands[0], encode(np.maximum(result, 0) if "relu" in i.modifiers else result, i.type))
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


@instruction("ld", accepts=f"param global shared shared::cta shared::cluster v2 v4 {SCOPES} {CACHES}")
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


@instruction("st", accepts=f"global shared shared::cta shared::cluster v2 v4 {SCOPES} {CACHES}")
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
