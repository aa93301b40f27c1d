"""The C++/CUDA library: how it is built or left out, what the compiler reports, its checks, and its arithmetic."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_resnet import plan, reference, testing
from fused_resnet.kernels import native
from fused_resnet.reference import Deferred, Running

ROOT = Path(__file__).parent.parent
KERNELS = (
    "bn_finalize_kernel",
    "bn_frozen_kernel",
    "bn_join_kernel",
    "bottleneck_sm90_kernel",
    "conv3x3_halo_sm90_kernel",
    "conv3x3_sm90_kernel",
    "conv3x3_wgrad_sm90_kernel",
    "count_batch_kernel",
    "wgrad_reduce_kernel",
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def _setup(folder, *arguments, **environment):
    """setup.py of a copy of the sources, so that builds leave no traces in the checkout."""
    if not (folder / "setup.py").exists():
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("csrc", "fused_resnet"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library built from this checkout, and what ptxas said."""
    folder = tmp_path_factory.mktemp("native")
    done = _setup(folder, "build_ext", "--inplace", FUSED_RESNET_CUDA="1", MAX_JOBS="2")
    path = folder / "fused_resnet" / "_C.abi3.so"
    assert done.returncode == 0 and path.exists(), done.stdout + done.stderr
    return path, done.stdout + done.stderr


@needs_nvcc
def test_no_kernel_spills_on_any_architecture(library):
    report = library[1]
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\w+)'", report)
    assert {arch for _, arch in kernels} == {"sm_80", "sm_90a", "sm_100"}
    for name in KERNELS:
        assert any(name in kernel for kernel, _ in kernels)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == len(kernels) and set(frames) == {("0", "0", "0")}
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(kernels)
    for (kernel, arch), used in zip(kernels, registers):
        if "sm90_kernel" in kernel:
            # The warpgroups of 384 threads divide the registers among themselves: with fewer they would wait for ever.
            assert arch != "sm_90a" or used == 168, kernel
        else:
            # 512 threads in a block of the finalize; three blocks of 256 on an SM for the memory-bound join.
            assert used <= (128 if "finalize" in kernel else 80), kernel
    assert "Potential Performance Loss" not in report  # setmaxnreg ignored, wgmma one after another


def _cuobjdump():
    """The toolkit's, or the one that Triton ships."""
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton") is not None:
        folder = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(folder))
    return found


@needs_nvcc
@pytest.mark.skipif(_cuobjdump() is None, reason="no cuobjdump")
def test_kernels_for_sm90_use_its_instructions(library):
    """Tensor cores by wgmma, copies and stores by TMA, registers divided between roles, nothing in local memory."""
    command = [_cuobjdump(), "-sass", "-arch", "sm_90a", library[0]]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    names = [text.split("\n", 1)[0] for text in functions]
    kinds = {"conv3x3": 14, "conv3x3_halo": 6, "conv3x3_wgrad": 6, "bottleneck": 4}
    assert {kind: sum(f"{kind}_sm90_kernel" in name for name in names) for kind in kinds} == kinds
    for name, text in zip(names, functions):
        assert not re.search(r"\b(LDL|STL)\b", text), name
        if "sm90_kernel" not in name:
            continue
        products = re.findall(r"HGMMA\.64x\d+x16\.F32(\.BF16)? .*?(gsb0)? ;", text)
        assert {dtype for dtype, _ in products} == {".BF16" if "DataTypeE2" in name else ""}, name
        # Only the last of four or more steps is waited for: the compiler has not put them one after another.
        assert 0 < 4 * sum(bool(wait) for _, wait in products) <= len(products), name
        halo = "halo_sm90_kernel" in name or "bottleneck_sm90_kernel" in name
        copies = ["UTMALDG.4D ", "LDSM.16.M88.4"] if halo else ["UTMALDG.4D.IM2COL", "UTMALDG.2D"]
        stores = [] if "wgrad_sm90_kernel" in name else ["UTMASTG"]
        for instruction in (*copies, *stores, "USETMAXREG"):
            assert instruction in text, f"{name}: no {instruction}"


@needs_nvcc
def test_loads_without_a_gpu_and_refuses_cpu_tensors(library):
    """In a process of its own: an operator library cannot be unloaded, and this package's may be there already."""
    code = f"""
import torch
torch.ops.load_library({str(library[0])!r})
op = torch.ops.fused_resnet_cuda
image, vectors = torch.ones(1, 64, 4, 4), torch.ones(5, 64)
assert str(op.bn_join.default._schema).startswith("fused_resnet_cuda::bn_join(Tensor c, Tensor bn, Tensor shortcut")
for call, words in (
    (lambda: op.bn_finalize(torch.ones(4, 3, 8), None, None, None, None, None, .1, 1e-5, torch.ones(5, 8)),
     ["partials: expected a CUDA tensor"]),
    (lambda: op.bn_finalize(torch.ones(4, 2, 8), None, None, None, None, None, .1, 1e-5, torch.ones(5, 8)),
     ["partials: expected [T, 3, C], got [4, 2, 8]"]),
    (lambda: op.bn_join(torch.ones(2, 8, 3, 3), *[torch.ones(5, 8)] * 2, None, *[torch.ones(1)] * 2),
     ["c: expected a CUDA tensor"]),
    (lambda: op.bn_frozen(*[torch.ones(8)] * 2, None, None, 1e-5, torch.ones(5, 8)),
     ["running_mean: expected a CUDA tensor"]),
    (lambda: op.conv3x3_stats_sm90(image, torch.ones(64, 3, 3, 64), 1, image, torch.ones(64, 3, 64)),
     ["x: expected a CUDA tensor"]),
    (lambda: op.conv3x3_affine_sm90(image, torch.ones(64, 3, 3, 64), [vectors, vectors, None, None], 1e-5, None, None,
                                    True, 1, image), ["x: expected a CUDA tensor"]),
    (lambda: op.conv3x3_relu_grad_sm90(image, torch.ones(64, 3, 3, 64), image, vectors, image, torch.ones(64, 2, 64)),
     ["x: expected a CUDA tensor"]),
    (lambda: op.conv3x3_wgrad_sm90(image, image, 1, *[torch.ones(1, 64, 3, 3, 64)] * 2),
     ["x: expected a CUDA tensor"]),
    (lambda: op.bottleneck_affine_sm90(image, [vectors] * 3, [vectors, vectors, None, None] * 3, [1e-5] * 3, image),
     ["x: expected a CUDA tensor"]),
):
    try:
        call()
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)
print("checked")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "checked", done.stderr


@pytest.mark.parametrize(
    ("wish", "path", "status", "said"),
    [
        ("auto", "", 0, "installing without the CUDA library: nvcc was not found"),
        ("0", None, 0, ""),
        ("1", "", 1, "FUSED_RESNET_CUDA=1, but the CUDA library cannot be built: nvcc was not found"),
        ("yes", None, 1, "FUSED_RESNET_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
)
def test_wish_for_the_library(tmp_path, wish, path, status, said):
    environment = {"FUSED_RESNET_CUDA": wish, "CUDA_HOME": str(tmp_path)}
    done = _setup(tmp_path, "build_ext", "--inplace", **environment | ({"PATH": path} if path is not None else {}))
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert not list((tmp_path / "fused_resnet").glob("_C*.so"))


@needs_nvcc
def test_build_without_pytorch_is_left_out_in_auto(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('blocked')")
    done = _setup(tmp_path, "build_ext", "--inplace", FUSED_RESNET_CUDA="auto", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "PyTorch is not there while building (blocked)" in done.stderr


def test_unknown_architecture_is_named(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    done = _setup(tmp_path, "build_ext", "--inplace", FUSED_RESNET_CUDA="1", FUSED_RESNET_CUDA_ARCHS="hopper")
    assert (
        done.returncode == 1 and "FUSED_RESNET_CUDA_ARCHS: expected numbers like 80;90a;100, got hopper" in done.stderr
    )


def test_missing_library_is_said_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_FILE", "_missing.so")
    native.unavailable.cache_clear()
    try:
        assert "_missing.so was not built" in native.unavailable()
        with pytest.raises(RuntimeError, match="the CUDA library is not available: _missing.so was not built"):
            native.launch_bn_finalize(torch.ones(2, 3, 4), None, None, None, 0.1, 1e-5, None)
    finally:
        native.unavailable.cache_clear()


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    """bn_math.h behind C functions, compiled for the host."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(
        '#include "bn_math.h"\n'
        'extern "C" void merge(const double* a, const double* b, double* out) {\n'
        "  const auto s = fused_resnet::merge({a[0], a[1], a[2]}, {b[0], b[1], b[2]});\n"
        "  out[0] = s.count; out[1] = s.mean; out[2] = s.m2; out[3] = fused_resnet::unbiased_variance(s);\n"
        "}\n"
    )
    path = folder / "host.so"
    subprocess.run(
        [
            "g++",
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-I{ROOT / 'csrc'}",
            str(folder / "host.cpp"),
            "-o",
            str(path),
        ],
        check=True,
    )
    return ctypes.CDLL(str(path))


def _merge(arithmetic, a, b):
    out = np.zeros(4)
    pointers = [np.ascontiguousarray(v, dtype=np.float64).ctypes.data_as(ctypes.c_void_p) for v in (a, b)]
    arithmetic.merge(*pointers, out.ctypes.data_as(ctypes.c_void_p))
    return out


def test_merging_equals_the_statistics_of_the_union(arithmetic):
    values = np.random.default_rng(0).normal(100.0, 0.1, 1000)
    merged = np.zeros(4)
    for part in np.split(values, [1, 7, 400, 400]):  # one of them empty
        mean = part.mean() if len(part) else 0.0
        merged = _merge(arithmetic, merged[:3], [len(part), mean, ((part - mean) ** 2).sum()])
    assert merged[0] == 1000
    np.testing.assert_allclose(merged[1:3], [values.mean(), ((values - values.mean()) ** 2).sum()], rtol=1e-12)
    np.testing.assert_allclose(merged[3], values.var(ddof=1), rtol=1e-12)
    assert _merge(arithmetic, [0, 0, 0], [0, 0, 0]).tolist() == [0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [35, 64, 65, 2048])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_finalize_on_the_device(channels, momentum):
    c = 100 + 0.1 * torch.randn(6, channels, 5, 7, device="cuda", dtype=torch.float64)
    rows = torch.cat([reference.channel_partials(part) for part in c.split((1, 3, 2))]).float()
    rows = torch.cat((rows, torch.zeros(2, 3, channels, device="cuda")))
    gamma, beta = testing.random_affine(channels, torch.Generator().manual_seed(0), "cuda")
    buffers = [
        Running(*(t.to(dtype) for t in (torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda"))),
                torch.tensor(2, device="cuda"))
        for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    judge = reference.bn_finalize(rows.double(), gamma, beta, buffers[1], momentum, 1e-5)
    peer = reference.bn_finalize(rows, gamma, beta, None, momentum, 1e-5)
    got = native.launch_bn_finalize(rows, gamma, beta, buffers[0], momentum, 1e-5, None)
    testing.assert_within_budget(got, judge, peer, "bn")
    for a, b in zip(buffers[0][:2], buffers[1][:2]):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    assert buffers[0].num_batches_tracked == 3
    again = [native.launch_bn_finalize(rows, gamma, beta, None, 0.1, 1e-5, None) for _ in range(50)]
    assert all(torch.equal(again[0], other) for other in again)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [35, 2048])
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_on_the_device(channels, affine):
    generator = torch.Generator().manual_seed(0)
    gamma, beta = testing.random_affine(channels, generator, "cuda") if affine else (None, None)
    mean = torch.randn(channels, generator=generator).cuda()
    arguments = mean, mean.abs() + 0.5, gamma, beta, 1e-5
    got = native.launch_bn_frozen(*arguments, None)
    judge = reference.bn_frozen(*testing.as_double(arguments))
    testing.assert_within_budget(got, judge, reference.bn_frozen(*arguments), "bn")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", testing.MAP_SHAPES)
@pytest.mark.parametrize("projection", [False, True])
def test_join_on_the_device(dtype, shape, projection):
    generator = torch.Generator().manual_seed(0)
    c, s = (testing.random_activation(shape, dtype, generator, device="cuda") for _ in range(2))
    c, s = (t.contiguous(memory_format=torch.channels_last) for t in (c, s))
    bn, bn_s = (testing.random_bn(t, generator).cuda() for t in (c, s))
    main, side = Deferred(c, bn), Deferred(s, bn_s if projection else None)
    out, mask = native.launch_bn_join(main, side, None)
    judge, _ = reference.bn_join(*testing.as_double((main, side)))
    peer, peer_mask = reference.bn_join(main, side)
    testing.assert_within_budget(out, judge, peer)
    assert torch.equal(mask, reference.pack_mask(out > 0)) or torch.equal(mask, peer_mask)


def test_plans_name_launch_functions_that_exist():
    assert plan.CUDA_LAUNCHES and all(callable(getattr(native, k.launch)) for k in plan.CUDA_LAUNCHES.values())
