"""Names of compiled CUDA C++ kernels: ``_ZN6lowbit4cuda13packed_decode6kernelI...`` is ``packed_decode::kernel``."""

from __future__ import annotations

import ctypes
import re
from functools import cache

DTYPES = ("none", "float32", "float16", "bfloat16", "uint8")  # lowbit::DType
NAMESPACE = "lowbit::cuda::"


@cache
def demangled(name: str) -> str:
    """What C++ calls a symbol, by the C++ runtime's own function."""
    runtime, libc = ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL(None)
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    found = runtime.__cxa_demangle(name.encode(), None, None, ctypes.byref(ctypes.c_int()))
    if not found:
        return name
    text = ctypes.string_at(found).decode()
    libc.free(found)
    return text


def value(argument: str) -> int | str:
    """Of a template argument: an integer, or the name of a DType."""
    enumerator = re.fullmatch(r"\((?P<type>[\w:]+)\)(?P<number>-?\d+)", argument)
    if enumerator is None:
        return {"false": 0, "true": 1}[argument] if argument in ("false", "true") else int(argument.rstrip("uUlL"))
    number = int(enumerator["number"])
    return DTYPES[number] if enumerator["type"].endswith("::DType") else number


@cache
def parse(name: str) -> tuple[str, tuple[int | str, ...]] | None:
    """The kernel below ``lowbit::cuda`` and its template arguments, of a symbol; None for another function."""
    match = re.match(rf"(?:void )?{NAMESPACE}([\w:]+)(?:<(.*?)>)?\(", demangled(name))
    if match is None:
        return None
    return match[1], tuple(value(argument) for argument in match[2].split(", ")) if match[2] else ()


def symbol(ptx: str, kernel: str, *arguments: int | str) -> str:
    """The name in a text of PTX of the instance of ``kernel`` (``packed_decode::kernel``) with these arguments."""
    found: list[str] = [name for name in re.findall(r"\.entry (\w+)\(", ptx) if parse(name) == (kernel, arguments)]
    assert len(found) == 1, f"{kernel}<{', '.join(map(str, arguments))}> must be in the PTX once: got {found}"
    return found[0]
