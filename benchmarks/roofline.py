"""The least time a card needs for a network's convolutions: their arithmetic, and their bytes read and written once.

Forward, per convolution: 2 N P Q K C/groups R S FLOP; its input, output and weights cross memory once, but for pixels
of the input that a strided 1x1 passes over (`fused_resnet.plan.work_of` counts). Training is three such passes:
forward, input gradient, weight gradient (the first layer needs no input gradient). Each pass takes the longer of its
two times, a layer the sum of its passes, the network the sum of its layers: everything around the convolutions is free
here, and so is what a cache or a fused neighbour might save.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.plan import Problem, Work, work_of


class Ceilings(NamedTuple):
    """What a device was measured to do: bytes/s of a copy (read + written) and FLOP/s of a square matrix product."""

    bytes_per_s: float
    flop_per_s: float


def layers(model: nn.Module, shape: tuple[int, ...], dtype: str) -> dict[str, Work]:
    """Forward of the convolutions and linear layers of a model of unfused modules (torchvision's) on meta tensors, by
    name, in order. dtype: PyTorch's name of it."""
    found: dict[str, Work] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(module, nn.Linear):
                problem = Problem("conv2d", inputs[0].shape[0], 1, 1, *module.weight.shape[::-1], 1, 1, dtype=dtype)
            else:
                n, c, h, w = inputs[0].shape
                geometry = module.stride, module.padding, module.dilation, module.groups
                problem = Problem("conv2d", n, h, w, c, out.shape[1], *module.kernel_size, *geometry, dtype)
            found[name] = work_of(problem)

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        with torch.no_grad():
            model(torch.empty(shape, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return found


def floor_seconds(work: Iterable[Work], ceilings: Ceilings, training: bool) -> float:
    """The least time for these layers; training counts three passes, two for the first layer."""
    total = 0.0
    for i, layer in enumerate(work):
        passes = (2 if i == 0 else 3) if training else 1
        total += passes * layer.seconds(*ceilings)
    return total


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth and matrix-product rate, measured now; random operands, since zeros run faster than data.

    fp32 products run as PyTorch's convolutions do: on tensor cores (TF32), unless its switch says otherwise.
    """
    cuda = device == "cuda"
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    elements = 2**30 if cuda else 2**24
    side = 8192 if cuda else 1024
    source = torch.randn(elements // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy = _best_seconds(lambda: target.copy_(source), cuda)
    product = _best_seconds(lambda: a @ b, cuda)
    matmul.fp32_precision = before
    return Ceilings(2 * source.numel() * dtype.itemsize / copy, 2 * side**3 / product)


def _best_seconds(run, cuda: bool, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])
