"""The model card of a saved folder: README.md says what the folder holds and how it is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor, nn

from lowbit.nn.layer import layers, storage_of

CARD_FILE = "README.md"
_START = "<!-- lowbit wrote this section, and writes it again when the model is saved; the rest is yours -->"
_END = "<!-- end of lowbit's section -->"
_SECTION = re.compile(re.escape(_START) + ".*?" + re.escape(_END), re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\n---\r?\n", re.DOTALL)
_GENERATED = "This model card has been automatically generated"  # transformers' and the hub's templates

_PLAIN = """import lowbit

model = lowbit.load("this folder", model)  # model: the float {cls}, as its own code builds it"""
_TRANSFORMERS = """import lowbit  # before loading: it teaches transformers to read this folder
from transformers import {cls}

model = {cls}.from_pretrained("this folder")"""


def write(
    model: nn.Module, folder: str | os.PathLike[str], *, library: str | None = None, insert: bool = False
) -> None:
    """Write the card of a packed ``model`` to ``folder``, or its section in a card that has one already.

    A README.md that somebody else wrote is left as it is; with ``insert``, the section is put into it.
    """
    path = Path(folder) / CARD_FILE
    old = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    section = f"{_START}\n{_text(model, library)}\n{_END}"
    if _START in old:
        text = _SECTION.sub(lambda match: section, old)
    elif not old or _GENERATED in old:
        text = f"{_front_matter(library)}\n{section}\n"
    elif insert:
        head = _FRONT_MATTER.match(old)
        front = head.group() if head else ""
        text = f"{front}\n{section}\n\n{old[len(front) :].lstrip()}"
    else:
        return
    path.write_text(text, encoding="utf-8")


def _front_matter(library: str | None) -> str:
    name = f"library_name: {library}\n" if library else ""
    return f"---\n{name}tags:\n- lowbit\n---\n"


def _text(model: nn.Module, library: str | None) -> str:
    cls = type(model).__name__
    code = (_TRANSFORMERS if library else _PLAIN).format(cls=cls)
    package = f"lowbit[{library}]" if library else "lowbit"
    without = " Without it, transformers stops with a size mismatch." if library else ""
    table = "\n".join(
        f"| {name} | {count or ''} | {before / 1e6:.2f} | {after / 1e6:.2f} |"
        for name, count, before, after in _rows(model)
    )
    return f"""# {cls}, stored in few bits

The layers of this model are stored compressed, and the Python package lowbit computes with that form. Loading the model
needs that package.{without}

```
pip install "{package}"
```

```python
{code}
```

| stored as | layers | MB as floats | MB here |
|---|---|---|---|
{table}
"""


def _rows(model: nn.Module) -> list[tuple[str, int, int, int]]:
    """(scheme, layers, bytes as floats, bytes) of every scheme, of the rest, and of all; shared weights count once."""
    groups: dict[str, list[int]] = {}
    seen: set[tuple[int, ...]] = set()
    packed: set[int] = set()
    for layer in layers(model).values():
        row = groups.setdefault(layer.format.describe(), [0, 0, 0])
        row[0] += 1
        packed.update(id(tensor) for tensor in layer.named_tensors().values())
        if storage_of(layer) not in seen:
            seen.add(storage_of(layer))
            row[1] += layer.weights * layer.dtype.itemsize
            row[2] += layer.format.nbytes
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    rest = sum({id(t): t.nbytes for t in tensors if id(t) not in packed}.values())
    count, before, after = (sum(row[i] for row in groups.values()) for i in range(3))
    rows = [(name, row[0], row[1], row[2]) for name, row in groups.items()]
    return [*rows, ("not packed", 0, rest, rest), ("all", count, before + rest, after + rest)]
