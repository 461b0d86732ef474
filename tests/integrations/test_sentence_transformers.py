"""sentence-transformers: a converted model that is saved and loaded gives the same embeddings."""

import json

import pytest
import torch

import lowbit

transformers = pytest.importorskip("transformers", minversion="5.0")
st = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.models")

SPEC = lowbit.Packed(bits=4, group_size=16)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "model", "few", "words", "that", "quick", "make"]
TEXTS = ["a small model", "quick words that make few"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(WORDS),
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "bert")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return folder / "bert"


def make(folder, *more):
    transformer = modules.Transformer(str(folder))
    pooling = modules.Pooling(32)
    return st.SentenceTransformer(modules=[transformer, pooling, *more], device="cpu")


@pytest.mark.parametrize("save", ["save_pretrained", "save"])
def test_reloading_gives_the_same_embeddings(save, folder, tmp_path):
    model = lowbit.convert(make(folder), SPEC)
    assert len(lowbit.report(model).rows) >= 6
    expected = model.encode(TEXTS)
    getattr(model, save)(str(tmp_path))
    other = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert (other.encode(TEXTS) == expected).all()
    assert next(other.parameters()).dtype == torch.float32
    getattr(other, save)(str(tmp_path / "again"))
    assert (st.SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS) == expected).all()


def test_a_module_that_it_cannot_load_again_is_named(folder, tmp_path):
    torch.manual_seed(0)
    model = lowbit.convert(make(folder, modules.Dense(32, 16)), SPEC)
    with pytest.raises(ValueError, match=r"Dense holds 1 packed layers \(linear.*skip="):
        model.save_pretrained(str(tmp_path / "packed"))
    model = lowbit.convert(make(folder, modules.Dense(32, 16)), SPEC, skip=["2.linear"])
    model.save_pretrained(str(tmp_path / "float"))
    other = st.SentenceTransformer(str(tmp_path / "float"), device="cpu")
    assert (other.encode(TEXTS) == model.encode(TEXTS)).all()


def test_a_converted_folder_has_the_modules_behind_the_transformer(folder, tmp_path):
    torch.manual_seed(0)
    model = make(folder, modules.Dense(32, 16))
    model.save_pretrained(str(tmp_path / "float"))
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", SPEC)
    other = st.SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert len(lowbit.report(other).rows) >= 6 and isinstance(other[2].linear, torch.nn.Linear)
    assert (other.encode(TEXTS) == lowbit.convert(model, SPEC, skip=["2.linear"]).encode(TEXTS)).all()


@pytest.mark.parametrize("path", ["../elsewhere", "..", ".", "/tmp", "a/b"])
def test_a_list_of_modules_cannot_name_folders_elsewhere(path, folder, tmp_path):
    make(folder).save_pretrained(str(tmp_path / "float"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x")
    (tmp_path / "float" / "a" / "b").mkdir(parents=True)
    (tmp_path / "float" / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": path}]))
    lowbit.convert_folder(tmp_path / "float", tmp_path / "packed", SPEC)
    assert all(each.is_file() for each in (tmp_path / "packed").iterdir())
