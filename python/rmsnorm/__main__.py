"""python -m rmsnorm: what is installed, and whether it computes right on this machine."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import rmsnorm
from rmsnorm import _core


def package_directory() -> Path:
    """Where headers and CMake package lie.

    That is beside the extension module: in an editable installation the Python files are elsewhere.
    """
    return Path(_core.__file__).resolve().parent


def cuda_summary(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return "not in this build"
    built = f"{cuda['toolkit']} for {', '.join(cuda['architectures'])}"
    if cuda["driver"] is None:
        return f"{built}; no driver here"
    return f"{built}; driver for {cuda['driver']}, {len(cuda['devices'])} devices"


def print_versions() -> None:
    info = rmsnorm.info()
    print(f"rmsnorm {info['version']}")
    print(f"  Python        {platform.python_version()} ({platform.python_implementation()})")
    print(f"  machine       {platform.system()} {platform.machine()}")
    isa = info["cpu_isa"]
    if isa is None:
        isa = f"none: RMSNORM_ISA={info['environment']['RMSNORM_ISA']!a} cannot run here"
    print(f"  ISA in use    {isa}")
    print(f"  ISAs here     {', '.join(info['cpu_isas'])}")
    openmp = "" if info["openmp"] else " (built without OpenMP)"
    print(f"  threads       {info['num_threads']}{openmp}")
    print(f"  CUDA          {cuda_summary(info['cuda'])}")
    for number, device in enumerate(info["cuda"]["devices"]):
        major, minor = device["compute_capability"]
        print(f"  cuda:{number}        {device['name']}, compute capability {major}.{minor}")
    print(f"  headers       {package_directory() / 'include'}")


def self_check() -> bool:
    """Prints one line for each dtype; true if all are within their budgets."""
    try:
        from rmsnorm import self_check as checks
    except ImportError as error:
        print(f"self-check: not run, it needs NumPy ({error})", file=sys.stderr)
        return False
    if rmsnorm.info()["cpu_isa"] is None:
        print("self-check: not run, no ISA is in use", file=sys.stderr)
        return False
    print("self-check against exact arithmetic, errors in units in the last place")
    passed = True
    for result in checks.run():
        passed = passed and result.passed
        print(f"  {result}")
    print("passed" if passed else "FAILED")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rmsnorm", description=__doc__)
    paths = parser.add_mutually_exclusive_group()
    paths.add_argument(
        "--include-dir", action="store_true", help="print the directory of the C++ headers only"
    )
    paths.add_argument(
        "--cmake-dir", action="store_true", help="print the directory for -Drmsnorm_DIR only"
    )
    parser.add_argument("--version", action="version", version=rmsnorm.__version__)
    arguments = parser.parse_args()
    if arguments.include_dir:
        print(package_directory() / "include")
        return 0
    if arguments.cmake_dir:
        print(package_directory() / "lib" / "cmake" / "rmsnorm")
        return 0
    print_versions()
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main())
