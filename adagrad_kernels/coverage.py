"""What an observer measures, how, and what that costs: records that print as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from . import costs
from .costs import Call, Cost
from .functional.conv import sample_grads_are_cheap
from .layers import (
    CountedModel,
    ObservedFallback,
    ObservedLayer,
    ObservedModule,
    own_parameters,
)
from .layers.base import Seen
from .layers.linear import ObservedConv1D, ObservedLinear


@dataclass(frozen=True)
class CoverageRecord:
    """How one parameter is measured.

    Attributes:
        name: the parameter's name in the model.
        layer: class of the layer that owns it.
        method: how its statistics are computed, empty if they are not.
        reason: why not, empty if they are.
        owner: the layer's name in the model.
        cost: what the layer's statistics cost by the model of `adagrad_kernels.costs`, for the
            shapes of its last forward pass (eager, with gradients); None before one, for a
            parameter that is not measured, and for modules of other classes: what they compute is
            not known.
        positions: whether it embeds positions that all samples share, which are measured in the
            module around the layer.
    """

    name: str
    layer: str
    method: str
    reason: str = ""
    owner: str = ""
    cost: Cost | None = None
    positions: bool = False


class Coverage(list[CoverageRecord]):
    """A list of records that prints as a table."""

    def costs(self) -> dict[str, Cost]:
        """Of each layer by its name, where it is known."""
        return {r.owner: r.cost for r in self if r.cost is not None}

    def __str__(self) -> str:
        """One line a parameter; the cost of a layer beside the first one that is measured."""
        head = ("parameter", "layer", "method", "extra operations", "extra bytes")
        rows: list[tuple[str, ...]] = [head]
        told: set[str] = set()
        for r in self:
            cost = ("", "")
            if r.method and r.owner not in told:
                told.add(r.owner)
                cost = _cost(r)
            rows.append((r.name, r.layer, r.method or f"not measured: {r.reason}", *cost))
        if known := list(self.costs().values()):
            total = sum(known[1:], known[0])
            rows.append(("all layers with a cost", "", "", *_ratios(total)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(
                [row[i].ljust(widths[i]) for i in range(3)]
                + [row[i].rjust(widths[i]) for i in (3, 4)]
            ).rstrip()
            for row in rows
        )


def _cost(record: CoverageRecord) -> tuple[str, str]:
    if record.cost is not None:
        return _ratios(record.cost)
    unknown = record.method.startswith(
        (ObservedFallback.observed_method, ObservedModule.observed_method)
    )
    return ("unknown", "unknown") if unknown else ("not seen yet", "not seen yet")


def _ratios(cost: Cost) -> tuple[str, str]:
    return percent(cost.flops_ratio), percent(cost.bytes_ratio)


def percent(ratio: float) -> str:
    """A ratio for people: +3.1 %, +250 %."""
    return f"+{ratio:.0%}" if ratio >= 0.995 else f"+{ratio:.1%}"


def coverage_of(
    model: nn.Module,
    layers: Sequence[ObservedLayer],
    names: dict[nn.Parameter, str],
    tied: set[ObservedLayer],
    coordinates: bool,
    inner_products: bool,
    partial: bool,
) -> Coverage:
    """A record for every parameter of the observed layers, and of the others if there are any.

    Args:
        model: what is observed.
        layers: its observed layers.
        names: of all parameters.
        tied: layers that share a parameter with another one.
        coordinates: whether coordinate sums are measured.
        inner_products: whether inner products are.
        partial: whether there are layers that were not chosen.
    """
    measured = {p for layer in layers for p in layer.trainable().values()}
    records = Coverage()
    for layer in layers:
        kind, owner = layer.plain_class.__name__, layer.observed_name
        cost = cost_of(layer, coordinates, inner_products)
        how = layer.observed_method if cost is None else cost.method
        if layer in tied:
            how += ", cross terms"
        trainable = layer.trainable().values()
        for p in _own(layer):
            if any(p is q for q in trainable):
                shared = bool(layer.takes_positions)
                records.append(CoverageRecord(names[p], kind, how, "", owner, cost, shared))
            elif p not in measured:  # otherwise it belongs to an observed layer inside this one
                records.append(CoverageRecord(names[p], kind, "", "frozen", owner))
    if partial:
        known = {record.name for record in records}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if names[p] not in known:
                    kind = type(module).__name__
                    records.append(CoverageRecord(names[p], kind, "", "not chosen"))
    return records


def _own(layer: ObservedLayer) -> Iterable[nn.Parameter]:
    if isinstance(layer, CountedModel):  # it measures nothing
        return ()
    if isinstance(layer, ObservedModule):  # the layers in it have records of their own
        return own_parameters(layer).values()
    return cast(nn.Module, layer).parameters()


def cost_of(layer: ObservedLayer, coordinates: bool, inner_products: bool) -> Cost | None:
    """What the layer's statistics cost, for the shapes that its last calls had."""
    trainable = layer.trainable()
    if isinstance(layer, (ObservedFallback, ObservedModule)) or not trainable:
        return None
    found: Cost | None = None
    for key, seen in layer.seen.items():
        bias = trainable.get("bias")
        call = Call(
            samples=seen.shape[0],
            inputs=seen.shape.numel(),
            outputs=seen.shape.numel(),
            dtype=seen.dtype,
            device=next(iter(trainable.values())).device.type,
            input_grad=seen.input_grad,
            weight="weight" in trainable,
            bias=0 if bias is None else bias.numel(),
            coordinates=coordinates,
            inner_products=inner_products,
        )
        cost = _of_call(cast(Any, layer), key, seen, call)
        found = cost if found is None else found + cost
    return found


def _of_call(layer: Any, key: int, seen: Seen, call: Call) -> Cost:
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return _projection(layer, key, seen, call)
    if isinstance(layer, _ConvNd):
        return _conv(layer, seen, call)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        rows, width = layer.weight.shape
        call = call._replace(outputs=call.inputs * width, dtype=layer.weight.dtype)
        return costs.embedding(call, call.inputs, rows, width, isinstance(layer, nn.EmbeddingBag))
    if isinstance(layer, (ObservedLinear, ObservedConv1D)):
        return _linear(seen, call, layer.weight.numel() // seen.shape[-1])
    channels, has_bias = layer.weight.numel(), getattr(layer, "bias", None) is not None
    call = call._replace(keeps_sample_grads=call.input_grad and _is_normalisation(layer))
    return costs.scale(call, channels, has_bias, _extra_passes(layer))


def _is_normalisation(layer: nn.Module) -> bool:
    """Whether its backward pass is one op."""
    apart = isinstance(layer, _InstanceNorm) and layer.track_running_stats
    return not apart and not isinstance(layer, nn.PReLU)


def _extra_passes(layer: nn.Module) -> int:
    """Over the input, where the layer runs in more kernels than plain PyTorch's."""
    if isinstance(layer, nn.PReLU):
        # Plain: 2 forward, 5 backward. Here: clamp 2, scale 2, relu 2, their sum 3; backward scale
        # 2 and 2, clamp 3, relu 3, their sum 3.
        return 15
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return 4  # the normalised numbers are written and read, on the way back their gradient
    return 0


def _projection(layer: Any, key: int, seen: Seen, call: Call) -> Cost:
    whole, _ = layer.part_of(key, layer._parameters)
    weight, bias = layer.part_of(key, layer.trainable())
    rows = whole.shape[0]
    call = call._replace(weight=weight is not None, bias=0 if bias is None else rows)
    return _linear(seen, call, rows)


def _linear(seen: Seen, call: Call, rows: int) -> Cost:
    columns = seen.shape[-1]
    call = call._replace(outputs=call.inputs // max(1, columns) * rows)
    return costs.product(call, seen.shape[1:-1].numel(), rows, columns)


def _conv(layer: Any, seen: Seen, call: Call) -> Cost:
    weight = torch.empty(layer.weight.shape, device="meta")
    x = torch.empty(seen.shape, device="meta")
    images = 1
    if x.dim() > weight.dim():  # of a folded layer
        images = x.shape[1]
        x = x.flatten(0, 1)
    if layer.transposed:
        of: Any = getattr(F, f"conv_transpose{x.dim() - 2}d")
        y = of(x, weight, None, layer.stride, layer.padding, layer.output_padding, layer.groups,
               layer.dilation)  # fmt: skip
        positions = x.shape[2:].numel()  # its weight gradient takes the output for the input
    else:
        y: torch.Tensor = layer.respond(
            0, (x,), {"weight": weight}
        )  # x is padded already, as far as need be
        positions = y.shape[2:].numel()
    rows = weight.shape[0] // layer.groups
    columns = weight.shape[1:].numel()
    positions *= images
    call = call._replace(outputs=y.numel())
    sizes = call.samples, positions, weight.numel(), call.inputs + call.outputs
    keeps = call.weight and call.device == "cpu"
    call = call._replace(keeps_sample_grads=keeps and sample_grads_are_cheap(*sizes))
    return costs.product(call, positions, rows, columns, layer.groups, linear=False)
