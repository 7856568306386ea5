"""The kernel report: every kernel as each GPU would run it, compiled ahead of time without one.

    python -m tools.kernel_report [--arch 80,90,100] [-k REGEX] [--gate] [--json FILE] [--markdown FILE]
                                  [--tile gradient=128,128,64,64,8,3]

The calls of `kernel_cases.py` run dry (`dryrun.py`), and every distinct kernel they launch is one row: registers,
spills, shared memory, how it multiplies and loads, and how many blocks an SM holds. `--gate` fails on what costs speed
without changing results: spills, serialised products, a lost TMA or cp.async path, too much shared memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from fastvlm_loss.kernels.configs import Tile, use

from .devices import DEVICES
from .dryrun import Launch, dry_run
from .forked import forked
from .kernel_cases import Case, shipped
from .kernel_stats import memo, product, stats

__all__ = ["examine", "faults", "main", "report", "table"]

ROOT = Path(__file__).parents[1]
START, END = "<!-- report:start -->", "<!-- report:end -->"

Row = dict[str, Any]


def examine(case: Case, arch: int) -> list[Row]:
    """The rows of one call on one architecture, one a kernel."""
    # on one multiprocessor, so that a program has several tiles to walk over, as it has in a large batch
    with dry_run(arch, multiprocessors=1) as launches:
        failure = ""
        try:
            case.call()
        except triton.runtime.errors.OutOfResources as error:
            failure = str(error).split(". Reducing")[0]
    rows = [_row(case, launch) for launch in {launch.kernel.hash: launch for launch in launches}.values()]
    return rows + ([_failure(case, arch, failure)] if failure else [])


def report(
    cases: Iterable[Case], archs: Sequence[int] = tuple(DEVICES), workers: int = 2, remember: bool = False
) -> list[Row]:
    """The rows of every call on every architecture in order, a kernel that several calls share only once.

    With `remember`, a call by a name seen before is taken from a file as long as no source has changed.
    """
    jobs = [(case, arch) for case in cases for arch in archs if arch in case.archs]
    made: dict[tuple[str, int], list[Row]] = {}
    for (case, arch), rows, error in forked(_remembered if remember else _examined, jobs, workers):
        made[case.name, arch] = rows = [_failure(case, arch, error)] if rows is None else rows
        found = "; ".join(fault for row in rows for fault in row["faults"]) or "good"
        print(f"{len(made)}/{len(jobs)} sm_{arch} {case.name}: {found}", file=sys.stderr, flush=True)
    unique: dict[Any, Row] = {}
    for case, arch in jobs:
        for row in made[case.name, arch]:
            unique.setdefault((row["hash"] or case.name, arch, *row["faults"]), row)["cases"].append(case.name)
    return list(unique.values())


def faults(row: Row, case: Case) -> list[str]:
    """What the gate holds against a row."""
    device, found = DEVICES[row["arch"]], []
    if row["spills"] or row["local"]:
        found.append(f"spills: {row['spills']} bytes, {row['local']} instructions")
    found += [f"serialised products: {code}" for code in row["warnings"]]
    if row["products"]:
        wanted = case.products or device.products
        if row["products"] != wanted:
            found.append(f"products: {row['products']}, wanted {wanted}")
        wanted = case.loads or device.loads
        if row["loads"] != wanted:
            found.append(f"loads: {row['loads']}, wanted {wanted}")
    if row["shared"] > device.shared_per_block:
        found.append(f"shared memory: {row['shared']} bytes, wanted at most {device.shared_per_block}")
    return found


def _examined(job: tuple[Case, int]) -> list[Row]:
    return examine(*job)


def _remembered(job: tuple[Case, int]) -> list[Row]:
    # after a change the calls are made again, and Triton's own cache serves the kernels that are still the same
    case, arch = job
    rows: list[Row] = memo(
        "case", f"{_SOURCES} {case} {arch} {torch.__version__} {triton.__version__}", lambda: examine(case, arch)
    )
    return rows


def _sources() -> str:
    patterns = "kernels/**/*.py", "fastvlm_loss/**/*.py", "tools/dryrun.py", "tools/kernel_*.py"
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


_SOURCES = _sources()  # now, because they may be edited while the report runs


def _row(case: Case, launch: Launch) -> Row:
    kernel, metadata, device = launch.kernel, launch.kernel.metadata, DEVICES[launch.arch]
    counted, tile = stats(kernel), product(kernel)
    columns = getattr(metadata, "tmem_size", None) or 0
    row = {
        "cases": [],
        "kernel": launch.name,
        "arch": launch.arch,
        "constants": {name: str(value) for name, value in launch.constants.items()},
        "signature": {name: str(kind) for name, kind in launch.signature.items()},
        "product": asdict(tile) if tile else None,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        **asdict(counted),
        "shared": metadata.shared,
        "tensor_memory": columns,
        "blocks_per_sm": device.resident_blocks(metadata.num_warps, counted.registers, metadata.shared, columns),
        "hash": kernel.hash,
    }
    return {**row, "faults": faults(row, case)}


def _failure(case: Case, arch: int, error: str) -> Row:
    return {"cases": [], "kernel": "", "arch": arch, "hash": "", "faults": [error]}


# heading and cell of each column of a table
COLUMNS: dict[str, Callable[[Row], object]] = {
    "call": lambda row: row["cases"][0] + (f" (+{len(row['cases']) - 1})" if row["cases"][1:] else ""),
    "kernel": lambda row: row["kernel"],
    "sm": lambda row: row["arch"],
    "tile": lambda row: "{m}x{n}x{k} {dtype}".format(**row["product"]) if row["product"] else "",
    "warps": lambda row: row["warps"],
    "stages": lambda row: row["stages"],
    "products": lambda row: row["products"],
    "loads": lambda row: row["loads"],
    "regs": lambda row: row["registers"],
    "spills": lambda row: row["spills"],
    "KiB": lambda row: row["shared"] // 1024,
    "blocks/SM": lambda row: row["blocks_per_sm"],
    "loop": lambda row: row["loop"],
    "outside": lambda row: row["outside"],
    "exp": lambda row: row["exponentials"],
    "bar": lambda row: row["barriers"],
    "L2 B/clk": lambda row: row["product"]["bytes_per_clock"] if row["product"] else "",
    "faults": lambda row: "; ".join(row["faults"]),
}


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """The rows as text in columns, or as a table of a Markdown page."""
    compiled = COLUMNS.keys() - {"call", "kernel", "sm", "faults"}  # what a call that did not compile lacks
    lines = [list(COLUMNS)]
    for row in rows:
        lines.append(["" if name in compiled and not row["hash"] else str(cell(row)) for name, cell in COLUMNS.items()])
    if markdown:
        lines.insert(1, ["---"] * len(COLUMNS))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    widths = [max(len(line[k]) for line in lines) for k in range(len(COLUMNS))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """The command line; returns the exit status. `cases` instead of those that ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default=",".join(map(str, DEVICES)), help="compute capabilities, for instance 80,90")
    parser.add_argument("-k", default="", metavar="REGEX", help="only the calls whose name matches")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if anything is wrong with any kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument(
        "--tile",
        action="append",
        default=[],
        metavar="KERNEL=SIZES",
        help=f"instead of the table's: {', '.join(Tile._fields)}",
    )
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table between the marks of a Markdown page")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    asked = parser.parse_args(arguments)
    started = time.monotonic()
    chosen = [case for case in (shipped() if cases is None else cases) if re.search(asked.k, case.name)]
    with ExitStack() as tiles:
        for kernel, sizes in (tile.split("=") for tile in asked.tile):
            tiles.enter_context(use(kernel, Tile(*map(int, sizes.split(",")))))
        remember = cases is None and not asked.tile
        rows = report(chosen, [int(arch) for arch in asked.arch.split(",")], asked.workers, remember)
    print(table(rows))
    wrong = [row for row in rows if row["faults"]]
    print(
        f"\n{len(rows)} kernels of {len(chosen)} calls, {len(wrong)} with faults; Triton {triton.__version__},"
        f" {time.monotonic() - started:.0f} s"
    )
    if asked.json:
        found = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.markdown:
        asked.markdown.write_text(table(rows, markdown=True))
    if asked.docs:
        before, rest = asked.docs.read_text().split(START)
        asked.docs.write_text(f"{before}{START}\n{table(rows, markdown=True)}{END}{rest.split(END)[1]}")
    return int(asked.gate and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
