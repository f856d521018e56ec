"""How good a model is: loss and accuracy, once or along a run."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

SUBSET = 5000
"""Samples of either data set on which the points of a curve are measured."""
CHUNK = 250
"""Samples evaluated at a time: few enough to stay in the caches."""


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset) -> tuple[float, float]:
    """(mean loss, accuracy) on a data set. Leaves no trace: no gradients, mode put back."""
    was_training = model.training
    model.eval()
    loss = correct = 0.0
    for x, y in zip(*(t.split(CHUNK) for t in dataset.tensors), strict=True):
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    model.train(was_training)
    n = len(dataset)
    return loss / n, correct / n


@dataclass(frozen=True)
class Quality:
    """Losses and accuracies of a model."""

    training_loss: float
    training_accuracy: float
    validation_loss: float
    validation_accuracy: float


QUALITIES = tuple(field.name for field in fields(Quality))


def quality(model: nn.Module, train: TensorDataset, validation: TensorDataset) -> Quality:
    """Both data sets evaluated."""
    return Quality(*evaluate(model, train), *evaluate(model, validation))


def subset(dataset: TensorDataset) -> TensorDataset:
    """The same `SUBSET` samples in every run, all of a smaller data set."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:SUBSET]
    return TensorDataset(*(t[order.to(t.device)] for t in dataset.tensors))


class Curve:
    """The quality of a model at numbers of samples that are known beforehand.

    Half of them are spaced evenly, half evenly on a logarithmic scale: the first steps, in which
    most is learned, are seen as well as the end.

    Args:
        number: about how many; 0 for none.
        first: samples of the first step.
        samples: of the whole run.

    Attributes:
        points: what was measured, in order.
    """

    def __init__(self, number: int, first: int, samples: int) -> None:
        self.points: list[dict[str, Any]] = []
        half = -(-number // 2)
        wanted = (np.linspace(0, samples, half + 1)[1:], np.geomspace(first, samples, half))
        found = np.unique(np.concatenate(wanted).astype(int)) if number else ()
        self._due = [int(n) for n in found]

    def due(self, before: int, now: int) -> bool:
        """Whether a step from so many samples to so many reached the next of them."""
        return bisect_right(self._due, now) > bisect_right(self._due, before)
