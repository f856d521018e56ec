"""The layer kernels of benchmarks/gpu.py: weight gradients with their per-sample statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adagrad_kernels import ops, reference

from .gpu_bench import Bench
from .gpu_ways import LR

BF16, F32 = torch.bfloat16, torch.float32


class Layer(NamedTuple):
    """One weight gradient: op(*tensors, *options, b, weight, bias, coordinates).

    Attributes:
        name: of the op.
        label: sizes and dtype.
        tensors: what has samples in dimension 0, and what has not after that.
        options: between the tensors and the probe's capacity.
        flops: of the gradient alone; 0 where memory bounds it.
        plain: PyTorch's own gradient.
    """

    name: str
    label: str
    tensors: tuple[Tensor | None, ...]
    options: tuple[Any, ...]
    flops: int
    plain: Callable[[], Any]

    def run(self, coordinates: bool, where: Any = ops, change: Any = lambda t: t) -> Any:
        """Calls the op, with its tensors changed."""
        tensors = [t if t is None else change(t) for t in self.tensors]
        b = len(tensors[0])
        flags = (coordinates,) if self.name.startswith("embedding") else (True, False, coordinates)
        return getattr(where, self.name)(*tensors, *self.options, b, *flags)

    def bytes_moved(self, coordinates: bool) -> int:
        """Operands read once, the results written once."""
        found = [t for t in (*self.tensors, *self.run(coordinates)) if t is not None]
        return sum(t.numel() * t.element_size() for t in found)


def layers(device: torch.device, small: bool) -> Iterator[Layer]:
    """Linear layers of one and of many positions, a ResNet's stages, embedding, normalisations."""

    def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    n = 32 if small else 4096
    for b, t, width, dtype in (
        (n // 8, 1, n, F32), (n // 8, 1, n, BF16), (8, n // 4, n // 16 * 3, BF16),
    ):  # fmt: skip
        g, x = randn(b, t, width, dtype=dtype), randn(b, t, width, dtype=dtype)
        label = f"[{b}, {t}, {width}] × {width} {str(dtype)[6:]}"
        flat = g.flatten(0, 1), x.flatten(0, 1)
        yield Layer(
            "linear_weight_grad", label, (g, x), (), 2 * b * t * width**2,
            lambda flat=flat: flat[0].T @ flat[1],
        )  # fmt: skip
    b = 4 if small else 1024
    for channels, size, memory in (
        (64, 32, torch.contiguous_format), (128, 16, torch.contiguous_format),
        (256, 8, torch.contiguous_format), (512, 4, torch.contiguous_format),
        (512, 4, torch.channels_last),
    ):  # fmt: skip
        c = channels // 8 if small else channels
        for dtype in (F32, BF16):
            g, x = (randn(b, c, size, size, dtype=dtype).to(memory_format=memory) for _ in range(2))
            label = f"[{b}, {c}, {size}, {size}] 3×3 {str(memory)[6:]} {str(dtype)[6:]}"
            options = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
            weight = randn(c, c, 3, 3, dtype=dtype)
            yield Layer(
                "conv_weight_grad", label, (g, x), options, 2 * b * size**2 * 9 * c**2,
                lambda g=g, x=x, weight=weight: torch.ops.aten.convolution_backward(
                    g, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                    [False, True, False],
                ),
            )  # fmt: skip
    b, t, width, rows = (2, 8, 48, 100) if small else (8, 1024, 768, 25_000)
    g = randn(b, t, width, dtype=BF16)
    tokens = torch.randint(rows, (b, t), device=device)
    yield Layer(
        "embedding_weight_grad", f"[{b}, {t}, {width}] of {rows} bfloat16", (g, tokens),
        (rows, -1), 0,
        lambda: torch.ops.aten.embedding_dense_backward(g, tokens, rows, -1, False),
    )  # fmt: skip
    b, t, width = (2, 8, 48) if small else (32, 1024, 768)
    for shape, of in (
        ((b, t, width, 1), (b, t, 1, 1)),
        ((32 * b, 1, max(8, width // 12), 8 if small else 1024), (32 * b, 1, 1, 1)),
    ):
        g, x, mean, rstd = randn(*shape), randn(*shape), randn(*of), randn(*of).exp()
        hat = (0, 1, 3)
        yield Layer(
            "scale_weight_grad", f"{list(shape)} float32", (g, x, mean, rstd), (), 0,
            lambda g=g, x=x, mean=mean, rstd=rstd, hat=hat: (g * (x - mean) * rstd).sum(hat),
        )  # fmt: skip


def check(layer: Layer) -> None:
    """Two samples' norms and gradient against float64, at the precision of TF32 and bfloat16."""

    def few(t: Tensor) -> Tensor:
        return t[:2]

    def double(t: Tensor) -> Tensor:
        return t[:2].double() if t.is_floating_point() else t[:2]

    found, truth = layer.run(True, change=few), layer.run(True, reference, double)
    for t, r in zip(found, truth, strict=True):
        error, size = (t.double() - r).norm(), r.norm()
        if not error <= 1e-2 * size:
            raise AssertionError(f"{layer.name} {layer.label}: error {error:.3g} of {size:.3g}")


def layer_kernels(bench: Bench) -> None:
    """Every layer kernel beside PyTorch's own gradient, which has no statistics."""
    for layer in layers(bench.device, bench.small):
        with bench.part(f"{layer.name} {layer.label}"):
            check(layer)
            for coordinates in (False, True):
                what = "norms + coordinates" if coordinates else "norms"
                ways: dict[str, Callable[[], Any]] = {
                    f"ours, {what}": lambda layer=layer, c=coordinates: layer.run(c)
                }
                if not coordinates:
                    ways["PyTorch's, no statistics"] = layer.plain
                moved = layer.bytes_moved(coordinates)
                bench.kernel(f"{layer.name} {layer.label}", moved, ways, layer.flops)


def linear_updates(bench: Bench) -> None:
    """The linear backward with the update in it, beside PyTorch's gradient and fused Adagrad."""
    n = 32 if bench.small else 8192
    for b in (4, 8) if bench.small else (32, 128, 512):
        for dtype in (F32, BF16):
            g, x = (torch.randn(b, n, device=bench.device).to(dtype) for _ in range(2))
            w, v = torch.randn(n, n, device=bench.device), torch.ones(n, n, device=bench.device)
            step = torch.ones((), device=bench.device)

            def plain(g: Tensor = g, x: Tensor = x, w: Tensor = w, v: Tensor = v) -> None:
                options = {"lr": LR, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10}
                grad = (g.T @ x).float()
                torch._fused_adagrad_([w], [grad], [v], [step], **options, maximize=False)  # noqa: B023

            def ours(
                coordinates: bool, g: Tensor = g, x: Tensor = x, w: Tensor = w, v: Tensor = v
            ) -> None:
                ops.linear_adagrad_(g, x, w, v, len(g), False, coordinates, lr=LR)

            with bench.part(f"linear_adagrad_ {b}"):
                truth = (g.double().T @ x.double()).square().sum()
                norm = ops.linear_adagrad_(g, x, w.clone(), v.clone(), b, False, lr=LR)[0]
                torch.testing.assert_close(norm, truth, rtol=1e-2, atol=0.0)
                bench.kernel(
                    f"linear_adagrad_ [{b}, {n}] × {n} {str(dtype)[6:]}",
                    16 * n * n + 2 * b * n * g.element_size(),
                    {
                        "ours, norms": lambda ours=ours: ours(False),
                        "ours, norms + coordinates": lambda ours=ours: ours(True),
                        "PyTorch's gradient + _fused_adagrad_": plain,
                    },
                    2 * b * n * n,
                )
