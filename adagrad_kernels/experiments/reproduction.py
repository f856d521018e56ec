"""The runs of an experiment: every method with every seed, each in a folder of its own."""

from __future__ import annotations

import fcntl
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import UsageError
from .settings import TrainingRun
from .tasks import Task
from .training import run

CHECKPOINT_SECONDS = 60.0
SWEEP = {
    "adagrad-small": (-2.5, -1.0),
    "sgd-small": (-2.5, -0.5),
    "adagrad-large": (-3.0, -0.5),
    "sgd-large": (-1.5, 0.5),
    "adadagradnorm": (-1.0, 1.5),
}
"""Exponents of ten between which the learning rates of a method are tried."""
FEW_STEPS = ("adagrad-large", "sgd-large", "adadagradnorm")
"""Of these methods, those that need the whole budget to show what a rate is worth."""


def run_all(
    task: Task, out: Path, methods: Sequence[str], seeds: Sequence[int], **changes: Any
) -> None:
    """Trains every method with every seed, seed by seed.

    What is finished is skipped, what was interrupted goes on from its checkpoint, what another
    process is working on is left to it. A run that fails is recorded and does not stop the others.

    Args:
        task: what to train.
        out: the runs go to `out/METHOD/seed-N`.
        methods: names in `METHODS`.
        seeds: seeds.
        **changes: to the settings of all runs.

    Raises:
        Interrupted: stopped by a signal, after the checkpoint.
        UsageError: what a user can mend: data, folders, settings other than those of a run there.
    """
    for seed in seeds:
        for method in methods:
            settings = task.settings(method, seed, **changes)
            run_one(settings, run_folder(out, method, seed), f"{method}, seed {seed}")


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where a run is."""
    return out / method / f"seed-{seed}"


def run_one(settings: TrainingRun, folder: Path, name: str) -> None:
    """Trains one run if that has not been done; see `run_all`."""
    checkpoint.make(folder)
    with locked(folder / "lock") as free:
        if not free:
            _say(f"{name}: another process is working on it")
            return
        summary = checkpoint.read_summary(folder)
        if summary.get("finished"):
            checkpoint.check_settings(summary["settings"], asdict(settings), ("data_dir",), folder)
            return
        resume = checkpoint.begun(folder)
        _say(f"{name}: {'goes on' if resume else 'begins'}")
        try:
            summary = run(
                settings, folder, name, resume=resume, checkpoint_seconds=CHECKPOINT_SECONDS
            )
        except (RuntimeError, ValueError, ArithmeticError) as error:
            traceback.print_exc()
            reason = " ".join(str(error).split()) or type(error).__name__
            failure = {"settings": asdict(settings), "finished": False, "failed": reason}
            checkpoint.write_summary(folder, failure)
            _say(f"{name}: failed, {reason}")
            return
        _say(f"{name}: {_result(summary)}")


def _result(summary: dict[str, Any]) -> str:
    if summary["failed"]:
        return f"failed after {summary['samples']:,} samples, {summary['failed']}"
    return (
        f"{summary['steps']:,} steps, training loss {summary['training_loss']:.4f}, validation "
        f"accuracy {summary['validation_accuracy']:.2%}, {summary['cpu_seconds']:.0f} CPU seconds"
    )


def sweep(
    task: Task, out: Path, methods: Sequence[str], rates: Sequence[float] = (), **changes: Any
) -> str:
    """Tries learning rates with the first seed; returns a table, the best of each method marked.

    A small batch makes thousands of steps within `task.sweep_samples` samples; `FEW_STEPS` get
    the whole budget, since the best rate of 15 steps is not that of 300. The best has the least
    training loss.

    Args:
        task: what to train.
        out: the runs go to `out/METHOD/lr-X`.
        methods: names in `SWEEP`.
        rates: learning rates (default: powers of √10 within the bounds of `SWEEP`).
        **changes: to the settings of all runs.

    Raises:
        UsageError: a method that is not swept, and what `run_all` raises.
    """
    for method in methods:
        if method not in SWEEP:
            raise UsageError(f"{method} is not swept; there are {', '.join(SWEEP)}")
    lines = [
        "| method | lr | steps | training loss | validation accuracy (%) | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for method in methods:
        found: dict[float, dict[str, Any]] = {}
        samples = task.base.samples if method in FEW_STEPS else task.sweep_samples
        given = {"samples": samples, "evaluations": 1, "evaluate_all": False, **changes}
        for lr in rates or _grid(*SWEEP[method]):
            folder = out / method / f"lr-{lr:g}"
            run_one(replace(task.settings(method, 0, **given), lr=lr), folder, f"{method}, {lr:g}")
            found[lr] = checkpoint.read_summary(folder)
        losses = {lr: summary.get("training_loss") for lr, summary in found.items()}
        finite = {lr: loss for lr, loss in losses.items() if loss is not None}
        best = min(finite, key=finite.__getitem__, default=None)
        for lr, summary in found.items():
            if lr not in finite:
                ended = summary.get("failed") or summary.get("finished")
                what = "failed" if ended else "of another process"
                lines.append(f"| {method} | {lr:g} | {summary.get('steps', '')} | {what} | | |")
                continue
            accuracy = 100 * summary["validation_accuracy"]
            lines.append(
                f"| {method} | {lr:g} | {summary['steps']:,} | {finite[lr]:.4f} | {accuracy:.2f} | "
                + ("best |" if lr == best else "|")
            )
    return "\n".join(lines)


def _grid(low: float, high: float) -> list[float]:
    """1, 3, 10, 30, …: powers of √10, rounded."""
    return [float(f"{10 ** (low + i / 2):.1g}") for i in range(round(2 * (high - low)) + 1)]


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the file could be locked; it stays so until the end."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
