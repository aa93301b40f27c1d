"""The gradients of 1x1 convolutions against float64, in Triton's interpreter or on the GPU."""

from dataclasses import replace

import pytest
import torch
from few_rows import FewRows

from fused_resnet import reference, testing
from fused_resnet.plan import Device, Problem, TileConfig, triton_plan, unsupported
from fused_resnet.reference import Deferred, Geometry, Gradient
from fused_resnet.testing import as_double, assert_within_budget, random_activation, random_bn, random_weight

kernels = pytest.importorskip("fused_resnet.kernels.conv1x1_grad", reason="needs Triton", exc_type=ImportError)
from far import Far, run_program  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poison", "no_tf32"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning:triton"),
]
DTYPES = [torch.float32, torch.bfloat16]
LAUNCHES = {
    "conv_dgrad": kernels.launch_conv1x1_dgrad,
    "conv_wgrad": kernels.launch_conv1x1_wgrad,
    "conv1x1_dgrad_moments": kernels.launch_conv1x1_dgrad_moments,
}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# How the gradient of the output comes: (with ReLU bits, with coefficients).
GRADIENTS = {"written": (0, 0), "masked": (1, 0), "deferred": (0, 1), "deferred, masked": (1, 1)}
EVERY_GRADIENT = pytest.mark.parametrize("kind", GRADIENTS)


# Of 35 channels the first needs three steps in depth, the second one.
STEPS = FewRows("triton", TileConfig(16, 32, 16, 4, 2), "test")
WHOLE = FewRows("triton", TileConfig(32, 32, 64, 4, 2), "test")
RESIDENT = FewRows("triton", TileConfig(16, 64, 128, 4, 2), "test")
EVERY_PLAN = pytest.mark.parametrize("plan", [STEPS, WHOLE], ids=["steps", "whole depth"])
# (images, height, width, channels of the input, channels of the output): odd channels and maps, one pixel, one image.
SHAPES = ((2, 7, 5, 65, 35), (3, 1, 1, 24, 16), (1, 9, 4, 16, 40))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Samples:
    """Random operands of one dtype."""

    def __init__(self, dtype, generator, device):
        self.dtype, self.generator, self.device = dtype, generator, device

    def map(self, *shape, mean=0.1):
        return random_activation(shape, self.dtype, self.generator, mean, device=self.device)

    def bits(self, *shape):
        return reference.pack_mask(torch.rand(shape, generator=self.generator) > 0.4).to(self.device)

    def deferred(self, *shape, prologue=True):
        """An activation; with a shift that a zero out of range must not go through."""
        c = self.map(*shape, mean=0.5)
        if not prologue:
            return Deferred(c)
        bn = random_bn(c, self.generator)
        bn[reference.SHIFT] += 1.0
        return Deferred(c, bn)

    def gradient(self, kind, *shape):
        masked, deferred = GRADIENTS[kind]
        g = Gradient(self.map(*shape), self.bits(*shape) if masked else None)
        if not deferred:
            return g
        coef = torch.randn(3, shape[1], generator=self.generator) * 0.5
        coef[2] += 1.0  # C, which a zero out of range must not go through either
        return g._replace(c=self.map(*shape, mean=0.5), coef=coef.to(self.device))

    def weight(self, k, c):
        return random_weight((k, c, 1, 1), self.dtype, self.generator, self.device)

    def addend(self, stride, masked, n, c, h, w):
        shape = n, c, -(-h // stride), -(-w // stride)
        return Gradient(self.map(*shape), self.bits(*shape) if masked else None)


@pytest.fixture
def samples(generator, device):
    return lambda dtype=torch.float32: Samples(dtype, generator, device)


def check(op, args, plan):
    """The operator's results by its kernel, after `_compare`."""
    got = LAUNCHES[op](*args, plan=plan)
    _compare(op, got, args)
    return got


def _compare(op, got, args):
    """Hold results against the reference in float64 on the same arguments; sums of all rows together."""
    function = getattr(reference, op)
    results = (testing.comparable(op, result) for result in (got, function(*as_double(args)), function(*args)))
    for i, (value, exact, low) in enumerate(zip(*results, strict=True)):
        assert_within_budget(value, exact, low, f"{op} result {i}")


@EVERY_DTYPE
@EVERY_PLAN
@EVERY_GRADIENT
@EVERY_SHAPE
def test_dgrad(shape, kind, plan, dtype, samples):
    n, h, w, c, k = shape
    s = samples(dtype)
    args = s.gradient(kind, n, k, h, w), s.weight(k, c), Geometry(), (h, w), None, None, 1
    dx, sums = check("conv_dgrad", args, plan)
    assert sums is None and dx.dtype == dtype and dx.is_contiguous(memory_format=torch.channels_last)


@EVERY_DTYPE
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("stride,masked", [(0, False), (1, True), (1, False), (2, True), (3, False)])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_dgrad_addend_and_sums(shape, stride, masked, relu, dtype, samples):
    n, h, w, c, k = shape
    s = samples(dtype)
    addend = s.addend(stride, masked, n, c, h, w) if stride else None
    relu_of = s.deferred(n, c, h, w) if relu else None
    grad = s.gradient("deferred, masked", n, k, h, w)
    args = grad, s.weight(k, c), Geometry(), (h, w), relu_of, addend, max(1, stride)
    _, sums = check("conv_dgrad", args, WHOLE if stride == 1 else STEPS)
    assert (sums is None) if not relu else (sums.shape == (3, 2, c) and sums.dtype == torch.float32)


@pytest.mark.parametrize("kind", ["written", "deferred, masked"])
def test_one_program_computes_all_columns_of_many_pixels(kind, samples, monkeypatch):
    """The same bits as by a program for each tile of columns."""
    s = samples(torch.float16)
    args = s.gradient(kind, 2, 35, 7, 5), s.weight(35, 65), Geometry(), (7, 5), None, s.addend(1, True, 2, 65, 7, 5), 1
    apart, _ = LAUNCHES["conv_dgrad"](*args, plan=WHOLE)
    spy = _Spy(kernels._conv1x1_dgrad_kernel)
    monkeypatch.setattr(kernels, "_conv1x1_dgrad_kernel", spy)
    monkeypatch.setattr(kernels, "_MANY_TILES", 3)
    together, _ = check("conv_dgrad", args, WHOLE)
    assert spy.grids == [(3,)] and torch.equal(apart, together)


class _Spy:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def test_sums_across_chunks_and_tiles(samples):
    """Three rows of 256 pixels for 575: several tiles in a row, a row that ends early; then rows without a pixel."""
    s = samples()
    grad, relu_of, w = s.gradient("deferred", 1, 16, 25, 23), s.deferred(1, 20, 25, 23), s.weight(16, 20)
    plan = FewRows("triton", TileConfig(128, 32, 16, 4, 2), "test")
    dx, sums = check("conv_dgrad", (grad, w, Geometry(), (25, 23), relu_of, None, 1), plan)
    flat = dx.permute(0, 2, 3, 1).reshape(1, 575, 20, 1)
    c = relu_of.c.permute(0, 2, 3, 1).reshape(1, 575, 20, 1)
    for row, (g, x) in enumerate(zip(flat.split(256, 1), c.split(256, 1))):
        ref = reference.channel_sums(*(t.transpose(1, 2).double() for t in (g, x)), relu_of.bn.double())
        torch.testing.assert_close(sums[row].double(), ref[0], rtol=1e-4, atol=1e-3)
    small = Gradient(*(None if t is None else t[..., :3, :3].contiguous(memory_format=torch.channels_last)
                       if t.dim() == 4 else t for t in (grad.g, None, grad.c, grad.coef)))  # fmt: skip
    few = relu_of._replace(c=relu_of.c[..., :3, :3].contiguous(memory_format=torch.channels_last))
    _, sums = check("conv_dgrad", (small, w, Geometry(), (3, 3), few, None, 1), plan)
    assert sums[0].any() and (sums[1:] == 0).all()


@EVERY_DTYPE
@pytest.mark.parametrize("plan", [STEPS, WHOLE, RESIDENT], ids=["steps", "whole depth", "resident"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("stride", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 7, 5, 35, 65), (3, 1, 1, 16, 24)], ids=str)
def test_dgrad_moments(shape, stride, masked, plan, dtype, samples, monkeypatch):
    """Stride 0: `a` is deferred, and the result masked by its ReLU. K = 35 is one step of its product, or several."""
    spy = _Spy(kernels._conv1x1_dgrad_resident_kernel)
    monkeypatch.setattr(kernels, "_conv1x1_dgrad_resident_kernel", spy)
    n, h, w, k, channels = shape
    s = samples(dtype)
    a = s.deferred(n, k, h, w, prologue=not stride)
    stride = max(1, stride)
    out = n, channels, -(-h // stride), -(-w // stride)
    w_g, w_a = s.weight(channels, k).flatten(1), s.weight(k, k).flatten(1)
    w_1 = torch.randn(k, generator=s.generator).to(s.device)
    args = s.map(*out), s.bits(*out) if masked else None, w_g, a, w_a, w_1, stride
    da, sums = check("conv1x1_dgrad_moments", args, plan)
    assert da.shape == (n, k, *out[2:]) and (sums is None) == (a.bn is None)
    one_tile = k <= plan.config.block_n and channels <= plan.config.block_k
    assert spy.grids == ([(3,)] if one_tile and a.bn is not None else [])


def test_resident_sums_across_chunks_and_tiles(samples):
    """Two rows of 256 pixels for 425, the second of which ends early, and one without a pixel; the same bits again."""
    s = samples(torch.float16)
    a, dout, bits = s.deferred(1, 20, 25, 17), s.map(1, 40, 25, 17), s.bits(1, 40, 25, 17)
    args = dout, bits, s.weight(40, 20).flatten(1), a, s.weight(20, 20).flatten(1), torch.ones(20).to(dout.device), 1
    da, sums = check("conv1x1_dgrad_moments", args, RESIDENT)
    flat, c = (t.permute(0, 2, 3, 1).reshape(425, 20).double() for t in (da, a.c))
    for row, pixels in enumerate((slice(256), slice(256, 425), slice(0))):
        xhat = (c[pixels] - a.bn[reference.MEAN]) * a.bn[reference.RSTD]
        ref = torch.stack((flat[pixels].sum(0), (flat[pixels] * xhat).sum(0)))
        # The kernel sums what it rounds to fp16 afterwards.
        torch.testing.assert_close(sums[row].double(), ref, rtol=1e-3, atol=1e-2)
    again = LAUNCHES["conv1x1_dgrad_moments"](*args, plan=RESIDENT)
    assert all(torch.equal(*pair) for pair in zip((da, sums), again))


@EVERY_DTYPE
@pytest.mark.parametrize("prologue", [False, True])
@EVERY_GRADIENT
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_wgrad(stride, kind, prologue, dtype, samples):
    n, h, w, c, k = SHAPES[0]
    s = samples(dtype)
    grad = s.gradient(kind, n, k, -(-h // stride), -(-w // stride))
    args = s.deferred(n, c, h, w, prologue=prologue), grad, (k, c, 1, 1), Geometry((stride, stride))
    dw = check("conv_wgrad", args, STEPS)
    assert dw.dtype == torch.float32 and dw.stride() == reference.channels_last(dw).stride()


@EVERY_DTYPE
@EVERY_SHAPE
def test_wgrad_shapes(shape, dtype, samples):
    n, h, w, c, k = shape
    s = samples(dtype)
    args = s.deferred(n, c, h, w), s.gradient("deferred, masked", n, k, h, w), (k, c, 1, 1), Geometry()
    check("conv_wgrad", args, WHOLE)


@pytest.mark.parametrize("chunks", [2, 5, 7])
def test_wgrad_in_several_chunks(chunks, samples, monkeypatch):
    """70 pixels in chunks of 48, 16 and 16: the last is short, and two of seven are empty."""
    monkeypatch.setattr(kernels, "wgrad_chunks", lambda w_shape, pixels: chunks)
    s = samples()
    args = s.deferred(2, 65, 7, 5), s.gradient("deferred", 2, 35, 7, 5), (35, 65, 1, 1), Geometry()
    dw = check("conv_wgrad", args, STEPS)
    assert torch.equal(dw, LAUNCHES["conv_wgrad"](*args, plan=STEPS))


def test_chunks_of_a_weight_gradient():
    """A function of the shape alone, that fills a card with tiles of 64 x 64 values and keeps the parts small."""
    for w_shape, pixels, chunks in (
        ((64, 64, 1, 1), 802816, 256),
        ((64, 256, 1, 1), 802816, 256),
        ((128, 512, 1, 1), 200704, 64),
        ((512, 2048, 1, 1), 12544, 4),
        ((2048, 1024, 1, 1), 12544, 2),
        ((64, 256, 1, 1), 3136, 7),
        ((35, 65, 1, 1), 0, 1),
    ):
        assert kernels.wgrad_chunks(w_shape, pixels) == chunks
        assert 4 * chunks * w_shape[0] * w_shape[1] <= 17 * 2**20


@pytest.mark.parametrize("op", LAUNCHES)
def test_bits_repeat(op, samples):
    args = _arguments(op, samples(torch.float16))
    first, again = (LAUNCHES[op](*args, plan=STEPS) for _ in range(2))
    first, again = ((result,) if torch.is_tensor(result) else result for result in (first, again))
    assert all(torch.equal(p, q) for p, q in zip(first, again))


def _arguments(op, s, n=2):
    """35 channels in, 65 out, deferred as far as can be."""
    a, grad = s.deferred(n, 35, 7, 5), s.gradient("deferred, masked", n, 65, 7, 5)
    if op == "conv_dgrad":
        return grad, s.weight(65, 35), Geometry(), (7, 5), a, s.addend(2, True, n, 35, 7, 5), 2
    if op == "conv_wgrad":
        return a, grad, (65, 35, 1, 1), Geometry()
    w_g, w_a = s.weight(65, 35).flatten(1), s.weight(35, 35).flatten(1)
    return grad.g, grad.mask, w_g, a, w_a, torch.ones(35, device=s.device), 1


@pytest.mark.parametrize("op", LAUNCHES)
def test_heuristic_tiles_give_the_same_answer(op, samples):
    channels = (65, 35) if op == "conv_dgrad" else (35, 65)
    problem = Problem(op, 2, 7, 5, *channels, 1, 1, dtype="float16", prologue=True, epilogue="reluadd")
    plan = triton_plan(problem, None, Device.default(90), "test")
    assert (plan.module, getattr(kernels, plan.launch)) == ("conv1x1_grad", LAUNCHES[op])
    check(op, _arguments(op, samples(torch.float16)), FewRows("triton", plan.config, plan.reason))


@pytest.mark.parametrize("op", LAUNCHES)
def test_empty_batch(op, samples):
    args = _arguments(op, samples())
    empty = [_first_images(value, 0) for value in args]
    result = LAUNCHES[op](*empty, plan=STEPS)
    if op == "conv_wgrad":
        assert result.shape == (65, 35, 1, 1) and (result == 0).all()
    else:
        assert result[0].shape == (0, 35, 7, 5) and (result[1] == 0).all()


def _first_images(value, n):
    if torch.is_tensor(value) and value.dim() == 4 and value.shape[0] == 2:
        return value[:n]
    if isinstance(value, (Deferred, Gradient)):
        return type(value)(*(_first_images(item, n) for item in value))
    return value


def test_nan_in_nan_out(samples):
    """A ReLU that turns NaN into 0 would hide a diverged run; and a NaN stays in its pixel."""
    s = samples()
    dout, mask, w_g, a, *rest = _arguments("conv1x1_dgrad_moments", s)
    a.c[0, 3, 2, 2] = float("nan")
    da, _ = LAUNCHES["conv1x1_dgrad_moments"](dout, mask, w_g, a, *rest, plan=STEPS)
    positive = reference.affine(a.c, a.bn)[0, :, 2, 2] > 0
    assert da[0, positive, 2, 2].isnan().all() and da.isnan().sum() == positive.sum() > 0
    _, grad, *rest = _arguments("conv_wgrad", s)
    dw = LAUNCHES["conv_wgrad"](a, grad, *rest, plan=STEPS)
    assert dw[:, 3].isnan().all() and dw.isnan().sum() == 65
    grad.c[1, 5, 0, 0] = float("nan")
    dx, _ = LAUNCHES["conv_dgrad"](grad, s.weight(65, 35), Geometry(), (7, 5), None, None, 1, plan=STEPS)
    assert dx[1, :, 0, 0].isnan().all() and dx.isnan().sum() == 35


def _far_rows(x, row):
    """An activation whose first pixel is number ``row``."""
    return Far(x, row * x.shape[1])


def _far_bits(mask, row):
    return Far(mask, row * mask.shape[-1])


def _dgrad_sizes(row, out, gemm_k, **constants):
    n, gemm_n, out_h, out_w = out.shape
    sizes = {"gemm_m": row + n * out_h * out_w, "gemm_n": gemm_n, "gemm_k": gemm_k, "out_h": out_h, "out_w": out_w}
    sizes |= {"in_h": out_h, "in_w": out_w, "chunk_pixels": 16, "program_tiles": 1, "STRIDE": 1, "ADDEND_STRIDE": 1}
    return sizes | {"WHOLE_DEPTH": False, "SHORT_A": False} | constants


if not torch.cuda.is_available():
    # Where kernels are compiled, these addresses would have to exist.

    def test_dgrad_of_more_than_2_31_elements(samples, monkeypatch):
        """The last 11 pixels of 1.6e9, where bytes of ReLU bits, too, pass 2^31."""
        s, row = samples(), 1_600_000_000
        grad, w, relu_of = s.gradient("deferred, masked", 1, 40, 1, 11), s.weight(40, 24), s.deferred(1, 24, 1, 11)
        addend = s.addend(1, True, 1, 24, 1, 11)
        dx, sums = torch.empty_like(relu_of.c), torch.empty(1, 2, 24)
        run_program(
            row // 16,
            kernels._conv1x1_dgrad_kernel,
            monkeypatch,
            g_ptr=_far_rows(grad.g, row),
            mask_ptr=_far_bits(grad.mask, row),
            c_ptr=_far_rows(grad.c, row),
            coef_ptr=grad.coef,
            w_ptr=w,
            relu_ptr=_far_rows(relu_of.c, row),
            relu_bn_ptr=relu_of.bn,
            addend_ptr=_far_rows(addend.g, row),
            addend_mask_ptr=_far_bits(addend.mask, row),
            dx_ptr=_far_rows(dx, row),
            sums_ptr=Far(sums, row // 16 * 48),
            **_dgrad_sizes(row, dx, 40),
        )
        args = grad, w, Geometry(), (1, 11), relu_of, addend, 1
        _compare("conv_dgrad", (dx, sums), args)

    def test_strided_addend_of_more_than_2_31_elements(samples, monkeypatch):
        """An image of 4 x 4 pixels behind 100 million others."""
        s, image = samples(), 100_000_000
        grad, w, addend = s.gradient("written", 1, 40, 4, 4), s.weight(40, 24), s.addend(2, True, 1, 24, 4, 4)
        dx, row = torch.empty_like(s.map(1, 24, 4, 4)), image * 16
        run_program(
            row // 16,
            kernels._conv1x1_dgrad_kernel,
            monkeypatch,
            g_ptr=_far_rows(grad.g, row),
            w_ptr=w,
            addend_ptr=_far_rows(addend.g, image * 4),
            addend_mask_ptr=_far_bits(addend.mask, image * 4),
            dx_ptr=_far_rows(dx, row),
            **_dgrad_sizes(row, dx, 40, ADDEND_STRIDE=2),
        )
        _compare("conv_dgrad", (dx, None), (grad, w, Geometry(), (4, 4), None, addend, 2))

    def test_moments_of_more_than_2_31_elements(samples, monkeypatch):
        """Two images of 3 x 5 pixels, read at 2 x 3 of them, behind 66 million others."""
        s, image = samples(), 66_000_000
        a, dout = s.deferred(2, 24, 3, 5, prologue=False), s.map(2, 40, 2, 3)
        w_g, w_a, w_1 = s.weight(40, 24).flatten(1), s.weight(24, 24).flatten(1), torch.ones(24)
        da, row = torch.empty_like(s.map(2, 24, 2, 3)), image * 6
        run_program(
            row // 16,
            kernels._conv1x1_dgrad_kernel,
            monkeypatch,
            g_ptr=_far_rows(dout, row),
            w_ptr=w_g,
            a_ptr=_far_rows(a.c, image * 15),
            w_a_ptr=w_a,
            w_1_ptr=w_1,
            dx_ptr=_far_rows(da, row),
            **_dgrad_sizes(row, da, 40, STRIDE=2, in_h=3, in_w=5),
        )
        _compare("conv1x1_dgrad_moments", (da, None), (dout, None, w_g, a, w_a, w_1, 2))

    def test_resident_moments_of_more_than_2_31_elements(samples, monkeypatch):
        """The last 11 pixels of 1.6e9, where bytes of ReLU bits, too, pass 2^31."""
        s, row = samples(), 1_600_000_000
        a, dout, bits = s.deferred(1, 24, 1, 11), s.map(1, 16, 1, 11), s.bits(1, 16, 1, 11)
        w_g, w_a, w_1 = s.weight(16, 24).flatten(1), s.weight(24, 24).flatten(1), torch.ones(24)
        da, sums = torch.empty_like(a.c), torch.empty(1, 2, 24)
        run_program(
            row // 16,
            kernels._conv1x1_dgrad_resident_kernel,
            monkeypatch,
            g_ptr=_far_rows(dout, row),
            mask_ptr=_far_bits(bits, row),
            w_ptr=w_g,
            a_ptr=_far_rows(a.c, row),
            a_bn_ptr=a.bn,
            w_a_ptr=w_a,
            w_1_ptr=w_1,
            dx_ptr=_far_rows(da, row),
            sums_ptr=Far(sums, row // 16 * 48),
            gemm_m=row + 11,
            gemm_n=24,
            gemm_k=16,
            chunk_pixels=16,
        )
        _compare("conv1x1_dgrad_moments", (da, sums), (dout, bits, w_g, a, w_a, w_1, 1))

    @pytest.mark.parametrize("stride", [1, 2])
    def test_wgrad_of_more_than_2_31_elements(stride, samples, monkeypatch):
        """The last chunk, of two images, behind 66 million others."""
        s, image = samples(), 66_000_000
        grad = s.gradient("deferred, masked", 2, 12, 2, 3)
        a = s.deferred(2, 24, *((2, 3) if stride == 1 else (3, 5)))
        dw, row, pixels = torch.empty(12, 24), image * 6, a.c.shape[2] * a.c.shape[3]
        run_program(
            row // 16,
            kernels._conv1x1_wgrad_kernel,
            monkeypatch,
            a_ptr=_far_rows(a.c, image * pixels),
            a_bn_ptr=a.bn,
            g_ptr=_far_rows(grad.g, row),
            mask_ptr=_far_bits(grad.mask, row),
            c_ptr=_far_rows(grad.c, row),
            coef_ptr=grad.coef,
            dw_ptr=Far(dw, row // 16 * 12 * 24),
            gemm_m=12,
            gemm_n=24,
            in_h=a.c.shape[2],
            in_w=a.c.shape[3],
            out_h=2,
            out_w=3,
            pixels=row + 12,
            chunk_pixels=16,
            STRIDE=stride,
        )
        args = a, grad, (12, 24, 1, 1), Geometry((stride, stride))
        _compare("conv_wgrad", dw.view(12, 24, 1, 1), args)


@pytest.mark.gpu
def test_more_than_2_31_elements(samples):
    """34 million pixels of 64 channels; what the last row of them gives."""
    s, hw = samples(torch.float16), (2**13, 2**12 + 1)
    g = torch.empty(1, 64, *hw, dtype=s.dtype, device="cuda", memory_format=torch.channels_last).zero_()
    g[:, :, -1] = s.map(1, 64, hw[1], 1)[..., 0]
    last, w, geometry = Gradient(g[:, :, -1:]), s.weight(64, 64), Geometry()
    for op, args, small in (
        ("conv_dgrad", (Gradient(g), w, geometry, hw, None, None, 1), (last, w, geometry, (1, hw[1]))),
        ("conv_wgrad", (Deferred(g), Gradient(g), (64, 64, 1, 1), geometry), None),
    ):
        problem = Problem(op, 1, *hw, 64, 64, 1, 1, dtype="float16")
        got = LAUNCHES[op](*args, plan=triton_plan(problem, None, Device.default(90), "test"))
        if op == "conv_dgrad":
            _compare(op, (got[0][:, :, -1:], None), small)
        else:
            _compare(op, got, (Deferred(last.g), last, (64, 64, 1, 1), geometry))


def test_plans_name_their_limits():
    h100, tile = Device.default(90), TileConfig(64, 64, 64, 4, 3)
    plain = Problem("conv_dgrad", 2, 8, 8, 64, 64, 1, 1)
    assert triton_plan(plain, tile, h100, "").module == "conv1x1_grad"
    assert triton_plan(replace(plain, prologue=True), None, h100, "").module == "conv1x1_grad"
    strided = replace(plain, stride=(2, 2))
    assert triton_plan(strided, None, h100, "").module == "conv3x3_grad"
    assert triton_plan(replace(strided, op="conv_wgrad"), None, h100, "").module == "conv1x1_grad"
    # One stride for both directions, as in the forward kernel; others go to the R x S kernels.
    uneven = replace(plain, stride=(1, 2))
    assert triton_plan(replace(uneven, op="conv_wgrad"), None, h100, "").module == "conv3x3_grad"
    assert triton_plan(replace(uneven, op="conv_stats"), None, h100, "").module == "conv3x3"
    moments = replace(strided, op="conv1x1_dgrad_moments")
    assert unsupported(moments, tile, h100) is None
    assert "stride (2, 2)" in unsupported(replace(moments, prologue=True), tile, h100)
    assert "stride (1, 2)" in unsupported(replace(moments, stride=(1, 2)), tile, h100)
    assert "split" in unsupported(replace(moments, stride=(1, 1)), replace(tile, split_k=2), h100)


def test_wide_tiles_where_they_fill_the_card():
    """res2 to res4 of a ResNet-50: columns of the result, depth, and what the shape of the tile answers to."""
    h100 = Device.default(90)

    def tile(op, *shape, **fields):
        config = triton_plan(Problem(op, *shape, 1, 1, **fields), None, h100, "").config
        return config.block_m, config.block_n, config.block_k, config.num_warps

    deferred = {"prologue": True}
    assert tile("conv_dgrad", 256, 56, 56, 64, 256, epilogue="add", **deferred) == (128, 64, 64, 8)
    assert tile("conv_dgrad", 256, 28, 28, 128, 512, epilogue="add", **deferred) == (64, 64, 128, 4)
    assert tile("conv_dgrad", 256, 14, 14, 256, 1024, epilogue="add", **deferred) == (128, 256, 32, 8)
    assert tile("conv_dgrad", 256, 14, 14, 1024, 256, epilogue="relu", **deferred) == (128, 128, 64, 8)
    assert tile("conv1x1_dgrad_moments", 256, 56, 56, 64, 256, **deferred) == (64, 64, 256, 4)
    assert tile("conv1x1_dgrad_moments", 256, 28, 28, 128, 512, **deferred) == (128, 128, 64, 8)
    assert tile("conv1x1_dgrad_moments", 1, 28, 28, 128, 512, **deferred)[1] == 32
    assert tile("conv_wgrad", 256, 56, 56, 256, 64) == (64, 256, 32, 8)
    assert tile("conv_wgrad", 256, 28, 28, 512, 128) == (128, 256, 32, 8)
    assert tile("conv_wgrad", 256, 28, 28, 128, 512, **deferred) == (128, 128, 32, 8)


def test_wrong_arguments_are_named(samples):
    s = samples()
    grad, w, geometry, hw, a, addend, stride = _arguments("conv_dgrad", s)
    dgrad, wgrad, moments = LAUNCHES.values()

    def refused(match, launch, *args):
        with pytest.raises(ValueError, match=match):
            launch(*args, plan=STEPS)

    refused("g must be .* channels_last", dgrad, Gradient(grad.g.contiguous()), w, geometry, hw, None, None, 1)
    refused("mask must be", dgrad, grad._replace(mask=grad.mask[:1]), w, geometry, hw, None, None, 1)
    refused("c is .* expected", dgrad, grad._replace(c=a.c), w, geometry, hw, None, None, 1)
    refused("coef must be", dgrad, grad._replace(coef=grad.coef[:2]), w, geometry, hw, None, None, 1)
    refused("weight is .* expected contiguous", dgrad, grad, w[:60], geometry, hw, None, None, 1)
    refused("stride", dgrad, grad, w, Geometry((2, 2)), hw, None, None, 1)
    refused("not a plain 1x1", dgrad, grad, w, Geometry(padding=(1, 1)), hw, None, None, 1)
    refused("expected the height and width", dgrad, grad, w, geometry, (7, 6), None, None, 1)
    refused("relu_of is", dgrad, grad, w, geometry, hw, Deferred(grad.g), None, 1)
    refused("relu_of.bn", dgrad, grad, w, geometry, hw, a._replace(bn=a.bn[:4]), None, 1)
    refused("relu_of has no BatchNorm", dgrad, grad, w, geometry, hw, Deferred(a.c), None, 1)
    refused("addend is", dgrad, grad, w, geometry, hw, None, addend, 1)
    refused("written out", dgrad, grad, w, geometry, hw, None, addend._replace(coef=a.bn[:3]), stride)
    refused("a is", wgrad, a, grad, (65, 34, 1, 1), geometry)
    refused("g is", wgrad, a, grad, (65, 35, 1, 1), Geometry((2, 2)))
    refused("not a plain 1x1", wgrad, a, grad, (65, 35, 1, 1), Geometry((2, 1)))
    dout, mask, w_g, _, w_a, w_1, _ = _arguments("conv1x1_dgrad_moments", s)
    refused("dout is", moments, dout, mask, w_g, Deferred(a.c), w_a, w_1, 2)
    half = dout[..., :4, :3].contiguous(memory_format=torch.channels_last)
    refused("stride 2", moments, half, None, w_g, a, w_a, w_1, 2)
    refused("w_g is", moments, dout, mask, w_g.T, a, w_a, w_1, 1)
    refused("w_a is", moments, dout, mask, w_g, a, w_a[:, :34], w_1, 1)
    refused("w_1 must be", moments, dout, mask, w_g, a, w_a, w_1.double(), 1)
