"""How much there is to do: the FLOP of a Problem, and the bytes that must cross memory for it."""

from __future__ import annotations

from typing import NamedTuple

from .problem import ITEMSIZE, Problem, statistics_rows


class Work(NamedTuple):
    """FLOP (a multiply-add is two) and bytes; their longer time at a card's ceilings is the least an operator takes."""

    flop: int
    bytes: int

    def seconds(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The least time on a card with these ceilings."""
        return max(self.flop / flop_per_s, self.bytes / bytes_per_s)


class _Sizes:
    """Sizes of a problem's tensors, in bytes. c and k are channels of the first tensor and of the convolution's output
    (an input gradient's first tensor is the gradient of the output, and its output that of the input)."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.item = ITEMSIZE[problem.dtype]
        self.pixels = problem.n * problem.h * problem.w
        self.grid = problem.n * -(-problem.h // problem.stride[0]) * -(-problem.w // problem.stride[1])
        self.weight = problem.k * (problem.c // problem.groups) * max(1, problem.r) * max(1, problem.s)

    def map(self, pixels: int, channels: int) -> int:
        return pixels * channels * self.item

    def mask(self, pixels: int, channels: int) -> int:
        return pixels * -(-channels // 8)

    def vectors(self, count: int, channels: int) -> int:
        return 4 * count * channels

    def rows(self, kinds: int, channels: int) -> int:
        return 4 * statistics_rows(channels) * kinds * channels

    def moments(self, columns: int) -> int:
        """fp64 [C + 1, columns]: moments and cross moments are summed and kept in fp64."""
        return 8 * (self.p.c + 1) * columns

    @property
    def deferred(self) -> int:
        """The bn of an input that comes deferred."""
        return self.vectors(5, self.p.c) if self.p.prologue else 0

    @property
    def read(self) -> int:
        """Pixels of the first tensor that a convolution reads: a 1x1 passes over those between its strides."""
        return self.grid if (self.p.r, self.p.s) == (1, 1) else self.pixels


def _convolution(s: _Sizes) -> Work:
    p, out = s.p, s.p.gemm_m
    moved = s.map(s.read, p.c) + s.weight * s.item + s.map(out, p.k) + s.deferred
    if p.epilogue == "stats":
        moved += s.rows(3, p.k)
    elif p.epilogue:
        moved += s.vectors(4, p.k) + (s.map(out, p.k) if p.epilogue == "affine+residual" else 0)
    return Work(2 * out * s.weight, moved)


def _affine_pool(s: _Sizes) -> Work:
    """A convolution with BatchNorm, whose output is pooled before it is written."""
    p, (height, width) = s.p, s.p.out_hw
    pooled = p.n * -(-height // 2) * -(-width // 2)
    moved = s.map(s.pixels, p.c) + s.weight * s.item + s.vectors(4, p.k) + s.map(pooled, p.k)
    return Work(2 * p.gemm_m * s.weight, moved)


def _bottleneck(s: _Sizes) -> Work:
    """c channels to 4 k, k inside."""
    p = s.p
    projection = p.epilogue == "projection"
    weight = p.c * p.k + p.k * (p.k // p.groups) * p.r * p.s + p.k * 4 * p.k + projection * p.c * 4 * p.k
    vectors = s.vectors(4, 2 * p.k + (1 + projection) * 4 * p.k)
    moved = s.map(s.pixels, p.c) + s.map(s.pixels, 4 * p.k) + weight * s.item + vectors
    return Work(2 * s.pixels * weight, moved)


def _join(s: _Sizes) -> Work:
    p, side = s.p, s.p.side
    moved = s.map(s.pixels, p.c) + s.deferred + (p.c + side) * p.k * s.item
    moved += s.map(s.pixels, p.k) + s.mask(s.pixels, p.k) + s.vectors(10 if side else 5, p.k)
    return Work(2 * s.pixels * (p.c + side) * p.k, moved + s.map(s.pixels, side or p.k))


def _dgrad(s: _Sizes) -> Work:
    p, out = s.p, s.p.gemm_m
    weight = p.c * (p.k // p.groups) * p.r * p.s
    moved = s.map(s.pixels, p.c) + weight * s.item + s.map(out, p.k)
    if p.prologue:
        moved += s.map(s.pixels, p.c) + s.vectors(3, p.c)
    if "relu" in p.epilogue:
        moved += s.map(out, p.k) + s.vectors(5, p.k) + s.rows(2, p.k)
    if "add" in p.epilogue:
        moved += s.map(out, p.k) + s.mask(out, p.k)
    return Work(2 * s.pixels * weight, moved)


def _wgrad(s: _Sizes) -> Work:
    p, out = s.p, s.p.gemm_m
    moved = s.map(s.read, p.c) + s.deferred + s.map(out, p.k) + 4 * s.weight  # the gradient of a weight is fp32
    if (p.r, p.s, p.stride) == (1, 1, (1, 1)):  # reads the gradient deferred
        moved += s.map(out, p.k) + s.vectors(3, p.k)
    return Work(2 * out * s.weight, moved)


def _moments(s: _Sizes) -> Work:
    return Work(2 * s.grid * s.p.c**2, s.map(s.grid, s.p.c) + s.deferred + s.moments(s.p.c + 1))


def _cross_moments(s: _Sizes) -> Work:
    p = s.p
    moved = s.map(s.grid, p.c + p.k) + s.mask(s.grid, p.k) + s.deferred + s.moments(p.k)
    return Work(2 * s.grid * p.c * p.k, moved)


def _dgrad_moments(s: _Sizes) -> Work:
    p = s.p
    moved = s.map(s.grid, p.k + p.c) + s.mask(s.grid, p.k) + (p.k + p.c) * p.c * s.item + s.vectors(1, p.c)
    moved += s.map(s.grid, p.c) + s.deferred + (s.rows(2, p.c) if p.prologue else 0)
    return Work(2 * s.grid * (p.k + p.c) * p.c, moved)


def _matrix(s: _Sizes) -> Work:
    """A small product of a weight [N, C] and moments; n is N."""
    p = s.p
    weight = p.n * p.c
    moved = weight * s.item
    if p.op == "moments_finalize":
        moved += s.moments(p.c + 1) + s.vectors(9, p.n)
    elif p.op == "cross_sums":
        moved += s.moments(p.n) + s.vectors(7, p.n)
    else:  # moments_weights: dw in fp32, both weights of the input gradient, and a vector
        moved += s.moments(p.n) + s.moments(p.c + 1) + s.vectors(3, p.n)
        moved += 4 * weight + (weight + p.c**2) * s.item + s.vectors(1, p.c)
    return Work(2 * weight * p.c, moved)


def _pool(s: _Sizes) -> Work:
    p = s.p
    pooled = p.n * -(-p.h // 2) * -(-p.w // 2) * p.c
    moved = s.map(s.pixels, p.c) + s.vectors(5, p.c) + pooled * (s.item + 1)
    if p.op == "bn_act_pool_backward":
        moved += s.map(s.pixels, p.c) + s.rows(2, p.c)
    return Work(0, moved)


# Elementwise operators: maps, bits of a mask, per-channel vectors, and rows of sums that cross memory.
_MAPS = {
    "bn_act": (2, 0, 5, 0),
    "bn_join": (3, 1, 5, 0),
    "bn_act_sums": (3, 0, 5, 2),
    "join_sums": (2, 1, 5, 2),
    "relu_grad": (2, 1, 0, 0),
    "bn_backward_apply": (3, 0, 3, 0),
}
# Operators on per-channel vectors: rows of the first tensor aside, vectors that cross memory.
_VECTORS = {"bn_finalize": 9, "merge_partials": 3, "bn_frozen": 8, "bn_backward_finalize": 10}
_FAMILIES = {
    "conv2d": _convolution,  # the library's, bare
    "conv_stats": _convolution,
    "conv_affine": _convolution,
    "conv_affine_pool": _affine_pool,
    "bottleneck_affine": _bottleneck,
    "conv1x1_join": _join,
    "conv_dgrad": _dgrad,
    "conv_wgrad": _wgrad,
    "moments": _moments,
    "cross_moments": _cross_moments,
    "conv1x1_dgrad_moments": _dgrad_moments,
    "moments_finalize": _matrix,
    "cross_sums": _matrix,
    "moments_weights": _matrix,
    "bn_act_pool": _pool,
    "bn_act_pool_backward": _pool,
}


def work_of(problem: Problem) -> Work:
    """FLOP of a problem's products, and bytes of its arguments and results, each read or written once.

    Elementwise arithmetic counts nothing. Optional arguments are those of the residual blocks. KeyError for an operator
    without a count.
    """
    p, sizes = problem, _Sizes(problem)
    if p.op in _MAPS:
        maps, bits, vectors, sums = _MAPS[p.op]
        moved = maps * sizes.map(sizes.pixels, p.c) + bits * sizes.mask(sizes.pixels, p.c)
        return Work(0, moved + sizes.vectors(vectors, p.c) + sizes.rows(sums, p.c))
    if p.op in _VECTORS:
        return Work(0, 4 * sizes.pixels * p.c + sizes.vectors(_VECTORS[p.op], p.c))
    return _FAMILIES[p.op](sizes)
