"""A training run between two steps: what a step does, logs, measures, and what is kept of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from .. import AdaptiveDataLoader
from ..distributed import Ranks
from ..loggers import StepLogger, finite, step_record
from . import checkpoint, methods, models
from .augmentation import augment
from .data import Data
from .errors import UsageError
from .evaluation import QUALITIES, Curve, evaluate, quality, subset
from .settings import TrainingRun
from .stopwatch import Stopwatch


class RunState:
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
        self.watch = Stopwatch()
        self.accuracy = math.nan
        self.failed = False
        self.curve = Curve(settings.evaluations, settings.batch_size, settings.samples)
        self._subsets = subset(self.train), subset(self.validation)
        self._logged = (0, 0)  # samples and batch size of the last record
        self.smooth_loss = math.nan
        self.log_bytes = 0
        self.scalars: StepLogger | None = None

    @property
    def samples(self) -> int:
        """Samples trained on so far."""
        return self.loader.samples

    def step(self, log: checkpoint.Log | None) -> None:
        """One optimizer step and its record in the log, on the process that has it."""
        epoch, before = self.loader.epoch, self.samples
        if self.settings.decay_until:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr_at(before)
        size, count = self.optimizer.controller.micro_batches()
        losses = []
        for _ in range(count):
            x, y = self._next()
            if self.settings.augment:
                x = augment(x, self.settings.seed * 1_000_000_007 + self.samples)
            loss = F.cross_entropy(self.called(x), y)
            loss.backward()
            losses.append(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()
        assert self.optimizer.updated
        mean_loss = self._mean(sum(loss.item() for loss in losses) / count)
        self.steps += 1
        self.failed = self.settings.stop_if_not_finite and not math.isfinite(mean_loss)
        self._smooth(mean_loss, size * count)
        evaluated = self._evaluate(epoch, before, size * count)
        if evaluated or self._to_be_logged(size * count):
            self._write(log, size * count, mean_loss, evaluated)

    def _evaluate(self, epoch: int, before: int, batch_size: int) -> bool:
        """Evaluates if it is time; epoch and number of samples are those before the step."""
        last = self.samples >= self.settings.samples
        if self.settings.evaluations:
            due = last or self.curve.due(before, self.samples)
            if due:
                with self.watch.stopped():
                    self.measure(batch_size)
            return due
        due = last or self.loader.epoch > epoch
        if due:
            with self.watch.stopped():
                self.accuracy = evaluate(self.model, self.validation)[1]
        return due

    def measure(self, batch_size: int) -> None:
        """A point of the curve: how far the run is, and how good the model."""
        found = asdict(quality(self.model, *self._subsets))
        self.accuracy = found["validation_accuracy"]
        point = {
            "step": self.steps,
            "samples": self.samples,
            "batch_size": batch_size,
            "seconds": self.watch.seconds,
            "cpu_seconds": self.watch.cpu_seconds,
            **found,
        }
        self.curve.points.append({key: finite(value) for key, value in point.items()})

    def _to_be_logged(self, batch_size: int) -> bool:
        samples, size = self._logged
        return self.samples - samples >= self.settings.log_every or batch_size != size

    def _write(
        self, log: checkpoint.Log | None, batch_size: int, loss: float, evaluated: bool
    ) -> None:
        decision = self.optimizer.decision
        measured = step_record(self.optimizer, loss)
        accuracy = finite(self.accuracy) if evaluated else None
        record = {
            "step": self.steps,
            "samples": self.samples,
            **measured,
            "reason": decision.reason if decision else "a fixed batch is not tested",
            "accuracy": accuracy,
        }
        if log is not None:
            log.write(json.dumps(record) + "\n")
        if self.scalars is not None:
            scalars = {**measured, "accuracy": accuracy}
            self.scalars.log(scalars, step=self.steps, samples=self.samples)
        self._logged = (self.samples, batch_size)

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

    def _smooth(self, loss: float, samples: int) -> None:
        """An average over about the last thousand samples, for `status`."""
        weight = 1 - math.exp(-samples / 1000) if math.isfinite(self.smooth_loss) else 1.0
        self.smooth_loss = (
            loss if weight == 1 else self.smooth_loss + weight * (loss - self.smooth_loss)
        )

    def status(self) -> str:
        """How the training goes, in a few words."""
        accuracy = "" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.1%}"
        size = self.optimizer.controller.batch_size
        return f"batch {size}, loss {self.smooth_loss:.3g}{accuracy}"

    def results(self) -> dict[str, Any]:
        """What the table shows, and the curve if there is one."""
        result = {
            "steps": self.steps,
            "samples": self.samples,
            "mean_batch_size": self.samples / self.steps,
            "final_batch_size": self.optimizer.controller.batch_size,
            "seconds": self.watch.seconds,
        }
        if self.settings.evaluations:
            found = {} if self.failed else self._final_quality()
            # The last step may have led astray, after the last loss that was looked at.
            self.failed |= self.settings.stop_if_not_finite and None in found.values()
            if not self.failed:
                result |= found
            result |= {"cpu_seconds": self.watch.cpu_seconds, "curve": self.curve.points}
        else:
            result["training_loss"] = finite(evaluate(self.model, self.train)[0])
            result["validation_accuracy"] = self.accuracy
        if self.settings.stop_if_not_finite:
            result["failed"] = "the loss is not finite" if self.failed else ""
        return result

    def _final_quality(self) -> dict[str, float | None]:
        """By name; None is not finite."""
        if not self.settings.evaluate_all:
            return {key: self.curve.points[-1][key] for key in QUALITIES}
        found = asdict(quality(self.model, self.train, self.validation))
        return {key: finite(value) for key, value in found.items()}

    def save(self, log: checkpoint.Log | None, folder: Path) -> None:
        """Writes the checkpoint, after the log has come to the disk."""
        if log is None:
            return
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "log_bytes": log.sync(),
            "steps": self.steps,
            "seconds": self.watch.seconds,
            "cpu_seconds": self.watch.cpu_seconds,
            "accuracy": self.accuracy,
            "smooth_loss": self.smooth_loss,
            "logged": list(self._logged),
            "curve": self.curve.points,
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
        self.watch.seconds = state["seconds"]
        self.accuracy = state["accuracy"]
        self.smooth_loss = state["smooth_loss"]
        self.watch.cpu_seconds = state.get("cpu_seconds", 0.0)
        self.curve.points = state.get("curve", [])
        samples, size = state.get("logged", (0, 0))
        self._logged = (samples, size)


def _to(dataset: TensorDataset, device: torch.device) -> TensorDataset:
    return TensorDataset(*(t.to(device) for t in dataset.tensors))
