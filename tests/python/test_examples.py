"""The Python programs in examples/ run and report success."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_llama_generation():
    pytest.importorskip("transformers")
    result = run("llama_generation.py")
    assert result.returncode == 0, result.stdout + result.stderr
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
