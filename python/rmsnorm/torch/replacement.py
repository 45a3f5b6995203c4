"""replace_rms_norms: the norms of a model computed by this library, and back."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import rmsnorm

from .modules import RMSNorm
from .recognition import Norm, Recognition, Unrecognised

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Norms that are none of the root mean square.
_OTHER_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.LocalResponseNorm,
    torch.nn.modules.batchnorm._NormBase,
)


class _Replaced:
    """What a class inherits ahead of a model's own, so that only its forward is another."""

    _rmsnorm_original: ClassVar[type[Module]]
    _rmsnorm_norm: ClassVar[Norm]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made here have no name that pickle could find.
        reduced: Any = super().__reduce_ex__(protocol)
        make, (_, *arguments), *rest = reduced
        return _new, (make, self._rmsnorm_original, self._rmsnorm_norm, *arguments), *rest


def _new(make: Callable[..., Any], original: type[Module], norm: Norm, *arguments: Any) -> Any:
    return make(_replaced_class(original, norm), *arguments)


_classes: dict[tuple[type[Module], Norm], type[Module]] = {}


def _replaced_class(original: type[Module], norm: Norm) -> type[Module]:
    """One class for all modules of a kind, which torch.compile then compiles once."""
    if (original, norm) not in _classes:
        _classes.setdefault((original, norm), _derived_class(original, norm))
    return _classes[original, norm]


def _derived_class(original: type[Module], norm: Norm) -> type[Module]:
    signature = inspect.signature(original.forward)
    _, argument = signature.parameters

    def forward(self: Module, *inputs: Tensor, **named: Tensor) -> Tensor:
        if len(inputs) + len(named) != 1 or not named.keys() <= {argument}:
            raise TypeError(f"forward: expected one argument, {argument}")
        x = inputs[0] if inputs else named[argument]
        return norm.compute(self, x)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_rmsnorm_original": original,
        "_rmsnorm_norm": norm,
        "forward": forward,
    }
    return type(original.__name__, (_Replaced, original), members)


def require_supported(module: Module) -> None:
    """Raises Unrecognised for a module with parameters that this library cannot work on."""
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not Parameter:
            raise Unrecognised(f"{name} is a {type(parameter).__name__}")
        if parameter.dtype not in _DTYPES:
            raise Unrecognised(f"{name} is of dtype {str(parameter.dtype).removeprefix('torch.')}")
        device = parameter.device.type
        if device == "cuda" and not rmsnorm.info()["cuda"]["built"]:
            raise Unrecognised(f"{name} is on cuda, which this build has no kernels for")
        if device not in ("cpu", "cuda", "meta"):
            raise Unrecognised(f"{name} is on {device}, which this library has no kernels for")


def _require_replaceable(module: Module) -> None:
    """Raises Unrecognised for a module whose formula may be known and cannot be replaced."""
    if isinstance(module, RMSNorm):
        raise Unrecognised("it is this library's")
    if isinstance(module, _Replaced):
        raise Unrecognised("it was replaced before")
    if "forward" in vars(module):
        raise Unrecognised("its forward was replaced by somebody else")
    require_supported(module)


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

    def undo(self) -> None:
        """Gives every replaced module its own forward back. A second call does nothing."""
        for norm in self.replaced:
            kind = type(norm.module)
            if issubclass(kind, _Replaced):
                norm.module.__class__ = kind._rmsnorm_original

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
    name = type(module).__name__.lower()
    is_leaf = next(module.children(), None) is None
    return "norm" in name if is_leaf else "rmsnorm" in name


def replace_rms_norms(model: Module) -> Report:
    """Lets this library compute the RMSNorm modules of a model, transformers' and torch's.

    The modules stay where they are, with their parameters, hooks, state dict, dtype and device;
    only their forward is another. A module is replaced if running its forward on tensors without
    storage shows one of the known formulas, with its roundings and its dtypes of results, for
    every combination of float16, bfloat16 and float32; the name of its class only tells where to
    look. Everything else is left, and the report says why. Results differ from the
    original's by the last bits of 1/sqrt(mean(x**2) + eps), except that float64 input is computed
    in float64 throughout, where most models go through float32.

    eps is read now: changing the attribute later has no effect. Call it before torch.compile.
    The modules can be copied and pickled, and are replaced in the copy too.

    Args:
        model: Any module; itself and all modules in it are looked at.

    Returns:
        A Report; it can undo the replacement, at the end of a ``with`` block or by ``undo()``.

    Raises:
        TypeError: model is not a torch.nn.Module.

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
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    recognition = Recognition()
    replaced, left = [], []
    for name, module in model.named_modules():
        if not _may_be_rms_norm(module):
            continue
        kind = type(module).__name__
        try:
            _require_replaceable(module)
            norm = recognition.of(module)
        except Unrecognised as error:
            left.append(LeftNorm(name, module, kind, str(error)))
            continue
        replaced.append(ReplacedNorm(name, module, kind, norm.formula.text, norm.eps))
        module.__class__ = _replaced_class(type(module), norm)
    return Report(replaced, left)
