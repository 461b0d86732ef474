"""Calibration statistics against what the model's layers really see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.model import calibrate
from lowbit.model.calibrate import (
    calibrate_sequential,
    collect_hessians,
    collect_input_maxima,
    collect_sensitivities,
)


class Block(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(k, k) for _ in range(3))
        self.out = nn.Linear(k, k)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.drop(torch.tanh(self.q(x) * self.k(x) + self.v(input=x))))


class Model(nn.Module):
    """Two blocks, one of them called twice, and a layer on [B*T, K]."""

    def __init__(self, k: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, k)
        self.once, self.twice = Block(k), Block(k)
        self.head = nn.Linear(k, 4)
        self.unused = nn.Linear(k, k)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.twice(self.twice(self.once(self.embedding(ids))))
        return self.head(x.flatten(0, 1))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def layers(model: nn.Module, *without: str) -> dict[str, nn.Module]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: m for n, m in linear.items() if n not in ("unused", *without)}


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [
        {"ids": torch.randint(0, 20, (2, 5 + i)), "attention_mask": (torch.arange(5 + i) < 4).expand(2, -1).long()}
        for i in range(count)
    ]


def seen(model: nn.Module, given: list[Any], masked: bool) -> dict[str, Tensor]:
    """Every layer's inputs, recorded the plain way."""
    inputs: dict[str, list[Tensor]] = {}
    mask: list[Tensor] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            rows = (args[0] if args else kwargs["input"]).reshape(-1, 8)
            inputs.setdefault(name, []).append(rows[mask[0].flatten().bool()] if masked else rows)

        return hook

    handles = [m.register_forward_pre_hook(record(n), with_kwargs=True) for n, m in layers(model).items()]
    model.eval()
    with torch.no_grad():
        for batch in given:
            mask[:] = [batch["attention_mask"]]
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in inputs.items()}


def hessian_of(x: Tensor) -> Tensor:
    """2/n X.T X, the diagonal raised by K/n times its mean."""
    h = 2 / len(x) * x.t() @ x
    return h + x.shape[1] / len(x) * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def test_hessians_are_those_of_the_inputs(model: Model) -> None:
    found = collect_hessians(model, layers(model), iter(batches()))
    expected = seen(model, batches(), masked=True)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name].double(), hessian_of(x), rtol=1e-5, atol=1e-6)
    for block in ("once", "twice"):
        assert found[f"{block}.q"] is found[f"{block}.k"] is found[f"{block}.v"]
        assert found[f"{block}.q"] is not found[f"{block}.out"]


def test_layers_that_share_only_one_of_their_calls_do_not_share(model: Model) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.a(2 * x)

    mixed = Mixed()
    x = torch.randn(5, 8)
    found = collect_hessians(mixed, {"a": mixed.a, "b": mixed.b}, [x])
    assert torch.allclose(found["a"], hessian_of(torch.cat([x, 2 * x])), rtol=1e-5)
    assert torch.allclose(found["b"], hessian_of(x), rtol=1e-5)


def test_an_input_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.a(x) + self.b(x.mul_(2))

    model = InPlace()
    found = collect_hessians(model, {"a": model.a, "b": model.b}, [torch.randn(5, 8)])
    assert torch.allclose(found["b"], 4 * found["a"], rtol=1e-5)


def test_maxima(model: Model) -> None:
    found = collect_input_maxima(model, layers(model), batches())
    for name, x in seen(model, batches(), masked=True).items():
        assert found[name].shape == (1,)
        assert float(found[name]) == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_batch_kinds_and_forward(model: Model) -> None:
    ids = batches(1)[0]["ids"]
    expected = collect_hessians(model, layers(model), [{"ids": ids}])
    for batch in (ids, (ids,), [ids, None]):
        found = collect_hessians(model, layers(model), [batch])
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    found = collect_hessians(model, layers(model), ["text"], forward=lambda model, batch: model(ids))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_model_is_left_as_it_was(model: Model) -> None:
    model.train()
    model.once.eval()
    collect_hessians(model, layers(model), batches())
    collect_input_maxima(model, layers(model), batches())
    assert [m.training for m in (model, model.once, model.once.drop, model.twice.drop)] == [True, False, False, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        collect_hessians(model, layers(model), [torch.full((1, 2), 0.5)])
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_sequential_sees_the_quantized_predecessors(model: Model) -> None:
    order: list[str] = []
    parent = dict(model.named_modules())

    def quantize_layer(name: str, layer: nn.Module, hessian: Tensor) -> None:
        if not name.endswith((".k", ".v")):  # these share the Hessian of q, taken before q was changed
            x = seen(model, batches(), masked=True)[name]
            assert torch.allclose(hessian.double(), hessian_of(x), rtol=1e-5, atol=1e-6)
        order.append(name)
        if name == "once.v":  # a swapped module
            changed = nn.Linear(8, 8)
            parent["once"].v = changed
        else:  # a changed weight
            assert isinstance(layer, nn.Linear)
            layer.weight.data.mul_(1.5)

    calibrate_sequential(model, layers(model), batches(), quantize_layer, memory=0)
    assert order == [f"{block}.{layer}" for block in ("once", "twice") for layer in ("q", "k", "v", "out")] + ["head"]


def test_memory_bounds_the_layers_measured_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    measure = calibrate.hessians_of
    monkeypatch.setattr(calibrate, "hessians_of", lambda *args: passes.append(len(args[2])) or measure(*args))
    groups, hessian = 5, 4 * 8 * 8  # two blocks of two inputs, and the head's; float32 [8, 8]
    for memory, expected in [(0, [1] * groups), (2 * hessian, [2, 2, 1]), (1 << 30, [groups])]:
        passes.clear()
        calibrate_sequential(model, layers(model), batches(), lambda *_: None, memory=memory)
        assert passes == expected


def test_no_layers(model: Model) -> None:
    assert collect_hessians(model, {}, batches()) == collect_input_maxima(model, {}, batches()) == {}


def test_errors(model: Model) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        collect_hessians(model, layers(model), [])
    everything = {**layers(model), "unused": model.unused}
    for collect in (collect_hessians, collect_input_maxima):
        with pytest.raises(ValueError, match="no batch reaches unused"):
            collect(model, everything, batches())
    model.embedding.weight.data[:] = torch.nan
    for collect in (collect_hessians, collect_input_maxima):
        with pytest.raises(ValueError, match=r"layer once\.\w+ must be finite"):
            collect(model, layers(model), batches())


def squared_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).square().sum()


def test_sensitivities_are_mean_squared_gradients(model: Model) -> None:
    chosen = {**layers(model), "embedding": model.embedding}
    model.train()
    model.once.q.weight.requires_grad_(False)
    model.once.k.weight.grad = torch.ones(8, 8)
    found = collect_sensitivities(model, chosen, iter(batches()), squared_loss)
    assert model.training and model.once.drop.training  # as before, though dropout was off
    assert not model.once.q.weight.requires_grad and model.once.q.bias.requires_grad
    assert torch.equal(model.once.k.weight.grad, torch.ones(8, 8)) and model.head.weight.grad is None
    model.eval()
    model.once.q.weight.requires_grad_(True)
    expected = {name: torch.zeros_like(layer.weight) for name, layer in chosen.items()}
    for batch in batches():
        model.zero_grad()
        squared_loss(model, batch).backward()
        for name, layer in chosen.items():
            expected[name] += layer.weight.grad.square() / len(batches())
    assert list(found) == list(chosen)
    for name, value in found.items():
        assert value.dtype == torch.float32 and float(value.abs().sum()) > 0
        assert torch.allclose(value, expected[name], rtol=1e-4), name


def test_sensitivities_name_what_is_wrong(model: Model) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        collect_sensitivities(model, layers(model), [], squared_loss)
    with pytest.raises(ValueError, match="does not on unused"):
        collect_sensitivities(model, {**layers(model), "unused": model.unused}, batches(), squared_loss)
    with pytest.raises(ValueError, match=r"weight: it does not on head, once\.k"):
        collect_sensitivities(model, layers(model), batches(), lambda model, batch: torch.zeros(()))
    with pytest.raises(ValueError, match=r"layer .* must be finite"):
        collect_sensitivities(model, layers(model), batches(), lambda model, batch: squared_loss(model, batch) * 1e38)
