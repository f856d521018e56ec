"""Modules of any class: their own parameters measure where the forward pass uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import functional
from ..faults import layer_name
from .base import OWN_ATTRIBUTES, ObservedLayer, UnsupportedLayerError
from .embedding import embedding_response, measure_tokens
from .linear import linear_response
from .normalisation import affine_response
from .shared_values import Own, SharedValues, UnmeasuredUse, matrix_of

_LISTS = (nn.ParameterList, nn.ParameterDict)


class Use(NamedTuple):
    """What a call of the module did with its parameters.

    Attributes:
        kind: the function of `functional` that measured it.
        weight: the parameter's name in the module, "" if there is none.
        bias: likewise.
        transposed: of a matrix, whether it is [I, O].
        padding: of an embedding the row without gradient, or -1.
    """

    kind: str
    weight: str
    bias: str = ""
    transposed: bool = False
    padding: int = -1


class ObservedModule(ObservedLayer, nn.Module):
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
        self._uses: dict[int, Use] = {}
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

    def _start(self, values: SharedValues, name: str, x: Tensor) -> tuple[Any, ...]:
        """(probe, coordinate probe, call) of a use of this parameter, with x [b, …]."""
        probe, call = self.probe_and_call(x, self._calls[name])
        call = call._replace(counts=not values.counted)
        values.counted = True
        return probe, self._coordinate_probes.get(name), call

    def _remember(self, use: Use) -> None:
        key = self._calls[use.weight or use.bias].key
        if self._uses.get(key) != use:
            self._uses[key] = use

    def _expanded(self, values: SharedValues, name: str, samples: int) -> Tensor:
        home, key = self._homes[name]
        p = home._parameters[key]
        assert p is not None
        self._remember(Use("expand", name))
        x = p.detach().unsqueeze(0).expand(samples, *p.shape)
        probe, weight_probe, call = self._start(values, name, x)
        return functional.expand(p, samples, probe, weight_probe, call)

    # Functions whose kernels measure. Each returns None where it is used in another way.

    def measure_function(
        self,
        values: SharedValues,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """See `Owner`."""
        if function is F.linear:
            return self._linear(values, *args, **kwargs)
        if function in _PRODUCTS and len(args) == 2:
            return self._linear(values, *args, transposed=True)
        if function is F.layer_norm:
            return self._layer_norm(values, *args, **kwargs)
        if function in _RMS_NORMS:
            return self._rms_norm(values, *args, **kwargs)
        return None

    def _linear(
        self,
        values: SharedValues,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        transposed: bool = False,
    ) -> Tensor | None:
        matrix, shift = matrix_of(values.source(weight)), matrix_of(values.source(bias))
        if matrix is None or values.source(input) is not None or input.dim() < 2:
            return None
        own, turned = matrix
        if weight.dim() != 2 or not own.take() or (bias is not None and shift is None):
            return None
        if shift is not None and not shift[0].take():
            return None
        turned = turned != transposed
        self._remember(Use("linear", own.name, shift[0].name if shift else "", turned))
        probe, weight_probe, call = self._start(values, own.name, input)
        bias_probe = self._coordinate_probes.get(shift[0].name) if shift else None
        if transposed:
            weight = weight.t()
        if weight_probe is not None and turned:
            weight_probe = weight_probe.t()
        return functional.linear(input, weight, bias, probe, weight_probe, bias_probe, call)

    def _layer_norm(
        self,
        values: SharedValues,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        own = self._scale_and_shift(values, input, normalized_shape, weight, bias)
        if own is None:  # as of 1 + weight
            y = F.layer_norm(input, normalized_shape, None, None, eps)
            y = y if weight is None else values.apply(torch.mul, y, weight)
            return y if bias is None else values.apply(torch.add, y, bias)
        probe, weight_probe, call = self._start(values, own[0], input)
        bias_probe = self._coordinate_probes.get(own[1])
        return functional.layer_norm(
            input, normalized_shape, cast(Tensor, weight), bias, eps,
            probe, weight_probe, bias_probe, call,
        )  # fmt: skip

    def _rms_norm(
        self,
        values: SharedValues,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor,
        eps: float | None = None,
    ) -> Any:
        own = self._scale_and_shift(values, input, normalized_shape, weight, None)
        if own is None:
            y = F.rms_norm(input, normalized_shape, None, eps)
            return values.apply(torch.mul, y, weight)
        probe, weight_probe, call = self._start(values, own[0], input)
        return functional.rms_norm(input, normalized_shape, weight, eps, probe, weight_probe, call)

    def _scale_and_shift(
        self,
        values: SharedValues,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[str, str] | None:
        """The names of two parameters that a normalisation's kernel can measure, or None."""
        if values.source(input) is not None or input.dim() <= len(normalized_shape):
            raise UnmeasuredUse("it normalises what all samples share")
        scale, shift = values.source(weight), values.source(bias)
        if not isinstance(scale, Own) or not (bias is None or isinstance(shift, Own)):
            return None
        if not scale.take() or (isinstance(shift, Own) and not shift.take()):
            return None
        names = scale.name, shift.name if isinstance(shift, Own) else ""
        self._remember(Use("normalisation", *names))
        return names

    def measure_embedding(
        self,
        values: SharedValues,
        function: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        """See `Owner`."""
        own = values.source(weight)
        if max_norm is not None or scale_grad_by_freq or sparse or not isinstance(own, Own):
            return None
        if not own.take():
            return None
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        self._remember(Use("embedding", own.name, padding=padding))

        def measure(tokens: Tensor) -> Tensor:
            probe, weight_probe, call = self._start(values, own.name, tokens)
            return functional.embedding(tokens, weight, padding_idx, probe, weight_probe, call)

        return measure_tokens(self, input, lambda: function(input, weight, padding_idx), measure)

    # After the backward pass.

    def factors(self, call: functional.Call, name: str) -> tuple[str, int]:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        if use.weight == name and use.kind in ("linear", "embedding") and not use.transposed:
            return use.kind, use.padding
        return "", -1

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        weight, bias = params.get(use.weight), params.get(use.bias)
        if use.kind == "linear":
            weight = weight.t() if weight is not None and use.transposed else weight
            return linear_response(operands[0], weight, bias)
        if use.kind == "embedding":
            return embedding_response(operands[0], params[use.weight], use.padding)
        return affine_response(operands, weight, bias)

    def contract(
        self, call: functional.Call, saved: tuple[Tensor, ...], params: Mapping[str, Tensor]
    ) -> Tensor:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        used = {name: p for name, p in params.items() if name in (use.weight, use.bias)}
        dtype = next(iter(params.values())).dtype
        if not used:
            return saved[-1].new_zeros(saved[-1].shape[0], dtype=dtype)
        if use.kind != "expand":
            return super().contract(call, saved, used)
        grads = saved[-1].reshape(saved[-1].shape[0], -1)
        return grads.to(dtype) @ used[use.weight].reshape(-1)

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        use, (grad, own) = self._uses[call.key], (saved[-1], self.trainable())
        found = {n: grad.new_zeros(grad.shape[0], *own[n].shape) for n in names}
        used = [n for n in names if n in (use.weight, use.bias)]
        if use.kind == "expand":
            return found | dict.fromkeys(used, grad)
        return found | (super().sample_grads(call, saved, used) if used else {})


_RMS_NORMS = {F.rms_norm, torch.rms_norm}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm}


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
    name for c in (ObservedModule, ObservedLayer) for name in vars(c) if not name.startswith("__")
}.union(OWN_ATTRIBUTES)


@functools.cache
def module_class(plain: type[nn.Module]) -> type[ObservedModule]:
    """The observed class of any module class; under its name, with its forward's signature."""

    @functools.wraps(plain.forward)
    def forward(self: ObservedModule, *args: Any, **kwargs: Any) -> Any:
        return self.observed_forward(*args, **kwargs)

    names = {"forward": forward, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (ObservedModule, plain), names)
