"""The columns: what every architecture goes through, and what a cell says."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lowbit
from lowbit.nn.layer import Layer, layers

WORKS, NOTHING = "works", "–"
COLUMNS = ("convert", "forward", "reload", "task", "training")
Inputs = Mapping[str, Any]


@dataclass
class Found:
    """What one row found: column -> ``works``, ``–`` (nothing to do) or the words of the error."""

    cells: dict[str, str] = field(default_factory=dict)
    packed: str = NOTHING
    notes: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def check(self, column: str, run: Callable[[], object]) -> None:
        """Fill a cell: ``run`` raises where something is wrong."""
        try:
            run()
            self.cells[column] = WORKS
        except Exception as error:
            self.errors.append(error)
            self.cells[column] = words(error)


def words(error: BaseException) -> str:
    """The error as a cell shows it: in one line, without addresses and folders."""
    text = " ".join(str(error).split()) or "no message"
    text = re.sub(r"0x[0-9a-f]+", "0x…", re.sub(r"/(?:tmp|var|private)/\S*", "…", text))
    return f"{type(error).__name__}: {text[:600]}".replace("|", "\\|")


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of libraries are not this table's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def floats(output: Any) -> list[Tensor]:
    """The float tensors of a model's output."""
    values = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def assert_close(found: Any, expected: Any, rtol: float = 2e-5) -> None:
    """All float outputs agree, relative to the largest value of each."""
    ours, theirs = floats(found), floats(expected)
    assert ours and len(ours) == len(theirs), f"{len(ours)} float outputs instead of {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, f"output {i} has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        assert bool(torch.isfinite(b).all()), f"output {i} is not finite"
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        error = float((a.detach() - b.detach()).abs().max()) if b.numel() else 0.0
        assert error <= rtol * scale, f"output {i} is off by {error / scale:.1e} of its largest value"


def assert_equal(found: Any, expected: Any) -> None:
    """All float outputs agree to the bit."""
    ours, theirs = floats(found), floats(expected)
    assert ours and len(ours) == len(theirs), f"{len(ours)} float outputs instead of {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"output {i} differs"


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Make every parameter matter: biases and norms start at 0 and 1, and some heads at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # such as a table of sines, which is no file's to hold
                continue
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def run(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return model(**inputs)


def dequantized(model: nn.Module) -> nn.Module:
    """A float model with the same weights."""
    return lowbit.dequantize(copy.deepcopy(model))


def packed_of(model: nn.Module) -> str:
    """``12 of 14``: the packed layers, and all linear and embedding ones."""
    named = dict(model.named_modules(remove_duplicate=False))
    ours = [name for name, module in named.items() if isinstance(module, Layer)]
    theirs = [name for name, module in named.items() if isinstance(module, (nn.Linear, nn.Embedding))]
    return f"{len(ours)} of {len(ours) + len(theirs)}"


def converted(model: nn.Module, spec: Any, skip: tuple[str, ...] = ()) -> None:
    """Convert; what stayed float is listed, and libraries can still count what the model has."""
    lowbit.convert(model, spec, skip=skip)
    found = layers(model)
    assert found, "no layer was packed"
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assert name in model.lowbit_skipped, f"{name} stayed float, and is not listed"  # type: ignore[operator]
    assert str(lowbit.report(model))
    if hasattr(model, "num_parameters"):
        assert model.num_parameters() == sum(p.numel() for p in model.parameters())  # type: ignore[operator]
        assert model.get_memory_footprint() > 0  # type: ignore[operator]


def forward(model: nn.Module, inputs: Inputs) -> None:
    """The outputs are those of the dequantized model."""
    assert_close(run(model, inputs), run(dequantized(model), inputs))


def notes(model: nn.Module) -> Iterator[str]:
    """What a user would want to know: large float tensors, and layers whose ``.weight`` is read."""
    kept: dict[str, None] = {}
    for tensor in lowbit.report(model).kept:  # of tiny models vectors are more than 1 %, too
        small = ("the bias of", "the weight of", "a buffer of")
        if not tensor.reason.startswith(small) and "no linear layer" not in tensor.reason and "conv" not in tensor.name:
            kept[re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)] = None
    if kept:
        yield f"float: `{'`, `'.join(kept)}`"
    if names := list(read(model)):
        yield f"read: `{'`, `'.join(f'{name}.weight' for name in names)}`"


def read(model: nn.Module) -> dict[str, Layer]:
    """The layers whose ``.weight`` somebody read."""
    return {name: layer for name, layer in layers(model).items() if layer.__dict__.get("_weight_was_read")}


def reload(model: Any, inputs: Inputs) -> Any:
    """``save_pretrained`` and ``from_pretrained``: the same layers, the same outputs to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = type(model).from_pretrained(folder).eval()
    assert layers(other, duplicates=True).keys() == layers(model, duplicates=True).keys()
    assert_equal(run(other, inputs), run(model, inputs))
    return other


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's own loss where the inputs have labels, else the mean square of its outputs."""
    output = model(**inputs)
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return loss if loss is not None else torch.stack([y.square().mean() for y in floats(output)]).sum()


def training(model: nn.Module, inputs: Inputs, names: tuple[str, ...] = ("scales",)) -> None:
    """A step of Adam on all parameters and on the scales; gradients are those of the dequantized model."""
    model, dense = copy.deepcopy(model), dequantized(model)
    lowbit.make_trainable(model, *names)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    before = loss_of(model, inputs)
    before.backward()
    loss_of(dense, inputs).backward()
    theirs = {name: parameter.grad for name, parameter in dense.named_parameters(remove_duplicate=False)}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values() if gradient is not None)
    for name, parameter in parameters.items():
        owner = name.rpartition(".")[0]  # of experts the float weight has the name of the layer
        reached = theirs.get(name, theirs.get(f"{owner}.weight", theirs.get(owner)))
        a_or_no = "a" if reached is None else "no"
        assert (parameter.grad is None) == (reached is None), f"{name} has {a_or_no} gradient"
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
        if name in theirs and parameter.grad is not None:
            error = float((parameter.grad - theirs[name]).abs().max())
            assert error <= 1e-4 * largest, f"the gradient of {name} is off by {error / largest:.1e} of the largest"
    trained = [p for n, p in parameters.items() if n.rpartition(".")[2] in names and p.grad is not None]
    assert trained and all(bool(p.grad.any()) for p in trained), f"no gradient of the {names[0]}"
    optimizer.step()
    after = loss_of(model, inputs)
    assert bool(after.isfinite()) and not torch.equal(after, before), f"the loss stayed at {float(after)}"
