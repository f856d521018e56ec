"""What the processes of the integrations' tests do; on one process, the same with all samples."""

import contextlib
import os
import warnings
from typing import Any

import integration_cases as cases
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from training import weights

import adagrad_kernels as ak


def _environment(world: int) -> None:
    """What torchrun would have set; the process group is there already."""
    if world > 1:
        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world))
        os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT="29500", GROUP_RANK="0")  # nobody listens


def _result(model: nn.Module, opt: Any, sizes: list[int]) -> dict[str, Any]:
    return {"weights": weights(model), "samples": opt.samples, "sizes": sizes}


def train_lightning(world: int) -> dict[str, Any]:
    _environment(world)
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    import lightning.pytorch as pl

    from adagrad_kernels.integrations.lightning import AdaptiveBatchCallback

    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = cases.network()
            self.sizes: list[int] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return cases.optimizer("AdAdaGrad", self, multiple_of=2)  # as two processes need it

        def train_dataloader(self) -> Any:
            opt, micro = self.trainer.optimizers[0], cases.MICRO // world
            return ak.AdaptiveDataLoader(cases.digits(), opt, max_micro_batch_size=micro)

        def on_train_batch_end(self, *args: Any) -> None:
            opt = self.trainer.optimizers[0]
            if opt.updated:
                self.sizes.append(opt.statistics.batch_size)

    model = Digits()
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[AdaptiveBatchCallback()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        strategy="ddp" if world > 1 else "auto", devices=world, gradient_clip_val=0.3,
    )  # fmt: skip
    trainer.fit(model)
    return _result(model.net, trainer.optimizers[0], model.sizes)


class Classifier(nn.Module):
    """What transformers' trainer expects of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cases.network()
        self.seen: cases.Batch = []

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen.append((x, y))
        return {"loss": F.cross_entropy(self.net(x), y)}


def rows() -> list[dict[str, Tensor]]:
    """The digits as transformers expects them."""
    return [{"x": x, "y": y} for x, y in cases.digits()]


def train_transformers(world: int, folder: str) -> dict[str, Any]:
    _environment(world)
    from transformers import TrainerCallback, TrainingArguments

    from adagrad_kernels.integrations.transformers import AdaptiveBatchTrainer

    sizes = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sizes.append(opt.statistics.batch_size)

    model = Classifier()
    opt = cases.optimizer("AdAdaGrad", model, multiple_of=2)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=cases.MICRO // world, num_train_epochs=2,
        max_grad_norm=0.3, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = AdaptiveBatchTrainer(
        model, arguments, train_dataset=rows(), optimizers=(opt, None), callbacks=[Watch()]
    )
    trainer.train()
    return _result(model, opt, sizes)


def train_accelerate(world: int, accumulate: bool) -> dict[str, Any]:
    _environment(world)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from adagrad_kernels.integrations.accelerate import prepare

    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True)
    model = cases.network()
    opt = cases.optimizer("AdAdaGrad", model, multiple_of=2)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=4, gamma=0.9)
    micro = cases.MICRO // world
    loader = ak.AdaptiveDataLoader(cases.digits(), opt, max_micro_batch_size=micro)
    wrapped, optimizer, batches, scheduler = prepare(accelerator, model, opt, loader, schedule)
    sizes = []
    while opt.samples < 1200:
        for x, y in batches:
            with accelerator.accumulate(wrapped) if accumulate else contextlib.nullcontext():
                accelerator.backward(F.cross_entropy(wrapped(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if batches.batch_complete:
                sizes.append(opt.statistics.batch_size)
    result = _result(model, opt, sizes)
    assert opt.controller.steps == schedule.last_epoch == len(sizes)
    return result
