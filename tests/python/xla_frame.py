"""Calls of the handlers in rmsnorm._core as XLA makes them, with an API of our own behind them.

The structs are declared from XLA's description of its interface and not from the bindings'.
"""

import ctypes

import numpy as np

POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t
DTYPES = {"float16": 10, "bfloat16": 16, "float32": 11, "float64": 12, "int32": 4}


class _Struct(ctypes.Structure):
    """A struct that starts with its size and a list of extensions."""

    def __init__(self, **members):
        super().__init__(size=ctypes.sizeof(self), **members)


def struct(name, *members):
    head = [("size", SIZE), ("extensions", POINTER)]
    return type(name, (_Struct,), {"_fields_": [*head, *members]})


Buffer = struct("Buffer", ("dtype", ctypes.c_int), ("data", POINTER), ("rank", ctypes.c_int64),
                ("sizes", ctypes.POINTER(ctypes.c_int64)))  # fmt: skip
Values = struct("Values", ("count", ctypes.c_int64), ("types", ctypes.POINTER(ctypes.c_int)),
                ("values", ctypes.POINTER(POINTER)))  # fmt: skip
Attributes = struct("Attributes", ("count", ctypes.c_int64), ("types", ctypes.POINTER(ctypes.c_int)),
                    ("names", ctypes.POINTER(POINTER)), ("values", ctypes.POINTER(POINTER)))  # fmt: skip
CreateError = struct("CreateError", ("message", ctypes.c_char_p), ("code", ctypes.c_int))
DestroyError = struct("DestroyError", ("error", POINTER))
GetStream = struct("GetStream", ("context", POINTER), ("stream", POINTER))
Allocate = struct("Allocate", ("context", POINTER), ("bytes", SIZE), ("alignment", SIZE),
                  ("data", POINTER))  # fmt: skip
Free = struct("Free", ("context", POINTER), ("bytes", SIZE), ("data", POINTER))
Task = ctypes.CFUNCTYPE(None, POINTER)
Schedule = struct("Schedule", ("context", POINTER), ("task", Task), ("data", POINTER))
Version = struct("Version", ("major", ctypes.c_int), ("minor", ctypes.c_int))


class Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", SIZE)]


class Scalar(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("value", POINTER)]


def function(argument, result=POINTER):
    return ctypes.CFUNCTYPE(result, ctypes.POINTER(argument))


Api = struct(
    "Api",
    ("version", Version),
    ("internal", POINTER),
    ("create_error", function(CreateError)),
    ("error_message", POINTER),
    ("destroy_error", function(DestroyError, None)),
    ("register_handler", POINTER),
    ("get_stream", function(GetStream)),
    ("register_type", POINTER),
    ("get_context", POINTER),
    ("set_state", POINTER),
    ("get_state", POINTER),
    ("allocate", function(Allocate)),
    ("free", function(Free)),
    ("schedule", function(Schedule)),
)
CallFrame = struct("CallFrame", ("api", ctypes.POINTER(Api)), ("context", POINTER),
                   ("stage", ctypes.c_int), ("arguments", Values), ("results", Values),
                   ("attributes", Attributes))  # fmt: skip


class Extension(ctypes.Structure):
    _fields_ = [("size", SIZE), ("type", ctypes.c_int), ("next", POINTER)]


class Metadata(ctypes.Structure):
    _fields_ = [("size", SIZE), ("version", Version), ("traits", ctypes.c_uint32)]


class MetadataExtension(ctypes.Structure):
    _fields_ = [("base", Extension), ("metadata", ctypes.POINTER(Metadata))]


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = POINTER
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Xla:
    """An API that keeps what it is asked: errors, scheduled tasks, device memory and streams."""

    def __init__(self, *, has_threads=True, stream=0, minor=3):
        self.has_threads = has_threads
        self.stream = stream
        self.errors = []  # (code, message)
        self.destroyed = 0
        self.tasks = []  # kept and run by run_tasks, after the call
        self.memory = {}
        self.api = Api(
            version=Version(major=0, minor=minor),
            create_error=function(CreateError)(self._create_error),
            destroy_error=function(DestroyError, None)(self._destroy_error),
            get_stream=function(GetStream)(self._get_stream),
            allocate=function(Allocate)(self._allocate),
            free=function(Free)(self._free),
            schedule=function(Schedule)(self._schedule),
        )

    def _create_error(self, request):
        self.errors.append((request.contents.code, request.contents.message.decode()))
        return len(self.errors)

    def _destroy_error(self, request):
        assert request.contents.error
        self.destroyed += 1

    def _get_stream(self, request):
        request.contents.stream = self.stream
        return 0

    def _allocate(self, request):
        memory = np.empty(request.contents.bytes + 64, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % 64
        assert request.contents.alignment == 64
        self.memory[address] = memory
        request.contents.data = address
        return 0

    def _free(self, request):
        self.memory.pop(request.contents.data)
        return 0

    def _schedule(self, request):
        if not self.has_threads:
            self.errors.append((12, "no threads"))
            return len(self.errors)
        self.tasks.append((request.contents.task, request.contents.data))
        return 0

    def run_tasks(self):
        for task, data in self.tasks:
            task(data)
        self.tasks.clear()


def _array(kind, values):
    return (kind * len(values))(*values)


def _values(arrays):
    buffers = [
        Buffer(
            dtype=DTYPES[a.dtype.name],
            data=a.ctypes.data,
            rank=a.ndim,
            sizes=_array(ctypes.c_int64, a.shape),
        )
        for a in arrays
    ]
    pointers = _array(POINTER, [ctypes.addressof(b) for b in buffers])
    values = Values(
        count=len(arrays), types=_array(ctypes.c_int, [1] * len(arrays)), values=pointers
    )
    return values, buffers


def _attribute(value):
    """Kind and struct, and what must be kept beside it."""
    if isinstance(value, str):
        return 4, Text(value.encode(), len(value)), None
    dtype, kind = {
        bool: (1, ctypes.c_bool),
        int: (5, ctypes.c_int64),
        float: (12, ctypes.c_double),
    }[type(value)]
    held = kind(value)
    return 3, Scalar(dtype, ctypes.addressof(held)), held


DEFAULTS = {
    "axis": -1,
    "eps": 1e-6,
    "partial": 1.0,
    "round_residual": True,
    "rounding": "once",
    "weight_offset": 0.0,
}


def frame_of(xla, arguments, results, /, **changed):
    """A call frame and what must outlive it. A changed attribute of None is left out."""
    names = {"arguments": " ".join(arguments), "results": " ".join(results)}
    attributes = {**DEFAULTS, **names, **changed}
    attributes = {k: v for k, v in sorted(attributes.items()) if v is not None}
    decoded = [_attribute(value) for value in attributes.values()]
    texts = [Text(name.encode(), len(name)) for name in attributes]
    given, given_buffers = _values(list(arguments.values()))
    made, made_buffers = _values(list(results.values()))
    frame = CallFrame(
        api=ctypes.pointer(xla.api),
        stage=3,
        arguments=given,
        results=made,
        attributes=Attributes(
            count=len(decoded),
            types=_array(ctypes.c_int, [kind for kind, _, _ in decoded]),
            names=_array(POINTER, [ctypes.addressof(t) for t in texts]),
            values=_array(POINTER, [ctypes.addressof(v) for _, v, _ in decoded]),
        ),
    )
    return frame, (decoded, texts, given_buffers, made_buffers)


def handler_of(capsule):
    return function(CallFrame)(_pointer_of(capsule, b"xla._CUSTOM_CALL_TARGET"))


def call(capsule, xla, arguments, results, /, **changed):
    """Calls a handler; true where it succeeded."""
    frame, _kept = frame_of(xla, arguments, results, **changed)
    return not handler_of(capsule)(ctypes.byref(frame))


def metadata_of(capsule, xla=None):
    """(major, minor, traits), as XLA asks for them when a handler is registered."""
    metadata = Metadata(size=ctypes.sizeof(Metadata))
    extension = MetadataExtension(
        Extension(ctypes.sizeof(Extension), 1, None), ctypes.pointer(metadata)
    )
    frame = CallFrame(extensions=ctypes.addressof(extension))
    if xla is not None:
        frame.api = ctypes.pointer(xla.api)
    assert not handler_of(capsule)(ctypes.byref(frame))
    return metadata.version.major, metadata.version.minor, metadata.traits
