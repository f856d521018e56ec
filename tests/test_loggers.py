"""Records of steps, the JSON lines and TensorBoard logs made of them, and their resumption."""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from training import Batch, batches, mse, network

import adagrad_kernels as ak
from adagrad_kernels.cli import main
from adagrad_kernels.experiments import report
from adagrad_kernels.experiments.methods import FixedBatch
from adagrad_kernels.loggers import JSONLLogger, StepLogger, TensorBoardLogger, step_record

NAMES = [
    "batch_size", "micro_batches", "loss", "lr", "grad_norm_sq", "variance_trace", "ratio",
    "suggestion", "noise_scale",
]  # fmt: skip


def adagrad(model: nn.Module, **options) -> ak.AdAdaGrad:
    options = {"lr": 0.1, "criterion": ak.NormTest(0.5), "batch_size": 4, **options}
    return ak.AdAdaGrad(model, **options)


def step(model: nn.Module, opt: object, batch: Batch) -> Tensor:
    loss = mse(model, batch)
    loss.backward()
    opt.step()  # type: ignore[attr-defined]
    opt.zero_grad()  # type: ignore[attr-defined]
    return loss


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Kept(StepLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, int, dict]] = []

    def log(self, record, *, step, samples) -> None:
        self.records.append((step, samples, dict(record)))

    def close(self) -> None:
        self.records.append((-1, -1, {}))


def test_a_record_is_that_of_the_step_that_was_made() -> None:
    model, (batch,) = network(), batches(1, 4)
    opt = adagrad(model, max_batch_size=1000)
    with pytest.raises(RuntimeError, match="no step to be logged"):
        step_record(opt)
    loss = step(model, opt, batch)
    s, d = opt.statistics, opt.decision
    assert s is not None
    assert d is not None
    assert opt.batch_size > 4  # the next one, which is not logged
    record = step_record(opt, loss)
    assert list(record) == NAMES
    assert record == {
        "batch_size": 4,
        "micro_batches": 1,
        "loss": loss.item(),
        "lr": 0.1,
        "grad_norm_sq": s.grad_norm_sq.item(),
        "variance_trace": s.variance_trace.item(),
        "ratio": d.ratio,
        "suggestion": d.batch_size,
        "noise_scale": s.noise_scale.item() if s.noise_scale.isfinite() else None,
    }


def test_a_step_without_a_test_has_no_statistics() -> None:
    model = network()
    opt = adagrad(model, max_batch_size=4, every=2)
    for k, batch in enumerate(batches(4, 4)):
        step(model, opt, batch)
        record = step_record(opt)
        for name in NAMES[4:6]:
            assert (record[name] is None) == (k % 2 == 1)
        assert (record["batch_size"], record["lr"]) == (4, 0.1)


def test_the_learning_rate_is_the_one_that_the_step_took() -> None:
    model = network()
    opt = adagrad(model, max_batch_size=64, multiple_of=4, lr_policy="sqrt")
    sizes, rates = [], []
    for batch in batches(3, 64):
        size = opt.batch_size
        step(model, opt, (batch[0][:size], batch[1][:size]))
        record = step_record(opt)
        sizes.append(record["batch_size"])
        rates.append(record["lr"])
    assert sizes[0] == 4 < sizes[-1]
    assert rates == pytest.approx([0.1 * math.sqrt(size / 4) for size in sizes])


def test_what_is_not_finite_is_none() -> None:
    """One sample has no variance; identical samples and no gradient have no finite suggestion."""
    model = network()
    opt = adagrad(model, batch_size=1, max_batch_size=1)
    step(model, opt, batches(1, 1)[0])
    record = step_record(opt, math.inf)
    assert [record[name] for name in ("loss", "variance_trace", "ratio")] == [None] * 3
    assert record["grad_norm_sq"] is not None
    # Opposite gradients: the mean is zero, and no finite batch would do.
    line = nn.Linear(1, 1, bias=False)
    opt = adagrad(line, batch_size=2, max_batch_size=8)
    (line(torch.ones(2, 1)) * torch.tensor([[1.0], [-1.0]])).sum().backward()
    opt.step()
    record = step_record(opt)
    assert opt.decision.batch_size > 2**60
    assert (record["suggestion"], record["ratio"]) == (None, None)


def test_micro_batches_make_one_record_with_their_mean_loss() -> None:
    model = network()
    opt = adagrad(model, batch_size=12, max_batch_size=12)
    logger = Kept()
    losses = []
    for batch in batches(6, 4):
        loss = mse(model, batch)
        losses.append(loss.item())
        loss.backward()
        opt.step()
        logger.log_step(opt, loss)
        opt.zero_grad()
    assert [(k, n) for k, n, _ in logger.records] == [(1, 12), (2, 24)]
    for k, (_, _, record) in enumerate(logger.records):
        assert (record["batch_size"], record["micro_batches"]) == (12, 3)
        assert record["loss"] == pytest.approx(sum(losses[3 * k : 3 * k + 3]) / 3, rel=1e-15)


def test_a_batch_that_was_left_out_is_not_in_the_mean_loss() -> None:
    """Its loss was told, but its gradients overflowed."""
    model, data = network(torch.float32), batches(2, 4, torch.float32)
    opt, logger = adagrad(model, max_batch_size=4), Kept()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    losses = []
    for batch in data:
        losses.append(mse(model, batch).mul(8))
        scaler.scale(losses[-1]).backward()
        scaler.step(opt)
        scaler.update()
        logger.log_step(opt, losses[-1])
        opt.zero_grad()
    ((_, _, record),) = logger.records
    assert record["loss"] == losses[1].item() != losses[0].item()


def test_every_optimizer_can_be_logged() -> None:
    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    makers = {
        "norm": lambda m: ak.AdAdaGradNorm(m, lr=0.1, batch_size=4, max_batch_size=4),
        "adaptive": lambda m: ak.AdaptiveBatch(m, sgd(m), batch_size=4, max_batch_size=4),
        "local": lambda m: ak.LocalAdaptiveBatch(
            m, sgd(m), local_steps=2, batch_size=4, max_batch_size=4
        ),
        "fixed": lambda m: FixedBatch(sgd(m), 4),
    }
    for name, make in makers.items():
        model = network()
        opt, logger = make(model), Kept()
        for batch in batches(2, 4):
            step(model, opt, batch)
            logger.log_step(opt)
        assert [(k, n) for k, n, _ in logger.records] == [(1, 4), (2, 8)], name
        for _, _, record in logger.records:
            assert [record[k] for k in ("batch_size", "micro_batches", "lr")] == [4, 1, 0.1]
        # A fixed batch has no statistics, local steps have them when they synchronise.
        measured = [record["grad_norm_sq"] is not None for _, _, record in logger.records]
        assert measured == {"fixed": [False, False], "local": [False, True]}.get(name, [True, True])


def test_a_logger_closes_at_the_end_of_its_block() -> None:
    logger = Kept()
    with logger as entered:
        assert entered is logger
    assert logger.records == [(-1, -1, {})]


def run(path: Path, steps: range, resumed: dict | None = None) -> dict:
    """Trains some steps of one and the same run; the state after them."""
    model = network()
    opt = adagrad(model, batch_size=4, max_batch_size=8, multiple_of=4)
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        opt.load_state_dict(resumed["opt"])
    with JSONLLogger(path, None if resumed is None else opt.controller.steps) as logger:
        for k in steps:
            x, y = batches(20, 8)[k]
            size = opt.batch_size
            loss = step(model, opt, (x[:size], y[:size]))
            logger.log_step(opt, loss)
    return copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})


def test_a_resumed_log_is_that_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight" / "log.jsonl", tmp_path / "broken.jsonl"
    run(straight, range(6))
    state = run(broken, range(3))
    run(broken, range(3, 5), state)  # this attempt is lost: nobody saved its state
    with broken.open("a") as file:
        file.write('{"step": 6, "samp')
    run(broken, range(3, 6), state)
    assert broken.read_bytes() == straight.read_bytes()
    records = read(straight)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["samples"] == sum(record["batch_size"] for record in records)
    assert list(records[0]) == ["step", "samples", *NAMES]


def test_a_log_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run(path, range(2))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a log already: give step="):
        JSONLLogger(path)
    assert path.read_bytes() == before
    JSONLLogger(path, step=0).close()
    assert path.read_bytes() == b""
    JSONLLogger(path).close()  # an empty one is as good as none
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"log\.jsonl is not a log of steps: line 1"):
        JSONLLogger(path, step=3)
    assert path.read_text() == "epoch,loss\n1,2\n"


@pytest.mark.parametrize(
    "text", ["my only notes", '{"lr": 0.1}', "[1, 2]", "3", '{"lr": 0.1}\n{"st', "\n", "{\n}"]
)
def test_a_file_that_is_no_log_is_not_cut(tmp_path: Path, text: str) -> None:
    """With or without the end of its last line."""
    path = tmp_path / "notes.txt"
    path.write_text(text)
    for step in (0, 3):
        with pytest.raises(ValueError, match=r"notes\.txt is not a log of steps: line 1"):
            JSONLLogger(path, step=step)
    assert path.read_text() == text


@pytest.mark.parametrize("kept", ["", '{"step": 1, "samples": 8}\n'])
@pytest.mark.parametrize("cut", ["{", '{"step": 2, "samp', '{"step": 2, "samples": 16}'])
def test_a_record_that_a_crash_has_cut_is_cut_off(tmp_path: Path, kept: str, cut: str) -> None:
    """Also the only one."""
    path = tmp_path / "log.jsonl"
    path.write_text(kept + cut)
    JSONLLogger(path, step=9).close()
    assert path.read_text() == kept


def test_records_are_in_the_file_at_once_and_valid_json(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path / "log.jsonl")
    logger.log({"loss": math.nan, "size": 3}, step=1, samples=8)
    assert (tmp_path / "log.jsonl").read_text() == (
        '{"step": 1, "samples": 8, "loss": null, "size": 3}\n'
    )
    logger.close()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_what_json_lines_hold(tmp_path: Path) -> None:
    model = network()
    opt = adagrad(model, batch_size=4, max_batch_size=8, multiple_of=4)
    with JSONLLogger(tmp_path / "log.jsonl") as lines, TensorBoardLogger(tmp_path / "tb") as board:
        for x, y in batches(5, 8):
            size = opt.batch_size
            loss = step(model, opt, (x[:size], y[:size]))
            for logger in (lines, board):
                logger.log_step(opt, loss)
    records = read(tmp_path / "log.jsonl")
    for axis, key in (("steps", "step"), ("samples", "samples")):
        events = EventAccumulator(str(tmp_path / "tb" / axis))
        events.Reload()
        known = {name for name in NAMES if any(record[name] is not None for record in records)}
        assert set(events.Tags()["scalars"]) == {f"{axis}/{name}" for name in known}
        for name in known:
            found = [(event.step, event.value) for event in events.Scalars(f"{axis}/{name}")]
            expected = [
                (record[key], float(np.float32(record[name])))  # TensorBoard's own precision
                for record in records
                if record[name] is not None
            ]
            assert found == expected


def test_tensorboard_forgets_the_lost_part_of_a_resumed_run(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path) as logger:
        for k in range(1, 5):
            logger.log({"loss": 1.0}, step=k, samples=100 * k)
    with TensorBoardLogger(tmp_path, step=2, samples=200) as logger:
        logger.log({"loss": 2.0}, step=3, samples=350)
    assert scalars(tmp_path / "steps", "steps/loss") == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert scalars(tmp_path / "samples", "samples/loss") == [(100, 1.0), (200, 1.0), (350, 2.0)]


def test_tensorboard_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="both, step and samples"):
        TensorBoardLogger(tmp_path, step=3)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "adagrad_kernels\[tensorboard\]"'):
        TensorBoardLogger(tmp_path)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_plot_draws_these_logs_and_folders_of_runs(tmp_path: Path) -> None:
    """A log by its name, its folder, or folders around it, make the same picture."""
    path = tmp_path / "runs" / "cnn" / "seed-0" / "log.jsonl"
    run(path, range(6))
    columns = report.read_log(path)
    records = read(path)
    for name, values in columns.items():
        assert values.tolist() == [record[name] for record in records]
    pictures = []
    for k, what in enumerate((path.parent, path.parents[1], path.parents[2])):
        assert main(["plot", str(what), "--out", str(tmp_path / f"{k}.png")]) == 0
        pictures.append(picture(tmp_path / f"{k}.png"))
    for other in pictures[1:]:
        np.testing.assert_array_equal(other, pictures[0])
    assert main(["plot", str(path), "--out", str(tmp_path / "log.png")]) == 0
    assert picture(tmp_path / "log.png").shape == pictures[0].shape


def test_plot_draws_a_log_without_losses(tmp_path: Path) -> None:
    with JSONLLogger(tmp_path / "log.jsonl") as logger:
        for k in range(1, 4):
            logger.log({"batch_size": 8 * k}, step=k, samples=8 * k)
    assert np.isnan(report.read_log(tmp_path)["loss"]).all()
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    assert len(np.unique(picture(tmp_path / "a.png").reshape(-1, 3), axis=0)) > 10


def test_train_writes_its_log_for_tensorboard_and_goes_on_with_it(tmp_path: Path) -> None:
    run = ["train", "--model", "logistic", "--out", str(tmp_path), "--tensorboard"]
    assert main([*run, "--samples", "300"]) == 0
    assert main([*run, "--samples", "900", "--resume"]) == 0
    records = read(tmp_path / "log.jsonl")
    for axis, key in (("steps", "step"), ("samples", "samples")):
        found = scalars(tmp_path / "tensorboard" / axis, f"{axis}/batch_size")
        assert found == [(record[key], record["batch_size"]) for record in records]
