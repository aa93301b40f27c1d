"""Drop-in modules: torchvision's residual blocks over fused operators, and a lone convolution + BatchNorm + ReLU.

Children stay real `nn.Conv2d` / `nn.BatchNorm2d` leaves with torchvision's names, so checkpoints, weight-decay splits,
SyncBatchNorm conversion and FrozenBatchNorm swaps work as usual. A block runs its children one by one, unfused,
whenever fusing would change what it computes: `unfused_reason()` says why, None if it is fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from . import functional, ops
from . import plan as planning
from .autograd import ConvBN, is_transformed
from .ops import Geometry

UNFUSED = "switched off by unfuse()"


def _is_frozen_bn(module: nn.Module) -> bool:
    """torchvision's FrozenBatchNorm2d, whose four vectors are all buffers; recognised without an import."""
    cls = type(module)
    return cls.__name__ == "FrozenBatchNorm2d" and cls.__module__.startswith("torchvision.")


def _touched(module: nn.Module) -> str | None:
    """Why the module must be called itself: it carries hooks (prune and weight_norm use them), or its own forward."""
    if (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ):  # fmt: skip
        return "carries hooks, which fire only if it is called"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return None


def check_module(model: object) -> None:
    """TypeError for anything but an nn.Module, under the name that every public function has for it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def conv_bn_reason(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why this convolution and BatchNorm cannot be one fused unit, None if they can. Exact types only: a subclass (a
    parametrized one, too) may compute something else."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not exactly nn.Conv2d"
    # A parameter or a plain attribute, as in `_read`.
    if conv._parameters.get("bias") is not None or conv.__dict__.get("bias") is not None:
        return "the convolution has a bias"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not _is_frozen_bn(bn):
        return f"{type(bn).__name__} is not exactly nn.BatchNorm2d, nn.SyncBatchNorm or FrozenBatchNorm2d"
    for child in (conv, bn):
        touched = _touched(child)
        if touched is not None:
            return f"{type(child).__name__} {touched}"
    return None


def _sync_group(bn: nn.Module) -> str:
    """Name of the process group that shares the statistics; "" where nn.SyncBatchNorm would not share any."""
    distributed = torch.distributed
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return ""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ""
    group = bn.process_group or distributed.group.WORLD
    return group.group_name if distributed.get_world_size(group) > 1 else ""


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Its sizes in pairs: code that changes a stride or a dilation afterwards may have set a number."""
    sizes = conv.stride, conv.padding, conv.dilation
    return Geometry(*[size if type(size) is tuple else _pair(size) for size in sizes], conv.groups)


_AFFINE = ("weight", "bias", "running_mean", "running_var")  # what a FrozenBatchNorm2d has
_BATCH_NORM = (*_AFFINE, "num_batches_tracked")


def _read(module: nn.Module, names: tuple[str, ...], traced: bool) -> list[Tensor | None]:
    """Parameters and buffers by name. nn.Module.__getattr__ takes ten times as long as the dicts behind it, but FX
    follows it, and it finds what is kept elsewhere: DataParallel and FSDP set plain attributes."""
    if not traced:
        own = module._parameters | module._buffers
        try:
            return [*map(own.__getitem__, names)]
        except KeyError:
            pass
    return [getattr(module, name) for name in names]


def conv_bn(conv: nn.Conv2d, bn: nn.Module, traced: bool = False) -> ConvBN:
    """The pair as one unit for `functional`, with nn.BatchNorm2d's rules: batch statistics in training or without
    running ones; running statistics updated in training if tracked. `traced`: `functional.is_traced` of the input."""
    (w,) = _read(conv, ("weight",), traced)
    geometry = geometry_of(conv)
    if _is_frozen_bn(bn):
        return ConvBN(w, *_read(bn, _AFFINE, traced), None, geometry, bn.eps, 0.1, False)
    gamma, beta, *buffers = _read(bn, _BATCH_NORM, traced)
    batch_stats = bn.training or (buffers[0] is None and buffers[1] is None)
    if batch_stats and not (bn.training and bn.track_running_stats):
        buffers = None, None, None
    return ConvBN(w, gamma, beta, *buffers, geometry, bn.eps, bn.momentum, batch_stats, _sync_group(bn))


class Switchable(nn.Module):
    """A module of this package that `unfuse` switches off and `fuse` on again."""

    fused: bool = True


class FusedBlock(Switchable):
    """What the residual blocks share: `LAYERS` names the (convolution, BatchNorm, activation) children in order; any
    other child than `downsample` must be an identity for the block to be fused."""

    LAYERS: tuple[tuple[str, str, str], ...] = ()
    identity: bool = True  # whether a block without `downsample` adds its input
    _known: frozenset[str] = frozenset()  # "downsample" and all that `LAYERS` names

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._known = frozenset(("downsample", *(name for layer in cls.LAYERS for name in layer)))

    def unfused_reason(self) -> str | None:
        """Why this block runs its children one by one; None if it is fused."""
        if not self.fused:
            return UNFUSED
        for name, child in self._modules.items():
            if name not in self._known and child is not None and type(child) is not nn.Identity:
                return f"{name} is a {type(child).__name__}"
        for conv, bn, act in self.LAYERS:
            reason = conv_bn_reason(self._modules[conv], self._modules[bn])
            if reason is not None:
                return f"{conv}, {bn}: {reason}"
            activation = self._modules[act]
            if type(activation) is not nn.ReLU:
                return f"{act} is {type(activation).__name__}, not exactly nn.ReLU"
            if _touched(activation) is not None:
                return f"{act} {_touched(activation)}"
        return None

    @staticmethod
    def _projection(down: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """(conv, bn) of a downsample that is exactly those two; None for any other, which is called as it is."""
        # `fuse` may have swapped the Sequential's own class, too.
        plain = getattr(type(down), "ORIGINAL", type(down)) is nn.Sequential
        if plain and len(down) == 2 and _touched(down) is None:
            conv, bn = down
            if conv_bn_reason(conv, bn) is None:
                return conv, bn
        return None

    def _leaves_all_to_children(self, x: Tensor) -> bool:
        """Whether the library's operators run anyway, in eval mode, where an error leaves nothing half-written: the
        children call them with less Python. What they would not understand, or take otherwise, is not left to them.
        """
        if self.training or type(x) is not Tensor or x.dim() != 4 or not len(x) or planning.current_impl() != "auto":
            return False
        first, down = self._modules[self.LAYERS[0][0]], self.downsample
        if type(first) is not nn.Conv2d or first.in_channels != x.shape[1]:
            return False
        if first.weight.dtype != x.dtype or first.weight.device != x.device:
            return False
        norms = [self._modules[bn] for _, bn, _ in self.LAYERS] + ([] if down is None else [*down._modules.values()])
        if any(type(norm) is nn.SyncBatchNorm for norm in norms):  # which needs no GPU here
            return False
        return not functional.is_traced(x) and ops.nothing_measured(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, planes * expansion, H / stride, W / stride]; channels_last when fused."""
        if self._leaves_all_to_children(x) or self.unfused_reason() is not None:
            return self.forward_unfused(x)
        traced = functional.is_traced(x)
        units = [conv_bn(self._modules[conv], self._modules[bn], traced) for conv, bn, _ in self.LAYERS]
        down = self.downsample
        if down is None:
            return functional.residual_block(x, units, identity=self.identity)
        projection = self._projection(down)
        if projection is not None:
            return functional.residual_block(x, units, conv_bn(*projection, traced))
        return functional.residual_block(x, units, residual=down(x))

    def forward_unfused(self, x: Tensor) -> Tensor:
        """The same block as separate calls of its children."""
        out = x
        *inner, last = [[self._modules[name] for name in layer] for layer in self.LAYERS]
        for conv, bn, act in inner:
            out = act(bn(conv(out)))
        conv, bn, act = last
        out = bn(conv(out))
        if self.downsample is not None:
            out += self.downsample(x)
        elif self.identity:
            out += x
        return act(out)

    def zero_init_last(self) -> None:
        """Zero the last BatchNorm's weight, so that the block starts as an identity.

        timm's ResNet calls it; torchvision's, with `zero_init_residual`, knows torchvision's blocks alone.
        """
        bn = self._modules[self.LAYERS[-1][1]]
        if getattr(bn, "weight", None) is not None:
            nn.init.zeros_(bn.weight)


def _conv(inplanes, planes, kernel_size, stride=1, groups=1, dilation=1, **factory) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(
        inplanes, planes, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False, **factory
    )


_TIMM_DEFAULTS = {
    "reduce_first": 1,
    "act_layer": nn.ReLU,
    "attn_layer": None,
    "aa_layer": None,
    "drop_block": None,
    "drop_path": None,
}


def _timm_keywords(block: str, keywords: dict[str, Any]) -> tuple[int | None, int | None, dict[str, Any]]:
    """What timm's ResNet passes besides torchvision's arguments: (cardinality, first_dilation, factory keywords).

    Raises ValueError for an option that needs another block than the plain one, TypeError for an unknown keyword.
    """
    keywords = dict(keywords)
    factory = {k: v for k in ("device", "dtype") if (v := keywords.pop(k, None)) is not None}
    cardinality, first_dilation = keywords.pop("cardinality", None), keywords.pop("first_dilation", None)
    for name, value in keywords.items():
        if name not in _TIMM_DEFAULTS:
            raise TypeError(f"{block}: unexpected argument {name!r}")
        if value is not _TIMM_DEFAULTS[name] and value != _TIMM_DEFAULTS[name]:
            raise ValueError(f"{block}: {name} must be {_TIMM_DEFAULTS[name]!r}, got {value!r}; use timm's own block")
    return cardinality, first_dilation, factory


class FusedBasicBlock(FusedBlock):
    """Residual block of two 3x3 convolutions, relu(BN(conv2(relu(BN(conv1(x))))) + shortcut(x)), fused.

    Constructor, children and state_dict are those of torchvision's BasicBlock; timm's keyword arguments are accepted
    where they ask for the plain block. Source: He et al. 2015, figure 5 left.

    Raises:
        ValueError: groups other than 1 or base_width other than 64.
        NotImplementedError: dilation above 1.
    """

    expansion: int = 1
    LAYERS = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        **timm_keywords: Any,
    ) -> None:
        super().__init__()
        cardinality, first_dilation, factory = _timm_keywords("FusedBasicBlock", timm_keywords)
        groups, dilation = cardinality or groups, max(dilation, first_dilation or 1)
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                "FusedBasicBlock only supports groups=1 and base_width=64, "
                f"got groups={groups}, base_width={base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"FusedBasicBlock: dilation must be 1, got {dilation}")
        self.conv1 = _conv(inplanes, planes, 3, stride, **factory)
        self.bn1 = norm_layer(planes, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3, **factory)
        self.bn2 = norm_layer(planes, **factory)
        self.downsample = downsample
        self.stride = stride


class FusedBottleneck(FusedBlock):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, fused; the stride is on the 3x3 (ResNet v1.5).

    Constructor, children and state_dict are those of torchvision's Bottleneck, width = int(planes * base_width / 64) *
    groups; timm's keyword arguments are accepted where they ask for the plain block. Source: He et al. 2015, figure 5
    right; groups from Xie et al. 2017, wide variants from Zagoruyko and Komodakis 2016.
    """

    expansion: int = 4
    LAYERS = (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu"), ("conv3", "bn3", "relu"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        **timm_keywords: Any,
    ) -> None:
        super().__init__()
        cardinality, first_dilation, factory = _timm_keywords("FusedBottleneck", timm_keywords)
        groups, dilation = cardinality or groups, first_dilation or dilation
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _conv(inplanes, width, 1, **factory)
        self.bn1 = norm_layer(width, **factory)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation, **factory)
        self.bn2 = norm_layer(width, **factory)
        self.conv3 = _conv(width, planes * self.expansion, 1, **factory)
        self.bn3 = norm_layer(planes * self.expansion, **factory)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride


class FusedConvBNAct(Switchable):
    """relu?(BN(conv(x)) + residual) with children `conv`, `bn`, `act`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: as in nn.Conv2d, without bias.
        padding: as there; default dilation * (kernel_size - 1) / 2, which keeps the size at stride 1 and odd kernels.
        act: False for no ReLU.
        norm_layer: default nn.BatchNorm2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        act: bool = True,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(_pair(kernel_size), _pair(dilation)))
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def unfused_reason(self) -> str | None:
        """Why this module runs its children one by one; None if it is fused."""
        if not self.fused:
            return UNFUSED
        conv, bn, act = self._children()
        reason = conv_bn_reason(conv, bn)
        if reason is None and type(act) not in (nn.ReLU, nn.Identity):
            reason = f"act is {type(act).__name__}, not exactly nn.ReLU or nn.Identity"
        if reason is None and _touched(act) is not None:
            reason = f"act {_touched(act)}"
        return reason

    def _children(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self._modules["conv"], self._modules["bn"], self._modules["act"]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, in_channels, H, W], residual of the output's shape or None."""
        conv, bn, act = self._children()
        if self.unfused_reason() is None:
            unit = conv_bn(conv, bn, functional.is_traced(x))
            return functional.conv_bn_act(x, unit, residual, type(act) is nn.ReLU)
        out = bn(conv(x))
        return act(out if residual is None else out + residual)


def stage_convolutions(stage: nn.Module) -> list[tuple[Tensor, Geometry]] | None:
    """(weight, geometry) of each convolution of a stage's first block; None for anything else than blocks in a row."""
    blocks = [*stage._modules.values()] if isinstance(stage, nn.Sequential) else []
    if not blocks or not all(isinstance(block, FusedBlock) for block in blocks):
        return None
    first = (blocks[0]._modules[conv] for conv, _, _ in blocks[0].LAYERS)
    return [(conv.weight, geometry_of(conv)) for conv in first]


def run_in_parts(stage: nn.Sequential, x: Tensor, images: int) -> Tensor:
    """stage(x), that many images at a time; the parts' outputs go into one tensor while they are in the cache."""
    out = None
    # Of shapes alone, one part says what all of them do: `explain` would list every one.
    for start in range(0, images if x.is_meta else x.shape[0], images):
        part = stage(x[start : start + images])
        if out is None:
            out = part.new_empty(x.shape[0], *part.shape[1:]).contiguous(memory_format=torch.channels_last)
        out[start : start + images] = part
    return out


def forward_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """stage(x). In inference a batch runs in parts whose activations stay in the L2 cache
    where that was measured to be faster; BatchNorm with batch statistics forbids it."""
    # A tracer's own tensors stay whole: their batch size may be a symbol.
    plain = type(x) is Tensor and not (torch.compiler.is_compiling() or is_transformed()) and x.dim() == 4
    if not plain or stage.training or torch.is_grad_enabled():
        return stage(x)
    convolutions = stage_convolutions(stage)
    if convolutions is None:
        return stage(x)
    images = ops.part_of_stage(planning.current_impl(), x, convolutions, len(stage))
    if not 0 < images < x.shape[0] or any(m.training or _touched(m) is not None for m in stage.modules()):
        return stage(x)
    return run_in_parts(stage, x, images)


def stem_reason(conv: nn.Module, bn: nn.Module, relu: nn.Module, pool: nn.Module) -> str | None:
    """Why these four cannot be one fused stem, None if they can: the pool must be 3x3, stride 2, padding 1."""
    reason = conv_bn_reason(conv, bn)
    if reason is not None:
        return reason
    if type(relu) is not nn.ReLU:
        return f"{type(relu).__name__} is not exactly nn.ReLU"
    if type(pool) is not nn.MaxPool2d:
        return f"{type(pool).__name__} is not exactly nn.MaxPool2d"
    shape = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
    if shape != (3, 2, 1, 1, False, False):
        return "the pool is not 3x3 with stride 2 and padding 1"
    for child in (relu, pool):
        if _touched(child) is not None:
            return f"{type(child).__name__} {_touched(child)}"
    return None


def forward_stem(conv: nn.Module, bn: nn.Module, relu: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """pool(relu(bn(conv(x)))), fused if `stem_reason` finds nothing against it; the four stay usable one by one."""
    if stem_reason(conv, bn, relu, pool) is None:
        return functional.stem(x, conv_bn(conv, bn, functional.is_traced(x)))
    return pool(relu(bn(conv(x))))


class FusedForward(Switchable):
    """torchvision's forward of a ResNet with its stem as one operator, and stages that may take a batch in parts."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        stem = self.conv1, self.bn1, self.relu, self.maxpool
        stages = self.layer1, self.layer2, self.layer3, self.layer4
        if self.fused:
            x = forward_stem(*stem, x)
            for stage in stages:
                x = forward_stage(stage, x)
        else:
            for module in (*stem, *stages):
                x = module(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
