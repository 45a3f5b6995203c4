#!/usr/bin/env python3
"""Checks the proofs of the error bounds, and that each would fail if it claimed more.

    check.py [--coq] [--write DIR] [NAME]...     names of theorems and programs; without one: all

For every theorem (theorems.py) Gappa has to find a proof, and must find none for its controls.
Every assumption and every conclusion needs a control, and include/rmsnorm/bounds.hpp must not
promise less than is proved. The programs are a part of a proof that tries all cases
(roundings_f32), and searches for results that leave the bounds.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from theorems import STATISTICS_F32, THEOREMS, Theorem

HERE = Path(__file__).parent
INCLUDE = HERE.parent.parent / "include"

# Intervals to 128 bits: the usual 60 would add errors of 2^-60 to those of doubles. Cases are split
# where a script says so: to look for splits takes ten times as long, most of it for controls.
GAPPA = ["gappa", "-Eprecision=128", "-Eno-auto-dichotomy"]


@dataclass(frozen=True)
class Program:
    name: str
    source: str
    arguments: list[str]
    flags: list[str]


# The library is not optimised, since that takes a minute. Its results do not depend on it.
SEARCH_FLAGS = ["-O0", "-lquadmath"]
PROGRAMS = [
    Program("roundings_f32", "roundings_f32.cpp", [STATISTICS_F32], ["-O2"]),
    Program("search_f32", "search.cpp", ["f32"], SEARCH_FLAGS),
    Program("search_f32_unrounded_sum", "search.cpp", ["f32_unrounded_sum"], SEARCH_FLAGS),
    Program("search_f64", "search.cpp", ["f64"], SEARCH_FLAGS),
]


@dataclass
class Report:
    line: str
    problems: list[str] = field(default_factory=list)


class Failure(Exception):
    pass


def run(command: Iterable[str | Path], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], input=text, capture_output=True, text=True, check=False
    )


def finds_proof(script: str) -> bool:
    """Failing in any other way than to find no proof is an error, and so is a warning."""
    result = run(GAPPA, script)
    output = result.stdout + result.stderr
    if result.returncode == 0 and not output:
        return True
    if result.returncode != 0 and "some properties were not satisfied" in output:
        return False
    raise Failure(output.strip())


def clauses(script: str) -> list[str]:
    """The assumptions and conclusions."""
    proposition = re.sub(r"#.*", "", script).partition("{")[2].partition("}")[0]
    return [" ".join(c.split()) for c in re.split(r"/\\|->", proposition)]


def check_theorem(theorem: Theorem, promised: dict[str, float], coq: bool) -> Report:
    start = time.monotonic()
    script = theorem.script()
    problems = []
    try:
        if not finds_proof(script):
            problems.append("not proved")
    except Failure as failure:
        problems.append(f"gappa: {failure}")
    milliseconds = (time.monotonic() - start) * 1000

    uncontrolled = set(clauses(script))
    for name in theorem.controls():
        control = theorem.script(control=name)
        uncontrolled &= set(clauses(control))
        try:
            if finds_proof(control):
                problems.append(f"proved with the control of %{name} too")
        except Failure as failure:
            problems.append(f"control of %{name}: {failure}")
    problems += [f"no control of: {clause}" for clause in sorted(uncontrolled)]

    line = f"{theorem.name}: {theorem.statement()}"
    if theorem.promise:
        promise = promised[theorem.promise]
        line += f", promised {promise:.10g}"
        more = theorem.proved() > promise
        if more and theorem.completed_by:
            line += f" by {theorem.completed_by}"
        elif more:
            problems.append("more than is promised")
        elif theorem.completed_by:
            problems.append(f"needs no {theorem.completed_by}")
    line += f" ({milliseconds:.0f} ms, {len(theorem.controls())} controls)"
    if coq:
        problems += coq_problems(theorem.name, script)
    return Report(line, problems)


def coq_problems(name: str, script: str) -> list[str]:
    """Has Coq check Gappa's proof, and prove the rewriting rules, which are assumptions in it."""
    result = run([*GAPPA, "-Bcoq"], script)
    if result.returncode != 0:
        return [f"gappa -Bcoq: {result.stderr.strip()}"]
    proof = "Require Import Reals.\n" + re.sub(
        r"^Hypothesis (.*)$",
        r"Lemma \1 Proof. intros; unfold Float1; field; repeat split; assumption. Qed.",
        result.stdout,
        flags=re.MULTILINE,
    )
    if re.search(r"Hypothesis|Axiom|Parameter|Admitted", proof):
        return ["Gappa's proof for Coq assumes something"]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"{name}.v"
        file.write_text(proof)
        result = run(["coqc", "-q", file])
    return [] if result.returncode == 0 else [f"coqc: {(result.stdout + result.stderr).strip()}"]


def compiled(source: Path, flags: list[str], directory: Path) -> Path:
    target = directory / source.stem
    result = run(["g++", "-std=c++17", "-I", INCLUDE, source, *flags, "-o", target])
    if result.returncode != 0:
        raise Failure(f"{source.name} does not compile:\n{result.stderr}")
    return target


def promised_bounds(expressions: list[str], directory: Path) -> dict[str, float]:
    """The values of expressions over include/rmsnorm/bounds.hpp."""
    source = directory / "promised.cpp"
    prints = "".join(f'  std::printf("%.17g\\n", {e});\n' for e in expressions)
    source.write_text(
        "#include <cstdio>\n#include <rmsnorm/bounds.hpp>\nusing namespace rmsnorm;\n"
        f"int main() {{\n{prints}}}\n"
    )
    values = run([compiled(source, [], directory)]).stdout.split()
    return dict(zip(expressions, map(float, values), strict=True))


def check_program(program: Program, executable: "Future[Path]") -> Report:
    try:
        path = executable.result()
    except Failure as failure:
        return Report(program.name, [str(failure)])
    start = time.monotonic()
    result = run([path, *program.arguments])
    output = "\n  ".join((result.stdout + result.stderr).strip().splitlines())
    line = f"{program.name} ({time.monotonic() - start:.1f} s): {output}"
    return Report(line, [] if result.returncode == 0 else [f"exit status {result.returncode}"])


def check_identities(theorems: list[Theorem]) -> Report:
    try:
        from identities import wrong_rules
    except ModuleNotFoundError:
        return Report("identities: skipped, there is no sympy")
    problems = [
        f"{theorem.name}: not an identity: {rule}"
        for theorem in theorems
        for rule in wrong_rules(theorem.script())
    ]
    return Report("identities: both sides of every rewriting rule are the same", problems)


def write_scripts(theorems: list[Theorem], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for theorem in theorems:
        for control in ["", *theorem.controls()]:
            name = f"{theorem.name}{'.fails_' if control else ''}{control}.g"
            text = f"# {' '.join(GAPPA)} {name}\n{theorem.script(control)}"
            (directory / name).write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*")
    parser.add_argument("--coq", action="store_true", help="let Coq check the proofs as well")
    parser.add_argument("--write", metavar="DIR", type=Path, help="only write the scripts there")
    options = parser.parse_args()

    unknown = set(options.names) - {t.name for t in THEOREMS} - {p.name for p in PROGRAMS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    theorems = [t for t in THEOREMS if not options.names or t.name in options.names]
    programs = [p for p in PROGRAMS if not options.names or p.name in options.names]
    if options.write:
        write_scripts(theorems, options.write)
        return 0
    for tool in ["gappa", "g++", *(["coqc"] if options.coq else [])]:
        if not shutil.which(tool):
            parser.error(f"there is no {tool}")

    start = time.monotonic()
    failed = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        directory = Path(name)
        # What takes longest comes first.
        executables = {
            source: pool.submit(compiled, HERE / source, flags, directory)
            for source, flags in {p.source: p.flags for p in programs}.items()
        }
        promises = [t.promise for t in theorems if t.promise]
        promised = promised_bounds(promises, directory) if promises else {}
        jobs = [pool.submit(check_theorem, t, promised, options.coq) for t in theorems]
        jobs.append(pool.submit(check_identities, theorems))
        jobs += [pool.submit(check_program, p, executables[p.source]) for p in programs]
        for job in jobs:
            report = job.result()
            print(report.line, flush=True)
            for problem in report.problems:
                print(f"  FAILED: {problem}", flush=True)
            failed += bool(report.problems)
    controls = sum(len(t.controls()) for t in theorems)
    print(
        f"{len(theorems)} theorems, {controls} controls, {len(programs)} programs in "
        f"{time.monotonic() - start:.0f} s: {f'{failed} FAILED' if failed else 'all hold'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
