"""``report``: what each layer became, what it costs, and how far it is from the original."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.backends import registry
from lowbit.model.calibrate import call
from lowbit.model.kept import SHARE, Kept, kept_float, skipped_in, with_float_copies
from lowbit.model.plan import require_model
from lowbit.model.storage import nbytes, storages
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
    family: str = ""
    weights: int = 0

    @classmethod
    def of_layer(cls, name: str, layer: Layer) -> Row:
        row = cls.planned(name, layer)
        row.bytes_before = usual_bytes_before(layer) if layer.bytes_before is None else layer.bytes_before
        row.bytes_after = sum(storages(layer.named_tensors().values()).values())
        row.backend = "" if layer.device.type == "meta" else registry.active_backend(layer.device.type)
        row.weight_error = layer.weight_error
        row.note = layer.note
        return row

    @classmethod
    def planned(cls, name: str, layer: Layer) -> Row:
        """What the format says, whatever the layer holds."""
        format, scheme = layer.format, layer.format.describe()
        if layer.kind == "experts":
            scheme = f"{layer.num_experts} experts, {scheme}"
        bits = 8 * format.nbytes / layer.weights
        row = cls(name, layer.kind, scheme, bits, layer.weights * layer.dtype.itemsize, format.nbytes)
        row.family, row.weights = format.family, layer.weights
        return row

    def share(self, other: str) -> None:
        """Count nothing for this layer: the layer ``other`` holds the storage of both."""
        self.shares, self.bytes_before, self.bytes_after = other, 0, 0


def usual_bytes_before(layer: Layer) -> int:
    """What goes with a float weight, unless its layer says otherwise: its values, and a number that Gemma's has."""
    values = layer.weights + (1 if getattr(layer, "round_output_scale", False) else 0)
    return int(values * layer.dtype.itemsize)


def rows_of(found: Mapping[str, Layer]) -> list[Row]:
    """A row for every layer; tensors that several layers hold count for the first."""
    rows: list[Row] = []
    owners: dict[tuple[int, ...], str] = {}
    seen: set[int] = set()
    for name, layer in found.items():
        row = Row.of_layer(name, layer)
        owner = owners.setdefault(storage_of(layer), name)
        if owner != name:
            row.share(owner)
        held = storages(layer.named_tensors().values())
        row.bytes_after = sum(size for key, size in held.items() if key not in seen)
        seen.update(held)
        rows.append(row)
    return rows


LARGE_ERROR = 0.3  # of a weight: what little is left of it is not its own


@dataclass
class Report:
    """A table (``str``; in notebooks HTML) and a dictionary (:meth:`to_dict`) of a model's packed layers.

    ``total_before`` and ``total_after`` count every storage of the model's parameters and buffers once, in bytes.

    Attributes:
        rows: one per packed layer.
        skipped: layers that stay float, and what is untied from a packed one: name -> reason.
        kept: float tensors of more than 1 % of the model's bytes, with the reason.
    """

    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    total_before: int = 0
    total_after: int = 0
    kept: list[Kept] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: nn.Module, rows: list[Row], packed: Iterable[nn.Module], skipped: dict[str, str],
        before: int, after: int,
    ) -> Report:  # fmt: skip
        """With what stays float in the modules of ``model`` that are not in ``packed``."""
        kept = kept_float(model, packed, skipped, SHARE * min(before, after))
        return cls(rows, dict(skipped), before, after, kept)

    @property
    def ratio(self) -> float:
        """How many times smaller the model is."""
        return self.total_before / self.total_after if self.total_after else 1.0

    def by_family(self) -> dict[str, dict[str, Any]]:
        """``{family: {"layers", "bytes_before", "bytes_after", "bits_per_weight"}}``, the bits those of its weights."""
        families: dict[str, list[Row]] = {}
        for row in self.rows:
            families.setdefault(row.family, []).append(row)
        summary = {}
        for family, rows in families.items():
            weights = sum(row.weights for row in rows if row.shares is None)
            after = sum(row.bytes_after for row in rows)
            summary[family] = {
                "layers": len(rows),
                "bytes_before": sum(row.bytes_before for row in rows),
                "bytes_after": after,
                "bits_per_weight": 8 * after / weights if weights else 0.0,
            }
        return summary

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``layers``, ``families``, ``kept``, ``skipped``, ``total_before``, ``total_after``, ``ratio``."""
        return {
            "layers": [asdict(row) for row in self.rows],
            "families": self.by_family(),
            "kept": [asdict(kept) for kept in self.kept],
            "skipped": dict(self.skipped),
            "total_before": self.total_before,
            "total_after": self.total_after,
            "ratio": self.ratio,
        }

    def _table(self) -> list[list[str]]:
        """The cells, the header first."""
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
        return table

    def _summary(self) -> list[str]:
        """A line for each family, and one for the model."""
        lines = []
        for family, s in self.by_family().items():
            layers = f"{s['layers']} layer{'s' if s['layers'] > 1 else ''}"
            lines.append(
                f"{family}: {layers}, {format_bytes(s['bytes_before'])} -> {format_bytes(s['bytes_after'])}, "
                f"{s['bits_per_weight']:.2f} bits per weight"
            )
        return [*lines, self._total()]

    def _total(self) -> str:
        smaller = f"{self.ratio:.2f}x smaller" if self.total_after <= self.total_before else (
            f"LARGER by {format_bytes(self.total_after - self.total_before)}")  # fmt: skip
        return (
            f"total: {format_bytes(self.total_before)} -> {format_bytes(self.total_after)} "
            f"({smaller}), {len(self.rows)} layers packed"
        )

    def _remarks(self) -> list[str]:
        """What a reader should know besides the table, a line each."""
        lines = []
        large = {row.name: row.weight_error for row in self.rows if (row.weight_error or 0) > LARGE_ERROR}
        if large:
            worst = max(large, key=lambda name: large[name] or 0)
            lines.append(
                f"warning: the weight error is above {LARGE_ERROR} in {_names(list(large))}: "
                f"{large[worst]:.2f} in {worst or '(model)'}"
            )
        listed = set()
        for kept in self.kept:
            layer = kept.name.removesuffix(".weight")
            name = layer if layer in self.skipped else kept.name
            listed.add(name)
            share = f"{100 * kept.bytes / self.total_after:.0f} % of the model"
            lines.append(f"float: {name}: {kept.reason} ({format_bytes(kept.bytes)}, {share})")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            if name not in listed:
                by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            lines += [f"float: {text}: {reason}" for text in _together(names)]
        for note in dict.fromkeys(row.note for row in self.rows if row.note):
            names = [row.name or "(model)" for row in self.rows if row.note == note]
            lines.append(f"note: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {note}")
        return lines

    def __str__(self) -> str:
        return "\n".join([*_align(self._table()), *self._remarks(), *self._summary()])

    def _repr_html_(self) -> str:
        header, *cells = [[html.escape(cell) for cell in row] for row in self._table()]
        rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        head = "<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"
        *families, total = [html.escape(line) for line in self._summary()]
        remarks = "".join(f"<li>{line}</li>" for line in (*families, *map(html.escape, self._remarks())))
        is_open = " open" if len(cells) <= _OPEN_UP_TO else ""
        return (
            f"<b>{total}</b><ul>{remarks}</ul>"
            f"<details{is_open}><summary>{len(cells)} layers</summary>"
            f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></details>"
        )


_OPEN_UP_TO = 20  # rows of a table that is shown without being asked for


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name or "(model)" for name in names[:3]) + more


def _together(names: list[str]) -> list[str]:
    """Few names a line each, many of them in one."""
    return [_names(names)] if len(names) > 3 else [name or "(model)" for name in names]


def warn_if_larger(before: int, after: int, stacklevel: int) -> None:
    """Say where a conversion made a model larger: a float copy of a tied weight, or groups that are too small."""
    if after > before:
        warnings.warn(
            f"the model is larger now, by {format_bytes(after - before)}: {format_bytes(before)} -> "
            f"{format_bytes(after)}; print(lowbit.report(model)) says where",
            stacklevel=stacklevel + 1,
        )


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
    require_model(model)
    found = layers(model)
    if not found:
        raise ValueError("the model has no packed layer: convert it first")
    skipped = skipped_in(model)
    rows = {row.name: row for row in rows_of(found)}
    for name in with_float_copies(skipped) & rows.keys():
        if found[name].bytes_before is None:  # loaded: files do not say it
            rows[name].bytes_before -= rows[name].weights * found[name].dtype.itemsize
    if batch is not None:
        for name, inputs in layer_inputs(model, found, batch).items():
            _measure(rows[name], found[name], inputs, reference)
    after = nbytes(model)
    before = after + sum(row.bytes_before - row.bytes_after for row in rows.values())
    return Report.of(model, list(rows.values()), (), skipped, before, after)


def layer_inputs(model: nn.Module, found: dict[str, Layer], batch: Any) -> dict[str, Tensor]:
    """The first input that each linear receives when the model runs on ``batch``."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            inputs.setdefault(name, x.detach())

        return hook

    linears = {name: layer for name, layer in found.items() if layer.kind == "linear"}
    handles: list[RemovableHandle] = []
    training = [module for module in model.modules() if module.training]
    try:
        for name, layer in linears.items():
            handles.append(layer.register_forward_pre_hook(keep(name), with_kwargs=True))
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
