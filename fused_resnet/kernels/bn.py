"""BatchNorm around convolutions: per-channel vectors, and the elementwise passes that no convolution absorbs.

Activations are rows [pixels, C], c the raw output of a convolution, (mean, rstd, scale, shift, inv_count) the rows of
bn [5, C] and (A, B, C) those of coef [3, C], all fp32:

    vectors     partials [T, 3, C] -> bn, and running statistics in place; sums [T, 2, C] -> coef, dgamma, dbeta
    forward     y = relu?(c * scale + shift)          out = relu(c * scale + shift + s), mask = out > 0
    backward    g = dy where c * scale + shift > 0    dc = A * (g where mask) + B * c + C
                sums[t] = (sum g, sum g * xhat) over chunk t of consecutive pixels, xhat = (c - mean) * rstd

Sums inside a chunk run in fp32; T rows are merged in fp64, in row order, by one program per channel tile. fp64 is slow
on desktop cards, but there are only T * C values. No atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from . import (
    count_batch,
    empty_mask,
    empty_rows,
    map_options,
    on_device_of,
    require_channels,
    require_deferred,
    require_gradient,
    require_like,
    require_mask,
    require_partials,
    require_rows,
    require_vectors,
)
from .epilogue import (
    BN_INV_COUNT,
    BN_MEAN,
    BN_RSTD,
    BN_SCALE,
    BN_SHIFT,
    affine,
    load_mask,
    load_vector,
    merge_statistics,
    reduce_statistics,
    relu,
    store_bn,
    store_mask,
    update_running,
)


@triton.jit
def _merge_rows(partials_ptr, rows, channels, cols, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """(count, mean, M2) [BLOCK_N] fp64 over the rows of partials [rows, 3, channels] at ``cols``; some may be empty."""
    count = tl.zeros((BLOCK_N,), dtype=tl.float64)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float64)
    m2 = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for t0 in range(0, rows, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        valid = (t < rows)[:, None] & (cols < channels)[None, :]
        pointers = partials_ptr + t.to(tl.int64)[:, None] * 3 * channels + cols[None, :]  # [BLOCK_T, BLOCK_N]
        row_count = tl.load(pointers, mask=valid, other=0.0).to(tl.float64)
        row_mean = tl.load(pointers + channels, mask=valid, other=0.0).to(tl.float64)
        row_m2 = tl.load(pointers + 2 * channels, mask=valid, other=0.0).to(tl.float64)
        block_count = tl.sum(row_count, axis=0)
        block_mean, block_m2 = reduce_statistics(block_count, row_count, row_mean, row_m2)
        count, mean, m2 = merge_statistics(count, mean, m2, block_count, block_mean, block_m2)
    return count, mean, m2


@triton.jit
def _bn_finalize_kernel(
    partials_ptr,
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,  # int64 scalar, read only: the batches counted so far, this one included
    bn_ptr,
    rows,
    channels,
    momentum,
    eps,
    CUMULATIVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count, mean, m2 = _merge_rows(partials_ptr, rows, channels, cols, BLOCK_T, BLOCK_N)
    var = m2 / tl.maximum(count, 1.0)
    store_bn(bn_ptr, channels, cols, mean, var, 1.0 / tl.maximum(count, 1.0), gamma_ptr, beta_ptr, eps)
    if running_mean_ptr is not None:
        update_running(
            running_mean_ptr, running_var_ptr, batches_ptr, channels, cols, mean, var, count, momentum, CUMULATIVE
        )


@triton.jit
def _merge_partials_kernel(partials_ptr, merged_ptr, rows, channels, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count, mean, m2 = _merge_rows(partials_ptr, rows, channels, cols, BLOCK_T, BLOCK_N)
    tl.store(merged_ptr + cols, count.to(tl.float32), mask=cols < channels)
    tl.store(merged_ptr + channels + cols, mean.to(tl.float32), mask=cols < channels)
    tl.store(merged_ptr + 2 * channels + cols, m2.to(tl.float32), mask=cols < channels)


@triton.jit
def _bn_frozen_kernel(mean_ptr, var_ptr, gamma_ptr, beta_ptr, bn_ptr, channels, eps, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.load(mean_ptr + cols, mask=cols < channels, other=0.0).to(tl.float64)
    var = tl.load(var_ptr + cols, mask=cols < channels, other=1.0).to(tl.float64)
    store_bn(bn_ptr, channels, cols, mean, var, tl.zeros((BLOCK_N,), tl.float64), gamma_ptr, beta_ptr, eps)


@triton.jit
def _tile(row0, row_limit, first_col, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns [BLOCK_N]; 32-bit offsets from element row0 * channels, and validity, [BLOCK_M, BLOCK_N]."""
    row = tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    valid = (row0 + row < row_limit)[:, None] & (cols < channels)[None, :]
    return cols, row[:, None] * channels + cols[None, :], valid


@triton.jit
def _load_affine(c_ptr, bn_ptr, elements, valid, cols, channels):
    """c * scale + shift in fp32, [M, N]; bn_ptr None: c."""
    c = tl.load(c_ptr + elements, mask=valid, other=0.0).to(tl.float32)
    if bn_ptr is not None:
        scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
        c = affine(c, scale, load_vector(bn_ptr, BN_SHIFT, channels, cols))
    return c


@triton.jit(do_not_specialize=["pixels"])
def _bn_act_kernel(
    c_ptr,
    bn_ptr,
    shortcut_ptr,  # None: no join
    shortcut_bn_ptr,
    out_ptr,
    mask_ptr,
    pixels,
    channels,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = relu?(c * scale + shift [+ s]); s the shortcut or its affine; mask = out > 0."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    row0 = tl.program_id(0) // tiles_n * BLOCK_M
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    start = row0.to(tl.int64) * channels
    cols, elements, valid = _tile(row0, pixels, first_col, channels, BLOCK_M, BLOCK_N)
    y = _load_affine(c_ptr + start, bn_ptr, elements, valid, cols, channels)
    if shortcut_ptr is not None:
        y += _load_affine(shortcut_ptr + start, shortcut_bn_ptr, elements, valid, cols, channels)
    if RELU:
        y = relu(y)
    tl.store(out_ptr + start + elements, y.to(out_ptr.dtype.element_ty), mask=valid)
    if mask_ptr is not None:
        store_mask(mask_ptr, y > 0, row0, pixels, first_col, channels, BLOCK_M, BLOCK_N)


@triton.jit
def _xhat(c, bn_ptr, channels, cols):
    """(c - mean) * rstd, [M, N]."""
    return (c - load_vector(bn_ptr, BN_MEAN, channels, cols)[None, :]) * load_vector(bn_ptr, BN_RSTD, channels, cols)


@triton.jit(do_not_specialize=["pixels", "chunk_pixels"])
def _sums_kernel(
    g_ptr,
    mask_ptr,  # ReLU bits | None
    c_ptr,
    bn_ptr,
    shortcut_ptr,  # raw output of the shortcut's convolution | None
    shortcut_bn_ptr,
    masked_ptr,  # where to write g where the affine of c is positive | None: g is not masked by c
    sums_ptr,  # [T, 2, channels]
    shortcut_sums_ptr,
    pixels,
    channels,
    chunk_pixels,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sums[t] = (sum g, sum g * xhat) over chunk t; one program per chunk and channel tile."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)
    # Tiles are added up elementwise and reduced once: fewer exchanges between threads, shorter chains of additions.
    total_g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total_x = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total_s = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(tl.cdiv(stop - start, BLOCK_M)):
        row0 = start + tile * BLOCK_M
        tile_start = row0.to(tl.int64) * channels
        _, elements, valid = _tile(row0, stop, first_col, channels, BLOCK_M, BLOCK_N)
        g = tl.load(g_ptr + tile_start + elements, mask=valid, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + tile_start + elements, mask=valid, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            g = tl.where(load_mask(mask_ptr, row0, stop, first_col, channels, BLOCK_M, BLOCK_N), g, 0.0)
        if masked_ptr is not None:
            scale = load_vector(bn_ptr, BN_SCALE, channels, cols)
            g = tl.where(affine(c, scale, load_vector(bn_ptr, BN_SHIFT, channels, cols)) > 0, g, 0.0)
            tl.store(masked_ptr + tile_start + elements, g.to(masked_ptr.dtype.element_ty), mask=valid)
        # Out of range g is 0, so what xhat is there does not matter.
        total_g += g
        total_x += g * _xhat(c, bn_ptr, channels, cols)
        if shortcut_ptr is not None:
            s = tl.load(shortcut_ptr + tile_start + elements, mask=valid, other=0.0).to(tl.float32)
            total_s += g * _xhat(s, shortcut_bn_ptr, channels, cols)
    row_ptr = sums_ptr + chunk.to(tl.int64) * 2 * channels + cols
    sum_g = tl.sum(total_g, axis=0)
    tl.store(row_ptr, sum_g, mask=cols < channels)
    tl.store(row_ptr + channels, tl.sum(total_x, axis=0), mask=cols < channels)
    if shortcut_ptr is not None:
        shortcut_row_ptr = shortcut_sums_ptr + chunk.to(tl.int64) * 2 * channels + cols
        tl.store(shortcut_row_ptr, sum_g, mask=cols < channels)
        tl.store(shortcut_row_ptr + channels, tl.sum(total_s, axis=0), mask=cols < channels)


@triton.jit
def _sum_rows(sums_ptr, rows, channels, cols, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """(sum g, sum g * xhat) [BLOCK_N] fp64 over the rows of sums [rows, 2, channels]."""
    total_g = tl.zeros((BLOCK_N,), dtype=tl.float64)
    total_x = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for t0 in range(0, rows, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        valid = (t < rows)[:, None] & (cols < channels)[None, :]
        pointers = sums_ptr + t.to(tl.int64)[:, None] * 2 * channels + cols[None, :]
        total_g += tl.sum(tl.load(pointers, mask=valid, other=0.0).to(tl.float64), axis=0)
        total_x += tl.sum(tl.load(pointers + channels, mask=valid, other=0.0).to(tl.float64), axis=0)
    return total_g, total_x


@triton.jit
def _bn_backward_finalize_kernel(
    sums_ptr,
    total_ptr,  # sums over all processes | None: those of this one
    bn_ptr,
    coef_ptr,
    dgamma_ptr,
    dbeta_ptr,
    rows,
    total_rows,
    channels,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = cols < channels
    sum_g, sum_x = _sum_rows(sums_ptr, rows, channels, cols, BLOCK_T, BLOCK_N)
    tl.store(dgamma_ptr + cols, sum_x.to(tl.float32), mask=valid)
    tl.store(dbeta_ptr + cols, sum_g.to(tl.float32), mask=valid)
    if total_ptr is not None:
        sum_g, sum_x = _sum_rows(total_ptr, total_rows, channels, cols, BLOCK_T, BLOCK_N)
    mean = load_vector(bn_ptr, BN_MEAN, channels, cols).to(tl.float64)
    rstd = load_vector(bn_ptr, BN_RSTD, channels, cols).to(tl.float64)
    scale = load_vector(bn_ptr, BN_SCALE, channels, cols).to(tl.float64)
    inv_count = load_vector(bn_ptr, BN_INV_COUNT, channels, cols).to(tl.float64)
    b = -scale * rstd * sum_x * inv_count
    c = -scale * sum_g * inv_count - b * mean
    tl.store(coef_ptr + cols, scale.to(tl.float32), mask=valid)
    tl.store(coef_ptr + channels + cols, b.to(tl.float32), mask=valid)
    tl.store(coef_ptr + 2 * channels + cols, c.to(tl.float32), mask=valid)


@triton.jit(do_not_specialize=["pixels"])
def _bn_backward_apply_kernel(
    g_ptr, mask_ptr, c_ptr, coef_ptr, out_ptr, pixels, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out = A * (g where mask) + B * c + C; coef_ptr None: g where mask."""
    tiles_n = tl.cdiv(channels, BLOCK_N)
    row0 = tl.program_id(0) // tiles_n * BLOCK_M
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    start = row0.to(tl.int64) * channels
    cols, elements, valid = _tile(row0, pixels, first_col, channels, BLOCK_M, BLOCK_N)
    out = tl.load(g_ptr + start + elements, mask=valid, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        out = tl.where(load_mask(mask_ptr, row0, pixels, first_col, channels, BLOCK_M, BLOCK_N), out, 0.0)
    if coef_ptr is not None:
        c = tl.load(c_ptr + start + elements, mask=valid, other=0.0).to(tl.float32)
        out = affine(out, load_vector(coef_ptr, 0, channels, cols), load_vector(coef_ptr, 2, channels, cols))
        out += c * load_vector(coef_ptr, 1, channels, cols)[None, :]
    tl.store(out_ptr + start + elements, out.to(out_ptr.dtype.element_ty), mask=valid)


def _pixels(x) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _vector_options(config) -> dict:
    return {"BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages}


def _tile_grid(x, config) -> tuple[int]:
    return (triton.cdiv(_pixels(x), config.block_m) * triton.cdiv(x.shape[1], config.block_n),)


def launch_bn_finalize(partials, gamma, beta, running, momentum, eps, plan):
    """bn [5, C] from partials [T, 3, C]; ``running`` (mean, var, num_batches_tracked | None) updated in place.

    gamma, beta [C] or None; momentum None: cumulative average, 1 / num_batches_tracked. The rows may come from several
    processes. The running variance is unbiased.
    """
    require_partials("partials", partials, 3)
    rows, _, channels = partials.shape
    running_mean, running_var = (None, None) if running is None else running[:2]
    require_channels(channels, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    mean, var, batches = count_batch(running, momentum)
    bn = torch.empty((5, channels), dtype=torch.float32, device=partials.device)
    with on_device_of(bn):
        _bn_finalize_kernel[(triton.cdiv(channels, plan.config.block_n),)](
            partials,
            gamma,
            beta,
            mean,
            var,
            batches,
            bn,
            rows,
            channels,
            0.0 if momentum is None else float(momentum),
            float(eps),
            CUMULATIVE=momentum is None,
            BLOCK_T=plan.config.block_m,
            **_vector_options(plan.config),
        )
    return bn


def launch_merge_partials(partials, plan):
    """The rows of partials [T, 3, C] merged into one, [1, 3, C]."""
    require_partials("partials", partials, 3)
    rows, _, channels = partials.shape
    merged = torch.empty((1, 3, channels), dtype=torch.float32, device=partials.device)
    with on_device_of(merged):
        _merge_partials_kernel[(triton.cdiv(channels, plan.config.block_n),)](
            partials, merged, rows, channels, BLOCK_T=plan.config.block_m, **_vector_options(plan.config)
        )
    return merged


def launch_bn_frozen(running_mean, running_var, gamma, beta, eps, plan):
    """bn [5, C] of running statistics [C], with inv_count 0: constants in backward."""
    channels = running_mean.shape[0]
    require_channels(channels, running_mean=running_mean, running_var=running_var, gamma=gamma, beta=beta)
    bn = torch.empty((5, channels), dtype=torch.float32, device=running_mean.device)
    with on_device_of(bn):
        _bn_frozen_kernel[(triton.cdiv(channels, plan.config.block_n),)](
            running_mean, running_var, gamma, beta, bn, channels, float(eps), **_vector_options(plan.config)
        )
    return bn


def launch_affine(c, bn, shortcut, shortcut_bn, mask, relu, plan):
    """out = relu?(c * scale + shift [+ s]) in the dtype of c, [N, C, H, W]; s the shortcut or its affine.

    bn, shortcut and shortcut_bn may be None; mask takes the bits out > 0, or is None. The pass behind the library's
    convolution (`conv_library`), and all of the launches below.
    """
    out = empty_rows(*c.shape, like=c)
    if out.numel():
        with on_device_of(out):
            _bn_act_kernel[_tile_grid(out, plan.config)](
                c,
                bn,
                shortcut,
                shortcut_bn,
                out,
                mask,
                _pixels(out),
                out.shape[1],
                RELU=relu,
                **map_options(plan.config),
            )
    return out


def launch_bn_act(a, relu, plan):
    """y = relu?(c * scale + shift) written out, [N, C, H, W] in the dtype of c; a.bn None: relu?(c)."""
    require_deferred("a", a)
    return launch_affine(*a, None, None, None, relu, plan)


def launch_bn_join(main, shortcut, plan):
    """out = relu(c * scale + shift + s), s = shortcut.c or its BatchNorm; and the bits out > 0."""
    require_deferred("main", main)
    require_deferred("shortcut", shortcut)
    require_like("shortcut", shortcut.c, main.c)
    mask = empty_mask(main.c)
    return launch_affine(*main, *shortcut, mask, True, plan), mask


def _launch_sums(g, mask, main, shortcut, masked, plan):
    require_deferred("c", main)
    require_like("gradient", g, main.c)
    if main.bn is None:
        raise ValueError("sums of a gradient are taken against a BatchNorm; there is none")
    n, channels, h, w = g.shape
    rows = plan.statistics_rows(channels)
    chunk = plan.chunk_pixels(n * h * w, rows)
    sums = torch.empty((rows, 2, channels), dtype=torch.float32, device=g.device)
    shortcut_sums = torch.empty_like(sums) if shortcut is not None else None
    with on_device_of(g):
        _sums_kernel[(rows * triton.cdiv(channels, plan.config.block_n),)](
            g,
            None if mask is None else require_mask(mask, g),
            main.c,
            main.bn,
            None if shortcut is None else require_like("shortcut", shortcut.c, main.c),
            None if shortcut is None else require_vectors("shortcut.bn", shortcut.bn, 5, channels),
            masked,
            sums,
            shortcut_sums,
            n * h * w,
            channels,
            chunk,
            **map_options(plan.config),
        )
    return sums, shortcut_sums


def launch_bn_act_sums(dy, a, plan):
    """g = dy where c * scale + shift > 0, in the dtype of dy, and sums [T, 2, C] of it against a's BatchNorm."""
    g = empty_rows(*dy.shape, like=dy)
    sums, _ = _launch_sums(dy, None, a, None, g, plan)
    return g, sums


def launch_join_sums(dout, mask, main, shortcut, plan):
    """Sums [T, 2, C] of g = dout where mask against main's BatchNorm, and the shortcut's (None if it has none)."""
    return _launch_sums(dout, mask, main, shortcut if shortcut.bn is not None else None, None, plan)


def launch_bn_backward_finalize(sums, bn, total, plan):
    """coef [3, C], dgamma [C] and dbeta [C], fp32, from sums [T, 2, C]; ``total``: the sums over all processes."""
    require_partials("sums", sums, 2)
    rows, _, channels = sums.shape
    require_vectors("bn", bn, 5, channels)
    if total is not None and require_partials("total", total, 2).shape[2] != channels:
        raise ValueError(f"total has {total.shape[2]} channels, sums {channels}")
    coef = torch.empty((3, channels), dtype=torch.float32, device=sums.device)
    dgamma = torch.empty(channels, dtype=torch.float32, device=sums.device)
    dbeta = torch.empty_like(dgamma)
    with on_device_of(sums):
        _bn_backward_finalize_kernel[(triton.cdiv(channels, plan.config.block_n),)](
            sums,
            total,
            bn,
            coef,
            dgamma,
            dbeta,
            rows,
            0 if total is None else total.shape[0],
            channels,
            BLOCK_T=plan.config.block_m,
            **_vector_options(plan.config),
        )
    return coef, dgamma, dbeta


def launch_bn_backward_apply(grad, plan):
    """dc = A * (g where mask) + B * c + C in the dtype of g; mask None: all of g; coef None: g where mask."""
    g, mask, c, coef = require_gradient(grad)
    out = empty_rows(*g.shape, like=g)
    if out.numel():
        with on_device_of(g):
            _bn_backward_apply_kernel[_tile_grid(g, plan.config)](
                g,
                mask,
                c,
                coef,
                out,
                _pixels(g),
                g.shape[1],
                **map_options(plan.config),
            )
    return out


def launch_relu_grad(dout, mask, plan):
    """dout where the ReLU's bits ``mask`` are set, written out."""
    require_rows("dout", dout)
    require_mask(mask, dout)
    out = empty_rows(*dout.shape, like=dout)
    if out.numel():
        with on_device_of(out):
            _bn_backward_apply_kernel[_tile_grid(out, plan.config)](
                dout, mask, None, None, out, _pixels(out), out.shape[1], **map_options(plan.config)
            )
    return out
