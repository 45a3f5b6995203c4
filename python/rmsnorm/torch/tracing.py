"""The forward of a module, run on tensors without storage in all the circumstances that count."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch._C._autograd import _saved_tensors_hooks_set_tracing
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, Parameter
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from .recorder import Expression, Recorder, Unrecognised


@dataclass(frozen=True)
class Trace:
    """What a forward is run with: x and parameters, and the state of module and torch.

    Attributes:
        x: The dtype of x.
        weight: The dtype of the parameters.
        sizes: Those of x ahead of the last one.
        width: The last one, where the module has no parameters that give it.
        contiguous: Whether x is.
        x_requires_grad: Whether x does, if the mode allows it.
        weight_requires_grad: Whether the parameters do.
        mode: torch.enable_grad, torch.no_grad or torch.inference_mode.
        training: The mode of the module.
        autocast: The device that it is enabled for; on "cuda" tensors say that they are there.
    """

    x: torch.dtype = torch.bfloat16
    weight: torch.dtype = torch.bfloat16
    sizes: tuple[int, ...] = (2, 3)
    width: int = 8
    contiguous: bool = True
    x_requires_grad: bool = True
    weight_requires_grad: bool = True
    mode: Callable[[], AbstractContextManager[Any]] = torch.enable_grad
    training: bool = False
    autocast: str | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.autocast == "cuda" else "cpu"


@contextmanager
def apart() -> Iterator[None]:
    """Takes away what the caller has put around torch's operations: modes, a default device among
    them, transforms of torch.func, and hooks on what is saved for backward, as checkpoints have."""
    with (
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        ExitStack() as stack,
    ):
        for _ in range(_len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        hooks_were_off = _saved_tensors_hooks_set_tracing(True)
        stack.callback(_saved_tensors_hooks_set_tracing, hooks_were_off)
        yield


@contextmanager
def _prepared(trace: Trace) -> Iterator[None]:
    """Tensors that are made within have no storage, and torch is as the trace wants it.

    torch logs each operation that is refused such tensors, where the report says it of the norm.
    """
    before = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
    log = logging.getLogger(FakeTensorMode.__module__)
    log_was_disabled, log.disabled = log.disabled, True
    with (
        warnings.catch_warnings(),
        FakeTensorMode(),
        torch.inference_mode(False),
        trace.mode(),
    ):
        warnings.simplefilter("ignore")
        try:
            for device, _ in before:
                torch.set_autocast_enabled(device, device == trace.autocast)
            yield
        finally:
            log.disabled = log_was_disabled
            for device, enabled in before:
                torch.set_autocast_enabled(device, enabled)


def _x(trace: Trace, size: int) -> Tensor:
    shape = (*trace.sizes, size)
    x = torch.empty(
        shape if trace.contiguous else shape[::-1],
        dtype=trace.x,
        device=trace.device,
        requires_grad=trace.x_requires_grad,
    )
    if not trace.contiguous:
        x = x.permute(*reversed(range(x.dim())))
    return x.clone()  # A leaf of autograd could not be written to, and x is seldom one.


def _record(forward: Callable[..., Any], x: Tensor, parameters: Mapping[str, Tensor]) -> Expression:
    recorder = Recorder(x, parameters)
    with recorder:
        y = forward(x)
    return recorder.result(y)


def expression_of_definition(
    definition: Callable[..., Tensor], names: Iterable[str], trace: Trace, **arguments: Any
) -> Expression:
    """What a function of x and of parameters with these names computes."""
    with _prepared(trace):
        parameters = {
            name: torch.empty(trace.width, dtype=trace.weight, device=trace.device)
            for name in names
        }
        return _record(
            partial(definition, **arguments, **parameters), _x(trace, trace.width), parameters
        )


def _twin(module: Module, trace: Trace) -> tuple[Module, dict[str, Tensor]]:
    """A module of the same class and attributes, whose parameters and buffers have no storage."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    twin.__dict__["training"] = trace.training

    def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(tensor.shape), dtype=dtype, device=trace.device)

    parameters = {
        name: None if p is None else Parameter(like(p, trace.weight), trace.weight_requires_grad)
        for name, p in module._parameters.items()
    }
    buffers = {
        name: None if buffer is None else like(buffer, buffer.dtype)
        for name, buffer in module._buffers.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers)
    return twin, {name: p for name, p in parameters.items() if p is not None}


def _size(module: Module, trace: Trace) -> int:
    """That of a module's parameters, or the trace's if it has none."""
    sizes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
    if len(sizes) > 1 or any(len(shape) != 1 for shape in sizes):
        raise Unrecognised(f"its parameters are of shape {', '.join(map(str, sorted(sizes)))}")
    (size,) = sizes.pop() if sizes else (trace.width,)
    return size


def _attributes(twin: Module) -> dict[str, Any]:
    return {**vars(twin), **twin._parameters, **twin._buffers}


def _require_unchanged(twin: Module, before: Mapping[str, Any]) -> None:
    after = _attributes(twin)
    for name in before.keys() | after.keys():
        if name not in before or name not in after or after[name] is not before[name]:
            raise Unrecognised(f"its forward sets its attribute {name}")


def error_text(error: Exception) -> str:
    kind = type(error).__name__
    with suppress(Exception):  # of the __str__ of somebody else's class
        return f"{kind}: {error}"
    return kind


def expression_of_forward(module: Module, trace: Trace) -> Expression:
    """What the forward of a module's class computes.

    Raises:
        Unrecognised: It cannot be run, or does more than that.
    """
    size = _size(module, trace)
    try:
        with _prepared(trace):
            twin, parameters = _twin(module, trace)
            before = _attributes(twin)
            forward = partial(type(module).forward, twin)
            expression = _record(forward, _x(trace, size), parameters)
            _require_unchanged(twin, before)
            return expression
    except Unrecognised:
        raise
    # The forward of any class may raise anything when it is run on tensors without storage.
    except Exception as error:
        raise Unrecognised(f"its forward cannot be traced: {error_text(error)}") from error


# The types whose contents may change, the more special ones first.
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
# Longer ones are compared, and not what is in their elements: they are data, such as a vocabulary.
_LONGEST = 1000


class _Contents:
    """What is in a container, as it was."""

    def __init__(self, name: str, container: Any) -> None:
        self.name = name  # of the attribute that it was found in
        self._container = container
        self._kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
        self._before = self._now()

    def _now(self) -> list[Any]:
        # By the type's own functions: what a derived class makes of them is not what is stored.
        if issubclass(self._kind, dict):
            return list(self._kind.items(self._container))
        return list(self._kind.__iter__(self._container))

    def parts(self) -> Iterable[Any]:
        if len(self._before) > _LONGEST:
            return ()
        if issubclass(self._kind, dict):
            return [value for _, value in self._before]
        return self._before

    def changed(self) -> bool:
        return _identities(self._kind, self._before) != _identities(self._kind, self._now())

    def restore(self) -> None:
        self._kind.clear(self._container)
        extend = self._kind.extend if hasattr(self._kind, "extend") else self._kind.update
        extend(self._container, self._before)


def _identities(kind: Any, contents: list[Any]) -> list[Any]:
    if issubclass(kind, dict):
        return [(id(key), id(value)) for key, value in contents]
    return [id(value) for value in contents]


def _own_classes(module: Module) -> list[type]:
    """Those that a module's class is made of, but for torch's."""
    return [
        kind
        for kind in type(module).__mro__
        if kind is not object and str(kind.__module__).split(".")[0] != "torch"
    ]


def _class_attributes(kind: type) -> dict[str, Any]:
    """But for what Python and this library keep there."""
    kept = ("__", "_rmsnorm")
    return {name: value for name, value in vars(kind).items() if not name.startswith(kept)}


class State:
    """What a forward may keep beside its result and in place of its module's attributes: what is in
    the containers that these are, and the attributes of its classes.

    What is in other objects is not looked at. Those are shared, as a configuration or a logger is,
    and another thread may change them meanwhile.
    """

    def __init__(self, module: Module) -> None:
        self._classes = [(kind, _class_attributes(kind)) for kind in _own_classes(module)]
        self._contents: list[_Contents] = []
        seen: set[int] = set()
        values = list(vars(module).items())
        values += [item for _, attributes in self._classes for item in attributes.items()]
        while values:
            name, value = values.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, tuple):
                values += [(name, part) for part in value]
            elif isinstance(value, _CONTAINERS):
                contents = _Contents(name, value)
                self._contents.append(contents)
                values += [(name, part) for part in contents.parts()]

    def restore(self) -> str | None:
        """Puts back what was changed; the name of an attribute where that was the case."""
        changed = None
        for contents in self._contents:
            if contents.changed():
                contents.restore()
                changed = contents.name
        for kind, before in self._classes:
            after = _class_attributes(kind)
            for name in before.keys() | after.keys():
                if name not in before:
                    delattr(kind, name)
                elif name not in after or after[name] is not before[name]:
                    setattr(kind, name, before[name])
                else:
                    continue
                changed = name
        return changed
