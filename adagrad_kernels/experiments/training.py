"""One training run: settings in; a log, a summary and a checkpoint out."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from tqdm import tqdm

from .. import AdaptiveDataLoader
from ..criteria import UNBOUNDED
from ..distributed import Ranks
from . import checkpoint, methods, models
from .data import Data
from .data import load as load_data
from .errors import Interrupted, UsageError
from .settings import CHANGEABLE, TrainingRun
from .signals import StopAtStepEnd


def run(
    settings: TrainingRun,
    folder: Path,
    name: str = "",
    checkpoint_every: int = 0,
    resume: bool = False,
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
        name: shown beside the progress bar.
        checkpoint_every: steps between checkpoints, 0 for one at the end only. One is also
            written when SIGINT or SIGTERM stops the run.
        resume: continue from the folder's checkpoint. Log and weights become those of a run
            that was never interrupted.

    Returns:
        The summary: what `summary.json` holds.

    Raises:
        UsageError: what a user can mend.
        Interrupted: stopped by a signal, after the checkpoint.
    """
    if checkpoint_every < 0:
        raise UsageError(f"checkpoint-every must not be negative, got {checkpoint_every}")
    saved = checkpoint.read(folder) if resume else None
    if saved is not None:
        checkpoint.check_settings(saved["settings"], asdict(settings), CHANGEABLE, folder)
    else:
        checkpoint.check_unused(folder, asdict(settings))
    Ranks().barrier()  # nobody writes before all have looked
    with _threads(settings.threads or (1 if settings.dataset == "digits" else 0)):
        state = _Run(settings, load_data(settings.dataset, _path(settings.data_dir)))
        if saved is not None:
            state.restore(saved, folder)
        _train(state, folder, name, checkpoint_every)
        results = state.results()
    summary = {"settings": asdict(settings), "finished": True, **results}
    if state.writes:
        checkpoint.write_summary(folder, summary)
    return summary


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Sets the number of threads for a while; 0 leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(state: _Run, folder: Path, name: str, checkpoint_every: int) -> None:
    settings = state.settings
    with (
        _open_log(state, folder) as log,
        StopAtStepEnd() as stop,
        _progress_bar(state, name) as bar,
    ):
        if state.writes:
            checkpoint.write_summary(folder, {"settings": asdict(settings), "finished": False})
        while state.samples < settings.samples:
            state.step(log)
            state.show(bar)
            stopping = state.any_rank(stop.asked)
            if stopping or (checkpoint_every and state.steps % checkpoint_every == 0):
                state.save(log, folder)
            if stopping:
                raise Interrupted(folder / checkpoint.NAME)
        state.save(log, folder)


def _open_log(state: _Run, folder: Path) -> TextIO:
    if not state.writes:
        return open(os.devnull, "w")
    checkpoint.make(folder)
    return checkpoint.open_log(folder, state.log_bytes)


class _Run:
    """A run between two steps."""

    def __init__(self, settings: TrainingRun, data: Data) -> None:
        self.settings = settings
        self.ranks = Ranks()
        self.writes = self.ranks.index == 0
        try:
            device = torch.device(settings.device)
            self.train = _to(data.train, device)
            self.validation = _to(data.validation, device)
        except (RuntimeError, AssertionError) as error:
            first_line = str(error).partition("\n")[0]
            raise UsageError(f"device {settings.device!r}: {first_line}") from error
        torch.manual_seed(settings.seed)
        self.model = models.build(settings.model, data.shape, data.classes).to(device)
        several = self.ranks.size > 1
        self.called = DistributedDataParallel(self.model) if several else self.model
        self.optimizer = methods.build(settings, self.called)
        try:
            self.loader = AdaptiveDataLoader(
                self.train, self.optimizer, settings.max_micro_batch_size, seed=settings.seed
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._micro_batches = iter(self.loader)
        self.steps = 0
        self.seconds = 0.0
        self.accuracy = math.nan
        self.smooth_loss = math.nan
        self.log_bytes = 0

    @property
    def samples(self) -> int:
        """Samples trained on so far."""
        return self.loader.samples

    def step(self, log: TextIO) -> None:
        """One optimizer step and its record in the log."""
        start = time.perf_counter()
        epoch = self.loader.epoch
        size, count = self.optimizer.controller.micro_batches()
        losses = []
        for _ in range(count):
            x, y = self._next()
            loss = F.cross_entropy(self.called(x), y)
            loss.backward()
            losses.append(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()
        assert self.optimizer.updated
        mean_loss = self._mean(sum(loss.item() for loss in losses) / count)
        self.seconds += time.perf_counter() - start
        self.steps += 1
        self._smooth(mean_loss, size * count)
        evaluated = self.loader.epoch > epoch or self.samples >= self.settings.samples
        if evaluated:
            self.accuracy = evaluate(self.model, self.validation)[1]
        record = {
            "step": self.steps,
            "samples": self.samples,
            "batch_size": size * count,
            "micro_batches": count,
            "loss": mean_loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self._measured(),
            "accuracy": self.accuracy if evaluated else None,
        }
        log.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")

    def _sum(self, value: float) -> float:
        """Over the processes."""
        if self.ranks.size == 1:
            return value
        device = self.train.tensors[0].device
        return self.ranks.sum_(torch.tensor(value, dtype=torch.float64, device=device)).item()

    def _mean(self, value: float) -> float:
        return self._sum(value) / self.ranks.size

    def any_rank(self, value: bool) -> bool:
        """Whether this holds on any of the processes."""
        return bool(self._sum(value))

    def _next(self) -> list[Tensor]:
        """The next micro-batch of the endless stream; the loader's own end is the epoch's."""
        micro_batch = next(self._micro_batches, None)
        if micro_batch is None:
            self._micro_batches = iter(self.loader)
            micro_batch = next(self._micro_batches)
        return micro_batch

    def _measured(self) -> dict[str, Any]:
        s, d = self.optimizer.statistics, self.optimizer.decision
        return {
            "grad_norm_sq": s and s.mean_norm_sq,
            "variance_trace": s and s.variance,
            "ratio": d and d.ratio,
            "suggestion": d.batch_size if d and d.batch_size < UNBOUNDED else None,
            "noise_scale": s and s.noise_scale.item(),
            "reason": d.reason if d else "a fixed batch is not tested",
        }

    def _smooth(self, loss: float, samples: int) -> None:
        """An average over about the last thousand samples, for the progress bar."""
        weight = 1 - math.exp(-samples / 1000) if math.isfinite(self.smooth_loss) else 1.0
        self.smooth_loss = (
            loss if weight == 1 else self.smooth_loss + weight * (loss - self.smooth_loss)
        )

    def show(self, bar: tqdm[Any]) -> None:
        """Moves the progress bar."""
        accuracy = "" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.1%}"
        size = self.optimizer.controller.batch_size
        bar.set_postfix_str(f"batch {size}, loss {self.smooth_loss:.3g}{accuracy}", refresh=False)
        bar.update(min(self.samples, self.settings.samples) - bar.n)

    def results(self) -> dict[str, Any]:
        """What the table shows."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "mean_batch_size": self.samples / self.steps,
            "final_batch_size": self.optimizer.controller.batch_size,
            "training_loss": _finite(evaluate(self.model, self.train)[0]),
            "validation_accuracy": self.accuracy,
            "seconds": self.seconds,
        }

    def save(self, log: TextIO, folder: Path) -> None:
        """Writes the checkpoint, and before it what the log still holds back."""
        if not self.writes:
            return
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "log_bytes": checkpoint.sync(log),
            "steps": self.steps,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "smooth_loss": self.smooth_loss,
        }
        checkpoint.write(folder, state)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Goes to where a checkpoint was written."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.loader.load_state_dict(state["loader"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{folder / checkpoint.NAME} is of another model or version: {reason}"
            ) from error
        torch.set_rng_state(state["rng"])
        self.log_bytes = state["log_bytes"]
        self.steps = state["steps"]
        self.seconds = state["seconds"]
        self.accuracy = state["accuracy"]
        self.smooth_loss = state["smooth_loss"]


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset) -> tuple[float, float]:
    """(mean loss, accuracy) on a data set. Leaves no trace: no gradients, mode put back."""
    was_training = model.training
    model.eval()
    loss = correct = 0.0
    for x, y in zip(*(t.split(1000) for t in dataset.tensors), strict=True):
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    model.train(was_training)
    n = len(dataset)
    return loss / n, correct / n


def _progress_bar(state: _Run, name: str) -> tqdm[Any]:
    return tqdm(
        total=state.settings.samples,
        initial=min(state.samples, state.settings.samples),
        desc=name or state.settings.optimizer,
        unit=" samples",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if state.writes else True,  # None: where nobody watches, into a file
    )


def _to(dataset: TensorDataset, device: torch.device) -> TensorDataset:
    return TensorDataset(*(t.to(device) for t in dataset.tensors))


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
