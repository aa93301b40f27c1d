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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_resnet import FusedBottleneck, ops, plan, reference, testing, use
from fused_resnet.kernels import native, tap_major
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


class _EmulatedLibrary:
    """Stands in for torch.ops.fused_resnet_cuda: the operators of bindings.cpp that have an emulated kernel."""

    def __init__(self, machine, sms=2, seed=0, block_n=0):
        self.machine, self.sms, self.seed, self.block_n = machine, sms, seed, block_n

    def _conv3x3(self, epilogue, x, w, stride, out, bn=None, side=None, mask=None, relu=False, partials=None):
        n, c, h, width = x.shape
        assert w.is_contiguous() and w.shape[1:] == (3, 3, c)
        rows = 0 if partials is None else partials.shape[0]
        tensors = map(_pointer, (x, w, bn, side, mask, out, partials))
        shape = _ints(n, h, width, c, w.shape[0], stride)
        numbers = rows, int(relu), self.sms, self.seed
        _call(
            self.machine.conv3x3, shape, int(x.dtype == torch.bfloat16), epilogue, self.block_n, *tensors, *numbers
        )  # fmt: skip

    def conv3x3_stats_sm90(self, x, w, stride, out, partials):
        self._conv3x3(STATISTICS, x, w, stride, out, partials=partials)

    def conv3x3_affine_sm90(self, x, w, bn, residual, mask, relu, stride, out):
        self._conv3x3(AFFINE, x, w, stride, out, bn, residual, mask, relu)

    def conv3x3_relu_grad_sm90(self, g, w, relu_c, relu_bn, dx, sums):
        self._conv3x3(RELU_GRADIENT, g, w, 1, dx, relu_bn, relu_c, partials=sums)

    def bottleneck_affine_sm90(self, x, w1, bn1, w2, bn2, w3, bn3, out):
        n, _, h, w = x.shape
        tensors = map(_pointer, (x, w1, w2, w3, bn1, bn2, bn3, out))
        _call(
            self.machine.bottleneck, _ints(n, h, w), int(x.dtype == torch.bfloat16), *tensors, self.sms, self.seed
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
MAPS = [(1, 1, 1, 1), (2, 9, 11, 1), (3, 7, 7, 1), (2, 9, 11, 2), (1, 16, 16, 2), (1, 1, 6, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h", "w", "stride"), MAPS)
@pytest.mark.parametrize(("op", "epilogue"), [("conv_stats", "stats"), ("conv_affine", "affine+residual")])
def test_convolution_on_the_emulated_machine(emulated, poison, n, h, w, stride, dtype, op, epilogue):
    """Against the reference in float64, borders on their own, with outputs that start as NaN."""
    problem = _conv(op, n, h, w, 64, 128 if n == 2 else 64, stride, dtype, epilogue)
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(n + h), "cpu")


@pytest.mark.parametrize("block_n", [64, 128, 256])
@pytest.mark.parametrize("seed", range(3))
def test_wide_tiles_and_deep_channels(emulated, poison, block_n, seed):
    """Every width of a tile, more than one turn of every ring, tiles in random order of execution."""
    emulated(block_n=block_n, seed=seed, sms=1 + seed)
    problem = _conv("conv_affine", 1, 12, 13, 128, 256, 1 + seed % 2, DTYPES[seed % 2], "affine")
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(seed), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["relu", "add", ""])
@pytest.mark.parametrize(("n", "h", "w"), [(2, 9, 11), (3, 7, 7), (1, 1, 3)])
def test_input_gradient_on_the_emulated_machine(emulated, poison, n, h, w, dtype, epilogue):
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


@pytest.mark.parametrize("launch", ["stats", "relu"])
def test_partial_sums_do_not_depend_on_the_grid(emulated, launch):
    """Neither on the SMs, nor on the order of threads, nor on the width of a tile."""
    op, epilogue = ("conv_stats", "stats") if launch == "stats" else ("conv_dgrad", "relu")
    problem = _conv(op, 3, 12, 12, 64, 128, 1, torch.bfloat16, epilogue)
    arguments = testing.operator_arguments(problem, torch.Generator().manual_seed(0), "cpu")
    results = []
    for options in ({"sms": 1}, {"sms": 3, "seed": 5}, {"sms": 2, "seed": 9, "block_n": 64}):
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
@pytest.mark.parametrize(("n", "h", "w"), [(1, 8, 8), (2, 9, 13), (1, 1, 1), (1, 17, 25), (3, 7, 7)])
def test_bottleneck_on_the_emulated_machine(emulated, poison, n, h, w, dtype):
    """Several tiles for each warpgroup, tiles beyond the border, borders on their own."""
    emulated(sms=1, seed=n + h)
    problem = replace(_conv("bottleneck_affine", n, h, w, 256, 64, 1, dtype, ""))
    testing.check_operator(problem, _launch(problem), torch.Generator().manual_seed(h), "cpu")


def test_bottleneck_pads_after_batchnorm_and_relu(emulated):
    """With weights of one and shifts of one, a padded relu(shift) would count at the border."""
    x = torch.zeros(1, 256, 9, 9, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    ones = [torch.ones(shape, dtype=torch.float16) for shape in ((64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1))]
    bn = [torch.ones(5, channels) for channels in (64, 64, 256)]
    arguments = x, *(t for pair in zip(ones, bn) for t in pair), Geometry(padding=(1, 1))
    problem = _conv("bottleneck_affine", 1, 9, 9, 256, 64, 1, torch.float16, "")
    out = _launch(problem)(*arguments)
    # A corner sees 4 of 9 taps, an edge 6: 64 * 64 * taps + 64 + 1.
    assert out[0, 0, 0, 0] == 64 * (64 * 4 + 1) + 1 and out[0, 5, 0, 4] == torch.tensor(64 * (64 * 6 + 1) + 1.0).half()
    assert torch.equal(out, reference.bottleneck_affine(*arguments))
