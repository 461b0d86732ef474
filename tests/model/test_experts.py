"""Models whose experts transformers holds as 3-D parameters: convert packs these as it packs linear layers."""

import copy
import pickle
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import Codebook, Kronecker, Packed
from lowbit.checkpoint.reader import Checkpoint
from lowbit.integrations import loading
from lowbit.model import experts as experts_module
from lowbit.model.calibrate import FEW_TOKENS
from lowbit.nn.experts import experts_linear

SPEC = Packed(bits=4, group_size=16)
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, num_local_experts=5, num_experts_per_tok=2,
)  # fmt: skip
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
IDS = torch.arange(22).view(2, 11) * 5 % 96


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).to(dtype).eval()


def gpt_oss():
    """Its weights are transposed, and its experts have biases and an activation of their own."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "_bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def rows(report):
    return {row.name: row for row in report.rows}


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("spec", [
    SPEC, Codebook(bits=3), Packed(bits=3, group_size=16, outliers=0.01), Kronecker(),
    Kronecker(rank=2, factors=Packed(bits=8, group_size=4)),
], ids=str)  # fmt: skip
def test_the_model_is_that_of_the_dequantized_experts(make, spec):
    model = lowbit.convert(make(), {"*experts*": spec})
    made = model.model.layers[0].mlp.experts
    assert type(made.gate_up_proj).__name__ == f"{type(spec).__name__}Experts"
    predicted = lowbit.convert(make(), {"*experts*": spec}, dry_run=True)
    assert [(row.scheme, row.bytes_after, row.weights) for row in predicted.rows] == [
        (row.scheme, row.bytes_after, row.weights) for row in lowbit.report(model).rows
    ]
    y, plain = logits(model), lowbit.dequantize(copy.deepcopy(model))
    experts = plain.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, nn.Parameter) and type(experts) is type(make().model.layers[0].mlp.experts)
    assert plain.config == make().config
    torch.testing.assert_close(y, logits(plain), rtol=2e-5, atol=2e-5)
    weight = experts.down_proj.transpose(1, 2) if experts.is_transposed else experts.down_proj
    x, ids = torch.randn(7, 48), torch.tensor([0, 4, 4, 1, 5, 2, 3])
    exact = experts_linear(x.double(), ids, weight.double(), None)
    torch.testing.assert_close(made.down_proj(x, ids).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_every_expert_is_quantized_as_a_linear_layer_would_be(make):
    model, spec = make(), Packed(bits=3, group_size=16, outliers=0.02)
    owner = model.model.layers[0].mlp.experts
    weight = (owner.gate_up_proj.transpose(1, 2) if owner.is_transposed else owner.gate_up_proj).detach().clone()
    stack = lowbit.convert(model, {UP: spec}).get_submodule(UP)
    for e in range(5):
        linear = lowbit.PackedLinear.from_float(weight[e], spec)
        assert torch.equal(stack.dequantize()[e], linear.dequantize())
        assert torch.equal(stack.expert(e).dequantize(), linear.dequantize())
        error = (linear.dequantize() - weight[e]).norm() / weight[e].norm()
        assert stack.expert_errors[e] == pytest.approx(float(error), rel=1e-5)
    assert stack.weight_error == pytest.approx(float((stack.dequantize() - weight).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_and_its_prediction(dtype):
    spec = Packed(bits=4, group_size=16, outliers=0.01)
    predicted = lowbit.convert(mixtral(dtype), spec, dry_run=True)
    report = lowbit.report(lowbit.convert(mixtral(dtype), spec))
    assert (predicted.total_before, predicted.total_after) == (report.total_before, report.total_after)
    for name, n, k in ((UP, 96, 32), (DOWN, 32, 48)):
        row = rows(report)[name]
        assert row.kind == "experts" and row.scheme.startswith("5 experts, 4-bit group 16")
        assert row.weights == 5 * n * k and row.bytes_before == 5 * n * k * dtype.itemsize
        assert row.bytes_after == rows(predicted)[name].bytes_after < row.bytes_before
    assert [row.name for row in predicted.rows] == [row.name for row in report.rows]


def test_patterns_name_a_module_or_a_stack():
    whole = lowbit.report(lowbit.convert(mixtral(), SPEC))
    assert {row.name for row in whole.rows if row.kind == "experts"} == {UP, DOWN}
    model = lowbit.convert(mixtral(), {"*.experts": SPEC, "*.experts.down_proj": Packed(bits=8)})
    bits = {row.name: row.scheme.split()[2] for row in lowbit.report(model).rows}
    assert bits == {UP: "4-bit", DOWN: "8-bit"}
    model = lowbit.convert(mixtral(), SPEC, skip=["*.experts.gate_up_proj"])
    assert model.lowbit_skipped[UP] == "skipped by the caller" and isinstance(model.get_parameter(UP), nn.Parameter)
    torch.testing.assert_close(logits(model), logits(lowbit.dequantize(copy.deepcopy(model))), rtol=2e-5, atol=2e-5)


def test_what_chooses_the_experts_stays_float_unless_it_is_named():
    model = mixtral()
    block = model.model.layers[0].mlp
    block.extra = nn.Linear(32, 5)  # as routers that are linear layers: one row for each expert
    block.shared = nn.Linear(32, 32)
    made = lowbit.convert(copy.deepcopy(model), SPEC)
    assert made.lowbit_skipped["model.layers.0.mlp.extra"] == "it chooses the experts of each token"
    assert "model.layers.0.mlp.shared" in rows(lowbit.report(made))
    assert "model.layers.0.mlp.gate.weight" in {kept.name for kept in lowbit.report(made).kept}
    assert list(rows(lowbit.report(lowbit.convert(model, {"model.layers.0.mlp.extra": SPEC})))) == [
        "model.layers.0.mlp.extra"
    ]


def test_one_expert_alone_has_no_format_of_its_own():
    with pytest.raises(ValueError, match=r"down_proj\.3.*the experts of a stack have one format"):
        lowbit.convert(mixtral(), {"*": SPEC, "*.experts.down_proj.3": Packed(bits=8)})


def test_other_models_with_the_same_config_stay_float():
    model = mixtral()
    twin = transformers.MixtralForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    y = logits(twin)
    lowbit.convert(model, {"*experts*": SPEC})
    assert torch.equal(logits(twin), y)
    assert model.config._experts_implementation != "lowbit"


def test_nothing_has_changed_where_it_cannot_be_converted():
    model = mixtral()
    y, before = logits(model), {name: type(m) for name, m in model.named_modules()}
    model.get_parameter(DOWN).data[2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=DOWN):
        lowbit.convert(model, SPEC)
    model.get_parameter(DOWN).data[2, 0, 0] = 0.0
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert isinstance(model.get_parameter(UP), nn.Parameter) and y.shape == logits(model).shape


def test_a_module_with_a_forward_of_its_own_stays_float():
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda x, *_: x
    assert lowbit.convert(model, SPEC).lowbit_skipped[UP] == "its module has a forward of its own"


def test_copies_pickles_and_moves(tmp_path):
    model = lowbit.convert(mixtral(), SPEC)
    y = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), y)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), y)
    model.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(logits(model), y, rtol=2e-2, atol=2e-2)


def test_experts_that_are_elsewhere_add_nothing():
    model = lowbit.convert(mixtral(), {"*experts*": SPEC})
    experts, x = model.model.layers[0].mlp.experts, torch.randn(3, 32)
    weights = torch.rand(3, 2)
    here = experts(x, torch.tensor([[0, 1], [2, 3], [4, 0]]), weights)
    first = experts(x, torch.tensor([[0, 5], [2, 5], [4, 5]]), weights)
    second = experts(x, torch.tensor([[5, 1], [5, 3], [5, 0]]), weights)
    torch.testing.assert_close(here, first + second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("spec", [SPEC, Kronecker(rank=2)], ids=str)
def test_folders(make, spec, tmp_path):
    model = lowbit.convert(make(), spec)
    y = logits(model)
    lowbit.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    for folder in (tmp_path / "a", tmp_path / "b"):
        for loaded in (lowbit.load(folder), type(model).from_pretrained(folder)):
            assert torch.equal(logits(loaded.eval()), y)
            assert rows(lowbit.report(loaded)).keys() == rows(lowbit.report(model)).keys()
            assert lowbit.report(loaded).total_after == lowbit.report(model).total_after


MODELS = {
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "deepseek": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        **{**SIZES, "num_hidden_layers": 2}, n_routed_experts=5, moe_intermediate_size=24, n_shared_experts=1,
        n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    )).eval(),
}  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_folders_are_converted_one_expert_at_a_time(name, shard, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float", max_shard_size=shard)
    spec = {"*": Packed(bits=4, group_size=8, outliers=0.01), "*.down_proj": Codebook(bits=3)}
    expected = lowbit.convert(copy.deepcopy(model), spec)
    monkeypatch.setattr(loading, "load_float", None)  # the whole model is not loaded
    largest = [0]
    read = Checkpoint._read
    monkeypatch.setattr(Checkpoint, "_read", lambda *args: largest.append(read(*args).numel()) or read(*args))
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec)
    assert max(largest) == model.get_input_embeddings().weight.numel()  # 96 x 32; a stack has more
    made = lowbit.load(tmp_path / "packed").eval()
    state, other = made.state_dict(), expected.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert made.lowbit_skipped == expected.lowbit_skipped
    reports = [lowbit.report(model) for model in (made, expected)]
    assert [(row.name, row.scheme, row.bytes_after) for row in reports[0].rows] == [
        (row.name, row.scheme, row.bytes_after) for row in reports[1].rows
    ]


def test_stacks_that_stay_float_are_read_from_folders_too(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "float")
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", SPEC, skip=["*.gate_up_proj"])
    made = lowbit.load(tmp_path / "packed").eval()
    assert torch.equal(made.get_parameter(UP), model.get_parameter(UP))
    assert torch.equal(logits(made), logits(lowbit.convert(model, SPEC, skip=["*.gate_up_proj"])))


@pytest.mark.parametrize("what", ["missing", "shape", "nan"])
def test_folders_whose_experts_are_not_whole_are_refused(what, tmp_path):
    mixtral().save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    if what == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:-1].clone() if what == "shape" else tensors[key].fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    text = {"missing": "for 5 experts: the files have 4", "shape": re.escape(key), "nan": "expert 3: .* must be finite"}
    with pytest.raises(ValueError, match=text[what]):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", SPEC)
    assert not (tmp_path / "packed").exists()


# ------------------------------------------------------------------------------------- classes of one's own


class Pool(nn.Module):
    """Its weights are [E*K, N]: x is multiplied with those of one expert after the other."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(3 * 32, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, *, which):
        return torch.stack([row @ self.inner.w.view(3, 32, 16)[e] for row, e in zip(x, which.tolist(), strict=True)])


def pool_forward(module, project, x, *, which):
    return project("inner.w", x, which)


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr(experts_module, "_entries", dict(experts_module._entries))
    return lambda stacks=None, forward=pool_forward: lowbit.register_experts(
        Pool, stacks or (lambda module: {"inner.w": lowbit.ExpertStack(transposed=True, num_experts=3)}), forward
    )


class Deeper(Pool):
    pass


class Other(Pool):
    def forward(self, x, *, which):
        return 2 * super().forward(x, which=which)


@torch.no_grad()
def test_a_registered_class_is_packed_like_any_other(pools, tmp_path):
    pools()
    x, which = torch.randn(5, 32), torch.tensor([2, 0, 2, 1, 0])
    for cls in (Pool, Deeper):
        model = nn.Sequential(cls())
        lowbit.convert(model, SPEC)
        y, dense = model[0](x, which=which), lowbit.dequantize(copy.deepcopy(model))
        assert type(model[0]) is not cls and isinstance(model[0], cls) and type(dense[0]) is cls
        torch.testing.assert_close(y.double(), dense.double()[0](x.double(), which=which), rtol=1e-5, atol=1e-5)
        lowbit.save(model, tmp_path / cls.__name__)
        for other in (lowbit.load(tmp_path / cls.__name__, nn.Sequential(cls())), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other[0](x, which=which), y)
        assert repr(model[0]).startswith(f"{cls.__name__}(")
    left = lowbit.convert(nn.ModuleList([Other(), nn.Linear(32, 16)]), SPEC)
    assert list(rows(lowbit.report(left))) == ["1"] and isinstance(left[0].inner.w, nn.Parameter)
    alone = lowbit.convert(Pool(), SPEC)  # the model itself
    assert torch.equal(alone(x, which=which), y)


def test_what_is_wrong_with_a_registration_is_said(pools):
    def refused(stacks):
        pools(stacks)
        model = nn.Sequential(Pool())
        with pytest.raises(ValueError) as error:
            lowbit.convert(model, SPEC)
        assert isinstance(model[0].inner.w, nn.Parameter) and "0: the stacks of Pool, as registered" in str(error.value)
        return str(error.value)

    assert "inner.w' has shape [96, 16], and num_experts=None" in refused(lambda m: {"inner.w": lowbit.ExpertStack()})
    assert "num_experts=5" in refused(lambda m: {"inner.w": lowbit.ExpertStack(num_experts=5)})
    assert "'outer.w', which it does not have" in refused(lambda m: {"outer.w": lowbit.ExpertStack()})
    assert "must be a mapping of names to lowbit.ExpertStack: got ['inner.w']" in refused(lambda m: ["inner.w"])
    assert "raised AttributeError" in refused(lambda m: m.nothing)
    with pytest.raises(TypeError, match="module_type must be a subclass of nn.Module: got 'Pool'"):
        lowbit.register_experts("Pool", dict, pool_forward)
    with pytest.raises(TypeError, match="forward must be a function: got None"):
        lowbit.register_experts(Pool, dict, None)


def test_a_pickle_of_a_class_that_is_no_longer_registered(pools):
    pools()
    saved = pickle.dumps(lowbit.convert(nn.Sequential(Pool()), SPEC))
    experts_module._entries.pop(Pool)
    with pytest.raises(ValueError, match="Pool has packed experts: call lowbit.register_experts"):
        pickle.loads(saved)


# ---------------------------------------------------------------------------------------------- calibration


def batches(padding=0):
    for seed in range(4):
        ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[1, 40 - padding :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def routed(model, padding):
    """Of each expert of the first block, the rows of its inputs that are not padding, as the float model has them."""
    found, experts = {e: [] for e in range(5)}, model.model.layers[0].mlp.experts
    masks = [batch["attention_mask"].flatten().bool() for batch in batches(padding)]

    def see(module, args):
        x, ids, mask = args[0], args[1], masks.pop(0)
        for e in found:
            found[e].append(x[(ids == e).any(-1) & mask])

    handle = experts.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in batches(padding):
            model(**batch)
    handle.remove()
    return {e: torch.cat(rows) for e, rows in found.items()}


@pytest.mark.parametrize("padding", [0, 30])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_every_expert_is_fitted_to_the_tokens_that_are_routed_to_it(make, padding):
    model, spec = make(), Packed(bits=2, group_size=16, quantizer="gptq")
    inputs, owner = routed(model, padding), model.model.layers[0].mlp.experts
    weight = (owner.gate_up_proj.transpose(1, 2) if owner.is_transposed else owner.gate_up_proj).detach().clone()
    stack = lowbit.convert(model, {UP: spec}, calibration=batches(padding)).get_submodule(UP)
    for e in range(5):
        x = inputs[e].double()
        hessian = x.t() @ x
        hessian += 32 / len(x) * hessian.diagonal().mean() * torch.eye(32)
        expected = spec.quantize(weight[e], hessian=hessian.float())
        made = lowbit.PackedLinear.from_weight(expected).dequantize()
        assert (stack.dequantize()[e] != made).float().mean() < 0.01  # sums of another order may round a code otherwise
        plain = lowbit.PackedLinear.from_float(weight[e], Packed(bits=2, group_size=16)).dequantize()
        assert (stack.dequantize()[e] != plain).float().mean() > 0.05
    assert stack.note is None


def test_the_second_stack_is_fitted_to_what_comes_out_of_the_first():
    """Its error on the inputs that it has is smaller than without calibration, for every expert."""
    spec = Packed(bits=2, group_size=16, quantizer="gptq")
    model, seen = lowbit.convert(mixtral(), {"*experts*": spec}, calibration=batches()), []
    weight = mixtral().get_parameter(DOWN).detach()
    down = model.get_submodule(DOWN)
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    x, ids = torch.cat([x for x, _ in seen]), torch.cat([ids for _, ids in seen])
    plain = lowbit.PackedExperts.from_float(weight, Packed(bits=2, group_size=16)).dequantize()
    for e in range(5):
        rows = x[ids == e]
        ours, theirs = ((rows @ (w[e] - weight[e]).t()).norm() for w in (down.dequantize(), plain))
        assert ours < 0.95 * theirs


def test_experts_that_few_tokens_reach_are_quantized_without_and_named():
    model, spec = mixtral(), Packed(bits=3, group_size=16, quantizer="gptq")
    gate = model.model.layers[0].mlp.gate.weight
    gate.data[2], gate.data[1], gate.data[4] = 0.0, -gate.data[0], -gate.data[3]  # two others are always preferred
    assert [e for e, x in routed(model, 0).items() if len(x) < FEW_TOKENS] == [2]
    weight = model.get_parameter(UP).detach().clone()
    made = lowbit.convert(model, {UP: spec}, calibration=batches())
    assert rows(lowbit.report(made))[UP].note == (
        "fewer than 8 tokens of the calibration data reach experts 2: quantized without it"
    )
    plain = lowbit.PackedExperts.from_float(weight, Packed(bits=3, group_size=16))
    assert [e for e in range(5) if torch.equal(made.get_submodule(UP).dequantize()[e], plain.dequantize()[e])] == [2]


@pytest.mark.parametrize("padding", [0, 30])
def test_static_scales_are_those_of_all_tokens(padding):
    model, spec = mixtral(), Packed(bits=8, group_size=32, activations="int8_static")
    peak = max(float(x.abs().max()) for x in routed(model, padding).values())
    made = lowbit.convert(model, {"*experts*": spec}, calibration=batches(padding))
    assert float(made.get_submodule(UP).x_scale) == pytest.approx(peak / 127, rel=1e-6)
    assert float(made.get_submodule(DOWN).x_scale) > 0
    assert not torch.equal(logits(made), logits(lowbit.dequantize(copy.deepcopy(made))))  # x is rounded


def loss(model, batch):
    return model(**batch, labels=batch["input_ids"]).loss


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_codebooks_are_weighed_by_gradients_or_inputs(make, granularity):
    spec = Codebook(bits=2, granularity=granularity, sensitivity=True)
    made = [
        lowbit.convert(make(), {"*experts*": replaced}, calibration=list(batches()) if given else None, loss=with_loss)
        for replaced, given, with_loss in (
            (Codebook(bits=2, granularity=granularity), False, None), (spec, True, None), (spec, True, loss),
        )
    ]  # fmt: skip
    plain, inputs, gradients = (model.get_submodule(DOWN).dequantize() for model in made)
    assert not torch.equal(plain, inputs) and not torch.equal(inputs, gradients)
    assert made[0].config._experts_implementation == made[1].config._experts_implementation


def test_what_is_missing_is_said_before_anything_changes():
    model = mixtral()
    for spec in (Packed(bits=4, quantizer="gptq"), Packed(bits=8, activations="int8_static")):
        with pytest.raises(ValueError, match=f"{UP}: .* needs calibration data"):
            lowbit.convert(model, {"*experts*": spec})
    with pytest.raises(ValueError, match="granularity='tensor' is one scale for all experts"):
        lowbit.convert(model, {"*experts*": Packed(granularity="tensor", quantizer="gptq")}, calibration=batches())
    with pytest.raises(IndexError, match="calibration batch 0"):
        lowbit.convert(model, {"*experts*": Packed(quantizer="gptq")}, calibration=[torch.full((1, 3), 999)])
    assert isinstance(model.get_parameter(UP), nn.Parameter) and isinstance(model.get_parameter(DOWN), nn.Parameter)
    assert torch.equal(logits(model), logits(mixtral()))


@pytest.mark.parametrize("scores_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_in_place_are_those_of_training(scores_dtype):
    """Gates and routing weights are multiplied in place without gradients: the same values, and x is not written."""
    model = lowbit.convert(mixtral(torch.bfloat16), {"*experts*": SPEC})
    module = model.model.layers[0].mlp.experts
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, scores = torch.arange(14).view(7, 2) % 5, torch.arange(1, 15).view(7, 2).to(scores_dtype) / 9
    given = x.clone(), ids.clone(), scores.clone()
    trained = module(x.requires_grad_(), ids, scores).detach()
    with torch.no_grad():
        assert torch.equal(module(x, ids, scores), trained)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x, ids, scores), trained)
    assert all(torch.equal(a, b) for a, b in zip((x, ids, scores), given, strict=True))
