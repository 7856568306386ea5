"""What a compiled Triton kernel is made of: registers, spills, instructions, how it multiplies and how it loads.

From the ptx, the machine code (`cuobjdump` and `nvdisasm` come with Triton) and the assembler's own log.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler.compiler import make_backend

from .devices import DEVICES

__all__ = ["Product", "Stats", "memo", "product", "stats"]

# what makes the figures; read now, because it may be edited meanwhile
_MAKERS = (Path(__file__), Path(__file__).with_name("devices.py"))
_MADE_BY = hashlib.sha256(b"".join(path.read_bytes() for path in _MAKERS)).hexdigest()

TENSOR_OPS = r"HGMMA|QGMMA|HMMA|IMMA|UTC\w*MMA"


@dataclass(frozen=True)
class Stats:
    """Counts of one compiled kernel.

    Attributes:
        registers: of a thread.
        spills: bytes a thread stores to and loads from local memory for want of registers.
        local: instructions that touch local memory, spills or not.
        products: "wgmma", "tcgen05", "mma.sync", "fma" or "" for a kernel without products.
        loads: how data reaches shared memory, "tma", "cp.async" or "ld" (through registers, nothing overlaps).
        stores: "tma" where results leave through a descriptor, else "st".
        loop: instructions of the main loop, the innermost that multiplies (0: unrolled altogether).
        outside: instructions elsewhere.
        exponentials: instructions of the special-function unit.
        barriers: of a block.
        warnings: the assembler's codes for asynchronous products made serial, for instance "C7515".
    """

    registers: int
    spills: int
    local: int
    products: str
    loads: str
    stores: str
    loop: int
    outside: int
    exponentials: int
    barriers: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """The largest tile product of a kernel: `[m, k] x [k, n]` of `dtype`, and what one costs an SM.

    Attributes:
        clocks: at the full rate of the tensor cores, or of the multiply-adds if it is not theirs.
        bytes_per_clock: the operands it needs from L2 to run at that rate.
    """

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    clocks: int
    bytes_per_clock: int


def stats(kernel: Any) -> Stats:
    """Count; a second time from a file beside Triton's cache."""
    key = f"{kernel.hash} {get_ptxas_version(kernel.metadata.target.arch)}"
    found = memo("stats", key, lambda: asdict(_count(kernel)))
    return Stats(**{**found, "warnings": tuple(found["warnings"])})


def product(kernel: Any) -> Product | None:
    """The largest product in the source, or None; `kernel` is a `CompiledKernel`."""
    products = []
    for line in kernel.asm["ttir"].splitlines():
        if found := re.search(r"tt\.dot .*: tensor<(\d+)x(\d+)x([a-z]+)(\d+)> \* tensor<\d+x(\d+)x", line):
            m, k, bits, n = (int(found[group]) for group in (1, 2, 4, 5))
            said = re.search(r"inputPrecision = (\w+)", line) if bits == 32 else None
            precision = said[1] if said else "ieee"
            clocks = 2 * m * n * k / _rate(kernel.metadata.target.arch, bits, precision)
            traffic = (m + n) * k * bits / 8 / clocks
            products.append(Product(m, n, k, found[3] + found[4], precision, round(clocks), round(traffic)))
    return max(products, key=lambda p: p.m * p.n * p.k, default=None)


def _rate(arch: int, bits: int, precision: str) -> float:
    """Operations a clock and SM: those of 16 bits are the tensor cores' measure, tf32 has half of it, ieee none."""
    device = DEVICES[arch]
    if bits == 32 and precision == "ieee":
        return device.fp32_rate
    repeats = re.search(r"x(\d)$", precision)  # "tf32x3" is three products
    return device.tensor_rate / (2 if "tf32" in precision else 1) / (int(repeats[1]) if repeats else 1)


def memo(kind: str, key: str, make: Callable[[], Any]) -> Any:
    """`make()` as JSON, kept under Triton's cache directory for this `key`, Triton and source of this file."""
    name = hashlib.sha256(f"{kind} {key} {triton.__version__} {_MADE_BY}".encode()).hexdigest()
    path = Path(knobs.cache.dir) / "kernel_report" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    made = json.dumps(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(made)
    draft.replace(path)
    return json.loads(made)


def _count(kernel: Any) -> Stats:
    ptx, code = kernel.asm["ptx"], kernel.asm["cubin"]
    registers, instructions, labels = _disassembled(code)
    log = _assembler_log(kernel)
    loop = _main_loop(instructions, labels)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, name)) for name, _ in instructions)

    if "tcgen05.mma" in ptx:
        products = "tcgen05"
    elif "wgmma.mma_async" in ptx:
        products = "wgmma"
    elif "mma.sync" in ptx:
        products = "mma.sync"
    else:
        products = "fma" if "tt.dot " in kernel.asm["ttir"] else ""
    return Stats(
        registers=registers,
        spills=sum(map(int, spilled.groups())) if spilled else 0,
        local=count("STL|LDL"),
        products=products,
        loads="tma" if count("UTMALDG") else "cp.async" if count("LDGSTS") else "ld",
        stores="tma" if count("UTMASTG|UTMAREDG") else "st",
        loop=loop,
        outside=len(instructions) - loop,
        exponentials=count("MUFU"),
        barriers=count("BAR"),
        warnings=tuple(sorted(set(re.findall(r"\((C75\d\d)\)[^\n]*serialized", log)))),
    )


def _assembler_log(kernel: Any) -> str:
    """What ptxas -v said: Triton's own last step once more, so with the same flags."""
    target = kernel.metadata.target
    backend = make_backend(target)
    options = backend.parse_options(kernel.metadata._asdict())
    with knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, target.arch)
    return log.getvalue()


def _disassembled(cubin: bytes) -> tuple[int, list[tuple[str, str]], dict[str, int]]:
    """Registers, instructions as (name, operands), and the place of every label."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    instructions: list[tuple[str, str]] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            instructions.append((found[1], found[2]))
    while instructions and instructions[-1][0].startswith(("NOP", "BRA")):  # padding
        instructions.pop()
    return int(registers[1]) if registers else 0, instructions, labels


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _main_loop(instructions: list[tuple[str, str]], labels: dict[str, int]) -> int:
    """Length of the innermost loop with most of the products, or without tensor cores of the multiply-adds."""
    names = [name for name, _ in instructions]
    wanted = TENSOR_OPS if any(re.match(TENSOR_OPS, name) for name in names) else "FFMA"
    places = [place for place, name in enumerate(names) if re.match(wanted, name)]
    loops = {}
    for end, (name, operands) in enumerate(instructions):
        target = re.search(r"\.L_\w+", operands) if name.startswith("BRA") else None
        start = labels.get(target[0], end + 1) if target else end + 1
        inside = sum(start <= place <= end for place in places)
        if inside:
            loops[start, end] = inside
    # what waits for a barrier sits out of line and looks like a longer loop around the real one
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(innermost, key=lambda loop: loops[loop], default=(0, -1))
    return end - start + 1
