"""Values that all samples share, and where they meet the samples.

A module's own parameters, what is computed from them alone, and embeddings of positions have no
dimension that counts the samples. What a sample adds to their gradient is lost where autograd sums
over what broadcasting has repeated. So while the forward pass of such a module runs, its functions
are watched: at the first one that takes a shared value together with samples, the value is
repeated for each sample by a call that measures (`functional.expand`; for positions
`functional.embedding`), and the function gets that instead. What was computed from a parameter
before (`1 + weight.float()`) is computed again from its repetition, by `torch.func.vmap`.

The forward pass computes the same numbers, and runs once. `torch.compile(fullgraph=True)` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .shared_sources import Computed, Source, UnmeasuredUse

_OPERATORS = ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod")
_ELEMENTWISE = (
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow",
    "float_power", "where", "lerp", "addcmul", "addcdiv", "maximum", "minimum", "fmax", "fmin",
    "atan2", "hypot", "xlogy", "logaddexp",
)  # fmt: skip
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "isclose")


def _named(*names: str) -> set[Any]:
    owners = (torch, torch.Tensor)
    return {f for owner in owners for name in names if (f := getattr(owner, name, None))}


_BROADCASTING = (
    _named(*_ELEMENTWISE, *(f"{name}_" for name in _ELEMENTWISE))
    | _named(*(f"__{kind}{name}__" for name in _OPERATORS for kind in ("", "r", "i")))
    | {F.scaled_dot_product_attention, Tensor.expand_as}
)
"""Functions in which a shared value is repeated along dimension 0 of the samples, as by itself."""

_WRITING = _named(
    *(f"{name}_" for name in (*_ELEMENTWISE, "clamp", "copy", "fill", "zero")),
    *(f"__i{name}__" for name in _OPERATORS),
)
_JOINING = {torch.cat, torch.concat, torch.concatenate}
_EXPANDING = {Tensor.expand, Tensor.broadcast_to, torch.broadcast_to}
_REPEATING = {Tensor.repeat, Tensor.tile, torch.tile}
_COMPARING = _named(*_COMPARISONS, *(f"__{name}__" for name in _COMPARISONS))
_LIKE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
"""With a shared value as another argument than the first they look at its shape or type alone."""


class Owner(Protocol):
    """The module whose forward pass is watched."""

    def measure_function(
        self,
        values: SharedValues,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The result of a function of samples and parameters whose kernel measures, or None."""
        ...

    def measure_embedding(
        self, values: SharedValues, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The result of an embedding with a parameter, measured; or None."""
        ...


class SharedValues(TorchFunctionMode):
    """Watches the functions that a module's forward pass calls.

    Args:
        owner: the module.
        samples: how many it was given; None if it does not take any.
        constants: tensors that are no samples, whatever their shape.

    Attributes:
        counted: whether one of its calls has counted the samples.
    """

    def __init__(
        self, owner: Owner, samples: int | None, constants: Sequence[Tensor | None] = ()
    ) -> None:
        super().__init__()
        self.owner, self.samples, self._constants = owner, samples, constants
        self.counted = False
        self._compiling = torch.compiler.is_compiling()
        self._entered = False
        self._values: list[Tensor] = []  # few: a search among them compiles, a dictionary does not
        self._sources: list[Source] = []
        self._ids: set[int] = set()  # of the values; of a compiled forward pass empty

    def add(self, value: Tensor, source: Source) -> Tensor:
        """Counts it among the shared values; returns it."""
        self._values.append(value)
        self._sources.append(source)
        if not self._compiling:
            self._ids.add(id(value))
        return value

    def begin(self) -> None:
        """Starts to watch, if it does not yet (in eager mode; what is compiled uses `with`)."""
        if not self._entered and not self._compiling:
            self._entered = True
            self.__enter__()

    def end(self) -> None:
        """Ends what `begin` has started."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)

    def clear(self) -> None:
        """The forward pass is over, in whatever way. Forgets the values, which refer to this."""
        self.end()
        self._values, self._sources, self._ids = [], [], set()

    def hand_over(self, outputs: list[Any], outer: SharedValues | None) -> None:
        """Has the module around this one watch the shared values among the outputs.

        Raises:
            UnmeasuredUse: if there is none.
        """
        for out in outputs:
            source = self.source(out)
            if source is None or not out.requires_grad:
                continue
            if outer is None:
                raise UnmeasuredUse("it is returned without having met the samples")
            outer.begin()
            outer.add(out, source)

    def source(self, value: object) -> Source | None:
        """Where it comes from, if it is shared."""
        for k in range(len(self._values) - 1, -1, -1):
            if self._values[k] is value:
                return self._sources[k]
        return None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs)) if self._may_take(args, kwargs) else []
        shared = [t for t in tensors if self.source(t) is not None]
        if not shared or not torch.is_grad_enabled() or func in _COMPARING:
            if func is Tensor.unflatten:  # the compiler takes it as a method only
                return args[0].unflatten(*args[1:], **kwargs)
            return func(*args, **kwargs)
        if func is F.embedding:
            found = self.owner.measure_embedding(self, func, *args, **kwargs)
            if found is not None:
                return found
        if func in _LIKE and self.source(args[0]) is None:
            return func(*args, **kwargs)
        others = [t for t in tensors if t.dim() and self.source(t) is None]
        if self.samples is None:
            self.samples = next((t.shape[0] for t in others if t.requires_grad), None)
        met = [t for t in others if self.samples is not None and t.shape[0] == self.samples]
        met = [t for t in met if not any(t is constant for constant in self._constants)]
        if met:
            return self._meet(func, args, kwargs, met)
        strange = [t for t in others if t.requires_grad]
        if strange:
            raise UnmeasuredUse(
                f"{_name(func)} takes it together with a tensor of shape {list(strange[0].shape)}, "
                f"dimension 0 of which does not count the {self.samples} samples"
            )
        return self._compute(func, args, kwargs)

    def _may_take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a shared value may be among the arguments: soon told, as mostly it is not."""
        if self._compiling:
            return bool(self._values)
        ids = self._ids
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in ids:
                return True
            if value.__class__ is list or value.__class__ is tuple:
                for part in value:
                    if id(part) in ids:
                        return True
        return False

    def _compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function of shared values alone."""
        found = func(*args, **kwargs)
        several = isinstance(found, (tuple, list))
        outputs = list(found) if several else [found]
        if not any(isinstance(out, Tensor) and out.requires_grad for out in outputs):
            return found
        if func in _WRITING:
            raise UnmeasuredUse(f"{_name(func)} writes to it")
        if self.source(found) is not None:  # float() of what is float already, and the like
            return found
        grown = self._grown(func, args, kwargs, outputs[0])
        if grown is not None:
            return grown
        leaves, _ = tree_flatten((args, kwargs))
        parents = [self.source(leaf) for leaf in leaves]
        for k, out in enumerate(outputs):
            if isinstance(out, Tensor) and out.requires_grad:
                self.add(out, Computed(func, (args, kwargs), parents, k if several else None))
        return found

    def _grown(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        """For a value that is explicitly repeated for each sample: that, measured."""
        known = func in _EXPANDING or func in _REPEATING
        if not known or out.shape[0] != self.samples or self.samples == 1:
            return None
        value = args[0]
        if value.dim() == out.dim() and value.shape[0] != 1:
            return None
        rows = self._rows(value, None, out.dim(), func)
        if func in _EXPANDING:
            return rows.expand(out.shape)
        times = [out.shape[k] // rows.shape[k] for k in range(out.dim())]
        return rows.repeat(times)

    def _meet(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        met: list[Tensor],
    ) -> Any:
        """A function of shared values and of samples."""
        routed = self.owner.measure_function(self, func, args, kwargs)
        if routed is not None:
            return routed
        if func not in _BROADCASTING and func not in _JOINING:
            raise UnmeasuredUse(f"{_name(func)} is not among the functions that are known")
        dims = max([t.dim() for t in met])
        floating = [t.dtype for t in met if t.is_floating_point()]
        dtype = floating[0] if floating else None
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [
            leaf if self.source(leaf) is None else self._rows(leaf, dtype, dims, func)
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **kwargs)

    def apply(self, func: Callable[..., Any], x: Tensor, value: Tensor) -> Any:
        """func(x, value) for samples x and any value."""
        if self.source(value) is None:
            return func(x, value)
        return self._meet(func, (x, value), {}, [x])

    def _rows(
        self, value: Tensor, dtype: torch.dtype | None, dims: int, func: Callable[..., Any]
    ) -> Tensor:
        """A shared value for each sample, with so many dimensions, the first of them the samples'.

        Args:
            value: the shared value.
            dtype: of what it meets, if that is floating-point.
            dims: how many dimensions it is to have.
            func: in which function.

        Raises:
            UnmeasuredUse: where broadcasting would put it elsewhere.
        """
        source, samples = self.source(value), self.samples
        assert source is not None
        assert samples is not None
        shape, free = value.shape, dims - value.dim()
        if free < 0 or (free == 0 and shape[0] != 1):
            raise UnmeasuredUse(
                f"{_name(func)} takes it, of shape {list(shape)}, together with samples of {dims} "
                "dimensions, the first of which it does not leave to the samples"
            )
        rows = source.rows(samples)
        if not value.dim() and dtype is not None:  # bends to that type, which its rows would not
            rows = rows.to(dtype)
        inner = shape[1:] if free == 0 else (*[1] * (free - 1), *shape)
        return rows.reshape(samples, *inner)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for part in value:
                if isinstance(part, Tensor):
                    yield part


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))
