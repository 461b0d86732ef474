"""``lowbit eval``: how good a folder's model is on a text, beside another folder's, or compressed in several ways."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lowbit
from lowbit.checkpoint import foreign
from lowbit.core.family import Spec
from lowbit.core.folder import is_packed
from lowbit.quality.evaluate import TITLES, Evaluation

LENGTH = 512  # tokens of a row
# Heads of the table's columns; the reference's own figures are those of its row.
HEADS = {
    "perplexity": "perplexity", "accuracy": "accuracy", "loss": "loss", "mean_squared_error": "MSE",
    "label_correlation": "labels", "kl": "KL", "kl_99": "KL 99%", "agreement": "top-1", "cosine": "cosine",
    "cosine_1": "cosine 1%", "rank_correlation": "ranks",
}  # fmt: skip
BATCH = 8  # rows of a batch
PLOTTED = ("kl", "perplexity", "cosine", "accuracy", "rank_correlation")  # the first of these that there is
# "Packed(bits=3)", or "gptq=Packed(bits=3, quantizer='gptq')"
_SWEEP = re.compile(r"(?:(?P<line>[^=()]+)=)?(?P<spec>\s*[\w.]+\s*(?:\(.*\))?)", re.DOTALL)


def add_to(commands: Any) -> argparse.ArgumentParser:
    """The command's options."""
    what = "measure a model on a text, alone or beside another"
    parser: argparse.ArgumentParser = commands.add_parser("eval", help=what)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a packed folder, or a float transformers model")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE",
                        help="language models: a text; encoders: a sentence per line; classifiers: LABEL<TAB>SENTENCE "
                        "per line")  # fmt: skip
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="the float model to compare with")
    parser.add_argument("--sweep", action="append", metavar="[LINE=]SPEC", default=[],
                        help="also measure FOLDER, a float model, converted by this spec; may be repeated; --plot "
                        "joins the points of one LINE")  # fmt: skip
    parser.add_argument("--calibration-text", type=Path, metavar="FILE", help="of --sweep, one sample per line")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a row, at most (default: {LENGTH})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE",
                        help="of --sweep: draw quality against size (needs matplotlib)")  # fmt: skip
    return parser


def load_model(folder: Path) -> nn.Module:
    """The model of a packed, a foreign or a float folder, in eval mode; raises ``FileNotFoundError``."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if is_packed(folder) or foreign.declared(folder) is not None:
        model: nn.Module = lowbit.load(folder)
        return model.eval()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    if cls is None:
        raise ValueError(f"{folder / 'config.json'}: architectures must name a class of transformers: "
                         f"got {config.architectures[0]!r}")  # fmt: skip
    loaded: nn.Module = cls.from_pretrained(folder, dtype="auto")
    return loaded.eval()


def batches(folder: Path, model: nn.Module, text: Path, length: int) -> list[dict[str, Tensor]]:
    """What ``model`` is measured on: a text in rows of ``length`` tokens, or sentences in batches."""
    import torch
    from transformers import AutoTokenizer

    if length < 2:
        raise ValueError(f"--length must be at least 2: got {length}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = text.read_text(encoding="utf-8")
    if not whole.strip():
        raise ValueError(f"--text must hold some text: {text} is empty")
    name = type(model).__name__
    if "CausalLM" in name or "LMHead" in name:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = tokenizer(whole, add_special_tokens=False, verbose=False).input_ids
        step = length - len(start)
        rows = [torch.tensor([start + ids[i : i + step]]) for i in range(0, len(ids), step)]
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows if row.shape[1] > 1]
    lines = [line for line in whole.splitlines() if line.strip()]
    labels, sentences = None, lines
    if "Classification" in name:
        labels, sentences = _labelled(lines, model, text)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found = []
    for i in range(0, len(order), BATCH):
        part = order[i : i + BATCH]
        batch = dict(tokenizer([sentences[j] for j in part], padding=len(part) > 1, truncation=True, max_length=length,
                               return_tensors="pt"))  # fmt: skip
        if labels is not None:
            batch["labels"] = torch.tensor([labels[j] for j in part])
        found.append(batch)
    return found


def _labelled(lines: list[str], model: Any, text: Path) -> tuple[list[Any] | None, list[str]]:
    """(labels, sentences) of lines ``LABEL<TAB>SENTENCE``; no labels where no line has one."""
    if not any("\t" in line for line in lines):
        return None, lines
    names = {str(name): int(number) for name, number in (getattr(model.config, "label2id", None) or {}).items()}
    labels: list[Any] = []
    for i, line in enumerate(lines):
        label, tab, _ = line.partition("\t")
        value: Any = names.get(label.strip())
        if value is None:
            try:
                value = float(label) if model.config.num_labels == 1 else int(label)
            except ValueError:
                value = None
        if not tab or value is None:
            raise ValueError(f"{text}: line {i + 1} must be LABEL<TAB>SENTENCE with a number or one of "
                             f"{', '.join(names) or 'no names'}: got {line!r:.80}")  # fmt: skip
        labels.append(value)
    return labels, [line.partition("\t")[2] for line in lines]


def run(
    options: argparse.Namespace, parse_spec: Callable[[str], Spec | None], calibration: Callable[[Path, Path], Any]
) -> None:
    """Print a table, and write the files that were asked for."""
    if options.plot is not None and not options.sweep:
        raise ValueError("--plot draws what --sweep measures: give a --sweep SPEC")
    specs: dict[str, Spec] = {}
    lines: dict[str, str] = {}
    for text in options.sweep:
        line, written = _sweep(text)
        spec = parse_spec(written)
        if spec is None:
            raise ValueError("--sweep must be a spec: got None")
        if spec.needs_calibration and options.calibration_text is None:
            raise ValueError(f"{written} needs --calibration-text FILE, a text file with one sample per line")
        specs[written] = spec
        if line:
            lines[written] = line
    model = load_model(options.folder)
    data = batches(options.folder, model, options.text, options.length)
    reference = None if options.reference is None else load_model(options.reference)
    if reference is None and specs:
        reference = model
    rows = {str(options.folder): lowbit.evaluate(model, data, reference=reference)}
    samples = None if options.calibration_text is None else calibration(options.folder, options.calibration_text)
    for text, spec in specs.items():
        given = samples if spec.needs_calibration else None
        packed = lowbit.convert(load_model(options.folder), spec, calibration=given)
        rows[text] = lowbit.evaluate(packed, data, reference=reference)
        del packed
    print(rows[str(options.folder)] if len(rows) == 1 else table(rows))
    points = [Point(name, lines.get(name), found.bytes, found.values) for name, found in rows.items()]
    if options.json is not None:
        listed = [{"name": name, **({"line": lines[name]} if name in lines else {}), **json.loads(found.to_json())}
                  for name, found in rows.items()]  # fmt: skip
        options.json.write_text(json.dumps(listed if specs else listed[0], indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(points, options.plot, options.folder.name)


def _sweep(text: str) -> tuple[str, str]:
    """(line of the plot, spec)."""
    match = _SWEEP.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--sweep must be SPEC or LINE=SPEC, such as 'k-means=Codebook(bits=3)': got {text!r}")
    return (match["line"] or "").strip(), match["spec"].strip()


def table(rows: dict[str, Evaluation]) -> str:
    """One line per model."""
    columns = [name for name in HEADS if any(name in found.values for found in rows.values())]
    shown = [["", "MB", *(HEADS[name] for name in columns)]]
    for name, found in rows.items():
        values = (found.values.get(column, math.nan) for column in columns)
        shown.append([name, f"{found.bytes / 1e6:.2f}", *(f"{value:.4f}" for value in values)])
    widths = [max(len(line[i]) for line in shown) for i in range(len(shown[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                               for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in shown)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Of a plot: one model. The first one is the float model; those with the same ``line`` are joined."""

    name: str
    line: str | None
    bytes: int
    values: dict[str, float]

    @classmethod
    def of(cls, row: dict[str, Any]) -> Point:
        """A row of the JSON of a sweep."""
        values = {name: math.nan if row[name] is None else row[name] for name in TITLES if name in row}
        return cls(row["name"], row.get("line"), row["bytes"], values)


def draw(points: Sequence[Point], file: Path, title: str = "") -> None:
    """Quality against size."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"--plot needs matplotlib: {error}") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lowbit"  # the same figure is the same file
    from matplotlib import pyplot, ticker

    name = next((n for n in PLOTTED if n in points[0].values), "")
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    joined: dict[str, list[Point]] = {}
    for i, point in enumerate(points):
        joined.setdefault(point.line or f"\0{i}", []).append(point)
    longest = sorted(joined, key=lambda line: -len(joined[line]))[:2]  # their points have room for words
    markers = iter("osDvP<>p*" * len(points))
    for line, of in joined.items():
        x, y = [point.bytes / 1e6 for point in of], [point.values[name] for point in of]
        if not line.startswith("\0"):
            axes.plot(x, y, marker=next(markers), label=line, linewidth=1.2, markersize=6)
        else:
            axes.plot(x, y, "k^" if of[0] is points[0] else "o", label="float" if of[0] is points[0] else None)
        side = longest.index(line) if line in longest else None
        for point, where in zip(of, zip(x, y, strict=True), strict=True):
            if point.line is None and point is not points[0]:
                axes.annotate(point.name, where, xytext=(5, 4), textcoords="offset points", fontsize=7)
            elif point.line is not None and side is not None:
                axes.annotate(_bits(point.name), where, xytext=(-6, 6) if side else (6, -11), fontsize=7,
                              textcoords="offset points", ha="right" if side else "left")  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    if name in ("perplexity", "kl") and all(point.values[name] > 0 for point in points[1:]):
        axes.set_yscale("log") if name == "perplexity" else axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_xlabel("MB")
    axes.set_ylabel(TITLES[name])
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _bits(spec: str) -> str:
    """``3 bits`` of what is written so."""
    match = re.search(r"bits=(\d+)", spec)
    return f"{match[1]} bits" if match else ""
