"""What ``convert`` says of a wrong argument, a pattern without a match, and a recogniser's mistake."""

import json

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Packed
from lowbit.core.family import Spec, written_spec
from lowbit.model import sources
from lowbit.packed.quantize import GridQuantizer


class Block(nn.Module):
    def __init__(self, d=32, wide=64):
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(d, d), nn.Linear(wide, d)


class Model(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList([Block() for _ in range(blocks)])
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 50)


def test_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"^model must be an nn.Module: got str 'gpt2': load the model first, .*'gpt2'"):
        lowbit.convert("gpt2", Packed())
    for function in (lowbit.convert, lowbit.report, lowbit.dequantize, lambda model: lowbit.save(model, tmp_path)):
        with pytest.raises(TypeError, match="model must be an nn.Module: got Tensor"):
            function(torch.zeros(2, 2))
    lowbit.save(lowbit.convert(nn.Sequential(nn.Linear(8, 8)), Packed()), tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    config = {"quantization_config": {"quant_method": "lowbit"}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text(json.dumps({"text_config": config}))
    for folder in ("plain", "packed", "nested"):
        for path in (tmp_path / folder, str(tmp_path / folder)):
            with pytest.raises(TypeError, match=r"is already a lowbit folder: lowbit\.load\("):
                lowbit.convert(path, Packed())
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text("{}")
    with pytest.raises(TypeError, match=r"lowbit\.convert_folder"):
        lowbit.convert(tmp_path / "float", Packed())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Packed, r"^spec must be made, not the class itself: write Packed\(bits=4\)$"),
        (lowbit.Codebook, r"write Codebook\(bits=4\)$"),
        (lowbit.Kronecker, r"write Kronecker\(compression=2\)$"),
        ({"*.q_proj": None, "*": Packed}, r"not to their class: for '\*', write Packed\(bits=4\)$"),
        ({"*": lowbit.Kronecker}, r"for '\*', write Kronecker\(compression=2\)$"),
        (Spec, r"spec must be None, a Packed, Codebook or Kronecker, or .*: got ABCMeta"),
        ([Packed(), Packed()], r"a mapping of patterns to specs, such as .*: got a list"),
        ((Packed(),), "got a tuple"),
    ],
)
def test_what_is_no_spec(spec, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        lowbit.convert(Model(), spec)
    with pytest.raises(TypeError, match=message):
        lowbit.convert_folder(tmp_path / "nowhere", tmp_path / "packed", spec)


def test_every_family_has_an_example_of_its_spec():
    for cls in (Packed, lowbit.Codebook, lowbit.Kronecker):
        made = eval(written_spec(cls), {cls.__name__: cls})
        assert made == cls(), "the example is what an empty call gives"


def test_classes_instead_of_objects_elsewhere():
    with pytest.raises(ValueError, match=r"got the class itself: write factors=Packed\(bits=4\)$"):
        lowbit.Kronecker(factors=Packed)
    weight = torch.zeros(8, 64)
    with pytest.raises(TypeError, match=r"family 'packed': got the class itself: write Packed\(bits=4\)$"):
        lowbit.PackedLinear.from_float(weight, Packed)
    with pytest.raises(TypeError, match=r"spec must be one of family 'kron': got Packed\(bits=4"):
        lowbit.KroneckerLinear.from_float(weight, Packed())
    for cls in (lowbit.PackedLinear, lowbit.PackedEmbedding):
        with pytest.raises(TypeError, match=rf"^{cls.__name__}: format must be a PackedFormat: got CodebookFormat\("):
            cls.from_weight(lowbit.Codebook().quantize(weight))
    with pytest.raises(TypeError, match=r"not the class itself: write GridQuantizer\(\)$"):
        lowbit.register_quantizer(GridQuantizer)
    with pytest.raises(TypeError, match=r"^quantizer must be a lowbit.Quantizer: got int 3$"):
        lowbit.register_quantizer(3)


def test_skip_may_be_an_iterator():
    model = lowbit.convert(Model(), Packed(), skip=(name for name in ["layers", "embed"]))
    assert type(model.embed) is nn.Embedding and type(model.layers[3].q_proj) is nn.Linear
    assert type(model.lm_head) is lowbit.PackedLinear


def test_skip_is_made_of_texts():
    for wrong in (0, 0.5, False):
        with pytest.raises(TypeError, match=f"skip must be a sequence of patterns: got {type(wrong).__name__} {wrong}"):
            lowbit.convert(Model(), Packed(), skip=wrong)
    with pytest.raises(TypeError, match=r"skip must be a sequence of patterns, texts: got LayerNorm"):
        lowbit.convert(Model(), Packed(), skip=[Model().norm])


PATTERNS = {
    "q_proj": r"'q_proj'.*matches no layer; did you mean '\*\.q_proj'\?",
    "lm_haed": r"did you mean 'lm_head'\?",
    "*.q_porj": r"did you mean '\*\.q_proj'\?",
    "layer.0.q_proj": r"did you mean 'layers\.0\.q_proj'\?",
    "norm": r"norm is a LayerNorm, and has no layer that convert swaps",
    "xyzzy": r"matches no layer$",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_without_a_match_says_what_it_may_have_meant(pattern):
    for spec, skip in (({pattern: Packed()}, ()), (Packed(), [pattern])):
        with pytest.raises(ValueError, match=PATTERNS[pattern]):
            lowbit.convert(Model(), spec, skip=skip)


def test_layers_that_fail_alike_are_named_together():
    with pytest.raises(ValueError, match="cannot convert") as caught:
        lowbit.convert(Model(12), Packed(group_size=1024))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines == [
        "cannot convert, nothing was changed:",
        "embed, layers.0.q_proj and 12 more layers: group_size must be between 1 and K: got group_size=1024, K=32",
        "layers.0.down_proj, layers.1.down_proj and 10 more layers: "
        "group_size must be between 1 and K: got group_size=1024, K=64",
        "to leave these layers as they are: "
        "skip=['embed', 'layers.*.q_proj', 'layers.*.down_proj', 'lm_head']",
    ]


def test_the_short_skip_takes_no_layer_that_can_be_converted():
    model = Model(3)
    model.layers[1].q_proj = nn.Linear(64, 32)
    with pytest.raises(ValueError, match="cannot convert") as caught:
        lowbit.convert(model, Packed(group_size=48))
    skip = eval(str(caught.value).rpartition("skip=")[2])
    assert skip == ["embed", "layers.0.q_proj", "layers.2.q_proj", "lm_head"]
    lowbit.convert(model, Packed(group_size=48), skip=skip)
    assert len(lowbit.report(model).rows) == 4


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_features, self.in_features = 8, 16


def weight(n=8, k=16):
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    return lowbit.PackedWeight(codes, torch.ones(n, 1), None, 4, None)


def forgot_t(module):
    return lowbit.Source(weight(16, 8))


def weight_only(module):
    return weight()


def number(module):
    return 3


def fails(module):
    return module.no_such_attribute


def short_bias(module):
    return lowbit.Source(weight(), bias=torch.zeros(3))


def transposed_weight(module):
    return lowbit.Source(weight(), weight=torch.zeros(16, 8))


def lazily_transposed(module):
    return lowbit.Source(weight(), weight=lambda: torch.zeros(16, 8))


def no_weight(module):
    return lowbit.Source(torch.zeros(8, 16))


def wrong_scales(module):
    return lowbit.Source(lowbit.PackedWeight(weight().codes, torch.ones(3, 5), None, 4, None))


MISTAKES = [
    (forgot_t, r"gives a weight \[N, K\] = \[16, 8\]: the module has \[8, 16\]; is a transposition missing, \.t\(\)\?"),
    (weight_only, r"must return a lowbit\.Source: got a PackedWeight; return Source\(weight\)"),
    (number, r"must return a lowbit\.Source, a reason as text, or None: got int"),
    (fails, r"raised AttributeError: 'Trained' object has no attribute 'no_such_attribute'"),
    (short_bias, r"gives a bias of shape \[3\]: \[N\] = \[8\] is required"),
    (transposed_weight, r"\[8, 16\]: its weight has \[16, 8\]; is a transposition missing"),
    (lazily_transposed, r"\[8, 16\]: Source\.weight\(\) has \[16, 8\]"),
    (no_weight, r"must give Source\.stored as a PackedWeight, CodebookWeight or KroneckerWeight: got Tensor"),
    (wrong_scales, r"gives a weight that cannot be stored: .*scales"),
]


@pytest.mark.parametrize(("recogniser", "message"), MISTAKES, ids=[m[0].__name__ for m in MISTAKES])
def test_a_recognisers_mistake_names_layer_and_recogniser(recogniser, message, monkeypatch):
    monkeypatch.setitem(sources._entries, Trained, sources._Entry(recogniser))
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Trained()})
    with pytest.raises(ValueError, match=rf"(?s)b: .*its recogniser {recogniser.__name__} ?.*{message}"):
        lowbit.convert(model)
    assert type(model["b"]) is Trained
