"""The kernels for sm90: their source on an emulated machine, their arithmetic by brute force, and themselves on a GPU.

hopper_machine.h implements the instructions of csrc/hopper/ptx.cuh on the CPU, where the kernels' own source then runs,
thread by thread: tensor maps, swizzled shared memory, barriers, descriptors, epilogues. What is left for a GPU to show
is that the instructions do what their documentation says.

On a GPU, races and stray accesses: compute-sanitizer --tool memcheck (then racecheck, synccheck)
python -m pytest -q -m gpu tests/test_hopper.py
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_resnet import FusedBottleneck, ops, plan, reference, testing, use
from fused_resnet.kernels import native
from fused_resnet.plan import MODELS, Device, Problem, cuda_plan, cuda_unsupported, model_problems
from fused_resnet.reference import Deferred, Geometry, Gradient

ROOT = Path(__file__).parent.parent
H100 = Device.default(90)
DTYPES = [torch.bfloat16, torch.float16]
STATISTICS, AFFINE, RELU_GRADIENT = range(3)
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """The kernels' source over the emulated machine, and their arithmetic."""
    path = tmp_path_factory.mktemp("hopper") / "machine.so"
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    source = ROOT / "tests" / "hopper_emulation.cpp"
    done = subprocess.run([*command, f"-I{ROOT / 'csrc'}", source, "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def _pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _ints(*values):
    return (ctypes.c_int * len(values))(*values)


def _call(function, *arguments):
    error = ctypes.create_string_buffer(256)
    assert function(*arguments, error) == 0, error.value.decode()


# Arithmetic


def test_machine_reports_what_a_gpu_would_get_wrong(machine):
    error = ctypes.create_string_buffer(256)
    said = []
    for fault in range(8):
        error.value = b""
        assert machine.faulty(fault, error) == (fault > 0)
        said.append(error.value.decode())
    expected = (
        "", "deadlock", "without a proxy fence", "without waiting for its stores", "not aligned",
        "before its initialisation is published", "without a wgmma.fence", "deadlock",
    )  # fmt: skip
    for text, words in zip(said, expected):
        assert words in text and bool(words) == bool(text)


@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_rounds_as_pytorch(machine, dtype):
    machine.round_trip.restype = ctypes.c_float
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-9, 4.9, 2000)
    halfway = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, -(2**-24), 2**-25, 0.0])
    values = torch.cat((values, halfway))
    got = [machine.round_trip(ctypes.c_float(v), int(dtype == torch.bfloat16)) for v in values.tolist()]
    assert torch.equal(torch.tensor(got), values.to(dtype).float())


def test_swizzle_is_a_bijection_without_bank_conflicts(machine):
    offsets = np.array([[machine.tile_offset(row, column) for column in range(64)] for row in range(256)])
    assert sorted(offsets.ravel()) == list(range(0, 256 * 128, 2))
    for row in range(248):  # the eight rows of ldmatrix, and of a warp's accumulators, wherever they start
        for chunk in range(0, 64, 8):
            assert sorted(offsets[row : row + 8, chunk] // 16 % 8) == list(range(8))
            words = offsets[row : row + 8, chunk : chunk + 8 : 2] // 4 % 32
            assert sorted(words.ravel()) == list(range(32))
    # The hardware's view: 16-byte chunks within a pattern of eight rows, xor-ed with the row.
    rows, columns = np.divmod(np.arange(256 * 64), 64)
    assert (offsets.ravel() == rows * 128 + ((columns // 8) ^ (rows % 8)) * 16 + columns % 8 * 2).all()


def test_descriptor_has_the_documented_fields(machine):
    machine.matrix_descriptor.restype = ctypes.c_uint64
    for address in (0, 1024, 96 * 1024 + 32, 226 * 1024 + 96):
        bits = machine.matrix_descriptor(address)
        assert bits & 0x3FFF == address >> 4 and bits >> 14 & 3 == 0  # start address
        assert bits >> 16 & 0x3FFF == 1 and bits >> 32 & 0x3FFF == 1024 >> 4  # leading and stride offsets
        assert bits >> 46 & 0xFFFF == 0 and bits >> 62 == 1  # base offset; 128-byte swizzle
    # What CuTe's make_gmma_desc says of its canonical 128-byte layouts at 0x18000: K-major, 16 values further along the
    # depth; MN-major, 192 wide, in tiles of 8 KiB.
    machine.transposed_descriptor.restype = ctypes.c_uint64
    assert machine.matrix_descriptor(0x18000 + 32) == 0x4000004000011802
    assert machine.transposed_descriptor(0x18000, 8192) == 0x4000004002001800


def test_registers_cover_the_result_once_and_match_the_next_operand(machine):
    seen = {(machine.accumulator_row(t, i), machine.accumulator_column(t, i)) for t in range(128) for i in range(32)}
    assert len(seen) == 64 * 64 and seen == {(row, column) for row in range(64) for column in range(64)}
    # ldmatrix: lane l points at row l % 8 of matrix l / 8, and gets of each matrix row l / 4 and columns l % 4 * 2.
    for lane in range(32):
        for matrix in range(4):
            source = matrix * 8 + lane // 4
            row, column = machine.fragment_row(source), machine.fragment_half(source) * 8 + lane % 4 * 2
            # Accumulators of the result, two to a register, four registers to sixteen columns.
            assert row == machine.accumulator_row(lane, 2 * matrix)
            assert column == machine.accumulator_column(lane, 2 * matrix)


def _layers(op, training):
    """{(n, h, w, c, k, stride): problem} of every layer of every model that the library's kernel `op` takes."""
    found = {}
    for name in MODELS:
        for batch in (1, 7, 32, 256):
            for size in (224, 225):
                for _, p in model_problems(name, batch, size, training):
                    if p.op == op and cuda_unsupported(p, H100) is None:
                        found[(p.n, p.h, p.w, p.c, p.k, p.stride[0])] = p
    assert found
    return found


def _work(machine, shape, epilogue, side, rows, sms):
    out = (ctypes.c_int * 4)()
    first = (ctypes.c_int * (shape[0] * shape[1] * shape[2] // 128 + 2 + rows))()
    machine.conv3x3_work(_ints(*shape), epilogue, side, rows, sms, out, first)
    return (*out, np.array(first[: out[1] + 1]))


@pytest.mark.parametrize("op", ["conv_stats", "conv_affine", "conv_dgrad"])
def test_every_tile_of_every_layer_has_one_work_item(machine, op):
    machine.conv3x3_fault.restype = ctypes.c_char_p
    for shape, problem in _layers(op, op != "conv_affine").items():
        pixels = problem.gemm_m
        rows = 0 if op == "conv_affine" else plan.statistics_rows(problem.k)
        kind = {"conv_stats": STATISTICS, "conv_affine": AFFINE, "conv_dgrad": RELU_GRADIENT}[op]
        for sms in (1, 132):
            tiles, work_rows, columns, block_n, first = _work(machine, shape, kind, 0, rows, sms)
            assert tiles == -(-pixels // 128) and columns * block_n == problem.k and block_n in (64, 128, 256)
            assert work_rows == (min(rows, tiles) if rows else tiles)
            shares = np.diff(first)
            assert first[0] == 0 and first[-1] == tiles and shares.min() >= 1 and np.ptp(shares) <= 1
            assert machine.conv3x3_fault(_ints(*shape), block_n) is None, (shape, block_n)
            assert machine.conv3x3_fault(_ints(*shape), 0) is None, shape  # of the kernel that reads halos


def test_wide_tiles_where_they_fill_the_card(machine):
    """256 filters where that loads least, 128 where the last round would be half empty, never more than there are."""
    assert _work(machine, (256, 14, 14, 256, 256, 1), AFFINE, 0, 0, 132)[3] == 256
    assert _work(machine, (256, 14, 14, 256, 256, 1), AFFINE, 1, 0, 132)[3] == 128  # no room for the residual
    assert _work(machine, (256, 14, 14, 256, 256, 1), STATISTICS, 0, 256, 132)[3] == 128
    assert _work(machine, (1, 14, 14, 256, 256, 1), AFFINE, 0, 0, 132)[3] == 64
    assert _work(machine, (256, 56, 56, 64, 64, 1), STATISTICS, 0, 512, 132)[3] == 64


def test_loads_of_every_layer_walk_over_its_output_pixels(machine):
    """What an im2col load of each tile brings, against the definition of a convolution; tiles cross rows and images."""
    shapes = {(min(s[0], 3), *s[1:3], s[5]) for op in ("conv_stats", "conv_dgrad") for s in _layers(op, True)}
    for n, h, w, stride in shapes | {(5, 1, 1, 2), (5, 2, 3, 2), (5, 3, 2, 1), (2, 1, 300, 2)}:
        p, q = -(-h // stride), -(-w // stride)
        tiles = -(-n * p * q // 128)
        out = (ctypes.c_int * (3 * 128))()
        positions = []
        for tile in range(tiles):
            machine.conv3x3_positions(_ints(n, h, w, 64, 64, stride), tile, out)
            positions.append(np.array(out).reshape(128, 3))
        positions = np.concatenate(positions)
        image, row, column = (np.ravel(grid) for grid in np.indices((n, p, q)))
        expected = np.stack((image, row * stride - 1, column * stride - 1), 1)
        assert (positions[: n * p * q] == expected).all(), (n, h, w, stride)
        assert (positions[n * p * q :, 0] >= n).all()  # beyond the last image: zeros


@pytest.mark.parametrize("shape", [(2, 56, 56), (1, 1, 1), (3, 9, 13), (1, 57, 8), (2, 7, 7)])
def test_bottleneck_tiles_cover_every_pixel_once(machine, shape):
    machine.bottleneck_fault.restype = ctypes.c_char_p
    n, h, w = shape
    out = (ctypes.c_int * (3 * machine.bottleneck_tiles(_ints(*shape), None)))()
    machine.bottleneck_tiles(_ints(*shape), out)
    covered = np.zeros((n, h + 8, w + 8), int)
    for image, row, column in np.array(out).reshape(-1, 3):
        covered[image, row : row + 8, column : column + 8] += 1
    assert (covered[:, :h, :w] == 1).all()
    assert all(machine.bottleneck_fault(_ints(*shape), projection) is None for projection in (0, 1))
    # Output pixel (y, x) reads halo pixel (y + r, x + s), the halo's first one being one above and left of the tile.
    for row in range(64):
        for tap in range(9):
            y, x = divmod(machine.halo(row, tap // 3, tap % 3), 10)
            assert (y, x) == (row // 8 + tap // 3, row % 8 + tap % 3)


# The kernels' source on the emulated machine


class _FrozenBatchNorm(ctypes.Structure):
    """The struct of bn_math.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("mean", "var", "gamma", "beta")), ("eps", ctypes.c_double)]


class _EmulatedLibrary:
    """Stands in for torch.ops.fused_resnet_cuda: the operators of bindings.cpp that have an emulated kernel."""

    def __init__(self, machine, sms=2, seed=0, block_n=0):
        self.machine, self.sms, self.seed, self.block_n = machine, sms, seed, block_n

    def _conv3x3(
        self, epilogue, x, w, stride, out, frozen=(), bn=None, side=None, mask=None, relu=False, partials=None
    ):  # fmt: skip
        n, c, h, width = x.shape
        assert w.is_contiguous() and w.shape[1:] == (3, 3, c)
        rows = 0 if partials is None else partials.shape[0]
        operands, tensors = map(_pointer, (x, w)), map(_pointer, (bn, side, mask, out, partials))
        shape, kind = _ints(n, h, width, c, w.shape[0], stride), int(x.dtype == torch.bfloat16)
        numbers = rows, int(relu), self.sms, self.seed
        vectors = ctypes.byref(_FrozenBatchNorm(*frozen))
        _call(self.machine.conv3x3, shape, kind, epilogue, self.block_n, *operands, vectors, *tensors, *numbers)

    def conv3x3_stats_sm90(self, x, w, stride, out, partials):
        self._conv3x3(STATISTICS, x, w, stride, out, partials=partials)

    def conv3x3_affine_sm90(self, x, w, bn, eps, residual, mask, relu, stride, out):
        frozen = (*map(_pointer, bn), eps) if bn else ()
        self._conv3x3(AFFINE, x, w, stride, out, frozen, None, residual, mask, relu)

    def conv3x3_relu_grad_sm90(self, g, w, relu_c, relu_bn, dx, sums):
        self._conv3x3(RELU_GRADIENT, g, w, 1, dx, (), relu_bn, relu_c, partials=sums)

    def conv3x3_wgrad_sm90(self, x, g, stride, parts, dw):
        n, c, h, w = x.shape
        shape = _ints(n, h, w, c, g.shape[1], stride)
        tensors = map(_pointer, (x, g, parts))
        _call(self.machine.conv3x3_wgrad, shape, int(x.dtype == torch.bfloat16), *tensors, parts.shape[0], self.seed)
        dw.copy_(parts.sum(0))

    def bottleneck_affine_sm90(self, x, weights, bns, eps, out):
        n, _, h, w = x.shape
        shape, kind = _ints(n, h, w), int(x.dtype == torch.bfloat16)
        frozen = [_FrozenBatchNorm(*map(_pointer, bns[4 * i : 4 * i + 4]), eps[i]) for i in range(len(weights))]
        tensors = map(_pointer, (x, *weights, *[None] * (4 - len(weights))))
        _call(
            self.machine.bottleneck, shape, kind, *tensors, (_FrozenBatchNorm * 4)(*frozen), _pointer(out), self.sms,
            self.seed,
        )  # fmt: skip


@pytest.fixture
def emulated(machine, monkeypatch):
    """The launch functions of `native` run on the emulated machine; returns a way to choose its size and order."""

    def choose(**options):
        library = _EmulatedLibrary(machine, **options)
        monkeypatch.setattr(native, "_library", lambda: library)

    choose()
    return choose


def _conv(op, n, h, w, c, k, stride, dtype, epilogue):
    return Problem(
        op, n, h, w, c, k, 3, 3, (stride, stride), (1, 1), dtype=str(dtype).removeprefix("torch."), epilogue=epilogue
    )


def _launch(problem):
    chosen = cuda_plan(problem, H100, "test")
    return lambda *arguments: getattr(native, chosen.launch)(*arguments, plan=chosen)


# Odd maps, one pixel, tiles that end inside of an image and of a row, several images in a tile, rows without a tile.
# 64 to 64 channels at stride 1 are the kernel that reads halos.
MAPS = [(1, 1, 1, 1), (2, 9, 11, 1), (3, 7, 7, 1), (2, 9, 11, 2), (1, 16, 16, 2), (1, 1, 6, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h", "w", "stride"), MAPS)
@pytest.mark.parametrize(("op", "epilogue"), [("conv_stats", "stats"), ("conv_affine", "affine+residual")])
def test_convolution_on_the_emulated_machine(emulated, poison, n, h, w, stride, dtype, op, epilogue):
    """Against the reference in float64, borders on their own, with outputs that start as NaN."""
    emulated(sms=1, seed=h + stride)
    problem = _conv(op, n, h, w, 64, 128 if n == 2 else 64, stride, dtype, epilogue)
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(n + h), "cpu")


@pytest.mark.parametrize("block_n", [64, 128, 256])
@pytest.mark.parametrize("seed", range(3))
def test_wide_tiles_and_deep_channels(emulated, poison, block_n, seed):
    """Every width of a tile, more than one turn of every ring, tiles in random order of execution."""
    emulated(block_n=block_n, seed=seed, sms=1 + seed)
    problem = _conv("conv_affine", 1, 12, 13, 128, 256, 1 + seed % 2, DTYPES[seed % 2], "affine")
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(seed), "cpu")


@pytest.mark.parametrize("filters", [64, 128])
def test_batchnorm_without_gamma_and_beta(emulated, filters):
    problem = _conv("conv_affine", 1, 5, 6, 64, filters, 1, torch.bfloat16, "affine+residual")
    x, w, bn, *others = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu")
    arguments = x, w, bn._replace(gamma=None, beta=None), *others
    judge = reference.conv_affine(*testing.as_double(arguments))
    testing.assert_within_budget(_launch(problem)(*arguments), judge, reference.conv_affine(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["relu", "add", ""])
@pytest.mark.parametrize(("n", "h", "w"), [(2, 9, 11), (3, 7, 7), (1, 1, 3)])
def test_input_gradient_on_the_emulated_machine(emulated, poison, n, h, w, dtype, epilogue):
    emulated(sms=1, seed=h)
    problem = _conv("conv_dgrad", n, h, w, 64, 128 if n == 2 else 64, 1, dtype, epilogue)
    run = _launch(problem)
    testing.check_operator(problem, run, torch.Generator().manual_seed(n), "cpu")
    if epilogue == "add":
        grad, weight, geometry, hw, _, addend, _ = testing.operator_arguments(
            problem, torch.Generator().manual_seed(1), "cpu"
        )
        masked = Gradient(addend.g, reference.pack_mask(torch.randn(addend.g.shape) > 0))
        arguments = grad, weight, geometry, hw, None, masked, 1
        judge = reference.conv_dgrad(*testing.as_double(arguments))[0]
        testing.assert_within_budget(run(*arguments)[0], judge, reference.conv_dgrad(*arguments)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [64, 128, 256])
@pytest.mark.parametrize(("n", "h", "w", "stride"), [(1, 1, 1, 1), (3, 7, 7, 1), (2, 9, 11, 2), (3, 15, 16, 1)])
def test_weight_gradient_on_the_emulated_machine(emulated, poison, n, h, w, stride, filters, dtype):
    """Operands with the depth as rows; chunks of several, one and no full stage; warpgroups that take turns."""
    emulated(seed=n)
    problem = _conv("conv_wgrad", n, h, w, 64, filters, stride, dtype, "")
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(h), "cpu")


def test_weight_gradient_of_more_channels(emulated):
    """Blocks for each 64 channels, rows of taps, and filters beyond a block's."""
    problem = _conv("conv_wgrad", 1, 5, 6, 128, 192, 1, torch.bfloat16, "")
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(0), "cpu")


@pytest.mark.parametrize("filters", [64, 128])
@pytest.mark.parametrize(("op", "epilogue"), [("conv_stats", "stats"), ("conv_dgrad", "relu")])
def test_partial_sums_do_not_depend_on_the_grid(emulated, op, epilogue, filters):
    """Neither on the SMs, nor on the order of threads, nor on the width of a tile."""
    problem = _conv(op, 2, 12, 12, 64, filters, 1, torch.bfloat16, epilogue)
    arguments = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu")
    results = []
    odd = [{"sms": 1 + seed % 2, "seed": seed} for seed in range(1, 12, 2)] if filters == 64 else []
    for options in ({"sms": 1}, {"sms": 3, "seed": 5}, {"sms": 2, "seed": 9, "block_n": filters // 128 * 64}, *odd):
        emulated(**options)
        results.append(_launch(problem)(*arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_statistics_of_a_channel_far_from_zero(emulated):
    """Mean 100, deviation 0.1: E[x^2] - E[x]^2 in fp32 would keep nothing of the variance."""
    x = torch.zeros(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    x[:, 0] = 100.0
    x[:, 1] = (torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1).half().float()
    w = torch.zeros(64, 64, 3, 3)
    w[:, :2, 1, 1] = 1.0
    problem = _conv("conv_stats", 2, 8, 8, 64, 64, 1, torch.float16, "stats")
    _, partials = _launch(problem)(Deferred(x.half()), w.half(), Geometry(padding=(1, 1)))
    count, mean, m2 = reference.merge_partials(partials.double())[0]
    exact = x[:, :2].double().sum(1)
    assert (count == 128).all()
    torch.testing.assert_close(mean, exact.mean().expand(64), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, ((exact - exact.mean()) ** 2).sum().expand(64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["identity", "projection"])
@pytest.mark.parametrize(("n", "h", "w"), [(1, 8, 8), (2, 9, 13), (1, 1, 1), (1, 17, 25), (3, 7, 7)])
def test_bottleneck_on_the_emulated_machine(emulated, poison, n, h, w, dtype, kind):
    """Several tiles for each warpgroup, tiles beyond the border, borders on their own."""
    emulated(sms=1, seed=n + h)
    problem = _conv("bottleneck_affine", n, h, w, 256 if kind == "identity" else 64, 64, 1, dtype, kind)
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(h), "cpu")


def test_bottleneck_pads_after_batchnorm_and_relu(emulated):
    """With weights of one and shifts of one, a padded relu(shift) would count at the border."""
    x = torch.zeros(1, 256, 9, 9, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    ones = [torch.ones(shape, dtype=torch.float16) for shape in ((64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1))]
    # mean 0, var 1, gamma 1 and beta 1: scale and shift of one.
    vectors = [[torch.full((channels,), value) for value in (0.0, 1.0, 1.0, 1.0)] for channels in (64, 64, 256)]
    arguments = x, ones, [reference.Frozen(*four, 0.0) for four in vectors], Geometry(padding=(1, 1))
    problem = _conv("bottleneck_affine", 1, 9, 9, 256, 64, 1, torch.float16, "identity")
    out = _launch(problem)(*arguments)
    # A corner sees 4 of 9 taps, an edge 6: 64 * 64 * taps + 64 + 1.
    assert out[0, 0, 0, 0] == 64 * (64 * 4 + 1) + 1 and out[0, 5, 0, 4] == torch.tensor(64 * (64 * 6 + 1) + 1.0).half()
    assert torch.equal(out, reference.bottleneck_affine(*arguments))


@pytest.mark.parametrize("channels", [256, 64])
def test_bottlenecks_run_in_one_kernel(emulated, monkeypatch, channels):
    """Under "cuda" a bottleneck of width 64 in eval is one operator; its shortcut is the input or a 1x1 of it."""
    monkeypatch.setattr(ops, "device_of", lambda x, impl: H100)
    torch.manual_seed(0)
    down = None
    if channels == 64:
        down = torch.nn.Sequential(torch.nn.Conv2d(64, 256, 1, bias=False), torch.nn.BatchNorm2d(256))
    block = FusedBottleneck(channels, 64, 1, down).eval().to(torch.bfloat16).to(memory_format=torch.channels_last)
    for bn in (module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(bn.float().running_mean, -1, 1)
        torch.nn.init.uniform_(bn.running_var, 0.5, 2)
    x = torch.randn(2, channels, 7, 9).to(torch.bfloat16, memory_format=torch.channels_last)
    launched = []
    launch = native.launch_bottleneck_affine
    monkeypatch.setattr(native, "launch_bottleneck_affine", lambda *a, **k: launched.append(1) or launch(*a, **k))
    with torch.no_grad(), use("cuda"):
        out = block(x)
    with torch.no_grad(), use("reference"):
        peer = block(x)
        judge = block.double()(x.double())
    assert launched == [1]
    testing.assert_within_budget(out, judge, peer)


def _map(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


BAD_CALLS = [
    ("stats", {"a": Deferred(_map(1, 64, 5, 5), torch.ones(5, 64))}, "a must be written out"),
    ("stats", {"a": Deferred(torch.zeros(1, 64, 5, 5, dtype=torch.bfloat16))}, "x must be .* channels_last"),
    ("stats", {"w": _map(64, 32, 3, 3)}, r"weight is \(64, 32, 3, 3\).*expected \[K, 64, 3, 3\]"),
    ("stats", {"w": _map(64, 64, 3, 3, dtype=torch.float16)}, "float16; expected .* torch.bfloat16"),
    ("stats", {"geometry": Geometry((2, 1), (1, 1))}, "expected stride 1 or 2, padding 1, dilation 1 and one group"),
    ("stats", {"geometry": Geometry((1, 1), (1, 1), (2, 2))}, "dilation 1"),
    ("dgrad", {"geometry": Geometry((2, 2), (1, 1))}, "expected stride 1, padding 1"),
    ("dgrad", {"input_hw": (9, 9)}, r"input_hw is \(9, 9\); expected \(5, 5\)"),
    ("dgrad", {"grad": Gradient(_map(1, 64, 5, 5), None, _map(1, 64, 5, 5), torch.ones(3, 64))}, "written out"),
    ("dgrad", {"addend": Gradient(_map(1, 64, 3, 3)), "addend_stride": 2}, "an addend must .* lie on every pixel"),
    ("dgrad", {"addend": Gradient(_map(1, 64, 4, 4))}, "addend is"),
    (
        "dgrad",
        {"relu_of": Deferred(_map(1, 64, 5, 5), torch.ones(3, 64))},
        r"relu_of.bn must be contiguous fp32 \[5, 64\]",
    ),
    ("wgrad", {"w_shape": (64, 64, 1, 1)}, r"w_shape is \(64, 64, 1, 1\); expected \[K, 64, 3, 3\]"),
    ("wgrad", {"grad": Gradient(_map(1, 64, 4, 5))}, r"g is \(1, 64, 4, 5\).*expected \(1, 64, 5, 5\)"),
]


@pytest.mark.parametrize(("launch", "change", "said"), BAD_CALLS)
def test_bad_input_is_named_before_a_kernel_runs(launch, change, said):
    x, w, geometry = Deferred(_map(1, 64, 5, 5)), _map(64, 64, 3, 3), Geometry(padding=(1, 1))
    good = {
        "stats": {"a": x, "w": w, "geometry": geometry},
        "dgrad": {
            "grad": Gradient(_map(1, 64, 5, 5)), "w": w, "geometry": geometry, "input_hw": (5, 5), "relu_of": None,
            "addend": None, "addend_stride": 1,
        },
        "wgrad": {"a": x, "grad": Gradient(_map(1, 64, 5, 5)), "w_shape": (64, 64, 3, 3), "geometry": geometry},
    }[launch]  # fmt: skip
    problem = _conv("conv_stats", 1, 5, 5, 64, 64, 1, torch.bfloat16, "stats")
    with pytest.raises(ValueError, match=said):
        getattr(native, f"launch_conv3x3_{launch}")(**(good | change), plan=cuda_plan(problem, H100, "test"))


# On a GPU

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm90 device"
)
DEVICE_PROBLEMS = [
    *(
        _conv(op, n, h, w, 64, 128, stride, dtype, epilogue)
        for op, epilogue in (("conv_stats", "stats"), ("conv_affine", "affine"), ("conv_affine", "affine+residual"))
        for dtype in DTYPES
        for n, h, w, stride in MAPS
    ),
    *(
        _conv("conv_dgrad", n, h, w, 64, 128, 1, dtype, epilogue)
        for epilogue in ("relu", "add", "")
        for dtype in DTYPES
        for n, h, w, stride in MAPS
        if stride == 1
    ),
    *(
        _conv("conv_wgrad", n, h, w, 128, filters, stride, dtype, "")
        for dtype, filters in zip(DTYPES * 2, (64, 128, 256, 192))
        for n, h, w, stride in MAPS
    ),
    *(
        _conv("bottleneck_affine", *shape, channels, 64, 1, dtype, kind)
        for channels, kind in ((256, "identity"), (64, "projection"))
        for dtype in DTYPES
        for shape in ((1, 1, 1), (2, 9, 13), (3, 7, 7), (1, 8, 8), (4, 56, 56))
    ),
    # The layers of a ResNet-50, more tiles than SMs among them, and every width of a tile.
    *(
        _conv(op, 32, size, size, channels, channels, stride, torch.bfloat16, epilogue)
        for op, epilogue in (
            ("conv_stats", "stats"),
            ("conv_affine", "affine"),
            ("conv_dgrad", "relu"),
            ("conv_wgrad", ""),
        )
        for size, channels, stride in ((56, 64, 1), (28, 128, 1), (56, 128, 2), (14, 256, 1), (7, 512, 1))
        if not (op == "conv_dgrad" and stride == 2)
    ),
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("problem", DEVICE_PROBLEMS, ids=str)
def test_kernels_on_the_device(problem, poison):
    """The error budget against float64, borders on their own, outputs that start as NaN, and 50 times the same bits."""
    run = _launch(problem)
    testing.check_operator(problem, run, torch.Generator().manual_seed(0), "cuda")
    arguments = testing.operator_arguments(problem, torch.Generator().manual_seed(1))
    results = [testing.comparable(problem.op, run(*arguments)) for _ in range(50)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.gpu
@on_hopper
def test_device_and_emulated_machine_agree_bit_by_bit_in_what_is_exact(machine, monkeypatch):
    """Small integers have exact products and sums: whatever differs then lies in the wrong place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (2, 128, 9, 11), generator=generator).to(torch.bfloat16)
    w = torch.randint(-1, 2, (128, 128, 3, 3), generator=generator).to(torch.bfloat16)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    problem = _conv("conv_stats", *(2, 9, 11), 128, 128, 1, torch.bfloat16, "stats")
    arguments = lambda device: (Deferred(x.to(device)), w.to(device), Geometry(padding=(1, 1)))  # noqa: E731
    device = _launch(problem)(*arguments("cuda"))
    monkeypatch.setattr(native, "_library", lambda: _EmulatedLibrary(machine, sms=2))
    for got, expected in zip(device, _launch(problem)(*arguments("cpu"))):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@on_hopper
def test_maps_follow_a_tensor_to_new_memory():
    """The cache of tensor maps goes by address: the same shape elsewhere must not read the old place."""
    problem = _conv("conv_affine", 1, 9, 11, 64, 64, 1, torch.bfloat16, "affine")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        arguments = testing.operator_arguments(problem, generator)
        judge = reference.conv_affine(*testing.as_double(arguments))
        testing.assert_within_budget(_launch(problem)(*arguments), judge, reference.conv_affine(*arguments))
