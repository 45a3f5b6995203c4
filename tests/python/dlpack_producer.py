"""An array of a library that speaks DLPack, in any dialect of it, with every field open to change.

Producer(array) exports a NumPy array through a struct of its own, laid out as dlpack.h says. Its
keywords replace one thing each; what is not replaced describes the array truthfully.
"""

import ctypes

import numpy as np

CPU = (1, 0)
READ_ONLY, IS_COPIED = 1, 2  # of `flags`
FLOAT, BFLOAT = 2, 4  # type codes

INT64_POINTER = ctypes.POINTER(ctypes.c_int64)
Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", INT64_POINTER),
        ("strides", INT64_POINTER),
        ("byte_offset", ctypes.c_uint64),
    ]


class Unversioned(ctypes.Structure):
    """DLManagedTensor, of DLPack before 1.0."""

    name = b"dltensor"
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned, of DLPack 1.0 and later."""

    name = b"dltensor_versioned"
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


def _python(name, result, *arguments):
    # A prototype of our own: those of ctypes.pythonapi are shared by everyone in the process.
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


new_capsule = _python(
    "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)
_has_name = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)

# What is exported, by the address of its struct, until the consumer calls the deleter. A capsule's
# name is here too: a capsule keeps no copy of it.
_exported = {}


@Deleter
def _delete(address):
    _exported.pop(address).producer.deleted += 1


@Deleter
def _drop_capsule(capsule):
    """As in dlpack.h: a capsule that nobody renamed still owns its tensor."""
    for layout in (Unversioned, Versioned):
        if _has_name(capsule, layout.name):
            _delete(_pointer(capsule, layout.name))


def _int64s(values):
    return None if values is None else (ctypes.c_int64 * max(1, len(values)))(*values)


class _Export:
    """One struct with all that it points to; producer: who is told of its end."""

    def __init__(self, producer, layout, name, members, tensor):
        self.producer, self.name = producer, name
        deleter = _delete if producer.has_deleter else Deleter()
        self.sizes = {key: _int64s(tensor.pop(key)) for key in ("shape", "strides")}
        pointers = {key: ctypes.cast(value, INT64_POINTER) for key, value in self.sizes.items()}
        self.managed = layout(tensor=Tensor(**tensor, **pointers), deleter=deleter, **members)
        self.address = ctypes.addressof(self.managed)


class Producer:
    """array: the NumPy array whose memory is exported.

    versioned: by the struct of DLPack 1.0 and later, which has a `version` and `flags`.
    keywords: those that __dlpack__ takes (None: all); any other is Python's usual TypeError.
    device: what __dlpack_device__ answers and the struct says.
    name: of the capsule.
    has_deleter: a null pointer is allowed, of what needs no deleting.
    Further keywords are members of the struct's tensor: data, device_type, device_id, ndim, code,
    bits, lanes, shape, strides (None: a null pointer) and byte_offset, by which `data` lies in
    front of the array unless it is given too.

    made and deleted count the capsules and the calls of their deleters.
    """

    destructor = _drop_capsule

    def __init__(
        self,
        array,
        *,
        versioned=False,
        version=(1, 0),
        flags=0,
        keywords=None,
        device=CPU,
        name=None,
        has_deleter=True,
        **tensor,
    ):
        self.array, self.keywords, self.device = array, keywords, device
        self.has_deleter = has_deleter
        self.layout = Versioned if versioned else Unversioned
        self.name = self.layout.name if name is None else name
        self.members = {"major": version[0], "minor": version[1], "flags": flags}
        self.tensor = self._truth(tensor.get("byte_offset", 0)) | tensor
        self.made = self.deleted = 0

    def _truth(self, byte_offset):
        a = self.array
        return {
            "data": a.ctypes.data - byte_offset,
            "device_type": self.device[0],
            "device_id": self.device[1],
            "ndim": a.ndim,
            "code": FLOAT if a.dtype.kind == "f" else BFLOAT,
            "bits": 8 * a.itemsize,
            "lanes": 1,
            "shape": a.shape,
            "strides": [stride // a.itemsize for stride in a.strides],
            "byte_offset": byte_offset,
        }

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if self.keywords is not None and not options.keys() <= set(self.keywords):
            raise TypeError(f"__dlpack__() got an unexpected keyword among {sorted(options)}")
        members = self.members if self.layout is Versioned else {}
        export = _Export(self, self.layout, self.name, members, dict(self.tensor))
        _exported[export.address] = export
        self.made += 1
        return new_capsule(export.address, self.name, ctypes.cast(self.destructor, ctypes.c_void_p))


class StandardProducer(Producer):
    """One whose library follows the array API standard, by NumPy's functions: results are NumPy's."""

    def __array_namespace__(self, api_version=None):
        return np
