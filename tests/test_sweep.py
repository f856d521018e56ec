"""Learning rates tried one by one: which is marked, and what is said of the others."""

import json
from dataclasses import replace

import pytest
from test_reproduction import tiny

from adagrad_kernels.experiments import checkpoint, reproduction
from adagrad_kernels.experiments.errors import UsageError


def test_the_sweep_marks_the_least_training_loss(tmp_path):
    task = replace(tiny(), sweep_samples=400)
    rows = reproduction.sweep(task, tmp_path, ["sgd-small", "sgd-large"]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    rates = {m: [lr for n, lr, *_ in cells if n == m] for m in ("sgd-small", "sgd-large")}
    assert rates["sgd-large"] == ["0.03", "0.1", "0.3", "1", "3"]
    assert rates["sgd-small"] == ["0.003", "0.01", "0.03", "0.1", "0.3"]
    for method in rates:
        losses = {lr: float(loss) for n, lr, _, loss, *_ in cells if n == method}
        (best,) = [lr for n, lr, *_, mark in cells if n == method and mark == "best"]
        assert losses[best] == min(losses.values())
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("*/*/summary.json")]
    samples = {s["settings"]["batch_size"]: s["settings"]["samples"] for s in summaries}
    small = task.base.batch_size
    assert samples == {small: 400, task.large: task.base.samples}
    assert all(s["training_loss"] > 0 for s in summaries)


def test_the_sweep_tries_given_rates_and_only_methods_that_have_their_own(tmp_path):
    task = replace(tiny(), sweep_samples=400)
    text = reproduction.sweep(task, tmp_path, ["adagrad-small"], [0.02, 1e39])
    rows = [row.split("|") for row in text.splitlines()[2:]]
    assert [row[2].strip() for row in rows] == ["0.02", "1e+39"]
    assert rows[0][-2].strip() == "best"
    assert rows[1][4].strip() == "failed"
    with pytest.raises(UsageError, match=r"adadagrad-0\.1 is not swept"):
        reproduction.sweep(task, tmp_path, ["adadagrad-0.1"])


def test_a_rate_whose_last_step_leads_astray_has_failed(tmp_path):
    """The only loss of its training is finite, that of its weights is not. Twice: as it is found
    later, too.
    """
    for _ in range(2):
        text = reproduction.sweep(tiny(), tmp_path, ["sgd-small"], [0.02, 1e38], samples=2)
        good, bad = [row.split("|") for row in text.splitlines()[2:]]
        assert good[-2].strip() == "best"
        assert [cell.strip() for cell in bad[3:5]] == ["1", "failed"]
        assert not any(cell.strip() for cell in bad[5:])
    alone = reproduction.sweep(tiny(), tmp_path, ["sgd-small"], [1e38], samples=2)
    assert "best" not in alone
    summary = checkpoint.read_summary(tmp_path / "sgd-small" / "lr-1e+38")
    assert summary["failed"] == "the loss is not finite"
    assert summary["curve"][-1]["training_loss"] is None


def test_the_sweep_reads_summaries_that_do_not_say_what_failed(tmp_path):
    """As they were written before a loss that is not finite at the end was a failure."""
    folder = tmp_path / "sgd-small" / "lr-1e+38"
    reproduction.sweep(tiny(), tmp_path, ["sgd-small"], [1e38], samples=2)
    summary = checkpoint.read_summary(folder)
    checkpoint.write_summary(folder, {**summary, "failed": "", "training_loss": None})
    text = reproduction.sweep(tiny(), tmp_path, ["sgd-small"], [1e38], samples=2)
    assert text.splitlines()[-1] == "| sgd-small | 1e+38 | 1 | failed | | |"
