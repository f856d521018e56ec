"""The theorem on problems with known gradient and noise: 1/K while the test holds.

The bounds on slopes are wide: exact are -1 with the test, -1/2 for a fixed batch as K grows.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import assert_close_to_truth
from torch.func import grad, jacrev, vmap

import adagrad_kernels as ak
from adagrad_kernels.cli import main
from adagrad_kernels.experiments import theorem
from adagrad_kernels.experiments.descent import FIRST, Descent, Problem, Setting, descend
from adagrad_kernels.experiments.errors import UsageError

SEEDS = (0, 1, 2)
PROBLEMS = {
    "quadratic": Problem(convex=True, noise=0.5),
    "not convex": Problem(convex=False, noise=0.3),
}


@pytest.fixture(params=PROBLEMS, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


@pytest.fixture(scope="module")
def runs(problem: Problem) -> list[tuple[Descent, Descent]]:
    """An adaptive and a fixed batch for each seed; the fixed one gets more steps."""
    seeded = [Setting(problem, steps=120, seed=seed) for seed in SEEDS]
    return [(descend(s), descend(replace(s, adaptive=False, steps=480))) for s in seeded]


def test_gradient_and_noise_are_those_of_the_samples(problem: Problem) -> None:
    w = problem.start() * (0.5 + torch.rand(problem.coordinates, dtype=torch.float64))
    samples = torch.randn(50_000, 1 + problem.coordinates, dtype=torch.float64)
    exact = grad(problem.value)(w)
    assert_close_to_truth(problem.gradient(w), exact, exact)
    own = vmap(grad(lambda w, s: problem.losses(w[None], s[None]).sum()), (None, 0))(w, samples)
    deviation = (own - exact).square()
    standard_error = deviation.std(0) / len(samples) ** 0.5
    assert ((deviation.mean(0) - problem.variance(w)).abs() < 5 * standard_error).all()
    assert ((own - exact).mean(0).abs() < 5 * (problem.variance(w) / len(samples)).sqrt()).all()


def test_lipschitz_constant_is_one(problem: Problem) -> None:
    points = problem.start() * 3 * torch.randn(50, problem.coordinates, dtype=torch.float64)
    curvatures = torch.linalg.eigvalsh(vmap(jacrev(grad(problem.value)))(points))
    assert curvatures.abs().max() <= 1 + 1e-12
    assert (curvatures.min() < -0.1) == (not problem.convex)


def test_the_loop_measures_the_samples_gradients(problem: Problem) -> None:
    norms: list[torch.Tensor] = []

    def watch(opt: object) -> None:
        assert isinstance(opt, ak.AdAdaGradNorm)
        assert opt.statistics is not None
        norms.append(opt.statistics.sample_norms_sq)

    descend(Setting(problem, steps=1), watch)
    generator = torch.Generator().manual_seed(0)
    size = len(norms[0]), 1 + problem.coordinates
    samples = torch.randn(size, dtype=torch.float64, generator=generator)
    w = problem.start()
    common = 1 + problem.gradient_noise * samples[:, :1]
    truth = (common * problem.gradient(w) + problem.noise * samples[:, 1:]).square().sum(1)
    assert_close_to_truth(norms[0], truth, truth)


def test_the_exact_test_holds_while_the_batch_grows(runs: list[tuple[Descent, Descent]]) -> None:
    for adaptive, fixed in runs:
        assert adaptive.held > 0.85  # not in the first steps, which begin with too small a batch
        assert adaptive.ratio[10:].max() < 2
        assert adaptive.ratio[40:].max() < 1.2
        assert fixed.held < 0.1
        assert adaptive.batch_size[-1] > 50 * fixed.batch_size[-1]
        assert (np.diff(adaptive.batch_size) >= 0).all()
        assert (fixed.batch_size == fixed.batch_size[0]).all()


def test_one_over_k_with_the_test(runs: list[tuple[Descent, Descent]]) -> None:
    slopes = [adaptive.slope() for adaptive, _ in runs]
    assert -1.3 < np.mean(slopes) < -0.85
    for adaptive, _ in runs:
        bound = adaptive.least * np.arange(1, len(adaptive.least) + 1)  # K min_k ‖∇F‖²
        assert bound[FIRST:].max() < 3 * bound[FIRST]


def test_a_fixed_batch_is_slower(runs: list[tuple[Descent, Descent]]) -> None:
    assert -0.8 < np.mean([fixed.slope() for _, fixed in runs]) < -0.4
    for adaptive, fixed in runs:
        assert fixed.least[len(adaptive.least) - 1] > 1.4 * adaptive.least[-1]


def test_adagrad_with_the_coordinate_test() -> None:
    setting = theorem.settings()["quadratic\nAdAdaGrad, coordinate test"]["adaptive"]
    for seed in SEEDS:
        found = descend(replace(setting, seed=seed, samples=100_000))
        assert len(found.least) < setting.steps  # the samples have come to their end
        assert found.held > 0.9
        assert -1.3 < found.slope() < -0.8
        assert found.batch_size[-1] > 20 * found.batch_size[0]


def test_when_the_exact_test_held() -> None:
    numbers = np.ones(4)
    for ratio, share, first in (([2, 0.5, 1.1, 1], 0.5, 4), ([1, 1], 1, 1), ([1, 2], 0.5, 3)):
        found = Descent(numbers, numbers, np.array(ratio))
        assert (found.held, found.held_from) == (share, first)


def test_the_slope_is_that_of_the_least_so_far() -> None:
    k = np.arange(1.0, 201)
    assert Descent(k**-1.5, k, k).slope() == pytest.approx(-1.5)
    rising = np.concatenate([k**-1.5, np.full(200, 9.0)])
    assert Descent(rising, rising, rising).least[199:].tolist() == [200**-1.5] * 201


def test_the_same_run_twice(problem: Problem) -> None:
    one, two = (descend(Setting(problem, steps=40, seed=5)) for _ in range(2))
    assert np.array_equal(one.grad_norm_sq, two.grad_norm_sq)
    assert np.array_equal(one.batch_size, two.batch_size)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        theorem.run(tmp_path / "file")


def test_command(
    tmp_path: Path,
    threads: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(theorem, "run", partial(theorem.run, steps=12))
    out = tmp_path / "out"
    assert main(["experiment", "theorem", "--seeds", "7", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("slope") == 6
    assert f"picture and records in {out}" in printed
    assert (out / "theorem.png").stat().st_size > 10_000
    written = json.loads((out / "theorem.json").read_text(encoding="utf-8"))
    assert len(written) == 3
    for column in written.values():
        adaptive, fixed = column.values()
        assert adaptive["steps"] == [12]
        assert fixed["steps"] == [60]
        assert adaptive["compared_at_step"] == fixed["compared_at_step"] == 12
        curve = adaptive["curves"]
        assert curve["step"][-1] == 12
        assert curve["least_grad_norm_sq"][0][-1] == adaptive["least_grad_norm_sq"][0]


@pytest.mark.parametrize("option", ["--samples", "--data-dir"])
def test_options_of_other_experiments(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "theorem", option, "100"]) == 2
    assert f"theorem has no {option}" in capsys.readouterr().err


def test_too_few_steps_for_a_slope(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than 10"):
        theorem.run(tmp_path, steps=10)
