"""Tuning on a GPU: time the candidate tiles of a kernel, print the row that the tile table should have.

    python -m tools.tune [--kernel forward gradient] [--loss clip_loss] [--n 32768] [--d 768] [--dtype bfloat16]

Opt-in and by hand: nothing is tuned at run time. Every candidate is judged by the whole operator (launches and products
included), interleaved with the others; one whose result differs from the table's is thrown out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from fastvlm_loss.kernels import configs
from torch import Tensor

import fastvlm_loss
from benchmarks.measure import interleaved
from fastvlm_loss.backends import triton as gpu
from fastvlm_loss.losses import registry
from fastvlm_loss.testing import Case, evaluate, inputs

__all__ = ["best", "candidates", "main", "row"]

KERNELS = ("forward", "gradient")


def candidates(half: bool) -> list[configs.Tile]:
    """Tiles worth a try: sizes, warps and stages whose shared memory fits a Hopper block."""
    depth, size = (64, 2) if half else (32, 4)
    found = []
    for (rows, cols), warps, stages, piece in product(
        ((128, 256), (128, 128), (64, 256), (256, 128), (128, 64), (64, 128)), (4, 8), (3, 4), (32, 64)
    ):
        tile = configs.Tile(rows, cols, depth, piece, warps, stages)
        if (rows + cols) * depth * size * stages <= 200 * 1024 and rows * cols <= 4096 * warps:
            found.append(tile)
    return found


def best(
    kernel: str, call: Callable[[], Mapping[str, Tensor]], tiles: Sequence[configs.Tile], repeats: int, device: str
) -> list[tuple[float, configs.Tile | None]]:
    """Median seconds of every tile that works and agrees with the table's (which is None), the fastest first."""
    wanted = call()
    calls: dict[configs.Tile | None, Callable[[], object]] = {None: call}
    for tile in tiles:
        with configs.use(kernel, tile):
            try:
                got = call()
            except RuntimeError as error:  # out of shared memory or registers: the compiler's word, not ours
                print(f"{tuple(tile)}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
        if all(torch.allclose(got[k].double(), v.double(), rtol=1e-2, atol=1e-4) for k, v in wanted.items()):
            calls[tile] = partial(_with, kernel, tile, call)
        else:
            print(f"{tuple(tile)}: another result than the table's tile", file=sys.stderr)
    names = {str(tile): tile for tile in calls}
    timings = interleaved({str(tile): run for tile, run in calls.items()}, repeats, device)
    return sorted(((t.median, names[name]) for name, t in timings.items()), key=lambda found: found[0])


def row(kernel: str, arch: int, precision: str, d: int, kind: str, found: tuple[float, configs.Tile], n: int) -> str:
    """The line to put into `kernels/configs.py`."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}"
    key = f'("{kernel}", {arch}, "{precision}", {1 << (d - 1).bit_length()}, "{kind}")'
    return f"    {key}: Tile{tuple(found[1])},  # {found[0] * 1e3:.2f} ms at {n} x {d}, {where}, {versions}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 without a GPU."""
    parser = argparse.ArgumentParser("python -m tools.tune", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--loss", choices=tuple(registry), default="clip_loss")
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    asked = parser.parse_args(arguments)
    if gpu.unavailable():
        print(f"tuning needs a GPU: {gpu.unavailable()}", file=sys.stderr)
        return 2
    dtype, device = getattr(torch, asked.dtype), "cpu" if not torch.cuda.is_available() else "cuda"
    bias = -10.0 if asked.loss == "siglip_loss" else None
    tensors, _ = inputs(Case(asked.n, asked.d, dtype=dtype, device=device, bias=bias))
    arch, _ = gpu.device()
    precision = gpu.precision(dtype)
    kind = "sweep" if asked.loss == "siglip_loss" else "plain"
    with fastvlm_loss.backend("triton"):
        call = partial(evaluate, registry[asked.loss].function, tensors, {})
        for kernel in asked.kernel if kind == "plain" else ("gradient",):
            found = best(kernel, call, candidates(dtype.itemsize == 2), asked.repeats, device)
            for seconds, tile in found[:10]:
                print(f"{seconds * 1e3:9.3f} ms  {'the table' if tile is None else tuple(tile)}")
            fastest = next(((s, t) for s, t in found if t is not None), None)
            if found[0][1] is None or fastest is None:
                print(f"{kernel}: the table's tile is the fastest")
            else:
                print(row(kernel, arch, precision, asked.d, kind, fastest, asked.n))
    return 0


def _with(kernel: str, tile: configs.Tile, call: Callable[[], object]) -> object:
    with configs.use(kernel, tile):
        return call()


if __name__ == "__main__":
    raise SystemExit(main())
