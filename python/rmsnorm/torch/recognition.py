"""What a norm module computes, found by running its forward and comparing it with known formulas.

The forward of a module runs on tensors without storage, once for every combination of dtypes, and
what torch is asked to compute is written down as an expression. A formula is known where a function
of this file leaves the same expressions. So neither the name of a class nor the way in which it is
written counts, and a change in a new version of a model that changes results is not overlooked.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .known_norms import FORMULAS, UNWEIGHTED, WEIGHTED_ONCE, Formula

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# All combinations of dtypes on three dimensions, and one on as many as models have.
_TRACES = [
    *((3, x, weight) for x, weight in itertools.product(_DTYPES, _DTYPES)),
    *((rank, torch.bfloat16, torch.bfloat16) for rank in (1, 2, 4)),
]
# The one whose expression shows most of what is rounded when.
_SHOWN = (3, torch.bfloat16, torch.bfloat16)


class Unrecognised(Exception):
    """Says why a module cannot be replaced."""


@dataclass(frozen=True)
class Norm:
    """A formula with what a module adds to it: eps and the names of its parameters."""

    formula: Formula
    eps: float | None
    weight: str | None
    bias: str | None = None
    dims: int = 1  # normalized ones

    def compute(self, module: Module, x: Tensor) -> Tensor:
        """The forward of the module, by this library."""
        weight = None if self.weight is None else getattr(module, self.weight)
        bias = None if self.bias is None else getattr(module, self.bias)
        return self.formula.compute(x, self.dims, self.eps, weight, bias)


@dataclass(frozen=True)
class _Expression:
    """An operation of torch; one without operands is a tensor that the forward was given."""

    name: str
    dtype: torch.dtype
    operands: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if not self.operands:
            return self.name
        return f"{self.name}({', '.join(map(str, self.operands))})"


_COMMUTATIVE = ("add", "mul")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations on the tensors that it was given, in a normal form: one name for
    the ways to square and to take the reciprocal root, and no conversion that changes no value."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The tensors are kept, or one of them could get the id of another.
        self._known = {id(t): (t, _Expression(name, t.dtype)) for name, t in inputs.items()}

    def expression(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            raise Unrecognised("its forward uses tensors beside its input and parameters")
        return self._known[id(value)][1]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            expression = self._normal_form(function, args, kwargs or {}, result.dtype)
            self._known[id(result)] = (result, expression)
        return result

    def _normal_form(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> _Expression:
        name = function.overloadpacket.__name__
        operands = tuple(map(self.expression, args))
        first = operands[0] if operands else None
        if name == "add_" and isinstance(first, _Expression) and first.operands:
            name = "add"  # a result of this forward, which nobody else sees
        conversion = name == "_to_copy" and kwargs.keys() <= {"dtype", "layout", "device"}
        if conversion and isinstance(first, _Expression):
            if torch.promote_types(first.dtype, dtype) == dtype:
                return first  # exact; operations on it have the wider dtype as theirs
            return _Expression("to", dtype, operands)
        if kwargs:
            return _Expression(str(function), dtype, (*operands, *sorted(kwargs.items())))
        match name, *operands:
            case ["pow", base, 2]:
                return _Expression("square", dtype, (base,))
            case ["mul", a, b] if a == b:
                return _Expression("square", dtype, (a,))
            case ["pow", base, -0.5]:
                return _Expression("rsqrt", dtype, (base,))
            case ["mean", values, [dim], *keepdim]:
                dim = dim if dim < 0 else dim - args[0].dim()
                return _Expression("mean", dtype, (values, dim, *keepdim))
        return _Expression(name, dtype, operands)


def _match(known: Any, found: Any, bound: dict[str, Any]) -> dict[str, Any] | None:
    """What the tensors and eps of a formula are in an expression; None if it is another."""
    if isinstance(known, _Expression) and isinstance(found, _Expression):
        if not known.operands and known.name != "x":
            if found.operands or found.name == "x" or known.dtype != found.dtype:
                return None
            return _bind(known.name, found.name, bound)
        if (known.name, known.dtype) != (found.name, found.dtype):
            return None
        if len(known.operands) != len(found.operands):
            return None
        orders = [found.operands]
        if known.name in _COMMUTATIVE:
            orders.append(found.operands[::-1])
        for operands in orders:
            result: dict[str, Any] | None = bound
            for a, b in zip(known.operands, operands):
                result = None if result is None else _match(a, b, result)
            if result is not None:
                return result
        return None
    if known == _EPS:
        return _bind("eps", float(found), bound) if isinstance(found, (int, float)) else None
    return bound if type(known) is type(found) and known == found else None


def _bind(name: str, value: Any, bound: dict[str, Any]) -> dict[str, Any] | None:
    return {**bound, name: value} if bound.get(name, value) == value else None


# A number that no formula has, in the place of eps.
_EPS = 0.0078125 + 2.0**-20


def _record(
    forward: Callable[..., Tensor], x: Tensor, parameters: Mapping[str, Tensor]
) -> _Expression:
    recorder = _Recorder({"x": x, **parameters})
    with torch.no_grad(), recorder:
        y = forward(x)
    if not isinstance(y, Tensor):
        raise Unrecognised("its forward returns something else than a tensor")
    # An exact conversion at the end is in no expression, hence the dtype of the result.
    return _Expression("result", y.dtype, (recorder.expression(y),))


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@cache
def _known_expressions(formula: Formula) -> list[_Expression]:
    """Those of a formula, one for each of _TRACES."""

    def of(rank: int, x_dtype: torch.dtype, dtype: torch.dtype) -> _Expression:
        parameters = {name: _meta((8,), dtype) for name in formula.parameters}
        x = _meta((2,) * (rank - 1) + (8,), x_dtype)
        return _record(lambda x: formula.definition(x, _EPS, **parameters), x, parameters)

    return [of(*trace) for trace in _TRACES]


def _twin(module: Module, dtype: torch.dtype, training: bool) -> tuple[Module, dict[str, Tensor]]:
    """A module of the same class and attributes, whose parameters and buffers have no storage."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    twin.__dict__["training"] = training
    parameters: dict[str, Parameter | None] = {}
    for name, parameter in module._parameters.items():
        shape = None if parameter is None else tuple(parameter.shape)
        parameters[name] = None if shape is None else Parameter(_meta(shape, dtype))
    buffers = {
        name: None if buffer is None else _meta(tuple(buffer.shape), buffer.dtype)
        for name, buffer in module._buffers.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers)
    return twin, {name: p for name, p in parameters.items() if p is not None}


def _expressions(module: Module) -> list[_Expression]:
    """Those of a module, one for each of _TRACES."""
    sizes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
    if len(sizes) > 1 or any(len(shape) != 1 for shape in sizes):
        raise Unrecognised(f"its parameters are of shape {', '.join(map(str, sorted(sizes)))}")
    (size,) = sizes.pop() if sizes else (8,)

    def of(rank: int, x_dtype: torch.dtype, dtype: torch.dtype, training: bool) -> _Expression:
        twin, parameters = _twin(module, dtype, training)
        x = _meta((2,) * (rank - 1) + (size,), x_dtype)
        return _record(lambda x: type(module).forward(twin, x), x, parameters)

    expressions = [of(*trace, training=False) for trace in _TRACES]
    if of(*_SHOWN, training=True) != expressions[_TRACES.index(_SHOWN)]:
        raise Unrecognised("its forward does something else in training")
    return expressions


def _of_torch(module: Module) -> Norm:
    assert isinstance(module, torch.nn.RMSNorm)
    dims = len(module.normalized_shape)
    if module.weight is None:
        return Norm(UNWEIGHTED, module.eps, None, dims=dims)
    return Norm(WEIGHTED_ONCE, module.eps, "weight", dims=dims)


def _recognise(module: Module) -> Norm:
    if type(module).forward is torch.nn.RMSNorm.forward:
        return _of_torch(module)
    if next(module.children(), None) is not None:
        raise Unrecognised("it has modules within")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        names = ", ".join(p.name for p in parameters)
        raise Unrecognised(f"its forward takes other arguments than x: {names}")
    try:
        expressions = _expressions(module)
    except Unrecognised:
        raise
    # The forward of any class may raise anything when it is run on tensors without storage.
    except Exception as error:
        raise Unrecognised(f"its forward cannot be traced: {error}") from error
    for formula in FORMULAS:
        bound: dict[str, Any] | None = {}
        for known, found in zip(_known_expressions(formula), expressions):
            bound = None if bound is None else _match(known, found, bound)
        if bound is not None:
            return Norm(formula, bound["eps"], bound.get("weight"), bound.get("bias"))
    seen = expressions[_TRACES.index(_SHOWN)]
    raise Unrecognised(f"unknown formula: {seen.operands[0]}")


_ATTRIBUTES_OF_MODULE = frozenset(vars(Module()))


def _what_forward_depends_on(module: Module) -> Hashable:
    """Equal for modules that compute the same; None where that is not known."""
    shapes = tuple(
        (name, None if tensor is None else tuple(tensor.shape))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    attributes = tuple(
        (name, type(value), value)
        for name, value in vars(module).items()
        if name not in _ATTRIBUTES_OF_MODULE
    )
    kind = (type(module), shapes, attributes)
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


class Recognition:
    """Recognises the modules of a model, looking at those that are alike once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Norm | str] = {}

    def of(self, module: Module) -> Norm:
        """The formula that a module computes.

        Raises:
            Unrecognised: It is none of those known, or the module has more to it than a forward.
        """
        kind = _what_forward_depends_on(module)
        result = None if kind is None else self._known.get(kind)
        if result is None:
            try:
                result = _recognise(module)
            except Unrecognised as error:
                result = str(error)
            if kind is not None:
                self._known[kind] = result
        if isinstance(result, str):
            raise Unrecognised(result)
        return result
