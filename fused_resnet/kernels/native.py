"""Launch functions of the optional C++/CUDA library (csrc/), with the signatures of the Triton ones.

The library is loaded when one of them first runs, never at import.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import empty_mask, empty_rows

_FILE = "_C.abi3.so"


@lru_cache
def unavailable() -> str | None:
    """Why the library cannot be used, None if it is loaded."""
    path = Path(__file__).parent.parent / _FILE
    if not path.exists():
        return f"{_FILE} was not built (FUSED_RESNET_CUDA=1 pip install --no-build-isolation . says why)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{_FILE} does not load with PyTorch {torch.__version__}: {error}"
    return None


def _library():
    missing = unavailable()
    if missing is not None:
        raise RuntimeError(f"the CUDA library is not available: {missing}")
    return torch.ops.fused_resnet_cuda


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()


def launch_bn_finalize(partials, gamma, beta, running, momentum, eps, plan):
    """bn [5, C] from partials [T, 3, C]; `running` (mean, var, num_batches_tracked | None), fp32, updated in place."""
    if momentum is not None and momentum < 0:
        raise ValueError(f"momentum: expected None or a number from 0 to 1, got {momentum}")
    mean, var, counter = running if running is not None else (None, None, None)
    bn = torch.empty((5, partials.shape[2]), dtype=torch.float32, device=partials.device)
    weight = -1.0 if momentum is None else momentum
    _library().bn_finalize(partials, _float(gamma), _float(beta), mean, var, counter, weight, eps, bn)
    return bn


def launch_bn_join(main, shortcut, plan):
    """(out, mask): out = relu(c * scale + shift + s), s the shortcut or its affine; mask = bits of out > 0."""
    out, mask = empty_rows(*main.c.shape, like=main.c), empty_mask(main.c)
    _library().bn_join(main.c, main.bn, shortcut.c, shortcut.bn, out, mask)
    return out, mask
