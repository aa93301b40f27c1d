"""Drop-in ResNet modules whose convolutions, BatchNorms, ReLUs and residual adds run as fused GPU kernels."""

from .autograd import ConvBN
from .convert import fuse, unfuse
from .costs import Cost, Profile, profile
from .explain import Explanation, Record, explain
from .functional import conv_bn_act, residual_block, stem
from .graphs import capture, capture_step
from .modules import FusedBasicBlock, FusedBottleneck, FusedConvBNAct
from .ops import Geometry
from .plan import Unsupported, current_impl, use

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
    "Unsupported",
    "capture",
    "capture_step",
    "conv_bn_act",
    "current_impl",
    "explain",
    "fuse",
    "profile",
    "residual_block",
    "stem",
    "unfuse",
    "use",
]
