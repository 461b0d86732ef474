"""Checked reading of safetensors files: every header field is validated before a byte of data is used.

Tensors are read one at a time with plain file reads into memory of their own, so that what stays resident is
the tensors that were kept and never the mapped file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# https://github.com/huggingface/safetensors#format: u64 header length, JSON header, data
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``nbytes`` bytes at ``offset`` of ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate name {twice!r}")
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ``ValueError`` naming the file, and a name that occurs twice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(file: Path, name: str, fields: Any, data_start: int) -> Entry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have the fields dtype, shape and data_offsets: got {fields!r:.200}")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}: got {fields['dtype']!r}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise ValueError(f"{where}: shape must be a list of sizes: got {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ValueError(f"{where}: data_offsets must be two byte positions: got {offsets!r}")
    dtype, (begin, end) = DTYPES[fields["dtype"]], offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise ValueError(
            f"{where}: data_offsets must span the {nbytes} bytes of {fields['dtype']} {shape}: got {offsets}"
        )
    return Entry(file, dtype, tuple(shape), data_start + begin, nbytes)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one safetensors file, by name, and its free-form metadata.

    Raises:
        ValueError: naming the file, the tensor and the field that is wrong: a truncated file, a header that
            is too long or not JSON, an unknown dtype, a shape that disagrees with its bytes, data that
            overlap or leave gaps.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        if size < 8:
            raise ValueError(f"{file} is truncated: a safetensors file has at least 8 bytes, got {size}")
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: the header may have at most {MAX_HEADER_BYTES} bytes: got {length}")
        if length > size - 8:
            raise ValueError(f"{file} is truncated: its header has {length} bytes, but only {size - 8} follow")
        try:
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique)
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{file}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header must be a JSON object: got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: __metadata__ must map names to strings: got {metadata!r:.200}")
    start = 8 + length
    entries = {name: _parse_entry(file, name, fields, start) for name, fields in header.items()}
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            problem = "overlap another tensor's" if entry.offset < position else "leave a gap"
            raise ValueError(
                f"{file}: tensor {name!r}: data_offsets {problem}: got {entry.offset - start}, "
                f"but the data before end at {position - start}"
            )
        position += entry.nbytes
        if position > size:
            raise ValueError(
                f"{file} is truncated: tensor {name!r}: data_offsets end at {position - start}, "
                f"but the file holds {size - start} bytes of data"
            )
    if position != size:
        raise ValueError(f"{file}: the tensors end at byte {position}, but the file has {size} bytes")
    return entries, metadata


class Checkpoint:
    """The tensors of a folder: of ``model.safetensors``, or of the shards that its index names.

    Opening reads and checks the headers only; :meth:`read` gives one tensor.

    Raises:
        FileNotFoundError: the folder has neither file, or a shard is missing.
        ValueError: an invalid header or index, see :func:`read_header`.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            entries, metadata = read_header(file)
            for name in entries:
                if name in self.entries:
                    raise ValueError(f"{file}: tensor {name!r} is also in {self.entries[name].file.name}")
            self.entries.update(entries)
            self.metadata.update(metadata)

    @classmethod
    def of_folder(cls, folder: Path) -> Checkpoint:
        """Open ``model.safetensors`` or the sharded ``model.safetensors.index.json`` of ``folder``."""
        index_file = folder / INDEX_FILE
        if (folder / SINGLE_FILE).is_file():
            if index_file.is_file():
                raise ValueError(f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}: remove the one that is left over")
            return cls([folder / SINGLE_FILE])
        if not index_file.is_file():
            pickled = next(iter(sorted(folder.glob("*.bin"))), None)
            hint = f"; {pickled.name} is pickled: save its tensors with safetensors" if pickled else ""
            raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index_file}: weight_map must map tensor names to file names")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            # a shard is a plain file name: an index must not be able to name files elsewhere
            if shard != os.path.basename(shard) or not (folder / shard).is_file():
                raise FileNotFoundError(f"{index_file}: weight_map names the shard {shard!r}, which does not exist")
        checkpoint = cls(folder / shard for shard in shards)
        for name in sorted(set(weight_map) ^ set(checkpoint.entries)):
            side = "in the index but in no shard" if name in weight_map else "in a shard but not in the index"
            raise ValueError(f"{index_file}: tensor {name!r} is {side}")
        return checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        return self._read(name, entry.shape, entry.offset)

    def read_part(self, name: str, index: int, count: int) -> Tensor:
        """One of ``count`` equal parts of a tensor, and no more of the file: ``read(name)[index]`` where it has three
        dimensions, ``read(name).chunk(count)[index]`` where it has two."""
        entry = self.entries[name]
        shape = entry.shape[1:] if len(entry.shape) == 3 else (entry.shape[0] // count, *entry.shape[1:])
        return self._read(name, shape, entry.offset + index * math.prod(shape) * entry.dtype.itemsize)

    def _read(self, name: str, shape: tuple[int, ...], offset: int) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(shape, dtype=entry.dtype, device="cpu")
        nbytes = tensor.numel() * tensor.itemsize
        if nbytes == 0:
            return tensor
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(entry.file, "rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < nbytes:  # one read gives at most 2 GiB
                count = stream.readinto(view[done:])
                if not count:
                    raise ValueError(f"{entry.file} is truncated: tensor {name!r} ends after {done} bytes")
                done += count
        return tensor

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """Raise ``ValueError`` unless tensor ``name`` has this shape (and dtype), naming file, tensor and field."""
        entry = self.entries[name]
        if entry.shape != tuple(shape):
            raise ValueError(f"{entry.file}: tensor {name!r}: shape must be {tuple(shape)}: got {entry.shape}")
        if dtype is not None and entry.dtype != dtype:
            raise ValueError(f"{entry.file}: tensor {name!r}: dtype must be {dtype}: got {entry.dtype}")
