"""`recurrent`: one direction of one layer of an LSTM, a GRU or a plain recurrent network.

The weights are those of linear layers at T positions: the gates' inputs are x_t W_ihᵀ and
h_{t−1} W_hhᵀ, and with δ_t, the gradient of these, c_i = Σ_t δ_t x_tᵀ and Σ_t δ_t h_{t−1}ᵀ. So the
forward pass is torch's own; the backward pass forms all gates anew from the outputs, with two
products over all positions, walks back through time for the δ_t, and leaves the weight gradients
to `ops.linear_weight_grad`.

Cost beside plain training: the gates' two products once more, some twenty passes over tensors of
the gates' size, and in the loop back five to eight small operations a position from Python. Forward
and backward pass take 1.0 (plain recurrent) to 2.3 (LSTM) times as long as torch's on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ._call import (
    NO_LISTENER,
    Call,
    as_grad,
    autocast,
    check_probe,
    counted,
    dtypes,
    notify,
    refuse_double_backward,
)
from ._product import product

MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


class _Backward(NamedTuple):
    """What the walk back through time finds, in the memory of the gates' inputs.

    Attributes:
        inputs: δ_t of x_t W_ihᵀ, [T, b, gates].
        states: that of h_{t−1} W_hhᵀ; the same but for a GRU.
        initial: gradients of the initial state, (h_0,) or (h_0, c_0).
        projected: [T, b, P], gradient of the projection's output, and its input m_t [T, b, H]; only
            of an LSTM with a projection.
    """

    inputs: Tensor
    states: Tensor
    initial: tuple[Tensor, ...]
    projected: tuple[Tensor, Tensor] | None = None


def _lstm(
    from_x: Tensor, from_h: Tensor, y: Tensor, state: tuple[Tensor, ...],
    weight: Tensor, projection: Tensor | None, grad_y: Tensor, grad_state: tuple[Tensor, ...],
) -> _Backward:  # fmt: skip
    """i, f, o = σ(…), g = tanh(…); c_t = f c_{t−1} + i g; m_t = o tanh(c_t); h_t = m_t (W_hrᵀ)."""
    delta = from_x.add_(from_h)
    gates = delta.unflatten(-1, (4, -1))
    i, f, g, o = gates.unbind(2)
    gates[:, :, :2].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    steps, b, width = f.shape
    c = f.new_empty(steps + 1, b, width)
    c[0] = state[1]
    added, forgets = i * g, f.clone(memory_format=torch.contiguous_format)
    for t in range(steps):
        torch.addcmul(added[t], forgets[t], c[t], out=c[t + 1])
    tanh_c = c[1:].tanh()
    m = o * tanh_c
    of_c = o.addcmul(m, tanh_c, value=-1)  # from the gradient of m_t to that of c_t
    kept = c[:-1] * f
    torch.addcmul(i, added, g, value=-1, out=g)  # from that of c_t to those of the gates' inputs
    torch.addcmul(added, added, i, value=-1, out=i)
    torch.addcmul(kept, kept, f, value=-1, out=f)
    torch.addcmul(m, m, o, value=-1, out=o)  # and from that of m_t
    grad_h, grad_c = grad_state
    grad_ms = None if projection is None else torch.empty_like(grad_y)
    for t in reversed(range(steps)):
        grad_m = grad_y[t] + grad_h
        if projection is not None and grad_ms is not None:
            grad_ms[t] = grad_m
            grad_m = grad_m @ projection
        grad_c = torch.addcmul(grad_c, grad_m, of_c[t])
        gates[t, :, :3].mul_(grad_c.unsqueeze(1))
        o[t].mul_(grad_m)
        grad_h = delta[t] @ weight
        grad_c = grad_c * forgets[t]
    found = None if grad_ms is None else (grad_ms, m)
    return _Backward(delta, delta, (grad_h, grad_c), found)


def _gru(
    from_x: Tensor, from_h: Tensor, y: Tensor, state: tuple[Tensor, ...],
    weight: Tensor, projection: Tensor | None, grad_y: Tensor, grad_state: tuple[Tensor, ...],
) -> _Backward:  # fmt: skip
    """r, z = σ(…); n = tanh(x part + r · h part); h_t = (1 − z) n + z h_{t−1}."""
    gates = from_h.unflatten(-1, (3, -1))
    r, z, h_n = gates.unbind(2)
    width = h_n.shape[-1]
    r_and_z, n = from_h[..., : 2 * width], from_x[..., 2 * width :]
    r_and_z.add_(from_x[..., : 2 * width]).sigmoid_()
    n.addcmul_(r, h_n).tanh_()
    keeps = z.clone(memory_format=torch.contiguous_format)
    of_z = (torch.cat([state[0].unsqueeze(0), y[:-1]]) - n).mul_(keeps)
    torch.addcmul(of_z, of_z, keeps, value=-1, out=z)  # from the gradient of h_t to the gates'
    torch.mul(1 - keeps, 1 - n * n, out=n)
    of_h_n = n * r
    of_r = of_h_n * h_n
    torch.addcmul(of_r, of_r, r, value=-1, out=r)
    h_n.copy_(of_h_n)
    (grad_h,) = grad_state
    for t in reversed(range(len(keeps))):
        total = grad_y[t] + grad_h
        gates[t].mul_(total.unsqueeze(1))
        n[t].mul_(total)
        grad_h = torch.addcmul(from_h[t] @ weight, total, keeps[t])
    from_x[..., : 2 * width] = r_and_z
    return _Backward(from_x, from_h, (grad_h,))


def _rnn(
    from_x: Tensor, from_h: Tensor, y: Tensor, state: tuple[Tensor, ...],
    weight: Tensor, projection: Tensor | None, grad_y: Tensor, grad_state: tuple[Tensor, ...],
    relu: bool = False,
) -> _Backward:  # fmt: skip
    """h_t = tanh(…) or relu(…)."""
    slopes = (y > 0).to(y.dtype) if relu else 1 - y * y
    (grad_h,) = grad_state
    delta = torch.empty_like(slopes)
    for t in reversed(range(len(y))):
        torch.mul(grad_y[t] + grad_h, slopes[t], out=delta[t])
        grad_h = delta[t] @ weight
    return _Backward(delta, delta, (grad_h,))


def _turned(t: Tensor) -> Tensor:
    """Samples and positions exchanged: a step through time wants its numbers side by side."""
    return t.transpose(0, 1).contiguous()


def _plain(mode: str, x: Tensor, state: Sequence[Tensor], weights: list[Tensor]) -> Any:
    """Torch's own kernel; (y, h_T) or (y, h_T, c_T), the states [1, b, ·]."""
    hx: Any = [s.unsqueeze(0) for s in state]
    # For an LSTM a third or fifth weight is the projection.
    options = (len(weights) > 3, 1, 0.0, False, False, True)
    kernel = getattr(torch, mode.lower())
    hx = hx if mode == "LSTM" else hx[0]
    if not x.is_cuda:
        return kernel(x, hx, weights, *options)
    with warnings.catch_warnings():  # cuDNN's copy of all layers' weights is of no use for one
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        return kernel(x, hx, weights, *options)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode, calls, k, x, h, c, *tensors):
        state = (h,) if c is None else (h, c)
        probe, masters = tensors[0], tensors[1:6]
        weights = masters if _stays(mode, x) else autocast(*masters)
        y, *last = _plain(mode, x, state, [w for w in weights if w is not None])
        ctx.save_for_backward(x, h, c, y, probe, *weights)
        ctx.mode, ctx.calls, ctx.k, ctx.dtypes = mode, calls, k, dtypes(*masters)
        return y, *(s.squeeze(0) for s in last)

    @staticmethod
    def backward(ctx, grad_y, *grad_state):
        refuse_double_backward()
        x, h, c, y, probe, w_ih, w_hh, b_ih, b_hh, w_hr = ctx.saved_tensors
        of_ih, of_hh, of_b_ih, of_b_hh, of_hr = ctx.dtypes
        state = (h,) if c is None else (h, c)
        h_before = torch.cat([h.unsqueeze(1), y[:, :-1]], 1)
        arguments = (
            product(_turned(x), w_ih, b_ih), product(_turned(h_before), w_hh, b_hh), _turned(y),
            state, w_hh, w_hr, _turned(grad_y), grad_state,
        )  # fmt: skip
        if ctx.mode == "LSTM":
            found = _lstm(*arguments)
        elif ctx.mode == "GRU":
            found = _gru(*arguments)
        else:
            found = _rnn(*arguments, relu=ctx.mode == "RNN_RELU")
        need = ctx.needs_input_grad
        inputs = _turned(found.inputs)
        states = inputs if found.states is found.inputs else _turned(found.states)
        parts = [
            (x, inputs, of_ih, of_b_ih, need[7], need[9], need[12] or need[14]),
            (h_before, states, of_hh, of_b_hh, need[8], need[10], need[13] or need[15]),
        ]
        if found.projected is not None:
            grad_out, m = map(_turned, found.projected)
            parts.append((m, grad_out, of_hr, None, need[11], False, need[16]))
        grad_p, grads, sums = torch.zeros_like(probe), [], []
        for call, (a, delta, of_w, of_b, need_w, need_b, coordinates) in zip(
            ctx.calls, parts, strict=False
        ):
            if ctx.k > 1:
                a, delta = (t.unflatten(0, (-1, ctx.k)) for t in (a, delta))
            notify(call, a, delta)
            grad_w, grad_b, part, sums_w, sums_b = ops.linear_weight_grad(
                delta, a, probe.shape[1], need_w, need_b, coordinates
            )
            grad_p += counted(part, probe, call, a, delta)
            grads.append((as_grad(grad_w, of_w, need_w), as_grad(grad_b, of_b, need_b)))
            sums.append((sums_w, sums_b))
        grads += [(None, None)] * (3 - len(grads))
        sums += [(None, None)] * (3 - len(sums))
        (g_ih, g_b_ih), (g_hh, g_b_hh), (g_hr, _) = grads
        (s_ih, s_b_ih), (s_hh, s_b_hh), (s_hr, _) = sums
        squares = (s_ih, s_hh, s_b_ih, s_b_hh, s_hr)
        return (
            None, None, None,
            product(inputs, w_ih.t()) if need[3] else None,
            found.initial[0] if need[4] else None,
            found.initial[1] if need[5] else None,
            grad_p,
            g_ih, g_hh, g_b_ih, g_b_hh, g_hr,
            *(s if n else None for s, n in zip(squares, need[12:], strict=True)),
        )  # fmt: skip


def _stays(mode: str, x: Tensor) -> bool:
    """Whether autocast leaves it alone, as PyTorch does with a GRU on the CPU."""
    return mode == "GRU" and x.device.type == "cpu"


def recurrent(
    mode: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    probe: Tensor,
    weight_probes: Sequence[Tensor | None] = (None,) * 5,
    calls: Sequence[Call] = (NO_LISTENER, Call(0, False), Call(0, False)),
) -> tuple[Tensor, ...]:
    """One direction of one layer of `torch.nn.LSTM`, `GRU` or `RNN` that measures.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU", as `torch.nn.RNNBase.mode`.
        x: input [b, T, I], T ≥ 1; or [b, k, T, I], where k sequences are a sample.
        state: the initial h [b, H], for an LSTM also c [b, H] (and h [b, P] with a projection);
            with k sequences a sample [b, k, ·].
        weights: (W_ih [gates, I], W_hh [gates, H], b_ih, b_hh, W_hr), as torch lays them out; both
            biases may be None, and so is W_hr [P, H] without a projection.
        probe: see the package.
        weight_probes: for each of the weights one whose gradient becomes Σ_i c_i², or None.
        calls: of the products with W_ih, W_hh and W_hr; one of them counts the samples.

    Returns:
        y [b, T, H] and the last state; with k sequences a sample [b, k, …].

    Raises:
        ValueError: an input that is not [b, T, I], or more samples than the probe has columns.

    Example:
        >>> x, h = torch.tensor([[[1.]], [[2.]]]), torch.zeros(2, 1)
        >>> w = [torch.ones(1, 1).requires_grad_() for _ in range(2)]
        >>> probe = torch.zeros(2, 2).requires_grad_()
        >>> recurrent("RNN_RELU", x, [h], [*w, None, None, None], probe)[0].sum().backward()
        >>> probe.grad[0].tolist()
        [1.0, 4.0]
    """
    if mode not in MODES:
        raise ValueError(f"recurrent: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if x.dim() not in (3, 4) or not x.shape[-2]:
        raise ValueError(
            f"recurrent: expected an input [samples, positions, features], got {list(x.shape)}"
        )
    check_probe(x.shape[0], probe, "recurrent")
    h, c = state[0], state[1] if len(state) > 1 else None
    x, h, c = (x, h, c) if _stays(mode, x) else autocast(x, h, c)
    lead = x.shape[:-2]
    if len(lead) == 2:
        x, h = x.flatten(0, 1), h.flatten(0, 1)
        c = None if c is None else c.flatten(0, 1)
    k = lead[1:].numel()
    found: Any = _Recurrent.apply(mode, tuple(calls), k, x, h, c, probe, *weights, *weight_probes)
    return found if len(lead) == 1 else tuple(t.unflatten(0, lead) for t in found)
