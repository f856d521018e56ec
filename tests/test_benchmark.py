"""The benchmark engine: what it measures, what it refuses, what it records."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from adagrad_kernels import ops
from adagrad_kernels.benchmark import (
    add_arguments,
    cli,
    main,
    op_cases,
    step_cases,
    update_cases,
)
from adagrad_kernels.benchmark.engine import (
    Case,
    Variant,
    matching,
    peak_memory,
    require_equal,
    run_case,
    take_turns,
)
from adagrad_kernels.benchmark.records import Record
from adagrad_kernels.layers import ObservedLinear

TINY = 1e-3  # seconds


def test_what_needs_what() -> None:
    """Experiments use the benchmarks, not the reverse; profiling uses neither."""
    program = """
import sys
import adagrad_kernels.profiling
assert not [name for name in sys.modules if name.startswith("adagrad_kernels.benchmark")]
import adagrad_kernels.benchmark
assert not [name for name in sys.modules if name.startswith("adagrad_kernels.experiments")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Work this small is done sooner by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--seconds", str(TINY), "--no-compile", *argv])


def linear() -> Case:
    return op_cases._linear(4, 3, 5, 6)


def step(build=lambda: nn.Linear(5, 10), batch: int = 6) -> Case:
    return step_cases.step_case("net", "5-10", batch, build, step_cases.images(5), compiled=False)


TINY_CASES = {
    "sample_statistics": lambda: op_cases._sample_statistics(5, 7),
    "adagrad_": lambda: update_cases.adagrad("tiny", [(3, 4), (5,)]),
    "linear_adagrad_": lambda: update_cases.linear_adagrad(4, 5, 6),
    "linear, one position": lambda: op_cases._linear(4, 1, 5, 6),
    "linear": linear,
    "conv": lambda: op_cases._conv(3, 2, 4, 3, 5, 1),
    "step": step,
    "step with convolution": lambda: step_cases.step_case(
        "cnn", "tiny", 4,
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 10)),
        step_cases.images(2, 4, 4), compiled=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", TINY_CASES.values(), ids=TINY_CASES)
def test_every_variant_is_right_and_timed(make):
    case = make()
    records = list(run_case(case, TINY))
    assert [r.variant for r in records] == [*case.plain, *case.variants]
    assert [r.reason for r in records] == [""] * len(records)
    for r in records:
        assert 0 < r.p20 <= r.p50 <= r.p80
        assert r.baseline in case.plain
        assert r.ratio == pytest.approx(r.p50 / r.baseline_p50)
    assert min(r.ratio for r in records[: len(case.plain)]) == 1


def test_cases_of_the_package_have_different_names():
    names = [case.name for case in cli.own_cases()]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {
        "sample_statistics", "adagrad_", "linear_weight_grad", "linear_adagrad_",
        "conv_weight_grad", "step",
    }  # fmt: skip


def test_turns_alternate_and_short_calls_are_repeated():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(1e-3)

    times = take_turns({"slow": slow, "quick": lambda: calls.append("quick")}, seconds=0.02)
    turns = "".join("q" if c == "quick" else "S" for c in calls).split("S")
    assert len(times["slow"]) == len(times["quick"]) >= 3
    assert min(times["slow"]) >= 1e-3
    assert len(turns[-1]) > 1  # one turn of the quick one is many calls
    assert turns[-1] == turns[-2]  # in each turn as many


def test_baseline_is_the_fastest_plain_variant():
    def sleeper(seconds):
        return lambda inputs: Variant(lambda: time.sleep(seconds), lambda: None)

    plain = {"slow": sleeper(4e-3), "quick": sleeper(1e-3)}
    case = Case("sleep/x", "", 0, lambda: None, plain, {"ours": sleeper(2e-3)})
    slow, quick, ours = run_case(case, 0.03)
    assert {slow.baseline, quick.baseline, ours.baseline} == {"quick"}
    assert slow.ratio > ours.ratio > quick.ratio == 1


@pytest.mark.parametrize(
    "output", range(5), ids=["weight", "bias", "norms", "squares", "bias_squares"]
)
def test_a_wrong_kernel_is_caught(monkeypatch, output):
    right = ops.linear_weight_grad

    def wrong(*args):
        results = [t.clone() for t in right(*args)]
        results[output].mul_(1 + 1e-3)
        return tuple(results)

    monkeypatch.setattr(ops, "linear_weight_grad", wrong)
    alone, norms, coordinates = run_case(linear(), TINY)
    assert alone.ratio is not None
    assert coordinates.reason.startswith("wrong result")
    assert coordinates.p50 is None
    assert norms.reason.startswith("wrong result") == (output < 3)


def test_wrong_statistics_of_a_step_are_caught(monkeypatch):
    right = ops.linear_weight_grad

    def wrong(*args):
        weight, bias, probe, *sums = right(*args)
        probe[0, 2] *= 1.001  # one sample's norm
        return (weight, bias, probe, *sums)

    monkeypatch.setattr(ops, "linear_weight_grad", wrong)
    records = {r.variant: r for r in run_case(step(), TINY)}
    assert records["plain, fused"].reason == ""
    assert "sample norms" in records["ours, norm test"].reason
    assert "sample norms" in records["ours, norms + coordinates"].reason


def test_wrong_inner_products_of_a_step_are_caught(monkeypatch):
    right = ObservedLinear.contract
    monkeypatch.setattr(ObservedLinear, "contract", lambda *args: right(*args) * 1.001)
    records = {r.variant: r for r in run_case(step(), TINY)}
    assert "inner products" in records["ours, inner-product test"].reason
    assert records["ours, norm test"].reason == ""


def test_equality_is_relative_to_plain_pytorch():
    truth = torch.tensor([1.0, 100.0], dtype=torch.float64)
    plain = torch.tensor([1.001, 100.0])
    require_equal("x", torch.tensor([1.0, 100.0019]), plain, truth)
    with pytest.raises(AssertionError, match="x: off by"):
        require_equal("x", torch.tensor([1.0, 100.0022]), plain, truth)
    with pytest.raises(AssertionError, match="x: off by nan"):
        require_equal("x", torch.tensor([1.0, torch.nan]), plain, truth)
    with pytest.raises(AssertionError, match="shape"):
        require_equal("x", torch.tensor([1.0]), plain, truth)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.out = nn.Linear(5, 10)

    def forward(self, x):
        return self.out(x * self.scale)


def test_an_unsupported_model_is_reported_by_name():
    records = {r.variant: r for r in run_case(step(Scaled), TINY)}
    assert records["plain, fused"].ratio is not None
    for variant in ("ours, norm test", "ours, norms + coordinates"):
        assert records[variant].p50 is None
        assert "Scaled" in records[variant].reason


def test_memory_is_what_a_call_allocates():
    small, large = (
        peak_memory(lambda n=n: torch.ones(n * 2**18).sum()) for n in (1, 64)  # MiB
    )  # fmt: skip
    if large is None:
        pytest.skip("this system does not tell")
    assert 60 * 2**20 < large - small < 70 * 2**20


def test_main_prints_and_stores_tidy_records(tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    status = main(arguments("--out", str(out), "--threads", "2"), lambda compiled: [linear()])
    assert status == 0
    assert torch.get_num_threads() == 1  # as before
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["variant"] for r in records] == [
        "weight gradient alone",
        "+ norms",
        "+ norms + coordinates",
    ]
    for r in records:
        assert r.keys() == Record.__dataclass_fields__.keys()
        assert r["name"] in printed
        assert r["variant"] in printed
        assert r["threads"] == 2
        assert r["torch_version"] == torch.__version__
        assert r["cpu"]
        assert r["batch"] == 4


def test_records_that_cannot_be_stored_are_not_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "records.jsonl"
    assert main(arguments("--out", str(out)), lambda compiled: [linear()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"{out} cannot be written: Not a directory\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_records_that_no_longer_find_room(capsys):
    assert main(arguments("--out", "/dev/full"), lambda compiled: [linear()]) == 2
    told = capsys.readouterr()
    assert "weight gradient alone" in told.out
    assert told.err == "/dev/full cannot be written: No space left on device\n"


def test_main_fails_where_a_result_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(ops, "sample_statistics", lambda g: (g.sum(0), g.sum(0), g.square().sum(1)))
    case = op_cases._sample_statistics(5, 7)
    assert main(arguments(), lambda compiled: [case]) == 1
    assert "wrong result: result 1" in capsys.readouterr().out


def test_only_chooses_cases(capsys):
    cases = cli.own_cases(compiled=False)
    assert [c.name for c in matching(cases, "mlp/32")] == ["step/mlp/32"]
    assert {c.name for c in matching(cases, "step/*/256")} == {
        "step/logistic/256", "step/mnist_cnn/256", "step/cifar_cnn/256",
    }  # fmt: skip
    assert matching(cases, None) == cases
    assert main(arguments("--only", "nothing-like-this")) == 2
    assert "step/mlp/32" in capsys.readouterr().err


def test_no_compile_leaves_the_compiled_variants_out():
    def compiled(cases):
        return {v for c in cases for v in (*c.plain, *c.variants) if "compiled" in v}

    assert compiled(step_cases.cases(compiled=True)) == {
        "plain, compiled", "ours, norm test, compiled", "ours, inner-product test, compiled",
        "ours, norms + coordinates, compiled",
    }  # fmt: skip
    assert compiled(step_cases.cases(compiled=False)) == set()
