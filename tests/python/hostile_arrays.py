"""Objects that are no arrays, or other arrays than they say: proxies, and DLPack by ctypes."""

import weakref
from unittest import mock

import numpy as np
from dlpack_producer import StandardProducer

CPU, CUDA = 1, 2


class Producer(StandardProducer):
    """A DLPack producer that says of an array's memory what it is told to.

    `device` is what __dlpack_device__ alone answers, and may be anything; the struct says CPU. The
    capsule has no destructor: only a consumer calls the deleter.
    """

    destructor = None

    def __init__(self, array, *, versioned=True, version=(1, 1), device=(CPU, 0), **told):
        super().__init__(array, versioned=versioned, version=version, **told)
        self.device = device


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
