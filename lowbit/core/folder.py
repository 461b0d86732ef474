"""What a saved folder says of itself before anything in it is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DESCRIPTION_FILE = "lowbit.json"  # of a plain module; other libraries' models have theirs in config.json
_SECTIONS = ("quantization_config", "compression_config")


def sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every ``quantization_config`` of a configuration and of those nested in it."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            if key in _SECTIONS:
                yield value
            else:
                yield from sections(value)
        elif value and key in _SECTIONS:  # no form that a library writes: what it names is not read either
            yield {"quant_method": value if isinstance(value, str) else "unknown"}


def is_packed(folder: Path) -> bool:
    """Whether lowbit saved the model in ``folder``; no for a ``config.json`` that cannot be read."""
    if (folder / DESCRIPTION_FILE).is_file():
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return any(section.get("quant_method") == "lowbit" for section in sections(config))
    return False
