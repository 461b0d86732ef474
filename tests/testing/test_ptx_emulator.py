"""The PTX machine against independent arithmetic, against Triton's own compiler, and against programs made wrong.

Triton compiles in a process of its own, this file run as a script, because a process whose kernels were made for
Triton's interpreter (TRITON_INTERPRET=1) cannot.
"""

from __future__ import annotations

import functools
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.backends.reference import quantize_activations
from lowbit.backends.triton.launch import TARGETS, Launch, Target
from lowbit.backends.triton.tiles import tile
from lowbit.backends.triton.tuning import Config
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations, formats, random_weight
from lowbit.testing.processes import outside_interpreter
from lowbit.testing.ptx_emulator import Compiled, Fault, Statistics, execute, run_launch

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.recorded("lowbit.backends", "lowbit.packed.triton")

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90")

# ---------------------------------------------------------------------------------------------------------------------
# A few lines of PTX: each thread has its inputs in %r0.. (or %rd0..) and leaves its outputs in %r50.. (or %rd50..)

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry lines(.param .u64 inputs, .param .u64 outputs)
.reqntid {threads}
{{
.reg .pred %p<10>;
.reg .b16 %rs<90>;
.reg .b32 %r<90>;
.reg .b64 %rd<90>;
mov.u32 %r80, %tid.x;
ld.param.u64 %rd80, [inputs];
ld.param.u64 %rd81, [outputs];
mad.wide.u32 %rd82, %r80, {in_bytes}, %rd80;
mad.wide.u32 %rd83, %r80, {out_bytes}, %rd81;
"""


def run_lines(
    lines: str, *inputs: Any, outputs: int = 1, wide: bool = False, threads: int = 32, shared_bytes: int = 0
) -> np.ndarray[Any, Any]:
    """uint32 (``wide``: uint64) [threads, outputs] after ``lines``; inputs: one value, or one per thread, for each."""
    dtype, register, bits = (np.uint64, "%rd", 64) if wide else (np.uint32, "%r", 32)
    given = np.zeros((threads, max(1, len(inputs))), dtype)
    for n, values in enumerate(inputs):
        given[:, n] = [int(v) & ((1 << bits) - 1) for v in np.broadcast_to(np.array(values, object), threads)]
    result = np.full((threads, max(1, outputs)), 0xEE, dtype)
    size = bits // 8
    text = HEADER.format(threads=threads, in_bytes=given.shape[1] * size, out_bytes=result.shape[1] * size)
    text += "".join(f"ld.global.b{bits} {register}{n}, [%rd82+{n * size}];\n" for n in range(len(inputs)))
    text += lines + "\n"
    text += "".join(f"st.global.b{bits} [%rd83+{n * size}], {register}{50 + n};\n" for n in range(outputs))
    execute(text + "ret;\n}\n", "lines", (1,), threads, [given, result], shared_bytes)
    return result


def words(values: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """Numbers as the 32-bit words that hold them."""
    return np.ascontiguousarray(values).astype(dtype).view(np.uint32)


def floats(values: Any) -> list[int]:
    """float32 numbers as words."""
    return [int(word) for word in words(values, np.float32)]


RANDOM = np.random.default_rng(0)
SOME = [int(v) for v in RANDOM.integers(0, 1 << 32, 28)] + [0, 1, 0x80000000, 0xFFFFFFFF]
OTHER = [int(v) for v in RANDOM.integers(0, 1 << 32, 28)] + [1, 0xFFFFFFFF, 0x80000000, 5]
THIRD = [int(v) for v in RANDOM.integers(0, 1 << 32, 32)]
SMALL = [int(v) for v in RANDOM.integers(0, 70, 32)]


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def digit(value: int, position: int) -> int:
    return value >> position & 1


def lop3(table: int) -> Callable[..., int]:
    return lambda a, b, c: sum((table >> (digit(a, n) * 4 + digit(b, n) * 2 + digit(c, n)) & 1) << n for n in range(32))


def prmt(a: int, b: int, selector: int) -> int:
    source, result = (b << 32 | a).to_bytes(8, "little"), []
    for n in range(4):
        pick = selector >> 4 * n & 15
        byte = source[pick & 7]
        result.append((255 if byte & 128 else 0) if pick & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def bfe(a: int, position: int, length: int, is_signed: bool) -> int:
    sign = digit(a, min(position + length - 1, 31)) if is_signed and length else 0
    return sum((digit(a, position + n) if n < length and position + n < 32 else sign) << n for n in range(32))


def bfi(a: int, b: int, position: int, length: int) -> int:
    for n in range(length):
        if position + n < 32:
            b = b & ~(1 << position + n) | digit(a, n) << position + n
    return b


def rounded_quotient(a: int, b: int) -> int:
    return int(Fraction(signed(a), signed(b)))  # int() truncates


INTEGER_CASES: list[tuple[str, list[Any], Callable[..., int]]] = [
    ("lop3.b32 %r50, %r0, %r1, %r2, 0xea;", [SOME, OTHER, THIRD], lop3(0xEA)),
    ("lop3.b32 %r50, %r0, %r1, %r2, 0x1b;", [SOME, OTHER, THIRD], lop3(0x1B)),
    ("lop3.b32 %r50, %r0, 0xf000f, 0x64006400, 0xea;", [SOME], lambda a: a & 0xF000F | 0x64006400),
    ("prmt.b32 %r50, %r0, %r1, %r2;", [SOME, OTHER, THIRD], prmt),
    ("prmt.b32 %r50, %r0, %r1, 0x9d6e;", [SOME, OTHER], lambda a, b: prmt(a, b, 0x9D6E)),
    ("bfe.u32 %r50, %r0, %r1, %r2;", [SOME, SMALL, SMALL[::-1]], lambda a, p, n: bfe(a, p, n, False)),
    ("bfe.s32 %r50, %r0, %r1, %r2;", [SOME, SMALL, SMALL[::-1]], lambda a, p, n: bfe(a, p, n, True)),
    ("bfi.b32 %r50, %r0, %r1, %r2, %r3;", [SOME, OTHER, SMALL, SMALL[::-1]], bfi),
    ("shl.b32 %r50, %r0, %r1;", [SOME, SMALL], lambda a, n: a << n),
    ("shr.u32 %r50, %r0, %r1;", [SOME, SMALL], lambda a, n: a >> n),
    ("shr.s32 %r50, %r0, %r1;", [SOME, SMALL], lambda a, n: signed(a) >> n),
    ("shf.l.wrap.b32 %r50, %r0, %r1, %r2;", [SOME, OTHER, SMALL], lambda a, b, n: (b << 32 | a) << n % 32 >> 32),
    ("shf.r.clamp.b32 %r50, %r0, %r1, %r2;", [SOME, OTHER, SMALL], lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    ("mul.hi.s32 %r50, %r0, %r1;", [SOME, OTHER], lambda a, b: signed(a) * signed(b) >> 32),
    ("mul.hi.u32 %r50, %r0, %r1;", [SOME, OTHER], lambda a, b: a * b >> 32),
    ("mad.lo.s32 %r50, %r0, %r1, %r2;", [SOME, OTHER, THIRD], lambda a, b, c: a * b + c),
    ("div.s32 %r50, %r0, %r1;", [SOME, OTHER], rounded_quotient),
    ("rem.s32 %r50, %r0, %r1;", [SOME, OTHER], lambda a, b: signed(a) - signed(b) * rounded_quotient(a, b)),
    ("div.u32 %r50, %r0, %r1;", [SOME, OTHER], lambda a, b: a // b),
    ("min.s32 %r50, %r0, %r1;", [SOME, OTHER], lambda a, b: min(signed(a), signed(b))),
    ("min.relu.s32 %r50, %r0, %r1;", [SOME, OTHER], lambda a, b: max(0, min(signed(a), signed(b)))),
    ("max.u32 %r50, %r0, %r1;", [SOME, OTHER], max),
    ("add.s16x2 %r50, %r0, %r1;", [SOME, OTHER],
     lambda a, b: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16),
    ("popc.b32 %r50, %r0;", [SOME], lambda a: bin(a).count("1")),
    ("clz.b32 %r50, %r0;", [SOME], lambda a: 32 - a.bit_length()),
    ("brev.b32 %r50, %r0;", [SOME], lambda a: int(f"{a:032b}"[::-1], 2)),
    ("setp.lt.s32 %p1, %r0, %r1; selp.b32 %r50, 7, -7, %p1;", [SOME, OTHER],
     lambda a, b: 7 if signed(a) < signed(b) else -7),
    ("setp.hi.u32 %p1|%p2, %r0, %r1; @!%p2 bra done; mov.b32 %r0, %r1; done: mov.b32 %r50, %r0;", [SOME, OTHER], max),
    ("mov.b32 {%rs1, %rs2}, %r0; mov.b32 %r50, {%rs2, %rs1};", [SOME], lambda a: a >> 16 | a << 16),
    ("dp4a.s32.u32 %r50, %r0, %r1, %r2;", [SOME, OTHER, THIRD],
     lambda a, b, c: c + sum(signed(a >> 8 * n, 8) * (b >> 8 * n & 255) for n in range(4))),
    ("{ .reg .b32 t; { .reg .b32 t; add.s32 t, %r0, 1; mov.b32 %r1, t; } mov.b32 t, %r0; sub.u32 %r50, %r1, t; }",
     [SOME], lambda a: 1),
    ("{ .reg .b8 s<4>; mov.b32 {s0, s1, s2, s3}, %r0; cvt.s32.s8 %r50, s2; }", [SOME],
     lambda a: signed(a >> 16, 8)),
    ("cvt.u16.u32 %rs1, %r0; cvt.s32.s16 %r50, %rs1;", [SOME], lambda a: signed(a, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "inputs", "expected"), INTEGER_CASES, ids=[case[0][:40] for case in INTEGER_CASES])
def test_integer_instructions(lines: str, inputs: list[Any], expected: Callable[..., int]) -> None:
    got = run_lines(lines, *inputs)[:, 0].tolist()
    assert got == [expected(*values) & 0xFFFFFFFF for values in zip(*inputs, strict=True)]


def test_wide_integers() -> None:
    a, b = ([int(v) for v in RANDOM.integers(0, 1 << 63, 32)] for _ in range(2))
    got = run_lines(
        "mul.lo.s64 %rd50, %rd0, %rd1; cvt.u32.u64 %r1, %rd0; cvt.u32.u64 %r2, %rd1; mul.wide.s32 %rd51, %r1, %r2;"
        "mad.wide.u32 %rd52, %r1, %r2, %rd0; shr.s64 %rd53, %rd50, 40; bfe.u64 %rd54, %rd0, 34, 20;",
        a, b, outputs=5, wide=True,
    )  # fmt: skip
    mask = (1 << 64) - 1
    for row, x, y in zip(got.tolist(), a, b, strict=True):
        low, high = signed(x), signed(y)
        assert row == [
            x * y & mask, low * high & mask, ((x & 0xFFFFFFFF) * (y & 0xFFFFFFFF) + x) & mask,
            (signed(x * y, 64) >> 40) & mask, x >> 34 & 0xFFFFF,
        ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Floating point, against exact fractions rounded once

FLOAT_TYPES = {"f32": (24, -149), "f16": (11, -24), "bf16": (8, -133)}  # bits of precision, exponent of the last bit


def nearest(value: Fraction, type_: str) -> Fraction:
    """To nearest, ties to even; within the range of the type."""
    precision, smallest = FLOAT_TYPES[type_]
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value))) - precision + 1
    while abs(value) >= Fraction(2) ** (exponent + precision):
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent + precision - 1):
        exponent -= 1
    unit = Fraction(2) ** max(exponent, smallest)
    return round(value / unit) * unit  # Python rounds halves to even


def half_bits(value: Fraction, type_: str) -> int:
    single = np.array([float(value)], np.float32)
    return int(single.view(np.uint32)[0] >> 16 if type_ == "bf16" else single.astype(np.float16).view(np.uint16)[0])


@pytest.mark.parametrize("type_", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_packed_floats_are_rounded_once(name: str, type_: str) -> None:
    operations = {"add": lambda a, b, c: a + b, "sub": lambda a, b, c: a - b, "mul": lambda a, b, c: a * b}
    operation = operations.get(name, lambda a, b, c: a * b + c)
    numbers = [[nearest(Fraction(float(v)), type_) for v in RANDOM.standard_normal(64)] for _ in range(3)]
    numbers[2] = [value / 512 for value in numbers[2]]  # near ties of the product
    packed = [[half_bits(v[2 * n], type_) | half_bits(v[2 * n + 1], type_) << 16 for n in range(32)] for v in numbers]
    operands = ", ".join(f"%r{n}" for n in range(3 if name == "fma" else 2))
    got = run_lines(f"{name}.rn.{type_}x2 %r50, {operands};", *packed)[:, 0]
    for n, word in enumerate(got.tolist()):
        for half in range(2):
            expected = nearest(operation(*(v[2 * n + half] for v in numbers)), type_)
            assert word >> 16 * half & 0xFFFF == half_bits(expected, type_)


def test_fused_multiply_add_is_rounded_once() -> None:
    a = np.float32(1) + np.float32(2) ** -RANDOM.integers(1, 24, 32).astype(np.float32)
    b = np.float32(1) - np.float32(2) ** -RANDOM.integers(1, 24, 32).astype(np.float32)
    c = (np.float32(2) ** -RANDOM.integers(20, 80, 32).astype(np.float32)).astype(np.float32)
    got = run_lines("fma.rn.f32 %r50, %r0, %r1, %r2;", floats(a), floats(b), floats(c))[:, 0].view(np.float32)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert [Fraction(float(v)) for v in got] == [nearest(v, "f32") for v in exact]


def test_conversions() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1.5, 2.5, 3.5, -0.7, 1e9, -1e9] * 4, np.float32)
    got = run_lines(
        "cvt.rn.bf16x2.f32 %r50, %r0, %r1; cvt.rz.bf16x2.f32 %r51, %r0, %r1; cvt.rn.f16x2.f32 %r52, %r0, %r1;"
        "cvt.rni.s32.f32 %r53, %r0; cvt.rzi.u32.f32 %r54, %r0; cvt.rzi.s8.f32 %r55, %r0; cvt.rn.f16.s32 %rs1, %r2;"
        "mov.b32 %r56, {%rs1, %rs1};",
        floats(values), 0x3F800000, 2049 + 1024 * 1024 * 0, outputs=7,
    )  # fmt: skip
    assert [hex(v) for v in got[:2, 0]] == ["0x3f803f80", "0x3f823f80"]  # the first operand is the upper half
    assert [hex(v) for v in got[:2, 1]] == ["0x3f803f80", "0x3f813f80"]
    assert [hex(v) for v in got[2:5, 2]] == ["0xbe003c00", "0x41003c00", "0x43003c00"]
    assert got[2:8, 3].view(np.int32).tolist() == [-2, 2, 4, -1, 10**9, -(10**9)]
    assert got[2:8, 4].tolist() == [0, 2, 3, 0, 10**9, 0]
    assert got[2:8, 5].view(np.int32).tolist() == [-1, 2, 3, 0, 127, -128]
    assert got[0, 6] == 0x68006800  # 2049 to even: 2048


def test_float_comparisons_minimum_and_approximations() -> None:
    nan, values = 0x7FC00000, floats([1.0, 2.0, -3.0, 0.5] * 8)
    got = run_lines(
        "setp.lt.f32 %p1, %r0, %r1; selp.b32 %r50, 1, 0, %p1; setp.ltu.f32 %p2, %r0, %r1; selp.b32 %r51, 1, 0, %p2;"
        "max.f32 %r52, %r0, %r1; max.NaN.f32 %r53, %r0, %r1; ex2.approx.ftz.f32 %r54, %r0; rcp.approx.f32 %r55, %r0;",
        values, nan, outputs=6,
    )  # fmt: skip
    assert got[:, 0].tolist() == [0] * 32 and got[:, 1].tolist() == [1] * 32
    assert got[:, 2].tolist() == values and np.isnan(got[:, 3].copy().view(np.float32)).all()
    assert got[:4, 4].copy().view(np.float32).tolist() == [2.0, 4.0, 0.125, np.float32(2**0.5)]
    assert got[:4, 5].copy().view(np.float32).tolist() == [1.0, 0.5, np.float32(-1 / 3), 2.0]
    assert run_lines("add.ftz.f32 %r50, %r0, 0f00000000;", 1)[0, 0] == 0
    assert run_lines("add.f32 %r50, %r0, 0f00000000;", 1)[0, 0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Fragments: where the PTX ISA says that an element lies ("Matrix Fragments for mma.m16n8k16" and so on)


def a_place(lane: int, i: int, per: int) -> tuple[int, int]:
    """Row and column of element i of A in a lane, ``per`` elements in a register."""
    row = lane // 4 + (8 if i // per % 2 else 0)
    return row, lane % 4 * per + i % per + (4 * per if i >= 2 * per else 0)


def b_place(lane: int, i: int, per: int) -> tuple[int, int]:
    return lane % 4 * per + i % per + (4 * per if i >= per else 0), lane // 4


def c_place(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def as_bits(matrix: np.ndarray[Any, Any], type_: str) -> np.ndarray[Any, Any]:
    if type_ in ("bf16", "tf32"):
        single = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
        return (single >> 16).astype(np.uint16) if type_ == "bf16" else single
    return matrix.astype({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[type_]).view(
        {"f16": np.uint16, "s8": np.uint8, "u8": np.uint8}[type_]
    )


@pytest.mark.parametrize("type_", ["f16", "bf16", "tf32", "s8", "u8"])
def test_mma_is_a_matrix_product(type_: str) -> None:
    per = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}[type_]
    low, high = {"s8": (-128, 128), "u8": (0, 256)}.get(type_, (-8, 9))
    left, right = RANDOM.integers(low, high, (16, 8 * per)), RANDOM.integers(low, high, (8 * per, 8))
    add = RANDOM.integers(-9, 9, (16, 8))
    width = 32 // per
    fragments = [[0] * 32 for _ in range(10)]
    for lane in range(32):
        for i in range(4 * per):
            bits = int(as_bits(left, type_)[a_place(lane, i, per)])
            fragments[i // per][lane] |= bits << i % per * width
        for i in range(2 * per):
            bits = int(as_bits(right, type_)[b_place(lane, i, per)])
            fragments[4 + i // per][lane] |= bits << i % per * width
        for i in range(4):
            value = add[c_place(lane, i)]
            fragments[6 + i][lane] = int(value) if per == 4 else floats([value])[0]
    out, kind = ("s32", "k32") if per == 4 else ("f32", f"k{8 * per}")
    got = run_lines(
        f"mma.sync.aligned.m16n8{kind}.row.col.{out}.{type_}.{type_}.{out} "
        "{%r50, %r51, %r52, %r53}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6, %r7, %r8, %r9};",
        *fragments, outputs=4,
    )  # fmt: skip
    expected = left @ right + add
    numbers = got.view(np.int32 if per == 4 else np.float32)
    for lane in range(32):
        assert numbers[lane].tolist() == [expected[c_place(lane, i)] for i in range(4)]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans: str) -> None:
    rows = RANDOM.integers(0, 1 << 32, (32, 4), dtype=np.uint32)  # row r of matrix i at lane 8i + r
    there = "shl.b32 %r10, %r80, 4; mov.b32 %r11, smem; add.s32 %r10, %r10, %r11;"
    save = "st.shared.v4.b32 [%r10], {%r0, %r1, %r2, %r3}; bar.warp.sync -1;"
    read = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r50, %r51, %r52, %r53}}, [%r10];"
    got = run_lines(there + save + read, *rows.T, outputs=4, shared_bytes=512)
    halves = rows.view(np.uint16).reshape(4, 8, 8)  # matrix, row, column
    for lane in range(32):
        for i in range(4):
            at = [(lane // 4, lane % 4 * 2 + n) for n in range(2)]
            pair = [int(halves[i][place[::-1] if trans else place]) for place in at]
            assert got[lane, i] == pair[0] | pair[1] << 16
    write = f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r10], {{%r50, %r51, %r52, %r53}};"
    back = "ld.shared.v4.b32 {%r50, %r51, %r52, %r53}, [%r10];"
    assert (run_lines(there + save + read + write + back, *rows.T, outputs=4, shared_bytes=512) == rows).all()


def test_shuffles() -> None:
    values = list(range(100, 132))
    got = run_lines(
        "shfl.sync.bfly.b32 %r50, %r0, 16, 31, -1; shfl.sync.up.b32 %r51|%p1, %r0, 3, 0, -1; selp.b32 %r52, 1, 0, %p1;"
        "shfl.sync.down.b32 %r53, %r0, 2, 0x181f, -1; shfl.sync.idx.b32 %r54, %r0, 5, 31, -1;"
        "redux.sync.max.s32 %r55, %r0, -1;",
        values, outputs=6,
    )  # fmt: skip
    for lane in range(32):
        down = lane + 2 if lane % 8 < 6 else lane  # within segments of 8
        expected = [values[lane ^ 16], values[lane - 3 if lane >= 3 else lane], int(lane >= 3), values[down], 105, 131]
        assert got[lane].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Control flow, memory and what must be refused


def test_divergent_loop() -> None:
    lines = (
        "mov.b32 %r50, 0; setp.eq.s32 %p1, %r0, 0; @%p1 bra end; again: add.s32 %r50, %r50, %r0;"
        "sub.s32 %r0, %r0, 1; setp.ne.s32 %p2, %r0, 0; @%p2 bra again; end:"
    )
    assert run_lines(lines, list(range(32)))[:, 0].tolist() == [n * (n + 1) // 2 for n in range(32)]


def test_early_return_leaves_the_others_running() -> None:
    got = run_lines("setp.lt.u32 %p1, %r80, 7; @%p1 ret; mov.b32 %r50, %r80;")[:, 0]
    assert got.tolist() == [0xEE] * 7 + list(range(7, 32))


def test_grid_parameters_and_statistics() -> None:
    ptx = """
    .visible .entry first(.param .u32 first_param_0) { ret; }
    .visible .entry add(
        .param .u64 .ptr .global .align 1 add_param_0, .param .u32 add_param_1, .param .f32 add_param_2
    )
    { .reg .b32 %r<9>; .reg .b64 %rd<9>;
      ld.param.b64 %rd1, [add_param_0]; ld.param.b32 %r1, [add_param_1]; ld.param.b32 %r2, [add_param_2];
      mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.x; mad.lo.s32 %r3, %r4, %r5, %r3;
      mov.u32 %r4, %ntid.x; mov.u32 %r5, %tid.x; mad.lo.s32 %r3, %r3, %r4, %r5; mul.wide.u32 %rd2, %r3, 4;
      add.s64 %rd1, %rd1, %rd2; cvt.rn.f32.s32 %r1, %r1; add.f32 %r1, %r1, %r2; red.global.add.f32 [%rd1], %r1; ret; }
    """
    array = np.arange(300 * 2 * 32, dtype=np.float32)
    statistics = execute(ptx, "add", (300, 2), 32, [array, -3, 0.5])
    assert (array == np.arange(array.size) - 2.5).all()
    assert statistics.count("red") == statistics.count("red.global") == 600 and statistics.count("r") == 0


def test_what_is_computed_from_an_unwritten_register_may_be_dropped() -> None:
    """As a compiler does: loads under a condition, sums with neighbours, and stores where all of it was loaded."""
    lines = (
        "setp.lt.u32 %p1, %r80, 8; @%p1 mov.b32 %r8, %r80; shfl.sync.bfly.b32 %r9, %r8, 4, 31, -1;"
        "add.s32 %r50, %r8, %r9; setp.lt.u32 %p2, %r80, LIMIT; @%p2 st.global.b32 [%rd83], %r50;"
    )
    ptx = HEADER.format(threads=32, in_bytes=4, out_bytes=4) + lines + "ret; }"
    place = np.zeros(32, np.uint32)
    execute(ptx.replace("LIMIT", "8"), "lines", (1,), 32, [place, place])
    assert place.tolist() == [2 * (n & 3) + 4 for n in range(8)] + [0] * 24
    with pytest.raises(Fault, match="register %r50 is read before it is written"):
        execute(ptx.replace("LIMIT", "9"), "lines", (1,), 32, [place, place])


def test_atomics_count_every_thread() -> None:
    got = run_lines("atom.global.gpu.acq_rel.add.u32 %r50, [%rd80], 1;", [0] * 32)[:, 0]
    assert sorted(got.tolist()) == list(range(32))


ASYNC = (
    "shl.b32 %r10, %r80, 4; mov.b32 %r11, smem; add.s32 %r10, %r10, %r11; add.s64 %rd1, %rd80, 0;"
    "mad.wide.u32 %rd1, %r80, 16, %rd80; cp.async.cg.shared.global [ %r10 + 0 ], [ %rd1 + 0 ], 0x10, %r81;"
    "cp.async.commit_group; WAIT ld.shared.v4.b32 {%r50, %r51, %r52, %r53}, [%r10];"
)


def test_asynchronous_copies() -> None:
    given = [RANDOM.integers(0, 1 << 32, 32) for _ in range(4)]
    wait = ASYNC.replace("WAIT", "cp.async.wait_group 0;")
    got = run_lines("mov.b32 %r81, 16;" + wait, *given, outputs=4, shared_bytes=512)
    assert (got == np.stack(given, 1)).all()
    assert (run_lines("mov.b32 %r81, 0;" + wait, *given, outputs=4, shared_bytes=512) == 0).all()
    for missing in ("", "cp.async.wait_group 1;"):
        with pytest.raises(Fault, match="cp.async is in flight|before it is written|cp.async in flight"):
            run_lines("mov.b32 %r81, 16;" + ASYNC.replace("WAIT", missing), *given, outputs=4, shared_bytes=512)


EXCHANGE = (
    "shl.b32 %r10, %r80, 2; mov.b32 %r11, smem; add.s32 %r10, %r10, %r11; st.shared.b32 [%r10], %r80;"
    "BARRIER xor.b32 %r12, %r80, 32; shl.b32 %r12, %r12, 2; add.s32 %r12, %r12, %r11; ld.shared.b32 %r50, [%r12];"
)


def test_warps_exchange_through_shared_memory_with_a_barrier_only() -> None:
    got = run_lines(EXCHANGE.replace("BARRIER", "bar.sync 0;"), threads=64, shared_bytes=256)[:, 0]
    assert got.tolist() == [n ^ 32 for n in range(64)]
    with pytest.raises(Fault, match="written by another warp since the last bar.sync"):
        run_lines(EXCHANGE.replace("BARRIER", ""), threads=64, shared_bytes=256)
    overwrite = EXCHANGE.replace("BARRIER", "bar.sync 0;") + "st.shared.b32 [%r10], %r50;"
    with pytest.raises(Fault, match="read by another warp since the last bar.sync"):
        run_lines(overwrite, threads=64, shared_bytes=256)


def test_threads_of_a_warp_that_store_to_one_place_are_counted() -> None:
    ptx = HEADER.format(threads=32, in_bytes=4, out_bytes=4) + "st.shared.b32 [smem], %r80; ret; }"
    place = np.zeros(32, np.uint32)
    assert execute(ptx, "lines", (1,), 32, [place, place], 64).conflicts == 31


REFUSED = {
    "unknown instruction tex.2d": "tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [%rd1, {%r1, %r2}];",
    "unknown modifier .relu": "fma.rn.relu.f16x2 %r50, %r0, %r0, %r0;",
    "register %r7 is read before it is written": "add.s32 %r50, %r7, 1;",
    "register %p2 is read before it is written": "setp.lt.u32 %p1, %r80, 4; @%p1 setp.lt.u32 %p2, %r0, 9; @%p2 ret;",
    "register %rs1 does not hold a .s32": "mov.b16 %rs1, 1; add.s32 %r50, %rs1, 1;",
    "%rs1 is a .b16 register": "mov.b32 %rs1, 1;",
    "unknown operand %clock": "mov.u32 %r50, %clock;",
    "misaligned for 8": "ld.global.v2.b32 {%r50, %r51}, [%rd80+4];",
    "out of bounds: 4 bytes at 128 ": "ld.global.b32 %r50, [%rd82+4];",
    "out of bounds: 4 bytes at -4": "st.global.b32 [%rd81+-4], %r0;",
    "shared address 64 is out of bounds": "st.shared.b32 [smem+64], %r0;",
    "shared address 2 is misaligned": "st.shared.b32 [smem+2], %r0;",
    "shared address 8 .* read before it is written": "ld.shared.b32 %r50, [smem+8];",
    "only a part of a warp": "setp.lt.u32 %p1, %r80, 4; @%p1 shfl.sync.idx.b32 %r50, %r0, 0, 31, -1;",
    "wait at different bar.sync": "setp.lt.u32 %p1, %r80, 4; @%p1 bra a; bar.sync 0; bra b; a: bar.sync 0; b:",
    "division by zero": "mov.b32 %r1, 0; div.s32 %r50, %r0, %r1;",
    "no label nowhere": "bra nowhere;",
    "deadlock: 32 threads wait, thread 0 .* at: bar.sync 1, 64": "bar.sync 1, 64;",
}


@pytest.mark.parametrize("message", REFUSED)
def test_faults(message: str) -> None:
    with pytest.raises(Fault, match=message):
        run_lines(REFUSED[message], [0] * 32, outputs=0, shared_bytes=64)


def test_what_cannot_be_launched_is_refused() -> None:
    ptx = HEADER.format(threads=32, in_bytes=4, out_bytes=4) + "ret; }"
    place = np.zeros(32, np.uint32)
    with pytest.raises(Fault, match="no .entry other"):
        execute(ptx, "other", (1,), 32, [place, place])
    with pytest.raises(Fault, match="2 parameters: got 1"):
        execute(ptx, "lines", (1,), 32, [place])
    with pytest.raises(Fault, match="multiple of 32: got 33"):
        execute(ptx, "lines", (1,), 33, [place, place])
    with pytest.raises(Fault, match="shared_bytes must be at most 232448: got 300000"):
        execute(ptx, "lines", (1,), 32, [place, place], 300000)


# ---------------------------------------------------------------------------------------------------------------------
# What Triton compiles


@triton.jit
def dequantize_matmul(
    x_ptr, codes_ptr, scales_ptr, y_ptr, m_size, n_size, k_size, MAGIC: tl.constexpr, ONE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y[m, n] = scale[n] * sum_k x[m, k] * (code[n, k] - 8); 4 columns, 32 apart, of 128 in each int16."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, 32)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tiles = tl.cdiv(k_size, 128)
    for t in range(tiles):
        word = tl.load(
            codes_ptr + n[:, None] * (tiles * 32) + t * 32 + lane[None, :], mask=n[:, None] < n_size, other=0
        )
        for f in tl.static_range(4):
            k = t * 128 + f * 32 + lane
            x = tl.load(
                x_ptr + m[None, :] * k_size + k[:, None], mask=(m[None, :] < m_size) & (k[:, None] < k_size), other=0.0
            )
            number = (((word >> (4 * f)) & 15) | MAGIC).to(x_ptr.dtype.element_ty, bitcast=True)
            sums = tl.dot((number - (ONE + 8)).to(x_ptr.dtype.element_ty), x, sums)
    scale = tl.load(scales_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)
    y = (sums * scale[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[None, :] * n_size + n[:, None], y, mask=(n[:, None] < n_size) & (m[None, :] < m_size))


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, k_size, A_ROW: tl.constexpr, A_COLUMN: tl.constexpr, B_ROW: tl.constexpr,
    B_COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c = a @ b, one block: both operands go through shared memory, in whatever order they lie."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), c_ptr.dtype.element_ty)
    for start in range(0, k_size, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * A_ROW + (start + k)[None, :] * A_COLUMN)
        b = tl.load(b_ptr + (start + k)[:, None] * B_ROW + n[None, :] * B_COLUMN)
        sums = tl.dot(a, b, sums, out_dtype=sums.dtype)
    tl.store(c_ptr + m[:, None] * BLOCK_N + n[None, :], sums)


class Sample:
    """dequantize_matmul on N = 96, K = 320, odd M, with its exact weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        m, n, k = 13, 96, 320
        g = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (n, 3, 4, 32), generator=g)
        packed = sum(codes[:, :, f] << 4 * f for f in range(4)).to(torch.int32).to(torch.int16).reshape(n, -1)
        self.x = activations(m, k, dtype)
        scales = (torch.rand(n, generator=g) + 0.5).to(dtype)
        self.weight = (codes.reshape(n, -1)[:, :k].double() - 8) * scales.double()[:, None]
        self.y = torch.full((m, n), math.nan, dtype=dtype)
        half = dtype == torch.float16
        self.launch = Launch(
            dequantize_matmul,
            (2, 1),
            dict(x_ptr=self.x, codes_ptr=packed, scales_ptr=scales, y_ptr=self.y, m_size=m, n_size=n, k_size=k),
            dict(MAGIC=0x6400 if half else 0x4300, ONE=1024.0 if half else 128.0, BLOCK_N=64, BLOCK_M=16),
            warps=4,
            stages=3,
        )

    def check(self, compiled: Compiled) -> Statistics:
        self.y.fill_(math.nan)
        statistics = run_launch(compiled, self.launch)
        assert_linear_close(self.y, self.x, self.weight)
        return statistics


# (dtype, K-contiguous a, K-contiguous b, BLOCK_N, BLOCK_K): swizzles of 128, 64 and 32 bytes, both orders
PRODUCTS = {
    "k128": (torch.float16, True, True, 64, 64),
    "k64": (torch.float16, True, True, 32, 32),
    "k32": (torch.bfloat16, True, True, 16, 16),
    "n128": (torch.float16, True, False, 128, 32),
    "n64": (torch.bfloat16, True, False, 32, 32),
    "m128": (torch.float16, False, True, 32, 64),
    "int8": (torch.int8, True, True, 32, 128),
    "int8k32": (torch.int8, True, True, 64, 32),
}


def product(name: str) -> tuple[Launch, torch.Tensor]:
    """The launch, and its exact result."""
    dtype, a_by_k, b_by_k, n, block_k = PRODUCTS[name]
    m, k = 64, 256
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 9, shape, generator=g) for shape in ((m, k), (k, n)))
    left = a.to(dtype) if a_by_k else a.to(dtype).t().contiguous().t()
    right = b.to(dtype).t().contiguous().t() if b_by_k else b.to(dtype)
    result = torch.int32 if dtype == torch.int8 else torch.float32
    launch = Launch(
        matmul,
        (1,),
        dict(a_ptr=left, b_ptr=right, c_ptr=torch.full((m, n), -1, dtype=result), k_size=k),
        dict(
            A_ROW=left.stride(0), A_COLUMN=left.stride(1), B_ROW=right.stride(0), B_COLUMN=right.stride(1),
            BLOCK_M=m, BLOCK_N=n, BLOCK_K=block_k,
        ),
        stages=3,
    )  # fmt: skip
    return launch, (a @ b).to(result)


PACKED = (*map(str, range(2, 9)), "4-float")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Packed:
    """A packed linear layer; bits decide on N, K, groups, zeros, rows, dtype, outliers, configuration and int8."""

    def __init__(self, target: Target, bits: int, zeros: str = "") -> None:
        from lowbit.packed.operands import PackedActivation
        from lowbit.packed.triton import linear_launches

        n, k, group_size = ((96, 512, None), (66, 320, 64), (70, 512, 128), (40, 172, 7))[bits % 4]
        zeros = zeros or ("none", "int", "float")[bits % 3]
        possible = [f for f in formats(bits, n, k, group_size) if f.zeros == zeros]
        rows, config = (16, Config(64, 16, 4, 3, 2)) if bits % 2 else (3, Config(64, 64, 4, 2))
        self.int8 = bits in (6, 8)
        self.weight = random_weight(possible[bits % len(possible)], bits)
        self.x = activations(rows, k, DTYPES[bits % 3])
        self.y = torch.full((rows, n), math.nan, dtype=self.x.dtype)
        self.weight.packed = tile(self.weight.packed, bits, k)
        activation = PackedActivation(int8=self.int8)
        self.launches = linear_launches(target, config, self.x, self.weight.operands, None, activation, self.y)

    def check(self, compiled: list[Compiled]) -> Statistics:
        total = Statistics()
        for code, launch in zip(compiled, self.launches, strict=True):
            total.executed += run_launch(code, launch).executed
        x, dense = self.x, self.weight.dense()
        if self.int8:  # [x as quantized | x as it is] @ [codes part | outliers].T
            q, inverse = quantize_activations(x, None)
            codes_part = self.weight.dense(outliers=False)
            x = torch.cat([q.double() / inverse.double(), x.double()], 1)
            dense = torch.cat([codes_part, dense - codes_part], 1)
        assert_linear_close(self.y, x, dense)
        return total


def launches(name: str) -> list[Launch]:
    """By name: "sm_80 sample float16", "sm_90 product k64", "sm_90 packed 3"."""
    target, kind, which = name.split()
    if kind == "sample":
        return [Sample(getattr(torch, which)).launch]
    if kind == "product":
        return [product(which)[0]]
    bits, _, zeros = which.partition("-")
    return Packed(TARGETS[target], int(bits), zeros).launches


@functools.cache
def compiled(target: str, kind: str) -> dict[str, list[Compiled]]:
    """Everything of a kind, compiled for a target by a process of its own."""
    which = {"sample": ("float16", "bfloat16"), "product": tuple(PRODUCTS), "packed": PACKED}
    names = [f"{target} {kind} {name}" for name in which[kind]]
    done = outside_interpreter(__file__, *names, root=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def main(names: list[str]) -> None:
    """Compiles, and writes a pickle of the results by name."""
    from benchmarks.tools.compiling import compile_launch

    results = {
        name: [Compiled.of(compile_launch(launch, TARGETS[name.split()[0]])) for launch in launches(name)]
        for name in names
    }
    sys.stdout.buffer.write(pickle.dumps(results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_sample(target: str, dtype: torch.dtype) -> None:
    (code,) = compiled(target, "sample")[f"{target} sample {str(dtype)[6:]}"]
    statistics = Sample(dtype).check(code)
    tiles, chunks = 2, 12  # 64 x 16 of y and 32 columns in each
    if target == "sm_80":
        assert statistics.count("mma.sync") == tiles * chunks * 4 * 2 * 2
    else:
        assert statistics.count("wgmma.mma_async") == tiles * chunks * 2 * 4  # by each of 4 warps
    assert statistics.count("cp.async.wait_group") and not statistics.conflicts


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_products(target: str, name: str) -> None:
    (code,) = compiled(target, "product")[f"{target} product {name}"]
    launch, exact = product(name)
    statistics = run_launch(code, launch)
    assert statistics.count("mma.sync" if target == "sm_80" else "wgmma.mma_async")
    assert_bitwise_equal(launch.arguments["c_ptr"], exact)


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_packed_linear(target: str, bits: int) -> None:
    statistics = Packed(TARGETS[target], bits).check(compiled(target, "packed")[f"{target} packed {bits}"])
    assert statistics.count("mma.sync" if target == "sm_80" else "wgmma.mma_async")
    assert statistics.count("lop3")


@pytest.mark.slow
def test_activations_that_a_product_still_reads_are_not_overwritten() -> None:
    """With float zero points of rows, which need the sum of a row of x beside its products.

    Triton 3.6 and 3.9 let the last wgmma of an iteration run on into the next one, and give its operand a buffer more
    for that; but not where the operand is also read otherwise (here: summed). Then the next cp.async goes to the
    buffer that the wgmma reads, with no wait between. So the kernel takes the sums of x from a launch of its own.
    """
    Packed(TARGETS["sm_90"], 4, "float").check(compiled("sm_90", "packed")["sm_90 packed 4-float"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "replacement"), [(r"0xea;", "0xe8;"), (r"shr\.u32 (\S+), (\S+), 4;", r"shr.u32 \1, \2, 5;")]
)
def test_a_mistake_in_inline_assembly_shows(pattern: str, replacement: str) -> None:
    codes = list(compiled("sm_80", "packed")["sm_80 packed 4"])
    for n, code in enumerate(codes):
        wrong = re.sub(pattern, replacement, code.ptx, count=1)
        if wrong != code.ptx:
            codes[n] = Compiled(wrong, code.name, code.threads, code.shared_bytes, code.parameters)
            break
    else:
        raise LookupError(pattern)
    with pytest.raises(AssertionError, match="element"):
        Packed(TARGETS["sm_80"], 4).check(codes)


# Mistakes in the sample's PTX: (architecture, pattern, replacement, which of the places, counted from the end if < 0)
MISTAKES = {
    "no cp.async.wait_group": ("", r"cp\.async\.wait_group\s+[1-9]\d*;", "", 0),
    "no last cp.async.commit_group": ("", r"cp\.async\.commit_group\s*;", "", -1),
    "no bar.sync": ("", r"(cp\.async\.wait_group\s+[1-9]\d*;[^;]*)bar\.sync\s+0;", r"\1", 0),
    "no bar.sync before the next copy": ("", r"bar\.sync\s+0;((?:[^;]*;){0,9}[^;]*cp\.async\.c[ag])", r"\1", -1),
    "another shift": ("", r"(shr\.u(?:16|32)\s+%rs?\d+, %rs?\d+), 4;", r"\1, 5;", 0),
    "a copy to another place": ("", r"(cp\.async\.c[ag]\.shared\.global \[ %r\d+ \+ )0", r"\g<1>16", 1),
    "an instruction less": ("", r"mul\.f32[^;]*;", "", 0),
    "registers of A exchanged": ("sm_80", r"(mma\.sync.*\}, \{ )(\S+), (\S+),(.*\{.*\{)", r"\1\3, \2,\4", 0),
    "a matrix transposed": ("sm_80", r"(ldmatrix\S*)(\.shared)", r"\1.trans\2", 0),
    "no last wgmma.wait_group": ("sm_90", r"wgmma\.wait_group[^;]*;", "", -1),
    "no wgmma.commit_group": ("sm_90", r"wgmma\.commit_group[^;]*;", "", -1),
    "no wgmma.fence": ("sm_90", r"wgmma\.fence[^;]*;", "", 0),
    "B transposed": ("sm_90", r"(wgmma\.mma_async.*, 1, 1, )0;", r"\g<1>1;", 0),
    "sums not kept": ("sm_90", r"mov\.pred\s+(%p\d+), -1;", r"mov.pred \1, 0;", 0),
}


def mistakes() -> Iterator[tuple[str, str]]:
    for name, (only, *_) in MISTAKES.items():
        for target in ARCHITECTURES:
            if only in ("", target):
                yield target, name


@pytest.mark.parametrize(("target", "name"), list(mistakes()))
def test_a_mistake_in_the_program_shows(target: str, name: str) -> None:
    _, pattern, replacement, which = MISTAKES[name]
    (code,) = compiled(target, "sample")[f"{target} sample float16"]
    place = list(re.finditer(pattern, code.ptx))[which]
    wrong = code.ptx[: place.start()] + place.expand(replacement) + code.ptx[place.end() :]
    assert wrong != code.ptx
    with pytest.raises((Fault, AssertionError)):
        Sample(torch.float16).check(Compiled(wrong, code.name, code.threads, code.shared_bytes, code.parameters))


if __name__ == "__main__":
    main(sys.argv[1:])
