"""The installed package: its command line, files for builds, typing, and the choice of ISA."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
import rmsnorm

ISAS = ["scalar", "neon", "avx2", "avx512", "avx512_bf16"]  # from the narrowest to the widest


def python(*arguments, timeout=120, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RMSNORM_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def test_info():
    info = rmsnorm.info()
    assert {"version", "cpu_isa", "cpu_isas", "num_threads"} <= set(info)
    assert info["version"] == rmsnorm.__version__ == importlib.metadata.version("rmsnorm")
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
    assert set(info["cpu_isas"]) <= set(ISAS) and "scalar" in info["cpu_isas"]
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["num_threads"] == rmsnorm.get_num_threads()


def test_the_list_of_isas_is_what_the_cpu_has():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "flags" not in cpuinfo.read_text():
        pytest.skip("no CPU flags to read here")
    flags = set(re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE).group(1).split())
    isas = set(rmsnorm.info()["cpu_isas"])
    assert ("avx2" in isas) == ({"avx2", "fma", "f16c"} <= flags)
    if "avx512" in isas:
        assert "avx512f" in flags
    assert ("avx512_bf16" in isas) == ("avx512" in isas and "avx512_bf16" in flags)


def test_the_best_isa_is_the_default():
    isas = rmsnorm.info()["cpu_isas"]
    result = python("-c", "import rmsnorm; print(rmsnorm.info()['cpu_isa'])")
    best = max(isas, key=ISAS.index)
    assert result.stdout.strip() == best, result.stderr


def test_the_package_can_be_imported_anew():
    code = """
        import sys
        import rmsnorm
        for name in [name for name in sys.modules if name.partition(".")[0] == "rmsnorm"]:
            del sys.modules[name]
        import rmsnorm
    """
    result = python("-W", "error", "-c", textwrap.dedent(code))
    assert (result.returncode, result.stderr) == (0, "")


def test_command_line():
    result = python("-m", "rmsnorm")
    assert result.returncode == 0, result.stdout + result.stderr
    assert rmsnorm.__version__ in result.stdout
    assert rmsnorm.info()["cpu_isa"] in result.stdout


@pytest.mark.parametrize("isa", rmsnorm.info()["cpu_isas"])
def test_command_line_under_each_isa(isa):
    result = python("-m", "rmsnorm", RMSNORM_ISA=isa)
    assert result.returncode == 0, result.stdout + result.stderr
    assert isa in result.stdout


def test_include_and_cmake_directories():
    include = pathlib.Path(python("-m", "rmsnorm", "--include-dir").stdout.strip())
    assert (include / "rmsnorm" / "rmsnorm.hpp").is_file()
    assert (include / "rmsnorm" / "contract.hpp").is_file()
    cmake = pathlib.Path(python("-m", "rmsnorm", "--cmake-dir").stdout.strip())
    assert [f for f in cmake.iterdir() if re.fullmatch(r"(?i)rmsnorm-?config\.cmake", f.name)]


def test_unknown_command_line_option():
    result = python("-m", "rmsnorm", "--no-such-option")
    assert result.returncode != 0
    assert "--no-such-option" in result.stderr


@pytest.mark.parametrize("isa", ["nonsense", "AVX2 ", "neon,avx2"])
def test_an_isa_that_does_not_exist(isa):
    code = """
    import numpy, rmsnorm
    out = numpy.full((2, 8), 7, numpy.float32)
    x = numpy.ones((2, 8), numpy.float32)
    calls = [
        lambda: rmsnorm.rms_norm(x, out=out),
        lambda: rmsnorm.add_rms_norm(x, x, out=out),
        lambda: rmsnorm.mean_square(x),
        lambda: rmsnorm.rms_norm_apply(x, x[:, 0].copy(), out=out),
        lambda: rmsnorm.rms_norm_backward(x, x, dx_out=out),
    ]
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            print(error)
    assert (out == 7).all()
    """
    result = python("-c", textwrap.dedent(code), RMSNORM_ISA=isa)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 5
    for line in lines:
        assert "RMSNORM_ISA" in line and isa in line
        for available in rmsnorm.info()["cpu_isas"]:
            assert available in line


@pytest.mark.parametrize("isa", rmsnorm.info()["cpu_isas"])
def test_an_isa_in_any_case(isa):
    for name in (isa.upper(), isa.title()):
        result = python("-c", "import rmsnorm; print(rmsnorm.info()['cpu_isa'])", RMSNORM_ISA=name)
        assert result.stdout.strip() == isa, result.stderr


def test_a_name_of_no_isa_is_told_from_one_that_cannot_run():
    code = "import numpy, rmsnorm; rmsnorm.rms_norm(numpy.ones((2, 8)))"
    runnable = [isa for isa in ISAS if isa in rmsnorm.info()["cpu_isas"]]
    expected = f"expected one of: {', '.join(runnable)}"
    result = python("-c", code, RMSNORM_ISA="avx3")
    error = f"RuntimeError: RMSNORM_ISA: 'avx3' is the name of no instruction set; {expected}"
    assert result.stderr.strip().endswith(error)
    for isa in set(ISAS) - set(runnable):
        result = python("-c", code, RMSNORM_ISA=isa)
        error = f"RuntimeError: RMSNORM_ISA: '{isa}' cannot run here; {expected}"
        assert result.stderr.strip().endswith(error)


def test_an_isa_that_is_corrected_within_the_process():
    """What is not in use yet can be chosen; what is stays."""
    code = """
    import os, numpy, rmsnorm
    def isa():
        try:
            rmsnorm.rms_norm(numpy.ones((2, 8)))
        except RuntimeError as error:
            assert repr(os.environ["RMSNORM_ISA"]) in str(error), error
        return rmsnorm.info()["cpu_isa"]
    chosen = [isa()]
    for os.environ["RMSNORM_ISA"] in ("nonsense too", "scalar", "nonsense again"):
        chosen.append(isa())
    assert chosen == [None, None, "scalar", "scalar"], chosen
    """
    result = python("-c", textwrap.dedent(code), RMSNORM_ISA="nonsense")
    assert result.returncode == 0, result.stderr


def test_an_isa_that_is_corrected_during_a_call():
    """A call on several threads writes all of its rows or none, and says what was wrong."""
    code = """
    import os, threading, time, numpy, rmsnorm
    x = numpy.ones((4096, 256), numpy.float32)
    wrong, refused = [], threading.Event()
    def call():
        while True:
            out = numpy.zeros_like(x)
            try:
                rmsnorm.rms_norm(x, out=out)
            except RuntimeError as error:
                refused.set()
                told = "'nonsense' is the name of no" in str(error) or "was changed" in str(error)
                if not told or out.any():
                    wrong.append(f"{error}, {out.any(1).sum()} rows")
            else:
                if not out.all():
                    wrong.append("rows are left")
                return
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    refused.wait()
    os.environ["RMSNORM_ISA"] = "scalar"
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    """
    environment = {"RMSNORM_ISA": "nonsense", "RMSNORM_NUM_THREADS": "2"}
    for _ in range(5):
        result = python("-c", textwrap.dedent(code), **environment)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("value", [b"\xff\xfe", b"avx2\xe4", b"x" * 100_000, b"a\nb", "ä".encode()])
def test_environment_variables_of_any_bytes(value):
    code = """
    import os, numpy, rmsnorm
    environment = rmsnorm.info()["environment"]
    for name in ("RMSNORM_ISA", "RMSNORM_NUM_THREADS"):
        assert environment[name] == os.environ[name]
    assert rmsnorm.info()["cpu_isa"] is None
    try:
        rmsnorm.rms_norm(numpy.ones((2, 8)))
    except RuntimeError as error:
        print(error)
    """
    environment = {b"RMSNORM_ISA": value, b"RMSNORM_NUM_THREADS": value}
    result = python(
        "-c", textwrap.dedent(code), **{k.decode(): os.fsdecode(v) for k, v in environment.items()}
    )
    assert result.returncode == 0, result.stderr
    for text in (result.stdout, result.stderr.splitlines()[0]):
        assert text.isascii() and len(text.strip()) < 400
    assert (
        "RMSNORM_ISA: '" in result.stdout and "is the name of no instruction set" in result.stdout
    )
    assert "RMSNORM_NUM_THREADS: expected an integer from 1 to 1024, got '" in result.stderr
    result = python("-m", "rmsnorm", RMSNORM_ISA=os.fsdecode(value), PYTHONIOENCODING="ascii")
    assert result.returncode == 1 and "no ISA is in use" in result.stderr


def test_an_isa_that_this_cpu_lacks():
    lacking = sorted(set(ISAS) - set(rmsnorm.info()["cpu_isas"]))
    for isa in lacking:
        code = "import numpy, rmsnorm; rmsnorm.rms_norm(numpy.ones((2, 8)))"
        result = python("-c", code, RMSNORM_ISA=isa)
        assert result.returncode == 1
        assert re.search(rf"RuntimeError: .*RMSNORM_ISA.*{isa}.*scalar", result.stderr)


def test_import_brings_no_framework():
    code = "import sys, rmsnorm; print({'torch', 'jax', 'ml_dtypes'} & set(sys.modules))"
    result = python("-c", code)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr


def test_everything_public_is_documented():
    for name in (
        *("rms_norm", "add_rms_norm", "mean_square", "rms_norm_apply", "rms_norm_backward"),
        *("variant", "info", "set_num_threads", "get_num_threads"),
    ):
        assert len(getattr(rmsnorm, name).__doc__) > 80, name
    text = rmsnorm.rms_norm.__doc__
    for word in ("eps", "weight_offset", "rounding", "Raises", "Returns", "float64", "sqrt"):
        assert word in text, word
    assert set(rmsnorm.__all__) <= set(dir(rmsnorm))


GOOD_PROGRAM = """
from typing import Any

import numpy as np
import rmsnorm
import rmsnorm.torch
import torch

x = np.ones((2, 8), np.float32)
y = rmsnorm.rms_norm(x, x[0], eps=1e-5, weight_offset=1.0, rounding="before_weight", axis=-1)
z, rstd = rmsnorm.rms_norm(x, return_rstd=True)
t, total = rmsnorm.add_rms_norm(torch.ones(2, 8), torch.ones(2, 8), out=None)
m = rmsnorm.mean_square(x)
w = rmsnorm.rms_norm_apply(x, m, None, eps=1e-5)
dx, dweight, dbias = rmsnorm.rms_norm_backward(y, x, x[0], rstd, dx_out=y)
four = rmsnorm.rms_norm_backward(y, x, mean_square=m)
d_mean_square = four[3] + 1
norm = rmsnorm.torch.RMSNorm((2, 8), 1e-5, bias=True, rounding="rstd")
normed: torch.Tensor = rmsnorm.torch.rms_norm(norm(t), 8, weight=norm.weight)
both: tuple[torch.Tensor, torch.Tensor] = rmsnorm.torch.add_rms_norm(t, t, (8,), eps=None)
options: dict[str, Any] = dict(rmsnorm.variant("llama"))
rmsnorm.rms_norm(x, **options)
rmsnorm.set_num_threads(2)
n: int = rmsnorm.get_num_threads()
version: str = rmsnorm.__version__
information = rmsnorm.info()
"""

WRONG_LINES = [
    'rmsnorm.rms_norm(x, eps="small")',
    'rmsnorm.rms_norm(x, rounding="nearest")',
    "rmsnorm.rms_norm(x, None, None, 1e-6)",
    "rmsnorm.rms_norm(x, epsilon=1e-6)",
    "rmsnorm.rms_norm()",
    'rmsnorm.set_num_threads("2")',
    "rmsnorm.variant(3)",
    "rmsnorm.add_rms_norm(x)",
    "rmsnorm.no_such_function(x)",
    "rmsnorm.rms_norm_backward(x)",
    "rmsnorm.rms_norm_backward(x, x, x[0], None, 1e-6)",
]


def test_type_stubs(tmp_path):
    pytest.importorskip("mypy")
    package = pathlib.Path(rmsnorm.__file__).parent
    assert (package / "py.typed").is_file()
    good, wrong = tmp_path / "good.py", tmp_path / "wrong.py"
    good.write_text(GOOD_PROGRAM)
    header = "import numpy as np\nimport rmsnorm\n\nx = np.ones((2, 8), np.float32)\n"
    wrong.write_text(header + "\n".join(WRONG_LINES) + "\n")
    # imports of frameworks are not followed: their own types are not what is tested
    options = ["--strict", "--follow-imports=silent", "--no-error-summary"]
    options += ["--cache-dir", str(tmp_path / "cache")]
    result = python("-m", "mypy", *options, str(good), timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    result = python("-m", "mypy", *options, str(wrong), timeout=400)
    rejected = {int(m) for m in re.findall(r"wrong\.py:(\d+): error", result.stdout)}
    first = header.count("\n") + 1
    expected = set(range(first, first + len(WRONG_LINES)))
    assert rejected == expected, result.stdout


def test_the_extension_lies_inside_the_package():
    """Nothing is installed beside the package that another one could collide with."""
    files = importlib.metadata.files("rmsnorm")
    if files is None or importlib.util.find_spec("rmsnorm").origin is None:
        pytest.skip("no list of files: an editable install")
    tops = {f.parts[0] for f in files if ".." not in f.parts}
    assert all(t == "rmsnorm" or t.startswith("rmsnorm-") for t in tops), tops
