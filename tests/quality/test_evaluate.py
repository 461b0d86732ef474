"""``evaluate``: every figure against the formula in float64, on models whose outputs are tables."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.quality.evaluate import percentile
from lowbit.quality.statistics import rank_correlation, ranks

V = 7


class Table(nn.Module):
    """Logits ``[B, T, V]`` that depend on the token alone."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        values = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 2
        self.table = nn.Parameter(values.to(dtype))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.table[input_ids]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(token, the one after it) of every pair that counts."""
    found = []
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    labels = batch.get("labels", batch["input_ids"])
    for row, keep, label in zip(batch["input_ids"].tolist(), mask.tolist(), labels.tolist(), strict=True):
        found += [(row[t], label[t + 1]) for t in range(len(row) - 1)
                  if keep[t] and keep[t + 1] and label[t + 1] != -100]  # fmt: skip
    return found


def test_language_against_float64():
    model, other = Table(0), Table(1)
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    data = [{"input_ids": ids(2, 5), "attention_mask": left}, {"input_ids": ids(3, 4, seed=1)},
            {"input_ids": ids(1, 4, seed=2), "labels": torch.tensor([[3, -100, 2, 5]])}]  # fmt: skip
    found = lowbit.evaluate(model, data, reference=other)
    pairs = [pair for batch in data for pair in tokens_of(batch)]
    p, q = (each.table.detach().double().log_softmax(-1) for each in (other, model))
    kl = torch.stack([(p[a].exp() * (p[a] - q[a])).sum() for a, _ in pairs])
    assert found.task == "language" and found.count == len(pairs) == 5 + 9 + 2
    assert found.perplexity == pytest.approx(math.exp(-sum(float(q[a, b]) for a, b in pairs) / len(pairs)), rel=1e-6)
    expected = math.exp(-sum(float(p[a, b]) for a, b in pairs) / len(pairs))
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-6)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_99 == pytest.approx(float(kl.max()), rel=1e-5)
    agreed = sum(int(p[a].argmax() == q[a].argmax()) for a, _ in pairs)
    assert found.agreement == pytest.approx(agreed / len(pairs))
    assert found.bytes == V * V * 4


def test_a_model_is_0_from_itself_and_stays_in_training():
    model = Table(0).train()
    found = lowbit.evaluate(model, [ids(2, 6)], reference=model)
    assert found.kl == found.kl_99 == 0 and found.agreement == 1
    assert found.perplexity == found.reference_perplexity and model.training


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_a_batch_may_be_a_tensor_a_tuple_or_a_dict(form):
    batch = {"tensor": ids(2, 5), "tuple": (ids(2, 5),), "dict": {"input_ids": ids(2, 5)}}[form]
    assert lowbit.evaluate(Table(0), [batch]).perplexity == lowbit.evaluate(Table(0), [ids(2, 5)]).perplexity


def test_logits_in_parts_give_the_same(monkeypatch):
    whole = lowbit.evaluate(Table(0), [ids(9, 11)], reference=Table(1)).values
    monkeypatch.setattr("lowbit.quality.evaluate._ELEMENTS", 3 * V)
    assert lowbit.evaluate(Table(0), [ids(9, 11)], reference=Table(1)).values == pytest.approx(whole, rel=1e-6)


def test_certain_models_have_no_nan():
    """Where a probability is 0, it adds nothing to the divergence; where only the model's is, it adds infinity."""
    certain = Table(0)
    certain.table.data.fill_(-math.inf).fill_diagonal_(0)
    same = lowbit.evaluate(certain, [torch.tensor([[3, 3, 3]])], reference=certain)
    assert same.kl == 0 and same.perplexity == 1
    apart = lowbit.evaluate(certain, [ids(2, 5)], reference=Table(1))
    assert apart.kl == apart.perplexity == math.inf
    assert json.loads(apart.to_json())["kl"] is None
    lost = Table(2)
    lost.table.data[0, 0] = math.nan
    found = lowbit.evaluate(lost, [torch.tensor([[0, 1, 2]])], reference=Table(1))
    assert math.isnan(found.kl) and math.isnan(found.kl_99)


class Classes(nn.Module):
    def __init__(self, seed: int, classes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=x @ self.weight.t())


def test_classification_against_float64():
    model, other = Classes(0), Classes(1)
    x, labels = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, -100])
    data = [{"x": x[part], "labels": labels[part]} for part in (slice(5), slice(5, 8))]
    found = lowbit.evaluate(model, data, reference=other)
    q, p = ((x.double() @ each.weight.detach().double().t()).log_softmax(-1) for each in (model, other))
    known = labels >= 0
    assert found.task == "classification" and found.count == 8
    assert found.accuracy == pytest.approx(float((q.argmax(-1) == labels)[known].double().mean()))
    assert found.reference_accuracy == pytest.approx(float((p.argmax(-1) == labels)[known].double().mean()))
    assert found.loss == pytest.approx(float(-q[known].gather(1, labels[known, None]).mean()), rel=1e-5)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))
    unlabelled = lowbit.evaluate(model, [{"x": x}], reference=other)
    assert set(unlabelled.values) == {"kl", "kl_99", "agreement"}


def test_regression():
    from scipy.stats import spearmanr

    model, other = Classes(0, 1), Classes(1, 1)
    x, grades = torch.randn(9, 4), torch.tensor([0.0, 1, 1, 2, 3, 3, 3, 4, 5])
    found = lowbit.evaluate(model, [{"x": x, "labels": grades}], reference=other)
    mine, theirs = ((x @ each.weight.detach().t())[:, 0] for each in (model, other))
    assert found.task == "regression"
    assert found.mean_squared_error == pytest.approx(float((mine - grades).square().mean()), rel=1e-5)
    assert found.label_correlation == pytest.approx(spearmanr(mine, grades).statistic)
    assert found.rank_correlation == pytest.approx(spearmanr(mine, theirs).statistic)


class Encoder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, 5, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"last_hidden_state": self.table[input_ids] + torch.linspace(0, 1, input_ids.shape[1])[:, None]}


def test_embeddings_against_float64():
    from scipy.stats import spearmanr

    model, other = Encoder(0), Encoder(1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    data = [{"input_ids": ids(3, 4), "attention_mask": mask}, {"input_ids": ids(2, 3, seed=1)}]
    found = lowbit.evaluate(model, data, reference=other)
    a, b = [], []
    for batch in data:
        for row, keep in zip(batch["input_ids"], batch.get("attention_mask", torch.ones(2, 3)).bool(), strict=True):
            for each, to in ((model, a), (other, b)):
                place = torch.linspace(0, 1, len(row))[:, None]
                mean = (each.table.detach()[row] + place).double()[keep].mean(0)
                to.append(mean / mean.norm())
    a, b = torch.stack(a), torch.stack(b)
    cosines = (a * b).sum(-1)
    assert found.task == "embedding" and found.count == 5
    assert found.cosine == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert found.cosine_1 == pytest.approx(float(cosines.min()), abs=1e-6)
    upper = torch.triu_indices(5, 5, 1).unbind()
    assert found.rank_correlation == pytest.approx(spearmanr((a @ a.t())[upper], (b @ b.t())[upper]).statistic)
    with pytest.raises(ValueError, match="nothing to measure: logits, for which there are labels, or a reference"):
        lowbit.evaluate(model, data)


def test_ranks_of_equal_values():
    from scipy.stats import spearmanr

    x, y = torch.tensor([1.0, 1, 2, 3, 3, 3, 0]), torch.tensor([5.0, 4, 4, 4, 1, 2, 9])
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert math.isnan(rank_correlation(x, torch.ones(7)))
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert rank_correlation(x, x.exp()) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)


def test_the_first_percentile_of_many_cosines():
    model, other, batch = Encoder(0), Encoder(1), ids(250, 3)
    found = lowbit.evaluate(model, [batch], reference=other)
    means = [each(batch)["last_hidden_state"].detach().double().mean(1) for each in (model, other)]
    cosines = torch.nn.functional.cosine_similarity(*means).sort().values
    assert found.cosine_1 == pytest.approx(float(cosines[2]), abs=1e-6)
    assert float(cosines[24] - cosines[2]) > 1e-2  # that of 10 % is another


def test_percentile_is_one_of_the_values():
    values = torch.arange(1, 201).double()[torch.randperm(200)]
    assert percentile(values, 0.99) == 198 and percentile(values, 0.01) == 2
    assert percentile(values[:1], 0.99) == values[0]


def test_transformers_models_show_their_task():
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny["intermediate_size"] = 8
    bert = transformers.BertConfig(**tiny)
    batch = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    masked = torch.full((2, 6), -100)
    masked[:, 2] = 4
    masking = transformers.BertForMaskedLM(bert).eval()
    found = lowbit.evaluate(masking, [{**batch, "labels": masked}])
    logits = masking(**batch).logits[:, 2].double()
    assert found.task == "masked" and found.count == 2
    assert math.log(found.perplexity) == pytest.approx(float(-logits.detach().log_softmax(-1)[:, 4].mean()), rel=1e-5)
    encoder = transformers.BertModel(bert)
    assert lowbit.evaluate(encoder, [batch], reference=encoder).cosine == pytest.approx(1)
    labels = {"labels": torch.tensor([0, 1])}
    classifier = transformers.BertForSequenceClassification(bert)
    assert lowbit.evaluate(classifier, [{**batch, **labels}]).task == "classification"
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny))
    assert lowbit.evaluate(llama, [batch]).task == "language"
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
                              decoder_start_token_id=0))  # fmt: skip
    found = lowbit.evaluate(t5, [{**batch, "labels": ids(2, 3)}])
    assert found.task == "masked" and found.count == 6


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("folder", [ids(1, 3)]), TypeError, "model must be an nn.Module"),
        ((Table(0), ids(1, 3)), TypeError, "data must be a list of batches: got one batch, Tensor"),
        ((Table(0), ["a story"]), TypeError, "data must hold batches for the model, not texts: batch 0"),
        ((Table(0), []), ValueError, "data must hold at least one batch"),
        ((Table(0), [ids(3, 1)]), ValueError, "no token to predict"),
        ((Classes(0), [torch.randn(2, 4)]), ValueError, "nothing to measure: labels or a reference is required"),
    ],
)
def test_what_cannot_be_measured_is_an_error(arguments, error, text):
    with pytest.raises(error, match=text):
        lowbit.evaluate(*arguments)


def test_wrong_tasks_and_references_are_errors():
    with pytest.raises(ValueError, match="task must be one of language, .*: got 'perplexity'"):
        lowbit.evaluate(Table(0), [ids(1, 3)], task="perplexity")
    with pytest.raises(TypeError, match="model must be an nn.Module: got str"):
        lowbit.evaluate(Table(0), [ids(1, 3)], reference="float")
    with pytest.raises(ValueError, match=r"logits of one shape: batch 0 gives \[2, 3\] and \[2, 4\]"):
        lowbit.evaluate(Classes(0), [torch.randn(2, 4)], reference=Classes(1, 4))
    with pytest.raises(ValueError, match="task 'language' needs logits"):
        lowbit.evaluate(Classes(0), [torch.randn(2, 4)], task="language")
    with pytest.raises(AttributeError, match="task 'language' has no 'accuracy': it has perplexity"):
        _ = lowbit.evaluate(Table(0), [ids(1, 3)]).accuracy


def test_a_packed_model_beside_its_float_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 32), nn.Linear(32, V))
    reference = nn.Sequential(nn.Embedding(V, 32), nn.Linear(32, V))
    reference.load_state_dict(model.state_dict())
    packed = lowbit.convert(model, lowbit.Packed(bits=4))
    found = lowbit.evaluate(packed, [ids(4, 9)], reference=reference)
    assert 0 < found.kl < 0.1 and found.bytes == lowbit.report(packed).total_after
    text = str(found)
    assert "KL to the reference" in text and f"{found.perplexity:.4f}" in text
    assert json.loads(found.to_json())["kl"] == found.kl
