"""The same training four ways: two fixed batch sizes, AdAdaGrad, AdAdaGradNorm."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..distributed import Ranks
from . import checkpoint, report
from .errors import Interrupted, UsageError, WriteError
from .settings import CHANGEABLE, LARGE_BATCH_LEARNING_RATE, LEARNING_RATES, TrainingRun
from .training import run


def four_ways(base: TrainingRun, lr: float | None = None) -> dict[str, TrainingRun]:
    """The four runs by name. Seed, model, data and number of samples are the same for all.

    The small fixed batch is the first one of the adaptive runs, the large one their cap. The
    fixed batches are trained with AdaGrad.

    Args:
        base: everything else.
        lr: for all four; where it is None, each has the one that was best for it on digits.
    """
    small, large = base.batch_size, base.max_batch_size
    ways = {
        f"fixed-{small}": replace(base, optimizer="adagrad", batch_size=small),
        f"fixed-{large}": replace(base, optimizer="adagrad", batch_size=large),
        "adadagrad": replace(base, optimizer="adadagrad"),
        "adadagradnorm": replace(base, optimizer="adadagradnorm"),
    }
    rates = {name: LEARNING_RATES[way.optimizer] for name, way in ways.items()}
    rates[f"fixed-{large}"] = LARGE_BATCH_LEARNING_RATE
    return {name: replace(way, lr=rates[name] if lr is None else lr) for name, way in ways.items()}


def compare(
    runs: dict[str, TrainingRun],
    folder: Path,
    checkpoint_every: int = 0,
    resume: bool = False,
    tensorboard: bool = False,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Trains them one after the other, each in its folder below the given one.

    Args:
        runs: by name.
        folder: gets `summary.json` and `comparison.png`, too.
        checkpoint_every: as in `run`.
        resume: go on with what an interrupted comparison had begun, keep what it had finished.
        tensorboard: as in `run`.
        overwrite: replace the runs that the folder holds, finished or not.

    Returns:
        The summaries by name.

    Raises:
        UsageError: what a user can mend.
        Interrupted: stopped by a signal.
    """
    report.check()
    _check_folder(runs, folder, resume, overwrite)
    summaries = {}
    for name, settings in runs.items():
        begun = resume and checkpoint.begun(folder / name)
        try:
            summaries[name] = run(
                settings,
                folder / name,
                name,
                checkpoint_every,
                begun,
                tensorboard=tensorboard,
                overwrite=overwrite,
            )
        except (Interrupted, WriteError):
            if overwrite and Ranks().index == 0:  # resuming must not go on with the old runs
                for later in list(runs)[len(summaries) + 1 :]:
                    checkpoint.remove(folder / later)
            raise
    if Ranks().index == 0:
        checkpoint.write_summary(folder, {"runs": summaries})
        report.picture([folder / name for name in runs], folder / "comparison.png")
    return summaries


def _check_folder(
    runs: dict[str, TrainingRun], folder: Path, resume: bool, overwrite: bool
) -> None:
    """That all of the runs can be trained or gone on with; before the first, not after it."""
    for name in runs:
        checkpoint.check_free(folder / name)
    if resume and not any(checkpoint.begun(folder / name) for name in runs):
        raise UsageError(f"nothing to resume: {folder} holds none of {', '.join(runs)}")
    if overwrite:
        return
    summary = folder / checkpoint.SUMMARY
    if summary.exists() and "runs" not in checkpoint.read_summary(folder):
        raise UsageError(
            f"{summary} is not a comparison's: choose another --out, or replace it with --overwrite"
        )
    if not resume:
        for name, settings in runs.items():
            checkpoint.check_unused(folder / name, asdict(settings), CHANGEABLE)
