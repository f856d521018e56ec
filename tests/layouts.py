"""The same values in other memory: what a kernel that takes tensors has to cope with."""

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("contiguous", "reversed", "sliced", "offset", "channels_last")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from(DTYPES)
sizes = st.one_of(st.integers(0, 4), st.sampled_from([7, 16, 17, 33, 65]))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A tensor equal to t whose strides or storage offset differ as `layout` says."""
    if layout == "reversed":  # the first dimension runs fastest
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    if layout == "sliced":  # every second element of the last dimension
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        view = wide[..., ::2]
        return view.copy_(t)
    if layout == "offset":  # contiguous, but not aligned
        view = t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape)
        return view.copy_(t)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.contiguous()
