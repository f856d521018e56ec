"""Shape functions of the ops, under their names: for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reductions import COUNT
from ..reference import compute_dtype


def _like(tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape, dtype=compute_dtype(tensor.dtype))


def sample_statistics(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(g, g.shape[1]), _like(g, g.shape[1]), _like(g, g.shape[0])


def pool_samples(probes: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    return probes[0].new_empty(sum(rows)), probes[0].new_empty(4, dtype=torch.float64)


def adagrad_(
    params: list[Tensor],
    grads: list[Tensor],
    sums: list[Tensor],
    coordinate_sums: list[Tensor],
    *options: object,
) -> tuple[Tensor, Tensor]:
    norm = params[0].new_empty((), dtype=torch.float64)
    return norm, norm.new_empty(COUNT if coordinate_sums else 0)


def adagrad_norm_(
    params: list[Tensor],
    grads: list[Tensor],
    sum: Tensor,
    coordinate_sums: list[Tensor],
    *options: object,
) -> tuple[Tensor, Tensor]:
    return adagrad_(params, grads, [sum], coordinate_sums)


def grad_norm_sq(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


def _layer_grads(
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


def linear_weight_grad(
    grad_out: Tensor, input: Tensor, capacity: int, weight: bool, bias: bool, coordinates: bool
) -> tuple[Tensor, ...]:
    shape = (grad_out.shape[-1], input.shape[-1])
    return _layer_grads(grad_out, shape, capacity, weight, bias, coordinates)


def linear_adagrad_(
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
    rest = _layer_grads(grad_out, shape, capacity, True, bias, coordinates)[1:]
    norm = grad_out.new_empty((), dtype=torch.float64)
    return norm, norm.new_empty(COUNT if coordinates else 0), *rest


def conv_weight_grad(
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
    return _layer_grads(grad_out, shape, capacity, weight, bias, coordinates)


def conv_sample_grads(
    grad_out: Tensor,
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weight: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    b, out_channels = grad_out.shape[:2]
    shape = (b, out_channels, input.shape[1] // groups, *kernel_size)
    return (
        _like(grad_out, *(shape if weight else (0,))),
        _like(grad_out, *((b, out_channels) if bias else (0,))),
    )


def embedding_weight_grad(
    grad_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    capacity: int,
    coordinates: bool,
) -> tuple[Tensor, ...]:
    shape = (num_embeddings, grad_out.shape[-1])
    grad, _, probe, sums, _ = _layer_grads(grad_out, shape, capacity, True, False, coordinates)
    return grad, probe, sums


def scale_weight_grad(
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
    return _layer_grads(grad_out, shape, capacity, weight, bias, coordinates)


def norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    capacity: int,
    weight: bool,
    bias: bool,
    coordinates: bool,
    samples: bool,
) -> tuple[Tensor, ...]:
    shape = (input.shape[2],)
    rest = _layer_grads(input, shape, capacity, weight, bias, coordinates)
    own = _like(input, input.shape[0] if samples else 0, 2, *shape)
    return torch.empty_like(input), *rest, own
