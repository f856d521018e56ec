"""Every op, declared once: schema, meaning, shape function.

Kernels register under the same names: `csrc/cpu` and `csrc/cuda` (compiled), `triton_kernels`
(GPUs, where the compiled library has no kernel), `reference` (plain PyTorch, everything else);
torch's dispatcher chooses by device. None of the ops is differentiable: `functional/` builds
differentiable layers on them.

Notation: b samples, T positions in a sample (1 for a plain vector), I input and O output
features, c_i the contribution of sample i to the gradient. Low-precision operands are
computed and returned in float32; float64 stays float64.
"""

from ._schemas import NAMES
from .layers import (
    conv_sample_grads,
    conv_weight_grad,
    embedding_weight_grad,
    linear_adagrad_,
    linear_weight_grad,
    norm_backward,
    scale_weight_grad,
)
from .update import (
    adagrad_,
    adagrad_norm_,
    grad_norm_sq,
    pool_samples,
    sample_statistics,
)

__all__ = [
    "NAMES",
    "adagrad_",
    "adagrad_norm_",
    "conv_sample_grads",
    "conv_weight_grad",
    "embedding_weight_grad",
    "grad_norm_sq",
    "linear_adagrad_",
    "linear_weight_grad",
    "norm_backward",
    "pool_samples",
    "sample_statistics",
    "scale_weight_grad",
]
