"""One call of every op, at a size that several threads share.

Run as a program it computes them all and writes the results to a file, for the test that
compares processors (ADAGRAD_KERNELS_ISA) and memory contents (MALLOC_PERTURB_).
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from adagrad_kernels import ops, reference

Args = tuple


def sample_statistics(large: bool, device: torch.device) -> Args:
    return (torch.randn(*((70, 9001) if large else (5, 33)), device=device),)


def pool_samples(large: bool, device: torch.device) -> Args:
    return [torch.rand(2, 6, device=device), torch.rand(2, 4, device=device)], [5, 4]


def grad_norm_sq(large: bool, device: torch.device) -> Args:
    n = 40_000 if large else 40
    return ([torch.randn(n, device=device), torch.randn(3, n, device=device)],)


def _update(large: bool, device: torch.device) -> tuple[list[Tensor], ...]:
    shapes = [(301, 170), (33,)] if large else [(3, 17), (5,)]
    made = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(2)]
    positive = [[torch.rand(shape, device=device) + 9 for shape in shapes] for _ in range(2)]
    return *made, *positive


def adagrad_(large: bool, device: torch.device) -> Args:
    return *_update(large, device), 0.1, 1e-10, 0.2, True, 0.5, 4


def adagrad_norm_(large: bool, device: torch.device) -> Args:
    params, grads, _, squares = _update(large, device)
    total = torch.tensor(0.5, dtype=torch.float64, device=device)
    return params, grads, total, squares, [0.1, 0.2], 1e-3, [0.2, 0.0], False, 0.5, 4


def linear_weight_grad(large: bool, device: torch.device) -> Args:
    b, positions, out, features = (70, 20, 65, 130) if large else (5, 3, 4, 6)
    grad_out = torch.randn(b, positions, out, device=device)
    return grad_out, torch.randn(b, positions, features, device=device), b + 3, True, True, True


def linear_adagrad_(large: bool, device: torch.device) -> Args:
    b, out, features = (70, 65, 530) if large else (5, 6, 3)
    grad_out, x = torch.rand(b, out, device=device), torch.rand(b, features, device=device)
    weight = torch.randn(out, features, device=device)
    options = 0.1, 1e-10, 0.2, True, 0.5
    return grad_out, x, weight, torch.rand_like(weight) + 9, b + 3, True, True, *options


def conv_weight_grad(large: bool, device: torch.device) -> Args:
    b, size = (70, 14) if large else (4, 5)
    grad_out = torch.randn(b, 36, size, size, device=device)
    x = torch.randn(b, 4, size, size, device=device)
    return grad_out, x, [3, 3], [1, 1], [1, 1], [1, 1], 2, b, True, True, True


def conv_sample_grads(large: bool, device: torch.device) -> Args:
    args = conv_weight_grad(large, device)
    return *args[:7], True, True


def embedding_weight_grad(large: bool, device: torch.device) -> Args:
    b, positions, width = (50, 30, 300) if large else (4, 3, 5)
    grad_out = torch.randn(b, positions, width, device=device)
    return grad_out, torch.randint(9, (b, positions), device=device), 9, 2, b + 1, True


def scale_weight_grad(large: bool, device: torch.device) -> Args:
    shape = (300, 3, 70, 5) if large else (4, 3, 7, 5)
    grad_out, x = torch.randn(shape, device=device), torch.randn(shape, device=device)
    mean = torch.randn(*shape[:2], 1, 1, device=device)
    rstd = torch.rand(1, 1, shape[2], 1, device=device) + 1
    return grad_out, x, mean, rstd, shape[0], True, True, True


def norm_backward(large: bool, device: torch.device) -> Args:
    shape = (300, 3, 70, 5) if large else (4, 3, 6, 5)
    grad_out, x = torch.randn(shape, device=device), torch.randn(shape, device=device)
    mean = torch.randn(*shape[:2], 2, 1, device=device)
    rstd, scale = torch.rand_like(mean) + 1, torch.randn(shape[2], device=device)
    return grad_out, x, mean, rstd, scale, shape[0], True, True, True, True


CASES: dict[str, Callable[[bool, torch.device], Args]] = {
    name: globals()[name] for name in ops.NAMES
}
CPU = torch.device("cpu")


def case(name: str, large: bool, device: torch.device = CPU) -> Args:
    """The arguments of one call; the same numbers every time."""
    torch.manual_seed(1)
    return CASES[name](large, device)


def call(name: str, args: Args, where: object = torch.ops.adagrad_kernels) -> list[Tensor]:
    """Everything that the call returns or changes; its arguments are copied first."""
    copied = [
        [t.clone() for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor)
        else a.clone() if isinstance(a, Tensor) else a
        for a in args
    ]  # fmt: skip
    found = getattr(where, name)(*copied)
    found = [found] if isinstance(found, Tensor) else list(found)
    if name == "adagrad_":
        found += [*copied[0], *copied[2]]
    if name == "adagrad_norm_":
        found += [*copied[0], copied[2]]
    if name == "linear_adagrad_":
        found += [copied[2], copied[3]]
    return found


def double(args: Args) -> Args:
    """The same call in float64."""

    def of(a: object) -> object:
        if isinstance(a, list):
            return [of(x) for x in a]
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(of(a) for a in args)


if __name__ == "__main__":
    torch.save(
        {
            (name, large): call(name, case(name, large))
            for name in ops.NAMES
            for large in (False, True)
        },
        sys.argv[1],
    )
    assert reference  # the ops are registered
