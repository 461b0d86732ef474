"""lm-eval measures a packed model: its log-likelihoods are the model's own."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import lowbit
from lowbit.testing.tiny import LLAMA

transformers = pytest.importorskip("transformers", minversion="5.0")
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed", allow_module_level=True)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(LLAMA["vocab_size"])}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w1", pad_token="w2")


@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods(tmp_path: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.2)).eval()
    lowbit.convert(model, lowbit.Packed(bits=4, group_size=32)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    evaluated = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=2, dtype="float32")
    assert len(lowbit.report(evaluated.model).rows) == len(lowbit.report(model).rows)
    pairs = [("w5 w9", " w33 w2 w7"), ("w8", " w40")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, target), (found, _) in zip(pairs, evaluated.loglikelihood(requests), strict=True):
        ids = tokenizer()(context + target, return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        assert found == pytest.approx(float(log_p[-len(target.split()) :].sum()), abs=1e-3)
