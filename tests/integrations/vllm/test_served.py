"""vLLM serves saved folders: the tokens of greedy decoding are those of transformers.

`make test-vllm` makes an environment with vLLM for a CPU, and runs this file there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed: `make test-vllm` tests it", allow_module_level=True)
if "lowbit" not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
    pytest.skip("lowbit was installed before it had an entry point for vllm", allow_module_level=True)
transformers = pytest.importorskip("transformers", minversion="5.0")

PROMPTS = [[1, 2, 3, 4, 5, 6], [9, 8, 7]]
NEW = 8
SIZES = dict(
    vocab_size=120, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
GROUPS = lowbit.Packed(bits=4, group_size=32)
UNLIKE = {
    "*": GROUPS, "*.mlp.*": lowbit.Codebook(bits=3, outliers=0.01), "*.k_proj": lowbit.Packed(bits=3, group_size=16),
    "*.[qv]_proj": lowbit.Packed(bits=4, group_size=32, activations="int8"),
}  # fmt: skip


def model_of(name: str, tie: bool, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "tie_word_embeddings": tie, **sizes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# name -> (the float model, what lowbit.convert is called with, how it is served)
MODES = [{"enforce_eager": True}, {}, {"enforce_eager": True, "tensor_parallel_size": 2}]
FOLDERS: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {
    "llama": (lambda: model_of("Llama", False), dict(spec=lowbit.Packed(bits=4, group_size=32, outliers=0.01)), MODES),
    "tied qwen of unlike layers": (lambda: model_of("Qwen2", True), dict(spec=UNLIKE), MODES),
    "kronecker": (lambda: model_of("Llama", True), dict(spec=lowbit.Kronecker()), MODES[1:2]),
    "float layers among packed ones": (
        lambda: model_of("Qwen3", True, head_dim=32), dict(spec=GROUPS, skip=["*.k_proj", "*.gate_proj"]), MODES[2:],
    ),
    "one layer for q, k and v": (lambda: model_of("Phi3", False), dict(spec=GROUPS), MODES[2:]),
}  # fmt: skip


def serve(folder: Path, options: list[dict[str, Any]], timeout: int = 600) -> list[Any]:
    """The tokens that vLLM gives in each of these ways, from a process of its own."""
    done = run_vllm(folder, options, timeout)
    answers = [line.removeprefix("TOKENS ") for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert done.returncode == 0 and len(answers) == len(options), done.stdout[-4000:] + done.stderr[-8000:]
    return [json.loads(answer) for answer in answers]


def run_vllm(folder: Path, options: list[dict[str, Any]], timeout: int = 600) -> subprocess.CompletedProcess[str]:
    threads = "0|1" if any("tensor_parallel_size" in o for o in options) else "0"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                   "VLLM_CPU_OMP_THREADS_BIND": threads, "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    command = [sys.executable, __file__, str(folder), json.dumps(options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make, arguments, options = FOLDERS[name]
    lowbit.convert(make(), **arguments).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = [model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
                for ids in PROMPTS]  # fmt: skip
    assert len({token for tokens in expected for token in tokens}) > 3
    assert serve(tmp_path, options) == [expected] * len(options)


def main(folder: str, options: list[dict[str, Any]]) -> None:
    from vllm import LLM, SamplingParams

    for option in options:
        model = LLM(folder, max_model_len=48, skip_tokenizer_init=True, max_num_seqs=2,
                    **{"dtype": "float32", **option})  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        found = model.generate([{"prompt_token_ids": ids} for ids in PROMPTS], greedy, use_tqdm=False)
        print("TOKENS", json.dumps([list(each.outputs[0].token_ids) for each in found]), flush=True)
        del model


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
