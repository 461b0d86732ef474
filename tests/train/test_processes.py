"""DistributedDataParallel over two processes of gloo: the gradients and steps of one process with the whole batch."""

import socket
import subprocess
import sys
from datetime import timedelta

import torch
from torch import nn

import lowbit
from lowbit import train

QAT = lowbit.Packed(bits=4, granularity="row", symmetric=True, activations="int8")
PREPARED = {
    "fake quant": lambda model: train.prepare(model, QAT, train.Dynamic()),
    "centroids": lambda model: train.prepare(model, lowbit.Codebook(bits=3, outliers=0.02)),
    "factors": lambda model: train.prepare(model, lowbit.Kronecker()),
}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 50))


def steps(model, ids):
    """The gradients of the first of two steps."""
    optimizer, first = torch.optim.SGD(model.parameters(), 0.1), None
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        first = first or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return first


def run(rank: int, port: str) -> None:
    """One of the two processes: raises what it finds wrong."""
    address, wait = f"tcp://127.0.0.1:{port}", timedelta(seconds=300)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2, timeout=wait)
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    try:
        for name, prepare in PREPARED.items():
            alone, model = prepare(plain()), prepare(plain())
            if rank:  # DDP sends what the first process has
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(2)
            shared = nn.parallel.DistributedDataParallel(model)
            expected, found = steps(alone, ids), steps(shared, ids[2 * rank : 2 * rank + 2])
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
            again = prepare(plain())
            again.load_state_dict(shared.module.state_dict())
            with torch.no_grad():
                assert torch.equal(again(ids), model(ids)), name
                torch.testing.assert_close(model(ids), alone(ids), rtol=1e-3, atol=1e-4)
                assert torch.equal(lowbit.convert(again)(ids), model(ids)), name
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    other = subprocess.Popen([sys.executable, __file__, port], stderr=subprocess.PIPE, text=True)
    try:
        run(0, port)
        errors = other.communicate(timeout=300)[1]
    finally:
        other.kill()
    assert other.returncode == 0, errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(1, sys.argv[1])
