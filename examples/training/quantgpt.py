"""QuantGPT's recipe (Tao et al., ACL 2022): weights, embeddings and activations of 8-8-8, 4-4-8 or 2-2-8 bits.

    python examples/training/quantgpt.py --bits 4-4-8 --steps 60
    python examples/training/quantgpt.py --bits 2-2-8 --steps 200 --quantizer PACT

Every matrix has one scale, the embedding one for each row; the head is tied to it. Logits are learned from the float
model; ``--contrastive 0.1`` adds the token-level contrastive loss. The trained model is converted, saved, loaded and
judged: its logits must be the same bits.
"""

from __future__ import annotations

import copy

import common

import lowbit
from lowbit import train

QUANTIZERS = {"Dynamic": train.Dynamic, "LSQ": train.LSQ, "PACT": train.PACT, "MinMax": train.MinMax}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--bits", default="4-4-8", help="of weights, embeddings and activations (8)")
    parser.add_argument("--quantizer", choices=list(QUANTIZERS), default="Dynamic")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--contrastive", type=float, default=0.0, help="weight of the contrastive loss")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scales", type=float, default=1e-2, help="learning rate of what the quantizer learns")
    given = parser.parse_args()
    weights, embeddings, activations = map(int, given.bits.split("-"))
    if activations != 8:
        parser.error(f"activations have 8 bits: got --bits {given.bits}")
    teacher = common.model()
    chunks, held_out = common.stories()
    exact = common.perplexity(teacher, held_out)

    def run(seed: int) -> dict[str, float]:
        specs = {
            "*": lowbit.Packed(bits=weights, granularity="tensor", symmetric=True, activations="int8"),
            "*embed_tokens": lowbit.Packed(bits=embeddings, granularity="row", symmetric=True, activations="int8"),
        }
        student = train.prepare(copy.deepcopy(teacher), specs, QUANTIZERS[given.quantizer]())
        untrained = common.perplexity(student, held_out)
        terms = [train.Logits(), *([given.contrastive * train.Contrastive()] if given.contrastive else [])]
        groups = train.parameter_groups(student, given.lr, scales=given.scales)
        common.distil(student, teacher, chunks, given.steps, groups, *terms)
        deployed, size = common.deploy(student, held_out[0])
        trained = common.perplexity(deployed, held_out)
        floats = sum(p.numel() for p in teacher.parameters()) * 4
        return {"float": exact, "untrained": untrained, "perplexity": trained, "times smaller": floats / size}

    name = f"{given.bits} {given.quantizer}, {given.steps} steps" + (" + contrastive" if given.contrastive else "")
    common.report(name, run, given.seeds)


if __name__ == "__main__":
    main()
