"""Logs of training: what a step measured as a record, written as JSON lines or for TensorBoard.

    with JSONLLogger("run/log.jsonl") as logger:
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            logger.log_step(opt, loss)
            opt.zero_grad()

`adagrad-kernels plot run` draws such a log. Where several processes train together, one of them
logs. A logger of your own derives from `StepLogger`.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .criteria import UNBOUNDED
from .optim import LocalAdaptiveBatch

Record = Mapping[str, float | None]
"""Numbers by name; None where there is none."""

L = TypeVar("L", bound="StepLogger")


def step_record(opt: Any, loss: float | Tensor | None = None) -> dict[str, float | None]:
    """What is to be known of an optimizer's last update, as plain numbers.

    The names are: batch_size, the samples of the step on all processes; micro_batches that they
    came in; loss, as it is given; lr, that of the first parameter group, with what the learning
    rate policy made of it; grad_norm_sq ‖ḡ‖²; variance_trace tr Σ̂; ratio and suggestion of the
    test; noise_scale. What was not measured, or is not finite, is None: all of the last five for
    a step that was not tested.

    Args:
        opt: an optimizer of this package that has made a step.
        loss: mean loss of the step's samples.

    Raises:
        RuntimeError: no step was made yet.

    Example:
        >>> import adagrad_kernels as ak
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = ak.AdAdaGrad(model, lr=0.1, batch_size=8)
        >>> loss = model(torch.randn(8, 3)).square().mean()
        >>> loss.backward(); opt.step()
        >>> record = step_record(opt, loss)
        >>> record["batch_size"], record["micro_batches"], record["lr"]
        (8, 1, 0.1)
    """
    controller = opt.controller
    if not controller.steps:
        raise RuntimeError("no step to be logged: the optimizer has made none yet")
    tested = (
        opt.synchronised
        if isinstance(opt, LocalAdaptiveBatch)
        else (controller.steps - 1) % controller.every == 0
    )
    s, d = (opt.statistics, opt.decision) if tested else (None, None)
    groups = (opt.optimizer if isinstance(opt, LocalAdaptiveBatch) else opt).param_groups
    lr = float(groups[0]["lr"]) * controller.lr_factor
    # A step that was not tested leaves the batch size as it was.
    count = getattr(opt, "micro_batches", controller.micro_batches()[1])
    record: dict[str, float | None] = {
        "batch_size": controller.batch_size if s is None else s.batch_size,
        "micro_batches": count,
        "loss": loss.item() if isinstance(loss, Tensor) else loss,
        "lr": lr if s is None or s.lr is None else s.lr,
        "grad_norm_sq": None if s is None else s.mean_norm_sq,
        "variance_trace": None if s is None else s.variance,
        "ratio": None if d is None else d.ratio,
        "suggestion": d.batch_size if d is not None and d.batch_size < UNBOUNDED else None,
        "noise_scale": None if s is None else s.noise_scale.item(),
    }
    return {name: finite(value) for name, value in record.items()}


def finite(value: float | None) -> float | None:
    """The value, or None: JSON knows no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


class StepLogger(ABC):
    """Takes the records of a run. A context manager, which closes it."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    @abstractmethod
    def log(self, record: Record, *, step: int, samples: int) -> None:
        """Takes a record.

        Args:
            record: numbers by name.
            step: updates so far, this one included.
            samples: samples of all of them.
        """

    @abstractmethod
    def close(self) -> None:
        """Writes what is still held back; nothing can be logged then."""

    def log_step(self, opt: Any, loss: float | Tensor | None = None) -> None:
        """Logs `step_record(opt)` if `opt.step()` has just completed a batch.

        Args:
            opt: an optimizer of this package; call this after each `opt.step()`.
            loss: the micro-batch's mean loss; logged is the mean over the batch. Read from the
                device once an update.
        """
        if loss is not None:
            self._losses.append(torch.as_tensor(loss).detach())
        if not opt.updated:
            return
        record = step_record(opt)
        if self._losses:  # of a batch that was left out (loss scale) there may be more
            count = int(record["micro_batches"] or 1)
            record["loss"] = finite(torch.stack(self._losses[-count:]).mean().item())
        self._losses = []
        self.log(record, step=opt.controller.steps, samples=opt.controller.samples)

    def __enter__(self: L) -> L:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JSONLLogger(StepLogger):
    """Writes one JSON object a line: step, samples, then the record. Each line is flushed.

    Args:
        path: of the file; folders are made.
        step: of a resumed run, how many steps it had made at its checkpoint, as in
            `opt.controller.steps` after `load_state_dict`: later records of an earlier attempt
            are cut off, since they will be made again, as is a line that was half written. 0
            begins the file anew. Without it, the file must be new.

    Raises:
        FileExistsError: the file holds records, and no step was given.
        ValueError: it is cut at a step, but is no such log.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> with JSONLLogger(path) as logger:
        ...     logger.log({"loss": 0.5}, step=1, samples=8)
        >>> print(path.read_text().strip())
        {"step": 1, "samples": 8, "loss": 0.5}
    """

    def __init__(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if step is not None:
                os.truncate(self.path, _end_of_step(self.path, step))
            elif self.path.stat().st_size:
                raise FileExistsError(
                    f"{path} holds a log already: give step=opt.controller.steps of the resumed "
                    "run, step=0 to begin it anew, or another path"
                )
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, record: Record, *, step: int, samples: int) -> None:
        """See `StepLogger`."""
        values = {name: finite(value) for name, value in record.items()}
        self._file.write(json.dumps({"step": step, "samples": samples, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `StepLogger`."""
        self._file.close()


def _end_of_step(path: Path, step: int) -> int:
    """The size of a log up to and with the records of this step."""
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            cut = not line.endswith(b"\n")
            try:
                later = json.loads(line)["step"] > step
            except (ValueError, TypeError, KeyError) as error:
                # Half a record, if it comes after others or begins like one.
                if cut and (size or (line.startswith(b"{") and isinstance(error, ValueError))):
                    break
                raise ValueError(f"{path} is not a log of steps: line {number}") from error
            if cut or later:
                break
            size += len(line)
    return size


class TensorBoardLogger(StepLogger):
    """Writes scalars for TensorBoard, each against steps and against samples.

    They are two runs, `steps` and `samples`, in the folder, with tags `steps/loss`,
    `samples/loss` and so on, so that `tensorboard --logdir FOLDER` shows two groups of charts.

    Args:
        folder: of the event files.
        step: of a resumed run as in `JSONLLogger`: TensorBoard then forgets later points.
        samples: likewise, `opt.controller.samples`; both or none.

    Raises:
        ImportError: tensorboard is not installed.
        ValueError: only one of step and samples.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        step: int | None = None,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        if (step is None) != (samples is None):
            raise ValueError("a resumed run needs both, step and samples")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoardLogger needs tensorboard ({error}): pip install "
                '"adagrad_kernels[tensorboard]"'
            ) from error
        starts = {"steps": step, "samples": samples}
        self._writers = {
            axis: SummaryWriter(
                os.path.join(folder, axis), purge_step=None if start is None else start + 1
            )
            for axis, start in starts.items()
        }

    def log(self, record: Record, *, step: int, samples: int) -> None:
        """See `StepLogger`."""
        for axis, position in (("steps", step), ("samples", samples)):
            for name, value in record.items():
                if value is not None:
                    self._writers[axis].add_scalar(f"{axis}/{name}", value, position)

    def close(self) -> None:
        """See `StepLogger`."""
        for writer in self._writers.values():
            writer.close()
