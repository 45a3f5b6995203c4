"""Builds the CPU part of ggml, a peer of run.py, for the machine that it runs on.

    python benchmarks/build_ggml.py

ggml is in no package by itself: its sources are taken from the source distribution of llama-cpp-python,
which pip downloads (some 75 MB). CMake and a compiler are needed, and a minute. The library is written
to build/ggml, where run.py finds it, and its path is printed; it finds another by GGML_LIBRARY.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from suite.contenders.by_ggml import FOLDER, LIBRARY

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
# Of the distribution: ggml, and a list of compiler flags that its CMake files include from outside.
PARTS = ("vendor/llama.cpp/ggml/", "vendor/llama.cpp/cmake/")


def download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={version}"], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def extract(archive: Path, folder: Path) -> Path:
    """The folder of ggml's CMakeLists.txt."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.partition("/")[2].startswith(PARTS)]
        tar.extractall(folder, members, filter="data")
    (lists,) = folder.glob(f"*/{PARTS[0]}CMakeLists.txt")
    return lists.parent


def build(source: Path, work: Path, output: Path) -> None:
    # The distribution lacks this template, of a file for pkg-config that nobody here reads.
    (source / "ggml.pc.in").touch()
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
        # The two libraries find each other wherever they lie.
        "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
        "BUILD_SHARED_LIBS": "ON",
        "GGML_NATIVE": "ON",
        "GGML_OPENMP": "ON",
        "GGML_CCACHE": "OFF",
        "GGML_BUILD_TESTS": "OFF",
        "GGML_BUILD_EXAMPLES": "OFF",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", str(source), "-B", str(work), *definitions], check=True)
    command = ["cmake", "--build", str(work), "--config", "Release", "--target", "ggml-cpu"]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), **os.environ}
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", default=VERSION, help=f"of {PACKAGE}; default: {VERSION}")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    options = parser.parse_args()
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = extract(download(options.version, folder), folder)
        build(source, folder / "build", output)
    print(output / LIBRARY)


if __name__ == "__main__":
    main()
