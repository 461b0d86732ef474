"""The command ``lowbit`` and the helpers of the demonstration."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit import demo
from lowbit.cli import command as cli
from lowbit.nn.layer import layers
from lowbit.testing.tiny import BERT


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40))
    folder = tmp_path_factory.mktemp("packed") / "model"
    lowbit.save(lowbit.convert(model, lowbit.Packed(bits=4, group_size=32, zeros="int"), skip=["3"]), folder)
    return folder


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("float") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command."""
    capsys.readouterr()
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as exit:
        status = int(exit.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_inspect_lists_every_layer(capsys: pytest.CaptureFixture[str], packed_folder: Path) -> None:
    status, out, err = run(capsys, "inspect", packed_folder)
    assert status == 0, err
    lines = {line.split()[0]: line for line in out.splitlines()}
    # 4-bit codes, and a float16 scale and a uint8 zero per 32 of them: 4 + 24/32 bits
    assert "4.75" in lines["0"]
    assert "4.75" in lines["1"]
    assert "3:" in out
    assert "skipped by the caller" in out


def test_inspect_total_is_what_the_file_holds(capsys: pytest.CaptureFixture[str], packed_folder: Path) -> None:
    report = cli.describe_folder(packed_folder)
    data = (packed_folder / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    assert report.total_after == len(data) - 8 - header
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40))
    assert report.total_before == sum(p.nbytes for p in model.parameters())


def test_inspect_reads_no_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packed_folder: Path
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("lowbit.checkpoint.reader.Checkpoint.read", fail)
    assert run(capsys, "inspect", packed_folder)[0] == 0


def _corrupt(folder: Path, target: Path, change: dict[str, object]) -> Path:
    """A copy of ``folder`` whose first layer's format has other fields."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    description = json.loads((folder / "lowbit.json").read_text())
    description["layers"][0]["format"].update(change)
    (target / "lowbit.json").write_text(json.dumps(description))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits must be between 2 and 8"),
        ({"bits": 3}, "shape must be"),
        ({"group_size": 0}, "group_size must be between 1 and K"),
        ({"scale_dtype": "float32"}, "dtype must be"),
        ({"surprise": 1}, "unknown field 'surprise'"),
    ],
)
def test_inspect_refuses_headers_that_disagree(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    packed_folder: Path,
    change: dict[str, object],
    message: str,
) -> None:
    folder = _corrupt(packed_folder, tmp_path / "bad", change)
    status, out, err = run(capsys, "inspect", folder)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("lowbit inspect: ")


@pytest.mark.parametrize("command", ["inspect", "bench", "convert"])
def test_missing_folder_is_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    arguments = [tmp_path / "absent"] + ([tmp_path / "out"] if command == "convert" else [])
    status, _, err = run(capsys, command, *arguments)
    assert status == 2
    assert "absent" in err
    assert "Traceback" not in err


def test_truncated_file_is_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, packed_folder: Path) -> None:
    folder = _corrupt(packed_folder, tmp_path / "short", {})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, _, err = run(capsys, "inspect", folder)
    assert status == 2
    assert "truncated" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["explode"], ["convert"], ["convert", "a", "b", "--bits", "x"], ["bench", "--rows", "0"]],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "usage: lowbit" in err


def test_failures_exit_with_1_and_show_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packed_folder: Path
) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.delenv("LOWBIT_DEBUG", raising=False)
    monkeypatch.setattr(cli, "describe_folder", fail)
    assert run(capsys, "inspect", packed_folder) == (1, "", "lowbit inspect: the disk is on fire\n")
    monkeypatch.setenv("LOWBIT_DEBUG", "1")
    assert "Traceback" in run(capsys, "inspect", packed_folder)[2]


def test_convert_then_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path, float_folder: Path) -> None:
    target = tmp_path / "packed"
    status, out, err = run(
        capsys, "convert", float_folder, target, "--bits", "3", "--group-size", "32", "--symmetric",
        "--quantizer", "mse", "--outliers", "0.01", "--skip", "*.mlp.down_proj",
    )  # fmt: skip
    assert status == 0, err
    assert f"written to {target}" in out
    status, inspected, err = run(capsys, "inspect", target)
    assert status == 0, err
    assert out.startswith(inspected)
    assert "3-bit group 32 symmetric" in inspected
    assert "% outliers" in inspected
    assert "model.layers.1.mlp.down_proj" in inspected

    model = lowbit.load(target)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert model.model.layers[0].mlp.up_proj.format.bits == 3
    report = cli.describe_folder(target)
    assert report.total_after < report.total_before / 2


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("Packed(bits=3, group_size=32)", lowbit.Packed(bits=3, group_size=32)),
        ("Packed(activations='int8', activation_group_size=128)",
         lowbit.Packed(activations="int8", activation_group_size=128)),
        ("Codebook(table='nf4', group_size=64)", lowbit.Codebook(table="nf4", group_size=64)),
        ("Codebook(table=(-1, 0.0, 0.5, 2))", lowbit.Codebook(table=(-1.0, 0.0, 0.5, 2.0))),
        ("Codebook(bits=3, codebook_dtype='bfloat16')", lowbit.Codebook(bits=3, codebook_dtype=torch.bfloat16)),
        ("Kronecker(compression=4, rank=2)", lowbit.Kronecker(compression=4, rank=2)),
        ("Kronecker(shape=(2, 1), factors=Packed(bits=4))",
         lowbit.Kronecker(shape=(2, 1), factors=lowbit.Packed(bits=4))),
        ("lowbit.Packed(bits=2, group_size=16)", lowbit.Packed(bits=2, group_size=16)),
        ("Packed(group_size=32, scale_dtype=torch.bfloat16)",
         lowbit.Packed(group_size=32, scale_dtype=torch.bfloat16)),
        ("None", None),
    ],
)  # fmt: skip
def test_a_spec_reads_as_in_python(text: str, spec: object) -> None:
    assert cli.parse_spec(text) == spec


@pytest.mark.parametrize(
    "text", ["Linear(3)", "Packed(4)", "3", "__import__('os')", "Codebook(bits=", "Packed(**{})", "Packed(bits=1+1)",
             "Packed(colour='red')", "Packed(bits=99)", "other.Packed()", "lowbit.lowbit.Packed()"]
)  # fmt: skip
def test_anything_else_is_not_a_spec(text: str) -> None:
    with pytest.raises(ValueError, match="spec|bits must be|is not a value|has no argument"):
        cli.parse_spec(text)


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        ([], lowbit.Packed()),
        (["--bits", "8"], lowbit.Packed(bits=8)),
        (["--bits", "3", "--symmetric"], lowbit.Packed(bits=3, symmetric=True)),
        (["--granularity", "row"], lowbit.Packed(granularity="row")),
        (["--group-size", "32", "--zeros", "int"], lowbit.Packed(group_size=32, zeros="int")),
    ],
)
def test_python_flags_and_specs_have_the_same_defaults(flags: list[str], spec: lowbit.Packed) -> None:
    assert cli._specs(cli.parser().parse_args(["convert", "a", "b", *flags])) == spec
    assert cli.parse_spec(repr(spec)) == spec


def test_convert_with_specs_by_pattern(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, float_folder: Path
) -> None:
    status, out, err = run(
        capsys, "convert", float_folder, tmp_path / "packed", "--spec", "Codebook(bits=4)",
        "--spec", "*.mlp.*=Kronecker(compression=2)", "--spec", "*.q_proj=Packed(bits=8)", "--spec", "*.o_proj=None",
    )  # fmt: skip
    assert status == 0, err
    scheme = {line.split()[0]: line for line in out.splitlines() if line}
    assert "4-bit codebook per row" in scheme["model.embed_tokens"]
    assert "Kronecker" in scheme["model.layers.0.mlp.up_proj"]
    assert "8-bit group 64" in scheme["model.layers.1.self_attn.q_proj"]
    assert "float: model.layers.0.self_attn.o_proj: no spec for it" in out
    assert run(capsys, "inspect", tmp_path / "packed")[1] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "Codebook(bits=4)", "--bits", "3"], "--spec says it all: leave out --bits"),
        (["--spec", "*.mlp.*:Codebook(bits=4)"], "--spec must be SPEC or PATTERN=SPEC"),
        (["--spec", "Codebook(bits=9)"], "bits must be an integer between 1 and 8: got bits=9"),
        (["--spec", "Codebook(sensitivity=True)"], "sensitivity=True needs --calibration-text FILE"),
        (["--spec", "Codebook(codebook_dtype=torch.int8)"], "'torch.int8' is not a value: write a literal, or"),
        (["--spec", "Packed(quantizer=mse)"], "'mse' is not a value: text stands in quotes, 'mse', or"),
        (["--spec", "Packed(groupsize=32)"], "Packed has no argument 'groupsize': did you mean 'group_size'?"),
        (["--spec", "*.mlp.*=lowbit.Codebook(bit=3)"], "Codebook has no argument 'bit': did you mean 'bits'?"),
        (["--spec", "Kronecker(factors=Packed(colour=1))"], "Packed has no argument 'colour': choose from 'bits', "),
        (["--spec", "lowbit.CodeBok(bits=3)"], "'lowbit.CodeBok' is not a spec: did you mean 'Codebook'?"),
        (["--spec", "*.mlp.*=packed(bits=3)"], "'packed' is not a spec: did you mean 'Packed'?"),
        (["--spec", "Linear(bits=3)"], "'Linear' is not a spec: choose from 'Packed', 'Codebook', 'Kronecker'"),
        (["--spec", "Codebook(bits=3, bits=4)"], "name every argument, each once"),
        (["--spec", "Codebook()", "--spec", "Kronecker()"], "--spec must give each pattern once: got '*' again"),
        (["--spec", "nothing.*=Codebook()"], "spec pattern 'nothing.*': matches no layer"),
        (["--spec", "Packed"], "'Packed' is not a spec, but their class: write Packed(bits=4)"),
        (["--spec", "*.mlp.*=lowbit.Codebook"], "but their class: write Codebook(bits=4)"),
        (["--spec", "Kronecker"], "write Kronecker(compression=2)"),
        (["--spec", "Kronecker(factors=Packed)"], "'Packed' is not a spec, but their class: write Packed(bits=4)"),
        (["--spec", "Codebok"], "'Codebok' is not a spec: did you mean 'Codebook'?"),
    ],
)
def test_convert_refuses_bad_specs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, float_folder: Path, arguments: list[str], message: str
) -> None:
    status, _, err = run(capsys, "convert", float_folder, tmp_path / "packed", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "bits must be an integer between 2 and 8: got bits=9"),
        (["--quantizer", "gptq"], "--quantizer gptq needs --calibration-text FILE"),
        (["--activations", "int8_static"], "--activations int8_static needs --calibration-text FILE"),
        (["--activations", "int8", "--activation-group-size", "48"], "activation_group_size must be a positive mult"),
        (["--spec", "Codebook(activation_group_size=32)"], "Codebook has no argument 'activation_group_size'"),
        (["--skip", "no.such.layer"], "no.such.layer"),
        (["--group-size", "4096"], "group_size"),
    ],
)
def test_convert_refuses_bad_options(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    float_folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    status, _, err = run(capsys, "convert", float_folder, tmp_path / "packed", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    "spec",
    [
        "Packed(bits=3, outliers=0.01)", "Packed(activations='int8', activation_group_size=128)",
        "Packed(activations='int8_static', zeros='float')",
        "Codebook(bits=4, outliers=0.01)", "Codebook(table='nf4', group_size=64)",
        "Kronecker()", "Kronecker(rank=2, factors=Packed(bits=2))",
    ],
)  # fmt: skip
def test_bench_times_any_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    monkeypatch.setattr(cli, "BENCH_SECONDS", 0.0)
    monkeypatch.setattr(cli, "BENCH_BYTES", 1 << 20)
    monkeypatch.setattr(cli, "BENCH_SHAPES", [(96, 64)])
    status, out, err = run(capsys, "bench", "--spec", spec, "--rows", "1")
    assert status == 0, err
    assert "96 x 64" in out


def test_bench_refuses_a_form_that_fits_no_shape(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "bench", "--spec", "Codebook(group_size=4097)", "--rows", "1")
    assert status == 2
    assert "--spec must fit one of the shapes to time: group_size must be between 1 and K" in err


def test_bench_times_each_distinct_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packed_folder: Path
) -> None:
    monkeypatch.setattr(cli, "BENCH_SECONDS", 0.01)
    monkeypatch.setattr(cli, "BENCH_BYTES", 1)
    status, out, err = run(capsys, "bench", packed_folder, "--rows", "1,3")
    assert status == 0, err
    rows = [line.split() for line in out.splitlines() if " x " in line and "scheme" not in line]
    assert [(row[0], row[2], row[3]) for row in rows] == [("96", "64", "1"), ("96", "64", "3")]
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in rows)


def test_doctor_reports_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "doctor")
    assert status == 0, err
    for backend in lowbit.backends():
        assert str(backend) in out
    assert torch.__version__ in out
    assert lowbit.__version__ in out
    assert "after a fork" in out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_with_one_thread_runs() -> None:
    """What doctor advises; with more threads the child waits for those that only its parent has."""
    code = (
        "import os, signal, torch, lowbit; torch.set_num_threads(2);"
        "layer = lowbit.convert(torch.nn.Linear(512, 512), lowbit.Packed()); x = torch.randn(64, 512);"
        "expected = layer(x); child = os.fork();"
        "child or (signal.alarm(60), torch.set_num_threads(1), os._exit(not torch.equal(layer(x), expected)));"
        "print(os.waitpid(child, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_installed_command_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lowbit.cli", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (0, f"lowbit {lowbit.__version__}\n")


def test_one_call_gives_the_median_and_the_spread() -> None:
    times = iter([0.0, 0.002, 0.0, 0.004, 0.0, 0.009])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.time, "perf_counter", lambda: next(times))
        assert demo.one_call(lambda: None, repeats=3) == "4.0 (2.4-8.0) ms"


def test_perplexity_of_a_uniform_model() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 7)})

    assert demo.perplexity(Uniform(), torch.arange(11)[None] % 7, context=5) == pytest.approx(7.0)


def test_sample_sentences_do_not_overlap() -> None:
    pairs = demo.sentence_pairs()
    assert len(pairs) >= 50
    assert {pair.grade for pair in pairs} <= set(map(float, range(6)))
    evaluated = {sentence for pair in pairs for sentence in (pair.first, pair.second)}
    assert not evaluated & set(demo.sample_text())


@pytest.mark.parametrize("quantizer", ["gptq", "minmax"])
def test_demo_calibrates_the_rows_that_make_use_of_it(quantizer: str) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(64, 48)), [torch.randn(3, 64)]
    differ = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "calibration= changes nothing"
        for label, spec in demo.recipes([4], 64, quantizer).items():
            given, plain = demo.converted(model, spec, batches), None
            if not spec.needs_calibration:
                plain = lowbit.convert(copy.deepcopy(model), spec)
            differ[label] = plain is None or not torch.equal(given[0].dequantize(), plain[0].dequantize())
    assert [label for label, differs in differ.items() if not differs] == [
        *(["4-bit"] if quantizer == "minmax" else []), "NF4", "4-bit k-means", "Kronecker, half"
    ]  # fmt: skip


def test_demo_times_int8_activations_that_are_int8() -> None:
    torch.manual_seed(0)
    model = lowbit.convert(nn.Sequential(nn.Linear(64, 48)), lowbit.Packed(bits=4, group_size=32))
    int8, x = demo.with_int8_activations(model), torch.randn(3, 64)
    assert int8 is not None
    weight = lowbit.Packed(bits=4, group_size=32).quantize(model[0].dequantize())
    expected = lowbit.PackedLinear.from_weight(weight, model[0].bias, activations="int8")
    assert int8[0].format.activations == "int8" and not torch.equal(int8(x), model(x))
    torch.testing.assert_close(int8(x), expected(x), rtol=1e-2, atol=1e-2)
    int8[0].become(model[0].format, int8[0].canonical())
    assert torch.equal(int8(x), model(x))
    assert demo.with_int8_activations(lowbit.convert(nn.Sequential(nn.Linear(64, 48)), lowbit.Kronecker())) is None


def test_demo_trains_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**BERT)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(BERT["vocab_size"], (4, 6))
    packed = demo.converted(model, lowbit.Kronecker(compression=2), [])

    def error() -> float:
        with torch.no_grad():
            pairs = zip(*(m(ids, output_hidden_states=True).hidden_states for m in (packed, model)), strict=True)
            return sum(float((a - b).square().mean()) for a, b in pairs)

    start = error()
    with torch.no_grad():  # as the demonstration calls it
        packed = demo.lightly_trained(packed, model, demo.Encoder.term, [{"input_ids": ids}])
    assert error() < 0.9 * start
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(layer._tensor("a"), nn.Parameter) for layer in layers(packed).values())


def test_demo_trains_on_phrases_of_its_text() -> None:
    text = " ".join(" ".join(demo.sample_text()).split())
    found = demo.phrases(40)
    assert len(set(found)) > 30 and all(phrase in text and 6 <= len(phrase.split()) <= 15 for phrase in found)


def test_demo_refuses_an_unknown_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo.main([str(tmp_path / "absent")]) == 2
    assert "lowbit demo: " in capsys.readouterr().err
