"""Values that all samples share, and where they meet the samples.

A module's own parameters, what is computed from them alone, and embeddings of positions have no
dimension that counts the samples. What a sample adds to their gradient is lost where autograd sums
over what broadcasting has repeated. So while the forward pass of a module with such values runs,
its functions are watched: at the first one that takes a shared value together with samples, the
value is repeated for each sample by a call that measures (`functional.expand`; for positions
`functional.embedding`), and the function gets that instead. What was computed from a parameter
before (`1 + weight.float()`) is computed again from its repetition, by `torch.func.vmap`.

The outermost such module begins the watch, which all modules in it share. It knows constants, too:
buffers, tensors that are attributes, and what is computed of nothing else (`torch.arange`, masks).
They are no samples, though they may have as many rows. Everything else with b rows is, unless it
had as many with another b.

The forward pass computes the same numbers, and runs once (dropout of a shared value is drawn once
more). `torch.compile(fullgraph=True)` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .shared_sources import Computed, Own, Source, UnmeasuredUse

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

_WRITING = {
    f
    for name in dir(Tensor)
    if (name.endswith("_") and not name.endswith("__")) or name[3:-2] in _OPERATORS
    if isinstance(f := getattr(Tensor, name), MethodDescriptorType) or name.startswith("__i")
} | {Tensor.__setitem__}
_JOINING = {torch.cat, torch.concat, torch.concatenate}
_EXPANDING = {Tensor.expand, Tensor.broadcast_to, torch.broadcast_to}
_REPEATING = {Tensor.repeat, Tensor.tile, torch.tile}
_COMPARING = _named(*_COMPARISONS, *(f"__{name}__" for name in _COMPARISONS))
_LIKE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
"""With a shared value as another argument than the first they look at its shape or type alone."""
_RANDOM = _named("rand", "randn", "randint", "normal", "bernoulli", "multinomial", "poisson")
"""Their results may be samples although they are computed of nothing."""
_REFUSED = _named("as_strided", "as_strided_copy")
"""What looks at memory, of which a repetition has none of its own."""
_HOOKS = _named("register_hook", "retain_grad")
_FACTORIES = _named("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
"""They make constants, whatever tensor they are called on."""


class SharedValues(TorchFunctionMode):
    """Watches the functions that a forward pass calls.

    Args:
        samples: how many it was given; None if it does not take any.
        constants: tensors that are no samples, whatever their shape.
        folded: whether `samples` counts the rows of folded ones.

    Attributes:
        own: all parameters of modules that took part.
        in_layer: whether a compiled forward pass is in that of a layer, which the compiler does not
            let write down anything.
        taken: the parameters that functions were given, by id, since `note_taken`; or None.
    """

    def __init__(
        self, samples: int | None, constants: Iterable[Tensor], folded: bool = False
    ) -> None:
        super().__init__()
        self.samples, self.folded = samples, folded
        self.own: list[Own] = []
        self.taken: set[int] | None = None
        self.in_layer = False
        self._compiling = torch.compiler.is_compiling()
        # Lists: a search among few tensors compiles, a dictionary of them does not.
        self._values: list[Tensor] = []
        self._sources: list[Source] = []
        self._versions: list[int] = []
        self._constants = list(constants)
        self._captured: list[tuple[Any, Tensor]] = []  # by compiled computations, with their owners
        # The ids of the same tensors, in eager mode.
        self._ids: set[int] = set()
        self._constant_ids = set() if self._compiling else {id(t) for t in self._constants}

    def add(self, value: Tensor, source: Source) -> Tensor:
        """Counts it among the shared values; returns it."""
        self._values.append(value)
        self._sources.append(source)
        if not self._compiling:
            self._versions.append(value._version)
            self._ids.add(id(value))
        return value

    def drop(self, sources: list[Own], but: list[Any]) -> None:
        """These are no longer watched, except for those whose value is among `but`."""
        self._keep(
            [
                k
                for k, (value, source) in enumerate(zip(self._values, self._sources, strict=True))
                if not any(source is own for own in sources) or any(value is other for other in but)
            ]
        )

    def forget(self, owners: set[Any]) -> None:
        """Nothing of these layers is watched any more (eager mode)."""
        self.own = [own for own in self.own if own.owner not in owners]
        self._keep([k for k, s in enumerate(self._sources) if s.owner not in owners])

    def _keep(self, kept: list[int]) -> None:
        if len(kept) < len(self._values):
            self._values = [self._values[k] for k in kept]
            self._sources = [self._sources[k] for k in kept]
            if not self._compiling:
                self._versions = [self._versions[k] for k in kept]
                self._ids = {id(value) for value in self._values}

    def clear(self) -> None:
        """The forward pass is over, in whatever way. Forgets the values, which refer to this."""
        self.__init__(self.samples, (), self.folded)

    def note_taken(self) -> None:
        """Starts to note which parameters functions are given."""
        if self.taken is None:
            self.taken = set()

    def source(self, value: object) -> Source | None:
        """Where it comes from, if it is shared."""
        if not self._compiling and id(value) not in self._ids:
            return None
        for k in range(len(self._values) - 1, -1, -1):
            if self._values[k] is value:
                return self._sources[k]
        return None

    def is_constant(self, t: Tensor) -> bool:
        """Whether it is computed of nothing but constants."""
        if t.__class__ is nn.Parameter:
            return not t.requires_grad
        if not self._compiling:
            return id(t) in self._constant_ids
        return any(t is constant for constant in self._constants)

    def check_met(self, values: Iterable[Any], what: str) -> None:
        """That none of these is a shared value, or holds one.

        Raises:
            UnmeasuredUse: otherwise.
        """
        for value in values:
            if isinstance(value, (tuple, list)):
                self.check_met(value, what)
                continue
            source = self.source(value)
            if source is not None and value.requires_grad:
                raise UnmeasuredUse(f"{what} before it has met the samples", source.owner)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)
        shared, constant = self._look(args, kwargs)
        constant = constant or func in _FACTORIES
        if not shared or not torch.is_grad_enabled() or func in _COMPARING:
            found = _run(func, args, kwargs)
            self._note_parameters(args, kwargs, found)
            if constant:
                self._add_constants(func, found)
            if not shared and func in _WRITING and isinstance(first, Tensor):
                self._note_written(first, constant)
            return found
        table = None
        if func is F.embedding:
            table = self.source(args[1] if len(args) > 1 else kwargs["weight"])
        if isinstance(table, Own):
            found = table.owner.measure_embedding(self, func, *args, **kwargs)
            if found is not None:
                return found
        if func in _LIKE and self.source(first) is None:
            return func(*args, **kwargs)
        self._note_parameters(args, kwargs, first)
        tensors = list(_tensors(args, kwargs))
        of = [source for t in tensors if (source := self.source(t)) is not None]
        owner = of[0].owner
        others = [t for t in tensors if t.dim() and self.source(t) is None]
        if self.samples is None:
            self.samples = next((t.shape[0] for t in others if t.requires_grad), None)
        met = [t for k, t in enumerate(others) if self._is_met(t, func, of[0], k)]
        writes = func in _WRITING or kwargs.get("inplace") is True
        if writes and (self.source(first) is not None or not met or func is Tensor.__setitem__):
            raise UnmeasuredUse(f"{_name(func)} writes", owner)
        if func in _REFUSED or (func in _HOOKS and not isinstance(of[0], Own)):
            raise UnmeasuredUse(f"{_name(func)} is used", owner)
        self._check_unwritten(tensors, owner)
        if met:
            return self._meet(func, args, kwargs, met)
        strange = [t for t in others if t.requires_grad]
        if strange:
            raise UnmeasuredUse(
                f"{_name(func)} takes it together with a tensor of shape {list(strange[0].shape)}, "
                f"dimension 0 of which does not count the {self.samples} samples (if it holds "
                "several rows of each, do this in a module that is named with folded=)", owner,
            )  # fmt: skip
        return self._compute(func, args, kwargs)

    def _note_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        if self.taken is not None and isinstance(found, Tensor):  # no attribute
            of = _tensors(args, kwargs)
            self.taken.update(id(t) for t in of if t.__class__ is nn.Parameter)

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, bool]:
        """Whether a shared value is among the arguments, and whether all others are constants."""
        shared, constant = False, True
        for t in _tensors(args, kwargs):
            if self.source(t) is not None:
                shared = True
            else:
                constant = constant and self.is_constant(t)
        return shared, constant

    def _add_constants(self, func: Callable[..., Any], found: Any) -> None:
        if func in _RANDOM or self.in_layer:
            return
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, Tensor) and not t.requires_grad and not self.is_constant(t):
                self._constants.append(t)
                if not self._compiling:
                    self._constant_ids.add(id(t))

    def _note_written(self, t: Tensor, by_constant: bool) -> None:
        """It is no constant any more, if that were samples."""
        if any(t is captured for _, captured in self._captured):  # eager: see `Computed`
            owner = next(owner for owner, captured in self._captured if captured is t)
            raise UnmeasuredUse("what it was computed with is written to", owner)
        if by_constant:
            return
        base = None if self._compiling else t._base  # of a view
        self._constants = [c for c in self._constants if c is not t and c is not base]
        if not self._compiling:
            self._constant_ids = {id(c) for c in self._constants}

    def _check_unwritten(self, tensors: list[Tensor], owner: Any) -> None:
        if self._compiling:
            return
        for t in tensors:
            source = self.source(t)
            if source is None or isinstance(source, Own):
                continue
            k = next(k for k, value in enumerate(self._values) if value is t)
            if t._version != self._versions[k]:
                raise UnmeasuredUse("it has been written to", owner)

    def _compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function of shared values and constants alone."""
        found = func(*args, **kwargs)
        several = isinstance(found, (tuple, list))
        outputs = list(found) if several else [found]
        if not any(isinstance(out, Tensor) and out.requires_grad for out in outputs):
            self._add_constants(func, found)
            return found
        if self.source(found) is not None:  # float() of what is float already, and the like
            return found
        grown = self._grown(func, args, outputs[0])
        if grown is not None:
            return grown
        leaves, _ = tree_flatten((args, kwargs))
        parents = [self.source(leaf) for leaf in leaves]
        if self._compiling:
            owner = next(p.owner for p in parents if p is not None)
            captured = [t for t in leaves if isinstance(t, Tensor) and self.source(t) is None]
            self._captured = self._captured + [(owner, t) for t in captured]
        for k, out in enumerate(outputs):
            if isinstance(out, Tensor) and out.requires_grad:
                self.add(out, Computed(func, (args, kwargs), parents, k if several else None))
        return found

    def _grown(self, func: Callable[..., Any], args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """For a value that is explicitly repeated for each sample: that, measured."""
        if (func not in _EXPANDING and func not in _REPEATING) or not args:
            return None
        value = args[0]
        if value.dim() == out.dim() and value.shape[0] != 1:
            return None
        source = self.source(value)
        if source is None or not self._follows(source, (_name(func), value.shape), out.shape[0]):
            return None
        rows = self._rows(value, None, out.dim(), func)
        if func in _EXPANDING:
            return rows.expand(out.shape)
        return rows.repeat([out.shape[k] // rows.shape[k] for k in range(out.dim())])

    def _is_met(self, t: Tensor, func: Callable[..., Any], source: Source, place: int) -> bool:
        """Whether a tensor beside a shared value is samples."""
        if self.is_constant(t):
            return False
        if t.requires_grad:
            return t.shape[0] == self.samples
        return self._follows(source, (_name(func), place, t.shape[1:]), t.shape[0])

    def _follows(self, source: Source, where: tuple[Any, ...], size: int) -> bool:
        """Whether a size there is the number of samples, and follows it as far as is known.

        Heads, an image's rows, positions: there are as many of them with any number of samples.
        """
        if self._compiling:
            return size == self.samples
        seen = source.owner.observed_sizes.setdefault(where, set())
        seen.add((self.samples, size))
        return size == self.samples and not any(s == size and n != self.samples for n, s in seen)

    def _meet(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        met: list[Tensor],
    ) -> Any:
        """A function of shared values and of samples."""
        leaves, structure = tree_flatten((args, kwargs))
        owners = [source.owner for leaf in leaves if (source := self.source(leaf)) is not None]
        for owner in owners:
            if hasattr(owner, "measure_function"):
                found = owner.measure_function(self, func, args, kwargs)
                if found is not None:
                    return found
        joins = func in _JOINING and (kwargs.get("dim", args[1] if len(args) > 1 else 0)) != 0
        if func not in _BROADCASTING and not joins:
            why = "joins samples" if func in _JOINING else "is not among those that are known"
            raise UnmeasuredUse(f"{_name(func)} {why}", owners[0])
        dims = max([t.dim() for t in met])
        floating = [t.dtype for t in met if t.is_floating_point()]
        dtype = floating[0] if floating else None
        leaves = [
            leaf if self.source(leaf) is None else self._rows(leaf, dtype, dims, func)
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **kwargs)

    def along(self, value: Tensor, dim: int) -> Tensor:
        """A value whose dimension `dim` counts the samples; if it is shared, measured.

        Sample i's part is that of its own repetition: the diagonal of all repetitions.
        """
        source, samples = self.source(value), self.samples
        if source is None or samples is None or value.shape[dim] != samples:
            return value
        self._check_unwritten([value], source.owner)
        with torch._C.DisableTorchFunction():
            return source.rows(samples).diagonal(0, 0, dim + 1).movedim(-1, dim)

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
                "dimensions, the first of which it does not leave to the samples", source.owner,
            )  # fmt: skip
        rows = source.rows(samples)
        if not value.dim() and dtype is not None:  # bends to that type, which its rows would not
            rows = rows.to(dtype)
        inner = shape[1:] if free == 0 else (*[1] * (free - 1), *shape)
        return rows.reshape(samples, *inner)


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is Tensor.unflatten:  # the compiler takes it as a method only
        return args[0].unflatten(*args[1:], **kwargs)
    return func(*args, **kwargs)


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
