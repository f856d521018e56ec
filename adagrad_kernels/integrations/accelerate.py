"""Adaptive batch sizes in Hugging Face accelerate: `prepare` (`pip install
"adagrad_kernels[transformers]"`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import AdaptiveDataLoader
from ._shared import AdaptiveOptimizer, adaptive_optimizer, check_loader

try:
    from accelerate import Accelerator, DistributedType
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import send_to_device
except ImportError as error:
    raise ModuleNotFoundError(
        "adagrad_kernels.integrations.accelerate needs accelerate: "
        'pip install "adagrad_kernels[transformers]"',
        name=error.name,
    ) from error


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: AdaptiveDataLoader,
    scheduler: Any = None,
) -> tuple[Any, ...]:
    """`accelerator.prepare` for batches that grow.

    The usual loop then is right: `accelerator.backward(loss); optimizer.step(); scheduler.step();
    optimizer.zero_grad()` after every micro-batch, inside `accelerator.accumulate(model)` or not.
    `accelerator.sync_gradients` tells in which micro-batch the batch is complete (outside of
    `accumulate`, which sets it always), processes average their gradients in that one, and the
    scheduler steps once a batch. `accelerator.save_state` and `load_state` cover optimizer, batch
    size, loader and scheduler; save after a complete batch.

    What `accelerator.prepare` alone would do: hand an `AdaptiveDataLoader` back as it is, its
    batches on no device; leave an `AdaptiveBatch` out of checkpoints; average gradients in every
    micro-batch; step schedulers after every micro-batch, as often as there are processes.

    Args:
        accelerator: made before the loader, so that this knows its processes; with
            `gradient_accumulation_steps` 1: the loader decides.
        model: not prepared; moved and wrapped as by `accelerator.prepare`.
        optimizer: `AdAdaGrad`, `AdAdaGradNorm` or `AdaptiveBatch` of the model. Keep it, to look
            at `batch_size` and `statistics`.
        loader: follows this optimizer.
        scheduler: of torch, for the optimizer (the inner one of `AdaptiveBatch`), or one of
            `adagrad_kernels.schedules`.

    Returns:
        model, optimizer, loader, and scheduler if one was given.

    Raises:
        ValueError: settings of the accelerator that contradict batches that grow; a loader of
            another optimizer or another number of processes.
        TypeError: an optimizer or loader that is not of this package.

    Example:
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Linear(4, 1)
        >>> opt = ak.AdAdaGrad(model, lr=0.1, batch_size=8, max_batch_size=64)
        >>> data = TensorDataset(torch.randn(512, 4), torch.randn(512, 1))
        >>> loader = ak.AdaptiveDataLoader(data, opt, max_micro_batch_size=16)
        >>> model, optimizer, loader = prepare(accelerator, model, opt, loader)
        >>> for x, y in loader:
        ...     accelerator.backward((model(x) - y).square().mean())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> opt.samples == loader.samples, opt.batch_size > 8
        (True, True)
    """
    adaptive = adaptive_optimizer(optimizer)
    check_loader(loader, adaptive, "loader")
    _check_settings(accelerator, loader)
    model = accelerator.prepare_model(model)
    prepared = accelerator.prepare_optimizer(adaptive)  # type: ignore[arg-type]
    _refuse_clipping(accelerator, adaptive)
    batches = AcceleratedLoader(accelerator, loader, model, adaptive)
    accelerator.register_for_checkpointing(batches)
    if scheduler is None:
        return model, prepared, batches
    stepping = OncePerBatch(scheduler, adaptive)
    accelerator.register_for_checkpointing(stepping)
    return model, prepared, batches, stepping


class AcceleratedLoader:
    """An `AdaptiveDataLoader` whose micro-batches are on the accelerator's device, and which tells
    the accelerator when a batch is complete; made by `prepare`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loader: AdaptiveDataLoader,
        model: nn.Module,
        optimizer: AdaptiveOptimizer,
    ) -> None:
        self._accelerator, self._loader, self._model = accelerator, loader, model
        self._cycle = optimizer.cycle

    def __iter__(self) -> Iterator[Any]:
        accelerator, model = self._accelerator, self._model
        for micro_batch in self._loader:
            complete = self._loader.batch_complete
            accelerator.sync_gradients = complete
            self._cycle.updated = False  # the accelerator calls step() in the last one only
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = complete
            yield send_to_device(micro_batch, accelerator.device)

    def __len__(self) -> int:
        """Micro-batches of one epoch at the present batch size."""
        return len(self._loader)

    @property
    def samples(self) -> int:
        """Samples served so far, to all processes."""
        return self._loader.samples

    @property
    def epoch(self) -> int:
        """Complete passes over the dataset so far."""
        return self._loader.epoch

    @property
    def batch_complete(self) -> bool:
        """Whether the micro-batch that was served last is the last one of its batch."""
        return self._loader.batch_complete

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position."""
        self._loader.load_state_dict(state)


class OncePerBatch(AcceleratedScheduler):
    """A scheduler whose `step` does nothing until the optimizer has updated; made by `prepare`."""

    def __init__(self, scheduler: Any, optimizer: AdaptiveOptimizer) -> None:
        super().__init__(scheduler, [])
        self._optimizer = optimizer
        self._seen = optimizer.controller.steps

    def step(self, *args: Any, **kwargs: Any) -> None:
        """After every micro-batch."""
        if self._optimizer.controller.steps != self._seen:
            self._seen = self._optimizer.controller.steps
            self.scheduler.step(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Call it after that of the optimizer, as `accelerator.load_state` does."""
        super().load_state_dict(state_dict)
        self._seen = self._optimizer.controller.steps


def _check_settings(accelerator: Accelerator, loader: AdaptiveDataLoader) -> None:
    steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    kind = accelerator.distributed_type
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    refused = {
        f"Accelerator(gradient_accumulation_steps={steps})": (
            steps != 1,
            "leave it at 1: the batch size and max_micro_batch_size of the loader decide",
        ),
        'Accelerator(mixed_precision="fp16")': (
            accelerator.scaler is not None,
            'take mixed_precision="bf16"',
        ),
        f"{kind}": (kind not in known, "take plain data parallelism"),
        f"a loader for {loader.controller.processes} of {processes} processes": (
            loader.controller.processes != processes,
            "make the loader after the Accelerator",
        ),
    }
    for setting, (found, way_out) in refused.items():
        if found:
            raise ValueError(f"adaptive batches do not work with {setting}: {way_out}")


def _refuse_clipping(accelerator: Accelerator, optimizer: AdaptiveOptimizer) -> None:
    """Lets the accelerator's clipping raise for parameters of this optimizer.

    It would come between `backward` and `step`, where the test still needs the gradient, and in
    every micro-batch.
    """

    def refusing(clip: Any, name: str) -> Any:
        def clip_others(parameters: Iterable[Tensor] | Tensor, *args: Any, **kwargs: Any) -> Any:
            params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) in own for p in params):
                raise RuntimeError(
                    f"accelerator.{name} would change the gradients that the test looks at: give "
                    f"max_grad_norm= to {type(optimizer).__name__}, which clips in its update"
                )
            return clip(params, *args, **kwargs)

        return clip_others

    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, refusing(getattr(accelerator, name), name))
