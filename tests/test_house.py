"""The house rules: imports go downwards, files stay small, importing is light, nothing unfinished is shipped."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_loss
from fastvlm_loss.backends import cpp
from fastvlm_loss.losses import documented

ROOT = Path(__file__).parents[1]
# ground first; a floor imports only those below it
FLOORS = [
    {"kernels", "data", "_version"},
    {"scores"},
    {"backends", "distributed", "filters", "nested"},
    {"engine", "queue"},
    {"losses", "negatives"},
    {"gradcache", "heads", "modules", "testing", "multitask"},
    {"integrations", "demo"},
    {"trainer"},  # measures retrieval and draws sheets as the demo does
    {"__init__", "__main__"},
]
SOURCES = sorted([*ROOT.glob("fastvlm_loss/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def place(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def floor(name):
    found = [k for k, names in enumerate(FLOORS) if name in names]
    assert found, f"{name} stands on no floor of the house"
    return found[0]


def imported(path):
    """Places of the package that a file imports."""
    package = ["fastvlm_loss", *path.relative_to(ROOT).parts[:-1]]
    package = package if place(path) == "kernels" else package[1:]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = base + (node.module.split(".") if node.module else [])
            names = [full] if len(full) > 1 else [[*full, a.name] for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        else:
            continue
        for name in names:
            if name and name[0] == "fastvlm_loss" and len(name) > 1:
                yield name[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    here = place(path)
    public = {*fastvlm_loss.__all__, "testing"} - {"filters"}  # what anyone may take from the package itself
    for name in imported(path):
        if name != here and name not in public:
            assert floor(name) < floor(here), f"{path.name} ({here}) imports {name}, which is not below it"


FOLDERS = ("fastvlm_loss", "kernels", "csrc", "benchmarks", "examples", "tests", "tools")
CODE = sorted(p for d in FOLDERS for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".inc", ".cu"))


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400


LOSSES = sorted(p for p in (ROOT / "fastvlm_loss" / "losses").glob("*.py") if not p.stem.startswith("_"))
LIMIT = 80
# no loss, but one draw of pairs in three modes, which share their weights: halves of it would be no subjects
LONGER = {"itm_pairs.py": 105}


def lines_of_code(path):
    """Numbers of the lines that hold code, without those of docstrings and of oracles."""
    text = path.read_text()
    code = {k for k, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and "oracle" in node.name:
            code -= set(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.name)
def test_a_loss_is_a_small_file(path):
    """A public file of `losses/` has 20 to 80 lines of code.

    Imports, signature, checks, formula and registration count; docstrings, comments, blank lines and the oracle do not.
    """
    assert 20 <= len(lines_of_code(path)) <= LONGER.get(path.name, LIMIT)


def test_each_loss_has_a_file_of_its_own():
    homes = [spec.function.__module__ for spec in documented.values()]
    assert len(set(homes)) == len(homes)
    assert {home.rpartition(".")[2] for home in homes} <= {path.stem for path in LOSSES}


def test_backends_do_not_import_one_another():
    for path in (ROOT / "fastvlm_loss" / "backends").glob("*.py"):
        assert "backends" not in {name for name in imported(path)}
        assert not re.search(r"^from \.(?!\.)", path.read_text(), re.M)


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_import_is_light():
    heavy = ("torchvision", "open_clip", "transformers", "matplotlib", "PIL", "timm", "torch._dynamo", "sympy")
    run = python(f"import sys, fastvlm_loss; print([m for m in {heavy!r} if m in sys.modules])")
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_works_without_triton():
    run = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastvlm_loss\n"
        "from fastvlm_loss.kernels.lang import HAS_TRITON\n"
        "x = torch.randn(20, 8, requires_grad=True)\n"
        "with fastvlm_loss.backend('torch'):\n"
        "    fastvlm_loss.clip_loss(x, torch.randn(20, 8), 2.0, normalize=True).backward()\n"
        "print(HAS_TRITON, x.grad.isfinite().all().item())"
    )
    assert run.stdout.split() == ["False", "True"], run.stderr[-2000:]


def test_the_report_names_every_backend():
    run = subprocess.run([sys.executable, "-m", "fastvlm_loss"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0
    for word in ("fastvlm_loss 0", "torch", "threads", "backend cpp", "backend dense", "backend triton", "gpu"):
        assert word in run.stdout


@pytest.mark.skipif(os.environ.get("FASTVLM_LOSS_CPP") != "1", reason="the C++ library is optional unless insisted on")
def test_the_cpp_library_is_live_where_it_was_insisted_on():
    assert not cpp.unavailable()
