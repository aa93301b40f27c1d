"""What each kernel of the compiled C++/CUDA library can run, as limits with reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .problem import Device, Plan, Problem, Unsupported


def _bn_unsupported(problem: Problem, device: Device) -> str | None:
    if problem.dtype not in ("bfloat16", "float16", "float32"):
        return f"the kernels compute in fp32; {problem.dtype} data needs more"
    return None


def _sm90_unsupported(problem: Problem, device: Device) -> str | None:
    """The limits of every kernel written for Hopper."""
    if device.arch != 90:
        return f"sm{device.arch}: the kernel uses wgmma and tensor maps as sm90 has them"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"{problem.dtype}: the kernel multiplies 16-bit values"
    if (problem.r, problem.s) != (3, 3):
        return f"no {problem.r}x{problem.s} kernel in the CUDA library"
    if problem.padding != (1, 1) or problem.dilation != (1, 1):
        return f"padding {problem.padding}, dilation {problem.dilation}: the kernel has (1, 1) of both"
    if problem.groups != 1:
        return f"{problem.groups} groups: the kernel convolves one"
    if max(problem.n * problem.h * problem.w, problem.gemm_m) >= 2**31 - 256:
        return "2**31 pixels or more, up to a tile: pixel indices are 32-bit"
    return None


def _conv3x3_unsupported(problem: Problem, device: Device) -> str | None:
    if reason := _sm90_unsupported(problem, device):
        return reason
    if problem.prologue:
        return "operands go from memory to the tensor cores as they are: write the deferred tensor out first"
    strides = ((1, 1),) if problem.op == "conv_dgrad" else ((1, 1), (2, 2))
    if problem.stride not in strides:
        return f"stride {problem.stride}: the kernel has {' and '.join(map(str, strides))}"
    if "relu" in problem.epilogue and "add" in problem.epilogue:
        return "the kernel either adds a gradient or masks by a ReLU"
    if min(problem.c, problem.k) < 64 or problem.c % 64 or problem.k % 64:
        return f"{problem.c} -> {problem.k} channels: the kernel takes multiples of 64"
    return None


def _bottleneck_unsupported(problem: Problem, device: Device) -> str | None:
    if reason := _sm90_unsupported(problem, device):
        return reason
    if problem.stride != (1, 1):
        return f"stride {problem.stride}: the kernel keeps the resolution"
    if (problem.c, problem.k) != (64 if problem.epilogue == "projection" else 256, 64):
        return (
            f"width {problem.k} of {problem.c} channels: only weights of width 64, from 256 channels or, with a "
            "projection, from 64, fit into shared memory"
        )
    return None


class CudaKernel(NamedTuple):
    """A kernel of the library: its launch function in ``kernels/native.py``, and its limits as a reason or None."""

    launch: str
    unsupported: Callable[[Problem, Device], str | None]


CUDA_LAUNCHES = {
    "bn_finalize": CudaKernel("launch_bn_finalize", _bn_unsupported),
    "bn_frozen": CudaKernel("launch_bn_frozen", _bn_unsupported),
    "bn_join": CudaKernel("launch_bn_join", _bn_unsupported),
    "conv_stats": CudaKernel("launch_conv3x3_stats", _conv3x3_unsupported),
    "conv_affine": CudaKernel("launch_conv3x3_affine", _conv3x3_unsupported),
    "conv_dgrad": CudaKernel("launch_conv3x3_dgrad", _conv3x3_unsupported),
    "conv_wgrad": CudaKernel("launch_conv3x3_wgrad", _conv3x3_unsupported),
    "bottleneck_affine": CudaKernel("launch_bottleneck_affine", _bottleneck_unsupported),
}


def cuda_unsupported(problem: Problem, device: Device) -> str | None:
    """Why the library has no kernel for ``problem`` on ``device``, or None if it has one."""
    kernel = CUDA_LAUNCHES.get(problem.op)
    return "no kernel in the CUDA library" if kernel is None else kernel.unsupported(problem, device)


def cuda_plan(problem: Problem, device: Device, reason: str) -> Plan:
    """The Plan that runs ``problem`` in the CUDA library; `Unsupported` if it cannot."""
    if missing := cuda_unsupported(problem, device):
        raise Unsupported(f"{problem.op}: {missing}")
    return Plan("cuda", None, reason, "native", CUDA_LAUNCHES[problem.op].launch)
