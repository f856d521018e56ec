"""What is shown of runs: a table of their summaries, a picture of their logs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint
from .errors import UsageError, optional

Columns = dict[str, np.ndarray[Any, np.dtype[np.float64]]]

# Colour-blind safe (Okabe, Ito), and told apart without colour by their order in the legend.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a run."""
    head = (
        "run", "lr", "steps", "samples", "mean batch", "final batch", "training loss",
        "validation accuracy", "seconds",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for name, s in summaries.items():
        loss = s["training_loss"]
        rows.append(
            (
                name,
                f"{s['settings']['lr']:g}",
                f"{s['steps']:,}",
                f"{s['samples']:,}",
                f"{s['mean_batch_size']:.1f}",
                f"{s['final_batch_size']:,}",
                "not finite" if loss is None else f"{loss:.4f}",
                f"{s['validation_accuracy']:.1%}",
                f"{s['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def read_log(run: Path) -> Columns:
    """samples, step, batch_size and loss of a run, also of one that is still running.

    Args:
        run: its folder, or the log itself. A log without losses has NaN for them.

    Raises:
        UsageError: no log, an empty one, or something else.
    """
    path = run if run.is_file() else run / checkpoint.LOG
    names = ("samples", "step", "batch_size", "loss")
    columns: dict[str, list[float]] = {name: [] for name in names}
    try:
        text = path.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():  # the last may be half written
            record = {"loss": None, **json.loads(line)}
            for name in names:
                columns[name].append(math.nan if record[name] is None else float(record[name]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not the log of a run: {error}") from error
    if not columns["step"]:
        raise UsageError(f"{path} holds no step yet")
    return {name: np.array(values) for name, values in columns.items()}


def runs_in(paths: Sequence[Path]) -> list[Path]:
    """The runs among the given folders and logs, and in folders of runs."""
    found: list[Path] = []
    for path in paths:
        if path.is_file() or (path / checkpoint.LOG).is_file():
            found.append(path)
            continue
        below = checkpoint.read_summary(path).get("runs")
        inner = [path / name for name in below] if isinstance(below, dict) else []
        inner = inner or sorted(log.parent for log in path.rglob(checkpoint.LOG))
        inner = [run for run in inner if (run / checkpoint.LOG).is_file()]
        if not inner:
            raise UsageError(f"{path} holds no run (no {checkpoint.LOG} in it or below)")
        found += inner
    return found


def smooth(loss: np.ndarray[Any, Any], size: np.ndarray[Any, Any], samples: float) -> Any:
    """Exponential mean of the batches' losses over the given number of samples.

    A batch of b samples enters with the weight 1 − exp(−b/samples), so that small and large
    batches are smoothed over the same number of samples. Until that many have been seen the
    mean is over all so far. Losses that are not finite stay as they are, and are forgotten.
    """
    result = np.empty_like(loss)
    total = weight = 0.0
    for i, (value, keep) in enumerate(zip(loss, np.exp(-size / samples), strict=True)):
        if not math.isfinite(value):
            result[i] = math.nan
            continue
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result[i] = total / weight
    return result


def check() -> None:
    """That pictures can be drawn.

    Raises:
        UsageError: matplotlib is missing.
    """
    optional("matplotlib", "matplotlib")


def picture(runs: Sequence[Path], path: Path) -> Path:
    """Batch size and loss over samples and over steps, in the format that the name ends in.

    Returns:
        Where the picture is: a name without an ending gets .png.

    Raises:
        UsageError: matplotlib or a log is missing, or the file cannot be written.
    """
    figure_class = optional("matplotlib.figure", "matplotlib").Figure
    logs = {run.name: read_log(run) for run in runs}
    if len(logs) < len(runs):  # two runs of one name
        logs = {str(run): read_log(run) for run in runs}
    most = max(log["samples"][-1] for log in logs.values())
    window = float(f"{most / 50:.1g}")
    figure = figure_class(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for colour, (name, log) in zip(_cycle(len(logs)), logs.items(), strict=True):
        loss = smooth(log["loss"], log["batch_size"], window)
        for column, x in enumerate(("samples", "step")):
            axes[0, column].step(log[x], log["batch_size"], where="pre", color=colour, label=name)
            axes[1, column].plot(log[x], loss, color=colour, label=name)
    axes[0, 0].set_ylabel("batch size (samples)")
    axes[1, 0].set_ylabel(f"training loss (exponential mean\nover {window:,.0f} samples)")
    axes[1, 0].set_xlabel("samples")
    axes[1, 1].set_xlabel("steps")
    axes[0, 0].set_title("over samples")
    axes[0, 1].set_title("over steps")
    positive = any((log["loss"] > 0).any() for log in logs.values())
    for ax in axes.flat if positive else axes[0]:  # a log may be without losses
        ax.set_yscale("log")
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.grid(True, which="major", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yscale("log", base=2)
    axes[0, 0].yaxis.set_major_formatter(_whole)
    axes[0, 0].yaxis.set_minor_locator(optional("matplotlib.ticker", "matplotlib").NullLocator())
    for ax in axes[1]:
        ax.xaxis.set_major_formatter(_whole)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    form = path.suffix[1:] or "png"
    path = path if path.suffix else Path(f"{path}.{form}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, format=form)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    return path


def _whole(value: float, position: int) -> str:
    return f"{value:,.0f}"


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
