"""Forward and backward of a residual block, a lone convolution + BatchNorm, and the stem, over the operators of `ops`.

Saved for backward are the block's input, the raw convolution outputs, per-channel vectors and one bit per output
element; normalised activations are recomputed where they are read.

Two schemes end a bottleneck in training:
    "stored"   its last convolution's raw output c3 is written with its statistics; a second pass normalises and joins.
    "moments"  the statistics come from the moments of the convolution's input, so that convolution, BatchNorm, shortcut
               and ReLU are one kernel and c3 never exists, in backward neither (`reference.moments_finalize`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from . import plan as planning
from .ops import Deferred, Geometry, Gradient
from .reference import channels_last

_op = torch.ops.fused_resnet


class ConvBN(NamedTuple):
    """A convolution without bias and the BatchNorm behind it: one unit of a residual block.

    w [K, C / groups, R, S]; gamma, beta [K] or None. `running_mean`, `running_var` [K] are read if `batch_stats` is
    False (and constant in backward), and updated in place if it is True; None: not tracked. These vectors have the
    dtype of the activations, or float32 beside 16 bit. `momentum=None` is the cumulative average. `sync`: name of the
    process group over which statistics are shared, "" for none.
    """

    w: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    geometry: Geometry
    eps: float = 1e-5
    momentum: float | None = 0.1
    batch_stats: bool = True
    sync: str = ""


def output_hw(w_shape: Sequence[int], geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    (sh, sw), (ph, pw), (dh, dw), _ = geometry
    r, s = w_shape[2:]
    return (height + 2 * ph - dh * (r - 1) - 1) // sh + 1, (width + 2 * pw - dw * (s - 1) - 1) // sw + 1


def _pointwise(w: Tensor, geometry: Geometry) -> bool:
    """A plain 1x1 convolution: no padding, one group, one stride for both directions."""
    (sh, sw), padding, _, groups = geometry
    return tuple(w.shape[2:]) == (1, 1) and tuple(padding) == (0, 0) and groups == 1 and sh == sw


def _dense(w: Tensor, geometry: Geometry) -> bool:
    """A plain 1x1 convolution of stride 1: a matrix product, which may read deferred operands."""
    return _pointwise(w, geometry) and tuple(geometry.stride) == (1, 1)


class Options(NamedTuple):
    """What a chain of units ends with. `scheme`: "stored" or "moments"; `identity`: the shortcut is the input."""

    identity: bool
    relu: bool
    scheme: str
    impl: str


# Statistics, shared between processes where a unit says so


def _gather(rows: Tensor, group: str) -> Tensor:
    """[1, ...] of every process of the group, [world, ...], in rank order: merging is then the same on each of them."""
    world = torch.distributed.distributed_c10d._resolve_process_group(group).size()
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), world, group)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def _finalize(unit: ConvBN, partials: Tensor, impl: str) -> Tensor:
    if not unit.batch_stats:
        return _op.bn_frozen(unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.eps, impl)
    if unit.sync:
        partials = _gather(_op.merge_partials(partials, impl), unit.sync)
    buffers = unit.running_mean, unit.running_var, unit.num_batches_tracked
    return _op.bn_finalize(partials, unit.gamma, unit.beta, *buffers, unit.momentum, unit.eps, impl)


def _moments(unit: ConvBN, a: Deferred, w: Tensor, impl: str) -> tuple[Tensor | None, Tensor]:
    """This process's moments of the unit's input (None for running statistics, which need none) and the unit's bn."""
    if not unit.batch_stats:
        return None, _finalize(unit, None, impl)
    gram = _op.moments(*a, unit.geometry.stride[0], impl)
    total = _gather(gram.unsqueeze(0), unit.sync).sum(0) if unit.sync else gram
    buffers = unit.running_mean, unit.running_var, unit.num_batches_tracked
    return gram, _op.moments_finalize(total, w, unit.gamma, unit.beta, *buffers, unit.momentum, unit.eps, impl)


def _backward_finalize(unit: ConvBN, sums: Tensor, bn: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    total = None
    if unit.sync and unit.batch_stats:
        total = _gather(sums.sum(0, keepdim=True), unit.sync)
    return _op.bn_backward_finalize(sums, bn, total, impl)


# Forward and backward of a chain, free of autograd's context so that a longer chain can own several


class Saved(NamedTuple):
    """What backward needs. `inner`: the deferred outputs of all units but the last; `last`: (c, bn) or (gram, bn) of
    the last unit, `last_shortcut` likewise; `mask`: the output's ReLU bits, None if its ReLU can be recomputed."""

    x: Tensor
    weights: tuple[Tensor, ...]
    inner: tuple[Deferred, ...]
    last: tuple[Tensor | None, Tensor]
    last_shortcut: tuple[Tensor | None, Tensor | None]
    mask: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        """All of it as a flat list, for autograd to keep."""
        inner = [t for d in self.inner for t in d]
        return [self.x, self.mask, *self.last, *self.last_shortcut, *inner, *self.weights]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor | None], units: int) -> Saved:
        """The inverse of `tensors` for a chain of that many units."""
        x, mask, *rest = tensors
        inner = tuple(Deferred(*rest[4 + 2 * i : 6 + 2 * i]) for i in range(units - 1))
        return Saved(x, tuple(rest[2 + 2 * units :]), inner, tuple(rest[:2]), tuple(rest[2:4]), mask)


def _conv_bn(unit: ConvBN, a: Deferred, w: Tensor, impl: str) -> Deferred:
    c, partials = _op.conv_stats(*a, w, *unit.geometry, impl)
    return Deferred(c, _finalize(unit, partials, impl))


def chain_forward(
    x: Tensor, residual: Tensor | None, units: Sequence[ConvBN], shortcut: ConvBN | None, options: Options
) -> tuple[Tensor, Saved]:
    """out = relu?(BN(conv(... relu(BN(conv(x))))) + s), with s = BN(conv(x)) | x | residual | nothing; for training.

    Shapes, dtypes as for `residual_block`, which checks them; x and residual are channels_last.
    """
    impl = options.impl
    cast = [u.w.to(x.dtype) for u in (*units, *([shortcut] if shortcut else []))]
    a, inner, w_last = Deferred(x), [], cast[len(units) - 1]
    for i, unit in enumerate(units[:-1]):
        inner.append(_conv_bn(unit, a, cast[i], impl))
        # A 3x3 convolution reads its input nine times: written out once, it is cheaper than nine times deferred.
        dense = _dense(cast[i + 1], units[i + 1].geometry)
        a = inner[-1] if dense else Deferred(_op.bn_act(*inner[-1], True, impl))
    side, last_shortcut, mask = x if options.identity else residual, (None, None), None
    if options.scheme == "moments":
        last = _moments(units[-1], a, w_last, impl)
        w_side, stride = None, 1
        if shortcut is not None:
            side, w_side, stride = x, cast[-1], shortcut.geometry.stride[0]
            last_shortcut = _moments(shortcut, Deferred(x), w_side, impl)
        out, mask = _op.conv1x1_join(*a, w_last, last[1], side, w_side, last_shortcut[1], stride, impl)
    else:
        last = _conv_bn(units[-1], a, w_last, impl)
        if shortcut is not None:
            last_shortcut = _conv_bn(shortcut, Deferred(x), cast[-1], impl)
            side = last_shortcut.c
        if side is None:
            out = _op.bn_act(*last, options.relu, impl)
        else:
            out, mask = _op.bn_join(*last, side, last_shortcut[1], impl)
    return out, Saved(x, tuple(cast), tuple(inner), tuple(last), tuple(last_shortcut), mask)


class UnitGradients(NamedTuple):
    """Gradients of one unit's parameters; None where not needed."""

    w: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


def _shortcut_backward(
    unit: ConvBN, saved: Saved, dout: Tensor, sums: Tensor | None, want_w: bool, want_x: bool, options: Options
) -> tuple[UnitGradients, Gradient | None, int]:
    """Gradients of the projection shortcut, and that of its input: on the whole input's grid, or every n-th pixel."""
    impl, w, (c, bn), a = options.impl, saved.weights[-1], saved.last_shortcut, Deferred(saved.x)
    pointwise = _pointwise(w, unit.geometry)
    stride = unit.geometry.stride[0] if pointwise else 1
    dw = dx = None
    if options.scheme == "moments":
        cross = _op.cross_moments(*a, dout, saved.mask, stride, impl)
        coef, dgamma, dbeta = _backward_finalize(unit, _op.cross_sums(cross, w, bn, impl), bn, impl)
        dw, *matrices = _op.moments_weights(cross, _gram_of(c, cross), w, coef, impl)
        if want_x:
            w_g, w_a, w_1 = matrices
            dx, _ = _op.conv1x1_dgrad_moments(dout, saved.mask, w_g, *a, w_a, w_1, stride, impl)
    else:
        coef, dgamma, dbeta = _backward_finalize(unit, sums, bn, impl)
        grad = _readable(Gradient(dout, saved.mask, c, coef), w, unit.geometry, impl)
        if want_w:
            dw = _op.conv_wgrad(*a, *grad, w.shape, *unit.geometry, impl)
        if want_x and pointwise:
            # On the output's own grid: the pixels that a stride passes over have no gradient.
            dx, _ = _dgrad(grad, w, Geometry(), dout.shape[2:], None, None, 1, impl)
        elif want_x:
            dx, _ = _dgrad(grad, w, unit.geometry, saved.x.shape[2:], None, None, 1, impl)
    return UnitGradients(dw, dgamma, dbeta), None if dx is None else Gradient(dx), stride


def _gram_of(gram: Tensor | None, cross: Tensor) -> Tensor:
    """Running statistics are constants: their coefficients B and C are 0, and so is what the moments contribute."""
    return cross.new_zeros(cross.shape[0], cross.shape[0]) if gram is None else gram


def _readable(grad: Gradient, w: Tensor, geometry: Geometry, impl: str) -> Gradient:
    """A deferred gradient as the convolution reads it: written out for anything but a dense 1x1."""
    return grad if _dense(w, geometry) else Gradient(_op.bn_backward_apply(*grad, impl))


def _dgrad(grad, w, geometry, hw, relu_of: Deferred | None, addend: Gradient | None, addend_stride: int, impl: str):
    relu = relu_of or (None, None)
    add = addend[:2] if addend is not None else (None, None)
    return _op.conv_dgrad(*grad, w, *geometry, hw, *relu, *add, addend_stride, impl)


def chain_backward(
    dout: Tensor,
    saved: Saved,
    units: Sequence[ConvBN],
    shortcut: ConvBN | None,
    options: Options,
    want_x: bool,
    want: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, Tensor | None, list[UnitGradients]]:
    """Gradients (dx, dresidual, one UnitGradients per unit, the shortcut's last) of `chain_forward`.

    want: for each unit, and the shortcut last, whether (w, gamma, beta) need gradients. Units in front of the first
    one with any are not visited, and no weight gradient is computed that nobody asked for.
    """
    impl = options.impl
    x, last = saved.x, len(units) - 1
    first = 0 if want_x else next((i for i in range(last) if any(want[i])), last)
    inputs = [Deferred(x), *saved.inner]
    gradients = [UnitGradients() for _ in want]
    c, bn = saved.last
    sums_shortcut = addend = None
    addend_stride = 1
    w = saved.weights[last]

    if options.scheme == "moments":
        cross = _op.cross_moments(*inputs[last], dout, saved.mask, 1, impl)
        coef, dgamma, dbeta = _backward_finalize(units[last], _op.cross_sums(cross, w, bn, impl), bn, impl)
        dw, w_g, w_a, w_1 = _op.moments_weights(cross, _gram_of(c, cross), w, coef, impl)
        gradients[last] = UnitGradients(dw, dgamma, dbeta)
        g, sums = None, None
        if first < last:
            g, sums = _op.conv1x1_dgrad_moments(dout, saved.mask, w_g, *inputs[last], w_a, w_1, 1, impl)
        following = last - 1
    else:
        if saved.mask is None and options.relu:
            g, sums = _op.bn_act_sums(dout, c, bn, impl)
        else:
            g = dout
            side = saved.last_shortcut if shortcut is not None else (None, None)
            sums, sums_shortcut = _op.join_sums(dout, saved.mask, c, bn, *side, impl)
        following = last

    if shortcut is not None and (want_x or any(want[-1])):
        gradients[-1], addend, addend_stride = _shortcut_backward(
            shortcut, saved, dout, sums_shortcut, want[-1][0], want_x, options
        )
    elif options.identity:
        addend = Gradient(dout, saved.mask)

    dx = None
    deferred = [*saved.inner, Deferred(c, bn)]
    for i in range(following, first - 1, -1):
        unit, w = units[i], saved.weights[i]
        coef, dgamma, dbeta = _backward_finalize(unit, sums, deferred[i].bn, impl)
        mask = saved.mask if i == last else None
        grad = _readable(Gradient(g, mask, deferred[i].c, coef), w, unit.geometry, impl)
        dw = _op.conv_wgrad(*inputs[i], *grad, w.shape, *unit.geometry, impl) if want[i][0] else None
        gradients[i] = UnitGradients(dw, dgamma, dbeta)
        if i > first:
            g, sums = _dgrad(grad, w, unit.geometry, inputs[i].c.shape[2:], inputs[i], None, 1, impl)
        elif want_x:
            dx, _ = _dgrad(grad, w, unit.geometry, x.shape[2:], None, addend, addend_stride, impl)
    dresidual = None
    if saved.mask is not None and not options.identity and shortcut is None:
        dresidual = _op.relu_grad(dout, saved.mask, impl)
    return dx, dresidual, gradients


class _RefuseSecondDerivative(torch.autograd.Function):
    """Identity of the last `count` tensors whose backward raises. torch's once_differentiable stays silent when the
    incoming gradient needs no gradient itself (`out.sum()`), and a gradient penalty would then be wrong without a word.
    The tensors in front are those that the gradients were made of: only what they lead to is differentiated."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[-count:]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fused_resnet: second derivatives are not implemented. Run the model through fused_resnet.unfuse first, or "
            "do not ask for create_graph=True"
        )


def _first_order(backward):
    """Run a Function's backward, of (ctx, gradient, saved tensors), without recording it, and refuse to be
    differentiated again."""

    def run(ctx, grad):
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, grad, saved)
        if not torch.is_grad_enabled():
            return gradients
        present = [g for g in gradients if g is not None]
        anchor = grad.new_zeros((), requires_grad=True)  # gamma and beta are not saved, but lead there, too
        refused = iter(_RefuseSecondDerivative.apply(len(present), anchor, grad, *saved, *present))
        return tuple(None if g is None else next(refused) for g in gradients)

    return run


class _Chain(torch.autograd.Function):
    """`chain_forward` and `chain_backward`; parameters are (w, gamma, beta) of each unit, the shortcut's last."""

    @staticmethod
    def forward(ctx, x, residual, units, shortcut, options, *parameters):
        out, saved = chain_forward(x, residual, units, shortcut, options)
        ctx.save_for_backward(*saved.tensors())
        bare = dict.fromkeys(ConvBN._fields[:6])
        ctx.units = [unit._replace(**bare) for unit in units]
        ctx.shortcut = None if shortcut is None else shortcut._replace(**bare)
        ctx.options = options
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return out

    @staticmethod
    @_first_order
    def backward(ctx, dout, saved_tensors):
        need_x, need_residual, _, _, _, *need = ctx.needs_input_grad
        saved = Saved.from_tensors(saved_tensors, len(ctx.units))
        want = [need[i : i + 3] for i in range(0, len(need), 3)]
        dx, dresidual, gradients = chain_backward(
            channels_last(dout), saved, ctx.units, ctx.shortcut, ctx.options, need_x, want
        )
        flat = [g for unit in gradients for g in unit]
        flat = [g.to(dtype) if wants else None for g, wants, dtype in zip(flat, need, ctx.dtypes)]
        return (dx if need_x else None), (dresidual if need_residual else None), None, None, None, *flat


class _Stem(torch.autograd.Function):
    """max_pool(relu(BN(conv(x))), 3, 2, 1) without the normalised map: saves x, the raw convolution and 8-bit taps."""

    @staticmethod
    def forward(ctx, x, unit, impl, w, gamma, beta):
        w_cast = w.to(x.dtype)
        deferred = _conv_bn(unit, Deferred(x), w_cast, impl)
        y, index = _op.bn_act_pool(*deferred, impl)
        ctx.save_for_backward(x, w_cast, *deferred, index)
        ctx.unit = unit._replace(**dict.fromkeys(ConvBN._fields[:6]))
        ctx.impl = impl
        ctx.dtypes = [None if p is None else p.dtype for p in (w, gamma, beta)]
        return y

    @staticmethod
    @_first_order
    def backward(ctx, dy, saved_tensors):
        x, w, c, bn, index = saved_tensors
        unit, impl, (need_x, _, _, *need) = ctx.unit, ctx.impl, ctx.needs_input_grad
        g, sums = _op.bn_act_pool_backward(channels_last(dy), index, c, bn, impl)
        coef, dgamma, dbeta = _backward_finalize(unit, sums, bn, impl)
        grad = Gradient(_op.bn_backward_apply(g, None, c, coef, impl))
        dw = _op.conv_wgrad(x, None, *grad, w.shape, *unit.geometry, impl) if need[0] else None
        dx = _dgrad(grad, w, unit.geometry, x.shape[2:], None, None, 1, impl)[0] if need_x else None
        gradients = (g.to(dtype) if wants else None for g, wants, dtype in zip((dw, dgamma, dbeta), need, ctx.dtypes))
        return dx, None, None, *gradients


# Where no gradient is needed, and where the library is as fast


def _plain_bottleneck(
    residual: Tensor | None, units: Sequence[ConvBN], shortcut: ConvBN | None, options: Options
) -> bool:
    """A bottleneck at one resolution: 1x1, a convolution that keeps the channels, 1x1 to four times as many, and x or a
    1x1 of it beside them."""
    if len(units) != 3 or residual is not None or not options.relu or not (options.identity or shortcut is not None):
        return False
    first, middle, last = units
    width = middle.w.shape[1]
    dense = (first, last) if shortcut is None else (first, last, shortcut)
    return (
        all(_dense(unit.w, unit.geometry) for unit in dense)
        and (first.w.shape[0], middle.w.shape[0], last.w.shape[0]) == (width, width, 4 * width)
        and tuple(middle.geometry.stride) == (1, 1)
    )


def _chain_inference(
    x: Tensor, residual: Tensor | None, units: Sequence[ConvBN], shortcut: ConvBN | None, options: Options
) -> Tensor:
    """`chain_forward` for running statistics without gradients, nothing saved: one operator per convolution, or one
    for a whole bottleneck where there is such a kernel."""
    if _plain_bottleneck(residual, units, shortcut, options):
        everyone, geometry = [*units, *([shortcut] if shortcut is not None else [])], units[1].geometry
        if ops.fuses_bottleneck(options.impl, x, [unit.w for unit in everyone], geometry):
            weights = [unit.w.to(x.dtype) for unit in everyone]
            frozen = map(list, zip(*((u.running_mean, u.running_var, u.gamma, u.beta, u.eps) for u in everyone)))
            return _op.bottleneck_affine(x, weights, *frozen, *geometry, options.impl)

    def conv(unit: ConvBN, a: Tensor, side: Tensor | None, relu: bool) -> Tensor:
        frozen = unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.eps
        return _op.conv_affine(a, unit.w.to(x.dtype), *frozen, side, relu, *unit.geometry, options.impl)

    side = x if options.identity else residual
    if shortcut is not None:
        side = conv(shortcut, x, None, False)
    a = x
    for unit in units[:-1]:
        a = conv(unit, a, None, True)
    return conv(units[-1], a, side, options.relu)


def _library_conv_bn(unit: ConvBN, x: Tensor) -> Tensor:
    w = unit.w if unit.w.dtype == x.dtype else unit.w.to(x.dtype)
    c = F.conv2d(x, w, None, *unit.geometry)
    running, counter = (unit.running_mean, unit.running_var), unit.num_batches_tracked
    if unit.batch_stats and counter is not None:
        counter.add_(1)
    if unit.momentum is not None or not unit.batch_stats or unit.running_mean is None:
        momentum = 0.0 if unit.momentum is None else unit.momentum
        # What F.batch_norm calls after its own check for one value per channel, which has been made.
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(c, unit.gamma, unit.beta, *running, unit.batch_stats, momentum, unit.eps, cudnn)
    # The library wants the cumulative average's factor as a number, and so to wait for the counter: average here.
    batch = [torch.zeros_like(buffer) for buffer in running]
    y = F.batch_norm(c, *batch, unit.gamma, unit.beta, True, 1.0, unit.eps)
    for buffer, value in zip(running, batch):
        buffer.add_((value - buffer) / counter)
    return y


def _chain_library(x, residual, units: Sequence[ConvBN], shortcut: ConvBN | None, options: Options) -> Tensor:
    """The same chain as separate library operators under plain autograd."""
    a = x
    for unit in units[:-1]:
        a = _library_conv_bn(unit, a).relu_()
    out = _library_conv_bn(units[-1], a)
    side = x if options.identity else residual
    if shortcut is not None:
        side = _library_conv_bn(shortcut, x)
    if side is not None:
        out = out + side
    return out.relu_() if options.relu else out


def _packed(unit: ConvBN) -> ConvBN:
    """The unit with parameters as kernels read them: gamma and beta without strides, w in one of the memory formats."""
    w, gamma, beta = unit[:3]
    if not (w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)):
        w = w.contiguous()
    gamma, beta = (None if vector is None else vector.contiguous() for vector in (gamma, beta))
    return unit._replace(w=w, gamma=gamma, beta=beta)


def _without_buffers(unit: ConvBN) -> ConvBN:
    return unit._replace(running_mean=None, running_var=None, num_batches_tracked=None) if unit.batch_stats else unit


def _wants_gradients(units: Sequence[ConvBN], *inputs: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (*inputs, *(p for unit in units for p in unit[:3])))


def is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or torch.jit.trace looks on. The fused operators have no rules
    for them, and would drop a tangent without a word."""
    functional = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return functional or torch.jit.is_tracing()


def _scheme(units: Sequence[ConvBN], shortcut: ConvBN | None, options: Options, dtype: torch.dtype) -> str:
    """ "moments" where it is possible and saves memory traffic, unless the caller or a measurement asks for a scheme.

    It needs a plain 1x1 at the end and in the shortcut; it costs K / N of the last convolution's arithmetic, and at 32
    bit the raw output it avoids is no longer the cheaper side.
    """
    last = units[-1]
    possible = (
        len(units) > 1
        and options.relu
        and _dense(last.w, last.geometry)
        and (options.identity if shortcut is None else _pointwise(shortcut.w, shortcut.geometry))
    )
    if options.scheme == "moments" and not possible:
        raise planning.Unsupported(
            'scheme="moments" needs two or more convolutions, the last one 1x1 of stride 1, '
            "and an identity or 1x1 shortcut"
        )
    if options.scheme != "auto":
        return options.scheme
    return "moments" if possible and dtype.itemsize == 2 and last.w.shape[0] >= 2 * last.w.shape[1] else "stored"


def run_chain(
    x: Tensor, residual: Tensor | None, units: list[ConvBN], shortcut: ConvBN | None, options: Options
) -> Tensor:
    """Pick the path for a checked chain: inference, training, or the library's operators."""
    everyone = [*units, shortcut] if shortcut is not None else units
    trained = [unit for unit in everyone if unit.batch_stats]
    synced = any(unit.sync for unit in trained)
    if x.shape[0] == 0:
        if not synced:
            # No image changes no statistics. The library's operators give the empty result and zero gradients.
            shortcut = None if shortcut is None else _without_buffers(shortcut)
            return _chain_library(x, residual, [_without_buffers(u) for u in units], shortcut, options)
        options = options._replace(impl="reference")  # the other processes wait for this one's counts: of nothing
    training = bool(trained) or _wants_gradients(everyone, x, residual)
    if is_transformed():
        if synced or options.impl != "auto":
            raise planning.Unsupported(
                "the fused operators have no rules for torch.func, forward-mode differentiation and torch.jit.trace: "
                'use impl="auto" and BatchNorms without sync, or fused_resnet.unfuse'
            )
        return _chain_library(x, residual, units, shortcut, options)
    if not synced:
        side = "projection" if shortcut is not None else "identity" if options.identity else "none"
        kind = f"{'training' if training else 'inference'} {side if residual is None else 'residual'}"
        convolutions = [(unit.w, unit.geometry) for unit in units]
        chosen = ops.plan_block("residual_block", options.impl, x, convolutions, kind)
        if chosen.backend == "library":
            return _chain_library(x, residual, units, shortcut, options)
        if options.scheme == "auto" and chosen.scheme:
            options = options._replace(scheme=chosen.scheme)
    x = channels_last(x)
    residual = None if residual is None else channels_last(residual)
    everyone = [_packed(unit) for unit in everyone]
    units, shortcut = everyone[: len(units)], None if shortcut is None else everyone[-1]
    if not training:
        return _chain_inference(x, residual, units, shortcut, options)
    parameters = [p for unit in everyone for p in unit[:3]]
    options = options._replace(scheme=_scheme(units, shortcut, options, x.dtype))
    if residual is not None and not options.relu:  # a sum that nothing follows keeps no mask
        return _Chain.apply(x, None, units, shortcut, options, *parameters) + residual
    return _Chain.apply(x, residual, units, shortcut, options, *parameters)


def run_stem(x: Tensor, unit: ConvBN, impl: str) -> Tensor:
    """Pick the path for a checked stem: max_pool(relu(BN(conv(x))), 3, stride 2, padding 1)."""
    options = Options(identity=False, relu=True, scheme="stored", impl=impl)
    if x.shape[0] == 0 or is_transformed():
        return F.max_pool2d(run_chain(x, None, [unit], None, options), 3, 2, 1)
    training = unit.batch_stats or _wants_gradients([unit], x)
    fused = unit.batch_stats and unit.sync
    if not fused:
        kind = "training" if training else "inference"
        fused = ops.plan_block("stem", impl, x, [(unit.w, unit.geometry)], kind).backend != "library"
    if not fused:
        return F.max_pool2d(_chain_library(x, None, [unit], None, options), 3, 2, 1)
    x, unit = channels_last(x), _packed(unit)
    if training:
        return _Stem.apply(x, unit, impl, *unit[:3])
    frozen = unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.eps
    return _op.conv_affine_pool(x, unit.w.to(x.dtype), *frozen, *unit.geometry, impl)
