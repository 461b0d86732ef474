"""Models that hold codebooks already: bitsandbytes' 4-bit modules, k-means fake quantization, sparse outliers.

"Lossless" is bitsandbytes' own dequantized weight, or the module's own float weight, bit for bit.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.codebook.module import CodebookEmbedding, CodebookLinear
from lowbit.core.bitpack import unpack
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close, frobenius_bound
from lowbit.testing.packed_cases import DTYPES
from lowbit.testing.where import everywhere, running

N, K = 24, 256


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def codes_of(layer: Any) -> Tensor:
    return unpack(layer.packed, layer.format.bits, layer.format.in_features)


def assert_multiplies(layer: Any, weight: Tensor, dtype: torch.dtype) -> None:
    """``layer`` against float64 arithmetic on ``weight``, the float32 values that it holds, on every ISA."""
    x = torch.randn(5, weight.shape[1]).to(dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    for where in everywhere(interpreter=False):
        with running(where), torch.no_grad():
            y = layer(x)
        # products of bfloat16 by this instruction set round the weight as a dense layer of that dtype does
        rounded = where.isa == "avx512bf16" and dtype == torch.bfloat16
        assert_linear_close(y, x, weight.bfloat16() if rounded else weight, bias)


# ----------------------------------------------------------------------------------------------- bitsandbytes


@pytest.fixture(scope="module")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles its fallback for shapes that its kernels do not take: run it as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def linear4bit(
    bnb: Any,
    n: int = N,
    k: int = K,
    *,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    **kwargs: Any,
) -> Any:
    layer = bnb.nn.Linear4bit(k, n, bias=bias, **kwargs).to(dtype)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def dequantized(bnb: Any, module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight by bitsandbytes, rounded once to ``dtype``."""
    state = copy.deepcopy(module.weight.quant_state)
    state.dtype = dtype or state.dtype
    weight: Tensor = bnb.functional.dequantize_4bit(module.weight.data, state)
    return weight


def stored_bytes(weight: Any) -> int:
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.code, state.state2.absmax, state.offset]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_linear4bit_is_lossless(bnb: Any, quant_type: str, nested: bool, dtype: torch.dtype, blocksize: int) -> None:
    module = linear4bit(bnb, blocksize=blocksize, dtype=dtype, quant_type=quant_type, compress_statistics=nested)
    exact, rounded = dequantized(bnb, module, torch.float32), dequantized(bnb, module)
    size = stored_bytes(module.weight)
    layer = lowbit.convert(module)
    assert type(layer) is CodebookLinear and layer.dtype == dtype and layer.bias is module.bias
    where = "scale per row" if blocksize == K else f"scale per group {blocksize}"
    assert layer.format.describe() == f"4-bit codebook per tensor, {where}" + " (nested)" * nested
    assert_bitwise_equal(layer.dequantize(torch.float32), exact)
    assert_bitwise_equal(layer.dequantize(), rounded)
    assert layer.weight_error == 0.0 and layer.note is None
    assert layer.format.nbytes == size  # the tables of 16, and of 256 and the offset where nested, counted in both
    assert_multiplies(layer, exact, dtype)


@pytest.mark.parametrize(("name", "quant_type"), [("LinearNF4", "nf4"), ("LinearFP4", "fp4")])
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_the_named_classes_and_other_storage(bnb: Any, name: str, quant_type: str, quant_storage: torch.dtype) -> None:
    module = getattr(bnb.nn, name)(K, N, bias=False, quant_storage=quant_storage).to("cpu")
    assert module.weight.quant_state.quant_type == quant_type and module.weight.dtype == quant_storage
    exact = dequantized(bnb, module)
    layer = lowbit.convert(module)
    assert layer.bias is None and layer.format.scales == "nested"
    assert_bitwise_equal(layer.dequantize(), exact)


# bitsandbytes' CPU kernel takes every row to start a block of its own, so its fallback in torch is the oracle here
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "blocksize", "group_size"),
    [
        (5, 96, 64, 32), (24, 32, 64, 32), (3, 8, 64, 8), (7, 80, 64, 16), (9, 96, 256, 32), (40, 64, 4096, 64),
        (3, 1, 64, 1),
    ],
)  # fmt: skip
def test_blocks_that_end_within_rows(bnb: Any, n: int, k: int, blocksize: int, group_size: int, nested: bool) -> None:
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    module = linear4bit(bnb, n, k, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    state = module.weight.quant_state
    absmax = state.absmax
    if nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    exact = _dequantize_4bit_compute(module.weight.data.view(-1), absmax, state.code, blocksize, (n, k), torch.float32)
    layer = lowbit.convert(module)
    assert layer.format.group_size == group_size and layer.format.scales == "float32"
    assert layer.note == ("its nested scales are stored as float32" if nested else None)
    assert_bitwise_equal(layer.dequantize(), exact)
    assert_multiplies(layer, exact, torch.float32)


@pytest.mark.parametrize(("k", "count"), [(33, 1), (100, 4), (72, 8)])
def test_rows_that_no_group_fits_are_left_alone(bnb: Any, k: int, count: int) -> None:
    model = nn.ModuleDict({"good": linear4bit(bnb), "odd": linear4bit(bnb, 6, k)})
    odd = model["odd"]
    lowbit.convert(model)
    assert model["odd"] is odd and isinstance(model["good"], CodebookLinear)
    reason = f"its blocks of 64 weights do not end with its rows of {k}: one scale per {count} weights would be needed"
    assert lowbit.report(model).skipped == {"odd": reason}


@pytest.mark.parametrize("k", [128, 96])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "quant_type"), [("EmbeddingNF4", "nf4"), ("EmbeddingFP4", "fp4")])
def test_embedding4bit(bnb: Any, name: str, quant_type: str, dtype: torch.dtype, k: int) -> None:
    module = getattr(bnb.nn, name)(50, k, dtype=dtype).to("cpu")
    assert module.weight.quant_state.quant_type == quant_type
    layer = lowbit.convert(module)
    assert type(layer) is CodebookEmbedding and layer.dtype == dtype
    ids = torch.tensor([[0, 49], [3, 7]])
    assert_bitwise_equal(layer(ids), layer.dequantize()[ids])
    if k % 64 == 0:
        assert_bitwise_equal(layer(ids), module(ids).detach())


def test_what_an_embedding_keeps(bnb: Any) -> None:
    module = bnb.nn.EmbeddingNF4(50, 128).to(torch.bfloat16).to("cpu")
    module.padding_idx = 3
    assert module.weight.quant_state.dtype == torch.bfloat16 and module.dtype == torch.float32
    layer = lowbit.convert(module)
    assert layer.padding_idx == 3 and layer.dtype == torch.float32  # that of the module's output


def for_cpu(bnb: Any, module: Any) -> None:
    """What the module's first call does on a CPU with bfloat16 products."""
    state = module.weight.quant_state
    module.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(module.weight.data, state)
    assert state.packing_format_for_cpu and module.weight.shape == (module.out_features, module.in_features // 2)


@pytest.mark.parametrize("then", ["as it is", "saved", "called"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16], ids=str)
def test_the_layout_of_its_cpu_kernel_is_undone(
    bnb: Any, quant_storage: torch.dtype, dtype: torch.dtype, nested: bool, then: str
) -> None:
    module = linear4bit(
        bnb, 64, dtype=dtype, quant_type="nf4", compress_statistics=nested, quant_storage=quant_storage
    ).eval()  # fmt: skip
    untouched = lowbit.convert(copy.deepcopy(module))
    scales = dequantized(bnb, module, torch.float32).view(64, -1, 64).abs().amax(-1)  # a block's largest code is 1
    if then == "called":
        with torch.no_grad():
            module(torch.randn(2, K, dtype=dtype))
        if not hasattr(module.weight.quant_state, "packing_format_for_cpu"):
            pytest.skip("bitsandbytes has no bfloat16 kernel for this CPU")
    else:
        for_cpu(bnb, module)
    if then == "saved":
        module.state_dict()  # leaves the layout again, all but the scales
        assert not module.weight.quant_state.packing_format_for_cpu
    layer = lowbit.convert(module)
    assert layer.dtype == dtype
    assert_bitwise_equal(codes_of(layer), codes_of(untouched))
    assert_bitwise_equal(layer.codebook.data, untouched.codebook.data)
    if nested and then == "saved":  # quantized a second time
        state = module.weight.quant_state
        expected = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
        expected += state.offset
        assert layer.format.scales == ("nested" if dtype == torch.float32 else "float32")
        assert_bitwise_equal(layer.dequantize(), dequantized(bnb, module))
        assert float((expected.float().view(64, -1) / scales - 1).abs().max()) < 0.03
        return
    assert "its scales were rounded to bfloat16 by bitsandbytes when it ran on a CPU" in layer.note
    assert_bitwise_equal(layer.scales.data, scales.bfloat16())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("repacked", [False, True])
def test_the_layer_shares_nothing_with_the_module(bnb: Any, repacked: bool, nested: bool) -> None:
    module = linear4bit(bnb, 64, bias=False, compress_statistics=nested)
    if repacked:
        for_cpu(bnb, module)
    data, state = module.weight.data.clone(), copy.deepcopy(module.weight.quant_state)
    for tensor in lowbit.convert(nn.Sequential(module))[0].named_tensors().values():
        tensor.data.fill_(1)
    assert_bitwise_equal(module.weight.data, data)
    found = module.weight.quant_state
    assert found.__dict__.keys() == state.__dict__.keys()
    for name in ("absmax", "code"):
        assert_bitwise_equal(getattr(found, name), getattr(state, name))
    if nested and not repacked:
        for tensor, before in ((found.offset, state.offset), (found.state2.absmax, state.state2.absmax)):
            assert_bitwise_equal(tensor, before)
        assert_bitwise_equal(found.state2.code, state.state2.code)


def test_a_weight_that_lost_its_quant_state(bnb: Any) -> None:
    module = linear4bit(bnb)
    exact = dequantized(bnb, module)
    module.weight = nn.Parameter(module.weight.data, requires_grad=False)  # as FSDP leaves it
    assert_bitwise_equal(lowbit.convert(module).dequantize(), exact)


@pytest.mark.parametrize(
    ("compute", "note"),
    [
        (None, None),
        (torch.bfloat16, None),
        (torch.float32, "it computed in float32: the packed layer computes in the dtype of its input"),
    ],
)
def test_a_compute_dtype_of_its_own_is_noted(bnb: Any, compute: torch.dtype | None, note: str | None) -> None:
    module = linear4bit(bnb, dtype=torch.bfloat16, compute_dtype=compute)
    assert lowbit.convert(module).note == note


def test_what_is_not_quantized_yet_is_left_alone(bnb: Any) -> None:
    float_module = bnb.nn.Linear4bit(K, N)
    model = nn.ModuleDict({"good": linear4bit(bnb), "odd": float_module, "embedding": bnb.nn.EmbeddingNF4(9, K)})
    lowbit.convert(model)
    reasons = lowbit.report(model).skipped
    assert model["odd"] is float_module and sorted(reasons) == ["embedding", "odd"]
    assert all(reason.startswith("its weight is not quantized yet") for reason in reasons.values())
    lowbit.convert(nn.Sequential(float_module.to("cpu")))  # as the reason says


def bad_shape(bnb: Any) -> Any:
    module = linear4bit(bnb)
    module.weight.quant_state.shape = torch.Size((K, N))
    return module


def bad_absmax(bnb: Any) -> Any:
    module = linear4bit(bnb, compress_statistics=False)
    module.weight.quant_state.absmax = module.weight.quant_state.absmax[1:]
    return module


def bad_data(bnb: Any) -> Any:
    module = linear4bit(bnb)
    module.weight.data = module.weight.data[1:]
    return module


def on_meta(bnb: Any) -> Any:
    module = linear4bit(bnb)
    state = module.weight.quant_state
    module.weight = bnb.nn.Params4bit(module.weight.data.to("meta"), quant_state=state, bnb_quantized=True)
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_shape, r"quant_state.shape must be \[out_features, in_features\] = \[24, 256\]: got \[256, 24\]"),
        (bad_absmax, "absmax must hold one scale per block of 64, 96: got 95"),
        (bad_data, r"its weight must hold \[24, 256\] values of 4 bits: got 3071 bytes"),
        (on_meta, "its weight must hold values: it is on the meta device"),
    ],
)
def test_what_cannot_be_right_is_an_error_that_names_the_layer(bnb: Any, make: Any, message: str) -> None:
    good = linear4bit(bnb)
    model = nn.ModuleDict({"good": good, "a": make(bnb)})
    with pytest.raises(ValueError, match=rf"a: {message}"):
        lowbit.convert(model)
    assert model["good"] is good


def test_import_brings_no_bitsandbytes() -> None:
    code = "import sys, lowbit; print(*[n for n in sys.modules if n.startswith('bitsandbytes')])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [] and run.stderr == ""


def llama(folder: Path, **quantization: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **quantization),
    )  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_a_transformers_model_loaded_in_4_bits(bnb: Any, nested: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = llama(tmp_path / "float", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    count = sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        expected = model.train()(ids).logits  # in training it stays away from its bfloat16 kernel
    lowbit.convert(model.eval())
    report = lowbit.report(model)
    assert len(report.rows) == count == 14 and all(row.weight_error == 0.0 for row in report.rows)
    with torch.no_grad():
        logits = model(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 10 * frobenius_bound(torch.float32, 128)

    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "packed")
    lowbit.save(model, tmp_path / "folder")
    for loaded in (
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "packed"),
        lowbit.load(tmp_path / "folder"),
    ):
        with torch.no_grad():
            assert_bitwise_equal(loaded(ids).logits, logits)
        assert torch.equal(loaded.generate(ids, max_new_tokens=6, do_sample=False), generated)
        assert not any(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules())


# ------------------------------------------------------------------------------------------- k-means and others


def few_values(shape: tuple[int, int], count: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight of at most ``count`` values per row, or per tensor with ``rows=1``, each of which occurs."""
    n, k = shape
    table = torch.randn(rows, count).to(dtype)
    index = torch.randint(0, count, shape).view(rows, -1)
    index[:, :count] = torch.arange(count)
    return table.gather(1, index).view(n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 31, 256])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_codebook_of_is_exact(granularity: Any, count: int, dtype: torch.dtype) -> None:
    # 256 normal bfloat16 values repeat: the oracle counts what is there
    n, k, group_size = 6, 600, 250
    weight = few_values((n, k), count, n if granularity == "row" else 1, dtype)
    if granularity == "group":
        blocks = [few_values((n, g), min(count, g), n, dtype) for g in (250, 250, 100)]
        weight = torch.cat(blocks, 1)
    stored = lowbit.codebook_of(weight, granularity, group_size=group_size if granularity == "group" else None)
    pieces = {
        "tensor": [weight], "row": list(weight), "group": [p for row in weight for p in row.split(group_size)],
    }[granularity]  # fmt: skip
    most = max(len(set(piece.flatten().tolist())) for piece in pieces)
    assert stored.bits == max(1, (most - 1).bit_length()) and stored.codebook.dtype == dtype
    assert stored.format().granularity == granularity and stored.scales is None
    tables = stored.codebook.expand(n, -1, -1)[:, [j // group_size if granularity == "group" else 0 for j in range(k)]]
    assert_bitwise_equal(tables.gather(2, stored.codes.long().unsqueeze(2)).squeeze(2), weight)
    layer = CodebookLinear.from_weight(stored)
    assert_bitwise_equal(layer.dequantize(dtype), weight)
    if dtype == torch.float32:
        assert_multiplies(layer, weight, dtype)


def test_codebook_of_small_and_strided_weights() -> None:
    for weight in (torch.tensor([[3.0]]), torch.tensor([[-0.0, 0.0]]), few_values((40, 9), 5).t(), torch.ones(5, 1)):
        for granularity in ("tensor", "row"):
            stored = lowbit.codebook_of(weight, granularity)
            assert stored.bits == (3 if weight.shape == (9, 40) else 1)
            assert_bitwise_equal(CodebookLinear.from_weight(stored).dequantize(), weight.contiguous())
    trainable = nn.Parameter(few_values((4, 9), 5))
    assert not lowbit.codebook_of(trainable).codebook.requires_grad


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.arange(600.0).view(2, 300), {}, "weight must take at most 256 distinct values per tensor: got 600"),
        (
            torch.stack([torch.ones(300), torch.arange(300.0)]), {"granularity": "row"},
            "weight must take at most 256 distinct values per row: got 300",
        ),
        (torch.zeros(3), {}, r"weight must be a float32, float16 or bfloat16 tensor \[N, K\]: got torch.float32 \[3\]"),
        (torch.zeros(2, 2, dtype=torch.int32), {}, r"tensor \[N, K\]: got torch.int32 \[2, 2\]"),
        (torch.zeros(0, 2), {}, r"tensor \[N, K\]: got torch.float32 \[0, 2\]"),
        (torch.tensor([[1.0, float("nan")]]), {}, "weight must be finite"),
        (torch.zeros(2, 2), {"granularity": "column"}, "granularity must be one of 'tensor', 'row', 'group'"),
        (torch.zeros(2, 2), {"granularity": "group"}, "group_size goes with granularity='group': got group_size=None"),
        (torch.zeros(2, 2), {"group_size": 2}, "group_size goes with granularity='group': got group_size=2"),
        (
            torch.zeros(2, 2), {"granularity": "group", "group_size": 3},
            "group_size must be between 1 and K: got group_size=3, K=2",
        ),
    ],
)  # fmt: skip
def test_codebook_of_says_what_it_cannot_read(weight: Tensor, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.codebook_of(weight, **arguments)


class KMeansLinear(nn.Linear):
    """k-means fake quantization: a float weight that takes few values."""


class CentroidLinear(nn.Module):
    """A trained table and the index of each weight in it, with outliers that were trained in float."""

    def __init__(self, n: int, k: int, bits: int, outliers: int) -> None:
        super().__init__()
        self.out_features, self.in_features = n, k
        self.centroids = nn.Parameter(torch.randn(2**bits))
        self.register_buffer("labels", torch.randint(0, 2**bits, (n, k)))
        sparse = torch.zeros(n * k)
        sparse[torch.randperm(n * k)[:outliers]] = 1 + torch.rand(outliers)
        self.outliers = nn.Parameter(sparse.view(n, k))
        self.bias = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.centroids[self.labels] + self.outliers, self.bias)


def read_kmeans(module: Any) -> lowbit.Source:
    return lowbit.Source(lowbit.codebook_of(module.weight, "row"), bias=module.bias, weight=module.weight)


def read_centroids(module: Any) -> lowbit.Source:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its CSR tensors are in beta
        sparse = module.outliers.detach().to_sparse_csr()
    stored = lowbit.CodebookWeight(
        codes=module.labels.to(torch.uint8),
        codebook=module.centroids.detach().view(1, 1, -1),
        outlier_values=sparse.values(),
        outlier_columns=sparse.col_indices().to(torch.int16),
        outlier_rows=sparse.crow_indices().to(torch.int32),
    )
    weight = (module.centroids[module.labels] + module.outliers).detach()
    return lowbit.Source(stored, bias=module.bias, weight=weight)


lowbit.register_source(KMeansLinear, read_kmeans)
lowbit.register_source(CentroidLinear, read_centroids)


def kmeans_linear(n: int, k: int, count: int) -> Any:
    module = KMeansLinear(k, n)
    module.weight = nn.Parameter(few_values((n, k), count, n))
    return module


def test_trained_tables_end_to_end(tmp_path: Path) -> None:
    model = nn.Sequential(kmeans_linear(48, 70, 8), nn.GELU(), CentroidLinear(33, 48, 3, 8))
    reference, x = copy.deepcopy(model), torch.randn(5, 70)
    lowbit.convert(model)
    assert [row.scheme for row in lowbit.report(model).rows] == [
        "3-bit codebook per row", "3-bit codebook per tensor, 0.51 % outliers",
    ]  # fmt: skip
    assert_bitwise_equal(model[0].dequantize(), reference[0].weight.detach())
    weight = (reference[2].centroids[reference[2].labels] + reference[2].outliers).detach()
    assert_bitwise_equal(model[2].dequantize(), weight)
    for layer, exact in ((model[0], reference[0].weight.detach()), (model[2], weight)):
        assert_multiplies(layer, exact, torch.float32)
    torch.testing.assert_close(model(x).detach(), reference(x).detach(), rtol=1e-5, atol=1e-5)

    lowbit.save(model, tmp_path)
    skeleton = nn.Sequential(nn.Linear(70, 48), nn.GELU(), CentroidLinear(33, 48, 3, 0))
    loaded = lowbit.load(tmp_path, model=skeleton)
    assert_bitwise_equal(loaded(x).detach(), model(x).detach())


def test_a_weight_that_drifted_off_its_table_is_refused() -> None:
    model = nn.ModuleDict({"good": kmeans_linear(8, 300, 4), "drifted": kmeans_linear(8, 300, 4)})
    with torch.no_grad():
        model["drifted"].weight += 1e-3 * torch.randn(8, 300)
    with pytest.raises(ValueError, match="drifted: weight must take at most 256 distinct values per row: got 300"):
        lowbit.convert(model)
    assert isinstance(model["good"], KMeansLinear)


@pytest.mark.parametrize("lazily", [False, True])
def test_the_weight_of_a_source_may_be_a_function(lazily: bool) -> None:
    class Trained(nn.Module):
        values = few_values((8, 40), 4)

    wrong = torch.zeros(8, 40, dtype=torch.bfloat16)

    def recognise(weight: Tensor) -> Any:
        return lambda module: lowbit.Source(
            lowbit.codebook_of(module.values.bfloat16()), weight=(lambda: weight) if lazily else weight
        )

    lowbit.register_source(Trained, recognise(Trained.values.bfloat16()))
    layer = lowbit.convert(Trained())
    assert layer.weight_error == 0.0 and layer.dtype == torch.bfloat16
    lowbit.register_source(Trained, recognise(wrong))
    with pytest.raises(ValueError, match="layer: the recogniser's codes do not reproduce the trained weight"):
        lowbit.convert(nn.ModuleDict({"layer": Trained()}))
