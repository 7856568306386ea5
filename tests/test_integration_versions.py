"""An unsupported version of a package is one clear sentence."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_loss.integrations import _versions

ROOT = Path(__file__).parents[1]


def test_the_extra_asks_for_the_versions_that_the_guard_lets_through():
    extra = re.search(r"^integrations = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    asked = {name: (low, end) for name, low, end in re.findall(r'"([\w-]+)>=([\d.]+),<([\d.]+)"', extra)}
    assert asked == _versions.SUPPORTED


@pytest.mark.parametrize("package", _versions.SUPPORTED)
def test_the_installed_version_is_let_through(package):
    _versions.require(package)


@pytest.mark.parametrize(("found", "good"), [("6.1.9", False), ("6.2.0", True), ("6.2.1.dev0", True), ("6.10", False)])
def test_other_versions_are_refused_by_name(monkeypatch, found, good):
    monkeypatch.setattr(_versions, "version", lambda name: found)
    if good:
        return _versions.require("sentence-transformers")
    with pytest.raises(ImportError, match=rf"sentence-transformers: got version {found}, wanted .* >= 6.2, < 6.3"):
        _versions.require("sentence-transformers")


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_versions, "version", missing)
    with pytest.raises(ImportError, match=r"lightly: not installed, wanted lightly >= 1.6, < 1.7 \(pip install"):
        _versions.require("lightly")


def test_the_library_itself_imports_none_of_them():
    packages = "open_clip transformers sentence_transformers pytorch_metric_learning lightly"
    asked = f"'{packages} fastvlm_loss.integrations'.split()"
    code = f"import sys, fastvlm_loss; print([m for m in {asked} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
