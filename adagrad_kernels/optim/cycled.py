"""What every optimizer here forwards from its batch cycle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..batch_size import BatchSizeController
from ..criteria import Decision
from ..distributed import Ranks
from ..observer import Observer
from ..statistics import GradientStatistics
from .cycle import BatchCycle, LossScale


def check_state(owner: object, state: object, *keys: str) -> None:
    """That a state has what `load_state_dict` of its owner looks for.

    Raises:
        ValueError: otherwise.
    """
    missing = [key for key in keys if not (isinstance(state, Mapping) and key in state)]
    if missing:
        raise ValueError(
            f"this is no state of {type(owner).__name__}: it has no {', '.join(map(repr, missing))}"
        )


class Cycled:
    """What the optimizers forward from their cycle."""

    cycle: BatchCycle
    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling and skipping to step()

    def _given_loss_scale(self) -> LossScale | None:
        """What a `torch.amp.GradScaler` has set for this step, None without one."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            raise RuntimeError(
                "scaler.unscale_() was called: the gradients no longer have the loss scale that "
                "the samples' gradients were measured with. Leave it to scaler.step()"
            )
        return scale, found_inf

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Copies and pickles would belong to no model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it belongs to a model's layers. "
            "Copy the model, make an optimizer for the copy, and load_state_dict(opt.state_dict())"
        )

    @property
    def batch_size(self) -> int:
        """Global batch size of the next batch (of this one, while it is accumulated)."""
        return self.cycle.controller.batch_size

    @property
    def samples(self) -> int:
        """Samples of all updates so far."""
        return self.cycle.controller.samples

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the last complete batch, on this process; 0 before."""
        return self.cycle.micro_batches

    @property
    def controller(self) -> BatchSizeController:
        """What holds and grows the batch size; loaders take it."""
        return self.cycle.controller

    @property
    def ranks(self) -> Ranks:
        """The processes that share a step; loaders take it."""
        return self.cycle.ranks

    def reserve(self, samples: int) -> None:
        """Makes room for micro-batches of this size, for compiled models; loaders call it."""
        if isinstance(self.cycle.observer, Observer):
            self.cycle.observer.reserve(samples)

    def detach(self) -> None:
        """Gives the model back as it was, for another optimizer; this one cannot step any more.

        (An optimizer that nobody refers to any more gives it back by itself, at the latest when
        the next one is made.)
        """
        self.cycle.detach()

    @property
    def statistics(self) -> GradientStatistics | None:
        """Statistics of the last tested step, None before."""
        return self.cycle.statistics

    @property
    def decision(self) -> Decision | None:
        """What the test said of the last tested step, None before."""
        return self.cycle.decision

    @property
    def updated(self) -> bool:
        """Whether the last step() completed a batch and updated the weights."""
        return self.cycle.updated
