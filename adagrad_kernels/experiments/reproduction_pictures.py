"""The pictures of an experiment's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError, optional
from .report import COLOURS

Record = Mapping[str, Any]

LABELS = {
    "samples": "samples",
    "step": "steps",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
    "training_loss": "training loss (nats)",
    "validation_accuracy": "validation accuracy",
}
SETTLED = 0.1
"""Part of the samples after which generalisation gaps are drawn: before, they are noise."""

_BLUE, _ORANGE, _GREEN, _PINK, _RED, _SKY, _BLACK = COLOURS
STYLES = {
    "sgd-small": (_BLACK, "-"),
    "sgd-large": (_BLACK, "--"),
    "adagrad-small": (_BLUE, "-"),
    "adagrad-large": (_BLUE, "--"),
    "adagrad-large-unswept": (_BLUE, ":"),
    "adadagrad-0.05": (_SKY, "-."),
    "adadagrad-0.1": (_RED, "-"),
    "adadagrad-0.25": (_GREEN, "--"),
    "adadagrad-0.5": (_PINK, "-"),
    "adadagradnorm": (_ORANGE, "-."),
    "adadagrad-inner": (_GREEN, "-"),
    "adadagrad-augmented": (_GREEN, "--"),
    "adadagrad-coordinate": (_BLACK, ":"),
    "adadagrad-coordinate-metric": (_ORANGE, "-."),
}
"""Colour and dashes of a method, the same in all pictures and distinct in each."""


def draw(records: Sequence[Record], adaptive: str, folder: Path) -> None:
    """Draws all pictures of the runs that have not failed.

    Args:
        records: of `reproduction_report`.
        adaptive: the method that stands for AdAdaGrad beside the fixed batches.
        folder: for `batch_size.png`, `main.png`, `eta.png`, `tests.png` and
            `generalisation_gap.png`; those without a run are left out, and those by η and by test
            with but one of them.

    Raises:
        UsageError: matplotlib is missing, or a file cannot be written.
    """
    runs = [r for r in records if not r["failed"]]
    large = ("adagrad-large", "adagrad-large-unswept")
    fixed = ("sgd-small", "sgd-large", "adagrad-small", *large)
    etas = tuple(f"adadagrad-{eta}" for eta in ("0.05", "0.1", "0.25", "0.5"))
    tests = tuple(
        f"adadagrad-{t}" for t in ("inner", "augmented", "coordinate-metric", "coordinate")
    )
    shown = (adaptive, "adadagradnorm", "adadagrad-inner", "adadagrad-augmented")
    by_test = _of(runs, (adaptive, *tests))
    if len(by_test) < 2:
        by_test = {}  # nothing to compare
    figures = {"main.png": _curves(_of(runs, (*fixed, *shown))), "tests.png": _curves(by_test)}
    if len(_of(runs, etas)) > 1:
        figures["eta.png"] = _curves(_of(runs, (*etas, "adagrad-small", *large)))
    figures["batch_size.png"] = _batch_sizes(_of(runs, (*etas, "adadagradnorm")), by_test)
    figures["generalisation_gap.png"] = _gaps(
        _of(runs, ("sgd-large", "adagrad-small", *large, *shown))
    )
    for name, figure in figures.items():
        if figure is None:
            continue
        try:
            figure.savefig(folder / name, dpi=110)
        except OSError as error:
            raise UsageError(f"{folder / name} cannot be written: {error.strerror}") from error


def _of(runs: Sequence[Record], methods: Sequence[str]) -> dict[str, list[Record]]:
    """The runs of these methods, by method, where there are any."""
    found = {m: [r for r in runs if r["method"] == m] for m in dict.fromkeys(methods)}
    return {m: rs for m, rs in found.items() if rs}


def _figure(size: tuple[float, float], rows: int, columns: int, **options: Any) -> Any:
    figure = optional("matplotlib.figure", "matplotlib").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(True, which="major", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(method: str) -> dict[str, Any]:
    colour, dashes = STYLES[method]
    return {"color": colour, "linestyle": dashes, "linewidth": 1.3}


def _curves(runs: dict[str, list[Record]]) -> Any:
    """Training loss and validation accuracy over samples, steps and time; a line a run."""
    if not runs:
        return None
    figure, axes = _figure((13, 7.5), 2, 3, sharex="col", sharey="row")
    some = next(iter(runs.values()))[0]
    on_cpu = some["settings"].get("device", "cpu") == "cpu"
    xs = ("samples", "step", "cpu_seconds" if on_cpu else "seconds")
    for row, y in enumerate(("training_loss", "validation_accuracy")):
        for column, x in enumerate(xs):
            ax = axes[row, column]
            _lines(ax, runs, x, y)
            ax.set_xscale("log")
            ax.set_xlabel(LABELS[x] if row else "")
        axes[row, 0].set_ylabel(LABELS[y])
    axes[0, 0].set_yscale("log")
    _plain_numbers(axes[0, 0].yaxis)
    _percent(axes[1, 0])
    _legend(figure, axes[0, 0])
    return figure


def _lines(ax: Any, runs: dict[str, list[Record]], x: str, y: str) -> None:
    for method, of_seeds in runs.items():
        for i, run in enumerate(of_seeds):
            curve = run["curve"]
            values = _floats(curve[x]), _floats(curve[y])
            ax.plot(*values, label=_label(method, i), **_style(method))


def _batch_sizes(*groups: dict[str, list[Record]]) -> Any:
    """Batch size over samples: by η, and by test."""
    groups = tuple(g for g in groups if g)
    if not groups:
        return None
    figure, axes = _figure((6.5 * len(groups), 5), 1, len(groups), sharey="row")
    for ax, runs in zip(axes[0], groups, strict=True):
        for method, of_seeds in runs.items():
            for i, run in enumerate(of_seeds):
                b = run["batch_sizes"]
                style = {"where": "pre", "label": _label(method, i), **_style(method)}
                ax.step(b["samples"], b["batch_size"], **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("samples")
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes[0, 0].set_ylabel("batch size (samples)")
    return figure


def _gaps(runs: dict[str, list[Record]]) -> Any:
    """Validation less training loss, over samples and over training loss; likewise accuracies."""
    if not runs:
        return None
    figure, axes = _figure((11, 7.5), 2, 2, sharex="col", sharey="row")
    for method, of_seeds in runs.items():
        style = _style(method)
        for i, run in enumerate(of_seeds):
            c = {name: _floats(values) for name, values in run["curve"].items()}
            settled = c["samples"] >= SETTLED * run["settings"]["samples"]
            c = {name: values[settled] for name, values in c.items()}
            loss = c["validation_loss"] - c["training_loss"]
            accuracy = c["training_accuracy"] - c["validation_accuracy"]
            for column, x in enumerate(("samples", "training_loss")):
                axes[0, column].plot(c[x], loss, label=_label(method, i), **style)
                axes[1, column].plot(c[x], accuracy, **style)
    axes[0, 0].set_ylabel("validation − training loss (nats)")
    axes[1, 0].set_ylabel("training − validation accuracy")
    _percent(axes[1, 0])
    for ax in axes.flat:
        ax.axhline(0, color="black", linewidth=0.6)
    axes[0, 1].set_xscale("log")
    axes[0, 1].invert_xaxis()
    _plain_numbers(axes[1, 1].xaxis)
    axes[1, 0].set_xlabel("samples")
    axes[1, 1].set_xlabel(LABELS["training_loss"] + ", falling")
    _legend(figure, axes[0, 0])
    return figure


def _legend(figure: Any, ax: Any) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)


def _label(method: str, index: int) -> str | None:
    """Of the first run of a method; the other seeds look the same."""
    return method if index == 0 else None


def _plain_numbers(axis: Any) -> None:
    """0.5, 1, 2, 5 instead of 5·10⁻¹ … on a logarithmic axis."""
    ticker = optional("matplotlib.ticker", "matplotlib")
    axis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _percent(ax: Any) -> None:
    formatter = optional("matplotlib.ticker", "matplotlib").PercentFormatter
    ax.yaxis.set_major_formatter(formatter(1.0))


def _floats(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=float)
