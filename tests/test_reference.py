"""The reference mathematics against plain PyTorch's autograd in float64, and its own precision at 16 bit."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import reference, testing
from fused_resnet.reference import Deferred, Geometry, Gradient, Running
from fused_resnet.testing import assert_within_budget

EPS = 1e-5
close = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = pytest.mark.parametrize("shape", [(2, 35, 7, 5), (1, 8, 9, 4), (5, 65, 1, 1)])
GEOMETRIES = pytest.mark.parametrize(
    ("r", "geometry"),
    [
        (1, Geometry()),
        (1, Geometry((2, 2))),
        (3, Geometry(padding=(1, 1))),
        (3, Geometry((2, 2), (1, 1))),
        (3, Geometry((1, 1), (2, 2), (2, 2))),
        (3, Geometry(padding=(1, 1), groups=5)),
    ],
)


def _map(shape, seed=0, mean=0.5, std=1.0):
    x = testing.random_activation(shape, torch.double, torch.Generator().manual_seed(seed), mean, std)
    return x.contiguous(memory_format=torch.channels_last)


def _bn(c, seed=0):
    """bn vectors of c's statistics, and the gamma, beta they come from; differentiable in none of them."""
    gamma, beta = (v.double() for v in testing.random_affine(c.shape[1], torch.Generator().manual_seed(seed)))
    return reference.bn_finalize(reference.channel_partials(c), gamma, beta, None, 0.1, EPS), gamma, beta


def _w(k, c, r, groups=1, seed=3):
    return testing.random_weight((k, c // groups, r, r), torch.double, torch.Generator().manual_seed(seed))


# Statistics


@SHAPES
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_finalize_is_batch_norm(shape, momentum):
    x = _map(shape)
    norm = torch.nn.BatchNorm2d(shape[1], momentum=momentum).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_var.uniform_()
        norm.num_batches_tracked.fill_(4)
    mine = Running(*(t.clone() for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)))
    bn = reference.bn_finalize(reference.channel_partials(x), norm.weight, norm.bias, mine, momentum, EPS)
    torch.testing.assert_close(reference.affine(x, bn), norm(x), **close)
    torch.testing.assert_close(mine.mean, norm.running_mean, **close)
    torch.testing.assert_close(mine.var, norm.running_var, **close)
    assert mine.num_batches_tracked == 5
    frozen = reference.bn_frozen(norm.running_mean, norm.running_var, norm.weight, norm.bias, EPS)
    torch.testing.assert_close(reference.affine(x, frozen), norm.eval()(x), **close)
    assert not frozen[reference.INV_COUNT].any()


def test_merging_in_any_grouping_equals_the_whole():
    x = _map((6, 12, 5, 3), mean=100, std=0.1)
    whole = reference.channel_partials(x)
    parts = [reference.channel_partials(part) for part in x.split((1, 2, 3))]
    rows = torch.cat([*parts, torch.zeros_like(whole)])
    torch.testing.assert_close(reference.merge_partials(rows), whole, **close)
    nested = torch.cat([reference.merge_partials(rows[:2]), reference.merge_partials(rows[2:])])
    torch.testing.assert_close(reference.merge_partials(nested), whole, **close)


def test_variance_does_not_cancel_in_fp32():
    x = _map((8, 4, 16, 16), mean=0, std=0.1) + 100
    exact = x.var((0, 2, 3), correction=0)
    count, _, m2 = reference.merge_partials(reference.channel_partials(x.float()))[0]
    torch.testing.assert_close(
        (m2 / count).double(), x.float().double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )
    naive = x.float().square().mean((0, 2, 3)) - x.float().mean((0, 2, 3)).square()
    assert ((naive.double() - exact).abs() > 1e-3 * exact).any()  # the formula that is not used


# The moments scheme


@pytest.mark.parametrize("mean", [0.5, 10.0, 30.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_from_moments(mean, stride):
    c = _map((3, 35, 8, 7), mean=mean)
    bn, *_ = _bn(c)
    w = _w(65, 35, 1)
    for a in (Deferred(c), Deferred(c, bn)):
        raw = F.conv2d(c if a.bn is None else reference.affine(c, bn).relu(), w, stride=stride)
        gamma, beta = (v.double() for v in testing.random_affine(65, torch.Generator().manual_seed(5)))
        running = [Running(torch.zeros(65).double(), torch.ones(65).double(), torch.tensor(0)) for _ in range(2)]
        expected = reference.bn_finalize(reference.channel_partials(raw), gamma, beta, running[0], 0.1, EPS)
        gram = reference.moments(a, stride)
        assert gram[-1, -1] == raw[:, 0].numel()
        got = reference.moments_finalize(gram, w, gamma, beta, running[1], 0.1, EPS)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        for p, q in zip(*running):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_dead_and_identical_channels_have_variance_zero():
    c = _map((2, 6, 5, 5))
    c[:, 2] = -50.0  # dead behind the ReLU
    c[:, 4] = c[:, 3]
    bn, *_ = _bn(c)
    bn[:, 4] = bn[:, 3]
    bn[reference.SCALE, 2], bn[reference.SHIFT, 2] = 1.0, 0.0
    w = torch.zeros(3, 6, 1, 1, dtype=torch.double)
    w[0, 2], w[1, 3], w[1, 4] = 1.0, 1.0, -1.0  # one output of each kind, and one of all zeros
    vectors = reference.moments_finalize(reference.moments(Deferred(c, bn), 1), w, None, None, None, 0.1, EPS)
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors[reference.RSTD], torch.full((3,), EPS**-0.5).double(), rtol=1e-4, atol=0)


def test_gradients_from_moments_equal_autograd():
    c = _map((2, 12, 5, 7), mean=3.0)
    bn_in, *_ = _bn(c)
    a = reference.affine(c, bn_in).relu().requires_grad_()
    w = _w(20, 12, 1).requires_grad_()
    gamma, beta = (v.double().requires_grad_() for v in testing.random_affine(20, torch.Generator().manual_seed(1)))
    identity = _map((2, 20, 5, 7), seed=8)
    out = (F.batch_norm(F.conv2d(a, w), None, None, gamma, beta, True, 0.1, EPS) + identity).relu()
    dout = _map(out.shape, seed=9)
    da, dw, dgamma, dbeta = torch.autograd.grad(out, (a, w, gamma, beta), dout)

    deferred, weight = Deferred(c, bn_in), w.detach()
    gram = reference.moments(deferred, 1)
    bn = reference.moments_finalize(gram, weight, gamma.detach(), beta.detach(), None, 0.1, EPS)
    got, mask = reference.conv1x1_join(deferred, weight, bn, identity, None, None, 1)
    torch.testing.assert_close(got, out.detach(), **close)
    cross = reference.cross_moments(deferred, dout, mask, 1)
    coef, got_dgamma, got_dbeta = reference.bn_backward_finalize(reference.cross_sums(cross, weight, bn), bn, None)
    got_dw, w_g, w_a, w_1 = reference.moments_weights(cross, gram, weight, coef)
    g, sums = reference.conv1x1_dgrad_moments(dout, mask, w_g, deferred, w_a, w_1, 1)
    torch.testing.assert_close(got_dw, dw, **close)
    torch.testing.assert_close(got_dgamma, dgamma, **close)
    torch.testing.assert_close(got_dbeta, dbeta, **close)
    torch.testing.assert_close(g, da * (a > 0), **close)
    torch.testing.assert_close(sums, reference.channel_sums(g, c, bn_in), **close)


# Convolutions and their gradients


@GEOMETRIES
@pytest.mark.parametrize("deferred", [False, True])
def test_convolution_and_its_gradients(r, geometry, deferred):
    c = _map((2, 10, 7, 9))
    bn, *_ = _bn(c)
    a = Deferred(c, bn if deferred else None)
    x = (reference.affine(c, bn).relu() if deferred else c).detach().requires_grad_()
    w = _w(15, 10, r, geometry.groups).requires_grad_()
    raw = F.conv2d(x, w, None, *geometry)
    got, partials = reference.conv_stats(a, w.detach(), geometry)
    torch.testing.assert_close(got, raw.detach(), **close)
    torch.testing.assert_close(partials, reference.channel_partials(raw.detach()), **close)
    g, raw_of_bn = _map(raw.shape, seed=4), _map(raw.shape, seed=5)
    coef = torch.randn(3, 15, dtype=torch.double)
    grad = Gradient(g, reference.pack_mask(raw_of_bn > 0), raw_of_bn, coef)
    rows = [row.view(1, -1, 1, 1) for row in coef]
    dc = rows[0] * g * (raw_of_bn > 0) + rows[1] * raw_of_bn + rows[2]
    torch.testing.assert_close(reference.bn_backward_apply(grad), dc, **close)
    dx, dw = torch.autograd.grad(raw, (x, w), dc)
    torch.testing.assert_close(reference.conv_wgrad(a, grad, w.shape, geometry), dw, **close)
    got, sums = reference.conv_dgrad(grad, w.detach(), geometry, x.shape[2:])
    assert sums is None
    torch.testing.assert_close(got, dx, **close)
    side = _map((2, 10, 4, 5), seed=6)
    dx[:, :, ::2, ::2] += side
    got, _ = reference.conv_dgrad(grad, w.detach(), geometry, x.shape[2:], None, Gradient(side), 2)
    torch.testing.assert_close(got, dx, **close)
    if deferred:
        got, sums = reference.conv_dgrad(grad, w.detach(), geometry, x.shape[2:], a, Gradient(side), 2)
        torch.testing.assert_close(got, dx * (x > 0), **close)
        torch.testing.assert_close(sums, reference.channel_sums(got, c, bn), **close)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_affine_epilogue_order(relu, residual):
    """affine, then residual, then ReLU; also without gamma and beta."""
    x, side = _map((2, 6, 5, 5)), _map((2, 7, 5, 5), seed=2)
    w, geometry = _w(7, 6, 3), Geometry(padding=(1, 1))
    mean, var, gamma, beta = torch.randn(4, 7, dtype=torch.double)
    affine = (gamma, beta) if relu else (None, None)
    raw = F.batch_norm(F.conv2d(x, w, None, *geometry), mean, var.abs(), *affine, eps=EPS)
    expected = raw + side if residual else raw
    frozen = reference.Frozen(mean, var.abs(), *affine, EPS)
    got = reference.conv_affine(x, w, frozen, side if residual else None, relu, geometry)
    torch.testing.assert_close(got, expected.relu() if relu else expected, **close)


@SHAPES
def test_batch_norm_and_relu_backward(shape):
    x = _map(shape).requires_grad_()
    bn, gamma, beta = _bn(x.detach())
    gamma.requires_grad_()
    beta.requires_grad_()
    out = F.batch_norm(x, None, None, gamma, beta, True, 0.1, EPS).relu()
    dy = _map(shape, seed=7)
    expected = torch.autograd.grad(out, (x, gamma, beta), dy)
    g, sums = reference.bn_act_sums(dy, Deferred(x.detach(), bn))
    coef, dgamma, dbeta = reference.bn_backward_finalize(sums, bn, None)
    dc = reference.bn_backward_apply(Gradient(g, None, x.detach(), coef))
    for got, value in zip((dc, dgamma, dbeta), expected):
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-8)
    # Sums of all processes count for the coefficients, this one's for the parameters.
    coef_of_two, dgamma_again, _ = reference.bn_backward_finalize(sums, bn, torch.cat((sums, sums)))
    torch.testing.assert_close(coef_of_two[1:], 2 * coef[1:], **close)
    assert torch.equal(dgamma_again, dgamma)


@SHAPES
@pytest.mark.parametrize("projection", [False, True])
def test_join_and_its_sums(shape, projection):
    c, s = _map(shape), _map(shape, seed=1)
    (bn, *_), (bn_s, *_) = _bn(c), _bn(s, seed=1)
    main, side = Deferred(c, bn), Deferred(s, bn_s if projection else None)
    out, mask = reference.bn_join(main, side)
    expected = (reference.affine(c, bn) + (reference.affine(s, bn_s) if projection else s)).relu()
    torch.testing.assert_close(out, expected, **close)
    positive = reference.unpack_mask(mask, shape[1])
    assert torch.equal(positive, out > 0)
    assert mask.shape == (shape[0], *shape[2:], -(-shape[1] // 8)) and mask.dtype == torch.uint8
    dout = _map(shape, seed=2)
    sums, sums_side = reference.join_sums(dout, mask, main, side)
    torch.testing.assert_close(sums, reference.channel_sums(dout * positive, c, bn), **close)
    assert (sums_side is None) == (not projection)
    if projection:
        torch.testing.assert_close(sums_side, reference.channel_sums(dout * positive, s, bn_s), **close)
    torch.testing.assert_close(reference.relu_grad(dout, mask), dout * positive, **close)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 35])
def test_mask_bits(channels):
    positive = torch.rand(2, channels, 3, 2) > 0.5
    mask = reference.pack_mask(positive)
    assert torch.equal(reference.unpack_mask(mask, channels), positive)
    bit = (mask[1, 2, 0, (channels - 1) // 8] >> ((channels - 1) % 8)) & 1
    assert bool(bit) == bool(positive[1, channels - 1, 2, 0])


@pytest.mark.parametrize("size", [(7, 9), (8, 6), (1, 1), (2, 3)])
def test_pool_and_its_backward(size):
    """Ties, which a rounded map is full of, go to the first tap, as in PyTorch."""
    c = (_map((2, 35, *size)) * 2).round() / 2
    bn = torch.ones(5, 35, dtype=torch.double)
    bn[reference.SHIFT] = 0.5
    bn[reference.SCALE, ::3] = -1.0
    bn[reference.MEAN] = 0.0
    y, index = reference.bn_act_pool(Deferred(c, bn))
    x = c.clone().requires_grad_()
    expected = F.max_pool2d(reference.affine(x, bn).relu(), 3, 2, 1)
    torch.testing.assert_close(y, expected.detach(), **close)
    assert index.dtype == torch.uint8 and int(index.max()) <= 8
    dy = _map(y.shape, seed=3)
    (dx,) = torch.autograd.grad(expected, x, dy)
    g, sums = reference.bn_act_pool_backward(dy, index, Deferred(c, bn))
    torch.testing.assert_close(g * bn[reference.SCALE].view(1, -1, 1, 1), dx, **close)
    torch.testing.assert_close(sums, reference.channel_sums(g, c, bn), **close)


# Precision at 16 bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_itself_keeps_the_error_budget(dtype):
    """conv + BatchNorm + join at 16 bit, through moments and through a stored output, against eager at 16 bit."""
    c64 = _map((4, 32, 14, 14))
    bn64, *_ = _bn(c64)
    w64, side64 = _w(128, 32, 1), _map((4, 128, 14, 14), seed=2)
    c, w, side, bn_in = c64.to(dtype), w64.to(dtype), side64.to(dtype), bn64.float()
    gamma, beta = testing.random_affine(128, torch.Generator().manual_seed(5))
    a64 = reference.affine(c.double(), bn64).relu()
    judge = (
        F.batch_norm(F.conv2d(a64, w.double()), None, None, gamma.double(), beta.double(), True, 0.1, EPS)
        + side.double()
    ).relu()
    eager = (F.batch_norm(F.conv2d(a64.to(dtype), w), None, None, gamma, beta, True, 0.1, EPS) + side).relu()
    a = Deferred(c, bn_in)
    by_moments = reference.moments_finalize(reference.moments(a, 1), w, gamma, beta, None, 0.1, EPS)
    assert_within_budget(reference.conv1x1_join(a, w, by_moments, side, None, None, 1)[0], judge, eager, "moments")
    raw, partials = reference.conv_stats(a, w, Geometry())
    stored = reference.bn_finalize(partials, gamma, beta, None, 0.1, EPS)
    assert_within_budget(reference.bn_join(Deferred(raw, stored), Deferred(side))[0], judge, eager, "stored")
