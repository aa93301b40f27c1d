"""For tests and benchmarks alone: shapes, random inputs and poisoned allocations; from `trials`, the error budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .trials import (
    as_double,
    assert_within_budget,
    check_operator,
    comparable,
    operator_arguments,
    random_affine,
    random_frozen,
    random_weight,
)

__all__ = [
    "MAP_SHAPES",
    "POINTWISE_SHAPES",
    "as_double",
    "assert_within_budget",
    "check_operator",
    "comparable",
    "operator_arguments",
    "poisoned_allocations",
    "random_activation",
    "random_affine",
    "random_bn",
    "random_frozen",
    "random_weight",
]

# (images, input channels, height, width, output channels, stride) of 1x1 convolutions that break careless indexing:
# channel counts that are no multiple of 8, odd maps, one pixel, one image, several chunks of statistics.
POINTWISE_SHAPES = (
    (2, 35, 7, 5, 65, 1),
    (1, 64, 9, 9, 32, 2),
    (3, 16, 1, 1, 24, 1),
    (1, 65, 3, 11, 35, 2),
    (2, 32, 17, 17, 16, 1),
)
# (images, channels, height, width) for elementwise passes.
MAP_SHAPES = ((2, 35, 7, 5), (1, 64, 9, 9), (3, 8, 1, 1), (2, 65, 17, 17))


def random_activation(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    mean: float = 0.5,
    std: float = 1.0,
    device: str = "cpu",
) -> Tensor:
    """A [N, C, H, W] activation in channels_last memory whose channels are correlated and have means of their own.

    Independent channels with mean zero would hide a wrong covariance and a wrong mean.
    """
    n, c, h, w = shape
    rows = torch.randn(n * h * w, c, generator=generator, dtype=torch.float64)
    common = torch.randn(n * h * w, 1, generator=generator, dtype=torch.float64)
    means = mean * (1 + 0.5 * torch.randn(c, generator=generator, dtype=torch.float64))
    x = (rows + common) * (std / 2**0.5) + means
    return x.view(n, h, w, c).permute(0, 3, 1, 2).to(device, dtype)


def random_bn(c: Tensor, generator: torch.Generator, frozen: bool = False, eps: float = 1e-5) -> Tensor:
    """The bn vectors [5, C] (fp32) of an activation's own statistics under a random gamma and beta."""
    var, mean = torch.var_mean(c.double(), (0, 2, 3), correction=0)
    gamma, beta = (v.double().to(c.device) for v in random_affine(c.shape[1], generator))
    rstd = (var + eps).rsqrt()
    inv_count = torch.full_like(mean, 0.0 if frozen else c.shape[1] / c.numel())
    return torch.stack((mean, rstd, gamma * rstd, beta - mean * gamma * rstd, inv_count)).float()


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN (integers: their largest value) while the block runs.

    What a kernel forgets to write, or reads before writing, then shows.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
