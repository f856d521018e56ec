"""What can be wrong with the backward passes of an observed model, in words, with the way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EMPTY = "a micro-batch without samples has no gradient: leave it out"
NOT_ZEROED = (
    "the gradients still hold what was measured before the last reset(): call zero_grad() after "
    "each step, together with the observer's reset()"
)
CLEARED = (
    "the gradients of the last backward pass were cleared or changed, but its samples are still "
    "counted: to leave a batch out, or to clear the gradients between steps, call zero_grad() of "
    "the optimizer that measures them, not of the model (of an observer by itself: reset(), too)"
)
CHANGED = (
    "the gradients were changed between backward() and step(): the test would compare them with "
    "those of the samples as they were. To clip them, take max_grad_norm= of the optimizer"
)
PROBE_CHANGED = (
    "the layers disagree about the number of samples, or lie on several devices, so that one "
    "backward pass was measured in parts: dimension 0 of every layer's input must count the "
    "samples (expand what is shared: positions.expand(samples, -1); name layers that see several "
    "rows of each sample with folded=[…]), on one device"
)

UNSEEN_DISAGREEMENT = (
    "the layers disagree about the number of samples, or a layer was used twice in one backward "
    "pass of a compiled model; run one step without torch.compile to learn which"
)

REENTRANT = (
    "one backward pass ran several reentrant checkpoints, each of which was measured as a "
    "micro-batch of its own: use torch.utils.checkpoint with use_reentrant=False"
)


def layer_name(name: str) -> str:
    """A module's path in the model, as messages show it."""
    return repr(name or "(the model itself)")


def repeated(layer: str) -> str:
    """More backward passes through a layer than forward passes."""
    return (
        f"layer {layer_name(layer)} took part in more backward passes than forward passes, so "
        "that its samples would count twice: run backward() once for each forward pass, for the "
        "sum of the losses"
    )


def unexpected(layer: str) -> str:
    """A layer that took part twice in one backward pass, after one call in the forward pass."""
    return (
        f"layer {layer_name(layer)} took part twice in one backward pass but was called once in "
        "the forward pass: run backward() once for each forward pass"
    )


def disagreement(calls: Sequence[tuple[str, int]]) -> str:
    """Layers, by name, that were called with different numbers of samples."""
    found: dict[int, list[str]] = {}
    for name, samples in reversed(calls):  # as in the forward pass
        found.setdefault(samples, []).append(name)
    sizes = "; ".join(f"{samples} in {_some(names)}" for samples, names in found.items())
    return (
        f"the layers disagree about the number of samples ({sizes}): dimension 0 of every "
        "layer's input must count the samples, with nothing shared by all of them "
        "(positions.expand(samples, -1)). Layers that see several rows of each sample there, one "
        "sample after another (x.flatten(0, 1)): name them, or modules around them, with folded=[…]"
    )


def tied_later(first: str, second: str) -> str:
    """Two layers that share a parameter only since they are observed."""
    return (
        f"layers {layer_name(first)} and {layer_name(second)} share a parameter since the "
        "optimizer (or observer) was made: tie them before, or detach() that one and make a new one"
    )


def folded_outside(layer: str) -> str:
    """A folded layer that is called by something else than its model."""
    return (
        f"layer {layer_name(layer)} is folded: the number of samples is dimension 0 of the first "
        "tensor that the model is given; call the model itself"
    )


def several_passes(layer: str) -> str:
    """A folded layer in a checkpoint that may belong to several forward passes, or to none."""
    return (
        f"layer {layer_name(layer)} is folded, and a checkpoint runs it again, for which forward "
        "pass is not known: run backward() after each of them, and checkpoints with "
        "use_reentrant=False"
    )


def disjoint(before: set[str], now: set[str]) -> str:
    """Two backward passes through different layers."""
    return (
        f"one backward pass reached the layers {_some(before)}, the next {_some(now)}, none of "
        "them the same: these are not micro-batches of one model. With torch.utils.checkpoint, "
        "use use_reentrant=False"
    )


def _some(names: Iterable[str]) -> str:
    names = sorted(set(names))
    shown = names[:3]
    return ", ".join(map(repr, shown)) + (", …" if len(names) > len(shown) else "")
