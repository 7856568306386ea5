"""docs/adding_a_loss.md, followed to the letter in a copy of the package: one file and one import make a loss."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "adding_a_loss.md").read_text()
FILE, IMPORT = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
NAME = "squared_clip_loss"
PART = "(variants or not_square) and (-7- or -129-)"
SEEN = f"""
import sys
import torch
import fastvlm_loss
assert fastvlm_loss.__file__.startswith(sys.argv[1]), fastvlm_loss.__file__
from fastvlm_loss.losses import registry, {NAME}
from fastvlm_loss.modules import LossModule
from benchmarks.baselines import DENSE, OURS, makers
from docs import page

spec = registry["{NAME}"]
assert spec.function is {NAME}
assert f"[`{NAME}`](#{NAME})" in page.table()
assert "## {NAME}\\n" in page.losses()
assert makers(spec)[OURS]() is {NAME} and DENSE in makers(spec)


class SquaredCLIPLoss(LossModule):
    function = staticmethod({NAME})


x = torch.eye(3, 4).double()
x = x, x.clone()
module = SquaredCLIPLoss(curvature=0.5, directions="image")
torch.testing.assert_close(module(*x, 10.0), {NAME}(*x, 10.0, curvature=0.5, directions="image"))
try:
    {NAME}(*x, 10.0, curvature=-1.0)
except ValueError as error:
    assert str(error) == "curvature: got -1.0, wanted a finite number >= 0", error
else:
    raise AssertionError("curvature was not checked")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package, its benchmark, docs and matrix in a folder of their own, with the page's file and import."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("fastvlm_loss", "kernels", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/test_matrix.py"):
        shutil.copy(ROOT / name, folder / name)
    losses = folder / "fastvlm_loss" / "losses"
    (losses / "squared.py").write_text(FILE)
    with (losses / "__init__.py").open("a") as file:
        file.write(IMPORT)
    return folder


def run(folder, *arguments):
    # the copy comes first, whatever is installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )


def test_the_matrix_picks_it_up(copy):
    done = run(copy, "-m", "pytest", "tests/test_matrix.py", "-k", f"{NAME} and {PART}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 16, done.stdout  # 4 dtypes in 4 sizes, the torch backend alone


def test_registry_docs_and_benchmark_have_it(copy):
    done = run(copy, "-c", SEEN, str(copy))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_the_package_itself_is_as_before():
    from fastvlm_loss.losses import registry

    assert NAME not in registry and NAME not in (ROOT / "docs" / "losses.md").read_text()
