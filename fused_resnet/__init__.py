"""Drop-in ResNet modules whose convolutions, BatchNorms, ReLUs and residual adds run as fused GPU kernels."""

from .autograd import ConvBN
from .convert import fuse, unfuse
from .costs import Cost, Profile, profile
from .explain import Explanation, Record, explain
from .functional import conv_bn_act, residual_block, stem
from .graphs import capture, capture_step
from .models import (
    ResNet,
    cifar_resnet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .modules import FusedBasicBlock, FusedBottleneck, FusedConvBNAct
from .ops import Geometry
from .plan import Unsupported, current_impl, use
from .tuning import tune

__version__ = "0.1.0"
__all__ = [
    "ConvBN",
    "Cost",
    "Explanation",
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNAct",
    "Geometry",
    "Profile",
    "Record",
    "ResNet",
    "Unsupported",
    "capture",
    "capture_step",
    "cifar_resnet",
    "conv_bn_act",
    "current_impl",
    "explain",
    "fuse",
    "profile",
    "residual_block",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "stem",
    "tune",
    "unfuse",
    "use",
    "wide_resnet101_2",
    "wide_resnet50_2",
]
