"""Any module, observed by computing each sample's gradient: exact, slow, [b, P] of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from .. import functional
from ..functional._call import check_probe, counted, notify, refuse_double_backward
from .base import ObservedLayer


class ObservedFallback(ObservedLayer, nn.Module):
    """A module with everything in it as one unit; its samples must not influence each other.

    Positional arguments are tensors with one row a sample; keyword arguments are shared by all
    samples and get no gradient. The output is a tensor, or a tuple of tensors, with one row a
    sample. The module runs once as it is, and its gradient once for each sample, by
    `torch.func.vmap`. So it must not draw random numbers (dropout).
    """

    observed_method = "vmap, one gradient a sample"
    _inside = False

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters in the module that require grad."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def measures(self) -> bool:
        """See `ObservedLayer`."""
        return torch.is_grad_enabled() and not self._inside and bool(self.trainable())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's forward."""
        if not self.measures():
            return self.plain_class.forward(self, *args, **kwargs)
        self._check(args, kwargs)
        if self.shared_values is not None:
            self.shared_values.check_met(list(args), f"layer {self.observed_name!r} takes it")
        samples, _ = self.rows_of_samples(args[0].shape[0])
        probe, call = self.probe_and_call(self.by_samples(args[0]), self._call)
        check_probe(samples, probe, self.observed_name)
        params = self.trainable()
        of = self.coordinate_probes()
        probes = [of.get(name) for name in params]
        outputs = _Fallback.apply(
            self, kwargs, samples, len(args), call, probe, *args, *params.values(), *probes
        )
        return outputs[0] if self._single else outputs

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = f"layer {self.observed_name!r} ({self.plain_class.__name__}, measured by vmap)"
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name} cannot be compiled; run it without torch.compile")
        if not args or not all(isinstance(a, Tensor) and a.dim() for a in args):
            raise ValueError(f"{name}: positional arguments must be tensors with a row a sample")
        if len({a.shape[0] for a in args}) > 1:
            shapes = ", ".join(str(list(a.shape)) for a in args)
            raise ValueError(
                f"{name}: positional arguments of shapes {shapes} have different numbers of rows; "
                "what all samples share goes in by keyword"
            )
        shared = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.requires_grad]
        if shared:
            raise ValueError(f"{name}: keyword argument {shared[0]!r} would lose its gradient")

    def check_buffers(self, before: Mapping[str, tuple[Tensor, int]]) -> None:
        """That none of these buffers has been written to since it had this version.

        Raises:
            RuntimeError: otherwise: the forward pass would compute something else the next time.
        """
        for name, (buffer, version) in before.items():
            if buffer._version != version or self.get_buffer(name) is not buffer:
                raise RuntimeError(
                    f"layer {self.observed_name!r} ({self.plain_class.__name__}, measured by vmap) "
                    f"changes its buffer {name!r} in the forward pass, as batch_norm and "
                    "spectral_norm do in training mode: what runs once more for each sample would "
                    "compute something else. Put the module into eval mode, or replace it"
                )

    def check_outputs(self, outputs: tuple[Any, ...], samples: int) -> None:
        """That each output has a row a sample.

        Raises:
            ValueError: otherwise.
        """
        for output in outputs:
            if isinstance(output, Tensor) and output.shape[:1] == (samples,):
                continue
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"layer {self.observed_name!r} ({self.plain_class.__name__}, measured by vmap): "
                f"the output must be a tensor, or a tuple of tensors, with a row for each of the "
                f"{samples} samples, got {got}"
            )

    def run(self, params: dict[str, Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """The plain forward with other parameters; outputs as a tuple."""
        self._inside = True
        try:
            output = functional_call(self, params, tuple(args), kwargs)
        finally:
            self._inside = False
        self._single = isinstance(output, Tensor)
        return (output,) if self._single else tuple(output)

    def per_sample(
        self,
        params: dict[str, Tensor],
        kwargs: dict[str, Any],
        args: tuple[Tensor, ...],
        grads_out: tuple[Tensor, ...],
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """(c_i of each parameter, gradient of each argument), both with a row a sample."""
        floating = [k for k, a in enumerate(args) if a.is_floating_point()]

        def one(row: tuple[Tensor, ...], grad: tuple[Tensor, ...]) -> Any:
            def outputs(p: dict[str, Tensor], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                full = list(row)
                for k, x in zip(floating, xs, strict=True):
                    full[k] = x
                if self.observed_folded:  # [k, …]
                    return self.run(p, full, kwargs)
                found = self.run(p, (a.unsqueeze(0) for a in full), kwargs)
                return tuple(y.squeeze(0) for y in found)

            pull = vjp(outputs, params, tuple(row[k] for k in floating))[1]
            return pull(grad)

        try:
            return vmap(one)(args, grads_out)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise RuntimeError(
                    f"layer {self.observed_name!r} ({self.plain_class.__name__}, measured by vmap) "
                    f"cannot run for single samples ({error}): give the parameters that are not "
                    "supported a module of their own"
                ) from error
            raise RuntimeError(
                f"layer {self.observed_name!r} ({self.plain_class.__name__}, measured by vmap) "
                "draws random numbers, which would be others than in its forward pass: take "
                "dropout out of it, or give the parameters that are not supported a module of "
                "their own"
            ) from error

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        arity, kwargs = cast(Any, call.context)
        args, grads_out = saved[:arity], saved[arity:]
        params = {name: p.detach() for name, p in self.trainable().items()}
        grads, _ = self.per_sample(params, kwargs, args, grads_out)
        return {name: grads[name] for name in names}

    def contract(
        self, call: functional.Call, saved: tuple[Tensor, ...], params: Mapping[str, Tensor]
    ) -> Tensor:
        """See `ObservedLayer`."""
        grads = self.sample_grads(call, saved, list(params))
        products = [(grads[n] * p).reshape(len(grads[n]), -1).sum(1) for n, p in params.items()]
        return torch.stack(products).sum(0)


class _Fallback(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, kwargs, samples, arity, call, probe, *tensors):
        params = layer.trainable()
        args = tensors[:arity]
        ctx.layer, ctx.kwargs, ctx.arity, ctx.call = layer, kwargs, arity, call
        ctx.samples = samples
        ctx.names = list(params)
        ctx.save_for_backward(probe, *tensors[: arity + len(params)])
        buffers = {n: (b, b._version) for n, b in layer.named_buffers() if b.is_floating_point()}
        outputs = layer.run(params, args, kwargs)
        layer.check_buffers(buffers)
        layer.check_outputs(outputs, args[0].shape[0])
        return outputs

    @staticmethod
    def backward(ctx, *grads_out):
        refuse_double_backward()
        layer, samples = cast(Any, ctx.layer), ctx.samples
        probe, *tensors = ctx.saved_tensors
        args, values = tuple(tensors[: ctx.arity]), tensors[ctx.arity :]
        if layer.observed_folded:
            args, grads_out = (
                tuple(t.unflatten(0, (samples, -1)) for t in of) for of in (args, grads_out)
            )
        params = {n: v.detach() for n, v in zip(ctx.names, values, strict=True)}
        notify(ctx.call._replace(context=(ctx.arity, ctx.kwargs)), *args, *grads_out)
        grads, grads_in = layer.per_sample(params, ctx.kwargs, args, grads_out)
        norms = sum(g.reshape(samples, -1).square().sum(1) for g in grads.values())
        grad_p = torch.zeros_like(probe)
        grad_p[0, :samples], grad_p[1, :samples] = norms, 1
        sums = (
            [grads[n].square().sum(0) for n in ctx.names]
            if layer._observer.coordinates
            else [None] * len(ctx.names)
        )
        of_args = iter(grads_in)
        return (
            None, None, None, None, None, counted(grad_p, probe, ctx.call, *args, *grads_out),
            *(layer.as_rows(next(of_args)) if a.is_floating_point() else None for a in args),
            *(grads[n].sum(0) for n in ctx.names),
            *sums,
        )  # fmt: skip


def fallback_class(plain: type[nn.Module]) -> type[ObservedFallback]:
    """The observed class of any module class."""
    return type(f"Observed{plain.__name__}", (ObservedFallback, plain), {})


__all__ = ["ObservedFallback", "fallback_class", "functional"]
