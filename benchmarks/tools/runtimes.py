"""Whether compiled libraries run on manylinux_2_28: the symbols of glibc and libstdc++ that they ask for.

    python -m benchmarks.tools.runtimes LIBRARY ...     names those that are too new; `make wheel` asks
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# PEP 600's policy of manylinux_2_28, which is that of AlmaLinux 8
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


def asked_for(library: Path) -> list[str]:
    """``name@VERSION_1.2`` of every symbol that another library must have."""
    command = ["readelf", "--wide", "--dyn-syms", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\bUND\s+(\w+@\w+[\d.]*)", text)


def too_new(library: Path) -> list[str]:
    """Those that manylinux_2_28 has not."""
    found = []
    for symbol in asked_for(library):
        parts = re.fullmatch(r"\w+@([A-Z]+)_([\d.]+)", symbol)
        if parts and parts[1] in NEWEST and tuple(map(int, parts[2].split("."))) > NEWEST[parts[1]]:
            found.append(symbol)
    return found


def main(arguments: Sequence[str]) -> int:
    wrong = {Path(name): too_new(Path(name)) for name in arguments}
    for library, symbols in wrong.items():
        if symbols:
            print(f"{library}: needs newer libraries than manylinux_2_28 has: {', '.join(symbols)}", file=sys.stderr)
    return int(any(wrong.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
