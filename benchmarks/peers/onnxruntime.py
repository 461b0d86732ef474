"""ONNX Runtime's weight-only operator ``MatMulNBits``: groups of 128, activations in int8 per group."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.candidate import (
    BYTES_PER_CALL,
    Candidate,
    Prepared,
    expand,
    pack_bytes,
    require,
    source,
    symmetric,
)  # fmt: skip

GROUP = 128
INT8_ACTIVATIONS = 4  # the operator's accuracy_level


def _session(codes: Tensor, scales: Tensor, bits: int, products: int, threads: int) -> Any:
    """``Y0 = A @ W.T``, ``Y1``, ...: one product each with W and with its rows in other orders.

    Byte-identical weights would be stored once, and be in the cache the second time.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, groups = scales.shape
    k = groups * GROUP
    packed = pack_bytes(codes, bits).view(n, groups, GROUP * bits // 8)
    nodes, constants = [], []
    for i in range(products):
        for name, tensor in ((f"B{i}", packed), (f"S{i}", scales)):
            constants.append(numpy_helper.from_array(tensor.roll(i, 0).contiguous().numpy(), name))
        nodes.append(helper.make_node(
            "MatMulNBits", ["A", f"B{i}", f"S{i}"], [f"Y{i}"], domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=GROUP, accuracy_level=INT8_ACTIVATIONS,
        ))  # fmt: skip
    outputs = [helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, ["M", n]) for i in range(products)]
    graph = helper.make_graph(
        nodes, "products", [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", k])], outputs, constants
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = min(model.ir_version, onnx.IR_VERSION, 10)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # otherwise the idle threads of the other copies' sessions spin, and take the cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bind(session: Any, x: Tensor) -> Callable[[], Tensor]:
    """Input and outputs stay where they are: nothing is copied."""
    import numpy

    binding, outputs = session.io_binding(), []
    binding.bind_input("A", "cpu", 0, numpy.float32, list(x.shape), x.data_ptr())
    for output in session.get_outputs():
        y = torch.empty(len(x), output.shape[1])
        binding.bind_output(output.name, "cpu", 0, numpy.float32, list(y.shape), y.data_ptr())
        outputs.append(y)

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return outputs[0]

    call.keeps = x  # type: ignore[attr-defined]  # the binding only has its address
    return call


def matmul_nbits(bits: int) -> Candidate:
    def prepare(n: int, k: int, device: str, threads: int) -> Prepared:
        require("onnxruntime")
        require("onnx")
        codes, scales = symmetric(source((n, k)), bits, GROUP)
        size = codes.numel() * bits // 8 + 4 * scales.numel()
        products = math.ceil(BYTES_PER_CALL / size)
        exact = (codes.double() - 2 ** (bits - 1)) * expand(scales, GROUP)
        make = functools.partial(_session, codes, scales, bits, products, threads)
        return Prepared(
            lambda made, x: _bind(made, x)(), make(), size, exact, tolerance=2e-2, make=make, products=products,
            bind=_bind,
        )  # fmt: skip

    facts = {"who": "onnxruntime", "bits": bits, "group": GROUP, "activations": "int8"}
    return Candidate(f"onnxruntime w{bits} g{GROUP} int8", prepare, facts, ("threads",), lambda n, k: not k % GROUP)


CANDIDATES = [matmul_nbits(bits) for bits in (2, 4, 8)]
