"""The Trainer of transformers with batches that grow."""

import importlib
import sys
from pathlib import Path
from typing import Any

import integration_cases as cases
import pytest
import torch
from integration_scenarios import Classifier, rows
from torch import Tensor
from training import accumulators, weights

import adagrad_kernels as ak

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
from transformers import TrainingArguments  # noqa: E402

from adagrad_kernels.integrations.transformers import (  # noqa: E402
    AdaptiveBatchTrainer,
    sequence_mean_loss,
)


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": cases.MICRO, "num_train_epochs": 2, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "max_grad_norm": 0, "lr_scheduler_type": "constant", "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**options, **changed})


class Digits(AdaptiveBatchTrainer):
    """Remembers what it was trained on."""

    def __init__(self, folder: Path, kind: str = "AdAdaGrad", **changed: Any) -> None:
        model = Classifier()
        self.adaptive = cases.optimizer(kind, model)
        self.batches: list[cases.Batch] = []
        given = {"optimizers": (self.adaptive, None), "train_dataset": rows()}
        given |= {name: changed.pop(name) for name in ("optimizers",) if name in changed}
        super().__init__(model, arguments(folder, **changed), **given)

    def training_step(self, *args: Any) -> Tensor:
        loss = super().training_step(*args)
        self.batches.append(list(self.model.seen))
        self.model.seen.clear()
        return loss


@pytest.mark.parametrize("max_grad_norm", [0, 0.3])
@pytest.mark.parametrize("kind", ["AdAdaGrad", "AdaptiveBatch"])
def test_the_weights_of_plain_torch(kind: str, max_grad_norm: float, tmp_path: Path) -> None:
    trainer = Digits(tmp_path, kind, max_grad_norm=max_grad_norm)
    found = trainer.train()
    opt, batches = trainer.adaptive, trainer.batches
    cases.assert_plain_training(batches, trainer.model, kind, max_grad_norm or None)
    assert opt.max_grad_norm == (max_grad_norm or None)
    assert trainer.args.max_grad_norm == max_grad_norm
    assert found.global_step == opt.controller.steps == len(batches)
    sizes = [sum(len(x) for x, _ in batch) for batch in batches]
    assert opt.samples == sum(sizes) == trainer._batches.loader.samples
    assert 0 <= sum(sizes) - 1200 < 192
    # what the trainer tells
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["batch_size"] for row in logs[:-1]] == sizes[1:]
    assert [row["samples"] for row in logs] == torch.tensor(sizes).cumsum(0).tolist()
    assert [row["epoch"] for row in logs] == pytest.approx([row["samples"] / 600 for row in logs])
    assert any("noise_scale" in row for row in logs)
    assert logs[0]["loss"] == pytest.approx(_loss(batches[0]))
    metrics = found.metrics
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(
        sum(sizes), rel=0.01
    )


def _loss(batch: cases.Batch) -> float:
    x, y = (torch.cat(parts) for parts in zip(*batch, strict=True))
    return torch.nn.functional.cross_entropy(cases.network()(x), y).item()


def test_the_logged_gradient_norm_is_that_of_the_mean(tmp_path: Path) -> None:
    trainer = Digits(tmp_path)
    norms = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            norms.append(trainer.adaptive.statistics.mean_norm_sq**0.5)

    trainer.add_callback(Watch)
    trainer.train()
    logged = [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("save", ["steps", "epoch"])
@pytest.mark.parametrize("kind", ["AdAdaGradNorm", "AdaptiveBatch"])
def test_a_resumed_run_continues_bit_for_bit(kind: str, save: str, tmp_path: Path) -> None:
    changed = {
        "save_strategy": save, "save_steps": 4, "num_train_epochs": 3,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
    }  # fmt: skip
    whole = Digits(tmp_path / "whole", kind, **changed)
    whole.train()
    folders = sorted((tmp_path / "whole").iterdir(), key=lambda path: int(path.name[11:]))
    assert len(folders) > 1
    resumed = Digits(tmp_path / "resumed", kind, **changed)
    resumed.train(resume_from_checkpoint=str(folders[0]))
    done = int(folders[0].name[11:])
    assert len(resumed.batches) == len(whole.batches) - done > 1
    assert torch.equal(weights(whole.model), weights(resumed.model))
    one, other = whole.adaptive, resumed.adaptive
    if kind == "AdAdaGradNorm":
        assert torch.equal(accumulators(one), accumulators(other))
    assert one.controller.state_dict() == other.controller.state_dict()
    assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert whole._batches.loader.state_dict() == resumed._batches.loader.state_dict()
    for name in ("global_step", "epoch"):
        assert getattr(whole.state, name) == getattr(resumed.state, name)
    assert resumed.args.ignore_data_skip is False


def test_max_steps_counts_batches(tmp_path: Path) -> None:
    trainer = Digits(tmp_path, max_steps=14, lr_scheduler_type="linear")
    trainer.train()
    assert trainer.state.global_step == trainer.adaptive.controller.steps == 14
    assert trainer.adaptive.samples > 1200  # several epochs
    assert trainer.adaptive.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_count_samples(kind: str, tmp_path: Path) -> None:
    trainer = Digits(tmp_path, lr_scheduler_type=kind, warmup_steps=0.25)
    trainer.train()
    twin = cases.optimizer("AdAdaGrad", cases.network())
    schedule = {"linear": ak.schedules.LinearDecay, "cosine": ak.schedules.CosineDecay}[kind]
    factor = schedule(twin, total=1200, warmup=300).factor
    logs = [row for row in trainer.state.log_history if "loss" in row]
    before = [0.0, *(row["samples"] for row in logs[:-1])]
    # transformers logs the rate that a step was made with
    rates = [0.05 * factor(samples) for samples in before]
    assert [row["learning_rate"] for row in logs] == pytest.approx(rates)


def gpt2(**changed: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, **changed,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config)


def language(folder: Path, ragged: bool = False, **changed: Any) -> Any:
    tokens = torch.randint(32, (200, 8), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    if ragged:
        labels[::2, 5:] = -100
    model = gpt2()
    opt = ak.AdAdaGrad(model, lr=0.1, **cases.options(max_batch_size=96))
    data = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    options = {"compute_loss_func": changed.pop("compute_loss_func", None)}
    return AdaptiveBatchTrainer(
        model, arguments(folder, remove_unused_columns=True, **changed), train_dataset=data,
        optimizers=(opt, None), **options,
    )  # fmt: skip


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_language_model(precision: dict[str, bool], tmp_path: Path) -> None:
    changed = {"save_strategy": "steps", "save_steps": 3, **precision}
    trainer = language(tmp_path, include_num_input_tokens_seen="all", **changed)
    trainer.train()
    opt = trainer.adaptive_optimizer
    assert opt.batch_size == 96
    assert opt.samples >= 400
    assert trainer.state.num_input_tokens_seen == 8 * opt.samples
    assert trainer.state.total_flos > 0
    again = language(tmp_path / "again", **changed)  # dropout: random numbers are restored, too
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(trainer.model), weights(again.model))


def test_every_sequence_has_the_same_weight(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples of 4 and 7 labels.*sequence_mean_loss"):
        language(tmp_path, ragged=True).train()
    trainer = language(tmp_path, ragged=True, compute_loss_func=sequence_mean_loss)
    trainer.train()
    assert trainer.adaptive_optimizer.batch_size > 8


def test_the_mean_over_sequences() -> None:
    logits, labels = torch.randn(3, 6, 9), torch.randint(9, (3, 6))
    labels[0, 3:] = -100
    labels[1, 2:5] = -100
    one_by_one = [
        torch.nn.functional.cross_entropy(logits[i, :-1], labels[i, 1:], ignore_index=-100)
        for i in range(3)
    ]
    expected = torch.stack(one_by_one).mean()
    torch.testing.assert_close(sequence_mean_loss({"logits": logits}, labels), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "per_device_train_batch_size"),
        ({"auto_find_batch_size": True}, "by memory"),
        ({"train_sampling_strategy": "group_by_length"}, '"random"'),
        ({"lr_scheduler_type": "polynomial"}, "max_steps"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 5}, "fraction"),
    ],
)
def test_settings_that_contradict(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changed))}.*{message}"):
        Digits(tmp_path, **changed).train()


def test_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs an optimizer"):
        Digits(tmp_path, optimizers=(None, None)).train()
    sgd = torch.optim.SGD(Classifier().parameters())
    with pytest.raises(TypeError, match=r"AdaptiveBatch around any other.*SGD"):
        Digits(tmp_path, optimizers=(sgd, None)).train()
    trainer = Digits(tmp_path, max_grad_norm=1.0)
    trainer.adaptive.max_grad_norm = 2.0
    with pytest.raises(ValueError, match=r"max_grad_norm.=1\.0.*max_grad_norm=2\.0"):
        trainer.train()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "adagrad_kernels.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"adagrad_kernels\[transformers\]\""):
        importlib.import_module(name)
