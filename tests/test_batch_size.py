"""Properties of the controller, whatever the suggestions are."""

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adagrad_kernels import BatchSizeController, Decision, GradientStatistics
from adagrad_kernels.criteria import UNBOUNDED


def fails(batch_size: int, suggestion: int) -> Decision:
    return Decision(False, suggestion, suggestion / batch_size)


def passes(batch_size: int) -> Decision:
    return Decision(True, batch_size, 0.5)


UNTESTED = Decision(True, 8, math.nan, "the gradient statistics are not finite")

suggestions = st.lists(
    st.one_of(st.none(), st.integers(1, 5000), st.just(UNBOUNDED)), min_size=1, max_size=12
)


@st.composite
def controllers(draw: st.DrawFn, **fixed: Any) -> BatchSizeController:
    multiple = draw(st.integers(1, 8))
    first = multiple * draw(st.integers(1, 40))
    options = {
        "batch_size": first,
        "max_batch_size": first + draw(st.integers(0, 3000)),
        "multiple_of": multiple,
        "growth_limit": draw(st.one_of(st.none(), st.floats(1.01, 5))),
        "every": draw(st.integers(1, 3)),
        "smoothing": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "patience": draw(st.integers(1, 3)),
    }
    controller = BatchSizeController(**{**options, **fixed})
    if draw(st.booleans()):
        controller.limit_micro_batches(draw(st.integers(multiple, 600)))
    return controller


def feed(controller: BatchSizeController, found: list[int | None]) -> list[int]:
    """Batch sizes after each suggestion; None is a test that passed."""
    sizes = [controller.batch_size]
    for suggestion in found:
        b = controller.batch_size
        decision = passes(b) if suggestion is None else fails(b, suggestion)
        controller.advance(decision if controller.due else None)
        sizes.append(controller.batch_size)
    return sizes


@given(controllers(), suggestions)
def test_batches_never_shrink_and_never_pass_the_cap(
    controller: BatchSizeController, found: list[int | None]
) -> None:
    sizes = feed(controller, found)
    assert sizes == sorted(sizes)
    assert sizes[-1] <= controller.max_batch_size


@given(controllers(monotone=False), suggestions)
def test_a_batch_that_may_shrink_stays_between_floor_and_cap(
    controller: BatchSizeController, found: list[int | None]
) -> None:
    sizes = feed(controller, found)
    assert min(sizes) >= min(2, sizes[0])
    assert max(sizes) <= controller.max_batch_size


@given(controllers(), suggestions)
def test_batches_divide_into_equal_micro_batches(
    controller: BatchSizeController, found: list[int | None]
) -> None:
    for suggestion in found:
        size, count = controller.micro_batches()
        assert size * count == controller.batch_size
        assert size % controller.multiple_of == 0
        if controller.max_micro_batch_size is not None:
            assert size <= controller.max_micro_batch_size
        feed(controller, [suggestion])


@given(controllers(smoothing=0.0, patience=1, every=1), st.integers(1, 5000))
def test_one_step_takes_the_suggestion_within_the_limits(
    controller: BatchSizeController, suggestion: int
) -> None:
    before = controller.batch_size
    after = feed(controller, [suggestion])[-1]
    target = min(suggestion, controller.max_batch_size)
    if controller.growth_limit is not None:
        target = min(target, math.ceil(controller.growth_limit * before))
    least = max(before, target)
    # the next size from there on that is a multiple of multiple_of and of as many micro-batches
    limit = controller.max_micro_batch_size or least
    rounding = controller.multiple_of * (math.ceil(least / controller.multiple_of / limit) + 1)
    rounding *= math.ceil(least / limit)
    assert after <= least + rounding
    if after < least:
        assert after + rounding > controller.max_batch_size, "rounded down far from the cap"


@given(st.integers(2, 50), st.floats(1.001, 1.5))
def test_a_growth_limit_never_stops_growth(batch_size: int, limit: float) -> None:
    controller = BatchSizeController(batch_size, 10**6, growth_limit=limit)
    assert feed(controller, [UNBOUNDED])[-1] == math.ceil(limit * batch_size) > batch_size


def test_a_growth_limit_by_hand() -> None:
    controller = BatchSizeController(100, 10**6, growth_limit=1.1)  # 1.1 · 100 > 110 in floats
    assert feed(controller, [UNBOUNDED, UNBOUNDED])[-2:] == [110, 121]
    controller = BatchSizeController(110, 10**6, growth_limit=1.1, monotone=False)
    assert feed(controller, [1])[-1] == 100
    controller = BatchSizeController(100, 10**6, growth_limit=3, monotone=False)
    assert feed(controller, [1, 1])[-2:] == [33, 11]
    controller = BatchSizeController(100, 10**6, growth_limit=math.nextafter(1, 2))
    assert feed(controller, [UNBOUNDED, UNBOUNDED])[-2:] == [101, 102], "at least one sample more"


def test_rounding_by_hand() -> None:
    controller = BatchSizeController(8, 60000)
    controller.limit_micro_batches(512)
    assert feed(controller, [60000])[-1] == 60000
    assert controller.micro_batches() == (500, 120)
    assert feed(BatchSizeController(8, 100, multiple_of=4), [21, 22, 25, 200]) == [
        8,
        24,
        24,
        28,
        100,
    ]
    controller = BatchSizeController(8, 1031)  # the cap is a prime
    controller.limit_micro_batches(16)
    assert feed(controller, [5000])[-1] == 1030 - 1030 % controller.micro_batches()[0]


@st.composite
def compiled(draw: st.DrawFn) -> BatchSizeController:
    """With `sizes`, and a loader that can serve them on so many processes."""
    processes, multiple_of = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    unit = math.lcm(processes, multiple_of)
    limit = math.lcm(unit, draw(st.integers(1, 20)) * processes)  # largest micro-batch of all
    small = draw(st.lists(st.integers(1, limit // unit), max_size=3))
    large = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    sizes = [unit * k for k in small] + [limit * k for k in large]
    controller = BatchSizeController(
        draw(st.sampled_from(sizes)), max(sizes), multiple_of=multiple_of, sizes=sizes,
        growth_limit=draw(st.one_of(st.none(), st.floats(1.01, 5))),
        monotone=draw(st.booleans()),
    )  # fmt: skip
    controller.limit_micro_batches(limit // processes, processes)
    return controller


@given(compiled(), suggestions)
def test_few_sizes_for_compiled_graphs(
    controller: BatchSizeController, found: list[int | None]
) -> None:
    """Each suggestion becomes the next of the sizes; the shapes are no more than these."""
    sizes, shapes = controller.sizes, set()
    for suggestion in found:
        before = controller.batch_size
        after = feed(controller, [suggestion])[-1]
        assert after in sizes
        if suggestion is not None and controller.growth_limit is None:
            wanted = next((size for size in sizes if size >= suggestion), sizes[-1])
            assert after == (max(wanted, before) if controller.monotone else wanted)
        size, count = controller.micro_batches()
        assert size * count == after
        assert size % math.lcm(controller.processes, controller.multiple_of) == 0
        assert size <= controller.max_micro_batch_size * controller.processes
        shapes.add(size)
    assert len(shapes) <= len(sizes)


def test_sizes_by_hand() -> None:
    controller = BatchSizeController(8, 60000, sizes=[4096, 8, 512, 64])
    controller.limit_micro_batches(512)
    assert controller.max_batch_size == 4096
    served = []
    for suggestion in (8, 9, 64, 65, 513, UNBOUNDED):
        feed(controller, [suggestion])
        served.append(controller.micro_batches())
    assert served == [(8, 1), (64, 1), (64, 1), (512, 1), (512, 8), (512, 8)]


@pytest.mark.parametrize(
    ("options", "micro", "message"),
    [
        ({"sizes": [4, 16]}, None, r"batch_size \(8\) must be one of sizes, got \[4, 16\]"),
        ({"sizes": [8, 5000]}, None, r"largest of sizes \(5000\) is larger than max_batch_size"),
        ({"sizes": [8, 18], "multiple_of": 4}, None, r"multiples of multiple_of \(4\), got 18"),
        ({"sizes": [8, 8.5]}, None, "sizes must be a whole number"),
        ({"sizes": []}, None, "must be one of sizes"),
        ({"sizes": [8, 4096]}, (100, 1), "take max_micro_batch_size=64, or a multiple of 100"),
        ({"sizes": [8, 4096]}, (100, 2), "take max_micro_batch_size=64, or a multiple of 200"),
        ({"sizes": [8, 64]}, (512, 3), "8, one of sizes, does not divide among 3 processes"),
        (
            {"sizes": [8, 60], "multiple_of": 4}, (512, 8),
            "60, one of sizes, does not divide among 8 processes in multiples of 4",
        ),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_served(
    options: dict[str, Any], micro: tuple[int, int] | None, message: str
) -> None:
    def make() -> None:
        controller = BatchSizeController(8, 4096, **options)
        if micro is not None:
            controller.limit_micro_batches(*micro)

    with pytest.raises(ValueError, match=message):
        make()


def test_a_saved_size_above_the_largest() -> None:
    saved = BatchSizeController(128, 4096).state_dict()
    controller = BatchSizeController(8, 4096, sizes=[8, 64])
    with pytest.raises(ValueError, match=r"saved batch size 128 is larger than max_batch_size .64"):
        controller.load_state_dict(saved)


@given(st.integers(1, 4), st.integers(1, 20))
def test_tests_every_so_many_steps(every: int, steps: int) -> None:
    controller = BatchSizeController(2, 10**9, every=every)
    due = []
    for _ in range(steps):
        due.append(controller.due)
        controller.advance(fails(controller.batch_size, UNBOUNDED) if controller.due else None)
    assert due == [k % every == 0 for k in range(steps)]


@given(controllers(), st.integers(1, 5))
def test_what_was_not_tested_changes_nothing(controller: BatchSizeController, steps: int) -> None:
    before = controller.batch_size
    waiting = controller.state_dict()["waiting"]
    for _ in range(steps):
        assert controller.advance(UNTESTED) == before
        assert controller.advance(None) == before
    assert controller.state_dict()["waiting"] == waiting
    assert controller.steps == 2 * steps


def test_smoothing_averages_the_suggestions() -> None:
    controller = BatchSizeController(8, 1000, smoothing=0.75)
    assert feed(controller, [16]) == [8, 10]  # 0.75 · 8 + 0.25 · 16
    assert feed(controller, [90]) == [10, 30]  # 0.75 · 10 + 0.25 · 90
    assert feed(controller, [None]) == [30, 30]  # falls towards 30, no growth
    assert feed(controller, [UNBOUNDED]) == [30, math.ceil(0.75 * 30 + 0.25 * 1000)]


@given(st.integers(2, 1000), st.floats(0.01, 0.99))
@example(3, 0.2)  # 0.2 · 3 + (1 − 0.2) · 3 is more than 3 in float64
def test_smoothing_of_equal_suggestions_is_exact(batch_size: int, smoothing: float) -> None:
    controller = BatchSizeController(batch_size, 10**6, smoothing=smoothing)
    assert feed(controller, [None] * 5) == [batch_size] * 6


def test_patience_takes_the_smallest_of_consecutive_suggestions() -> None:
    controller = BatchSizeController(8, 1000, patience=3)
    assert feed(controller, [100, 50, 70]) == [8, 8, 8, 50]
    assert feed(controller, [100, 90, None, 200, 300, 400]) == [50] * 6 + [200]


def test_patience_counts_both_directions() -> None:
    controller = BatchSizeController(50, 1000, patience=2, monotone=False)
    assert feed(controller, [10, 20]) == [50, 50, 20]
    assert feed(controller, [10, 90, 80]) == [20, 20, 20, 80]


def test_shrinking_is_limited_too() -> None:
    controller = BatchSizeController(64, 1000, growth_limit=2, monotone=False, min_batch_size=10)
    assert feed(controller, [5, 5, 5, 5]) == [64, 32, 16, 10, 10]
    assert feed(BatchSizeController(64, 1000), [5]) == [64, 64]


@given(controllers(lr_policy="adascale"), suggestions, suggestions)
def test_state_dict_continues_exactly(
    controller: BatchSizeController, before: list[int | None], after: list[int | None]
) -> None:
    feed(controller, before)
    controller.lr_policy.record(GradientStatistics(8, 100.0, 3.0), 8)
    options = {
        name: getattr(controller, name)
        for name in (
            "max_batch_size",
            "growth_limit",
            "multiple_of",
            "every",
            "smoothing",
            "patience",
        )
    }
    resumed = BatchSizeController(controller.multiple_of, **options, lr_policy="adascale")
    if controller.max_micro_batch_size is not None:
        resumed.limit_micro_batches(controller.max_micro_batch_size)
    resumed.load_state_dict(controller.state_dict())
    assert feed(resumed, after) == feed(controller, after)
    assert resumed.state_dict() == controller.state_dict()
    assert resumed.lr_factor == controller.lr_factor


class TestLRPolicy:
    """The factor on the learning rate after the batch has grown."""

    @pytest.mark.parametrize(
        ("policy", "expected"), [(None, 1.0), ("linear", 16.0), ("sqrt", 4.0), ("adascale", 1.0)]
    )
    def test_factors(self, policy: str | None, expected: float) -> None:
        controller = BatchSizeController(8, 1000, lr_policy=policy)
        assert controller.lr_factor == 1
        feed(controller, [128])
        assert controller.lr_factor == expected

    @given(st.integers(2, 500), st.floats(0, 1e3), st.floats(1e-3, 1e3), st.floats(1, 100))
    def test_adascale_gain(self, n: int, variance: float, signal: float, growth: float) -> None:
        """(σ² + μ²)/(σ²/S + μ²) with σ² = tr Σ/b₀; between 1 and S."""
        controller = BatchSizeController(n, 10**6, lr_policy="adascale")
        mean_norm_sq = signal + variance / n
        sum_norms_sq = (n - 1) * variance + n * mean_norm_sq
        s = GradientStatistics(n, sum_norms_sq, mean_norm_sq)
        controller.advance(passes(n), s)
        gain = controller.lr_policy.factor(growth)
        expected = (variance / n + signal) / (variance / n / growth + signal)
        assert gain == pytest.approx(expected, rel=1e-6)
        assert 1 - 1e-9 <= gain <= growth * (1 + 1e-9)

    def test_adascale_averages_noise_and_signal_separately(self) -> None:
        controller = BatchSizeController(2, 10**6, lr_policy="adascale_sqrt")
        noisy = GradientStatistics(2, sum_norms_sq=2 * 4 + 4, mean_norm_sq=4.0)  # tr Σ̂ = 4, μ² = 2
        quiet = GradientStatistics(2, sum_norms_sq=2 * 6.0, mean_norm_sq=6.0)  # tr Σ̂ = 0, μ² = 6
        controller.advance(None, noisy)
        controller.advance(None, quiet)
        past = 1 - 1 / 1000
        noise, signal = past * 2, past * 2 + (1 - past) * 6
        expected = (noise + signal) / (noise / 4 + signal)
        assert controller.lr_policy.factor(4) == pytest.approx(math.sqrt(expected), rel=1e-12)

    @pytest.mark.parametrize("sum_norms_sq", [16.0, 28.0])  # μ² is 0, and estimated below 0
    def test_noise_alone_gives_the_linear_factor(self, sum_norms_sq: float) -> None:
        controller = BatchSizeController(4, 10**6, lr_policy="adascale")
        controller.advance(None, GradientStatistics(4, sum_norms_sq, mean_norm_sq=1.0))
        assert controller.lr_policy.factor(7) == pytest.approx(7)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_what_is_not_finite_is_not_averaged(self, value: float) -> None:
        controller = BatchSizeController(4, 10**6, lr_policy="adascale")
        controller.advance(None, GradientStatistics(4, sum_norms_sq=16.0, mean_norm_sq=2.0))
        before = controller.lr_policy.factor(4)
        controller.advance(None, GradientStatistics(4, sum_norms_sq=value, mean_norm_sq=1.0))
        assert controller.lr_policy.factor(4) == before

    def test_a_batch_a_thousand_times_the_first_forgets_the_past(self) -> None:
        """The weight of the past, 1 − S/1000, is not negative."""
        s = GradientStatistics(3000, sum_norms_sq=3000 * 2 + 2999 * 5.0, mean_norm_sq=2.0)
        factors = []
        for past in (None, GradientStatistics(2, sum_norms_sq=1000.0, mean_norm_sq=1.0)):
            controller = BatchSizeController(2, 10**6, lr_policy="adascale")
            if past is not None:
                controller.advance(None, past)
            controller.advance(None, s)
            factors.append(controller.lr_policy.factor(8))
        assert factors[1] == factors[0] > 1

    def test_relative_to_what_the_loader_could_serve(self) -> None:
        controller = BatchSizeController(1021, 10**6, lr_policy="linear")  # a prime
        controller.limit_micro_batches(512)
        assert controller.initial_batch_size == controller.batch_size == 1022
        assert controller.lr_factor == 1

    def test_a_later_loader_does_not_begin_anew(self) -> None:
        controller = BatchSizeController(8, 64, lr_policy="linear")
        controller.limit_micro_batches(8)
        feed(controller, [32])
        controller.limit_micro_batches(16)
        assert (controller.initial_batch_size, controller.lr_factor) == (8, 4)


def test_an_infinite_growth_limit_is_none() -> None:
    controller = BatchSizeController(8, 4096, growth_limit=float("inf"))
    assert controller.advance(Decision(False, 2000, 250.0)) == 2000


@pytest.mark.parametrize("size", [float("inf"), float("nan")])
def test_sizes_that_are_not_finite_are_refused(size: float) -> None:
    with pytest.raises(ValueError, match="max_batch_size must be a whole number"):
        BatchSizeController(8, size)  # type: ignore[arg-type]
