"""llama.cpp: a whole model from a GGUF file, by the Python package that builds it for this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy
import torch
from torch import Tensor

from benchmarks.harness.candidate import require


class Decoder:
    """A Llama of the shape of ``benchmarks/models/llama.py`` with random Q4_K weights, some of them Q6_K, as the
    ``Q4_K_M`` files have them."""

    def __init__(self, layers: int, threads: int) -> None:
        from benchmarks.models.imports import write_gguf

        package = require("llama_cpp")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, layers)
            self.model = package.Llama(str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(self, ids: Tensor, count: int) -> Tensor:
        """``ids`` ``[1, S]`` and ``count`` greedy tokens after them."""
        self.prefill(ids)
        tokens = ids[0].tolist()
        for _ in range(count):
            tokens.append(int(self.logits().argmax()))
            self.model.eval(tokens[-1:])
        return torch.tensor([tokens])

    def prefill(self, ids: Tensor) -> Tensor:
        self.model.reset()
        self.model.eval(ids[0].tolist())
        return self.logits()[None, None]

    def logits(self) -> Tensor:
        """Of the last position, ``[vocabulary]``."""
        values = numpy.ctypeslib.as_array(self.model._ctx.get_logits(), shape=(self.model.n_vocab(),))
        return torch.from_numpy(values)
