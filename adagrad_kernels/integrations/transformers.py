"""Adaptive batch sizes in Hugging Face transformers: `AdaptiveBatchTrainer` (`pip install
"adagrad_kernels[transformers]"`).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import AdaptiveDataLoader
from ..schedules import CosineDecay, LinearDecay
from ._shared import AdaptiveOptimizer, adaptive_optimizer, scalars, take_over_clipping

try:
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss

    from ._whole_batches import AdaptiveBatchState, WholeBatches
except ImportError as error:
    raise ModuleNotFoundError(
        "adagrad_kernels.integrations.transformers needs transformers: "
        'pip install "adagrad_kernels[transformers]"',
        name=error.name,
    ) from error


class AdaptiveBatchTrainer(Trainer):
    """A `Trainer` whose batches grow; combine it with other trainers by inheritance.

    Give it an optimizer of this package: `optimizers=(AdAdaGrad(model, …), None)`, or
    `AdaptiveBatch(model, AdamW(…), …)`. `per_device_train_batch_size` is the largest micro-batch of
    one process, and `gradient_accumulation_steps` stays 1: a step of the trainer is a whole batch,
    as many micro-batches as it needs. So `global_step`, `max_steps`, `logging_steps`,
    `save_steps` and `eval_steps` count batches. `state.epoch` is samples over the length of the
    dataset; without `max_steps`, training ends when `num_train_epochs` times the dataset has been
    seen, and the schedules "linear" and "cosine", with `warmup_steps` as a fraction, count
    samples.

    `max_grad_norm` (1.0 by default!) is handed over to the optimizer, which clips inside its
    update. Losses are means over each micro-batch; every sample must have the same weight, so
    batches whose sequences have different numbers of labelled tokens are refused, unless
    `compute_loss_func` gives all sequences the same weight (`sequence_mean_loss`). Checkpoints
    hold the state of optimizer, batch size and loader; a resumed run continues bit for bit.
    `batch_size` (of the next step), `samples` and `noise_scale` join the logs.

    Raises:
        ValueError: when training starts, for settings that contradict batches that grow, naming
            the setting and what to do.
        TypeError: an optimizer that is not of this package.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
        >>> config = GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2,
        ...                     bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> tokens = torch.randint(64, (256, 8))
        >>> folder = TemporaryDirectory()
        >>> trainer = AdaptiveBatchTrainer(
        ...     model,
        ...     TrainingArguments(folder.name, per_device_train_batch_size=32, num_train_epochs=1,
        ...                       use_cpu=True, report_to="none", disable_tqdm=True,
        ...                       save_strategy="no", logging_strategy="no"),
        ...     train_dataset=[{"input_ids": t, "labels": t} for t in tokens],
        ...     optimizers=(ak.AdAdaGrad(model, lr=0.1, batch_size=8, max_batch_size=128), None))
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> trainer.adaptive_optimizer.batch_size > 8
        True
        >>> folder.cleanup()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(AdaptiveBatchState())

    @property
    def adaptive_optimizer(self) -> AdaptiveOptimizer:
        """The optimizer without the wrapper that accelerate puts around it."""
        return adaptive_optimizer(self.optimizer)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the loader goes by itself to where a checkpoint was."""
        self._check_settings()
        skip, self.args.ignore_data_skip = self.args.ignore_data_skip, True
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.ignore_data_skip = skip

    def _check_settings(self) -> None:
        args = self.args
        order = args.train_sampling_strategy
        refused = {
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}": (
                args.gradient_accumulation_steps != 1,
                "leave it at 1: the batch size decides; per_device_train_batch_size limits the "
                "micro-batches",
            ),
            "auto_find_batch_size": (
                args.auto_find_batch_size,
                "choose per_device_train_batch_size by memory; it does not change the training",
            ),
            f"train_sampling_strategy={order!r}": (
                order not in ("random", "sequential"),
                'take "random" or "sequential"',
            ),
            "fp16": (self.accelerator.scaler is not None, "take bf16=True"),
            "DataParallel": (args.n_gpu > 1, "start one process for each GPU with torchrun"),
            "DeepSpeed": (self.is_deepspeed_enabled, "take torchrun without it"),
            "fsdp": (self.is_fsdp_enabled, "take torchrun without it"),
        }
        for setting, (found, way_out) in refused.items():
            if found:
                raise ValueError(f"AdaptiveBatchTrainer does not work with {setting}: {way_out}")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer that was given."""
        if self.optimizer is None:
            raise TypeError(
                "AdaptiveBatchTrainer needs an optimizer of adagrad_kernels: give it "
                "optimizers=(AdAdaGrad(model, …), None), or override create_optimizer"
            )
        self.optimizer = super().create_optimizer(*args, **kwargs)
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Whole batches, each a list of micro-batches."""
        optimizer = adaptive_optimizer(self.create_optimizer())
        args = self.args
        take_over_clipping(optimizer, args.max_grad_norm, "TrainingArguments(max_grad_norm)")
        usual = super().get_train_dataloader()  # it knows which columns the model takes
        self._batches = WholeBatches(
            AdaptiveDataLoader(
                usual.dataset,
                optimizer,
                max_micro_batch_size=args.per_device_train_batch_size,
                shuffle=args.train_sampling_strategy == "random",
                num_workers=args.dataloader_num_workers,
                seed=args.seed if args.data_seed is None else args.data_seed,
                collate_fn=usual.collate_fn,
                pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            ),
            sized=args.max_steps <= 0,
        )
        return self._batches

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in transformers where the number of steps is known, otherwise by samples."""
        adaptive, args = self.adaptive_optimizer, self.args
        kind, warmup = args.lr_scheduler_type, args.warmup_steps
        inner: Any = getattr(adaptive, "optimizer", adaptive)
        if (
            self.lr_scheduler is not None
            or args.max_steps > 0
            or kind == "constant"
            or (kind == "constant_with_warmup" and warmup >= 1)
        ):
            return super().create_scheduler(num_training_steps, inner)
        if kind not in ("linear", "cosine") or args.lr_scheduler_kwargs or warmup >= 1:
            raise ValueError(
                f"lr_scheduler_type={str(kind)!r}, warmup_steps={warmup}: how many steps "
                'num_train_epochs will take is not known. Give max_steps, "linear" or "cosine" '
                "with warmup_steps as a fraction, "
                "or a schedule of adagrad_kernels.schedules in optimizers=(…, schedule)"
            )
        schedule = LinearDecay if kind == "linear" else CosineDecay
        total = self._batches.samples_of(args.num_train_epochs)
        self.lr_scheduler = schedule(adaptive, total=total, warmup=math.ceil(warmup * total))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Runs all micro-batches of a batch; returns the mean loss."""
        losses = []
        for k, micro_batch in enumerate(inputs, 1):
            self._check_weights(micro_batch)
            last = k == len(inputs)  # here processes average their gradients
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch))
        return torch.stack(losses).mean()

    def _check_weights(self, micro_batch: Any) -> None:
        """That all samples have as many labels, where the loss is a mean over labels."""
        own_loss = type(self).compute_loss is not Trainer.compute_loss
        if own_loss or self.compute_loss_func is not None or "labels" not in micro_batch:
            return
        labels = micro_batch.get("shift_labels", micro_batch["labels"])
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return
        if self._first_label_is_unused and "shift_labels" not in micro_batch:
            labels = labels[..., 1:]
        counts = labels.ne(-100).view(len(labels), -1).sum(1)
        if counts.numel() and counts.min() != counts.max():
            raise ValueError(
                f"samples of {int(counts.min())} and {int(counts.max())} labels: in a mean over "
                "labels they have different weights, which the statistics do not know. Give "
                "compute_loss_func=sequence_mean_loss (or your own mean over samples), or pack the "
                "sequences to one length"
            )

    @property
    def _first_label_is_unused(self) -> bool:
        """Whether the model predicts each next token (`_loss_shifts_labels` misses GPT-2)."""
        config = getattr(self.model, "config", None)
        causal = getattr(self.model, "loss_function", None) is ForCausalLMLoss
        return causal and not getattr(config, "is_encoder_decoder", False)

    def floating_point_ops(self, inputs: Any) -> int:
        """Of all micro-batches."""
        return sum(super(AdaptiveBatchTrainer, self).floating_point_ops(part) for part in inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for micro_batch in inputs:
            super()._track_num_input_tokens(micro_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None  # the optimizer clips

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """‖ḡ‖ before clipping, without writing to the gradients as transformers would."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not grads:  # update="in_backward"
            return None
        micro_batches = self.adaptive_optimizer.cycle.observer.micro_batches
        return nn.utils.get_total_norm(grads) / micro_batches

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the batch size to the logs, and the true number of samples to the summary."""
        if "loss" in logs:
            logs.update(scalars(self.adaptive_optimizer))
        elif "train_samples_per_second" in logs:
            seconds = max(logs["train_runtime"], 1e-9)
            served = self._batches.loader.samples - self._batches.first
            logs["train_samples_per_second"] = round(served / seconds, 3)
        super().log(logs, *args, **kwargs)


def sequence_mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Next-token cross entropy with the same weight for each sequence: a `compute_loss_func`.

        loss = mean_i (1/T_i) Σ_t −log p(labels_{i,t+1})      over the T_i labels that are not −100

    Args:
        outputs: of the model, with "logits" [b, T, V].
        labels: [b, T], −100 where there is none.
        num_items_in_batch: not needed.

    Example:
        >>> logits = torch.zeros(2, 4, 10)
        >>> labels = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
        >>> f"{sequence_mean_loss({'logits': logits}, labels):.4f}"  # log 10
        '2.3026'
    """
    targets = labels[:, 1:]
    logits = outputs["logits"][:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="none")
    return (losses.sum(1) / targets.ne(-100).sum(1).clamp(min=1)).mean()
