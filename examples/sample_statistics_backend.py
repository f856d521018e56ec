"""`ops.sample_statistics` as a backend for per-sample gradients that something else has made.

    python examples/sample_statistics_backend.py

Whoever holds per-sample gradients as a matrix g [b, P], from `torch.func.vmap` or Opacus'
`grad_sample`, gets their column sums, column sums of squares and row norms in one pass over g,
where plain PyTorch makes several. Expect "results agree", and a factor of several in time.
"""

import argparse
import timeit
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import adagrad_kernels as ak


def by_vmap(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    params = {name: p.detach() for name, p in model.named_parameters()}
    grads = vmap(grad(loss), (None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def by_opacus(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    grads = [p.grad_sample.flatten(1) for p in wrapped.parameters()]
    wrapped.to_standard_module()
    return torch.cat(grads, 1)


def plain(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    squares = g.square()
    return g.sum(0), squares.sum(0), squares.sum(1)


def milliseconds(function: Callable[[Tensor], object], g: Tensor) -> float:
    return 1000 * median(timeit.repeat(lambda: function(g), number=1, repeat=21))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="b")
    parser.add_argument("--width", type=int, default=256, help="of the hidden layer")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    model = nn.Sequential(nn.Linear(64, args.width), nn.ReLU(), nn.Linear(args.width, 10))
    x, y = torch.randn(args.samples, 64), torch.randint(10, (args.samples,))
    for backend in (by_vmap, by_opacus) if find_spec("opacus") else (by_vmap,):
        g = backend(model, x, y)
        b, (total, squares, norms) = len(g), ak.ops.sample_statistics(g)
        for found, expected in zip((total, squares, norms), plain(g), strict=True):
            torch.testing.assert_close(found, expected)
        mean = total / b
        trace = (norms.sum() - b * mean.square().sum()) / (b - 1)
        largest = ((squares - b * mean.square()) / (b - 1)).max()
        ours, theirs = (milliseconds(f, g) for f in (ak.ops.sample_statistics, plain))
        print(f"{backend.__name__}: g {list(g.shape)}, results agree; tr Σ̂ {trace:.4g}, largest "
              f"variance {largest:.3g}; {ours:.3f} ms, plain PyTorch {theirs:.3f} ms, factor "
              f"{theirs / ours:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
