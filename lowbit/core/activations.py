"""How x is held while a linear layer multiplies it: :class:`ActivationSpec`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

Activations = Literal["float", "int8", "int8_static"]
ACTIVATIONS = ("float", "int8", "int8_static")


@dataclass(frozen=True)
class ActivationSpec:
    """How x is held while it meets the weight. Specs and formats have the fields that their family has kernels for.

    Attributes:
        activations: ``"float"``: as it is; ``"int8"``: quantized per token when called; ``"int8_static"``: with one
            calibrated scale per layer.
        activation_group_size: of ``"int8"``: columns of a token that share one scale, a multiple of 32; None: all.
    """

    activations: Activations = "float"
    activation_group_size: int | None = None

    @classmethod
    def of(cls, owner: Any) -> ActivationSpec:
        """What the fields of a spec or a format say; those that it lacks have their default."""
        values: dict[str, Any] = {field.name: getattr(owner, field.name, field.default) for field in fields(cls)}
        return cls(**values)

    def fields_of(self, owner: Any) -> dict[str, Any]:
        """The fields that ``owner`` has; raises ``ValueError`` where another one is asked for."""
        known = {field.name for field in fields(owner)}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in known and value != field.default:
                families = ", ".join(_families_with(field.name, type(owner)))
                raise ValueError(
                    f"{field.name} is for the family {families}: got {field.name}={value}, family={owner.family!r}"
                )
        return {name: value for name, value in asdict(self).items() if name in known}

    def check(self, group_size: int | None, allowed: Iterable[str] = ACTIVATIONS) -> None:
        """Raise ``ValueError`` naming a field that is not valid.

        ``group_size`` is that of the weight, None for one scale per row or tensor.
        """
        if self.activations not in tuple(allowed):
            raise ValueError(
                f"activations must be one of {', '.join(map(repr, allowed))}: got activations={self.activations!r}"
            )
        size = self.activation_group_size
        if size is None:
            return
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 32:
            raise ValueError(
                f"activation_group_size must be a positive multiple of 32 or None: got activation_group_size={size!r}"
            )
        if self.activations != "int8":
            raise ValueError(
                "activation_group_size goes with activations='int8' and only with it: "
                f"got activation_group_size={size}, activations={self.activations!r}"
            )
        if group_size is not None and group_size % size and size % group_size:
            raise ValueError(
                "activation_group_size must divide group_size or be a multiple of it: "
                f"got activation_group_size={size}, group_size={group_size}"
            )

    @property
    def needs(self) -> dict[str, str]:
        """What calibration must measure for it: as :attr:`lowbit.core.family.Spec.needs`."""
        return {"x_scale": "activations='int8_static'"} if self.activations == "int8_static" else {}

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of what a layer stores for its input: it belongs to the layer, not to the weight."""
        return {"x_scale": ((1,), torch.float32)} if self.activations == "int8_static" else {}

    def describe(self) -> str:
        """``, int8 activations per 32``: what it adds to the description of a format."""
        text = {"float": "", "int8": ", int8 activations"}.get(self.activations, ", static int8 activations")
        return text if self.activation_group_size is None else f"{text} per {self.activation_group_size}"


def _families_with(field: str, format: type) -> list[str]:
    """The families whose formats have a field."""
    siblings: list[Any] = next(base for base in format.__mro__ if base.__name__ == "Format").__subclasses__()
    return sorted(sibling.family for sibling in siblings if field in sibling.__dataclass_fields__)
