"""Time spent on training, without what is measured or written on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up wall and CPU seconds between `start` and `stop`.

    CPU seconds are those of all threads of the process. Asking for them may cost a millisecond:
    they are read where the watch stops, not at every step.

    Attributes:
        seconds: wall seconds until the last stop.
        cpu_seconds: CPU seconds until the last stop.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._start: tuple[float, float] | None = None

    def start(self) -> None:
        """Goes on."""
        self._start = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stops."""
        assert self._start is not None
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]
        self._start = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops for a while, if it runs."""
        running = self._start is not None
        if running:
            self.stop()
        try:
            yield
        finally:
            if running:
                self.start()
