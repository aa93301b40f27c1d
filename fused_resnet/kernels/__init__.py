"""Triton kernels, one file per family, and the host-side checks their launch functions share.

A launch function receives tensors, NamedTuples by field name and a Plan; it checks what would make the kernel read
out of bounds, allocates its outputs and returns them. It chooses nothing, and autograd does not pass through it.

Activations are [N, C, H, W] in channels_last memory, which the kernels see as rows [N*H*W, C]. This module needs
PyTorch only; Triton is imported by the family modules, when one of their operators first runs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

_CHANNELS_LAST = torch.channels_last


def require_rows(name: str, x: Tensor) -> Tensor:
    """Return ``x`` if it is 4-D in dense channels_last memory, which kernels read as rows [N*H*W, C]; ValueError."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=_CHANNELS_LAST):
        raise ValueError(f"{name} must be [N, C, H, W] in dense channels_last memory; got strides {x.stride()}")
    return x


def require_like(name: str, x: Tensor, like: Tensor) -> Tensor:
    """`require_rows`, and the shape and dtype of ``like``."""
    if x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; expected {tuple(like.shape)} {like.dtype}")
    return require_rows(name, x)


def require_vectors(name: str, x: Tensor, rows: int, channels: int) -> Tensor:
    """Return ``x`` if it is a contiguous fp32 [rows, channels] table of per-channel vectors; ValueError."""
    if x.shape != (rows, channels) or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp32 [{rows}, {channels}]; got {tuple(x.shape)} {x.dtype}")
    return x


def require_channels(channels: int, **vectors: Tensor | None) -> None:
    """ValueError unless each vector is contiguous [channels], or None: kernels read and write them without strides."""
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (channels,) or not vector.is_contiguous()):
            got = f"{tuple(vector.shape)}, strides {vector.stride()}"
            raise ValueError(f"{name} must be a contiguous [{channels}]; got {got}")


def require_frozen(bn, channels: int) -> tuple:
    """The buffers of a BatchNorm (mean, var, gamma | None, beta | None, eps) if they are [channels]; ValueError."""
    require_channels(channels, **{f"bn.{field}": vector for field, vector in bn._asdict().items() if field != "eps"})
    return tuple(bn)


def require_partials(name: str, x: Tensor, rows: int) -> Tensor:
    """Return ``x`` if it is a contiguous fp32 [T, rows, C] table of partial sums; ValueError."""
    if x.dim() != 3 or x.shape[1] != rows or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp32 [T, {rows}, C]; got {tuple(x.shape)} {x.dtype}")
    return x


def require_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return ``mask`` if it holds the ReLU bits of ``like``: contiguous uint8 [N, H, W, ceil(C/8)]; ValueError."""
    n, c, h, w = like.shape
    if mask.shape != (n, h, w, -(-c // 8)) or mask.dtype != torch.uint8 or not mask.is_contiguous():
        raise ValueError(f"mask must be contiguous uint8 {(n, h, w, -(-c // 8))}; got {tuple(mask.shape)} {mask.dtype}")
    return mask


def require_deferred(name: str, a) -> None:
    """ValueError unless ``a`` is Deferred(c, bn | None): rows, and their [5, C] vectors."""
    require_rows(name, a.c)
    if a.bn is not None:
        require_vectors(f"{name}.bn", a.bn, 5, a.c.shape[1])


def require_gradient(grad) -> tuple[Tensor | None, ...]:
    """(g, mask, c, coef) of a deferred gradient, c only where coef asks for it, if they fit together; ValueError."""
    g, mask, c, coef = grad
    require_rows("g", g)
    if mask is not None:
        require_mask(mask, g)
    if coef is None:
        return g, mask, None, None
    return g, mask, require_like("c", c, g), require_vectors("coef", coef, 3, g.shape[1])


def require_addend(addend, stride: int, like: Tensor) -> None:
    """ValueError unless ``addend`` is a Gradient(g, mask) on every stride-th row and column of ``like``."""
    shape = (*like.shape[:2], *(-(-extent // stride) for extent in like.shape[2:]))
    if tuple(require_rows("addend", addend.g).shape) != shape or addend.g.dtype != like.dtype:
        raise ValueError(f"addend is {tuple(addend.g.shape)} {addend.g.dtype}; expected {shape} {like.dtype}")
    if addend.mask is not None:
        require_mask(addend.mask, addend.g)
    if addend.coef is not None:
        raise ValueError("the addend must be written out; only its mask may be deferred")


def require_pointwise(geometry) -> int:
    """The stride of a 1x1 convolution without padding or groups; ValueError for any other geometry."""
    stride, padding = tuple(geometry.stride), tuple(geometry.padding)
    if padding != (0, 0) or geometry.groups != 1 or stride[0] != stride[1]:
        raise ValueError(f"not a plain 1x1 convolution: {geometry}")
    return stride[0]


def require_pixels(x: Tensor, pixels: int) -> None:
    """Raise ValueError unless the pixels of ``x``, and the count ``pixels``, stay below 2^31: indices are 32-bit."""
    if max(x.shape[0] * x.shape[2] * x.shape[3], pixels) >= 2**31:
        raise ValueError(f"{tuple(x.shape)}: pixel indices are 32-bit")


def count_batch(running, momentum: float | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Count one more batch in ``running`` and return what a kernel needs to update it: (mean, var, batches).

    ``batches`` is the counter where the kernel is to read it, with momentum None, and None otherwise. Programs read it,
    so none of them may write it: it is counted before them. ValueError: momentum None without a counter.
    """
    if running is None:
        return None, None, None
    mean, var, batches = running
    if batches is not None:
        batches.add_(1)
    elif momentum is None:
        raise ValueError("momentum=None needs num_batches_tracked")
    return mean, var, batches if momentum is None else None


def empty_rows(n: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    """An uninitialised activation [N, C, H, W] in channels_last memory, dtype and device of ``like``."""
    return torch.empty((n, c, h, w), dtype=like.dtype, device=like.device, memory_format=_CHANNELS_LAST)


def empty_mask(like: Tensor) -> Tensor:
    """Uninitialised ReLU bits of ``like``, uint8 [N, H, W, ceil(C/8)]."""
    n, c, h, w = like.shape
    return torch.empty((n, h, w, -(-c // 8)), dtype=torch.uint8, device=like.device)


def on_device_of(x: Tensor):
    """A context in which Triton launches on the device of ``x``, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def input_precision(dtype: torch.dtype) -> str:
    """Precision of a fp32 dot, "tf32" or "ieee", as PyTorch's switch for convolutions says; "ieee" for 16 bit."""
    if dtype != torch.float32:
        return "ieee"
    switch = torch.backends.cudnn.conv.fp32_precision
    if switch == "none":
        switch = torch.backends.cudnn.fp32_precision
    return "tf32" if switch == "tf32" else "ieee"


def map_options(config) -> dict[str, int]:
    """Tile extents and launch parameters of a pass over a map, by name."""
    options = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return {**options, "maxnreg": config.maxnreg} if config.maxnreg else options


def tile_options(config) -> dict[str, int]:
    """Tile extents and launch parameters of a matrix product, by name."""
    return {**map_options(config), "BLOCK_K": config.block_k}


def wgrad_chunks(w_shape: tuple[int, ...], pixels: int) -> int:
    """Into how many chunks a weight gradient splits its pixels: about 1024 programs of 64 x 64 values, or 256 chunks.

    1024 fill any present card several times over; with these chunks, of 512 pixels or more, the partial results stay
    below 17 MB.
    """
    k, c, r, s = w_shape
    programs = -(-k // 64) * -(-c // 64) * r * s
    return max(1, min(1024 // programs, 256, -(-pixels // 512)))


def convolution_constants(w_shape: tuple[int, ...], geometry) -> dict[str, int]:
    """Extents of the kernel and the geometry, as the constexprs of a convolution; ValueError if grouped."""
    if geometry.groups != 1:
        raise ValueError(f"{geometry.groups} groups; these kernels convolve one")
    constants = {"R": w_shape[2], "S": w_shape[3]}
    for name, pair in zip(("STRIDE", "PAD", "DILATION"), geometry[:3]):
        constants[f"{name}_H"], constants[f"{name}_W"] = pair
    return constants


def output_hw(input_hw: tuple[int, int], w_shape: tuple[int, ...], geometry) -> tuple[int, int]:
    """Height and width, P and Q, of a convolution's output; not positive where the kernel does not fit the image."""
    return tuple(
        (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for extent, taps, stride, pad, dilation in zip(input_hw, w_shape[2:], *geometry[:3])
    )


def tap_major(w: Tensor) -> Tensor:
    """A weight [K, C, R, S] as [K, R, S, C] in memory: ``w`` itself if it is channels_last, else a copy.

    The channels of a tap must be neighbours for wide loads; one copy of a weight costs less than nine strided readings.
    """
    return w.permute(0, 2, 3, 1).contiguous()
