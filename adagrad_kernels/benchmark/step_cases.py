"""Whole training steps: forward, loss, backward, update, zero_grad."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .. import AdAdaGrad, NormTest, models
from ..criteria import Criterion
from ..timing import TESTS
from .engine import Case, Variant, require_equal

OPTIONS: dict[str, Any] = {"lr": 1e-3, "initial_accumulator_value": 1.0}
"""Of every AdaGrad here. From an empty accumulator the first step is lr · sign(g), in which the
rounding of a gradient near 0 shows in full, so that results could not be compared."""

ROUNDINGS = 64
"""Always allowed in the statistics of a whole model: one layer's pass through all the others."""


class Measured(NamedTuple):
    """What a variant measured in one step; None for what it does not measure."""

    sample_norms_sq: Tensor | None = None
    coordinate_variance: Mapping[str, Tensor] | None = None
    inner_products: Tensor | None = None


class Reference(NamedTuple):
    """One step's gradient and statistics, and the parameters after it."""

    grads: dict[str, Tensor]
    params: dict[str, Tensor]
    sample_norms_sq: Tensor
    inner_products: Tensor
    second_moment: dict[str, Tensor]
    """Σ_i g_i² / (N − 1) a coordinate: the variance is this less N/(N − 1) ḡ²."""

    @property
    def grad_norm_sq(self) -> Tensor:
        """‖ḡ‖²."""
        return torch.stack([g.square().sum() for g in self.grads.values()]).sum()

    def coordinate_variance(self, name: str) -> Tensor:
        """That of one parameter's coordinates."""
        n = len(self.sample_norms_sq)
        return self.second_moment[name] - n / (n - 1) * self.grads[name].square()


def loss(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over samples (and positions) of the cross-entropy."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Task:
    """A model with one batch.

    Attributes:
        build: makes the model.
        x: inputs; dimension 0 counts the samples.
        y: classes, [b] or [b, positions].
    """

    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor

    def model(self) -> nn.Module:
        """A new model, always with the same weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()

    @cached_property
    def plain(self) -> Reference:
        """The step in plain PyTorch, its statistics sample by sample."""
        return _reference(self.model(), self.x, self.y)

    @cached_property
    def truth(self) -> Reference:
        """The same in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return _reference(self.model().double(), x, self.y)

    def check(
        self,
        model: nn.Module,
        measured: Measured,
        roundings: int = ROUNDINGS,
        gradients: bool = True,
    ) -> None:
        """Asserts that a model after its first step, gradients not yet zeroed, is right.

        Args:
            model: as the variant left it.
            measured: its statistics.
            roundings: allowed in them, see `require_equal`.
            gradients: whether the step leaves any.
        """
        plain, truth = self.plain, self.truth
        for name, p in model.named_parameters():
            name = name.removeprefix("_module.")  # of wrappers
            terms = truth.second_moment[name].sqrt()  # at least the mean |g_i|, whose sum is ḡ
            grads, params = (
                (plain.grads[name], truth.grads[name]),
                (plain.params[name], truth.params[name]),
            )
            if gradients:
                assert p.grad is not None, f"no gradient of {name}"
                require_equal(f"gradient of {name}", p.grad, *grads, scale=terms)
            require_equal(f"updated {name}", p, *params)
        if measured.sample_norms_sq is not None:
            norms = plain.sample_norms_sq, truth.sample_norms_sq
            require_equal("sample norms", measured.sample_norms_sq, *norms, None, roundings)
        if measured.inner_products is not None:
            products = plain.inner_products, truth.inner_products
            terms = (truth.sample_norms_sq.max() * truth.grad_norm_sq).sqrt()  # |⟨g_i, ḡ⟩| at most
            require_equal("inner products", measured.inner_products, *products, terms, roundings)
        for name, found in (measured.coordinate_variance or {}).items():
            variances = plain.coordinate_variance(name), truth.coordinate_variance(name)
            terms = truth.second_moment[name]
            require_equal(f"coordinate variance of {name}", found, *variances, terms, roundings)


def _reference(model: nn.Module, x: Tensor, y: Tensor) -> Reference:
    loss(model(x), y).backward()
    params, grads = {}, {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        params[name], grads[name] = p.detach(), p.grad

    def sample_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x[None],)), y[None])

    n, size = len(x), sum(p.numel() for p in params.values())
    chunk = max(1, 20_000_000 // size)  # some 80 MB of gradients at a time
    per_sample = vmap(grad(sample_loss), (None, 0, 0))
    moments = {name: torch.zeros_like(p) for name, p in params.items()}
    norms, products = [], []
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        found = per_sample(params, xs, ys)
        along = [(g * grads[name]).flatten(1).sum(1) for name, g in found.items()]
        products.append(torch.stack(along).sum(0))
        squares = {name: g.square() for name, g in found.items()}
        norms.append(torch.stack([s.flatten(1).sum(1) for s in squares.values()]).sum(0))
        for name, s in squares.items():
            moments[name] += s.sum(0) / (n - 1)
    lr, v = OPTIONS["lr"], OPTIONS["initial_accumulator_value"]
    after = {
        name: p - lr * grads[name] / (v + grads[name] ** 2).sqrt() for name, p in params.items()
    }
    return Reference(grads, after, torch.cat(norms), torch.cat(products), moments)


def step_variant(
    task: Task,
    model: nn.Module,
    optimizer: Any,
    step: Callable[[], Any],
    measured: Callable[[], Measured] = Measured,
    roundings: int = ROUNDINGS,
    gradients: bool = True,
) -> Variant:
    """A variant of a training step.

    Args:
        task: the model's task.
        model: as `task.model()` made it, prepared in whatever way.
        optimizer: whose `zero_grad` ends each step.
        step: everything before that.
        measured: gives the statistics of the step just done.
        roundings: allowed in the statistics, see `require_equal`.
        gradients: whether the step leaves any.
    """

    def run() -> None:
        step()
        optimizer.zero_grad()

    def check() -> None:
        step()
        task.check(model, measured(), roundings, gradients)
        optimizer.zero_grad()

    return Variant(run, check)


def plain(*, compiled: bool = False, **options: bool) -> Callable[[Task], Variant]:
    """`torch.optim.Adagrad` with these options; no statistics."""

    def make(task: Task) -> Variant:
        model = task.model()
        optimizer = torch.optim.Adagrad(model.parameters(), **OPTIONS, **options)
        forward = torch.compile(model) if compiled else model

        def step() -> None:
            loss(forward(task.x), task.y).backward()
            optimizer.step()

        return step_variant(task, model, optimizer, step)

    return make


def ours(
    criterion: Criterion, *, compiled: bool = False, update: str = "after_backward"
) -> Callable[[Task], Variant]:
    """`AdAdaGrad` that applies the criterion in every step; its batch size is held."""

    def make(task: Task) -> Variant:
        model, b = task.model(), len(task.x)
        optimizer = AdAdaGrad(
            model, **OPTIONS, criterion=criterion, batch_size=b, max_batch_size=b, update=update
        )
        forward = torch.compile(model) if compiled else model

        def step() -> None:
            loss(forward(task.x), task.y).backward()
            optimizer.step()

        def measured() -> Measured:
            s = optimizer.statistics
            assert s is not None, "no statistics"
            return Measured(s.sample_norms_sq, s.coordinate_variance, s.inner_products)

        if update == "in_backward":  # the first step is as by default: taken, and taken back
            start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            step()
            model.load_state_dict(start[0])
            optimizer.load_state_dict(start[1])
        gradients = update == "after_backward"
        return step_variant(task, model, optimizer, step, measured, gradients=gradients)

    return make


def step_case(
    name: str, shape: str, batch: int, build: Callable[[], nn.Module],
    data: Callable[[int], tuple[Tensor, Tensor]], compiled: bool = True,
) -> Case:  # fmt: skip
    """The case of one model.

    Args:
        name: of the model.
        shape: the model in a few words.
        batch: samples.
        build: makes the model.
        data: makes x and y for so many samples.
        compiled: with the variants that torch.compile has to compile.
    """

    def inputs() -> Task:
        torch.compiler.reset()  # each case compiles anew, below torch's limit of recompilations
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Task(build, *data(batch))

    plains = {"plain, fused": plain(fused=True), "plain, foreach": plain(foreach=True)}
    variants = {f"ours, {test}": ours(criterion) for test, criterion in TESTS.items()}
    variants["ours, norm test, in backward"] = ours(NormTest(0.1), update="in_backward")
    if compiled:
        plains["plain, compiled"] = plain(fused=True, compiled=True)
        for test, criterion in TESTS.items():
            variants[f"ours, {test}, compiled"] = ours(criterion, compiled=True)
    return Case(f"step/{name}/{batch}", shape, batch, inputs, plains, variants)


def images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random images of this shape in ten classes."""
    return lambda batch: (torch.randn(batch, *shape), torch.randint(10, (batch,)))


def cases(compiled: bool = True) -> list[Case]:
    """The paper's small models and a wide MLP.

    Args:
        compiled: with the variants that torch.compile has to compile.
    """
    grey, colour, mlp = (1, 28, 28), (3, 32, 32), "784-1024-1024-10"
    return [
        step_case(name, shape, batch, partial(build, image, 10), images(*image), compiled)
        for name, shape, batch, build, image in (
            ("logistic", "784-10", 256, models.logistic, grey),
            ("mlp", mlp, 32, models.mlp, grey),
            ("mlp", mlp, 512, models.mlp, grey),
            ("mnist_cnn", "28,938 parameters", 256, models.cnn, grey),
            ("cifar_cnn", "541,094 parameters", 256, models.cnn, colour),
        )
    ]
