"""Wrong calls: the exception's type, what its message names, and that nothing was written."""

import re

import floats
import numpy as np
import pytest
import rmsnorm
import torch
from floats import F32, F64
from numpy.lib.stride_tricks import as_strided
from wrong_calls import CALLS, TABLE, arranged


@pytest.mark.parametrize("name", TABLE)
def test_wrong_call(name):
    operation, changes, exception, pattern = TABLE[name]
    function, arguments = arranged(operation, changes)
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    before = {k: v.tobytes() for k, v in arrays.items() if v.dtype != object}
    with pytest.raises(exception) as caught:
        function(**arguments)
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)
    for key, old in before.items():
        assert arrays[key].tobytes() == old, f"{key} was written"


@pytest.mark.parametrize("operation", CALLS)
def test_the_call_that_they_start_from_is_right(operation):
    function, arguments = arranged(operation, {})
    function(**arguments)
    for name, array in arguments.items():
        assert "out" not in name or not (array == 7).any(), name


def test_positional_options_are_refused():
    x = np.ones((3, 8), F32)
    with pytest.raises(TypeError):
        rmsnorm.rms_norm(x, None, None, 1e-6)
    with pytest.raises(TypeError):
        rmsnorm.rms_norm()
    with pytest.raises(TypeError):
        rmsnorm.mean_square(x, np.ones(3, F32))


def test_where_an_overlap_would_be_allowed():
    x, ones = np.ones((2, 9), F32), np.ones((2, 8), F32)
    here, behind = x[:, :8], x[:, 1:]
    same = r" \(same address, strides and element size\)$"
    for call, allowed in (
        (lambda: rmsnorm.mean_square(here, out=x[:, 0]), r"expected separate memory$"),
        (lambda: rmsnorm.rms_norm(here, out=behind), ", or for out exactly x" + same),
        (
            lambda: rmsnorm.add_rms_norm(here, ones, out=behind),
            ", or for out and residual_out exactly x or residual" + same,
        ),
        (
            lambda: rmsnorm.rms_norm_backward(ones, here, dx_out=behind),
            ", or for dx_out exactly dy, x, residual or d_residual" + same,
        ),
    ):
        assert re.search(allowed, message_of(call)), message_of(call)


def test_disjoint_interleaved_views_are_no_overlap():
    """Between x's bounds, yet sharing no element with it: halves of one wider array."""
    memory = np.ones((3, 16), F32)
    x, out = memory[:, :8], memory[:, 8:]
    x[...] = np.arange(24).reshape(3, 8)
    rmsnorm.rms_norm(x, out=out)
    floats.assert_same_bits(out, rmsnorm.rms_norm(x.copy()))


def test_numpy_scalars_as_options():
    x = np.arange(24, dtype=F32).reshape(3, 8)
    y = rmsnorm.rms_norm(x, eps=np.float32(0.5), axis=np.int64(-1), partial=np.float64(1))
    floats.assert_same_bits(y, rmsnorm.rms_norm(x, eps=0.5))
    floats.assert_same_bits(rmsnorm.rms_norm(x, eps=1), rmsnorm.rms_norm(x, eps=1.0))


def test_an_array_that_is_not_aligned_to_its_elements():
    """Refused by name, or computed rightly; an address that is no multiple of 4 must not matter."""
    raw = np.zeros(3 * 8 * 4 + 1, np.uint8)
    x = raw[1:].view(F32).reshape(3, 8)
    x[...] = np.arange(24).reshape(3, 8)
    try:
        y = rmsnorm.rms_norm(x)
    except (ValueError, TypeError) as error:
        assert str(error).startswith("x")
    else:
        floats.assert_same_bits(y, rmsnorm.rms_norm(x.copy()))


@pytest.mark.parametrize("shape", [(3, 0), (0, 0)])
def test_rows_without_elements(shape):
    """No elements, so no result and no write; refusing x by name is as good."""
    try:
        assert rmsnorm.rms_norm(np.zeros(shape, F64)).shape == shape
    except ValueError as error:
        assert str(error).startswith("x")


def message_of(call):
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_strides_beyond_addresses_are_what_the_message_is_about():
    x, out = np.ones((3, 8), F32), np.full((3, 8), 7, F32)
    weight = as_strided(np.ones(1, F32), (8,), (2**62,))
    message = message_of(lambda: rmsnorm.rms_norm(x, weight, out=out))
    assert re.match(rf"weight: shape \(8,\) with strides \({2**60},\).* addresses", message)
    far = as_strided(x, (3, 8), (-(2**62), 4))
    message = message_of(lambda: rmsnorm.rms_norm(far, out=out))
    assert re.match(rf"x: shape \(3, 8\) with strides \(-{2**60}, 1\).* addresses", message)
    assert (out == 7).all()


@pytest.mark.parametrize("requires_grad", (False, True, None))
def test_more_elements_than_there_can_be(requires_grad):
    """x is what is wrong, not the memory that a result would take. None is for NumPy."""
    x = np.broadcast_to(F32.type(1), (8, 2**57))
    if requires_grad is not None:
        x = torch.ones(1, requires_grad=requires_grad).expand(8, 2**57)
    calls = [
        lambda: rmsnorm.rms_norm(x),
        lambda: rmsnorm.rms_norm(x, return_rstd=True, axis=0),
        lambda: rmsnorm.add_rms_norm(x, x),
    ]
    if not requires_grad:
        calls += [
            lambda: rmsnorm.mean_square(x),
            lambda: rmsnorm.rms_norm_apply(x, np.ones(8, F32)),
            lambda: rmsnorm.rms_norm_backward(x, x),
        ]
    for call in calls:
        assert message_of(call) == f"x: shape (8, {2**57}) has more than 2**59 elements"


def test_more_dimensions_than_merge():
    """The message speaks of dimensions where there are more of them, and not elsewhere."""
    x = np.ones((2,) * 10, F32).transpose()
    message = message_of(lambda: rmsnorm.rms_norm(x))
    assert re.match(r"x: shape \(2, .*\) has more than 8 dimensions", message)
    assert message_of(lambda: rmsnorm.rms_norm(F32.type(1)[...])).startswith("x: expected at least")


@pytest.mark.parametrize("axis", (-1, -2, -3))
@pytest.mark.parametrize("shape", ((0, 2**30, 2**30), (2**30, 0, 2**30), (2**30, 2**30, 0)))
def test_a_size_of_zero_beside_the_largest_ones(shape, axis):
    x = torch.empty(shape)
    for y in (rmsnorm.rms_norm(x, axis=axis), *rmsnorm.add_rms_norm(x, x, axis=axis)):
        assert y.shape == x.shape
    weight = torch.empty(shape[axis:]) if 0 in shape[axis:] else None
    dx, dweight, dbias = rmsnorm.rms_norm_backward(x, x, weight, axis=axis)
    assert dx.shape == x.shape and dbias is None
    assert (dweight is None) == (weight is None)


def test_the_mean_square_of_no_rows_of_any_number():
    assert rmsnorm.mean_square(torch.empty(0, 2**31, 2**31)).shape == (0, 2**31)


def test_a_weight_of_more_elements_than_any_memory():
    """Its gradient would have as many."""
    x = np.ones((3, 8), F32)
    weight = np.lib.stride_tricks.as_strided(np.ones(8, F32), (2**40, 8), (0, 4))
    for call in (
        lambda: rmsnorm.rms_norm(x, weight),
        lambda: rmsnorm.rms_norm_backward(x, x, weight),
    ):
        with pytest.raises(ValueError, match=r"^weight: expected .*, got \(1099511627776, 8\)$"):
            call()
