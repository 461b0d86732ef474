"""Rows of two processes (gloo, on a CPU): they are started once, for all of these rows.

As a script: runs the rows named, and prints a JSON object name -> cells.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import lowbit
from benchmarks.gpu.parts import ROOT
from lowbit.testing.processes import outside_interpreter

from . import architectures, checks
from .checks import Found, assert_close, assert_equal, run
from .libraries import INPUTS, gradients, llama, step

ROWS: dict[str, Callable[[Found, Path], None]] = {}
RANKS = 2


def row(name: str) -> Callable[[Callable[[Found, Path], None]], None]:
    def add(examine: Callable[[Found, Path], None]) -> None:
        ROWS[name] = examine

    return add


@row("DDP, two processes")
def _ddp(found: Found, folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    def made(*names: str) -> Any:
        model = lowbit.convert(llama(packed=False), lowbit.Packed(bits=4, group_size=16, outliers=0.01))
        lowbit.make_trainable(model, *names) if names else None
        return model

    def training() -> None:
        model = DistributedDataParallel(made("scales", "outlier_values"))
        expected = gradients(made("scales", "outlier_values"))
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name.removeprefix("module.")])
        model.zero_grad()
        step(model)

    def forward() -> None:
        assert_equal(run(DistributedDataParallel(made()), INPUTS), run(made(), INPUTS))

    found.check("forward", forward)
    found.check("training", training)


@row("FSDP2 `fully_shard`, two processes")
def _fsdp2(found: Found, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def made(trained: bool = False) -> Any:
        model = llama()
        if trained:
            lowbit.make_trainable(model, "scales")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def training() -> None:
        reference = llama()
        lowbit.make_trainable(reference, "scales")
        expected = gradients(reference)
        model = made(trained=True)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad.full_tensor(), expected[name])
        model.zero_grad()
        step(model)

    def reload() -> None:
        model = made()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if torch.distributed.get_rank() == 0:
            other = llama()
            other.load_state_dict(state)
            assert_equal(run(other, INPUTS), run(llama(), INPUTS))

    found.check("forward", lambda: assert_close(run(made(), INPUTS), run(llama(), INPUTS)))
    found.check("reload", reload)
    found.check("training", training)


@row('transformers `tp_plan="auto"`, two processes')
def _tensor_parallel(found: Found, folder: Path) -> None:
    import transformers

    whole = _wide()

    def divided() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()

    def task() -> None:
        ours, theirs = (architectures.generated(model, INPUTS) for model in (divided(), whole))
        assert torch.equal(ours, theirs), "other tokens"

    found.check("forward", lambda: assert_close(run(divided(), INPUTS), run(whole, INPUTS)))
    found.check("task", task)
    found.check("reload", lambda: divided().save_pretrained(folder.parent / "again"))
    found.check("training", lambda: step(divided()))


def _wide() -> Any:
    """A Llama whose halves are whole chunks of 32 columns."""
    row = architectures.ROWS["Llama, tied head"]
    sizes = {**row.config, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return lowbit.convert(architectures.build(replace(row, config=sizes)), architectures.PACKED)


# -------------------------------------------------------------------------------------------- starting them


def examine(name: str) -> Found:
    """One row: what rank 0 found, and what another one found that is worse."""
    return Found(dict(_cells()[name]))


@cache
def _cells() -> dict[str, dict[str, str]]:
    done = outside_interpreter("-m", "benchmarks.compatibility.processes", *ROWS, root=ROOT)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode()[-3000:])
    ranks: list[dict[str, dict[str, str]]] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    found = ranks[0]
    for other in ranks[1:]:
        for name, cells in other.items():
            worse = {column: cell for column, cell in cells.items() if cell not in (checks.WORKS, checks.NOTHING)}
            found[name].update(worse)
    return found


def _rank(rank: int, names: list[str], port: int, folder: Path) -> dict[str, dict[str, str]]:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")
    result = {}
    for name in names:
        found = Found(dict.fromkeys(checks.COLUMNS, checks.NOTHING))
        with checks.quiet():
            ROWS[name](found, folder)
        for error in found.errors:
            import traceback

            traceback.print_exception(error)
        result[name] = found.cells
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return result


def main(names: list[str]) -> None:
    """Fork the second process when everything is imported and nothing has run."""
    import transformers
    import transformers.models.llama.modeling_llama

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        _wide().save_pretrained(Path(folder) / "model")
        second = Path(folder) / "second.json"
        child = os.fork()
        if child == 0:
            second.write_text(json.dumps(_rank(1, names, port, Path(folder) / "model")))
            os._exit(0)
        found = _rank(0, names, port, Path(folder) / "model")
        os.waitpid(child, 0)
        print(json.dumps([found, json.loads(second.read_text())]))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ROWS))
