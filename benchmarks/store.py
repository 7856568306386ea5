"""Saved results: JSON, and beside it the table and the plots drawn from it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "load", "publish", "render", "save", "slug"]

RESULTS = Path(__file__).parent / "results"


def slug(name: str) -> str:
    """What a result on this machine is called: `nvidia-h200` for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(result: dict[str, Any], path: Path) -> None:
    """JSON with one measurement a line, so that a diff can be read."""
    path.write_text(_json(result) + "\n")


def publish(result: dict[str, Any], path: Path, page: str) -> None:
    """JSON, and its table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(result, path)
    path.with_suffix(".md").write_text(page + "\n")


def load(path: Path) -> dict[str, Any]:
    """A saved result; its name is that of the file."""
    return {**json.loads(path.read_text()), "name": path.stem}


def render(path: Path) -> None:
    """Table and plots of a saved result, beside it."""
    from .report import markdown  # here: saving and loading need nothing beyond Python

    result = load(path)
    path.with_suffix(".md").write_text(markdown(result) + "\n")
    try:
        from .plots import draw

        draw(result, path.parent)
    except ImportError as error:
        print(f"No plots: {error}", file=sys.stderr)


def _json(value: Any, indent: int = 0) -> str:
    """Objects one key a line, lists one element a line, whatever is inside them on that line."""
    pad = "\n" + " " * (indent + 1)
    if isinstance(value, dict) and indent < 3:
        inner = [f"{json.dumps(k)}: {_json(v, indent + 1)}" for k, v in value.items()]
        return "{" + ",".join(pad + i for i in inner) + pad[:-1] + "}" if inner else "{}"
    if isinstance(value, list):
        return "[" + ",".join(pad + json.dumps(v) for v in value) + pad[:-1] + "]" if value else "[]"
    return json.dumps(value)
