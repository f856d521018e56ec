"""The convergence theorem as a picture: min_k ‖∇F‖² against 1/K, while the test holds.

AdAdaGradNorm with the norm test and AdAdaGrad with the coordinate test reach
min_{k≤K} ‖∇F‖² = O(1/K) (arXiv 2402.11215); a fixed batch, with noise that does not vanish, falls
back to 1/√K. Shown on the problems of `descent`, where gradient and noise are known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .descent import FIRST, Descent, Problem, Setting, descend
from .errors import UsageError, optional
from .report import COLOURS

SEEDS = (0, 1, 2)
STEPS = 300  # of the adaptive runs; the fixed batches get LONGER times as many
LONGER = 5


def settings(steps: int = STEPS) -> dict[str, dict[str, Setting]]:
    """By the title of a column of the picture the runs in it, the adaptive one first."""
    norm = "AdAdaGradNorm, norm test"
    few = Problem(convex=True, coordinates=8, decades=2.0, noise=0.5)
    columns = {
        f"quadratic\n{norm}": Setting(Problem(convex=True, noise=0.5)),
        f"not convex\n{norm}": Setting(Problem(convex=False, noise=0.3)),
        "quadratic\nAdAdaGrad, coordinate test": Setting(few, "adadagrad", lr=0.1, batch_size=64),
    }
    return {
        title: {
            "adaptive": replace(setting, steps=steps),
            f"fixed {setting.batch_size}": replace(setting, adaptive=False, steps=LONGER * steps),
        }
        for title, setting in columns.items()
    }


def run(out: Path, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> dict[str, Any]:
    """Trains all of `settings()`, writes `theorem.png` and `theorem.json`, prints the figures.

    Args:
        out: the folder for them.
        seeds: each run is repeated with these.
        steps: K of the adaptive runs.

    Returns:
        What `theorem.json` holds: by column and run the slopes and their range of K, how often
        the exact test held, samples, and the curves at some K.

    Raises:
        UsageError: too few steps, matplotlib is missing, or a file cannot be written.
    """
    if steps <= FIRST:
        raise UsageError(f"steps must be more than {FIRST} for a slope, got {steps}")
    optional("matplotlib", "matplotlib")
    _write(out / "theorem.json", "")
    curves: dict[str, dict[str, list[Descent]]] = {}
    records: dict[str, Any] = {}
    for title, column in settings(steps).items():
        curves[title] = {
            name: [descend(replace(setting, seed=seed)) for seed in seeds]
            for name, setting in column.items()
        }
        common = min(len(each.least) for found in curves[title].values() for each in found)
        heading = title.replace("\n", ": ")
        records[heading] = {
            name: _record(column[name], found, common) for name, found in curves[title].items()
        }
        print(heading)
        for name, record in records[heading].items():
            print(f"  {name}: {_line(record)}")
    _write(out / "theorem.json", json.dumps(records, ensure_ascii=False) + "\n")
    picture(curves, out / "theorem.png")
    return records


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _record(setting: Setting, found: Sequence[Descent], common: int) -> dict[str, Any]:
    """The figures of one setting, lists with one entry a seed where seeds differ."""
    shortest = min(len(each.least) for each in found)
    k = np.unique(np.geomspace(1, shortest, 25).astype(int))
    return {
        "lr": setting.lr,
        "eta": setting.eta if setting.adaptive else None,
        "steps": [len(each.least) for each in found],
        "samples": [int(each.batch_size.sum()) for each in found],
        "final_batch_size": [int(each.batch_size[-1]) for each in found],
        "slope": [round(each.slope(), 3) for each in found],
        "slope_from_step": FIRST,
        "exact_test_held": [round(each.held, 3) for each in found],
        "exact_test_held_from_step": [each.held_from for each in found],
        "compared_at_step": common,
        "least_grad_norm_sq": [_short(each.least[common - 1]) for each in found],
        "curves": {
            "step": k.tolist(),
            "least_grad_norm_sq": [[_short(y) for y in each.least[k - 1]] for each in found],
            "batch_size": [each.batch_size[k - 1].astype(int).tolist() for each in found],
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _line(record: Mapping[str, Any]) -> str:
    def span(key: str, form: str) -> str:
        low, high = (format(end(record[key]), form) for end in (min, max))
        return low if low == high else f"{low} to {high}"

    return (
        f"slope {span('slope', '.2f')} (K = {FIRST} to {max(record['steps'])}); least ‖∇F‖² at "
        f"K = {record['compared_at_step']} {span('least_grad_norm_sq', '.2g')}; exact test held at "
        f"{span('exact_test_held', '.1%')} of the steps; last batch "
        f"{span('final_batch_size', ',d')}, {span('samples', ',d')} samples"
    )


def picture(curves: Mapping[str, Mapping[str, Sequence[Descent]]], path: Path) -> None:
    """min_{k≤K} ‖∇F‖² and batch size over steps: a column for each entry, a line for each seed.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    figure = optional("matplotlib.figure", "matplotlib").Figure(
        figsize=(12, 7), layout="constrained"
    )
    axes = figure.subplots(2, len(curves), sharex="col", squeeze=False)
    for (title, column), (upper, lower) in zip(curves.items(), axes.T, strict=True):
        for colour, (name, found) in zip(COLOURS, column.items(), strict=False):
            slopes = [each.slope() for each in found]
            label = f"{name}, slope {sum(slopes) / len(slopes):.2f}"
            for each in found:
                k = np.arange(1, len(each.least) + 1)
                upper.plot(k, each.least, color=colour, lw=1.2, label=label)
                lower.step(k, each.batch_size, color=colour, lw=1.2, where="mid")
                label = None
        adaptive = next(iter(column.values()))
        k = np.array([FIRST, max(len(each.least) for each in adaptive)])
        top = math.exp(np.mean([math.log(each.least[FIRST - 1]) for each in adaptive]))
        upper.plot(k, top * FIRST / k, "k--", lw=1, label="1/K")
        upper.plot(k, top * np.sqrt(FIRST / k), "k:", lw=1, label="1/√K")
        upper.set_title(title, fontsize=10)
        upper.legend(frameon=False, fontsize=9)
        lower.set_xlabel("steps K")
        for ax in (upper, lower):
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.grid(True, which="major", alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("min$_{k≤K}$ ‖∇F‖²")
    axes[1, 0].set_ylabel("batch size (samples)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
