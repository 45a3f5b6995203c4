"""What a forward asks torch to compute, written down as an expression while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Unrecognised(Exception):
    """Says why a module cannot be replaced."""


@dataclass(frozen=True)
class Expression:
    """An operation of torch, or a tensor that the forward was given."""

    name: str
    dtype: torch.dtype
    operands: tuple[Any, ...] = ()
    given: Literal["input", "parameter"] | None = None
    # Of the text, as it were: a part that is used twice counts twice.
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", 1 + _size(self.operands))

    def __str__(self) -> str:
        if self.given:
            return self.name
        return f"{self.name}({', '.join(map(str, self.operands))})"


def _size(operand: Any) -> int:
    if isinstance(operand, tuple):
        return sum(map(_size, operand))
    return operand.size if isinstance(operand, Expression) else 1


# The known formulas have up to 16 parts. x = x + x doubles them each time that it is computed.
_LARGEST = 500


@dataclass(frozen=True)
class _Recorded:
    """A tensor with what it is and where its values are. The tensor and its storage are kept, or
    others could get their addresses."""

    tensor: Tensor
    expression: Any
    storage: torch.UntypedStorage

    def shares_storage_of(self, other: Tensor) -> bool:
        return bool(self.storage._cdata == other.untyped_storage()._cdata)


_ONES = ("ones", "ones_like", "new_ones")
_BESIDE = "its forward uses tensors beside its input and parameters"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations on the tensors that it was given, in a normal form: one name for
    the ways to square, to take the reciprocal root and to add a number, and no conversion that
    changes no value. Where float64 is given, float32 is written down as float64, since this library
    computes in float64 what a forward computes in either.

    What an expression does not show is refused: writes that others see, gradients that are not
    those of the expression, another device.
    """

    def __init__(self, x: Tensor, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._double = any(t.dtype == torch.float64 for t in (x, *parameters.values()))
        self._grad_enabled = torch.is_grad_enabled()
        self._refusal: Unrecognised | None = None
        self._known: dict[int, _Recorded] = {}
        self._remember(x, Expression("x", self.dtype(x), given="input"))
        for name, parameter in parameters.items():
            self._remember(parameter, Expression(name, self.dtype(parameter), given="parameter"))
        self._given = {id(t): t.requires_grad for t in (x, *parameters.values())}

    def dtype(self, tensor: Tensor) -> torch.dtype:
        return torch.float64 if self._double and tensor.dtype == torch.float32 else tensor.dtype

    def _remember(self, tensor: Tensor, expression: Any) -> None:
        if _size(expression) > _LARGEST:
            self._refuse("its forward computes more than any norm")
        self._known[id(tensor)] = _Recorded(tensor, expression, tensor.untyped_storage())

    def _refuse(self, reason: str) -> NoReturn:
        """Raises Unrecognised, and does so again at the end: a forward may catch exceptions."""
        self._refusal = self._refusal or Unrecognised(reason)
        raise self._refusal

    def expression(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(self.expression, value))
        if not isinstance(value, Tensor):
            if is_number(value) and math.isnan(value):
                self._refuse("its forward computes with the number nan")
            return value
        recorded = self._known.get(id(value))
        if recorded is None:
            self._refuse(_BESIDE)
        if not recorded.shares_storage_of(value):
            self._refuse("its forward gives a tensor other data")
        return recorded.expression

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:  # as autograd asks for, too
            return function(*args)
        if function.namespace == "aten":
            with self:  # Torch's rms_norm has a kernel on some devices; on others it is operations.
                taken_apart = function.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        written = self._written(function, args, kwargs)
        operands = self.expression(args)
        named = {name: self.expression(value) for name, value in kwargs.items()}
        self._require_grad_mode()
        result = function(*args, **kwargs)
        if written and not (len(written) == 1 and result is written[0]):
            self._refuse(f"its forward writes to tensors by {function}")
        if isinstance(result, Tensor):
            self._remember(result, self._normal_form(function, args, operands, named, result))
        else:
            for i, part in enumerate(_tensors(result)):
                operation = Expression(f"{function}[{i}]", self.dtype(part), operands)
                self._remember(part, operation)
        return result

    def _written(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
        """The tensors that an operation writes to, which have to be results of this forward that
        nobody else sees."""
        if not function._schema.is_mutable:
            return []
        arguments = function._schema.arguments
        values = {**{a.name: value for a, value in zip(arguments, args)}, **kwargs}
        changed = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
        written = [t for name in changed for t in _tensors(values.get(name))]
        for tensor in written:
            sharing = [r for r in self._known.values() if r.shares_storage_of(tensor)]
            for recorded in sharing:
                if id(recorded.tensor) in self._given:
                    self._refuse_write_to(recorded.expression)
            if len(sharing) > 1:
                self._refuse("its forward writes to a tensor through another that shares its data")
        return written

    def _refuse_write_to(self, given: Expression) -> NoReturn:
        named = "input" if given.given == "input" else f"parameter {given.name}"
        self._refuse(f"its forward writes to its {named}")

    def _require_grad_mode(self) -> None:
        if torch.is_grad_enabled() != self._grad_enabled:
            self._refuse("its forward computes with gradients switched on or off, or its own ones")

    def result(self, y: Any) -> Expression:
        """The expression of what a forward returned.

        Raises:
            Unrecognised: It is none, or the forward did something that it does not show.
        """
        if self._refusal is not None:
            raise self._refusal
        if not isinstance(y, Tensor):
            raise Unrecognised("its forward returns something else than a tensor")
        self._require_grad_mode()
        # An exact conversion at the end is in no expression, hence the dtype of the result.
        expression = Expression("result", self.dtype(y), (self.expression(y),))
        for recorded in self._known.values():
            self._require_no_side_effect(recorded)
        if y.requires_grad and not (self._grad_enabled and any(self._given.values())):
            raise Unrecognised("its forward gives its result gradients of its own")
        return expression

    def _require_no_side_effect(self, recorded: _Recorded) -> None:
        tensor = recorded.tensor
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            raise Unrecognised("its forward puts a hook on a tensor")
        if tensor.retains_grad:
            raise Unrecognised("its forward has the gradient of a tensor kept")
        if id(tensor) not in self._given:
            return
        if not recorded.shares_storage_of(tensor):
            self._refuse_write_to(recorded.expression)
        if tensor.requires_grad != self._given[id(tensor)]:
            raise Unrecognised("its forward changes whether a tensor requires grad")

    def _require_numbers_to_add_nothing(self, args: tuple[Any, ...], result: Tensor) -> None:
        """Raises Unrecognised where a tensor that counts as a number gives a result its shape or
        dtype."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        others = [t for t in tensors if not is_number(self.expression(t))]
        of_others = [(t.shape, self.dtype(t)) for t in others]
        if len(others) < len(tensors) and of_others != [(result.shape, self.dtype(result))]:
            self._refuse(_BESIDE)

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
        conversion = (name == "_to_copy" and kwargs.keys() <= {"dtype", "layout", "device"}) or (
            name == "clone" and kwargs.keys() <= {"memory_format"}
        )
        if (conversion or name == "detach") and is_number(first):
            return first
        self._require_numbers_to_add_nothing(args, result)
        if name == "add_":
            name = "add"  # to a result of this forward, which nobody else sees
        if conversion and isinstance(first, Expression):
            if result.device != args[0].device:
                self._refuse(f"its forward moves a tensor from {args[0].device} to {result.device}")
            if torch.promote_types(first.dtype, dtype) == dtype:
                return first  # exact; operations on it have the wider dtype as theirs
            return Expression("to", dtype, operands)
        if name in ("add", "sub") and kwargs.keys() <= {"alpha"} and is_number(operands[1]):
            number = kwargs.get("alpha", 1) * operands[1]
            return Expression("add", dtype, (first, number if name == "add" else -number))
        if kwargs:
            return Expression(str(function), dtype, (*operands, *sorted(kwargs.items())))
        match name, *operands:
            case ["pow", base, 2]:
                return Expression("square", dtype, (base,))
            case ["mul", a, b] if a == b:
                return Expression("square", dtype, (a,))
            case ["pow", base, -0.5]:
                return Expression("rsqrt", dtype, (base,))
            case ["mean", values, [dim], *keepdim]:
                dim = dim if dim < 0 else dim - args[0].dim()
                return Expression("mean", dtype, (values, dim, *keepdim))
        return Expression(name, dtype, tuple(operands))
