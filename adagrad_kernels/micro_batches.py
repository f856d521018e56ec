"""How a batch divides into equal micro-batches."""

from __future__ import annotations

import math


def divide(batch_size: int, limit: int | None, multiple: int) -> tuple[int, int] | None:
    """(m, M): the batch as M equal micro-batches, m ≤ limit and a multiple; None if it has none.

    A quarter more micro-batches than the least number are allowed: 60000 is 120 of 500, which
    the 118 of at most 512 cannot give.
    """
    if limit is None:
        return batch_size, 1
    least = -(-batch_size // (limit // multiple * multiple))
    for count in range(least, least + least // 4 + 2):
        size, rest = divmod(batch_size, count)
        if not rest and size and size % multiple == 0:
            return size, count
    return None


def check_divides(size: int, limit: int, processes: int, multiple_of: int) -> None:
    """Raises ValueError, with a way out, for one of `sizes` that does not divide.

    Args:
        size: the batch, of all processes.
        limit: the largest micro-batch of one process.
        processes: how many share it.
        multiple_of: see `BatchSizeController`.
    """
    multiple = math.lcm(multiple_of, processes)
    if divide(size, limit * processes, multiple):
        return
    if size % multiple:
        raise ValueError(
            f"{size}, one of sizes, does not divide among {processes} processes"
            + (f" in multiples of {multiple_of}" if multiple_of > 1 else "")
        )
    most = limit * processes // multiple * multiple
    best = next(m for m in range(most, 0, -multiple) if size % m == 0)
    raise ValueError(
        f"{size}, one of sizes, does not divide into equal micro-batches of about "
        f"max_micro_batch_size ({limit}): take max_micro_batch_size={best // processes}, or a "
        f"multiple of {most} instead of {size}"
    )
