"""``lowbit serve``: transformers' server answers with what ``generate`` gives."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.cli import command as cli
from lowbit.testing.tiny import LLAMA

transformers = pytest.importorskip("transformers", minversion="5.20")


def test_its_options_are_those_of_transformers(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pytest.importorskip("typer")
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", "--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and "lowbit serve" in said and "continuous" in said
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", "--no-such-option"])
    assert exit.value.code == 2 and "no-such-option" in capsys.readouterr().err


def saved(folder: Path) -> tuple[Any, Any]:
    """A packed model and its tokenizer, whose words are numbers."""
    words = tokenizers_of()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, initializer_range=0.2, eos_token_id=None, bos_token_id=None)
    model = lowbit.convert(transformers.LlamaForCausalLM(config).eval(), lowbit.Packed(bits=4, group_size=32))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model, words


def tokenizers_of() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(LLAMA["vocab_size"])}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_a_completion_is_what_generate_gives(tmp_path: Path) -> None:
    for name in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: transformers[serving] has it")
    model, words = saved(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowbit.cli", "serve", str(tmp_path), "--port", str(port), "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=output, stderr=output, env=environment)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        prompt = "w5 w9 w33"
        ids = words(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, 3:]
        body = {"model": str(tmp_path), "prompt": prompt, "max_tokens": 6, "temperature": 0}
        answer = ask(port, "/v1/completions", body)
        assert answer["choices"][0]["text"].split() == words.convert_ids_to_tokens(expected), log.read_text()
    finally:
        server.terminate()
        server.wait(30)
