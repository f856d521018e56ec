"""The one rule by which a result counts as correct.

The truth is a float64 reference. A result may be wrong by at most twice what plain PyTorch is
wrong by in the result's own dtype; and since plain PyTorch may be exact by luck, always by a few
units of rounding of the numbers that were added up.
"""

import torch
from torch import Tensor

FACTOR = 2  # how much larger than plain PyTorch's the error may be
ROUNDINGS = 8  # units of rounding (eps) that are always allowed


def assert_close_to_truth(
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    scale: Tensor | float | None = None,
    what: str = "",
) -> None:
    """Asserts that `actual` is as good an approximation of `truth` as plain PyTorch's result.

    Args:
        actual: what is tested; it must have the dtype and the shape of `plain`.
        truth: the result in float64, from the same (rounded) inputs.
        plain: the result of plain PyTorch in the dtype of the tested computation.
        scale: size of what was added up, Σ|terms|, where terms cancel and the sum is much
            smaller; the size of the truth by default.
        what: named in the message.
    """
    name = f"{what}: " if what else ""
    assert actual.shape == truth.shape, f"{name}{list(actual.shape)}, not {list(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}{actual.dtype}, not {plain.dtype}"
    assert truth.dtype == torch.float64
    if not actual.numel():
        return
    actual_, plain_ = actual.detach().double().cpu(), plain.detach().double().cpu()
    truth_ = truth.detach().cpu()
    same = actual_ == truth_  # infinities
    unknown = ~torch.isfinite(truth_)
    wrong = unknown & ~same & ~(torch.isnan(truth_) & torch.isnan(actual_))
    assert not wrong.any(), f"{name}{actual_[wrong][0]} instead of {truth_[wrong][0]}"
    zero = torch.zeros_like(truth_)
    error = torch.where(unknown | same, zero, (actual_ - truth_).abs())
    plain_error = torch.where(unknown | (plain_ == truth_), zero, (plain_ - truth_).abs())
    size = truth_[~unknown].abs() if scale is None else torch.as_tensor(scale).double().cpu().abs()
    largest = size.max().item() if size.numel() else 0.0
    floor = ROUNDINGS * torch.finfo(actual.dtype).eps * largest
    allowed = max(FACTOR * plain_error.nan_to_num(0.0).max().item(), floor)
    worst = int(error.nan_to_num(torch.inf).argmax())
    assert bool(error.flatten()[worst] <= allowed), (
        f"{name}error {error.flatten()[worst]:.3g} where {allowed:.3g} is allowed (plain PyTorch "
        f"{plain_error.max():.3g}, {ROUNDINGS} roundings {floor:.3g}): "
        f"{actual_.flatten()[worst]!r} instead of {truth_.flatten()[worst]!r}"
    )
