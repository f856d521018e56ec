"""Which torch the package runs under: pyproject.toml says so, the build reads it there."""

import re
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


# Python 3.10 has no TOML parser.
_found = re.search(r'"(torch>=([\d.]+),<([\d.]+))"', _PYPROJECT.read_text(encoding="utf-8"))
REQUIREMENT = _found[1]
OLDEST, TOO_NEW = _release(_found[2]), _release(_found[3])


def fits(version: str) -> bool:
    """Whether the package runs under this torch."""
    return OLDEST <= _release(version) < TOO_NEW
