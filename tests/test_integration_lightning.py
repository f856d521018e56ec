"""Lightning's Trainer with batches that grow."""

import csv
import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import integration_cases as cases
import pytest
import torch
import torch.nn.functional as F
from distributed_processes import run
from integration_scenarios import train_lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import accumulators, weights

import adagrad_kernels as ak

pl = pytest.importorskip("lightning.pytorch")
pytest.importorskip("sklearn")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from adagrad_kernels.integrations.lightning import AdaptiveBatchCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers",  # on machines with many cores
)


class Digits(pl.LightningModule):
    """Remembers what it was trained on."""

    def __init__(
        self, kind: str = "AdAdaGrad", dtype: torch.dtype = torch.float64, **changed: Any
    ) -> None:
        super().__init__()
        self.net = cases.network(dtype)
        self.data = cases.digits(dtype=dtype)
        self.kind, self.changed = kind, changed
        self.batches: dict[int, cases.Batch] = {}
        self.validated: list[int] = []  # samples seen by then

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.batches.setdefault(self.global_step, []).append((x, y))
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.kind == "AdaptiveBatch":  # the callback wraps it
            return cases.plain_optimizer(self)
        return cases.optimizer(self.kind, self, **self.changed)

    def train_dataloader(self) -> Any:
        adaptive = self.trainer.optimizers[0]
        return ak.AdaptiveDataLoader(self.data, adaptive, max_micro_batch_size=cases.MICRO)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(2, 64)), batch_size=2)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.trainer.optimizers[0].samples)


def trainer(callback: AdaptiveBatchCallback | None = None, **options: Any) -> Any:
    callbacks = [callback or AdaptiveBatchCallback(), *options.pop("callbacks", [])]
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(callbacks=callbacks, **{"max_epochs": 3, **quiet, **options})


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdaptiveBatch"])
def test_the_weights_of_plain_torch(kind: str, max_grad_norm: float | None) -> None:
    model = Digits(kind)
    options = cases.options() if kind == "AdaptiveBatch" else {}
    fit = trainer(AdaptiveBatchCallback(**options), gradient_clip_val=max_grad_norm)
    fit.fit(model)
    batches = list(model.batches.values())
    cases.assert_plain_training(batches, model, kind, max_grad_norm)
    opt = fit.optimizers[0]
    assert opt.max_grad_norm == fit.gradient_clip_val == max_grad_norm
    assert fit.global_step == opt.controller.steps == len(batches)
    samples = sum(len(x) for batch in batches for x, _ in batch)
    assert samples == opt.samples == fit.train_dataloader.samples
    assert 0 <= samples - 3 * len(model.data) < 3 * 192
    assert fit.logged_metrics["samples"] == samples
    assert fit.logged_metrics["batch_size"] == opt.batch_size == 192


def test_epochs_end_with_the_data() -> None:
    model = Digits()
    fit = trainer(max_epochs=4)
    fit.fit(model)
    n = len(model.data)
    assert fit.current_epoch == 4
    assert len(model.validated) == 4  # once an epoch
    # each epoch's end is the first batch end at or after the data's
    previous, ends = 0, []
    for batch in model.batches.values():
        now = previous + sum(len(x) for x, _ in batch)
        if now // n > previous // n:
            ends.append(now)
        previous = now
    assert model.validated == ends


def test_schedulers_and_max_steps_count_batches() -> None:
    class Scheduled(Digits):
        def configure_optimizers(self) -> Any:
            opt = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=4, gamma=0.5)
            return [opt], [{"scheduler": schedule, "interval": "step"}]

    model = Scheduled()
    fit = trainer(max_epochs=-1, max_steps=9)
    fit.fit(model)
    assert fit.global_step == fit.optimizers[0].controller.steps == 9
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 9
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.05 * 0.5**2


def test_schedules_that_count_samples() -> None:
    class Scheduled(Digits):
        def configure_optimizers(self) -> Any:
            opt = super().configure_optimizers()
            schedule = ak.schedules.LinearDecay(opt, total=2000)
            return [opt], [{"scheduler": schedule, "interval": "step"}]

    fit = trainer(max_epochs=2)
    fit.fit(Scheduled())
    opt = fit.optimizers[0]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05 * (1 - opt.samples / 2000), rel=1e-12)


@pytest.mark.parametrize("schedule", ["every_n_train_steps", "every_n_epochs"])
@pytest.mark.parametrize("kind", ["AdAdaGradNorm", "AdaptiveBatch"])
def test_a_resumed_run_continues_bit_for_bit(kind: str, schedule: str, tmp_path: Path) -> None:
    every = {schedule: 4 if schedule == "every_n_train_steps" else 1}

    def fit(checkpoint: Path | None) -> Any:
        model = Digits(kind)
        wrapping = cases.options() if kind == "AdaptiveBatch" else {}
        saving = ModelCheckpoint(tmp_path / "all", filename="{step}", save_top_k=-1, **every)
        new = trainer(
            AdaptiveBatchCallback(**wrapping),
            callbacks=[saving],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
        new.fit(model, ckpt_path=checkpoint)
        return new

    whole = fit(None)
    paths = sorted((tmp_path / "all").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(paths) > 1
    first = Path(shutil.move(paths[0], tmp_path / "first.ckpt"))
    shutil.rmtree(tmp_path / "all")
    resumed = fit(first)
    done = torch.load(first, weights_only=False)["global_step"]
    one, other = whole.optimizers[0], resumed.optimizers[0]
    assert len(resumed.lightning_module.batches) == whole.global_step - done > 1
    assert torch.equal(weights(whole.lightning_module), weights(resumed.lightning_module))
    if kind == "AdAdaGradNorm":
        assert torch.equal(accumulators(one), accumulators(other))
    for name in ("batch_size", "samples"):
        assert getattr(one, name) == getattr(other, name)
    assert one.controller.state_dict() == other.controller.state_dict()
    assert whole.global_step == resumed.global_step
    assert whole.current_epoch == resumed.current_epoch
    assert whole.train_dataloader.state_dict() == resumed.train_dataloader.state_dict()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_bits_of_our_own_loop(precision: str) -> None:
    model = Digits(dtype=torch.float32)
    fit = trainer(precision=precision, max_epochs=2)
    fit.fit(model)
    own = cases.network(torch.float32)
    opt = cases.optimizer("AdAdaGrad", own)
    loader = ak.AdaptiveDataLoader(model.data, opt, max_micro_batch_size=cases.MICRO)
    samples = fit.optimizers[0].samples
    cases.our_loop(own, opt, loader, lambda: opt.samples >= samples, precision == "bf16-mixed")
    assert opt.samples == samples
    assert opt.batch_size == fit.optimizers[0].batch_size > 8
    assert torch.equal(weights(model), weights(own))


def test_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(logger=logger, log_every_n_steps=1, max_epochs=2)
    model = Digits()
    fit.fit(model)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [sum(len(x) for x, _ in batch) for batch in model.batches.values()]
    assert [float(row["batch_size"]) for row in rows[:-1]] == sizes[1:]  # of the next step
    assert [float(row["samples"]) for row in rows] == torch.tensor(sizes).cumsum(0).tolist()
    assert any(row["noise_scale"] for row in rows)


@pytest.mark.parametrize("limit", [{"limit_train_batches": 5}, {"fast_dev_run": 3}])
def test_a_limited_epoch_ends_with_a_batch(limit: dict[str, int]) -> None:
    model = Digits()
    fit = trainer(**limit)
    fit.fit(model)
    opt = fit.optimizers[0]
    assert fit.global_step == opt.controller.steps == len(model.batches)
    assert opt.samples == fit.train_dataloader.samples
    if "limit_train_batches" in limit:
        assert len(model.validated) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 2}, "max_micro_batch_size"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "by norm"),
        ({"limit_train_batches": 0.5}, "a number of micro-batches"),
        ({"val_check_interval": 0.5}, "a number of micro-batches"),
        ({"overfit_batches": 2}, "Subset"),
        ({"reload_dataloaders_every_n_epochs": 1}, "start the order"),
    ],
)
def test_settings_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*{message}|{message}"):
        trainer(**options).fit(Digits())


def test_modules_that_contradict() -> None:
    class Clips(Digits):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    class Schedules(Digits):
        def configure_optimizers(self) -> Any:
            opt = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(opt, 4)
            return [opt], [{"scheduler": schedule, "interval": "step", "frequency": 2}]

    class Loads(Digits):
        def train_dataloader(self) -> Any:
            return DataLoader(self.data, batch_size=8, num_workers=0)

    class LoadsForOther(Digits):
        def train_dataloader(self) -> Any:
            return ak.AdaptiveDataLoader(self.data, ak.BatchSizeController(8, 16))

    class Drops(Digits):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([t[1:] for t in batch], batch_idx)

    manual = Digits()
    manual.automatic_optimization = False
    for model, error, message in (
        (Clips(), ValueError, "configure_gradient_clipping.*max_grad_norm"),
        (manual, ValueError, "manual optimization.*opt.step"),
        (Schedules(), ValueError, "frequency=2"),
        (LoadsForOther(), ValueError, "another optimizer"),
        (Drops(), RuntimeError, "fewer reached the model"),
    ):
        with pytest.raises(error, match=message):
            trainer().fit(model)
    with pytest.raises(TypeError, match=r"train_dataloader.*AdaptiveDataLoader.*DataLoader"):
        trainer().fit(Loads())


@pytest.mark.parametrize("skipped", [0, -1, "all"])
def test_a_batch_cannot_be_skipped(skipped: int | str) -> None:
    """Neither a part of one, be it the first or the last, nor the whole."""

    class Skips(Digits):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            _, count = self.trainer.optimizers[0].controller.micro_batches()
            found = len(self.batches[self.global_step]) - 1
            skip = count == 1 if skipped == "all" else count > 1 and found == skipped % count
            return None if skip else loss

    with pytest.raises(ValueError, match=r"training_step returning None: return the loss.*Subset"):
        trainer().fit(Skips())


def test_what_is_given_twice() -> None:
    with pytest.raises(ValueError, match=r"given batch_size.*AdAdaGrad"):
        trainer(AdaptiveBatchCallback(batch_size=4)).fit(Digits())
    clips = Digits(max_grad_norm=2.0)
    with pytest.raises(ValueError, match=r"gradient_clip_val.=1\.0.*max_grad_norm=2\.0"):
        trainer(gradient_clip_val=1.0).fit(clips)
    in_backward = Digits(update="in_backward")
    with pytest.raises(ValueError, match=r"gradient_clip_val.*in_backward"):
        trainer(gradient_clip_val=1.0).fit(in_backward)


def test_the_trainer_gets_its_settings_back_after_an_error() -> None:
    class Fails(Digits):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyError("stop")

    fit = trainer(gradient_clip_val=0.3)
    with pytest.raises(KeyError):
        fit.fit(Fails())
    assert fit.gradient_clip_val == 0.3
    assert fit.accumulate_grad_batches == 1


def test_two_processes(tmp_path: Path) -> None:
    one = train_lightning(1)
    for found in run(_two, 2, tmp_path):
        assert found["sizes"] == one["sizes"]
        assert len(set(found["sizes"])) > 2
        assert found["samples"] == one["samples"] == sum(one["sizes"])
        torch.testing.assert_close(found["weights"], one["weights"], **cases.CLOSE)


def _two(rank: int, world: int) -> dict[str, Any]:
    return train_lightning(world)


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "adagrad_kernels.integrations.lightning"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install \"adagrad_kernels\[lightning\]\""):
        importlib.import_module(name)


def test_the_model_is_not_wrapped() -> None:
    model = Digits()
    trainer(max_epochs=1).fit(model)
    assert isinstance(model.net[0], nn.Linear)
    assert list(model.state_dict()) == list(Digits().state_dict())
