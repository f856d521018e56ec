"""What a benchmark case is, how its variants are timed against each other, what is recorded."""

from __future__ import annotations

import ctypes
import fnmatch
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import UnsupportedLayerError
from ..timing import take_turns
from .records import WRONG, Record


class Variant(NamedTuple):
    """One way to do a case's work.

    Attributes:
        run: does the work once; the time of this call is what is measured.
        check: raises AssertionError if the work comes out wrong; called once, before `run`.
    """

    run: Callable[[], Any]
    check: Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One piece of work and the ways to do it.

    Attributes:
        name: "kind/what", unique.
        shape: the sizes, for people.
        batch: samples, 0 where there are none.
        inputs: makes what all variants share.
        plain: PyTorch's own ways; the fastest is the baseline of all ratios. Each takes the
            inputs and makes the variant.
        variants: ours, and other libraries'.
    """

    name: str
    shape: str
    batch: int
    inputs: Callable[[], Any]
    plain: Mapping[str, Callable[[Any], Variant]]
    variants: Mapping[str, Callable[[Any], Variant]]


class Unavailable(Exception):
    """Raised by a maker whose variant cannot exist here; the message says why."""


def require_equal(
    what: str,
    found: Tensor,
    plain: Tensor,
    truth: Tensor,
    scale: Tensor | None = None,
    roundings: int = 8,
) -> None:
    """Asserts that `found` is as near to the truth as plain PyTorch is, to a factor of two.

    Args:
        what: named in the error.
        found: the variant's result.
        plain: plain PyTorch's result in the same precision.
        truth: the result in float64.
        scale: the size of what was added up, where it is larger than the truth.
        roundings: how many ε of that size are allowed in any case.

    Raises:
        AssertionError: if max |found − truth| is more than 2 max |plain − truth| and more than
            roundings · ε max |scale|.
    """
    if found.shape != truth.shape:
        raise AssertionError(f"{what}: shape {list(found.shape)}, expected {list(truth.shape)}")
    error = (found.double() - truth).abs().max().item()
    size = (truth if scale is None else scale).abs().max().item()
    rounding = roundings * torch.finfo(plain.dtype).eps * size
    allowed = max(2 * (plain.double() - truth).abs().max().item(), rounding)
    if not error <= allowed:
        raise AssertionError(f"{what}: off by {error:.3g}, at most {allowed:.3g} was expected")


def check_results(
    results: Callable[[], Sequence[Tensor]], plain: Any, truth: Any
) -> Callable[[], None]:
    """A check that compares lists of results."""

    def check() -> None:
        found = results()
        for i, triple in enumerate(zip(found, plain, truth, strict=True)):
            require_equal(f"result {i}", *triple)

    return check


def peak_memory(run: Callable[[], Any]) -> int | None:
    """Bytes that a call needs beyond those in use before it, at its peak; None if unknown.

    Linux counts the pages that the process holds, scratch memory of kernels included.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def run_case(case: Case, seconds: float) -> Iterator[Record]:
    """Measures every variant of a case, the plain ones first.

    Args:
        case: see `Case`.
        seconds: for the turns of each variant with the baseline.

    Yields:
        one record a variant; no times for one whose results are wrong or that cannot exist here.
        Only those of the plain ones if not one of them gives times.
    """
    inputs = case.inputs()
    plain: dict[str, Callable[[], Any]] = {}
    for name, make in case.plain.items():
        made = _make(case, name, make, inputs)
        if isinstance(made, Record):
            yield made
        else:
            plain[name] = made
    if not plain:
        return
    times = take_turns(plain, seconds)
    baseline = min(times, key=lambda name: statistics.median(times[name]))
    for name in plain:
        yield _record(case, name, times[name], baseline, times[baseline], peak_memory(plain[name]))
    base = plain[baseline]
    del plain
    for name, make in case.variants.items():
        made = _make(case, name, make, inputs)
        if isinstance(made, Record):
            yield made
            continue
        times = take_turns({name: made, baseline: base}, seconds)
        yield _record(case, name, times[name], baseline, times[baseline], peak_memory(made))


def _make(
    case: Case, name: str, make: Callable[[Any], Variant], inputs: Any
) -> Callable[[], Any] | Record:
    try:
        variant = make(inputs)
        variant.check()
    except (UnsupportedLayerError, Unavailable) as error:
        return Record(case.name, name, case.shape, case.batch, reason=str(error))
    except AssertionError as error:
        return Record(case.name, name, case.shape, case.batch, reason=f"{WRONG}: {error}")
    return variant.run


def _record(
    case: Case,
    name: str,
    times: Sequence[float],
    baseline: str,
    baseline_times: Sequence[float],
    memory: int | None,
) -> Record:
    p20, p50, p80 = _percentiles(times)
    b20, b50, b80 = _percentiles(baseline_times)
    return Record(
        case.name, name, case.shape, case.batch, p20, p50, p80, p50 / b50,
        baseline, b20, b50, b80, memory,
    )  # fmt: skip


def matching(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """The cases whose name contains the pattern, which may have * and ?.

    Raises:
        LookupError: if there is none.
    """
    if pattern is None:
        return list(cases)
    found = [case for case in cases if fnmatch.fnmatch(case.name, f"*{pattern}*")]
    if not found:
        names = ", ".join(case.name for case in cases)
        raise LookupError(f"no benchmark case matches {pattern!r}; there are {names}")
    return found
