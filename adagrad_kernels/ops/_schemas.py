"""Schemas of the ops, and the registration of what belongs to each: reference, shape function.

The compiled and the Triton kernels register themselves (`csrc/`, `triton_kernels`).
"""

from __future__ import annotations

import torch

from .. import _library, reference
from . import _fakes

SCHEMAS = (
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
    "conv_sample_grads(Tensor grad_out, Tensor input, SymInt[] kernel_size, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, bool weight, bool bias) "
    "-> (Tensor, Tensor)",
    "embedding_weight_grad(Tensor grad_out, Tensor indices, SymInt num_embeddings, "
    "SymInt padding_idx, SymInt capacity, bool coordinates) -> (Tensor, Tensor, Tensor)",
    "scale_weight_grad(Tensor grad_out, Tensor input, Tensor? mean, Tensor? rstd, SymInt capacity, "
    "bool weight, bool bias, bool coordinates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_backward(Tensor grad_out, Tensor input, Tensor? mean, Tensor rstd, Tensor scale, "
    "SymInt capacity, bool weight, bool bias, bool coordinates, bool samples) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
"""Of all ops, as `torch.ops.adagrad_kernels` has them, too."""

_definitions = torch.library.Library(_library.NAMESPACE, "DEF")
for _name, _schema in zip(NAMES, SCHEMAS, strict=True):
    _definitions.define(_schema)
    _definitions.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_library.NAMESPACE}::{_name}", getattr(_fakes, _name))

registered = getattr(torch.ops, _library.NAMESPACE)
"""What the functions of this package call."""
