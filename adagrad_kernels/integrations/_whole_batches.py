"""For `integrations.transformers`: batches as lists of micro-batches, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, cast

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from ..data import AdaptiveDataLoader
from ._shared import adaptive_optimizer


class WholeBatches:
    """The batches of a loader as lists of micro-batches.

    Args:
        loader: serves the micro-batches.
        sized: whether `len` answers; transformers relies on it.

    Attributes:
        loader: the same.
        dataset: of the loader.
        first: samples that had been served when training began.
    """

    def __init__(self, loader: AdaptiveDataLoader, sized: bool) -> None:
        self.loader, self.dataset, self.first = loader, loader.dataset, 0
        self._sized = sized

    def __iter__(self) -> Iterator[list[Any]]:
        batch = []
        for micro_batch in self.loader:
            batch.append(micro_batch)
            if self.loader.batch_complete:
                yield batch
                batch = []

    def __len__(self) -> int:
        """The most batches that an epoch can have."""
        if not self._sized:
            raise TypeError("the number of batches is not known")
        controller = self.loader.controller
        least = controller.initial_batch_size
        if not controller.monotone:
            least = min(least, controller.min_batch_size)
        return -(-self.samples_of(1) // least)

    def samples_of(self, epochs: float) -> int:
        """Samples of so many passes over the dataset."""
        return math.ceil(epochs * len(cast(Sized, self.dataset)))


class AdaptiveBatchState(TrainerCallback, ExportableState):
    """Counts epochs by samples, and keeps the loader's position in the trainer's checkpoints;
    `AdaptiveBatchTrainer` adds it.
    """

    def __init__(self) -> None:
        self.loader: dict[str, Any] | None = None
        self._batches: WholeBatches | None = None

    def state(self) -> dict[str, Any]:
        """The loader's position, for the checkpoint."""
        if self._batches is not None:
            self.loader = self._batches.loader.state_dict()
        return {"args": {}, "attributes": {"loader": self.loader}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the loader to where the checkpoint was, if there is one."""
        batches: WholeBatches = kwargs["train_dataloader"]
        self._batches = batches
        if state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__)  # type: ignore[union-attr]
            if not saved:
                raise ValueError(
                    "the checkpoint is not of an AdaptiveBatchTrainer: it does not say which "
                    "samples come next"
                )
            batches.loader.load_state_dict(cast("dict[str, Any]", saved)["attributes"]["loader"])
            if args.max_steps <= 0 and state.global_step // len(batches) > batches.loader.epoch:
                raise ValueError("resume with an optimizer of the batch_size it was begun with")
        batches.first = batches.loader.samples

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts epochs by samples, and ends the training after the last."""
        assert self._batches is not None
        optimizer = adaptive_optimizer(kwargs["optimizer"])
        if not optimizer.updated:
            raise RuntimeError(
                f"the loader has served a batch of {optimizer.batch_size} samples, but fewer "
                "reached the model: training_step must use all of them"
            )
        served = self._batches.loader.samples
        state.epoch = served / self._batches.samples_of(1)
        if args.max_steps <= 0 and served >= self._batches.samples_of(args.num_train_epochs):
            control.should_training_stop = True
