"""A service that embeds sentences with a transformers encoder, packed by lowbit or float.

    python examples/serve/app.py FOLDER --port 8000
    curl -s localhost:8000/embed -H 'Content-Type: application/json' -d '{"texts": ["a small model"]}'

``POST /embed``, ``GET /health`` (503 until warm, and while stopping), ``GET /metrics`` (Prometheus' text format).

Requests that wait are run as one batch, by one thread: the model's kernels use the cores. A batch that fails is run
again text by text, so that only the text at fault gets an error. A queue that is full answers 503 at once. On SIGTERM
what was accepted is still answered.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

Vector = list[float]
Encode = Callable[[Sequence[str]], list[Vector]]
WARM_UP = ["a", "a few more words than that", "word " * 200]
LATENCIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, math.inf)  # seconds, upper ends of a histogram


def encoder(folder: Path, max_length: int = 256) -> Encode:
    """Mean of the last hidden states over the tokens of a text, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    import lowbit  # before from_pretrained: it registers how packed folders are loaded

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    if getattr(model.config, "quantization_config", None) is not None:  # else it is float
        print(lowbit.report(model))

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> list[Vector]:
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(means.float(), dim=-1).tolist()

    return encode


@dataclass
class Metrics:
    counts: Counter[str] = field(default_factory=Counter)
    latencies: Counter[float] = field(default_factory=Counter)
    seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.latencies[next(end for end in LATENCIES if seconds <= end)] += 1
        self.seconds += seconds

    def text(self, waiting: int) -> str:
        lines = [f"embed_{name}_total {count}" for name, count in sorted(self.counts.items())]
        total = 0
        for end in LATENCIES:
            total += self.latencies[end]
            lines.append(f'embed_latency_seconds_bucket{{le="{"+Inf" if end == math.inf else end}"}} {total}')
        lines += [f"embed_latency_seconds_sum {self.seconds}", f"embed_latency_seconds_count {total}"]
        lines += [f"embed_waiting {waiting}", f"process_resident_memory_bytes {resident()}"]
        return "\n".join(lines) + "\n"


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Busy(Exception):
    """The queue is full, or the service stops."""


class Batcher:
    """Runs texts that wait together, up to ``max_batch`` at a time; the first waits at most ``max_wait`` seconds."""

    def __init__(self, encode: Encode, max_batch: int, max_wait: float, max_waiting: int) -> None:
        self.encode, self.max_batch, self.max_wait, self.max_waiting = encode, max_batch, max_wait, max_waiting
        self.metrics = Metrics()
        self.stopping = False
        self._waiting: asyncio.Queue[tuple[str, asyncio.Future[Vector]] | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def warm_up(self) -> None:
        """First calls are slow: threads start, scratch memory is taken. One text and a full batch, short and long."""
        for text in WARM_UP:
            for count in (1, self.max_batch):
                await self._run([text] * count)

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """Raises what the model raises for one of these texts; :class:`Busy` where they have to wait too long."""
        if self.stopping or self._waiting.qsize() + len(texts) > self.max_waiting:
            self.metrics.counts["refused"] += 1
            raise Busy
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        futures: list[asyncio.Future[Vector]] = [loop.create_future() for _ in texts]
        for pair in zip(texts, futures, strict=True):
            self._waiting.put_nowait(pair)
        found = await asyncio.gather(*futures, return_exceptions=True)
        self.metrics.counts["requests"] += 1
        self.metrics.observe(time.perf_counter() - start)
        for each in found:
            if isinstance(each, BaseException):
                self.metrics.counts["failed"] += 1
                raise each
        return [each for each in found if not isinstance(each, BaseException)]

    async def run(self) -> None:
        """Until :meth:`stop`, and until all that was accepted is answered."""
        running = True
        while running:
            first = await self._waiting.get()
            if first is None:
                break
            if self._waiting.qsize() < self.max_batch - 1:
                await asyncio.sleep(self.max_wait)
            batch = [first]
            while len(batch) < self.max_batch and not self._waiting.empty():
                following = self._waiting.get_nowait()
                if following is None:
                    running = False
                    break
                batch.append(following)
            await self._answer(batch)

    async def _answer(self, batch: list[tuple[str, asyncio.Future[Vector]]]) -> None:
        batch = sorted((pair for pair in batch if not pair[1].done()), key=lambda pair: len(pair[0]))
        if not batch:  # all clients have left
            return
        self.metrics.counts["batches"] += 1
        self.metrics.counts["texts"] += len(batch)
        try:
            vectors = await self._run([text for text, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                self._give(batch[0][1], error)
                return
            self.metrics.counts["retried"] += 1
            for pair in batch:
                await self._answer([pair])
            return
        for (_, future), vector in zip(batch, vectors, strict=True):
            finite = all(map(math.isfinite, vector))
            self._give(future, vector if finite else ValueError("the embedding is not finite"))

    @staticmethod
    def _give(future: asyncio.Future[Vector], result: Vector | Exception) -> None:
        if future.done():  # its client has left
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    async def _run(self, texts: list[str]) -> list[Vector]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.encode, texts)

    def stop(self) -> None:
        self.stopping = True
        self._waiting.put_nowait(None)

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()


class Request(BaseModel):
    texts: list[str] = Field(min_length=1, max_length=64)


class Answer(BaseModel):
    embeddings: list[Vector]


def create_app(
    load: Callable[[], Encode], *, max_batch: int = 32, max_wait: float = 0.002, max_waiting: int = 1024
) -> FastAPI:
    """The service; ``load`` is called once, before it is ready."""
    batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        made = Batcher(await asyncio.to_thread(load), max_batch, max_wait, max_waiting)
        await made.warm_up()
        worker = asyncio.create_task(made.run())
        batcher = made
        yield
        made.stop()
        await worker

    app = FastAPI(title="sentence embeddings", lifespan=lifespan)

    @app.post("/embed")
    async def embed(request: Request) -> Answer:
        assert batcher is not None
        try:
            return Answer(embeddings=await batcher.embed(request.texts))
        except Busy:
            raise HTTPException(503, "busy: try again", {"Retry-After": "1"}) from None
        except Exception as error:
            raise HTTPException(422, f"this text cannot be embedded: {type(error).__name__}") from None

    @app.get("/health")
    async def health() -> dict[str, str]:
        if batcher is None or batcher.stopping:
            raise HTTPException(503, "not ready")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        assert batcher is not None
        return Response(batcher.metrics.text(batcher.waiting), media_type="text/plain; version=0.0.4")

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, help="of the model (default: torch's choice)")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-wait", type=float, default=0.002, help="seconds that a text waits for others")
    given = parser.parse_args()

    def load() -> Encode:
        if given.threads:
            import torch

            torch.set_num_threads(given.threads)
        return encoder(given.folder)

    app = create_app(load, max_batch=given.max_batch, max_wait=given.max_wait)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
