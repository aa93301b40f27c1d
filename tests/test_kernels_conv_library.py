"""The library's convolution with fused passes around it, against float64, in Triton's interpreter or on the GPU."""

from functools import partial

import pytest
import torch
from few_rows import FewRows

from fused_resnet import reference
from fused_resnet.plan import Device, Plan, Problem, TileConfig, plan_for, triton_plan
from fused_resnet.reference import Deferred, Geometry, Gradient
from fused_resnet.testing import (
    as_double,
    assert_within_budget,
    check_operator,
    random_activation,
    random_bn,
    random_frozen,
    random_weight,
)

conv_library = pytest.importorskip("fused_resnet.kernels.conv_library", reason="needs Triton", exc_type=ImportError)

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = ["float32", "bfloat16"]
H100 = Device.default(90)


PLAN = FewRows("triton", TileConfig(16, 32), "test")
# Keyword arguments of Problem: grouped, dilated, strided on odd maps, one pixel, channels that are no multiple of 8.
CONVOLUTIONS = {
    "grouped": {"n": 2, "h": 7, "w": 5, "c": 64, "k": 64, "groups": 32, "stride": (2, 2), "padding": (1, 1)},
    "dilated": {"n": 1, "h": 9, "w": 8, "c": 20, "k": 35, "padding": (2, 2), "dilation": (2, 2)},
    "one pixel": {"n": 3, "h": 1, "w": 1, "c": 65, "k": 24, "padding": (1, 1)},
}
LAUNCHES = {
    "conv_stats": ("launch_library_stats", ["stats"]),
    "conv_affine": ("launch_library_affine", ["affine", "affine+residual"]),
    "conv_affine_pool": ("launch_library_affine_pool", ["affine"]),
    "conv_dgrad": ("launch_library_dgrad", ["", "relu", "add", "reluadd"]),
    "conv_wgrad": ("launch_library_wgrad", [""]),
}


def problem_of(op, epilogue, shape, dtype, prologue=False):
    convolution = Problem(op, r=3, s=3, dtype=dtype, prologue=prologue, epilogue=epilogue, **CONVOLUTIONS[shape])
    if op != "conv_dgrad":
        return convolution
    # Seen from the gradient; a multiple of the stride in its output, which the recipe for arguments assumes.
    return Problem(
        op, convolution.n, 4, 3, convolution.k, convolution.c, 3, 3, (1, 1), convolution.padding,
        convolution.dilation, convolution.groups, dtype, prologue, epilogue,
    )  # fmt: skip


CASES = [(op, epilogue) for op, (_, epilogues) in LAUNCHES.items() for epilogue in epilogues]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("op,epilogue", CASES)
def test_every_operator(op, epilogue, shape, dtype, generator, device):
    problem = problem_of(op, epilogue, shape, dtype)
    launch = getattr(conv_library, LAUNCHES[op][0])
    check_operator(problem, partial(launch, plan=PLAN), generator, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op,epilogue", [("conv_stats", "stats"), ("conv_dgrad", "relu"), ("conv_wgrad", "")])
def test_deferred_operands(op, epilogue, dtype, generator, device):
    problem = problem_of(op, epilogue, "dilated", dtype, prologue=True)
    launch = getattr(conv_library, LAUNCHES[op][0])
    check_operator(problem, partial(launch, plan=PLAN), generator, device)


def test_statistics_of_chunks(generator, device):
    """17000 pixels, 256 to a row: the last row in use is short, those behind it are empty; two channel tiles."""
    channels = 520
    c = random_activation((1, channels, 170, 100), torch.float32, generator, device=device)
    identity = torch.ones(channels, 1, 1, 1, device=device)
    geometry = Geometry(groups=channels)
    plan = Plan("triton", TileConfig(64, 512), "test")
    out, partials = conv_library.launch_library_stats(Deferred(c), identity, geometry, plan)
    torch.testing.assert_close(out, c, rtol=0, atol=0)
    rows = c.permute(0, 2, 3, 1).reshape(-1, channels).double()
    chunk = plan.chunk_pixels(17000, partials.shape[0])
    for t, row in enumerate(rows.split(chunk)):
        assert (partials[t, 0] == row.shape[0]).all()
        torch.testing.assert_close(partials[t, 1].double(), row.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(partials[t, 2].double(), (row - row.mean(0)).square().sum(0), rtol=1e-5, atol=0)
    assert t + 1 < partials.shape[0] and (partials[t + 1 :] == 0).all()


def test_statistics_do_not_cancel(generator, device):
    x = random_activation((4, 32, 9, 9), torch.float32, generator, mean=100.0, std=0.1, device=device)
    identity = torch.ones(32, 1, 1, 1, device=device)
    _, partials = conv_library.launch_library_stats(Deferred(x), identity, Geometry(groups=32), PLAN)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, got_mean, got_m2 = reference.merge_partials(partials.double())[0]
    torch.testing.assert_close(got_mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_m2 / (4 * 81), var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_masked_addend_on_its_own_grid(stride, relu, generator, device):
    shape, input_hw = (2, 35, 7, 5), (7, 5)
    g = Gradient(random_activation((2, 24, 7, 5), torch.float16, generator, device=device))
    w = random_weight((24, 35, 3, 3), torch.float16, generator, device)
    small = (2, 35, -(-7 // stride), -(-5 // stride))
    side = random_activation(small, torch.float16, generator, device=device)
    mask = reference.pack_mask(torch.rand(small, generator=generator).to(device) > 0.3)
    c = random_activation(shape, torch.float16, generator, device=device)
    relu_of = Deferred(c, random_bn(c, generator)) if relu else None
    arguments = g, w, Geometry(padding=(1, 1)), input_hw, relu_of, Gradient(side, mask), stride
    got, sums = conv_library.launch_library_dgrad(*arguments, plan=PLAN)
    want, want_sums = reference.conv_dgrad(*as_double(arguments))
    low, low_sums = reference.conv_dgrad(*arguments)
    assert_within_budget(got, want, low)
    assert (sums is None) == (not relu)
    if relu:
        assert_within_budget(sums.sum(0), want_sums.sum(0), low_sums.sum(0), "sums")


def test_no_image(device):
    """An empty batch is an empty result; its statistics count nothing."""
    x = torch.empty(0, 16, 5, 5, device=device).to(memory_format=torch.channels_last)
    w = torch.ones(16, 1, 3, 3, device=device)
    geometry = Geometry(padding=(1, 1), groups=16)
    out, partials = conv_library.launch_library_stats(Deferred(x), w, geometry, PLAN)
    assert out.shape == (0, 16, 5, 5) and (partials == 0).all()


def test_planned_where_no_kernel_of_our_own_can_run():
    grouped = Problem("conv_stats", 8, 14, 14, 128, 128, 3, 3, padding=(1, 1), groups=32, epilogue="stats")
    assert plan_for(grouped, H100, "triton").module == "conv_library"
    dense = Problem("conv_stats", 8, 14, 14, 128, 128, 3, 3, padding=(1, 1), epilogue="stats")
    assert plan_for(dense, H100, "triton").module == "conv3x3"
    # A tile without depth asks for the library's convolution: that is how a table names it.
    assert triton_plan(dense, TileConfig(16, 128), H100, "").module == "conv_library"


def test_wrong_arguments_are_named(generator, device):
    x = random_activation((1, 16, 4, 3), torch.float32, generator, device=device)
    w = random_weight((32, 16, 3, 3), torch.float32, generator, device)
    geometry = Geometry(padding=(1, 1))
    with pytest.raises(ValueError, match="channels_last"):
        conv_library.launch_library_stats(Deferred(x.contiguous()), w, geometry, PLAN)
    with pytest.raises(ValueError, match="weight is torch.float16"):
        conv_library.launch_library_stats(Deferred(x), w.half(), geometry, PLAN)
    with pytest.raises(ValueError, match="bn.mean must be"):
        conv_library.launch_library_affine(x, w, random_frozen(31, generator, device), None, True, geometry, PLAN)
    with pytest.raises(ValueError, match="residual"):
        conv_library.launch_library_affine(x, w, random_frozen(32, generator, device), x, True, geometry, PLAN)
    g = random_activation((1, 32, 4, 3), torch.float32, generator, device=device)
    with pytest.raises(ValueError, match="addend is"):
        conv_library.launch_library_dgrad(Gradient(g), w, geometry, (4, 3), None, Gradient(g), 1, PLAN)
