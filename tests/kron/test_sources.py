"""Models that were trained as Kronecker products, in the two public shapes, and with a factored embedding.

The oracle is ``torch.kron`` in float64, and the module's own forward.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.kron.module import KroneckerEmbedding, KroneckerLinear
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.where import everywhere, running


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class FactorLinear(nn.Module):
    """``F.linear`` with ``W = sum_r kron(a[r], b[r])``; a ``[R, N1, K1]``, b ``[R, N2, K2]``."""

    def __init__(self, rank: int, shape_a: tuple[int, int], shape_b: tuple[int, int], bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, *shape_a))
        self.b = nn.Parameter(torch.randn(rank, *shape_b))
        self.bias = nn.Parameter(torch.randn(shape_a[0] * shape_b[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, sum_of_products(self.a, self.b), self.bias)


class FactorList(nn.Module):
    """The same with one Parameter per term."""

    def __init__(self, rank: int, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
        super().__init__()
        self.a = nn.ParameterList(torch.randn(shape_a) for _ in range(rank))
        self.b = nn.ParameterList(torch.randn(shape_b) for _ in range(rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, sum_of_products(torch.stack([*self.a]), torch.stack([*self.b])))


class KroneckerPair(nn.Module):
    """``x @ kron(weight_0, weight_1) + bias``: the weight is [in, out], as in GPT-2's Conv1D."""

    def __init__(self, weight_0: Tensor, weight_1: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight_0, self.weight_1 = nn.Parameter(weight_0), nn.Parameter(weight_1)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.kron(self.weight_0, self.weight_1) + self.bias


class FactorEmbedding(nn.Module):
    """Row i is ``kron(a[i], b)``; a ``[V, D/f]``, b ``[1, f]``."""

    def __init__(self, vocabulary: int, width: int, factor: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(vocabulary, width // factor))
        self.b = nn.Parameter(torch.randn(1, factor))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.kron(self.a, self.b)[ids]


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.kron(*pair) for pair in zip(a, b, strict=True)]).sum(0)


def read_factors(module: Any) -> lowbit.Source:
    stored = lowbit.KroneckerWeight(module.a, module.b)
    return lowbit.Source(stored, bias=module.bias, weight=lambda: sum_of_products(module.a, module.b))


def read_list(module: Any) -> lowbit.Source:
    return lowbit.Source(lowbit.KroneckerWeight(torch.stack([*module.a]), torch.stack([*module.b])))


def read_pair(module: Any) -> lowbit.Source:
    # kron(a, b).T == kron(a.T, b.T)
    a, b = module.weight_0.t(), module.weight_1.t()
    stored = lowbit.KroneckerWeight(a.unsqueeze(0), b.unsqueeze(0))
    return lowbit.Source(stored, bias=module.bias, weight=lambda: torch.kron(module.weight_0, module.weight_1).t())


def read_embedding(module: Any) -> lowbit.Source:
    stored = lowbit.KroneckerWeight(module.a.unsqueeze(0), module.b.unsqueeze(0))
    return lowbit.Source(stored, kind="embedding", weight=lambda: torch.kron(module.a, module.b))


lowbit.register_source(FactorLinear, read_factors)
lowbit.register_source(FactorList, read_list)
lowbit.register_source(KroneckerPair, read_pair)
lowbit.register_source(FactorEmbedding, read_embedding)


def assert_multiplies(layer: Any, a: Tensor, b: Tensor) -> None:
    """``layer`` against float64 arithmetic on its factors ``[R, N, K]``, on every ISA."""
    terms = [torch.kron(*pair).detach() for pair in zip(a.double(), b.double(), strict=True)]
    x = torch.randn(5, layer.in_features)
    bias = None if layer.bias is None else layer.bias.detach()
    for where in everywhere(interpreter=False):
        with running(where), torch.no_grad():
            # side by side, the terms give the bound their own magnitudes: their sum may cancel
            assert_linear_close(layer(x), x.repeat(1, len(terms)), torch.cat(terms, 1), bias)


SIZES = [
    (1, (2, 1), (24, 40)), (1, (1, 2), (33, 20)), (2, (6, 5), (7, 8)), (3, (16, 8), (4, 12)), (1, (1, 1), (5, 3)),
    (4, (30, 1), (1, 17)),
]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rank", "shape_a", "shape_b"), SIZES)
def test_stacked_factors(rank: int, shape_a: tuple[int, int], shape_b: tuple[int, int], bias: bool) -> None:
    module = FactorLinear(rank, shape_a, shape_b, bias)
    layer = lowbit.convert(module)
    assert type(layer) is KroneckerLinear and layer.bias is module.bias
    assert_bitwise_equal(layer.a.data, module.a.data)
    assert_bitwise_equal(layer.b.data, module.b.data)
    assert layer.weight_error <= 1e-6
    assert_multiplies(layer, module.a, module.b)


@pytest.mark.parametrize(("rank", "shape_a", "shape_b"), SIZES)
def test_factor_lists(rank: int, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
    module = FactorList(rank, shape_a, shape_b)
    layer = lowbit.convert(module)
    assert_multiplies(layer, torch.stack([*module.a]), torch.stack([*module.b]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_keep_their_dtype(dtype: torch.dtype) -> None:
    module = FactorLinear(1, (2, 4), (12, 9)).to(dtype)
    layer = lowbit.convert(module)
    assert layer.dtype == layer.a.dtype == layer.b.dtype == dtype
    assert_bitwise_equal(layer.dequantize(), torch.kron(module.a[0], module.b[0]).detach())


def test_pairs_of_transposed_factors_end_to_end(tmp_path: Path) -> None:
    class Block(nn.Module):
        """Pairs as Parameters of the block: ``c_fc_0`` and ``c_fc_1``, ``c_proj_0`` and ``c_proj_1``."""

        def __init__(self) -> None:
            super().__init__()
            self.c_fc_0, self.c_fc_1 = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(12, 32))
            self.c_fc_bias = nn.Parameter(torch.randn(96))
            self.c_proj_0, self.c_proj_1 = nn.Parameter(torch.randn(96, 1)), nn.Parameter(torch.randn(1, 24))
            self.c_proj_bias = nn.Parameter(torch.randn(24))

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.gelu(x @ torch.kron(self.c_fc_0, self.c_fc_1) + self.c_fc_bias)
            return hidden @ torch.kron(self.c_proj_0, self.c_proj_1) + self.c_proj_bias

    def split(block: Any) -> nn.Sequential:
        pairs = [
            KroneckerPair(*(getattr(block, f"{name}_{part}").detach() for part in ("0", "1", "bias")))
            for name in ("c_fc", "c_proj")
        ]
        return nn.Sequential(pairs[0], nn.GELU(), pairs[1])

    block, x = Block(), torch.randn(7, 24)
    expected = block(x).detach()
    model = split(block)
    pairs = copy.deepcopy(model)
    lowbit.convert(model)
    assert [row.scheme for row in lowbit.report(model).rows] == ["Kronecker 3x2 ⊗ 32x12", "Kronecker 1x96 ⊗ 24x1"]
    for i in (0, 2):
        assert_multiplies(model[i], pairs[i].weight_0.t()[None], pairs[i].weight_1.t()[None])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-4)
    for layer in (model[0], model[2]):
        assert layer.a.is_contiguous() and layer.b.is_contiguous()

    lowbit.save(model, tmp_path)
    loaded = lowbit.load(tmp_path, model=split(Block()))
    assert_bitwise_equal(loaded(x).detach(), model(x).detach())


@pytest.mark.parametrize(("vocabulary", "width", "factor"), [(50, 48, 2), (7, 15, 3), (9, 8, 8), (4, 5, 1)])
def test_factored_embedding(vocabulary: int, width: int, factor: int, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = FactorEmbedding(vocabulary, width, factor)
            self.head = FactorLinear(1, (2, 1), (3, width))

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.wte(ids))
            return y

    model = Model()
    reference, ids = copy.deepcopy(model), torch.randint(0, vocabulary, (2, 6))
    lowbit.convert(model)
    assert type(model.wte) is KroneckerEmbedding
    assert model.wte.format.nbytes == 4 * (vocabulary * width // factor + factor)
    for where in everywhere(interpreter=False):
        with running(where):
            assert_bitwise_equal(model.wte(ids), reference.wte(ids).detach())  # one product each: nothing to round
    torch.testing.assert_close(model(ids).detach(), reference(ids).detach(), rtol=1e-5, atol=1e-5)
    lowbit.save(model, tmp_path)
    assert_bitwise_equal(lowbit.load(tmp_path, model=Model())(ids).detach(), model(ids).detach())


def test_a_module_that_tells_its_kind_is_checked_when_loading(tmp_path: Path) -> None:
    class Telling(FactorLinear):
        out_features, in_features = 6, 4

    lowbit.register_source(Telling, read_factors)
    lowbit.save(lowbit.convert(nn.Sequential(FactorEmbedding(6, 4, 2))), tmp_path)
    with pytest.raises(ValueError, match=r"layer '0' was saved from a float embedding of shape \[6, 4\]"):
        lowbit.load(tmp_path, model=nn.Sequential(Telling(1, (6, 2), (1, 2))))


class QuantizedFactors(nn.Module):
    """A ternary first factor with one scale, and a float second one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ternary", torch.randint(-1, 2, (2 * 4, 6)))
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.b = nn.Parameter(torch.randn(2, 3, 5))


def read_quantized(module: Any) -> lowbit.Source:
    a = lowbit.PackedWeight((module.ternary + 2).to(torch.uint8), module.scale.detach().view(1, 1), None, bits=2)
    return lowbit.Source(lowbit.KroneckerWeight(a, module.b))


def test_a_packed_factor(tmp_path: Path) -> None:
    lowbit.register_source(QuantizedFactors, read_quantized)
    model = nn.Sequential(QuantizedFactors())
    module = model[0]
    lowbit.convert(model)
    assert model[0].format.a is not None and model[0].format.b is None
    assert_multiplies(model[0], (module.ternary * module.scale).view(2, 4, 6), module.b)
    lowbit.save(model, tmp_path)
    x = torch.randn(3, 30)
    loaded = lowbit.load(tmp_path, model=nn.Sequential(nn.Linear(30, 12, bias=False)))
    assert_bitwise_equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # the factors of x @ W taken for those of F.linear
        (lambda pair: lowbit.KroneckerWeight(pair.weight_0[None], pair.weight_1[None]), "reproduce|shape"),
        (lambda pair: lowbit.KroneckerWeight(pair.weight_1.t()[None], pair.weight_0.t()[None]), "do not reproduce"),
        (lambda pair: lowbit.KroneckerWeight(pair.weight_0.t(), pair.weight_1.t()), r"a must be a .* \[R, N, K\]"),
        (
            lambda pair: lowbit.KroneckerWeight(pair.weight_0.t()[None], pair.weight_1.t()[None].double()),
            "b must be a float32, float16 or bfloat16 tensor",
        ),
        (
            lambda pair: lowbit.KroneckerWeight(pair.weight_0.t()[None], pair.weight_1.t()[None].half()),
            "dense factors must have one dtype",
        ),
        (
            lambda pair: lowbit.KroneckerWeight(pair.weight_0.t()[None], pair.weight_1.t()[None].repeat(2, 1, 1)),
            "rank must be one number",
        ),
    ],
)
def test_a_wrong_reading_is_refused(change: Any, message: str) -> None:
    class Pair(KroneckerPair):
        pass

    lowbit.register_source(
        Pair,
        lambda module: lowbit.Source(change(module), weight=torch.kron(module.weight_0, module.weight_1).t()),
    )
    model = nn.ModuleDict({"pair": Pair(torch.randn(3, 3), torch.randn(4, 4), torch.randn(12))})
    with pytest.raises(ValueError, match=rf"pair: .*({message})"):
        lowbit.convert(model)
    assert type(model["pair"]) is Pair
