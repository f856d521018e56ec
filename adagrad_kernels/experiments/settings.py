"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UsageError

LEARNING_RATES = {"adadagrad": 0.05, "adadagradnorm": 1.0, "adagrad": 0.05, "sgd": 0.1}
"""Of each optimizer, where none is given: the best of a few by the training loss of the CNN after
60,000 samples of digits, the fixed batch being one of 8."""

LARGE_BATCH_LEARNING_RATE = 0.1
"""Likewise for AdaGrad with a fixed batch of 512."""

# A run may be continued with other values of these: they do not change the steps it has made.
CHANGEABLE = ("data_dir", "samples", "device")


@dataclass(frozen=True)
class TrainingRun:
    """The settings of a run.

    Attributes:
        dataset: a name in `data.DATASETS`.
        data_dir: folder of its files, empty for digits.
        model: a name in `models.MODELS`.
        optimizer: a name in `methods.OPTIMIZERS`.
        criterion: a name in `methods.CRITERIA`; adaptive optimizers only, like the next four.
        eta: η of the norm tests.
        theta: θ of the inner-product tests.
        nu: ν of the augmented one.
        max_batch_size: cap of the batch size.
        batch_size: first batch size, or the fixed one.
        max_micro_batch_size: larger batches are accumulated from micro-batches of at most this.
        lr: learning rate.
        samples: the run ends with the step that reaches this number of samples.
        seed: of the weights and of the order of the samples.
        device: where to train, as torch names it.
        threads: of torch on the CPU; 0 for one on digits, where more only wait for each other,
            and torch's own choice otherwise.
        coordinates: aggregate of the coordinate-wise test, see `CoordinateNormTest`.
        log_every: samples between records of the log, beside those of the steps at which the
            batch size changes; 0 for a record of every step.
        evaluations: about how many times to measure losses and accuracies for a curve; 0 for the
            validation accuracy at the end of each epoch alone.
        evaluate_all: whether the losses and accuracies at the end are of all data, or those of the
            last point of the curve.
        stop_if_not_finite: whether the run ends with the first loss that is not finite.
        augment: whether training images are flipped and shifted by up to 4 pixels at random.
        warmup: samples over which the learning rate rises from 0.
        decay_until: samples at which a half cosine from lr ends at final_lr; 0: lr is constant.
        final_lr: see decay_until.

    Raises:
        UsageError: numbers out of range.
    """

    dataset: str = "digits"
    data_dir: str = ""
    model: str = "cnn"
    optimizer: str = "adadagrad"
    criterion: str = "norm"
    eta: float = 0.8
    theta: float = 0.9
    nu: float = 5.84
    max_batch_size: int = 512
    batch_size: int = 8
    max_micro_batch_size: int = 512
    lr: float = LEARNING_RATES["adadagrad"]
    samples: int = 60_000
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    coordinates: str = "max"
    log_every: int = 0
    evaluations: int = 0
    evaluate_all: bool = True
    stop_if_not_finite: bool = False
    augment: bool = False
    warmup: int = 0
    decay_until: int = 0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"samples must be at least 1, got {self.samples}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr must be a positive number, got {self.lr:g}")
        if self.threads < 0:
            raise UsageError(f"threads must not be negative, got {self.threads}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.decay_until and not 0 <= self.warmup < self.decay_until:
            raise UsageError(f"warmup {self.warmup} must be less than decay_until")

    def lr_at(self, samples: int) -> float:
        """The learning rate of a step before which so many samples were trained on."""
        if not self.decay_until:
            return self.lr
        if samples < self.warmup:
            return self.lr * samples / self.warmup
        progress = min((samples - self.warmup) / (self.decay_until - self.warmup), 1.0)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2
