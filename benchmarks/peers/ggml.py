"""ggml, the tensor library of llama.cpp: a layer of experts, as llama.cpp builds its graph.

The libraries are those that llama-cpp-python was built with for this machine. Weights are put into the buffers that
llama.cpp would choose: for some types, ones that are packed anew for the CPU's instructions.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.candidate import require

TYPES = {"q4_0": 2, "q8_0": 8}
_REPACKED = ("q4_0",)  # on x86; other types would crash there
_F32, _I32 = 0, 26
_POINTERS = {
    "init", "new_tensor_2d", "new_tensor_3d", "mul_mat_id", "swiglu", "mul", "add", "view_2d", "new_graph_custom",
    "backend_cpu_init", "backend_cpu_buffer_type", "backend_alloc_ctx_tensors_from_buft", "backend_dev_by_type",
    "backend_dev_backend_reg", "backend_reg_get_proc_address",
}  # fmt: skip
_CPU = 0  # of ggml_backend_dev_type


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Library:
    """Functions ``ggml_*`` by name, of the shared objects that llama-cpp-python has."""

    def __init__(self, folder: Path) -> None:
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        self.parts = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names]

    def __getattr__(self, name: str) -> Any:
        for part in self.parts:
            function = getattr(part, f"ggml_{name}", None)
            if function is not None:
                other = ctypes.c_char_p if name == "backend_buft_name" else ctypes.c_int
                function.restype = ctypes.c_void_p if name in _POINTERS else other
                return function
        raise AttributeError(name)

    def context(self) -> ctypes.c_void_p:
        """One that holds descriptions of tensors alone."""
        return ctypes.c_void_p(self.init(_Parameters(1 << 22, None, True)))


@cache
def _library() -> _Library:
    return _Library(Path(require("llama_cpp").__file__).parent / "lib")


def _pointer(value: Any) -> ctypes.c_void_p:
    return value if isinstance(value, ctypes.c_void_p) else ctypes.c_void_p(value)


def _buffer_type(library: _Library, repacked: bool) -> ctypes.c_void_p:
    """Where weights go: the buffers that pack them anew, as llama.cpp tries first, or plain ones."""
    device = _pointer(library.backend_dev_by_type(_CPU))
    registry = _pointer(library.backend_dev_backend_reg(device))
    address = library.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if repacked and address:
        found = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        for buffer_type in itertools.takewhile(bool, found or ()):
            if b"REPACK" in library.backend_buft_name(ctypes.c_void_p(buffer_type)):
                return ctypes.c_void_p(buffer_type)
    return _pointer(library.backend_cpu_buffer_type())


class Experts:
    """``y[t] = sum_j scores[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))``, e = ids[t, j].

    Every expert has the same random codes, ``stack(name)``, so that they are soon made.
    """

    def __init__(self, shape: tuple[int, int, int, int], kind: str, threads: int) -> None:
        self.count, self.hidden, self.width, self.chosen = shape
        self.kind, self.library = kind, _library()
        self.backend = _pointer(self.library.backend_cpu_init())
        self.library.backend_cpu_set_n_threads(self.backend, ctypes.c_int(threads))
        self.weights = self.library.context()
        sizes = {"gate_up": (2 * self.width, self.hidden), "down": (self.hidden, self.width)}
        self.tensors = {
            name: _pointer(self.library.new_tensor_3d(
                self.weights, TYPES[kind], *map(ctypes.c_int64, (k, n, self.count))
            ))
            for name, (n, k) in sizes.items()
        }  # fmt: skip
        place = _buffer_type(self.library, kind in _REPACKED)
        assert self.library.backend_alloc_ctx_tensors_from_buft(self.weights, place)
        self.blocks, self.nbytes = {}, 0
        for name, (n, k) in sizes.items():
            self.blocks[name] = self._random(n, k)
            values = self.blocks[name].repeat(self.count, 1)
            size = ctypes.c_size_t(values.numel())
            self.library.backend_tensor_set(
                self.tensors[name], ctypes.c_void_p(values.data_ptr()), ctypes.c_size_t(0), size
            )
            self.nbytes += values.numel()

    def _random(self, n: int, k: int) -> Tensor:
        """The stored rows of one expert, ``uint8 [n, bytes]``: of each 32 weights a scale in float16 and the codes."""
        size = 16 if self.kind == "q4_0" else 32
        generator = torch.Generator().manual_seed(n)
        codes = torch.randint(256, (n, k // 32, size), dtype=torch.uint8, generator=generator)
        scale = torch.full((n, k // 32, 1), k**-0.5 / (5 if size == 16 else 74)).half().view(torch.uint8)
        return torch.cat([scale, codes], -1).flatten(1).contiguous()

    def stack(self, name: str) -> Tensor:
        """The float64 weight ``[n, k]`` of every expert."""
        gguf = require("gguf")
        kind = getattr(gguf.GGMLQuantizationType, self.kind.upper())
        return torch.from_numpy(gguf.quants.dequantize(self.blocks[name].numpy(), kind)).double()

    def prepared(self, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A call with x ``[tokens, hidden]``, ids and scores ``[tokens, chosen]``."""
        g, (h, j, t) = self.library, (self.hidden, self.chosen, tokens)
        i64 = ctypes.c_int64
        context = g.context()
        x = _pointer(g.new_tensor_3d(context, _F32, i64(h), i64(1), i64(t)))
        ids = _pointer(g.new_tensor_2d(context, _I32, i64(j), i64(t)))
        scores = _pointer(g.new_tensor_3d(context, _F32, i64(1), i64(j), i64(t)))
        up = _pointer(g.mul_mat_id(context, self.tensors["gate_up"], x, ids))
        gated = _pointer(g.swiglu(context, up))
        down = _pointer(g.mul_mat_id(context, self.tensors["down"], gated, ids))
        weighed = _pointer(g.mul(context, down, scores))
        row = ctypes.c_size_t(4 * h * j)
        parts = [_pointer(g.view_2d(context, weighed, i64(h), i64(t), row, ctypes.c_size_t(4 * h * i)))
                 for i in range(j)]  # fmt: skip
        y = parts[0]
        for part in parts[1:]:
            y = _pointer(g.add(context, y, part))
        graph = _pointer(g.new_graph_custom(context, ctypes.c_size_t(2048), ctypes.c_bool(False)))
        g.build_forward_expand(graph, y)
        assert g.backend_alloc_ctx_tensors_from_buft(context, _pointer(g.backend_cpu_buffer_type()))
        out, zero = torch.empty(tokens, h), ctypes.c_size_t(0)

        def call(values: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            for tensor, held in ((x, values.float()), (ids, chosen.int()), (scores, weights.float())):
                held = held.contiguous()
                g.backend_tensor_set(tensor, ctypes.c_void_p(held.data_ptr()), zero, ctypes.c_size_t(4 * held.numel()))
            status = g.backend_graph_compute(self.backend, graph)
            assert status == 0, status
            g.backend_tensor_get(y, ctypes.c_void_p(out.data_ptr()), zero, ctypes.c_size_t(4 * out.numel()))
            return out

        return call
