"""Memory that vLLM takes to load a folder, over the bytes of its tensors: packed beside float.

    python -m benchmarks.models.vllm_throughput --make FOLDER --depth 5     # a Llama of 350 M random weights
    python -m benchmarks.models.vllm_memory FOLDER/float FOLDER/packed

*Peak* and *after* are memory of the process's own (``RssAnon``) beyond what it had before the model was made; pages of
the mapped files, which the system can drop, are counted by themselves. Each folder is loaded in a process of its own,
with x in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def resident() -> tuple[int, int]:
    """Bytes of the process's own, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


def load(folder: Path) -> None:
    """Print what loading took; in a process of its own."""
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original: Any = BaseModelLoader.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, peaks, done = resident(), [0, 0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                for i, (now, start) in enumerate(zip(resident(), before, strict=True)):
                    peaks[i] = max(peaks[i], now - start)
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        model = original(self, *args, **kwargs)
        done.set()
        thread.join()
        held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        after = resident()[0] - before[0]
        print(f"FOUND | {folder} | {held / 1e6:.0f} MB | {peaks[0] / held:.2f} | {after / held:.2f} | "
              f"{peaks[1] / held:.2f} |", flush=True)  # fmt: skip
        return model

    BaseModelLoader.load_model = load_model
    LLM(str(folder), dtype="bfloat16", max_model_len=64, max_num_seqs=1, enforce_eager=True, skip_tokenizer_init=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        load(given.folders[0])
        return
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "0",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}  # fmt: skip
    print("| folder | files | peak | after | mapped files |\n|---|---|---|---|---|")
    for folder in given.folders:
        command = [sys.executable, "-m", "benchmarks.models.vllm_memory", "--child", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
        if line is None:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        print(line.removeprefix("FOUND "), flush=True)


if __name__ == "__main__":
    main()
