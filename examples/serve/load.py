"""Measures the service: a float folder beside a packed one, on this machine only.

    python examples/serve/load.py FLOAT PACKED --clients 1 8 32 --seconds 10 --threads 1
    python examples/serve/load.py PACKED --clients 8 --seconds 600     # memory over time

Starts ``app.py`` for each folder in turn, on a free port of 127.0.0.1. Clients are threads here, each of which sends
its next text when the last is answered; one request in ``--poison`` is one that must be refused. Prints the median and
the 99th percentile of the latency, sentences per second, and the resident memory at each tenth of the time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

MAX_CLIENTS, MAX_SECONDS = 64, 3600
WORDS = ["a", "small", "model", "few", "words", "that", "quick", "make", "of", "the", "service", "answer", "long"]
POISON = {"texts": ["x" * 10] * 100}  # more texts than a request may have


class Server:
    """``app.py`` in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(Path(__file__).with_name("app.py")), str(folder), "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([*command, "--threads", str(threads)], env=environment)
        start = time.monotonic()
        while True:
            if self.process.poll() is not None or time.monotonic() - start > 300:
                raise RuntimeError(f"the service for {folder} did not become ready")
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def resident(self) -> int:
        found = re.search(r"^process_resident_memory_bytes (\d+)", self.get("/metrics")[1], re.MULTILINE)
        assert found is not None
        return int(found[1])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60) not in (0, -signal.SIGTERM):
            raise RuntimeError(f"the service ended with status {self.process.returncode}")


def client(port: int, until: float, seed: int, poison: int, latencies: list[float], errors: list[str]) -> None:
    """Sends texts until the time is over; what is not as it should be goes into ``errors``."""
    random_ = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.monotonic() < until:
        bad = poison > 0 and random_.randrange(poison) == 0
        texts = [" ".join(random_.choices(WORDS, k=random_.randint(4, 40)))]
        start = time.perf_counter()
        body = json.dumps(POISON if bad else {"texts": texts})
        connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != (422 if bad else 200):
            errors.append(f"{answer.status}: {content[:200]!r}")
        elif not bad:
            latencies.append(time.perf_counter() - start)
            if len(json.loads(content)["embeddings"]) != 1:
                errors.append("another number of embeddings")
    connection.close()


def measure(server: Server, clients: int, seconds: float, poison: int) -> tuple[list[float], list[int]]:
    """(latencies of answered texts, resident bytes at each tenth of the time)."""
    latencies: list[float] = []
    errors: list[str] = []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client, args=(server.port, until, i, poison, latencies, errors), daemon=True)
               for i in range(clients)]  # fmt: skip
    for thread in threads:
        thread.start()
    memory = []
    for i in range(1, 11):
        time.sleep(max(0.0, until - seconds + i * seconds / 10 - time.monotonic()))
        memory.append(server.resident())
    for thread in threads:
        thread.join(60)
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first with {errors[0]}")
    return latencies, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--poison", type=int, default=50, help="one request in so many cannot be answered; 0: none")
    given = parser.parse_args()
    if max(given.clients) > MAX_CLIENTS or not 0 < given.seconds <= MAX_SECONDS:
        parser.error(f"at most {MAX_CLIENTS} clients and {MAX_SECONDS} seconds")
    print("| folder | clients | sentences/s | p50, ms | p99, ms | resident, MB |\n|---|---|---|---|---|---|")
    for folder in given.folders:
        server = Server(folder, given.threads)
        try:
            measure(server, max(given.clients), min(2.0, given.seconds), 0)  # not counted
            for clients in given.clients:
                latencies, memory = measure(server, clients, given.seconds, given.poison)
                p50 = 1000 * statistics.median(latencies)
                p99 = 1000 * sorted(latencies)[len(latencies) * 99 // 100]
                used = " ".join(f"{bytes / 1e6:.0f}" for bytes in memory)
                rate = len(latencies) / given.seconds
                print(f"| {folder.name} | {clients} | {rate:.1f} | {p50:.1f} | {p99:.1f} | {used} |", flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
