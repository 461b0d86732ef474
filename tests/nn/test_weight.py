"""``.weight`` of a packed layer: its shape is free, its values are right, and writing is refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save
from torch import nn

import lowbit
from lowbit.nn.layer import layer_class
from lowbit.nn.weight import LazyWeight
from lowbit.testing.numerics import assert_bitwise_equal

SPECS = [lowbit.Packed(bits=4, group_size=16), lowbit.Codebook(bits=4), lowbit.Kronecker()]
family = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
reads = pytest.mark.filterwarnings("ignore:.*code reads the values of .weight")


def linear(spec: lowbit.Spec, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return layer_class(spec.family, "linear").from_float(torch.randn(24, 48, dtype=dtype), spec)


@family
def test_metadata_costs_no_values(spec):
    layer = linear(spec, torch.bfloat16)
    layer.dequantize = None  # nobody may call it
    w = layer.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(w, torch.Tensor) and w.shape == (24, 48) and w.size(0) == 24 and w.dim() == 2 and len(w) == 24
        assert w.dtype == torch.bfloat16 and w.device == layer.device and w.is_floating_point() and w.numel() == 24 * 48
        assert not w.requires_grad and w.grad is None and w.element_size() == 2 and w.nbytes == 24 * 48 * 2
        assert w.data.dtype == w.detach().dtype == torch.bfloat16 and not w.is_meta and not w.is_cuda
        assert "PackedLinear" in repr(linear(SPECS[0]).weight)
        w.requires_grad_(False)
        w.requires_grad = False
        assert layer.to("meta").weight.is_meta


READS = {
    "F.linear": lambda x, w: nn.functional.linear(x, w),
    "matmul": lambda x, w: x @ w.t(),
    "addition": lambda x, w: x[0] + w[0],
    "index": lambda x, w: w[3],
    "item": lambda x, w: torch.tensor(w[1, 2].item()),
    "iteration": lambda x, w: torch.stack(list(w)),
    "einsum": lambda x, w: torch.einsum("mk,nk->mn", x, w),
    "embedding": lambda x, w: nn.functional.embedding(torch.tensor([2, 0]), w),
    "attention": lambda x, w: nn.functional.scaled_dot_product_attention(x[None], w[None], w[None]),
    "cat": lambda x, w: torch.cat([w, w]),
    "cast": lambda x, w: w.to(torch.float64),
    "data": lambda x, w: w.data.clone(),
    "in a list": lambda x, w: torch.block_diag(*[w, x]),
    "out=": lambda x, w: torch.add(w, 1, out=torch.empty(24, 48)),
    "norm": lambda x, w: torch.linalg.vector_norm(w),
    "numpy": lambda x, w: torch.from_numpy(w.numpy()),
    "copy_": lambda x, w: torch.zeros(24, 48).copy_(w),
    "assignment": lambda x, w: assigned(torch.zeros(24, 48), w),
    "deepcopy": lambda x, w: copy.deepcopy(w),
    "pickle": lambda x, w: pickle.loads(pickle.dumps(w)),
    "vmap": lambda x, w: torch.vmap(lambda row: row @ w.t())(x),
    "grad": lambda x, w: torch.autograd.grad((x.requires_grad_() @ w.t()).sum(), x)[0],
}


def assigned(target, value):
    target[:] = value
    return target


@reads
@family
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_values_are_the_dequantized_ones(spec, read):
    layer, x = linear(spec), torch.randn(5, 48)
    found = read(x, layer.weight)
    assert type(found) is torch.Tensor
    assert_bitwise_equal(found.detach(), read(x, layer.dequantize()).detach())


def test_reading_is_said_once_and_names_the_layer():
    model = lowbit.convert(nn.Sequential(nn.Linear(48, 24)), SPECS[0])
    with pytest.warns(UserWarning, match=r"^0 \(PackedLinear.*reads the values of \.weight.*skip="):
        model[0].weight.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].weight.sum()


WRITES = {
    "init": lambda layer: nn.init.normal_(layer.weight),
    "data.normal_": lambda layer: layer.weight.data.normal_(),
    "add_": lambda layer: layer.weight.add_(1),
    "+=": lambda layer: exec("layer.weight.data += 1"),
    "item": lambda layer: layer.weight.__setitem__(0, 0.0),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(24, 48)),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(24, 48)),
    "out": lambda layer: torch.add(torch.zeros(24, 48), 1, out=layer.weight),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", True),
    "Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(24, 48))),
    "tensor": lambda layer: setattr(layer, "weight", torch.zeros(24, 48)),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1.0),
}


@reads
@family
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_is_refused(spec, write):
    layer = linear(spec)
    before = layer.dequantize()
    with pytest.raises((RuntimeError, AttributeError), match=type(layer).__name__ + r".*\.weight cannot be"):
        write(layer)
    assert_bitwise_equal(layer.dequantize(), before)


ADDRESSES = {
    "data_ptr": lambda w: w.data_ptr(),
    "of data": lambda w: w.data.data_ptr(),
    "untyped_storage": lambda w: w.untyped_storage(),
    "storage": lambda w: w.storage(),
    "safetensors": lambda w: save({"weight": w}),
}


@family
@pytest.mark.parametrize("ask", ADDRESSES.values(), ids=ADDRESSES)
def test_a_weight_has_no_address(spec, ask):
    """That of a dequantized copy would be the next copy's too: different layers would look tied, files hold garbage."""
    with pytest.raises(RuntimeError, match=r"Linear \[24, 48\]\): \.weight has no memory of its own .*dequantize"):
        ask(lowbit.convert(nn.Sequential(nn.Linear(48, 24)), spec)[0].weight)


@reads
@family
def test_tied_layers_have_one_weight(spec):
    """What code asks that looks for ties; other layers, dtypes and tensors have another weight."""
    model = nn.Sequential(nn.Embedding(24, 48), nn.Linear(48, 24), nn.Linear(48, 24))
    model[1].weight = model[0].weight
    lowbit.convert(model, spec)
    assert model[1].weight is model[0].weight is model[0].weight
    held, old = model[0].weight, model[0].dequantize()
    assert model[2].weight is not held and copy.deepcopy(model)[0].weight is not held
    half = copy.deepcopy(model).half()
    assert half[1].weight is half[0].weight and half[1].weight.dtype == torch.float16
    name = model[2].trainable()[0]
    lowbit.make_trainable(model, name)
    with torch.no_grad():
        model[0]._parameters[name].mul_(2)
    assert model[1].weight is model[0].weight
    assert_bitwise_equal(model[1].weight.sum(), model[0].dequantize().sum())
    assert not torch.equal(model[0].dequantize(), old)


class Queries(nn.Module):
    """The pattern of DETR, SAM, DeBERTa, SigLIP 2 and LayoutLM: an embedding whose weight is added."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.q, self.k, self.v = nn.Embedding(5, 32), *(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.q(x[:, :5] + self.query.weight)
        return nn.functional.scaled_dot_product_attention(h[:, None], self.k(x)[:, None], self.v(x)[:, None])


@reads
@torch.no_grad()
def test_a_model_that_adds_a_weight_is_right_in_every_mode():
    torch.manual_seed(0)
    model, x = Queries().eval(), torch.randn(1, 9, 32)
    lowbit.convert(model, lowbit.Packed(bits=8, group_size=32))
    y = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    dense = lowbit.dequantize(copy.deepcopy(model))
    torch.testing.assert_close(dense(x), y)


def test_a_shape_that_a_graph_reads_costs_nothing_in_it():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x.to(self.up.weight.dtype))  # as T5 and many more do

    model = lowbit.convert(Casts(), SPECS[0])
    graph = torch.export.export(model, (torch.randn(2, 32),)).run_decompositions().graph
    graph.eliminate_dead_code()
    assert not [node for node in graph.nodes if "dequantize" in str(node.target)]


def test_a_weight_keeps_its_type_out_of_parameters():
    model = lowbit.convert(nn.Sequential(nn.Linear(48, 24)), SPECS[0])
    assert isinstance(model[0].weight, LazyWeight) and not isinstance(model[0].weight, nn.Parameter)
    assert "0.weight" not in dict(model.named_parameters()) | dict(model.named_buffers()) | model.state_dict()
