"""Functions that take a module's parameters and are measured by the kernels of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .base import ObservedLayer
from .contributions import Form
from .embedding import embedding_response, measure_tokens
from .linear import linear_response
from .normalisation import affine_response
from .shared_sources import Own, UnmeasuredUse, matrix_of
from .shared_values import SharedValues

_RMS_NORMS = {F.rms_norm, torch.rms_norm}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm}

_MOST = 32  # parameters, of which pairs are made


class Use(NamedTuple):
    """A way of using parameters that is measured by a call of its own.

    Attributes:
        kind: the function of `functional` that measures it.
        weight: the parameter's name in the module.
        bias: likewise, "" if there is none.
        transposed: of a matrix, whether it is [I, O].
    """

    kind: str
    weight: str
    bias: str = ""
    transposed: bool = False


def uses_of(names: Sequence[str]) -> list[Use]:
    """All that there can be of these parameters; of very many, without a bias."""
    found = []
    for name in names:
        found += [Use("expand", name), Use("embedding", name)]
        others = [other for other in names if other != name] if len(names) <= _MOST else []
        for bias in ("", *others):
            found += [Use("linear", name, bias, turned) for turned in (False, True)]
            found.append(Use("normalisation", name, bias))
    return found


class Paddings:
    """The row without gradient of each embedding, or -1, as an attribute of its number.

    A compiled forward pass sets attributes without looking at them; of a dictionary it would have a
    guard, and so another graph for the second call.
    """


class MeasuredFunctions(ObservedLayer):
    """What `ObservedModule` knows of functions: how to measure them, and their outputs again."""

    _uses: dict[int, Use]  # by the call's key
    _paddings: Paddings

    def _start(self, own: Own, use: Use, x: Tensor) -> tuple[Any, ...]:
        """(probe, coordinate probe, call) of a use of this parameter, with x [b, …]."""
        probe, call = self.probe_and_call(x, self._calls[use])
        call = call._replace(counts=not own.call.counted)
        own.call.counted = True
        return probe, self._coordinate_probes.get(own.name), call

    # Functions whose kernels measure. Each returns None where it is used in another way.

    def measure_function(
        self,
        values: SharedValues,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The result of a function of samples and own parameters, measured; None for others."""
        if function is F.linear:
            return self._linear(values, *args, **kwargs)
        if function in _PRODUCTS and len(args) == 2:
            return self._linear(values, *args, transposed=True)
        if function is F.layer_norm:
            return self._layer_norm(values, *args, **kwargs)
        if function in _RMS_NORMS:
            return self._rms_norm(values, *args, **kwargs)
        return None

    def _linear(
        self,
        values: SharedValues,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        transposed: bool = False,
    ) -> Tensor | None:
        if values.source(input) is not None or input.dim() < 2:
            return None
        if values.source(weight) is None:
            if weight.requires_grad:  # of a layer that is not called
                return None
            y = torch.matmul(input, weight) if transposed else F.linear(input, weight)
            return y if bias is None else values.apply(torch.add, y, bias)
        matrix = self._own_matrix(values, weight)
        if matrix is None or weight.dim() != 2 or not matrix[0].take():
            return None
        own, turned = matrix
        shift = None if bias is None else self._own_matrix(values, bias)
        if shift is not None and Use("linear", own.name, shift[0].name) not in self._calls:
            shift = None
        if bias is not None and (shift is None or not shift[0].take()):
            y = self._linear_of(input, weight, None, own, None, turned, transposed)
            return values.apply(torch.add, y, bias)
        by = None if shift is None else shift[0]
        return self._linear_of(input, weight, bias, own, by, turned, transposed)

    def _own_matrix(self, values: SharedValues, value: Tensor) -> tuple[Own, bool] | None:
        found = matrix_of(values.source(value))
        return found if found is not None and found[0].owner is self else None

    def _linear_of(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Own,
        shift: Own | None,
        turned: bool,
        transposed: bool,
    ) -> Tensor:
        """x Wᵀ + bias, or x W + bias, of parameters that may be held transposed."""
        turned = turned != transposed
        of, name = self._coordinate_probes, "" if shift is None else shift.name
        use = Use("linear", own.name, name, turned)
        x = self.by_samples(input)
        probe, weight_probe, call = self._start(own, use, x)
        weight = weight.t() if transposed else weight
        if weight_probe is not None and turned:
            weight_probe = weight_probe.t()
        return self.as_rows(
            functional.linear(x, weight, bias, probe, weight_probe, of.get(name), call)
        )

    def _layer_norm(
        self,
        values: SharedValues,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        own = self._scale_and_shift(values, input, normalized_shape, weight, bias)
        if own is None:  # as of 1 + weight
            y = F.layer_norm(input, normalized_shape, None, None, eps)
            y = y if weight is None else values.apply(torch.mul, y, weight)
            return y if bias is None else values.apply(torch.add, y, bias)
        use = Use("normalisation", own[0].name, own[1])
        x = self.by_samples(input)
        probe, weight_probe, call = self._start(own[0], use, x)
        bias_probe = self._coordinate_probes.get(own[1])
        y = functional.layer_norm(
            x, normalized_shape, cast(Tensor, weight), bias, eps,
            probe, weight_probe, bias_probe, call,
        )  # fmt: skip
        return self.as_rows(y)

    def _rms_norm(
        self,
        values: SharedValues,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor,
        eps: float | None = None,
    ) -> Any:
        own = self._scale_and_shift(values, input, normalized_shape, weight, None)
        if own is None:
            y = F.rms_norm(input, normalized_shape, None, eps)
            return values.apply(torch.mul, y, weight)
        use = Use("normalisation", own[0].name)
        x = self.by_samples(input)
        probe, weight_probe, call = self._start(own[0], use, x)
        return self.as_rows(
            functional.rms_norm(x, normalized_shape, weight, eps, probe, weight_probe, call)
        )

    def _scale_and_shift(
        self,
        values: SharedValues,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Own, str] | None:
        """Own scale, and name of the shift, that a normalisation's kernel can measure, or None."""
        values.check_met([input], "it is normalised")
        scale, shift = values.source(weight), values.source(bias)
        if input.dim() <= len(normalized_shape):
            return None
        if not isinstance(scale, Own) or not (bias is None or isinstance(shift, Own)):
            return None
        if scale.owner is not self or (isinstance(shift, Own) and shift.owner is not self):
            return None
        name = shift.name if isinstance(shift, Own) else ""
        if Use("normalisation", scale.name, name) not in self._calls:
            return None
        if not scale.take() or (isinstance(shift, Own) and not shift.take()):
            return None
        return scale, name

    def measure_embedding(
        self,
        values: SharedValues,
        function: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        """The result of an embedding with an own parameter, measured, or None."""
        own = values.source(weight)
        if max_norm is not None or scale_grad_by_freq or sparse or not isinstance(own, Own):
            return None
        if not own.take():
            return None
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        row = f"row{self.observed_parameters.index(own.name)}"
        if not torch.compiler.is_compiling() and getattr(self._paddings, row, padding) != padding:
            raise UnmeasuredUse("F.embedding is called with another padding_idx than before", self)
        setattr(self._paddings, row, padding)

        def measure(tokens: Tensor) -> Tensor:
            tokens = self.by_samples(tokens)
            probe, weight_probe, call = self._start(own, Use("embedding", own.name), tokens)
            return self.as_rows(
                functional.embedding(tokens, weight, padding_idx, probe, weight_probe, call)
            )

        return measure_tokens(self, input, lambda: function(input, weight, padding_idx), measure)

    # After the backward pass.

    def takes(self, call: functional.Call, name: str) -> bool:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        return name in (use.weight, use.bias)

    def used_again(self, calls: Counter[int]) -> bool:
        """See `ObservedLayer`."""
        found = Counter[str]()
        for key in self._uses.keys() & calls.keys():
            for name in filter(None, (self._uses[key].weight, self._uses[key].bias)):
                found[name] += calls[key]
        return any(number > 1 for number in found.values())

    def form(self, call: functional.Call, name: str, saved: tuple[Tensor, ...]) -> Form:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        if use.weight != name or use.kind not in ("linear", "embedding"):
            return Form()
        if use.kind == "embedding":
            return Form("embedding", padding=self._padding_of(use))
        return Form("transposed" if use.transposed else "linear")

    def _padding_of(self, use: Use) -> int:
        return getattr(self._paddings, f"row{self.observed_parameters.index(use.weight)}")

    def respond(
        self, call: functional.Call, operands: tuple[Tensor, ...], params: Mapping[str, Any]
    ) -> Tensor:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        weight, bias = params.get(use.weight), params.get(use.bias)
        if use.kind == "linear":
            weight = weight.t() if weight is not None and use.transposed else weight
            return linear_response(operands[0], weight, bias)
        if use.kind == "embedding":
            return embedding_response(operands[0], params[use.weight], self._padding_of(use))
        return affine_response(operands, weight, bias)

    def contract(
        self, call: functional.Call, saved: tuple[Tensor, ...], params: Mapping[str, Tensor]
    ) -> Tensor:
        """See `ObservedLayer`."""
        use = self._uses[call.key]
        used = {name: p for name, p in params.items() if name in (use.weight, use.bias)}
        dtype = next(iter(params.values())).dtype
        if not used:
            return saved[-1].new_zeros(saved[-1].shape[0], dtype=dtype)
        if use.kind != "expand":
            return super().contract(call, saved, used)
        grads = saved[-1].reshape(saved[-1].shape[0], -1)
        return grads.to(dtype) @ used[use.weight].reshape(-1)

    def sample_grads(
        self, call: functional.Call, saved: tuple[Tensor, ...], names: list[str]
    ) -> dict[str, Tensor]:
        """See `ObservedLayer`."""
        use, (grad, own) = self._uses[call.key], (saved[-1], self.trainable())
        found = {n: grad.new_zeros(grad.shape[0], *own[n].shape) for n in names}
        used = [n for n in names if n in (use.weight, use.bias)]
        if use.kind == "expand":
            return found | dict.fromkeys(used, grad)
        return found | (super().sample_grads(call, saved, used) if used else {})
