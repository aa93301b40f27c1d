"""`profile(model, input_size)`: parameters, multiply-adds and activation memory of each layer, fused and unfused.

Multiply-adds are counted by `torch.utils.flop_counter`, which learns here what each fused operator computes: any other
use of that counter sees them, too. Activation memory is what autograd keeps for backward, counted on meta tensors.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import plan
from .tracing import LayerTracker, run_on_meta

_op = torch.ops.fused_resnet


def _pixels(shape) -> int:
    return shape[0] * shape[2] * shape[3]


@register_flop_formula(_op.conv_stats)
def _conv_stats_flop(x_shape, bn_in, w_shape, *args, out_shape=None, **kwargs) -> int:
    """2 N P Q K C/groups R S: what the counter says of the same convolution."""
    return 2 * _pixels(out_shape[0]) * prod(w_shape)


@register_flop_formula(_op.conv_affine)
def _conv_affine_flop(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _pixels(out_shape) * prod(w_shape)


@register_flop_formula(_op.bottleneck_affine)
def _bottleneck_flop(x_shape, w_shapes, *args, **kwargs) -> int:
    return 2 * _pixels(x_shape) * sum(map(prod, w_shapes))


@register_flop_formula(_op.conv_affine_pool)
def _conv_affine_pool_flop(
    x_shape, w_shape, mean, var, gamma, beta, eps, stride, padding, dilation, *args, **kwargs
) -> int:
    """The convolution's, whose output is larger than the operator's; a maximum is no multiply-add."""
    outputs = [
        (extent + 2 * pad - step * (taps - 1) - 1) // jump + 1
        for extent, taps, jump, pad, step in zip(x_shape[2:], w_shape[2:], stride, padding, dilation)
    ]
    return 2 * x_shape[0] * prod(outputs) * prod(w_shape)


@register_flop_formula(_op.conv1x1_join)
def _join_flop(x_shape, bn_in, w_shape, bn, shortcut, w_shortcut=None, *args, out_shape=None, **kwargs) -> int:
    widths = prod(w_shape) + (prod(w_shortcut) if w_shortcut is not None else 0)
    return 2 * _pixels(x_shape) * widths


@register_flop_formula(_op.conv_dgrad)
def _dgrad_flop(g_shape, mask, c, coef, w_shape, *args, **kwargs) -> int:
    return 2 * _pixels(g_shape) * prod(w_shape)


@register_flop_formula(_op.conv_wgrad)
def _wgrad_flop(x_shape, bn_in, g_shape, mask, c, coef, w_shape, *args, **kwargs) -> int:
    return 2 * _pixels(g_shape) * prod(w_shape)


@register_flop_formula(_op.moments)
def _moments_flop(x_shape, bn_in, stride, *args, **kwargs) -> int:
    n, k, height, width = x_shape
    return 2 * n * -(-height // stride) * -(-width // stride) * k * k


@register_flop_formula(_op.cross_moments)
def _cross_flop(x_shape, bn_in, g_shape, *args, **kwargs) -> int:
    return 2 * _pixels(g_shape) * x_shape[1] * g_shape[1]


@register_flop_formula(_op.moments_finalize)
def _finalize_flop(gram_shape, w_shape, *args, **kwargs) -> int:
    """Cov W: it does not grow with the batch."""
    n, k = w_shape[:2]
    return 2 * k * k * n


@register_flop_formula(_op.moments_weights)
def _weights_flop(cross_shape, gram_shape, w_shape, *args, **kwargs) -> int:
    """M W and W diag(B) W^T, as large."""
    n, k = w_shape[:2]
    return 2 * 2 * k * k * n


@register_flop_formula(_op.conv1x1_dgrad_moments)
def _dgrad_moments_flop(dout_shape, mask, w_g_shape, x_shape, bn_in, w_a_shape, *args, **kwargs) -> int:
    return 2 * _pixels(dout_shape) * (prod(w_g_shape) + prod(w_a_shape))


@dataclass(frozen=True)
class Cost:
    """One layer, or the total. Multiply-adds of forward, or of forward and backward for a model in training mode;
    `saved_bytes` is what autograd keeps of it for backward, without parameters."""

    layer: str
    parameters: int
    multiply_adds: int
    saved_bytes: int
    multiply_adds_fused: int
    saved_bytes_fused: int


class Profile(list[Cost]):
    """A list of `Cost`, one per layer, that prints as a table; `total` sums it."""

    @property
    def total(self) -> Cost:
        """Sums over all layers."""
        sums = (sum(getattr(cost, field) for cost in self) for field in list(Cost.__dataclass_fields__)[1:])
        return Cost("total", *sums)

    def __str__(self) -> str:
        head = ("layer", "parameters", "multiply-adds", "saved MB", "fused: multiply-adds", "fused: saved MB")
        rows = [
            (c.layer, f"{c.parameters:,}", f"{c.multiply_adds:,}", f"{c.saved_bytes / 1e6:.2f}",
             f"{c.multiply_adds_fused:,}", f"{c.saved_bytes_fused / 1e6:.2f}")
            for c in (*self, self.total)
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
            for row in (head, *rows)
        ]
        rule = "  ".join("-" * w for w in widths)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _conv_backward_flop(
    grad_shape, x_shape, w_shape, bias, stride, padding, dilation, transposed, output_padding, groups, mask, **kwargs
) -> int:
    """Each gradient asked for costs what the convolution does. PyTorch's own formula counts a grouped convolution's
    weight gradient as if it had one group."""
    return sum(mask[:2]) * 2 * _pixels(x_shape if transposed else grad_shape) * prod(w_shape)


class _LayerFlops(FlopCounterMode):
    """The counter, with its counts put down to the tracker's layer."""

    def __init__(self, tracker: LayerTracker) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward_flop})
        self.tracker, self.per_layer = tracker, defaultdict(int)

    def _count_flops(self, func_packet, out, args, kwargs):
        before = self.get_total_flops()
        out = super()._count_flops(func_packet, out, args, kwargs)
        self.per_layer[self.tracker.layer] += self.get_total_flops() - before
        return out


def _measure(model: nn.Module, x: Tensor, impl: str) -> tuple[dict[str, int], dict[str, int]]:
    """(multiply-adds, saved bytes) per layer of one walk; a tensor saved twice counts once, where it is saved first."""
    saved: dict[str, int] = defaultdict(int)
    kept: dict[int, Tensor] = {}
    tracker = LayerTracker(model, lambda *_: None)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Parameters are leaves that need gradients, and stay in memory anyway.
        parameter = (tensor._base if tensor._is_view() else tensor).is_leaf and tensor.requires_grad
        if storage._cdata not in kept and not parameter:
            kept[storage._cdata] = tensor  # keeps the storage alive, so that its address stays its own
            saved[tracker.layer] += storage.nbytes()
        return tensor

    with (
        plan.use(impl),
        tracker,
        _LayerFlops(tracker) as flops,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        run_on_meta(model, x)
    return {layer: count // 2 for layer, count in flops.per_layer.items()}, saved


def profile(
    model: nn.Module, input_size: tuple[int, ...] = (1, 3, 224, 224), dtype: torch.dtype = torch.float32
) -> Profile:
    """Parameters, multiply-adds and saved activations of each layer, as separate operators and fused.

    Args:
        model: in eval mode: forward alone; in training mode: forward and backward, and what is saved between them.
        input_size: [N, C, H, W] of the input. dtype: of the input and all parameters.

    Nothing is computed and the model stays as it is. Multiply-adds follow He et al. 2015, table 1: half the FLOPs of
    convolutions and linear layers. The fused chain may count more of them in training: moments of a 1x1 convolution's
    input, and the products with them that replace reading its output. Some of those do not grow with the batch, and
    weigh on a small one. A stem that runs as one operator counts as the model's own line.
    """
    x = torch.empty(input_size, dtype=dtype, device="meta")
    macs, saved = _measure(model, x, "auto")
    macs_fused, saved_fused = _measure(model, x, "reference")
    parameters: dict[str, int] = defaultdict(int)
    layers = [name or type(model).__name__ for name, _ in model.named_modules()]
    measured = set(macs) | set(saved) | set(macs_fused) | set(saved_fused)
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0]
        while owner not in measured and owner:
            owner = owner.rpartition(".")[0]
        parameters[owner or type(model).__name__] += p.numel()
    measured |= set(parameters)
    return Profile(
        Cost(
            layer,
            parameters[layer],
            macs.get(layer, 0),
            saved.get(layer, 0),
            macs_fused.get(layer, 0),
            saved_fused.get(layer, 0),
        )
        for layer in layers
        if layer in measured
    )
