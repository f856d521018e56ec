"""Backward passes of layers: parameter gradients with their per-sample statistics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _schemas
from .update import written


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
        for each of the b samples, 0 beyond, so that sums over layers count them.

    Raises:
        RuntimeError: shapes that do not fit, or b > capacity.

    Example:
        >>> grad_out, x = torch.tensor([[1.], [2.]]), torch.tensor([[3., 4.], [0., 1.]])
        >>> grad_w, grad_b, probe, _, _ = linear_weight_grad(grad_out, x, capacity=2)
        >>> grad_w.tolist(), grad_b.tolist(), probe[0].tolist()  # 3² + 4² + 1², 2² + 2²
        ([[3.0, 6.0]], [3.0], [26.0, 8.0])
    """
    return _schemas.registered.linear_weight_grad.default(
        grad_out, input, capacity, weight, bias, coordinates
    )


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
    found = _schemas.registered.linear_adagrad_.default(
        grad_out, input, weight, sum, capacity, bias, coordinates,
        lr, eps, weight_decay, maximize, grad_scale,
    )  # fmt: skip
    written(weight, sum)
    return found


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
    return _schemas.registered.conv_weight_grad.default(
        grad_out, input, kernel_size, stride, padding, dilation, groups,
        capacity, weight, bias, coordinates,
    )  # fmt: skip


def conv_sample_grads(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight: bool = True,
    bias: bool = True,
) -> tuple[Tensor, Tensor]:
    """The contributions c_i themselves of a convolution's samples, written to memory.

    Of `conv_weight_grad`, whose arguments these are, c_i is what is summed and squared. Small
    weights and many positions make it smaller than the operands; then inner products with a
    gradient that is known later (⟨c_i, ḡ⟩) cost one reading of c_i, where the operands would
    need another forward pass. `sample_statistics` makes gradient, norms and sums of it. There is a
    kernel for the CPU; on GPUs, where layers do not ask for it, plain PyTorch computes it.

    Args:
        grad_out: gradient of the output, [b, O, *D'].
        input: the layer's input, [b, C, *D]; any strides.
        kernel_size: one number a spatial dimension; stride, padding and dilation likewise.
        stride: distance of output pixels in the input.
        padding: zeros on both sides.
        dilation: distance of kernel elements.
        groups: as in `torch.nn.Conv2d`.
        weight: whether those of the weight are wanted.
        bias: whether those of the bias are wanted.

    Returns:
        [b, O, C/groups, *kernel_size] and [b, O]; what was not wanted has shape [0].

    Raises:
        RuntimeError: shapes that do not fit.

    Example:
        >>> x = torch.tensor([[[1., 2., 3.]], [[1., 0., 0.]]])
        >>> options = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
        >>> c, c_bias = conv_sample_grads(torch.ones(2, 1, 2), x, [2], **options)
        >>> c.tolist(), c_bias.tolist()
        ([[[[3.0, 5.0]]], [[[1.0, 0.0]]]], [[2.0], [2.0]])
    """
    return _schemas.registered.conv_sample_grads.default(
        grad_out, input, kernel_size, stride, padding, dilation, groups, weight, bias
    )


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
    return _schemas.registered.embedding_weight_grad.default(
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
    return _schemas.registered.scale_weight_grad.default(
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
    samples: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        samples: whether the contributions c_i themselves are wanted.

    Returns:
        grad_input with the dtype and layout of input; then grad_weight [C], grad_bias [C], probe
        [2, capacity], weight_sums [C] and bias_sums [C] as from `scale_weight_grad`; and c_i of
        scale and shift [b, 2, C], or [0, 2, C].

    Raises:
        RuntimeError: shapes that do not fit, or b > capacity.

    Example:
        >>> x, rstd = torch.tensor([1., 7.]).view(1, 1, 2, 1), torch.full((1, 1, 1, 1), 0.2)
        >>> grad_out, w = torch.tensor([1., 0.]).view(1, 1, 2, 1), torch.ones(2)
        >>> grad_x, grad_w, *_ = norm_backward(grad_out, x, None, rstd, w, capacity=1, bias=False)
        >>> [round(g, 3) for g in (*grad_x.flatten().tolist(), *grad_w.tolist())]
        [0.196, -0.028, 0.2, 0.0]
    """
    return _schemas.registered.norm_backward.default(
        grad_out, input, mean, rstd, scale, capacity, weight, bias, coordinates, samples
    )
