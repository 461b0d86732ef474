"""What the embeddings of every family share."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowbit.core.family import Format, Weight
from lowbit.nn.call import traced
from lowbit.nn.layer import Layer


class EmbeddingLayer(Layer):
    """``y = W[ids] * output_scale``: ``[..., embedding_dim]`` in ``dtype``.

    ``output_scale`` serves scaled word embeddings (BART, MBART, Gemma); it is 1.0 otherwise. With
    ``round_output_scale`` it is rounded to ``dtype`` first, as Gemma's are. Raises ``RuntimeError`` for an id outside
    ``[0, num_embeddings)``.
    """

    kind = "embedding"

    def __init__(
        self,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
        round_output_scale: bool = False,
    ) -> None:
        if bias:
            raise ValueError("an embedding has no bias: got bias=True")
        super().__init__(format, False, dtype, device)
        self.padding_idx = padding_idx
        self.output_scale, self.round_output_scale = output_scale, round_output_scale

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("output_scale", "round_output_scale", "dtype") and "round_output_scale" in self.__dict__:
            self._factor = rounded(self.output_scale, self.dtype) if self.round_output_scale else self.output_scale

    @property
    def num_embeddings(self) -> int:
        return cast(int, self.format.out_features)

    @property
    def embedding_dim(self) -> int:
        return cast(int, self.format.in_features)

    @classmethod
    def from_weight(
        cls,
        weight: Weight,
        *,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
        round_output_scale: bool = False,
    ) -> Any:
        """A layer that holds ``weight`` ``[num_embeddings, embedding_dim]`` as it is."""
        scale: dict[str, Any] = {"output_scale": output_scale, "round_output_scale": round_output_scale}
        layer = cls(weight.format(), False, dtype, "meta", padding_idx=padding_idx, **scale)
        layer.store(weight.tensors())
        layer.validate()
        return layer.prepare()

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        """The arguments of the op for ``ids``."""
        return (ids, *self.weight_arguments(self.operands()), *self.size_arguments(), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return traced(self, input)
        y = self._gather(input)
        return y if self.output_scale == 1.0 else y * self._factor

    def _gather(self, ids: Tensor) -> Tensor:
        if self.dtype is torch.float64:
            sizes = (*self.size_arguments(), torch.float32)
            return self._call(ids, self.operands(), None, sizes).double()
        sizes = (*self.size_arguments(), self.dtype)
        try:
            return self._call(ids, self.operands(), None, sizes)
        except RuntimeError:
            if not self._is_outdated():
                raise
        return self._call(ids, self.operands(), None, sizes)

    def to_float(self) -> nn.Module:
        """``nn.Embedding`` with the dequantized weight (followed by the scale where ``output_scale`` is not 1)."""
        weight = nn.Parameter(self.dequantize())
        if self.output_scale != 1.0:
            scaled = ScaledEmbedding(weight, self.padding_idx, self.output_scale, self.round_output_scale)
            return scaled.train(self.training)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight.data)
        embedding.weight = weight
        return embedding.train(self.training)

    def extras(self) -> dict[str, Any]:
        return _without_defaults(self.padding_idx, self.output_scale, self.round_output_scale)

    @classmethod
    def check_extras(cls, bias: bool, extras: dict[str, Any]) -> dict[str, Any]:
        padding_idx, output_scale = extras.pop("padding_idx", None), extras.pop("output_scale", 1.0)
        round_output_scale = extras.pop("round_output_scale", False)
        if extras:
            raise ValueError(f"unknown field {sorted(extras)[0]!r} for a {cls.family} embedding")
        if padding_idx is not None and not isinstance(padding_idx, int):
            raise ValueError(f"padding_idx must be an integer: got padding_idx={padding_idx!r}")
        if not isinstance(output_scale, (int, float)) or isinstance(output_scale, bool):
            raise ValueError(f"output_scale must be a number: got output_scale={output_scale!r}")
        if not isinstance(round_output_scale, bool):
            raise ValueError(f"round_output_scale must be true or false: got {round_output_scale!r}")
        if bias:
            raise ValueError("an embedding has no bias: got bias=True")
        return _without_defaults(padding_idx, float(output_scale), round_output_scale)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, {self.format.describe()}"
        return text if self.output_scale == 1.0 else text + f", output_scale={self.output_scale}"


def _without_defaults(padding_idx: int | None, output_scale: float, round_output_scale: bool) -> dict[str, Any]:
    extras: dict[str, Any] = {} if padding_idx is None else {"padding_idx": padding_idx}
    if output_scale != 1.0:
        extras["output_scale"] = output_scale
        if round_output_scale:
            extras["round_output_scale"] = True
    return extras


def rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest value of ``dtype``."""
    return float(torch.tensor(number, dtype=dtype, device="cpu"))


class ScaledEmbedding(nn.Embedding):
    """``F.embedding(ids, weight) * output_scale``: what a scaled embedding layer dequantizes to."""

    def __init__(
        self, weight: nn.Parameter, padding_idx: int | None, output_scale: float, round_output_scale: bool = False
    ) -> None:
        super().__init__(weight.shape[0], weight.shape[1], padding_idx, _weight=weight.data)
        self.weight = weight
        self.output_scale, self.round_output_scale = output_scale, round_output_scale

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.output_scale
        return super().forward(ids) * (rounded(scale, self.weight.dtype) if self.round_output_scale else scale)
