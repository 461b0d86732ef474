"""k-means quantization as of BERT and ALBERT (Zhao et al., arXiv 2010.07109): quantize, then tune the centroids.

    python examples/training/kmeans.py --bits 4
    python examples/training/kmeans.py --bits 2 --granularity row

Every matrix and the embedding get ``2**bits`` centroids (for each row with ``--granularity row``); only these are
trained, on the float model's logits. The centroids begin at the exact optimum of one-dimensional k-means;
``--quantizer kmeans`` begins with k-means++ and ten rounds of Lloyd, as the paper does: chance makes it better or
worse. Beside it: as many linear levels, with the clipping of least squared error.
"""

from __future__ import annotations

import copy

import common

import lowbit
from lowbit import train


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--granularity", choices=["tensor", "row"], default="tensor")
    parser.add_argument("--quantizer", choices=["optimal", "kmeans"], default="optimal")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-2)
    given = parser.parse_args()
    teacher = common.model()
    chunks, held_out = common.stories()

    def run(seed: int) -> dict[str, float]:
        linear = lowbit.Packed(bits=given.bits, granularity=given.granularity, zeros="int", quantizer="mse")
        levels = common.perplexity(lowbit.convert(copy.deepcopy(teacher), linear), held_out)
        chosen = {"quantizer": "kmeans", "seed": seed} if given.quantizer == "kmeans" else {"quantizer": "optimal"}
        spec = lowbit.Codebook(bits=given.bits, granularity=given.granularity, **chosen)
        student = lowbit.convert(copy.deepcopy(teacher), spec)
        untuned = common.perplexity(student, held_out)
        groups = [{"params": train.trainable(student, "centroids"), "lr": given.lr}]
        common.distil(student, teacher, chunks, given.steps, groups)
        tuned = common.perplexity(common.deploy(student, held_out[0])[0], held_out)
        return {"linear levels": levels, "untuned": untuned, "perplexity": tuned}

    common.report(f"k-means, {given.bits} bits per {given.granularity}, {given.steps} steps", run, given.seeds)


if __name__ == "__main__":
    main()
