"""What BatchNorm and its gradients need of a 1x1 convolution c = a W, from moments alone.

With gram [K+1, K+1] = [a 1]^T [a 1] and cross [K+1, N] = [a 1]^T g, both fp64, of P pixels (`moments`), M and sum a the
blocks of gram, S and G1 those of cross, m = sum a / P, Cov = M / P - m m^T, and W [K, N] as the weight [N, K] holds it:

    finalize    mean = m W        var = sum_k W (Cov W)        -> bn [5, N]
    sums        G1, rstd (sum_k W S - mean G1)                 -> sums [1, 2, N]
    weights     dw = S diag(A) + M W diag(B) + (sum a) C^T,  w_g = (W diag(A))^T,  w_a = W diag(B) W^T,  w_1 = W C

as `reference.moments_finalize`, `reference.cross_sums` and `reference.moments_weights` derive them.

These products are small, and what they cost is the longest chain of steps that one program waits for. So the variance
is split over tiles of input channels, too, whose parts [tiles, 2, N] fp64 a second kernel adds in order: at K = 512 and
N = 2048 the longest chain has 16 steps of 32 channels, where a program for all of K would have 40, even with the
symmetry of Cov.

The difference Cov is taken in fp64. After it nothing cancels that much, and products with Cov run at fp32 precision,
on tensor cores as three products of TF32 values: in fp64 they would be exact to no purpose and, on cards with a 64th of
the rate, slow.
"""

import torch
import triton
import triton.language as tl

from . import count_batch, map_options, on_device_of, require_channels, require_vectors, tile_options
from .epilogue import BN_MEAN, BN_RSTD, load_vector, store_bn, update_running


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

    Channels below ``twice`` count double in the product and not at all in m W.
    """
    sums_ptr = gram_ptr + gemm_k * (gemm_k + 1)
    mean_k = tl.load(sums_ptr + ks, mask=ks < gemm_k, other=0.0) * inv_count
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    mean = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float64)
    for j0 in range(0, stop, BLOCK_K):
        js = j0 + tl.arange(0, BLOCK_K)
        valid = (ks < gemm_k)[:, None] & (js < stop)[None, :]
        second = tl.load(gram_ptr + ks[:, None] * (gemm_k + 1) + js[None, :], mask=valid, other=0.0) * inv_count
        mean_j = tl.load(sums_ptr + js, mask=js < stop, other=0.0) * inv_count
        cov = (second - mean_k[:, None] * mean_j[None, :]).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        cov = tl.where((js < twice)[None, :], cov + cov, cov)
        w = _load_weight(w_ptr, js, cols, gemm_n, gemm_k)  # [BLOCK_K, BLOCK_N]
        product += tl.dot(cov, w, input_precision="tf32x3", max_num_imprecise_acc=BLOCK_K)
        mean += tl.where(js < twice, 0.0, mean_j)[:, None] * w.to(tl.float64)
    return product, tl.sum(mean, axis=0)


@triton.jit
def _variance_parts_kernel(
    gram_ptr,  # [gemm_k + 1, gemm_k + 1] fp64
    w_ptr,  # [gemm_n, gemm_k]
    parts_ptr,  # [tiles of input channels, 2, gemm_n] fp64
    gemm_n,
    gemm_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What a tile of input channels adds to mean and var at one of output channels; those of the most steps first.

    Cov is symmetric: what lies to the left of the tile on the diagonal counts twice, what lies to its right not.
    """
    tiles_n = tl.cdiv(gemm_n, BLOCK_N)
    tile = tl.cdiv(gemm_k, BLOCK_M) - 1 - tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tile * BLOCK_M
    ks = first + tl.arange(0, BLOCK_M)
    stop = tl.minimum(first + BLOCK_M, gemm_k)
    inv_count = _inverse_count(gram_ptr, gemm_k)
    product, mean = _covariance_product(
        gram_ptr, w_ptr, inv_count, ks, cols, first, stop, gemm_n, gemm_k, BLOCK_M, BLOCK_N, BLOCK_K
    )
    w = _load_weight(w_ptr, ks, cols, gemm_n, gemm_k)
    var = tl.sum(w.to(tl.float64) * product.to(tl.float64), axis=0)
    tl.store(parts_ptr + tile * 2 * gemm_n + cols, mean, mask=cols < gemm_n)
    tl.store(parts_ptr + (tile * 2 + 1) * gemm_n + cols, var, mask=cols < gemm_n)


@triton.jit
def _moments_finalize_kernel(
    gram_ptr,  # [gemm_k + 1, gemm_k + 1] fp64
    parts_ptr,  # [tiles, 2, gemm_n] fp64
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,  # int64 scalar, read only: the batches counted so far, this one included
    bn_ptr,
    gemm_n,
    gemm_k,
    tiles,  # of input channels
    momentum,
    eps,
    CUMULATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """bn at BLOCK_N output channels, from the parts of mean and var."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inv_count = _inverse_count(gram_ptr, gemm_k)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float64)
    var = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for tile in range(tiles):
        mean += tl.load(parts_ptr + tile * 2 * gemm_n + cols, mask=cols < gemm_n, other=0.0)
        var += tl.load(parts_ptr + (tile * 2 + 1) * gemm_n + cols, mask=cols < gemm_n, other=0.0)
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
    w_1 = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for n0 in range(0, gemm_n, BLOCK_K):
        cols = n0 + tl.arange(0, BLOCK_K)
        w_k = _load_weight(w_ptr, ks, cols, gemm_n, gemm_k)  # [BLOCK_M, BLOCK_K]
        w_j = _load_weight(w_ptr, js, cols, gemm_n, gemm_k)  # [BLOCK_M, BLOCK_K]
        scaled = w_k * load_vector(coef_ptr, 1, gemm_n, cols)[None, :]
        w_a += tl.dot(scaled, tl.trans(w_j), input_precision="tf32x3", max_num_imprecise_acc=BLOCK_K)
        w_1 += w_k * load_vector(coef_ptr, 2, gemm_n, cols)[None, :]
    valid = (ks < gemm_k)[:, None] & (js < gemm_k)[None, :]
    tl.store(w_a_ptr + ks[:, None] * gemm_k + js[None, :], w_a.to(w_a_ptr.dtype.element_ty), mask=valid)
    if with_w_1:
        tl.store(w_1_ptr + ks, tl.sum(w_1, axis=1), mask=ks < gemm_k)


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
    config = plan.config
    tiles_k, tiles_n = triton.cdiv(gemm_k, config.block_m), triton.cdiv(gemm_n, config.block_n)
    parts = torch.empty((tiles_k, 2, gemm_n), dtype=torch.float64, device=w.device)
    with on_device_of(w):
        _variance_parts_kernel[(tiles_k * tiles_n,)](gram, w, parts, gemm_n, gemm_k, **tile_options(config))
        _moments_finalize_kernel[(tiles_n,)](
            gram,
            parts,
            gamma,
            beta,
            mean,
            var,
            batches,
            bn,
            gemm_n,
            gemm_k,
            tiles_k,
            0.0 if momentum is None else float(momentum),
            float(eps),
            CUMULATIVE=momentum is None,
            BLOCK_N=config.block_n,
            num_warps=1,
            num_stages=2,
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
            **map_options(plan.config),
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
