"""Modules of any class: their own parameters measure where the forward pass uses them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import functional
from ..faults import layer_name
from .attempt import Attempt, in_checkpoint
from .base import OWN_ATTRIBUTES, ObservedLayer, UnsupportedLayerError
from .folded import run_counted, samples_of
from .measured_functions import MeasuredFunctions, Paddings, Use, uses_of
from .shared_sources import ModuleCall, Own, UnmeasuredUse
from .shared_values import SharedValues

PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)
"""Modules without a forward pass, whose parameters belong to the module around them."""


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
        uses = uses_of(self.observed_parameters)
        self._calls = {use: functional.Call(functional.listen(self)) for use in uses}
        self._uses = {call.key: use for use, call in self._calls.items()}
        self._paddings = Paddings()
        self._settled = False
        self.observed_unused: dict[str, bool] = {}
        modules = [m for m in self.modules() if not type(m).__module__.startswith("torch.nn.")]
        self._constants = [(m._buffers, key) for m in modules for key in m._buffers]
        self._constants += [
            (m.__dict__, key)
            for m in modules
            for key, t in vars(m).items()
            if isinstance(t, Tensor)
        ]

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
        if self.observed_counts:
            return run_counted(self, self.measured_forward, args, kwargs)
        return self.measured_forward(*args, **kwargs)

    def measured_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same, where the samples are counted already if that is needed."""
        if not torch.is_grad_enabled():
            return self.plain_class.forward(self, *args, **kwargs)
        outer, own = self._observer.shared_values, self.trainable()
        if outer is not None and self.observed_folded and not outer.folded:
            # Dimension 0 counts something else here: a watch of its own.
            inputs = tree_leaves((args, kwargs))
            outer.check_met(inputs, f"the folded layer {self.observed_name!r} takes it")
            outer = None
        if outer is not None and not own:
            return self.plain_class.forward(self, *args, **kwargs)
        attempt = None
        if own and not self._settled and self._observer.may_fall_back:
            attempt = Attempt(self, self._observer, args, kwargs)
        try:
            if attempt is not None and in_checkpoint():
                with attempt.rehearsal():
                    self._watched(outer, own, args, kwargs)
            return self._watched(outer, own, args, kwargs)
        except UnmeasuredUse as error:
            how, owner = error.args
            falls = own and self._observer.may_fall_back and self._contains(owner)
            if outer is not None and not falls:
                raise
        if falls:
            if outer is not None:
                outer.forget(set(self.modules()))
            self._observer.fall_back(self)
            if attempt is not None:
                attempt.undo()
            return self.forward(*args, **kwargs)  # of another class now
        kind = owner.plain_class.__name__
        raise UnsupportedLayerError(
            f"layer {layer_name(owner.observed_name)} ({kind}): what a sample adds to the gradient "
            f"of its parameters ({', '.join(owner.observed_parameters)}) "
            f'cannot be measured: {how}. Observe with fallback="vmap"; freeze them; or move what '
            "is computed with them into a supported layer"
        )

    def _contains(self, owner: object) -> bool:
        return isinstance(owner, ObservedModule) and any(owner is m for m in self.modules())

    def _watched(
        self,
        outer: SharedValues | None,
        own: Mapping[str, nn.Parameter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward pass, in the watch of the module around this one, or in one that it begins.

        Raises:
            UnmeasuredUse: what cannot be measured.
        """
        if outer is not None:
            return self._run(outer, own, args, kwargs)
        constants = [of.get(key) for of, key in self._constants]
        values = SharedValues(
            samples_of(args, kwargs),
            [t for t in constants if isinstance(t, Tensor)],
            self.observed_folded,
        )
        before, self._observer.shared_values = self._observer.shared_values, values
        try:
            with values:
                found = self._run(values, own, args, kwargs)
            values.check_met(tree_leaves(found), "it is returned")
            _check_seen(values.own)
        finally:
            self._observer.shared_values = before
            values.clear()
        return found

    def _run(
        self,
        values: SharedValues,
        own: Mapping[str, nn.Parameter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The plain forward pass, with the module's own parameters among the shared values."""
        self.coordinate_probes()
        call = ModuleCall()
        sources = [Own(name, self, call) for name in own]
        for p, source in zip(own.values(), sources, strict=True):
            values.add(p, source)
        values.own = values.own + sources
        if own and not self._settled and self._observer.may_fall_back:
            values.note_taken()
        found = self.plain_class.forward(self, *args, **kwargs)
        values.drop(sources, but=tree_leaves(found))
        if own and not torch.compiler.is_compiling():
            self._settle(values)
        return found

    def _settle(self, values: SharedValues) -> None:
        """That no layer inside has lent its weight, in the first forward pass.

        Without vmap to fall back on the first backward pass shows that.
        """
        if not self._settled and values.taken is not None:
            for layer in self._observer.uncalled(self):
                if any(id(p) in values.taken for p in layer.trainable().values()):
                    raise UnmeasuredUse(
                        f"it uses parameters of the layer {layer.observed_name!r}, which it does "
                        "not call", self,
                    )  # fmt: skip
        self._settled = True

    def expanded(self, own: Own, samples: int) -> Tensor:
        """A parameter once for each sample, measured; in a folded module once for each row."""
        home, key = self._homes[own.name]
        p = home._parameters[key]
        assert p is not None
        samples, k = self.rows_of_samples(samples)
        x = p.detach().unsqueeze(0).expand(samples, *p.shape)
        probe, weight_probe, call = self._start(own, Use("expand", own.name), x)
        rows = functional.expand(p, samples, probe, weight_probe, call)
        if not self.observed_folded:
            return rows
        return rows.unsqueeze(1).expand(samples, k, *p.shape).flatten(0, 1)


def _check_seen(own: list[Own]) -> None:
    """That the compiler has shown what becomes of each parameter.

    It hides attributes (`weight.T`) from what watches; eager forward passes tell which parameters
    are not used at all.
    """
    if not torch.compiler.is_compiling():
        for source in own:
            source.owner.observed_unused[source.name] = not source.used
        return
    for source in own:
        if not source.used and not source.owner.observed_unused.get(source.name):
            raise UnmeasuredUse(
                f"the compiler does not show what becomes of {source.name}: write weight.t() for "
                "weight.T; if unused, run one forward pass before compiling", source.owner,
            )  # fmt: skip


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module without those of the modules in it, but for parameter lists."""
    return {name: home._parameters[key] for name, (home, key) in _homes(module).items()}  # type: ignore[misc]


def _homes(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """By the name in the module: where a parameter is, and under which key."""
    found = {key: (module, key) for key, p in module._parameters.items() if p is not None}
    for name, child in module._modules.items():
        if isinstance(child, PARAMETER_LISTS):
            found |= {f"{name}.{key}": home for key, home in _homes(child).items()}
    return found


def refusal_of(module: nn.Module) -> str:
    """Why a module of another class cannot be observed by `ObservedModule`; empty if it can."""
    if type(module).__module__.startswith("torch.nn."):
        return "it is of torch.nn"
    return why_fixed(module)


def why_fixed(module: nn.Module) -> str:
    """Why the class of a module cannot be exchanged for one derived from it; empty if it can."""
    kind = type(module)
    if isinstance(module, torch.fx.GraphModule):
        return "it is a GraphModule, which makes its own class"
    if "forward" in vars(module):
        return "its forward is not that of its class"
    for name in _NAMES:
        if hasattr(module, name):
            return f"its {name!r} has a name that observed layers need"
    try:
        module_class(kind)
    except Exception as error:  # of the class's own __init_subclass__ or metaclass
        return f"a class cannot be derived from its own: {error}"
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
        if "_observer" not in self.__dict__:  # made by code of its own, as a copy of type(self)
            return plain.forward(self, *args, **kwargs)
        return self.observed_forward(*args, **kwargs)

    names = {"forward": forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (ObservedModule, plain), names)
