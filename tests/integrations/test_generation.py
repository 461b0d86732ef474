"""Ways of generating in transformers: each gives the tokens of plain greedy ``generate`` with packed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowbit
from lowbit.testing.tiny import LLAMA

transformers = pytest.importorskip("transformers", minversion="5.20")

IDS = torch.tensor([[5, 9, 33, 2]])
NEW = 6


def make(layers: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    ids = dict(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": layers}, **ids, initializer_range=0.2)
    spec = {"*": lowbit.Packed(bits=4, group_size=32), "*.mlp.*": lowbit.Codebook(bits=3)}
    return lowbit.convert(transformers.LlamaForCausalLM(config).eval(), spec)


@pytest.fixture(scope="module")
def model() -> Any:
    return make(2)


def tokens(model: Any, **options: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=NEW, do_sample=False, **options)[0, IDS.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore")
def test_ways_of_generating(model: Any) -> None:
    expected = tokens(model)
    assert len(set(expected)) > 3
    assert tokens(model, cache_implementation="static") == expected
    assert tokens(model, assistant_model=make(1, seed=1)) == expected
    assert tokens(model, assistant_model=make(2)) == expected  # every token of the draft is taken
    assert tokens(model, prompt_lookup_num_tokens=2) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.turns(2)
def test_the_compiled_step() -> None:
    """As docs/serving.md recommends it for a CPU."""
    model = make(1)
    options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiling = transformers.CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)
    compiling._compile_all_devices = True
    assert tokens(model, cache_implementation="static", compile_config=compiling) == tokens(model)
    assert hasattr(model, "_compiled_call")  # it was not skipped


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching(model: Any) -> None:
    pytest.importorskip("transformers", minversion="5.24")  # names in its configuration
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = transformers.ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=32)
    prompts = [IDS[0].tolist(), [7, 8], [1]]
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=cache, warmup=False)
    found = sorted(found.items(), key=lambda item: int(item[0].rpartition("_")[2]))
    alone = [model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
             for ids in prompts]  # fmt: skip
    assert [each.generated_tokens for _, each in found] == alone
