"""The command ``lowbit``: ``convert``, ``export``, ``inspect``, ``eval``, ``serve``, ``bench`` and ``doctor``.

Exit status: 0, 2 for a usage error or bad input, 1 for any other failure. An error is one line on stderr;
``LOWBIT_DEBUG=1`` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import logging
import os
import platform
import re
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
from lowbit.checkpoint import foreign
from lowbit.checkpoint.convert_folder import copy_small_files
from lowbit.checkpoint.folder import DESCRIPTION_FILE
from lowbit.checkpoint.metadata import Metadata, parse
from lowbit.checkpoint.reader import Checkpoint, read_json
from lowbit.cli import budget, evaluate
from lowbit.core.family import (
    ACTIVATIONS,
    FLOAT_DTYPES,
    GRANULARITIES,
    OUTLIERS_BY,
    Format,
    Spec,
    did_you_mean,
    written_spec,
)
from lowbit.core.quantizer import names
from lowbit.model.kept import SHARE, Kept, with_float_copies
from lowbit.model.report import Report, Row
from lowbit.nn.layer import Layer, layer_class
from lowbit.packed.format import GROUP_SIZE, QUANTIZER

BENCH_SHAPES = [(768, 768), (3072, 768), (768, 3072), (4096, 4096)]
BENCH_SECONDS = 0.2
# Weights in rotation while timing: more than most last-level caches hold.
BENCH_BYTES = 96 << 20
CALIBRATION_LENGTH = 512  # tokens of one calibration sample


# ------------------------------------------------------------------------------------------ convert


_SPECS: dict[str, type[Spec]] = {cls.__name__: cls for cls in (lowbit.Packed, lowbit.Codebook, lowbit.Kronecker)}
# "Codebook(bits=3)", or "*.mlp.*=Codebook(bits=3)"
_SPEC_TEXT = re.compile(r"(?:(?P<pattern>[^=()]+)=)?(?P<spec>\s*[\w.]+\s*(?:\(.*\))?)", re.DOTALL)


def parse_spec(text: str) -> Spec | None:
    """The spec that a constructor call such as ``Codebook(bits=3, outliers=0.005)`` writes; of ``None``, ``None``.

    Arguments are literals, specs, or names of dtypes. Raises ``ValueError`` for anything else: nothing is evaluated.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).removeprefix("lowbit.") not in _SPECS:
            raise ValueError(_no_spec(ast.unparse(node)))
        spec = _spec_value(node)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not a spec: {error}") from None
    except TypeError as error:  # an argument that it does not have
        raise ValueError(str(error)) from None
    if spec is not None and not isinstance(spec, Spec):
        raise ValueError(f"{text!r} is not a spec: write one of {', '.join(f'{n}(...)' for n in _SPECS)}, or None")
    return spec


def _no_spec(written: str) -> str:
    return f"{written!r} is not a spec{did_you_mean(written.rpartition('.')[2], _SPECS)}"


def _spec_value(node: ast.expr) -> Any:
    written = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    name = written.removeprefix("lowbit.")
    if not isinstance(node, ast.Call):
        if made := written_spec(_SPECS.get(name)):
            raise ValueError(f"{written!r} is not a spec, but their class: write {made}")
        return _literal(node)
    if name not in _SPECS:
        raise ValueError(_no_spec(written))
    arguments = {keyword.arg: _spec_value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if node.args or len(arguments) < len(node.keywords):
        raise ValueError(f"{ast.unparse(node)!r} is not a spec: name every argument, each once")
    return _SPECS[name](**arguments)


def _literal(node: ast.expr) -> Any:
    """A literal's value; the dtype that ``'float16'`` or ``torch.float16`` names."""
    written = ast.unparse(node)
    if written.startswith("torch.") and written.removeprefix("torch.") in FLOAT_DTYPES:
        return FLOAT_DTYPES[written.removeprefix("torch.")]
    try:
        value = ast.literal_eval(node)
    except ValueError:
        hint = f"text stands in quotes, '{written}'" if isinstance(node, ast.Name) else "write a literal"
        raise ValueError(f"{written!r} is not a value: {hint}, or name a dtype such as 'float16'") from None
    return FLOAT_DTYPES.get(value, value) if isinstance(value, str) else value


def _specs(options: argparse.Namespace) -> Spec | dict[str, Spec | None]:
    """What ``--spec`` says, else the ``Packed`` that the other options describe."""
    own = {name: getattr(options, name) for name in _PACKED_OPTIONS if getattr(options, name) is not None}
    if not options.spec:
        if "scale_dtype" in own:
            own["scale_dtype"] = FLOAT_DTYPES[own["scale_dtype"]]
        return lowbit.Packed(**own)
    if own:
        flags = ", ".join("--" + name.replace("_", "-") for name in own)
        raise ValueError(f"--spec says it all: leave out {flags}")
    found: dict[str, Spec | None] = {}
    for text in options.spec:
        match = _SPEC_TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"--spec must be SPEC or PATTERN=SPEC, such as '*.mlp.*=Codebook(bits=3)': got {text!r}")
        pattern = match["pattern"] or "*"
        if pattern in found:
            raise ValueError(f"--spec must give each pattern once: got {pattern!r} again with {text!r}")
        found[pattern] = parse_spec(match["spec"])
    only = found.get("*")
    return only if only is not None and len(found) == 1 else found


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


def _says_a_spec(options: argparse.Namespace) -> list[str]:
    """The options that do."""
    flags = ["--" + name.replace("_", "-") for name in _PACKED_OPTIONS if getattr(options, name) is not None]
    return ["--spec"] * bool(options.spec) + flags


def _convert(options: argparse.Namespace) -> None:
    budget.check(options, _says_a_spec(options))
    spec: Spec | dict[str, Spec | None] | None = _specs(options)
    if not options.source.is_dir() and not foreign.is_file(options.source):
        raise FileNotFoundError(f"SRC must be a folder with a transformers model, or a GGUF file: {options.source} is "
                                "neither")  # fmt: skip
    if not _says_a_spec(options) and foreign.declared(options.source) is not None:
        spec = None  # what is in the format is kept as it is, and the rest float
    specs = list(spec.values()) if isinstance(spec, dict) else [spec]
    need = next((each.calibration_need for each in specs if each is not None and each.needs_calibration), None)
    if need is not None and options.calibration_text is None:
        if not options.spec:  # as the option says it: --quantizer gptq
            need = "--" + need.replace("='", " ").rstrip("'")
        raise ValueError(f"{need} needs --calibration-text FILE, a text file with one sample per line")
    calibration = None
    if options.calibration_text is not None:
        calibration = calibration_batches(options.source, options.calibration_text)
    start = time.perf_counter()
    if options.budget is not None:
        assert calibration is not None
        spec = budget.specs(options, parse_spec, calibration)
    lowbit.convert_folder(options.source, options.target, spec, skip=options.skip, calibration=calibration,
                          correction=options.correction)  # fmt: skip
    print(describe_folder(options.target))
    print(f"written to {options.target} in {time.perf_counter() - start:.1f} s")


def _export(options: argparse.Namespace) -> None:
    lowbit.export(lowbit.load(options.source), options.target, format=options.format, skip=options.skip)
    if options.target.is_dir():
        copy_small_files(options.source, options.target, but=["README.md"])  # it says how lowbit loads the folder
    print(f"written to {options.target}")


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
    layers = {name: config.build() for name, config in metadata.layers.items()}
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
    copies = with_float_copies(folder.metadata.skipped)
    rows = []
    for name in sorted(folder.layers, key=_natural):
        layer = folder.layers[name]
        row = Row.planned(name, layer)
        row.weight_error, row.note = folder.metadata.weight_error.get(name), folder.metadata.notes.get(name)
        if name in copies:
            row.bytes_before = 0
        if storage.get(name, name) != name:
            row.share(storage[name])
        rows.append(row)
    after = sum(entry.nbytes for entry in folder.checkpoint.entries.values())
    before = after + sum(row.bytes_before - row.bytes_after for row in rows)
    kept = []
    for name, entry in folder.checkpoint.entries.items():
        owner, skipped = name.rpartition(".")[0], folder.metadata.skipped
        if owner not in folder.layers and entry.dtype.is_floating_point and entry.nbytes > SHARE * min(before, after):
            reason = skipped.get(name) or skipped.get(owner) or f"a tensor {list(entry.shape)} of no packed layer"
            kept.append(Kept(name, entry.nbytes, reason))
    return Report(rows, folder.metadata.skipped, before, after, sorted(kept, key=lambda k: -k.bytes))


def _inspect(options: argparse.Namespace) -> None:
    print(describe_folder(options.folder))


# --------------------------------------------------------------------------------------------- eval


def _eval(options: argparse.Namespace) -> None:
    evaluate.run(options, parse_spec, calibration_batches)


# -------------------------------------------------------------------------------------------- serve


def _serve(options: argparse.Namespace) -> None:
    """``transformers serve`` in a process that has imported lowbit: without it, packed folders cannot be loaded."""
    try:
        from transformers.cli.transformers import app
    except ImportError as error:
        raise ImportError(f"serving needs transformers with its server, transformers[serving]: {error}") from error
    app(["serve", *options.passed_on], prog_name="lowbit")


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


def random_layer(format: Format) -> Any:
    """A linear of this form whose tensors hold random values that are valid."""
    layer = layer_class(format.family, "linear")(format)
    tensors = {name: _random_tensor(name, t.shape, t.dtype) for name, t in layer.named_tensors().items()}
    if "outlier_rows" in tensors:
        count = len(tensors["outlier_values"])
        position = torch.randperm(format.out_features * format.in_features)[:count].sort().values
        tensors["outlier_columns"] = (position % format.in_features).to(tensors["outlier_columns"].dtype)
        counts = torch.bincount(position // format.in_features, minlength=format.out_features)
        tensors["outlier_rows"][1:] = counts.cumsum(0)
    layer.store(tensors)
    layer.validate()
    return layer.prepare()


def _random_tensor(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return (torch.rand(shape) / 16 + 2**-8).to(dtype)
    if name.endswith("permutation"):
        return torch.randperm(shape[0], dtype=torch.int32)
    if name.startswith("outlier"):
        return torch.zeros(shape, dtype=dtype)
    # words of codes; or zeros and scale codes, below 2**bits, where bits is 2 at least
    low, high = (0, 4) if dtype == torch.uint8 else (-(2**31), 2**31)
    return torch.randint(low, high, shape, dtype=dtype)


def _bench_formats(folder: Path | None, spec: Spec) -> list[Format]:
    """The distinct stored forms of the linears in a saved folder, or ``spec`` on usual shapes."""
    if folder is not None:
        found = (layer.format for layer in open_folder(folder).layers.values() if layer.kind == "linear")
        return list(dict.fromkeys(found))
    shapes = [shape for shape in BENCH_SHAPES if spec.problem(*shape) is None]
    if not shapes:
        raise ValueError(f"--spec must fit one of the shapes to time: {spec.problem(*BENCH_SHAPES[0])}")
    return [spec.format(torch.empty(shape, device="meta"), "linear") for shape in shapes]


@torch.inference_mode()
def _bench(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads, times in ms, weights from memory")
    print(f"{'N x K':>14} {'M':>5} {'float32':>9} {'lowbit':>9} {'faster':>7}  scheme")
    spec = lowbit.Packed(bits=options.bits) if options.spec is None else parse_spec(options.spec)
    if spec is None:
        raise ValueError("--spec must be a spec to time: got None")
    for format in _bench_formats(options.folder, spec):
        n, k = format.out_features, format.in_features
        dense, layer = torch.randn(n, k) / k**0.5, random_layer(format)
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
    print(f"processes     {_FORK}")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("LOWBIT_")}
    print(f"settings      {', '.join(f'{n}={v}' for n, v in settings.items()) or 'none (LOWBIT_* variables)'}")


_FORK = "after a fork, the first threaded call hangs (torch's too): use spawn, or torch.set_num_threads(1) in the child"
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


_PACKED_OPTIONS = (
    "bits", "group_size", "granularity", "symmetric", "zeros", "quantizer", "gamma", "activations",
    "activation_group_size", "outliers", "outliers_by", "scale_dtype", "packed_zeros", "scale_bits",
)  # fmt: skip
_SPEC_HELP = (
    "instead of the options below, the spec as in Python: 'Codebook(bits=3, outliers=0.005)', "
    "'Kronecker(compression=2)', or '*.mlp.*=Packed(bits=4)'; may be repeated, "
    "the last pattern that matches a layer counts"
)
_SKIP_HELP = "layers to leave float, such as 'lm_head' or '*.mlp.*'; may be repeated"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="lowbit", description="Low-bit linear and embedding layers for PyTorch.")
    top.add_argument("--version", action="version", version=f"lowbit {lowbit.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    what = "quantize a transformers folder into a packed one; without a spec, one in GPTQ, AWQ, ... as it is"
    convert = commands.add_parser("convert", help=what)
    convert.set_defaults(run=_convert)
    convert.add_argument("source", type=Path, metavar="SRC", help="folder with a float or a foreign model; a GGUF file")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write")
    convert.add_argument("--spec", action="append", metavar="[PATTERN=]SPEC", help=_SPEC_HELP)
    convert.add_argument("--bits", type=int, help="2 to 8 (default: 4)")
    convert.add_argument("--group-size", type=int, help=f"input features per scale (default: {GROUP_SIZE})")
    convert.add_argument("--granularity", choices=GRANULARITIES, help="what shares a scale (default: group)")
    convert.add_argument("--symmetric", action="store_true", default=None, help="no zero point")
    convert.add_argument("--zeros", choices=("int", "float"), help="kind of zero point (default: by --bits)")
    convert.add_argument("--quantizer", choices=names("packed"), help=f"(default: {QUANTIZER})")
    convert.add_argument("--gamma", type=float, help="clipping factor of --quantizer mean")
    convert.add_argument("--activations", choices=ACTIVATIONS, help="(default: float)")
    convert.add_argument("--activation-group-size", type=int, help="of --activations int8 (default: the whole token)")
    convert.add_argument("--outliers", type=float, help="fraction of weights kept sparse in float")
    convert.add_argument("--outliers-by", choices=OUTLIERS_BY, help="which weights these are (default: magnitude)")
    convert.add_argument("--scale-dtype", choices=tuple(FLOAT_DTYPES), help="(default: float16 per group)")
    what = "integer zeros of --bits bits, not of a byte"
    convert.add_argument("--packed-zeros", action="store_true", default=None, help=what)
    convert.add_argument("--scale-bits", type=int, help="8: scales of groups are codes of 8 bits, not floats")
    convert.add_argument("--skip", action="append", default=[], metavar="PATTERN", help=_SKIP_HELP)
    convert.add_argument("--calibration-text", type=Path, metavar="FILE", help="one sample per line")
    what = "how much of the drift of its inputs a layer makes up for, 0 to 1 (default: 0.5 of descent, else 0)"
    convert.add_argument("--correction", type=float, help=what)
    budget.add_to(convert)

    export = commands.add_parser("export", help="write a packed folder in another library's format")
    export.set_defaults(run=_export)
    export.add_argument("source", type=Path, metavar="SRC", help="packed folder")
    export.add_argument("target", type=Path, metavar="DST", help="folder or file to write")
    export.add_argument("--format", required=True, help="float, compressed-tensors, gptq, gguf, onnx, pt2")
    export.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="layers to write as floats")

    inspect = commands.add_parser("inspect", help="describe a packed folder from its headers alone")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("folder", type=Path, metavar="FOLDER")

    evaluate.add_to(commands).set_defaults(run=_eval)

    what = "serve folders with transformers' server (OpenAI's protocol)"
    serve = commands.add_parser("serve", add_help=False, help=what)
    serve.set_defaults(run=_serve)

    bench = commands.add_parser("bench", help="time packed layers beside F.linear on this machine")
    bench.set_defaults(run=_bench)
    bench.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="take the layers of this model")
    bench.add_argument("--bits", type=int, default=4, help="of Packed, without FOLDER or --spec (default: 4)")
    bench.add_argument("--spec", metavar="SPEC", help="time this form, such as 'Codebook(bits=4)'")
    bench.add_argument("--rows", type=_counts, default=[1, 16, 256], help="rows M of x (default: 1,16,256)")
    bench.add_argument("--threads", type=int, help="(default: torch's own choice)")

    doctor = commands.add_parser("doctor", help="what is installed, which kernels run here, and if not, why")
    doctor.set_defaults(run=_doctor)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    passed_on = given[1:] if given[:1] == ["serve"] else []  # what transformers' own parser reads
    options = parser().parse_args(given[: len(given) - len(passed_on)])
    options.passed_on = passed_on
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
