"""OpenVINO's weight-compressed products with dynamic quantization of the activations in groups of 128."""

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


@functools.cache
def core() -> Any:
    import openvino

    return openvino.Core()


def options(threads: int, precision: str = "f32", group: int = GROUP) -> dict[str, Any]:
    """Of a compiled model; ``group`` 0 leaves activations as they are."""
    return {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }  # fmt: skip


def constant(tensor: Tensor, type_name: str | None = None, shape: list[int] | None = None) -> Any:
    """A graph constant with a copy of the tensor's values; of a type that torch lacks: of its bytes."""
    import openvino
    from openvino import opset13 as ops

    array = tensor.contiguous().numpy()
    if type_name is None:
        return ops.constant(array)
    value = openvino.Tensor(getattr(openvino.Type, type_name), openvino.Shape(shape or list(tensor.shape)))
    value.data[:] = array.reshape(value.data.shape)
    return openvino.op.Constant(value)


def compressed(codes: Tensor, scales: Tensor, bits: int) -> Any:
    """The node of the weight ``(code - 2**(bits-1)) * scale``, float32 ``[N, K]``, stored in ``bits`` bits."""
    from openvino import opset13 as ops

    n, groups = scales.shape
    stored = constant(pack_bytes(codes, bits), f"u{bits}", [n, groups, codes.shape[1] // groups])
    middle = constant(torch.tensor([[[2 ** (bits - 1)]]], dtype=torch.uint8))
    weight = ops.subtract(ops.convert(stored, "f16"), ops.convert(middle, "f16"))
    weight = ops.multiply(weight, constant(scales.half()[..., None]))
    return ops.convert(ops.reshape(weight, constant(torch.tensor([n, codes.shape[1]])), False), "f32")


def _request(codes: Tensor, scales: Tensor, bits: int, products: int, threads: int) -> Any:
    """An inference request for one product each with W and with its rows in other orders."""
    import numpy
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter(openvino.PartialShape([-1, codes.shape[1]]), numpy.float32, name="x")
    results = [
        ops.result(ops.matmul(x, compressed(codes.roll(i, 0), scales.roll(i, 0), bits), False, True))
        for i in range(products)
    ]
    model = openvino.Model(results, [x])
    return core().compile_model(model, "CPU", options(threads)).create_infer_request()


def _bind(request: Any, x: Tensor) -> Callable[[], Tensor]:
    """Input and outputs stay where they are: nothing is copied."""
    import openvino

    outputs = []
    for output in request.model_outputs:
        y = torch.empty(len(x), output.partial_shape[1].get_length())
        outputs.append(y)
    tensors = [openvino.Tensor(y.numpy(), shared_memory=True) for y in outputs]
    given = openvino.Tensor(x.numpy(), shared_memory=True)

    def call() -> Tensor:
        request.infer(share_outputs=True)
        return outputs[0]

    request.set_input_tensor(0, given)
    for i, tensor in enumerate(tensors):
        request.set_output_tensor(i, tensor)
    return call


def compressed_linear(bits: int, group: int | str) -> Candidate:
    def prepare(n: int, k: int, device: str, threads: int) -> Prepared:
        require("openvino")
        group_size = k if group == "row" else int(group)
        codes, scales = symmetric(source((n, k)), bits, group_size)
        size = codes.numel() * bits // 8 + 2 * scales.numel()
        products = math.ceil(BYTES_PER_CALL / size)
        exact = (codes.double() - 2 ** (bits - 1)) * expand(scales.half(), group_size)
        make = functools.partial(_request, codes, scales, bits, products, threads)
        return Prepared(
            lambda made, x: _bind(made, x)(), make(), size, exact, tolerance=2e-2, make=make, products=products,
            bind=_bind,
        )  # fmt: skip

    name = f"openvino w{bits} {'row' if group == 'row' else f'g{group}'} int8"
    facts = {"who": "openvino", "bits": bits, "group": group, "activations": "int8"}
    return Candidate(name, prepare, facts, ("threads",), lambda n, k: group == "row" or not k % int(group))


CANDIDATES = [compressed_linear(4, GROUP), compressed_linear(8, "row")]
