"""Attaching an observer to a model: which layers are observed, and how their classes change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from .distributed import is_data_parallel
from .faults import layer_name
from .layers import (
    OBSERVED,
    PARAMETER_LISTS,
    TRUSTED,
    ObservedEmbedding,
    ObservedFallback,
    ObservedLayer,
    ObservedModule,
    counted_class,
    fallback_class,
    module_class,
    observed_class,
    own_parameters,
    refusal_of,
    why_fixed,
)
from .layers.base import CallRecorder, UnsupportedLayerError


def attach(
    model: nn.Module,
    observer: CallRecorder,
    fallback: str,
    coordinates: bool,
    chosen: Iterable[str | nn.Module] | None = None,
    folded: Iterable[str | nn.Module] = (),
) -> tuple[list[ObservedLayer], dict[nn.Parameter, str], set[ObservedLayer]]:
    """Exchanges the classes of the model's layers, of the chosen ones or of all.

    Returns:
        The observed layers, the name of every parameter, and the layers that share a parameter
        with another one.
    """
    names = {p: name for name, p in model.named_parameters()}
    if not any(p.requires_grad for p in names):
        raise ValueError("the model has no trainable parameters: there is nothing to observe")
    for module in model.modules():
        if isinstance(module, ObservedLayer) and module.abandoned:
            module.detach()
    inside = None if chosen is None else _modules_in(model, chosen, "layers")
    if inside is not None and not _trainable_in(inside):
        raise ValueError("layers: none of them has trainable parameters")
    plan = _plan(model, fallback, inside)
    if inside is not None:
        _check_closed(model, inside)
    in_folded = _modules_in(model, folded, "folded")
    if in_folded:
        plan = _counting(model, plan, in_folded)
    for name, (module, _) in plan.items():
        if coordinates and getattr(module, "sparse", False) is True:
            raise ValueError(
                f"layer {layer_name(name)} has sparse gradients, whose coordinate sums are not "
                "measured: build it with sparse=False, or take a test that needs no coordinates"
            )
    layers = [
        _exchange(module, observed, observer, name) for name, (module, observed) in plan.items()
    ]
    _, inner = _unwrapped(model)
    for layer in layers:
        layer.observed_folded = layer in in_folded
        layer.observed_counts = bool(in_folded) and layer is inner
    return layers, names, tied_layers(layers)


def _unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """The model in `DistributedDataParallel` and `torch.compile`, with its name there."""
    names = []
    while True:
        inner = "module" if is_data_parallel(model) else "_orig_mod"
        if inner not in model._modules:
            return ".".join(names), model
        names.append(inner)
        model = cast(nn.Module, model._modules[inner])


def _counting(
    model: nn.Module,
    plan: dict[str, tuple[nn.Module, type[ObservedLayer]]],
    folded: set[nn.Module],
) -> dict[str, tuple[nn.Module, type[ObservedLayer]]]:
    """The plan with the model itself, which tells folded layers how many samples there are."""
    top, inner = _unwrapped(model)
    measured = {name: pair for name, pair in plan.items() if pair[0] in folded}
    if inner in folded or not measured:
        what = (
            "the model itself is" if inner in folded else "no layer of these is measured by itself"
        )
        raise ValueError(
            f"folded: {what}; name modules in it, which see several rows of each sample"
        )
    for name, (module, observed) in measured.items():
        if not observed.foldable:
            kind = type(module).__name__
            raise ValueError(f"folded: layer {name!r} ({kind}) cannot be measured there")
    if top in plan:
        return plan
    if reason := why_fixed(inner):
        raise ValueError(f"folded: the model cannot count its samples: {reason}")
    return {top: (inner, counted_class(type(inner))), **plan}


def _exchange(
    module: nn.Module, observed: type[ObservedLayer], observer: CallRecorder, name: str
) -> ObservedLayer:
    module.__dict__["plain_class"] = type(module)
    module.__class__ = observed  # type: ignore[assignment]
    layer = cast(ObservedLayer, module)
    layer.attach(observer, name)
    return layer


def tied_layers(layers: Iterable[ObservedLayer]) -> set[ObservedLayer]:
    """Those that use a parameter in several places, of their own or of another layer.

    Frozen ones, too: they may be unfrozen.
    """
    users: dict[nn.Parameter, list[ObservedLayer]] = {}
    for layer in layers:
        module, whole = cast(nn.Module, layer), isinstance(layer, ObservedFallback)
        own = dict(module.named_parameters(recurse=whole, remove_duplicate=False))
        for p in (own_parameters(module) if isinstance(layer, ObservedModule) else own).values():
            users.setdefault(p, []).append(layer)
    return {layer for found in users.values() if len(found) > 1 for layer in found}


def give_back(layer: ObservedLayer) -> None:
    """Gives a layer its class back."""
    plain = detached_class(layer)
    layer.release()
    layer.__class__ = plain  # type: ignore[assignment]


def measure_by_vmap(
    layer: ObservedLayer, observer: CallRecorder, layers: list[ObservedLayer]
) -> list[ObservedLayer]:
    """Has a module measured by vmap, with everything in it.

    Returns:
        The layers that are observed now: the others of `layers`, and this one.
    """
    name, folded = layer.observed_name, layer.observed_folded
    inside = set(cast(nn.Module, layer).modules())
    kept = [other for other in layers if other not in inside]
    for other in layers:
        if other in inside:
            give_back(other)
    module = cast(nn.Module, layer)
    by_vmap = _exchange(module, fallback_class(type(module)), observer, name)
    by_vmap.observed_folded = folded
    return [*kept, by_vmap]


def detached_class(layer: ObservedLayer) -> type[nn.Module]:
    """The class of the layer without its observer, with what others have added to it since."""
    added = [cls for cls in type(layer).__mro__ if cls.__name__ == "FSDPModule"]
    plain = layer.plain_class
    if not added or issubclass(plain, added[0]):
        return plain
    # fully_shard has derived a class from the observed one, as it would have from the plain one.
    own = dict(type(layer).__dict__)
    return type(f"FSDP{plain.__name__}", (added[0], plain), {"__deepcopy__": own["__deepcopy__"]})


def _modules_in(
    model: nn.Module, chosen: Iterable[str | nn.Module], argument: str
) -> set[nn.Module]:
    """The modules that are named, or given, with everything in them."""
    if isinstance(chosen, (str, nn.Module)):
        raise TypeError(f"{argument} must be a list of names or modules, got {chosen!r}")
    named = dict(model.named_modules(remove_duplicate=False))
    own = set(named.values())
    inside: set[nn.Module] = set()
    for choice in chosen:
        module = named.get(choice) if isinstance(choice, str) else choice
        if module not in own:
            kind = repr(choice) if isinstance(choice, str) else type(choice).__name__
            raise ValueError(
                f"{argument}: {kind} is no module of the model; it has "
                + ", ".join(repr(name) for name, _ in model.named_children())
                + ", and modules in them"
            )
        inside.update(cast(nn.Module, module).modules())
    return inside


def _trainable_in(modules: Iterable[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters(recurse=False))


def _check_closed(model: nn.Module, inside: set[nn.Module]) -> None:
    """That no layer outside has a parameter of the chosen ones, whose gradient it would change."""
    measured = {p for module in inside for p in module.parameters(recurse=False)}
    for name, module in model.named_modules():
        if module in inside:
            continue
        for key, p in module.named_parameters(recurse=False):
            if p in measured and p.requires_grad:
                raise ValueError(
                    f"layers: {f'{name}.{key}'.lstrip('.')!r} is tied to a parameter of a chosen "
                    f"layer; choose {name!r} as well"
                )


def _plan(
    model: nn.Module, fallback: str, inside: set[nn.Module] | None
) -> dict[str, tuple[nn.Module, type[ObservedLayer]]]:
    """Name, module and observed class of each layer; changes nothing."""
    plan: dict[str, tuple[nn.Module, type[ObservedLayer]]] = {}
    units: list[str] = []  # modules that are measured with everything in them, or lists in one
    for name, module in model.named_modules():
        if any(unit in ("", name) or name.startswith(unit + ".") for unit in units):
            continue
        if inside is not None and module not in inside:
            continue
        computed = _computed(module)
        own = dict(module.named_parameters(recurse=bool(computed)))
        if isinstance(module, ObservedLayer):
            raise ValueError(
                f"layer {layer_name(name)} is observed already: call detach() of the optimizer (or "
                "observer) that was made for this model before, or make the model anew"
            )
        if any(nn.parameter.is_lazy(p) for p in own.values()):
            raise ValueError(f"layer {name!r} is lazy; run one forward pass before observing")
        if any(p.is_complex() and p.requires_grad for p in own.values()):
            raise ValueError(
                f"layer {layer_name(name)} has complex parameters: keep real and imaginary "
                "parts as parameters of their own, or freeze them"
            )
        trainable = [key for key, p in own.items() if p.requires_grad]
        observed = observed_class(type(module)) if own and not (computed and trainable) else None
        reason = observed.refusal(module) if observed is not None and trainable else ""
        if computed:
            reason = (
                f"its {computed} is computed from other parameters, as by pruning, weight_norm or "
                "torch.nn.utils.parametrize"
            )
        if observed is not None and not reason:
            plan[name] = module, observed
            continue
        own = own_parameters(module)
        trainable = [key for key, p in own.items() if p.requires_grad]
        known = fallback == "vmap" or type(module).__module__.startswith(TRUSTED)
        if {own[key] for key in trainable} <= _of_layers_inside(module) and not computed:
            continue  # it only holds what a layer in it has, too
        refused = reason or refusal_of(module)
        if known and not refused and not computed:
            plan[name] = module, module_class(type(module))
            units.extend(_lists_in(name, module))
        elif fallback == "vmap":
            plan[name] = module, fallback_class(type(module))
            units.append(name)
        else:
            reason = refused if known else reason
            raise UnsupportedLayerError(_unsupported(name, module, trainable, reason))
    return plan | _around_embeddings(model, plan)


def _of_layers_inside(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of the supported layers in a module."""
    return {
        p
        for layer in module.modules()
        if layer is not module and observed_class(type(layer)) is not None
        for p in layer.parameters(recurse=False)
    }


def _lists_in(name: str, module: nn.Module) -> list[str]:
    return [
        f"{name}.{key}".lstrip(".")
        for key, child in module.named_children()
        if isinstance(child, PARAMETER_LISTS)
    ]


def _around_embeddings(
    model: nn.Module, plan: dict[str, tuple[nn.Module, type[ObservedLayer]]]
) -> dict[str, tuple[nn.Module, type[ObservedLayer]]]:
    """The modules around embeddings, which may be of positions: these meet the samples there."""
    modules = dict(model.named_modules())
    found: dict[str, tuple[nn.Module, type[ObservedLayer]]] = {}
    for name, (_, observed) in plan.items():
        if not issubclass(observed, (ObservedEmbedding, ObservedModule)):
            continue
        parts = name.split(".")
        for around in (".".join(parts[:k]) for k in range(len(parts) - 1, -1, -1)):
            module = modules[around]
            if around != name and around not in plan and not refusal_of(module):
                found[around] = module, module_class(type(module))
    return found


def _computed(module: nn.Module) -> str:
    """The name of a tensor that stands in the place of a parameter; empty if there is none."""
    if nn.utils.parametrize.is_parametrized(module):
        return next(iter(module.parametrizations.keys()))  # type: ignore[union-attr, operator]
    for key, value in vars(module).items():
        # What pruning and the old weight_norm leave: weight_orig, weight_mask; weight_g, weight_v.
        if isinstance(value, Tensor) and any(p.startswith(f"{key}_") for p in module._parameters):
            return key
    return ""


def _unsupported(name: str, module: nn.Module, trainable: list[str], reason: str) -> str:
    known = ", ".join(cls.__name__ for cls in OBSERVED)
    kind = type(module).__name__
    return (
        f"layer {layer_name(name)} ({kind}) has trainable parameters "
        f"({', '.join(trainable)}) whose per-sample gradients cannot be measured"
        + (f" ({reason})" if reason else "")
        + f". Supported: {known} and subclasses that keep their forward. Freeze the parameters "
        'with requires_grad_(False); replace the layer; observe with fallback="vmap", which '
        "measures a module's own parameters where its forward pass uses them, and if that cannot "
        "be, the module with everything in it by torch.func.vmap (exact, slow); test chosen layers "
        "only (observe_layers=); or take WorkerNormTest, which needs no samples' gradients."
    )
