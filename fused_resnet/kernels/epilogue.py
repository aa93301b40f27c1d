"""Pieces that several Triton kernels share: affine, ReLU, channel statistics and sums, ReLU bits, rows, and chunks.

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
    line = rows // out_w  # image * out_h + p
    image = line // out_h
    input_line = line * STRIDE + image * (in_h - out_h * STRIDE)  # image * in_h + p * STRIDE, two divisions in all
    return (input_line * in_w + (rows - line * out_w) * STRIDE).to(tl.int64)


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
def fold_rows(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows added in pairs that lie eight apart, which tensor cores leave to one thread: [BLOCK_M // 16, 8, BLOCK_N]."""
    return tl.sum(tl.reshape(x, (BLOCK_M // 16, 2, 8, BLOCK_N)), axis=1)


@triton.jit
def merge_statistics(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(count, mean, M2) of the union of two sets (Chan, Golub and LeVeque, 1979); an empty set is (0, 0, 0)."""
    count = count_a + count_b
    delta = mean_b - mean_a
    weight = count_b / tl.maximum(count, 1.0)
    return count, mean_a + delta * weight, m2_a + m2_b + delta * delta * (count_a * weight)


@triton.jit
def reduce_statistics(total, count, mean, m2):
    """Mean and M2 [N] of sets of ``count`` values, [M, 1] or [M, N], with mean and M2 [M, N], together; ``total`` is
    the number of their values. A set without any has the count 0, a mean that is a number, and the M2 0."""
    center = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    deviation = mean - center[None, :]
    return center, tl.sum(m2 + count * deviation * deviation, axis=0)


@triton.jit
def store_statistics(row_ptr, count, mean, m2, cols, channels):
    """Store a row of partial statistics [T, 3, channels] at ``cols`` [N]; ``count`` is a scalar or [N]."""
    tl.store(row_ptr, tl.zeros_like(mean) + count, mask=cols < channels)
    tl.store(row_ptr + channels, mean, mask=cols < channels)
    tl.store(row_ptr + 2 * channels, m2, mask=cols < channels)


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
    """Store the bits ``positive`` [BLOCK_M, BLOCK_N] of the rows from row0: bit i of byte j is channel 8 * j + i.

    They must be False beyond the last channel.
    """
    bytes_per_row = (channels + 7) // 8
    bits = tl.where(positive, 1 << (tl.arange(0, BLOCK_N) % 8)[None, :], 0)
    packed = tl.sum(tl.reshape(bits, (BLOCK_M, BLOCK_N // 8, 8)), axis=2)  # [BLOCK_M, BLOCK_N // 8]
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
    return tl.load(mask_ptr + tl.cast(row0, tl.int64) * bytes_per_row + offsets, mask=valid, other=0)


@triton.jit
def unpack(packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bits of bytes [BLOCK_M, BLOCK_N // 8] as booleans [BLOCK_M, BLOCK_N].

    The thread that holds a byte gets its eight neighbouring channels, as a wide load of 16-bit values would lay them
    out: a load per byte, where a load per bit costs twice the registers, and spreads a row over many threads, which no
    wide access to shared memory can follow. A 32-bit AND with a constant becomes one instruction that moves a byte into
    predicates; shifts of bytes are three per bit, and masks for two values in a word no fewer instructions in all.
    """
    bits = packed.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(bits != 0, (BLOCK_M, BLOCK_N))


@triton.jit
def load_mask(mask_ptr, row0, row_limit, first_channel, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bits of `store_mask` as booleans [BLOCK_M, BLOCK_N]; False out of range."""
    packed = load_packed(mask_ptr, row0, row_limit, first_channel, channels, BLOCK_M, BLOCK_N)
    return unpack(packed, BLOCK_M, BLOCK_N)


@triton.jit
def load_addend(ptr, mask_ptr, image, h, w, valid_rows, cols, in_h, in_w, channels, STRIDE: tl.constexpr):
    """The addend [M, N] fp32 at the pixels (image, h, w), whose own grid is every STRIDE-th row and column; else 0, and
    where the bit of `store_mask` is off (mask_ptr None: all are on)."""
    own_h = (in_h + STRIDE - 1) // STRIDE
    own_w = (in_w + STRIDE - 1) // STRIDE
    pixel = (image * own_h + h // STRIDE).to(tl.int64) * own_w + w // STRIDE
    pixel = tl.where(valid_rows, pixel, 0)
    on_grid = valid_rows & (h % STRIDE == 0) & (w % STRIDE == 0)
    valid = on_grid[:, None] & (cols < channels)[None, :]
    values = tl.load(ptr + (pixel[:, None] * channels + cols[None, :]), mask=valid, other=0.0)
    if mask_ptr is not None:
        # Out of range, where values are 0 anyway, the last byte: a condition on every load costs registers.
        bytes_per_row = (channels + 7) // 8
        offsets = pixel[:, None] * bytes_per_row + tl.minimum(cols // 8, bytes_per_row - 1)[None, :]
        bits = tl.load(mask_ptr + offsets) >> (cols % 8).to(tl.uint8)[None, :]
        values = tl.where((bits & 1) != 0, values, 0.0)
    return values.to(tl.float32)


@triton.jit
def relu_backward(dx, c, bn_ptr, valid_rows, cols, channels):
    """dx [M, N] where the affine of c [M, N] is positive, else 0, and its sums over the rows: sum dx, sum dx * xhat."""
    scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
    shift = load_vector(bn_ptr, BN_SHIFT, channels, cols)
    dx = tl.where(valid_rows[:, None] & (affine(c, scale, shift) > 0), dx, 0.0)
    mean = load_vector(bn_ptr, BN_MEAN, channels, cols)
    sum_g, sum_x = tl.reduce((dx, dx * (c - mean[None, :])), 0, _add_pairs)
    return dx, sum_g, sum_x * load_vector(bn_ptr, BN_RSTD, channels, cols)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def store_sums(row_ptr, sum_g, sum_x, cols, channels):
    """Store a row (sum g, sum g * xhat) for this program's own later `add_sums`: hence the barrier behind it."""
    tl.store(row_ptr, sum_g, mask=cols < channels)
    tl.store(row_ptr + channels, sum_x, mask=cols < channels)
    tl.debug_barrier()


@triton.jit
def add_sums(row_ptr, sum_g, sum_x, cols, channels):
    """Add to a row that `store_sums` began.

    It lives in memory: carried through the loop in the accumulators' layout, which keeps copies of a channel in many
    threads, it would cost registers. The first barrier keeps its loads behind the reduction for the same reason.
    """
    tl.debug_barrier()
    sum_g += tl.load(row_ptr, mask=cols < channels, other=0.0)
    sum_x += tl.load(row_ptr + channels, mask=cols < channels, other=0.0)
    tl.debug_barrier()
    store_sums(row_ptr, sum_g, sum_x, cols, channels)


@triton.jit(do_not_specialize=["chunks"])
def add_chunks_kernel(parts_ptr, out_ptr, chunks, elements, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [elements] = the sum over chunks of parts [chunks, elements], in a fixed order."""
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for t0 in range(0, chunks, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        valid = (t < chunks)[:, None] & (index < elements)[None, :]
        total += tl.load(parts_ptr + t.to(tl.int64)[:, None] * elements + index[None, :], mask=valid, other=0.0)
    tl.store(out_ptr + index, tl.sum(total, axis=0), mask=index < elements)


def add_chunks(parts, out):
    """Launch `add_chunks_kernel`: out = parts [chunks, ...] summed over chunks, both fp32.

    Programs of 2048 values, as many chunks at a time as there are, up to 32: latency alone matters.
    """
    block_t = min(32, triton.next_power_of_2(parts.shape[0]))
    block_n = 2048 // block_t
    add_chunks_kernel[(triton.cdiv(out.numel(), block_n),)](
        parts, out, parts.shape[0], out.numel(), BLOCK_T=block_t, BLOCK_N=block_n, num_warps=4, num_stages=2
    )
