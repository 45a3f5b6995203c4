"""The handlers of XLA's custom calls: their binary interface, and calls that XLA itself never makes."""

import ctypes
import pathlib
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
import rmsnorm
import xla_frame
from cases import values
from floats import F32, assert_same_bits
from rmsnorm import _core

ROOT = pathlib.Path(__file__).parents[2]
HANDLERS = _core.xla_handlers()["cpu"]
FORWARD, BACKWARD = HANDLERS["rmsnorm_forward"], HANDLERS["rmsnorm_backward"]

# Members by our names and by XLA's.
STRUCTS = {
    ("Extension", "XLA_FFI_Extension_Base"): {"struct_size": 0, "type": 0, "next": 0},
    ("Version", "XLA_FFI_Api_Version"): {"major": "major_version", "minor": "minor_version"},
    ("Metadata", "XLA_FFI_Metadata"): {"version": "api_version", "traits": 0},
    ("MetadataExtension", "XLA_FFI_Metadata_Extension"): {"base": "extension_base", "metadata": 0},
    ("Buffer", "XLA_FFI_Buffer"): {"dtype": 0, "data": 0, "rank": 0, "sizes": "dims"},
    ("Values", "XLA_FFI_Args"): {"count": "size", "types": 0, "values": "args"},
    ("Values", "XLA_FFI_Rets"): {"count": "size", "types": 0, "values": "rets"},
    ("Text", "XLA_FFI_ByteSpan"): {"data": "ptr", "size": "len"},
    ("Scalar", "XLA_FFI_Scalar"): {"dtype": 0, "value": 0},
    ("Attributes", "XLA_FFI_Attrs"): {"count": "size", "types": 0, "names": 0, "values": "attrs"},
    ("CallFrame", "XLA_FFI_CallFrame"): {
        "extensions": "extension_start",
        "api": 0,
        "context": "ctx",
        "stage": 0,
        "arguments": "args",
        "results": "rets",
        "attributes": "attrs",
    },
    ("CreateError", "XLA_FFI_Error_Create_Args"): {"message": 0, "code": "errc"},
    ("DestroyError", "XLA_FFI_Error_Destroy_Args"): {"error": 0},
    ("GetStream", "XLA_FFI_Stream_Get_Args"): {"context": "ctx", "stream": 0},
    ("AllocateDeviceMemory", "XLA_FFI_DeviceMemory_Allocate_Args"): {
        "context": "ctx",
        "size": 0,
        "alignment": 0,
        "data": 0,
    },
    ("FreeDeviceMemory", "XLA_FFI_DeviceMemory_Free_Args"): {
        "context": "ctx",
        "size": 0,
        "data": 0,
    },
    ("ScheduleTask", "XLA_FFI_ThreadPool_Schedule_Args"): {"context": "ctx", "task": 0, "data": 0},
    ("Api", "XLA_FFI_Api"): {
        "version": "api_version",
        "create_error": "XLA_FFI_Error_Create",
        "destroy_error": "XLA_FFI_Error_Destroy",
        "get_stream": "XLA_FFI_Stream_Get",
        "allocate_device_memory": "XLA_FFI_DeviceMemory_Allocate",
        "free_device_memory": "XLA_FFI_DeviceMemory_Free",
        "schedule_task": "XLA_FFI_ThreadPool_Schedule",
    },
}

VALUES = {
    "ExtensionType::metadata": "XLA_FFI_Extension_Metadata",
    "trait_command_buffer_compatible": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "ErrorCode::invalid_argument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "ErrorCode::resource_exhausted": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "ErrorCode::failed_precondition": "XLA_FFI_Error_Code_FAILED_PRECONDITION",
    "ErrorCode::internal": "XLA_FFI_Error_Code_INTERNAL",
    "DataType::boolean": "XLA_FFI_DataType_PRED",
    "DataType::i64": "XLA_FFI_DataType_S64",
    "DataType::f16": "XLA_FFI_DataType_F16",
    "DataType::f32": "XLA_FFI_DataType_F32",
    "DataType::f64": "XLA_FFI_DataType_F64",
    "DataType::bf16": "XLA_FFI_DataType_BF16",
    "ValueType::buffer": "XLA_FFI_ArgType_BUFFER",
    "AttributeType::scalar": "XLA_FFI_AttrType_SCALAR",
    "AttributeType::string": "XLA_FFI_AttrType_STRING",
    "Stage::instantiate": "XLA_FFI_ExecutionStage_INSTANTIATE",
    "Stage::prepare": "XLA_FFI_ExecutionStage_PREPARE",
    "Stage::initialize": "XLA_FFI_ExecutionStage_INITIALIZE",
    "Stage::execute": "XLA_FFI_ExecutionStage_EXECUTE",
    "major_version": "XLA_FFI_API_MAJOR",
}


def assertions():
    for (ours, theirs), members in STRUCTS.items():
        for mine, its in members.items():
            name = its or mine
            yield f"offsetof({ours}, {mine}) == offsetof({theirs}, {name})"
            yield f"sizeof({ours}::{mine}) == sizeof({theirs}::{name})"
    for ours, theirs in VALUES.items():
        yield f"static_cast<int>({ours}) == static_cast<int>({theirs})"
    # The type of the length of an argument list is that of a result list.
    yield "static_cast<int>(XLA_FFI_RetType_BUFFER) == static_cast<int>(XLA_FFI_ArgType_BUFFER)"
    yield "newest_minor_version <= XLA_FFI_API_MINOR || XLA_FFI_API_MINOR >= oldest_minor_version"


def test_layouts_are_those_of_the_installed_jaxlib(tmp_path):
    compiler = shutil.which("c++")
    header = ROOT / "python/bindings/xla_ffi.hpp"
    if compiler is None or not header.exists():
        pytest.skip("needs a C++ compiler and the source")
    lines = [f'static_assert({a}, "{a}");' for a in assertions()]
    source = tmp_path / "layouts.cpp"
    source.write_text(
        '#include "xla_ffi.hpp"\n#include "xla/ffi/api/c_api.h"\n'
        "using namespace rmsnorm::python::xla;\n" + "\n".join(lines) + "\n"
    )
    include = ["-I", str(header.parent), "-I", jax.ffi.include_dir()]
    subprocess.run([compiler, "-std=c++17", "-fsyntax-only", *include, source], check=True)
    assert len(lines) > 100


def declared_members(name):
    """Of a struct in xla_ffi.hpp, without the pointer types."""
    text = (ROOT / "python/bindings/xla_ffi.hpp").read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL).group(1)
    return re.findall(r"(\w+);|\(\*(\w+)\)\(", body)


def test_every_member_used_is_compared():
    """Members that stand for their size alone have names that nothing reads."""
    read = {"internal", "error_message", "register_handler", "register_type", "get_context",
            "set_state", "get_state", "struct_size", "extensions"}  # fmt: skip
    compared = {}
    for (ours, _), members in STRUCTS.items():
        compared.setdefault(ours, set()).update(members)
    for ours, members in compared.items():
        names = {a or b for a, b in declared_members(ours)}
        assert names - read <= members, ours


def test_versions():
    """The newest that both sides know."""
    for handler in (FORWARD, BACKWARD):
        assert xla_frame.metadata_of(handler) == (0, 1, 0)
        for theirs, common in ((1, 1), (2, 2), (3, 3), (9, 3)):
            assert xla_frame.metadata_of(handler, xla_frame.Xla(minor=theirs)) == (0, common, 0)


def sample(shape, seed=0):
    return values(np.random.default_rng(seed), shape, F32)


def test_a_call():
    x, weight = sample((3, 2, 40)), sample((1, 2, 40), 1)
    y, rstd = np.empty_like(x), np.empty((3, 2), F32)
    xla = xla_frame.Xla()
    done = xla_frame.call(
        FORWARD, xla, {"x": x, "weight": weight}, {"y": y, "rstd": rstd}, eps=1e-5
    )
    assert done and not xla.errors
    expected = rmsnorm.rms_norm(x, weight, eps=1e-5, return_rstd=True)
    assert_same_bits(y, expected[0])
    assert_same_bits(rstd, expected[1])


@pytest.mark.parametrize("has_threads", [True, False])
def test_threads_that_never_come(has_threads, thread_count):
    """Tasks that XLA starts after the call find nothing left; without threads all is done here."""
    thread_count(4)
    x = sample((1000, 1000))
    y = np.empty_like(x)
    xla = xla_frame.Xla(has_threads=has_threads)
    assert xla_frame.call(FORWARD, xla, {"x": x}, {"y": y})
    assert_same_bits(y, rmsnorm.rms_norm(x))
    assert len(xla.tasks) == (3 if has_threads else 0)
    assert xla.destroyed == (0 if has_threads else 1)
    y[:] = 7
    xla.run_tasks()
    assert (y == 7).all()


def refused(handler, arguments, results, /, **changed):
    xla = xla_frame.Xla()
    before = {name: array.copy() for name, array in results.items()}
    assert not xla_frame.call(handler, xla, arguments, results, **changed)
    for name, array in results.items():
        assert_same_bits(array, before[name])
    (error,) = xla.errors
    return error


@pytest.mark.parametrize(
    "changed, code, message",
    [
        ({"eps": -1.0}, 3, r"^rmsnorm: eps: "),
        ({"partial": 2.0}, 3, r"^rmsnorm: partial: "),
        ({"axis": -3}, 3, r"^rmsnorm: axis: "),
        ({"axis": 2}, 3, r"^rmsnorm: axis: "),
        ({"axis": 2**32 - 1}, 13, r"axis 4294967295"),
        ({"rounding": "twice"}, 13, r"rounding twice"),
        ({"eps": None}, 13, r"no attribute eps"),
        ({"eps": 1}, 13, r"attribute eps of an unexpected dtype"),
        ({"rounding": 1.0}, 13, r"no attribute rounding of the kind"),
        ({"arguments": "x"}, 13, r"argument "),
        ({"arguments": "x weight bias"}, 13, r"fewer values than names"),
        ({"arguments": "x dy"}, 13, r"argument dy"),
        ({"arguments": "x y"}, 13, r"argument y"),
        ({"arguments": "x rstd"}, 13, r"argument rstd"),
        ({"arguments": "x x"}, 13, r"argument x"),
        ({"results": "x"}, 13, r"result x"),
        ({"results": "weight"}, 13, r"result weight"),
        ({"results": "z"}, 13, r"result z"),
    ],
    ids=str,
)
def test_refused_attributes(changed, code, message):
    x, weight, y = sample((3, 40)), sample((1, 40), 1), sample((3, 40), 2)
    error = refused(FORWARD, {"x": x, "weight": weight}, {"y": y}, **changed)
    assert error[0] == code
    assert re.search(message, error[1]), error


def test_refused_arrays():
    x, y = sample((3, 40)), sample((3, 40), 1)
    assert "weight" in refused(FORWARD, {"x": x, "weight": x[:, :7].copy()}, {"y": y})[1]
    assert "dtype 4" in refused(FORWARD, {"x": x.astype(np.int32)}, {"y": y})[1]


@pytest.mark.parametrize("rank", [65, 2**32 + 2, -1, -(2**63)])
def test_ranks_that_no_view_has(rank):
    x, y = sample((3, 40)), sample((3, 40), 1)
    xla = xla_frame.Xla()
    frame, kept = xla_frame.frame_of(xla, {"x": x}, {"y": y})
    kept[2][0].rank = rank
    assert xla_frame.handler_of(FORWARD)(ctypes.byref(frame))
    assert f"{rank} dimensions" in xla.errors[0][1]


@pytest.mark.parametrize("size", [-1, -(2**63)])
def test_negative_sizes(size):
    x, y = sample((3, 40)), sample((3, 40), 1)
    xla = xla_frame.Xla()
    frame, kept = xla_frame.frame_of(xla, {"x": x}, {"y": y})
    kept[2][0].sizes[1] = size
    assert xla_frame.handler_of(FORWARD)(ctypes.byref(frame))
    assert f"size {size}" in xla.errors[0][1]


@pytest.mark.parametrize("axis", [12, 100, -13, 2**31 - 1, -(2**31)])
def test_an_axis_outside_of_many_dimensions(axis):
    x = np.ones((2,) * 11 + (40,), F32)
    error = refused(
        FORWARD, {"x": x}, {"y": np.empty_like(x), "rstd": np.empty((2,) * 11, F32)}, axis=axis
    )
    assert error[0] == 3 and "axis: " in error[1]


@pytest.mark.parametrize("which", ["frame", "api", "buffer", "arguments", "results", "attributes"])
def test_structs_that_are_too_small(which):
    x, y = sample((3, 40)), sample((3, 40), 1)
    xla = xla_frame.Xla()
    frame, kept = xla_frame.frame_of(xla, {"x": x}, {"y": y})
    structs = {"frame": frame, "api": xla.api, "buffer": kept[2][0]}
    struct = structs[which] if which in structs else getattr(frame, which)
    struct.size -= 8
    assert xla_frame.handler_of(FORWARD)(ctypes.byref(frame))
    assert "not supported" in xla.errors[0][1]
    struct.size += 64
    assert not xla_frame.handler_of(FORWARD)(ctypes.byref(frame))
    assert_same_bits(y, rmsnorm.rms_norm(x))


def test_stages_that_were_not_registered():
    x, y = sample((3, 40)), sample((3, 40), 1)
    xla = xla_frame.Xla()
    frame, _kept = xla_frame.frame_of(xla, {"x": x}, {"y": y})
    frame.stage = 0
    assert xla_frame.handler_of(FORWARD)(ctypes.byref(frame))
    assert "stage" in xla.errors[0][1]
