"""Builds the API reference from the docstrings: python docs/api.py [FOLDER] (`make docs`)."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pdoc

MODULES = (
    "adagrad_kernels",
    "adagrad_kernels.criteria",
    "adagrad_kernels.loggers",
    "adagrad_kernels.layers",
    "adagrad_kernels.costs",
    "adagrad_kernels.coverage",
    "adagrad_kernels.profiling",
    "adagrad_kernels.integrations.lightning",
    "adagrad_kernels.integrations.transformers",
    "adagrad_kernels.integrations.accelerate",
)
"""What people import from; pdoc adds the public modules in them."""

NAMESAKES = ("batch_norm", "conv", "embedding", "linear", "recurrent", "scale")
HIDDEN = tuple(f"!adagrad_kernels.functional.{name}" for name in NAMESAKES)
"""Modules that have the name of a function, which is what their package shows."""


def build(folder: Path, modules: Sequence[str] = MODULES) -> None:
    """Writes a page a module, and `index.html`."""
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*modules, *HIDDEN, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build", "docs"))
