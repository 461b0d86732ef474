"""``evaluate``: how good a model is on data, and how far it is from the float model that it was made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.model.calibrate import batches_of, call, describe_batch, evaluating
from lowbit.model.plan import require_model
from lowbit.model.storage import storages
from lowbit.quality.statistics import rank_correlation

TASKS = ("language", "masked", "classification", "regression", "embedding")
_ELEMENTS = 1 << 24  # of the logits that are compared at a time
_PAIRS = 2048  # embeddings whose similarities are compared: all pairs of them


@dataclass
class Evaluation:
    """What :func:`evaluate` measured. ``str`` is a table, :meth:`to_dict` JSON-ready.

    Attributes:
        task: one of ``"language"``, ``"masked"``, ``"classification"``, ``"regression"``, ``"embedding"``.
        values: the figures by name; which ones there are depends on the task: see :func:`evaluate`.
        count: predictions (tokens, samples, embeddings) that they are means of.
        bytes: of the model's parameters and buffers, each storage once.
    """

    task: str
    values: dict[str, float]
    count: int
    bytes: int

    def __getattr__(self, name: str) -> float:
        values = self.__dict__.get("values", {})
        if name in values:
            return float(values[name])
        raise AttributeError(f"an evaluation of task {self.__dict__.get('task')!r} has no {name!r}: "
                             f"it has {', '.join(values)}")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, **self.values, "count": self.count, "bytes": self.bytes}

    def to_json(self) -> str:
        """JSON has no NaN or infinity: such a value is null."""
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                           for k, v in self.to_dict().items()}, indent=1)  # fmt: skip

    def __str__(self) -> str:
        lines = [(TITLES[name], f"{value:.4f}") for name, value in self.values.items()]
        lines += [("predictions", f"{self.count:,}"), ("size", f"{self.bytes / 1e6:,.2f} MB")]
        width = max(len(title) for title, _ in lines)
        return "\n".join(f"{title:<{width}}  {value:>12}" for title, value in lines)


TITLES = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "loss": "loss (nats)",
    "mean_squared_error": "mean squared error",
    "label_correlation": "rank correlation with the labels",
    "reference_perplexity": "perplexity of the reference",
    "reference_accuracy": "accuracy of the reference",
    "kl": "KL to the reference (nats)",
    "kl_99": "99th percentile of KL",
    "agreement": "top-1 agreement with the reference",
    "cosine": "cosine to the reference",
    "cosine_1": "1st percentile of the cosine",
    "rank_correlation": "rank correlation of similarities",
}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    task: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Evaluation:
    """Measure ``model`` on batches; beside ``reference``, the float model, also how far it is from it.

    What is measured depends on the task, which follows from the model and the first batch:

    * ``"language"``, logits ``[B, T, V]`` of the next token: ``perplexity = exp(mean cross-entropy)`` of the tokens
      after the first of each row; ``"masked"``, logits of the labels themselves (masked language models, and decoders
      behind an encoder): the same, where ``labels`` are not -100. With a reference ``kl``, the mean over tokens of
      ``sum_v p_ref(v) * (log p_ref(v) - log p(v))``, ``kl_99``, its 99th percentile, ``agreement``, the share of tokens
      where both have the same largest logit, and ``reference_perplexity``.
    * ``"classification"``, logits ``[B, C]``: ``accuracy`` and ``loss`` where the batches have ``labels``; with a
      reference ``kl``, ``kl_99``, ``agreement`` and ``reference_accuracy``.
    * ``"regression"``, logits ``[B, 1]``: ``mean_squared_error`` and ``label_correlation`` with ``labels``; with a
      reference ``rank_correlation`` with its outputs.
    * ``"embedding"``, no logits: needs a reference. An embedding is ``sentence_embedding`` of the output, or the mean
      of ``last_hidden_state`` over the tokens that count. ``cosine``: the mean to the reference's; ``cosine_1``: its
      1st percentile; ``rank_correlation`` (Spearman's): of the cosines between all pairs of embeddings, the first 2048.

    Padding (``attention_mask``) and labels of -100 count nowhere. Both models run in eval mode.

    Args:
        model: any module that can be called with the batches.
        data: a list of batches, as ``calibration`` of :func:`lowbit.convert`: tensors, or tuples or dicts of arguments.
            Dicts may have ``labels``.
        reference: the model to compare with. It is not changed.
        task: one of these, where the model does not show it.
        forward: ``forward(model, batch)`` in place of the call.

    Raises:
        TypeError: ``model`` or ``reference`` is no model, or ``data`` no list of batches.
        ValueError: an unknown task; nothing to measure, such as no labels and no reference; outputs of models that
            cannot be compared.
    """
    require_model(model)
    if reference is not None:
        require_model(reference)
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}: got {task!r}")
    batches = batches_of(data, "data")
    if not batches:
        raise ValueError("data must hold at least one batch: got none")
    run = forward or call
    models = [model] if reference is None else [model, reference]
    measure: _Measure | None = None
    with evaluating(*models):
        for i, batch in enumerate(batches):
            outputs = [run(each, batch) for each in models]
            if measure is None:
                measure = _MEASURES[task or _task_of(model, batch, outputs[0])](model, reference is not None)
            measure.add(i, batch, *outputs)
    assert measure is not None
    values = measure.values()
    if not values:
        raise ValueError(f"nothing to measure: {measure.lacking} or a reference is required")
    held = storages([*model.parameters(), *model.buffers()])
    return Evaluation(measure.task, values, measure.count, sum(held.values()))


def _task_of(model: nn.Module, batch: Any, output: Any) -> str:
    """What the output of a model is for."""
    logits = _part(output, "logits")
    if logits is None and not isinstance(output, Tensor):
        return "embedding"
    logits = output if logits is None else logits
    config = getattr(model, "config", None)
    if logits.dim() == 3 and _ids_of(batch) is not None:
        decoder = getattr(config, "is_encoder_decoder", False)
        return "masked" if decoder or "MaskedLM" in type(model).__name__ else "language"
    if logits.dim() == 2:
        return "regression" if logits.shape[1] == 1 else "classification"
    raise ValueError(f"task is required: the output {describe_batch(logits)} for {describe_batch(batch)} does not show "
                     f"it; one of {', '.join(TASKS)}")  # fmt: skip


def _part(output: Any, name: str) -> Tensor | None:
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _ids_of(batch: Any) -> Tensor | None:
    """The token ids ``[B, T]`` of a batch."""
    first = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(first, (tuple, list)) and first:
        first = first[0]
    if isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point():
        return first
    return None


def _of(batch: Any, name: str) -> Tensor | None:
    found = batch.get(name) if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) else None


class _Measure:
    """Sums over the batches of one task."""

    task: str
    lacking = "labels"

    def __init__(self, model: nn.Module, compared: bool) -> None:
        self.compared = compared
        self.count = 0

    def add(self, index: int, batch: Any, output: Any, other: Any = None) -> None:
        raise NotImplementedError

    def values(self) -> dict[str, float]:
        raise NotImplementedError

    def logits(self, index: int, output: Any, other: Any) -> list[Tensor]:
        """Of the model, and of the reference where there is one."""
        found = []
        for each in (output, other) if self.compared else (output,):
            logits = each if isinstance(each, Tensor) else _part(each, "logits")
            if logits is None:
                raise ValueError(f"task {self.task!r} needs logits: batch {index} gives {describe_batch(each)}")
            found.append(logits)
        if self.compared and found[0].shape != found[1].shape:
            raise ValueError(f"model and reference must give logits of one shape: batch {index} gives "
                             f"{list(found[0].shape)} and {list(found[1].shape)}")  # fmt: skip
        return found


class _Logits(_Measure):
    """Distributions over classes or tokens, row by row."""

    def __init__(self, model: nn.Module, compared: bool) -> None:
        super().__init__(model, compared)
        self.labelled = 0
        self.entropy = self.other_entropy = 0.0
        self.correct = self.other_correct = self.agreed = 0
        self.kl: list[Tensor] = []

    def rows(self, logits: list[Tensor], labels: Tensor | None) -> None:
        """logits ``[n, V]``; labels ``[n]``, -100 where there is none."""
        n, size = logits[0].shape
        self.count += n
        step = max(1, _ELEMENTS // max(1, size))
        for start in range(0, n, step):
            part = slice(start, start + step)
            mine = logits[0][part].float().log_softmax(-1)
            label = None if labels is None else labels[part].to(mine.device)
            entropy, correct, counted = _scored(mine, label)
            self.entropy, self.correct, self.labelled = (
                self.entropy + entropy, self.correct + correct, self.labelled + counted
            )  # fmt: skip
            if self.compared:
                theirs = logits[1][part].to(mine.device).float().log_softmax(-1)
                entropy, correct, _ = _scored(theirs, label)
                self.other_entropy, self.other_correct = self.other_entropy + entropy, self.other_correct + correct
                # where a probability is 0 its logarithm is -inf, and 0 * inf no number
                products = theirs.exp() * (theirs - mine).masked_fill(theirs == -math.inf, 0)
                self.kl.append(products.sum(-1).clamp(min=0).cpu())
                self.agreed += int((mine.argmax(-1) == theirs.argmax(-1)).sum())

    def against_reference(self) -> dict[str, float]:
        kl = torch.cat(self.kl).double()
        return {"kl": float(kl.mean()), "kl_99": percentile(kl, 0.99), "agreement": self.agreed / self.count}


def _scored(log_probabilities: Tensor, labels: Tensor | None) -> tuple[float, int, int]:
    """(sum of the cross-entropies, right predictions, labels) where a label is not -100."""
    if labels is None:
        return 0.0, 0, 0
    known = labels != -100
    chosen, labels = log_probabilities[known], labels[known].long()
    entropy = -chosen.gather(1, labels[:, None]).double().sum()
    return float(entropy), int((chosen.argmax(-1) == labels).sum()), len(labels)


class _Language(_Logits):
    task = "language"
    lacking = "token ids"
    shift = 1  # of the labels against the logits

    def labels(self, batch: Any) -> Tensor | None:
        labels = _of(batch, "labels")
        labels = _ids_of(batch) if labels is None else labels
        mask = _of(batch, "attention_mask")
        if labels is None or mask is None or mask.shape != labels.shape:
            return labels
        mask = mask.bool().clone()
        mask[:, 1:] &= mask[:, :-1].clone()  # the first token of a row that is padded on the left
        mask[:, 0] = False
        return labels.masked_fill(~mask.to(labels.device), -100)

    def add(self, index: int, batch: Any, output: Any, other: Any = None) -> None:
        logits, labels = self.logits(index, output, other), self.labels(batch)
        if labels is None or logits[0].dim() != 3 or labels.shape != logits[0].shape[:2]:
            got = "no labels" if labels is None else f"labels {list(labels.shape)}"
            raise ValueError(f"task {self.task!r} needs logits [B, T, V] and labels [B, T]: batch {index} gives logits "
                             f"{list(logits[0].shape)} and {got}")  # fmt: skip
        length = labels.shape[1] - self.shift
        if length < 1:
            return
        labels = labels[:, self.shift :].reshape(-1)
        known = labels != -100
        self.rows([each[:, :length].flatten(0, 1)[known.to(each.device)] for each in logits], labels[known])

    def values(self) -> dict[str, float]:
        if not self.count:
            raise ValueError("data has no token to predict: rows of two tokens or more are required")
        found = {"perplexity": _exp(self.entropy / self.count)}
        if self.compared:
            found |= {"reference_perplexity": _exp(self.other_entropy / self.count), **self.against_reference()}
        return found


class _Masked(_Language):
    task = "masked"
    shift = 0

    def labels(self, batch: Any) -> Tensor | None:
        return _of(batch, "labels")


class _Classification(_Logits):
    task = "classification"

    def add(self, index: int, batch: Any, output: Any, other: Any = None) -> None:
        logits, labels = self.logits(index, output, other), _of(batch, "labels")
        if logits[0].dim() != 2 or (labels is not None and labels.shape != logits[0].shape[:1]):
            got = "" if labels is None else f" and labels {list(labels.shape)}"
            raise ValueError(f"task 'classification' needs logits [B, C] and labels [B]: batch {index} gives logits "
                             f"{list(logits[0].shape)}{got}")  # fmt: skip
        self.rows(logits, labels)

    def values(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.labelled:
            found = {"accuracy": self.correct / self.labelled, "loss": self.entropy / self.labelled}
            if self.compared:
                found["reference_accuracy"] = self.other_correct / self.labelled
        return found | (self.against_reference() if self.compared else {})


class _Regression(_Measure):
    task = "regression"

    def __init__(self, model: nn.Module, compared: bool) -> None:
        super().__init__(model, compared)
        self.outputs: list[list[Tensor]] = []
        self.grades: list[Tensor] = []

    def add(self, index: int, batch: Any, output: Any, other: Any = None) -> None:
        logits, labels = self.logits(index, output, other), _of(batch, "labels")
        self.outputs.append([each.flatten().float().cpu() for each in logits])
        if labels is not None:
            self.grades.append(labels.flatten().float().cpu())
        self.count += len(self.outputs[-1][0])

    def values(self) -> dict[str, float]:
        mine, *others = (torch.cat(parts).double() for parts in zip(*self.outputs, strict=True))
        found = {}
        if self.grades:
            grades = torch.cat(self.grades).double()
            if len(grades) != len(mine):
                raise ValueError(f"all batches must have labels, or none: got {len(grades)} of {len(mine)}")
            found = {"mean_squared_error": float((mine - grades).square().mean()),
                     "label_correlation": rank_correlation(mine, grades)}  # fmt: skip
        return found | ({"rank_correlation": rank_correlation(mine, others[0])} if others else {})


class _Embedding(_Measure):
    task = "embedding"
    lacking = "logits, for which there are labels,"

    def __init__(self, model: nn.Module, compared: bool) -> None:
        super().__init__(model, compared)
        self.cosines: list[Tensor] = []
        self.kept: list[list[Tensor]] = []

    def add(self, index: int, batch: Any, output: Any, other: Any = None) -> None:
        if not self.compared:
            return
        pair = [F.normalize(embedding_of(each, batch, index).double().cpu(), dim=-1) for each in (output, other)]
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"model and reference must give embeddings of one shape: batch {index} gives "
                             f"{list(pair[0].shape)} and {list(pair[1].shape)}")  # fmt: skip
        self.cosines.append((pair[0] * pair[1]).sum(-1))
        if self.count < _PAIRS:
            self.kept.append([each[: _PAIRS - self.count] for each in pair])
        self.count += len(pair[0])

    def values(self) -> dict[str, float]:
        if not self.cosines:
            return {}
        cosines = torch.cat(self.cosines)
        found = {"cosine": float(cosines.mean()), "cosine_1": percentile(cosines, 0.01)}
        mine, other = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        if len(mine) > 2:
            pairs = torch.triu_indices(len(mine), len(mine), 1).unbind()
            found["rank_correlation"] = rank_correlation((mine @ mine.t())[pairs], (other @ other.t())[pairs])
        return found


def embedding_of(output: Any, batch: Any, index: int = 0) -> Tensor:
    """``[B, D]``: see :func:`evaluate`."""
    whole = _part(output, "sentence_embedding")
    if whole is not None:
        return whole
    hidden = output if isinstance(output, Tensor) else _part(output, "last_hidden_state")
    if hidden is None or hidden.dim() not in (2, 3):
        raise ValueError(f"task 'embedding' needs sentence_embedding or last_hidden_state: batch {index} gives "
                         f"{describe_batch(output)}")  # fmt: skip
    if hidden.dim() == 2:
        return hidden
    mask = _of(batch, "attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.double().mean(1)
    weights = mask.to(hidden.device).double()[..., None]
    return (hidden.double() * weights).sum(1) / weights.sum(1).clamp(min=1)


_MEASURES: dict[str, type[_Measure]] = {
    each.task: each for each in (_Language, _Masked, _Classification, _Regression, _Embedding)
}


def percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; NaN where one is no number."""
    if bool(values.isnan().any()):
        return math.nan
    place = min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))
    return float(values.sort().values[place])


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
