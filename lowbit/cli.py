"""The command ``lowbit``: ``convert``, ``inspect``, ``bench`` and ``doctor``.

Exit status: 0, 2 for a usage error or bad input, 1 for any other failure. An error is one line on stderr;
``LOWBIT_DEBUG=1`` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit.checkpoint.folder import DESCRIPTION_FILE
from lowbit.checkpoint.metadata import Metadata, parse
from lowbit.checkpoint.reader import Checkpoint, read_json
from lowbit.layer import FLOAT_DTYPES, Layer, build
from lowbit.packed.format import ACTIVATIONS, GRANULARITIES, QUANTIZERS, Granularity
from lowbit.report import Report, Row

BENCH_SHAPES = [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]
BENCH_SECONDS = 0.2
# Weights in rotation while timing: more than most last-level caches hold.
BENCH_BYTES = 96 << 20
CALIBRATION_LENGTH = 512  # tokens of one calibration sample


# ------------------------------------------------------------------------------------------ convert


def _spec(options: argparse.Namespace) -> lowbit.Packed:
    granularity: Granularity = options.granularity or "group"
    group_size = options.group_size
    if group_size is None and granularity == "group":
        group_size = 64
    return lowbit.Packed(
        bits=options.bits,
        group_size=group_size,
        granularity=granularity,
        symmetric=options.symmetric,
        zeros=options.zeros,
        quantizer=options.quantizer,
        gamma=options.gamma,
        activations=options.activations,
        outliers=options.outliers,
        scale_dtype=None if options.scale_dtype is None else FLOAT_DTYPES[options.scale_dtype],
    )


def calibration_batches(folder: Path, text: Path) -> list[dict[str, Tensor]]:
    """One batch per non-empty line of ``text``, tokenized with the tokenizer of ``folder``."""
    from transformers import AutoTokenizer

    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--calibration-text must hold at least one line of text: {text} is empty")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        dict(tokenizer(line, truncation=True, max_length=CALIBRATION_LENGTH, return_tensors="pt"))
        for line in lines
    ]  # fmt: skip


def _convert(options: argparse.Namespace) -> None:
    spec = _spec(options)
    if not options.source.is_dir():
        raise FileNotFoundError(f"SRC must be a folder with a transformers model: {options.source} is not one")
    if spec.needs_calibration and options.calibration_text is None:
        what = "--quantizer gptq" if spec.quantizer == "gptq" else "--activations int8_static"
        raise ValueError(f"{what} needs --calibration-text FILE, a text file with one sample per line")
    calibration = None
    if spec.needs_calibration:
        calibration = calibration_batches(options.source, options.calibration_text)
    start = time.perf_counter()
    lowbit.convert_folder(options.source, options.target, spec, skip=options.skip, calibration=calibration)
    print(describe_folder(options.target))
    print(f"written to {options.target} in {time.perf_counter() - start:.1f} s")


# ------------------------------------------------------------------------------------------ inspect


@dataclass(frozen=True)
class Folder:
    """A packed folder as its headers describe it: every layer's empty form, and the tensors in the files."""

    layers: dict[str, Layer]
    metadata: Metadata
    checkpoint: Checkpoint
    shared: dict[str, str]


def open_folder(path: Path) -> Folder:
    """Read and check the description and the headers of a packed folder; no weight is read, no model built.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the file, and the tensor or field that is wrong.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    description, file = _description(path)
    shared = description.pop("shared", {})
    if not isinstance(shared, dict):
        raise ValueError(f"{file}: shared must be an object: got {shared!r:.200}")
    try:
        metadata = parse(description)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    checkpoint = Checkpoint.of_folder(path)
    layers = {name: build(config) for name, config in metadata.layers.items()}
    storage = {name: group[0] for group in metadata.tied for name in group}
    for name, layer in layers.items():
        for tensor, (shape, dtype) in layer.format.tensors().items():
            key = f"{name}.{tensor}" if name else tensor
            if key in checkpoint:
                checkpoint.check(key, shape, dtype)
            elif key not in shared and storage.get(name, name) == name:
                raise ValueError(f"{path}: tensor {key!r} is missing: {dtype} {list(shape)} is described")
    return Folder(layers, metadata, checkpoint, shared)


def _description(path: Path) -> tuple[dict[str, Any], Path]:
    if (path / DESCRIPTION_FILE).is_file():
        return read_json(path / DESCRIPTION_FILE), path / DESCRIPTION_FILE
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has neither {DESCRIPTION_FILE} nor config.json: not a packed folder")
    description = read_json(file).get("quantization_config")
    if not isinstance(description, dict) or description.pop("quant_method", None) != "lowbit":
        raise ValueError(f"{file}: quantization_config must have quant_method 'lowbit': not a packed folder")
    return description, file


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``h.2`` before ``h.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def describe_folder(path: Path) -> Report:
    """The report of a packed folder, from its headers alone."""
    folder = open_folder(path)
    storage = {name: group[0] for group in folder.metadata.tied for name in group}
    rows = []
    for name in sorted(folder.layers, key=_natural):
        layer = folder.layers[name]
        row = Row.planned(name, layer.kind, layer.format, layer.dtype)
        row.weight_error, row.note = folder.metadata.weight_error.get(name), folder.metadata.notes.get(name)
        if storage.get(name, name) != name:
            row.share(storage[name])
        rows.append(row)
    after = sum(entry.nbytes for entry in folder.checkpoint.entries.values())
    before = after + sum(row.bytes_before - row.bytes_after for row in rows)
    return Report(rows, folder.metadata.skipped, before, after)


def _inspect(options: argparse.Namespace) -> None:
    print(describe_folder(options.folder))


# -------------------------------------------------------------------------------------------- bench


def _seconds(call: Callable[[Any], Tensor], weights: Sequence[Any]) -> float:
    """Median time of ``call`` on the weights in turn, for about ``BENCH_SECONDS``."""
    samples: list[float] = []
    turn = itertools.cycle(weights)
    call(next(turn))
    end = time.perf_counter() + BENCH_SECONDS
    while time.perf_counter() < end or len(samples) < 5:
        weight = next(turn)
        start = time.perf_counter()
        call(weight)
        samples.append(time.perf_counter() - start)
    return sorted(samples)[len(samples) // 2]


def _copies(weight: Any, nbytes: int) -> list[Any]:
    return [weight] + [copy.deepcopy(weight) for _ in range(min(400, BENCH_BYTES // nbytes))]


def _spec_of(format: lowbit.PackedFormat) -> lowbit.Packed:
    """A spec that gives a float weight the stored form ``format``."""
    return lowbit.Packed(
        bits=format.bits,
        group_size=format.group_size if format.granularity == "group" else None,
        granularity=format.granularity,
        symmetric=format.zeros == "none",
        zeros="float" if format.zeros == "float" else "int",
        activations=format.activations,
        outliers=min(0.1, format.outliers / (format.out_features * format.in_features)),
        scale_dtype=FLOAT_DTYPES[format.scale_dtype],
    )


def _bench_formats(folder: Path | None, bits: int) -> list[lowbit.PackedFormat]:
    """The distinct stored forms of the linears in a saved folder, or usual shapes at ``bits`` bits."""
    if folder is not None:
        found = (layer.format for layer in open_folder(folder).layers.values() if layer.kind == "linear")
        return list(dict.fromkeys(format for format in found if isinstance(format, lowbit.PackedFormat)))
    return [lowbit.PackedFormat(bits, n, k, 64, "group", "int", "float16") for n, k in BENCH_SHAPES]


@torch.inference_mode()
def _bench(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads, times in ms, weights from memory")
    print(f"{'N x K':>14} {'M':>5} {'float32':>9} {'packed':>9} {'faster':>7}  scheme")
    for format in _bench_formats(options.folder, options.bits):
        n, k = format.out_features, format.in_features
        dense = torch.randn(n, k) / k**0.5
        layer = lowbit.PackedLinear.from_float(
            dense,
            _spec_of(format),
            x_scale=torch.tensor(0.03) if format.activations == "int8_static" else None,
        )
        packed, floats = _copies(layer, format.nbytes), _copies(dense, dense.nbytes)
        for m in options.rows:
            x = torch.randn(m, k)
            ours = _seconds(lambda w, x=x: w(x), packed)  # type: ignore[misc]
            theirs = _seconds(lambda w, x=x: F.linear(x, w), floats)  # type: ignore[misc]
            print(
                f"{n:>6} x {k:<5} {m:>5} {theirs * 1e3:>9.3f} {ours * 1e3:>9.3f} {theirs / ours:>6.2f}x  "
                f"{format.describe()}",
                flush=True,
            )


# ------------------------------------------------------------------------------------------- doctor


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _doctor(options: argparse.Namespace) -> None:
    print(f"lowbit        {lowbit.__version__} in {Path(lowbit.__file__).parent}")
    print(f"python        {platform.python_version()} in {sys.executable}")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    for backend in lowbit.backends():
        print(f"backend       {backend}")
        if not backend.available and backend.reason.startswith("not compiled"):
            print(f"              {_ADVICE}")
    print(f"transformers  {_transformers_status()}")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("LOWBIT_")}
    print(f"settings      {', '.join(f'{n}={v}' for n, v in settings.items()) or 'none (LOWBIT_* variables)'}")


_ADVICE = "to compile it: install a C++17 compiler, then run `pip install --no-build-isolation .` on the source"


def _transformers_status() -> str:
    installed = _version("transformers")
    if installed is None or find_spec("transformers") is None:
        return "not installed: plain torch models only"
    logging.disable(logging.WARNING)  # importing it makes other packages report what they miss
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    logging.disable(logging.NOTSET)

    registered = "lowbit" in AUTO_QUANTIZER_MAPPING
    return f"{installed}, " + ("from_pretrained reads lowbit folders" if registered else "lowbit is not registered")


# --------------------------------------------------------------------------------------------- main


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError
    return counts


_counts.__name__ = "comma-separated list of positive numbers"  # what argparse calls a bad value


_SKIP_HELP = "layers to leave float, such as 'lm_head' or '*.mlp.*'; may be repeated"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="lowbit", description="Low-bit linear and embedding layers for PyTorch.")
    top.add_argument("--version", action="version", version=f"lowbit {lowbit.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="quantize a transformers folder into a packed one")
    convert.set_defaults(run=_convert)
    convert.add_argument("source", type=Path, metavar="SRC", help="folder with a float model (safetensors)")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument("--bits", type=int, default=4, help="2 to 8 (default: 4)")
    convert.add_argument("--group-size", type=int, help="input features per scale (default: 64)")
    convert.add_argument("--granularity", choices=GRANULARITIES, help="what shares a scale (default: group)")
    convert.add_argument("--symmetric", action="store_true", help="no zero point")
    convert.add_argument("--zeros", choices=("int", "float"), default="int", help="kind of zero point")
    convert.add_argument("--quantizer", choices=QUANTIZERS, default="minmax", help="(default: minmax)")
    convert.add_argument("--gamma", type=float, default=1.0, help="clipping factor of --quantizer mean")
    convert.add_argument("--activations", choices=ACTIVATIONS, default="float", help="(default: float)")
    convert.add_argument("--outliers", type=float, default=0.0, help="fraction of weights kept sparse in float")
    convert.add_argument("--scale-dtype", choices=tuple(FLOAT_DTYPES), help="(default: float16 per group)")
    convert.add_argument("--skip", action="append", default=[], metavar="PATTERN", help=_SKIP_HELP)
    convert.add_argument("--calibration-text", type=Path, metavar="FILE", help="one sample per line")

    inspect = commands.add_parser("inspect", help="describe a packed folder from its headers alone")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("folder", type=Path, metavar="FOLDER")

    bench = commands.add_parser("bench", help="time packed layers beside F.linear on this machine")
    bench.set_defaults(run=_bench)
    bench.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="take the layers of this model")
    bench.add_argument("--bits", type=int, default=4, help="without FOLDER (default: 4)")
    bench.add_argument("--rows", type=_counts, default=[1, 16, 256], help="rows M of x (default: 1,16,256)")
    bench.add_argument("--threads", type=int, help="(default: torch's own choice)")

    doctor = commands.add_parser("doctor", help="what is installed, which kernels run here, and if not, why")
    doctor.set_defaults(run=_doctor)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("LOWBIT_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        print(
            f"lowbit {options.command}: {' '.join(str(error).split()) or type(error).__name__}",
            file=sys.stderr,
        )
        return 2 if isinstance(error, (ValueError, TypeError, FileNotFoundError, FileExistsError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
