"""Differentiable layers whose backward pass also measures each sample's gradient.

Each function computes what its namesake in `torch.nn.functional` computes, and takes one
tensor more, the `probe`. It does not enter the result; its *gradient* is the measurement:
row 0 holds the squared norms ‖c_i‖² of the samples' contributions to the layer's parameter
gradients, row 1 the number of layer calls that counted the sample. Since these are ordinary
gradients, autograd sums them over layers, and checkpointing, `torch.compile`, accumulation and
data parallelism need nothing special. Coordinate sums Σ_i c_i² are the gradients of two more
probes with the shapes of weight and bias.

Arguments that all functions share:

- `probe`: zeros [2, capacity] that require grad, capacity ≥ b; float32, or float64 for float64
  layers;
- `weight_probe`: a tensor of the weight's shape that requires grad; its gradient is Σ_i c_i²;
- `bias_probe`: likewise for the bias, where there is one (`embedding`, `expand`, `rms_norm`: none);
- `call`: who is notified of the backward pass, see `Call`.
"""

from ._call import NO_LISTENER, Call, CallListener, WeightUpdate, listen
from .batch_norm import batch_norm
from .conv import conv, conv_transpose
from .embedding import embedding
from .expand import expand
from .linear import linear
from .normalisation import group_norm, layer_norm, rms_norm
from .recurrent import recurrent
from .scale import scale

__all__ = [
    "NO_LISTENER",
    "Call",
    "CallListener",
    "WeightUpdate",
    "batch_norm",
    "conv",
    "conv_transpose",
    "embedding",
    "expand",
    "group_norm",
    "layer_norm",
    "linear",
    "listen",
    "recurrent",
    "rms_norm",
    "scale",
]
