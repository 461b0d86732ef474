"""The Llama of ``llama.py`` as an OpenVINO model: 4-bit groups, a key/value cache kept as state, greedy decoding."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.models.memory import SHAPE
from benchmarks.peers.openvino import compressed, constant, core, options
from lowbit.core.bitpack import unpack
from lowbit.nn.layer import Layer

HEADS, KV_HEADS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
HEAD_SIZE = SHAPE["hidden_size"] // HEADS


def integers(*values: int) -> Any:
    return constant(torch.tensor(values))


def codes_and_scales(layer: Layer) -> tuple[Tensor, Tensor]:
    state = layer.state_dict()
    return unpack(state["packed"], layer.format.bits, layer.format.in_features), state["scales"]


class Graph:
    """The decoder for one sequence: ``ids [1, S]`` in, ``logits [1, 1, vocabulary]`` of the last position out."""

    def __init__(self, layers: dict[str, Layer], depth: int, rms_eps: float, rope_theta: float) -> None:
        import openvino
        from openvino import opset13

        self.ops, self.layers, self.eps = opset13, layers, rms_eps
        self.state: list[tuple[Any, Any]] = []  # of the cache: (variable, new value)
        ops = opset13
        self.ids = ops.parameter(openvino.PartialShape([1, -1]), numpy.int64, name="ids")
        codes, scales = codes_and_scales(layers["model.embed_tokens"])
        table = (codes.float() - 8) * scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        x = ops.convert(ops.gather(constant(table.half()), self.ids, integers(0)), "f32")
        past = None
        for i in range(depth):
            name = f"model.layers.{i}"
            keys, values = self.cached(f"{i}.key"), self.cached(f"{i}.value")
            if past is None:  # how many tokens came before, and what follows from the positions
                past = ops.gather(ops.shape_of(keys[0], "i64"), constant(torch.tensor(1)), constant(torch.tensor(0)))
                self.rotary(past, rope_theta)
            x = ops.add(x, self.attention(self.norm(x), f"{name}.self_attn", keys, values))
            h = self.norm(x)
            gate = ops.swish(self.linear(h, f"{name}.mlp.gate_proj"))
            h = ops.multiply(gate, self.linear(h, f"{name}.mlp.up_proj"))
            x = ops.add(x, self.linear(h, f"{name}.mlp.down_proj"))
        last = ops.gather(x, integers(-1), integers(1))
        logits = self.linear(self.norm(last), "lm_head")
        sinks = [ops.assign(value, variable) for variable, value in self.state]
        self.model = openvino.Model([ops.result(logits)], sinks, [self.ids], [v for v, _ in self.state])

    def linear(self, x: Any, name: str) -> Any:
        codes, scales = codes_and_scales(self.layers[name])
        return self.ops.matmul(x, compressed(codes, scales, self.layers[name].format.bits), False, True)

    def norm(self, x: Any) -> Any:
        """The weight of every norm is one."""
        ops = self.ops
        mean = ops.reduce_mean(ops.power(x, constant(torch.tensor(2.0))), integers(-1), True)
        return ops.divide(x, ops.sqrt(ops.add(mean, constant(torch.tensor(self.eps)))))

    def cached(self, name: str) -> tuple[Any, Any]:
        """What the cache holds so far, ``[KV_HEADS, T, HEAD_SIZE]``, and where it is kept."""
        import openvino
        from openvino.op.util import Variable, VariableInfo

        info = VariableInfo()
        info.data_shape = openvino.PartialShape([KV_HEADS, -1, HEAD_SIZE])
        info.data_type, info.variable_id = openvino.Type.f32, name
        variable = Variable(info)
        return self.ops.read_value(constant(torch.zeros(KV_HEADS, 0, HEAD_SIZE)), variable), variable

    def append(self, cached: tuple[Any, Any], new: Any) -> Any:
        before, variable = cached
        both = self.ops.concat([before, new], 1)
        self.state.append((variable, both))
        return both

    def rotary(self, past: Any, theta: float) -> None:
        """cos, sin ``[S, HEAD_SIZE]`` and the causal mask ``[S, T]``."""
        ops = self.ops
        zero, one = constant(torch.tensor(0)), constant(torch.tensor(1))
        count = ops.gather(ops.shape_of(self.ids, "i64"), one, zero)
        end = ops.add(past, count)
        positions = ops.unsqueeze(ops.range(past, end, one, "i64"), one)
        frequencies = 1.0 / theta ** (torch.arange(0, HEAD_SIZE, 2).float() / HEAD_SIZE)
        angles = ops.multiply(ops.convert(positions, "f32"), constant(torch.cat([frequencies, frequencies])[None]))
        self.cos, self.sin = ops.cos(angles), ops.sin(angles)
        seen = ops.less_equal(ops.unsqueeze(ops.range(zero, end, one, "i64"), zero), positions)
        self.mask = ops.select(seen, constant(torch.tensor(0.0)), constant(torch.tensor(-1e30)))

    def heads(self, x: Any, count: int) -> Any:
        """``[1, S, count * HEAD_SIZE]`` to ``[count, S, HEAD_SIZE]``."""
        shape = integers(-1, count, HEAD_SIZE)
        return self.ops.transpose(self.ops.reshape(x, shape, False), integers(1, 0, 2))

    def turned(self, x: Any) -> Any:
        ops = self.ops
        first, second = ops.split(x, constant(torch.tensor(-1)), 2).outputs()
        swapped = ops.concat([ops.negative(second), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(swapped, self.sin))

    def attention(self, x: Any, name: str, keys: Any, values: Any) -> Any:
        ops = self.ops
        query = self.turned(self.heads(self.linear(x, f"{name}.q_proj"), HEADS))
        keys = self.append(keys, self.turned(self.heads(self.linear(x, f"{name}.k_proj"), KV_HEADS)))
        values = self.append(values, self.heads(self.linear(x, f"{name}.v_proj"), KV_HEADS))
        # the query heads of one key head side by side: keys and values are not repeated
        query = ops.reshape(query, integers(KV_HEADS, HEADS // KV_HEADS, -1, HEAD_SIZE), False)
        one = integers(1)
        scores = ops.matmul(query, ops.unsqueeze(keys, one), False, True)
        scores = ops.multiply(scores, constant(torch.tensor(HEAD_SIZE**-0.5)))
        weights = ops.softmax(ops.add(scores, self.mask), -1)
        mixed = ops.matmul(weights, ops.unsqueeze(values, one), False, False)
        mixed = ops.reshape(mixed, integers(HEADS, -1, HEAD_SIZE), False)
        mixed = ops.reshape(ops.transpose(mixed, integers(1, 0, 2)), integers(1, -1, HEADS * HEAD_SIZE), False)
        return self.linear(mixed, f"{name}.o_proj")


class Decoder:
    """A compiled graph with a cache."""

    def __init__(self, layers: dict[str, Layer], depth: int, config: Any, threads: int) -> None:
        graph = Graph(layers, depth, config.rms_norm_eps, config.rope_parameters["rope_theta"])
        self.request = core().compile_model(graph.model, "CPU", options(threads)).create_infer_request()

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits ``[1, 1, vocabulary]`` of the last position, after forgetting everything."""
        self.request.reset_state()
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.request.infer([ids.numpy()], share_outputs=True)[0])

    def generate(self, ids: Tensor, count: int) -> Tensor:
        """``ids`` and ``count`` more, greedily."""
        following = self.prefill(ids).argmax(-1)
        found = [ids, following]
        for _ in range(count - 1):
            following = self.step(following).argmax(-1)
            found.append(following)
        return torch.cat(found, 1)
