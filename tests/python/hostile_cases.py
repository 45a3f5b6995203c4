"""Cases for test_hostile_arrays.py: what arrays say of themselves, as input and as output."""

import random
import re
import sys
import types
import weakref

import isolation
import numpy as np
import oracle
import rmsnorm
from floats import BF16, F16, F32, F64
from hostile_arrays import CPU, CUDA, FORWARDING, HOLLOW, Lying, Producer
from wrong_calls import CALLS

CASES = {}
case = isolation.entering(CASES)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def assert_refused(operation, changes, exception, pattern):
    """The call with these arguments raises, its message matches, and no array is written."""
    make, function = CALLS[operation]
    arguments = {**make(), **changes}
    arrays = [v for v in arguments.values() if issubclass(type(v), np.ndarray)]
    arrays += [v.array for v in arguments.values() if issubclass(type(v), Producer)]
    before = [a.tobytes() for a in arrays]
    try:
        function(**arguments)
    except exception as error:
        assert re.search(pattern, str(error), re.DOTALL), error
    else:
        raise AssertionError("the call was not refused")
    assert [a.tobytes() for a in arrays] == before


def every_array():
    """(operation, argument) for the arrays of every operation."""
    for operation, (make, _) in CALLS.items():
        for argument, value in make().items():
            if isinstance(value, np.ndarray):
                yield operation, argument


def copy_of(operation, argument):
    return CALLS[operation][0]()[argument]


# ---- what an object says of its type ----


@case("a module that stands in for NumPy")
def _():
    """Its arrays have the attributes of NumPy's and not their memory. This case comes first: modules
    that are found are looked up once in a process.
    """

    umath = np.__dict__.get("_core", np.__dict__.get("core"))._multiarray_umath

    class Array:
        __array_struct__ = property(lambda self: umath._ARRAY_API)
        dtype = property(lambda self: np.dtype(F32))

    real = sys.modules["numpy"]
    sys.modules["numpy"] = types.ModuleType("numpy")
    sys.modules["numpy"].ndarray, sys.modules["numpy"].empty = Array, np.empty
    try:
        for argument in ("x", "weight", "out"):
            assert_refused("rms_norm", {argument: Array()}, TypeError, rf"^(x|{argument})\b")
    finally:
        sys.modules["numpy"] = real
    assert type(rmsnorm.rms_norm(np.ones((3, 8), F32))) is np.ndarray


@case("proxies of arrays are taken through the protocol")
def _():
    for make in FORWARDING.values():
        for operation, argument in every_array():
            make_arguments, function = CALLS[operation]
            expected, arguments = make_arguments(), make_arguments()
            function(**expected)
            array = arguments[argument]
            function(**{**arguments, argument: make(array)})
            for name, value in expected.items():
                assert value.tobytes() == arguments[name].tobytes(), (operation, argument, name)


@case("a new result for a proxy is an array of its namespace")
def _():
    x = np.arange(24, dtype=F32).reshape(3, 8)
    for make in FORWARDING.values():
        y = rmsnorm.rms_norm(make(x))
        assert type(y) is np.ndarray and y.tobytes() == rmsnorm.rms_norm(x).tobytes()


@case("the array behind a weak proxy lives as long as it is read")
def _():
    x = np.ones((3, 8), F32)
    proxy = weakref.proxy(x)
    del x
    assert_refused("rms_norm", {"weight": proxy}, TypeError, r"^weight\b")


@case("what only says that it is an array is refused")
def _():
    for make in HOLLOW.values():
        for operation, argument in every_array():
            hollow = make(copy_of(operation, argument))
            assert_refused(operation, {argument: hollow}, TypeError, rf"^{argument}\b")


@case("an object whose metaclass lies is refused")
def _():
    class Liar(metaclass=Lying):
        pass

    for argument in ("x", "weight", "out"):
        assert_refused("rms_norm", {argument: Liar()}, TypeError, rf"^{argument}\b.*Liar")


@case("a subclass of ndarray is read as the memory that it has")
def _():
    class Deceiver(np.ndarray):
        dtype = property(lambda self: np.dtype(np.float64))
        shape = property(lambda self: (1000, 1000))
        flags = property(lambda self: {"WRITEABLE": True})
        __array_struct__ = property(lambda self: 17)

        def __dlpack__(self, **options):
            raise AssertionError("is not asked")

    x = np.arange(24, dtype=F32).reshape(3, 8)
    for dtype in (F32, F16, BF16, F64):
        plain = x.astype(dtype)
        y = rmsnorm.rms_norm(plain.view(Deceiver))
        assert y.tobytes() == rmsnorm.rms_norm(plain).tobytes()
    frozen = x.copy()
    frozen.flags.writeable = False
    assert_refused("rms_norm", {"out": frozen.view(Deceiver)}, ValueError, r"^out\b.*read-only")


@case("modules that stand in for frameworks are not believed")
def _():
    class Everything(metaclass=Lying):
        pass

    stub = types.ModuleType("stub")
    for name in ("Tensor", "Parameter", "ndarray", "Array", "Tracer", "MaskedArray", "bfloat16"):
        setattr(stub, name, Everything if name in ("Array", "Tracer") else int)
    for name in ("is_grad_enabled", "empty_like", "empty", "from_dlpack", "config", "Device",
                 "get_current_stream", "float16", "bfloat16", "float32", "float64"):  # fmt: skip
        setattr(stub, name, stub)
    for name in ("torch", "torch.nn", "cupy", "cupy.cuda", "numpy.ma", "ml_dtypes"):
        sys.modules[name] = stub
    x = np.arange(24, dtype=F32).reshape(3, 8)
    expected = x / np.sqrt((x.astype(F64) ** 2).mean(1, keepdims=True) + 1e-6)
    assert np.allclose(rmsnorm.rms_norm(x), expected)
    assert_refused("rms_norm", {"weight": 3}, TypeError, r"^weight\b.*int")


# ---- what is in a DLPack tensor ----

# What is said of an array that is right otherwise, and how it is refused.
FIELDS = {
    "rank -1": ({"ndim": -1}, ValueError, r"-1 dimensions.*0 to 64"),
    "least rank": ({"ndim": INT_MIN}, ValueError, rf"{INT_MIN} dimensions"),
    "rank 65": ({"ndim": 65}, ValueError, r"65 dimensions"),
    "greatest rank": ({"ndim": INT_MAX}, ValueError, rf"{INT_MAX} dimensions"),
    "no shape": ({"shape": None}, ValueError, r"no shape"),
    "neither shape nor strides": ({"shape": None, "strides": None}, ValueError, r"no shape"),
    "offset beyond all addresses": (
        {"byte_offset": 2**64 - 8},
        ValueError,
        r"18446744073709551608",
    ),
    "no memory": ({"data": None}, ValueError, r"no memory"),
    "no lanes": ({"lanes": 0}, TypeError, r"float32x0"),
    "four lanes": ({"lanes": 4}, TypeError, r"float32x4"),
    "most lanes": ({"lanes": 65535}, TypeError, r"float32x65535"),
    "on CUDA": ({"device_type": CUDA, "device_id": 1}, ValueError, r"says cpu.*capsule cuda:1"),
    "on no device": ({"device_type": 0}, ValueError, r"says cpu.*DLPack device 0:0"),
    "on a negative device": ({"device_type": -7}, ValueError, r"says cpu.*DLPack device -7:0"),
}
DTYPE_NAMES = {
    (0, 32): "int32",
    (0, 4): "int4",
    (1, 8): "uint8",
    (1, 4): "uint4",
    (2, 8): "float8",
    (2, 128): "float128",
    (2, 0): "float0",
    (3, 64): "opaque handle64",
    (4, 32): "bfloat32",
    (5, 64): "complex64",
    (6, 8): "bool",
    (6, 1): "bool of 1 bits",
    (7, 8): "float8_e3m4",
    (8, 8): "float8_e4m3",
    (9, 8): "float8_e4m3b11fnuz",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
    (15, 6): "float6_e2m3fn",
    (16, 6): "float6_e3m2fn",
    (17, 4): "float4_e2m1fn",
    (17, 16): "float4_e2m1fn of 16 bits",
    (200, 32): "DLPack type code 200 of 32 bits",
}


def sizes(array, size):
    return [size, *array.shape[1:]]


def hostile_producers(array):
    """(name, producer, exception, pattern) of an array."""
    for versioned in (False, True):
        for name, (said, exception, pattern) in FIELDS.items():
            yield name, Producer(array, versioned=versioned, **said), exception, pattern
        for size in (-1, -(2**63)):
            producer = Producer(array, versioned=versioned, shape=sizes(array, size))
            yield f"size {size}", producer, ValueError, rf"size {size} in dimension 0"
        for (code, bits), name in DTYPE_NAMES.items():
            producer = Producer(array, versioned=versioned, code=code, bits=bits)
            yield name, producer, TypeError, rf"float64.*, got {name}$"


@case("every member of a DLPack tensor")
def _():
    for operation, argument in every_array():
        array = copy_of(operation, argument)
        for _name, producer, exception, pattern in hostile_producers(array):
            assert_refused(operation, {argument: producer}, exception, rf"^{argument}: .*{pattern}")
            assert producer.made == producer.deleted == 1


@case("ranks and sizes whose product has no number")
def _():
    x = np.ones((3, 8), F32)
    huge = 2**62
    for shape, strides in (
        ([huge, huge], None),
        ([huge, 8], [0, 1]),
        ([2**61, 8], [0, 1]),
        ([2**58, 8], [0, 1]),
        ([8, huge], [1, 0]),
        ([huge] * 64, None),
        ([huge] * 64, [0] * 64),
        ([3, 8], [2**62, 1]),
        ([3, 8], [-(2**63), 1]),
    ):
        said = {"ndim": len(shape), "shape": shape, "strides": strides}
        try:
            rmsnorm.rms_norm(Producer(x, **said))
        except (ValueError, MemoryError) as error:
            assert re.search(r"^(x|result|out)\b", str(error)) or type(error) is MemoryError
        else:
            raise AssertionError(shape)
        assert_refused("rms_norm", {"weight": Producer(x[0], **said)}, ValueError, r"^weight\b")
        assert_refused("rms_norm", {"out": Producer(x, **said)}, ValueError, r"^out\b")


@case("empty arrays whose other sizes are huge")
def _():
    for shape in ((0, 2**62), (0, 2**40, 2**20), (2**62, 0), (0, 2**62, 2**62)):
        x = np.ones(8, F32)
        for strides in (None, [0] * len(shape)):
            said = {"ndim": len(shape), "shape": shape, "strides": strides}
            try:
                y = rmsnorm.rms_norm(Producer(x, **said))
            except ValueError as error:
                assert re.search(r"^(x|out)\b", str(error)), error
            except RuntimeError as error:
                assert "from_dlpack of x's library failed" in str(error), error
                assert "array is too big" in str(error.__cause__), error.__cause__
            else:
                assert y.shape == shape


@case("a deleter is called once, and need not be")
def _():
    x = np.arange(24, dtype=F32).reshape(3, 8)
    for versioned in (False, True):
        producer = Producer(x, versioned=versioned)
        assert rmsnorm.rms_norm(producer).tobytes() == rmsnorm.rms_norm(x).tobytes()
        assert producer.made == producer.deleted == 1
        without = Producer(x, versioned=versioned, has_deleter=False)
        assert rmsnorm.rms_norm(without).tobytes() == rmsnorm.rms_norm(x).tobytes()


@case("the memory of an export is released when the call is over")
def _():
    released = []

    class Watching(Producer):
        def __dlpack__(self, **options):
            released.append(other.deleted)
            return super().__dlpack__(**options)

    x = np.arange(24, dtype=F32).reshape(3, 8)
    other = Producer(x)
    rmsnorm.rms_norm(other, Watching(np.ones(8, F32)))
    assert released == [0] and other.deleted == 1


@case("capsules")
def _():
    x = np.ones((3, 8), F32)
    for name in (
        b"used_dltensor",
        b"used_dltensor_versioned",
        b"dltensors",
        b"tensor",
        b"arrow_schema",
    ):
        producer = Producer(x, name=name)
        assert_refused("rms_norm", {"x": producer}, TypeError, rf"^x\b.*capsule.*'{name.decode()}'")
    for major in (0, 2, 2**32 - 1):
        producer = Producer(x, version=(major, 1))
        assert_refused("rms_norm", {"x": producer}, TypeError, rf"^x\b.*DLPack {major}\b")
    for flags, pattern in ((1, r"^out\b.*read-only"), (2, r"^out\b.*copy"), (3, r"^out\b")):
        producer = Producer(x, flags=flags)
        assert_refused("rms_norm", {"out": producer}, ValueError, pattern)
        rmsnorm.rms_norm(Producer(x, flags=flags))
    rmsnorm.rms_norm(Producer(x, flags=2**64 - 4, version=(1, 2**32 - 1)))


@case("a capsule that comes twice")
def _():
    """Whoever consumes a capsule owns what is in it, so that the second one gets nothing."""

    class Twice(Producer):
        capsule = None

        def __dlpack__(self, **options):
            self.capsule = self.capsule or super().__dlpack__(**options)
            return self.capsule

    x, out = np.ones((8, 8), F32), np.full((8, 8), 7, F32)
    producer = Twice(x)
    try:
        rmsnorm.rms_norm(producer, producer, out=out)
    except TypeError as error:
        assert re.search(r"^weight\b.*'used_dltensor_versioned'", str(error))
    assert (out == 7).all() and producer.deleted == 1


@case("a capsule that another consumer takes during the call")
def _():
    """What was read from it stays until the call is over."""

    class Keeping(Producer):
        def __dlpack__(self, **options):
            self.capsule = super().__dlpack__(**options)
            return self.capsule

    class Taking(Producer):
        def __dlpack__(self, **options):
            class Again:
                __dlpack_device__ = self.__dlpack_device__
                __dlpack__ = staticmethod(lambda **options: kept.capsule)

            try:
                np.from_dlpack(Again())
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                refusals.append(error)
            return super().__dlpack__(**options)

    refusals = []
    x = np.arange(24, dtype=F32).reshape(3, 8)
    kept = Keeping(x)
    y = rmsnorm.rms_norm(kept, Taking(np.ones(8, F32)))
    assert y.tobytes() == rmsnorm.rms_norm(x, np.ones(8, F32)).tobytes()
    assert len(refusals) == 1 and kept.deleted == 1


@case("what __dlpack_device__ returns")
def _():
    x = np.ones((3, 8), F32)
    for device in (
        (),
        (1,),
        (1, 0, 0),
        None,
        1,
        "ab",
        [1.5, 0],
        (2**70, 0),
        (1, -(2**70)),
        (None, 0),
    ):
        producer = Producer(x, device=device)
        assert_refused("rms_norm", {"x": producer}, TypeError, r"^x: its __dlpack_device__ failed$")
        assert producer.made == 0
    # A build with CUDA finds that the capsule says otherwise.
    unusable, contradicted = (RuntimeError, r"^x: is on"), (ValueError, r"^x: .* says cuda")
    for device in ((0, 0), (-1, 0), (999, 0), (CUDA, 0), (CUDA, -1)):
        alone = {**dict.fromkeys(("weight", "bias", "out")), "x": Producer(x, device=device)}
        with_cuda = device == (CUDA, 0) and rmsnorm.info()["cuda"]["built"]
        assert_refused("rms_norm", alone, *(contradicted if with_cuda else unusable))
    for device in ([CPU, 0], (CPU, 5), (3, 0)):
        rmsnorm.rms_norm(Producer(x, device=device))


# ---- at random ----

STORED = (F16, BF16, F32, F64)
DLPACK_DTYPES = {F16: (2, 16, 1), BF16: (4, 16, 1), F32: (2, 32, 1), F64: (2, 64, 1)}
HOSTS = (1, 3, 11)
LIES = {
    "ndim": (-1, INT_MIN, 65, INT_MAX),
    "shape": (None,),
    "byte_offset": (2**64 - 1, 2**64 - 4096),
    "data": (None,),
    "code": (*range(18), 255),
    "bits": (0, 1, 4, 8, 16, 24, 32, 64, 128, 255),
    "lanes": (0, 1, 2, 65535),
    "device_type": (-1, 0, 1, 2, 3, 4, 8, 10, 11, 13, 1000),
    "device_id": (-1, 0, 1, INT_MAX),
    "strides": (None,),
}


def random_shape(rng):
    rank = rng.choice((0, 1, 1, 2, 2, 2, 3, 5, 8, 9, 12, 32))
    shape = [1] * rank
    for d in rng.sample(range(rank), min(rank, 4)):
        shape[d] = rng.choice((0, 1, 2, 3, 5, 8) if rng.random() < 0.2 else (1, 2, 3, 5))
    return tuple(shape)


def random_array(rng, shape, dtype):
    """In any order of memory, often with every other element of it left out."""
    order = rng.sample(range(len(shape)), len(shape))
    step = rng.choice((1, 2))
    wide = np.zeros([shape[d] if shape[d] < 2 else step * shape[d] for d in order], dtype)
    every = (slice(None, None, 1 if shape[d] < 2 else step) for d in order)
    view = wide[(..., *every)].transpose([order.index(d) for d in range(len(shape))])
    view[...] = np.reshape([rng.uniform(-3, 3) for _ in range(view.size)], shape).astype(dtype)
    return view


def random_guise(rng, array):
    """(object, what it says) for an array; None for what has no memory."""
    kind = rng.choice(("plain", "weak", "proxy", "producer", "producer", "liar", "liar", "hollow"))
    if kind == "plain" or (array.dtype == BF16 and kind in ("weak", "proxy")):
        return array, {}
    if kind in ("weak", "proxy"):
        return FORWARDING[kind](array), {}
    if kind == "hollow":
        return rng.choice(list(HOLLOW.values()))(array), None
    fields = rng.sample(sorted(LIES), rng.choice((1, 1, 2, 3))) if kind == "liar" else ()
    said = {field: rng.choice(LIES[field]) for field in fields}
    return Producer(array, versioned=rng.random() < 0.5, **said), said


def is_unknowable(array, said):
    """Whether something is said that could be so, and that a reader would have to believe."""
    if said is None:
        return False
    dtype = said_dtype(array, said)
    another = dtype in DLPACK_DTYPES.values() and dtype != DLPACK_DTYPES[array.dtype]
    return another or ("strides" in said and not array.flags.c_contiguous)


def said_dtype(array, said):
    facts = dict(zip(("code", "bits", "lanes"), DLPACK_DTYPES[array.dtype]))
    return tuple({**facts, **said}[field] for field in facts)


def is_false(array, said):
    """Whether anything is said that cannot be so."""
    return (
        said is None
        or said_dtype(array, said) not in DLPACK_DTYPES.values()
        or said.get("device_type", CPU) not in HOSTS
        or "ndim" in said
        or ("shape" in said and array.ndim > 0)
        or ("byte_offset" in said and "data" not in said)
        or ("data" in said and array.size > 0)
    )


def random_call(rng):
    shape = random_shape(rng)
    arrays = {
        "x": random_array(rng, shape, rng.choice(STORED)),
        "weight": random_array(rng, shape[-1:], rng.choice(STORED)),
        "out": random_array(rng, shape, rng.choice(STORED)),
    }
    return arrays, {name: random_guise(rng, array) for name, array in arrays.items()}


def assert_right(arrays):
    x, out = arrays["x"], arrays["out"]
    rows = (-1, x.shape[-1])
    if x.size > 0:
        exact = oracle.exact_norm(x.reshape(rows), arrays["weight"].reshape(1, -1))
        oracle.assert_within_budget(out.reshape(rows), exact)


def assert_right_or_named(arrays, guises):
    """True where the call was refused."""
    x, weight, out = (guises[name][0] for name in ("x", "weight", "out"))
    before = arrays["out"].tobytes()
    false = {name for name, (_, said) in guises.items() if is_false(arrays[name], said)}
    if arrays["x"].ndim == 0:
        false.add("x")
    try:
        rmsnorm.rms_norm(x, weight, out=out)
    except (TypeError, ValueError, RuntimeError) as error:
        assert str(error).split(":")[0] in false, (error, guises)
        assert arrays["out"].tobytes() == before
        return True
    assert not false, guises
    assert_right(arrays)
    return False


@case("arrays in random guises")
def _():
    rng = random.Random(10)
    refused, taken = 0, 0
    for _ in range(1500):
        arrays, guises = random_call(rng)
        if any(is_unknowable(arrays[name], said) for name, (_, said) in guises.items()):
            continue
        if assert_right_or_named(arrays, guises):
            refused += 1
        else:
            taken += 1
    assert refused > 500 and taken > 250, (refused, taken)


if __name__ == "__main__":
    isolation.main(CASES)
