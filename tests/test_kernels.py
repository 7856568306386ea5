"""The kernels without a GPU: Triton's interpreter runs them (own processes: it is chosen at import).

The processes start together, so that the second core works too; each test waits for its own and shows its report.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PARTS = {
    "launches": [*sorted(TESTS.glob("interpreted_*.py")), TESTS / "test_gpu_negatives.py"],
    "numerics": [TESTS / "test_gpu.py"],
}


@pytest.fixture(scope="module")
def processes():
    """A pytest process for each part, all under way."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTVLM_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    started = {
        part: subprocess.Popen(
            [sys.executable, "-m", "pytest", "--durations=5", *map(str, files)],
            env=environment, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for part, files in PARTS.items()
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(processes, part):
    report, _ = processes[part].communicate(timeout=1500)
    assert processes[part].returncode == 0, report[-6000:]
