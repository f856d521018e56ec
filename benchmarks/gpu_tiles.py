"""python -m benchmarks.gpu_tiles: what other tiles would do, for choosing them in tiles.py.

The weight-gradient kernels of a transformer's and a ResNet's layers, each with the tile that the
package chooses and with others, beside PyTorch's own gradient. Every result is compared with the
first one's. A tile that the device has no room for is recorded as skipped, and so is what is not
begun --seconds after the start. `--small` runs in seconds, also without a GPU where
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from adagrad_kernels.benchmark.engine import Unavailable
from adagrad_kernels.triton_kernels import common, conv, linear
from adagrad_kernels.triton_kernels.tiles import Tile

from .gpu_bench import Bench

BF16, F32 = torch.bfloat16, torch.float32
SIZES = [(128, 256), (128, 128), (128, 64), (64, 128), (64, 64)]
STAGES = [3, 4]


def others(itemsize: int) -> list[Tile]:
    """Tiles with 32 or 64 numbers of the gradient in each thread, for operands of so many bytes."""
    return [
        Tile(bm, bn, 128 // itemsize, bm * bn // each // 32, stages)
        for (bm, bn), each, stages in itertools.product(SIZES, [64, 32], STAGES)
        if 128 <= bm * bn // each <= 512
    ]


class Product(NamedTuple):
    """One weight gradient.

    Attributes:
        label: sizes and dtype.
        flops: of the gradient alone.
        itemsize: bytes of an operand's number.
        chosen: the tile that the package takes, with coordinate sums or without.
        run: the kernel, with a tile and with coordinate sums or without.
        plain: PyTorch's own gradient.
    """

    label: str
    flops: int
    itemsize: int
    chosen: Callable[[bool], Tile]
    run: Callable[[Tile, bool], tuple[Tensor, Tensor]]
    plain: Callable[[], Tensor]


def _partials(samples: int, rows: int, columns: int, tile: Tile, device: torch.device) -> Tensor:
    tiles = common.cdiv(rows, tile.BM) * common.cdiv(columns, tile.BN)
    return torch.empty(samples, tiles, device=device)


def _linear(b: int, t: int, rows: int, columns: int, dtype: torch.dtype, device: str) -> Product:
    g, x = (torch.randn(b, t, n, device=device).to(dtype) for n in (rows, columns))
    g, x = common.operand(g), common.operand(x)

    def run(tile: Tile, squares: bool) -> tuple[Tensor, Tensor]:
        partials = _partials(b, rows, columns, tile, g.device)
        return linear.weight_grad(g, x, partials, tile, squares)

    return Product(
        f"linear [{b}, {t}] {columns} → {rows} {str(dtype)[6:]}",
        2 * b * t * rows * columns,
        dtype.itemsize,
        lambda squares: linear.tile_for(g, x, squares),
        run,
        lambda: g.flatten(0, 1).T @ x.flatten(0, 1),
    )


def _conv(b: int, channels: int, size: int, dtype: torch.dtype, device: str) -> Product:
    last = torch.channels_last_3d if dtype == BF16 else torch.contiguous_format
    g, x = (
        torch.randn(b, channels, 1, size, size, device=device).to(dtype).to(memory_format=last)
        for _ in range(2)
    )
    g, x = common.operand(g), common.operand(x)
    options, columns = ((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1)), 9 * channels
    weight = torch.empty(channels, channels, 1, 3, 3, device=device, dtype=g.dtype)

    def run(tile: Tile, squares: bool) -> tuple[Tensor, Tensor]:
        partials = _partials(b, channels, columns, tile, g.device)
        return conv.weight_grad(g, x, options, 2, 1, partials, tile, squares)

    return Product(
        f"conv [{b}, {channels}, {size}, {size}] 3×3 {str(dtype)[6:]}",
        2 * b * size**2 * channels * columns,
        dtype.itemsize,
        lambda squares: conv.tile_for(g, channels, channels, columns, 2, squares),
        run,
        lambda: torch.ops.aten.convolution_backward(
            g, x, weight, None, [1, 1, 1], [0, 1, 1], [1, 1, 1], False, [0] * 3, 1,
            [False, True, False],
        )[1],
    )  # fmt: skip


def products(device: str, small: bool) -> Iterator[Product]:
    """Layers of a transformer 768 wide, one of one position, a ResNet's first stages."""
    if small:
        yield _linear(2, 20, 70, 40, F32, device)
        yield _conv(2, 16, 4, BF16, device)
        return
    for rows, columns in ((2304, 768), (3072, 768)):
        yield _linear(8, 1024, rows, columns, BF16, device)
    yield _linear(64, 128, 1024, 1024, BF16, device)
    yield _linear(512, 1, 4096, 4096, F32, device)
    for channels, size in ((64, 32), (128, 16)):
        for dtype in (F32, BF16):
            yield _conv(1024, channels, size, dtype, device)


def sweep(bench: Bench, product: Product) -> None:
    """Times a product with the chosen tile, then with others."""
    bench.kernel(product.label, 0, {"PyTorch's, no statistics": product.plain}, product.flops)
    for squares in (False, True):
        chosen = product.chosen(squares)
        truth = product.run(chosen, squares)
        tiles = [tile for tile in others(product.itemsize) if tile != chosen]
        for tile in [chosen, *(tiles[-2:] if bench.small else tiles)]:
            what = "norms + coordinates" if squares else "norms"
            name = f"{what} {'×'.join(map(str, tile[:3]))} w{tile.num_warps} s{tile.num_stages}"
            name += " (chosen)" * (tile == chosen)
            with bench.part(f"{product.label} {name}", peer=True):
                try:
                    found = product.run(tile, squares)
                except triton.OutOfResources as error:
                    raise Unavailable(str(error)) from error
                for t, expected in zip(found, truth, strict=True):
                    error = (t - expected).norm()
                    if not error <= 1e-2 * expected.norm():
                        raise AssertionError(f"an error of {error:.3g}")
                ways = {name: lambda tile=tile, squares=squares: product.run(tile, squares)}
                bench.kernel(product.label, 0, ways, product.flops)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tiles", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes to try the program with")
    parser.add_argument("--out", type=Path, help="append records here, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing after these")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), args.small, args.out, args.seconds)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    bench.limits()
    for product in products(args.device, args.small):
        with bench.part(product.label):
            sweep(bench, product)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
