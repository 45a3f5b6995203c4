"""Objects that are no arrays, or other arrays than they say: proxies, and DLPack by ctypes."""

import ctypes as c
import weakref
from unittest import mock

import numpy as np
from dlpack_producer import (
    BFLOAT,
    FLOAT,
    INT64_POINTER,
    Deleter,
    Tensor,
    Unversioned,
    Versioned,
    new_capsule,
)

CPU, CUDA = 1, 2


def pointer_to(values):
    """An array of int64 for a struct; None stays a null pointer."""
    if values is None:
        return None
    return c.cast((c.c_int64 * max(len(values), 1))(*values), INT64_POINTER)


class Producer:
    """A DLPack producer that says of an array's memory what it is told to.

    `said` replaces members of the tensor, "shape" and "strides" by lists or None. The capsule has
    no destructor: only a consumer calls the deleter, and `deleted` counts how often.
    """

    def __init__(self, array, *, versioned=True, device=(CPU, 0), name=None, has_deleter=True,
                 head=(), **said):  # fmt: skip
        self.array, self.device = array, device
        self.layout = Versioned if versioned else Unversioned
        self.name = name or self.layout.name
        self.has_deleter, self.head, self.said = has_deleter, dict(head), said
        self.made = self.deleted = 0
        self._alive = []

    def __array_namespace__(self, api_version=None):
        return np

    def __dlpack_device__(self):
        return self.device

    def _tensor(self):
        array = self.array
        facts = {
            "data": array.ctypes.data,
            "device_type": CPU,
            "ndim": array.ndim,
            "code": FLOAT if array.dtype.kind == "f" else BFLOAT,
            "bits": 8 * array.itemsize,
            "lanes": 1,
            "shape": array.shape,
            "strides": [s // array.itemsize for s in array.strides],
            **self.said,
        }
        facts["shape"], facts["strides"] = map(pointer_to, (facts["shape"], facts["strides"]))
        return Tensor(**facts)

    def __dlpack__(self, **options):
        def delete(_):
            self.deleted += 1

        managed = self.layout(tensor=self._tensor())
        if self.layout is Versioned:
            managed.major, managed.minor = 1, 1
        if self.has_deleter:
            managed.deleter = Deleter(delete)
        for member, value in self.head.items():
            setattr(managed, member, value)
        self._alive.append(managed)
        self.made += 1
        return new_capsule(c.addressof(managed), self.name, None)


class Proxy:
    """Says that it is of its target's type, and has every attribute of it."""

    def __init__(self, target):
        object.__setattr__(self, "_target", target)

    __class__ = property(lambda self: type(object.__getattribute__(self, "_target")))

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_target"), name)


class Lying(type):
    """A class of which its metaclass says that every object is an instance."""

    def __instancecheck__(cls, instance):
        return True


class Empty:
    """Says that it is an array, and has nothing of one."""

    __class__ = np.ndarray


# Those that stand for an array: the way of the protocol leads through them to its memory.
FORWARDING = {"proxy": Proxy, "proxy of a proxy": lambda a: Proxy(Proxy(a)), "weak": weakref.proxy}

# Those that have no memory to be found. Each is called with an array.
HOLLOW = {
    "mock": lambda a: mock.Mock(spec=type(a)),
    "magic mock": lambda a: mock.MagicMock(spec=type(a)),
    "mock without a spec": lambda a: mock.MagicMock(),
    "class says array": lambda a: Empty(),
    "proxy of a list": lambda a: Proxy(a.tolist()),
    "proxy of a type": lambda a: Proxy(type(a)),
    "type": type,
}
