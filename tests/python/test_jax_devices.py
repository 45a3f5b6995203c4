"""rmsnorm.jax on several devices; jax_devices.py has the programs."""

import os
import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).with_name("jax_devices.py")


def test_programs_on_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    checks = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert result.stdout.split() == checks and len(checks) > 5
