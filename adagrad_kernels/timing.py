"""How steps are timed, in `benchmark/` and by `profiling`: in turns, with these tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .criteria import CoordinateNormTest, Criterion, InnerProductTest, NormTest

TESTS: dict[str, Criterion] = {
    "norm test": NormTest(0.1),
    "inner-product test": InnerProductTest(0.1),
    "norms + coordinates": CoordinateNormTest(0.1),
}
"""Of the steps that are timed, by what they need."""


def take_turns(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Times calls in turn, A B A B …: the seconds of each call.

    What disturbs the machine for a while disturbs all of them. A call shorter than 200 µs is
    repeated within its turn until it takes that long.

    Args:
        runs: the calls by name.
        seconds: for all turns together, warm-up not counted.
        least: turns at least.
    """
    repeats = {name: _warm_up(run, seconds) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < least or time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
        turns += 1
    return times


def _warm_up(run: Callable[[], Any], seconds: float) -> int:
    """Calls twice, if there is time; returns how many calls take 200 µs."""
    start = time.perf_counter()
    run()
    if time.perf_counter() - start < seconds:
        run()
        start = time.perf_counter()
        run()
    return max(1, round(2e-4 / (time.perf_counter() - start)))
