"""The updates, and the reductions of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _schemas


def written(*tensors: Tensor) -> None:
    """Tells autograd that an op has written to them, as it does of torch's own ops.

    So a backward pass through a graph that saved old weights is an error.
    """
    if not torch.compiler.is_compiling():  # in a graph the schema says so
        torch.autograd.graph.increment_version(tensors)


def _check_samples(op: str, coordinate_sums: Sequence[Tensor], samples: int) -> None:
    if coordinate_sums and samples < 2:
        raise ValueError(f"{op}: the variance of {samples} samples is not defined")


def sample_statistics(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Column sums, column sums of squares and squared row norms, in one pass over g.

        sum[j] = Σ_i g[i, j]    sum_sq[j] = Σ_i g[i, j]²    norms_sq[i] = Σ_j g[i, j]²

    With them: ḡ = sum / b, var_j = (sum_sq[j] − b ḡ_j²) / (b − 1),
    tr Σ̂ = (Σ_i norms_sq[i] − b ‖ḡ‖²) / (b − 1).

    Args:
        g: materialised per-sample gradients [b, P] (from `torch.func.vmap`, Opacus, …);
            float64, float32, bfloat16 or float16.

    Returns:
        (sum [P], sum_sq [P], norms_sq [b]), float32 or, for float64, float64.

    Raises:
        RuntimeError: if g does not have two dimensions.

    Example:
        >>> s, q, n = sample_statistics(torch.tensor([[1., 2.], [3., 4.]]))
        >>> s.tolist(), q.tolist(), n.tolist()
        ([4.0, 6.0], [10.0, 20.0], [5.0, 25.0])
    """
    return _schemas.registered.sample_statistics.default(g)


def pool_samples(probes: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Joins the probe gradients of several micro-batches.

    Args:
        probes: gradients [2, capacity] of the probe, one a micro-batch (see
            `linear_weight_grad`).
        rows: how many samples each micro-batch has.

    Returns:
        norms [Σ rows], the samples' ‖c_i‖² in order, and totals [4] in float64: Σ‖c_i‖², the
        least and the largest number of layer calls that counted a sample, and the largest
        number of calls for a row beyond `rows` (0 unless the layers disagree about b).

    Example:
        >>> first, second = torch.tensor([[1., 2.], [1., 1.]]), torch.tensor([[3., 0.], [1., 0.]])
        >>> norms, totals = pool_samples([first, second], [2, 1])
        >>> norms.tolist(), totals.tolist()
        ([1.0, 2.0, 3.0], [6.0, 1.0, 1.0, 0.0])
    """
    return _schemas.registered.pool_samples.default(list(probes), list(rows))


def adagrad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    coordinate_sums: Sequence[Tensor] = (),
    *,
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    samples: int = 2,
) -> tuple[Tensor, Tensor]:
    """AdaGrad's update of many tensors in place, and the reductions of the tests.

        g = grad_scale · grad        d = (−g if maximize else g) + weight_decay · w
        v ← v + d²                   w ← w − lr · d / (√v + eps)

    Traffic: 20 bytes a float32 parameter (24 with coordinate sums), as without reductions.

    Args:
        params: the parameters w; dense (any order of strides).
        grads: their gradients, of the same shapes.
        sums: the accumulators v, float32 (float64 for float64 parameters), laid out as w.
        coordinate_sums: Σ_i c_i² for each parameter, of the unscaled gradient; or empty.
        lr: step size, after any decay.
        eps: added after the root.
        weight_decay: multiplies w in d; not part of g and of the reductions.
        maximize: ascend.
        grad_scale: factor on the gradients, 1/M after M accumulated micro-batches.
        samples: N in the variances below, at least 2; read only with coordinate_sums.

    Returns:
        ‖g‖² over all tensors (float64, 0-dim), and [4] in float64 with coordinate_sums ([0]
        without): Σ_j var_j, max_j var_j/g_j² (0/0 counts as 0), Σ_j var_j/(√v_j + eps) and
        Σ_j g_j²/(√v_j + eps), where var_j = (N² grad_scale² Σ_i c_ij² − N g_j²)/(N − 1).

    Raises:
        RuntimeError: lists of different lengths, shapes or accumulators that do not fit; nothing
            was updated then.
        ValueError: coordinate_sums of fewer than two samples.

    Source:
        Duchi, Hazan, Singer 2011; same trajectory as `torch.optim.Adagrad`.

    Example:
        >>> w, v = torch.ones(2), torch.zeros(2)
        >>> norm, _ = adagrad_([w], [torch.tensor([3., -4.])], [v], lr=0.5)
        >>> norm.item(), w.tolist(), v.tolist()
        (25.0, [0.5, 1.5], [9.0, 16.0])
    """
    _check_samples("adagrad_", coordinate_sums, samples)
    found = _schemas.registered.adagrad_.default(
        params, grads, sums, coordinate_sums, lr, eps, weight_decay, maximize, grad_scale, samples
    )
    written(*params, *sums)
    return found


def adagrad_norm_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sum: Tensor,
    coordinate_sums: Sequence[Tensor] = (),
    *,
    lr: float | Sequence[float] = 1e-2,
    eps: float = 1e-10,
    weight_decay: float | Sequence[float] = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    samples: int = 2,
) -> tuple[Tensor, Tensor]:
    """The update with ONE accumulator for all parameters (AdaGrad-Norm).

        v ← v + Σ‖d‖²  over all parameters        w ← w − lr · d / (√v + eps)

    with g and d as in `adagrad_`. Arguments and results are those of `adagrad_`, but `sum` is
    one float64 number, and `lr` and `weight_decay` may be given for each parameter.

    Source:
        Ward, Wu, Bottou 2019; AdAdaGradNorm in arXiv 2402.11215.

    Example:
        >>> w, v = torch.zeros(2), torch.zeros((), dtype=torch.float64)
        >>> norm, _ = adagrad_norm_([w], [torch.tensor([3., -4.])], v, lr=5.0)
        >>> norm.item(), w.tolist(), v.item()
        (25.0, [-3.0, 4.0], 25.0)
    """
    _check_samples("adagrad_norm_", coordinate_sums, samples)
    n = len(params)
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * n
    decays = list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * n
    found = _schemas.registered.adagrad_norm_.default(
        params, grads, sum, coordinate_sums, rates, eps, decays, maximize, grad_scale, samples
    )
    written(*params, sum)
    return found


def grad_norm_sq(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of many tensors as one vector, Σ ‖t‖², in float64 (0-dim).

    Traffic: every tensor is read once; two kernels on a GPU, however many tensors there are.

    Args:
        tensors: at least one, of any floating point types and shapes, on one device.

    Raises:
        RuntimeError: no tensors.

    Example:
        >>> grad_norm_sq([torch.tensor([3.0, 4.0]), torch.tensor([[1.0]])]).item()
        26.0
    """
    return _schemas.registered.grad_norm_sq.default(tensors)
