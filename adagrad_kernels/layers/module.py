"""Modules of any class: their own parameters measure where the forward pass uses them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import functional
from ..faults import layer_name
from .base import OWN_ATTRIBUTES, ObservedLayer, UnsupportedLayerError
from .measured_functions import MeasuredFunctions, Use, Uses
from .shared_sources import Own, UnmeasuredUse
from .shared_values import SharedValues

_LISTS = (nn.ParameterList, nn.ParameterDict)


class ObservedModule(MeasuredFunctions, nn.Module):
    """A module whose own parameters measure, beside the observed layers in it.

    Its forward pass runs as it is, watched by `SharedValues`. Matrices in products and the
    parameters of normalisations are measured by the kernels of those; everything else by the
    gradient of each sample, [b, P].
    """

    observed_method = "gradient of each sample"

    def attach(self, observer: Any, name: str) -> None:
        """See `ObservedLayer`: a call for each parameter."""
        self._homes = _homes(self)
        self.observed_parameters = tuple(self._homes)
        super().attach(observer, name)
        self._calls = {key: functional.Call(functional.listen(self)) for key in self._homes}
        self._uses = Uses()
        self._settled = False
        self._unused: set[str] = set()

    def trainable(self) -> dict[str, nn.Parameter]:
        """See `ObservedLayer`; those in a ParameterList or ParameterDict are named "list.0"."""
        found = {}
        for name, (home, key) in self._homes.items():
            p = home._parameters.get(key)
            if p is not None and p.requires_grad:
                found[name] = p
        return found

    def observed_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's forward pass, measured."""
        if not torch.is_grad_enabled():
            return self.plain_class.forward(self, *args, **kwargs)
        own = self.trainable()
        try:
            if own and not self._settled and _in_checkpoint() and self._observer.may_fall_back:
                self._rehearse(own, args, kwargs)
            return self._watched(own, args, kwargs)
        except UnmeasuredUse as error:
            use = error.args[0]
        if own and self._observer.may_fall_back:
            self._observer.fall_back(self)
            return self.forward(*args, **kwargs)  # of another class now
        raise UnsupportedLayerError(
            f"layer {layer_name(self.observed_name)} ({self.plain_class.__name__}): what a sample "
            f"adds to the gradient of its parameters ({', '.join(own) or 'of positions'}) cannot "
            f'be measured: {use}. Observe with fallback="vmap"; freeze them; or move what is '
            "computed with them into a supported layer"
        )

    def _watched(
        self, own: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The forward pass, with the module's own parameters.

        Raises:
            UnmeasuredUse: what cannot be measured.
        """
        plain, outer = self.plain_class.forward, self._observer.shared_values
        samples = None if outer is None else outer.samples
        samples = _samples(args, kwargs) if samples is None else samples
        values = SharedValues(self, samples, list(self._buffers.values()))
        self.coordinate_probes()
        sources = [Own(functools.partial(self._expanded, values, name), name) for name in own]
        for p, source in zip(own.values(), sources, strict=True):
            values.add(p, source)
        self._observer.shared_values = values
        try:
            if torch.compiler.is_compiling():
                with values:
                    found = plain(self, *args, **kwargs)
            else:
                if own:  # otherwise when there is a value to watch
                    values.begin()
                found = plain(self, *args, **kwargs)
                values.end()
            values.hand_over(tree_leaves(found), outer)
        finally:
            self._observer.shared_values = outer
            values.clear()
        self._settle({source.name for source in sources if not source.used})
        return found

    def _settle(self, unused: set[str]) -> None:
        """That nothing went unseen: parameters when compiling, and layers in the first pass.

        The compiler hides attributes (`weight.T`) from what watches; eager forward passes show
        which parameters are not used at all. Layers that were not called may lend their weights to
        this forward pass; without vmap to fall back on the first backward pass shows that.
        """
        if torch.compiler.is_compiling():
            if not unused <= self._unused:
                names = ", ".join(sorted(unused))
                raise UnmeasuredUse(
                    f"the compiler does not show what becomes of {names}: write weight.t() for "
                    "weight.T; if unused, run one forward pass before compiling"
                )
            return
        self._unused = unused
        if self._settled or not self.observed_parameters:
            return
        self._settled = True
        idle = self._observer.uncalled(self) if self._observer.may_fall_back else []
        if idle:
            raise UnmeasuredUse(f"the layers {', '.join(map(repr, idle))} in it were not called")

    def _rehearse(
        self, own: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Tries the forward pass out: a checkpoint must not see one that is given up halfway."""
        device = next(iter(own.values())).device
        devices = [] if device.type == "cpu" else [device]
        with (
            self._observer.rehearsal(),
            torch.random.fork_rng(devices),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            self._watched(own, args, kwargs)

    def _expanded(self, values: SharedValues, name: str, samples: int) -> Tensor:
        home, key = self._homes[name]
        p = home._parameters[key]
        assert p is not None
        self._remember(Use("expand", name))
        x = p.detach().unsqueeze(0).expand(samples, *p.shape)
        probe, weight_probe, call = self._start(values, name, x)
        return functional.expand(p, samples, probe, weight_probe, call)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module without those of the modules in it, but for parameter lists."""
    return {name: home._parameters[key] for name, (home, key) in _homes(module).items()}  # type: ignore[misc]


def _homes(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """By the name in the module: where a parameter is, and under which key."""
    found = {key: (module, key) for key, p in module._parameters.items() if p is not None}
    for name, child in module._modules.items():
        if isinstance(child, _LISTS):
            found |= {f"{name}.{key}": home for key, home in _homes(child).items()}
    return found


def _in_checkpoint() -> bool:
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
    return hooks(True) is not None


def _samples(args: Iterable[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many samples a module is given: dimension 0 of its first argument that is no row of 1."""
    tensors = [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor) and t.dim()]
    for t in tensors:
        if t.shape[0] != 1:
            return t.shape[0]
    return 1 if tensors else None


def refusal_of(module: nn.Module) -> str:
    """Why a module of another class cannot be observed by `ObservedModule`; empty if it can."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        return "it is of torch.nn"
    for name in _NAMES:
        if hasattr(module, name):
            return f"its {name!r} has a name that observed layers need"
    return ""


_NAMES = {
    name
    for c in (ObservedModule, MeasuredFunctions, ObservedLayer)
    for name in vars(c)
    if not name.startswith("__")
}.union(OWN_ATTRIBUTES)


@functools.cache
def module_class(plain: type[nn.Module]) -> type[ObservedModule]:
    """The observed class of any module class; under its name, with its forward's signature."""

    @functools.wraps(plain.forward)
    def forward(self: ObservedModule, *args: Any, **kwargs: Any) -> Any:
        return self.observed_forward(*args, **kwargs)

    names = {"forward": forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (ObservedModule, plain), names)
