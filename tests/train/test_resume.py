"""Adam as it is, 200 steps: no NaN, and training that was interrupted gives the bits of one that was not. A state of
another spec, quantizer or choice of what is trained is refused by name."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit import train
from lowbit.testing.tiny import LLAMA

QAT = lowbit.Packed(bits=2, granularity="row", symmetric=True, activations="int8")
PREPARED = {
    "dynamic": lambda model: train.prepare(model, QAT, train.Dynamic()),
    "lsq": lambda model: train.prepare(model, QAT, train.LSQ()),
    "codebook": lambda model: train.prepare(model, lowbit.Codebook(bits=3)),
    "kron": lambda model: train.prepare(model, lowbit.Kronecker()),
    "scales": lambda model: train.prepare(model, lowbit.Packed(bits=4)),
    "outliers": lambda model: outliers(model),
}


def outliers(model):
    model = lowbit.convert(model, lowbit.Packed(bits=2, outliers=0.02))
    train.trainable(model, "outliers")
    return model


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 5))


def fresh(name):
    model = PREPARED[name](plain())
    return model, torch.optim.Adam(p for p in model.parameters() if p.requires_grad)


def run(model, optimizer, first, last):
    """Steps of an ordinary loop, each with its own batch."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 40, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", PREPARED)
def test_200_steps_with_an_interruption(name, tmp_path):
    model, optimizer = fresh(name)
    run(model, optimizer, 0, 120)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    run(model, optimizer, 120, 200)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    again, other = fresh(name)
    state = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    run(again, other, 120, 200)
    for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    x = torch.randn(6, 40)
    assert torch.isfinite(model(x)).all() and torch.equal(lowbit.convert(copy.deepcopy(again))(x), model(x))


@pytest.mark.parametrize(
    ("spec", "quantizer", "message"),
    [
        (QAT, train.LSQ(), r"0: the state_dict was saved with quantizer=Dynamic: got quantizer=LSQ\n\t2: the state"),
        (lowbit.Packed(bits=3, granularity="row", symmetric=True, activations="int8"), train.Dynamic(),
         "0: the state_dict was saved with bits=2: got bits=3"),
        (lowbit.Packed(bits=2, granularity="row", symmetric=True), train.Dynamic(),
         "2: the state_dict was saved with activations=int8: got activations=float"),
    ],
)  # fmt: skip
def test_another_state_is_refused_by_name(spec, quantizer, message, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, _ = fresh("dynamic")
    safetensors.save_file(model.state_dict(), tmp_path / "file")
    other = train.prepare(plain(), spec, quantizer)
    weights = {name: p.detach().clone() for name, p in other.named_parameters() if "learned" not in name}
    for state in (model.state_dict(), safetensors.load_file(tmp_path / "file")):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict({name: t * 2 if name in weights else t for name, t in state.items()})
    assert all(torch.equal(other.get_parameter(name), weight) for name, weight in weights.items() if "weight" in name)


def test_what_was_trained_is_part_of_the_state():
    spec = lowbit.Packed(bits=4, granularity="row", outliers=0.02)  # scales of float32: the dtype would not tell
    model, other = (lowbit.convert(plain(), {"0": spec}) for _ in range(2))
    frozen = copy.deepcopy(model.state_dict())
    train.trainable(model, "scales")
    with pytest.raises(RuntimeError, match="0: .* saved while scales was trained, which is frozen here"):
        other.load_state_dict(model.state_dict())
    train.trainable(model, "outliers", "scales")
    model.load_state_dict(frozen)  # a start: what was stored is exact
    assert model[0].outlier_values.dtype == torch.float32
    train.trainable(other, "outliers", "scales")
    other.load_state_dict(model.state_dict())


# ----------------------------------------------------------------------------------------------------------- Trainer


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(3, 101, (12, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trained(prepare, folder, resume=None):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = prepare(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-3, use_cpu=True,
        report_to=[], disable_tqdm=True, lr_scheduler_type="constant", seed=1,
    )  # fmt: skip
    train.DistillTrainer(model, arguments, train_dataset=Data()).train(resume_from_checkpoint=resume)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dynamic", "outliers"])
def test_a_trainer_that_was_interrupted(name, tmp_path):
    whole = trained(PREPARED[name], tmp_path / "a")
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = trained(PREPARED[name], tmp_path / "b", checkpoint)
    for (key, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    if name == "outliers":
        with pytest.raises(ValueError, match=r"another training:\n  lm_head.outlier_values was trained: here it is n"):
            trained(PREPARED["scales"], tmp_path / "c", checkpoint)
    if name == "dynamic":
        with pytest.raises(ValueError, match="embed_tokens had quantizer=Dynamic: got quantizer=LSQ"):
            trained(PREPARED["lsq"], tmp_path / "c", checkpoint)
