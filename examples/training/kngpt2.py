"""KnGPT2's start (Edalati et al., ACL 2022): Kronecker factors nearest to the weights, then light training.

    python examples/training/kngpt2.py --steps 120
    python examples/training/kngpt2.py --steps 120 --start random

Half the parameters of the linear layers of four of five layers are left. ``--start random`` begins with factors of the
same spread instead (what the nearest Kronecker product is worth); ``--ilkd`` learns from the float model's embeddings,
attention and outputs of feed-forward layers besides.
"""

from __future__ import annotations

import copy

import common
import torch

import lowbit
from lowbit import train


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--start", choices=["nearest", "random"], default="nearest")
    parser.add_argument("--ilkd", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    teacher = common.model()
    if given.ilkd:
        teacher.set_attn_implementation("eager")
    chunks, held_out = common.stories()

    def run(seed: int) -> dict[str, float]:
        specs = {f"model.layers.{i}.*": lowbit.Kronecker(compression=2) for i in range(1, 5)}
        student = lowbit.convert(copy.deepcopy(teacher), specs)
        factors = lowbit.make_trainable(student, "a", "b")
        if given.start == "random":
            with torch.no_grad():
                for factor in factors:
                    factor.normal_(std=float(factor.std()))
        untrained = common.perplexity(student, held_out)
        terms: list[train.Term] = [train.Task()]
        if given.ilkd:
            terms += [0.1 * train.Intermediate("embedding"), train.Intermediate("attention"),
                      0.1 * train.Intermediate("*.mlp")]  # fmt: skip
        groups = [{"params": list(student.parameters()), "lr": given.lr}]
        common.distil(student, teacher, chunks, given.steps, groups, *terms)
        left = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in teacher.parameters())
        trained = common.perplexity(common.deploy(student, held_out[0])[0], held_out)
        return {"untrained": untrained, "perplexity": trained, "left": left}

    name = f"Kronecker, {given.start} start, {given.steps} steps" + (", ILKD" if given.ilkd else "")
    common.report(name, run, given.seeds)


if __name__ == "__main__":
    main()
