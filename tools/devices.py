"""The GPUs kernels are compiled for: what a block may use, and what a multiprocessor (SM) does in a clock.

Limits: CUDA C++ programming guide, "Technical specifications per compute capability". Rates: the vendor's dense peaks
divided by multiprocessors and clock.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICES", "Device"]


@dataclass(frozen=True)
class Device:
    """Limits and rates of one GPU.

    Attributes:
        name: the GPU the rates are those of.
        multiprocessors: how many it has.
        shared_per_block, shared_per_sm: bytes of shared memory, opted in.
        tensor_rate: bf16 operations (a multiply-add is two) an SM's tensor cores do in a clock, dense.
        fp32_rate: the same for fp32 outside the tensor cores.
        products: the instruction that tensor products should compile to.
        loads: how their operands should arrive in shared memory.
    """

    name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_sm: int
    tensor_rate: int
    fp32_rate: int
    products: str
    loads: str

    # the same on all three
    registers = 65536
    warps = 64
    blocks = 32
    tensor_memory = 512  # columns; only sm_100 has them

    def resident_blocks(self, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
        """Blocks an SM holds at once, from what each of their `warps` and each block uses."""
        # registers come in units of 256 a warp, warps in fours, and a block takes 1 KiB of shared memory for itself
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // 4 // per_warp * 4 // warps if registers else self.blocks
        by_shared = self.shared_per_sm // (shared + 1024)
        by_tensor_memory = self.tensor_memory // tensor_memory if tensor_memory else self.blocks
        return min(self.blocks, self.warps // warps, by_registers, by_shared, by_tensor_memory)


_KIB = 1024
DEVICES = {
    80: Device("A100", 108, 163 * _KIB, 164 * _KIB, 2048, 128, "mma.sync", "cp.async"),
    90: Device("H200", 132, 227 * _KIB, 228 * _KIB, 4096, 256, "wgmma", "tma"),
    100: Device("B200", 148, 227 * _KIB, 228 * _KIB, 8192, 256, "tcgen05", "tma"),
}
