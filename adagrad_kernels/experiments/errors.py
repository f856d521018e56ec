"""What a user of the command line is told in one line instead of a traceback."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


class UsageError(Exception):
    """An argument, a file or the surroundings are not as they must be; the message is one line."""


class WriteError(UsageError):
    """A file of a run that has begun cannot be written; when it can be, the run may go on."""


class Interrupted(Exception):
    """The run was stopped by a signal, after its checkpoint was written to this path."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; the state is in {checkpoint}")


def optional(module: str, distribution: str) -> ModuleType:
    """Imports a module of the `experiments` extra.

    Raises:
        UsageError: saying how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f'{distribution} is needed here ({error}): pip install "adagrad_kernels[experiments]"'
        ) from error
