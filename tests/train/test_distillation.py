"""Losses against their formulas in float64, by loops; hooks, states and mistakes."""

import copy
import math

import pytest
import torch

import lowbit
from lowbit import train
from lowbit.testing.tiny import LLAMA, T5

transformers = pytest.importorskip("transformers")

SPEC = lowbit.Packed(bits=4, granularity="row", symmetric=True, activations="int8")


def llama(seed=0, **others):
    torch.manual_seed(seed)
    config = {**LLAMA, "num_hidden_layers": 2, "attn_implementation": "eager", **others}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


@pytest.fixture(scope="module")
def models():
    return llama(0), llama(1)


@pytest.fixture
def batch():
    torch.manual_seed(3)
    ids, mask = torch.randint(3, 101, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(models, batch):
    with torch.no_grad():
        return [m(**batch, output_hidden_states=True, output_attentions=True) for m in models]


def value(term, models, batch):
    student, teacher = models
    distillation = train.Distillation(teacher, term)
    loss = distillation(student, batch)
    distillation.close()
    return loss


def test_logits(models, batch):
    student, teacher = outputs(models, batch)
    for temperature in (1.0, 2.0):
        total, count = 0.0, 0
        for b in range(3):
            for i in range(7):
                if batch["attention_mask"][b, i]:
                    p = (teacher.logits[b, i].double() / temperature).softmax(-1)
                    total -= float((p * (student.logits[b, i].double() / temperature).log_softmax(-1)).sum())
                    count += 1
        found = value(train.Logits(temperature), models, batch)
        assert float(found) == pytest.approx(total / count * temperature**2, rel=1e-5) and found.requires_grad


def contrast(q, k, mask, tau=0.1):
    total, count = 0.0, 0
    q, k = (t.double() / t.double().norm(dim=-1, keepdim=True) for t in (q, k))
    for b in range(len(q)):
        real = [i for i in range(q.shape[1]) if mask[b, i]]
        for i in real:
            scores = [math.exp(float(q[b, i] @ k[b, j]) / tau) for j in real]
            total -= math.log(scores[real.index(i)] / sum(scores))
            count += 1
    return total / count


def test_contrastive_and_its_bank(models, batch):
    student, teacher = outputs(models, batch)
    term, other = train.Contrastive(momentum=0.25), llama(2)
    first = value(term, models, batch)
    q, k, mask = student.hidden_states[-1], teacher.hidden_states[-1], batch["attention_mask"]
    assert float(first) == pytest.approx(contrast(q, k, mask), rel=1e-5)
    restored = train.Contrastive(momentum=0.25)
    restored.load_state_dict(copy.deepcopy(term.state_dict()))
    changed = {name: t.flip(0) for name, t in batch.items()}  # the order of a batch does not matter
    second = value(term, (other, models[1]), changed)
    with torch.no_grad():
        now = other(**batch, output_hidden_states=True).hidden_states[-1]
    assert float(second) == pytest.approx(contrast(0.25 * q + 0.75 * now, k, mask), rel=1e-5)
    assert torch.equal(second, value(restored, (other, models[1]), changed))
    assert len(term.bank) == 3 and not next(iter(term.bank.values())).requires_grad


def test_the_bank_forgets_the_oldest(models, batch):
    term = train.Contrastive(size=2)
    value(term, models, batch)
    kept = list(term.bank)
    value(term, models, {name: t[:1] for name, t in batch.items()})
    assert len(term.bank) == 2 and next(iter(term.bank)) == kept[1]


def test_intermediate(models, batch):
    (s, t), mask = outputs(models, batch), batch["attention_mask"].bool()

    def squares(pairs):
        return sum(float((a.double() - b.double()).square().mean(-1)[mask].mean()) for a, b in pairs) / len(pairs)

    hidden = list(zip(s.hidden_states, t.hidden_states, strict=True))
    assert float(value(train.Intermediate("embedding"), models, batch)) == pytest.approx(squares(hidden[:1]), rel=1e-5)
    assert float(value(train.Intermediate("hidden"), models, batch)) == pytest.approx(squares(hidden), rel=1e-5)
    kl = 0.0
    for a, b in zip(s.attentions, t.attentions, strict=True):
        a, b = a.double() + 1e-9, b.double() + 1e-9
        kl += float(((b - 1e-9) * (b.log() - a.log())).sum(-1).mean(1)[mask].mean()) / 2
    assert float(value(train.Intermediate("attention"), models, batch)) == pytest.approx(kl, rel=1e-3)
    seen = [[], []]
    hooks = [layer.mlp.register_forward_hook(lambda _, x, y, i=i: seen[i].append(y.detach()))
             for i, m in enumerate(models) for layer in m.model.layers]  # fmt: skip
    outputs(models, batch)
    for hook in hooks:
        hook.remove()
    found = value(train.Intermediate("*.mlp"), models, batch)
    assert float(found) == pytest.approx(squares(list(zip(*seen, strict=True))), rel=1e-5)
    assert not any(layer.mlp._forward_hooks for model in models for layer in model.model.layers)


def test_a_sum_of_terms(models, batch):
    terms = train.Logits(), 0.1 * train.Contrastive(), train.Intermediate("embedding") * 2
    distillation = train.Distillation(models[1], *terms)
    loss = distillation(models[0], batch)
    p = distillation.parts
    assert float(loss) == pytest.approx(p["Logits"] + 0.1 * p["Contrastive"] + 2 * p["Intermediate"], rel=1e-6)
    assert terms[0].weight == 1.0 and set(distillation.state_dict()) == {"0", "1", "2"}
    with_labels = train.Distillation(models[1], train.Task())(models[0], {**batch, "labels": batch["input_ids"]})
    assert float(with_labels) == pytest.approx(float(models[0](**batch, labels=batch["input_ids"]).loss), rel=1e-6)


def test_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    models = [transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)).eval()
              for _ in range(2)]  # fmt: skip
    batch = {"input_ids": torch.randint(3, 101, (2, 5)), "labels": torch.tensor([[4, 5, 6], [7, 8, -100]])}
    s, t = outputs(models, batch)
    mask = batch["labels"] != -100
    expected = -(t.logits.double().softmax(-1) * s.logits.double().log_softmax(-1)).sum(-1)[mask].mean()
    assert float(value(train.Logits(), models, batch)) == pytest.approx(float(expected), rel=1e-5)
    q, k = s.decoder_hidden_states[-1], t.decoder_hidden_states[-1]
    assert float(value(train.Contrastive(), models, batch)) == pytest.approx(contrast(q, k, mask), rel=1e-5)


def test_a_student_learns_what_its_teacher_knows(batch):
    teacher = llama()
    student = train.prepare(copy.deepcopy(teacher), SPEC, train.Dynamic())
    distillation = train.Distillation(teacher, train.Logits(), 0.1 * train.Contrastive())
    optimizer = torch.optim.AdamW(train.parameter_groups(student, 1e-3))
    losses = []
    for _ in range(8):
        loss = distillation(student, batch)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        logits = student(**batch).logits
        assert torch.equal(lowbit.convert(student)(**batch).logits, logits)


def test_mistakes(models, batch):
    student, teacher = models
    for arguments, message in (({"tau": 0}, "tau must be greater than 0"), ({"momentum": 1}, "momentum must be at le"),
                               ({"size": -1}, "size must be an integer")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train.Contrastive(**arguments)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        train.Logits(0)
    with pytest.raises(ValueError, match="weight of a term must be a number of at least 0: got -1"):
        -1 * train.Logits()
    with pytest.raises(TypeError, match="needs terms such as Logits"):
        train.Distillation(teacher)
    with pytest.raises(ValueError, match="two models"):
        train.Distillation(teacher, train.Logits())(teacher, batch)
    with pytest.raises(ValueError, match="needs labels in the inputs: got attention_mask, input_ids"):
        value(train.Task(), models, batch)
    with pytest.raises(ValueError, match="it matches none"):
        value(train.Intermediate("*.mlpp"), models, batch)
    with pytest.raises(ValueError, match="as many layers: got 3 and 2 hidden_states"):
        value(train.Intermediate("hidden"), (student, llama(num_hidden_layers=1)), batch)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        value(train.Intermediate("attention"), (llama(attn_implementation="sdpa"), teacher), batch)
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        value(train.Logits(), (broken, teacher), batch)


# ------------------------------------------------------------------------------------------------ Trainer, trainable


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(3, 101, (12, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trained(folder, steps, resume=None, **others):
    pytest.importorskip("accelerate")
    teacher = llama()
    student = train.prepare(copy.deepcopy(teacher), SPEC, train.Dynamic())
    distillation = train.Distillation(teacher, train.Logits(), 0.1 * train.Contrastive())
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-3, use_cpu=True,
        report_to=[], disable_tqdm=True, lr_scheduler_type="constant", seed=1, **others,
    )  # fmt: skip
    trainer = train.DistillTrainer(student, arguments, train_dataset=Data(), distillation=distillation)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_resumes_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "a", 5)
    rates = [group["lr"] for group in whole.optimizer.param_groups]
    assert sorted(rates) == pytest.approx([1e-3, 1e-3, 1e-2]) and not whole.model._forward_hooks
    resumed = trained(tmp_path / "b", 5, resume=str(tmp_path / "a" / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    banks = [trainer.distillation.state_dict()["1"]["bank"] for trainer in (whole, resumed)]
    assert banks[0].keys() == banks[1].keys() and all(torch.equal(banks[0][k], banks[1][k]) for k in banks[0])
    assert not any("teacher" in file.name for file in (tmp_path / "a").rglob("*"))


def packed(spec):
    torch.manual_seed(0)
    return lowbit.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5)),
                          {"0": spec})  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "part", "name"),
    [
        (lowbit.Packed(bits=2, outliers=0.005), "outliers", "outlier_values"),
        (lowbit.Codebook(bits=3), "centroids", "codebook"),
        (lowbit.Packed(bits=4), "scales", "scales"),
        (lowbit.Kronecker(), "factors", "a"),
    ],
)
def test_trainable_parts(spec, part, name):
    model, x = packed(spec), torch.randn(4, 64)
    parameters = train.trainable(model, part, also=["2"])
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert getattr(model[0], name).dtype == torch.float32 and model[2].weight.requires_grad
    assert not model[0].bias.requires_grad
    optimizer = torch.optim.Adam(parameters, 1e-2)
    before = model(x).detach()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x)
    assert float(trained.detach().square().sum()) < float(before.square().sum())
    assert lowbit.convert(model) is model and not model[0].trained()
    torch.testing.assert_close(model(x), trained, rtol=1e-6, atol=1e-6)


def test_what_trainable_refuses():
    model = packed(lowbit.Packed(bits=4))
    for arguments, also, message in (
        ((), (), "parts must be of 'outliers', 'centroids', 'scales', 'factors': got None"),
        (("tables",), (), "got 'tables'"),
        (("centroids",), (), "no layer of the model has centroids: they have scales, zeros"),
        (("scales",), ("head",), "also='head' matches no Parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            train.trainable(model, *arguments, also=also)
        assert all(p.requires_grad for p in model.parameters()) and not model[0].trained()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_takes_a_packed_model(tmp_path):
    pytest.importorskip("accelerate")
    lowbit.convert(llama(), lowbit.Packed(bits=4, outliers=0.005)).save_pretrained(tmp_path / "small")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    train.trainable(model, "outliers")
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[],
                                               disable_tqdm=True, save_strategy="no")  # fmt: skip
    before = model.model.layers[0].mlp.up_proj.outlier_values.detach().clone()
    transformers.Trainer(model, arguments, train_dataset=Data()).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.outlier_values, before)
