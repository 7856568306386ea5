"""A wheel holds everything and works without a compiler; a compiler that fails warns and leaves a working package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = (
    "import fastvlm_loss, torch; from fastvlm_loss.engine.dispatch import report\n"
    "x = torch.randn(30, 8, requires_grad=True)\n"
    "fastvlm_loss.clip_loss(x, torch.randn(30, 8), 2.0, normalize=True).backward()\n"
    "assert x.grad.isfinite().all()\n"
    "print(fastvlm_loss.__file__); print(report()['cpp'])"
)


@pytest.fixture
def tree(tmp_path):
    """The sources alone, so that nothing built here before takes part."""
    for name in ("fastvlm_loss", "kernels", "csrc", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "src" / name)
    return tmp_path


def wheel(tree, **environment):
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", "dist", tree / "src"],
        env={**os.environ, "FASTVLM_LOSS_CPP": "auto", **environment}, cwd=tree,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return run, next((tree / "dist").glob("*.whl"), None)


def installed(tree, path):
    """Import from the unpacked wheel, away from the sources."""
    zipfile.ZipFile(path).extractall(tree / "site")
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env={**os.environ, "PYTHONPATH": str(tree / "site")}, cwd=tree,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    where, cpp = run.stdout.splitlines()
    assert where.startswith(str(tree / "site"))
    return cpp


def test_a_wheel_without_cpp_is_whole_and_works(tree):
    run, path = wheel(tree, FASTVLM_LOSS_CPP="0")
    assert path is not None and path.name.endswith("py3-none-any.whl"), run.stdout[-2000:]
    names = zipfile.ZipFile(path).namelist()
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("fastvlm_loss/**/*.py")}
    sources |= {"fastvlm_loss/" + str(p.relative_to(ROOT)) for p in ROOT.glob("kernels/**/*.py")}
    assert sources | {"fastvlm_loss/py.typed"} <= set(names)
    entries = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"fastvlm-train = fastvlm_loss.trainer.__main__:main" in zipfile.ZipFile(path).read(entries)
    assert installed(tree, path).startswith("not live: the C++ library was not built")


def test_a_broken_compiler_warns_and_leaves_a_working_package(tree):
    run, path = wheel(tree, CXX="/bin/false", CC="/bin/false")
    assert path is not None, run.stdout[-2000:]
    assert "built without its C++ library" in run.stdout + run.stderr
    assert installed(tree, path).startswith("not live")
    run, path = wheel(tree, CXX="/bin/false", CC="/bin/false", FASTVLM_LOSS_CPP="1")
    assert run.returncode != 0


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_wheel_with_cpp_serves_every_python(tree):
    run, path = wheel(tree, FASTVLM_LOSS_CPP="1")
    assert path is not None and "-cp310-abi3-" in path.name, run.stdout[-2000:]
    assert installed(tree, path).startswith("live: CPU")


def test_an_sdist_made_without_torch_holds_the_cpp_sources_and_the_configurations(tree):
    shutil.copy(ROOT / "MANIFEST.in", tree / "src")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=tree / "src", env={**os.environ, "FASTVLM_LOSS_CPP": "0"},
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with tarfile.open(next((tree / "src" / "dist").glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    for path in (*ROOT.glob("csrc/*"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("configs/*")):
        assert any(name.endswith("/" + str(path.relative_to(ROOT))) for name in names), path


def test_an_unknown_setting_is_named(tree):
    run, _ = wheel(tree, FASTVLM_LOSS_CPP="yes")
    assert run.returncode != 0 and "FASTVLM_LOSS_CPP: got 'yes', wanted auto, 0 or 1" in run.stdout + run.stderr


def test_a_bare_checkout_works_uninstalled(tree):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = f"import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n{CHECK}"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tree / "src", capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith(str(tree / "src"))
