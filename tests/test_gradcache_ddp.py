"""The cached step in two processes: one reduction a step, and the gradients of the mean over ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gradcache_ddp
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without it")
SCRIPT = Path(gradcache_ddp.__file__)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What is wrong with each case on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)], env=environment, **pipes)
        for rank in range(gradcache_ddp.WORLD)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(printed)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(gradcache_ddp.WORLD)]


@pytest.mark.parametrize("case", gradcache_ddp.CASES, ids=lambda case: case.__name__)
def test_two_processes(ranks, case):
    for wrong in ranks:
        assert wrong.get(case.__name__, "not reached") == ""
