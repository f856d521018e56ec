"""Every op in plain PyTorch: the truth in tests (in float64) and the fallback elsewhere.

Each function has the name and the signature of its op in `ops/`, where formulas, shapes and
errors are documented.
"""

from ._common import compute_dtype
from .layers import (
    conv_sample_grads,
    conv_weight_grad,
    embedding_weight_grad,
    linear_adagrad_,
    linear_weight_grad,
)
from .norm import check_norm, norm_backward, norm_input_grad, scale_weight_grad
from .update import adagrad_, adagrad_norm_, grad_norm_sq, pool_samples, sample_statistics

__all__ = [
    "adagrad_",
    "adagrad_norm_",
    "check_norm",
    "compute_dtype",
    "conv_sample_grads",
    "conv_weight_grad",
    "embedding_weight_grad",
    "grad_norm_sq",
    "linear_adagrad_",
    "linear_weight_grad",
    "norm_backward",
    "norm_input_grad",
    "pool_samples",
    "sample_statistics",
    "scale_weight_grad",
]
