"""Checked reading of GGUF files: every field is validated before a byte of data is used.

    "GGUF", version u32, number of tensors u64, number of fields u64
    fields     key string, type u32, value;   a string is its length u64 and UTF-8 text
    tensors    name string, number of sizes u32, sizes u64 (fastest first), type u32, offset u64
    data       from the next multiple of general.alignment on; so is each offset in it

All numbers are little-endian. Source: github.com/ggml-org/ggml (docs/gguf.md, src/gguf.cpp).

The package ``gguf`` maps the whole file and believes its numbers: a wrong count runs it out of memory, tensors may
overlap, and each token of a vocabulary costs it two arrays. Tests read the same files with both.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMENSIONS = 4

# enum gguf_type: the code of struct for a number
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# enum ggml_type: the name, weights in a block, its bytes
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and as what.

    Attributes:
        type: the name of its type, such as ``"Q4_K"``.
        shape: as torch has it, the slowest size first.
        row_bytes: of the values along the last size.
        offset, nbytes: in the file.
    """

    type: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int
    nbytes: int


class GgufFile:
    """The fields and tensors of a file. Opening reads the fields and the headers; :meth:`read` gives a tensor's bytes.

    Attributes:
        file: the path.
        fields: key -> number, text, or a list of them.
        tensors: name -> where it lies.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file, and the field or tensor that is wrong.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        size = os.path.getsize(file)
        if size < 24:
            raise ValueError(f"{file} is truncated: a GGUF file has at least 24 bytes, got {size}")
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            cursor = _Cursor(file, content, size)
            self.fields, count = _fields(cursor)
            entries = _entries(cursor, count)
        alignment = self.fields.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{file}: general.alignment must be a power of two: got {alignment!r:.200}")
        start = -(-cursor.position // alignment) * alignment
        self.tensors = _placed(file, entries, start, alignment, size)

    def file_of(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.file

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """``uint8 [rows, row_bytes]``: the bytes of a tensor, or of ``count`` of its rows."""
        info = self.tensors[name]
        rows = info.nbytes // info.row_bytes - first if count is None else count
        tensor = torch.empty(rows, info.row_bytes, dtype=torch.uint8, device="cpu")
        view = memoryview(tensor.view(-1).numpy())  # type: ignore[arg-type]
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(info.offset + first * info.row_bytes)
            done = 0
            while done < len(view):  # one read gives at most 2 GiB
                step = stream.readinto(view[done:])
                if not step:
                    raise ValueError(f"{self.file} is truncated: tensor {name!r} ends after {done} bytes")
                done += step
        return tensor


class _Cursor:
    """Reads one number after the other, and never past the end of the file."""

    def __init__(self, file: Path, content: mmap.mmap, size: int) -> None:
        self.file, self.content, self.size = file, content, size
        self.position = 0
        self.what = "the header"

    def require(self, count: int) -> None:
        left = self.size - self.position
        if count > left:
            raise ValueError(f"{self.file} is truncated: {self.what} needs {count} bytes from byte {self.position} on, "
                             f"but only {left} follow")  # fmt: skip

    def numbers(self, format: str) -> tuple[Any, ...]:
        count = struct.calcsize(f"<{format}")
        self.require(count)
        found = struct.unpack_from(f"<{format}", self.content, self.position)
        self.position += count
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        self.require(length)
        raw = self.content[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file}: {self.what} is not valid UTF-8: {error}") from None

    def value(self) -> Any:
        (kind,) = self.numbers("I")
        if kind != _ARRAY:
            return self._of(kind, 1)[0]
        kind, count = self.numbers("IQ")
        if kind == _ARRAY:
            raise ValueError(f"{self.file}: {self.what} must not be an array of arrays")
        return self._of(kind, count)

    def _of(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            self.require(8 * count)  # the lengths alone: a wrong count ends here and not after a long loop
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"{self.file}: {self.what}: type must be one of 0 to 12: got {kind}")
        code = _NUMBERS[kind]
        self.require(count * struct.calcsize(f"<{code}"))
        values = list(self.numbers(f"{count}{code}"))
        if kind != _BOOL:
            return values
        if any(value > 1 for value in values):
            raise ValueError(f"{self.file}: {self.what}: a truth value must be 0 or 1: got {max(values)}")
        return [bool(value) for value in values]


def _fields(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The fields, and the number of tensors."""
    file = cursor.file
    magic, version = cursor.numbers("4sI")
    if magic != MAGIC:
        raise ValueError(f"{file} is no GGUF file: it must begin with {MAGIC!r}: got {magic!r}")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise ValueError(f"{file}: version must be 2 or 3{', little-endian' if swapped else ''}: got {version}")
    tensors, count = cursor.numbers("QQ")
    cursor.what = f"the list of {count} fields"
    cursor.require(13 * count)
    fields: dict[str, Any] = {}
    for i in range(count):
        cursor.what = f"the name of field {i}"
        key = cursor.text()
        cursor.what = f"field {key!r:.200}"
        if key in fields:
            raise ValueError(f"{file}: {cursor.what} occurs twice")
        fields[key] = cursor.value()
    return fields, tensors


def _entries(cursor: _Cursor, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """``(name, sizes, type, offset)`` of each tensor."""
    cursor.what = f"the list of {count} tensors"
    cursor.require(32 * count)
    found = []
    for i in range(count):
        cursor.what = f"the name of tensor {i}"
        name = cursor.text()
        cursor.what = f"tensor {name!r:.200}"
        (dimensions,) = cursor.numbers("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{cursor.file}: {cursor.what} must have 1 to {MAX_DIMENSIONS} sizes: got {dimensions}")
        sizes = cursor.numbers(f"{dimensions}Q")
        found.append((name, sizes, *cursor.numbers("IQ")))
    return found


def _placed(
    file: Path, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """The tensors, each of which must begin where the one before it ends."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, sizes, kind, offset in entries:
        where = f"{file}: tensor {name!r:.200}"
        if name in tensors:
            raise ValueError(f"{where} occurs twice")
        if kind not in TYPES:
            raise ValueError(f"{where}: type must be one of those of ggml up to {max(TYPES)}: got {kind}")
        type_name, block, block_bytes = TYPES[kind]
        if min(sizes) < 1 or sizes[0] % block:
            raise ValueError(f"{where}: sizes must be at least 1, the first a multiple of {block} ({type_name}): got "
                             f"{list(sizes)}")  # fmt: skip
        row_bytes = sizes[0] // block * block_bytes
        nbytes = row_bytes * math.prod(sizes[1:])
        if offset != expected:
            raise ValueError(f"{where}: offset must be {expected}, where the tensor before it ends (alignment "
                             f"{alignment}): got {offset}")  # fmt: skip
        if start + offset + nbytes > size:
            raise ValueError(f"{file} is truncated: tensor {name!r:.200} ends at byte {start + offset + nbytes}, but "
                             f"the file has {size} bytes")  # fmt: skip
        tensors[name] = TensorInfo(type_name, tuple(reversed(sizes)), row_bytes, start + offset, nbytes)
        expected += -(-nbytes // alignment) * alignment
    return tensors
