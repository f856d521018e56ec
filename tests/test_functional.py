"""`adagrad_kernels.functional`: the values of torch's functions, the probe's gradient, errors."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_truth
from torch import Tensor

import adagrad_kernels.functional as af
from adagrad_kernels.functional import _product


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor, Tensor, Tensor | None]


def cases() -> dict[str, Case]:
    """Name: (ours(x, w, b, *probes), torch's(x, w, b), x, weight, bias)."""
    torch.manual_seed(2)
    tokens = torch.tensor([[0, 3, 0], [2, 2, 2], [1, 0, 4]])
    pair = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    back = {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "groups": 2}

    def norm(ours: Callable, *options: Any) -> Callable:
        return lambda x, w, b, *probes: ours(x, *options, w, b, 1e-5, *probes)

    h, c, w_x, b_x = randn(3, 2), randn(3, 4), randn(16, 5), randn(16)

    def gru(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        weights, one = [w_x[:12], w, b_x[:12], b], c.unsqueeze(0)
        return torch.gru(x, one, weights, True, 1, 0.0, True, False, True)[0]

    def lstm(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        states = [h.unsqueeze(0), c.unsqueeze(0)]
        weights = [w_x, w_x[:, :2], w]
        return torch.lstm(x, states, weights, False, 1, 0.0, True, False, True)[0]

    return {
        "gru": (
            lambda x, w, b, probe, *of: af.recurrent(
                "GRU", x, [c], [w_x[:12], w, b_x[:12], b, None], probe,
                [None, of[0], None, of[1], None],
            )[0],
            gru, randn(3, 6, 5), randn(12, 4), randn(12),
        ),
        "lstm, projection": (
            lambda x, w, b, probe, *of: af.recurrent(
                "LSTM", x, [h, c], [w_x, w_x[:, :2].contiguous(), None, None, w], probe,
                [None, None, None, None, of[0]],
            )[0],
            lstm, randn(3, 6, 5), randn(2, 4), None,
        ),
        "linear": (af.linear, F.linear, randn(3, 2, 4), randn(5, 4), randn(5)),
        "linear without bias": (af.linear, F.linear, randn(3, 4), randn(5, 4), None),
        "conv": (
            lambda *a: af.conv(*a, **pair), lambda *a: F.conv2d(*a, **pair),
            randn(3, 2, 5, 6), randn(4, 2, 3, 2), randn(4),
        ),
        "conv_transpose": (
            lambda *a: af.conv_transpose(*a, **back), lambda *a: F.conv_transpose2d(*a, **back),
            randn(3, 4, 3, 3), randn(4, 2, 3, 2), randn(4),
        ),
        "embedding": (
            lambda x, w, b, probe, weight_probe, _: af.embedding(x, w, 2, probe, weight_probe),
            lambda x, w, b: F.embedding(x, w, padding_idx=2), tokens, randn(5, 4), None,
        ),
        "layer_norm": (
            norm(af.layer_norm, (2, 4)), lambda x, w, b: F.layer_norm(x, (2, 4), w, b),
            randn(3, 5, 2, 4), randn(2, 4), randn(2, 4),
        ),
        "group_norm": (
            norm(af.group_norm, 2), lambda x, w, b: F.group_norm(x, 2, w, b),
            randn(3, 4, 5), randn(4), randn(4),
        ),
        "rms_norm": (
            lambda x, w, b, probe, of, _: af.rms_norm(x, (2, 4), w, None, probe, of),
            lambda x, w, b: F.rms_norm(x, (2, 4), w), randn(3, 5, 2, 4), randn(2, 4), None,
        ),
        "group_norm, channels last": (
            norm(af.group_norm, 2), # torch 2.13 crashes on channels last where x needs no gradient
            lambda x, w, b: F.group_norm(x.contiguous(), 2, w, b),
            randn(3, 4, 5, 2).to(memory_format=torch.channels_last), randn(4), randn(4),
        ),
        "batch_norm": (
            lambda x, w, b, *probes: af.batch_norm(
                x, None, None, w, b, True, 0.1, 1e-5, *probes
            ),
            lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
            randn(3, 4, 5), randn(4), randn(4),
        ),
        "scale": (
            lambda x, w, b, *probes: af.scale(x, w, b, 1, *probes),
            lambda x, w, b: x * w[:, None] + b[:, None], randn(3, 4, 5), randn(4), randn(4),
        ),
        "expand": (
            lambda x, w, b, probe, of, _: x * af.expand(w, 3, probe, of).unsqueeze(1),
            lambda x, w, b: x * w, randn(3, 4, 5), randn(5), None,
        ),
        "expand, scalar": (
            lambda x, w, b, probe, of, _: x * af.expand(w, 3, probe, of)[:, None],
            lambda x, w, b: x * w, randn(3, 4), randn(1).squeeze(), None,
        ),
    }  # fmt: skip


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_probes(name: str) -> None:
    ours, torchs, x, weight, bias = CASES[name]
    floating = x.is_floating_point()
    x_1, x_2 = (leaf(x), leaf(x)) if floating else (x, x)
    w_1, w_2 = leaf(weight), leaf(weight)
    b_1, b_2 = (None, None) if bias is None else (leaf(bias), leaf(bias))
    probe = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    weight_probe = torch.zeros_like(weight).requires_grad_()
    bias_probe = None if bias is None else torch.zeros_like(bias).requires_grad_()
    out_1 = ours(x_1, w_1, b_1, probe, weight_probe, bias_probe)
    out_2 = torchs(x_2, w_2, b_2)
    torch.testing.assert_close(out_1, out_2, rtol=1e-12, atol=1e-12)
    grad_out = torch.randn_like(out_2)
    samples = []
    for i in range(3):  # c_i: what sample i alone adds
        only = torch.zeros_like(grad_out)
        only[i] = grad_out[i]
        params = [p for p in (w_2, b_2) if p is not None]
        samples.append(torch.autograd.grad(out_2, params, only, retain_graph=True))
    out_1.backward(grad_out)
    out_2.backward(grad_out)
    same = {"x": (x_1, x_2), "weight": (w_1, w_2), "bias": (b_1, b_2)}
    for what, (one, other) in same.items():
        if one is not None and one.is_floating_point():
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12, msg=what)
    norms = torch.stack([sum(g.square().sum() for g in grads) for grads in samples])
    assert probe.grad is not None
    torch.testing.assert_close(probe.grad[0, :3], norms, rtol=1e-10, atol=0)
    assert probe.grad[1].tolist() == [1, 1, 1, 0, 0]
    assert not probe.grad[0, 3:].any()
    for k, coordinate_probe in enumerate((weight_probe, bias_probe)):
        if coordinate_probe is not None:
            sums = torch.stack([grads[k] for grads in samples]).square().sum(0)
            torch.testing.assert_close(coordinate_probe.grad, sums, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_asked_for(name: str) -> None:
    """A frozen weight or bias, no coordinate probes, an input without gradient."""
    ours, _, x, weight, bias = CASES[name]
    for frozen in ("weight", "bias") if bias is not None else ():
        w, b = leaf(weight), leaf(bias)
        (w if frozen == "weight" else b).requires_grad_(False)
        probe = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        out = ours(x, w, b, probe, None, None)
        out.backward(torch.ones_like(out))
        kept = b if frozen == "weight" else w
        assert kept.grad is not None
        assert (w if frozen == "weight" else b).grad is None
        assert probe.grad is not None
        assert (probe.grad[0] > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_a_probe_too_small(name: str) -> None:
    ours, _, x, weight, bias = CASES[name]
    probe = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"3 samples needs a probe of that many columns.*\[2, 2\]"):
        ours(x, leaf(weight), bias, probe, None, None)
    with pytest.raises(ValueError, match=r"\[2, capacity\]"):
        ours(x, leaf(weight), bias, probe[0], None, None)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("gru", "lstm, projection")]
)
def test_outputs_may_be_written_to(name: str) -> None:
    """`x = layer(x); x += residual` is everyday code."""
    ours, torchs, x, weight, bias = CASES[name]
    w_1, w_2, probe = leaf(weight), leaf(weight), leaf(torch.zeros(2, 3).double())
    out_1, out_2 = ours(x, w_1, bias, probe, None, None), torchs(x, w_2, bias)
    out_1 += 1
    out_1.square().sum().backward()
    (out_2 + 1).square().sum().backward()
    torch.testing.assert_close(w_1.grad, w_2.grad, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_probe_is_summed_over_calls() -> None:
    x, w, probe = randn(3, 4), leaf(randn(4, 4)), leaf(torch.zeros(2, 3).double())
    af.linear(af.linear(x, w, None, probe), w, None, probe).sum().backward()
    assert probe.grad is not None
    assert probe.grad[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name: str) -> None:
    ours, _, x, weight, bias = CASES[name]
    w, probe = leaf(weight), leaf(torch.zeros(2, 3).double())
    out = ours(x, w, bias, probe, None, None).square().sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out, w, create_graph=True)


def test_group_norm_keeps_channels_last() -> None:
    x, w = CASES["group_norm, channels last"][2], leaf(randn(4))
    probe, x = leaf(torch.zeros(2, 3).double()), x.requires_grad_()
    out = af.group_norm(x, 2, w, None, 1e-5, probe)
    (grad_x,) = torch.autograd.grad(out.square().sum(), x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert grad_x.is_contiguous(memory_format=torch.channels_last)


def test_listeners_are_told_and_not_kept_alive() -> None:
    class Listener:
        def __init__(self) -> None:
            self.told: list[tuple[int, ...]] = []

        def on_backward(
            self, call: af.Call, saved: tuple[Tensor, ...], sample_grads: object
        ) -> None:
            self.told.append(tuple(t.shape[0] for t in saved))

    listener = Listener()
    call = af.Call(af.listen(listener))
    x, w, probe = randn(3, 4), leaf(randn(4, 4)), leaf(torch.zeros(2, 3).double())
    out = af.linear(x, w, None, probe, call=call)
    assert listener.told == []
    out.sum().backward()
    assert listener.told == [(3, 3)]
    later = af.linear(x, w, None, probe, call=call)
    del listener
    later.sum().backward()  # nobody listens any more


def test_embedding_does_not_guess_what_one_dimension_means() -> None:
    probe = leaf(torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"do not distinguish samples from positions.*unsqueeze\(1\)"
    ):
        af.embedding(torch.tensor([0, 1]), leaf(torch.ones(3, 2)), None, probe)


def test_recurrent_takes_sequences_and_known_modes() -> None:
    probe, h, weights = leaf(torch.zeros(2, 3)), [torch.zeros(3, 2)], [torch.ones(2, 2)] * 2
    for x in (torch.ones(3, 2), torch.ones(3, 0, 2)):
        with pytest.raises(ValueError, match=r"expected an input \[samples, positions, features\]"):
            af.recurrent("RNN_TANH", x, h, [*weights, None, None, None], probe)
    with pytest.raises(ValueError, match="mode must be one of LSTM, GRU, RNN_TANH, RNN_RELU"):
        af.recurrent("tanh", torch.ones(3, 1, 2), h, [*weights, None, None, None], probe)


def test_inputs_without_samples() -> None:
    probe = leaf(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no sample dimension"):
        af.linear(torch.ones(2), leaf(torch.ones(3, 2)), None, probe)
    with pytest.raises(ValueError, match="2 spatial dimensions"):
        af.conv(torch.ones(2, 3, 3), leaf(torch.ones(3, 2, 1, 1)), None, probe)
    with pytest.raises(ValueError, match="no sample dimension"):
        af.layer_norm(torch.ones(4), (4,), leaf(torch.ones(4)), None, 1e-5, probe)
    with pytest.raises(ValueError, match="no sample dimension"):
        af.rms_norm(torch.ones(4), (4,), leaf(torch.ones(4)), 1e-5, probe)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_inputs_without_channels(shape: tuple[int, ...]) -> None:
    x, w, probe = torch.ones(shape), leaf(torch.ones(4)), leaf(torch.zeros(2, 4))
    expected = re.escape(f"expected an input [samples, channels, …], got shape {list(shape)}")
    with pytest.raises(ValueError, match=f"batch_norm: {expected}"):
        af.batch_norm(x, None, None, w, None, True, 0.1, 1e-5, probe)
    with pytest.raises(ValueError, match=f"group_norm: {expected}"):
        af.group_norm(x, 2, w, None, 1e-5, probe)


PRODUCTS = [(70, 90, 100), (16, 24, 130, 40), (3, 5, 40, 90, 60)]  # [..., I] and O


@pytest.mark.parametrize("shape", PRODUCTS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_by_onednn(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], turned: bool, bias: bool
) -> None:
    *outer, outputs = shape
    x = torch.randn(*outer)
    x = x.transpose(0, -2) if turned else x
    weight = torch.randn(x.shape[-1], outputs).t() if turned else torch.randn(outputs, x.shape[-1])
    b = torch.randn(outputs) if bias else None
    called = []
    plain = _product._onednn

    def counting(*arguments: Any) -> Tensor:
        called.append(arguments[0].shape)
        return plain(*arguments)

    monkeypatch.setattr(_product, "_onednn", counting)
    found = _product.product(x, weight, b)
    assert called == [x.shape]
    truth = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_close_to_truth(found, truth, F.linear(x, weight, b))


@pytest.mark.parametrize(
    ("rows", "dtype"), [(4, torch.float32), (400, torch.float64), (400, torch.bfloat16)]
)
def test_products_that_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(_product, "_onednn", lambda *_: pytest.fail("called"))
    x, weight = torch.randn(rows, 60, dtype=dtype), torch.randn(50, 60, dtype=dtype)
    assert torch.equal(_product.product(x, weight), F.linear(x, weight))


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # what flags() sets, too
def test_products_where_onednn_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_product, "_onednn", lambda *_: pytest.fail("called"))
    x, weight = torch.randn(400, 60), torch.randn(50, 60)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(_product.product(x, weight), F.linear(x, weight))
