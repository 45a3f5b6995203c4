"""What a norm module computes, found by running its forward and comparing it with known formulas.

The forward of a module runs on tensors without storage, once for every combination of dtypes, and
what torch is asked to compute is written down as an expression. A formula is known where a function
of this file leaves the same expressions. So neither the name of a class nor the way in which it is
written counts, and a change in a new version of a model that changes results is not overlooked.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_float
from dataclasses import dataclass
from functools import cache, partial
from math import inf
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .functional import default_eps
from .known_norms import FORMULAS, TORCH_UNWEIGHTED, TORCH_WEIGHTED, Formula


@dataclass(frozen=True)
class _Trace:
    """What a forward is run with: dtypes and rank of x, and the state of module and torch."""

    x: torch.dtype = torch.bfloat16
    weight: torch.dtype = torch.bfloat16
    rank: int = 3
    training: bool = False
    autocast: bool = False  # True: that of CUDA is enabled, and tensors say that they are there.

    @property
    def device(self) -> str:
        return "cuda" if self.autocast else "cpu"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The one whose expression shows most of what is rounded when.
_SHOWN = _Trace()
# All combinations of dtypes on three dimensions, and one on as many as models have.
_USUAL = (
    *(_Trace(x, weight) for x, weight in itertools.product(_DTYPES, _DTYPES)),
    *(_Trace(rank=rank) for rank in (1, 2, 4)),
)
_TRAINING = _Trace(training=True)
# Torch computes its own rms_norm in another dtype there; other operations stay as they are.
_AUTOCAST = (
    _Trace(autocast=True),
    _Trace(weight=torch.float32, autocast=True),
    _Trace(x=torch.float32, autocast=True),
)
_DOUBLE = (_Trace(torch.float64, torch.float64),)
_COMPARED = (
    (_USUAL, None),
    (_AUTOCAST, "under autocast on CUDA"),
    (_DOUBLE, "in float64"),
)


class Unrecognised(Exception):
    """Says why a module cannot be replaced."""


@dataclass(frozen=True)
class Norm:
    """A formula with what a module adds to it: eps and the names of its parameters.

    Raises:
        Unrecognised: torch computes with an eps that this library refuses.
    """

    formula: Formula
    eps: float | None
    weight: str | None
    bias: str | None = None
    shape: tuple[int, ...] | None = None  # the normalized one; None: the last dimension of x

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 <= self.eps < inf:
            raise Unrecognised(f"its eps is {self.eps}")

    def compute(self, module: Module, x: Any) -> Tensor | None:
        """The forward of the module, by this library; None, before anything is computed, for an
        argument that this library refuses and the module's own forward may not."""
        try:
            weight = None if self.weight is None else getattr(module, self.weight)
            bias = None if self.bias is None else getattr(module, self.bias)
            shape = x.shape[-1:] if self.shape is None else self.shape
            return self.formula.compute(x, shape, self.eps, weight, bias)
        # What is no tensor lacks the attributes of one.
        except (AttributeError, TypeError, ValueError):
            return None


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
_ONES = ("ones", "ones_like", "new_ones")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations on the tensors that it was given, in a normal form: one name for
    the ways to square, to take the reciprocal root and to add a number, and no conversion that
    changes no value. Where float64 is given, float32 is written down as float64, since this library
    computes in float64 what a forward computes in either."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._double = any(t.dtype == torch.float64 for t in inputs.values())
        # The tensors are kept, or one of them could get the id of another.
        self._known: dict[int, tuple[Tensor, Any]] = {
            id(t): (t, _Expression(name, self.dtype(t))) for name, t in inputs.items()
        }

    def dtype(self, tensor: Tensor) -> torch.dtype:
        return torch.float64 if self._double and tensor.dtype == torch.float32 else tensor.dtype

    def expression(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            raise Unrecognised("its forward uses tensors beside its input and parameters")
        return self._known[id(value)][1]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "aten":
            with self:  # Torch's rms_norm has a kernel on some devices; on others it is operations.
                taken_apart = function.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        operands = tuple(map(self.expression, args))
        result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            expression = self._normal_form(function, args, operands, kwargs, result)
            self._known[id(result)] = (result, expression)
        return result

    def _require_numbers_to_add_nothing(self, args: tuple[Any, ...], result: Tensor) -> None:
        """Raises Unrecognised where a tensor that counts as a number gives a result its shape or
        dtype."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        others = [t for t in tensors if not _is_number(self.expression(t))]
        of_others = [(t.shape, self.dtype(t)) for t in others]
        if len(others) < len(tensors) and of_others != [(result.shape, self.dtype(result))]:
            raise Unrecognised("its forward uses tensors beside its input and parameters")

    def _normal_form(
        self,
        function: Any,
        args: tuple[Any, ...],
        operands: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> Any:
        name, dtype = function.overloadpacket.__name__, self.dtype(result)
        first = operands[0] if operands else None
        if name in _ONES:
            return 1.0  # a number in all that follows
        conversion = name == "_to_copy" and kwargs.keys() <= {"dtype", "layout", "device"}
        if (conversion or name == "detach") and _is_number(first):
            return first
        self._require_numbers_to_add_nothing(args, result)
        if name == "add_" and isinstance(first, _Expression) and first.operands:
            name = "add"  # a result of this forward, which nobody else sees
        if conversion and isinstance(first, _Expression):
            if torch.promote_types(first.dtype, dtype) == dtype:
                return first  # exact; operations on it have the wider dtype as theirs
            return _Expression("to", dtype, operands)
        if name in ("add", "sub") and kwargs.keys() <= {"alpha"} and _is_number(operands[1]):
            number = kwargs.get("alpha", 1) * operands[1]
            return _Expression("add", dtype, (first, number if name == "add" else -number))
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
    if _is_number(known) and known == _EPS:
        return _bind("eps", found, bound) if _is_number(found) else None
    alike = type(known) is type(found) or (_is_number(known) and _is_number(found))
    return bound if alike and known == found else None


def _bind(name: str, value: Any, bound: dict[str, Any]) -> dict[str, Any] | None:
    return {**bound, name: value} if bound.get(name, value) == value else None


# A number that no formula has, in the place of eps; float32 has it, too.
_EPS = 0.0078125 + 2.0**-20


@contextmanager
def _prepared(trace: _Trace) -> Iterator[None]:
    """Tensors that are made within have no storage, and autocast is as the trace wants it.

    torch logs each operation that is refused such tensors, where the report says it of the norm.
    """
    before = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
    log = logging.getLogger(FakeTensorMode.__module__)
    log_was_disabled, log.disabled = log.disabled, True
    with warnings.catch_warnings(), torch.no_grad(), FakeTensorMode():
        warnings.simplefilter("ignore")
        try:
            torch.set_autocast_enabled("cpu", False)
            torch.set_autocast_enabled("cuda", trace.autocast)
            yield
        finally:
            log.disabled = log_was_disabled
            for device, enabled in before:
                torch.set_autocast_enabled(device, enabled)


def _x(trace: _Trace, size: int) -> Tensor:
    shape = (2,) * (trace.rank - 1) + (size,)
    return torch.empty(shape, dtype=trace.x, device=trace.device)


def _record(
    forward: Callable[..., Tensor], x: Tensor, parameters: Mapping[str, Tensor]
) -> _Expression:
    recorder = _Recorder({"x": x, **parameters})
    with recorder:
        y = forward(x)
    if not isinstance(y, Tensor):
        raise Unrecognised("its forward returns something else than a tensor")
    # An exact conversion at the end is in no expression, hence the dtype of the result.
    return _Expression("result", recorder.dtype(y), (recorder.expression(y),))


@cache
def _known_expression(formula: Formula, trace: _Trace) -> _Expression:
    with _prepared(trace):
        parameters = {
            name: torch.empty(8, dtype=trace.weight, device=trace.device)
            for name in formula.parameters
        }
        define = partial(formula.definition, eps=_EPS, **parameters)
        return _record(define, _x(trace, 8), parameters)


def _twin(module: Module, trace: _Trace) -> tuple[Module, dict[str, Tensor]]:
    """A module of the same class and attributes, whose parameters and buffers have no storage."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    twin.__dict__["training"] = trace.training

    def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(tensor.shape), dtype=dtype, device=trace.device)

    parameters = {
        name: None if p is None else Parameter(like(p, trace.weight), requires_grad=False)
        for name, p in module._parameters.items()
    }
    buffers = {
        name: None if buffer is None else like(buffer, buffer.dtype)
        for name, buffer in module._buffers.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers)
    return twin, {name: p for name, p in parameters.items() if p is not None}


def _size(module: Module) -> int:
    """That of a module's parameters, or any if it has none."""
    sizes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
    if len(sizes) > 1 or any(len(shape) != 1 for shape in sizes):
        raise Unrecognised(f"its parameters are of shape {', '.join(map(str, sorted(sizes)))}")
    (size,) = sizes.pop() if sizes else (8,)
    return size


def _require_unchanged(twin: Module, before: Mapping[str, Any]) -> None:
    after = vars(twin)
    for name in before.keys() | after.keys():
        if name not in before or name not in after or after[name] is not before[name]:
            raise Unrecognised(f"its forward sets its attribute {name}")


def _expression(module: Module, trace: _Trace) -> _Expression:
    """What the forward of a module's class computes.

    Raises:
        Unrecognised: It cannot be run.
    """
    size = _size(module)
    try:
        with _prepared(trace):
            twin, parameters = _twin(module, trace)
            before = dict(vars(twin))
            forward = partial(type(module).forward, twin)
            expression = _record(forward, _x(trace, size), parameters)
            _require_unchanged(twin, before)
            return expression
    except Unrecognised:
        raise
    # The forward of any class may raise anything when it is run on tensors without storage.
    except Exception as error:
        raise Unrecognised(f"its forward cannot be traced: {error}") from error


def _compared(formula: Formula, expression: Callable[[_Trace], _Expression]) -> Norm | str | None:
    """The formula with the names and the eps that it has in the expressions; None if these are of
    another formula, or what is different if that shows in unusual circumstances alone.

    Raises:
        Unrecognised: Of this formula, with an eps that this library has no number for.
    """
    names: dict[str, Any] = {}
    eps = {}
    for traces, where in _COMPARED:
        for trace in traces:
            bound = _match(_known_expression(formula, trace), expression(trace), names)
            if bound is None:
                return where and f"its forward does something else {where}"
            eps[trace] = bound.pop("eps")
            names = bound
    return Norm(formula, _eps(eps), names.get("weight"), names.get("bias"))


def _eps(of: Mapping[_Trace, float]) -> float | None:
    """The one eps of all traces; None where each dtype is given torch's default.

    Torch's own function rounds eps to float32 where it computes in that, so float64 tells it.
    """
    (double,) = (of[trace] for trace in _DOUBLE)
    others = {eps for trace, eps in of.items() if trace not in _DOUBLE}
    if double == default_eps(torch.float64) and others == {default_eps(torch.float32)}:
        return None
    if not others <= {double, c_float(double).value}:
        raise Unrecognised("its eps depends on the dtype of x")
    return float(double)


def _of_torch(module: Module) -> Norm:
    assert isinstance(module, torch.nn.RMSNorm)
    if not isinstance(module.eps, (Real, NoneType)):
        raise Unrecognised(f"its eps is a {type(module.eps).__name__}")
    eps = None if module.eps is None else float(module.eps)
    shape = tuple(module.normalized_shape)
    if module.weight is None:
        return Norm(TORCH_UNWEIGHTED, eps, None, shape=shape)
    return Norm(TORCH_WEIGHTED, eps, "weight", shape=shape)


def _recognise(module: Module) -> Norm:
    if next(module.children(), None) is not None:
        raise Unrecognised("it has modules within")
    if type(module).forward is torch.nn.RMSNorm.forward:
        return _of_torch(module)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        names = ", ".join(p.name for p in parameters)
        raise Unrecognised(f"its forward takes other arguments than x: {names}")
    expression = cache(partial(_expression, module))
    seen = expression(_SHOWN)
    if expression(_TRAINING) != seen:
        raise Unrecognised("its forward does something else in training")
    reason = f"unknown formula: {seen.operands[0]}"
    for formula in FORMULAS:
        result = _compared(formula, expression)
        if isinstance(result, Norm):
            return result
        reason = result or reason
    raise Unrecognised(reason)


_ATTRIBUTES_OF_MODULE = frozenset(vars(Module()))
# What accelerate puts around the forward of a class, which does not depend on it.
_ATTRIBUTES_OF_HOOKS = ("forward", "_old_forward", "_hf_hook")


def _what_forward_depends_on(module: Module) -> Hashable:
    """Equal for modules that compute the same; None where that is not known."""
    tensors = tuple(
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    attributes = tuple(
        (name, type(value), value)
        for name, value in vars(module).items()
        if name not in _ATTRIBUTES_OF_MODULE and name not in _ATTRIBUTES_OF_HOOKS
    )
    kind = (type(module), tensors, attributes)
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
