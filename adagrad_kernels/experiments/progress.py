"""How far a run is, on stderr: a bar on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}"
LINE = "{desc}: {percentage:.0f}% of {total} samples in {elapsed}, {remaining} left{postfix}"
LINE_SECONDS = 20.0
"""At least so much lies between two lines, and before the first: a quick run prints none."""
SIZE = {"ncols": 79, "nrows": 23}
"""Of a terminal that says that it has 0 columns and lines: tqdm would draw nothing there."""


class Progress:
    """What is shown of a run; of this one, nothing."""

    def show(self, samples: int, status: str) -> None:
        """Shows that so many samples are done, and beside it how the training goes."""

    def close(self) -> None:
        """Ends the line."""


def begin(name: str, done: int, total: int) -> Progress:
    """Shows a run from now on.

    Args:
        name: the run's.
        done: samples that it has trained on already.
        total: samples at its end.
    """
    return (_Bar if sys.stderr.isatty() else _Lines)(name, done, total)


def say(line: str) -> None:
    """A line of its own."""
    print(line, file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, name: str, done: int, total: int) -> None:
        told = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        size: dict[str, Any] = {"dynamic_ncols": True} if told else SIZE
        self._bar = tqdm(desc=name, initial=done, total=total, bar_format=BAR, **size)

    def show(self, samples: int, status: str) -> None:
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update(samples - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines(Progress):
    """At every tenth of the run, for whoever looks into the file later."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self._name, self._initial, self._total = name, done, total
        self._tenth = 10 * done // total
        self._begun = self._told = time.monotonic()

    def show(self, samples: int, status: str) -> None:
        tenth, now = 10 * samples // self._total, time.monotonic()
        if tenth == self._tenth or now - self._told < LINE_SECONDS:
            return
        self._tenth, self._told = tenth, now
        say(
            tqdm.format_meter(
                n=samples,
                total=self._total,
                elapsed=now - self._begun,
                initial=self._initial,
                prefix=self._name,
                postfix=status,
                bar_format=LINE.replace("{total}", f"{self._total:,}"),
            )
        )
