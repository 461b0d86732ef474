"""``trainable``: which parts of a packed model are trained, all others frozen."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lowbit.nn.layer import layers, make_trainable
from lowbit.train.watch import watch

PARTS = {
    "outliers": ("outlier_values",),
    "centroids": ("codebook",),
    "scales": ("scales", "scale_factors", "scale_absmax"),
    "factors": ("a", "b", "a_scales", "b_scales"),
}


def trainable(model: nn.Module, *parts: str, also: Sequence[str] = ()) -> list[nn.Parameter]:
    """Freeze a packed model but for these parts; returns the Parameters that are trained.

    PreQuant (arXiv 2306.00014) trains ``"outliers"``, about 0.5 % of the weights; k-means BERT (arXiv 2010.07109)
    ``"centroids"``; KnGPT2 (arXiv 2110.08152) ``"factors"``; ``"scales"`` are those of groups or rows. They are float32
    while they are trained, and used as they will be stored: :func:`lowbit.make_trainable`. ``lowbit.convert(model)``
    ends it.

    Args:
        parts: of ``"outliers"``, ``"centroids"``, ``"scales"``, ``"factors"``.
        also: patterns of names of Parameters, or of modules that hold them, to be trained besides: ``"classifier"``.

    Raises ``ValueError`` for another part, one that no layer has, or a pattern that matches nothing; nothing has
    changed then.
    """
    found = layers(model)
    known = {name for layer in found.values() for name in layer.trainable()}
    for part in parts or (None,):
        if part not in PARTS:
            raise ValueError(f"parts must be of {', '.join(map(repr, PARTS))}: got {part!r}")
        if not known & set(PARTS[part]):
            have = f"they have {', '.join(sorted(known))}" if found else "it has no packed layer"
            raise ValueError(f"no layer of the model has {part}: {have}")
    wanted = []
    parameters = dict(model.named_parameters())
    for pattern in also:
        matched = [p for name, p in parameters.items() if _matches(name, pattern)]
        if not matched:
            raise ValueError(f"also={pattern!r} matches no Parameter of the model")
        wanted += matched
    before = list(model.parameters())
    model.requires_grad_(False)
    names = [name for part in parts for name in PARTS[part] if name in known]
    trained = make_trainable(model, *names)
    for parameter in (*trained, *wanted):
        parameter.requires_grad_(True)
    chosen = {id(parameter) for parameter in (*trained, *wanted)}
    now = dict(model.named_parameters())
    watch([*before, *now.values()], {name: p for name, p in now.items() if id(p) in chosen})
    return list({id(parameter): parameter for parameter in (*trained, *wanted)}.values())


def _matches(name: str, pattern: str) -> bool:
    places = [i for i, letter in enumerate(name) if letter == "."]
    return any(fnmatchcase(name[:end], pattern) for end in (*places, len(name)))
