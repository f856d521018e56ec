"""What an update works on: parameters, or of those with sparse gradients the touched rows.

AdaGrad does not move a coordinate whose gradient is 0, and neither does its accumulator, so that
the update of the rows that a batch has touched is the update of the whole parameter: exact, as in
`torch.optim.Adagrad`, for U·D instead of V·D numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Work(NamedTuple):
    """One parameter to be updated, with its group, gradient and learning rate lr_k."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    lr: float


def sum_dtype(param: Tensor) -> torch.dtype:
    """Of a parameter's accumulator."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def same_layout(total: Tensor, param: Tensor) -> bool:
    """Whether each element has the same place in memory in both, of the same shape."""
    sizes = zip(param.shape, total.stride(), param.stride(), strict=True)
    return total.shape == param.shape and all(n <= 1 or s == t for n, s, t in sizes)


def laid_out_as(param: Tensor, total: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of an accumulator with the parameter's order of dimensions in memory."""
    own = torch.empty_like(
        param, dtype=dtype or total.dtype, memory_format=torch.preserve_format, requires_grad=False
    )
    return own.copy_(total)


class Rows(NamedTuple):
    """The touched rows of one parameter, and where they belong."""

    whole: Work
    rows: Work
    index: Tensor

    def write_back(self) -> None:
        """Puts the updated rows into the parameter and its accumulator."""
        self.whole.param.detach().index_copy_(0, self.index, self.rows.param)
        total = self.whole.state["sum"]
        if total.dim():  # AdAdaGradNorm's is one number
            total.index_copy_(0, self.index, self.rows.state["sum"])


def touched(work: list[Work]) -> tuple[list[Work], list[Rows]]:
    """The same work with dense gradients alone, and what is to be written back after it.

    Raises:
        RuntimeError: weight decay, which moves rows that have no gradient.
    """
    dense, sparse = [], []
    for w in work:
        if not w.grad.is_sparse:
            dense.append(w)
            continue
        if w.group["weight_decay"]:
            raise RuntimeError(
                f"weight_decay={w.group['weight_decay']} of a parameter of shape "
                f"{list(w.param.shape)} with sparse gradients would move all of its rows: put it "
                "into a param group without, or build its layer with sparse=False"
            )
        grad = w.grad.coalesce()
        index, total = grad.indices()[0], w.state["sum"]
        state = {**w.state, "sum": total[index] if total.dim() else total}
        rows = Work(w.group, w.param.detach()[index], grad.values(), state, w.lr)
        sparse.append(Rows(w, rows, index))
        dense.append(rows)
    return dense, sparse


def refuse_sparse(model: nn.Module, what: str) -> None:
    """Raises ValueError if a layer of the model has sparse gradients."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise ValueError(
                f"{what} takes no sparse gradients: build layer {name!r} with sparse=False"
            )
