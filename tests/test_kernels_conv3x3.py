"""The R x S convolution kernels, forward and backward, against float64, in Triton's interpreter or on the GPU."""

from dataclasses import replace

import pytest
import torch
from few_rows import FewRows

from fused_resnet import reference
from fused_resnet.plan import Device, Plan, Problem, TileConfig, triton_plan, unsupported
from fused_resnet.reference import Deferred, Geometry, Gradient
from fused_resnet.testing import (
    as_double,
    assert_within_budget,
    random_activation,
    random_bn,
    random_frozen,
    random_weight,
)

conv3x3 = pytest.importorskip("fused_resnet.kernels.conv3x3", reason="needs Triton", exc_type=ImportError)
conv3x3_grad = pytest.importorskip("fused_resnet.kernels.conv3x3_grad", reason="needs Triton", exc_type=ImportError)

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]


PLAN = FewRows("triton", TileConfig(64, 64, 32, 4, 2), "test")
SMALL = FewRows("triton", TileConfig(16, 32, 16, 4, 2), "test")
# (images, input channels, height, width, output channels, kernel, stride, padding, dilation): odd channels and maps,
# stride 2 on odd and even maps, dilation, one pixel, kernels that are not square, and a strided 1x1 with padding.
SHAPES = {
    "3x3": ((3, 35, 5, 7, 67, (3, 3), (1, 1), (1, 1), (1, 1)), PLAN),
    "stride 2, odd": ((1, 19, 7, 9, 33, (3, 3), (2, 2), (1, 1), (1, 1)), SMALL),
    "stride 2, even": ((3, 65, 6, 4, 16, (3, 3), (2, 2), (1, 1), (1, 1)), PLAN),
    "dilation 2": ((1, 17, 9, 6, 24, (3, 3), (1, 1), (2, 2), (2, 2)), SMALL),
    "stride 2, dilation 2": ((1, 16, 7, 8, 20, (3, 3), (2, 2), (2, 2), (2, 2)), SMALL),
    "one pixel": ((3, 35, 1, 1, 20, (3, 3), (1, 1), (1, 1), (1, 1)), SMALL),
    "no padding": ((1, 8, 5, 5, 16, (3, 3), (1, 1), (0, 0), (1, 1)), SMALL),
    "5x2": ((2, 9, 8, 5, 18, (5, 2), (3, 1), (2, 0), (1, 2)), SMALL),
    "1x1, stride 2, padding 1": ((1, 16, 5, 6, 16, (1, 1), (2, 2), (1, 1), (1, 1)), SMALL),
}
SPLIT_SHAPES = {"plain 1x1": ((2, 100, 5, 3, 20, (1, 1), (1, 1), (0, 0), (1, 1)), SMALL)}
EVERY_SHAPE = pytest.mark.parametrize("name", SHAPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


class Case:
    """Operands of one convolution: input, weight, geometry, and random activations shaped as its output."""

    def __init__(self, name, dtype, generator, device, prologue=False):
        (n, c, h, w, k, kernel, *geometry), self.plan = (SHAPES | SPLIT_SHAPES)[name]
        self.geometry, self.hw, self.generator, self.device, self.dtype = (
            Geometry(*geometry),
            (h, w),
            generator,
            device,
            dtype,
        )
        x = self.activation((n, c, h, w))
        self.a = Deferred(x, random_bn(x, generator) if prologue else None)
        self.w = random_weight((k, c, *kernel), dtype, generator, device)
        self.out_shape = tuple(torch.nn.functional.conv2d(x, self.w, None, *geometry).shape)

    def activation(self, shape, mean=0.5):
        return random_activation(tuple(shape), self.dtype, self.generator, mean, device=self.device)

    def gradient(self):
        return Gradient(self.activation(self.out_shape, mean=0.1))


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def bits_of(shape, generator, device):
    """Random ReLU bits of an activation."""
    return reference.pack_mask(torch.rand(shape, generator=generator) > 0.4).to(device)


@EVERY_DTYPE
@EVERY_SHAPE
def test_stats(name, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    c, partials = conv3x3.launch_conv3x3_stats(case.a, case.w, case.geometry, case.plan)
    low, low_partials = reference.conv_stats(case.a, case.w, case.geometry)
    ref, ref_partials = reference.conv_stats(Deferred(*double(*case.a)), case.w.double(), case.geometry)
    assert c.dtype == dtype and c.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(c, ref, low, "c")
    assert partials.shape == (3, 3, case.w.shape[0])
    got = reference.merge_partials(partials.double())[0]
    torch.testing.assert_close(got[0], ref_partials[0, 0], rtol=0, atol=0)
    for row, what in ((1, "mean"), (2, "M2")):
        assert_within_budget(got[row].float(), ref_partials[0, row], low_partials[0, row].double(), what)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["3x3", "stride 2, odd", "5x2", "1x1, stride 2, padding 1"])
def test_prologue_pads_after_the_affine(name, dtype, generator, device):
    """Zeros of the padding that went through BatchNorm and ReLU would be relu(shift)."""
    case = Case(name, dtype, generator, device, prologue=True)
    case.a.bn[3] += 2.0
    c, _ = conv3x3.launch_conv3x3_stats(case.a, case.w, case.geometry, case.plan)
    low, _ = reference.conv_stats(case.a, case.w, case.geometry)
    ref, _ = reference.conv_stats(Deferred(*double(*case.a)), case.w.double(), case.geometry)
    assert_within_budget(c, ref, low)


def test_stats_across_chunks_and_tiles(generator, device):
    """Three rows of 256 pixels for 575: several tiles in a row, a row that ends early; then rows without a pixel."""
    x = random_activation((1, 4, 25, 23), torch.float32, generator, device=device)
    w = random_weight((20, 4, 3, 3), torch.float32, generator, device)
    plan = FewRows("triton", TileConfig(128, 32, 16, 4, 2), "test")
    c, partials = conv3x3.launch_conv3x3_stats(Deferred(x), w, Geometry(padding=(1, 1)), plan)
    assert partials[:, 0, 0].tolist() == [256.0, 256.0, 63.0]
    rows = c.permute(0, 2, 3, 1).reshape(-1, 20).double()
    for row, chunk in enumerate(rows.split(256)):
        torch.testing.assert_close(partials[row, 1].double(), chunk.mean(0), rtol=1e-5, atol=1e-6)
        m2 = (chunk - chunk.mean(0)).square().sum(0)
        torch.testing.assert_close(partials[row, 2].double(), m2, rtol=1e-5, atol=0)
    _, partials = conv3x3.launch_conv3x3_stats(
        Deferred(x[:, :, :3, :3].contiguous(memory_format=torch.channels_last)), w, Geometry(), plan
    )
    assert partials[:, 0, 0].tolist() == [1.0, 0.0, 0.0] and (partials[1:] == 0).all()


def test_statistics_do_not_cancel(generator, device):
    """Channels with mean 100 and standard deviation 0.1: E[x^2] - E[x]^2 in fp32 would lose every digit."""
    x = random_activation((4, 16, 9, 9), torch.float32, generator, mean=100.0, std=0.1, device=device)
    w = torch.zeros(16, 16, 3, 3, device=device)
    w[:, :, 1, 1] = torch.eye(16, device=device)
    _, partials = conv3x3.launch_conv3x3_stats(Deferred(x), w, Geometry(padding=(1, 1)), PLAN)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, got_mean, got_m2 = reference.merge_partials(partials.double())[0]
    torch.testing.assert_close(got_mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_m2 / (4 * 81), var, rtol=1e-4, atol=0)


@EVERY_DTYPE
@pytest.mark.parametrize("relu,residual", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", ["3x3", "stride 2, even", "dilation 2", "one pixel"])
def test_affine(name, relu, residual, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    side = case.activation(case.out_shape) if residual else None
    args = case.a.c, case.w, random_frozen(case.w.shape[0], generator, device), side, relu, case.geometry
    out = conv3x3.launch_conv3x3_affine(*args, case.plan)
    low, ref = reference.conv_affine(*args), reference.conv_affine(*as_double(args))
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(out, ref, low)


@EVERY_DTYPE
@pytest.mark.parametrize("split", [2, 5])
@pytest.mark.parametrize("name", ["3x3", "stride 2, odd", "plain 1x1"])
def test_affine_of_a_split_depth(name, split, dtype, generator, device):
    """Shares of unequal numbers of steps, and some that end within a tap; the same bits again."""
    case = Case(name, dtype, generator, device)
    plan = replace(case.plan, config=replace(case.plan.config, block_k=16, split_k=split))
    side = case.activation(case.out_shape)
    args = case.a.c, case.w, random_frozen(case.w.shape[0], generator, device), side, True, case.geometry
    out = conv3x3.launch_conv3x3_affine(*args, plan)
    assert_within_budget(out, reference.conv_affine(*as_double(args)), reference.conv_affine(*args))
    assert torch.equal(out, conv3x3.launch_conv3x3_affine(*args, plan))


def test_depth_is_split_where_tiles_leave_the_card_idle():
    h100 = Device.default(90)
    late = Problem("conv_affine", 1, 7, 7, 512, 512, 3, 3, padding=(1, 1), epilogue="affine")
    config = triton_plan(late, None, h100, "").config
    assert config.split_k == 16 and unsupported(late, config, h100) is None
    assert triton_plan(replace(late, n=256), None, h100, "").config.split_k == 1
    pointwise = Problem("conv_affine", 1, 7, 7, 2048, 512, 1, 1, epilogue="affine")
    plan = triton_plan(pointwise, None, h100, "")
    assert (plan.module, plan.config.split_k) == ("conv3x3", 8)
    stats = Problem("conv_stats", 1, 7, 7, 512, 512, 3, 3, padding=(1, 1), epilogue="stats")
    assert triton_plan(stats, None, h100, "").config.split_k == 1
    assert "affine" in unsupported(stats, replace(config, split_k=2), h100)
    assert "steps in depth" in unsupported(late, replace(config, split_k=100), h100)
    assert "MB of partial" in unsupported(replace(late, n=256, h=56, w=56), config, h100)


@EVERY_DTYPE
@EVERY_SHAPE
def test_dgrad(name, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    grad = case.gradient()
    dx, sums = conv3x3_grad.launch_conv3x3_dgrad(grad, case.w, case.geometry, case.hw, None, None, 1, plan=case.plan)
    low, _ = reference.conv_dgrad(grad, case.w, case.geometry, case.hw)
    ref, _ = reference.conv_dgrad(Gradient(grad.g.double()), case.w.double(), case.geometry, case.hw)
    assert sums is None and dx.dtype == dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(dx, ref, low)


@EVERY_DTYPE
@pytest.mark.parametrize("addend_stride", [0, 1, 2])
@pytest.mark.parametrize("name", ["3x3", "stride 2, odd", "stride 2, even", "stride 2, dilation 2", "one pixel", "5x2"])
def test_dgrad_relu_sums_and_addend(name, addend_stride, dtype, generator, device):
    case = Case(name, dtype, generator, device, prologue=True)
    grad, addend = case.gradient(), None
    if addend_stride:
        n, c, h, w = case.a.c.shape
        shape = (n, c, -(-h // addend_stride), -(-w // addend_stride))
        addend = Gradient(
            case.activation(shape, mean=0.1), bits_of(shape, generator, device) if addend_stride == 1 else None
        )
    args = case.w, case.geometry, case.hw
    dx, sums = conv3x3_grad.launch_conv3x3_dgrad(grad, *args, case.a, addend, max(1, addend_stride), case.plan)
    low, low_sums = reference.conv_dgrad(grad, *args, case.a, addend, max(1, addend_stride))
    add64 = None if addend is None else Gradient(addend.g.double(), addend.mask)
    a64 = Deferred(*double(*case.a))
    ref, ref_sums = reference.conv_dgrad(
        Gradient(grad.g.double()), case.w.double(), *args[1:], a64, add64, max(1, addend_stride)
    )
    assert_within_budget(dx, ref, low, "dx")
    assert sums.shape == (3, 2, case.a.c.shape[1])
    for row, what in ((0, "sum g"), (1, "sum g xhat")):
        # One value near zero says nothing about the size of what was added up: rounding counts relative to the terms.
        total = sums[:, row].double().sum(0)
        assert_within_budget(total.float(), ref_sums[0, row], low_sums[0, row].double(), what)


@EVERY_DTYPE
@pytest.mark.parametrize("prologue", [False, True])
@EVERY_SHAPE
def test_wgrad(name, prologue, dtype, generator, device):
    case = Case(name, dtype, generator, device, prologue)
    if prologue:
        case.a.bn[3] += 1.0
    grad = case.gradient()
    dw = conv3x3_grad.launch_conv3x3_wgrad(case.a, grad, tuple(case.w.shape), case.geometry, case.plan)
    low = reference.conv_wgrad(case.a, grad, tuple(case.w.shape), case.geometry)
    ref = reference.conv_wgrad(
        Deferred(*double(*case.a)), Gradient(grad.g.double()), tuple(case.w.shape), case.geometry
    )
    assert dw.dtype == torch.float32 and dw.stride() == reference.channels_last(dw).stride()
    assert_within_budget(dw, ref, low)


def test_wgrad_in_several_chunks(generator, device):
    """2300 pixels are five chunks of 512, the last one short; a step of 64 pixels passes several image rows."""
    x = random_activation((4, 5, 25, 23), torch.float32, generator, device=device)
    g = random_activation((4, 18, 25, 23), torch.float32, generator, mean=0.1, device=device)
    geometry, shape = Geometry(padding=(1, 1)), (18, 5, 3, 3)
    plan = Plan("triton", TileConfig(32, 16, 64, 4, 2), "test")
    assert conv3x3_grad.wgrad_chunks(shape, 2300) == 5
    dw = conv3x3_grad.launch_conv3x3_wgrad(Deferred(x), Gradient(g), shape, geometry, plan)
    again = conv3x3_grad.launch_conv3x3_wgrad(Deferred(x), Gradient(g), shape, geometry, plan)
    assert torch.equal(dw, again)
    low = reference.conv_wgrad(Deferred(x), Gradient(g), shape, geometry)
    ref = reference.conv_wgrad(Deferred(x.double()), Gradient(g.double()), shape, geometry)
    assert_within_budget(dw, ref, low)


def test_bits_repeat(generator, device):
    case = Case("stride 2, odd", torch.float16, generator, device, prologue=True)
    grad = case.gradient()

    def everything():
        dgrad = conv3x3_grad.launch_conv3x3_dgrad(grad, case.w, case.geometry, case.hw, case.a, None, 1, case.plan)
        wgrad = conv3x3_grad.launch_conv3x3_wgrad(case.a, grad, tuple(case.w.shape), case.geometry, case.plan)
        return (*conv3x3.launch_conv3x3_stats(case.a, case.w, case.geometry, case.plan), *dgrad, wgrad)

    assert all(torch.equal(p, q) for p, q in zip(everything(), everything()))


def test_weight_in_any_memory_format(generator, device):
    case = Case("dilation 2", torch.float32, generator, device)
    expected, _ = conv3x3.launch_conv3x3_stats(case.a, case.w, case.geometry, case.plan)
    got, _ = conv3x3.launch_conv3x3_stats(case.a, case.w.contiguous(), case.geometry, case.plan)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("op", ["conv_stats", "conv_dgrad", "conv_wgrad"])
def test_heuristic_tiles_give_the_same_answer(op, generator, device):
    x = random_activation((2, 40, 9, 9), torch.float16, generator, device=device)
    w = random_weight((136, 40, 3, 3), torch.float16, generator, device)
    g = random_activation((2, 136, 9, 9), torch.float16, generator, mean=0.1, device=device)
    geometry = Geometry(padding=(1, 1))
    channels = (136, 40) if op == "conv_dgrad" else (40, 136)
    problem = Problem(op, 2, 9, 9, *channels, 3, 3, padding=(1, 1), dtype="float16")
    plan = triton_plan(problem, None, Device.default(90), "test")

    def arguments(x, w, g):
        return {
            "conv_stats": (Deferred(x), w, geometry),
            "conv_dgrad": (Gradient(g), w, geometry, (9, 9), None, None, 1),
            "conv_wgrad": (Deferred(x), Gradient(g), tuple(w.shape), geometry),
        }[op]

    launch = getattr({"conv3x3": conv3x3, "conv3x3_grad": conv3x3_grad}[plan.module], plan.launch)
    results = (
        launch(*arguments(x, w, g), plan=FewRows("triton", plan.config, plan.reason)),
        getattr(reference, op)(*arguments(*double(x, w, g))),
        getattr(reference, op)(*arguments(x, w, g)),
    )
    assert_within_budget(*(result[0] if isinstance(result, tuple) else result for result in results))


def test_plans_name_their_limits():
    problem = Problem("conv_stats", 1, 8, 8, 64, 64, 3, 3, padding=(1, 1))
    tile = TileConfig(128, 64, 32, 8, 3)
    assert unsupported(problem, tile, Device.default(90)) is None
    assert "more than four" in unsupported(problem, tile, Device.default(80))
    assert "32 groups" in unsupported(replace(problem, groups=32), tile, Device.default(90))
    deferred = replace(problem, op="conv_dgrad", prologue=True)
    assert "write it out" in unsupported(deferred, tile, Device.default(90))
    pointwise = replace(problem, op="conv_wgrad", r=1, s=1, padding=(0, 0))
    assert triton_plan(pointwise, tile, Device.default(90), "").module == "conv1x1_grad"


def test_nan_in_nan_out(generator, device):
    """A ReLU that turns NaN into 0 would hide a diverged run; and a NaN must not leak through the padding."""
    case = Case("3x3", torch.float32, generator, device)
    bn = random_frozen(case.w.shape[0], generator, device)
    case.a.c[0, 3, 0, 0] = float("nan")
    out = conv3x3.launch_conv3x3_affine(case.a.c, case.w, bn, None, True, case.geometry, case.plan)
    assert out[0, :, :2, :2].isnan().all() and out.isnan().sum() == out[0, :, :2, :2].numel()


def test_wrong_arguments_are_named(generator, device):
    case = Case("3x3", torch.float32, generator, device)
    a, w, geometry, plan, grad = case.a, case.w, case.geometry, case.plan, case.gradient()
    with pytest.raises(ValueError, match="channels_last"):
        conv3x3.launch_conv3x3_stats(Deferred(a.c.contiguous()), w, geometry, plan)
    with pytest.raises(ValueError, match="weight is"):
        conv3x3.launch_conv3x3_stats(a, w[:, :8], geometry, plan)
    with pytest.raises(ValueError, match="does not fit"):
        conv3x3.launch_conv3x3_stats(a, w, Geometry(dilation=(3, 3)), plan)
    with pytest.raises(ValueError, match="groups"):
        conv3x3.launch_conv3x3_stats(a, w, geometry._replace(groups=5), plan)
    with pytest.raises(ValueError, match="residual"):
        conv3x3.launch_conv3x3_affine(a.c, w, random_frozen(w.shape[0], generator, device), a.c, True, geometry, plan)
    deferred = Gradient(grad.g, bits_of(grad.g.shape, generator, device))
    with pytest.raises(ValueError, match="written out"):
        conv3x3_grad.launch_conv3x3_dgrad(deferred, w, geometry, case.hw, None, None, 1, plan)
    with pytest.raises(ValueError, match="expected"):
        conv3x3_grad.launch_conv3x3_dgrad(grad, w, geometry, (6, 6), None, None, 1, plan)
    with pytest.raises(ValueError, match="addend"):
        conv3x3_grad.launch_conv3x3_dgrad(grad, w, geometry, case.hw, None, Gradient(a.c), 2, plan)
    with pytest.raises(ValueError, match="expected 3 channels"):
        conv3x3_grad.launch_conv3x3_wgrad(a, grad, (67, 3, 3, 3), geometry, plan)
