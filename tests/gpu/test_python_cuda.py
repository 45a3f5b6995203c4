"""The Python package on CUDA arrays of torch, CuPy and JAX.

Results are compared with float64 arithmetic on the device, in units in the last place, or bit by
bit with what the same call gives elsewhere. RMSNORM_TEST_FRAMEWORKS="cupy jax" makes the absence of
one of these a failure.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import numpy
import pytest

# JAX would take most of the device's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

torch = pytest.importorskip("torch")
import rmsnorm
from rmsnorm import _core

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

REQUIRED = os.environ.get("RMSNORM_TEST_FRAMEWORKS", "").split()
EPS = 1e-6
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [F16, BF16, F32, F64]
# What is promised; the float64 reference errs by a few units of its own.
BUDGETS = {
    dtype: _core.error_bound(name, "float64" if dtype == F64 else "float32")
    for dtype, name in zip(DTYPES, ("float16", "bfloat16", "float32", "float64"))
}
BUDGETS[F64] += 12
# Fraction bits, and the exponent of the smallest normal number.
FORMATS = {F16: (10, -14), BF16: (7, -126), F32: (23, -126), F64: (52, -1022)}
SHAPES = [(1, 1), (5, 7), (33, 128), (7, 1000), (64, 4096), (3, 4097), (2, 3, 5120), (4, 70000)]
# Cycles: some 20 ms at 2 GHz, thousands of times what the launches after it take.
LONG = 40_000_000


def framework(name):
    try:
        return __import__(name)
    except ImportError:
        if name in REQUIRED:
            raise
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def cupy():
    return framework("cupy")


@pytest.fixture(scope="module")
def jax():
    module = framework("jax")
    if all(device.platform != "gpu" for device in module.devices()):
        assert "jax" not in REQUIRED, "JAX sees no CUDA device"
        pytest.skip("JAX sees no CUDA device")
    return module


def sample(shape, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=F64).to(dtype)


def exact_norm(x, weight=None, eps=EPS):
    x = x.double()
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


def error_in_units(y, exact):
    assert y.shape == exact.shape
    fraction_bits, smallest_exponent = FORMATS[y.dtype]
    exponent = (torch.frexp(exact).exponent - 1).clamp(min=smallest_exponent)
    unit = torch.ldexp(torch.ones_like(exact), exponent - fraction_bits)
    error = ((y.double() - exact).abs() / unit).max()
    return math.inf if torch.isnan(error) else error.item()


def assert_within_budget(y, exact, extra=0.0):
    assert error_in_units(y, exact) <= BUDGETS[y.dtype] + extra


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b)


def test_build_knows_the_device():
    cuda = rmsnorm.info()["cuda"]
    assert cuda["built"]
    assert len(cuda["devices"]) == torch.cuda.device_count()
    capability = torch.cuda.get_device_capability(0)
    assert tuple(cuda["devices"][0]["compute_capability"]) == capability


def exact_gradients(dy, x, weight, eps=EPS):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    return torch.autograd.grad(exact_norm(x, weight, eps), (x, weight), dy.double())


def assert_gradients_near(gradients, exact):
    """Within roundings of the compute type, relative to the largest, and of the result's dtype."""
    for actual, expected in zip(gradients, exact):
        compute = F64 if actual.dtype == F64 else F32
        absolute = 256 * torch.finfo(compute).eps * expected.abs().max().item()
        relative = torch.finfo(actual.dtype).eps
        assert torch.allclose(actual.double(), expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # in a row of one dx cancels to nothing
def test_torch_backward(shape, dtype):
    dy, x, weight = (sample(s, dtype, i) for i, s in enumerate((shape, shape, shape[-1:])))
    exact = exact_gradients(dy, x, weight)
    dx, dweight, dbias = rmsnorm.rms_norm_backward(dy, x, weight, has_bias=True)
    assert dx.device == x.device and dx.dtype == dweight.dtype == dbias.dtype == dtype
    assert_gradients_near((dx, dweight), exact)
    assert_gradients_near((dbias,), (dy.double().sum(tuple(range(len(shape) - 1))),))
    again = rmsnorm.rms_norm_backward(dy, x, weight, has_bias=True, dx_out=dy)
    assert again[0] is dy
    for a, b in zip(again, (dx, dweight, dbias)):
        assert_same(a, b)


def test_torch_backward_on_a_given_stream():
    dy, x, weight = sample((512, 4096), F32), sample((512, 4096), F32, 1), sample((4096,), F32, 2)
    expected = rmsnorm.rms_norm_backward(dy, x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    outs = {"dx_out": torch.empty_like(dy), "dweight_out": torch.empty_like(weight)}
    for _ in range(3):
        rmsnorm.rms_norm_backward(dy, x, weight, stream=stream, **outs)
    stream.synchronize()
    for a, b in zip(outs.values(), expected):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rmsnorm_torch(dtype):
    import rmsnorm.torch

    dy, x = sample((64, 4096), dtype), sample((64, 4096), dtype, 1).requires_grad_()
    norm = rmsnorm.torch.RMSNorm(4096, EPS, device="cuda", dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    y = norm(x)
    assert_within_budget(y.detach(), exact_norm(x.detach(), norm.weight.detach()))
    gradients = torch.autograd.grad(y, (x, norm.weight), dy)
    assert_gradients_near(gradients, exact_gradients(dy, x, norm.weight))
    compiled = torch.compile(norm, fullgraph=True)
    again = compiled(x)
    assert_same(again, y)
    for a, b in zip(torch.autograd.grad(again, (x, norm.weight), dy), gradients):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_is_torchs(dtype):
    import rmsnorm.torch

    x, weight = sample((64, 512), dtype).requires_grad_(), sample((512,), dtype, 1).requires_grad_()
    replaced = torch.nn.RMSNorm(512, EPS, device="cuda", dtype=dtype)
    assert rmsnorm.torch.replace_rms_norms(replaced).replaced
    with torch.no_grad():
        replaced.weight.copy_(weight)
    with torch.autocast("cuda", BF16):
        theirs = torch.nn.functional.rms_norm(x, (512,), weight, EPS)
        ours = rmsnorm.torch.rms_norm(x, 512, weight, EPS)
        assert_same(replaced(x), ours)
    # torch has rms_norm in its list for float32 since 2.12.
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert ours.dtype == (theirs.dtype if release >= (2, 12) or dtype == F64 else F32)
    dy = sample((64, 512), ours.dtype, 2)
    gradients = torch.autograd.grad(ours, (x, weight), dy)
    assert_gradients_near(gradients, exact_gradients(dy, x, weight))
    if ours.dtype == theirs.dtype:
        for a, b in zip(gradients, torch.autograd.grad(theirs, (x, weight), dy)):
            assert a.dtype == b.dtype
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_norm(shape, dtype):
    x, weight = sample(shape, dtype), sample(shape[-1:], dtype, 1)
    y, rstd = rmsnorm.rms_norm(x, weight, return_rstd=True)
    assert type(y) is torch.Tensor and y.device == x.device and y.dtype == dtype
    assert y.is_contiguous() and not y.requires_grad
    assert_within_budget(y, exact_norm(x, weight))
    assert rstd.shape == shape[:-1] and rstd.device == x.device
    exact_rstd = 1 / torch.sqrt(x.double().square().mean(-1) + EPS)
    assert torch.allclose(rstd.double(), exact_rstd, rtol=2.0**-22)
    assert_within_budget(rmsnorm.rms_norm(x), exact_norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_add(shape, dtype):
    x, residual = sample(shape, dtype), sample(shape, dtype, 1)
    weight = sample(shape[-1:], dtype, 2)
    y, total = rmsnorm.add_rms_norm(x, residual, weight)
    assert_same(total, x + residual)
    assert_within_budget(y, exact_norm(total, weight))
    assert_same(y, rmsnorm.rms_norm(total, weight))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_mixed_dtypes(dtype, weight_dtype):
    x, weight = sample((9, 513), dtype), sample(513, weight_dtype, 1)
    for out_dtype, name in ((F16, "float16"), (BF16, "bfloat16"), (F32, "float32")):
        y = rmsnorm.rms_norm(x, weight, out_dtype=name)
        assert y.dtype == out_dtype
        assert_within_budget(y, exact_norm(x, weight))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_torch_roundings(dtype):
    x, weight = sample((50, 4096), dtype), sample(4096, dtype, 1)
    for rounding in ("before_weight", "rstd"):
        y, rstd = rmsnorm.rms_norm(x, weight, rounding=rounding, return_rstd=True)
        if rounding == "rstd":
            rstd = rstd.to(dtype).float()
        assert_same(y, (x.float() * rstd[:, None]).to(dtype) * weight)
    gemma = rmsnorm.rms_norm(x, weight, weight_offset=1.0)
    wide = 1.0 + weight.float()
    assert_within_budget(gemma, exact_norm(x, wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_mean_square_and_apply(dtype):
    x, weight = sample((12, 3000), dtype), sample(3000, dtype, 1)
    mean = rmsnorm.mean_square(x)
    assert mean.device == x.device and mean.dtype == (F64 if dtype == F64 else F32)
    assert torch.allclose(mean.double(), x.double().square().mean(-1), rtol=2.0**-23)
    # The mean square was rounded on the way: up to another unit of f32.
    extra = 1.0 if dtype == F32 else 0.0
    assert_within_budget(rmsnorm.rms_norm_apply(x, mean, weight), exact_norm(x, weight), extra)
    left, right = x[:, :1000], x[:, 1000:]
    shared = (rmsnorm.mean_square(left) + 2 * rmsnorm.mean_square(right)) / 3
    y = rmsnorm.rms_norm_apply(left, shared, weight[:1000])
    assert_within_budget(y, exact_norm(x, weight)[:, :1000], 2 * extra)


def test_torch_layouts():
    x = sample((6, 8, 256), BF16)
    wide = sample((40, 3 * 4 * 128), BF16).view(40, 12, 128)
    views = [x[:, 1:5], x.transpose(0, 1), x.permute(2, 0, 1), x[..., ::2], x[2], x[:, :, 3:]]
    views += [wide[:, :4], wide[:, 4:8], x[:1].expand(6, 8, 256), x[0, 0], x[:, :, 1:129]]
    for view in views:
        assert_same(rmsnorm.rms_norm(view), rmsnorm.rms_norm(view.contiguous()))
        copy = view.clone(memory_format=torch.contiguous_format)
        assert rmsnorm.rms_norm(copy, out=copy) is copy
        assert_same(copy, rmsnorm.rms_norm(view))
    out = torch.full((6, 16, 256), math.nan, device="cuda", dtype=BF16)
    rmsnorm.rms_norm(x, out=out[:, ::2])
    assert_same(out[:, ::2].contiguous(), rmsnorm.rms_norm(x))
    assert torch.isnan(out[:, 1::2]).all()
    heads = sample((8, 256), BF16, 1)
    assert_within_budget(rmsnorm.rms_norm(x, heads), exact_norm(x, heads))
    y = rmsnorm.rms_norm(x, sample((8, 256), BF16, 1), axis=-2)
    flat = exact_norm(x.reshape(6, -1), heads.reshape(-1)).reshape(6, 8, 256)
    assert_within_budget(y, flat)


def test_torch_in_place_residual_stream():
    x, residual, weight = (sample((32, 4096), BF16, seed) for seed in range(3))
    weight = weight[0].contiguous()
    expected_y, expected_total = rmsnorm.add_rms_norm(x, residual, weight)
    y, total = rmsnorm.add_rms_norm(x, residual, weight, out=x, residual_out=residual)
    assert y is x and total is residual
    assert_same(x, expected_y)
    assert_same(residual, expected_total)


def test_torch_empty():
    for shape in ((0, 16), (3, 0), (0,)):
        x = torch.empty(shape, device="cuda")
        y = rmsnorm.rms_norm(x)
        assert y.shape == shape and y.device == x.device


def test_rows_do_not_depend_on_the_batch():
    for n in (128, 1000, 4096, 65536):
        x, weight = sample((37, n), BF16), sample(n, BF16, 1)
        together = rmsnorm.rms_norm(x, weight)
        for row in (0, 17, 36):
            assert_same(together[row], rmsnorm.rms_norm(x[row], weight))


def test_rows_that_overflow_and_underflow():
    for dtype, largest, least in ((BF16, 1e38, 1e-38), (F32, 1e38, 1e-30)):
        x = sample((4, 2048), F64)
        x = torch.stack([x[0] * largest / 8, x[1] * least, x[2], x[3]]).to(dtype)
        assert_within_budget(rmsnorm.rms_norm(x, eps=0.0), exact_norm(x, eps=0.0))


def test_gradients_are_never_dropped():
    x = sample((3, 64), F32).requires_grad_()
    with pytest.raises(RuntimeError, match="grad"):
        rmsnorm.rms_norm(x, out=torch.empty_like(x))
    y, dy = rmsnorm.rms_norm(x), sample((3, 64), F32, 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_same(dx, rmsnorm.rms_norm_backward(dy, x.detach())[0])
    with torch.no_grad():
        assert_same(rmsnorm.rms_norm(x), rmsnorm.rms_norm(x.detach()))


# Behind a long kernel the order of what follows shows: were the norm on another stream, it would
# read x, or the reader y, before their time.
@pytest.mark.parametrize("given", ["current", "object", "handle"])
def test_torch_streams(given):
    old, new, weight = (sample((256, 4096), BF16, seed) for seed in range(3))
    weight = weight[0].contiguous()
    expected = rmsnorm.rms_norm(new, weight)
    x, y = old.clone(), torch.zeros_like(old)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        x.copy_(new)
    if given == "current":
        with torch.cuda.stream(stream):
            rmsnorm.rms_norm(x, weight, out=y)
    else:
        argument = stream if given == "object" else stream.cuda_stream
        rmsnorm.rms_norm(x, weight, out=y, stream=argument)
    assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_same(y, expected)


def test_torch_new_results_on_a_side_stream():
    x = sample((512, 4096), BF16)
    expected = rmsnorm.rms_norm(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(stream):
            y = rmsnorm.rms_norm(x)
            copy = y.clone()
            del y
        stream.synchronize()
        assert_same(copy, expected)


def test_torch_graph():
    x, residual, weight = (sample((64, 4096), BF16, seed) for seed in range(3))
    weight = weight[0].contiguous()
    rmsnorm.add_rms_norm(x, residual, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, total = rmsnorm.add_rms_norm(x, residual, weight)
        z = rmsnorm.rms_norm(y, weight)
        mean = rmsnorm.mean_square(z)
        applied = rmsnorm.rms_norm_apply(z, mean, weight)
    for seed in (5, 6):
        x.copy_(sample((64, 4096), BF16, seed))
        graph.replay()
        expected_y, expected_total = rmsnorm.add_rms_norm(x, residual, weight)
        assert_same(y, expected_y)
        assert_same(total, expected_total)
        assert_same(z, rmsnorm.rms_norm(expected_y, weight))
        assert_same(mean, rmsnorm.mean_square(z))
        assert_same(applied, rmsnorm.rms_norm_apply(z, mean, weight))


def test_threads():
    x, weight = sample((128, 4096), BF16), sample(4096, BF16, 1)
    expected = rmsnorm.rms_norm(x, weight)
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                y = rmsnorm.rms_norm(x, weight)
            torch.cuda.current_stream().synchronize()
            if not torch.equal(y, expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "out"])
def test_mixed_devices_are_refused(name):
    x, other = sample((4, 64), F32), torch.ones(4, 64)
    argument = other[0].contiguous() if name in ("weight", "bias") else other
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        if name == "residual":
            rmsnorm.add_rms_norm(x, argument)
        else:
            rmsnorm.rms_norm(x, **{name: argument})
    assert torch.equal(other, torch.ones(4, 64))
    with pytest.raises(ValueError, match=r"\bweight\b"):
        rmsnorm.rms_norm(other, x[0].contiguous())


def test_wrong_calls_leave_the_device_usable():
    x = sample((4, 64), F32)
    with pytest.raises((TypeError, ValueError), match=r"\bweight\b"):
        rmsnorm.rms_norm(x, sample(63, F32))
    with pytest.raises((TypeError, ValueError), match=r"\bout\b"):
        rmsnorm.rms_norm(x, out=torch.empty(4, 65, device="cuda"))
    with pytest.raises(TypeError, match=r"\bstream\b"):
        rmsnorm.rms_norm(x, stream="default")
    with pytest.raises((TypeError, ValueError), match=r"\bx\b"):
        rmsnorm.rms_norm(x.long())
    assert_within_budget(rmsnorm.rms_norm(x), exact_norm(x))


def test_more_elements_than_31_bits_count():
    rows, n = (1 << 31) // 4096 + 3, 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 2 * rows * n:
        pytest.skip("not enough device memory")
    x = torch.randn(rows, n, device="cuda", dtype=BF16)
    y = rmsnorm.rms_norm(x)
    assert_within_budget(y[-4:], exact_norm(x[-4:]))
    assert_within_budget(y[:4], exact_norm(x[:4]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_cupy(cupy, dtype):
    generator = numpy.random.default_rng(0)
    x = cupy.asarray(generator.standard_normal((33, 1000)).astype(dtype))
    weight = cupy.asarray(generator.standard_normal(1000).astype(dtype))
    y, rstd = rmsnorm.rms_norm(x, weight, return_rstd=True)
    assert type(y) is cupy.ndarray and y.dtype == dtype and y.device == x.device
    assert type(rstd) is cupy.ndarray and rstd.shape == (33,)
    cupy.cuda.get_current_stream().synchronize()
    tx, tw = torch.from_dlpack(x), torch.from_dlpack(weight)
    assert_within_budget(torch.from_dlpack(y), exact_norm(tx, tw))
    assert_same(torch.from_dlpack(y), rmsnorm.rms_norm(tx, tw))
    y, total = rmsnorm.add_rms_norm(x, x, weight)
    assert type(total) is cupy.ndarray
    assert (total == x + x).all()
    assert type(rmsnorm.mean_square(x)) is cupy.ndarray
    applied = rmsnorm.rms_norm_apply(x, rmsnorm.mean_square(x), weight)
    assert type(applied) is cupy.ndarray
    out = cupy.empty_like(x)
    assert rmsnorm.rms_norm(x, weight, out=out) is out
    assert (out == rmsnorm.rms_norm(x, weight)).all()
    strided = x[::2, ::3]
    assert (rmsnorm.rms_norm(strided) == rmsnorm.rms_norm(cupy.ascontiguousarray(strided))).all()


@pytest.mark.parametrize("given", ["current", "object", "handle"])
def test_cupy_streams(cupy, given):
    generator = numpy.random.default_rng(0)
    old, new = (
        cupy.asarray(generator.standard_normal((256, 4096), dtype=numpy.float32)) for _ in range(2)
    )
    expected = rmsnorm.rms_norm(new)
    x, y = old.copy(), cupy.zeros_like(old)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(LONG)
    with stream:
        x[...] = new
        if given == "current":
            rmsnorm.rms_norm(x, out=y)
    if given != "current":
        rmsnorm.rms_norm(x, out=y, stream=stream if given == "object" else stream.ptr)
    assert not stream.done, "the call waited for the device"
    stream.synchronize()
    assert (y == expected).all()


def test_frameworks_mix_on_one_device(cupy):
    x, weight = sample((8, 512), F32), sample(512, F32, 1)
    torch.cuda.synchronize()
    y = rmsnorm.rms_norm(x, cupy.from_dlpack(weight))
    assert type(y) is torch.Tensor
    assert_same(y, rmsnorm.rms_norm(x, weight))
    mixed = rmsnorm.rms_norm(cupy.from_dlpack(x), weight)
    assert type(mixed) is cupy.ndarray


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax(jax, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (33, 1000), dtype)
    residual = jax.random.normal(keys[1], (33, 1000), dtype)
    weight = jax.random.normal(keys[2], (1000,), dtype)
    y, rstd = rmsnorm.rms_norm(x, weight, return_rstd=True)
    assert isinstance(y, jax.Array) and y.dtype == x.dtype and y.devices() == x.devices()
    assert isinstance(rstd, jax.Array) and rstd.shape == (33,)
    tx, tr, tw, ty = (torch.from_dlpack(a) for a in (x, residual, weight, y))
    torch.cuda.synchronize()
    assert_within_budget(ty, exact_norm(tx, tw))
    assert_same(ty, rmsnorm.rms_norm(tx, tw))
    y, total = rmsnorm.add_rms_norm(x, residual, weight)
    assert isinstance(total, jax.Array)
    expected_y, expected_total = rmsnorm.add_rms_norm(tx, tr, tw)
    assert_same(torch.from_dlpack(y), expected_y)
    assert_same(torch.from_dlpack(total), expected_total)
    mean = rmsnorm.mean_square(x)
    assert isinstance(mean, jax.Array) and mean.shape == (33,)
    assert isinstance(rmsnorm.rms_norm_apply(x, mean, weight), jax.Array)
    with pytest.raises((TypeError, ValueError), match=r"\bout\b"):
        rmsnorm.rms_norm(x, weight, out=y)


def test_jax_results_are_ready_for_jax(jax):
    """JAX has streams of its own: what it made must have arrived, and what it reads be there."""
    scale = jax.jit(lambda a: a @ a * 0.01)
    one = jax.numpy.float32(1)
    x = jax.random.normal(jax.random.key(0), (2048, 2048), "float32")
    y = x
    for _ in range(20):
        y = rmsnorm.rms_norm(scale(y)) * one
    expected = x
    for _ in range(20):
        made = scale(expected)
        made.block_until_ready()
        result = rmsnorm.rms_norm(torch.from_dlpack(made))
        torch.cuda.synchronize()
        expected = jax.numpy.from_dlpack(result) * one
    assert bool((y == expected).all())


class DLPackOnly:
    """An array of which the package knows nothing but DLPack, so that results are in its own memory
    and taken by this class's from_dlpack."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **keywords):
        return self.tensor.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return DLPackOnly

    @staticmethod
    def from_dlpack(source):
        return DLPackOnly(torch.from_dlpack(source))


def expect_results_to_outlive_what_is_freed(calls, results_of):
    """`calls`: two of them, each on a stream of its own. The first one's result is freed while its
    kernel waits behind a long one; the second one's must not be given that memory."""
    (first, slow), (second, fast) = calls
    expected = results_of(second()).clone()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(slow):
            torch.cuda._sleep(LONG // 10)
            del_me = first()
        del del_me
        with torch.cuda.stream(fast):
            kept = [second() for _ in range(4)]
        torch.cuda.synchronize()
        for result in kept:
            assert_same(results_of(result), expected)
        del kept, result


def test_results_are_freed_behind_the_kernel():
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    arrays = [DLPackOnly(sample((256, 4096), F32, seed)) for seed in range(2)]
    calls = [(lambda x=x, s=s: rmsnorm.rms_norm(x, stream=s), s) for x, s in zip(arrays, streams)]
    expect_results_to_outlive_what_is_freed(calls, lambda y: y.tensor)


def test_jax_results_are_freed_behind_the_kernel(jax):
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    arrays = [jax.random.normal(jax.random.key(seed), (256, 4096)) for seed in range(2)]
    calls = [(lambda x=x, s=s: rmsnorm.rms_norm(x, stream=s), s) for x, s in zip(arrays, streams)]
    expect_results_to_outlive_what_is_freed(calls, torch.from_dlpack)


ONE_DEVICE_ALONE = """
import sys
import torch
import rmsnorm

last = torch.cuda.device_count() - 1
x = torch.ones(4, 256, device=f"cuda:{last}")
for _ in range(3):
    y = rmsnorm.rms_norm(x)
    rmsnorm.rms_norm_backward(y, x)
torch.cuda.synchronize(last)
assert torch.cuda.current_device() == 0
print([torch._C._cuda_hasPrimaryContext(i) for i in range(last + 1)])
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two devices")
def test_only_the_device_that_is_used_gets_a_context():
    done = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE_ALONE], capture_output=True, text=True, check=True
    )
    others = torch.cuda.device_count() - 1
    assert done.stdout.strip() == str([False] * others + [True])
