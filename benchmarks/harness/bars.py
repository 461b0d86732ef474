"""What rows are held against: what is wanted, what was measured, met or missed by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """``got``, the worst of the measured rows, which is ``row``'s, against ``wanted``: at least it, or at most.

    ``got`` is None where nothing was measured.
    """

    what: str
    wanted: float
    got: float | None
    row: str = ""
    at_most: bool = False

    @property
    def missed(self) -> float:
        """By how much, relative to what is wanted; at most 0 where the bar is met."""
        assert self.got is not None
        return self.got / self.wanted - 1 if self.at_most else 1 - self.got / self.wanted

    @property
    def state(self) -> str:
        return "not measured" if self.got is None else "met" if self.missed <= 0 else "missed"

    @property
    def verdict(self) -> str:
        """The state, and by how much a bar was missed."""
        return f"missed by {max(1, round(100 * self.missed))} %" if self.state == "missed" else self.state


class Rows:
    """Rows, found by their values."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def find(self, **facts: Any) -> list[Row]:
        """Rows with these values; a tuple stands for any of its members."""
        return [row for row in self.rows if all(_is(row.get(name), wanted) for name, wanted in facts.items())]


def _is(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, tuple) else bool(value == wanted)
