"""Draws the pictures of docs/how-it-works.md: python docs/pictures.py [FOLDER]."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from adagrad_kernels import costs

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9822b", "#3a9a5b", "#777777"


def data_flow() -> Figure:
    """One training step, as boxes."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = _canvas(figure.subplots(), 18, 6.6)
    boxes = {
        "loader": (0.2, 4.2, "AdaptiveDataLoader\nnext b samples,\nin micro-batches"),
        "forward": (4.8, 4.2, "forward\nlayers also take\nthe probe (zeros)"),
        "backward": (9.4, 4.2, "backward\na kernel a layer:\n∂W and ‖c_i‖²"),
        "update": (14.0, 4.2, "update\nadagrad_: w, v\nand ‖ḡ‖²"),
        "statistics": (14.0, 0.6, "statistics\nN, Σ‖g_i‖², ‖ḡ‖²\nof all micro-batches"),
        "criterion": (9.4, 0.6, "criterion\ntr Σ̂/b ≤ η²‖ḡ‖² ?\notherwise b⁺"),
        "controller": (4.8, 0.6, "controller\ncap, growth limit,\nrounding"),
    }
    for name, (x, y, text) in boxes.items():
        colour = ORANGE if name in ("statistics", "criterion", "controller") else BLUE
        axes.add_patch(Rectangle((x, y), 3.6, 2, facecolor=colour + "22", edgecolor=colour))
        axes.text(x + 1.8, y + 1, text, ha="center", va="center", fontsize=9)
    for x in (3.8, 8.4, 13.0):
        _arrow(axes, (x, 5.2), (x + 1.0, 5.2))
    _arrow(axes, (15.8, 4.2), (15.8, 2.6))
    for x in (14.0, 9.4):
        _arrow(axes, (x, 1.6), (x - 1.0, 1.6))
    axes.plot([4.8, 2.0], [1.6, 1.6], color=GREY)
    _arrow(axes, (2.0, 1.6), (2.0, 4.2))
    axes.text(2.2, 2.8, "size of the\nnext batch", fontsize=9, color=GREY)
    axes.text(15.6, 3.4, "one transfer\nfrom the device", fontsize=9, color=GREY, ha="right",
              va="center")  # fmt: skip
    return figure


def methods() -> Figure:
    """Three ways to the norm of G_iᵀA_i."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    outer, gram, direct = (_canvas(axes, 6, 6) for axes in figure.subplots(1, 3))

    outer.set_title("outer product (T = 1)", fontsize=10)
    _block(outer, 0.8, 1.2, 0.4, 3.2, BLUE, "δ_i")
    _block(outer, 1.5, 4.7, 3.2, 0.4, GREEN, "a_i")
    outer.add_patch(Rectangle((1.5, 1.2), 3.2, 3.2, fill=False, ls=":", ec=GREY))
    outer.text(3.1, 2.8, "c_i = δ_i a_iᵀ\nnever formed", ha="center", va="center", color=GREY)
    outer.text(3, 0.4, "‖c_i‖² = ‖δ_i‖² ‖a_i‖²", ha="center")

    gram.set_title("Gram (few positions)", fontsize=10)
    for x, colour, name in ((0.7, BLUE, "G_i G_iᵀ"), (3.5, GREEN, "A_i A_iᵀ")):
        _block(gram, x, 2.2, 1.8, 1.8, colour, name)
        gram.text(x + 0.9, 4.2, "T × T", ha="center", fontsize=8, color=GREY)
    gram.text(3.0, 3.1, "⊙", ha="center", va="center", fontsize=14)
    gram.text(3, 0.4, "‖c_i‖² = Σ ⟨g_t, g_t'⟩ ⟨a_t, a_t'⟩", ha="center")

    direct.set_title("direct (many positions)", fontsize=10)
    for i in range(4):
        for j in range(4):
            colour = ORANGE if (i, j) == (1, 2) else "#dddddd"
            direct.add_patch(
                Rectangle((0.6 + 0.7 * j, 1.6 + 0.7 * i), 0.7, 0.7, fc=colour, ec="white")
            )
    direct.text(2.0, 4.6, "∂W = Σ_i c_i", ha="center", fontsize=9)
    _arrow(direct, (3.5, 3.0), (2.75, 2.7))
    lines = (
        "one tile stays in cache:",
        "for every sample i",
        "  t ← its part of G_iᵀA_i",
        "  sum ← sum + t",
        "  ‖c_i‖² ← ‖c_i‖² + ‖t‖²",
    )
    direct.text(3.5, 3.1, "\n".join(lines), fontsize=8, va="center")
    direct.text(3, 0.4, "the weight gradient's own operations", ha="center")
    return figure


def cost() -> Figure:
    """Extra operations of a layer over its positions, by the formulas of `costs`."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    samples, width = 32, 512
    positions = torch.logspace(0, 12, 100, base=2)
    own = 6 * samples * positions * width**2
    gram = samples * positions * (positions + 1) * (2 * width + 1) / own
    direct = 3 * samples * width**2 / own
    axes.plot(positions, 100 * gram, color=GREEN, label="Gram")
    axes.plot(positions, 100 * direct, color=BLUE, label="direct")
    seen = [2**k for k in range(13)]
    chosen = []
    for t in seen:
        numbers = samples * t * width
        chosen.append(costs.product(costs.Call(samples, numbers, numbers), t, width, width))
    extra = [100 * found.flops_ratio for found in chosen]
    axes.plot(seen, extra, "o", color=ORANGE, label="what the kernels choose")
    axes.annotate("outer product", (seen[0], extra[0]), (1.4, 0.03), fontsize=9,
                  arrowprops={"arrowstyle": "-", "color": GREY})  # fmt: skip
    axes.set(
        xscale="log", yscale="log", ylim=(1e-2, 1e2), xlabel="positions T of a sample",
        ylabel="extra operations, % of the layer's own",
        title=f"norms of a linear layer {width} → {width}",
    )  # fmt: skip
    return _finished(figure, axes)


def pooling() -> Figure:
    """Three estimates of tr Σ from the same 64 samples in J micro-batches."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    generator = torch.Generator().manual_seed(0)
    draws, n = 4000, 64
    deviations = torch.arange(1, 9).double().rsqrt()  # tr Σ = Σ 1/j
    g = torch.randn(draws, n, 8, generator=generator, dtype=torch.float64) * deviations
    truth = deviations.square().sum()
    counts = [2, 4, 8, 16, 32]
    estimates: dict[str, list[torch.Tensor]] = {"pooled": [], "averaged": [], "workers": []}
    for count in counts:
        size = n // count
        parts = g.unflatten(1, (count, size))
        means = parts.mean(2)
        between = means.var(1).sum(-1)
        estimates["pooled"].append(g.var(1).sum(-1))
        estimates["averaged"].append(parts.var(2).sum(-1).mean(1) + between * (1 - 1 / count))
        estimates["workers"].append(size * between)
    labels = {
        "pooled": "raw sums, divided once (here)",
        "averaged": "mean of the micro-batches' variances + variance of their means",
        "workers": "between the means of micro-batches (WorkerNormTest)",
    }
    for shift, (name, colour) in zip(
        (0.94, 1.0, 1.06), (("pooled", BLUE), ("averaged", ORANGE), ("workers", GREEN)), strict=True
    ):
        found = [values / truth for values in estimates[name]]
        axes.errorbar(
            [count * shift for count in counts],
            [values.mean() for values in found],
            [values.std() for values in found],
            fmt="o", capsize=3, color=colour, label=labels[name],
        )  # fmt: skip
    axes.axhline(1, color=GREY, lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel=f"micro-batches of a batch of {n} samples",
             ylabel="estimate / tr Σ, mean ± deviation", ylim=(0, 2.6))  # fmt: skip
    return _finished(figure, axes)


def tests() -> Figure:
    """Per-sample gradients in the plane, and what each test looks at."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    generator = torch.Generator().manual_seed(3)
    spread = torch.tensor([[0.9, 0.0], [0.5, 0.5]])
    g = torch.randn(40, 2, generator=generator) @ spread.T + torch.tensor([2.0, 1.0])
    mean = g.mean(0)
    unit = mean / mean.norm()
    normal = torch.stack([-unit[1], unit[0]])
    panels: list[tuple[str, list[torch.Tensor], str]] = [
        ("norm test", [], "the whole spread: tr Σ̂"),
        ("inner product, orthogonality", [unit, normal], "along ḡ, and across it"),
        ("coordinate-wise", [torch.eye(2)[0], torch.eye(2)[1]], "every coordinate by itself"),
    ]
    for axes, (title, directions, caption) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.scatter(g[:, 0], g[:, 1], s=10, color=BLUE, alpha=0.6)
        _arrow(axes, (0.0, 0.0), (float(mean[0]), float(mean[1])), ORANGE)
        for direction in directions:
            along = (g - mean) @ direction
            end = along.std() * direction
            axes.plot(*torch.stack([mean - end, mean + end]).T, color=GREEN, lw=3)
        if not directions:
            radius = g.var(0).sum().sqrt()
            angle = torch.linspace(0, 2 * torch.pi, 100)
            axes.plot(mean[0] + radius * angle.cos(), mean[1] + radius * angle.sin(), color=GREEN)
        axes.plot(0, 0, "k+")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(caption)
        axes.set(xlim=(-0.6, 4.6), ylim=(-1.2, 3.2), aspect="equal", xticks=[], yticks=[])
    return figure


def update() -> Figure:
    """Bytes of a float32 parameter that the update moves."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    ways = {
        "in the backward kernel": (0, 0),
        "after backward (PyTorch, and here)": (4, 0),
        "… with coordinate sums": (4, 4),
    }
    for row, (gradient, sums) in enumerate(ways.values()):
        left = 0
        for bytes_, colour, label in (
            (8, BLUE, "w read and written"),
            (8, GREEN, "v read and written"),
            (2 * gradient, ORANGE, "gradient written and read"),
            (2 * sums, GREY, "Σ c_i² written and read"),
        ):
            axes.barh(row, bytes_, left=left, color=colour, label=label if row == 2 else None)
            left += bytes_
        axes.text(left + 0.3, row, str(left), va="center")
    axes.set_yticks(range(len(ways)), list(ways))
    axes.set(xlabel="bytes a parameter", xlim=(0, 36))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "data-flow": data_flow,
    "methods": methods,
    "cost": cost,
    "pooling": pooling,
    "tests": tests,
    "update": update,
}


def draw(folder: Path) -> list[Path]:
    """Writes all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in PICTURES.items():
        paths.append(folder / f"{name}.png")
        make().savefig(paths[-1], dpi=100)
    return paths


def _canvas(axes: Axes, width: float, height: float) -> Axes:
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return axes


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY
) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "lw": 1.5}
    axes.annotate("", end, start, arrowprops=style)


def _block(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour + "44", edgecolor=colour))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def _finished(figure: Figure, axes: Axes) -> Figure:
    options: dict[str, Any] = {"frameon": False, "fontsize": 8}
    axes.legend(**options)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
