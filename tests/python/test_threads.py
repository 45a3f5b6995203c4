"""Calls from many threads, after fork, and every way to set the number of threads."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import cases
import numpy as np
import pytest
import rmsnorm
from floats import BF16, F32, assert_same_bits


def sample(shape, dtype, seed=0):
    return cases.values(np.random.default_rng(seed), shape, dtype)


def test_concurrent_calls_give_the_same_bits():
    """Small calls that hold the GIL and large ones that release it, all at once."""
    problems = [
        (sample((2, 33), F32, 1), sample(33, F32, 2)),
        (sample((700, 1025), F32, 3), sample(1025, F32, 4)),
        (sample((900, 777), BF16, 5), sample(777, F32, 6)),
    ]
    expected = [rmsnorm.rms_norm(x, w) for x, w in problems]
    outs = [[np.empty_like(e) for e in expected] for _ in range(8)]
    start = threading.Barrier(8)

    def work(number):
        start.wait(timeout=60)
        for repeat in range(10):
            which = (number + repeat) % 3
            x, w = problems[which]
            out = outs[number][which]
            out.fill(0)
            assert rmsnorm.rms_norm(x, w, out=out) is out
            assert_same_bits(out, expected[which])
            assert_same_bits(rmsnorm.rms_norm(x, w), expected[which])
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_the_thread_count_may_change_under_running_calls(thread_count):
    x = sample((700, 1025), F32)
    expected = rmsnorm.rms_norm(x)
    done = threading.Event()

    def change():
        number = 0
        while not done.is_set():
            number = number % 4 + 1
            rmsnorm.set_num_threads(number)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(30):
            assert_same_bits(rmsnorm.rms_norm(x), expected)
    finally:
        done.set()
        changer.join()


def test_other_threads_run_during_a_large_call(thread_count):
    """The GIL is free: a second thread makes progress while one call is inside the kernel."""
    thread_count(1)
    x = np.ones((2000, 4096), F32)
    out = np.empty_like(x)
    switch = sys.getswitchinterval()
    ticks, inside, done = 0, threading.Event(), threading.Event()

    def tick():
        nonlocal ticks
        inside.wait(timeout=60)
        while not done.is_set():
            ticks += 1
            time.sleep(0)  # hands the GIL back

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        sys.setswitchinterval(60)  # the interpreter itself takes the GIL from nobody
        inside.set()
        for _ in range(20):
            rmsnorm.rms_norm(x, out=out)
        during = ticks
    finally:
        sys.setswitchinterval(switch)
        done.set()
        ticker.join()
    assert during > 0


def child_work(queue):
    x = np.ones((2000, 1000), F32)
    queue.put((rmsnorm.get_num_threads(), float(rmsnorm.rms_norm(x, eps=0.0).sum())))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_a_forked_child_computes_after_the_parent_used_threads(thread_count):
    thread_count(2)
    rmsnorm.rms_norm(np.ones((2000, 1000), F32))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=child_work, args=(queue,))
    child.start()
    child.join(timeout=60)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    threads, total = queue.get()
    assert threads == 1, "a forked child runs on one thread"
    assert total == 2_000_000
    assert rmsnorm.get_num_threads() == 2, "the parent keeps its threads"


def in_a_process(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "RMSNORM_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


PRINT_THREADS = "import rmsnorm; print(rmsnorm.get_num_threads(), rmsnorm.info()['num_threads'])"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"RMSNORM_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"RMSNORM_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"RMSNORM_NUM_THREADS": "1"}, 1),
    ],
    ids=str,
)
def test_environment(environment, expected):
    result = in_a_process(PRINT_THREADS, **environment)
    assert result.stdout.split() == [str(expected)] * 2, result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks for the affinity")
def test_the_default_is_the_machine():
    result = in_a_process(PRINT_THREADS)
    assert int(result.stdout.split()[0]) == len(os.sched_getaffinity(0)), result.stderr


def test_set_num_threads_wins_over_the_environment():
    code = "import rmsnorm; rmsnorm.set_num_threads(2); print(rmsnorm.get_num_threads())"
    assert in_a_process(code, RMSNORM_NUM_THREADS="7").stdout.strip() == "2"


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5", "3 4", "99999999999999999999"])
def test_a_wrong_environment_is_an_error_or_ignored_but_never_a_wrong_count(value):
    """A mistyped number must not end the import, nor be read as some other number."""
    expected = in_a_process(PRINT_THREADS).stdout.split()[0]
    result = in_a_process(PRINT_THREADS, RMSNORM_NUM_THREADS=value)
    if result.returncode != 0:
        assert "RMSNORM_NUM_THREADS" in result.stderr
    else:
        assert result.stdout.split()[0] == expected


@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_set_and_get(n, thread_count):
    assert thread_count(n) is None
    assert rmsnorm.get_num_threads() == n
    assert rmsnorm.info()["num_threads"] == n


@pytest.mark.parametrize(
    "n, exception",
    [
        (0, ValueError),
        (-1, ValueError),
        (2**70, (ValueError, OverflowError)),
        (1.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
    ids=str,
)
def test_set_num_threads_refuses(n, exception, thread_count):
    before = rmsnorm.get_num_threads()
    with pytest.raises(exception, match=r"^n\b"):
        rmsnorm.set_num_threads(n)
    assert rmsnorm.get_num_threads() == before


def test_more_threads_than_rows(thread_count):
    x = sample((3, 40000), F32)
    thread_count(1)
    expected = rmsnorm.rms_norm(x)
    thread_count(64)
    assert_same_bits(rmsnorm.rms_norm(x), expected)


RUN_WHILE_THE_PROCESS_ENDS = """
import threading, time
import numpy as np, rmsnorm

rmsnorm.set_num_threads({threads})
x = np.ones((4096, 4096), np.float32)
out = np.empty_like(x)
called = threading.Semaphore(0)

def work():
    while True:
        rmsnorm.rms_norm(x, out=out)
        called.release()

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
for _ in range(3):
    called.acquire()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_daemon_threads_in_large_calls_while_the_process_ends(threads):
    """Python before 3.14 unwinds the stack of a thread that then asks for the GIL."""
    result = in_a_process(RUN_WHILE_THE_PROCESS_ENDS.format(threads=threads))
    assert result.returncode == 0, result.stderr
