"""The convolution of images (up to four channels), against float64, in Triton's interpreter or on the GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from few_rows import FewRows

from fused_resnet import reference
from fused_resnet.plan import Device, Plan, Problem, TileConfig, triton_plan, unsupported
from fused_resnet.reference import Deferred, Geometry, Gradient
from fused_resnet.testing import (
    as_double,
    assert_within_budget,
    check_operator,
    random_activation,
    random_frozen,
    random_weight,
)

stem = pytest.importorskip("fused_resnet.kernels.stem", reason="needs Triton", exc_type=ImportError)
from far import Far, run_program  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]
H100 = Device.default(90)


# Image, output channels, geometry; the depth of a kernel row, padded. Odd maps and channels, one channel to four, one
# pixel, a kernel that is not square, dilation, no padding; a map wide enough for several tiles of windows.
SHAPES = {
    "7x7": ((2, 3, 21, 17), (35, 3, 7, 7), Geometry((2, 2), (3, 3)), 32),
    "3x3": ((1, 4, 9, 10), (65, 4, 3, 3), Geometry((1, 1), (1, 1)), 16),
    "5x3, one channel": ((3, 1, 6, 7), (8, 1, 5, 3), Geometry((2, 1), (2, 0)), 16),
    "dilated, wide": ((1, 2, 7, 67), (16, 2, 3, 4), Geometry((1, 1), (1, 2), (2, 3)), 16),
    "one pixel": ((3, 3, 1, 1), (24, 3, 3, 3), Geometry((1, 1), (1, 1)), 16),
    "to one pixel": ((2, 3, 7, 7), (16, 3, 7, 7), Geometry((2, 2)), 32),
}
EVERY_SHAPE = pytest.mark.parametrize("name", SHAPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


class Case:
    """Operands of one convolution, and the plan for it."""

    def __init__(self, name, dtype, generator, device):
        image, weight, self.geometry, depth = SHAPES[name]
        self.x = random_activation(image, dtype, generator, device=device)
        self.w = random_weight(weight, dtype, generator, device)
        self.bn = random_frozen(weight[0], generator, device)
        self.plan = FewRows("triton", TileConfig(32, 32, depth, 4, 1), "test")
        self.gradient_plan = FewRows("triton", TileConfig(16, depth, 32, 4, 1), "test")
        self.generator = generator

    def output(self, mean):
        shape = torch.nn.functional.conv2d(self.x, self.w, None, *self.geometry).shape
        return random_activation(tuple(shape), self.x.dtype, self.generator, mean, device=self.x.device)


def assert_agrees(got, function, *arguments, what="result"):
    """Within the error budget of the reference function at the same precision."""
    assert_within_budget(got, function(*as_double(arguments)), function(*arguments), what)


@EVERY_DTYPE
@EVERY_SHAPE
def test_pool(name, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    y = stem.launch_stem_pool(case.x, case.w, case.bn, case.geometry, case.plan)
    low = reference.conv_affine_pool(case.x, case.w, case.bn, case.geometry)
    assert (y.dtype, y.stride()) == (dtype, low.stride())
    assert_agrees(y, reference.conv_affine_pool, case.x, case.w, case.bn, case.geometry)


@EVERY_DTYPE
@EVERY_SHAPE
def test_stats(name, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    arguments = Deferred(case.x), case.w, case.geometry
    c, partials = stem.launch_stem_stats(*arguments, case.plan)
    low, low_partials = reference.conv_stats(*arguments)
    ref, ref_partials = reference.conv_stats(*as_double(arguments))
    assert (c.dtype, c.stride()) == (dtype, low.stride())
    assert_within_budget(c, ref, low, "c")
    assert partials.shape == (3, 3, case.w.shape[0])
    got = reference.merge_partials(partials.double())[0]
    torch.testing.assert_close(got[0], ref_partials[0, 0], rtol=0, atol=0)
    for row, what in ((1, "mean"), (2, "M2")):
        assert_within_budget(got[row].float(), ref_partials[0, row], low_partials[0, row].double(), what)


@EVERY_DTYPE
@pytest.mark.parametrize("relu,residual", [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["7x7", "3x3", "5x3, one channel", "one pixel"])
def test_affine(name, relu, residual, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    side = case.output(mean=0.5) if residual else None
    bn = case.bn if residual else case.bn._replace(gamma=None, beta=None)
    arguments = case.x, case.w, bn, side, relu, case.geometry
    assert_agrees(stem.launch_stem_affine(*arguments, case.plan), reference.conv_affine, *arguments)


@EVERY_DTYPE
@EVERY_SHAPE
def test_wgrad(name, dtype, generator, device):
    case = Case(name, dtype, generator, device)
    arguments = Deferred(case.x), Gradient(case.output(mean=0.1)), tuple(case.w.shape), case.geometry
    dw = stem.launch_stem_wgrad(*arguments, case.gradient_plan)
    assert dw.dtype == torch.float32 and dw.stride() == reference.channels_last(dw).stride()
    assert_agrees(dw, reference.conv_wgrad, *arguments)


def test_stats_across_chunks_and_tiles(generator, device):
    """575 pixels in three rows of 256: several tiles in a row, a row that ends early; then rows without a pixel."""
    x = random_activation((1, 3, 25, 23), torch.float32, generator, device=device)
    w = random_weight((20, 3, 3, 3), torch.float32, generator, device)
    plan = FewRows("triton", TileConfig(64, 32, 16, 4, 1), "test")
    c, partials = stem.launch_stem_stats(Deferred(x), w, Geometry(padding=(1, 1)), plan)
    assert partials[:, 0, 0].tolist() == [256.0, 256.0, 63.0]
    for row, chunk in enumerate(c.permute(0, 2, 3, 1).reshape(-1, 20).double().split(256)):
        torch.testing.assert_close(partials[row, 1].double(), chunk.mean(0), rtol=1e-5, atol=1e-6)
        m2 = (chunk - chunk.mean(0)).square().sum(0)
        torch.testing.assert_close(partials[row, 2].double(), m2, rtol=1e-5, atol=0)
    small = x[:, :, :3, :3].contiguous(memory_format=torch.channels_last)
    _, partials = stem.launch_stem_stats(Deferred(small), w, Geometry(), plan)
    assert partials[:, 0, 0].tolist() == [1.0, 0.0, 0.0] and (partials[1:] == 0).all()


@pytest.mark.parametrize("first", [100.0, 0.0])
def test_statistics_do_not_cancel(first, generator, device):
    """Mean 100, standard deviation 0.1, and a first tile of 16 pixels that may be far from all the others."""
    x = random_activation((1, 3, 16, 16), torch.float32, generator, mean=100.0, std=0.1, device=device)
    x[:, :, 0] = first
    w = torch.zeros(16, 3, 3, 3, device=device)
    w[:, :, 1, 1] = torch.eye(3, device=device).repeat(6, 1)[:16]
    plan = FewRows("triton", TileConfig(16, 16, 16, 4, 1), "test")
    _, partials = stem.launch_stem_stats(Deferred(x), w, Geometry(padding=(1, 1)), plan)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    _, got_mean, got_m2 = reference.merge_partials(partials.double())[0]
    torch.testing.assert_close(got_mean[:3], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_m2[:3] / 256, var, rtol=1e-4, atol=0)


def test_wgrad_in_several_chunks(generator, device):
    """2300 pixels are five chunks of 512, the last one short."""
    x = random_activation((4, 3, 25, 23), torch.float32, generator, device=device)
    g = random_activation((4, 18, 25, 23), torch.float32, generator, mean=0.1, device=device)
    assert stem._wgrad_chunks(2300) == 5
    arguments = Deferred(x), Gradient(g), (18, 3, 3, 3), Geometry(padding=(1, 1))
    plan = Plan("triton", TileConfig(32, 16, 64, 4, 1), "test")
    dw = stem.launch_stem_wgrad(*arguments, plan)
    assert torch.equal(dw, stem.launch_stem_wgrad(*arguments, plan))
    assert_agrees(dw, reference.conv_wgrad, *arguments)


@pytest.mark.parametrize("steps", [2, 4])
def test_bits_do_not_depend_on_the_grid(steps, generator, device, monkeypatch):
    """Whatever a program does one after the other: six pooled rows in strips, 99 pixels in chunks."""
    case = Case("7x7", torch.float16, generator, device)
    x = case.x[:1]

    def everything():
        y = stem.launch_stem_pool(x, case.w, case.bn, case.geometry, case.plan)
        return y, stem.launch_stem_affine(x, case.w, case.bn, None, True, case.geometry, case.plan)

    expected = everything()
    monkeypatch.setattr(stem, "_steps", lambda tiles: steps)
    assert all(torch.equal(a, b) for a, b in zip(everything(), expected))
    assert_agrees(expected[0], reference.conv_affine_pool, x, case.w, case.bn, case.geometry)


def test_steps_leave_programs_for_a_large_gpu():
    assert [stem._steps(tiles) for tiles in (0, 112, 2047, 2048, 28672)] == [1, 1, 1, 2, 8]


def test_nan_in_nan_out(generator, device):
    """One pixel that is no number, and exactly the windows that read it."""
    case = Case("7x7", torch.float32, generator, device)
    case.x[1, 2, 6, 8] = float("nan")
    y = stem.launch_stem_pool(case.x, case.w, case.bn, case.geometry, case.plan)
    ref = reference.conv_affine_pool(case.x, case.w, case.bn, case.geometry)
    assert 0 < ref.isnan().sum() < ref[1].numel()
    torch.testing.assert_close(y, ref, rtol=1e-4, atol=1e-5, equal_nan=True)
    c, _ = stem.launch_stem_stats(Deferred(case.x), case.w, case.geometry, case.plan)
    ref, _ = reference.conv_stats(Deferred(case.x), case.w, case.geometry)
    assert torch.equal(c.isnan(), ref.isnan())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_padding_of_channels(channels, generator, device):
    rows = random_activation((2, channels, 19, 29), torch.float16, generator, device=device).permute(0, 2, 3, 1)
    padded = stem._padded(rows, 4)
    assert padded.is_contiguous() and padded.shape[-1] == 4
    assert torch.equal(padded[..., :channels], rows) and not padded[..., channels:].any()
    assert (padded.data_ptr() == rows.data_ptr()) == (channels == 4)


def test_weight_in_any_memory_format(generator, device):
    case = Case("one pixel", torch.float32, generator, device)
    launch = partial(stem.launch_stem_pool, case.x, bn=case.bn, geometry=case.geometry, plan=case.plan)
    assert torch.equal(launch(case.w.contiguous()), launch(case.w))


@pytest.mark.parametrize("op", ["conv_stats", "conv_affine", "conv_affine_pool", "conv_wgrad"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_heuristic_tiles_give_the_same_answer(op, dtype, generator, device):
    epilogue = {"conv_stats": "stats", "conv_wgrad": ""}.get(op, "affine")
    problem = Problem(op, 1, 19, 22, 3, 72, 7, 7, (2, 2), (3, 3), dtype=dtype, epilogue=epilogue)
    plan = triton_plan(problem, None, H100, "test")
    assert plan.module == "stem"
    plan = FewRows("triton", plan.config, plan.reason, plan.module, plan.launch)
    check_operator(problem, partial(getattr(stem, plan.launch), plan=plan), generator, device)


def test_plans_name_their_limits():
    problem = Problem("conv_affine_pool", 8, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), epilogue="affine")
    tile = TileConfig(64, 64, 32, 4, 1)

    def reason(problem=problem, config=None, device=H100):
        refusals = unsupported(problem, config, device)
        return refusals and refusals.split("; ")[0]

    assert reason() is None and reason(config=tile) is None
    # Wider images and larger kernels go to the library's convolution, with the pool behind it in one pass.
    for wider in (replace(problem, c=8), replace(problem, r=11, s=11), replace(problem, groups=3)):
        assert reason(wider) is None and triton_plan(wider, None, H100, "").module == "conv_library"
    stats = replace(problem, op="conv_stats", epilogue="stats")
    assert triton_plan(replace(stats, c=5), None, H100, "").module == "conv3x3"
    assert triton_plan(replace(stats, r=1, s=1, stride=(1, 1), padding=(0, 0)), None, H100, "").module == "conv1x1"
    assert "32 deep" in reason(config=replace(tile, block_k=64))
    assert "two halves" in reason(config=replace(tile, block_m=16))
    assert "accumulators" in reason(config=replace(tile, block_m=256))
    assert "shared memory" in reason(replace(problem, dtype="float32"), tile, Device.default(86))
    assert "more than four" in reason(config=replace(tile, num_warps=8), device=Device.default(80))
    assert triton_plan(replace(problem, dtype="float32"), None, Device.default(86), "").config.block_m == 32


def test_empty_batch(generator, device):
    case = Case("7x7", torch.float32, generator, device)
    x = case.x[:0]
    assert stem.launch_stem_pool(x, case.w, case.bn, case.geometry, case.plan).shape == (0, 35, 6, 5)
    c, partials = stem.launch_stem_stats(Deferred(x), case.w, case.geometry, case.plan)
    assert c.shape == (0, 35, 11, 9) and (partials == 0).all()
    out = stem.launch_stem_affine(x, case.w, case.bn, None, True, case.geometry, case.plan)
    assert out.shape == c.shape
    dw = stem.launch_stem_wgrad(Deferred(x), Gradient(c), (35, 3, 7, 7), case.geometry, case.gradient_plan)
    assert dw.shape == case.w.shape and (dw == 0).all()


def test_wrong_arguments_are_named(generator, device):
    case = Case("7x7", torch.float32, generator, device)
    x, w, bn, geometry, plan = case.x, case.w, case.bn, case.geometry, case.plan
    g = Gradient(case.output(mean=0.1))
    with pytest.raises(ValueError, match="x must be .* channels_last"):
        stem.launch_stem_pool(x.contiguous(), w, bn, geometry, plan)
    with pytest.raises(ValueError, match="weight is .* torch.float16"):
        stem.launch_stem_pool(x, w.half(), bn, geometry, plan)
    with pytest.raises(ValueError, match=r"weight is \(35, 2, 7, 7\), 1 groups; x has 3"):
        stem.launch_stem_stats(Deferred(x), w[:, :2], geometry, plan)
    with pytest.raises(ValueError, match="3 groups"):
        stem.launch_stem_stats(Deferred(x), w, geometry._replace(groups=3), plan)
    with pytest.raises(ValueError, match="slices hold up to 4 channels, 16 in a row"):
        stem.launch_stem_stats(Deferred(x), w, geometry, replace(plan, config=TileConfig(32, 32, 16, 4, 1)))
    with pytest.raises(ValueError, match="does not fit"):
        stem.launch_stem_pool(x, w, bn, geometry._replace(dilation=(9, 9)), plan)
    with pytest.raises(ValueError, match="bn.mean must be"):
        stem.launch_stem_pool(x, w, bn._replace(mean=bn.mean[:3]), geometry, plan)
    with pytest.raises(ValueError, match="residual"):
        stem.launch_stem_affine(x, w, bn, x, True, geometry, plan)
    with pytest.raises(ValueError, match="a.bn"):
        stem.launch_stem_stats(Deferred(x, torch.ones(5, 3)), w, geometry, plan)
    with pytest.raises(ValueError, match="grad: has to be written out"):
        stem.launch_stem_wgrad(Deferred(x), g._replace(mask=g.g), tuple(w.shape), geometry, case.gradient_plan)
    with pytest.raises(ValueError, match="grad is"):
        stem.launch_stem_wgrad(Deferred(x), g, (36, 3, 7, 7), geometry, case.gradient_plan)


def far_sizes(**more):
    """A 3x3 kernel on images of 4 x 4 pixels with four channels."""
    pairs = {"STRIDE": 1, "PAD": 1, "DILATION": 1}
    constants = {f"{name}_{axis}": value for name, value in pairs.items() for axis in "HW"}
    sizes = dict.fromkeys(("in_h", "in_w", "out_h", "out_w"), 4)
    return constants | sizes | {"R": 3, "S": 3, "CHANNELS": 4} | more


if not torch.cuda.is_available():
    # Where kernels are compiled, these addresses would have to exist.

    def test_forward_of_more_than_2_31_elements(generator, monkeypatch):
        """One image behind 100 million others."""
        x = random_activation((1, 4, 4, 4), torch.float32, generator)
        w, bn, geometry = random_weight((24, 4, 3, 3), x.dtype, generator), random_frozen(24, generator), Geometry()
        geometry, image = geometry._replace(padding=(1, 1)), 100_000_000
        frozen = dict(zip(("mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr", "eps"), bn))
        near = far_sizes(x_ptr=Far(x, image * 64), w_ptr=w, gemm_n=24)
        c, partials = torch.empty(1, 24, 4, 4).to(memory_format=torch.channels_last), torch.empty(1, 3, 24)
        run_program(
            image,
            stem._stem_fwd_kernel,
            monkeypatch,
            out_ptr=Far(c, image * 16 * 24),
            partials_ptr=Far(partials, image * 3 * 24),
            eps=0.0,
            gemm_m=image * 16 + 16,
            chunk_pixels=16,
            RELU=False,
            **near,
        )
        ref, ref_partials = reference.conv_stats(Deferred(x), w, geometry)
        torch.testing.assert_close((c, partials), (ref, ref_partials), rtol=1e-5, atol=1e-5)
        y = torch.empty(1, 24, 2, 2).to(memory_format=torch.channels_last)
        far_y = Far(y, image * 4 * 24)
        run_program(
            image, stem._stem_pool_kernel, monkeypatch, y_ptr=far_y, pool_h=2, pool_w=2, strip_rows=2, **frozen, **near
        )
        torch.testing.assert_close(y, reference.conv_affine_pool(x, w, bn, geometry), rtol=1e-5, atol=1e-5)

    def test_wgrad_of_more_than_2_31_elements(generator, monkeypatch):
        """The second chunk, of one image, behind a billion pixels."""
        x, g = (random_activation((1, c, 4, 4), torch.float32, generator) for c in (4, 24))
        dw, pixels = torch.empty(24, 3, 3, 4), 1_000_000_000
        run_program(
            3,
            stem._stem_wgrad_kernel,
            monkeypatch,
            g_ptr=Far(g, pixels * 24),
            parts_ptr=Far(dw, 24 * 36),
            gemm_m=24,
            channels=4,
            pixels=pixels + 16,
            chunk_pixels=pixels,
            **far_sizes(x_ptr=Far(x, pixels * 4), BLOCK_N=16),
        )
        ref = reference.conv_wgrad(Deferred(x), Gradient(g), (24, 4, 3, 3), Geometry(padding=(1, 1)))
        # The program's tile is the second of 16 output channels.
        torch.testing.assert_close(dw[16:].permute(0, 3, 1, 2), ref[16:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2**11, 1, 2**10, 2**10), (1, 3, 1, 2**29)])
def test_more_than_32_bits_are_refused(shape):
    x = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
    w, bn = torch.empty(8, shape[1], 3, 3, device="meta"), random_frozen(8, torch.Generator())
    plan = Plan("triton", TileConfig(32, 32, 16, 4, 1), "test")
    with pytest.raises(ValueError, match="32-bit"):
        stem.launch_stem_pool(x, w, bn, Geometry(padding=(1, 1)), plan)
    with pytest.raises(ValueError, match="32-bit"):
        stem.launch_stem_stats(Deferred(x), w, Geometry(padding=(1, 1)), plan)
