"""The picture of the README, quality against size: ``python -m benchmarks.models.picture`` (needs matplotlib).

all-MiniLM-L6-v2, all linear and embedding layers compressed and nothing fine-tuned: the mean cosine of sentence
embeddings to the float model's, against the bytes of the saved file. ``--measure`` writes what it measured to
``benchmarks/results/minilm_quality.json``; the picture is drawn from there.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import lowbit
from benchmarks.models.accuracy import calibration, file_megabytes, minilm
from benchmarks.models.defaults import embedder
from lowbit import Codebook, Kronecker, Packed
from lowbit.core.family import Spec

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "minilm_quality.json"
PICTURE = ROOT / "docs" / "plots" / "minilm_quality.svg"
FLOAT_MEGABYTES = 90.9

NOT_DRAWN = "Kronecker, half"  # far below the others without fine-tuning

# Line of the picture -> the spec of each point.
LINES: dict[str, dict[str, Spec]] = {
    "Packed, no data": {f"{b} bits": Packed(bits=b) for b in (8, 6, 5, 4, 3, 2)},
    "Packed, gptq": {f"{b} bits": Packed(bits=b, quantizer="gptq") for b in (4, 3, 2)},
    "Codebook, no data": {f"{b} bits": Codebook(bits=b) for b in (4, 3)},
    "Codebook, sensitivity": {f"{b} bits": Codebook(bits=b, sensitivity=True) for b in (4, 3, 2)},
    "NF4": {"4 bits": Codebook(table="nf4", group_size=64)},
    NOT_DRAWN: {"": Kronecker()},
}


def measure(sentences: int) -> list[dict[str, Any]]:
    model, tokenizer = minilm()
    embed, batches = embedder(tokenizer, sentences), calibration(tokenizer, sentences)
    exact, found = embed(model), []
    for line, points in LINES.items():
        for point, spec in points.items():
            packed = lowbit.convert(copy.deepcopy(model), spec, calibration=batches if spec.needs_calibration else None)
            size, cosine = file_megabytes(packed), float((embed(lowbit.dequantize(packed)) * exact).sum(-1).mean())
            found.append({"line": line, "point": point, "megabytes": round(size, 2), "cosine": round(cosine, 4)})
            print(found[-1], flush=True)
    return found


def draw(found: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lowbit"  # the same figure is the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    for line, marker in zip([line for line in LINES if line != NOT_DRAWN], "osDv*", strict=True):
        points = [each for each in found if each["line"] == line]
        x, y = [each["megabytes"] for each in points], [each["cosine"] for each in points]
        axes.plot(x, y, marker=marker, label=line, linewidth=1.2, markersize=9 if marker == "*" else 6)
        below = line == "Packed, no data"
        if below or line == "Packed, gptq":
            for each in points:
                axes.annotate(
                    each["point"], (each["megabytes"], each["cosine"]), xytext=(6, -11) if below else (-6, 6),
                    textcoords="offset points", fontsize=7, ha="left" if below else "right",
                )  # fmt: skip
    axes.plot([FLOAT_MEGABYTES], [1.0], "k^", label="float32")
    axes.set_xscale("log")
    ticks = [6, 8, 10, 15, 20, 30, 50, 90]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(0.6, 1.02)
    axes.set_xlabel("MB on disk")
    axes.set_ylabel("mean cosine to the float embeddings")
    axes.set_title("all-MiniLM-L6-v2, everything compressed, no fine-tuning", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure again")
    parser.add_argument("--sentences", type=int, default=128)
    options = parser.parse_args()
    if options.measure:
        MEASURED.write_text(json.dumps(measure(options.sentences), indent=1) + "\n")
    draw(json.loads(MEASURED.read_text()))


if __name__ == "__main__":
    main()
