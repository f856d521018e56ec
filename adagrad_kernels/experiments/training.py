"""One training run: settings in; a log, a summary and a checkpoint out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..distributed import Ranks
from ..loggers import TensorBoardLogger
from . import checkpoint, progress
from .data import load as load_data
from .errors import Interrupted, UsageError
from .run_state import RunState
from .settings import CHANGEABLE, TrainingRun
from .signals import StopAtStepEnd


def run(
    settings: TrainingRun,
    folder: Path,
    name: str = "",
    checkpoint_every: int = 0,
    resume: bool = False,
    checkpoint_seconds: float = math.inf,
    tensorboard: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains and writes `log.jsonl`, `summary.json` and `checkpoint.pt` into the folder.

    The log has one record a step: step and samples after it, batch_size, micro_batches, the
    batch's mean loss, lr, grad_norm_sq ‖ḡ‖², variance_trace tr Σ̂, ratio and suggestion of the
    test, noise_scale; reason, why a step could not be tested (empty if it was); accuracy on the
    validation data, where it was measured: at the end of each epoch and of the run. What is not
    measured, or not finite, is null. A step whose statistics are not finite leaves the batch
    size as it is, and says so in reason.

    Where `torch.distributed` is initialised, all its processes call this and train on the same
    batches; the first one writes.

    Args:
        settings: what to train.
        folder: where to write; made if need be.
        name: shown with the progress, by default the optimizer's.
        checkpoint_every: steps between checkpoints, 0 for one at the end only. One is also
            written when SIGINT or SIGTERM stops the run.
        resume: continue from the folder's checkpoint, or anew if the run ended before its first
            one. Log and weights become those of a run that was never interrupted. A finished run
            that goes on keeps in its log what was measured where it had ended.
        checkpoint_seconds: seconds between checkpoints, beside checkpoint_every.
        tensorboard: also write the log's numbers for TensorBoard, into the folder `tensorboard`.
        overwrite: replace the run that the folder holds, finished or not, or a log of one's own.

    Returns:
        The summary: what `summary.json` holds.

    Raises:
        UsageError: what a user can mend; another process that trains in the folder.
        Interrupted: stopped by a signal, after the checkpoint.
    """
    if checkpoint_every < 0:
        raise UsageError(f"checkpoint-every must not be negative, got {checkpoint_every}")
    new = not (resume or overwrite)
    checkpoint.check_free(folder)
    saved = _checkpoint(settings, folder) if resume else None
    if new:
        checkpoint.check_unused(folder, asdict(settings), CHANGEABLE)
    Ranks().barrier()  # nobody writes before all have looked
    with _threads(settings.threads or (1 if settings.dataset == "digits" else 0)):
        state = RunState(settings, load_data(settings.dataset, _path(settings.data_dir)))
        if saved is not None:
            state.restore(saved, folder)
        elif resume and state.writes:
            progress.say(f"{folder} has no checkpoint yet: its run begins anew")
        with _log(state, folder) as log, _scalars(state, folder, tensorboard):
            if log is not None:
                _begin(state, folder, log, new)
            _train(state, folder, log, name, checkpoint_every, checkpoint_seconds)
            summary = {"settings": asdict(settings), "finished": True, **state.results()}
            if log is not None:
                checkpoint.write_summary(folder, summary)
    return summary


def _checkpoint(settings: TrainingRun, folder: Path) -> dict[str, Any] | None:
    """Where a run of these settings goes on; None is its first step."""
    begun_with, saved = checkpoint.ended_early(folder), None
    if begun_with is None:
        saved = checkpoint.read(folder)
        begun_with = saved["settings"]
    checkpoint.check_settings(begun_with, asdict(settings), CHANGEABLE, folder)
    return saved


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Sets the number of threads for a while; 0 leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _log(state: RunState, folder: Path) -> AbstractContextManager[checkpoint.Log | None]:
    """The log, which keeps other processes out; on the process that writes."""
    return checkpoint.Log(folder) if state.writes else nullcontext()


def _begin(state: RunState, folder: Path, log: checkpoint.Log, new: bool) -> None:
    settings = asdict(state.settings)
    if new:  # looked at again: another process may have trained here since
        checkpoint.check_unused(folder, settings, CHANGEABLE)
    log.begin(state.log_bytes)
    checkpoint.write_summary(folder, {"settings": settings, "finished": False})


def _train(
    state: RunState,
    folder: Path,
    log: checkpoint.Log | None,
    name: str,
    checkpoint_every: int,
    checkpoint_seconds: float,
) -> None:
    settings = state.settings
    saved = time.monotonic()
    with StopAtStepEnd() as stop, closing(_progress(state, folder, name)) as shown:
        state.watch.start()
        while state.samples < settings.samples and not state.failed:
            state.step(log)
            shown.show(min(state.samples, settings.samples), state.status())
            stopping = state.any_rank(stop.asked)
            by_steps = checkpoint_every and state.steps % checkpoint_every == 0
            if stopping or by_steps or time.monotonic() - saved > checkpoint_seconds:
                with state.watch.stopped():
                    state.save(log, folder)
                saved = time.monotonic()
            if stopping:
                raise Interrupted(folder / checkpoint.NAME)
        state.watch.stop()
        state.save(log, folder)


@contextmanager
def _scalars(state: RunState, folder: Path, wanted: bool) -> Iterator[None]:
    if not (wanted and state.writes):
        yield
        return
    try:
        logger = TensorBoardLogger(folder / "tensorboard", state.steps, state.samples)
    except ImportError as error:
        raise UsageError(str(error)) from error
    with logger as state.scalars:
        yield


def _progress(state: RunState, folder: Path, name: str) -> progress.Progress:
    done, total = state.samples, state.settings.samples
    if not state.writes:
        return progress.Progress()
    if done >= total:
        progress.say(
            f"nothing to train: {folder} has {done:,} samples already, --samples {total} asks for "
            "no more"
        )
        return progress.Progress()
    return progress.begin(name or state.settings.optimizer, done, total)


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None
