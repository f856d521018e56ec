"""Every op, declared once: schema, meaning, shape function.

Kernels register under the same names in `csrc/` (compiled, CPU) and `reference.py` (plain
PyTorch, everything else); torch's dispatcher chooses by device. None of the ops is
differentiable: `functional.py` builds the differentiable layers on them.

Notation: b samples, T positions in a sample (1 for a plain vector), I input and O output
features, c_i the contribution of sample i to the gradient. Low-precision operands are
computed and returned in float32; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library, reference

_definitions = torch.library.Library(_library.NAMESPACE, "DEF")
for _schema in (
    "sample_statistics(Tensor g) -> (Tensor, Tensor, Tensor)",
    "pool_samples(Tensor[] probes, SymInt[] rows) -> (Tensor, Tensor)",
    "adagrad_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] sums, Tensor[] coordinate_sums, "
    "float lr, float eps, float weight_decay, bool maximize, float grad_scale, int samples) "
    "-> (Tensor, Tensor)",
    "adagrad_norm_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) sum, Tensor[] coordinate_sums, "
    "float[] lr, float eps, float[] weight_decay, bool maximize, float grad_scale, int samples) "
    "-> (Tensor, Tensor)",
    "grad_norm_sq(Tensor[] tensors) -> Tensor",
    "linear_weight_grad(Tensor grad_out, Tensor input, SymInt capacity, bool weight, bool bias, "
    "bool coordinates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_adagrad_(Tensor grad_out, Tensor input, Tensor(a!) weight, Tensor(b!) sum, "
    "SymInt capacity, bool bias, bool coordinates, float lr, float eps, float weight_decay, "
    "bool maximize, float grad_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "conv_weight_grad(Tensor grad_out, Tensor input, SymInt[] kernel_size, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, SymInt capacity, bool weight, bool bias, "
    "bool coordinates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "embedding_weight_grad(Tensor grad_out, Tensor indices, SymInt num_embeddings, "
    "SymInt padding_idx, SymInt capacity, bool coordinates) -> (Tensor, Tensor, Tensor)",
    "scale_weight_grad(Tensor grad_out, Tensor input, Tensor? mean, Tensor? rstd, SymInt capacity, "
    "bool weight, bool bias, bool coordinates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_backward(Tensor grad_out, Tensor input, Tensor? mean, Tensor rstd, Tensor scale, "
    "SymInt capacity, bool weight, bool bias, bool coordinates) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _definitions.define(_schema)

NAMES = (
    "sample_statistics",
    "pool_samples",
    "adagrad_",
    "adagrad_norm_",
    "grad_norm_sq",
    "linear_weight_grad",
    "linear_adagrad_",
    "conv_weight_grad",
    "embedding_weight_grad",
    "scale_weight_grad",
    "norm_backward",
)
for _name in NAMES:
    _definitions.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

_ops = getattr(torch.ops, _library.NAMESPACE)


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
    return _ops.sample_statistics.default(g)


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
    return _ops.pool_samples.default(list(probes), list(rows))


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
        samples: N in the variances below; read only with coordinate_sums.

    Returns:
        ‖g‖² over all tensors (float64, 0-dim), and [4] in float64 with coordinate_sums ([0]
        without): Σ_j var_j, max_j var_j/g_j² (0/0 counts as 0), Σ_j var_j/(√v_j + eps) and
        Σ_j g_j²/(√v_j + eps), where var_j = (N² grad_scale² Σ_i c_ij² − N g_j²)/(N − 1).

    Raises:
        RuntimeError: lists of different lengths, shapes or accumulators that do not fit.

    Source:
        Duchi, Hazan, Singer 2011; same trajectory as `torch.optim.Adagrad`.

    Example:
        >>> w, v = torch.ones(2), torch.zeros(2)
        >>> norm, _ = adagrad_([w], [torch.tensor([3., -4.])], [v], lr=0.5)
        >>> norm.item(), w.tolist(), v.tolist()
        (25.0, [0.5, 1.5], [9.0, 16.0])
    """
    return _ops.adagrad_.default(
        params, grads, sums, coordinate_sums, lr, eps, weight_decay, maximize, grad_scale, samples
    )


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
    n = len(params)
    rates = [lr] * n if isinstance(lr, (int, float)) else list(lr)
    decays = [weight_decay] * n if isinstance(weight_decay, (int, float)) else list(weight_decay)
    return _ops.adagrad_norm_.default(
        params, grads, sum, coordinate_sums, rates, eps, decays, maximize, grad_scale, samples
    )


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
    return _ops.grad_norm_sq.default(tensors)


def linear_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    capacity: int,
    weight: bool = True,
    bias: bool = True,
    coordinates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A linear layer's parameter gradients with their per-sample statistics, in one pass.

        c_i = Σ_t grad_out[i, t] ⊗ input[i, t]  and for the bias  Σ_t grad_out[i, t]
        grad_weight = Σ_i c_i    probe[0, i] = ‖c_i‖² (weight and bias)    weight_sums = Σ_i c_i²

    For T = 1 the norms are ‖grad_out_i‖² (‖input_i‖² + 1) and the sums matrix products; for
    more positions each c_i is formed in registers and never written.

    Args:
        grad_out: gradient of the output, [b, …, O].
        input: the layer's input, [b, …, I], same leading dimensions.
        capacity: columns of the probe, at least b.
        weight: whether the weight gradient is wanted.
        bias: whether the bias gradient is wanted.
        coordinates: whether the sums of squares are wanted.

    Returns:
        grad_weight [O, I], grad_bias [O], probe [2, capacity], weight_sums [O, I] and
        bias_sums [O]; what was not wanted has shape [0]. Row 1 of the probe counts calls: 1
        for each of the b samples, 0 beyond, so that sums over layers tell how many there were.

    Raises:
        RuntimeError: shapes that do not fit, or b > capacity.

    Example:
        >>> grad_out, x = torch.tensor([[1.], [2.]]), torch.tensor([[3., 4.], [0., 1.]])
        >>> grad_w, grad_b, probe, _, _ = linear_weight_grad(grad_out, x, capacity=2)
        >>> grad_w.tolist(), grad_b.tolist(), probe[0].tolist()  # 3² + 4² + 1², 2² + 2²
        ([[3.0, 6.0]], [3.0], [26.0, 8.0])
    """
    return _ops.linear_weight_grad.default(grad_out, input, capacity, weight, bias, coordinates)


def linear_adagrad_(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    sum: Tensor,
    capacity: int,
    bias: bool = True,
    coordinates: bool = False,
    *,
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_weight_grad` and `adagrad_` of the weight in one kernel: no gradient in memory.

    Traffic: 16 bytes a float32 parameter instead of at least 24, where samples have one position
    (or few, without coordinates). Samples of many positions are bound by computation; on the CPU
    the gradient is then kept while the op runs.

    Args:
        grad_out: gradient of the output, [b, …, O].
        input: the layer's input, [b, …, I], same leading dimensions.
        weight: w [O, I], contiguous; updated.
        sum: the accumulator v [O, I], contiguous, float32 (float64 for a float64 weight); updated.
        capacity: columns of the probe, at least b.
        bias: whether the bias gradient is wanted (the bias itself is not updated).
        coordinates: whether the sums of squares and their reductions are wanted.
        lr: step size, after any decay.
        eps: as in `adagrad_`, the next three as well.
        weight_decay: as there.
        maximize: as there.
        grad_scale: as there.

    Returns:
        ‖g‖² of the weight and the reductions of the coordinate tests as from `adagrad_` with
        samples = b; then grad_bias [O], probe [2, capacity], weight_sums [O, I] and bias_sums [O]
        as from `linear_weight_grad`.

    Raises:
        RuntimeError: shapes, dtypes or layouts that do not fit, or b > capacity; nothing was
            updated then.

    Example:
        >>> w, v = torch.ones(1, 2), torch.zeros(1, 2)
        >>> grad_out, x = torch.ones(1, 1), torch.tensor([[3., -4.]])
        >>> norm, _, _, probe, _, _ = linear_adagrad_(grad_out, x, w, v, 1, bias=False, lr=0.5)
        >>> norm.item(), w.tolist(), v.tolist()
        (25.0, [[0.5, 1.5]], [[9.0, 16.0]])
    """
    return _ops.linear_adagrad_.default(
        grad_out, input, weight, sum, capacity, bias, coordinates,
        lr, eps, weight_decay, maximize, grad_scale,
    )  # fmt: skip


def conv_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    capacity: int,
    weight: bool = True,
    bias: bool = True,
    coordinates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A convolution's parameter gradients with their per-sample statistics, in one pass.

    Like `linear_weight_grad` with one position for each output pixel and I = C/groups times the
    kernel's size; the input is never unfolded. For one, two or three spatial dimensions; D below
    stands for all of them. A transposed convolution is the same with grad_out and input
    exchanged.

    Args:
        grad_out: gradient of the output, [b, O, *D'].
        input: the layer's input, [b, C, *D]; any strides.
        kernel_size: one number a spatial dimension; stride, padding and dilation likewise.
        stride: distance of output pixels in the input.
        padding: zeros on both sides.
        dilation: distance of kernel elements.
        groups: as in `torch.nn.Conv2d`.
        capacity: columns of the probe, at least b.
        weight: whether the weight gradient is wanted.
        bias: whether the bias gradient is wanted.
        coordinates: whether the sums of squares are wanted.

    Returns:
        grad_weight [O, C/groups, *kernel_size], grad_bias [O], probe [2, capacity], weight_sums
        and bias_sums as in `linear_weight_grad`.

    Raises:
        RuntimeError: shapes that do not fit, or b > capacity.

    Example:
        >>> x = torch.tensor([[[[1., 2.], [3., 4.]]], [[[1., 0.], [0., 0.]]]])
        >>> options = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        >>> grad_w, _, probe, _, _ = conv_weight_grad(
        ...     torch.ones(2, 1, 1, 1), x, (2, 2), **options, capacity=2, bias=False
        ... )
        >>> grad_w.tolist(), probe[0].tolist()
        ([[[[2.0, 2.0], [3.0, 4.0]]]], [30.0, 1.0])
    """
    return _ops.conv_weight_grad.default(
        grad_out, input, kernel_size, stride, padding, dilation, groups,
        capacity, weight, bias, coordinates,
    )  # fmt: skip


def embedding_weight_grad(
    grad_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    capacity: int,
    coordinates: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """An embedding's weight gradient with its per-sample statistics, in one pass.

        c_i[v] = Σ over positions t with indices[i, t] = v of grad_out[i, t]

    Positions of one sample that hold the same token add before they are squared.

    Args:
        grad_out: gradient of the output, [b, …, D].
        indices: tokens, int64 or int32, [b, …].
        num_embeddings: V, rows of the weight.
        padding_idx: the token without gradient, or -1.
        capacity: columns of the probe, at least b.
        coordinates: whether the sums of squares are wanted.

    Returns:
        grad_weight [V, D], probe [2, capacity] and weight_sums [V, D] ([0] if not wanted).

    Raises:
        RuntimeError: shapes that do not fit, tokens outside [0, V), or b > capacity.

    Example:
        >>> tokens = torch.tensor([[0, 0], [1, 0]])
        >>> grad_w, probe, _ = embedding_weight_grad(torch.ones(2, 2, 1), tokens, 2, -1, capacity=2)
        >>> grad_w.tolist(), probe[0].tolist()
        ([[3.0], [1.0]], [4.0, 2.0])
    """
    return _ops.embedding_weight_grad.default(
        grad_out, indices, num_embeddings, padding_idx, capacity, coordinates
    )


def scale_weight_grad(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    capacity: int,
    weight: bool = True,
    bias: bool = True,
    coordinates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a scale and a shift by channel, as normalisation layers have, with statistics.

        y[i, t, c, s] = w[c] x̂[i, t, c, s] + bias[c],   x̂ = (input − mean) · rstd
        c_i[c] = Σ_ts grad_out[i, t, c, s] x̂[i, t, c, s]   and for the bias   Σ_ts grad_out[…]

    LayerNorm has the channels last (S = 1), GroupNorm and BatchNorm first (T = 1).

    Args:
        grad_out: gradient of the output, [b, T, C, S].
        input: the layer's input before normalisation, [b, T, C, S].
        mean: broadcastable to [b, T, C, S]; None for 0.
        rstd: likewise, the reciprocal standard deviation; None for 1.
        capacity: columns of the probe, at least b.
        weight: whether the gradient of w is wanted.
        bias: whether the gradient of the bias is wanted.
        coordinates: whether the sums of squares are wanted.

    Returns:
        grad_weight [C], grad_bias [C], probe [2, capacity], weight_sums [C] and bias_sums [C];
        what was not wanted has shape [0].

    Raises:
        RuntimeError: shapes that do not fit, or b > capacity.

    Example:
        >>> x = torch.tensor([[1., 2.], [3., 0.]]).view(2, 1, 2, 1)
        >>> g = torch.ones_like(x)
        >>> grad_w, _, probe, _, _ = scale_weight_grad(g, x, None, None, capacity=2, bias=False)
        >>> grad_w.tolist(), probe[0].tolist()
        ([4.0, 2.0], [5.0, 9.0])
    """
    return _ops.scale_weight_grad.default(
        grad_out, input, mean, rstd, capacity, weight, bias, coordinates
    )


def norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    capacity: int,
    weight: bool = True,
    bias: bool = True,
    coordinates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of a normalisation and `scale_weight_grad` in one pass.

        y = w[c] x̂ + bias[c],   x̂ = (input − mean) · rstd,   h = w[c] · grad_out
        grad_input = rstd · (h − average(h) − x̂ · average(h x̂))

    Averages are over what the statistics were taken of: [b, T, G, 1] the C/G channels (and S) of
    one position's group; [1, 1, C, 1] a channel of the whole batch. Without a mean (RMSNorm) the
    second term is missing. LayerNorm is T rows of C channels (S = 1, G = 1), GroupNorm T = 1.

    Traffic on the CPU: 12 bytes a float32 element, no more than the input's gradient alone.

    Args:
        grad_out: gradient of the output, [b, T, C, S].
        input: the layer's input, [b, T, C, S]; contiguous, or with channels last in memory.
        mean: [b, T, G, 1] with G a divisor of C, or where T = 1 [1, 1, C, 1]; None for 0.
        rstd: the reciprocal standard deviation (or root mean square), of the same shape.
        scale: w [C].
        capacity: columns of the probe, at least b.
        weight: whether the gradient of w is wanted.
        bias: whether the gradient of the bias is wanted.
        coordinates: whether the sums of squares are wanted.

    Returns:
        grad_input with the dtype and layout of input; then grad_weight [C], grad_bias [C], probe
        [2, capacity], weight_sums [C] and bias_sums [C] as from `scale_weight_grad`.

    Raises:
        RuntimeError: shapes that do not fit, or b > capacity.

    Example:
        >>> x, rstd = torch.tensor([1., 7.]).view(1, 1, 2, 1), torch.full((1, 1, 1, 1), 0.2)
        >>> grad_out, w = torch.tensor([1., 0.]).view(1, 1, 2, 1), torch.ones(2)
        >>> grad_x, grad_w, *_ = norm_backward(grad_out, x, None, rstd, w, capacity=1, bias=False)
        >>> [round(g, 3) for g in (*grad_x.flatten().tolist(), *grad_w.tolist())]
        [0.196, -0.028, 0.2, 0.0]
    """
    return _ops.norm_backward.default(
        grad_out, input, mean, rstd, scale, capacity, weight, bias, coordinates
    )


# Shape functions, for torch.compile and meta tensors.


def _like(tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape, dtype=reference.compute_dtype(tensor.dtype))


@torch.library.register_fake(f"{_library.NAMESPACE}::sample_statistics")
def _(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(g, g.shape[1]), _like(g, g.shape[1]), _like(g, g.shape[0])


@torch.library.register_fake(f"{_library.NAMESPACE}::pool_samples")
def _(probes: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    return probes[0].new_empty(sum(rows)), probes[0].new_empty(4, dtype=torch.float64)


def _fake_update(params, grads, sums, coordinate_sums, *options) -> tuple[Tensor, Tensor]:
    norm = params[0].new_empty((), dtype=torch.float64)
    return norm, norm.new_empty(4 if coordinate_sums else 0)


torch.library.register_fake(f"{_library.NAMESPACE}::adagrad_", _fake_update)
torch.library.register_fake(f"{_library.NAMESPACE}::adagrad_norm_", _fake_update)


@torch.library.register_fake(f"{_library.NAMESPACE}::grad_norm_sq")
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


def _fake_layer_grads(
    grad_out: Tensor,
    weight_shape: tuple[int, ...],
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def output(wanted: bool, *shape: int) -> Tensor:
        return _like(grad_out, *(shape if wanted else (0,)))

    return (
        output(weight, *weight_shape),
        output(bias, weight_shape[0]),
        output(True, 2, capacity),
        output(weight and coordinates, *weight_shape),
        output(bias and coordinates, weight_shape[0]),
    )


@torch.library.register_fake(f"{_library.NAMESPACE}::linear_weight_grad")
def _(
    grad_out: Tensor, input: Tensor, capacity: int, weight: bool, bias: bool, coordinates: bool
) -> tuple[Tensor, ...]:
    shape = (grad_out.shape[-1], input.shape[-1])
    return _fake_layer_grads(grad_out, shape, capacity, weight, bias, coordinates)


@torch.library.register_fake(f"{_library.NAMESPACE}::linear_adagrad_")
def _(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    sum: Tensor,
    capacity: int,
    bias: bool,
    coordinates: bool,
    *options: object,
) -> tuple[Tensor, ...]:
    shape = (grad_out.shape[-1], input.shape[-1])
    rest = _fake_layer_grads(grad_out, shape, capacity, True, bias, coordinates)[1:]
    norm = grad_out.new_empty((), dtype=torch.float64)
    return norm, norm.new_empty(4 if coordinates else 0), *rest


@torch.library.register_fake(f"{_library.NAMESPACE}::conv_weight_grad")
def _(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, ...]:
    shape = (grad_out.shape[1], input.shape[1] // groups, *kernel_size)
    return _fake_layer_grads(grad_out, shape, capacity, weight, bias, coordinates)


@torch.library.register_fake(f"{_library.NAMESPACE}::embedding_weight_grad")
def _(
    grad_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    capacity: int,
    coordinates: bool,
) -> tuple[Tensor, ...]:
    shape = (num_embeddings, grad_out.shape[-1])
    grad, _, probe, sums, _ = _fake_layer_grads(grad_out, shape, capacity, True, False, coordinates)
    return grad, probe, sums


@torch.library.register_fake(f"{_library.NAMESPACE}::scale_weight_grad")
def _(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, ...]:
    shape = (grad_out.shape[2],)
    return _fake_layer_grads(grad_out, shape, capacity, weight, bias, coordinates)


@torch.library.register_fake(f"{_library.NAMESPACE}::norm_backward")
def _(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
) -> tuple[Tensor, ...]:
    shape = (input.shape[2],)
    rest = _fake_layer_grads(input, shape, capacity, weight, bias, coordinates)
    return torch.empty_like(input), *rest
