"""Run by test_kernels.py in its own process: each correction of the interpreter does its work."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter import Fences, shuffled_programs, tf32_products

interpreter.install()


@triton.jit
def product(X, Y, Z, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    z = tl.dot(tl.load(X + at), tl.trans(tl.load(Y + at)), input_precision=PRECISION)
    tl.store(Z + at, z)


@triton.jit
def copy(X, Y, LENGTH: tl.constexpr):
    i = tl.arange(0, LENGTH)
    tl.store(Y + i, tl.load(X + i))


@triton.jit
def arithmetic(X, Y, LENGTH: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, LENGTH)
    x = tl.load(X + i)
    if KIND == "sum":
        x = x + x
    elif KIND == "compare":
        x = tl.where(x > tl.load(X), x, 0.0)
    elif KIND == "negate":
        x = -x
    elif KIND == "reduce":
        x = x.to(tl.float32) + tl.sum(x, 0).to(tl.float32)
    elif KIND == "fma":
        x = tl.fma(x, x, x)
    else:
        x = tl.where(i > 3, x, 0.0)  # moves bits only
    tl.store(Y + i, x)


OPTION = tl.constexpr(2)


@triton.jit
def option(X, FLAGS: tl.constexpr):
    if FLAGS & OPTION:
        tl.store(X, 1.0)


@triton.jit
def count(X, length):
    total = 0
    for k in range(tl.cdiv(length, 2)):
        total += k
    tl.store(X, total)


@triton.jit
def visit(ORDER, COUNTER):
    k = tl.atomic_add(COUNTER, 1)
    tl.store(ORDER + k, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))


@triton.jit
def stray(X, Y, offset):
    tl.store(Y, tl.load(X + offset))
    tl.store(Y + offset, 1.0)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_bf16_products_are_products():
    x, y, z = random(32, 32, dtype=torch.bfloat16), random(32, 32, dtype=torch.bfloat16).flip(0), torch.empty(32, 32)
    product[(1,)](x, y, z, 32, "tf32")
    torch.testing.assert_close(z, x.float() @ y.float().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_to_bf16_round_to_nearest_even(dtype):
    if dtype == torch.int32:
        x = torch.arange(-256, 256, dtype=dtype) * 7
    else:
        special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, 1.00390625, 1.01171875]
        x = torch.cat([torch.tensor(special), random(512 - len(special))]).to(dtype)
    y = torch.empty(512, dtype=torch.bfloat16)
    copy[(1,)](x, y, 512)
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_from_bf16_keep_the_value(dtype):
    x, y = random(512, dtype=torch.bfloat16), torch.empty(512, dtype=dtype)
    copy[(1,)](x, y, 512)
    assert torch.equal(y, x.to(dtype))


@pytest.mark.parametrize("kind", ["sum", "compare", "negate", "reduce", "fma"])
def test_bf16_arithmetic_is_refused(kind):
    x, y = random(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"bf16 (arithmetic|reduction)"):
        arithmetic[(1,)](x, y, 16, kind)


def test_moving_bf16_values_is_no_arithmetic():
    x, y = random(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, 16, "where")
    assert torch.equal(y, x.where(torch.arange(16) > 3, 0.0))


def test_flags_meet_constants():
    x = torch.zeros(2)
    option[(1,)](x, 3)
    option[(1,)](x[1:], 5)
    assert x.tolist() == [1.0, 0.0]


def test_a_loop_may_have_a_bound_of_run_time():
    x = torch.zeros(1, dtype=torch.int32)
    count[(1,)](x, 13)
    assert x.item() == sum(range(7))


def test_tf32_products_round_their_operands():
    x, y, exact, rounded = random(32, 32), random(32, 32).flip(0), torch.empty(32, 32), torch.empty(32, 32)
    want = x @ y.T
    with tf32_products():
        product[(1,)](x, y, exact, 32, "ieee")
        product[(1,)](x, y, rounded, 32, "tf32")
    assert (exact - want).abs().max() < 1e-5 < 1e-4 < (rounded - want).abs().max() < 2e-2
    product[(1,)](x, y, rounded, 32, "tf32")
    torch.testing.assert_close(rounded, want)


def test_programs_run_shuffled_and_each_once():
    def order():
        seen, counter = torch.full((12,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        visit[(3, 4)](seen, counter)
        return seen.tolist()

    with shuffled_programs(0):
        orders = [order(), order()]
    assert order() == list(range(12))  # and in order again
    assert all(sorted(o) == list(range(12)) != o for o in orders) and orders[0] != orders[1]


@pytest.mark.parametrize("offset", [-1, 4, 100])
def test_fences_show_stray_reads_and_writes(offset):
    with Fences() as fences:
        x, y = torch.zeros(4), torch.zeros(4)
        stray[(1,)](x, y, 0)
        assert not fences.broken() and y.tolist() == [1.0, 0.0, 0.0, 0.0]
        stray[(1,)](x, y, offset)
        assert fences.broken() == 1 and y[0].isnan()


def test_fences_fill_and_differentiate():
    with Fences() as fences:
        assert torch.empty(3, 4).isnan().all() and torch.ones(5).new_empty(2).isnan().all()
        x = torch.arange(4.0).requires_grad_()
        (2 * fences.around(x)).sum().backward()
    assert x.grad.tolist() == [2.0] * 4 and not torch.empty(0).isnan().any()
