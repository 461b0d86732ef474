"""``recover``: what is learned is stored, codes stay, and a model that would be no better stays as it was."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import train
from lowbit.model.storage import storages


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def batches(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(40, (2, 9), generator=generator)} for _ in range(count)]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


FORMS = {
    "packed": lowbit.Packed(bits=2, group_size=16, outliers=0.02),
    "integer zeros": lowbit.Packed(bits=2, group_size=16, zeros="int"),
    "codebook": lowbit.Codebook(bits=2),
    "kron": lowbit.Kronecker(compression=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_becomes_better_in_the_form_that_it_has(form, tmp_path):
    reference = net()
    model = lowbit.convert(copy.deepcopy(reference), FORMS[form])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = sum(storages(model.state_dict().values()).values())
    found = train.recover(model, reference, batches(), steps=30)
    assert found.kept and found.after < 0.97 * found.before
    state = model.state_dict()
    changed = {name.rpartition(".")[2] for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert changed == {"packed": {"scales", "zeros", "outlier_values"}, "integer zeros": {"scales"},
                       "codebook": {"codebook"}, "kron": {"a", "b"}}[form]  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape
    assert sum(storages(model.state_dict().values()).values()) == held  # the head is still the embedding
    lowbit.save(model, tmp_path)
    ids = batches(1)[0]
    assert torch.equal(lowbit.load(tmp_path, net())(**ids), model(**ids))


def test_it_is_deterministic_and_leaves_everything_else_alone():
    reference = net().train()
    reference.up.weight.requires_grad_(False)
    floats = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    models = [lowbit.convert(net(), {"up": lowbit.Packed(bits=3)}).train() for _ in range(2)]
    models[0].down.bias.requires_grad_(False)
    state = torch.get_rng_state()
    for model in models:
        train.recover(model, reference, batches(), steps=5, seed=3)
        model.down.bias.requires_grad_(False)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    assert models[0].training and reference.training
    assert models[0].down.weight.requires_grad and not models[0].up.trained()
    assert all(p.grad is None for p in (*models[0].parameters(), *reference.parameters()))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, floats[name])


def test_what_is_no_better_is_not_kept():
    reference = net()
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    before = model.state_dict()
    found = train.recover(model, reference, batches(), steps=6, lr=30.0)
    assert not found.kept and found.after >= found.before and "as it was" in str(found)
    assert all(tensor is model.state_dict()[name] or torch.equal(tensor, model.state_dict()[name])
               for name, tensor in before.items())  # fmt: skip
    assert model.head.packed is model.embedding.packed and model.head.scales is model.embedding.scales


@pytest.mark.parametrize("learn", [train.recover, train.tune])
def test_what_is_held_out_is_not_learned_from(learn):
    given, seen = batches(17), {True: set(), False: set()}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen[torch.is_grad_enabled()].add(next(i for i, each in enumerate(given) if each is batch))
        return model(**batch).square().mean()

    learn(lowbit.convert(net(), {"up": lowbit.Packed(bits=4)}), net(), given, steps=12, loss=loss)
    assert len(seen[False]) == 2 and not seen[True] & seen[False] and len(seen[True]) == 15


def test_a_loss_that_is_no_number_ends_it_and_changes_nothing():
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(batch)
        return model(**batch).sum() * (math.nan if len(calls) > 6 else 1)

    with pytest.raises(FloatingPointError, match="the loss is nan in step"):
        train.recover(model, net(), batches(), steps=9, loss=loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer.trained() for layer in (model.up, model.down, model.head))


def test_the_loss_is_the_divergence_of_the_tokens_that_count():
    model, reference = lowbit.convert(net(), lowbit.Packed(bits=2)), net()
    batch = {**batches(1)[0], "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5])}
    found = train.recover(model, reference, [batch], steps=1, lr=1e-12)
    packed = lowbit.convert(net(), lowbit.Packed(bits=2))
    counted = batch["attention_mask"].bool()
    with torch.no_grad():
        p, q = (each(batch["input_ids"])[counted].double().log_softmax(-1) for each in (reference, packed))
    assert found.before == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_encoders_are_compared_by_their_hidden_states():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64)  # fmt: skip
    reference = transformers.BertModel(config).eval()
    model = lowbit.convert(copy.deepcopy(reference), lowbit.Packed(bits=2))
    found = train.recover(model, reference, batches(), steps=20)
    assert found.kept and found.after < found.before
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    batch = {**batches(1)[0], "attention_mask": mask}
    found = train.recover(model, reference, [batch], steps=1, lr=1e-12)
    with torch.no_grad():
        mine, other = (each(**batch).last_hidden_state.double() for each in (model, reference))
    pairs = [(mine[mask.bool()], other[mask.bool()]),
             tuple(torch.stack([each[0].mean(0), each[1, :4].mean(0)]) for each in (mine, other))]  # fmt: skip
    errors = [float((a - b).square().mean() / b.square().mean()) for a, b in pairs]
    assert found.before == pytest.approx(sum(errors) / 2, rel=1e-4) and abs(errors[0] / errors[1] - 1) > 0.05


BAD_ARGUMENTS = [
    ({"steps": 0}, "steps must be an integer of at least 1: got steps=0"),
    ({"batch": 1.5}, "batch must be an integer of at least 1: got batch=1.5"),
    ({"lr": -1}, "lr must be greater than 0 and finite: got lr=-1"),
    ({"calibration": []}, "calibration must hold at least one batch"),
    ({"model": nn.Linear(3, 3)}, "the model has no packed layer"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [*BAD_ARGUMENTS, ({"lr": None}, "lr must be greater than 0 and finite: got lr=None")]
)
def test_bad_arguments(arguments, message):
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    with pytest.raises(ValueError, match=message):
        train.recover(**{"model": model, "reference": net(), "calibration": batches(2), **arguments})


def test_what_is_trained_already_is_named():
    model = lowbit.convert(net(), lowbit.Packed(bits=4))
    train.trainable(model, "scales")
    with pytest.raises(ValueError, match=r"embedding: scales is trained already: end that by lowbit.convert\(model\)"):
        train.recover(model, net(), batches(2))
