"""More dimensions than the library takes, and sizes of zero anywhere among them.

What is computed of an array of up to eight dimensions is computed of the same memory with more of
them, whose sizes of one have any strides. Where dimensions do not merge the call is refused, and in
both cases no byte beside the outputs changes.
"""

import itertools

import numpy as np
import pytest
import rmsnorm
from cases import values
from floats import F32, F64, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import OUTPUT_LAYOUTS, Placed, empty, written_nowhere
from numpy.lib.stride_tricks import as_strided

FAR = 2**40 + 8  # bytes: no address, and never used


def spread(array, places):
    """The same memory with places[d] dimensions of size one before dimension d, and behind all."""
    shape, strides = [], []
    for size, stride, count in zip((*array.shape, None), (*array.strides, None), places):
        shape += [1] * count
        strides += [FAR, -FAR, 0, 4][:count] + [FAR] * (count - 4)
        if size is not None:
            shape.append(size)
            strides.append(stride)
    return as_strided(array, shape, strides)


def sample(shape, seed=0, dtype=F32):
    return values(np.random.default_rng(seed), shape, dtype)


# Of two row dimensions and two normalised ones.
SHAPES = tuple(itertools.product((0, 1, 2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 5)))
PLACES = ((3, 2, 1, 2, 1), (0, 0, 5, 0, 0), (0, 7, 0, 0, 5), (12, 0, 0, 0, 0), (20, 11, 9, 8, 12))
WEIGHTS = ("none", "shared", "per_column", "per_row", "per_both", "repeated")


def weight_of(shape, kind):
    """A weight that varies over some of the row dimensions, or has its memory repeated over one."""
    a, b, *normalised = shape
    leading = {"shared": (), "per_column": (b,), "per_row": (a, 1), "per_both": (a, b)}
    if kind == "none":
        return None
    if kind == "repeated":
        return np.broadcast_to(sample((1, b, *normalised), 3), shape)
    return sample((*leading[kind], *normalised), 3)


def spread_weight(weight, places):
    return None if weight is None else spread(weight, places[4 - weight.ndim :])


def axis_of(places):
    return -(2 + places[3] + places[4])


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_forward(places):
    for number, shape in enumerate(SHAPES):
        layout = OUTPUT_LAYOUTS[number % len(OUTPUT_LAYOUTS)]
        for kind in WEIGHTS:
            x, residual, weight = sample(shape), sample(shape, 1), weight_of(shape, kind)
            expected = rmsnorm.add_rms_norm(x, residual, weight, axis=2, return_rstd=True)
            out, residual_out = (empty(shape, F32, layout) for _ in range(2))
            got = rmsnorm.add_rms_norm(
                spread(x, places),
                spread(residual, places),
                spread_weight(weight, places),
                axis=axis_of(places),
                out=spread(out.view, places),
                residual_out=spread(residual_out.view, places),
                return_rstd=True,
            )
            rows_shape = spread(np.empty(shape[:2], F32), places[:3]).shape
            assert got[2].shape == rows_shape
            assert_same_bits(out.view, expected[0])
            assert_same_bits(residual_out.view, expected[1])
            assert_same_bits(got[2].reshape(shape[:2]), expected[2])
            assert out.untouched() and residual_out.untouched()


@pytest.mark.parametrize("places", [(*p[:3], 0) for p in PLACES] + [(3, 2, 4, 0)], ids=str)
def test_mean_square(places):
    """Rows without elements have a mean square, which is NaN."""
    for shape in itertools.product((0, 1, 2, 3), (0, 1, 3), (0, 1, 5)):
        x = sample(shape)
        for layout in OUTPUT_LAYOUTS:
            out = empty(shape[:2], F64, layout)
            rmsnorm.mean_square(spread(x, places), out=spread(out.view, places[:3]))
            assert_same_bits(out.view, rmsnorm.mean_square(x, out=np.empty(shape[:2], F64)))
            assert out.untouched()
            assert shape[2] != 0 or np.isnan(out.view).all()


@pytest.mark.parametrize("given_mean_square", (False, True))
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_backward(places, given_mean_square):
    """The sums of no rows are zeros."""
    for number, shape in enumerate(SHAPES):
        layout = OUTPUT_LAYOUTS[number % len(OUTPUT_LAYOUTS)]
        for kind in WEIGHTS:
            x, dy, weight = sample(shape), sample(shape, 1), weight_of(shape, kind)
            mean_square = np.abs(sample(shape[:2], 4)) + 1 if given_mean_square else None
            expected = rmsnorm.rms_norm_backward(
                dy, x, weight, axis=2, mean_square=mean_square, has_bias=True
            )
            dx, dbias = empty(shape, F32, layout), empty(shape[2:], F32, layout)
            dweight = None if weight is None else empty(weight.shape, F32, layout)
            got = rmsnorm.rms_norm_backward(
                spread(dy, places),
                spread(x, places),
                spread_weight(weight, places),
                axis=axis_of(places),
                mean_square=mean_square if mean_square is None else spread(mean_square, places[:3]),
                dx_out=spread(dx.view, places),
                dweight_out=None if dweight is None else spread_weight(dweight.view, places),
                dbias_out=spread(dbias.view, places[2:]),
            )
            for placed, result in zip((dx, dweight, dbias), expected[:3]):
                assert (placed is None) == (result is None)
                if placed is not None:
                    assert_same_bits(placed.view, result)
                    assert placed.untouched()
            if given_mean_square:
                assert_same_bits(got[3].reshape(shape[:2]), expected[3])


def called(call, placed):
    """Whether the call was taken. One that is refused names an argument and writes nothing."""
    try:
        call()
    except ValueError as error:
        assert str(error).startswith(("x:", "out:", "dweight_out:"))
        assert written_nowhere(placed)
        return False
    assert placed.untouched()
    return True


@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
@pytest.mark.parametrize("rank", (9, 10, 16))
def test_rows_of_outputs_that_do_not_merge(rank, layout):
    """With n = 0 every row has a mean square to be written, in whatever order rows lie there."""
    for n in (0, 1, 3):
        shape = (2,) * min(rank, 9) + (1,) * max(0, rank - 9)
        x = sample((*shape, n))
        out = empty(shape, F32, layout)
        if called(lambda out=out, x=x: rmsnorm.mean_square(x, out=out.view), out):
            assert_same_bits(out.view.reshape(512), rmsnorm.mean_square(x.reshape(512, n)))
        else:
            assert layout in ("transposed", "not_collapsible")


@pytest.mark.parametrize("empty_dimension", range(9))
def test_without_rows_nothing_is_written_but_gradients(empty_dimension):
    shape = [2] * 9 + [5]
    shape[empty_dimension] = 0
    x = np.empty(shape, F32)
    for varying in itertools.product((False, True), repeat=4):
        # Over the first dimensions, one after another or not.
        sizes = [s if v else 1 for s, v in zip(shape, varying)] + [1] * 5 + [5]
        weight = np.ones(sizes, F32)
        assert rmsnorm.rms_norm(x, weight, weight).shape == x.shape
        for layout in OUTPUT_LAYOUTS:
            dweight = empty(sizes, F32, layout)
            if called(
                lambda d=dweight, w=weight: rmsnorm.rms_norm_backward(x, x, w, dweight_out=d.view),
                dweight,
            ):
                assert_same_bits(dweight.view, np.zeros(sizes, F32))


@pytest.mark.parametrize("rows", (0, 3))
def test_an_output_of_one_element_for_many_is_refused(rows):
    """Also where it merges with a dimension over which it is a sum."""
    shape = (2, rows, *(1,) * 8, 4)
    x = sample(shape)
    weight = np.ones((2, *(1,) * 9, 4), F32)
    storage = np.full(4, 7, F32)
    repeated = as_strided(storage, weight.shape, (0,) + (0,) * 9 + (4,))
    with pytest.raises(ValueError, match=r"^dweight_out: its elements share memory"):
        rmsnorm.rms_norm_backward(x, x, weight, dweight_out=repeated)
    assert (storage == 7).all()


@given(data=st.data())
def test_any_sizes_in_any_order(data):
    """Some sizes of zero, one and more among up to 20, in memory of any order of dimensions."""
    rank = data.draw(st.integers(2, 5), "rank")
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank), "sizes")
    places = data.draw(st.lists(st.integers(0, 4), min_size=rank + 1, max_size=rank + 1), "places")
    first = data.draw(st.integers(1, rank - 1), "axis")
    axis = -(rank - first + sum(places[first + 1 :]))
    x = sample(sizes)
    order = data.draw(st.permutations(range(rank)), "order")
    scattered = np.transpose(Placed(x.transpose(order), "contiguous").view, np.argsort(order))
    weight = sample(sizes[first:], 1)
    layout = data.draw(st.sampled_from(OUTPUT_LAYOUTS), "layout")
    out, dweight = empty(sizes, F32, layout), empty(sizes[first:], F32, layout)
    rmsnorm.rms_norm(
        spread(scattered, places),
        spread(weight, places[first:]),
        axis=axis,
        out=spread(out.view, places),
    )
    assert_same_bits(out.view, rmsnorm.rms_norm(x, weight, axis=first))
    rmsnorm.rms_norm_backward(
        spread(scattered, places),
        spread(scattered, places),
        spread(weight, places[first:]),
        axis=axis,
        dweight_out=spread(dweight.view, places[first:]),
    )
    assert_same_bits(dweight.view, rmsnorm.rms_norm_backward(x, x, weight, axis=first)[1])
    assert out.untouched() and dweight.untouched()


STATISTICS = (1.0, 0.25, 0.0, -0.0, -1.0, 1e-42, 1e-30, 3e38, np.inf, -np.inf, np.nan)


@given(data=st.data())
def test_any_given_statistics_in_any_order(data):
    """Zero, denormal, negative and non-finite ones, whose factors are infinite, zero or NaN."""
    rank = data.draw(st.integers(2, 5), "rank")
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank), "sizes")
    places = data.draw(st.lists(st.integers(0, 4), min_size=rank + 1, max_size=rank + 1), "places")
    first = data.draw(st.integers(1, rank - 1), "axis")
    axis = -(rank - first + sum(places[first + 1 :]))
    rows = int(np.prod(sizes[:first]))
    drawn = st.lists(st.sampled_from(STATISTICS), min_size=rows, max_size=rows)
    mean_square = np.array(data.draw(drawn, "mean_square"), F32).reshape(sizes[:first])
    x, dy, weight = sample(sizes), sample(sizes, 1), sample(sizes[first:], 2)
    spread_x, spread_dy = spread(x, places), spread(dy, places)
    spread_weight = spread(weight, places[first:])
    spread_mean_square = spread(mean_square, places[: first + 1])

    y = rmsnorm.rms_norm_apply(spread_x, spread_mean_square, spread_weight, eps=0.0, axis=axis)
    expected = rmsnorm.rms_norm_apply(x, mean_square, weight, eps=0.0, axis=first)
    assert_same_bits(y.reshape(sizes), expected)

    gradients = rmsnorm.rms_norm_backward(
        spread_dy, spread_x, spread_weight, mean_square=spread_mean_square, eps=0.0, axis=axis
    )
    expected = rmsnorm.rms_norm_backward(
        dy, x, weight, mean_square=mean_square, eps=0.0, axis=first
    )
    for got, right in zip(gradients, expected):
        if right is not None:
            assert_same_bits(got.reshape(right.shape), right)
