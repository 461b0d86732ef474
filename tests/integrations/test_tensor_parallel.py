"""transformers' tensor parallelism over two processes of gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.nn.layer import layers

transformers = pytest.importorskip("transformers", minversion="5.21")

SPECS = {
    "packed": lowbit.Packed(bits=4, group_size=32),
    "codebook": lowbit.Codebook(bits=3, outliers=0.02),
    "kron": lowbit.Kronecker(),
}


def run(rank: int, folder: str, port: int) -> None:
    """In a process of its own: raises what it finds wrong."""
    import transformers

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    load, ids = transformers.AutoModelForCausalLM.from_pretrained, torch.arange(1, 17)[None]
    try:
        for name in ("packed", "codebook"):
            whole, divided = load(f"{folder}/{name}").eval(), load(f"{folder}/{name}", tp_plan="auto").eval()
            with torch.no_grad():
                torch.testing.assert_close(divided(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
            parts = layers(divided.model.layers)
            assert len(parts) == 14
            for layer_name, layer in parts.items():
                assert 2 * layer.packed.numel() == layers(whole.model.layers)[layer_name].packed.numel()
            tokens = divided.generate(ids, max_new_tokens=3, do_sample=False)
            assert torch.equal(tokens, whole.generate(ids, max_new_tokens=3, do_sample=False))
            with pytest.raises(ValueError, match="q_proj is this process's share of a layer"):
                divided.save_pretrained(f"{folder}/again")
        with pytest.raises(ValueError, match="q_proj.*cannot be cut"):
            load(f"{folder}/kron", tp_plan="auto")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.turns(2)
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=120, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=name == "packed",
            )
        ).eval()  # fmt: skip
        for key, parameter in model.named_parameters():
            if "bias" in key:
                torch.nn.init.normal_(parameter)
        lowbit.convert(model, spec).save_pretrained(tmp_path / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(tmp_path), str(port)]
    processes = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


if __name__ == "__main__":
    run(int(sys.argv[3]), sys.argv[1], int(sys.argv[2]))
