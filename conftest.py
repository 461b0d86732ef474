"""Tests and benchmarks import ``benchmarks``, which is a folder of the repository and no part of what is installed.

The folder is made known by name: with its parent on ``sys.path``, ``import lowbit`` would find the source folder too.
"""

import importlib.util
import sys
from pathlib import Path

if "benchmarks" not in sys.modules:
    spec = importlib.util.spec_from_file_location("benchmarks", Path(__file__).parent / "benchmarks" / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])
