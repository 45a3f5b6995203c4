"""The bits of a row depend on the row and the options: not on ISA, threads, batch or neighbours."""

import json
import os
import pathlib
import subprocess
import sys

import cases
import numpy as np
import pytest
import rmsnorm
from floats import BF16, DTYPES, F32, assert_same_bits

ISAS = rmsnorm.info()["cpu_isas"]


def digests_under(isa):
    script = pathlib.Path(__file__).with_name("isa_digest.py")
    environment = {**os.environ, "RMSNORM_ISA": isa}
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def scalar_digests():
    return digests_under("scalar")


def test_scalar_is_there_and_the_isa_in_use_is_one_of_the_list():
    assert "scalar" in ISAS
    assert rmsnorm.info()["cpu_isa"] in ISAS


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
def test_isa_equals_scalar(isa, scalar_digests):
    assert scalar_digests["isa"] == "scalar"
    result = digests_under(isa)
    assert result["isa"] == isa, "another ISA ran than was asked for"
    assert len(result["digests"]) > 400
    different = [k for k, v in result["digests"].items() if scalar_digests["digests"][k] != v]
    assert not different, f"{len(different)} of {len(result['digests'])}: {different[:10]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [5, 64, 200, 1031])
def test_a_row_alone_equals_the_row_in_a_batch(n, dtype):
    """In vllm-project/vllm 48391 the order of the sum hung on whether there were 256 rows."""
    x, residual = cases.values(np.random.default_rng(n), (2, 300, n), dtype)
    weight = cases.values(np.random.default_rng(1), n, dtype)

    def results(rows):
        return (
            *rmsnorm.rms_norm(x[rows], weight, return_rstd=True),
            *rmsnorm.add_rms_norm(x[rows], residual[rows], weight, return_rstd=True),
        )

    whole = results(slice(None))
    for rows in (0, 1, 35, 299, *(slice(count) for count in (2, 3, 31, 64, 255, 256, 257))):
        for part, of_whole in zip(results(rows), whole):
            assert_same_bits(part, of_whole[rows], f"rows {rows}")


@pytest.mark.parametrize("x, weight, out", cases.COMMON_DTYPES, ids=str)
def test_thread_counts(x, weight, out, thread_count):
    rng = np.random.default_rng(30)
    # large enough that threads are used, and rows that do not divide evenly
    for rows, n in ((1031, 515), (7, 65537)):
        values, w = cases.values(rng, (rows, n), x), cases.values(rng, n, weight)
        results = []
        for threads in (1, 2, 3):
            thread_count(threads)
            assert rmsnorm.get_num_threads() == threads
            results.append(rmsnorm.rms_norm(values, w, out_dtype=out, return_rstd=True))
        for y, rstd in results[1:]:
            assert_same_bits(y, results[0][0])
            assert_same_bits(rstd, results[0][1])


def test_thread_counts_with_residual_and_mean_square(thread_count):
    rng = np.random.default_rng(31)
    x, residual = (cases.values(rng, (2001, 300), BF16) for _ in "xr")
    results = []
    for threads in (1, 2, 3):
        thread_count(threads)
        y, total = rmsnorm.add_rms_norm(x, residual)
        mean_square = rmsnorm.mean_square(x)
        results.append((y, total, mean_square, rmsnorm.rms_norm_apply(x, mean_square)))
    for result in results[1:]:
        for actual, expected in zip(result, results[0]):
            assert_same_bits(actual, expected)


def test_huge_rows_beside_tiny_ones():
    """Rows that have to be rescaled do not disturb their neighbours, nor the other way round."""
    rng = np.random.default_rng(32)
    scales = np.ldexp(1.0, rng.choice([-130, -100, -40, 0, 40, 64, 100, 126], 64)).astype(F32)
    x = rng.uniform(0.5, 1, (64, 300)).astype(F32) * scales[:, None]
    y = rmsnorm.rms_norm(x, eps=1e-30)
    for row in range(64):
        assert_same_bits(y[row], rmsnorm.rms_norm(x[row], eps=1e-30))


def test_the_same_call_twice():
    x = cases.values(np.random.default_rng(33), (300, 700), BF16)
    assert_same_bits(rmsnorm.rms_norm(x), rmsnorm.rms_norm(x))


def test_one_long_decode_row_is_not_split_differently(thread_count):
    x = cases.values(np.random.default_rng(34), (1, 2**19 + 5), F32)
    thread_count(1)
    expected = rmsnorm.rms_norm(x)
    thread_count(3)
    assert_same_bits(rmsnorm.rms_norm(x), expected)
