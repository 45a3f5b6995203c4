"""Results for arrays of libraries that are no framework of ours: by DLPack, and of their own kind where they have one."""

import gc
import sys
import threading
import types

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
import rmsnorm
import torch
from floats import BF16, DTYPES, F16, F32, F64, assert_same_bits

NAMES = {F16: "float16", BF16: "bfloat16", F32: "float32", F64: "float64"}


class Producer:
    """The least that an array of some other library offers."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def sample(shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def as_torch(array):
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_numpy(exported):
    tensor = torch.from_dlpack(exported)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


def results_of_all_functions(x, dy, wrap):
    """Every new array that any function makes, of arrays that `wrap` made."""
    given, grads = wrap(x), wrap(dy)
    weight = wrap(np.ones(x.shape[-1], x.dtype))
    y, rstd = rmsnorm.rms_norm(given, weight, return_rstd=True)
    mean_square = rmsnorm.mean_square(given)
    return [
        *(y, rstd, mean_square),
        *rmsnorm.add_rms_norm(given, grads, weight, return_rstd=True),
        rmsnorm.rms_norm_apply(given, mean_square, weight),
        *rmsnorm.rms_norm_backward(grads, given, weight, rstd, has_bias=True),
        *rmsnorm.rms_norm_backward(grads, given, weight, mean_square=mean_square)[::3],
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_results_are_exported(dtype):
    x, dy = sample((3, 40), dtype), sample((3, 40), dtype, 1)
    actual = results_of_all_functions(x, dy, lambda a: Producer(as_torch(a)))
    expected = results_of_all_functions(x, dy, lambda a: a)
    for result, array in zip(actual, expected, strict=True):
        assert type(result) is rmsnorm.ExportedArray
        assert result.shape == array.shape and result.dtype == NAMES[array.dtype]
        assert result.__dlpack_device__() == (1, 0)
        assert_same_bits(as_numpy(result), array)


def test_an_exported_array_shares_its_memory_and_keeps_it():
    x = sample((4, 64))
    y = rmsnorm.rms_norm(Producer(x))
    assert repr(y) == "rmsnorm.ExportedArray(shape=(4, 64), dtype=float32, device=(1, 0))"
    first, second, third = np.from_dlpack(y), torch.from_dlpack(y), np.from_dlpack(y)
    second[0, 0] = 17
    assert first[0, 0] == third[0, 0] == 17 and first.flags.writeable
    second[0, 0] = rmsnorm.rms_norm(x)[0, 0].item()
    del y, first, second
    gc.collect()
    np.ones((4, 64), F32)
    assert_same_bits(third, rmsnorm.rms_norm(x))


def test_versions_of_capsules():
    y = rmsnorm.rms_norm(Producer(sample((4, 8))))
    assert '"dltensor"' in repr(y.__dlpack__())
    assert '"dltensor_versioned"' in repr(y.__dlpack__(max_version=(1, 0)))
    assert '"dltensor"' in repr(y.__dlpack__(stream=None, max_version=None, dl_device=(1, 0)))
    for keywords in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            y.__dlpack__(**keywords)
    with pytest.raises(TypeError):
        y.__dlpack__(no_such_keyword=1)


def test_a_consumer_lets_go_in_another_thread():
    results = [np.from_dlpack(rmsnorm.rms_norm(Producer(sample((8, 8))))) for _ in range(100)]
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert not results


def test_exported_arrays_are_arguments():
    x, weight = sample((3, 40)), sample(40, F32, 1)
    y = rmsnorm.rms_norm(Producer(x))
    again = rmsnorm.rms_norm(y, weight)
    assert type(again) is rmsnorm.ExportedArray
    expected = rmsnorm.rms_norm(rmsnorm.rms_norm(x), weight)
    assert_same_bits(as_numpy(again), expected)
    assert rmsnorm.rms_norm(y, weight, out=y) is y
    assert_same_bits(as_numpy(y), expected)
    assert_same_bits(
        rmsnorm.rms_norm(x, rmsnorm.rms_norm(Producer(weight))),
        rmsnorm.rms_norm(x, rmsnorm.rms_norm(weight)),
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1,), (2, 0, 3)])
def test_shapes_at_the_edge(shape):
    y = rmsnorm.rms_norm(Producer(np.ones(shape, F32)))
    assert y.shape == shape and np.from_dlpack(y).shape == shape


def test_out_is_returned_as_before():
    x, out = sample((3, 40)), np.zeros((3, 40), F32)
    assert rmsnorm.rms_norm(Producer(x), out=out) is out
    y, rstd = rmsnorm.rms_norm(Producer(x), out=out, return_rstd=True)
    assert y is out and type(rstd) is rmsnorm.ExportedArray


def test_errors_come_before_any_result():
    with pytest.raises(ValueError, match=r"^weight\b"):
        rmsnorm.rms_norm(Producer(sample((3, 40))), np.ones(7, F32))


# ---- libraries that have a from_dlpack ----


class ByItsType(Producer):
    @classmethod
    def from_dlpack(cls, producer, /):
        return cls(np.from_dlpack(producer))


class ByItsNamespace(ByItsType):
    def __array_namespace__(self, api_version=None):
        return types.SimpleNamespace(
            from_dlpack=lambda producer: ("namespace", np.from_dlpack(producer))
        )


class NamespaceWithoutDLPack(ByItsType):
    def __array_namespace__(self, api_version=None):
        return types.SimpleNamespace()


class TakesCapsules(Producer):
    """As libraries from before the protocol."""

    @staticmethod
    def from_dlpack(capsule):
        if "PyCapsule" not in type(capsule).__name__:
            raise TypeError("expected a capsule")
        producer = types.SimpleNamespace(
            __dlpack__=lambda **_: capsule, __dlpack_device__=lambda: (1, 0)
        )
        return TakesCapsules(np.from_dlpack(producer))


@pytest.mark.parametrize("kind", [ByItsType, NamespaceWithoutDLPack, TakesCapsules])
def test_the_type_makes_the_result(kind):
    x = sample((3, 40))
    y, rstd = rmsnorm.rms_norm(kind(x), return_rstd=True)
    expected_y, expected_rstd = rmsnorm.rms_norm(x, return_rstd=True)
    assert type(y) is kind and type(rstd) is kind
    assert_same_bits(y.array, expected_y)
    assert_same_bits(rstd.array, expected_rstd)


def test_the_namespace_comes_before_the_type():
    name, y = rmsnorm.rms_norm(ByItsNamespace(sample((3, 40))))
    assert name == "namespace"
    assert_same_bits(y, rmsnorm.rms_norm(sample((3, 40))))


@pytest.fixture
def package(monkeypatch):
    """A package `arrays` whose module arrays.core.dense defines a type of arrays."""
    for name in ("arrays", "arrays.core", "arrays.core.dense"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("Dense", (Producer,), {"__module__": "arrays.core.dense"})
    return types.SimpleNamespace(kind=kind, modules=sys.modules)


def maker(kind, module):
    def from_dlpack(producer):
        return kind(np.from_dlpack(producer))

    from_dlpack.__module__ = module
    return from_dlpack


@pytest.mark.parametrize("holder", ["arrays", "arrays.core", "arrays.core.dense"])
def test_the_package_makes_the_result(package, holder):
    package.modules[holder].from_dlpack = maker(package.kind, "arrays.convert")
    y = rmsnorm.rms_norm(package.kind(sample((3, 40))))
    assert type(y) is package.kind
    assert_same_bits(y.array, rmsnorm.rms_norm(sample((3, 40))))


def test_what_a_module_imported_from_elsewhere_is_not_its_own(package):
    package.modules["arrays"].from_dlpack = torch.from_dlpack
    assert type(rmsnorm.rms_norm(package.kind(sample((3, 40))))) is rmsnorm.ExportedArray
    package.modules["arrays"].from_dlpack = "no function"
    assert type(rmsnorm.rms_norm(package.kind(sample((3, 40))))) is rmsnorm.ExportedArray


class Failing(Producer):
    @classmethod
    def from_dlpack(cls, producer):
        raise BufferError("this library takes no float32")


def test_the_error_of_a_from_dlpack_is_the_cause():
    with pytest.raises(RuntimeError, match=r"^result: the from_dlpack of x's library failed") as e:
        rmsnorm.rms_norm(Failing(sample((3, 40))))
    assert str(e.value.__cause__) == "this library takes no float32"


def test_nothing_is_written_where_a_from_dlpack_fails():
    x, residual = Failing(sample((3, 40))), sample((3, 40), F32, 1)
    out, sums = (np.full((3, 40), 7, F32) for _ in range(2))
    for call in (
        lambda: rmsnorm.rms_norm(x, out=out, return_rstd=True),
        lambda: rmsnorm.add_rms_norm(x, residual, out=out),
        lambda: rmsnorm.add_rms_norm(x, residual, residual_out=sums),
        lambda: rmsnorm.add_rms_norm(x, residual, out=out, residual_out=sums, return_rstd=True),
        lambda: rmsnorm.rms_norm_backward(residual, x, sample(40, F32), dx_out=out),
        lambda: rmsnorm.rms_norm_backward(residual, x, dbias_out=out[0]),
    ):
        with pytest.raises(RuntimeError, match=r"^result: the from_dlpack of x's library failed"):
            call()
        assert (out == 7).all() and (sums == 7).all()
    assert rmsnorm.rms_norm(x, out=out) is out


def test_the_importer_of_a_second_result_moves_out():
    class Moving(Producer):
        @classmethod
        def from_dlpack(cls, producer):
            out.resize(0, refcheck=False)
            return np.from_dlpack(producer)

    out = np.full((16, 1024), 7, F32)
    with pytest.raises(ValueError, match=r"^out: its memory, shape or dtype changed"):
        rmsnorm.rms_norm(Moving(sample((16, 1024))), out=out, return_rstd=True)


def test_tvm_ffi():
    tvm_ffi = pytest.importorskip("tvm_ffi")
    x, dy = sample((3, 40)), sample((3, 40), F32, 1)
    actual = results_of_all_functions(x, dy, tvm_ffi.from_dlpack)
    expected = results_of_all_functions(x, dy, lambda a: a)
    for result, array in zip(actual, expected, strict=True):
        assert type(result) is tvm_ffi.Tensor
        assert_same_bits(np.from_dlpack(result), array)
    y = rmsnorm.rms_norm(Producer(x))
    assert_same_bits(np.from_dlpack(tvm_ffi.from_dlpack(y)), rmsnorm.rms_norm(x))


def test_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    kind = onnxruntime.OrtValue
    x, dy = sample((3, 40)), sample((3, 40), F32, 1)
    actual = results_of_all_functions(x, dy, kind.ortvalue_from_numpy)
    expected = results_of_all_functions(x, dy, lambda a: a)
    for result, array in zip(actual, expected, strict=True):
        assert type(result) is kind
        assert_same_bits(result.numpy(), array)
