"""What is recorded of a measurement: one JSON object a line, and a line for people."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _library
from .._version import __version__

WRONG = "wrong result"
"""How the reason of a variant begins whose results are wrong."""


def cpu_model() -> str:
    """The processor's model name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def instruction_set() -> str:
    """That of the compiled kernels; "none" if they are not loaded."""
    return _library.instruction_set() or "none"


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")


@dataclass(frozen=True)
class Record:
    """The result of one variant of one case.

    Attributes:
        name: of the case.
        variant: of the variant.
        shape: the sizes, for people.
        batch: samples, 0 where there are none.
        p20: seconds, 20 % of the calls were faster; p50 and p80 likewise. None if not measured.
        p50: median.
        p80: see p20.
        ratio: p50 over baseline_p50.
        baseline: the plain variant that this one took turns with.
        baseline_p20: that one's seconds in those turns; baseline_p50 and baseline_p80 likewise.
        baseline_p50: median.
        baseline_p80: see p20.
        memory: bytes that one call needs beyond those in use before it, at its peak; None where
            that cannot be measured. What the process keeps (weights, state) is not in it.
        reason: why there are no times, "wrong result: …" among others; empty if there are.
        torch_version: of PyTorch.
        version: of adagrad_kernels.
        threads: used by torch.
        cpu: the processor's model.
        isa: instruction set of the compiled kernels; "none" if they are not loaded.
        date: ISO 8601, UTC.
    """

    name: str
    variant: str
    shape: str
    batch: int
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    baseline: str | None = None
    baseline_p20: float | None = None
    baseline_p50: float | None = None
    baseline_p80: float | None = None
    memory: int | None = None
    reason: str = ""
    torch_version: str = torch.__version__
    version: str = __version__
    threads: int = field(default_factory=torch.get_num_threads)
    cpu: str = field(default_factory=cpu_model)
    isa: str = field(default_factory=instruction_set)
    date: str = field(default_factory=now)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        """The line for people: ratio, times, memory."""
        if self.p20 is None or self.p50 is None or self.p80 is None:
            return f"  {self.variant:34}  not measured: {self.reason}"
        memory = "" if self.memory is None else f"  {self.memory / 2**20:8.1f} MiB"
        times = f"{self.p50 * 1e3:9.3f} ms ({self.p20 * 1e3:.3f} to {self.p80 * 1e3:.3f})"
        return f"  {self.variant:34}  {self.ratio:7.3f} of {self.baseline:22}  {times:34}{memory}"
