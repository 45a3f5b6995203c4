"""CUDA arrays through the Python functions, on the emulation of the execution model."""

from __future__ import annotations

import gradient_oracle
import ml_dtypes
import numpy as np
import pytest
import rmsnorm
from emulated_array import CUDA, CUDA_HOST, CUDA_MANAGED, ROCM, EmulatedArray, EmulatedNamespace

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def sample(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reference(x, weight=None, bias=None, eps=1e-6):
    x64 = x.astype(np.float64)
    y = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def assert_near(result, expected):
    assert isinstance(result, EmulatedArray)
    precision = {2: 2.0**-10, 4: 2.0**-21, 8: 2.0**-50}[result.dtype.itemsize]
    if result.dtype == ml_dtypes.bfloat16:
        precision = 2.0**-8
    np.testing.assert_allclose(
        result.host.astype(np.float64), expected, rtol=precision, atol=precision / 8
    )


def test_build_says_what_it_is():
    cuda = rmsnorm.info()["cuda"]
    assert cuda["built"]
    assert cuda["architectures"] == ["emulated"]
    assert cuda["devices"][0]["compute_capability"] == (9, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_a_new_array_on_the_device(dtype):
    x, weight = sample((5, 96), dtype), sample(96, dtype, 1)
    result = rmsnorm.rms_norm(EmulatedArray(x), EmulatedArray(weight))
    assert result.dtype == x.dtype
    assert result.device == (CUDA, 0)
    assert_near(result, reference(x, weight))


def test_every_function():
    x, residual, weight = sample((4, 3, 200)), sample((4, 3, 200), seed=1), sample(200, seed=2)
    dx, dr, dw = EmulatedArray(x), EmulatedArray(residual), EmulatedArray(weight)
    y, total, rstd = rmsnorm.add_rms_norm(dx, dr, dw, return_rstd=True)
    np.testing.assert_array_equal(total.host, x + residual)
    assert_near(y, reference(x + residual, weight))
    assert rstd.shape == (4, 3)
    mean = rmsnorm.mean_square(dx)
    assert_near(mean, np.mean(x.astype(np.float64) ** 2, axis=-1))
    assert_near(rmsnorm.rms_norm_apply(dx, mean, dw), reference(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (150, 300)])
def test_backward(dtype, shape):
    dy, x, weight = (sample(s, dtype, i) for i, s in enumerate((shape, shape, shape[-1:])))
    arrays = [EmulatedArray(a) for a in (dy, x, weight)]
    results = rmsnorm.rms_norm_backward(*arrays, has_bias=True)
    assert all(type(r) is EmulatedArray and r.dtype == dtype for r in results)
    expected = gradient_oracle.gradients(
        dy, x, weight, results=[dtype], bias_shape=weight.shape, eps=1e-6
    )
    gradient_oracle.judge(expected, tuple(r.host for r in results))
    again = rmsnorm.rms_norm_backward(*arrays, has_bias=True)
    for a, b in zip(results, again):
        np.testing.assert_array_equal(a.host.view(np.uint8), b.host.view(np.uint8))


def test_backward_with_every_array_on_the_device():
    dy, x, extra = (sample((7, 64), seed=i) for i in range(3))
    weight, mean_square = sample(64, seed=3), np.abs(sample(7, seed=4)) + 1
    given = {"d_residual": extra, "residual": extra, "mean_square": mean_square}
    expected = gradient_oracle.gradients(
        dy, x, weight, results=[], bias_shape=weight.shape, **given
    )
    out = EmulatedArray(dy.copy())
    results = rmsnorm.rms_norm_backward(
        out,
        EmulatedArray(x),
        EmulatedArray(weight),
        has_bias=True,
        dx_out=out,
        **{k: EmulatedArray(v) for k, v in given.items()},
    )
    assert results[0] is out
    gradient_oracle.judge(expected, tuple(r.host for r in results))


def test_backward_on_a_stream_and_errors():
    arrays = [EmulatedArray(sample(s)) for s in ((3, 64), (3, 64), 64)]
    rmsnorm.rms_norm_backward(*arrays, stream=0x1230)
    assert all(a.streams == [0x1230] for a in arrays)
    out = EmulatedArray(np.full((3, 64), 7, np.float32))
    with pytest.raises(ValueError, match=r"^rstd: is on cpu while x is on cuda:0|^x: is on cuda:0"):
        rmsnorm.rms_norm_backward(*arrays, np.ones(3, np.float32), dx_out=out)
    with pytest.raises(ValueError, match=r"^weight: expected shape \(64,\)"):
        rmsnorm.rms_norm_backward(*arrays[:2], EmulatedArray(sample(63)), dx_out=out)
    with pytest.raises(ValueError, match=r"^dx_out: overlaps the memory of weight"):
        row = EmulatedArray(sample((1, 64)))
        rmsnorm.rms_norm_backward(
            *(EmulatedArray(sample((1, 64))) for _ in range(2)),
            EmulatedArray(row.host[0]),
            dx_out=row,
        )
    assert (out.host == 7).all()


def test_outputs_are_written_in_place():
    x = sample((6, 64))
    expected = reference(x)
    out = EmulatedArray(np.full((6, 64), np.nan, np.float32))
    assert rmsnorm.rms_norm(EmulatedArray(x), out=out) is out
    assert_near(out, expected)
    over = EmulatedArray(x.copy())
    assert rmsnorm.rms_norm(over, out=over) is over
    assert_near(over, expected)


def test_strides_and_empty_arrays():
    wide = sample((7, 300))
    for view in (wide[:, 3:131], wide[::2, ::3], wide[::-1]):
        assert_near(rmsnorm.rms_norm(EmulatedArray(view)), reference(view))
    assert rmsnorm.rms_norm(EmulatedArray(sample((0, 64)))).shape == (0, 64)


def test_same_bits_as_alone_in_a_batch():
    x = sample((33, 1000), ml_dtypes.bfloat16)
    whole = rmsnorm.rms_norm(EmulatedArray(x)).host
    for row in (0, 7, 32):
        alone = rmsnorm.rms_norm(EmulatedArray(x[row].copy())).host
        np.testing.assert_array_equal(alone.view(np.uint16), whole[row].view(np.uint16))


class ProtocolStream:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return (0, self.handle)


class TorchStream:
    cuda_stream = 0x40


class CuPyStream:
    ptr = 0x50


@pytest.mark.parametrize(
    ("stream", "number"),
    [
        (None, 1),
        (0, 1),
        (2, 2),
        (0x1230, 0x1230),
        (ProtocolStream(0x30), 0x30),
        (TorchStream(), 0x40),
        (CuPyStream(), 0x50),
    ],
)
def test_stream_reaches_the_exports(stream, number):
    x, weight, out = (EmulatedArray(sample(s)) for s in ((3, 64), 64, (3, 64)))
    rmsnorm.rms_norm(x, weight, out=out, stream=stream)
    assert x.streams == weight.streams == out.streams == [number]


@pytest.mark.parametrize("stream", ["0", 1.5, True, object()])
def test_stream_of_another_type(stream):
    with pytest.raises(TypeError, match=r"^stream: expected None, the handle"):
        rmsnorm.rms_norm(EmulatedArray(sample((3, 64))), stream=stream)


def test_negative_stream():
    with pytest.raises(ValueError, match=r"^stream: expected the handle .*, got -1$"):
        rmsnorm.rms_norm(EmulatedArray(sample((3, 64))), stream=-1)


def test_stream_for_cpu_arrays():
    with pytest.raises(ValueError, match=r"^stream: was given, and all arrays are on the CPU"):
        rmsnorm.rms_norm(sample((3, 64)), stream=0)


def test_mixed_devices():
    x, weight = sample((3, 64)), sample(64)
    with pytest.raises(ValueError, match=r"^x: is on cuda:0 while weight is on cpu"):
        rmsnorm.rms_norm(EmulatedArray(x), weight)
    with pytest.raises(ValueError, match=r"^weight: is on cuda:0 while x is on cpu"):
        rmsnorm.rms_norm(x, EmulatedArray(weight))
    with pytest.raises(ValueError, match=r"^weight: is on cuda:1 while x is on cuda:0"):
        rmsnorm.rms_norm(EmulatedArray(x), EmulatedArray(weight, (CUDA, 1)))
    with pytest.raises(ValueError, match=r"^out: is on cuda:0 while x is on cpu"):
        rmsnorm.rms_norm(x, out=EmulatedArray(x.copy()))


@pytest.mark.parametrize("memory", [CUDA_MANAGED, CUDA_HOST])
def test_memory_that_devices_can_read(memory):
    x, weight = sample((3, 64)), sample(64, seed=1)
    result = rmsnorm.rms_norm(EmulatedArray(x), EmulatedArray(weight, (memory, 0)))
    assert_near(result, reference(x, weight))


def test_managed_memory_alone():
    x = sample((3, 64))
    assert_near(rmsnorm.rms_norm(EmulatedArray(x, (CUDA_MANAGED, 0))), reference(x))


def test_device_that_is_not_there():
    with pytest.raises(RuntimeError, match=r"^x: is on cuda:5, where CUDA failed: .*\(error 101\)"):
        out = EmulatedArray(np.zeros((3, 64), np.float32), (CUDA, 5))
        rmsnorm.rms_norm(EmulatedArray(sample((3, 64)), (CUDA, 5)), out=out)


def test_device_of_another_kind():
    with pytest.raises(RuntimeError, match=r"^x: is on rocm:0; rmsnorm computes on the CPU and"):
        rmsnorm.rms_norm(EmulatedArray(sample((3, 64)), (ROCM, 0)))


def test_wrong_arguments_are_named_and_nothing_is_written():
    x = sample((3, 64))
    out = EmulatedArray(np.full((3, 63), 7, np.float32))
    with pytest.raises(ValueError, match=r"^out: expected shape \(3, 64\)"):
        rmsnorm.rms_norm(EmulatedArray(x), out=out)
    with pytest.raises(TypeError, match=r"^x: expected dtype float16"):
        rmsnorm.rms_norm(Integers())
    assert (out.host == 7).all()


class Integers(EmulatedArray):
    def __init__(self):
        super().__init__(sample((3, 64)))

    def __dlpack__(self, *, stream=None):
        capsule = super().__dlpack__(stream=stream)
        self._exports[-1][0].tensor.code = 0
        return capsule


def test_result_is_handed_over_with_a_stream_of_its_own():
    EmulatedNamespace.consumer_stream = 0x99
    result = rmsnorm.rms_norm(EmulatedArray(sample((3, 64))), stream=0x55)
    assert_near(result, reference(sample((3, 64))))
