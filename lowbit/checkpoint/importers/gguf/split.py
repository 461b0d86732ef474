"""Models in several GGUF files, as llama.cpp's gguf-split and its converter write them.

    NAME-00001-of-0000N.gguf    split.no u16 = 0, split.count u16 = N, split.tensors.count i32, and all other fields
    NAME-0000I-of-0000N.gguf    split.no = I - 1, and the two counts

Each has some of the tensors; the first may have none. Source: github.com/ggml-org/llama.cpp (tools/gguf-split,
src/llama-model-loader.cpp, gguf-py/gguf/gguf_writer.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.importers.gguf.container import GgufFile

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_gguf(file: Path) -> GgufFile:
    """The fields and tensors of a file, or of all files that it is one of.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: naming the file, and the field or tensor that is wrong.
    """
    content = GgufFile(file)
    count = content.fields.get(COUNT, 1)
    if type(count) is not int or not 1 <= count < 1 << 16:
        raise ValueError(f"{file}: field {COUNT!r} must be 1 to {(1 << 16) - 1}: got {count!r:.200}")
    return content if count == 1 else _Parts(file, count)


def first_of(files: list[Path]) -> Path | None:
    """The first of files whose names say that they are the parts of one model; ``None`` for others."""
    named = [_NAME.fullmatch(file.name) for file in files]
    if not files or len({(found[1], found[3]) if found else None for found in named}) != 1 or named[0] is None:
        return None
    return files[0] if len(files) == int(named[0][3]) else None


class _Parts(GgufFile):
    """All parts as one file: the fields of the first, but for those of the split."""

    def __init__(self, file: Path, count: int) -> None:
        found = _NAME.fullmatch(file.name)
        if found is None or int(found[3]) != count:
            raise ValueError(f"{file} is one of {count} files: its name must end with -00001-of-{count:05}.gguf, or "
                             "another number up to that")  # fmt: skip
        files = [file.with_name(f"{found[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
        for part in files:
            if not part.is_file():
                raise FileNotFoundError(f"{part} does not exist: {file.name} is one of {count} files")
        self.parts: dict[str, GgufFile] = {}
        contents = [GgufFile(part) for part in files]
        self.file, self.tensors = files[0], {}
        self.fields: dict[str, Any] = {k: v for k, v in contents[0].fields.items() if k not in (NO, COUNT, TENSORS)}
        total = sum(len(content.tensors) for content in contents)
        for i, content in enumerate(contents):
            for key, expected in ((NO, i), (COUNT, count), (TENSORS, total)):
                if (value := content.fields.get(key)) != expected or isinstance(value, bool):
                    raise ValueError(f"{content.file}: field {key!r} must be {expected} (part {i + 1} of {count}, "
                                     f"{total} tensors in all): got {value!r:.200}")  # fmt: skip
            for key, value in content.fields.items():
                if key not in (NO, COUNT, TENSORS) and (key not in self.fields or self.fields[key] != value):
                    raise ValueError(f"{content.file}: field {key!r:.200} must be as in {self.file.name}")
            for name, info in content.tensors.items():
                if name in self.parts:
                    raise ValueError(f"{content.file}: tensor {name!r:.200} is also in {self.parts[name].file.name}")
                self.parts[name], self.tensors[name] = content, info

    def file_of(self, name: str) -> Path:
        return self.parts[name].file

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        return self.parts[name].read(name, first, count)
