"""The Python programs in examples/ run and report success."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    """On one thread: matrices are so small that a second one is waited for most of the time."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_llama_generation():
    pytest.importorskip("transformers")
    result = run("llama_generation.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\n9 norms replaced, 0 left\n" in "\n" + result.stdout
    for dtype in ("float32", "bfloat16"):
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(dtype))
        assert "tokens equal" in line


def test_llama_generation_reports_disagreement(monkeypatch, capsys):
    """With an eps that is not the model's the logits differ, and the exit status says so."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["llama_generation.py", "--eps-factor", "1e6"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "llama_generation.py"), run_name="__main__")
    assert stopped.value.code == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.fixture
def train(tmp_path):
    """Runs a small training; returns its result and the plot's path."""
    for package in ("torch", "matplotlib", "rich"):
        pytest.importorskip(package)

    def run_training(*arguments):
        plot = tmp_path / "curves.png"
        size = ("--width", "32", "--layers", "2")
        return run("train_language_model.py", *size, "--plot", str(plot), *arguments), plot

    return run_training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_language_model(train, dtype):
    result, plot = train("--steps", "30", "--dtype", dtype)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\ncurves within 5 times the noise of \S+: yes\n", result.stdout)
    assert re.search(r"\nlosses below \S+, that of frequencies: yes\n", result.stdout)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_train_language_model_reports_disagreement(train):
    """With an eps that is not the original's the curves part, and the exit status says so."""
    result, _ = train("--steps", "10", "--eps-factor", "1000")
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(r"\ncurves within 5 times the noise of \S+: NO\n", result.stdout)
