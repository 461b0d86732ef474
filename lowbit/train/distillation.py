"""Losses that let a compressed model learn from the float one it was made of: :class:`Distillation`.

Where a sequence is padded (``attention_mask`` or, in a decoder, ``labels`` of -100), the padding counts in no term.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Term:
    """A part of a :class:`Distillation`. ``0.1 * term`` has another weight in the sum."""

    weight = 1.0
    hidden = False  # whether it reads the hidden states
    attentions = False

    def __rmul__(self, factor: float) -> Any:
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 <= factor < float("inf"):
            raise ValueError(f"the weight of a term must be a number of at least 0: got {factor!r}")
        weighted = copy.copy(self)
        weighted.weight = self.weight * factor
        return weighted

    __mul__ = __rmul__

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Called before the first call of both."""

    def detach(self) -> None:
        """What :meth:`attach` made is undone."""

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
        """A scalar, from the outputs of both models."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state: got {sorted(state)}")


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``[B, L]`` over the tokens that count."""
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mask_of(inputs: Mapping[str, Any], decoder: bool, like: Tensor) -> Tensor | None:
    """Which tokens of ``like`` ``[B, L, ...]`` count, ``[B, L]``; None: all."""
    names = ("decoder_attention_mask",) if decoder else ("attention_mask",)
    mask = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if mask is None and decoder and inputs.get("labels") is not None:
        mask = inputs["labels"] != -100
    return mask if mask is not None and like.dim() > 2 and mask.shape == like.shape[:2] else None


def is_decoder(output: Any) -> bool:
    """Whether logits are of the decoder of an encoder and a decoder."""
    return getattr(output, "encoder_last_hidden_state", None) is not None


class Logits(Term):
    """``-sum softmax(t / T) * log_softmax(s / T) * T**2``, the mean over tokens: soft cross-entropy (Hinton et al.,
    arXiv 1503.02531). s, t: the logits of student and teacher; ``temperature``: T."""

    def __init__(self, temperature: float = 1.0) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be greater than 0 and finite: got temperature={temperature}")
        self.temperature = temperature

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
        s, t = student.logits.float() / self.temperature, teacher.logits.float() / self.temperature
        values = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1) * self.temperature**2
        return mean_over(values, mask_of(inputs, is_decoder(student), student.logits))


class Task(Term):
    """The model's own loss, from ``labels``."""

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
        loss = getattr(student, "loss", None)
        if loss is None:
            raise ValueError("Task is the model's own loss, which needs labels in the inputs: "
                             f"got {', '.join(sorted(inputs))}")  # fmt: skip
        return cast(Tensor, loss)


class Contrastive(Term):
    """QuantGPT's token-level contrastive loss: a token of the student is to be nearest to the same token of the teacher
    among the tokens of its sequence.

        loss = mean over tokens i of -log(exp(cos(q_i, k_i) / tau) / sum_j exp(cos(q_i, k_j) / tau))

    k: the last hidden states of the (full-precision) teacher; q: those of the student, as a bank remembers them:
    ``q = momentum * bank + (1 - momentum) * student`` from the second time that a sequence is seen. A sequence is known
    by its tokens. ``size``: how many sequences the bank holds, the oldest are forgotten; it is part of the state.

    Source: Tao et al., ACL 2022, arXiv 2203.10705.
    """

    hidden = True

    def __init__(self, tau: float = 0.1, momentum: float = 0.5, size: int = 4096) -> None:
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau must be greater than 0 and finite: got tau={tau}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1: got momentum={momentum}")
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"size must be an integer of at least 0: got size={size!r}")
        self.tau, self.momentum, self.size = tau, momentum, size
        self.bank: dict[str, Tensor] = {}

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
        decoder = is_decoder(student)
        q, k = (last_hidden(output).float() for output in (student, teacher))
        mask = mask_of(inputs, decoder, q)
        q = self._remembered(q, _keys(inputs, decoder, len(q)))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2) / self.tau
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None], float("-inf"))
            scores = torch.where(mask.bool()[..., None], scores, 0.0)  # rows of padding: not counted below
        own = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[:2])
        return mean_over(F.cross_entropy(scores.transpose(1, 2), own, reduction="none"), mask)

    def _remembered(self, q: Tensor, keys: list[str]) -> Tensor:
        rows = []
        for row, key in zip(q, keys, strict=True):
            known = self.bank.pop(key, None)
            if known is not None and known.shape == row.shape:
                row = self.momentum * known.to(row.device) + (1 - self.momentum) * row
            if self.size:
                self.bank[key] = row.detach()  # last in the order of the dict
            rows.append(row)
        while len(self.bank) > self.size:
            del self.bank[next(iter(self.bank))]
        return torch.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"bank": dict(self.bank)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bank = dict(state["bank"])


def _keys(inputs: Mapping[str, Any], decoder: bool, count: int) -> list[str]:
    """What each sequence of a batch is known by: all its integers."""
    whole = [t for name, t in sorted(inputs.items()) if isinstance(t, Tensor) and not t.is_floating_point()
             and t.dim() > 0 and len(t) == count]  # fmt: skip
    if not whole:
        raise ValueError(f"Contrastive knows a sequence by its tokens: got no integers of {count} rows in the inputs")
    return [hashlib.sha256(b"|".join(t[i].cpu().numpy().tobytes() for t in whole)).hexdigest() for i in range(count)]


def last_hidden(output: Any) -> Tensor:
    """The hidden states of the last layer, of the decoder where there are two."""
    for name in ("decoder_hidden_states", "hidden_states"):
        states = getattr(output, name, None)
        if states is not None:
            return cast(Tensor, states[-1])
    raise ValueError("the outputs have no hidden_states: the model must take output_hidden_states=True")


class Intermediate(Term):
    """What student and teacher compute on the way: KnGPT2's ILKD (arXiv 2110.08152).

    ``what``: ``"embedding"``, mean squared error of the first hidden states; ``"hidden"``, of those of every layer;
    ``"attention"``, the mean over layers of the KL divergence of the attention probabilities (the models need
    ``attn_implementation="eager"``); or a pattern of module names such as ``"*.mlp"``: the mean over the modules of the
    squared error of their outputs. Both models must have as many layers.
    """

    def __init__(self, what: str) -> None:
        if not isinstance(what, str) or not what:
            raise ValueError(f"what must be 'embedding', 'hidden', 'attention' or a pattern of names: got {what!r}")
        self.what = what
        self.hidden, self.attentions = what in ("embedding", "hidden"), what == "attention"
        self._hooks: list[Any] = []
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.hidden or self.attentions:
            return
        names = [{name for name, _ in model.named_modules() if fnmatchcase(name, self.what)}
                 for model in (student, teacher)]  # fmt: skip
        if not names[0] or names[0] != names[1]:
            differing = sorted(names[0] ^ names[1])
            raise ValueError(f"pattern {self.what!r} must match the same modules of student and teacher: "
                             + (f"{differing[0]} is in one of them" if differing else "it matches none"))  # fmt: skip
        self._seen = ({}, {})
        for model, seen in zip((student, teacher), self._seen, strict=True):
            for name in names[0]:
                self._hooks.append(model.get_submodule(name).register_forward_hook(_keeping(seen, name)))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
        pairs = self._pairs(student, teacher)
        decoder = is_decoder(student)
        if self.attentions:
            kl = [(t * ((t + 1e-9).log() - (s + 1e-9).log())).sum(-1).mean(1) for s, t in pairs]
            return torch.stack([mean_over(v, mask_of(inputs, decoder, v[..., None])) for v in kl]).mean()
        squares = [(s.float() - t.float()).square().mean(-1) for s, t in pairs]
        return torch.stack([mean_over(v, mask_of(inputs, decoder, v[..., None])) for v in squares]).mean()

    def _pairs(self, student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
        if self._hooks:
            mine, other = self._seen
            pairs = [(mine[name], other[name]) for name in sorted(mine)]
            mine.clear()
            other.clear()
            return pairs
        kind = "attentions" if self.attentions else "hidden_states"
        found = []
        for output in (student, teacher):
            parts = [getattr(output, f"{prefix}{kind}", None) for prefix in ("", "encoder_", "decoder_")]
            states = [tuple(part) for part in parts if part]
            if not states or any(state is None for part in states for state in part):
                how = "with attn_implementation='eager' and " if self.attentions else ""
                raise ValueError(f"the outputs have no {kind}: load the models {how}so that they give output_{kind}")
            found.append([s for part in states for s in (part[:1] if self.what == "embedding" else part)])
        if len(found[0]) != len(found[1]):
            raise ValueError(f"student and teacher must have as many layers: got {len(found[0])} and {len(found[1])} "
                             f"{kind}; name modules by a pattern instead")  # fmt: skip
        return list(zip(*found, strict=True))


def _keeping(seen: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen[name] = output if isinstance(output, Tensor) else output[0]

    return keep


class Distillation:
    """``loss = distillation(student, inputs)``: a weighted sum of terms, of the outputs of student and teacher.

        distillation = train.Distillation(teacher, train.Logits(), 0.1 * train.Contrastive())
        loss = distillation(student, batch)   # a dict of arguments of both models
        distillation.close()

    ``teacher``: called in eval mode, without gradients; it is not changed and not part of the state. ``parts``: the
    terms of the last call, not weighted, by the name of their class. ``state_dict`` holds what the terms remember.
    """

    def __init__(self, teacher: nn.Module, *terms: Term) -> None:
        if not terms or not all(isinstance(term, Term) for term in terms):
            raise TypeError(f"Distillation(teacher, *terms) needs terms such as Logits(): got {terms!r}")
        self.teacher, self.terms = teacher, terms
        self.parts: dict[str, float] = {}
        self._attached: nn.Module | None = None

    def __call__(self, student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        return self.with_outputs(student, inputs)[0]

    def with_outputs(self, student: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss and the outputs of the student."""
        if self.teacher is student:
            raise ValueError("teacher and student must be two models: copy the model before it is prepared")
        if self._attached is not student:
            self.close()
            for term in self.terms:
                term.attach(getattr(student, "module", student), self.teacher)
            self._attached = student
        asked = {"output_hidden_states": True} if any(term.hidden for term in self.terms) else {}
        if any(term.attentions for term in self.terms):
            asked["output_attentions"] = True
        was_training = self.teacher.training
        try:
            with torch.no_grad():
                teacher = self.teacher.eval()(**_for_teacher(self.teacher, inputs), **asked)
        finally:
            self.teacher.train(was_training)
        output = student(**inputs, **asked)
        losses = [term.loss(output, teacher, inputs) for term in self.terms]
        self.parts = {type(t).__name__: float(loss.detach()) for t, loss in zip(self.terms, losses, strict=True)}
        total = torch.stack([t.weight * loss for t, loss in zip(self.terms, losses, strict=True)]).sum()
        if not bool(torch.isfinite(total.detach())):
            raise FloatingPointError(f"the loss is {float(total)}: training has diverged ({self.parts})")
        return total, output

    def close(self) -> None:
        """Take the hooks off both models."""
        for term in self.terms:
            term.detach()
        self._attached = None

    def state_dict(self) -> dict[str, Any]:
        return {str(i): term.state_dict() for i, term in enumerate(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state) != len(self.terms):
            raise ValueError(f"the state is of {len(state)} terms: this Distillation has {len(self.terms)}")
        for i, term in enumerate(self.terms):
            term.load_state_dict(state[str(i)])


def _for_teacher(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only a loss needs; a decoder behind an encoder makes its inputs of labels."""
    without = {"num_items_in_batch"}
    makes = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
    if not makes or inputs.get("decoder_input_ids") is not None:
        without.add("labels")
    return {name: value for name, value in inputs.items() if name not in without}
