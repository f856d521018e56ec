"""Ctrl-C and SIGTERM, heard at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStepEnd:
    """While entered, the first signal only sets `asked`; the second acts as it always does."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAtStepEnd:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {s: signal.signal(s, self._ask) for s in SIGNALS}
        return self

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
