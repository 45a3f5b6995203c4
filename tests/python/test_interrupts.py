"""Exceptions from code of the caller's that runs while a call is read.

What is no Exception (Ctrl-C, SystemExit) passes through as it is. Any other becomes a TypeError or
ValueError that names the argument, and is kept as its cause.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import rmsnorm
import rmsnorm.jax
from floats import F32
from hostile_arrays import Producer


class Custom(BaseException):
    pass


INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit, Custom)
FAILURES = (RuntimeError, ValueError, TypeError, KeyError, OSError, ReferenceError)


class Option:
    """Raises where it is asked for a number."""

    def __init__(self, error):
        self.error = error

    def _fail(self):
        raise self.error

    __float__ = __index__ = __len__ = _fail


def array(error, *names):
    """A producer whose methods or attributes of these names raise."""

    def fail(self, *args, **options):
        raise error

    members = {n.rstrip("!"): property(fail) if n.endswith("!") else fail for n in names}
    return type("Failing", (Producer,), members)(np.ones((3, 8), F32))


def failing_getattr(error, name):
    class Failing:
        def __getattr__(self, asked):
            if asked == name:
                raise error
            return lambda **options: (1, 0)

    return Failing()


class Pair:
    def __init__(self, error, member):
        self.error, self.member = error, member

    def __len__(self):
        if self.member == "len":
            raise self.error
        return 2

    def __getitem__(self, index):
        if self.member == "item":
            raise self.error
        return Option(self.error)


def on_device(pair):
    return Producer(np.ones((3, 8), F32), device=pair)


def claiming(error):
    def fail(self):
        raise error

    return type("Claiming", (), {"__class__": property(fail)})()


def dtype_like(error):
    def fail(self):
        raise error

    return type("dtype", (), {"__module__": "numpy", "isnative": property(fail)})()


X = np.ones((3, 8), F32)

# How the argument of that name raises an exception.
HOOKS = {
    "eps.__float__": ("eps", Option),
    "weight_offset.__float__": ("weight_offset", Option),
    "partial.__float__": ("partial", Option),
    "axis.__index__": ("axis", Option),
    "__dlpack__": ("x", lambda e: array(e, "__dlpack__")),
    "__dlpack__ of weight": ("weight", lambda e: array(e, "__dlpack__")),
    "__dlpack__ of bias": ("bias", lambda e: array(e, "__dlpack__")),
    "__dlpack__ of out": ("out", lambda e: array(e, "__dlpack__")),
    "the attribute __dlpack__": ("x", lambda e: array(e, "__dlpack__!")),
    "the attribute __dlpack__ by __getattr__": ("x", lambda e: failing_getattr(e, "__dlpack__")),
    "__dlpack_device__": ("x", lambda e: array(e, "__dlpack_device__")),
    "the attribute __dlpack_device__": ("out", lambda e: array(e, "__dlpack_device__!")),
    "the device's number": ("x", lambda e: on_device((1, Option(e)))),
    "the device's type": ("weight", lambda e: on_device((Option(e), 0))),
    "the length of the device": ("x", lambda e: on_device(Pair(e, "len"))),
    "the members of the device": ("x", lambda e: on_device(Pair(e, "item"))),
    "__array_namespace__": ("x", lambda e: array(e, "__array_namespace__")),
    "the attribute __array_namespace__": ("x", lambda e: array(e, "__array_namespace__!")),
    "__class__": ("x", claiming),
    "__class__ of weight": ("weight", claiming),
    "isnative of out_dtype": ("out_dtype", dtype_like),
}


@pytest.mark.parametrize("kind", INTERRUPTS)
@pytest.mark.parametrize("hook", HOOKS)
def test_interrupts_pass_through(hook, kind):
    argument, make = HOOKS[hook]
    interrupt = kind("pressed")
    with pytest.raises(kind) as caught:
        rmsnorm.rms_norm(**{"x": X, argument: make(interrupt)})
    assert caught.value is interrupt and interrupt.__cause__ is None


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("hook", HOOKS)
def test_failures_name_the_argument_and_keep_the_cause(hook, kind):
    argument, make = HOOKS[hook]
    failure = kind("of the caller's code")
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b") as caught:
        rmsnorm.rms_norm(**{"x": X, argument: make(failure)})
    assert failure in causes(caught.value.__cause__)


class Text(str):
    """Raises where it is written into a message."""

    def __repr__(self):
        raise self.error


class Meta(type):
    def __getattribute__(cls, name):
        if name in ("__qualname__", "__module__"):
            raise type.__getattribute__(cls, "error")
        return type.__getattribute__(cls, name)


def unnamed(error):
    return Meta("Unnamed", (), {"error": error})()


def text(error):
    string = Text("no such name")
    string.error = error
    return string


# What raises while a message is written.
MESSAGES = {
    "repr of rounding": ("rounding", text),
    "repr of out_dtype": ("out_dtype", text),
    "type of x": ("x", unnamed),
    "type of eps": ("eps", unnamed),
    "type of axis": ("axis", unnamed),
    "type of return_rstd": ("return_rstd", unnamed),
    "type of out_dtype": ("out_dtype", unnamed),
}


@pytest.mark.parametrize("hook", MESSAGES)
def test_interrupts_of_messages(hook):
    argument, make = MESSAGES[hook]
    interrupt = KeyboardInterrupt("pressed")
    with pytest.raises(KeyboardInterrupt) as caught:
        rmsnorm.rms_norm(**{"x": X, argument: make(interrupt)})
    assert caught.value is interrupt


@pytest.mark.parametrize("hook", MESSAGES)
def test_messages_about_what_cannot_be_written(hook):
    argument, make = MESSAGES[hook]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected"):
        rmsnorm.rms_norm(**{"x": X, argument: make(ZeroDivisionError("in a repr"))})


def test_an_integer_too_long_to_be_written():
    with pytest.raises(ValueError, match=r"^axis: expected an integer of 32 bits"):
        rmsnorm.rms_norm(X, axis=10**5000)


@pytest.mark.parametrize("option", ["eps", "partial", "weight_offset", "axis"])
def test_options_of_rmsnorm_jax(option):
    x = jnp.ones((3, 8))
    with pytest.raises(KeyboardInterrupt):
        rmsnorm.jax.rms_norm(x, x[0], **{option: Option(KeyboardInterrupt())})
    failure = ZeroDivisionError("of the caller's code")
    with pytest.raises(TypeError, match=rf"^{option}\b") as caught:
        rmsnorm.jax.rms_norm(x, x[0], **{option: Option(failure)})
    assert caught.value.__cause__ is failure
