"""What a norm module computes, found by running its forward and comparing it with known formulas.

The forward of a module runs on tensors without storage, once for every combination of dtypes and of
what else it may depend on, and what torch is asked to compute is written down as an expression. A
formula is known where a function of known_norms.py leaves the same expressions. So neither the name
of a class nor the way in which it is written counts, and a change in a new version of a model that
changes results is not overlooked.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from ctypes import c_float
from dataclasses import dataclass, replace
from functools import cache, partial
from math import inf
from numbers import Real
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional
from torch.nn.modules import normalization

from .arguments import check_rms_norm
from .functional import default_eps
from .known_norms import FORMULAS, TORCH_UNWEIGHTED, TORCH_WEIGHTED, Formula
from .recorder import Expression, Unrecognised, is_number
from .tracing import State, Trace, apart, expression_of_definition, expression_of_forward

__all__ = ["Norm", "Recognition", "Unrecognised"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The one whose expression shows most of what is rounded when.
_SHOWN = Trace()
_USUAL = tuple(Trace(x, weight) for x, weight in itertools.product(_DTYPES, _DTYPES))
_DOUBLE = (Trace(torch.float64, torch.float64),)
# Torch computes its own rms_norm in another dtype there; other operations stay as they are. Nothing
# requires grad: autograd ends the process for tensors that only say that they are on CUDA, where
# torch was built without it.
_AUTOCAST = tuple(
    Trace(
        x,
        weight,
        x_requires_grad=False,
        weight_requires_grad=False,
        mode=torch.no_grad,
        autocast="cuda",
    )
    for x, weight in (
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    )
)

# Circumstances that no formula depends on, and their names: with each of the traces above,
_Circumstances = tuple[tuple[str, dict[str, Any]], ...]
_IN_TRAINING: _Circumstances = (("in training", {"training": True}),)
_IN_ALL_MODES: _Circumstances = (
    *_IN_TRAINING,
    ("without gradients", {"mode": torch.no_grad}),
    ("without gradients in training", {"mode": torch.no_grad, "training": True}),
)
# and with one of them, in training and in evaluation.
_ONCE: _Circumstances = tuple(
    (where, {**changes, "training": training})
    for where, changes in (
        ("for x of another rank", {"sizes": ()}),
        ("for x of another rank", {"sizes": (5,)}),
        ("for x of another rank", {"sizes": (2, 1, 4)}),
        ("for x of another size", {"sizes": (1, 1), "width": 1}),
        ("for x of another size", {"sizes": (4, 1025), "width": 24}),
        ("for x that is not contiguous", {"contiguous": False}),
        ("where x requires no grad", {"x_requires_grad": False}),
        ("where its parameters require no grad", {"weight_requires_grad": False}),
        ("where nothing requires grad", {"x_requires_grad": False, "weight_requires_grad": False}),
        ("in inference mode", {"mode": torch.inference_mode}),
        ("under autocast on the CPU", {"autocast": "cpu"}),
    )
    for training in (False, True)
)
# The traces that a formula is compared in, and the circumstances in which nothing may be different.
# CUDA comes last, since a forward may be refused there for no other reason than that it is missing.
_COMPARED: tuple[tuple[tuple[Trace, ...], str | None, _Circumstances], ...] = (
    (_USUAL, None, _IN_ALL_MODES),
    ((_SHOWN,), None, _ONCE),
    (_DOUBLE, "in float64", _IN_ALL_MODES),
    (_AUTOCAST, "under autocast on CUDA", _IN_TRAINING),
)


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
        weight = None if self.weight is None else getattr(module, self.weight)
        bias = None if self.bias is None else getattr(module, self.bias)
        try:
            shape = x.shape[-1:] if self.shape is None else self.shape
            return self.formula.compute(x, shape, self.eps, weight, bias)
        # What is no tensor lacks the attributes of one.
        except (AttributeError, TypeError, ValueError):
            if self._takes(x, weight, bias):
                raise  # It is of a mode or a hook of the caller's.
            return None

    def _takes(self, x: Any, weight: Tensor | None, bias: Tensor | None) -> bool:
        if not issubclass(type(x), Tensor) or x.is_nested or x.is_neg() or x._is_zerotensor():
            return False
        dims = 1 if self.shape is None else len(self.shape)
        if self.shape is not None and x.shape[-dims:] != self.shape:
            return False
        try:
            check_rms_norm(x, weight, bias, self.eps or 0.0, -dims, 0.0, "once", 1.0, None)
        except (TypeError, ValueError):
            return False
        return True


_COMMUTATIVE = ("add", "mul")


def _match(known: Any, found: Any, bound: dict[str, Any]) -> dict[str, Any] | None:
    """What the tensors and eps of a formula are in an expression; None if it is another."""
    if isinstance(known, Expression) and isinstance(found, Expression):
        if (known.given, known.dtype) != (found.given, found.dtype):
            return None
        if known.given == "parameter":
            return _bind(known.name, found.name, bound)
        if known.name != found.name:
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
    if is_number(known) and known == _EPS:
        return _bind("eps", found, bound) if is_number(found) else None
    alike = type(known) is type(found) or (is_number(known) and is_number(found))
    return bound if alike and known == found else None


def _bind(name: str, value: Any, bound: dict[str, Any]) -> dict[str, Any] | None:
    return {**bound, name: value} if bound.get(name, value) == value else None


# A number that no formula has, in the place of eps; float32 has it, too.
_EPS = 0.0078125 + 2.0**-20


@cache
def _known_expression(formula: Formula, trace: Trace) -> Expression:
    return expression_of_definition(formula.definition, formula.parameters, trace, eps=_EPS)


def _require_alike(
    expression: Callable[[Trace], Expression], trace: Trace, circumstances: _Circumstances
) -> None:
    for where, changes in circumstances:
        if expression(replace(trace, **changes)) != expression(trace):
            raise Unrecognised(f"its forward does something else {where}")


def _compared(formula: Formula, expression: Callable[[Trace], Expression]) -> Norm | str | None:
    """The formula with the names and the eps that it has in the expressions; None if these are of
    another formula, or what is different if that shows in unusual circumstances alone.

    Raises:
        Unrecognised: Of this formula, with an eps that this library has no number for.
    """
    names: dict[str, Any] = {}
    eps = {}
    for traces, where, circumstances in _COMPARED:
        for trace in traces:
            bound = _match(_known_expression(formula, trace), expression(trace), names)
            if bound is None:
                return where and f"its forward does something else {where}"
            eps[trace] = bound.pop("eps")
            names = bound
        for trace in traces:
            _require_alike(expression, trace, circumstances)
    return Norm(formula, _eps(eps), names.get("weight"), names.get("bias"))


def _eps(of: Mapping[Trace, float]) -> float | None:
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


def _is_as_torch_has_it() -> bool:
    """Whether nobody has put another forward into torch's own norm, or what it calls."""
    return _is_of(torch.nn.RMSNorm.forward, normalization) and _is_of(
        functional.rms_norm, functional
    )


def _is_of(function: Any, module: ModuleType) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == module.__file__


def _of_torch(module: Module) -> Norm:
    assert isinstance(module, torch.nn.RMSNorm)
    if not isinstance(module.eps, (Real, NoneType)):
        raise Unrecognised(f"its eps is a {type(module.eps).__name__}")
    eps = None if module.eps is None else float(module.eps)
    shape = tuple(module.normalized_shape)
    if module.weight is None:
        return Norm(TORCH_UNWEIGHTED, eps, None, shape=shape)
    return Norm(TORCH_WEIGHTED, eps, "weight", shape=shape)


# Tracing changes what the threads of a process share: Python's warnings, torch's logging, the
# module. A forward that is traced may lead here again.
_one_at_a_time = threading.RLock()


def _recognise(module: Module) -> Norm:
    if next(module.children(), None) is not None:
        raise Unrecognised("it has modules within")
    if type(module).forward is torch.nn.RMSNorm.forward and _is_as_torch_has_it():
        return _of_torch(module)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        names = ", ".join(p.name for p in parameters)
        raise Unrecognised(f"its forward takes other arguments than x: {names}")
    with _one_at_a_time:
        state = State(module)
        try:
            with apart():
                result = _recognise_forward(module)
        except BaseException:
            # What a class refuses to have put back may not hide an interrupt.
            with suppress(Exception):
                state.restore()
            raise
        changed = state.restore()
    if changed is not None:
        raise Unrecognised(f"its forward changes its attribute {changed}")
    if isinstance(result, str):
        raise Unrecognised(result)
    return result


def _recognise_forward(module: Module) -> Norm | str:
    """The norm that a forward computes, or why it is none."""
    expression = cache(partial(expression_of_forward, module))
    try:
        seen = expression(_SHOWN)
        _require_alike(expression, _SHOWN, _IN_TRAINING)
        reason = f"unknown formula: {seen.operands[0]}"
        for formula in FORMULAS:
            result = _compared(formula, expression)
            if isinstance(result, Norm):
                return result
            reason = result or reason
    except Unrecognised as error:
        return str(error)
    return reason


_ATTRIBUTES_OF_MODULE = frozenset(vars(Module()))
# What accelerate puts around the forward of a class, which does not depend on it.
_ATTRIBUTES_OF_HOOKS = ("forward", "_old_forward", "_hf_hook")


# Values that are the same where their types and they are equal.
_PLAIN = (Real, str, bytes, NoneType, torch.dtype, torch.device)
_MODULES_OF_PLAIN = ("builtins", "numpy", "torch")


class _Identity:
    """Of a value, which is kept: another one could get its address."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


# Of the attributes of a module; with more of them its key is not worth its time. A list that is in
# others many times over counts each time.
_MOST_VALUES = 1000


def _key(value: Any, places: Iterator[int]) -> Hashable:
    """Equal for values that no forward can tell apart: what == says may leave much out.

    Each value takes one of the places; TypeError where they are used up.
    """
    if next(places, None) is None:
        raise TypeError("too many values")
    kind = type(value)
    if isinstance(value, _PLAIN) and kind.__module__ in _MODULES_OF_PLAIN:
        return kind, value
    if kind in (tuple, list, torch.Size):
        return kind, *(_key(part, places) for part in value)
    if kind.__hash__ is None:  # Its owner may change it, and it would be kept for nothing.
        raise TypeError(f"unhashable: {kind.__name__}")
    return _Identity(value)


def _what_forward_depends_on(module: Module) -> Hashable:
    """Equal for modules that compute the same; None where that is not known."""
    tensors = tuple(
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    places = iter(range(_MOST_VALUES))
    try:
        attributes = tuple(
            (name, _key(value, places))
            for name, value in vars(module).items()
            if name not in _ATTRIBUTES_OF_MODULE and name not in _ATTRIBUTES_OF_HOOKS
        )
    except (TypeError, RecursionError):  # of a list that is in itself
        return None
    return type(module), tensors, attributes


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
