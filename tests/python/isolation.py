"""Cases that may crash, run in another process.

A file of cases has a dictionary CASES of functions without arguments, which `entering(CASES)`
fills, and ends with `isolation.main(CASES)`. Its test asks `outcomes(file)` for what became of
each: "" where the function returned, else its traceback, or the signal that ended the process. The
cases after a crash run in a new process.
"""

import os
import pathlib
import subprocess
import sys
import traceback

_BEGIN, _END = "begin ", "end "


def entering(cases):
    """A decorator: @case(name) puts a function in `cases`."""

    def case(name):
        def add(function):
            assert name not in cases
            cases[name] = function
            return function

        return add

    return case


def main(cases):
    for name in sys.argv[1:]:
        print(_BEGIN + name, flush=True)
        try:
            cases[name]()
        except BaseException:  # noqa: BLE001  an interrupt is an outcome as well
            print(traceback.format_exc())
        print(_END + name, flush=True)


def _run(script, names, variables):
    command = [sys.executable, script, *names]
    environment = {**os.environ, **variables}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    found = {}
    for part in result.stdout.split(_BEGIN)[1:]:
        name, _, text = part.partition("\n")
        text, complete, _ = text.partition(_END + name)
        found[name] = text if complete else f"ended with {result.returncode}\n{result.stderr}"
    assert found, result.stderr
    return found


def outcomes(file, names, **variables):
    script = pathlib.Path(__file__).with_name(file)
    found = {}
    while rest := [name for name in names if name not in found]:
        found.update(_run(script, rest, variables))
    return found
