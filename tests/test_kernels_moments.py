"""The kernels of BatchNorm from moments against float64, in Triton's interpreter or on the GPU."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import reference, testing
from fused_resnet.plan import Device, Plan, Problem, TileConfig, triton_plan, unsupported
from fused_resnet.reference import Deferred, Running
from fused_resnet.testing import (
    POINTWISE_SHAPES,
    assert_within_budget,
    random_activation,
    random_affine,
    random_bn,
    random_weight,
)

moments = pytest.importorskip("fused_resnet.kernels.moments", reason="needs Triton", exc_type=ImportError)
from fused_resnet.kernels import moments_matrices  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EVERY_SHAPE = pytest.mark.parametrize("shape", POINTWISE_SHAPES)
PRODUCT = Plan("triton", TileConfig(32, 32, 16, 4, 2), "test")
MATRIX = Plan("triton", TileConfig(32, 16, 16, 4, 2), "test")
VECTOR = Plan("triton", TileConfig(16, 16, 0, 4, 2), "test")


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def deferred(shape, dtype, generator, device, prologue):
    x = random_activation(shape, dtype, generator, device=device)
    return Deferred(x, random_bn(x, generator) if prologue else None)


def gradient(a, channels, stride, generator):
    """(g, mask) of the output of a 1x1 convolution of ``a``."""
    n, _, h, w = a.c.shape
    shape = (n, channels, -(-h // stride), -(-w // stride))
    g = random_activation(shape, a.c.dtype, generator, mean=0.1, device=a.c.device)
    return g, reference.pack_mask(torch.rand(shape, generator=generator) > 0.4).to(a.c.device)


def matrices(k, n, dtype, generator, device):
    """gram and cross of random activations and gradients, w [n, k, 1, 1], bn and coef of the output."""
    a = deferred((2, k, 9, 8), dtype, generator, device, True)
    g, mask = gradient(a, n, 1, generator)
    w = random_weight((n, k, 1, 1), dtype, generator, device)
    bn = random_bn(F.conv2d(reference.bn_act(a, True).double(), w.double()), generator)
    coef = reference.bn_backward_finalize(reference.channel_sums(g, g, bn), bn, None)[0]
    return reference.moments(a, 1), reference.cross_moments(a, g, mask, 1), w, bn, coef


def covariance(gram):
    """Cov = M / P - m m^T in float64. Kernels and their peers round it to fp32, and multiply in fp32."""
    m = gram[-1, :-1] / gram[-1, -1]
    return gram[:-1, :-1] / gram[-1, -1] - torch.outer(m, m)


@EVERY_DTYPE
@pytest.mark.parametrize("prologue", [False, True])
@EVERY_SHAPE
def test_moments(shape, prologue, dtype, generator, device):
    n, c, h, w, _, stride = shape
    a = deferred((n, c, h, w), dtype, generator, device, prologue)
    gram = moments.launch_moments(a, stride, PRODUCT)
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.T)
    assert gram[-1, -1] == n * -(-h // stride) * -(-w // stride)
    ref = reference.moments(Deferred(*double(*a)), stride)
    assert_within_budget(gram.float(), ref, reference.moments(a, stride))
    # Sums on their own, since they are subtracted from the products: as good as those.
    assert_within_budget(gram[-1].float(), ref[-1], reference.moments(a, stride)[-1], "sums")


@EVERY_DTYPE
@pytest.mark.parametrize("masked", [False, True])
@EVERY_SHAPE
def test_cross_moments(shape, masked, dtype, generator, device):
    n, c, h, w, channels, stride = shape
    a = deferred((n, c, h, w), dtype, generator, device, prologue=stride == 1)
    g, mask = gradient(a, channels, stride, generator)
    mask = mask if masked else None
    cross = moments.launch_cross_moments(a, g, mask, stride, PRODUCT)
    assert cross.dtype == torch.float64
    ref = reference.cross_moments(Deferred(*double(*a)), g.double(), mask, stride)
    low = reference.cross_moments(a, g, mask, stride)
    assert_within_budget(cross.float(), ref, low)
    assert_within_budget(cross[-1].float(), ref[-1], low[-1], "sum g")


@pytest.mark.parametrize("tile", [(16, 32, 512), (32, 16, 64), (64, 64, 64)])
def test_several_chunks_and_tiles(tile, generator, device):
    """1025 pixels are five chunks: of 512 pixels, so that one has a single pixel and two are empty; or of 256."""
    x = random_activation((1, 40, 41, 25), torch.float32, generator, device=device)
    assert moments._split(40 * 40, 1025) == 5
    plan = Plan("triton", TileConfig(*tile), "test")
    gram = moments.launch_moments(Deferred(x), 1, plan)
    ref = reference.moments(Deferred(x), 1)
    assert_within_budget(gram.float(), ref, ref)
    g, mask = gradient(Deferred(x), 35, 1, generator)
    cross = moments.launch_cross_moments(Deferred(x), g, mask, 1, plan)
    ref = reference.cross_moments(Deferred(x), g, mask, 1)
    assert_within_budget(cross.float(), ref, ref)


@pytest.mark.parametrize(
    "channels,width,pixels",
    [(64, 0, 802816), (512, 2048, 12544), (1024, 0, 12544), (2048, 2048, 49), (1, 0, 2**31 - 1)],
)
def test_chunks_are_bounded(channels, width, pixels):
    """Partial results stay below 17 MB, unless a single chunk has more, and chunks have 256 pixels or more."""
    values = channels * width or channels * min(channels, (channels + 128) // 2)
    chunks = moments._split(values, pixels)
    assert chunks == 1 or (chunks * values * 4 < 17 * 2**20 and pixels / chunks > 255)
    assert chunks <= 768


@EVERY_DTYPE
@pytest.mark.parametrize("mean", [10.0, 30.0])
def test_variance_does_not_cancel(mean, dtype, generator, device):
    """The variance of outputs whose mean is up to 70 times their deviation, from moments added up in fp32.

    An error d relative to the moments is d (sum_k W_k^2 E[a_k^2]) in the variance where it differs from moment to
    moment, and d mean^2 where it is common to all; a few roundings of fp32 are 2^-21 at most. Channels are correlated;
    one is always off, one constant, and two are the same.
    """
    x = random_activation((4, 64, 24, 22), torch.float32, generator, mean=mean, device=device).relu_()
    x[:, 5], x[:, 6], x[:, 7] = 0.0, mean, x[:, 8]
    x = x.to(dtype)
    w = random_weight((40, 64, 1, 1), dtype, generator, device)
    w[3] = 0
    w[4], w[4, 5] = 0, 1  # reads the channel that is always off
    w[9], w[9, 7], w[9, 8] = 0, 1, -1  # the difference of the equal ones
    gram = moments.launch_moments(Deferred(x), 1, Plan("triton", TileConfig(64, 64, 64, 4, 2), "test"))
    bn = moments_matrices.launch_moments_finalize(gram, w, None, None, None, 0.1, 1e-5, MATRIX)
    c = F.conv2d(x.double(), w.double())
    var, exact_mean = torch.var_mean(c, (0, 2, 3), correction=0)
    torch.testing.assert_close(bn[reference.MEAN].double(), exact_mean, rtol=1e-6, atol=1e-5)
    got = bn[reference.RSTD].double() ** -2 - 1e-5
    squares = w.flatten(1).double().square() @ x.double().square().mean((0, 2, 3))
    limit = 2**-21 * (squares + exact_mean.square()) + 1e-11
    assert (got - var).abs().le(limit).all(), ((got - var).abs() / limit).max()
    live = var > 1e-3
    relative = ((got - var).abs() / var)[live]
    assert live.sum() == 37 and relative.max() < 1e-6 * mean**2
    if dtype != torch.float32:
        # What eager PyTorch loses by rounding c, before it takes the variance.
        eager = F.conv2d(x, w).double().var((0, 2, 3), correction=0)
        assert_within_budget(got[live].float(), var[live], eager[live])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_do_not_bias_the_moments(dtype, generator):
    """Chains of truncated sums lose 1e-8 of positive products in ten pixels, six times that in float16: those of gram
    end after a step of pixels, those of cross, which no variance squares, after a chunk of 392."""
    x = random_activation((64, 64, 56, 56), torch.float32, generator).relu_().to("cuda", dtype)
    g = x.flip(1).contiguous(memory_format=torch.channels_last)
    for op in ("moments", "cross_moments"):
        kernel = 1 if op == "cross_moments" else 0
        problem = Problem(op, 64, 56, 56, 64, 64, kernel, kernel, dtype=str(dtype).removeprefix("torch."))
        plan = triton_plan(problem, None, Device.default(90), "test")
        arguments = (Deferred(x), 1) if op == "moments" else (Deferred(x), g, None, 1)
        ref = getattr(reference, op)(*arguments)
        bias = (getattr(moments, plan.launch)(*arguments, plan=plan) / ref - 1).mean()
        assert bias.abs() < (5e-7 if op == "moments" else 5e-6), op


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(35, 65), (64, 24), (100, 48)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_finalize(shape, affine, momentum, dtype, generator, device):
    k, n = shape
    gram, _, w, _, _ = matrices(k, n, dtype, generator, device)
    gamma, beta = random_affine(n, generator, device) if affine else (None, None)

    def run(finalize, keep, gram, **plan):
        start = torch.linspace(0.5, 2, n, device=device).to(keep)
        running = Running(start.clone(), start.clone(), torch.tensor(3, device=device))
        return finalize(gram, w, gamma, beta, running, momentum, 1e-5, **plan), running

    got, running = run(moments_matrices.launch_moments_finalize, torch.float32, gram, plan=MATRIX)
    ref, ref_running = run(reference.moments_finalize, torch.float64, gram)
    total, weight = gram[-1, -1], w.flatten(1)
    mean = (weight.double() @ (gram[-1, :-1] / total)).float()
    var = ((weight.float() @ covariance(gram).float()) * weight.float()).sum(1)
    peer = reference._bn_vectors(mean, var, (1 / total).float().expand(n), gamma, beta, 1e-5)
    for row, what in enumerate(("mean", "rstd", "scale", "shift", "inv_count")):
        assert_within_budget(got[row], ref[row].double(), peer[row], what)
    assert running.num_batches_tracked == 4
    start, weight = torch.linspace(0.5, 2, n, device=device), 0.25 if momentum is None else momentum
    low = [start.lerp(value.float(), weight) for value in (mean, var * total / (total - 1))]
    for i, what in enumerate(("running mean", "running variance")):
        assert_within_budget(running[i], ref_running[i], low[i], what)


def test_finalize_of_buffers_at_16_bit_and_without_counter(generator, device):
    gram, _, w, _, _ = matrices(16, 24, torch.float16, generator, device)
    running = Running(torch.zeros(24, device=device).half(), torch.ones(24, device=device).half())
    bn = moments_matrices.launch_moments_finalize(gram, w, None, None, running, 1.0, 1e-5, MATRIX)
    torch.testing.assert_close(running.mean, bn[reference.MEAN].half(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="num_batches_tracked"):
        moments_matrices.launch_moments_finalize(gram, w, None, None, running, None, 1e-5, MATRIX)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(35, 65), (64, 24)])
def test_cross_sums(shape, dtype, generator, device):
    _, cross, w, bn, _ = matrices(*shape, dtype, generator, device)
    sums = moments_matrices.launch_cross_sums(cross, w, bn, VECTOR)
    ref, low = (reference.cross_sums(cross, w, b) for b in (bn.double(), bn))
    assert sums.shape == (1, 2, shape[1])
    for row, what in enumerate(("sum g", "sum g xhat")):
        assert_within_budget(sums[0, row], ref[0, row], low[0, row], what)


@EVERY_DTYPE
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(35, 65), (64, 24)])
def test_weights(shape, frozen, dtype, generator, device):
    gram, cross, w, _, coef = matrices(*shape, dtype, generator, device)
    if frozen:  # running statistics are constants: no moments, and B = C = 0
        gram, coef[1:] = torch.zeros_like(gram), 0
    got = moments_matrices.launch_moments_weights(cross, gram, w, coef, MATRIX)
    ref = reference.moments_weights(cross, gram, *double(w, coef))
    low = reference.moments_weights(cross, gram, w, coef)
    for value, exact, peer, what in zip(got, ref, low, ("dw", "w_g", "w_a", "w_1")):
        assert value.dtype == peer.dtype and value.stride() == peer.stride(), what
        if what == "dw" and not frozen:
            weight, cov = w.flatten(1), covariance(gram)
            inexact = (weight.float() @ cov.float()).double() - weight.double() @ cov
            peer = exact + (gram[-1, -1] * coef[1].double()[:, None] * inexact).view(exact.shape)
        assert_within_budget(value, exact, peer, what)


@pytest.mark.parametrize("stride", [1, 2])
def test_autograd_of_convolution_and_batch_norm(stride, generator, device):
    """Forward to gradients from moments alone, against float64 autograd of F.conv2d and F.batch_norm."""
    x = random_activation((3, 20, 9, 8), torch.float32, generator, device=device)
    w = random_weight((36, 20, 1, 1), torch.float32, generator, device)
    gamma, beta = random_affine(36, generator, device)
    g, mask = gradient(Deferred(x), 36, stride, generator)
    gram = moments.launch_moments(Deferred(x), stride, PRODUCT)
    bn = moments_matrices.launch_moments_finalize(gram, w, gamma, beta, None, 0.1, 1e-5, MATRIX)
    cross = moments.launch_cross_moments(Deferred(x), g, mask, stride, PRODUCT)
    sums = moments_matrices.launch_cross_sums(cross, w, bn, VECTOR)
    coef, dgamma, dbeta = reference.bn_backward_finalize(sums, bn, None)
    dw, w_g, w_a, w_1 = moments_matrices.launch_moments_weights(cross, gram, w, coef, MATRIX)
    dx, _ = reference.conv1x1_dgrad_moments(g, mask, w_g, Deferred(x), w_a, w_1, stride)
    y = reference.affine(F.conv2d(x, w, stride=stride), bn)

    def autograd(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, gamma, beta)]
        out = F.batch_norm(F.conv2d(*leaves[:2], stride=stride), None, None, *leaves[2:], True)
        grads = torch.autograd.grad(out, leaves, reference.relu_grad(g, mask).to(dtype))
        return out.detach(), grads[0][:, :, ::stride, ::stride], *grads[1:]

    names = ("y", "dx", "dw", "dgamma", "dbeta")
    for got, ref, low, what in zip((y, dx, dw, dgamma, dbeta), autograd(torch.float64), autograd(torch.float32), names):
        assert_within_budget(got, ref, low, what)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("channels", [40, 72, 136])
@pytest.mark.parametrize("op", ["moments", "cross_moments", "moments_finalize", "cross_sums", "moments_weights"])
def test_heuristic_tiles_give_the_same_answer(op, channels, arch, generator, device):
    for dtype in ("float32", "float16"):
        if op in ("moments", "cross_moments"):
            kernel, module = 1 if op == "cross_moments" else 0, moments
            problem = Problem(op, 2, 19, 15, channels, 136, kernel, kernel, dtype=dtype, prologue=True)
        else:
            problem, module = Problem(op, 136, 1, 1, channels, channels, dtype=dtype), moments_matrices
        plan = triton_plan(problem, None, Device.default(arch), "test")
        assert f"fused_resnet.kernels.{plan.module}" == module.__name__

        def run(*arguments, plan=plan, module=module):
            return getattr(module, plan.launch)(*arguments, plan=plan)

        testing.check_operator(problem, run, generator, device)


def test_bits_repeat(generator, device):
    a = deferred((2, 35, 17, 16), torch.float16, generator, device, True)
    g, mask = gradient(a, 40, 1, generator)
    w = random_weight((40, 35, 1, 1), torch.float16, generator, device)
    coef = torch.randn(3, 40, generator=generator).to(device)

    def everything():
        gram, cross = moments.launch_moments(a, 1, PRODUCT), moments.launch_cross_moments(a, g, mask, 1, PRODUCT)
        bn = moments_matrices.launch_moments_finalize(gram, w, None, None, None, 0.1, 1e-5, MATRIX)
        sums = moments_matrices.launch_cross_sums(cross, w, bn, VECTOR)
        return gram, cross, bn, sums, *moments_matrices.launch_moments_weights(cross, gram, w, coef, MATRIX)

    assert all(torch.equal(p, q) for p, q in zip(everything(), everything()))


def test_nan_in_nan_out(generator, device):
    """A ReLU or a clamp that turns NaN into 0 would hide a diverged run."""
    a = deferred((1, 16, 4, 5), torch.float32, generator, device, True)
    a.c[0, 3, 1, 1] = float("nan")
    gram = moments.launch_moments(a, 1, PRODUCT)
    assert gram[3].isnan().sum() == 17 and gram.isnan().sum() == 33
    w = random_weight((24, 16, 1, 1), torch.float32, generator, device)
    bn = moments_matrices.launch_moments_finalize(gram, w, None, None, None, 0.1, 1e-5, MATRIX)
    assert bn[:4].isnan().all()
    g, _ = gradient(a, 24, 1, generator)
    g[0, 7, 2, 2] = float("nan")
    cross = moments.launch_cross_moments(Deferred(a.c.nan_to_num()), g, None, 1, PRODUCT)
    assert cross[:, 7].isnan().all() and cross.isnan().sum() == 17


def test_plans_name_their_limits():
    device = Device.default(90)
    gram = Problem("moments", 32, 56, 56, 64, 64)
    assert "beyond 64 pixels" in unsupported(gram, TileConfig(64, 64, 128, 8, 3), device)
    assert "accumulators" in unsupported(gram, TileConfig(128, 256, 32, 8, 3), device)
    assert "one for both" in unsupported(Problem("moments", 1, 8, 8, 64, 64, stride=(2, 1)), None, device)
    weights = Problem("moments_weights", 256, 1, 1, 64, 64)
    assert "shared memory" in unsupported(weights, TileConfig(128, 64, 128, 8, 3), device)


def test_wrong_arguments_are_named(generator, device):
    a = deferred((1, 16, 5, 4), torch.float32, generator, device, True)
    g, mask = gradient(a, 24, 1, generator)
    with pytest.raises(ValueError, match="channels_last"):
        moments.launch_moments(Deferred(a.c.contiguous()), 1, PRODUCT)
    with pytest.raises(ValueError, match="a.bn must be"):
        moments.launch_moments(Deferred(a.c, a.bn[:, :8]), 1, PRODUCT)
    with pytest.raises(ValueError, match="stride must be 1 or more; got 0"):
        moments.launch_moments(a, 0, PRODUCT)
    with pytest.raises(ValueError, match="g is .* expected"):
        moments.launch_cross_moments(a, g, mask, 2, PRODUCT)
    with pytest.raises(ValueError, match="g is .*float16; expected .*float32"):
        moments.launch_cross_moments(a, g.half(), mask, 1, PRODUCT)
    with pytest.raises(ValueError, match="mask must be"):
        moments.launch_cross_moments(a, g, mask[..., :2], 1, PRODUCT)
    gram, cross, w, bn, coef = matrices(16, 24, torch.float32, generator, device)
    with pytest.raises(ValueError, match=r"gram must be contiguous fp64 \[17, 17\]"):
        moments_matrices.launch_moments_finalize(gram.float(), w, None, None, None, 0.1, 1e-5, MATRIX)
    with pytest.raises(ValueError, match=r"w must be a contiguous \[N, K, 1, 1\]"):
        moments_matrices.launch_moments_finalize(gram, w.expand(-1, -1, 3, 3), None, None, None, 0.1, 1e-5, MATRIX)
    with pytest.raises(ValueError, match=r"gamma must be a contiguous \[24\]; got \(8,\)"):
        moments_matrices.launch_moments_finalize(gram, w, bn[0, :8], None, None, 0.1, 1e-5, MATRIX)
    with pytest.raises(ValueError, match=r"cross must be contiguous fp64 \[17, 24\]"):
        moments_matrices.launch_cross_sums(cross[:-1], w, bn, VECTOR)
    with pytest.raises(ValueError, match="coef must be"):
        moments_matrices.launch_moments_weights(cross, gram, w, bn, MATRIX)


def test_more_pixels_than_32_bits_are_refused():
    x = torch.empty((2**15, 1, 2**8, 2**8), device="meta", memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="pixel indices are 32-bit"):
        moments.launch_moments(Deferred(x), 1, PRODUCT)
    with pytest.raises(ValueError, match="pixel indices are 32-bit"):
        moments.launch_moments(Deferred(x), 2, PRODUCT)
