"""The rules of `harsh_interpreter`: a kernel that breaks one fails, and bf16 is computed as PyTorch computes it."""

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]


@triton.jit
def _copy(x_ptr, out_ptr, values, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x_ptr + cols + SHIFT, mask=cols < values), mask=cols < values)


@triton.jit
def _sum_without_other(x_ptr, out_ptr, values, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + cols, mask=cols < values).to(tl.float32), axis=0))


@triton.jit
def _plain_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def _chain(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program adds what the one before it stored."""
    cols = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    x = tl.load(x_ptr + program * BLOCK + cols)
    if program > 0:
        x += tl.load(out_ptr + (program - 1) * BLOCK + cols)
    tl.store(out_ptr + program * BLOCK + cols, x)


@triton.jit
def _neighbours(x_ptr, BLOCK: tl.constexpr):
    """In place, with one element of the next program."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    following = tl.load(x_ptr + cols + 1, mask=cols + 1 < tl.num_programs(0) * BLOCK, other=0.0)
    x = tl.load(x_ptr + cols) + following
    tl.debug_barrier()
    tl.store(x_ptr + cols, x)


@triton.jit
def _everyone(out_ptr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    value = 1.0 if SAME else tl.program_id(0).to(tl.float32)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + value)


@triton.jit
def _back_and_forth(x_ptr, out_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Through memory to another lane."""
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x_ptr + cols))
    if BARRIER:
        tl.debug_barrier()
    reverse = tl.load(out_ptr + BLOCK - 1 - cols)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + cols, reverse)


@triton.jit
def _reverse(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """In place."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK - 1 - cols, x)


@triton.jit
def _twice(out_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, cols.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + cols, cols.to(tl.float32) + 1.0)


@triton.jit
def _collide(out_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols // 2, cols.to(tl.float32))


@triton.jit
def _overflow(out_ptr, values, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, (cols * values).to(tl.float32))


@triton.jit
def _loop(out_ptr, first, last):
    for i in range(first, last):
        tl.store(out_ptr + i - first, i // 2 * 1.0)


@triton.jit
def _loop_overflow(out_ptr, last, STEP: tl.constexpr):
    for i in range(last):
        tl.store(out_ptr + i, (i * STEP).to(tl.float32))


@triton.jit
def _maximum(x_ptr, out_ptr, ALL: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    if ALL:
        tl.store(out_ptr + cols, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        tl.store(out_ptr + cols, tl.maximum(x, 0.0))


def fails(match, kernel, programs, *args, **kwargs):
    from triton.runtime.errors import InterpreterError

    with pytest.raises((InterpreterError, RuntimeError), match=match):
        kernel[(programs,)](*args, **kwargs)


def test_bounds_are_those_of_the_tensor():
    """The neighbours of the slice are there, in the same storage and in other tensors."""
    whole, out = torch.arange(48.0), torch.zeros(16)
    x = whole[16:32]
    _copy[(2,)](x, out, 16, SHIFT=0, BLOCK=8)
    assert torch.equal(out, x)
    fails(r"_copy: program \d loads 1 elements out of bounds, one of them 16, in x_ptr", _copy, 2, x, out, 16, 1, 8)
    fails("loads 1 elements out of bounds, one of them -1, in x_ptr", _copy, 2, x, out, 16, -1, 8)
    fails("stores 4 elements out of bounds, one of them 12, in out_ptr", _copy, 2, whole, out[:12], 16, 0, 8)
    out.zero_()
    _copy[(2,)](x, out, 15, SHIFT=1, BLOCK=8)  # the lane that would be out of bounds is off
    assert torch.equal(out[:15], x[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8])
def test_lanes_that_are_off_are_undefined(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.zeros(1, dtype=torch.float32)
    _sum_without_other[(1,)](x, out, 16, BLOCK=16)
    assert out == 16
    if dtype.is_floating_point:
        _sum_without_other[(1,)](x, out, 15, BLOCK=16)
        assert out.isnan()
    elif dtype == torch.uint8:
        _sum_without_other[(1,)](x, out, 15, BLOCK=16)
        assert out == 15 + 255


def test_programs_know_nothing_of_one_another():
    x, out = torch.ones(32), torch.zeros(32)
    fails(r"_chain: program \d loads what program \d stores, in out_ptr", _chain, 4, x, out, BLOCK=8)
    _chain[(1,)](x, out, BLOCK=8)
    fails(r"_neighbours: program \d loads what program \d stores, in x_ptr", _neighbours, 4, x, BLOCK=8)
    _neighbours[(1,)](torch.ones(8), BLOCK=8)
    fails("stores another value than another program before it, in out_ptr", _everyone, 2, out, SAME=False, BLOCK=8)
    _everyone[(2,)](out, SAME=True, BLOCK=8)


def test_programs_run_in_no_order():
    from triton.runtime import interpreter

    seen = []
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(3, 2, 2)
    for x in range(3):
        for y in range(2):
            for z in range(2):
                builder.program_at = []
                builder.set_grid_idx(x, y, z)
                seen.append(builder.grid_idx)
    assert sorted(seen) == [(x, y, z) for x in range(3) for y in range(2) for z in range(2)] != seen


def test_threads_meet_at_barriers_only():
    x, out = torch.arange(8.0), torch.zeros(8)
    fails("loads what it stored, without a barrier", _back_and_forth, 1, x, out, BARRIER=False, BLOCK=8)
    _back_and_forth[(1,)](x, out, BARRIER=True, BLOCK=8)
    assert torch.equal(out, x.flip(0))
    fails("stores what another lane loaded, without a barrier", _reverse, 1, out, BARRIER=False, BLOCK=8)
    _reverse[(1,)](out, BARRIER=True, BLOCK=8)
    assert torch.equal(out, x)
    fails("stores a second value without a barrier", _twice, 1, out, BARRIER=False, BLOCK=8)
    _twice[(1,)](out, BARRIER=True, BLOCK=8)
    fails("stores two values to one address at once", _collide, 1, out, BLOCK=8)


def test_integers_overflow():
    out = torch.zeros(16)
    _overflow[(1,)](out, 2**27, BLOCK=16)
    fails("int32 overflow", _overflow, 1, out, 2**28, BLOCK=16)
    fails("int32 overflow", _loop_overflow, 1, out, 16, STEP=2**28)
    _loop[(1,)](out, -3, 3)
    assert out[:6].tolist() == [-1, -1, 0, 0, 0, 1]  # rounded towards zero, as a GPU divides


@pytest.mark.parametrize("propagate", [True, False])
def test_maximum_drops_a_nan_unless_told(propagate):
    x, out = torch.tensor([float("nan"), 1.0, -1.0, 0.0]), torch.empty(4)
    _maximum[(1,)](x, out, ALL=propagate, BLOCK=4)
    assert out[0].isnan() if propagate else out[0] == 0
    assert torch.equal(out[1:], x[1:].relu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_wide(dtype):
    fails("sum of .*: convert to fp32", _plain_sum, 1, torch.ones(8, dtype=dtype), torch.zeros(1), BLOCK=8)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, wide_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    y = tl.load(y_ptr + cols)
    narrow = out_ptr + cols
    tl.store(narrow, x + y)
    tl.store(narrow + BLOCK, x - y)
    tl.store(narrow + 2 * BLOCK, x * y)
    tl.store(narrow + 3 * BLOCK, x * 0.3)
    tl.store(narrow + 4 * BLOCK, tl.where(x > y, x, -y))
    tl.store(narrow + 5 * BLOCK, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(narrow + 6 * BLOCK, (x.to(tl.float32) * 1.7).to(tl.bfloat16))
    tl.store(narrow + 7 * BLOCK, tl.abs(x))
    wide = wide_ptr + cols
    tl.store(wide, x / y)
    tl.store(wide + BLOCK, x.to(tl.float64).to(tl.float32))
    tl.store(wide + 2 * BLOCK, tl.zeros((BLOCK,), tl.float32) + tl.max(y, axis=0))


def test_bf16_arithmetic_is_pytorchs():
    """Bit for bit, at sizes from the smallest to overflow, with infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, generator=generator).mul(2.0 ** torch.randint(-130, 126, (256,), generator=generator))
            .bfloat16() for _ in range(2))  # fmt: skip
    x[:4] = torch.tensor([float("inf"), float("nan"), 0.0, 3.3895e38])
    y[100:] = x[100:].roll(1) * 1.5
    out, wide = torch.empty(8, 256, dtype=torch.bfloat16), torch.empty(3, 256)
    _arithmetic[(1,)](x, y, out, wide, BLOCK=256)
    expected = [
        x + y, x - y, x * y, x * torch.tensor(0.3).bfloat16(), torch.where(x > y, x, -y), torch.maximum(x, y),
        (x.float() * 1.7).bfloat16(), x.abs(),
    ]  # fmt: skip
    for row, (got, want) in enumerate(zip(out, expected)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=f"row {row}")
    torch.testing.assert_close(wide[0], x.float() / y.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide[1], x.float(), rtol=0, atol=0, equal_nan=True)
    assert (wide[2] == y.float().max()).all()


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + rows * BLOCK + cols)
    b = tl.load(b_ptr + rows * BLOCK + cols)
    tl.store(out_ptr + rows * BLOCK + cols, tl.dot(a, b, input_precision=PRECISION))


@pytest.mark.parametrize(
    "dtype,precision,low,high",
    [
        (torch.bfloat16, "ieee", 0, 1e-6),
        (torch.float16, "ieee", 0, 1e-6),
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32x3", 1e-9, 1e-6),
    ],
)
def test_products(dtype, precision, low, high):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, PRECISION=precision, BLOCK=32)
    error = (out.double() - a.double() @ b.double()).abs().max() / 32**0.5
    assert low <= error <= high
