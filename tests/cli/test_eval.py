"""``lowbit eval``: tables, files and errors, on tiny models with a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.cli import command as cli
from lowbit.cli.evaluate import Point, draw, load_model

transformers = pytest.importorskip("transformers")

TEXT = "once upon a time there was a little red fox and a big blue bear who ran\n" * 4
WORDS = ["[UNK]", "[PAD]", "<s>", *sorted(set(TEXT.split()))]
TINY = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "pad_token_id": 1, "max_position_embeddings": 32}  # fmt: skip


def saved(folder: Path, model: object) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="<s>", model_max_length=32
    )
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    fast.save_pretrained(folder)
    return folder


def saved_llama(folder: Path, **options: object) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, bos_token_id=2, **options)
    return saved(folder, transformers.LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("eval") / "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run(capsys: pytest.CaptureFixture[str], *arguments: object, command: str = "eval") -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([command, *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_packed_folder_beside_its_float_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, text: Path
) -> None:
    lowbit.convert_folder(llama, tmp_path / "packed", lowbit.Packed(bits=4))
    status, out, err = run(capsys, tmp_path / "packed", "--text", text, "--reference", llama, "--length", 9,
                           "--json", tmp_path / "found.json")  # fmt: skip
    assert status == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    ids = torch.tensor([[WORDS.index(word) for word in TEXT.split()]])
    rows = [torch.cat([torch.tensor([[2]]), part], 1) for part in ids.split(8, dim=1)]
    expected = lowbit.evaluate(lowbit.load(tmp_path / "packed"), rows, reference=load_model(llama))
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-5) and found["kl"] > 0
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6) and found["count"] == ids.numel()
    assert f"{expected.perplexity:.4f}" in out and "KL to the reference" in out


def test_a_sweep_is_a_table_a_json_and_a_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, llama: Path, text: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    status, out, err = run(capsys, llama, "--text", text, "--json", tmp_path / "found.json", "--plot", plot,
                           "--sweep", "Packed(bits=8)", "--sweep", "low=Packed(bits=2)", "--sweep",
                           "low = Packed(bits=3, group_size=16)")  # fmt: skip
    assert status == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found] == [
        str(llama), "Packed(bits=8)", "Packed(bits=2)", "Packed(bits=3, group_size=16)",
    ]  # fmt: skip
    assert [row.get("line") for row in found] == [None, None, "low", "low"]
    assert found[0]["kl"] == 0 < found[1]["kl"] < found[3]["kl"] < found[2]["kl"]
    assert found[0]["bytes"] > found[1]["bytes"] > found[3]["bytes"] > found[2]["bytes"]
    assert len(out.splitlines()) == 5 and "<svg" in plot.read_text()
    again = tmp_path / "again.svg"
    draw([Point.of(row) for row in found], again, "llama")  # from the file
    assert again.read_text() == plot.read_text()


def test_sentences_for_encoders_and_labelled_ones_for_classifiers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = transformers.BertConfig(**TINY, id2label={0: "sad", 1: "glad"}, label2id={"sad": 0, "glad": 1})
    encoder = saved(tmp_path / "encoder", transformers.BertModel(config))
    (tmp_path / "lines.txt").write_text("a red fox\nthe bear\n\na little bear who ran\n")
    status, out, err = run(capsys, encoder, "--text", tmp_path / "lines.txt", "--reference", encoder)
    assert status == 0, err
    assert "cosine to the reference" in out and "1.0000" in out
    classifier = saved(tmp_path / "classifier", transformers.BertForSequenceClassification(config))
    (tmp_path / "labels.txt").write_text("glad\ta red fox\n0\tthe bear\nsad\ta bear\n")
    status, out, err = run(capsys, classifier, "--text", tmp_path / "labels.txt", "--json", tmp_path / "found.json")
    assert status == 0, err
    assert json.loads((tmp_path / "found.json").read_text())["count"] == 3 and "accuracy" in out
    (tmp_path / "labels.txt").write_text("glad\ta red fox\nangry\tthe bear\n")
    status, _, err = run(capsys, classifier, "--text", tmp_path / "labels.txt")
    assert status == 2 and "line 2 must be LABEL<TAB>SENTENCE with a number or one of" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "Packed(bits=3, quantizer='gptq')"], "needs --calibration-text FILE"),
        (["--sweep", "Pocket(bits=3)"], "is not a spec"),
        (["--sweep", "None"], "--sweep must be a spec"),
        (["--sweep", "a=b=Packed(bits=3)"], "--sweep must be SPEC or LINE=SPEC"),
        (["--plot", "x.svg"], "--plot draws what --sweep measures"),
        (["--length", "1"], "--length must be at least 2: got 1"),
        (["--reference", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], llama: Path, text: Path, arguments: list[str], message: str
) -> None:
    status, _, err = run(capsys, llama, "--text", text, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_an_empty_text_is_an_error(capsys: pytest.CaptureFixture[str], llama: Path, text: Path) -> None:
    text.write_text(" \n")
    status, _, err = run(capsys, llama, "--text", text)
    assert status == 2 and "--text must hold some text" in err
