"""The kernels' tile functions in Triton's interpreter (own process: it is chosen at import)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_softmax_in_the_interpreter_equals_pytorch():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted_softmax.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.strip() == "equal", run.stderr[-3000:]
