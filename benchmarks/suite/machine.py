"""The machine and the software that a result is from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import rmsnorm

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
PACKAGES = ["numpy", "torch", "onnxruntime", "openvino", "jax", "onednn", "liger-kernel"]
PACKAGES += ["quack-kernels", "flashinfer-python"]
# What changes the speed of this library or of a peer.
SETTINGS = re.compile(
    r"RMSNORM_ISA|ATEN_CPU_CAPABILITY|ONEDNN_MAX_CPU_ISA|XLA_FLAGS"
    r"|OMP_\w+|GOMP_\w+|MALLOC_\w+|GLIBC_TUNABLES"
)
# Where nothing tells: more than most have.
ASSUMED_CACHE_BYTES = 64 << 20


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def caches() -> dict[str, int]:
    """Bytes by name, such as L1d, of one core's caches."""
    found = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for index in sorted(CACHES.glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{letter}"] = int(size[:-1]) * units[size[-1]]
    return found


def last_level_cache_bytes() -> int:
    return max(caches().values(), default=ASSUMED_CACHE_BYTES)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpus() -> list[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "rmsnorm": rmsnorm.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


def describe() -> dict[str, object]:
    return {
        "cpu": cpu_name(),
        "cpus": len(cpus()),
        "caches": caches(),
        "memory_bytes": memory_bytes(),
        "isa": rmsnorm.info()["cpu_isa"],
        "isas": rmsnorm.info()["cpu_isas"],
        # Of the last minute, before the run and after it.
        "load_average": [load_average()],
        "system": platform.platform(),
        "versions": versions(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if SETTINGS.fullmatch(k)},
    }
