"""Machines without a driver or a device, and memory that outlives the call that made it.

Every case is a process of its own: the emulation aborts where memory is freed too early, and its
devices are chosen when a process starts.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent

PROLOGUE = """
import sys
import numpy as np
import rmsnorm
from emulated_array import CUDA, CUDA_MANAGED, EmulatedArray, EmulatedNamespace

def sample(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

def array(*shape, device=0):
    return EmulatedArray(sample(*shape), (CUDA, device))

x, weight, out = array(3, 64), array(64), array(3, 64)
"""


def run(code: str, devices: str = "1") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + code],
        check=False,
        cwd=HERE,
        env={**os.environ, "CUDA_EMULATION_DEVICES": devices},
        capture_output=True,
        text=True,
    )


def assert_runs(code: str, devices: str = "1") -> None:
    done = run(code, devices)
    assert done.returncode == 0, done.stderr


CALLS = {
    "rms_norm": "rmsnorm.rms_norm(x, weight)",
    "out": "rmsnorm.rms_norm(x, weight, out=out)",
    "rstd": "rmsnorm.rms_norm(x, weight, out=out, return_rstd=True)",
    "stream": "rmsnorm.rms_norm(x, weight, stream=0x55)",
    "no_rows": "rmsnorm.rms_norm(array(0, 64))",
    "managed": "rmsnorm.rms_norm(EmulatedArray(sample(3, 64), (CUDA_MANAGED, 0)))",
    "add": "rmsnorm.add_rms_norm(x, out, weight)",
    "mean_square": "rmsnorm.mean_square(x)",
    "apply": "rmsnorm.rms_norm_apply(x, array(3), weight)",
    "backward": "rmsnorm.rms_norm_backward(x, x, weight)",
    "workspace": """rmsnorm.rms_norm_backward(
        x, array(3, 64), weight, dx_out=out, dweight_out=array(64))""",
}
MACHINES = {
    "no driver": "and there is no NVIDIA driver here (error 35); install one for CUDA 12.8, or pass"
    " CPU arrays",
    "0": "and CUDA finds no device here (error 100); make one visible (CUDA_VISIBLE_DEVICES), or"
    " pass CPU arrays",
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("call", CALLS)
def test_machine_without_cuda(call, machine):
    expected = f"x: is on cuda:0, {MACHINES[machine]}"
    assert_runs(
        f"""
before = out.host.copy()
try:
    {CALLS[call]}
except RuntimeError as error:
    assert str(error) == {expected!r}, error
else:
    raise AssertionError("no error")
assert (out.host == before).all()
info = rmsnorm.info()["cuda"]
assert info["built"] and not info["devices"], info
rmsnorm.rms_norm(sample(3, 64))
""",
        machine,
    )


def test_device_numbers_that_are_none():
    assert_runs(
        """
for number in (-1, -2, 4, 1 << 30):
    for given in ({}, {"out": array(3, 64, device=number)}):
        try:
            rmsnorm.rms_norm(array(3, 64, device=number), **given)
        except RuntimeError as error:
            assert str(error).startswith(f"x: is on cuda:{number}, where CUDA failed: "), error
            assert str(error).endswith("(error 101)"), error
        else:
            raise AssertionError(number)
""",
        "4",
    )


def test_no_memory_left():
    assert_runs(
        """
x = EmulatedArray(np.broadcast_to(np.float64(1), (2, 1 << 46)))
try:
    rmsnorm.rms_norm(x)
except MemoryError as error:
    assert str(error) == (
        f"result: allocating {1 << 50} bytes on cuda:0 failed: out of memory"), error
else:
    raise AssertionError("no error")
"""
    )


def test_results_on_another_device():
    assert_runs(
        """
x, dy = array(3, 64, device=3), array(3, 64, device=3)
y = rmsnorm.rms_norm(x)
gradients = rmsnorm.rms_norm_backward(dy, x, array(64, device=3), has_bias=True)
assert all(a.device == (CUDA, 3) for a in (y, *gradients))
np.testing.assert_array_equal(y.host, rmsnorm.rms_norm(array(3, 64)).host)
""",
        "4",
    )


@pytest.mark.parametrize("consumer", [-1, 1, 2, 0x55, 0x77, None])
def test_results_are_freed_behind_the_kernel(consumer):
    """Whichever stream it is on, and whichever the consumer's is."""
    assert_runs(
        f"""
EmulatedNamespace.consumer_stream = {consumer}
for stream in (None, 0, 1, 2, 0x55, 0x77):
    print("stream", stream, file=sys.stderr)
    results = [rmsnorm.rms_norm(x, weight, stream=stream, return_rstd=True) for _ in range(3)]
    del results
    results = rmsnorm.rms_norm_backward(x, x, weight, has_bias=True, stream=stream)
    del results
"""
    )


def test_results_that_nobody_takes_are_freed_behind_the_kernel():
    """The consumer fails at the first one, and the second one is never handed over."""
    assert_runs(
        """
def fail(source):
    raise ZeroDivisionError
EmulatedNamespace.from_dlpack = fail
for stream in (None, 0x55):
    try:
        rmsnorm.add_rms_norm(x, out, weight, stream=stream)
    except RuntimeError as error:
        assert type(error.__cause__) is ZeroDivisionError, error
        continue
    raise AssertionError(stream)
"""
    )


def test_results_of_a_refused_call_are_freed():
    assert_runs(
        """
for _ in range(2):
    try:
        rmsnorm.rms_norm(x, weight, eps=-1.0, stream=0x55)
    except ValueError as error:
        assert str(error).startswith("eps: "), error
"""
    )


def test_an_export_that_is_asked_for_late():
    """The stream of the call may be gone by then."""
    assert_runs(
        """
kept = []
take = EmulatedNamespace.from_dlpack
EmulatedNamespace.from_dlpack = kept.append
assert rmsnorm.rms_norm(x, weight, stream=0x55) is None
EmulatedNamespace.from_dlpack = take
y = EmulatedNamespace.from_dlpack(kept[0])
del kept[:]
np.testing.assert_array_equal(y.host, rmsnorm.rms_norm(x, weight).host)
"""
    )


def test_consumer_with_no_stream_of_that_number():
    assert_runs(
        """
EmulatedNamespace.consumer_stream = -2
try:
    rmsnorm.rms_norm(x)
except RuntimeError as error:
    cause = str(error.__cause__)
    assert cause == "stream: expected the number of a CUDA stream, None or -1, got -2", cause
else:
    raise AssertionError("no error")
"""
    )
