"""The machine and the software that a result is from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import rmsnorm

from .contenders import by_ggml

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
PACKAGES = ["numpy", "torch", "onnxruntime", "openvino", "jax", "onednn", "liger-kernel"]
PACKAGES += ["quack-kernels", "flashinfer-python", "zentorch"]
# What changes the speed of this library or of a peer.
SETTINGS = re.compile(
    r"RMSNORM_ISA|ATEN_CPU_CAPABILITY|ONEDNN_MAX_CPU_ISA|XLA_FLAGS"
    r"|OMP_\w+|GOMP_\w+|MALLOC_\w+|GLIBC_TUNABLES|GGML_CPU_DISABLE_FUSION|ZENDNNL?_\w+"
)
# Where nothing tells: more than most have.
ASSUMED_CACHE_BYTES = 64 << 20


# What servers are told by, since virtual machines name no more than "AMD EPYC": for each vendor and
# family the models from the first to the second, in hexadecimal as the vendors have them.
MICROARCHITECTURES: dict[tuple[str, int], tuple[tuple[int, int, str], ...]] = {
    ("AuthenticAMD", 0x17): ((0x00, 0x2F, "Zen"), (0x30, 0x3F, "Zen 2"), (0x60, 0x7F, "Zen 2")),
    ("AuthenticAMD", 0x19): (
        *((0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3")),
        *((0x60, 0x7F, "Zen 4"), (0xA0, 0xAF, "Zen 4")),
    ),
    ("AuthenticAMD", 0x1A): ((0x00, 0x2F, "Zen 5"), (0x40, 0x4F, "Zen 5"), (0x60, 0x7F, "Zen 5")),
    ("GenuineIntel", 6): (
        *((0x3F, 0x3F, "Haswell"), (0x4F, 0x4F, "Broadwell"), (0x55, 0x55, "Skylake")),
        *((0x6A, 0x6A, "Ice Lake"), (0x6C, 0x6C, "Ice Lake"), (0x8F, 0x8F, "Sapphire Rapids")),
        *((0xAD, 0xAE, "Granite Rapids"), (0xAF, 0xAF, "Sierra Forest")),
        (0xCF, 0xCF, "Emerald Rapids"),
    ),
}
# Of Skylake's model later steppings are these.
SKYLAKE_STEPPINGS = ((5, 7, "Cascade Lake"), (10, 11, "Cooper Lake"))


def first_processor() -> dict[str, str]:
    """What /proc/cpuinfo says of it, where there is one."""
    try:
        block, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_name() -> str:
    return first_processor().get("model name", platform.processor())


def cpu_id() -> dict[str, str | int]:
    """Vendor, family, model and stepping, of x86."""
    said = first_processor()
    numbers = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    found: dict[str, str | int] = {
        name: int(said[key]) for name, key in numbers.items() if said.get(key, "").isdigit()
    }
    return {"vendor": said["vendor_id"], **found} if "vendor_id" in said else found


def microarchitecture(identity: dict[str, str | int]) -> str:
    """Its name, or "" if the tables above have none."""
    vendor, family, model, stepping = (
        identity.get(key) for key in ("vendor", "family", "model", "stepping")
    )
    if not (isinstance(vendor, str) and isinstance(family, int) and isinstance(model, int)):
        return ""
    models = MICROARCHITECTURES.get((vendor, family), ())
    name = next((name for first, last, name in models if first <= model <= last), "")
    if name == "Skylake" and isinstance(stepping, int):
        later = (each for first, last, each in SKYLAKE_STEPPINGS if first <= stepping <= last)
        return next(later, name)
    return name


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
    # The library's full name ends with its version.
    _, _, ggml = by_ggml.library_path().resolve().name.partition(".so.")
    return {**found, "ggml": ggml} if ggml else found


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


def describe() -> dict[str, object]:
    return {
        "cpu": cpu_name(),
        "cpu_id": cpu_id(),
        "microarchitecture": microarchitecture(cpu_id()),
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
