"""The example of a service: one bad text changes nothing for the others, and what was accepted is answered."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lowbit
from lowbit.testing.tiny import BERT

pytest.importorskip("fastapi", reason="fastapi is not installed: the example needs it")
pytest.importorskip("uvicorn")
transformers = pytest.importorskip("transformers", minversion="5.0")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "serve"
if not FOLDER.is_dir():
    pytest.skip("not run from a source checkout", allow_module_level=True)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "model", "few", "words", "that", "quick", "make"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


app = load("app")


def fake(seen: list[list[str]]) -> Any:
    def encode(texts: Sequence[str]) -> list[list[float]]:
        seen.append(list(texts))
        time.sleep(0.002)
        if any("poison" in text for text in texts):
            raise RuntimeError("poison")
        return [[float(len(text)), float("nan") if text == "nan" else 1.0] for text in texts]

    return encode


def test_a_bad_text_changes_nothing_for_the_others() -> None:
    async def main() -> tuple[list[Any], Any, list[list[str]]]:
        seen: list[list[str]] = []
        batcher = app.Batcher(fake(seen), max_batch=4, max_wait=0.01, max_waiting=100)
        worker = asyncio.create_task(batcher.run())
        texts = ["a", "bb", "poison", "ccc", "nan", "dddd", "e" * 9]
        found = await asyncio.gather(*(batcher.embed([text]) for text in texts), return_exceptions=True)
        batcher.stop()
        await worker
        return found, batcher, seen

    found, batcher, seen = asyncio.run(main())
    assert [type(each) for each in found] == [list, list, RuntimeError, list, ValueError, list, list]
    assert [each[0][0] for each in found if isinstance(each, list)] == [1, 2, 3, 4, 9]
    assert max(map(len, seen)) <= 4 and any(len(batch) > 1 for batch in seen)
    assert batcher.metrics.counts["failed"] == 2 and batcher.metrics.counts["requests"] == 7
    assert 'embed_latency_seconds_bucket{le="+Inf"} 7' in batcher.metrics.text(0)


def test_stopping_answers_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        batcher = app.Batcher(fake([]), max_batch=2, max_wait=0.0, max_waiting=6)
        accepted = [asyncio.create_task(batcher.embed(["a", "b"])) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(app.Busy):  # six wait
            await batcher.embed(["c"])
        batcher.stop()
        await batcher.run()
        assert await asyncio.gather(*accepted) == [[[1.0, 1.0], [1.0, 1.0]]] * 3
        with pytest.raises(app.Busy):
            await batcher.embed(["c"])

    asyncio.run(main())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**BERT)).eval()
    model.save_pretrained(folder / "float")
    lowbit.convert(model, lowbit.Packed(bits=4, group_size=32)).save_pretrained(folder)
    for each in (folder, folder / "float"):
        transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(each)
    return folder


def test_the_service(folder: Path) -> None:
    client = pytest.importorskip("fastapi.testclient")
    encode = app.encoder(folder)
    service = app.create_app(lambda: encode, max_batch=4)
    texts = ["a small model", "quick words that make few"]
    with client.TestClient(service) as http:
        assert http.get("/health").json() == {"status": "ready"}
        found = torch.tensor(http.post("/embed", json={"texts": texts}).json()["embeddings"])
        torch.testing.assert_close(found, torch.tensor([encode([text])[0] for text in texts]), rtol=1e-4, atol=1e-5)
        assert http.post("/embed", json={"texts": []}).status_code == 422
        assert http.post("/embed", json={"texts": ["a"] * 65}).status_code == 422
        measured = dict(line.split() for line in http.get("/metrics").text.splitlines())
        assert measured["embed_requests_total"] == "1" and float(measured["process_resident_memory_bytes"]) > 1e6


@pytest.mark.slow
def test_the_load_test_runs(folder: Path) -> None:
    options = ["--clients", "2", "--seconds", "0.5", "--poison", "5"]
    command = [sys.executable, FOLDER / "load.py", folder / "float", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [["float", "2"], [folder.name, "2"]]
    for _, _, rate, p50, p99, memory in rows:
        assert float(rate) > 0 and float(p50) <= float(p99) and len(memory.split()) == 10
