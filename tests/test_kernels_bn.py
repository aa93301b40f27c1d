"""The BatchNorm kernels against float64, in Triton's interpreter or on the GPU."""

import pytest
import torch
from few_rows import FewRows

from fused_resnet import reference
from fused_resnet.plan import TileConfig
from fused_resnet.reference import Deferred, Gradient, Running
from fused_resnet.testing import MAP_SHAPES, assert_within_budget, random_activation, random_affine, random_bn

bn_kernels = pytest.importorskip("fused_resnet.kernels.bn", reason="needs Triton", exc_type=ImportError)

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]


PLAN = FewRows("triton", TileConfig(16, 32, num_warps=4, num_stages=2), "test")


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def random_partials(rows, channels, generator, device, mean=3.0):
    """Partial statistics whose last third of rows is empty, as when there are fewer pixels than rows."""
    partials = torch.rand(rows, 3, channels, generator=generator) + 0.5
    partials[:, 0] = torch.randint(1, 257, (rows, 1), generator=generator).float()
    partials[:, 1] += mean
    partials[:, 2] *= partials[:, 0]
    partials[rows - rows // 3 :] = 0
    return partials.to(device)


def gradient(c, generator):
    """(g, mask) for an activation: correlated like it, about a third of the bits off."""
    g = random_activation(tuple(c.shape), c.dtype, generator, mean=0.1, device=c.device)
    bits = torch.rand(c.shape, generator=generator).to(c.device) > 0.3
    return g, reference.pack_mask(bits)


@pytest.mark.parametrize("rows,channels", [(64, 35), (1, 8), (100, 65)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16, None])
def test_finalize(rows, channels, affine, momentum, buffers, generator, device):
    partials = random_partials(rows, channels, generator, device)
    gamma, beta = random_affine(channels, generator, device) if affine else (None, None)
    runs = {}
    for name, dtype in (("got", torch.float32), ("ref", torch.float64), ("low", torch.float32)):
        running = None
        if buffers is not None:
            keep = torch.float64 if name == "ref" else buffers
            start = torch.linspace(0.5, 2, channels, device=device).to(buffers).to(keep)
            running = Running(start.clone(), start.clone(), torch.tensor(3, device=device))
        arguments = partials.to(dtype), *(None if v is None else v.to(dtype) for v in (gamma, beta))
        launch = bn_kernels.launch_bn_finalize if name == "got" else reference.bn_finalize
        options = {"plan": PLAN} if name == "got" else {}
        runs[name] = launch(*arguments, running, momentum, 1e-5, **options), running
    for row, what in enumerate(("mean", "rstd", "scale", "shift", "inv_count")):
        assert_within_budget(runs["got"][0][row], runs["ref"][0][row], runs["low"][0][row], what)
    if buffers is not None:
        running = runs["got"][1]
        assert running.num_batches_tracked.item() == 4
        assert running.mean.dtype == buffers
        for i, what in enumerate(("running mean", "running variance")):
            assert_within_budget(running[i], runs["ref"][1][i], runs["low"][1][i], what)


def test_finalize_without_counter(generator, device):
    partials = random_partials(4, 8, generator, device)
    running = Running(torch.zeros(8, device=device), torch.ones(8, device=device))
    bn_kernels.launch_bn_finalize(partials, None, None, running, 0.1, 1e-5, PLAN)
    assert (running.mean != 0).all()
    with pytest.raises(ValueError, match="num_batches_tracked"):
        bn_kernels.launch_bn_finalize(partials, None, None, running, None, 1e-5, PLAN)


def test_finalize_does_not_cancel(generator, device):
    """Mean 100, standard deviation 0.1, in 64 rows whose means differ by less than fp32 resolves in squares."""
    c = random_activation((64, 16, 16, 1), torch.float32, generator, mean=100.0, std=0.1, device=device)
    partials = torch.cat([reference.channel_partials(image) for image in c.double().split(1)]).float()
    bn = bn_kernels.launch_bn_finalize(partials, None, None, None, 0.1, 1e-5, PLAN)
    var, mean = torch.var_mean(c.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(bn[reference.MEAN].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(bn[reference.RSTD].double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows,channels", [(64, 35), (1, 8), (100, 65)])
def test_merge_partials(rows, channels, generator, device):
    partials = random_partials(rows, channels, generator, device)
    merged = bn_kernels.launch_merge_partials(partials, PLAN)
    assert merged.shape == (1, 3, channels)
    ref, low = reference.merge_partials(partials.double()), reference.merge_partials(partials)
    for row, what in enumerate(("count", "mean", "M2")):
        assert_within_budget(merged[0, row], ref[0, row], low[0, row], what)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen(affine, dtype, generator, device):
    mean, var = torch.randn(35, generator=generator), torch.rand(35, generator=generator) + 0.1
    mean, var = mean.to(device, dtype), var.to(device, dtype)
    gamma, beta = random_affine(35, generator, device) if affine else (None, None)
    bn = bn_kernels.launch_bn_frozen(mean, var, gamma, beta, 1e-5, PLAN)
    ref = reference.bn_frozen(*double(mean, var, gamma, beta), 1e-5)
    low = reference.bn_frozen(mean, var, gamma, beta, 1e-5)
    for row in range(5):
        assert_within_budget(bn[row], ref[row], low[row])
    assert (bn[reference.INV_COUNT] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_act(shape, relu, dtype, generator, device):
    c = random_activation(shape, dtype, generator, device=device)
    a = Deferred(c, random_bn(c, generator))
    y = bn_kernels.launch_bn_act(a, relu, PLAN)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(y, reference.bn_act(Deferred(*double(*a)), relu), reference.bn_act(a, relu))
    plain = bn_kernels.launch_bn_act(Deferred(c), relu, PLAN)
    torch.testing.assert_close(plain, c.relu() if relu else c, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_join(shape, projection, dtype, generator, device):
    c, s = (random_activation(shape, dtype, generator, mean=m, device=device) for m in (0.5, -0.3))
    main, shortcut = Deferred(c, random_bn(c, generator)), Deferred(s, random_bn(s, generator) if projection else None)
    out, mask = bn_kernels.launch_bn_join(main, shortcut, PLAN)
    ref, _ = reference.bn_join(Deferred(*double(*main)), Deferred(*double(*shortcut)))
    assert_within_budget(out, ref, reference.bn_join(main, shortcut)[0])
    bits = reference.unpack_mask(mask, shape[1])
    assert bits[out > 0].all() and not (bits & (ref < -1e-3)).any()
    torch.testing.assert_close(mask, reference.pack_mask(bits), rtol=0, atol=0)


def check_sums(got, ref, low, what):
    assert got.shape[0] == PLAN.statistics_rows(got.shape[2])
    for row, name in enumerate(("sum g", "sum g xhat")):
        merged = got.double().sum(0)[row].float()
        assert_within_budget(merged, ref.sum(0)[row], low.sum(0)[row], f"{what}: {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_act_sums(shape, dtype, generator, device):
    c = random_activation(shape, dtype, generator, device=device)
    a, (dy, _) = Deferred(c, random_bn(c, generator)), gradient(c, generator)
    g, sums = bn_kernels.launch_bn_act_sums(dy, a, PLAN)
    # Against the kernel's own g: a value at the ReLU's edge may fall on either side.
    ref_sums = reference.channel_sums(*double(g, *a))
    low_g, low_sums = reference.bn_act_sums(dy, a)
    check_sums(sums, ref_sums, low_sums, "main")
    far = reference.affine(c.double(), a.bn.double()).abs() > 1e-4
    assert torch.equal(g[far], low_g[far]) and g.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", MAP_SHAPES[:3])
def test_join_sums(shape, masked, projection, dtype, generator, device):
    c, s = (random_activation(shape, dtype, generator, mean=m, device=device) for m in (0.5, -0.3))
    dout, mask = gradient(c, generator)
    mask = mask if masked else None
    main, shortcut = Deferred(c, random_bn(c, generator)), Deferred(s, random_bn(s, generator) if projection else None)
    got = bn_kernels.launch_join_sums(dout, mask, main, shortcut, PLAN)
    ref = reference.join_sums(dout.double(), mask, Deferred(*double(*main)), Deferred(*double(*shortcut)))
    low = reference.join_sums(dout, mask, main, shortcut)
    check_sums(got[0], ref[0], low[0], "main")
    assert (got[1] is None) == (not projection)
    if projection:
        check_sums(got[1], ref[1], low[1], "shortcut")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("world", [0, 2])
def test_backward_finalize(world, frozen, generator, device):
    c = random_activation((2, 35, 5, 5), torch.float32, generator, device=device)
    bn = random_bn(c, generator, frozen)
    sums = torch.randn(64, 2, 35, generator=generator).to(device)
    total = torch.randn(world, 2, 35, generator=generator).to(device) if world else None
    got = bn_kernels.launch_bn_backward_finalize(sums, bn, total, PLAN)
    ref = reference.bn_backward_finalize(*double(sums, bn, total))
    low = reference.bn_backward_finalize(sums, bn, total)
    for row, what in enumerate("ABC"):
        assert_within_budget(got[0][row], ref[0][row], low[0][row], what)
    assert_within_budget(got[1], ref[1], low[1], "dgamma")
    assert_within_budget(got[2], ref[2], low[2], "dbeta")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_backward_apply(shape, masked, dtype, generator, device):
    c = random_activation(shape, dtype, generator, device=device)
    g, mask = gradient(c, generator)
    coef = torch.randn(3, shape[1], generator=generator).to(device)
    grad = Gradient(g, mask if masked else None, c, coef)
    dc = bn_kernels.launch_bn_backward_apply(grad, PLAN)
    ref = reference.bn_backward_apply(Gradient(g.double(), grad.mask, *double(c, coef)))
    assert_within_budget(dc, ref, reference.bn_backward_apply(grad))
    plain = bn_kernels.launch_bn_backward_apply(Gradient(g, mask), PLAN)
    torch.testing.assert_close(plain, reference.relu_grad(g, mask), rtol=0, atol=0)
    torch.testing.assert_close(bn_kernels.launch_relu_grad(g, mask, PLAN), plain, rtol=0, atol=0)


def test_autograd_of_batch_norm(generator, device):
    """Statistics to gradients by the kernels alone, against float64 autograd of F.batch_norm + ReLU."""
    c = random_activation((3, 16, 6, 5), torch.float32, generator, mean=2.0, device=device)
    gamma, beta = random_affine(16, generator, device)
    dy, _ = gradient(c, generator)
    bn = bn_kernels.launch_bn_finalize(reference.channel_partials(c), gamma, beta, None, 0.1, 1e-5, PLAN)
    y = bn_kernels.launch_bn_act(Deferred(c, bn), True, PLAN)
    g, sums = bn_kernels.launch_bn_act_sums(dy, Deferred(c, bn), PLAN)
    coef, dgamma, dbeta = bn_kernels.launch_bn_backward_finalize(sums, bn, None, PLAN)
    dc = bn_kernels.launch_bn_backward_apply(Gradient(g, None, c, coef), PLAN)

    def autograd(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (c, gamma, beta)]
        out = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True).relu()
        return out.detach(), *torch.autograd.grad(out, leaves, dy.to(dtype))

    for got, ref, low, what in zip(
        (y, dc, dgamma, dbeta), autograd(torch.float64), autograd(torch.float32), ("y", "dc", "dgamma", "dbeta")
    ):
        assert_within_budget(got, ref, low, what)
