"""Reductions where tensors are sharded: `DTensor`s, of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks, is_sharded, local


def in_layout(own: Tensor, like: Tensor) -> Tensor:
    """A tensor laid out as another one, from what this rank holds of it."""
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def pooled(own: Sequence[Tensor], like: Sequence[Tensor], reduction: str) -> Tensor:
    """What each rank has found in its parts of some tensors, as one figure of the whole.

    One collective where tensors are sharded, none elsewhere.

    Args:
        own: what was found in `local` of each tensor; all of one shape.
        like: the tensors.
        reduction: "sum" or "max", over tensors and parts.
    """
    found = []
    for members in _alike(like):
        figure = _reduce([own[k] for k in members], reduction)
        first = like[members[0]]
        if is_sharded(first):
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = first.device_mesh, first.placements  # type: ignore[attr-defined]
            each = [Partial(reduction) if p.is_shard() else Replicate() for p in placements]
            figure = DTensor.from_local(figure, mesh, each, run_check=False).full_tensor()
        found.append(figure)
    return _reduce(found, reduction)


def _reduce(figures: list[Tensor], reduction: str) -> Tensor:
    stacked = torch.stack(figures)
    return stacked.sum(0) if reduction == "sum" else stacked.amax(0)


def sums_over_ranks(wholes: Sequence[Tensor], like: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Sums over the ranks of tensors that each has whole; of sharded ones, of this rank's part.

    One all_reduce, or one reduce-scatter, of a buffer as large as the tensors together.

    Args:
        wholes: what this rank adds, shaped like the whole of the tensors in `like`.
        like: tensors, plain or sharded, whose layout the sums get (without being `DTensor`s).
        ranks: the processes.

    Raises:
        NotImplementedError: tensors that are sharded over several dimensions of their mesh.
    """
    found: dict[int, Tensor] = {}
    for members in _alike(like):
        ours = [wholes[k] for k in members]
        if is_sharded(like[members[0]]):
            parts = _scattered(ours, [like[k] for k in members])
        else:
            flat = ranks.sum_(torch.cat([t.flatten() for t in ours]))
            pieces = flat.split([t.numel() for t in ours])
            parts = [piece.view(t.shape) for piece, t in zip(pieces, ours, strict=True)]
        found.update(zip(members, parts, strict=True))
    return [found[k] for k in range(len(wholes))]


def _scattered(wholes: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """One reduce-scatter of a buffer with a row for each rank: its chunks, filled up with zeros."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = like[0].device_mesh, like[0].placements  # type: ignore[attr-defined]
    sharded = [d for d, placement in enumerate(placements) if placement.is_shard()]
    if len(sharded) != 1:
        raise NotImplementedError(
            f"coordinates of parameters with placements {placements} cannot be measured: shard "
            "them over one dimension of their mesh, as fully_shard alone does"
        )
    dim = placements[sharded[0]].dim
    parts = mesh.size(sharded[0])
    chunks = [t.chunk(parts, dim) for t in wholes]
    widths = [chunk[0].numel() for chunk in chunks]  # the first is the largest
    buffer = wholes[0].new_zeros(parts, sum(widths))
    for columns, of_rank in zip(buffer.split(widths, 1), chunks, strict=True):
        for row, chunk in zip(columns, of_rank, strict=False):
            row[: chunk.numel()] = chunk.flatten()
    to = [Shard(0) if d in sharded else Replicate() for d in range(mesh.ndim)]
    partial = DTensor.from_local(buffer, mesh, [Partial()] * mesh.ndim, run_check=False)
    row = partial.redistribute(placements=to).to_local()[0]
    return [
        piece[: local(t).numel()].view(local(t).shape)
        for piece, t in zip(row.split(widths), like, strict=True)
    ]


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors, those with one layout together."""
    groups: dict[Any, list[int]] = {}
    for k, t in enumerate(tensors):
        layout = (t.device_mesh, t.placements) if is_sharded(t) else None  # type: ignore[attr-defined]
        groups.setdefault(layout, []).append(k)
    return list(groups.values())
