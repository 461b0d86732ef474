"""Operands: the arguments of a family's ops that belong together, and what the reference does with them.

A family says by its :class:`Operands` what a weight is to its ops: the tensors and integers, their checks, the dense
form, the products and the gradients. :mod:`lowbit.backends.ops` makes the ops of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, get_origin, get_type_hints

import torch
from torch import Tensor

from lowbit.backends import gradients, layouts
from lowbit.backends.reference import (
    Outliers,
    add_outlier_products,
    add_outlier_rows,
    add_outliers,
    csr_places,
    csr_row_indices,
    embedding_weight_gradient,
    outlier_matrix,
    outliers_of,
    quantize_activations,
    row_ranges,
    unique_ids,
    without_autocast,
)
from lowbit.core.activations import ActivationSpec
from lowbit.core.outliers import column_indices

_PARTS = 4  # of a weight, or more: gradients hold one of them in float32
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
_Self = TypeVar("_Self", bound="_Arguments")


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """Fields that are consecutive arguments of an op: tensors first, then numbers, each in the order of the fields."""

    types: ClassVar[dict[str, str]] = {}  # argument name -> its type in torch's schema language
    tensor_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        hints = {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is not ClassVar}
        types = {name: _SCHEMA_TYPES[hint] for name, hint in hints.items()}
        cls.types = dict(sorted(types.items(), key=lambda item: not item[1].startswith("Tensor")))
        cls.tensor_names = tuple(name for name, type in cls.types.items() if type.startswith("Tensor"))

    @classmethod
    def of(cls: type[_Self], arguments: Collection[Any]) -> _Self:
        """From arguments in the order of :attr:`types`."""
        return cls(**dict(zip(cls.types, arguments, strict=True)))

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self.types)


@dataclass(frozen=True, kw_only=True)
class Activation(_Arguments):
    """How x is held while it meets codes: as it is, or as int8. A family with more kernels has more fields.

    ``int8``: static where ``x_scale`` (float32 ``[1]``) is given, else quantized in each call with a scale per row
    (:func:`lowbit.backends.reference.quantize_activations`).
    """

    x_scale: Tensor | None = None
    int8: bool = False

    @classmethod
    def numbers_of(cls, spec: ActivationSpec) -> tuple[Any, ...]:
        """The numbers, not the tensors, for x as ``spec`` has it, in the op's order."""
        return (spec.activations != "float",)

    def check(self, group_size: int, k: int) -> None:
        """``group_size``: that of the weight. Raises through ``torch._check``."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float ``[M, K]`` to (q, inverse scales), ``x ~ q / inverse``."""
        return quantize_activations(x, self.x_scale)


Weights = TypeVar("Weights", bound="Operands")


class Operands(_Arguments, ABC):
    """A weight ``[N, K]`` as a family's ops take it. Subclasses are frozen dataclasses of tensors and integers.

    Where :attr:`sized`, dequantize and embedding take ``in_features`` besides; ``linear`` has K from x. ``linear``
    takes the fields of :attr:`activation`, if there is one.

    Gradients and the tangent are made of differentiable operations out of place, so that they have derivatives and
    ``vmap`` in turn. They are float32, or of the dtype of what they are for where that is narrower.
    """

    family: ClassVar[str]
    sized: ClassVar[bool] = True
    differentiable: ClassVar[tuple[str, ...]]  # the tensors, where they are float, that gradients and tangents are for
    activation: ClassVar[type[Activation] | None] = None

    @property
    @abstractmethod
    def out_features(self) -> int:
        """N."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def check(self, k: int) -> None:
        """Shapes and dtypes that must agree for ``in_features=k``; raises through ``torch._check``."""

    def check_linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        """:meth:`check`, and what is multiplied."""
        self.check(x.shape[-1])
        if activation is not None:
            activation.check(getattr(self, "group_size", x.shape[-1]), x.shape[-1])

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        """``F.linear(x, W, bias)`` in the dtype of x: the reference."""

    @abstractmethod
    def dequantize(self, k: int, dtype: torch.dtype) -> Tensor:
        """W: the reference."""

    @abstractmethod
    def embedding(self, ids: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """``F.embedding(ids, W)``: the reference."""

    @abstractmethod
    def input_gradient(self, grad: Tensor, k: int) -> Tensor:
        """``dY @ W`` ``[..., K]``; for int8 activations this is the straight-through estimator."""

    @abstractmethod
    def weight_gradients(self, x: Tensor, dy: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """The gradients of tensors by name, from x ``[M, K]`` and dY ``[M, N]``."""

    @abstractmethod
    def row_gradients(self, ids: Tensor, grad: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """The gradients of tensors by name, from those of gathered rows ``[..., K]``."""

    @abstractmethod
    def dense_gradients(self, d: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """The gradients of tensors by name, from D ``[N, K]``, the gradient of W."""

    @abstractmethod
    def tangent(self, k: int, tangents: Mapping[str, Tensor]) -> Tensor:
        """float32 ``[N, K]``: where W moves when tensors move along ``tangents``, given by name."""

    # ---- of a stack: the weights of E experts in one

    def expert_rows(self, num_experts: int) -> int:
        """N of each expert; raises through ``torch._check`` where this is no stack of so many."""
        raise NotImplementedError

    def expert(self: Weights, index: int, num_experts: int) -> Weights:
        """The weight of one expert."""
        raise NotImplementedError

    def expert_linear(self, x: Tensor, bias: Tensor | None, activation: Any) -> Tensor:
        """What the reference of a stack does with the rows of one expert, whose weight this is."""
        return self.linear(x, bias, activation)

    def stack_gradients(self, d: Tensor, wanted: Collection[str], num_experts: int) -> dict[str, Tensor | None]:
        """The gradients of tensors by name, from D ``[E*N, K]``, those of the experts' weights."""
        return self.dense_gradients(d, wanted)


Coded = TypeVar("Coded", bound="CodedOperands")


@dataclass(frozen=True, kw_only=True)
class CodedOperands(Operands):
    """A weight of packed codes, with optional outliers in CSR form. What the codes mean is the subclass's part.

    ``packed``: int32, in the layout whose number is ``layout``; ``outlier_values`` ``[nnz]``, ``outlier_columns``
    ``[nnz]`` or, as pairs of bytes, uint8 ``[nnz, 2]`` (rising in a row), ``outlier_rows`` ``[N + 1]``.
    """

    packed: Tensor
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    outlier_rows: Tensor | None
    bits: int
    group_size: int
    layout: int

    min_bits: ClassVar[int]
    activation = Activation

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def tensors(self) -> list[Tensor | None]:
        return list(self)[: len(self.tensor_names)]

    @property
    def outliers(self) -> Outliers:
        return self.outlier_values, self.outlier_columns, self.outlier_rows

    def _given_outliers(self) -> tuple[Tensor, Tensor, Tensor]:
        values, columns, rows = self.outliers
        assert values is not None and columns is not None and rows is not None
        return values, columns, rows

    def without_outliers(self: Coded) -> Coded:
        return replace(self, outlier_values=None, outlier_columns=None, outlier_rows=None)

    # ---- what a subclass adds

    def decoded(self: Coded) -> Coded:
        """The same weight in a form whose tensors can be cut at any row."""
        return self

    @abstractmethod
    def _values_at(self, rows: slice | Tensor) -> dict[str, Any]:
        """The fields beside codes and outliers of some rows."""

    @abstractmethod
    def coded_part(self, k: int) -> Tensor:
        """float32 ``[N, K]`` without outliers: the definition of the format."""

    @abstractmethod
    def int8_products(self, q: Tensor, inverse: Tensor, activation: Activation) -> Tensor:
        """float32 ``[M, N]`` without outliers, from exact integer sums of ``q [M, K]``; x ~ q / inverse."""

    @abstractmethod
    def summed(self, wanted: Collection[str]) -> set[str]:
        """The names of the :meth:`sums` that the gradients of the subclass's ``wanted`` tensors are made of."""

    @abstractmethod
    def sums(self, d: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Sums of D ``[N, K]``, the float32 gradient of W, by the names of tensors of this decoded weight: each row's
        own, or one for all rows, as these tensors are. Float32 and differentiable."""

    def final_sums(self, d: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The same where nobody differentiates them: in less time, and D may be overwritten."""
        return self.sums(d, names)

    @abstractmethod
    def gradients(self, sums: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor | None]:
        """The gradients of the subclass's tensors from the sums over all rows."""

    @abstractmethod
    def coded_tangent(self, k: int, tangents: Mapping[str, Tensor]) -> list[Tensor]:
        """float32 ``[N, K]``, to be added up: where :meth:`coded_part` moves with the subclass's tensors."""

    # ---- what all of them share

    def check_codes(self, k: int) -> None:
        """``packed`` holds k codes per row, in groups of ``group_size``, in the layout it says."""
        bits, packed, group_size = self.bits, self.packed, self.group_size
        torch._check(
            self.min_bits <= bits <= 8, lambda: f"bits must be between {self.min_bits} and 8: got bits={bits}"
        )
        layout = layouts.numbered(self.layout)
        torch._check(layout is not None, lambda: f"layout must be the number of a layout: got layout={self.layout}")
        assert layout is not None
        shape = layout.row_shape(k, bits)
        torch._check(
            packed.dim() == layout.dim,
            lambda: f"packed must be {layout.dim}-d ({layout.name}): got shape {tuple(packed.shape)}",
        )
        torch._check(packed.dtype == torch.int32, lambda: f"packed must be int32: got {packed.dtype}")
        if layout is layouts.CANONICAL:
            torch._check(
                packed.shape[1] == shape[0],
                lambda: f"packed must have ceil(K/32)*bits = {shape[0]} words per row "
                f"for K={k}, bits={bits}: got {packed.shape[1]}",
            )
        torch._check(
            tuple(packed.shape[1:]) == shape,
            lambda: f"packed in {layout.name} must be [N, {', '.join(map(str, shape))}] for K={k}, bits={bits}: "
            f"got shape {tuple(packed.shape)}",
        )
        torch._check(
            1 <= group_size <= k,
            lambda: f"group_size must be between 1 and K: got group_size={group_size}, K={k}",
        )

    def codes(self, k: int) -> Tensor:
        """The codes, uint8 ``[N, K]``."""
        return self._layout().codes(self.packed, self.bits, k)

    def _layout(self) -> layouts.Layout:
        layout = layouts.numbered(self.layout)
        assert layout is not None
        return layout

    def groups(self, k: int) -> Tensor:
        """The group of each column."""
        return torch.arange(k, device=self.device) // self.group_size

    def rows(self: Coded, rows: slice) -> Coded:
        """A range of rows; it begins at a multiple of :func:`lowbit.backends.layouts.rows_together`."""
        values, columns, pointers = outliers_of(self.outliers, rows)
        return replace(
            self, packed=self.packed[rows], outlier_values=values, outlier_columns=columns, outlier_rows=pointers,
            **self._values_at(rows),
        )  # fmt: skip

    def expert_rows(self, num_experts: int) -> int:
        n = self.out_features
        torch._check(
            num_experts >= 1 and n % num_experts == 0,
            lambda: f"num_experts must divide the rows of the weight, {n}: got num_experts={num_experts}",
        )
        return n // num_experts

    def expert(self: Coded, index: int, num_experts: int) -> Coded:
        n = self.out_features // num_experts
        return self.rows(slice(index * n, (index + 1) * n))

    def gathered(self: Coded, rows: Tensor) -> Coded:
        """Some rows in any order, without their outliers."""
        layout, packed = self._layout(), self.packed
        words = packed[rows] if layout.rows is None else layout.rows(packed, rows, self.bits)
        number = self.layout if layout.rows is None else layouts.CANONICAL.number
        return replace(
            self, packed=words, outlier_values=None, outlier_columns=None, outlier_rows=None, layout=number,
            **self._values_at(rows),
        )  # fmt: skip

    def dense(self, k: int) -> Tensor:
        """The float32 weight ``[N, K]``."""
        weight = self.coded_part(k)
        add_outliers(weight, self.outliers)
        return weight

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        assert activation is not None
        n, k = self.out_features, x.shape[-1]
        rows_x = x.reshape(-1, k).float().contiguous()
        y = torch.empty(rows_x.shape[0], n, dtype=x.dtype, device=x.device)
        q = activation.quantize(rows_x) if activation.int8 else None
        whole = self.decoded()
        for rows in row_ranges(n, k):
            part = whole.rows(rows)
            with without_autocast():
                if q is not None:
                    products = part.int8_products(*q, activation)
                    add_outlier_products(products, rows_x, part.outliers)
                else:
                    products = rows_x @ part.dense(k).t()
            if bias is not None:
                products += bias[rows].float()
            y[:, rows] = products.to(x.dtype)
        return y.view(*x.shape[:-1], n)

    def dequantize(self, k: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.out_features, k, dtype=dtype, device=self.device)
        whole = self.decoded()
        for rows in row_ranges(*out.shape):
            out[rows] = whole.rows(rows).dense(k).to(dtype)
        return out

    def embedding(self, ids: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        unique, position = unique_ids(ids, self.out_features)
        dense = self.decoded().gathered(unique).coded_part(k)
        add_outlier_rows(dense, unique, self.outliers)
        return dense.to(dtype)[position].view(*ids.shape, k)

    def input_gradient(self, grad: Tensor, k: int) -> Tensor:
        """In ranges of rows of W, so that a large dense weight never exists as a whole; where it is traced or
        differentiated, with outliers in one range: cutting a CSR matrix reads row pointers, which a graph cannot."""
        n, whole = self.out_features, self.decoded()
        dy = grad.reshape(-1, n)
        dx: Tensor | None = None
        dequantize = getattr(torch.ops.lowbit, f"{self.family}_dequantize")
        final = gradients.is_final(grad, *self.tensors)
        cut = final or self.outlier_rows is None
        for rows in row_ranges(n, k, _PARTS) if cut else [slice(0, n)]:
            part = dequantize(*(whole.rows(rows) if cut else whole), k, torch.float32)
            of_part = dy.narrow(1, rows.start, rows.stop - rows.start).float()
            if dx is None:
                dx = of_part @ part
            else:
                dx = dx.addmm_(of_part, part) if final else dx + of_part @ part
            del part  # before the next is made
        assert dx is not None
        return dx.to(grad.dtype).view(*grad.shape[:-1], k)

    def weight_gradients(self, x: Tensor, dy: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """D in ranges of rows, each summed up at once, and at the places of outliers; as a whole where it is traced or
        differentiated."""
        if not gradients.is_final(x, dy, *self.tensors):
            return self.dense_gradients(dy.float().t() @ x.float(), wanted)
        found: dict[str, Tensor | None] = {}
        if names := self.summed(wanted):
            x32, whole, sums = x.float(), self.without_outliers().decoded(), gradients.RowSums()
            d: Tensor | None = None
            for rows in row_ranges(dy.shape[1], x.shape[1], _PARTS):
                of_rows = dy[:, rows].float().t()
                d = torch.mm(of_rows, x32) if d is None else torch.mm(of_rows, x32, out=d[: len(of_rows)])
                sums.add(whole.rows(rows).final_sums(d, names))
            found = self.gradients(sums.whole(lambda name: len(getattr(whole, name)) == 1), wanted)
        if "outlier_values" in wanted:
            found["outlier_values"] = gradients.sampled_products(dy, x, *self._given_outliers())
        return found

    def row_gradients(self, ids: Tensor, grad: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        """D has the rows that were gathered; all rows where it is traced or differentiated."""
        if not gradients.is_final(ids, grad, *self.tensors) or not ids.numel():
            return self.dense_gradients(embedding_weight_gradient(ids, grad, self.out_features), wanted)
        rows, position = unique_ids(ids, self.out_features)
        d = embedding_weight_gradient(position, grad, len(rows))
        of_outliers = self._outliers_among(rows, d) if "outlier_values" in wanted else None
        found: dict[str, Tensor | None] = {}
        if names := self.summed(wanted):
            whole = self.without_outliers().decoded()
            sums = whole.gathered(rows).final_sums(d, names)
            for name, t in sums.items():
                if len(getattr(whole, name)) > 1:
                    sums[name] = t.new_zeros(self.out_features, *t.shape[1:]).index_copy_(0, rows, t)
            found = self.gradients(sums, wanted)
        return found if of_outliers is None else {**found, "outlier_values": of_outliers}

    def _outliers_among(self, rows: Tensor, d: Tensor) -> Tensor:
        """The gradient of ``outlier_values`` from the gradient d of some ``rows`` of W."""
        values, columns, pointers = self._given_outliers()
        place = rows.new_full((self.out_features,), -1).index_copy_(0, rows, torch.arange(len(rows), device=d.device))
        row = place.index_select(0, csr_row_indices(pointers, len(values)))
        found = d[row.clamp(min=0), column_indices(columns)]
        return torch.where(row < 0, 0.0, found).to(values.dtype)

    def dense_gradients(self, d: Tensor, wanted: Collection[str]) -> dict[str, Tensor | None]:
        d = d.float()
        found: dict[str, Tensor | None] = {}
        if names := self.summed(wanted):
            found = self.gradients(self.decoded().sums(d, names), wanted)
        if "outlier_values" in wanted:
            values, columns, rows = self._given_outliers()
            places = csr_places(columns, rows, d.shape[1])
            found["outlier_values"] = d.reshape(-1).index_select(0, places).to(values.dtype)
        return found

    def tangent(self, k: int, tangents: Mapping[str, Tensor]) -> Tensor:
        parts = self.coded_tangent(k, tangents)
        if "outlier_values" in tangents:
            _, columns, rows = self.outliers
            assert columns is not None and rows is not None
            parts.append(outlier_matrix(tangents["outlier_values"], columns, rows, k))
        return sum(parts[1:], parts[0])
