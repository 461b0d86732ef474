"""PreQuant (Gong et al., Findings of ACL 2023): quantize a pre-trained model, then train its outliers on the task.

    python examples/training/prequant.py --bits 4

The model knows simple stories; the task is Shakespeare. 0.5 % of the weights, those of largest magnitude, are kept
beside the codes and trained; nothing else is. ``--outliers-by random`` trains as many others.
"""

from __future__ import annotations

import copy

import common
import torch

import lowbit
from lowbit import train


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--outliers", type=float, default=0.005)
    parser.add_argument("--outliers-by", choices=["magnitude", "random"], default="magnitude")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-2)
    given = parser.parse_args()
    pretrained = common.model()
    chunks, held_out = shakespeare()

    def run(seed: int) -> dict[str, float]:
        spec = lowbit.Packed(bits=given.bits, granularity="row", outliers=given.outliers, outliers_by=given.outliers_by,
                             seed=seed)  # fmt: skip
        student = lowbit.convert(copy.deepcopy(pretrained), spec)
        untuned = common.perplexity(student, held_out)
        parameters = train.trainable(student, "outliers")
        common.distil(student, pretrained, chunks, given.steps, [{"params": parameters, "lr": given.lr}], train.Task())
        tuned = common.perplexity(common.deploy(student, held_out[0])[0], held_out)
        share = sum(p.numel() for p in parameters) / sum(p.numel() for p in pretrained.parameters())
        return {"untuned": untuned, "perplexity": tuned, "trained": share}

    chosen = ", random outliers" if given.outliers_by == "random" else ""
    common.report(f"PreQuant, {given.bits} bits{chosen}, {given.steps} steps", run, given.seeds)


def shakespeare() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(chunks to train on, chunks held out)."""
    from transformers import AutoTokenizer

    text = (common.DATA / "text" / "tinyshakespeare.txt").read_text()
    ids = AutoTokenizer.from_pretrained(common.DATA / "stories260k")(text, add_special_tokens=False).input_ids
    rows = torch.tensor([[1, *ids[i : i + common.LENGTH]] for i in range(0, len(ids) - common.LENGTH, common.LENGTH)])
    return rows[:-60], [row[None] for row in rows[-60:]]


if __name__ == "__main__":
    main()
