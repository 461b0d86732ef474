"""Bytes of a model: report and dry run agree with its storages, ties are kept or said, what stays float is listed."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Codebook, Kronecker, Packed
from lowbit.testing.numerics import assert_bitwise_equal

transformers = pytest.importorskip("transformers")


def storage_bytes(model):
    """Written here once more, on purpose: the bytes of the distinct storages of parameters and buffers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (*model.parameters(), *model.buffers()) if t.numel()}  # fmt: skip
    return sum(storages.values())


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=120)
GROUPED = dict(SMALL, num_key_value_heads=2)
ARCHITECTURES = {
    "Llama": GROUPED,
    "Gemma": dict(GROUPED, head_dim=8),
    "Gemma2": dict(GROUPED, head_dim=8),
    "Gemma3Text": dict(GROUPED, head_dim=8),
    "Mixtral": dict(GROUPED, num_local_experts=4),
    "Bert": SMALL,
    "Falcon": SMALL,
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=120),
    "Bart": dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=120, scale_embedding=True),
    "T5": dict(d_model=32, d_kv=2, d_ff=64, num_layers=2, num_heads=16, vocab_size=120),
    "ViT": dict(SMALL, image_size=16, patch_size=8),
}  # fmt: skip
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel", "ViT": "ViTForImageClassification",
           "Bert": "BertForMaskedLM"}  # fmt: skip


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    default = f"{name}ForConditionalGeneration" if name in ("Bart", "T5") else f"{name}ForCausalLM"
    return getattr(transformers, CLASSES.get(name, default))(config).to(dtype).eval()


SPECS = [
    Packed(bits=4, group_size=16),
    Codebook(bits=3, outliers=0.01, granularity="row"),
    {"*": Packed(bits=8), "*.0.*": Kronecker(rank=1)},
]


@pytest.mark.parametrize("spec", SPECS, ids=["packed", "codebook", "kron"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_report_and_dry_run_are_the_models_storages(name, spec):
    model = make(name)
    before = storage_bytes(model)
    planned = lowbit.convert(model, spec, dry_run=True)
    assert storage_bytes(model) == before
    lowbit.convert(model, spec)
    report = lowbit.report(model)
    assert (report.total_before, report.total_after) == (before, storage_bytes(model))
    assert (planned.total_before, planned.total_after) == (before, storage_bytes(model))
    assert report.ratio == before / storage_bytes(model)
    rows = [(r.name, r.scheme, r.bytes_before, r.bytes_after, r.shares) for r in report.rows]
    assert rows == [(r.name, r.scheme, r.bytes_before, r.bytes_after, r.shares) for r in planned.rows]
    assert report.kept == planned.kept and report.skipped == planned.skipped
    # every large float tensor is there, by name
    large = {n for n, t in (*model.named_parameters(), *model.named_buffers())
             if t.is_floating_point() and t.numel() * t.element_size() > 0.01 * report.total_after}  # fmt: skip
    packed = tuple(f"{row.name}." for row in report.rows)
    assert {n for n in large if not n.startswith(packed)} == {kept.name for kept in report.kept}
    assert all(kept.reason for kept in report.kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Gemma", "Gemma2", "Gemma3Text", "Bart"])
def test_scaled_embeddings_are_packed_with_the_head_that_is_tied_to_them(name, dtype, tmp_path):
    model = make(name, dtype)
    lowbit.convert(model, Packed(bits=4, group_size=16))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, lowbit.PackedEmbedding) and head.packed is embedding.packed
    scale = torch.tensor(32**0.5, dtype=dtype) if name != "Bart" else 32**0.5
    ids = torch.arange(2, 40).view(2, 19)
    expected = nn.functional.embedding(ids, embedding.dequantize(), embedding.padding_idx) * scale
    assert_bitwise_equal(embedding(ids).detach(), expected.detach())
    dense = lowbit.dequantize(copy.deepcopy(model))
    assert_bitwise_equal(dense.get_input_embeddings()(ids).detach(), expected.detach())
    lowbit.save(model, tmp_path / "saved")
    other = lowbit.load(tmp_path / "saved")
    assert_bitwise_equal(other.get_input_embeddings()(ids).detach(), expected.detach())
    # the scale follows the dtype as the module's does
    half = copy.deepcopy(model).bfloat16().get_input_embeddings()
    rounded = torch.tensor(32**0.5, dtype=torch.bfloat16) if name != "Bart" else 32**0.5
    assert_bitwise_equal(half(ids).detach(), (half.dequantize()[ids] * rounded).detach())


def test_an_embedding_that_treats_an_id_in_its_own_way_stays():
    class Odd(nn.Embedding):
        def forward(self, ids):
            y = super().forward(ids) * 2.0
            return torch.where((ids == 7)[..., None], torch.zeros_like(y), y)

    class Positions(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) if ids.dim() == 1 else super().forward(torch.arange(ids.shape[1]))[None]

    class Soft(nn.Embedding):
        def forward(self, x):
            return super().forward(x) if not x.is_floating_point() else x @ self.weight

    class Twice(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2.0

    odd = {"odd": Odd(20, 8), "positions": Positions(20, 8), "soft": Soft(20, 8)}
    model = nn.ModuleDict({**odd, "twice": Twice(20, 8), "plain": nn.Embedding(20, 8)})
    lowbit.convert(model, Packed())
    assert model.lowbit_skipped == {
        name: f"{type(module).__name__} is a subclass of nn.Embedding with a forward of its own"
        for name, module in odd.items()
    }
    assert model["twice"].output_scale == 2.0 and model["plain"].output_scale == 1.0


@pytest.mark.parametrize("skip", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_half_a_tie_is_said_and_saved(name, skip, tmp_path):
    config = dict(ARCHITECTURES[name], tie_word_embeddings=True)
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(
        getattr(transformers, f"{name}Config")(**config)
    ).eval()
    original, float_model = model.lm_head.weight.detach().clone(), copy.deepcopy(model)
    before, nbytes = storage_bytes(model), 120 * 32 * 4
    spec = Packed(bits=4, group_size=16)
    planned = lowbit.convert(model, spec, skip=[skip], dry_run=True)
    lowbit.convert(model, spec, skip=[skip])
    report = lowbit.report(model)
    packed = "model.embed_tokens" if skip == "lm_head" else "lm_head"
    text = f"untied: a float copy of {nbytes} bytes is kept ({packed} is packed)"
    for r in (planned, report):
        assert text in r.skipped[skip] and text in str(r)
        assert (r.total_before, r.total_after) == (before, storage_bytes(model))
        scale = 4 if name == "Gemma3Text" and skip == "lm_head" else 0  # the buffer embed_scale goes
        assert {row.name: row.bytes_before for row in r.rows}[packed] == scale
    assert_bitwise_equal(model.get_submodule(skip).weight.detach(), original)
    lowbit.save(model, tmp_path / "saved")
    for other in (lowbit.load(tmp_path / "saved"), type(model).from_pretrained(tmp_path / "saved")):
        assert_bitwise_equal(other.get_submodule(skip).weight.detach(), original)
        ids = torch.arange(2, 40).view(2, 19)
        with torch.no_grad():
            assert_bitwise_equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
        report = lowbit.report(other)
        assert text in report.skipped[skip] and report.total_after == storage_bytes(other)
        assert report.total_before == before
    lowbit.save(lowbit.convert(copy.deepcopy(float_model), spec), tmp_path / "whole")
    assert lowbit.report(lowbit.load(tmp_path / "whole")).total_before == before


@pytest.mark.parametrize("spec", [
    Packed(bits=4, group_size=8), Packed(bits=8, group_size=8, quantizer="minmax", symmetric=True),
    Packed(bits=4, group_size=8, quantizer="gptq"), Codebook(bits=4, table="nf4", group_size=8),
    Codebook(bits=3, granularity="row"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 1e-6, 1e7])
def test_a_dry_run_knows_scales_that_float16_does_not_hold(magnitude, spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 40), nn.Embedding(20, 24, padding_idx=0))
    with torch.no_grad():
        model[1].weight.mul_(magnitude)
        model[1].weight[3:5] *= 0.1
        model[2].weight[1:].mul_(magnitude)
    arguments = {}
    if spec.needs_calibration:
        model.forward = lambda x: model[1](model[0](x))
        arguments = {"calibration": [torch.randn(9, 32)]}
    planned = lowbit.convert(model, spec, dry_run=True, **arguments)
    lowbit.convert(model, spec, **arguments)
    report = lowbit.report(model)
    assert planned.total_after == report.total_after == storage_bytes(model)
    assert [row.scheme for row in planned.rows] == [row.scheme for row in report.rows]


class Shares(nn.Module):
    """A parameter of its own, a view of it, and one storage under two Parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.w = self.embed.weight
        self.up = nn.Linear(16, 24, bias=False)
        self.again = nn.Linear(16, 24, bias=False)
        self.again.weight = nn.Parameter(self.up.weight.data)
        self.down = nn.Linear(24, 16, bias=False)
        self.down.weight = nn.Parameter(self.up.weight.data.t())


def test_ties_without_a_module():
    model = Shares()
    before = storage_bytes(model)
    assert before == (50 * 16 + 24 * 16) * 4
    planned = lowbit.convert(model, Packed(bits=8), dry_run=True)
    original = model.w.detach().clone()
    lowbit.convert(model, Packed(bits=8))
    report = lowbit.report(model)
    for r in (planned, report):
        assert (r.total_before, r.total_after) == (before, storage_bytes(model))
        assert r.skipped == {"w": "untied: a float copy of 3200 bytes is kept (embed is packed)"}
        assert [kept.name for kept in r.kept] == ["w"] and r.kept[0].bytes == 3200
        assert {row.name: row.shares for row in r.rows} == {"embed": None, "up": None, "again": "up", "down": None}
        assert {row.name: row.note for row in r.rows}["down"].startswith("untied: up has the same values")
    assert model.again.packed is model.up.packed
    assert_bitwise_equal(model.w.detach(), original)


def test_a_model_that_grows_says_so():
    model = nn.ModuleDict({"embed": nn.Embedding(500, 16)})
    model.w = model["embed"].weight
    with pytest.warns(UserWarning, match="the model is larger now, by 32.0 KB: 32.0 KB -> 64.0 KB"):
        lowbit.convert(model, Packed(bits=8, group_size=4, zeros="float", scale_dtype=torch.float32, symmetric=False))
    assert "LARGER by 32.0 KB" in str(lowbit.report(model))


def test_a_folder_that_grows_says_so(tmp_path):
    torch.manual_seed(0)
    config = dict(ARCHITECTURES["Llama"], tie_word_embeddings=True)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path / "float")
    spec = {"model.embed_tokens": Packed(bits=8)}
    with pytest.warns(UserWarning, match=r"the model is larger now, by 4\.2 KB"):
        lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", spec, skip=["lm_head"])
    model = lowbit.load(tmp_path / "packed")
    report = lowbit.report(model)
    assert report.total_after == storage_bytes(model) == report.total_before + report.rows[0].bytes_after
    assert "untied: a float copy of 15360 bytes" in report.skipped["lm_head"]


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(8, 8)
        self.bag = nn.EmbeddingBag(20, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.queries = nn.Parameter(torch.randn(9, 8))
        self.register_buffer("table", torch.randn(9, 9))
        self.codes = nn.Parameter(torch.ones(9, 9, dtype=torch.int32), requires_grad=False)
        self.waves = nn.Parameter(torch.ones(9, 5, dtype=torch.complex64))
        self.register_buffer("ids", torch.zeros(999, dtype=torch.int64))


REASONS = {
    "attention.in_proj_weight": "MultiheadAttention", "lstm.weight_ih_l0": "LSTM", "lstm.weight_hh_l0": "LSTM",
    "bag.weight": "sums embeddings", "conv.weight": "Conv1d", "experts": "a stack of 3 weights",
    "codes": "a Parameter [9, 9] of Zoo, in int32", "waves": "a Parameter [9, 5] of Zoo, in complex64",
    "queries": "a Parameter [9, 8] of Zoo", "table": "a buffer of Zoo", "attention.out_proj.weight": "reads its weight",
}  # fmt: skip


def test_what_stays_float_is_listed_with_bytes_and_reason():
    model = Zoo()
    planned = lowbit.convert(model, Packed(), dry_run=True)
    lowbit.convert(model, Packed())
    for report in (planned, lowbit.report(model)):
        kept = {k.name: k for k in report.kept}
        for name, reason in REASONS.items():
            assert reason in kept[name].reason, name
            tensor = model.get_parameter(name) if name != "table" else model.table
            assert kept[name].bytes == tensor.nbytes
        assert "ids" not in kept and not any(name.startswith("linear.weight") for name in kept)
        assert [k.bytes for k in report.kept] == sorted((k.bytes for k in report.kept), reverse=True)
        assert "float: experts: a stack of 3 weights [8, 8] in one Parameter of Zoo" in str(report)
        assert report.to_dict()["kept"][0].keys() == {"name", "bytes", "reason"}


def test_nothing_to_convert_says_what_is_there():
    with pytest.raises(ValueError, match=r"no layer was left \(weight_ih_l0: a weight of LSTM.*weight_hh_l0"):
        lowbit.convert(nn.LSTM(8, 8), Packed())


def test_large_weight_errors_are_flagged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    coarse = Packed(bits=2, granularity="tensor", symmetric=True, quantizer="minmax")
    lowbit.convert(model, {"0": Packed(bits=8), "1": coarse})
    report = lowbit.report(model)
    errors = {row.name: row.weight_error for row in report.rows}
    assert errors["0"] < 0.3 < errors["1"]
    assert f"warning: the weight error is above 0.3 in 1: {errors['1']:.2f} in 1" in str(report)


@pytest.mark.parametrize("spec", [Packed(bits=4, activations="int8_static"), Codebook(bits=3), Kronecker(rank=1)],
                         ids=["packed", "codebook", "kron"])  # fmt: skip
def test_the_second_of_a_tied_pair_is_not_packed_again(spec, monkeypatch):
    model = nn.ModuleDict({"embed": nn.Embedding(40, 32), "head": nn.Linear(32, 40), "again": nn.Linear(32, 40)})
    for name in ("head", "again"):
        model[name].weight = model["embed"].weight
    model.forward = lambda ids: model["head"](model["embed"](ids)) + model["again"](model["embed"](ids))
    packed = []
    for cls in (lowbit.PackedWeight, lowbit.CodebookWeight, lowbit.KroneckerWeight):
        tensors = cls.tensors
        monkeypatch.setattr(cls, "tensors", lambda self, t=tensors: packed.append(self) or t(self))
    biases = [model[name].bias for name in ("head", "again")]
    calibration = [torch.arange(40)] if spec.needs_calibration else None
    before = storage_bytes(model)
    lowbit.convert(model, spec, calibration=calibration)
    assert len(packed) == 1
    embed, head, again = model.values()
    for name in embed.format.weight_tensors():
        assert head.get_buffer(name) is embed.get_buffer(name) is again.get_buffer(name)
    assert head.bias is biases[0] and again.bias is biases[1] and head.weight_error == embed.weight_error
    assert lowbit.report(model).total_before == before
    x = torch.randn(3, 32)
    if not calibration:
        assert torch.allclose(head(x), x @ embed.dequantize().t() + head.bias, atol=1e-5)
    else:
        assert float(head.x_scale) > 0 and embed.x_scale is None


def test_a_second_conversion_knows_what_the_first_untied():
    model = Shares()
    before = storage_bytes(model)
    lowbit.convert(model, {"embed": Packed(bits=8)})
    lowbit.convert(model, {"up": Packed(bits=8)})
    report = lowbit.report(model)
    assert report.skipped["w"] == "untied: a float copy of 3200 bytes is kept (embed is packed)"
    assert "no spec for it; untied: a float copy of 1536 bytes" in report.skipped["down"]
    assert (report.total_before, report.total_after) == (before, storage_bytes(model))


def test_the_command_lists_what_stays_float(tmp_path):
    from lowbit.cli.command import describe_folder

    model = lowbit.convert(Shares(), Packed(bits=8), skip=["down"])
    lowbit.save(model, tmp_path / "saved")
    report, found = lowbit.report(model), describe_folder(tmp_path / "saved")
    assert found.kept == report.kept and {k.name for k in found.kept} == {"w", "down.weight"}


class Ternary(nn.Module):
    """Trained with weights that are rounded on each call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 32).sign())


def test_a_trained_module_that_shares_its_weight(monkeypatch):
    from lowbit.model import sources

    def read(module):
        codes = (module.weight.detach() + 2).to(torch.uint8)
        stored = lowbit.PackedWeight(codes, torch.ones(24, 1), None, 2, None)
        return lowbit.Source(stored, weight=module.weight.detach(), note="of its own")

    monkeypatch.setitem(sources._entries, Ternary, sources._Entry(read))
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Ternary(), "b": Ternary()})
    model.w = model["a"].weight
    before = storage_bytes(model)
    planned = lowbit.convert(model, dry_run=True)
    lowbit.convert(model)
    for report in (planned, lowbit.report(model)):
        assert report.skipped == {"w": "untied: a float copy of 3072 bytes is kept (a is packed)"}
        assert (report.total_before, report.total_after) == (before, storage_bytes(model))
        assert [(row.bytes_before, row.note) for row in report.rows] == [(0, "of its own"), (3072, "of its own")]


def sparse(layout):
    """A [20, 20] identity, and the bytes of what it is made of."""
    if layout is torch.sparse_coo:
        return torch.eye(20).to_sparse(), 20 * (2 * 8 + 4)
    side = 5 if layout in (torch.sparse_bsr, torch.sparse_bsc) else 1
    n = 20 // side
    values = torch.eye(side).expand(n, side, side).contiguous() if side > 1 else torch.ones(n)
    made = torch.sparse_compressed_tensor(torch.arange(n + 1), torch.arange(n), values, (20, 20), layout=layout)
    return made, 8 * (n + 1) + 8 * n + values.nbytes


LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sparse_tensors_are_counted(layout):
    """Such as the edges of a graph. A weight that is one is named."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    before = storage_bytes(model)
    edges, edges_bytes = sparse(layout)
    model.register_buffer("edges", edges)
    planned = lowbit.convert(model, Packed(), dry_run=True)
    assert planned.total_before == before + edges_bytes
    assert [(kept.name, kept.bytes) for kept in planned.kept if kept.name == "edges"] == [("edges", edges_bytes)]
    model[1].weight = nn.Parameter(torch.ones(8, 32).to_sparse())
    with pytest.raises(ValueError, match="1: the weight must be dense: got layout torch.sparse_coo"):
        lowbit.convert(model, Packed())
    lowbit.convert(model, Packed(), skip=["1"])
    assert isinstance(model[0], lowbit.PackedLinear) and model.edges is edges


def test_tensors_without_a_storage_count_nothing():
    model = nn.Sequential(nn.Linear(64, 32))
    before = storage_bytes(model)
    model.register_buffer("blocked", torch.eye(20).to_mkldnn())
    assert lowbit.convert(model, Packed(), dry_run=True).total_before == before
