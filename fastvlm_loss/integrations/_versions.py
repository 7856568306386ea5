"""Which versions of other packages an integration is known to work with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

__all__ = ["SUPPORTED", "require"]

# from the first, below the second; the extra `integrations` asks for the same
SUPPORTED = {
    "open_clip_torch": ("3.3", "4.3"),
    "transformers": ("5.23", "5.24"),
    "sentence-transformers": ("6.2", "6.3"),
    "pytorch-metric-learning": ("2.9", "2.10"),
    "lightly": ("1.6", "1.7"),
}


def require(package: str) -> None:
    """Raise one sentence if a package is missing, or of a version that its integration was not made for.

    Raises:
        ImportError: the package, the version found, and those that work.
    """
    first, end = SUPPORTED[package]
    wanted = f"wanted {package} >= {first}, < {end} (pip install 'fastvlm-loss[integrations]')"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package}: not installed, {wanted}") from None
    if not _numbers(first) <= _numbers(found) < _numbers(end):
        raise ImportError(f"{package}: got version {found}, {wanted}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
