"""BatchNorm from the moments of a 1x1 convolution's input (`reference.moments_finalize`, `reference.moments_weights`).

Rows a [P, K] are the convolution's input, relu(bn(c)) of a deferred one or every stride-th pixel of a plain one, and
rows g [P, N] its output's gradient, zero where the ReLU behind it was off:

    gram  [K+1, K+1] = [a 1]^T [a 1]        cross [K+1, N] = [a 1]^T g        both fp64

One kernel computes both: the right operand of gram is a itself, and only tiles that touch the upper triangle are
computed. The pixels are split into chunks, how many follows from the shapes alone, and a second kernel adds the chunks'
fp32 results in fp64, in order: no atomics, so the same input gives the same bits. Three small kernels make of them the
vectors bn [5, N], the sums [1, 2, N] of the gradient, and the matrices of backward.

Precision. The variance is a difference, Cov = M / P - m m^T, in which an error d relative to M and m becomes one of
about d (1 + mean^2 / var); dgamma and dW are differences of the same kind. Tensor cores add to their fp32 accumulator
by truncation (Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"), and the products
of ReLU outputs are all positive. Emulated, a chain over 4096 pixels loses 5e-6 (bf16) to 3e-5 (fp16) of M, always
downwards, and one over 64 pixels 1e-7: so a chain ends after BLOCK_K pixels, and results are added in fp32 registers,
rounded to nearest. Sums of a are taken from the same rounded values as products. fp32 operands are split into two TF32
values each ("tf32x3") where PyTorch's switch allows TF32, whose 11 bits would not survive the difference, which is
taken in fp64. After it nothing cancels that much, and products with Cov run at fp32 precision: in fp64 they would be
exact to no purpose and, on cards with a 64th of the rate, slow.
"""

import torch
import triton
import triton.language as tl

from . import (
    count_batch,
    input_precision,
    on_device_of,
    require_channels,
    require_mask,
    require_pixels,
    require_rows,
    require_vectors,
    tile_options,
)
from .epilogue import (
    BN_MEAN,
    BN_RSTD,
    BN_SCALE,
    BN_SHIFT,
    affine,
    input_rows,
    load_packed,
    load_vector,
    relu,
    store_bn,
    unpack,
    update_running,
)


@triton.jit
def _load_rows(x_ptr, bn_ptr, rows, valid_rows, cols, channels):
    """relu(bn(x)) [M, N] of the int64 pixels ``rows``, in x's dtype, 0 out of range; bn_ptr None: x."""
    valid = valid_rows[:, None] & (cols < channels)[None, :]
    x = tl.load(x_ptr + rows[:, None] * channels + cols[None, :], mask=valid, other=0.0)
    if bn_ptr is not None:
        scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
        shift = load_vector(bn_ptr, BN_SHIFT, channels, cols)
        x = tl.where(valid, relu(affine(x.to(tl.float32), scale, shift)), 0.0).to(x.dtype)
    return x


# One compilation serves every batch and image size: extents of maps gain nothing from being known to be even.
@triton.jit(do_not_specialize=["in_h", "in_w", "out_h", "out_w", "pixels", "chunk_pixels"])
def _moments_kernel(
    a_ptr,  # [pixels in, gemm_m]
    a_bn_ptr,  # [5, gemm_m] fp32 | None
    g_ptr,  # [pixels, gemm_n] | None: the right operand is a, and gemm_n is gemm_m
    mask_ptr,  # ReLU bits of g | None
    parts_ptr,  # [chunks, gemm_m + 1, gemm_n] fp32
    gemm_m,
    gemm_n,
    in_h,
    in_w,
    out_h,
    out_w,
    pixels,
    chunk_pixels,
    STRIDE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # the tile of gram is one: left and right operand are the same
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[t] = [a 1]^T g over chunk t of consecutive pixels; a program per chunk and tile, BLOCK_K pixels a step."""
    # The programs of a chunk are neighbours: they read the same pixels, all but the first from L2.
    tiles_m = tl.cdiv(gemm_m, BLOCK_M)
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    chunk = tl.program_id(0) // (tiles_m * tiles_n)
    first_row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    if g_ptr is None and first_row >= first_col + BLOCK_N:
        return  # below the diagonal
    ks = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Rows 32 apart lie in one thread, which adds them up; threads exchange sums once, at the end.
    SUM_ROWS: tl.constexpr = 32 if BLOCK_K > 32 else BLOCK_K
    sums = tl.zeros((SUM_ROWS, BLOCK_N), dtype=tl.float32)
    if mask_ptr is not None:
        packed = load_packed(mask_ptr, start, stop, first_col, gemm_n, BLOCK_K, BLOCK_N)
    for step in range(tl.cdiv(stop - start, BLOCK_K)):
        row0 = start + step * BLOCK_K
        rows = row0 + tl.arange(0, BLOCK_K)
        valid_rows = rows < stop
        a_rows = input_rows(rows, in_h, in_w, out_h, out_w, STRIDE)
        a = _load_rows(a_ptr, a_bn_ptr, a_rows, valid_rows, ks, gemm_m)  # [BLOCK_K, BLOCK_M]
        if g_ptr is None:
            g = a
            if not ONE_TILE:
                g = _load_rows(a_ptr, a_bn_ptr, a_rows, valid_rows, cols, gemm_n)  # [BLOCK_K, BLOCK_N]
        else:
            g = _load_rows(g_ptr, None, rows.to(tl.int64), valid_rows, cols, gemm_n)  # [BLOCK_K, BLOCK_N]
            if mask_ptr is not None:
                g = tl.where(unpack(packed, BLOCK_K, BLOCK_N), g, 0.0)
                # A step ahead: the compiler makes no loads of single bytes asynchronous.
                packed = load_packed(mask_ptr, row0 + BLOCK_K, stop, first_col, gemm_n, BLOCK_K, BLOCK_N)
        # A product with a limit on inexact additions is not merged with the addition behind it.
        acc += tl.dot(tl.trans(a), g, input_precision=INPUT_PRECISION, max_num_imprecise_acc=BLOCK_K)
        sums += tl.sum(tl.reshape(g.to(tl.float32), (BLOCK_K // SUM_ROWS, SUM_ROWS, BLOCK_N)), axis=0)

    part_ptr = parts_ptr + chunk.to(tl.int64) * (gemm_m + 1) * gemm_n
    valid = (ks < gemm_m)[:, None] & (cols < gemm_n)[None, :]
    tl.store(part_ptr + ks[:, None] * gemm_n + cols[None, :], acc, mask=valid)
    if first_row == 0:
        tl.store(part_ptr + gemm_m * gemm_n + cols, tl.sum(sums, axis=0), mask=cols < gemm_n)


@triton.jit(do_not_specialize=["chunks", "pixels"])
def _add_chunks_kernel(
    parts_ptr,
    out_ptr,
    chunks,
    rows,
    cols,
    pixels,
    SYMMETRIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sum over chunks of parts, in order and in fp64.

    SYMMETRIC: out is [rows, rows] with rows = cols + 1; parts holds its upper triangle and, in its last row, the last
    column but for the corner, which is ``pixels``.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = index // cols
    col = index % cols
    valid = row < rows
    if SYMMETRIC:
        valid = valid & ((row <= col) | (row == cols))
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for t0 in range(0, chunks, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        pointers = parts_ptr + t.to(tl.int64)[:, None] * (rows * cols) + index[None, :]  # [BLOCK_T, BLOCK_N]
        part = tl.load(pointers, mask=(t < chunks)[:, None] & valid[None, :], other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
    if SYMMETRIC:
        tl.store(out_ptr + row * rows + col, total, mask=valid)
        tl.store(out_ptr + col * rows + row, total, mask=valid)
        if tl.program_id(0) == 0:
            tl.store(out_ptr + rows * rows - 1, pixels.to(tl.float64))
    else:
        tl.store(out_ptr + index, total, mask=valid)


@triton.jit
def _load_weight(w_ptr, ks, cols, gemm_n, gemm_k):
    """W [K, N] fp32 of the weight [gemm_n, gemm_k] in memory, 0 out of range."""
    valid = (ks < gemm_k)[:, None] & (cols < gemm_n)[None, :]
    return tl.load(w_ptr + cols[None, :] * gemm_k + ks[:, None], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _inverse_count(gram_ptr, gemm_k):
    """1 / P. Where statistics are running ones gram is zero, and so is then everything that it is multiplied by."""
    return 1.0 / tl.maximum(tl.load(gram_ptr + (gemm_k + 1) * (gemm_k + 1) - 1), 1.0)


@triton.jit
def _covariance_product(
    gram_ptr, w_ptr, inv_count, ks, cols, twice, stop, gemm_n, gemm_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cov[ks, j] W[j, cols], fp32 [BLOCK_M, BLOCK_N], and m[j] W[j, cols], fp64 [BLOCK_N], over channels j below stop.

    Cov = M / P - m m^T, subtracted in fp64 and then rounded; channels below ``twice`` count double in the product.
    """
    sums_ptr = gram_ptr + gemm_k * (gemm_k + 1)
    mean_k = tl.load(sums_ptr + ks, mask=ks < gemm_k, other=0.0) * inv_count
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for j0 in range(0, stop, BLOCK_K):
        js = j0 + tl.arange(0, BLOCK_K)
        valid = (ks < gemm_k)[:, None] & (js < stop)[None, :]
        second = tl.load(gram_ptr + ks[:, None] * (gemm_k + 1) + js[None, :], mask=valid, other=0.0) * inv_count
        mean_j = tl.load(sums_ptr + js, mask=js < stop, other=0.0) * inv_count
        cov = (second - mean_k[:, None] * mean_j[None, :]).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        cov = tl.where((js < twice)[None, :], cov + cov, cov)
        w = _load_weight(w_ptr, js, cols, gemm_n, gemm_k)  # [BLOCK_K, BLOCK_N]
        product += tl.dot(cov, w, input_precision="tf32x3", max_num_imprecise_acc=BLOCK_K)
        mean += tl.sum(mean_j[:, None] * w.to(tl.float64), axis=0)
    return product, mean


@triton.jit
def _moments_finalize_kernel(
    gram_ptr,  # [gemm_k + 1, gemm_k + 1] fp64
    w_ptr,  # [gemm_n, gemm_k]
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,  # int64 scalar, read only: the batches counted so far, this one included
    bn_ptr,
    gemm_n,
    gemm_k,
    momentum,
    eps,
    CUMULATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """bn at BLOCK_N output channels: mean = m W, var = sum_k W (Cov W)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inv_count = _inverse_count(gram_ptr, gemm_k)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float64)
    var = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for k0 in range(0, gemm_k, BLOCK_M):
        ks = k0 + tl.arange(0, BLOCK_M)
        # Cov is symmetric: what lies to the left of the tile on the diagonal counts twice, what lies to its right not.
        # The mean is complete after the last step, which sees all channels.
        stop = tl.minimum(k0 + BLOCK_M, gemm_k)
        product, mean = _covariance_product(
            gram_ptr, w_ptr, inv_count, ks, cols, k0, stop, gemm_n, gemm_k, BLOCK_M, BLOCK_N, BLOCK_K
        )
        w = _load_weight(w_ptr, ks, cols, gemm_n, gemm_k)
        var += tl.sum(w.to(tl.float64) * product.to(tl.float64), axis=0)
    var = tl.where(var < 0.0, 0.0, var)  # a NaN stays a NaN
    store_bn(bn_ptr, gemm_n, cols, mean, var, inv_count, gamma_ptr, beta_ptr, eps)
    if running_mean_ptr is not None:
        count = 1.0 / inv_count
        update_running(
            running_mean_ptr, running_var_ptr, batches_ptr, gemm_n, cols, mean, var, count, momentum, CUMULATIVE
        )


@triton.jit
def _cross_sums_kernel(
    cross_ptr,  # [gemm_k + 1, gemm_n] fp64
    w_ptr,  # [gemm_n, gemm_k]
    bn_ptr,
    sums_ptr,  # [2, gemm_n] fp32
    gemm_n,
    gemm_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sums = (G1, rstd (sum_k W S - mean G1)), S and G1 the rows of cross."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for k0 in range(0, gemm_k, BLOCK_M):
        ks = k0 + tl.arange(0, BLOCK_M)
        valid = (ks < gemm_k)[:, None] & (cols < gemm_n)[None, :]
        s = tl.load(cross_ptr + ks[:, None] * gemm_n + cols[None, :], mask=valid, other=0.0)
        total += tl.sum(s * _load_weight(w_ptr, ks, cols, gemm_n, gemm_k).to(tl.float64), axis=0)
    sum_g = tl.load(cross_ptr + gemm_k * gemm_n + cols, mask=cols < gemm_n, other=0.0)
    mean = load_vector(bn_ptr, BN_MEAN, gemm_n, cols).to(tl.float64)
    sum_x = load_vector(bn_ptr, BN_RSTD, gemm_n, cols).to(tl.float64) * (total - mean * sum_g)
    tl.store(sums_ptr + cols, sum_g.to(tl.float32), mask=cols < gemm_n)
    tl.store(sums_ptr + gemm_n + cols, sum_x.to(tl.float32), mask=cols < gemm_n)


@triton.jit
def _weight_gradient_tile(
    cross_ptr, gram_ptr, w_ptr, coef_ptr, dw_ptr, w_g_ptr, ks, cols, gemm_n, gemm_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW[ks, cols] and (W diag(A))[ks, cols], stored as the weight lies.

    With mean = m W, M W = P Cov W + (sum a) mean, so that dW = S A + P (Cov W) B + (sum a) (C + B mean): what cancels
    in M W B + (sum a) C is kept out of the fp32 product.
    """
    inv_count = _inverse_count(gram_ptr, gemm_k)
    product, mean = _covariance_product(
        gram_ptr, w_ptr, inv_count, ks, cols, 0, gemm_k, gemm_n, gemm_k, BLOCK_M, BLOCK_N, BLOCK_K
    )
    valid = (ks < gemm_k)[:, None] & (cols < gemm_n)[None, :]
    a = load_vector(coef_ptr, 0, gemm_n, cols)
    b = load_vector(coef_ptr, 1, gemm_n, cols).to(tl.float64)
    c = load_vector(coef_ptr, 2, gemm_n, cols).to(tl.float64) + b * mean
    sum_a = tl.load(gram_ptr + gemm_k * (gemm_k + 1) + ks, mask=ks < gemm_k, other=0.0)
    s = tl.load(cross_ptr + ks[:, None] * gemm_n + cols[None, :], mask=valid, other=0.0)
    dw = s * a.to(tl.float64)[None, :] + product.to(tl.float64) * (b / inv_count)[None, :]
    dw += sum_a[:, None] * c[None, :]
    elements = cols[None, :] * gemm_k + ks[:, None]
    tl.store(dw_ptr + elements, dw.to(tl.float32), mask=valid)
    w_g = _load_weight(w_ptr, ks, cols, gemm_n, gemm_k) * a[None, :]
    tl.store(w_g_ptr + elements, w_g.to(w_g_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _input_weights_tile(
    w_ptr, coef_ptr, w_a_ptr, w_1_ptr, ks, js, with_w_1, gemm_n, gemm_k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(W diag(B) W^T)[ks, js] of BLOCK_M x BLOCK_M values, and (W C)[ks] if ``with_w_1``."""
    w_a = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    w_1 = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for n0 in range(0, gemm_n, BLOCK_K):
        cols = n0 + tl.arange(0, BLOCK_K)
        w_k = _load_weight(w_ptr, ks, cols, gemm_n, gemm_k)  # [BLOCK_M, BLOCK_K]
        w_j = _load_weight(w_ptr, js, cols, gemm_n, gemm_k)  # [BLOCK_M, BLOCK_K]
        scaled = w_k * load_vector(coef_ptr, 1, gemm_n, cols)[None, :]
        w_a += tl.dot(scaled, tl.trans(w_j), input_precision="tf32x3", max_num_imprecise_acc=BLOCK_K)
        w_1 += tl.sum(w_k.to(tl.float64) * load_vector(coef_ptr, 2, gemm_n, cols).to(tl.float64)[None, :], axis=1)
    valid = (ks < gemm_k)[:, None] & (js < gemm_k)[None, :]
    tl.store(w_a_ptr + ks[:, None] * gemm_k + js[None, :], w_a.to(w_a_ptr.dtype.element_ty), mask=valid)
    if with_w_1:
        tl.store(w_1_ptr + ks, w_1.to(tl.float32), mask=ks < gemm_k)


@triton.jit
def _moments_weights_kernel(
    cross_ptr,  # [gemm_k + 1, gemm_n] fp64
    gram_ptr,  # [gemm_k + 1, gemm_k + 1] fp64
    w_ptr,  # [gemm_n, gemm_k]
    coef_ptr,  # [3, gemm_n] fp32
    dw_ptr,  # [gemm_n, gemm_k] fp32
    w_g_ptr,  # [gemm_n, gemm_k]
    w_a_ptr,  # [gemm_k, gemm_k]
    w_1_ptr,  # [gemm_k] fp32
    gemm_n,
    gemm_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First the programs of w_a and w_1, whose sums over gemm_n are the longest; then those of dw and w_g."""
    tiles_k = tl.cdiv(gemm_k, BLOCK_M)
    program = tl.program_id(0)
    if program < tiles_k * tiles_k:
        tile_j = program % tiles_k
        ks = program // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
        js = tile_j * BLOCK_M + tl.arange(0, BLOCK_M)
        _input_weights_tile(w_ptr, coef_ptr, w_a_ptr, w_1_ptr, ks, js, tile_j == 0, gemm_n, gemm_k, BLOCK_M, BLOCK_K)
    else:
        program -= tiles_k * tiles_k
        ks = program % tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = program // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
        _weight_gradient_tile(
            cross_ptr, gram_ptr, w_ptr, coef_ptr, dw_ptr, w_g_ptr, ks, cols, gemm_n, gemm_k, BLOCK_M, BLOCK_N, BLOCK_K
        )


def _split(values: int, pixels: int) -> int:
    """Into how many chunks the pixels are split, for ``values`` results of each.

    256 programs of 128 x 128 values fill 132 SMs twice and leave partial results of 17 MB, whose way through L2 costs
    little beside the activations. Smaller results make shorter programs, at most 512; a chunk has 256 pixels or more.
    """
    return max(1, min(512, 2**22 // values, triton.cdiv(pixels, 256)))


def _check_input(a, stride: int) -> tuple[int, int, int, int]:
    """[N, K, P, Q] of every ``stride``-th row and column of the deferred activation ``a``; ValueError if unreadable."""
    require_rows("a", a.c)
    if stride < 1:
        raise ValueError(f"stride must be 1 or more; got {stride}")
    n, channels, h, w = a.c.shape
    if a.bn is not None:
        require_vectors("a.bn", a.bn, 5, channels)
    return n, channels, (h + stride - 1) // stride, (w + stride - 1) // stride


def _launch_products(a, g, mask, stride: int, out, values: int, plan):
    """out = [a 1]^T g, or with g None [a 1]^T [a 1], on checked operands; ``values``: results of a chunk of pixels."""
    n, gemm_m, out_h, out_w = _check_input(a, stride)
    gemm_n, config = (gemm_m if g is None else g.shape[1]), plan.config
    pixels = n * out_h * out_w
    chunks = _split(values, pixels)
    chunk_pixels = triton.cdiv(triton.cdiv(pixels, chunks), config.block_k) * config.block_k
    require_pixels(a.c, chunks * chunk_pixels + config.block_k)
    tiles = triton.cdiv(gemm_m, config.block_m) * triton.cdiv(gemm_n, config.block_n)
    parts = torch.empty((chunks, gemm_m + 1, gemm_n), dtype=torch.float32, device=out.device)
    precision = input_precision(a.c.dtype)
    with on_device_of(out):
        _moments_kernel[(chunks * tiles,)](
            a.c,
            a.bn,
            g,
            mask,
            parts,
            gemm_m,
            gemm_n,
            *a.c.shape[2:],
            out_h,
            out_w,
            pixels,
            chunk_pixels,
            STRIDE=stride,
            ONE_TILE=g is None and tiles == 1 and config.block_m == config.block_n,
            INPUT_PRECISION="tf32x3" if precision == "tf32" else precision,
            **tile_options(config),
        )
        # 4096 values at a time, 32 of each thread: latency is what this kernel costs.
        block_t = min(128, triton.next_power_of_2(chunks))
        block_n = min(4096 // block_t, triton.next_power_of_2((gemm_m + 1) * gemm_n))
        _add_chunks_kernel[(triton.cdiv((gemm_m + 1) * gemm_n, block_n),)](
            parts,
            out,
            chunks,
            gemm_m + 1,
            gemm_n,
            pixels,
            SYMMETRIC=g is None,
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            num_warps=4,
            num_stages=2,
        )
    return out


def launch_moments(a, stride, plan):
    """gram = [a 1]^T [a 1] over every stride-th pixel of relu(bn(a)), [K+1, K+1] float64: a: Deferred(c, bn | None).

    The activation is rounded to c's dtype, as the convolution that reads it rounds it.
    """
    channels = _check_input(a, stride)[1]
    gram = torch.empty((channels + 1, channels + 1), dtype=torch.float64, device=a.c.device)
    # The upper triangle in tiles of 128.
    return _launch_products(a, None, None, stride, gram, channels * (channels + 128) // 2, plan)


def launch_cross_moments(a, g, mask, stride, plan):
    """cross = [a 1]^T (g where mask) over pixels, [K+1, N] float64.

    a: Deferred(c [B, K, H, W], bn [5, K] | None), g [B, N, P, Q] in c's dtype on every stride-th row and column of it,
    mask: the ReLU bits of g, or None.
    """
    n, channels, out_h, out_w = _check_input(a, stride)
    require_rows("g", g)
    if (g.shape[0], *g.shape[2:]) != (n, out_h, out_w) or g.dtype != a.c.dtype:
        raise ValueError(f"g is {tuple(g.shape)} {g.dtype}; expected {(n, 'N', out_h, out_w)} {a.c.dtype}")
    if mask is not None:
        require_mask(mask, g)
    cross = torch.empty((channels + 1, g.shape[1]), dtype=torch.float64, device=g.device)
    return _launch_products(a, g, mask, stride, cross, channels * g.shape[1], plan)


def _check_weight(w) -> tuple[int, int]:
    """(N, K) of a contiguous weight [N, K, 1, 1]; ValueError."""
    if w.dim() != 4 or tuple(w.shape[2:]) != (1, 1) or not w.flatten(1).is_contiguous():
        raise ValueError(f"w must be a contiguous [N, K, 1, 1]; got {tuple(w.shape)}, strides {w.stride()}")
    return tuple(w.shape[:2])


def _require_moments(name: str, x, rows: int, columns: int) -> None:
    if x.shape != (rows, columns) or x.dtype != torch.float64 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp64 [{rows}, {columns}]; got {tuple(x.shape)} {x.dtype}")


def launch_moments_finalize(gram, w, gamma, beta, running, momentum, eps, plan):
    """bn [5, N] fp32 of c = a W from gram [K+1, K+1] and w [N, K, 1, 1], before c exists.

    gamma, beta [N] or None; ``running`` (mean, var, num_batches_tracked | None) is updated in place, the variance
    unbiased; momentum None: cumulative average, 1 / num_batches_tracked. gram may be the sum over several processes.
    """
    gemm_n, gemm_k = _check_weight(w)
    _require_moments("gram", gram, gemm_k + 1, gemm_k + 1)
    running_mean, running_var = (None, None) if running is None else running[:2]
    require_channels(gemm_n, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    mean, var, batches = count_batch(running, momentum)
    bn = torch.empty((5, gemm_n), dtype=torch.float32, device=w.device)
    with on_device_of(w):
        _moments_finalize_kernel[(triton.cdiv(gemm_n, plan.config.block_n),)](
            gram,
            w,
            gamma,
            beta,
            mean,
            var,
            batches,
            bn,
            gemm_n,
            gemm_k,
            0.0 if momentum is None else float(momentum),
            float(eps),
            CUMULATIVE=momentum is None,
            **tile_options(plan.config),
        )
    return bn


def launch_cross_sums(cross, w, bn, plan):
    """sums [1, 2, N] fp32 = (sum g, sum g * xhat) of c = a W from cross [K+1, N], w [N, K, 1, 1] and bn [5, N]."""
    gemm_n, gemm_k = _check_weight(w)
    _require_moments("cross", cross, gemm_k + 1, gemm_n)
    require_vectors("bn", bn, 5, gemm_n)
    sums = torch.empty((1, 2, gemm_n), dtype=torch.float32, device=w.device)
    with on_device_of(w):
        _cross_sums_kernel[(triton.cdiv(gemm_n, plan.config.block_n),)](
            cross,
            w,
            bn,
            sums,
            gemm_n,
            gemm_k,
            BLOCK_M=plan.config.block_m,
            BLOCK_N=plan.config.block_n,
            num_warps=plan.config.num_warps,
            num_stages=plan.config.num_stages,
        )
    return sums


def launch_moments_weights(cross, gram, w, coef, plan):
    """Weight gradient of c = a W and the matrices of its input gradient, da = g w_g + a w_a + w_1.

    cross [K+1, N], gram [K+1, K+1] of this process, w [N, K, 1, 1], coef [3, N] fp32 = (A, B, C). Returns
    dw [N, K, 1, 1] fp32, w_g = (W diag(A))^T [N, K] and w_a = W diag(B) W^T [K, K] in w's dtype, w_1 = W C [K] fp32.
    """
    gemm_n, gemm_k = _check_weight(w)
    _require_moments("cross", cross, gemm_k + 1, gemm_n)
    _require_moments("gram", gram, gemm_k + 1, gemm_k + 1)
    require_vectors("coef", coef, 3, gemm_n)
    dw = torch.empty((gemm_n, 1, 1, gemm_k), dtype=torch.float32, device=w.device).permute(0, 3, 1, 2)
    w_g = torch.empty((gemm_n, gemm_k), dtype=w.dtype, device=w.device)
    w_a = torch.empty((gemm_k, gemm_k), dtype=w.dtype, device=w.device)
    w_1 = torch.empty(gemm_k, dtype=torch.float32, device=w.device)
    tiles_k = triton.cdiv(gemm_k, plan.config.block_m)
    tiles_n = triton.cdiv(gemm_n, plan.config.block_n)
    with on_device_of(w):
        _moments_weights_kernel[(tiles_k * (tiles_k + tiles_n),)](
            cross, gram, w, coef, dw, w_g, w_a, w_1, gemm_n, gemm_k, **tile_options(plan.config)
        )
    return dw, w_g, w_a, w_1
