"""A dry run: the real launch wrappers on CPU tensors under a fake CUDA driver.

    with dry_run(90) as launches:
        triton_backend.statistics(problem, statistic)
    print(launches[0].name, launches[0].grid, launches[0].kernel.metadata.shared)

Every Triton launch is specialised (divisibility, == 1, constexprs, host descriptors) and compiled exactly as on that
GPU, checked against its limits, recorded, and not executed: outputs hold whatever was in memory. Needs no CUDA at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from .devices import DEVICES

__all__ = ["Launch", "dry_run"]

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One launch that a GPU of compute capability `arch` would have made.

    Attributes:
        arch: 80, 90 or 100.
        grid: blocks along x, y and z.
        kernel: Triton's `CompiledKernel`: `asm` (ptx, cubin and what came before), `metadata`, `hash`.
    """

    arch: int
    grid: tuple[int, int, int]
    kernel: Any

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.metadata.name)

    @property
    def signature(self) -> dict[str, Any]:
        """Type of every argument that is not a constant; of a tuple, the tuple of its types."""
        return {name: kind for name, kind in self.kernel.src.signature.items() if kind != "constexpr"}

    @property
    def constants(self) -> dict[str, Any]:
        """Value of every constant: constexprs, None, and integers equal to 1. A function stands by its name."""
        values = {self._argument(path): value for path, value in self.kernel.src.constants.items()}
        return {name: getattr(value, "__name__", value) for name, value in values.items()}

    @property
    def aligned(self) -> set[str]:
        """Arguments known to be divisible by 16: pointers and integers."""
        return {self._argument(path) for path, facts in self.kernel.src.attrs.items() if facts}

    def _argument(self, path: tuple[int, ...]) -> str:
        return self.kernel.src.fn.arg_names[path[0]] + "".join(f"[{index}]" for index in path[1:])


class _Driver(DriverBase):
    """What Triton asks of a driver, answered from `DEVICES`; its `utils` are its own."""

    def __init__(self, arch: int, multiprocessors: int | None) -> None:
        self.arch = arch
        self.multiprocessors = multiprocessors or DEVICES[arch].multiprocessors
        self.launches: list[Launch] = []
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(call: Callable[[], object], quantiles: tuple[float, ...] | None = None, **_: object) -> list[float]:
            call()  # an autotuner compiles all its configurations
            return [1.0] * len(quantiles or (1,))

        return once

    # Triton caches kernels and limits by device, so each architecture is one, far from any real one
    def get_current_device(self) -> int:
        return 1000 + self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        gpu = DEVICES[self.arch]
        return {
            "max_shared_mem": gpu.shared_per_block, "multiprocessor_count": self.multiprocessors,
            "max_num_regs": gpu.registers, "warpSize": 32,
        }  # fmt: skip

    def load_binary(self, *_: object) -> tuple[None, None, int, int, int]:
        # module, function, registers, spills and the most threads a block may have
        return None, None, 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, *_: object) -> None:
            here = driver.active  # a later dry run finds this kernel in Triton's cache
            if any(not 0 <= size <= most for size, most in zip((x, y, z), GRID_LIMITS, strict=True)):
                raise ValueError(f"grid of {metadata.name}: got {(x, y, z)}, wanted at most {GRID_LIMITS}")
            compiled, *_rest = src.fn.device_caches[here.get_current_device()]
            kernel = next(k for k in compiled.values() if k.src is src)
            here.launches.append(Launch(here.arch, (x, y, z), kernel))

        return launch


@contextmanager
def dry_run(arch: int, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Inside, Triton compiles for compute capability `arch` (a key of `DEVICES`) and records instead of launching.

    With few `multiprocessors` a small call divides its work as a large one does on the real device.

    Raises:
        triton.runtime.errors.OutOfResources: at a launch that wants more shared memory or threads than the GPU has.
    """
    before, fake = driver._active, _Driver(arch, multiprocessors)
    driver.set_active(fake)
    try:
        yield fake.launches
    finally:
        driver._active = before
