"""What wrong keywords and positions are answered with, and that no message echoes long values."""

import difflib
import numbers
import re
import sys

import dlpack_producer
import jax.numpy as jnp
import numpy as np
import pytest
import rmsnorm
import rmsnorm.jax
from floats import F32

X = np.ones((2, 8), F32)
WEIGHT = np.ones(8, F32)

CALLS = {
    "rms_norm": (X,),
    "add_rms_norm": (X, X),
    "rms_norm_backward": (X, X),
    "mean_square": (X,),
    "rms_norm_apply": (X, np.ones(2, F32)),
    "set_num_threads": (1,),
}

OTHER_NAMES = [
    *[("rms_norm", name, "eps") for name in ("epsilon", "variance_epsilon", "norm_eps", "Eps")],
    *[("rms_norm", name, "axis") for name in ("dim", "normalized_shape", "axes", "axs")],
    *[("rms_norm", name, "weight") for name in ("gamma", "scale", "weights", "wieght")],
    ("rms_norm", "beta", "bias"),
    ("rms_norm", "dtype", "out_dtype"),
    ("rms_norm", "zero_centered_gamma", "weight_offset"),
    ("rms_norm", "roundng", "rounding"),
    ("rms_norm", "hidden_states", "x"),
    ("add_rms_norm", "residuals", "residual"),
    ("add_rms_norm", "epsilon", "eps"),
    ("rms_norm_backward", "grad_output", "dy"),
    ("rms_norm_backward", "rsigma", "rstd"),
    ("rms_norm_apply", "variance", "mean_square"),
    ("mean_square", "output", "out"),
    ("set_num_threads", "num_threads", "n"),
]


def message_of(exception, call, *arguments, **keywords):
    with pytest.raises(exception) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize("name, keyword, meant", OTHER_NAMES)
def test_the_right_keyword_is_named(name, keyword, meant):
    text = message_of(TypeError, getattr(rmsnorm, name), *CALLS[name], **{keyword: 1e-5})
    assert text.startswith(f"{keyword}: is no argument of {name}; did you mean {meant}? ")
    assert text.index("did you mean") < text.index("Expected one of: ")


def test_a_long_keyword_is_compared_with_no_name(monkeypatch):
    """That takes seconds for a megabyte."""
    asked = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda *arguments: asked.append(1) or [])
    for length in (63, 64, 65, 10**6):
        text = message_of(TypeError, rmsnorm.rms_norm, X, **{"e" * length: 1})
        assert "is no argument of rms_norm" in text
    assert len(asked) == 2


def test_a_keyword_like_no_other():
    text = message_of(TypeError, rmsnorm.mean_square, X, qqqqqqqq=1)
    assert text == "qqqqqqqq: is no argument of mean_square. Expected one of: x, out, stream"
    text = message_of(TypeError, rmsnorm.mean_square, X, epsilon=1)
    assert "did you mean eps" not in text
    text = message_of(TypeError, rmsnorm.info, x=X)
    assert text == "x: is no argument of info. Expected no argument"
    for keyword in ("\ud800", "ε", "a\0b", ""):
        assert "is no argument of rms_norm" in message_of(
            TypeError, rmsnorm.rms_norm, X, **{keyword: 1}
        )


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ((X, WEIGHT, 1e-5), r"^bias\b.*got float\b.*rms_norm\(x, weight, eps=1e-05\)$"),
        ((X, 1e-5), r"^weight\b.*got float\b.*rms_norm\(x, eps=1e-05\)$"),
        ((X, None, np.float32(0.5)), r"^bias\b.*numpy.float32.*rms_norm\(x, weight, eps=0.5\)$"),
        ((X, WEIGHT, -1), r"^bias\b.*got int\b.*rms_norm\(x, weight, axis=-1\)$"),
        (
            (X, WEIGHT, None, 1e-5),
            r"^rms_norm: .*3 arguments .* \(x, weight, bias\), got 4; by keyword come eps, .*as in rms_norm\(x, weight, bias, eps=1e-05\)$",
        ),
        ((X, (8,), WEIGHT, 1e-5), r"^rms_norm: .*got 4.*eps=1e-05"),
    ],
)
def test_numbers_by_position(arguments, hint):
    assert re.search(hint, message_of(TypeError, rmsnorm.rms_norm, *arguments))


def test_numbers_by_position_in_other_functions():
    text = message_of(TypeError, rmsnorm.rms_norm_backward, X, X, WEIGHT, 1e-5)
    assert re.search(r"^rstd\b.*rms_norm_backward\(dy, x, weight, eps=1e-05\)$", text)
    text = message_of(TypeError, rmsnorm.add_rms_norm, X, X, WEIGHT, 1e-5)
    assert re.search(r"^bias\b.*add_rms_norm\(x, residual, weight, eps=1e-05\)$", text)
    text = message_of(TypeError, rmsnorm.mean_square, X, 1e-5)
    assert re.search(r"^mean_square: .*at most 1 .*got 2; by keyword come out, stream$", text)
    assert message_of(TypeError, rmsnorm.info, 1).endswith(
        "expected at most 0 arguments by position, got 1"
    )
    # another fault comes first, as before
    assert message_of(TypeError, rmsnorm.rms_norm, X, eps="1").startswith("eps: expected a number")
    assert message_of(ValueError, rmsnorm.rms_norm, X, axis=7).startswith("axis: ")


def test_numbers_by_position_in_jax():
    text = message_of(TypeError, rmsnorm.jax.rms_norm, jnp.ones((2, 8)), None, 1e-5)
    assert text.startswith(
        "bias: expected a JAX or NumPy array, got float; options come by keyword: eps=1e-05"
    )


def test_given_twice():
    text = message_of(TypeError, rmsnorm.rms_norm, X, x=X)
    assert text == "x: was given to rms_norm by position and by keyword"
    text = message_of(TypeError, rmsnorm.rms_norm, X, None, weight=None)
    assert text.startswith("weight: was given to rms_norm by position and by keyword")


# ---- values in messages ----


class LongRepr:
    def __repr__(self):
        return "long " * 100_000

    __str__ = __repr__


class FailingRepr:
    def __repr__(self):
        raise ValueError("this repr fails")

    __str__ = __repr__


class NoText:
    def __repr__(self):
        return 3

    __str__ = __repr__


def long_name(name):
    return type(name * 100_000, (), {})()


MEGABYTE = "x" * 2**20

STRANGE = {
    "megabyte": MEGABYTE,
    "surrogate": "\ud800",
    "megabyte of surrogates": "\udfff" * 2**18,
    "NUL": "a\0b",
    "long repr": LongRepr(),
    "failing repr": FailingRepr(),
    "no text": NoText(),
    "long class name": long_name("K"),
    "huge integer": 10**6000,
    "long bytes": b"y" * 2**20,
    "class": LongRepr,
}

PLACES = {
    "out_dtype": lambda value: rmsnorm.rms_norm(X, out_dtype=value),
    "rounding": lambda value: rmsnorm.rms_norm(X, rounding=value),
    "eps": lambda value: rmsnorm.rms_norm(X, eps=value),
    "axis": lambda value: rmsnorm.rms_norm(X, axis=value),
    "partial": lambda value: rmsnorm.rms_norm(X, partial=value),
    "return_rstd": lambda value: rmsnorm.rms_norm(X, return_rstd=value),
    "x": lambda value: rmsnorm.rms_norm(value),
    "weight": lambda value: rmsnorm.rms_norm(X, value),
    "out": lambda value: rmsnorm.rms_norm(X, out=value),
    "stream": lambda value: rmsnorm.rms_norm(X, stream=value),
    "n": lambda value: rmsnorm.set_num_threads(value),
    "epsilon": lambda value: rmsnorm.rms_norm(X, epsilon=value),
    "rms_norm": lambda value: rmsnorm.rms_norm(X, None, None, value),
    "bias": lambda value: rmsnorm.rms_norm(X, None, value),
    "jax rounding": lambda value: rmsnorm.jax.rms_norm(jnp.ones((2, 8)), rounding=value),
    "jax out_dtype": lambda value: rmsnorm.jax.rms_norm(jnp.ones((2, 8)), out_dtype=value),
    "jax axis": lambda value: rmsnorm.jax.rms_norm(jnp.ones((2, 8)), axis=value),
}


@pytest.mark.parametrize("value", STRANGE)
@pytest.mark.parametrize("place", PLACES)
def test_strange_values(place, value):
    text = message_of((TypeError, ValueError), PLACES[place], STRANGE[value])
    assert text.startswith(place.removeprefix("jax ")) and len(text) < 500
    text.encode()  # whatever came, the message can be printed


@pytest.mark.parametrize("keyword", [MEGABYTE, "\ud800" * 2**18])
def test_strange_keywords(keyword):
    text = message_of(TypeError, rmsnorm.rms_norm, X, **{keyword: 1})
    assert "is no argument of rms_norm" in text and len(text) < 700
    text.encode()


def test_numbers_that_are_almost_right():
    text = message_of(ValueError, rmsnorm.rms_norm, X, partial=1.0000001)
    assert text == "partial: expected a number in (0, 1], got 1.0000001"
    statistic = np.ones(len(X), np.float32)
    options = {"mean_square": statistic, "partial": 0.9999999}
    text = message_of(ValueError, rmsnorm.rms_norm_backward, X, X, **options)
    assert text == "partial: 0.9999999 was given with mean_square; expected 1"


def test_an_array_that_is_registered_as_a_number():
    class Both(dlpack_producer.Producer):
        pass

    numbers.Number.register(Both)
    text = message_of(TypeError, rmsnorm.rms_norm, X.astype(int), Both(X[0]))
    assert text.startswith("x: expected dtype")


def test_a_keyword_that_comes_twice():
    class Other(str):
        """Of another hash, so that a dictionary holds both."""

        __hash__ = object.__hash__

    text = message_of(TypeError, rmsnorm.rms_norm, X, **{Other("eps"): 1e3, "eps": 0.0})
    assert text == "eps: was given to rms_norm twice by keyword"


def test_long_numbers_and_long_shapes():
    for number in (10**79, 10**4000, 1e-5):
        text = message_of(TypeError, rmsnorm.rms_norm_backward, X, X, None, None, number)
        assert text.startswith("rms_norm_backward: expected at most 4") and len(text) < 310
    ones = np.ones((1,) * 64, np.float32)
    text = message_of(ValueError, rmsnorm.rms_norm, ones, np.ones(2, np.float32))
    assert text.startswith("weight: expected shape (1,), or with leading dimensions that broadcast")
    assert "1, ...), 64 dimensions, got (2,)" in text and len(text) < 310
    many = np.broadcast_to(F32.type(1), (2,) * 32)
    text = message_of(ValueError, rmsnorm.rms_norm, ones, many, axis=-32)
    assert text.startswith("weight: expected shape (1, 1") and len(text) < 310
    wide = np.lib.stride_tricks.as_strided(X, (2**14,) * 4, (0,) * 4)
    text = message_of(ValueError, rmsnorm.rms_norm, X, out=wide)
    assert "got (16384, 16384, 16384, 16384)" in text and len(text) < 310


def test_dtypes_of_long_names():
    fields = np.dtype([(f"field{i}", "f4") for i in range(10_000)])
    text = message_of(TypeError, rmsnorm.rms_norm, np.zeros(3, fields))
    assert text.startswith("x: expected dtype float16") and len(text) < 300

    class Producer:
        dtype = FailingRepr()

        def __dlpack__(self, **options):
            return np.ones(3, np.int32).__dlpack__(**options)

        def __dlpack_device__(self):
            return (1, 0)

    assert message_of(TypeError, rmsnorm.rms_norm, Producer()).startswith("x: expected dtype")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupts_while_a_value_is_shown(interrupt):
    class Interrupting:
        def __repr__(self):
            raise interrupt

    with pytest.raises(interrupt):
        rmsnorm.rms_norm(X, out_dtype=Interrupting())


def test_objects_that_look_like_dtypes():
    for name, module in (("dtype", "torch"), ("dtype[float32]", "numpy"), ("x", "jax.numpy")):
        for attributes in ({}, {"name": 3, "isnative": 1}, {"__name__": "\ud800"}):
            lookalike = type(name, (), {"__module__": module, **attributes})()
            text = message_of((TypeError, ValueError), rmsnorm.rms_norm, X, out_dtype=lookalike)
            assert text.startswith("out_dtype: expected float16")


def test_the_messages_fit_a_line_of_a_log():
    assert sys.getsizeof(message_of(TypeError, rmsnorm.rms_norm, [1.0] * 10**6)) < 400
