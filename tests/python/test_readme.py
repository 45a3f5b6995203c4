"""The programs of the README and of pages in docs/, and the consumer project built from the wheel."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def blocks(language, page="README.md"):
    text = (ROOT / page).read_text()
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"{page} has no {language}"
    return found


def path_from_package(option):
    command = [sys.executable, "-m", "rmsnorm", option]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


PAGES = ["README.md", "docs/torch.md", "docs/jax.md", "docs/transformers.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python(page):
    for code in blocks("python", page):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_cpp(tmp_path):
    function, _ = blocks("cpp")
    program = f"""{function}
int main() {{
  const float x[6] = {{1, 2, 3, -1, -2, -3}}, weight[3] = {{1, 2, 3}};
  float y[6];
  if (!normalise(x, weight, y, 2, 3)) return 1;
  const double expected = 9 / __builtin_sqrt(14.0 / 3 + 1e-5);
  return __builtin_fabs(y[2] - expected) < 1e-5 && y[5] == -y[2] ? 0 : 2;
}}
"""
    source = tmp_path / "readme.cpp"
    source.write_text(program)
    include = path_from_package("--include-dir")
    target = tmp_path / "readme"
    subprocess.run(["g++", "-std=c++17", "-I", include, source, "-o", target], check=True)
    subprocess.run([target], check=True)


def test_cuda(tmp_path):
    """The statement compiles, against the headers of the tests' emulation of the CUDA runtime."""
    _, code = blocks("cpp")
    include, call = code.split("\n", 1)
    program = f"{include}\nvoid call(rmsnorm::ForwardParams p, cudaStream_t stream) {{{call}}}\n"
    source = tmp_path / "readme.cpp"
    source.write_text(program)
    include_dirs = ["-I", path_from_package("--include-dir"), "-I", ROOT / "tests/cuda/emulation"]
    emulated = ["-DRMSNORM_CUDA_EMULATED=1", "-D__CUDA_ARCH__=900", "-DRMSNORM_COMPILED"]
    subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", *emulated, *include_dirs, source], check=True
    )


def test_consumer_built_from_the_wheel(tmp_path):
    package = path_from_package("--cmake-dir")
    subprocess.run(
        ["cmake", "-S", ROOT / "tests/consumer", "-B", tmp_path, f"-Drmsnorm_DIR={package}"],
        check=True,
    )
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    for program in ("with_headers", "with_library", "from_c"):
        subprocess.run([tmp_path / program], check=True)
