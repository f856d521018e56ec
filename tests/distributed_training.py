"""What the processes of the distributed tests train, and the same on one process.

Everything is float64 and drawn from fixed seeds: the tests compare with one process that has all
the samples.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn
from training import dataset, weights

import adagrad_kernels as ak

KINDS = ("AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch")
MICRO_BATCHES = 3
CLIP = 1.0  # above some of the gradients' norms, below others


def batch(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, 2, generator=generator, dtype=torch.float64)


def uneven() -> nn.Sequential:
    """A network whose parameters do not divide among 2 ranks; one has a single row."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)
    ).double()


def optimizer(kind: str, model: nn.Module, **options: Any) -> Any:
    defaults = {"criterion": ak.NormTest(0.7), "batch_size": 4, "max_batch_size": 120}
    return training.optimizer(kind, model, weight_decay=0.01, **{**defaults, **options})


def train(model: nn.Module, opt: Any, micro: int, samples: int = 900) -> dict[str, Any]:
    """Trains as a user does; what one process and several must agree on."""
    loader = ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=micro, seed=7)
    record: dict[str, Any] = {"sizes": [], "ratios": [], "losses": [], "norms": []}
    while loader.samples < samples:
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step(loss=loss)
            opt.zero_grad()
            if opt.updated:
                s = opt.statistics
                record["sizes"].append(s.batch_size)
                record["ratios"].append(opt.decision.ratio)
                record["losses"].append(s.loss)
                record["norms"].append(s.mean_norm_sq)
    record["samples"] = opt.samples
    return record


def part(t: Tensor, rank: int, world: int) -> Tensor:
    return t.chunk(world)[rank]


def raised(function: Callable[[], Any]) -> str:
    """The message of the error that the function must raise."""
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def figures(s: ak.GradientStatistics) -> dict[str, Any]:
    return {
        "batch_size": s.batch_size,
        "workers": s.workers,
        "grad_norm_sq": s.grad_norm_sq,
        "variance_trace": s.variance_trace,
        "noise_scale": s.noise_scale,
        "sample_norms_sq": None if s.workers else s.sample_norms_sq,
        "coordinate_variance": s.coordinate_variance,
        "coordinate_mean": s.coordinate_mean,
        "inner_products": s.inner_products,
        "inner_product_variance": s.inner_product_variance,
    }


def train_alone(
    kind: str,
    model: nn.Module,
    world: int,
    criterion: Any = None,
    samples: int = 900,
    **options: Any,
) -> dict[str, Any]:
    """The same training on one process, with the batches that `world` processes can share."""
    criterion = criterion or ak.NormTest(0.7)
    opt = optimizer(kind, model, criterion=criterion, multiple_of=world, **options)
    record = train(model, opt, micro=16, samples=samples)
    record["accumulator"] = opt.accumulator if kind == "AdAdaGradNorm" else None
    return {**record, "weights": weights(model)}
