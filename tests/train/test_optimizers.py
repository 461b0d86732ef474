"""Optimizers that leave out what is trained: made before ``prepare``, before ``trainable``, or of part of the model."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import train
from lowbit.testing.tiny import GPT2

SPEC = lowbit.Packed(bits=4, granularity="row", symmetric=True)
PACKED = lowbit.Packed(bits=4, outliers=0.02)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 5))


def step(model, *optimizers, x=None):
    """One step of an ordinary loop, that leaves the gradients."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.randn(6, 40) if x is None else x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def adam(parameters):
    return torch.optim.AdamW(parameters, 1e-2)


MADE_BEFORE = {
    "fake quant": (lambda model: train.prepare(model, SPEC, train.Dynamic()), "0.fake_quant.learned, 2.fake_quant.lea"),
    "packed": (lambda model: train.prepare(model, PACKED), "0.outlier_values, 0.scales, 2.outlier_values and 1"),
    "codebook": (lambda model: train.prepare(model, {"2": lowbit.Codebook(bits=2)}), "2.codebook: was it made before"),
}


@pytest.mark.parametrize("name", MADE_BEFORE)
def test_one_made_before_prepare(name):
    prepare, missing = MADE_BEFORE[name]
    model = plain()
    optimizer = adam(model.parameters())
    step(model, optimizer)  # fine until then
    model = prepare(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"^AdamW.step\(\) trains the model, but no optimizer has .*{missing}"):
        step(model, optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    step(model, adam(model.parameters()))


def test_parameters_that_packing_took_out():
    model = plain()
    weights, biases = adam([model[0].weight, model[2].weight]), adam([model[0].bias, model[2].bias])
    train.prepare(model, PACKED)
    step(model, biases)  # the rest is trained by nobody, on purpose
    with pytest.raises(RuntimeError, match="no optimizer has 0.outlier_values"):
        step(model, weights)


def test_one_made_before_trainable():
    model = lowbit.convert(plain(), {"0": PACKED})
    optimizer = adam(model.parameters())
    train.trainable(model, "outliers", also=["2.bias"])
    with pytest.raises(RuntimeError, match="no optimizer has 0.outlier_values: was it made before"):
        step(model, optimizer)
    step(model, adam(p for p in model.parameters() if p.requires_grad))
    train.trainable(model, "scales")
    with pytest.raises(RuntimeError, match="no optimizer has 0.scales"):
        step(model, optimizer)


def test_weights_that_are_kept_transposed():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=False))
    optimizer = adam(model.parameters())
    ids = torch.arange(3, 12)[None]
    model = train.prepare(model, {"*.c_fc": SPEC}, train.MinMax())  # which learns nothing
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match=r"no optimizer has transformer.h.0.mlp.c_fc.weight: was"):
        optimizer.step()


def test_one_that_leaves_scales_out():
    model = train.prepare(plain(), SPEC, train.LSQ())
    weights = [p for name, p in model.named_parameters() if "learned" not in name]
    with pytest.raises(RuntimeError, match="no optimizer has 0.fake_quant.learned"):
        step(model, adam(weights))
    model[0].fake_quant.learned.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no optimizer has 2.fake_quant.learned: was"):
        step(model, adam(weights))
    model[2].fake_quant.learned.requires_grad_(False)  # on purpose
    step(model, adam(weights))


def test_no_false_alarms():
    model, other = train.prepare(plain(), SPEC, train.Dynamic()), plain()
    learned = [module.fake_quant.learned for module in (model[0], model[2])]
    weights = [p for p in model.parameters() if not any(p is each for each in learned)]
    step(model, adam(weights), adam(learned))  # two that share the work
    one_each = [adam([p]) for p in model.parameters()]
    step(model, *one_each)
    norms = adam([model[2].bias])  # no weight, no scale
    step(model, norms)
    stale = adam(other.parameters())
    train.prepare(other, SPEC, train.Dynamic())
    step(plain(), adam(plain().parameters()))
    stale.step()  # nothing has a gradient: the model is not in use
    stale.add_param_group({"params": [module.fake_quant.learned for module in (other[0], other[2])]})
    step(other, stale)
    twin = copy.deepcopy(model)
    step(twin, adam(twin.parameters()))


def test_a_step_that_is_compiled(compiler):
    model = train.prepare(plain(), SPEC, train.Dynamic())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    before = model[0].fake_quant.learned.detach().clone()
    model(torch.randn(6, 40)).square().mean().backward()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(model[0].fake_quant.learned, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", ["Trainer", "DistillTrainer"])
def test_a_trainer_with_an_optimizer_of_before(trainer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    cls = getattr(transformers if trainer == "Trainer" else train, trainer)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    optimizer = adam(model.parameters())
    model = train.prepare(model, SPEC, train.Dynamic())
    ids = torch.randint(3, 101, (4, 6))
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[],
                                               disable_tqdm=True, save_strategy="no")  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    with pytest.raises(RuntimeError, match=r"no optimizer has transformer.wte.fake_quant.learned, .* and \d+ more"):
        cls(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
