"""Pieces that several Triton kernels share: affine, ReLU, channel statistics, ReLU bits, and strided rows.

Tiles are [M pixels, N channels], fp32 unless said otherwise.
"""

import triton
import triton.language as tl

# Rows of a `bn` table [5, C]: mean, rstd, scale, shift, inv_count. Rows of a `coef` table [3, C]: A, B, C.
BN_MEAN = tl.constexpr(0)
BN_RSTD = tl.constexpr(1)
BN_SCALE = tl.constexpr(2)
BN_SHIFT = tl.constexpr(3)
BN_INV_COUNT = tl.constexpr(4)


@triton.jit
def load_vector(table_ptr, row, channels, cols):
    """Row ``row`` of a [R, channels] fp32 table at the channels ``cols`` [N]; 0 beyond the last channel."""
    return tl.load(table_ptr + row * channels + cols, mask=cols < channels, other=0.0)


@triton.jit
def input_rows(rows, in_h, in_w, out_h, out_w, STRIDE: tl.constexpr):
    """int64 input pixel of each output pixel ``rows`` [M]. Pixel counts stay below 2^31, element counts may not."""
    if STRIDE == 1:
        return rows.to(tl.int64)
    image = rows // (out_h * out_w)
    p = rows // out_w % out_h
    q = rows % out_w
    return ((image * in_h + p * STRIDE) * in_w + q * STRIDE).to(tl.int64)


@triton.jit
def affine(x, scale, shift):
    """x [M, N] * scale [N] + shift [N]."""
    return x * scale[None, :] + shift[None, :]


@triton.jit
def relu(x):
    """max(x, 0); a NaN stays a NaN, as in PyTorch, so that a broken input is not silently turned into zeros."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_statistics(x, valid, count):
    """Mean [N] and M2 [N] = sum (x - mean)^2 over the ``count`` rows of x [M, N] marked in ``valid`` [M].

    Two passes over registers: E[x^2] - E[x]^2 would cancel for a channel whose mean is far from zero.
    """
    mean = tl.sum(tl.where(valid[:, None], x, 0.0), axis=0) / count
    deviation = tl.where(valid[:, None], x - mean[None, :], 0.0)  # [M, N]
    return mean, tl.sum(deviation * deviation, axis=0)


@triton.jit
def merge_statistics(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(count, mean, M2) of the union of two sets (Chan, Golub and LeVeque, 1979); an empty set is (0, 0, 0)."""
    count = count_a + count_b
    delta = mean_b - mean_a
    weight = count_b / tl.maximum(count, 1.0)
    return count, mean_a + delta * weight, m2_a + m2_b + delta * delta * (count_a * weight)


@triton.jit
def store_bn(bn_ptr, channels, cols, mean, var, inv_count, gamma_ptr, beta_ptr, eps):
    """Store the five vectors of a BatchNorm from fp64 statistics; gamma_ptr, beta_ptr None: 1 and 0."""
    valid = cols < channels
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if gamma_ptr is not None:
        scale = tl.load(gamma_ptr + cols, mask=valid, other=0.0).to(tl.float64) * rstd
    shift = -mean * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + cols, mask=valid, other=0.0).to(tl.float64)
    tl.store(bn_ptr + BN_MEAN * channels + cols, mean.to(tl.float32), mask=valid)
    tl.store(bn_ptr + BN_RSTD * channels + cols, rstd.to(tl.float32), mask=valid)
    tl.store(bn_ptr + BN_SCALE * channels + cols, scale.to(tl.float32), mask=valid)
    tl.store(bn_ptr + BN_SHIFT * channels + cols, shift.to(tl.float32), mask=valid)
    tl.store(bn_ptr + BN_INV_COUNT * channels + cols, inv_count.to(tl.float32), mask=valid)


@triton.jit
def update_running(
    mean_ptr, var_ptr, batches_ptr, channels, cols, mean, var, count, momentum, CUMULATIVE: tl.constexpr
):
    """running <- (1 - weight) running + weight batch, in place, from fp64 statistics [N]; the variance unbiased.

    The weight is ``momentum``, or with CUMULATIVE 1 / batches: the int64 counter, this batch included.
    """
    valid = cols < channels
    weight = momentum
    if CUMULATIVE:
        weight = 1.0 / tl.load(batches_ptr).to(tl.float64)
    unbiased = var * (count / tl.maximum(count - 1.0, 1.0))
    old_mean = tl.load(mean_ptr + cols, mask=valid, other=0.0).to(tl.float64)
    old_var = tl.load(var_ptr + cols, mask=valid, other=0.0).to(tl.float64)
    new_mean = old_mean + weight * (mean - old_mean)
    new_var = old_var + weight * (unbiased - old_var)
    tl.store(mean_ptr + cols, new_mean.to(tl.float32).to(mean_ptr.dtype.element_ty), mask=valid)
    tl.store(var_ptr + cols, new_var.to(tl.float32).to(var_ptr.dtype.element_ty), mask=valid)


@triton.jit
def store_mask(
    mask_ptr, positive, row0, row_limit, first_channel, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store the bits ``positive`` [BLOCK_M, BLOCK_N] of the rows from row0: bit i of byte j is channel 8 * j + i."""
    bytes_per_row = (channels + 7) // 8
    cols = first_channel + tl.arange(0, BLOCK_N)
    bits = (positive & (cols < channels)[None, :]).to(tl.int32)
    weights = 1 << (tl.arange(0, BLOCK_N) % 8)
    packed = tl.sum(tl.reshape(bits * weights[None, :], (BLOCK_M, BLOCK_N // 8, 8)), axis=2)  # [BLOCK_M, BLOCK_N // 8]
    row = tl.arange(0, BLOCK_M)
    byte = first_channel // 8 + tl.arange(0, BLOCK_N // 8)
    offsets = row[:, None] * bytes_per_row + byte[None, :]
    valid = (row0 + row < row_limit)[:, None] & (byte < bytes_per_row)[None, :]
    tl.store(mask_ptr + row0.to(tl.int64) * bytes_per_row + offsets, packed.to(tl.uint8), mask=valid)


@triton.jit
def load_packed(mask_ptr, row0, row_limit, first_channel, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bytes of `store_mask`, uint8 [BLOCK_M, BLOCK_N // 8]; 0 out of range."""
    bytes_per_row = (channels + 7) // 8
    row = tl.arange(0, BLOCK_M)
    byte = first_channel // 8 + tl.arange(0, BLOCK_N // 8)
    offsets = row[:, None] * bytes_per_row + byte[None, :]
    valid = (row0 + row < row_limit)[:, None] & (byte < bytes_per_row)[None, :]
    return tl.load(mask_ptr + row0.to(tl.int64) * bytes_per_row + offsets, mask=valid, other=0)


@triton.jit
def unpack(packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bits of bytes [BLOCK_M, BLOCK_N // 8] as booleans [BLOCK_M, BLOCK_N].

    The thread that holds a byte gets its eight neighbouring channels, as a wide load of 16-bit values would lay them
    out: a load per byte, where a load per bit costs twice the registers.
    """
    bits = (packed[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def load_mask(mask_ptr, row0, row_limit, first_channel, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bits of `store_mask` as booleans [BLOCK_M, BLOCK_N]; False out of range."""
    packed = load_packed(mask_ptr, row0, row_limit, first_channel, channels, BLOCK_M, BLOCK_N)
    return unpack(packed, BLOCK_M, BLOCK_N)
