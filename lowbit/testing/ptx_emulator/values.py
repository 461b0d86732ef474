"""Numbers as the machine holds them: types, conversions, sums that are rounded once.

A register is an array of unsigned integers ("raw"); a type says how an instruction reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Fault(Exception):
    """The program did something wrong, or something that this machine does not know."""


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
