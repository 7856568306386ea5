"""Triton's interpreter, corrected to compute what a GPU computes. Tests only, in a process with TRITON_INTERPRET=1.

Left alone (3.6 to 3.9) it stores bf16 as uint16 and then works on the bit patterns: a product of bf16 tiles, their sum
or maximum is garbage and a rounding to bf16 cuts the mantissa off, all of it without a word. It also runs the programs
of a grid in order and lets them read and write past the end of a tensor, which a GPU forgives less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["BFloat16Error", "Fences", "install", "shuffled_programs", "tf32_products"]

_rounds_to_tf32 = False


class BFloat16Error(TypeError):
    """Arithmetic on bf16 values, which the interpreter would do on their bit patterns."""


def install() -> None:
    """Correct the interpreter of this process, once."""
    if InterpreterBuilder.create_dot is _dot:
        return
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(InterpreterBuilder, name, _loud(getattr(InterpreterBuilder, name)))
    interpreter.ReduceScanOpInterface.check_tensor = _check_tensor
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpretedFunction.__call__ = _call
    if not hasattr(tl.constexpr, "__rand__"):  # parameters are plain numbers here: FLAGS & OPTION has an int first
        tl.constexpr.__rand__ = lambda option, flags: tl.constexpr(flags & option.value)
    np.seterr(divide="ignore", over="ignore", invalid="ignore")  # a GPU is silent about infinities and NaN


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside the block `tl.dot` with tf32 precision rounds its operands, as the tensor cores do."""
    global _rounds_to_tf32
    _rounds_to_tf32 = True
    try:
        yield
    finally:
        _rounds_to_tf32 = False


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Inside the block the programs of every grid run in a random order: a GPU promises none."""
    random = np.random.default_rng(seed)
    before = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order = None

    def set_grid_dim(self: InterpreterBuilder, *grid: int) -> None:
        nonlocal order
        order = random.permutation(int(np.prod(grid)))
        before[0](self, *grid)

    def set_grid_idx(self: InterpreterBuilder, *at: int) -> None:
        k = order[np.ravel_multi_index(at, self.grid_dim)]
        before[1](self, *(int(i) for i in np.unravel_index(k, self.grid_dim)))

    InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = before


class Fences(TorchFunctionMode):
    """Inside the block every new tensor lies between two zones of NaN, and is NaN itself where it is not initialised.

    A read past an end that counts then shows in the results, and a write past an end in `broken`.
    """

    NEW = (
        torch.empty, torch.zeros, torch.ones, torch.full, torch.empty_like, torch.zeros_like, Tensor.new_empty,
        Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._zones: list[tuple[Tensor, Tensor]] = []  # as bytes: now, and what they were

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Fence what the function makes, if it makes a tensor."""
        result = function(*args, **(kwargs or {}))
        if function not in self.NEW or result.device.type == "meta":
            return result
        if function in (torch.empty, torch.empty_like, Tensor.new_empty):
            result.fill_(_nothing(result.dtype))
        requires_grad, result = result.requires_grad, self.around(result.detach())
        return result.requires_grad_(requires_grad)

    def around(self, tensor: Tensor) -> Tensor:
        """A fenced copy of a tensor, differentiable."""
        tile = 256  # no tile is longer: a stray access lands in the zone
        zone = -(-(tensor.shape[-1] if tensor.dim() else 1) * tile // 64) * 64
        with torch._C.DisableTorchFunction():
            memory = torch.full((2 * zone + tensor.numel(),), _nothing(tensor.dtype), dtype=tensor.dtype)
            for part in (memory[:zone], memory[zone + tensor.numel() :]):
                self._zones.append((part.view(torch.uint8), part.view(torch.uint8).clone()))
        return memory[zone : zone + tensor.numel()].view(tensor.shape).copy_(tensor)

    def broken(self) -> int:
        """How many zones have been written to."""
        return sum(not torch.equal(now, before) for now, before in self._zones)


def _nothing(dtype: torch.dtype) -> float | int:
    # an integer that looks like an index or an id: a wrong read of it must not stand out as invalid
    return float("nan") if dtype.is_floating_point else 0


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _is_bf16(value: object) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16


_original_dot = InterpreterBuilder.create_dot


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    def operand(handle):
        if _is_bf16(handle):
            return TensorHandle(_widened(handle.data), tl.float32)
        if _rounds_to_tf32 and handle.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            bits = np.ascontiguousarray(handle.data).view(np.uint32)
            return TensorHandle(((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32), tl.float32)
        return handle

    return _original_dot(self, operand(a), operand(b), d, input_precision, max_num_imprecise_acc)


_original_cast = InterpreterBuilder.cast_impl


def _cast(self, source, to):
    if _is_bf16(source):
        source = TensorHandle(_widened(source.data), tl.float32)
    if to.scalar == tl.bfloat16:
        return TensorHandle(_narrowed(source.data.astype(np.float32)), tl.bfloat16)
    return _original_cast(self, source, to)


def _loud(method):
    def checked(self, *operands):
        moves_bits_only = operands[-1] is np.where
        if not moves_bits_only and any(map(_is_bf16, operands)):
            raise BFloat16Error("bf16 arithmetic: wanted .to(tl.float32) right after the load")
        return method(self, *operands)

    return checked


_original_check_tensor = interpreter.ReduceScanOpInterface.check_tensor


def _check_tensor(self, inputs):
    if any(map(_is_bf16, inputs)):
        raise BFloat16Error("bf16 reduction: wanted .to(tl.float32) right after the load")
    _original_check_tensor(self, inputs)


_original_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, *scope):
    # 3.6 with NumPy 2.4: int() of an array of one element is an error, so no loop could have a bound of run time
    _original_patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])


def _call(self, *args, **kwargs):
    # a launch prepares the language; doing so again for each call of a tile function took most of the time
    if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
