"""A run in parts: each has its share of the time, its own process and its own section of one results file.

A section is written as soon as its part has finished, beside the sections that are there already. So a run that is
killed keeps what it has, and ``--part`` repeats one part alone. Each part is a process of its own, because after one
illegal access no other kernel runs in the same CUDA context.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEASURING = ("benchmarks/gpu", "benchmarks/harness", "benchmarks/peers")

# The exit status of a part that lost its device and can go on in a new process.
LOST = 75

# What an interrupted command may take to end by itself, and what a part may take to write its section after its time.
PATIENCE, GRACE = 12.0, 20.0

Section = dict[str, Any]


class Budget:
    """Seconds that may still pass; ``clock`` counts them."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()

    def __bool__(self) -> bool:
        return self.left() > 0


class Results:
    """The sections of one device in one JSON file: ``{"device": name, "sections": {part: section}}``.

    Reading always reads the file, so several processes may write, one after the other.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.path = folder / f"gpu-{slug(device)}.json"

    def sections(self) -> dict[str, Section]:
        if not self.path.is_file():
            return {}
        sections: dict[str, Section] = json.loads(self.path.read_text())["sections"]
        return sections

    def section(self, name: str) -> Section:
        return self.sections().get(name, {})

    def write(self, name: str, section: Section) -> None:
        """Replace one section and keep the others; a reader never sees half a file."""
        sections = {**self.sections(), name: section}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.new")
        beside.write_text(to_json({"device": self.device, "sections": sections}))
        os.replace(beside, self.path)


@dataclass(frozen=True)
class Context:
    """What a part is given."""

    budget: Budget
    results: Results
    fresh: bool = False  # measure again what an earlier run has measured

    @property
    def machine(self) -> Section:
        """The section of part ``machine``: the limits that other parts compare with; empty before it ran."""
        return self.results.section("machine")


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Args:
        run: context -> section; ``"problems"`` in it lists what is wrong, ``"left_out"`` what time did not allow.
        share: of the time, relative to the parts that are still to come.
        needs_gpu: whether it is left out on a machine without one.
    """

    name: str
    run: Callable[[Context], Section]
    share: float
    needs_gpu: bool = True


@dataclass
class Runner:
    """Runs parts in order. ``launch`` runs one of them for that many seconds and returns what went wrong, or None."""

    parts: Sequence[Part]
    results: Results
    budget: Budget
    launch: Callable[[Part, float], str | None]
    say: Callable[[str], None] = print
    skipped: list[str] = field(default_factory=list)

    def run(self) -> None:
        for i, part in enumerate(self.parts):
            seconds = self.budget.left() * part.share / sum(later.share for later in self.parts[i:])
            if seconds < 1:
                self.skipped.append(part.name)
                continue
            self.say(f"== {part.name} ({seconds:.0f} s)")
            problem = self.launch(part, seconds)
            if problem is not None:
                # what the part had written before it ended, or an earlier run had, keeps its own date and commit
                kept = {**stamp(), **self.results.section(part.name)}
                failure = {"status": "failed", "error": problem, "failed": stamp()}
                self.results.write(part.name, {**kept, **failure})


def run_here(part: Part, context: Context) -> Section:
    """Run a part in this process and write its section; a part that raises becomes a failed section."""
    start = time.monotonic()
    try:
        section = part.run(context)
        failed, unfinished = bool(section.get("problems")), bool(section.get("left_out"))
        status = "failed" if failed else "incomplete" if unfinished else "passed"
    except Exception:
        section, status = {"error": traceback.format_exc(limit=8)}, "failed"
    section = {"status": status, **stamp(), "seconds": round(time.monotonic() - start, 1), **section}
    context.results.write(part.name, section)
    return section


def launch_process(out: Path, fresh: bool = False) -> Callable[[Part, float], str | None]:
    """A ``launch`` for :class:`Runner` that gives every part a process, and ends it when it overstays."""

    def launch(part: Part, seconds: float) -> str | None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--seconds", str(round(seconds, 1))]
        command += ["--out", str(out), "--in-process"] + ["--fresh"] * fresh
        budget = Budget(seconds)
        while True:
            finished = execute(command, budget.left() + GRACE, echo=True)
            if finished.code == 0:
                return None
            if finished.code != LOST or budget.left() < GRACE:
                return f"{finished.why}\n{finished.tail}".strip()
            command[command.index("--seconds") + 1] = str(round(budget.left(), 1))
            if fresh and "--fresh" in command:
                command.remove("--fresh")  # a part that lost its device goes on from the rows that it has

    return launch


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit status (None: it overstayed), and its last lines."""

    code: int | None
    tail: str

    @property
    def why(self) -> str:
        return "it ran past its time" if self.code is None else f"exit status {self.code}"


def execute(
    command: Sequence[str], seconds: float, *, env: dict[str, str] | None = None, echo: bool = False, lines: int = 60
) -> Finished:
    """Run a command from the repository's root for at most ``seconds``; then its whole process group ends.

    Then it is interrupted, so that pytest can still write its report, and what is left of it is killed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**(env or {})), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=lines)
    reader = threading.Thread(target=_read, args=(process, tail, echo), daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    finally:  # also when this process is itself interrupted
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(timeout=5)
    return Finished(code, "".join(tail))


def _read(process: subprocess.Popen[str], tail: deque[str], echo: bool) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        tail.append(line)
        if echo:
            print(line, end="", flush=True)


def environment(**changes: str) -> dict[str, str]:
    """Of every child: this checkout first on the path, one CPU thread each, nothing that keeps kernels off the GPU."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LOWBIT_BACKEND")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


def stamp() -> Section:
    """When, and of which commit."""
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}


def commit() -> str | None:
    """The checkout's commit, with ``+`` where files differ from it; None without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        run = [*git, "rev-parse", "--short=12", "HEAD"]
        head = subprocess.run(run, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        # results and the report change while they are made: they are not what is measured
        paths = ["--", "lowbit", "csrc", "tests", *MEASURING, "setup.py"]
        run = [*git, "status", "--porcelain", "--untracked-files=no", *paths]
        changed = subprocess.run(run, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        return head + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None


def sources() -> str:
    """One hash of everything that a measurement depends on: the package, and how it is measured."""
    digest = hashlib.sha256()
    for folder in ("lowbit", *MEASURING):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cu") and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def slug(name: str) -> str:
    """``nvidia-h200`` of ``NVIDIA H200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def choose(parts: Iterable[Part], names: str | None) -> list[Part]:
    """The parts named in ``names`` (comma-separated; None: all), in their own order.

    Raises:
        ValueError: a name is not a part's.
    """
    parts = list(parts)
    if names is None:
        return parts
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [part.name for part in parts]
    for name in wanted:
        if name not in known:
            raise ValueError(f"part must be one of {', '.join(known)}: got part={name!r}")
    if not wanted:
        raise ValueError(f"part must name at least one of {', '.join(known)}: got part={names!r}")
    return [part for part in parts if part.name in wanted]


def to_json(content: dict[str, Any]) -> str:
    """JSON with one row per line, so that two results files can be compared line by line."""
    text = json.dumps(content, indent=1, default=str)
    # a list of flat objects: one object per line
    return re.sub(r"\{\n\s+([^{}\[\]]+?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m.group(1)) + "}", text) + "\n"
