"""Strides, alignment, aliasing and broadcasting change where bytes lie and never what they are."""

import cases
import layouts
import numpy as np
import pytest
import rmsnorm
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, OUTPUT_LAYOUTS, Placed


def sample(shape, dtype, seed=0):
    return cases.values(np.random.default_rng(seed), shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(dtype, layout):
    for n in (1, 7, 8, 33, 64, 257, 1025):
        x = sample((5, n), dtype, n)
        if layout == "broadcast_rows":
            x = np.repeat(x[:1], 5, axis=0)
        weight, bias = sample(n, dtype, 1), sample(n, dtype, 2)
        expected, expected_rstd = rmsnorm.rms_norm(x, weight, bias, return_rstd=True)
        y, rstd = rmsnorm.rms_norm(Placed(x, layout).view, weight, bias, return_rstd=True)
        assert_same_bits(y, expected, f"n={n}")
        assert_same_bits(rstd, expected_rstd, f"n={n}")
        if layout != "broadcast_rows":
            y = rmsnorm.rms_norm(x, Placed(weight, layout).view, Placed(bias, layout).view)
            assert_same_bits(y, expected, f"weight, n={n}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_output_layouts(dtype, layout):
    """ROCm/aiter 5290 wrote the end of an odd row over the beginning of the next."""
    for n in (1, 7, 8, 33, 64, 257, 1025):
        x, weight = sample((5, n), dtype, n), sample(n, dtype, 1)
        expected = rmsnorm.rms_norm(x, weight)
        out = layouts.empty(x.shape, dtype, layout)
        assert rmsnorm.rms_norm(x, weight, out=out.view) is out.view
        assert_same_bits(out.view, expected, f"n={n}")
        assert out.untouched(), f"n={n}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_in_place(dtype, layout):
    for shape in ((5, 257), (3, 4, 65)):
        x, weight = sample(shape, dtype), sample(shape[-1], F32)
        expected = rmsnorm.rms_norm(x, weight)
        placed = Placed(x, layout)
        rmsnorm.rms_norm(placed.view, weight, out=placed.view)
        assert_same_bits(placed.view, expected)
        assert placed.untouched()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_misalignment(dtype):
    for offset in range(33):
        for n in (31, 64, 100):
            x, out = (np.zeros(3 * n + offset, dtype), np.full(3 * n + offset + 40, 7, dtype))
            x[offset:] = sample(3 * n, dtype)
            view, result = (x[offset:].reshape(3, n), out[offset : offset + 3 * n].reshape(3, n))
            rmsnorm.rms_norm(view, out=result)
            assert_same_bits(result, rmsnorm.rms_norm(view.copy()))
            assert (out[:offset] == 7).all() and (out[offset + 3 * n :] == 7).all()


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_query_and_key_inside_a_packed_projection(dtype):
    """q and k as strided 4-D slices of one row, normalised in place; v and the gaps stay.

    vllm-project/vllm 22701 and vllm-project/vllm-xpu-kernels 397 took one stride for all leading
    axes.
    """
    batch, tokens, heads, kv_heads, head_dim = 3, 5, 4, 2, 64
    packed = sample((batch, tokens, (heads + 2 * kv_heads) * head_dim), dtype)
    before = packed.copy()
    split = packed.reshape(batch, tokens, heads + 2 * kv_heads, head_dim)
    q, k = split[..., :heads, :], split[..., heads : heads + kv_heads, :]
    weight = sample(head_dim, dtype, 1)
    expected_q, expected_k = (rmsnorm.rms_norm(np.array(part), weight) for part in (q, k))
    for part in (q, k):
        rmsnorm.rms_norm(part, weight, out=part)
    assert_same_bits(q, expected_q)
    assert_same_bits(k, expected_k)
    before = before.reshape(split.shape)
    assert_same_bits(split[..., heads + kv_heads :, :], before[..., -kv_heads:, :])
    # heads in front of tokens, as attention wants them
    q = before[..., :heads, :].transpose(0, 2, 1, 3)
    assert_same_bits(rmsnorm.rms_norm(q, weight), expected_q.transpose(0, 2, 1, 3).copy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", OUTPUT_LAYOUTS)
def test_several_normalised_axes(dtype, layout):
    x, weight = sample((3, 4, 5, 13), dtype), sample((4, 5, 13), F32, 1)
    flat = rmsnorm.rms_norm(x.reshape(3, -1), weight.reshape(-1))
    for axis in (1, -3):
        out = layouts.empty(x.shape, dtype, layout)
        y, rstd = rmsnorm.rms_norm(
            Placed(x, layout).view,
            Placed(weight, layout).view,
            axis=axis,
            out=out.view,
            return_rstd=True,
        )
        assert rstd.shape == (3,)
        assert_same_bits(np.array(y).reshape(3, -1), flat)
        assert out.untouched()
    whole, rstd = rmsnorm.rms_norm(x, axis=0, return_rstd=True)
    assert rstd.shape == ()
    assert_same_bits(whole.reshape(-1), rmsnorm.rms_norm(x.reshape(-1)))


@pytest.mark.parametrize(
    "shape", [(3, 4, 50), (1, 4, 50), (3, 1, 50), (3, 1, 1, 50), (2, 3, 4, 50)]
)
@pytest.mark.parametrize("lead", [(), (4,), (1,), (3, 1), (3, 4), (1, 4)])
def test_weight_and_bias_broadcast_over_leading_axes(shape, lead):
    """In vllm-project/vllm-xpu-kernels 579 all rows took the weight of the first."""
    weight, bias = sample((*lead, 50), F32, 1), sample((*lead, 50), F32, 2)
    x = sample(shape, F32)
    try:
        fits = np.broadcast_shapes(shape, weight.shape) == shape
    except ValueError:
        fits = False
    if not fits:
        with pytest.raises(ValueError, match="weight"):
            rmsnorm.rms_norm(x, weight)
        with pytest.raises(ValueError, match="bias"):
            rmsnorm.rms_norm(x, None, bias)
        return
    y = rmsnorm.rms_norm(x, weight, bias)
    each_weight, each_bias = (np.broadcast_to(weight, shape), np.broadcast_to(bias, shape))
    for index in np.ndindex(shape[:-1]):
        row = rmsnorm.rms_norm(x[index], each_weight[index].copy(), each_bias[index].copy())
        assert_same_bits(y[index], row, str(index))


def test_weight_of_stride_zero():
    x = sample((4, 3, 40), F32)
    scalar, rows = np.float32(0.7), sample(40, F32, 1)
    expected = rmsnorm.rms_norm(x, np.full(40, scalar))
    assert_same_bits(rmsnorm.rms_norm(x, np.broadcast_to(scalar, 40)), expected)
    expected = rmsnorm.rms_norm(x, rows)
    assert_same_bits(rmsnorm.rms_norm(x, np.broadcast_to(rows, (4, 3, 40))), expected)


def test_one_row_wider_than_its_view():
    """A slice of a wider row (a latent projection beside rotary elements)."""
    wide = sample((7, 576), BF16)
    out = np.full((7, 576), 3, BF16)
    rmsnorm.rms_norm(wide[:, :512], out=out[:, :512])
    assert_same_bits(out[:, :512], rmsnorm.rms_norm(wide[:, :512].copy()))
    assert (out[:, 512:] == 3).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8), (0, 0, 3)])
def test_no_rows(shape):
    for dtype in DTYPES:
        y, rstd = rmsnorm.rms_norm(
            np.zeros(shape, dtype), np.ones(shape[-1], F32), return_rstd=True
        )
        assert y.shape == shape and y.dtype == dtype and rstd.shape == shape[:-1]


def test_sizes_of_one_have_meaningless_strides():
    x = sample((4, 32), F64)
    strange = np.lib.stride_tricks.as_strided(x, (1, 4, 1, 32), (8 * 10**12, 256, -(2**40), 8))
    assert_same_bits(rmsnorm.rms_norm(strange).reshape(4, 32), rmsnorm.rms_norm(x))


def test_seven_leading_axes():
    x = sample((2, 1, 2, 1, 3, 1, 2, 9), F32)
    assert_same_bits(rmsnorm.rms_norm(x).reshape(-1, 9), rmsnorm.rms_norm(x.reshape(-1, 9)))
    y = rmsnorm.rms_norm(x.transpose(4, 2, 0, 6, 1, 3, 5, 7))
    assert_same_bits(y, rmsnorm.rms_norm(x).transpose(4, 2, 0, 6, 1, 3, 5, 7).copy())


def test_more_than_eight_dimensions():
    x, weight = (sample((2, 1, 2, 1, 1, 3, 1, 1, 2, 2, 9), F32), sample((2, 2, 9), F32, 1))
    y, rstd = rmsnorm.rms_norm(x, weight, axis=-3, return_rstd=True)
    assert y.shape == x.shape and rstd.shape == x.shape[:-3]
    assert_same_bits(y.reshape(12, 36), rmsnorm.rms_norm(x.reshape(12, 36), weight.reshape(36)))
    scattered = Placed(sample((2,) * 8 + (3, 5), F32), "not_collapsible").view
    try:
        y = rmsnorm.rms_norm(scattered)
    except ValueError as error:
        assert str(error).startswith("x")
    else:
        assert_same_bits(y, rmsnorm.rms_norm(scattered.copy()))


@given(data=st.data())
def test_any_view_of_an_array(data):
    """Slices with steps of any sign, permuted axes and broadcast ones, for x, weight and out."""
    rank = data.draw(st.integers(1, 4), "rank")
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank), "sizes")
    order = data.draw(st.permutations(range(rank)), "order")
    axis = data.draw(st.integers(-rank, rank - 1), "axis")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    steps = st.sampled_from([1, 1, 2, 3, -1, -2])
    offsets = st.integers(0, 2)

    def view_of_larger(broadcast=False):
        """An array of the drawn sizes inside a larger one, its axes in the drawn order there."""
        slices, larger = [], []
        for axis_there in order:
            size, step, offset = sizes[axis_there], data.draw(steps), data.draw(offsets)
            reach = (size - 1) * abs(step)
            first = offset if step > 0 else offset + reach
            stop = first + size * step
            slices.append(slice(first, stop if stop >= 0 else None, step))
            larger.append(offset + reach + 1 + data.draw(offsets))
        memory = sample(larger, dtype)
        view = memory[tuple(slices)].transpose(np.argsort(order))
        if broadcast and data.draw(st.booleans()):
            view = np.broadcast_to(view[:1], sizes)
        return view, memory, tuple(slices)

    x, _, _ = view_of_larger(broadcast=True)
    weight = view_of_larger(broadcast=True)[0] if data.draw(st.booleans(), "weight") else None
    out, memory, slices = view_of_larger()
    expected = rmsnorm.rms_norm(x.copy(), None if weight is None else weight.copy(), axis=axis)
    before = memory.copy()
    rmsnorm.rms_norm(x, weight, axis=axis, out=out)
    assert_same_bits(out, expected)
    memory[slices] = before[slices]
    assert_same_bits(memory, before, "outside of the view:")
