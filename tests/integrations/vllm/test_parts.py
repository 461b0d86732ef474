"""The share of a layer that a process of vLLM holds, and layers that vLLM fuses: what needs no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.checkpoint.metadata import Metadata
from lowbit.integrations.vllm.parts import Description, FusedLinear, Part, cut_problem, file_patterns, joined, rows_of
from lowbit.nn.layer import LayerConfig, layer_class

SPECS = [
    lowbit.Packed(bits=4, group_size=32, outliers=0.02), lowbit.Packed(bits=3, granularity="row", symmetric=True),
    lowbit.Packed(bits=5, granularity="tensor"), lowbit.Packed(bits=2, group_size=16, zeros="float"),
    lowbit.Codebook(bits=3, outliers=0.02), lowbit.Codebook(bits=2, granularity="tensor"),
    lowbit.Codebook(bits=4, granularity="group", group_size=32),
]  # fmt: skip


def part_of(spec: lowbit.Spec, n: int, k: int = 64, name: str = "q_proj", seed: int = 0) -> tuple[Part, torch.Tensor]:
    """A layer as a folder has it, and its weight."""
    torch.manual_seed(seed)
    layer = layer_class(spec.family, "linear").from_float(torch.randn(n, k), spec)
    return Part(name, LayerConfig.of(layer), layer.canonical()), layer.dequantize()


def float_part(n: int, k: int = 64, name: str = "k_proj") -> tuple[Part, torch.Tensor]:
    weight = torch.randn(n, k)
    return Part(name, None, {"weight": weight}), weight


def test_rows_of_a_process() -> None:
    assert rows_of([8], [4], 1, 2) == [slice(4, 8)]
    assert rows_of([8], [8], 1, 2) == [slice(0, 8)]  # every process has all of it
    # k and v have two heads, which two processes each hold
    assert rows_of([16, 8, 8], [4, 4, 4], 1, 4) == [slice(4, 8), slice(16, 20), slice(24, 28)]
    assert rows_of([16, 8, 8], [4, 4, 4], 3, 4) == [slice(12, 16), slice(20, 24), slice(28, 32)]
    for whole, here, world in (([9], [4], 2), ([12], [4], 2), ([8], [0], 2)):
        with pytest.raises(ValueError, match=f"{whole[0]} rows cannot be divided into shares of {here[0]} for {world}"):
            rows_of(whole, here, 0, world)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_share_has_the_rows_and_columns_of_the_weight(spec: lowbit.Spec) -> None:
    part, weight = part_of(spec, 48)
    rows = [slice(8, 24), slice(40, 44)]
    share = part.share(rows, (1, 2))
    module = share.module("linear", torch.float32).prepare()
    assert torch.equal(module.dequantize(), torch.cat([weight[r] for r in rows])[:, 32:])
    assert part.share([slice(0, 48)]) is part
    cut, expected = float_part(48)
    assert torch.equal(cut.share(rows, (1, 2)).tensors["weight"], torch.cat([expected[r] for r in rows])[:, 32:])


def test_what_cannot_be_cut_is_named() -> None:
    for spec, columns, words in (
        (lowbit.Kronecker(), 2, r"Kronecker .* cannot be cut into shares"),
        (lowbit.Kronecker(), 1, r"Kronecker .* cannot be cut into shares"),
        (lowbit.Packed(bits=4, group_size=64), 2, r"group_size=64 must divide the 48 input features of a share"),
    ):  # fmt: skip
        part, _ = part_of(spec, 48, 96)
        rows = slice(0, 48 if columns > 1 else 24)
        with pytest.raises(ValueError, match=rf"q_proj: {words}: serve it with tensor_parallel_size=1"):
            part.share([rows], (0, columns))
        assert cut_problem(part.config, False, 1) is None
    config = part_of(lowbit.Codebook(table="nf4", group_size=16), 48, 96)[0].config
    assert config is not None and cut_problem(config, True, 2) is None
    nested = replace(config, format=replace(config.format, scales="nested"))  # type: ignore[type-var]
    for rows, columns in ((True, 1), (False, 2)):
        assert "(nested) cannot be cut into shares" in str(cut_problem(nested, rows, columns))


def test_act_order_is_cut_along_its_rows_alone() -> None:
    torch.manual_seed(0)
    weight = lowbit.Packed(bits=4, group_size=32).quantize(torch.randn(48, 64))
    layer = lowbit.PackedLinear.from_weight(replace(weight, order=torch.randperm(64).to(torch.int32)))
    part, x = Part("o_proj", LayerConfig.of(layer), layer.canonical()), torch.randn(3, 64)
    share = part.share([slice(8, 24), slice(40, 44)]).module("linear", torch.float32).prepare()
    assert torch.equal(share(x), layer(x)[:, [*range(8, 24), *range(40, 44)]])
    with pytest.raises(ValueError, match=r"o_proj: with act-order its columns .* tensor_parallel_size=1"):
        part.share([slice(0, 48)], (0, 2))


def test_shares_of_experts_add_up() -> None:
    torch.manual_seed(0)
    up, down, ids = torch.randn(3, 64, 32), torch.randn(3, 48, 32), torch.tensor([2, 0, 0, 1])
    spec = lowbit.Packed(bits=4, group_size=16, outliers=0.02)
    stacks = [lowbit.nn.layer.layer_class("packed", "experts").from_float(weight, spec) for weight in (up, down)]
    parts = [Part(name, LayerConfig.of(stack), stack.canonical()) for name, stack in zip("ab", stacks, strict=True)]

    def run(first: Any, second: Any) -> torch.Tensor:
        gate, up = first(x, ids).chunk(2, -1)
        return second(gate.relu() * up, ids)

    x, made = torch.randn(4, 32), []
    for rank in range(2):
        rows = [slice(start + 16 * rank, start + 16 * rank + 16) for start in range(0, 192, 32)]
        shares = parts[0].share(rows), parts[1].share([slice(0, 144)], (rank, 2))
        made.append(run(*(share.module("experts", torch.float32).prepare() for share in shares)))
    torch.testing.assert_close(made[0] + made[1], run(*stacks), rtol=1e-5, atol=1e-4)


def test_a_folder_that_lacks_a_tensor_is_refused() -> None:
    part, _ = part_of(SPECS[0], 48)
    with pytest.raises(ValueError, match=r"q_proj\.scales is missing"):
        Part("q_proj", part.config, {"packed": part.tensors["packed"]})
    with pytest.raises(ValueError, match=r"q_proj\.packed must have shape \(48, 8\): got \(24, 8\)"):
        Part("q_proj", part.config, {**part.tensors, "packed": part.tensors["packed"][:24]})


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_fused_layer_gives_what_its_parts_give(spec: lowbit.Spec) -> None:
    made = [part_of(spec, n, name=name, seed=n) for n, name in ((48, "q_proj"), (16, "k_proj"), (32, "v_proj"))]
    fused = FusedLinear([part for part, _ in made], torch.float32)
    assert len(fused.parts) == (3 if getattr(spec, "granularity", "") == "tensor" else 1)
    x, bias = torch.randn(3, 64), torch.randn(96)
    alone = [part.module("linear", torch.float32).prepare()(x) for part, _ in made]
    assert torch.equal(fused(x), torch.cat(alone, -1))
    torch.testing.assert_close(fused(x, bias), torch.cat(alone, -1) + bias, rtol=1e-6, atol=1e-6)


def test_unlike_parts_run_one_after_the_other() -> None:
    groups, int8 = lowbit.Packed(bits=4, group_size=32), lowbit.Packed(bits=4, group_size=32, activations="int8")
    for specs, count in (
        ([SPECS[0], SPECS[0], lowbit.Packed(bits=3)], 2), ([SPECS[0], None, SPECS[0]], 3), ([None, None, SPECS[0]], 2),
        ([SPECS[0], lowbit.Kronecker(), lowbit.Codebook(bits=4)], 3), ([int8, int8, groups], 2),
    ):  # fmt: skip
        made = [float_part(32) if spec is None else part_of(spec, 32, seed=i) for i, spec in enumerate(specs)]
        fused = FusedLinear([part for part, _ in made], torch.float32)
        assert len(fused.parts) == count
        x, bias = torch.randn(3, 64), torch.randn(96)
        alone = [x @ w.T if part.config is None else part.module("linear", torch.float32).prepare()(x)
                 for part, w in made]  # fmt: skip
        torch.testing.assert_close(fused(x, bias), torch.cat(alone, -1) + bias, rtol=1e-5, atol=1e-5)


def test_static_activations_are_joined_only_where_their_scales_are_equal() -> None:
    def part(scale: float) -> Part:
        torch.manual_seed(0)
        weight = lowbit.Packed(bits=4, group_size=32).quantize(torch.randn(32, 64))
        scales = dict(activations="int8_static", x_scale=torch.tensor([scale]))
        layer = lowbit.PackedLinear.from_weight(weight, **scales)
        return Part("q_proj", LayerConfig.of(layer), layer.canonical())

    one = joined([part(0.1), part(0.1)])
    assert one is not None and float(one.tensors["x_scale"]) == pytest.approx(0.1) and one.rows == 64
    assert joined([part(0.1), part(0.2)]) is None


def test_names() -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({
        "embed": torch.nn.Embedding(40, 32), "q_proj": torch.nn.Linear(32, 40), "up": torch.nn.Linear(32, 64),
    })})  # fmt: skip
    found = Description(Metadata.of(lowbit.convert(model, lowbit.Packed(bits=4, group_size=32))))
    assert found.find("model.q_proj") == found.find("q_proj") == found.find("outer.model.q_proj") == "model.q_proj"
    assert found.find("model.k_proj") is None and found.find("") is None
    assert found.of_shape("embedding", 40, 32) == "model.embed"
    assert found.of_shape("embedding", 40, 32, {"model.embed": 1}) is None
    assert found.of_shape("linear", 64, 32) == "model.up" and found.of_shape("embedding", 41, 32) is None
    found.layers["encoder.layer.0.attention.self.query"] = found.layers["model.up"]
    assert found.find("model.encoder.layer.0.attention.output.query") == "encoder.layer.0.attention.self.query"
    assert found.find("encoder.layer.0.attention.output.dense") is None
    del found.layers["encoder.layer.0.attention.self.query"]
    found.rename(lambda name: None if "up" in name else name.replace("model.", "language_model."))
    assert sorted(found.layers) == ["language_model.embed", "language_model.q_proj", "model.up"]
    found.layers["other"] = found.layers["language_model.embed"]
    with pytest.raises(ValueError, match=r"embedding of shape \[40, 32\].*language_model.embed, other"):
        found.of_shape("embedding", 40, 32)


def test_names_of_experts() -> None:
    stack = lowbit.nn.layer.layer_class("packed", "experts").from_float(torch.randn(2, 64, 32), lowbit.Packed(bits=4))
    config = LayerConfig.of(stack)
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in (1, 10) for name in ("gate_up_proj", "down_proj")]
    found = Description(Metadata(layers=dict.fromkeys(names, config), tied=()))
    found.rename(lambda name: name.replace(".down_proj.", ".w2.").replace(".gate_up_proj.", ".w13."))
    assert found.stacks == names
    assert found.stack_of("model.layers.1.mlp.experts", "down_proj") == names[1]
    assert found.stack_of("layers.10.block_sparse_moe.experts", "gate_up_proj") == names[2]
    assert found.stack_of("model.layers.0.mlp.experts", "down_proj") is None
    found.layers["vision.layers.1.mlp.experts.down_proj"] = config
    assert found.stack_of("text.layers.1.moe.experts", "down_proj") is None  # which one?

    def seen(name: str) -> str | None:
        for pattern, new in file_patterns(found).items():
            if pattern.search(name):
                return None if new is None else pattern.sub(new, name)
        return name

    moe = "model.layers.1.block_sparse_moe."
    for name, expected in (
        (moe + "experts.gate_up_proj.packed", moe + "experts.routed_experts.lowbit_first_packed"),
        (moe + "input_linear.weight.scales", moe + "experts.routed_experts.lowbit_first_scales"),
        (moe + "output_linear.weight.zeros", moe + "experts.routed_experts.lowbit_second_zeros"),
        (moe + "experts.down_proj", None), (moe + "input_linear.weight", None),
    ):  # fmt: skip
        assert seen(name) == expected
    for name in (
        "model.layers.1.shared_mlp.input_linear.weight", "model.layers.1.shared_mlp.input_linear.packed",
        "model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.shared_experts.down_proj.packed",
        "model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.1.mlp.experts.down_proj_bias",
    ):  # fmt: skip
        assert seen(name) == name


REGISTER = """
import sys, types
def module(name, **names):
    made = types.ModuleType(name); made.__dict__.update(names); sys.modules[name] = made; return made
known = {}
def register(name):
    methods.append(name)
    return lambda cls: known.setdefault(name, cls)
methods = ["gptq"]
quantization = module("vllm.model_executor.layers.quantization", QUANTIZATION_METHODS=methods,
                      QuantizationConfig=object, register_quantization_config=register)
module("vllm"); module("vllm.model_executor"); module("vllm.model_executor.layers", quantization=quantization)
import lowbit_vllm
lowbit_vllm.register(); lowbit_vllm.register()
assert methods == ["gptq", "lowbit"] and known["lowbit"]().get_name() == "lowbit", methods
assert not {"lowbit", "torch", "transformers"} & set(sys.modules)
"""


def test_the_entry_point_imports_nothing_and_may_be_called_again() -> None:
    root = str(Path(lowbit.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", REGISTER], env={**os.environ, "PYTHONPATH": root},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
