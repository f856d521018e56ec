"""Adaptive batch sizes in Lightning: `AdaptiveBatchCallback` (`pip install
"adagrad_kernels[lightning]"`).
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..data import AdaptiveDataLoader
from ..optim.adaptive_batch import AdaptiveBatch
from ..optim.base import AdaptiveAdagrad
from ._shared import (
    AdaptiveOptimizer,
    adaptive_optimizer,
    check_loader,
    scalars,
    take_over_clipping,
)

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loops.optimization.automatic import ClosureResult
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ModuleNotFoundError(
        "adagrad_kernels.integrations.lightning needs Lightning: "
        'pip install "adagrad_kernels[lightning]"',
        name=error.name,
    ) from error


class AdaptiveBatchCallback(pl.Callback):
    """Lets Lightning's `Trainer` train with batches that grow.

    `configure_optimizers` returns `AdAdaGrad` or `AdAdaGradNorm`, or any torch optimizer, which the
    callback then wraps in `AdaptiveBatch` with the options it was given. `train_dataloader`
    returns an `AdaptiveDataLoader` of `trainer.optimizers[0]`. The trainer's loop runs the
    micro-batches; `trainer.global_step`, learning rate schedulers with `interval="step"`,
    `max_steps` and `every_n_train_steps` count batches; `batch_idx`, `limit_train_batches` and
    `val_check_interval` (an int) count micro-batches. An epoch ends with the first batch at or
    after the end of the data.

    `gradient_clip_val` is handed over to the optimizer, which clips inside its update. The
    trainer's checkpoints hold the state of optimizer, batch size and loader; a resumed run
    continues bit for bit (a batch that was unfinished starts anew). After each batch `batch_size`
    (of the next one), `samples` and `noise_scale` are logged by `self.log`.

    While it trains, the callback sets `trainer.accumulate_grad_batches` anew for each micro-batch
    (1 for the last of a batch), and `trainer.num_training_batches` is infinite, since nobody knows
    it beforehand.

    Args:
        options: `criterion`, `batch_size`, `max_batch_size` and the other arguments of
            `AdaptiveBatch`, for optimizers that are not of this package.

    Raises:
        ValueError: when training starts, for settings of the trainer that contradict batches that
            grow, naming the setting and what to do; likewise when training_step returns None.
        TypeError: a train dataloader that is no `AdaptiveDataLoader`.

    Example:
        >>> class Regression(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 1)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch[0]) - batch[1]).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return ak.AdAdaGrad(self, lr=0.1, batch_size=8, max_batch_size=64)
        ...
        ...     def train_dataloader(self):
        ...         data = TensorDataset(torch.randn(512, 4), torch.randn(512, 1))
        ...         return ak.AdaptiveDataLoader(data, self.trainer.optimizers[0])
        >>> trainer = pl.Trainer(
        ...     max_epochs=1, accelerator="cpu", callbacks=[AdaptiveBatchCallback()], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Regression())
        >>> trainer.optimizers[0].samples >= 512, trainer.optimizers[0].batch_size > 8
        (True, True)
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._optimizer: AdaptiveOptimizer | None = None
        self._loader: AdaptiveDataLoader | None = None
        self._saved: dict[str, Any] = {}
        self._clip: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what contradicts batches that grow."""
        if stage == "fit":
            _check_settings(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the optimizer adaptive if it is not, and hands clipping over to it."""
        (optimizer,) = trainer.optimizers
        if not isinstance(optimizer, AdaptiveAdagrad):
            assert isinstance(optimizer, Optimizer)
            optimizer = AdaptiveBatch(pl_module, optimizer, **self._options)
            trainer.optimizers = [optimizer]  # type: ignore[list-item]
        elif self._options:
            raise ValueError(
                f"AdaptiveBatchCallback was given {', '.join(self._options)}, but "
                f"configure_optimizers returned {type(optimizer).__name__}: give them to it"
            )
        self._optimizer = adaptive_optimizer(optimizer)
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and config.frequency != 1:
                raise ValueError(
                    f'a learning rate scheduler has interval="step", frequency={config.frequency}'
                    ", which Lightning counts in micro-batches: leave the frequency at 1"
                )
        self._clip = trainer.gradient_clip_val  # type: ignore[assignment]
        take_over_clipping(self._optimizer, self._clip, "Trainer(gradient_clip_val)")
        trainer.gradient_clip_val = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the loader to where the checkpoint was, if there is one."""
        assert self._optimizer is not None
        self._loader = check_loader(trainer.train_dataloader, self._optimizer, "train_dataloader")
        if self._saved:
            self._loader.load_state_dict(self._saved["loader"])
            self._saved = {}
        trainer.fit_loop.epoch_loop.automatic_optimization.output_result_cls = _NotDivided
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nobody knows how many micro-batches the epoch will have."""
        trainer.fit_loop.max_batches = float("inf")
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = float("inf")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tells the trainer whether to accumulate, and whether this is the end of the epoch."""
        assert self._loader is not None
        assert self._optimizer is not None
        self._optimizer.zero_grad()  # does nothing inside a batch
        loop, ready = trainer.fit_loop, batch_idx + 1
        complete = self._loader.batch_complete
        # Lightning steps when accumulate_grad_batches divides `ready`.
        trainer.accumulate_grad_batches = 1 if complete else ready + 1
        most = trainer.limit_train_batches
        enough = isinstance(most, int) and ready >= most
        last = complete and (enough or self._loader.epoch_complete)
        loop.epoch_loop.batch_progress.is_last_batch = last
        if last:
            loop.max_batches = ready
        if isinstance(trainer.val_check_interval, float):  # validates when this divides `ready`
            trainer.val_check_batch = ready if last else ready + 1
        fetcher = loop._data_fetcher
        assert fetcher is not None
        fetcher.length, fetcher.done = None, False  # the length is that of the old batch size

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Tells the optimizer of a micro-batch that Lightning did not step for; logs."""
        assert self._loader is not None
        assert self._optimizer is not None
        optimizer = self._optimizer
        if not self._loader.batch_complete:
            optimizer.step(loss=outputs["loss"])
            return
        if not optimizer.updated:
            raise RuntimeError(
                f"the loader has served a batch of {optimizer.batch_size} samples, but fewer "
                "reached the model: training_step must use all of them"
            )
        for name, value in scalars(optimizer).items():
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the trainer its settings back."""
        trainer.gradient_clip_val = self._clip
        trainer.accumulate_grad_batches = 1
        vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("output_result_cls", None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Likewise."""
        if self._optimizer is not None:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader."""
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the position until there is a loader."""
        self._saved = state_dict


class _NotDivided(ClosureResult):
    """Lightning would divide each loss by accumulate_grad_batches; the optimizer takes the mean.

    And it would skip what has no loss, which leaves a batch with fewer samples than it counts.
    """

    @classmethod
    def from_training_step_output(
        cls, training_step_output: Any, normalize: int = 1
    ) -> ClosureResult:
        if training_step_output is None:
            raise _refusal(
                "training_step returning None",
                "return the loss of every micro-batch; for samples to be skipped give the loader a "
                "torch.utils.data.Subset without them",
            )
        return super().from_training_step_output(training_step_output)


def _refusal(setting: str, way_out: str) -> ValueError:
    return ValueError(f"AdaptiveBatchCallback does not work with {setting}: {way_out}")


def _check_settings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raises ValueError for the first setting that contradicts batches that grow."""
    value_clipping = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
    batches = trainer.limit_train_batches
    refused = {
        "manual optimization": (
            not pl_module.automatic_optimization,
            "call opt.step() and opt.zero_grad() after each micro-batch in training_step, without "
            "this callback",
        ),
        f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})": (
            trainer.accumulate_grad_batches != 1,
            "leave it out: the batch size and max_micro_batch_size of the loader decide",
        ),
        'Trainer(gradient_clip_algorithm="value")': (
            value_clipping,
            "the optimizers clip by norm, inside the update",
        ),
        "configure_gradient_clipping": (
            is_overridden("configure_gradient_clipping", pl_module),
            "do not override it: clip by Trainer(gradient_clip_val) or the optimizer's "
            "max_grad_norm",
        ),
        f"Trainer(limit_train_batches={batches})": (
            isinstance(batches, float) and batches != 1.0,
            "give a number of micro-batches",
        ),
        "Trainer(overfit_batches)": (
            getattr(trainer, "overfit_batches", 0) > 0,
            "give the loader a torch.utils.data.Subset",
        ),
        "Trainer(reload_dataloaders_every_n_epochs)": (
            getattr(trainer, "reload_dataloaders_every_n_epochs", 0) > 0,
            "leave it out: a new loader would start the order of the samples over",
        ),
        f"Trainer(val_check_interval={trainer.val_check_interval})": (
            isinstance(trainer.val_check_interval, float) and trainer.val_check_interval != 1.0,
            "give a number of micro-batches, or 1.0",
        ),
        "fp16 with a loss scale": (
            getattr(trainer.precision_plugin, "scaler", None) is not None,
            'take precision="bf16-mixed"',
        ),
        type(trainer.strategy).__name__: (
            trainer.strategy.handles_gradient_accumulation,
            "take a strategy that leaves accumulation to the trainer",
        ),
    }
    for setting, (found, way_out) in refused.items():
        if found:
            raise _refusal(setting, way_out)
