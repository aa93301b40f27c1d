"""The 1x1 convolution kernels against float64, in Triton's interpreter or on the GPU."""

import pytest
import torch
import torch.nn.functional as F
from few_rows import FewRows

from fused_resnet import reference
from fused_resnet.plan import Device, Plan, Problem, TileConfig, triton_plan
from fused_resnet.reference import Deferred, Geometry
from fused_resnet.testing import (
    POINTWISE_SHAPES,
    as_double,
    assert_within_budget,
    random_activation,
    random_bn,
    random_frozen,
    random_weight,
)

conv1x1 = pytest.importorskip("fused_resnet.kernels.conv1x1", reason="needs Triton", exc_type=ImportError)

from far import Far, run_program  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]


PLAN = FewRows("triton", TileConfig(16, 32, 16, 4, 2), "test")


def inputs(shape, dtype, generator, device, prologue, **statistics):
    """(deferred input, weight, bn of the output, geometry) of a 1x1 convolution."""
    n, c, h, w, k, stride = shape
    x = random_activation((n, c, h, w), dtype, generator, device=device, **statistics)
    a = Deferred(x, random_bn(x, generator) if prologue else None)
    weight = random_weight((k, c, 1, 1), dtype, generator, device)
    geometry = Geometry((stride, stride))
    raw = F.conv2d(activation64(a), weight.double(), stride=stride)
    return a, weight, random_bn(raw, generator), geometry


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def activation64(a):
    """relu(c * scale + shift) in float64, rounded as the convolution's operand is."""
    return a.c.double() if a.bn is None else reference.bn_act(a, True).double()


def merged(partials):
    return reference.merge_partials(partials.double())[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("shape", POINTWISE_SHAPES)
def test_stats(shape, prologue, dtype, generator, device):
    a, w, _, geometry = inputs(shape, dtype, generator, device, prologue)
    c, partials = conv1x1.launch_conv1x1_stats(a, w, geometry, PLAN)
    ref, ref_partials = reference.conv_stats(Deferred(*double(*a)), w.double(), geometry)
    low, low_partials = reference.conv_stats(a, w, geometry)
    assert c.dtype == dtype and c.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(c, ref, low, "c")
    assert partials.shape == (PLAN.statistics_rows(w.shape[0]), 3, w.shape[0])
    got, want, peer = merged(partials), ref_partials[0], low_partials[0].double()
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    assert_within_budget(got[1].float(), want[1], peer[1], "mean")
    assert_within_budget(got[2].float(), want[2], peer[2], "M2")


@pytest.mark.parametrize(
    ("shape", "prologue"), [((2, 35, 17, 17, 65, 1), True), ((1, 65, 3, 11, 35, 2), False)], ids=["deferred", "strided"]
)
def test_stats_with_the_whole_depth_in_one_step(shape, prologue, generator, device):
    """The weight stays for all tiles of a chunk, of which the last is short."""
    a, w, _, geometry = inputs(shape, torch.float16, generator, device, prologue)
    plan = Plan("triton", TileConfig(64, 64, 128, 4, 3), "test")
    c, partials = conv1x1.launch_conv1x1_stats(a, w, geometry, plan)
    ref, (want, *_) = reference.conv_stats(Deferred(*double(*a)), w.double(), geometry)
    low, (peer, *_) = reference.conv_stats(a, w, geometry)
    assert_within_budget(c, ref, low, "c")
    count, mean, m2 = merged(partials)
    torch.testing.assert_close(count, want[0], rtol=0, atol=0)
    assert_within_budget(mean.float(), want[1], peer[1].double(), "mean")
    assert_within_budget(m2.float(), want[2], peer[2].double(), "M2")


def test_stats_across_chunks_and_tiles(generator, device):
    """16640 pixels of 1040 channels: 64 rows of statistics cover 512 pixels each, so some are short and some empty."""
    a, w, _, geometry = inputs((1, 4, 130, 128, 1040, 1), torch.float32, generator, device, False)
    plan = Plan("triton", TileConfig(256, 128, 16, 4, 2), "test")
    c, partials = conv1x1.launch_conv1x1_stats(a, w, geometry, plan)
    counts = partials[:, 0, 0]
    assert counts.tolist() == [512.0] * 32 + [256.0] + [0.0] * 31
    assert (partials[33:] == 0).all()
    rows = c.permute(0, 2, 3, 1).reshape(-1, 1040)
    for row in (0, 17, 32):
        chunk = rows[512 * row : 512 * row + int(counts[row])].double()
        torch.testing.assert_close(partials[row, 1].double(), chunk.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            partials[row, 2].double(), (chunk - chunk.mean(0)).square().sum(0), rtol=1e-5, atol=0
        )


def test_statistics_do_not_cancel(generator, device):
    """Channels with mean 100 and standard deviation 0.1: E[x^2] - E[x]^2 in fp32 would lose every digit."""
    x = random_activation((4, 32, 9, 9), torch.float32, generator, mean=100.0, std=0.1, device=device)
    identity = torch.eye(32, device=device).view(32, 32, 1, 1)
    _, partials = conv1x1.launch_conv1x1_stats(Deferred(x), identity, Geometry(), PLAN)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, got_mean, got_m2 = merged(partials)
    torch.testing.assert_close(got_mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_m2 / (4 * 81), var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", POINTWISE_SHAPES[:4])
def test_affine(shape, residual, relu, dtype, generator, device):
    (x, _), w, _, geometry = inputs(shape, dtype, generator, device, False)
    bn = random_frozen(w.shape[0], generator, device)
    low = reference.conv_affine(x, w, bn, None, False, geometry)
    side = random_activation(tuple(low.shape), dtype, generator, device=device) if residual else None
    arguments = x, w, bn, side, relu, geometry
    out = conv1x1.launch_conv1x1_affine(*arguments, PLAN)
    low, ref = reference.conv_affine(*arguments), reference.conv_affine(*as_double(arguments))
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget(out, ref, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("downsample", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 35, 7, 5, 65, 1), (1, 16, 3, 3, 32, 1), (3, 24, 1, 1, 20, 1)])
def test_join(shape, downsample, prologue, dtype, generator, device):
    a, w, bn, _ = inputs(shape, dtype, generator, device, prologue)
    n, _, h, width, k, _ = shape
    side_shape = (n, k, h, width)
    w_side = bn_side = None
    if downsample:
        side_shape = (n, 19, downsample * h, downsample * width - (downsample - 1))
        side, w_side, bn_side, _ = inputs((*side_shape, k, downsample), dtype, generator, device, False)
        side = side.c
    else:
        side = random_activation(side_shape, dtype, generator, device=device)
    stride = max(1, downsample)
    out, mask = conv1x1.launch_conv1x1_join(a, w, bn, side, w_side, bn_side, stride, PLAN)
    low, _ = reference.conv1x1_join(a, w, bn, side, w_side, bn_side, stride)
    ref, _ = reference.conv1x1_join(Deferred(*double(*a)), *double(w, bn, side, w_side, bn_side), stride)
    assert_within_budget(out, ref, low)
    # Every bit as the output says; a value may be too small for 16 bits, so only bits of visible values are sure.
    bits = reference.unpack_mask(mask, k)
    assert bits[out > 0].all() and (out[bits] >= 0).all() and not (bits & (ref < -1e-3)).any()
    torch.testing.assert_close(mask, reference.pack_mask(bits), rtol=0, atol=0)


if not torch.cuda.is_available():
    # Where kernels are compiled, these addresses would have to exist.

    def far(x, row):
        """``x``, rows of channels or bytes, whose first row is number ``row``."""
        return Far(x, row * x.shape[3 if x.dtype == torch.uint8 else 1])

    def run_last(row, out, gemm_k, monkeypatch, **arguments):
        """The program of the pixels of ``out``, up to 16 from number ``row`` on."""
        n, gemm_n, out_h, out_w = out.shape
        sizes = {"gemm_m": row + n * out_h * out_w, "gemm_n": gemm_n, "gemm_k": gemm_k, "shortcut_k": 0}
        sizes |= {"out_h": out_h, "out_w": out_w, "in_h": out_h, "in_w": out_w, "chunk_pixels": 16, "eps": 0.0}
        sizes |= {"STRIDE": 1, "RELU": True, "WHOLE_DEPTH": False}
        run_program(row // 16, conv1x1._conv1x1_fwd_kernel, monkeypatch, out_ptr=far(out, row), **(sizes | arguments))

    def test_join_of_more_than_2_31_elements(generator, device, monkeypatch):
        """The last 11 pixels of 800 million, where bytes of ReLU bits, too, pass 2^31."""
        a, w, bn, _ = inputs((1, 40, 1, 11, 24, 1), torch.float32, generator, device, True)
        side, row = random_activation((1, 24, 1, 11), torch.float32, generator), 800_000_000
        out, mask = torch.empty_like(side), torch.empty(1, 1, 11, 3, dtype=torch.uint8)
        pointers = {"a_ptr": far(a.c, row), "a_bn_ptr": a.bn, "w_ptr": w, "bn_ptr": bn}
        pointers |= {"residual_ptr": far(side, row), "mask_ptr": far(mask, row)}
        run_last(row, out, 40, monkeypatch, **pointers)
        low, bits = reference.conv1x1_join(a, w, bn, side, None, None, 1)
        ref, _ = reference.conv1x1_join(Deferred(*double(*a)), *double(w, bn, side), None, None, 1)
        assert_within_budget(out, ref, low)
        torch.testing.assert_close(mask, bits, rtol=0, atol=0)

    def test_downsample_of_more_than_2_31_elements(generator, device, monkeypatch):
        """Two images of 3 x 5 pixels, read at 2 x 3 of them, behind 66 million others."""
        a, w, bn, _ = inputs((2, 40, 2, 3, 24, 1), torch.float32, generator, device, False)
        (side, _), w_side, bn_side, _ = inputs((2, 48, 3, 5, 24, 2), torch.float32, generator, device, False)
        out, image = torch.empty_like(random_activation((2, 24, 2, 3), torch.float32, generator)), 66_000_000
        pointers = {"a_ptr": far(a.c, image * 6), "w_ptr": w, "bn_ptr": bn}
        pointers |= {"shortcut_ptr": far(side, image * 15), "shortcut_w_ptr": w_side, "shortcut_bn_ptr": bn_side}
        run_last(image * 6, out, 40, monkeypatch, shortcut_k=48, in_h=3, in_w=5, STRIDE=2, **pointers)
        low, _ = reference.conv1x1_join(a, w, bn, side, w_side, bn_side, 2)
        ref, _ = reference.conv1x1_join(Deferred(*double(*a)), *double(w, bn, side, w_side, bn_side), 2)
        assert_within_budget(out, ref, low)

    @pytest.mark.parametrize("whole_depth", [False, True])
    def test_statistics_of_more_than_2_31_elements(whole_depth, generator, device, monkeypatch):
        """The last 11 pixels of 800 million, whose row of statistics passes 2^31, too."""
        a, w, _, geometry = inputs((1, 16, 1, 11, 24, 1), torch.float32, generator, device, True)
        out, row = torch.empty_like(random_activation((1, 24, 1, 11), torch.float32, generator)), 800_000_000
        partials = torch.empty(1, 3, 24)
        pointers = {"a_ptr": far(a.c, row), "a_bn_ptr": a.bn, "w_ptr": w}
        pointers |= {"partials_ptr": Far(partials, row // 16 * 3 * 24), "WHOLE_DEPTH": whole_depth, "RELU": False}
        run_last(row, out, 16, monkeypatch, **pointers)
        ref, (want, *_) = reference.conv_stats(Deferred(*double(*a)), w.double(), geometry)
        low, (peer, *_) = reference.conv_stats(a, w, geometry)
        assert_within_budget(out, ref, low)
        torch.testing.assert_close(partials[0, 0], torch.full((24,), 11.0), rtol=0, atol=0)
        assert_within_budget(partials[0, 1], want[1], peer[1].double(), "mean")
        assert_within_budget(partials[0, 2], want[2], peer[2].double(), "M2")


def test_bits_repeat(generator, device):
    a, w, _, geometry = inputs((2, 35, 7, 5, 65, 1), torch.float16, generator, device, True)
    first = conv1x1.launch_conv1x1_stats(a, w, geometry, PLAN)
    again = conv1x1.launch_conv1x1_stats(a, w, geometry, PLAN)
    assert all(torch.equal(p, q) for p, q in zip(first, again))


def test_heuristic_tiles_give_the_same_answer(generator, device):
    (x, _), w, _, geometry = inputs((2, 64, 17, 17, 128, 1), torch.float16, generator, device, False)
    problem = Problem("conv_affine", 2, 17, 17, 64, 128, 1, 1, dtype="float16", epilogue="affine")
    plan = triton_plan(problem, None, Device.default(90), "test")
    arguments = x, w, random_frozen(128, generator, device), None, True, geometry
    out = conv1x1.launch_conv1x1_affine(*arguments, plan)
    assert_within_budget(out, reference.conv_affine(*as_double(arguments)), reference.conv_affine(*arguments))


def test_nan_in_nan_out(generator, device):
    """A ReLU that turns NaN into 0 would hide a diverged run."""
    a, w, bn, _ = inputs((1, 16, 3, 3, 16, 1), torch.float32, generator, device, True)
    a.c[0, 3, 1, 1] = float("nan")
    out, _ = conv1x1.launch_conv1x1_join(a, w, bn, torch.ones_like(a.c), None, None, 1, PLAN)
    assert out[0, :, 1, 1].isnan().all() and not out[0, :, 0, 0].isnan().any()


def test_wrong_arguments_are_named(generator, device):
    a, w, bn, geometry = inputs((1, 16, 4, 3, 32, 1), torch.float32, generator, device, False)
    with pytest.raises(ValueError, match="channels_last"):
        conv1x1.launch_conv1x1_stats(Deferred(a.c.contiguous()), w, geometry, PLAN)
    with pytest.raises(ValueError, match="weight of a"):
        conv1x1.launch_conv1x1_stats(a, w[:, :8], geometry, PLAN)
    with pytest.raises(ValueError, match="not a plain 1x1"):
        conv1x1.launch_conv1x1_stats(a, w, Geometry(padding=(1, 1)), PLAN)
    with pytest.raises(ValueError, match="bn must be"):
        conv1x1.launch_conv1x1_join(a, w, bn[:, :5], a.c, None, None, 1, PLAN)
    frozen = random_frozen(32, generator, device)
    with pytest.raises(ValueError, match="bn.var must be"):
        conv1x1.launch_conv1x1_affine(a.c, w, frozen._replace(var=frozen.var[:5]), None, True, geometry, PLAN)
    with pytest.raises(ValueError, match="residual"):
        conv1x1.launch_conv1x1_affine(a.c, w, frozen, a.c, True, geometry, PLAN)
