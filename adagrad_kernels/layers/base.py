"""What every observed layer shares: where its probes come from, and how it is copied."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional

if TYPE_CHECKING:
    from ..observer import Observer

_keys = itertools.count(1)


class ObservedLayer:
    """Mixed into the class of a layer instance while it is observed.

    Attributes:
        observed_name: the module's path in the model.
        observed_parameters: names of the parameters that the layer measures.
        plain_class: the class that the instance had before.
    """

    observed_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    observed_method: ClassVar[str]
    observed_name: str
    plain_class: type[nn.Module]

    def attach(self, observer: Observer, name: str) -> None:
        """Called by the observer after the class was exchanged."""
        self._observer = observer
        self._key = next(_keys)
        self.observed_name = name
        self._coordinate_probes: dict[str, Tensor] = {}
        functional.listeners[self._key] = self

    def release(self) -> None:
        """Removes every trace of the observer; the class is exchanged back by the caller."""
        functional.listeners.pop(self._key, None)
        for name in _OWN_ATTRIBUTES:
            self.__dict__.pop(name, None)

    def called(self, key: int, samples: int) -> None:
        """Told by the backward pass of each call (eager mode)."""
        self._observer.called(self, samples)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that require grad, by their name in the layer."""
        found = {name: getattr(self, name) for name in self.observed_parameters}
        return {k: p for k, p in found.items() if p is not None and p.requires_grad}

    def measures(self) -> bool:
        """Whether the coming forward call is to be measured."""
        if not torch.is_grad_enabled():
            return False
        for name in self.observed_parameters:
            parameter = getattr(self, name)
            if parameter is not None and parameter.requires_grad:
                return True
        return False

    def probes(self, x: Tensor) -> tuple[Any, ...]:
        """(probe, weight_probe, bias_probe, key) for a call with input x."""
        if torch.compiler.is_compiling():
            probe, key = self._observer.probe, 0  # the key would be a constant in every graph
        else:
            probe, key = self._observer.probe_for(x), self._key
        if not self._observer.coordinates:
            return probe, None, None, key
        if key:
            self.make_coordinate_probes()  # parameters may have been unfrozen since
        of = self._coordinate_probes
        return probe, of.get("weight"), of.get("bias"), key

    def make_coordinate_probes(self) -> None:
        """One zero a trainable parameter, expanded to its shape: the probe takes no memory."""
        for name, parameter in self.trainable().items():
            probe = self._coordinate_probes.get(name)
            if probe is None or probe.device != parameter.device:
                dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                zero = torch.zeros((), dtype=dtype, device=parameter.device)
                self._coordinate_probes[name] = zero.expand(parameter.shape).requires_grad_()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain layers: an observer belongs to one model."""
        plain = self.plain_class.__new__(self.plain_class)
        state = {k: v for k, v in self.__dict__.items() if k not in _OWN_ATTRIBUTES}
        plain.__dict__.update(state)
        return plain.__reduce_ex__(protocol)


_OWN_ATTRIBUTES = ("_observer", "_key", "observed_name", "plain_class", "_coordinate_probes")
