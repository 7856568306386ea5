"""`python -m benchmarks.negatives`: hard negatives in a stream against the dense ways, and against the usual loop.

Each contestant picks negatives for all images and all texts; all take their turns in one run. Extra memory is the peak
beyond inputs and results, of one call in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastvlm_loss.kernels import configs
from torch import Tensor

from fastvlm_loss import BatchNegatives, clip_loss, hard_negatives
from fastvlm_loss.backends import triton

from . import store
from .machine import hardware, versions
from .measure import interleaved
from .memory import ALLOCATOR, ROOT, extra
from .tables import SHORT, amount, duration, table

__all__ = ["CONTESTANTS", "RESULTS", "SIZES", "block", "main", "markdown", "measure", "targets"]

RESULTS = store.RESULTS / "negatives"
SCALE = 1 / 0.07
OURS, DRAWN, PRODUCT, DENSE, GUMBEL, LOOP = (
    "fastvlm_loss, the largest", "fastvlm_loss, drawn", "*one product*", "dense top-k", "dense Gumbel top-k",
    "usual loop",
)  # fmt: skip
ALONE, FUSED, APART = "clip_loss alone", "clip_loss with negatives", "clip_loss, then negatives"
TWICE = "clip_loss with negatives, in two passes"  # where the table of tiles says one: which is faster on this GPU?


@dataclass(frozen=True)
class Size:
    """A batch of n pairs of d dimensions, and negatives of each."""

    n: int
    d: int
    k: int

    def said(self) -> str:
        """For people."""
        return f"N = {self.n}, D = {self.d}, k = {self.k}"


SIZES = {"cpu": (Size(8192, 512, 8), Size(1024, 512, 1)), "cuda": (Size(32768, 768, 8), Size(1024, 768, 1))}
Call = Callable[[Tensor, Tensor, int], object]


def _masked(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).fill_diagonal_(-math.inf)


def _dense(x: Tensor, y: Tensor, k: int) -> object:
    scores = _masked(x, y)
    return scores.topk(k, 1), scores.topk(k, 0)


def _gumbel(x: Tensor, y: Tensor, k: int) -> object:
    scores, found = _masked(x, y).float().mul_(SCALE), []
    for axis in (1, 0):
        noise = torch.empty_like(scores).exponential_().log_()  # minus a Gumbel number
        found.append((scores - noise).topk(k, axis))
    return found


def _loop(x: Tensor, y: Tensor, k: int) -> object:
    """ALBEF's and BLIP's: softmax, floor, zeros on the diagonal, and one `multinomial(...).item()` a row."""
    scores, found = (x @ y.T).float() * SCALE, []
    for s in (scores, scores.T):
        weights = (s.softmax(1) + 1e-4).fill_diagonal_(0)
        found.append([torch.multinomial(weights[b], k).tolist() for b in range(len(weights))])
    return found


def _beside(x: Tensor, y: Tensor, k: int) -> object:
    negatives = BatchNegatives(k, seed=0, step=0)
    clip_loss(x, y, SCALE, negatives=negatives)
    return negatives.found


def _twice(x: Tensor, y: Tensor, k: int) -> object:
    with configs.use("fused", None):
        return _beside(x, y, k)


CONTESTANTS: dict[str, Call] = {
    PRODUCT: lambda x, y, k: x @ y.T,
    OURS: lambda x, y, k: hard_negatives(x, y, k, hardness=math.inf),
    DRAWN: lambda x, y, k: hard_negatives(x, y, k, seed=0, step=0),
    DENSE: _dense,
    GUMBEL: _gumbel,
    LOOP: _loop,
    ALONE: lambda x, y, k: clip_loss(x, y, SCALE),
    FUSED: _beside,
    TWICE: _twice,
    APART: lambda x, y, k: (clip_loss(x, y, SCALE), hard_negatives(x, y, k, seed=0, step=0)),
}


def features(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Unit image and text features; a text lies near its image."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(size.n, size.d, device=device, generator=generator)
    y = x + 2 * torch.randn(size.n, size.d, device=device, generator=generator)
    return F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype)


def takes_part(who: str, size: Size, device: str) -> bool:
    """The loop is for the batches it was written for, and only the Triton backend has the choice of two passes."""
    if who == TWICE:
        return torch.device(device).type == "cuda" and not triton.unavailable()
    return who != LOOP or size.n <= 1024


def measure(size: Size, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row a contestant; every call is interleaved with the others."""
    x, y = features(size, dtype, device)
    calls = {who: _bound(call, x, y, size.k) for who, call in CONTESTANTS.items() if takes_part(who, size, device)}
    with torch.no_grad():
        timings = interleaved(calls, rounds, device)
    kind = str(dtype).removeprefix("torch.")
    rows = []
    for who, timing in timings.items():
        found = _peak(who, size, kind, device)
        rows.append({"contestant": who, **asdict(size), "dtype": kind, **asdict(timing), "extra": found})
    return rows


def _bound(call: Call, x: Tensor, y: Tensor, k: int) -> Callable[[], object]:
    return lambda: call(x, y, k)


def _peak(who: str, size: Size, dtype: str, device: str) -> int | None:
    asked = {"who": who, "size": asdict(size), "dtype": dtype, "device": device, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.negatives", "--child", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ALLOCATOR})
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


@torch.no_grad()
def _child(who: str, size: Mapping[str, int], dtype: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    call, kind = CONTESTANTS[who], getattr(torch, dtype)
    call(*features(Size(64, 64, 1), kind, device), 1)
    x, y = features(Size(**size), kind, device)

    def one() -> tuple[Tensor, ...]:
        call(x, y, size["k"])
        return ()

    return extra(one, device)[1]


def targets(rows: list[dict[str, Any]], device: str) -> list[str]:
    """What the project asks of itself, met or missed, one size and dtype."""

    def of(who: str, field: str = "median") -> float | None:
        return next((r[field] for r in rows if r["contestant"] == who), None)

    n, found = rows[0]["n"], []
    asked: list[tuple[str, float | None, float | None, float]] = []
    if n > 1024:
        asked.append(("time of the largest over dense top-k", of(OURS), of(DENSE), 0.5))
        if device == "cpu":
            asked.append(("extra MB of the largest", of(OURS, "extra"), 1e6, 64))
        else:
            asked.append(("time of the largest over one product", of(OURS), of(PRODUCT), 1.5))
        asked.append(("time of drawing over dense Gumbel top-k", of(DRAWN), of(GUMBEL), 0.5))
    else:
        asked.append(("time of drawing over the usual loop", of(DRAWN), of(LOOP), 0.2))
    if device != "cpu":
        asked.append(("time of a loss with negatives over its two passes", of(FUSED), of(TWICE), 1.0))
    for what, ours, theirs, most in asked:
        if ours is None or theirs is None:
            found.append(f"not measured: {what}")
            continue
        value = ours / theirs
        found.append(f"{'met' if value <= most else 'MISSED':6} {what}, N = {n}: {value:.3g}, wanted at most {most:g}")
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    parts = []
    for rows in result["sizes"]:
        size, dtype = Size(*(rows[0][f] for f in ("n", "d", "k"))), SHORT[rows[0]["dtype"]]
        ours = next(r for r in rows if r["contestant"] == OURS)
        lines = []
        for r in rows:
            name = f"**{r['contestant']}**" if r["contestant"] in (OURS, DRAWN, FUSED) else r["contestant"]
            ratio = f"{r['median'] / ours['median']:.2f}"
            lines.append([name, duration(r["median"]), ratio, "" if r["extra"] is None else amount(r["extra"])])
        head = ["", dtype, f"× {OURS}", "extra memory"]
        parts.append(f"Negatives of all images and all texts, {size.said()}:\n\n{table(head, lines)}")
    hard, soft = result["hardware"], {k: v for k, v in result["versions"].items() if v}
    where = hard.get("gpu") or f"{hard['cpu']}, {hard['cores']} cores, {hard['instruction_set'] or 'no C++ backend'}"
    parts.append(
        f"Medians of {result['sizes'][0][0]['repeats']} interleaved calls, all in one run of "
        f"`python -m benchmarks.negatives`, no gradient. {where}; {', '.join(f'{k} {v}' for k, v in soft.items())}; "
        f"{result['date']}."
    )
    return "\n\n".join(parts)


def block() -> str:
    """What stands in the README: every saved result."""
    return "\n\n".join(markdown(store.load(path)) for path in sorted(RESULTS.glob("*.json")))


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and save with `--output`."""
    parser = argparse.ArgumentParser("python -m benchmarks.negatives", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a check that everything runs")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved calls (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to save the JSON and its table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        print(_child(**json.loads(asked.child)))
        return 0
    kind = torch.device(asked.device).type
    sizes = (Size(256, 64, 4),) if asked.quick else SIZES[kind]
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(), "hardware": hardware(asked.device),
        "versions": versions(), "sizes": [measure(size, dtype, asked.device, asked.rounds) for size in sizes],
    }  # fmt: skip
    print(markdown(result))
    for rows in result["sizes"]:
        print("\n" + "\n".join(targets(rows, kind)))
    if asked.output:
        store.publish(result, asked.output, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
