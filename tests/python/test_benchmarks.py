"""The benchmark's one command: what it writes, whom it leaves out, and what it calls a regression."""

import copy
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import rmsnorm

RUN = pathlib.Path(__file__).parents[2] / "benchmarks" / "run.py"
OPERATIONS = ["forward", "add"] + ["backward"] * hasattr(rmsnorm, "rms_norm_backward")
LIBRARIES = {"rmsnorm", "copy", "rmsnorm-new", "torch"}

sys.path.append(str(RUN.parent))
from suite import cases, cpu_device, machine, turns


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run on a tiny shape: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmarks")
    ran = run(
        *("--quick", "--shapes", "32x64", "--dtypes", "bf16", "--threads", 1, "--cache", "warm"),
        # oneDNN and ggml are looked for where they are not.
        *("--peers", "rmsnorm-new", "torch", "onednn", "ggml"),
        *("--json", folder / "new.json", "--plots", folder),
        DNNL_LIBRARY=str(folder / "no_library.so"),
        GGML_LIBRARY=str(folder / "no_ggml.so"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, ran.stdout


def check(old, new):
    return run("--check", old, new)


def ordered(quartiles):
    low, middle, high = quartiles
    return 0 < low <= middle <= high


def test_record(results):
    folder, printed = results
    record = json.loads((folder / "new.json").read_text())
    assert record["schema"] == 1
    assert record["command"][0] == "python" and "--quick" in record["command"]
    assert record["machine"]["isa"] == rmsnorm.info()["cpu_isa"]
    assert record["machine"]["versions"]["rmsnorm"] == rmsnorm.__version__
    assert record["machine"]["cpu"] and record["machine"]["cpus"] >= 1
    assert record["machine"]["cpu_id"] == machine.cpu_id()
    assert record["machine"]["microarchitecture"] == machine.microarchitecture(machine.cpu_id())
    assert record["not_measured"] == []
    assert "no_library.so" in record["unavailable"]["onednn"]
    assert "not installed: oneDNN" in printed
    assert "build_ggml.py" in record["unavailable"]["ggml"]
    assert "not installed: ggml (no no_ggml.so" in printed

    measured = [(result["operation"], result["layout"]) for result in record["results"]]
    expected = [(operation, "contiguous") for operation in OPERATIONS]
    expected.insert(1, ("forward", "packed qkv"))
    assert measured == expected
    for result in record["results"]:
        tensors = {"forward": 2, "add": 4, "backward": 3}[result["operation"]]
        assert result["bytes"] == tensors * 32 * 64 * 2
        assert (result["device"], result["threads"], result["cache"]) == ("cpu", 1, "warm")
        assert result["copy"] == "copy" and result["sets"] == 1 and result["rounds"] >= 5
        assert result["left_out"].pop("copy-on-threads")
        backward = result["operation"] == "backward"
        assert set(result["left_out"]) == ({"rmsnorm-new"} if backward else set())
        assert set(result["times"]) == LIBRARIES - set(result["left_out"])
        for times in result["times"].values():
            assert ordered(times["us"]) and ordered(times["of_copy"])
        assert result["times"]["copy"]["of_copy"] == [1, 1, 1]
    calls = {cost["call"]: cost["ns"] for cost in record["call_costs"]}
    assert {"rms_norm, NumPy, out", "rms_norm, torch, out"} <= set(calls)
    assert all(map(ordered, calls.values()))


def test_figures(results):
    folder, _ = results
    names = [f"cpu_{operation}_1t" for operation in OPERATIONS] + ["cpu_forward_packed_qkv_1t"]
    for name in names:
        drawing = (folder / f"{name}.svg").read_text()
        assert "<svg" in drawing and "<date>" not in drawing
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_show_prints_the_same_tables(results):
    folder, printed = results
    shown = run("--show", folder / "new.json")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout in printed


def test_markdown(results):
    folder, _ = results
    made = run("--show", folder / "new.json", "--markdown", 1).stdout.splitlines()
    columns = [f"{operation} bf16" for operation in OPERATIONS]
    assert made[0] == f"| rows × n | {' | '.join(columns)} |"
    record = json.loads((folder / "new.json").read_text())
    times = [r["times"]["rmsnorm"]["of_copy"][1] for r in record["results"]]
    del times[1]  # packed
    assert made[2:] == ["| 32 × 64 | " + " | ".join(f"{1 / t:.2f}" for t in times) + " |"]
    assert run("--markdown", 1).returncode == 2


def test_show_names_faster_peers(results, tmp_path):
    folder, _ = results
    record = json.loads((folder / "new.json").read_text())
    forward, backward = record["results"][0]["times"], record["results"][-1]["times"]
    for result in record["results"]:
        for times in result["times"].values():
            times["us"] = [9.0, 10.0, 11.0]

    def shown():
        (tmp_path / "changed.json").write_text(json.dumps(record))
        # As one line, however wide the terminal is.
        return " ".join(run("--show", tmp_path / "changed.json").stdout.split())

    assert "no peer is faster beyond noise" in shown()
    # torch allocates its result, and so does rmsnorm-new, which is as fast.
    forward["torch"]["us"] = forward["rmsnorm-new"]["us"] = [4.0, 5.0, 6.0]
    assert "no peer is faster beyond noise" in shown()
    # Quartiles that overlap are noise.
    forward["torch"]["us"] = [2.0, 3.0, 4.5]
    assert "no peer is faster beyond noise" in shown()
    forward["torch"]["us"] = [2.0, 3.0, 3.5]
    assert "faster beyond noise: torch eager, 0.60 of the time: forward bf16 32 x 64" in shown()
    forward["torch"]["us"] = [9.0, 10.0, 11.0]
    backward["torch"]["us"] = [4.0, 5.0, 6.0]
    assert "faster beyond noise: torch eager, 0.50 of the time: backward" in shown()


def test_check_of_equal_results(results):
    folder, _ = results
    checked = check(folder / "new.json", folder / "new.json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "0 slower, 0 faster" in checked.stdout


def test_check_names_regressions(results, tmp_path):
    folder, _ = results
    old = json.loads((folder / "new.json").read_text())
    # Quartiles that are 10 % wide, so that what is changed below is the only difference.
    for result in old["results"]:
        result["times"]["rmsnorm"]["of_copy"] = [0.76, 0.8, 0.84]
    for cost in old["call_costs"]:
        cost["ns"] = [480, 500, 520]
    (tmp_path / "old.json").write_text(json.dumps(old))

    def status_with(change):
        new = copy.deepcopy(old)
        change(new)
        (tmp_path / "changed.json").write_text(json.dumps(new))
        checked = check(tmp_path / "old.json", tmp_path / "changed.json")
        return checked.returncode, checked.stdout

    def norm_at(quartiles):
        return lambda new: new["results"][0]["times"]["rmsnorm"].update(of_copy=quartiles)

    status, printed = status_with(norm_at([0.6, 0.64, 0.66]))
    assert status == 1 and "slower: forward bf16 32 x 64 warm 1 thread" in printed
    assert "x 1.25" in printed and "1 slower, 0 faster" in printed
    status, printed = status_with(norm_at([0.7, 0.72, 0.77]))
    assert status == 0 and "0 slower" in printed, "the quartiles overlap"
    status, printed = status_with(norm_at([0.9, 0.95, 0.99]))
    assert status == 0 and "0 slower, 1 faster" in printed
    status, printed = status_with(lambda new: new["call_costs"][0].update(ns=[590, 600, 610]))
    assert status == 1 and "slower: rms_norm, NumPy, out, ns" in printed
    status, printed = status_with(lambda new: new["results"].pop())
    assert status == 0 and "only in" in printed
    status, printed = status_with(lambda new: new.update(results=[], call_costs=[]))
    assert status == 1 and "0 compared" in printed


def test_wrong_results_are_not_timed(tmp_path):
    """Who computes something else is left out, with what is wrong with it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import rmsnorm\n"
        "right = rmsnorm.rms_norm\n"
        "def wrong_without_out(*operands, **options):\n"
        "    y = right(*operands, **options)\n"
        "    return y if 'out' in options else y * 1.1\n"
        "rmsnorm.rms_norm = wrong_without_out\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    ran = run(
        *("--quick", "--shapes", "4x64", "--dtypes", "f32", "--threads", 1, "--cache", "warm"),
        *("--operations", "forward", "--peers", "rmsnorm-new", "--json", tmp_path / "new.json"),
        PYTHONPATH=path,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (result,) = json.loads((tmp_path / "new.json").read_text())["results"]
    assert set(result["times"]) == {"rmsnorm", "copy"}
    assert "y is off by" in result["left_out"]["rmsnorm-new"]


def test_peers_that_are_built_for_it_take_part(tmp_path):
    """Those that no dependency of the tests brings, where they are."""
    ran = run(
        *("--quick", "--shapes", "32x64", "--dtypes", "f32", "--threads", 1, "--cache", "warm"),
        *("--operations", "forward", "add", "--peers", "onednn", "ggml", "zendnn"),
        *("--json", tmp_path / "new.json"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = json.loads((tmp_path / "new.json").read_text())
    there = {"onednn", "ggml", "zendnn"} - set(record["unavailable"])
    if not there:
        pytest.skip("none of them is here")
    forward, packed, add = record["results"]
    assert there <= set(forward["times"])
    # Both ways to lie in memory, and both results.
    assert there & {"ggml"} == set(packed["times"]) & {"ggml"} == set(add["times"]) & {"ggml"}


@pytest.mark.parametrize("count", range(1, 9))
def test_everybody_follows_everybody_equally_often(count):
    names = [str(i) for i in range(count)]
    orders = [turns.order_of_round(names, index) for index in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    neighbours = [pair for order in orders for pair in itertools.pairwise(order)]
    expected = itertools.permutations(names, 2)
    assert sorted(neighbours) == sorted(pair for pair in expected for _ in range(2))


class PretendedMachine:
    """A call takes a second, and ten more if it has to pay for what others did.

    It has where someone else was the last to touch its tensors, or one of the `kept` calls before was
    someone else's, of which the caches still hold something.
    """

    def __init__(self, sets, kept):
        self.now = 0.0
        self.kept = kept
        self.calls = []
        self.last_of_set = [None] * sets

    def call(self, name, index):
        others = [each for each, _ in self.calls[-self.kept :] if each != name]
        strange = self.last_of_set[index] not in (None, name)
        self.now += 11.0 if others or strange else 1.0
        self.last_of_set[index] = name
        self.calls.append((name, index))

    def runners(self, names):
        def calls_of(name):
            return [lambda i=i: self.call(name, i) for i in range(len(self.last_of_set))]

        return {name: calls_of(name) for name in names}

    def samples(self, turn, names, rounds):
        return turns.rounds_of(
            self.runners(names), turn, lambda done: done < rounds, clock=lambda: self.now
        )


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_nobody_pays_for_the_neighbour(cache):
    sets, kept = (1, cpu_device.SETTLING_CALLS) if cache == "warm" else (5, 5)
    names = list("abcd")
    untimed = cpu_device.SETTLING_CALLS if cache == "warm" else sets
    turn = turns.Turn(untimed, 0.0, 2)
    samples = PretendedMachine(sets, kept).samples(turn, names, 8)
    assert samples == {name: [1e6] * 8 for name in names}
    # With fewer untimed calls they would, so that this test could fail.
    hasty = PretendedMachine(sets, kept).samples(turns.Turn(1, 0.0, 2), names, 8)
    assert max(itertools.chain(*hasty.values())) > 1e6


def test_turns_are_of_calls_in_a_row():
    pretended = PretendedMachine(sets=3, kept=0)
    before = []
    samples = turns.rounds_of(
        pretended.runners("ab"),
        turns.Turn(untimed=2, seconds=3.5, timed=2),
        lambda done: done < 2,
        lambda: before.append(len(pretended.calls)),
        lambda: pretended.now,
    )
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
    # The first has nobody's tensors: four untimed calls of a second. The others have two at least, which
    # take more than 3.5 seconds where a tensor was someone else's.
    assert before[:2] == [0, 6]
    steps = [index for _, index in pretended.calls]
    assert steps == [i % 3 for i in range(len(steps))]
    lengths = [len(list(group)) for _, group in itertools.groupby(n for n, _ in pretended.calls)]
    assert sum(lengths) == len(steps) and min(lengths) >= 4


def test_what_is_cold_and_for_how_long():
    mib = 1 << 20
    assert cpu_device.cold_bytes(32 * mib, 64 << 30) == 256 * mib
    assert cpu_device.cold_bytes(480 * mib, 64 << 30) == 1 << 30
    assert cpu_device.cold_bytes(1024 * mib, 64 << 30) == 2 << 30
    assert cpu_device.cold_bytes(32 * mib, 512 * mib) == 128 * mib
    threads = rmsnorm.get_num_threads()
    try:
        host = cpu_device.Host(1, machine.cpus(), 0.1, (1, 1))
        for case in cases.cpu_grid(list(cases.DTYPES), None, quick=False):
            turn, sets = host.turn(case), host.set_count(case)
            assert turn.timed >= 1 and turn.seconds > 0
            if case.cache == "warm":
                moved = turn.untimed * case.bytes
                assert sets == 1 and turn.untimed >= 2
                assert turn.untimed == cpu_device.SETTLING_CALLS or moved >= host.cold_bytes // 2
            else:
                assert sets * case.bytes >= host.cold_bytes and turn.untimed == sets >= 2
    finally:
        rmsnorm.set_num_threads(threads)


@pytest.mark.parametrize("operation", ["forward", "add", "backward"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_grid(operation, dtype):
    def shapes(cache, quick):
        grid = cases.cpu_grid([dtype], None, quick)
        return [
            (case.rows, case.n)
            for case in grid
            if (case.operation, case.layout, case.cache) == (operation, "contiguous", cache)
        ]

    wanted = {(4096, 128), (16384, 64), (16384, 128), (16384, 256), (64, 4096), (256, 4096)}
    assert wanted <= set(shapes("warm", quick=False)) & set(shapes("cold", quick=False))
    for cache in ("warm", "cold"):
        whole = shapes(cache, quick=False)
        assert len(whole) == len(set(whole)), "no case twice"
        assert set(shapes(cache, quick=True)) < set(whole)


@pytest.mark.parametrize(
    "vendor, family, model, stepping, name",
    [
        ("AuthenticAMD", 0x17, 0x31, 0, "Zen 2"),
        ("AuthenticAMD", 25, 1, 1, "Zen 3"),
        ("AuthenticAMD", 25, 0x11, 1, "Zen 4"),
        ("AuthenticAMD", 25, 0xA0, 2, "Zen 4"),
        ("AuthenticAMD", 26, 2, 1, "Zen 5"),
        ("GenuineIntel", 6, 85, 4, "Skylake"),
        ("GenuineIntel", 6, 85, 7, "Cascade Lake"),
        ("GenuineIntel", 6, 106, 6, "Ice Lake"),
        ("GenuineIntel", 6, 143, 8, "Sapphire Rapids"),
        ("GenuineIntel", 6, 207, 2, "Emerald Rapids"),
        ("GenuineIntel", 6, 173, 1, "Granite Rapids"),
        ("GenuineIntel", 6, 1, 1, ""),
        ("AuthenticAMD", 99, 1, 1, ""),
    ],
)
def test_microarchitecture(vendor, family, model, stepping, name):
    identity = {"vendor": vendor, "family": family, "model": model, "stepping": stepping}
    assert machine.microarchitecture(identity) == name


def test_microarchitecture_of_what_says_nothing():
    assert machine.microarchitecture({}) == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda", "--quick"], "are for --device cpu"),
        (["--threads", 0], "--threads: expected 1 to"),
        (["--shapes", "4by4"], "invalid shape value"),
        (["--dtypes", "f8"], "invalid choice"),
    ],
)
def test_wrong_options(arguments, message):
    ran = run(*arguments)
    assert ran.returncode != 0
    assert message in ran.stderr
