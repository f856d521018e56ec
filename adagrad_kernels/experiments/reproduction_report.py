"""The results of an experiment: a record a run, a table over seeds, pictures."""

from __future__ import annotations

import fcntl
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..benchmark.records import cpu_model
from . import checkpoint, report, reproduction_pictures
from .errors import UsageError
from .evaluation import QUALITIES
from .reproduction import run_folder
from .settings import TrainingRun
from .tasks import METHODS, Task

RECORDS = "runs.jsonl"
TABLE = "table.md"
BATCH_POINTS = 100
"""Points of a record's batch sizes, at most."""

FIGURES = ("steps", "samples", "mean_batch_size", "final_batch_size", *QUALITIES)
TIMES = ("seconds", "cpu_seconds")

Record = dict[str, Any]


def update(
    task: Task, out: Path, results: Path, methods: Iterable[str], seeds: Iterable[int]
) -> str:
    """Adds the runs in `out` to the results folder and writes table and pictures anew.

    Records of other methods and seeds stay, those of the same ones are replaced.

    Args:
        task: of the runs.
        out: folder of the runs, see `run_all`.
        results: folder of the results, made if need be.
        methods: whose runs to add.
        seeds: whose runs to add.

    Returns:
        The table.

    Raises:
        UsageError: no run, matplotlib is missing, results of runs with another budget, or a
            folder that cannot be written to.
    """
    report.check()
    seeds = list(seeds)
    new = [r for m in methods for seed in seeds if (r := record(out, m, seed)) is not None]
    try:
        results.mkdir(parents=True, exist_ok=True)
        with (results / RECORDS).open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # others may be adding their runs
            file.seek(0)
            records = merged(_parsed(file.read(), results / RECORDS), new)
            if not records:
                raise UsageError(f"no run in {out} is finished, and no results in {results}")
            file.truncate(0)
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        text = table(records, task.methods)
        (results / TABLE).write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write to {results}: {error.strerror}") from error
    reproduction_pictures.draw(records, f"adadagrad-{task.base.eta:g}", results)
    return text


def record(out: Path, method: str, seed: int) -> Record | None:
    """What is kept of a run; None if it has not ended."""
    folder = run_folder(out, method, seed)
    summary = checkpoint.read_summary(folder)
    if not (summary.get("finished") or summary.get("failed")):
        return None
    found: Record = {
        "method": method,
        "seed": seed,
        "settings": _settings(summary["settings"]),
        "failed": summary["failed"],
        "processor": cpu_model(),
    }
    found |= {name: _rounded(summary.get(name)) for name in (*FIGURES, *TIMES)}
    if summary.get("finished"):
        points = summary["curve"]
        names = ("step", "samples", *TIMES, *QUALITIES)
        found["curve"] = {name: [_rounded(p[name]) for p in points] for name in names}
        log = report.read_log(folder)
        kept = thinned(log["batch_size"].tolist())
        found["batch_sizes"] = {
            name: [int(log[name][i]) for i in kept] for name in ("samples", "batch_size")
        }
    return found


def thinned(values: Sequence[float], most: int = BATCH_POINTS) -> list[int]:
    """Indices of at most so many values: the first and last, and spread evenly over changes.

    Equal neighbours say nothing in a curve of steps; where there are few changes, all are kept.
    """
    changes = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    if changes[-1] != len(values) - 1:
        changes.append(len(values) - 1)
    if len(changes) <= most:
        return changes
    return [changes[round(k * (len(changes) - 1) / (most - 1))] for k in range(most)]


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not the defaults, without the place of the files."""
    defaults = {field.name: field.default for field in fields(TrainingRun)}
    return {
        name: value
        for name, value in settings.items()
        if name != "data_dir" and (name in ("lr", "samples") or value != defaults.get(name))
    }


def _rounded(value: Any) -> Any:
    """To six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def _parsed(text: str, path: Path) -> list[Record]:
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise UsageError(f"{path} does not hold results: {error}") from error


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """All records, the new ones in place of old ones of the same run, in the order of `METHODS`.

    Raises:
        UsageError: records of runs with another number of samples.
    """
    found = {(r["method"], r["seed"]): r for r in (*old, *new)}
    budgets = sorted({r["settings"]["samples"] for r in found.values()})
    if len(budgets) > 1:
        raise UsageError(
            f"the results would be of runs of {' and of '.join(f'{n:,}' for n in budgets)} "
            "samples: choose another --results"
        )
    order = list(METHODS)
    return sorted(found.values(), key=lambda r: (order.index(r["method"]), r["seed"]))


@dataclass(frozen=True)
class Column:
    """A column of the table: head, name of the figure, its format."""

    head: str
    name: str
    format: str = ",.0f"
    factor: float = 1.0


COLUMNS = (
    Column("steps", "steps"),
    Column("mean batch", "mean_batch_size", ",.1f"),
    Column("final batch", "final_batch_size"),
    Column("training loss", "training_loss", ".4f"),
    Column("training accuracy (%)", "training_accuracy", ".2f", 100),
    Column("validation accuracy (%)", "validation_accuracy", ".2f", 100),
)


def table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """A Markdown table, a line a method: mean ± standard deviation (n − 1) over the seeds.

    Runs that failed are counted beside the seeds, and in nothing else.

    Args:
        records: of all runs.
        methods: the lines; "–" where a method has not been run.
    """
    times = [Column("CPU seconds", "cpu_seconds", ",.1f")]
    if any(r["settings"].get("device", "cpu") != "cpu" for r in records):
        times = [Column("seconds", "seconds", ",.1f")]
    columns = (*COLUMNS, *times)
    heads = ("method", "lr", "seeds", *(c.head for c in columns))
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for method in methods:
        runs = [r for r in records if r["method"] == method]
        whole = [r for r in runs if not r["failed"]]
        rate = "/".join(sorted({f"{r['settings']['lr']:g}" for r in runs})) or "–"
        seeds = str(len(whole)) if runs else "–"
        if len(whole) < len(runs):
            seeds += f" ({len(runs) - len(whole)} failed)"
        lines.append(_row([method, rate, seeds, *(_cell(whole, c) for c in columns)]))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(runs: Sequence[Record], column: Column) -> str:
    values = [r[column.name] * column.factor for r in runs]
    if not values:
        return "–"
    mean = format(statistics.mean(values), column.format)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), column.format)}"
