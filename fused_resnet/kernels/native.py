"""Launch functions of the optional C++/CUDA library (csrc/), with the signatures of the Triton ones.

The library is loaded when one of them first runs, never at import.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import (
    empty_mask,
    empty_rows,
    require_frozen,
    require_like,
    require_mask,
    require_rows,
    require_vectors,
    tap_major,
)

_FILE = "_C.abi3.so"


@lru_cache
def unavailable() -> str | None:
    """Why the library cannot be used, None if it is loaded."""
    path = Path(__file__).parent.parent / _FILE
    if not path.exists():
        return f"{_FILE} was not built (FUSED_RESNET_CUDA=1 pip install --no-build-isolation . says why)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{_FILE} does not load with PyTorch {torch.__version__}: {error}"
    return None


def _library():
    missing = unavailable()
    if missing is not None:
        raise RuntimeError(f"the CUDA library is not available: {missing}")
    return torch.ops.fused_resnet_cuda


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()


def launch_bn_finalize(partials, gamma, beta, running, momentum, eps, plan):
    """bn [5, C] from partials [T, 3, C]; `running` (mean, var, num_batches_tracked | None), fp32, updated in place."""
    if momentum is not None and momentum < 0:
        raise ValueError(f"momentum: expected None or a number from 0 to 1, got {momentum}")
    mean, var, counter = running if running is not None else (None, None, None)
    bn = torch.empty((5, partials.shape[2]), dtype=torch.float32, device=partials.device)
    weight = -1.0 if momentum is None else momentum
    _library().bn_finalize(partials, _float(gamma), _float(beta), mean, var, counter, weight, eps, bn)
    return bn


def launch_bn_frozen(running_mean, running_var, gamma, beta, eps, plan):
    """bn [5, C] from running statistics [C], which any dtype may hold; its last row is 0."""
    mean = running_mean.float()
    bn = torch.empty((5, mean.shape[0]), dtype=torch.float32, device=mean.device)
    _library().bn_frozen(mean, running_var.float(), _float(gamma), _float(beta), eps, bn)
    return bn


def launch_bn_join(main, shortcut, plan):
    """(out, mask): out = relu(c * scale + shift + s), s the shortcut or its affine; mask = bits of out > 0."""
    out, mask = empty_rows(*main.c.shape, like=main.c), empty_mask(main.c)
    _library().bn_join(main.c, main.bn, shortcut.c, shortcut.bn, out, mask)
    return out, mask


# Kernels for sm90: 16-bit data, channels in multiples of 64, convolutions of padding 1, dilation 1 and one group


def _require_geometry(geometry, strides: tuple[int, ...]) -> int:
    """The stride of a 3x3 convolution that keeps the extent up to it; ValueError for another geometry."""
    pairs = [tuple(pair) for pair in geometry[:3]]
    if pairs[0] not in [(s, s) for s in strides] or pairs[1:] != [(1, 1), (1, 1)] or geometry.groups != 1:
        expected = " or ".join(map(str, strides))
        raise ValueError(f"{geometry}: expected stride {expected}, padding 1, dilation 1 and one group")
    return pairs[0][0]


def _frozen(bn, channels: int) -> tuple[list[Tensor | None], float]:
    """([mean, var, gamma | None, beta | None] in fp32, eps) of a Frozen; the kernel makes scale and shift of them."""
    *vectors, eps = require_frozen(bn, channels)
    return [_float(vector) for vector in vectors], eps


def _conv3x3_output(x, w, stride):
    """Check the operands of a 3x3 convolution and allocate its output [N, K, P, Q]; ValueError."""
    require_rows("x", x)
    if tuple(w.shape[1:]) != (x.shape[1], 3, 3) or w.dtype != x.dtype:
        raise ValueError(f"weight is {tuple(w.shape)} {w.dtype}; expected [K, {x.shape[1]}, 3, 3] {x.dtype}")
    return empty_rows(x.shape[0], w.shape[0], *(-(-extent // stride) for extent in x.shape[2:]), like=x)


def _written(a):
    """The tensor of a Deferred that needs no BatchNorm any more; ValueError for one that does."""
    if a.bn is not None:
        raise ValueError("a must be written out (bn_act), not deferred: the kernel has no prologue")
    return a.c


def launch_conv3x3_stats(a, w, geometry, plan):
    """c = conv(a, w) and its channel statistics: (c [N, K, P, Q], partials [T, 3, K] fp32: count, mean, M2).

    a: Deferred(x [N, C, H, W], None); w [K, C, 3, 3], copied if it is not in channels_last memory. The rows of partials
    cover shares of the pixels that follow from the shape alone, and so do their bits.
    """
    x, stride = _written(a), _require_geometry(geometry, (1, 2))
    out = _conv3x3_output(x, w, stride)
    partials = torch.empty((plan.statistics_rows(w.shape[0]), 3, w.shape[0]), dtype=torch.float32, device=x.device)
    _library().conv3x3_stats_sm90(x, tap_major(w), stride, out, partials)
    return out, partials


def launch_conv3x3_affine(x, w, bn, residual, relu, geometry, plan):
    """out = conv(x, w) * scale + shift [+ residual] [relu]; residual [N, K, P, Q] or None.

    bn: Frozen(mean, var, gamma | None, beta | None, eps), running statistics [K].
    """
    stride = _require_geometry(geometry, (1, 2))
    out = _conv3x3_output(x, w, stride)
    vectors, eps = _frozen(bn, w.shape[0])
    if residual is not None:
        require_like("residual", residual, out)
    _library().conv3x3_affine_sm90(x, tap_major(w), vectors, eps, residual, None, relu, stride, out)
    return out


def launch_conv3x3_dgrad(grad, w, geometry, input_hw, relu_of, addend, addend_stride, plan):
    """dx = conv_transpose(g, w) + addend, and (sum dx, sum dx * xhat) [T, 2, C] if ``relu_of`` masks it, else None.

    Of stride 1, so a convolution itself, with the taps turned round and the channels exchanged:

        dx[n, h, w, c] = sum_{r, s, k} g[n, h - 1 + r, w - 1 + s, k] w[k, c, 2 - r, 2 - s]

    grad: Gradient with g [N, K, H, W] alone, not deferred; addend: Gradient(g, mask) on every pixel (addend_stride 1);
    one of ``relu_of`` and ``addend`` at most.
    """
    if grad.mask is not None or grad.coef is not None:
        raise ValueError("the gradient must be written out (bn_backward_apply), not deferred")
    stride = _require_geometry(geometry, (1,))
    if tuple(input_hw) != tuple(grad.g.shape[2:]):
        raise ValueError(f"input_hw is {tuple(input_hw)}; expected {tuple(grad.g.shape[2:])}, as the gradient has")
    if addend is not None and (relu_of is not None or addend.coef is not None or addend_stride != 1):
        raise ValueError("an addend must be written out, lie on every pixel, and come without relu_of")
    g, turned = grad.g, w.flip(2, 3).transpose(0, 1)
    dx = _conv3x3_output(g, turned, stride)
    weight = tap_major(turned)
    if relu_of is None:
        mask = None
        if addend is not None:
            require_like("addend", addend.g, dx)
            mask = None if addend.mask is None else require_mask(addend.mask, dx)
        side = None if addend is None else addend.g
        _library().conv3x3_affine_sm90(g, weight, [], 0.0, side, mask, False, 1, dx)
        return dx, None
    require_like("relu_of", relu_of.c, dx)
    require_vectors("relu_of.bn", relu_of.bn, 5, dx.shape[1])
    sums = torch.empty((plan.statistics_rows(dx.shape[1]), 2, dx.shape[1]), dtype=torch.float32, device=g.device)
    _library().conv3x3_relu_grad_sm90(g, weight, relu_of.c, relu_of.bn, dx, sums)
    return dx, sums


def _wgrad_parts(k: int, c: int, pixels: int) -> int:
    """Rows of partial results: blocks for about 132 SMs, of 512 pixels or more each, from the shape alone.

    A block has a row of taps, 64 channels and 256, 128 or 64 filters; one of 64 leaves two rows.
    """
    block_filters = next(filters for filters in (256, 128, 64) if k % filters == 0)
    blocks = 3 * (c // 64) * (k // block_filters)
    chunks = max(1, min(132 // blocks, -(-pixels // 512)))
    return chunks * (2 if block_filters == 64 else 1)


def launch_conv3x3_wgrad(a, grad, w_shape, geometry, plan):
    """dw = sum over pixels of g times the shifted a, [K, C, 3, 3] fp32 in channels_last memory.

    a: Deferred(x [N, C, H, W], None); grad: Gradient with g [N, K, P, Q] alone, not deferred.
    """
    x, stride = _written(a), _require_geometry(geometry, (1, 2))
    if grad.mask is not None or grad.coef is not None:
        raise ValueError("the gradient must be written out (bn_backward_apply), not deferred")
    k, c = w_shape[:2]
    if tuple(w_shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(f"w_shape is {tuple(w_shape)}; expected [K, {x.shape[1]}, 3, 3]")
    g = require_rows("g", grad.g)
    expected = x.shape[0], k, *(-(-extent // stride) for extent in x.shape[2:])
    if tuple(g.shape) != expected or g.dtype != x.dtype:
        raise ValueError(f"g is {tuple(g.shape)} {g.dtype}; expected {expected} {x.dtype}")
    count = _wgrad_parts(k, c, g.shape[0] * g.shape[2] * g.shape[3])
    dw = torch.empty((k, 3, 3, c), dtype=torch.float32, device=x.device)
    parts = torch.empty((count, *dw.shape), dtype=torch.float32, device=x.device) if count > 1 else dw.unsqueeze(0)
    _library().conv3x3_wgrad_sm90(require_rows("a", x), g, stride, parts, dw)
    return dw.permute(0, 3, 1, 2)


def launch_bottleneck_affine(x, weights, bns, geometry, plan):
    """out = relu(bn3(a2 W3) + s) of a bottleneck, [N, 256, H, W], in one kernel; `reference` has the rest.

    weights [64, C, 1, 1], [64, 64, 3, 3], [256, 64, 1, 1], and [256, 64, 1, 1] if the shortcut is a projection; x has
    C = 256 channels, or 64 with a projection. bns: Frozen of each weight's output.
    """
    _require_geometry(geometry, (1,))
    channels = 256 if len(weights) == 3 else 64
    expected = ((64, channels, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (256, 64, 1, 1))
    for i, (w, shape) in enumerate(zip(weights, expected)):
        if tuple(w.shape) != shape or w.dtype != x.dtype:
            raise ValueError(f"weights[{i}] is {tuple(w.shape)} {w.dtype}; expected {shape} {x.dtype}")
    n, c, height, width = require_rows("x", x).shape
    if c != channels:
        raise ValueError(f"x is {tuple(x.shape)}; expected {channels} channels")
    out = empty_rows(n, 256, height, width, like=x)
    matrices = [tap_major(w) if w.shape[2] == 3 else w.flatten(1).contiguous() for w in weights]
    vectors, eps = zip(*(_frozen(bn, w.shape[0]) for w, bn in zip(weights, bns)))
    _library().bottleneck_affine_sm90(x, matrices, [v for four in vectors for v in four], eps, out)
    return out
