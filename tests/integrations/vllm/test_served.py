"""vLLM serves saved folders: the tokens of greedy decoding are those of transformers.

`make test-vllm` makes an environment with vLLM for a CPU, and runs this file there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.nn.layer import layers

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
    model = getattr(transformers, NAMES.get(name, f"{name}ForCausalLM"))(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def nested(model: Any) -> Any:
    """With NF4 layers, whose scales are uint8 codes, as bitsandbytes stores them."""
    for layer in layers(lowbit.convert(model, lowbit.Codebook(table="nf4", group_size=32))).values():
        tensors, format = layer.canonical(), replace(layer.format, scales="nested")  # type: ignore[type-var]
        scales = tensors["scales"].float()
        tensors |= {
            "scales": (scales / scales.max() * 255).round().to(torch.uint8), "scale_offset": torch.zeros(1),
            "scale_codebook": torch.linspace(0, 1, 256), "scale_absmax": scales.max().expand(-(-scales.numel() // 256)),
        }  # fmt: skip
        layer.become(format, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return model


def in_other_order(model: Any) -> Any:
    """With columns that are not in the order of x's features, as GPTQ's ``desc_act`` leaves them."""
    for layer in layers(lowbit.convert(model, {"*_proj": GROUPS})).values():
        tensors, format = layer.canonical(), replace(layer.format, act_order=True)  # type: ignore[type-var]
        layer.become(format, {**tensors, "order": torch.randperm(format.in_features).to(torch.int32)})
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
    "an embedding that vLLM makes without a method": (
        lambda: model_of("Gemma2", True, head_dim=32, query_pre_attn_scalar=32), dict(spec=GROUPS), MODES[2:],
    ),
    "packed experts by other names": (
        lambda: model_of("Mixtral", False, num_local_experts=4), dict(spec=GROUPS), MODES[1:],
    ),
    "one layer for q, k and v": (lambda: model_of("Phi3", False), dict(spec=GROUPS), MODES[2:]),
}  # fmt: skip


def run_vllm(runs: list[tuple[str, dict[str, Any]]], **environment: str) -> subprocess.CompletedProcess[str]:
    """:func:`main` in a process of its own."""
    threads = "0|1" if any("tensor_parallel_size" in options for _, options in runs) else "0"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                   "VLLM_CPU_OMP_THREADS_BIND": threads, "VLLM_NO_USAGE_STATS": "1", **environment}  # fmt: skip
    command = [sys.executable, __file__, json.dumps(runs)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=runs[0][0])


def answers(done: subprocess.CompletedProcess[str]) -> list[Any]:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix("FOUND ")) for line in lines if line.startswith("FOUND ")]


def greedy(folder: Path) -> list[list[int]]:
    """The tokens of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = [model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
              for ids in PROMPTS]  # fmt: skip
    assert len({token for each in tokens for token in each}) > 1
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make, arguments, options = FOLDERS[name]
    lowbit.convert(make(), **arguments).save_pretrained(tmp_path)
    done = run_vllm([(str(tmp_path), option) for option in options])
    assert answers(done) == [greedy(tmp_path)] * len(options)


MOE = dict(num_experts=4, num_experts_per_tok=2)
EAGER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a head of its own, in another form": (
        "Llama", dict(tie=False),
        dict(spec={"*": GROUPS, "*embed_tokens": lowbit.Packed(bits=8), "lm_head": lowbit.Codebook(bits=4)}),
    ),
    "a float head": ("Llama", dict(tie=True), dict(spec=GROUPS, skip=["lm_head"])),
    "a float embedding": ("Llama", dict(tie=True), dict(spec=GROUPS, skip=["*embed_tokens"])),
    "static activations": (
        "Llama", dict(tie=False),
        dict(spec=lowbit.Packed(bits=4, group_size=32, activations="int8_static"),
             calibration=[torch.arange(1, 25).view(2, 12)]),
    ),
    "NF4": ("Llama", {}, dict(spec=lowbit.Codebook(table="nf4", group_size=32))),
    "a table for all rows": ("Qwen3", dict(head_dim=32), dict(spec=lowbit.Codebook(bits=4, granularity="tensor"))),
    "an embedding that vLLM makes without a method": (
        "Gemma2", dict(tie=True, head_dim=32, query_pre_attn_scalar=32), dict(spec=lowbit.Packed(bits=8)),
    ),
    "parts that vLLM does not list": ("StableLm", {}, dict(spec=GROUPS)),
    "a head with a bias": ("Phi", {}, dict(spec=GROUPS)),
    "float experts": ("Mixtral", dict(num_local_experts=4), dict(spec=GROUPS, skip=["*.experts*"])),
    "packed experts": (
        "Qwen3Moe", dict(head_dim=32, **MOE, norm_topk_prob=True, moe_intermediate_size=64),
        dict(spec=lowbit.Packed(bits=4, group_size=32, activations="int8")),
    ),
    "packed experts beside a shared one": (
        "Qwen2Moe", dict(**MOE, moe_intermediate_size=64, shared_expert_intermediate_size=64),
        dict(spec={"*": GROUPS, "*.experts*": lowbit.Codebook(bits=4, outliers=0.01)}, skip=["*.shared_expert_gate"]),
    ),
    "experts by other names in the files": (
        "GraniteMoeShared", dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64),
        dict(spec=GROUPS),
    ),
    "experts in some blocks": (
        "Dots1", dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64,
                      n_group=1, topk_group=1, head_dim=32, first_k_dense_replace=1), dict(spec=GROUPS),
    ),
    "experts of Kronecker products": ("Olmoe", MOE, dict(spec={"*.experts*": lowbit.Kronecker()})),
    "Conv1D": ("GPT2", {}, dict(spec=GROUPS, skip=["*.wpe"])),
    "transformers' own code": ("GPTNeoX", dict(num_key_value_heads=4), dict(spec=GROUPS)),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts of another kind": (
        "GptOss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32, layer_types=["full_attention"] * 2),
        "layers.0.mlp.experts.gate_up_proj: vLLM cannot run packed experts with the activation swigluoai",
    ),
    "rows in another order": ("Bloom", {}, "query_key_value: vLLM puts the rows of this layer of a bloom into another"),
    "position embeddings": ("GPT2", {}, "no module or parameter named 'wpe.packed'"),
}
NAMES = {"GPT2": "GPT2LMHeadModel"}


@pytest.mark.slow
def test_formats_and_models_in_one_process(tmp_path: Path) -> None:
    """Eager, which is soonest done: a folder each."""
    expected: dict[str, Any] = {}
    for name, (model, sizes, arguments) in EAGER.items():
        made = model_of(model, **{"tie": False, **sizes})
        lowbit.convert(made, **arguments).save_pretrained(tmp_path / name)
        expected[name] = greedy(tmp_path / name)
    for name, made in (("scales that are quantized again", nested), ("act-order", in_other_order)):
        made(model_of("Llama", tie=False)).save_pretrained(tmp_path / name)
        expected[name] = greedy(tmp_path / name)
    for name, (model, sizes, _) in REFUSED.items():
        lowbit.convert(model_of(model, tie=False, **sizes), GROUPS).save_pretrained(tmp_path / name)
    runs = [(str(tmp_path / name), {"enforce_eager": True}) for name in (*expected, *REFUSED)]
    done = run_vllm(runs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    found = dict(zip((*expected, *REFUSED), answers(done), strict=True))
    assert {name: found[name] for name in expected} == expected
    for name, (_, _, words) in REFUSED.items():
        assert words in str(found[name]), f"{name}: {found[name]}"


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    moe = dict(tie=False, **MOE, head_dim=32, moe_intermediate_size=64)
    refused: dict[str, tuple[Any, str]] = {
        "kronecker": (lowbit.convert(model_of("Llama", False), lowbit.Kronecker()), r"Kronecker.* cannot be cut"),
        "nested": (nested(model_of("Llama", False)), r"\(nested\).* cannot be cut into shares"),
        "act-order": (in_other_order(model_of("Llama", False)), r"o_proj: .*act-order its columns are not in"),
        "experts": (lowbit.convert(model_of("Qwen3Moe", **moe), {"*.experts*": lowbit.Kronecker()}),
                    r"vLLM cannot run packed experts with tensor_parallel_size=2: of gate_up_proj, Kronecker"),
    }  # fmt: skip
    for name, (model, words) in refused.items():
        model.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors"):
            file.write_bytes(b"not read")
        done = run_vllm([(str(tmp_path / name), {"enforce_eager": True, "tensor_parallel_size": 2})])
        said = done.stdout + done.stderr
        assert done.returncode != 0 and re.search(rf"ValueError: .*{words}", said), f"{name}: {said[-6000:]}"


BFLOAT16: dict[str, tuple[str, dict[str, Any], Any, list[dict[str, Any]]]] = {
    "llama": ("Llama", dict(tie=False), lowbit.Packed(bits=4, group_size=32, outliers=0.01), MODES),
    "tied qwen of unlike layers": ("Qwen2", dict(tie=True), UNLIKE, MODES[:1]),
    "packed experts": ("Qwen3Moe", dict(tie=False, head_dim=32, **MOE, moe_intermediate_size=64), GROUPS, MODES[:1]),
}  # fmt: skip


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path) -> None:
    """Log-probabilities of every step; greedy tokens alone may differ where two are as likely."""
    runs = []
    for name, (model, sizes, spec, options) in BFLOAT16.items():
        lowbit.convert(model_of(model, **sizes).to(torch.bfloat16), spec).save_pretrained(tmp_path / name)
        runs += [(str(tmp_path / name), {"dtype": "bfloat16", "max_logprobs": -1, **option}) for option in options]
    for (folder, option), found in zip(runs, answers(run_vllm(runs)), strict=True):
        require_near(folder, found, f"{folder}, {option}")


@pytest.mark.slow
def test_exported_folders_need_no_plugin(tmp_path: Path) -> None:
    runs = []
    for name, symmetric in (("symmetric", True), ("with zeros", False)):
        spec = lowbit.Packed(bits=4, group_size=32, symmetric=symmetric, zeros=None if symmetric else "int")
        model = lowbit.convert(model_of("Llama", False), {"*_proj": spec})
        model.save_pretrained(tmp_path / name)
        lowbit.export(model, str(tmp_path / name / "exported"), format="compressed-tensors")
        runs.append((str(tmp_path / name / "exported"), {"dtype": "bfloat16", "max_logprobs": -1, **MODES[0]}))
    done = run_vllm(runs, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")
    for (folder, _), found in zip(runs, answers(done), strict=True):
        require_near(str(Path(folder).parent), found, folder, 1.5)  # vLLM's own kernels


def require_near(folder: str, found: Any, what: str, factor: float = 1.25) -> None:
    """``found``: tokens and log-probabilities in bfloat16, whose error is at most so many times transformers'."""
    tokens, made = found
    exact, usual = (logprobs(folder, tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    error, allowed = (torch.tensor(made) - exact).norm(), (usual - exact).norm()
    assert 0 < error <= factor * allowed, f"{what}: {error:.3}, of transformers {allowed:.3}"


def logprobs(folder: str, tokens: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """Of transformers, after each of the prompts and of these tokens but the last, ``[prompts, NEW, vocabulary]``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        made = [model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].float()
                for ids, new in zip(PROMPTS, tokens, strict=True)]  # fmt: skip
    return torch.stack(made).log_softmax(-1)


@pytest.mark.slow
def test_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size",
        "num_hidden_layers", "num_attention_heads", "max_position_embeddings")}, initializer_range=0.2)  # fmt: skip
    lowbit.convert(transformers.BertModel(config).eval(), GROUPS).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(115))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))  # vLLM asks for a tokenizer
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).last_hidden_state[0, 0] for ids in PROMPTS]
    runs = [(str(tmp_path), {"runner": "pooling", "enforce_eager": True})]
    (found,) = answers(run_vllm(runs, VLLM_ENABLE_V1_MULTIPROCESSING="0"))
    assert not isinstance(found, str), found
    expected_tensor = torch.nn.functional.normalize(torch.stack(expected), dim=-1)
    torch.testing.assert_close(torch.tensor(found), expected_tensor, rtol=1e-4, atol=1e-5)


def main(runs: list[tuple[str, dict[str, Any]]]) -> None:
    """For each folder a line with what vLLM gives, or with its error."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for folder, option in runs:
        try:
            usual = {"dtype": "float32", "skip_tokenizer_init": option.get("runner") != "pooling"}
            model = LLM(folder, max_model_len=48, max_num_seqs=2, **{**usual, **option})
            prompts: Any = [{"prompt_token_ids": ids} for ids in PROMPTS]
            wanted = SIZES["vocab_size"] if "max_logprobs" in option else None
            how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=wanted)
            if option.get("runner") == "pooling":
                found: Any = [each.outputs.embedding for each in model.embed(prompts, use_tqdm=False)]
            else:
                made = [each.outputs[0] for each in model.generate(prompts, how, use_tqdm=False)]
                found = [list(each.token_ids) for each in made]
                if wanted:
                    steps = [each.logprobs for each in made]
                    found = found, [[[step[i].logprob for i in sorted(step)] for step in each] for each in steps]
            del model
        except Exception as error:
            if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
                raise
            found = str(error)
        print("\nFOUND", json.dumps(found), flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
