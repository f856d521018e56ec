"""The time of an experiment's training steps against plain steps and the official method."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import NormTest
from ..benchmark.engine import Case, run_case
from ..benchmark.official import vmap_grad
from ..benchmark.records import Record
from ..benchmark.step_cases import Task as Step
from ..benchmark.step_cases import images, ours, plain
from . import models
from .errors import UsageError
from .tasks import Task

BATCHES = (8, 64, 512)
"""No larger than the micro-batches of the task."""
MEMORY = 2 << 30
"""Bytes that the official method's per-sample gradients may take; larger batches are left out."""
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
VARIANTS = {"AdAdaGrad, norm test": ours(NormTest(0.1)), "official code's way": vmap_grad(False)}


def measure(name: str, task: Task, results: Path, threads: int = 1, seconds: float = 5.0) -> str:
    """Times training steps on equal work at several batch sizes; writes speed.jsonl and speed.md.

    The plain step, `torch.optim.Adagrad(fused=True)`, takes turns with AdAdaGrad and with the
    official method, and after one step all results are compared. Random images.

    Args:
        name: of the experiment.
        task: the experiment.
        results: folder of the files, made if need be.
        threads: of torch.
        seconds: for the turns of each variant.

    Returns:
        The table.

    Raises:
        UsageError: a folder that cannot be written to.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        records = [r for case in cases(name, task) for r in run_case(case, seconds)]
    finally:
        torch.set_num_threads(before)
    text = table(records)
    try:
        results.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(r.as_dict(), ensure_ascii=False) + "\n" for r in records)
        (results / "speed.jsonl").write_text("".join(lines))
        (results / "speed.md").write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write to {results}: {error.strerror}") from error
    return text


def cases(name: str, task: Task) -> Iterator[Case]:
    """One case a batch size."""
    shape = SHAPES[task.base.dataset]
    build = partial(models.build, task.base.model, shape, 10)
    size = sum(p.numel() for p in build().parameters())
    for batch in sorted({min(b, task.base.max_micro_batch_size) for b in BATCHES}):
        if 4 * size * batch > MEMORY:
            continue
        yield Case(
            f"experiment/{name}/{batch}", f"{size:,} parameters", batch,
            partial(_step, build, shape, batch), {"plain": plain(fused=True)}, VARIANTS,
        )  # fmt: skip


def _step(build: Any, shape: tuple[int, int, int], batch: int) -> Step:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Step(build, *images(*shape)(batch))


def table(records: Sequence[Record]) -> str:
    """A Markdown table, a line a batch size: milliseconds a step, ratio to the plain one."""
    lines = [
        f"| batch | plain step (ms) | {' | '.join(f'{v} (ms, ratio)' for v in VARIANTS)} |",
        "|" + " ---: |" * (2 + len(VARIANTS)),
    ]
    for batch in dict.fromkeys(r.batch for r in records):
        found = {r.variant: r for r in records if r.batch == batch}
        cells = [f"{batch}", _milliseconds(found["plain"].p50)]
        for variant in VARIANTS:
            r = found.get(variant)
            measured = r is not None and r.ratio is not None
            cells.append(f"{_milliseconds(r.p50)}, {r.ratio:.2f}" if r and measured else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.3g}"
