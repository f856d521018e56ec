"""`adagrad_` and `adagrad_norm_` with every option against float64."""

from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import dtypes, laid_out, layouts, sizes
from tolerance import assert_close_to_truth
from torch import Tensor

from adagrad_kernels import ops, reference

pytestmark = pytest.mark.usefixtures("nan_memory")


@dataclass
class Update:
    """One call: tensors and options."""

    shapes: list[tuple[int, ...]]
    layout: str
    dtype: torch.dtype
    coordinates: bool
    samples: int
    options: dict[str, Any]

    def tensors(self, device: torch.device, grad_dtype: torch.dtype) -> dict[str, list[Tensor]]:
        """Parameters of dtype, accumulators, gradients c summed over samples, and Σ c²."""
        made: dict[str, list[Tensor]] = {"params": [], "grads": [], "sums": [], "squares": []}
        for shape in self.shapes:
            exact = self.dtype if self.dtype == torch.float64 else torch.float32
            p = torch.randn(shape, device=device).to(self.dtype)
            p = laid_out(p, self.layout) if self.layout != "sliced" else p
            c = torch.randn(self.samples, *shape, device=device, dtype=exact)
            v = torch.zeros_like(p, dtype=exact).copy_(torch.rand(shape, device=device))
            made["params"].append(p)
            made["sums"].append(v)
            made["grads"].append(laid_out(c.sum(0).to(grad_dtype), self.layout))
            if self.coordinates:
                made["squares"].append(c.square().sum(0))
        return made


@st.composite
def updates(draw: st.DrawFn) -> Update:
    shapes = draw(
        st.lists(st.lists(sizes, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)
    )
    return Update(
        shapes,
        draw(layouts),
        draw(dtypes),
        draw(st.booleans()),
        draw(st.integers(2, 5)),
        {
            "lr": draw(st.sampled_from([0.0, 0.1, 3.0])),
            "eps": draw(st.sampled_from([1e-10, 1e-3])),
            "weight_decay": draw(st.sampled_from([0.0, 0.2])),
            "maximize": draw(st.booleans()),
            "grad_scale": draw(st.sampled_from([1.0, 0.25])),
        },
    )


def check_reductions(
    results: list[tuple[Tensor, Tensor]],
    made: dict[str, list[Tensor]],
    roots: list[Tensor],
    scale: float,
    samples: int,
) -> None:
    """‖g‖² and the four numbers of (found, truth, plain): float64, computed in `dtype`."""
    dtype = exact_dtype(made["params"][0].dtype)
    values = [torch.cat([norm.view(1), rest]) for norm, rest in results]
    assert values[0].dtype == torch.float64
    sizes = [values[1][0]]
    if made["squares"]:  # var_j is a difference: its first term is the size of both
        table = []
        for grad, square, root in zip(made["grads"], made["squares"], roots, strict=True):
            first = square.double() * (scale * samples) ** 2 / (samples - 1)
            g_sq, root = (grad.double() * scale).square(), root.double()
            ratio = torch.where(first > 0, first / g_sq, 0.0).flatten()
            largest = torch.cat([ratio, ratio.new_zeros(1)]).max()
            table.append([first.sum(), largest, (first / root).sum(), (g_sq / root).sum()])
        columns = [torch.stack(column) for column in zip(*table, strict=True)]
        sizes += [columns[0].sum(), columns[1].max(), columns[2].sum(), columns[3].sum()]
    names = ("‖g‖²", "Σ var", "max var/g²", "Σ var/√v", "Σ g²/√v")[: len(sizes)]
    for name, size, a, t, p in zip(names, sizes, *values, strict=True):
        assert_close_to_truth(a.to(dtype), t, p.to(dtype), size, name)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def copies(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.empty_like(t, dtype=dtype or t.dtype).copy_(t) for t in tensors]


@settings(max_examples=50)
@given(updates())
def test_adagrad(device: torch.device, update: Update) -> None:
    made = update.tensors(device, update.dtype)
    options, samples = update.options, update.samples
    results = []
    for dtype in (None, torch.float64, None):
        p, v = copies(made["params"], dtype), copies(made["sums"], dtype)
        grads, squares = copies(made["grads"], dtype), copies(made["squares"], dtype)
        if results:
            reductions = reference.adagrad_(p, grads, v, squares, *options.values(), samples)
        else:
            reductions = ops.adagrad_(
                p, made["grads"], v, made["squares"], **options, samples=samples
            )
        results.append((p, v, reductions))
    for p, q, r in zip(*(result[0] for result in results), strict=True):
        assert_close_to_truth(p, q, r, what="param")
    for p, q, r in zip(*(result[1] for result in results), strict=True):
        assert_close_to_truth(p, q, r, what="sum")
    roots = [v.sqrt() + options["eps"] for v in results[1][1]]
    reductions = [result[2] for result in results]
    check_reductions(reductions, made, roots, options["grad_scale"], samples)


@settings(max_examples=50)
@given(updates())
def test_adagrad_norm(device: torch.device, update: Update) -> None:
    made = update.tensors(device, update.dtype)
    n, samples = len(made["params"]), update.samples
    options = dict(update.options)
    lr, weight_decay = options.pop("lr"), options.pop("weight_decay")
    rates, decays = [lr / (i + 1) for i in range(n)], [weight_decay * i for i in range(n)]
    results = []
    for dtype in (None, torch.float64, None):
        v = torch.tensor(0.3, dtype=torch.float64, device=device)
        p, squares = copies(made["params"], dtype), copies(made["squares"], dtype)
        grads = copies(made["grads"], dtype)
        if results:
            reductions = reference.adagrad_norm_(
                p, grads, v, squares, rates, options["eps"], decays, options["maximize"],
                options["grad_scale"], samples,
            )  # fmt: skip
        else:
            reductions = ops.adagrad_norm_(
                p, made["grads"], v, made["squares"], lr=rates, weight_decay=decays, **options,
                samples=samples,
            )  # fmt: skip
        results.append((p, v, reductions))
    for p, q, r in zip(*(result[0] for result in results), strict=True):
        assert_close_to_truth(p, q, r, what="param")
    exact = exact_dtype(update.dtype)
    a, t, p = (result[1] for result in results)
    assert_close_to_truth(a.to(exact), t, p.to(exact), what="sum")
    roots = [t.sqrt() + options["eps"]] * n
    reductions = [result[2] for result in results]
    check_reductions(reductions, made, roots, options["grad_scale"], samples)


@pytest.mark.parametrize("shapes", [[(70_001,)], [(3, 20_000), (5,), (40_000,)]])
@pytest.mark.parametrize("function", ["adagrad_", "adagrad_norm_"])
def test_large_tensors(device: torch.device, function: str, shapes) -> None:
    """More than one piece a tensor, more than one thread."""
    update = Update(shapes, "contiguous", torch.float32, True, 4, {})
    made = update.tensors(device, torch.float32)
    results = []
    for dtype in (None, torch.float64, None):
        p, grads, v, squares = (
            copies(made[k], dtype) for k in ("params", "grads", "sums", "squares")
        )
        if function == "adagrad_":
            args = (0.1, 1e-10, 0.1, False, 0.5, 4)
        else:
            v = torch.tensor(0.3, dtype=torch.float64, device=device)
            args = ([0.1] * len(p), 1e-10, [0.1] * len(p), False, 0.5, 4)
        op = getattr(reference if results else torch.ops.adagrad_kernels, function)
        results.append((p, op(p, grads, v, squares, *args), v))
    for p, q, r in zip(*(result[0] for result in results), strict=True):
        assert_close_to_truth(p, q, r)
    v = results[1][2]
    roots = [v.sqrt()] * len(shapes) if isinstance(v, Tensor) else [x.sqrt() for x in v]
    check_reductions([result[1] for result in results], made, roots, 0.5, 4)


def test_one_rate_for_all(device: torch.device) -> None:
    """A number for lr and weight_decay means that number for every parameter."""
    results = []
    for lr, decay in ((0.1, 0.2), ([0.1, 0.1], [0.2, 0.2])):
        w = [torch.ones(3, device=device), torch.ones(2, device=device)]
        v = torch.ones((), dtype=torch.float64, device=device)
        ops.adagrad_norm_(w, [torch.ones_like(p) for p in w], v, lr=lr, weight_decay=decay)
        results.append(torch.cat([*w, v.view(1)]))
    assert torch.equal(*results)


def test_gradients_of_other_dtypes_and_layouts(device: torch.device) -> None:
    """A gradient's memory order and precision need not be its parameter's."""
    w = torch.randn(6, 5, device=device).t()
    grad = torch.randn(5, 6, device=device).bfloat16()
    v = torch.zeros_like(w)
    expected, v2 = w.double(), v.double()
    ops.adagrad_([w], [grad], [v], lr=0.1)
    reference.adagrad_([expected], [grad.double()], [v2], [], 0.1, 1e-10, 0, False, 1, 2)
    assert_close_to_truth(w, expected, expected.float())
    assert_close_to_truth(v, v2, v2.float())


def test_a_low_precision_parameter_does_not_stall(device: torch.device) -> None:
    """The accumulator is float32 where torch's would stop growing in bfloat16."""
    w = torch.zeros(1, dtype=torch.bfloat16, device=device)
    v = torch.zeros(1, device=device)
    for _ in range(1000):
        ops.adagrad_([w], [torch.full_like(w, 0.5)], [v], lr=0.0)
    assert v.item() == 250


def test_non_finite_gradients_are_not_hidden(device: torch.device) -> None:
    for bad in (torch.inf, torch.nan):
        w, v = torch.zeros(40, device=device), torch.zeros(40, device=device)
        grad = torch.ones(40, device=device)
        grad[3] = bad
        squares = torch.ones(40, device=device)
        squares[3] = bad
        norm, found = ops.adagrad_([w], [grad], [v], [squares], samples=4)
        assert not norm.isfinite()
        assert not found[0].isfinite()
        assert w.isfinite().sum() == 39


def f32(*shape: int) -> Tensor:
    return torch.ones(shape)


BAD = {
    "lengths": ([f32(2), f32(2)], [f32(2)], [f32(2), f32(2)], []),
    "sums length": ([f32(2)], [f32(2)], [], []),
    "coordinate sums length": ([f32(2), f32(3)], [f32(2), f32(3)], [f32(2), f32(3)], [f32(2)]),
    "no parameters": ([], [], [], []),
    "gradient shape": ([f32(2, 3)], [f32(3, 2)], [f32(2, 3)], []),
    "sum shape": ([f32(2, 3)], [f32(2, 3)], [f32(3, 2)], []),
    "broadcastable sum": ([f32(2, 3)], [f32(2, 3)], [f32(1)], []),
    "broadcastable gradient": ([f32(2, 3)], [f32(3)], [f32(2, 3)], []),
    "sum dtype": ([f32(2).bfloat16()], [f32(2)], [f32(2).bfloat16()], []),
    "sum layout": ([f32(2, 3)], [f32(2, 3)], [f32(3, 2).t()], []),
    "coordinate sum shape": ([f32(2)], [f32(2)], [f32(2)], [f32(3)]),
    "integers": ([f32(2).int()], [f32(2)], [f32(2)], []),
}


@pytest.mark.parametrize("where", ["kernel", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_adagrad_checks_its_tensors(bad: str, where: str) -> None:
    if where == "reference" and bad in ("sum layout", "integers"):
        pytest.skip("memory order and integers matter to kernels alone")
    op = torch.ops.adagrad_kernels.adagrad_ if where == "kernel" else reference.adagrad_
    params, grads, sums, squares = BAD[bad]
    before = [p.clone() for p in params]
    with pytest.raises(RuntimeError, match="adagrad"):
        op(params, grads, sums, squares, 0.1, 0, 0, False, 1, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "bad", [k for k in BAD if not k.startswith(("sum", "broadcastable sum")) or k == "sums length"]
)
def test_adagrad_norm_checks_its_tensors(bad: str) -> None:
    params, grads, _, squares = BAD[bad]
    sum = torch.ones((), dtype=torch.float32 if bad == "sums length" else torch.float64)
    with pytest.raises(RuntimeError, match="adagrad"):
        ops.adagrad_norm_(params, grads, sum, squares)
    assert (sum == 1).all()


def test_adagrad_norm_takes_a_rate_for_each_parameter() -> None:
    with pytest.raises(RuntimeError, match="one lr and one weight_decay"):
        ops.adagrad_norm_([f32(2)], [f32(2)], torch.ones((), dtype=torch.float64), lr=[0.1, 0.2])


def test_a_parameter_with_gaps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="parameter 0 has gaps or overlaps"):
        ops.adagrad_([f32(4)[::2]], [f32(2)], [f32(4)[::2]])
    with pytest.raises(RuntimeError, match="parameter 0 has gaps or overlaps"):
        ops.adagrad_([f32(1).expand(4)], [f32(4)], [f32(1).expand(4)])
    overlapping = f32(9).as_strided((3, 3), (2, 2))  # nine elements within nine, four gaps
    with pytest.raises(RuntimeError, match="parameter 1 has gaps or overlaps"):
        ops.adagrad_([f32(2), overlapping], [f32(2), f32(3, 3)], [f32(2), overlapping])


def test_updates_tell_autograd_of_what_they_wrote(device: torch.device) -> None:
    def tensors() -> list[Tensor]:
        return [torch.ones(3, 2, device=device) for _ in range(3)]

    w, g, v = tensors()
    leaf = torch.nn.Parameter(w)
    ops.adagrad_([leaf], [g], [v])
    assert (leaf._version, g._version, v._version) == (1, 0, 1)
    w, g, _ = tensors()
    v = torch.ones((), dtype=torch.float64, device=device)
    ops.adagrad_norm_([w], [g], v)
    assert (w._version, g._version, v._version) == (1, 0, 1)
    w, g, v = tensors()
    x = torch.ones(4, 2, device=device)
    ops.linear_adagrad_(torch.ones(4, 3, device=device), x, w, v, 4)
    assert (w._version, x._version, v._version) == (1, 0, 1)


@pytest.mark.parametrize("op", [ops.adagrad_, ops.adagrad_norm_])
def test_one_sample_has_no_variance(op: Any, device: torch.device) -> None:
    w, g, v = (torch.ones(3, device=device) for _ in range(3))
    v = v if op is ops.adagrad_ else v[0].double()
    with pytest.raises(ValueError, match="variance of 1 samples"):
        op([w], [g], v if op is ops.adagrad_norm_ else [v], [g], samples=1)
    assert w.eq(1).all()


def test_rates_may_be_numbers_of_any_kind(device: torch.device) -> None:
    found = []
    for lr in (0.5, numpy.float64(0.5), torch.tensor(0.5), [0.5]):
        w, g = torch.ones(3, device=device), torch.ones(3, device=device)
        v = torch.ones((), dtype=torch.float64, device=device)
        ops.adagrad_norm_([w], [g], v, lr=lr)  # type: ignore[arg-type]
        found.append(w)
    assert all(torch.equal(w, found[0]) for w in found)
