"""The loop as a user writes it: loader, loss, backward, step, zero_grad."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from per_sample import per_sample
from torch import Tensor, nn
from training import dataset, network, optimizer, weights

import adagrad_kernels as ak

CAP = 200


Setup = tuple[nn.Module, Any, ak.AdaptiveDataLoader]


def setup(kind: str, micro: int = 1000, eta: float = 0.7, **options: Any) -> Setup:
    model = network()
    options = {"criterion": ak.NormTest(eta), "batch_size": 4, "max_batch_size": CAP, **options}
    opt = optimizer(kind, model, **options)
    return model, opt, ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=micro, seed=7)


def loop(setup: Setup, epochs: int = 3) -> list[int]:
    """Trains; returns the batch size of every update."""
    model, opt, loader = setup
    sizes = []
    for _ in range(epochs):
        for x, y in loader:
            samples = opt.samples
            loss = F.mse_loss(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if opt.updated:
                sizes.append(opt.samples - samples)
    return sizes


every_kind = pytest.mark.parametrize("kind", ["AdAdaGrad", "AdAdaGradNorm", "AdaptiveBatch"])


@every_kind
def test_batch_sizes_follow_from_the_statistics(kind: str) -> None:
    """Each step against per-sample gradients in plain autograd and the formula by hand."""
    model, opt, loader = setup(kind, micro=16)
    expected = opt.batch_size
    parts: list[tuple[Tensor, Tensor]] = []
    seen = [expected]
    for x, y in loader:
        parts.append((x, y))
        before = copy.deepcopy(model)
        F.mse_loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        if not opt.updated:
            continue
        bx, by = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        parts = []
        assert len(bx) == expected
        truth = per_sample(before, F.mse_loss, bx, by)
        assert opt.statistics.variance == pytest.approx(truth.variance_trace.item(), rel=1e-9)
        assert opt.statistics.mean_norm_sq == pytest.approx(truth.mean_norm_sq.item(), rel=1e-9)
        torch.testing.assert_close(opt.statistics.sample_norms_sq, truth.norms_sq)
        wanted = math.ceil(truth.variance_trace / (0.7**2 * truth.mean_norm_sq))
        assert opt.decision.passed == (wanted <= expected)
        if wanted > expected:
            assert opt.decision.batch_size == wanted
            expected = servable(min(wanted, CAP), 16)
        assert opt.batch_size == expected
        seen.append(expected)
    assert len(set(seen)) > 2, "the problem is too easy: nothing grew"


def servable(size: int, micro: int) -> int:
    """The next size that is M equal micro-batches, M at most a quarter more than necessary."""

    def divides(n: int) -> bool:
        least = math.ceil(n / micro)
        return any(n % m == 0 for m in range(least, least + least // 4 + 2))

    found = next((n for n in range(size, CAP + 1) if divides(n)), None)
    return found or next(n for n in range(CAP, 0, -1) if divides(n))


@every_kind
@pytest.mark.parametrize("micro", [1, 5, 10])
def test_micro_batches_make_no_difference(kind: str, micro: int) -> None:
    """Same weights and statistics to rounding, where both can serve the same batch sizes."""
    options = {"batch_size": 20, "growth_limit": 2}
    whole = setup(kind, 1000, eta=1e-3, **options)
    split = setup(kind, micro, eta=1e-3, **options)
    sizes = loop(whole, 1), loop(split, 1)
    assert sizes[0] == sizes[1] == [20, 40, 80, 160, CAP]
    assert split[2].controller.micro_batches() == (micro, CAP // micro)
    torch.testing.assert_close(weights(split[0]), weights(whole[0]), rtol=1e-9, atol=1e-11)
    a, b = split[1].statistics, whole[1].statistics
    torch.testing.assert_close(a.sample_norms_sq, b.sample_norms_sq, rtol=1e-7, atol=1e-10)
    assert a.variance == pytest.approx(b.variance, rel=1e-9)
    assert a.mean_norm_sq == pytest.approx(b.mean_norm_sq, rel=1e-9)


@every_kind
@pytest.mark.parametrize("stop", [1, 7, 30])
def test_resuming_continues_bit_for_bit(kind: str, stop: int) -> None:
    """Interrupted after any micro-batch; what had been accumulated is served again."""
    options = {"micro": 8, "smoothing": 0.3, "every": 2, "patience": 2, "lr_policy": "adascale"}
    straight = setup(kind, **options)
    loop(straight)

    first = setup(kind, **options)
    model, opt, loader = first
    for number, (x, y) in enumerate(loader):
        F.mse_loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        if number == stop:
            break
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = setup(kind, **options)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    loop(second)
    assert torch.equal(weights(second[0]), weights(straight[0]))
    assert second[1].batch_size == straight[1].batch_size > 4
    assert second[2].samples == straight[2].samples


@every_kind
def test_closures_train_the_same(kind: str) -> None:
    """Each closure zeroes, as in torch; while a batch is accumulated that does nothing."""
    plain, closed = setup(kind, 8), setup(kind, 8)
    sizes = loop(plain)
    model, opt, loader = closed
    found = []
    for _ in range(3):
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

            samples, expected = opt.samples, F.mse_loss(model(x), y).item()
            assert opt.step(closure).item() == expected
            if opt.updated:
                found.append(opt.samples - samples)
    assert found == sizes
    assert torch.equal(weights(model), weights(plain[0]))


def test_a_loader_with_workers_trains_the_same() -> None:
    one, other = setup("AdAdaGrad", 16), setup("AdAdaGrad", 16)
    model, opt, _ = other
    workers = ak.AdaptiveDataLoader(dataset(), opt, max_micro_batch_size=16, seed=7, num_workers=2)
    assert loop(one) == loop((model, opt, workers))
    assert torch.equal(weights(one[0]), weights(model))


def test_the_interval_between_tests() -> None:
    model, opt, loader = setup("AdAdaGrad", every=3)
    decisions = []
    for x, y in loader:
        F.mse_loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        decisions.append(opt.decision)
    changes = [k for k in range(1, len(decisions)) if decisions[k] is not decisions[k - 1]]
    assert changes == [k for k in range(1, len(decisions)) if k % 3 == 0]


def test_adadagradnorm_reaches_a_stationary_point() -> None:
    """While the norm test holds, min ‖∇F‖² falls at least like 1/K: K min ‖∇F‖² does not grow."""
    model, opt, loader = setup("AdAdaGradNorm", eta=0.5, max_batch_size=500)
    opt.param_groups[0]["lr"] = 1.0
    least, steps = [], []
    x, y = dataset().tensors
    for _ in range(30):
        loop((model, opt, loader), 1)
        loss = F.mse_loss(model(x), y)
        norm = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))
        least.append(min([norm.item(), *least[-1:]]))
        steps.append(opt.controller.steps)
    scaled = [k * value for k, value in zip(steps, least, strict=True)]
    assert max(scaled[10:]) <= max(scaled[:10])
    assert least[-1] < least[0] / 10


class TestLearningRatePolicy:
    """The factor multiplies what groups and schedulers say, and is not written there."""

    @pytest.mark.parametrize("policy", ["linear", "sqrt"])
    def test_update(self, policy: str) -> None:
        """After growing from 4 to 16 the step is that of torch with the larger rate."""
        factor = {"linear": 4.0, "sqrt": 2.0}[policy]
        for kind in ("AdAdaGrad", "AdaptiveBatch"):
            model, opt, _ = setup(kind, eta=1e-3, max_batch_size=16, lr_policy=policy)
            data = dataset().tensors
            for first, size in ((0, 4), (4, 16)):
                before = copy.deepcopy(model)
                x, y = (t[first : first + size] for t in data)
                F.mse_loss(model(x), y).backward()
                opt.step()
                opt.zero_grad()
            assert opt.param_groups[0]["lr"] == 0.1
            assert opt.statistics.lr == pytest.approx(0.1 * factor)
            F.mse_loss(before(x), y).backward()
            for p, old in zip(model.parameters(), before.parameters(), strict=True):
                root = opt.state[p]["sum"].sqrt() + 1e-10 if kind == "AdAdaGrad" else 1.0
                expected = old.detach() - 0.1 * factor * old.grad / root
                torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)

    def test_composes_with_a_scheduler(self) -> None:
        model, opt, _ = setup("AdAdaGrad", eta=1e-3, max_batch_size=16, lr_policy="linear")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
        x, y = (t[:16] for t in dataset().tensors)
        for _ in range(3):
            F.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            scheduler.step()
        assert scheduler.get_last_lr() == [0.1 / 8]
        assert opt.statistics.lr == pytest.approx(4 * 0.1 / 4)
