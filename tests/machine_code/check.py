#!/usr/bin/env python3
"""Checks the machine code of the CUDA kernels, without a GPU.

    tests/machine_code/check.py [--arch 90]... [--nvcc PATH] [--nvdisasm PATH]

Compiles src/cuda.cu for each architecture (about half a minute each, two at a time) and fails unless

- exactly the kernels are there that src/cuda.cu is meant to have;
- the packed kernels, which models use, keep everything in registers: no stack, no spills, no local
  memory, but for a few named in `tolerated`;
- they move 16 bytes with an instruction: as many global loads and stores of 128 bits as vectors are
  loaded and stored at once, and none of other widths for elements.

Prints registers, and the threads of a multiprocessor that they leave room for. nvcc and nvdisasm are
taken from PATH or from the Python packages cuda-toolkit[nvcc,...] and nvidia-cuda-nvdisasm.
"""

import argparse
import collections
import concurrent.futures
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

root = pathlib.Path(__file__).resolve().parents[2]

# Threads and blocks that a multiprocessor holds; each has 65536 registers.
multiprocessors = {
    "75": (1024, 16),
    "80": (2048, 32),
    "86": (1536, 16),
    "89": (1536, 24),
    "90": (2048, 32),
    "100": (2048, 32),
    "120": (1536, 24),
}
default_architectures = ["75", "80", "90", "100", "120"]

# What ptxas 13.0 gives up to come down to 64 registers, for another block of 512 threads: up to 24
# bytes of stack in these kernels.
tolerated_stack = 24
tolerated = {
    "100": {
        "forward_in_registers<PackedElements<double, double, true>, 2>",
        "forward_in_registers<PackedElements<float, float, false>, 4>",
        "forward_in_registers<PackedElements<rmsnorm::bfloat16, float, false>, 1>",
        "forward_in_registers<PackedElements<rmsnorm::bfloat16, rmsnorm::bfloat16, false>, 4>",
        "forward_in_registers<PackedElements<rmsnorm::float16, float, false>, 1>",
        "forward_in_registers<PackedElements<rmsnorm::float16, rmsnorm::float16, false>, 4>",
        "forward_reading_again<PackedElements<float, float, false>, 4>",
        "forward_reading_again<PackedElements<rmsnorm::bfloat16, float, false>, 4>",
        "forward_reading_again<PackedElements<rmsnorm::float16, float, false>, 4>",
    },
    "120": {
        "forward_in_registers<PackedElements<float, float, false>, 4>",
        "forward_in_registers<PackedElements<rmsnorm::bfloat16, rmsnorm::bfloat16, false>, 4>",
        "forward_in_registers<PackedElements<rmsnorm::float16, rmsnorm::float16, false>, 4>",
        "forward_reading_again<PackedElements<rmsnorm::bfloat16, rmsnorm::bfloat16, false>, 4>",
        "forward_reading_again<PackedElements<rmsnorm::float16, float, false>, 4>",
        "forward_reading_again<PackedElements<rmsnorm::float16, rmsnorm::float16, false>, 4>",
    },
}


@dataclass
class Expected:
    """What a kernel must contain."""

    packed: bool
    loads: int = 0  # of 16 bytes, at least
    stores: int = 0
    narrow_loads: int = 0  # of a number that belongs to a row, at most
    narrow_stores: int = 0


def expected_kernels() -> dict[str, Expected]:
    kernels = {f"sum_blocks<{compute}>": Expected(packed=False) for compute in ("float", "double")}
    rows = [
        ("rmsnorm::float16", "rmsnorm::float16", 1),
        ("rmsnorm::float16", "float", 2),
        ("rmsnorm::bfloat16", "rmsnorm::bfloat16", 1),
        ("rmsnorm::bfloat16", "float", 2),
        ("float", "float", 1),
        ("double", "double", 1),
    ]
    for element, weight, loads_of_weight in rows:
        for residual in (False, True):
            elements = f"PackedElements<{element}, {weight}, {str(residual).lower()}>"
            for name, vectors in [
                ("forward_in_registers", 1),
                ("forward_in_registers", 2),
                ("forward_in_registers", 4),
                ("forward_reading_again", 4),
            ]:
                kernels[f"{name}<{elements}, {vectors}>"] = Expected(
                    packed=True,
                    loads=vectors * (1 + residual + loads_of_weight),
                    stores=vectors * (1 + residual),
                    narrow_stores=1,
                )
            elements = f"PackedGradients<{element}, {weight}, {str(residual).lower()}>"
            for name, vectors in [
                (f"backward_in_registers<{elements}, 1>", 1),
                (f"backward_in_registers<{elements}, 2>", 2),
                (f"backward_reading_again<{elements}>", 1),
            ]:
                kernels[name] = Expected(
                    packed=True,
                    loads=vectors * (2 + residual + loads_of_weight),
                    stores=vectors * 2,
                    narrow_loads=2,
                )
    for elements in ("float, 4", "float, 8", "double, 2"):
        kernels[f"forward_reading_again<AnyElements<{elements}>, 1>"] = Expected(packed=False)
        kernels[f"backward_reading_again<AnyGradients<{elements}>>"] = Expected(packed=False)
    return kernels


@dataclass
class Kernel:
    registers: int = 0
    stack: int = 0
    spills: int = 0
    instructions: collections.Counter[str] = field(default_factory=collections.Counter)


def short_names(mangled: list[str]) -> dict[str, str]:
    """Demangled: the kernel and its template arguments, without the namespace of kernels."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    names = {}
    for symbol, name in zip(mangled, text.splitlines(), strict=True):
        name = name.replace("rmsnorm::cuda::detail::", "").removeprefix("void ")
        name = name.split(">(")[0] + ">" if ">(" in name else name
        names[symbol] = name.replace("> >", ">>")
    return names


def parse_ptxas(output: str, kernels: dict[str, Kernel]) -> None:
    entry = None
    # A kernel's own properties follow its name; those of functions that it calls come after.
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = kernels.setdefault(match[1], Kernel())
        elif match := re.search(r"Function properties for (\w+)", line):
            entry = kernels.get(match[1])
        elif entry is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            entry.stack = int(match[1])
            entry.spills = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            entry.registers = int(match[1])


def parse_disassembly(output: str, kernels: dict[str, Kernel]) -> None:
    instructions = None
    for line in output.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            # A function that is no kernel is called by some; those may do as they like.
            instructions = kernels[match[1]].instructions if match[1] in kernels else None
        elif instructions is not None:
            match = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)
            if match:
                instructions[match[1]] += 1


def compile_kernels(architecture: str, nvcc: str, nvdisasm: str) -> dict[str, Kernel]:
    def output_of(*command: str) -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    symbols: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cubin = f"{scratch}/{architecture}.cubin"
        log = output_of(
            *(nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-I", str(root / "include"), "-cubin"),
            *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"),
            *("-o", cubin, str(root / "src" / "cuda.cu")),
        )
        parse_ptxas(log, symbols)
        parse_disassembly(output_of(nvdisasm, "--print-code", cubin), symbols)
    names = short_names(list(symbols))
    return {names[symbol]: kernel for symbol, kernel in symbols.items()}


def count(kernel: Kernel, pattern: str) -> int:
    return sum(n for name, n in kernel.instructions.items() if re.fullmatch(pattern, name))


def loads_and_stores(kernel: Kernel) -> tuple[int, int]:
    return count(kernel, r"LDG\..*\b128\b.*"), count(kernel, r"STG\..*\b128\b.*")


def check(architecture: str, name: str, kernel: Kernel, expected: Expected) -> list[str]:
    errors = []
    if kernel.registers == 0 or not kernel.instructions:
        errors.append("registers or machine code not found: has an output format changed?")
    if not expected.packed:
        return errors
    local = count(kernel, r"(LDL|STL)\b.*")
    if name in tolerated.get(architecture, set()) and kernel.stack <= tolerated_stack:
        local = 0
    elif kernel.stack or kernel.spills:
        errors.append(f"{kernel.stack} bytes of stack, {kernel.spills} spilled")
    if local:
        errors.append(f"{local} accesses to local memory")
    loads, stores = loads_and_stores(kernel)
    if loads < expected.loads or stores < expected.stores:
        errors.append(
            f"{loads} loads and {stores} stores of 16 bytes,"
            f" fewer than {expected.loads} and {expected.stores}"
        )
    # Of rstd, stored or read for the first row and for the next; the rest moves in whole vectors.
    narrow_loads = count(kernel, r"LDG\b.*") - loads
    narrow_stores = count(kernel, r"STG\b.*") - stores
    if narrow_loads > expected.narrow_loads or narrow_stores > expected.narrow_stores:
        errors.append(f"{narrow_loads} loads and {narrow_stores} stores of fewer bytes")
    return errors


def resident_threads(architecture: str, registers: int, block: int) -> int:
    """Registers are given to warps in units of 8 a thread."""
    threads, blocks = multiprocessors[architecture]
    by_registers = 65536 // (-(-registers // 8) * 8 * block)
    return min(threads // block, blocks, by_registers) * block


def find(tool: str, package: str) -> str:
    if path := shutil.which(tool):
        return path
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := pathlib.Path(location, "cu13", "bin", tool)).exists():
            return str(path)
    sys.exit(f"no {tool}: pip install '{package}', or put it into PATH")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=list(multiprocessors))
    parser.add_argument("--nvcc")
    parser.add_argument("--nvdisasm")
    arguments = parser.parse_args()
    nvcc = arguments.nvcc or find("nvcc", "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2")
    nvdisasm = arguments.nvdisasm or find("nvdisasm", "nvidia-cuda-nvdisasm")
    architectures = arguments.arch or default_architectures

    expected = expected_kernels()
    failures = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        results = pool.map(lambda a: compile_kernels(a, nvcc, nvdisasm), architectures)
        for architecture, kernels in zip(architectures, results, strict=True):
            print(f"\nsm_{architecture}: registers, threads resident in blocks of 128 and of 512,")
            print("  16-byte loads and stores")
            for name in sorted(expected.keys() | kernels.keys()):
                if name not in kernels or name not in expected:
                    wrong = ["missing" if name in expected else "not expected"]
                else:
                    kernel = kernels[name]
                    wrong = check(architecture, name, kernel, expected[name])
                    threads = [
                        resident_threads(architecture, kernel.registers, b) for b in (128, 512)
                    ]
                    loads, stores = loads_and_stores(kernel)
                    print(
                        f"  {name:91} {kernel.registers:4} {threads[0]:5} {threads[1]:5}"
                        f" {loads:3} {stores:3}"
                    )
                failures += [f"sm_{architecture} {name}: {w}" for w in wrong]
    print(*["", *failures], sep="\n")
    print(f"{len(failures)} failures in {len(expected)} kernels for {', '.join(architectures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
