"""Fetch packages' archives with the npm client, and read files out of them without unpacking."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path


class FetchError(Exception):
    """The packages could not be fetched; the message is one clear sentence."""


def pack(packages: list[str], into: Path, timeout: float) -> list[Path]:
    """Download ``name@version`` archives into a folder, in that order, within ``timeout`` seconds in all.

    npm checks their integrity and runs no scripts. Raises FetchError where npm or the network is missing.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm, which fetches the emoji pictures, is not installed")
    into.mkdir(parents=True, exist_ok=True)
    command = [
        npm,
        "pack",
        "--json",
        "--ignore-scripts",
        "--fetch-retries=1",
        "--loglevel=error",
        f"--cache={into}/npm",
    ]
    try:
        done = subprocess.run(
            [*command, *packages], cwd=into, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"npm did not fetch the emoji pictures within {timeout:.0f} seconds") from None
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")
        raise FetchError(f"npm could not fetch the emoji pictures ({complaint.strip()[:120]})")
    try:
        report = json.loads(done.stdout)
        entries = report if isinstance(report, list) else list(report.values())  # npm 11 keys them by name
        # npm 8 reports a scoped package's file as @scope/name-version.tgz, but writes scope-name-version.tgz
        files = {entry["name"]: into / entry["filename"].removeprefix("@").replace("/", "-") for entry in entries}
        return [files[package.rpartition("@")[0]] for package in packages]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FetchError("npm gave an answer that could not be read") from None


def members(archive: Path, prefix: str, suffix: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield (name without directories, content) of the archive's files below ``package/<prefix>``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(f"package/{prefix}") and member.name.endswith(suffix):
                content = tar.extractfile(member)
                if content is not None:
                    yield member.name.rpartition("/")[2], content.read()
