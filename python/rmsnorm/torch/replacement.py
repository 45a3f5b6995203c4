"""replace_rms_norms: the norms of a model computed by this library, and back."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any, final

import torch
from torch.nn import Module, Parameter

import rmsnorm

from .._checks import type_text
from .modules import RMSNorm
from .recognition import Norm, Recognition, Unrecognised
from .tracing import error_text

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Norms that are none of the root mean square.
_OTHER_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.LocalResponseNorm,
    torch.nn.modules.batchnorm._NormBase,
)


# The attribute of a module in which its norm is.
_NORM = "_rmsnorm_norm"
# The one derived class of each class, in its __dict__: a table here would keep every class alive.
_DERIVED = "_rmsnorm_derived"
# The class that a derived one was made from, in the __dict__ of the latter. It tells a derived class
# after another import of this module, too, which has another _Replaced.
_ORIGINAL = "_rmsnorm_original"


class _Replaced:
    """What a class inherits ahead of a model's own, so that only its forward is another.

    What this library computes there is an attribute of the module. Without it the forward is that
    of the model's class, for whoever has kept this one in a derived class or a hook.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        parts, rest = (reduced[0], *reduced[1]), reduced[2:]
        if not any(_is_derived(part) for part in parts):
            # The class's own way to make a module, which is an ordinary one.
            return *reduced[:2], *_without_norm(*rest)
        if not any(_is_made_here(part) for part in parts):
            return reduced
        # Classes made here have no name that pickle could find.
        original = getattr(self, _ORIGINAL)
        return _new, (original, *(original if _is_made_here(p) else p for p in parts)), *rest


def _without_norm(state: Any = None, *rest: Any) -> tuple[Any, ...]:
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != _NORM}
    return state, *rest


def _new(original: type[Module], *parts: Any) -> Any:
    """What the first part makes of the others, the derived class standing for the original."""
    make, *arguments = (_replaced_class(original) if p is original else p for p in parts)
    return make(*arguments)


def _is_derived(value: object) -> bool:
    """Whether it is a class made here, or derived from one."""
    # Of the classes themselves: a metaclass may have any attribute.
    return isinstance(value, type) and any(_ORIGINAL in vars(kind) for kind in value.__mro__)


def _is_made_here(value: object) -> bool:
    return isinstance(value, type) and _ORIGINAL in vars(value)


def _replaced_class(original: type[Module]) -> type[Module]:
    """The class derived from a model's.

    Raises:
        Unrecognised: None can be: what the class has its derived classes go through refuses it.
    """
    known = vars(original).get(_DERIVED)
    # Another import's would name functions to pickle that are no longer those of their names.
    if known is None or not issubclass(known, _Replaced):
        try:
            setattr(original, _DERIVED, _derived_class(original))
        # An __init_subclass__ or metaclass may raise anything.
        except Exception as error:
            raise Unrecognised(f"no class can be derived from its own: {error}") from error
    derived: type[Module] = vars(original)[_DERIVED]
    return derived


def _derived_class(original: type[Module]) -> type[Module]:
    signature = inspect.signature(original.forward)
    _, argument = signature.parameters

    def forward(self: Module, *inputs: Any, **named: Any) -> Any:
        norm: Norm | None = getattr(self, _NORM, None)
        if norm is not None and len(inputs) + len(named) == 1 and named.keys() <= {argument}:
            y = norm.compute(self, inputs[0] if inputs else named[argument])
            if y is not None:
                return y
        return original.forward(self, *inputs, **named)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        _ORIGINAL: original,
        "forward": forward,
    }
    return type(original.__name__, (_Replaced, original), members)


def _replace(module: Module, norm: Norm) -> None:
    if not _is_derived(type(module)):
        _change_class(module, _replaced_class(type(module)))
    vars(module)[_NORM] = norm


def _restore(module: Module) -> None:
    """Ends what _replace began, beneath whatever has been put on the module since."""
    vars(module).pop(_NORM, None)
    if _is_made_here(type(module)):
        _change_class(module, getattr(module, _ORIGINAL))


def _restore_all(modules: Iterable[Module]) -> None:
    """Of classes that raise the first exception is raised, after the other modules."""
    failure = None
    for module in modules:
        try:
            _restore(module)
        except Exception as error:  # noqa: BLE001  a class may raise anything
            failure = failure or error
    if failure is not None:
        raise failure


def _change_class(module: Module, kind: type[Module]) -> None:
    """Gives a module another class, and its forward to those who keep the module's own one."""
    before = type(module).forward
    module.__class__ = kind
    if type(module) is not kind:
        raise Unrecognised("its class cannot be changed")
    for name, value in vars(module).items():
        if _is_method(value, before, module):
            vars(module)[name] = MethodType(kind.forward, module)


def _is_method(value: object, function: Callable[..., Any], module: Module) -> bool:
    return isinstance(value, MethodType) and value.__func__ is function and value.__self__ is module


def require_supported(module: Module) -> None:
    """Raises Unrecognised for a module with parameters that this library cannot work on."""
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not Parameter:
            raise Unrecognised(f"{name} is a {type(parameter).__name__}")
        if parameter.dtype not in _DTYPES:
            raise Unrecognised(f"{name} is of dtype {str(parameter.dtype).removeprefix('torch.')}")
        if parameter.numel() == 1:
            raise Unrecognised(f"{name} has one element, which may stand for rows of any length")
        # Where a class shows something else by that name, its forward may read either.
        if getattr(module, name) is not parameter:
            raise Unrecognised(f"its attribute {name} is not its parameter of that name")
        device = parameter.device.type
        if device == "cuda" and not rmsnorm.info()["cuda"]["built"]:
            raise Unrecognised(f"{name} is on cuda, which this build has no kernels for")
        if device not in ("cpu", "cuda", "meta"):
            raise Unrecognised(f"{name} is on {device}, which this library has no kernels for")


@contextmanager
def leaving_what_raises() -> Iterator[None]:
    """Raises Unrecognised for any exception: the code of a model's class runs within, its
    attributes' __eq__ and its own __setattr__ for instance, and may raise anything."""
    try:
        yield
    except Unrecognised:
        raise
    except Exception as error:
        raise Unrecognised(f"its class or attributes raise {error_text(error)}") from error


def _require_replaceable(module: Module) -> None:
    """Raises Unrecognised for a module whose formula may be known and cannot be replaced."""
    if isinstance(module, RMSNorm):
        raise Unrecognised("it is this library's")
    if _is_derived(type(module)) and _NORM in vars(module):
        raise Unrecognised("it was replaced before")
    if not _forward_is_reached(module):
        raise Unrecognised("its forward was replaced by somebody else")
    require_supported(module)


def _forward_is_reached(module: Module) -> bool:
    """Whether a call comes to the forward of the module's class, through hooks of accelerate or
    without."""
    members = vars(module)
    own = "_old_forward" if {"_hf_hook", "_old_forward"} <= members.keys() else "forward"
    return own not in members or _is_method(members[own], type(module).forward, module)


@dataclass(frozen=True)
class ReplacedNorm:
    """A module that this library computes now.

    Attributes:
        name: Of the module, as in model.named_modules().
        module: It.
        kind: The name of its class.
        formula: What it computes. T is the dtype of x, x32 = float32(x), w its weight, and
            r = 1/sqrt(mean(x32**2) + eps).
        eps: As it is added to the mean square; None: torch's default for the dtype.
    """

    name: str
    module: Module
    kind: str
    formula: str
    eps: float | None


@dataclass(frozen=True)
class LeftNorm:
    """A module that was left as it is, and why."""

    name: str
    module: Module
    kind: str
    reason: str


@final
class Report:
    """What replace_rms_norms did, for reading (print it) and for undoing it.

    As a context manager it undoes the replacement at the end of the block.

    Attributes:
        replaced: The modules that this library computes now.
        left: The norms that it does not, each with the reason. Norms of torch that subtract a
            mean are in neither list.
    """

    def __init__(self, replaced: Iterable[ReplacedNorm], left: Iterable[LeftNorm]) -> None:
        self.replaced = tuple(replaced)
        self.left = tuple(left)
        self._undone = False

    def undo(self) -> None:
        """Gives every replaced module its own forward back. A second call does nothing.

        What others have put on a module since stays: parametrizations, hooks, classes derived from
        the module's. Copies of the model that were made since are not undone.
        """
        if not self._undone:
            _restore_all(norm.module for norm in self.replaced)
        self._undone = True

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} norms replaced, {len(self.left)} left"]
        lines += _summary((n.name, f"{n.kind}: {n.formula}, eps={n.eps}") for n in self.replaced)
        lines += _summary((n.name, f"{n.kind} left: {n.reason}") for n in self.left)
        return "\n".join(lines)


def _summary(norms: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each text, with the names that share it, layers of a model taken together."""
    names = defaultdict(list)
    for name, text in norms:
        names[text].append(re.sub(r"\b\d+\b", "*", name))
    return [
        f"  {len(group)} {text} ({', '.join(dict.fromkeys(group))})"
        for text, group in names.items()
    ]


def _may_be_rms_norm(module: Module) -> bool:
    if isinstance(module, _OTHER_NORMS):
        return False
    is_leaf = next(module.children(), None) is None
    looked_for = "norm" if is_leaf else "rmsnorm"
    return any(looked_for in kind.__name__.lower() for kind in type(module).__mro__)


def replace_rms_norms(model: Module) -> Report:
    """Lets this library compute the RMSNorm modules of a model, transformers' and torch's.

    The modules stay where they are, with their parameters, hooks, state dict, dtype and device;
    only their forward is another. A module is replaced if running its forward on tensors without
    storage shows one of the known formulas, with its roundings and its dtypes of results, and
    nothing else, for every combination of float16, bfloat16 and float32, in training and evaluation,
    with gradients and without, and under autocast for CUDA; what it does for particular sizes
    alone, or to global variables, is not seen. The names of its class and of those that it derives
    from only tell where to look. Everything else is left, and the report says why. Results differ
    from the original's by the last bits of 1/sqrt(mean(x**2) + eps), except that float64 input is
    computed in float64 throughout, where most models go through float32.

    eps is read now: changing the attribute later has no effect. Call it before torch.compile. A
    call with what this library refuses, as integers are, is computed by the module's own forward.
    The modules can be copied and pickled, and are replaced in the copy too.

    Args:
        model: Any module; itself and all modules in it are looked at.

    Returns:
        A Report; it can undo the replacement, at the end of a ``with`` block or by ``undo()``.

    Raises:
        TypeError: model is not a torch.nn.Module.

    An exception that is no Exception, as KeyboardInterrupt, leaves the model as it was.

    Examples:
        >>> import torch
        >>> import rmsnorm.torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
        >>> with rmsnorm.torch.replace_rms_norms(model) as report:
        ...     y = model(torch.ones(2, 8))
        >>> len(report.replaced), len(report.left)
        (1, 0)
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type_text(model)}")
    recognition = Recognition()
    replaced, left = [], []
    begun: list[Module] = []
    try:
        for name, module in model.named_modules():
            kind = type(module).__name__
            try:
                with leaving_what_raises():
                    if not _may_be_rms_norm(module):
                        continue
                    _require_replaceable(module)
                    _restore(module)  # An undo may have left the class, beneath what is gone now.
                    norm = recognition.of(module)
                    begun.append(module)
                    _replace(module, norm)
            except Unrecognised as error:
                left.append(LeftNorm(name, module, kind, str(error)))
            else:
                replaced.append(ReplacedNorm(name, module, kind, norm.formula.text, norm.eps))
    except BaseException:  # KeyboardInterrupt, or of what lists the modules
        with suppress(Exception):
            _restore_all(begun)
        raise
    return Report(replaced, left)
