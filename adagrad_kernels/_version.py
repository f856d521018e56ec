"""The version, in this one place (pyproject.toml and setup.py read it without an import)."""

__version__ = "0.1.0"
