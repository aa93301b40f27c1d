"""The mathematics of every fused operator, forward and backward, in plain PyTorch on any device and in any dtype.

Each function here is the specification of one operator `fused_resnet::<name>`, and the implementation that runs where
no kernel does. The kernels are tested against these functions in float64.

Conventions
    Activations are [N, C, H, W] tensors in channels_last memory, weights [C_out, C_in / groups, R, S]. "Accumulator
    dtype" is float32 for float16, bfloat16 and float32 data, and float64 for float64.

    A BatchNorm in use is one tensor `bn` [5, C] in the accumulator dtype, rows MEAN, RSTD, SCALE, SHIFT, INV_COUNT:

        scale = gamma * rstd        shift = beta - mean * scale        bn(c) = c * scale + shift

    INV_COUNT is 1 / (values per channel) for batch statistics and 0 for running ("frozen") statistics. It is the only
    place where the two differ in backward, because the gradient of the statistics is proportional to it.

    A *deferred* activation is a pair (c, bn) that stands for relu(c * scale + shift), which nobody writes to memory; a
    *deferred* gradient (g, mask, c, coef) stands for A * (g where mask) + B * c + C.

Sources: Ioffe and Szegedy 2015 (BatchNorm, section 3), He et al. 2015 (residual blocks), Chan, Golub and LeVeque 1979
(merging of variances). The derivation of BatchNorm from the moments of the input is in `moments_finalize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, RSTD, SCALE, SHIFT, INV_COUNT = range(5)


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution, each (height, width), and its number of groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Deferred(NamedTuple):
    """Stands for relu(c * scale + shift); without `bn`, for `c` itself."""

    c: Tensor
    bn: Tensor | None = None


class Gradient(NamedTuple):
    """Stands for A * (g where mask) + B * c + C with `coef` [3, C] = (A, B, C); without `coef`, for g where mask."""

    g: Tensor
    mask: Tensor | None = None
    c: Tensor | None = None
    coef: Tensor | None = None


class Frozen(NamedTuple):
    """A BatchNorm with running statistics, as its buffers and parameters lie in memory; gamma, beta None: 1 and 0.

    Inference kernels make scale and shift of it in fp32 themselves, so that nothing cached can be out of date.
    """

    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class Running(NamedTuple):
    """The buffers of a BatchNorm that training updates in place: [C], [C] and a 0-dimensional int64 counter."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None = None


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N*H*W, C], in memory order for a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last memory; x itself if it is so already.

    The strides are those of a fresh allocation even where an extent of 1 leaves them open, since tracers hold an
    operator to the strides that its fake kernel announced.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, c, h, w = x.shape
    strides = (c * h * w, 1, c * w, c)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def affine(c: Tensor, bn: Tensor) -> Tensor:
    """c * scale + shift in the accumulator dtype, [N, C, H, W]."""
    return torch.addcmul(_per_channel(bn[SHIFT]), c.to(bn.dtype), _per_channel(bn[SCALE]))


def _activation(a: Deferred) -> Tensor:
    return a.c if a.bn is None else affine(a.c, a.bn).relu_().to(a.c.dtype)


def pack_mask(positive: Tensor) -> Tensor:
    """Bits of a boolean [N, C, H, W], as uint8 [N, H, W, ceil(C / 8)]: bit i of byte j is channel 8 j + i."""
    bits = F.pad(positive.permute(0, 2, 3, 1).to(torch.uint8), (0, -positive.shape[1] % 8)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=positive.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """The inverse of `pack_mask`: uint8 [N, H, W, ceil(C / 8)] -> boolean [N, C, H, W]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :channels]
    return bits.bool().permute(0, 3, 1, 2)


def _masked(g: Tensor, mask: Tensor | None) -> Tensor:
    return g if mask is None else g * unpack_mask(mask, g.shape[1])


def _gradient(grad: Gradient) -> Tensor:
    """The value a deferred gradient stands for, in the dtype of g."""
    g = _masked(grad.g, grad.mask)
    if grad.coef is None:
        return g
    a, b, c = (_per_channel(row) for row in grad.coef)
    return (a * g.to(a.dtype) + b * grad.c.to(a.dtype) + c).to(grad.g.dtype)


# Statistics and vectors of a BatchNorm


def channel_partials(c: Tensor) -> Tensor:
    """Statistics (count, mean, M2 = sum (c - mean)^2) of each channel: [1, 3, C], accumulator dtype.

    The kernels return [T, 3, C], a row for each chunk of pixels; here one row counts them all.
    """
    rows = _rows(c).to(accumulator_dtype(c.dtype))
    if rows.shape[0] == 0:  # one of several processes may have no image
        return rows.new_zeros(1, 3, rows.shape[1])
    var, mean = torch.var_mean(rows, 0, correction=0)
    return torch.stack((torch.full_like(mean, rows.shape[0]), mean, var * rows.shape[0])).unsqueeze(0)


def merge_partials(partials: Tensor) -> Tensor:
    """Merge the rows (count, mean, M2) of [T, 3, C] into one, [1, 3, C] (Chan et al. 1979).

    n = sum n_t, mean = sum n_t mean_t / n, M2 = sum M2_t + n_t (mean_t - mean)^2. There is no E[x^2] - E[x]^2, which
    would cancel for a channel whose mean is large against its deviation.
    """
    count, mean, m2 = partials.unbind(1)
    total = count.sum(0)
    merged = (count * mean).sum(0) / total.clamp(min=1)
    return torch.stack((total, merged, (m2 + count * (mean - merged).square()).sum(0))).unsqueeze(0)


def _bn_vectors(
    mean: Tensor, var: Tensor, inv_count: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
    shift = -mean * scale if beta is None else beta.to(rstd.dtype) - mean * scale
    return torch.stack((mean, rstd, scale, shift, inv_count))


def _update_running(running: Running, mean: Tensor, var: Tensor, count: Tensor, momentum: float | None) -> None:
    """running <- (1 - momentum) running + momentum batch, in place; the variance unbiased (count / (count - 1))."""
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 1.0 / running.num_batches_tracked.to(mean.dtype)
    unbiased = var * (count / (count - 1))
    for buffer, value in ((running.mean, mean), (running.var, unbiased)):
        buffer.copy_(buffer.to(mean.dtype).lerp(value, torch.as_tensor(momentum, dtype=mean.dtype, device=mean.device)))


def bn_finalize(
    partials: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running: Running | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Batch statistics from partial ones: [T, 3, C] -> bn [5, C]; `running` is updated in place.

    rstd = 1 / sqrt(M2 / n + eps). `momentum=None` is the cumulative average 1 / num_batches_tracked. The rows of
    `partials` may come from several processes (SyncBatchNorm).
    """
    count, mean, m2 = merge_partials(partials)[0]
    var = m2 / count
    if running is not None:
        _update_running(running, mean, var, count, momentum)
    return _bn_vectors(mean, var, count.reciprocal(), gamma, beta, eps)


def bn_frozen(
    running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Running statistics as bn [5, C] with INV_COUNT 0: they are constants in backward."""
    dtype = accumulator_dtype(running_mean.dtype)
    mean = running_mean.to(dtype)
    return _bn_vectors(mean, running_var.to(dtype), torch.zeros_like(mean), gamma, beta, eps)


# Forward


def conv_stats(a: Deferred, w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """A raw convolution and its channel statistics: c = conv(a, w), partials [1, 3, K] (`channel_partials`).

    Zero padding applies to relu(c * scale + shift), after the BatchNorm of a deferred input.
    """
    c = channels_last(F.conv2d(_activation(a), w, None, *geometry))
    return c, channel_partials(c)


def conv_affine(x: Tensor, w: Tensor, bn: Frozen, residual: Tensor | None, relu: bool, geometry: Geometry) -> Tensor:
    """out = relu?(conv(x, w) * scale + shift + residual), rounded once; [N, K, P, Q] in the dtype of x.

    scale = gamma / sqrt(var + eps) and shift = beta - mean * scale, of running statistics: for inference.
    """
    out = affine(F.conv2d(x, w, None, *geometry), bn_frozen(*bn))
    if residual is not None:
        out += residual
    return channels_last((out.relu_() if relu else out).to(x.dtype))


def bottleneck_affine(x: Tensor, weights: Sequence[Tensor], bns: Sequence[Frozen], geometry: Geometry) -> Tensor:
    """A whole bottleneck at one resolution for inference: out = relu(bn3(a2 W3) + s), [N, 4K, H, W].

        a1 = relu(bn1(x W1))        a2 = relu(bn2(conv(a1, W2)))        s = x, or bn4(x W4) of a fourth weight

    x [N, C, H, W], weights W1 [K, C, 1, 1], W2 [K, K, 3, 3] with `geometry`, which keeps H and W, W3 [4K, K, 1, 1],
    W4 [4K, C, 1, 1] or none where C = 4K; a1 and a2 are rounded to the dtype of x, and s may be. Zero padding applies
    to a1, after its BatchNorm and ReLU.
    """
    s = conv_affine(x, weights[3], bns[3], None, False, Geometry()) if len(weights) > 3 else x
    a1 = conv_affine(x, weights[0], bns[0], None, True, Geometry())
    a2 = conv_affine(a1, weights[1], bns[1], None, True, geometry)
    return conv_affine(a2, weights[2], bns[2], s, True, Geometry())


def conv_affine_pool(x: Tensor, w: Tensor, bn: Frozen, geometry: Geometry) -> Tensor:
    """y = max_pool(relu(conv(x, w) * scale + shift), 3x3, stride 2, padding 1): the stem in inference, rounded once.

    x [N, C, H, W] -> [N, K, ceil(P / 2), ceil(Q / 2)] for a convolution to P x Q, in the dtype of x.
    """
    return channels_last(F.max_pool2d(conv_affine(x, w, bn, None, True, geometry), 3, 2, 1))


def bn_act(a: Deferred, relu: bool) -> Tensor:
    """relu?(c * scale + shift) written out."""
    out = affine(a.c, a.bn)
    return channels_last((out.relu_() if relu else out).to(a.c.dtype))


def _join(out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return channels_last(out.relu().to(dtype)), pack_mask(out > 0)


def bn_join(main: Deferred, shortcut: Deferred) -> tuple[Tensor, Tensor]:
    """The end of a residual block: out = relu(bn(c) + s), with s = shortcut.c or, if it has a bn, bn_s(shortcut.c).

    Returns out and the bits out > 0 (`pack_mask`), all that backward needs of it.
    """
    s = shortcut.c if shortcut.bn is None else affine(shortcut.c, shortcut.bn)
    return _join(affine(main.c, main.bn) + s, main.c.dtype)


def conv1x1_join(
    a: Deferred,
    w: Tensor,
    bn: Tensor,
    shortcut: Tensor,
    w_shortcut: Tensor | None,
    bn_shortcut: Tensor | None,
    stride_shortcut: int,
) -> tuple[Tensor, Tensor]:
    """The end of a bottleneck in one kernel: out = relu(bn(a W) + s), with s = shortcut or bn_s(shortcut W_s).

    The convolution's raw output is never stored, which is possible in training too because its statistics follow from
    the moments of `a` (`moments_finalize`). Returns out and the bits out > 0.
    """
    out = affine(F.conv2d(_activation(a), w), bn)
    if w_shortcut is None:
        return _join(out + shortcut, a.c.dtype)
    return _join(out + affine(F.conv2d(shortcut, w_shortcut, stride=stride_shortcut), bn_shortcut), a.c.dtype)


def moments(a: Deferred, stride: int) -> Tensor:
    """First and second moments of a 1x1 convolution's input: [a 1]^T [a 1] over pixels, [K+1, K+1] float64.

    The last row and column hold the sums of a, the corner the number of pixels. Sums of several processes add up.
    """
    x = _augmented(a, stride)
    return x.T @ x


def _augmented(a: Deferred, stride: int) -> Tensor:
    """[a 1] as float64 rows, [pixels, K+1], of every stride-th pixel."""
    rows = _rows(_activation(a)[:, :, ::stride, ::stride]).double()
    return torch.cat((rows, rows.new_ones(rows.shape[0], 1)), 1)


def moments_finalize(
    gram: Tensor,
    w: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running: Running | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """BatchNorm statistics of c = a W before c exists, from the moments of a.

    With P pixels, m = sum_p a_p / P, M = a^T a (K x K) and Cov = M / P - m m^T:

        mean_n = m . W[:, n]        var_n = W[:, n]^T Cov W[:, n]

    gram [K+1, K+1] float64 from `moments`, w [N, K, 1, 1] as the convolution uses it. Float64 throughout, since
    M / P - m m^T cancels. Returns bn [5, N].
    """
    total = gram[-1, -1]
    m = gram[-1, :-1] / total
    cov = gram[:-1, :-1] / total - torch.outer(m, m)
    weight = w.flatten(1).double()
    mean = weight @ m
    var = ((weight @ cov) * weight).sum(1).clamp(min=0)
    if running is not None:
        _update_running(running, mean, var, total, momentum)
    inv_count = total.reciprocal().expand_as(mean)
    return _bn_vectors(mean, var, inv_count, gamma, beta, eps).to(accumulator_dtype(w.dtype))


def bn_act_pool(a: Deferred) -> tuple[Tensor, Tensor]:
    """Max-pool 3x3, stride 2, padding 1 of relu(c * scale + shift), [N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)].

    Also returns the winning tap 3 r + s of each window, uint8; the first of equal ones wins, as in F.max_pool2d.
    """
    y, flat = F.max_pool2d(_activation(a), 3, 2, 1, return_indices=True)
    rows = torch.arange(y.shape[2], device=y.device).view(-1, 1) * 2 - 1
    cols = torch.arange(y.shape[3], device=y.device) * 2 - 1
    width = a.c.shape[3]
    tap = (flat // width - rows) * 3 + (flat % width - cols)
    return channels_last(y), channels_last(tap.to(torch.uint8))


# Backward


def channel_sums(g: Tensor, c: Tensor, bn: Tensor) -> Tensor:
    """(sum g, sum g * xhat) of each channel, xhat = (c - mean) * rstd: [1, 2, C]; kernels return a row per chunk."""
    g = g.to(bn.dtype)
    xhat = (c.to(bn.dtype) - _per_channel(bn[MEAN])) * _per_channel(bn[RSTD])
    return torch.stack((g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3)))).unsqueeze(0)


def bn_act_sums(dy: Tensor, a: Deferred) -> tuple[Tensor, Tensor]:
    """Backward of the ReLU behind a BatchNorm: g = dy where c * scale + shift > 0, and its `channel_sums`."""
    g = channels_last(dy * (affine(a.c, a.bn) > 0))
    return g, channel_sums(g, a.c, a.bn)


def relu_grad(dout: Tensor, mask: Tensor) -> Tensor:
    """dout where the ReLU's output was positive, [N, C, H, W], written out."""
    return channels_last(_masked(dout, mask))


def join_sums(dout: Tensor, mask: Tensor, main: Deferred, shortcut: Deferred) -> tuple[Tensor, Tensor | None]:
    """`channel_sums` of g = dout where mask against the block's last BatchNorm, and against the shortcut's if any."""
    g = _masked(dout, mask)
    return channel_sums(g, *main), None if shortcut.bn is None else channel_sums(g, *shortcut)


def bn_backward_finalize(sums: Tensor, bn: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of a BatchNorm's backward, dc = A g + B c + C, and its parameters' gradients.

    With Tg = sum g, Tx = sum g xhat over all processes (`total`; default: `sums`) and inv = INV_COUNT:

        A = scale      B = -scale * rstd * Tx * inv      C = -scale * Tg * inv - B * mean
        dbeta = sum g  dgamma = sum g * xhat             (over this process: the data-parallel wrapper averages them)

    sums [T, 2, C]. Returns coef [3, C], dgamma [C], dbeta [C]. Source: Ioffe and Szegedy 2015, section 3, rearranged.
    """
    dbeta, dgamma = sums.sum(0).unbind()
    tg, tx = (dbeta, dgamma) if total is None else total.sum(0).unbind()
    mean, rstd, scale, _, inv = bn
    b = -scale * rstd * tx * inv
    coef = torch.stack((scale, b, -scale * tg * inv - b * mean))
    return coef, dgamma.clone(), dbeta.clone()


def bn_backward_apply(grad: Gradient) -> Tensor:
    """dc = A * (g where mask) + B * c + C written out, in the dtype of g."""
    return channels_last(_gradient(grad))


def conv_dgrad(
    grad: Gradient,
    w: Tensor,
    geometry: Geometry,
    input_hw: tuple[int, int],
    relu_of: Deferred | None = None,
    addend: Gradient | None = None,
    addend_stride: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Input gradient of a convolution: dx = conv_transpose(dc, w) + addend, [N, C, H, W] with (H, W) = input_hw.

    With `relu_of`, the deferred activation that the convolution read, the result is g = dx where its affine is > 0, and
    its `channel_sums` come back too. `addend` is the gradient of the shortcut (g and mask only); it lies on every
    `addend_stride`-th row and column of dx.
    """
    dc = _gradient(grad)
    n, c = dc.shape[0], w.shape[1] * geometry.groups
    dx = torch.ops.aten.convolution_backward(
        dc, dc.new_empty(n, c, *input_hw), w, None, *geometry[:3], False, [0, 0], geometry.groups, [True, False, False]
    )[0]
    if addend is not None:
        dx[:, :, ::addend_stride, ::addend_stride] += _gradient(addend)
    if relu_of is None:
        return channels_last(dx), None
    return bn_act_sums(dx, relu_of)


def conv_wgrad(a: Deferred, grad: Gradient, w_shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Weight gradient dw = sum over pixels of a (shifted by the tap) times dc, w_shape, in the accumulator dtype."""
    dc = _gradient(grad)
    w, outputs = dc.new_empty(w_shape), [False, True, False]
    dw = torch.ops.aten.convolution_backward(
        dc, _activation(a), w, None, *geometry[:3], False, [0, 0], geometry.groups, outputs
    )[1]
    return channels_last(dw.to(accumulator_dtype(dc.dtype)))


def cross_moments(a: Deferred, g: Tensor, mask: Tensor | None, stride: int) -> Tensor:
    """[a 1]^T (g where mask) over pixels, [K+1, N] float64: the weight gradient S on the raw gradient, and sum g."""
    return _augmented(a, stride).T @ _rows(_masked(g, mask)).double()


def cross_sums(cross: Tensor, w: Tensor, bn: Tensor) -> Tensor:
    """`channel_sums` of g against c = a W without c: [1, 2, N], with S, G1 = the rows of cross [K+1, N].

    sum g xhat = rstd * (sum_k W[k, n] S[k, n] - mean_n G1_n)
    """
    s, g1 = cross[:-1], cross[-1]
    gx = bn[RSTD] * ((w.flatten(1).double().T * s).sum(0) - bn[MEAN] * g1)
    return torch.stack((g1, gx)).unsqueeze(0).to(bn.dtype)


def moments_weights(cross: Tensor, gram: Tensor, w: Tensor, coef: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight gradient of c = a W, and the matrices of its input gradient, from the moments of a.

    From dc = A g + B c + C, c = a W and S = a^T g, M = a^T a:

        dW = S diag(A) + M W diag(B) + (sum a) C^T
        da = g (W diag(A))^T + a (W diag(B) W^T) + W C

    cross [K+1, N], gram [K+1, K+1] (of this process), w [N, K, 1, 1], coef [3, N]. Returns dw [N, K, 1, 1] in the
    accumulator dtype, w_g = (W diag(A))^T [N, K] and w_a [K, K] in the dtype of w, w_1 = W C [K] in that of coef.
    """
    a, b, c = coef.double()
    weight = w.flatten(1).double().T
    dw = cross[:-1] * a + (gram[:-1, :-1] @ weight) * b + torch.outer(gram[-1, :-1], c)
    w_a = (weight * b) @ weight.T
    return (
        channels_last(dw.T.reshape(w.shape).to(coef.dtype)),
        (weight * a).T.contiguous().to(w.dtype),
        w_a.to(w.dtype),
        (weight @ c).to(coef.dtype),
    )


def conv1x1_dgrad_moments(
    dout: Tensor, mask: Tensor | None, w_g: Tensor, a: Deferred, w_a: Tensor, w_1: Tensor, stride: int
) -> tuple[Tensor, Tensor | None]:
    """Input gradient of c = a W without c: da = g w_g + a w_a + w_1 with g = dout where mask (`moments_weights`).

    a counts on every stride-th row and column, and da has the extent of g. With a.bn (stride 1) the result is masked
    by the ReLU of `a`, and its `channel_sums` come back too.
    """
    acc = accumulator_dtype(dout.dtype)

    def product(x: Tensor, w: Tensor) -> Tensor:
        # A convolution for PyTorch's switch: TF32 is allowed to gradients of convolutions, not to matrix products.
        return F.conv2d(x.to(acc), w.T[:, :, None, None].to(acc))

    da = product(_masked(dout, mask), w_g) + product(_activation(a)[:, :, ::stride, ::stride], w_a)
    da = (da + _per_channel(w_1)).to(dout.dtype)
    return (channels_last(da), None) if a.bn is None else bn_act_sums(da, a)


def bn_act_pool_backward(dy: Tensor, index: Tensor, a: Deferred) -> tuple[Tensor, Tensor]:
    """Backward of `bn_act_pool`: each dy goes to its window's winning tap and through the ReLU; also `channel_sums`."""
    n, c, h, w = a.c.shape
    rows = torch.arange(dy.shape[2], device=dy.device).view(-1, 1) * 2 - 1 + index // 3
    cols = torch.arange(dy.shape[3], device=dy.device) * 2 - 1 + index % 3
    da = dy.new_zeros(n, c, h * w).scatter_add_(2, (rows * w + cols).long().flatten(2), dy.flatten(2))
    return bn_act_sums(da.view(n, c, h, w), a)
