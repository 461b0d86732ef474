"""Python in a process of its own: kernels compile only where Triton's interpreter is off, for all of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lowbit


def outside_interpreter(*arguments: str, root: Path) -> subprocess.CompletedProcess[bytes]:
    """``python arguments...`` without Triton's interpreter, in ``root``, whose benchmarks it may import."""
    paths = [str(Path(lowbit.__file__).parents[1]), str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True)
