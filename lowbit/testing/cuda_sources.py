"""Which texts a CUDA C++ kernel is compiled from, and what they depend on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path


def included(csrc: Path, source: str, besides: Collection[str] = ()) -> dict[str, str]:
    """By path below ``csrc``, the text of ``source`` and of all that it includes, directly or not, without comments.

    Files of ``besides`` are left out.
    """
    texts: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name not in texts and name not in besides:
            text = (csrc / name).read_text(encoding="utf-8")
            texts[name] = re.sub(r"//[^\n]*", "", text)
            waiting += re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE)
    return texts


def used(texts: dict[str, str]) -> Iterator[str]:
    """The paragraphs of texts, without device functions that nothing calls: other kernels' are in the same headers.

    A paragraph that begins as a device function counts if the name of one of its functions is in another that counts.
    """
    paragraphs = [part for name, text in sorted(texts.items()) for part in [name, *re.split(r"\n\s*\n", text)]]
    start = re.compile(r"\s*(?:template\s*<[^>]*>\s*)?LOWBIT_DEVICE\s")
    name_of = re.compile(r"LOWBIT_DEVICE\s[^(]*?(\w+)\(")
    functions = {i: set(name_of.findall(part)) for i, part in enumerate(paragraphs) if start.match(part)}
    kept = {i for i in range(len(paragraphs)) if i not in functions}
    words = {word for i in kept for word in re.findall(r"\w+", paragraphs[i])}
    while more := {i for i, names in functions.items() if i not in kept and names & words}:
        kept |= more
        words |= {word for i in more for word in re.findall(r"\w+", paragraphs[i])}
    return (" ".join(paragraphs[i].split()) for i in sorted(kept))


def widths(csrc: Path, source: str, every: Collection[int]) -> tuple[int | None, ...]:
    """The values of LOWBIT_BITS that a source is compiled with; None: it has no LOWBIT_BITS and is compiled once."""
    text = (csrc / source).read_text(encoding="utf-8")
    return tuple(every) if re.search(r"\bLOWBIT_BITS\b", text) else (None,)
