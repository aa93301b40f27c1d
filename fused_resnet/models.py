"""The ResNet family with torchvision's names, signatures, state_dict keys, initialisation and strides (v1.5).

And the networks of the paper's experiments (He et al. 2015): CIFAR ResNets of 6n + 2 layers, shortcuts A, B and C, and
plain networks without any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import weights as checkpoints
from .modules import FusedBasicBlock, FusedBlock, FusedBottleneck, FusedForward

SHORTCUTS = ("A", "B", "C", None)


class PadShortcut(nn.Module):
    """Shortcut A: every stride-th pixel, and zeros in the added channels; no parameters, no arithmetic."""

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = outplanes - inplanes, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] -> [N, outplanes, H / stride, W / stride] rounded up, in channels_last memory.

        The zeros go to both ends of the channels.
        """
        # Without it, padding a strided view of odd height or width falls back to NCHW.
        x = x[:, :, :: self.stride, :: self.stride].contiguous(memory_format=torch.channels_last)
        return F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class PlainBlock(FusedBasicBlock):
    """FusedBasicBlock without its shortcut: two convolutions of the degradation experiment's plain networks."""

    identity = False


def _make_shortcut(kind: str | None, inplanes: int, outplanes: int, stride: int, norm_layer) -> nn.Module | None:
    same = stride == 1 and inplanes == outplanes
    if kind is None or (same and kind != "C"):
        return None
    if kind == "A":
        return PadShortcut(inplanes, outplanes, stride)
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), norm_layer(outplanes))


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """He initialisation of convolutions, BatchNorm at (1, 0), in torchvision's order of random draws."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.weight is not None:
            nn.init.constant_(m.weight, 1)
            nn.init.constant_(m.bias, 0)
    if zero_init_residual:
        for m in model.modules():
            # A residual block is known by its children: torchvision's and other people's count, too.
            last = getattr(m, "bn3", None) or (getattr(m, "bn2", None) if hasattr(m, "downsample") else None)
            if last is not None and hasattr(m, "downsample") and getattr(last, "weight", None) is not None:
                nn.init.constant_(last.weight, 0)


class ResNet(FusedForward):
    """torchvision's ResNet over fused blocks: its arguments, attributes, state_dict and results.

    Args:
        block: FusedBasicBlock, FusedBottleneck, or a class with their constructor.
        layers: blocks in each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: start every block as an identity (last BatchNorm's weight 0).
        groups, width_per_group: of the 3x3 convolutions of bottlenecks (ResNeXt, wide ResNet).
        replace_stride_with_dilation: three flags for stages 2 to 4.
        norm_layer: default nn.BatchNorm2d.
        shortcut: "B" (default, torchvision's): projection where shapes change; "A": zero-padded identity; "C":
            projection everywhere; None: none at all, the plain network. All but "B" need FusedBasicBlock.

    Raises ValueError for flags that are not three, a shortcut that is unknown or does not fit the block, or
    zero_init_residual without shortcuts, which would leave a network that no gradient passes.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        shortcut: str | None = "B",
    ) -> None:
        super().__init__()
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self._shortcut = _check_shortcut(shortcut, block)
        if shortcut is None and zero_init_residual:
            raise ValueError("zero_init_residual: must be False with shortcut=None, got True")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        if shortcut is None:
            block = PlainBlock
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self, zero_init_residual)

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        stage = []
        for index in range(blocks):
            first = index == 0
            down = _make_shortcut(self._shortcut, self.inplanes, outplanes, stride if first else 1, self._norm_layer)
            dilation = previous_dilation if first else self.dilation
            stage.append(
                block(
                    self.inplanes, planes, stride if first else 1, down, self.groups, self.base_width, dilation,
                    self._norm_layer,
                )
            )  # fmt: skip
            self.inplanes = outplanes
        return nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        return self._forward_impl(x)


def _check_shortcut(shortcut: str | None, block: type[nn.Module]) -> str | None:
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut: expected one of {', '.join(map(repr, SHORTCUTS))}, got {shortcut!r}")
    if shortcut != "B" and block is not FusedBasicBlock:
        raise ValueError(f'shortcut: {shortcut!r} needs networks of basic blocks (depth 18 and 34); others take "B"')
    return shortcut


def _resnet(
    name: str, block: type[FusedBlock], layers: list[int], weights: Any, progress: bool, **kwargs: Any
) -> ResNet:
    if weights is None:
        return ResNet(block, layers, **kwargs)
    weights = checkpoints.resolve(name, weights)
    if isinstance(weights, str):
        state, source = checkpoints.read_checkpoint(weights), weights
        if "fc.weight" in state and state["fc.weight"].dim() == 2:
            kwargs.setdefault("num_classes", state["fc.weight"].shape[0])
    else:
        classes = len(weights.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(f"num_classes: {weights} has {classes} classes, got {kwargs['num_classes']}")
        state, source = weights.get_state_dict(progress=progress, check_hash=True), str(weights)
    model = ResNet(block, layers, **kwargs)
    checkpoints.load(model, state, source)
    return model


_WEIGHTS = """

    weights: None, a torchvision weights enum member or its name (torchvision is needed then, and may download), or the
    path of a checkpoint file. progress: show a download's progress. Other arguments: `ResNet`'s.
    Raises ValueError for an unknown name, or a file that is damaged or does not fit."""


def _builder(name: str, block: type[FusedBlock], layers: list[int], about: str, **fixed: int) -> Callable[..., ResNet]:
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        for key, value in fixed.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"{key}: {name} has {value}, got {kwargs[key]}")
        return _resnet(name, block, layers, weights, progress, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = about + _WEIGHTS
    return build


_HE = "(He et al. 2015), stride on the 3x3 convolution of a bottleneck (v1.5)."
_XIE = "(Xie et al. 2017)."
_ZAGORUYKO = "(Zagoruyko and Komodakis 2016)."
resnet18 = _builder("resnet18", FusedBasicBlock, [2, 2, 2, 2], f"ResNet-18 {_HE}")
resnet34 = _builder("resnet34", FusedBasicBlock, [3, 4, 6, 3], f"ResNet-34 {_HE}")
resnet50 = _builder("resnet50", FusedBottleneck, [3, 4, 6, 3], f"ResNet-50 {_HE}")
resnet101 = _builder("resnet101", FusedBottleneck, [3, 4, 23, 3], f"ResNet-101 {_HE}")
resnet152 = _builder("resnet152", FusedBottleneck, [3, 8, 36, 3], f"ResNet-152 {_HE}")
resnext50_32x4d = _builder(
    "resnext50_32x4d", FusedBottleneck, [3, 4, 6, 3], f"ResNeXt-50 32x4d {_XIE}", groups=32, width_per_group=4
)
resnext101_32x8d = _builder(
    "resnext101_32x8d", FusedBottleneck, [3, 4, 23, 3], f"ResNeXt-101 32x8d {_XIE}", groups=32, width_per_group=8
)
resnext101_64x4d = _builder(
    "resnext101_64x4d", FusedBottleneck, [3, 4, 23, 3], f"ResNeXt-101 64x4d {_XIE}", groups=64, width_per_group=4
)
wide_resnet50_2 = _builder(
    "wide_resnet50_2", FusedBottleneck, [3, 4, 6, 3], f"Wide ResNet-50-2 {_ZAGORUYKO}", width_per_group=128
)
wide_resnet101_2 = _builder(
    "wide_resnet101_2", FusedBottleneck, [3, 4, 23, 3], f"Wide ResNet-101-2 {_ZAGORUYKO}", width_per_group=128
)
BUILDERS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


class CifarResNet(nn.Module):
    """The paper's CIFAR network of depth 6n + 2: conv 3x3, three stages of n basic blocks of 16, 32, 64, linear."""

    def __init__(self, depth: int, shortcut: str | None = "A", num_classes: int = 10) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: expected 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth!r}")
        _check_shortcut(shortcut, FusedBasicBlock)
        block = PlainBlock if shortcut is None else FusedBasicBlock
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        inplanes = 16
        for index, planes in enumerate((16, 32, 64)):
            stage = []
            for i in range((depth - 2) // 6):
                stride = 2 if index > 0 and i == 0 else 1
                down = _make_shortcut(shortcut, inplanes, planes, stride, nn.BatchNorm2d)
                stage.append(block(inplanes, planes, stride, down))
                inplanes = planes
            setattr(self, f"layer{index + 1}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, zero_init_residual=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(depth: int, shortcut: str | None = "A", num_classes: int = 10) -> CifarResNet:
    """The CIFAR ResNet of He et al. 2015, section 4.2: depth 20, 32, 44, 56, 110 or any 6n + 2.

    shortcut: "A" (the paper's choice there): zero-padded identity, no parameters; "B": projection where shapes change;
    "C": projection everywhere; None: the plain network. Raises ValueError for another depth or shortcut.
    """
    return CifarResNet(depth, shortcut, num_classes)
