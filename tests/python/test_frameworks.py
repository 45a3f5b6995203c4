"""NumPy, torch, JAX and anything with DLPack: what comes out, and that nothing is copied."""

import gc
import os
import pathlib
import sys

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rmsnorm
import torch
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

TORCH = {F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32, F64: torch.float64}


def sample(shape, dtype, seed=0):
    return cases.values(np.random.default_rng(seed), shape, dtype)


def to_torch(array):
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


class OnlyDLPack:
    """The least that an array of some other library offers."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OldDLPack(OnlyDLPack):
    """A producer from before DLPack 1.0: it knows none of the newer keywords."""

    def __dlpack__(self, stream=None):
        return self._array.__dlpack__()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy(dtype):
    x, weight = sample((3, 40), dtype), sample(40, F32)
    y, rstd = rmsnorm.rms_norm(x, weight, return_rstd=True)
    assert type(y) is np.ndarray and type(rstd) is np.ndarray
    assert y.dtype == dtype and y.shape == x.shape and y.flags.c_contiguous and y.flags.writeable
    assert y.flags.owndata or y.base is not None
    y, total = rmsnorm.add_rms_norm(x, x)
    assert type(y) is np.ndarray and type(total) is np.ndarray
    assert type(rmsnorm.mean_square(x)) is np.ndarray


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch(dtype):
    x, weight, residual = (sample((3, 40), dtype), sample(40, dtype, 1), sample((3, 40), dtype, 2))
    tx, tw, tr = to_torch(x), to_torch(weight), to_torch(residual)
    y, rstd = rmsnorm.rms_norm(tx, tw, return_rstd=True)
    assert type(y) is torch.Tensor and type(rstd) is torch.Tensor
    assert y.dtype == TORCH[dtype] and y.device == tx.device and not y.requires_grad
    assert rstd.dtype == (torch.float64 if dtype == F64 else torch.float32)
    assert_same_bits(from_torch(y), rmsnorm.rms_norm(x, weight))

    y, total = rmsnorm.add_rms_norm(tx, tr, tw)
    expected_y, expected_total = rmsnorm.add_rms_norm(x, residual, weight)
    assert type(y) is torch.Tensor and type(total) is torch.Tensor
    assert_same_bits(from_torch(y), expected_y)
    assert_same_bits(from_torch(total), expected_total)

    mean = rmsnorm.mean_square(tx)
    assert type(mean) is torch.Tensor and mean.shape == (3,)
    applied = rmsnorm.rms_norm_apply(tx, mean, tw)
    assert type(applied) is torch.Tensor and applied.dtype == TORCH[dtype]
    assert_same_bits(from_torch(applied), rmsnorm.rms_norm_apply(x, rmsnorm.mean_square(x), weight))

    out = torch.empty_like(tx)
    assert rmsnorm.rms_norm(tx, tw, out=out) is out
    assert_same_bits(from_torch(out), rmsnorm.rms_norm(x, weight))


def test_torch_layouts():
    x = torch.from_numpy(sample((4, 6, 40), F32))
    expected = rmsnorm.rms_norm(x.numpy().copy())
    for view in (
        x,
        x[:, 1:5],
        x.transpose(0, 1),
        x.permute(2, 0, 1),
        x[..., ::2],
        x[2],
        x[:, :, 3:],
    ):
        assert_same_bits(rmsnorm.rms_norm(view).numpy(), rmsnorm.rms_norm(view.numpy().copy()))
    assert_same_bits(rmsnorm.rms_norm(x[:1].expand(4, 6, 40)).numpy()[3], expected[0])
    in_place = x.clone()
    assert rmsnorm.rms_norm(in_place, out=in_place) is in_place
    assert_same_bits(in_place.numpy(), expected)


def test_torch_parameter_and_mixed_frameworks():
    x, weight = sample((3, 40), F32), sample(40, F32, 1)
    expected = rmsnorm.rms_norm(x, weight)
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    with torch.no_grad():
        y = rmsnorm.rms_norm(torch.from_numpy(x), parameter)
    assert type(y) is torch.Tensor
    assert_same_bits(y.numpy(), expected)
    assert_same_bits(rmsnorm.rms_norm(x, torch.from_numpy(weight)), expected)
    assert_same_bits(rmsnorm.rms_norm(x, jnp.asarray(weight)), expected)
    out = np.empty_like(x)
    assert rmsnorm.rms_norm(torch.from_numpy(x), weight, out=out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_jax(dtype):
    x, weight = sample((3, 40), dtype), sample(40, dtype, 1)
    y, rstd = rmsnorm.rms_norm(jnp.asarray(x), jnp.asarray(weight), return_rstd=True)
    assert isinstance(y, jax.Array) and isinstance(rstd, jax.Array)
    assert y.dtype == dtype and y.shape == (3, 40) and rstd.shape == (3,)
    assert_same_bits(np.asarray(y), rmsnorm.rms_norm(x, weight))
    y, total = rmsnorm.add_rms_norm(jnp.asarray(x), jnp.asarray(x))
    assert isinstance(y, jax.Array) and isinstance(total, jax.Array)
    assert_same_bits(np.asarray(y), rmsnorm.add_rms_norm(x, x)[0])
    assert isinstance(rmsnorm.mean_square(jnp.asarray(x)), jax.Array)


@pytest.mark.parametrize("make", [np.array, torch.tensor, jnp.asarray])
def test_inputs_keep_their_values(make):
    """GeeeekExplorer/nano-vllm 170: the conversion to f32 was no copy, and x was normalized."""
    given = [sample((3, 40), F32), sample((3, 40), F32, 1), sample(40, F32, 2)]
    x, residual, weight = arrays = [make(a) for a in given]
    rmsnorm.rms_norm(x, weight)
    rmsnorm.add_rms_norm(x, residual, weight)
    rmsnorm.rms_norm_apply(x, rmsnorm.mean_square(x), weight)
    rmsnorm.rms_norm_backward(x, residual, weight)
    for array, before in zip(arrays, given):
        assert_same_bits(np.asarray(array), before)


@pytest.mark.parametrize("wrapper", [OnlyDLPack, OldDLPack])
def test_any_dlpack_producer(wrapper):
    x, weight = sample((3, 40), F32), sample(40, F32, 1)
    expected = rmsnorm.rms_norm(x, weight)
    assert_same_bits(rmsnorm.rms_norm(x, wrapper(weight)), expected)
    y = np.zeros_like(x)
    assert rmsnorm.rms_norm(wrapper(x), wrapper(weight), out=y) is y
    assert_same_bits(y, expected)
    assert_same_bits(np.from_dlpack(rmsnorm.rms_norm(wrapper(x), wrapper(weight))), expected)


def test_a_dlpack_array_as_out():
    x, out = sample((3, 40), F32), np.zeros((3, 40), F32)
    given = OnlyDLPack(out)
    assert rmsnorm.rms_norm(x, out=given) is given
    assert_same_bits(out, rmsnorm.rms_norm(x))


class StandardArray(OnlyDLPack):
    """An array of a library that follows the array API standard."""

    def __array_namespace__(self, api_version=None):
        return StandardNamespace


class StandardNamespace:
    @staticmethod
    def from_dlpack(producer):
        return StandardArray(np.from_dlpack(producer))


def test_an_array_api_library_gets_its_own_arrays_back():
    x = sample((3, 40), F32)
    y, rstd = rmsnorm.rms_norm(StandardArray(x), return_rstd=True)
    expected, expected_rstd = rmsnorm.rms_norm(x, return_rstd=True)
    assert type(y) is StandardArray and type(rstd) is StandardArray
    gc.collect()
    assert_same_bits(y._array, expected)
    assert_same_bits(rstd._array, expected_rstd)


def test_numpy_subclasses():
    x = sample((3, 40), F32)
    for view in (x.view(np.matrix), np.ma.masked_array(x)):
        try:
            y = rmsnorm.rms_norm(view)
        except TypeError:
            continue
        np.testing.assert_array_equal(np.asarray(y), rmsnorm.rms_norm(x))


def test_numpy_arrays_that_are_writeable_for_now():
    x = sample((40,), F32)
    repeated, _ = np.broadcast_arrays(x, np.zeros((3, 40), F32))
    assert_same_bits(rmsnorm.rms_norm(repeated)[2], rmsnorm.rms_norm(x))
    with pytest.raises(ValueError, match="^out: is read-only"):
        rmsnorm.rms_norm(np.zeros((3, 40), F32), out=repeated)


@pytest.mark.parametrize(
    "name, dtype", [("float16", F16), ("bfloat16", BF16), ("float32", F32), ("float64", F64)]
)
def test_out_dtype_by_any_name(name, dtype):
    x = sample((3, 40), F32)
    expected = np.empty(x.shape, dtype)
    rmsnorm.rms_norm(x, out=expected)
    for spelled in (name, dtype, dtype.type, TORCH[dtype], getattr(jnp, name)):
        y = rmsnorm.rms_norm(x, out_dtype=spelled)
        assert_same_bits(y, expected)
    y = rmsnorm.rms_norm(torch.from_numpy(x), out_dtype=name)
    assert y.dtype == TORCH[dtype]
    assert ml_dtypes.bfloat16 is BF16.type


def resident_bytes():
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("make", ["numpy", "bfloat16", "torch", "dlpack", "strided", "jax"])
def test_no_copy_is_made(make):
    """A copy of any input or output would touch 64 MiB of new pages; a call may touch 4."""
    size = 64 * 2**20
    dtype = BF16 if make == "bfloat16" else F32
    columns = 2**12
    rows = size // (columns * dtype.itemsize)
    x = np.ones((rows, columns), dtype)
    out = np.zeros_like(x)
    out[...] = 1  # its pages are there before the call
    given_x, given_out = x, out
    if make == "torch":
        given_x, given_out = torch.from_numpy(x), torch.from_numpy(out)
    elif make == "dlpack":
        given_x, given_out = OnlyDLPack(x), OnlyDLPack(out)
    elif make == "strided":
        given_x, given_out = x.T[::-1], out.T[::-1]
    elif make == "jax":
        given_x = jnp.asarray(x).block_until_ready()
    rmsnorm.rms_norm(x[:1], out=out[:1])
    peak = peak_growth(lambda: rmsnorm.rms_norm(given_x, out=given_out))
    assert peak < 4 * 2**20
    assert float(out[0, 0]) != 1 or float(out[-1, -1]) != 0


def peak_growth(call):
    """Bytes by which the process grew at its largest during the call."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def high_water():
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    before = resident_bytes()
    call()
    return high_water() - before


def call_variants():
    x, weight, out = sample((2, 16), F32), sample(16, F32), np.empty((2, 16), F32)
    tx, tw = torch.from_numpy(x), torch.from_numpy(weight)
    jx = jnp.asarray(x)
    bx = x.astype(BF16)
    dx = OnlyDLPack(x)
    sx = StandardArray(x)
    return {
        "numpy": ((x, weight), lambda: rmsnorm.rms_norm(x, weight)),
        "numpy out": ((x, weight, out), lambda: rmsnorm.rms_norm(x, weight, out=out)),
        "rstd": ((x, weight), lambda: rmsnorm.rms_norm(x, weight, return_rstd=True)),
        "bfloat16": ((bx,), lambda: rmsnorm.rms_norm(bx)),
        "torch": ((tx, tw), lambda: rmsnorm.rms_norm(tx, tw)),
        "torch recorded": (
            (tx, tw),
            lambda: rmsnorm.rms_norm(tx.detach().requires_grad_(), tw).sum().backward(),
        ),
        "jax": ((jx,), lambda: rmsnorm.rms_norm(jx)),
        "dlpack": ((dx, x, out), lambda: rmsnorm.rms_norm(dx, out=out)),
        "exported": ((dx, x), lambda: rmsnorm.rms_norm(dx, return_rstd=True)),
        "array api": ((sx, x), lambda: rmsnorm.rms_norm(sx)),
        "add": ((x,), lambda: rmsnorm.add_rms_norm(x, x, return_rstd=True)),
        "mean_square": ((x,), lambda: rmsnorm.mean_square(x)),
        "backward": ((x, weight), lambda: rmsnorm.rms_norm_backward(x, x, weight, has_bias=True)),
        "torch backward": ((tx, tw), lambda: rmsnorm.rms_norm_backward(tx, tx, tw)),
        "error": (
            (x, out),
            lambda: pytest.raises(ValueError, rmsnorm.rms_norm, x, eps=-1.0, out=out),
        ),
        "shape error": ((x, tw), lambda: pytest.raises(ValueError, rmsnorm.rms_norm, x, tw[:3])),
        "type error": ((x,), lambda: pytest.raises(TypeError, rmsnorm.rms_norm, [x])),
    }


@pytest.mark.parametrize("name", call_variants())
def test_reference_counts(name):
    arrays, call = call_variants()[name]
    watched = [*arrays, F32, BF16, torch.Tensor, np.ndarray, None]
    call()
    gc.collect()
    before = [sys.getrefcount(a) for a in watched]
    for _ in range(200):
        call()
    gc.collect()
    after = [sys.getrefcount(a) for a in watched]
    assert all(abs(b - a) < 100 for a, b in zip(before, after)), (before, after)
    assert before[: len(arrays)] == after[: len(arrays)]


@needs_proc
@pytest.mark.parametrize(
    "name",
    [
        *("numpy", "rstd", "bfloat16", "torch", "dlpack", "exported", "array api", "backward"),
        "type error",
    ],
)
def test_memory_does_not_grow(name):
    """100 000 calls (errors: 10 000); a leak of one 64-byte object in each would show as 6 MB."""
    _, call = call_variants()[name]
    count = 10_000 if name == "type error" else 100_000
    for _ in range(1000):
        call()
    gc.collect()
    before = resident_bytes()
    for _ in range(count):
        call()
    gc.collect()
    assert resident_bytes() - before < 32 * count


def test_results_outlive_their_inputs():
    for make in (np.array, torch.tensor, jnp.asarray):
        x = make(np.ones((4, 64), np.float32))
        y = rmsnorm.rms_norm(x, eps=0.0)
        del x
        gc.collect()
        np.zeros((4, 64), np.float32)
        np.testing.assert_array_equal(np.asarray(y), np.ones((4, 64)))


def test_torch_out_counts_as_written():
    """Autograd must notice that a value which it saved was overwritten."""
    weight = torch.ones(8, requires_grad=True)
    x = torch.randn(4, 8)
    product = x * weight
    rmsnorm.rms_norm(x, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    residual, out = torch.randn(4, 8), torch.empty(4, 8)
    rmsnorm.add_rms_norm(x, residual, out=out, residual_out=residual)
    assert residual._version == 1
    assert out._version == 1
    with torch.inference_mode():
        y = torch.randn(4, 8)
        assert rmsnorm.rms_norm(y, out=y) is y


def test_torch_tensors_that_begin_to_require_grad_within_a_call():
    x, weight = torch.ones(3, 8), torch.ones(8)

    class Requiring:
        def __init__(self, tensor):
            self.tensor = tensor

        def __float__(self):
            self.tensor.requires_grad_()
            return 1e-6

    def calls(eps):
        return (
            (True, lambda: rmsnorm.rms_norm(x, weight, eps=eps)),
            (True, lambda: rmsnorm.add_rms_norm(x, x, weight, eps=eps)[0]),
            (False, lambda: rmsnorm.rms_norm(x, weight, eps=eps, out=torch.empty(3, 8))),
            (False, lambda: rmsnorm.rms_norm_apply(x, torch.ones(3), weight, eps=eps)),
            (False, lambda: rmsnorm.rms_norm_backward(x, x, weight, eps=eps)),
        )

    for tensor in (x, weight):
        for is_recorded, call in calls(Requiring(tensor)):
            tensor.requires_grad_(False)
            if is_recorded:
                assert call().requires_grad
            else:
                with pytest.raises(RuntimeError, match="requires grad"):
                    call()
        tensor.requires_grad_(False)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("axis", [-3, 2, 3, 5, 2**31 - 1, -(2**31)])
def test_torch_axis_is_checked(axis, requires_grad):
    x = torch.ones(3, 8, requires_grad=requires_grad)
    text = rf"^axis: expected -2 <= axis < 2 for x of shape \(3, 8\), got {axis}$"
    for call in (
        lambda: rmsnorm.rms_norm(x, axis=axis),
        lambda: rmsnorm.rms_norm(x, axis=axis, return_rstd=True),
        lambda: rmsnorm.add_rms_norm(x, x, axis=axis),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_torch_trace_is_refused():
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(lambda t: rmsnorm.rms_norm(t), torch.ones(2, 4), check_trace=False)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_operators_or_raises(pre_dispatch):
    """The result's allocation alone would make a graph that returns memory as it comes."""
    x, statistic = torch.ones(2, 4), torch.ones(2)
    calls = (
        rmsnorm.rms_norm,
        rmsnorm.mean_square,
        lambda x: rmsnorm.add_rms_norm(x, x),
        lambda x: rmsnorm.rms_norm(x, out=torch.empty_like(x)),
        lambda x: rmsnorm.rms_norm_apply(x, statistic),
        lambda x: rmsnorm.rms_norm_backward(x, x),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="^x: make_fx cannot record"):
            make_fx(call, pre_dispatch=pre_dispatch)(x)
    graph = make_fx(rmsnorm.rms_norm, pre_dispatch=pre_dispatch)(x.clone().requires_grad_())
    assert "rmsnorm.rms_norm" in graph.code
    x = 2 * torch.eye(2, 4)
    assert torch.equal(graph(x), rmsnorm.rms_norm(x))
    with FlopCounterMode(display=False):  # a dispatch mode that records no graph
        assert torch.equal(rmsnorm.rms_norm(x), graph(x))


def test_very_many_empty_rows_take_no_time():
    assert rmsnorm.rms_norm(np.zeros((2**40, 0), np.float32)).shape == (2**40, 0)


def test_given_mean_square_far_below_float():
    y = rmsnorm.rms_norm_apply(np.zeros((1, 4), np.float32), np.array([1e-200]), eps=0.0)
    np.testing.assert_array_equal(y, np.zeros((1, 4), np.float32))
