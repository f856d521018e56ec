"""What an observer measures, and how: records that print as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CoverageRecord:
    """How one parameter is measured.

    Attributes:
        name: the parameter's name in the model.
        layer: class of the layer that owns it.
        method: how its statistics are computed, empty if they are not.
        reason: why not, empty if they are.
    """

    name: str
    layer: str
    method: str
    reason: str = ""


class Coverage(list[CoverageRecord]):
    """A list of records that prints as a table."""

    def __str__(self) -> str:
        """One line a parameter."""
        rows = [("parameter", "layer", "method")]
        rows += [(r.name, r.layer, r.method or f"not measured: {r.reason}") for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)
