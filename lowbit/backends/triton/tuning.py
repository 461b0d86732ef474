"""Which configuration a kernel runs with: a table, not code.

``tuned.json`` ships rows per architecture; each says how it was obtained. ``lowbit.tune`` measures rows for the GPU and
the layers at hand, and adds them to the user's file, ``$LOWBIT_CACHE/tuned.json`` (default ``~/.cache/lowbit``).
Nothing is tuned while a model runs. Where that file cannot be read or written, lowbit warns once and ignores the file.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from lowbit.backends import invariance
from lowbit.backends.triton.launch import Target
from lowbit.backends.triton.tiles import tiles_per_row
from lowbit.core.family import dtype_name

Row = dict[str, Any]
FORMAT = 1
LARGEST_M = 4096  # stands for "any larger M" where a regime has no end
# What M a batch-invariant run takes its one configuration from.
_INVARIANT_M = 64

_SHIPPED = Path(__file__).with_name("tuned.json")
_MEASURED_FIELDS = {"kernel": str, "arch": str, "x": list, "bits": list, "n": int, "k": int, "max_m": int}


@dataclass(frozen=True)
class Config:
    """How a matrix product is cut: ``block_n`` rows of W by ``block_m`` rows of x per program, K into ``split`` parts.

    ``dense``: dequantize W into a temporary and call the library's matrix product instead.
    """

    block_n: int = 64
    block_m: int = 16
    warps: int = 4
    stages: int = 3
    split: int = 1
    dense: bool = False


@dataclass(frozen=True)
class Question:
    """What a configuration is chosen for: ``x [m, k]`` (int8: quantized) times W ``[n, k]`` of ``bits`` bits.

    ``experts``: that many such products in one launch, of a stack of experts; 0: one product.
    """

    target: Target
    kernel: str
    x: torch.dtype
    bits: int
    m: int
    n: int
    k: int
    experts: int = 0


_forced: Config | None = None
_asked: list[Question] | None = None


def choose(
    target: Target, kernel: str, x: torch.dtype, bits: int, m: int, n: int, k: int, experts: int = 0
) -> Config:
    """The configuration of ``kernel`` for ``x [m, k]`` of dtype ``x`` (int8: quantized) and W ``[n, k]``, or for as
    many such products as there are ``experts``.

    Raises:
        LookupError: the table has no row for this architecture and kernel.
    """
    if _asked is not None:
        _asked.append(Question(target, kernel, x, bits, m, n, k, experts))
    if _forced is not None:
        return _forced
    return _choose(Question(target, kernel, x, bits, rows_for_launches(m), n, k, experts), invariance.on_gpu())


def rows_for_launches(m: int) -> int:
    """The number of rows that launches are made for: m; always the same where results must not depend on the batch."""
    return _INVARIANT_M if invariance.on_gpu() else m


@lru_cache(maxsize=1 << 14)
def _choose(question: Question, invariant: bool) -> Config:
    q = question
    for row in [*([] if invariant else _measured()), *_shipped()]:
        if _fits(row, q) and not (invariant and row.get("dense")):
            return _config(row, q)
    what = f"kernel={q.kernel}, arch={q.target.name}, x={dtype_name(q.x)}, bits={q.bits}, M={q.m}"
    raise LookupError(f"tuned.json has no row for {what}")


def _fits(row: Row, q: Question) -> bool:
    return (
        row["kernel"] == q.kernel
        and row["arch"] in (q.target.name, q.target.backend)
        and dtype_name(q.x) in row["x"]
        and q.bits in row.get("bits", (q.bits,))
        and q.m <= row.get("max_m", q.m)
        and (q.n, q.k) == (row.get("n", q.n), row.get("k", q.k))
    )


def _config(row: Row, q: Question) -> Config:
    if row.get("dense"):
        return Config(dense=True)
    block_n, block_m = row["block_n"], row["block_m"]
    split = row.get("split", 1)
    if "waves" in row:
        programs = max(1, -(-q.n // block_n) * -(-q.m // block_m)) * max(1, q.experts)
        most = min(row["max_split"], tiles_per_row(q.k))
        while split * 2 <= most and programs * split * 2 <= row["waves"] * q.target.processors:
            split *= 2
    return Config(block_n, block_m, row["warps"], row["stages"], split)


def regimes(target: Target, kernel: str, x: torch.dtype, bits: int) -> list[int]:
    """The largest M of each shipped row that a call may use; LARGEST_M for a row without a limit."""
    found: list[int] = []
    for row in _shipped():
        most = row.get("max_m", LARGEST_M)
        if _fits(row, Question(target, kernel, x, bits, 1, 1, 1)) and most > max(found, default=0):
            found.append(most)
    return found


@cache
def _shipped() -> list[Row]:
    rows: list[Row] = json.loads(_SHIPPED.read_text())["rows"]
    return rows


@contextmanager
def using(config: Config) -> Iterator[None]:
    """Within it every product takes this configuration."""
    global _forced
    before = _forced
    try:
        _forced = config
        yield
    finally:
        _forced = before


@contextmanager
def asking() -> Iterator[list[Question]]:
    """The questions that :func:`choose` answers within it."""
    global _asked
    before = _asked
    try:
        _asked = []
        yield _asked
    finally:
        _asked = before


# ------------------------------------------------------------------------------------------ the user's measured rows


def cache_file() -> Path:
    """Where measured rows are kept: ``$LOWBIT_CACHE/tuned.json``, else below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    folder = os.environ.get("LOWBIT_CACHE")
    if folder:
        return Path(folder) / "tuned.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "tuned.json"


@cache
def _measured() -> list[Row]:
    """The user's rows, those of smaller M first."""
    return sorted(_read(cache_file()), key=lambda row: int(row["max_m"]))


def _read(file: Path) -> list[Row]:
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        warnings.warn(f"lowbit's tuned configurations are not used: {error}", RuntimeWarning, stacklevel=2)
        return []
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}: got {content['format']!r}")
        for row in content["rows"]:
            _check_row(row)
        return list(content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file}: lowbit's tuned configurations are not used: {error}", RuntimeWarning, stacklevel=2)
        return []


def _check_row(row: Row) -> None:
    for name, kind in _MEASURED_FIELDS.items():
        if not isinstance(row[name], kind):
            raise ValueError(f"{name} must be of type {kind.__name__}: got {name}={row[name]!r:.100}")
    if row.get("dense") is True:
        return
    for name in ("block_n", "block_m", "warps", "stages", "split"):
        value = row[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1: got {name}={value!r:.100}")
    for name in ("block_n", "block_m"):
        if row[name] < 16 or row[name] & (row[name] - 1):
            raise ValueError(f"{name} must be a power of two of at least 16: got {name}={row[name]}")


def remember(rows: list[Row]) -> None:
    """Use measured rows from now on, and add them to the user's file, replacing rows for the same layers.

    The file is replaced as a whole or not at all. Where it cannot be replaced, the rows serve this process only, with a
    warning.
    """
    file = cache_file()
    merged = {_key(row): row for row in [*_read(file), *_measured(), *rows]}
    _measured.cache_clear()
    _choose.cache_clear()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
            lines = ",\n".join(json.dumps(row) for row in merged.values())
            temporary.write(f'{{\n"format": {FORMAT},\n"rows": [\n{lines}\n]\n}}\n')
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"lowbit's tuned configurations serve this process only: {error}", RuntimeWarning, stacklevel=2)
    _measured()[:] = sorted(merged.values(), key=lambda row: int(row["max_m"]))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(str(row[name]) for name in _MEASURED_FIELDS)
