"""The stem's max-pool behind BatchNorm and ReLU, forward and backward, in Triton's interpreter or on the GPU."""

import pytest
import torch
import torch.nn.functional as F
from few_rows import FewRows

from fused_resnet import reference
from fused_resnet.plan import Device, Problem, TileConfig, triton_plan
from fused_resnet.reference import Deferred
from fused_resnet.testing import MAP_SHAPES, as_double, assert_within_budget, random_activation, random_bn

pool = pytest.importorskip("fused_resnet.kernels.pool", reason="needs Triton", exc_type=ImportError)
from far import Far, run_program  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]


PLAN = FewRows("triton", TileConfig(32, 64, num_warps=4, num_stages=2), "test")
SHAPES = (*MAP_SHAPES, (1, 16, 6, 4), (2, 8, 1, 9))


def quantised(shape, dtype, generator, device):
    """A map on whose few values the affine is exact, with many ties; negative, zero and positive scales."""
    n, c, h, w = shape
    rows = torch.randint(-3, 4, (n * h * w, c), generator=generator) / 4
    powers = torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0])[torch.arange(c) % 5]
    shift = torch.randint(-2, 3, (c,), generator=generator) / 4
    mean, rstd = torch.randn(c, generator=generator), torch.rand(c, generator=generator) + 0.5
    bn = torch.stack((mean, rstd, powers, shift, torch.full((c,), 1 / (n * h * w))))
    return Deferred(rows.view(n, h, w, c).permute(0, 3, 1, 2).to(device, dtype), bn.to(device))


def windows_of(x):
    """The nine values of each window, fp32 [N, C, 9, windows]; -1 outside of the map."""
    return F.unfold(F.pad(x.float(), (1, 1, 1, 1), value=-1.0), 3, stride=2).view(*x.shape[:2], 9, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, dtype, generator, device):
    c = random_activation(shape, dtype, generator, device=device)
    a = Deferred(c, random_bn(c, generator))
    y, index = pool.launch_bn_act_pool(a, PLAN)
    low, low_index = reference.bn_act_pool(a)
    assert (y.dtype, index.dtype) == (dtype, torch.uint8)
    assert (y.stride(), index.stride()) == (low.stride(), low_index.stride())
    assert_within_budget(y, reference.bn_act_pool(as_double(a))[0], low)
    # Each tap points at a value within rounding of the maximum.
    won = windows_of(reference.bn_act(a, True)).gather(2, index.flatten(2).unsqueeze(2).long()).view(y.shape)
    torch.testing.assert_close(won, y.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_of_equal_values_wins(shape, dtype, generator, device):
    a = quantised(shape, dtype, generator, device)
    y, index = pool.launch_bn_act_pool(a, PLAN)
    ref, ref_index = reference.bn_act_pool(a)
    assert torch.equal(y, ref) and torch.equal(index, ref_index)
    if shape[2] > 1:
        windows = windows_of(reference.bn_act(a, True))
        best = windows.amax(2, keepdim=True)
        ties = ((windows == best).sum(2, keepdim=True) > 1)[best > 0]
        assert ties.float().mean() > 0.3
        assert (best == 0).any()


def test_values_are_rounded_before_they_are_compared(generator, device):
    """2050.25 and 2050.5 are one number in fp16: the first wins, not the larger."""
    c = torch.randint(1, 3, (2, 8, 7, 6), generator=generator).to(device, torch.float16) / 4
    bn = torch.tensor([0.0, 1.0, 1.0, 2050.0, 0.0], device=device).view(5, 1).expand(5, 8).contiguous()
    a = Deferred(c.to(memory_format=torch.channels_last), bn)
    y, index = pool.launch_bn_act_pool(a, PLAN)
    assert (y == 2050).all() and torch.equal(index, reference.bn_act_pool(a)[1])


def test_a_nan_wins_its_windows(generator, device):
    a = quantised((2, 35, 7, 6), torch.float32, generator, device)
    a.c[torch.rand(a.c.shape, generator=generator) < 0.1] = float("nan")
    a.bn[reference.SCALE, 3] = 0.0  # 0 * NaN is a NaN, too
    y, index = pool.launch_bn_act_pool(a, PLAN)
    ref, ref_index = reference.bn_act_pool(a)
    assert 0 < y.isnan().sum() < y.numel()
    torch.testing.assert_close(y, ref, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, ref_index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype, generator, device):
    a = quantised(shape, dtype, generator, device)
    _, index = reference.bn_act_pool(a)
    dy = random_activation(tuple(index.shape), dtype, generator, mean=0.1, device=device)
    g, sums = pool.launch_bn_act_pool_backward(dy, index, a, PLAN)
    ref, ref_sums = reference.bn_act_pool_backward(*as_double((dy, index, a)))
    low, low_sums = reference.bn_act_pool_backward(dy, index, a)
    assert g.dtype == dtype and g.stride() == low.stride()
    assert_within_budget(g, ref, low, "g")
    assert sums.shape == (3, 2, shape[1])
    for row, what in enumerate(("sum g", "sum g xhat")):
        assert_within_budget(sums.double().sum(0)[row].float(), ref_sums[0, row], low_sums[0, row].double(), what)


def test_backward_in_several_chunks(generator, device):
    """561 blocks of 2 x 2 pixels, the last of each row and column cut off, in three chunks of 256."""
    a = quantised((1, 8, 65, 33), torch.float32, generator, device)
    _, index = pool.launch_bn_act_pool(a, PLAN)
    dy = random_activation(tuple(index.shape), torch.float32, generator, device=device)
    g, sums = pool.launch_bn_act_pool_backward(dy, index, a, PLAN)
    xhat = (a.c - a.bn[reference.MEAN].view(1, -1, 1, 1)) * a.bn[reference.RSTD].view(1, -1, 1, 1)
    for row, value in enumerate((g, g * xhat)):
        blocks = F.pad(value.double(), (0, 1, 0, 1)).view(8, 33, 2, 17, 2).sum((2, 4)).flatten(1)
        for chunk, part in enumerate(blocks.split(256, dim=1)):
            torch.testing.assert_close(sums[chunk, row].double(), part.sum(1), rtol=1e-5, atol=1e-5)
    again = pool.launch_bn_act_pool_backward(dy, index, a, PLAN)
    assert torch.equal(g, again[0]) and torch.equal(sums, again[1])


def test_agrees_with_autograd_of_max_pool(generator, device):
    c = random_activation((2, 19, 9, 7), torch.float32, generator, device=device)
    a = Deferred(c, random_bn(c, generator))
    affine = reference.affine(*as_double(a)).requires_grad_()
    y_ref = F.max_pool2d(affine.relu(), 3, 2, 1)
    y, index = pool.launch_bn_act_pool(a, PLAN)
    dy = random_activation(tuple(y.shape), torch.float32, generator, device=device)
    (expected,) = torch.autograd.grad(y_ref, affine, dy.double())
    g, _ = pool.launch_bn_act_pool_backward(dy, index, a, PLAN)
    torch.testing.assert_close(y.double(), y_ref.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g.double(), expected, rtol=1e-6, atol=1e-6)


def test_without_taps(generator, device):
    a = quantised((1, 16, 6, 5), torch.float32, generator, device)
    y, index = pool.launch_pool(*a, False, PLAN)
    assert index is None and torch.equal(y, pool.launch_bn_act_pool(a, PLAN)[0])


@pytest.mark.parametrize("op", ["bn_act_pool", "bn_act_pool_backward"])
def test_heuristic_tiles_give_the_same_answer(op, generator, device):
    a = quantised((1, 136, 5, 4), torch.float16, generator, device)
    plan = triton_plan(Problem(op, 1, 5, 4, 136, 136, dtype="float16"), None, Device.default(90), "test")
    plan = FewRows("triton", plan.config, plan.reason, plan.module, plan.launch)
    arguments = (a,)
    if op.endswith("backward"):
        y, index = reference.bn_act_pool(a)
        arguments = (y, index, a)
    got, ref = getattr(pool, plan.launch)(*arguments, plan=plan), getattr(reference, op)(*as_double(arguments))
    torch.testing.assert_close(got[0].double(), ref[0], rtol=1e-3, atol=1e-3)


def test_empty_batch(device):
    c = torch.empty((0, 8, 5, 5), device=device, memory_format=torch.channels_last)
    a = Deferred(c, torch.ones(5, 8, device=device))
    y, index = pool.launch_bn_act_pool(a, PLAN)
    assert y.shape == index.shape == (0, 8, 3, 3)
    g, sums = pool.launch_bn_act_pool_backward(y, index, a, PLAN)
    assert g.shape == c.shape and (sums == 0).all()


if not torch.cuda.is_available():
    # Where kernels are compiled, these addresses would have to exist.

    def test_more_than_2_31_elements(generator, monkeypatch):
        """Four images of 4 x 4 pixels behind 100 million others: 16 windows, a tile and a chunk of them."""
        a, image = quantised((4, 24, 4, 4), torch.float32, generator, "cpu"), 100_000_000
        y, index = reference.bn_act_pool(a)
        got, got_index = torch.empty_like(y), torch.empty_like(index)
        sizes = {"channels": 24, "in_h": 4, "in_w": 4, "out_h": 2, "out_w": 2, "bn_ptr": a.bn}
        far_c, windows = Far(a.c, image * 16 * 24), image * 4
        run_program(
            windows // 16,
            pool._bn_act_pool_kernel,
            monkeypatch,
            c_ptr=far_c,
            y_ptr=Far(got, windows * 24),
            index_ptr=Far(got_index, windows * 24),
            windows=windows + 16,
            **sizes,
        )
        assert torch.equal(got, y) and torch.equal(got_index, index)
        g, sums = torch.empty_like(a.c), torch.empty(1, 2, 24)
        run_program(
            windows // 16,
            pool._bn_act_pool_backward_kernel,
            monkeypatch,
            dy_ptr=Far(y, windows * 24),
            index_ptr=Far(index, windows * 24),
            c_ptr=far_c,
            g_ptr=Far(g, image * 16 * 24),
            sums_ptr=Far(sums, windows // 16 * 2 * 24),
            blocks=windows + 16,
            chunk_blocks=16,
            **sizes,
        )
        ref, ref_sums = reference.bn_act_pool_backward(y, index, a)
        assert torch.equal(g, ref)
        torch.testing.assert_close(sums, ref_sums, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named(generator, device):
    a = quantised((1, 8, 5, 4), torch.float32, generator, device)
    y, index = pool.launch_bn_act_pool(a, PLAN)
    with pytest.raises(ValueError, match="a must be .* channels_last"):
        pool.launch_bn_act_pool(Deferred(a.c.contiguous(), a.bn), PLAN)
    with pytest.raises(ValueError, match="a.bn must be"):
        pool.launch_bn_act_pool(Deferred(a.c, a.bn[:, :4]), PLAN)
    with pytest.raises(ValueError, match=r"dy is \(1, 8, 5, 4\)"):
        pool.launch_bn_act_pool_backward(a.c, index, a, PLAN)
    with pytest.raises(ValueError, match="index is .* torch.float32"):
        pool.launch_bn_act_pool_backward(y, y, a, PLAN)
    with pytest.raises(ValueError, match="dy must be .* channels_last"):
        pool.launch_bn_act_pool_backward(y.contiguous(), index, a, PLAN)
    huge = torch.empty(2**11, 1, 2**10, 2**10, device="meta").to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="32-bit"):
        pool.launch_bn_act_pool(Deferred(huge, torch.empty(5, 1, device="meta")), PLAN)
