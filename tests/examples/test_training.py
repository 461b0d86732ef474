"""The examples of training: the shortest run of one, which asserts that what is deployed is what was trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.testing import samples

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "training"
if not FOLDER.is_dir():
    pytest.skip("not run from a source checkout", allow_module_level=True)


def test_the_shortest_run():
    pytest.importorskip("transformers")
    samples.folder("stories260k")
    command = [sys.executable, FOLDER / "quantgpt.py", "--bits", "2-2-8", "--steps", "1", "--seeds", "1"]
    environment = {**os.environ, "LOWBIT_SHARED": str(samples.DATA.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["perplexity"] < row["untrained"] and row["times smaller"] > 11
