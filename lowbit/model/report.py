"""``report``: what each layer became, what it costs, and how far it is from the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backends import registry
from lowbit.core.family import Format
from lowbit.model.calibrate import call
from lowbit.nn.layer import Layer, layers, storage_of


@dataclass
class Row:
    """One layer. Bytes count the weight only (codes, scales, zeros, outliers); a shared storage counts once.

    ``weight_error``: relative Frobenius error of the dequantized weight against the float original.
    ``kernel_error``: relative error of the layer's output against float64 arithmetic on the dequantized weight.
    ``output_error``: relative error of the layer's output against the float layer's, on the same input.
    ``note``: what the layer does differently from the module it replaced.
    """

    name: str
    kind: str
    scheme: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    backend: str = ""
    weight_error: float | None = None
    kernel_error: float | None = None
    output_error: float | None = None
    shares: str | None = None
    note: str | None = None

    @classmethod
    def planned(cls, name: str, kind: str, format: Format, dtype: torch.dtype) -> Row:
        before = format.out_features * format.in_features * dtype.itemsize
        return cls(name, kind, format.describe(), format.bits_per_weight, before, format.nbytes)

    @classmethod
    def of_layer(cls, name: str, layer: Layer) -> Row:
        row = cls.planned(name, layer.kind, layer.format, layer.dtype)
        row.backend = registry.active_backend(layer.device.type)
        row.weight_error = layer.weight_error
        row.note = layer.note
        return row

    def share(self, other: str) -> None:
        """Count nothing for this layer: the layer ``other`` holds the storage of both."""
        self.shares, self.bytes_before, self.bytes_after = other, 0, 0


@dataclass
class Report:
    """A table (``str``) and a dictionary (:meth:`to_dict`) of a model's packed layers.

    ``total_before`` and ``total_after`` count every parameter and buffer of the model once, in bytes.
    """

    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    total_before: int = 0
    total_after: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller the model is."""
        return self.total_before / self.total_after if self.total_after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """``{"layers": [...], "skipped": {...}, "total_before": ..., "total_after": ..., "ratio": ...}``."""
        return {
            "layers": [asdict(row) for row in self.rows],
            "skipped": dict(self.skipped),
            "total_before": self.total_before,
            "total_after": self.total_after,
            "ratio": self.ratio,
        }

    def __str__(self) -> str:
        optional = {
            "weight error": [row.weight_error for row in self.rows],
            "kernel error": [row.kernel_error for row in self.rows],
            "output error": [row.output_error for row in self.rows],
        }
        shown = {title: values for title, values in optional.items() if any(v is not None for v in values)}
        header = ["layer", "scheme", "bits/weight", "before", "after", *shown]
        with_backend = any(row.backend for row in self.rows)
        table = [header + (["backend"] if with_backend else [])]
        for i, row in enumerate(self.rows):
            after = format_bytes(row.bytes_after) if row.shares is None else f"in {row.shares}"
            before = format_bytes(row.bytes_before) if row.shares is None else "-"
            cells = [row.name or "(model)", row.scheme, f"{row.bits_per_weight:.2f}", before, after]
            cells += ["-" if values[i] is None else f"{values[i]:.2e}" for values in shown.values()]
            table.append(cells + ([row.backend] if with_backend else []))
        lines = _align(table)
        lines.append(
            f"total: {format_bytes(self.total_before)} -> {format_bytes(self.total_after)} "
            f"({self.ratio:.2f}x smaller), {len(self.rows)} layers packed"
        )
        for name, reason in self.skipped.items():
            lines.append(f"float: {name}: {reason}")
        for note in dict.fromkeys(row.note for row in self.rows if row.note):
            names = [row.name or "(model)" for row in self.rows if row.note == note]
            lines.append(f"note: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {note}")
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """``1536`` -> ``1.5 KB`` (powers of 1000)."""
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _align(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def planned_report(rows: list[Row], skipped: dict[str, str]) -> Report:
    """The report of a conversion that has not happened: totals cover the layers to be packed."""
    return Report(rows, skipped, sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows))


def report(model: nn.Module, batch: Any = None, *, reference: nn.Module | None = None) -> Report:
    """Describe every packed layer of ``model``.

    Args:
        model: a converted model.
        batch: an input for the model (a tensor, or a tuple or dict of arguments). With it each linear's
            ``kernel_error`` is measured on the input it receives.
        reference: the float model before conversion, under the same layer names. With it (and a batch) each
            linear's ``output_error`` is measured too.

    Raises ``ValueError`` when the model has no packed layer.
    """
    found = layers(model)
    if not found:
        raise ValueError("the model has no packed layer: convert it first")
    rows: dict[str, Row] = {}
    storages: dict[tuple[int, ...], str] = {}
    for name, layer in found.items():
        row = rows[name] = Row.of_layer(name, layer)
        storage = storage_of(layer)
        if storage in storages:
            row.share(storages[storage])
        storages.setdefault(storage, name)
    if batch is not None:
        for name, inputs in layer_inputs(model, found, batch).items():
            _measure(rows[name], found[name], inputs, reference)
    after = sum(t.numel() * t.dtype.itemsize for t in _unique_tensors(model))
    before = after + sum(row.bytes_before - row.bytes_after for row in rows.values())
    skipped: dict[str, str] = getattr(model, "lowbit_skipped", {})
    return Report(list(rows.values()), dict(skipped), before, after)


def _unique_tensors(model: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def layer_inputs(model: nn.Module, found: dict[str, Layer], batch: Any) -> dict[str, Tensor]:
    """The first input that each linear receives when the model runs on ``batch``."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            inputs.setdefault(name, x.detach())

        return hook

    linears = {name: layer for name, layer in found.items() if layer.kind == "linear"}
    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in linears.items()]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            call(model.eval(), batch)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return inputs


def _measure(row: Row, layer: Layer, x: Tensor, reference: nn.Module | None) -> None:
    with torch.no_grad():
        y = layer.forward(x).double()  # without hooks: they are not part of the layer
        exact = x.double() @ layer.dequantize(torch.float32).double().t()
        if layer.bias is not None:
            exact += layer.bias.double()
        row.kernel_error = _relative(y, exact)
        if reference is not None:
            row.output_error = _relative(y, reference.get_submodule(row.name)(x).double())


def _relative(y: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    return float((y - reference).norm()) / norm if norm else float((y - reference).norm())
