"""Pieces that several Triton kernels share: affine, ReLU, channel statistics, and ReLU bits.

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
def frozen_vectors(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, channels, cols):
    """(scale, shift) [N] fp32 of a BatchNorm with running statistics; gamma_ptr, beta_ptr None: 1 and 0."""
    valid = cols < channels
    scale = tl.rsqrt(tl.load(var_ptr + cols, mask=valid, other=1.0).to(tl.float32) + eps)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    shift = -tl.load(mean_ptr + cols, mask=valid, other=0.0).to(tl.float32) * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    return scale, shift


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
def load_mask(mask_ptr, row0, row_limit, cols, channels, BLOCK_M: tl.constexpr):
    """The bits of `store_mask` as booleans [BLOCK_M, N]; False out of range.

    Eight neighbouring lanes read the same byte: the cache serves them, and no layout has to change.
    """
    bytes_per_row = (channels + 7) // 8
    row = tl.arange(0, BLOCK_M)
    offsets = row[:, None] * bytes_per_row + (cols // 8)[None, :]
    valid = (row0 + row < row_limit)[:, None] & (cols < channels)[None, :]
    packed = tl.load(mask_ptr + row0.to(tl.int64) * bytes_per_row + offsets, mask=valid, other=0)
    return ((packed >> (cols % 8).to(tl.uint8)[None, :]) & 1) != 0


@triton.jit
def load_addend(ptr, mask_ptr, image, h, w, valid_rows, cols, in_h, in_w, channels, STRIDE: tl.constexpr):
    """The addend [M, N] fp32 at the pixels (image, h, w), whose own grid is every STRIDE-th row and column; else 0."""
    on_grid = valid_rows & (h % STRIDE == 0) & (w % STRIDE == 0)
    own_h = (in_h + STRIDE - 1) // STRIDE
    own_w = (in_w + STRIDE - 1) // STRIDE
    pixel = (image * own_h + h // STRIDE).to(tl.int64) * own_w + w // STRIDE
    valid = on_grid[:, None] & (cols < channels)[None, :]
    addend = tl.load(ptr + pixel[:, None] * channels + cols[None, :], mask=valid, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        byte = pixel[:, None] * ((channels + 7) // 8) + (cols // 8)[None, :]
        packed = tl.load(mask_ptr + byte, mask=valid, other=0)
        addend = tl.where(((packed >> (cols % 8).to(tl.uint8)[None, :]) & 1) != 0, addend, 0.0)
    return addend
